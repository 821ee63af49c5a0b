//! What a query must not see never reaches its result: NaN and infinity in hidden rows, windows beyond every sequence, and logits so low that
//! only a finite floor tells them from hidden ones.

use folio::Gpu;
use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int8, Int8PerChannel};

use crate::adapter::{self, ALL, CPU, CPU_NO_INT64, CPU_PLAIN, GPU, GPU_PLAIN, Open};
use crate::case::{Case, Rows};

/// Puts NaN and infinities into rows of V and NaN into rows of K, and holds every result to the oracle, which reads visible rows only. Where
/// that is not finite because of V, neither may the kernel's be; what a query gets that sees NaN in K is not said.
#[track_caller]
fn check_poisoned(how: Open, case: &Case, poison: impl Fn(u32, u32) -> Poison) {
    let Some(gpu) = adapter::open(how) else { return };
    check_poisoned_on(&gpu, &case.clone().named(format!("{how:?}")), poison);
}

#[track_caller]
pub(crate) fn check_poisoned_on(gpu: &Gpu, case: &Case, poison: impl Fn(u32, u32) -> Poison) {
    let (mut rows, mut oracle, mut only_keys) = (case.rows(), case.rows(), case.rows());
    let row_len = (case.num_kv_heads * case.head_dim) as usize;
    let every = |rows: &mut [f32], key: u32, stride: usize, value: f32| {
        rows[key as usize * row_len..][..row_len].iter_mut().step_by(stride).for_each(|x| *x = value);
    };
    for (i, &(context_len, query_len)) in case.lens.iter().enumerate() {
        for key in 0..context_len + query_len {
            let Poison { v, stride, k } = poison(context_len + query_len, key);
            if let Some(value) = v {
                every(&mut rows[i].v, key, stride, value);
                every(&mut oracle[i].v, key, stride, f32::NAN);
            }
            if k {
                every(&mut rows[i].k, key, 5, f32::NAN);
                every(&mut oracle[i].k, key, 5, f32::NAN);
                every(&mut only_keys[i].k, key, 5, f32::NAN);
            }
        }
    }
    let (mut out, _) = case.run(gpu, &rows);
    let unsaid = case.expected(&only_keys).into_iter().flat_map(|expected| expected.output.out);
    out.iter_mut().zip(unsaid).filter(|(x, unsaid)| !x.is_finite() || unsaid.is_nan()).for_each(|(x, _)| *x = f32::NAN);
    let finite = out.iter().filter(|x| x.is_finite()).count();
    assert!(finite > out.len() / 8 && finite < out.len(), "{finite} of {} results are finite: a vain test", out.len());
    case.compare(gpu, &oracle, &out, None);
}

/// What becomes of a key's rows.
#[derive(Default)]
pub(crate) struct Poison {
    /// The value of every `stride`th element of V.
    pub(crate) v: Option<f32>,
    pub(crate) stride: usize,
    /// NaN in K.
    pub(crate) k: bool,
}

/// Keys that later queries, earlier queries, or both don't see.
pub(crate) fn behind_window_and_position(seq_len: u32, key: u32) -> Poison {
    let v = match seq_len - key {
        1 => Some(f32::NAN),
        5 => Some(f32::INFINITY),
        23 => Some(f32::NEG_INFINITY),
        24 => Some(f32::NAN),
        _ => None,
    };
    Poison { v, stride: if seq_len - key == 5 { 7 } else { 3 }, k: seq_len - key == 8 }
}

#[test]
fn hidden_rows_behind_windows_and_positions() {
    let formats = [
        (CPU, F16, F16),
        (CPU, F32, F32),
        (CPU, Int8PerChannel, E4M3),
        (CPU, Int8, Int8),
        (CPU_NO_INT64, F16, F32),
        (CPU_NO_INT64, F32, F16),
        (CPU_PLAIN, F32, F16),
        (CPU_PLAIN, F16, E4M3),
        (CPU_PLAIN, Int4, Int4),
        (GPU, F16, F16),
        (GPU, Int8, E4M3),
        (GPU, F16, Int8),
        (GPU, F32, F32),
        (GPU_PLAIN, F32, F16),
        (GPU_PLAIN, Int4, F32),
    ];
    for (how, k_format, v_format) in formats {
        let case = Case::new(&[(50, 1), (20, 33), (7, 16), (0, 40)], 4, 2, 40)
            .formats(k_format, v_format)
            .config(|config| config.window = Some(13));
        check_poisoned(how, &case, behind_window_and_position);
    }
}

/// One token, and many, of sequences that are split, with bits that hide keys in the middle of a range.
#[test]
fn hidden_rows_behind_masks() {
    let formats: [(Open, KvFormat, KvFormat); 11] = [
        (CPU, F32, F16),
        (CPU, F16, F32),
        (CPU, Int8, Int8),
        (CPU_NO_INT64, F32, E4M3),
        (CPU_PLAIN, F32, F32),
        (CPU_PLAIN, Int8, F16),
        (CPU_PLAIN, F32, Int8),
        (GPU, F16, F32),
        (GPU, Int8, Int8),
        (GPU_PLAIN, F16, Int4),
        (GPU_PLAIN, F32, F16),
    ];
    for (i, (how, k_format, v_format)) in formats.into_iter().enumerate() {
        let mut case = Case::new(&[(40, 1), (9, 20), (67, 1), (1100, 5), (1025, 1), (1, 1), (2, 1), (0, 1)], 4, 2, 32)
            .formats(k_format, v_format)
            .config(|config| {
                config.custom_mask = true;
                config.causal = i % 2 == 0;
                config.deterministic = true;
            });
        case.mask_density = 0.3;
        check_poisoned(how, &case, |seq_len, key| {
            let v = [(7, f32::NAN), (14, f32::INFINITY), (20, f32::NAN)].into_iter().find(|x| x.0 == key);
            let v = v.map(|x| x.1).or((seq_len - key == 1 && seq_len > 1100).then_some(f32::NAN));
            Poison { v, stride: 3, k: key == 3 || (key == 0 && seq_len < 40) }
        });
    }
}

/// Windows beyond the longest sequence hide nothing, whatever is added to them.
#[test]
fn windows_beyond_every_sequence() {
    for (i, how) in ALL.into_iter().enumerate() {
        let Some(gpu) = adapter::open(how) else { return };
        let case = |window| {
            Case::new(&[(40, 1), (9, 20)], 4, 2, 32).formats(F16, F16).config(|config| {
                config.window = window;
                config.causal = i % 2 == 0;
            })
        };
        for window in [u32::MAX, u32::MAX - 20, (1 << 31) + 1] {
            case(Some(window)).named(format!("{how:?}, {window}")).check(&gpu);
        }
    }
}

/// Logits down to -1e36 and differences as large: a key with the only one is seen, whatever it is.
#[test]
fn the_lowest_logits_are_visible() {
    for how in ALL {
        let Some(gpu) = adapter::open(how) else { return };
        // Sequences of one token: half of the logits are below 0, and no other key is there to outweigh them.
        let lens = [(0, 1), (0, 2), (0, 1), (17, 1), (3, 3), (0, 1)];
        let case = Case::new(&lens, 4, 2, 32).named(format!("{how:?}")).config(|config| config.lse = true);
        case.clone().config(|config| config.softmax_scale = Some(-1e35)).check(&gpu);
        // Far keys alone, by a mask, under slopes that leave them with -1e36 or so.
        let mut far = case.config(|config| {
            config.custom_mask = true;
            config.alibi_slopes = Some(vec![1e34, 3e33, 1e20, -1e34]);
        });
        far.lens = vec![(100, 1), (60, 9), (1100, 3), (1300, 1)];
        let mut rows = far.rows();
        keep_first_key(&far, &mut rows);
        let (out, lse) = far.run(&gpu, &rows);
        far.compare(&gpu, &rows, &out, lse.as_deref());
    }
}

/// Hides all keys but the first one.
fn keep_first_key(case: &Case, rows: &mut [Rows]) {
    for (rows, &(context_len, query_len)) in rows.iter_mut().zip(&case.lens) {
        let words = (context_len + query_len).div_ceil(32) as usize;
        for (i, word) in rows.mask.iter_mut().enumerate() {
            *word = u32::from(i % words == 0);
        }
    }
}

/// Options that alone could take a logit to the floor's half are refused, and those just below are not.
#[test]
fn options_that_reach_the_floor_are_refused() {
    let cache = folio::KvCacheConfig::new(1, 1, 8).with_blocks(64, 16).with_formats(F16, F16);
    let with = |change: fn(&mut folio::AttentionConfig)| {
        let mut config = folio::AttentionConfig::new(1);
        change(&mut config);
        config.validate(&cache).map_err(|error| error.to_string())
    };
    for (name, refused) in [
        ("sinks", with(|config| config.sinks = Some(vec![-6e37]))),
        ("softcap", with(|config| config.softcap = Some(6e37))),
        // Over 1024 tokens.
        ("alibi_slopes", with(|config| config.alibi_slopes = Some(vec![-6e34]))),
        ("softmax_scale", with(|config| config.softmax_scale = Some(3e38))),
    ] {
        let message = refused.expect_err(name);
        assert!(message.starts_with(name), "{message}");
    }
    with(|config| {
        config.sinks = Some(vec![-5.8e37]);
        config.softcap = Some(5e36);
        config.alibi_slopes = Some(vec![5e34]);
        config.softmax_scale = Some(-1e38);
    })
    .expect("all below");
}

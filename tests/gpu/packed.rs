//! Decode with quantised queries against the oracle: the grids of the other kernels, and queries that 8 bits suit badly.

use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
use folio::kernel::Kernel;
use folio::{Attention, Gpu, ShaderChecks};

use crate::adapter::{self, GPU, GPU_PLAIN, Open};
use crate::case::{Case, Rows, option_of_four_heads};
use crate::hidden::{Poison, check_poisoned_on};

/// K with codes, beside every kind of V.
const CODED: [(KvFormat, KvFormat); 8] = [
    (Int8, Int8),
    (Int4, F16),
    (Int8PerChannel, Int4),
    (Int4PerChannel, E4M3),
    (Int4, Int4),
    (Int8, F32),
    (Int4PerChannel, Int8),
    (Int8PerChannel, F16),
];

fn open(how: Open) -> Option<Gpu> {
    adapter::open(how).map(|gpu| gpu.with_packed_dots(true))
}

fn case(lens: &[(u32, u32)], num_q_heads: u32, num_kv_heads: u32, head_dim: u32) -> Case {
    let mut case = Case::new(lens, num_q_heads, num_kv_heads, head_dim).formats(Int8, Int8);
    case.packed_dots = true;
    case
}

fn packs(attention: &Attention) -> bool {
    attention.variants().any(|variant| variant.packed_dots)
}

/// Runs it, after making sure that decode quantises queries.
#[track_caller]
fn check(gpu: &Gpu, case: &Case) {
    check_rows(gpu, case, &case.rows());
}

#[track_caller]
fn check_rows(gpu: &Gpu, case: &Case, rows: &[Rows]) {
    let (cache, sequences) = case.fill(gpu, rows);
    let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
    assert!(packs(&attention), "decode without packed dot products");
    let (out, lse) = case.attend(&cache, &attention, &sequences, rows);
    case.compare(gpu, rows, &out, lse.as_deref());
}

#[test]
fn packed_head_dims_groups_and_block_sizes() {
    const SHAPES: [(u32, u32, u32, u32); 12] = [
        (8, 1, 3, 1),
        (24, 7, 1, 5),
        (40, 2, 2, 16),
        (64, 1, 2, 32),
        (64, 4, 2, 8),
        (64, 8, 1, 16),
        (72, 4, 1, 64),
        (96, 1, 2, 1),
        (96, 8, 1, 32),
        (128, 4, 2, 5),
        (128, 8, 1, 16),
        (256, 4, 1, 16),
    ];
    for (how, first) in [(GPU, 0), (GPU_PLAIN, 3)] {
        let Some(gpu) = open(how) else { return };
        // Half of them without subgroups: those of odd groups and short rows among them.
        let every = if how == GPU { 1 } else { 2 };
        for (i, (head_dim, group_size, num_kv_heads, block_size)) in SHAPES.into_iter().enumerate().step_by(every) {
            let lens = [(block_size - 1, 1), (block_size, 1), (2 * block_size + 1, 1), (0, 1), (150, 1)];
            let case = case(&lens, group_size * num_kv_heads, num_kv_heads, head_dim).block_size(block_size);
            let (k_format, v_format) = CODED[(first + i) % CODED.len()];
            let case = case.formats(k_format, v_format).named(format!("{how:?}"));
            check(&gpu, &case.config(|config| config.lse = i % 2 == 0));
        }
    }
}

/// Every format of K at the head dims whose loads differ: 16, 8 and 4 bytes, one or two words of codes of the query each.
#[test]
fn packed_formats() {
    let Some(gpu) = open(GPU) else { return };
    for (i, (k_format, v_format)) in CODED.into_iter().enumerate() {
        for head_dim in [[64, 72], [72, 128], [128, 64]][i % 3] {
            let case = case(&[(50, 1), (7, 1), (0, 1), (129, 1)], 8, 2, head_dim).formats(k_format, v_format);
            check(&gpu, &case.config(|config| config.lse = true));
        }
    }
}

/// Each option alone and all together, with small and with large logits.
#[test]
fn packed_options() {
    for (i, q_scale) in (0..8).flat_map(|i| [(i, 1.0), (i, 30.0)]) {
        let Some(gpu) = open([GPU, GPU_PLAIN][i % 2]) else { return };
        let (k_format, v_format) = CODED[i % CODED.len()];
        let case = case(&[(50, 1), (7, 1), (0, 1), (129, 1)], 4, 2, 24).formats(k_format, v_format).q_scale(q_scale);
        check(&gpu, &case.config(|config| option_of_four_heads(config, i)));
    }
}

/// Long contexts: split, merged, and among them sequences with more than one new token, which prefill takes.
#[test]
fn packed_over_split_keys() {
    let Some(gpu) = open(GPU) else { return };
    for (k_format, v_format) in [(Int8, Int8), (Int4, F16), (Int4PerChannel, Int4)] {
        let case = case(&[(3000, 1), (1024, 1), (20, 5), (0, 1)], 4, 1, 32).formats(k_format, v_format);
        check(
            &gpu,
            &case.config(|config| {
                config.lse = true;
                config.sinks = Some(vec![1.0, -1.0, 0.0, 3.0]);
            }),
        );
    }
}

/// Rows whose largest element takes all codes, rows of zeros of either sign, and scales that leave the range of f32 and come back.
#[test]
fn packed_queries_of_all_magnitudes() {
    let lens = [(20, 1), (0, 1), (67, 1)];
    for (i, (q_scale, softmax_scale)) in
        [(1e30, 1e-30), (1e-30, 1e30), (1e34, 1e-34), (1e-37, 1.0), (1.0, 1e-36), (1e-20, 1e-20), (3e37, 0.01)]
            .into_iter()
            .enumerate()
    {
        let Some(gpu) = open([GPU, GPU_PLAIN][i % 2]) else { return };
        let (k_format, v_format) = CODED[i % CODED.len()];
        let mut case = case(&lens, 8, 2, 40).formats(k_format, v_format).q_scale(q_scale);
        case.config.softmax_scale = Some(softmax_scale);
        case.config.lse = true;
        check(&gpu, &case);
    }
    let changes: [fn(usize) -> f32; 5] = [
        // An outlier channel, of each sign.
        |i| if i % 40 == 7 { 1000.0 } else { 1.0 },
        |i| if i % 40 == 39 { -60.0 } else { 1.0 },
        // Zeros of both signs, all over and in one head.
        |i| if i % 2 == 0 { 0.0 } else { -0.0 },
        |i| if (i / 40) % 3 == 1 { -0.0 } else { 1.0 },
        // All magnitudes in one row.
        |i| [1.0, 1e-3, 1e-6, -1.0, 1e-12, 1e-30, -1e-38][i % 7],
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let Some(gpu) = open([GPU, GPU_PLAIN][i % 2]) else { return };
        for formats in [CODED[i], CODED[(i + 1) % CODED.len()]] {
            let mut case = case(&lens, 8, 2, 40).formats(formats.0, formats.1);
            case.config.lse = true;
            let mut rows = case.rows();
            rows.iter_mut().for_each(|rows| rows.q.iter_mut().enumerate().for_each(|(i, x)| *x *= change(i)));
            check_rows(&gpu, &case, &rows);
        }
    }
}

/// A query with a NaN or an infinity has no result, and its neighbours have theirs.
#[test]
fn packed_queries_that_are_no_numbers() {
    for (i, how) in [GPU, GPU_PLAIN].into_iter().enumerate() {
        let Some(gpu) = open(how) else { return };
        for (k_format, v_format) in [CODED[i], CODED[i + 2], CODED[i + 4]] {
            let case = case(&[(20, 1), (0, 1), (67, 1)], 8, 2, 40).formats(k_format, v_format);
            let mut rows = case.rows();
            for rows in &mut rows {
                (rows.q[43], rows.q[3 * 40], rows.q[6 * 40 + 39]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
            }
            check_rows(&gpu, &case, &rows);
        }
    }
}

#[test]
fn hidden_rows_never_reach_a_packed_product() {
    for (i, (k_format, v_format)) in [(Int8, Int8), (Int4, F16), (Int8, F32), (Int4, Int4)].into_iter().enumerate() {
        let Some(gpu) = open([GPU, GPU_PLAIN][i % 2]) else { return };
        let mut case = case(&[(40, 1), (9, 1), (67, 1), (300, 1), (1, 1), (2, 1), (0, 1)], 4, 2, 24)
            .formats(k_format, v_format)
            .config(|config| config.custom_mask = true);
        case.mask_density = 0.3;
        check_poisoned_on(&gpu, &case, |_, key| {
            let v = [(7, f32::NAN), (14, f32::INFINITY), (20, f32::NAN)].into_iter().find(|x| x.0 == key);
            Poison { v: v.map(|x| x.1), stride: 3, k: key == 3 }
        });
    }
}

#[test]
fn packed_under_full_checks() {
    let Some(gpu) = open(Open { checks: ShaderChecks::Full, ..GPU }) else { return };
    for (k_format, v_format) in [(Int8, F16), (Int4PerChannel, Int8)] {
        check(&gpu, &case(&[(50, 1), (7, 1)], 8, 2, 72).formats(k_format, v_format));
    }
}

/// Nobody who didn't ask for it gets it, nor do deterministic attention, groups that prefill takes, and keys without codes. Their results are the
/// same bits as on a device that doesn't allow it.
#[test]
fn queries_are_quantised_only_where_they_may_be() {
    let Some(plain) = adapter::open(GPU) else { return };
    assert!(!plain.packed_dots() && !plain.target().packed_dots);
    let packed = plain.with_packed_dots(true);
    let lens = [(40, 1), (9, 1)];
    let unchanged = [
        Case::new(&lens, 8, 2, 32).formats(Int8, Int8).config(|config| config.deterministic = true),
        Case::new(&lens, 16, 1, 32).formats(Int8, Int8),
        Case::new(&lens, 8, 2, 32).formats(F16, Int8),
        Case::new(&lens, 8, 2, 32).formats(E4M3, Int4),
        Case::new(&lens, 8, 2, 32).formats(F32, F32),
    ];
    let bits = |gpu: &Gpu, case: &Case| {
        let rows = case.rows();
        let (cache, sequences) = case.fill(gpu, &rows);
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        let (out, _) = case.attend(&cache, &attention, &sequences, &rows);
        (packs(&attention), out.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    for case in unchanged {
        let (got, want) = (bits(&packed, &case), bits(&plain, &case));
        assert!(!got.0 && !want.0, "{case:?}");
        assert_eq!(got.1, want.1, "{case:?}");
    }
    let coded = Case::new(&lens, 8, 2, 32).formats(Int8, Int8);
    let (got, want) = (bits(&packed, &coded), bits(&plain, &coded));
    assert!(got.0 && !want.0);
    assert_ne!(got.1, want.1, "quantised queries without any effect");
    // Prefill has no form for it, on any device.
    let cpu = adapter::open(adapter::CPU).map(|gpu| gpu.with_packed_dots(true));
    for gpu in [Some(packed), cpu].into_iter().flatten() {
        let (cache, _) = coded.fill(&gpu, &coded.rows());
        let attention = Attention::new_blocking(&cache, coded.config.clone()).expect("attention");
        for variant in attention.variants() {
            let may = variant.kernel == Kernel::Decode && gpu.profile() == folio::Profile::Gpu;
            assert_eq!((variant.packed_dots, variant.features().packed_dots), (may, may), "{variant:?}");
        }
    }
}

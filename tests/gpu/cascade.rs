//! Blocks that sequences share are read once for all of them, and attention states merge.

use folio::Cascade::{Always, Never};
use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
use folio::wgpu;
use folio::{Attention, AttentionConfig, Cascade, Gpu, MergeStates};

use crate::adapter::{self, ALL, CPU, GPU, GPU_MATRIX};
use crate::case::{Case, upload};

/// Sixteen sequences with 192 common tokens and a bit more.
fn forks(k_format: KvFormat, v_format: KvFormat) -> Case {
    let lens: Vec<_> = (0..16).map(|i| (200 + i * 3, 1)).collect();
    let mut case = Case::new(&lens, 8, 2, 64).formats(k_format, v_format).config(|config| config.cascade = Always);
    case.prefix = 197;
    case
}

/// Compares with the oracle, and returns the rows that are read, and those that would be without cascades.
#[track_caller]
fn check(gpu: &Gpu, case: &Case) -> [u64; 2] {
    let case = case.clone().named(format!("{:?} {:?} {:?}", gpu.profile(), case.k_format, case.v_format));
    let rows = case.rows();
    let (cache, sequences) = case.fill(gpu, &rows);
    let read = [case.config.cascade, Never].map(|cascade| {
        let mut config = case.config.clone();
        config.cascade = cascade;
        let attention = Attention::new_blocking(&cache, config).expect("attention");
        let batch: Vec<_> = sequences.iter().copied().zip(case.lens.iter().map(|lens| lens.1)).collect();
        let step = cache.begin_step(&batch).expect("step");
        attention.plan(&step).expect("plan").step_plan().lists.kv_rows_read(case.num_kv_heads)
    });
    let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
    let (out, lse) = case.attend(&cache, &attention, &sequences, &rows);
    case.compare(gpu, &rows, &out, lse.as_deref());
    read
}

#[track_caller]
fn check_all(case: &Case) {
    for how in ALL {
        let Some(gpu) = adapter::open(how) else { return };
        let [read, alone] = check(&gpu, case);
        assert!(2 * read < alone, "{read} rows of {alone} are read: {how:?}\n{case:?}");
    }
}

#[test]
fn forks_read_their_common_blocks_once() {
    check_all(&forks(F32, F32));
}

#[test]
fn in_every_format() {
    let formats =
        [(F16, F16), (E4M3, E4M3), (Int8, Int8), (Int4, Int4), (Int8PerChannel, Int8), (Int4PerChannel, Int4)];
    for ((k, v), how) in formats.into_iter().zip([CPU, GPU].into_iter().cycle()) {
        let Some(gpu) = adapter::open(how) else { return };
        let [read, alone] = check(&gpu, &forks(k, v));
        assert!(2 * read < alone, "{read} rows of {alone}: {how:?}");
    }
}

/// Others stand between the forks, some forks have several new tokens, and all options that go with cascades are on.
#[test]
fn mixed_batches_with_options() {
    let lens: Vec<_> =
        (0..22).map(|i| (200 + i * 3, [1, 2, 1, 1, if i < 6 { 40 } else { 1 }, 1][i as usize % 6])).collect();
    let mut case = Case::new(&lens, 8, 2, 64).config(|config| {
        config.cascade = Always;
        config.lse = true;
        config.softcap = Some(20.0);
        config.sinks = Some((0..8).map(|head| head as f32 / 2.0 - 2.0).collect());
        config.softmax_scale = Some(0.2);
    });
    case.prefix = 200;
    check_all(&case);
    let case = case.config(|config| config.causal = false);
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        check(&gpu, &case);
    }
}

/// The same with matrix units, where there are any.
#[test]
fn with_matrix_units() {
    if let Some(gpu) = adapter::open(GPU_MATRIX) {
        let mut case = forks(F16, F16);
        case.f16_products = gpu.matrix_size().is_some();
        check(&gpu, &case);
    }
}

/// Where queries at different places see different keys, and where bits must not depend on the batch, nothing is shared.
#[test]
fn not_where_it_would_change_the_result() {
    let Some(gpu) = adapter::open(CPU) else { return };
    let changes: [fn(&mut AttentionConfig); 4] = [
        |config| config.window = Some(100),
        |config| config.alibi_slopes = Some(vec![0.1; 8]),
        |config| config.custom_mask = true,
        |config| config.deterministic = true,
    ];
    for change in changes {
        let case = forks(F32, F32).config(change);
        if case.config.custom_mask {
            case.check(&gpu);
            continue;
        }
        let [read, alone] = check(&gpu, &case);
        assert_eq!(read, alone);
    }
    // Two texts of 200 tokens are not worth a dispatch.
    let mut few = forks(F32, F32).config(|config| config.cascade = Cascade::WhereItPays);
    few.lens.truncate(2);
    let [read, alone] = check(&gpu, &few);
    assert_eq!(read, alone);
}

/// What merging is, in f64.
fn merged(states: &[(Vec<f32>, f32)]) -> (Vec<f64>, f64) {
    let largest = states.iter().map(|state| f64::from(state.1)).fold(f64::NEG_INFINITY, f64::max);
    let dim = states[0].0.len();
    if largest == f64::NEG_INFINITY {
        return (vec![0.0; dim], largest);
    }
    let weights: Vec<f64> = states.iter().map(|state| (f64::from(state.1) - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let out = (0..dim).map(|d| {
        let terms = states.iter().zip(&weights).filter(|(_, weight)| **weight > 0.0);
        terms.map(|(state, weight)| f64::from(state.0[d]) * weight).sum::<f64>() / sum
    });
    (out.collect(), largest + sum.ln())
}

fn run(gpu: &Gpu, merge: &MergeStates, states: &[Vec<(Vec<f32>, f32)>], dim: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = states[0].len();
    let outs: Vec<f32> = states.iter().flatten().flat_map(|state| state.0.clone()).collect();
    let lses: Vec<f32> = states.iter().flatten().map(|state| state.1).collect();
    let (outs, lses) = (upload(gpu, &outs), upload(gpu, &lses));
    let (out, lse) = (upload(gpu, &vec![f32::NAN; rows * dim]), upload(gpu, &vec![f32::NAN; rows]));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let (num_states, num_rows) = (states.len() as u32, rows as u32);
    merge.record(&mut encoder, num_states, num_rows, &outs, &lses, &out, &lse).expect("merge");
    gpu.queue().submit([encoder.finish()]);
    (gpu.read_blocking(&out).expect("out"), gpu.read_blocking(&lse).expect("lse"))
}

#[test]
fn states_merge_as_their_definition_says() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut rng = fastrand::Rng::with_seed(5);
    for (dim, num_states, rows) in [(4, 1, 3), (64, 2, 100), (40, 7, 33), (256, 3, 257), (128, 20, 5)] {
        let merge = MergeStates::new_blocking(&gpu, dim).expect("a kernel");
        let mut states: Vec<Vec<(Vec<f32>, f32)>> = Vec::new();
        for _ in 0..num_states {
            let row = |rng: &mut fastrand::Rng| {
                let lse = match rng.u32(0..6) {
                    0 => f32::NEG_INFINITY,
                    1 => rng.f32() * 2e4 - 1e4,
                    _ => rng.f32() * 6.0 - 3.0,
                };
                // Nobody looks at what an empty state holds.
                let out = (0..dim).map(|_| if lse == f32::NEG_INFINITY { f32::NAN } else { rng.f32() - 0.5 });
                (out.collect(), lse)
            };
            states.push((0..rows).map(|_| row(&mut rng)).collect());
        }
        // One row of nothing at all.
        states.iter_mut().for_each(|state| state[1].1 = f32::NEG_INFINITY);
        let (out, lse) = run(&gpu, &merge, &states, dim as usize);
        for row in 0..rows {
            let of_row: Vec<_> = states.iter().map(|state| state[row].clone()).collect();
            let (expected, expected_lse) = merged(&of_row);
            let got = &out[row * dim as usize..][..dim as usize];
            for (got, want) in got.iter().zip(&expected) {
                // Each of n weights is off by exp's 3 + 2 * |x| ulp (x within 90, or the weight is nothing), the sums by n ulp each.
                let bound = f64::from(num_states + 200) * f64::from(f32::EPSILON);
                assert!((f64::from(*got) - want).abs() <= bound, "{got} is not {want}: {of_row:?}");
            }
            let same = expected_lse == f64::NEG_INFINITY && lse[row] == f32::NEG_INFINITY;
            assert!(same || (f64::from(lse[row]) - expected_lse).abs() <= 1e-6 * expected_lse.abs().max(20.0));
            let seen: Vec<_> = of_row.iter().filter(|state| state.1 > f32::NEG_INFINITY).collect();
            if let [only] = seen[..] {
                assert_eq!((got, lse[row].to_bits()), (&only.0[..], only.1.to_bits()), "one state stays as it is");
            }
        }
    }
}

/// Attention over two halves of the keys, merged, is attention over all of them.
#[test]
fn two_halves_merge_to_the_whole() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let whole = Case::new(&[(299, 5)], 8, 2, 64).config(|config| {
        config.lse = true;
        config.causal = false;
    });
    let rows = whole.rows();
    let row = (whole.num_kv_heads * whole.head_dim) as usize;
    let mut states = Vec::new();
    for keys in [0..130, 130..304] {
        let mut part = whole.clone();
        part.lens = vec![(keys.len() as u32 - 5, 5)];
        let mut rows = whole.rows();
        (rows[0].k, rows[0].v) = (
            rows[0].k[keys.start * row..keys.end * row].to_vec(),
            rows[0].v[keys.start * row..keys.end * row].to_vec(),
        );
        let (out, lse) = part.run(&gpu, &rows);
        states.push(out.chunks(64).map(<[f32]>::to_vec).zip(lse.expect("lse")).collect());
    }
    let merge = MergeStates::new_blocking(&gpu, 64).expect("a kernel");
    let (out, lse) = run(&gpu, &merge, &states, 64);
    whole.compare(&gpu, &rows, &out, Some(&lse));
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for dim in [0, 6, 1 << 20] {
        let error = MergeStates::new_blocking(&gpu, dim).expect_err("refused").to_string();
        assert!(error.starts_with("head_dim"), "{error}");
    }
    let merge = MergeStates::new_blocking(&gpu, 8).expect("a kernel");
    let buffers = [48, 6, 24, 3, 24].map(|len| upload(&gpu, &vec![0.0; len]));
    let [outs, lses, out, lse, other] = &buffers;
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let mut refused = |states, rows, outs, lses, out, lse, name: &str| {
        let error = merge.record(&mut encoder, states, rows, outs, lses, out, lse).expect_err(name).to_string();
        assert!(error.starts_with(name), "{error}");
    };
    refused(0, 3, outs, lses, out, lse, "num_states");
    refused(2, 0, outs, lses, out, lse, "num_rows");
    refused(3, 3, outs, lses, out, lse, "outs");
    refused(u32::MAX, u32::MAX, outs, lses, out, lse, "outs");
    refused(2, 3, outs, out, out, lse, "lses");
    refused(2, 3, outs, lses, lse, lse, "out");
    refused(1, 6, outs, lses, outs, lses, "out");
    refused(1, 3, out, lse, other, lse, "lse");
}

//! Prefill with matrix units against the oracle: the grids of the other kernels, and numbers that halves don't have.
//!
//! Of CPU adapters only lavapipe has matrix units, from Mesa 26.1 on; on all others these tests are skipped. It compiles such kernels for
//! many seconds each, so heads are small where they may be.

use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
use folio::kernel::Kernel;
use folio::{Attention, Gpu, ShaderChecks};

use crate::adapter::{self, GPU_MATRIX, Open};
use crate::case::{Case, Rows, option_of_four_heads};
use crate::hidden::{Poison, behind_window_and_position, check_poisoned_on};

const NARROW: [(KvFormat, KvFormat); 9] = [
    (F16, F16),
    (E4M3, E4M3),
    (Int8, Int8),
    (Int4, Int4),
    (Int8PerChannel, Int8),
    (Int4PerChannel, Int4),
    (F16, Int8),
    (Int8, F16),
    (E4M3, Int4),
];

fn open() -> Option<Gpu> {
    adapter::open_matrix(GPU_MATRIX)
}

fn case(lens: &[(u32, u32)], num_q_heads: u32, num_kv_heads: u32, head_dim: u32) -> Case {
    let mut case = Case::new(lens, num_q_heads, num_kv_heads, head_dim).formats(F16, F16);
    case.f16_products = true;
    case
}

/// Runs it, after making sure that matrix units do the work.
#[track_caller]
fn check(gpu: &Gpu, case: &Case) {
    check_rows(gpu, case, &case.rows());
}

#[track_caller]
fn check_rows(gpu: &Gpu, case: &Case, rows: &[Rows]) {
    let (cache, sequences) = case.fill(gpu, rows);
    let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
    assert_eq!(prefill_size(&attention), gpu.matrix_size(), "prefill without matrix units");
    let (out, lse) = case.attend(&cache, &attention, &sequences, rows);
    case.compare(gpu, rows, &out, lse.as_deref());
}

fn prefill_size(attention: &Attention) -> Option<folio::MatrixSize> {
    attention.variants().find(|variant| variant.kernel == Kernel::Prefill).expect("prefill").target.matrix
}

#[test]
fn matrices_multiply_a_ragged_batch() {
    let Some(gpu) = open() else { return };
    check(&gpu, &case(&[(0, 33), (7, 16), (40, 5), (0, 1), (100, 70)], 8, 2, 64));
}

#[test]
fn matrices_of_head_dims_groups_and_block_sizes() {
    let Some(gpu) = open() else { return };
    const SHAPES: [(u32, u32, u32, u32); 8] = [
        (8, 1, 3, 1),
        (40, 7, 2, 16),
        (64, 1, 2, 32),
        (72, 4, 1, 64),
        (80, 8, 1, 256),
        (96, 1, 2, 1),
        (128, 4, 2, 5),
        (256, 4, 1, 16),
    ];
    for (i, (head_dim, group_size, num_kv_heads, block_size)) in SHAPES.into_iter().enumerate() {
        let lens = [(block_size - 1, 2), (block_size, 35), (2 * block_size + 1, 9), (0, block_size.min(40) + 1)];
        let case = case(&lens, group_size * num_kv_heads, num_kv_heads, head_dim).block_size(block_size);
        check(&gpu, &case.config(|config| config.lse = i % 2 == 0));
    }
}

#[test]
fn matrices_of_every_format() {
    let Some(gpu) = open() else { return };
    for (i, (k_format, v_format)) in NARROW.into_iter().enumerate() {
        let head_dim = [24, 40, 16, 32][i % 4];
        let case = case(&[(50, 33), (7, 16), (0, 40)], 8, 2, head_dim).formats(k_format, v_format);
        check(&gpu, &case.config(|config| config.lse = true));
    }
}

/// Each option alone and all together, with small and with huge logits.
#[test]
fn matrices_with_options() {
    let Some(gpu) = open() else { return };
    for (i, q_scale) in (0..8).flat_map(|i| [(i, 1.0), (i, 200.0)]) {
        let formats = NARROW[i % NARROW.len()];
        let case =
            case(&[(50, 33), (7, 16), (0, 40), (129, 3)], 4, 2, 24).formats(formats.0, formats.1).q_scale(q_scale);
        check(&gpu, &case.config(|config| option_of_four_heads(config, i)));
    }
}

/// Long contexts: split, merged, and more tiles than the tests above have.
#[test]
fn matrices_over_split_keys() {
    let Some(gpu) = open() else { return };
    for (i, formats) in [(F16, F16), (Int8, Int8)].into_iter().enumerate() {
        let case = case(&[(3000, 33), (1024, 5), (0, 200)], 2, 1, 32).formats(formats.0, formats.1);
        check(
            &gpu,
            &case.config(|config| {
                config.deterministic = i == 0;
                config.lse = true;
                config.sinks = (i == 1).then(|| vec![1.0, -1.0]);
            }),
        );
    }
}

/// Queries that are no halves, up and down, and such that have both in one row.
#[test]
fn queries_beyond_halves() {
    let Some(gpu) = open() else { return };
    for (i, (q_scale, softmax_scale)) in
        [(1e30, 1e-30), (1e-30, 1e30), (1e34, 1e-34), (70_000.0, 1e-5)].into_iter().enumerate()
    {
        let (k_format, v_format) = NARROW[i];
        let mut case = case(&[(20, 33), (0, 7)], 4, 2, 24).formats(k_format, v_format).q_scale(q_scale);
        case.config.softmax_scale = Some(softmax_scale);
        case.config.lse = true;
        check(&gpu, &case);
        let mut rows = case.rows();
        for (j, x) in rows.iter_mut().flat_map(|rows| &mut rows.q).enumerate() {
            *x *= [1.0, 1e-3, 1e-6, 1.0, 1e-12][j % 5];
        }
        check_rows(&gpu, &case, &rows);
    }
}

/// Values and keys of every magnitude beside one another: large rows of which little is seen must not take digits from small ones.
#[test]
fn rows_of_all_magnitudes() {
    let Some(gpu) = open() else { return };
    let magnitudes = [1.0, 1e30, 1e-30, 60_000.0, 1e-5, 1e8, 1e-12];
    for (k_format, v_format) in [(Int8, Int8), (Int4, Int4), (F16, Int8)] {
        let case = case(&[(20, 33), (90, 20), (0, 7)], 4, 2, 24).formats(k_format, v_format);
        let mut case = case.config(|config| config.window = Some(9));
        case.config.lse = true;
        let mut rows = case.rows();
        for rows in &mut rows {
            for (key, v) in rows.v.chunks_mut(2 * 24).enumerate() {
                v.iter_mut().for_each(|x| *x *= magnitudes[key % magnitudes.len()]);
            }
        }
        check_rows(&gpu, &case, &rows);
        // Each query sees rows of one magnitude only.
        case.config.window = Some(1);
        check_rows(&gpu, &case, &rows);
    }
    // The ends of the formats that have no scales.
    for (format, largest) in [(F16, 65504.0), (E4M3, 448.0)] {
        let mut case = case(&[(20, 33)], 4, 2, 24).formats(format, format).q_scale(1e-3);
        case.config.lse = true;
        let mut rows = case.rows();
        for x in rows.iter_mut().flat_map(|rows| rows.k.iter_mut().chain(&mut rows.v)) {
            *x = (*x * 0.6 * largest).clamp(-largest, largest);
        }
        check_rows(&gpu, &case, &rows);
    }
}

#[test]
fn hidden_rows_never_reach_a_matrix() {
    let Some(gpu) = open() else { return };
    for (i, (k_format, v_format)) in
        [(F16, F16), (E4M3, E4M3), (Int8, Int8), (Int8, F16), (F16, Int4)].into_iter().enumerate()
    {
        let windowed = case(&[(50, 2), (20, 33), (7, 16), (0, 40)], 4, 2, 24).formats(k_format, v_format);
        check_poisoned_on(&gpu, &windowed.config(|config| config.window = Some(13)), behind_window_and_position);
        let mut masked = case(&[(40, 3), (9, 20), (1100, 5), (2, 2)], 4, 2, 24).formats(k_format, v_format);
        masked.mask_density = 0.3;
        let masked = masked.config(|config| {
            config.custom_mask = true;
            config.causal = i % 2 == 0;
        });
        check_poisoned_on(&gpu, &masked, |seq_len, key| {
            let v = [(7, f32::NAN), (14, f32::INFINITY), (20, f32::NAN)].into_iter().find(|x| x.0 == key);
            Poison { v: v.map(|x| x.1), stride: 3, k: key == 3 || (key == 0 && seq_len < 40) }
        });
    }
}

#[test]
fn matrices_under_full_checks() {
    let Some(gpu) = adapter::open_matrix(Open { checks: ShaderChecks::Full, ..GPU_MATRIX }) else { return };
    for (k_format, v_format) in [(F16, F16), (Int8PerChannel, Int8)] {
        check(&gpu, &case(&[(50, 33), (7, 16)], 8, 2, 24).formats(k_format, v_format));
    }
}

/// Caches with a side of f32 are not rounded, and decode stays as it is.
#[test]
fn f32_is_not_rounded() {
    let Some(gpu) = open() else { return };
    for (k_format, v_format) in [(F32, F32), (F16, F32), (F32, Int8)] {
        let case = Case::new(&[(50, 33), (7, 16), (9, 1)], 8, 2, 64).formats(k_format, v_format);
        let rows = case.rows();
        let (cache, sequences) = case.fill(&gpu, &rows);
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        assert!(attention.variants().all(|variant| variant.target.matrix.is_none()));
        let (out, lse) = case.attend(&cache, &attention, &sequences, &rows);
        case.compare(&gpu, &rows, &out, lse.as_deref());
    }
    Case::new(&[(50, 1), (7, 1)], 8, 2, 64).formats(F16, F16).check(&gpu);
}

/// A device must have been opened for them, whatever its adapter has.
#[test]
fn devices_without_matrix_features_are_refused() {
    let Some(gpu) = adapter::open(adapter::GPU) else { return };
    assert_eq!(gpu.matrix_size(), None);
    let error = gpu.with_matrix_units(&[]).expect_err("not opened with the feature");
    assert!(error.to_string().contains("EXPERIMENTAL_COOPERATIVE_MATRIX"), "{error}");
}

//! Linear layers with matrix units, against f64: the shapes of the other kernels, and numbers that halves don't have.
//!
//! Of CPU adapters only lavapipe has matrix units, from Mesa 26.1 on; on all others these tests are skipped. It compiles such kernels for many seconds
//! each, so there are few of them.

use folio::model::{ActivationKind, LinearConfig, LinearKernel, LinearKernels, Rows, WeightFormat};
use folio::{Gpu, MatrixSize};

use crate::adapter::{self, GPU_MATRIX};
use crate::buffers::{floats, read, run};
use crate::linear_fused::{Case, random};

fn open() -> Option<Gpu> {
    Some(adapter::open_matrix(GPU_MATRIX)?.with_rounded_f32(true))
}

fn case(config: LinearConfig, seed: u64) -> Case {
    Case { f16_products: true, ..Case::new(config, &mut fastrand::Rng::with_seed(seed)) }
}

/// The matrices of the kernel for many rows.
fn matrix_size(linear: &folio::model::Linear) -> Option<MatrixSize> {
    linear.variants().find(|variant| variant.kernel == LinearKernel::Matmul).unwrap().target.matrix
}

/// Runs numbers of rows around tiles, after making sure that matrix units do the work.
#[track_caller]
fn check(gpu: &Gpu, case: &Case, x: impl Fn(usize, usize, f32) -> f32) {
    let linear = case.build(gpu, &LinearKernels::new());
    assert_eq!(matrix_size(&linear), gpu.matrix_size(), "without matrix units");
    let width = case.config.in_features as usize;
    for rows in [17, 64, 70, 130] {
        let mut values = random(&mut fastrand::Rng::with_seed(rows as u64), (rows * width) as u32);
        for (i, value) in values.iter_mut().enumerate() {
            *value = x(i / width, i % width, *value);
        }
        case.check(gpu, &linear, &values, "matrices");
    }
}

/// Rows of very different sizes.
fn sized(row: usize, _: usize, x: f32) -> f32 {
    x * [1.0, 1e-4, 3e4, 1e-12, 1e20][row % 5]
}

#[test]
fn matrices_of_every_weight_format() {
    let Some(gpu) = open() else { return };
    let formats = [
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::Int8 { group_size: 64 },
        WeightFormat::Int4 { group_size: 32 },
    ];
    for (i, format) in formats.into_iter().enumerate() {
        check(&gpu, &case(LinearConfig::new(104, 200, format), 1), sized);
        let odd = [(33, 70), (257, 5), (1, 1), (31, 65)][i];
        check(&gpu, &case(LinearConfig::new(odd.0, odd.1, format), 2), sized);
    }
}

#[test]
fn matrices_with_norm_gate_bias_and_regions() {
    let Some(gpu) = open() else { return };
    let base = LinearConfig { norm: true, bias: true, ..LinearConfig::new(104, 104, WeightFormat::F16) };
    let gated = LinearConfig { gated: true, activation: Some(ActivationKind::Silu), ..base };
    // Squares of what a norm sees must be f32.
    let normed = |row: usize, _: usize, x: f32| x * [1.0, 1e3, 1e-2, 1e7][row % 4];
    for config in [
        LinearConfig { regions: Some([72, 24, 8]), ..base },
        gated,
        LinearConfig { in_features: 45, out_features: 41, format: WeightFormat::INT4, ..gated },
    ] {
        check(&gpu, &case(config, 3), normed);
    }
    // Weights of a norm that no half has.
    let mut case = case(LinearConfig { bias: false, ..base }, 4);
    case.norm.iter_mut().enumerate().for_each(|(i, w)| *w *= [1e6, 1.0, 1e-6][i % 3]);
    check(&gpu, &case, normed);
}

#[test]
fn matrices_add_to_y() {
    let Some(gpu) = open() else { return };
    let config = LinearConfig { accumulate: true, ..LinearConfig::new(64, 70, WeightFormat::F16) };
    let case = case(config, 5);
    let linear = case.build(&gpu, &LinearKernels::new());
    let (x, before) =
        (random(&mut fastrand::Rng::with_seed(6), 20 * 64), random(&mut fastrand::Rng::with_seed(7), 20 * 70));
    let (x_buffer, y) = (floats(&gpu, &x), floats(&gpu, &before));
    run(&gpu, |pass| linear.record(&mut *pass, Rows::new(&x_buffer, 20, 64), Rows::new(&y, 20, 70)).unwrap());
    let got = read(&gpu, &y);
    for (row, x) in x.chunks(64).enumerate() {
        for (col, (want, bound)) in case.expected(x).into_iter().enumerate() {
            let (got, before) = (f64::from(got[row * 70 + col]), f64::from(before[row * 70 + col]));
            assert!((got - before - want).abs() <= bound + 1e-6, "[{row}, {col}] is {got}, not {}", before + want);
        }
    }
}

/// What the first slice of a row says nothing about: the rest is larger than halves are then, or all before it is zero, or it is far smaller.
#[test]
fn rows_that_outgrow_their_first_slice() {
    let Some(gpu) = open() else { return };
    let late = |row: usize, k: usize, x: f32| match (row % 6, k) {
        (0, 0..32) => x * 1e-10,
        (0, _) => x * 1e10,
        (1, 0..40) => 0.0,
        (2, 0..32) => x * 1e30,
        (3, 100) => 1e38,
        (4, _) => x * 1e-34,
        _ => x,
    };
    for format in [WeightFormat::F16, WeightFormat::F32] {
        let mut case = case(LinearConfig::new(104, 200, format), 8);
        // Of W only F32 can do that.
        if format == WeightFormat::F32 {
            for (i, w) in case.weights.iter_mut().enumerate() {
                let (row, k) = (i / 104, i % 104);
                *w *= match (row % 4, k) {
                    (0, 0..32) => 1e-9,
                    (0, _) => 1e9,
                    (1, _) => 1e-25,
                    (2, 0..32) => 1e12,
                    _ => 1.0,
                };
            }
            // Products beyond f32 are nobody's.
            check(&gpu, &case, |row, k, x| late(row, k, x).clamp(-1e18, 1e18));
        } else {
            check(&gpu, &case, late);
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row_and_column() {
    let Some(gpu) = open() else { return };
    for (format, bad) in
        [(WeightFormat::F16, f32::NAN), (WeightFormat::F32, f32::INFINITY), (WeightFormat::INT4, f32::NAN)]
    {
        let mut case = case(LinearConfig::new(104, 200, format), 9);
        case.weights[104 * 7 + 50] = bad;
        let linear = case.build(&gpu, &LinearKernels::new());
        let mut x = random(&mut fastrand::Rng::with_seed(10), 70 * 104);
        x.iter_mut().for_each(|x| *x += if *x < 0.0 { -0.1 } else { 0.1 });
        x[104 * 3 + 99] = bad;
        let (x, y) = (floats(&gpu, &x), floats(&gpu, &vec![0.0; 70 * 200]));
        run(&gpu, |pass| linear.record(&mut *pass, Rows::new(&x, 70, 104), Rows::new(&y, 70, 200)).unwrap());
        for (i, y) in read(&gpu, &y).into_iter().enumerate() {
            let (row, col) = (i / 200, i % 200);
            assert_eq!(y.is_finite(), row != 3 && col != 7, "{format:?}: [{row}, {col}] is {y}");
        }
    }
}

/// Products are of halves indeed, and the bound sees a lost one.
#[test]
fn the_bound_of_halves_is_narrow() {
    let Some(gpu) = open() else { return };
    let mut case = case(LinearConfig::new(64, 64, WeightFormat::F16), 11);
    let linear = case.build(&gpu, &LinearKernels::new());
    let x = random(&mut fastrand::Rng::with_seed(12), 20 * 64);
    let (x_buffer, y) = (floats(&gpu, &x), floats(&gpu, &[0.0; 20 * 64]));
    run(&gpu, |pass| linear.record(&mut *pass, Rows::new(&x_buffer, 20, 64), Rows::new(&y, 20, 64)).unwrap());
    let got = read(&gpu, &y);
    let outside = |case: &Case| {
        let expected = x.chunks(64).flat_map(|x| case.expected(x));
        expected.zip(&got).filter(|((want, bound), got)| (f64::from(**got) - want).abs() > *bound).count()
    };
    assert_eq!(outside(&case), 0);
    for k in [0, 31, 32, 63] {
        let mut lost = Case { weights: case.weights.clone(), bias: None, norm: case.norm.clone(), ..case };
        lost.weights.iter_mut().skip(k).step_by(64).for_each(|w| *w = 0.0);
        assert!(outside(&lost) > 600, "input {k} is lost: {} are outside", outside(&lost));
    }
    case.f16_products = false;
    assert!(outside(&case) > 600, "{}", outside(&case));
}

/// What is stored in f32 is rounded only with leave, and nothing without the caller's opting in for matrix units.
#[test]
fn f32_weights_are_rounded_with_leave_only() {
    for (gpu, leave) in [(adapter::open_matrix(GPU_MATRIX), false), (adapter::open(adapter::GPU), true)] {
        let Some(gpu) = gpu else { continue };
        let gpu = gpu.with_rounded_f32(leave);
        let case = Case::new(LinearConfig::new(64, 64, WeightFormat::F32), &mut fastrand::Rng::with_seed(13));
        let linear = case.build(&gpu, &LinearKernels::new());
        assert_eq!(matrix_size(&linear), None);
        case.check(&gpu, &linear, &random(&mut fastrand::Rng::with_seed(14), 20 * 64), "f32");
        let narrow = Case::new(LinearConfig::new(64, 64, WeightFormat::F16), &mut fastrand::Rng::with_seed(13));
        assert_eq!(matrix_size(&narrow.build(&gpu, &LinearKernels::new())), gpu.matrix_size());
    }
}

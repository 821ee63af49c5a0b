//! Sizes of linear kernels that a tuner may choose, one by one against f64, and what a layer does with a tuning.

use folio::Gpu;
use folio::kernel::tuning::{LinearShape, LinearSizes, LinearThresholds, TunedLinear, TunedLinearKernel, Tuning};
use folio::model::{ActivationKind, LinearConfig, LinearKernel, LinearKernels, LinearVariant, WeightFormat};

use crate::adapter::{self, Open};
use crate::linear_fused::{Case, random};

fn shape(config: &LinearConfig) -> LinearShape {
    let group_size = match config.format {
        WeightFormat::Int8 { group_size } | WeightFormat::Int4 { group_size } => group_size,
        _ => 0,
    };
    LinearShape {
        in_features: config.in_features,
        out_features: config.out_features,
        format: config.format.to_string(),
        group_size,
        gated: config.gated,
        norm: config.norm,
    }
}

/// The same device with these sizes for a layer.
fn tuned(
    gpu: &Gpu,
    config: &LinearConfig,
    sizes: impl IntoIterator<Item = (String, LinearSizes)>,
    thresholds: Option<LinearThresholds>,
) -> Gpu {
    let kernels = sizes.into_iter().map(|(kernel, sizes)| TunedLinearKernel {
        kernel,
        sizes,
        rows: 1,
        nanos: 1,
        default_nanos: 1,
    });
    let linear = vec![TunedLinear { shape: shape(config), kernels: kernels.collect(), thresholds }];
    gpu.with_tuning(Tuning { linear, ..Tuning::new(gpu.tuned_for()) }).unwrap()
}

fn multipliers(linear: &folio::model::Linear) -> Vec<LinearVariant> {
    let multiplies = |kernel| !matches!(kernel, LinearKernel::Gather | LinearKernel::Stage);
    linear.variants().copied().filter(|variant| multiplies(variant.kernel)).collect()
}

/// Runs a layer with every candidate of each kernel: the n-th of all of them at a time.
fn check_candidates(gpu: Option<Gpu>, how: Open, config: LinearConfig, f16_products: bool) {
    let Some(gpu) = gpu else { return };
    let case = Case { f16_products, ..Case::new(config, &mut fastrand::Rng::with_seed(41)) };
    let kernels = LinearKernels::new();
    let defaults = multipliers(&case.build(&gpu, &kernels));
    let candidates: Vec<_> = defaults.iter().map(LinearVariant::candidates).collect();
    let most = candidates.iter().map(Vec::len).max().unwrap();
    assert!(most > 1, "{how:?}: nothing to choose from");
    // The last rows of all these are past whole tiles.
    let values = random(&mut fastrand::Rng::with_seed(42), 67 * config.in_features);
    for i in 1..most {
        let chosen: Vec<_> =
            defaults.iter().zip(&candidates).map(|(variant, all)| (variant.tuned_name(), all[i % all.len()])).collect();
        let gpu = tuned(&gpu, &config, chosen.clone(), None);
        let linear = case.build(&gpu, &kernels);
        for ((variant, default), (_, sizes)) in multipliers(&linear).iter().zip(&defaults).zip(&chosen) {
            assert_eq!(*variant, default.with_sizes(*sizes));
            // A new one: the kernels that have fewer candidates begin again.
            if *sizes == default.sizes {
                continue;
            }
            let rows = match variant.kernel {
                LinearKernel::Rows(rows) => rows,
                _ => 67,
            };
            let values = &values[..(rows * config.in_features) as usize];
            case.check(&gpu, &linear, values, &format!("{how:?} {sizes:?}"));
        }
    }
}

fn gated(format: WeightFormat) -> LinearConfig {
    let base = LinearConfig::new(104, 42, format);
    LinearConfig { gated: true, activation: Some(ActivationKind::Silu), norm: true, bias: true, ..base }
}

#[test]
fn every_candidate_for_cpu_adapters_is_right() {
    for (how, config) in [
        (adapter::CPU, gated(WeightFormat::F16)),
        (adapter::CPU, LinearConfig::new(136, 99, WeightFormat::Int4 { group_size: 64 })),
        (adapter::CPU_PLAIN, LinearConfig { norm: true, ..LinearConfig::new(45, 33, WeightFormat::F32) }),
    ] {
        check_candidates(adapter::open(how), how, config, false);
    }
}

#[test]
fn every_candidate_for_gpus_is_right() {
    for (how, config) in [
        (adapter::GPU, gated(WeightFormat::F16)),
        (adapter::GPU, LinearConfig::new(136, 99, WeightFormat::Int4 { group_size: 64 })),
        (adapter::GPU_PLAIN, LinearConfig { norm: true, ..LinearConfig::new(45, 133, WeightFormat::F32) }),
    ] {
        check_candidates(adapter::open(how), how, config, false);
    }
}

#[test]
fn every_candidate_for_matrix_units_is_right() {
    let how = adapter::GPU_MATRIX;
    check_candidates(adapter::open_matrix(how), how, gated(WeightFormat::F16), true);
}

/// A layer takes of a tuning only what is its own and among the candidates.
#[test]
fn foreign_and_damaged_choices_change_nothing() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let config = LinearConfig::new(64, 40, WeightFormat::F16);
    let case = Case::new(config, &mut fastrand::Rng::with_seed(43));
    let kernels = LinearKernels::new();
    let default = multipliers(&case.build(&gpu, &kernels));
    let variants = |gpu: &Gpu| multipliers(&case.build(gpu, &kernels));
    let own = default[0].sizes;
    for sizes in [
        LinearSizes { workgroup_size: 0, ..own },
        LinearSizes { workgroup_size: u32::MAX, ..own },
        LinearSizes { rows: 0, ..own },
        LinearSizes { cols: u32::MAX, ..own },
        LinearSizes { cols: 3, ..own },
        LinearSizes { inputs: 1, ..own },
    ] {
        let all = default.iter().map(|variant| (variant.tuned_name(), sizes));
        assert_eq!(variants(&tuned(&gpu, &config, all, None)), default, "{sizes:?}");
    }
    // Right sizes, for another layer or of another kernel.
    let other = default[0].candidates()[1];
    let name = default[0].tuned_name();
    let wide = LinearConfig { out_features: 44, ..config };
    assert_eq!(variants(&tuned(&gpu, &wide, [(name.clone(), other)], None)), default);
    assert_eq!(variants(&tuned(&gpu, &config, [("rows3".to_owned(), other)], None)), default);
    assert_ne!(variants(&tuned(&gpu, &config, [(name, other)], None)), default);
}

/// Which kernel takes how many rows, by default and with a tuning: the results are the same.
#[test]
fn thresholds_choose_among_kernels() {
    use LinearKernel::{Matmul, Rows};
    use folio::Profile::{Cpu, Gpu};
    let default = LinearThresholds::default();
    let kernel = |profile, rows, thresholds| LinearKernel::for_rows(profile, rows, thresholds);
    for (rows, cpu, gpu) in
        [(1, Rows(1), Rows(1)), (3, Rows(4), Rows(4)), (16, Rows(16), Rows(8)), (17, Rows(8), Matmul)]
    {
        assert_eq!((kernel(Cpu, rows, default), kernel(Gpu, rows, default)), (cpu, gpu), "{rows} rows");
    }
    assert_eq!((kernel(Cpu, 32, default), kernel(Cpu, 24, default)), (Rows(16), Rows(8)));
    assert_eq!(kernel(Cpu, u32::MAX, default), Rows(16));
    let other = LinearThresholds { matvec_rows: 32, wide_quarters: 9 };
    assert_eq!((kernel(Gpu, 32, other), kernel(Gpu, 33, other), kernel(Cpu, 32, other)), (Rows(8), Matmul, Rows(8)));

    let config = LinearConfig::new(64, 40, WeightFormat::F16);
    let case = Case::new(config, &mut fastrand::Rng::with_seed(44));
    let values = random(&mut fastrand::Rng::with_seed(45), 40 * 64);
    for how in [adapter::CPU, adapter::GPU] {
        let Some(device) = adapter::open(how) else { return };
        let kernels = LinearKernels::new();
        for (matvec_rows, wide_quarters) in [(48, 4), (8, 9), (0, 0), (u32::MAX, u32::MAX)] {
            let thresholds = LinearThresholds { matvec_rows, wide_quarters };
            let device = tuned(&device, &config, [], Some(thresholds));
            case.check(&device, &case.build(&device, &kernels), &values, &format!("{how:?} {thresholds:?}"));
        }
    }
}

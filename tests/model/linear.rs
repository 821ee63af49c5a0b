//! Linear layers against f64, on the weights as their format stores them.

use crate::common::with;
use folio::model::{
    ActivationKind, Factor, Linear, LinearConfig, LinearKernels, ModelError, ModelResult, Rows, WeightFormat,
};
use folio::{Error, Gpu, GpuOptions, Profile, wgpu};

use crate::adapter;

pub(crate) const FORMATS: [WeightFormat; 6] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::INT8,
    WeightFormat::Int8 { group_size: 64 },
    WeightFormat::INT4,
    WeightFormat::Int4 { group_size: 128 },
];

/// Half of f32's epsilon: the relative error of one operation.
const HALF_ULP: f64 = 1.0 / (1u64 << 24) as f64;

pub(crate) fn buffer(gpu: &Gpu, values: &[f32]) -> wgpu::Buffer {
    raw_buffer(gpu, bytemuck::cast_slice(values))
}

fn raw_buffer(gpu: &Gpu, bytes: &[u8]) -> wgpu::Buffer {
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: bytes.len() as u64,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    gpu.queue().write_buffer(&buffer, 0, bytes);
    buffer
}

/// A layer on the GPU together with its weights on the host.
struct Layer {
    linear: Linear,
    /// As the format stores them.
    weights: Vec<f32>,
    /// What bounds the rounding of each product: the weight, or, where scale and minimum are rounded one by one, the group's largest.
    sizes: Vec<f64>,
    bias: Option<Vec<f32>>,
}

fn fill(weights: &[f32], in_features: u32) -> impl FnMut(u32, &mut [f32]) -> ModelResult<()> {
    move |first, rows: &mut [f32]| {
        let start = first as usize * in_features as usize;
        rows.copy_from_slice(&weights[start..start + rows.len()]);
        Ok(())
    }
}

fn new_linear(
    gpu: &Gpu,
    kernels: &LinearKernels,
    config: LinearConfig,
    weights: &[f32],
    bias: Option<&[f32]>,
) -> ModelResult<Linear> {
    let mut fill = fill(weights, config.in_features);
    futures::executor::block_on(Linear::new(gpu, kernels, config, &mut fill, bias, None))
}

impl Layer {
    fn new(gpu: &Gpu, kernels: &LinearKernels, config: LinearConfig, weights: &[f32], rng: &mut fastrand::Rng) -> Self {
        let bias = config.bias.then(|| normal(rng, config.out_features, 1.0));
        let linear = new_linear(gpu, kernels, config, weights, bias.as_deref()).unwrap();
        let stored: Vec<f32> = weights
            .chunks(config.in_features as usize)
            .flat_map(|row| config.format.round_trip(row).unwrap())
            .collect();
        let group_size = match config.format {
            WeightFormat::Int8 { group_size } | WeightFormat::Int4 { group_size } => group_size as usize,
            _ => 1,
        };
        let size = |group: &[f32]| {
            let max = group.iter().fold(0.0_f64, |max, w| max.max(f64::from(w.abs())));
            // |q * scale| + |min|, with q * scale = w - min; of 8 bits min is -128 / 127 of the largest, of 4 it is rounded to bf16.
            let size = if group_size > 1 { 3.1 * max } else { max };
            std::iter::repeat_n(size, group.len()).collect::<Vec<_>>()
        };
        let rows = stored.chunks(config.in_features as usize);
        let sizes = rows.flat_map(|row| row.chunks(group_size)).flat_map(size).collect();
        Self { linear, weights: stored, sizes, bias }
    }

    /// Runs the first `rows` rows of x and compares with the expected values and their bounds.
    fn check(&self, gpu: &Gpu, x: &[f32], y: &[f32], expected: &[(f64, f64)], rows: u32, what: &str) {
        let LinearConfig { in_features, out_features, .. } = self.linear.config();
        let x = buffer(gpu, &x[..(rows * in_features) as usize]);
        let y = buffer(gpu, &y[..(rows * out_features) as usize]);
        run(gpu, |pass| {
            self.linear
                .record(&mut *pass, Rows::new(&x, rows, in_features), Rows::new(&y, rows, out_features))
                .unwrap();
        });
        let got = gpu.read_blocking(&y).unwrap();
        compare(&got, expected, out_features, &format!("{what}, {rows} rows"));
    }

    fn expected(&self, x: &[f32], y: &[f32]) -> Vec<(f64, f64)> {
        let LinearConfig { in_features, out_features, activation, softcap, accumulate, .. } = self.linear.config();
        let n = in_features as usize;
        let mut expected = Vec::new();
        for (row, x) in x.chunks(n).enumerate() {
            for col in 0..out_features as usize {
                let pairs = x.iter().zip(&self.weights[col * n..][..n]);
                let sum: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                let size: f64 =
                    x.iter().zip(&self.sizes[col * n..][..n]).map(|(x, size)| f64::from(x.abs()) * size).sum();
                let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[col]));
                // Any order of n additions, the rounding of the products and of their scales; and what the device flushes to zero.
                let bound = (f64::from(in_features) + 8.0) * HALF_ULP * (size + bias.abs())
                    + f64::from(in_features + 1) * f64::from(f32::MIN_POSITIVE);
                let (mut value, mut bound) = activate(activation, sum + bias, bound);
                if let Some(cap) = softcap.map(|cap| f64::from(cap.get())) {
                    // Nowhere steeper than 1; WGSL's tanh may be off by 1e-5.
                    (value, bound) = (cap * (value / cap).tanh(), bound + 1e-5 * cap);
                }
                let before = if accumulate { f64::from(y[row * out_features as usize + col]) } else { 0.0 };
                bound += (value + before).abs() * HALF_ULP * 2.0;
                expected.push((value + before, bound));
            }
        }
        expected
    }
}

/// The activation and the error of its result. No activation here is steeper than 1.13; exp, tanh and the polynomial of erf are good to some 1e-6
/// on the devices that are tested, of the argument's size.
fn activate(activation: Option<ActivationKind>, v: f64, bound: f64) -> (f64, f64) {
    let own = 4e-6 * v.abs() + 1e-7;
    match activation {
        None => (v, bound),
        Some(ActivationKind::Relu) => (v.max(0.0), bound),
        Some(ActivationKind::ClampedSwiglu { alpha, limit }) => {
            let v = v.min(f64::from(limit.get()));
            (v / (1.0 + (-f64::from(alpha.get()) * v).exp()), 1.13 * bound + own)
        }
        Some(ActivationKind::Silu) => (v / (1.0 + (-v).exp()), 1.13 * bound + own),
        Some(ActivationKind::Gelu) => (0.5 * v * erfc(-v / 2f64.sqrt()), 1.13 * bound + own),
        Some(ActivationKind::GeluTanh) => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v * v * v);
            (0.5 * v * (1.0 + inner.tanh()), 1.13 * bound + own)
        }
    }
}

/// erfc by its power series, and by its continued fraction for large arguments.
fn erfc(z: f64) -> f64 {
    if z < 0.0 {
        return 2.0 - erfc(-z);
    }
    let scale = (-z * z).exp() / std::f64::consts::PI.sqrt();
    if z < 3.0 {
        let (mut term, mut sum, mut n) = (2.0 * z, 2.0 * z, 0.0);
        while term > 1e-18 {
            n += 1.0;
            term *= 2.0 * z * z / (2.0 * n + 1.0);
            sum += term;
        }
        return 1.0 - scale * sum;
    }
    let fraction = (1..60).rev().fold(z, |f, n| z + f64::from(n) / 2.0 / f);
    scale / fraction
}

pub(crate) fn run(gpu: &Gpu, record: impl FnOnce(&mut wgpu::ComputePass<'_>)) {
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    record(&mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()));
    gpu.queue().submit([encoder.finish()]);
}

fn compare(got: &[f32], expected: &[(f64, f64)], width: u32, what: &str) {
    let mut worst: Option<(f64, usize)> = None;
    for (i, (&got, &(want, bound))) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - want).abs() / bound;
        let error = if error.is_nan() { f64::INFINITY } else { error };
        if worst.is_none_or(|(most, _)| error > most) {
            worst = Some((error, i));
        }
    }
    let (error, i) = worst.unwrap();
    let (want, bound) = expected[i];
    let (row, col) = (i / width as usize, i % width as usize);
    assert!(error <= 1.0, "{what}: [{row}, {col}] is {}, not {want} within {bound:e}", got[i]);
}

pub(crate) fn normal(rng: &mut fastrand::Rng, count: u32, size: f32) -> Vec<f32> {
    (0..count).map(|_| (0..4).map(|_| rng.f32() - 0.5).sum::<f32>() * size).collect()
}

const MAX_ROWS: u32 = 70;

fn check_shapes(how: adapter::Open, formats: &[WeightFormat], shapes: &[(u32, u32)], rows: &[u32]) {
    let Some(gpu) = adapter::open(how) else { return };
    let kernels = LinearKernels::new();
    let mut rng = fastrand::Rng::with_seed(7);
    for &format in formats {
        for &(in_features, out_features) in shapes {
            let config = LinearConfig::new(in_features, out_features, format);
            let weights = normal(&mut rng, in_features * out_features, 0.5);
            let layer = Layer::new(&gpu, &kernels, config, &weights, &mut rng);
            let mut x = normal(&mut rng, in_features * MAX_ROWS, 1.0);
            // Rows of very different sizes.
            x.chunks_mut(in_features as usize).enumerate().for_each(|(row, x)| {
                let size = [1.0, 1e-4, 3e4, 1e-12][row % 4];
                x.iter_mut().for_each(|x| *x *= size);
            });
            // What is overwritten must not matter.
            let y = vec![f32::NAN; (out_features * MAX_ROWS) as usize];
            let expected = layer.expected(&x, &y);
            for &rows in rows {
                let what = format!("{how:?} {format:?} [{out_features}, {in_features}]");
                layer.check(&gpu, &x, &y, &expected, rows, &what);
            }
        }
    }
}

#[test]
fn every_format_and_family_agrees_with_f64() {
    for how in adapter::ALL {
        check_shapes(how, &FORMATS, &[(64, 33), (100, 300), (257, 5), (768, 33)], &[1, 2, 3, 7, 8, 9, 17, 33, 70]);
    }
}

#[test]
fn odd_shapes_agree_with_f64() {
    let shapes = [(1, 1), (1, 300), (7, 1), (7, 33), (64, 1), (100, 5), (257, 33), (257, 300), (768, 5), (768, 300)];
    for how in [adapter::CPU, adapter::GPU] {
        check_shapes(how, &[WeightFormat::F16, WeightFormat::INT4], &shapes, &[1, 3, 8, 33]);
    }
}

#[test]
fn bias_activation_and_accumulation_agree_with_f64() {
    for how in adapter::ALL {
        let Some(gpu) = adapter::open(how) else { return };
        let kernels = LinearKernels::new();
        let mut rng = fastrand::Rng::with_seed(11);
        let few = [adapter::CPU, adapter::GPU].contains(&how);
        let softcap = Some(Factor::new(30.0).unwrap());
        let activations = std::iter::once(None).chain(ActivationKind::ALL.map(Some)).map(|a| (a, None));
        for (activation, softcap) in activations.chain([(None, softcap)]) {
            for (bias, accumulate) in [(true, false), (false, true), (true, true)] {
                if !few && (activation == Some(ActivationKind::Relu) || !bias) {
                    continue;
                }
                let config = LinearConfig {
                    bias,
                    accumulate,
                    activation,
                    softcap,
                    ..LinearConfig::new(40, 70, WeightFormat::F16)
                };
                let weights = normal(&mut rng, 40 * 70, 1.0);
                let layer = Layer::new(&gpu, &kernels, config, &weights, &mut rng);
                let mut x = normal(&mut rng, 40 * MAX_ROWS, 1.0);
                // Sums of up to hundreds: far into the flat parts of the activations.
                x[..40].iter_mut().for_each(|x| *x *= 100.0);
                let y = normal(&mut rng, 70 * MAX_ROWS, 10.0);
                let expected = layer.expected(&x, &y);
                for rows in [1, 8, 33] {
                    layer.check(&gpu, &x, &y, &expected, rows, &format!("{how:?} {config:?}"));
                }
            }
        }
    }
}

#[test]
fn cancellation_and_huge_values_stay_within_the_bound() {
    for how in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let kernels = LinearKernels::new();
        let mut rng = fastrand::Rng::with_seed(13);
        for format in FORMATS {
            let (n, out) = (320, 40);
            let mut weights = normal(&mut rng, n * out, 1.0);
            // An outlier in each of some groups; a group of equal values, one of zeros, and tiny ones.
            weights.chunks_mut(97).for_each(|w| w[0] *= 1.5e4);
            weights[..64].fill(0.3);
            weights[n as usize..n as usize + 128].fill(0.0);
            weights[3 * n as usize..4 * n as usize].iter_mut().for_each(|w| *w *= 1e-7);
            let config = LinearConfig::new(n, out, format);
            let layer = Layer::new(&gpu, &kernels, config, &weights, &mut rng);
            // Pairs of huge inputs that cancel, but for one of them.
            let mut x = normal(&mut rng, n * MAX_ROWS, 1e6);
            x.chunks_mut(2).step_by(2).for_each(|x| x[1] = -x[0]);
            let y = vec![0.0; (out * MAX_ROWS) as usize];
            let expected = layer.expected(&x, &y);
            for rows in [1, 5, 40] {
                layer.check(&gpu, &x, &y, &expected, rows, &format!("{how:?} {format:?}"));
            }
        }
    }
}

#[test]
fn rows_beyond_the_range_may_hold_anything() {
    for how in adapter::ALL {
        let Some(gpu) = adapter::open(how) else { return };
        let kernels = LinearKernels::new();
        let mut rng = fastrand::Rng::with_seed(17);
        for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT8, WeightFormat::INT4] {
            for n in [36, 40, 33] {
                let layer = Layer::new(
                    &gpu,
                    &kernels,
                    LinearConfig::new(n, 3, format),
                    &normal(&mut rng, n * 3, 1.0),
                    &mut rng,
                );
                // The second row is NaN, so what is read beyond the first one's end is.
                let mut x = normal(&mut rng, n * 3, 1.0);
                x[n as usize..2 * n as usize].fill(f32::NAN);
                let y = [0.0; 9];
                let expected = layer.expected(&x, &y);
                let x = buffer(&gpu, &x);
                let y = buffer(&gpu, &y);
                run(&gpu, |pass| layer.linear.record(&mut *pass, Rows::new(&x, 3, n), Rows::new(&y, 3, 3)).unwrap());
                let got = gpu.read_blocking(&y).unwrap();
                let what = format!("{how:?} {format:?} {n}");
                compare(&got[..3], &expected[..3], 3, &what);
                compare(&got[6..], &expected[6..], 3, &what);
                assert!(got[3..6].iter().all(|y| y.is_nan()), "{what}: NaN in x must reach y");
            }
        }
    }
}

#[test]
fn nan_and_infinite_weights_reach_the_output() {
    for how in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let kernels = LinearKernels::new();
        for format in FORMATS {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut weights = vec![0.5; 64 * 9];
                weights[64 * 4 + 3] = bad;
                // A soft cap hides no NaN; an infinity is as high as the cap.
                let softcap = bad.is_nan().then(|| Factor::new(30.0).unwrap());
                let config = LinearConfig { softcap, ..LinearConfig::new(64, 9, format) };
                let linear = new_linear(&gpu, &kernels, config, &weights, None).unwrap();
                let (x, y) = (buffer(&gpu, &[1.0; 64]), buffer(&gpu, &[0.0; 9]));
                run(&gpu, |pass| linear.record(&mut *pass, Rows::new(&x, 1, 64), Rows::new(&y, 1, 9)).unwrap());
                let got = gpu.read_blocking(&y).unwrap();
                for (i, y) in got.iter().enumerate() {
                    assert_eq!(y.is_finite(), i != 4, "{how:?} {format:?} {bad}: y[{i}] is {y}");
                }
            }
        }
    }
}

#[test]
fn gathered_rows_are_the_stored_weights() {
    for how in adapter::ALL {
        let Some(gpu) = adapter::open(how) else { return };
        let kernels = LinearKernels::new();
        let mut rng = fastrand::Rng::with_seed(19);
        for format in FORMATS {
            for (n, scale) in [(7, None), (100, None), (256, None), (100, Some(8.0)), (7, Some(6.5))] {
                let out = 45;
                let gather_scale = scale.map(|scale| Factor::new(scale).unwrap());
                let config = LinearConfig { gather_scale, ..LinearConfig::new(n, out, format) };
                let layer = Layer::new(&gpu, &kernels, config, &normal(&mut rng, n * out, 1.0), &mut rng);
                // Beyond the last row: the last row.
                let ids = [0u32, 44, 7, 8, 7, u32::MAX, 45, 31];
                let rows = ids.map(|id| id.min(out - 1));
                let (ids, y) =
                    (raw_buffer(&gpu, bytemuck::cast_slice(&ids)), buffer(&gpu, &vec![f32::NAN; 8 * n as usize]));
                run(&gpu, |pass| layer.linear.gather_rows(&mut *pass, &ids, Rows::new(&y, 8, n)).unwrap());
                let got = gpu.read_blocking(&y).unwrap();
                for (got, row) in got.chunks(n as usize).zip(rows) {
                    let start = (row * n) as usize;
                    let range = start..start + n as usize;
                    let bounds = layer.weights[range.clone()].iter().zip(&layer.sizes[range]);
                    // Exact, but for the rounding of an affine value, and of its product with the scale.
                    let (factor, roundings) = scale.map_or((1.0, 2.0), |scale| (f64::from(scale), 3.0));
                    let expected = |(w, size): (&f32, &f64)| {
                        (factor * f64::from(*w), factor * roundings * HALF_ULP * size + 1e-30)
                    };
                    let expected: Vec<_> = bounds.map(expected).collect();
                    compare(got, &expected, n, &format!("{how:?} {format:?} row {row}"));
                }
            }
        }
    }
}

#[test]
fn large_matrices_are_split_by_rows() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let name = gpu.adapter_info().name.clone();
    for profile in [Profile::Cpu, Profile::Gpu] {
        let options = with(GpuOptions::default(), |c| {
            c.adapter_name = Some(name.clone());
            c.profile = Some(profile);
            c.max_binding_bytes = Some(1 << 20);
        });
        let gpu = Gpu::open_blocking(options).unwrap();
        let kernels = LinearKernels::new();
        let mut rng = fastrand::Rng::with_seed(23);
        for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT4] {
            // 6 MB as f32, 3 MB as halfs, 1.1 MB in 4 bits.
            let (n, out) = (300, 5003);
            let config = LinearConfig { bias: true, ..LinearConfig::new(n, out, format) };
            let layer = Layer::new(&gpu, &kernels, config, &normal(&mut rng, n * out, 1.0), &mut rng);
            let x = normal(&mut rng, n * 20, 1.0);
            let y = vec![f32::NAN; 20 * out as usize];
            let expected = layer.expected(&x, &y);
            for rows in [1, 20] {
                layer.check(&gpu, &x, &y, &expected, rows, &format!("{profile:?} {format:?}"));
            }
            let ids = raw_buffer(&gpu, bytemuck::cast_slice(&[0u32, 5002, 2500]));
            let y = buffer(&gpu, &[f32::NAN; 900]);
            run(&gpu, |pass| layer.linear.gather_rows(&mut *pass, &ids, Rows::new(&y, 3, n)).unwrap());
            let got = gpu.read_blocking(&y).unwrap();
            for (got, row) in got.chunks(300).zip([0, 5002, 2500]) {
                let error = got.iter().zip(&layer.weights[row * 300..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(error < 1e-6, "{profile:?} {format:?} row {row}: {error}");
            }
        }
    }
}

#[test]
fn a_warm_up_covers_every_kernel_and_changes_nothing() {
    for how in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let kernels = LinearKernels::new();
        let weights = vec![0.25; 64 * 64];
        let config = LinearConfig { accumulate: true, ..LinearConfig::new(64, 64, WeightFormat::F16) };
        let linear = new_linear(&gpu, &kernels, config, &weights, None).unwrap();
        run(&gpu, |pass| linear.warm_up(&mut *pass).unwrap());
        let (x, y) = (buffer(&gpu, &[1.0; 64]), buffer(&gpu, &[3.0; 64]));
        run(&gpu, |pass| {
            linear.warm_up(&mut *pass).unwrap();
            linear.record(&mut *pass, Rows::new(&x, 1, 64), Rows::new(&y, 1, 64)).unwrap();
        });
        assert!(gpu.read_blocking(&y).unwrap().iter().all(|y| *y == 19.0), "{how:?}");
    }
}

#[test]
fn bad_input_is_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let kernels = LinearKernels::new();
    let config = LinearConfig::new(64, 8, WeightFormat::F16);
    let weights = vec![1.0; 64 * 8];
    let argument = |result: ModelResult<Linear>| match result {
        Err(ModelError::Folio(Error::Argument { argument, .. })) => argument,
        other => panic!("{other:?}"),
    };
    let new = |config: LinearConfig, bias: Option<&[f32]>| argument(new_linear(&gpu, &kernels, config, &weights, bias));
    assert_eq!(new(LinearConfig { in_features: 0, ..config }, None), "in_features");
    assert_eq!(new(LinearConfig { in_features: u32::MAX, ..config }, None), "in_features");
    assert_eq!(new(LinearConfig { out_features: 0, ..config }, None), "out_features");
    assert_eq!(new(LinearConfig { out_features: u32::MAX, ..config }, None), "out_features");
    assert_eq!(new(config, Some(&[0.0; 8])), "bias");
    assert_eq!(new(LinearConfig { bias: true, ..config }, None), "bias");
    let softcap = Some(Factor::new(30.0).unwrap());
    assert_eq!(new(LinearConfig { softcap, gated: true, ..config }, None), "softcap");
    let activation = Some(ActivationKind::Relu);
    assert_eq!(new(LinearConfig { softcap, activation, ..config }, None), "softcap");
    assert!([0.0, -1.0, f32::NAN, f32::INFINITY].iter().all(|factor| Factor::new(*factor).is_err()));
    assert_eq!(new(LinearConfig { bias: true, ..config }, Some(&[0.0; 7])), "bias");
    for group_size in [0, 1, 16, 33] {
        assert_eq!(new(LinearConfig { format: WeightFormat::Int4 { group_size }, ..config }, None), "group_size");
    }
    let failing = &mut |_: u32, _: &mut [f32]| Err(Error::argument("mine", "", "").into());
    assert_eq!(argument(futures::executor::block_on(Linear::new(&gpu, &kernels, config, failing, None, None))), "mine");

    let linear = new_linear(&gpu, &kernels, config, &weights, None).unwrap();
    let (x, y) = (buffer(&gpu, &[0.0; 640]), buffer(&gpu, &[0.0; 640]));
    run(&gpu, |pass| {
        let mut record = |x, y| match linear.record(&mut *pass, x, y) {
            Err(Error::Argument { argument, .. }) => argument,
            other => panic!("{other:?}"),
        };
        assert_eq!(record(Rows::new(&x, 2, 63), Rows::new(&y, 2, 8)), "x");
        assert_eq!(record(Rows::new(&x, 0, 64), Rows::new(&y, 0, 8)), "x");
        assert_eq!(record(Rows::new(&x, 11, 64), Rows::new(&y, 11, 8)), "x");
        assert_eq!(record(Rows::new(&x, 2, 64), Rows::new(&y, 3, 8)), "y");
        assert_eq!(record(Rows::new(&x, 2, 64), Rows::new(&y, 2, 9)), "y");
        assert_eq!(record(Rows { offset: 4, ..Rows::new(&x, 2, 64) }, Rows::new(&y, 2, 8)), "x");
        assert_eq!(record(Rows::new(&x, 2, 64), Rows::new(&x, 2, 8)), "y");
        let ids = &x;
        assert!(linear.gather_rows(&mut *pass, ids.slice(..4), Rows::new(&y, 2, 64)).is_err());
        assert!(linear.gather_rows(&mut *pass, ids, Rows::new(&y, 2, 63)).is_err());
        assert!(linear.gather_rows(&mut *pass, ids, Rows::new(ids, 2, 64)).is_err());
    });
}

#[test]
fn halfs_that_overflow_are_named() {
    let mut row = vec![1.0_f32; 40];
    row[39] = -65504.0;
    assert_eq!(WeightFormat::F16.round_trip(&row).unwrap(), row);
    row[39] = -70000.0;
    let error = WeightFormat::F16.round_trip(&row).unwrap_err().to_string();
    assert!(error.contains("-70000 at row 0, column 39") && error.contains("65504"), "{error}");
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut weights = vec![0.0; 40 * 20];
    weights[40 * 13 + 5] = 1e9;
    let error = new_linear(&gpu, &LinearKernels::new(), LinearConfig::new(40, 20, WeightFormat::F16), &weights, None);
    assert!(error.unwrap_err().to_string().contains("1000000000 at row 13, column 5"));
}

#[test]
fn quantised_weights_are_within_their_bound() {
    let mut rng = fastrand::Rng::with_seed(29);
    let mut rows: Vec<Vec<f32>> = (0..40).map(|i| normal(&mut rng, 200, 10f32.powi(i - 20))).collect();
    rows.push(vec![0.0; 200]);
    rows.push(vec![1000.3; 200]);
    rows.push(vec![-1e-3; 200]);
    rows.push((0..200).map(|k| if k == 77 { 1e30 } else { 1.0 }).collect());
    rows.push((0..200).map(|k| if k % 2 == 0 { 1e37 } else { -1e37 }).collect());
    rows.push((0..200).map(|k| 1000.0 + k as f32 * 1e-3).collect());
    rows.push(vec![f32::MIN_POSITIVE / 64.0; 200]);
    for format in FORMATS {
        for row in &rows {
            if format == WeightFormat::F16 && row.iter().any(|w| w.abs() > 65504.0) {
                continue;
            }
            let stored = format.round_trip(row).unwrap();
            let group_size = match format {
                WeightFormat::Int8 { group_size } | WeightFormat::Int4 { group_size } => group_size as usize,
                _ => 200,
            };
            for (k, (w, s)) in row.iter().zip(&stored).enumerate() {
                let group = &row[k / group_size * group_size..row.len().min((k / group_size + 1) * group_size)];
                let (min, max) =
                    group.iter().fold((f64::MAX, f64::MIN), |(a, b), w| (a.min((*w).into()), b.max((*w).into())));
                let largest = max.abs().max(min.abs());
                let bound = match format {
                    WeightFormat::F16 => f64::from(w.abs()) / 2048.0 + 3e-8,
                    WeightFormat::Int8 { .. } => {
                        largest / 254.0 + largest / (1 << 22) as f64 + f64::from(f32::MIN_POSITIVE) * 127.0
                    }
                    WeightFormat::Int4 { .. } => {
                        (max - min + min.abs() / 128.0) * (1.0 + 1.0 / 128.0) / 30.0
                            + largest / (1 << 22) as f64
                            + f64::from(f32::MIN_POSITIVE) * 15.0
                    }
                    _ => 0.0,
                };
                let error = (f64::from(*w) - f64::from(*s)).abs();
                assert!(error <= bound, "{format:?} [{k}]: {w} is stored as {s}, bound {bound:e}");
            }
        }
    }
    // Integers of a matching scale are exact, and all levels are used.
    let levels: Vec<f32> = (0..32).map(|k| (k % 16) as f32 - 8.0).collect();
    assert_eq!(WeightFormat::INT4.round_trip(&levels).unwrap(), levels);
    let levels: Vec<f32> = (0..32).map(|k| k as f32 * 8.0 - 127.0).collect();
    assert_eq!(WeightFormat::INT8.round_trip(&levels).unwrap(), levels);
}

#[test]
fn bytes_count_weights_and_scales() {
    assert_eq!(WeightFormat::F32.bytes(10, 64), 10 * 64 * 4);
    assert_eq!(WeightFormat::F16.bytes(10, 64), 10 * 64 * 2);
    assert_eq!(WeightFormat::F16.bytes(10, 33), 10 * 64 * 2);
    assert_eq!(WeightFormat::INT8.bytes(10, 128), 10 * (128 + 16));
    assert_eq!(WeightFormat::INT4.bytes(10, 64), 10 * (32 + 16));
}

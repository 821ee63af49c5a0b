//! What linear layers take over from kernels of their own: RMSNorm before, the product with a gate behind, and three matrices of output; in f64 on the
//! weights as their format stores them.

use folio::model::{ActivationKind, Linear, LinearConfig, LinearKernels, ModelError, RmsNorm, Rows, WeightFormat};
use folio::{Error, Gpu};

use crate::adapter;
use crate::buffers::{block_on, empty, floats, read, run};

/// Half of f32's epsilon: the relative error of one operation.
const HALF_ULP: f64 = 1.0 / (1u64 << 24) as f64;
const EPS: f32 = 1e-5;
/// What becomes of a number as a half: it may go to either neighbour, and below the normal ones to zero. Rows are scaled so that their largest
/// element is at least 8.
const HALF_ROUNDING: f64 = 1.0 / 1024.0;
const NORMAL_HALF: f64 = 1.0 / 16384.0;
const FLUSHED: f64 = NORMAL_HALF / 8.0;

pub(crate) struct Case {
    pub(crate) config: LinearConfig,
    pub(crate) weights: Vec<f32>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) norm: Vec<f32>,
    /// Whether products may be of halves.
    pub(crate) f16_products: bool,
}

pub(crate) fn random(rng: &mut fastrand::Rng, len: u32) -> Vec<f32> {
    (0..len).map(|_| rng.f32() * 2.0 - 1.0).collect()
}

impl Case {
    pub(crate) fn new(config: LinearConfig, rng: &mut fastrand::Rng) -> Self {
        let rows = config.out_features * if config.gated { 2 } else { 1 };
        Self {
            config,
            weights: random(rng, rows * config.in_features),
            bias: config.bias.then(|| random(rng, rows)),
            norm: random(rng, config.in_features),
            f16_products: false,
        }
    }

    pub(crate) fn build(&self, gpu: &Gpu, kernels: &LinearKernels) -> Linear {
        let width = self.config.in_features as usize;
        let mut rows = |first: u32, out: &mut [f32]| {
            out.copy_from_slice(&self.weights[first as usize * width..][..out.len()]);
            Ok(())
        };
        let norm = self.config.norm.then_some(RmsNorm { weight: &self.norm, eps: EPS });
        block_on(Linear::new(gpu, kernels, self.config, &mut rows, self.bias.as_deref(), norm)).unwrap()
    }

    /// Outputs of a row of x before gate and activation, and how far they may be off.
    pub(crate) fn sums(&self, x: &[f32]) -> Vec<(f64, f64)> {
        let n = x.len() as f64;
        let mean_square = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n;
        let scale = if self.config.norm { 1.0 / (mean_square + f64::from(EPS)).sqrt() } else { 1.0 };
        let gain = |k: usize| if self.config.norm { scale * f64::from(self.norm[k]) } else { 1.0 };
        let group_size = match self.config.format {
            WeightFormat::Int8 { group_size } | WeightFormat::Int4 { group_size } => group_size as usize,
            _ => 1,
        };
        let largest_x = x.iter().enumerate().map(|(k, x)| f64::from(x.abs()) * gain(k).abs()).fold(0.0, f64::max);
        let row = |(i, row): (usize, &[f32])| {
            let stored = self.config.format.round_trip(row).unwrap();
            let largest_w = stored.iter().fold(0.0, |most: f64, w| most.max(f64::from(w.abs())));
            // Weights that are halves already are not scaled.
            let flushed_w = if self.config.format == WeightFormat::F16 { NORMAL_HALF } else { FLUSHED * largest_w };
            let (mut sum, mut size, mut halves) = (0.0, 0.0, 0.0);
            for (k, (x, w)) in x.iter().zip(&stored).enumerate() {
                let group = &row[k / group_size * group_size..row.len().min((k / group_size + 1) * group_size)];
                let largest = group.iter().fold(0.0, |most: f64, w| most.max(f64::from(w.abs())));
                let x = f64::from(*x) * gain(k);
                sum += x * f64::from(*w);
                // Of the integer formats scale and minimum are rounded one by one.
                size += x.abs() * if group_size > 1 { 3.1 * largest } else { f64::from(w.abs()) };
                let w = f64::from(w.abs());
                // Two roundings, and sums that matrix units may truncate.
                halves += x.abs() * w * (2.0 * HALF_ROUNDING + HALF_ROUNDING.powi(2) + 2.0 * n * HALF_ULP);
                halves += x.abs() * flushed_w + w * FLUSHED * largest_x;
            }
            let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[i]));
            // Any order of n additions, of products and of squares, and some operations more.
            let bound = (2.0 * n + 24.0) * HALF_ULP * (size + bias.abs()) + 1e-30;
            (sum + bias, if self.f16_products { bound + halves } else { bound })
        };
        self.weights.chunks(x.len()).enumerate().map(row).collect()
    }

    /// Outputs without what is in y before; with gates, the activation is SiLU.
    pub(crate) fn expected(&self, x: &[f32]) -> Vec<(f64, f64)> {
        let sums = self.sums(x);
        if !self.config.gated {
            return sums;
        }
        let (gates, ups) = sums.split_at(self.config.out_features as usize);
        let product = |(&(gate, gate_bound), &(up, up_bound)): (&(f64, f64), &(f64, f64))| {
            let value = gate / (1.0 + (-gate).exp());
            let bound = 1.13 * gate_bound + 4e-6 * gate.abs() + 1e-7;
            (value * up, bound * up.abs() + value.abs() * up_bound + bound * up_bound + (value * up).abs() * HALF_ULP)
        };
        gates.iter().zip(ups).map(product).collect()
    }
}

impl Case {
    /// Runs a layer on rows of x, and compares all of y: also that nothing else is written.
    #[track_caller]
    pub(crate) fn check(&self, gpu: &Gpu, linear: &Linear, values: &[f32], what: &str) {
        let config = &self.config;
        let rows = (values.len() / config.in_features as usize) as u32;
        let (x, y) = (floats(gpu, values), empty(gpu, (rows * config.y_width()) as usize));
        let x = Rows::new(&x, rows, config.in_features);
        run(gpu, |pass| linear.record(&mut *pass, x, Rows::new(&y, rows, config.y_width())).unwrap());
        let got = read(gpu, &y);
        let mut written = vec![false; got.len()];
        for (row, x) in values.chunks(config.in_features as usize).enumerate() {
            for (col, (want, bound)) in self.expected(x).into_iter().enumerate() {
                let at = place(config, rows as usize, row, col);
                written[at] = true;
                let error = (f64::from(got[at]) - want).abs();
                assert!(
                    error <= bound,
                    "{what} {config:?}, {rows} rows: [{row}, {col}] is {}, not {want} within {bound:e}",
                    got[at]
                );
            }
        }
        let untouched = got.iter().zip(written).all(|(y, written)| written || y.is_nan());
        assert!(untouched, "{what} {config:?}, {rows} rows: the padding was written");
    }
}

/// Where `y[row, col]` lies, as the documentation says it.
fn place(config: &LinearConfig, rows: usize, row: usize, col: usize) -> usize {
    let Some(widths) = config.regions else { return row * config.out_features as usize + col };
    let (mut start, mut first) = (0, 0);
    for width in widths.map(|width| width as usize) {
        if col < first + width {
            return start + row * width + col - first;
        }
        first += width;
        start += rows * width.next_multiple_of(64);
    }
    unreachable!("a column within the regions")
}

#[test]
fn fused_layers_agree_with_f64() {
    let silu = Some(ActivationKind::Silu);
    for how in adapter::ALL {
        let Some(gpu) = adapter::open(how) else { return };
        let kernels = LinearKernels::new();
        let mut rng = fastrand::Rng::with_seed(29);
        let every = [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT8, WeightFormat::INT4];
        let formats = if [adapter::CPU, adapter::GPU].contains(&how) { &every[..] } else { &every[1..2] };
        for &format in formats {
            let gated = LinearConfig { gated: true, activation: silu, ..LinearConfig::new(104, 42, format) };
            let odd = LinearConfig { norm: true, bias: true, in_features: 45, out_features: 41, ..gated };
            let regions = LinearConfig { regions: Some([72, 24, 8]), ..LinearConfig::new(64, 104, format) };
            let cases = [
                LinearConfig { norm: true, ..gated },
                odd,
                LinearConfig { norm: true, bias: true, ..regions },
                LinearConfig { norm: true, ..LinearConfig::new(45, 33, format) },
            ];
            for config in cases.into_iter().chain((format == WeightFormat::F16).then_some(gated)) {
                let case = Case::new(config, &mut rng);
                let linear = case.build(&gpu, &kernels);
                for rows in [1, 2, 3, 8, 21] {
                    let mut values = random(&mut rng, rows * config.in_features);
                    // Rows of very different sizes.
                    for (row, values) in values.chunks_mut(config.in_features as usize).enumerate() {
                        values.iter_mut().for_each(|x| *x *= [1.0, 1e3, 1e-2][row % 3]);
                    }
                    case.check(&gpu, &linear, &values, &format!("{how:?}"));
                }
            }
        }
    }
}

#[test]
fn gated_matrices_are_split_by_rows() {
    let Some(name) = adapter::open(adapter::DEFAULT).map(|gpu| gpu.adapter_info().name.clone()) else { return };
    for profile in [folio::Profile::Cpu, folio::Profile::Gpu] {
        let mut options = folio::GpuOptions::default();
        options.adapter_name = Some(name.clone());
        options.profile = Some(profile);
        options.max_binding_bytes = Some(1 << 20);
        let gpu = Gpu::open_blocking(options).unwrap();
        let config = LinearConfig { gated: true, bias: true, ..LinearConfig::new(300, 1001, WeightFormat::F32) };
        let case = Case::new(config, &mut fastrand::Rng::with_seed(31));
        // Without an activation the product is that of the sums.
        let linear = case.build(&gpu, &LinearKernels::new());
        let values = random(&mut fastrand::Rng::with_seed(3), 300);
        let (x, y) = (floats(&gpu, &values), empty(&gpu, 1001));
        run(&gpu, |pass| linear.record(&mut *pass, Rows::new(&x, 1, 300), Rows::new(&y, 1, 1001)).unwrap());
        let sums = case.sums(&values);
        for (col, got) in read(&gpu, &y).into_iter().enumerate() {
            let ((gate, gate_bound), (up, up_bound)) = (sums[col], sums[1001 + col]);
            let bound = gate_bound * up.abs() + up_bound * gate.abs() + 1e-6;
            assert!((f64::from(got) - gate * up).abs() <= bound, "{profile:?} {col}: {got}, not {}", gate * up);
        }
    }
}

#[test]
fn bad_fusions_are_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let kernels = LinearKernels::new();
    let config = LinearConfig::new(64, 8, WeightFormat::F16);
    let new = |config: LinearConfig, bias: Option<&[f32]>, norm: Option<RmsNorm<'_>>| {
        let mut rows = |_: u32, out: &mut [f32]| {
            out.fill(0.5);
            Ok(())
        };
        block_on(Linear::new(&gpu, &kernels, config, &mut rows, bias, norm))
    };
    let argument = |config, bias, norm| match new(config, bias, norm) {
        Err(ModelError::Folio(Error::Argument { argument, .. })) => argument,
        other => panic!("{other:?}"),
    };
    let norm = |weight, eps| Some(RmsNorm { weight, eps });
    for regions in [[4, 4, 4], [8, 0, 0], [2, 2, 4], [u32::MAX, 1, 8]] {
        assert_eq!(argument(LinearConfig { regions: Some(regions), ..config }, None, None), "regions");
    }
    // A gated layer's bias has that of the gate and that of up.
    assert_eq!(argument(LinearConfig { gated: true, bias: true, ..config }, Some(&[0.0; 8]), None), "bias");
    let normed = LinearConfig { norm: true, ..config };
    assert_eq!(argument(normed, None, None), "norm");
    assert_eq!(argument(normed, None, norm(&[1.0; 63], EPS)), "norm");
    assert_eq!(argument(config, None, norm(&[1.0; 64], EPS)), "norm");
    for eps in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40] {
        assert_eq!(argument(normed, None, norm(&[1.0; 64], eps)), "eps");
    }
    let gated = new(LinearConfig { gated: true, ..config }, None, None).unwrap();
    let (ids, out) = (empty(&gpu, 1), empty(&gpu, 64));
    let error = run(&gpu, |pass| gated.gather_rows(&mut *pass, &ids, Rows::new(&out, 1, 64)).unwrap_err());
    assert!(matches!(error, Error::Argument { argument: "gated", .. }), "{error}");
}

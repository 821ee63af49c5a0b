//! [`Gpu::tune_linear`]: the sizes of linear layers by measuring on the adapter at hand. Nothing calls it unasked.
//!
//! It stands here and not in [`crate::tune`], whose races it runs, because the layers are the model's and what stands to the left of the model
//! doesn't know it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::ModelResult;
use super::linear::{Linear, RmsNorm};
use super::linear_config::LinearConfig;
use super::linear_kernels::{Compiled, LinearKernels};
use super::linear_sizes::{MATVEC_ROWS, shape_of};
use super::linear_variant::{LinearKernel, LinearVariant};
use super::quantise::WeightFormat;
use super::rows::Rows;
use crate::kernel::Profile;
use crate::kernel::tuning::{LinearSizes, LinearThresholds, TunedLinear, TunedLinearKernel, Tuning};
use crate::tune::race::{Race, Run};
use crate::{Error, Gpu, Result};

/// What happens while [`Gpu::tune_linear`] works.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum LinearTuneEvent<'a> {
    /// A race begins.
    Race {
        /// The layer; bias, activation and where y goes play no part.
        layer: &'a LinearConfig,
        /// The kernel, by its name in a tuning.
        kernel: &'a str,
        /// Rows of x.
        rows: u32,
        /// How many candidates there are, the default among them.
        num_candidates: usize,
    },
    /// A candidate can't run, or is wrong on this adapter.
    Dropped {
        /// The candidate.
        sizes: LinearSizes,
        /// Why.
        reason: String,
    },
    /// What a candidate took.
    Timed {
        /// The candidate.
        sizes: LinearSizes,
        /// Median microseconds.
        micros: f64,
    },
    /// The race is over.
    Chosen(&'a TunedLinearKernel),
    /// Which kernel takes how many rows was raced, too.
    Thresholds(LinearThresholds),
}

/// Rows of x that are checked at most: past the tile of any candidate.
const CHECK_ROWS: u32 = 67;
/// Columns of y that are computed in f64, spread over all.
const CHECK_COLS: u32 = 24;
/// Rows of x of a prompt, and f32 of y that so many rows may take: 32 MiB.
const MANY_ROWS: u32 = 512;
const MAX_Y: u32 = 8 << 20;
const EPS: f32 = 1e-5;
/// Half of f32's epsilon.
const HALF_ULP: f64 = 1.0 / (1_u64 << 24) as f64;

impl Gpu {
    /// Races candidates of the kernels of linear layers, and which kernel takes how many rows; returns the winners, for [`Gpu::with_tuning`].
    /// [`Model::linear_configs`](super::Model::linear_configs) has a model's layers. **Submits and waits**, takes the device for itself meanwhile, and
    /// allocates the weights of one layer at a time. Ends after about `budget`: candidates that were not reached are not chosen.
    /// `progress` hears what is going on.
    ///
    /// Each candidate computes some rows first, of which some columns are compared with f64; one that is wrong on this adapter is dropped, as is one
    /// that doesn't compile.
    ///
    /// # Errors
    /// Those of [`Linear::new`] for the defaults; [`Error::Unsupported`] if even a default is wrong; [`Error::DeviceLost`].
    pub fn tune_linear(
        &self,
        layers: &[LinearConfig],
        budget: Duration,
        mut progress: impl FnMut(LinearTuneEvent<'_>),
    ) -> ModelResult<Tuning> {
        let start = Instant::now();
        let mut tuning = Tuning::new(self.tuned_for());
        for (i, config) in layers.iter().enumerate() {
            let shape = shape_of(config);
            if tuning.linear.iter().any(|tuned| tuned.shape == shape) {
                continue;
            }
            // What earlier layers left over helps the later ones.
            let left = budget.saturating_sub(start.elapsed());
            let deadline = Instant::now() + left / (layers.len() - i) as u32;
            let workload = Workload::new(self, *config)?;
            let (kernels, chosen) = workload.race_kernels(deadline, &mut progress)?;
            let thresholds = workload.race_thresholds(&chosen, deadline)?;
            progress(LinearTuneEvent::Thresholds(thresholds));
            let thresholds = (thresholds != LinearThresholds::default()).then_some(thresholds);
            tuning.linear.push(TunedLinear { shape, kernels, thresholds });
        }
        Ok(tuning)
    }
}

/// Numbers in -0.5..0.5 that belong to a row, the same in every run.
fn random_row(seed: u64, row: u32, out: &mut [f32]) {
    let mut rng = fastrand::Rng::with_seed(seed << 32 | u64::from(row));
    out.iter_mut().for_each(|x| *x = rng.f32() - 0.5);
}

/// A layer with random weights, and what some of its outputs are.
struct Workload {
    gpu: Gpu,
    config: LinearConfig,
    linear: Arc<Linear>,
    kernels: LinearKernels,
    x: wgpu::Buffer,
    y: wgpu::Buffer,
    /// Columns of y, and of each row of x the values and bounds in these columns.
    cols: Vec<u32>,
    expected: Vec<Vec<(f64, f64)>>,
}

impl Workload {
    fn new(gpu: &Gpu, config: LinearConfig) -> ModelResult<Self> {
        let LinearConfig { in_features, out_features, format, gated, norm, .. } = config;
        let config = LinearConfig { gated, norm, ..LinearConfig::new(in_features, out_features, format) };
        let gpu = gpu.retuned(None);
        let kernels = LinearKernels::new();
        let gains = norm.then(|| {
            let mut gains = vec![0.0; in_features as usize];
            random_row(3, 0, &mut gains);
            gains
        });
        let mut rows = |first: u32, out: &mut [f32]| {
            (first..).zip(out.chunks_mut(in_features as usize)).for_each(|(row, out)| random_row(1, row, out));
            Ok(())
        };
        let rms = gains.as_deref().map(|weight| RmsNorm { weight, eps: EPS });
        let linear = gpu.block_on(Linear::new(&gpu, &kernels, config, &mut rows, None, rms))?;

        let num_rows = many_rows(&config).max(CHECK_ROWS);
        let mut x = vec![0.0; num_rows as usize * in_features as usize];
        (0..).zip(x.chunks_mut(in_features as usize)).for_each(|(row, x)| random_row(2, row, x));
        let cols: Vec<_> = (0..CHECK_COLS.min(out_features))
            .map(|i| (u64::from(i) * u64::from(out_features - 1) / u64::from(CHECK_COLS)) as u32)
            .chain([out_features - 1])
            .collect();
        let halves = linear.variants().any(|variant| variant.target.matrix.is_some());
        let expected = expected(&config, gains.as_deref(), &cols, &x, halves)?;
        let buffer = |values: &[f32]| {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
            gpu.create_buffer_with("creating a workload", "folio tune", bytemuck::cast_slice(values), usage)
        };
        let y = buffer(&vec![0.0; num_rows as usize * out_features as usize])?;
        Ok(Self { x: buffer(&x)?, y, config, linear: Arc::new(linear), kernels, cols, expected, gpu })
    }

    /// The kernels that multiply: that of one row and that of the most rows first, as most time is spent in them.
    fn multipliers(&self) -> Vec<LinearVariant> {
        let multiplies =
            |variant: &LinearVariant| !matches!(variant.kernel, LinearKernel::Gather | LinearKernel::Stage);
        let mut variants: Vec<_> = self.linear.variants().copied().filter(multiplies).collect();
        if let Some(last) = variants.pop() {
            variants.insert(1.min(variants.len()), last);
        }
        variants
    }

    fn race_kernels(
        &self,
        deadline: Instant,
        progress: &mut impl FnMut(LinearTuneEvent<'_>),
    ) -> Result<(Vec<TunedLinearKernel>, Vec<Arc<Compiled>>)> {
        let (mut kernels, mut chosen) = (Vec::new(), Vec::new());
        let variants = self.multipliers();
        for (i, variant) in variants.iter().enumerate() {
            // The last share is for the thresholds.
            let left = deadline.saturating_duration_since(Instant::now());
            let deadline = Instant::now() + left / (variants.len() + 1 - i) as u32;
            let rows = match variant.kernel {
                LinearKernel::Rows(rows) => rows,
                _ => many_rows(&self.config),
            };
            let (candidates, kernel) = (variant.candidates(), variant.tuned_name());
            let num_candidates = candidates.len();
            progress(LinearTuneEvent::Race { layer: &self.config, kernel: &kernel, rows, num_candidates });
            let mut race = Race::new(&self.gpu)?;
            let mut entered: Vec<Arc<Compiled>> = Vec::new();
            for &sizes in &candidates {
                let is_default = entered.is_empty();
                if !is_default && Instant::now() >= deadline {
                    break;
                }
                let compiled = self.gpu.block_on(self.kernels.get(&self.gpu, variant.with_sizes(sizes)));
                match compiled.and_then(|compiled| self.check(&compiled).map(|()| compiled)) {
                    Ok(compiled) => {
                        race.enter(self.run(&compiled, rows));
                        entered.push(compiled);
                    }
                    Err(error) if is_default || matches!(error, Error::DeviceLost { .. }) => return Err(error),
                    Err(error) => progress(LinearTuneEvent::Dropped { sizes, reason: error.to_string() }),
                }
            }
            let outcome = race.run(deadline)?;
            for (compiled, median) in entered.iter().zip(&outcome.medians) {
                progress(LinearTuneEvent::Timed { sizes: compiled.variant.sizes, micros: median * 1e6 });
            }
            let best = Arc::clone(&entered[outcome.best]);
            let default_seconds = outcome.medians[0];
            let [nanos, default_nanos] =
                [default_seconds * outcome.ratio, default_seconds].map(|seconds| (seconds * 1e9) as u64);
            let tuned = TunedLinearKernel { kernel, sizes: best.variant.sizes, rows, nanos, default_nanos };
            progress(LinearTuneEvent::Chosen(&tuned));
            kernels.push(tuned);
            chosen.push(best);
        }
        Ok((kernels, chosen))
    }

    /// Whether the kernel that takes some rows by default is clearly behind another one.
    fn is_beaten(&self, default: &Arc<Compiled>, other: &Arc<Compiled>, rows: u32, deadline: Instant) -> Result<bool> {
        let mut race = Race::new(&self.gpu)?;
        race.enter(self.run(default, rows));
        race.enter(self.run(other, rows));
        Ok(race.run(deadline)?.best == 1)
    }

    /// By races at the numbers of rows where the default goes over from one kernel to another.
    fn race_thresholds(&self, chosen: &[Arc<Compiled>], deadline: Instant) -> Result<LinearThresholds> {
        let mut thresholds = LinearThresholds::default();
        let of = |kernel| chosen.iter().find(|compiled| compiled.variant.kernel == kernel);
        match self.gpu.profile() {
            Profile::Gpu => {
                let (Some(few), Some(many)) = (of(LinearKernel::Rows(8)), of(LinearKernel::Matmul)) else {
                    return Ok(thresholds);
                };
                let at = thresholds.matvec_rows;
                if self.is_beaten(few, many, at, deadline)? {
                    thresholds.matvec_rows = MATVEC_ROWS.into_iter().filter(|&rows| rows < at).max().unwrap_or(at);
                    return Ok(thresholds);
                }
                for rows in MATVEC_ROWS.into_iter().filter(|&rows| rows > at) {
                    if !self.is_beaten(many, few, rows, deadline)? {
                        break;
                    }
                    thresholds.matvec_rows = rows;
                }
            }
            Profile::Cpu => {
                let (Some(tile), Some(wide)) = (of(LinearKernel::Rows(8)), of(LinearKernel::Rows(16))) else {
                    return Ok(thresholds);
                };
                // 24 rows are three tiles of 8 or two of 16, 32 rows four or two.
                if self.is_beaten(tile, wide, 24, deadline)? {
                    thresholds.wide_quarters = 6;
                } else if self.is_beaten(wide, tile, 32, deadline)? {
                    thresholds.wide_quarters = 9;
                }
            }
        }
        Ok(thresholds)
    }

    fn run(&self, compiled: &Arc<Compiled>, rows: u32) -> Run {
        let (linear, compiled) = (Arc::clone(&self.linear), Arc::clone(compiled));
        let (x, y, config) = (self.x.clone(), self.y.clone(), self.config);
        Box::new(move |pass| {
            let (x, y) = (Rows::new(&x, rows, config.in_features), Rows::new(&y, rows, config.y_width()));
            linear.multiply((&mut *pass).into(), &compiled, x, y, None, None)
        })
    }

    /// Runs a kernel on rows past a tile of its.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a result is outside its bound.
    fn check(&self, compiled: &Compiled) -> Result<()> {
        let rows = (compiled.variant.tile().0 + 3).min(CHECK_ROWS);
        let (width, out_features) = (self.config.in_features, self.config.out_features);
        let mut encoder = self.gpu.encoder()?;
        let (x, y) = (Rows::new(&self.x, rows, width), Rows::new(&self.y, rows, out_features));
        self.linear.multiply((&mut encoder).into(), compiled, x, y, None, None)?;
        self.gpu.submit_now("checking a candidate", encoder)?;
        let got = self.gpu.read_blocking(y.range())?;
        for (row, (got, expected)) in got.chunks(out_features as usize).zip(&self.expected).enumerate() {
            for (&col, &(want, bound)) in self.cols.iter().zip(expected) {
                let got = f64::from(got[col as usize]);
                let is_within = (got - want).abs() <= bound;
                // NaN is not.
                if !is_within {
                    let have = format!("[{row}, {col}] is {got:e}, not {want:e} within {bound:e}");
                    return Err(Error::unsupported("candidate", "results within their bound", have));
                }
            }
        }
        Ok(())
    }
}

/// Rows of x for the kernel that takes many.
fn many_rows(config: &LinearConfig) -> u32 {
    (MAX_Y / config.out_features).clamp(CHECK_ROWS, MANY_ROWS)
}

/// Outputs of some columns in f64, on the weights as they are stored, and how far they may be off.
fn expected(
    config: &LinearConfig,
    gains: Option<&[f32]>,
    cols: &[u32],
    x: &[f32],
    halves: bool,
) -> ModelResult<Vec<Vec<(f64, f64)>>> {
    let LinearConfig { in_features, out_features, format, gated, .. } = *config;
    let n = in_features as usize;
    let weights = |row: u32| {
        let mut row_values = vec![0.0; n];
        random_row(1, row, &mut row_values);
        format.round_trip(&row_values)
    };
    let own: Vec<_> = cols.iter().map(|&col| weights(col)).collect::<ModelResult<_>>()?;
    let up: Vec<_> = if gated {
        cols.iter().map(|&col| weights(out_features + col)).collect::<ModelResult<_>>()?
    } else {
        Vec::new()
    };
    // Of products of halves both factors are rounded, and what is flushed to zero is far below these weights. Of the integer formats scale and
    // minimum are rounded one by one, relative to the largest weight: 0.5, times 3.1.
    let of_product = if halves { 1.0 / 256.0 } else { 0.0 };
    let steps = 2.0 * f64::from(in_features) + 24.0;
    let sum = |x: &[f32], w: &[f32], norm: f64| {
        let (mut sum, mut size) = (0.0, 0.0);
        for (k, (&x, &w)) in x.iter().zip(w).enumerate() {
            let x = f64::from(x) * norm * gains.map_or(1.0, |gains| f64::from(gains[k]));
            sum += x * f64::from(w);
            size +=
                x.abs() * if matches!(format, WeightFormat::F32 | WeightFormat::F16) { w.abs().into() } else { 1.55 };
        }
        (sum, (steps * HALF_ULP + of_product) * size + 1e-6)
    };
    let row = |x: &[f32]| {
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let norm = gains.map_or(1.0, |_| 1.0 / (squares / f64::from(in_features) + f64::from(EPS)).sqrt());
        let of_col = |i: usize| {
            let (value, bound) = sum(x, &own[i], norm);
            let Some(up) = up.get(i) else { return (value, bound) };
            let (up, up_bound) = sum(x, up, norm);
            (value * up, bound * up.abs() + up_bound * value.abs() + bound * up_bound + 1e-6)
        };
        (0..cols.len()).map(of_col).collect()
    };
    Ok(x.chunks(n).take(CHECK_ROWS as usize).map(row).collect())
}

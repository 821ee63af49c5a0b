//! [`Linear`]: a linear layer, `y = activation(x W^T + bias)`, and the embedding that shares its weights.

use std::sync::Arc;

use super::error::{ModelError, ModelResult};
use super::linear_config::{LinearConfig, LinearExperts, check_experts, check_regions, check_softcap};
use super::linear_kernels::{Compiled, LinearKernels};
use super::linear_sizes;
use super::linear_upload::{Part, RowSource, Weights, upload};
use super::linear_variant::{LinearKernel, LinearVariant};
use super::ops::Routes;
use super::quantise::WeightFormat;
use super::rows::Rows;
use crate::kernel::AdapterClass;
use crate::kernel::tuning::LinearThresholds;
use crate::{BufferRef, Error, Gpu, Recorder, Result};

/// RMSNorm: `x / sqrt(mean(x²) + eps) * weight`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm<'a> {
    /// `[in_features]`
    pub weight: &'a [f32],
    /// Added to the mean square; above 0.
    pub eps: f32,
}

/// A linear layer on the GPU: `y[rows, out_features] = activation(x[rows, in_features] W^T + bias)`, or `y +=` that, with W `[out_features,
/// in_features]` in a [`WeightFormat`], and x, y, bias and all sums in f32.
///
/// W is kept as the kernels like it: in storage buffers row by row on GPUs, in textures with the rows of a subgroup interleaved on CPU adapters. A W
/// beyond what one binding holds is split by rows.
#[derive(Debug)]
pub struct Linear {
    gpu: Gpu,
    config: LinearConfig,
    parts: Vec<Part>,
    bias: Option<wgpu::Buffer>,
    norm: Option<wgpu::Buffer>,
    compiled: Vec<Arc<Compiled>>,
    thresholds: LinearThresholds,
    kernels: LinearKernels,
}

/// The CPU kernel takes 8 inputs per iteration, and llvmpipe stops counting an invocation's iterations at 65 535.
pub(crate) const MAX_IN_FEATURES: u32 = 1 << 18;

/// With matrices of 8 it is 13 iterations for 32 inputs at most.
const MAX_CPU_MATRIX_IN_FEATURES: u32 = 1 << 17;

/// A row of y must fit a binding, and a row number an index of 4 weights.
pub(crate) const MAX_OUT_FEATURES: u32 = 1 << 28;

impl Linear {
    /// Packs and uploads the weights, and compiles the kernels that `kernels` doesn't have yet.
    ///
    /// `rows` fills its slice with whole rows of W, one after another, from the row that it is given: it is called for consecutive ranges of some 4
    /// MiB, each row once. `bias` has `out_features` values if the configuration says that there is one. NaN and infinities in the weights are kept, so
    /// they reach the output. A gated layer's ranges come in pairs, of the gate and of up, which has the rows from `out_features` on; `norm` is there
    /// exactly if the configuration says so.
    ///
    /// The upload submits to the queue, and waits for it, each time 64 MiB have gathered.
    ///
    /// # Errors
    /// [`Error::Argument`] if a size is zero or a multiple of something is asked for, if the bias has a wrong length, or if a weight doesn't fit
    /// F16 ([`ModelError::Weight`]); [`Error::Unsupported`] if even a few rows don't fit a binding; [`Error::Wgpu`] if the device has no memory left; and what `rows` returns.
    pub async fn new(
        gpu: &Gpu,
        kernels: &LinearKernels,
        config: LinearConfig,
        rows: &mut dyn FnMut(u32, &mut [f32]) -> ModelResult<()>,
        bias: Option<&[f32]>,
        norm: Option<RmsNorm<'_>>,
    ) -> ModelResult<Self> {
        let source = RowSource { rows, grids: &mut |_, _| Ok(()) };
        Self::from_source(gpu, kernels, config, source, bias, norm).await
    }

    /// [`Linear::new`] of weights that may lie on grids.
    pub(crate) async fn from_source(
        gpu: &Gpu,
        kernels: &LinearKernels,
        config: LinearConfig,
        source: RowSource<'_>,
        bias: Option<&[f32]>,
        norm: Option<RmsNorm<'_>>,
    ) -> ModelResult<Self> {
        let LinearConfig { in_features, out_features, format, .. } = config;
        for (name, value, max) in
            [("in_features", in_features, MAX_IN_FEATURES), ("out_features", out_features, MAX_OUT_FEATURES)]
        {
            if value == 0 || value > max {
                return Err(ModelError::argument(name, value, format!("1 to {max}")));
            }
        }
        format.check()?;
        check_experts(&config, MAX_OUT_FEATURES)?;
        check_regions(&config)?;
        check_softcap(&config)?;
        check_vector("bias", bias, config.bias.then_some(config.weight_rows()))?;
        check_vector("norm", norm.map(|norm| norm.weight), config.norm.then_some(in_features))?;
        // Rows of zeros would be divided by zero, and a value that is flushed to zero is one.
        if let Some(RmsNorm { eps, .. }) = norm
            && !(eps.is_finite() && eps >= f32::MIN_POSITIVE)
        {
            return Err(ModelError::argument("eps", eps, "a normal number above 0"));
        }
        let tuned = linear_sizes::entry(gpu.tuning(), &config).filter(|_| !config.exact && config.experts.is_none());
        let mut target = gpu.target();
        let overruns = gpu.adapter_class() == AdapterClass::Cpu && in_features > MAX_CPU_MATRIX_IN_FEATURES;
        if overruns || (format == WeightFormat::F32 && !gpu.rounds_f32()) {
            target.matrix = None;
        }
        let variants: Vec<_> =
            LinearVariant::of_layer(target, &config).into_iter().map(|variant| variant.tuned(tuned)).collect();
        let mut compiled = Vec::with_capacity(variants.len());
        for &variant in &variants {
            compiled.push(kernels.get(gpu, variant).await?);
        }
        let lanes = variants.first().map_or(1, LinearVariant::lanes);
        let parts = upload(gpu, kernels, config, lanes, norm.map_or(0.0, |norm| norm.eps), source)?;
        let vector = |values: &[f32]| {
            let contents = bytemuck::cast_slice(values);
            gpu.create_buffer_with("creating a bias", "folio bias", contents, wgpu::BufferUsages::STORAGE)
        };
        let bias = bias.map(vector).transpose()?;
        let norm = norm.map(|norm| vector(norm.weight)).transpose()?;
        let thresholds = linear_sizes::thresholds(tuned);
        Ok(Self { gpu: gpu.clone(), config, parts, bias, norm, compiled, thresholds, kernels: kernels.clone() })
    }

    /// The compiled kernels, those that multiply first.
    pub fn variants(&self) -> impl Iterator<Item = &LinearVariant> {
        self.compiled.iter().map(|compiled| &compiled.variant)
    }

    /// Shape and options.
    #[must_use]
    pub fn config(&self) -> LinearConfig {
        self.config
    }

    /// Bytes of weights and scales that a call of [`Linear::record`] reads at least once.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.config.format.bytes(self.config.weight_rows(), self.config.in_features)
    }

    /// Records `y = activation(x W^T + bias)`, or `y +=` that: one dispatch, or one for each binding that W takes.
    ///
    /// The kernel is chosen by the number of rows; see [`LinearKernel::for_rows`]. On CPU adapters each weight is read once for 1, 2, 4, 8 or 16 rows, and
    /// from 3 rows on x is moved to a texture first, by a dispatch of its own. On GPUs up to 16 rows take the kernel that reads W once for up to 8 rows,
    /// and more rows the one with tiles of 64 x 64, by matrix units if [`Gpu::with_matrix_units`] has them. A tuning may choose other numbers. A norm takes
    /// no dispatch of its own.
    ///
    /// # Errors
    /// [`Error::Argument`] if x is not `[rows, in_features]`, y not `[rows, y_width]`, there is no row, or both are in the same buffer;
    /// [`Error::Unsupported`] if there are too many rows.
    pub fn record<'a>(&self, recorder: impl Into<Recorder<'a>>, x: Rows<'_>, y: Rows<'_>) -> Result<()> {
        let gpu = &self.gpu;
        x.check(gpu, "x", x.rows, self.config.in_features)?;
        y.check(gpu, "y", x.rows, self.config.y_width())?;
        if x.buffer == y.buffer {
            return Err(Error::argument("y", "the buffer of x", "another buffer"));
        }
        self.check_routed(false)?;
        let kernel = if self.config.exact {
            LinearKernel::exact_for_rows(gpu.target(), x.rows)
        } else {
            LinearKernel::for_rows(gpu.profile(), x.rows, self.thresholds)
        };
        let compiled = self.compiled(kernel)?;
        self.multiply(recorder.into(), compiled, x, y, None, None)
    }

    fn check_routed(&self, routed: bool) -> Result<()> {
        if self.config.experts.is_some() == routed {
            return Ok(());
        }
        let need = if routed { "experts, for rows with routes" } else { "none, for rows without routes" };
        Err(Error::argument("experts", format!("{:?}", self.config.experts), need))
    }

    /// The rows of a tile in which [`Linear::record_routed`] computes `rows` rows of y: what [`Router::record`](super::Router::record) is to cut them into.
    ///
    /// # Errors
    /// [`Error::Argument`] if the layer has no experts.
    pub fn tile_rows(&self, rows: u32) -> Result<u32> {
        Ok(self.routed(rows)?.variant.tile().0)
    }

    /// The kernel for so many rows of y of all experts.
    fn routed(&self, rows: u32) -> Result<&Compiled> {
        self.check_routed(true)?;
        let per_expert = rows.div_ceil(self.config.num_experts());
        self.compiled(LinearKernel::for_expert_rows(self.gpu.target(), self.config.exact, per_expert))
    }

    /// Records `y = activation(x W^T + bias)` for the experts that each row of x goes to: one dispatch, or one for each binding that W takes. Row `r` of x
    /// makes the rows of y from `r * per_row` on, in the order of the row's experts. A layer with one row of y for each of x (`per_row` is 1) takes the
    /// rows of y of another as its x, by the same routes.
    ///
    /// Experts that no row goes to are not read. Workgroups are recorded for the most tiles that there can be, and those that there aren't end at once: on
    /// an indirect dispatch each backend spends a check of its own, and the few numbers that it would save are known to be small.
    ///
    /// # Errors
    /// [`Error::Argument`] if the layer has no experts, x is not `[rows, in_features]`, y not `[rows * per_row, out_features]`, the routes are those of
    /// other experts or fewer rows, or both are in the same buffer; [`Error::Unsupported`] if there are too many rows.
    pub fn record_routed<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        x: Rows<'_>,
        y: Rows<'_>,
        routes: &Routes,
    ) -> Result<()> {
        let gpu = &self.gpu;
        self.check_routed(true)?;
        let LinearExperts { count, per_row } = self.config.experts.unwrap_or(LinearExperts { count: 1, per_row: 1 });
        let sent = routes.experts();
        if sent.count != count || !y.rows.is_multiple_of(sent.per_row) {
            let need = format!("those of {count} experts, and whole rows for {} rows of y", y.rows);
            return Err(Error::argument("routes", format!("{sent:?}"), need));
        }
        x.check(gpu, "x", x.rows, self.config.in_features)?;
        y.check(gpu, "y", x.rows.saturating_mul(per_row), self.config.y_width())?;
        if x.buffer == y.buffer {
            return Err(Error::argument("y", "the buffer of x", "another buffer"));
        }
        let compiled = self.routed(y.rows)?;
        let (list, tiles) = routes.list(gpu, y.rows / sent.per_row, compiled.variant.tile().0)?;
        self.multiply(recorder.into(), compiled, x, y, Some((list, tiles)), None)
    }

    /// Records one workgroup of each kernel that [`Linear::record`] and [`Linear::gather_rows`] may take and that no layer with the same `kernels` has
    /// recorded here before: some drivers compile a kernel when it is first run. The results go nowhere.
    ///
    /// # Errors
    /// [`Error::Wgpu`] if there is no memory for a few rows of x and y.
    pub fn warm_up<'a>(&self, recorder: impl Into<Recorder<'a>>) -> Result<()> {
        let (gpu, mut recorder) = (&self.gpu, recorder.into());
        let cold: Vec<_> = self.compiled.iter().filter(|c| c.program.take_cold()).collect();
        if cold.is_empty() {
            return Ok(());
        }
        let scratch = |width: u32| {
            let size = u64::from(width) * 4;
            gpu.create_buffer("warming up", "folio warm-up", size, wgpu::BufferUsages::STORAGE)
        };
        let per_row = self.config.experts.map_or(1, |experts| experts.per_row);
        let (x, y) = (scratch(self.config.in_features)?, scratch(self.config.y_width() * per_row)?);
        // A list of no tiles.
        let routes = self.config.experts.map(|_| scratch(per_row + 4)).transpose()?;
        for compiled in cold {
            let x = Rows::new(&x, 1, self.config.in_features);
            match compiled.variant.kernel {
                LinearKernel::Gather => self.gather(recorder.reborrow(), scratch(1)?.as_entire_binding(), x)?,
                LinearKernel::Stage => drop(self.stage(recorder.reborrow(), x)?),
                LinearKernel::Rows(_) | LinearKernel::Matmul => {
                    let y = Rows::new(&y, per_row, self.config.y_width());
                    let routes = routes.as_ref().map(|list| (BufferRef::from(list), 1));
                    self.multiply(recorder.reborrow(), compiled, x, y, routes, Some([1, 1, 1]))?;
                }
            }
        }
        Ok(())
    }

    /// Records `out[i] = W[ids[i]]`, as f32 `[ids, in_features]`: the embedding of tokens by the weights of the output layer (tied weights). `ids` holds
    /// u32, one per row of `out`; ids beyond the last row of W are taken for the last one. [`LinearConfig::gather_scale`] multiplies them; a norm, a soft cap
    /// and regions play no part.
    ///
    /// # Errors
    /// [`Error::Argument`] if the layer is gated, if `out` is not `[rows, in_features]`, `ids` doesn't hold one u32 per row, or both are in the same buffer;
    /// [`Error::Unsupported`] if there are more than 65 535 rows.
    pub fn gather_rows<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        ids: impl Into<BufferRef<'a>>,
        out: Rows<'_>,
    ) -> Result<()> {
        let gpu = &self.gpu;
        if self.config.gated {
            return Err(Error::argument("gated", true, "false, for rows of W"));
        }
        out.check(gpu, "out", out.rows, self.config.in_features)?;
        let ids = ids.into().check(gpu, "ids", out.rows.into(), false)?;
        if ids.buffer() == out.buffer {
            return Err(Error::argument("out", "the buffer of ids", "another buffer"));
        }
        self.gather(recorder.into(), ids.binding(), out)
    }

    fn gather(&self, mut recorder: Recorder<'_>, ids: wgpu::BindingResource<'_>, out: Rows<'_>) -> Result<()> {
        let gpu = &self.gpu;
        let max = gpu.limits().max_compute_workgroups_per_dimension;
        if out.rows > max {
            return Err(Error::unsupported("rows of an embedding", out.rows, max));
        }
        let gather = self.compiled(LinearKernel::Gather)?;
        let (_, packs) = gather.variant.tile();
        let grid = [self.config.format.row_packs(self.config.in_features).div_ceil(packs), out.rows, 1];
        for part in &self.parts {
            let mut resources =
                vec![part.weights.binding(), ids.clone(), out.binding(), part.params.as_entire_binding()];
            resources.extend(part.scales.as_ref().map(Weights::binding));
            gather.program.record(gpu, recorder.reborrow(), resources, grid)?;
        }
        Ok(())
    }

    /// Moves x to a texture.
    fn stage(&self, recorder: Recorder<'_>, x: Rows<'_>) -> Result<wgpu::TextureView> {
        let gpu = &self.gpu;
        let max = gpu.limits().max_compute_workgroups_per_dimension;
        if x.rows > max {
            return Err(Error::unsupported("rows of a linear layer", x.rows, max));
        }
        // Texels of 4, of rows padded as those of W are.
        let texels = u64::from(x.rows) * u64::from(x.width.next_multiple_of(32) / 4);
        let view = self.kernels.stage(gpu, texels)?;
        if let Some(part) = self.parts.first() {
            let mut resources =
                vec![wgpu::BindingResource::TextureView(&view), x.binding(), part.params.as_entire_binding()];
            resources.extend(self.norm.as_ref().map(wgpu::Buffer::as_entire_binding));
            self.compiled(LinearKernel::Stage)?.program.record(gpu, recorder, resources, [1, x.rows, 1])?;
        }
        Ok(view)
    }

    fn compiled(&self, kernel: LinearKernel) -> Result<&Compiled> {
        let found = self.compiled.iter().find(|compiled| compiled.variant.kernel == kernel);
        found.map(Arc::as_ref).ok_or_else(|| Error::argument("kernel", format!("{kernel:?}"), "one of the layer's"))
    }

    pub(super) fn multiply(
        &self,
        mut recorder: Recorder<'_>,
        compiled: &Compiled,
        x: Rows<'_>,
        y: Rows<'_>,
        routes: Option<(BufferRef<'_>, u32)>,
        grid: Option<[u32; 3]>,
    ) -> Result<()> {
        let gpu = &self.gpu;
        let max = gpu.limits().max_compute_workgroups_per_dimension;
        let (rows, cols) = compiled.variant.tile();
        let row_tiles = routes.as_ref().map_or(x.rows.div_ceil(rows), |(_, tiles)| *tiles);
        if row_tiles > max {
            return Err(Error::unsupported("rows of a linear layer", y.rows, u64::from(max) * u64::from(rows)));
        }
        let staged = if compiled.variant.staged() { Some(self.stage(recorder.reborrow(), x)?) } else { None };
        let x = staged.as_ref().map_or(x.binding(), wgpu::BindingResource::TextureView);
        for part in &self.parts {
            let mut resources = vec![part.weights.binding(), x.clone(), y.binding(), part.params.as_entire_binding()];
            resources.extend(part.scales.as_ref().map(Weights::binding));
            resources.extend(self.bias.as_ref().map(wgpu::Buffer::as_entire_binding));
            let norm = self.norm.as_ref().filter(|_| compiled.variant.norm);
            resources.extend(norm.map(wgpu::Buffer::as_entire_binding));
            resources.extend(routes.as_ref().map(|(list, _)| list.binding()));
            let tiles = (part.last_row - part.first_row + 1).div_ceil(cols);
            let grid = grid.unwrap_or([tiles.min(max), row_tiles, tiles.div_ceil(max)]);
            compiled.program.record(gpu, recorder.reborrow(), resources, grid)?;
        }
        Ok(())
    }
}

fn check_vector(argument: &'static str, values: Option<&[f32]>, need: Option<u32>) -> Result<()> {
    if values.map(<[f32]>::len) == need.map(|len| len as usize) {
        return Ok(());
    }
    let count = |len: Option<usize>| len.map_or("none".to_owned(), |len| format!("{len} values"));
    Err(Error::argument(argument, count(values.map(<[f32]>::len)), count(need.map(|len| len as usize))))
}

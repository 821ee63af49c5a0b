//! [`Linear`]: a linear layer, `y = activation(x W^T + bias)`, and the embedding that shares its weights.

use std::sync::Arc;

use super::error::{ModelError, ModelResult};
use super::linear_config::{LinearConfig, check_regions, check_softcap};
use super::linear_kernels::{Compiled, LinearKernels, TEXTURE_WIDTH, create_texture, create_view};
use super::linear_sizes;
use super::linear_variant::{LinearKernel, LinearVariant};
use super::quantise::{Packed, Packer, WeightFormat, WeightGrid};
use super::rows::Rows;
use crate::kernel::tuning::LinearThresholds;
use crate::kernel::{AdapterClass, Profile};
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

/// Rows of W in one binding: those of some columns of y.
#[derive(Debug)]
struct Part {
    first_row: u32,
    last_row: u32,
    weights: Weights,
    scales: Option<Weights>,
    params: wgpu::Buffer,
}

/// Where packed words are.
#[derive(Debug)]
enum Weights {
    Buffer(wgpu::Buffer),
    Texture(wgpu::TextureView),
}

impl Weights {
    fn binding(&self) -> wgpu::BindingResource<'_> {
        match self {
            Self::Buffer(buffer) => buffer.as_entire_binding(),
            Self::Texture(view) => wgpu::BindingResource::TextureView(view),
        }
    }
}

/// Parameters as the shaders read them (`linear_params.wgsl`).
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
struct LinearParams {
    in_features: u32,
    out_features: u32,
    row_packs: u32,
    row_groups: u32,
    first_row: u32,
    last_row: u32,
    accumulate: u32,
    norm_eps: f32,
}

/// Fills its slice from a row of W on.
pub(crate) type Fill<'a, T> = &'a mut dyn FnMut(u32, &mut [T]) -> ModelResult<()>;

/// Where the rows of W come from.
pub(crate) struct RowSource<'a> {
    /// Whole rows of weights.
    pub(crate) rows: Fill<'a, f32>,
    /// The grids of as many rows, which come as `None`. Called for formats that take them only.
    pub(crate) grids: Fill<'a, Option<WeightGrid>>,
}

/// The CPU kernel takes 8 inputs per iteration, and llvmpipe stops counting an invocation's iterations at 65 535.
pub(crate) const MAX_IN_FEATURES: u32 = 1 << 18;

/// With matrices of 8 it is 13 iterations for 32 inputs at most.
const MAX_CPU_MATRIX_IN_FEATURES: u32 = 1 << 17;

/// A row of y must fit a binding, and a row number an index of 4 weights.
pub(crate) const MAX_OUT_FEATURES: u32 = 1 << 28;

/// f32 that are asked for at a time: 4 MiB, so that loading takes little memory beside the file.
const PIECE: u64 = 1 << 20;

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
        let tuned = linear_sizes::entry(gpu.tuning(), &config).filter(|_| !config.exact);
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
        let kernel = if self.config.exact {
            LinearKernel::exact_for_rows(gpu.target(), x.rows)
        } else {
            LinearKernel::for_rows(gpu.profile(), x.rows, self.thresholds)
        };
        let compiled = self.compiled(kernel)?;
        self.multiply(recorder.into(), compiled, x, y, None)
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
        let (x, y) = (scratch(self.config.in_features)?, scratch(self.config.y_width())?);
        for compiled in cold {
            let x = Rows::new(&x, 1, self.config.in_features);
            match compiled.variant.kernel {
                LinearKernel::Gather => self.gather(recorder.reborrow(), scratch(1)?.as_entire_binding(), x)?,
                LinearKernel::Stage => drop(self.stage(recorder.reborrow(), x)?),
                LinearKernel::Rows(_) | LinearKernel::Matmul => {
                    let y = Rows::new(&y, 1, self.config.y_width());
                    self.multiply(recorder.reborrow(), compiled, x, y, Some([1, 1, 1]))?;
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
        grid: Option<[u32; 3]>,
    ) -> Result<()> {
        let gpu = &self.gpu;
        let max = gpu.limits().max_compute_workgroups_per_dimension;
        let (rows, cols) = compiled.variant.tile();
        let row_tiles = x.rows.div_ceil(rows);
        if row_tiles > max {
            return Err(Error::unsupported("rows of a linear layer", x.rows, u64::from(max) * u64::from(rows)));
        }
        let staged = if compiled.variant.staged() { Some(self.stage(recorder.reborrow(), x)?) } else { None };
        let x = staged.as_ref().map_or(x.binding(), wgpu::BindingResource::TextureView);
        for part in &self.parts {
            let mut resources = vec![part.weights.binding(), x.clone(), y.binding(), part.params.as_entire_binding()];
            resources.extend(part.scales.as_ref().map(Weights::binding));
            resources.extend(self.bias.as_ref().map(wgpu::Buffer::as_entire_binding));
            let norm = self.norm.as_ref().filter(|_| compiled.variant.norm);
            resources.extend(norm.map(wgpu::Buffer::as_entire_binding));
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

/// Packs W piece by piece into as many bindings as it takes. Of a gated layer, `lanes` rows of up follow on `lanes` rows of the gate, so that who
/// sums one sums the other.
fn upload(
    gpu: &Gpu,
    kernels: &LinearKernels,
    config: LinearConfig,
    lanes: u32,
    norm_eps: f32,
    source: RowSource<'_>,
) -> ModelResult<Vec<Part>> {
    let LinearConfig { in_features, out_features, format, gated, .. } = config;
    let packer = Packer::new(format, in_features, lanes);
    // What yields `lanes` outputs.
    let blocks_per_unit = if gated { 2 } else { 1 };
    let unit_bytes = packer.row_packs as u64 * u64::from(lanes) * 16 * blocks_per_unit;
    let max_bytes = match gpu.profile() {
        Profile::Gpu => gpu.max_storage_bytes(),
        // Small enough to be found in memory in one piece; `max_storage_bytes` is what tests make small.
        Profile::Cpu => {
            let height = gpu.limits().max_texture_dimension_2d;
            (u64::from(TEXTURE_WIDTH.min(height)) * u64::from(height) * 16).min(gpu.max_storage_bytes())
        }
    };
    let part_rows = u64::from(lanes) * (max_bytes / unit_bytes);
    if part_rows == 0 || gpu.limits().max_texture_dimension_2d < TEXTURE_WIDTH {
        let what = "a linear layer's weights";
        let need = format!("{unit_bytes} bytes of {} rows", u64::from(lanes) * blocks_per_unit);
        return Err(Error::unsupported(what, need, max_bytes).into());
    }
    let part_rows = u32::try_from(part_rows.min(out_features.into())).unwrap_or(out_features);
    // Whole blocks, so that pieces can be packed one after another.
    let piece_rows = PIECE / u64::from(in_features) / blocks_per_unit;
    let piece_rows = u32::try_from(piece_rows).unwrap_or(u32::MAX).max(1).next_multiple_of(lanes);
    let block_len = lanes as usize * in_features as usize;
    let RowSource { rows, grids: fill_grids } = source;
    let (mut values, mut grids) = (Vec::new(), Vec::new());
    let mut parts = Vec::new();
    for first_row in (0..out_features).step_by(part_rows as usize) {
        let num_rows = part_rows.min(out_features - first_row);
        let units = u64::from(num_rows.div_ceil(lanes));
        let mut weights = WeightUpload::new(gpu, units * unit_bytes / 4)?;
        let scale_words = units * blocks_per_unit * packer.row_groups as u64 * u64::from(lanes);
        let mut scales = if scale_words > 0 { Some(WeightUpload::new(gpu, scale_words)?) } else { None };
        let mut packed = Packed::default();
        for first in (0..num_rows).step_by(piece_rows as usize) {
            let piece = piece_rows.min(num_rows - first);
            let (row, len) = (first_row + first, piece as usize * in_features as usize);
            values.resize(len * blocks_per_unit as usize, 0.0);
            let (own, up) = values.split_at_mut(len);
            rows(row, own)?;
            let num_grids = piece as usize * packer.row_grids;
            grids.clear();
            grids.resize(num_grids * blocks_per_unit as usize, None);
            let (own_grids, up_grids) = grids.split_at_mut(num_grids);
            if num_grids > 0 {
                fill_grids(row, own_grids)?;
            }
            if gated {
                rows(out_features + row, up)?;
                if num_grids > 0 {
                    fill_grids(out_features + row, up_grids)?;
                }
                for (block, (gate, up)) in (0..).zip(own.chunks(block_len).zip(up.chunks(block_len))) {
                    let first = (block * lanes) as usize * packer.row_grids;
                    packer.pack(gate, &own_grids[first..], row + block * lanes, &mut packed)?;
                    packer.pack(up, &up_grids[first..], out_features + row + block * lanes, &mut packed)?;
                }
            } else {
                packer.pack(own, own_grids, row, &mut packed)?;
            }
            let last = first + piece == num_rows;
            weights.write(gpu, kernels, &mut packed.packs, last)?;
            if let Some(scales) = &mut scales {
                scales.write(gpu, kernels, &mut packed.scales, last)?;
            }
        }
        let last_row = first_row + num_rows - 1;
        let params = LinearParams {
            in_features,
            out_features,
            row_packs: packer.row_packs as u32,
            row_groups: packer.row_groups as u32,
            first_row,
            last_row,
            accumulate: u32::from(config.accumulate),
            norm_eps,
        };
        let contents = bytemuck::bytes_of(&params);
        let usage = wgpu::BufferUsages::UNIFORM;
        let buffer = gpu.create_buffer_with("creating a linear layer", "folio linear", contents, usage)?;
        parts.push(Part {
            first_row,
            last_row,
            weights: weights.weights(gpu)?,
            scales: scales.map(|scales| scales.weights(gpu)).transpose()?,
            params: buffer,
        });
    }
    Ok(parts)
}

/// Writes words, piece after piece, to where the profile keeps them.
enum WeightUpload {
    Buffer { buffer: wgpu::Buffer, written: u64 },
    Texture { texture: wgpu::Texture, next_row: u32 },
}

impl WeightUpload {
    fn new(gpu: &Gpu, words: u64) -> Result<Self> {
        let during = "creating a linear layer's weights";
        if gpu.profile() == Profile::Gpu {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
            return Ok(Self::Buffer {
                buffer: gpu.create_buffer(during, "folio weights", words * 4, usage)?,
                written: 0,
            });
        }
        // No more than the device's limit, or the caller has erred and wgpu says so.
        let height = u32::try_from(words.div_ceil(u64::from(TEXTURE_WIDTH * 4))).unwrap_or(u32::MAX);
        let usage = wgpu::TextureUsages::TEXTURE_BINDING | wgpu::TextureUsages::COPY_DST;
        let texture = create_texture(gpu, height, usage)?;
        Ok(Self::Texture { texture, next_row: 0 })
    }

    /// Writes what it can of `words`, all of it if they are the last ones, and removes it from them.
    fn write(&mut self, gpu: &Gpu, kernels: &LinearKernels, words: &mut Vec<u32>, last: bool) -> Result<()> {
        match self {
            Self::Buffer { buffer, written } => {
                let write = || gpu.queue().write_buffer(buffer, *written, bytemuck::cast_slice(words));
                gpu.scoped_now("uploading weights", write)?;
                let bytes = words.len() as u64 * 4;
                *written += bytes;
                words.clear();
                kernels.uploaded(gpu, bytes)
            }
            Self::Texture { texture, next_row } => {
                let row_words = (TEXTURE_WIDTH * 4) as usize;
                if last {
                    words.resize(words.len().next_multiple_of(row_words), 0);
                }
                let height = words.len() / row_words;
                if height == 0 {
                    return Ok(());
                }
                let bytes = height * row_words * 4;
                let height = height as u32;
                let mut target = texture.as_image_copy();
                target.origin.y = *next_row;
                let layout = wgpu::TexelCopyBufferLayout {
                    offset: 0,
                    bytes_per_row: Some(row_words as u32 * 4),
                    rows_per_image: None,
                };
                let size = wgpu::Extent3d { width: TEXTURE_WIDTH, height, depth_or_array_layers: 1 };
                let data = &bytemuck::cast_slice(words)[..bytes];
                let write = || gpu.queue().write_texture(target, data, layout, size);
                gpu.scoped_now("uploading weights", write)?;
                *next_row += height;
                words.drain(..bytes / 4);
                kernels.uploaded(gpu, bytes as u64)
            }
        }
    }

    fn weights(self, gpu: &Gpu) -> Result<Weights> {
        Ok(match self {
            Self::Buffer { buffer, .. } => Weights::Buffer(buffer),
            Self::Texture { texture, .. } => Weights::Texture(create_view(gpu, &texture)?),
        })
    }
}

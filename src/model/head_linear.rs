//! [`HeadLinear`]: a matrix for each head, for models with latents.

use std::sync::Arc;

use minijinja::context;

use super::error::{ModelError, ModelResult};
use super::linear_kernels::LinearKernels;
use super::quantise::{Packed, Packer, WeightFormat};
use super::rows::Rows;
use crate::gpu::Program;
use crate::kernel::{Access, Binding, RopeShape, ShaderFeatures, Source, render};
use crate::plan::MAX_GRID;
use crate::{BufferRef, Error, Gpu, Recorder, Result, RopeConfig};

/// Invocations of a workgroup, each with a column of its own: a whole number of subgroups on every GPU.
const LANES: u32 = 64;

/// Rows of x for which a workgroup reads W once. Each is a sum in a register of every invocation, and a line of text for each weight of a pack.
const TILE_ROWS: u32 = 8;

/// Inputs in workgroup memory at a time: of `TILE_ROWS` rows 4 KiB, so that several workgroups have room beside each other. A whole number of packs.
const SLICE: u32 = 128;

/// Widest input and output of a head: far from overflowing an index, and more than any model has.
const MAX_FEATURES: u32 = 1 << 14;

/// Shape and options of a [`HeadLinear`] layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeadLinearConfig {
    /// Heads: 1 to 65535.
    pub num_heads: u32,
    /// Inputs of a head.
    pub in_features: u32,
    /// Outputs of a head.
    pub out_features: u32,
    /// How the matrices are stored.
    pub format: WeightFormat,
    /// Elements of x behind a head's inputs, all of which are rotated and go behind its outputs. `rotary_start` is not used.
    pub rope: Option<RopeShape>,
}

impl HeadLinearConfig {
    /// Elements of a head in a row of x.
    #[must_use]
    pub fn x_width(&self) -> u32 {
        self.in_features + self.rotary_dim()
    }

    /// Elements of a head in a row of y.
    #[must_use]
    pub fn y_width(&self) -> u32 {
        self.out_features + self.rotary_dim()
    }

    fn rotary_dim(&self) -> u32 {
        self.rope.map_or(0, |rope| rope.rotary_dim)
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self) -> Result<()> {
        for (name, value, max) in [
            ("num_heads", self.num_heads, MAX_GRID),
            ("in_features", self.in_features, MAX_FEATURES),
            ("out_features", self.out_features, MAX_FEATURES),
        ] {
            if value == 0 || value > max {
                return Err(Error::argument(name, value, format!("1 to {max}")));
            }
        }
        if let Some(RopeShape { rotary_dim, .. }) = self.rope
            && (rotary_dim == 0 || rotary_dim > MAX_FEATURES || !rotary_dim.is_multiple_of(2))
        {
            return Err(Error::argument("rotary_dim", rotary_dim, format!("an even number from 2 to {MAX_FEATURES}")));
        }
        self.format.check()
    }

    /// Bytes of all matrices, the padding of rows and of columns included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let columns = self.out_features.next_multiple_of(LANES);
        u64::from(self.num_heads).saturating_mul(self.format.bytes(columns, self.in_features))
    }

    /// The text of the kernel for one row of x, or of that for many.
    ///
    /// # Errors
    /// Those of [`HeadLinearConfig::validate`].
    pub fn source(&self, many: bool) -> Result<Source> {
        self.validate()?;
        let Self { num_heads, in_features, out_features, format, rope } = *self;
        let rows = if many { TILE_ROWS } else { 1 };
        let values = context! {
            lanes => LANES,
            rows,
            slice => SLICE,
            num_heads,
            in_features,
            out_features,
            x_width => self.x_width(),
            y_width => self.y_width(),
            format => format.shader_name(),
            group_size => format.group_size(),
            row_packs => format.row_packs(in_features),
            row_groups => format.row_groups(in_features),
            rope => rope.map(|rope| rope.layout.shader_name()),
            rotary_dim => rope.map(|rope| rope.rotary_dim),
            rotary_start => 0,
        };
        let mut bindings = vec![("w", Access::Read), ("x", Access::Read), ("y", Access::Write)];
        bindings.extend(format.group_size().map(|_| ("scales", Access::Read)));
        bindings.extend(rope.iter().flat_map(|_| [("positions", Access::Read), ("rope_table", Access::Read)]));
        Ok(Source {
            entry_point: "head_linear",
            text: render("model/head_linear.wgsl", values)?,
            bindings: bindings.into_iter().map(|(name, access)| Binding::new(name, access)).collect(),
            workgroup_size: LANES,
            workgroup_bytes: rows * SLICE * 4,
            features: ShaderFeatures::default(),
        })
    }
}

/// Frequencies on the GPU, shared by the layers of a model.
#[derive(Clone, Debug)]
pub struct HeadRope {
    shape: RopeShape,
    table: wgpu::Buffer,
}

impl HeadRope {
    /// Uploads the frequencies.
    ///
    /// # Errors
    /// [`Error::Argument`] for a field that breaks its rule; [`Error::Wgpu`].
    pub fn new(gpu: &Gpu, config: &RopeConfig) -> Result<Self> {
        config.validate(config.rotary_start.saturating_add(config.rotary_dim))?;
        Ok(Self { shape: RopeShape::of(config), table: gpu.rope_table(config)? })
    }

    /// What of it is compiled in.
    #[must_use]
    pub fn shape(&self) -> RopeShape {
        self.shape
    }
}

/// A linear layer of each head on the GPU: `y[row, head] = W_head x[row, head]`, with x `[rows, num_heads, x_width]`, y `[rows, num_heads, y_width]`,
/// W `[num_heads, out_features, in_features]` in a [`WeightFormat`], and all sums in f32. With a rope the elements of x behind the inputs are rotated
/// by the position of their row and go behind the outputs of y.
///
/// It is what a model with latents multiplies by where a projection of the latents is absorbed (DeepSeek-V2, Liu et al. 2024, section 2.1): `W_k^T`
/// of a head's query, and `W_v` of what attention sums up of latents. The bits of a row of y don't depend on the other rows.
#[derive(Debug)]
pub struct HeadLinear {
    gpu: Gpu,
    config: HeadLinearConfig,
    weights: wgpu::Buffer,
    scales: Option<wgpu::Buffer>,
    rope: Option<HeadRope>,
    /// For one row of x, and for many.
    programs: [Arc<Program>; 2],
}

impl HeadLinear {
    /// Packs and uploads the weights and compiles the kernels. `fill` is called for each head in turn and fills in its matrix, `[out_features,
    /// in_features]`. `rope` is there exactly if the configuration says so, and of that shape.
    ///
    /// # Errors
    /// [`Error::Argument`] for a field that breaks its rule, or another rope; [`ModelError::Weight`] for a weight that doesn't fit F16, whose row is
    /// counted over all heads; [`Error::Unsupported`] if the matrices don't fit a binding; [`Error::Wgpu`]; and what `fill` returns.
    pub async fn new(
        gpu: &Gpu,
        kernels: &LinearKernels,
        config: HeadLinearConfig,
        rope: Option<&HeadRope>,
        fill: &mut dyn FnMut(u32, &mut [f32]) -> ModelResult<()>,
    ) -> ModelResult<Self> {
        config.validate()?;
        if rope.map(HeadRope::shape) != config.rope {
            let (got, need) = (rope.map(HeadRope::shape), config.rope);
            return Err(ModelError::argument(
                "rope",
                format!("{got:?}"),
                format!("{need:?}, as the configuration says"),
            ));
        }
        let HeadLinearConfig { num_heads, in_features, out_features, format, .. } = config;
        let (bytes, max) = (config.bytes(), gpu.max_storage_bytes());
        if bytes > max {
            let what = "the projections of latents";
            return Err(
                Error::unsupported(what, format!("{bytes} bytes"), format!("{max} in a storage binding")).into()
            );
        }
        let programs =
            [Program::get(gpu, config.source(false)?).await?, Program::get(gpu, config.source(true)?).await?];
        let packer = Packer::new(format, in_features, LANES);
        let blocks = u64::from(num_heads) * u64::from(out_features.div_ceil(LANES));
        let buffer = |words: usize| {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
            let bytes = blocks * u64::from(LANES) * words as u64 * 4;
            gpu.create_buffer("creating a linear layer's weights", "folio head weights", bytes, usage)
        };
        let weights = buffer(packer.row_packs * 4)?;
        let scales = (packer.row_groups > 0).then(|| buffer(packer.row_groups)).transpose()?;
        let mut matrix = vec![0.0; out_features as usize * in_features as usize];
        let (mut packed, mut written) = (Packed::default(), [0_u64; 2]);
        for head in 0..num_heads {
            fill(head, &mut matrix)?;
            packer.pack(&matrix, &[], head.saturating_mul(out_features), &mut packed)?;
            let parts = [(Some(&weights), &mut packed.packs), (scales.as_ref(), &mut packed.scales)];
            for ((buffer, words), written) in parts.into_iter().zip(&mut written) {
                if let Some(buffer) = buffer {
                    let write = || gpu.queue().write_buffer(buffer, *written, bytemuck::cast_slice(words));
                    gpu.scoped_now("uploading weights", write)?;
                    *written += words.len() as u64 * 4;
                    kernels.uploaded(gpu, words.len() as u64 * 4)?;
                }
                words.clear();
            }
        }
        Ok(Self { gpu: gpu.clone(), config, weights, scales, rope: rope.cloned(), programs })
    }

    /// Shape and options.
    #[must_use]
    pub fn config(&self) -> HeadLinearConfig {
        self.config
    }

    /// Records it: one dispatch. `positions`, u32 `[rows]`, are there exactly if there is a rope.
    ///
    /// # Errors
    /// [`Error::Argument`] if x is not `[rows, num_heads * x_width]`, y not `[rows, num_heads * y_width]`, there is no row, `positions` are missing,
    /// too much, or not one u32 per row, or y is in the buffer of either; [`Error::Unsupported`] if there are too many rows.
    pub fn record<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        x: Rows<'_>,
        y: Rows<'_>,
        positions: Option<BufferRef<'_>>,
    ) -> Result<()> {
        let (gpu, config) = (&self.gpu, &self.config);
        x.check(gpu, "x", x.rows, config.num_heads.saturating_mul(config.x_width()))?;
        y.check(gpu, "y", x.rows, config.num_heads.saturating_mul(config.y_width()))?;
        if positions.is_some() != self.rope.is_some() {
            let (got, need) =
                if positions.is_some() { ("some", "none, without a rope") } else { ("none", "one per row") };
            return Err(Error::argument("positions", got, need));
        }
        let positions = positions.map(|list| list.check(gpu, "positions", x.rows.into(), false)).transpose()?;
        if y.buffer == x.buffer || positions.as_ref().is_some_and(|list| y.buffer == list.buffer()) {
            return Err(Error::argument("y", "the buffer of an input", "another buffer"));
        }
        let [one, many] = &self.programs;
        let (program, rows) = if x.rows == 1 { (one, 1) } else { (many, TILE_ROWS) };
        let mut resources = vec![self.weights.as_entire_binding(), x.binding(), y.binding()];
        resources.extend(self.scales.as_ref().map(wgpu::Buffer::as_entire_binding));
        resources.extend(positions.as_ref().map(BufferRef::binding));
        resources.extend(self.rope.as_ref().map(|rope| rope.table.as_entire_binding()));
        let parts = config.out_features.div_ceil(LANES) + u32::from(self.rope.is_some());
        let tiles = x.rows.div_ceil(rows);
        let width = parts.saturating_mul(tiles.div_ceil(MAX_GRID));
        if width > MAX_GRID {
            return Err(Error::unsupported("rows of a linear layer", x.rows, "fewer; use smaller steps"));
        }
        let grid = [width, tiles.min(MAX_GRID), config.num_heads];
        program.record(gpu, recorder.into(), resources, grid)
    }
}

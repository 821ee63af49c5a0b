//! The kernels of the linear layers: which there are, which one suits a number of rows, and their pipelines.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::context;

use super::linear::LinearConfig;
use super::ops::ActivationKind;
use super::quantise::WeightFormat;
use crate::gpu::Program;
use crate::kernel::{Access, Binding, Profile, ShaderFeatures, Source, Target, region_context, render};
use crate::layout::Region;
use crate::{Error, Gpu, Result};

/// A kernel of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinearKernel {
    /// Each weight is read once for this many rows of x: 1, 2, 4, 8, and 16 on CPU adapters, which take it for many rows, too.
    Rows(u32),
    /// Many rows of x, on GPUs: tiles of 64 rows and 64 columns.
    Matmul,
    /// Moves x to a texture, on CPU adapters, before kernels that read it from there.
    Stage,
    /// Rows of W as f32: the embedding.
    Gather,
}

/// Rows of x up to which the GPU's kernel for few rows is taken. Two tiles of 8 rows still read W twice at most and from the cache at best; a tile of
/// [`LinearKernel::Matmul`] does the arithmetic of 64 rows however few there are.
const MAX_GPU_MATVEC_ROWS: u32 = 16;

impl LinearKernel {
    /// The kernel that multiplies a number of rows.
    ///
    /// On CPU adapters, measured on llvmpipe with the F16 weights of a Llama of hidden size 768, as multiples of the time that one row takes: 2 rows 1.26, 4
    /// rows 1.37, 8 rows 1.8, 16 rows 3.1. One row streams W at 3.2 times the rate of a plain loop of `vec4<u64>` storage loads, and many rows compute at
    /// 0.57 of the rate of a plain loop of multiply-adds. The choice for GPUs is derived, not measured.
    #[must_use]
    pub fn for_rows(profile: Profile, rows: u32) -> Self {
        match profile {
            Profile::Gpu if rows > MAX_GPU_MATVEC_ROWS => Self::Matmul,
            Profile::Gpu => Self::Rows(rows.clamp(1, 8).next_power_of_two()),
            // 16 rows take 7/4 the time of 8, so three tiles of 8 are better than two of 16.
            Profile::Cpu if rows > 16 && 7 * rows.div_ceil(16) > 4 * rows.div_ceil(8) => Self::Rows(8),
            Profile::Cpu => Self::Rows(rows.clamp(1, 16).next_power_of_two()),
        }
    }

    /// The kernels that multiply.
    #[must_use]
    pub fn multipliers(profile: Profile) -> &'static [Self] {
        match profile {
            Profile::Cpu => &[Self::Rows(1), Self::Rows(2), Self::Rows(4), Self::Rows(8), Self::Rows(16)],
            Profile::Gpu => &[Self::Rows(1), Self::Rows(2), Self::Rows(4), Self::Rows(8), Self::Matmul],
        }
    }
}

/// Every compile-time choice of a kernel. Equal variants are the same pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearVariant {
    /// The kernel.
    pub kernel: LinearKernel,
    /// What the adapter offers.
    pub target: Target,
    /// How W is stored.
    pub format: WeightFormat,
    /// Applied to the result.
    pub activation: Option<ActivationKind>,
    /// Whether a bias is added.
    pub bias: bool,
    /// Whether every other row of W is a gate.
    pub gated: bool,
    /// Widths of the regions of y.
    pub regions: Option<[u32; 3]>,
    /// Whether x is normalised.
    pub norm: bool,
    /// Whether rows of x start at a multiple of what the kernel loads at once: 4 inputs on GPUs, 8 on CPU adapters.
    pub in_aligned: bool,
    /// Whether rows of y start at a multiple of what the kernel for many rows stores at once: 4 outputs, or 2 behind gates.
    pub out_aligned: bool,
}

/// Sizes of the CPU kernel.
struct CpuSizes {
    /// Blocks of columns.
    cols: u32,
    /// Inputs of an iteration.
    step: u32,
    /// f32 of x per load.
    unit: u32,
    /// Rows whose sums are in registers at a time.
    row_block: u32,
}

/// Rows of x from which the CPU kernel reads it from a texture. Moving it there takes a dispatch (some 20 us) and one more read of x, and saves most
/// of the time that each workgroup spends on loading x: texture loads are 6 times as fast per byte on llvmpipe.
const MIN_STAGED_ROWS: u32 = 4;

/// Subgroup sizes that the CPU kernel is written for; with any other one, lanes don't share.
const CPU_SUBGROUP_SIZES: [u32; 3] = [4, 8, 16];

/// Lanes of the CPU kernel if it can't use subgroups: what 256-bit vectors hold.
const CPU_LANES: u32 = 8;

/// Invocations of the GPU's kernel for few rows.
const MATVEC_SIZE: u32 = 64;

/// Columns of its workgroups.
const MATVEC_COLS: u32 = 4;

/// Tile of the GPU's kernel for many rows, both ways.
const MATMUL_TILE: u32 = 64;

/// Invocations of the gather kernel.
const GATHER_SIZE: u32 = 64;

impl LinearVariant {
    /// Every kernel of a layer on a device; those that multiply come first.
    #[must_use]
    pub fn of_layer(target: Target, config: &LinearConfig) -> Vec<Self> {
        let LinearConfig { in_features, out_features, format, activation, bias, gated, regions, norm, .. } = *config;
        let kernels = LinearKernel::multipliers(target.profile).iter().copied();
        let stage = (target.profile == Profile::Cpu).then_some(LinearKernel::Stage);
        let variant = |kernel| {
            let mut variant = Self {
                kernel,
                target,
                format,
                activation,
                bias,
                gated,
                regions,
                norm,
                in_aligned: in_features.is_multiple_of(if target.profile == Profile::Cpu { 8 } else { 4 }),
                out_aligned: out_features.is_multiple_of(if gated { 2 } else { 4 }),
            };
            variant.normalise();
            variant
        };
        kernels.chain([LinearKernel::Gather]).chain(stage).map(variant).collect()
    }

    /// Resets the fields that the kernel's text doesn't depend on.
    fn normalise(&mut self) {
        let target = &mut self.target;
        if target.profile == Profile::Cpu && !(target.subgroups && CPU_SUBGROUP_SIZES.contains(&target.subgroup_size)) {
            (target.subgroups, target.subgroup_size, target.int64) = (false, 0, false);
        }
        if target.profile == Profile::Gpu {
            (target.subgroup_size, target.int64) = (0, false);
        }
        match (self.kernel, target.profile) {
            (LinearKernel::Gather, _) => {
                (self.activation, self.bias, self.in_aligned, self.out_aligned) = (None, false, false, false);
                (self.gated, self.regions, self.norm) = (false, None, false);
                (target.subgroups, target.int64) = (false, false);
            }
            (LinearKernel::Stage, _) => {
                (self.activation, self.bias, self.out_aligned) = (None, false, false);
                (self.gated, self.regions) = (false, None);
                (self.format, target.subgroups) = (WeightFormat::F32, false);
            }
            (LinearKernel::Rows(_), _) => self.out_aligned = false,
            (LinearKernel::Matmul, _) => target.subgroups = false,
        }
        if self.staged() {
            // What moves x to the texture has normalised it.
            (self.in_aligned, self.target.int64, self.norm) = (false, false, false);
        }
        // Then f32 are loaded one by one.
        self.target.int64 &= self.in_aligned;
    }

    /// Whether the kernel reads x from a texture: see [`LinearKernel::Stage`].
    #[must_use]
    pub fn staged(&self) -> bool {
        let few = matches!(self.kernel, LinearKernel::Rows(rows) if rows < MIN_STAGED_ROWS && self.target.subgroups);
        self.target.profile == Profile::Cpu && matches!(self.kernel, LinearKernel::Rows(_)) && !few
    }

    /// Rows of W that are interleaved: the lanes of the CPU kernel.
    pub(crate) fn lanes(&self) -> u32 {
        match self.target.profile {
            Profile::Cpu if self.target.subgroup_size > 0 => self.target.subgroup_size,
            Profile::Cpu => CPU_LANES,
            Profile::Gpu => 1,
        }
    }

    fn cpu_sizes(&self) -> CpuSizes {
        let LinearKernel::Rows(rows) = self.kernel else {
            let unit = if self.target.int64 {
                8
            } else if self.in_aligned {
                4
            } else {
                1
            };
            return CpuSizes { cols: 0, step: 0, unit, row_block: 0 };
        };
        let quantised = self.format.group_size().is_some();
        let step = match rows {
            _ if quantised => 32,
            1 | 2 => 32,
            4 => 16,
            _ => 8,
        };
        let unit = match (self.in_aligned, self.target.int64) {
            _ if self.staged() => 4,
            (false, _) => 1,
            (true, true) if rows * step >= 64 => 8,
            (true, _) => 4,
        };
        let cols = if rows > 8 || (rows == 8 && (quantised || self.format == WeightFormat::F32)) { 4 } else { 8 };
        CpuSizes { cols, step, unit, row_block: rows.min(8 / cols).max(1) }
    }

    /// Rows and columns of y of a workgroup.
    pub(crate) fn tile(&self) -> (u32, u32) {
        let (rows, cols) = self.weight_tile();
        (rows, if self.gated { cols / 2 } else { cols })
    }

    /// Rows of x and of W of a workgroup.
    fn weight_tile(&self) -> (u32, u32) {
        match (self.kernel, self.target.profile) {
            (LinearKernel::Rows(rows), Profile::Cpu) => (rows, self.cpu_sizes().cols * self.lanes()),
            (LinearKernel::Rows(rows), Profile::Gpu) => (rows, MATVEC_COLS),
            (LinearKernel::Matmul, _) => (MATMUL_TILE, MATMUL_TILE),
            // Columns are packs.
            (LinearKernel::Gather, _) => (1, GATHER_SIZE),
            (LinearKernel::Stage, _) => (1, u32::MAX),
        }
    }

    /// The kernel, rendered.
    ///
    /// # Errors
    /// [`Error::Shader`] if the template is broken, which tests over all variants exclude.
    pub fn source(&self) -> Result<Source> {
        let cpu = self.target.profile == Profile::Cpu;
        let CpuSizes { cols: cpu_cols, step, unit, row_block } = self.cpu_sizes();
        let (rows, cols, workgroup_size, template) = match self.kernel {
            LinearKernel::Rows(rows) if cpu => (rows, cpu_cols, self.lanes(), "model/linear_cpu.wgsl"),
            LinearKernel::Rows(rows) => (rows, MATVEC_COLS, MATVEC_SIZE, "model/linear_matvec.wgsl"),
            LinearKernel::Matmul => (0, 0, 128, "model/linear_matmul.wgsl"),
            LinearKernel::Stage => (0, 0, self.lanes(), "model/linear_stage.wgsl"),
            LinearKernel::Gather => (0, 0, GATHER_SIZE, "model/linear_gather.wgsl"),
        };
        let values = context! {
            rows, cols, step, unit, row_block, workgroup_size,
            staged => self.staged(),
            lanes => self.lanes(),
            format => self.format.shader_name(),
            group_size => self.format.group_size(),
            activation => self.activation.map_or("none", ActivationKind::shader_name),
            bias => self.bias,
            gated => self.gated,
            regions => self.regions.map(|widths| Region::of(widths).map(region_context)),
            y_width => self.regions.map(|widths| Region::of(widths).iter().map(Region::padded_width).sum::<u32>()),
            norm => self.norm,
            aligned => self.in_aligned,
            out_aligned => self.out_aligned,
            textures => cpu,
            subgroups => self.target.subgroups,
            int64 => self.target.int64,
        };
        let text = render(template, values)?;
        let Target { subgroups, int64, .. } = self.target;
        let features = ShaderFeatures { subgroups, int64, ..ShaderFeatures::default() };
        let directive = if self.target.enable_directives && self.target.subgroups { "enable subgroups;\n" } else { "" };
        let weights = if cpu { Access::Texture } else { Access::Read };
        let x = if self.staged() { Access::Texture } else { Access::Read };
        let [input, output] = if self.kernel == LinearKernel::Gather { ["ids", "out"] } else { ["x", "y"] };
        let bindings = if self.kernel == LinearKernel::Stage {
            let mut bindings = vec![("staged", Access::TextureWrite), ("x", Access::Read), ("params", Access::Uniform)];
            bindings.extend(self.norm.then_some(("norm_weight", Access::Read)));
            bindings
        } else {
            let mut bindings = vec![("w", weights), (input, x), (output, Access::Write), ("params", Access::Uniform)];
            bindings.extend(self.format.group_size().map(|_| ("scales", weights)));
            bindings.extend(self.bias.then_some(("bias", Access::Read)));
            bindings.extend(self.norm.then_some(("norm_weight", Access::Read)));
            bindings
        };
        let bindings = bindings.into_iter().map(|(name, access)| Binding::new(name, access)).collect();
        let squares = u32::from(self.norm);
        let workgroup_bytes = match self.kernel {
            LinearKernel::Matmul => 2 * 272 * 16,
            LinearKernel::Rows(rows) if !cpu && self.target.subgroups => rows * (MATVEC_COLS + squares) * MATVEC_SIZE,
            LinearKernel::Rows(rows) if !cpu => {
                (rows * (MATVEC_COLS + squares) * (MATVEC_SIZE + 1)).next_multiple_of(4) * 4 + MATVEC_SIZE * 4
            }
            LinearKernel::Stage if self.norm => (self.lanes() * 4).next_multiple_of(16),
            _ => 0,
        };
        Ok(Source {
            entry_point: match self.kernel {
                LinearKernel::Gather => "linear_gather",
                LinearKernel::Stage => "linear_stage",
                LinearKernel::Rows(_) | LinearKernel::Matmul => "linear",
            },
            text: format!("{directive}{text}"),
            bindings,
            workgroup_size,
            workgroup_bytes,
            features,
        })
    }
}

/// A compiled kernel.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) variant: LinearVariant,
    pub(crate) program: Arc<Program>,
}

/// The pipelines of all linear layers of a device, each compiled once, whatever the number of layers that use it.
/// Cheap to clone; clones share everything.
#[derive(Clone, Debug, Default)]
pub struct LinearKernels(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    compiled: Mutex<HashMap<LinearVariant, Arc<Compiled>>>,
    /// Bytes that have been handed to the queue since the last submit.
    unsubmitted: AtomicU64,
    /// Where x is staged: one texture for all layers, as their dispatches follow one another. Texels, and a view of them.
    stage: Mutex<Option<(u64, wgpu::TextureView)>>,
}

/// Texels of a row of a texture; the shaders have its logarithm.
pub(crate) const TEXTURE_WIDTH: u32 = 2048;

/// A texture of the shaders' width.
pub(crate) fn create_texture(gpu: &Gpu, height: u32, usage: wgpu::TextureUsages) -> Result<wgpu::Texture> {
    let descriptor = wgpu::TextureDescriptor {
        label: Some("folio linear"),
        size: wgpu::Extent3d { width: TEXTURE_WIDTH, height, depth_or_array_layers: 1 },
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format: wgpu::TextureFormat::Rgba32Uint,
        usage,
        view_formats: &[],
    };
    gpu.scoped_now("creating a texture", || gpu.device().create_texture(&descriptor))
}

/// All of a texture.
pub(crate) fn create_view(gpu: &Gpu, texture: &wgpu::Texture) -> Result<wgpu::TextureView> {
    gpu.scoped_now("creating a texture", || texture.create_view(&wgpu::TextureViewDescriptor::default()))
}

/// wgpu keeps a copy of what is written to a queue until the next submit: so one is made after this many bytes.
const MAX_UNSUBMITTED: u64 = 64 << 20;

impl LinearKernels {
    /// No kernels yet; layers add what they need.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) async fn get(&self, gpu: &Gpu, variant: LinearVariant) -> Result<Arc<Compiled>> {
        let found = self.0.compiled.lock().unwrap_or_else(PoisonError::into_inner).get(&variant).cloned();
        if let Some(compiled) = found {
            return Ok(compiled);
        }
        let program = Program::get(gpu, variant.source()?).await?;
        let compiled = Arc::new(Compiled { variant, program });
        let mut all = self.0.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(all.entry(variant).or_insert(compiled).clone())
    }

    /// A texture of at least that many texels, as wide as the shaders think.
    pub(crate) fn stage(&self, gpu: &Gpu, texels: u64) -> Result<wgpu::TextureView> {
        let mut stage = self.0.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((size, view)) = &*stage
            && *size >= texels
        {
            return Ok(view.clone());
        }
        let max = gpu.limits().max_texture_dimension_2d;
        let height = texels.div_ceil(TEXTURE_WIDTH.into()).next_power_of_two();
        if height > max.into() {
            let (need, have) = (format!("{texels} texels"), format!("{TEXTURE_WIDTH} x {max}"));
            return Err(Error::unsupported("rows of a linear layer", need, have).with_hint("use smaller steps"));
        }
        let usage = wgpu::TextureUsages::TEXTURE_BINDING | wgpu::TextureUsages::STORAGE_BINDING;
        let texture = create_texture(gpu, height as u32, usage)?;
        let view = create_view(gpu, &texture)?;
        *stage = Some((height * u64::from(TEXTURE_WIDTH), view.clone()));
        Ok(view)
    }

    /// Counts bytes that were written to the queue, and from time to time submits and waits, so that wgpu gives its copies back.
    pub(crate) fn uploaded(&self, gpu: &Gpu, bytes: u64) -> Result<()> {
        if self.0.unsubmitted.fetch_add(bytes, Ordering::Relaxed) + bytes < MAX_UNSUBMITTED {
            return Ok(());
        }
        self.0.unsubmitted.store(0, Ordering::Relaxed);
        gpu.scoped_now("uploading weights", || gpu.queue().submit([]))?;
        #[cfg(not(target_arch = "wasm32"))]
        gpu.device()
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|error| Error::wgpu("uploading weights", error))?;
        Ok(())
    }
}

//! The kernels of the linear layers: which there are, which one suits a number of rows, and their text.

use minijinja::context;

use super::linear_config::{Factor, LinearConfig};
use super::linear_sizes::{MATRIX_BLOCK, MATRIX_INPUTS};
use super::ops::ActivationKind;
use super::quantise::WeightFormat;
use crate::Result;
use crate::kernel::tuning::{LinearSizes, LinearThresholds};
use crate::kernel::{Access, Binding, MatrixSize, Profile, ShaderFeatures, Source, Target, region_context, render};
use crate::layout::Region;

/// A kernel of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinearKernel {
    /// Each weight is read once for this many rows of x: 1, 2, 4, 8, and 16 on CPU adapters, which take it for many rows, too.
    Rows(u32),
    /// Many rows of x, on GPUs: tiles of 64 rows and 64 columns. With [`Target::matrix`] products are of halves.
    Matmul,
    /// Moves x to a texture, on CPU adapters, before kernels that read it from there.
    Stage,
    /// Rows of W as f32: the embedding.
    Gather,
}

impl LinearKernel {
    /// The kernel that multiplies a number of rows.
    ///
    /// On CPU adapters, measured on llvmpipe with the F16 weights of a Llama of hidden size 768, as multiples of the time that one row takes: 2 rows 1.26, 4
    /// rows 1.37, 8 rows 1.8, 16 rows 3.1. One row streams W at 3.2 times the rate of a plain loop of `vec4<u64>` storage loads, and many rows compute at
    /// 0.57 of the rate of a plain loop of multiply-adds. The choice for GPUs is derived, not measured.
    #[must_use]
    pub fn for_rows(profile: Profile, rows: u32, thresholds: LinearThresholds) -> Self {
        let LinearThresholds { matvec_rows, wide_quarters } = thresholds;
        let [wide_tiles, tiles] = [16, 8].map(|tile| u64::from(rows.div_ceil(tile)));
        match profile {
            Profile::Gpu if rows > matvec_rows => Self::Matmul,
            Profile::Gpu => Self::Rows(rows.clamp(1, 8).next_power_of_two()),
            // By default three tiles of 8 are better than two of 16.
            Profile::Cpu if rows > 16 && u64::from(wide_quarters) * wide_tiles > 4 * tiles => Self::Rows(8),
            Profile::Cpu => Self::Rows(rows.clamp(1, 16).next_power_of_two()),
        }
    }

    /// The kernel that multiplies a number of rows if their bits may not depend on it: one of those that add in the same order.
    ///
    /// On CPU adapters a lane adds up a column by itself, in the order of the inputs, where x comes from a texture: from 4 rows on. On GPUs lanes
    /// share the inputs of a column, in the same way for any number of rows if their sums meet by subgroups, and by that number if not.
    #[must_use]
    pub fn exact_for_rows(target: Target, rows: u32) -> Self {
        match target.profile {
            Profile::Cpu => Self::for_rows(Profile::Cpu, rows.max(4), LinearThresholds::default()),
            Profile::Gpu if target.subgroups => Self::Rows(rows.clamp(1, 8).next_power_of_two()),
            Profile::Gpu => Self::Rows(8),
        }
    }

    /// Whether [`LinearKernel::exact_for_rows`] may choose this kernel.
    fn is_exact(self, target: Target) -> bool {
        let rows = if let Self::Rows(rows) = self { rows } else { return false };
        match target.profile {
            Profile::Cpu => rows >= 4,
            Profile::Gpu => target.subgroups || rows == 8,
        }
    }

    /// The kernel for experts, by the rows that each gets if all get the same: the fewer rows a tile has, the fewer of them are empty, and the more
    /// often weights are read that many rows go to.
    #[must_use]
    pub fn for_expert_rows(target: Target, exact: bool, rows: u32) -> Self {
        match target.profile {
            _ if exact && target.profile == Profile::Cpu => Self::Rows(rows.clamp(4, 16).next_power_of_two()),
            _ if exact => Self::exact_for_rows(target, rows),
            // Two tiles of 8 read weights twice, and one of 64 computes 48 rows for nothing: about the same up to a half of it.
            Profile::Gpu if rows >= 32 => Self::Matmul,
            Profile::Gpu => Self::Rows(rows.clamp(1, 8).next_power_of_two()),
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
    /// What caps y.
    pub softcap: Option<Factor>,
    /// What multiplies rows of W, as the embedding.
    pub gather_scale: Option<Factor>,
    /// Whether x is normalised.
    pub norm: bool,
    /// Whether rows of x start at a multiple of what the kernel loads at once: 4 inputs on GPUs, 8 on CPU adapters.
    pub in_aligned: bool,
    /// Whether rows of y start at a multiple of what the kernel for many rows stores at once: 4 outputs, or 2 behind gates.
    pub out_aligned: bool,
    /// To how many experts a row of x goes, if there are several layers.
    pub experts_per_row: Option<u32>,
    /// What may be chosen freely.
    pub sizes: LinearSizes,
}

/// Rows of x from which the CPU kernel reads it from a texture. Moving it there takes a dispatch (some 20 us) and one more read of x, and saves most
/// of the time that each workgroup spends on loading x: texture loads are 6 times as fast per byte on llvmpipe.
const MIN_STAGED_ROWS: u32 = 4;

/// Subgroup sizes that the CPU kernel is written for; with any other one, lanes don't share.
const CPU_SUBGROUP_SIZES: [u32; 3] = [4, 8, 16];

/// Lanes of the CPU kernel if it can't use subgroups: what 256-bit vectors hold.
const CPU_LANES: u32 = 8;

/// Rows that pass through workgroup memory at a time on their way from matrices to y.
const MATRIX_SLAB: u32 = 16;

/// Elements that a row in workgroup memory has beyond its own. With halves 16 bytes more than a multiple of 32, eight neighbouring rows lie on
/// different banks, and rows stay aligned to 16 bytes, which matrix loads demand.
const HALVES_PADDING: u32 = 8;
const SUMS_PADDING: u32 = 4;

impl LinearVariant {
    /// Every kernel of a layer on a device; those that multiply come first.
    #[must_use]
    pub fn of_layer(target: Target, config: &LinearConfig) -> Vec<Self> {
        let LinearConfig { in_features, out_features, format, activation, softcap, gather_scale, .. } = *config;
        let LinearConfig { bias, gated, regions, norm, exact, experts, .. } = *config;
        let kernels = LinearKernel::multipliers(target.profile).iter().copied();
        let kernels = kernels.filter(|kernel| !exact || kernel.is_exact(target));
        let stage = (target.profile == Profile::Cpu).then_some(LinearKernel::Stage);
        let variant = |kernel| {
            let mut variant = Self {
                kernel,
                target,
                format,
                activation,
                softcap,
                gather_scale,
                bias,
                gated,
                regions,
                norm,
                in_aligned: in_features.is_multiple_of(if target.profile == Profile::Cpu { 8 } else { 4 }),
                out_aligned: out_features.is_multiple_of(if gated { 2 } else { 4 }),
                experts_per_row: experts.map(|experts| experts.per_row),
                sizes: LinearSizes { workgroup_size: 0, rows: 0, cols: 0, inputs: 0 },
            };
            variant.normalise();
            variant
        };
        // Experts are no embedding.
        let gather = experts.is_none().then_some(LinearKernel::Gather);
        kernels.chain(gather).chain(stage).map(variant).collect()
    }

    /// Resets the fields that the kernel's text doesn't depend on.
    fn normalise(&mut self) {
        let target = &mut self.target;
        target.packed_dots = false;
        if target.profile == Profile::Cpu && !(target.subgroups && CPU_SUBGROUP_SIZES.contains(&target.subgroup_size)) {
            (target.subgroups, target.subgroup_size, target.int64) = (false, 0, false);
        }
        // (Which expert a workgroup has is read from memory: for naga that is no uniform control flow, which matrix units need.)
        let is_routed = self.experts_per_row.is_some();
        if self.kernel != LinearKernel::Matmul || target.profile == Profile::Cpu || !target.subgroups || is_routed {
            target.matrix = None;
        }
        self.sizes = self.default_sizes();
        let target = &mut self.target;
        if target.profile == Profile::Gpu {
            (target.subgroup_size, target.int64) = (0, false);
        }
        match (self.kernel, target.profile) {
            (LinearKernel::Gather, _) => {
                (self.activation, self.bias, self.in_aligned, self.out_aligned) = (None, false, false, false);
                self.softcap = None;
                (self.gated, self.regions, self.norm) = (false, None, false);
                (target.subgroups, target.int64) = (false, false);
            }
            (LinearKernel::Stage, _) => {
                (self.activation, self.bias, self.out_aligned) = (None, false, false);
                self.softcap = None;
                (self.gated, self.regions, self.experts_per_row) = (false, None, None);
                (self.format, target.subgroups) = (WeightFormat::F32, false);
            }
            (LinearKernel::Rows(_), _) => self.out_aligned = false,
            (LinearKernel::Matmul, _) => target.subgroups = target.matrix.is_some(),
        }
        if self.kernel != LinearKernel::Gather {
            self.gather_scale = None;
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

    /// f32 of x per load of the kernels for CPU adapters.
    fn cpu_unit(&self) -> u32 {
        let LinearSizes { rows, inputs, .. } = self.sizes;
        let takes_rows = matches!(self.kernel, LinearKernel::Rows(_));
        match (self.in_aligned, self.target.int64) {
            _ if self.staged() => 4,
            (false, _) => 1,
            (true, true) if !takes_rows || rows * inputs >= 64 => 8,
            (true, _) => 4,
        }
    }

    /// Rows and columns of y of a workgroup.
    pub(crate) fn tile(&self) -> (u32, u32) {
        let (rows, cols) = self.weight_tile();
        (rows, if self.gated { cols / 2 } else { cols })
    }

    /// Rows of x and of W of a workgroup.
    fn weight_tile(&self) -> (u32, u32) {
        let LinearSizes { rows, cols, .. } = self.sizes;
        match (self.kernel, self.target.profile) {
            (LinearKernel::Rows(_), Profile::Cpu) => (rows, cols * self.lanes()),
            // Columns of the gather kernel are packs.
            (LinearKernel::Rows(_) | LinearKernel::Matmul | LinearKernel::Gather, _) => (rows, cols),
            (LinearKernel::Stage, _) => (1, u32::MAX),
        }
    }

    /// Bytes of workgroup memory that the text declares.
    pub(super) fn workgroup_bytes(&self) -> u32 {
        let LinearSizes { workgroup_size, rows, cols, inputs } = self.sizes;
        let squares = u32::from(self.norm);
        match self.kernel {
            LinearKernel::Matmul if self.target.matrix.is_some() => {
                let halves = (rows + cols) * (MATRIX_INPUTS + HALVES_PADDING);
                let sums = MATRIX_SLAB * (cols + SUMS_PADDING);
                // Largest elements, factors of the norm, and a flag.
                halves * 2 + (sums + rows + self.scaled_columns() + squares * rows + 4) * 4
            }
            LinearKernel::Matmul => inputs * (rows / 4 + 1 + cols / 4 + 1) * 16,
            LinearKernel::Rows(_) if self.target.profile == Profile::Cpu => 0,
            LinearKernel::Rows(_) if self.target.subgroups => rows * (cols + squares) * workgroup_size,
            LinearKernel::Rows(_) => {
                (rows * (cols + squares) * (workgroup_size + 1)).next_multiple_of(4) * 4 + workgroup_size * 4
            }
            LinearKernel::Stage if self.norm => (self.lanes() * 4).next_multiple_of(16),
            LinearKernel::Stage | LinearKernel::Gather => 0,
        }
    }

    /// Columns whose weights are scaled on their way to matrices: all, unless they are halves already.
    fn scaled_columns(&self) -> u32 {
        if self.format == WeightFormat::F16 { 0 } else { self.sizes.cols }
    }

    /// The kernel, rendered.
    ///
    /// # Errors
    /// [`Error::Shader`](crate::Error::Shader) if the template is broken, which tests over all variants exclude.
    pub fn source(&self) -> Result<Source> {
        let cpu = self.target.profile == Profile::Cpu;
        let LinearSizes { workgroup_size, rows, cols, inputs } = self.sizes;
        let matrix = self.target.matrix;
        let template = match self.kernel {
            LinearKernel::Rows(_) if cpu => "model/linear_cpu.wgsl",
            LinearKernel::Rows(_) => "model/linear_matvec.wgsl",
            LinearKernel::Matmul if matrix.is_some() => "model/linear_matmul_matrix.wgsl",
            LinearKernel::Matmul => "model/linear_matmul.wgsl",
            LinearKernel::Stage => "model/linear_stage.wgsl",
            LinearKernel::Gather => "model/linear_gather.wgsl",
        };
        let values = context! {
            rows, cols, workgroup_size,
            step => inputs,
            unit => self.cpu_unit(),
            // So many rows at a time that some 8 sums are in registers.
            row_block => rows.min(8 / cols.max(1)).max(1),
            matrix => matrix.map_or(0, MatrixSize::rows),
            block => MATRIX_BLOCK,
            slab => MATRIX_SLAB,
            half_row => MATRIX_INPUTS + HALVES_PADDING,
            sum_row => cols + SUMS_PADDING,
            staged => self.staged(),
            lanes => self.lanes(),
            format => self.format.shader_name(),
            group_size => self.format.group_size(),
            activation => if self.softcap.is_some() { "softcap" } else { self.activation.map_or("none", ActivationKind::shader_name) },
            settings => self.activation.map(ActivationKind::context),
            softcap => self.softcap.map(Factor::literal),
            gather_scale => self.gather_scale.map(Factor::literal),
            bias => self.bias,
            gated => self.gated,
            regions => self.regions.map(|widths| Region::of(widths).map(region_context)),
            y_width => self.regions.map(|widths| Region::of(widths).iter().map(Region::padded_width).sum::<u32>()),
            norm => self.norm,
            experts => self.experts_per_row.is_some(),
            per_row => self.experts_per_row,
            aligned => self.in_aligned,
            out_aligned => self.out_aligned,
            textures => cpu,
            subgroups => self.target.subgroups,
            int64 => self.target.int64,
        };
        let text = render(template, values)?;
        let Target { subgroups, int64, .. } = self.target;
        let features = ShaderFeatures { subgroups, int64, matrix: matrix.is_some(), packed_dots: false };
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
            bindings.extend(self.experts_per_row.map(|_| ("routes", Access::Read)));
            bindings
        };
        let bindings = bindings.into_iter().map(|(name, access)| Binding::new(name, access)).collect();
        Ok(Source {
            entry_point: match self.kernel {
                LinearKernel::Gather => "linear_gather",
                LinearKernel::Stage => "linear_stage",
                LinearKernel::Rows(_) | LinearKernel::Matmul => "linear",
            },
            text: format!("{directive}{text}"),
            bindings,
            workgroup_size,
            workgroup_bytes: self.workgroup_bytes(),
            features,
        })
    }
}

//! What kernels must know of an adapter, as plain data.

/// Which family of kernels runs. Chosen from the adapter unless the caller forces one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Profile {
    /// Cooperative tiles of 64 to 256 invocations, for GPUs.
    Gpu,
    /// One subgroup per workgroup and long private loops, for adapters that run shaders on CPU cores (lavapipe,
    /// SwiftShader, WARP), where barriers and workgroup memory cost far more than arithmetic.
    Cpu,
}

/// What kind of adapter it is, as far as the number of workgroups that keep it busy depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdapterClass {
    /// A GPU with memory of its own: some hundred compute units.
    Discrete,
    /// Any other GPU.
    Integrated,
    /// CPU cores.
    Cpu,
}

/// Who made the adapter, as far as the default sizes depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Vendor {
    /// AMD's GPUs.
    Amd,
    /// Apple's GPUs.
    Apple,
    /// NVIDIA's GPUs.
    Nvidia,
    /// Intel's GPUs: 128 registers of 32 bytes a thread, so that kernels with large tiles spill.
    Intel,
    /// All others, and browsers, which don't say.
    #[default]
    Other,
}

/// Rows and columns of the square matrices that an adapter's matrix units multiply: halves, summed up in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MatrixSize {
    /// Apple, lavapipe.
    Eight,
    /// NVIDIA, AMD.
    Sixteen,
}

impl MatrixSize {
    /// Rows of a matrix, which has as many columns.
    #[must_use]
    pub const fn rows(self) -> u32 {
        match self {
            Self::Eight => 8,
            Self::Sixteen => 16,
        }
    }
}

/// What the adapter offers to the shader compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The kernel family.
    pub profile: Profile,
    /// Whose adapter it is.
    pub vendor: Vendor,
    /// Subgroup operations.
    pub subgroups: bool,
    /// The size of every subgroup, or 0 if it varies or there are none.
    pub subgroup_size: u32,
    /// 64-bit integers.
    pub int64: bool,
    /// The matrices that kernels may use, if any: where they do, products are of halves.
    pub matrix: Option<MatrixSize>,
    /// Whether decode over codes may quantise queries, to multiply them by packed integer dot products.
    pub packed_dots: bool,
    /// Whether the text must say `enable subgroups;`: browsers demand it, naga refuses it.
    pub enable_directives: bool,
}

/// Features beyond WebGPU's defaults that a shader's text needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ShaderFeatures {
    /// Subgroup operations: wgpu's `SUBGROUP`.
    pub subgroups: bool,
    /// 64-bit integers: wgpu's `SHADER_INT64`.
    pub int64: bool,
    /// Matrix units, and halves to feed them: wgpu's `EXPERIMENTAL_COOPERATIVE_MATRIX` and `SHADER_F16`.
    pub matrix: bool,
    /// WGSL's language feature `packed_4x8_integer_dot_product`. It is no feature of a device: natively naga always has it, and writes plain integer
    /// arithmetic for those without such instructions; on the web it is the browser's (`wgpu::Instance::wgsl_language_features`).
    pub packed_dots: bool,
}

/// A kernel before it is compiled: text and interface. Only this crate makes them; to read, print, validate, or compile elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    pub(crate) entry_point: &'static str,
    pub(crate) text: String,
    pub(crate) bindings: Vec<super::Binding>,
    pub(crate) workgroup_size: u32,
    pub(crate) workgroup_bytes: u32,
    pub(crate) features: ShaderFeatures,
}

impl Source {
    /// What the kernel is called in errors and traces; also its entry point.
    #[must_use]
    pub fn entry_point(&self) -> &'static str {
        self.entry_point
    }

    /// WGSL.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Group 0, in order.
    #[must_use]
    pub fn bindings(&self) -> &[super::Binding] {
        &self.bindings
    }

    /// Invocations per workgroup.
    #[must_use]
    pub fn workgroup_size(&self) -> u32 {
        self.workgroup_size
    }

    /// Bytes of workgroup memory that the text declares, each variable in whole 16 bytes.
    #[must_use]
    pub fn workgroup_bytes(&self) -> u32 {
        self.workgroup_bytes
    }

    /// Features that the text needs.
    #[must_use]
    pub fn features(&self) -> ShaderFeatures {
        self.features
    }
}

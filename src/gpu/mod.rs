//! The compute layer: a device, its buffers, uploads, readback, recording, and compiled kernels.

mod limits;
#[cfg(feature = "open")]
mod open;
mod program;
mod readback;
mod record;
mod scope;
mod tables;
mod upload;

pub use limits::{matrix_features, required_limits, useful_features};
#[cfg(feature = "open")]
pub use open::GpuOptions;
pub(crate) use program::{Program, VariantProgram};
pub(crate) use readback::Readback;
pub use record::{BufferRef, Recorder};
pub(crate) use record::{Dispatch, Prepared, params_binding};
pub(crate) use upload::{Lease, Upload};

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::error::{Error, Result};
use crate::kernel::tuning::{TunedFor, Tuning};
use crate::kernel::{AdapterClass, MatrixSize, Profile, Target, Variant, Vendor};
use limits::{MATRIX_FEATURES, check_limits};

/// The profile that suits an adapter.
///
/// CPU adapters are known by their device type; the GL twin of llvmpipe reports another type, hence the names.
fn profile_of(info: &wgpu::AdapterInfo) -> Profile {
    if is_cpu_adapter(info) { Profile::Cpu } else { Profile::Gpu }
}

fn is_cpu_adapter(info: &wgpu::AdapterInfo) -> bool {
    let name = info.name.to_lowercase();
    info.device_type == wgpu::DeviceType::Cpu
        || ["llvmpipe", "swiftshader", "basic render"].iter().any(|cpu| name.contains(cpu))
}

/// By the PCI vendor id; Metal says none, and has the maker in the adapter's name.
fn vendor_of(info: &wgpu::AdapterInfo) -> Vendor {
    match info.vendor {
        0x1002 => Vendor::Amd,
        0x106b => Vendor::Apple,
        0x10de => Vendor::Nvidia,
        0x8086 => Vendor::Intel,
        0 if info.name.starts_with("Apple ") => Vendor::Apple,
        _ => Vendor::Other,
    }
}

/// Whether wgpu adds bounds checks and loop guards to folio's shaders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ShaderChecks {
    /// wgpu's checks stay in.
    Full,
    /// wgpu's checks are left out. folio's own validation on the host, and the clamps in its kernels, take their place.
    /// On GPUs they nearly triple the size of the prefill kernel and keep loops from being unrolled. On the web this
    /// has no effect: the browser keeps its checks.
    #[default]
    Trusted,
}

struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    features: wgpu::Features,
    limits: wgpu::Limits,
    profile: Profile,
    shader_checks: ShaderChecks,
    uploads: upload::UploadPool,
    programs: program::Programs,
    #[cfg(feature = "counters")]
    num_dispatches: std::sync::atomic::AtomicU64,
    /// Whether the device is known to be lost.
    lost: AtomicBool,
    #[cfg(not(target_arch = "wasm32"))]
    start: std::time::Instant,
    /// When a recording call last asked whether the device is there, in microseconds since `start`.
    #[cfg(not(target_arch = "wasm32"))]
    last_probe: std::sync::atomic::AtomicU64,
}

/// A wgpu device and queue with what folio needs checked. Cheap to clone.
///
/// Clones share everything but what [`Gpu::with_tuning`], [`Gpu::with_matrix_units`], [`Gpu::with_rounded_f32`] and
/// [`Gpu::with_packed_dots`] change.
///
/// folio never submits, polls, or spawns a thread unless a method's documentation says so. Each kernel is compiled once per device and kept
/// for as long as a clone of this is alive. If the device is lost (destroyed, removed, given up by its driver), every call that needs it
/// returns [`Error::DeviceLost`](crate::Error::DeviceLost), from any thread, and has changed nothing.
#[derive(Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
    tuning: Option<Arc<Tuning>>,
    matrix_size: Option<MatrixSize>,
    rounds_f32: bool,
    packed_dots: bool,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu")
            .field("adapter", &self.inner.info.name)
            .field("backend", &self.inner.info.backend)
            .field("profile", &self.inner.profile)
            .field("shader_checks", &self.inner.shader_checks)
            .field("matrix_size", &self.matrix_size)
            .field("packed_dots", &self.packed_dots)
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// Takes a host's own device and queue, with the kernel profile that suits the adapter and
    /// [`ShaderChecks::default`]. wgpu handles are reference counted: pass clones. The queue must be the device's own; wgpu has no way to ask.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported), with need and have, if the device was requested with limits below WebGPU's defaults;
    /// [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub fn from_parts(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        let profile = profile_of(&device.adapter_info());
        Self::from_parts_with(device, queue, profile, ShaderChecks::default())
    }

    /// [`Gpu::from_parts`] with the kernel profile and the shader checks chosen by the caller.
    ///
    /// # Errors
    /// Those of [`Gpu::from_parts`].
    pub fn from_parts_with(
        device: wgpu::Device,
        queue: wgpu::Queue,
        profile: Profile,
        shader_checks: ShaderChecks,
    ) -> Result<Self> {
        let limits = device.limits();
        check_limits(&limits)?;
        let inner = Inner {
            info: device.adapter_info(),
            features: device.features(),
            limits,
            profile,
            shader_checks,
            uploads: upload::UploadPool::default(),
            programs: program::Programs::default(),
            #[cfg(feature = "counters")]
            num_dispatches: Default::default(),
            lost: AtomicBool::new(false),
            #[cfg(not(target_arch = "wasm32"))]
            start: std::time::Instant::now(),
            #[cfg(not(target_arch = "wasm32"))]
            last_probe: Default::default(),
            device,
            queue,
        };
        let inner = Arc::new(inner);
        let gpu = Self { inner, tuning: None, matrix_size: None, rounds_f32: false, packed_dots: false };
        gpu.check_alive("taking a device over")?;
        Ok(gpu)
    }

    /// The wgpu device.
    #[must_use]
    pub fn device(&self) -> &wgpu::Device {
        &self.inner.device
    }

    /// The wgpu queue.
    #[must_use]
    pub fn queue(&self) -> &wgpu::Queue {
        &self.inner.queue
    }

    /// The adapter's name, backend, driver and type.
    #[must_use]
    pub fn adapter_info(&self) -> &wgpu::AdapterInfo {
        &self.inner.info
    }

    /// The features that the device was opened with.
    #[must_use]
    pub fn features(&self) -> wgpu::Features {
        self.inner.features
    }

    /// The limits that the device was opened with.
    #[must_use]
    pub fn limits(&self) -> &wgpu::Limits {
        &self.inner.limits
    }

    /// The kernel family in use.
    #[must_use]
    pub fn profile(&self) -> Profile {
        self.inner.profile
    }

    /// Whether wgpu's shader checks are in.
    #[must_use]
    pub fn shader_checks(&self) -> ShaderChecks {
        self.inner.shader_checks
    }

    /// The subgroup size if every subgroup of this adapter has the same one and the device can use subgroups.
    #[must_use]
    pub fn subgroup_size(&self) -> Option<u32> {
        let info = &self.inner.info;
        (self.has_subgroups() && info.subgroup_min_size == info.subgroup_max_size).then_some(info.subgroup_min_size)
    }

    /// Whether the device can use subgroup operations.
    #[must_use]
    pub fn has_subgroups(&self) -> bool {
        self.inner.features.contains(wgpu::Features::SUBGROUP)
    }

    /// How many kernels have been compiled on the device so far: pipelines, which equal caches, attentions and linear layers share. What a model needs is
    /// the difference between before it is loaded and after its decoder is warmed up.
    #[must_use]
    pub fn num_compiled(&self) -> u64 {
        self.inner.programs.num_compiled()
    }

    /// How many dispatches folio has recorded so far, into whatever encoders.
    #[cfg(feature = "counters")]
    #[must_use]
    pub fn num_dispatches(&self) -> u64 {
        self.inner.num_dispatches.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// What kernels are written for on this device.
    #[must_use]
    pub fn target(&self) -> Target {
        Target {
            profile: self.profile(),
            vendor: vendor_of(&self.inner.info),
            subgroups: self.has_subgroups(),
            subgroup_size: self.subgroup_size().unwrap_or(0),
            int64: self.features().contains(wgpu::Features::SHADER_INT64),
            matrix: self.matrix_size(),
            packed_dots: self.packed_dots,
            enable_directives: self.adapter_info().backend == wgpu::Backend::BrowserWebGpu,
        }
    }

    /// The same device with matrix units in use, where kernels have a form for them: prefill over caches without an F32 side, and the model's linear
    /// layers with many rows, of F32 weights only with [`Gpu::with_rounded_f32`]. Products are of halves then, summed up in f32. What that costs prefill
    /// [`with_f16_products`](crate::reference::ErrorModel::with_f16_products) bounds; a sum `x . w` of a linear layer errs by up to `2^-9 * |x| . |w|`
    /// more, and by `2^-17` of the largest element of x times `sum |w|`, and the other way round.
    ///
    /// `adapter` is what [`wgpu::Adapter::cooperative_matrix_properties`] says of the device's own adapter, which wgpu has no way to ask the device
    /// for. Without a size that folio has kernels for (8 or 16 in all three dimensions, of halves summed up in f32) nothing changes.
    /// A kernel takes up to 32 KiB of workgroup memory: with a lower limit the one without matrix units stays in use.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the device was opened without [`matrix_features`](crate::matrix_features).
    pub fn with_matrix_units(&self, adapter: &[wgpu::CooperativeMatrixProperties]) -> Result<Self> {
        let missing = MATRIX_FEATURES - self.features();
        if !missing.is_empty() {
            return Err(Error::unsupported("features", format!("{missing:?}"), format!("{:?}", self.features())));
        }
        Ok(Self { matrix_size: limits::matrix_size(adapter), ..self.clone() })
    }

    /// The same device with or without leave to round F32 weights of linear layers to halves where matrix units
    /// multiply them. Without it, as by default, what is stored in f32 is multiplied in f32. Without matrix units nothing changes.
    #[must_use]
    pub fn with_rounded_f32(&self, rounds_f32: bool) -> Self {
        Self { rounds_f32, ..self.clone() }
    }

    /// Whether matrix units may round what is stored in f32; see [`Gpu::with_rounded_f32`].
    #[must_use]
    pub fn rounds_f32(&self) -> bool {
        self.rounds_f32
    }

    /// The matrices that kernels use, if any.
    #[must_use]
    pub fn matrix_size(&self) -> Option<MatrixSize> {
        self.matrix_size
    }

    /// The same device, whose kernels may quantise queries where that lets them multiply by packed integer dot products (`dot4I8Packed`): decode
    /// of the GPU family over K in Int8 or Int4, with either kind of scales. A query of a token and head has codes of 8 bits then, -127 to 127 times
    /// the largest of its scaled elements over 127, with the errors that
    /// [`with_packed_dots`](crate::reference::ErrorModel::with_packed_dots) bounds. Prefill, caches whose K has no codes, and attention that is
    /// [`deterministic`](crate::AttentionConfig::deterministic) stay as they are. A tuner made with the result races both kinds.
    ///
    /// No feature of the device is needed. One without such instructions gets the same results by plain integer arithmetic, more slowly than
    /// without packed dot products; wgpu can't say which it is. In a browser without WGSL's `packed_4x8_integer_dot_product`
    /// ([`wgpu::Instance::wgsl_language_features`]) the kernels don't compile.
    #[must_use]
    pub fn with_packed_dots(&self, allowed: bool) -> Self {
        Self { packed_dots: allowed, ..self.clone() }
    }

    /// Whether kernels may quantise queries for packed dot products.
    #[must_use]
    pub fn packed_dots(&self) -> bool {
        self.packed_dots
    }

    /// The same device with the kernel sizes that a tuner chose. Caches, attentions and models made with the result use them; nothing else changes.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if the tuning is for another adapter, driver, choice of shader checks, matrix units or
    /// packed dot products, or version of folio.
    pub fn with_tuning(&self, tuning: Tuning) -> Result<Self> {
        let have = self.tuned_for();
        if tuning.tuned_for != have {
            return Err(tuning.tuned_for.mismatch(&have));
        }
        Ok(self.retuned(Some(tuning)))
    }

    /// The same device with another tuning, or none.
    pub(crate) fn retuned(&self, tuning: Option<Tuning>) -> Self {
        Self { tuning: tuning.map(Arc::new), ..self.clone() }
    }

    /// What [`Gpu::with_tuning`] was given.
    #[must_use]
    pub fn tuning(&self) -> Option<&Tuning> {
        self.tuning.as_deref()
    }

    /// What a tuning made with this device holds good for: the key under which hosts keep it.
    #[must_use]
    pub fn tuned_for(&self) -> TunedFor {
        let info = &self.inner.info;
        let driver = [info.driver.as_str(), info.driver_info.as_str()];
        TunedFor {
            adapter: info.name.clone(),
            backend: info.backend.to_str().into(),
            driver: driver.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" "),
            full_checks: self.inner.shader_checks == ShaderChecks::Full,
            matrix_rows: self.matrix_size.map_or(0, MatrixSize::rows),
            packed_dots: self.packed_dots,
            folio: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// A variant with the tuned sizes, if there are any.
    pub(crate) fn tuned(&self, variant: Variant) -> Variant {
        self.tuning().map_or(variant, |tuning| tuning.apply(variant))
    }

    /// What kind of adapter it is, as far as the number of workgroups that keep it busy depends on it.
    #[must_use]
    pub fn adapter_class(&self) -> AdapterClass {
        match self.inner.info.device_type {
            _ if is_cpu_adapter(&self.inner.info) => AdapterClass::Cpu,
            wgpu::DeviceType::DiscreteGpu => AdapterClass::Discrete,
            _ => AdapterClass::Integrated,
        }
    }

    /// The largest storage binding in bytes: bounded by the binding limit and by the buffer limit, in whole `vec4`s.
    #[must_use]
    pub fn max_storage_bytes(&self) -> u64 {
        self.inner.limits.max_storage_buffer_binding_size.min(self.inner.limits.max_buffer_size) / 16 * 16
    }
}

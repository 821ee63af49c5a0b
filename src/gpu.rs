//! [`Gpu`]: a wgpu device and queue, checked for what folio needs.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::upload::UploadPool;

/// Which family of kernels runs. Chosen from the adapter unless the caller forces one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Profile {
    /// Cooperative tiles of 64 to 256 invocations, for GPUs.
    Gpu,
    /// One subgroup per workgroup and long private loops, for adapters that run shaders on CPU cores (lavapipe,
    /// SwiftShader, WARP), where barriers and workgroup memory cost far more than arithmetic.
    Cpu,
}

impl Profile {
    /// The profile that suits an adapter.
    ///
    /// CPU adapters are known by their device type; the GL twin of llvmpipe reports another type, hence the names.
    #[must_use]
    pub fn for_adapter(info: &wgpu::AdapterInfo) -> Self {
        if is_cpu_adapter(info) { Self::Cpu } else { Self::Gpu }
    }
}

pub(crate) fn is_cpu_adapter(info: &wgpu::AdapterInfo) -> bool {
    let name = info.name.to_lowercase();
    info.device_type == wgpu::DeviceType::Cpu
        || ["llvmpipe", "swiftshader", "basic render"].iter().any(|cpu| name.contains(cpu))
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

/// How [`Gpu::open`] finds and opens an adapter.
#[derive(Clone, Debug)]
#[cfg(feature = "open")]
pub struct GpuOptions {
    /// Take the first adapter whose name contains this text (any case). `None`: the best one, by device type: discrete,
    /// integrated, virtual, other, CPU; Vulkan, Metal and DX12 before GL.
    pub adapter_name: Option<String>,
    /// The wgpu backends to look in.
    pub backends: wgpu::Backends,
    /// The instance to look in; buffers can be shared only between devices of one instance's adapter. `None`: a new one.
    pub instance: Option<wgpu::Instance>,
    /// Features that are not to be used even where the adapter has them (for tests, or around a driver's bug).
    pub without: wgpu::Features,
    /// Kernel family. `None`: what suits the adapter.
    pub profile: Option<Profile>,
    /// Whether wgpu's shader checks stay in.
    pub shader_checks: ShaderChecks,
    /// An upper bound on `max_storage_buffer_binding_size` to request, in bytes (for tests of small devices).
    pub max_binding_bytes: Option<u64>,
    /// An upper bound on `max_storage_buffers_per_shader_stage` to request (for tests of small devices; folio needs WebGPU's default, 8).
    pub max_storage_buffers: Option<u32>,
}

#[cfg(feature = "open")]
impl Default for GpuOptions {
    fn default() -> Self {
        Self {
            adapter_name: None,
            backends: wgpu::Backends::all(),
            instance: None,
            without: wgpu::Features::empty(),
            profile: None,
            shader_checks: ShaderChecks::default(),
            max_binding_bytes: None,
            max_storage_buffers: None,
        }
    }
}

/// Features that folio uses when the device has them. It requires none.
///
/// Subgroups shorten reductions; 64-bit integers make loads wider on CPU adapters; timestamps serve benchmarks.
#[must_use]
pub fn useful_features() -> wgpu::Features {
    wgpu::Features::SUBGROUP
        | wgpu::Features::SHADER_INT64
        | wgpu::Features::SHADER_F16
        | wgpu::Features::TIMESTAMP_QUERY
        | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
        | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES
}

/// Limits that folio needs: WebGPU's defaults, as far as compute shaders are concerned.
///
/// A host that opens its own device and asks for at least these (or for `wgpu::Limits::default()`) can use every part of folio.
#[must_use]
pub fn required_limits() -> wgpu::Limits {
    wgpu::Limits::default()
}

struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    features: wgpu::Features,
    limits: wgpu::Limits,
    profile: Profile,
    shader_checks: ShaderChecks,
    uploads: UploadPool,
}

/// A wgpu device and queue with what folio needs checked. Cheap to clone; clones share everything.
///
/// folio never submits, polls, or spawns a thread unless a method's documentation says so.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu")
            .field("adapter", &self.0.info.name)
            .field("backend", &self.0.info.backend)
            .field("profile", &self.0.profile)
            .field("shader_checks", &self.0.shader_checks)
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// Opens an adapter: the best one, or the one that the options name, with the features and limits that help.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none, or none with that name; [`Error::Unsupported`] if its limits are below
    /// WebGPU's defaults; [`Error::Wgpu`] if the device can't be opened.
    #[cfg(feature = "open")]
    pub async fn open(options: GpuOptions) -> Result<Self> {
        let instance = match &options.instance {
            Some(instance) => instance.clone(),
            None => {
                if wgpu::Instance::enabled_backend_features().is_empty() {
                    return Err(Error::unsupported("wgpu backends", "at least one compiled in", "none"));
                }
                let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
                descriptor.backends = options.backends;
                wgpu::Instance::new(descriptor)
            }
        };
        let adapter = pick_adapter(&instance, &options).await?;
        let info = adapter.get_info();
        let offered = adapter.limits();
        let mut limits = required_limits();
        // Larger storage is worth having; everything else stays at the defaults, so that a program that works here
        // works on every WebGPU device.
        limits.max_storage_buffer_binding_size = offered.max_storage_buffer_binding_size;
        limits.max_buffer_size = offered.max_buffer_size;
        limits.max_compute_workgroup_storage_size = offered.max_compute_workgroup_storage_size;
        limits.max_storage_buffers_per_shader_stage = offered.max_storage_buffers_per_shader_stage;
        limits.max_buffers_and_acceleration_structures_per_shader_stage =
            offered.max_buffers_and_acceleration_structures_per_shader_stage;
        limits.min_storage_buffer_offset_alignment = offered.min_storage_buffer_offset_alignment;
        limits.min_uniform_buffer_offset_alignment = offered.min_uniform_buffer_offset_alignment;
        if let Some(bytes) = options.max_binding_bytes {
            limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(bytes);
        }
        if let Some(buffers) = options.max_storage_buffers {
            limits.max_storage_buffers_per_shader_stage = limits.max_storage_buffers_per_shader_stage.min(buffers);
        }
        check_limits(&offered)?;
        // Graphics limits below the defaults (headless or GL adapters) are none of folio's business.
        let limits = limits.or_worse_values_from(&offered);
        let features = adapter.features() & useful_features() & !options.without;
        let (device, queue) = adapter
            .request_device(&wgpu::DeviceDescriptor {
                label: Some("folio"),
                required_features: features,
                required_limits: limits,
                ..Default::default()
            })
            .await
            .map_err(|e| Error::Wgpu { during: "opening the device", message: e.to_string() })?;
        let profile = options.profile.unwrap_or_else(|| Profile::for_adapter(&info));
        Self::check(device, queue, info, profile, options.shader_checks)
    }

    /// [`Gpu::open`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Gpu::open`].
    #[cfg(all(feature = "open", not(target_arch = "wasm32")))]
    pub fn open_blocking(options: GpuOptions) -> Result<Self> {
        pollster::block_on(Self::open(options))
    }

    /// Takes a host's own device and queue, with the kernel profile that suits the adapter and
    /// [`ShaderChecks::default`]. wgpu handles are reference counted: pass clones.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with need and have, if the device was requested with limits below WebGPU's defaults.
    pub fn from_parts(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        let profile = Profile::for_adapter(&device.adapter_info());
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
        let info = device.adapter_info();
        Self::check(device, queue, info, profile, shader_checks)
    }

    fn check(
        device: wgpu::Device,
        queue: wgpu::Queue,
        info: wgpu::AdapterInfo,
        profile: Profile,
        shader_checks: ShaderChecks,
    ) -> Result<Self> {
        let limits = device.limits();
        check_limits(&limits)?;
        let features = device.features();
        Ok(Self(Arc::new(Inner {
            uploads: UploadPool::default(),
            device,
            queue,
            info,
            features,
            limits,
            profile,
            shader_checks,
        })))
    }

    /// The wgpu device.
    #[must_use]
    pub fn device(&self) -> &wgpu::Device {
        &self.0.device
    }

    /// The wgpu queue.
    #[must_use]
    pub fn queue(&self) -> &wgpu::Queue {
        &self.0.queue
    }

    /// The adapter's name, backend, driver and type.
    #[must_use]
    pub fn adapter_info(&self) -> &wgpu::AdapterInfo {
        &self.0.info
    }

    /// The features that the device was opened with.
    #[must_use]
    pub fn features(&self) -> wgpu::Features {
        self.0.features
    }

    /// The limits that the device was opened with.
    #[must_use]
    pub fn limits(&self) -> &wgpu::Limits {
        &self.0.limits
    }

    /// The kernel family in use.
    #[must_use]
    pub fn profile(&self) -> Profile {
        self.0.profile
    }

    /// Whether wgpu's shader checks are in.
    #[must_use]
    pub fn shader_checks(&self) -> ShaderChecks {
        self.0.shader_checks
    }

    /// The subgroup size if every subgroup of this adapter has the same one and the device can use subgroups.
    #[must_use]
    pub fn subgroup_size(&self) -> Option<u32> {
        let info = &self.0.info;
        (self.has_subgroups() && info.subgroup_min_size == info.subgroup_max_size).then_some(info.subgroup_min_size)
    }

    /// Whether the device can use subgroup operations.
    #[must_use]
    pub fn has_subgroups(&self) -> bool {
        self.0.features.contains(wgpu::Features::SUBGROUP)
    }

    pub(crate) fn uploads(&self) -> &UploadPool {
        &self.0.uploads
    }

    /// The largest storage binding in bytes: bounded by the binding limit and by the buffer limit, in whole `vec4`s.
    #[must_use]
    pub fn max_storage_bytes(&self) -> u64 {
        self.0.limits.max_storage_buffer_binding_size.min(self.0.limits.max_buffer_size) / 16 * 16
    }

    /// Runs `f`, which creates wgpu objects, and turns the validation or memory error that it raised into [`Error::Wgpu`].
    ///
    /// wgpu's creation functions return no `Result`; what no scope catches goes to a handler that aborts by default. A host that
    /// makes its own buffers and pipelines can use this too. `during` says in the error what was going on.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub async fn scoped<T>(&self, during: &'static str, f: impl FnOnce() -> T) -> Result<T> {
        let pops = {
            let internal = self.0.device.push_error_scope(wgpu::ErrorFilter::Internal);
            let memory = self.0.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
            let validation = self.0.device.push_error_scope(wgpu::ErrorFilter::Validation);
            let value = f();
            (value, validation.pop(), memory.pop(), internal.pop())
        };
        let (value, validation, memory, internal) = pops;
        let (validation, memory, internal) = (validation.await, memory.await, internal.await);
        match validation.or(memory).or(internal) {
            None => Ok(value),
            Some(e) => Err(Error::Wgpu { during, message: e.to_string() }),
        }
    }

    /// Makes a buffer within a call that can't wait; see [`Gpu::scoped_now`].
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub fn create_buffer(
        &self,
        during: &'static str,
        label: &'static str,
        size: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        self.scoped_now(during, || self.device().create_buffer(&descriptor))
    }

    /// [`Gpu::scoped`] inside a recording call, which can't wait. Natively wgpu's answer is there at once; in a browser it
    /// would arrive after the call, so there the error goes to the device's own `uncapturederror` event instead.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub fn scoped_now<T>(&self, during: &'static str, f: impl FnOnce() -> T) -> Result<T> {
        #[cfg(not(target_arch = "wasm32"))]
        {
            pollster::block_on(self.scoped(during, f))
        }
        #[cfg(target_arch = "wasm32")]
        {
            let _ = during;
            Ok(f())
        }
    }
}

/// The best adapter, or the one that is asked for by name.
#[cfg(feature = "open")]
async fn pick_adapter(instance: &wgpu::Instance, options: &GpuOptions) -> Result<wgpu::Adapter> {
    let mut adapters = instance.enumerate_adapters(options.backends).await;
    if cfg!(target_arch = "wasm32") && adapters.is_empty() && options.adapter_name.is_none() {
        // The web can't enumerate, but hands out its adapter on request.
        adapters.extend(instance.request_adapter(&wgpu::RequestAdapterOptions::default()).await.ok());
    }
    let found = if adapters.is_empty() {
        "none".to_owned()
    } else {
        adapters.iter().map(|a| format!("{:?}", a.get_info().name)).collect::<Vec<_>>().join(", ")
    };
    let wanted = match &options.adapter_name {
        Some(name) => format!("adapter_name: got {name:?}, need part of the name of an adapter that is there"),
        None => "no GPU adapter on this machine".to_owned(),
    };
    let name = options.adapter_name.as_ref().map(|name| name.to_lowercase());
    adapters
        .into_iter()
        .filter(|a| name.as_ref().is_none_or(|name| a.get_info().name.to_lowercase().contains(name)))
        // An adapter that can't run compute shaders (a GLES 3.0 device, say) is of no use.
        .filter(|a| a.limits().max_compute_invocations_per_workgroup > 0)
        .min_by_key(|a| rank(&a.get_info()))
        .ok_or(Error::NoAdapter { wanted, found })
}

#[cfg(feature = "open")]
fn rank(info: &wgpu::AdapterInfo) -> (u32, u32) {
    let by_type = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    // GL reports software adapters as "other": they must not win over their Vulkan twin.
    let by_type = if is_cpu_adapter(info) { 4 } else { by_type };
    (by_type, u32::from(info.backend == wgpu::Backend::Gl))
}

/// Compares the compute limits with [`required_limits`].
fn check_limits(have: &wgpu::Limits) -> Result<()> {
    let need = required_limits();
    let at_least: [(&'static str, u64, u64); 11] = [
        (
            "max_storage_buffers_per_shader_stage",
            need.max_storage_buffers_per_shader_stage.into(),
            have.max_storage_buffers_per_shader_stage.into(),
        ),
        ("max_uniform_buffers_per_shader_stage", 1, have.max_uniform_buffers_per_shader_stage.into()),
        // Pools shrink with the binding; below this even the work lists of a large batch may not fit.
        ("max_storage_buffer_binding_size", 1 << 20, have.max_storage_buffer_binding_size),
        ("max_buffer_size", 1 << 20, have.max_buffer_size),
        ("max_uniform_buffer_binding_size", 256, have.max_uniform_buffer_binding_size),
        (
            "max_compute_workgroup_storage_size",
            need.max_compute_workgroup_storage_size.into(),
            have.max_compute_workgroup_storage_size.into(),
        ),
        (
            "max_compute_invocations_per_workgroup",
            need.max_compute_invocations_per_workgroup.into(),
            have.max_compute_invocations_per_workgroup.into(),
        ),
        (
            "max_compute_workgroup_size_x",
            need.max_compute_workgroup_size_x.into(),
            have.max_compute_workgroup_size_x.into(),
        ),
        (
            "max_compute_workgroups_per_dimension",
            need.max_compute_workgroups_per_dimension.into(),
            have.max_compute_workgroups_per_dimension.into(),
        ),
        ("max_bind_groups", 1, have.max_bind_groups.into()),
        ("max_bindings_per_bind_group", 9, have.max_bindings_per_bind_group.into()),
    ];
    for (what, need, have) in at_least {
        if have < need {
            return Err(Error::unsupported(what, format!("at least {need}"), have));
        }
    }
    // Uploads place their parameter blocks at 256 bytes, WebGPU's largest alignment.
    for (what, have) in [
        ("min_uniform_buffer_offset_alignment", have.min_uniform_buffer_offset_alignment),
        ("min_storage_buffer_offset_alignment", have.min_storage_buffer_offset_alignment),
    ] {
        if have > 256 {
            return Err(Error::unsupported(what, "at most 256", have));
        }
    }
    Ok(())
}

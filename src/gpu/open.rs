//! [`Gpu::open`]: folio looks for an adapter itself.

use super::limits::{MATRIX_FEATURES, check_limits, required_limits, useful_features};
use super::{Gpu, ShaderChecks, is_cpu_adapter, profile_of};
use crate::error::{Error, Result};
use crate::kernel::Profile;

/// How [`Gpu::open`] finds and opens an adapter.
#[derive(Clone, Debug)]
#[non_exhaustive]
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
    /// Ask for timestamp queries where the adapter has them, for a program that measures. folio itself uses none.
    pub timestamps: bool,
    /// Use matrix units where the adapter and folio have them, see [`Gpu::with_matrix_units`]. They are an experimental feature of wgpu's, which may
    /// have bugs with undefined behaviour: enabled only with the token by which the caller accepts that,
    /// [`wgpu::ExperimentalFeatures::enabled`].
    pub matrix_units: wgpu::ExperimentalFeatures,
    /// Let matrix units round what is stored in f32, see [`Gpu::with_rounded_f32`].
    pub rounds_f32: bool,
    /// Let kernels quantise queries for packed integer dot products where the instance has them, see [`Gpu::with_packed_dots`].
    pub packed_dots: bool,
    /// Kernel family. `None`: what suits the adapter.
    pub profile: Option<Profile>,
    /// Whether wgpu's shader checks stay in.
    pub shader_checks: ShaderChecks,
    /// Ask for no limit beyond WebGPU's defaults, so that what works here has the room that it needs on every device of WebGPU.
    pub default_limits: bool,
    /// An upper bound on `max_storage_buffer_binding_size` to request, in bytes (for tests of small devices).
    pub max_binding_bytes: Option<u64>,
    /// An upper bound on `max_storage_buffers_per_shader_stage` to request (for tests of small devices; folio needs WebGPU's default, 8).
    pub max_storage_buffers: Option<u32>,
}

/// Timestamps in encoders and in passes.
const TIMESTAMPS: wgpu::Features = wgpu::Features::TIMESTAMP_QUERY
    .union(wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS)
    .union(wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES);

impl Default for GpuOptions {
    fn default() -> Self {
        Self {
            adapter_name: None,
            backends: wgpu::Backends::all(),
            instance: None,
            without: wgpu::Features::empty(),
            timestamps: false,
            matrix_units: wgpu::ExperimentalFeatures::disabled(),
            rounds_f32: false,
            packed_dots: false,
            profile: None,
            shader_checks: ShaderChecks::default(),
            default_limits: false,
            max_binding_bytes: None,
            max_storage_buffers: None,
        }
    }
}

impl Gpu {
    /// Opens an adapter: the best one, or the one that the options name, with the features and limits that help.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none, or none with that name; [`Error::Unsupported`] if its limits are below
    /// WebGPU's defaults; [`Error::Wgpu`] if the device can't be opened.
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
        if !options.default_limits {
            limits.max_storage_buffer_binding_size = offered.max_storage_buffer_binding_size;
            limits.max_buffer_size = offered.max_buffer_size;
            limits.max_compute_workgroup_storage_size = offered.max_compute_workgroup_storage_size;
            limits.max_storage_buffers_per_shader_stage = offered.max_storage_buffers_per_shader_stage;
            limits.max_buffers_and_acceleration_structures_per_shader_stage =
                offered.max_buffers_and_acceleration_structures_per_shader_stage;
            limits.min_storage_buffer_offset_alignment = offered.min_storage_buffer_offset_alignment;
            limits.min_uniform_buffer_offset_alignment = offered.min_uniform_buffer_offset_alignment;
        }
        if let Some(bytes) = options.max_binding_bytes {
            limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(bytes);
        }
        if let Some(buffers) = options.max_storage_buffers {
            limits.max_storage_buffers_per_shader_stage = limits.max_storage_buffers_per_shader_stage.min(buffers);
        }
        check_limits(&offered)?;
        // Graphics limits below the defaults (headless or GL adapters) are none of folio's business.
        let limits = limits.or_worse_values_from(&offered);
        let mut features = useful_features();
        if options.timestamps {
            features |= TIMESTAMPS;
        }
        let offers_matrices = (adapter.features() - options.without).contains(MATRIX_FEATURES);
        let uses_matrices = options.matrix_units.is_enabled() && offers_matrices;
        if uses_matrices {
            features |= MATRIX_FEATURES;
        }
        let features = adapter.features() & features & !options.without;
        let (device, queue) = adapter
            .request_device(&wgpu::DeviceDescriptor {
                label: Some("folio"),
                required_features: features,
                required_limits: limits,
                experimental_features: options.matrix_units,
                ..Default::default()
            })
            .await
            .map_err(|error| Error::wgpu("opening the device", error))?;
        let profile = options.profile.unwrap_or_else(|| profile_of(&info));
        let language = instance.wgsl_language_features();
        let packed_dots =
            options.packed_dots && language.contains(wgpu::WgslLanguageFeatures::Packed4x8IntegerDotProduct);
        let gpu = Self::from_parts_with(device, queue, profile, options.shader_checks)?;
        let gpu = gpu.with_packed_dots(packed_dots).with_rounded_f32(options.rounds_f32);
        if uses_matrices { gpu.with_matrix_units(&adapter.cooperative_matrix_properties()) } else { Ok(gpu) }
    }

    /// [`Gpu::open`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Gpu::open`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open_blocking(options: GpuOptions) -> Result<Self> {
        pollster::block_on(Self::open(options))
    }
}

/// The best adapter, or the one that is asked for by name.
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

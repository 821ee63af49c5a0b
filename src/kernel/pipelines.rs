//! Variant to pipeline.

use std::borrow::Cow;
use std::time::Duration;

use super::bindings::{Access, bindings};
use super::source::compose;
use super::variant::Variant;
use crate::error::{Error, Result};
use crate::gpu::{Gpu, ShaderChecks};
use crate::record::Dispatch;

/// A compiled variant.
#[derive(Debug)]
pub struct Pipeline {
    variant: Variant,
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    compile_time: Duration,
}

impl Pipeline {
    /// Composes and compiles a variant. Drivers may still defer their own compiler to the first dispatch; see the `warm_up`s.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the variant needs more than the device offers; [`Error::Wgpu`] if it doesn't compile.
    pub async fn new(gpu: &Gpu, variant: Variant) -> Result<Self> {
        check_budget(gpu, &variant)?;
        let text = compose(&variant)?;
        let start = now();
        let label = format!("folio {}", variant.kernel.entry_point());
        let (pipeline, layout) = gpu.scoped("compiling a kernel", || create(gpu, &variant, &label, &text)).await?;
        Ok(Self { variant, pipeline, layout, compile_time: elapsed(start) })
    }

    /// The compile-time choices.
    #[must_use]
    pub fn variant(&self) -> &Variant {
        &self.variant
    }

    /// What wgpu took to validate, translate and compile it; zero on the web, which has no clock without a host.
    #[must_use]
    pub fn compile_time(&self) -> Duration {
        self.compile_time
    }

    /// Binds the resources in the order of the variant's binding table.
    pub(crate) fn dispatch(
        &self,
        gpu: &Gpu,
        resources: &[wgpu::BindingResource<'_>],
        grid: [u32; 3],
    ) -> Result<Dispatch<'_>> {
        let entries: Vec<_> = (0..)
            .zip(resources)
            .map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource: resource.clone() })
            .collect();
        let bind_group = gpu.scoped_now("binding buffers (are they all of the cache's device?)", || {
            gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &self.layout,
                entries: &entries,
            })
        })?;
        Ok(Dispatch { pipeline: &self.pipeline, bind_group, grid })
    }
}

/// wgpu 30 checks neither workgroup memory nor workgroup size of a module against the limits in every backend, so folio does.
fn check_budget(gpu: &Gpu, variant: &Variant) -> Result<()> {
    let limits = gpu.limits();
    let bindings = bindings(variant);
    let storage_buffers = bindings.iter().filter(|b| b.access != Access::Uniform).count() as u32;
    for (what, need, have) in [
        ("storage buffers in a kernel", storage_buffers, limits.max_storage_buffers_per_shader_stage),
        ("bindings in a kernel", bindings.len() as u32, limits.max_bindings_per_bind_group),
        ("workgroup memory", variant.workgroup_bytes(), limits.max_compute_workgroup_storage_size),
        ("workgroup size", variant.workgroup_size, limits.max_compute_invocations_per_workgroup),
        ("workgroup size along x", variant.workgroup_size, limits.max_compute_workgroup_size_x),
    ] {
        if need > have {
            return Err(Error::unsupported(what, need, have));
        }
    }
    let missing = variant.features() - gpu.features();
    if !missing.is_empty() {
        return Err(Error::unsupported("features", format!("{missing:?}"), format!("{:?}", gpu.features())));
    }
    Ok(())
}

fn create(gpu: &Gpu, variant: &Variant, label: &str, text: &str) -> (wgpu::ComputePipeline, wgpu::BindGroupLayout) {
    let device = gpu.device();
    let entries: Vec<_> = (0..)
        .zip(bindings(variant))
        .map(|(binding, b)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: match b.access {
                    Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
                    Access::Write => wgpu::BufferBindingType::Storage { read_only: false },
                    Access::Uniform => wgpu::BufferBindingType::Uniform,
                },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        })
        .collect();
    let layout =
        device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(label), entries: &entries });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some(label),
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let module = create_module(gpu, label, text);
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(label),
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some(variant.kernel.entry_point()),
        compilation_options: wgpu::PipelineCompilationOptions {
            // The kernels write all workgroup memory before they read it.
            zero_initialize_workgroup_memory: false,
            ..Default::default()
        },
        cache: None,
    });
    (pipeline, layout)
}

#[allow(unsafe_code, reason = "the trusted-shader switch; see the SAFETY comment")]
fn create_module(gpu: &Gpu, label: &str, text: &str) -> wgpu::ShaderModule {
    let descriptor =
        wgpu::ShaderModuleDescriptor { label: Some(label), source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(text)) };
    match gpu.shader_checks() {
        ShaderChecks::Full => gpu.device().create_shader_module(descriptor),
        // SAFETY: Without wgpu's checks a shader must not index outside its buffers and must not loop forever.
        // - The text is folio's own (`compose` renders only files compiled into this crate).
        // - Work items, block tables, slots and copy lists are computed by folio (`plan`, `cache`), never taken from a caller, and the
        //   host's buffers are checked to hold every row of the step before anything is recorded (`BufferRef::check`).
        // - Block ids are clamped to the pool on the GPU as well, so even a damaged table stays inside the cache's buffers.
        // - Positions, which a caller may choose, and the frequencies of a rotary embedding only ever enter arithmetic.
        // - Every loop counts up to a bound that is read before it starts.
        // - The data of q, k and v only ever enters arithmetic, no index and no loop bound depends on it.
        ShaderChecks::Trusted => unsafe {
            gpu.device().create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked())
        },
    }
}

#[cfg(not(target_arch = "wasm32"))]
fn now() -> std::time::Instant {
    std::time::Instant::now()
}

#[cfg(not(target_arch = "wasm32"))]
fn elapsed(start: std::time::Instant) -> Duration {
    start.elapsed()
}

#[cfg(target_arch = "wasm32")]
fn now() {}

#[cfg(target_arch = "wasm32")]
fn elapsed((): ()) -> Duration {
    Duration::ZERO
}

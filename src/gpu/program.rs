//! [`Program`]: a compiled [`Source`]. The only place that compiles a shader, and the only `unsafe` of the crate.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::limits::MATRIX_FEATURES;
use super::{Dispatch, Gpu, ShaderChecks};
use crate::error::{Error, Result};
use crate::kernel::{Access, ShaderFeatures, Source, Variant};

/// A compiled kernel.
#[derive(Debug)]
pub(crate) struct Program {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    num_bindings: usize,
    /// Whether it has been dispatched to warm it up.
    is_warm: AtomicBool,
}

/// The compiled kernels of a device, by their source. They stay for as long as the device does: a second cache, attention or decoder
/// of the same shape compiles nothing.
#[derive(Debug, Default)]
pub(super) struct Programs {
    compiled: Mutex<HashMap<Source, Arc<Program>>>,
    num_compiled: AtomicU64,
}

impl Programs {
    pub(super) fn num_compiled(&self) -> u64 {
        self.num_compiled.load(Ordering::Relaxed)
    }
}

impl Program {
    /// The compiled kernel: compiled now, unless it has been before. Drivers may still defer their own compiler to the first dispatch.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it needs more than the device offers; [`Error::Wgpu`] if it doesn't compile; [`Error::DeviceLost`].
    pub(crate) async fn get(gpu: &Gpu, source: Source) -> Result<Arc<Self>> {
        let programs = &gpu.inner.programs;
        let lock = || programs.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let found = lock().get(&source).cloned();
        if let Some(program) = found {
            gpu.check_alive("compiling a kernel")?;
            return Ok(program);
        }
        check_limits(gpu, &source)?;
        let program = gpu.scoped("compiling a kernel", || Self::compile(gpu, &source)).await?;
        programs.num_compiled.fetch_add(1, Ordering::Relaxed);
        // Another thread may have been faster.
        Ok(Arc::clone(lock().entry(source).or_insert_with(|| Arc::new(program))))
    }

    fn compile(gpu: &Gpu, source: &Source) -> Self {
        let device = gpu.device();
        let label = format!("folio {}", source.entry_point());
        let label = Some(label.as_str());
        let entries: Vec<_> = (0..)
            .zip(source.bindings())
            .map(|(binding, entry)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: binding_type(entry.access),
                count: None,
            })
            .collect();
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &create_module(gpu, source),
            entry_point: Some(source.entry_point()),
            compilation_options: wgpu::PipelineCompilationOptions {
                // The kernels write all workgroup memory before they read it.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        Self { pipeline, layout, num_bindings: entries.len(), is_warm: AtomicBool::new(false) }
    }

    pub(super) fn pipeline(&self) -> &wgpu::ComputePipeline {
        &self.pipeline
    }

    /// Binds resources in the order of the source's bindings. To be called within an error scope.
    pub(super) fn bind(&self, gpu: &Gpu, resources: &[wgpu::BindingResource<'_>]) -> wgpu::BindGroup {
        let entries: Vec<_> = (0..)
            .zip(resources)
            .map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource: resource.clone() })
            .collect();
        gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.layout,
            entries: &entries,
        })
    }

    /// Records one dispatch of resources that are in no upload, or whose lease the caller holds in the pass.
    ///
    /// # Errors
    /// Those of [`Gpu::prepare`].
    #[cfg(feature = "model")]
    pub(crate) fn record(
        self: &Arc<Self>,
        gpu: &Gpu,
        recorder: super::Recorder<'_>,
        resources: Vec<wgpu::BindingResource<'_>>,
        grid: [u32; 3],
    ) -> Result<()> {
        recorder.record(gpu, "folio model", &[Dispatch { program: self, resources, grid }], &[])
    }

    /// Whether it has not been warmed up yet. The caller is the one who does it.
    pub(crate) fn take_cold(&self) -> bool {
        !self.is_warm.swap(true, Ordering::Relaxed)
    }
}

/// A compiled variant of the kernels of cache and attention.
#[derive(Debug)]
pub(crate) struct VariantProgram {
    pub(crate) variant: Variant,
    pub(crate) program: Arc<Program>,
}

impl VariantProgram {
    /// Those of [`Program::get`].
    pub(crate) async fn new(gpu: &Gpu, variant: Variant) -> Result<Self> {
        Ok(Self { variant, program: Program::get(gpu, variant.source()?).await? })
    }

    /// Room for the resources of a dispatch.
    pub(crate) fn resources<'a>(&self) -> Vec<wgpu::BindingResource<'a>> {
        Vec::with_capacity(self.program.num_bindings)
    }

    pub(crate) fn dispatch<'a>(&'a self, resources: Vec<wgpu::BindingResource<'a>>, grid: [u32; 3]) -> Dispatch<'a> {
        Dispatch { program: &self.program, resources, grid }
    }

    /// Workgroups for a number of invocations: (x, y).
    pub(crate) fn grid(&self, argument: &'static str, invocations: u64) -> Result<(u32, u32)> {
        self.variant.grid(argument, invocations)
    }
}

fn binding_type(access: Access) -> wgpu::BindingType {
    let buffer = |ty| wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None };
    match access {
        Access::Read => buffer(wgpu::BufferBindingType::Storage { read_only: true }),
        Access::Write => buffer(wgpu::BufferBindingType::Storage { read_only: false }),
        Access::Uniform => buffer(wgpu::BufferBindingType::Uniform),
        Access::Texture => wgpu::BindingType::Texture {
            sample_type: wgpu::TextureSampleType::Uint,
            view_dimension: wgpu::TextureViewDimension::D2,
            multisampled: false,
        },
        Access::TextureWrite => wgpu::BindingType::StorageTexture {
            access: wgpu::StorageTextureAccess::WriteOnly,
            format: wgpu::TextureFormat::Rgba32Uint,
            view_dimension: wgpu::TextureViewDimension::D2,
        },
    }
}

/// wgpu's names of what a shader needs.
fn wgpu_features(features: ShaderFeatures) -> wgpu::Features {
    let mut set = wgpu::Features::empty();
    set.set(wgpu::Features::SUBGROUP, features.subgroups);
    set.set(wgpu::Features::SHADER_INT64, features.int64);
    set.set(MATRIX_FEATURES, features.matrix);
    set
}

/// wgpu 30 checks neither workgroup memory nor workgroup size of a module against the limits in every backend, so folio does.
fn check_limits(gpu: &Gpu, source: &Source) -> Result<()> {
    let limits = gpu.limits();
    let count = |accesses: &[Access]| source.bindings().iter().filter(|b| accesses.contains(&b.access)).count() as u32;
    for (what, need, have) in [
        (
            "storage buffers in a kernel",
            count(&[Access::Read, Access::Write]),
            limits.max_storage_buffers_per_shader_stage,
        ),
        ("uniform buffers in a kernel", count(&[Access::Uniform]), limits.max_uniform_buffers_per_shader_stage),
        ("textures in a kernel", count(&[Access::Texture]), limits.max_sampled_textures_per_shader_stage),
        ("storage textures in a kernel", count(&[Access::TextureWrite]), limits.max_storage_textures_per_shader_stage),
        ("bindings in a kernel", source.bindings().len() as u32, limits.max_bindings_per_bind_group),
        ("workgroup memory", source.workgroup_bytes(), limits.max_compute_workgroup_storage_size),
        ("workgroup size", source.workgroup_size(), limits.max_compute_invocations_per_workgroup),
        ("workgroup size along x", source.workgroup_size(), limits.max_compute_workgroup_size_x),
    ] {
        if need > have {
            return Err(Error::unsupported(what, need, have));
        }
    }
    let missing = wgpu_features(source.features()) - gpu.features();
    if !missing.is_empty() {
        return Err(Error::unsupported("features", format!("{missing:?}"), format!("{:?}", gpu.features())));
    }
    Ok(())
}

#[allow(unsafe_code, reason = "the trusted-shader switch; see the SAFETY comment")]
fn create_module(gpu: &Gpu, source: &Source) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(source.entry_point()),
        source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(source.text())),
    };
    match gpu.shader_checks() {
        ShaderChecks::Full => gpu.device().create_shader_module(descriptor),
        // SAFETY: Without wgpu's checks a shader must not index outside its buffers and must not loop forever. Each premise, and what holds it:
        // - The text is folio's own: only this crate can make a `Source`, from files compiled into it (its fields and constructors are private).
        // - Work items, block tables, slots, copy lists and requests are computed by folio (`sequence`, `plan`, `Sampler`) and reach the GPU in
        //   an `Upload` only. Nobody else gets hold of its buffer, and its lease (see `gpu::upload`) keeps it from being written again
        //   while commands that read it may still run, in whatever order and however late the host submits them.
        // - An upload is used with the cache that its step began in, with the attention that planned it, and for layers of the group whose block tables
        //   it has: the recording calls check all three, and that the step is open.
        // - The host's buffers hold every row of the step: `BufferRef::check` and `Rows::check`, before anything is recorded. A wgpu buffer
        //   never changes its size; one that the host destroys makes the submit fail.
        // - Block ids are clamped to the pool on the GPU as well, so even a damaged table stays inside the cache's buffers.
        // - Token ids, row numbers and indices that come from the caller's own buffers are clamped in the kernels.
        // - Positions, which a caller may choose, the frequencies of a rotary embedding and the data of q, k, v and all activations only ever
        //   enter arithmetic: no index and no loop bound depends on them.
        // - To which experts rows go depends on activations. `select_experts` finds numbers of experts whatever the logits are, `sort_routes` clamps
        //   them, and the linear kernels clamp the rows that its list names and skip experts that their binding doesn't hold. How many tiles there are
        //   follows from how many rows go to each expert, and the host has bound room for the most that there can be.
        // - Plain loops (`measure`) count up to a constant of their text, and their buffers are checked to have all that they index.
        // - Texels are those of whole rows of a matrix, and the host makes textures that hold all of their rows' texels.
        // - Every loop counts up to a bound that is read before it starts.
        ShaderChecks::Trusted => unsafe {
            gpu.device().create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked())
        },
    }
}

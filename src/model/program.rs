//! The model's own kernels: templates rendered to WGSL, compiled, and recorded.

use std::borrow::Cow;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior};

use crate::{Error, Result};
use crate::{Gpu, ShaderChecks};

macro_rules! templates {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../shaders/model/", $name)))),*]
    };
}

/// Every file under `shaders/model/`, by the name that templates include it by.
const TEMPLATES: &[(&str, &str)] = templates![
    "activate.wgsl",
    "activation.wgsl",
    "add_positions.wgsl",
    "linear_activation.wgsl",
    "linear_cpu.wgsl",
    "linear_gather.wgsl",
    "linear_matmul.wgsl",
    "linear_matvec.wgsl",
    "linear_params.wgsl",
    "linear_parts.wgsl",
    "linear_stage.wgsl",
    "linear_x.wgsl",
    "norm.wgsl",
    "sample.wgsl",
    "select_rows.wgsl",
    "wide.wgsl",
];

/// Parsed templates: constant data, filled on first use.
static ENVIRONMENT: LazyLock<Result<Environment<'static>, String>> = LazyLock::new(|| {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| format!("syntax: {e:#}"))?);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    for (name, text) in TEMPLATES {
        environment.add_template(name, text).map_err(|e| format!("{name}: {e:#}"))?;
    }
    Ok(environment)
});

/// How a kernel binds a resource. Its number is its place in [`Source::bindings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    Write,
    /// `var<uniform>`
    Uniform,
    /// `texture_2d<u32>`
    Texture,
    /// `texture_storage_2d<rgba32uint, write>`
    TextureWrite,
}

/// A kernel before it is compiled. Only this crate makes them; to read, print or validate.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    pub(crate) entry_point: &'static str,
    pub(crate) text: String,
    pub(crate) bindings: Vec<Binding>,
    pub(crate) workgroup_size: u32,
    pub(crate) workgroup_bytes: u32,
    pub(crate) features: wgpu::Features,
}

impl Source {
    /// Renders a template of `shaders/model/`.
    ///
    /// # Errors
    /// [`Error::Wgpu`] if the template is broken, which tests over all variants exclude.
    pub(crate) fn render(template: &str, values: minijinja::Value) -> Result<String> {
        let failed = |message: String| Error::Wgpu { during: "composing a shader", message };
        let environment = ENVIRONMENT.as_ref().map_err(|message| failed(message.clone()))?;
        environment
            .get_template(template)
            .and_then(|template| template.render(values))
            .map_err(|e| failed(format!("{e:#}")))
    }

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
    pub fn bindings(&self) -> &[Binding] {
        &self.bindings
    }

    /// Invocations per workgroup.
    #[must_use]
    pub fn workgroup_size(&self) -> u32 {
        self.workgroup_size
    }

    /// Bytes of workgroup memory that the text declares.
    #[must_use]
    pub fn workgroup_bytes(&self) -> u32 {
        self.workgroup_bytes
    }

    /// Features that the text needs.
    #[must_use]
    pub fn features(&self) -> wgpu::Features {
        self.features
    }
}

/// A compiled kernel.
#[derive(Debug)]
pub(crate) struct Program {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

impl Program {
    /// Compiles a kernel. Drivers may defer their own compiler to the first dispatch.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it needs more than the device offers; [`Error::Wgpu`] if it doesn't compile.
    pub(crate) async fn new(gpu: &Gpu, source: &Source) -> Result<Self> {
        let limits = gpu.limits();
        for (what, need, have) in [
            ("workgroup memory", source.workgroup_bytes, limits.max_compute_workgroup_storage_size),
            ("workgroup size", source.workgroup_size, limits.max_compute_invocations_per_workgroup),
        ] {
            if need > have {
                return Err(Error::unsupported(what, need, have));
            }
        }
        let missing = source.features - gpu.features();
        if !missing.is_empty() {
            return Err(Error::unsupported("features", format!("{missing:?}"), format!("{:?}", gpu.features())));
        }
        let (pipeline, layout) = gpu.scoped("compiling a kernel of the model", || create(gpu, source)).await?;
        Ok(Self { pipeline, layout })
    }

    /// Records one dispatch, with the resources in the order of the bindings.
    ///
    /// # Errors
    /// [`Error::Wgpu`] if a resource doesn't fit its binding; nothing is recorded then.
    pub(crate) fn dispatch(
        &self,
        gpu: &Gpu,
        pass: &mut wgpu::ComputePass<'_>,
        resources: &[wgpu::BindingResource<'_>],
        grid: [u32; 3],
    ) -> Result<()> {
        let entries: Vec<_> = (0..)
            .zip(resources)
            .map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource: resource.clone() })
            .collect();
        let bind_group = gpu.scoped_now("binding the model's buffers", || {
            gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &self.layout,
                entries: &entries,
            })
        })?;
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &bind_group, &[]);
        let [x, y, z] = grid;
        pass.dispatch_workgroups(x, y, z);
        Ok(())
    }
}

fn create(gpu: &Gpu, source: &Source) -> (wgpu::ComputePipeline, wgpu::BindGroupLayout) {
    let device = gpu.device();
    let label = Some(source.entry_point);
    let entries: Vec<_> = (0..)
        .zip(&source.bindings)
        .map(|(binding, kind)| {
            let buffer = |ty| wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None };
            let ty = match kind {
                Binding::Read => buffer(wgpu::BufferBindingType::Storage { read_only: true }),
                Binding::Write => buffer(wgpu::BufferBindingType::Storage { read_only: false }),
                Binding::Uniform => buffer(wgpu::BufferBindingType::Uniform),
                Binding::Texture => wgpu::BindingType::Texture {
                    sample_type: wgpu::TextureSampleType::Uint,
                    view_dimension: wgpu::TextureViewDimension::D2,
                    multisampled: false,
                },
                Binding::TextureWrite => wgpu::BindingType::StorageTexture {
                    access: wgpu::StorageTextureAccess::WriteOnly,
                    format: wgpu::TextureFormat::Rgba32Uint,
                    view_dimension: wgpu::TextureViewDimension::D2,
                },
            };
            wgpu::BindGroupLayoutEntry { binding, visibility: wgpu::ShaderStages::COMPUTE, ty, count: None }
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
        entry_point: Some(source.entry_point),
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
fn create_module(gpu: &Gpu, source: &Source) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(source.entry_point),
        source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(&source.text)),
    };
    match gpu.shader_checks() {
        ShaderChecks::Full => gpu.device().create_shader_module(descriptor),
        // SAFETY: Without wgpu's checks a shader must not index outside its buffers and must not loop forever.
        // - `Source`s are made in this crate only, from its own templates.
        // - The host checks that each range that a kernel is given holds its rows (`Rows::check`), before anything is recorded.
        // - Token ids and row numbers, which come from the caller, are checked on the host and clamped in the kernels.
        // - Texels are those of whole rows of a matrix, and the host makes textures that hold all of their rows' texels.
        // - Every loop counts up to a bound that is known before it starts.
        ShaderChecks::Trusted => unsafe {
            gpu.device().create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked())
        },
    }
}

/// f32 activations `[rows, width]`, row by row from `offset` bytes into a buffer.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The buffer, with usage `STORAGE`.
    pub buffer: &'a wgpu::Buffer,
    /// Bytes before the first row; a multiple of the device's storage offset alignment.
    pub offset: u64,
    /// Rows: tokens of the step, or tokens times heads.
    pub rows: u32,
    /// f32 per row.
    pub width: u32,
}

impl<'a> Rows<'a> {
    /// Rows from the start of a buffer.
    #[must_use]
    pub const fn new(buffer: &'a wgpu::Buffer, rows: u32, width: u32) -> Self {
        Self { buffer, offset: 0, rows, width }
    }

    /// Bytes of all rows.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.rows as u64 * self.width as u64 * 4
    }

    /// The range as folio's own calls take it.
    #[must_use]
    pub const fn range(&self) -> crate::BufferRef<'a> {
        crate::BufferRef::new(self.buffer, self.offset, self.bytes())
    }

    /// The range as a binding: exactly the rows, so that `arrayLength` counts them.
    #[must_use]
    pub const fn binding(&self) -> wgpu::BindingResource<'a> {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: self.buffer,
            offset: self.offset,
            size: std::num::NonZeroU64::new(self.bytes()),
        })
    }

    /// Checks the width, that there is a row, and that the rows lie within the buffer and fit a binding.
    ///
    /// # Errors
    /// [`Error::Argument`] that names `argument`.
    pub fn check(&self, gpu: &Gpu, argument: &'static str, rows: u32, width: u32) -> Result<()> {
        if self.rows != rows || self.width != width || rows == 0 {
            let got = format!("[{}, {}]", self.rows, self.width);
            return Err(Error::argument(argument, got, format!("[{rows}, {width}], at least one row")));
        }
        let end = self.offset.checked_add(self.bytes());
        let aligned = self.offset.is_multiple_of(gpu.limits().min_storage_buffer_offset_alignment.into());
        let usage = self.buffer.usage().contains(wgpu::BufferUsages::STORAGE);
        if !aligned || !usage || end.is_none_or(|end| end > self.buffer.size()) {
            let got = format!("{} bytes from {} of {:?}", self.bytes(), self.offset, self.buffer.usage());
            let rule = format!("an aligned range within the storage buffer's {} bytes", self.buffer.size());
            return Err(Error::argument(argument, got, rule));
        }
        let max = gpu.limits().max_storage_buffer_binding_size;
        if self.bytes() > max {
            let (need, have) = (format!("{} bytes", self.bytes()), format!("{max} bytes in a storage binding"));
            return Err(Error::Unsupported { what: argument, need, have, hint: "; use smaller steps".to_owned() });
        }
        Ok(())
    }
}

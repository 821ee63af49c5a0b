//! What plain WGSL loops reach on the adapter: the rates that the kernels are compared with.

use std::borrow::Cow;
use std::time::Duration;

use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{AdapterClass, Gpu, KvCache, Profile, ShaderChecks, wgpu};

use super::timer::{Sample, Timer, median};

/// A loop, ready to be recorded.
pub(crate) struct Loop {
    /// Its element or accumulator type.
    pub(crate) name: String,
    /// Bytes read, or floating-point operations.
    pub(crate) work: f64,
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
    workgroups: u32,
}

impl Loop {
    /// `text` has the entry point `main` and, as bindings of group 0, `buffers`; the last one is written.
    fn new(gpu: &Gpu, name: String, text: &str, buffers: &[&wgpu::Buffer], workgroups: u32, work: f64) -> Self {
        let device = gpu.device();
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&name),
            layout: None,
            module: &module(gpu, text),
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        Self { name, work, pipeline, bind_group, workgroups }
    }

    pub(crate) fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[]);
        pass.dispatch_workgroups(self.workgroups, 1, 1);
    }

    pub(crate) fn measure(&self, timer: &Timer) -> Sample {
        timer.measure(|pass| self.record(pass))
    }

    /// Work per second, by a few passes after the one in which the driver compiles.
    fn rate(&self, timer: &Timer) -> f64 {
        self.measure(timer);
        let samples: Vec<_> = (0..5).map(|_| self.measure(timer)).collect();
        self.work / median(&samples, Sample::time)
    }
}

fn best(timer: &Timer, loops: impl IntoIterator<Item = Loop>) -> Loop {
    loops
        .into_iter()
        .map(|l| (l.rate(timer), l))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, l)| l)
        .expect("at least one loop")
}

/// The loops get the same treatment as the kernels that are compared with them.
#[allow(unsafe_code, reason = "the trusted-shader switch; see the SAFETY comment")]
fn module(gpu: &Gpu, text: &str) -> wgpu::ShaderModule {
    let source = wgpu::ShaderSource::Wgsl(Cow::Borrowed(text));
    let descriptor = wgpu::ShaderModuleDescriptor { label: Some("plain loop"), source };
    match gpu.shader_checks() {
        ShaderChecks::Full => gpu.device().create_shader_module(descriptor),
        // SAFETY: the loops below count up to a constant, and index what they are sized by: `Shape::new` rounds down to whole iterations.
        ShaderChecks::Trusted => unsafe {
            gpu.device().create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked())
        },
    }
}

/// What suits the adapter, whichever kernels are forced onto it.
fn profile(gpu: &Gpu) -> Profile {
    if gpu.adapter_class() == AdapterClass::Cpu { Profile::Cpu } else { Profile::Gpu }
}

/// Invocations of a workgroup: a subgroup on CPU adapters.
fn lanes(gpu: &Gpu) -> u32 {
    match profile(gpu) {
        Profile::Cpu => gpu.subgroup_size().unwrap_or(8),
        Profile::Gpu => 256,
    }
}

/// llvmpipe stops counting an invocation's loop iterations at 65 535, so no loop here takes more.
const MAX_ITERATIONS: u32 = 1 << 15;

/// Who reads which elements.
struct Shape {
    lanes: u32,
    workgroups: u32,
    /// Loop iterations of an invocation, two elements of each buffer in each.
    iterations: u32,
    /// The first element of an invocation, as WGSL over `group` and `lane`.
    first: String,
    /// Between an invocation's elements.
    stride: u32,
}

impl Shape {
    /// Cuts `elements`, rounded down a little, into a contiguous range per workgroup on CPU adapters, and interleaves them over all
    /// invocations on GPUs.
    fn new(gpu: &Gpu, elements: u32) -> Self {
        let lanes = lanes(gpu);
        let per_iteration = 2 * lanes;
        let most = if profile(gpu) == Profile::Cpu { 256 } else { 1024 };
        let workgroups = most.min(elements / per_iteration).max(elements / per_iteration / MAX_ITERATIONS).max(1);
        let iterations = elements / per_iteration / workgroups;
        let (first, stride) = match profile(gpu) {
            Profile::Cpu => (format!("group * {}u + lane", iterations * per_iteration), lanes),
            Profile::Gpu => (format!("group * {lanes}u + lane"), workgroups * lanes),
        };
        Self { lanes, workgroups, iterations, first, stride }
    }

    fn elements(&self) -> f64 {
        2.0 * f64::from(self.lanes) * f64::from(self.workgroups) * f64::from(self.iterations)
    }
}

/// The fastest loop that reads the first `side_bytes` bytes of a layer's K and of its V.
pub(crate) fn read_loop(timer: &Timer, cache: &KvCache, side_bytes: u64) -> Loop {
    let gpu = timer.gpu();
    let mut widths = vec![("f32", 4, "+", "bitcast<u32>(sum)"), ("vec4<f32>", 16, "+", "bitcast<u32>(dot(sum, sum))")];
    if gpu.features().contains(wgpu::Features::SHADER_INT64) {
        widths.push(("vec4<u64>", 32, "^", "u32(sum.x ^ sum.y) ^ u32((sum.z ^ sum.w) >> 32u)"));
    }
    let loops = widths.into_iter().map(|(element, bytes, op, fold)| {
        let shape = Shape::new(gpu, u32::try_from(side_bytes / bytes).expect("fewer than 2^32 elements"));
        let Shape { lanes, workgroups, iterations, first, stride } = &shape;
        let text = format!(
            "@group(0) @binding(0) var<storage, read> k: array<{element}>;
            @group(0) @binding(1) var<storage, read> v: array<{element}>;
            @group(0) @binding(2) var<storage, read_write> out: array<u32>;
            @compute @workgroup_size({lanes})
            fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {{
                let group = id.x;
                var at = {first};
                var a: {element}; var b: {element}; var c: {element}; var d: {element};
                for (var i = 0u; i < {iterations}u; i++) {{
                    a = a {op} k[at];
                    b = b {op} v[at];
                    c = c {op} k[at + {stride}u];
                    d = d {op} v[at + {stride}u];
                    at += {twice}u;
                }}
                let sum = (a {op} b) {op} (c {op} d);
                out[group * {lanes}u + lane] = {fold};
            }}",
            twice = 2 * stride,
        );
        let out = gpu.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some("plain loop"),
            size: u64::from(workgroups * lanes) * 4,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        });
        let (k, v) = cache.layer_buffers(0).expect("a layer");
        let bytes = 2.0 * shape.elements() * bytes as f64;
        Loop::new(gpu, element.to_owned(), &text, &[&k[0], &v[0], &out], *workgroups, bytes)
    });
    best(timer, loops)
}

/// The fastest loop of independent multiply-adds, at least some milliseconds long. Also checks the timer's timestamps with it.
pub(crate) fn multiply_add_loop(timer: &mut Timer) -> Loop {
    let gpu = timer.gpu().clone();
    let mut workgroups = 16;
    let first = loop {
        let l = multiply_adds(&gpu, "f32", 1, 8, workgroups);
        l.measure(timer);
        if (0..3).any(|_| l.measure(timer).wall > Duration::from_millis(3)) || workgroups > 1 << 14 {
            break l;
        }
        workgroups *= 2;
    };
    timer.check_timestamps(|pass| first.record(pass));
    let shapes = [("f32", 1, 12), ("vec4<f32>", 4, 2), ("vec4<f32>", 4, 3)];
    let others = shapes.map(|(ty, width, count)| multiply_adds(&gpu, ty, width, count, workgroups));
    best(timer, std::iter::once(first).chain(others))
}

/// `count` accumulators of `width` lanes each.
fn multiply_adds(gpu: &Gpu, ty: &str, width: u32, count: u32, workgroups: u32) -> Loop {
    const ITERATIONS: u32 = 1024;
    const UNROLL: u32 = 16;
    let lanes = lanes(gpu);
    let each = |statement: &dyn Fn(u32) -> String| (0..count).map(statement).collect::<Vec<_>>().join(" ");
    let start = each(&|i| format!("var a{i} = {ty}(f32(lane + {i}u));"));
    let body = each(&|i| format!("a{i} = fma(a{i}, x, y);")).repeat(UNROLL as usize);
    let sum = (0..count).map(|i| format!("a{i}")).collect::<Vec<_>>().join(" + ");
    let text = format!(
        "@group(0) @binding(0) var<storage, read> factors: array<f32>;
        @group(0) @binding(1) var<storage, read_write> out: array<{ty}>;
        @compute @workgroup_size({lanes})
        fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {{
            let x = {ty}(factors[0]);
            let y = {ty}(factors[1]);
            {start}
            for (var i = 0u; i < {ITERATIONS}u; i++) {{ {body} }}
            out[id.x * {lanes}u + lane] = {sum};
        }}"
    );
    let factors = gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: Some("plain loop"),
        // The accumulators approach 1.
        contents: bytemuck::cast_slice(&[0.999_f32, 0.001]),
        usage: wgpu::BufferUsages::STORAGE,
    });
    let out = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("plain loop"),
        size: u64::from(workgroups * lanes * width) * 4,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let invocations = f64::from(lanes) * f64::from(workgroups);
    let flop = 2.0 * f64::from(width * count * UNROLL * ITERATIONS) * invocations;
    Loop::new(gpu, format!("{count} x {ty}"), &text, &[&factors, &out], workgroups, flop)
}

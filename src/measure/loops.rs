//! [`PlainLoop`]: what plain WGSL loops reach on the adapter, the rates that the kernels are compared with.

use std::sync::Arc;
use std::time::Duration;

use minijinja::{Value, context};

use super::{Rounds, Sample, Spread, Timer, interleave};
use crate::error::{Error, Result};
use crate::gpu::{Dispatch, Gpu, Program, Recorder};
use crate::kernel::{Access, AdapterClass, Binding, Profile, ShaderFeatures, Source, render};

/// A loop, ready to be recorded.
#[derive(Debug)]
pub struct PlainLoop {
    gpu: Gpu,
    name: String,
    work: f64,
    program: Arc<Program>,
    buffers: Vec<wgpu::Buffer>,
    workgroups: u32,
}

/// llvmpipe stops counting an invocation's loop iterations at 65 535, so no loop here takes more.
const MAX_ITERATIONS: u32 = 1 << 15;
/// Runs of a loop by which the fastest one is chosen.
const TRIALS: usize = 5;

impl PlainLoop {
    fn new(
        gpu: &Gpu,
        name: impl Into<String>,
        source: Source,
        buffers: Vec<wgpu::Buffer>,
        workgroups: u32,
        work: f64,
    ) -> Result<Self> {
        let program = gpu.block_on(Program::get(gpu, source))?;
        Ok(Self { gpu: gpu.clone(), name: name.into(), work, program, buffers, workgroups })
    }

    /// Its element or accumulator type.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes read or written, or floating-point operations, of which a multiply-add is two.
    #[must_use]
    pub fn work(&self) -> f64 {
        self.work
    }

    /// Records one run.
    ///
    /// # Errors
    /// [`Error::Wgpu`]; [`Error::DeviceLost`].
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>) -> Result<()> {
        let resources = self.buffers.iter().map(wgpu::Buffer::as_entire_binding).collect();
        let dispatch = Dispatch { program: &self.program, resources, grid: [self.workgroups, 1, 1] };
        Recorder::from(pass).record(&self.gpu, "folio plain loop", &[dispatch], &[])
    }

    /// Submits one run and waits for it.
    ///
    /// # Errors
    /// Those of [`Timer::measure`].
    pub fn measure(&self, timer: &Timer) -> Result<Sample> {
        timer.measure(|pass| self.record(pass))
    }

    /// Work per second over some runs, after one in which the driver compiles.
    ///
    /// # Errors
    /// Those of [`Timer::measure`].
    pub fn rate(&self, timer: &Timer, rounds: impl Into<Rounds>) -> Result<Spread> {
        let spreads = interleave(1, rounds, |_| Ok::<_, Error>(self.measure(timer)?.time()))?;
        Ok(spreads[0].rate(self.work))
    }
}

/// The loop with the highest rate.
fn best(timer: &Timer, loops: Vec<PlainLoop>) -> Result<PlainLoop> {
    let mut best: Option<(f64, PlainLoop)> = None;
    for plain in loops {
        let rate = plain.rate(timer, TRIALS)?.median;
        if best.as_ref().is_none_or(|(most, _)| rate > *most) {
            best = Some((rate, plain));
        }
    }
    best.map(|(_, plain)| plain).ok_or_else(|| Error::argument("loops", "none", "at least one"))
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

/// Who reads which elements.
struct Shape {
    lanes: u32,
    workgroups: u32,
    /// Loop iterations of an invocation, two elements of each buffer in each.
    iterations: u32,
    /// Between the first elements of workgroups.
    group_stride: u32,
    /// Between an invocation's elements.
    stride: u32,
}

impl Shape {
    /// Cuts `bytes` in elements of `element_bytes`, rounded down a little, into a contiguous range per workgroup on CPU adapters, and interleaves them over
    /// all invocations on GPUs.
    fn new(gpu: &Gpu, bytes: u64, element_bytes: u64) -> Result<Self> {
        let lanes = lanes(gpu);
        let per_iteration = 2 * lanes;
        let need = format!("at least {} bytes, and fewer than 2^32 elements", u64::from(per_iteration) * element_bytes);
        let elements = u32::try_from(bytes / element_bytes).ok().filter(|&elements| elements >= per_iteration);
        let elements = elements.ok_or_else(|| Error::argument("bytes", bytes, need))?;
        let most = if profile(gpu) == Profile::Cpu { 256 } else { 1024 };
        let workgroups = most.min(elements / per_iteration).max(elements / per_iteration / MAX_ITERATIONS).max(1);
        let iterations = elements / per_iteration / workgroups;
        let (group_stride, stride) = match profile(gpu) {
            Profile::Cpu => (iterations * per_iteration, lanes),
            Profile::Gpu => (lanes, workgroups * lanes),
        };
        Ok(Self { lanes, workgroups, iterations, group_stride, stride })
    }

    /// Of one buffer.
    fn elements(&self) -> f64 {
        2.0 * f64::from(self.lanes) * f64::from(self.workgroups) * f64::from(self.iterations)
    }

    fn invocations(&self) -> u64 {
        u64::from(self.lanes) * u64::from(self.workgroups)
    }
}

fn source(entry_point: &'static str, context: Value, bindings: Vec<Binding>, lanes: u32) -> Result<Source> {
    Ok(Source {
        entry_point,
        text: render(&format!("measure/{entry_point}.wgsl"), context)?,
        bindings,
        workgroup_size: lanes,
        workgroup_bytes: 0,
        features: ShaderFeatures::default(),
    })
}

fn check_holds(argument: &'static str, buffer: &wgpu::Buffer, bytes: u64) -> Result<()> {
    if buffer.size() >= bytes {
        return Ok(());
    }
    Err(Error::argument(argument, format!("a buffer of {} bytes", buffer.size()), format!("at least {bytes} bytes")))
}

fn storage(gpu: &Gpu, bytes: u64) -> Result<wgpu::Buffer> {
    gpu.create_buffer("creating a plain loop", "folio plain loop", bytes.max(16), wgpu::BufferUsages::STORAGE)
}

/// The fastest loop that reads the first `side_bytes` bytes of two buffers, such as a layer's K and V. **Submits** to find out.
///
/// # Errors
/// [`Error::Argument`] for fewer bytes than an iteration reads, more than a buffer has, or 2^32 elements; [`Error::Wgpu`]; [`Error::DeviceLost`].
pub fn read_loop(timer: &Timer, k: &wgpu::Buffer, v: &wgpu::Buffer, side_bytes: u64) -> Result<PlainLoop> {
    let gpu = timer.gpu();
    check_holds("k", k, side_bytes)?;
    check_holds("v", v, side_bytes)?;
    let mut widths = vec![("f32", 4, "+", "bitcast<u32>(sum)"), ("vec4<f32>", 16, "+", "bitcast<u32>(dot(sum, sum))")];
    let int64 = gpu.features().contains(wgpu::Features::SHADER_INT64);
    if int64 {
        widths.push(("vec4<u64>", 32, "^", "u32(sum.x ^ sum.y) ^ u32((sum.z ^ sum.w) >> 32u)"));
    }
    let mut loops = Vec::new();
    for (element, bytes, op, fold) in widths {
        let shape = Shape::new(gpu, side_bytes, bytes)?;
        let Shape { lanes, workgroups, iterations, group_stride, stride } = shape;
        let context = context! { element, op, fold, lanes, iterations, group_stride, stride };
        let bindings =
            vec![Binding::new("k", Access::Read), Binding::new("v", Access::Read), Binding::new("out", Access::Write)];
        let mut source = source("plain_read", context, bindings, lanes)?;
        source.features.int64 = bytes == 32;
        let out = storage(gpu, shape.invocations() * 4)?;
        let work = 2.0 * shape.elements() * bytes as f64;
        loops.push(PlainLoop::new(gpu, element, source, vec![k.clone(), v.clone(), out], workgroups, work)?);
    }
    best(timer, loops)
}

/// The loop that copies the first `bytes` bytes of one buffer into another. Its work is what it reads and what it writes.
///
/// # Errors
/// Those of [`read_loop`].
pub fn copy_loop(timer: &Timer, source_buffer: &wgpu::Buffer, out: &wgpu::Buffer, bytes: u64) -> Result<PlainLoop> {
    check_holds("source_buffer", source_buffer, bytes)?;
    check_holds("out", out, bytes)?;
    let gpu = timer.gpu();
    let shape = Shape::new(gpu, bytes, 16)?;
    let Shape { lanes, workgroups, iterations, group_stride, stride } = shape;
    let bindings = vec![Binding::new("source", Access::Read), Binding::new("out", Access::Write)];
    let context = context! { lanes, iterations, group_stride, stride };
    let source = source("plain_copy", context, bindings, lanes)?;
    let buffers = vec![source_buffer.clone(), out.clone()];
    PlainLoop::new(gpu, "vec4<u32>", source, buffers, workgroups, 2.0 * shape.elements() * 16.0)
}

/// The accumulators approach 1.
const FACTORS: [f32; 2] = [0.999, 0.001];

fn factors(gpu: &Gpu) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::STORAGE;
    gpu.create_buffer_with("creating a plain loop", "folio plain loop", bytemuck::cast_slice(&FACTORS), usage)
}

/// A pass of plain arithmetic takes at least this: shorter ones measure the submit.
const MIN_PASS: Duration = Duration::from_millis(3);
/// Workgroups that no adapter needs more of to be busy for [`MIN_PASS`].
const MAX_WORKGROUPS: u32 = 1 << 14;

/// Makes a loop with as many workgroups as take some milliseconds.
fn long_enough(timer: &Timer, make: impl Fn(u32) -> Result<PlainLoop>) -> Result<(PlainLoop, u32)> {
    let mut workgroups = 16;
    loop {
        let plain = make(workgroups)?;
        plain.measure(timer)?;
        let mut is_long = workgroups >= MAX_WORKGROUPS;
        for _ in 0..3 {
            is_long = is_long || plain.measure(timer)?.wall > MIN_PASS;
        }
        if is_long {
            return Ok((plain, workgroups));
        }
        workgroups *= 2;
    }
}

/// The fastest loop of independent f32 multiply-adds, at least some milliseconds long. Also checks the timer's timestamps with it. **Submits** to find out.
///
/// # Errors
/// [`Error::Wgpu`]; [`Error::DeviceLost`].
pub fn multiply_add_loop(timer: &mut Timer) -> Result<PlainLoop> {
    let gpu = timer.gpu().clone();
    let (first, workgroups) = long_enough(timer, |workgroups| multiply_adds(&gpu, "f32", 1, 8, workgroups))?;
    timer.check_timestamps(|pass| first.record(pass))?;
    let mut loops = vec![first];
    for (element, width, count) in [("f32", 1, 12), ("vec4<f32>", 4, 2), ("vec4<f32>", 4, 3)] {
        loops.push(multiply_adds(&gpu, element, width, count, workgroups)?);
    }
    best(timer, loops)
}

/// `count` accumulators of `width` elements each.
fn multiply_adds(gpu: &Gpu, element: &str, width: u32, count: u32, workgroups: u32) -> Result<PlainLoop> {
    const ITERATIONS: u32 = 1024;
    const UNROLL: u32 = 16;
    let lanes = lanes(gpu);
    let bindings = vec![Binding::new("factors", Access::Read), Binding::new("out", Access::Write)];
    let context = context! { element, count, lanes, iterations => ITERATIONS, unroll => UNROLL };
    let source = source("plain_multiply_add", context, bindings, lanes)?;
    let out = storage(gpu, u64::from(workgroups * lanes * width) * 4)?;
    let invocations = f64::from(lanes) * f64::from(workgroups);
    let flop = 2.0 * f64::from(width * count * UNROLL * ITERATIONS) * invocations;
    PlainLoop::new(gpu, format!("{count} x {element}"), source, vec![factors(gpu)?, out], workgroups, flop)
}

/// The loop that reads 8 KiB of workgroup memory over and over, at least some milliseconds long. **Submits** to find out how long it must be.
///
/// # Errors
/// [`Error::Wgpu`]; [`Error::DeviceLost`].
pub fn workgroup_loop(timer: &Timer) -> Result<PlainLoop> {
    const ITERATIONS: u32 = 1024;
    /// Half of what WebGPU promises, of 16 bytes each; a power of two.
    const ELEMENTS: u32 = 512;
    let gpu = timer.gpu();
    let lanes = lanes(gpu);
    let make = |workgroups: u32| {
        let bindings = vec![Binding::new("factors", Access::Read), Binding::new("out", Access::Write)];
        let context = context! { lanes, iterations => ITERATIONS, elements => ELEMENTS };
        let mut source = source("plain_workgroup", context, bindings, lanes)?;
        source.workgroup_bytes = ELEMENTS * 16;
        let out = storage(gpu, u64::from(workgroups * lanes) * 16)?;
        // Four loads of 16 bytes.
        let work = f64::from(lanes) * f64::from(workgroups) * f64::from(ITERATIONS) * 64.0;
        PlainLoop::new(gpu, "vec4<f32>", source, vec![factors(gpu)?, out], workgroups, work)
    };
    Ok(long_enough(timer, make)?.0)
}

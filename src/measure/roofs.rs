//! [`Roofs`]: what the adapter can do at all.

use std::time::Instant;

use serde::Serialize;

use super::{PlainLoop, Rounds, Spread, Timer, copy_loop, interleave, multiply_add_loop, read_loop, workgroup_loop};
use crate::error::{Error, Result};
use crate::gpu::Gpu;

/// What a plain loop reaches.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Roof {
    /// Bytes, or floating-point operations, per second.
    pub per_second: Spread,
    /// Element or accumulator type of the fastest loop.
    pub by: String,
}

/// Rates that no kernel exceeds by much, and what comes on top of the kernels. Measured by [`RoofLoops::measure`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Roofs {
    /// Bytes read per second out of two buffers of [`Roofs::read_bytes`] bytes together.
    pub read: Roof,
    /// Bytes read by a run.
    pub read_bytes: u64,
    /// Bytes per second while one buffer is copied into another, read and written ones together.
    pub copy: Roof,
    /// f32 operations per second, two for a multiply-add.
    pub multiply_add: Roof,
    /// Bytes of workgroup memory read per second.
    pub workgroup: Roof,
    /// Seconds of one more dispatch of next to nothing in a pass, which has to wait for the one before it.
    pub dispatch: Spread,
    /// Seconds from recording a pass of next to nothing to its end, by the host's clock.
    pub submit: Spread,
    /// Seconds to copy 256 bytes back and map them, by the host's clock.
    pub readback: Spread,
}

/// Loops that do one thing only, the fastest of each kind. Programs that compare kernels with them let both take turns.
#[derive(Debug)]
#[non_exhaustive]
pub struct RoofLoops {
    /// Reads two buffers.
    pub read: PlainLoop,
    /// Copies one buffer into another.
    pub copy: PlainLoop,
    /// Multiplies and adds in registers.
    pub multiply_add: PlainLoop,
    /// Reads workgroup memory.
    pub workgroup: PlainLoop,
    nothing: PlainLoop,
    /// What [`RoofLoops::measure`] reads back.
    buffer: wgpu::Buffer,
}

/// Dispatches in a row that are compared with one.
const DISPATCHES: u32 = 64;

impl RoofLoops {
    /// Chooses loops over buffers of `side_bytes` bytes, of which there are two. They should be larger than the adapter's caches. **Submits and waits**
    /// to find out which ones are the fastest. Also checks the timer's timestamps.
    ///
    /// # Errors
    /// [`Error::Argument`] for buffers too small for a loop; [`Error::Wgpu`]; [`Error::DeviceLost`].
    pub fn new(timer: &mut Timer, side_bytes: u64) -> Result<Self> {
        let gpu = timer.gpu().clone();
        let multiply_add = multiply_add_loop(timer)?;
        let [k, v] = [buffer(&gpu, side_bytes)?, buffer(&gpu, side_bytes)?];
        Ok(Self {
            read: read_loop(timer, &k, &v, side_bytes)?,
            copy: copy_loop(timer, &k, &v, side_bytes)?,
            multiply_add,
            workgroup: workgroup_loop(timer)?,
            nothing: nothing(timer)?,
            buffer: k,
        })
    }

    /// Measures them in rounds in which they take turns. **Submits and waits.**
    ///
    /// # Errors
    /// [`Error::Wgpu`]; [`Error::DeviceLost`].
    pub fn measure(&self, timer: &Timer, rounds: impl Into<Rounds>) -> Result<Roofs> {
        let rounds = rounds.into();
        let loops = [&self.read, &self.copy, &self.multiply_add, &self.workgroup];
        let spreads = interleave(loops.len(), rounds, |i| Ok::<_, Error>(loops[i].measure(timer)?.time()))?;
        let roof = |i: usize| Roof { per_second: spreads[i].rate(loops[i].work()), by: loops[i].name().to_owned() };
        let row = |count: u32| timer.measure(|pass| (0..count).try_for_each(|_| self.nothing.record(pass)));
        let latency = interleave(4, rounds, |i| match i {
            0 => Ok(row(1)?.time()),
            1 => Ok(row(1 + DISPATCHES)?.time()),
            2 => Ok(row(1)?.wall),
            _ => {
                let start = Instant::now();
                timer.gpu().read_blocking(self.buffer.slice(..256))?;
                Ok::<_, Error>(start.elapsed())
            }
        })?;
        let one = latency[0].median;
        // A row is longer than a single one, whatever noise says.
        let each = |seconds: f64| ((seconds - one) / f64::from(DISPATCHES)).max(0.0);
        let Spread { median, low, high, rounds } = latency[1];
        Ok(Roofs {
            read: roof(0),
            read_bytes: self.read.work() as u64,
            copy: roof(1),
            multiply_add: roof(2),
            workgroup: roof(3),
            dispatch: Spread { median: each(median), low: each(low), high: each(high), rounds },
            submit: latency[2],
            readback: latency[3],
        })
    }
}

/// A dispatch of next to nothing.
fn nothing(timer: &Timer) -> Result<PlainLoop> {
    /// More than one iteration of any workgroup copies.
    const BYTES: u64 = 16 << 10;
    let gpu = timer.gpu();
    copy_loop(timer, &buffer(gpu, BYTES)?, &buffer(gpu, BYTES)?, BYTES)
}

fn buffer(gpu: &Gpu, bytes: u64) -> Result<wgpu::Buffer> {
    // wgpu fills what nobody has written with zeros once, before its first use.
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    gpu.create_buffer("creating buffers to measure with", "folio measure", bytes.max(256), usage)
}

//! How long compute passes take: by the GPU's clock where it can be believed, by the host's elsewhere.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::gpu::{Gpu, Readback};

/// How long one pass took.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Encode, submit and wait, on the host's clock.
    pub wall: Duration,
    /// From the beginning to the end of the pass, on the GPU's clock.
    pub gpu: Option<Duration>,
}

impl Sample {
    /// The GPU's clock where there is one.
    #[must_use]
    pub fn time(&self) -> Duration {
        self.gpu.unwrap_or(self.wall)
    }
}

/// The median of one clock over samples, in seconds; infinite without any.
#[must_use]
pub fn median(samples: &[Sample], clock: impl Fn(&Sample) -> Duration) -> f64 {
    let mut seconds: Vec<f64> = samples.iter().map(|sample| clock(sample).as_secs_f64()).collect();
    seconds.sort_by(f64::total_cmp);
    match seconds.len() {
        0 => f64::INFINITY,
        n => (seconds[(n - 1) / 2] + seconds[n / 2]) / 2.0,
    }
}

/// Submits compute passes one at a time, and times them. With [`GpuOptions::timestamps`](crate::GpuOptions::timestamps) it reads the GPU's clock.
#[derive(Debug)]
pub struct Timer {
    gpu: Gpu,
    timestamps: Option<Timestamps>,
}

#[derive(Debug)]
struct Timestamps {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    readback: Readback,
    /// Seconds of a tick.
    tick: f64,
}

/// Two timestamps.
const TIMESTAMP_BYTES: u64 = 2 * size_of::<u64>() as u64;

impl Timer {
    /// Reads the GPU's clock if the device can.
    ///
    /// # Errors
    /// [`Error::Wgpu`]; [`Error::DeviceLost`].
    pub fn new(gpu: &Gpu) -> Result<Self> {
        let timestamps = if gpu.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            let queries = gpu.scoped_now("creating a query set", || {
                gpu.device().create_query_set(&wgpu::QuerySetDescriptor {
                    label: Some("folio timestamps"),
                    ty: wgpu::QueryType::Timestamp,
                    count: 2,
                })
            })?;
            let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
            Some(Timestamps {
                queries,
                resolved: gpu.create_buffer("creating a timer", "folio timestamps", TIMESTAMP_BYTES, usage)?,
                readback: Readback::new(gpu, TIMESTAMP_BYTES)?,
                tick: f64::from(gpu.queue().get_timestamp_period()) * 1e-9,
            })
        } else {
            None
        };
        Ok(Self { gpu: gpu.clone(), timestamps })
    }

    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Which clock counts.
    #[must_use]
    pub fn clock(&self) -> &'static str {
        if self.timestamps.is_some() { "GPU timestamps" } else { "wall clock" }
    }

    /// Keeps the GPU's clock only if it agrees with the host's on a pass of some milliseconds: some adapters write both timestamps when the
    /// commands are translated, or write zeros.
    ///
    /// # Errors
    /// Those of the pass, and of [`Timer::measure`].
    pub fn check_timestamps(&mut self, pass: impl Fn(&mut wgpu::ComputePass<'_>) -> Result<()>) -> Result<()> {
        if self.timestamps.is_none() {
            return Ok(());
        }
        let samples = (0..5).map(|_| self.measure(&pass)).collect::<Result<Vec<_>>>()?;
        let sane = samples.iter().all(|sample| sample.gpu.is_some_and(|gpu| gpu <= sample.wall));
        let agrees = sane && 2.0 * median(&samples, Sample::time) > median(&samples, |sample| sample.wall);
        if !agrees {
            self.timestamps = None;
        }
        Ok(())
    }

    /// Records a pass, **submits** it and waits for it.
    ///
    /// # Errors
    /// Those of `record`; [`Error::Wgpu`]; [`Error::DeviceLost`].
    pub fn measure(&self, record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> Result<()>) -> Result<Sample> {
        let start = Instant::now();
        let mut encoder = self.gpu.encoder()?;
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: None,
                timestamp_writes: self.timestamps.as_ref().map(|t| wgpu::ComputePassTimestampWrites {
                    query_set: &t.queries,
                    beginning_of_pass_write_index: Some(0),
                    end_of_pass_write_index: Some(1),
                }),
            });
            record(&mut pass)?;
        }
        self.gpu.block_on(self.gpu.submit("timing a pass", encoder))?;
        let waited = self.gpu.device().poll(wgpu::PollType::wait_indefinitely());
        waited.map_err(|error| Error::wgpu("waiting for the GPU", error))?;
        let wall = start.elapsed();
        Ok(Sample { wall, gpu: self.timestamps.as_ref().map(|t| self.read(t)).transpose()?.flatten() })
    }

    /// The time between the two timestamps, in a submit of its own; `None` if they make no sense.
    fn read(&self, timestamps: &Timestamps) -> Result<Option<Duration>> {
        let Timestamps { queries, resolved, readback, tick } = timestamps;
        let mut encoder = self.gpu.encoder()?;
        encoder.resolve_query_set(queries, 0..2, resolved, 0);
        encoder.copy_buffer_to_buffer(resolved, 0, readback.buffer(), 0, TIMESTAMP_BYTES);
        self.gpu.block_on(self.gpu.submit("reading timestamps", encoder))?;
        let words = self.gpu.block_on(readback.words(&self.gpu, TIMESTAMP_BYTES))?;
        let ticks = |at: usize| u64::from(words[at]) | u64::from(words[at + 1]) << 32;
        let (begin, end) = (ticks(0), ticks(2));
        Ok((begin > 0 && end > begin).then(|| Duration::from_secs_f64((end - begin) as f64 * tick)))
    }
}

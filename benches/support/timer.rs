//! One pass, submitted and waited for, by two clocks.

use std::time::{Duration, Instant};

use folio::{Gpu, wgpu};

/// How long one pass took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Encode, submit and wait, on the host's clock.
    pub(crate) wall: Duration,
    /// From the beginning to the end of the pass, on the GPU's clock.
    pub(crate) gpu: Option<Duration>,
}

impl Sample {
    /// The GPU's clock where there is one.
    pub(crate) fn time(&self) -> Duration {
        self.gpu.unwrap_or(self.wall)
    }
}

/// The median of one clock over samples, in seconds.
pub(crate) fn median(samples: &[Sample], clock: impl Fn(&Sample) -> Duration) -> f64 {
    let mut seconds: Vec<f64> = samples.iter().map(|s| clock(s).as_secs_f64()).collect();
    seconds.sort_by(f64::total_cmp);
    match seconds.len() {
        0 => f64::NAN,
        n => (seconds[(n - 1) / 2] + seconds[n / 2]) / 2.0,
    }
}

/// Submits passes one at a time.
pub(crate) struct Timer {
    gpu: Gpu,
    timestamps: Option<Timestamps>,
}

struct Timestamps {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    readback: wgpu::Buffer,
    /// Seconds of a tick.
    tick: f64,
}

const TIMESTAMP_BYTES: u64 = 2 * size_of::<u64>() as u64;

impl Timer {
    /// Reads the GPU's clock if the device can.
    pub(crate) fn new(gpu: &Gpu) -> Self {
        let timestamps = gpu.features().contains(wgpu::Features::TIMESTAMP_QUERY).then(|| {
            let device = gpu.device();
            let buffer = |usage| {
                device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("timestamps"),
                    size: TIMESTAMP_BYTES,
                    usage,
                    mapped_at_creation: false,
                })
            };
            Timestamps {
                queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                    label: Some("timestamps"),
                    ty: wgpu::QueryType::Timestamp,
                    count: 2,
                }),
                resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
                readback: buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST),
                tick: f64::from(gpu.queue().get_timestamp_period()) * 1e-9,
            }
        });
        Self { gpu: gpu.clone(), timestamps }
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Which clock counts.
    pub(crate) fn clock(&self) -> &'static str {
        if self.timestamps.is_some() { "GPU timestamps" } else { "wall clock" }
    }

    /// Keeps the GPU's clock only if it agrees with the host's on a pass of some milliseconds: some adapters write both timestamps when the
    /// commands are translated, or write zeros.
    pub(crate) fn check_timestamps(&mut self, pass: impl Fn(&mut wgpu::ComputePass<'_>)) {
        let samples: Vec<_> = (0..5).map(|_| self.measure(&pass)).collect();
        let sane = samples.iter().all(|sample| sample.gpu.is_some_and(|gpu| gpu <= sample.wall));
        let agrees = sane && 2.0 * median(&samples, Sample::time) > median(&samples, |sample| sample.wall);
        if !agrees {
            self.timestamps = None;
        }
    }

    /// Records a pass, submits it and waits for it.
    pub(crate) fn measure(&self, record: impl FnOnce(&mut wgpu::ComputePass<'_>)) -> Sample {
        let start = Instant::now();
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: None,
                timestamp_writes: self.timestamps.as_ref().map(|t| wgpu::ComputePassTimestampWrites {
                    query_set: &t.queries,
                    beginning_of_pass_write_index: Some(0),
                    end_of_pass_write_index: Some(1),
                }),
            });
            record(&mut pass);
        }
        self.submit_and_wait(encoder);
        let wall = start.elapsed();
        Sample { wall, gpu: self.timestamps.as_ref().and_then(|t| self.read(t)) }
    }

    fn submit_and_wait(&self, encoder: wgpu::CommandEncoder) {
        self.gpu.queue().submit([encoder.finish()]);
        self.gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device is there");
    }

    /// The time between the two timestamps, in a submit of its own; `None` if they make no sense.
    fn read(&self, timestamps: &Timestamps) -> Option<Duration> {
        let Timestamps { queries, resolved, readback, tick } = timestamps;
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.resolve_query_set(queries, 0..2, resolved, 0);
        encoder.copy_buffer_to_buffer(resolved, 0, readback, 0, TIMESTAMP_BYTES);
        self.gpu.queue().submit([encoder.finish()]);
        readback.map_async(wgpu::MapMode::Read, .., |result| result.expect("a mappable buffer"));
        self.gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device is there");
        let ticks: Vec<u64> = {
            let mapped = readback.get_mapped_range(..).expect("mapped");
            mapped.chunks_exact(8).map(bytemuck::pod_read_unaligned).collect()
        };
        readback.unmap();
        let (begin, end) = (ticks[0], ticks[1]);
        (begin > 0 && end > begin).then(|| Duration::from_secs_f64((end - begin) as f64 * tick))
    }
}

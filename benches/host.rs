//! What a decode step costs on the host: reserving and planning, and recording 32 layers; and what it costs to fork a long sequence and
//! to find a long prompt in the prefix index. Nothing is computed on the GPU.
//!
//! `cargo bench --bench host [-- FILTER]`; `FOLIO_ADAPTER` names the adapter.
//!
//! The loop is a steady one: between the timed parts the step is committed and truncated away again.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::panic,
    reason = "a benchmark prints what it measured, and stops where it can't"
)]

mod support {
    pub(crate) mod adapter;
}

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use folio::{Attention, AttentionConfig, AttentionPlan, Gpu, KvCache, KvCacheConfig, KvFormat, SequenceId, Step, wgpu};

use support::adapter;

const NUM_LAYERS: u32 = 32;
/// Keys of a sequence, about.
const SEQ_LEN: u32 = 2048;
const BLOCK_SIZE: u32 = 16;
const NUM_Q_HEADS: u32 = 4;
/// The cost doesn't depend on the size of a row, the pool does.
const HEAD_DIM: u32 = 8;
/// Of a step for 64 sequences.
const BAR: Duration = Duration::from_millis(2);

/// A decode loop that stands still.
struct Decoder {
    cache: KvCache,
    attention: Attention,
    /// The batch of a step.
    batch: Vec<(SequenceId, u32)>,
    /// Tokens of each sequence between steps.
    lens: Vec<u32>,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    q: wgpu::Buffer,
    out: wgpu::Buffer,
}

impl Decoder {
    fn new(gpu: &Gpu, num_sequences: u32) -> folio::Result<Self> {
        let cache = KvCache::new_blocking(
            gpu,
            KvCacheConfig::new(NUM_LAYERS, 1, HEAD_DIM)
                .with_blocks(num_sequences * (SEQ_LEN / BLOCK_SIZE + 1), BLOCK_SIZE)
                .with_formats(KvFormat::F16, KvFormat::F16),
        )?;
        let attention = Attention::new_blocking(&cache, AttentionConfig::new(NUM_Q_HEADS))?;
        // A few sequences need a new block in a step, as in a real batch.
        let lens: Vec<u32> = (0..num_sequences).map(|i| SEQ_LEN - i % BLOCK_SIZE).collect();
        let fill: Vec<_> = lens.iter().map(|&len| (cache.create_sequence(), len)).collect();
        cache.commit(cache.begin_step(&fill)?)?;
        let buffer = |heads: u32| {
            gpu.device().create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: u64::from(num_sequences * heads * HEAD_DIM) * 4,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            })
        };
        let (k, v, q, out) = (buffer(1), buffer(1), buffer(NUM_Q_HEADS), buffer(NUM_Q_HEADS));
        let batch = fill.into_iter().map(|(sequence, _)| (sequence, 1)).collect();
        Ok(Self { cache, attention, batch, lens, k, v, q, out })
    }

    fn plan(&self) -> (Step, AttentionPlan) {
        let step = self.cache.begin_step(&self.batch).expect("room for a step");
        let plan = self.attention.plan(&step).expect("a plan");
        (step, plan)
    }

    /// All layers, in a pass each for append and attention.
    fn record(&self, step: &Step, plan: &AttentionPlan) -> wgpu::CommandEncoder {
        let device = self.cache.gpu().device();
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for layer in 0..NUM_LAYERS {
            self.cache.append(&mut encoder, step, layer, &self.k, &self.v, None).expect("append");
            self.attention.attend(&mut encoder, plan, layer, &self.q, &self.out).expect("attend");
        }
        encoder
    }

    /// All layers in one pass of the host's.
    fn record_in_pass(&self, step: &Step, plan: &AttentionPlan) -> wgpu::CommandEncoder {
        let device = self.cache.gpu().device();
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        for layer in 0..NUM_LAYERS {
            self.cache.append(&mut pass, step, layer, &self.k, &self.v, None).expect("append");
            self.attention.attend(&mut pass, plan, layer, &self.q, &self.out).expect("attend");
        }
        drop(pass);
        encoder
    }

    /// Ends a step and takes its tokens back.
    fn end(&self, step: Step) {
        self.cache.commit(step).expect("commit");
        for (&(sequence, _), &len) in self.batch.iter().zip(&self.lens) {
            self.cache.truncate(sequence, len).expect("truncate");
        }
        self.settle();
    }

    /// Lets wgpu do what it leaves for the next submit: write buffers, and forget what has been dropped.
    fn settle(&self) {
        let gpu = self.cache.gpu();
        gpu.queue().submit([]);
        gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device is there");
    }
}

/// Runs one part of a step over and over; returns what each run took.
fn bench(criterion: &mut Criterion, id: &str, mut timed: impl FnMut() -> Duration) -> Option<Duration> {
    let mut times = Vec::new();
    criterion.bench_function(id, |bencher| {
        bencher.iter_custom(|iterations| {
            let start = times.len();
            times.extend((0..iterations).map(|_| timed()));
            times[start..].iter().sum()
        });
    });
    times.sort();
    times.get(times.len() / 2).copied()
}

fn bench_sequences(criterion: &mut Criterion, gpu: &Gpu, num_sequences: u32) -> Vec<(String, Duration)> {
    let decoder = Decoder::new(gpu, num_sequences).unwrap_or_else(|error| panic!("{num_sequences} sequences: {error}"));
    let mut rows = Vec::new();
    let mut run = |name: &str, timed: &mut dyn FnMut() -> Duration| {
        let time = bench(criterion, &format!("{name}/{num_sequences}"), timed);
        rows.extend(time.map(|time| (name.to_owned(), time)));
    };
    run("begin_step + plan", &mut || {
        let start = Instant::now();
        let (step, plan) = decoder.plan();
        let time = start.elapsed();
        drop(plan);
        decoder.end(step);
        time
    });
    let (step, plan) = decoder.plan();
    run("record 32 layers", &mut || {
        let start = Instant::now();
        let recorded = black_box(decoder.record(&step, &plan));
        let time = start.elapsed();
        drop(recorded);
        decoder.settle();
        time
    });
    run("record 32 layers in one pass", &mut || {
        let start = Instant::now();
        let recorded = black_box(decoder.record_in_pass(&step, &plan));
        let time = start.elapsed();
        drop(recorded);
        decoder.settle();
        time
    });
    run("finish the encoder (wgpu)", &mut || {
        let encoder = decoder.record(&step, &plan);
        let start = Instant::now();
        let recorded = black_box(encoder.finish());
        let time = start.elapsed();
        drop(recorded);
        decoder.settle();
        time
    });
    decoder.end(step);
    run(WHOLE, &mut || {
        let start = Instant::now();
        let (step, plan) = decoder.plan();
        let commands = black_box(decoder.record(&step, &plan).finish());
        let time = start.elapsed();
        drop((commands, plan));
        decoder.end(step);
        time
    });
    rows
}

/// Of a long prompt.
const LONG_LEN: u32 = 32_768;

/// Forks, publications and look-ups of one long prompt.
fn bench_sharing(criterion: &mut Criterion, gpu: &Gpu) -> folio::Result<Vec<(String, Duration)>> {
    let cache = KvCache::new_blocking(
        gpu,
        KvCacheConfig::new(1, 1, HEAD_DIM)
            .with_blocks(LONG_LEN / BLOCK_SIZE, BLOCK_SIZE)
            .with_formats(KvFormat::F16, KvFormat::F16),
    )?;
    // Ids as they come from a vocabulary.
    let tokens: Vec<u32> = (0..LONG_LEN).map(|i| i.wrapping_mul(0x9e37_79b9) % 50_257).collect();
    let sequence = cache.create_sequence();
    cache.commit(cache.begin_step(&[(sequence, LONG_LEN)])?)?;
    let forget = || cache.forget_prefixes(0).expect("a published prompt");
    let publish = || cache.publish_prefix(sequence, &tokens, 0).expect("the sequence has the tokens");
    let free = |made: SequenceId| cache.free(made).expect("a new sequence");
    let mut rows = Vec::new();
    let mut run = |name: &str, timed: &mut dyn FnMut() -> Duration| {
        let time = bench(criterion, name, timed);
        rows.extend(time.map(|time| (name.to_owned(), time)));
    };
    run("fork", &mut || {
        let (time, fork) = timed(|| cache.fork(sequence));
        free(fork.expect("a fork"));
        time
    });
    run("fork within the last block", &mut || {
        let (time, fork) = timed(|| cache.fork_at(sequence, LONG_LEN - 5));
        free(fork.expect("a fork"));
        time
    });
    run("publish", &mut || {
        let (time, _) = timed(publish);
        forget();
        time
    });
    publish();
    run("match, in use elsewhere", &mut || {
        let (time, hit) = timed(|| cache.match_prefix(&tokens, 0));
        free(hit.sequence);
        time
    });
    cache.free(sequence)?;
    run("match, only indexed", &mut || {
        let (time, hit) = timed(|| cache.match_prefix(&tokens, 0));
        free(hit.sequence);
        time
    });
    run("free what is indexed", &mut || {
        let hit = cache.match_prefix(&tokens, 0);
        timed(|| free(hit.sequence)).0
    });
    Ok(rows)
}

/// What a call takes, and returns.
fn timed<T>(call: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = black_box(call());
    (start.elapsed(), result)
}

const WHOLE: &str = "plan, record and finish 32 layers";

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .nresamples(10_000)
        .configure_from_args();
    let Some(gpu) = adapter::open() else { return };
    let measured = [64, 256].map(|n| (n, bench_sequences(&mut criterion, &gpu, n)));
    let sharing = bench_sharing(&mut criterion, &gpu).unwrap_or_else(|error| panic!("a long prompt: {error}"));
    criterion.final_summary();
    println!("\nfolio on the host, with {}: medians, decode, {SEQ_LEN} keys a sequence", adapter::describe(&gpu));
    for (num_sequences, rows) in &measured {
        for (name, time) in rows {
            println!("{num_sequences:>4} sequences  {name:<34} {:>8.3} ms", time.as_secs_f64() * 1e3);
        }
    }
    let blocks = LONG_LEN / BLOCK_SIZE;
    for (name, time) in &sharing {
        println!("{LONG_LEN} tokens, {blocks} blocks  {name:<28} {:>8.1} us", time.as_secs_f64() * 1e6);
    }
    let whole = measured[0].1.iter().find(|(name, _)| name == WHOLE);
    if let Some((_, time)) = whole {
        let verdict = if *time < BAR { "met" } else { "MISSED" };
        println!("bar: planning and recording 32 layers for 64 sequences in under {BAR:?}: {time:.2?}, {verdict}");
    }
}

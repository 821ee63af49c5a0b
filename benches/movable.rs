//! What it costs to swap a sequence of 32 768 tokens out to the host and in again.
//!
//! `cargo bench --bench movable [-- FILTER] [-- --quick]`; `FOLIO_ADAPTER` names the adapter.
//!
//! Out: record, submit, wait, map, free the blocks. In: reserve, record, submit, commit, wait. Beside them stands a plain copy of as many bytes
//! from host memory to host memory, the least that either can cost.
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

use criterion::{Criterion, SamplingMode, Throughput};
use folio::{Gpu, KvCache, KvCacheConfig, KvFormat, SequenceId, SequenceSnapshot, wgpu};

use support::adapter;

const TOKENS: u32 = 32_768;
/// A small model: 128 MiB of F16 for the sequence.
const CONFIG: KvCacheConfig =
    KvCacheConfig::new(4, 4, 64).with_blocks(TOKENS / 16, 16).with_formats(KvFormat::F16, KvFormat::F16);

fn encoder(gpu: &Gpu) -> wgpu::CommandEncoder {
    gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
}

fn swap_out(cache: &KvCache, sequence: SequenceId) -> folio::Result<SequenceSnapshot> {
    let gpu = cache.gpu();
    let mut encoder = encoder(gpu);
    let leaving = cache.swap_out(&mut encoder, sequence)?;
    gpu.queue().submit([encoder.finish()]);
    gpu.block_on(leaving.finish())
}

fn swap_in(cache: &KvCache, snapshot: &SequenceSnapshot) -> folio::Result<SequenceId> {
    let gpu = cache.gpu();
    let mut encoder = encoder(gpu);
    let arriving = cache.swap_in(&mut encoder, snapshot)?;
    gpu.queue().submit([encoder.finish()]);
    let sequence = arriving.commit()?;
    gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device is there");
    Ok(sequence)
}

/// Medians over all iterations.
#[derive(Default)]
struct Times {
    out: Vec<Duration>,
    back: Vec<Duration>,
    copy: Vec<Duration>,
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(3))
        .nresamples(10_000)
        .configure_from_args();
    let Some(gpu) = adapter::open() else { return };
    let cache = KvCache::new_blocking(&gpu, CONFIG).unwrap_or_else(|error| panic!("{error}"));
    let mut sequence = cache.create_sequence();
    // The cost doesn't depend on what the rows are.
    let step = cache.begin_step(&[(sequence, TOKENS)]).expect("room for the sequence");
    cache.commit(step).expect("an open step");
    let bytes = CONFIG.token_bytes() * u64::from(TOKENS);

    let mut times = Times::default();
    let mut group = criterion.benchmark_group("swap");
    group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Bytes(2 * bytes));
    group.bench_function("32k tokens, out and in", |bencher| {
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                let start = Instant::now();
                let snapshot = swap_out(&cache, sequence).unwrap_or_else(|error| panic!("{error}"));
                times.out.push(start.elapsed());
                let start = Instant::now();
                sequence = swap_in(&cache, &snapshot).unwrap_or_else(|error| panic!("{error}"));
                times.back.push(start.elapsed());
                total += times.out.last().copied().unwrap_or_default() + start.elapsed();
                let start = Instant::now();
                drop(black_box(snapshot.clone()));
                times.copy.push(start.elapsed());
            }
            total
        });
    });
    group.finish();
    criterion.final_summary();
    if times.out.is_empty() {
        return;
    }
    println!(
        "\n{TOKENS} tokens, {:.0} MiB, on {}; medians",
        bytes as f64 / f64::from(1 << 20),
        adapter::describe(&gpu)
    );
    for (name, times) in
        [("swap out", &mut times.out), ("swap in", &mut times.back), ("copy on the host", &mut times.copy)]
    {
        let time = median(times).as_secs_f64();
        println!("{name:<18} {:>9.2} ms {:>8.2} GB/s", time * 1e3, bytes as f64 / time / 1e9);
    }
}

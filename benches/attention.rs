//! Decode and prefill against plain read and multiply-add loops, on one adapter and in one run.
//!
//! `cargo bench --bench attention [-- FILTER] [-- --quick]`; `FOLIO_ADAPTER` names the adapter, `FOLIO_PROFILE=gpu|cpu` forces a kernel family.
//!
//! Every iteration times one attention call, by GPU timestamps where they make sense and by the wall clock (encode, submit and wait) elsewhere,
//! and after it, untimed by criterion, the plain loop. The table at the end compares their medians: whatever else slows the machine down meets
//! both alike.
//!
//! Races (`-- race`) let the formats take turns on D1, D2 and an append, the contiguous cache with the paged one, and blocks read once for all who
//! share them with blocks read for each; they print ratios of medians.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::panic,
    reason = "a benchmark prints what it measured, and stops where it can't"
)]

mod support {
    pub(crate) mod adapter;
    pub(crate) mod limits;
    pub(crate) mod race;
    pub(crate) mod shape;
    pub(crate) mod timer;
}

use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput};
use fastrand::Rng;
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{
    Attention, AttentionConfig, AttentionPlan, Cascade, Gpu, KvCache, KvCacheConfig, KvFormat, KvFormats, SequenceId,
    Step, wgpu,
};

use support::limits::{Loop, multiply_add_loop, read_loop};
use support::race::{Contestant, Race};
use support::shape::{COMMON, SHAPES, Shape};
use support::timer::{Sample, Timer, median};
use support::{adapter, timer};

const BLOCK_SIZE: u32 = 16;

/// What races: every format. The first one is what the others are compared with.
fn racing() -> impl Iterator<Item = KvFormats> {
    const BASE: KvFormats = KvFormats::both(KvFormat::F16);
    std::iter::once(BASE).chain(KvFormats::ALL.into_iter().filter(|&formats| formats != BASE))
}

/// A planned attention call over a filled cache.
struct Call {
    attention: Attention,
    plan: AttentionPlan,
    q: wgpu::Buffer,
    out: wgpu::Buffer,
    /// The plan is good for as long as its step.
    _step: Step,
}

impl Call {
    fn new(gpu: &Gpu, attention: Attention, step: Step, shape: &Shape, rng: &mut Rng) -> folio::Result<Self> {
        let plan = attention.plan(&step)?;
        let elements = step.num_tokens() * shape.num_q_heads * shape.head_dim;
        let (q, out) = (random(gpu, elements, rng), random(gpu, elements, rng));
        Ok(Self { attention, plan, q, out, _step: step })
    }

    fn measure(&self, timer: &Timer) -> Sample {
        timer.measure(|pass| {
            self.attention.attend(pass, &self.plan, 0, &self.q, &self.out).expect("a valid call");
        })
    }
}

/// A paged cache with a step that is open, planned, and appended.
struct Prepared {
    cache: KvCache,
    call: Call,
}

impl Prepared {
    fn new(gpu: &Gpu, shape: &Shape, formats: KvFormats) -> folio::Result<Self> {
        let mut rng = Rng::with_seed(1);
        let cache = paged(gpu, shape, formats, &mut rng)?;
        let attention = Attention::new_blocking(&cache, AttentionConfig::new(shape.num_q_heads))?;
        let sequences: Vec<_> = (0..shape.batch).map(|_| cache.create_sequence()).collect();
        for query_len in shape.context_steps() {
            let step = append(&cache, &sequences, query_len, &mut rng)?;
            cache.commit(step)?;
        }
        let step = append(&cache, &sequences, shape.query_len, &mut rng)?;
        let call = Call::new(gpu, attention, step, shape, &mut rng)?;
        Ok(Self { cache, call })
    }
}

/// An empty cache with its blocks in random order.
fn paged(gpu: &Gpu, shape: &Shape, formats: KvFormats, rng: &mut Rng) -> folio::Result<KvCache> {
    let cache = KvCache::new_blocking(
        gpu,
        KvCacheConfig::new(1, shape.num_kv_heads, shape.head_dim)
            .with_blocks(shape.batch * shape.seq_len.div_ceil(BLOCK_SIZE) + 16, BLOCK_SIZE)
            .with_formats(formats.k, formats.v),
    )?;
    if formats.k.has_channel_scales() {
        let keys: Vec<f32> = (0..shape.num_kv_heads * shape.head_dim * 64).map(|_| rng.f32() - 0.5).collect();
        cache.calibrate_keys(0, &keys)?;
    }
    shuffle_blocks(&cache, rng)?;
    Ok(cache)
}

/// The same call over a contiguous cache.
fn contiguous(gpu: &Gpu, shape: &Shape, formats: KvFormats) -> folio::Result<Call> {
    let mut rng = Rng::with_seed(1);
    let config = KvCacheConfig::contiguous(1, shape.num_kv_heads, shape.head_dim, shape.batch, shape.seq_len);
    let cache = KvCache::new_blocking(gpu, config.with_formats(formats.k, formats.v))?;
    let rows: Vec<_> = (0..shape.batch).map(|_| cache.create_sequence()).collect();
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(shape.num_q_heads))?;
    let mut append = |query_len| {
        let batch: Vec<_> = rows.iter().map(|&row| (row, query_len)).collect();
        let step = cache.begin_step(&batch)?;
        let elements = step.num_tokens() * shape.num_kv_heads * shape.head_dim;
        let (k, v) = (random(gpu, elements, &mut rng), random(gpu, elements, &mut rng));
        submit(gpu, |encoder| cache.append(encoder, &step, 0, &k, &v, None))?;
        Ok::<_, folio::Error>(step)
    };
    for query_len in shape.context_steps() {
        cache.commit(append(query_len)?)?;
    }
    let step = append(shape.query_len)?;
    Call::new(gpu, attention, step, shape, &mut rng)
}

/// Takes all blocks and gives them back in random order.
fn shuffle_blocks(cache: &KvCache, rng: &mut Rng) -> folio::Result<()> {
    let mut holders: Vec<_> = (0..cache.config().num_blocks).map(|_| (cache.create_sequence(), BLOCK_SIZE)).collect();
    let step = cache.begin_step(&holders)?;
    cache.commit(step)?;
    rng.shuffle(&mut holders);
    holders.into_iter().try_for_each(|(holder, _)| cache.free(holder))
}

/// Appends random rows to every sequence, and submits. The step stays open.
fn append(cache: &KvCache, sequences: &[SequenceId], tokens: u32, rng: &mut Rng) -> folio::Result<Step> {
    let gpu = cache.gpu();
    let batch: Vec<_> = sequences.iter().map(|&sequence| (sequence, tokens)).collect();
    let step = cache.begin_step(&batch)?;
    let elements = step.num_tokens() * cache.config().num_kv_heads * cache.config().head_dim;
    let (k, v) = (random(gpu, elements, rng), random(gpu, elements, rng));
    submit(gpu, |encoder| cache.append(encoder, &step, 0, &k, &v, None))?;
    Ok(step)
}

fn submit(gpu: &Gpu, record: impl FnOnce(&mut wgpu::CommandEncoder) -> folio::Result<()>) -> folio::Result<()> {
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    record(&mut encoder)?;
    gpu.queue().submit([encoder.finish()]);
    Ok(())
}

fn random(gpu: &Gpu, elements: u32, rng: &mut Rng) -> wgpu::Buffer {
    let values: Vec<f32> = (0..elements).map(|_| (rng.f32() - 0.5) * 3.0).collect();
    gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(&values),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

/// A line of the table.
struct Row {
    shape: Shape,
    format: KvFormat,
    samples: Vec<Sample>,
    limit: Vec<Sample>,
    limit_work: f64,
    limit_name: String,
}

impl Row {
    fn print(&self) {
        let time = median(&self.samples, Sample::time);
        let wall = median(&self.samples, |sample| sample.wall);
        let rate = self.shape.work(self.format) as f64 / time;
        let limit = self.limit_work / median(&self.limit, Sample::time);
        let unit = if self.shape.is_decode() { "GB/s" } else { "GFLOP/s" };
        println!(
            "{:<40} {:<4} {:>10.3} {:>10.3} {:>9.1} {:<7} {:>9.1} {:<13} {:>4.0} %",
            self.shape.describe(),
            self.format.to_string(),
            time * 1e3,
            wall * 1e3,
            rate / 1e9,
            unit,
            limit / 1e9,
            self.limit_name,
            100.0 * rate / limit,
        );
    }
}

fn print_table(timer: &Timer, rows: &[Row]) {
    println!("\nfolio attention on {}, timed by {}", adapter::describe(timer.gpu()), timer.clock());
    println!(
        "medians; blocks of {BLOCK_SIZE}, shuffled; rates count the K and V read by decode and the visible pairs of prefill\n"
    );
    println!(
        "{:<40} {:<4} {:>10} {:>10} {:>17} {:>23} {:>6}",
        "new tokens over keys", "KV", "time ms", "wall ms", "rate", "plain loop", "of it"
    );
    rows.iter().for_each(Row::print);
}

/// Times a shape, each iteration followed by one of the loop. `None` if the command line leaves it out.
fn bench(
    criterion: &mut Criterion,
    timer: &Timer,
    multiply_adds: &Loop,
    shape: &Shape,
    format: KvFormat,
) -> Option<Row> {
    let mut prepared: Option<(Prepared, Option<Loop>)> = None;
    let (mut samples, mut limit) = (Vec::new(), Vec::new());
    let mut group = criterion.benchmark_group(shape.id);
    group.sampling_mode(SamplingMode::Flat);
    let work = shape.work(format);
    group.throughput(if shape.is_decode() { Throughput::Bytes(work) } else { Throughput::Elements(work) });
    group.bench_function(format.to_string(), |bencher| {
        let (prepared, read) = prepared.get_or_insert_with(|| {
            let prepared = Prepared::new(timer.gpu(), shape, KvFormats::both(format))
                .unwrap_or_else(|error| panic!("{}, {format}: {error}", shape.describe()));
            let read = shape.is_decode().then(|| read_loop(timer, &prepared.cache, shape.side_bytes(format)));
            // The driver's compiler runs at the first dispatch.
            prepared.call.measure(timer);
            (prepared, read)
        });
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                let sample = prepared.call.measure(timer);
                total += sample.time();
                samples.push(sample);
                limit.push(read.as_ref().unwrap_or(multiply_adds).measure(timer));
            }
            total
        });
    });
    group.finish();
    let (_, read) = prepared?;
    let plain = read.as_ref().unwrap_or(multiply_adds);
    Some(Row { shape: *shape, format, samples, limit, limit_work: plain.work, limit_name: plain.name.clone() })
}

/// All formats on one shape of decode.
fn race_decode(criterion: &mut Criterion, timer: &Timer, shape: &'static Shape) -> Option<Race> {
    let title = format!("decode, {}", shape.describe());
    Race::run(criterion, timer, &format!("{} formats", shape.id), title, 0, || {
        let contestant = |formats: KvFormats| {
            let prepared = ready(Prepared::new(timer.gpu(), shape, formats));
            let bytes = prepared.cache.config().token_bytes() * u64::from(shape.batch * shape.seq_len);
            Contestant::new(formats, bytes, move |timer| prepared.call.measure(timer))
        };
        racing().map(contestant).collect()
    })
}

/// All formats on one append of 2048 tokens with the heads of D1; the rate counts the f32 rows that come in.
fn race_append(criterion: &mut Criterion, timer: &Timer) -> Option<Race> {
    const SHAPE: Shape = Shape { id: "append", query_len: 256, seq_len: 256, ..SHAPES[0] };
    let tokens = SHAPE.batch * SHAPE.query_len;
    let title = format!("append, {tokens} tokens of {} heads, d {}", SHAPE.num_kv_heads, SHAPE.head_dim);
    Race::run(criterion, timer, SHAPE.id, title, 0, || {
        let contestant = |formats: KvFormats| {
            let gpu = timer.gpu();
            let mut rng = Rng::with_seed(1);
            let cache = ready(paged(gpu, &SHAPE, formats, &mut rng));
            let batch: Vec<_> = (0..SHAPE.batch).map(|_| (cache.create_sequence(), SHAPE.query_len)).collect();
            let step = ready(cache.begin_step(&batch));
            let elements = tokens * SHAPE.num_kv_heads * SHAPE.head_dim;
            let (k, v) = (random(gpu, elements, &mut rng), random(gpu, elements, &mut rng));
            Contestant::new(formats, k.size() + v.size(), move |timer| {
                timer.measure(|pass| cache.append(pass, &step, 0, &k, &v, None).expect("a valid call"))
            })
        };
        racing().map(contestant).collect()
    })
}

/// The contiguous cache against the paged one.
fn race_contiguous(criterion: &mut Criterion, timer: &Timer, shape: &'static Shape) -> Option<Race> {
    let title = format!("decode, {}, F16", shape.describe());
    Race::run(criterion, timer, &format!("{} contiguous", shape.id), title, 0, || {
        let formats = KvFormats::both(KvFormat::F16);
        let paged = ready(Prepared::new(timer.gpu(), shape, formats));
        let contiguous = ready(contiguous(timer.gpu(), shape, formats));
        let bytes = 2 * shape.side_bytes(KvFormat::F16);
        vec![
            Contestant::new("paged", bytes, move |timer| paged.call.measure(timer)),
            Contestant::new("contiguous", bytes, move |timer| contiguous.measure(timer)),
        ]
    })
}

/// Texts behind a common prefix, with shared blocks read for each of them and once for all.
fn race_cascade(criterion: &mut Criterion, timer: &Timer, shape: &Shape, format: KvFormat) -> Option<Race> {
    const PREFIX: u32 = 2048;
    let (branches, own) = (shape.batch, shape.seq_len - PREFIX);
    let title = format!("decode, {} of which {PREFIX} are common, {format}", shape.describe());
    Race::run(criterion, timer, &format!("cascade {}, {format}", shape.id), title, 0, || {
        let contestant = |name: &str, cascade| {
            let gpu = timer.gpu();
            let mut rng = Rng::with_seed(1);
            let cache = ready(paged(gpu, shape, KvFormats::both(format), &mut rng));
            let mut config = AttentionConfig::new(shape.num_q_heads);
            config.cascade = cascade;
            let attention = ready(Attention::new_blocking(&cache, config));
            let first = cache.create_sequence();
            for _ in 0..PREFIX / 256 {
                ready(cache.commit(ready(append(&cache, &[first], 256, &mut rng))));
            }
            let mut sequences = vec![first];
            sequences.extend((1..branches).map(|_| ready(cache.fork(first))));
            ready(cache.commit(ready(append(&cache, &sequences, own - 1, &mut rng))));
            let step = ready(append(&cache, &sequences, 1, &mut rng));
            let call = ready(Call::new(gpu, attention, step, shape, &mut rng));
            let rows = call.plan.step_plan().lists.kv_rows_read(shape.num_kv_heads);
            let bytes = rows * 2 * u64::from(shape.head_dim * format.element_bits() / 8);
            Contestant::new(format!("{name}, {rows} rows"), bytes, move |timer| call.measure(timer))
        };
        vec![contestant("each", Cascade::Never), contestant("once", Cascade::Always)]
    })
}

fn ready<T>(result: folio::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .nresamples(10_000)
        .configure_from_args();
    let Some(gpu) = adapter::open() else { return };
    let mut timer = timer::Timer::new(&gpu);
    let multiply_adds = multiply_add_loop(&mut timer);
    let mut rows = Vec::new();
    for shape in &SHAPES {
        for format in [KvFormat::F32, KvFormat::F16] {
            rows.extend(bench(&mut criterion, &timer, &multiply_adds, shape, format));
        }
    }
    let mut races = Vec::new();
    for shape in &SHAPES[..2] {
        races.extend(race_decode(&mut criterion, &timer, shape));
        races.extend(race_contiguous(&mut criterion, &timer, shape));
    }
    races.extend(race_append(&mut criterion, &timer));
    for shape in &COMMON {
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
            races.extend(race_cascade(&mut criterion, &timer, shape, format));
        }
    }
    criterion.final_summary();
    if !rows.is_empty() {
        print_table(&timer, &rows);
    }
    if !races.is_empty() {
        println!("\nraces on {}, timed by {}; medians", adapter::describe(timer.gpu()), timer.clock());
        races.iter().for_each(Race::print);
    }
}

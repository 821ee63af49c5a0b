//! `folio formats`: what a cache format costs and what it loses.
//!
//! One long sequence is cached in each format, and a step of decode is timed and compared with the f64 oracle over the rows before they were stored,
//! within the bound that follows from the format.
//!
//! Keys have outliers in a few channels, as real models' keys have: large, of nearly the same value in all tokens. A scale per token has to
//! span them; a scale per channel has not. Times are medians of rounds in which all formats take turns, so that whatever else slows the
//! machine down meets all alike.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use fastrand::Rng;
use folio::measure::{Spread, interleave};
use folio::reference::{BoundedOutput, ErrorModel, Options as OracleOptions, Problem, attention_with_bound, compare};
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{
    Attention, AttentionConfig, AttentionPlan, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, KvFormats, Step, wgpu,
};

use crate::files::{check_target, write_texts};
use crate::plot::{Axis, Plot, Series, Style, count};
use crate::stdout;

const NUM_Q_HEADS: u32 = 8;
const NUM_KV_HEADS: u32 = 2;
const HEAD_DIM: u32 = 128;
const BLOCK_SIZE: u32 = 16;
/// Elements of a token's K or V row.
const ROW: usize = (NUM_KV_HEADS * HEAD_DIM) as usize;
/// Elements of a token's Q row.
const Q_ROW: usize = (NUM_Q_HEADS * HEAD_DIM) as usize;
/// Query tokens whose outputs are compared, so that errors are those of many rows.
const QUERIES: usize = 8;

/// Compare the cache formats: bytes, decode time, error against an exact oracle
///
/// One sequence with outliers in a few channels of its keys, as real models have them, cached in each format. Every error is within the bound that follows
/// from the format, or the command fails.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// Keys of the sequence
    #[arg(long, default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(16..=1 << 20), value_name = "N")]
    tokens: u32,
    /// Formats of K and V, `k:v`, or one name for both; a table line each. F16 is always there
    #[arg(long, value_delimiter = ',', default_value = DEFAULT_FORMATS, value_name = "K:V,...")]
    pairs: Vec<KvFormats>,
    /// At most 2048 tokens and few rounds
    #[arg(long)]
    quick: bool,
    /// Part of an adapter's name [default: the best adapter]
    #[arg(long, value_name = "NAME", env = "FOLIO_ADAPTER")]
    adapter: Option<String>,
    /// Also draw errors against bytes, as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Every format.
const DEFAULT_FORMATS: &str = "f32,f16,e4m3,int8,int8-channel,int4,int4-channel,int4-channel:int8,int8-channel:int4";

const F16: KvFormats = KvFormats::both(KvFormat::F16);

/// What is cached and asked.
struct Data {
    /// `[tokens, NUM_KV_HEADS, HEAD_DIM]`
    k: Vec<f32>,
    /// `[tokens, NUM_KV_HEADS, HEAD_DIM]`
    v: Vec<f32>,
    /// `[QUERIES, NUM_Q_HEADS, HEAD_DIM]`
    q: Vec<f32>,
}

impl Data {
    fn new(tokens: usize) -> Self {
        let mut rng = Rng::with_seed(1);
        let mut normal = move || {
            // The sum of four uniform numbers has variance 1/3.
            ((0..4).map(|_| rng.f32() - 0.5).sum::<f32>()) * 1.732
        };
        // (mean, deviation) of every channel of K. In each head 4 of 128 are outliers.
        let channels: Vec<(f32, f32)> = (0..ROW)
            .map(|i| match i % HEAD_DIM as usize {
                17 => (14.0, 1.0),
                46 => (-9.0, 2.0),
                81 => (-17.0, 1.5),
                110 => (8.0, 2.0),
                _ => (0.0, 1.0),
            })
            .collect();
        let k =
            (0..tokens).flat_map(|_| channels.clone()).map(|(mean, deviation)| mean + deviation * normal()).collect();
        let v = (0..tokens * ROW).map(|_| normal()).collect();
        // Logits of deviation 3: attention that picks some keys out of thousands.
        let q = (0..QUERIES * Q_ROW).map(|_| 3.0 * normal()).collect();
        Self { k, v, q }
    }

    /// The exact outputs, and how far a correct kernel may be from them. Every query sees all keys.
    fn attend(&self, pair: KvFormats, key_scales: Option<&[f32]>) -> Result<BoundedOutput> {
        let mut options = OracleOptions::default();
        options.causal = false;
        let problem = Problem {
            num_q_heads: NUM_Q_HEADS as usize,
            num_kv_heads: NUM_KV_HEADS as usize,
            head_dim: HEAD_DIM as usize,
            value_dim: HEAD_DIM as usize,
            q: &self.q,
            k: &self.k,
            v: &self.v,
            options,
        };
        let mut model = ErrorModel::new(pair.k, pair.v);
        if let Some(scales) = key_scales {
            model = model.with_key_scales(scales);
        }
        Ok(attention_with_bound(&problem, &model)?)
    }
}

/// The sequence in one pair of formats, with the step open that brings its last token.
struct Cached {
    pair: KvFormats,
    cache: KvCache,
    attention: Attention,
    plan: AttentionPlan,
    out: wgpu::Buffer,
    /// The plan is good for as long as its step.
    _step: Step,
}

impl Cached {
    fn new(gpu: &Gpu, pair: KvFormats, data: &Data) -> Result<Self> {
        let tokens = (data.k.len() / ROW) as u32;
        let config = KvCacheConfig::new(1, NUM_KV_HEADS, HEAD_DIM)
            .with_blocks(tokens.div_ceil(BLOCK_SIZE), BLOCK_SIZE)
            .with_formats(pair.k, pair.v);
        let cache = KvCache::new_blocking(gpu, config).with_context(|| format!("a cache of {tokens} tokens"))?;
        if pair.k.has_channel_scales() {
            // From the first tokens, as an app would from a prompt.
            cache.calibrate_keys(0, &data.k[..data.k.len().min(1024 * ROW)])?;
        }
        let attention = Attention::new_blocking(&cache, AttentionConfig::new(NUM_Q_HEADS))?;
        let sequence = cache.create_sequence();
        let mut begin = 0;
        let step = loop {
            let end = if begin == tokens - 1 { tokens } else { (begin + 1024).min(tokens - 1) };
            let step = cache.begin_step(&[(sequence, end - begin)])?;
            let range = begin as usize * ROW..end as usize * ROW;
            let (k, v) = (upload(gpu, &data.k[range.clone()]), upload(gpu, &data.v[range]));
            let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            cache.append(&mut encoder, &step, 0, &k, &v, None)?;
            gpu.queue().submit([encoder.finish()]);
            if end == tokens {
                break step;
            }
            cache.commit(step)?;
            begin = end;
        };
        let plan = attention.plan(&step)?;
        let out = upload(gpu, &[f32::NAN; Q_ROW]);
        Ok(Self { pair, cache, attention, plan, out, _step: step })
    }

    /// Attends `repeats` times in one pass, and waits.
    fn attend(&self, q: &wgpu::Buffer, repeats: u32) -> Result<Duration> {
        let gpu = self.cache.gpu();
        let start = Instant::now();
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            for _ in 0..repeats {
                self.attention.attend(&mut pass, &self.plan, 0, q, &self.out)?;
            }
        }
        gpu.queue().submit([encoder.finish()]);
        gpu.device().poll(wgpu::PollType::wait_indefinitely())?;
        Ok(start.elapsed() / repeats)
    }

    /// Outputs of all queries, one after another.
    fn outputs(&self, queries: &[wgpu::Buffer]) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for q in queries {
            self.attend(q, 1)?;
            all.extend(self.cache.gpu().read_blocking(&self.out)?);
        }
        Ok(all)
    }
}

fn upload(gpu: &Gpu, values: &[f32]) -> wgpu::Buffer {
    gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(values),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

/// Passes shorter than this measure the submit rather than the kernel.
const MIN_PASS: Duration = Duration::from_millis(5);

pub(crate) fn run(options: &Options) -> ExitCode {
    match compare_formats(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare_formats(options: &Options) -> Result<()> {
    // Refused before anything is measured.
    options.svg.as_deref().map_or(Ok(()), check_target).context("svg")?;
    let (tokens, rounds) = if options.quick { (options.tokens.min(2048), 7) } else { (options.tokens, 25) };
    let mut pairs = options.pairs.clone();
    if !pairs.contains(&F16) {
        pairs.insert(0, F16);
    }
    let mut gpu_options = GpuOptions::default();
    gpu_options.adapter_name.clone_from(&options.adapter);
    let gpu = Gpu::open_blocking(gpu_options)?;

    let data = Data::new(tokens as usize);
    let queries: Vec<_> = data.q.chunks(Q_ROW).map(|q| upload(&gpu, q)).collect();
    let mut all = Vec::new();
    for pair in pairs {
        all.push(Cached::new(&gpu, pair, &data).with_context(|| pair.to_string())?);
    }
    // The first pass of each compiles; F16's second says how many fill a pass.
    let mut repeats = 1;
    for cached in &all {
        cached.attend(&queries[0], 1)?;
        if cached.pair == F16 {
            let once = cached.attend(&queries[0], 1)?.max(Duration::from_micros(1));
            repeats = MIN_PASS.div_duration_f64(once).ceil().clamp(1.0, 1000.0) as u32;
        }
    }
    let mut round = 0;
    let times = interleave(all.len(), rounds, |i| {
        round += 1;
        all[i].attend(&queries[round / all.len() % QUERIES], repeats)
    })?;
    let rows = all
        .iter()
        .zip(times)
        .map(|(cached, time)| Row::new(cached, time, &data, &queries))
        .collect::<Result<Vec<_>>>()?;
    if let Some(file) = &options.svg {
        write_texts(&[(file, &plot(&rows, tokens).svg_alone()?)])?;
    }
    print(&gpu, tokens, &data, &rows)
}

/// What was found of a format.
struct Row {
    pair: KvFormats,
    token_bytes: u64,
    time: Spread,
    worst_error: f64,
    mean_error: f64,
    /// The worst error of its bound: at most 1.
    of_bound: f64,
}

impl Row {
    fn new(cached: &Cached, time: Spread, data: &Data, queries: &[wgpu::Buffer]) -> Result<Self> {
        let got = cached.outputs(queries)?;
        let key_scales = cached.cache.key_scales(0);
        let expected = data.attend(cached.pair, key_scales.as_deref())?;
        let comparison = compare::out(&expected, &got);
        ensure!(comparison.is_within(), "{}: {comparison}", cached.pair);
        let errors = got.iter().zip(&expected.output.out).map(|(&got, want)| (f64::from(got) - want).abs());
        Ok(Self {
            pair: cached.pair,
            token_bytes: cached.cache.config().token_bytes(),
            time,
            worst_error: errors.clone().fold(0.0, f64::max),
            mean_error: errors.sum::<f64>() / got.len() as f64,
            of_bound: comparison.badness(),
        })
    }
}

fn plot(rows: &[Row], tokens: u32) -> Plot {
    let series = rows
        .iter()
        .map(|row| Series::new(row.pair.to_string(), Style::Marks, vec![(row.token_bytes as f64, row.mean_error)]));
    Plot {
        title: format!("Mean error of attention over {tokens} tokens against bytes of a token"),
        x: Axis { label: "bytes of a token in a layer", unit: count, log: Some(2.0) },
        y: Axis { label: "mean error", unit: |error| format!("{error:.0e}"), log: Some(10.0) },
        series: series.collect(),
    }
}

fn print(gpu: &Gpu, tokens: u32, data: &Data, rows: &[Row]) -> Result<()> {
    let want = data.attend(F16, None)?.output.out;
    let rms = (want.iter().map(|x| x * x).sum::<f64>() / want.len() as f64).sqrt();
    let f16 = rows.iter().find(|row| row.pair == F16).context("F16 is among the pairs")?;
    let mut table = Table::new();
    let header = ["K / V", "bytes/token", "of F16", "decode ms", "of F16", "worst error", "mean error", "of bound"]
        .map(str::to_owned);
    let lines = rows.iter().map(|row| {
        [
            row.pair.to_string(),
            row.token_bytes.to_string(),
            format!("{:.3}", row.token_bytes as f64 / f16.token_bytes as f64),
            format!("{:.3}", row.time.median * 1e3),
            format!("{:.3}", row.time.median / f16.time.median),
            format!("{:.2e}", row.worst_error),
            format!("{:.2e}", row.mean_error),
            format!("{:.3}", row.of_bound),
        ]
    });
    table.load_preset(presets::NOTHING).set_header(header).add_rows(lines);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    let text = format!(
        "adapter: {}, {:?} kernels\none token attends to {tokens}, {NUM_Q_HEADS}/{NUM_KV_HEADS} heads of {HEAD_DIM}; outputs are {rms:.3} (rms)\n\n{table}\n",
        gpu.adapter_info().name,
        gpu.profile()
    );
    stdout::print(&text)
}

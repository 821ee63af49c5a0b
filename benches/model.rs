//! Whole models: tokens per second of prefill and decode, against plain read and multiply-add loops, on one adapter and in one run.
//!
//! `cargo bench --features model --bench model [-- --quick] [-- --torch PYTHON]`; `FOLIO_ADAPTER` names the adapter.
//!
//! Every sample of folio is followed by one of the plain loop and, with `--torch`, by one of the same shape in PyTorch on the CPU
//! (`scripts/torch_decoder_bench.py`, a process that sleeps meanwhile), so that whatever else slows the machine down meets all alike.
//! Times are the wall clock of whole steps: recording, submit, sampling and readback included.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::panic,
    reason = "a benchmark prints what it measured, and stops where it can't"
)]

#[allow(dead_code, reason = "shared with the other benches")]
mod support {
    pub(crate) mod adapter;
    pub(crate) mod limits;
    pub(crate) mod timer;
}

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use folio::model::{
    Decoder, DecoderOptions, Input, Model, ModelConfig, ModelOptions, ModelResult, Sampling, TensorSource,
    WeightFormat, WeightSource,
};
use folio::{Gpu, KvCache, KvCacheConfig, KvFormat, SequenceId};

use support::limits::{Loop, multiply_add_loop, read_loop};
use support::timer::{Sample, Timer, median};
use support::{adapter, timer};

/// Prefill and decode of whole models against the adapter's limits.
#[derive(Parser)]
struct Options {
    /// A tenth of the samples
    #[arg(long)]
    quick: bool,
    /// Weight formats of the 100 M shape
    #[arg(long, value_delimiter = ',', default_value = "f16", value_name = "FORMATS")]
    weights: Vec<WeightFormat>,
    /// A Python with PyTorch: measures the same shape there, side by side
    #[arg(long, value_name = "PYTHON")]
    torch: Option<PathBuf>,
    /// What `cargo bench` passes
    #[arg(long, hide = true)]
    bench: bool,
}

/// Tokens of a prompt, and of the context that decode continues.
const PROMPT: u32 = 512;

const BATCHES: [u32; 3] = [1, 8, 32];

/// The `config.json` of a Llama with 98 million parameters.
const RANDOM_LLAMA: &str = r#"{
  "model_type": "llama", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
  "intermediate_size": 2048, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": true
}"#;

/// Weights that keep activations near 1, whatever they mean.
struct RandomWeights(RefCell<fastrand::Rng>);

impl WeightSource for RandomWeights {
    fn rows(&self, tensor: &TensorSource, _row_start: usize, out: &mut [f32]) -> ModelResult<()> {
        let [_, columns] = tensor.shape();
        // Vectors, which are norms here, have one column.
        let scale = (3.0 / columns as f32).sqrt();
        let mut rng = self.0.borrow_mut();
        out.fill_with(|| (2.0 * rng.f32() - 1.0) * scale);
        Ok(())
    }
}

/// PyTorch in a process of its own.
struct Torch {
    process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Torch {
    fn start(python: &Path, model: &[&str]) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/torch_decoder_bench.py");
        // As many as the adapter's, which on the machines that were measured has two.
        let threads = std::env::var("OMP_NUM_THREADS").unwrap_or_else(|_| "2".into());
        let mut process = Command::new(python)
            .arg(script)
            .args(["--serve", "--threads", &threads])
            .args(model)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| python.display().to_string())?;
        let requests = process.stdin.take().context("stdin of the Python process")?;
        let answers = BufReader::new(process.stdout.take().context("stdout of the Python process")?);
        let mut torch = Self { process, requests, answers };
        // It says when the model is loaded.
        torch.answer()?;
        Ok(torch)
    }

    fn answer(&mut self) -> Result<serde_json::Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("PyTorch said {line:?}"))
    }

    /// Seconds of one prefill or one decode step.
    fn measure(&mut self, request: &str) -> Result<f64> {
        writeln!(self.requests, "{request}")?;
        let answer = self.answer()?;
        answer["seconds"].as_f64().with_context(|| format!("PyTorch said {answer}, need a number called seconds"))
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        // It ends by itself with its input; nothing is lost if it can't be stopped sooner.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What is measured: a prompt, or a step of a batch.
#[derive(Clone, Copy)]
enum Job {
    Prefill,
    Decode(u32),
}

impl Job {
    fn describe(self) -> String {
        match self {
            Self::Prefill => format!("prefill {PROMPT}"),
            Self::Decode(batch) => format!("decode, batch {batch}"),
        }
    }

    fn request(self) -> String {
        match self {
            Self::Prefill => format!("prefill {PROMPT}"),
            Self::Decode(batch) => format!("decode {batch}"),
        }
    }

    fn tokens(self) -> u32 {
        match self {
            Self::Prefill => PROMPT,
            Self::Decode(batch) => batch,
        }
    }
}

struct Row {
    model: String,
    job: Job,
    folio: Vec<f64>,
    limit: Vec<Sample>,
    limit_work: f64,
    /// Bytes of weights (decode) or floating-point operations (prefill).
    work: f64,
    torch: Vec<f64>,
}

fn median_of(values: &[f64]) -> f64 {
    let samples: Vec<_> = values.iter().map(|&s| Sample { wall: Duration::from_secs_f64(s), gpu: None }).collect();
    median(&samples, |sample| sample.wall)
}

impl Row {
    fn print(&self) {
        let time = median_of(&self.folio);
        let (rate, limit) = (self.work / time, self.limit_work / median(&self.limit, |sample| sample.wall));
        let unit = if matches!(self.job, Job::Prefill) { "GFLOP/s" } else { "GB/s" };
        let torch = if self.torch.is_empty() {
            String::new()
        } else {
            let torch = median_of(&self.torch);
            format!("{:9.1} {:6.2}", f64::from(self.job.tokens()) / torch, torch / time)
        };
        println!(
            "{:<22} {:<17} {:>10.2} {:>10.1} {:>8.2} {unit:<7} {:>8.2} {:>5.0} % {torch}",
            self.model,
            self.job.describe(),
            time * 1e3,
            f64::from(self.job.tokens()) / time,
            rate / 1e9,
            limit / 1e9,
            100.0 * rate / limit,
        );
    }
}

struct Bench<'a> {
    timer: &'a Timer,
    multiply_adds: &'a Loop,
    reads: &'a Loop,
    samples: usize,
}

impl Bench<'_> {
    /// Measures a model in all jobs.
    fn run(&self, name: &str, model: Model, mut torch: Option<Torch>) -> Result<Vec<Row>> {
        let model = Arc::new(model);
        let most = BATCHES.into_iter().max().unwrap_or(1);
        let options = {
            let mut options = DecoderOptions::default();
            options.num_blocks = PROMPT.div_ceil(16) + most * 8;
            options.max_step_tokens = PROMPT;
            options
        };
        let mut decoder = Decoder::new_blocking(Arc::clone(&model), options)?;
        let gpu = decoder.gpu().clone();
        gpu.block_on(decoder.warm_up())?;
        let tokens: Vec<u32> = (0..PROMPT).map(|i| i * 7919 % model.config().vocab_size).collect();
        let mut rows = Vec::new();
        for job in [Job::Prefill].into_iter().chain(BATCHES.map(Job::Decode)) {
            let limit = if matches!(job, Job::Prefill) { self.multiply_adds } else { self.reads };
            let work = match job {
                Job::Prefill => flop(&model),
                Job::Decode(_) => model.streamed_bytes() as f64,
            };
            let mut row = Row {
                model: name.to_owned(),
                job,
                folio: Vec::new(),
                limit: Vec::new(),
                limit_work: limit.work,
                work,
                torch: Vec::new(),
            };
            let base = decoder.create_sequence();
            if matches!(job, Job::Decode(_)) {
                gpu.block_on(decoder.step(&[Input::new(base, &tokens)]))?;
            }
            let batch = if let Job::Decode(batch) = job { batch } else { 0 };
            let branches: Vec<_> = (0..batch).map(|_| decoder.fork(base)).collect::<Result<_, _>>()?;
            for sample in 0..=self.samples {
                let seconds = match job {
                    Job::Prefill => prefill(&mut decoder, &tokens)?,
                    Job::Decode(_) => decode(&mut decoder, &branches)?,
                };
                let loop_sample = limit.measure(self.timer);
                let torch_seconds = torch.as_mut().map(|torch| torch.measure(&job.request())).transpose()?;
                // The first of each compiles, allocates and warms caches.
                if sample > 0 {
                    row.folio.push(seconds);
                    row.limit.push(loop_sample);
                    row.torch.extend(torch_seconds);
                }
            }
            for sequence in branches.into_iter().chain([base]) {
                decoder.free(sequence)?;
            }
            row.print();
            rows.push(row);
        }
        Ok(rows)
    }
}

fn prefill(decoder: &mut Decoder, tokens: &[u32]) -> Result<f64> {
    let sequence = decoder.create_sequence();
    let greedy = Sampling::greedy();
    let gpu = decoder.gpu().clone();
    let start = Instant::now();
    gpu.block_on(decoder.step(&[Input::new(sequence, tokens).with_sampling(&greedy)]))?;
    let time = start.elapsed();
    decoder.free(sequence)?;
    Ok(time.as_secs_f64())
}

fn decode(decoder: &mut Decoder, sequences: &[SequenceId]) -> Result<f64> {
    let greedy = Sampling::greedy();
    let inputs: Vec<_> = sequences.iter().map(|&sequence| Input::new(sequence, &[1]).with_sampling(&greedy)).collect();
    let gpu = decoder.gpu().clone();
    let start = Instant::now();
    let tokens = gpu.block_on(decoder.step(&inputs))?;
    let time = start.elapsed();
    ensure!(tokens.iter().all(Option::is_some), "a sequence got no token");
    // The next step feeds the same single token.
    for &sequence in sequences {
        decoder.discard_pending(sequence)?;
    }
    Ok(time.as_secs_f64())
}

/// Floating-point operations of a prefill: the linear layers for all tokens, the head for the last, and causal attention.
fn flop(model: &Model) -> f64 {
    let config = model.config();
    let (tokens, hidden) = (f64::from(PROMPT), f64::from(config.hidden_size));
    let (q, kv) = (config.q_width() as f64, config.kv_width() as f64);
    let mlp = f64::from(config.intermediate_size) * if config.gated_mlp { 3.0 } else { 2.0 };
    let layer = 2.0 * hidden * (2.0 * q + 2.0 * kv + mlp) * tokens + 4.0 * q * tokens * (tokens + 1.0) / 2.0;
    f64::from(config.num_layers) * layer + 2.0 * hidden * f64::from(config.vocab_size)
}

fn random_llama(gpu: &Gpu, weights: WeightFormat) -> Result<Model> {
    let config = ModelConfig::from_json(RANDOM_LLAMA)?;
    let tensors = config.weights()?;
    let source = RandomWeights(RefCell::new(fastrand::Rng::with_seed(1)));
    Ok(Model::from_source_blocking(gpu, config, &tensors, &source, ModelOptions::new(weights), |_| {})?)
}

/// A side of a cache as large as the weights of a layer or two: beyond every cache of the processor.
fn read_source(gpu: &Gpu) -> folio::Result<KvCache> {
    KvCache::new_blocking(
        gpu,
        KvCacheConfig::new(1, 8, 128).with_blocks(1024, 16).with_formats(KvFormat::F32, KvFormat::F32),
    )
}

fn main() -> Result<()> {
    let options = Options::parse();
    let Some(gpu) = adapter::open() else { return Ok(()) };
    let mut timer = timer::Timer::new(&gpu);
    let multiply_adds = multiply_add_loop(&mut timer);
    let cache = read_source(&gpu)?;
    let reads = read_loop(&timer, &cache, 1024 * 16 * 8 * 128 * 4);
    let samples = if options.quick { 2 } else { 9 };
    let bench = Bench { timer: &timer, multiply_adds: &multiply_adds, reads: &reads, samples };

    println!("\nfolio models on {}; medians of {samples} steps, wall clock", adapter::describe(&gpu));
    println!("plain loops: {} reads, {} multiply-adds, wall clock as well", reads.name, multiply_adds.name);
    println!("decode counts the weights it reads, after {PROMPT} tokens of context; F16 cache, blocks of 16\n");
    println!(
        "{:<22} {:<17} {:>10} {:>10} {:>16} {:>8} {:>7} {}",
        "model, weights",
        "job",
        "time ms",
        "tokens/s",
        "rate",
        "plain",
        "of it",
        if options.torch.is_some() { "PyTorch/s  ratio" } else { "" }
    );
    let stories = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let model = Model::load_blocking(&gpu, &stories, ModelOptions::new(WeightFormat::F16), |_| {})?;
    let torch = options.torch.as_deref().map(|python| Torch::start(python, &[&stories.to_string_lossy()]));
    bench.run("stories, F16", model, torch.transpose()?)?;
    for &weights in &options.weights {
        let model = random_llama(&gpu, weights)?;
        let torch = options.torch.as_deref().map(|python| Torch::start(python, &["--random-100m"]));
        bench.run(&format!("random 98 M, {weights}"), model, torch.transpose()?)?;
    }
    Ok(())
}

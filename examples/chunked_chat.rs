//! Texts that continue themselves: chunked prefill, continuous batching, forked branches and a paged cache, on vectors made from words.
//!
//! There are no trained weights here, but the attention does real work. Each word has a random, nearly orthogonal vector. Layer 0 caches, for
//! every position, the vector of the *previous* word as K and that of the word itself as V; layer 1 does the same with the previous two words.
//! A query for the current word (or pair) therefore finds what followed it earlier, as induction heads of transformers do, and the word
//! that is nearest to the attention output continues the text. Every output row of every step is checked against the f64 oracle.
//!
//! `cargo run --release --example chunked_chat -- "your own text"`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::collections::HashMap;
use std::error::Error;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::time::{Duration, Instant};

use clap::Parser;
use folio::reference::{ErrorModel, Options, Problem, attention_with_bound, compare};
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{Attention, AttentionConfig, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, SequenceId, wgpu};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const NUM_LAYERS: u32 = 2;
const NUM_Q_HEADS: u32 = 8;
const NUM_KV_HEADS: u32 = 2;
const HEAD_DIM: u32 = 64;

/// How sharply each query head of a group prefers an exact match, as a factor of the logits.
const SHARPNESS: [f32; 4] = [8.0, 12.0, 16.0, 24.0];

const TEXTS: [&str; 3] = [
    "The keeper climbs the stairs of the lighthouse and lights the lamp . The lamp turns above the sea and the sea answers \
     with a long wave . The keeper writes the number of the wave in a book , closes the book , and climbs down the stairs . \
     In the morning the keeper opens the book again and reads the number of the wave to the gulls .",
    "A query asks every key the same question , and every key answers with a number . The softmax turns the numbers into \
     weights , and the weights turn the values into an answer . A page holds sixteen keys . A table says where the page is . \
     When two texts begin alike , two tables name the same page , and nobody copies a key .",
    "Once a fox met a crow . The crow had a cheese . The fox said that the crow had a fine voice . The crow began to sing , \
     the cheese fell , and the fox had a cheese .",
];

/// Prompts go through a paged KV cache in chunks, then each text continues in forked branches, every output checked against f64.
#[derive(Parser)]
struct Args {
    /// A text of your own, the first of the prompts. Repeated words give it something to say.
    text: Vec<String>,
    /// Part of the name of the adapter to use.
    #[arg(long)]
    adapter: Option<String>,
    /// Most prompt words of a sequence in a step.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,
    /// Words to generate per branch.
    #[arg(long, default_value_t = 32)]
    words: u32,
    /// Branches per text.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=16))]
    branches: u32,
    /// Keep K and V in half precision.
    #[arg(long)]
    f16: bool,
    /// Seed of the choice between likely words.
    #[arg(long, default_value_t = 7)]
    seed: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let gpu = Gpu::open_blocking({
        let mut options = GpuOptions::default();
        options.adapter_name = args.adapter.clone();
        options
    })?;
    let mut texts: Vec<String> = TEXTS.iter().map(|text| (*text).to_owned()).collect();
    let own = args.text.join(" ");
    if !own.trim().is_empty() {
        texts.insert(0, own);
    }
    let mut chat = Chat::new(&gpu, &args, &texts)?;
    println!("adapter: {} ({:?}, {:?} kernels)\n", gpu.adapter_info().name, gpu.adapter_info().backend, gpu.profile());
    chat.prefill(args.chunk)?;
    chat.fork(args.branches)?;
    chat.generate(args.words)?;
    chat.report()
}

/// A text and everything that the oracle needs to know about it.
struct Text {
    sequence: SequenceId,
    /// Index of the prompt that it started from, and of its branch.
    origin: (usize, u32),
    words: Vec<usize>,
    prompt_len: usize,
    /// K and V of each layer, `[seq_len, num_kv_heads, head_dim]`, as the cache keeps them.
    cached: [(Vec<f32>, Vec<f32>); NUM_LAYERS as usize],
    rng: fastrand::Rng,
}

/// Tokens and seconds of one phase, GPU work and its submission only.
#[derive(Default)]
struct Phase {
    tokens: u64,
    steps: u64,
    kv_bytes: u64,
    time: Duration,
}

impl Phase {
    fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.steps += other.steps;
        self.kv_bytes += other.kv_bytes;
        self.time += other.time;
    }

    fn row(&self, name: &str) -> String {
        let seconds = self.time.as_secs_f64().max(1e-9);
        format!(
            "  {name:<8} {:>5} tokens in {:>3} steps, {:>8.0} tokens/s, {:>6.3} GB/s of KV read",
            self.tokens,
            self.steps,
            self.tokens as f64 / seconds,
            self.kv_bytes as f64 / seconds / 1e9
        )
    }
}

struct Chat<'a> {
    gpu: &'a Gpu,
    cache: KvCache,
    attention: Attention,
    vocabulary: Vocabulary,
    texts: Vec<Text>,
    format: KvFormat,
    max_len: u32,
    prefill: Phase,
    decode: Phase,
    checked_rows: u64,
    worst_error: f64,
    worst_of_bound: f64,
}

impl<'a> Chat<'a> {
    fn new(gpu: &'a Gpu, args: &Args, prompts: &[String]) -> Result<Self> {
        let mut vocabulary = Vocabulary::default();
        let prompts: Vec<Vec<usize>> = prompts.iter().map(|text| vocabulary.encode(text)).collect();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) as u32;
        let max_len = longest + args.words;
        let format = if args.f16 { KvFormat::F16 } else { KvFormat::F32 };
        let block_size = 16;
        // Room for every branch at full length without any sharing: what a contiguous cache would have to hold as well.
        let num_blocks = prompts.len() as u32 * (args.branches + 1) * max_len.div_ceil(block_size);
        let config = KvCacheConfig::new(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM)
            .with_blocks(num_blocks, block_size)
            .with_formats(format, format);
        let cache = KvCache::new_blocking(gpu, config)?;
        let mut options = AttentionConfig::new(NUM_Q_HEADS);
        options.softmax_scale = Some(1.0);
        let attention = Attention::new_blocking(&cache, options)?;
        cache.warm_up()?;
        attention.warm_up()?;
        let texts = prompts
            .into_iter()
            .enumerate()
            .map(|(i, words)| Text {
                sequence: cache.create_sequence(),
                origin: (i, 0),
                prompt_len: words.len(),
                words,
                cached: Default::default(),
                rng: fastrand::Rng::with_seed(args.seed),
            })
            .collect();
        Ok(Self {
            gpu,
            cache,
            attention,
            vocabulary,
            texts,
            format,
            max_len,
            prefill: Phase::default(),
            decode: Phase::default(),
            checked_rows: 0,
            worst_error: 0.0,
            worst_of_bound: 0.0,
        })
    }

    /// All prompts in chunks, several sequences per step.
    fn prefill(&mut self, chunk: u32) -> Result<()> {
        loop {
            let batch: Vec<(usize, u32)> = (0..self.texts.len())
                .map(|i| (i, (self.texts[i].words.len() as u32 - self.cached_len(i)).min(chunk)))
                .filter(|&(_, query_len)| query_len > 0)
                .collect();
            if batch.is_empty() {
                return Ok(());
            }
            let lens: Vec<_> = batch.iter().map(|b| b.1.to_string()).collect();
            // What follows a prompt is chosen later, by each branch for itself.
            let (phase, _) = self.step(&batch)?;
            println!("prefill step: {} words of {} texts, {:.2} ms", lens.join(" + "), batch.len(), millis(phase.time));
            self.prefill.add(&phase);
        }
    }

    fn fork(&mut self, branches: u32) -> Result<()> {
        for i in 0..self.texts.len() {
            for branch in 1..branches {
                let parent = &self.texts[i];
                let child = Text {
                    sequence: self.cache.fork(parent.sequence)?,
                    origin: (i, branch),
                    words: parent.words.clone(),
                    prompt_len: parent.prompt_len,
                    cached: parent.cached.clone(),
                    rng: fastrand::Rng::with_seed(u64::from(branch) * 1000 + i as u64),
                };
                self.texts.push(child);
            }
        }
        let usage = self.cache.usage();
        println!(
            "\nforked into {} branches: {} blocks used, {} of them shared",
            self.texts.len(),
            usage.used,
            usage.shared
        );
        Ok(())
    }

    /// All branches go on word by word, in one batch.
    fn generate(&mut self, words: u32) -> Result<()> {
        // Each text's last word is asked again, so that every branch makes a choice of its own: its K and V are cached already, so they are
        // taken back first, which in a fork costs a block copy.
        for i in 0..self.texts.len() {
            let text = &mut self.texts[i];
            let len = text.words.len() as u32 - 1;
            self.cache.truncate(text.sequence, len)?;
            for (k, v) in &mut text.cached {
                let rows = (len * NUM_KV_HEADS * HEAD_DIM) as usize;
                k.truncate(rows);
                v.truncate(rows);
            }
        }
        let batch: Vec<(usize, u32)> = (0..self.texts.len()).map(|i| (i, 1)).collect();
        for _ in 0..words {
            let (phase, outputs) = self.step(&batch)?;
            self.decode.add(&phase);
            for (i, votes) in outputs.into_iter().enumerate() {
                let text = &mut self.texts[i];
                let word = self.vocabulary.choose(&votes, text.origin.1, &mut text.rng);
                text.words.push(word);
            }
        }
        Ok(())
    }

    fn cached_len(&self, text: usize) -> u32 {
        (self.texts[text].cached[0].0.len() as u32) / (NUM_KV_HEADS * HEAD_DIM)
    }

    /// One step of the decoder for `(text, query_len)`s: append and attend in each layer, one submit, then the check. Returns what it took, and the
    /// sum of the heads' outputs of the last row of each text.
    fn step(&mut self, batch: &[(usize, u32)]) -> Result<(Phase, Vec<Vec<f32>>)> {
        let requests: Vec<_> = batch.iter().map(|&(i, len)| (self.texts[i].sequence, len)).collect();
        let mut rows: Vec<LayerRows> = (0..NUM_LAYERS).map(|_| LayerRows::default()).collect();
        for &(i, len) in batch {
            let start = self.cached_len(i) as usize;
            for position in start..start + len as usize {
                for (layer, rows) in rows.iter_mut().enumerate() {
                    self.vocabulary.push_rows(&self.texts[i].words, position, layer + 1, rows);
                }
            }
        }

        let start = Instant::now();
        let buffers: Vec<_> = rows.iter().map(|rows| rows.upload(self.gpu)).collect();
        let step = self.cache.begin_step(&requests)?;
        let plan = self.attention.plan(&step)?;
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for (layer, [q, k, v, out]) in (0..).zip(&buffers) {
            self.cache.append(&mut encoder, &step, layer, k, v, None)?;
            self.attention.attend(&mut encoder, &plan, layer, q, out)?;
        }
        self.gpu.queue().submit([encoder.finish()]);
        self.cache.commit(step)?;
        let outputs = buffers.iter().map(|b| self.gpu.read_blocking(&b[3])).collect::<folio::Result<Vec<_>>>()?;
        let mut phase = Phase { steps: 1, time: start.elapsed(), ..Phase::default() };

        let mut last_rows = vec![vec![0.0; HEAD_DIM as usize]; batch.len()];
        for (layer, (rows, out)) in rows.iter().zip(&outputs).enumerate() {
            let mut at = 0;
            for (&(i, len), last) in batch.iter().zip(&mut last_rows) {
                let len = len as usize;
                self.check(i, layer, rows, out, at..at + len)?;
                let row = (NUM_Q_HEADS * HEAD_DIM) as usize;
                for (d, &x) in out[(at + len - 1) * row..(at + len) * row].iter().enumerate() {
                    last[d % HEAD_DIM as usize] += x * (layer + 1) as f32;
                }
                at += len;
            }
        }
        for &(i, len) in batch {
            phase.tokens += u64::from(len);
            phase.kv_bytes += u64::from(self.cached_len(i)) * self.cache.config().token_bytes();
        }
        Ok((phase, last_rows))
    }

    /// Compares the rows `range` of the step, which belong to one text, with the oracle.
    fn check(
        &mut self,
        text: usize,
        layer: usize,
        rows: &LayerRows,
        out: &[f32],
        range: std::ops::Range<usize>,
    ) -> Result<()> {
        let (q_row, kv_row) = ((NUM_Q_HEADS * HEAD_DIM) as usize, (NUM_KV_HEADS * HEAD_DIM) as usize);
        let stored = |x: &f32| match self.format {
            KvFormat::F16 => half::f16::from_f32(*x).to_f32(),
            _ => *x,
        };
        let (k, v) = &mut self.texts[text].cached[layer];
        k.extend(rows.k[range.start * kv_row..range.end * kv_row].iter().map(stored));
        v.extend(rows.v[range.start * kv_row..range.end * kv_row].iter().map(stored));
        let mut options = Options::default();
        options.softmax_scale = Some(1.0);
        let problem = Problem {
            num_q_heads: NUM_Q_HEADS as usize,
            num_kv_heads: NUM_KV_HEADS as usize,
            head_dim: HEAD_DIM as usize,
            value_dim: HEAD_DIM as usize,
            q: &rows.q[range.start * q_row..range.end * q_row],
            k,
            v,
            options,
        };
        let expected = attention_with_bound(&problem, &ErrorModel::F32)?;
        let got = &out[range.start * q_row..range.end * q_row];
        let comparison = compare::out(&expected, got);
        if !comparison.is_within() {
            return Err(format!("layer {layer}, text {text}: {comparison}").into());
        }
        self.checked_rows += got.len() as u64 / u64::from(HEAD_DIM);
        self.worst_of_bound = self.worst_of_bound.max(comparison.badness());
        for (got, want) in got.iter().zip(&expected.output.out) {
            self.worst_error = self.worst_error.max((f64::from(*got) - want).abs());
        }
        Ok(())
    }

    fn report(&self) -> Result<()> {
        let mut out = std::io::stdout().lock();
        let mut order: Vec<_> = self.texts.iter().collect();
        order.sort_by_key(|text| text.origin);
        for text in order {
            let (prompt, said) = text.words.split_at(text.prompt_len);
            let tail = &prompt[prompt.len().saturating_sub(6)..];
            let (tail, said) = (self.vocabulary.decode(tail), self.vocabulary.decode(said));
            writeln!(out, "\ntext {}, branch {}: ... {tail} |{said}", text.origin.0 + 1, text.origin.1 + 1)?;
        }
        let config = self.cache.config();
        let usage = self.cache.usage();
        let paged = u64::from(usage.used) * config.block_bytes();
        let contiguous = self.texts.len() as u64 * u64::from(self.max_len) * config.token_bytes();
        let info = self.gpu.adapter_info();
        writeln!(out, "\nreport")?;
        writeln!(out, "  adapter  {} ({:?}, {})", info.name, info.backend, info.driver_info)?;
        writeln!(
            out,
            "  shape    {NUM_LAYERS} layers, {NUM_Q_HEADS}/{NUM_KV_HEADS} heads of {HEAD_DIM}, {} cache, blocks of {}",
            self.format, config.block_size
        )?;
        writeln!(out, "{}", self.prefill.row("prefill"))?;
        writeln!(out, "{}", self.decode.row("decode"))?;
        writeln!(out, "  blocks   {} of {} used, {} of them shared", usage.used, usage.total, usage.shared)?;
        writeln!(
            out,
            "  bytes    {paged} paged, {contiguous} contiguous for {} sequences of {} tokens: {:.0} %",
            self.texts.len(),
            self.max_len,
            100.0 * paged as f64 / contiguous as f64
        )?;
        writeln!(
            out,
            "  checked  {} rows against f64: worst error {:.1e}, {:.0} % of its bound",
            self.checked_rows,
            self.worst_error,
            100.0 * self.worst_of_bound
        )?;
        Ok(())
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// One layer's new rows of a step.
#[derive(Default)]
struct LayerRows {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl LayerRows {
    /// q, k, v and out on the GPU.
    fn upload(&self, gpu: &Gpu) -> [wgpu::Buffer; 4] {
        [&self.q, &self.k, &self.v, &self.q].map(|values| {
            gpu.device().create_buffer_init(&BufferInitDescriptor {
                label: None,
                contents: bytemuck::cast_slice(values),
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
            })
        })
    }
}

/// Words, numbered, each with a vector of length 1.
#[derive(Default)]
struct Vocabulary {
    words: Vec<String>,
    ids: HashMap<String, usize>,
}

impl Vocabulary {
    fn encode(&mut self, text: &str) -> Vec<usize> {
        text.split_whitespace()
            .map(|word| {
                *self.ids.entry(word.to_owned()).or_insert_with(|| {
                    self.words.push(word.to_owned());
                    self.words.len() - 1
                })
            })
            .collect()
    }

    fn decode(&self, words: &[usize]) -> String {
        words.iter().map(|&word| format!(" {}", self.words[word])).collect::<String>().trim_start().to_owned()
    }

    /// Random signs that depend only on the given words: nearly orthogonal to those of any others.
    fn vector(&self, words: &[usize], salt: u64) -> impl Iterator<Item = f32> + use<> {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        for &word in words {
            self.words[word].hash(&mut hasher);
        }
        let mut rng = fastrand::Rng::with_seed(hasher.finish());
        let scale = 1.0 / (HEAD_DIM as f32).sqrt();
        (0..HEAD_DIM).map(move |_| if rng.bool() { scale } else { -scale })
    }

    /// The rows of one position in a layer that matches the `order` words before.
    fn push_rows(&self, words: &[usize], position: usize, order: usize, rows: &mut LayerRows) {
        let before = &words[position.saturating_sub(order)..position];
        let current = &words[(position + 1).saturating_sub(order)..=position];
        let group_size = NUM_Q_HEADS / NUM_KV_HEADS;
        for kv_head in 0..NUM_KV_HEADS {
            let salt = 1 + u64::from(kv_head);
            rows.k.extend(self.vector(before, salt));
            rows.v.extend(self.vector(&words[position..=position], 0));
            for head in 0..group_size {
                let sharpness = SHARPNESS[head as usize % SHARPNESS.len()];
                rows.q.extend(self.vector(current, salt).map(|x| x * sharpness));
            }
        }
    }

    /// The word whose vector is nearest to `votes`; branches after the first sometimes take the second or third.
    fn choose(&self, votes: &[f32], branch: u32, rng: &mut fastrand::Rng) -> usize {
        let mut scores: Vec<(f32, usize)> = (0..self.words.len())
            .map(|word| (self.vector(&[word], 0).zip(votes).map(|(a, b)| a * b).sum(), word))
            .collect();
        scores.sort_by(|a, b| b.0.total_cmp(&a.0));
        let likely = scores.iter().take(3).take_while(|s| s.0 > 0.5 * scores[0].0).count();
        let rank = if branch == 0 || likely == 0 { 0 } else { rng.usize(0..likely) };
        scores[rank].1
    }
}

//! A model that talks: prompt in, text out, on whatever GPU is there.
//!
//! `cargo run --release --features model --example chat -- --help`
//!
//! Without arguments it loads the story model of this repository. On a terminal it reads prompts until an empty line or Ctrl-D;
//! elsewhere it runs a short fixed conversation. Earlier turns stay in the cache: each turn feeds its own text only.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use folio::model::{
    Decoder, DecoderOptions, Finish, Model, ModelConfig, ModelOptions, Progress, Prompt, Sampling, TextStream,
    Tokenizer, WeightFormat,
};
use folio::{Gpu, GpuOptions, KvFormats, PoolUsage, SequenceId};
use indicatif::{ProgressBar, ProgressStyle};

/// Streams text from a Hugging Face checkpoint (GPT-2, Llama, Qwen2, Qwen3, GPT-NeoX) through folio's paged KV cache.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Options {
    /// Folder with config.json, tokenizer.json and safetensors [default: the story model of this repository]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// What to say, once per turn; may be given several times. Without it: prompts from the terminal
    #[arg(long, short, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Tokens per answer, at most
    #[arg(long, short = 'n', default_value_t = 200, value_name = "N")]
    max_tokens: usize,
    /// Answers that continue each prompt side by side, from one cached copy of it
    #[arg(long, short, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    branches: u32,

    /// 0 takes the most probable token; higher is more adventurous [default: 0.8, and 0 for questions to the story model]
    #[arg(long, short, help_heading = "Sampling", value_name = "T")]
    temperature: Option<f32>,
    /// Only the K most probable tokens
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    top_k: Option<u32>,
    /// Only the most probable tokens that make up this probability
    #[arg(long, value_name = "P", help_heading = "Sampling")]
    top_p: Option<f32>,
    /// Only tokens at least this probable, relative to the best
    #[arg(long, value_name = "P", help_heading = "Sampling")]
    min_p: Option<f32>,
    /// Above 1: tokens that have occurred become less probable
    #[arg(long, default_value_t = 1.0, value_name = "R", help_heading = "Sampling")]
    repetition_penalty: f32,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 0, help_heading = "Sampling")]
    seed: u64,

    /// How keys and values are stored
    #[arg(long, default_value = "f16", value_name = "K:V", help_heading = "Cache")]
    cache: KvFormats,
    /// Tokens per block
    #[arg(long, default_value_t = 16, help_heading = "Cache", value_name = "N")]
    block_size: u32,
    /// Blocks of the pool [default: room for the model's positions, once per branch, at most 512 MiB]
    #[arg(long, help_heading = "Cache", value_name = "N")]
    blocks: Option<u32>,

    /// How the weights of the linear layers are stored
    #[arg(long, default_value = "f16", value_name = "f32|f16|int8|int4", help_heading = "Device")]
    weights: WeightFormat,
    /// Part of an adapter's name [default: the best adapter]
    #[arg(long, help_heading = "Device", value_name = "NAME")]
    adapter: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  chat                                        the story model: a conversation on a terminal, a fixed one elsewhere
  chat -p 'Once upon a time' -t 0.8 -b 4      four stories from one prompt
  chat --model ~/models/Qwen3-0.6B -p 'The capital of France is' -n 20";

impl Options {
    fn sampling(&self, branch: u32, default_temperature: f32) -> Sampling {
        {
            let mut options = Sampling::default();
            options.temperature = self.temperature.unwrap_or(default_temperature);
            options.top_k = self.top_k;
            options.top_p = self.top_p;
            options.min_p = self.min_p;
            options.repetition_penalty = self.repetition_penalty;
            options.seed = self.seed + u64::from(branch);
            options
        }
    }

    fn decoder(&self, model: &ModelConfig) -> DecoderOptions {
        const MAX_BYTES: u64 = 512 << 20;
        let options = {
            let mut options = DecoderOptions::default();
            options.block_size = self.block_size;
            options.k_format = self.cache.k;
            options.v_format = self.cache.v;
            options
        };
        // A block size of 0 is refused by the cache, with better words than a division's.
        let per_sequence = model.max_positions.div_ceil(self.block_size.max(1)) + 1;
        let affordable = MAX_BYTES / options.cache_config(model).block_bytes().max(1);
        let affordable = affordable.clamp(1, u64::from(u32::MAX)) as u32;
        let num_blocks = self.blocks.unwrap_or(per_sequence.saturating_mul(self.branches).min(affordable));
        {
            let mut options = options;
            options.num_blocks = num_blocks;
            options
        }
    }
}

/// What the closing report counts.
#[derive(Default)]
struct Counters {
    prompt_tokens: usize,
    prompt_time: Duration,
    decode_tokens: usize,
    decode_time: Duration,
    /// From the prompt to its first token, of every turn.
    first_token: Vec<Duration>,
}

struct Chat {
    options: Options,
    decoder: Decoder,
    tokenizer: Tokenizer,
    /// Tokens that end an answer.
    stop: Vec<u32>,
    /// The story model answers questions in a form of its own; see its model card.
    stories: bool,
    /// The conversation so far.
    sequence: SequenceId,
    /// The token that was sampled last and is not in the cache yet.
    pending: Option<u32>,
    counters: Counters,
    /// The most blocks that were used and shared after a turn.
    peak: PoolUsage,
    interrupted: Arc<AtomicBool>,
}

impl Chat {
    /// The text that is fed for what somebody says, the tokens that end the answer, and its temperature unless the options say one.
    fn dress(&self, said: &str) -> Result<(String, Vec<u32>, f32)> {
        if self.stories && said.trim_end().ends_with('?') {
            let newline = self.tokenizer.encode("\n", false)?;
            Ok((format!("\nQuestion: {}\nAnswer:", said.trim()), [&self.stop[..], &newline].concat(), 0.0))
        } else {
            Ok((said.to_owned(), self.stop.clone(), 0.8))
        }
    }

    /// Feeds a prompt and prints what follows. Returns false when the conversation can't go on.
    fn turn(&mut self, said: &str) -> Result<bool> {
        let (prompt, stop, temperature) = self.dress(said)?;
        let first_turn = self.decoder.tokens(self.sequence)?.is_empty();
        let mut tokens: Vec<u32> = self.pending.take().into_iter().collect();
        if first_turn && self.stories {
            // Its tokenizer leaves that to the host; others add what their models want.
            tokens.extend(self.decoder.model().config().bos_token_id);
        }
        tokens.extend(self.tokenizer.encode(&prompt, first_turn)?);
        if tokens.is_empty() {
            bail!("prompt: got no text, need at least one character");
        }
        let start = Instant::now();
        // All but the last token go in once; the branches share them and differ from there on.
        let (last, shared) = tokens.split_last().context("checked above")?;
        let branches = self.options.branches as usize;
        if branches > 1 && !shared.is_empty() {
            self.decoder.step_blocking(&[folio::model::Input {
                sequence: self.sequence,
                tokens: shared,
                sampling: None,
            }])?;
        }
        let fed = if branches > 1 { std::slice::from_ref(last) } else { &tokens[..] };
        let mut sequences = vec![self.sequence];
        for _ in 1..branches {
            sequences.push(self.decoder.fork(self.sequence)?);
        }
        let prompts: Vec<_> = (0..)
            .zip(&sequences)
            .map(|(i, &sequence)| Prompt { sequence, tokens: fed, sampling: self.options.sampling(i, temperature) })
            .collect();

        let mut streams: Vec<TextStream> =
            sequences.iter().map(|_| self.tokenizer.stream_after(&tokens, true)).collect();
        let mut texts = vec![String::new(); branches];
        let mut first_token = None;
        let mut failure = None;
        let mut count = 0_usize;
        let interrupted = &self.interrupted;
        let result = self.decoder.generate_blocking(&prompts, self.options.max_tokens, &stop, |branch, token| {
            first_token.get_or_insert_with(|| start.elapsed());
            count += 1;
            match streams[branch].push(token) {
                Ok(text) => {
                    let text = text.unwrap_or_default();
                    if branches == 1 {
                        print!("{text}");
                        let _ = std::io::stdout().flush();
                    }
                    texts[branch].push_str(&text);
                }
                Err(error) => failure = Some(error),
            }
            if interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let time = start.elapsed();
        if let Some(error) = failure {
            return Err(error.into());
        }
        let generated = result?;
        for (text, stream) in texts.iter_mut().zip(streams) {
            let rest = stream.finish()?;
            if branches == 1 {
                print!("{rest}");
            }
            text.push_str(&rest);
        }
        let first_token = first_token.unwrap_or(time);
        self.counters.prompt_tokens += tokens.len();
        self.counters.prompt_time += first_token;
        self.counters.first_token.push(first_token);
        // The first token of each branch comes out of the prompt's own step.
        self.counters.decode_tokens += count.saturating_sub(branches);
        self.counters.decode_time += time - first_token;

        if branches == 1 {
            println!();
        }
        for (i, text) in texts.iter().enumerate().filter(|_| branches > 1) {
            println!("--- branch {} ---\n{}", i + 1, text.trim());
        }
        let usage = self.decoder.usage();
        self.peak.used = self.peak.used.max(usage.used);
        self.peak.shared = self.peak.shared.max(usage.shared);
        if branches > 1 {
            println!("--- {} blocks used by {branches} branches, {} of them shared ---", usage.used, usage.shared);
        }
        // The conversation goes on from the first branch.
        for &sequence in &sequences[1..] {
            self.decoder.free(sequence)?;
        }
        // A token that ends an answer is no part of the text.
        self.pending = (generated[0].finish != Finish::Stop).then_some(generated[0].pending);
        if generated[0].finish == Finish::Positions {
            println!("[the model's {} positions are used up]", self.decoder.model().config().max_positions);
        }
        Ok(generated[0].finish != Finish::Positions && !self.interrupted.load(Ordering::Relaxed))
    }
}

/// The conversation of a run without a terminal: the beginning of a story that the model goes on with, then questions about facts from before
/// that. Later turns feed their own few tokens only; the story stays in the cache.
const CONVERSATION: [&str; 4] = [
    "Title: Mia and the silver key\n\
     Once upon a time, in autumn, there was a little town where everybody knew everybody. Mia was a baker from Willow Hill. \
     Mia loved plum cake more than anything. Tom was a sailor from Stone Bay. Tom loved onion soup more than anything.\n\
     The day was still young. Mia hid the silver key under the old bridge. Tom put the red lantern inside the dark cave. \
     Mia passed the golden ring to Tom.\n\
     Later the clouds went away.",
    "Where is the silver key?",
    "What did Tom love?",
    "Who was Mia?",
];

fn main() -> Result<()> {
    let options = Options::parse();
    options.sampling(0, 0.0).validate()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).context("listening for Ctrl-C")?;

    let adapter_name = options.adapter.clone();
    let gpu = Gpu::open_blocking({
        let mut options = GpuOptions::default();
        options.adapter_name = adapter_name;
        options
    })?;
    let stories = options.model.is_none();
    let folder =
        options.model.clone().unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/stories"));
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
    let start = Instant::now();
    let model = Model::load_blocking(&gpu, &folder, ModelOptions::new(options.weights), progress_bar())?;
    let load_time = start.elapsed();
    tokenizer.check_vocab_size(model.config().vocab_size)?;

    let decoder_options = options.decoder(model.config());
    let stop = model.config().eos_token_ids.clone();
    let model = Arc::new(model);
    let mut decoder = Decoder::new_blocking(Arc::clone(&model), decoder_options)?;
    let start = Instant::now();
    if options.cache.k.has_channel_scales() {
        let opening = tokenizer.encode(options.prompt.first().map_or("Once upon a time", String::as_str), true)?;
        decoder.calibrate_keys_on_own_text_blocking(&[&opening], 200)?;
    }
    decoder.warm_up_blocking()?;
    eprintln!(
        "{}: {:.1} MB of weights in {:.1} s, kernels compiled in {:.1} s",
        folder.display(),
        model.weight_bytes() as f64 / 1e6,
        load_time.as_secs_f64(),
        start.elapsed().as_secs_f64()
    );

    let sequence = decoder.create_sequence();
    let counters = Counters::default();
    let mut chat = Chat {
        options,
        decoder,
        tokenizer,
        stop,
        stories,
        sequence,
        pending: None,
        counters,
        peak: PoolUsage::default(),
        interrupted,
    };
    if !chat.options.prompt.is_empty() {
        let prompts = chat.options.prompt.clone();
        chat.recite(prompts.iter().map(String::as_str))?;
    } else if std::io::stdin().is_terminal() {
        converse(&mut chat)?;
    } else if stories {
        chat.recite(CONVERSATION)?;
    } else {
        bail!("prompt: got none and no terminal to ask on, need --prompt TEXT");
    }
    chat.report();
    Ok(())
}

/// Reads prompts from the terminal, on a thread of its own so that Ctrl-C is noticed meanwhile.
fn converse(chat: &mut Chat) -> Result<()> {
    eprintln!("Say something; an empty line or Ctrl-D ends.");
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    loop {
        eprint!("> ");
        let line = loop {
            if chat.interrupted.load(Ordering::Relaxed) {
                eprintln!();
                return Ok(());
            }
            match lines.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => break line.context("reading the terminal")?,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            }
        };
        if line.trim().is_empty() || !chat.turn(&line)? {
            return Ok(());
        }
    }
}

impl Chat {
    /// Says one prompt after another.
    fn recite<'a>(&mut self, prompts: impl IntoIterator<Item = &'a str>) -> Result<()> {
        for (i, prompt) in prompts.into_iter().enumerate() {
            if i > 0 {
                println!();
            }
            print!("{prompt}");
            if !self.turn(prompt)? {
                break;
            }
        }
        Ok(())
    }

    fn report(&self) {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let info = self.decoder.model().gpu().adapter_info();
        let (usage, counters) = (self.decoder.usage(), &self.counters);
        let block_bytes = self.decoder.bytes_per_block();
        println!(
            "\nadapter        {} ({:?}), {:?} kernels",
            info.name,
            info.backend,
            self.decoder.model().gpu().profile()
        );
        println!(
            "prompts        {} tokens, {:.0} tokens/s",
            counters.prompt_tokens,
            rate(counters.prompt_tokens, counters.prompt_time)
        );
        println!(
            "decode         {} tokens, {:.0} tokens/s",
            counters.decode_tokens,
            rate(counters.decode_tokens, counters.decode_time)
        );
        let times: Vec<_> = counters.first_token.iter().map(|t| format!("{:.0} ms", t.as_secs_f64() * 1e3)).collect();
        println!("first token    {}", if times.is_empty() { "none".to_owned() } else { times.join(", ") });
        println!(
            "cache          {:.1} MB of {:.1} MB used, {} bytes per token",
            (u64::from(usage.used) * block_bytes) as f64 / 1e6,
            (u64::from(usage.total) * block_bytes) as f64 / 1e6,
            self.decoder.bytes_per_token()
        );
        println!(
            "blocks         {} of {} used; at most {} used and {} shared",
            usage.used, usage.total, self.peak.used, self.peak.shared
        );
    }
}

/// A bar on stderr that shows how far loading has come, and nothing if stderr is no terminal. It's gone when all is done or the closure is
/// dropped.
fn progress_bar() -> impl FnMut(Progress<'_>) {
    struct ClearOnDrop(ProgressBar);
    impl Drop for ClearOnDrop {
        fn drop(&mut self) {
            self.0.finish_and_clear();
        }
    }
    let bar = ClearOnDrop(ProgressBar::no_length());
    // The template is constant; indicatif's own style is the fallback of one that it can't parse.
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {wide_msg}") {
        bar.0.set_style(style);
    }
    move |progress| {
        // All of it, not only the field.
        let bar = &bar;
        bar.0.set_length(progress.bytes_total);
        bar.0.set_position(progress.bytes_done);
        bar.0.set_message(progress.what.to_owned());
        if progress.bytes_done >= progress.bytes_total {
            bar.0.finish_and_clear();
        }
    }
}

//! How much of a story a cache format remembers: the story model answers questions about facts hundreds of tokens back.
//!
//! `cargo run --release --features model --example recall`
//!
//! Each held-out story is prefilled once; its questions continue it as forks, in one batch, greedily. An answer counts if it is the
//! expected one, word for word. One table line per cache format: a format that loses what it stores shows here, whatever its error norms say.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use folio::model::{Decoder, DecoderOptions, Input, Model, ModelOptions, Prompt, Sampling, Tokenizer, WeightFormat};
use folio::{Gpu, GpuOptions, KvFormats, Profile};
use serde::Deserialize;

/// Answers the questions of the held-out stories, for each cache format.
#[derive(Parser)]
struct Options {
    /// Folder with the model, its tokenizer and held_out.jsonl [default: the story model of this repository]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Cache formats, one table line each: of K and V, as in "int4-channel:int8", or of both
    #[arg(long, value_delimiter = ',', default_value = DEFAULT_FORMATS, value_name = "FORMATS")]
    cache: Vec<KvFormats>,
    /// How the weights of the linear layers are stored
    #[arg(long, default_value = "f16", value_name = "f32|f16|int8|int4")]
    weights: WeightFormat,
    /// Only the first N stories
    #[arg(long, value_name = "N")]
    stories: Option<usize>,
    /// Fail unless each format answers at least this many per cent of the questions
    #[arg(long, value_name = "PERCENT")]
    require: Option<f64>,
    /// Fail if a format answers more points fewer than the first one does, as in "int8=1,int4-channel:int4=5"
    #[arg(long, value_delimiter = ',', value_name = "FORMATS=POINTS")]
    max_loss: Vec<MaxLoss>,
    /// Also print the answers by kind of question and by distance
    #[arg(long)]
    details: bool,
    /// Print the wrong answers
    #[arg(long)]
    show_wrong: bool,
    /// Part of an adapter's name [default: the best adapter]
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// The kernels for GPUs, on whatever adapter
    #[arg(long)]
    gpu_kernels: bool,
    /// Let decode quantise queries (kernels for GPUs, K in int8 and int4)
    #[arg(long)]
    packed_dots: bool,
    /// The last token of each question in a step of its own, so that the first one of the answer comes from decode, too
    #[arg(long)]
    decode_last: bool,
}

/// Every format on both sides (K with scales per channel beside V with scales per token), and mixtures that spend more on one side.
const DEFAULT_FORMATS: &str =
    "f32,f16,e4m3,int8,int8-channel,int4,int4-channel,f16:int8,int8:e4m3,int8:int4,int8-channel:int4,int4-channel:int8";

/// Percentage points that formats may lose against the first ones.
#[derive(Clone, Copy)]
struct MaxLoss {
    formats: KvFormats,
    points: f64,
}

impl FromStr for MaxLoss {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (formats, points) = text.split_once('=').with_context(|| format!("got {text:?}, need FORMATS=POINTS"))?;
        Ok(Self { formats: formats.parse()?, points: points.parse()? })
    }
}

/// A line of `held_out.jsonl`.
#[derive(Deserialize)]
struct Story {
    story: String,
    questions: Vec<Question>,
}

#[derive(Deserialize)]
struct Question {
    question: String,
    answer: String,
    kind: String,
    /// Tokens between the fact and the question.
    distance: u32,
}

/// The model was trained on questions in this form; see its model card.
fn prompt(question: &str) -> String {
    format!("\nQuestion: {question}\nAnswer:")
}

/// Right answers among those asked.
#[derive(Clone, Copy, Default)]
struct Score {
    right: u32,
    asked: u32,
}

impl Score {
    fn count(&mut self, right: bool) {
        self.right += u32::from(right);
        self.asked += 1;
    }

    fn percent(self) -> f64 {
        100.0 * f64::from(self.right) / f64::from(self.asked.max(1))
    }
}

/// What one cache format did.
#[derive(Default)]
struct Outcome {
    total: Score,
    by_kind: BTreeMap<String, Score>,
    /// By the distance in steps of 100 tokens.
    by_distance: BTreeMap<u32, Score>,
    prefill: Duration,
    decode: Duration,
    bytes_per_token: u64,
}

/// No answer of the grammar is longer.
const MAX_ANSWER_TOKENS: usize = 24;

fn main() -> Result<()> {
    let options = Options::parse();
    let folder =
        options.model.clone().unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/stories"));
    let path = folder.join("held_out.jsonl");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let stories: Vec<Story> = text
        .lines()
        .take(options.stories.unwrap_or(usize::MAX))
        .map(|line| serde_json::from_str(line).with_context(|| path.display().to_string()))
        .collect::<Result<_>>()?;
    ensure!(!stories.is_empty(), "{}: got no story, need at least one", path.display());

    let gpu = Gpu::open_blocking({
        let mut open = GpuOptions::default();
        open.adapter_name.clone_from(&options.adapter);
        open.profile = options.gpu_kernels.then_some(Profile::Gpu);
        open.packed_dots = options.packed_dots;
        open
    })?;
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
    let model = Arc::new(Model::load_blocking(&gpu, &folder, ModelOptions::new(options.weights), |_| {})?);
    let (info, profile) = (gpu.adapter_info(), gpu.profile());
    println!("{} stories on {} ({:?}), {profile:?} kernels", stories.len(), info.name, info.backend);
    println!("packed dot products: {}\n", if gpu.target().packed_dots { "where kernels have them" } else { "none" });

    let mut outcomes = Vec::new();
    for &formats in &options.cache {
        outcomes.push((formats, ask_all(&model, &tokenizer, &stories, formats, &options)?));
    }
    print_table(&outcomes);
    if options.details {
        print_details(&outcomes);
    }

    if let Some(percent) = options.require
        && let Some((name, outcome)) = outcomes.iter().find(|(_, outcome)| outcome.total.percent() < percent)
    {
        bail!("{name}: {:.1} % right, need {percent} %", outcome.total.percent());
    }
    let base = outcomes[0].1.total.percent();
    for &MaxLoss { formats, points } in &options.max_loss {
        let outcome = outcomes.iter().find(|(asked, _)| *asked == formats);
        let (_, outcome) = outcome.with_context(|| format!("{formats} is not among --cache"))?;
        let loss = base - outcome.total.percent();
        ensure!(loss <= points, "{formats} loses {loss:.2} points against {}, need at most {points}", outcomes[0].0);
    }
    Ok(())
}

fn ask_all(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    stories: &[Story],
    formats: KvFormats,
    options: &Options,
) -> Result<Outcome> {
    const BLOCK_SIZE: u32 = 16;
    let most_questions = stories.iter().map(|s| s.questions.len()).max().unwrap_or(0) as u32;
    let decoder_options = {
        let mut options = DecoderOptions::default();
        options.block_size = BLOCK_SIZE;
        options.num_blocks = model.config().max_positions.div_ceil(BLOCK_SIZE) + 6 * most_questions;
        options.k_format = formats.k;
        options.v_format = formats.v;
        options
    };
    let mut decoder = Decoder::new_blocking(Arc::clone(model), decoder_options)?;
    if formats.k.has_channel_scales() {
        calibrate(&mut decoder, tokenizer)?;
    }
    let gpu = decoder.gpu().clone();
    gpu.block_on(decoder.warm_up())?;
    let mut outcome = Outcome { bytes_per_token: decoder.bytes_per_token(), ..Outcome::default() };
    let newline = tokenizer.encode("\n", false)?;
    let stop = [model.config().eos_token_ids.as_slice(), &newline].concat();
    for story in stories {
        let start = Instant::now();
        let sequence = decoder.create_sequence();
        let mut tokens: Vec<u32> = model.config().bos_token_id.into_iter().collect();
        tokens.extend(tokenizer.encode(&story.story, false)?);
        gpu.block_on(decoder.step(&[Input::new(sequence, &tokens)]))?;
        let questions: Vec<_> =
            story.questions.iter().map(|q| tokenizer.encode(&prompt(&q.question), false)).collect::<Result<_, _>>()?;
        let mut forks = Vec::with_capacity(questions.len());
        for _ in &questions {
            forks.push(decoder.fork(sequence)?);
        }
        let inputs =
            || forks.iter().copied().zip(questions.iter().map(|tokens: &Vec<u32>| tokens.split_at(tokens.len() - 1)));
        if options.decode_last {
            let inputs: Vec<_> = inputs().map(|(sequence, (tokens, _))| Input::new(sequence, tokens)).collect();
            gpu.block_on(decoder.step(&inputs))?;
        }
        let prompts: Vec<_> = inputs()
            .zip(&questions)
            .map(|((sequence, (_, last)), all)| {
                let tokens = if options.decode_last { last } else { all };
                Prompt { sequence, tokens, sampling: Sampling::greedy() }
            })
            .collect();
        let mut first = None;
        let answers = decoder.generate_blocking(&prompts, MAX_ANSWER_TOKENS, &stop, |_, _| {
            first.get_or_insert_with(Instant::now);
            ControlFlow::Continue(())
        })?;
        let first = first.unwrap_or_else(Instant::now);
        outcome.prefill += first - start;
        outcome.decode += first.elapsed();
        for (question, answer) in story.questions.iter().zip(&answers) {
            let answer = tokenizer.decode(&answer.tokens, true)?;
            let right = answer.trim() == question.answer.trim();
            if options.show_wrong && !right {
                println!("{} want {:?}, got {:?}", question.question, question.answer, answer.trim());
            }
            outcome.total.count(right);
            outcome.by_kind.entry(question.kind.clone()).or_default().count(right);
            outcome.by_distance.entry(question.distance / 100 * 100).or_default().count(right);
        }
        for sequence in forks.into_iter().chain([sequence]) {
            decoder.free(sequence)?;
        }
    }
    Ok(outcome)
}

/// What scales per channel are fixed with: stories that the model tells by itself, and questions of each kind. The held-out stories stay unseen.
fn calibrate(decoder: &mut Decoder, tokenizer: &Tokenizer) -> Result<()> {
    const STORIES: usize = 8;
    const STORY_TOKENS: usize = 400;
    const QUESTIONS: [&str; 5] = [
        "Who was Mia?",
        "What did Tom love?",
        "What were the magic words?",
        "Where is the silver key?",
        "Who has the red lantern?",
    ];
    let bos: Vec<u32> = decoder.model().config().bos_token_id.into_iter().collect();
    let title = [bos, tokenizer.encode("Title:", false)?].concat();
    let questions: String = QUESTIONS.iter().map(|question| prompt(question)).collect();
    let questions = tokenizer.encode(&questions, false)?;
    let mut openings = vec![&title[..]; STORIES];
    openings.push(&questions);
    let gpu = decoder.gpu().clone();
    Ok(gpu.block_on(decoder.calibrate_keys_on_own_text(&openings, STORY_TOKENS))?)
}

fn print_table(outcomes: &[(KvFormats, Outcome)]) {
    let base = &outcomes[0];
    println!(
        "{:20} bytes/token   of {1}'s   right              points   prefill   decode   of {1}'s",
        "cache (K:V)", base.0
    );
    for (formats, outcome) in outcomes {
        let Score { right, asked } = outcome.total;
        println!(
            "{formats:20} {:11} {:10.3}   {right}/{asked} {:6.2} % {:+7.2}   {:6.1} s {:6.1} s   {:.2}",
            outcome.bytes_per_token,
            outcome.bytes_per_token as f64 / base.1.bytes_per_token as f64,
            outcome.total.percent(),
            outcome.total.percent() - base.1.total.percent(),
            outcome.prefill.as_secs_f64(),
            outcome.decode.as_secs_f64(),
            outcome.decode.as_secs_f64() / base.1.decode.as_secs_f64()
        );
    }
}

fn print_details(outcomes: &[(KvFormats, Outcome)]) {
    for (title, scores) in [
        ("kind of question", outcomes.iter().map(|(_, o)| lines(&o.by_kind)).collect::<Vec<_>>()),
        ("tokens back", outcomes.iter().map(|(_, o)| lines(&o.by_distance)).collect()),
    ] {
        println!(
            "\n{title:18} {:>6} {}",
            "asked",
            outcomes.iter().map(|(formats, _)| format!("{formats:>19}")).collect::<String>()
        );
        for (row, (name, score)) in scores[0].iter().enumerate() {
            let percents: String = scores.iter().map(|s| format!("{:17.1} %", s[row].1.percent())).collect();
            println!("{name:18} {:>6} {percents}", score.asked);
        }
    }
}

fn lines<K: ToString>(scores: &BTreeMap<K, Score>) -> Vec<(String, Score)> {
    scores.iter().map(|(key, &score)| (key.to_string(), score)).collect()
}

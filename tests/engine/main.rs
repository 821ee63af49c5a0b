//! The engine: a request's tokens don't depend on what runs beside it, and nothing leaks.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking"
)]

#[path = "../gpu/adapter.rs"]
#[allow(dead_code, reason = "shared with the tests of the GPU kernels")]
mod adapter;

mod beams;
mod equal;
mod exact;
mod latent;
mod life;
mod trees;
mod windows;
mod wishes;

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use folio::engine::{Answer, EndReason, Engine, EngineOptions, Event, Usage};
use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, Sampling, TokenLogprob, Tokenizer, WeightFormat};
use folio::{Gpu, KvFormat};

fn stories() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories")
}

static MODEL: LazyLock<Option<Arc<Model>>> = LazyLock::new(|| {
    let gpu = adapter::open(adapter::DEFAULT)?;
    Some(Arc::new(load(&gpu)))
});

fn load(gpu: &Gpu) -> Model {
    Model::load_blocking(gpu, stories(), ModelOptions::new(WeightFormat::F32), |_| {}).unwrap()
}

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_file(stories()).unwrap());

/// A decoder with blocks of 8 tokens.
fn decoder(num_blocks: u32, format: KvFormat, prefix_cache: bool) -> Option<Decoder> {
    let mut options = DecoderOptions::default();
    (options.num_blocks, options.block_size, options.max_step_tokens) = (num_blocks, 8, 64);
    (options.k_format, options.v_format, options.prefix_cache) = (format, format, prefix_cache);
    Some(Decoder::new_blocking(Arc::clone(MODEL.as_ref()?), options).unwrap())
}

fn engine(decoder: Decoder, options: EngineOptions) -> Engine {
    Engine::new(decoder, Some(TOKENIZER.clone()), options).unwrap()
}

fn options(change: impl FnOnce(&mut EngineOptions)) -> EngineOptions {
    let mut options = EngineOptions::default();
    change(&mut options);
    options
}

/// What an answer was.
#[derive(Debug, PartialEq)]
struct Collected {
    tokens: Vec<u32>,
    text: String,
    reason: EndReason,
    usage: Usage,
    logprobs: Vec<Option<TokenLogprob>>,
}

/// All of an answer that has ended.
fn collect(mut answer: Answer) -> Collected {
    let (mut tokens, mut text, mut logprobs) = (Vec::new(), String::new(), Vec::new());
    loop {
        match answer.try_next().expect("the request has ended") {
            Event::Token { token, text: piece, logprob } => {
                tokens.push(token);
                logprobs.push(logprob);
                text += &piece;
            }
            Event::End { reason, text: rest, usage } => {
                assert!(answer.try_next().is_none(), "nothing comes after the end");
                assert_eq!(usage.new_tokens as usize, tokens.len());
                return Collected { tokens, text: text + &rest, reason, usage, logprobs };
            }
            _ => unreachable!("there are two kinds of events"),
        }
    }
}

fn prompt(text: &str) -> Vec<u32> {
    TOKENIZER.encode(text, true).unwrap()
}

/// Draws with a seed; the temperature makes texts differ.
fn drawn(seed: u64) -> Sampling {
    let mut sampling = Sampling::default();
    (sampling.temperature, sampling.seed) = (0.8, seed);
    sampling
}

/// Long enough for any test, as nothing here may hang.
const PATIENCE: Duration = Duration::from_secs(120);

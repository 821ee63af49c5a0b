//! The command line.

use std::path::PathBuf;

use clap::Parser;
use folio::model::{DecoderOptions, ModelConfig, Sampling, WeightFormat};
use folio::{KvFormat, KvFormats};

/// Streams text from a Hugging Face checkpoint (GPT-2, Llama, Mistral, Qwen2, Qwen3, GPT-NeoX) through folio's paged KV cache.
///
/// On a terminal it reads prompts until an empty line or Ctrl-D. Piped text is taken as prompts, one per line. With neither, the story model
/// of this repository holds a short fixed conversation. Ctrl-C ends an answer; pressed twice, it ends the program.
#[derive(Clone, Parser)]
#[command(version, after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Folder with config.json, tokenizer.json and safetensors [default: the story model of this repository]
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// What to say, once per turn; may be given several times. Without it: prompts from the terminal or a pipe
    #[arg(long, short, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Vec<String>,
    /// Tokens per answer, at most
    #[arg(long, short = 'n', default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    pub(crate) max_tokens: u32,
    /// Answers that continue each prompt side by side, from one cached copy of it
    #[arg(long, short, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), allow_negative_numbers = true)]
    pub(crate) branches: u32,

    /// 0 takes the most probable token; higher is more adventurous [default: 0.8, and 0 for questions to the story model]
    #[arg(long, short, help_heading = "Sampling", value_name = "T", value_parser = temperature, allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Only the K most probable tokens
    #[arg(long, value_name = "K", help_heading = "Sampling", value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    pub(crate) top_k: Option<u32>,
    /// Only the most probable tokens that make up this probability
    #[arg(long, value_name = "P", help_heading = "Sampling", value_parser = top_p, allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Only tokens at least this probable, relative to the best
    #[arg(long, value_name = "P", help_heading = "Sampling", value_parser = min_p, allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,
    /// Above 1: tokens that have occurred become less probable
    #[arg(long, default_value_t = 1.0, value_name = "R", help_heading = "Sampling", value_parser = penalty, allow_negative_numbers = true)]
    pub(crate) repetition_penalty: f32,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 0, value_name = "SEED", help_heading = "Sampling")]
    pub(crate) seed: u64,

    #[arg(long, default_value = "f16", value_name = "FORMAT", help_heading = "Cache", help = cache_help())]
    pub(crate) cache: KvFormats,
    /// Tokens per block
    #[arg(long, default_value_t = 16, help_heading = "Cache", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256), allow_negative_numbers = true)]
    pub(crate) block_size: u32,
    /// Blocks of the pool [default: room for the model's positions, once per branch, at most 512 MiB]
    #[arg(long, help_heading = "Cache", value_name = "N", value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    pub(crate) blocks: Option<u32>,

    /// How the weights of the linear layers are stored: f32, f16, int8 or int4
    #[arg(long, default_value = "f16", value_name = "FORMAT", help_heading = "Device")]
    pub(crate) weights: WeightFormat,
    /// Part of an adapter's name [default: the best adapter]
    #[arg(long, help_heading = "Device", value_name = "NAME")]
    pub(crate) adapter: Option<String>,
    /// Kernel sizes for this adapter, as the example `tune` writes them
    #[arg(long, help_heading = "Device", value_name = "FILE")]
    pub(crate) tuning: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  chat                                        the story model: a conversation on a terminal, a fixed one elsewhere
  chat -p 'Once upon a time' -t 0.8 -b 4      four stories from one prompt
  echo 'Once upon a time' | chat              a prompt from a pipe
  chat --model ~/models/Qwen3-0.6B -p 'The capital of France is' -n 20";

fn cache_help() -> String {
    let names: Vec<_> = KvFormat::ALL.iter().map(|format| format.to_string().to_ascii_lowercase()).collect();
    format!(
        "How keys and values are stored: {}; or both apart, as in int8:int4. Formats with -channel are for keys",
        names.join(", ")
    )
}

/// A number, in the range that the sampler accepts.
fn sampled(text: &str, set: impl FnOnce(&mut Sampling, f32)) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("got {text:?}, need a number"))?;
    let mut sampling = Sampling::default();
    set(&mut sampling, value);
    sampling.validate().map_err(|error| error.to_string())?;
    Ok(value)
}

fn temperature(text: &str) -> Result<f32, String> {
    sampled(text, |sampling, value| sampling.temperature = value)
}

fn top_p(text: &str) -> Result<f32, String> {
    sampled(text, |sampling, value| sampling.top_p = Some(value))
}

fn min_p(text: &str) -> Result<f32, String> {
    sampled(text, |sampling, value| sampling.min_p = Some(value))
}

fn penalty(text: &str) -> Result<f32, String> {
    sampled(text, |sampling, value| sampling.repetition_penalty = value)
}

impl Options {
    pub(crate) fn sampling(&self, branch: u32, default_temperature: f32) -> Sampling {
        let mut sampling = Sampling::default();
        sampling.temperature = self.temperature.unwrap_or(default_temperature);
        sampling.top_k = self.top_k;
        sampling.top_p = self.top_p;
        sampling.min_p = self.min_p;
        sampling.repetition_penalty = self.repetition_penalty;
        sampling.seed = self.seed.wrapping_add(u64::from(branch));
        sampling
    }

    pub(crate) fn decoder(&self, model: &ModelConfig) -> DecoderOptions {
        const MAX_BYTES: u64 = 512 << 20;
        let mut options = DecoderOptions::default();
        options.block_size = self.block_size;
        options.k_format = self.cache.k;
        options.v_format = self.cache.v;
        let per_sequence = model.max_positions.div_ceil(self.block_size) + 1;
        let affordable = MAX_BYTES / options.cache_config(model).block_bytes().max(1);
        let affordable = affordable.clamp(1, u64::from(u32::MAX)) as u32;
        options.num_blocks = self.blocks.unwrap_or(per_sequence.saturating_mul(self.branches).min(affordable));
        options
    }
}

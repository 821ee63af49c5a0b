//! The command line of `folio chat`.

use folio::model::Sampling;

use crate::load::LoadOptions;

/// Talk with a model, or let it go on with a text
///
/// Streams text from a Hugging Face checkpoint or a GGUF file (Llama, Mistral, Mixtral, Qwen2, Qwen3 with or without experts, Gemma 2 and 3, Phi-3,
/// gpt-oss, DeepSeek-V2 and V3, dots.llm1, SmolLM3, OLMo 2, GPT-NeoX, GPT-2) through folio's paged KV cache. For a model with a chat template, what is said are the turns of a conversation; any other goes on with the text.
///
/// On a terminal it reads prompts until an empty line or Ctrl-D. Piped text is taken as prompts, one per line. With neither, the story model
/// of this repository holds a short fixed conversation. Ctrl-C ends an answer; pressed twice, it ends the program.
#[derive(Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) load: LoadOptions,

    /// What to say, once per turn; may be given several times. Without it: prompts from the terminal or a pipe
    #[arg(long, short, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Vec<String>,
    /// What a model with a chat template is told before the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// Tokens per answer, at most
    #[arg(long, short = 'n', default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    pub(crate) max_tokens: u32,
    /// Answers to each prompt side by side, from one cached copy of it
    #[arg(long, short, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), allow_negative_numbers = true)]
    pub(crate) branches: u32,
    /// Show the blocks of the cache beside the text as it comes; needs a terminal
    #[arg(long, short, conflicts_with = "verbose")]
    pub(crate) watch: bool,
    /// At the end: adapter, times, and what the cache held
    #[arg(long, short)]
    pub(crate) verbose: bool,

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
}

const EXAMPLES: &str = "\
Examples:
  folio chat                                        the story model: a conversation on a terminal, a fixed one elsewhere
  folio chat -p 'Once upon a time' -t 0.8 -b 4      four stories from one prompt
  echo 'Once upon a time' | folio chat              a prompt from a pipe
  folio chat --watch                                the cache's blocks beside the text
  folio chat --model ~/models/Qwen3-0.6B --system 'Answer in one sentence.'
  folio chat --model ~/models/Qwen3-0.6B --raw -p 'The capital of France is' -n 20";

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
}

//! [`Sampler`]: the next token of each row of logits, drawn on the GPU.

use std::sync::Arc;

use minijinja::context;

use super::rows::Rows;
use crate::gpu::{Dispatch, Program, Recorder, Upload};
use crate::kernel::{Access, Binding, Profile, ShaderFeatures, Source, render};
use crate::plan::MAX_GRID;
use crate::{BufferRef, Error, Gpu, Result};

/// How a token is chosen. The steps follow one another as in Hugging Face's `generate`:
///
/// 1. `repetition_penalty`: logits of tokens of the history are divided by it if they are positive, else multiplied (Keskar et al. 2019).
/// 2. `temperature`: the logits are divided by it; at 0 the largest wins, of equal ones the lowest token, and nothing below applies.
/// 3. `top_k`: only tokens whose logit is at least the k-th largest are kept, so more than k if several are equal to it.
/// 4. `top_p` (Holtzman et al. 2020): of these, only the most probable ones that are needed for a mass of p; all tokens that are as
///    probable as the last of them are kept too. At least one.
/// 5. `min_p` (Nguyen et al. 2024): of these, only tokens that are at least `min_p` times as probable as the most probable one.
/// 6. One of the kept tokens is drawn, with its probability among them.
///
/// The draw is the token of the largest `logit + Gumbel noise`. The noise of a token depends on nothing but `seed`, the request's
/// `draw_index` and the token: it is word `token % 4` of the random block that Philox 4x32-10 (Salmon et al. 2011) computes from key `seed`
/// (low word first) and counter `(token / 4, draw_index, 0, 0)`. So a draw can be repeated, in any batch and on any device. Devices may
/// differ only where rounding decides: the two best scores, or the mass of a set and p, are closer than about 1e-5.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Sampling {
    /// 0: greedy. Above 1 flattens the distribution, below 1 sharpens it.
    pub temperature: f32,
    /// At least 1. `None`: all tokens.
    pub top_k: Option<u32>,
    /// Above 0, at most 1. `None`, or 1: all tokens.
    pub top_p: Option<f32>,
    /// From 0 to 1. `None`, or 0: all tokens.
    pub min_p: Option<f32>,
    /// Above 0; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Picks the random numbers. Requests with the same seed and draw index have the same noise: give each sequence its own.
    pub seed: u64,
}

impl Default for Sampling {
    /// The model's own distribution: temperature 1, no filters, seed 0.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Always the most probable token.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::argument("temperature", self.temperature, "a finite number, at least 0"));
        }
        if self.top_k == Some(0) {
            return Err(Error::argument("top_k", 0, "at least 1, or None"));
        }
        if let Some(p) = self.top_p
            && !(p > 0.0 && p <= 1.0)
        {
            return Err(Error::argument("top_p", p, "a number above 0 and at most 1, or None"));
        }
        if let Some(p) = self.min_p
            && !(0.0..=1.0).contains(&p)
        {
            return Err(Error::argument("min_p", p, "a number from 0 to 1, or None"));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return Err(Error::argument("repetition_penalty", self.repetition_penalty, "a finite number above 0"));
        }
        Ok(())
    }

    fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    fn has_penalty(&self) -> bool {
        self.repetition_penalty != 1.0
    }
}

/// What is asked of one row of logits.
#[derive(Clone, Copy, Debug)]
pub struct SamplingRequest<'a> {
    /// How the token is chosen.
    pub sampling: Sampling,
    /// Which draw of the seed this is: the number of tokens that the sequence has drawn so far, say.
    pub draw_index: u32,
    /// The sequence's tokens, in any order, for the repetition penalty. Not looked at if that is 1.
    pub history: &'a [u32],
    /// Whether the token's log probability is wanted, which costs one more pass over the row.
    pub logprob: bool,
    /// The tokens that may be drawn, a bit each, lowest first: `vocab.div_ceil(32)` words. `None`: all. The others count as if their logits
    /// were -infinity.
    pub allowed: Option<&'a [u32]>,
}

/// What a row of logits yielded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// The token. `None`: the row has NaN, +infinity, or no finite logit of an allowed token.
    pub token: Option<u32>,
    /// Natural logarithm of the token's probability in the softmax of the allowed tokens after the repetition penalty, before temperature
    /// and filters, if it was asked for.
    pub logprob: Option<f32>,
    /// Tokens that the draw was from; 1 if greedy, 0 without a token.
    pub num_kept: u32,
}

/// Largest vocabulary: 256 invocations at their most iterations, four tokens each.
pub(crate) const MAX_VOCAB: u32 = 4 * 256 * MAX_ITERATIONS;

/// Most iterations of one loop over a row. There are at most 34 such loops, and llvmpipe silently stops counting iterations at 65 535 per
/// invocation: this stays below half of that, as the rest of folio does.
const MAX_ITERATIONS: u32 = 944;

/// Most tokens that the search for thresholds keeps in workgroup memory: what WebGPU's 16 KiB leave beside the sums of 256 invocations.
const MAX_CANDIDATES: u32 = 2048;

/// Words of a request in the upload, before the bits of the histories.
const REQUEST_WORDS: usize = 12;

/// The kernels of a vocabulary's size.
#[derive(Debug)]
pub struct Sampler {
    gpu: Gpu,
    vocab: u32,
    /// By `greedy + 2 * edits`: simple requests run, and on some drivers compile, less.
    programs: [Arc<Program>; 4],
}

impl Sampler {
    /// Words of the output per row.
    pub const OUTPUT_WORDS: u32 = 4;

    /// Compiles the kernels for rows of `vocab` logits.
    ///
    /// # Errors
    /// [`Error::Argument`] if `vocab` is 0 or above 966 656; [`Error::Unsupported`] if the device is below WebGPU's default limits;
    /// [`Error::Wgpu`].
    pub async fn new(gpu: &Gpu, vocab: u32) -> Result<Self> {
        let compile = async |greedy, edits| {
            let source = Self::source(gpu.profile(), vocab, greedy, edits)?;
            Program::get(gpu, source).await
        };
        let programs = [
            compile(false, false).await?,
            compile(true, false).await?,
            compile(false, true).await?,
            compile(true, true).await?,
        ];
        Ok(Self { gpu: gpu.clone(), vocab, programs })
    }

    /// The text of a kernel, for reading and for tests: the one for batches whose requests are all greedy or not, and where some edit the
    /// logits, by a repetition penalty or a set of allowed tokens, or none does.
    ///
    /// # Errors
    /// [`Error::Argument`] for a vocabulary that breaks the rule.
    pub fn source(profile: Profile, vocab: u32, greedy: bool, edits: bool) -> Result<Source> {
        if vocab == 0 || vocab > MAX_VOCAB {
            return Err(Error::argument("vocab", vocab, format!("1 to {MAX_VOCAB}")));
        }
        let quads = vocab.div_ceil(4);
        let (lanes, group) = match profile {
            Profile::Gpu => (256, 256),
            // One subgroup with its own range of the row reads fastest; more of them only keep the iterations within bounds.
            Profile::Cpu => (quads.div_ceil(MAX_ITERATIONS).next_power_of_two().max(8), 8),
        };
        let values = context! {
            vocab,
            lanes,
            group,
            greedy,
            edits,
            candidates => MAX_CANDIDATES,
            profile_cpu => profile == Profile::Cpu,
        };
        Ok(Source {
            entry_point: "sample",
            text: render("model/sample.wgsl", values)?,
            bindings: vec![
                Binding::new("logits", Access::Read),
                Binding::new("requests", Access::Read),
                Binding::new("result", Access::Write),
            ],
            workgroup_size: lanes,
            workgroup_bytes: lanes * 32 + if greedy { 0 } else { MAX_CANDIDATES * 4 },
            features: ShaderFeatures::default(),
        })
    }

    /// Logits per row.
    #[must_use]
    pub fn vocab(&self) -> u32 {
        self.vocab
    }

    /// Records the choice of a token per row. `logits` is `[requests.len(), vocab]`; `output` takes [`OUTPUT_WORDS`](Self::OUTPUT_WORDS) u32
    /// per row, in a buffer of its own with usage `STORAGE`, for [`Sampler::read_output`] or for kernels: `(token, status, bits of the
    /// log probability, tokens kept)`. Status is 1 with a token, 5 with a token and its log probability, and 2 without: then the token
    /// is `0xffffffff`.
    ///
    /// # Errors
    /// [`Error::Argument`] for requests that break a rule, a token of a history outside the vocabulary, a set of allowed tokens of another
    /// length, or ranges that don't fit;
    /// [`Error::Wgpu`].
    pub fn record<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        logits: Rows<'_>,
        requests: &[SamplingRequest<'_>],
        output: impl Into<BufferRef<'a>>,
    ) -> Result<()> {
        let rows = u32::try_from(requests.len()).unwrap_or(u32::MAX);
        if rows == 0 || rows > MAX_GRID {
            return Err(Error::argument("requests", rows, format!("1 to {MAX_GRID}")));
        }
        let gpu = &self.gpu;
        logits.check(gpu, "logits", rows, self.vocab)?;
        let elements = u64::from(rows) * u64::from(Self::OUTPUT_WORDS);
        let output = output.into().check(gpu, "output", elements, false)?;
        if output.buffer() == logits.buffer {
            return Err(Error::argument("output", "the buffer of the logits", "a buffer of its own"));
        }
        let (words, lease) = Upload::new(gpu, "requests", self.request_words(requests)?)?.buffer()?;
        let greedy = requests.iter().all(|request| request.sampling.is_greedy());
        let edits = requests.iter().any(|request| request.sampling.has_penalty() || request.allowed.is_some());
        let program = &self.programs[usize::from(greedy) + 2 * usize::from(edits)];
        let resources = vec![logits.binding(), words.as_entire_binding(), output.binding()];
        let dispatch = Dispatch { program, resources, grid: [rows, 1, 1] };
        recorder.into().record(gpu, "folio sample", &[dispatch], &[lease])
    }

    /// What the output of [`Sampler::record`] says, row by row.
    #[must_use]
    pub fn read_output(words: &[u32]) -> Vec<Sampled> {
        words
            .chunks_exact(Self::OUTPUT_WORDS as usize)
            .map(|row| Sampled {
                token: (row[1] & 1 != 0).then_some(row[0]),
                logprob: (row[1] & 4 != 0).then_some(f32::from_bits(row[2])),
                num_kept: row[3],
            })
            .collect()
    }

    /// The upload: [`REQUEST_WORDS`] per request, then sets of a bit per token of the vocabulary: histories, and tokens that are allowed.
    fn request_words(&self, requests: &[SamplingRequest<'_>]) -> Result<Vec<u32>> {
        let mut words = vec![0; requests.len() * REQUEST_WORDS];
        for (i, SamplingRequest { sampling, draw_index, history, logprob, allowed }) in requests.iter().enumerate() {
            sampling.validate()?;
            let set_words = self.vocab.div_ceil(32) as usize;
            let allowed_offset = words.len();
            if let Some(allowed) = allowed {
                if allowed.len() != set_words {
                    let got = format!("{} words", allowed.len());
                    return Err(Error::argument("allowed", got, format!("a bit per token, {set_words} words")));
                }
                words.extend_from_slice(allowed);
            }
            let history_offset = words.len();
            if sampling.has_penalty() {
                words.resize(history_offset + set_words, 0);
                for &token in *history {
                    if token >= self.vocab {
                        return Err(Error::argument("history", token, format!("tokens below {}", self.vocab)));
                    }
                    words[history_offset + token as usize / 32] |= 1 << (token % 32);
                }
            }
            let inverse = |x: f32| (1.0 / x).min(f32::MAX);
            let log_min_p = sampling.min_p.filter(|&p| p > 0.0).map_or(f32::MIN, f32::ln);
            words[i * REQUEST_WORDS..][..REQUEST_WORDS].copy_from_slice(&[
                u32::from(sampling.is_greedy()) | u32::from(*logprob) << 1,
                inverse(sampling.temperature).to_bits(),
                sampling.top_k.unwrap_or(u32::MAX),
                sampling.top_p.unwrap_or(1.0).to_bits(),
                log_min_p.to_bits(),
                sampling.repetition_penalty.to_bits(),
                inverse(sampling.repetition_penalty).to_bits(),
                sampling.seed as u32,
                (sampling.seed >> 32) as u32,
                *draw_index,
                if sampling.has_penalty() { history_offset as u32 } else { 0 },
                if allowed.is_some() { allowed_offset as u32 } else { 0 },
            ]);
        }
        Ok(words)
    }
}

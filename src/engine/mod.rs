//! Continuous batching on a [`Decoder`]: many requests share its cache and its steps, each joins and leaves when it likes.
//!
//! An [`Engine`] has no thread, no runtime and no timer. [`Engine::step`] records and submits one step of the model and hands out what came of it; a
//! host with a frame loop calls it when it likes. [`Engine::spawn`] is the thread for everybody else. What a request yields is a stream of events,
//! an [`Answer`]; dropping it cancels the request.
//!
//! Which requests take part in a step is decided by a [`Scheduler`].

mod active;
mod beams;
mod drafts;
#[cfg_attr(not(feature = "grammar"), path = "no_grammar.rs")]
mod grammar;
mod inspect;
mod propose;
mod request;
#[cfg(not(target_arch = "wasm32"))]
mod spawn;
mod step;
mod text;

pub use drafts::DraftTree;
pub use inspect::{BlockState, Inspection, RequestPhase, RequestState};
pub use propose::{DraftModel, Draftable, PromptLookup, Proposals, Proposer};
pub use request::{Answer, EndReason, Event, Failure, Grammar, Request, SubmitError, Usage};
#[cfg(not(target_arch = "wasm32"))]
pub use spawn::{EngineClient, EngineHandle};
pub use step::StepReport;

use std::collections::HashMap;
use std::time::Duration;

use web_time::Instant;

use crate::Gpu;
use crate::model::{Decoder, ModelError, ModelResult, Tokenizer};
use crate::schedule::{Demand, RequestId, Scheduler, SchedulerConfig};
use active::Active;

/// How an [`Engine`] shares its decoder out.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Tokens of a step, at most; `None`: the decoder's `max_step_tokens`, which is the most.
    pub max_step_tokens: Option<u32>,
    /// Requests with tokens in the cache at the same time, at most.
    pub max_running: u32,
    /// Requests that wait, at most; more are refused.
    pub max_queued: u32,
    /// How often a request loses its blocks to another, at most.
    pub max_preemptions: u32,
    /// The head start that a level of priority is worth.
    pub ageing: Duration,
    /// Memory of the host for swapped-out requests, in bytes.
    pub max_swapped_bytes: u64,
    /// Drafts of a request in a step, at most, on all branches, if there is a [`Proposer`]. How many it gets one after another follows how many were right.
    pub max_drafts: u32,
}

impl Default for EngineOptions {
    /// 256 running and 1024 waiting requests, 3 preemptions, 10 s of head start per level, 1 GiB for swapped-out ones, 16
    /// drafts.
    fn default() -> Self {
        Self {
            max_step_tokens: None,
            max_running: 256,
            max_queued: 1024,
            max_preemptions: 3,
            ageing: Duration::from_secs(10),
            max_swapped_bytes: 1 << 30,
            max_drafts: 16,
        }
    }
}

impl EngineOptions {
    fn scheduler(&self, decoder: &Decoder) -> SchedulerConfig {
        let options = decoder.options();
        let cache = decoder.cache().config();
        let mut config = SchedulerConfig::new(cache.num_blocks, cache.block_size);
        config.groups = cache.groups;
        config.max_step_tokens = self.max_step_tokens.unwrap_or(options.max_step_tokens).min(options.max_step_tokens);
        config.max_running = self.max_running;
        config.max_queued = self.max_queued;
        config.max_preemptions = self.max_preemptions;
        config.ageing = self.ageing;
        let blocks = self.max_swapped_bytes / decoder.bytes_per_block().max(1);
        config.max_swapped_blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        config
    }
}

/// A decoder that many requests share.
#[derive(Debug)]
pub struct Engine {
    decoder: Decoder,
    tokenizer: Option<Tokenizer>,
    scheduler: Scheduler,
    requests: HashMap<RequestId, Active>,
    start: Instant,
    costs: step::MeasuredCosts,
    proposer: Option<Box<dyn Proposer>>,
    max_drafts: u32,
    grammars: grammar::Grammars,
    last_step: StepReport,
    num_steps: u64,
    num_sampled_tokens: u64,
    /// Set while a step is carried out. If it is set when the next one begins, a step's future was dropped half-way.
    in_step: bool,
}

impl Engine {
    /// Takes a decoder, which must not have sequences of its own: their blocks would be missing. With a tokenizer answers have text.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a decoder with sequences, and for options out of range.
    pub fn new(decoder: Decoder, tokenizer: Option<Tokenizer>, options: EngineOptions) -> ModelResult<Self> {
        let sequences = decoder.usage().sequences;
        if sequences > 0 {
            let got = format!("{sequences} sequences");
            return Err(ModelError::argument("decoder", got, "one without sequences; free them first"));
        }
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_vocab_size(decoder.model().config().vocab_size)?;
        }
        let scheduler = Scheduler::new(options.scheduler(&decoder))?;
        let costs = step::MeasuredCosts::default();
        let start = Instant::now();
        Ok(Self {
            decoder,
            tokenizer,
            scheduler,
            requests: HashMap::new(),
            start,
            costs,
            proposer: None,
            max_drafts: options.max_drafts,
            grammars: grammar::Grammars::default(),
            last_step: StepReport::default(),
            num_steps: 0,
            num_sampled_tokens: 0,
            in_step: false,
        })
    }

    /// The same with speculative decoding: the proposer's drafts are verified in the steps of all, in what room these have left. Tokens are the
    /// same as without.
    #[must_use]
    pub fn with_proposer(self, proposer: impl Proposer + 'static) -> Self {
        Self { proposer: Some(Box::new(proposer)), ..self }
    }

    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.decoder.gpu()
    }

    /// The decoder, to look into.
    #[must_use]
    pub const fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The tokenizer, if it was given one.
    #[must_use]
    pub const fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Requests that have not ended.
    #[must_use]
    pub fn num_requests(&self) -> usize {
        self.requests.len()
    }

    /// Whether [`step`](Self::step) has nothing to do.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }

    /// Takes a request. It starts in one of the next steps.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] for an empty prompt, ids of prompt or stops outside the vocabulary, a prompt longer than the model has positions,
    /// sampling settings outside their ranges, `max_tokens` or a time limit of 0, an empty stop string, stop strings without a tokenizer, a
    /// grammar that is none or has no stop token to end with, a beam search that is not greedy; [`SubmitError::Refused`] if the queue is full, a
    /// step has fewer tokens than there are beams, or the cache is too small for prompt and `max_tokens` even without other requests.
    pub fn submit(&mut self, request: Request) -> Result<Answer, SubmitError> {
        self.check(&request)?;
        let vocab = self.decoder.model().config().vocab_size;
        let start = |grammar| self.grammars.start(grammar, self.tokenizer.as_ref(), &request.stop_tokens, vocab);
        let constraint = request.grammar.as_ref().map(start).transpose()?;
        let now = self.start.elapsed();
        let max_positions = self.decoder.max_len();
        let prompt_tokens = request.prompt.len() as u32;
        // The last token of an answer is never fed, so it needs no position.
        let max_tokens = request.max_tokens.min(max_positions - prompt_tokens + 1);
        let mut demand = Demand::new(prompt_tokens, max_tokens);
        demand.priority = request.priority;
        demand.beams = request.beams;
        demand.deadline = request.time_limit.map(|limit| now.saturating_add(limit));
        let id = self.scheduler.submit(now, demand)?;
        let (events, answer) = Answer::new(id);
        let stream = self.tokenizer.as_ref().map(|tokenizer| tokenizer.stream_after(&request.prompt, true));
        self.requests.insert(id, Active::new(request, max_tokens, stream, constraint, events, now));
        Ok(answer)
    }

    /// Takes a request for `count` answers, all of them or none: seeds are that of the request and the numbers after it. The prompt is computed
    /// once; the others fork it as long as the first answer is in the cache.
    ///
    /// # Errors
    /// Those of [`submit`](Self::submit), and [`SubmitError::Invalid`] if `count` is 0 or more than may wait.
    pub fn submit_many(&mut self, request: Request, count: u32) -> Result<Vec<Answer>, SubmitError> {
        let max_queued = self.scheduler.config().max_queued;
        if count == 0 || count > max_queued {
            return Err(ModelError::argument("count", count, format!("1 to max_queued, {max_queued}")).into());
        }
        let mut answers: Vec<Answer> = Vec::new();
        for i in 0..count {
            let mut own = request.clone();
            own.sampling.seed = own.sampling.seed.wrapping_add(u64::from(i));
            match self.submit(own) {
                Ok(answer) => answers.push(answer),
                Err(error) => {
                    answers.iter().for_each(|answer| self.end(answer.id(), EndReason::Shutdown));
                    return Err(error);
                }
            }
        }
        for answer in &answers[1..] {
            if let Some(active) = self.requests.get_mut(&answer.id()) {
                active.sibling = Some(answers[0].id());
            }
        }
        Ok(answers)
    }

    fn check(&self, request: &Request) -> ModelResult<()> {
        let config = self.decoder.model().config();
        if request.prompt.is_empty() {
            return Err(ModelError::argument("prompt", "no tokens", "at least one"));
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id >= config.vocab_size) {
            let rule = format!("ids below vocab_size, {}", config.vocab_size);
            return Err(ModelError::argument("prompt", format!("id {id}"), rule));
        }
        if request.prompt.len() > self.decoder.max_len() as usize {
            let got = format!("{} tokens", request.prompt.len());
            let rule = format!("at most the model's {} positions", self.decoder.max_len());
            return Err(ModelError::argument("prompt", got, rule));
        }
        if let Some(id) = request.stop_tokens.iter().find(|&&id| id >= config.vocab_size) {
            let rule = format!("ids below vocab_size, {}", config.vocab_size);
            return Err(ModelError::argument("stop_tokens", format!("id {id}"), rule));
        }
        if request.stop_strings.iter().any(String::is_empty) {
            return Err(ModelError::argument("stop_strings", "an empty one", "texts of at least one character"));
        }
        if !request.stop_strings.is_empty() && self.tokenizer.is_none() {
            return Err(ModelError::argument("stop_strings", "no tokenizer", "an engine that was given one"));
        }
        if request.max_tokens == 0 {
            return Err(ModelError::argument("max_tokens", 0, "at least 1"));
        }
        if request.logprobs.is_some_and(|top| top > config.vocab_size) {
            let rule = format!("at most vocab_size, {}", config.vocab_size);
            return Err(ModelError::argument("logprobs", request.logprobs.unwrap_or_default(), rule));
        }
        if request.beams > 1 {
            let most = config.vocab_size.div_ceil(2);
            if request.beams > most {
                return Err(ModelError::argument(
                    "beams",
                    request.beams,
                    format!("at most half of vocab_size, {most}"),
                ));
            }
            let plain = request.sampling.temperature == 0.0 && request.sampling.repetition_penalty == 1.0;
            if !plain || request.grammar.is_some() {
                let got = "sampling, a penalty or a grammar";
                return Err(ModelError::argument("beams", got, "greedy sampling without a penalty, and no grammar"));
            }
        }
        if request.time_limit == Some(Duration::ZERO) {
            return Err(ModelError::argument("time_limit", "0 s", "more than that, or None"));
        }
        request.sampling.validate()?;
        Ok(())
    }

    /// Moves used blocks to the front of the cache between two steps, and returns how many moved: [`Decoder::defragment`].
    ///
    /// # Errors
    /// Those of [`Decoder::defragment`].
    pub async fn defragment(&mut self) -> ModelResult<u32> {
        self.decoder.defragment().await
    }

    /// Ends all requests, and gives the decoder back. Their answers end with [`EndReason::Shutdown`].
    pub fn shutdown(mut self) -> Decoder {
        let ids: Vec<_> = self.requests.keys().copied().collect();
        for id in ids {
            self.end(id, EndReason::Shutdown);
        }
        self.decoder
    }

    /// Runs steps until no request is left, waiting for the GPU.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    #[cfg(not(target_arch = "wasm32"))]
    pub fn run_blocking(&mut self) -> ModelResult<()> {
        let gpu = self.gpu().clone();
        while !self.is_idle() {
            gpu.block_on(self.step())?;
        }
        Ok(())
    }
}

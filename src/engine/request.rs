//! What goes into an engine, and what comes out.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use futures_core::Stream;

use crate::ErrorKind;
use crate::model::{ModelError, Sampling, TokenLogprob};
use crate::schedule::{Refusal, RequestId};

/// A text to be continued.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Request {
    /// Its tokens; at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen. Requests of one seed draw the same numbers: give each its own.
    pub sampling: Sampling,
    /// New tokens, at most; at least 1.
    pub max_tokens: u32,
    /// Tokens that end the answer and are not part of it.
    pub stop_tokens: Vec<u32>,
    /// Texts that end the answer where they begin. They need an engine with a tokenizer.
    pub stop_strings: Vec<String>,
    /// More than 1: beam search. So many texts grow side by side from the prompt, which they share; each step keeps the most probable ones. The search
    /// ends when as many texts have ended with a stop token, or `max_tokens` are there; the answer is the text whose tokens have the highest mean
    /// log-probability (the stop token counts, too), and comes at once. [`sampling`](Self::sampling) has to be greedy, without penalty.
    pub beams: u32,
    /// Log-probabilities of each token of the answer, and of so many most probable ones beside it. They cost a readback of a row of logits per
    /// token.
    pub logprobs: Option<u32>,
    /// What the answer must look like.
    pub grammar: Option<Grammar>,
    /// Higher comes first; see [`ageing`](crate::schedule::SchedulerConfig::ageing).
    pub priority: i32,
    /// It is given up if it takes longer than this from its submission on.
    pub time_limit: Option<Duration>,
}

impl Request {
    /// Greedy, without stops, of priority 0.
    #[must_use]
    pub fn new(prompt: impl Into<Vec<u32>>, max_tokens: u32) -> Self {
        Self {
            prompt: prompt.into(),
            sampling: Sampling::greedy(),
            max_tokens,
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            beams: 1,
            logprobs: None,
            grammar: None,
            priority: 0,
            time_limit: None,
        }
    }

    /// The same with these settings of sampling.
    #[must_use]
    pub fn with_sampling(self, sampling: Sampling) -> Self {
        Self { sampling, ..self }
    }

    /// The same with tokens and texts that end the answer.
    #[must_use]
    pub fn with_stops(self, stop_tokens: impl Into<Vec<u32>>, stop_strings: impl Into<Vec<String>>) -> Self {
        Self { stop_tokens: stop_tokens.into(), stop_strings: stop_strings.into(), ..self }
    }

    /// The same by beam search.
    #[must_use]
    pub fn with_beams(self, beams: u32) -> Self {
        Self { beams, ..self }
    }

    /// The same with log-probabilities, `top` of the most probable tokens among them.
    #[must_use]
    pub fn with_logprobs(self, top: u32) -> Self {
        Self { logprobs: Some(top), ..self }
    }

    /// The same with an answer of this form.
    #[must_use]
    pub fn with_grammar(self, grammar: Grammar) -> Self {
        Self { grammar: Some(grammar), ..self }
    }

    /// The same with another priority.
    #[must_use]
    pub fn with_priority(self, priority: i32) -> Self {
        Self { priority, ..self }
    }

    /// The same with a limit of time.
    #[must_use]
    pub fn with_time_limit(self, limit: Duration) -> Self {
        Self { time_limit: Some(limit), ..self }
    }
}

/// What an answer must look like. Needs folio's feature `grammar`, an engine with a tokenizer, and a request with a stop token, which comes when
/// the text is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Grammar {
    /// JSON of a schema, which is JSON text itself; `{}` stands for any JSON. Without white space between its tokens, unless the schema says
    /// `"x-guidance": {"whitespace_flexible": true}`.
    JsonSchema(String),
    /// Text that a regular expression matches as a whole.
    Regex(String),
    /// A grammar in the dialect of Lark that `llguidance` reads.
    Lark(String),
}

/// Why a request could not be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// Who has to act.
    pub kind: ErrorKind,
    /// The error's text.
    pub message: String,
}

impl From<&ModelError> for Failure {
    fn from(error: &ModelError) -> Self {
        Self { kind: error.kind(), message: error.to_string() }
    }
}

/// Why an answer has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EndReason {
    /// The model made this stop token.
    StopToken(u32),
    /// The text had this stop string.
    StopString(String),
    /// By its grammar the text is complete, and nothing may follow.
    Complete,
    /// `max_tokens` are there.
    Length,
    /// The model has no more positions.
    Positions,
    /// Its time limit has passed.
    TimeLimit,
    /// The engine was shut down.
    Shutdown,
    /// It can't be continued. Other requests may go on.
    Failed(Failure),
}

/// What an answer took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Those of them that were in the prefix index, or came by fork, when the request first started.
    pub cached_tokens: u32,
    /// Tokens that went through the model for this request, those of computing again after a preemption included.
    pub computed_tokens: u32,
    /// Drafts that were verified for this request, in [`computed_tokens`](Self::computed_tokens) too.
    pub drafted_tokens: u32,
    /// Those of them that were right.
    pub accepted_tokens: u32,
    /// Tokens of the answer, without a stop token.
    pub new_tokens: u32,
    /// How often it lost its blocks and got them back.
    pub preemptions: u32,
    /// From its submission to its first start.
    pub queue_time: Duration,
    /// From its submission to its first token, if there was one.
    pub time_to_first_token: Option<Duration>,
    /// From its submission to its end.
    pub total_time: Duration,
}

/// What an [`Answer`] yields: tokens, then one end. There is no end if the engine was dropped without [`Engine::shutdown`](super::Engine::shutdown).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A token.
    Token {
        /// Its id.
        token: u32,
        /// Text that is complete with it: empty while a character is not, or while it may be the beginning of a stop string, and without a
        /// tokenizer.
        text: String,
        /// How probable it was, if the request asked for that.
        logprob: Option<TokenLogprob>,
    },
    /// The last event.
    End {
        /// Why.
        reason: EndReason,
        /// Text that was held back, and now is known to belong to the answer.
        text: String,
        /// What it took.
        usage: Usage,
    },
}

/// The events of a request, as a [`Stream`]. **Dropping it cancels the request**: its blocks are free when the engine's next step ends.
#[derive(Debug)]
pub struct Answer {
    id: RequestId,
    events: UnboundedReceiver<Event>,
}

impl Answer {
    /// The engine's end, and an answer without an id yet.
    pub(super) fn new(id: RequestId) -> (UnboundedSender<Event>, Self) {
        let (sender, events) = unbounded();
        (sender, Self { id, events })
    }

    /// The request.
    #[must_use]
    pub const fn id(&self) -> RequestId {
        self.id
    }

    /// The next event if it is there. `None` says nothing about whether there will be more.
    pub fn try_next(&mut self) -> Option<Event> {
        let mut context = Context::from_waker(std::task::Waker::noop());
        match Pin::new(&mut self.events).poll_next(&mut context) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        }
    }

    /// Waits for the next event. `None` after the last one. The engine must be stepped by another thread meanwhile.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn next_blocking(&mut self) -> Option<Event> {
        pollster::block_on(std::future::poll_fn(|context| Pin::new(&mut self.events).poll_next(context)))
    }
}

impl Stream for Answer {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        Pin::new(&mut self.events).poll_next(context)
    }
}

/// Why a request was not taken. Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// There is no room for it, now or ever.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It breaks a rule.
    #[error(transparent)]
    Invalid(#[from] ModelError),
    /// The engine has ended.
    #[error("engine: it has been shut down; need a running one")]
    Shutdown,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StopToken(token) => write!(f, "stop token {token}"),
            Self::StopString(text) => write!(f, "stop string {text:?}"),
            Self::Complete => f.write_str("complete"),
            Self::Length => f.write_str("length"),
            Self::Positions => f.write_str("no more positions"),
            Self::TimeLimit => f.write_str("time limit"),
            Self::Shutdown => f.write_str("shutdown"),
            Self::Failed(failure) => write!(f, "failed: {}", failure.message),
        }
    }
}

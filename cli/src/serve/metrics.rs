//! What the server counts and measures, in the text format of OpenMetrics, which Prometheus reads.

use std::time::Duration;

use folio::engine::{Inspection, RequestPhase};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// How a request has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With an answer.
    Ok,
    /// The client was gone first.
    Cancelled,
    /// It broke a rule: a status from 400 to 499 that is none of those below.
    Invalid,
    /// Without a valid key.
    Unauthorized,
    /// The queue was full.
    QueueFull,
    /// Its time was up.
    Timeout,
    /// The server was stopping.
    Unavailable,
    /// Something broke here.
    Failed,
}

impl Outcome {
    /// Its name in metrics and in the log.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Cancelled => "cancelled",
            Self::Invalid => "invalid",
            Self::Unauthorized => "unauthorized",
            Self::QueueFull => "queue_full",
            Self::Timeout => "timeout",
            Self::Unavailable => "unavailable",
            Self::Failed => "failed",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: String,
    outcome: &'static str,
}

/// `prompt`, `cached` or `generated`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabels {
    kind: &'static str,
}

/// `used`: in the table of a request. `indexed`: kept for the prefix index only, so free for whoever needs room. `free`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BlockLabels {
    state: &'static str,
}

/// `waiting`, `running` or `swapped`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    phase: &'static str,
}

/// All of the server's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    tokens: Family<TokenLabels, Counter>,
    answers: Family<PhaseLabels, Gauge>,
    blocks: Family<BlockLabels, Gauge>,
    pub(crate) connections: Gauge,
    time_to_first_token: Histogram,
    token_gap: Histogram,
    request_time: Histogram,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        // From 1 ms to 524 s, in steps of a factor of 2.
        let times = || Histogram::new(exponential_buckets(0.001, 2.0, 20));
        let metrics = Self {
            registry: Registry::with_prefix("folio"),
            requests: Family::default(),
            tokens: Family::default(),
            answers: Family::default(),
            blocks: Family::default(),
            connections: Gauge::default(),
            time_to_first_token: times(),
            token_gap: times(),
            request_time: times(),
        };
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register("requests", "HTTP requests that have ended", self.requests.clone());
        registry.register(
            "tokens",
            "Tokens of prompts, those of them found in the cache, and new ones",
            self.tokens.clone(),
        );
        registry.register("answers", "Answers in the engine, by where they stand", self.answers.clone());
        registry.register("pool_blocks", "Blocks of the cache", self.blocks.clone());
        registry.register("connections", "Open connections", self.connections.clone());
        for (name, help, histogram) in [
            ("time_to_first_token", "From an answer's submission to its first token", &self.time_to_first_token),
            ("token_gap", "From one token of an answer to the next, as handed to the client", &self.token_gap),
            ("request_time", "From a request's headers to the end of its response", &self.request_time),
        ] {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
        self
    }

    /// Notes that a request has ended.
    pub(crate) fn request(&self, endpoint: &str, outcome: Outcome, time: Duration) {
        self.requests.get_or_create(&RequestLabels { endpoint: endpoint.to_owned(), outcome: outcome.name() }).inc();
        self.request_time.observe(time.as_secs_f64());
    }

    fn add_tokens(&self, kind: &'static str, count: u32) {
        self.tokens.get_or_create(&TokenLabels { kind }).inc_by(u64::from(count));
    }

    /// Notes the prompt of a request, once for all of its answers.
    pub(crate) fn prompt(&self, tokens: u32) {
        self.add_tokens("prompt", tokens);
    }

    /// Notes the end of an answer.
    pub(crate) fn answer(&self, usage: &folio::engine::Usage) {
        self.add_tokens("cached", usage.cached_tokens);
        if let Some(time) = usage.time_to_first_token {
            self.time_to_first_token.observe(time.as_secs_f64());
        }
    }

    /// Notes a token, and the time since the one before it.
    pub(crate) fn token(&self, gap: Option<Duration>) {
        self.add_tokens("generated", 1);
        if let Some(gap) = gap {
            self.token_gap.observe(gap.as_secs_f64());
        }
    }

    /// Sets the gauges to what the engine shows.
    pub(crate) fn inspected(&self, inspection: &Inspection) {
        let mut phases = [("waiting", 0), ("running", 0), ("swapped", 0)];
        for request in &inspection.requests {
            let phase = match request.phase {
                RequestPhase::Waiting => 0,
                RequestPhase::Swapped => 2,
                _ => 1,
            };
            phases[phase].1 += 1;
        }
        for (phase, count) in phases {
            self.answers.get_or_create(&PhaseLabels { phase }).set(count);
        }
        let mut states = [("used", 0), ("indexed", 0), ("free", 0)];
        for block in &inspection.blocks {
            let state = match (block.holders, block.indexed) {
                (1.., _) => 0,
                (0, true) => 1,
                (0, false) => 2,
            };
            states[state].1 += 1;
        }
        for (state, count) in states {
            self.blocks.get_or_create(&BlockLabels { state }).set(count);
        }
    }

    /// All of it as text.
    pub(crate) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

//! [`Scheduler`]: the requests and what is known of each.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Demand, Preemption, Refusal, RequestId, SchedulerConfig};
use crate::error::Result;

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Without blocks: it has never run, or was preempted to be computed again.
    Waiting,
    /// With blocks in the cache.
    Running,
    /// With blocks in the host's memory.
    Swapped,
}

/// A request.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) demand: Demand,
    /// Lower comes first: nanoseconds of `arrival - priority * ageing`, then the number.
    pub(super) rank: (i128, RequestId),
    pub(super) phase: Phase,
    /// Tokens of its text: the prompt, and what was sampled.
    pub(super) known: u32,
    /// Tokens of them in the cache.
    pub(super) cached: u32,
    pub(super) preemptions: u32,
    /// Guesses at what comes after its text, for the next step.
    pub(super) drafts: u32,
    /// When it last had tokens in a step, counted in chunks.
    pub(super) last_turn: u64,
}

impl Request {
    /// Tokens that it wants in the cache.
    pub(super) const fn remaining(&self) -> u32 {
        self.known.saturating_sub(self.cached)
    }

    /// Texts of it that are in the cache: one until the prompt is there.
    pub(super) fn num_texts(&self) -> u32 {
        if self.known > self.demand.prompt_tokens { self.demand.beams } else { 1 }
    }

    /// Tokens that it is sure to have in the cache soon: its text and the next token, if that is ever fed.
    pub(super) fn soon(&self) -> u32 {
        self.known.saturating_add(1).min(self.demand.max_cached()).max(self.known)
    }
}

/// Decides for every step which requests take part. See the [module](super).
#[derive(Clone, Debug)]
pub struct Scheduler {
    pub(super) config: SchedulerConfig,
    pub(super) requests: BTreeMap<RequestId, Request>,
    /// Chunks that were scheduled.
    pub(super) num_turns: u64,
    next: RequestId,
}

impl Scheduler {
    /// Without requests.
    ///
    /// # Errors
    /// Those of [`SchedulerConfig::validate`].
    pub fn new(config: SchedulerConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config, requests: BTreeMap::new(), num_turns: 0, next: RequestId(0) })
    }

    /// The rules.
    #[must_use]
    pub const fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Sets what was measured since.
    pub const fn set_costs(&mut self, costs: super::Costs) {
        self.config.costs = costs;
    }

    /// Takes a request.
    ///
    /// # Errors
    /// [`Refusal`]. Nothing has changed then.
    pub fn submit(&mut self, now: Duration, demand: Demand) -> std::result::Result<RequestId, Refusal> {
        if demand.prompt_tokens == 0 {
            return Err(Refusal::Empty("prompt_tokens"));
        }
        if demand.max_new_tokens == 0 {
            return Err(Refusal::Empty("max_new_tokens"));
        }
        if demand.beams == 0 {
            return Err(Refusal::Empty("beams"));
        }
        if demand.beams > self.config.max_step_tokens {
            return Err(Refusal::TooWide { got: demand.beams, have: self.config.max_step_tokens });
        }
        if demand.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Refusal::DeadlinePassed);
        }
        let need = u32::try_from(demand.max_blocks(&self.config)).unwrap_or(u32::MAX);
        // Numbers of tokens are u32 everywhere.
        let countable = demand.prompt_tokens.checked_add(demand.max_new_tokens).is_some();
        if need > self.config.num_blocks || !countable {
            return Err(Refusal::TooLong { need, have: self.config.num_blocks });
        }
        let queued = self.num_waiting();
        if queued >= self.config.max_queued {
            return Err(Refusal::QueueFull(queued));
        }
        let id = self.next;
        self.next = RequestId(id.0 + 1);
        let head_start = i128::from(demand.priority) * self.config.ageing.as_nanos() as i128;
        let request = Request {
            demand,
            rank: (now.as_nanos() as i128 - head_start, id),
            phase: Phase::Waiting,
            known: demand.prompt_tokens,
            cached: 0,
            preemptions: 0,
            drafts: 0,
            last_turn: 0,
        };
        self.requests.insert(id, request);
        Ok(id)
    }

    /// Forgets a request: it has ended, or nobody wants it any more. Returns whether it was there.
    pub fn remove(&mut self, request: RequestId) -> bool {
        self.requests.remove(&request).is_some()
    }

    /// Says how many tokens of a running request's text are in the cache now: after a step, or where the prefix index had another number than
    /// was planned with. A step that failed needs no call; it is planned again.
    pub fn set_cached(&mut self, request: RequestId, cached: u32) {
        if let Some(request) = self.requests.get_mut(&request) {
            request.cached = cached.min(request.known);
        }
    }

    /// Offers guesses at the next tokens of a running request that wants one token, to be verified in the next step if there is room. Any
    /// other step, and the one that takes them, forgets them. Of guesses that branch all count: each takes a token of the step and a slot of the cache.
    pub fn set_drafts(&mut self, request: RequestId, drafts: u32) {
        if let Some(request) = self.requests.get_mut(&request) {
            // Each draft that is right is followed by one more token, which is never fed if it is the last.
            let room = request.demand.max_cached().saturating_sub(request.known);
            request.drafts = drafts.min(room);
        }
    }

    /// Whether drafts for a request can be of use: it runs and wants one more token, and the next token won't be its last.
    #[must_use]
    pub fn may_draft(&self, request: RequestId) -> bool {
        self.requests.get(&request).is_some_and(|request| {
            let has_room = request.known < request.demand.max_cached() && request.demand.beams == 1;
            request.phase == Phase::Running && request.remaining() == 1 && has_room
        })
    }

    /// Adds a sampled token to a request's text. Ignored beyond its `max_new_tokens`, as the request has ended then.
    pub fn push_token(&mut self, request: RequestId) {
        if let Some(request) = self.requests.get_mut(&request) {
            let most = request.demand.prompt_tokens.saturating_add(request.demand.max_new_tokens);
            request.known = request.known.saturating_add(1).min(most);
        }
    }

    /// Says that a preempted request could not be swapped out, or not be brought back: it has no blocks anywhere and is computed again.
    pub fn set_lost(&mut self, request: RequestId) {
        if let Some(request) = self.requests.get_mut(&request) {
            (request.phase, request.cached) = (Phase::Waiting, 0);
        }
    }

    /// Says that a request has to start from its prompt, without blocks: its beams are lost.
    pub fn restart(&mut self, request: RequestId) {
        self.set_lost(request);
        if let Some(request) = self.requests.get_mut(&request) {
            request.known = request.demand.prompt_tokens;
        }
    }

    /// Requests that wait for blocks: new ones, and preempted ones that are computed again or swapped out.
    #[must_use]
    pub fn num_waiting(&self) -> u32 {
        self.count(|request| request.phase != Phase::Running)
    }

    /// Requests with blocks in the cache.
    #[must_use]
    pub fn num_running(&self) -> u32 {
        self.count(|request| request.phase == Phase::Running)
    }

    /// Blocks in the host's memory.
    #[must_use]
    pub fn num_swapped_blocks(&self) -> u32 {
        let swapped = self.requests.values().filter(|request| request.phase == Phase::Swapped);
        swapped.map(|request| self.config.held_blocks(request.cached)).sum()
    }

    /// Whether there is no request.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// How often a request was preempted; `None` for one that is not there.
    #[must_use]
    pub fn preemptions(&self, request: RequestId) -> Option<u32> {
        self.requests.get(&request).map(|request| request.preemptions)
    }

    /// Tokens of a request's text, and how many of them are in the cache or swapped out; `None` for one that is not there.
    #[must_use]
    pub fn progress(&self, request: RequestId) -> Option<(u32, u32)> {
        self.requests.get(&request).map(|request| (request.known, request.cached))
    }

    fn count(&self, which: impl Fn(&Request) -> bool) -> u32 {
        self.requests.values().filter(|request| which(request)).count() as u32
    }

    /// Whether a request is never preempted any more.
    pub(super) const fn is_pinned(&self, request: &Request) -> bool {
        request.preemptions >= self.config.max_preemptions || request.demand.beams > 1
    }

    /// Takes a running request's blocks away.
    pub(super) fn preempt(&mut self, id: RequestId) -> Option<Preemption> {
        let config = self.config;
        let swapped = self.num_swapped_blocks();
        let request = self.requests.get_mut(&id)?;
        let blocks = config.held_blocks(request.cached);
        let swap = config.costs.swap_block.saturating_mul(blocks).saturating_mul(2);
        let recompute = config.costs.compute_token.saturating_mul(request.cached);
        request.preemptions += 1;
        let fits = swapped.saturating_add(blocks) <= config.max_swapped_blocks;
        Some(if request.cached > 0 && fits && swap < recompute {
            request.phase = Phase::Swapped;
            Preemption::Swap
        } else {
            (request.phase, request.cached) = (Phase::Waiting, 0);
            Preemption::Recompute
        })
    }
}

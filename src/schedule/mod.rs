//! Continuous batching as a pure state machine: which requests go through the model in the next step, each with how many tokens.
//!
//! A [`Scheduler`] knows no GPU, no clock and no token: it counts. Time is what its caller says ([`Duration`] since any start), memory is what a
//! [`Memory`] says, and what it decides comes back as a [`StepSchedule`] for the caller to carry out. So a test runs thousands of workloads in a
//! second, and a program with another engine can use it as it is.
//!
//! * **No prompt phase, no decode phase.** A request has tokens that it wants in the cache, and tokens that are there. A step has a budget of
//!   tokens. Requests that want one more token come first, then chunks of those that want many (Sarathi-Serve, Agrawal et al. 2024).
//! * **Drafts** (speculative decoding) take what a step has left, of its tokens and of blocks. They never delay another request, nor cost it its
//!   blocks.
//! * **Order.** A level of priority is worth a head start of [`SchedulerConfig::ageing`]: requests are ranked by `arrival - priority * ageing`. That
//!   never changes while a request waits, and whoever comes later by more than the difference in levels can't overtake: nobody starves.
//! * **Progress.** A request is refused unless the pool can hold it alone. Where memory runs out the lowest rank is preempted; the highest
//!   rank only for a pinned request. After [`SchedulerConfig::max_preemptions`] a request is *pinned*: it is admitted again when its whole length has a
//!   reservation, and then stays until it ends.

mod memory;
mod scheduler;
mod step;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

pub use memory::{Memory, PrefixHit};
pub use scheduler::Scheduler;

use crate::error::{Error, Result};
use crate::layout::{LayerGroup, LayerGroups};

/// A request of one [`Scheduler`]. Numbers rise in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(crate) u64);

impl RequestId {
    /// The number: 0, 1, 2 ... in the order of submission.
    #[must_use]
    pub const fn index(self) -> u64 {
        self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request #{}", self.0)
    }
}

/// Sizes and rules of a [`Scheduler`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SchedulerConfig {
    /// Blocks of the cache.
    pub num_blocks: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// What each group of layers keeps of a request; a token takes a slot in every group. The caller gives blocks that have left a window back after each
    /// step.
    pub groups: LayerGroups,
    /// Tokens of a step, at most. More give a higher throughput, fewer a shorter time between the tokens of an answer.
    pub max_step_tokens: u32,
    /// Requests that have tokens in the cache at the same time, at most.
    pub max_running: u32,
    /// Requests that wait, at most; more are refused.
    pub max_queued: u32,
    /// How often a request is preempted, at most.
    pub max_preemptions: u32,
    /// The head start that a level of priority is worth. Also how far ahead in rank a waiting request must be to preempt a running one.
    pub ageing: Duration,
    /// Blocks of swapped-out requests that the host's memory may hold.
    pub max_swapped_blocks: u32,
    /// What decides between swapping and computing again.
    pub costs: Costs,
}

/// What it costs to bring a preempted request back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Moving a block to the host's memory, or back.
    pub swap_block: Duration,
    /// Computing a token as one of a long chunk.
    pub compute_token: Duration,
}

impl SchedulerConfig {
    /// Defaults for a cache: steps of up to 512 tokens, 256 requests running and 1024 waiting, 3 preemptions, 10 s of head start per level, and as
    /// many swapped blocks as the cache has. The costs say that a token is computed in the time in which a block is moved both ways, so
    /// swapping wins for blocks of more than one token; whoever measures should set them.
    #[must_use]
    pub const fn new(num_blocks: u32, block_size: u32) -> Self {
        Self {
            num_blocks,
            block_size,
            groups: LayerGroups::one(LayerGroup::ALL),
            max_step_tokens: 512,
            max_running: 256,
            max_queued: 1024,
            max_preemptions: 3,
            ageing: Duration::from_secs(10),
            max_swapped_blocks: num_blocks,
            costs: Costs { swap_block: Duration::from_micros(50), compute_token: Duration::from_micros(100) },
        }
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self) -> Result<()> {
        for (argument, value) in [
            ("num_blocks", self.num_blocks),
            ("block_size", self.block_size),
            ("max_step_tokens", self.max_step_tokens),
            ("max_running", self.max_running),
            ("max_queued", self.max_queued),
        ] {
            if value == 0 {
                return Err(Error::argument(argument, 0, "at least 1"));
            }
        }
        Ok(())
    }

    /// Blocks that the rows of so many tokens take in all groups, those among them that have been given back included.
    pub(crate) fn blocks(&self, tokens: u32) -> u32 {
        self.groups.blocks_for(self.block_size, tokens)
    }

    /// Blocks, of all groups, that these tokens fill.
    pub(crate) fn full_blocks(&self, tokens: u32) -> u32 {
        (tokens / self.block_size).saturating_mul(self.groups.count())
    }

    /// Tokens that so many blocks have room for, those of a request that has given none back.
    pub(crate) fn room(&self, blocks: u32) -> u32 {
        (blocks / self.groups.count()).saturating_mul(self.block_size)
    }

    /// Blocks that a request of so many tokens has between two steps.
    pub(crate) fn held_blocks(&self, tokens: u32) -> u32 {
        self.groups.held_blocks(self.block_size, tokens)
    }

    /// Blocks that a request has at most on its way to so many tokens.
    pub(crate) fn most_blocks(&self, tokens: u32) -> u32 {
        self.groups.most_blocks(self.block_size, tokens, self.max_step_tokens)
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Tokens of its prompt; at least 1.
    pub prompt_tokens: u32,
    /// New tokens, at most; at least 1. The last one is never fed, so it takes no room in the cache.
    pub max_new_tokens: u32,
    /// Higher comes first: see [`SchedulerConfig::ageing`].
    pub priority: i32,
    /// When it is given up, if it has not ended by then.
    pub deadline: Option<Duration>,
    /// Texts that grow side by side from the prompt on (beam search); at least 1. With more than one a request starts when its whole length has a
    /// reservation, and is never preempted: [pinned](self) from the start.
    pub beams: u32,
}

impl Demand {
    /// Of priority 0, without a deadline.
    #[must_use]
    pub const fn new(prompt_tokens: u32, max_new_tokens: u32) -> Self {
        Self { prompt_tokens, max_new_tokens, priority: 0, deadline: None, beams: 1 }
    }

    /// Tokens in the cache, at most.
    pub(crate) const fn max_cached(&self) -> u32 {
        self.prompt_tokens.saturating_add(self.max_new_tokens).saturating_sub(1)
    }

    /// Blocks at most: full blocks of the prompt are shared by all beams, and a block (of each group) that several have copied is there until the step
    /// ends.
    pub(crate) fn max_blocks(&self, config: &SchedulerConfig) -> u64 {
        let most = u64::from(config.most_blocks(self.max_cached()));
        if self.beams <= 1 {
            return most;
        }
        let shared = u64::from(config.full_blocks(self.prompt_tokens));
        let own = u64::from(config.blocks(self.max_cached())).saturating_sub(shared).min(most);
        shared.min(most) + u64::from(self.beams) * own + u64::from(config.groups.count())
    }
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It could never finish, or has more than 2^32 - 1 tokens.
    #[error("request: {need} blocks for its prompt and new tokens; need at most the cache's {have}")]
    TooLong {
        /// Blocks of the request at its longest.
        need: u32,
        /// Blocks of the cache.
        have: u32,
    },
    /// As many requests wait as may.
    #[error("request: {0} are waiting; need room in the queue, so try again later")]
    QueueFull(u32),
    /// A step has too few tokens for its beams.
    #[error("beams: got {got}, need at most the tokens of a step, {have}")]
    TooWide {
        /// Beams.
        got: u32,
        /// Tokens of a step.
        have: u32,
    },
    /// It asks for nothing.
    #[error("{0}: got 0, need at least 1")]
    Empty(&'static str),
    /// Its time was over before it came.
    #[error("deadline: it has passed; need one in the future")]
    DeadlinePassed,
}

/// How a preempted request gives its blocks back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preemption {
    /// To the host's memory, from where it is resumed.
    Swap,
    /// They are freed; the request computes its tokens again.
    Recompute,
}

/// Tokens of a request that go through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledChunk {
    /// The request.
    pub request: RequestId,
    /// The next tokens of its text that are not in the cache; at least 1.
    pub tokens: u32,
    /// Whether these are all, so that the next token is sampled. With several beams and the prompt in the cache it is a token of each.
    pub samples: bool,
    /// Drafts that are verified behind them, at most as many as [`Scheduler::set_drafts`] has offered.
    pub drafts: u32,
}

/// What to do, in this order. Each request is in one list at most, but for those admitted or resumed, which may also have a chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepSchedule {
    /// Their deadline has passed: they are gone.
    pub expired: Vec<RequestId>,
    /// They lose their blocks.
    pub preempted: Vec<(RequestId, Preemption)>,
    /// They come back from the host's memory.
    pub resumed: Vec<RequestId>,
    /// They start, with so many tokens from the prefix index.
    pub admitted: Vec<(RequestId, u32)>,
    /// What goes through the model: all in one step, `max_step_tokens` tokens and drafts together at most.
    pub chunks: Vec<ScheduledChunk>,
    /// A request that has the cache for itself and still gets no room: somebody else holds blocks.
    pub blocked: Option<RequestId>,
}

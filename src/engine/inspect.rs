//! [`Engine::inspect`]: what there is to see, as plain data.

use serde::{Deserialize, Serialize};

use super::{Engine, StepReport};
use crate::KvFormats;
use crate::schedule::RequestId;

/// The engine and its cache between two steps, as plain data for a picture or a log. Nothing is read back from the GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Inspection {
    /// Of this structure: rises when a field changes its meaning or goes.
    pub version: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// How keys and values are stored, as in `f16` or `int4ch:int4`.
    pub formats: String,
    /// The blocks of the cache, in their order.
    pub blocks: Vec<BlockState>,
    /// The requests, in the order of their submission.
    pub requests: Vec<RequestState>,
    /// What the last step has done.
    pub last_step: StepReport,
    /// Steps so far, and the tokens that they have sampled.
    pub num_steps: u64,
    /// See `num_steps`.
    pub num_sampled_tokens: u64,
    /// Tokens that a step may have.
    pub max_step_tokens: u32,
    /// Bytes of swapped-out requests in the host's memory.
    pub swapped_bytes: u64,
    /// Prompt tokens that were found in the prefix index so far.
    pub prefix_hit_tokens: u64,
}

/// A block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BlockState {
    /// The request that has it in its table; of several the first.
    pub owner: Option<u64>,
    /// Requests that have it in their tables.
    pub holders: u32,
    /// Tokens in it that some request uses.
    pub tokens: u32,
    /// Whether the prefix index holds it: without holders it is kept until somebody needs room.
    pub indexed: bool,
}

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum RequestPhase {
    /// It has no blocks.
    Waiting,
    /// It has blocks, and more than one token to compute.
    Prompt,
    /// It has blocks, and makes a token in each step.
    Decode,
    /// Its blocks are in the host's memory.
    Swapped,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RequestState {
    /// Its number.
    pub id: u64,
    /// Where it stands.
    pub phase: RequestPhase,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Tokens that it has made.
    pub new_tokens: u32,
    /// Tokens in the cache, or in the host's memory.
    pub cached_tokens: u32,
    /// How often it lost its blocks.
    pub preemptions: u32,
}

/// Of [`Inspection`].
const VERSION: u32 = 1;

impl Engine {
    /// What there is to see between two steps. Costs the host time in proportion to the blocks, and the GPU nothing.
    #[must_use]
    pub fn inspect(&self) -> Inspection {
        let options = self.decoder.options();
        let uses = self.decoder.cache().block_uses();
        let mut blocks: Vec<_> =
            uses.iter().map(|block| BlockState { indexed: block.indexed, ..BlockState::default() }).collect();
        let mut ids: Vec<_> = self.requests.keys().copied().collect();
        ids.sort_unstable();
        let requests = ids.into_iter().filter_map(|id| self.inspect_request(id, &mut blocks)).collect();
        Inspection {
            version: VERSION,
            block_size: options.block_size,
            formats: KvFormats { k: options.k_format, v: options.v_format }.to_string(),
            blocks,
            requests,
            last_step: self.last_step,
            num_steps: self.num_steps,
            num_sampled_tokens: self.num_sampled_tokens,
            max_step_tokens: self.scheduler.config().max_step_tokens,
            swapped_bytes: self.decoder.swapped_bytes(),
            prefix_hit_tokens: self.decoder.prefix_stats().hit_tokens,
        }
    }

    /// A request, and its mark on its blocks.
    fn inspect_request(&self, id: RequestId, blocks: &mut [BlockState]) -> Option<RequestState> {
        let request = self.requests.get(&id)?;
        let tables = request.sequence.and_then(|sequence| self.decoder.cache().block_tables(sequence).ok());
        let (known, cached) = self.scheduler.progress(id)?;
        let phase = match (&tables, request.sequence) {
            (Some(_), _) if known - cached > 1 => RequestPhase::Prompt,
            (Some(_), _) => RequestPhase::Decode,
            (None, Some(_)) => RequestPhase::Swapped,
            (None, None) => RequestPhase::Waiting,
        };
        let others = request.sequences().skip(1).filter_map(|other| self.decoder.cache().block_tables(other).ok());
        let tables = tables.into_iter().chain(others).flatten();
        for (i, block) in tables.flat_map(|table| table.into_iter().enumerate()) {
            let left = cached.saturating_sub(i as u32 * self.decoder.options().block_size);
            let tokens = left.min(self.decoder.options().block_size);
            if let Some(state) = blocks.get_mut(block.index() as usize) {
                state.owner.get_or_insert(id.index());
                state.holders += 1;
                state.tokens = state.tokens.max(tokens);
            }
        }
        let usage = &request.usage;
        Some(RequestState {
            id: id.index(),
            phase,
            prompt_tokens: usage.prompt_tokens,
            new_tokens: usage.new_tokens,
            cached_tokens: cached,
            preemptions: usage.preemptions,
        })
    }
}

//! What a scheduler asks about the cache.

use super::RequestId;

/// What the prefix index has for a request that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixHit {
    /// Tokens at the front of its text, fewer than all of them.
    pub tokens: u32,
    /// Blocks of them that count as [free](Memory::free_blocks) now, and won't once the request holds them.
    pub free_blocks: u32,
}

/// The cache, as a [`Scheduler`](super::Scheduler) has to know it while it plans a step. Blocks are those of all groups of layers.
pub trait Memory {
    /// Blocks that can be taken: free ones, and those that only the prefix index holds.
    fn free_blocks(&self) -> u32;

    /// Blocks that are free when this running request is gone. Those that others hold, too, don't count.
    fn exclusive_blocks(&self, request: RequestId) -> u32;

    /// Copies of partly filled, shared blocks that this running request's next token takes: in each group of layers one at most, or one per beam.
    fn copied_blocks(&self, request: RequestId) -> u32 {
        let _ = request;
        0
    }

    /// Blocks that the beams of this running request have behind the full blocks of its prompt, each counted once.
    fn beam_blocks(&self, request: RequestId) -> u32 {
        let _ = request;
        0
    }

    /// What the prefix index has for this waiting request.
    fn prefix(&self, request: RequestId) -> PrefixHit {
        let _ = request;
        PrefixHit::default()
    }

    /// Whether this waiting request should wait for one that runs: that one is computing a prefix which both share.
    fn waits_for_prefix(&self, request: RequestId) -> bool {
        let _ = request;
        false
    }
}

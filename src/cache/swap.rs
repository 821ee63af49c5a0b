//! Sequences leave the pool for host memory, and come back.

use std::ops::Range;
use std::sync::Arc;

use super::KvCache;
use super::snapshot::{PendingSnapshot, SequenceSnapshot, group_blocks};
use super::state::{SharedState, lock};
use crate::error::{Error, Holder, Result};
use crate::ids::{BlockId, SequenceId};

/// A sequence on its way to the host, from [`KvCache::swap_out`]. Until [`SwapOut::finish`] it is still in the cache, and nobody can change it.
///
/// Dropping this, or the future of `finish` before it completes, leaves the sequence as it was.
#[derive(Debug)]
#[must_use = "dropping it leaves the sequence in the cache"]
pub struct SwapOut {
    state: SharedState,
    epoch: u64,
    sequence: SequenceId,
    /// Until it is being read.
    pending: Option<PendingSnapshot>,
    /// Whether the sequence is still held.
    is_open: bool,
}

impl SwapOut {
    /// The sequence.
    #[must_use]
    pub fn sequence(&self) -> SequenceId {
        self.sequence
    }

    /// Waits for the copies, which must have been submitted, then ends the sequence: its blocks return to the pool, except those that others
    /// hold. Natively the future completes only while somebody polls the device: run it by [`Gpu::block_on`](crate::Gpu::block_on) if nobody
    /// does.
    ///
    /// # Errors
    /// [`Error::Argument`] if the encoder has not been submitted; [`Error::Stale`] after [`KvCache::clear`]; [`Error::Wgpu`]. The sequence
    /// is as it was before the swap.
    pub async fn finish(mut self) -> Result<SequenceSnapshot> {
        let Some(pending) = self.pending.take() else {
            return Err(Error::Stale { what: "swap-out", reason: "it has no copies" });
        };
        let mut snapshot = pending.read().await?;
        snapshot.origin = Some(self.sequence);
        lock(&self.state).finish_swap_out(self.epoch, self.sequence)?;
        // From now on others may have it back under the same id.
        self.is_open = false;
        Ok(snapshot)
    }
}

impl Drop for SwapOut {
    fn drop(&mut self) {
        if self.is_open {
            lock(&self.state).thaw(self.epoch, self.sequence, Holder::SwapOut);
        }
    }
}

/// A sequence on its way back into a cache, from [`KvCache::swap_in`]. Dropping it gives the blocks back; drop it only if its
/// commands will never be submitted, or have been submitted already.
#[derive(Debug)]
#[must_use = "dropping it gives the blocks back"]
pub struct SwapIn {
    state: SharedState,
    epoch: u64,
    blocks: Vec<BlockId>,
    len: u32,
    /// Places of the block table of each group without a block.
    hidden: Vec<Range<u32>>,
    /// Which sequence it was, if it was swapped out.
    origin: Option<SequenceId>,
    is_open: bool,
}

impl SwapIn {
    /// Makes it a sequence, with a new id. As with a step, its commands must be submitted before those of later steps.
    ///
    /// # Errors
    /// [`Error::Stale`] after [`KvCache::clear`].
    pub fn commit(mut self) -> Result<SequenceId> {
        let id = lock(&self.state).commit_swap_in(self.epoch, &self.blocks, self.len, &self.hidden)?;
        self.is_open = false;
        Ok(id)
    }

    /// Makes it the sequence that was swapped out, under the id that it had then. Otherwise as [`SwapIn::commit`].
    ///
    /// # Errors
    /// [`Error::Argument`] if the snapshot was taken or loaded and not swapped out, if another cache swapped it out, or if the sequence has come
    /// back already (a snapshot can be swapped in several times); [`Error::Stale`] after [`KvCache::clear`]. The blocks return to the pool.
    pub fn restore(mut self) -> Result<SequenceId> {
        let id = lock(&self.state).restore_swap_in(self.epoch, &self.blocks, self.len, &self.hidden, self.origin)?;
        self.is_open = false;
        Ok(id)
    }
}

impl Drop for SwapIn {
    fn drop(&mut self) {
        if self.is_open {
            lock(&self.state).roll_back_swap_in(self.epoch, &self.blocks);
        }
    }
}

impl KvCache {
    /// Records the copy of a sequence to the host, and reserves the sequence for [`SwapOut::finish`], which ends it here: steps, forks,
    /// truncation and freeing are refused with [`Error::SequenceBusy`] until then. Other sequences go on meanwhile, also those that share
    /// blocks with it.
    ///
    /// Memory: see [`KvCache::record_snapshot`].
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::SequenceBusy`]; those of [`KvCache::record_snapshot`]. Nothing has changed then.
    pub fn swap_out(&self, encoder: &mut wgpu::CommandEncoder, sequence: SequenceId) -> Result<SwapOut> {
        let epoch = {
            let mut state = self.state();
            state.freeze(sequence, Holder::SwapOut)?;
            state.epoch()
        };
        // From here on, dropping it lets the sequence go.
        let mut swap = SwapOut { state: Arc::clone(&self.state), epoch, sequence, pending: None, is_open: true };
        swap.pending = Some(self.record_snapshot(encoder, sequence)?);
        Ok(swap)
    }

    /// Reserves blocks for a snapshot and records the copies into them. [`SwapIn::commit`] makes them a new sequence, [`SwapIn::restore`] the one
    /// that was swapped out. Which blocks they are has
    /// nothing to do with where the sequence was before.
    ///
    /// Takes host-visible memory of the snapshot's size until the GPU is done with the commands, and up to 16 MiB on the device (or one
    /// block, if that is larger).
    ///
    /// # Errors
    /// [`Error::Argument`] if geometry, formats or key scales are not the cache's, or the snapshot lacks blocks that a window of the cache shows;
    /// [`Error::OutOfBlocks`]; [`Error::Unsupported`] if the
    /// list of blocks doesn't fit into a binding; [`Error::Wgpu`], for example if memory is short. Nothing has changed then.
    pub fn swap_in(&self, encoder: &mut wgpu::CommandEncoder, snapshot: &SequenceSnapshot) -> Result<SwapIn> {
        self.check_snapshot(snapshot)?;
        let (blocks, epoch) = {
            let mut state = self.state();
            (state.begin_swap_in(snapshot.config.num_blocks)?, state.epoch())
        };
        // From here on, dropping it gives the blocks back.
        let (len, hidden, origin) = (snapshot.len, snapshot.hidden_blocks(), snapshot.origin);
        let swap = SwapIn { state: Arc::clone(&self.state), epoch, blocks, len, hidden, origin, is_open: true };
        let mut rest = &swap.blocks[..];
        let group = |count: u32| {
            let own;
            (own, rest) = rest.split_at((count as usize).min(rest.len()));
            own.to_vec()
        };
        let blocks: Vec<_> = group_blocks(&snapshot.config, snapshot.len).into_iter().map(group).collect();
        self.record_unpack(encoder, &blocks, &snapshot.data)?;
        Ok(swap)
    }
}

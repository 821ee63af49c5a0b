//! [`Defragment`]: used blocks move to the front of the pool.

use std::sync::Arc;

use super::KvCache;
use super::state::{SharedState, lock};
use crate::error::Result;
use crate::gpu::{Recorder, Upload};
use crate::ids::BlockId;
use crate::sequence::Moves;

/// Blocks on their way to the front of the pool, from [`KvCache::defragment`]. Until [`Defragment::commit`] nobody can change a sequence.
///
/// Dropping it leaves everything as it was; drop it only if its commands will never be submitted, or have been submitted already.
#[derive(Debug)]
#[must_use = "dropping it leaves the blocks where they are"]
pub struct Defragment {
    state: SharedState,
    epoch: u64,
    moves: Moves,
    is_open: bool,
}

impl Defragment {
    /// Blocks that move: from where, to where. Each is copied once, however many sequences share it.
    #[must_use]
    pub fn moves(&self) -> &[(BlockId, BlockId)] {
        &self.moves.blocks
    }

    /// Makes the new places valid and returns how many blocks moved. As with a step, its commands must be submitted before those of later
    /// steps.
    ///
    /// # Errors
    /// [`Error::Stale`](crate::Error::Stale) after [`KvCache::clear`].
    pub fn commit(mut self) -> Result<u32> {
        lock(&self.state).commit_defragment(self.epoch, &self.moves)?;
        self.is_open = false;
        Ok(self.moves.blocks.len() as u32)
    }
}

impl Drop for Defragment {
    fn drop(&mut self) {
        if self.is_open {
            lock(&self.state).roll_back_defragment(self.epoch, &self.moves);
        }
    }
}

impl KvCache {
    /// Moves used blocks into free ones with lower ids, so that all used blocks lie at the front of the pool, with as few copies as that
    /// takes; blocks that move keep the order of their sequences. Records the copies; [`Defragment::commit`] makes the new places valid.
    ///
    /// Attention doesn't need this: it reads any block as fast as any other, and a pool can't be too fragmented to be filled. It helps where
    /// neighbours matter: a host's own kernels and copies that work on runs of blocks, or an adapter with small pages whose caches and page
    /// tables reach further when the used memory is dense. It gives no memory back to the device, and it doesn't make each
    /// sequence contiguous.
    ///
    /// # Errors
    /// [`Error::SequenceBusy`](crate::Error::SequenceBusy) while a step or a swap-out is open; [`Error::Argument`](crate::Error::Argument) while a swap-in or another defragmentation is;
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the list of moves doesn't fit into a binding; [`Error::Wgpu`](crate::Error::Wgpu). Nothing has changed then.
    pub fn defragment(&self, encoder: &mut wgpu::CommandEncoder) -> Result<Defragment> {
        let (moves, epoch) = {
            let mut state = self.state();
            (state.begin_defragment()?, state.epoch())
        };
        // From here on, dropping it undoes the reservation.
        let defragment = Defragment { state: Arc::clone(&self.state), epoch, moves, is_open: true };
        if defragment.moves.blocks.is_empty() {
            return Ok(defragment);
        }
        let copies: Vec<_> = defragment.moves.blocks.iter().map(|(from, to)| [from.index(), to.index()]).collect();
        let upload = self.kernels.upload(&self.gpu, &self.config, &[], &[], &copies)?;
        self.record_copies(encoder, &upload, copies.len() as u32)?;
        Ok(defragment)
    }

    fn record_copies(&self, encoder: &mut wgpu::CommandEncoder, upload: &Upload, count: u32) -> Result<()> {
        let (lists, lease) = upload.buffer()?;
        let dispatches =
            self.layers.iter().map(|storage| self.copy_dispatch(storage, &lists, count)).collect::<Result<Vec<_>>>()?;
        Recorder::from(encoder).record(&self.gpu, "folio defragment", &dispatches, &[lease])
    }
}

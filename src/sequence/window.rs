//! Blocks that have left the window of their sequence return to the pool.
//!
//! They do so when the sequence goes on, and not when a step is committed: until then it can be cut back to any length of the last step, and a step
//! that is dropped has cost nothing that the committed tokens need. What a sequence of `len` tokens keeps is what a token at position `len` sees.

use std::collections::HashMap;
use std::ops::Range;

use super::manager::{Manager, Sequence};
use super::table::BlockTable;
use crate::error::{Error, Result};
use crate::ids::{BlockId, SequenceId};
use crate::layout::KvCacheConfig;

/// Lengths that a sequence can be cut back to, whatever it grows to meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WayBack {
    /// This one,
    pub(crate) to: u32,
    /// and all from this one on.
    pub(crate) from: u32,
}

impl Sequence {
    /// Blocks that it doesn't need for the tokens that come next, nor for its way back, with their places.
    fn hidden(&self, config: &KvCacheConfig) -> [Range<u32>; 2] {
        let mut hidden = config.hidden_blocks(self.table.len());
        let Some(WayBack { to, from }) = self.way_back else { return [hidden, 0..0] };
        hidden.end = hidden.end.min(config.hidden_blocks(from).end).max(hidden.start);
        [hidden, config.hidden_blocks(to).end..config.blocks_for(to)]
    }
}

/// Whether a table holds all blocks of its first `len` tokens that a token behind them sees.
fn has_seen(config: &KvCacheConfig, table: &BlockTable, len: u32) -> bool {
    let (hidden, all) = (config.hidden_blocks(len), config.blocks_for(len));
    !table.has_null(0..hidden.start.min(all)) && !table.has_null(hidden.end..all)
}

impl Manager {
    /// Fails unless `len` tokens of the sequence can be kept or forked: it has as many, and all blocks that the token after them sees.
    pub(super) fn check_way_back(&self, id: SequenceId, len: u32) -> Result<()> {
        let table = &self.check_idle(id)?.table;
        let have = table.len();
        if len > have {
            return Err(Error::argument("len", len, format!("at most the sequence's length, {have}")));
        }
        let config = self.config();
        if has_seen(config, table, len) {
            return Ok(());
        }
        let null = table.null_range();
        let window = u64::from(config.window.unwrap_or(0));
        let block_size = u64::from(config.block_size);
        let least = u64::from(null.end) * block_size + window.saturating_sub(1);
        let most = u64::from(null.start) * block_size;
        let need = format!(
            "{} to {have}, or at most {most}: what tokens between see has left the window of {window}",
            least.min(have.into())
        );
        Err(Error::argument("len", len, need))
    }

    /// Whether a sequence can be forked at, or cut back to, `len` tokens.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn reaches_back(&self, id: SequenceId, len: u32) -> Result<bool> {
        let table = self.table(id)?;
        Ok(len <= table.len() && has_seen(self.config(), table, len))
    }

    /// Keeps what these lengths need, beside what the sequence's own does, until it is taken back by `None`.
    #[cfg(any(feature = "model", test))]
    pub(crate) fn set_way_back(&mut self, id: SequenceId, way_back: Option<WayBack>) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.way_back = way_back;
        }
    }

    /// Gives the blocks back that no token from the sequence's length on can see. Without it that happens when the sequence goes on. Returns
    /// how many it was.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn release_hidden(&mut self, id: SequenceId) -> Result<u32> {
        let before = self.check_idle(id)?.table.num_held();
        self.release(id);
        self.settle();
        Ok(before - self.table(id)?.num_held())
    }

    fn release(&mut self, id: SequenceId) {
        let config = *self.config();
        if let Some(sequence) = self.sequences.get_mut(&id) {
            let [hidden, kept] = sequence.hidden(&config);
            sequence.table.release(hidden, kept, &mut self.pool);
        }
    }

    /// [`Manager::release_hidden`] for several sequences, if there are `need` blocks afterwards.
    pub(super) fn release_for(&mut self, ids: impl Iterator<Item = SequenceId> + Clone, need: u64) -> Result<()> {
        if self.config().window.is_none() {
            return Ok(());
        }
        // How many holders each block loses. It can be had if these are all.
        let mut leaving: HashMap<BlockId, u32> = HashMap::new();
        for id in ids.clone() {
            let Some(sequence) = self.sequences.get(&id) else { continue };
            let [hidden, kept] = sequence.hidden(self.config());
            for (_, block) in sequence.table.held_among(hidden, kept) {
                *leaving.entry(block).or_default() += 1;
            }
        }
        let gained = leaving.iter().filter(|&(&block, &count)| self.pool.num_holders(block) == count).count() as u32;
        let free = self.pool.num_free() + self.pool.num_reclaimable() + gained;
        if need > u64::from(free) {
            let need = u32::try_from(need).unwrap_or(u32::MAX);
            return Err(Error::OutOfBlocks { need, free, total: self.pool.num_blocks() });
        }
        ids.for_each(|id| self.release(id));
        self.settle();
        Ok(())
    }
}

//! Blocks that have left the window of their group of layers return to the pool.
//!
//! They do so when the sequence goes on, and not when a step is committed: until then it can be cut back to any length of the last step, and a step
//! that is dropped has cost nothing that the committed tokens need. What a sequence of `len` tokens keeps is what a token at position `len` sees.

use std::collections::HashMap;
use std::ops::Range;

use super::manager::{Manager, Sequence};
use super::table::BlockTable;
use crate::error::{Error, Result};
use crate::ids::{BlockId, SequenceId};
use crate::layout::{KvCacheConfig, Retention};

/// Lengths that a sequence can be cut back to, whatever it grows to meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WayBack {
    /// This one,
    pub(crate) to: u32,
    /// and all from this one on.
    pub(crate) from: u32,
}

impl Sequence {
    /// Of each group, blocks that the sequence doesn't need for the tokens that come next, nor for its way back, with their places.
    fn hidden(&self, config: &KvCacheConfig) -> Vec<[Range<u32>; 2]> {
        let len = self.len();
        let of = |retention: Retention| {
            let mut hidden = retention.hidden_blocks(len);
            let Some(WayBack { to, from }) = self.way_back else { return [hidden, 0..0] };
            hidden.end = hidden.end.min(retention.hidden_blocks(from).end).max(hidden.start);
            [hidden, retention.hidden_blocks(to).end..retention.blocks_for(to)]
        };
        config.retentions().map(of).collect()
    }
}

/// Whether a table holds all blocks of its first `len` tokens that a token behind them sees.
fn has_seen(retention: &Retention, table: &BlockTable, len: u32) -> bool {
    let (hidden, all) = (retention.hidden_blocks(len), retention.blocks_for(len));
    !table.has_null(0..hidden.start.min(all)) && !table.has_null(hidden.end..all)
}

impl Manager {
    /// Fails unless `len` tokens of the sequence can be kept or forked: it has as many, and all blocks that the token after them sees.
    pub(super) fn check_way_back(&self, id: SequenceId, len: u32) -> Result<()> {
        let sequence = self.check_idle(id)?;
        let have = sequence.len();
        if len > have {
            return Err(Error::argument("len", len, format!("at most the sequence's length, {have}")));
        }
        let groups = || self.config().retentions().zip(&sequence.tables);
        let Some((failed, _)) = groups().find(|(retention, table)| !has_seen(retention, table, len)) else {
            return Ok(());
        };
        // From where on, and up to where, all groups have what is seen.
        let (mut least, mut most) = (0, u64::from(have));
        for (retention, table) in groups() {
            let null = table.null_range();
            if !null.is_empty() {
                let (window, block_size) = (retention.window.unwrap_or(0), u64::from(retention.block_size));
                least = least.max(u64::from(null.end) * block_size + u64::from(window.saturating_sub(1)));
                most = most.min(u64::from(null.start) * block_size);
            }
        }
        let (least, window) = (least.min(have.into()), failed.window.unwrap_or(0));
        let need =
            format!("{least} to {have}, or at most {most}: what tokens between see has left the window of {window}");
        Err(Error::argument("len", len, need))
    }

    /// Whether a sequence can be forked at, or cut back to, `len` tokens.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn reaches_back(&self, id: SequenceId, len: u32) -> Result<bool> {
        let mut groups = self.config().retentions().zip(self.tables(id)?);
        Ok(groups.all(|(retention, table)| len <= table.len() && has_seen(&retention, table, len)))
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
        self.check_idle(id)?;
        let num_held = |this: &Self| Ok(this.tables(id)?.iter().map(BlockTable::num_held).sum::<u32>());
        let before = num_held(self)?;
        self.release(id);
        self.settle();
        Ok(before - num_held(self)?)
    }

    fn release(&mut self, id: SequenceId) {
        let config = *self.config();
        if let Some(sequence) = self.sequences.get_mut(&id) {
            for ([hidden, kept], table) in sequence.hidden(&config).into_iter().zip(&mut sequence.tables) {
                table.release(hidden, kept, &mut self.pool);
            }
        }
    }

    /// Fails if sequences can't grow by so many tokens in however many steps: groups of layers that keep all need more blocks than there can be, also
    /// when the other groups have given back all of these sequences' blocks.
    #[cfg(any(feature = "model", test))]
    pub(crate) fn check_room(&self, requests: &[(SequenceId, u32)]) -> Result<()> {
        let (mut need, mut room) = (0_u64, u64::from(self.pool.num_free()) + u64::from(self.pool.num_reclaimable()));
        for &(id, count) in requests {
            for (retention, table) in self.config().retentions().zip(self.tables(id)?) {
                if retention.window.is_some() {
                    room += u64::from(table.num_held());
                } else {
                    need += u64::from(table.growth(count, retention.block_size, false).new_blocks);
                }
            }
        }
        if need <= room {
            return Ok(());
        }
        let [need, free] = [need, room].map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX));
        Err(Error::OutOfBlocks { need, free, total: self.pool.num_blocks() })
    }

    /// [`Manager::release_hidden`] for several sequences, if there are `need` blocks afterwards.
    pub(super) fn release_for(&mut self, ids: impl Iterator<Item = SequenceId> + Clone, need: u64) -> Result<()> {
        if !self.config().groups.has_windows() {
            return Ok(());
        }
        // How many holders each block loses. It can be had if these are all.
        let mut leaving: HashMap<BlockId, u32> = HashMap::new();
        for id in ids.clone() {
            let Some(sequence) = self.sequences.get(&id) else { continue };
            for ([hidden, kept], table) in sequence.hidden(self.config()).into_iter().zip(&sequence.tables) {
                for (_, block) in table.held_among(hidden, kept) {
                    *leaving.entry(block).or_default() += 1;
                }
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

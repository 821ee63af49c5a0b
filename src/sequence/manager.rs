//! Sequences over the pool: everything about the cache that needs no GPU.

use std::collections::HashMap;

use super::pool::BlockPool;
use super::prefix::{PrefixIndex, PrefixMatch, PrefixProbe, PrefixStats};
use super::report::MemoryReport;
use super::table::BlockTable;
use super::window::WayBack;
use crate::error::{Error, Holder, Result};
use crate::ids::{BlockId, SequenceId};
use crate::layout::KvCacheConfig;

/// How full a pool is, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolUsage {
    /// Blocks of the pool.
    pub total: u32,
    /// Blocks that nobody holds. `free + used` is `total`.
    pub free: u32,
    /// Blocks that some sequence, open step or the prefix index holds, each counted once.
    pub used: u32,
    /// Used blocks that more than one sequence or open step holds.
    pub shared: u32,
    /// Used blocks that only the prefix index holds. They become free when somebody needs them: a step can have up to
    /// `free + reclaimable` blocks.
    pub reclaimable: u32,
    /// Sequences.
    pub sequences: u32,
}

/// Who holds a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockUse {
    /// Sequences and open steps.
    pub holders: u32,
    /// Whether the prefix index holds it, too.
    pub indexed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Sequence {
    /// One for each group of layers, all of the same length.
    pub(super) tables: Vec<BlockTable>,
    /// Nobody else may change it.
    pub(super) held_by: Option<Holder>,
    /// Where it may be cut back to, beside where its window lets it.
    pub(super) way_back: Option<WayBack>,
}

impl Sequence {
    /// Tokens.
    pub(super) fn len(&self) -> u32 {
        self.tables.first().map_or(0, BlockTable::len)
    }
}

/// Sequences, their tables, the pool and the prefix index: everything that a cache knows without a device.
///
/// `KvCache` holds one behind a lock. A program with a GPU library of its own drives one itself: it reserves a step, does on the GPU what
/// the reservation and the plan say, and commits. Each method checks before it changes anything.
#[derive(Debug)]
pub struct Manager {
    config: KvCacheConfig,
    pub(super) pool: BlockPool,
    pub(super) prefixes: PrefixIndex,
    pub(super) sequences: HashMap<SequenceId, Sequence>,
    pub(super) next_id: SequenceId,
    /// Counts `clear`s: steps of an earlier epoch are void.
    epoch: u64,
    /// Open swap-ins and defragmentations: they hold blocks that no table has.
    pub(super) open_moves: u32,
}

impl Manager {
    /// A pool of free blocks, and no sequences.
    ///
    /// # Errors
    /// [`Error::Argument`] for a configuration that breaks a rule: [`KvCacheConfig::validate`]; [`Error::Unsupported`] if the host has no memory
    /// for the bookkeeping of that many blocks.
    pub fn new(config: KvCacheConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            pool: BlockPool::try_new(config.num_blocks)?,
            prefixes: PrefixIndex::new(&config.groups),
            sequences: HashMap::new(),
            next_id: SequenceId::first(),
            epoch: 0,
            open_moves: 0,
        })
    }

    /// The shape of the cache.
    #[must_use]
    pub fn config(&self) -> &KvCacheConfig {
        &self.config
    }

    /// How often the cache has been cleared: reservations of an earlier epoch are void.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Fails if the cache has been cleared since this epoch. `what` began then.
    pub(crate) fn check_epoch(&self, epoch: u64, what: &'static str) -> Result<()> {
        if epoch == self.epoch {
            return Ok(());
        }
        Err(Error::Stale { what, reason: "the cache has been cleared since it began" })
    }

    /// How full the pool is.
    #[must_use]
    pub fn usage(&self) -> PoolUsage {
        let (total, free) = (self.pool.num_blocks(), self.pool.num_free());
        PoolUsage {
            total,
            free,
            used: total - free,
            shared: self.pool.num_shared(),
            reclaimable: self.pool.num_reclaimable(),
            sequences: self.sequences.len() as u32,
        }
    }

    /// Who holds each block of the pool, in the order of the blocks.
    #[must_use]
    pub fn block_uses(&self) -> Vec<BlockUse> {
        let blocks = (0..self.pool.num_blocks()).map(BlockId);
        let of = |block| {
            let holders = self.pool.num_holders(block);
            BlockUse { holders, indexed: self.pool.ref_count(block) > holders }
        };
        blocks.map(of).collect()
    }

    /// Where the pool's bytes are, in all and for each sequence. Costs O(blocks).
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        let tables = self.sequences.iter().map(|(&id, sequence)| (id, &sequence.tables[..]));
        MemoryReport::new(&self.config, &self.pool, self.usage(), self.prefix_stats(), tables)
    }

    /// Whether nothing is cached and nothing is under way.
    pub(crate) fn is_empty(&self) -> bool {
        let is_idle = |sequence: &Sequence| sequence.len() == 0 && sequence.held_by.is_none();
        self.open_moves == 0 && self.pool.num_indexed() == 0 && self.sequences.values().all(is_idle)
    }

    /// A new, empty sequence. Takes no block.
    pub fn create(&mut self) -> SequenceId {
        self.insert(vec![BlockTable::default(); self.config.groups.count() as usize])
    }

    pub(super) fn insert(&mut self, tables: Vec<BlockTable>) -> SequenceId {
        let id = self.next_id;
        self.next_id = id.next();
        self.insert_as(id, tables);
        id
    }

    /// Under an id that was given out before and that no sequence has.
    pub(super) fn insert_as(&mut self, id: SequenceId, tables: Vec<BlockTable>) {
        self.sequences.insert(id, Sequence { tables, held_by: None, way_back: None });
    }

    /// The blocks of a sequence in the first group of layers, and its length; open steps not counted.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn table(&self, id: SequenceId) -> Result<&BlockTable> {
        self.tables(id)?.first().ok_or(Error::UnknownSequence(id))
    }

    /// The blocks of a sequence in each group of layers, in the order of [`KvCacheConfig::groups`]; open steps not counted.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn tables(&self, id: SequenceId) -> Result<&[BlockTable]> {
        self.sequences.get(&id).map(|s| &s.tables[..]).ok_or(Error::UnknownSequence(id))
    }

    /// Fails if the sequence is unknown or held.
    pub(super) fn check_idle(&self, id: SequenceId) -> Result<&Sequence> {
        let sequence = self.sequences.get(&id).ok_or(Error::UnknownSequence(id))?;
        match sequence.held_by {
            Some(holder) => Err(Error::SequenceBusy { sequence: id, holder }),
            None => Ok(sequence),
        }
    }

    /// Takes blocks with one holder, the caller: free ones, and if there are too few, such as only the prefix index holds.
    /// Whoever needs blocks gets them here. Fails without having changed anything.
    pub(super) fn take_blocks(&mut self, count: u64) -> Result<Vec<BlockId>> {
        let room = self.pool.num_free() + self.pool.num_reclaimable();
        let out_of_blocks = Error::OutOfBlocks {
            need: u32::try_from(count).unwrap_or(u32::MAX),
            free: room,
            total: self.pool.num_blocks(),
        };
        let count = match u32::try_from(count) {
            Ok(count) if count <= room => count,
            _ => return Err(out_of_blocks),
        };
        self.prefixes.evict(count, &mut self.pool);
        self.pool.allocate(count).ok_or(out_of_blocks)
    }

    /// Tells the prefix index which of its blocks are used. Ends every operation that adds holders or takes them away.
    pub(super) fn settle(&mut self) {
        self.prefixes.settle(&mut self.pool);
    }

    /// A new sequence with the same tokens, sharing all blocks. Costs O(blocks).
    ///
    /// # Errors
    /// Those of [`Manager::fork_at`].
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let len = self.table(id)?.len();
        self.fork_at(id, len)
    }

    /// A new sequence of the first `len` tokens, sharing their blocks, also a partly filled last one.
    ///
    /// # Errors
    /// [`Error::Argument`] if `len` is more than the sequence has, or blocks that its next token would see have
    /// [left a window](KvCacheConfig::groups); [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn fork_at(&mut self, id: SequenceId, len: u32) -> Result<SequenceId> {
        let block_size = self.config.block_size;
        self.check_way_back(id, len)?;
        let tables = self.sequences[&id].tables.iter();
        let tables = tables.map(|table| table.fork_at(len, block_size, &mut self.pool)).collect();
        self.settle();
        Ok(self.insert(tables))
    }

    /// Makes the full blocks of a sequence's first tokens findable. Returns the number of blocks that were not in the index yet, those of all groups
    /// of layers together. Blocks that have left a window are not there to be found; the others are.
    ///
    /// # Errors
    /// [`Error::Argument`] for more tokens than the sequence has; [`Error::UnknownSequence`].
    pub fn publish_prefix(&mut self, id: SequenceId, tokens: &[u32], salt: u64) -> Result<u32> {
        // Full blocks of an open step's sequence are not written to, so there is no need to wait for the step.
        let sequence = self.sequences.get(&id).ok_or(Error::UnknownSequence(id))?;
        if tokens.len() as u64 > u64::from(sequence.len()) {
            let got = format!("{} tokens", tokens.len());
            return Err(Error::argument("tokens", got, format!("at most the sequence's length, {}", sequence.len())));
        }
        let added = self.prefixes.publish(tokens, salt, self.config.block_size, &sequence.tables, &mut self.pool);
        self.settle();
        Ok(added)
    }

    /// A new sequence that begins with the longest indexed run of full blocks of `tokens` under this salt; it may be empty. With windows the run ends
    /// where the next token finds all that it sees: before the longest one, if blocks of a group are missing there.
    pub fn match_prefix(&mut self, tokens: &[u32], salt: u64) -> PrefixMatch {
        let (tables, len) = self.find_prefix(tokens, salt);
        PrefixMatch { sequence: self.insert(tables), len }
    }

    /// Tables of the longest indexed run, of the blocks that the next token sees.
    fn find_prefix(&mut self, tokens: &[u32], salt: u64) -> (Vec<BlockTable>, u32) {
        let found = self.prefixes.find(tokens, salt, &self.config);
        let tables = found.tables.iter().map(|blocks| BlockTable::share(blocks, found.len, &mut self.pool)).collect();
        self.settle();
        (tables, found.len)
    }

    /// [`Manager::match_prefix`] for a sequence that is there and empty. Returns how many tokens it has then.
    ///
    /// # Errors
    /// [`Error::Argument`] if the sequence has tokens; [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn match_prefix_into(&mut self, id: SequenceId, tokens: &[u32], salt: u64) -> Result<u32> {
        let have = self.check_idle(id)?.len();
        if have > 0 {
            return Err(Error::argument("sequence", format!("{id} of {have} tokens"), "an empty one"));
        }
        let (tables, len) = self.find_prefix(tokens, salt);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.tables = tables;
        }
        Ok(len)
    }

    /// What a match of `tokens` would find, without a match.
    #[must_use]
    pub fn probe_prefix(&self, tokens: &[u32], salt: u64) -> PrefixProbe {
        let found = self.prefixes.look(tokens, salt, &self.config);
        let is_reclaimable = |block: &&BlockId| !block.is_null() && self.pool.num_holders(**block) == 0;
        let reclaimable_blocks = found.tables.iter().flatten().filter(is_reclaimable).count() as u32;
        PrefixProbe { len: found.len, reclaimable_blocks }
    }

    /// Blocks that are free or reclaimable when this sequence is gone: those that no other sequence or open step holds.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn exclusive_blocks(&self, id: SequenceId) -> Result<u32> {
        let blocks = self.tables(id)?.iter().flat_map(BlockTable::blocks);
        Ok(blocks.filter(|&&block| self.pool.num_holders(block) == 1).count() as u32)
    }

    /// Of how many of its last blocks, one per group of layers, the next token of this sequence takes a copy: they are partly filled, and others hold
    /// them, too.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn copied_blocks(&self, id: SequenceId) -> Result<u32> {
        let partial = self.tables(id)?.iter().filter_map(|table| table.partial_block(self.config.block_size));
        Ok(partial.filter(|&block| self.pool.ref_count(block) > 1).count() as u32)
    }

    /// Drops all of the index's entries under a salt. Returns their number.
    ///
    /// # Errors
    /// [`Error::Argument`] for a salt without entries.
    pub fn forget_prefixes(&mut self, salt: u64) -> Result<u32> {
        let removed = self.prefixes.forget(salt, &mut self.pool);
        removed.ok_or_else(|| Error::argument("salt", format!("unknown salt {salt}"), "one with indexed blocks"))
    }

    /// What the prefix index holds, and how often it was of use.
    #[must_use]
    pub fn prefix_stats(&self) -> PrefixStats {
        self.prefixes.stats(&self.pool)
    }

    /// Forgets the tokens from `len` on, and gives blocks that are no longer needed back.
    ///
    /// # Errors
    /// [`Error::Argument`] if `len` is more than the sequence has, or blocks that its next token would see have
    /// [left a window](KvCacheConfig::groups); [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn truncate(&mut self, id: SequenceId, len: u32) -> Result<()> {
        self.check_way_back(id, len)?;
        if let Some(sequence) = self.sequences.get_mut(&id) {
            let tables = sequence.tables.iter_mut();
            tables.for_each(|table| table.truncate(len, self.config.block_size, &mut self.pool));
        }
        self.settle();
        Ok(())
    }

    /// Ends a sequence.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn free(&mut self, id: SequenceId) -> Result<()> {
        self.truncate(id, 0)?;
        self.sequences.remove(&id);
        Ok(())
    }

    /// Ends all sequences and empties the prefix index. Reservations become void.
    pub fn clear(&mut self) {
        self.pool = BlockPool::new(self.config.num_blocks);
        self.prefixes = self.prefixes.emptied();
        self.sequences.clear();
        self.open_moves = 0;
        self.epoch += 1;
    }
}

#[cfg(test)]
mod tests;

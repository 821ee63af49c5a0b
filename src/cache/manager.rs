//! Sequences over the pool: everything about the cache that needs no GPU.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::layout::KvCacheConfig;
use super::pool::{BlockId, BlockPool};
use super::prefix::{PrefixIndex, PrefixMatch, PrefixStats};
use super::report::MemoryReport;
use super::table::{BlockTable, Growth};
use crate::error::{Error, Result};
use crate::plan::{Batch, BatchEntry};

/// A sequence of a cache. Ids are never used again, and no other cache knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    /// Tells the caches of a process apart.
    cache: u64,
    number: u64,
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sequence #{}", self.number)
    }
}

/// How full a pool is, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

#[derive(Debug, Default)]
pub(super) struct Sequence {
    pub(super) table: BlockTable,
    /// In an open step, swap-out or defragmentation: nobody else may change it.
    pub(super) in_step: bool,
}

/// What committing a step does to one sequence.
#[derive(Debug)]
pub(crate) struct Pending {
    sequence: SequenceId,
    /// The copy that replaces the shared last block.
    replacement: Option<BlockId>,
    new_blocks: Vec<BlockId>,
    len: u32,
}

/// A reserved step, before anything is uploaded.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(crate) batch: Batch,
    pub(crate) pending: Vec<Pending>,
    /// Slot (block * block_size + offset) of every new token.
    pub(crate) slots: Vec<u32>,
    /// Blocks to copy before anything is appended: source, destination.
    pub(crate) copies: Vec<[u32; 2]>,
}

pub(crate) type SharedState = Arc<Mutex<Manager>>;

pub(super) fn lock(state: &SharedState) -> MutexGuard<'_, Manager> {
    // The manager checks before it changes anything, so a panic elsewhere never leaves it half-changed.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sequences, their tables, the pool and the prefix index.
#[derive(Debug)]
pub(crate) struct Manager {
    config: KvCacheConfig,
    pub(super) pool: BlockPool,
    pub(super) prefixes: PrefixIndex,
    pub(super) sequences: HashMap<SequenceId, Sequence>,
    next_id: SequenceId,
    /// Counts `clear`s: steps of an earlier epoch are void.
    epoch: u64,
    /// Open swap-ins and defragmentations: they hold blocks that no table has.
    pub(super) open_moves: u32,
}

impl Manager {
    pub(crate) fn new(config: KvCacheConfig) -> Self {
        // std's per-map random keys: a number that no other cache has, without a global counter of our own.
        let next_id = SequenceId { cache: RandomState::new().build_hasher().finish(), number: 0 };
        let pool = BlockPool::new(config.num_blocks);
        Self {
            config,
            pool,
            prefixes: PrefixIndex::default(),
            sequences: HashMap::new(),
            next_id,
            epoch: 0,
            open_moves: 0,
        }
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Fails if the cache has been cleared since this epoch.
    pub(super) fn check_epoch(&self, epoch: u64) -> Result<()> {
        if epoch == self.epoch {
            return Ok(());
        }
        Err(Error::StaleStep { reason: "the cache has been cleared since it began" })
    }

    pub(crate) fn usage(&self) -> PoolUsage {
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

    pub(crate) fn memory(&self) -> MemoryReport {
        let tables = self.sequences.iter().map(|(&id, sequence)| (id, &sequence.table));
        MemoryReport::new(&self.config, &self.pool, self.usage(), self.prefix_stats(), tables)
    }

    /// Whether nothing is cached and nothing is under way.
    pub(crate) fn is_empty(&self) -> bool {
        let is_idle = |sequence: &Sequence| sequence.table.is_empty() && !sequence.in_step;
        self.open_moves == 0 && self.pool.num_indexed() == 0 && self.sequences.values().all(is_idle)
    }

    pub(crate) fn create(&mut self) -> SequenceId {
        self.insert(BlockTable::default())
    }

    pub(super) fn insert(&mut self, table: BlockTable) -> SequenceId {
        let id = self.next_id;
        self.next_id.number += 1;
        self.sequences.insert(id, Sequence { table, in_step: false });
        id
    }

    pub(crate) fn table(&self, id: SequenceId) -> Result<&BlockTable> {
        self.sequences.get(&id).map(|s| &s.table).ok_or(Error::UnknownSequence(id))
    }

    /// Fails if the sequence is unknown or in an open step.
    pub(super) fn check_idle(&self, id: SequenceId) -> Result<&Sequence> {
        let sequence = self.sequences.get(&id).ok_or(Error::UnknownSequence(id))?;
        if sequence.in_step { Err(Error::SequenceInStep(id)) } else { Ok(sequence) }
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

    pub(crate) fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let len = self.table(id)?.len();
        self.fork_at(id, len)
    }

    pub(crate) fn fork_at(&mut self, id: SequenceId, len: u32) -> Result<SequenceId> {
        let block_size = self.config.block_size;
        self.check_prefix_len(id, len)?;
        let table = self.sequences[&id].table.fork_at(len, block_size, &mut self.pool);
        self.settle();
        Ok(self.insert(table))
    }

    /// Fails unless `len` tokens of the sequence can be kept or forked.
    fn check_prefix_len(&self, id: SequenceId, len: u32) -> Result<()> {
        let have = self.check_idle(id)?.table.len();
        if len > have {
            return Err(Error::argument("len", len, format!("at most the sequence's length, {have}")));
        }
        Ok(())
    }

    pub(crate) fn publish_prefix(&mut self, id: SequenceId, tokens: &[u32], salt: u64) -> Result<u32> {
        // Full blocks of an open step's sequence are not written to, so there is no need to wait for the step.
        let table = &self.sequences.get(&id).ok_or(Error::UnknownSequence(id))?.table;
        if tokens.len() as u64 > u64::from(table.len()) {
            let got = format!("{} tokens", tokens.len());
            return Err(Error::argument("tokens", got, format!("at most the sequence's length, {}", table.len())));
        }
        let added = self.prefixes.publish(tokens, salt, self.config.block_size, table.blocks(), &mut self.pool);
        self.settle();
        Ok(added)
    }

    pub(crate) fn match_prefix(&mut self, tokens: &[u32], salt: u64) -> PrefixMatch {
        let block_size = self.config.block_size;
        let blocks = self.prefixes.find(tokens, salt, block_size);
        // At most the length of a sequence that was published.
        let len = blocks.len() as u32 * block_size;
        let table = BlockTable::share(&blocks, len, &mut self.pool);
        self.settle();
        PrefixMatch { sequence: self.insert(table), len }
    }

    pub(crate) fn forget_prefixes(&mut self, salt: u64) -> Result<u32> {
        let removed = self.prefixes.forget(salt, &mut self.pool);
        removed.ok_or_else(|| Error::argument("salt", format!("unknown salt {salt}"), "one with indexed blocks"))
    }

    pub(crate) fn prefix_stats(&self) -> PrefixStats {
        self.prefixes.stats(&self.pool)
    }

    pub(crate) fn truncate(&mut self, id: SequenceId, len: u32) -> Result<()> {
        self.check_prefix_len(id, len)?;
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.table.truncate(len, self.config.block_size, &mut self.pool);
        }
        self.settle();
        Ok(())
    }

    /// Takes every block of a pool from which none has been taken, and gives block `i` to the `i`th of as many new, empty sequences: the
    /// rows of a contiguous cache. [`Manager::shorten`] them; [`Manager::truncate`] would give their blocks back.
    pub(crate) fn create_rows(&mut self) -> Vec<SequenceId> {
        let blocks = self.pool.allocate(self.config.num_blocks).unwrap_or_default();
        blocks
            .into_iter()
            .map(|block| {
                let mut table = BlockTable::default();
                table.grow(None, &[block], 0);
                self.insert(table)
            })
            .collect()
    }

    /// [`Manager::truncate`] that keeps the blocks.
    pub(crate) fn shorten(&mut self, id: SequenceId, len: u32) -> Result<()> {
        let have = self.check_idle(id)?.table.len();
        if len > have {
            return Err(Error::argument("len", len, format!("at most the row's length, {have}")));
        }
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.table.shorten(len);
        }
        Ok(())
    }

    pub(crate) fn free(&mut self, id: SequenceId) -> Result<()> {
        self.truncate(id, 0)?;
        self.sequences.remove(&id);
        Ok(())
    }

    pub(crate) fn clear(&mut self) {
        self.pool = BlockPool::new(self.config.num_blocks);
        self.prefixes = self.prefixes.emptied();
        self.sequences.clear();
        self.open_moves = 0;
        self.epoch += 1;
    }

    /// Checks the batch, then takes all blocks that it needs, or none.
    pub(crate) fn reserve(&mut self, requests: &[(SequenceId, u32)]) -> Result<Reservation> {
        let block_size = self.config.block_size;
        if requests.is_empty() {
            return Err(Error::argument("batch", "no sequences", "at least one (sequence, query_len)"));
        }
        let mut seen = std::collections::HashSet::with_capacity(requests.len());
        let mut num_tokens = 0_u32;
        for &(id, query_len) in requests {
            let len = self.check_idle(id)?.table.len();
            if !seen.insert(id) {
                return Err(Error::argument("batch", format!("{id} twice"), "each sequence once"));
            }
            if query_len == 0 {
                return Err(Error::argument("query_len", format!("0 for {id}"), "at least 1"));
            }
            // Positions are compared as i32 by hosts' frameworks and as u32 sums by the kernels: keep both safe.
            let fits = len.checked_add(query_len).is_some_and(|len| len <= i32::MAX as u32);
            if !fits {
                let got = format!("{query_len} for {id} of {len} tokens");
                return Err(Error::argument("query_len", got, "a sequence length below 2^31"));
            }
            num_tokens = num_tokens
                .checked_add(query_len)
                .filter(|&n| n <= i32::MAX as u32)
                .ok_or_else(|| Error::argument("batch", "2^31 or more new tokens", "fewer than 2^31 in all"))?;
        }

        // Of several sequences that write into the same shared block, the last one may have it when all others take copies
        // and nobody else holds it. But not if another one's tokens reach further: should this step be submitted and then
        // dropped, that sequence keeps the block, and its tokens must still be there. Holder count and furthest length:
        let mut leaving: HashMap<BlockId, (u32, u32)> = HashMap::new();
        let mut growths = Vec::with_capacity(requests.len());
        let mut need = 0_u64;
        for &(id, query_len) in requests {
            let table = &self.sequences[&id].table;
            let last = table.partial_block(block_size);
            let shared = last.is_some_and(|block| {
                let (count, furthest) = leaving.get(&block).copied().unwrap_or_default();
                self.pool.ref_count(block) - count > 1 || furthest > table.len()
            });
            let growth = table.growth(query_len, block_size, shared);
            if let (true, Some(block)) = (growth.copy_last, last) {
                let (count, furthest) = leaving.entry(block).or_default();
                *count += 1;
                *furthest = (*furthest).max(table.len());
            }
            need += u64::from(growth.blocks());
            growths.push(growth);
        }
        let taken = self.take_blocks(need)?;
        Ok(self.reserve_blocks(requests, &growths, taken, num_tokens))
    }

    /// The part of [`Manager::reserve`] that can't fail.
    fn reserve_blocks(
        &mut self,
        requests: &[(SequenceId, u32)],
        growths: &[Growth],
        taken: Vec<BlockId>,
        num_tokens: u32,
    ) -> Reservation {
        let block_size = self.config.block_size;
        let mut taken = taken.into_iter();
        let mut reservation = Reservation {
            batch: Batch::default(),
            pending: Vec::with_capacity(requests.len()),
            slots: Vec::with_capacity(num_tokens as usize),
            copies: Vec::new(),
        };
        for (&(id, query_len), growth) in requests.iter().zip(growths) {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            sequence.in_step = true;
            let table = &sequence.table;
            let context_len = table.len();
            let len = context_len + query_len;
            let replacement = if growth.copy_last { taken.next() } else { None };
            let new_blocks: Vec<_> = taken.by_ref().take(growth.new_blocks as usize).collect();

            let tables = &mut reservation.batch.tables;
            let start = tables.len();
            tables.extend(table.blocks().iter().map(|b| b.0));
            if let (Some(copy), Some(last)) = (replacement, tables.last_mut()) {
                reservation.copies.push([*last, copy.0]);
                *last = copy.0;
            }
            tables.extend(new_blocks.iter().map(|b| b.0));
            let range = start..tables.len();
            let blocks = &tables[range.clone()];
            reservation.slots.extend(
                (context_len..len)
                    .map(|position| blocks[(position / block_size) as usize] * block_size + position % block_size),
            );
            reservation.batch.entries.push(BatchEntry { query_len, context_len, table: range });
            reservation.pending.push(Pending { sequence: id, replacement, new_blocks, len });
        }
        reservation
    }

    /// Lengths advance, new blocks join their tables, replaced blocks lose a holder.
    pub(crate) fn commit(&mut self, pending: Vec<Pending>) {
        for change in pending {
            // A sequence in a step can't be freed, and a cleared cache refuses the step: it is there.
            let Some(sequence) = self.sequences.get_mut(&change.sequence) else { continue };
            sequence.in_step = false;
            if let Some(replaced) = sequence.table.grow(change.replacement, &change.new_blocks, change.len) {
                self.pool.release(replaced);
            }
        }
        self.settle();
    }

    /// Gives a dropped step's blocks back. Nothing to do if the cache has been cleared since: its pool is another one.
    pub(crate) fn roll_back(&mut self, epoch: u64, pending: Vec<Pending>) {
        if epoch != self.epoch {
            return;
        }
        // In reverse, so that the next step takes the same blocks in the same order.
        for change in pending.into_iter().rev() {
            for &block in change.new_blocks.iter().rev().chain(&change.replacement) {
                self.pool.release(block);
            }
            if let Some(sequence) = self.sequences.get_mut(&change.sequence) {
                sequence.in_step = false;
            }
        }
        self.settle();
    }
}

#[cfg(test)]
mod tests;

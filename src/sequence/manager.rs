//! Sequences over the pool: everything about the cache that needs no GPU.

use std::collections::{HashMap, HashSet};

use super::batch::{Batch, BatchEntry, QueryKernel};
use super::pool::BlockPool;
use super::prefix::{PrefixIndex, PrefixMatch, PrefixProbe, PrefixStats};
use super::report::MemoryReport;
use super::table::{BlockTable, Growth};
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
    pub(super) table: BlockTable,
    /// Nobody else may change it.
    pub(super) held_by: Option<Holder>,
    /// Where it may be cut back to, beside where its window lets it.
    pub(super) way_back: Option<WayBack>,
}

/// What committing a reservation does. It fits only the manager that made it, and is void once that has been cleared.
#[derive(Debug)]
pub struct Pending {
    epoch: u64,
    changes: Vec<Change>,
}

/// What committing a step does to one sequence.
#[derive(Debug)]
struct Change {
    sequence: SequenceId,
    /// The copy that replaces the shared last block.
    replacement: Option<BlockId>,
    new_blocks: Vec<BlockId>,
    len: u32,
    /// Tokens that are new, and those of them, the first ones, that stay.
    query_len: u32,
    kept: u32,
}

impl Pending {
    /// Committing keeps the first `count` of a sequence's new tokens (all, if there aren't as many) and takes the others back: what a path of
    /// a tree leaves when its rows have moved to the front. Does nothing for a sequence that is not in the step.
    pub fn keep(&mut self, sequence: SequenceId, count: u32) {
        if let Some(change) = self.changes.iter_mut().find(|change| change.sequence == sequence) {
            change.kept = count.min(change.query_len);
        }
    }
}

/// A reserved step: blocks are taken, and nothing else has changed. It ends with [`Manager::commit`] or [`Manager::roll_back`].
#[derive(Debug)]
#[must_use = "its blocks are taken until it is committed or rolled back"]
#[non_exhaustive]
pub struct Reservation {
    /// Query lengths, context lengths and block tables.
    pub batch: Batch,
    /// What committing it does.
    pub pending: Pending,
    /// Slot (`block * block_size + offset`) of every new token.
    pub slots: Vec<u32>,
    /// Blocks to copy before anything is appended: source, destination.
    pub copies: Vec<[u32; 2]>,
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
            prefixes: PrefixIndex::default(),
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
        let tables = self.sequences.iter().map(|(&id, sequence)| (id, &sequence.table));
        MemoryReport::new(&self.config, &self.pool, self.usage(), self.prefix_stats(), tables)
    }

    /// Whether nothing is cached and nothing is under way.
    pub(crate) fn is_empty(&self) -> bool {
        let is_idle = |sequence: &Sequence| sequence.table.is_empty() && sequence.held_by.is_none();
        self.open_moves == 0 && self.pool.num_indexed() == 0 && self.sequences.values().all(is_idle)
    }

    /// A new, empty sequence. Takes no block.
    pub fn create(&mut self) -> SequenceId {
        self.insert(BlockTable::default())
    }

    pub(super) fn insert(&mut self, table: BlockTable) -> SequenceId {
        let id = self.next_id;
        self.next_id = id.next();
        self.insert_as(id, table);
        id
    }

    /// Under an id that was given out before and that no sequence has.
    pub(super) fn insert_as(&mut self, id: SequenceId, table: BlockTable) {
        self.sequences.insert(id, Sequence { table, held_by: None, way_back: None });
    }

    /// The blocks of a sequence, and its length; open steps not counted.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn table(&self, id: SequenceId) -> Result<&BlockTable> {
        self.sequences.get(&id).map(|s| &s.table).ok_or(Error::UnknownSequence(id))
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
    /// [left the window](KvCacheConfig::window); [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn fork_at(&mut self, id: SequenceId, len: u32) -> Result<SequenceId> {
        let block_size = self.config.block_size;
        self.check_way_back(id, len)?;
        let table = self.sequences[&id].table.fork_at(len, block_size, &mut self.pool);
        self.settle();
        Ok(self.insert(table))
    }

    /// Makes the full blocks of a sequence's first tokens findable. Returns the number of blocks that were not in the index yet. Of a sequence
    /// with a window those count that lie before the first one which is neither held nor in the index.
    ///
    /// # Errors
    /// [`Error::Argument`] for more tokens than the sequence has; [`Error::UnknownSequence`].
    pub fn publish_prefix(&mut self, id: SequenceId, tokens: &[u32], salt: u64) -> Result<u32> {
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

    /// A new sequence that begins with the longest indexed run of full blocks of `tokens` under this salt; it may be empty.
    pub fn match_prefix(&mut self, tokens: &[u32], salt: u64) -> PrefixMatch {
        let table = self.find_prefix(tokens, salt);
        let len = table.len();
        PrefixMatch { sequence: self.insert(table), len }
    }

    /// A table of the longest indexed run, of the blocks that the next token sees.
    fn find_prefix(&mut self, tokens: &[u32], salt: u64) -> BlockTable {
        let mut blocks = self.prefixes.find(tokens, salt, self.config.block_size);
        // At most the length of a sequence that was published.
        let len = blocks.len() as u32 * self.config.block_size;
        self.blank_hidden(&mut blocks, len);
        let table = BlockTable::share(&blocks, len, &mut self.pool);
        self.settle();
        table
    }

    /// Puts null in the places of blocks that a sequence of these tokens needs no more.
    fn blank_hidden(&self, blocks: &mut [BlockId], len: u32) {
        let hidden = self.config.hidden_blocks(len);
        let len = blocks.len();
        blocks[(hidden.start as usize).min(len)..(hidden.end as usize).min(len)].fill(BlockId::NULL);
    }

    /// [`Manager::match_prefix`] for a sequence that is there and empty. Returns how many tokens it has then.
    ///
    /// # Errors
    /// [`Error::Argument`] if the sequence has tokens; [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn match_prefix_into(&mut self, id: SequenceId, tokens: &[u32], salt: u64) -> Result<u32> {
        let have = self.check_idle(id)?.table.len();
        if have > 0 {
            return Err(Error::argument("sequence", format!("{id} of {have} tokens"), "an empty one"));
        }
        let table = self.find_prefix(tokens, salt);
        let len = table.len();
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.table = table;
        }
        Ok(len)
    }

    /// What a match of `tokens` would find, without a match.
    #[must_use]
    pub fn probe_prefix(&self, tokens: &[u32], salt: u64) -> PrefixProbe {
        let mut blocks = self.prefixes.look(tokens, salt, self.config.block_size);
        let len = blocks.len() as u32 * self.config.block_size;
        self.blank_hidden(&mut blocks, len);
        let is_reclaimable = |block: &&BlockId| !block.is_null() && self.pool.num_holders(**block) == 0;
        PrefixProbe { len, reclaimable_blocks: blocks.iter().filter(is_reclaimable).count() as u32 }
    }

    /// Blocks that are free or reclaimable when this sequence is gone: those that no other sequence or open step holds.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn exclusive_blocks(&self, id: SequenceId) -> Result<u32> {
        let blocks = self.table(id)?.blocks();
        Ok(blocks.iter().filter(|&&block| self.pool.num_holders(block) == 1).count() as u32)
    }

    /// Whether the next token of this sequence takes a copy of its last block: that is partly filled, and others hold it, too.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn copies_last_block(&self, id: SequenceId) -> Result<bool> {
        let partial = self.table(id)?.partial_block(self.config.block_size);
        Ok(partial.is_some_and(|block| self.pool.ref_count(block) > 1))
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
    /// [left the window](KvCacheConfig::window); [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn truncate(&mut self, id: SequenceId, len: u32) -> Result<()> {
        self.check_way_back(id, len)?;
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.table.truncate(len, self.config.block_size, &mut self.pool);
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

    /// Reserves a step of new tokens, `(sequence, query_len)` each: checks the batch, then takes all blocks that it needs, or none.
    ///
    /// With a [window](KvCacheConfig::window), blocks that the sequences' new tokens don't see return to the pool first. They don't come back if the
    /// step is dropped: the sequences keep what lets them go on from the length that they have now.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`]; [`Error::SequenceFull`]; [`Error::Argument`] for an empty batch, a sequence that occurs twice or a `query_len` of 0;
    /// [`Error::UnknownSequence`]; [`Error::SequenceBusy`]. Nothing has changed then.
    pub fn reserve(&mut self, requests: &[(SequenceId, u32)]) -> Result<Reservation> {
        let block_size = self.config.block_size;
        if requests.is_empty() {
            return Err(Error::argument("batch", "no sequences", "at least one (sequence, query_len)"));
        }
        let mut seen = HashSet::with_capacity(requests.len());
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
            if let Some(max_seq_len) = self.config.max_seq_len()
                && len + query_len > max_seq_len
            {
                let need = u64::from(len) + u64::from(query_len);
                return Err(Error::SequenceFull { sequence: id, need, max_seq_len });
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
        self.release_for(requests.iter().map(|&(id, _)| id), need)?;
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
            pending: Pending { epoch: self.epoch, changes: Vec::with_capacity(requests.len()) },
            slots: Vec::with_capacity(num_tokens as usize),
            copies: Vec::new(),
        };
        for (&(id, query_len), growth) in requests.iter().zip(growths) {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            sequence.held_by = Some(Holder::Step);
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
            let kernel = QueryKernel::default();
            reservation.batch.entries.push(BatchEntry { query_len, context_len, table: range, kernel, tree: None });
            reservation.pending.changes.push(Change {
                sequence: id,
                replacement,
                new_blocks,
                len,
                query_len,
                kept: query_len,
            });
        }
        reservation
    }

    /// Ends a reserved step: lengths advance, new blocks join their tables, replaced blocks lose a holder. Nothing happens, and false is
    /// returned, if the cache has been cleared since it was reserved, or the reservation is another manager's.
    pub fn commit(&mut self, pending: Pending) -> bool {
        let changes = self.changes_of(pending);
        let is_valid = !changes.is_empty();
        for change in changes {
            let Some(sequence) = self.sequences.get_mut(&change.sequence) else { continue };
            sequence.held_by = None;
            if let Some(replaced) = sequence.table.grow(change.replacement, &change.new_blocks, change.len) {
                self.pool.release(replaced);
            }
            let kept = change.len - (change.query_len - change.kept);
            sequence.table.truncate(kept, self.config.block_size, &mut self.pool);
        }
        self.settle();
        is_valid
    }

    /// Undoes a reserved step: gives its blocks back. Nothing happens if the cache has been cleared since: its pool is another one.
    pub fn roll_back(&mut self, pending: Pending) {
        // In reverse, so that the next step takes the same blocks in the same order.
        for change in self.changes_of(pending).into_iter().rev() {
            for &block in change.new_blocks.iter().rev().chain(&change.replacement) {
                self.pool.release(block);
            }
            if let Some(sequence) = self.sequences.get_mut(&change.sequence) {
                sequence.held_by = None;
            }
        }
        self.settle();
    }

    /// The changes of a reservation, if it is this manager's and not void.
    fn changes_of(&self, pending: Pending) -> Vec<Change> {
        // A sequence in a step can't be freed, so it is there. Ids of other managers are not.
        let is_own = |change: &Change| self.sequences.contains_key(&change.sequence);
        if pending.epoch == self.epoch && pending.changes.iter().all(is_own) { pending.changes } else { Vec::new() }
    }
}

#[cfg(test)]
mod tests;

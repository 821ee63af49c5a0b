//! Steps as transactions: blocks are reserved, and the step is committed or rolled back.

use std::collections::{HashMap, HashSet};

use super::batch::{Batch, BatchEntry, QueryKernel};
use super::manager::Manager;
use super::table::Growth;
use crate::error::{Error, Holder, Result};
use crate::ids::{BlockId, SequenceId};

/// What committing a reservation does. It fits only the manager that made it, and is void once that has been cleared.
#[derive(Debug)]
pub struct Pending {
    epoch: u64,
    pub(super) changes: Vec<Change>,
}

/// What committing a step does to one sequence.
#[derive(Debug)]
pub(super) struct Change {
    sequence: SequenceId,
    /// Of each group of layers.
    pub(super) tables: Vec<TableChange>,
    len: u32,
    /// Tokens that are new, and those of them, the first ones, that stay.
    query_len: u32,
    kept: u32,
}

/// What committing a step does to one table.
#[derive(Debug)]
pub(super) struct TableChange {
    /// The copy that replaces the shared last block.
    pub(super) replacement: Option<BlockId>,
    pub(super) new_blocks: Vec<BlockId>,
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
    /// What each group of layers does, in the order of [`KvCacheConfig::groups`](crate::KvCacheConfig::groups).
    pub groups: Vec<ReservedGroup>,
    /// What committing it does.
    pub pending: Pending,
}

/// What the layers of a group do in a reserved step.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ReservedGroup {
    /// Query lengths, context lengths and block tables. The lengths are the same in all groups.
    pub batch: Batch,
    /// Slot (`block * block_size + offset`) of every new token.
    pub slots: Vec<u32>,
    /// Blocks to copy before anything is appended: source, destination.
    pub copies: Vec<[u32; 2]>,
}

impl Manager {
    /// Reserves a step of new tokens, `(sequence, query_len)` each: checks the batch, then takes all blocks that it needs, of every group of layers, or
    /// none.
    ///
    /// With [windows](crate::KvCacheConfig::with_window), blocks that the sequences' new tokens don't see return to the pool first. They don't come back
    /// if the step is dropped: the sequences keep what lets them go on from the length that they have now.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`]; [`Error::SequenceFull`]; [`Error::Argument`] for an empty batch, a sequence that occurs twice or a `query_len` of 0;
    /// [`Error::UnknownSequence`]; [`Error::SequenceBusy`]. Nothing has changed then.
    pub fn reserve(&mut self, requests: &[(SequenceId, u32)]) -> Result<Reservation> {
        let block_size = self.config().block_size;
        let num_tokens = self.check_batch(requests)?;

        // Of several sequences that write into the same shared block, the last one may have it when all others take copies
        // and nobody else holds it. But not if another one's tokens reach further: should this step be submitted and then
        // dropped, that sequence keeps the block, and its tokens must still be there. Holder count and furthest length:
        let mut leaving: HashMap<BlockId, (u32, u32)> = HashMap::new();
        let mut growths = Vec::with_capacity(requests.len());
        let mut need = 0_u64;
        for &(id, query_len) in requests {
            for table in &self.sequences[&id].tables {
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
        }
        self.release_for(requests.iter().map(|&(id, _)| id), need)?;
        let taken = self.take_blocks(need)?;
        Ok(self.reserve_blocks(requests, &growths, taken, num_tokens))
    }

    /// Checks all of a batch but for room in the pool. Returns its number of tokens.
    fn check_batch(&self, requests: &[(SequenceId, u32)]) -> Result<u32> {
        if requests.is_empty() {
            return Err(Error::argument("batch", "no sequences", "at least one (sequence, query_len)"));
        }
        let mut seen = HashSet::with_capacity(requests.len());
        let mut num_tokens = 0_u32;
        for &(id, query_len) in requests {
            let len = self.check_idle(id)?.len();
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
            if let Some(max_seq_len) = self.config().max_seq_len()
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
        Ok(num_tokens)
    }

    /// The part of [`Manager::reserve`] that can't fail. `growths` are those of every group of every sequence.
    fn reserve_blocks(
        &mut self,
        requests: &[(SequenceId, u32)],
        growths: &[Growth],
        taken: Vec<BlockId>,
        num_tokens: u32,
    ) -> Reservation {
        let (block_size, num_groups) = (self.config().block_size, self.config().groups.count() as usize);
        let mut taken = taken.into_iter();
        let group = ReservedGroup { slots: Vec::with_capacity(num_tokens as usize), ..ReservedGroup::default() };
        let mut groups = vec![group; num_groups];
        let mut changes = Vec::with_capacity(requests.len());
        for (&(id, query_len), growths) in requests.iter().zip(growths.chunks_exact(num_groups)) {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            sequence.held_by = Some(Holder::Step);
            let context_len = sequence.len();
            let len = context_len + query_len;
            let mut table_changes = Vec::with_capacity(num_groups);
            for ((group, table), growth) in groups.iter_mut().zip(&sequence.tables).zip(growths) {
                let replacement = if growth.copy_last { taken.next() } else { None };
                let new_blocks: Vec<_> = taken.by_ref().take(growth.new_blocks as usize).collect();
                let tables = &mut group.batch.tables;
                let start = tables.len();
                tables.extend(table.blocks().iter().map(|b| b.0));
                if let (Some(copy), Some(last)) = (replacement, tables.last_mut()) {
                    group.copies.push([*last, copy.0]);
                    *last = copy.0;
                }
                tables.extend(new_blocks.iter().map(|b| b.0));
                let range = start..tables.len();
                let blocks = &tables[range.clone()];
                group.slots.extend(
                    (context_len..len)
                        .map(|position| blocks[(position / block_size) as usize] * block_size + position % block_size),
                );
                let kernel = QueryKernel::default();
                group.batch.entries.push(BatchEntry { query_len, context_len, table: range, kernel, tree: None });
                table_changes.push(TableChange { replacement, new_blocks });
            }
            changes.push(Change { sequence: id, tables: table_changes, len, query_len, kept: query_len });
        }
        Reservation { groups, pending: Pending { epoch: self.epoch(), changes } }
    }

    /// Ends a reserved step: lengths advance, new blocks join their tables, replaced blocks lose a holder. Nothing happens, and false is
    /// returned, if the cache has been cleared since it was reserved, or the reservation is another manager's.
    pub fn commit(&mut self, pending: Pending) -> bool {
        let block_size = self.config().block_size;
        let changes = self.changes_of(pending);
        let is_valid = !changes.is_empty();
        for change in changes {
            let Some(sequence) = self.sequences.get_mut(&change.sequence) else { continue };
            sequence.held_by = None;
            let kept = change.len - (change.query_len - change.kept);
            for (table, TableChange { replacement, new_blocks }) in sequence.tables.iter_mut().zip(change.tables) {
                if let Some(replaced) = table.grow(replacement, &new_blocks, change.len) {
                    self.pool.release(replaced);
                }
                table.truncate(kept, block_size, &mut self.pool);
            }
        }
        self.settle();
        is_valid
    }

    /// Undoes a reserved step: gives its blocks back. Nothing happens if the cache has been cleared since: its pool is another one.
    pub fn roll_back(&mut self, pending: Pending) {
        // In reverse, so that the next step takes the same blocks in the same order.
        for change in self.changes_of(pending).into_iter().rev() {
            for TableChange { replacement, new_blocks } in change.tables.iter().rev() {
                for &block in new_blocks.iter().rev().chain(replacement) {
                    self.pool.release(block);
                }
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
        if pending.epoch == self.epoch() && pending.changes.iter().all(is_own) { pending.changes } else { Vec::new() }
    }
}

//! [`BlockTable`]: the blocks of one sequence. Host only.

use std::ops::Range;

use super::pool::BlockPool;
use crate::ids::BlockId;

/// The blocks of one sequence in order, and its length. Every block but the last is full. Those that have left the window of the sequence are
/// [`BlockId::NULL`], so that the others stay where their tokens say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    len: u32,
    /// How many of them are null.
    num_null: u32,
    /// From the sink tokens' blocks up to here all are null, so that nobody looks for more of them there.
    null_to: u32,
}

/// What a table needs in order to grow; see [`BlockTable::growth`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    /// The last block is shared and partly filled: it must be replaced by a copy before it is written to.
    pub copy_last: bool,
    /// Blocks to add at the end.
    pub new_blocks: u32,
}

impl Growth {
    /// Blocks to take from the pool.
    #[must_use]
    pub fn blocks(self) -> u32 {
        self.new_blocks.saturating_add(self.copy_last.into())
    }
}

impl BlockTable {
    /// Tokens.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the sequence has no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The blocks, in the order of the tokens; null ones among them.
    #[must_use]
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// The blocks that it holds: those that are not null.
    pub fn held(&self) -> impl Iterator<Item = BlockId> {
        self.blocks.iter().copied().filter(|block| !block.is_null())
    }

    /// How many blocks it holds.
    #[must_use]
    pub fn num_held(&self) -> u32 {
        self.blocks.len() as u32 - self.num_null
    }

    /// Whether one of these blocks is null. Those behind the last one are not.
    pub(super) fn has_null(&self, blocks: Range<u32>) -> bool {
        let end = (blocks.end as usize).min(self.blocks.len());
        self.num_null > 0 && self.blocks.get(blocks.start as usize..end).is_some_and(|b| b.contains(&BlockId::NULL))
    }

    /// The blocks between the first and the last null one, both included; empty if there is none.
    pub(super) fn null_range(&self) -> Range<u32> {
        let at = |place: Option<usize>| place.map_or(0, |at| at as u32);
        let first = self.blocks.iter().position(|block| block.is_null());
        let last = self.blocks.iter().rposition(|block| block.is_null());
        at(first)..last.map_or(0, |at| at as u32 + 1)
    }

    /// Which of the blocks `hidden`, but for those in `kept`, are still held, with their places.
    pub(super) fn held_among(&self, hidden: Range<u32>, kept: Range<u32>) -> impl Iterator<Item = (u32, BlockId)> {
        let end = hidden.end.min(self.blocks.len() as u32);
        let begin = hidden.start.max(self.null_to).min(end);
        let blocks = self.blocks.get(begin as usize..end as usize).unwrap_or_default();
        let places = (begin..).zip(blocks.iter().copied());
        places.filter(move |(place, block)| !block.is_null() && !kept.contains(place))
    }

    /// Gives the blocks `hidden` back, but for those in `kept`, and puts null in their places. `hidden` begins behind the sink tokens' blocks.
    pub(super) fn release(&mut self, hidden: Range<u32>, kept: Range<u32>, pool: &mut BlockPool) {
        let leaving: Vec<_> = self.held_among(hidden.clone(), kept.clone()).collect();
        for (place, block) in leaving {
            let held = pool.release(block);
            debug_assert!(held, "a table holds its blocks");
            if let Some(entry) = self.blocks.get_mut(place as usize) {
                *entry = BlockId::NULL;
                self.num_null += 1;
            }
        }
        let is_inside = kept.start < kept.end && hidden.contains(&kept.start);
        let end = if is_inside { kept.start } else { hidden.end };
        self.null_to = self.null_to.max(end).min(self.blocks.len() as u32);
    }

    /// The last block if it has room, so that the next token would be written into it.
    #[must_use]
    pub fn partial_block(&self, block_size: u32) -> Option<BlockId> {
        if self.len.is_multiple_of(block_size) { None } else { self.blocks.last().copied() }
    }

    /// What `count` more tokens need. `shared` says whether the partly filled last block has other holders.
    #[must_use]
    pub fn growth(&self, count: u32, block_size: u32, shared: bool) -> Growth {
        let have = self.blocks.len() as u32;
        // In u64: a length near 2^32 is refused elsewhere, but must not wrap here. The block count fits, whatever the block size.
        let need = (u64::from(self.len) + u64::from(count)).div_ceil(block_size.max(1).into()) as u32;
        let copy_last = shared && count > 0 && self.partial_block(block_size).is_some();
        Growth { copy_last, new_blocks: need.saturating_sub(have) }
    }

    /// Replaces the last block (its copy), adds `new`, and grows to `len` tokens: with what [`BlockTable::growth`] asks
    /// for. Returns the replaced block, which the pool still counts as held: the caller releases it.
    pub fn grow(&mut self, replacement: Option<BlockId>, new: &[BlockId], len: u32) -> Option<BlockId> {
        let replaced = match (replacement, self.blocks.last_mut()) {
            (Some(copy), Some(last)) => Some(std::mem::replace(last, copy)),
            _ => None,
        };
        self.blocks.extend_from_slice(new);
        self.len = len;
        replaced
    }

    /// A table of the same blocks; the pool counts one more holder for each.
    #[must_use]
    pub fn fork(&self, pool: &mut BlockPool) -> Self {
        Self::share(&self.blocks, self.len, pool)
    }

    /// A table of the first `len` tokens (all of them, if there aren't as many), in the same blocks; the pool counts one
    /// more holder for each. The last block may reach further than the new table does.
    #[must_use]
    pub fn fork_at(&self, len: u32, block_size: u32, pool: &mut BlockPool) -> Self {
        let len = len.min(self.len);
        Self::share(&self.blocks[..self.num_blocks(len, block_size)], len, pool)
    }

    /// A table of these blocks, some of which may be null, of which the caller is a holder and is none any more.
    pub(super) fn of(blocks: Vec<BlockId>, len: u32) -> Self {
        let num_null = blocks.iter().filter(|block| block.is_null()).count() as u32;
        Self { blocks, len, num_null, null_to: 0 }
    }

    /// How many of the blocks hold the first `len` tokens.
    fn num_blocks(&self, len: u32, block_size: u32) -> usize {
        (len.div_ceil(block_size.max(1)) as usize).min(self.blocks.len())
    }

    /// A table of blocks that somebody else holds, too; some may be null.
    pub(super) fn share(blocks: &[BlockId], len: u32, pool: &mut BlockPool) -> Self {
        let table = Self::of(blocks.to_vec(), len);
        for block in table.held() {
            let held = pool.retain(block);
            debug_assert!(held, "a table holds its blocks");
        }
        table
    }

    /// Replaces each block by what `rename` says, which must be as many different blocks.
    pub(super) fn rename(&mut self, rename: impl Fn(BlockId) -> BlockId) {
        for block in self.blocks.iter_mut().filter(|block| !block.is_null()) {
            *block = rename(*block);
        }
    }

    /// Shortens to `len` tokens and gives the blocks behind it back. Does nothing if the table isn't longer.
    pub fn truncate(&mut self, len: u32, block_size: u32, pool: &mut BlockPool) {
        if len >= self.len {
            return;
        }
        self.len = len;
        for block in self.blocks.drain(self.num_blocks(len, block_size)..) {
            if block.is_null() {
                self.num_null -= 1;
                continue;
            }
            let held = pool.release(block);
            debug_assert!(held, "a table holds its blocks");
        }
        self.null_to = self.null_to.min(self.blocks.len() as u32);
    }
}

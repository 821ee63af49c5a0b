//! [`BlockPool`]: free list and reference counts. Host only.

use crate::error::{Error, Result};
use crate::ids::BlockId;

/// Hands out blocks and counts who holds them. A block is free when nobody does.
///
/// Holders are sequences and open steps, and the prefix index, whose references are counted apart: a block that only the
/// index holds is *reclaimable*, for the index may be asked to let it go.
#[derive(Clone, Debug)]
pub struct BlockPool {
    counts: Vec<Counts>,
    /// Free blocks; the end of the list is taken first, so that recently used (cached) memory is used again.
    free: Vec<BlockId>,
    num_indexed: u32,
    num_reclaimable: u32,
    num_shared: u32,
    /// Blocks that have become reclaimable or ceased to be, since the index last asked.
    changed: Vec<BlockId>,
}

/// References to a block.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Of all holders.
    all: u32,
    /// Those among them that are the prefix index's.
    index: u32,
}

impl Counts {
    fn holders(self) -> u32 {
        self.all - self.index
    }

    fn is_shared(self) -> bool {
        self.holders() > 1
    }

    fn is_indexed(self) -> bool {
        self.index > 0
    }

    fn is_reclaimable(self) -> bool {
        self.index > 0 && self.index == self.all
    }
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks.
    #[must_use]
    pub fn new(num_blocks: u32) -> Self {
        Self {
            counts: vec![Counts::default(); num_blocks as usize],
            free: (0..num_blocks).rev().map(BlockId).collect(),
            num_indexed: 0,
            num_reclaimable: 0,
            num_shared: 0,
            changed: Vec::new(),
        }
    }

    /// [`BlockPool::new`], if the host has memory for the bookkeeping: 12 bytes per block.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub(super) fn try_new(num_blocks: u32) -> Result<Self> {
        Vec::<[u32; 3]>::new().try_reserve_exact(num_blocks as usize).map_err(|_| {
            let need = format!("{} bytes of bookkeeping", 12 * u64::from(num_blocks));
            Error::unsupported("num_blocks", need, "less memory on the host")
        })?;
        Ok(Self::new(num_blocks))
    }

    /// Blocks in all.
    #[must_use]
    pub fn num_blocks(&self) -> u32 {
        // The constructor takes a u32.
        self.counts.len() as u32
    }

    /// Blocks that nobody holds.
    #[must_use]
    pub fn num_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks that only the prefix index holds.
    #[must_use]
    pub fn num_reclaimable(&self) -> u32 {
        self.num_reclaimable
    }

    /// Blocks that the prefix index holds, alone or with others.
    #[must_use]
    pub fn num_indexed(&self) -> u32 {
        self.num_indexed
    }

    /// References to a block, the prefix index's among them: 0 for a free block or an unknown id.
    #[must_use]
    pub fn ref_count(&self, block: BlockId) -> u32 {
        self.counts(block).all
    }

    /// Sequences and open steps that hold a block, the prefix index not counted.
    #[must_use]
    pub fn num_holders(&self, block: BlockId) -> u32 {
        self.counts(block).holders()
    }

    fn counts(&self, block: BlockId) -> Counts {
        self.counts.get(block.0 as usize).copied().unwrap_or_default()
    }

    /// Whether only the prefix index holds the block.
    pub(super) fn is_reclaimable(&self, block: BlockId) -> bool {
        self.counts(block).is_reclaimable()
    }

    /// Blocks that more than one sequence or open step holds.
    #[must_use]
    pub fn num_shared(&self) -> u32 {
        self.num_shared
    }

    /// Takes `count` free blocks, each with one holder, or `None`, and then none is taken.
    #[must_use]
    pub fn allocate(&mut self, count: u32) -> Option<Vec<BlockId>> {
        let keep = self.free.len().checked_sub(count as usize)?;
        let taken: Vec<_> = self.free.drain(keep..).rev().collect();
        for block in &taken {
            self.counts[block.0 as usize].all = 1;
        }
        Some(taken)
    }

    /// Adds a holder to a block that has one. Returns false, and does nothing, for a free block or an unknown id.
    pub fn retain(&mut self, block: BlockId) -> bool {
        self.change(block, |counts| counts.all += 1)
    }

    /// Takes a holder away; the block is free after its last one. Returns false, and does nothing, for a block that only
    /// the prefix index holds, a free block or an unknown id.
    pub fn release(&mut self, block: BlockId) -> bool {
        self.num_holders(block) > 0 && self.change(block, |counts| counts.all -= 1)
    }

    /// [`BlockPool::retain`] for the prefix index.
    pub(super) fn retain_indexed(&mut self, block: BlockId) -> bool {
        self.change(block, |counts| (counts.all, counts.index) = (counts.all + 1, counts.index + 1))
    }

    /// [`BlockPool::release`] for the prefix index, which must hold the block.
    pub(super) fn release_indexed(&mut self, block: BlockId) -> bool {
        self.counts(block).is_indexed()
            && self.change(block, |counts| (counts.all, counts.index) = (counts.all - 1, counts.index - 1))
    }

    /// Blocks that have become reclaimable or ceased to be since the last call, some perhaps more than once.
    pub(super) fn take_changed(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.changed)
    }

    /// The free list.
    #[cfg(test)]
    pub(super) fn free_blocks(&self) -> &[BlockId] {
        &self.free
    }

    /// Changes the counts of a block that is not free.
    fn change(&mut self, block: BlockId, change: impl FnOnce(&mut Counts)) -> bool {
        let Some(counts) = self.counts.get_mut(block.0 as usize).filter(|counts| counts.all > 0) else { return false };
        let before = *counts;
        change(counts);
        let after = *counts;
        // A fork of a long sequence changes thousands of blocks that no index holds.
        self.num_shared = self.num_shared + u32::from(after.is_shared()) - u32::from(before.is_shared());
        if before.is_indexed() || after.is_indexed() {
            self.num_indexed = self.num_indexed + u32::from(after.is_indexed()) - u32::from(before.is_indexed());
            let (was_reclaimable, is_reclaimable) = (before.is_reclaimable(), after.is_reclaimable());
            self.num_reclaimable = self.num_reclaimable + u32::from(is_reclaimable) - u32::from(was_reclaimable);
            // The index itself knows what it has let go of.
            if is_reclaimable != was_reclaimable && after.is_indexed() {
                self.changed.push(block);
            }
        }
        if after.all == 0 {
            self.free.push(block);
        }
        true
    }

    /// Takes these free blocks, each with one holder. They must be free and different, in ascending order.
    pub(super) fn take(&mut self, blocks: &[BlockId]) {
        self.free.retain(|block| blocks.binary_search(block).is_err());
        for block in blocks {
            self.counts[block.0 as usize].all = 1;
        }
    }

    /// `to` gets the holders of `from`, which is free then. The caller is one holder of `from` and the only one of `to`, and is neither after it.
    pub(super) fn hand_over(&mut self, from: BlockId, to: BlockId) {
        let Counts { all, index } = std::mem::take(&mut self.counts[from.0 as usize]);
        self.num_shared -= u32::from(Counts { all, index }.is_shared());
        // `from` was not reclaimable, as the caller held it.
        let others = all - 1;
        self.counts[to.0 as usize] = Counts { all: others, index };
        self.num_shared += u32::from(self.counts(to).is_shared());
        if self.is_reclaimable(to) {
            self.num_reclaimable += 1;
            self.changed.push(to);
        }
        self.free.push(from);
        if others == 0 {
            self.free.push(to);
        }
    }

    /// The lowest free blocks are taken first from now on.
    pub(super) fn sort_free(&mut self) {
        self.free.sort_unstable_by(|a, b| b.cmp(a));
    }
}

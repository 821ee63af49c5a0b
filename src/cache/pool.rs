//! [`BlockPool`]: free list and reference counts. Host only.

/// Index of a block in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub(crate) u32);

impl BlockId {
    /// The index, below `num_blocks`.
    #[must_use]
    pub const fn index(self) -> u32 {
        self.0
    }
}

/// Hands out blocks and counts who holds them. A block is free when nobody does.
#[derive(Clone, Debug)]
pub struct BlockPool {
    ref_counts: Vec<u32>,
    /// Free blocks; the end of the list is taken first, so that recently used (cached) memory is used again.
    free: Vec<BlockId>,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks.
    #[must_use]
    pub fn new(num_blocks: u32) -> Self {
        Self { ref_counts: vec![0; num_blocks as usize], free: (0..num_blocks).rev().map(BlockId).collect() }
    }

    /// Blocks in all.
    #[must_use]
    pub fn num_blocks(&self) -> u32 {
        // The constructor takes a u32.
        self.ref_counts.len() as u32
    }

    /// Blocks that nobody holds.
    #[must_use]
    pub fn num_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Holders of a block: 0 for a free block or an unknown id.
    #[must_use]
    pub fn ref_count(&self, block: BlockId) -> u32 {
        self.ref_counts.get(block.0 as usize).copied().unwrap_or(0)
    }

    /// Blocks that more than one holder has.
    #[must_use]
    pub fn num_shared(&self) -> u32 {
        self.ref_counts.iter().filter(|&&count| count > 1).count() as u32
    }

    /// Takes `count` free blocks, each with one holder, or `None`, and then none is taken.
    #[must_use]
    pub fn allocate(&mut self, count: u32) -> Option<Vec<BlockId>> {
        let keep = self.free.len().checked_sub(count as usize)?;
        let taken: Vec<_> = self.free.drain(keep..).rev().collect();
        for block in &taken {
            self.ref_counts[block.0 as usize] = 1;
        }
        Some(taken)
    }

    /// Adds a holder to a block that has one. Returns false, and does nothing, for a free block or an unknown id.
    pub fn retain(&mut self, block: BlockId) -> bool {
        match self.ref_counts.get_mut(block.0 as usize) {
            Some(count) if *count > 0 => {
                *count += 1;
                true
            }
            _ => false,
        }
    }

    /// Takes a holder away; the block is free after its last one. Returns false, and does nothing, for a free block or
    /// an unknown id.
    pub fn release(&mut self, block: BlockId) -> bool {
        match self.ref_counts.get_mut(block.0 as usize) {
            Some(count) if *count > 0 => {
                *count -= 1;
                if *count == 0 {
                    self.free.push(block);
                }
                true
            }
            _ => false,
        }
    }
}

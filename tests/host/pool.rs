//! [`BlockPool`] and [`BlockTable`] against a model that is too simple to be wrong: vectors of holders and of tokens.

use std::collections::HashMap;

use folio::BlockId;
use folio::sequence::{BlockPool, BlockTable, Growth};
use proptest::prelude::*;

/// Takes all blocks of a pool; tests name blocks by their place in it.
fn blocks(count: u32) -> Vec<BlockId> {
    BlockPool::new(count).allocate(count).expect("a pool has its blocks")
}

#[test]
fn a_new_pool_is_all_free() {
    let pool = BlockPool::new(3);
    assert_eq!((pool.num_blocks(), pool.num_free(), pool.num_shared()), (3, 3, 0));
    assert_eq!((pool.num_indexed(), pool.num_reclaimable()), (0, 0));
    assert!(blocks(3).into_iter().all(|block| pool.ref_count(block) == 0));
}

#[test]
fn a_pool_hands_out_each_block_once() {
    let mut ids: Vec<u32> = blocks(5).into_iter().map(BlockId::index).collect();
    ids.sort_unstable();
    assert_eq!(ids, [0, 1, 2, 3, 4]);
}

#[test]
fn too_large_an_allocation_takes_nothing() {
    let mut pool = BlockPool::new(3);
    let held = pool.allocate(1).expect("one of three");
    assert_eq!(pool.allocate(3), None);
    assert_eq!(pool.allocate(u32::MAX), None);
    assert_eq!(pool.num_free(), 2);
    assert_eq!(pool.ref_count(held[0]), 1);
    assert_eq!(pool.allocate(2).map(|blocks| blocks.len()), Some(2));
    assert_eq!(pool.allocate(0), Some(Vec::new()));
}

#[test]
fn a_block_is_free_after_its_last_holder() {
    let mut pool = BlockPool::new(1);
    let block = pool.allocate(1).expect("one of one")[0];
    assert!(pool.retain(block));
    assert_eq!((pool.ref_count(block), pool.num_shared(), pool.num_free()), (2, 1, 0));
    assert!(pool.release(block));
    assert_eq!((pool.ref_count(block), pool.num_shared(), pool.num_free()), (1, 0, 0));
    assert!(pool.release(block));
    assert_eq!((pool.ref_count(block), pool.num_shared(), pool.num_free()), (0, 0, 1));
}

#[test]
fn free_and_unknown_blocks_can_be_neither_retained_nor_released() {
    let mut pool = BlockPool::new(2);
    for block in blocks(4) {
        assert!(!pool.retain(block));
        assert!(!pool.release(block));
        assert_eq!(pool.ref_count(block), 0);
    }
    assert_eq!(pool.num_free(), 2);
}

#[test]
fn the_block_that_was_freed_last_is_used_next() {
    let mut pool = BlockPool::new(4);
    let held = pool.allocate(3).expect("three of four");
    assert!(pool.release(held[1]));
    assert_eq!(pool.allocate(1), Some(vec![held[1]]));
}

/// A table of `len` tokens in blocks of `block_size` of the pool.
fn table(pool: &mut BlockPool, len: u32, block_size: u32) -> BlockTable {
    let mut table = BlockTable::default();
    let new = pool.allocate(table.growth(len, block_size, false).new_blocks).expect("enough blocks");
    table.grow(None, &new, len);
    table
}

#[test]
fn growth_counts_blocks_at_their_boundaries() {
    let mut pool = BlockPool::new(16);
    let grow = |new_blocks| Growth { copy_last: false, new_blocks };
    for (len, count, want) in
        [(0, 0, 0), (0, 1, 1), (0, 5, 1), (0, 6, 2), (4, 1, 0), (4, 2, 1), (5, 1, 1), (5, 5, 1), (5, 6, 2)]
    {
        let table = table(&mut pool.clone(), len, 5);
        assert_eq!(table.growth(count, 5, false), grow(want), "{len} + {count}");
    }
    assert_eq!(table(&mut pool, 3, 1).growth(2, 1, false), grow(2));
}

#[test]
fn only_a_shared_block_that_would_be_written_to_is_copied() {
    let mut pool = BlockPool::new(16);
    let (partial, full, empty) = (table(&mut pool, 6, 4), table(&mut pool, 8, 4), BlockTable::default());
    assert_eq!(partial.growth(1, 4, true), Growth { copy_last: true, new_blocks: 0 });
    assert_eq!(partial.growth(3, 4, true), Growth { copy_last: true, new_blocks: 1 });
    assert_eq!(partial.growth(3, 4, true).blocks(), 2);
    assert_eq!(partial.growth(0, 4, true), Growth::default());
    assert_eq!(full.growth(1, 4, true), Growth { copy_last: false, new_blocks: 1 });
    assert_eq!(empty.growth(1, 4, true), Growth { copy_last: false, new_blocks: 1 });
    assert_eq!(partial.partial_block(4), partial.blocks().last().copied());
    assert_eq!((full.partial_block(4), empty.partial_block(4)), (None, None));
}

#[test]
fn truncating_to_the_same_or_a_larger_length_does_nothing() {
    let mut pool = BlockPool::new(4);
    let mut table = table(&mut pool, 6, 4);
    let before = table.clone();
    table.truncate(6, 4, &mut pool);
    table.truncate(100, 4, &mut pool);
    assert_eq!((table, pool.num_free()), (before, 2));
}

#[derive(Clone, Debug)]
enum Op {
    Allocate(u32),
    Retain(usize),
    Release(usize),
    Create,
    Grow(usize, u32),
    Fork(usize),
    ForkAt(usize, u32),
    Truncate(usize, u32),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        (0..6_u32).prop_map(Op::Allocate),
        (0..40_usize).prop_map(Op::Retain),
        (0..40_usize).prop_map(Op::Release),
        Just(Op::Create),
        (0..8_usize, 0..20_u32).prop_map(|(table, count)| Op::Grow(table, count)),
        (0..8_usize, 0..20_u32).prop_map(|(table, count)| Op::Grow(table, count)),
        (0..8_usize).prop_map(Op::Fork),
        (0..8_usize, 0..60_u32).prop_map(|(table, len)| Op::ForkAt(table, len)),
        (0..8_usize, 0..60_u32).prop_map(|(table, len)| Op::Truncate(table, len)),
    ];
    proptest::collection::vec(op, 0..60)
}

/// The real pool and tables beside what they should mean.
struct World {
    block_size: u32,
    pool: BlockPool,
    /// Ids of the pool's blocks and of as many that it doesn't have.
    ids: Vec<BlockId>,
    /// Holders of each block outside of tables.
    loose: HashMap<BlockId, u32>,
    tables: Vec<BlockTable>,
    /// What the tables' sequences should read.
    tokens: Vec<Vec<u32>>,
    /// What is stored at (block, offset).
    memory: HashMap<(BlockId, u32), u32>,
    next_token: u32,
}

impl World {
    fn new(num_blocks: u32, block_size: u32) -> Self {
        Self {
            block_size,
            pool: BlockPool::new(num_blocks),
            ids: blocks(2 * num_blocks),
            loose: HashMap::new(),
            tables: Vec::new(),
            tokens: Vec::new(),
            memory: HashMap::new(),
            next_token: 0,
        }
    }

    fn holders(&self, block: BlockId) -> u32 {
        let tables = self.tables.iter().flat_map(BlockTable::blocks).filter(|&&held| held == block).count();
        self.loose.get(&block).copied().unwrap_or(0) + tables as u32
    }

    fn free(&self) -> u32 {
        self.ids[..].iter().filter(|id| id.index() < self.pool.num_blocks() && self.holders(**id) == 0).count() as u32
    }

    fn apply(&mut self, op: &Op) -> Result<(), TestCaseError> {
        match *op {
            Op::Allocate(count) => {
                let free = self.free();
                let taken = self.pool.allocate(count);
                prop_assert_eq!(taken.is_some(), count <= free);
                for block in taken.into_iter().flatten() {
                    prop_assert_eq!(self.holders(block), 0, "{:?} was held", block);
                    self.loose.insert(block, 1);
                }
            }
            Op::Retain(id) => {
                let block = self.ids[id % self.ids.len()];
                let held = self.holders(block) > 0;
                prop_assert_eq!(self.pool.retain(block), held);
                *self.loose.entry(block).or_default() += u32::from(held);
            }
            Op::Release(id) => {
                let block = self.ids[id % self.ids.len()];
                let loose = self.loose.entry(block).or_default();
                // Tables keep theirs.
                if *loose > 0 {
                    *loose -= 1;
                    prop_assert!(self.pool.release(block));
                } else if self.holders(block) == 0 {
                    prop_assert!(!self.pool.release(block));
                }
            }
            Op::Create => {
                self.tables.push(BlockTable::default());
                self.tokens.push(Vec::new());
            }
            _ if self.tables.is_empty() => {}
            Op::Grow(table, count) => self.grow(table % self.tables.len(), count)?,
            Op::Fork(table) => {
                let table = table % self.tables.len();
                let fork = self.tables[table].fork(&mut self.pool);
                self.tables.push(fork);
                self.tokens.push(self.tokens[table].clone());
            }
            Op::ForkAt(table, len) => {
                let table = table % self.tables.len();
                let fork = self.tables[table].fork_at(len, self.block_size, &mut self.pool);
                self.tables.push(fork);
                let tokens = &self.tokens[table];
                self.tokens.push(tokens[..tokens.len().min(len as usize)].to_vec());
            }
            Op::Truncate(table, len) => {
                let table = table % self.tables.len();
                self.tables[table].truncate(len, self.block_size, &mut self.pool);
                self.tokens[table].truncate(len as usize);
            }
        }
        Ok(())
    }

    /// What the cache does: allocate, copy a shared last block, write.
    fn grow(&mut self, table: usize, count: u32) -> Result<(), TestCaseError> {
        let block_size = self.block_size;
        let last = self.tables[table].partial_block(block_size);
        let shared = last.is_some_and(|block| self.pool.ref_count(block) > 1);
        let growth = self.tables[table].growth(count, block_size, shared);
        let len = self.tables[table].len() + count;
        let blocks_after = len.div_ceil(block_size) as usize;
        prop_assert_eq!(self.tables[table].blocks().len() + growth.new_blocks as usize, blocks_after);
        let Some(mut taken) = self.pool.allocate(growth.blocks()) else {
            return Ok(());
        };
        let replacement = if growth.copy_last { taken.pop() } else { None };
        let replaced = self.tables[table].grow(replacement, &taken, len);
        prop_assert_eq!(replaced, last.filter(|_| growth.copy_last));
        if let (Some(from), Some(to)) = (replaced, replacement) {
            for offset in 0..block_size {
                if let Some(&token) = self.memory.get(&(from, offset)) {
                    self.memory.insert((to, offset), token);
                }
            }
            self.pool.release(from);
        }
        for position in len - count..len {
            let block = self.tables[table].blocks()[(position / block_size) as usize];
            self.memory.insert((block, position % block_size), self.next_token);
            self.tokens[table].push(self.next_token);
            self.next_token += 1;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        for &id in &self.ids {
            prop_assert_eq!(self.pool.ref_count(id), self.holders(id), "holders of {:?}", id);
            prop_assert_eq!(self.pool.num_holders(id), self.holders(id), "holders of {:?}", id);
        }
        prop_assert_eq!(self.pool.num_free(), self.free());
        let shared = self.ids.iter().filter(|&&id| self.holders(id) > 1).count();
        prop_assert_eq!(self.pool.num_shared(), shared as u32);
        for (table, tokens) in self.tables.iter().zip(&self.tokens) {
            prop_assert_eq!(table.len() as usize, tokens.len());
            prop_assert_eq!(table.is_empty(), tokens.is_empty());
            prop_assert_eq!(table.blocks().len() as u32, table.len().div_ceil(self.block_size));
            let read = (0..table.len()).map(|position| {
                let block = table.blocks()[(position / self.block_size) as usize];
                self.memory.get(&(block, position % self.block_size)).copied()
            });
            prop_assert!(read.eq(tokens.iter().copied().map(Some)), "a table reads other tokens than were written");
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn pool_and_tables_agree_with_the_model(num_blocks in 1..20_u32, block_size in 1..7_u32, ops in ops()) {
        let mut world = World::new(num_blocks, block_size);
        for op in &ops {
            world.apply(op)?;
            world.check()?;
        }
        // Whatever happened, giving everything back leaves a pool that is all free.
        for table in &mut world.tables {
            table.truncate(0, block_size, &mut world.pool);
        }
        for (block, count) in std::mem::take(&mut world.loose) {
            for _ in 0..count {
                prop_assert!(world.pool.release(block));
            }
        }
        world.tokens.iter_mut().for_each(Vec::clear);
        world.check()?;
        prop_assert_eq!(world.pool.num_free(), num_blocks);
    }
}

//! What swaps and defragmentations do to sequences and blocks.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::manager::Manager;
use super::table::BlockTable;
use crate::error::{Error, Holder, Result};
use crate::ids::{BlockId, SequenceId};

impl Manager {
    /// Nobody else may change the sequence until [`Manager::thaw`].
    pub(crate) fn freeze(&mut self, id: SequenceId, holder: Holder) -> Result<()> {
        self.check_idle(id)?;
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.held_by = Some(holder);
        }
        Ok(())
    }

    /// Ends what [`Manager::freeze`] began in an epoch, unless somebody else holds the sequence by now.
    pub(crate) fn thaw(&mut self, epoch: u64, id: SequenceId, holder: Holder) {
        if epoch == self.epoch()
            && let Some(sequence) = self.sequences.get_mut(&id)
            && sequence.held_by == Some(holder)
        {
            sequence.held_by = None;
        }
    }

    /// Ends a sequence that is frozen for a swap-out.
    pub(crate) fn finish_swap_out(&mut self, epoch: u64, id: SequenceId) -> Result<()> {
        self.check_epoch(epoch, "swap-out")?;
        self.thaw(epoch, id, Holder::SwapOut);
        self.free(id)
    }

    /// Takes blocks for a sequence that comes in.
    pub(crate) fn begin_swap_in(&mut self, count: u32) -> Result<Vec<BlockId>> {
        let blocks = self.take_blocks(count.into())?;
        self.open_moves += 1;
        Ok(blocks)
    }

    /// `blocks` are those of the sequence's places in order, group after group, but for `hidden` ones of each group, which it had given back.
    pub(crate) fn commit_swap_in(
        &mut self,
        epoch: u64,
        blocks: &[BlockId],
        len: u32,
        hidden: &[Range<u32>],
    ) -> Result<SequenceId> {
        self.check_epoch(epoch, "swap-in")?;
        self.open_moves -= 1;
        Ok(self.insert(tables_of(blocks, len, hidden, self.config().block_size)))
    }

    /// [`Manager::commit_swap_in`] under the id that the sequence had before it was swapped out.
    pub(crate) fn restore_swap_in(
        &mut self,
        epoch: u64,
        blocks: &[BlockId],
        len: u32,
        hidden: &[Range<u32>],
        origin: Option<SequenceId>,
    ) -> Result<SequenceId> {
        self.check_epoch(epoch, "swap-in")?;
        const NEED: &str = "one that this cache swapped out, and that is not in it";
        let refused = |got: String| Error::argument("snapshot", got, NEED);
        let id = origin.ok_or_else(|| refused("one that was not swapped out".to_owned()))?;
        if !id.is_before(self.next_id) {
            return Err(refused(format!("{id} of another cache")));
        }
        if self.sequences.contains_key(&id) {
            return Err(refused(format!("{id}, which has come back already")));
        }
        self.open_moves -= 1;
        self.insert_as(id, tables_of(blocks, len, hidden, self.config().block_size));
        Ok(id)
    }

    pub(crate) fn roll_back_swap_in(&mut self, epoch: u64, blocks: &[BlockId]) {
        if epoch == self.epoch() {
            self.open_moves -= 1;
            // In reverse, so that the next one takes the same blocks in the same order.
            for &block in blocks.iter().rev() {
                self.pool.release(block);
            }
            self.settle();
        }
    }
}

/// A table for each group.
fn tables_of(mut blocks: &[BlockId], len: u32, hidden: &[Range<u32>], block_size: u32) -> Vec<BlockTable> {
    let num_places = len.div_ceil(block_size.max(1));
    let table = |hidden: &Range<u32>| {
        // Sink tokens may be more than there are tokens: then nothing is hidden.
        let hidden = hidden.start.min(num_places)..hidden.end.min(num_places);
        let (own, rest) = blocks.split_at((num_places as usize - hidden.len()).min(blocks.len()));
        blocks = rest;
        let (front, back) = own.split_at((hidden.start as usize).min(own.len()));
        let nulls = std::iter::repeat_n(BlockId::NULL, hidden.len());
        BlockTable::of(front.iter().copied().chain(nulls).chain(back.iter().copied()).collect(), len)
    };
    hidden.iter().map(table).collect()
}

/// What an open defragmentation has reserved.
#[derive(Debug)]
pub(crate) struct Moves {
    /// Blocks that move: from, to.
    pub(crate) blocks: Vec<(BlockId, BlockId)>,
    /// Frozen sequences.
    pub(crate) sequences: Vec<SequenceId>,
}

impl Manager {
    /// The fewest moves that put all used blocks at the front of the pool. Reserves the blocks of both ends and all sequences.
    pub(crate) fn begin_defragment(&mut self) -> Result<Moves> {
        let mut ids: Vec<_> = self.sequences.keys().copied().collect();
        ids.sort_unstable();
        for &id in &ids {
            self.check_idle(id)?;
        }
        if self.open_moves > 0 {
            let got = format!("{} open swap-ins or defragmentations", self.open_moves);
            return Err(Error::argument("defragment", got, "them committed or dropped first"));
        }
        let used = self.pool.num_blocks() - self.pool.num_free();
        // The sequences' blocks in the order of their tokens, then those that only an index holds.
        let tables = ids.iter().flat_map(|id| &self.sequences[id].tables).flat_map(BlockTable::blocks);
        let all = (used..self.pool.num_blocks()).map(BlockId);
        let mut seen = HashSet::new();
        let from: Vec<_> = tables
            .copied()
            .chain(all)
            .filter(|&block| block.index() >= used && self.pool.ref_count(block) > 0 && seen.insert(block))
            .collect();
        let to: Vec<_> = (0..used).map(BlockId).filter(|&block| self.pool.ref_count(block) == 0).collect();
        debug_assert_eq!(from.len(), to.len(), "as many used blocks behind the front as free ones in it");
        self.pool.take(&to);
        for &block in &from {
            // Nobody may give it to somebody else before the copy is in use.
            self.pool.retain(block);
        }
        self.settle();
        for &id in &ids {
            self.freeze(id, Holder::Defragmentation)?;
        }
        self.open_moves += 1;
        Ok(Moves { blocks: from.into_iter().zip(to).collect(), sequences: ids })
    }

    pub(crate) fn commit_defragment(&mut self, epoch: u64, moves: &Moves) -> Result<()> {
        self.check_epoch(epoch, "defragmentation")?;
        self.apply_moves(&moves.blocks);
        self.end_defragment(moves);
        Ok(())
    }

    pub(crate) fn roll_back_defragment(&mut self, epoch: u64, moves: &Moves) {
        if epoch == self.epoch() {
            for &(from, to) in moves.blocks.iter().rev() {
                self.pool.release(from);
                self.pool.release(to);
            }
            self.settle();
            self.end_defragment(moves);
        }
    }

    fn end_defragment(&mut self, moves: &Moves) {
        self.open_moves -= 1;
        for &id in &moves.sequences {
            self.thaw(self.epoch(), id, Holder::Defragmentation);
        }
    }

    /// Everything that holds the block `from` holds `to` from now on. Both are reserved by the caller, who is no holder any more then.
    pub(super) fn apply_moves(&mut self, moves: &[(BlockId, BlockId)]) {
        let targets: HashMap<_, _> = moves.iter().copied().collect();
        let target = |block| targets.get(&block).copied().unwrap_or(block);
        for sequence in self.sequences.values_mut() {
            sequence.tables.iter_mut().for_each(|table| table.rename(target));
        }
        for &(from, to) in moves {
            self.prefixes.rename(from, to);
            self.pool.hand_over(from, to);
        }
        self.settle();
        // New blocks are taken from the front, too.
        self.pool.sort_free();
    }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;
    use crate::format::KvFormat;
    use crate::layout::KvCacheConfig;
    use crate::sequence::Reservation;

    const BLOCK_SIZE: u32 = 3;
    const NUM_BLOCKS: u32 = 18;

    /// The manager over a memory of one word per slot, beside plain vectors.
    struct World {
        manager: Manager,
        memory: Vec<u32>,
        model: Vec<(SequenceId, Vec<u32>)>,
        swapped: Vec<Vec<u32>>,
        open: Option<Moves>,
    }

    impl World {
        fn copy(&mut self, from: u32, to: u32) {
            let size = BLOCK_SIZE as usize;
            let from = from as usize * size;
            self.memory.copy_within(from..from + size, to as usize * size);
        }

        fn slots(blocks: &[BlockId], len: u32) -> impl Iterator<Item = usize> {
            (0..len).map(|i| (blocks[(i / BLOCK_SIZE) as usize].index() * BLOCK_SIZE + i % BLOCK_SIZE) as usize)
        }

        /// Every sequence holds its tokens, and every block has as many holders as there are.
        fn check(&self) {
            let mut holders = vec![0; NUM_BLOCKS as usize];
            for (id, tokens) in &self.model {
                let table = self.manager.table(*id).expect("known");
                assert_eq!(table.len() as usize, tokens.len());
                let found: Vec<_> = Self::slots(table.blocks(), table.len()).map(|slot| self.memory[slot]).collect();
                assert_eq!(&found, tokens, "{id}");
                table.blocks().iter().for_each(|block| holders[block.index() as usize] += 1);
            }
            for (from, to) in self.open.iter().flat_map(|moves| &moves.blocks) {
                holders[from.index() as usize] += 1;
                holders[to.index() as usize] += 1;
            }
            let found: Vec<_> = (0..NUM_BLOCKS).map(|block| self.manager.pool.ref_count(BlockId(block))).collect();
            assert_eq!(found, holders);
            assert_eq!(self.manager.pool.num_free() as usize, holders.iter().filter(|&&count| count == 0).count());
        }

        fn grow(&mut self, rng: &mut Rng) {
            let Some(i) = rng.choice(0..self.model.len()) else { return };
            let id = self.model[i].0;
            let frozen = self.open.as_ref().is_some_and(|moves| moves.sequences.contains(&id));
            let count = rng.u32(1..8);
            match self.manager.reserve(&[(id, count)]) {
                Ok(reservation) => {
                    assert!(!frozen);
                    let [group] = &reservation.groups[..] else { unreachable!("one group of layers") };
                    group.copies.iter().for_each(|&[from, to]| self.copy(from, to));
                    let tokens: Vec<_> = group.slots.iter().map(|_| rng.u32(..)).collect();
                    for (&slot, &token) in group.slots.iter().zip(&tokens) {
                        self.memory[slot as usize] = token;
                    }
                    if rng.bool() {
                        self.manager.commit(reservation.pending);
                        self.model[i].1.extend(tokens);
                    } else {
                        self.manager.roll_back(reservation.pending);
                    }
                }
                Err(Error::SequenceBusy { sequence, .. }) => assert!(frozen && sequence == id),
                Err(error) => assert!(matches!(error, Error::OutOfBlocks { .. }), "{error}"),
            }
        }

        fn swap_in(&mut self, rng: &mut Rng) {
            let Some(tokens) = self.swapped.pop() else { return };
            let (len, epoch) = (tokens.len() as u32, self.manager.epoch());
            let Ok(blocks) = self.manager.begin_swap_in(len.div_ceil(BLOCK_SIZE)) else {
                return self.swapped.push(tokens);
            };
            for (slot, &token) in Self::slots(&blocks, len).zip(&tokens) {
                self.memory[slot] = token;
            }
            if self.open.is_none() {
                assert!(matches!(self.manager.begin_defragment(), Err(Error::Argument { .. })));
            }
            if rng.bool() {
                self.manager.roll_back_swap_in(epoch, &blocks);
                self.swapped.push(tokens);
            } else {
                let id = self.manager.commit_swap_in(epoch, &blocks, len, &[Range::default()]).expect("same epoch");
                self.model.push((id, tokens));
            }
        }

        fn step(&mut self, rng: &mut Rng) {
            let epoch = self.manager.epoch();
            let some = rng.choice(0..self.model.len());
            match (rng.u32(0..10), some) {
                (0, _) => self.model.push((self.manager.create(), Vec::new())),
                (1..=3, _) => self.grow(rng),
                (4, Some(i)) => {
                    if let Ok(fork) = self.manager.fork(self.model[i].0) {
                        let mut tokens = self.model[i].1.clone();
                        tokens.truncate(rng.usize(0..=tokens.len()));
                        self.manager.truncate(fork, tokens.len() as u32).expect("shorter");
                        self.model.push((fork, tokens));
                    }
                }
                (5, Some(i)) if self.manager.free(self.model[i].0).is_ok() => drop(self.model.swap_remove(i)),
                (6, Some(i)) if self.manager.freeze(self.model[i].0, Holder::SwapOut).is_ok() => {
                    let id = self.model[i].0;
                    assert!(matches!(self.manager.begin_defragment(), Err(Error::SequenceBusy { .. })));
                    if rng.bool() {
                        self.manager.finish_swap_out(epoch, id).expect("same epoch");
                        self.swapped.push(self.model.swap_remove(i).1);
                    } else {
                        self.manager.thaw(epoch, id, Holder::SwapOut);
                    }
                }
                (7, _) => self.swap_in(rng),
                (8, _) if self.open.is_none() => {
                    let moves = self.manager.begin_defragment().expect("nothing is open");
                    moves.blocks.iter().for_each(|(from, to)| self.copy(from.index(), to.index()));
                    self.open = Some(moves);
                }
                (9, _) => {
                    if let Some(moves) = self.open.take() {
                        if rng.bool() {
                            self.manager.commit_defragment(epoch, &moves).expect("same epoch");
                        } else {
                            self.manager.roll_back_defragment(epoch, &moves);
                        }
                    }
                }
                _ => {}
            }
        }
    }

    fn manager() -> Manager {
        let config =
            KvCacheConfig::new(1, 1, 8).with_blocks(NUM_BLOCKS, BLOCK_SIZE).with_formats(KvFormat::F32, KvFormat::F32);
        Manager::new(config).expect("a valid configuration")
    }

    #[test]
    fn a_swapped_sequence_comes_back_under_its_id_once() {
        let mut m = manager();
        let (id, other) = (m.create(), m.create());
        let Reservation { pending, .. } = m.reserve(&[(id, 7)]).expect("room");
        m.commit(pending);
        let refused = |m: &mut Manager, origin: Option<SequenceId>, got: &str| {
            let (before, blocks) = (m.usage(), m.begin_swap_in(3).expect("room"));
            let error =
                m.restore_swap_in(m.epoch(), &blocks, 7, &[Range::default()], origin).expect_err(got).to_string();
            assert!(error.contains(got), "{error}");
            m.roll_back_swap_in(m.epoch(), &blocks);
            assert_eq!(m.usage(), before);
        };
        refused(&mut m, Some(id), "which has come back already");
        m.freeze(id, Holder::SwapOut).expect("idle");
        m.finish_swap_out(0, id).expect("frozen");
        refused(&mut m, None, "was not swapped out");
        refused(&mut m, Some(manager().create()), "of another cache");
        let unborn = m.next_id;
        refused(&mut m, Some(unborn), "of another cache");
        let blocks = m.begin_swap_in(3).expect("room");
        assert_eq!(m.restore_swap_in(0, &blocks, 7, &[Range::default()], Some(id)).expect("gone"), id);
        assert_eq!((m.table(id).expect("back").len(), m.usage().used), (7, 3));
        refused(&mut m, Some(id), "which has come back already");
        // Ids go on behind it, and nothing is open.
        assert!(m.create() > other);
        let moves = m.begin_defragment().expect("nothing is open");
        m.roll_back_defragment(0, &moves);
        let blocks = m.begin_swap_in(3).expect("room");
        m.clear();
        assert!(matches!(m.restore_swap_in(0, &blocks, 7, &[Range::default()], Some(id)), Err(Error::Stale { .. })));
    }

    #[test]
    fn moves_keep_tokens_and_holders() {
        let config =
            KvCacheConfig::new(1, 1, 8).with_blocks(NUM_BLOCKS, BLOCK_SIZE).with_formats(KvFormat::F32, KvFormat::F32);
        for seed in 0..2000 {
            let mut rng = Rng::with_seed(seed);
            let mut world = World {
                manager: Manager::new(config).expect("a valid configuration"),
                memory: vec![u32::MAX; (NUM_BLOCKS * BLOCK_SIZE) as usize],
                model: Vec::new(),
                swapped: Vec::new(),
                open: None,
            };
            for _ in 0..80 {
                world.step(&mut rng);
                world.check();
            }
            if let Some(moves) = world.open.take() {
                world.manager.roll_back_defragment(0, &moves);
            }
            let moves = world.manager.begin_defragment().expect("nothing is open");
            moves.blocks.iter().for_each(|(from, to)| world.copy(from.index(), to.index()));
            world.manager.commit_defragment(0, &moves).expect("same epoch");
            world.check();
            let used = world.manager.usage().used;
            assert!((0..NUM_BLOCKS).all(|block| (world.manager.pool.ref_count(BlockId(block)) > 0) == (block < used)));
        }
    }

    /// A swap-out of an earlier epoch, or one that has ended, lets nobody go whom somebody else holds by now.
    #[test]
    fn a_stale_swap_out_lets_no_sequence_go() {
        let mut manager = Manager::new(KvCacheConfig::new(1, 1, 8).with_blocks(NUM_BLOCKS, BLOCK_SIZE)).expect("valid");
        let id = manager.create();
        let old_epoch = manager.epoch();
        manager.freeze(id, Holder::SwapOut).expect("idle");
        manager.clear();
        let blocks = manager.begin_swap_in(2).expect("room");
        manager.restore_swap_in(manager.epoch(), &blocks, 5, &[Range::default()], Some(id)).expect("it left");
        let step = manager.reserve(&[(id, 1)]).expect("room");
        manager.thaw(old_epoch, id, Holder::SwapOut);
        assert!(matches!(manager.reserve(&[(id, 1)]), Err(Error::SequenceBusy { holder: Holder::Step, .. })));
        manager.thaw(manager.epoch(), id, Holder::SwapOut);
        assert!(matches!(manager.free(id), Err(Error::SequenceBusy { holder: Holder::Step, .. })));
        assert!(manager.commit(step.pending));
        let void = manager.reserve(&[(id, 1)]).expect("room");
        manager.clear();
        assert!(!manager.commit(void.pending), "nothing was committed");
    }
}

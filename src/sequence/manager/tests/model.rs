//! Random operations on a manager, against plain vectors and a naive index. The pool's memory is simulated: what a reservation
//! says is written is written there, and what a sequence's table leads to is what the sequence holds.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

use super::super::super::prefix::tests::Key;
use super::ops::{Bad, Fate, Op, SALTS, op};
use super::window::Window;
use super::*;

/// All that a failed call must leave alone.
#[derive(Debug, PartialEq)]
pub(super) struct State {
    sequences: BTreeMap<SequenceId, (Vec<BlockTable>, bool)>,
    /// References, and the index's among them apart.
    counts: Vec<(u32, u32)>,
    free: Vec<BlockId>,
    index: BTreeMap<Key, Vec<(BlockId, Option<u64>)>>,
    stats: PrefixStats,
    next_id: SequenceId,
    epoch: u64,
}

impl State {
    pub(super) fn of(m: &Manager) -> Self {
        let blocks = (0..m.pool.num_blocks()).map(BlockId);
        Self {
            sequences: m.sequences.iter().map(|(&id, s)| (id, (s.tables.clone(), s.held_by.is_some()))).collect(),
            counts: blocks.map(|block| (m.pool.ref_count(block), m.pool.num_holders(block))).collect(),
            free: m.pool.free_blocks().to_vec(),
            index: m.prefixes.snapshot(),
            stats: m.prefix_stats(),
            next_id: m.next_id,
            epoch: m.epoch,
        }
    }
}

/// What the layers of each group hold for a token. A row of K or V depends on all tokens before it, and so does this. Groups differ where blocks of an
/// index are of sequences that were published with other tokens than they have.
type Value = [u64; 3];

fn value(before: Option<&(u32, Value)>, token: u32) -> Value {
    // FNV-1a, a word at a time.
    let before = before.map_or([0xcbf2_9ce4_8422_2325; 3], |b| b.1);
    before.map(|before| (before ^ u64::from(token + 1)).wrapping_mul(0x0100_0000_01b3))
}

/// Tokens, and what the cache holds for them.
type Tokens = Vec<(u32, Value)>;

struct Open {
    pending: Pending,
    new: Vec<(SequenceId, Tokens)>,
    blocks: Vec<BlockId>,
}

/// An entry of the naive index.
#[derive(Clone, Debug)]
struct Entry {
    /// Of each group of layers: the block, and the operation since which nobody but the index holds it.
    blocks: Vec<(BlockId, Option<u32>)>,
    values: Vec<Value>,
}

/// Places in the tables of each group.
type Places = Vec<BTreeSet<u32>>;

struct World {
    m: Manager,
    block_size: u32,
    /// With the group whose layers have written it.
    memory: HashMap<(BlockId, u32), (usize, u64)>,
    sequences: Vec<(SequenceId, Tokens)>,
    /// What attention of each group sees, and which blocks of each sequence have left that.
    windows: Vec<Window>,
    lost: BTreeMap<SequenceId, Places>,
    open: Vec<Open>,
    loose: Vec<BlockId>,
    /// What the host has of sequences that were swapped out.
    swapped: Vec<Tokens>,
    index: BTreeMap<Key, Entry>,
    /// lookups, queried, hit, evicted
    stats: [u64; 4],
    /// What has happened: hits, evictions, evictions of entries in use, reservations without room, forks in the
    /// middle of a block, sequences swapped in, blocks that moved and were only the index's, blocks that left a window, ways back that were
    /// not there any more, hits of which not all blocks are needed, hits that are shorter than what is known, blocks that were missing in the index.
    seen: [u64; 12],
    time: u32,
}

impl World {
    fn new(block_size: u32, num_blocks: u32, windows: &[Option<(u32, u32)>], collide: bool) -> Self {
        let windows: Vec<_> = windows.iter().map(|&seen| Window { block_size, seen }).collect();
        let mut m = Manager::new(Window::config_of(&windows, num_blocks)).unwrap();
        if collide {
            m.prefixes = m.prefixes.colliding();
        }
        Self {
            m,
            block_size,
            memory: HashMap::new(),
            sequences: Vec::new(),
            windows,
            lost: BTreeMap::new(),
            open: Vec::new(),
            loose: Vec::new(),
            swapped: Vec::new(),
            index: BTreeMap::new(),
            stats: [0; 4],
            seen: [0; 12],
            time: 0,
        }
    }

    fn pick(&self, index: &Index) -> Option<usize> {
        (!self.sequences.is_empty()).then(|| index.index(self.sequences.len()))
    }

    fn is_open(&self, sequence: SequenceId) -> bool {
        self.open.iter().any(|open| open.new.iter().any(|(s, _)| *s == sequence))
    }

    /// A call that is refused if and only if the sequence is in an open step.
    fn idle<T>(&mut self, sequence: SequenceId, call: impl FnOnce(&mut Manager) -> Result<T>) -> Option<T> {
        let before = self.is_open(sequence).then(|| State::of(&self.m));
        match (call(&mut self.m), before) {
            (Ok(value), None) => Some(value),
            (Err(Error::SequenceBusy { sequence: s, .. }), Some(before)) if s == sequence => {
                assert_eq!(State::of(&self.m), before);
                None
            }
            (Ok(_), Some(_)) => panic!("{sequence} is in an open step"),
            (Err(error), _) => panic!("{error}"),
        }
    }

    /// The blocks that a sequence has lost.
    fn lost(&self, id: SequenceId) -> Places {
        self.lost.get(&id).cloned().unwrap_or_else(|| vec![BTreeSet::new(); self.windows.len()])
    }

    /// What no token from this length on sees.
    fn hidden(&self, len: u32) -> Places {
        self.windows.iter().map(|window| window.hidden(len).collect()).collect()
    }

    /// Whether the sequence can be cut back to, or forked at, `len` tokens. If it can't the calls say so.
    fn reaches_back(&mut self, id: SequenceId, len: u32) -> bool {
        let lost = self.lost(id);
        let mut groups = self.windows.iter().zip(&lost);
        let reaches = groups.all(|(window, lost)| window.needed(len).all(|block| !lost.contains(&block)));
        assert_eq!(self.m.reaches_back(id, len).unwrap(), reaches);
        if !reaches && !self.is_open(id) {
            self.m.refused(|m| m.truncate(id, len), ErrorKind::Caller, "has left the window");
            self.m.refused(|m| m.fork_at(id, len), ErrorKind::Caller, "has left the window");
            self.seen[8] += 1;
        }
        reaches
    }

    /// Notes what `id` of so many tokens has lost.
    fn set_lost(&mut self, id: SequenceId, len: usize, mut lost: Places) {
        lost.iter_mut().for_each(|lost| lost.retain(|&block| block < (len as u32).div_ceil(self.block_size)));
        self.lost.insert(id, lost);
    }

    /// Sequences lose what no token from their lengths on sees. Returns the blocks that are free then, and those that are reclaimable.
    fn leaving(&self, ids: &[SequenceId]) -> (BTreeSet<BlockId>, BTreeSet<BlockId>) {
        let mut leaving: BTreeMap<BlockId, u32> = BTreeMap::new();
        for &id in ids {
            let (tables, lost) = (self.m.tables(id).unwrap(), self.lost(id));
            for ((table, hidden), lost) in tables.iter().zip(self.hidden(tables[0].len())).zip(lost) {
                for block in hidden.difference(&lost) {
                    *leaving.entry(table.blocks()[*block as usize]).or_default() += 1;
                }
            }
        }
        let is_gone = |(block, count): (BlockId, u32)| (self.m.pool.num_holders(block) == count).then_some(block);
        let gone = leaving.into_iter().filter_map(is_gone);
        gone.partition(|&block| self.m.pool.ref_count(block) == self.m.pool.num_holders(block))
    }

    /// What [`Self::leaving`] tells has happened.
    fn leave(&mut self, ids: &[SequenceId], reclaimable: &BTreeSet<BlockId>) {
        for &id in ids {
            let len = self.sequences.iter().find(|(s, _)| *s == id).unwrap().1.len();
            let mut lost = self.lost(id);
            for (lost, hidden) in lost.iter_mut().zip(self.hidden(len as u32)) {
                let before = lost.len();
                lost.extend(hidden);
                self.seen[7] += (lost.len() - before) as u64;
            }
            self.set_lost(id, len, lost);
        }
        let held = self.index.values_mut().flat_map(|entry| &mut entry.blocks);
        for (_, unused_since) in held.filter(|(block, _)| reclaimable.contains(block)) {
            unused_since.get_or_insert(self.time);
        }
    }

    fn apply(&mut self, op: &Op) {
        self.time += 1;
        match op {
            Op::Create => {
                let id = self.m.create();
                self.sequences.push((id, Vec::new()));
            }
            Op::Prompt(count, bits) => {
                let id = self.m.create();
                self.sequences.push((id, Vec::new()));
                self.step(vec![(self.sequences.len() - 1, *count, *bits)], Fate::Commit);
                self.publish(self.sequences.len() - 1, *count as usize, 0, false);
            }
            Op::Step(batch, fate) => {
                let batch = batch.iter().filter_map(|(s, count, bits)| Some((self.pick(s)?, *count, *bits)));
                self.step(batch.collect(), *fate);
            }
            Op::End(step, commit) => {
                if !self.open.is_empty() {
                    let open = self.open.remove(step.index(self.open.len()));
                    self.end(open, *commit);
                }
            }
            Op::Fork(s) => {
                let Some(i) = self.pick(s) else { return };
                let (id, tokens) = self.sequences[i].clone();
                if let Some(fork) = self.idle(id, |m| m.fork(id)) {
                    self.set_lost(fork, tokens.len(), self.lost(id));
                    self.sequences.push((fork, tokens));
                }
            }
            Op::ForkAt(s, len) => {
                let Some(i) = self.pick(s) else { return };
                let (id, mut tokens) = self.sequences[i].clone();
                tokens.truncate(len.index(tokens.len() + 1));
                if !self.reaches_back(id, tokens.len() as u32) {
                    return;
                }
                if let Some(fork) = self.idle(id, |m| m.fork_at(id, tokens.len() as u32)) {
                    self.seen[4] += u64::from(!tokens.len().is_multiple_of(self.block_size as usize));
                    self.set_lost(fork, tokens.len(), self.lost(id));
                    self.sequences.push((fork, tokens));
                }
            }
            Op::Truncate(s, len) => {
                let Some(i) = self.pick(s) else { return };
                let (id, len) = (self.sequences[i].0, len.index(self.sequences[i].1.len() + 1));
                if self.reaches_back(id, len as u32) && self.idle(id, |m| m.truncate(id, len as u32)).is_some() {
                    self.sequences[i].1.truncate(len);
                    self.set_lost(id, len, self.lost(id));
                }
            }
            Op::Free(s) => {
                let Some(i) = self.pick(s) else { return };
                let id = self.sequences[i].0;
                if self.idle(id, |m| m.free(id)).is_some() {
                    self.sequences.swap_remove(i);
                }
            }
            Op::Release(s) => {
                let Some(i) = self.pick(s) else { return };
                let id = self.sequences[i].0;
                let (free, reclaimable) = self.leaving(&[id]);
                let before = self.m.usage();
                if self.idle(id, |m| m.release_hidden(id)).is_some() {
                    self.leave(&[id], &reclaimable);
                    let after = self.m.usage();
                    let gained = [after.free - before.free, after.reclaimable - before.reclaimable];
                    assert_eq!(gained, [free.len() as u32, reclaimable.len() as u32]);
                }
            }
            Op::Publish { sequence, len, salt, lie } => {
                let Some(i) = self.pick(sequence) else { return };
                self.publish(i, len.index(self.sequences[i].1.len() + 1), *salt, *lie);
            }
            Op::Match { like, len, more, salt } => self.match_prefix(like, len, more, *salt),
            Op::Forget(salt) => {
                let mine = self.index.keys().filter(|key| key.0 == *salt).count() as u32;
                self.index.retain(|key, _| key.0 != *salt);
                if mine == 0 {
                    self.m.refused(|m| m.forget_prefixes(*salt), ErrorKind::Caller, "unknown salt");
                } else {
                    assert_eq!(self.m.forget_prefixes(*salt).unwrap(), mine);
                }
            }
            Op::Take(count) => {
                if let Some(taken) = self.take(*count, Default::default(), |m| m.take_blocks((*count).into())) {
                    assert_eq!(taken.len() as u32, *count);
                    self.loose.extend(taken);
                }
            }
            Op::GiveBack(block) => {
                if !self.loose.is_empty() {
                    let block = self.loose.swap_remove(block.index(self.loose.len()));
                    assert!(self.m.pool.release(block));
                    self.m.settle();
                }
            }
            Op::SwapOut(s, finish) => {
                let Some(i) = self.pick(s) else { return };
                let id = self.sequences[i].0;
                if self.idle(id, |m| m.freeze(id, Holder::SwapOut)).is_none() {
                    return;
                }
                self.m.refused(|m| m.truncate(id, 0), ErrorKind::Caller, "swap-out");
                if *finish {
                    self.m.finish_swap_out(self.m.epoch(), id).unwrap();
                    self.swapped.push(self.sequences.swap_remove(i).1);
                } else {
                    self.m.thaw(self.m.epoch(), id, Holder::SwapOut);
                }
            }
            Op::SwapIn(commit) => self.swap_in(*commit),
            Op::Defragment(commit) => self.defragment(*commit),
            Op::Bad(s, bad) => self.bad(s, *bad),
            Op::Clear => {
                self.m.clear();
                self.sequences.clear();
                self.lost.clear();
                self.index.clear();
                self.loose.clear();
                self.memory.clear();
                self.stats = [0; 4];
                // What is left of open steps gives nothing back; see `end`.
                for open in std::mem::take(&mut self.open) {
                    let before = State::of(&self.m);
                    self.end(open, false);
                    assert_eq!(State::of(&self.m), before);
                }
            }
        }
    }

    fn swap_in(&mut self, commit: bool) {
        let Some(tokens) = self.swapped.pop() else { return };
        let (len, epoch) = (tokens.len() as u32, self.m.epoch());
        let hidden: Vec<_> = self.m.config.retentions().map(|retention| retention.hidden_blocks(len)).collect();
        let all = 0..len.div_ceil(self.block_size);
        let places = hidden.iter().enumerate();
        let places =
            places.flat_map(|(group, hidden)| all.clone().filter(|at| !hidden.contains(at)).map(move |at| (group, at)));
        let places: Vec<_> = places.collect();
        let count = places.len() as u32;
        assert_eq!(count, self.m.config.held_blocks(len));
        let taken = self.take(count, Default::default(), |m| m.begin_swap_in(count));
        let Some(blocks) = taken else { return self.swapped.push(tokens) };
        for (i, &(_, value)) in (0..).zip(&tokens) {
            for (&(group, _), &block) in places.iter().zip(&blocks).filter(|((_, at), _)| *at == i / self.block_size) {
                self.memory.insert((block, i % self.block_size), (group, value[group]));
            }
        }
        if self.open.is_empty() {
            self.m.refused(Manager::begin_defragment, ErrorKind::Caller, "open swap-ins");
        }
        if commit {
            let id = self.m.commit_swap_in(epoch, &blocks, len, &hidden).unwrap();
            self.set_lost(id, tokens.len(), self.hidden(len));
            self.sequences.push((id, tokens));
            self.seen[5] += 1;
        } else {
            self.m.roll_back_swap_in(epoch, &blocks);
            self.swapped.push(tokens);
        }
    }

    fn defragment(&mut self, commit: bool) {
        if self.open.iter().any(|open| !open.new.is_empty()) {
            return self.m.refused(Manager::begin_defragment, ErrorKind::Caller, "open step");
        }
        if !self.loose.is_empty() {
            // Blocks outside of tables are those of open moves, which bar this; these it would move away from us.
            return;
        }
        let moves = self.m.begin_defragment().unwrap();
        for &(from, to) in &moves.blocks {
            for offset in 0..self.block_size {
                let value = self.memory.get(&(from, offset)).copied();
                value.map(|value| self.memory.insert((to, offset), value));
            }
        }
        for (block, unused_since) in self.index.values_mut().flat_map(|entry| &mut entry.blocks) {
            let Some(&(_, to)) = moves.blocks.iter().find(|(from, _)| from == block) else { continue };
            // The move held the block: it is unused since now.
            self.seen[6] += u64::from(unused_since.take().is_some());
            if commit {
                *block = to;
            }
        }
        if !commit {
            return self.m.roll_back_defragment(self.m.epoch(), &moves);
        }
        self.m.commit_defragment(self.m.epoch(), &moves).unwrap();
        let used = self.m.usage().used;
        assert!((0..self.m.pool.num_blocks()).all(|b| (self.m.pool.ref_count(BlockId(b)) > 0) == (b < used)));
    }

    /// A call that takes between `min_blocks` and some more blocks from the pool, or none and fails. Checks what was evicted. Before it does, it
    /// gives up what `leaving` sequences don't see any more.
    fn take<T: std::fmt::Debug>(
        &mut self,
        min_blocks: u32,
        leaving: &[SequenceId],
        call: impl FnOnce(&mut Manager) -> Result<T>,
    ) -> Option<T> {
        let before = State::of(&self.m);
        let (free, reclaimable) = self.leaving(leaving);
        let mut usage = self.m.usage();
        usage.free += free.len() as u32;
        usage.reclaimable += reclaimable.len() as u32;
        let room = usage.free + usage.reclaimable;
        match call(&mut self.m) {
            Ok(taken) => {
                assert!(room >= min_blocks);
                self.leave(leaving, &reclaimable);
                let count = usage.free + self.count_evicted() - self.m.usage().free;
                self.evict(count, &usage);
                Some(taken)
            }
            Err(Error::OutOfBlocks { need, free, total }) => {
                assert_eq!((free, total), (room, usage.total));
                assert!(need >= min_blocks && need > free, "need {need} of {free}, at min_blocks {min_blocks}");
                assert_eq!(State::of(&self.m), before);
                self.seen[3] += 1;
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Blocks that were only the index's, and are not any more.
    fn count_evicted(&self) -> u32 {
        let kept: BTreeSet<_> = self.m.prefixes.snapshot().into_values().flatten().map(|held| held.0).collect();
        let held = self.index.values().flat_map(|entry| &entry.blocks);
        let unused: BTreeSet<_> = held.filter(|held| held.1.is_some()).map(|held| held.0).collect();
        unused.difference(&kept).count() as u32
    }

    /// Follows an eviction for `count` blocks in the naive index: nothing more than needed, and the right blocks.
    fn evict(&mut self, count: u32, before: &PoolUsage) {
        let (freed, need) = (self.count_evicted(), count.saturating_sub(before.free));
        // With the block of a group that needs all go those that the entry has of others.
        let most = if need > 0 { need + self.windows.len() as u32 - 1 } else { 0 };
        assert!((need..=most).contains(&freed), "evicted {freed} for {count} blocks, {before:?}");
        self.stats[3] += u64::from(freed);
        let kept = self.m.prefixes.snapshot();
        let old = std::mem::take(&mut self.index);
        let needs_all: Vec<_> = self.windows.iter().map(|window| window.seen.is_none()).collect();
        let (mut gone, mut leaves) = (Vec::new(), Vec::new());
        for (key, entry) in &old {
            let is_leaf = !old
                .keys()
                .any(|(salt, tokens)| *salt == key.0 && tokens.len() > key.1.len() && tokens.starts_with(&key.1));
            let kept = kept.get(key);
            let blocks = entry.blocks.iter().zip(&needs_all).enumerate();
            // Of an entry that goes with a group that needs all, nothing is said of the others.
            let whole: Vec<_> =
                entry.blocks.iter().zip(&needs_all).filter(|held| *held.1).map(|held| held.0.1).collect();
            if kept.is_none() && !whole.is_empty() {
                gone.push(whole.into_iter().flatten().min());
                continue;
            }
            for (group, (&(block, since), needs_all)) in blocks {
                if kept.is_none_or(|kept| kept[group].0 != block) {
                    gone.extend((!block.is_null()).then_some(since));
                } else if let (true, Some(since)) = (is_leaf || !needs_all, since) {
                    leaves.push(since);
                }
            }
        }
        // Unused leaves that were there all the time are not older than anything that went; entries in use go only when there
        // are no such leaves.
        if let (Some(&oldest), false) = (leaves.iter().min(), gone.is_empty()) {
            assert!(gone.iter().all(|since| since.is_some_and(|since| since <= oldest)), "{gone:?}, but not {oldest}");
        }
        self.seen[1] += u64::from(freed > 0);
        self.seen[2] += u64::from(gone.iter().any(Option::is_none));
        let rest = old.into_iter().filter_map(|(key, mut entry)| {
            for (held, kept) in entry.blocks.iter_mut().zip(kept.get(&key)?) {
                // What was evicted.
                if kept.0.is_null() {
                    *held = (BlockId::NULL, None);
                }
            }
            Some((key, entry))
        });
        self.index = rest.collect();
    }

    fn step(&mut self, batch: Vec<(usize, u32, u32)>, fate: Fate) {
        let mut new: Vec<(SequenceId, Tokens)> = Vec::new();
        let mut min_blocks = 0;
        for (i, count, bits) in batch {
            let (id, tokens) = &self.sequences[i];
            if new.iter().any(|(s, _)| s == id) || self.is_open(*id) {
                continue;
            }
            let mut all = tokens.clone();
            for bit in 0..count {
                let token = bits >> (bit % 3) & 1;
                all.push((token, value(all.last(), token)));
            }
            let blocks = |len: usize| (len as u32).div_ceil(self.block_size);
            min_blocks += (blocks(all.len()) - blocks(tokens.len())) * self.windows.len() as u32;
            new.push((*id, all.split_off(tokens.len())));
        }
        let lens: Vec<_> = new.iter().map(|(s, tokens)| (*s, tokens.len() as u32)).collect();
        if lens.is_empty() {
            return;
        }
        let ids: Vec<_> = lens.iter().map(|&(s, _)| s).collect();
        let Some(reservation) = self.take(min_blocks, &ids, |m| m.reserve(&lens)) else { return };
        let Reservation { groups, pending } = reservation;
        assert!(groups.len() == self.windows.len() && groups.iter().all(|group| group.copies.len() <= new.len()));
        let changes = pending.changes.iter().flat_map(|change| &change.tables);
        let blocks: Vec<_> =
            changes.flat_map(|change| change.replacement.iter().chain(&change.new_blocks)).copied().collect();
        let num_copies: usize = groups.iter().map(|group| group.copies.len()).sum();
        assert_eq!(blocks.len(), min_blocks as usize + num_copies);
        if !matches!(fate, Fate::DropUnsubmitted) {
            for (number, group) in groups.iter().enumerate() {
                self.write(number, group, &new);
            }
        }
        let open = Open { pending, new, blocks };
        match fate {
            Fate::Hold => self.open.push(open),
            Fate::Commit => self.end(open, true),
            Fate::Drop | Fate::DropUnsubmitted => self.end(open, false),
        }
    }

    /// What a group's layers do in a step.
    fn write(&mut self, number: usize, group: &ReservedGroup, new: &[(SequenceId, Tokens)]) {
        let ReservedGroup { batch, slots, copies } = group;
        for &[from, to] in copies {
            for offset in 0..self.block_size {
                if let Some(&value) = self.memory.get(&(BlockId(from), offset)) {
                    self.memory.insert((BlockId(to), offset), value);
                }
            }
        }
        let values = new.iter().flat_map(|(_, tokens)| tokens);
        assert_eq!(slots.len(), values.clone().count());
        for (slot, &(_, value)) in slots.iter().zip(values) {
            self.memory.insert((BlockId(slot / self.block_size), slot % self.block_size), (number, value[number]));
        }
        // What the step's attention reads.
        for (entry, (id, tokens)) in batch.entries.iter().zip(new) {
            let before = self.sequences.iter().find(|(s, _)| s == id).unwrap();
            assert_eq!((entry.context_len as usize, entry.query_len as usize), (before.1.len(), tokens.len()));
            let table: Vec<_> = batch.tables[entry.table.clone()].iter().map(|&b| BlockId(b)).collect();
            self.assert_holds(number, &table, before.1.iter().chain(tokens), &self.lost(*id)[number]);
            let seen = |len: u32| self.windows[number].needed(len);
            assert!((entry.context_len..entry.seq_len()).flat_map(seen).all(|block| !table[block as usize].is_null()));
        }
    }

    fn end(&mut self, open: Open, commit: bool) {
        if !commit {
            self.m.roll_back(open.pending);
            return;
        }
        self.m.commit(open.pending);
        for (id, tokens) in open.new {
            self.sequences.iter_mut().find(|(s, _)| *s == id).unwrap().1.extend(tokens);
        }
    }

    /// Publishes up to `len` tokens of the `i`th sequence.
    fn publish(&mut self, i: usize, len: usize, salt: u64, lie: bool) {
        let (id, tokens) = &self.sequences[i];
        let tokens = &tokens[..len.min(tokens.len())];
        let said: Vec<_> = tokens.iter().map(|t| if lie { 1 - t.0 } else { t.0 }).collect();
        let tables = self.m.tables(*id).unwrap();
        let block_size = self.block_size as usize;
        let mut added = 0;
        let is_there = |i: &usize| tables.iter().any(|table| !table.blocks()[*i].is_null());
        let last = (0..tokens.len() / block_size).rev().find(is_there);
        for (i, values) in tokens.chunks_exact(block_size).enumerate().take(last.map_or(0, |last| last + 1)) {
            let key = (salt, said[..(i + 1) * block_size].to_vec());
            let is_known = self.index.contains_key(&key);
            let empty = Entry {
                blocks: vec![(BlockId::NULL, None); tables.len()],
                values: values.iter().map(|t| t.1).collect(),
            };
            let entry = self.index.entry(key).or_insert(empty);
            for (group, ((held, unused_since), table)) in entry.blocks.iter_mut().zip(tables).enumerate() {
                let block = table.blocks()[i];
                if block.is_null() {
                    continue;
                }
                *unused_since = unused_since.map(|_| self.time);
                if held.is_null() {
                    *held = block;
                    entry.values.iter_mut().zip(values).for_each(|(own, new)| own[group] = new.1[group]);
                    added += 1;
                    self.seen[11] += u64::from(is_known);
                }
            }
        }
        assert_eq!(self.m.publish_prefix(*id, &said, salt).unwrap(), added);
    }

    fn match_prefix(&mut self, like: &Index, len: &Index, more: &[u32], salt: u64) {
        let mut query: Vec<_> = self.pick(like).map_or_else(Vec::new, |i| {
            let tokens = &self.sequences[i].1;
            tokens[..len.index(tokens.len() + 1)].iter().map(|t| t.0).collect()
        });
        query.extend(more);
        let mut found = Tokens::new();
        let mut chain = Vec::new();
        for (i, tokens) in query.chunks_exact(self.block_size as usize).enumerate() {
            let key = (salt, query[..(i + 1) * self.block_size as usize].to_vec());
            let Some(entry) = self.index.get(&key) else { break };
            chain.push(entry);
            found.extend(tokens.iter().copied().zip(entry.values.iter().copied()));
        }
        let known = chain.len();
        let is_good = |count: &usize| {
            let seen = |(group, window): (usize, &Window)| {
                window
                    .needed(*count as u32 * self.block_size)
                    .all(|block| !chain[block as usize].blocks[group].0.is_null())
            };
            self.windows.iter().enumerate().all(seen)
        };
        chain.truncate((0..=known).rev().find(is_good).unwrap());
        self.seen[10] += u64::from(chain.len() < known);
        found.truncate(chain.len() * self.block_size as usize);
        let hidden = self.hidden(found.len() as u32);
        let blocks: Vec<Vec<_>> = hidden
            .iter()
            .enumerate()
            .map(|(group, hidden)| {
                let block = |(i, entry): (u32, &&Entry)| {
                    if hidden.contains(&i) { BlockId::NULL } else { entry.blocks[group].0 }
                };
                (0..).zip(&chain).map(block).collect()
            })
            .collect();
        let unused = |block: &&BlockId| !block.is_null() && self.m.pool.num_holders(**block) == 0;
        let reclaimable_blocks = blocks.iter().flatten().filter(unused).count() as u32;
        let probe = PrefixProbe { len: found.len() as u32, reclaimable_blocks };
        assert_eq!(self.m.probe_prefix(&query, salt), probe);
        let hit = self.m.match_prefix(&query, salt);
        self.seen[9] += u64::from(hidden.iter().any(|hidden| !hidden.is_empty()));
        self.set_lost(hit.sequence, found.len(), hidden);
        let tables = self.m.tables(hit.sequence).unwrap();
        assert_eq!(hit.len as usize, found.len());
        assert!(tables.iter().map(BlockTable::blocks).eq(blocks.iter().map(Vec::as_slice)));
        self.seen[0] += u64::from(hit.len > 0);
        for (stat, count) in self.stats.iter_mut().zip([1, query.len(), found.len()]) {
            *stat += count as u64;
        }
        self.sequences.push((hit.sequence, found));
    }

    fn bad(&mut self, s: &Index, bad: Bad) {
        let Some(i) = self.pick(s) else { return };
        let (id, tokens) = &self.sequences[i];
        let (id, len, open) = (*id, tokens.len() as u32, self.is_open(*id));
        let ok = |kind| if open { ErrorKind::Caller } else { kind };
        let total = self.m.pool.num_blocks();
        let (m, caller) = (&mut self.m, ErrorKind::Caller);
        match bad {
            Bad::ForkBeyond => m.refused(|m| m.fork_at(id, len + 1), caller, ""),
            Bad::TruncateBeyond => m.refused(|m| m.truncate(id, len + 1), caller, ""),
            Bad::PublishBeyond => {
                m.refused(|m| m.publish_prefix(id, &vec![0; len as usize + 1], 0), caller, "tokens");
            }
            Bad::UnknownSalt => m.refused(|m| m.forget_prefixes(SALTS + 1), caller, "unknown salt"),
            Bad::UnknownSequence => {
                let other = manager(1, 1).create();
                m.refused(|m| m.fork_at(other, 0), caller, "not in this cache");
                m.refused(|m| m.publish_prefix(other, &[], 0), caller, "not in this cache");
                m.refused(|m| m.truncate(other, 0), caller, "not in this cache");
                m.refused(|m| m.free(other), caller, "not in this cache");
                m.refused(|m| m.reserve(&[(id, 1), (other, 1)]), caller, "");
            }
            Bad::EmptyBatch => m.refused(|m| m.reserve(&[]), caller, "batch"),
            Bad::Twice => m.refused(|m| m.reserve(&[(id, 1), (id, 1)]), caller, ""),
            Bad::NoTokens => m.refused(|m| m.reserve(&[(id, 0)]), caller, ""),
            Bad::TooManyTokens => m.refused(|m| m.reserve(&[(id, u32::MAX)]), caller, ""),
            Bad::TooManyBlocks => {
                let count = (total + 1) * self.block_size;
                m.refused(|m| m.reserve(&[(id, count)]), ok(ErrorKind::Retry), "");
            }
        }
    }

    /// The table has the tokens, but for those in blocks that are lost, for which it has null.
    fn assert_holds<'t>(
        &self,
        group: usize,
        table: &[BlockId],
        tokens: impl Iterator<Item = &'t (u32, Value)>,
        lost: &BTreeSet<u32>,
    ) {
        let read = |i: u32| self.memory.get(&(table[(i / self.block_size) as usize], i % self.block_size)).copied();
        for (i, &(_, value)) in (0..).zip(tokens) {
            let is_lost = lost.contains(&(i / self.block_size));
            assert_eq!(table[(i / self.block_size) as usize].is_null(), is_lost, "token {i} of {table:?}");
            assert!(is_lost || read(i) == Some((group, value[group])), "token {i} of {table:?}");
        }
    }

    fn check(&mut self) {
        let block_size = self.block_size;
        let mut holders = vec![0; self.m.pool.num_blocks() as usize];
        assert_eq!(self.m.sequences.len(), self.sequences.len());
        for (id, tokens) in &self.sequences {
            let tables = self.m.tables(*id).unwrap();
            assert_eq!(tables.len(), self.windows.len());
            for (group, (table, lost)) in tables.iter().zip(self.lost(*id)).enumerate() {
                assert_eq!(table.len() as usize, tokens.len());
                assert_eq!(table.blocks().len(), tokens.len().div_ceil(block_size as usize));
                self.assert_holds(group, table.blocks(), tokens.iter(), &lost);
                assert_eq!(table.num_held() as usize, table.held().count());
                table.held().for_each(|b| holders[b.0 as usize] += 1);
            }
            assert_eq!(self.m.sequences[id].held_by.is_some(), self.is_open(*id));
        }
        let others = self.open.iter().flat_map(|open| &open.blocks).chain(&self.loose);
        others.for_each(|b| holders[b.0 as usize] += 1);

        for (block, unused_since) in self.index.values_mut().flat_map(|entry| &mut entry.blocks) {
            let unused = !block.is_null() && holders[block.0 as usize] == 0;
            *unused_since = unused.then(|| unused_since.unwrap_or(self.time));
        }
        let index = self.m.prefixes.snapshot();
        let bare = |held: &[(BlockId, bool)]| held.to_vec();
        let real =
            index.iter().map(|(key, held)| (key, bare(&held.iter().map(|h| (h.0, h.1.is_some())).collect::<Vec<_>>())));
        let naive =
            self.index.iter().map(|(key, entry)| (key, entry.blocks.iter().map(|h| (h.0, h.1.is_some())).collect()));
        assert!(real.eq(naive), "{index:?}");
        self.m.prefixes.check(&self.m.pool);
        for entry in self.index.values() {
            for (group, (block, _)) in entry.blocks.iter().enumerate().filter(|(_, held)| !held.0.is_null()) {
                let stored = (0..block_size).map(|offset| self.memory.get(&(*block, offset)).copied());
                let rows = entry.values.iter().map(|&value| Some((group, value[group])));
                assert!(stored.eq(rows), "an indexed block holds its rows: {entry:?}");
            }
        }

        let mut references = holders.clone();
        let indexed = || index.values().flatten().map(|held| held.0).filter(|block| !block.is_null());
        indexed().for_each(|b| references[b.0 as usize] += 1);
        let blocks = || (0..self.m.pool.num_blocks()).map(BlockId);
        let pool = &self.m.pool;
        assert!(blocks().map(|b| pool.ref_count(b)).eq(references.iter().copied()));
        assert!(blocks().map(|b| pool.num_holders(b)).eq(holders.iter().copied()));
        let mut free = pool.free_blocks().to_vec();
        free.sort_unstable();
        assert!(free.iter().copied().eq(blocks().filter(|b| references[b.0 as usize] == 0)), "{free:?}");

        let indexed: BTreeSet<_> = indexed().collect();
        let reclaimable = indexed.iter().filter(|b| holders[b.0 as usize] == 0).count() as u32;
        let usage = PoolUsage {
            total: pool.num_blocks(),
            free: free.len() as u32,
            used: pool.num_blocks() - free.len() as u32,
            shared: holders.iter().filter(|&&count| count > 1).count() as u32,
            reclaimable,
            sequences: self.sequences.len() as u32,
        };
        assert_eq!(self.m.usage(), usage);
        let [lookups, queried_tokens, hit_tokens, evicted_blocks] = self.stats;
        let stats = PrefixStats {
            lookups,
            queried_tokens,
            hit_tokens,
            indexed_blocks: indexed.len() as u32,
            reclaimable_blocks: reclaimable,
            evicted_blocks,
        };
        assert_eq!(self.m.prefix_stats(), stats);
        self.check_report(usage);
    }

    fn check_report(&self, usage: PoolUsage) {
        let report = self.m.memory();
        assert_eq!((report.usage, report.prefixes), (usage, self.m.prefix_stats()));
        let mut slots = BTreeSet::new();
        let mut blocks = BTreeSet::<BlockId>::new();
        for (id, tokens) in &self.sequences {
            for table in self.m.tables(*id).unwrap() {
                blocks.extend(table.held());
                let slot = |i: usize| (table.blocks()[i / self.block_size as usize], i % self.block_size as usize);
                slots.extend((0..tokens.len()).map(slot).filter(|(block, _)| !block.is_null()));
            }
        }
        let lost: usize = self.sequences.iter().flat_map(|(id, _)| self.lost(*id)).map(|lost| lost.len()).sum();
        assert_eq!(report.released_tokens, lost as u64 * u64::from(self.block_size));
        assert_eq!(report.cached_tokens, slots.len() as u64);
        assert_eq!(report.sequence_tokens, self.sequences.iter().map(|s| s.1.len() as u64).sum::<u64>());
        assert_eq!(report.sequence_blocks() as usize, blocks.len());
        assert_eq!(report.sequences.len(), self.sequences.len());
    }
}

#[test]
fn random_operations_agree_with_plain_vectors() {
    let mut runner = TestRunner::new(Config { cases: 6000, failure_persistence: None, ..Config::default() });
    let window = || prop::option::of((1..9_u32, 0..4_u32));
    let windows = prop_oneof![prop::collection::vec(window(), 1), prop::collection::vec(window(), 2..4)];
    let runs = (1..5_u32, 4..40_u32, windows, prop::bool::weighted(0.1), prop::collection::vec(op(), 1..100));
    let seen = std::cell::Cell::new([0; 12]);
    let result = runner.run(&runs, |(block_size, num_blocks, windows, collide, ops)| {
        let num_blocks = num_blocks * windows.len() as u32;
        let mut world = World::new(block_size, num_blocks, &windows, collide);
        for op in &ops {
            world.apply(op);
            world.check();
        }
        let counts = seen.get();
        seen.set(std::array::from_fn(|i| counts[i] + world.seen[i]));
        for open in std::mem::take(&mut world.open) {
            world.end(open, false);
        }
        for (id, _) in std::mem::take(&mut world.sequences) {
            world.m.free(id).unwrap();
        }
        for block in std::mem::take(&mut world.loose) {
            assert!(world.m.pool.release(block));
        }
        world.time += 1;
        world.check();
        let usage = world.m.usage();
        prop_assert_eq!(usage.free + usage.reclaimable, num_blocks);
        let total = world.m.take_blocks(num_blocks.into());
        prop_assert_eq!(total.unwrap().len() as u32, num_blocks);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let seen = seen.get();
    assert!(seen.iter().all(|&count| count > 100), "too little has happened to say much: {seen:?}");
}

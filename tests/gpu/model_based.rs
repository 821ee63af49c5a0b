//! Random operations on a cache, against a model that keeps each sequence's tokens in a vector.

use crate::common::with;
use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use folio::wgpu::CommandEncoder;
use folio::{BlockId, Error, KvCache, PoolUsage, SequenceId, SequenceSnapshot, Step, TokenTree};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

use crate::adapter::{self, DEFAULT};
use crate::case::poison;
use crate::tokens::{SHAPE, assert_holds, encoder, run};

const BLOCK_SIZE: u32 = 3;
const NUM_BLOCKS: u32 = 14;

#[derive(Clone, Copy, Debug)]
enum Fate {
    Commit,
    Drop,
    /// Stays open until [`Op::End`].
    Hold,
}

#[derive(Clone, Debug)]
enum Op {
    Create,
    /// A new sequence of so many tokens, which are published.
    Prompt(u32),
    /// New tokens for some sequences; commands are submitted at once, whatever becomes of the step.
    Step(Vec<(Index, u32)>, Fate),
    /// New tokens of a sequence that branch, so many and by this seed, of which a path is accepted.
    Tree(Index, u32, u64, Fate),
    /// Ends the oldest open step.
    End {
        commit: bool,
    },
    /// Forks without up to this many of the last tokens, so that sequences of different lengths share a block.
    Fork(Index, u32),
    /// Forks at any length.
    ForkAt(Index, Index),
    /// Publishes a part of a sequence under a salt, and looks whether it is found.
    Publish(Index, Index, u64),
    /// A new sequence from a part of what was once published, and a token that wasn't.
    Match(Index, Index),
    Forget(u64),
    Truncate(Index, Index),
    Free(Index),
    /// To host memory; dropped half-way if not `finish`.
    SwapOut {
        sequence: Index,
        finish: bool,
    },
    /// The last one that left comes back, or its blocks are given back.
    SwapIn {
        commit: bool,
    },
    Defragment {
        commit: bool,
    },
    Check(Index),
}

fn op() -> impl Strategy<Value = Op> {
    let fate = prop_oneof![3 => Just(Fate::Commit), 1 => Just(Fate::Drop), 1 => Just(Fate::Hold)];
    let fate_of_tree = fate.clone();
    let batch = prop::collection::vec((any::<Index>(), 1..8_u32), 1..6);
    prop_oneof![
        2 => Just(Op::Create),
        4 => (1..20_u32).prop_map(Op::Prompt),
        8 => (batch, fate).prop_map(|(batch, fate)| Op::Step(batch, fate)),
        4 => (any::<Index>(), 1..12_u32, any::<u64>(), fate_of_tree)
            .prop_map(|(sequence, len, seed, fate)| Op::Tree(sequence, len, seed, fate)),
        2 => any::<bool>().prop_map(|commit| Op::End { commit }),
        4 => (any::<Index>(), 0..3_u32).prop_map(|(s, less)| Op::Fork(s, less)),
        2 => (any::<Index>(), any::<Index>()).prop_map(|(s, len)| Op::ForkAt(s, len)),
        4 => (any::<Index>(), any::<Index>(), 0..2_u64).prop_map(|(s, len, salt)| Op::Publish(s, len, salt)),
        3 => (any::<Index>(), any::<Index>()).prop_map(|(published, len)| Op::Match(published, len)),
        1 => (0..2_u64).prop_map(Op::Forget),
        3 => (any::<Index>(), any::<Index>()).prop_map(|(s, len)| Op::Truncate(s, len)),
        4 => any::<Index>().prop_map(Op::Free),
        2 => (any::<Index>(), prop::bool::weighted(0.8)).prop_map(|(sequence, finish)| Op::SwapOut { sequence, finish }),
        2 => prop::bool::weighted(0.8).prop_map(|commit| Op::SwapIn { commit }),
        1 => prop::bool::weighted(0.8).prop_map(|commit| Op::Defragment { commit }),
        1 => any::<Index>().prop_map(Op::Check),
    ]
}

/// An open step, and the tokens that it brings to each of its sequences.
struct Open {
    step: Step,
    new: Vec<(SequenceId, Vec<u32>)>,
}

/// Blocks that a step can have.
fn room(usage: PoolUsage) -> u32 {
    usage.free + usage.reclaimable
}

struct Model<'a> {
    cache: &'a KvCache,
    sequences: Vec<(SequenceId, Vec<u32>)>,
    open: Vec<Open>,
    swapped: Vec<(SequenceSnapshot, Vec<u32>)>,
    /// All that was ever published, each with its salt.
    published: Vec<(u64, Vec<u32>)>,
    next_token: u32,
}

impl Model<'_> {
    fn pick(&self, index: &Index) -> Option<usize> {
        (!self.sequences.is_empty()).then(|| index.index(self.sequences.len()))
    }

    fn is_open(&self, sequence: SequenceId) -> bool {
        self.open.iter().any(|open| open.new.iter().any(|(s, _)| *s == sequence))
    }

    fn table(&self, sequence: SequenceId) -> Vec<BlockId> {
        self.cache.block_table(sequence).expect("table")
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Create => self.sequences.push((self.cache.create_sequence(), Vec::new())),
            Op::Prompt(len) => {
                let i = self.sequences.len();
                self.sequences.push((self.cache.create_sequence(), Vec::new()));
                self.step(&[(i, *len)], Fate::Commit);
                self.publish(i, self.sequences[i].1.len(), 0);
            }
            Op::Step(batch, fate) => {
                let batch = batch.iter().filter_map(|(index, len)| Some((self.pick(index)?, *len)));
                self.step(&batch.collect::<Vec<_>>(), *fate);
            }
            Op::Tree(index, len, seed, fate) => {
                let Some(i) = self.pick(index) else { return };
                self.tree(i, *len, *seed, *fate);
            }
            Op::End { commit } => {
                if !self.open.is_empty() {
                    let open = self.open.remove(0);
                    if *commit { self.commit(open) } else { drop(open) }
                }
            }
            Op::Fork(index, less) => {
                let Some(i) = self.pick(index) else { return };
                self.fork(i, self.sequences[i].1.len().saturating_sub(*less as usize));
            }
            Op::ForkAt(index, len) => {
                let Some(i) = self.pick(index) else { return };
                self.fork(i, len.index(self.sequences[i].1.len() + 1));
            }
            Op::Publish(index, len, salt) => {
                let Some(i) = self.pick(index) else { return };
                self.publish(i, len.index(self.sequences[i].1.len() + 1), *salt);
            }
            Op::Match(published, len) => {
                if self.published.is_empty() {
                    return;
                }
                let (salt, tokens) = &self.published[published.index(self.published.len())];
                let mut query = tokens[..len.index(tokens.len() + 1)].to_vec();
                query.extend([self.next_token; BLOCK_SIZE as usize]);
                let hit = self.cache.match_prefix(&query, *salt);
                assert!(hit.len.is_multiple_of(BLOCK_SIZE) && hit.len as usize + BLOCK_SIZE as usize <= query.len());
                query.truncate(hit.len as usize);
                self.sequences.push((hit.sequence, query));
            }
            Op::Forget(salt) => match self.cache.forget_prefixes(*salt) {
                Ok(entries) => assert!(entries > 0),
                Err(error) => assert!(error.to_string().contains("unknown salt"), "{error}"),
            },
            Op::Truncate(index, len) => {
                let Some(i) = self.pick(index) else { return };
                let (sequence, len) = (self.sequences[i].0, len.index(self.sequences[i].1.len() + 1));
                let result = self.cache.truncate(sequence, len as u32);
                if !self.refused_in_step(sequence, result.err().as_ref()) {
                    self.sequences[i].1.truncate(len);
                }
            }
            Op::Free(index) => {
                let Some(i) = self.pick(index) else { return };
                let sequence = self.sequences[i].0;
                let result = self.cache.free(sequence);
                if !self.refused_in_step(sequence, result.err().as_ref()) {
                    self.sequences.swap_remove(i);
                    assert!(matches!(self.cache.seq_len(sequence), Err(Error::UnknownSequence(s)) if s == sequence));
                }
            }
            Op::SwapOut { sequence, finish } => {
                if let Some(i) = self.pick(sequence) {
                    self.swap_out(i, *finish);
                }
            }
            Op::SwapIn { commit } => self.swap_in(*commit),
            Op::Defragment { commit } => self.defragment(*commit),
            Op::Check(index) => {
                let Some(i) = self.pick(index) else { return };
                assert_holds(self.cache, self.sequences[i].0, &self.sequences[i].1);
            }
        }
    }

    /// A sequence in an open step can't be changed, and only then.
    fn refused_in_step(&self, sequence: SequenceId, error: Option<&Error>) -> bool {
        let open = self.is_open(sequence);
        assert_eq!(open, error.is_some(), "{sequence}: {error:?}");
        assert!(
            error.is_none_or(|error| matches!(error, Error::SequenceBusy { sequence: s, .. } if *s == sequence)),
            "{error:?}"
        );
        open
    }

    fn fork(&mut self, i: usize, len: usize) {
        let (sequence, mut tokens) = self.sequences[i].clone();
        tokens.truncate(len);
        let fork = self.cache.fork_at(sequence, len as u32);
        if !self.refused_in_step(sequence, fork.as_ref().err()) {
            self.sequences.push((fork.expect("fork"), tokens));
        }
    }

    fn submit(&self, encoder: CommandEncoder) {
        self.cache.gpu().queue().submit([encoder.finish()]);
    }

    fn swap_out(&mut self, i: usize, finish: bool) {
        let sequence = self.sequences[i].0;
        let mut encoder = encoder(self.cache);
        let swap = self.cache.swap_out(&mut encoder, sequence);
        if self.refused_in_step(sequence, swap.as_ref().err()) {
            return;
        }
        self.submit(encoder);
        if finish {
            let snapshot = self.cache.gpu().block_on(swap.expect("swap").finish()).expect("finish");
            self.swapped.push((snapshot, self.sequences.swap_remove(i).1));
        }
    }

    fn swap_in(&mut self, commit: bool) {
        let Some((snapshot, tokens)) = self.swapped.pop() else { return };
        let before = self.cache.usage();
        let mut encoder = encoder(self.cache);
        match self.cache.swap_in(&mut encoder, &snapshot) {
            Ok(swap) if commit => {
                self.submit(encoder);
                return self.sequences.push((swap.commit().expect("commit"), tokens));
            }
            Ok(swap) => {
                self.submit(encoder);
                drop(swap);
                assert_eq!(room(self.cache.usage()), room(before));
            }
            Err(Error::OutOfBlocks { need, free, .. }) => {
                assert!(need > free && free == room(before), "need {need}, {before:?}");
                assert_eq!(self.cache.usage(), before);
            }
            Err(error) => panic!("{error}"),
        }
        self.swapped.push((snapshot, tokens));
    }

    fn defragment(&self, commit: bool) {
        let mut encoder = encoder(self.cache);
        let before = self.cache.usage();
        match self.cache.defragment(&mut encoder) {
            Ok(defragment) => {
                assert!(self.open.is_empty());
                self.submit(encoder);
                if commit {
                    defragment.commit().expect("commit");
                    let blocks = self.sequences.iter().flat_map(|(sequence, _)| self.table(*sequence));
                    assert!(blocks.into_iter().all(|block| block.index() < before.used));
                }
            }
            Err(Error::SequenceBusy { sequence, .. }) => assert!(self.is_open(sequence)),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(self.cache.usage(), before);
    }

    fn publish(&mut self, i: usize, len: usize, salt: u64) {
        let (sequence, tokens) = &self.sequences[i];
        let tokens = &tokens[..len];
        self.cache.publish_prefix(*sequence, tokens, salt).expect("publish");
        let hit = self.cache.match_prefix(tokens, salt);
        assert_eq!(hit.len, tokens.len() as u32 / BLOCK_SIZE * BLOCK_SIZE);
        self.cache.free(hit.sequence).expect("free");
        self.published.push((salt, tokens.to_vec()));
    }

    fn step(&mut self, batch: &[(usize, u32)], fate: Fate) {
        let mut new: Vec<(SequenceId, Vec<u32>)> = Vec::new();
        for &(i, len) in batch {
            let sequence = self.sequences[i].0;
            if new.iter().all(|(s, _)| *s != sequence) && !self.is_open(sequence) {
                new.push((sequence, (self.next_token..self.next_token + len).collect()));
                self.next_token += len;
            }
        }
        if new.is_empty() {
            return;
        }
        // Without copies for shared blocks; each sequence needs at most one more for that.
        let least: u32 = new
            .iter()
            .map(|(s, tokens)| {
                let len = self.cache.seq_len(*s).expect("length") + tokens.len() as u32;
                len.div_ceil(BLOCK_SIZE) - self.table(*s).len() as u32
            })
            .sum();
        let most = least + new.len() as u32;
        let before = self.cache.usage();
        let lens: Vec<_> = new.iter().map(|(s, tokens)| (*s, tokens.len() as u32)).collect();
        let step = match self.cache.begin_step(&lens) {
            Ok(step) => step,
            Err(Error::OutOfBlocks { need, free, total }) => {
                assert_eq!((free, total), (room(before), NUM_BLOCKS));
                assert!(need > free && (least..=most).contains(&need), "need {need}, {least} to {most}, {free} free");
                assert_eq!(self.cache.usage(), before);
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let taken = room(before) - room(self.cache.usage());
        assert!((least..=most).contains(&taken), "took {taken}, {least} to {most}");
        run(self.cache, &step, &new.iter().flat_map(|(_, tokens)| tokens).copied().collect::<Vec<_>>());
        self.end(Open { step, new }, fate, before);
    }

    /// A tree of new tokens, and a path of it.
    fn tree(&mut self, i: usize, len: u32, seed: u64, fate: Fate) {
        let sequence = self.sequences[i].0;
        if self.is_open(sequence) {
            return;
        }
        let mut rng = fastrand::Rng::with_seed(seed);
        let parents: Vec<_> = (0..len).map(|i| (rng.u32(..5) > 0 && i > 0).then(|| rng.u32(..i.max(1)))).collect();
        let tree = TokenTree::new(&parents).expect("a tree");
        let mut path = tree.path_to(rng.u32(..len));
        path.truncate(rng.usize(..=path.len()));
        let tokens: Vec<u32> = (self.next_token..self.next_token + len).collect();
        self.next_token += len;
        let before = self.cache.usage();
        let mut step = match self.cache.begin_step_with_trees(&[(sequence, len)], &[Some(tree)]) {
            Ok(step) => step,
            Err(Error::OutOfBlocks { need, free, .. }) => {
                assert!(need > free && free == room(before), "need {need}, {before:?}");
                return assert_eq!(self.cache.usage(), before);
            }
            Err(error) => panic!("{error}"),
        };
        run(self.cache, &step, &tokens);
        let mut encoder = encoder(self.cache);
        self.cache.accept(&mut encoder, &mut step, &[(sequence, &path)]).expect("a path");
        self.submit(encoder);
        let kept = path.iter().map(|&i| tokens[i as usize]).collect();
        self.end(Open { step, new: vec![(sequence, kept)] }, fate, before);
    }

    fn end(&mut self, open: Open, fate: Fate, before: PoolUsage) {
        match fate {
            Fate::Commit => self.commit(open),
            Fate::Drop => {
                drop(open);
                let after = self.cache.usage();
                assert_eq!((room(after), after.shared), (room(before), before.shared));
            }
            Fate::Hold => self.open.push(open),
        }
    }

    fn commit(&mut self, open: Open) {
        self.cache.commit(open.step).expect("commit");
        for (sequence, tokens) in open.new {
            let known = self.sequences.iter_mut().find(|(s, _)| *s == sequence).expect("a sequence in a step stays");
            known.1.extend(tokens);
        }
    }

    /// Tables share only common prefixes, at the same place, and the pool counts what is reachable.
    fn check_blocks(&self) {
        let mut holders: HashMap<BlockId, Vec<(usize, &[u32])>> = HashMap::new();
        for (sequence, tokens) in &self.sequences {
            let table = self.table(*sequence);
            assert_eq!(self.cache.seq_len(*sequence).expect("length"), tokens.len() as u32);
            assert_eq!(table.len(), tokens.len().div_ceil(BLOCK_SIZE as usize));
            for (i, (&block, part)) in table.iter().zip(tokens.chunks(BLOCK_SIZE as usize)).enumerate() {
                holders.entry(block).or_default().push((i, part));
            }
        }
        for (block, holders) in &holders {
            for (i, part) in holders {
                let (first_i, first) = holders[0];
                let common = part.len().min(first.len());
                assert!(*i == first_i && part[..common] == first[..common], "{block:?}: {holders:?}");
            }
        }
        let reserved = self.open.iter().flat_map(|open| open.step.batch().tables.iter().copied());
        let used: HashSet<u32> = holders.keys().map(|block| block.index()).chain(reserved).collect();
        let usage = self.cache.usage();
        assert_eq!((usage.used as usize, usage.total), (used.len() + usage.reclaimable as usize, NUM_BLOCKS));
        let prefixes = self.cache.prefix_stats();
        assert_eq!(usage.reclaimable, prefixes.reclaimable_blocks);
        assert!(prefixes.indexed_blocks >= usage.reclaimable && usage.used >= prefixes.indexed_blocks);
        assert_eq!(usage.free, NUM_BLOCKS - usage.used);
        assert_eq!(usage.shared as usize, holders.values().filter(|holders| holders.len() > 1).count());
        assert_eq!(usage.sequences as usize, self.sequences.len());
    }
}

#[test]
fn random_operations_agree_with_plain_vectors() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let config = with(SHAPE, |c| {
        c.num_layers = 1;
        c.num_kv_heads = 1;
        c.block_size = BLOCK_SIZE;
        c.num_blocks = NUM_BLOCKS;
    });
    let cache = KvCache::new_blocking(&gpu, config).expect("cache");
    let (hits, evictions) = (Cell::new(0), Cell::new(0));
    let mut runner = TestRunner::new(Config { cases: 1000, failure_persistence: None, ..Config::default() });
    let result = runner.run(&prop::collection::vec(op(), 1..60), |ops| {
        cache.clear();
        poison(&cache);
        let mut model = Model {
            cache: &cache,
            sequences: Vec::new(),
            open: Vec::new(),
            swapped: Vec::new(),
            published: Vec::new(),
            next_token: 0,
        };
        for op in &ops {
            model.apply(op);
            model.check_blocks();
        }
        model.open.clear();
        model.check_blocks();
        for (sequence, tokens) in &model.sequences {
            assert_holds(&cache, *sequence, tokens);
        }
        for (sequence, _) in model.sequences {
            cache.free(sequence).expect("free");
        }
        prop_assert_eq!(room(cache.usage()), NUM_BLOCKS);
        let stats = cache.prefix_stats();
        hits.set(hits.get() + stats.hit_tokens);
        evictions.set(evictions.get() + stats.evicted_blocks);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let seen = (hits.get(), evictions.get());
    assert!(seen.0 > 100 && seen.1 > 100, "too little has happened to say much: {seen:?}");
}

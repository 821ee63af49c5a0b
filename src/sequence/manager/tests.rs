//! The manager alone: no GPU.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod model;
mod ops;
mod window;

use std::collections::HashSet;

use super::super::prefix;
use super::super::reserve::{Pending, Reservation, ReservedGroup};
use super::*;
use crate::error::ErrorKind;
use crate::format::KvFormat;

fn config(block_size: u32, num_blocks: u32) -> KvCacheConfig {
    KvCacheConfig::new(1, 1, 8).with_blocks(num_blocks, block_size).with_formats(KvFormat::F32, KvFormat::F32)
}

fn manager(block_size: u32, num_blocks: u32) -> Manager {
    Manager::new(config(block_size, num_blocks)).unwrap()
}

impl Manager {
    /// Appends; returns the copies.
    fn extend(&mut self, id: SequenceId, count: u32) -> Result<Vec<[u32; 2]>> {
        let reservation = self.reserve(&[(id, count)])?;
        self.commit(reservation.pending);
        Ok(reservation.groups.into_iter().flat_map(|group| group.copies).collect())
    }

    /// A new sequence of `len` tokens.
    fn sequence(&mut self, len: u32) -> SequenceId {
        let id = self.create();
        self.extend(id, len).unwrap();
        id
    }

    /// Publishes the tokens as a sequence's and frees it: the index alone holds them. Returns their blocks.
    fn leave(&mut self, tokens: &[u32], salt: u64) -> Vec<BlockId> {
        let id = self.sequence(tokens.len() as u32);
        let blocks = self.blocks(id);
        self.publish_prefix(id, tokens, salt).unwrap();
        self.free(id).unwrap();
        blocks
    }

    fn blocks(&self, id: SequenceId) -> Vec<BlockId> {
        self.table(id).unwrap().blocks().to_vec()
    }

    /// Tokens that are found, without a trace of the look-up.
    fn found(&mut self, tokens: &[u32], salt: u64) -> u32 {
        self.prefixes.find(tokens, salt, &self.config).len
    }

    fn refused<T: std::fmt::Debug>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>, kind: ErrorKind, part: &str) {
        let before = model::State::of(self);
        let error = call(self).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(part), "{error}, want {kind:?} with {part:?}");
        assert_eq!(model::State::of(self), before);
    }
}

#[test]
fn a_fork_in_the_middle_of_a_block_shares_it() {
    let mut m = manager(4, 8);
    let s = m.sequence(10);
    let before = m.blocks(s);
    let fork = m.fork_at(s, 6).unwrap();
    assert_eq!((m.blocks(fork), m.table(fork).unwrap().len()), (before[..2].to_vec(), 6));
    assert_eq!((m.usage().used, m.usage().shared), (3, 2));
    // The source goes on in its third block; the fork copies the second.
    assert!(m.extend(s, 1).unwrap().is_empty());
    assert_eq!(m.extend(fork, 1).unwrap(), [[before[1].0, m.blocks(fork)[1].0]]);
    assert_eq!(m.blocks(s), before);
    assert_eq!((m.usage().used, m.usage().shared), (4, 1));
    // Of a fork at 0, nothing is shared.
    let empty = m.fork_at(s, 0).unwrap();
    assert!(m.blocks(empty).is_empty());
    m.refused(|m| m.fork_at(s, 12), ErrorKind::Caller, "len: got 12, need at most the sequence's length, 11");
    m.refused(|m| m.fork_at(s, u32::MAX), ErrorKind::Caller, "at most");
}

#[test]
fn a_shared_partial_block_is_copied_by_whoever_appends_first() {
    let mut m = manager(4, 8);
    let s = m.sequence(7);
    let fork = m.fork_at(s, 5).unwrap();
    let before = m.blocks(s);
    assert_eq!(m.extend(s, 1).unwrap(), [[before[1].0, m.blocks(s)[1].0]]);
    // The block is the fork's own now.
    assert!(m.extend(fork, 1).unwrap().is_empty());
    assert_eq!(m.blocks(fork), before);
}

#[test]
fn full_blocks_are_found_by_their_tokens() {
    let mut m = manager(4, 16);
    let s = m.sequence(11);
    let tokens: Vec<u32> = (0..11).collect();
    assert_eq!(m.publish_prefix(s, &tokens, 1).unwrap(), 2);
    assert_eq!(m.publish_prefix(s, &tokens, 1).unwrap(), 0);
    for (query, len) in [(12, 8), (11, 8), (8, 8), (7, 4), (4, 4), (3, 0), (0, 0)] {
        let query: Vec<u32> = (0..query).collect();
        let hit = m.match_prefix(&query, 1);
        assert_eq!((hit.len, m.blocks(hit.sequence)), (len, m.blocks(s)[..len as usize / 4].to_vec()));
        assert_eq!(m.table(hit.sequence).unwrap().len(), len);
        // Nothing is shared that the next token would be written to.
        assert!(m.extend(hit.sequence, 1).unwrap().is_empty());
        m.free(hit.sequence).unwrap();
    }
    // A sequence that is there can take the match in, if it is empty.
    let empty = m.create();
    assert_eq!(m.match_prefix_into(empty, &tokens, 1).unwrap(), 8);
    assert_eq!(m.blocks(empty), m.blocks(s)[..2]);
    m.refused(|m| m.match_prefix_into(empty, &tokens, 1), ErrorKind::Caller, "8 tokens, need an empty one");
    m.free(empty).unwrap();
    m.refused(|m| m.match_prefix_into(empty, &tokens, 1), ErrorKind::Caller, "not in this cache");
    // Other tokens anywhere before, or another salt, are another prefix.
    assert_eq!(m.found(&[9, 1, 2, 3, 4, 5, 6, 7], 1), 0);
    assert_eq!(m.found(&[0, 1, 2, 3, 4, 5, 6, 9], 1), 4);
    assert_eq!(m.found(&[4, 5, 6, 7], 1), 0);
    assert_eq!(m.found(&tokens, 2), 0);
    // A part of a block, or nothing, makes no entry and no salt.
    assert_eq!(m.publish_prefix(s, &tokens[..3], 5).unwrap(), 0);
    m.refused(|m| m.forget_prefixes(5), ErrorKind::Caller, "unknown salt 5");
}

#[test]
fn the_first_block_of_the_same_tokens_stays() {
    let mut m = manager(2, 8);
    let (a, b) = (m.sequence(2), m.sequence(4));
    assert_eq!(m.publish_prefix(a, &[1, 2], 0).unwrap(), 1);
    assert_eq!(m.publish_prefix(b, &[1, 2, 3, 4], 0).unwrap(), 1);
    let hit = m.match_prefix(&[1, 2, 3, 4], 0);
    assert_eq!(m.blocks(hit.sequence), [m.blocks(a)[0], m.blocks(b)[1]]);
}

#[test]
fn wrong_prefixes_are_refused() {
    let mut m = manager(2, 8);
    let s = m.sequence(3);
    let gone = m.create();
    m.free(gone).unwrap();
    m.refused(|m| m.publish_prefix(s, &[1, 2, 3, 4], 0), ErrorKind::Caller, "tokens: got 4 tokens, need at most");
    m.refused(|m| m.publish_prefix(gone, &[], 0), ErrorKind::Caller, "not in this cache");
    m.refused(|m| m.forget_prefixes(0), ErrorKind::Caller, "salt: got unknown salt 0");
    m.publish_prefix(s, &[1, 2, 3], 0).unwrap();
    assert_eq!(m.forget_prefixes(0).unwrap(), 1);
    m.refused(|m| m.forget_prefixes(0), ErrorKind::Caller, "unknown salt");
    // Tokens of an open step don't count.
    let step = m.reserve(&[(s, 3)]).unwrap();
    m.refused(|m| m.publish_prefix(s, &[1, 2, 3, 4], 0), ErrorKind::Caller, "tokens");
    m.refused(|m| m.fork_at(s, 1), ErrorKind::Caller, "open step");
    assert_eq!(m.publish_prefix(s, &[1, 2, 3], 0).unwrap(), 1);
    m.commit(step.pending);
    assert_eq!(m.publish_prefix(s, &[1, 2, 3, 4, 5, 6], 0).unwrap(), 2);
}

#[test]
fn an_indexed_block_is_not_written_to() {
    let mut m = manager(4, 8);
    let s = m.sequence(8);
    m.publish_prefix(s, &[0, 1, 2, 3, 4, 5, 6, 7], 0).unwrap();
    let indexed = m.blocks(s);
    // The only sequence that holds it is cut back into it and goes on differently.
    m.truncate(s, 6).unwrap();
    assert_eq!(m.memory().sequences[0].next_token_bytes, m.config.block_bytes());
    assert_eq!(m.extend(s, 1).unwrap(), [[indexed[1].0, m.blocks(s)[1].0]]);
    // The same for a fork, and for one that is dropped.
    let fork = m.fork_at(s, 3).unwrap();
    let step = m.reserve(&[(fork, 1)]).unwrap();
    let copies = &step.groups[0].copies;
    assert_eq!((copies.len(), copies[0][0]), (1, indexed[0].0));
    m.roll_back(step.pending);
    assert_eq!(m.blocks(fork), indexed[..1]);
    let hit = m.match_prefix(&[0, 1, 2, 3, 4, 5, 6, 7], 0);
    assert_eq!(m.blocks(hit.sequence), indexed);
}

#[test]
fn every_hash_may_collide() {
    let mut m = manager(2, 32);
    m.prefixes = m.prefixes.colliding();
    // The same tokens after different ones, as a first block, and under another salt.
    let chains: [(u64, &[u32]); 5] =
        [(0, &[1, 1, 2, 2, 3, 3]), (0, &[2, 2, 2, 2, 3, 3]), (0, &[3, 3, 2, 2]), (7, &[1, 1, 2, 2]), (8, &[2, 2])];
    let blocks: Vec<_> = chains.iter().map(|&(salt, tokens)| m.leave(tokens, salt)).collect();
    for (&(salt, tokens), blocks) in chains.iter().zip(&blocks) {
        let hit = m.match_prefix(tokens, salt);
        assert_eq!((&m.blocks(hit.sequence), hit.len), (blocks, tokens.len() as u32));
        m.free(hit.sequence).unwrap();
    }
    for (salt, tokens, len) in
        [(0, [1, 1, 3, 3], 2), (0, [3, 3, 3, 3], 2), (7, [2, 2, 2, 2], 0), (8, [2, 2, 3, 3], 2), (9, [1, 1, 2, 2], 0)]
    {
        assert_eq!(m.found(&tokens, salt), len, "{tokens:?} under {salt}");
    }
    m.prefixes.check(&m.pool);
    assert_eq!((m.forget_prefixes(0).unwrap(), m.usage().reclaimable), (8, 3));
    assert_eq!((m.found(&[1, 1, 2, 2], 0), m.found(&[1, 1, 2, 2], 7)), (0, 4));
}

#[test]
fn the_blocks_that_have_been_unused_for_the_longest_time_go_first() {
    let mut m = manager(2, 8);
    let trunk = m.leave(&[1, 1, 2, 2], 0);
    let branch = m.leave(&[9, 9, 8, 8], 0);
    // Another leaf on the trunk, used later than the branch; the trunk's first leaf keeps its time.
    let hit = m.match_prefix(&[1, 1], 0);
    m.extend(hit.sequence, 2).unwrap();
    m.publish_prefix(hit.sequence, &[1, 1, 3, 3], 0).unwrap();
    let late = m.blocks(hit.sequence)[1];
    m.free(hit.sequence).unwrap();
    assert_eq!((m.usage().free, m.usage().reclaimable), (3, 5));
    let mut order = Vec::new();
    let mut taken = m.take_blocks(3).unwrap();
    for _ in 0..5 {
        taken.extend(m.take_blocks(1).unwrap());
        order.push(*taken.last().unwrap());
        m.prefixes.check(&m.pool);
    }
    // The end of a prefix before its beginning; the trunk's root has been used together with its late leaf.
    assert_eq!(order, [trunk[1], branch[1], branch[0], late, trunk[0]]);
    assert_eq!(m.prefix_stats().evicted_blocks, 5);
    m.refused(|m| m.take_blocks(1), ErrorKind::Retry, "need 1, have 0 free of 8");
}

#[test]
fn a_match_or_publication_keeps_blocks_from_eviction() {
    let mut m = manager(2, 6);
    m.leave(&[1, 1, 2, 2], 0);
    m.leave(&[3, 3, 4, 4], 0);
    // The first is older, but somebody has it now.
    let hit = m.match_prefix(&[1, 1, 2, 2], 0);
    assert_eq!(m.usage().reclaimable, 2);
    m.refused(|m| m.take_blocks(5), ErrorKind::Retry, "need 5, have 4 free of 6");
    m.take_blocks(3).unwrap();
    assert_eq!((m.found(&[3, 3, 4, 4], 0), m.found(&[1, 1, 2, 2], 0)), (2, 4));
    // And when it is given back, it is the newer one.
    m.free(hit.sequence).unwrap();
    m.take_blocks(1).unwrap();
    assert_eq!((m.found(&[3, 3, 4, 4], 0), m.found(&[1, 1, 2, 2], 0)), (0, 4));

    // Publishing the tokens again makes an unused entry newer, too.
    let mut m = manager(2, 4);
    m.leave(&[1, 1], 0);
    m.leave(&[2, 2], 0);
    let again = m.sequence(2);
    assert_eq!(m.publish_prefix(again, &[1, 1], 0).unwrap(), 0);
    m.take_blocks(2).unwrap();
    assert_eq!((m.found(&[1, 1], 0), m.found(&[2, 2], 0)), (2, 0));
}

/// b published what comes after tokens of which a's blocks are indexed: entries in use below unused ones.
#[test]
fn an_unused_parent_of_a_used_child_can_be_reclaimed() {
    let mut m = manager(2, 8);
    let old = m.leave(&[7, 7], 0);
    let a = m.leave(&[1, 1, 2, 2], 0);
    let b = m.sequence(8);
    m.publish_prefix(b, &[1, 1, 2, 2, 3, 3, 4, 4], 0).unwrap();
    let kept = m.blocks(b);
    assert_eq!((m.usage().free, m.usage().reclaimable, m.prefix_stats().indexed_blocks), (1, 3, 5));
    m.prefixes.check(&m.pool);
    // The used entries stay as long as there is anything else.
    assert!(m.take_blocks(2).unwrap().contains(&old[0]));
    assert_eq!(m.found(&[1, 1, 2, 2, 3, 3, 4, 4], 0), 8);
    // One block is needed: only as much of the chain goes as must.
    assert_eq!(m.take_blocks(1).unwrap(), [a[1]]);
    assert_eq!(m.found(&[1, 1, 2, 2, 3, 3, 4, 4], 0), 2);
    m.prefixes.check(&m.pool);
    assert_eq!(m.take_blocks(1).unwrap(), [a[0]]);
    assert_eq!((m.blocks(b), m.usage().used, m.prefix_stats().evicted_blocks), (kept, 8, 3));
    m.refused(|m| m.take_blocks(1), ErrorKind::Retry, "have 0 free");
}

#[test]
fn what_cannot_be_met_evicts_nothing() {
    let mut m = manager(2, 6);
    m.leave(&[1, 1, 2, 2], 0);
    let s = m.sequence(4);
    assert_eq!((m.usage().free, m.usage().reclaimable), (2, 2));
    m.refused(|m| m.reserve(&[(s, 10)]), ErrorKind::Retry, "need 5, have 4 free of 6");
    m.refused(|m| m.take_blocks(1 << 40), ErrorKind::Retry, "have 4 free of 6");
    // A dropped step gives its blocks back; what was evicted for it is gone.
    let step = m.reserve(&[(s, 6)]).unwrap();
    m.roll_back(step.pending);
    assert_eq!((m.usage().free, m.usage().reclaimable), (3, 1));
    assert_eq!(m.found(&[1, 1, 2, 2], 0), 2);
}

#[test]
fn a_block_under_two_salts_is_reclaimed_when_both_let_go() {
    let mut m = manager(2, 3);
    let s = m.sequence(4);
    m.publish_prefix(s, &[1, 1, 2, 2], 5).unwrap();
    m.publish_prefix(s, &[1, 1, 2, 2], 6).unwrap();
    m.free(s).unwrap();
    let stats = m.prefix_stats();
    assert_eq!((stats.indexed_blocks, stats.reclaimable_blocks, m.usage().used, m.usage().shared), (2, 2, 2, 0));
    assert_eq!((m.forget_prefixes(5).unwrap(), m.usage().free), (2, 1));
    assert_eq!(m.found(&[1, 1, 2, 2], 6), 4);
    m.prefixes.check(&m.pool);
    assert_eq!(m.take_blocks(3).unwrap().len(), 3);
    assert_eq!(m.prefix_stats().evicted_blocks, 2);
}

/// Every figure by hand.
#[test]
fn hits_are_counted_in_tokens() {
    let mut m = manager(4, 8);
    assert_eq!((m.prefix_stats(), m.prefix_stats().hit_rate()), (PrefixStats::default(), 0.0));
    let tokens: Vec<u32> = (0..12).collect();
    let s = m.sequence(12);
    m.publish_prefix(s, &tokens[..9], 3).unwrap();
    // 8 of 12, 4 of 7, 0 of 12, 0 of 0.
    let hits = [(12, 3), (7, 3), (12, 4), (0, 3)].map(|(len, salt)| m.match_prefix(&tokens[..len], salt));
    assert_eq!(hits.map(|hit| hit.len), [8, 4, 0, 0]);
    let stats = PrefixStats {
        lookups: 4,
        queried_tokens: 31,
        hit_tokens: 12,
        indexed_blocks: 2,
        reclaimable_blocks: 0,
        evicted_blocks: 0,
    };
    assert_eq!(m.prefix_stats(), stats);
    assert!((m.prefix_stats().hit_rate() - 12.0 / 31.0).abs() < 1e-15);
    // Three sequences hold the first block, two the second.
    assert_eq!((m.usage().shared, m.usage().used), (2, 3));
    for id in [s, hits[0].sequence, hits[1].sequence] {
        m.free(id).unwrap();
    }
    assert_eq!(m.prefix_stats(), PrefixStats { reclaimable_blocks: 2, ..stats });
    m.take_blocks(7).unwrap();
    let evicted = PrefixStats { indexed_blocks: 1, reclaimable_blocks: 1, evicted_blocks: 1, ..stats };
    assert_eq!(m.prefix_stats(), evicted);
    m.clear();
    assert_eq!((m.prefix_stats(), m.usage().free), (PrefixStats::default(), 8));
    assert_eq!(m.match_prefix(&tokens, 3).len, 0);
}

/// Not a timing: the work is counted.
#[test]
fn forking_and_matching_take_as_many_iterations_as_there_are_blocks() {
    let (block_size, len) = (16, 32_768);
    let mut m = manager(block_size, 2 * len / block_size);
    m.prefixes = m.prefixes.counting();
    let tokens: Vec<u32> = (0..len).map(|i| i * 7 % 50_000).collect();
    let s = m.sequence(len - 5);
    let fork = m.fork(s).unwrap();
    let blocks = m.blocks(s);
    assert_eq!(m.blocks(fork), blocks);
    assert!((0..m.pool.num_blocks()).map(BlockId).all(|b| m.pool.ref_count(b) == 2 * u32::from(blocks.contains(&b))));
    assert_eq!(m.extend(fork, 1).unwrap().len(), 1);

    let full = len / block_size - 1;
    assert_eq!(m.publish_prefix(s, &tokens[..tokens.len() - 5], 1).unwrap(), full);
    assert_eq!(prefix::tests::take_num_hashes(), full + 1);
    let hit = m.match_prefix(&tokens, 1);
    // The root, each block, and the one that isn't there.
    assert_eq!((hit.len, prefix::tests::take_num_hashes()), (full * block_size, full + 2));
    assert!(m.extend(hit.sequence, 100).unwrap().is_empty());
}

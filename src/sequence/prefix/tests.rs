//! What tests of the manager need to know about the index.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::*;

/// The tokens of a prefix, all full blocks from the start of the sequence, and its salt.
pub(in crate::sequence) type Key = (u64, Vec<u32>);

thread_local! {
    static NUM_HASHES: Cell<u32> = const { Cell::new(0) };
}

impl PrefixIndex {
    /// The same index, empty, with equal hashes for everything.
    pub(in crate::sequence) fn colliding(&self) -> Self {
        Self::with_hash(self.needs_all.clone(), |_, _, _| 7)
    }

    /// The same index, empty, that counts its work.
    pub(in crate::sequence) fn counting(&self) -> Self {
        Self::with_hash(self.needs_all.clone(), |keys, parent, tokens| {
            NUM_HASHES.set(NUM_HASHES.get() + 1);
            chain_hash(keys, parent, tokens)
        })
    }
}

/// Hashes that a [`PrefixIndex::counting`] index has computed on this thread since the last call.
pub(in crate::sequence) fn take_num_hashes() -> u32 {
    NUM_HASHES.replace(0)
}

impl PrefixIndex {
    fn key<'a>(&'a self, mut entry: &'a Entry) -> Key {
        let salt = entry.salt;
        let mut blocks = vec![&*entry.tokens];
        while let Some(parent) = self.entries.get(&entry.parent) {
            assert_eq!(parent.salt, salt);
            blocks.push(&parent.tokens);
            entry = parent;
        }
        assert_eq!(self.roots.get(&salt), Some(&entry.parent), "a chain ends at the root of its salt");
        blocks.reverse();
        (salt, blocks.concat())
    }

    /// Every entry: its block of each group, and since when that has been unused.
    pub(in crate::sequence) fn snapshot(&self) -> BTreeMap<Key, Vec<(BlockId, Option<u64>)>> {
        let blocks = |entry: &Entry| entry.blocks.iter().map(|held| (held.block, held.unused_since)).collect();
        let snapshot: BTreeMap<_, _> = self.entries.values().map(|entry| (self.key(entry), blocks(entry))).collect();
        assert_eq!(snapshot.len(), self.entries.len(), "two entries for the same tokens");
        snapshot
    }

    /// Whether the parts of the index agree with each other and with the pool.
    pub(in crate::sequence) fn check(&self, pool: &BlockPool) {
        let edges: BTreeSet<_> = self.entries.iter().map(|(&id, entry)| (entry.parent, id)).collect();
        assert_eq!(self.edges, edges);
        assert!(edges.iter().all(|(parent, child)| parent < child));
        let held = || {
            let blocks = |(&id, entry): (&NodeId, &Entry)| {
                entry.blocks.iter().copied().enumerate().map(|(group, held)| (id, group, held)).collect::<Vec<_>>()
            };
            self.entries.iter().flat_map(blocks).filter(|(.., held)| !held.block.is_null())
        };
        let by_block: BTreeSet<_> = held().map(|(id, _, held)| (held.block, id)).collect();
        assert_eq!(self.by_block, by_block);
        let mut hashed: Vec<_> = self.by_hash.values().flatten().copied().collect();
        hashed.sort_unstable();
        let mut ids: Vec<_> = self.entries.keys().copied().collect();
        ids.sort_unstable();
        assert_eq!(hashed, ids);
        for (id, entry) in &self.entries {
            assert!(self.by_hash[&entry.hash].contains(id));
            for (held, needs_all) in entry.blocks.iter().zip(&self.needs_all) {
                assert_eq!(held.unused_since.is_some(), pool.is_reclaimable(held.block), "{entry:?}");
                assert!(!needs_all || !held.block.is_null(), "{entry:?}");
            }
            assert!(!entry.is_empty() || self.first_child(*id).is_some(), "an entry that leads nowhere: {entry:?}");
        }
        let line = |is_inner: bool| -> BTreeSet<EvictionRank> {
            let rank = |(id, group, held): (NodeId, usize, Held)| {
                let needs_all = self.needs_all[group];
                let own = (needs_all && self.first_child(id).is_some()) == is_inner;
                held.unused_since.filter(|_| own).map(|since| (since, Reverse(id), needs_all, group))
            };
            held().filter_map(rank).collect()
        };
        assert_eq!((&self.leaves, &self.inner), (&line(false), &line(true)));
        let salts: BTreeSet<_> = self.entries.values().map(|entry| entry.salt).collect();
        assert_eq!(self.roots.keys().copied().collect::<BTreeSet<_>>(), salts);
        assert!(pool.clone().take_changed().is_empty(), "every change has been settled");
        assert_eq!(pool.num_indexed() as usize, by_block.iter().map(|e| e.0).collect::<BTreeSet<_>>().len());
    }
}

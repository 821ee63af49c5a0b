//! What tests of the manager need to know about the index.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::*;

/// The tokens of a prefix, all full blocks from the start of the sequence, and its salt.
pub(in crate::sequence) type Key = (u64, Vec<u32>);

thread_local! {
    static NUM_HASHES: Cell<u32> = const { Cell::new(0) };
}

/// Every hash is the same.
pub(in crate::sequence) fn colliding() -> PrefixIndex {
    PrefixIndex::with_hash(|_, _, _| 7)
}

/// Counts its work.
pub(in crate::sequence) fn counting() -> PrefixIndex {
    PrefixIndex::with_hash(|keys, parent, tokens| {
        NUM_HASHES.set(NUM_HASHES.get() + 1);
        chain_hash(keys, parent, tokens)
    })
}

/// Hashes that a [`counting`] index has computed on this thread since the last call.
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

    /// Every entry: its block, and since when it has been unused.
    pub(in crate::sequence) fn snapshot(&self) -> BTreeMap<Key, (BlockId, Option<u64>)> {
        let snapshot: BTreeMap<_, _> =
            self.entries.values().map(|entry| (self.key(entry), (entry.block, entry.unused_since))).collect();
        assert_eq!(snapshot.len(), self.entries.len(), "two entries for the same tokens");
        snapshot
    }

    /// Whether the parts of the index agree with each other and with the pool.
    pub(in crate::sequence) fn check(&self, pool: &BlockPool) {
        let edges: BTreeSet<_> = self.entries.iter().map(|(&id, entry)| (entry.parent, id)).collect();
        assert_eq!(self.edges, edges);
        assert!(edges.iter().all(|(parent, child)| parent < child));
        let by_block: BTreeSet<_> = self.entries.iter().map(|(&id, entry)| (entry.block, id)).collect();
        assert_eq!(self.by_block, by_block);
        let mut hashed: Vec<_> = self.by_hash.values().flatten().copied().collect();
        hashed.sort_unstable();
        let mut ids: Vec<_> = self.entries.keys().copied().collect();
        ids.sort_unstable();
        assert_eq!(hashed, ids);
        for (id, entry) in &self.entries {
            assert!(self.by_hash[&entry.hash].contains(id));
            assert_eq!(entry.unused_since.is_some(), pool.is_reclaimable(entry.block), "{entry:?}");
        }
        let line = |with_children: bool| -> BTreeSet<EvictionRank> {
            let entries = self.entries.iter().filter(|&(&id, _)| self.first_child(id).is_some() == with_children);
            entries.filter_map(|(&id, entry)| entry.unused_since.map(|since| (since, Reverse(id)))).collect()
        };
        assert_eq!((&self.leaves, &self.inner), (&line(false), &line(true)));
        let salts: BTreeSet<_> = self.entries.values().map(|entry| entry.salt).collect();
        assert_eq!(self.roots.keys().copied().collect::<BTreeSet<_>>(), salts);
        assert!(pool.clone().take_changed().is_empty(), "every change has been settled");
        assert_eq!(pool.num_indexed() as usize, by_block.iter().map(|e| e.0).collect::<BTreeSet<_>>().len());
    }
}

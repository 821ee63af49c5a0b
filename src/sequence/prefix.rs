//! [`PrefixIndex`]: finds the blocks of tokens that have been computed before. Host only.
//!
//! Automatic prefix caching in the manner of [vLLM](https://arxiv.org/abs/2309.06180), with the eviction of leaves of
//! [SGLang's RadixAttention](https://arxiv.org/abs/2312.07104): full blocks are entries of a tree, found by a chain of hashes
//! over the tokens from the start of the sequence. A hash only says where to look. What decides is the entry's parent and its
//! tokens, so sequences with equal hashes never mix.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};

use super::pool::BlockPool;
use crate::ids::{BlockId, SequenceId};

/// What [`Manager::match_prefix`](crate::sequence::Manager::match_prefix) found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefixMatch {
    /// A new sequence of the first `len` tokens, in blocks that it shares.
    pub sequence: SequenceId,
    /// Tokens that need not be computed: a multiple of block_size, possibly 0.
    pub len: u32,
}

/// What [`Manager::probe_prefix`](crate::sequence::Manager::probe_prefix) saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefixProbe {
    /// Tokens that a match would find: a multiple of block_size, possibly 0.
    pub len: u32,
    /// Blocks of them that only the index holds. They count as reclaimable now, and would not after a match.
    pub reclaimable_blocks: u32,
}

/// How much the prefix index holds and how much it has saved, since the cache was made or cleared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefixStats {
    /// Calls of [`Manager::match_prefix`](crate::sequence::Manager::match_prefix).
    pub lookups: u64,
    /// Tokens of all lookups.
    pub queried_tokens: u64,
    /// Those that were found.
    pub hit_tokens: u64,
    /// Blocks that the index holds now, alone or with sequences.
    pub indexed_blocks: u32,
    /// Those that only the index holds: they are given up when a step needs blocks and none is free.
    pub reclaimable_blocks: u32,
    /// Blocks that have been given up because somebody needed them.
    pub evicted_blocks: u64,
}

impl PrefixStats {
    /// The part of all queried tokens that were found, 0 to 1; 0 if there was no query.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        if self.queried_tokens == 0 { 0.0 } else { self.hit_tokens as f64 / self.queried_tokens as f64 }
    }
}

/// An entry, or the root above the first entries of a salt. Never used again, and larger than those of its ancestors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct NodeId(u64);

impl NodeId {
    const MIN: Self = Self(0);
    const MAX: Self = Self(u64::MAX);
}

/// An unused entry's rank in the order of eviction: since when nobody has used it. Of entries that became unused
/// together, the newest goes first, which is deeper in the tree than its ancestors.
type EvictionRank = (u64, Reverse<NodeId>);

/// A full block.
#[derive(Debug)]
struct Entry {
    /// Another entry, or the root of its salt.
    parent: NodeId,
    salt: u64,
    hash: u64,
    tokens: Box<[u32]>,
    block: BlockId,
    /// Set while no sequence holds the block.
    unused_since: Option<u64>,
}

/// Hash of a chain that goes on with these tokens after one with the hash `parent`.
type ChainHash = fn(keys: &RandomState, parent: u64, tokens: &[u32]) -> u64;

/// SipHash with random keys: callers who don't know the keys can't find tokens that make it slow.
fn chain_hash(keys: &RandomState, parent: u64, tokens: &[u32]) -> u64 {
    let mut hasher = keys.build_hasher();
    parent.hash(&mut hasher);
    tokens.hash(&mut hasher);
    hasher.finish()
}

/// A place in the tree: the node, if there is one, and the hash of the chain up to it.
#[derive(Clone, Copy)]
struct Place {
    node: Option<NodeId>,
    hash: u64,
}

/// Full blocks by the tokens in and before them. Holds a reference of its own on each block.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    keys: RandomState,
    chain_hash: ChainHash,
    /// The root of each salt that has entries.
    roots: HashMap<u64, NodeId>,
    entries: HashMap<NodeId, Entry>,
    by_hash: HashMap<u64, Vec<NodeId>>,
    /// (block, entry). A block has several entries if it was published under several salts.
    by_block: BTreeSet<(BlockId, NodeId)>,
    /// (parent, entry)
    edges: BTreeSet<(NodeId, NodeId)>,
    /// Unused entries without children.
    leaves: BTreeSet<EvictionRank>,
    /// Unused entries with children.
    inner: BTreeSet<EvictionRank>,
    next_id: NodeId,
    /// Counts the changes from used to unused.
    clock: u64,
    lookups: u64,
    queried_tokens: u64,
    hit_tokens: u64,
    evicted_blocks: u64,
}

impl Default for PrefixIndex {
    fn default() -> Self {
        Self::with_hash(chain_hash)
    }
}

impl PrefixIndex {
    fn with_hash(chain_hash: ChainHash) -> Self {
        Self {
            keys: RandomState::new(),
            chain_hash,
            roots: HashMap::new(),
            entries: HashMap::new(),
            by_hash: HashMap::new(),
            by_block: BTreeSet::new(),
            edges: BTreeSet::new(),
            leaves: BTreeSet::new(),
            inner: BTreeSet::new(),
            next_id: NodeId(1),
            clock: 0,
            lookups: 0,
            queried_tokens: 0,
            hit_tokens: 0,
            evicted_blocks: 0,
        }
    }

    /// An index without entries that hashes in the same way.
    pub(super) fn emptied(&self) -> Self {
        Self::with_hash(self.chain_hash)
    }

    pub(super) fn stats(&self, pool: &BlockPool) -> PrefixStats {
        PrefixStats {
            lookups: self.lookups,
            queried_tokens: self.queried_tokens,
            hit_tokens: self.hit_tokens,
            indexed_blocks: pool.num_indexed(),
            reclaimable_blocks: pool.num_reclaimable(),
            evicted_blocks: self.evicted_blocks,
        }
    }

    fn root(&self, salt: u64) -> Place {
        Place { node: self.roots.get(&salt).copied(), hash: (self.chain_hash)(&self.keys, salt, &[]) }
    }

    /// The place of a block with these tokens after `parent`.
    fn next(&self, parent: Place, tokens: &[u32]) -> Place {
        let hash = (self.chain_hash)(&self.keys, parent.hash, tokens);
        let is_it = |id: &&NodeId| {
            self.entries.get(id).is_some_and(|entry| Some(entry.parent) == parent.node && *entry.tokens == *tokens)
        };
        let node = self.by_hash.get(&hash).and_then(|ids| ids.iter().find(is_it)).copied();
        Place { node, hash }
    }

    /// The blocks of the longest chain that `tokens` begin with. Counts as a lookup.
    pub(super) fn find(&mut self, tokens: &[u32], salt: u64, block_size: u32) -> Vec<BlockId> {
        let blocks = self.look(tokens, salt, block_size);
        self.lookups += 1;
        self.queried_tokens += tokens.len() as u64;
        self.hit_tokens += blocks.len() as u64 * u64::from(block_size);
        blocks
    }

    /// [`PrefixIndex::find`] that doesn't count.
    pub(super) fn look(&self, tokens: &[u32], salt: u64, block_size: u32) -> Vec<BlockId> {
        let mut place = self.root(salt);
        let mut blocks = Vec::new();
        if place.node.is_some() {
            for tokens in tokens.chunks_exact(block_size as usize) {
                place = self.next(place, tokens);
                let Some(entry) = place.node.and_then(|id| self.entries.get(&id)) else { break };
                blocks.push(entry.block);
            }
        }
        blocks
    }

    /// Makes entries of the full blocks of `tokens` that have none yet, and takes a reference on each; `blocks` are those that
    /// hold the tokens. It ends at a null block without an entry. Entries that are there already count as used now. Returns the number of new ones.
    pub(super) fn publish(
        &mut self,
        tokens: &[u32],
        salt: u64,
        block_size: u32,
        blocks: &[BlockId],
        pool: &mut BlockPool,
    ) -> u32 {
        self.clock += 1;
        let mut place = self.root(salt);
        let mut added = 0;
        for (tokens, &block) in tokens.chunks_exact(block_size as usize).zip(blocks) {
            let parent = place.node;
            place = self.next(place, tokens);
            if let Some(id) = place.node {
                let unused = self.entries.get(&id).is_some_and(|entry| entry.unused_since.is_some());
                if unused {
                    self.set_unused_since(id, Some(self.clock));
                }
                continue;
            }
            if block.is_null() {
                // It has left the window, and was not in the index, or has been evicted: what follows would have no parent.
                break;
            }
            let held = pool.retain_indexed(block);
            debug_assert!(held, "a sequence holds its blocks");
            let parent = parent.unwrap_or_else(|| {
                let root = self.new_id();
                self.roots.insert(salt, root);
                root
            });
            place.node = Some(self.insert(parent, salt, place.hash, tokens, block));
            added += 1;
        }
        added
    }

    fn new_id(&mut self) -> NodeId {
        let id = self.next_id;
        self.next_id.0 += 1;
        id
    }

    fn insert(&mut self, parent: NodeId, salt: u64, hash: u64, tokens: &[u32], block: BlockId) -> NodeId {
        let id = self.new_id();
        self.entries.insert(id, Entry { parent, salt, hash, tokens: tokens.into(), block, unused_since: None });
        self.by_hash.entry(hash).or_default().push(id);
        self.by_block.insert((block, id));
        // An unused parent is no leaf any more.
        let unused_since = self.entries.get(&parent).and_then(|entry| entry.unused_since);
        self.set_unused_since(parent, None);
        self.edges.insert((parent, id));
        self.set_unused_since(parent, unused_since);
        id
    }

    /// Drops an entry without children and its reference on the block. Returns its parent.
    fn remove(&mut self, id: NodeId, pool: &mut BlockPool) -> Option<NodeId> {
        self.set_unused_since(id, None);
        let Entry { parent, salt, hash, block, .. } = self.entries.remove(&id)?;
        if let Some(ids) = self.by_hash.get_mut(&hash) {
            ids.retain(|&other| other != id);
            if ids.is_empty() {
                self.by_hash.remove(&hash);
            }
        }
        self.by_block.remove(&(block, id));
        // An unused parent may be a leaf now.
        let unused_since = self.entries.get(&parent).and_then(|entry| entry.unused_since);
        self.set_unused_since(parent, None);
        self.edges.remove(&(parent, id));
        self.set_unused_since(parent, unused_since);
        if self.first_child(parent).is_none() && !self.entries.contains_key(&parent) {
            self.roots.remove(&salt);
        }
        let held = pool.release_indexed(block);
        debug_assert!(held, "the index holds its blocks");
        Some(parent)
    }

    /// Puts an entry into the line for eviction, moves it there, or takes it out. Does nothing for a root.
    fn set_unused_since(&mut self, id: NodeId, since: Option<u64>) {
        let has_children = self.first_child(id).is_some();
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let line = if has_children { &mut self.inner } else { &mut self.leaves };
        if let Some(before) = std::mem::replace(&mut entry.unused_since, since) {
            line.remove(&(before, Reverse(id)));
        }
        if let Some(since) = since {
            line.insert((since, Reverse(id)));
        }
    }

    fn first_child(&self, id: NodeId) -> Option<NodeId> {
        self.edges.range((id, NodeId::MIN)..=(id, NodeId::MAX)).next().map(|&(_, child)| child)
    }

    fn leaf_below(&self, mut id: NodeId) -> NodeId {
        while let Some(child) = self.first_child(id) {
            id = child;
        }
        id
    }

    /// Learns which blocks are used and which are not. Everything that changed since the last call became so at the same time.
    pub(super) fn settle(&mut self, pool: &mut BlockPool) {
        self.clock += 1;
        for block in pool.take_changed() {
            let since = pool.is_reclaimable(block).then_some(self.clock);
            let ids: Vec<_> = self.by_block.range((block, NodeId::MIN)..=(block, NodeId::MAX)).map(|e| e.1).collect();
            for id in ids {
                self.set_unused_since(id, since);
            }
        }
    }

    /// The contents of the block `from` are in `to` from now on.
    pub(super) fn rename(&mut self, from: BlockId, to: BlockId) {
        let range = (from, NodeId::MIN)..=(from, NodeId::MAX);
        let ids: Vec<_> = self.by_block.range(range).map(|&(_, id)| id).collect();
        for id in ids {
            self.by_block.remove(&(from, id));
            self.by_block.insert((to, id));
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.block = to;
            }
        }
    }

    /// Gives blocks up, of the entries that have been unused for the longest time, until the pool has `free` free ones or
    /// there is nothing more to give up. Children go before their parents.
    ///
    /// A parent can be unused while its child is not: a sequence that had blocks of its own for tokens that were indexed
    /// already has published what comes after them. Such children lose their entries, but only when all unused leaves are gone.
    pub(super) fn evict(&mut self, free: u32, pool: &mut BlockPool) {
        // Where the walk through the tree below an inner entry goes on.
        let mut below = None;
        while pool.num_free() < free {
            let first = |line: &BTreeSet<EvictionRank>| line.first().map(|&(_, Reverse(id))| id);
            let Some(top) = below.take().or_else(|| first(&self.leaves)).or_else(|| first(&self.inner)) else { return };
            let leaf = self.leaf_below(top);
            let before = pool.num_free();
            let parent = self.remove(leaf, pool);
            self.evicted_blocks += u64::from(pool.num_free() - before);
            if leaf != top {
                below = parent;
            }
        }
    }

    /// Drops all entries of a salt. Returns their number, or `None` if there are none.
    pub(super) fn forget(&mut self, salt: u64, pool: &mut BlockPool) -> Option<u32> {
        let root = self.roots.get(&salt).copied()?;
        let mut removed = 0;
        let mut node = self.leaf_below(root);
        while node != root {
            let Some(parent) = self.remove(node, pool) else { break };
            removed += 1;
            node = self.leaf_below(parent);
        }
        Some(removed)
    }
}

#[cfg(test)]
pub(super) mod tests;

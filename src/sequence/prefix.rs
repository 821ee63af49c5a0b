//! [`PrefixIndex`]: finds the blocks of tokens that have been computed before. Host only.
//!
//! Automatic prefix caching in the manner of [vLLM](https://arxiv.org/abs/2309.06180), with the eviction of leaves of
//! [SGLang's RadixAttention](https://arxiv.org/abs/2312.07104): full blocks are entries of a tree, found by a chain of hashes
//! over the tokens from the start of the sequence. A hash only says where to look. What decides is the entry's parent and its
//! tokens, so sequences with equal hashes never mix.
//!
//! An entry has a block of each group of layers. In a group with a window it may have none, because it had left the window before anybody published it,
//! or has been evicted by itself: what comes after can still be found, as in [vLLM's hybrid KV cache manager](https://docs.vllm.ai). A match ends where
//! each group has all the blocks that the next token sees.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};

use super::pool::BlockPool;
use super::table::BlockTable;
use crate::ids::{BlockId, SequenceId};
use crate::layout::{KvCacheConfig, LayerGroups, Retention};

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

/// An unused block's rank in the order of eviction: since when nobody has used it. Of blocks that became unused together, those of the newest entry
/// go first, which is deeper in the tree than its ancestors, and of an entry's blocks those of groups with a window, which can go alone.
type EvictionRank = (u64, Reverse<NodeId>, NeedsAll, usize);
/// Whether a group of layers has no window, and so needs all blocks of a prefix.
type NeedsAll = bool;

/// A full block of tokens.
#[derive(Debug)]
struct Entry {
    /// Another entry, or the root of its salt.
    parent: NodeId,
    salt: u64,
    hash: u64,
    tokens: Box<[u32]>,
    /// Of each group of layers. Those of groups without a window are there.
    blocks: Box<[Held]>,
}

/// A block of an entry; null if it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    block: BlockId,
    /// Set while no sequence holds the block.
    unused_since: Option<u64>,
}

impl Held {
    const NONE: Self = Self { block: BlockId::NULL, unused_since: None };
}

impl Entry {
    /// Whether it has no block at all, and is there for its children only.
    fn is_empty(&self) -> bool {
        self.blocks.iter().all(|held| held.block.is_null())
    }
}

/// A run of full blocks that were found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Of each group of layers: those that the next token sees, and null in the places of the others.
    pub(super) tables: Vec<Vec<BlockId>>,
    /// Tokens.
    pub(super) len: u32,
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
    /// Of each group of layers.
    needs_all: Box<[NeedsAll]>,
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
    /// Unused blocks without which everything else is still found: those of entries without children, and those of groups with a window.
    leaves: BTreeSet<EvictionRank>,
    /// Unused blocks of entries with children, of groups without a window.
    inner: BTreeSet<EvictionRank>,
    next_id: NodeId,
    /// Counts the changes from used to unused.
    clock: u64,
    lookups: u64,
    queried_tokens: u64,
    hit_tokens: u64,
    evicted_blocks: u64,
}

impl PrefixIndex {
    pub(super) fn new(groups: &LayerGroups) -> Self {
        let needs_all = groups.as_slice().iter().map(|group| group.window.is_none()).collect();
        Self::with_hash(needs_all, chain_hash)
    }

    fn with_hash(needs_all: Box<[NeedsAll]>, chain_hash: ChainHash) -> Self {
        Self {
            needs_all,
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
        Self::with_hash(self.needs_all.clone(), self.chain_hash)
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

    /// The longest run of blocks that `tokens` begin with and that a sequence can go on from. Counts as a lookup.
    pub(super) fn find(&mut self, tokens: &[u32], salt: u64, config: &KvCacheConfig) -> Found {
        let found = self.look(tokens, salt, config);
        self.lookups += 1;
        self.queried_tokens += tokens.len() as u64;
        self.hit_tokens += u64::from(found.len);
        found
    }

    /// [`PrefixIndex::find`] that doesn't count.
    pub(super) fn look(&self, tokens: &[u32], salt: u64, config: &KvCacheConfig) -> Found {
        let mut place = self.root(salt);
        let mut chain = Vec::new();
        if place.node.is_some() {
            for tokens in tokens.chunks_exact(config.block_size as usize) {
                place = self.next(place, tokens);
                let Some(entry) = place.node.and_then(|id| self.entries.get(&id)) else { break };
                chain.push(entry);
            }
        }
        let count = usable(&chain, config);
        // At most the length of a sequence that was published.
        let len = count as u32 * config.block_size;
        let table = |(group, retention): (usize, Retention)| {
            let hidden = retention.hidden_blocks(len);
            let block = |(place, entry): (u32, &&Entry)| {
                if hidden.contains(&place) { BlockId::NULL } else { entry.blocks[group].block }
            };
            (0..).zip(&chain[..count]).map(block).collect()
        };
        Found { tables: config.retentions().enumerate().map(table).collect(), len }
    }

    /// Makes entries of the full blocks of `tokens` that have none yet, and takes a reference on each; `tables` are those of the sequence
    /// that holds the tokens. Blocks that are null are left out; entries that lack one get it. Where the sequence has a block and the index has one already,
    /// that counts as used now. Returns the number of new blocks.
    pub(super) fn publish(
        &mut self,
        tokens: &[u32],
        salt: u64,
        block_size: u32,
        tables: &[BlockTable],
        pool: &mut BlockPool,
    ) -> u32 {
        self.clock += 1;
        let at = |place: usize| tables.iter().map(move |table| table.blocks()[place]);
        let chunks = tokens.chunks_exact(block_size as usize);
        // Behind the last block that is there entries would have nothing to be found.
        let last = (0..chunks.len()).rev().find(|&place| at(place).any(|block| !block.is_null()));
        let mut place = self.root(salt);
        let mut added = 0;
        for (i, tokens) in chunks.enumerate().take(last.map_or(0, |last| last + 1)) {
            let parent = place.node;
            place = self.next(place, tokens);
            let id = place.node.unwrap_or_else(|| {
                let parent = parent.unwrap_or_else(|| {
                    let root = self.new_id();
                    self.roots.insert(salt, root);
                    root
                });
                self.insert(parent, salt, place.hash, tokens)
            });
            place.node = Some(id);
            for (group, block) in at(i).enumerate().filter(|(_, block)| !block.is_null()) {
                let held = self.entries.get(&id).map_or(Held::NONE, |entry| entry.blocks[group]);
                if held.unused_since.is_some() {
                    self.set_unused_since(id, group, Some(self.clock));
                } else if held.block.is_null() {
                    let is_held = pool.retain_indexed(block);
                    debug_assert!(is_held, "a sequence holds its blocks");
                    self.set_block(id, group, block);
                    added += 1;
                }
            }
        }
        added
    }

    fn new_id(&mut self) -> NodeId {
        let id = self.next_id;
        self.next_id.0 += 1;
        id
    }

    /// An entry without blocks.
    fn insert(&mut self, parent: NodeId, salt: u64, hash: u64, tokens: &[u32]) -> NodeId {
        let id = self.new_id();
        let blocks = vec![Held::NONE; self.needs_all.len()].into();
        self.entries.insert(id, Entry { parent, salt, hash, tokens: tokens.into(), blocks });
        self.by_hash.entry(hash).or_default().push(id);
        self.relink(parent, |edges| edges.insert((parent, id)));
        id
    }

    /// Gives an entry a block, of which the caller has taken a reference.
    fn set_block(&mut self, id: NodeId, group: usize, block: BlockId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.blocks[group] = Held { block, unused_since: None };
            self.by_block.insert((block, id));
        }
    }

    /// Takes a block from an entry, and its reference.
    fn drop_block(&mut self, id: NodeId, group: usize, pool: &mut BlockPool) {
        self.set_unused_since(id, group, None);
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Held { block, .. } = std::mem::replace(&mut entry.blocks[group], Held::NONE);
        if !block.is_null() {
            self.by_block.remove(&(block, id));
            let held = pool.release_indexed(block);
            debug_assert!(held, "the index holds its blocks");
        }
    }

    /// Drops an entry without children and its references on blocks. Returns its parent.
    fn remove(&mut self, id: NodeId, pool: &mut BlockPool) -> Option<NodeId> {
        for group in 0..self.needs_all.len() {
            self.drop_block(id, group, pool);
        }
        let Entry { parent, salt, hash, .. } = self.entries.remove(&id)?;
        if let Some(ids) = self.by_hash.get_mut(&hash) {
            ids.retain(|&other| other != id);
            if ids.is_empty() {
                self.by_hash.remove(&hash);
            }
        }
        self.relink(parent, |edges| edges.remove(&(parent, id)));
        if self.first_child(parent).is_none() && !self.entries.contains_key(&parent) {
            self.roots.remove(&salt);
        }
        Some(parent)
    }

    /// [`Self::remove`], and of its ancestors those that are there for nothing then. Returns the first one that stays.
    fn remove_branch(&mut self, id: NodeId, pool: &mut BlockPool) -> Option<NodeId> {
        let mut parent = self.remove(id, pool)?;
        while self.first_child(parent).is_none() && self.entries.get(&parent).is_some_and(Entry::is_empty) {
            parent = self.remove(parent, pool)?;
        }
        Some(parent)
    }

    /// Changes the edges below an entry (or a root). It may have children afterwards that it had not, or none any more, which its unused blocks' places
    /// in the lines depend on.
    fn relink(&mut self, id: NodeId, change: impl FnOnce(&mut BTreeSet<(NodeId, NodeId)>) -> bool) {
        let since = |held: &Held| held.unused_since;
        let since: Vec<_> = self.entries.get(&id).map_or_else(Vec::new, |e| e.blocks.iter().map(since).collect());
        (0..since.len()).for_each(|group| self.set_unused_since(id, group, None));
        change(&mut self.edges);
        since.into_iter().enumerate().for_each(|(group, since)| self.set_unused_since(id, group, since));
    }

    /// Puts a block of an entry into the line for eviction, moves it there, or takes it out. Does nothing for a root.
    fn set_unused_since(&mut self, id: NodeId, group: usize, since: Option<u64>) {
        let has_children = self.first_child(id).is_some();
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let needs_all = self.needs_all[group];
        let line = if has_children && needs_all { &mut self.inner } else { &mut self.leaves };
        let rank = |since| (since, Reverse(id), needs_all, group);
        if let Some(before) = std::mem::replace(&mut entry.blocks[group].unused_since, since) {
            line.remove(&rank(before));
        }
        if let Some(since) = since {
            line.insert(rank(since));
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

    /// The entries that have a block, each with the group of layers whose it is.
    fn holders(&self, block: BlockId) -> Vec<(NodeId, usize)> {
        let ids = self.by_block.range((block, NodeId::MIN)..=(block, NodeId::MAX)).map(|&(_, id)| id);
        let group_of = |id: NodeId| self.entries.get(&id)?.blocks.iter().position(|held| held.block == block);
        ids.filter_map(|id| Some((id, group_of(id)?))).collect()
    }

    /// Learns which blocks are used and which are not. Everything that changed since the last call became so at the same time.
    pub(super) fn settle(&mut self, pool: &mut BlockPool) {
        self.clock += 1;
        for block in pool.take_changed() {
            let since = pool.is_reclaimable(block).then_some(self.clock);
            for (id, group) in self.holders(block) {
                self.set_unused_since(id, group, since);
            }
        }
    }

    /// The contents of the block `from` are in `to` from now on.
    pub(super) fn rename(&mut self, from: BlockId, to: BlockId) {
        for (id, group) in self.holders(from) {
            self.by_block.remove(&(from, id));
            self.by_block.insert((to, id));
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.blocks[group].block = to;
            }
        }
    }

    /// Gives blocks up, those that have been unused for the longest time, until the pool has `free` free ones or
    /// there is nothing more to give up. Children go before their parents.
    ///
    /// Without a block of a group that needs all, nothing is found that comes after it: the entry goes, with what it has of other groups. A block of a
    /// group with a window goes alone.
    ///
    /// A parent can be unused while its child is not: a sequence that had blocks of its own for tokens that were indexed
    /// already has published what comes after them. Such children lose their entries, but only when all unused leaves are gone.
    pub(super) fn evict(&mut self, free: u32, pool: &mut BlockPool) {
        // Where the walk through the tree below an inner entry goes on.
        let mut below = None;
        while pool.num_free() < free {
            let before = pool.num_free();
            let leaf = self.leaves.first().copied().filter(|_| below.is_none());
            if let Some((_, Reverse(id), needs_all, group)) = leaf {
                self.drop_block(id, group, pool);
                let is_done = needs_all || self.entries.get(&id).is_some_and(Entry::is_empty);
                if is_done && self.first_child(id).is_none() {
                    self.remove_branch(id, pool);
                }
            } else {
                let first = || self.inner.first().map(|&(_, Reverse(id), ..)| id);
                let Some(top) = below.take().or_else(first) else { return };
                let leaf = self.leaf_below(top);
                let parent = self.remove_branch(leaf, pool);
                below = parent.filter(|_| leaf != top);
            }
            self.evicted_blocks += u64::from(pool.num_free() - before);
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

/// How many entries of a chain a sequence can go on behind: each group has all blocks of them that the next token sees.
fn usable(chain: &[&Entry], config: &KvCacheConfig) -> usize {
    let mut is_usable = vec![true; chain.len() + 1];
    for (group, retention) in config.retentions().enumerate() {
        let sinks = retention.blocks_for(retention.sink_tokens);
        // Whether the sinks' blocks are all there, and the last block behind them that is not.
        let (mut has_sinks, mut last_null) = (true, None);
        for (place, entry) in (0..).zip(chain) {
            if entry.blocks[group].block.is_null() {
                has_sinks &= place >= sinks;
                last_null = Some(place).filter(|_| place >= sinks).or(last_null);
            }
            let count = place + 1;
            let seen_from = retention.hidden_blocks(count * config.block_size).end;
            is_usable[count as usize] &= has_sinks && last_null.is_none_or(|place| place < seen_from);
        }
    }
    is_usable.iter().rposition(|&is_usable| is_usable).unwrap_or(0)
}

#[cfg(test)]
pub(super) mod tests;

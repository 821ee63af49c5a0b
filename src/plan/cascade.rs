//! Cascade attention: blocks that several sequences share are read once for all of them.
//!
//! The keys of a sequence are cut where the company that shares its blocks changes. Queries of all sharers go through a shared run of keys as rows of
//! one tile, and each sequence's own keys are computed as ever; the merge kernel joins the states, as it joins those of split ranges.
//! (Juravsky et al. 2024, Hydragen; Ye et al. 2024, cascade inference in FlashInfer. Runs of any depth are found, not only one common prefix.)

use std::collections::BTreeMap;
use std::ops::Range;

use super::shape::PlanShape;
use crate::sequence::Batch;

/// When it pays to read shared blocks once: what decides is arithmetic and dispatches, which differ between adapters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CascadePolicy {
    /// What a tile of the prefill kernel costs per key, however few of its rows are used: in keys of the decode kernel. At least 0.
    pub tile_cost: f32,
    /// The least that a shared run must save to be worth its states and, perhaps, a dispatch: keys of the decode kernel times KV heads times the mean of
    /// `head_dim` and `value_dim`.
    pub min_saved: u64,
}

/// Branchings, one after another, up to which runs are looked for: every level sorts what is left, and each run that a sequence is in is one more
/// state to merge. Deeper trees of forks keep what was found up to there.
const MAX_DEPTH: u32 = 16;

/// Blocks that some entries of a batch share, at the same place of their tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SharedRun {
    /// Which blocks of the tables.
    pub(super) blocks: Range<u32>,
    /// The entries, ascending.
    pub(super) entries: Vec<usize>,
}

impl SharedRun {
    /// The keys in these blocks.
    pub(super) fn keys(&self, block_size: u32) -> (u32, u32) {
        (self.blocks.start * block_size, self.blocks.end * block_size)
    }
}

/// Runs of the same first block, all of whose entries have their states in the workspace at the same time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cluster {
    /// From the front of the tables on: those of an entry follow one another without a gap.
    pub(super) runs: Vec<SharedRun>,
    /// All entries of the runs, and where the keys begin that are in none of theirs.
    pub(super) entries: BTreeMap<usize, u32>,
}

/// Runs that are worth it. Every entry is in at most one cluster.
pub(super) fn clusters(shape: &PlanShape, policy: &CascadePolicy, batch: &Batch) -> Vec<Cluster> {
    // Every visible key must be visible to all rows of a tile, wherever their tokens stand.
    if shape.window.is_some() || shape.block_size == 0 {
        return Vec::new();
    }
    let finder = Finder { shape, policy, batch };
    let mut entries: Vec<usize> = (0..batch.entries.len()).filter(|&i| finder.takes_part(i)).collect();
    entries.sort_by_key(|&i| (finder.block(i, 0), i));
    let same_first = entries.chunk_by(|&a, &b| finder.block(a, 0) == finder.block(b, 0));
    let mut clusters = Vec::new();
    for entries in same_first {
        let mut cluster = Cluster::default();
        finder.find(entries, 0, 0, MAX_DEPTH, &mut cluster.runs);
        for run in &cluster.runs {
            // Later runs of an entry lie behind earlier ones.
            cluster.entries.extend(run.entries.iter().map(|&i| (i, run.keys(shape.block_size).1)));
        }
        if !cluster.runs.is_empty() {
            clusters.push(cluster);
        }
    }
    clusters
}

struct Finder<'a> {
    shape: &'a PlanShape,
    policy: &'a CascadePolicy,
    batch: &'a Batch,
}

impl Finder<'_> {
    /// Blocks of an entry that hold nothing but keys which were cached before this step: those that may be shared.
    fn table(&self, entry: usize) -> &[u32] {
        let entry = &self.batch.entries[entry];
        let table = &self.batch.tables[entry.table.clone()];
        &table[..table.len().min((entry.context_len / self.shape.block_size) as usize)]
    }

    fn block(&self, entry: usize, at: usize) -> u32 {
        self.table(entry)[at]
    }

    fn rows(&self, entry: usize) -> u64 {
        u64::from(self.batch.entries[entry].query_len) * u64::from(self.shape.group_size)
    }

    /// Entries that fill tiles of their own gain nothing.
    fn takes_part(&self, entry: usize) -> bool {
        !self.table(entry).is_empty() && self.rows(entry) < u64::from(self.shape.tile_q)
    }

    /// What a key costs these entries one by one, less what it costs them together.
    fn saved_per_key(&self, entries: &[usize]) -> f64 {
        let tile = f64::from(self.policy.tile_cost);
        let alone: f64 =
            entries.iter().map(|&i| if self.shape.uses_decode(&self.batch.entries[i]) { 1.0 } else { tile }).sum();
        let rows: u64 = entries.iter().map(|&i| self.rows(i)).sum();
        alone - tile * rows.div_ceil(self.shape.tile_q.into()) as f64
    }

    /// Finds runs of entries whose tables are equal up to block `equal`, of which those from `from` on are in no run yet.
    fn find(&self, entries: &[usize], from: usize, equal: usize, depth: u32, runs: &mut Vec<SharedRun>) {
        let [first, others @ ..] = entries else { return };
        if others.is_empty() || depth == 0 {
            return;
        }
        // Where the first of them leaves the others.
        let table = self.table(*first);
        let shared = others.iter().fold(table.len(), |shared, &other| {
            let both = table[equal..shared].iter().zip(self.table(other).get(equal..).unwrap_or_default());
            equal + both.take_while(|(a, b)| a == b).count()
        });
        let keys = ((shared - from) as u64 * u64::from(self.shape.block_size)) as f64;
        let &PlanShape { num_kv_heads, head_dim, value_dim, .. } = self.shape;
        let elements = f64::from(num_kv_heads) * (f64::from(head_dim) + f64::from(value_dim)) / 2.0;
        let saved = self.saved_per_key(entries) * keys * elements;
        let pays = saved > 0.0 && saved >= self.policy.min_saved as f64;
        if pays {
            let mut entries = entries.to_vec();
            entries.sort_unstable();
            runs.push(SharedRun { blocks: from as u32..shared as u32, entries });
        }
        // A run that doesn't pay for all may pay for some of them, together with what they share beyond it.
        let from = if pays { shared } else { from };
        let mut longer: Vec<usize> = entries.iter().copied().filter(|&i| self.table(i).len() > shared).collect();
        longer.sort_by_key(|&i| (self.block(i, shared), i));
        for entries in longer.chunk_by(|&a, &b| self.block(a, shared) == self.block(b, shared)) {
            self.find(entries, from, shared + 1, depth - 1, runs);
        }
    }
}

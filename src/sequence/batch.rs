//! [`Batch`]: a validated ragged batch, as plain data.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::tree::TokenTree;

/// One sequence of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchEntry {
    /// New tokens, at least 1.
    pub query_len: u32,
    /// Tokens that were cached before.
    pub context_len: u32,
    /// Where in [`Batch::tables`] the blocks of the sequence stand; they hold all of `seq_len`.
    pub table: Range<usize>,
    /// Which kernel computes its queries.
    pub kernel: QueryKernel,
    /// How the new tokens branch: as many as `query_len`. `None`: each follows the one before it.
    pub tree: Option<Arc<TokenTree>>,
}

/// Which attention kernel computes the new tokens of a sequence. The two round differently, so whoever wants the same bits for a token however it
/// comes to the cache (alone, in a chunk, as a draft, computed again) says which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum QueryKernel {
    /// Whichever is faster: decode for a single token, prefill for more.
    #[default]
    Fastest,
    /// The prefill kernel, also for a single token.
    Prefill,
    /// The decode kernel, token by token: each reads the keys for itself. Where the group is too large for that kernel, prefill.
    Decode,
}

impl BatchEntry {
    /// Positions of the new tokens.
    pub fn positions(&self) -> impl Iterator<Item = u32> {
        let depth = |i: u32| self.tree.as_ref().and_then(|tree| tree.depths().get(i as usize).copied()).unwrap_or(i);
        (0..self.query_len).map(move |i| self.context_len.saturating_add(depth(i)))
    }

    /// `context_len + query_len`; saturates.
    #[must_use]
    pub fn seq_len(&self) -> u32 {
        self.context_len.saturating_add(self.query_len)
    }
}

/// A ragged batch: the new tokens of all sequences stand one after another in q, k, v and out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The sequences, in the order of their tokens.
    pub entries: Vec<BatchEntry>,
    /// Block ids of all entries, one table after another.
    pub tables: Vec<u32>,
}

impl Batch {
    /// New tokens of all sequences; saturates.
    #[must_use]
    pub fn num_tokens(&self) -> u32 {
        self.entries.iter().fold(0, |sum: u32, entry| sum.saturating_add(entry.query_len))
    }

    /// Exclusive prefix sum of the query lengths, `entries.len() + 1` values: sequence `i` owns the tokens
    /// `query_start[i] .. query_start[i + 1]`.
    #[must_use]
    pub fn query_start(&self) -> Vec<u32> {
        let mut start = 0;
        let mut starts = Vec::with_capacity(self.entries.len() + 1);
        for entry in &self.entries {
            starts.push(start);
            start = u32::saturating_add(start, entry.query_len);
        }
        starts.push(start);
        starts
    }

    /// Whether the new tokens of some sequence branch.
    #[must_use]
    pub fn has_trees(&self) -> bool {
        self.entries.iter().any(|entry| entry.tree.is_some())
    }

    /// The same work with an entry of its own for every token that the decode kernel shall compute.
    pub(crate) fn by_kernel(&self) -> Cow<'_, Self> {
        let is_cut = |entry: &BatchEntry| entry.kernel == QueryKernel::Decode && entry.query_len > 1;
        if !self.entries.iter().any(is_cut) {
            return Cow::Borrowed(self);
        }
        let entries = self.entries.iter().flat_map(|entry| {
            let (pieces, query_len) = if is_cut(entry) { (entry.query_len, 1) } else { (1, entry.query_len) };
            (0..pieces).map(move |i| BatchEntry { query_len, context_len: entry.context_len + i, ..entry.clone() })
        });
        Cow::Owned(Self { entries: entries.collect(), tables: self.tables.clone() })
    }
}

//! [`Batch`]: a validated ragged batch, as plain data.

use std::ops::Range;

/// One sequence of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchEntry {
    /// New tokens, at least 1.
    pub query_len: u32,
    /// Tokens that were cached before.
    pub context_len: u32,
    /// Where in [`Batch::tables`] the blocks of the sequence stand; they hold all of `seq_len`.
    pub table: Range<usize>,
}

impl BatchEntry {
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
}

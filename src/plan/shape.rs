//! [`PlanShape`]: which rows see which keys.

use std::ops::Range;

use super::cascade::SharedRun;
use crate::error::{Error, Result};
use crate::sequence::{Batch, BatchEntry, QueryKernel};

/// Shapes and options that a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanShape {
    /// Heads of K and V.
    pub num_kv_heads: u32,
    /// Query heads per KV head.
    pub group_size: u32,
    /// Elements of a query and of a key.
    pub head_dim: u32,
    /// Elements of a value and of a result.
    pub value_dim: u32,
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
    /// Newest keys that a query sees, its own position included.
    pub window: Option<u32>,
    /// First keys that it sees besides.
    pub sink_tokens: u32,
    /// Whether single-token sequences go to the decode kernel.
    pub has_decode: bool,
    /// Query rows of a prefill tile.
    pub tile_q: u32,
    /// Keys of a block.
    pub block_size: u32,
}

/// Some tokens of an entry, as an entry.
pub(super) fn part_of(entry: &BatchEntry, tokens: &Range<u32>) -> BatchEntry {
    let (query_len, context_len) = (tokens.end - tokens.start, entry.context_len + tokens.start);
    BatchEntry { query_len, context_len, ..entry.clone() }
}

/// A tile of query rows of one sequence and the keys that it sees.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) row_start: u32,
    pub(super) keys: (u32, u32),
}

/// The range that covers all the given ones.
pub(super) fn key_range(keys: impl Iterator<Item = (u32, u32)>) -> (u32, u32) {
    keys.fold((u32::MAX, 0), |(begin, end), k| (begin.min(k.0), end.max(k.1)))
}

impl PlanShape {
    /// Checks what the arithmetic of plans and kernels relies on.
    pub(super) fn check(&self, batch: &Batch) -> Result<()> {
        if self.window == Some(0) {
            return Err(Error::argument("window", 0, "at least 1, or None"));
        }
        if self.num_kv_heads == 0 || self.group_size == 0 || self.tile_q == 0 {
            return Err(Error::argument("shape", format!("{self:?}"), "at least 1 head, and 1 row of a tile"));
        }
        let mut num_tokens = 0_u64;
        for (i, entry) in batch.entries.iter().enumerate() {
            let len = entry.context_len.checked_add(entry.query_len);
            let fits = entry.query_len > 0 && len.is_some_and(|len| len <= i32::MAX as u32);
            let is_whole = entry.tree.as_ref().is_none_or(|tree| tree.len() == entry.query_len);
            if !is_whole || !fits || entry.table.end > batch.tables.len() || entry.table.start >= entry.table.end {
                let rule =
                    "new tokens, fewer than 2^31 in all, a table in the batch, and a tree of all new tokens or none";
                return Err(Error::argument("batch", format!("{entry:?} as sequence {i}"), rule));
            }
            num_tokens += u64::from(entry.query_len);
        }
        let heads = u64::from(self.num_kv_heads) * u64::from(self.group_size);
        // Rows (token, query head) are numbered with u32.
        if num_tokens.checked_mul(heads).is_none_or(|rows| rows > u64::from(u32::MAX)) {
            let got = format!("{num_tokens} tokens of {heads} query heads");
            return Err(Error::argument("step", got, "fewer than 2^32 rows (tokens times query heads)"));
        }
        Ok(())
    }

    /// Multiply-adds of a key with the rows of an item, over all KV heads.
    pub(super) fn key_work(&self, rows: u32) -> u64 {
        let row = (u64::from(self.head_dim) + u64::from(self.value_dim)) * u64::from(self.num_kv_heads);
        row.saturating_mul(rows.into())
    }

    pub(super) fn uses_decode(&self, entry: &BatchEntry) -> bool {
        self.has_decode && entry.query_len == 1 && entry.kernel != QueryKernel::Prefill
    }

    /// Rows of a tile of a sequence: all that there are, or as many as a prefill workgroup has.
    pub(super) fn tile_rows(&self, entry: &BatchEntry) -> u32 {
        if self.uses_decode(entry) { self.group_size } else { self.tile_q }
    }

    /// Tiles of a sequence and their keys from `own_begin` on, the one with the most keys first: long workgroups that start last would run alone
    /// at the end.
    pub(super) fn tiles(
        &self,
        entry: &BatchEntry,
        tile_rows: u32,
        own_begin: u32,
    ) -> impl Iterator<Item = Tile> + Clone {
        let (shape, entry) = (*self, entry.clone());
        let rows = entry.query_len * self.group_size;
        (0..rows.div_ceil(tile_rows)).rev().map(move |tile| {
            let row_start = tile * tile_rows;
            let row_end = row_start.saturating_add(tile_rows).min(rows);
            let (begin, end) = shape.visible(&entry, row_start, row_end);
            let begin = begin.max(own_begin);
            // All that the tile sees may be before `own_begin`.
            Tile { row_start, keys: (begin, end.max(begin)) }
        })
    }

    /// Rows of all tokens of the entries of a run.
    pub(super) fn run_rows(&self, run: &SharedRun, batch: &Batch) -> u32 {
        run.entries.iter().map(|&i| batch.entries[i].query_len).sum::<u32>() * self.group_size
    }

    /// Range of the keys that any of the rows can see.
    fn visible(&self, entry: &BatchEntry, row_start: u32, row_end: u32) -> (u32, u32) {
        let first = entry.context_len + row_start / self.group_size;
        let last = entry.context_len + (row_end - 1) / self.group_size;
        let end = if self.causal { last + 1 } else { entry.seq_len() };
        let begin = match self.window {
            // The rows of a tree say nothing of positions: see `own_begin`.
            Some(window) if entry.tree.is_none() => (first + 1).saturating_sub(window),
            _ => 0,
        };
        (begin, end)
    }

    /// How many of an entry's first keys are planned apart, because tokens see them besides their windows: 0 if all that they see is in their
    /// windows. With a fixed grid of splits it must not depend on other tokens whether a token's sum is cut there.
    pub(super) fn separate_sinks(&self, entry: &BatchEntry, is_fixed: bool) -> u32 {
        let is_seen = self.window.is_none_or(|window| entry.seq_len() <= window && !is_fixed);
        if is_seen { 0 } else { self.sink_tokens.min(entry.seq_len()) }
    }

    /// The first key that any token of a tree can see: all of them are at least as far as the first one, a root. For others 0.
    pub(super) fn own_begin(&self, entry: &BatchEntry) -> u32 {
        match (&entry.tree, self.window) {
            (Some(_), Some(window)) => (entry.context_len + 1).saturating_sub(window),
            _ => 0,
        }
    }
}

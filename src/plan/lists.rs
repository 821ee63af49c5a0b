//! [`WorkLists`]: a batch becomes work items.

use std::borrow::Cow;
use std::ops::Range;

use super::items::{MergeItem, NO_PARTIAL, WorkItem};
use super::split::SplitPolicy;
use crate::error::{Error, Result};
use crate::sequence::{Batch, BatchEntry, QueryKernel};

/// Shapes and options that a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanShape {
    /// Heads of K and V.
    pub num_kv_heads: u32,
    /// Query heads per KV head.
    pub group_size: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
    /// Newest keys that a query sees, its own position included.
    pub window: Option<u32>,
    /// Whether single-token sequences go to the decode kernel.
    pub has_decode: bool,
    /// Query rows of a prefill tile.
    pub tile_q: u32,
}

/// Items that use the workspace at the same time. Rounds run one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Range of [`WorkLists::decode`].
    pub decode: Range<usize>,
    /// Range of [`WorkLists::prefill`].
    pub prefill: Range<usize>,
    /// Range of [`WorkLists::merge`].
    pub merge: Range<usize>,
}

/// Who computes what in one attention call of a step. The same for every layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkLists {
    /// Items of the decode kernel: one token, all query heads of a KV head.
    pub decode: Vec<WorkItem>,
    /// Items of the prefill kernel.
    pub prefill: Vec<WorkItem>,
    /// Items of the merge kernel.
    pub merge: Vec<MergeItem>,
    /// What runs together.
    pub rounds: Vec<Round>,
    /// Keys of a split.
    pub split_len: u32,
    /// Rows of partial states that the workspace must hold: the most of any round.
    pub num_partial_rows: u64,
}

/// Bytes of the partial state of one row: the unnormalised sum, then (max, sum, 0, 0).
#[must_use]
pub fn partial_row_bytes(head_dim: u32) -> u64 {
    (u64::from(head_dim) + 4) * 4
}

/// An offset in an upload, in words.
fn checked(offset: u64) -> Result<u32> {
    u32::try_from(offset).map_err(|_| Error::argument("step", format!("offset {offset}"), "offsets below 2^32 words"))
}

/// A tile of query rows of one sequence and the keys that it sees.
#[derive(Clone, Copy)]
struct Tile {
    row_start: u32,
    keys: (u32, u32),
}

/// The range that covers all the given ones.
fn key_range(keys: impl Iterator<Item = (u32, u32)>) -> (u32, u32) {
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
            if !fits || entry.table.end > batch.tables.len() || entry.table.start >= entry.table.end {
                let rule = "new tokens, fewer than 2^31 in all, and a table in the batch";
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

    fn uses_decode(&self, entry: &BatchEntry) -> bool {
        self.has_decode && entry.query_len == 1 && entry.kernel != QueryKernel::Prefill
    }

    /// Rows of a tile of a sequence: all that there are, or as many as a prefill workgroup has.
    fn tile_rows(&self, entry: &BatchEntry) -> u32 {
        if self.uses_decode(entry) { self.group_size } else { self.tile_q }
    }

    /// Tiles of a sequence, the one with the most keys first: long workgroups that start last would run alone at the end.
    fn tiles(&self, entry: &BatchEntry, tile_rows: u32) -> impl Iterator<Item = Tile> + Clone {
        let (shape, entry) = (*self, entry.clone());
        let rows = entry.query_len * self.group_size;
        (0..rows.div_ceil(tile_rows)).rev().map(move |tile| {
            let row_start = tile * tile_rows;
            let row_end = row_start.saturating_add(tile_rows).min(rows);
            Tile { row_start, keys: shape.visible(&entry, row_start, row_end) }
        })
    }

    /// Range of the keys that any of the rows can see.
    fn visible(&self, entry: &BatchEntry, row_start: u32, row_end: u32) -> (u32, u32) {
        let first = entry.context_len + row_start / self.group_size;
        let last = entry.context_len + (row_end - 1) / self.group_size;
        let end = if self.causal { last + 1 } else { entry.seq_len() };
        let begin = match self.window {
            Some(window) => (first + 1).saturating_sub(window),
            None => 0,
        };
        (begin, end)
    }
}

impl WorkLists {
    /// Plans a batch.
    ///
    /// `table_offset` is where [`Batch::tables`] starts in the upload, in words; `mask_offsets` where the mask bits of each sequence
    /// start (empty if there is no mask).
    ///
    /// A sequence whose keys exceed the split length is cut on a grid of it: *all* tiles of a chunk of it get an item for every range
    /// that any of them sees, some of them empty, so that the merge kernel finds the same number of partial states for each token.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape with zeros, a sequence of no new tokens, of 2^31 tokens or more or without a table in the batch, or more
    /// rows (tokens times query heads) than fit 32 bits; for masks beside [`QueryKernel::Decode`] for several tokens.
    pub fn new(
        shape: &PlanShape,
        policy: &SplitPolicy,
        batch: &Batch,
        table_offset: u32,
        mask_offsets: &[u32],
    ) -> Result<Self> {
        shape.check(batch)?;
        let batch = batch.by_kernel();
        if matches!(batch, Cow::Owned(_)) && !mask_offsets.is_empty() {
            let got = "some beside tokens for the decode kernel one by one";
            return Err(Error::argument("masks", got, "none, or another kernel"));
        }
        let split_len = policy.split_len(
            batch.entries.iter().flat_map(|e| shape.tiles(e, shape.tile_rows(e))).map(|t| t.keys.1 - t.keys.0),
            shape.num_kv_heads,
        );
        let mut plan = Self { split_len, ..Self::default() };
        // Rows of partial states are numbered with u32.
        let max_rows = (policy.max_workspace_bytes / partial_row_bytes(shape.head_dim)).clamp(1, u32::MAX.into());
        // Long prefill tiles first, over all sequences, for the same reason as within one.
        let mut order: Vec<usize> = (0..batch.entries.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(batch.entries[i].seq_len()));
        let starts = batch.query_start();
        let mut round = Round::default();
        let mut rows_used = 0;
        for i in order {
            let entry = &batch.entries[i];
            let base = WorkItem {
                query_start: starts[i],
                query_len: entry.query_len,
                context_len: entry.context_len,
                table_offset: checked(u64::from(table_offset) + entry.table.start as u64)?,
                part_row: NO_PARTIAL,
                mask_offset: mask_offsets.get(i).copied().unwrap_or(0),
                mask_stride: if mask_offsets.is_empty() { 0 } else { entry.seq_len().div_ceil(32) },
                ..WorkItem::default()
            };
            let decode = shape.uses_decode(entry);
            // A chunk of one token stays with the kernel of its sequence, and so do the tiles.
            let tile_rows = shape.tile_rows(entry);
            let (begin, end) = key_range(shape.tiles(entry, tile_rows).map(|t| t.keys));
            // A single short range needs no merge, wherever it lies; longer ones are cut where the grid says, so that a fixed
            // split length makes each token's sum independent of the tokens beside it.
            let direct = match policy.fixed_split_len {
                Some(_) => begin / split_len == (end - 1) / split_len,
                None => end - begin <= split_len,
            };
            if direct {
                let list = if decode { &mut plan.decode } else { &mut plan.prefill };
                list.extend(shape.tiles(entry, tile_rows).map(|t| WorkItem {
                    row_start: t.row_start,
                    kv_begin: t.keys.0,
                    kv_end: t.keys.1,
                    ..base
                }));
                continue;
            }
            // Chunks of tokens whose partial states fit into the workspace. Each is planned like a sequence of its own, with the same
            // keys and fewer queries, and is computed and merged within one round.
            let token_rows = u64::from(shape.num_kv_heads) * u64::from(shape.group_size);
            let most_splits = u64::from((end - 1) / split_len - begin / split_len + 1);
            let chunk_len = (max_rows / (token_rows * most_splits)).clamp(1, entry.query_len.into()) as u32;
            let mut chunk_start = 0;
            while chunk_start < entry.query_len {
                let chunk = BatchEntry {
                    query_len: chunk_len.min(entry.query_len - chunk_start),
                    context_len: entry.context_len + chunk_start,
                    ..entry.clone()
                };
                // Without a causal mask every query sees the keys behind its chunk as well.
                let keys = |t: Tile| if shape.causal { t.keys } else { (t.keys.0, end) };
                let (begin, end) = key_range(shape.tiles(&chunk, tile_rows).map(keys));
                let (first, last) = (begin / split_len, (end - 1) / split_len);
                let num_splits = last - first + 1;
                let rows = chunk.query_len * shape.group_size;
                let need = token_rows * u64::from(chunk.query_len) * u64::from(num_splits);
                if rows_used + need > max_rows && rows_used > 0 {
                    let done = plan.close(&mut round);
                    plan.rounds.push(done);
                    rows_used = 0;
                }
                if rows_used + need > u64::from(u32::MAX) {
                    let need = format!("{} rows of partial states", rows_used + need);
                    return Err(Error::unsupported("attention workspace", need, "fewer than 2^32"));
                }
                let part_row = rows_used as u32;
                let split_stride = shape.num_kv_heads * rows;
                let base = WorkItem {
                    query_start: base.query_start + chunk_start,
                    query_len: chunk.query_len,
                    context_len: chunk.context_len,
                    mask_offset: checked(
                        u64::from(base.mask_offset) + u64::from(chunk_start) * u64::from(base.mask_stride),
                    )?,
                    ..base
                };
                let list = if decode { &mut plan.decode } else { &mut plan.prefill };
                for tile in shape.tiles(&chunk, tile_rows) {
                    let (tile_begin, tile_end) = keys(tile);
                    list.extend((0..num_splits).map(|split| {
                        let grid = (first + split) * split_len;
                        WorkItem {
                            row_start: tile.row_start,
                            kv_begin: grid.max(tile_begin),
                            kv_end: grid.saturating_add(split_len).min(tile_end),
                            part_row: part_row + split * split_stride,
                            ..base
                        }
                    }));
                }
                plan.merge.extend((0..chunk.query_len).map(|token| MergeItem {
                    token: base.query_start + token,
                    part_row: part_row + token * shape.group_size,
                    num_splits,
                    split_stride,
                    head_stride: rows,
                    ..MergeItem::default()
                }));
                rows_used += need;
                plan.num_partial_rows = plan.num_partial_rows.max(rows_used);
                chunk_start += chunk.query_len;
            }
        }
        let last = plan.close(&mut round);
        plan.rounds.push(last);
        Ok(plan)
    }

    /// Ends the round at the lists' present ends and starts the next one there.
    fn close(&self, round: &mut Round) -> Round {
        let done = Round {
            decode: round.decode.start..self.decode.len(),
            prefill: round.prefill.start..self.prefill.len(),
            merge: round.merge.start..self.merge.len(),
        };
        round.decode = done.decode.end..done.decode.end;
        round.prefill = done.prefill.end..done.prefill.end;
        round.merge = done.merge.end..done.merge.end;
        done
    }
}

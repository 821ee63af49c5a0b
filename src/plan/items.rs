//! Work items, as the kernels read them.

use bytemuck::{Pod, Zeroable};

/// Where the running maximum of logits (in units of log2) starts. Logits and sinks stay within half of it, so that no difference of two of them
/// and the floor overflows.
pub const LOGIT_FLOOR: f32 = -1.701_411_8e38;

/// Marks a work item that is alone: it writes its result, not a partial state.
pub const NO_PARTIAL: u32 = u32::MAX;

/// [`WorkItem::mask_begin`] of an item without a mask: no key is as far as that.
pub const NO_MASK: u32 = i32::MAX as u32;

/// Set in [`WorkItem::mask_begin`] if the mask is a [`TokenTree`](crate::sequence::TokenTree)'s, whose queries' positions don't follow from their
/// rows: a row of it says what the window shows.
pub const TREE_MASK: u32 = 1 << 31;

/// Work of one workgroup per KV head: a tile of query rows against a range of keys. The layout is the kernels'.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct WorkItem {
    /// First token of the sequence in q, out and lse.
    pub query_start: u32,
    /// New tokens of the sequence.
    pub query_len: u32,
    /// Cached tokens: query token `i` is at position `context_len + i`.
    pub context_len: u32,
    /// First row of the tile; the rows of a sequence are `token * group_size + head_in_group`.
    pub row_start: u32,
    /// First key.
    pub kv_begin: u32,
    /// End of the keys, exclusive. Not above `kv_begin`: nothing to see, only an empty state is written.
    pub kv_end: u32,
    /// Where the sequence's block table starts, in words of the upload.
    pub table_offset: u32,
    /// Row index of the partial state of KV head 0, row 0, or [`NO_PARTIAL`].
    pub part_row: u32,
    /// Where the sequence's mask bits start, in words of the upload.
    pub mask_offset: u32,
    /// Words of the mask per token.
    pub mask_stride: u32,
    /// Where the tokens of the rows stand, in words of the upload: row `r` is of the `r / group_size`-th. 0: of token `query_start + r / group_size`.
    pub tokens_offset: u32,
    /// The first key that the mask has a bit for: those before it are not hidden by it. [`NO_MASK`], or with [`TREE_MASK`] beside the number.
    pub mask_begin: u32,
}

/// Merging the partial states of one token: one workgroup per query head. The layout is the merge kernel's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MergeItem {
    /// Row in out and lse.
    pub token: u32,
    /// Row index of the partial state of split 0, KV head 0, first head of the group.
    pub part_row: u32,
    /// Number of splits.
    pub num_splits: u32,
    /// Partial rows from one split to the next.
    pub split_stride: u32,
    /// Partial rows from one KV head to the next.
    pub head_stride: u32,
    /// How many items further on more states of the token are described. 0: there are no more.
    pub next: u32,
    /// Keeps items two `vec4<u32>` long.
    pub reserved: [u32; 2],
}

/// Words of a [`WorkItem`].
pub const WORK_ITEM_WORDS: u32 = size_of::<WorkItem>() as u32 / 4;
/// Words of a [`MergeItem`].
pub const MERGE_ITEM_WORDS: u32 = size_of::<MergeItem>() as u32 / 4;

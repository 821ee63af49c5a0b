//! [`KvLayout`]: the only place where a size or an offset in the cache is computed.

mod groups;
mod retention;
mod rows;

pub use groups::{LayerGroup, LayerGroups};
pub use retention::Retention;
pub use rows::{HostRows, RowElement, RowLayout};

use crate::error::{Error, Result};
use crate::format::KvFormat;

/// Largest head_dim and value_dim of the kernels: a latent of 512 elements and 64 rotated ones, as DeepSeek's models have.
pub const MAX_HEAD_DIM: u32 = 576;
/// Largest block_size of a paged cache, in tokens. What paging is good for shrinks as blocks grow: a sequence leaves half of its last block
/// unused on average, a prefix is shared in whole blocks, and copy-on-write copies a whole block for one token. The kernels take any size:
/// a [contiguous](KvCacheConfig::contiguous) cache has a block of `max_seq_len` tokens per sequence.
pub const MAX_BLOCK_SIZE: u32 = 256;
/// Largest num_layers. Every layer has buffers and host state of its own, so a number that nobody meant would use up the process before any
/// limit of the device is asked.
pub const MAX_NUM_LAYERS: u32 = 65_536;
/// Largest pool over all layers, in bytes: the addresses that a process has on 64-bit machines. How much memory a device really has is
/// known only to its driver, which refuses what is more than that.
pub const MAX_POOL_BYTES: u64 = 1 << 47;

/// Shape of a cache: every layer has a K side and, unless it is [latent](KvCacheConfig::latent), a V side of this geometry.
///
/// Made by [`KvCacheConfig::new`] or [`KvCacheConfig::contiguous`]; the fields may then be changed. Sizes are defined for any field values,
/// valid or not: what is beyond `u64` is `u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct KvCacheConfig {
    /// Transformer layers, each with its own K and V: 1 to 65536, a multiple of the number of [groups](Self::groups).
    pub num_layers: u32,
    /// Heads of K and V: 1 to 65535.
    pub num_kv_heads: u32,
    /// Elements of a key: a multiple of 8 from 8 to 576.
    pub head_dim: u32,
    /// Elements of a value, likewise, if there are not as many as of a key.
    pub value_dim: Option<u32>,
    /// Tokens of a block, 1 to 256; in a contiguous cache the tokens that a sequence has room for.
    pub block_size: u32,
    /// Blocks of the pool, shared by all sequences and by all groups of layers. A block has room in each layer of the group that has it.
    pub num_blocks: u32,
    /// How K is stored.
    pub k_format: KvFormat,
    /// How V is stored.
    pub v_format: KvFormat,
    /// A sequence has at most one block, which it takes with its first tokens, and can't outgrow it.
    pub contiguous: bool,
    /// There is no V side: values are the first `value_dim` elements of the keys.
    pub latent: bool,
    /// Which layers keep which tokens. With `n` groups layer `l` is in group `l / (num_layers / n)`, and one group, the default, keeps all.
    pub groups: LayerGroups,
}

impl KvCacheConfig {
    /// A paged cache of 1024 blocks of 16 tokens, with K and V in F16.
    #[must_use]
    pub const fn new(num_layers: u32, num_kv_heads: u32, head_dim: u32) -> Self {
        Self {
            num_layers,
            num_kv_heads,
            head_dim,
            value_dim: None,
            block_size: 16,
            num_blocks: 1024,
            k_format: KvFormat::F16,
            v_format: KvFormat::F16,
            contiguous: false,
            latent: false,
            groups: LayerGroups::one(LayerGroup::ALL),
        }
    }

    /// A cache of latents for multi-head latent attention (MLA), paged, in F16: one row per token and layer serves all query heads. The row is the key,
    /// its first `value_dim` elements are the value, and there is no V side.
    ///
    /// DeepSeek's models have 576 and 512: a latent `c` of 512 elements, of which projections `W_k` and `W_v` of each head would make its keys and
    /// values, and 64 rotated elements that all heads share. The projections are absorbed instead (DeepSeek-V2, Liu et al. 2024, section 2.1):
    ///
    /// ```text
    /// q . (W_k c) = (W_k^T q) . c        sum_i(p_i W_v c_i) = W_v sum_i(p_i c_i)
    /// ```
    ///
    /// So a query of the cache is `W_k^T q` followed by the rotated part of the head's query, 576 elements, and what attention yields, 512 elements, is
    /// multiplied by `W_v`. [`AttentionConfig::softmax_scale`](crate::AttentionConfig) is that of the heads before: `1 / sqrt(192)` where those have 128
    /// and 64 elements. Rows are appended by `KvCache::append_latent`.
    #[must_use]
    pub const fn latent(num_layers: u32, head_dim: u32, value_dim: u32) -> Self {
        Self { latent: true, ..Self::new(num_layers, 1, head_dim).with_value_dim(value_dim) }
    }

    /// A cache without paging, K and V in F16: each layer's K and V are `[batch, num_kv_heads, max_seq_len, head_dim]`. It is a paged cache with
    /// one block per sequence: the calls, the kernels and the results are the same, bit for bit.
    ///
    /// It is the baseline that a paged cache is compared with, and enough for an app with one or a few sequences of bounded length. Up to
    /// `batch` sequences never run out of blocks, unless one is forked, and each takes the memory of `max_seq_len` tokens whatever its length.
    #[must_use]
    pub const fn contiguous(num_layers: u32, num_kv_heads: u32, head_dim: u32, batch: u32, max_seq_len: u32) -> Self {
        let paged = Self::new(num_layers, num_kv_heads, head_dim);
        Self { block_size: max_seq_len, num_blocks: batch, contiguous: true, ..paged }
    }

    /// The same cache with another pool.
    #[must_use]
    pub const fn with_blocks(self, num_blocks: u32, block_size: u32) -> Self {
        Self { num_blocks, block_size, ..self }
    }

    /// The same cache in other formats.
    #[must_use]
    pub const fn with_formats(self, k_format: KvFormat, v_format: KvFormat) -> Self {
        Self { k_format, v_format, ..self }
    }

    /// The same cache with values of another width than keys: 128 against 192 in DeepSeek's models, before their projections are absorbed.
    #[must_use]
    pub const fn with_value_dim(self, value_dim: u32) -> Self {
        Self { value_dim: Some(value_dim), ..self }
    }

    /// The same cache for attention that sees no more than the newest `window` tokens, the query's own included: blocks that no later token can see
    /// return to the pool when their sequence goes on. A sequence of any length then takes at most [`most_blocks`](Self::most_blocks). In a cache of
    /// several groups it holds for all of them.
    #[must_use]
    pub const fn with_window(self, window: u32) -> Self {
        Self { groups: self.groups.with_window(Some(window)), ..self }
    }

    /// The same cache that keeps the first tokens of every sequence beside its window ([`LayerGroup::sink_tokens`]).
    #[must_use]
    pub const fn with_sink_tokens(self, sink_tokens: u32) -> Self {
        Self { groups: self.groups.with_sink_tokens(sink_tokens), ..self }
    }

    /// The same cache with layers that keep different tokens: see [`groups`](Self::groups).
    #[must_use]
    pub const fn with_groups(self, groups: LayerGroups) -> Self {
        Self { groups, ..self }
    }

    /// Layers of a group.
    #[must_use]
    pub const fn layers_per_group(&self) -> u32 {
        self.num_layers / self.groups.count()
    }

    /// The group of a layer.
    #[must_use]
    pub const fn group_of(&self, layer: u32) -> u32 {
        match layer.checked_div(self.layers_per_group()) {
            Some(group) => group,
            None => 0,
        }
    }

    /// Elements of a value.
    #[must_use]
    pub const fn value_dim(&self) -> u32 {
        match self.value_dim {
            Some(value_dim) => value_dim,
            None => self.head_dim,
        }
    }

    /// Tokens that a sequence has room for, in a contiguous cache.
    #[must_use]
    pub const fn max_seq_len(&self) -> Option<u32> {
        if self.contiguous { Some(self.block_size) } else { None }
    }

    /// Checks what does not depend on a device.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self) -> Result<()> {
        if self.num_layers == 0 || self.num_layers > MAX_NUM_LAYERS {
            return Err(Error::argument("num_layers", self.num_layers, "1 to 65536"));
        }
        if self.latent {
            self.validate_latent()?;
        }
        // The kernels use one workgroup row per KV head.
        if self.num_kv_heads == 0 || self.num_kv_heads > 65_535 {
            return Err(Error::argument("num_kv_heads", self.num_kv_heads, "1 to 65535"));
        }
        for (name, dim) in [("head_dim", self.head_dim), ("value_dim", self.value_dim())] {
            if dim == 0 || dim > MAX_HEAD_DIM || !dim.is_multiple_of(8) {
                return Err(Error::argument(name, dim, format!("a multiple of 8 from 8 to {MAX_HEAD_DIM}")));
            }
        }
        // Sequence lengths stay below 2^31.
        let max_block_size = if self.contiguous { i32::MAX as u32 } else { MAX_BLOCK_SIZE };
        if self.block_size == 0 || self.block_size > max_block_size {
            return Err(Error::argument("block_size", self.block_size, format!("1 to {max_block_size} tokens")));
        }
        if self.num_blocks == 0 {
            return Err(Error::argument("num_blocks", 0, "at least 1"));
        }
        self.validate_groups()?;
        // Slots (block * block_size + offset) and rows (slots of all KV heads) are numbered with u32 in the kernels, over all segments of a
        // side. What lies within a segment (elements, words) is bounded by the segment's bytes; see `storage`.
        let slots = u64::from(self.num_blocks) * u64::from(self.block_size);
        if slots > u64::from(u32::MAX) / u64::from(self.num_kv_heads) {
            let got = format!("{} ({slots} slots)", self.num_blocks);
            return Err(Error::argument("num_blocks", got, "num_blocks * block_size * num_kv_heads below 2^32"));
        }
        if self.v_format.has_channel_scales() {
            let rule = "a format without scales per channel: those are for keys";
            return Err(Error::argument("v_format", self.v_format, rule));
        }
        let pool_bytes = self.pool_bytes();
        if pool_bytes > MAX_POOL_BYTES {
            let got = format!("{} ({pool_bytes} bytes over {} layers)", self.num_blocks, self.num_layers);
            return Err(Error::argument("num_blocks", got, "a pool of at most 2^47 bytes"));
        }
        Ok(())
    }

    fn validate_groups(&self) -> Result<()> {
        for window in self.groups.as_slice().iter().filter_map(|group| group.window) {
            if window == 0 || self.contiguous {
                let got = if self.contiguous { "some in a contiguous cache".to_owned() } else { window.to_string() };
                return Err(Error::argument("window", got, "at least 1 in a paged cache, or None"));
            }
        }
        let count = self.groups.count();
        if count == 1 {
            return Ok(());
        }
        if !self.num_layers.is_multiple_of(count) {
            return Err(Error::argument("num_layers", self.num_layers, format!("a multiple of the {count} groups")));
        }
        if self.contiguous {
            return Err(Error::argument("groups", count, "1 in a contiguous cache"));
        }
        // Layers of several groups share a buffer, which has room for one table of scales.
        if self.k_format.has_channel_scales() {
            let rule = format!("a format without scales per channel in a cache of {count} groups");
            return Err(Error::argument("k_format", self.k_format, rule));
        }
        Ok(())
    }

    fn validate_latent(&self) -> Result<()> {
        if self.value_dim() > self.head_dim {
            let rule = format!("at most head_dim, {}: values are the first elements of keys", self.head_dim);
            return Err(Error::argument("value_dim", self.value_dim(), rule));
        }
        if self.v_format != self.k_format {
            let rule = format!("that of the keys, {}: values are their first elements", self.k_format);
            return Err(Error::argument("v_format", self.v_format, rule));
        }
        Ok(())
    }

    /// Layout of the K side of a layer.
    #[must_use]
    pub fn k_layout(&self) -> KvLayout {
        self.layout(self.head_dim, self.k_format)
    }

    /// Layout of the side of a layer that values are read from: K's in a latent cache.
    #[must_use]
    pub fn v_layout(&self) -> KvLayout {
        if self.latent { self.k_layout() } else { self.layout(self.value_dim(), self.v_format) }
    }

    /// Layouts of what a layer keeps: of K and, unless the cache is latent, of V.
    pub(crate) fn sides(&self) -> impl Iterator<Item = KvLayout> + use<> {
        [self.k_layout(), self.v_layout()].into_iter().take(if self.latent { 1 } else { 2 })
    }

    fn layout(&self, row_dim: u32, format: KvFormat) -> KvLayout {
        KvLayout { num_kv_heads: self.num_kv_heads, row_dim, block_size: self.block_size, format }
    }

    /// Elements of one token's rows in a layer, as a host gives them: of K, of V.
    pub(crate) fn token_elements(&self) -> [u64; 2] {
        [self.head_dim, self.value_dim()].map(|dim| u64::from(self.num_kv_heads) * u64::from(dim))
    }

    /// Bytes that one token takes over all layers, K and V.
    #[must_use]
    pub fn token_bytes(&self) -> u64 {
        let rows = u64::from(self.num_layers) * u64::from(self.num_kv_heads);
        rows.saturating_mul(self.sides().map(|side| side.token_row_bytes()).sum())
    }

    /// Bytes that one block takes over all layers of a group, K and V.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        let block = self.sides().fold(0_u64, |bytes, side| bytes.saturating_add(side.block_bytes()));
        block.saturating_mul(self.layers_per_group().into())
    }

    /// Bytes of the whole pool, tables of channel scales included.
    #[must_use]
    pub fn pool_bytes(&self) -> u64 {
        let tables = self.k_layout().channel_table_bytes().saturating_mul(self.layers_per_group().into());
        self.block_bytes().saturating_mul(self.num_blocks.into()).saturating_add(tables)
    }

    /// Blocks that the rows of `seq_len` tokens take in all groups. A block size of 0, which is not valid, counts as 1. Of these a cache with
    /// windows doesn't need those that are [hidden](Retention::hidden_blocks) in their groups.
    #[must_use]
    pub fn blocks_for(&self, seq_len: u32) -> u32 {
        self.groups.blocks_for(self.block_size, seq_len)
    }

    /// What a group keeps of a sequence, in blocks.
    #[must_use]
    pub fn retention(&self, group: u32) -> Retention {
        self.groups.get(group).retention(self.block_size)
    }

    /// [`Self::retention`] of each group.
    pub fn retentions(&self) -> impl Iterator<Item = Retention> + '_ {
        self.groups.as_slice().iter().map(|group| group.retention(self.block_size))
    }

    /// Where a query at `position` stands if positions are counted within what is kept: sink tokens, then the window. Its distance from sink tokens
    /// is that from there; see [`AttentionConfig::sink_queries`](crate::AttentionConfig::sink_queries). Of several groups the first with sink tokens
    /// counts.
    #[must_use]
    pub fn sink_position(&self, position: u32) -> u32 {
        let LayerGroup { window, sink_tokens } = self.sink_group();
        window.map_or(position, |window| position.min(sink_tokens.saturating_add(window - window.min(1))))
    }

    /// The first group that keeps sink tokens, or the first of all.
    pub(crate) fn sink_group(&self) -> LayerGroup {
        let groups = self.groups.as_slice();
        groups.iter().copied().find(|group| group.sink_tokens > 0).unwrap_or_else(|| self.groups.get(0))
    }

    /// [`Retention::held_blocks`] of this cache, over all groups.
    #[must_use]
    pub fn held_blocks(&self, seq_len: u32) -> u32 {
        self.groups.held_blocks(self.block_size, seq_len)
    }

    /// [`Retention::most_blocks`] of this cache, over all groups.
    #[must_use]
    pub fn most_blocks(&self, seq_len: u32, chunk: u32) -> u32 {
        self.groups.most_blocks(self.block_size, seq_len, chunk)
    }

    /// Tokens of the longest sequence that the whole pool has room for while it grows by up to `chunk` at a time: below 2^31, and as many as that
    /// where all layers have windows that fit.
    #[must_use]
    pub fn longest_sequence(&self, chunk: u32) -> u32 {
        // Longer sequences take no fewer blocks.
        let (mut fits, mut too_long) = (0, self.max_seq_len().unwrap_or(u32::MAX).min(i32::MAX as u32) + 1);
        while too_long - fits > 1 {
            let middle = fits + (too_long - fits) / 2;
            let is_short = self.most_blocks(middle, chunk) <= self.num_blocks;
            *if is_short { &mut fits } else { &mut too_long } = middle;
        }
        fits
    }
}

/// Where the rows of one side (K or V) of a layer lie: `[block, kv_head, slot, dim]`.
///
/// The rows of a head are adjacent within a block, so that a workgroup, which serves one KV head, reads a contiguous range;
/// on lavapipe this decodes 2.8 times faster than `[block, slot, kv_head, dim]`. In formats with scales per row, a block's scales follow its
/// rows, a `u32` each and in the same order, so that a block is one range of bytes whatever its format.
///
/// In formats with scales per channel, one table per side follows the last block of the first [segment](Segments): f32
/// `[2, num_kv_heads, row_dim]`, the scales and then the zero points.
///
/// Sizes and offsets are in bytes and defined for any field values, valid or not: what is beyond `u64` is `u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Heads of K and V.
    pub num_kv_heads: u32,
    /// Elements of a row: `head_dim` of K, `value_dim` of V.
    pub row_dim: u32,
    /// Rows of a head in a block.
    pub block_size: u32,
    /// How an element is stored.
    pub format: KvFormat,
}

/// Blocks begin at multiples of this many bytes: copies move 16 bytes at a time, and no load of a kernel is wider than 32 bytes
/// (rows that are loaded in 32 bytes are a multiple of that).
const BLOCK_ALIGNMENT: u64 = 16;

impl KvLayout {
    /// Bytes of the elements of the row of one token and head.
    #[must_use]
    pub const fn row_bytes(&self) -> u64 {
        self.row_dim as u64 * self.format.element_bits() as u64 / 8
    }

    /// Bytes of the scale of a row: 0 in formats without.
    #[must_use]
    pub const fn row_scale_bytes(&self) -> u64 {
        if self.format.has_row_scales() { 4 } else { 0 }
    }

    /// Bytes that the row of one token and head takes, its scale included.
    #[must_use]
    pub const fn token_row_bytes(&self) -> u64 {
        self.row_bytes() + self.row_scale_bytes()
    }

    /// Rows of a block.
    #[must_use]
    pub const fn block_rows(&self) -> u64 {
        self.block_size as u64 * self.num_kv_heads as u64
    }

    /// Bytes of a block: its rows, their scales, and up to 15 bytes of padding where there are few of them.
    #[must_use]
    pub const fn block_bytes(&self) -> u64 {
        match self.checked_block_bytes() {
            Some(bytes) => bytes,
            None => u64::MAX,
        }
    }

    const fn checked_block_bytes(&self) -> Option<u64> {
        match self.token_row_bytes().checked_mul(self.block_rows()) {
            Some(bytes) => bytes.checked_next_multiple_of(BLOCK_ALIGNMENT),
            None => None,
        }
    }

    /// Bytes of the table of channel scales: 0 in formats without.
    #[must_use]
    pub const fn channel_table_bytes(&self) -> u64 {
        if self.format.has_channel_scales() { self.num_channels().saturating_mul(2 * 4) } else { 0 }
    }

    /// Bytes of one side of a layer, or `None` on overflow.
    #[must_use]
    pub fn side_bytes(&self, num_blocks: u32) -> Option<u64> {
        let table = if self.format.has_channel_scales() { self.num_channels().checked_mul(2 * 4)? } else { 0 };
        self.checked_block_bytes()?.checked_mul(num_blocks.into())?.checked_add(table)
    }

    /// Most blocks that fit into `bytes`; 0 if a block has no bytes, as its layout is not valid then.
    #[must_use]
    pub const fn max_blocks(&self, bytes: u64) -> u64 {
        match self.checked_block_bytes() {
            Some(block_bytes) if block_bytes > 0 => bytes.saturating_sub(self.channel_table_bytes()) / block_bytes,
            _ => 0,
        }
    }

    const fn num_channels(&self) -> u64 {
        self.num_kv_heads as u64 * self.row_dim as u64
    }

    /// Cuts a side of `num_blocks` blocks into as few equal segments as bindings of `max_bytes` allow, or `None` if not even one block fits
    /// (or there is none). Only the last segment has fewer blocks than the others; it is never empty.
    ///
    /// Each is allowed the blocks that fit beside the table of channel scales, which the first one holds.
    #[must_use]
    pub fn segments(&self, num_blocks: u32, max_bytes: u64) -> Option<Segments> {
        let most = self.max_blocks(max_bytes).min(num_blocks.into());
        if most == 0 {
            return None;
        }
        let count = u64::from(num_blocks).div_ceil(most);
        // Equal ones, so that no segment is a stub; `most` is at most num_blocks, a u32. As blocks <= most, it still takes `count` of them.
        let blocks = num_blocks.div_ceil(count as u32);
        Some(if count == 1 { Segments::ONE } else { Segments { count: count as u32, blocks } })
    }

    /// Byte offset of a row from the start of the side, if all of it were in one segment.
    #[must_use]
    pub fn row_offset(&self, block: u32, kv_head: u32, slot: u32) -> u64 {
        self.offset(block, 0, self.row_index(kv_head, slot), self.row_bytes())
    }

    /// Byte offset of a row's scale from the start of the side, if all of it were in one segment, or `None` in formats without.
    #[must_use]
    pub fn row_scale_offset(&self, block: u32, kv_head: u32, slot: u32) -> Option<u64> {
        let row = self.row_index(kv_head, slot);
        self.format.has_row_scales().then(|| self.offset(block, self.block_rows(), row, self.row_scale_bytes()))
    }

    /// Index of a row within its block: below 2^64, as all three numbers are below 2^32.
    const fn row_index(&self, kv_head: u32, slot: u32) -> u64 {
        kv_head as u64 * self.block_size as u64 + slot as u64
    }

    /// Byte offset of item `index`, of `bytes` bytes, behind the first `rows` rows of a block.
    fn offset(&self, block: u32, rows: u64, index: u64, bytes: u64) -> u64 {
        let [block, rows] =
            [u64::from(block).saturating_mul(self.block_bytes()), rows.saturating_mul(self.row_bytes())];
        block.saturating_add(rows).saturating_add(index.saturating_mul(bytes))
    }
}

/// How one side of a layer is cut when it is larger than a storage binding: buffers that are bound side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segments {
    /// Buffers.
    pub count: u32,
    /// Blocks of each; the last one may have fewer.
    pub blocks: u32,
}

impl Segments {
    /// All of a side in one buffer. What it says about blocks is not used then.
    pub const ONE: Self = Self { count: 1, blocks: 0 };

    /// The segment of a block, and its number there.
    #[must_use]
    pub fn locate(&self, block: u32) -> (u32, u32) {
        if self.count <= 1 || self.blocks == 0 { (0, block) } else { (block / self.blocks, block % self.blocks) }
    }

    /// Blocks of a segment, of a side of `num_blocks`.
    #[must_use]
    pub fn blocks_of(&self, segment: u32, num_blocks: u32) -> u32 {
        if self.count <= 1 {
            num_blocks
        } else {
            self.blocks.min(num_blocks.saturating_sub(segment.saturating_mul(self.blocks)))
        }
    }
}

/// A matrix among others in one buffer, one after another. The rows of each lie side by side; its padding is behind its last row, so that every
/// matrix starts where a device can bind it, and the number of rows follows from the elements of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// Columns of the matrices before it.
    pub(crate) first_col: u32,
    /// Its own columns.
    pub(crate) width: u32,
    /// Elements before it, per row.
    pub(crate) offset: u32,
}

impl Region {
    /// Matrices of these widths. Sums that don't fit 32 bits saturate: no device has such a buffer.
    pub(crate) fn of(widths: [u32; 3]) -> [Self; 3] {
        let (mut first_col, mut offset) = (0_u32, 0_u32);
        widths.map(|width| {
            let region = Self { first_col, width, offset };
            first_col = first_col.saturating_add(width);
            offset = offset.saturating_add(region.padded_width());
            region
        })
    }

    /// Elements per row with the padding: 64 elements are 256 bytes, the largest alignment that a device may ask of a binding.
    pub(crate) fn padded_width(&self) -> u32 {
        self.width.checked_next_multiple_of(64).unwrap_or(u32::MAX)
    }
}

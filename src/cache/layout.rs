//! [`KvLayout`]: the only place where a size or an offset in the cache is computed.

use super::format::KvFormat;
use crate::error::{Error, Result};

/// Largest head_dim of the kernels.
pub const MAX_HEAD_DIM: u32 = 256;
/// Largest block_size, in tokens.
pub const MAX_BLOCK_SIZE: u32 = 256;

/// Shape of a cache: every layer has a K side and a V side of this geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvCacheConfig {
    /// Transformer layers, each with its own K and V.
    pub num_layers: u32,
    /// Heads of K and V.
    pub num_kv_heads: u32,
    /// Elements of a head: a multiple of 8 from 8 to 256.
    pub head_dim: u32,
    /// Tokens of a block, 1 to 256.
    pub block_size: u32,
    /// Blocks of the pool, shared by all sequences; every layer has room for each of them.
    pub num_blocks: u32,
    /// How K is stored.
    pub k_format: KvFormat,
    /// How V is stored.
    pub v_format: KvFormat,
}

impl KvCacheConfig {
    /// Checks what does not depend on a device.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self) -> Result<()> {
        if self.num_layers == 0 {
            return Err(Error::argument("num_layers", 0, "at least 1"));
        }
        // The kernels use one workgroup row per KV head.
        if self.num_kv_heads == 0 || self.num_kv_heads > 65_535 {
            return Err(Error::argument("num_kv_heads", self.num_kv_heads, "1 to 65535"));
        }
        if self.head_dim == 0 || self.head_dim > MAX_HEAD_DIM || !self.head_dim.is_multiple_of(8) {
            return Err(Error::argument("head_dim", self.head_dim, "a multiple of 8 from 8 to 256"));
        }
        if self.block_size == 0 || self.block_size > MAX_BLOCK_SIZE {
            return Err(Error::argument("block_size", self.block_size, "1 to 256 tokens"));
        }
        if self.num_blocks == 0 {
            return Err(Error::argument("num_blocks", 0, "at least 1"));
        }
        // Slot ids (block * block_size + offset) are u32 in the kernels.
        let slots = u64::from(self.num_blocks) * u64::from(self.block_size);
        if slots > u64::from(u32::MAX) {
            let got = format!("{} ({slots} slots)", self.num_blocks);
            return Err(Error::argument("num_blocks", got, "num_blocks * block_size below 2^32"));
        }
        Ok(())
    }

    /// Layout of the K side of a layer.
    #[must_use]
    pub fn k_layout(&self) -> KvLayout {
        self.layout(self.k_format)
    }

    /// Layout of the V side of a layer.
    #[must_use]
    pub fn v_layout(&self) -> KvLayout {
        self.layout(self.v_format)
    }

    fn layout(&self, format: KvFormat) -> KvLayout {
        KvLayout { num_kv_heads: self.num_kv_heads, head_dim: self.head_dim, block_size: self.block_size, format }
    }

    /// Bytes that one token takes over all layers, K and V.
    #[must_use]
    pub fn token_bytes(&self) -> u64 {
        let rows = u64::from(self.num_layers) * u64::from(self.num_kv_heads);
        rows * (self.k_layout().row_bytes() + self.v_layout().row_bytes())
    }

    /// Bytes that one block takes over all layers, K and V.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        u64::from(self.num_layers) * (self.k_layout().block_bytes() + self.v_layout().block_bytes())
    }

    /// Bytes of the whole pool over all layers.
    #[must_use]
    pub fn pool_bytes(&self) -> u64 {
        self.block_bytes().saturating_mul(self.num_blocks.into())
    }

    /// Blocks that a sequence of `seq_len` tokens takes.
    #[must_use]
    pub fn blocks_for(&self, seq_len: u32) -> u32 {
        seq_len.div_ceil(self.block_size)
    }
}

/// Where the rows of one side (K or V) of a layer lie: `[block, kv_head, slot, dim]`, packed.
///
/// The rows of a head are adjacent within a block, so that a workgroup, which serves one KV head, reads a contiguous range;
/// on lavapipe this decodes 2.8 times faster than `[block, slot, kv_head, dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Heads of K and V.
    pub num_kv_heads: u32,
    /// Elements of a row.
    pub head_dim: u32,
    /// Rows of a head in a block.
    pub block_size: u32,
    /// How an element is stored.
    pub format: KvFormat,
}

impl KvLayout {
    /// Bytes of the row of one token and head.
    #[must_use]
    pub const fn row_bytes(&self) -> u64 {
        self.head_dim as u64 * self.format.element_bits() as u64 / 8
    }

    /// Bytes of a block.
    #[must_use]
    pub const fn block_bytes(&self) -> u64 {
        self.row_bytes() * self.block_size as u64 * self.num_kv_heads as u64
    }

    /// Bytes of one side of a layer, or `None` on overflow.
    #[must_use]
    pub fn side_bytes(&self, num_blocks: u32) -> Option<u64> {
        self.block_bytes().checked_mul(num_blocks.into())
    }

    /// Most blocks that fit into `bytes`.
    #[must_use]
    pub const fn max_blocks(&self, bytes: u64) -> u64 {
        bytes / self.block_bytes()
    }

    /// Byte offset of a row from the start of the side.
    #[must_use]
    pub fn row_offset(&self, block: u32, kv_head: u32, slot: u32) -> u64 {
        let head = u64::from(block) * u64::from(self.num_kv_heads) + u64::from(kv_head);
        (head * u64::from(self.block_size) + u64::from(slot)) * self.row_bytes()
    }
}

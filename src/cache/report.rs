//! [`MemoryReport`]: where the pool's bytes are.

use std::collections::HashMap;
use std::fmt;

use super::layout::KvCacheConfig;
use super::manager::{PoolUsage, SequenceId};
use super::pool::{BlockId, BlockPool};
use super::table::BlockTable;

/// Where a pool's bytes are, at one moment: in all, and for each sequence. From [`KvCache::memory`](super::KvCache::memory);
/// prints as a table.
///
/// Bytes are those of K and V in all layers. What an open step has reserved counts as used, but not as a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryReport {
    /// Tokens of a block.
    pub block_size: u32,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Blocks: of the pool, free, used, shared; and sequences.
    pub usage: PoolUsage,
    /// Used blocks that open steps have reserved and no sequence holds yet.
    pub reserved_blocks: u32,
    /// Tokens in the pool, each slot counted once however many sequences share it.
    pub cached_tokens: u64,
    /// Tokens of all sequences: what would be cached if nothing were shared.
    pub sequence_tokens: u64,
    /// The sequences, the oldest first.
    pub sequences: Vec<SequenceMemory>,
}

/// The blocks of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceMemory {
    /// Which one.
    pub sequence: SequenceId,
    /// Tokens.
    pub len: u32,
    /// Blocks it holds, alone or with others.
    pub blocks: u32,
    /// Those that others hold, too.
    pub shared_blocks: u32,
    /// Bytes of its blocks.
    pub bytes: u64,
    /// Bytes of the slots of its last block that it doesn't use.
    pub wasted_bytes: u64,
}

impl MemoryReport {
    pub(super) fn new<'t>(
        config: &KvCacheConfig,
        pool: &BlockPool,
        usage: PoolUsage,
        tables: impl Iterator<Item = (SequenceId, &'t BlockTable)>,
    ) -> Self {
        let block_size = config.block_size;
        let (block_bytes, token_bytes) = (config.block_bytes(), config.token_bytes());
        // How far the holder that reaches furthest has filled each block.
        let mut filled: HashMap<BlockId, u32> = HashMap::new();
        let mut sequences: Vec<_> = tables
            .map(|(sequence, table)| {
                let (len, blocks) = (table.len(), table.blocks());
                let mut left = len;
                for &block in blocks {
                    let own = left.min(block_size);
                    left -= own;
                    let furthest = filled.entry(block).or_default();
                    *furthest = (*furthest).max(own);
                }
                let num_blocks = blocks.len() as u32;
                let unused = u64::from(num_blocks) * u64::from(block_size) - u64::from(len);
                SequenceMemory {
                    sequence,
                    len,
                    blocks: num_blocks,
                    shared_blocks: blocks.iter().filter(|&&block| pool.ref_count(block) > 1).count() as u32,
                    bytes: u64::from(num_blocks) * block_bytes,
                    wasted_bytes: unused * token_bytes,
                }
            })
            .collect();
        sequences.sort_unstable_by_key(|s| s.sequence);
        Self {
            block_size,
            block_bytes,
            usage,
            reserved_blocks: usage.used - filled.len() as u32,
            cached_tokens: filled.values().map(|&tokens| u64::from(tokens)).sum(),
            sequence_tokens: sequences.iter().map(|s| u64::from(s.len)).sum(),
            sequences,
        }
    }

    /// Bytes of the whole pool, which are taken on the device from the beginning.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        u64::from(self.usage.total) * self.block_bytes
    }

    /// Bytes of the blocks that sequences and open steps hold.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        u64::from(self.usage.used) * self.block_bytes
    }

    /// Bytes of the used blocks that have more than one holder.
    #[must_use]
    pub fn shared_bytes(&self) -> u64 {
        u64::from(self.usage.shared) * self.block_bytes
    }

    /// Bytes of slots in the sequences' blocks that hold no token: the rest of last blocks. Less than a block per sequence.
    #[must_use]
    pub fn wasted_bytes(&self) -> u64 {
        let blocks = u64::from(self.usage.used - self.reserved_blocks);
        (blocks * u64::from(self.block_size) - self.cached_tokens) * self.bytes_per_token()
    }

    /// Bytes that sharing saves: those of the tokens that are counted more than once in the sequences' lengths.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        (self.sequence_tokens - self.cached_tokens) * self.bytes_per_token()
    }

    /// What a token adds.
    #[must_use]
    pub fn bytes_per_token(&self) -> u64 {
        self.block_bytes / u64::from(self.block_size)
    }

    /// The part of the used slots that hold a token; 1 if nothing is used.
    #[must_use]
    pub fn utilisation(&self) -> f64 {
        let slots = u64::from(self.usage.used) * u64::from(self.block_size);
        if slots == 0 { 1.0 } else { self.cached_tokens as f64 / slots as f64 }
    }
}

/// Bytes with a unit that keeps three digits or more.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            bytes if bytes < 10 << 10 => format!("{bytes} B"),
            bytes if bytes < 10 << 20 => format!("{:.1} KiB", bytes as f64 / 1024.0),
            bytes if bytes < 10 << 30 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
            bytes => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        };
        f.pad(&text)
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PoolUsage { total, used, shared, .. } = self.usage;
        writeln!(f, "{:<10} {:>8} {:>12}", "", "blocks", "bytes")?;
        writeln!(f, "{:<10} {total:>8} {:>12}", "allocated", Bytes(self.allocated_bytes()))?;
        writeln!(
            f,
            "{:<10} {used:>8} {:>12}   {:.0} % of their slots hold a token",
            "used",
            Bytes(self.used_bytes()),
            100.0 * self.utilisation()
        )?;
        writeln!(
            f,
            "{:<10} {shared:>8} {:>12}   saves {}",
            "shared",
            Bytes(self.shared_bytes()),
            Bytes(self.saved_bytes())
        )?;
        writeln!(f, "{:<10} {:>8} {:>12}", "wasted", "", Bytes(self.wasted_bytes()))?;
        if self.reserved_blocks > 0 {
            let bytes = Bytes(u64::from(self.reserved_blocks) * self.block_bytes);
            writeln!(f, "{:<10} {:>8} {bytes:>12}   by open steps", "reserved", self.reserved_blocks)?;
        }
        let (token, block) = (Bytes(self.bytes_per_token()), Bytes(self.block_bytes));
        write!(f, "{:<10} {:>8} {token:>12}   {block} per block of {} tokens", "a token", "", self.block_size)?;
        if !self.sequences.is_empty() {
            let heads = ["tokens", "blocks", "shared", "bytes", "wasted"];
            write!(
                f,
                "\n\n{:<14} {:>8} {:>8} {:>8} {:>12} {:>12}",
                "", heads[0], heads[1], heads[2], heads[3], heads[4]
            )?;
        }
        for s in &self.sequences {
            let (name, bytes, wasted) = (s.sequence.to_string(), Bytes(s.bytes), Bytes(s.wasted_bytes));
            let (len, blocks, shared) = (s.len, s.blocks, s.shared_blocks);
            write!(f, "\n{name:<14} {len:>8} {blocks:>8} {shared:>8} {bytes:>12} {wasted:>12}")?;
        }
        Ok(())
    }
}

//! [`MemoryReport`]: where the pool's bytes are.

use std::collections::HashMap;
use std::fmt::{self, Write as _};

use super::manager::PoolUsage;
use super::pool::BlockPool;
use super::prefix::PrefixStats;
use super::table::BlockTable;
use crate::ids::{BlockId, SequenceId};
use crate::layout::KvCacheConfig;

/// Where a pool's bytes are, at one moment: in all, and for each sequence. From `KvCache::memory` or [`Manager::memory`](super::Manager::memory);
/// prints as a table.
///
/// Bytes are those of K and V in all layers. What an open step has reserved counts as used, but not as a token. With several
/// [groups of layers](KvCacheConfig::groups) blocks are counted over all of them, and a token has a slot in each.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryReport {
    /// Tokens of a block.
    pub block_size: u32,
    /// Groups of layers: a sequence takes so many blocks from the pool for every `block_size` tokens.
    pub num_groups: u32,
    /// Bytes of a block, in all layers of its group.
    pub block_bytes: u64,
    /// Bytes of a token's rows and scales in all layers: the growth per token.
    pub token_bytes: u64,
    /// Blocks: of the pool, free, used, shared, reclaimable; and sequences.
    pub usage: PoolUsage,
    /// What the prefix index holds, and how often it was of use.
    pub prefixes: PrefixStats,
    /// Used blocks that open steps have reserved and neither a sequence nor the prefix index holds.
    pub reserved_blocks: u32,
    /// Slots of the sequences that hold a token, each counted once however many share it: with one group of layers, tokens.
    pub cached_tokens: u64,
    /// Tokens of all sequences: what would be cached if nothing were shared and nothing had left a window.
    pub sequence_tokens: u64,
    /// Slots of theirs whose blocks have returned to the pool, because their tokens have left a window: with one group of layers, tokens.
    pub released_tokens: u64,
    /// The sequences, the oldest first.
    pub sequences: Vec<SequenceMemory>,
}

/// The blocks of one sequence, of all groups of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SequenceMemory {
    /// Which one.
    pub sequence: SequenceId,
    /// Tokens.
    pub len: u32,
    /// Blocks it holds, alone or with others.
    pub blocks: u32,
    /// Blocks that it has given back, because their tokens have left a window. It would hold `blocks + released_blocks` without one.
    pub released_blocks: u32,
    /// Those that other sequences hold, too.
    pub shared_blocks: u32,
    /// Bytes of its blocks.
    pub bytes: u64,
    /// Bytes of the slots of its last block (one per group of layers) that it doesn't use.
    pub wasted_bytes: u64,
    /// Bytes that its next token takes from the pool: those of a block if the last one is full, or has other holders (the
    /// prefix index among them) and must be copied; otherwise 0.
    pub next_token_bytes: u64,
}

impl MemoryReport {
    pub(super) fn new<'t>(
        config: &KvCacheConfig,
        pool: &BlockPool,
        usage: PoolUsage,
        prefixes: PrefixStats,
        tables: impl Iterator<Item = (SequenceId, &'t [BlockTable])>,
    ) -> Self {
        let (block_size, num_groups) = (config.block_size, config.groups.count());
        let (block_bytes, token_bytes) = (config.block_bytes(), config.token_bytes());
        // How far the holder that reaches furthest has filled each block.
        let mut filled: HashMap<BlockId, u32> = HashMap::new();
        let mut sequences: Vec<_> = tables
            .map(|(sequence, tables)| {
                let len = tables.first().map_or(0, BlockTable::len);
                let mut memory = SequenceMemory { len, ..SequenceMemory::none(sequence) };
                for table in tables {
                    let blocks = table.blocks();
                    let mut left = len;
                    for &block in blocks {
                        let own = left.min(block_size);
                        left -= own;
                        if block.is_null() {
                            continue;
                        }
                        let furthest = filled.entry(block).or_default();
                        *furthest = (*furthest).max(own);
                    }
                    memory.blocks += table.num_held();
                    memory.released_blocks += blocks.len() as u32 - table.num_held();
                    memory.shared_blocks += blocks.iter().filter(|&&block| pool.num_holders(block) > 1).count() as u32;
                    let in_place = table.partial_block(block_size).is_some_and(|block| pool.ref_count(block) == 1);
                    memory.next_token_bytes =
                        memory.next_token_bytes.saturating_add(if in_place { 0 } else { block_bytes });
                }
                // The same in each group.
                let unused = u64::from(len.div_ceil(block_size)) * u64::from(block_size) - u64::from(len);
                memory.wasted_bytes = unused.saturating_mul(token_bytes);
                memory.bytes = u64::from(memory.blocks).saturating_mul(block_bytes);
                memory
            })
            .collect();
        sequences.sort_unstable_by_key(|s| s.sequence);
        Self {
            block_size,
            num_groups,
            block_bytes,
            token_bytes,
            usage,
            prefixes,
            reserved_blocks: usage.used - usage.reclaimable - filled.len() as u32,
            cached_tokens: filled.values().map(|&tokens| u64::from(tokens)).sum(),
            sequence_tokens: sequences.iter().map(|s| u64::from(s.len)).sum(),
            // Such blocks were full.
            released_tokens: sequences.iter().map(|s| u64::from(s.released_blocks) * u64::from(block_size)).sum(),
            sequences,
        }
    }

    /// Bytes of a token's rows and scales in the layers of a group.
    #[must_use]
    pub fn slot_bytes(&self) -> u64 {
        self.token_bytes / u64::from(self.num_groups.max(1))
    }

    /// Bytes of the whole pool, which are taken on the device from the beginning.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        u64::from(self.usage.total).saturating_mul(self.block_bytes)
    }

    /// Bytes of the blocks that nobody holds.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        u64::from(self.usage.free).saturating_mul(self.block_bytes)
    }

    /// Bytes of the blocks that sequences, open steps and the prefix index hold.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        u64::from(self.usage.used).saturating_mul(self.block_bytes)
    }

    /// Bytes of the used blocks that more than one sequence or open step holds.
    #[must_use]
    pub fn shared_bytes(&self) -> u64 {
        u64::from(self.usage.shared).saturating_mul(self.block_bytes)
    }

    /// Bytes of the used blocks that only the prefix index holds, and gives up when somebody needs them.
    #[must_use]
    pub fn reclaimable_bytes(&self) -> u64 {
        u64::from(self.usage.reclaimable).saturating_mul(self.block_bytes)
    }

    /// Blocks that sequences hold, each counted once.
    #[must_use]
    pub fn sequence_blocks(&self) -> u32 {
        self.usage.used.saturating_sub(self.usage.reclaimable).saturating_sub(self.reserved_blocks)
    }

    /// Bytes of slots in the sequences' blocks that hold no token of theirs: the rest of last blocks. Less than a block per
    /// sequence.
    #[must_use]
    pub fn wasted_bytes(&self) -> u64 {
        let slots = u64::from(self.sequence_blocks()) * u64::from(self.block_size);
        slots.saturating_sub(self.cached_tokens).saturating_mul(self.slot_bytes())
    }

    /// Bytes that sharing saves: those of the tokens that are counted more than once in the sequences' lengths, unless they have been released.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        let slots = self.sequence_tokens.saturating_mul(self.num_groups.into());
        let held = slots.saturating_sub(self.released_tokens);
        held.saturating_sub(self.cached_tokens).saturating_mul(self.slot_bytes())
    }

    /// Bytes of the slots whose blocks have returned to the pool, because their tokens have left a window.
    #[must_use]
    pub fn released_bytes(&self) -> u64 {
        self.released_tokens.saturating_mul(self.slot_bytes())
    }

    /// The part of the used slots that hold a token, of a sequence or in a reclaimable block (which is full); 1 if nothing is
    /// used.
    #[must_use]
    pub fn utilisation(&self) -> f64 {
        let block_size = u64::from(self.block_size);
        let slots = u64::from(self.usage.used) * block_size;
        let tokens = self.cached_tokens + u64::from(self.usage.reclaimable) * block_size;
        if slots == 0 { 1.0 } else { tokens as f64 / slots as f64 }
    }
}

impl SequenceMemory {
    /// Of a sequence without blocks.
    const fn none(sequence: SequenceId) -> Self {
        Self {
            sequence,
            len: 0,
            blocks: 0,
            released_blocks: 0,
            shared_blocks: 0,
            bytes: 0,
            wasted_bytes: 0,
            next_token_bytes: 0,
        }
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

impl MemoryReport {
    /// The lines about the pool: name, blocks, bytes, note.
    fn pool_lines(&self) -> Vec<(&'static str, Option<u32>, u64, String)> {
        let PoolUsage { total, free, used, shared, reclaimable, .. } = self.usage;
        let utilised = format!("{:.0} % of their slots hold a token", 100.0 * self.utilisation());
        let mut lines = vec![
            ("allocated", Some(total), self.allocated_bytes(), String::new()),
            ("free", Some(free), self.free_bytes(), String::new()),
            ("used", Some(used), self.used_bytes(), utilised),
            ("shared", Some(shared), self.shared_bytes(), format!("saves {}", Bytes(self.saved_bytes()))),
        ];
        if self.prefixes != PrefixStats::default() {
            let PrefixStats { queried_tokens, indexed_blocks, evicted_blocks, .. } = self.prefixes;
            let rate = 100.0 * self.prefixes.hit_rate();
            let hits = format!("{rate:.0} % of {queried_tokens} queried tokens were found");
            let bytes = u64::from(indexed_blocks).saturating_mul(self.block_bytes);
            lines.push(("indexed", Some(indexed_blocks), bytes, hits));
            let evicted = format!("only indexed; {evicted_blocks} evicted so far");
            lines.push(("reclaimable", Some(reclaimable), self.reclaimable_bytes(), evicted));
        }
        if self.reserved_blocks > 0 {
            let bytes = u64::from(self.reserved_blocks).saturating_mul(self.block_bytes);
            lines.push(("reserved", Some(self.reserved_blocks), bytes, "by open steps".to_owned()));
        }
        if self.released_tokens > 0 {
            lines.push(("released", None, self.released_bytes(), "of tokens that have left a window".to_owned()));
        }
        lines.push(("wasted", None, self.wasted_bytes(), "in last blocks".to_owned()));
        let mut block = format!("{} per block of {} tokens", Bytes(self.block_bytes), self.block_size);
        if self.num_groups > 1 {
            let _ = write!(block, ", one for each of {} groups of layers", self.num_groups);
        }
        lines.push(("a token", None, self.token_bytes, block));
        lines
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<14} {:>8} {:>12}", "", "blocks", "bytes")?;
        for (name, blocks, bytes, note) in self.pool_lines() {
            let blocks = blocks.map_or_else(String::new, |blocks| blocks.to_string());
            write!(f, "\n{name:<14} {blocks:>8} {:>12}", Bytes(bytes))?;
            if !note.is_empty() {
                write!(f, "   {note}")?;
            }
        }
        if self.sequences.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = self.sequences.iter().map(|s| s.sequence.to_string()).collect();
        let width = names.iter().map(String::len).fold(14, usize::max);
        let [tokens, blocks, shared, bytes, wasted, next] =
            ["tokens", "blocks", "shared", "bytes", "wasted", "next token"];
        write!(f, "\n\n{:<width$} {tokens:>8} {blocks:>8} {shared:>8} {bytes:>12} {wasted:>12} {next:>12}", "")?;
        let mut line = |name: &str, tokens: u64, [blocks, shared]: [u64; 2], [bytes, wasted]: [u64; 2], next: u64| {
            let [bytes, wasted, next] = [bytes, wasted, next].map(Bytes);
            write!(f, "\n{name:<width$} {tokens:>8} {blocks:>8} {shared:>8} {bytes:>12} {wasted:>12} {next:>12}")
        };
        for (name, s) in names.iter().zip(&self.sequences) {
            let counts = [s.blocks, s.shared_blocks].map(u64::from);
            line(name, s.len.into(), counts, [s.bytes, s.wasted_bytes], s.next_token_bytes)?;
        }
        let sum = |of: fn(&SequenceMemory) -> u64| self.sequences.iter().map(of).fold(0, u64::saturating_add);
        let next = sum(|s| s.next_token_bytes);
        let counts = [sum(|s| s.blocks.into()), sum(|s| s.shared_blocks.into())];
        line("sum", self.sequence_tokens, counts, [sum(|s| s.bytes), sum(|s| s.wasted_bytes)], next)?;
        let counts = [self.sequence_blocks(), self.usage.shared].map(u64::from);
        let bytes = [counts[0] * self.block_bytes, self.wasted_bytes()];
        line("counted once", self.cached_tokens, counts, bytes, next)
    }
}

//! [`SequenceSnapshot`]: the bytes of a sequence on the host.

use std::fmt;
use std::ops::Range;

use super::KvCache;
use super::pack::{stream_bytes, strip_marker};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, Readback};
use crate::ids::SequenceId;
use crate::layout::{KvCacheConfig, KvLayout, Retention};
use crate::sequence::BlockTable;

/// A sequence's K and V of all layers on the host: the bytes of its blocks, as the cache's formats store them, in the order of its tokens.
///
/// Made by [`KvCache::record_snapshot`] and [`KvCache::swap_out`]; [`KvCache::swap_in`] makes a sequence of it again, in this cache or in
/// another one of the same geometry and formats, whatever its number of blocks. With feature `save` it can be kept in a file.
///
/// Slots behind the last token hold zeros, not what other sequences left there.
///
/// ```no_run
/// # async fn example(cache: &folio::KvCache, sequence: folio::SequenceId) -> folio::Result<()> {
/// # let gpu = cache.gpu();
/// # let encoder = || gpu.device().create_command_encoder(&Default::default());
/// let mut commands = encoder();
/// let swap = cache.swap_out(&mut commands, sequence)?;
/// gpu.queue().submit([commands.finish()]);
/// // Other sequences go on; somebody polls the device meanwhile.
/// let snapshot = swap.finish().await?;
///
/// let mut commands = encoder();
/// let sequence = cache.swap_in(&mut commands, &snapshot)?.commit()?;
/// gpu.queue().submit([commands.finish()]);
/// # Ok(())
/// # }
/// ```
///
/// Two are equal if their shapes, lengths, bytes and scales are; which sequences they come from makes no difference.
#[derive(Clone)]
pub struct SequenceSnapshot {
    /// `num_blocks` is the sequence's.
    pub(super) config: KvCacheConfig,
    pub(super) len: u32,
    /// The blocks of K, then of V, layer after layer; of each those of its group.
    pub(super) data: Vec<u8>,
    /// For formats with scales per channel of K: of each layer, `[2, num_kv_heads, head_dim]`.
    pub(super) key_scales: Option<Vec<Vec<f32>>>,
    /// Which sequence it was, if it has been swapped out.
    pub(super) origin: Option<SequenceId>,
}

impl PartialEq for SequenceSnapshot {
    fn eq(&self, other: &Self) -> bool {
        let Self { config, len, data, key_scales, origin: _ } = self;
        (config, len, data, key_scales) == (&other.config, &other.len, &other.data, &other.key_scales)
    }
}

impl fmt::Debug for SequenceSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SequenceSnapshot")
            .field("config", &self.config)
            .field("len", &self.len)
            .field("num_bytes", &self.num_bytes())
            .finish_non_exhaustive()
    }
}

impl SequenceSnapshot {
    /// Tokens.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the sequence has no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Geometry and formats. `num_blocks` is the number of blocks of the sequence in all groups of layers, 0 for an empty one, and not the size of the
    /// pool it comes from; `contiguous` is never set. With a window it has no blocks that [no later token sees](crate::Retention::hidden_blocks).
    #[must_use]
    pub fn config(&self) -> &KvCacheConfig {
        &self.config
    }

    /// Bytes of all blocks.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.data.len() as u64
    }

    /// The K and V blocks of a layer, `[num_blocks, block_bytes]` each, a block laid out as [`KvLayout`] says; as many as the sequence
    /// [holds](crate::Retention::held_blocks) in the layer's group. A latent cache has none of V.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that isn't there.
    pub fn layer_bytes(&self, layer: u32) -> Result<(&[u8], &[u8])> {
        let config = &self.config;
        if layer >= config.num_layers {
            let need = format!("below num_layers, {}", config.num_layers);
            return Err(Error::argument("layer", layer, need));
        }
        let sides = |num_blocks| config.sides().map(|side| side_len(&side, num_blocks)).sum::<usize>();
        let (group, size) = (config.group_of(layer) as usize, config.layers_per_group() as usize);
        let counts = group_blocks(config, self.len);
        let before: usize = counts[..group].iter().map(|&count| size * sides(count)).sum();
        let own = sides(counts[group]);
        let start = before + layer as usize % size * own;
        Ok(self.data[start..][..own].split_at(side_len(&config.k_layout(), counts[group])))
    }

    /// The scales of a layer's keys, `[2, num_kv_heads, head_dim]`, in formats with scales per channel: what
    /// [`KvCache::set_key_scales`] wants in a new cache before the sequence is swapped in there.
    #[must_use]
    pub fn key_scales(&self, layer: u32) -> Option<&[f32]> {
        self.key_scales.as_ref()?.get(layer as usize).map(Vec::as_slice)
    }

    /// Fails unless the sequence fits into a cache of this shape and with these channel scales.
    fn check_fits(&self, cache: &KvCacheConfig, key_scales: Option<&[Vec<f32>]>) -> Result<()> {
        if let Some(max_seq_len) = cache.max_seq_len()
            && self.len > max_seq_len
        {
            let need = format!("at most the cache's max_seq_len, {max_seq_len}");
            return Err(Error::argument("snapshot", format!("{} tokens", self.len), need));
        }
        let own = &self.config;
        let groups = |config: &KvCacheConfig| config.groups.count();
        if groups(own) != groups(cache) {
            let got = format!("{} groups of layers", groups(own));
            return Err(Error::argument("snapshot", got, format!("the cache's, {}", groups(cache))));
        }
        for (group, (retention, lacks)) in (0..).zip(cache.retentions().zip(self.hidden_blocks())) {
            let hidden = retention.hidden_blocks(self.len);
            if !lacks.is_empty() && (lacks.start < hidden.start || lacks.end > hidden.end) {
                let of = |config: &KvCacheConfig| config.groups.get(group);
                let got = format!("{} tokens of a cache that keeps {}", self.len, of(own));
                return Err(Error::argument("snapshot", got, format!("what the cache keeps, {}", of(cache))));
            }
        }
        for (what, own, cache) in [
            ("num_layers", own.num_layers.to_string(), cache.num_layers.to_string()),
            ("num_kv_heads", own.num_kv_heads.to_string(), cache.num_kv_heads.to_string()),
            ("head_dim", own.head_dim.to_string(), cache.head_dim.to_string()),
            ("value_dim", own.value_dim().to_string(), cache.value_dim().to_string()),
            ("latent", own.latent.to_string(), cache.latent.to_string()),
            ("block_size", own.block_size.to_string(), cache.block_size.to_string()),
            ("k_format", own.k_format.to_string(), cache.k_format.to_string()),
            ("v_format", own.v_format.to_string(), cache.v_format.to_string()),
        ] {
            if own != cache {
                return Err(Error::argument("snapshot", format!("{what} {own}"), format!("the cache's, {cache}")));
            }
        }
        let bits = |scales: &[Vec<f32>]| -> Vec<Vec<u32>> {
            scales.iter().map(|layer| layer.iter().map(|x| x.to_bits()).collect()).collect()
        };
        if self.key_scales.as_deref().map(bits) != key_scales.map(bits) {
            let need = "those of the cache; an empty one takes them by set_key_scales";
            return Err(Error::argument("snapshot", "K with other scales per channel", need));
        }
        Ok(())
    }

    /// Which places of its block table of each group have no block, because no token behind the last one sees them.
    pub(super) fn hidden_blocks(&self) -> Vec<Range<u32>> {
        self.config.retentions().map(|retention| retention.hidden_blocks(self.len)).collect()
    }

    /// Zeroes the slots of the last block that hold no token: they may be anything, also what another sequence left.
    fn blank_unused(&mut self) {
        let used = self.len % self.config.block_size;
        if used == 0 {
            return;
        }
        let mut rest = &mut self.data[..];
        let counts = group_blocks(&self.config, self.len);
        for layer in 0..self.config.num_layers {
            for layout in self.config.sides() {
                let side;
                (side, rest) = rest.split_at_mut(side_len(&layout, counts[self.config.group_of(layer) as usize]));
                blank_rows(side, &layout, used);
            }
        }
    }
}

/// Zeroes the rows from slot `used` on of the last block of a side, their scales, and the padding.
fn blank_rows(side: &mut [u8], layout: &KvLayout, used: u32) {
    let block = side.len() - layout.block_bytes() as usize;
    let block = &mut side[block..];
    let unused = u64::from(layout.block_size - used);
    for head in 0..layout.num_kv_heads {
        let rows = (Some(layout.row_offset(0, head, used)), layout.row_bytes());
        let scales = (layout.row_scale_offset(0, head, used), layout.row_scale_bytes());
        for (start, bytes) in [rows, scales] {
            let Some(start) = start else { continue };
            block[start as usize..(start + unused * bytes) as usize].fill(0);
        }
    }
    block[(layout.token_row_bytes() * layout.block_rows()) as usize..].fill(0);
}

/// Blocks of a sequence of `len` tokens in each group.
pub(super) fn group_blocks(config: &KvCacheConfig, len: u32) -> Vec<u32> {
    config.retentions().map(|retention| retention.held_blocks(len)).collect()
}

/// Bytes of a side of a layer. They are in memory, so they fit a `usize`.
fn side_len(layout: &KvLayout, num_blocks: u32) -> usize {
    (layout.block_bytes() * u64::from(num_blocks)) as usize
}

/// A snapshot whose copies are recorded, from [`KvCache::record_snapshot`]. Dropping it is always safe.
#[must_use = "the snapshot is what `read` returns"]
pub struct PendingSnapshot {
    pub(super) config: KvCacheConfig,
    pub(super) len: u32,
    gpu: Gpu,
    staging: Vec<Readback>,
    key_scales: Option<Vec<Vec<f32>>>,
}

impl fmt::Debug for PendingSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingSnapshot").field("config", &self.config).field("len", &self.len).finish_non_exhaustive()
    }
}

impl PendingSnapshot {
    /// Waits for the copies, which must have been submitted. Natively the future completes only while somebody polls the device: run it by
    /// [`Gpu::block_on`](crate::Gpu::block_on) if nobody does.
    ///
    /// # Errors
    /// [`Error::Argument`] if the encoder has not been submitted; [`Error::Wgpu`].
    pub async fn read(self) -> Result<SequenceSnapshot> {
        let mut data = Vec::new();
        if !self.staging.is_empty() {
            // With room for the end mark.
            let bytes = stream_bytes(&self.config, self.config.num_blocks).unwrap_or(0) + 16;
            data.reserve_exact(bytes as usize);
            for staging in self.staging {
                let bytes = staging.buffer().size();
                staging.read_with(&self.gpu, bytes, |bytes| data.extend_from_slice(bytes)).await?;
            }
            strip_marker(&mut data)?;
        }
        let Self { config, len, key_scales, .. } = self;
        let mut snapshot = SequenceSnapshot { config, len, data, key_scales, origin: None };
        snapshot.blank_unused();
        Ok(snapshot)
    }
}

impl KvCache {
    /// Records the copy of a sequence's committed tokens to the host, as they are at this place of the host's commands. The sequence stays as
    /// it is and may go on; it may be in an open step. An empty sequence records nothing.
    ///
    /// Takes host-visible memory of the sequence's size, which is freed as [`PendingSnapshot::read`] goes on, and up to 16 MiB on the device
    /// (or one block, if that is larger).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Unsupported`] if the list of blocks doesn't fit into a binding; [`Error::Wgpu`], for example if
    /// memory is short. Nothing has been recorded then.
    pub fn record_snapshot(&self, encoder: &mut wgpu::CommandEncoder, sequence: SequenceId) -> Result<PendingSnapshot> {
        let (len, blocks) = {
            let state = self.state();
            let tables = state.tables(sequence)?;
            let len = state.table(sequence)?.len();
            let kept = |(retention, table): (Retention, &BlockTable)| {
                // Also blocks that are still there would go when the sequence goes on.
                let hidden = retention.hidden_blocks(len);
                let places = (0..).zip(table.blocks());
                places.filter(|(i, _)| !hidden.contains(i)).map(|(_, &block)| block).collect()
            };
            (len, self.config.retentions().zip(tables).map(kept).collect::<Vec<Vec<_>>>())
        };
        let num_blocks = blocks.iter().map(Vec::len).sum::<usize>() as u32;
        let config = KvCacheConfig { num_blocks, contiguous: false, ..self.config };
        let staging = self.record_pack(encoder, &blocks)?;
        Ok(PendingSnapshot { config, len, gpu: self.gpu.clone(), staging, key_scales: self.all_key_scales() })
    }

    /// Fails unless the snapshot can be swapped in here.
    pub(super) fn check_snapshot(&self, snapshot: &SequenceSnapshot) -> Result<()> {
        snapshot.check_fits(&self.config, self.all_key_scales().as_deref())
    }

    /// The scales per channel of K, of each layer `[2, num_kv_heads, head_dim]`, if all of them are fixed.
    fn all_key_scales(&self) -> Option<Vec<Vec<f32>>> {
        (0..self.config.num_layers).map(|layer| Some(self.key_scales(layer)?.to_vec())).collect()
    }
}

//! The GPU buffers of the layers. Those at the same place of their groups share them: a block belongs to one group at a time.

use std::collections::HashSet;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Gpu};
use crate::kernel::attention_storage_buffers;
use crate::layout::{KvCacheConfig, KvLayout, Segments};

/// One side (K or V) of a layer.
#[derive(Debug)]
pub(crate) struct SideStorage {
    buffers: Vec<wgpu::Buffer>,
    layout: KvLayout,
    segments: Segments,
}

impl SideStorage {
    /// The segments.
    pub(crate) fn buffers(&self) -> &[wgpu::Buffer] {
        &self.buffers
    }

    /// All segments, whole, in the order in which kernels bind them.
    pub(crate) fn bindings(&self) -> impl Iterator<Item = wgpu::BindingResource<'_>> {
        self.buffers.iter().map(wgpu::Buffer::as_entire_binding)
    }

    /// Bytes of a block.
    pub(crate) fn block_bytes(&self) -> u64 {
        self.layout.block_bytes()
    }

    /// The segments, each with the blocks that it holds, of a pool of `num_blocks`.
    pub(crate) fn parts(&self, num_blocks: u32) -> impl Iterator<Item = (&wgpu::Buffer, Range<u32>)> {
        (0..).zip(&self.buffers).map(move |(segment, buffer)| {
            let start = segment * self.segments.blocks;
            (buffer, start..start + self.segments.blocks_of(segment, num_blocks))
        })
    }

    /// The table of channel scales: empty in formats without.
    pub(crate) fn channel_table(&self) -> BufferRef<'_> {
        let (buffer, bytes) = (&self.buffers[0], self.layout.channel_table_bytes());
        BufferRef::new(buffer, buffer.size() - bytes, bytes)
    }
}

/// K and V of one layer of each group.
#[derive(Debug)]
pub(crate) struct LayerStorage {
    pub(crate) k: SideStorage,
    /// `None`: values are keys.
    v: Option<SideStorage>,
}

impl LayerStorage {
    /// K and, if there is one, V.
    pub(crate) fn sides(&self) -> impl Iterator<Item = &SideStorage> {
        std::iter::once(&self.k).chain(&self.v)
    }

    /// Where values are read from.
    pub(crate) fn values(&self) -> &SideStorage {
        self.v.as_ref().unwrap_or(&self.k)
    }

    /// Segments that kernels write to, one after another: K's, then V's.
    pub(crate) fn written(&self) -> impl Iterator<Item = wgpu::BindingResource<'_>> {
        self.sides().flat_map(SideStorage::bindings)
    }

    /// Segments that kernels read, one after another: those of keys, then those of values, which may be the same.
    pub(crate) fn read(&self) -> impl Iterator<Item = wgpu::BindingResource<'_>> {
        self.k.bindings().chain(self.values().bindings())
    }
}

/// Bytes of a segment at most, however large the bindings of the device are (on Metal they are as large as a buffer). Where wgpu's checks are in,
/// naga hands buffer lengths to Metal's shaders as `u32`. Elements that kernels address have 4 bytes at least, so their indices within a
/// segment stay below 2^30.
const MAX_SEGMENT_BYTES: u64 = u32::MAX as u64 / 16 * 16;

/// What kernels can bind of a cache on a device.
#[derive(Clone, Copy, Debug)]
struct Room {
    /// Bytes of a segment.
    segment_bytes: u64,
    /// Storage buffers of a kernel, those that are not the cache's included.
    buffers: u32,
}

impl Room {
    fn of(gpu: &Gpu) -> Self {
        let limits = gpu.limits();
        // WebGPU has no such limit, and wgpu none where it keeps to WebGPU strictly: it says 0 then.
        let in_all = limits.max_buffers_and_acceleration_structures_per_shader_stage;
        let in_all = if in_all == 0 { u32::MAX } else { in_all };
        // Every kernel has one uniform buffer besides.
        let group = limits.max_bindings_per_bind_group.min(in_all);
        Self {
            segment_bytes: gpu.max_storage_bytes().min(MAX_SEGMENT_BYTES),
            buffers: limits.max_storage_buffers_per_shader_stage.min(group.saturating_sub(1)),
        }
    }

    /// How K and V are cut so that the attention kernels can bind them beside their own buffers and, if asked for, an
    /// lse; or why not, and what fits.
    fn cut(&self, config: &KvCacheConfig, lse: bool) -> Result<[Segments; 2]> {
        let layouts = [config.k_layout(), config.v_layout()];
        let Self { segment_bytes, buffers } = *self;
        let have = format!("{buffers} storage buffers of {segment_bytes} bytes");
        let [Some(k), Some(v)] = layouts.map(|layout| layout.segments(config.num_blocks, segment_bytes)) else {
            let need = layouts.map(|layout| layout.side_bytes(1).unwrap_or(u64::MAX)).into_iter().max().unwrap_or(0);
            let what = if config.contiguous { "max_seq_len" } else { "block_size" };
            let need = format!("{need} bytes for a block");
            return Err(Error::unsupported(what, need, have).with_hint("use smaller blocks, or a smaller format"));
        };
        let others = attention_storage_buffers(k, v) - k.count - v.count;
        let need = attention_storage_buffers(k, v) + u32::from(lse);
        if need <= buffers {
            return Ok([k, v]);
        }
        let [k_bytes, v_bytes] = layouts.map(|layout| layout.side_bytes(config.num_blocks).unwrap_or(u64::MAX));
        let sides = format!("{} for {k_bytes} bytes of K, {} for {v_bytes} bytes of V", k.count, v.count);
        let others = format!("{others} others{}", if lse { " and lse" } else { "" });
        let what = if config.contiguous { "batch" } else { "num_blocks" };
        let hint = format!("the largest pool that fits has {} blocks", self.largest_pool(config, lse));
        let need = format!("{need} storage buffers in a kernel ({sides}, {others})");
        Err(Error::unsupported(what, need, have).with_hint(hint))
    }

    /// Most blocks that [`Self::cut`] accepts, the other fields being those of `config`.
    fn largest_pool(&self, config: &KvCacheConfig, lse: bool) -> u32 {
        let layouts = [config.k_layout(), config.v_layout()];
        let fits = |num_blocks| match layouts.map(|layout| layout.segments(num_blocks, self.segment_bytes)) {
            [Some(k), Some(v)] => attention_storage_buffers(k, v) + u32::from(lse) <= self.buffers,
            _ => false,
        };
        // More blocks never need fewer segments. Between a pool that fits (an empty one would) and one that doesn't, the range is halved.
        let (mut fitting, mut refused) = (0, config.num_blocks);
        while refused - fitting > 1 {
            let middle = fitting + (refused - fitting) / 2;
            *(if fits(middle) { &mut fitting } else { &mut refused }) = middle;
        }
        fitting
    }
}

/// How K and V are cut on a device.
///
/// # Errors
/// [`Error::Unsupported`] if a block is larger than a binding, or there are more segments than the attention kernels can bind.
pub(crate) fn segments(gpu: &Gpu, config: &KvCacheConfig) -> Result<[Segments; 2]> {
    Room::of(gpu).cut(config, false)
}

/// Most blocks of a pool of this shape that the kernels can bind on a device.
pub(crate) fn largest_pool(gpu: &Gpu, config: &KvCacheConfig) -> u32 {
    Room::of(gpu).largest_pool(&config.with_blocks(u32::MAX, config.block_size), false)
}

/// Fails if kernels that write an lse, which takes a buffer more, can't bind all segments of a cache.
///
/// # Errors
/// [`Error::Unsupported`] that says which pool fits.
pub(crate) fn check_lse(gpu: &Gpu, config: &KvCacheConfig) -> Result<()> {
    Room::of(gpu).cut(config, true).map(drop).map_err(|e| match e {
        Error::Unsupported { need, have, hint, .. } => {
            let hint = hint.map_or_else(String::new, |hint| format!("{hint}, or "));
            Error::unsupported("lse", need, have).with_hint(format!("{hint}attend without lse"))
        }
        e => e,
    })
}

/// Makes the buffers of all layers, or none.
pub(crate) async fn allocate(gpu: &Gpu, config: &KvCacheConfig, segments: [Segments; 2]) -> Result<Vec<LayerStorage>> {
    // Each error scope round trip costs a wait in a browser, so one scope holds all layers.
    gpu.scoped("allocating the KV cache", || {
        let side = |name: &str, layer: u32, layout: KvLayout, segments: Segments| {
            let buffer = |segment: u32| {
                let blocks = segments.blocks_of(segment, config.num_blocks);
                let table = if segment == 0 { layout.channel_table_bytes() } else { 0 };
                gpu.device().create_buffer(&wgpu::BufferDescriptor {
                    label: Some(&format!("folio {name} of layer {layer}")),
                    size: u64::from(blocks) * layout.block_bytes() + table,
                    usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                })
            };
            SideStorage { buffers: (0..segments.count).map(buffer).collect(), layout, segments }
        };
        (0..config.layers_per_group())
            .map(|layer| LayerStorage {
                k: side("K", layer, config.k_layout(), segments[0]),
                v: (!config.latent).then(|| side("V", layer, config.v_layout(), segments[1])),
            })
            .collect()
    })
    .await
    .map_err(|e| match e {
        Error::Wgpu { source, .. } => {
            let need = format!("{} bytes for {} layers", config.pool_bytes(), config.num_layers);
            let error = Error::unsupported("num_blocks", need, format!("less: {source}"));
            error.with_hint("use fewer blocks, or a smaller format")
        }
        e => e,
    })
}

/// The storage of all layers.
#[derive(Debug)]
pub(crate) struct Layers {
    /// Of the layers of a group; those of the others have the same.
    all: Vec<LayerStorage>,
    num_layers: u32,
    /// The buffers of all of them: each call of each layer asks whether the host's ranges are in one.
    buffers: HashSet<wgpu::Buffer>,
}

#[allow(clippy::mutable_key_type, reason = "a buffer is hashed by its identity")]
impl Layers {
    pub(super) fn new(all: Vec<LayerStorage>, num_layers: u32) -> Self {
        let buffers =
            all.iter().flat_map(LayerStorage::sides).flat_map(|side| side.buffers().iter().cloned()).collect();
        Self { all, num_layers, buffers }
    }

    /// Each buffer once.
    pub(super) fn iter(&self) -> impl Iterator<Item = &LayerStorage> {
        self.all.iter()
    }

    /// One layer.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that isn't there.
    pub(crate) fn get(&self, layer: u32) -> Result<&LayerStorage> {
        let place = layer as usize % self.all.len().max(1);
        let storage = self.all.get(place).filter(|_| layer < self.num_layers);
        storage.ok_or_else(|| Error::argument("layer", layer, format!("below num_layers, {}", self.num_layers)))
    }

    /// Fails if a range that should be the host's lies in a buffer of the cache.
    ///
    /// # Errors
    /// [`Error::Argument`] that names `argument`.
    pub(crate) fn check_foreign(&self, argument: &'static str, range: &BufferRef<'_>) -> Result<()> {
        if self.buffers.contains(range.buffer()) {
            return Err(Error::argument(argument, "the cache's own buffer", "a buffer of the host's"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{KvCacheConfig, MAX_SEGMENT_BYTES, Room};
    use crate::format::KvFormat;

    proptest! {
        /// What a refusal names fits, and one block more does not, whether the error of a much larger or a little larger pool is asked.
        #[test]
        fn the_pool_that_a_refusal_names_is_the_largest(
            k_format in prop::sample::select(&KvFormat::ALL[..]),
            v_format in prop::sample::select(&KvFormat::ALL[..5]),
            num_kv_heads in 1_u32..9,
            eighths in 1_u32..=32,
            block_size in 1_u32..=64,
            num_blocks in 1_u32..=u32::MAX / (9 * 64),
            segment_bytes in 1_u64 << 20..=MAX_SEGMENT_BYTES,
            // Four of these are not the cache's; some drivers have no limit.
            buffers in prop_oneof![8_u32..40, Just(u32::MAX)],
            lse: bool,
        ) {
            let room = Room { segment_bytes, buffers };
            let head_dim = 8 * eighths;
            let config = KvCacheConfig::new(1, num_kv_heads, head_dim)
                .with_blocks(num_blocks, block_size)
                .with_formats(k_format, v_format);
            prop_assert!(config.validate().is_ok());
            if let Err(error) = room.cut(&config, lse) {
                let largest = room.largest_pool(&config, lse);
                let cut = |num_blocks| room.cut(&KvCacheConfig { num_blocks, ..config }, lse);
                prop_assert!(largest < num_blocks);
                prop_assert!(largest == 0 || cut(largest).is_ok(), "{error}");
                let next = cut(largest + 1);
                prop_assert!(next.is_err(), "{error}");
                prop_assert_eq!(room.largest_pool(&KvCacheConfig { num_blocks: largest + 1, ..config }, lse), largest);
            }
        }
    }
}

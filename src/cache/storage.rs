//! The GPU buffers of all layers.

use std::ops::Range;

use super::layout::{KvCacheConfig, KvLayout, Segments};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernel::attention_storage_buffers;
use crate::record::BufferRef;

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

/// One layer's K and V.
#[derive(Debug)]
pub(crate) struct LayerStorage {
    pub(crate) k: SideStorage,
    pub(crate) v: SideStorage,
}

impl LayerStorage {
    /// K, then V.
    pub(crate) fn sides(&self) -> [&SideStorage; 2] {
        [&self.k, &self.v]
    }

    /// K's segments, then V's: what kernels bind one after another.
    pub(crate) fn bindings(&self) -> impl Iterator<Item = wgpu::BindingResource<'_>> {
        self.k.bindings().chain(self.v.bindings())
    }
}

/// How K and V are cut on a device.
///
/// # Errors
/// [`Error::Unsupported`] if a block is larger than a binding, or there are more segments than the attention kernels can bind.
pub(crate) fn segments(gpu: &Gpu, config: &KvCacheConfig) -> Result<[Segments; 2]> {
    let max = gpu.max_storage_bytes();
    let max_buffers = gpu.limits().max_storage_buffers_per_shader_stage;
    let layouts = [config.k_layout(), config.v_layout()];
    let [k, v] = layouts.map(|layout| layout.segments(config.num_blocks, max));
    let need = match (k, v) {
        (Some(k), Some(v)) if attention_storage_buffers(k, v) <= max_buffers => return Ok([k, v]),
        (Some(k), Some(v)) => {
            let [k_bytes, v_bytes] = layouts.map(|layout| layout.side_bytes(config.num_blocks).unwrap_or(u64::MAX));
            let segments = format!("{} segments for {k_bytes} bytes of K and {} for {v_bytes} of V", k.count, v.count);
            format!("{} storage buffers in a kernel ({segments} per layer)", attention_storage_buffers(k, v))
        }
        _ => format!("{} bytes for a block", layouts.map(|layout| layout.block_bytes()).into_iter().max().unwrap_or(0)),
    };
    Err(Error::Unsupported {
        what: "num_blocks",
        need,
        have: format!("{max_buffers} storage buffers of {max} bytes"),
        hint: format!("; the largest pool that fits has {} blocks", largest_pool(layouts, max, max_buffers)),
    })
}

/// Most blocks whose segments the attention kernels can bind.
fn largest_pool([k, v]: [KvLayout; 2], max_bytes: u64, max_buffers: u32) -> u64 {
    let (k_most, v_most) = (k.max_blocks(max_bytes), v.max_blocks(max_bytes));
    let spare = u64::from(max_buffers.saturating_sub(attention_storage_buffers(Segments::ONE, Segments::ONE)));
    let pools = (0..=spare).map(|more_k| (k_most * (1 + more_k)).min(v_most * (1 + spare - more_k)));
    pools.max().unwrap_or(0)
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
        (0..config.num_layers)
            .map(|layer| LayerStorage {
                k: side("K", layer, config.k_layout(), segments[0]),
                v: side("V", layer, config.v_layout(), segments[1]),
            })
            .collect()
    })
    .await
    .map_err(|e| match e {
        Error::Wgpu { message, .. } => Error::Unsupported {
            what: "num_blocks",
            need: format!("{} bytes for {} layers", config.pool_bytes(), config.num_layers),
            have: format!("less: {message}"),
            hint: "; use fewer blocks, or a smaller format".to_owned(),
        },
        e => e,
    })
}

/// The storage of a layer.
pub(crate) fn layer(layers: &[LayerStorage], layer: u32) -> Result<&LayerStorage> {
    layers
        .get(layer as usize)
        .ok_or_else(|| Error::argument("layer", layer, format!("below num_layers, {}", layers.len())))
}

/// Fails for a buffer of the cache's own: it can't be read and written in one dispatch, and nobody else may write it.
pub(crate) fn check_foreign(layers: &[LayerStorage], argument: &'static str, range: &BufferRef<'_>) -> Result<()> {
    let mut own = layers.iter().flat_map(|layer| layer.k.buffers().iter().chain(layer.v.buffers()));
    if own.any(|buffer| buffer == range.buffer()) {
        return Err(Error::argument(argument, "the cache's own buffer", "a buffer of the host's"));
    }
    Ok(())
}

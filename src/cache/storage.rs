//! The GPU buffers of all layers.

use super::layout::KvCacheConfig;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::record::BufferRef;

/// One layer's K and V.
#[derive(Debug)]
pub(crate) struct LayerStorage {
    pub(crate) k: wgpu::Buffer,
    pub(crate) v: wgpu::Buffer,
}

/// Makes the buffers of all layers, or none.
pub(crate) async fn allocate(gpu: &Gpu, config: &KvCacheConfig) -> Result<Vec<LayerStorage>> {
    let max = gpu.max_storage_bytes();
    let (k, v) = (config.k_layout(), config.v_layout());
    let larger = if k.block_bytes() >= v.block_bytes() { k } else { v };
    match larger.side_bytes(config.num_blocks) {
        Some(bytes) if bytes <= max => {}
        bytes => {
            let need = bytes.map_or_else(|| "more than 2^64 bytes".to_owned(), |b| format!("{b} bytes"));
            return Err(Error::Unsupported {
                what: "num_blocks",
                need: format!("{need} for one side of a layer"),
                have: format!("{max} bytes in a storage binding"),
                hint: format!("; the largest pool that fits has {} blocks", larger.max_blocks(max)),
            });
        }
    }
    // Each error scope round trip costs a wait in a browser, so one scope holds all layers.
    gpu.scoped("allocating the KV cache", || {
        let buffer = |label: String, bytes: Option<u64>| {
            gpu.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some(&label),
                size: bytes.unwrap_or(0),
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        };
        (0..config.num_layers)
            .map(|layer| LayerStorage {
                k: buffer(format!("folio K of layer {layer}"), k.side_bytes(config.num_blocks)),
                v: buffer(format!("folio V of layer {layer}"), v.side_bytes(config.num_blocks)),
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
    if layers.iter().any(|layer| [&layer.k, &layer.v].contains(&range.buffer())) {
        return Err(Error::argument(argument, "the cache's own buffer", "a buffer of the host's"));
    }
    Ok(())
}

//! [`AppendLatent`]: norm, rotary embedding and append of a step's latents in one dispatch.

use super::record::{AppendKernel, NewRows};
use super::{KvCache, Step};
use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Gpu, Recorder, Upload, VariantProgram, params_binding};
use crate::kernel::{AttendFlags, Kernel, RopeConfig, RopeShape, Variant};
use crate::layout::KvCacheConfig;
use crate::plan::{CacheParams, push_params};

/// The weights of the norm of one layer's latents, on the GPU: RMSNorm over the `value_dim` first elements of a row.
#[derive(Debug)]
pub struct LatentNorm {
    value_dim: usize,
    weights: wgpu::Buffer,
}

impl LatentNorm {
    /// Uploads the weights, `[value_dim]`. `eps` is added to the mean square.
    ///
    /// # Errors
    /// [`Error::Argument`] for an `eps` that is not a normal number above 0; [`Error::Wgpu`].
    pub fn new(gpu: &Gpu, weights: &[f32], eps: f32) -> Result<Self> {
        Ok(Self { value_dim: weights.len(), weights: gpu.norm_table("folio latent norm", &[weights], eps)? })
    }
}

/// The kernel of [`KvCache::append_normed_latent`]. Make one per distinct [`RopeConfig`] and use it for all layers and steps.
#[derive(Debug)]
pub struct AppendLatent {
    gpu: Gpu,
    cache: KvCacheConfig,
    table: wgpu::Buffer,
    program: VariantProgram,
}

impl AppendLatent {
    /// Compiles the kernel for the shape of a [latent](KvCacheConfig::latent) cache and uploads the frequencies.
    ///
    /// # Errors
    /// [`Error::Argument`] for a cache that is not latent, a rotation that reaches into the values, or a field of `rope` that breaks its rule;
    /// [`Error::Unsupported`] if the kernel needs more than the device offers; [`Error::Wgpu`] if it doesn't compile.
    pub async fn new(cache: &KvCache, rope: RopeConfig) -> Result<Self> {
        let (gpu, geometry) = (cache.gpu().clone(), *cache.config());
        if !geometry.latent {
            return Err(Error::argument("cache", "one with values of its own", "a latent one"));
        }
        rope.validate(geometry.head_dim)?;
        if rope.rotary_start < geometry.value_dim() {
            let rule = format!("at least value_dim, {}: values are normalised", geometry.value_dim());
            return Err(Error::argument("rotary_start", rope.rotary_start, rule));
        }
        let variant = Variant::new(Kernel::Append, gpu.target(), &geometry, 1, AttendFlags::default());
        let variant = variant.with_segments(cache.segments()).with_rope(RopeShape::of(&rope)).with_head_norm();
        let program = VariantProgram::new(&gpu, variant).await?;
        let table = gpu.rope_table(&rope)?;
        Ok(Self { gpu, cache: geometry, table, program })
    }

    /// [`AppendLatent::new`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`AppendLatent::new`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new_blocking(cache: &KvCache, rope: RopeConfig) -> Result<Self> {
        pollster::block_on(Self::new(cache, rope))
    }

    /// Runs the kernel once on no tokens, so that drivers which compile at the first dispatch do it now. **Submits** a command buffer; doesn't
    /// wait for it.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub fn warm_up(&self) -> Result<()> {
        let gpu = &self.gpu;
        let mut words = Vec::new();
        push_params(&mut words, &CacheParams::default());
        let (lists, lease) = Upload::new(gpu, "warm_up", words)?.buffer()?;
        let (rows, norm) = (gpu.warm_up_buffer()?, gpu.warm_up_buffer()?);
        // What is written needs a buffer for each binding.
        let segments = self.program.variant.k_segments.count;
        let sides = (0..segments).map(|_| gpu.warm_up_buffer()).collect::<Result<Vec<_>>>()?;
        let mut resources = vec![rows.as_entire_binding()];
        resources.extend(sides.iter().map(wgpu::Buffer::as_entire_binding));
        resources.extend([lists.as_entire_binding(), params_binding::<CacheParams>(&lists, 0)]);
        resources.extend([self.table.as_entire_binding(), norm.as_entire_binding()]);
        gpu.warm_up([self.program.dispatch(resources, [1, 1, 1])], lease)
    }
}

impl KvCache {
    /// [`KvCache::append_latent`] of rows that are not finished: the first `value_dim` elements are normalised, the others rotated by their tokens'
    /// positions, on the way into the cache. `rows`, f32 `[num_tokens, num_kv_heads, head_dim]`, stay as they are.
    ///
    /// # Errors
    /// Those of [`KvCache::append_latent`]; [`Error::Argument`] for a kernel for another cache, or a norm of another width.
    pub fn append_normed_latent<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        step: &Step,
        layer: u32,
        kernel: &AppendLatent,
        rows: impl Into<BufferRef<'a>>,
        norm: &LatentNorm,
    ) -> Result<()> {
        let config = self.config();
        if kernel.cache != *config || kernel.gpu.device() != self.gpu().device() {
            let got = format!("one made for {:?}", kernel.cache);
            return Err(Error::argument("kernel", got, format!("one made on this device for {config:?}")));
        }
        if norm.value_dim != config.value_dim() as usize {
            let need = format!("for value_dim, {}", config.value_dim());
            return Err(Error::argument("norm", format!("weights for {}", norm.value_dim), need));
        }
        let rows = NewRows { k: rows.into(), v: None };
        let kernel = AppendKernel { program: &kernel.program, tables: vec![&kernel.table, &norm.weights] };
        self.append_any(recorder.into(), step, layer, rows, kernel)
    }
}

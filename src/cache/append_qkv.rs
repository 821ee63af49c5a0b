//! [`AppendQkv`]: rotary embedding, norm of heads and append of a step's queries, keys and values in one dispatch.

use super::{KvCache, Step, check_q_heads};
use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Gpu, Recorder, Upload, VariantProgram, params_binding};
use crate::kernel::{AttendFlags, Kernel, RopeConfig, RopeShape, Variant};
use crate::layout::{KvCacheConfig, Region};
use crate::plan::{CacheParams, push_params};

/// Queries, keys and values of a step's tokens in one buffer, as one linear layer writes them: three f32 matrices, `[num_tokens, num_q_heads,
/// head_dim]` and twice `[num_tokens, num_kv_heads, head_dim]`. Each is padded behind its last row, by what pads its rows to multiples of 64 elements,
/// so that the next one starts where a device can bind it.
#[derive(Clone, Copy, Debug)]
pub struct QkvRows<'a> {
    buffer: &'a wgpu::Buffer,
    num_tokens: u32,
    num_q_heads: u32,
    regions: [Region; 3],
}

impl<'a> QkvRows<'a> {
    /// Rows from the start of a buffer, for a cache of this shape.
    #[must_use]
    pub fn new(buffer: &'a wgpu::Buffer, num_tokens: u32, num_q_heads: u32, cache: &KvCacheConfig) -> Self {
        let kv_width = cache.num_kv_heads.saturating_mul(cache.head_dim);
        let widths = [num_q_heads.saturating_mul(cache.head_dim), kv_width, kv_width];
        Self { buffer, num_tokens, num_q_heads, regions: Region::of(widths) }
    }

    /// Everything.
    #[must_use]
    pub fn range(&self) -> BufferRef<'a> {
        BufferRef::new(self.buffer, 0, self.elements().saturating_mul(4))
    }

    /// The queries, as attention takes them.
    #[must_use]
    pub fn q(&self) -> BufferRef<'a> {
        self.region(0)
    }

    /// The keys, as [`KvCache::append`] takes them.
    #[must_use]
    pub fn k(&self) -> BufferRef<'a> {
        self.region(1)
    }

    /// The values, as [`KvCache::append`] takes them.
    #[must_use]
    pub fn v(&self) -> BufferRef<'a> {
        self.region(2)
    }

    fn region(&self, index: usize) -> BufferRef<'a> {
        let Region { width, offset, .. } = self.regions[index];
        let bytes = |per_token: u32| u64::from(self.num_tokens) * u64::from(per_token) * 4;
        BufferRef::new(self.buffer, bytes(offset), bytes(width))
    }

    /// f32 of all, padding included.
    fn elements(&self) -> u64 {
        let padded: u64 = self.regions.iter().map(|region| u64::from(region.padded_width())).sum();
        u64::from(self.num_tokens).saturating_mul(padded)
    }
}

/// The weights of the norms of one layer's query and key heads, on the GPU: RMSNorm over `head_dim`, before the rotation.
#[derive(Debug)]
pub struct HeadNorm {
    head_dim: usize,
    weights: wgpu::Buffer,
}

impl HeadNorm {
    /// Uploads the weights, `[head_dim]` each. `eps` is added to the mean square.
    ///
    /// # Errors
    /// [`Error::Argument`] for weights of different lengths, or an `eps` that is not a normal number above 0; [`Error::Wgpu`].
    pub fn new(gpu: &Gpu, q: &[f32], k: &[f32], eps: f32) -> Result<Self> {
        if k.len() != q.len() {
            let need = format!("as many as for queries, {}", q.len());
            return Err(Error::argument("k", format!("{} values", k.len()), need));
        }
        let weights = gpu.norm_table("folio head norms", &[q, k], eps)?;
        Ok(Self { head_dim: q.len(), weights })
    }
}

/// The kernel of [`KvCache::append_qkv`]. Make one per distinct [`RopeConfig`] and use it for all layers and steps.
#[derive(Debug)]
pub struct AppendQkv {
    gpu: Gpu,
    cache: KvCacheConfig,
    num_q_heads: u32,
    table: wgpu::Buffer,
    program: VariantProgram,
}

impl AppendQkv {
    /// Compiles the kernel for a cache's shape and uploads the frequencies. With `head_norm`, queries and keys are normalised before they are
    /// rotated.
    ///
    /// # Errors
    /// [`Error::Argument`] for a cache whose values are not as long as its keys, `num_q_heads` that is no multiple of the cache's `num_kv_heads` or above 65 535, or a field of `rope` that breaks its
    /// rule; [`Error::Unsupported`] if the kernel needs more than the device offers; [`Error::Wgpu`] if it doesn't compile.
    pub async fn new(cache: &KvCache, rope: RopeConfig, num_q_heads: u32, head_norm: bool) -> Result<Self> {
        Self::build(cache, rope, num_q_heads, head_norm, None).await
    }

    /// [`AppendQkv::new`] for [`KvCache::append_qkv_with_sinks`]: queries are written a second time, rotated by
    /// [`KvCacheConfig::sink_position`] of their tokens' positions.
    ///
    /// # Errors
    /// Those of [`AppendQkv::new`]; [`Error::Argument`] for a cache without a window; [`Error::Unsupported`] if a device has too few storage bindings
    /// for a cache of so many segments beside the second queries.
    pub async fn with_sink_queries(
        cache: &KvCache,
        rope: RopeConfig,
        num_q_heads: u32,
        head_norm: bool,
    ) -> Result<Self> {
        let config = cache.config();
        let group = config.sink_group();
        if group.window.is_none() {
            return Err(Error::argument("cache", "one without a window", "one with a window and sink tokens"));
        }
        // The kernel has one place for queries of sink tokens.
        let mut groups = config.groups.as_slice().iter();
        if let Some(other) = groups.find(|other| other.sink_tokens > 0 && **other != group) {
            let got = format!("groups that keep {group}, and {other}");
            return Err(Error::argument("cache", got, "the same window in all groups with sink tokens"));
        }
        let [k, v] = cache.segments();
        // Queries twice, the lists, the frequencies and perhaps weights.
        let need = k.count + v.count + 4 + u32::from(head_norm);
        let have = cache.gpu().limits().max_storage_buffers_per_shader_stage;
        if need > have {
            return Err(Error::unsupported("sink queries", format!("{need} storage bindings"), have));
        }
        Self::build(cache, rope, num_q_heads, head_norm, Some(config.sink_position(u32::MAX))).await
    }

    async fn build(
        cache: &KvCache,
        rope: RopeConfig,
        num_q_heads: u32,
        head_norm: bool,
        sink_position: Option<u32>,
    ) -> Result<Self> {
        let (gpu, geometry) = (cache.gpu().clone(), *cache.config());
        if geometry.latent || geometry.value_dim() != geometry.head_dim {
            let rule = format!("head_dim, {}; other rows go through append", geometry.head_dim);
            return Err(Error::argument("value_dim", geometry.value_dim(), rule));
        }
        rope.validate(geometry.head_dim)?;
        let num_kv_heads = geometry.num_kv_heads;
        check_q_heads(&geometry, num_q_heads)?;
        let shape = RopeShape::of(&rope);
        let group_size = num_q_heads / num_kv_heads;
        let variant = Variant::new(Kernel::AppendQkv, gpu.target(), &geometry, group_size, AttendFlags::default());
        let variant = variant.with_segments(cache.segments()).with_rope(shape);
        let variant = if head_norm { variant.with_head_norm() } else { variant };
        let variant = sink_position.map_or(variant, |position| variant.with_sink_queries(position));
        let program = VariantProgram::new(&gpu, variant).await?;
        let table = gpu.rope_table(&rope)?;
        Ok(Self { gpu, cache: geometry, num_q_heads, table, program })
    }

    /// [`AppendQkv::new`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`AppendQkv::new`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new_blocking(cache: &KvCache, rope: RopeConfig, num_q_heads: u32, head_norm: bool) -> Result<Self> {
        pollster::block_on(Self::new(cache, rope, num_q_heads, head_norm))
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
        let Variant { k_segments, v_segments, head_norm, sink_position, .. } = self.program.variant;
        let (rows, norm, sink_q) = (gpu.warm_up_buffer()?, gpu.warm_up_buffer()?, gpu.warm_up_buffer()?);
        // What is written needs a buffer for each binding.
        let sides =
            (0..k_segments.count + v_segments.count).map(|_| gpu.warm_up_buffer()).collect::<Result<Vec<_>>>()?;
        let mut resources = vec![rows.as_entire_binding()];
        resources.extend(sides.iter().map(wgpu::Buffer::as_entire_binding));
        resources.extend([lists.as_entire_binding(), params_binding::<CacheParams>(&lists, 0)]);
        resources.push(self.table.as_entire_binding());
        resources.extend(head_norm.then(|| norm.as_entire_binding()));
        resources.extend(sink_position.map(|_| sink_q.as_entire_binding()));
        gpu.warm_up([self.program.dispatch(resources, [1, 1, 1])], lease)
    }
}

impl KvCache {
    /// [`KvCache::append`] for rows that lie in one buffer: keys and values go into the cache, and queries stay where they are. Queries and keys
    /// are normalised before, if `kernel` was made so, and rotated by their tokens' positions. It takes one dispatch where [`Rope`](super::Rope) and
    /// `append` take two, and norms two more.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that isn't there, a kernel for another cache, rows of another step or shape, or `norm` that is missing or
    /// too much; [`Error::Stale`]; [`Error::Wgpu`] for a buffer of another device; [`Error::DeviceLost`]. Nothing has been recorded then.
    pub fn append_qkv<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        step: &Step,
        layer: u32,
        kernel: &AppendQkv,
        rows: QkvRows<'_>,
        norm: Option<&HeadNorm>,
    ) -> Result<()> {
        self.append_qkv_any(recorder.into(), step, layer, kernel, rows, norm, None)
    }

    /// [`KvCache::append_qkv`] that also writes queries for sink tokens ([`AttentionConfig::sink_queries`](crate::AttentionConfig::sink_queries)) to
    /// `sink_q`, f32 `[num_tokens, num_q_heads, head_dim]`, by a kernel that was made so ([`AppendQkv::with_sink_queries`]).
    ///
    /// # Errors
    /// Those of [`KvCache::append_qkv`], and [`Error::Argument`] for a range of another size.
    #[expect(clippy::too_many_arguments, reason = "a call of append_qkv, and where more goes")]
    pub fn append_qkv_with_sinks<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        step: &Step,
        layer: u32,
        kernel: &AppendQkv,
        rows: QkvRows<'_>,
        norm: Option<&HeadNorm>,
        sink_q: impl Into<BufferRef<'a>>,
    ) -> Result<()> {
        self.append_qkv_any(recorder.into(), step, layer, kernel, rows, norm, Some(sink_q.into()))
    }

    #[expect(clippy::too_many_arguments, reason = "a call of append_qkv, with or without sinks")]
    fn append_qkv_any(
        &self,
        recorder: Recorder<'_>,
        step: &Step,
        layer: u32,
        kernel: &AppendQkv,
        rows: QkvRows<'_>,
        norm: Option<&HeadNorm>,
        sink_q: Option<BufferRef<'_>>,
    ) -> Result<()> {
        step.check_usable(&self.state)?;
        let storage = self.layer(layer)?;
        self.check_calibrated(layer)?;
        let (gpu, config) = (&self.gpu, &self.config);
        if kernel.cache != *config || kernel.gpu.device() != gpu.device() {
            let got = format!("one made for {:?}", kernel.cache);
            return Err(Error::argument("kernel", got, format!("one made on this device for {config:?}")));
        }
        let expected = QkvRows::new(rows.buffer, step.num_tokens(), kernel.num_q_heads, config);
        if (rows.num_tokens, rows.regions) != (expected.num_tokens, expected.regions) {
            let shape = |rows: &QkvRows<'_>| format!("{} tokens, {} query heads", rows.num_tokens, rows.num_q_heads);
            return Err(Error::argument("rows", shape(&rows), format!("{} of this cache", shape(&expected))));
        }
        if norm.is_some() != kernel.program.variant.head_norm {
            let (got, need) = if norm.is_some() { ("weights", "none") } else { ("none", "weights") };
            return Err(Error::argument("norm", got, format!("{need}, as the kernel was made")));
        }
        if let Some(norm) = norm.filter(|norm| norm.head_dim != config.head_dim as usize) {
            let need = format!("for head_dim, {}", config.head_dim);
            return Err(Error::argument("norm", format!("weights for {}", norm.head_dim), need));
        }
        if sink_q.is_some() != kernel.program.variant.sink_position.is_some() {
            let (got, need) = if sink_q.is_some() { ("a range", "none") } else { ("none", "a range") };
            return Err(Error::argument("sink_q", got, format!("{need}, as the kernel was made")));
        }
        let range = rows.range().check(gpu, "rows", rows.elements(), true)?;
        self.layers.check_foreign("rows", &range)?;
        let q_len = u64::from(step.num_tokens()) * u64::from(kernel.num_q_heads) * u64::from(config.head_dim);
        let sink_q = sink_q.map(|sink_q| sink_q.check(gpu, "sink_q", q_len, true)).transpose()?;
        if let Some(sink_q) = &sink_q {
            self.layers.check_foreign("sink_q", sink_q)?;
            if sink_q.buffer() == range.buffer() {
                return Err(Error::argument("sink_q", "the buffer of rows", "a buffer of its own"));
            }
        }
        let work = step.of_layer(layer);
        let (upload, lease) = work.upload.buffer()?;
        let mut dispatches = Vec::with_capacity(2);
        if work.num_copies > 0 {
            dispatches.push(self.copy_dispatch(storage, &upload, work.num_copies)?);
        }
        let (x, y) = kernel.program.variant.append_qkv_grid("rows", step.num_tokens())?;
        let mut resources = vec![range.binding()];
        resources.extend(storage.written());
        resources.extend([upload.as_entire_binding(), params_binding::<CacheParams>(&upload, 0)]);
        resources.push(kernel.table.as_entire_binding());
        resources.extend(norm.map(|norm| norm.weights.as_entire_binding()));
        resources.extend(sink_q.as_ref().map(BufferRef::binding));
        dispatches.push(kernel.program.dispatch(resources, [x, y, 1]));
        recorder.record(gpu, "folio append", &dispatches, &[lease])
    }
}

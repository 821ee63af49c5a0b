//! Recording append, copy-on-write and gather.

use super::{KvCache, KvCacheConfig, LayerStorage, Segments, SequenceId, Step, check_foreign, layer_storage};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernel::{AttendFlags, CacheParams, Kernel, PackParams, Pipeline, Target, Variant, linear_grid};
use crate::readback::Readback;
use crate::record::{BufferRef, Dispatch, Recorder};
use crate::upload::Upload;

/// Words of the parameter block at the start of an upload. WebGPU's largest uniform alignment is 256 bytes.
pub(crate) const PARAM_BLOCK_WORDS: u32 = 64;

/// The kernels of a cache.
#[derive(Debug)]
pub(super) struct CacheKernels {
    append: Pipeline,
    copy_blocks: Pipeline,
    pub(super) pack_blocks: Pipeline,
    gather: Pipeline,
}

impl CacheKernels {
    pub(super) async fn new(gpu: &Gpu, config: &KvCacheConfig, segments: [Segments; 2]) -> Result<Self> {
        let variant =
            |kernel| Variant::new(kernel, Target::of(gpu), config, 1, AttendFlags::default()).with_segments(segments);
        Ok(Self {
            append: Pipeline::new(gpu, variant(Kernel::Append)).await?,
            copy_blocks: Pipeline::new(gpu, variant(Kernel::CopyBlocks)).await?,
            pack_blocks: Pipeline::new(gpu, variant(Kernel::PackBlocks)).await?,
            gather: Pipeline::new(gpu, variant(Kernel::Gather)).await?,
        })
    }
}

/// A sequence's rows of one layer, read back.
#[derive(Clone, Debug, PartialEq)]
pub struct KvRows {
    /// `[seq_len, num_kv_heads, head_dim]`
    pub k: Vec<f32>,
    /// `[seq_len, num_kv_heads, head_dim]`
    pub v: Vec<f32>,
}

/// Elements of the K or V rows of `num_tokens` tokens.
fn row_elements(config: &KvCacheConfig, num_tokens: u32) -> u64 {
    u64::from(num_tokens) * u64::from(config.num_kv_heads) * u64::from(config.head_dim)
}

/// Invocations that handle rows of `num_tokens` tokens, 8 elements each.
fn row_chunks(config: &KvCacheConfig, num_tokens: u32) -> u64 {
    row_elements(config, num_tokens) / 8
}

/// Invocations that copy `count` blocks, 16 bytes of K and V each.
fn copy_chunks(config: &KvCacheConfig, count: u32) -> u64 {
    u64::from(count) * config.k_layout().block_bytes().max(config.v_layout().block_bytes()) / 16
}

/// Workgroups of append for a number of tokens: (x, y).
fn append_grid(
    pipeline: &Pipeline,
    argument: &'static str,
    config: &KvCacheConfig,
    num_tokens: u32,
) -> Result<(u32, u32)> {
    let num_rows = u64::from(num_tokens) * u64::from(config.num_kv_heads);
    grid(pipeline, argument, pipeline.variant().append_invocations(num_rows))
}

/// Workgroups for a number of invocations: (x, y).
pub(crate) fn grid(pipeline: &Pipeline, argument: &'static str, invocations: u64) -> Result<(u32, u32)> {
    // Kernels number their invocations with u32.
    let workgroups = invocations.div_ceil(pipeline.variant().workgroup_size.into());
    linear_grid(workgroups).filter(|_| invocations <= u64::from(u32::MAX)).ok_or_else(|| {
        Error::argument(argument, format!("{invocations} chunks of work"), "fewer than 2^32; use smaller steps")
    })
}

impl CacheKernels {
    /// Uploads a step's parameters, slots, positions and copy list: block 0 is the parameters of append and rope, block 1 copy_blocks'.
    pub(super) fn upload(
        &self,
        gpu: &Gpu,
        config: &KvCacheConfig,
        slots: &[u32],
        positions: &[u32],
        copies: &[[u32; 2]],
    ) -> Result<Upload> {
        let list_offset = 2 * PARAM_BLOCK_WORDS;
        let num_words = list_offset as usize + slots.len() + positions.len() + 2 * copies.len();
        // Where a sum saturates, the words don't fit into any binding, and `fill` says so.
        let positions_offset = list_offset.saturating_add(slots.len() as u32);
        let params = CacheParams {
            num_tokens: slots.len() as u32,
            num_copies: copies.len() as u32,
            list_offset,
            positions_offset,
            copies_offset: positions_offset.saturating_add(positions.len() as u32),
            num_blocks: config.num_blocks,
            ..CacheParams::default()
        };
        let append = append_grid(&self.append, "batch", config, params.num_tokens)?;
        let copy = grid(&self.copy_blocks, "batch", copy_chunks(config, params.num_copies))?;
        let mut words = Vec::with_capacity(num_words);
        push_params(&mut words, &CacheParams { grid_x: append.0, ..params });
        push_params(&mut words, &CacheParams { grid_x: copy.0, ..params });
        words.extend_from_slice(slots);
        words.extend_from_slice(positions);
        words.extend_from_slice(copies.as_flattened());
        gpu.uploads().fill(gpu, "batch", &words)
    }
}

/// Appends a parameter block and pads it to the next one.
pub(crate) fn push_params<P: bytemuck::Pod>(words: &mut Vec<u32>, params: &P) {
    let start = words.len();
    words.extend_from_slice(bytemuck::cast_slice(std::slice::from_ref(params)));
    words.resize(start + PARAM_BLOCK_WORDS as usize, 0);
}

/// The `index`th parameter block of an upload, as a uniform binding.
pub(crate) fn params_binding<P>(buffer: &wgpu::Buffer, index: u32) -> wgpu::BindingResource<'_> {
    wgpu::BindingResource::Buffer(wgpu::BufferBinding {
        buffer,
        offset: u64::from(index) * u64::from(PARAM_BLOCK_WORDS) * 4,
        size: std::num::NonZeroU64::new(size_of::<P>() as u64),
    })
}

impl KvCache {
    /// Records one layer's new K and V rows into the cache. The first thing a step does in each layer: blocks that the step must not
    /// share any more are copied before.
    ///
    /// `k` and `v`: f32 `[num_tokens, num_kv_heads, head_dim]`, the tokens of all sequences of the step one after another. Each
    /// range needs usage `STORAGE`, an offset that is a multiple of `min_storage_buffer_offset_alignment`, and exactly the step's size.
    ///
    /// Tokens of *any* sequence may hold NaN or infinities: they stay in their sequence. [`KvFormat`](super::KvFormat) says what each format
    /// makes of them. Formats with scales per channel need [`calibrate_keys`](Self::calibrate_keys) before.
    ///
    /// Models with rotary embeddings use [`append_with_rope`](Self::append_with_rope).
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that isn't there or a range that doesn't fit; [`Error::StaleStep`];
    /// [`Error::Wgpu`] for a buffer of another device (which must be of the same wgpu instance: wgpu itself gives buffers of other
    /// instances no meaning).
    pub fn append<'p, 'e: 'p, 'k, 'v>(
        &self,
        recorder: impl Into<Recorder<'p, 'e>>,
        step: &Step,
        layer: u32,
        k: impl Into<BufferRef<'k>>,
        v: impl Into<BufferRef<'v>>,
    ) -> Result<()> {
        self.append_by(recorder.into(), step, layer, [k.into(), v.into()], &self.kernels.append, None)
    }

    /// Records an append with one of its variants; `table` is the one of a rotary embedding, if the variant has one.
    pub(crate) fn append_by(
        &self,
        recorder: Recorder<'_, '_>,
        step: &Step,
        layer: u32,
        [k, v]: [BufferRef<'_>; 2],
        kernel: &Pipeline,
        table: Option<&wgpu::Buffer>,
    ) -> Result<()> {
        step.check_usable(&self.state)?;
        let storage = self.layer(layer)?;
        self.check_calibrated(layer)?;
        let (gpu, config) = (&self.gpu, &self.config);
        let num_tokens = step.num_tokens();
        let elements = row_elements(config, num_tokens);
        let k = k.check(gpu, "k", elements, true)?;
        let v = v.check(gpu, "v", elements, true)?;
        check_foreign(&self.layers, "k", &k)?;
        check_foreign(&self.layers, "v", &v)?;
        let upload = step.upload()?.buffer();
        let mut dispatches = Vec::with_capacity(2);
        if step.num_copies > 0 {
            dispatches.push(self.copy_dispatch(storage, upload, step.num_copies)?);
        }
        let (x, y) = append_grid(kernel, "k", config, num_tokens)?;
        let mut resources = vec![k.binding(), v.binding()];
        resources.extend(storage.bindings());
        resources.extend([upload.as_entire_binding(), params_binding::<CacheParams>(upload, 0)]);
        resources.extend(table.map(wgpu::Buffer::as_entire_binding));
        dispatches.push(kernel.dispatch(gpu, &resources, [x, y, 1])?);
        recorder.record("folio append", &dispatches);
        Ok(())
    }

    /// Copies of whole blocks of a layer, as an upload of [`CacheKernels::upload`] lists them.
    pub(super) fn copy_dispatch(
        &self,
        storage: &LayerStorage,
        upload: &wgpu::Buffer,
        count: u32,
    ) -> Result<Dispatch<'_>> {
        let (x, y) = grid(&self.kernels.copy_blocks, "batch", copy_chunks(&self.config, count))?;
        let mut resources: Vec<_> = storage.bindings().collect();
        resources.extend([upload.as_entire_binding(), params_binding::<CacheParams>(upload, 1)]);
        self.kernels.copy_blocks.dispatch(&self.gpu, &resources, [x, y, 1])
    }

    /// Records the copy of a sequence's committed rows of one layer into contiguous f32 buffers of the host's,
    /// `[seq_len, num_kv_heads, head_dim]` each. Returns the number of tokens. An empty sequence records nothing.
    ///
    /// The ranges need usage `STORAGE` and an aligned offset, may be larger than the rows, and may be of one buffer if they don't overlap.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Argument`] for a layer that isn't there or a range that doesn't fit; [`Error::Wgpu`].
    pub fn record_gather<'p, 'e: 'p, 'k, 'v>(
        &self,
        recorder: impl Into<Recorder<'p, 'e>>,
        sequence: SequenceId,
        layer: u32,
        k_out: impl Into<BufferRef<'k>>,
        v_out: impl Into<BufferRef<'v>>,
    ) -> Result<u32> {
        let storage = layer_storage(&self.layers, layer)?;
        let (gpu, config) = (&self.gpu, &self.config);
        let (num_tokens, table) = {
            let state = self.state();
            let table = state.table(sequence)?;
            (table.len(), table.blocks().iter().map(|b| b.index()).collect::<Vec<_>>())
        };
        let elements = row_elements(config, num_tokens);
        let k_out = k_out.into().check(gpu, "k_out", elements, false)?;
        let v_out = v_out.into().check(gpu, "v_out", elements, false)?;
        check_foreign(&self.layers, "k_out", &k_out)?;
        check_foreign(&self.layers, "v_out", &v_out)?;
        if k_out.overlaps(&v_out) {
            return Err(Error::argument("v_out", "a range that overlaps k_out", "ranges that don't overlap"));
        }
        if num_tokens == 0 {
            return Ok(0);
        }
        let (x, y) = grid(&self.kernels.gather, "sequence", row_chunks(config, num_tokens))?;
        let mut words = Vec::with_capacity(PARAM_BLOCK_WORDS as usize + table.len());
        let params = CacheParams {
            num_tokens,
            list_offset: PARAM_BLOCK_WORDS,
            num_blocks: config.num_blocks,
            grid_x: x,
            ..CacheParams::default()
        };
        push_params(&mut words, &params);
        words.extend_from_slice(&table);
        let upload = gpu.uploads().fill(gpu, "sequence", &words)?;
        let mut resources: Vec<_> = storage.bindings().collect();
        resources.extend([upload.buffer().as_entire_binding(), k_out.binding(), v_out.binding()]);
        resources.push(params_binding::<CacheParams>(upload.buffer(), 0));
        let dispatch = self.kernels.gather.dispatch(gpu, &resources, [x, y, 1])?;
        recorder.into().record("folio gather", &[dispatch]);
        Ok(num_tokens)
    }

    /// Reads a sequence's committed rows of one layer back: exactly `seq_len` tokens, as f32. **Submits** a command buffer of its own;
    /// commands that the host has recorded but not submitted are not seen.
    ///
    /// Natively the future completes only while somebody polls the device: use [`KvCache::gather_blocking`] if nobody does.
    ///
    /// # Errors
    /// Those of [`KvCache::record_gather`]; [`Error::Unsupported`] if the rows don't fit into a storage binding.
    pub async fn gather(&self, sequence: SequenceId, layer: u32) -> Result<KvRows> {
        let num_tokens = self.seq_len(sequence)?;
        self.layer(layer)?;
        if num_tokens == 0 {
            return Ok(KvRows { k: Vec::new(), v: Vec::new() });
        }
        let gpu = &self.gpu;
        let bytes = row_elements(&self.config, num_tokens) * 4;
        if bytes > gpu.max_storage_bytes() {
            return Err(Error::Unsupported {
                what: "sequence",
                need: format!("{bytes} bytes for {num_tokens} tokens"),
                have: format!("{} bytes in a storage binding", gpu.max_storage_bytes()),
                hint: String::new(),
            });
        }
        let buffer = || {
            gpu.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("folio gather"),
                size: bytes,
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            })
        };
        let (k_out, v_out) = gpu.scoped("creating gather buffers", || (buffer(), buffer())).await?;
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        self.record_gather(&mut encoder, sequence, layer, &k_out, &v_out)?;
        let k = Readback::record(gpu, &mut encoder, &BufferRef::from(&k_out))?;
        let v = Readback::record(gpu, &mut encoder, &BufferRef::from(&v_out))?;
        gpu.queue().submit([encoder.finish()]);
        let k = k.read();
        let v = v.read();
        // Neither mapping starts before it is awaited, and the device completes both at once.
        Ok(KvRows { k: k.await?, v: v.await? })
    }

    /// [`KvCache::gather`], waiting for the GPU: submits, and polls the device until the rows are here.
    ///
    /// # Errors
    /// Those of [`KvCache::gather`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn gather_blocking(&self, sequence: SequenceId, layer: u32) -> Result<KvRows> {
        self.gpu.block_on(self.gather(sequence, layer))
    }

    /// Runs the append, copy, pack and gather kernels once on no tokens, so that drivers which compile at the first dispatch do it now (on
    /// lavapipe 0.05 to 0.3 s). **Submits** a command buffer; doesn't wait for it.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub fn warm_up(&self) -> Result<()> {
        let gpu = &self.gpu;
        let storage = self.layer(0)?;
        let mut words = Vec::new();
        push_params(&mut words, &CacheParams { num_blocks: self.config.num_blocks, ..CacheParams::default() });
        push_params(&mut words, &PackParams { num_blocks: self.config.num_blocks, ..PackParams::default() });
        let upload = gpu.uploads().fill(gpu, "warm_up", &words)?;
        let scratch =
            || gpu.create_buffer("creating warm-up buffers", "folio warm-up", 256, wgpu::BufferUsages::STORAGE);
        let (a, b) = (scratch()?, scratch()?);
        let step = upload.buffer();
        let params = params_binding::<CacheParams>(step, 0);
        let caches: Vec<_> = storage.bindings().collect();
        let (a, b) = (a.as_entire_binding(), b.as_entire_binding());
        let list = step.as_entire_binding();
        let append = [&[a.clone(), b.clone()], &caches[..], &[list.clone(), params.clone()]].concat();
        let copy = [&caches[..], &[list.clone(), params.clone()]].concat();
        let pack = [caches[0].clone(), a.clone(), list.clone(), params_binding::<PackParams>(step, 1)];
        let gather = [&caches[..], &[list, a, b, params]].concat();
        let dispatches = [
            self.kernels.append.dispatch(gpu, &append, [1, 1, 1])?,
            self.kernels.copy_blocks.dispatch(gpu, &copy, [1, 1, 1])?,
            self.kernels.pack_blocks.dispatch(gpu, &pack, [1, 1, 1])?,
            self.kernels.gather.dispatch(gpu, &gather, [1, 1, 1])?,
        ];
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        Recorder::from(&mut encoder).record("folio warm-up", &dispatches);
        gpu.queue().submit([encoder.finish()]);
        upload.recycle();
        Ok(())
    }
}

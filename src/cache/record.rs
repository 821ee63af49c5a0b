//! Recording append, copy-on-write and gather.

use super::storage::LayerStorage;
use super::{KvCache, Rope, Step};
use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Dispatch, Gpu, Readback, Recorder, Upload, VariantProgram, params_binding};
use crate::ids::SequenceId;
use crate::kernel::{AttendFlags, Kernel, Variant};
use crate::layout::{KvCacheConfig, Segments};
use crate::plan::{AppendGrids, CacheParams, PARAM_BLOCK_WORDS, PackParams, append_words, push_params};

/// Where an upload of [`append_words`] has the parameters of copy_blocks, in bytes.
const COPY_PARAMS_OFFSET: u64 = PARAM_BLOCK_WORDS as u64 * 4;

/// The kernels of a cache.
#[derive(Debug)]
pub(super) struct CacheKernels {
    append: VariantProgram,
    copy_blocks: VariantProgram,
    pub(super) move_rows: VariantProgram,
    pub(super) pack_blocks: VariantProgram,
    gather: VariantProgram,
}

impl CacheKernels {
    pub(super) async fn new(gpu: &Gpu, config: &KvCacheConfig, segments: [Segments; 2]) -> Result<Self> {
        let variant = |kernel| {
            gpu.tuned(Variant::new(kernel, gpu.target(), config, 1, AttendFlags::default()).with_segments(segments))
        };
        Ok(Self {
            append: VariantProgram::new(gpu, variant(Kernel::Append)).await?,
            copy_blocks: VariantProgram::new(gpu, variant(Kernel::CopyBlocks)).await?,
            move_rows: VariantProgram::new(gpu, variant(Kernel::MoveRows)).await?,
            pack_blocks: VariantProgram::new(gpu, variant(Kernel::PackBlocks)).await?,
            gather: VariantProgram::new(gpu, variant(Kernel::Gather)).await?,
        })
    }
}

/// A sequence's rows of one layer, read back.
#[derive(Clone, Debug, PartialEq)]
pub struct KvRows {
    /// `[seq_len, num_kv_heads, head_dim]`
    pub k: Vec<f32>,
    /// `[seq_len, num_kv_heads, value_dim]`
    pub v: Vec<f32>,
}

/// Rows to be appended; of a latent cache keys only.
pub(super) struct NewRows<'a> {
    pub(super) k: BufferRef<'a>,
    pub(super) v: Option<BufferRef<'a>>,
}

/// A form of the kernel `append`, and the buffers that it binds behind those that all have.
pub(super) struct AppendKernel<'a> {
    pub(super) program: &'a VariantProgram,
    pub(super) tables: Vec<&'a wgpu::Buffer>,
}

/// Elements of the rows of `num_tokens` tokens: of K, of V.
fn row_elements(config: &KvCacheConfig, num_tokens: u32) -> [u64; 2] {
    config.token_elements().map(|elements| u64::from(num_tokens) * elements)
}

impl CacheKernels {
    /// What a step uploads; see [`append_words`].
    pub(super) fn upload(
        &self,
        gpu: &Gpu,
        config: &KvCacheConfig,
        slots: &[u32],
        positions: &[u32],
        copies: &[[u32; 2]],
    ) -> Result<Upload> {
        let [append, copy] = [&self.append, &self.copy_blocks].map(|program| &program.variant);
        let grids = AppendGrids::new(append, copy, slots.len() as u32, copies.len() as u32)?;
        Upload::new(gpu, "batch", append_words(config.num_blocks, slots, positions, copies, grids))
    }
}

impl KvCache {
    /// Records one layer's new K and V rows into the cache. The first thing a step does in each layer: blocks that the step must not
    /// share any more are copied before.
    ///
    /// `k`: f32 `[num_tokens, num_kv_heads, head_dim]`, `v`: f32 `[num_tokens, num_kv_heads, value_dim]`, the tokens of all sequences of the step one
    /// after another. Each range needs usage `STORAGE`, an offset that is a multiple of `min_storage_buffer_offset_alignment`, and exactly the step's size.
    ///
    /// `rope`: K is rotated by its tokens' positions on the way; V is not touched. The cache then holds rotated rows, so rotate Q as well:
    /// [`Rope::rotate`]. `None` for models without rotary embeddings, or K that is rotated already.
    ///
    /// Tokens of *any* sequence may hold NaN or infinities: they stay in their sequence. [`KvFormat`](crate::KvFormat) says what each format
    /// makes of them. Formats with scales per channel need [`calibrate_keys`](Self::calibrate_keys) before.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that isn't there, a range that doesn't fit, or a rope that was made for a cache of another shape or
    /// on another device; or if values are keys in this cache; [`Error::Stale`]; [`Error::Wgpu`] for a buffer of another device (which must be of the same wgpu instance: wgpu
    /// itself gives buffers of other instances no meaning); [`Error::DeviceLost`]. Nothing has been recorded then.
    pub fn append<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        step: &Step,
        layer: u32,
        k: impl Into<BufferRef<'a>>,
        v: impl Into<BufferRef<'a>>,
        rope: Option<&Rope>,
    ) -> Result<()> {
        if self.config.latent {
            return Err(Error::argument("v", "rows of values", "append_latent, as values are keys in this cache"));
        }
        let rows = NewRows { k: k.into(), v: Some(v.into()) };
        self.append_any(recorder.into(), step, layer, rows, self.append_kernel(rope)?)
    }

    /// [`KvCache::append`] to a [latent](KvCacheConfig::latent) cache: `rows`, f32 `[num_tokens, num_kv_heads, head_dim]`, are keys and values.
    ///
    /// `rope` rotates what it says of a row, which is what a model with latents keeps outside of the values:
    /// [`RopeConfig::with_start`](crate::RopeConfig::with_start).
    ///
    /// # Errors
    /// Those of [`KvCache::append`], and [`Error::Argument`] for a cache that is not latent.
    pub fn append_latent<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        step: &Step,
        layer: u32,
        rows: impl Into<BufferRef<'a>>,
        rope: Option<&Rope>,
    ) -> Result<()> {
        if !self.config.latent {
            return Err(Error::argument("rows", "rows of latents", "append, as this cache has values of its own"));
        }
        let rows = NewRows { k: rows.into(), v: None };
        self.append_any(recorder.into(), step, layer, rows, self.append_kernel(rope)?)
    }

    fn append_kernel<'a>(&'a self, rope: Option<&'a Rope>) -> Result<AppendKernel<'a>> {
        match rope {
            Some(rope) => rope.append_kernel(&self.gpu, &self.config),
            None => Ok(AppendKernel { program: &self.kernels.append, tables: Vec::new() }),
        }
    }

    pub(super) fn append_any(
        &self,
        recorder: Recorder<'_>,
        step: &Step,
        layer: u32,
        NewRows { k, v }: NewRows<'_>,
        AppendKernel { program, tables }: AppendKernel<'_>,
    ) -> Result<()> {
        step.check_usable(&self.state)?;
        let storage = self.layer(layer)?;
        self.check_calibrated(layer)?;
        let gpu = &self.gpu;
        let num_tokens = step.num_tokens();
        let Variant { k_rows, v_rows, .. } = &program.variant;
        let k = k.check_rows(gpu, "k", k_rows, num_tokens)?;
        self.layers.check_foreign("k", &k)?;
        let v = v.map(|v| v.check_rows(gpu, "v", v_rows, num_tokens)).transpose()?;
        v.iter().try_for_each(|v| self.layers.check_foreign("v", v))?;
        let work = step.of_layer(layer);
        let (upload, lease) = work.upload.buffer()?;
        let mut dispatches = Vec::with_capacity(2);
        if work.num_copies > 0 {
            dispatches.push(self.copy_dispatch(storage, &upload, work.num_copies)?);
        }
        let (x, y) = program.variant.append_grid("k", num_tokens)?;
        let mut resources = program.resources();
        resources.push(k.binding());
        resources.extend(v.as_ref().map(BufferRef::binding));
        resources.extend(storage.written());
        resources.extend([upload.as_entire_binding(), params_binding::<CacheParams>(&upload, 0)]);
        resources.extend(tables.into_iter().map(wgpu::Buffer::as_entire_binding));
        dispatches.push(program.dispatch(resources, [x, y, 1]));
        recorder.record(gpu, "folio append", &dispatches, &[lease])
    }

    /// Copies of whole blocks of a layer, as an upload of [`append_words`] lists them.
    pub(super) fn copy_dispatch<'a>(
        &'a self,
        storage: &'a LayerStorage,
        upload: &'a wgpu::Buffer,
        count: u32,
    ) -> Result<Dispatch<'a>> {
        let (x, y) = self.kernels.copy_blocks.variant.copy_grid("batch", count)?;
        let mut resources: Vec<_> = storage.written().collect();
        resources.extend([upload.as_entire_binding(), params_binding::<CacheParams>(upload, COPY_PARAMS_OFFSET)]);
        Ok(self.kernels.copy_blocks.dispatch(resources, [x, y, 1]))
    }

    /// Records the copy of a sequence's committed rows of one layer into contiguous f32 buffers of the host's, `[seq_len, num_kv_heads, head_dim]` and
    /// `[seq_len, num_kv_heads, value_dim]`. Returns the number of tokens. An empty sequence records nothing.
    ///
    /// The ranges need usage `STORAGE` and an aligned offset, may be larger than the rows, and may be of one buffer if they don't overlap.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Argument`] for a layer that isn't there, a range that doesn't fit or a sequence some of whose tokens
    /// have left the [window](crate::KvCacheConfig::groups); [`Error::Wgpu`].
    pub fn record_gather<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        sequence: SequenceId,
        layer: u32,
        k_out: impl Into<BufferRef<'a>>,
        v_out: impl Into<BufferRef<'a>>,
    ) -> Result<u32> {
        let storage = self.layer(layer)?;
        let (gpu, config) = (&self.gpu, &self.config);
        let (num_tokens, table) = {
            let state = self.state();
            let table = &state.tables(sequence)?[config.group_of(layer) as usize];
            if table.blocks().len() > table.num_held() as usize {
                let lost = (table.blocks().len() - table.num_held() as usize) * config.block_size as usize;
                let got = format!("{sequence}, of which {lost} tokens have left the window");
                return Err(Error::argument("sequence", got, "one whose tokens are all in the cache"));
            }
            (table.len(), table.blocks().iter().map(|b| b.index()).collect::<Vec<_>>())
        };
        let elements = row_elements(config, num_tokens);
        let k_out = k_out.into().check(gpu, "k_out", elements[0], false)?;
        let v_out = v_out.into().check(gpu, "v_out", elements[1], false)?;
        self.layers.check_foreign("k_out", &k_out)?;
        self.layers.check_foreign("v_out", &v_out)?;
        if k_out.overlaps(&v_out) {
            return Err(Error::argument("v_out", "a range that overlaps k_out", "ranges that don't overlap"));
        }
        if num_tokens == 0 {
            return Ok(0);
        }
        // An invocation reads 8 elements of K and the same of V.
        let (x, y) = self.kernels.gather.grid("sequence", elements[0].max(elements[1]) / 8)?;
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
        let (lists, lease) = Upload::new(gpu, "sequence", words)?.buffer()?;
        let mut resources: Vec<_> = storage.read().collect();
        resources.extend([lists.as_entire_binding(), k_out.binding(), v_out.binding()]);
        resources.push(params_binding::<CacheParams>(&lists, 0));
        let dispatch = self.kernels.gather.dispatch(resources, [x, y, 1]);
        recorder.into().record(gpu, "folio gather", &[dispatch], &[lease])?;
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
        let [k_bytes, v_bytes] = row_elements(&self.config, num_tokens).map(|elements| elements * 4);
        let bytes = k_bytes.max(v_bytes);
        if bytes > gpu.max_storage_bytes() {
            let need = format!("{bytes} bytes for {num_tokens} tokens");
            let have = format!("{} bytes in a storage binding", gpu.max_storage_bytes());
            return Err(Error::unsupported("sequence", need, have));
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let buffer = |bytes| gpu.create_buffer("creating gather buffers", "folio gather", bytes, usage);
        let (k_out, v_out) = (buffer(k_bytes)?, buffer(v_bytes)?);
        let mut encoder = gpu.encoder()?;
        self.record_gather(&mut encoder, sequence, layer, &k_out, &v_out)?;
        let k = Readback::record(gpu, &mut encoder, &BufferRef::from(&k_out))?;
        let v = Readback::record(gpu, &mut encoder, &BufferRef::from(&v_out))?;
        gpu.submit("reading rows back", encoder).await?;
        Ok(KvRows { k: k.read(gpu).await?, v: v.read(gpu).await? })
    }

    /// [`KvCache::gather`], waiting for the GPU: submits, and polls the device until the rows are here.
    ///
    /// # Errors
    /// Those of [`KvCache::gather`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn gather_blocking(&self, sequence: SequenceId, layer: u32) -> Result<KvRows> {
        self.gpu.block_on(self.gather(sequence, layer))
    }

    /// Runs the append, copy, move, pack and gather kernels once on no tokens, so that drivers which compile at the first dispatch do it now (on
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
        let (lists, lease) = Upload::new(gpu, "warm_up", words)?.buffer()?;
        let (a, b) = (gpu.warm_up_buffer()?, gpu.warm_up_buffer()?);
        let params = params_binding::<CacheParams>(&lists, 0);
        let [written, read]: [Vec<_>; 2] = [storage.written().collect(), storage.read().collect()];
        let (a, b) = (a.as_entire_binding(), b.as_entire_binding());
        let list = lists.as_entire_binding();
        let new = if self.config.latent { vec![a.clone()] } else { vec![a.clone(), b.clone()] };
        let append = [&new, &written[..], &[list.clone(), params.clone()]].concat();
        let copy = [&written[..], &[list.clone(), params.clone()]].concat();
        let pack_params = params_binding::<PackParams>(&lists, COPY_PARAMS_OFFSET);
        let pack = vec![written[0].clone(), a.clone(), list.clone(), pack_params];
        let gather = [&read[..], &[list, a, b, params]].concat();
        let kernels = &self.kernels;
        let dispatches = [
            (&kernels.append, append),
            (&kernels.copy_blocks, copy.clone()),
            (&kernels.move_rows, copy),
            (&kernels.pack_blocks, pack),
            (&kernels.gather, gather),
        ]
        .map(|(kernel, resources)| kernel.dispatch(resources, [1, 1, 1]));
        gpu.warm_up(dispatches, lease)
    }
}

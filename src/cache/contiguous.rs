//! [`ContiguousCache`]: a row of fixed length per sequence, allocated beforehand.

use std::sync::Arc;

use super::{Cache, Committed, KvCache, KvCacheConfig, KvFormat, KvRows, MemoryReport, SequenceId, Step, sealed};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::record::{BufferRef, Recorder};
use crate::rope::Rope;

/// Shape of a [`ContiguousCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContiguousConfig {
    /// Transformer layers, each with its own K and V.
    pub num_layers: u32,
    /// Rows: sequences that the cache has room for.
    pub batch: u32,
    /// Heads of K and V.
    pub num_kv_heads: u32,
    /// Elements of a head: a multiple of 8 from 8 to 256.
    pub head_dim: u32,
    /// Tokens that a row has room for. The kernels are compiled for it.
    pub max_seq_len: u32,
    /// How K is stored.
    pub k_format: KvFormat,
    /// How V is stored.
    pub v_format: KvFormat,
}

impl ContiguousConfig {
    /// Checks what does not depend on a device.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self) -> Result<()> {
        if self.batch == 0 {
            return Err(Error::argument("batch", 0, "at least 1"));
        }
        // Positions are compared as i32 by the hosts' frameworks, as for a paged cache.
        if self.max_seq_len == 0 || self.max_seq_len > i32::MAX as u32 {
            return Err(Error::argument("max_seq_len", self.max_seq_len, "1 to 2^31 - 1 tokens"));
        }
        let slots = u64::from(self.batch) * u64::from(self.max_seq_len);
        if slots > u64::from(u32::MAX) {
            let got = format!("{} for {} rows", self.max_seq_len, self.batch);
            return Err(Error::argument("max_seq_len", got, "batch * max_seq_len below 2^32"));
        }
        self.paged().validate_for_any_block_size()
    }

    /// The paged cache of which this is a special case: one block per row.
    fn paged(&self) -> KvCacheConfig {
        let &Self { num_layers, batch, num_kv_heads, head_dim, max_seq_len, k_format, v_format } = self;
        KvCacheConfig {
            num_layers,
            num_kv_heads,
            head_dim,
            block_size: max_seq_len,
            num_blocks: batch,
            k_format,
            v_format,
        }
    }
}

/// A KV cache without paging: each layer's K and V are `[batch, num_kv_heads, max_seq_len, head_dim]`, allocated once, and a sequence is
/// a row of it. Nothing is shared, moved or copied, and every row takes its full length, used or not.
///
/// It is the baseline that a [`KvCache`] is compared with, and enough for an app with one or a few sequences of bounded length.
/// The calls are those of the paged cache with a row index in place of a sequence: [`begin_step`](Self::begin_step),
/// [`append`](Self::append), [`Attention::attend`](crate::Attention::attend), [`commit`](Self::commit). The kernels are the same,
/// too: a row is a block of `max_seq_len` tokens, so the results are those of the paged cache, bit for bit.
///
/// Submit recorded steps in the order in which they began.
#[derive(Debug)]
pub struct ContiguousCache {
    cache: KvCache,
    config: ContiguousConfig,
    /// Row `i` is sequence `i`, which has block `i` from beginning to end.
    rows: Vec<SequenceId>,
}

impl Cache for ContiguousCache {}

impl sealed::Paged for ContiguousCache {
    fn paged(&self) -> &KvCache {
        &self.cache
    }
}

impl ContiguousCache {
    /// Allocates all rows on the GPU and compiles the append and gather kernels.
    ///
    /// # Errors
    /// [`Error::Argument`] for a field that breaks its rule; [`Error::Unsupported`] if a side of a layer is larger than the device can
    /// bind or has memory for; [`Error::Wgpu`] if a kernel can't be built.
    pub async fn new(gpu: &Gpu, config: ContiguousConfig) -> Result<Self> {
        config.validate()?;
        let cache = KvCache::with_any_block_size(gpu, config.paged()).await.map_err(|error| match error {
            // The same limit in this cache's words.
            Error::Unsupported { what: "num_blocks" | "block_size", need, have, .. } => Error::Unsupported {
                what: "batch * max_seq_len",
                need,
                have,
                hint: "; use fewer or shorter rows, or a smaller format".to_owned(),
            },
            error => error,
        })?;
        let rows = cache.state().create_rows();
        Ok(Self { cache, config, rows })
    }

    /// [`ContiguousCache::new`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`ContiguousCache::new`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new_blocking(gpu: &Gpu, config: ContiguousConfig) -> Result<Self> {
        pollster::block_on(Self::new(gpu, config))
    }

    /// The device that the cache lives on.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.cache.gpu()
    }

    /// The shape of the cache.
    #[must_use]
    pub fn config(&self) -> &ContiguousConfig {
        &self.config
    }

    /// The K and V buffers of a layer, `[batch, num_kv_heads, max_seq_len, head_dim]` in their formats, for a host that wants to read
    /// them in a shader of its own. What is behind a row's length is undefined.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that isn't there.
    pub fn layer_buffers(&self, layer: u32) -> Result<(&[wgpu::Buffer], &[wgpu::Buffer])> {
        self.cache.layer_buffers(layer)
    }

    /// Where the bytes are. Rows count as used from the beginning, each with one block; what is behind its length is wasted. Row `i` is
    /// the `i`th sequence of the report.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        self.cache.memory()
    }

    fn row(&self, row: u32) -> Result<SequenceId> {
        let sequence = self.rows.get(row as usize).copied();
        sequence.ok_or_else(|| Error::argument("row", row, format!("below batch, {}", self.config.batch)))
    }

    /// Tokens of a row, open steps not counted.
    ///
    /// # Errors
    /// [`Error::Argument`] for a row that isn't there.
    pub fn len(&self, row: u32) -> Result<u32> {
        self.cache.seq_len(self.row(row)?)
    }

    /// Whether a row has no token.
    ///
    /// # Errors
    /// [`Error::Argument`] for a row that isn't there.
    pub fn is_empty(&self, row: u32) -> Result<bool> {
        Ok(self.len(row)? == 0)
    }

    /// Forgets the tokens of a row from `len` on. Nothing is freed.
    ///
    /// # Errors
    /// [`Error::Argument`] for a row that isn't there or is in an open step, or if `len` is more than the row has.
    pub fn truncate(&self, row: u32, len: u32) -> Result<()> {
        let sequence = self.row(row)?;
        self.cache.state().shorten(sequence, len).map_err(|error| self.in_rows(error))
    }

    /// Forgets all tokens of a row.
    ///
    /// # Errors
    /// [`Error::Argument`] for a row that isn't there or is in an open step.
    pub fn reset(&self, row: u32) -> Result<()> {
        self.truncate(row, 0)
    }

    /// Begins a step of `query_len` new tokens for each row of the batch, which need not be all rows nor in order, and uploads what the
    /// append kernel needs to know.
    ///
    /// The tokens of the batch stand one after another, in this order, in the k, v, q and out buffers of the step.
    ///
    /// # Errors
    /// [`Error::RowFull`] if a row would become longer than `max_seq_len`; [`Error::Argument`] for an empty batch, a row that isn't
    /// there, occurs twice or is in an open step, or a `query_len` of 0; [`Error::Unsupported`] if the lists don't fit into a binding;
    /// [`Error::Wgpu`].
    /// In every case nothing has changed.
    pub fn begin_step(&self, batch: &[(u32, u32)]) -> Result<Step> {
        let batch = self.sequences(batch)?;
        self.cache.begin_step(&batch).map_err(|error| self.in_rows(error))
    }

    /// [`ContiguousCache::begin_step`] with positions of the caller's own for rotary embeddings; see
    /// [`KvCache::begin_step_with_positions`].
    ///
    /// # Errors
    /// Those of [`ContiguousCache::begin_step`]; [`Error::Argument`] if there isn't exactly one position per new token.
    pub fn begin_step_with_positions(&self, batch: &[(u32, u32)], positions: &[u32]) -> Result<Step> {
        let batch = self.sequences(batch)?;
        self.cache.begin_step_with_positions(&batch, positions).map_err(|error| self.in_rows(error))
    }

    /// The batch in the words of the paged cache, with the checks that it can't make: its own would speak of sequences and blocks.
    fn sequences(&self, batch: &[(u32, u32)]) -> Result<Vec<(SequenceId, u32)>> {
        let max_seq_len = self.config.max_seq_len;
        let mut seen = vec![false; self.rows.len()];
        batch
            .iter()
            .map(|&(row, query_len)| {
                let sequence = self.row(row)?;
                if std::mem::replace(&mut seen[row as usize], true) {
                    return Err(Error::argument("batch", format!("row {row} twice"), "each row once"));
                }
                if query_len == 0 {
                    return Err(Error::argument("query_len", format!("0 for row {row}"), "at least 1"));
                }
                let need = u64::from(self.cache.seq_len(sequence)?) + u64::from(query_len);
                if need > u64::from(max_seq_len) {
                    return Err(Error::RowFull { row, need, max_seq_len });
                }
                Ok((sequence, query_len))
            })
            .collect()
    }

    /// An error of the paged cache that names a sequence, with the row in its place.
    fn in_rows(&self, error: Error) -> Error {
        match error {
            Error::SequenceInStep(sequence) => {
                let row = self.rows.iter().position(|&s| s == sequence).unwrap_or_default();
                Error::argument("row", format!("row {row}, in an open step"), "that step committed or dropped first")
            }
            error => error,
        }
    }

    /// Records one layer's new K and V rows into the cache: [`KvCache::append`].
    ///
    /// # Errors
    /// Those of [`KvCache::append`].
    pub fn append<'p, 'e: 'p, 'k, 'v>(
        &self,
        recorder: impl Into<Recorder<'p, 'e>>,
        step: &Step,
        layer: u32,
        k: impl Into<BufferRef<'k>>,
        v: impl Into<BufferRef<'v>>,
    ) -> Result<()> {
        self.cache.append(recorder, step, layer, k, v)
    }

    /// [`ContiguousCache::append`] with K turned by its tokens' positions on the way: [`KvCache::append_with_rope`].
    ///
    /// # Errors
    /// Those of [`KvCache::append_with_rope`].
    pub fn append_with_rope<'p, 'e: 'p, 'k, 'v>(
        &self,
        recorder: impl Into<Recorder<'p, 'e>>,
        step: &Step,
        layer: u32,
        k: impl Into<BufferRef<'k>>,
        v: impl Into<BufferRef<'v>>,
        rope: &Rope,
    ) -> Result<()> {
        self.cache.append_with_rope(recorder, step, layer, k, v, rope)
    }

    /// Makes the step's tokens part of their rows: [`KvCache::commit`]. Dropping the step instead leaves every row as it was.
    ///
    /// # Errors
    /// [`Error::StaleStep`] for a step of another cache. The step is dropped, which rolls it back.
    pub fn commit(&self, step: Step) -> Result<Committed> {
        self.cache.commit(step)
    }

    /// Reads the tokens of a row in one layer back: [`KvCache::gather`]. **Submits** a command buffer of its own.
    ///
    /// # Errors
    /// [`Error::Argument`] for a row or a layer that isn't there; those of [`KvCache::gather`].
    pub async fn gather(&self, row: u32, layer: u32) -> Result<KvRows> {
        self.cache.gather(self.row(row)?, layer).await
    }

    /// [`ContiguousCache::gather`], waiting for the GPU.
    ///
    /// # Errors
    /// Those of [`ContiguousCache::gather`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn gather_blocking(&self, row: u32, layer: u32) -> Result<KvRows> {
        self.cache.gather_blocking(self.row(row)?, layer)
    }

    /// [`KvCache::key_scales`].
    #[must_use]
    pub fn key_scales(&self, layer: u32) -> Option<Arc<[f32]>> {
        self.cache.key_scales(layer)
    }

    /// [`KvCache::set_key_scales`]: all rows must be empty.
    ///
    /// # Errors
    /// Those of [`KvCache::set_key_scales`].
    pub fn set_key_scales(&self, layer: u32, table: &[f32]) -> Result<()> {
        self.cache.set_key_scales(layer, table)
    }

    /// [`KvCache::calibrate_keys`]: all rows must be empty.
    ///
    /// # Errors
    /// Those of [`KvCache::calibrate_keys`].
    pub fn calibrate_keys(&self, layer: u32, keys: &[f32]) -> Result<()> {
        self.cache.calibrate_keys(layer, keys)
    }

    /// Runs the kernels once on no tokens: [`KvCache::warm_up`]. **Submits** a command buffer; doesn't wait for it.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub fn warm_up(&self) -> Result<()> {
        self.cache.warm_up()
    }
}

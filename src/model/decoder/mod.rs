//! [`Decoder`]: sequences of tokens that a [`Model`] continues.

mod calibrate;
mod feed;
mod groups;
mod input;
mod kernels;
mod life_cycle;
mod rollback;
mod step;

use groups::CacheLayers;
pub use input::{Drawn, Input, LogitRows, TokenLogprob};
use kernels::LayerKernels;

use std::collections::HashMap;
use std::sync::Arc;

use super::config::ModelConfig;
use super::error::{ModelError, ModelResult};
use super::sampler::Sampler;
use super::transformer::{Model, Scratch};
use crate::gpu::Readback;
use crate::{
    Gpu, KvCache, KvCacheConfig, KvFormat, MemoryReport, PoolUsage, PrefixStats, Result, SequenceId, SequenceSnapshot,
};

/// The cache and the step size of a [`Decoder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DecoderOptions {
    /// Tokens per block of the cache.
    pub block_size: u32,
    /// Blocks of the cache, shared by all sequences: their memory, as blocks of all layers. If layers keep different tokens, each block is one for
    /// each group of layers instead, so that the cache has several times as many ([`KvCacheConfig::groups`]); the groups' padding comes on top.
    pub num_blocks: u32,
    /// How keys are stored. With scales per channel they must be calibrated before anything else: [`Decoder::calibrate_keys`].
    pub k_format: KvFormat,
    /// How values are stored.
    pub v_format: KvFormat,
    /// Tokens that go through the layers at once. Longer batches are cut into several steps (chunked prefill). The activations take some
    /// `max_step_tokens * (6 * hidden_size + intermediate_size) * 4` bytes; with experts as much again for each that a token goes to, of their own size.
    pub max_step_tokens: u32,
    /// Whether the decoder looks for the beginning of every new sequence among what it has computed before, and keeps full blocks of ended
    /// sequences for that until their room is needed. A prompt then costs only what follows the longest known beginning, in whole blocks.
    pub prefix_cache: bool,
    /// Keeps every token's keys and values, also in layers with a window, where no later token can see them. [`Decoder::truncate`] and
    /// [`Decoder::fork_at`] then reach back to any length, and the memory of all layers grows with the text. Otherwise blocks that have left the window
    /// of their layers return to the pool, so that these take about a window for a text of any length. (With a key format with scales per channel
    /// layers keep what the one with the widest window does, or all if there is one without.)
    pub keep_all_blocks: bool,
    /// Text of any length in the memory of a window, by attention sinks; see [`Streaming`]. `None`: attention is what the model was trained with.
    pub streaming: Option<Streaming>,
}

/// Attention to the newest tokens and the very first ones, with positions that are counted within these (StreamingLLM, Xiao et al. 2023, arXiv
/// 2309.17453).
/// A model trained on full attention stays fluent that way far beyond its positions, though it knows nothing of what lies between; with the newest
/// tokens alone it doesn't. For models with rotary embeddings.
///
/// Layers whose own window is no wider keep it, and see no sink tokens, as they were trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Streaming {
    /// Newest tokens that each token sees, itself included; at least 1.
    pub window: u32,
    /// First tokens that it sees besides. Four are enough for most models, as the paper finds; at least 1.
    pub sink_tokens: u32,
}

impl Streaming {
    /// Fails unless a model can read so.
    fn check(&self, model: &ModelConfig) -> ModelResult<()> {
        if self.window == 0 || self.sink_tokens == 0 {
            let got = format!("a window of {} and {} sink tokens", self.window, self.sink_tokens);
            return Err(ModelError::argument("streaming", got, "at least 1 of each"));
        }
        let positions = u64::from(self.window) + u64::from(self.sink_tokens);
        if positions > u64::from(model.max_positions) {
            let need = format!("at most the model's {} positions", model.max_positions);
            return Err(ModelError::argument("streaming", format!("{positions} tokens in all"), need));
        }
        if model.learned_positions {
            return Err(ModelError::argument("streaming", "learned positions", "a model with rotary embeddings"));
        }
        Ok(())
    }
}

impl Default for DecoderOptions {
    fn default() -> Self {
        Self {
            block_size: 16,
            num_blocks: 256,
            k_format: KvFormat::F16,
            v_format: KvFormat::F16,
            max_step_tokens: 512,
            prefix_cache: false,
            keep_all_blocks: false,
            streaming: None,
        }
    }
}

impl DecoderOptions {
    /// The cache that a decoder with these options makes for a model, unless the device can't bind it so: then all layers keep the same. One of latents
    /// has one format: both must be the same.
    ///
    /// Layers that keep the same tokens form groups of equal size, the last of which may have layers that are not the model's. The size is such that
    /// there are few groups, and that this padding takes little of a text's memory: a seventh at most, and next to nothing if the text is long.
    #[must_use]
    pub fn cache_config(&self, model: &ModelConfig) -> KvCacheConfig {
        CacheLayers::new(self, model).cache_config(self, model)
    }
}

/// A model, a paged cache, and the sequences in it.
///
/// A sequence grows by [`step`](Self::step): its new tokens go through the layers once, their keys and values stay in the cache, and the
/// token that follows is sampled on the GPU; what comes back is that token alone. A batch may mix prompts of any length with single tokens.
///
/// **The pending token.** The token that was sampled last belongs to the text, but its keys and values are computed only by the call that goes
/// on from it. Until then the decoder keeps it as the sequence's [`pending`](Self::pending) token, and feeds it before the tokens of the next
/// call. So a program feeds only what is its own: a prompt, then the next prompt, or nothing for more of the same text.
/// [`discard_pending`](Self::discard_pending) drops it, for example a stop token that the conversation shall not contain.
///
/// A call that fails has changed nothing, whatever it had already computed; so has one whose future is dropped. ([`generate`](Self::generate)
/// is many steps: those that have succeeded stay.)
///
/// Futures complete natively only while somebody polls the device: a program without an async runtime runs them by [`Gpu::block_on`].
#[derive(Debug)]
pub struct Decoder {
    model: Arc<Model>,
    options: DecoderOptions,
    cache: Arc<KvCache>,
    /// Where the model's layers are in it.
    layers: CacheLayers,
    kernels: LayerKernels,
    /// Made with the first step that has a tree.
    tree_kernels: Option<LayerKernels>,
    sampler: Sampler,
    scratch: Scratch,
    logits: wgpu::Buffer,
    output: wgpu::Buffer,
    /// Away while it is mapped; a dropped future takes it along.
    staging: Option<Readback>,
    texts: HashMap<SequenceId, Text>,
    /// Sequences that are on the host. Their texts stay where all are.
    swapped: HashMap<SequenceId, SequenceSnapshot>,
}

/// What the decoder knows of a sequence.
#[derive(Clone, Debug, Default)]
struct Text {
    /// The tokens in the cache.
    cached: Vec<u32>,
    /// The token after them, if it was sampled.
    pending: Option<u32>,
    /// Tokens at the front that were found in the prefix index.
    prefix_len: u32,
    /// Full blocks that are in the prefix index, as far as is known.
    published: u32,
    /// Tokens at the front that were given, and not sampled, before the first that was.
    given: u32,
}

impl Text {
    /// Tokens of the text, the pending one included.
    fn len(&self) -> usize {
        self.cached.len() + usize::from(self.pending.is_some())
    }

    /// Forgets what comes after its first `len` tokens. The pending one is the last.
    fn truncate(&mut self, len: u32, block_size: u32) {
        if len as usize <= self.cached.len() {
            self.cached.truncate(len as usize);
            self.pending = None;
            self.prefix_len = self.prefix_len.min(len);
            self.published = self.published.min(len / block_size);
            self.given = self.given.min(len);
        }
    }
}

fn storage(gpu: &Gpu, label: &'static str, bytes: u64) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
    gpu.create_buffer("creating the decoder's buffers", label, bytes.max(16), usage)
}

/// Fails unless the activations of as many tokens fit into buffers.
fn check_step_tokens(gpu: &Gpu, config: &ModelConfig, max_step_tokens: u32) -> ModelResult<()> {
    if max_step_tokens == 0 {
        return Err(ModelError::argument("max_step_tokens", 0, "at least 1"));
    }
    let width = Scratch::widest_row(config);
    let fits = gpu.max_storage_bytes() / (width * 4);
    if u64::from(max_step_tokens) > fits {
        let need = format!("at most {fits} on this device, for {width} activations per token in a buffer");
        return Err(ModelError::argument("max_step_tokens", max_step_tokens, need));
    }
    Ok(())
}

impl Decoder {
    /// Allocates the cache and the activations, and compiles what depends on them.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if `max_step_tokens` is 0, or more than the device's buffers have room for, or `streaming` asks
    /// for nothing, or for more positions than the model has, or the model has no rotary embeddings; those of
    /// [`KvCache::new`] and [`Attention::new`](crate::Attention::new).
    pub async fn new(model: Arc<Model>, options: DecoderOptions) -> ModelResult<Self> {
        let (gpu, config) = (model.gpu().clone(), model.config().clone());
        check_step_tokens(&gpu, &config, options.max_step_tokens)?;
        if let Some(streaming) = &options.streaming {
            streaming.check(&config)?;
        }
        let mut layers = CacheLayers::new(&options, &config);
        let mut cache_config = layers.cache_config(&options, &config);
        // Groups share buffers, which are larger by as much.
        let is_bindable =
            |cache: &KvCacheConfig| cache.validate().is_ok() && KvCache::largest_pool(&gpu, cache) >= cache.num_blocks;
        if layers.num_groups() > 1 && !is_bindable(&cache_config) {
            layers = CacheLayers::whole(&options, &config);
            cache_config = layers.cache_config(&options, &config);
        }
        let cache = KvCache::new(&gpu, cache_config).await?;
        let kernels = LayerKernels::new(&model, &cache, &layers, &options, false).await?;
        let sampler = Sampler::new(&gpu, config.vocab_size).await?;
        let scratch = Scratch::new(&gpu, &config, options.max_step_tokens)?;
        Ok(Self {
            logits: storage(&gpu, "folio logits", u64::from(config.vocab_size) * 4)?,
            output: storage(&gpu, "folio sampled tokens", 256)?,
            staging: None,
            texts: HashMap::new(),
            swapped: HashMap::new(),
            cache: Arc::new(cache),
            layers,
            model,
            options,
            kernels,
            tree_kernels: None,
            sampler,
            scratch,
        })
    }

    /// [`Decoder::new`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Decoder::new`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new_blocking(model: Arc<Model>, options: DecoderOptions) -> ModelResult<Self> {
        pollster::block_on(Self::new(model, options))
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.model.gpu()
    }

    /// The options it was made with.
    #[must_use]
    pub fn options(&self) -> &DecoderOptions {
        &self.options
    }

    /// Tokens that a sequence may have: the model's positions, or as many as there are numbers for with [`DecoderOptions::streaming`].
    #[must_use]
    pub fn max_len(&self) -> u32 {
        if self.options.streaming.is_some() { i32::MAX as u32 } else { self.model.config().max_positions }
    }

    /// The cache, to look into: block tables, shapes, rows. Sequences grow, shrink and end by the decoder's own methods; it refuses to go on
    /// with one that was changed here.
    #[must_use]
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// How full the cache is.
    #[must_use]
    pub fn usage(&self) -> PoolUsage {
        self.cache.usage()
    }

    /// Where the cache's bytes are, in all and for each sequence.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        self.cache.memory()
    }

    /// What the prefix index holds, and how many tokens it has saved.
    #[must_use]
    pub fn prefix_stats(&self) -> PrefixStats {
        self.cache.prefix_stats()
    }

    /// Bytes of the host's memory that swapped-out sequences take.
    #[must_use]
    pub fn swapped_bytes(&self) -> u64 {
        self.swapped.values().map(SequenceSnapshot::num_bytes).sum()
    }

    /// The layer of the [cache](Self::cache) that has the keys and values of a layer of the model. They are the same, unless layers keep different
    /// tokens: then the cache has those that keep the same side by side.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a layer that isn't there.
    pub fn cache_layer(&self, layer: u32) -> ModelResult<u32> {
        let num_layers = self.model.config().num_layers;
        if layer >= num_layers {
            return Err(ModelError::argument("layer", layer, format!("below the model's number, {num_layers}")));
        }
        Ok(self.layers.place(layer))
    }

    /// Bytes of the keys and values of one token, all layers.
    #[must_use]
    pub fn bytes_per_token(&self) -> u64 {
        self.cache.config().token_bytes()
    }

    /// Bytes of a block of the cache, in all layers of a group: of what [`usage`](Self::usage) counts.
    #[must_use]
    pub fn bytes_per_block(&self) -> u64 {
        self.cache.config().block_bytes()
    }
}

//! [`Decoder`]: sequences of tokens that a [`Model`] continues.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::config::{ModelConfig, Position};
use super::error::{ModelError, ModelResult};
use super::generate::Prompt;
use super::rows::Rows;
use super::sampler::{Sampler, Sampling, SamplingRequest};
use super::transformer::{Model, Scratch};
use crate::gpu::{Readback, Upload};
use crate::{
    Attention, AttentionConfig, BufferRef, Gpu, KvCache, KvCacheConfig, KvFormat, MemoryReport, PoolUsage, Rope,
    SequenceId,
};
use crate::{Error, Result};

/// The cache and the step size of a [`Decoder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DecoderOptions {
    /// Tokens per block of the cache.
    pub block_size: u32,
    /// Blocks of the cache, shared by all sequences.
    pub num_blocks: u32,
    /// How keys are stored. With scales per channel they must be calibrated before anything else: [`Decoder::calibrate_keys`].
    pub k_format: KvFormat,
    /// How values are stored.
    pub v_format: KvFormat,
    /// Tokens that go through the layers at once. Longer batches are cut into several steps (chunked prefill). The activations take some
    /// `max_step_tokens * (5 * hidden_size + 3 * intermediate_size) * 4` bytes.
    pub max_step_tokens: u32,
}

impl Default for DecoderOptions {
    fn default() -> Self {
        Self { block_size: 16, num_blocks: 256, k_format: KvFormat::F16, v_format: KvFormat::F16, max_step_tokens: 512 }
    }
}

impl DecoderOptions {
    /// The cache that a decoder with these options makes for a model.
    #[must_use]
    pub fn cache_config(&self, model: &ModelConfig) -> KvCacheConfig {
        KvCacheConfig::new(model.num_layers, model.num_kv_heads, model.head_dim)
            .with_blocks(self.num_blocks, self.block_size)
            .with_formats(self.k_format, self.v_format)
    }
}

/// New tokens of one sequence, and whether the next one is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The sequence that grows.
    pub sequence: SequenceId,
    /// What it grows by: a prompt, or the token that was sampled last. At least one.
    pub tokens: &'a [u32],
    /// How the token after these is chosen. `None`: it is not wanted, and the head is not computed.
    pub sampling: Option<&'a Sampling>,
}

/// Which rows of logits [`Decoder::logits`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// Those after each sequence's last token: `[vocab_size]`.
    Last,
    /// Those after every token: `[tokens.len(), vocab_size]`.
    All,
}

/// A model, a paged cache, and the sequences in it.
///
/// A sequence grows by [`step`](Self::step): its new tokens go through the layers once, their keys and values stay in the cache, and the
/// token that follows is sampled on the GPU; what comes back is that token alone. A batch may mix prompts of any length with single tokens.
///
/// A call that fails has changed nothing, whatever it had already computed.
#[derive(Debug)]
pub struct Decoder {
    model: Arc<Model>,
    options: DecoderOptions,
    cache: Arc<KvCache>,
    attention: Attention,
    rope: Option<Rope>,
    sampler: Sampler,
    scratch: Scratch,
    logits: wgpu::Buffer,
    output: wgpu::Buffer,
    /// Away while it is mapped; a dropped future takes it along.
    staging: Option<Readback>,
    histories: HashMap<SequenceId, Vec<u32>>,
}

/// Part of an input that goes through the layers in one step.
struct Chunk<'a> {
    input: usize,
    sequence: SequenceId,
    tokens: &'a [u32],
    /// The position of the first token.
    position: u32,
    head: Head<'a>,
    /// All tokens of the input.
    input_tokens: &'a [u32],
}

/// What a chunk wants of the head.
#[derive(Clone, Copy)]
enum Head<'a> {
    Nothing,
    Sample(&'a Sampling),
    LastRow,
    AllRows,
}

impl Head<'_> {
    fn rows(self, tokens: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Sample(_) | Self::LastRow => 1,
            Self::AllRows => tokens,
        }
    }
}

/// Bytes of a sampled token.
const OUTPUT_BYTES: u64 = Sampler::OUTPUT_WORDS as u64 * 4;

/// Cuts sequences back to where a call began, unless it succeeds: also if its future is dropped half-way.
struct Rollback {
    cache: Arc<KvCache>,
    lengths: Vec<(SequenceId, u32)>,
}

impl Rollback {
    fn disarm(mut self) {
        self.lengths.clear();
    }
}

impl Drop for Rollback {
    fn drop(&mut self) {
        for &(sequence, len) in &self.lengths {
            // It can only fail for a sequence that is gone, and then there is nothing to cut.
            let _ = self.cache.truncate(sequence, len);
        }
    }
}

fn storage(gpu: &Gpu, label: &'static str, bytes: u64) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
    gpu.create_buffer("creating the decoder's buffers", label, bytes.max(16), usage)
}

impl Decoder {
    /// Allocates the cache and the activations, and compiles what depends on them.
    ///
    /// # Errors
    /// [`Error::Argument`] if `max_step_tokens` is 0; those of [`KvCache::new`] and [`Attention::new`].
    pub async fn new(model: Arc<Model>, options: DecoderOptions) -> ModelResult<Self> {
        let (gpu, config) = (model.gpu().clone(), model.config().clone());
        if options.max_step_tokens == 0 {
            return Err(ModelError::argument("max_step_tokens", 0, "at least 1"));
        }
        let cache = KvCache::new(&gpu, options.cache_config(&config)).await?;
        let attention_config =
            AttentionConfig { window: config.sliding_window, ..AttentionConfig::new(config.num_q_heads) };
        let attention = Attention::new(&cache, attention_config).await?;
        let rope = match &config.position {
            Position::Rope(rope) => Some(Rope::new(&cache, rope.clone()).await?),
            Position::Learned => None,
        };
        let sampler = Sampler::new(&gpu, config.vocab_size).await?;
        let rows = options.max_step_tokens;
        let scratch = Scratch::new(&gpu, &config, rows)?;
        Ok(Self {
            logits: storage(&gpu, "folio logits", u64::from(config.vocab_size) * 4)?,
            output: storage(&gpu, "folio sampled tokens", 256)?,
            staging: None,
            histories: HashMap::new(),
            cache: Arc::new(cache),
            model,
            options,
            attention,
            rope,
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

    /// The options it was made with.
    #[must_use]
    pub fn options(&self) -> &DecoderOptions {
        &self.options
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

    /// Bytes of the keys and values of one token, all layers.
    #[must_use]
    pub fn bytes_per_token(&self) -> u64 {
        self.cache.config().token_bytes()
    }

    /// Bytes of a block of the cache, all layers.
    #[must_use]
    pub fn bytes_per_block(&self) -> u64 {
        self.cache.config().block_bytes()
    }

    /// A new, empty sequence.
    pub fn create_sequence(&mut self) -> SequenceId {
        let id = self.cache.create_sequence();
        self.histories.insert(id, Vec::new());
        id
    }

    /// A new sequence with the same tokens, sharing their blocks; see [`KvCache::fork`].
    ///
    /// # Errors
    /// [`Error::UnknownSequence`](crate::Error::UnknownSequence).
    pub fn fork(&mut self, sequence: SequenceId) -> ModelResult<SequenceId> {
        let history = self.tokens(sequence)?.to_vec();
        let id = self.cache.fork(sequence)?;
        self.histories.insert(id, history);
        Ok(id)
    }

    /// Forgets the tokens from `len` on.
    ///
    /// # Errors
    /// Those of [`KvCache::truncate`].
    pub fn truncate(&mut self, sequence: SequenceId, len: u32) -> ModelResult<()> {
        self.cache.truncate(sequence, len)?;
        if let Some(history) = self.histories.get_mut(&sequence) {
            history.truncate(len as usize);
        }
        Ok(())
    }

    /// Ends a sequence.
    ///
    /// # Errors
    /// Those of [`KvCache::free`].
    pub fn free(&mut self, sequence: SequenceId) -> ModelResult<()> {
        self.cache.free(sequence)?;
        self.histories.remove(&sequence);
        Ok(())
    }

    /// The tokens of a sequence whose keys and values are in the cache.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`](crate::Error::UnknownSequence).
    pub fn tokens(&self, sequence: SequenceId) -> ModelResult<&[u32]> {
        self.histories.get(&sequence).map(Vec::as_slice).ok_or(ModelError::Folio(Error::UnknownSequence(sequence)))
    }

    /// Fixes the scales of a key format with scales per channel from the keys that the model computes for some texts. To be called once, with an
    /// empty cache; a few hundred tokens of what the model will see are enough. The texts go through a decoder of their own, with keys in f32.
    ///
    /// # Errors
    /// Those of [`step`](Self::step) for a text, and of [`KvCache::calibrate_keys`]: for other formats, for no texts, or if there are sequences.
    pub async fn calibrate_keys(&mut self, texts: &[&[u32]]) -> ModelResult<()> {
        let block_size = self.options.block_size;
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0) as u32;
        let options = DecoderOptions {
            num_blocks: longest.div_ceil(block_size).max(1),
            k_format: KvFormat::F32,
            v_format: KvFormat::F16,
            ..self.options
        };
        let mut decoder = Self::new(Arc::clone(&self.model), options).await?;
        let mut keys = vec![Vec::new(); self.model.config().num_layers as usize];
        for tokens in texts {
            let sequence = decoder.create_sequence();
            decoder.step(&[Input { sequence, tokens, sampling: None }]).await?;
            for (layer, keys) in (0..).zip(&mut keys) {
                keys.extend(decoder.cache.gather(sequence, layer).await?.k);
            }
            decoder.free(sequence)?;
        }
        for (layer, keys) in (0..).zip(&keys) {
            self.cache.calibrate_keys(layer, keys)?;
        }
        Ok(())
    }

    /// [`Decoder::calibrate_keys`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Decoder::calibrate_keys`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn calibrate_keys_blocking(&mut self, texts: &[&[u32]]) -> ModelResult<()> {
        self.gpu().clone().block_on(self.calibrate_keys(texts))
    }

    /// [`calibrate_keys`](Self::calibrate_keys) with what the model itself writes after some openings, up to `max_new_tokens` each: for programs
    /// that have no texts at hand. Sampled with temperature 0.7, each opening with a seed of its own.
    ///
    /// # Errors
    /// Those of [`generate`](Self::generate) for an opening, and of [`calibrate_keys`](Self::calibrate_keys).
    pub async fn calibrate_keys_on_own_text(&mut self, openings: &[&[u32]], max_new_tokens: usize) -> ModelResult<()> {
        let block_size = self.options.block_size;
        let tokens: usize = openings.iter().map(|opening| opening.len() + max_new_tokens + block_size as usize).sum();
        let num_blocks = u32::try_from(tokens).unwrap_or(u32::MAX).div_ceil(block_size).max(1);
        let options = DecoderOptions { num_blocks, k_format: KvFormat::F16, v_format: KvFormat::F16, ..self.options };
        let mut writer = Self::new(Arc::clone(&self.model), options).await?;
        let prompts: Vec<_> = (0..)
            .zip(openings)
            .map(|(seed, &tokens)| Prompt {
                sequence: writer.create_sequence(),
                tokens,
                sampling: Sampling { temperature: 0.7, seed, ..Sampling::default() },
            })
            .collect();
        let stop = &self.model.config().eos_token_ids;
        let texts = writer.generate(&prompts, max_new_tokens, stop, |_, _| ControlFlow::Continue(())).await?;
        let texts: Vec<_> =
            openings.iter().zip(&texts).map(|(opening, text)| [opening, &text.tokens[..]].concat()).collect();
        self.calibrate_keys(&texts.iter().map(Vec::as_slice).collect::<Vec<_>>()).await
    }

    /// [`Decoder::calibrate_keys_on_own_text`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Decoder::calibrate_keys_on_own_text`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn calibrate_keys_on_own_text_blocking(
        &mut self,
        openings: &[&[u32]],
        max_new_tokens: usize,
    ) -> ModelResult<()> {
        self.gpu().clone().block_on(self.calibrate_keys_on_own_text(openings, max_new_tokens))
    }

    /// Runs every kernel once, so that the first real step doesn't wait for the driver's compiler. Takes free blocks meanwhile, for
    /// a sequence of `max_step_tokens` if there are as many; with none it does nothing for the linear layers.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub async fn warm_up(&mut self) -> ModelResult<()> {
        self.attention.warm_up()?;
        let room = self.usage().free.saturating_mul(self.options.block_size).min(self.model.config().max_positions);
        let most = self.options.max_step_tokens.min(room);
        let (greedy, draw) = (Sampling::greedy(), Sampling::default());
        let penalty = |sampling| Sampling { repetition_penalty: 1.5, ..sampling };
        let samplings = [greedy, draw, penalty(greedy), penalty(draw)];
        // Linear layers have kernels for 1, 2, 4, 8, 16 and many rows; the sampler has one for each of these settings.
        for (i, len) in [1, 2, 4, 8, 16, most].into_iter().filter(|len| (1..=most).contains(len)).enumerate() {
            let sequence = self.create_sequence();
            let tokens = vec![0; len as usize];
            let sampling = samplings[i % samplings.len()];
            let result = self.step(&[Input { sequence, tokens: &tokens, sampling: Some(&sampling) }]).await;
            self.free(sequence)?;
            // A model may well compute nonsense for a row of equal tokens; the kernels have run.
            if let Err(error) = result
                && !matches!(error, ModelError::BadLogits { .. })
            {
                return Err(error);
            }
        }
        Ok(())
    }

    /// [`Decoder::warm_up`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Decoder::warm_up`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn warm_up_blocking(&mut self) -> ModelResult<()> {
        self.gpu().clone().block_on(self.warm_up())
    }

    fn gpu(&self) -> &Gpu {
        self.model.gpu()
    }

    /// Feeds new tokens to each sequence and samples the ones that follow, for those inputs that ask for it.
    ///
    /// Submits and reads back; natively the future completes only while somebody polls the device.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty batch or input, a sequence twice, a token id outside the vocabulary, more tokens than the
    /// model has positions, or sampling settings outside their ranges; [`ModelError::BadLogits`]; [`ModelError::Folio`] with
    /// [`OutOfBlocks`](crate::Error::OutOfBlocks) if the cache is full. No sequence has changed then.
    pub async fn step(&mut self, batch: &[Input<'_>]) -> ModelResult<Vec<Option<u32>>> {
        for input in batch {
            if let Some(sampling) = input.sampling {
                sampling.validate()?;
            }
        }
        let heads: Vec<_> = batch.iter().map(|input| input.sampling.map_or(Head::Nothing, Head::Sample)).collect();
        let mut tokens = vec![None; batch.len()];
        let sequences: Vec<_> = batch.iter().map(|input| (input.sequence, input.tokens)).collect();
        self.run(&sequences, &heads, |_, chunks, words| {
            let sampling = chunks.iter().filter(|chunk| matches!(chunk.head, Head::Sample(_)));
            for (chunk, sampled) in sampling.zip(Sampler::read_output(words)) {
                let Some(token) = sampled.token else {
                    return Err(ModelError::BadLogits { sequence: chunk.sequence });
                };
                tokens[chunk.input] = Some(token);
            }
            Ok(())
        })
        .await?;
        Ok(tokens)
    }

    /// [`Decoder::step`], waiting for the GPU.
    ///
    /// # Errors
    /// Those of [`Decoder::step`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn step_blocking(&mut self, batch: &[Input<'_>]) -> ModelResult<Vec<Option<u32>>> {
        self.gpu().clone().block_on(self.step(batch))
    }

    /// Feeds new tokens to each sequence and returns logits: for each input one row or one row per token, `[rows, vocab_size]`.
    ///
    /// # Errors
    /// Those of [`Decoder::step`], except that logits are returned as they are, NaN included.
    pub async fn logits(&mut self, batch: &[(SequenceId, &[u32])], rows: LogitRows) -> ModelResult<Vec<Vec<f32>>> {
        let head = match rows {
            LogitRows::Last => Head::LastRow,
            LogitRows::All => Head::AllRows,
        };
        let mut logits = vec![Vec::new(); batch.len()];
        self.run(batch, &vec![head; batch.len()], |vocab, chunks, words| {
            let mut rest = words;
            for chunk in chunks {
                let (own, after) = rest.split_at(chunk.head.rows(chunk.tokens.len()) * vocab);
                logits[chunk.input].extend(own.iter().map(|&bits| f32::from_bits(bits)));
                rest = after;
            }
            Ok(())
        })
        .await?;
        Ok(logits)
    }

    /// [`Decoder::logits`], waiting for the GPU.
    ///
    /// # Errors
    /// Those of [`Decoder::logits`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn logits_blocking(&mut self, batch: &[(SequenceId, &[u32])], rows: LogitRows) -> ModelResult<Vec<Vec<f32>>> {
        self.gpu().clone().block_on(self.logits(batch, rows))
    }

    /// Checks a batch against the model, before anything happens. Returns the present length of each sequence.
    fn check(&self, batch: &[(SequenceId, &[u32])]) -> ModelResult<Vec<(SequenceId, u32)>> {
        let config = self.model.config();
        if batch.is_empty() {
            return Err(ModelError::argument("batch", "no input", "at least one"));
        }
        let mut lengths = Vec::with_capacity(batch.len());
        for (i, &(sequence, tokens)) in batch.iter().enumerate() {
            let len = self.cache.seq_len(sequence)?;
            if batch[..i].iter().any(|&(other, _)| other == sequence) {
                return Err(ModelError::argument("batch", format!("{sequence} twice"), "each sequence once"));
            }
            if tokens.is_empty() {
                return Err(ModelError::argument("tokens", format!("none for {sequence}"), "at least one"));
            }
            if let Some(id) = tokens.iter().find(|&&id| id >= config.vocab_size) {
                let rule = format!("an id below vocab_size, {}", config.vocab_size);
                return Err(ModelError::argument("tokens", format!("id {id} for {sequence}"), rule));
            }
            let end = len as usize + tokens.len();
            if end > config.max_positions as usize {
                let got = format!("{len} + {} for {sequence}", tokens.len());
                let rule = format!("at most the model's {} positions", config.max_positions);
                return Err(ModelError::argument("tokens", got, rule));
            }
            lengths.push((sequence, len));
        }
        Ok(lengths)
    }

    /// Rows of logits that fit into a binding at a time.
    fn max_logit_rows(&self) -> usize {
        let limits = self.gpu().limits();
        let bytes = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        (bytes / (u64::from(self.model.config().vocab_size) * 4)).max(1) as usize
    }

    /// Runs a batch in as many steps as it takes. `finish` gets the words that each step has read back.
    async fn run<'a>(
        &mut self,
        batch: &[(SequenceId, &'a [u32])],
        heads: &[Head<'a>],
        mut finish: impl FnMut(usize, &[Chunk<'a>], &[u32]) -> ModelResult<()>,
    ) -> ModelResult<()> {
        let lengths = self.check(batch)?;
        let vocab = self.model.config().vocab_size as usize;
        let rollback = Rollback { cache: Arc::clone(&self.cache), lengths: lengths.clone() };
        let max_rows = self.max_logit_rows();
        let mut done = vec![0; batch.len()];
        loop {
            let chunks =
                next_chunks(batch, heads, &lengths, &mut done, self.options.max_step_tokens as usize, max_rows);
            if chunks.is_empty() {
                break;
            }
            self.run_step(&chunks, |words| finish(vocab, &chunks, words)).await?;
        }
        rollback.disarm();
        for &(sequence, tokens) in batch {
            self.histories.entry(sequence).or_default().extend_from_slice(tokens);
        }
        Ok(())
    }

    /// One step: everything is recorded into one pass and submitted at once.
    async fn run_step(
        &mut self,
        chunks: &[Chunk<'_>],
        finish: impl FnOnce(&[u32]) -> ModelResult<()>,
    ) -> ModelResult<()> {
        let gpu = self.gpu().clone();
        let model = Arc::clone(&self.model);
        let vocab = model.config().vocab_size;
        let batch: Vec<_> = chunks.iter().map(|chunk| (chunk.sequence, chunk.tokens.len() as u32)).collect();
        let step = self.cache.begin_step(&batch)?;
        let plan = self.attention.plan(&step)?;

        let ids: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.tokens).copied().collect();
        let positions: Vec<u32> = chunks.iter().flat_map(|c| c.position..c.position + c.tokens.len() as u32).collect();
        let mut head_rows = Vec::new();
        let mut start = 0;
        for chunk in chunks {
            let end = start + chunk.tokens.len();
            head_rows.extend((end - chunk.head.rows(chunk.tokens.len())..end).map(|row| row as u32));
            start = end;
        }
        let rows = ids.len() as u32;
        let num_head_rows = head_rows.len() as u32;
        // Token ids, positions and rows of the head, each from a multiple of WebGPU's largest alignment on.
        let mut words = Vec::new();
        let [ids, positions, head_rows] = [ids, positions, head_rows].map(|list| {
            let offset = words.len() as u64 * 4;
            let bytes = list.len() as u64 * 4;
            words.extend(list);
            words.resize(words.len().next_multiple_of(64), 0);
            (offset, bytes)
        });
        let (lists, lease) = Upload::new(&gpu, "batch", words)?.buffer()?;
        let [ids, positions, head_rows] =
            [ids, positions, head_rows].map(|(offset, bytes)| BufferRef::new(&lists, offset, bytes));

        let sampling: Vec<_> = chunks
            .iter()
            .filter_map(|chunk| match chunk.head {
                Head::Sample(sampling) => Some((chunk, sampling)),
                _ => None,
            })
            .collect();
        let histories: Vec<_> = sampling.iter().map(|(chunk, sampling)| self.history(chunk, sampling)).collect();
        let requests: Vec<_> = sampling
            .iter()
            .zip(&histories)
            .map(|(&(chunk, &sampling), history)| SamplingRequest {
                sampling,
                // The position of the token that is drawn, so that a seed gives the same text however it is cut into steps.
                draw_index: chunk.position + chunk.tokens.len() as u32,
                history,
                logprob: false,
            })
            .collect();
        let result_bytes = if requests.is_empty() {
            u64::from(num_head_rows) * u64::from(vocab) * 4
        } else {
            requests.len() as u64 * OUTPUT_BYTES
        };
        let staging = self.reserve(num_head_rows, requests.len() as u64 * OUTPUT_BYTES, result_bytes)?;

        let mut encoder = gpu.encoder()?;
        {
            let descriptor = wgpu::ComputePassDescriptor { label: Some("folio decoder step"), timestamp_writes: None };
            let mut pass = gpu.scoped_now("running the model", || encoder.begin_compute_pass(&descriptor))?;
            lease.hold_in(&pass);
            let context = super::transformer::StepContext {
                cache: &self.cache,
                attention: &self.attention,
                rope: self.rope.as_ref(),
                step: &step,
                plan: &plan,
                ids,
                positions,
                rows,
            };
            model.record_layers(&mut pass, &self.scratch, &context)?;
            if num_head_rows > 0 {
                let logits = Rows::new(&self.logits, num_head_rows, vocab);
                model.record_head(&mut pass, &self.scratch, rows, head_rows, logits)?;
                if !requests.is_empty() {
                    self.sampler.record(&gpu, &mut pass, logits, &requests, &self.output)?;
                }
            }
        }
        if num_head_rows > 0 {
            let source = if requests.is_empty() { &self.logits } else { &self.output };
            encoder.copy_buffer_to_buffer(source, 0, staging.buffer(), 0, result_bytes);
        }
        gpu.submit("running the model", encoder).await?;
        if num_head_rows > 0 {
            let words = staging.words(&gpu, result_bytes).await?;
            finish(&words)?;
        }
        self.staging = Some(staging);
        self.cache.commit(step)?;
        Ok(())
    }

    /// All tokens before the one that is drawn, if the repetition penalty asks for them.
    fn history(&self, chunk: &Chunk<'_>, sampling: &Sampling) -> Vec<u32> {
        if sampling.repetition_penalty == 1.0 {
            return Vec::new();
        }
        let before = self.histories.get(&chunk.sequence).map_or(&[][..], Vec::as_slice);
        [before, chunk.input_tokens].concat()
    }

    /// Makes the buffers of the head large enough, and takes the one to read back through.
    fn reserve(&mut self, head_rows: u32, output_bytes: u64, staging_bytes: u64) -> Result<Readback> {
        let gpu = self.gpu().clone();
        let logits_bytes = u64::from(head_rows) * u64::from(self.model.config().vocab_size) * 4;
        if self.logits.size() < logits_bytes {
            self.logits = storage(&gpu, "folio logits", logits_bytes)?;
        }
        if self.output.size() < output_bytes {
            self.output = storage(&gpu, "folio sampled tokens", output_bytes.next_power_of_two())?;
        }
        match self.staging.take() {
            Some(staging) if staging.buffer().size() >= staging_bytes => Ok(staging),
            _ => Readback::new(&gpu, staging_bytes.next_power_of_two().max(256)),
        }
    }
}

/// The next step's share of a batch: up to `max_tokens` tokens with up to `max_rows` rows of logits, in the order of the inputs.
fn next_chunks<'a>(
    batch: &[(SequenceId, &'a [u32])],
    heads: &[Head<'a>],
    lengths: &[(SequenceId, u32)],
    done: &mut [usize],
    max_tokens: usize,
    max_rows: usize,
) -> Vec<Chunk<'a>> {
    let (mut tokens_left, mut rows_left) = (max_tokens, max_rows);
    let mut chunks = Vec::new();
    for (input, &(sequence, tokens)) in batch.iter().enumerate() {
        let rest = &tokens[done[input]..];
        if rest.is_empty() {
            continue;
        }
        let mut take = rest.len().min(tokens_left);
        let mut head = heads[input];
        match head {
            Head::AllRows => take = take.min(rows_left),
            // The head is for the last token, and waits with it for a step that has room.
            Head::Sample(_) | Head::LastRow if take == rest.len() && rows_left == 0 => take -= 1,
            Head::Sample(_) | Head::LastRow if take < rest.len() => head = Head::Nothing,
            _ => {}
        }
        if take < rest.len() && !matches!(head, Head::AllRows) {
            head = Head::Nothing;
        }
        if take == 0 {
            break;
        }
        let position = lengths[input].1 + done[input] as u32;
        tokens_left -= take;
        rows_left -= head.rows(take);
        chunks.push(Chunk { input, sequence, tokens: &rest[..take], position, head, input_tokens: tokens });
        done[input] += take;
    }
    chunks
}

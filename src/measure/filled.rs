//! [`FilledCache`]: sequences with tokens, over which calls are measured.

use std::sync::Arc;

use super::{Sample, Timer, Work};
use crate::attention::{Attention, AttentionPlan};
use crate::cache::{KvCache, Step};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ids::SequenceId;
use crate::layout::KvCacheConfig;
use crate::plan::AttentionConfig;

/// A batch of equal sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: u32,
    /// New tokens of a sequence: 1 is decode.
    pub query_len: u32,
    /// Keys of a sequence, those of the new tokens included.
    pub seq_len: u32,
}

/// Tokens of all sequences that are appended at a time to fill a cache.
const FILL_TOKENS: u32 = 256;

/// A cache of one layer whose sequences have tokens, and attention over it. Its blocks lie in random order, as in a pool that has been used for a while,
/// unless it is contiguous. Keys and values are random.
#[derive(Debug)]
pub struct FilledCache {
    cache: KvCache,
    attention: Arc<Attention>,
    sequences: Vec<SequenceId>,
    rng: fastrand::Rng,
}

/// A call of attention over the tokens of an open step, and the append before it. The sequences can't grow until it is dropped.
#[derive(Debug)]
pub struct MeasuredCall<'a> {
    cache: &'a KvCache,
    attention: Arc<Attention>,
    plan: AttentionPlan,
    step: Step,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    q: wgpu::Buffer,
    out: wgpu::Buffer,
}

impl FilledCache {
    /// A cache of `batch` sequences without tokens. Of `config` the number of layers plays no part; `num_blocks` must hold what the sequences will have.
    /// Compiles the kernels. Scales per channel, where K has them, come from random keys. Not for latents, which are appended otherwise.
    ///
    /// # Errors
    /// Those of [`KvCache::new`] and [`Attention::new`].
    pub fn new(gpu: &Gpu, config: KvCacheConfig, attention: AttentionConfig, batch: u32) -> Result<Self> {
        let config = KvCacheConfig { num_layers: 1, ..config };
        let cache = gpu.block_on(KvCache::new(gpu, config))?;
        let mut rng = fastrand::Rng::with_seed(1);
        if config.k_format.has_channel_scales() {
            cache.calibrate_keys(0, &random(&mut rng, 64 * config.token_elements()[0]))?;
        }
        let attention = Arc::new(gpu.block_on(Attention::new(&cache, attention))?);
        if !config.contiguous {
            shuffle_blocks(&cache, &mut rng)?;
        }
        let sequences = (0..batch).map(|_| cache.create_sequence()).collect();
        Ok(Self { cache, attention, sequences, rng })
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Attention over it.
    #[must_use]
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Appends random tokens until every sequence has `seq_len` of them. **Submits.**
    ///
    /// # Errors
    /// [`Error::Argument`] if they have more; [`Error::OutOfBlocks`] and the other errors of [`KvCache::begin_step`]; [`Error::Wgpu`].
    pub fn fill(&mut self, seq_len: u32) -> Result<()> {
        let chunk = (FILL_TOKENS / self.sequences.len().max(1) as u32).max(1);
        loop {
            let have = self.len()?;
            let left = seq_len.checked_sub(have).ok_or_else(|| {
                Error::argument("seq_len", seq_len, format!("at least what the sequences have, {have}"))
            })?;
            if left == 0 {
                return Ok(());
            }
            let step = self.begin(left.min(chunk))?;
            let [k, v] = self.new_rows(&step)?;
            let gpu = self.cache.gpu();
            let mut encoder = gpu.encoder()?;
            self.cache.append(&mut encoder, &step, 0, &k, &v, None)?;
            gpu.submit_now("filling a cache", encoder)?;
            self.cache.commit(step)?;
        }
    }

    /// Tokens of each sequence.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`] if the cache has been cleared.
    pub fn len(&self) -> Result<u32> {
        self.sequences.first().map_or(Ok(0), |&first| self.cache.seq_len(first))
    }

    /// Whether the sequences have no tokens yet.
    ///
    /// # Errors
    /// Those of [`FilledCache::len`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Takes all tokens from the sequences.
    ///
    /// # Errors
    /// Those of [`KvCache::truncate`].
    pub fn empty(&mut self) -> Result<()> {
        self.sequences.iter().try_for_each(|&sequence| self.cache.truncate(sequence, 0))
    }

    /// Plans a call of `query_len` new tokens of each sequence and appends these. **Submits** the append.
    ///
    /// # Errors
    /// Those of [`KvCache::begin_step`] and [`Attention::plan`]; [`Error::Wgpu`].
    pub fn call(&mut self, query_len: u32) -> Result<MeasuredCall<'_>> {
        let step = self.begin(query_len)?;
        let plan = self.attention.plan(&step)?;
        let [k, v] = self.new_rows(&step)?;
        let rows = u64::from(step.num_tokens()) * u64::from(self.attention.config().num_q_heads);
        let config = *self.cache.config();
        let gpu = self.cache.gpu();
        let q = upload(gpu, &random(&mut self.rng, rows * u64::from(config.head_dim)))?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let out = gpu.create_buffer(DURING, "folio measure", rows * u64::from(config.value_dim()) * 4, usage)?;
        let attention = Arc::clone(&self.attention);
        let call = MeasuredCall { cache: &self.cache, attention, plan, step, k, v, q, out };
        let mut encoder = gpu.encoder()?;
        call.cache.append(&mut encoder, &call.step, 0, &call.k, &call.v, None)?;
        gpu.submit_now("filling a cache", encoder)?;
        Ok(call)
    }

    fn begin(&self, tokens: u32) -> Result<Step> {
        let batch: Vec<_> = self.sequences.iter().map(|&sequence| (sequence, tokens)).collect();
        self.cache.begin_step(&batch)
    }

    /// Random keys and values of a step.
    fn new_rows(&mut self, step: &Step) -> Result<[wgpu::Buffer; 2]> {
        let elements = self.cache.config().token_elements();
        let rows = elements.map(|elements| random(&mut self.rng, u64::from(step.num_tokens()) * elements));
        let [k, v] = rows.map(|rows| upload(self.cache.gpu(), &rows));
        Ok([k?, v?])
    }
}

impl MeasuredCall<'_> {
    /// Bytes and operations of the call of attention.
    #[must_use]
    pub fn work(&self) -> Work {
        Work::of_attention(&self.attention, &self.plan)
    }

    /// Records attention.
    ///
    /// # Errors
    /// Those of [`Attention::attend`].
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>) -> Result<()> {
        self.attention.attend(pass, &self.plan, 0, &self.q, &self.out)
    }

    /// Records the append of the new tokens.
    ///
    /// # Errors
    /// Those of [`KvCache::append`].
    pub fn record_append(&self, pass: &mut wgpu::ComputePass<'_>) -> Result<()> {
        self.cache.append(pass, &self.step, 0, &self.k, &self.v, None)
    }

    /// Makes the new tokens part of their sequences.
    ///
    /// # Errors
    /// Those of [`KvCache::commit`].
    pub fn commit(self) -> Result<()> {
        self.cache.commit(self.step)
    }

    /// Times attention.
    ///
    /// # Errors
    /// Those of [`Attention::attend`] and of [`Timer::measure`].
    pub fn measure(&self, timer: &Timer) -> Result<Sample> {
        timer.measure(|pass| self.record(pass))
    }

    /// Times the append of the new tokens.
    ///
    /// # Errors
    /// Those of [`KvCache::append`] and of [`Timer::measure`].
    pub fn measure_append(&self, timer: &Timer) -> Result<Sample> {
        timer.measure(|pass| self.record_append(pass))
    }
}

const DURING: &str = "creating what is measured";

/// Takes all blocks and gives them back in random order.
fn shuffle_blocks(cache: &KvCache, rng: &mut fastrand::Rng) -> Result<()> {
    let config = cache.config();
    let mut holders: Vec<_> = (0..config.num_blocks).map(|_| (cache.create_sequence(), config.block_size)).collect();
    let step = cache.begin_step(&holders)?;
    cache.commit(step)?;
    rng.shuffle(&mut holders);
    holders.into_iter().try_for_each(|(holder, _)| cache.free(holder))
}

/// Numbers in -1.5..1.5.
fn random(rng: &mut fastrand::Rng, len: u64) -> Vec<f32> {
    (0..len).map(|_| (rng.f32() - 0.5) * 3.0).collect()
}

fn upload(gpu: &Gpu, values: &[f32]) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    gpu.create_buffer_with(DURING, "folio measure", bytemuck::cast_slice(values), usage)
}

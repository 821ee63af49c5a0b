//! What a race times: one kernel on one shape, over a filled cache.

use std::sync::Arc;

use super::TuneShape;
use super::check::Check;
use super::race::Run;
use crate::attention::Attention;
use crate::cache::{KvCache, Step};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::ids::SequenceId;
use crate::kernel::tuning::{Sizes, TunedKernel, TunedShape, TunedSplit, Tuning};
use crate::kernel::{AttendFlags, Kernel, Variant, max_decode_group};
use crate::layout::KvCacheConfig;
use crate::plan::AttentionConfig;

/// Tokens that are appended at a time to fill a cache.
const FILL_TOKENS: u32 = 256;

/// One kernel and shape.
pub(super) struct Workload {
    /// The kernel as it is without a tuning.
    pub(super) variant: Variant,
    gpu: Gpu,
    config: KvCacheConfig,
    attention: AttentionConfig,
    /// Sequences, new tokens and keys of each.
    batch: u32,
    query_len: u32,
    seq_len: u32,
    /// Of attention: what the candidates share.
    filled: Option<Filled>,
    check: Check,
}

/// A cache with an open step whose rows are appended.
struct Filled {
    cache: KvCache,
    step: Arc<Step>,
    q: wgpu::Buffer,
    out: wgpu::Buffer,
}

/// Numbers in -1.5..1.5, the same in every run.
pub(super) fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| (rng.f32() - 0.5) * 3.0).collect()
}

pub(super) fn upload(gpu: &Gpu, values: &[f32]) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    gpu.create_buffer_with("creating a workload", "folio tune", bytemuck::cast_slice(values), usage)
}

impl Workload {
    /// `None` if the shape has no such kernel.
    pub(super) fn new(gpu: &Gpu, shape: &TuneShape, kernel: Kernel) -> Result<Option<Self>> {
        let group_size = shape.num_q_heads / shape.cache.num_kv_heads;
        let (batch, query_len, seq_len) = match kernel {
            Kernel::Decode if group_size > max_decode_group(&shape.cache) => return Ok(None),
            Kernel::Decode => (shape.decode.0, 1, shape.decode.1),
            // An append of the prefill's tokens.
            Kernel::Append => (1, shape.prefill.0, shape.prefill.0),
            _ => (1, shape.prefill.0, shape.prefill.1),
        };
        let config = KvCacheConfig {
            num_layers: 1,
            num_blocks: batch.saturating_mul(seq_len.div_ceil(shape.cache.block_size)),
            ..shape.cache
        };
        config.validate()?;
        let (group_size, flags) = match kernel {
            Kernel::Append => (1, AttendFlags::default()),
            _ => (group_size, AttendFlags { causal: true, ..AttendFlags::default() }),
        };
        let variant = Variant::new(kernel, gpu.target(), &config, group_size, flags);
        let attention = AttentionConfig::new(shape.num_q_heads);
        let gpu = gpu.retuned(None);
        let check = Check::new(&gpu, &config, &attention, kernel)?;
        let mut workload = Self { variant, gpu, config, attention, batch, query_len, seq_len, filled: None, check };
        if kernel != Kernel::Append {
            workload.filled = Some(workload.fill()?);
        }
        Ok(Some(workload))
    }

    /// Batch, lengths, heads.
    pub(super) fn describe(&self) -> String {
        let Self { batch, query_len, seq_len, config, attention, .. } = self;
        let (q_heads, kv_heads) = (attention.num_q_heads, config.num_kv_heads);
        format!("{batch} x {query_len} over {seq_len}, {q_heads}/{kv_heads} heads, d {}", config.head_dim)
    }

    /// A tuning of one choice for this kernel.
    pub(super) fn tuning(&self, sizes: Sizes, split: Option<TunedSplit>) -> Tuning {
        Tuning { kernels: vec![choice(&self.variant, sizes, split)], ..Tuning::new(self.gpu.tuned_for()) }
    }

    /// Checks a candidate, and prepares it for the race.
    pub(super) fn enter(&self, sizes: Sizes, split: Option<TunedSplit>) -> Result<Run> {
        let tuning = self.tuning(sizes, split);
        let Some(Filled { cache, step, q, out }) = &self.filled else {
            return self.enter_append(tuning);
        };
        self.check.attention(&tuning)?;
        let attention = self.gpu.block_on(Attention::build(cache, self.attention.clone(), Some(&tuning)))?;
        let plan = attention.plan(&**step)?;
        // The plan is good for as long as its step.
        let (q, out, step) = (q.clone(), out.clone(), Arc::clone(step));
        Ok(Box::new(move |pass| {
            let _open = &step;
            attention.attend(pass, &plan, 0, &q, &out)
        }))
    }

    fn enter_append(&self, tuning: Tuning) -> Result<Run> {
        let gpu = self.gpu.retuned(Some(tuning));
        self.check.append(&gpu)?;
        let cache = self.gpu.block_on(KvCache::new(&gpu, self.config))?;
        calibrate(&cache)?;
        let step = cache.begin_step(&[(cache.create_sequence(), self.query_len)])?;
        let [k, v] = self.config.token_elements().map(|elements| self.query_len as usize * elements as usize);
        let (k, v) = (upload(&gpu, &random(1, k))?, upload(&gpu, &random(1, v))?);
        Ok(Box::new(move |pass| cache.append(pass, &step, 0, &k, &v, None)))
    }

    fn fill(&self) -> Result<Filled> {
        let Self { gpu, config, batch, query_len, seq_len, .. } = self;
        let cache = gpu.block_on(KvCache::new(gpu, *config))?;
        calibrate(&cache)?;
        let sequences: Vec<_> = (0..*batch).map(|_| cache.create_sequence()).collect();
        // Blocks of the sequences take turns, as in a pool that has been used for a while.
        let context_len = seq_len - query_len;
        let chunk = (FILL_TOKENS / batch).max(1);
        let mut done = 0;
        while done < context_len {
            let tokens = chunk.min(context_len - done);
            let step = append_random(&cache, &sequences, tokens)?;
            cache.commit(step)?;
            done += tokens;
        }
        let step = Arc::new(append_random(&cache, &sequences, *query_len)?);
        let rows = (batch * query_len) as usize * self.attention.num_q_heads as usize;
        let q = upload(gpu, &random(2, rows * config.head_dim as usize))?;
        let out = upload(gpu, &vec![0.0; rows * config.value_dim() as usize])?;
        Ok(Filled { cache, step, q, out })
    }
}

/// The entry of one choice.
pub(super) fn choice(variant: &Variant, sizes: Sizes, split: Option<TunedSplit>) -> TunedKernel {
    let shape = TunedShape::of(variant);
    TunedKernel { shape, sizes, split, workload: String::new(), nanos: 0, default_nanos: 0 }
}

/// Scales per channel, where K has them: all alike.
pub(super) fn calibrate(cache: &KvCache) -> Result<()> {
    let config = cache.config();
    if !config.k_format.has_channel_scales() {
        return Ok(());
    }
    cache.calibrate_keys(0, &random(3, 64 * config.token_elements()[0] as usize))
}

/// Appends random rows to every sequence, and submits. The step stays open.
fn append_random(cache: &KvCache, sequences: &[SequenceId], tokens: u32) -> Result<Step> {
    let gpu = cache.gpu();
    let batch: Vec<_> = sequences.iter().map(|&sequence| (sequence, tokens)).collect();
    let step = cache.begin_step(&batch)?;
    let [k, v] = cache.config().token_elements().map(|elements| step.num_tokens() as usize * elements as usize);
    let (k, v) = (upload(gpu, &random(4, k))?, upload(gpu, &random(5, v))?);
    submit_append(cache, &step, &k, &v)?;
    Ok(step)
}

pub(super) fn submit_append(cache: &KvCache, step: &Step, k: &wgpu::Buffer, v: &wgpu::Buffer) -> Result<()> {
    let gpu = cache.gpu();
    let mut encoder = gpu.encoder()?;
    cache.append(&mut encoder, step, 0, k, v, None)?;
    gpu.submit_now("filling a workload", encoder)
}

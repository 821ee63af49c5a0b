//! folio's part: a paged cache with blocks in random order, and one planned call.

use anyhow::Result;
use folio::tune::Timer;
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{Attention, AttentionConfig, AttentionPlan, Gpu, KvCache, KvCacheConfig, KvFormat, SequenceId, Step, wgpu};

use crate::operands::Operands;
use crate::support::shape::Shape;

/// Tokens of a block, as in folio's own benchmark.
const BLOCK_SIZE: u32 = 16;

pub struct Own {
    pub cache: KvCache,
    attention: Attention,
    plan: AttentionPlan,
    q: wgpu::Buffer,
    out: wgpu::Buffer,
    /// The plan is good for as long as its step.
    _step: Step,
}

impl Own {
    pub fn new(gpu: &Gpu, shape: &Shape, format: KvFormat, operands: &Operands) -> Result<Self> {
        let config = KvCacheConfig::new(1, shape.num_kv_heads, shape.head_dim)
            .with_blocks(shape.batch * shape.seq_len.div_ceil(BLOCK_SIZE), BLOCK_SIZE)
            .with_formats(format, format);
        let cache = KvCache::new_blocking(gpu, config)?;
        shuffle_blocks(&cache)?;
        let attention = Attention::new_blocking(&cache, AttentionConfig::new(shape.num_q_heads))?;
        let sequences: Vec<_> = (0..shape.batch).map(|_| cache.create_sequence()).collect();
        let mut begin = 0;
        for tokens in shape.context_steps() {
            let step = append(&cache, &sequences, operands, begin, tokens)?;
            cache.commit(step)?;
            begin += tokens;
        }
        let step = append(&cache, &sequences, operands, begin, shape.query_len)?;
        let plan = attention.plan(&step)?;
        let (q, out) = (buffer(gpu, &operands.q), buffer(gpu, &operands.q));
        Ok(Self { cache, attention, plan, q, out, _step: step })
    }

    /// Seconds of recording, submit and wait.
    pub fn time(&self, timer: &Timer) -> Result<f64> {
        let sample = timer.measure(|pass| self.attention.attend(pass, &self.plan, 0, &self.q, &self.out))?;
        Ok(sample.wall.as_secs_f64())
    }

    pub fn output(&self, timer: &Timer) -> Result<Vec<f32>> {
        self.time(timer)?;
        Ok(timer.gpu().read_blocking(&self.out)?)
    }
}

/// Takes all blocks and gives them back in random order.
fn shuffle_blocks(cache: &KvCache) -> Result<()> {
    let mut holders: Vec<_> = (0..cache.config().num_blocks).map(|_| (cache.create_sequence(), BLOCK_SIZE)).collect();
    let step = cache.begin_step(&holders)?;
    cache.commit(step)?;
    fastrand::Rng::with_seed(1).shuffle(&mut holders);
    Ok(holders.into_iter().try_for_each(|(holder, _)| cache.free(holder))?)
}

/// Appends the rows of some tokens of every sequence, and submits. The step stays open.
fn append(cache: &KvCache, sequences: &[SequenceId], operands: &Operands, begin: u32, tokens: u32) -> Result<Step> {
    let gpu = cache.gpu();
    let batch: Vec<_> = sequences.iter().map(|&sequence| (sequence, tokens)).collect();
    let step = cache.begin_step(&batch)?;
    let [k, v] =
        [&operands.k, &operands.v].map(|side| buffer(gpu, &operands.rows(side, begin as usize, tokens as usize)));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    cache.append(&mut encoder, &step, 0, &k, &v, None)?;
    gpu.queue().submit([encoder.finish()]);
    Ok(step)
}

fn buffer(gpu: &Gpu, values: &[f32]) -> wgpu::Buffer {
    let contents: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: None,
        contents: &contents,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

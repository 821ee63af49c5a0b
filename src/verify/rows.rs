//! The numbers of a case, and what they come to on a device and in f64.

use fastrand::Rng;

use super::Case;
use crate::attention::Attention;
use crate::cache::{KvCache, Step};
use crate::error::{Error, Result};
use crate::format::KvFormat;
use crate::gpu::Gpu;
use crate::ids::SequenceId;
use crate::layout::KvCacheConfig;
use crate::reference::{BoundedOutput, ErrorModel, InvalidProblem, Options, Problem, attention_with_bound};

/// The rows of one sequence.
pub(super) struct Rows {
    /// `[query_len, num_q_heads, head_dim]`
    pub(super) q: Vec<f32>,
    /// `[seq_len, num_kv_heads, head_dim]`
    k: Vec<f32>,
    /// `[seq_len, num_kv_heads, value_dim]`
    v: Vec<f32>,
    /// `[query_len, ceil(seq_len / 32)]`
    mask: Vec<u32>,
}

impl Rows {
    pub(super) fn new(case: &Case, seed: u64, (context_len, query_len): (u32, u32)) -> Self {
        let mut rng = Rng::with_seed(seed);
        let seq_len = context_len + query_len;
        let mut row = |len: u32, scale: f32| -> Vec<f32> {
            // About normal, of variance 1: the sum of four uniform numbers, multiples of 2^-12 in -0.5..0.5, has a third of that.
            let mut uniform = || rng.i32(-2048..2048) as f32 / 4096.0;
            (0..len).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.75 * scale).collect()
        };
        let q = row(query_len * case.num_q_heads * case.head_dim, case.q_scale());
        let k = row(seq_len * case.num_kv_heads * case.head_dim, 1.0);
        let v = if case.latent {
            let of_key = |key: &[f32]| key[..case.value_dim as usize].to_vec();
            k.chunks(case.head_dim as usize).flat_map(of_key).collect()
        } else {
            row(seq_len * case.num_kv_heads * case.value_dim, 1.0)
        };
        let words = if case.has_mask() { query_len * seq_len.div_ceil(32) } else { 0 };
        Self { q, k, v, mask: (0..words).map(|_| rng.u32(..)).collect() }
    }

    /// Its K and V of some tokens.
    fn part(&self, case: &Case, tokens: std::ops::Range<u32>) -> [&[f32]; 2] {
        [(&self.k, case.head_dim), (&self.v, case.value_dim)].map(|(rows, dim)| {
            let token = (case.num_kv_heads * dim) as usize;
            &rows[tokens.start as usize * token..tokens.end as usize * token]
        })
    }
}

/// Scales and zero points that cover -4..4 in every channel, for formats that have them: `[2, num_kv_heads, head_dim]`. Rows reach 3.5.
pub(super) fn channels(case: &Case) -> Option<Vec<f32>> {
    let format = case.formats.k;
    if !format.has_channel_scales() {
        return None;
    }
    let len = (case.num_kv_heads * case.head_dim) as usize;
    let levels = ((1_u32 << format.element_bits()) - 1) as f32;
    Some([vec![8.0 / levels; len], vec![-4.0; len]].concat())
}

/// What the oracle says of each sequence: attention over the rows as the cache keeps them, and how far from it rounding may lead.
pub(super) fn expected(gpu: &Gpu, case: &Case, rows: &[Rows]) -> Result<Vec<BoundedOutput>> {
    let config = case.attention();
    let channels = channels(case);
    let mut model = ErrorModel::new(case.formats.k, case.formats.v).over_stored();
    if case.latent {
        model = model.with_latents();
    }
    // (Rows in f32 keep the kernel without matrix units, unless the device may round them.)
    if gpu.matrix_size().is_some() && (case.formats.k != KvFormat::F32 || gpu.rounds_f32()) {
        model = model.with_f16_products();
    }
    if gpu.packed_dots() {
        model = model.with_packed_dots();
    }
    if let Some(channels) = &channels {
        model = model.with_key_scales(channels);
    }
    let of = |rows: &Rows| {
        let options = Options {
            causal: config.causal,
            softmax_scale: None,
            softcap: config.softcap.map(f64::from),
            window: config.window,
            sink_tokens: config.sink_tokens,
            alibi_slopes: config.alibi_slopes.clone(),
            sinks: config.sinks.clone(),
            mask: config.custom_mask.then(|| rows.mask.clone()),
        };
        let problem = Problem {
            num_q_heads: case.num_q_heads as usize,
            num_kv_heads: case.num_kv_heads as usize,
            head_dim: case.head_dim as usize,
            value_dim: case.value_dim as usize,
            q: &rows.q,
            k: &rows.k,
            v: &rows.v,
            options,
        };
        let invalid = |error: InvalidProblem| Error::argument("case", error.to_string(), "one that the oracle takes");
        attention_with_bound(&problem, &model).map_err(invalid)
    };
    rows.iter().map(of).collect()
}

/// `out` and `lse` of all sequences, from the device.
///
/// The cache's unused bytes are NaN in every format, and its blocks are taken in a random order.
pub(super) async fn computed(gpu: &Gpu, case: &Case, rows: &[Rows]) -> Result<(Vec<f32>, Vec<f32>)> {
    let lens = case.lens();
    let num_blocks: u32 = lens.iter().map(|(context, new)| (context + new).div_ceil(case.block_size)).sum();
    let mut config = KvCacheConfig::new(1, case.num_kv_heads, case.head_dim)
        .with_blocks(num_blocks + 3, case.block_size)
        .with_formats(case.formats.k, case.formats.v)
        .with_value_dim(case.value_dim);
    config.latent = case.latent;
    let cache = KvCache::new(gpu, config).await?;
    let attention = Attention::new(&cache, case.attention()).await?;
    poison(&cache)?;
    // Its table lies in the pool.
    if let Some(channels) = channels(case) {
        cache.set_key_scales(0, &channels)?;
    }
    shuffle(&cache)?;
    let sequences: Vec<_> = lens.iter().map(|_| cache.create_sequence()).collect();
    let batch = |new: fn(&(u32, u32)) -> u32| -> Vec<_> {
        sequences.iter().copied().zip(lens.iter().map(new)).filter(|&(_, new)| new > 0).collect()
    };
    let rows_of = |part: fn(&(u32, u32)) -> std::ops::Range<u32>| {
        let [mut k, mut v] = [Vec::new(), Vec::new()];
        for (rows, lens) in rows.iter().zip(lens) {
            let [of_k, of_v] = rows.part(case, part(lens));
            k.extend_from_slice(of_k);
            v.extend_from_slice(of_v);
        }
        [k, v]
    };
    let (step, _) = append(&cache, &batch(|lens| lens.0), &rows_of(|lens| 0..lens.0)).await?;
    cache.commit(step)?;
    let (step, rows_in_use) = append(&cache, &batch(|lens| lens.1), &rows_of(|lens| lens.0..lens.0 + lens.1)).await?;

    let masks: Vec<&[u32]> = rows.iter().map(|rows| &rows.mask[..]).collect();
    let plan = if case.has_mask() { attention.plan_with_masks(&step, &masks)? } else { attention.plan(&step)? };
    let q: Vec<f32> = rows.iter().flat_map(|rows| &rows.q).copied().collect();
    let num_rows = q.len() / case.head_dim as usize;
    // Results begin as NaN, so that one that nobody writes is noticed.
    let out = upload(gpu, &vec![f32::NAN; num_rows * case.value_dim as usize])?;
    let lse = upload(gpu, &vec![f32::NAN; num_rows])?;
    let q = upload(gpu, &q)?;
    let mut encoder = gpu.encoder()?;
    attention.attend_with_lse(&mut encoder, &plan, 0, &q, &out, &lse)?;
    gpu.submit("verifying attention", encoder).await?;
    let results = (gpu.read(&out).await?, gpu.read(&lse).await?);
    drop(rows_in_use);
    cache.commit(step)?;
    Ok(results)
}

/// Appends rows and submits. The step stays open.
async fn append(
    cache: &KvCache,
    batch: &[(SequenceId, u32)],
    [k, v]: &[Vec<f32>; 2],
) -> Result<(Step, [wgpu::Buffer; 2])> {
    let gpu = cache.gpu();
    let step = cache.begin_step(batch)?;
    let (k, v) = (upload(gpu, k)?, upload(gpu, v)?);
    let mut encoder = gpu.encoder()?;
    if cache.config().latent {
        cache.append_latent(&mut encoder, &step, 0, &k, None)?;
    } else {
        cache.append(&mut encoder, &step, 0, &k, &v, None)?;
    }
    gpu.submit("verifying attention", encoder).await?;
    Ok((step, [k, v]))
}

fn upload(gpu: &Gpu, values: &[f32]) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    gpu.create_buffer_with("creating a case", "folio verify", bytemuck::cast_slice(values), usage)
}

/// Fills the pool with bits that are NaN in every format.
fn poison(cache: &KvCache) -> Result<()> {
    let gpu = cache.gpu();
    let (k, v) = cache.layer_buffers(0)?;
    gpu.scoped_now("creating a case", || {
        for buffer in k.iter().chain(v) {
            gpu.queue().write_buffer(buffer, 0, &vec![0xff; buffer.size() as usize]);
        }
    })
}

/// Takes all blocks and gives them back in random order, so that later tables are not contiguous.
fn shuffle(cache: &KvCache) -> Result<()> {
    let config = cache.config();
    let mut holders: Vec<_> = (0..config.num_blocks).map(|_| cache.create_sequence()).collect();
    for &holder in &holders {
        cache.commit(cache.begin_step(&[(holder, config.block_size)])?)?;
    }
    Rng::with_seed(7).shuffle(&mut holders);
    holders.into_iter().try_for_each(|holder| cache.free(holder))
}

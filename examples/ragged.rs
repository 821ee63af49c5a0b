//! A ragged batch: five sequences with different numbers of new and of cached tokens go through one plan and one submit, with no padding between
//! them. Every output is compared with an f64 computation on the host.
//!
//! `cargo run --release --example ragged`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use anyhow::{Result, ensure};
use folio::reference::{ErrorModel, Options, Problem, attention_with_bound, compare};
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{Attention, AttentionConfig, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, wgpu};

const NUM_Q_HEADS: usize = 8;
const NUM_KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

/// Tokens that a sequence has in the cache, and tokens that it brings.
const BATCH: [(u32, u32, &str); 5] = [
    (300, 1, "decodes"),
    (0, 130, "is a new prompt"),
    (7, 1, "decodes, a short one"),
    (64, 5, "verifies four drafts"),
    (200, 37, "reads a chunk of its prompt"),
];

fn random(tokens: u32, heads: usize) -> Vec<f32> {
    (0..tokens as usize * heads * HEAD_DIM).map(|_| fastrand::f32() - 0.5).collect()
}

fn upload(gpu: &Gpu, values: &[f32]) -> wgpu::Buffer {
    gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(values),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

fn main() -> Result<()> {
    fastrand::seed(1);
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let config = KvCacheConfig::new(1, NUM_KV_HEADS as u32, HEAD_DIM as u32)
        .with_blocks(64, 16)
        .with_formats(KvFormat::F16, KvFormat::F16);
    let cache = KvCache::new_blocking(&gpu, config)?;
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(NUM_Q_HEADS as u32))?;
    let sequences = BATCH.map(|_| cache.create_sequence());
    // Keys and values of each sequence, in order.
    let mut rows =
        BATCH.map(|(cached, new, _)| [random(cached + new, NUM_KV_HEADS), random(cached + new, NUM_KV_HEADS)]);

    // Tokens of all sequences lie one after another, in the order of the batch.
    let append = |lens: &[(u32, u32)]| -> Result<folio::Step> {
        let batch: Vec<_> =
            sequences.iter().zip(lens).filter(|(_, l)| l.1 > l.0).map(|(s, l)| (*s, l.1 - l.0)).collect();
        let step = cache.begin_step(&batch)?;
        let side = |side: usize| {
            let row = NUM_KV_HEADS * HEAD_DIM;
            let part =
                |(rows, l): (&[Vec<f32>; 2], &(u32, u32))| rows[side][l.0 as usize * row..l.1 as usize * row].to_vec();
            upload(&gpu, &rows.iter().zip(lens).flat_map(part).collect::<Vec<_>>())
        };
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        cache.append(&mut encoder, &step, 0, &side(0), &side(1), None)?;
        gpu.queue().submit([encoder.finish()]);
        Ok(step)
    };
    cache.commit(append(&BATCH.map(|(cached, ..)| (0, cached)))?)?;

    // The step of all five.
    let step = append(&BATCH.map(|(cached, new, _)| (cached, cached + new)))?;
    let tokens = step.num_tokens();
    let q = random(tokens, NUM_Q_HEADS);
    let out = upload(&gpu, &vec![f32::NAN; q.len()]);
    let plan = attention.plan(&step)?;
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    attention.attend(&mut encoder, &plan, 0, &upload(&gpu, &q), &out)?;
    gpu.queue().submit([encoder.finish()]);
    cache.commit(step)?;
    let out = gpu.read_blocking(&out)?;

    println!("one step, {tokens} new tokens, read from {} blocks of 16\n", cache.usage().used);
    println!("cached   new  first row  worst error  bound");
    let mut row = 0;
    for ((cached, new, what), [k, v]) in BATCH.iter().zip(&mut rows) {
        let range = row * NUM_Q_HEADS * HEAD_DIM..(row + *new as usize) * NUM_Q_HEADS * HEAD_DIM;
        let (q, options) = (&q[range.clone()], Options::default());
        let (num_q_heads, num_kv_heads, head_dim) = (NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM);
        let problem = Problem { num_q_heads, num_kv_heads, head_dim, value_dim: head_dim, q, k, v, options };
        let expected = attention_with_bound(&problem, &ErrorModel::new(KvFormat::F16, KvFormat::F16))?;
        let found = compare::out(&expected, &out[range]);
        ensure!(found.is_within(), "a sequence that {what}: {found}");
        let (error, bound) = found.worst.as_ref().map_or((0.0, 0.0), |worst| (worst.error(), worst.bound));
        println!("{cached:6} {new:5} {row:10}      {error:.1e}  {bound:.1e}   {what}");
        row += *new as usize;
    }
    let padded = BATCH.len() as u32 * BATCH.map(|(_, new, _)| new).into_iter().max().unwrap_or(0);
    println!("\npadded to the longest, the same step would have {padded} rows of queries in place of {tokens}");
    Ok(())
}

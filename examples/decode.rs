//! First steps, the smallest complete use: cache a prompt, then decode one token, with random vectors in place of a model's. The outputs are compared
//! with an f64 computation on the host.
//!
//! `cargo run --release --example decode`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use anyhow::{Result, ensure};
use folio::reference::{ErrorModel, Options, Problem, attention_with_bound, compare};
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{Attention, AttentionConfig, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, wgpu};

const NUM_Q_HEADS: u32 = 8;
const NUM_KV_HEADS: u32 = 2;
const HEAD_DIM: u32 = 64;

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let config =
        KvCacheConfig::new(1, NUM_KV_HEADS, HEAD_DIM).with_blocks(64, 16).with_formats(KvFormat::F16, KvFormat::F16);
    let cache = KvCache::new_blocking(&gpu, config)?;
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(NUM_Q_HEADS))?;
    println!("{}: {} blocks of 16 tokens, {} KiB", gpu.adapter_info().name, 64, config.pool_bytes() / 1024);

    let sequence = cache.create_sequence();
    let (mut all_k, mut all_v) = (Vec::new(), Vec::new());
    // A prompt of 20 tokens, then one token.
    for query_len in [20, 1] {
        let q = random(query_len * NUM_Q_HEADS);
        let (k, v) = (random(query_len * NUM_KV_HEADS), random(query_len * NUM_KV_HEADS));
        let out = upload(&gpu, &q);

        let step = cache.begin_step(&[(sequence, query_len)])?;
        let plan = attention.plan(&step)?;
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        cache.append(&mut encoder, &step, 0, &upload(&gpu, &k), &upload(&gpu, &v), None)?;
        attention.attend(&mut encoder, &plan, 0, &upload(&gpu, &q), &out)?;
        gpu.queue().submit([encoder.finish()]);
        cache.commit(step)?;

        let out = gpu.read_blocking(&out)?;
        println!(
            "\n{query_len} new tokens, {} in the cache, in blocks {:?}",
            cache.seq_len(sequence)?,
            cache.block_table(sequence)?
        );
        println!("the first output starts with {:.4?}", &out[..4]);

        all_k.extend(k);
        all_v.extend(v);
        let problem = Problem {
            num_q_heads: NUM_Q_HEADS as usize,
            num_kv_heads: NUM_KV_HEADS as usize,
            head_dim: HEAD_DIM as usize,
            value_dim: HEAD_DIM as usize,
            q: &q,
            k: &all_k,
            v: &all_v,
            options: Options::default(),
        };
        let expected = attention_with_bound(&problem, &ErrorModel::new(KvFormat::F16, KvFormat::F16))?;
        let found = compare::out(&expected, &out);
        ensure!(found.is_within(), "{found}");
        println!("all {} numbers agree with f64, within the bound of F16", out.len());
    }
    Ok(())
}

/// Random rows of one head each.
fn random(rows: u32) -> Vec<f32> {
    (0..rows * HEAD_DIM).map(|_| fastrand::f32() - 0.5).collect()
}

fn upload(gpu: &Gpu, values: &[f32]) -> wgpu::Buffer {
    gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(values),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

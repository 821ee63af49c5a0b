//! The smallest complete use: cache a prompt, then decode one token, with random vectors in place of a model's.
//!
//! `cargo run --release --example decode`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{Attention, AttentionConfig, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, wgpu};

const NUM_Q_HEADS: u32 = 8;
const NUM_KV_HEADS: u32 = 2;
const HEAD_DIM: u32 = 64;

fn main() -> folio::Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let config =
        KvCacheConfig::new(1, NUM_KV_HEADS, HEAD_DIM).with_blocks(64, 16).with_formats(KvFormat::F16, KvFormat::F16);
    let cache = KvCache::new_blocking(&gpu, config)?;
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(NUM_Q_HEADS))?;

    let sequence = cache.create_sequence();
    // A prompt of 20 tokens, then one token.
    for query_len in [20, 1] {
        let q = random(&gpu, query_len * NUM_Q_HEADS * HEAD_DIM);
        let k = random(&gpu, query_len * NUM_KV_HEADS * HEAD_DIM);
        let v = random(&gpu, query_len * NUM_KV_HEADS * HEAD_DIM);
        let out = random(&gpu, query_len * NUM_Q_HEADS * HEAD_DIM);

        let step = cache.begin_step(&[(sequence, query_len)])?;
        let plan = attention.plan(&step)?;
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        cache.append(&mut encoder, &step, 0, &k, &v, None)?;
        attention.attend(&mut encoder, &plan, 0, &q, &out)?;
        gpu.queue().submit([encoder.finish()]);
        cache.commit(step)?;

        let out = gpu.read_blocking(&out)?;
        println!("{query_len} tokens, {} cached: out[0] starts {:?}", cache.seq_len(sequence)?, &out[..4]);
    }
    Ok(())
}

fn random(gpu: &Gpu, len: u32) -> wgpu::Buffer {
    let values: Vec<f32> = (0..len).map(|_| fastrand::f32() - 0.5).collect();
    gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(&values),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

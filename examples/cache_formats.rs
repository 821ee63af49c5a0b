//! Cache formats: the same 2048 tokens in each format, what they take and how far the result is from that of exact rows.
//! `formats.rs` measures times as well.
//!
//! `cargo run --release --example cache_formats`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use anyhow::{Result, ensure};
use folio::reference::{Options, Problem, attention};
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{Attention, AttentionConfig, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, wgpu};

const NUM_Q_HEADS: usize = 8;
const NUM_KV_HEADS: usize = 2;
const HEAD_DIM: usize = 128;
const TOKENS: usize = 2048;

/// Formats of K and V, and the largest error over the largest output that is fine for these rows: a third more than on llvmpipe, and for F32, where
/// it is the rounding of the kernel, twice as much.
const PAIRS: [(KvFormat, KvFormat, f64); 6] = [
    (KvFormat::F32, KvFormat::F32, 1.7e-6),
    (KvFormat::F16, KvFormat::F16, 3.5e-4),
    (KvFormat::E4M3, KvFormat::E4M3, 0.042),
    (KvFormat::Int8, KvFormat::Int8, 0.0125),
    (KvFormat::Int4, KvFormat::Int4, 0.26),
    (KvFormat::Int4PerChannel, KvFormat::Int4, 0.14),
];

fn upload(gpu: &Gpu, values: &[f32]) -> wgpu::Buffer {
    gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(values),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let mut random = fastrand::Rng::with_seed(3);
    let mut rows = |tokens: usize, heads: usize| -> Vec<f32> {
        (0..tokens * heads * HEAD_DIM).map(|_| (0..4).map(|_| random.f32() - 0.5).sum()).collect()
    };
    let (mut k, v, q) = (rows(TOKENS, NUM_KV_HEADS), rows(TOKENS, NUM_KV_HEADS), rows(1, NUM_Q_HEADS));
    // A channel of real models' keys is often large in every token.
    k.iter_mut().skip(5).step_by(HEAD_DIM).for_each(|x| *x += 12.0);

    let (num_q_heads, num_kv_heads, head_dim) = (NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM);
    let options = Options::default();
    let problem = Problem { num_q_heads, num_kv_heads, head_dim, value_dim: head_dim, q: &q, k: &k, v: &v, options };
    let exact = attention(&problem)?.out;
    let largest = exact.iter().fold(0.0_f64, |max, x| max.max(x.abs()));

    println!("{TOKENS} tokens, {NUM_KV_HEADS} KV heads of {HEAD_DIM}\n");
    println!("K, V                        KiB   of F32   largest error");
    for (k_format, v_format, most) in PAIRS {
        let config = KvCacheConfig::new(1, NUM_KV_HEADS as u32, HEAD_DIM as u32);
        let config = config.with_blocks(TOKENS as u32 / 16, 16).with_formats(k_format, v_format);
        let cache = KvCache::new_blocking(&gpu, config)?;
        if k_format.has_channel_scales() {
            cache.calibrate_keys(0, &k[..256 * NUM_KV_HEADS * HEAD_DIM])?;
        }
        let attention = Attention::new_blocking(&cache, AttentionConfig::new(NUM_Q_HEADS as u32))?;
        let sequence = cache.create_sequence();
        let out = upload(&gpu, &q);
        // All but the last token, then that one, which attends.
        let row = NUM_KV_HEADS * HEAD_DIM;
        for (from, to) in [(0, TOKENS - 1), (TOKENS - 1, TOKENS)] {
            let step = cache.begin_step(&[(sequence, (to - from) as u32)])?;
            let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let [k, v] = [&k, &v].map(|rows| upload(&gpu, &rows[from * row..to * row]));
            cache.append(&mut encoder, &step, 0, &k, &v, None)?;
            if to == TOKENS {
                let plan = attention.plan(&step)?;
                attention.attend(&mut encoder, &plan, 0, &upload(&gpu, &q), &out)?;
            }
            gpu.queue().submit([encoder.finish()]);
            cache.commit(step)?;
        }
        let out = gpu.read_blocking(&out)?;
        let error = out.iter().zip(&exact).map(|(got, want)| (f64::from(*got) - want).abs()).fold(0.0, f64::max);
        let (bytes, error) = (config.pool_bytes(), error / largest);
        let bar = "#".repeat((bytes * 32 / (TOKENS * row * 8) as u64) as usize);
        let name = format!("{k_format}, {v_format}");
        println!("{name:22} {:8} {:8.2}   {error:.1e}   {bar}", bytes / 1024, bytes as f64 / (TOKENS * row * 8) as f64);
        ensure!(error <= most, "{name}: {error} is more than {most}");
    }
    println!("\nerrors are parts of the largest output; F32's is the rounding of the kernel itself");
    Ok(())
}

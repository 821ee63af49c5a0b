//! A long context in a small cache: each token sees the newest 256 and the first 4, and blocks that nobody can see any more return to the pool.
//! 32 768 tokens go through a pool of 40 blocks of 16.
//!
//! `cargo run --release --example window`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use anyhow::{Result, ensure};
use folio::reference::{ErrorModel, Options, Problem, attention_with_bound, compare};
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{Attention, AttentionConfig, BlockId, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, wgpu};

const HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const ROW: usize = HEADS * HEAD_DIM;
const TOKENS: u32 = 32_768;
const CHUNK: u32 = 256;
const WINDOW: u32 = 256;
const SINKS: u32 = 4;

fn upload(gpu: &Gpu, values: &[f32]) -> wgpu::Buffer {
    gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(values),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let config = KvCacheConfig::new(1, HEADS as u32, HEAD_DIM as u32)
        .with_blocks(40, 16)
        .with_formats(KvFormat::F16, KvFormat::F16)
        .with_window(WINDOW)
        .with_sink_tokens(SINKS);
    let cache = KvCache::new_blocking(&gpu, config)?;
    let mut options = AttentionConfig::new(HEADS as u32);
    (options.window, options.sink_tokens) = (Some(WINDOW), SINKS);
    let attention = Attention::new_blocking(&cache, options)?;
    let sequence = cache.create_sequence();

    let mut random = fastrand::Rng::with_seed(1);
    let mut rows = || -> Vec<f32> { (0..CHUNK as usize * ROW).map(|_| random.f32() - 0.5).collect() };
    // The first and the newest keys and values, as f64 needs them.
    let (mut first, mut newest) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    println!(
        "tokens read   in the cache   blocks used   block table: a character for 32 blocks, # where there are some"
    );
    for chunk in 0..TOKENS / CHUNK {
        let [q, k, v] = [rows(), rows(), rows()];
        let out = upload(&gpu, &q);
        let step = cache.begin_step(&[(sequence, CHUNK)])?;
        let plan = attention.plan(&step)?;
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        cache.append(&mut encoder, &step, 0, &upload(&gpu, &k), &upload(&gpu, &v), None)?;
        attention.attend(&mut encoder, &plan, 0, &upload(&gpu, &q), &out)?;
        gpu.queue().submit([encoder.finish()]);
        cache.commit(step)?;

        let len = cache.seq_len(sequence)?;
        if chunk % 16 == 15 {
            let table = cache.block_table(sequence)?;
            let held = table.iter().filter(|block| **block != BlockId::NULL).count();
            let mark = |part: &[BlockId]| if part.iter().any(|block| *block != BlockId::NULL) { '#' } else { '.' };
            let picture: String = table.chunks(32).map(mark).collect();
            println!("{len:11} {:14} {:13}   {picture}", held * 16, cache.usage().used);
            ensure!(
                cache.usage().used <= 40 && held as u32 == cache.usage().used,
                "blocks that left the window are free"
            );

            // What the chunk's queries see: the first tokens, and those from a window before the chunk on. The mask says which of them each query sees.
            let [keys, all_values] = [(&first[0], &newest[0], &k), (&first[1], &newest[1], &v)]
                .map(|(first, before, own): (&Vec<f32>, &Vec<f32>, &Vec<f32>)| [&first[..], before, own].concat());
            let num = keys.len() / ROW;
            let words = num.div_ceil(32);
            let mut mask = vec![0_u32; CHUNK as usize * words];
            for query in 0..CHUNK as usize {
                let own = num - CHUNK as usize + query;
                for key in (0..SINKS as usize).chain(own + 1 - WINDOW as usize..=own) {
                    mask[query * words + key / 32] |= 1 << (key % 32);
                }
            }
            let mut options = Options::default();
            (options.causal, options.mask) = (false, Some(mask));
            let (q, k, v) = (&q[..], &keys[..], &all_values[..]);
            let problem = Problem {
                num_q_heads: HEADS,
                num_kv_heads: HEADS,
                head_dim: HEAD_DIM,
                value_dim: HEAD_DIM,
                q,
                k,
                v,
                options,
            };
            let expected = attention_with_bound(&problem, &ErrorModel::new(KvFormat::F16, KvFormat::F16))?;
            let found = compare::out(&expected, &gpu.read_blocking(&out)?);
            ensure!(found.is_within(), "the chunk that ends at {len}: {found}");
        }
        if chunk == 0 {
            first = [k[..SINKS as usize * ROW].to_vec(), v[..SINKS as usize * ROW].to_vec()];
        }
        newest = [k, v];
    }
    let whole = KvCacheConfig::new(1, HEADS as u32, HEAD_DIM as u32).with_blocks(TOKENS / 16, 16);
    let whole = whole.with_formats(KvFormat::F16, KvFormat::F16).pool_bytes();
    println!("\n{} KiB of cache; all tokens would take {} KiB", cache.config().pool_bytes() / 1024, whole / 1024);
    println!("outputs are those of an f64 computation over the same window, within the bound of F16");
    Ok(())
}

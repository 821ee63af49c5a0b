//! Paged against contiguous: the same memory, once as a row of the longest length per sequence and once as a pool of blocks. Sequences come until
//! the cache is full; those that both hold are compared with an f64 computation on the host.
//!
//! `cargo run --release --example paged`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use anyhow::{Result, ensure};
use folio::reference::{ErrorModel, Options, Problem, attention_with_bound, compare};
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{
    Attention, AttentionConfig, ErrorKind, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, SequenceId, wgpu,
};

const HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const MAX_LEN: u32 = 1024;
const ROWS: u32 = 4;
const BLOCK_SIZE: u32 = 16;

/// Lengths of texts as they come: few are as long as they may be.
const LENS: [u32; 24] =
    [340, 75, 610, 120, 33, 980, 64, 210, 150, 18, 402, 95, 260, 51, 133, 88, 305, 42, 170, 61, 240, 29, 77, 190];

/// A row of a sequence's K or V, of a query.
fn values(seed: u32, tokens: u32) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed.into());
    (0..tokens as usize * HEADS * HEAD_DIM).map(|_| random.f32() - 0.5).collect()
}

fn upload(gpu: &Gpu, values: &[f32]) -> wgpu::Buffer {
    gpu.device().create_buffer_init(&BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(values),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

/// Caches texts until there is no room for the next, and returns the output of each one's last token.
fn fill(gpu: &Gpu, name: &str, config: KvCacheConfig) -> Result<Vec<Vec<f32>>> {
    let cache = KvCache::new_blocking(gpu, config.with_formats(KvFormat::F32, KvFormat::F32))?;
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(HEADS as u32))?;
    let mut held: Vec<(SequenceId, u32)> = Vec::new();
    let mut outs = Vec::new();
    for (i, len) in (0..).zip(LENS) {
        let sequence = cache.create_sequence();
        let step = match cache.begin_step(&[(sequence, len)]) {
            Ok(step) => step,
            Err(error) if error.kind() == ErrorKind::Retry => break,
            Err(error) => return Err(error.into()),
        };
        let [q, k, v] = [0, 1, 2].map(|side| upload(gpu, &values(3 * i + side, len)));
        let out = upload(gpu, &values(0, len));
        let plan = attention.plan(&step)?;
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        cache.append(&mut encoder, &step, 0, &k, &v, None)?;
        attention.attend(&mut encoder, &plan, 0, &q, &out)?;
        gpu.queue().submit([encoder.finish()]);
        cache.commit(step)?;
        outs.push(gpu.read_blocking(&out)?);
        held.push((sequence, len));
    }
    let bytes = cache.config().pool_bytes();
    let tokens: u32 = held.iter().map(|(_, len)| len).sum();
    println!("{name}: {} KiB, {} texts with {tokens} tokens", bytes / 1024, held.len());
    // A character for 32 tokens of memory: a letter where a text lies, `.` where nothing does, `_` where a row is kept for one that is shorter.
    let size = cache.config().block_size;
    let mut line = String::new();
    for (i, (_, len)) in held.iter().enumerate() {
        let taken = if size == MAX_LEN { MAX_LEN } else { len.next_multiple_of(size) };
        let letter = char::from(b'a' + i as u8);
        line.extend((0..taken / 32).map(|at| if at * 32 < *len { letter } else { '_' }));
    }
    let all = (ROWS * MAX_LEN / 32) as usize;
    line.extend((line.len()..all).map(|_| '.'));
    let lines = line.as_bytes().chunks(64).map(String::from_utf8_lossy);
    println!("  {}\n", lines.collect::<Vec<_>>().join("\n  "));
    Ok(outs)
}

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let (heads, head_dim) = (HEADS as u32, HEAD_DIM as u32);
    let rows = KvCacheConfig::contiguous(1, heads, head_dim, ROWS, MAX_LEN);
    let contiguous = fill(&gpu, "contiguous", rows)?;
    let blocks = KvCacheConfig::new(1, heads, head_dim).with_blocks(ROWS * MAX_LEN / BLOCK_SIZE, BLOCK_SIZE);
    let paged = fill(&gpu, "paged", blocks)?;
    ensure!(
        contiguous.len() == ROWS as usize && paged.len() > 2 * contiguous.len(),
        "blocks hold more texts than rows"
    );

    let mut worst = 0.0_f64;
    for (i, (a, b)) in (0..).zip(contiguous.iter().zip(&paged)) {
        let [q, k, v] = [0, 1, 2].map(|side| values(3 * i + side, LENS[i as usize]));
        let (q, k, v, options) = (&q[..], &k[..], &v[..], Options::default());
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
        let expected = attention_with_bound(&problem, &ErrorModel::new(KvFormat::F32, KvFormat::F32))?;
        for out in [a, b] {
            let found = compare::out(&expected, out);
            ensure!(found.is_within(), "text {i}: {found}");
            worst = worst.max(found.worst.map_or(0.0, |worst| worst.error()));
        }
    }
    println!("a letter: 32 tokens of a text; _: kept for a text that is shorter; .: free\n");
    println!("outputs of the {} texts that both hold are right: off by at most {worst:.1e}", contiguous.len());
    Ok(())
}

//! One call of attention, several times: what `scripts/count_instructions.py` counts.
//!
//! `one_call SHAPE FORMAT CALLS`, such as `one_call D1 F16 4`. Shapes are those of the attention bench with fewer keys.
#![allow(clippy::print_stderr, reason = "a program")]

use std::process::ExitCode;

use folio::wgpu::{self, util::DeviceExt};
use folio::{Attention, AttentionConfig, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormats, Step};

/// A batch of equal sequences.
struct Shape {
    id: &'static str,
    batch: u32,
    query_len: u32,
    seq_len: u32,
    num_q_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
}

const SHAPES: [Shape; 4] = [
    Shape { id: "D1", batch: 2, query_len: 1, seq_len: 512, num_q_heads: 32, num_kv_heads: 8, head_dim: 128 },
    Shape { id: "D2", batch: 1, query_len: 1, seq_len: 2048, num_q_heads: 32, num_kv_heads: 8, head_dim: 128 },
    Shape { id: "P1", batch: 1, query_len: 256, seq_len: 256, num_q_heads: 16, num_kv_heads: 16, head_dim: 64 },
    Shape { id: "P2", batch: 1, query_len: 128, seq_len: 512, num_q_heads: 32, num_kv_heads: 8, head_dim: 128 },
];

fn upload(gpu: &Gpu, elements: u32) -> wgpu::Buffer {
    let mut rng = fastrand::Rng::with_seed(1);
    let values: Vec<f32> = (0..elements).map(|_| rng.f32() - 0.5).collect();
    gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(&values),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

fn append(cache: &KvCache, batch: &[(folio::SequenceId, u32)]) -> folio::Result<Step> {
    let (gpu, config) = (cache.gpu(), cache.config());
    let step = cache.begin_step(batch)?;
    let elements = step.num_tokens() * config.num_kv_heads * config.head_dim;
    let (k, v) = (upload(gpu, elements), upload(gpu, elements));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    cache.append(&mut encoder, &step, 0, &k, &v, None)?;
    gpu.queue().submit([encoder.finish()]);
    Ok(step)
}

fn run(shape: &Shape, formats: KvFormats, calls: u32) -> folio::Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let config = KvCacheConfig::new(1, shape.num_kv_heads, shape.head_dim)
        .with_blocks(shape.batch * shape.seq_len.div_ceil(16), 16)
        .with_formats(formats.k, formats.v);
    let cache = KvCache::new_blocking(&gpu, config)?;
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(shape.num_q_heads))?;
    let sequences: Vec<_> = (0..shape.batch).map(|_| cache.create_sequence()).collect();
    let tokens = |tokens| sequences.iter().map(|&sequence| (sequence, tokens)).collect::<Vec<_>>();
    if shape.seq_len > shape.query_len {
        cache.commit(append(&cache, &tokens(shape.seq_len - shape.query_len))?)?;
    }
    let step = append(&cache, &tokens(shape.query_len))?;
    let plan = attention.plan(&step)?;
    let elements = step.num_tokens() * shape.num_q_heads * shape.head_dim;
    let (q, out) = (upload(&gpu, elements), upload(&gpu, elements));
    for _ in 0..calls {
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        attention.attend(&mut encoder, &plan, 0, &q, &out)?;
        gpu.queue().submit([encoder.finish()]);
    }
    // Whatever comes back has waited for all that came before.
    gpu.read_blocking(&out).map(drop)
}

fn main() -> ExitCode {
    // (`cargo bench` adds an argument of its own.)
    let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let parsed = match &arguments[..] {
        [id, format, calls] => {
            let shape = SHAPES.iter().find(|shape| shape.id == id);
            shape.zip(format.parse().ok()).zip(calls.parse().ok())
        }
        _ => None,
    };
    let Some(((shape, formats), calls)) = parsed else {
        eprintln!("usage: one_call D1|D2|P1|P2 FORMAT CALLS");
        // Without arguments there is nothing to measure: `cargo bench` runs every bench.
        return if arguments.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    };
    match run(shape, formats, calls) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

//! folio inside a host program: the host owns the instance, the device, the encoder and every buffer. Its own shader makes q, k and v out of hidden
//! states, folio appends and attends, and the host's shader adds the result to the hidden states: one pass, one submit.
//!
//! `cargo run --release --example embed`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::error::Error;

use folio::reference::{self, Problem};
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{Attention, AttentionConfig, Gpu, KvCache, KvCacheConfig, KvFormat, wgpu};

const TOKENS: u32 = 48;
const NUM_HEADS: u32 = 4;
const HEAD_DIM: u32 = 32;
const LEN: u32 = TOKENS * NUM_HEADS * HEAD_DIM;

/// The host's shaders. `before`: three cheap "projections". `after`: the residual connection.
const SHADERS: &str = "
@group(0) @binding(0) var<storage, read_write> hidden: array<f32>;
@group(0) @binding(1) var<storage, read_write> q: array<f32>;
@group(0) @binding(2) var<storage, read_write> k: array<f32>;
@group(0) @binding(3) var<storage, read_write> v: array<f32>;
@group(0) @binding(4) var<storage, read_write> attended: array<f32>;

@compute @workgroup_size(64) fn before(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= arrayLength(&hidden)) { return; }
    let x = hidden[id.x];
    q[id.x] = 2.0 * x;
    k[id.x] = 1.0 - x;
    v[id.x] = x * x;
}

@compute @workgroup_size(64) fn after(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= arrayLength(&hidden)) { return; }
    hidden[id.x] += attended[id.x];
}
";

fn main() -> Result<(), Box<dyn Error>> {
    // The host opens its device as it likes; WebGPU's default limits and no features are enough for folio.
    let instance = wgpu::Instance::default();
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
    let buffer = |values: &[f32]| {
        device.create_buffer_init(&BufferInitDescriptor {
            label: None,
            contents: bytemuck::cast_slice(values),
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
        })
    };
    let states: Vec<f32> = (0..LEN).map(|i| (i as f32 * 0.37).sin()).collect();
    let hidden = buffer(&states);
    let [q, k, v, attended] = std::array::from_fn(|_| buffer(&vec![0.0; LEN as usize]));
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("host shaders"),
        source: wgpu::ShaderSource::Wgsl(SHADERS.into()),
    });
    let pipeline = |entry_point, buffers: &[(u32, &wgpu::Buffer)]| {
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(entry_point),
            layout: None,
            module: &module,
            entry_point: Some(entry_point),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let mut entries = Vec::new();
        for (binding, buffer) in buffers {
            entries.push(wgpu::BindGroupEntry { binding: *binding, resource: buffer.as_entire_binding() });
        }
        let (label, layout, entries) = (None, &pipeline.get_bind_group_layout(0), &entries[..]);
        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor { label, layout, entries });
        (pipeline, bind_group)
    };
    let before = pipeline("before", &[(0, &hidden), (1, &q), (2, &k), (3, &v)]);
    let after = pipeline("after", &[(0, &hidden), (4, &attended)]);

    let gpu = Gpu::from_parts(device.clone(), queue.clone())?;
    let config =
        KvCacheConfig::new(1, NUM_HEADS, HEAD_DIM).with_blocks(16, 16).with_formats(KvFormat::F32, KvFormat::F32);
    let cache = KvCache::new_blocking(&gpu, config)?;
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(NUM_HEADS))?;
    let sequence = cache.create_sequence();
    let step = cache.begin_step(&[(sequence, TOKENS)])?;
    let plan = attention.plan(&step)?;

    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("host frame") });
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        let dispatch = |pass: &mut wgpu::ComputePass<'_>, (pipeline, bind_group): &(_, wgpu::BindGroup)| {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, bind_group, &[]);
            pass.dispatch_workgroups(LEN.div_ceil(64), 1, 1);
        };
        dispatch(&mut pass, &before);
        cache.append(&mut pass, &step, 0, &k, &v, None)?;
        attention.attend(&mut pass, &plan, 0, &q, &attended)?;
        dispatch(&mut pass, &after);
    }
    queue.submit([encoder.finish()]);
    cache.commit(step)?;

    let error = worst_error(&states, &gpu.read_blocking(&hidden)?)?;
    println!("{TOKENS} tokens through the host's shader, folio and the host's shader in one submit");
    println!("worst error against the f64 oracle: {error:.2e}");
    if error < 1e-5 { Ok(()) } else { Err("the result is wrong".into()) }
}

/// The same computation on the host, in f64 where it matters.
fn worst_error(hidden: &[f32], got: &[f32]) -> Result<f64, Box<dyn Error>> {
    let side = |of: fn(f32) -> f32| hidden.iter().map(|x| of(*x)).collect::<Vec<_>>();
    let (q, k, v) = (side(|x| 2.0 * x), side(|x| 1.0 - x), side(|x| x * x));
    let (q, k, v, options) = (&q[..], &k[..], &v[..], reference::Options::default());
    let (heads, head_dim) = (NUM_HEADS as usize, HEAD_DIM as usize);
    let problem = Problem { num_q_heads: heads, num_kv_heads: heads, head_dim, value_dim: head_dim, q, k, v, options };
    let out = reference::attention(&problem)?.out;
    let want = hidden.iter().zip(&out).map(|(&x, out)| f64::from(x) + out);
    Ok(got.iter().zip(want).map(|(&got, want)| (f64::from(got) - want).abs()).fold(0.0, f64::max))
}

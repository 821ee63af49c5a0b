//! A steady decode loop makes no GPU buffer and no pipeline.

use crate::common::with;
use folio::wgpu::{self, util::DeviceExt};
use folio::{
    Attention, AttentionConfig, AttentionPlan, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, Profile, SequenceId,
    Step,
};

use crate::adapter;

const NUM_LAYERS: u32 = 2;
const NUM_Q_HEADS: u32 = 4;
const NUM_KV_HEADS: u32 = 2;
const HEAD_DIM: u32 = 32;

/// What is alive on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alive {
    buffers: isize,
    buffer_memory: isize,
    bind_groups: isize,
    bind_group_layouts: isize,
    pipeline_layouts: isize,
    pipelines: isize,
    shader_modules: isize,
    query_sets: isize,
    textures: isize,
}

impl Alive {
    fn count(gpu: &Gpu) -> Self {
        let hal = gpu.device().get_internal_counters().hal;
        Self {
            buffers: hal.buffers.read(),
            buffer_memory: hal.buffer_memory.read(),
            bind_groups: hal.bind_groups.read(),
            bind_group_layouts: hal.bind_group_layouts.read(),
            pipeline_layouts: hal.pipeline_layouts.read(),
            pipelines: hal.compute_pipelines.read(),
            shader_modules: hal.shader_modules.read(),
            query_sets: hal.query_sets.read(),
            textures: hal.textures.read(),
        }
    }

    /// Once the GPU has nothing to do and wgpu has let go of what nobody holds.
    fn count_idle(gpu: &Gpu) -> Self {
        gpu.queue().submit([]);
        gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device is there");
        Self::count(gpu)
    }
}

/// A device of this test's own: others share theirs, and run beside it.
fn open(profile: Profile) -> Option<Gpu> {
    adapter::open(adapter::DEFAULT)?;
    let options = with(GpuOptions::default(), |c| {
        c.adapter_name = std::env::var("FOLIO_ADAPTER").ok();
        c.profile = Some(profile);
    });
    Some(Gpu::open_blocking(options).expect("the adapter opened before"))
}

struct Decoder {
    gpu: Gpu,
    cache: KvCache,
    attention: Attention,
    sequences: Vec<SequenceId>,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    q: wgpu::Buffer,
    out: wgpu::Buffer,
}

impl Decoder {
    /// Sequences that reach the ends of their blocks at different steps; the last one's keys are split on GPUs.
    fn new(gpu: &Gpu) -> Self {
        let lens = [3, 15, 40, 600];
        let config = KvCacheConfig::new(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM)
            .with_blocks(64, 16)
            .with_formats(KvFormat::F16, KvFormat::F32);
        let cache = KvCache::new_blocking(gpu, config).expect("cache");
        let attention = Attention::new_blocking(&cache, AttentionConfig::new(NUM_Q_HEADS)).expect("attention");
        let buffer = |tokens: u32, heads: u32| {
            gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: None,
                contents: bytemuck::cast_slice(&vec![0.5_f32; (tokens * heads * HEAD_DIM) as usize]),
                usage: wgpu::BufferUsages::STORAGE,
            })
        };
        let sequences: Vec<_> = lens.iter().map(|_| cache.create_sequence()).collect();
        let tokens = lens.len() as u32;
        let decoder = Self {
            gpu: gpu.clone(),
            k: buffer(tokens, NUM_KV_HEADS),
            v: buffer(tokens, NUM_KV_HEADS),
            q: buffer(tokens, NUM_Q_HEADS),
            out: buffer(tokens, NUM_Q_HEADS),
            cache,
            attention,
            sequences,
        };
        let prompt = lens.iter().sum();
        let [k, v] = [(); 2].map(|()| buffer(prompt, NUM_KV_HEADS));
        let [q, out] = [(); 2].map(|()| buffer(prompt, NUM_Q_HEADS));
        let batch: Vec<_> = decoder.sequences.iter().copied().zip(lens).collect();
        decoder.step(&batch, [&k, &v, &q, &out]);
        decoder
    }

    /// One step; returns what was alive before it, and after it was reserved, planned and recorded.
    ///
    /// The counters know only what is alive, so what a step makes and drops again would be missed afterwards. Before the submit it is seen:
    /// the recorded commands hold it.
    fn step(&self, batch: &[(SequenceId, u32)], [k, v, q, out]: [&wgpu::Buffer; 4]) -> [Alive; 2] {
        let gpu = &self.gpu;
        let before = Alive::count_idle(gpu);
        let step = self.cache.begin_step(batch).expect("step");
        let plan = self.attention.plan(&step).expect("plan");
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for layer in 0..NUM_LAYERS {
            self.cache.append(&mut encoder, &step, layer, k, v, None).expect("append");
            self.attention.attend(&mut encoder, &plan, layer, q, out).expect("attend");
        }
        let after = Alive::count(gpu);
        gpu.queue().submit([encoder.finish()]);
        self.cache.commit(step).expect("commit");
        [before, after]
    }

    /// A step of all sequences, recorded.
    fn record(&self) -> (Step, AttentionPlan, wgpu::CommandBuffer) {
        let batch: Vec<_> = self.sequences.iter().map(|&sequence| (sequence, 1)).collect();
        let step = self.cache.begin_step(&batch).expect("step");
        let plan = self.attention.plan(&step).expect("plan");
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for layer in 0..NUM_LAYERS {
            self.cache.append(&mut encoder, &step, layer, &self.k, &self.v, None).expect("append");
            self.attention.attend(&mut encoder, &plan, layer, &self.q, &self.out).expect("attend");
        }
        (step, plan, encoder.finish())
    }

    fn decode(&self) -> [Alive; 2] {
        let batch: Vec<_> = self.sequences.iter().map(|&sequence| (sequence, 1)).collect();
        self.step(&batch, [&self.k, &self.v, &self.q, &self.out])
    }
}

/// Buffers that wgpu itself makes for one `Queue::write_buffer` and frees after the next submit. folio has no part in them.
fn staging_buffers(gpu: &Gpu) -> isize {
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 256,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let before = Alive::count_idle(gpu);
    gpu.queue().write_buffer(&buffer, 0, &[0; 256]);
    let after = Alive::count(gpu);
    Alive::count_idle(gpu);
    after.buffers - before.buffers
}

fn check(profile: Profile) {
    let Some(gpu) = open(profile) else { return };
    let decoder = Decoder::new(&gpu);
    // A step writes twice: what append needs to know, and the plan.
    let staging = 2 * staging_buffers(&gpu);
    for _ in 0..3 {
        decoder.decode();
    }

    let before = Alive::count_idle(&gpu);
    assert!(before.buffers > 0 && before.pipelines > 0, "wgpu counts nothing: {before:?}");
    for step in 0..40 {
        let [before, after] = decoder.decode();
        // Bind groups come and go.
        let Alive { buffer_memory, bind_groups, .. } = after;
        let expected = Alive { buffers: before.buffers + staging, buffer_memory, bind_groups, ..before };
        assert_eq!(after, expected, "step {step}; {gpu:?}");
    }
    assert_eq!(Alive::count_idle(&gpu), before, "{gpu:?}");

    // Commands that may still be submitted keep their uploads, though their step is gone: the next step needs two more.
    let (step, plan, commands) = decoder.record();
    drop((step, plan));
    let (step, plan, other_commands) = decoder.record();
    assert_eq!(Alive::count_idle(&gpu).buffers - before.buffers, 2, "{gpu:?}");
    // Once they can't be submitted any more, others use those.
    drop((step, plan, commands, other_commands));
    let held = decoder.record();
    assert_eq!(Alive::count_idle(&gpu).buffers - before.buffers, 2, "{gpu:?}");
    drop(held);
}

/// A host that is a step ahead: it begins, plans and records the next step before the one before has run.
fn check_ahead(profile: Profile) {
    let Some(gpu) = open(profile) else { return };
    let decoder = Decoder::new(&gpu);
    let mut ahead = decoder.record();
    let mut counts = Vec::new();
    for _ in 0..40 {
        let (step, plan, commands) = ahead;
        gpu.queue().submit([commands]);
        decoder.cache.commit(step).expect("commit");
        drop(plan);
        ahead = decoder.record();
        gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device is there");
        counts.push((Alive::count(&gpu).buffers, gpu.num_compiled()));
    }
    let steady = &counts[4..];
    assert!(steady.iter().all(|count| *count == steady[0]), "{counts:?}; {gpu:?}");
}

#[test]
fn steady_decode_allocates_nothing_with_cpu_kernels() {
    check(Profile::Cpu);
}

#[test]
fn steady_decode_allocates_nothing_with_gpu_kernels() {
    check(Profile::Gpu);
}

#[test]
fn a_step_ahead_allocates_nothing_with_cpu_kernels() {
    check_ahead(Profile::Cpu);
}

#[test]
fn a_step_ahead_allocates_nothing_with_gpu_kernels() {
    check_ahead(Profile::Gpu);
}

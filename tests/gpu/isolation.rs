//! What one sequence holds stays in it; what folio does stays in the host's pass and on the host's device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use folio::KvFormat::{F16, F32};
use folio::{Attention, Gpu, KvCache, Profile, ShaderChecks, wgpu};

use crate::adapter::{self, CPU, DEFAULT, GPU};
use crate::case::{Case, Rows, upload};

/// A NaN, an infinity of either sign or a huge number in place of every value.
fn poison(values: &mut [f32]) {
    for (i, value) in values.iter_mut().enumerate() {
        *value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX][i % 4];
    }
}

#[test]
fn nan_and_infinity_stay_in_their_sequence() {
    // Long ones are split and merged; which are poisoned stands beside them.
    const LENS: [(u32, u32, bool); 8] = [
        (3000, 1, false),
        (3000, 1, true),
        (20, 7, false),
        (9, 30, true),
        (0, 1, false),
        (0, 33, true),
        (1100, 40, false),
        (0, 17, false),
    ];
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&LENS.map(|(context_len, query_len, _)| (context_len, query_len)), 4, 2, 32)
            .formats(F32, F16)
            .named(format!("{how:?}"));
        let clean = case.rows();
        let mut poisoned = case.rows();
        for (rows, (.., is_poisoned)) in poisoned.iter_mut().zip(LENS) {
            if is_poisoned {
                poison(&mut rows.q);
                poison(&mut rows.k);
                poison(&mut rows.v);
            }
        }
        let (cache, sequences) = case.fill(&gpu, &clean);
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        let (want, _) = case.attend(&cache, &attention, &sequences, &clean);
        case.compare(&gpu, &clean, &want, None);
        let (cache, sequences) = case.fill(&gpu, &poisoned);
        let (got, _) = case.attend(&cache, &attention, &sequences, &poisoned);
        let mut at = 0;
        for (i, (rows, (.., is_poisoned))) in clean.iter().zip(LENS).enumerate() {
            let range = at..at + rows.q.len();
            at = range.end;
            let same = got[range.clone()].iter().zip(&want[range.clone()]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(is_poisoned || same, "sequence {i} changed: {how:?}");
            assert!(!is_poisoned || got[range].iter().any(|x| !x.is_finite()), "sequence {i} isn't poisoned: {how:?}");
        }
    }
}

/// Raised by an error that nobody caught.
fn watch(gpu: &Gpu) -> Arc<AtomicBool> {
    let raised = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&raised);
    gpu.device().on_uncaptured_error(Arc::new(move |error| {
        eprintln!("uncaptured: {error}");
        flag.store(true, Ordering::Release);
    }));
    raised
}

/// Decode and prefill on a device of default limits and no features that `take` makes folio's.
fn check_default_device(take: fn(wgpu::Device, wgpu::Queue) -> folio::Result<Gpu>) {
    let Some(adapter) = adapter::raw() else { return };
    let request = adapter.request_device(&wgpu::DeviceDescriptor::default());
    let (device, queue) = futures::executor::block_on(request).expect("device");
    assert_eq!((device.features(), device.limits()), (wgpu::Features::empty(), wgpu::Limits::default()));
    let gpu = take(device, queue).expect("a good device");
    let raised = watch(&gpu);
    let case = Case::new(&[(33, 1), (0, 1), (5, 20)], 4, 2, 32).formats(F16, F32);
    case.config(|config| config.lse = true).check(&gpu);
    assert!(!raised.load(Ordering::Acquire), "an error that nobody caught");
}

#[test]
fn default_limits_and_no_features_are_enough() {
    check_default_device(Gpu::from_parts);
}

#[test]
fn default_limits_and_no_features_are_enough_for_the_other_family() {
    check_default_device(|device, queue| {
        let profile = match Gpu::from_parts(device.clone(), queue.clone())?.profile() {
            Profile::Cpu => Profile::Gpu,
            Profile::Gpu => Profile::Cpu,
        };
        Gpu::from_parts_with(device, queue, profile, ShaderChecks::Full)
    });
}

/// The host's own dispatches: each doubles or negates what `values` holds.
struct HostShader {
    double: wgpu::ComputePipeline,
    negate: wgpu::ComputePipeline,
}

impl HostShader {
    fn new(gpu: &Gpu) -> Self {
        let source = "
            @group(0) @binding(0) var<storage, read_write> values: array<f32>;
            @compute @workgroup_size(64) fn double(@builtin(global_invocation_id) id: vec3<u32>) {
                if (id.x < arrayLength(&values)) { values[id.x] *= 2.0; }
            }
            @compute @workgroup_size(64) fn negate(@builtin(global_invocation_id) id: vec3<u32>) {
                if (id.x < arrayLength(&values)) { values[id.x] = -values[id.x]; }
            }";
        let module = gpu.device().create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("host"),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let pipeline = |entry_point| {
            gpu.device().create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(entry_point),
                layout: None,
                module: &module,
                entry_point: Some(entry_point),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            })
        };
        Self { double: pipeline("double"), negate: pipeline("negate") }
    }

    fn record(gpu: &Gpu, pass: &mut wgpu::ComputePass<'_>, pipeline: &wgpu::ComputePipeline, values: &wgpu::Buffer) {
        let bind_group = gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: values.as_entire_binding() }],
        });
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &bind_group, &[]);
        pass.dispatch_workgroups((values.size() / 4).div_ceil(64) as u32, 1, 1);
    }
}

/// The new tokens of a case, as `q`, `k`, `v` buffers and one for the result.
fn buffers(gpu: &Gpu, rows: &[Rows], k_factor: f32) -> [wgpu::Buffer; 4] {
    let all = |side: fn(&Rows) -> &Vec<f32>| rows.iter().flat_map(|r| side(r).clone()).collect::<Vec<_>>();
    let (q, k, v) = (all(|r| &r.q), all(|r| &r.k), all(|r| &r.v));
    let k: Vec<_> = k.iter().map(|x| x * k_factor).collect();
    [upload(gpu, &q), upload(gpu, &k), upload(gpu, &v), upload(gpu, &vec![f32::NAN; q.len()])]
}

#[test]
fn a_hosts_pass_goes_on_before_and_after() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let host = HostShader::new(&gpu);
    let case = Case::new(&[(0, 9), (0, 1), (0, 21)], 4, 2, 32);
    let rows = case.rows();
    let lens = case.lens.iter().map(|l| l.1);
    let (cache, _) = case.fill(&gpu, &rows);
    let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
    let step = |cache: &KvCache| {
        let batch: Vec<_> = lens.clone().map(|len| (cache.create_sequence(), len)).collect();
        cache.begin_step(&batch).expect("step")
    };

    // The host makes k, folio appends and attends, the host changes the result: one pass.
    let [q, k, v, out] = buffers(&gpu, &rows, 0.5);
    let first = step(&cache);
    let plan = attention.plan(&first).expect("plan");
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        HostShader::record(&gpu, &mut pass, &host.double, &k);
        cache.append(&mut pass, &first, 0, &k, &v, None).expect("append");
        attention.attend(&mut pass, &plan, 0, &q, &out).expect("attend");
        HostShader::record(&gpu, &mut pass, &host.negate, &out);
    }
    gpu.queue().submit([encoder.finish()]);
    let in_pass: Vec<f32> = gpu.read_blocking(&out).expect("read").iter().map(|x| -x).collect();
    case.compare(&gpu, &rows, &in_pass, None);
    drop(first);

    // The same into an encoder, in passes of folio's own.
    let [q, k, v, out] = buffers(&gpu, &rows, 1.0);
    let second = step(&cache);
    let plan = attention.plan(&second).expect("plan");
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    cache.append(&mut encoder, &second, 0, &k, &v, None).expect("append");
    attention.attend(&mut encoder, &plan, 0, &q, &out).expect("attend");
    gpu.queue().submit([encoder.finish()]);
    assert_eq!(gpu.read_blocking(&out).expect("read"), in_pass);
}

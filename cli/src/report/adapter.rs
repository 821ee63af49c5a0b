//! What the adapter is, what folio uses of it, and what makes it slow.

use folio::measure::Timer;
use folio::{AdapterClass, Gpu, Profile, ShaderChecks, wgpu};

use super::data::{Adapter, ChosenKernel, Hint, Limit};

pub(super) fn describe(gpu: &Gpu, timer: &Timer, kernels: Vec<ChosenKernel>) -> Adapter {
    let info = gpu.adapter_info();
    let driver = format!("{} {}", info.driver, info.driver_info);
    let by_type = if gpu.adapter_class() == AdapterClass::Cpu {
        "the adapter runs shaders on CPU cores, by its type or its name"
    } else {
        "the adapter is no software adapter, by its type and its name"
    };
    Adapter {
        name: info.name.clone(),
        backend: format!("{:?}", info.backend),
        driver: driver.trim().to_owned(),
        device_type: format!("{:?}", info.device_type),
        profile: format!("{:?}", gpu.profile()),
        profile_reason: by_type.to_owned(),
        subgroup_size: gpu.subgroup_size().unwrap_or(0),
        full_checks: gpu.shader_checks() == ShaderChecks::Full,
        tuned: gpu.tuning().is_some(),
        clock: timer.clock().to_owned(),
        features: gpu.features().iter_names().map(|(name, _)| name.to_owned()).collect(),
        limits: limits(gpu),
        kernels,
        hints: hints(gpu, timer),
    }
}

/// The limits that shape what folio can do.
fn limits(gpu: &Gpu) -> Vec<Limit> {
    let (have, webgpu) = (gpu.limits(), folio::required_limits());
    macro_rules! limits {
        ($($name:ident),* $(,)?) => {
            vec![$(Limit { name: stringify!($name), value: have.$name.into(), webgpu: webgpu.$name.into() }),*]
        };
    }
    limits![
        max_storage_buffer_binding_size,
        max_buffer_size,
        max_storage_buffers_per_shader_stage,
        max_compute_workgroup_storage_size,
        max_compute_invocations_per_workgroup,
        max_compute_workgroups_per_dimension,
        min_storage_buffer_offset_alignment,
    ]
}

fn hints(gpu: &Gpu, timer: &Timer) -> Vec<Hint> {
    let mut hints = Vec::new();
    let mut say = |kind, text: String| hints.push(Hint { kind, text });
    if gpu.adapter_class() == AdapterClass::Cpu {
        let text = "This is a software adapter: shaders run on CPU cores. The figures compare folio with plain loops on the same cores, and say nothing about GPUs.";
        say("software-adapter", text.to_owned());
    }
    if gpu.shader_checks() == ShaderChecks::Full {
        let text = "wgpu's bounds checks and loop guards are in the shaders (--full-checks). On GPUs they nearly triple the size of the prefill kernel.";
        say("checks", text.to_owned());
    }
    if !gpu.has_subgroups() {
        say("subgroups", "The device has no subgroups: kernels share through workgroup memory.".to_owned());
    } else if gpu.profile() == Profile::Cpu && gpu.subgroup_size().is_none() {
        say("subgroups", "The size of subgroups varies: kernels for CPU cores do without them.".to_owned());
    }
    if gpu.profile() == Profile::Cpu && !gpu.features().contains(wgpu::Features::SHADER_INT64) {
        say("int64", "The device has no 64-bit integers, which make loads wider on CPU cores.".to_owned());
    }
    // WebGPU's default, which every device has.
    let binding = gpu.limits().max_storage_buffer_binding_size;
    if binding <= folio::required_limits().max_storage_buffer_binding_size {
        let text = format!(
            "Storage bindings hold {} MiB at most, as WebGPU promises: a larger side of a layer is cut into several buffers, among which kernels choose.",
            binding >> 20
        );
        say("bindings", text);
    }
    if gpu.adapter_info().backend == wgpu::Backend::Gl {
        say("gl", "The backend is GL, which wgpu supports least: prefer Vulkan, Metal or DX12.".to_owned());
    }
    if timer.clock() == "wall clock" {
        let text = "The adapter has no timestamps that can be believed: times are the host's, with a submit in each.";
        say("clock", text.to_owned());
    }
    if gpu.profile() == Profile::Gpu && gpu.matrix_size().is_none() {
        let text = "Matrix units are not in use: programs ask for them by GpuOptions::matrix_units, an experimental feature of wgpu's.";
        say("matrix-units", text.to_owned());
    }
    if gpu.tuning().is_none() {
        say("tuning", "No tuning was given (--tuning): kernels have default sizes.".to_owned());
    }
    if cfg!(debug_assertions) {
        say("build", "This program was built without optimisation: what the host does is slow.".to_owned());
    }
    hints
}

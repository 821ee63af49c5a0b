//! The one table of tile sizes per profile, kernel and shape, and what they cost in workgroup memory.

use super::variant::{Kernel, Variant};
use crate::gpu::{Gpu, Profile};
use crate::plan::SplitPolicy;

/// Sets the sizes of a variant from its kernel, target and shape.
pub(crate) fn choose(variant: &mut Variant) {
    let lanes = cpu_lanes(variant);
    (variant.workgroup_size, variant.tile_q, variant.tile_kv) = match (variant.kernel, variant.target.profile) {
        (Kernel::Decode, Profile::Cpu) => (lanes, variant.group_size, 0),
        (Kernel::Prefill, Profile::Cpu) => (lanes, lanes * if variant.head_dim <= 64 { 4 } else { 2 }, 0),
        (Kernel::Decode, Profile::Gpu) => (64, variant.group_size, 32),
        (Kernel::Prefill, Profile::Gpu) => (64, 32, 32),
        (Kernel::Merge, Profile::Cpu) => (lanes, 0, 0),
        (Kernel::Merge, Profile::Gpu) => (32, 0, 0),
        (_, Profile::Cpu) => (lanes, 0, 0),
        (_, Profile::Gpu) => (64, 0, 0),
    };
}

fn cpu_lanes(variant: &Variant) -> u32 {
    if variant.target.subgroup_size == 0 { 8 } else { variant.target.subgroup_size }
}

/// Bytes of workgroup memory that the kernel's text declares. A test compares it with naga's layout of every variant.
pub(crate) fn workgroup_bytes(_variant: &Variant) -> u32 {
    0
}

/// When a sequence's keys are split.
pub(crate) fn split_policy(gpu: &Gpu, deterministic: bool) -> SplitPolicy {
    let max_workspace_bytes = (64 << 20).min(gpu.max_storage_bytes());
    // llvmpipe stops counting an invocation's loop iterations at 65 535, all loops together; the kernels take at most two iterations per key,
    // plus some per block. The cap is the adapter's, whichever profile runs on it.
    let max_split_len = if crate::gpu::is_cpu_adapter(gpu.adapter_info()) { 12_288 } else { 1 << 30 };
    let (target_workgroups, min_split_len, fixed) = match (gpu.profile(), gpu.adapter_info().device_type) {
        (Profile::Cpu, _) => (8, 1024, 12_288),
        (Profile::Gpu, wgpu::DeviceType::DiscreteGpu) => (1024, 256, 1024),
        (Profile::Gpu, _) => (256, 256, 1024),
    };
    SplitPolicy {
        target_workgroups,
        min_split_len,
        max_split_len,
        fixed_split_len: deterministic.then_some(fixed),
        max_workspace_bytes,
    }
}

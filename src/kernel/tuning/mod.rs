//! Sizes of kernels: the default table per profile, kernel and shape, the candidates that may replace a row of it, and what a tuner chose.

mod candidates;
mod linear;
mod measured;
mod rows;
mod saved;

pub use candidates::Sizes;
pub use linear::{LinearShape, LinearSizes, LinearThresholds, TunedLinear, TunedLinearKernel};
pub use saved::{TunedFor, TunedKernel, TunedShape, TunedSplit, Tuning};

use super::geometry::decode_k_dims;
use super::target::{AdapterClass, Profile, Vendor};
use super::variant::{Kernel, Variant};
use crate::format::KvFormat;
use crate::plan::{CascadePolicy, SplitPolicy};

/// Sets the sizes of a variant from its kernel, target and shape: those that were measured for exactly these, or those of the general rules.
pub(crate) fn choose(variant: &mut Variant) {
    choose_by_rule(variant);
    if let Some(sizes) = rows::find(variant) {
        *variant = variant.with_sizes(sizes);
    }
}

/// The general rules. `docs/measurements.md` has the numbers behind them.
fn choose_by_rule(variant: &mut Variant) {
    let (row_dim, group_size) = (variant.head_dim.max(variant.value_dim), variant.group_size);
    variant.packed_dots = variant.target.packed_dots;
    let lanes = cpu_lanes(variant);
    let both_narrow = variant.k_format != KvFormat::F32 && variant.v_format != KvFormat::F32;
    (variant.workgroup_size, variant.tile_q, variant.tile_kv) = match (variant.target.profile, variant.kernel) {
        // Without subgroups the kernels for CPUs take one key per iteration.
        (Profile::Cpu, Kernel::Decode | Kernel::Prefill) if !variant.target.subgroups => {
            (lanes, if variant.kernel == Kernel::Decode { group_size } else { cpu_tile_q(variant) }, 1)
        }
        // Lanes over head_dim; all heads of the group in registers. The scores of an iteration (heads times keys) fill two vectors of 8 lanes.
        (Profile::Cpu, Kernel::Decode) => (lanes, group_size, if group_size <= 4 { 4 } else { 2 }),
        (Profile::Cpu, Kernel::Prefill) => (lanes, cpu_tile_q(variant), 2),
        // Twice the keys per tile costs a third of the occupancy on RDNA2 for 12 % fewer instructions per key.
        // Rows of at most two loads (int4 at 64) take two invocations, so that 64 keys keep all of them busy without a second key for any.
        (Profile::Gpu, Kernel::Decode)
            if row_dim <= 32 || row_dim <= 2 * decode_k_dims(variant.head_dim, variant.k_format) =>
        {
            (128, group_size, 64)
        }
        (Profile::Gpu, Kernel::Decode) if row_dim <= 64 || (row_dim <= 128 && both_narrow) => (128, group_size, 32),
        (Profile::Gpu, Kernel::Decode) if row_dim <= 256 => (128, group_size, 16),
        // A value of 576 elements takes 144 invocations; 256 have 32 keys at a time.
        (Profile::Gpu, Kernel::Decode) => (256, group_size, 32),
        // 4 invocations a row. The more keys, the less often sums pass through workgroup memory, of which there are 32 KiB.
        (Profile::Gpu, Kernel::Prefill) if variant.target.matrix.is_some() => (
            128,
            32,
            if row_dim <= 80 {
                64
            } else if row_dim <= 128 {
                32
            } else {
                16
            },
        ),
        // Compiled for Arc A and Arc B, the tiles of the other vendors spill 20 to 60 registers (200 at head_dim 256); with these nothing spills.
        (Profile::Gpu, Kernel::Prefill) if variant.target.vendor == Vendor::Intel => intel_prefill(variant),
        // The largest tiles that keep 4 waves per SIMD on RDNA2 (112 to 128 VGPR) and stay within 16 KiB.
        (Profile::Gpu, Kernel::Prefill) if row_dim <= 96 => (128, 64, 32),
        (Profile::Gpu, Kernel::Prefill) if row_dim <= 192 => (128, 32, 64),
        (Profile::Gpu, Kernel::Prefill) if row_dim <= 256 => (128, 32, 32),
        // Sums of 512 elements: 8 `vec4`s of an invocation, as with 32 rows of 256 and 128 invocations.
        (Profile::Gpu, Kernel::Prefill) => (256, 16, 64),
        // A row has at most 64 vec4s.
        (Profile::Gpu, Kernel::Merge) => (32, 0, 0),
        // The invocations of a row share its range, or wait for each other: whole subgroups that hold the Vec8s (8 elements) of a row.
        (Profile::Cpu, Kernel::Append | Kernel::AppendQkv) if variant.shares_rows() => {
            (variant.row_vec8s().next_multiple_of(lanes), 0, 0)
        }
        (Profile::Gpu, Kernel::Append | Kernel::AppendQkv) if variant.row_vec8s() > 64 => (128, 0, 0),
        (
            Profile::Gpu,
            Kernel::Append
            | Kernel::AppendQkv
            | Kernel::CopyBlocks
            | Kernel::MoveRows
            | Kernel::PackBlocks
            | Kernel::Gather
            | Kernel::Rope,
        ) => (64, 0, 0),
        // 0.84 of the time of one subgroup, 2048 tokens on lavapipe of Mesa 22.3.6; tunings on 22.3.6 and 26.1 chose 4 to 32 subgroups.
        (Profile::Cpu, Kernel::Append) => (8 * lanes, 0, 0),
        (Profile::Cpu, Kernel::AppendQkv | Kernel::CopyBlocks | Kernel::MoveRows | Kernel::PackBlocks) => (lanes, 0, 0),
        (Profile::Cpu, Kernel::Gather | Kernel::Merge | Kernel::Rope) => (lanes, 0, 0),
    };
}

/// Tiles of prefill on Intel: 256 invocations share what 128 have elsewhere. Wide rows leave registers for fewer query rows, and the loads of
/// F32 for fewer keys. What still spills on Arc A (d72 F32; Int8, Int4 and values in E4M3 at d64) spills 1 to 7 registers, and more with any other candidate.
fn intel_prefill(variant: &Variant) -> (u32, u32, u32) {
    let loads_f32 = variant.k_format == KvFormat::F32 || variant.v_format == KvFormat::F32;
    match variant.head_dim.max(variant.value_dim) {
        129.. => (256, 16, 64),
        81.. => (256, 32, 64),
        65.. if !loads_f32 => (256, 32, 64),
        // Compiled for Arc A, E4M3 at 64: none spilled and 1912 instructions, against 7 and 2374 with 32 keys.
        49.. if !loads_f32 && variant.k_format == KvFormat::E4M3 => (256, 32, 64),
        _ => (256, 32, 32),
    }
}

/// Invocations of a CPU kernel: one subgroup. Where subgroups can't be used, 8 invocations fill an AVX2 vector.
fn cpu_lanes(variant: &Variant) -> u32 {
    if variant.target.subgroups { variant.target.subgroup_size } else { 8 }
}

/// Query rows of a prefill tile on a CPU adapter: some per lane, as many as keep all state of a lane at 256 elements. Each K and V element that
/// is loaded serves them all. Twice as many take 1.16 to 1.6 times as long at head_dim 64 and 128 on an AVX-512 machine (loops of `vec4<u64>`
/// loads at 15 GB/s), where they spill. (On one that loads at 2.3 GB/s they were 1.1 to 1.4 times as fast: a tuner finds out.)
fn cpu_tile_q(variant: &Variant) -> u32 {
    let lanes = cpu_lanes(variant);
    let most = match (variant.target.subgroups, lanes) {
        (true, 8..) => 8,
        (true, _) => 2,
        (false, _) => 4,
    };
    lanes * (256 / variant.head_dim.max(variant.value_dim)).clamp(1, most)
}

/// When a sequence's keys are split. `max_workspace_bytes` is at most a storage binding of the device.
#[must_use]
pub fn split_policy(
    profile: Profile,
    class: AdapterClass,
    deterministic: bool,
    max_workspace_bytes: u64,
) -> SplitPolicy {
    // llvmpipe stops counting an invocation's loop iterations at 65 535, all loops together. The kernels take at most one iteration per key
    // (prefill for CPUs adds up to 130 before and after), so half of the cap is safe. It is the adapter's, whichever profile runs on it.
    let max_split_len = if class == AdapterClass::Cpu { 32_768 } else { 1 << 30 };
    let (target_workgroups, min_split_len, fixed_split_len) = match (profile, class) {
        // A workgroup runs on one core from start to end, so a few per core are enough; 64 splits cost 25 % where 8 fill two cores.
        (Profile::Cpu, _) => (8, 1024, 4096),
        // Some hundred compute units with several workgroups each, against a handful of them.
        (Profile::Gpu, AdapterClass::Discrete) => (1024, 256, 1024),
        (Profile::Gpu, _) => (256, 256, 1024),
    };
    SplitPolicy {
        target_workgroups,
        min_split_len,
        max_split_len,
        fixed_split_len: deterministic.then_some(fixed_split_len),
        max_workspace_bytes,
        max_dispatch_work: match class {
            // Prefill computes some 15 Gmac/s on two cores of lavapipe, and some 100 on the smallest of GPUs: about a second, and 0.2 s.
            AdapterClass::Cpu | AdapterClass::Integrated => 1 << 34,
            // From 2 Tmac/s on: 0.15 s.
            AdapterClass::Discrete => 1 << 38,
        },
        cascade: None,
    }
}

/// When shared blocks are read once for all who share them. `prefill` is the kernel that would read them.
#[must_use]
pub fn cascade_policy(prefill: &Variant) -> CascadePolicy {
    // Of a key, in decode's time for a key, whatever the size of decode's group: reading binds it, arithmetic the tiles of prefill. On lavapipe (LLVM
    // 15, AVX2) F32 takes 0.13 to 0.15 (d 64 and 128, groups of 1 and 4), F16 0.15 to 0.19, Int8 0.20 to 0.26: `attention -- race/cascade`.
    let row_cost = match (prefill.target.profile, prefill.k_format.element_bits().max(prefill.v_format.element_bits()))
    {
        (Profile::Cpu, 32) => 0.15,
        (Profile::Cpu, 16) => 0.19,
        (Profile::Cpu, _) => 0.26,
        // Modelled, not measured: 20 floating-point operations in the time of a byte, of which the scalar kernel reaches a third.
        (Profile::Gpu, _) if prefill.target.matrix.is_none() => 0.15,
        (Profile::Gpu, _) => 0.05,
    };
    let min_saved = match prefill.target.profile {
        // 0.2 ms, what two more dispatches and their states cost lavapipe.
        Profile::Cpu => 1 << 17,
        // 10 us of reading F16 at 800 GB/s.
        Profile::Gpu => 1 << 21,
    };
    CascadePolicy { tile_cost: row_cost * prefill.tile_q as f32, min_saved }
}

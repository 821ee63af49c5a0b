//! Candidates against the oracle, what a device does with a tuning, and the tuner itself.

use std::time::Duration;

use folio::kernel::tuning::{Sizes, TunedKernel, TunedShape, TunedSplit, Tuning};
use folio::kernel::{AttendFlags, Kernel, Target, Variant, Vendor};
use folio::tune::{TuneEvent, TuneShape};
use folio::{Attention, AttentionConfig, Error, Gpu, KvCache, KvCacheConfig, KvFormat};

use crate::adapter::{self, CPU, CPU_NO_INT64, CPU_PLAIN, GPU, GPU_PLAIN, Open};
use crate::case::Case;

/// The default variant of a case's kernel.
fn default_variant(gpu: &Gpu, case: &Case, kernel: Kernel) -> Variant {
    let config = KvCacheConfig::new(1, case.num_kv_heads, case.head_dim)
        .with_blocks(1, case.block_size)
        .with_formats(case.k_format, case.v_format);
    let group_size = if kernel == Kernel::Append { 1 } else { case.config.num_q_heads / case.num_kv_heads };
    Variant::new(kernel, gpu.target(), &config, group_size, AttendFlags::default())
}

fn entry(variant: &Variant, sizes: Sizes, split: Option<TunedSplit>) -> TunedKernel {
    let shape = TunedShape::of(variant);
    TunedKernel { shape, sizes, split, workload: String::new(), nanos: 1000, default_nanos: 2000 }
}

/// Runs a case with every candidate of each kernel: the n-th of all of them at a time.
fn check_candidates(how: Open, case: &Case) {
    let Some(gpu) = adapter::open(how).map(|gpu| gpu.with_packed_dots(case.packed_dots)) else { return };
    let variants = [Kernel::Decode, Kernel::Prefill, Kernel::Append].map(|kernel| default_variant(&gpu, case, kernel));
    let candidates = variants.map(|variant| variant.candidates());
    let most = candidates.iter().map(Vec::len).max().unwrap();
    assert!(most > 1, "{how:?}: nothing to choose from");
    let split = TunedSplit { target_workgroups: 64, min_split_len: 64 };
    for i in 0..most {
        // The other kernels repeat theirs: only the first time is a new program.
        let kernels = variants.iter().zip(&candidates).map(|(variant, all)| {
            let split = (variant.kernel == Kernel::Decode).then_some(split);
            entry(variant, all[i.min(all.len() - 1)], split)
        });
        let tuning = Tuning { kernels: kernels.collect(), ..Tuning::new(gpu.tuned_for()) };
        let tuned = gpu.with_tuning(tuning.clone()).unwrap();
        case.clone()
            .named(format!("{how:?} {:?}", tuning.kernels.iter().map(|k| k.sizes).collect::<Vec<_>>()))
            .check(&tuned);
    }
}

fn case(num_q_heads: u32, num_kv_heads: u32, head_dim: u32, k: KvFormat, v: KvFormat) -> Case {
    // Lengths around tiles and blocks; some are split.
    Case::new(&[(0, 1), (16, 1), (200, 1), (0, 37), (70, 9)], num_q_heads, num_kv_heads, head_dim).formats(k, v)
}

#[test]
fn every_candidate_for_cpu_adapters_is_right() {
    check_candidates(CPU, &case(4, 1, 64, KvFormat::F16, KvFormat::Int8));
    check_candidates(CPU, &case(2, 2, 40, KvFormat::F32, KvFormat::F32).block_size(5));
    check_candidates(CPU_NO_INT64, &case(4, 1, 64, KvFormat::Int4, KvFormat::F16));
    check_candidates(CPU_PLAIN, &case(2, 1, 64, KvFormat::F16, KvFormat::F32));
}

#[test]
fn every_candidate_for_gpus_is_right() {
    check_candidates(GPU, &case(4, 1, 64, KvFormat::F16, KvFormat::Int8));
    check_candidates(GPU, &case(8, 1, 128, KvFormat::Int4, KvFormat::Int4));
    check_candidates(GPU_PLAIN, &case(2, 2, 40, KvFormat::F32, KvFormat::F32).block_size(5));
    let packed = |case| Case { packed_dots: true, ..case };
    check_candidates(GPU, &packed(case(4, 1, 64, KvFormat::Int4, KvFormat::Int4)));
    check_candidates(GPU_PLAIN, &packed(case(8, 1, 72, KvFormat::Int8PerChannel, KvFormat::F16)));
}

/// Where queries may be quantised, decode races with and without; nowhere else does a choice quantise them.
#[test]
fn packed_dot_products_race_where_they_are_allowed() {
    let Some(plain) = adapter::open(GPU) else { return };
    let packed = plain.with_packed_dots(true);
    let case = case(4, 1, 32, KvFormat::Int8, KvFormat::Int8);
    let both = default_variant(&packed, &case, Kernel::Decode).candidates();
    let quantised = both.iter().filter(|sizes| sizes.packed_dots).count();
    assert!(both[0].packed_dots && quantised > 1 && both.len() == 2 * quantised, "{both:?}");
    let default = default_variant(&plain, &case, Kernel::Decode);
    assert!(default.candidates().iter().all(|sizes| !sizes.packed_dots));
    // A file that says otherwise changes nothing.
    let kernels = vec![entry(&default, both[0], None)];
    let tuned = plain.with_tuning(Tuning { tuned_for: plain.tuned_for(), kernels, linear: Vec::new() }).unwrap();
    case.check(&tuned);

    let config = KvCacheConfig::new(1, 1, 32).with_blocks(8, 16).with_formats(KvFormat::Int8, KvFormat::Int8);
    let shape = TuneShape::new(&config, 4).with_decode(2, 64).with_prefill(24, 48);
    let mut timed = Vec::new();
    let tuning = packed
        .tune(&[shape], Duration::from_secs(15), |event| match event {
            TuneEvent::Timed { sizes, .. } => timed.push(sizes),
            TuneEvent::Dropped { sizes, reason } => panic!("{sizes}: {reason}"),
            _ => {}
        })
        .unwrap();
    assert!(timed.iter().any(|sizes| sizes.packed_dots) && timed.iter().any(|sizes| !sizes.packed_dots), "{timed:?}");
    assert!(plain.with_tuning(tuning.clone()).is_err());
    Case { packed_dots: true, ..case }.check(&packed.with_tuning(tuning).unwrap());
}

/// The default for Intel's GPUs, on an adapter of somebody else's.
#[test]
fn tiles_for_intel_are_right() {
    let Some(gpu) = adapter::open(GPU) else { return };
    for (head_dim, format) in
        [(64, KvFormat::E4M3), (72, KvFormat::F32), (96, KvFormat::F16), (192, KvFormat::F16), (256, KvFormat::Int8)]
    {
        let case = case(2, 1, head_dim, format, format);
        let variant = default_variant(&gpu, &case, Kernel::Prefill);
        let config = KvCacheConfig::new(1, 1, head_dim).with_blocks(1, case.block_size).with_formats(format, format);
        let target = Target { vendor: Vendor::Intel, ..gpu.target() };
        let intel = Variant::new(Kernel::Prefill, target, &config, 2, AttendFlags::default());
        assert_ne!(variant.sizes(), intel.sizes());
        let kernels = vec![entry(&variant, intel.sizes(), None)];
        let tuned = gpu.with_tuning(Tuning { kernels, ..Tuning::new(gpu.tuned_for()) }).unwrap();
        case.named(format!("{:?}", intel.sizes())).check(&tuned);
    }
}

/// A device takes only a tuning that is its own, and of that only what is among the candidates.
#[test]
fn foreign_and_damaged_tunings_change_nothing() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let config = KvCacheConfig::new(1, 1, 64).with_blocks(4, 16);
    let variants = |gpu: &Gpu| {
        let cache = KvCache::new_blocking(gpu, config).unwrap();
        let attention = Attention::new_blocking(&cache, AttentionConfig::new(4)).unwrap();
        attention.variants().copied().collect::<Vec<_>>()
    };
    let default = variants(&gpu);
    let empty = Tuning::new(gpu.tuned_for());
    for change in [
        |tuning: &mut Tuning| tuning.tuned_for.adapter.push('x'),
        |tuning: &mut Tuning| tuning.tuned_for.driver.push('x'),
        |tuning: &mut Tuning| tuning.tuned_for.folio.push('x'),
        |tuning: &mut Tuning| tuning.tuned_for.full_checks ^= true,
        |tuning: &mut Tuning| tuning.tuned_for.matrix_rows += 16,
        |tuning: &mut Tuning| tuning.tuned_for.packed_dots ^= true,
    ] {
        let mut tuning = empty.clone();
        change(&mut tuning);
        let error = gpu.with_tuning(tuning.clone()).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "tuning", .. }), "{error}");
        assert!(empty.clone().merge(tuning).is_err());
    }
    let own = default[0].sizes();
    for sizes in [
        Sizes { workgroup_size: 0, ..own },
        Sizes { workgroup_size: u32::MAX, ..own },
        Sizes { tile_q: 0, ..own },
        Sizes { tile_kv: u32::MAX, ..own },
        Sizes { tile_kv: 0, ..own },
    ] {
        let kernels = default.iter().map(|variant| entry(variant, sizes, None)).collect();
        let tuned = gpu.with_tuning(Tuning { kernels, ..empty.clone() }).unwrap();
        assert_eq!(variants(&tuned), default, "{sizes:?}");
    }
    // Split lengths out of bounds are clamped: the step still runs.
    for (target_workgroups, min_split_len) in [(0, 0), (u32::MAX, u32::MAX), (u32::MAX, 1)] {
        let split = Some(TunedSplit { target_workgroups, min_split_len });
        let kernels = vec![entry(&default[0], own, split)];
        let tuned = gpu.with_tuning(Tuning { kernels, ..empty.clone() }).unwrap();
        Case::new(&[(300, 1), (0, 5)], 4, 1, 64).named(format!("{split:?}")).check(&tuned);
    }
}

#[test]
fn a_tuned_device_uses_what_won() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let config = KvCacheConfig::new(1, 2, 32).with_blocks(8, 16).with_formats(KvFormat::F16, KvFormat::F16);
    let shape = TuneShape::new(&config, 4).with_decode(2, 64).with_prefill(24, 48);
    let (mut races, mut timed, mut chosen) = (0, 0, Vec::new());
    let tuning = gpu
        .tune(&[shape], Duration::from_secs(4), |event| match event {
            TuneEvent::Race { num_candidates, .. } => races += usize::from(num_candidates > 1),
            TuneEvent::Timed { micros, .. } => timed += usize::from(micros > 0.0 && micros.is_finite()),
            TuneEvent::Dropped { sizes, reason } => panic!("{sizes}: {reason}"),
            TuneEvent::Chosen(kernel) => chosen.push(kernel.clone()),
            _ => {}
        })
        .unwrap();
    assert_eq!((races, chosen.len()), (3, 3));
    assert!(timed >= 3);
    assert_eq!(tuning.kernels, chosen);
    for kernel in &tuning.kernels {
        assert!(kernel.nanos > 0 && kernel.nanos <= kernel.default_nanos, "{kernel:?}");
    }
    // A file keeps everything.
    let text = serde_json::to_string(&tuning).unwrap();
    assert_eq!(serde_json::from_str::<Tuning>(&text).unwrap(), tuning);

    let tuned = gpu.with_tuning(tuning.clone()).unwrap();
    assert_eq!(tuned.tuning(), Some(&tuning));
    let cache = KvCache::new_blocking(&tuned, config).unwrap();
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(4)).unwrap();
    for variant in attention.variants().filter(|variant| variant.kernel != Kernel::Merge) {
        let found = tuning.kernels.iter().find(|kernel| kernel.shape == TunedShape::of(variant)).unwrap();
        assert_eq!(found.sizes, variant.sizes());
    }
    Case::new(&[(40, 1), (3, 20)], 4, 2, 32).formats(KvFormat::F16, KvFormat::F16).check(&tuned);
}

#[test]
fn shapes_that_no_tuner_can_time_are_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let config = KvCacheConfig::new(1, 2, 32).with_blocks(8, 16);
    let shape = TuneShape::new(&config, 4);
    for (argument, shape) in [
        ("decode batch", shape.clone().with_decode(0, 16)),
        ("decode batch", shape.clone().with_decode(u32::MAX, 16)),
        ("decode keys", shape.clone().with_decode(1, 0)),
        ("prefill tokens", shape.clone().with_prefill(0, 16)),
        ("prefill keys", shape.clone().with_prefill(16, u32::MAX)),
        ("prefill tokens", shape.clone().with_prefill(17, 16)),
        ("num_q_heads", TuneShape::new(&config, 3)),
        ("head_dim", TuneShape::new(&KvCacheConfig::new(1, 2, 33).with_blocks(8, 16), 4)),
    ] {
        let error = gpu.tune(&[shape], Duration::from_secs(1), |_| {}).unwrap_err();
        assert!(error.to_string().contains(argument), "{argument}: {error}");
    }
    assert!(gpu.tune(&[], Duration::ZERO, |_| {}).unwrap().kernels.is_empty());
}

#[test]
fn a_lost_device_is_not_tuned() {
    if adapter::open(adapter::DEFAULT).is_none() {
        return;
    }
    // One of its own: the others' stays.
    let gpu = Gpu::open_blocking(adapter::options(adapter::DEFAULT)).unwrap();
    gpu.device().destroy();
    let shape = TuneShape::new(&KvCacheConfig::new(1, 1, 32).with_blocks(8, 16), 2);
    let error = gpu.tune(&[shape], Duration::from_secs(1), |_| {}).unwrap_err();
    assert!(matches!(error, Error::DeviceLost { .. }), "{error}");
}

//! After the device is lost every call returns an error of its own, from any thread, and has changed nothing. Nothing panics, though wgpu's
//! default handler is in place.

use folio::wgpu;
use folio::{
    Attention, AttentionConfig, ErrorKind, Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, Result, Rope, RopeConfig,
};

use crate::adapter;
use crate::case::upload;

const CONFIG: KvCacheConfig =
    KvCacheConfig::new(2, 2, 32).with_blocks(32, 16).with_formats(KvFormat::Int8PerChannel, KvFormat::F16);

/// A device of the test's own.
fn open() -> Option<Gpu> {
    adapter::open(adapter::DEFAULT)?;
    let mut options = GpuOptions::default();
    options.adapter_name = std::env::var("FOLIO_ADAPTER").ok();
    Some(Gpu::open_blocking(options).expect("the adapter opened before"))
}

#[track_caller]
fn lost<T>(what: &str, result: Result<T>) {
    match result {
        Ok(_) => panic!("{what} succeeded on a lost device"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::DeviceLost, "{what}: {error}"),
    }
}

#[test]
fn every_call_returns_an_error_of_its_own() {
    let Some(gpu) = open() else { return };
    let cache = KvCache::new_blocking(&gpu, CONFIG).expect("cache");
    for layer in 0..2 {
        cache.calibrate_keys(layer, &[0.5; 64]).expect("calibrated");
    }
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(4)).expect("attention");
    let rope = Rope::new_blocking(&cache, RopeConfig::new(32, 10_000.0)).expect("rope");
    let encoder = || gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let (q, k, v, out) = (
        upload(&gpu, &[0.1; 3 * 128]),
        upload(&gpu, &[0.2; 3 * 64]),
        upload(&gpu, &[0.3; 3 * 64]),
        upload(&gpu, &[0.0; 3 * 128]),
    );
    let sequence = cache.create_sequence();
    let step = cache.begin_step(&[(sequence, 3)]).expect("step");
    let mut commands = encoder();
    for layer in 0..2 {
        cache.append(&mut commands, &step, layer, &k, &v, Some(&rope)).expect("append");
    }
    gpu.queue().submit([commands.finish()]);
    cache.commit(step).expect("commit");
    let mut commands = encoder();
    let snapshot = cache.record_snapshot(&mut commands, sequence).expect("snapshot");
    let read = cache.record_snapshot(&mut commands, sequence).expect("snapshot");
    gpu.queue().submit([commands.finish()]);
    let snapshot = gpu.block_on(snapshot.read()).expect("read");
    // Steps that are open when it happens: one planned, one not.
    let (a, b) = (cache.create_sequence(), cache.create_sequence());
    let planned = cache.begin_step(&[(a, 3)]).expect("step");
    let plan = attention.plan(&planned).expect("plan");
    let open_step = cache.begin_step(&[(b, 3)]).expect("step");
    let usage = cache.usage();

    gpu.device().destroy();
    // Recording calls ask at most every 50 us.
    std::thread::sleep(std::time::Duration::from_millis(1));

    let mut commands = encoder();
    lost("append", cache.append(&mut commands, &planned, 0, &k, &v, None));
    lost("append with a rope", cache.append(&mut commands, &planned, 0, &k, &v, Some(&rope)));
    lost("rotate", rope.rotate(&mut commands, &planned, &k, 2));
    lost("attend", attention.attend(&mut commands, &plan, 0, &q, &out));
    lost("plan", attention.plan(&open_step));
    lost("commit", cache.commit(planned));
    lost("begin_step", cache.begin_step(&[(sequence, 1)]));
    lost("gather", cache.gather_blocking(sequence, 0));
    lost("record_gather", cache.record_gather(&mut commands, sequence, 0, &q, &out));
    lost("read", gpu.read_blocking(&out));
    lost("snapshot", gpu.block_on(read.read()));
    lost("record_snapshot", cache.record_snapshot(&mut commands, sequence));
    lost("swap_out", cache.swap_out(&mut commands, sequence));
    lost("swap_in", cache.swap_in(&mut commands, &snapshot));
    lost("cache.warm_up", cache.warm_up());
    lost("attention.warm_up", attention.warm_up());
    lost("rope.warm_up", rope.warm_up());
    lost("KvCache::new", KvCache::new_blocking(&gpu, CONFIG));
    lost("Attention::new", Attention::new_blocking(&cache, AttentionConfig::new(2)));
    lost("Rope::new", Rope::new_blocking(&cache, RopeConfig::new(32, 500.0)));
    lost("from_parts", Gpu::from_parts(gpu.device().clone(), gpu.queue().clone()));
    lost("scoped", pollster::block_on(gpu.scoped("anything", || ())));
    drop((plan, open_step));

    // Nothing has grown, and what was reserved is free again.
    assert_eq!([sequence, a, b].map(|s| cache.seq_len(s).expect("sequence")), [3, 0, 0]);
    assert!(usage.used > cache.usage().used, "the open steps' blocks came back");
    let used = cache.usage().used;
    cache.free(sequence).expect("the host's part goes on");
    assert_eq!(cache.usage().used, used - 1);
    lost("set_key_scales", {
        cache.clear();
        cache.set_key_scales(0, &[0.5; 2 * 64])
    });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| lost("begin_step of another thread", cache.begin_step(&[(cache.create_sequence(), 1)])));
        }
    });
    assert_eq!(cache.usage().used, 0);
}

/// The probe is asked thousands of times, from several threads, while others poll: a device that is there is never taken for lost.
#[test]
fn a_device_that_is_there_is_not_lost() {
    let Some(gpu) = open() else { return };
    let cache = KvCache::new_blocking(&gpu, KvCacheConfig::new(1, 1, 8).with_blocks(64, 4)).expect("cache");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    let sequence = cache.create_sequence();
                    drop(cache.begin_step(&[(sequence, 1)]).expect("a step"));
                    cache.free(sequence).expect("free");
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..2000 {
                gpu.device().poll(wgpu::PollType::Poll).expect("poll");
            }
        });
    });
}

/// Steps and plans that nobody records cost the device nothing.
#[cfg(feature = "counters")]
#[test]
fn steps_that_are_planned_and_dropped_make_no_buffer() {
    let Some(gpu) = open() else { return };
    let cache = KvCache::new_blocking(&gpu, KvCacheConfig::new(1, 2, 32).with_blocks(64, 16)).expect("cache");
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(4)).expect("attention");
    let sequences: Vec<_> = (0..8).map(|_| (cache.create_sequence(), 3)).collect();
    let buffers = || gpu.device().get_internal_counters().hal.buffers.read();
    let before = buffers();
    for _ in 0..10_000 {
        let step = cache.begin_step(&sequences).expect("step");
        drop(attention.plan(&step).expect("plan"));
    }
    assert_eq!(buffers(), before);
    assert_eq!(cache.usage().used, 0);
}

/// A second cache, attention or rope of the same shape compiles nothing.
#[test]
fn kernels_are_compiled_once_per_device() {
    let Some(gpu) = open() else { return };
    let config = KvCacheConfig::new(1, 2, 32).with_blocks(8, 16);
    let make = |config| {
        let cache = KvCache::new_blocking(&gpu, config).expect("cache");
        drop(Attention::new_blocking(&cache, AttentionConfig::new(4)).expect("attention"));
        drop(Rope::new_blocking(&cache, RopeConfig::new(32, 10_000.0)).expect("rope"));
        gpu.num_compiled()
    };
    let first = make(config);
    // append, copy_blocks, move_rows, pack_blocks, gather; decode, prefill, merge; append with rope, rope
    assert_eq!(first, 10);
    // The size of the pool and the number of layers are not compiled in.
    assert_eq!(make(config.with_blocks(9, 16)), first);
    assert!(make(config.with_blocks(8, 32)) > first);
}

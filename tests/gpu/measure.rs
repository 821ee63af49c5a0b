//! `folio::measure`: plain loops, filled caches, and what is counted of a plan.

use std::time::Duration;

use folio::measure::{FilledCache, RoofLoops, Timer, Work, read_loop};
use folio::{AttentionConfig, Error, KvCacheConfig, wgpu};

use crate::adapter;

/// 4 query heads over 2 of 32 elements.
fn config() -> KvCacheConfig {
    KvCacheConfig::new(1, 2, 32).with_blocks(20, 16)
}

#[test]
fn roofs_are_finite_and_plausible() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut timer = Timer::new(&gpu).unwrap();
    let roofs = RoofLoops::new(&mut timer, 1 << 20).unwrap().measure(&timer, 2).unwrap();
    for roof in [&roofs.read, &roofs.copy, &roofs.multiply_add, &roofs.workgroup] {
        let rate = roof.per_second;
        // A megabyte a second, and a petabyte.
        assert!(rate.low <= rate.median && rate.median <= rate.high && rate.rounds == 2, "{roof:?}");
        assert!((1e6..1e15).contains(&rate.median) && !roof.by.is_empty(), "{roof:?}");
    }
    assert_eq!(roofs.read_bytes, 2 << 20);
    for time in [roofs.submit, roofs.readback] {
        assert!((1e-7..1.0).contains(&time.median), "{roofs:?}");
    }
    assert!((0.0..0.1).contains(&roofs.dispatch.median), "{roofs:?}");
}

/// By hand, for a decode and a prefill that are not split.
#[test]
fn work_is_what_the_plan_says() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut filled = FilledCache::new(&gpu, config(), AttentionConfig::new(4), 2).unwrap();
    filled.fill(40).unwrap();
    assert_eq!((filled.len().unwrap(), filled.is_empty().unwrap()), (40, false));
    assert!(matches!(filled.fill(39), Err(Error::Argument { argument: "seq_len", .. })));
    let timer = Timer::new(&gpu).unwrap();

    // One token of each sequence sees 41 keys.
    let decode = filled.call(1).unwrap();
    let work = decode.work();
    assert_eq!(work.flop, 2 * 41 * 4 * 32 * 4);
    assert_eq!((work.tile_flop, work.dispatches), (work.flop, 1));
    // Rows of K and of V are of 64 bytes in F16; q and out have 4 rows of 128 bytes.
    assert_eq!(work.read_bytes, 2 * (41 * 2 * 2 * 64 + 4 * 128));
    assert_eq!(work.written_bytes, 2 * 4 * 128);
    for sample in [decode.measure(&timer).unwrap(), decode.measure_append(&timer).unwrap()] {
        assert!(sample.time() > Duration::ZERO);
    }
    drop(decode);

    // 9 tokens of each see 41 to 49 keys. Tiles are computed whole.
    let prefill = filled.call(9).unwrap();
    let work = prefill.work();
    assert_eq!(work.flop, 2 * (41..=49).sum::<u64>() * 4 * 32 * 4);
    assert!(work.tile_flop >= work.flop, "{work:?}");
    assert!(prefill.measure(&timer).unwrap().time() > Duration::ZERO);
    drop(prefill);
    // The step was dropped: nothing has come to the sequences.
    assert_eq!(filled.len().unwrap(), 40);
    filled.empty().unwrap();
    assert!(filled.is_empty().unwrap());

    // A window of 10 keys: that is what each of 9 tokens sees. No kernel runs.
    let mut windowed = AttentionConfig::new(4);
    windowed.window = Some(10);
    let mut filled = FilledCache::new(&gpu, config(), windowed, 1).unwrap();
    filled.fill(40).unwrap();
    let work = filled.call(9).unwrap().work();
    assert_eq!(work.flop, 9 * 10 * 4 * 32 * 4);

    let append = Work::of_append(filled.cache().config(), 10);
    assert_eq!((append.read_bytes, append.written_bytes), (10 * 2 * 2 * 32 * 4, 10 * 2 * 2 * 64));
}

#[test]
fn loops_read_no_further_than_their_buffers() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let timer = Timer::new(&gpu).unwrap();
    let buffer = |size| {
        let usage = wgpu::BufferUsages::STORAGE;
        gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    let (small, large) = (buffer(1 << 12), buffer(1 << 16));
    for (k, v, bytes, argument) in
        [(&small, &large, 1 << 16, "k"), (&large, &small, 1 << 16, "v"), (&large, &large, 64, "bytes")]
    {
        let error = read_loop(&timer, k, v, bytes).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: found, .. } if found == argument), "{error}");
    }
    let whole = read_loop(&timer, &large, &large, 1 << 16).unwrap();
    assert!(whole.work() > 0.0 && whole.work() <= f64::from(2 << 16));
}

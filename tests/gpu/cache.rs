//! Sequences over the pool: what is appended is what is there, whatever was forked, truncated, freed or dropped.

use crate::common::with;
use std::sync::atomic::{AtomicBool, Ordering};

use fastrand::Rng;
use folio::KvFormat::{F16, F32};
use folio::{BufferRef, Error, ErrorKind, KvCache, KvCacheConfig, KvFormat, PoolUsage, SequenceId, wgpu};

use crate::adapter::{self, DEFAULT};
use crate::case::{append, poison, round, shuffle, upload};
use crate::tokens::{self, SHAPE, assert_holds, begin, encoder, grow, record, run, sequence};

/// A cache full of NaN, with a shuffled free list.
fn cache(config: KvCacheConfig) -> Option<KvCache> {
    let gpu = adapter::open(DEFAULT)?;
    let cache = KvCache::new_blocking(&gpu, config).expect("cache");
    poison(&cache);
    shuffle(&cache, 7);
    Some(cache)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// (used, shared, sequences) of a pool; free must be the rest.
fn counts(cache: &KvCache) -> (u32, u32, u32) {
    let PoolUsage { total, free, used, shared, sequences, .. } = cache.usage();
    assert_eq!((total, free + used), (cache.config().num_blocks, cache.config().num_blocks));
    (used, shared, sequences)
}

/// What a failed or dropped step must leave alone.
fn state(cache: &KvCache, sequences: &[SequenceId]) -> (PoolUsage, Vec<(u32, Vec<folio::BlockId>)>) {
    let of = |&s: &SequenceId| (cache.seq_len(s).expect("length"), cache.block_table(s).expect("table"));
    (cache.usage(), sequences.iter().map(of).collect())
}

#[test]
fn gather_returns_what_was_appended_in_every_shape() {
    let mut rng = Rng::with_seed(3);
    for (block_size, k_format, v_format) in [(1, F32, F16), (5, F16, F32), (16, F32, F32), (256, F16, F16)] {
        let num_blocks = 3 * 300_u32.div_ceil(block_size) + 1;
        let config = with(SHAPE, |c| {
            c.num_layers = 3;
            c.block_size = block_size;
            c.num_blocks = num_blocks;
            c.k_format = k_format;
            c.v_format = v_format;
            c.head_dim = 24;
        });
        let Some(cache) = cache(config) else { return };
        let sequences: Vec<_> = (0..3).map(|_| cache.create_sequence()).collect();
        let row = (config.num_kv_heads * config.head_dim) as usize;
        // [layer][sequence], K and V one after another.
        let mut want = vec![vec![(Vec::new(), Vec::new()); 3]; 3];
        for turn in 0..6 {
            let batch: Vec<_> = sequences.iter().map(|&s| (s, rng.u32(1..50))).collect();
            let batch = &batch[turn % 2..];
            let step = cache.begin_step(batch).expect("step");
            let mut encoder = encoder(&cache);
            for (layer, want) in (0..).zip(&mut want) {
                let (mut k, mut v) = (Vec::new(), Vec::new());
                for (&(_, len), (want_k, want_v)) in batch.iter().zip(&mut want[turn % 2..]) {
                    let mut values = || (0..len as usize * row).map(|_| rng.f32() * 8.0 - 4.0).collect::<Vec<_>>();
                    let (new_k, new_v) = (values(), values());
                    want_k.extend(round(k_format, &new_k));
                    want_v.extend(round(v_format, &new_v));
                    k.extend(new_k);
                    v.extend(new_v);
                }
                let (k, v) = (upload(cache.gpu(), &k), upload(cache.gpu(), &v));
                cache.append(&mut encoder, &step, layer, &k, &v, None).expect("append");
            }
            cache.gpu().queue().submit([encoder.finish()]);
            cache.commit(step).expect("commit");
        }
        for (layer, want) in (0..).zip(&want) {
            for (&sequence, (k, v)) in sequences.iter().zip(want) {
                let got = cache.gather_blocking(sequence, layer).expect("gather");
                assert_eq!(got.k.len(), cache.seq_len(sequence).unwrap() as usize * row);
                assert!(got.k == *k, "K of {sequence}, layer {layer}, {config:?}");
                assert!(got.v == *v, "V of {sequence}, layer {layer}, {config:?}");
            }
        }
    }
}

/// Appends `values` as the K and V of a new sequence; returns what gather says.
fn round_trip(cache: &KvCache, values: &[f32]) -> (SequenceId, folio::KvRows) {
    let sequence = cache.create_sequence();
    let row = (cache.config().num_kv_heads * cache.config().head_dim) as usize;
    append(cache, &[(sequence, (values.len() / row) as u32)], 0, values, values);
    (sequence, cache.gather_blocking(sequence, 0).expect("gather"))
}

#[test]
fn f32_keeps_every_bit() {
    let config = with(SHAPE, |c| {
        c.num_layers = 1;
        c.num_blocks = 33;
        c.block_size = 16;
        c.k_format = F32;
        c.v_format = F32;
    });
    let Some(cache) = cache(config) else { return };
    let mut rng = Rng::with_seed(5);
    let special = [0, 1, 0x8000_0000, 0x8000_0001, 0x007f_ffff, 0x7f7f_ffff, 0x7f80_0000, 0xff80_0000, 0x7fc0_0001];
    let values: Vec<f32> =
        (0..512 * 16).map(|i| f32::from_bits(special.get(i).copied().unwrap_or_else(|| rng.u32(..)))).collect();
    // A signalling NaN may become quiet on its way through a driver; all else is exact.
    let quiet = |x: &f32| if x.is_nan() { x.to_bits() | 0x0040_0000 } else { x.to_bits() };
    let (_, got) = round_trip(&cache, &values);
    let want: Vec<_> = values.iter().map(quiet).collect();
    assert_eq!(got.k.iter().map(quiet).collect::<Vec<_>>(), want);
    assert_eq!(got.v.iter().map(quiet).collect::<Vec<_>>(), want);
}

/// Every half, every midpoint of neighbours and the f32 on both sides of it; everything else at random.
#[test]
fn f16_rounds_to_nearest_even_and_saturates() {
    let config = KvCacheConfig::new(1, 1, 256).with_blocks(100, 16).with_formats(F16, F16);
    let Some(cache) = cache(config) else { return };
    let mut values = Vec::new();
    for half in 0..=0x7bff_u16 {
        let (low, high) = (half::f16::from_bits(half).to_f32(), half::f16::from_bits(half + 1).to_f32());
        // Above the largest half, the next one would be 65536.
        let middle = if high.is_finite() { (low + high) / 2.0 } else { 65520.0 };
        values.extend([low, -middle.next_down(), middle, -middle.next_up()]);
    }
    values.extend([65504.0, 65519.996, 65520.0, 65536.0, 1e10, f32::MAX, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE]);
    values.extend([1, 0x007f_ffff, 0x7f80_0001, 0x7fff_ffff].map(f32::from_bits));
    let mut rng = Rng::with_seed(11);
    values.resize_with((values.len() + 8192).next_multiple_of(256) - 128, || f32::from_bits(rng.u32(..)));
    let negated: Vec<_> = values.iter().rev().take(128).map(|x| -x).collect();
    values.extend(negated);

    let (sequence, got) = round_trip(&cache, &values);
    let table = cache.block_table(sequence).expect("table");
    let raw = bits(&cache.gpu().read_blocking(&cache.layer_buffers(0).expect("layer").0[0]).expect("read"));
    for (i, &value) in values.iter().enumerate() {
        let want = half::f16::from_f32(value);
        let want = if want.is_infinite() && value.is_finite() { half::f16::MAX.copysign(want) } else { want };
        let (token, dim) = (i / 256, i % 256);
        let row = table[token / 16].index() as usize * 16 + token % 16;
        let stored = half::f16::from_bits((raw[(row * 256 + dim) / 2] >> (16 * (dim % 2))) as u16);
        let what = format!("{value:e} ({:#010x}), K {:e}, V {:e}", value.to_bits(), got.k[i], got.v[i]);
        if value.is_nan() {
            assert!(stored.is_nan() && got.k[i].is_nan() && got.v[i].is_nan(), "{what}");
            continue;
        }
        assert_eq!(stored.to_bits(), want.to_bits(), "stored {stored:e}, want {want:e}: {what}");
        // The way back may flush subnormal halves to zero (not on CPU adapters).
        let flushed = stored.is_normal() || cache.gpu().adapter_info().device_type == wgpu::DeviceType::Cpu;
        for back in [got.k[i], got.v[i]] {
            let exact = back.to_bits() == want.to_f32().to_bits();
            assert!(exact || (!flushed && back == 0.0), "want {want:e}: {what}");
        }
    }
}

#[test]
fn an_empty_sequence_gathers_nothing() {
    let Some(cache) = cache(SHAPE) else { return };
    let empty = cache.create_sequence();
    assert_holds(&cache, empty, &[]);
    let mut encoder = encoder(&cache);
    let (k, v) = (upload(cache.gpu(), &[0.0; 4]), upload(cache.gpu(), &[0.0; 4]));
    assert_eq!(cache.record_gather(&mut encoder, empty, 0, &k, &v).expect("gather"), 0);
    assert_eq!(counts(&cache), (0, 0, 1));
}

#[test]
fn async_gather_completes_while_somebody_else_polls() {
    let Some(cache) = cache(SHAPE) else { return };
    let s = sequence(&cache, &[3, 1, 4, 1, 5]);
    let done = AtomicBool::new(false);
    let got = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                cache.gpu().device().poll(wgpu::PollType::Poll).expect("poll");
                std::thread::yield_now();
            }
        });
        let got = futures::executor::block_on(async { futures::join!(cache.gather(s, 0), cache.gather(s, 1)) });
        done.store(true, Ordering::Release);
        got
    });
    assert_eq!(got.0.expect("layer 0"), tokens::rows(&SHAPE, 0, &[3, 1, 4, 1, 5]));
    assert_eq!(got.1.expect("layer 1"), tokens::rows(&SHAPE, 1, &[3, 1, 4, 1, 5]));
}

#[test]
fn gather_writes_its_range_and_nothing_around_it() {
    let Some(cache) = cache(SHAPE) else { return };
    let gpu = cache.gpu();
    let want = [10, 11, 12, 13, 14, 15, 16];
    let s = sequence(&cache, &want);
    let align = u64::from(gpu.limits().min_storage_buffer_offset_alignment).max(16);
    let bytes = want.len() as u64 * 16 * 4;
    let (k_offset, v_offset) = (align * 3, align * (5 + bytes.div_ceil(align)));
    let len = (v_offset + bytes) as usize / 4 + 100;
    let rows = tokens::rows(&SHAPE, 1, &want);
    let expected = |parts: &[(u64, &[f32])]| {
        let mut all = vec![-7.0; len];
        for &(offset, part) in parts {
            all[offset as usize / 4..][..part.len()].copy_from_slice(part);
        }
        all
    };

    let (big_k, big_v, both) =
        (upload(gpu, &vec![-7.0; len]), upload(gpu, &vec![-7.0; len]), upload(gpu, &vec![-7.0; len]));
    let mut encoder = encoder(&cache);
    // The ranges may be larger than the rows, and of one buffer.
    let (k, v) = (BufferRef::new(&big_k, k_offset, bytes + 16), BufferRef::new(&big_v, v_offset, bytes));
    assert_eq!(cache.record_gather(&mut encoder, s, 1, k, v).expect("gather"), 7);
    let (k, v) = (both.slice(k_offset..k_offset + bytes), both.slice(v_offset..v_offset + bytes));
    assert_eq!(cache.record_gather(&mut encoder, s, 1, k, v).expect("gather"), 7);
    gpu.queue().submit([encoder.finish()]);

    assert_eq!(gpu.read_blocking(&big_k).expect("read"), expected(&[(k_offset, &rows.k)]));
    assert_eq!(gpu.read_blocking(&big_v).expect("read"), expected(&[(v_offset, &rows.v)]));
    assert_eq!(gpu.read_blocking(&both).expect("read"), expected(&[(k_offset, &rows.k), (v_offset, &rows.v)]));
}

#[test]
fn append_reads_ranges_at_offsets() {
    let Some(cache) = cache(with(SHAPE, |c| c.num_layers = 1)) else {
        return;
    };
    let gpu = cache.gpu();
    let s = cache.create_sequence();
    let new = tokens::rows(cache.config(), 0, &[8, 9, 10]);
    let align = u64::from(gpu.limits().min_storage_buffer_offset_alignment).max(16);
    let bytes = new.k.len() as u64 * 4;
    let (k_offset, v_offset) = (align, align * (2 + bytes.div_ceil(align)));
    let mut values = vec![f32::NAN; (v_offset + bytes) as usize / 4 + 64];
    values[k_offset as usize / 4..][..new.k.len()].copy_from_slice(&new.k);
    values[v_offset as usize / 4..][..new.v.len()].copy_from_slice(&new.v);
    let both = upload(gpu, &values);
    let step = cache.begin_step(&[(s, 3)]).expect("step");
    let mut encoder = encoder(&cache);
    let (k, v) = (BufferRef::new(&both, k_offset, bytes), BufferRef::new(&both, v_offset, bytes));
    cache.append(&mut encoder, &step, 0, k, v, None).expect("append");
    gpu.queue().submit([encoder.finish()]);
    cache.commit(step).expect("commit");
    assert_holds(&cache, s, &[8, 9, 10]);
}

#[test]
fn a_fork_shares_blocks_until_one_side_appends() {
    let Some(cache) = cache(SHAPE) else { return };
    let parent = sequence(&cache, &[1, 2, 3, 4, 5, 6]);
    assert_eq!(counts(&cache), (2, 0, 1));
    let fork = cache.fork(parent).expect("fork");
    assert_eq!(counts(&cache), (2, 2, 2));
    assert_eq!(cache.block_table(fork).unwrap(), cache.block_table(parent).unwrap());
    let before = cache.block_table(parent).unwrap();

    // The first to append gets a copy of the half-filled block; the other keeps the block, now its own.
    grow(&cache, &[(fork, &[70])]);
    assert_eq!(counts(&cache), (3, 1, 2));
    assert_ne!(cache.block_table(fork).unwrap()[1], before[1]);
    grow(&cache, &[(parent, &[7, 8, 9])]);
    assert_eq!(counts(&cache), (4, 1, 2));
    assert_eq!(cache.block_table(parent).unwrap()[..2], before);
    assert_holds(&cache, parent, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_holds(&cache, fork, &[1, 2, 3, 4, 5, 6, 70]);

    cache.free(parent).expect("free");
    assert_eq!(counts(&cache), (2, 0, 1));
    grow(&cache, &[(fork, &[71, 72, 73])]);
    assert_holds(&cache, fork, &[1, 2, 3, 4, 5, 6, 70, 71, 72, 73]);
    cache.free(fork).expect("free");
    assert_eq!(counts(&cache), (0, 0, 0));
}

#[test]
fn a_fork_in_the_middle_of_a_block_goes_on_by_itself() {
    let Some(cache) = cache(SHAPE) else { return };
    let s = sequence(&cache, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let (a, b) = (cache.fork_at(s, 6).expect("fork"), cache.fork_at(s, 3).expect("fork"));
    let c = cache.fork_at(a, 5).expect("fork of a fork");
    assert_eq!(counts(&cache), (3, 2, 4));
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6]);
    grow(&cache, &[(s, &[10]), (a, &[70, 71, 72]), (b, &[80]), (c, &[90])]);
    assert_holds(&cache, s, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6, 70, 71, 72]);
    assert_holds(&cache, b, &[1, 2, 3, 80]);
    assert_holds(&cache, c, &[1, 2, 3, 4, 5, 90]);
    // [1-4] [5-8] [9 10]; a: [5 6 70 71] [72]; b: [1 2 3 80]; c: [5 90].
    assert_eq!(counts(&cache), (7, 1, 4));
}

#[test]
fn a_matched_prefix_holds_its_rows_and_is_not_written_to() {
    let Some(cache) = cache(SHAPE) else { return };
    let tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
    let s = sequence(&cache, &tokens);
    assert_eq!(cache.publish_prefix(s, &tokens, 0).expect("publish"), 2);
    // Back into an indexed block, and on with other tokens.
    cache.truncate(s, 6).expect("truncate");
    grow(&cache, &[(s, &[70, 71])]);
    assert_holds(&cache, s, &[1, 2, 3, 4, 5, 6, 70, 71]);
    cache.free(s).expect("free");
    assert_eq!((cache.usage().reclaimable, cache.usage().free), (2, 14));

    let hit = cache.match_prefix(&[1, 2, 3, 4, 5, 6, 7, 8, 20], 0);
    assert_eq!(hit.len, 8);
    assert_holds(&cache, hit.sequence, &tokens[..8]);
    let step = begin(&cache, &[(hit.sequence, &[20, 21])]);
    assert_eq!(step.num_copies(), 0);
    run(&cache, &step, &[20, 21]);
    cache.commit(step).expect("commit");
    assert_holds(&cache, hit.sequence, &[1, 2, 3, 4, 5, 6, 7, 8, 20, 21]);
    cache.truncate(hit.sequence, 5).expect("truncate");
    grow(&cache, &[(hit.sequence, &[30])]);
    assert_holds(&cache, hit.sequence, &[1, 2, 3, 4, 5, 30]);

    // A step that needs the room gets it, the end of the prefix first; what is left is as it was.
    cache.free(hit.sequence).expect("free");
    let large = cache.create_sequence();
    let new: Vec<u32> = (100..160).collect();
    grow(&cache, &[(large, &new)]);
    assert_eq!((cache.usage().reclaimable, cache.prefix_stats().evicted_blocks), (1, 1));
    let rest = cache.match_prefix(&tokens, 0);
    assert_holds(&cache, rest.sequence, &tokens[..4]);
    assert_holds(&cache, large, &new);
    let error = cache.begin_step(&[(rest.sequence, 1)]).expect_err("the pool is full");
    assert!(matches!(error, Error::OutOfBlocks { need: 1, free: 0, total: 16 }), "{error}");
}

/// Of a long sequence, a fork and a matched prefix cost the GPU one block's copy at most, and that only with the next tokens.
#[test]
fn forks_and_matches_of_32k_tokens_copy_at_most_one_block() {
    let shape = with(SHAPE, |c| {
        c.num_layers = 1;
        c.num_kv_heads = 1;
        c.block_size = 16;
        c.num_blocks = 2100;
    });
    let Some(cache) = cache(shape) else { return };
    let tokens: Vec<u32> = (0..32_768).collect();
    let s = cache.create_sequence();
    cache.commit(cache.begin_step(&[(s, 32_768)]).expect("step")).expect("commit");
    cache.publish_prefix(s, &tokens, 0).expect("publish");
    let whole = cache.fork(s).expect("fork");
    let within = cache.fork_at(s, 32_759).expect("fork");
    let hit = cache.match_prefix(&tokens[..32_767], 0);
    assert_eq!((hit.len, cache.usage().used), (32_752, 2048));
    for (sequence, copies) in [(whole, 0), (within, 1), (hit.sequence, 0)] {
        assert_eq!(cache.begin_step(&[(sequence, 16)]).expect("step").num_copies(), copies);
    }
}

#[test]
fn a_fork_at_a_block_boundary_copies_nothing() {
    let Some(cache) = cache(SHAPE) else { return };
    let parent = sequence(&cache, &[1, 2, 3, 4]);
    let fork = cache.fork(parent).expect("fork");
    grow(&cache, &[(fork, &[50]), (parent, &[5])]);
    assert_eq!(counts(&cache), (3, 1, 2));
    assert_holds(&cache, parent, &[1, 2, 3, 4, 5]);
    assert_holds(&cache, fork, &[1, 2, 3, 4, 50]);
}

#[test]
fn forks_of_forks_keep_their_own_tokens() {
    let Some(cache) = cache(SHAPE) else { return };
    let a = sequence(&cache, &[1, 2, 3, 4, 5, 6]);
    let b = cache.fork(a).expect("fork");
    grow(&cache, &[(b, &[20])]);
    let c = cache.fork(b).expect("fork");
    // Blocks: [1-4] of all three, [5 6] of a, [5 6 20] of b and c.
    assert_eq!(counts(&cache), (3, 2, 3));
    grow(&cache, &[(c, &[30, 31, 32])]);
    assert_eq!(counts(&cache), (5, 1, 3));
    let d = cache.fork(c).expect("fork");
    cache.free(a).expect("free");
    cache.free(c).expect("free");
    // [1-4] of b and d, [5 6 20] of b, [5 6 20 30] and [31 32] of d.
    assert_eq!(counts(&cache), (4, 1, 2));
    grow(&cache, &[(d, &[40]), (b, &[21, 22])]);
    assert_eq!(counts(&cache), (5, 1, 2));
    assert_holds(&cache, b, &[1, 2, 3, 4, 5, 6, 20, 21, 22]);
    assert_holds(&cache, d, &[1, 2, 3, 4, 5, 6, 20, 30, 31, 32, 40]);
}

#[test]
fn of_forks_that_append_in_one_step_the_last_writes_in_place() {
    let Some(cache) = cache(SHAPE) else { return };
    let p = sequence(&cache, &[1, 2, 3, 4, 5, 6]);
    let (a, b) = (cache.fork(p).expect("fork"), cache.fork(p).expect("fork"));
    let before = cache.block_table(p).unwrap();
    assert_eq!(counts(&cache), (2, 2, 3));
    let step = begin(&cache, &[(a, &[70]), (p, &[71, 72, 73]), (b, &[74])]);
    // A copy for a, a copy and a new block for p. All three still hold the old block.
    assert_eq!(counts(&cache), (5, 2, 3));
    run(&cache, &step, &[70, 71, 72, 73, 74]);
    cache.commit(step).expect("commit");
    assert_eq!(counts(&cache), (5, 1, 3));
    assert_eq!(cache.block_table(b).unwrap(), before);
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6, 70]);
    assert_holds(&cache, p, &[1, 2, 3, 4, 5, 6, 71, 72, 73]);
    assert_holds(&cache, b, &[1, 2, 3, 4, 5, 6, 74]);
}

/// The step's writes reach the GPU, then it is dropped: who holds a block keeps all of its tokens in it.
#[test]
fn a_submitted_and_dropped_step_spares_a_longer_holder_of_the_same_block() {
    let Some(cache) = cache(SHAPE) else { return };
    let long = sequence(&cache, &[1, 2, 3, 4, 5, 6, 7]);
    let short = cache.fork(long).expect("fork");
    cache.truncate(short, 5).expect("truncate");
    for batch in [[(long, &[80][..]), (short, &[60, 61])], [(short, &[60, 61][..]), (long, &[80])]] {
        let before = state(&cache, &[long, short]);
        let step = begin(&cache, &batch);
        run(&cache, &step, &[batch[0].1, batch[1].1].concat());
        drop(step);
        assert_eq!(state(&cache, &[long, short]), before);
        assert_holds(&cache, long, &[1, 2, 3, 4, 5, 6, 7]);
        assert_holds(&cache, short, &[1, 2, 3, 4, 5]);
    }
    grow(&cache, &[(long, &[80]), (short, &[60, 61])]);
    assert_holds(&cache, long, &[1, 2, 3, 4, 5, 6, 7, 80]);
    assert_holds(&cache, short, &[1, 2, 3, 4, 5, 60, 61]);
    assert_eq!(counts(&cache), (3, 1, 2));
}

#[test]
fn truncated_tokens_are_replaced_and_forks_keep_theirs() {
    let Some(cache) = cache(SHAPE) else { return };
    let s = sequence(&cache, &[1, 2, 3, 4, 5]);
    let kept = cache.fork(s).expect("fork");
    // Four speculative tokens, of which one is accepted.
    grow(&cache, &[(s, &[90, 91, 92, 93])]);
    assert_eq!(counts(&cache), (4, 1, 2));
    cache.truncate(s, 6).expect("truncate");
    assert_eq!(counts(&cache), (3, 1, 2));
    assert_holds(&cache, s, &[1, 2, 3, 4, 5, 90]);
    grow(&cache, &[(s, &[6, 7, 8, 9])]);
    assert_holds(&cache, s, &[1, 2, 3, 4, 5, 90, 6, 7, 8, 9]);
    // Into a block that is full and shared: its first half stays common.
    cache.truncate(s, 2).expect("truncate");
    assert_eq!(counts(&cache), (2, 1, 2));
    grow(&cache, &[(s, &[30, 31, 32])]);
    assert_eq!(counts(&cache), (4, 0, 2));
    assert_holds(&cache, s, &[1, 2, 30, 31, 32]);
    assert_holds(&cache, kept, &[1, 2, 3, 4, 5]);

    cache.truncate(s, 5).expect("to its own length");
    assert_holds(&cache, s, &[1, 2, 30, 31, 32]);
    cache.truncate(s, 0).expect("truncate");
    assert_holds(&cache, s, &[]);
    assert_eq!(counts(&cache), (2, 0, 2));
    grow(&cache, &[(s, &[40])]);
    assert_holds(&cache, s, &[40]);
}

#[test]
fn a_dropped_step_leaves_everything_as_it_was() {
    let Some(cache) = cache(SHAPE) else { return };
    let a = sequence(&cache, &[1, 2, 3, 4, 5, 6]);
    let b = cache.fork(a).expect("fork");
    let c = cache.create_sequence();
    let before = state(&cache, &[a, b, c]);
    let batch: [(_, &[u32]); 3] = [(a, &[50, 51, 52]), (b, &[53]), (c, &[54, 55, 56, 57, 58])];
    let mut tables = Vec::new();
    for submitted in [false, true] {
        let step = begin(&cache, &batch);
        tables.push(step.batch().tables.clone());
        if submitted {
            run(&cache, &step, &[50, 51, 52, 53, 54, 55, 56, 57, 58]);
        }
        drop(step);
        assert_eq!(state(&cache, &[a, b, c]), before);
        assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6]);
        assert_holds(&cache, b, &[1, 2, 3, 4, 5, 6]);
        assert_holds(&cache, c, &[]);
    }
    // The next step takes the same blocks again.
    assert_eq!(tables[0], tables[1]);
    grow(&cache, &batch);
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6, 50, 51, 52]);
    assert_holds(&cache, b, &[1, 2, 3, 4, 5, 6, 53]);
    assert_holds(&cache, c, &[54, 55, 56, 57, 58]);
}

#[test]
fn a_full_pool_changes_nothing_and_works_after_freeing() {
    let Some(cache) = cache(with(SHAPE, |c| c.num_blocks = 4)) else {
        return;
    };
    let a = sequence(&cache, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    let b = cache.create_sequence();
    let fork = cache.fork(a).expect("fork");
    let before = state(&cache, &[a, b, fork]);
    // (requests, blocks needed): a's copy counts, and of the two forks only one needs a copy.
    for (batch, want) in [
        (vec![(b, 5)], 2),
        (vec![(a, 2), (b, 4)], 2),
        (vec![(a, 3)], 2),
        (vec![(a, 1), (fork, 1), (b, 1)], 2),
        (vec![(b, i32::MAX as u32)], 1 << 29),
    ] {
        let error = cache.begin_step(&batch).expect_err("the pool is full");
        assert_eq!(error.kind(), ErrorKind::Retry);
        assert!(matches!(error, Error::OutOfBlocks { need, free: 1, total: 4 } if need == want), "{batch:?}: {error}");
        assert_eq!(state(&cache, &[a, b, fork]), before);
    }
    grow(&cache, &[(b, &[20, 21, 22, 23])]);
    cache.begin_step(&[(fork, 1)]).expect_err("the pool is full");
    cache.free(b).expect("free");
    grow(&cache, &[(fork, &[30, 31])]);
    cache.free(a).expect("free");
    grow(&cache, &[(fork, &[32, 33, 34])]);
    assert_holds(&cache, fork, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 30, 31, 32, 33, 34]);
}

#[test]
fn two_open_steps_share_an_encoder_and_a_submit() {
    let Some(cache) = cache(SHAPE) else { return };
    let a = sequence(&cache, &[1, 2, 3, 4, 5, 6]);
    let b = cache.fork(a).expect("fork");
    let first = begin(&cache, &[(a, &[50, 51, 52])]);
    let second = begin(&cache, &[(b, &[60])]);
    // Both took a copy: while neither has committed, the block is shared.
    assert_eq!(counts(&cache), (5, 2, 2));
    let mut encoder = encoder(&cache);
    record(&cache, &mut encoder, &first, &[50, 51, 52]);
    record(&cache, &mut encoder, &second, &[60]);
    cache.gpu().queue().submit([encoder.finish()]);
    // Commits need not come in the order of the steps.
    cache.commit(second).expect("commit");
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6]);
    cache.commit(first).expect("commit");
    assert_eq!(counts(&cache), (4, 1, 2));
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6, 50, 51, 52]);
    assert_holds(&cache, b, &[1, 2, 3, 4, 5, 6, 60]);
}

#[test]
fn steps_of_one_sequence_committed_before_a_common_submit_keep_their_own_uploads() {
    let Some(cache) = cache(SHAPE) else { return };
    let s = sequence(&cache, &[1, 2]);
    let mut encoder = encoder(&cache);
    let mut want = vec![1, 2];
    for tokens in [&[10, 11, 12][..], &[13], &[14, 15, 16, 17, 18, 19]] {
        let step = begin(&cache, &[(s, tokens)]);
        record(&cache, &mut encoder, &step, tokens);
        cache.commit(step).expect("commit");
        want.extend_from_slice(tokens);
    }
    // A fork of what is not even submitted yet, and its copy-on-write, in the same encoder.
    let fork = cache.fork(s).expect("fork");
    cache.truncate(fork, 11).expect("truncate");
    let step = begin(&cache, &[(fork, &[30])]);
    record(&cache, &mut encoder, &step, &[30]);
    cache.commit(step).expect("commit");
    cache.gpu().queue().submit([encoder.finish()]);
    assert_holds(&cache, s, &want);
    want.truncate(11);
    want.push(30);
    assert_holds(&cache, fork, &want);
}

#[test]
fn a_block_freed_before_the_submit_serves_the_next_sequence() {
    let Some(cache) = cache(with(SHAPE, |c| c.num_blocks = 2)) else {
        return;
    };
    let (a, b) = (cache.create_sequence(), cache.create_sequence());
    let mut encoder = encoder(&cache);
    let first = begin(&cache, &[(a, &[1, 2, 3, 4, 5, 6, 7])]);
    record(&cache, &mut encoder, &first, &[1, 2, 3, 4, 5, 6, 7]);
    cache.commit(first).expect("commit");
    cache.free(a).expect("free");
    let second = begin(&cache, &[(b, &[20, 21, 22, 23, 24])]);
    record(&cache, &mut encoder, &second, &[20, 21, 22, 23, 24]);
    cache.gpu().queue().submit([encoder.finish()]);
    cache.commit(second).expect("commit");
    assert_holds(&cache, b, &[20, 21, 22, 23, 24]);
}

#[test]
fn uploads_serve_many_steps() {
    let Some(cache) = cache(with(SHAPE, |c| c.num_blocks = 64)) else {
        return;
    };
    let sequences = [cache.create_sequence(), cache.create_sequence()];
    let mut want = [Vec::new(), Vec::new()];
    for round in 0..40_u32 {
        let tokens: Vec<Vec<u32>> =
            (0..2).map(|i| (0..=(round + i) % 4).map(|j| round * 8 + i * 4 + j).collect()).collect();
        grow(&cache, &[(sequences[0], &tokens[0]), (sequences[1], &tokens[1])]);
        want[0].extend_from_slice(&tokens[0]);
        want[1].extend_from_slice(&tokens[1]);
    }
    assert_holds(&cache, sequences[0], &want[0]);
    assert_holds(&cache, sequences[1], &want[1]);
}

#[test]
fn clear_ends_every_sequence_and_open_step() {
    let Some(cache) = cache(SHAPE) else { return };
    let a = sequence(&cache, &[1, 2, 3, 4, 5]);
    let fork = cache.fork(a).expect("fork");
    let (dropped, committed) = (begin(&cache, &[(a, &[6, 7])]), begin(&cache, &[(fork, &[8])]));
    cache.clear();
    assert_eq!(counts(&cache), (0, 0, 0));
    for old in [a, fork] {
        assert!(matches!(cache.seq_len(old), Err(Error::UnknownSequence(s)) if s == old));
    }
    let b = sequence(&cache, &[20, 21, 22, 23, 24, 25]);
    assert_ne!(b, a);
    assert_eq!(counts(&cache), (2, 0, 1));
    // What is left of the old steps gives no block back, and takes none.
    drop(dropped);
    assert!(matches!(cache.commit(committed), Err(Error::Stale { .. })));
    assert_eq!(counts(&cache), (2, 0, 1));
    grow(&cache, &[(b, &[26, 27, 28])]);
    assert_holds(&cache, b, &[20, 21, 22, 23, 24, 25, 26, 27, 28]);
}

#[test]
fn warm_up_changes_no_byte() {
    let Some(cache) = cache(SHAPE) else { return };
    let s = sequence(&cache, &[1, 2, 3, 4, 5]);
    let before: Vec<_> = [0, 1].map(|layer| bits(&raw(&cache, layer))).into();
    cache.warm_up().expect("warm up");
    assert_eq!([0, 1].map(|layer| bits(&raw(&cache, layer))).to_vec(), before);
    assert_holds(&cache, s, &[1, 2, 3, 4, 5]);
}

/// All bytes of a layer.
fn raw(cache: &KvCache, layer: u32) -> Vec<f32> {
    let (k, v) = cache.layer_buffers(layer).expect("layer");
    [cache.gpu().read_blocking(&k[0]).expect("K"), cache.gpu().read_blocking(&v[0]).expect("V")].concat()
}

/// Formats are told apart by size: the layer buffers hold exactly the pool.
#[test]
fn layer_buffers_have_the_sizes_of_their_formats() {
    let Some(cache) = cache(SHAPE) else { return };
    let (k, v) = cache.layer_buffers(1).expect("layer");
    let elements = 16 * 4 * 2 * 8;
    let bytes = |format: KvFormat| u64::from(format.element_bits()) / 8 * elements;
    assert_eq!((k[0].size(), v[0].size()), (bytes(F32), bytes(F16)));
}

/// Every number by hand.
#[test]
fn the_memory_report_adds_up() {
    // K 192 and V 96 bytes per token and layer.
    let shape = with(SHAPE, |c| {
        c.num_layers = 2;
        c.num_kv_heads = 2;
        c.head_dim = 24;
        c.block_size = 16;
        c.num_blocks = 20;
    });
    let Some(cache) = cache(shape.with_formats(F32, F16)) else { return };
    let (token, block) = (2 * (192 + 96), 2 * (192 + 96) * 16);
    let empty = cache.memory();
    assert_eq!((empty.allocated_bytes(), empty.used_bytes(), empty.wasted_bytes()), (20 * block, 0, 0));
    assert_eq!((empty.utilisation(), empty.sequences.len()), (1.0, 0));

    let extend = |sequence, len| {
        let step = cache.begin_step(&[(sequence, len)]).expect("step");
        cache.commit(step).expect("commit");
    };
    // 40 tokens in 3 blocks; a fork that copies the third to go on to 50 in 4; 16 in one full block.
    let a = cache.create_sequence();
    extend(a, 40);
    let b = cache.fork(a).expect("fork");
    assert_eq!((cache.memory().usage.shared, cache.memory().saved_bytes()), (3, 40 * token));
    extend(b, 10);
    let c = cache.create_sequence();
    extend(c, 16);

    let report = cache.memory();
    assert_eq!((report.block_size, report.block_bytes, report.token_bytes), (16, block, token));
    assert_eq!((report.usage.used, report.usage.shared, report.reserved_blocks), (6, 2, 0));
    // 32 shared, 8 of a, 18 of b, 16 of c.
    assert_eq!((report.cached_tokens, report.sequence_tokens), (74, 106));
    assert_eq!(report.used_bytes(), 6 * block);
    assert_eq!(report.shared_bytes(), 2 * block);
    assert_eq!(report.saved_bytes(), 32 * token);
    assert_eq!(report.wasted_bytes(), 22 * token);
    assert!((report.utilisation() - 74.0 / 96.0).abs() < 1e-12);
    let rows: Vec<_> = report
        .sequences
        .iter()
        .map(|s| (s.sequence, s.len, s.blocks, s.shared_blocks, s.bytes, s.wasted_bytes, s.next_token_bytes))
        .collect();
    assert_eq!(
        rows,
        [
            (a, 40, 3, 2, 3 * block, 8 * token, 0),
            (b, 50, 4, 2, 4 * block, 14 * token, 0),
            (c, 16, 1, 0, block, 0, block),
        ]
    );
    assert_lines(
        &report,
        &[
            "allocated 20 180.0 KiB",
            "free 14 126.0 KiB",
            "used 6 54.0 KiB 77 % of their slots hold a token",
            "shared 2 18.0 KiB saves 18.0 KiB",
            "wasted 12.4 KiB in last blocks",
            "a token 576 B 9216 B per block of 16 tokens",
            "tokens blocks shared bytes wasted next token",
            &format!("{a} 40 3 2 27.0 KiB 4608 B 0 B"),
            "sum 106 8 4 72.0 KiB 12.4 KiB 9216 B",
            "counted once 74 6 2 54.0 KiB 12.4 KiB 9216 B",
        ],
    );

    // What an open step reserves is used, and belongs to nobody yet.
    let step = cache.begin_step(&[(c, 20)]).expect("step");
    let open = cache.memory();
    assert_eq!((open.usage.used, open.reserved_blocks, open.cached_tokens), (8, 2, 74));
    assert_eq!(open.wasted_bytes(), report.wasted_bytes());
    assert_lines(&open, &["reserved 2 18.0 KiB by open steps"]);
    drop(step);
    assert_eq!(cache.memory(), report);

    // The index holds a's two full blocks and b's third. Of these b's is only the index's when b is gone.
    let tokens: Vec<u32> = (0..50).collect();
    assert_eq!(cache.publish_prefix(a, &tokens[..40], 0).expect("publish"), 2);
    assert_eq!(cache.publish_prefix(b, &tokens, 0).expect("publish"), 1);
    cache.free(b).expect("free");
    let hit = cache.match_prefix(&tokens[..40], 0).sequence;
    cache.match_prefix(&tokens[..10], 0);
    cache.truncate(hit, 20).expect("truncate");
    let report = cache.memory();
    let PoolUsage { free, used, shared, reclaimable, .. } = report.usage;
    assert_eq!((free, used, shared, reclaimable, report.reserved_blocks), (15, 5, 2, 1, 0));
    assert_eq!((report.reclaimable_bytes(), report.free_bytes()), (block, 15 * block));
    // 40 of a, with hit's 20 among them, and 16 of c, in 4 blocks.
    assert_eq!((report.sequence_blocks(), report.cached_tokens, report.sequence_tokens), (4, 56, 76));
    assert_eq!((report.wasted_bytes(), report.saved_bytes()), (8 * token, 20 * token));
    assert!((report.utilisation() - 72.0 / 80.0).abs() < 1e-12);
    // Its next token would be written into an indexed block.
    assert_eq!(report.sequences[2].next_token_bytes, block);
    assert_lines(
        &report,
        &[
            "indexed 3 27.0 KiB 64 % of 50 queried tokens were found",
            "reclaimable 1 9216 B only indexed; 0 evicted so far",
            "used 5 45.0 KiB 90 % of their slots hold a token",
            &format!("{hit} 20 2 2 18.0 KiB 6912 B 9216 B"),
            "counted once 56 4 2 36.0 KiB 4608 B 27.0 KiB",
        ],
    );
}

/// Whether the printed report has these lines, however it is aligned, and its columns line up.
#[track_caller]
fn assert_lines(report: &folio::MemoryReport, lines: &[&str]) {
    let text = report.to_string();
    let got: Vec<String> = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for line in lines {
        assert!(got.iter().any(|l| l == line), "{line:?} in\n{text}");
    }
    let (_, table) = text.split_once("\n\n").expect("a table of the sequences");
    let widths: Vec<_> = table.lines().map(str::len).collect();
    assert!(widths.iter().all(|width| *width == widths[0]), "{widths:?}\n{text}");
}

//! Sequences move: to host memory and back, into files, to the front of the pool.

use crate::common::with;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};

use fastrand::Rng;
use folio::KvFormat::{E4M3, F16, F32, Int4, Int4PerChannel, Int8};
use folio::{
    Attention, AttentionConfig, BlockId, Error, ErrorKind, Gpu, KvCache, KvCacheConfig, KvRows, PoolUsage, SequenceId,
    SequenceSnapshot,
};

use crate::adapter::{self, CPU, DEFAULT, GPU, Open};
use crate::bad_input::refused;
use crate::case::{poison, shuffle, upload};
use crate::tokens::{self, SHAPE, assert_holds, begin, encoder, grow, run, sequence};

/// A cache full of NaN, with a shuffled free list.
fn cache_of(gpu: &Gpu, config: KvCacheConfig, seed: u64) -> KvCache {
    let cache = KvCache::new_blocking(gpu, config).expect("cache");
    poison(&cache);
    if config.k_format.has_channel_scales() {
        let row = (config.num_kv_heads * config.head_dim) as usize;
        let keys = [vec![-2.0; row], vec![2.0; row]].concat();
        (0..config.num_layers).for_each(|layer| cache.calibrate_keys(layer, &keys).expect("scales"));
    }
    shuffle(&cache, seed);
    cache
}

fn submit(cache: &KvCache, encoder: folio::wgpu::CommandEncoder) {
    cache.gpu().queue().submit([encoder.finish()]);
}

fn snapshot(cache: &KvCache, sequence: SequenceId) -> SequenceSnapshot {
    let mut encoder = encoder(cache);
    let pending = cache.record_snapshot(&mut encoder, sequence).expect("snapshot");
    submit(cache, encoder);
    cache.gpu().block_on(pending.read()).expect("read")
}

pub(crate) fn swap_out(cache: &KvCache, sequence: SequenceId) -> SequenceSnapshot {
    let mut encoder = encoder(cache);
    let swap = cache.swap_out(&mut encoder, sequence).expect("swap out");
    submit(cache, encoder);
    cache.gpu().block_on(swap.finish()).expect("finish")
}

pub(crate) fn swap_in(cache: &KvCache, snapshot: &SequenceSnapshot) -> SequenceId {
    let mut encoder = encoder(cache);
    let swap = cache.swap_in(&mut encoder, snapshot).expect("swap in");
    submit(cache, encoder);
    swap.commit().expect("commit")
}

/// Everything that a refused or dropped call must leave alone.
fn state(cache: &KvCache, sequences: &[SequenceId]) -> (PoolUsage, Vec<(u32, Vec<BlockId>)>) {
    let of = |&s: &SequenceId| (cache.seq_len(s).expect("length"), cache.block_table(s).expect("table"));
    (cache.usage(), sequences.iter().map(of).collect())
}

fn bits(rows: &KvRows) -> Vec<u32> {
    rows.k.iter().chain(&rows.v).map(|x| x.to_bits()).collect()
}

/// All layers, bit by bit.
fn contents(cache: &KvCache, sequence: SequenceId) -> Vec<Vec<u32>> {
    let layer = |layer| bits(&cache.gather_blocking(sequence, layer).expect("gather"));
    (0..cache.config().num_layers).map(layer).collect()
}

/// What the newest token sees: a step that appends it, attends, and is dropped.
fn attend(cache: &KvCache, sequence: SequenceId) -> Vec<u32> {
    let config = cache.config();
    let attention = Attention::new_blocking(cache, AttentionConfig::new(config.num_kv_heads * 2)).expect("attention");
    let step = cache.begin_step(&[(sequence, 1)]).expect("step");
    let plan = attention.plan(&step).expect("plan");
    let elements = (config.num_kv_heads * config.head_dim) as usize;
    let values = |n: usize| (0..n).map(|i| (i * 37 % 64) as f32 / 32.0 - 1.0).collect::<Vec<_>>();
    let (kv, q) = (upload(cache.gpu(), &values(elements)), upload(cache.gpu(), &values(2 * elements)));
    let out = upload(cache.gpu(), &vec![f32::NAN; 2 * elements]);
    let mut encoder = encoder(cache);
    let layer = config.num_layers - 1;
    cache.append(&mut encoder, &step, layer, &kv, &kv, None).expect("append");
    attention.attend(&mut encoder, &plan, layer, &q, &out).expect("attend");
    submit(cache, encoder);
    let out = cache.gpu().read_blocking(&out).expect("out");
    assert!(out.iter().all(|x| x.is_finite()), "{out:?}");
    out.iter().map(|x| x.to_bits()).collect()
}

/// A sequence of random bits that grew in steps of random lengths beside another one, so that its blocks are scattered.
fn scattered(cache: &KvCache, len: u32, rng: &mut Rng) -> (SequenceId, SequenceId) {
    let config = cache.config();
    let (a, b) = (cache.create_sequence(), cache.create_sequence());
    while cache.seq_len(a).expect("length") < len {
        let turn = rng.u32(1..=config.block_size + 2).min(len - cache.seq_len(a).expect("length"));
        let step = cache.begin_step(&[(a, turn), (b, 1)]).expect("step");
        let mut encoder = encoder(cache);
        for layer in 0..config.num_layers {
            let count = (turn + 1) * config.num_kv_heads * config.head_dim;
            let mut values = || (0..count).map(|_| rng.f32() * 4.0 - 2.0).collect::<Vec<_>>();
            let (k, v) = (upload(cache.gpu(), &values()), upload(cache.gpu(), &values()));
            cache.append(&mut encoder, &step, layer, &k, &v, None).expect("append");
        }
        submit(cache, encoder);
        cache.commit(step).expect("commit");
    }
    (a, b)
}

#[test]
fn every_shape_comes_back_bit_by_bit_at_other_blocks() {
    // The profiles choose differently between the kernel and copy commands. With small bindings, the sides of the last shape are cut.
    let cut = |how| Open { max_binding_bytes: Some(4 << 20), ..how };
    for how in [CPU, GPU, cut(CPU), cut(GPU)] {
        let Some(gpu) = adapter::open(how) else { return };
        every_shape(&gpu);
    }
}

fn every_shape(gpu: &Gpu) {
    let mut rng = Rng::with_seed(21);
    for (block_size, num_kv_heads, head_dim, k_format, v_format) in [
        (1, 1, 8, F16, F32),
        (5, 3, 24, F32, F16),
        (16, 2, 40, F32, F32),
        (16, 2, 40, Int8, Int4),
        (5, 3, 24, Int4PerChannel, E4M3),
        (64, 2, 64, F16, F16),
    ] {
        let shape =
            KvCacheConfig::new(3, num_kv_heads, head_dim).with_blocks(0, block_size).with_formats(k_format, v_format);
        let len = 3 * block_size + 1 + rng.u32(0..block_size);
        let config = with(shape, |c| c.num_blocks = 2 * len + 4);
        let cache = cache_of(gpu, config, 5);
        let is_cut = config.k_layout().side_bytes(config.num_blocks).expect("bytes") > gpu.max_storage_bytes();
        assert_eq!(cache.segments()[0].count > 1, is_cut);
        let (a, other) = scattered(&cache, len, &mut rng);
        let (table, want, seen) = (cache.block_table(a).expect("table"), contents(&cache, a), attend(&cache, a));
        let (other_state, other_want) = (state(&cache, &[other]).1, contents(&cache, other));

        let kept = snapshot(&cache, a);
        assert_eq!((kept.len(), kept.config().num_blocks), (len, table.len() as u32));
        assert_eq!(kept.num_bytes(), config.block_bytes() * table.len() as u64);
        assert_eq!(contents(&cache, a), want, "a snapshot changes nothing");
        let swapped = swap_out(&cache, a);
        assert!(swapped == kept, "both are the same sequence");
        refused(cache.seq_len(a), ErrorKind::Caller, &["is not in this cache"]);

        // Somebody takes the blocks that were freed.
        let taker = cache.create_sequence();
        let step = cache.begin_step(&[(taker, 1)]).expect("step");
        cache.commit(step).expect("commit");
        let back = swap_in(&cache, &swapped);
        assert_ne!(cache.block_table(back).expect("table"), table);
        assert_eq!(contents(&cache, back), want);
        assert_eq!(attend(&cache, back), seen);
        assert_eq!((state(&cache, &[other]).1, contents(&cache, other)), (other_state, other_want));
        assert!(snapshot(&cache, back) == kept, "what is unused is zero, wherever the blocks lie");

        // Into another cache, of another size, twice.
        let second = cache_of(gpu, with(shape, |c| c.num_blocks = 2 * table.len() as u32 + 1), 6);
        for _ in 0..2 {
            let copy = swap_in(&second, &swapped);
            assert_eq!(contents(&second, copy), want);
            assert_eq!(attend(&second, copy), seen);
        }
    }
}

/// More than one chunk of 16 MiB, and blocks that don't fit its end.
#[test]
fn a_long_sequence_moves_in_several_chunks() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let config = KvCacheConfig::new(3, 4, 128).with_blocks(230, 24).with_formats(F32, F16);
    let cache = cache_of(&gpu, config, 9);
    let s = cache.create_sequence();
    let tokens: Vec<u32> = (0..5000).collect();
    for tokens in tokens.chunks(1250) {
        grow(&cache, &[(s, tokens)]);
    }
    let snapshot = swap_out(&cache, s);
    assert!(snapshot.num_bytes() > 2 << 24);
    let back = swap_in(&cache, &snapshot);
    assert_holds(&cache, back, &tokens);
}

#[test]
fn a_sequence_comes_back_under_its_own_id() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let (cache, other) = (cache_of(&gpu, SHAPE, 3), cache_of(&gpu, SHAPE, 4));
    let a = sequence(&cache, &[1, 2, 3, 4, 5, 6]);
    let taken = snapshot(&cache, a);
    let swapped = swap_out(&cache, a);
    let restore = |cache: &KvCache, snapshot: &SequenceSnapshot| {
        let before = cache.usage();
        let mut commands = encoder(cache);
        let swap = cache.swap_in(&mut commands, snapshot).expect("swap in");
        submit(cache, commands);
        swap.restore().inspect_err(|_| assert_eq!(cache.usage(), before))
    };
    refused(restore(&cache, &taken), ErrorKind::Caller, &["snapshot: got one that was not swapped out"]);
    refused(restore(&other, &swapped), ErrorKind::Caller, &["of another cache"]);
    assert_eq!(restore(&cache, &swapped).expect("gone"), a);
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6]);
    refused(restore(&cache, &swapped), ErrorKind::Caller, &["which has come back already"]);
    grow(&cache, &[(a, &[7])]);
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn shared_blocks_stay_with_those_that_hold_them() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache_of(&gpu, SHAPE, 3);
    let a = sequence(&cache, &[1, 2, 3, 4, 5, 6]);
    let b = cache.fork(a).expect("fork");
    grow(&cache, &[(b, &[7])]);
    let snapshot = swap_out(&cache, a);
    assert_eq!(usage(&cache), [16, 14, 2, 0, 0, 1]);
    assert_holds(&cache, b, &[1, 2, 3, 4, 5, 6, 7]);
    let back = swap_in(&cache, &snapshot);
    assert_eq!(usage(&cache), [16, 12, 4, 0, 0, 2]);
    grow(&cache, &[(back, &[8, 9, 10]), (b, &[11, 12])]);
    let fork = cache.fork(back).expect("fork");
    cache.truncate(fork, 5).expect("truncate");
    assert_holds(&cache, back, &[1, 2, 3, 4, 5, 6, 8, 9, 10]);
    assert_holds(&cache, fork, &[1, 2, 3, 4, 5]);
    assert_holds(&cache, b, &[1, 2, 3, 4, 5, 6, 7, 11, 12]);
}

/// Snapshot, steps and swap of one encoder see each other's work in the order of recording.
#[test]
fn others_go_on_between_swap_out_and_finish() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache_of(&gpu, SHAPE, 4);
    let (a, b) = (sequence(&cache, &[1, 2, 3, 4, 5]), sequence(&cache, &[6]));
    let fork = cache.fork(a).expect("fork");
    let mut commands = encoder(&cache);
    let swap = cache.swap_out(&mut commands, a).expect("swap out");
    assert_eq!(swap.sequence(), a);
    // Recorded behind it, into the block that both share.
    let step = begin(&cache, &[(fork, &[20]), (b, &[21, 22])]);
    tokens::record(&cache, &mut commands, &step, &[20, 21, 22]);
    submit(&cache, commands);
    cache.commit(step).expect("commit");
    let before = state(&cache, &[a, b, fork]);
    let name = format!("sequence: {a} is in an open swap-out");
    refused(cache.begin_step(&[(b, 1), (a, 1)]), ErrorKind::Caller, &[&name]);
    refused(cache.fork(a), ErrorKind::Caller, &[&name]);
    refused(cache.free(a), ErrorKind::Caller, &[&name]);
    refused(cache.truncate(a, 1), ErrorKind::Caller, &[&name]);
    refused(cache.swap_out(&mut encoder(&cache), a), ErrorKind::Caller, &[&name]);
    refused(cache.defragment(&mut encoder(&cache)), ErrorKind::Caller, &[&name]);
    assert_eq!(state(&cache, &[a, b, fork]), before);
    assert_holds(&cache, a, &[1, 2, 3, 4, 5]);
    grow(&cache, &[(b, &[23, 24, 25])]);
    let snapshot = gpu.block_on(swap.finish()).expect("finish");
    grow(&cache, &[(b, &[26]), (fork, &[27])]);
    assert_holds(&cache, fork, &[1, 2, 3, 4, 5, 20, 27]);
    assert_holds(&cache, b, &[6, 21, 22, 23, 24, 25, 26]);

    // Back in, in one encoder with a step of another sequence before and a step of its own behind.
    let mut commands = encoder(&cache);
    let step = begin(&cache, &[(b, &[30])]);
    tokens::record(&cache, &mut commands, &step, &[30]);
    cache.commit(step).expect("commit");
    let swap = cache.swap_in(&mut commands, &snapshot).expect("swap in");
    let back = swap.commit().expect("commit");
    let step = begin(&cache, &[(back, &[31, 32, 33, 34])]);
    tokens::record(&cache, &mut commands, &step, &[31, 32, 33, 34]);
    cache.commit(step).expect("commit");
    submit(&cache, commands);
    assert_holds(&cache, back, &[1, 2, 3, 4, 5, 31, 32, 33, 34]);
    assert_holds(&cache, b, &[6, 21, 22, 23, 24, 25, 26, 30]);
}

#[test]
fn whatever_is_dropped_changes_nothing() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache_of(&gpu, SHAPE, 8);
    let (a, b) = (sequence(&cache, &[1, 2, 3, 4, 5]), sequence(&cache, &[6, 7]));
    let (kept, before) = (snapshot(&cache, a), state(&cache, &[a, b]));

    let mut commands = encoder(&cache);
    drop(cache.swap_out(&mut commands, a).expect("swap out"));
    assert_eq!(state(&cache, &[a, b]), before);
    drop(commands);

    // A future that began to wait.
    fn crosses_threads<T: Send + 'static>(_: &T) {}
    let mut commands = encoder(&cache);
    let swap = cache.swap_out(&mut commands, a).expect("swap out");
    submit(&cache, commands);
    {
        let future = swap.finish();
        crosses_threads(&future);
        let mut future = pin!(future);
        assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        refused(cache.fork(a), ErrorKind::Caller, &["is in an open swap-out"]);
    }
    gpu.device().poll(folio::wgpu::PollType::wait_indefinitely()).expect("poll");
    assert_eq!(state(&cache, &[a, b]), before);

    // Never submitted: nothing is lost.
    let swap = cache.swap_out(&mut encoder(&cache), a).expect("swap out");
    refused(gpu.block_on(swap.finish()), ErrorKind::Caller, &["snapshot: got copies that were never submitted"]);
    let pending = cache.record_snapshot(&mut encoder(&cache), a).expect("snapshot");
    refused(gpu.block_on(pending.read()), ErrorKind::Caller, &["snapshot: got copies that were never submitted"]);
    assert_eq!(state(&cache, &[a, b]), before);

    let mut commands = encoder(&cache);
    let swap = cache.swap_in(&mut commands, &kept).expect("swap in");
    assert_eq!((cache.usage().used, cache.usage().sequences), (5, 2));
    refused(cache.defragment(&mut encoder(&cache)), ErrorKind::Caller, &["defragment: got 1 open", "dropped first"]);
    drop(swap);
    drop(commands);
    assert_eq!(state(&cache, &[a, b]), before);

    grow(&cache, &[(a, &[8]), (b, &[9])]);
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 8]);
    assert_holds(&cache, b, &[6, 7, 9]);
}

#[test]
fn a_cleared_cache_refuses_what_was_open() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache_of(&gpu, SHAPE, 2);
    let a = sequence(&cache, &[1, 2, 3, 4, 5]);
    let kept = snapshot(&cache, a);
    let mut commands = encoder(&cache);
    let out = cache.swap_out(&mut commands, a).expect("swap out");
    let inwards = cache.swap_in(&mut commands, &kept).expect("swap in");
    let dropped = cache.swap_in(&mut commands, &kept).expect("swap in");
    let pending = cache.record_snapshot(&mut commands, a).expect("snapshot");
    submit(&cache, commands);
    cache.clear();
    let b = sequence(&cache, &[6, 7]);
    let before = state(&cache, &[b]);
    let parts = ["the cache has been cleared"];
    refused(gpu.block_on(out.finish()), ErrorKind::Caller, &parts);
    refused(inwards.commit(), ErrorKind::Caller, &parts);
    drop(dropped);
    assert!(gpu.block_on(pending.read()).expect("its copies were made before") == kept);
    assert_eq!(state(&cache, &[b]), before);

    let defragment = cache.defragment(&mut encoder(&cache)).expect("nothing is open");
    cache.clear();
    refused(defragment.commit(), ErrorKind::Caller, &parts);
    cache.defragment(&mut encoder(&cache)).expect("nothing is open").commit().expect("commit");
    assert_eq!(usage(&cache), [16, 16, 0, 0, 0, 0]);
}

#[test]
fn an_open_step_is_no_part_of_a_snapshot_and_bars_a_swap() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache_of(&gpu, SHAPE, 6);
    let a = sequence(&cache, &[1, 2, 3, 4, 5]);
    let want = snapshot(&cache, a);
    let step = begin(&cache, &[(a, &[6, 7, 8, 9])]);
    run(&cache, &step, &[6, 7, 8, 9]);
    let before = state(&cache, &[a]);
    refused(cache.swap_out(&mut encoder(&cache), a), ErrorKind::Caller, &["is in an open step"]);
    refused(cache.defragment(&mut encoder(&cache)), ErrorKind::Caller, &["is in an open step"]);
    assert!(snapshot(&cache, a) == want, "rows of the open step are not in it");
    assert_eq!(state(&cache, &[a]), before);
    cache.commit(step).expect("commit");
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let unknown = KvCache::new_blocking(&gpu, SHAPE).expect("cache").create_sequence();
    refused(cache.record_snapshot(&mut encoder(&cache), unknown), ErrorKind::Caller, &["is not in this cache"]);
    refused(cache.swap_out(&mut encoder(&cache), unknown), ErrorKind::Caller, &["is not in this cache"]);
}

#[test]
fn an_empty_sequence_is_a_sequence() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache_of(&gpu, SHAPE, 6);
    let empty = cache.create_sequence();
    let kept = snapshot(&cache, empty);
    assert!(kept.is_empty() && kept.num_bytes() == 0 && kept.config().num_blocks == 0);
    assert_eq!(kept.layer_bytes(1).expect("layer"), (&[][..], &[][..]));
    refused(kept.layer_bytes(2), ErrorKind::Caller, &["layer: got 2", "below num_layers, 2"]);
    // Nothing was recorded, so nothing has to be submitted.
    let swapped =
        gpu.block_on(cache.swap_out(&mut encoder(&cache), empty).expect("swap out").finish()).expect("finish");
    assert_eq!((&swapped, cache.usage().sequences), (&kept, 0));
    let back = swap_in(&cache, &swapped);
    grow(&cache, &[(back, &[1, 2])]);
    assert_holds(&cache, back, &[1, 2]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache_of(&gpu, SHAPE, 1);
    let a = sequence(&cache, &(0..4 * 9).collect::<Vec<_>>());
    let kept = snapshot(&cache, a);
    let before = state(&cache, &[a]);
    let error = cache.swap_in(&mut encoder(&cache), &kept).expect_err("7 blocks are free");
    assert!(matches!(error, Error::OutOfBlocks { need: 9, free: 7, total: 16 }), "{error:?}");
    assert_eq!((error.kind(), state(&cache, &[a])), (ErrorKind::Retry, before));

    for (config, parts) in [
        (with(SHAPE, |c| c.num_layers = 3), ["snapshot: got num_layers 2", "need the cache's, 3"]),
        (with(SHAPE, |c| c.num_kv_heads = 1), ["snapshot: got num_kv_heads 2", "need the cache's, 1"]),
        (with(SHAPE, |c| c.head_dim = 16), ["snapshot: got head_dim 8", "need the cache's, 16"]),
        (with(SHAPE, |c| c.block_size = 8), ["snapshot: got block_size 4", "need the cache's, 8"]),
        (with(SHAPE, |c| c.k_format = F16), ["snapshot: got k_format F32", "need the cache's, F16"]),
        (with(SHAPE, |c| c.v_format = F32), ["snapshot: got v_format F16", "need the cache's, F32"]),
    ] {
        let other = cache_of(&gpu, config, 1);
        refused(other.swap_in(&mut encoder(&other), &kept), ErrorKind::Caller, &parts);
        assert_eq!((other.usage().used, other.usage().sequences), (0, 0));
    }
    // Its place is there once the sequence is gone.
    cache.free(a).expect("free");
    let back = swap_in(&cache, &kept);
    assert_holds(&cache, back, &(0..4 * 9).collect::<Vec<_>>());
}

/// Random sequences, forks and frees; then the used blocks are at the front, and every sequence holds what it held.
#[test]
fn defragmentation_packs_the_pool_and_keeps_every_sequence() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    for seed in 0..12 {
        let config = with(SHAPE, |c| c.num_blocks = 60);
        let cache = cache_of(&gpu, config, seed);
        let mut rng = Rng::with_seed(seed);
        let mut model: Vec<(SequenceId, Vec<u32>)> = Vec::new();
        let mut swapped = Vec::new();
        for _ in 0..30 {
            match rng.u32(0..6) {
                0 | 3 if cache.usage().free > 30 => {
                    let tokens: Vec<u32> = (0..rng.u32(1..20)).map(|_| rng.u32(0..1000)).collect();
                    model.push((sequence(&cache, &tokens), tokens));
                }
                1 if !model.is_empty() && cache.usage().free > 30 => {
                    let (parent, mut tokens) = model[rng.usize(0..model.len())].clone();
                    let fork = cache.fork(parent).expect("fork");
                    let len = rng.usize(0..=tokens.len());
                    cache.truncate(fork, len as u32).expect("truncate");
                    tokens.truncate(len);
                    grow(&cache, &[(fork, &[5, 6])]);
                    tokens.extend([5, 6]);
                    model.push((fork, tokens));
                }
                2 if !model.is_empty() => {
                    let (gone, _) = model.swap_remove(rng.usize(0..model.len()));
                    cache.free(gone).expect("free");
                }
                4 if !model.is_empty() => {
                    let (out, tokens) = model.swap_remove(rng.usize(0..model.len()));
                    swapped.push((swap_out(&cache, out), tokens));
                }
                _ => {
                    if let Some((kept, tokens)) = swapped.pop() {
                        model.push((swap_in(&cache, &kept), tokens));
                    }
                }
            }
        }
        let ids: Vec<_> = model.iter().map(|(id, _)| *id).collect();
        let before = state(&cache, &ids);
        let used: std::collections::HashSet<_> = before.1.iter().flat_map(|(_, table)| table.clone()).collect();

        // Dropped: as it was, also for later steps.
        let mut commands = encoder(&cache);
        let dropped = cache.defragment(&mut commands).expect("defragment");
        for id in &ids {
            refused(cache.fork(*id), ErrorKind::Caller, &["is in an open defragmentation"]);
        }
        drop(dropped);
        drop(commands);
        assert_eq!(state(&cache, &ids), before);

        let mut commands = encoder(&cache);
        let defragment = cache.defragment(&mut commands).expect("defragment");
        let moves = defragment.moves().to_vec();
        let behind = used.iter().filter(|block| block.index() >= used.len() as u32).count();
        assert_eq!(moves.len(), behind, "no move that isn't needed");
        // A new sequence may be made and may grow meanwhile.
        let new = cache.create_sequence();
        let step = begin(&cache, &[(new, &[1, 2, 3, 4, 5])]);
        tokens::record(&cache, &mut commands, &step, &[1, 2, 3, 4, 5]);
        submit(&cache, commands);
        assert_eq!(defragment.commit().expect("commit") as usize, moves.len());
        cache.commit(step).expect("commit");
        let after = state(&cache, &ids);
        assert_eq!(after.0.shared, before.0.shared);
        for ((len, table), (new_len, new_table)) in before.1.iter().zip(&after.1) {
            let moved = |block: &BlockId| moves.iter().find(|(from, _)| from == block).map_or(*block, |(_, to)| *to);
            assert_eq!((len, &table.iter().map(moved).collect::<Vec<_>>()), (new_len, new_table));
            assert!(new_table.iter().all(|block| block.index() < used.len() as u32));
        }
        model.push((new, vec![1, 2, 3, 4, 5]));
        for (id, tokens) in &mut model {
            assert_holds(&cache, *id, tokens);
        }
        // Freed places are used again, and nobody's rows change by it.
        for (id, tokens) in &mut model {
            if cache.usage().free > 1 {
                grow(&cache, &[(*id, &[7, 8])]);
                tokens.extend([7, 8]);
            }
        }
        for (id, tokens) in &model {
            assert_holds(&cache, *id, tokens);
        }
        for (id, _) in model {
            cache.free(id).expect("free");
        }
        assert_eq!(usage(&cache), [60, 60, 0, 0, 0, 0]);
    }
}

#[cfg(feature = "save")]
mod files {
    use super::*;

    #[test]
    fn a_file_carries_a_sequence_into_another_cache() {
        let Some(gpu) = adapter::open(DEFAULT) else { return };
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("prompt.safetensors");
        let cache = cache_of(&gpu, SHAPE, 11);
        let tokens: Vec<u32> = (10..27).collect();
        let a = sequence(&cache, &tokens);
        let kept = snapshot(&cache, a);
        kept.save(&path, &[]).expect("save");
        kept.save(&path, &tokens).expect("save again");
        assert_eq!(std::fs::read(&path).expect("read"), kept.to_bytes(&tokens).expect("bytes"));
        assert_eq!(std::fs::read_dir(folder.path()).expect("list").count(), 1, "no temporary file stays");
        let (loaded, found) = SequenceSnapshot::load(&path).expect("load");
        assert_eq!((&loaded, &found), (&kept, &tokens));
        let other = cache_of(&gpu, with(SHAPE, |c| c.num_blocks = 6), 12);
        let back = swap_in(&other, &loaded);
        assert_holds(&other, back, &tokens);
        assert_eq!(contents(&other, back), contents(&cache, a));
        let third = cache_of(&gpu, with(SHAPE, |c| c.k_format = F16), 12);
        refused(third.swap_in(&mut encoder(&third), &loaded), ErrorKind::Caller, &["k_format F32", "F16"]);

        for tokens in [&tokens[1..], &[1; 19]] {
            let got = format!("tokens: got {}", tokens.len());
            refused(kept.save(&path, tokens), ErrorKind::Caller, &[&got, "one per token of the sequence, 17"]);
        }
        let nowhere = folder.path().join("no such folder").join("file");
        refused(kept.save(&nowhere, &[]), ErrorKind::File, &["no such folder", "can't be written"]);
        refused(kept.save(folder.path(), &[]), ErrorKind::File, &["can't be written"]);
        refused(kept.save("/", &[]), ErrorKind::File, &["not the path of a file"]);
        assert_eq!(std::fs::read_dir(folder.path()).expect("list").count(), 1, "no temporary file stays");
        assert_eq!(SequenceSnapshot::load(&path).expect("the file is as it was").0, kept);
    }

    #[test]
    fn altered_truncated_and_foreign_files_are_refused() {
        let Some(gpu) = adapter::open(DEFAULT) else { return };
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("prompt");
        refused(SequenceSnapshot::load(&path), ErrorKind::File, &["prompt", "can't be read"]);
        refused(SequenceSnapshot::load(folder.path()), ErrorKind::File, &["can't be read"]);
        let cache = cache_of(&gpu, SHAPE, 13);
        let tokens: Vec<u32> = (10..40).collect();
        let a = sequence(&cache, &tokens);
        let sound = snapshot(&cache, a).to_bytes(&tokens).expect("bytes");
        let mut rng = Rng::with_seed(17);
        for _ in 0..4000 {
            let mut bytes = sound.clone();
            let at = rng.usize(0..bytes.len());
            bytes[at] ^= rng.u8(1..);
            refused(SequenceSnapshot::from_bytes(&bytes), ErrorKind::File, &["saved sequence: "]);
            bytes.truncate(at);
            refused(SequenceSnapshot::from_bytes(&bytes), ErrorKind::File, &["saved sequence: "]);
        }
        for bytes in
            [&sound[..sound.len() / 2], &sound[..sound.len() - 1], &sound[..20], &[sound.clone(), vec![0]].concat()]
        {
            std::fs::write(&path, bytes).expect("write");
            refused(SequenceSnapshot::load(&path), ErrorKind::File, &["prompt: "]);
        }
        for model in ["models/stories/model.safetensors", "models/stories/tokenizer.json", "Cargo.toml"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(model);
            refused(SequenceSnapshot::load(path), ErrorKind::File, &["not a sequence that folio saved"]);
        }
    }
}

/// wgpu maps what was to be mapped on a submit even if the submit fails: only the marker tells that the copies never ran.
#[test]
fn a_swap_whose_submit_failed_changes_nothing() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache_of(&gpu, SHAPE, 4);
    let a = sequence(&cache, &[1, 2, 3, 4, 5]);
    let gpu = cache.gpu();
    let destroyed = crate::case::upload(gpu, &[0.0; 4]);
    let target = crate::case::upload(gpu, &[0.0; 4]);
    let mut commands = encoder(&cache);
    let swap = cache.swap_out(&mut commands, a).expect("swap out");
    commands.copy_buffer_to_buffer(&destroyed, 0, &target, 0, 16);
    destroyed.destroy();
    let commands = commands.finish();
    pollster::block_on(gpu.scoped("submitting", || gpu.queue().submit([commands]))).expect_err("a destroyed buffer");
    refused(gpu.block_on(swap.finish()), ErrorKind::Caller, &["snapshot: got copies that were never submitted"]);
    grow(&cache, &[(a, &[6])]);
    assert_holds(&cache, a, &[1, 2, 3, 4, 5, 6]);
}

/// Blocks in all, free, used, shared and reclaimable; sequences.
fn usage(cache: &KvCache) -> [u32; 6] {
    let PoolUsage { total, free, used, shared, reclaimable, sequences, .. } = cache.usage();
    [total, free, used, shared, reclaimable, sequences]
}

//! Latents that are normalised and rotated on their way into the cache, against the calls that do it apart.

use fastrand::Rng;
use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int8};
use folio::{AppendLatent, ErrorKind, Gpu, KvCache, KvCacheConfig, LatentNorm, Rope, RopeConfig, RopeLayout};

use crate::adapter::{self, ALL, CPU};
use crate::append_qkv::{EPS, assert_close, new_cache, normed, values};
use crate::bad_input::refused;
use crate::case::upload;
use crate::tokens::encoder;

/// Two caches, one filled in one dispatch and one by rows that were normalised here; the last step appends to a fork, which shares a block.
fn check(gpu: &Gpu, (head_dim, value_dim): (u32, u32), format: KvFormat, layout: RopeLayout) {
    let what = format!("{head_dim} and {value_dim}, {format}, {layout:?}, {gpu:?}");
    let config = KvCacheConfig::latent(1, head_dim, value_dim).with_blocks(20, 4).with_formats(format, format);
    let rope = RopeConfig { layout, ..RopeConfig::new(head_dim - value_dim, 10_000.0).with_start(value_dim) };
    let (fused, plain) = (new_cache(gpu, config), new_cache(gpu, config));
    let kernel = AppendLatent::new_blocking(&fused, rope.clone()).expect("kernel");
    kernel.warm_up().expect("warm-up");
    let rope = Rope::new_blocking(&plain, rope).expect("rope");
    let mut rng = Rng::with_seed(4);
    let weights = values(&mut rng, value_dim);
    let norm = LatentNorm::new(gpu, &weights, EPS).expect("norm");
    let mut sequences = [(); 3].map(|()| (fused.create_sequence(), plain.create_sequence()));
    for round in 0..2 {
        if round == 1 {
            let (ours, theirs) = sequences[0];
            sequences[1] = (fused.fork(ours).expect("fork"), plain.fork(theirs).expect("fork"));
        }
        let lens = [5, 1, 9];
        let batch = sequences.iter().zip(lens);
        let ours: Vec<_> = batch.clone().map(|(ids, len)| (ids.0, len)).collect();
        let theirs: Vec<_> = batch.map(|(ids, len)| (ids.1, len)).collect();
        let (step, plain_step) = (fused.begin_step(&ours).expect("step"), plain.begin_step(&theirs).expect("step"));
        let rows = values(&mut rng, step.num_tokens() * head_dim);
        let buffer = upload(gpu, &rows);
        let mut recorded = encoder(&fused);
        fused.append_normed_latent(&mut recorded, &step, 0, &kernel, &buffer, &norm).expect("append");
        gpu.queue().submit([recorded.finish()]);
        fused.commit(step).expect("commit");
        assert_eq!(gpu.read_blocking(&buffer).expect("rows"), rows, "rows stay as they are: {what}");

        let of_row = |row: &[f32]| {
            let (value, rest) = row.split_at(value_dim as usize);
            [&normed(value, &weights)[..], rest].concat()
        };
        let finished: Vec<f32> = rows.chunks(head_dim as usize).flat_map(of_row).collect();
        let finished = upload(gpu, &finished);
        let mut recorded = encoder(&plain);
        plain.append_latent(&mut recorded, &plain_step, 0, &finished, Some(&rope)).expect("append");
        gpu.queue().submit([recorded.finish()]);
        plain.commit(plain_step).expect("commit");
    }
    for (ours, theirs) in sequences {
        let (got, want) =
            (fused.gather_blocking(ours, 0).expect("ours"), plain.gather_blocking(theirs, 0).expect("theirs"));
        assert_close(&format!("latents, {what}"), &got.k, &want.k, format);
    }
}

#[test]
fn one_dispatch_normalises_rotates_and_appends() {
    use RopeLayout::{HalfSplit, Interleaved};
    for how in ALL {
        let Some(gpu) = adapter::open(how) else { return };
        check(&gpu, (40, 32), F32, Interleaved);
        check(&gpu, (32, 16), Int8, HalfSplit);
        if how == CPU || how == adapter::GPU {
            check(&gpu, (576, 512), Int4, Interleaved);
            check(&gpu, (24, 16), F16, HalfSplit);
            check(&gpu, (72, 8), E4M3, Interleaved);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = adapter::open(CPU) else { return };
    let new = |config: KvCacheConfig| KvCache::new_blocking(&gpu, config.with_blocks(8, 4)).expect("cache");
    let (latent, heads) = (new(KvCacheConfig::latent(1, 40, 32)), new(KvCacheConfig::new(1, 1, 40)));
    let rope = RopeConfig::new(8, 1e4);
    let placed = rope.clone().with_start(32);
    refused(AppendLatent::new_blocking(&heads, placed.clone()), ErrorKind::Caller, &["cache", "latent"]);
    refused(AppendLatent::new_blocking(&latent, rope.clone()), ErrorKind::Caller, &["rotary_start", "got 0", "32"]);
    refused(AppendLatent::new_blocking(&latent, rope.with_start(40)), ErrorKind::Caller, &["rotary_start", "got 40"]);
    for eps in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40] {
        refused(LatentNorm::new(&gpu, &[1.0; 32], eps), ErrorKind::Caller, &["eps"]);
    }

    let kernel = AppendLatent::new_blocking(&latent, placed.clone()).expect("kernel");
    let other = new(KvCacheConfig::latent(1, 48, 32));
    let foreign = AppendLatent::new_blocking(&other, placed).expect("kernel");
    let step = latent.begin_step(&[(latent.create_sequence(), 2)]).expect("step");
    let (rows, short) = (upload(&gpu, &[0.5; 80]), upload(&gpu, &[0.5; 79]));
    let (norm, wide) = (
        LatentNorm::new(&gpu, &[1.0; 32], 1e-6).expect("norm"),
        LatentNorm::new(&gpu, &[1.0; 40], 1e-6).expect("norm"),
    );
    let append = |layer, kernel: &AppendLatent, rows, norm: &LatentNorm| {
        latent.append_normed_latent(&mut encoder(&latent), &step, layer, kernel, rows, norm)
    };
    append(0, &kernel, &rows, &norm).expect("what fits");
    refused(append(1, &kernel, &rows, &norm), ErrorKind::Caller, &["layer"]);
    refused(append(0, &foreign, &rows, &norm), ErrorKind::Caller, &["kernel"]);
    refused(append(0, &kernel, &short, &norm), ErrorKind::Caller, &["k: got"]);
    refused(append(0, &kernel, &rows, &wide), ErrorKind::Caller, &["norm", "weights for 40", "value_dim, 32"]);
    latent.commit(step).expect("commit");
}

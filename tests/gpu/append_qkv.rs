//! Queries, keys and values in one buffer: `append_qkv` against the calls that do the same in several dispatches, and norms in f64.

use fastrand::Rng;
use folio::RopeLayout::{HalfSplit, Interleaved};
use folio::wgpu::{self, BufferUsages};
use folio::{AppendQkv, ErrorKind, Gpu, HeadNorm, KvCache, KvCacheConfig, KvFormat, QkvRows, Rope, RopeConfig};

use crate::adapter::{self, ALL, CPU, DEFAULT, GPU};
use crate::bad_input::refused;
use crate::case::{poison, shuffle, upload};
use crate::tokens::encoder;

pub(crate) const EPS: f32 = 1e-5;
const NUM_TOKENS: [u32; 3] = [5, 1, 9];

pub(crate) fn values(rng: &mut Rng, len: u32) -> Vec<f32> {
    (0..len).map(|_| (rng.f32() * 2.0 - 1.0) * 4.0).collect()
}

pub(crate) fn new_cache(gpu: &Gpu, config: KvCacheConfig) -> KvCache {
    let cache = KvCache::new_blocking(gpu, config).expect("cache");
    poison(&cache);
    shuffle(&cache, 7);
    cache
}

/// RMSNorm of each head.
pub(crate) fn normed(x: &[f32], weights: &[f32]) -> Vec<f32> {
    let head = |head: &[f32]| {
        let squares: f64 = head.iter().map(|x| f64::from(*x).powi(2)).sum();
        let scale = 1.0 / (squares / head.len() as f64 + f64::from(EPS)).sqrt();
        head.iter().zip(weights).map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32).collect::<Vec<_>>()
    };
    x.chunks(weights.len()).flat_map(head).collect()
}

/// How far a stored element may be from another way to compute it: f32's rounding, and a step of the format of a row whose elements are below `most`.
fn bound(format: KvFormat, most: f32) -> f32 {
    let step = match format {
        KvFormat::F32 => 0.0,
        KvFormat::F16 => 1.0 / 1024.0,
        // Halves of a step of 2^-3 of a number's power of two, by either way.
        KvFormat::E4M3 => 1.0 / 8.0,
        KvFormat::Int8 => 2.2 / 255.0,
        _ => 2.2 / 15.0,
    };
    most * (4e-6 + step)
}

#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], format: KvFormat) {
    assert_eq!(got.len(), want.len(), "{what}");
    let most = want.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= bound(format, most), "{what}: element {i} is {got}, not {want}");
    }
}

/// Two caches, one filled by `append_qkv` and one call by call; the last step appends to a fork, which shares a block.
fn check(gpu: &Gpu, shape: KvCacheConfig, num_q_heads: u32, rope_config: &RopeConfig, head_norm: bool) {
    let what = format!("{shape:?}, {num_q_heads} heads, {rope_config:?}, norm {head_norm}, {gpu:?}");
    let (fused, plain) = (new_cache(gpu, shape), new_cache(gpu, shape));
    let kernel = AppendQkv::new_blocking(&fused, rope_config.clone(), num_q_heads, head_norm).expect("kernel");
    kernel.warm_up().expect("warm-up");
    let rope = Rope::new_blocking(&plain, rope_config.clone()).expect("rope");
    let mut rng = Rng::with_seed(3);
    let [q_weights, k_weights] = [(); 2].map(|()| values(&mut rng, shape.head_dim));
    let norm = head_norm.then(|| HeadNorm::new(gpu, &q_weights, &k_weights, EPS).expect("norm"));
    let mut sequences: Vec<_> = NUM_TOKENS.iter().map(|_| (fused.create_sequence(), plain.create_sequence())).collect();
    for round in 0..2 {
        if round == 1 {
            let (ours, theirs) = sequences[0];
            sequences[1] = (fused.fork(ours).expect("fork"), plain.fork(theirs).expect("fork"));
        }
        let batch = |plain: bool| -> Vec<_> {
            let ids = sequences.iter().map(|&(ours, theirs)| if plain { theirs } else { ours });
            ids.zip(NUM_TOKENS).collect()
        };
        let (step, plain_step) =
            (fused.begin_step(&batch(false)).expect("step"), plain.begin_step(&batch(true)).expect("step"));
        let num_tokens = step.num_tokens();
        let [q, k, v] = [num_q_heads, shape.num_kv_heads, shape.num_kv_heads]
            .map(|heads| values(&mut rng, num_tokens * heads * shape.head_dim));
        let mut packed: Vec<f32> = Vec::new();
        for part in [&q, &k, &v] {
            let width = part.len() / num_tokens as usize;
            packed.extend(part);
            // The padding may hold anything, and stays.
            packed.resize(packed.len() + (width.next_multiple_of(64) - width) * num_tokens as usize, f32::NAN);
        }
        let qkv = upload(gpu, &packed);
        let rows = QkvRows::new(&qkv, num_tokens, num_q_heads, &shape);
        assert_eq!(rows.range().size(), packed.len() as u64 * 4);
        let mut recorded = encoder(&fused);
        fused.append_qkv(&mut recorded, &step, 0, &kernel, rows, norm.as_ref()).expect("append_qkv");
        gpu.queue().submit([recorded.finish()]);
        fused.commit(step).expect("commit");

        let (q, k) = if head_norm { (normed(&q, &q_weights), normed(&k, &k_weights)) } else { (q, k) };
        let [q, k, v_rows] = [&q, &k, &v].map(|values| upload(gpu, values));
        let mut recorded = encoder(&plain);
        rope.rotate(&mut recorded, &plain_step, &q, num_q_heads).expect("rotate");
        plain.append(&mut recorded, &plain_step, 0, &k, &v_rows, Some(&rope)).expect("append");
        gpu.queue().submit([recorded.finish()]);
        plain.commit(plain_step).expect("commit");

        let got = gpu.read_blocking(&qkv).expect("qkv");
        let want = gpu.read_blocking(&q).expect("q");
        assert_close(&format!("queries, {what}"), &got[..want.len()], &want, KvFormat::F32);
        let same = got[want.len()..].iter().zip(&packed[want.len()..]).all(|(got, was)| got.to_bits() == was.to_bits());
        assert!(same, "behind the queries nothing changes: {what}");
    }
    for &(ours, theirs) in &sequences {
        let (got, want) =
            (fused.gather_blocking(ours, 0).expect("ours"), plain.gather_blocking(theirs, 0).expect("theirs"));
        assert_close(&format!("keys, {what}"), &got.k, &want.k, shape.k_format);
        assert!(got.v == want.v, "values, {what}");
    }
}

#[test]
fn one_dispatch_does_what_several_do() {
    use KvFormat::{F16, F32, Int4, Int8};
    for how in ALL {
        let Some(gpu) = adapter::open(how) else { return };
        // (head_dim, rotary_dim, layout, query heads, KV heads): widths that are multiples of 64 and others, parts that are rotated, scalar rows.
        for (i, (head_dim, rotary_dim, layout, num_q_heads, num_kv_heads)) in [
            (32, 32, HalfSplit, 4, 2),
            (64, 64, Interleaved, 3, 1),
            (40, 20, HalfSplit, 6, 3),
            (128, 128, HalfSplit, 8, 8),
            (8, 2, HalfSplit, 1, 1),
            (72, 24, Interleaved, 10, 2),
            (256, 64, HalfSplit, 2, 1),
        ]
        .into_iter()
        .enumerate()
        {
            if ![CPU, GPU].contains(&how) && i % 3 != 0 {
                continue;
            }
            let formats = [(F32, F16), (F16, F32), (Int8, F16), (F32, Int4), (Int4, Int8)][i % 5];
            let shape =
                KvCacheConfig::new(1, num_kv_heads, head_dim).with_blocks(20, 4).with_formats(formats.0, formats.1);
            let config = RopeConfig { layout, ..RopeConfig::new(rotary_dim, 10_000.0) };
            check(&gpu, shape, num_q_heads, &config, i % 2 == 0);
            if i < 2 {
                check(&gpu, shape, num_q_heads, &config, i % 2 == 1);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let shape = KvCacheConfig::new(1, 2, 32).with_blocks(8, 4);
    let cache = KvCache::new_blocking(&gpu, shape).expect("cache");
    let rope = RopeConfig::new(32, 10_000.0);
    let new = |cache: &KvCache, heads: u32, norm: bool| AppendQkv::new_blocking(cache, rope.clone(), heads, norm);
    for heads in [0, 3, 65_536] {
        refused(new(&cache, heads, false), ErrorKind::Caller, &["num_q_heads", "multiple of num_kv_heads, 2"]);
    }
    let wide = RopeConfig { rotary_dim: 34, ..rope.clone() };
    refused(AppendQkv::new_blocking(&cache, wide, 4, false), ErrorKind::Caller, &["rotary_dim"]);
    let norm = |len: usize| HeadNorm::new(&gpu, &vec![1.0; len], &vec![1.0; len], EPS).expect("norm");
    refused(HeadNorm::new(&gpu, &[1.0; 8], &[1.0; 7], EPS), ErrorKind::Caller, &["k", "7 values"]);
    for eps in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40] {
        refused(HeadNorm::new(&gpu, &[1.0; 8], &[1.0; 8], eps), ErrorKind::Caller, &["eps"]);
    }

    let (plain, normed) = (new(&cache, 4, false).expect("kernel"), new(&cache, 4, true).expect("kernel"));
    let other_cache = KvCache::new_blocking(&gpu, KvCacheConfig::new(1, 1, 32).with_blocks(8, 4)).expect("cache");
    let foreign = new(&other_cache, 4, false).expect("kernel");
    let step = cache.begin_step(&[(cache.create_sequence(), 3)]).expect("step");
    let buffer = |elements: u64, usage| {
        gpu.device().create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: elements * 4,
            usage,
            mapped_at_creation: false,
        })
    };
    let large = buffer(3 * 256, BufferUsages::STORAGE);
    let rows = |tokens, heads| QkvRows::new(&large, tokens, heads, &shape);
    let append = |layer, kernel: &AppendQkv, rows: QkvRows<'_>, norm: Option<&HeadNorm>| {
        cache.append_qkv(&mut encoder(&cache), &step, layer, kernel, rows, norm)
    };
    append(0, &plain, rows(3, 4), None).expect("what fits");
    append(0, &normed, rows(3, 4), Some(&norm(32))).expect("what fits");
    refused(append(1, &plain, rows(3, 4), None), ErrorKind::Caller, &["layer"]);
    refused(append(0, &foreign, rows(3, 4), None), ErrorKind::Caller, &["kernel"]);
    refused(append(0, &plain, rows(2, 4), None), ErrorKind::Caller, &["rows", "2 tokens", "3 tokens, 4 query heads"]);
    refused(append(0, &plain, rows(3, 2), None), ErrorKind::Caller, &["rows", "2 query heads"]);
    refused(append(0, &plain, rows(3, 4), Some(&norm(32))), ErrorKind::Caller, &["norm", "need none"]);
    refused(append(0, &normed, rows(3, 4), None), ErrorKind::Caller, &["norm", "need weights"]);
    refused(append(0, &normed, rows(3, 4), Some(&norm(64))), ErrorKind::Caller, &["norm", "weights for 64"]);
    let (small, no_storage) = (buffer(3 * 256 - 1, BufferUsages::STORAGE), buffer(3 * 256, BufferUsages::COPY_DST));
    for buffer in [&small, &no_storage] {
        refused(append(0, &plain, QkvRows::new(buffer, 3, 4, &shape), None), ErrorKind::Caller, &["rows"]);
    }
    let (k, _) = cache.layer_buffers(0).expect("the cache's own buffers");
    refused(append(0, &plain, QkvRows::new(&k[0], 3, 4, &shape), None), ErrorKind::Caller, &["rows"]);
    cache.commit(step).expect("commit");
}

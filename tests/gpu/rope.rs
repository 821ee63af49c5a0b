//! Rotary embeddings: K turned on its way into the cache, and Q in place, against the f64 rotation of each row.

use crate::common::with;
use fastrand::Rng;
use folio::KvFormat::{F16, F32};
use folio::RopeLayout::{HalfSplit, Interleaved};
use folio::reference::rope::{RopeProblem, Rotated, rotate, sin_cos};
use folio::wgpu::{self, BufferUsages};
use folio::{
    BufferRef, ErrorKind, Gpu, GpuOptions, KvCache, KvCacheConfig, Rope, RopeConfig, RopeLayout, RopeScaling,
    SequenceId, Step,
};

use crate::adapter::{self, ALL, CPU, DEFAULT, GPU};
use crate::bad_input::refused;
use crate::case::{poison, round, shuffle, upload};
use crate::tokens::encoder;

/// One layer, small blocks.
const SHAPE: KvCacheConfig = KvCacheConfig::new(1, 2, 64).with_blocks(40, 5).with_formats(F32, F16);

/// The positions that the accuracy is promised for, and some between.
const POSITIONS: [u32; 12] =
    [0, 1, 2, 7, 1000, 65_535, 131_071, 1 << 20, 1 << 24, 123_456_789, 4_000_000_000, u32::MAX];

fn cache(gpu: &Gpu, config: KvCacheConfig) -> KvCache {
    let cache = KvCache::new_blocking(gpu, config).expect("cache");
    poison(&cache);
    shuffle(&cache, 7);
    cache
}

fn rope(cache: &KvCache, config: &RopeConfig) -> Rope {
    Rope::new_blocking(cache, config.clone()).expect("rope")
}

/// The exact rotation of `[num_tokens, num_heads, head_dim]`.
fn turned(config: &RopeConfig, head_dim: u32, x: &[f32], positions: &[u32]) -> Rotated {
    let inverse_frequencies = config.inverse_frequencies();
    rotate(&RopeProblem {
        x,
        positions,
        head_dim: head_dim as usize,
        inverse_frequencies: &inverse_frequencies,
        attention_factor: config.attention_factor(),
        interleaved: config.layout == Interleaved,
    })
    .expect("a valid problem")
}

/// Compares rows with what they should be, after the rounding of their format. Elements that don't turn must be exact.
#[track_caller]
fn assert_turned(what: &str, format: folio::KvFormat, x: &[f32], got: &[f32], want: &Rotated) -> f64 {
    assert_eq!(got.len(), want.values.len(), "{what}");
    let mut worst = 0.0_f64;
    for (i, (&got, (&value, &bound))) in got.iter().zip(want.values.iter().zip(&want.bound)).enumerate() {
        if bound == 0.0 {
            let kept = round(format, &x[i..=i])[0];
            assert_eq!(got.to_bits(), kept.to_bits(), "{what}: element {i} must not change: got {got}, want {kept}");
            continue;
        }
        let rounding = (value.abs() + bound) * format.relative_error() + format.absolute_error();
        let error = (f64::from(got) - value).abs();
        assert!(
            error <= bound + rounding,
            "{what}: element {i}: got {got}, want {value} within {bound:e} + {rounding:e}"
        );
        worst = worst.max(error / bound);
    }
    worst
}

/// Rows of any size: small, usual and large values, and such that cancel.
fn values(rng: &mut Rng, len: usize) -> Vec<f32> {
    let scales = [1.0, 1.0, 1.0, 1e-3, 100.0];
    (0..len).map(|_| (rng.f32() * 2.0 - 1.0) * scales[rng.usize(..scales.len())]).collect()
}

fn submit(cache: &KvCache, encoder: wgpu::CommandEncoder) {
    cache.gpu().queue().submit([encoder.finish()]);
}

/// Pairs (1, 0) turn into (cos, sin).
#[test]
fn cosine_and_sine_are_good_at_every_position() {
    for how in ALL {
        let Some(gpu) = adapter::open(how) else { return };
        let cache = cache(
            &gpu,
            with(SHAPE, |c| {
                c.num_kv_heads = 1;
                c.head_dim = 256;
                c.num_blocks = 600;
            }),
        );
        let mut rng = Rng::with_seed(1);
        let mut positions = POSITIONS.to_vec();
        positions.extend((0..2000).map(|_| rng.u32(..) >> rng.u32(0..32)));
        let inverse_frequencies: Vec<f64> = (0..128)
            // The usual ones, and any that turn up to a whole turn per position.
            .map(|i| if i < 64 { 500_000.0_f64.powf(-f64::from(i) / 64.0) } else { rng.f64() * std::f64::consts::TAU })
            .collect();
        let scaling = RopeScaling::Custom { inverse_frequencies: inverse_frequencies.clone(), attention_factor: 1.0 };
        let config = RopeConfig { scaling, ..RopeConfig::new(256, 1.0) };
        let rope = rope(&cache, &config);
        let unturned: Vec<f32> = (0..256).map(|i| if i < 128 { 1.0 } else { 0.0 }).collect();
        let x = upload(&gpu, &unturned.repeat(positions.len()));
        let batch = [(cache.create_sequence(), positions.len() as u32)];
        let step = cache.begin_step_with_positions(&batch, &positions).expect("step");
        let mut encoder = encoder(&cache);
        rope.rotate(&mut encoder, &step, &x, 1).expect("rotate");
        submit(&cache, encoder);
        let got = gpu.read_blocking(&x).expect("x");

        let mut worst = (0.0_f64, String::new());
        for (token, (&position, row)) in positions.iter().zip(got.chunks(256)).enumerate() {
            let mut of_position = 0.0_f64;
            for (pair, &frequency) in inverse_frequencies.iter().enumerate() {
                let (sin, cos) = sin_cos(position, frequency);
                let error = (f64::from(row[pair]) - cos).abs().max((f64::from(row[pair + 128]) - sin).abs());
                of_position = of_position.max(error);
                if error > worst.0 {
                    worst = (error, format!("position {position}, frequency {frequency}"));
                }
            }
            if token < POSITIONS.len() && how == ALL[0] {
                eprintln!("position {position}: cosine and sine within {of_position:.2e}");
            }
            assert!(position != 0 || row == unturned, "position 0 turns nothing");
        }
        eprintln!("{how:?}: worst {:.3e} at {}", worst.0, worst.1);
        // The polynomials' own bound, as `reference::rope::ERROR` counts it.
        assert!(worst.0 <= 2.0_f64.powi(-23), "{worst:?}, {how:?}");
    }
}

/// (head_dim, rotary_dim, layout): whole heads, parts, and parts that are no multiple of 8 or 4.
const SHAPES: [(u32, u32, RopeLayout); 14] = [
    (64, 64, HalfSplit),
    (64, 64, Interleaved),
    (128, 128, HalfSplit),
    (256, 256, Interleaved),
    (80, 20, HalfSplit),
    (80, 20, Interleaved),
    (16, 4, HalfSplit),
    (16, 4, Interleaved),
    (8, 2, HalfSplit),
    (8, 2, Interleaved),
    (96, 24, HalfSplit),
    (40, 40, Interleaved),
    (72, 70, HalfSplit),
    (24, 22, Interleaved),
];

fn scalings() -> Vec<RopeScaling> {
    vec![
        RopeScaling::None,
        RopeScaling::yarn(4.0, 2048),
        RopeScaling::Linear { factor: 2.5 },
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 8192 },
    ]
}

/// What a sequence holds: positions, K and V as they were given.
#[derive(Clone, Default)]
struct Held {
    positions: Vec<u32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Sequences that grow in ragged steps, some with positions of their own, fork, and are cut back; Q turns beside them.
fn check_shape(gpu: &Gpu, shape: KvCacheConfig, config: &RopeConfig, seed: u64) -> f64 {
    let what = format!("{shape:?}, {config:?}, {gpu:?}");
    let cache = cache(gpu, shape);
    let rope = rope(&cache, config);
    let mut rng = Rng::with_seed(seed);
    let row = (shape.num_kv_heads * shape.head_dim) as usize;
    let num_q_heads = 3;
    let q_row = (num_q_heads * shape.head_dim) as usize;
    let mut held: Vec<(SequenceId, Held)> = (0..3).map(|_| (cache.create_sequence(), Held::default())).collect();
    let mut worst = 0.0_f64;
    for turn in 0..4 {
        if turn == 2 {
            // A fork that shares a partly filled block, and one that starts again further back.
            let (fork, copy) = (cache.fork(held[0].0).expect("fork"), held[0].1.clone());
            held.push((fork, copy));
            let (id, of) = &mut held[1];
            let len = of.positions.len() / 2;
            cache.truncate(*id, len as u32).expect("truncate");
            of.positions.truncate(len);
            of.k.truncate(len * row);
            of.v.truncate(len * row);
        }
        let batch: Vec<_> = held.iter().map(|(id, _)| (*id, rng.u32(1..12))).collect();
        let explicit = turn % 2 == 1;
        let positions: Vec<Vec<u32>> = batch
            .iter()
            .zip(&held)
            .map(|(&(_, len), (_, of))| {
                let start = of.positions.len() as u32;
                // Any order, any size.
                (0..len).map(|i| if explicit { rng.u32(..) >> rng.u32(0..32) } else { start + i }).collect()
            })
            .collect();
        let step = if explicit {
            cache.begin_step_with_positions(&batch, &positions.concat())
        } else {
            cache.begin_step(&batch)
        }
        .expect("step");
        let num_tokens = step.num_tokens() as usize;
        let (k, v) = (values(&mut rng, num_tokens * row), values(&mut rng, num_tokens * row));
        let q = values(&mut rng, num_tokens * q_row);
        let mut encoder = encoder(&cache);
        let q_buffer = upload(gpu, &q);
        {
            // All in one pass, as a model does it.
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            rope.rotate(&mut pass, &step, &q_buffer, num_q_heads).expect("rotate");
            let (k, v) = (upload(gpu, &k), upload(gpu, &v));
            cache.append(&mut pass, &step, 0, &k, &v, Some(&rope)).expect("append");
        }
        submit(&cache, encoder);
        cache.commit(step).expect("commit");

        let want = turned(config, shape.head_dim, &q, &positions.concat());
        let got = gpu.read_blocking(&q_buffer).expect("q");
        worst = worst.max(assert_turned(&format!("Q, turn {turn}, {what}"), F32, &q, &got, &want));
        let mut at = 0;
        for ((_, of), positions) in held.iter_mut().zip(&positions) {
            let range = at * row..(at + positions.len()) * row;
            of.positions.extend(positions);
            of.k.extend(&k[range.clone()]);
            of.v.extend(&v[range]);
            at += positions.len();
        }
    }
    for (id, of) in &held {
        let got = cache.gather_blocking(*id, 0).expect("gather");
        let want = turned(config, shape.head_dim, &of.k, &of.positions);
        assert_turned(&format!("K of {id}, {what}"), shape.k_format, &of.k, &got.k, &want);
        assert!(got.v == round(shape.v_format, &of.v), "V of {id} must not change, {what}");
    }
    worst
}

#[test]
fn keys_and_queries_turn_in_every_shape() {
    let mut worst = 0.0_f64;
    for how in ALL {
        let Some(gpu) = adapter::open(how) else { return };
        for (i, &(head_dim, rotary_dim, layout)) in (0..).zip(&SHAPES) {
            // These kernels differ in their workgroups only, and those by profile.
            if ![CPU, GPU].contains(&how) && i % 5 != 0 {
                continue;
            }
            let block_size = [1, 5, 16, 256][i as usize % 4];
            let num_blocks = if block_size == 1 { 200 } else { 40.min(2000 / block_size) };
            let (k_format, v_format) = [(F32, F16), (F16, F32), (F16, F16)][i as usize % 3];
            let num_kv_heads = [1, 3, 2][i as usize % 3];
            let shape = KvCacheConfig::new(1, num_kv_heads, head_dim)
                .with_blocks(num_blocks, block_size)
                .with_formats(k_format, v_format);
            let scaling = scalings().swap_remove(i as usize % 4);
            let config = RopeConfig { layout, scaling, ..RopeConfig::new(rotary_dim, 10_000.0) };
            worst = worst.max(check_shape(&gpu, shape, &config, i));
        }
    }
    eprintln!("worst element of Q: {worst:.2} of the bound");
}

#[test]
fn frequencies_of_the_callers_own_turn_as_they_say() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    for layout in [HalfSplit, Interleaved] {
        // A pair that stands still, one that turns back, one that turns fast.
        let inverse_frequencies = vec![0.0, -0.37, 6.0, 1e-9];
        let scaling = RopeScaling::Custom { inverse_frequencies, attention_factor: 0.75 };
        let config = RopeConfig { layout, scaling, ..RopeConfig::new(8, 1.0) };
        check_shape(&gpu, SHAPE, &config, 3);
    }
}

#[test]
fn at_position_0_everything_stays_what_it_is() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache(&gpu, SHAPE);
    let mut rng = Rng::with_seed(9);
    let x = values(&mut rng, 3 * 64);
    for layout in [HalfSplit, Interleaved] {
        let rope = rope(&cache, &RopeConfig { layout, ..RopeConfig::new(64, 10_000.0) });
        let s = cache.create_sequence();
        let step = cache.begin_step_with_positions(&[(s, 3)], &[0; 3]).expect("step");
        let mut encoder = encoder(&cache);
        let buffer = upload(&gpu, &x);
        rope.rotate(&mut encoder, &step, &buffer, 1).expect("rotate");
        submit(&cache, encoder);
        assert_eq!(gpu.read_blocking(&buffer).expect("x"), x);
    }
}

/// Not-a-numbers stay in their pair: elements that don't turn, other heads and other tokens don't see them.
#[test]
fn nan_stays_in_its_pair() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache(&gpu, SHAPE);
    for (layout, i, j) in [(HalfSplit, 3, 13), (Interleaved, 6, 7)] {
        let rope = rope(&cache, &RopeConfig { layout, ..RopeConfig::new(20, 10_000.0) });
        let mut x = vec![0.5; 2 * 2 * 64];
        x[64 + 3] = f32::NAN;
        x[64 + 6] = if layout == Interleaved { f32::NAN } else { 0.5 };
        x[64 + 40] = f32::NAN;
        let s = cache.create_sequence();
        let step = cache.begin_step(&[(s, 2)]).expect("step");
        let mut encoder = encoder(&cache);
        let buffer = upload(&gpu, &x);
        let v = upload(&gpu, &x);
        cache.append(&mut encoder, &step, 0, &buffer, &v, Some(&rope)).expect("append");
        rope.rotate(&mut encoder, &step, &buffer, 2).expect("rotate");
        submit(&cache, encoder);
        cache.commit(step).expect("commit");
        let nan: Vec<usize> = match layout {
            HalfSplit => vec![64 + i, 64 + j, 64 + 40],
            Interleaved => vec![64 + 2, 64 + 3, 64 + i, 64 + j, 64 + 40],
        };
        let k = cache.gather_blocking(s, 0).expect("gather").k;
        for got in [gpu.read_blocking(&buffer).expect("x"), k] {
            let found: Vec<usize> = (0..got.len()).filter(|&i| got[i].is_nan()).collect();
            assert_eq!(found, nan, "{layout:?}");
        }
    }
}

#[test]
fn a_range_of_a_buffer_turns_and_nothing_around_it() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache(&gpu, SHAPE);
    for (layout, rotary_dim) in [(HalfSplit, 64), (HalfSplit, 10), (Interleaved, 64), (Interleaved, 10)] {
        let config = RopeConfig { layout, ..RopeConfig::new(rotary_dim, 10_000.0) };
        let rope = rope(&cache, &config);
        let align = gpu.limits().min_storage_buffer_offset_alignment.max(16) as usize / 4;
        let (start, len) = (align * 3, 5 * 3 * 64);
        let mut all = vec![-7.0; start + len + 100];
        let x = values(&mut Rng::with_seed(4), len);
        all[start..start + len].copy_from_slice(&x);
        let buffer = upload(&gpu, &all);
        let step = cache.begin_step(&[(cache.create_sequence(), 2), (cache.create_sequence(), 3)]).expect("step");
        let mut encoder = encoder(&cache);
        let range = BufferRef::new(&buffer, start as u64 * 4, len as u64 * 4);
        rope.rotate(&mut encoder, &step, range, 3).expect("rotate");
        submit(&cache, encoder);
        let got = gpu.read_blocking(&buffer).expect("x");
        let want = turned(&config, 64, &x, &[0, 1, 0, 1, 2]);
        assert_turned("the range", F32, &x, &got[start..start + len], &want);
        assert!(got[..start].iter().chain(&got[start + len..]).all(|&x| x == -7.0), "{config:?}");
    }
}

/// More workgroups than fit along one dimension of a grid.
#[test]
fn a_grid_goes_on_in_its_second_dimension() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    // 8 lanes of 4 pairs each on a CPU adapter: 65 535 workgroups take 524 280 rows of one group.
    let shape = with(SHAPE, |c| {
        c.num_kv_heads = 1;
        c.head_dim = 8;
        c.block_size = 256;
        c.num_blocks = 4;
    });
    let cache = cache(&gpu, shape);
    let config = RopeConfig::new(8, 10_000.0);
    let rope = rope(&cache, &config);
    let (num_tokens, num_heads) = (10, 65_535);
    let x: Vec<f32> = (0..num_tokens * num_heads * 8).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
    let buffer = upload(&gpu, &x);
    let step = cache.begin_step(&[(cache.create_sequence(), num_tokens)]).expect("step");
    let mut encoder = encoder(&cache);
    rope.rotate(&mut encoder, &step, &buffer, num_heads).expect("rotate");
    submit(&cache, encoder);
    let got = gpu.read_blocking(&buffer).expect("x");
    let want = turned(&config, 8, &x, &(0..num_tokens).collect::<Vec<_>>());
    assert_turned("many rows", F32, &x, &got, &want);
}

/// Layers with and without, and with different ones, share a step.
#[test]
fn layers_choose_for_themselves() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = cache(&gpu, with(SHAPE, |c| c.num_layers = 3));
    let configs = [10_000.0, 1_000_000.0].map(|theta| RopeConfig::new(64, theta));
    let ropes = configs.each_ref().map(|config| rope(&cache, config));
    ropes[0].warm_up().expect("warm-up");
    assert_eq!(ropes[0].config(), &configs[0]);
    let x = values(&mut Rng::with_seed(2), 7 * 2 * 64);
    let s = cache.create_sequence();
    let step = cache.begin_step(&[(s, 7)]).expect("step");
    let (k, v) = (upload(&gpu, &x), upload(&gpu, &x));
    let mut encoder = encoder(&cache);
    cache.append(&mut encoder, &step, 0, &k, &v, None).expect("append");
    for (layer, rope) in (1..).zip(&ropes) {
        cache.append(&mut encoder, &step, layer, &k, &v, Some(rope)).expect("append");
    }
    submit(&cache, encoder);
    cache.commit(step).expect("commit");
    assert_eq!(cache.gather_blocking(s, 0).expect("gather").k, x);
    for (layer, config) in (1..).zip(&configs) {
        let want = turned(config, 64, &x, &[0, 1, 2, 3, 4, 5, 6]);
        let got = cache.gather_blocking(s, layer).expect("gather");
        assert_turned("a layer", F32, &x, &got.k, &want);
    }
    assert_eq!(gpu.read_blocking(&k).expect("k"), x, "the host's own rows must not change");
}

#[test]
fn steady_steps_make_no_buffer_and_no_pipeline() {
    adapter::open(DEFAULT);
    let name = std::env::var("FOLIO_ADAPTER").ok();
    // A device of this test's own: others are counted too.
    let Ok(gpu) = Gpu::open_blocking(with(GpuOptions::default(), |c| c.adapter_name = name)) else {
        return;
    };
    let cache = KvCache::new_blocking(&gpu, SHAPE).expect("cache");
    let rope = rope(&cache, &RopeConfig::new(64, 10_000.0));
    let s = cache.create_sequence();
    let rows = vec![0.5; 2 * 64];
    let (k, v, q) = (upload(&gpu, &rows), upload(&gpu, &rows), upload(&gpu, &rows));
    let mut counts = Vec::new();
    for _ in 0..20 {
        let step = cache.begin_step(&[(s, 1)]).expect("step");
        let mut encoder = encoder(&cache);
        rope.rotate(&mut encoder, &step, &q, 2).expect("rotate");
        cache.append(&mut encoder, &step, 0, &k, &v, Some(&rope)).expect("append");
        submit(&cache, encoder);
        cache.commit(step).expect("commit");
        gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("poll");
        gpu.queue().submit([]);
        gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("poll");
        let hal = gpu.device().get_internal_counters().hal;
        counts.push((hal.buffers.read(), hal.buffer_memory.read(), hal.compute_pipelines.read()));
    }
    assert!(counts[5].0 > 0 && counts[5..].iter().all(|count| *count == counts[5]), "{counts:?}");
}

#[test]
fn misuse_is_refused_and_changes_nothing() {
    use ErrorKind::{Caller, Wgpu};
    let Some(_) = adapter::open(DEFAULT) else { return };
    // Both devices are of one instance: wgpu gives buffers of another one no meaning.
    let instance = wgpu::Instance::default();
    let open = || {
        let adapter_name = std::env::var("FOLIO_ADAPTER").ok();
        Gpu::open_blocking(with(GpuOptions::default(), |c| {
            c.adapter_name = adapter_name;
            c.instance = Some(instance.clone());
        }))
        .expect("it opened before")
    };
    let (gpu, other) = (open(), open());
    let cache = cache(&gpu, SHAPE);
    let good = RopeConfig::new(64, 10_000.0);
    let bad = |change: fn(&mut RopeConfig)| {
        let mut config = good.clone();
        change(&mut config);
        Rope::new_blocking(&cache, config)
    };
    refused(bad(|c| c.rotary_dim = 33), Caller, &["rotary_dim: got 33", "an even number from 2 to head_dim, 64"]);
    refused(bad(|c| c.rotary_dim = 66), Caller, &["rotary_dim: got 66", "an even number from 2 to head_dim, 64"]);
    refused(bad(|c| c.theta = f64::NAN), Caller, &["theta: got NaN"]);
    refused(bad(|c| c.scaling = RopeScaling::Linear { factor: -1.0 }), Caller, &["factor: got -1"]);

    let rope = rope(&cache, &good);
    let s = cache.create_sequence();
    let state = || (cache.usage(), cache.seq_len(s).expect("length"));
    let before = state();
    for positions in [&[0; 2][..], &[0; 4], &[]] {
        let step = cache.begin_step_with_positions(&[(s, 3)], positions);
        let got = format!("positions: got {} positions", positions.len());
        refused(step, Caller, &[&got, "need one per new token, 3"]);
    }
    refused(cache.begin_step_with_positions(&[], &[]), Caller, &["batch: got no sequences"]);
    refused(cache.begin_step_with_positions(&[(s, 0)], &[]), Caller, &["query_len: got 0"]);
    refused(
        cache.begin_step_with_positions(&[(s, u32::MAX), (s, u32::MAX)], &[0]),
        Caller,
        &["need one per new token, 8589934590"],
    );
    assert_eq!(state(), before);

    let step = cache.begin_step(&[(s, 3)]).expect("step");
    let x = values(&mut Rng::with_seed(8), 3 * 2 * 64);
    let (k, v, q) = (upload(&gpu, &x), upload(&gpu, &x), upload(&gpu, &x));
    let mut encoder = encoder(&cache);
    let rotate = |encoder: &mut wgpu::CommandEncoder, rope: &Rope, step: &Step, num_heads| {
        rope.rotate(encoder, step, &q, num_heads)
    };
    for num_heads in [0, 65_536, u32::MAX] {
        let got = format!("num_heads: got {num_heads}");
        refused(rotate(&mut encoder, &rope, &step, num_heads), Caller, &[&got, "need 1 to 65535"]);
    }
    for num_heads in [1, 3, 65_535] {
        refused(rotate(&mut encoder, &rope, &step, num_heads), Caller, &["x: got 1536 bytes", "need exactly"]);
    }
    let odd = BufferRef::new(&q, 4, 1532);
    refused(rope.rotate(&mut encoder, &step, odd, 2), Caller, &["x: got offset 4"]);
    let usage = BufferUsages::COPY_DST;
    let no_storage = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 1536,
        usage,
        mapped_at_creation: false,
    });
    refused(rope.rotate(&mut encoder, &step, &no_storage, 2), Caller, &["x: got usage", "STORAGE"]);
    let (own, _) = cache.layer_buffers(0).expect("layer");
    let own = BufferRef::new(&own[0], 0, 1536);
    refused(rope.rotate(&mut encoder, &step, own, 2), Caller, &["x: got the cache's own buffer"]);
    refused(
        cache.append(&mut encoder, &step, 1, &k, &v, Some(&rope)),
        Caller,
        &["layer: got 1", "below num_layers, 1"],
    );
    refused(cache.append(&mut encoder, &step, 0, &no_storage, &v, Some(&rope)), Caller, &["k: got usage"]);

    // A rope of another cache: of another shape, of the same shape (which is fine), and on another device.
    let narrow = KvCache::new_blocking(&gpu, with(SHAPE, |c| c.head_dim = 128)).expect("cache");
    let narrow_rope = self::rope(&narrow, &good);
    let parts = ["rope: got one made for", "head_dim: 128", "head_dim: 64"];
    refused(cache.append(&mut encoder, &step, 0, &k, &v, Some(&narrow_rope)), Caller, &parts);
    let parts = ["step: got a step of", "head_dim: 64", "head_dim: 128"];
    refused(rotate(&mut encoder, &narrow_rope, &step, 2), Caller, &parts);
    let twin = KvCache::new_blocking(&other, SHAPE).expect("cache");
    let far_rope = self::rope(&twin, &good);
    let far_step = twin.begin_step(&[(twin.create_sequence(), 3)]).expect("step");
    refused(
        cache.append(&mut encoder, &step, 0, &k, &v, Some(&far_rope)),
        Caller,
        &["rope: got one of another device"],
    );
    let parts = ["binding buffers (are they all of the same device?)", "Device"];
    refused(rotate(&mut encoder, &rope, &far_step, 2), Wgpu, &parts);
    refused(rotate(&mut encoder, &far_rope, &step, 2), Wgpu, &parts);
    refused(
        cache.append(&mut encoder, &far_step, 0, &k, &v, Some(&rope)),
        Caller,
        &["step: it belongs to another cache"],
    );

    // Nothing of that was recorded, and the step still works.
    rotate(&mut encoder, &rope, &step, 2).expect("rotate");
    cache.append(&mut encoder, &step, 0, &k, &v, Some(&rope)).expect("append");
    submit(&cache, encoder);
    cache.commit(step).expect("commit");
    let want = turned(&good, 64, &x, &[0, 1, 2]);
    assert_turned("Q", F32, &x, &gpu.read_blocking(&q).expect("q"), &want);
    assert_turned("K", F32, &x, &cache.gather_blocking(s, 0).expect("gather").k, &want);

    // Steps that are over.
    let step = cache.begin_step(&[(s, 3)]).expect("step");
    cache.clear();
    let mut encoder = self::encoder(&cache);
    let parts = ["step: the cache has been cleared since it began"];
    refused(rotate(&mut encoder, &rope, &step, 2), Caller, &parts);
    refused(cache.append(&mut encoder, &step, 0, &k, &v, Some(&rope)), Caller, &parts);
}

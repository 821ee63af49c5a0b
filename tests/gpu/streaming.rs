//! Attention sinks with positions that are counted within what is kept, as StreamingLLM has them: against keys that are rotated again.

use fastrand::Rng;
use folio::reference::rope::{RopeProblem, rotate};
use folio::reference::{ErrorModel, Options, Problem, attention_with_bound};
use folio::{
    AppendQkv, Attention, AttentionCall, AttentionConfig, Gpu, HeadNorm, KvCache, KvCacheConfig, QkvRows, Rope,
    RopeConfig, wgpu,
};

use crate::adapter;
use crate::case::{append_rows, poison, shuffle, upload};
use crate::tokens::encoder;

const DIM: u32 = 16;
const HEADS: u32 = 2;

/// With queries of their own for sink tokens.
fn call<'a>(q: &'a wgpu::Buffer, sink_q: &'a wgpu::Buffer, out: &'a wgpu::Buffer) -> AttentionCall<'a> {
    let mut call = AttentionCall::new(q, out);
    call.sink_q = Some(sink_q.into());
    call
}

fn values(rng: &mut Rng, len: u32) -> Vec<f32> {
    (0..len).map(|_| (rng.f32() * 2.0 - 1.0) * 2.0).collect()
}

/// Rows of one position each, rotated in f64.
fn rotated(config: &RopeConfig, x: &[f32], positions: &[u32]) -> Vec<f32> {
    let frequencies = config.inverse_frequencies();
    let problem = RopeProblem {
        x,
        positions,
        head_dim: DIM as usize,
        inverse_frequencies: &frequencies,
        attention_factor: 1.0,
        interleaved: false,
    };
    rotate(&problem).expect("a valid problem").values.iter().map(|&x| x as f32).collect()
}

/// A text far longer than window and sinks, in chunks and token by token: each result is that of a cache which holds the sink tokens and the window
/// alone, with keys rotated by where they stand there, and the query behind them.
#[test]
fn distances_to_sink_tokens_are_those_within_the_cache() {
    for how in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        for (window, sinks) in [(20, 4), (5, 9), (40, 1)] {
            let mut config = AttentionConfig::new(HEADS);
            (config.window, config.sink_tokens, config.sink_queries) = (Some(window), sinks, true);
            let geometry = KvCacheConfig::new(1, 1, DIM)
                .with_blocks(40, 4)
                .with_formats(folio::KvFormat::F32, folio::KvFormat::F32)
                .with_window(window)
                .with_sink_tokens(sinks);
            let cache = KvCache::new_blocking(&gpu, geometry).expect("cache");
            poison(&cache);
            shuffle(&cache, 5);
            let attention = Attention::new_blocking(&cache, config).expect("attention");
            let rope_config = RopeConfig::new(DIM, 100.0);
            let rope = Rope::new_blocking(&cache, rope_config.clone()).expect("rope");
            let mut rng = Rng::with_seed(9);
            let (mut keys, mut all_values) = (Vec::new(), Vec::new());
            let sequence = cache.create_sequence();
            for count in [3, 1, 30, 1, 1, 60, 17, 1] {
                let len = keys.len() as u32 / DIM;
                let (q, k, v) = (
                    values(&mut rng, count * HEADS * DIM),
                    values(&mut rng, count * DIM),
                    values(&mut rng, count * DIM),
                );
                keys.extend_from_slice(&k);
                all_values.extend_from_slice(&v);
                let positions: Vec<u32> = (len..len + count).collect();
                let capped: Vec<u32> = positions.iter().map(|&p| p.min(sinks + window - 1)).collect();
                assert!(positions.iter().zip(&capped).all(|(&p, &capped)| geometry.sink_position(p) == capped));
                let near = upload(&gpu, &rotated(&rope_config, &q, &positions));
                let far = upload(&gpu, &rotated(&rope_config, &q, &capped));
                let step = cache.begin_step(&[(sequence, count)]).expect("step");
                let plan = attention.plan(&step).expect("plan");
                let (k, v) = (upload(&gpu, &k), upload(&gpu, &v));
                let out = upload(&gpu, &vec![f32::NAN; q.len()]);
                let mut recorded = encoder(&cache);
                cache.append(&mut recorded, &step, 0, &k, &v, Some(&rope)).expect("append");
                // Without the second queries it is refused.
                assert!(attention.attend(&mut recorded, &plan, 0, &near, &out).is_err());
                attention.attend_call(&mut recorded, &plan, 0, call(&near, &far, &out)).expect("attend");
                gpu.queue().submit([recorded.finish()]);
                cache.commit(step).expect("commit");
                let got = gpu.read_blocking(&out).expect("out");
                let tokens = q.chunks((HEADS * DIM) as usize).zip(got.chunks((HEADS * DIM) as usize));
                for ((q, got), &position) in tokens.zip(&positions) {
                    check(&rope_config, window, sinks, position, (q, &keys, &all_values), got);
                }
            }
            assert!(cache.usage().used <= geometry.most_blocks(114, 60));
        }
    }
}

/// One query, over what is kept, at positions counted there.
fn check(
    rope: &RopeConfig,
    window: u32,
    sinks: u32,
    position: u32,
    (q, keys, values): (&[f32], &[f32], &[f32]),
    got: &[f32],
) {
    let kept: Vec<u32> = (0..=position).filter(|&key| key < sinks || key + window > position).collect();
    let row = |rows: &[f32], key: u32| rows[(key * DIM) as usize..((key + 1) * DIM) as usize].to_vec();
    let places: Vec<u32> = (0..kept.len() as u32).collect();
    let k: Vec<f32> = kept.iter().flat_map(|&key| row(keys, key)).collect();
    let v: Vec<f32> = kept.iter().flat_map(|&key| row(values, key)).collect();
    let k = rotated(rope, &k, &places);
    let rotated_q = rotated(rope, q, &places[places.len() - 1..]);
    let problem = Problem {
        num_q_heads: HEADS as usize,
        num_kv_heads: 1,
        head_dim: DIM as usize,
        value_dim: DIM as usize,
        q: &rotated_q,
        k: &k,
        v: &v,
        options: Options::default(),
    };
    let expected = attention_with_bound(&problem, &ErrorModel::F32).expect("a valid problem");
    // The kernel's keys are within 2^-21 * (|a| + |b|), which is at most 4 * 2^-21. So 16 products with queries below 2 * sqrt(2), times 1/4, miss a
    // logit by 46 * 2^-21; what is rotated here is rounded to 24 bits. A change of the logits by that much changes a mean of values below 2 by four
    // times as much.
    let logit = 64.0 * 2_f64.powi(-21);
    let slack = 4.0 * logit;
    for (i, got) in got.iter().enumerate() {
        let (want, bound) = (expected.output.out[i], expected.out_bound[i] + slack);
        assert!((f64::from(*got) - want).abs() <= bound, "{i} at {position}: {got}, not {want} within {bound}");
    }
}

/// The fused kernel writes both rotations, with norms and without, in every layout; queries and cache are what they are without the second.
#[test]
fn both_rotations_come_from_one_dispatch() {
    for how in adapter::ALL {
        let Some(gpu) = adapter::open(how) else { return };
        for (i, (head_dim, rotary_dim, layout, heads, kv_heads)) in [
            (32, 32, folio::RopeLayout::HalfSplit, 4, 2),
            (40, 20, folio::RopeLayout::HalfSplit, 6, 3),
            (72, 24, folio::RopeLayout::Interleaved, 10, 2),
        ]
        .into_iter()
        .enumerate()
        {
            let shape =
                KvCacheConfig::new(1, kv_heads, head_dim).with_blocks(20, 4).with_window(10).with_sink_tokens(3);
            let shape = if i == 0 { shape } else { shape.with_formats(folio::KvFormat::Int8, folio::KvFormat::F16) };
            let rope = RopeConfig { layout, ..RopeConfig::new(rotary_dim, 10_000.0) };
            for norm in [false, true] {
                check_fused(&gpu, shape, &rope, heads, norm);
            }
        }
    }
}

fn check_fused(gpu: &Gpu, shape: KvCacheConfig, rope: &RopeConfig, heads: u32, norm: bool) {
    let what = format!("{shape:?}, {heads} heads, {rope:?}, norm {norm}, {gpu:?}");
    let cache = KvCache::new_blocking(gpu, shape).expect("cache");
    let plain = AppendQkv::new_blocking(&cache, rope.clone(), heads, norm).expect("kernel");
    let both = gpu.block_on(AppendQkv::with_sink_queries(&cache, rope.clone(), heads, norm)).expect("kernel");
    both.warm_up().expect("warm-up");
    let mut rng = Rng::with_seed(2);
    let weights = [(); 2].map(|()| values(&mut rng, shape.head_dim));
    let norm = norm.then(|| HeadNorm::new(gpu, &weights[0], &weights[1], 1e-5).expect("norm"));
    let num_tokens = 21;
    let len = QkvRows::new(&upload(gpu, &[0.0; 4]), num_tokens, heads, &shape).range().size() / 4;
    let rows = values(&mut rng, len as u32);
    let q_len = (num_tokens * heads * shape.head_dim) as usize;
    let run = |positions: Option<Vec<u32>>, sinks: bool| {
        let sequence = cache.create_sequence();
        let batch = [(sequence, num_tokens)];
        let step = match positions {
            Some(positions) => cache.begin_step_with_positions(&batch, &positions).expect("step"),
            None => cache.begin_step(&batch).expect("step"),
        };
        let qkv = upload(gpu, &rows);
        let sink_q = upload(gpu, &vec![f32::NAN; q_len]);
        let of = QkvRows::new(&qkv, num_tokens, heads, &shape);
        let mut recorded = encoder(&cache);
        if sinks {
            assert!(cache.append_qkv(&mut recorded, &step, 0, &both, of, norm.as_ref()).is_err());
            cache.append_qkv_with_sinks(&mut recorded, &step, 0, &both, of, norm.as_ref(), &sink_q).expect("append");
        } else {
            cache.append_qkv(&mut recorded, &step, 0, &plain, of, norm.as_ref()).expect("append");
        }
        gpu.queue().submit([recorded.finish()]);
        cache.commit(step).expect("commit");
        let kept = cache.gather_blocking(sequence, 0).expect("rows");
        cache.free(sequence).expect("idle");
        let read = |buffer: &wgpu::Buffer| gpu.read_blocking(buffer).expect("rows")[..q_len].to_vec();
        (read(&qkv), kept, read(&sink_q))
    };
    let (near, kept, _) = run(None, false);
    // Positions from 12 on are 12.
    let (far, _, _) = run(Some((0..num_tokens).map(|position| position.min(12)).collect()), false);
    let (got_near, got_kept, got_far) = run(None, true);
    assert!(got_kept.k == kept.k && got_kept.v == kept.v, "{what}");
    let most = near.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    for (got, want) in [(&got_near, &near), (&got_far, &far)] {
        let worst = got.iter().zip(want).fold(0.0_f32, |worst, (got, want)| worst.max((got - want).abs()));
        assert!(worst <= most * 4e-6, "{worst} of {most}: {what}");
    }
    assert!(near != far);
}

/// Calls and options that don't go together.
#[test]
fn sink_queries_are_asked_for_on_both_sides() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let shape = KvCacheConfig::new(1, 1, DIM).with_blocks(8, 4).with_window(8).with_sink_tokens(2);
    let cache = KvCache::new_blocking(&gpu, shape).expect("cache");
    let mut config = AttentionConfig::new(HEADS);
    (config.window, config.sink_tokens) = (Some(8), 2);
    let plain = Attention::new_blocking(&cache, config.clone()).expect("attention");
    config.sink_queries = true;
    let mut wrong = config.clone();
    wrong.sink_tokens = 0;
    let error = Attention::new_blocking(&cache, wrong).expect_err("no sink tokens").to_string();
    assert!(error.starts_with("sink_queries: got true beside no sink_tokens"), "{error}");
    let mut wrong = config.clone();
    wrong.alibi_slopes = Some(vec![0.5; HEADS as usize]);
    let error = Attention::new_blocking(&cache, wrong).expect_err("slopes").to_string();
    assert!(error.starts_with("sink_queries: got true beside alibi_slopes"), "{error}");
    let sinking = Attention::new_blocking(&cache, config).expect("attention");
    let sequence = cache.create_sequence();
    let step = cache.begin_step(&[(sequence, 1)]).expect("step");
    let [q, far, k, v, out] = [HEADS, HEADS, 1, 1, HEADS].map(|heads| upload(&gpu, &vec![0.5; (heads * DIM) as usize]));
    let mut recorded = encoder(&cache);
    append_rows(&cache, &mut recorded, &step, 0, &k, &v);
    let plan = plain.plan(&step).expect("plan");
    let error = plain.attend_call(&mut recorded, &plan, 0, call(&q, &far, &out));
    assert!(error.expect_err("not asked for").to_string().starts_with("sink_q: got a range, need none"));
    let plan = sinking.plan(&step).expect("plan");
    let error = sinking.attend(&mut recorded, &plan, 0, &q, &out).expect_err("missing").to_string();
    assert!(error.starts_with("sink_q: got none, need a range"), "{error}");
    let error = sinking.attend_call(&mut recorded, &plan, 0, call(&q, &k, &out)).expect_err("too short");
    assert!(error.to_string().starts_with("sink_q: got"), "{error}");
    let error = sinking.attend_call(&mut recorded, &plan, 0, call(&q, &out, &out)).expect_err("its own");
    assert!(error.to_string().starts_with("out: got the buffer of sink_q"), "{error}");
    let all = KvCache::new_blocking(&gpu, KvCacheConfig::new(1, 1, DIM).with_blocks(8, 4)).expect("cache");
    let error = gpu.block_on(AppendQkv::with_sink_queries(&all, RopeConfig::new(DIM, 100.0), HEADS, false));
    assert!(error.expect_err("no window").to_string().starts_with("cache: got one without a window"));
}

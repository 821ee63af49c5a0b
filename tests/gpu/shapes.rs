//! Values that are not as long as keys, long heads, and latents, whose values are keys.

use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
use folio::reference::rope::{RopeProblem, rotate};
use folio::wgpu;
use folio::{
    AppendQkv, Attention, AttentionConfig, Cascade, KvCache, KvCacheConfig, Rope, RopeConfig, RopeLayout,
    SequenceSnapshot, TokenTree,
};

use crate::adapter::{self, ALL, CPU, CPU_PLAIN, GPU, GPU_PLAIN};
use crate::case::{Case, append, append_rows, option_of_four_heads, upload};
use crate::movable::{swap_in, swap_out};

/// A prompt, a chunk behind a context, a decode step, and one with more keys than a split has.
const MIXED: [(u32, u32); 4] = [(0, 19), (37, 6), (90, 1), (301, 1)];

/// (keys, values): DeepSeek's heads before absorption, and the other way round.
const WIDTHS: [(u32, u32); 4] = [(192, 128), (64, 128), (40, 72), (128, 8)];

const FORMATS: [(KvFormat, KvFormat); 7] =
    [(F32, F32), (F16, F16), (E4M3, F16), (Int8, Int8), (Int4, Int4), (Int8PerChannel, E4M3), (Int4PerChannel, Int4)];

/// A kernel compiles for seconds on a CPU adapter: each family meets some widths, and each width some families.
#[test]
fn values_of_another_width() {
    for (how, (head_dim, value_dim)) in ALL.into_iter().zip(WIDTHS.into_iter().cycle()) {
        let Some(gpu) = adapter::open(how) else { return };
        let name = format!("{how:?} {head_dim}/{value_dim}");
        Case::new(&MIXED, 8, 2, head_dim).value_dim(value_dim).named(name).check(&gpu);
    }
}

#[test]
fn values_of_another_width_in_every_format() {
    for (i, (k, v)) in FORMATS.into_iter().enumerate() {
        let how = [CPU, GPU][i % 2];
        let Some(gpu) = adapter::open(how) else { return };
        let (head_dim, value_dim) = WIDTHS[i % WIDTHS.len()];
        let block_size = [1, 5, 16, 32][i % 4];
        let case = Case::new(&MIXED, 4, 2, head_dim).value_dim(value_dim).block_size(block_size).formats(k, v);
        case.named(format!("{how:?}")).check(&gpu);
    }
}

/// Every option with values of another width or with latents, in one family or the other.
#[test]
fn every_option() {
    for i in 0..8 {
        let how = [CPU, GPU][i % 2];
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&MIXED, 4, 1, 40).formats(Int8, F32).named(format!("{how:?} {i}"));
        let case = if i % 4 < 2 { case.latent(24) } else { case.value_dim(24) };
        case.config(|config| option_of_four_heads(config, i)).check(&gpu);
    }
}

/// Partial states have the width of values: splits, and runs of shared blocks.
#[test]
fn split_and_shared_values_of_another_width() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let mut case = Case::new(&[(2000, 1), (2100, 1), (1990, 3)], 4, 2, 64).value_dim(96).formats(F16, F16);
        case.config.lse = true;
        case.clone().config(|config| config.deterministic = true).check(&gpu);
        case.prefix = 1900;
        case.config(|config| config.cascade = Cascade::Always).check(&gpu);
    }
}

/// Beyond 256 elements decode serves groups of up to 4; larger ones go to prefill.
#[test]
fn long_heads() {
    for (how, (head_dim, value_dim), heads, (k, v)) in [
        (CPU, (320, 320), 2, (F16, F16)),
        (CPU_PLAIN, (264, 264), 1, (F32, F32)),
        (CPU, (576, 512), 2, (Int8, Int8)),
        (GPU, (576, 576), 1, (F32, F32)),
        (GPU, (576, 512), 4, (F16, F16)),
        (GPU, (320, 576), 8, (Int4, E4M3)),
        (GPU_PLAIN, (512, 264), 2, (Int8PerChannel, Int8)),
    ] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&MIXED, heads, 1, head_dim).value_dim(value_dim).formats(k, v);
        case.named(format!("{how:?}")).check(&gpu);
    }
}

/// DeepSeek's shape, but for the number of query heads: one row of 576 elements a token, the first 512 of which are the value.
#[test]
fn latents() {
    for (how, heads, format) in [(CPU, 4, F16), (GPU, 4, F16), (GPU, 16, F32), (GPU_PLAIN, 16, Int8)] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&[(0, 5), (70, 1), (300, 2)], heads, 1, 576).formats(format, format).latent(512);
        case.named(format!("{how:?}")).check(&gpu);
    }
}

#[test]
fn latents_in_every_format() {
    for ((i, format), how) in [F32, F16, E4M3, Int8, Int4].into_iter().enumerate().zip(ALL) {
        let Some(gpu) = adapter::open(how) else { return };
        let (heads, head_dim, value_dim) = [(4, 72, 64), (16, 40, 32), (2, 64, 64)][i % 3];
        let case = Case::new(&MIXED, heads, 1, head_dim).formats(format, format).latent(value_dim);
        case.block_size(7).named(format!("{how:?}")).check(&gpu);
    }
}

/// Forks copy their last block, which has no V; the copy is the fork's own.
#[test]
fn forked_latents() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let mut case = Case::new(&[(50, 2), (53, 1), (61, 4)], 4, 1, 72).formats(F16, F16).latent(64);
        case.prefix = 45;
        case.check(&gpu);
    }
}

/// Rows of an accepted path move in their own widths, those of latents once.
#[test]
fn accepted_paths() {
    let Some(gpu) = adapter::open(CPU) else { return };
    let wide = KvCacheConfig::new(1, 2, 40).with_value_dim(16).with_formats(Int8, F16);
    for config in [wide, KvCacheConfig::latent(1, 40, 32).with_formats(Int4, Int4)] {
        let config = config.with_blocks(8, 3);
        let [k_row, v_row] = [config.head_dim, config.value_dim()].map(|dim| (config.num_kv_heads * dim) as usize);
        let rows = |tokens: &[usize], row: usize| -> Vec<f32> {
            tokens.iter().flat_map(|&token| (0..row).map(move |i| ((token * 31 + i * 7) % 50) as f32)).collect()
        };
        let tree = TokenTree::new(&[None, Some(0), Some(0), Some(2), Some(1)]).expect("a tree");
        let kept = [[0, 2, 3].as_slice(), &[0, 1, 2, 3, 4]].map(|tokens| {
            let cache = KvCache::new_blocking(&gpu, config).expect("cache");
            let sequence = cache.create_sequence();
            append(&cache, &[(sequence, 4)], 0, &rows(&[9; 4], k_row), &rows(&[9; 4], v_row));
            let whole = tokens.len() == 5;
            let trees = [whole.then(|| tree.clone())];
            let batch = [(sequence, tokens.len() as u32)];
            let mut step = cache.begin_step_with_trees(&batch, &trees).expect("step");
            let (k, v) = (upload(&gpu, &rows(tokens, k_row)), upload(&gpu, &rows(tokens, v_row)));
            let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            append_rows(&cache, &mut encoder, &step, 0, &k, &v);
            if whole {
                cache.accept(&mut encoder, &mut step, &[(sequence, &[0, 2, 3])]).expect("a path");
            }
            gpu.queue().submit([encoder.finish()]);
            cache.commit(step).expect("commit");
            cache.gather_blocking(sequence, 0).expect("rows")
        });
        assert_eq!(kept[0].k.len(), 7 * k_row);
        assert_eq!(kept[0], kept[1], "{config:?}");
    }
}

/// A latent cache keeps keys only: rows come back whole, values are their first elements, and a token takes no more than its key.
#[test]
fn latents_take_the_room_of_keys() {
    let Some(gpu) = adapter::open(CPU) else { return };
    let config = KvCacheConfig::latent(1, 72, 64).with_blocks(8, 4);
    assert_eq!(config.token_bytes(), 72 * 2);
    assert_eq!(config.pool_bytes(), 8 * 4 * 72 * 2);
    let cache = KvCache::new_blocking(&gpu, config).expect("cache");
    let sequence = cache.create_sequence();
    let rows: Vec<f32> = (0..5 * 72).map(|i| i as f32).collect();
    append(&cache, &[(sequence, 5)], 0, &rows, &[]);
    let values: Vec<f32> = rows.chunks(72).flat_map(|row| row[..64].to_vec()).collect();
    let back = cache.gather_blocking(sequence, 0).expect("rows");
    assert_eq!((back.k, back.v), (rows, values));

    // And they move like any others.
    let snapshot = swap_out(&cache, sequence);
    assert_eq!(snapshot.num_bytes(), 2 * 4 * 72 * 2);
    assert!(snapshot.layer_bytes(0).expect("a layer").1.is_empty());
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("latents");
    snapshot.save(&path, &[]).expect("saved");
    let (loaded, _) = SequenceSnapshot::load(&path).expect("loaded");
    assert_eq!((loaded.config().latent, loaded.config().value_dim()), (true, 64));
    let sequence = swap_in(&cache, &loaded);
    let back = cache.gather_blocking(sequence, 0).expect("rows");
    assert_eq!(back.k.len(), 5 * 72);
    assert!(back.k.iter().zip(0..).all(|(&x, i)| x == i as f32));
}

/// The last 64 elements of latents and of queries are rotated, the others stay as they are to the bit.
#[test]
fn latents_are_rotated_at_their_end() {
    for (how, interleaved) in [(CPU, false), (GPU, true)] {
        let Some(gpu) = adapter::open(how) else { return };
        let config = KvCacheConfig::latent(1, 88, 64).with_blocks(8, 4).with_formats(F32, F32);
        let cache = KvCache::new_blocking(&gpu, config).expect("cache");
        let mut rope_config = RopeConfig::new(24, 10_000.0).with_start(64);
        if interleaved {
            rope_config.layout = RopeLayout::Interleaved;
        }
        let rope = Rope::new_blocking(&cache, rope_config.clone()).expect("a rope");
        let sequence = cache.create_sequence();
        let mut rng = fastrand::Rng::with_seed(3);
        let rows: Vec<f32> = (0..9 * 88).map(|_| rng.f32() - 0.5).collect();
        let step = cache.begin_step(&[(sequence, 9)]).expect("step");
        let (k, q) = (upload(&gpu, &rows), upload(&gpu, &rows));
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        cache.append_latent(&mut encoder, &step, 0, &k, Some(&rope)).expect("append");
        rope.rotate(&mut encoder, &step, &q, 1).expect("rotate");
        gpu.queue().submit([encoder.finish()]);
        cache.commit(step).expect("commit");

        let ends: Vec<f32> = rows.chunks(88).flat_map(|row| row[64..].to_vec()).collect();
        let positions: Vec<u32> = (0..9).collect();
        let frequencies = rope_config.inverse_frequencies();
        let want = rotate(&RopeProblem {
            x: &ends,
            positions: &positions,
            head_dim: 24,
            inverse_frequencies: &frequencies,
            attention_factor: 1.0,
            interleaved,
        })
        .expect("a valid problem");
        let back = cache.gather_blocking(sequence, 0).expect("rows");
        for got in [back.k, gpu.read_blocking(&q).expect("q")] {
            for (i, (got, given)) in got.chunks(88).zip(rows.chunks(88)).enumerate() {
                assert_eq!(got[..64], given[..64], "row {i}: {how:?}");
                let worst =
                    got[64..].iter().zip(&want.values[24 * i..]).map(|(&got, want)| (f64::from(got) - want).abs());
                let worst = worst.fold(0.0, f64::max);
                assert!(worst < 1e-6, "row {i}: off by {worst}: {how:?}");
            }
        }
    }
}

/// What doesn't go together is refused by name.
#[test]
fn bad_shapes() {
    let Some(gpu) = adapter::open(CPU) else { return };
    let refusal = |config: KvCacheConfig| KvCache::new_blocking(&gpu, config).expect_err("refused").to_string();
    let latent = KvCacheConfig::latent(1, 64, 64).with_blocks(4, 4);
    assert!(refusal(latent.with_value_dim(72)).contains("value_dim: got 72, need at most head_dim, 64"));
    assert!(refusal(latent.with_formats(F16, F32)).contains("v_format: got F32, need that of the keys, F16"));
    assert!(refusal(latent.with_formats(Int8PerChannel, Int8PerChannel)).contains("v_format"));
    assert!(refusal(KvCacheConfig::new(1, 2, 64).with_value_dim(12)).contains("value_dim: got 12"));
    assert!(refusal(KvCacheConfig::new(1, 2, 64).with_value_dim(0)).contains("value_dim: got 0"));
    assert!(refusal(KvCacheConfig::new(1, 2, 64).with_value_dim(584)).contains("value_dim: got 584"));

    let cache = KvCache::new_blocking(&gpu, latent).expect("cache");
    let step = cache.begin_step(&[(cache.create_sequence(), 1)]).expect("step");
    let rows = upload(&gpu, &[0.0; 64]);
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let error = cache.append(&mut encoder, &step, 0, &rows, &rows, None).expect_err("values").to_string();
    assert!(error.contains("append_latent"), "{error}");
    let error = AppendQkv::new_blocking(&cache, RopeConfig::new(64, 1e4), 4, false).expect_err("no values");
    assert!(error.to_string().contains("value_dim"), "{error}");
    let error = Rope::new_blocking(&cache, RopeConfig::new(32, 1e4).with_start(40)).expect_err("too long").to_string();
    assert!(error.contains("rotary_start: got 40, need a multiple of 8 up to 32"), "{error}");

    let wide = KvCacheConfig::new(1, 1, 64).with_blocks(4, 4).with_value_dim(32);
    let wide = KvCache::new_blocking(&gpu, wide).expect("cache");
    let step = wide.begin_step(&[(wide.create_sequence(), 1)]).expect("step");
    let error = wide.append_latent(&mut encoder, &step, 0, &rows, None).expect_err("not latent").to_string();
    assert!(error.contains("rows"), "{error}");
    let error = wide.append(&mut encoder, &step, 0, &rows, &rows, None).expect_err("long values").to_string();
    assert!(error.contains('v'), "{error}");
    let attention = Attention::new_blocking(&wide, AttentionConfig::new(1)).expect("attention");
    let plan = attention.plan(&step).expect("plan");
    let out = upload(&gpu, &[0.0; 64]);
    let error = attention.attend(&mut encoder, &plan, 0, &rows, &out).expect_err("a long out").to_string();
    assert!(error.contains("out"), "{error}");
}

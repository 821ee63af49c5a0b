//! Pools whose K or V is larger than a storage binding: the same results, bit for bit, as from a pool in one piece.

use crate::common::with;
use std::time::{Duration, Instant};

use folio::KvFormat::{self, F16, F32, Int4, Int4PerChannel, Int8};
use folio::{
    Attention, AttentionConfig, Error, ErrorKind, Gpu, KvCache, KvCacheConfig, Result, Rope, RopeConfig, SequenceId,
    wgpu,
};

use crate::adapter::{self, ALL, CPU, DEFAULT, GPU, Open};
use crate::case::{self, Case, arrange, upload};
use crate::tokens::{self, assert_holds, encoder, grow};

const MIB: u64 = 1 << 20;

/// The smallest bindings that folio works with.
const fn small(how: Open) -> Open {
    Open { max_binding_bytes: Some(MIB), ..how }
}

/// A device with 1 MiB bindings and as many of them as WebGPU guarantees.
const DEFAULT_LIMITS: Open = Open { max_storage_buffers: Some(8), ..small(DEFAULT) };

/// Blocks of 64 tokens with 32 KiB of K and 16 KiB of V, so that 1 MiB holds 32 and 64 of them.
const SHAPE: KvCacheConfig = KvCacheConfig::new(2, 2, 64).with_blocks(100, 64).with_formats(F32, F16);

/// Segments of K and V.
fn counts(cache: &KvCache) -> [usize; 2] {
    let (k, v) = cache.layer_buffers(0).expect("layer");
    [k.len(), v.len()]
}

/// Which of `count` segments the blocks of a sequence lie in.
fn segments(cache: &KvCache, sequence: SequenceId, count: usize) -> Vec<u32> {
    let blocks = cache.config().num_blocks.div_ceil(count as u32);
    cache.block_table(sequence).expect("table").iter().map(|block| block.index() / blocks).collect()
}

/// The text of an error that the device is to blame for, and the pool that it says would fit.
#[track_caller]
fn refused<T>(result: Result<T>) -> (String, u32) {
    let Err(error) = result else { panic!("accepted") };
    assert!(matches!(error, Error::Unsupported { .. }) && error.kind() == ErrorKind::Device, "{error:?}");
    let text = error.to_string();
    let (_, rest) = text.split_once("the largest pool that fits has ").expect("a hint");
    let blocks = rest.split_once(" blocks").expect("blocks").0.parse().expect("a number");
    (text, blocks)
}

/// Runs a case in pieces and in one piece.
#[track_caller]
fn assert_same(how: Open, case: &Case, want: [usize; 2]) {
    let (Some(whole), Some(cut)) = (adapter::open(how), adapter::open(small(how))) else { return };
    let rows = case.rows();
    let run = |gpu: &Gpu, want: [usize; 2]| {
        let (cache, sequences) = case.fill(gpu, &rows);
        assert_eq!(counts(&cache), want, "{}", case.name);
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        let (out, lse) = case.attend(&cache, &attention, &sequences, &rows);
        case.compare(gpu, &rows, &out, lse.as_deref());
        // The longest sequence visits every segment and jumps between them; some sequence has the last block of the last one.
        for count in want {
            let visited = segments(&cache, sequences[0], count);
            assert!((0..count as u32).all(|segment| visited.contains(&segment)), "{visited:?}");
            let jumps = visited.windows(2).filter(|pair| pair[0] != pair[1]).count();
            assert!(count == 1 || jumps > count, "{visited:?}");
        }
        let last = cache.config().num_blocks - 1;
        let has_last = |&s: &SequenceId| cache.block_table(s).expect("table").iter().any(|b| b.index() == last);
        assert!(sequences.iter().any(has_last));
        let read: Vec<_> = sequences.iter().map(|&s| cache.gather_blocking(s, 0).expect("gather")).collect();
        for (read, rows) in read.iter().zip(&rows) {
            for (format, read, rows) in [(case.k_format, &read.k, &rows.k), (case.v_format, &read.v, &rows.v)] {
                assert!(![F32, F16].contains(&format) || *read == case::round(format, rows));
            }
        }
        let read: Vec<_> = read.iter().map(|read| [bits(&read.k), bits(&read.v)]).collect();
        (bits(&out), lse.as_deref().map(bits), read)
    };
    assert!(run(&cut, want) == run(&whole, [1, 1]), "{} {how:?}", case.name);
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Decode that is split and decode that is not, a prompt with and one without context.
fn batch(head_dim: u32, block_size: u32, num_blocks: u32, k_format: KvFormat, v_format: KvFormat) -> Case {
    let mut case = Case::new(&[(1300, 1), (0, 70), (150, 40), (300, 1)], 4, 2, head_dim)
        .block_size(block_size)
        .formats(k_format, v_format)
        .config(|config| config.lse = true);
    case.num_blocks = Some(num_blocks);
    case.named(format!("{num_blocks} blocks of {block_size}, head_dim {head_dim}, {k_format} and {v_format}"))
}

#[test]
fn attention_is_the_same_in_every_kernel_family() {
    // 32 and 64 blocks fit into a binding; of the second shape 177 and 88. The tables of the second end in the middle of vectors of keys.
    let cases = [(batch(64, 64, 100, F32, F16), [4, 2]), (batch(40, 37, 250, F16, F32), [2, 3])];
    for (i, how) in ALL.into_iter().enumerate() {
        let (case, segments) = &cases[i % 2];
        assert_same(how, case, *segments);
    }
}

#[test]
fn attention_is_the_same_however_a_side_is_cut() {
    for how in [CPU, GPU] {
        assert_same(how, &batch(64, 64, 64, F32, F32), [2, 2]);
        assert_same(how, &batch(64, 64, 96, F32, F32), [3, 3]);
        assert_same(how, &batch(64, 64, 40, F16, F32), [1, 2]);
        // Blocks of 8704 bytes; of 4096 with a table behind the first segment's, and of 4608.
        assert_same(how, &batch(64, 64, 300, Int8, Int8), [3, 3]);
        assert_same(how, &batch(64, 64, 300, Int4PerChannel, Int4), [2, 2]);
    }
}

#[test]
fn blocks_are_copied_from_every_segment_into_every_other() {
    let Some(gpu) = adapter::open(small(DEFAULT)) else { return };
    let cache = KvCache::new_blocking(&gpu, SHAPE).expect("cache");
    case::poison(&cache);
    assert_eq!(counts(&cache), [4, 2]);
    // Two blocks of each of K's segments, of 25 blocks; the second ones have the same place in their segments, so that a copy into the
    // wrong segment would hit another sequence.
    let places = |within: u32| (0..4).map(move |segment| segment * 25 + within);
    for from in places(3) {
        for to in places(24) {
            cache.clear();
            let bystanders: Vec<_> = places(3).chain(places(24)).filter(|&b| b != from && b != to).collect();
            let order: Vec<_> = bystanders.iter().copied().chain([from, to]).collect();
            let rest = (0..SHAPE.num_blocks).filter(|block| !order.contains(block));
            arrange(&cache, &order.iter().copied().chain(rest).collect::<Vec<_>>());
            let owner = |i: u32| (0..5).map(|token| 100 * i + token).collect::<Vec<_>>();
            let held: Vec<_> = (0..6).map(|i| (tokens::sequence(&cache, &owner(i)), owner(i))).collect();
            let parent = tokens::sequence(&cache, &[7, 8, 9]);
            let child = cache.fork(parent).expect("fork");
            grow(&cache, &[(child, &[10])]);
            let table = |s| cache.block_table(s).expect("table").iter().map(|b| b.index()).collect::<Vec<_>>();
            assert_eq!((table(parent), table(child)), (vec![from], vec![to]));
            assert_holds(&cache, parent, &[7, 8, 9]);
            assert_holds(&cache, child, &[7, 8, 9, 10]);
            for (sequence, tokens) in held {
                assert_holds(&cache, sequence, &tokens);
            }
        }
    }
}

#[test]
fn keys_are_turned_on_their_way_into_any_segment() {
    let config = RopeConfig::new(SHAPE.head_dim, 1e4);
    let run = |how: Open, want: [usize; 2]| {
        let gpu = adapter::open(how)?;
        let cache = KvCache::new_blocking(&gpu, SHAPE).expect("cache");
        assert_eq!(counts(&cache), want);
        case::poison(&cache);
        case::shuffle(&cache, 5);
        let rope = Rope::new_blocking(&cache, config.clone()).expect("rope");
        let s = cache.create_sequence();
        let list: Vec<_> = (0..9 * 64).collect();
        let rows = tokens::rows(&SHAPE, 1, &list);
        let step = cache.begin_step(&[(s, list.len() as u32)]).expect("step");
        let mut encoder = encoder(&cache);
        let (k, v) = (upload(&gpu, &rows.k), upload(&gpu, &rows.v));
        cache.append(&mut encoder, &step, 1, &k, &v, Some(&rope)).expect("append");
        gpu.queue().submit([encoder.finish()]);
        cache.commit(step).expect("commit");
        let visited = segments(&cache, s, want[0]);
        assert!((0..want[0] as u32).all(|segment| visited.contains(&segment)), "{visited:?}");
        let got = cache.gather_blocking(s, 1).expect("gather");
        Some((bits(&got.k), bits(&got.v)))
    };
    let cut = run(small(DEFAULT), [4, 2]);
    assert!(cut == run(DEFAULT, [1, 1]));
}

/// Two segments a side are what WebGPU's default limits allow.
#[test]
fn two_segments_a_side_work_with_eight_storage_buffers() {
    let Some(gpu) = adapter::open(DEFAULT_LIMITS) else { return };
    assert_eq!(gpu.limits().max_storage_buffers_per_shader_stage, 8);
    let mut case = batch(64, 64, 64, F32, F32).config(|config| config.lse = false);
    case.check(&gpu);
    let config = with(SHAPE, |c| {
        c.num_blocks = 64;
        c.v_format = F32;
    });
    let cache = KvCache::new_blocking(&gpu, config).expect("cache");
    assert_eq!(counts(&cache), [2, 2]);
    cache.warm_up().expect("warm-up");
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(4)).expect("attention");
    attention.warm_up().expect("warm-up");
    Rope::new_blocking(&cache, RopeConfig::new(64, 1e4)).expect("rope").warm_up().expect("warm-up");

    // An lse takes one buffer more.
    let with_lse = with(AttentionConfig::new(4), |c| c.lse = true);
    let (text, blocks) = refused(Attention::new_blocking(&cache, with_lse.clone()));
    assert_eq!(
        text,
        "lse: need 9 storage buffers in a kernel (2 for 2097152 bytes of K, 2 for 2097152 bytes of V, 4 others and lse), \
         have 8 storage buffers of 1048576 bytes; the largest pool that fits has 32 blocks, or attend without lse"
    );
    case = case.config(|config| config.lse = true);
    case.num_blocks = Some(blocks);
    case.lens = vec![(1000, 1), (0, 70), (150, 40)];
    case.check(&gpu);
    let cache = KvCache::new_blocking(&gpu, with(config, |c| c.num_blocks = blocks + 1)).expect("cache");
    assert_eq!(refused(Attention::new_blocking(&cache, with_lse)).1, blocks);
}

/// The pool that an error names is the largest one, and works to its last block.
#[test]
fn more_segments_than_buffers_are_refused_with_the_pool_that_fits() {
    let Some(gpu) = adapter::open(DEFAULT_LIMITS) else { return };
    // 65 to 96 blocks: three segments of K, two of V.
    for (num_blocks, [k, v], most, largest) in
        [(70, [3, 2], [2, 2], 64), (1000, [32, 16], [2, 2], 64), (65, [3, 2], [2, 2], 64)]
    {
        let config = with(SHAPE, |c| c.num_blocks = num_blocks);
        let (text, blocks) = refused(KvCache::new_blocking(&gpu, config));
        let parts = [
            format!("num_blocks: need {} storage buffers in a kernel", 4 + k + v),
            format!("({k} for {} bytes of K, {v} for {} bytes of V", num_blocks * 32768, num_blocks * 16384),
            "have 8 storage buffers of 1048576 bytes".to_owned(),
        ];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert_eq!(blocks, largest);
        let cache = KvCache::new_blocking(&gpu, with(config, |c| c.num_blocks = blocks)).expect("the largest");
        assert_eq!(counts(&cache)[0], most[0]);
        assert!(KvCache::new_blocking(&gpu, with(config, |c| c.num_blocks = blocks + 1)).is_err());
        case::shuffle(&cache, 1);
        let s = tokens::sequence(&cache, &[1, 2, 3]);
        assert_eq!(cache.block_table(s).expect("table")[0].index(), blocks - 1);
        assert_holds(&cache, s, &[1, 2, 3]);
        Attention::new_blocking(&cache, AttentionConfig::new(2)).expect("attention");
    }
}

/// Bindings end at 128 MiB on lavapipe and in WebGPU's defaults; elsewhere that limit is requested.
#[test]
fn a_side_of_300_mib_with_bindings_of_128() {
    let how = Open { max_binding_bytes: Some(128 * MIB), ..DEFAULT };
    let Some(gpu) = adapter::open(how) else { return };
    // A block is 256 tokens * 8 heads * 128 dims * 4 bytes = 1 MiB.
    let config = KvCacheConfig::new(1, 8, 128).with_blocks(300, 256).with_formats(F32, F32);
    let cache = KvCache::new_blocking(&gpu, config).expect("cache");
    let (k, v) = cache.layer_buffers(0).expect("layer");
    for side in [k, v] {
        assert_eq!(side.iter().map(|buffer| buffer.size()).collect::<Vec<_>>(), [100 * MIB; 3]);
    }
    // The sequences grow by two blocks each, then by one each. Every one lies in all three segments, at the same place within them, so that
    // none could be in the wrong segment unnoticed; the last block of the last one is among them.
    let order = [99, 199, 0, 200, 142, 42, 299, 100, 242];
    let rest = (0..300).filter(|block| !order.contains(block));
    arrange(&cache, &order.iter().copied().chain(rest).collect::<Vec<_>>());
    let lens = [(600, 1), (530, 15), (513, 1)];
    let case = Case::new(&lens, 16, config.num_kv_heads, config.head_dim).block_size(config.block_size);
    let rows = case.rows();
    let sequences = case.append_context(&cache, &rows);
    let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
    let (out, _) = case.attend(&cache, &attention, &sequences, &rows);
    case.compare(&gpu, &rows, &out, None);
    let mut blocks: Vec<_> = sequences.iter().flat_map(|&s| cache.block_table(s).expect("table")).collect();
    blocks.sort_unstable();
    assert_eq!(blocks.iter().map(|block| block.index()).collect::<Vec<_>>(), [0, 42, 99, 100, 142, 199, 200, 242, 299]);
    for &s in &sequences {
        let mut visited = segments(&cache, s, 3);
        visited.sort_unstable();
        assert_eq!(visited, [0, 1, 2]);
    }
}

/// Prints what segments cost: decode of 8 x 2048 keys, cut in three against in one piece. Run it alone, with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn cost_of_three_segments() {
    for (format, limit) in [(F32, 24), (F16, 12)] {
        let prepare = |max_binding_bytes, want: usize| {
            let how = Open { max_binding_bytes, ..DEFAULT };
            let gpu = adapter::open(how)?;
            let config = KvCacheConfig::new(1, 8, 128).with_blocks(8 * 128, 16).with_formats(format, format);
            let cache = KvCache::new_blocking(&gpu, config).expect("cache");
            assert_eq!(counts(&cache), [want; 2]);
            case::shuffle(&cache, 1);
            let sequences: Vec<_> = (0..8).map(|_| cache.create_sequence()).collect();
            let begin = |query_len| {
                let batch: Vec<_> = sequences.iter().map(|&s| (s, query_len)).collect();
                cache.begin_step(&batch).expect("step")
            };
            cache.commit(begin(2047)).expect("commit");
            let attention = Attention::new_blocking(&cache, AttentionConfig::new(32)).expect("attention");
            let step = begin(1);
            let plan = attention.plan(&step).expect("plan");
            let [q, out] = [0, 1].map(|_| upload(&gpu, &[0.5; 8 * 32 * 128]));
            Some(move || {
                let (_, _) = (&cache, &step);
                let mut encoder = encoder(&cache);
                attention.attend(&mut encoder, &plan, 0, &q, &out).expect("attend");
                let start = Instant::now();
                gpu.queue().submit([encoder.finish()]);
                gpu.read_blocking(&out).expect("wait");
                start.elapsed()
            })
        };
        let (Some(whole), Some(cut)) = (prepare(None, 1), prepare(Some(limit * MIB), 3)) else { return };
        let mut best = [Duration::MAX; 2];
        for _ in 0..20 {
            best = [best[0].min(whole()), best[1].min(cut())];
        }
        let ratio = best[1].as_secs_f64() / best[0].as_secs_f64();
        eprintln!("{format}: {:?} in one piece, {:?} in three, ratio {ratio:.3}", best[0], best[1]);
    }
}

/// An instance that keeps to WebGPU strictly has no limit on the buffers of a stage in all, and says 0; a device of it has WebGPU's default limits.
#[test]
fn what_webgpu_guarantees_is_enough() {
    if adapter::open(DEFAULT).is_none() {
        return;
    }
    for how in [CPU, GPU] {
        let mut options = adapter::options(how);
        let mut strict = wgpu::InstanceDescriptor::new_without_display_handle();
        strict.flags |= wgpu::InstanceFlags::STRICT_WEBGPU_COMPLIANCE;
        options.instance = Some(wgpu::Instance::new(strict));
        (options.without, options.default_limits) = (wgpu::Features::all(), true);
        let gpu = Gpu::open_blocking(options).expect("a device");
        let standard = wgpu::Limits::default();
        assert_eq!(gpu.limits().max_storage_buffer_binding_size, standard.max_storage_buffer_binding_size);
        assert_eq!(gpu.limits().max_compute_workgroup_storage_size, standard.max_compute_workgroup_storage_size);
        assert!(gpu.features().is_empty() && !gpu.has_subgroups());
        Case::new(&[(0, 1), (40, 1), (9, 12)], 4, 2, 64).formats(F16, F16).check(&gpu);
    }
}

//! Sequences whose blocks leave the pool: results, and what is refused.

use folio::{
    Attention, AttentionConfig, BlockId, ErrorKind, KvCache, KvCacheConfig, KvFormat, LayerGroup, LayerGroups,
    SequenceSnapshot,
};

use crate::adapter;
use crate::case::{Case, Rows, append, poison, shuffle};

/// The rows of a case's sequences from token `from` to `to`.
fn tokens(case: &Case, rows: &Rows, from: u32, to: u32) -> (Vec<f32>, Vec<f32>) {
    let range = |dim: u32| (from * case.num_kv_heads * dim) as usize..(to * case.num_kv_heads * dim) as usize;
    (rows.k[range(case.head_dim)].to_vec(), rows.v[range(case.value_dim)].to_vec())
}

/// The case with the window that its attention has, in a pool that has room for little more.
fn cache(gpu: &folio::Gpu, case: &Case, num_blocks: u32) -> KvCache {
    let mut config = KvCacheConfig::new(1, case.num_kv_heads, case.head_dim)
        .with_blocks(num_blocks, case.block_size)
        .with_formats(case.k_format, case.v_format);
    config.groups = LayerGroups::one(LayerGroup { window: case.config.window, sink_tokens: case.config.sink_tokens });
    let cache = KvCache::new_blocking(gpu, config).expect("cache");
    poison(&cache);
    shuffle(&cache, case.seed);
    cache
}

/// 100 000 tokens in chunks: the pool stays as small as it is, and results at several lengths are those of the oracle over what is seen. Decode and
/// prefill, with sink tokens and without.
#[test]
fn memory_is_flat_over_a_hundred_thousand_tokens() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for (window, sinks, query_len) in [(300, 0, 1), (300, 5, 1), (33, 40, 9)] {
        let case = Case::new(&[(99_980, query_len)], 2, 1, 8).config(|config| {
            config.window = Some(window);
            config.sink_tokens = sinks;
            config.lse = true;
        });
        let chunk = 2000;
        let geometry = KvCacheConfig::new(1, 1, 8).with_blocks(1, 16).with_window(window).with_sink_tokens(sinks);
        let cache = cache(&gpu, &case, geometry.most_blocks(u32::MAX, chunk));
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        let rows = case.rows();
        let sequence = cache.create_sequence();
        let mut len = 0;
        for goal in [20, 290, 2310, 40_000, 99_980] {
            while len < goal {
                let next = goal.min(len + chunk);
                let (k, v) = tokens(&case, &rows[0], len, next);
                append(&cache, &[(sequence, next - len)], 0, &k, &v);
                len = next;
                assert!(cache.usage().used <= cache.config().most_blocks(len, chunk));
            }
            // The same queries at this length.
            let case = Case { lens: vec![(len, query_len)], ..case.clone() };
            let (k, v) = tokens(&case, &rows[0], 0, len + query_len);
            let rows = [Rows { q: rows[0].q.clone(), k, v, mask: Vec::new() }];
            let (out, lse) = case.attend(&cache, &attention, &[sequence], &rows);
            case.compare(&gpu, &rows, &out, lse.as_deref());
            len += query_len;
        }
        cache.release_hidden(sequence).expect("idle");
        assert_eq!(cache.usage().used, cache.config().held_blocks(len));
    }
}

/// Sink tokens in every kernel: rows that see all keys, rows whose windows reach into the sinks and rows far behind, ragged and split.
#[test]
fn sink_tokens_are_seen_besides_the_window() {
    for adapter in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(adapter) else { return };
        let lens = [(0, 5), (3, 1), (12, 30), (150, 1), (140, 70), (700, 1), (4000, 3)];
        for (window, sinks) in [(1, 1), (13, 4), (64, 16), (20, 100), (3, u32::MAX), (u32::MAX, 2), (500, 1000)] {
            for i in 0..4 {
                let case = Case::new(&lens, 4, 2, 16).formats(KvFormat::F16, KvFormat::F32).config(|config| {
                    config.window = Some(window);
                    config.sink_tokens = sinks;
                    config.causal = i != 1;
                    config.lse = i != 2;
                    config.deterministic = i == 3;
                    config.max_workspace_bytes = if i == 2 { 4000 } else { config.max_workspace_bytes };
                    config.softcap = (i == 2).then_some(20.0);
                    config.sinks = (i == 1).then(|| vec![0.5, -3.0, 2.0, 0.0]);
                });
                case.named(format!("window {window}, {sinks} sink tokens, {i}")).check(&gpu);
            }
        }
    }
}

/// What is forked, swapped, saved and found again sees what it saw.
#[test]
fn sequences_with_gaps_move() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for sinks in [0, 5] {
        let case =
            Case::new(&[(203, 2)], 2, 1, 16).block_size(8).formats(KvFormat::Int8, KvFormat::F16).config(|config| {
                config.window = Some(50);
                config.sink_tokens = sinks;
            });
        let cache = cache(&gpu, &case, 64);
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        let rows = case.rows();
        let original = cache.create_sequence();
        for (from, to) in [(0, 100), (100, 160), (160, 203)] {
            let (k, v) = tokens(&case, &rows[0], from, to);
            append(&cache, &[(original, to - from)], 0, &k, &v);
        }
        let check = |sequence| {
            let (out, lse) = case.attend(&cache, &attention, &[sequence], &rows);
            case.compare(&gpu, &rows, &out, lse.as_deref());
        };
        let ids: Vec<u32> = (0..203).collect();
        cache.publish_prefix(original, &ids, 0).expect("published");
        assert!(cache.block_table(original).expect("table").iter().any(|block| block.is_null()));
        // Rows of lost tokens can't be read.
        let error = cache.gather_blocking(original, 0).expect_err("tokens are gone");
        assert!(error.kind() == ErrorKind::Caller && error.to_string().contains("left the window"), "{error}");
        let fork = cache.fork(original).expect("fork");
        check(fork);
        cache.free(fork).expect("idle");

        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let swap = cache.swap_out(&mut encoder, original).expect("swap");
        gpu.queue().submit([encoder.finish()]);
        let snapshot = gpu.block_on(swap.finish()).expect("snapshot");
        let held = cache.config().held_blocks(203);
        assert_eq!((snapshot.config().num_blocks, cache.usage().used - cache.usage().reclaimable), (held, 0));
        let saved = snapshot.to_bytes(&ids).expect("bytes");
        let (loaded, tokens_of) = SequenceSnapshot::from_bytes(&saved).expect("sound");
        assert_eq!((&loaded, tokens_of), (&snapshot, ids.clone()));
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let back = cache.swap_in(&mut encoder, &loaded).expect("room").commit().expect("open");
        let again = cache.swap_in(&mut encoder, &snapshot).expect("room").restore().expect("open");
        let moves = cache.defragment(&mut encoder).expect("nothing is open");
        gpu.queue().submit([encoder.finish()]);
        moves.commit().expect("open");
        check(back);
        check(again);
        // A cache that keeps more has no use for it.
        for (window, sink_tokens) in [(None, 0), (Some(51), 0), (Some(50), 50)] {
            let mut config = *cache.config();
            config.groups = LayerGroups::one(LayerGroup { window, sink_tokens });
            let other = KvCache::new_blocking(&gpu, config).expect("cache");
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            let fits = other.swap_in(&mut encoder, &snapshot);
            // 51 tokens begin in the same block.
            assert_eq!(fits.is_ok(), window == Some(51), "{sinks} sinks");
        }
        // The beginning is known, with the blocks that are needed behind it.
        let hit = cache.match_prefix(&ids[..202], 0);
        let held = cache.block_table(hit.sequence).expect("table").iter().filter(|block| !block.is_null()).count();
        assert!(hit.len == 0 || held as u32 == cache.config().held_blocks(hit.len), "{hit:?}");
        if hit.len > 0 {
            let (k, v) = tokens(&case, &rows[0], hit.len, 203);
            append(&cache, &[(hit.sequence, 203 - hit.len)], 0, &k, &v);
            check(hit.sequence);
        }
    }
}

/// Attention that sees more than the cache keeps, and calls that don't go together.
#[test]
fn attention_over_what_is_gone_is_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let config = KvCacheConfig::new(1, 1, 8).with_blocks(20, 4).with_window(10).with_sink_tokens(3);
    let cache = KvCache::new_blocking(&gpu, config).expect("cache");
    let refused = |change: &dyn Fn(&mut AttentionConfig), part: &str| {
        let mut config = AttentionConfig::new(2);
        (config.window, config.sink_tokens) = (Some(10), 3);
        change(&mut config);
        let error = Attention::new_blocking(&cache, config).expect_err("refused").to_string();
        assert!(error.starts_with(part), "{error}");
    };
    refused(&|config| config.window = None, "window: got None, need at most what the cache keeps, 10");
    refused(&|config| config.window = Some(11), "window: got 11, need");
    refused(&|config| config.sink_tokens = 4, "sink_tokens: got 4, need at most what the cache keeps, 3");
    refused(&|config| config.custom_mask = true, "sink_tokens: got 3 beside custom_mask");
    refused(&|config| config.trees = true, "sink_tokens: got 3 beside trees");
    let all = KvCache::new_blocking(&gpu, KvCacheConfig::new(1, 1, 8).with_blocks(20, 4)).expect("cache");
    let mut config = AttentionConfig::new(2);
    config.sink_tokens = 3;
    let error = Attention::new_blocking(&all, config).expect_err("no window").to_string();
    assert!(error.starts_with("sink_tokens: got 3 beside no window"), "{error}");
    // One that sees less is fine.
    let mut config = AttentionConfig::new(2);
    config.window = Some(9);
    Attention::new_blocking(&cache, config).expect("attention");
    assert_eq!(BlockId::NULL.index(), u32::MAX);
}

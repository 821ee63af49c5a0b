//! New tokens that branch: what they attend to, and what an accepted path leaves in the cache.

use fastrand::Rng;
use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
use folio::{
    Attention, AttentionConfig, Error, Gpu, KvCache, KvCacheConfig, Rope, RopeConfig, SequenceId, Step, TokenTree, wgpu,
};

use crate::adapter::{self, ALL, CPU, DEFAULT, GPU, GPU_MATRIX, Open};
use crate::case::{self, Case, Rows, poison, upload};
use crate::tokens::{self, SHAPE, assert_holds, encoder, grow, sequence};

/// Pairs of formats in which each occurs, for K and for V.
const FORMATS: [(KvFormat, KvFormat); 7] =
    [(F32, F32), (F16, F16), (E4M3, F16), (Int8, E4M3), (Int4, Int8), (Int8PerChannel, Int4), (Int4PerChannel, Int4)];

/// A tree of so many tokens; with a high chance of a token following the one before it, it is deep.
pub(crate) fn random_tree(rng: &mut Rng, len: u32) -> TokenTree {
    let deep = rng.f32();
    let parents: Vec<_> = (0..len)
        .map(|i| match rng.u32(..8) {
            0 => None,
            _ if rng.f32() < deep => i.checked_sub(1),
            _ => (i > 0).then(|| rng.u32(..i.max(1))),
        })
        .collect();
    TokenTree::new(&parents).expect("a tree")
}

/// A random path from a root, perhaps of no token.
fn random_path(rng: &mut Rng, tree: &TokenTree) -> Vec<u32> {
    let path = tree.path_to(rng.u32(..tree.len()));
    path[..rng.usize(0..=path.len())].to_vec()
}

/// A case whose sequences have trees: some of them none, and some a line.
fn with_trees(mut case: Case, rng: &mut Rng) -> (Case, Vec<Option<TokenTree>>) {
    case.config.trees = true;
    let trees = case.lens.iter().enumerate().map(|(i, &(_, len))| match i % 4 {
        3 => None,
        2 => Some(TokenTree::new(&(0..len).map(|i| i.checked_sub(1)).collect::<Vec<_>>()).expect("a line")),
        _ => Some(random_tree(rng, len)),
    });
    let trees = trees.collect();
    (case, trees)
}

/// Each token as a sequence of its own: what is cached, its path, and it. There every position is a place, and nothing needs a mask.
pub(crate) fn lines(case: &Case, rows: &[Rows], trees: &[Option<TokenTree>]) -> Vec<Rows> {
    let [k_row, v_row] = [case.head_dim, case.value_dim].map(|dim| (case.num_kv_heads * dim) as usize);
    let q_row = (case.config.num_q_heads * case.head_dim) as usize;
    let mut lines = Vec::new();
    for ((rows, &(context_len, query_len)), tree) in rows.iter().zip(&case.lens).zip(trees) {
        for token in 0..query_len {
            let path = tree.as_ref().map_or_else(|| (0..=token).collect(), |tree| tree.path_to(token));
            let keys = |side: &[f32], row: usize| -> Vec<f32> {
                let seen = (0..context_len).chain(path.iter().map(|new| context_len + new));
                seen.flat_map(|key| side[key as usize * row..][..row].to_vec()).collect()
            };
            let q = rows.q[token as usize * q_row..][..q_row].to_vec();
            lines.push(Rows { q, k: keys(&rows.k, k_row), v: keys(&rows.v, v_row), mask: Vec::new() });
        }
    }
    lines
}

/// Attends over trees, and compares each token with the oracle on its line.
#[track_caller]
fn check(how: Open, case: &Case, trees: &[Option<TokenTree>]) {
    let Some(gpu) = adapter::open(how) else { return };
    let mut case = case.clone().named(format!("{how:?} {:?} {:?} {trees:?}", case.k_format, case.v_format));
    case.f16_products = how.matrix && gpu.matrix_size().is_some();
    let rows = case.rows();
    let (cache, sequences) = case.fill(&gpu, &rows);
    let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
    let batch: Vec<_> = sequences.iter().copied().zip(case.lens.iter().map(|lens| lens.1)).collect();
    let step = cache.begin_step_with_trees(&batch, trees).expect("step");
    let (out, lse) = case.attend_step(&gpu, &attention, &step, 0, &rows, |pass, k, v| {
        cache.append(pass, &step, 0, k, v, None).expect("append");
    });
    // Scales per channel are those of all rows.
    let channels = case.channels(&rows);
    case.compare_with(&gpu, &lines(&case, &rows, trees), channels.as_deref(), &out, lse.as_deref());
}

/// Trees beside single tokens, prompts and lines, whose blocks and tiles end anywhere.
fn mixed() -> Case {
    let lens = [(37, 9), (200, 33), (5, 4), (90, 1), (0, 12), (64, 3), (16, 16), (11, 40), (301, 64), (1, 1)];
    Case::new(&lens, 8, 2, 64)
}

#[test]
fn tokens_attend_to_their_paths() {
    let mut rng = Rng::with_seed(1);
    for how in ALL {
        let (case, trees) = with_trees(mixed(), &mut rng);
        check(how, &case, &trees);
    }
}

#[test]
fn in_every_format() {
    let mut rng = Rng::with_seed(2);
    for ((k, v), how) in FORMATS.into_iter().flat_map(|formats| [CPU, GPU].map(|how| (formats, how))) {
        let lens = [(37, 9), (70, 33), (90, 1), (20, 5), (3, 20)];
        let (case, trees) = with_trees(Case::new(&lens, 6, 2, 40).formats(k, v), &mut rng);
        check(how, &case, &trees);
    }
}

/// Windows by position: also such as end within the tree. With all options that go with trees, and splits.
#[test]
fn with_options_and_windows_by_position() {
    let mut rng = Rng::with_seed(3);
    for (i, how) in ALL.into_iter().enumerate() {
        for window in [1, 3, 20, 100, u32::MAX] {
            let lens = [(37, 9), (200, 33), (120, 1), (90, 20), (400, 24)];
            let case = Case::new(&lens, 4, 2, 32).config(|config| {
                config.window = Some(window);
                config.lse = true;
                config.causal = i % 2 == 0;
                config.softcap = (i % 3 == 0).then_some(20.0);
                config.sinks = (i % 3 == 1).then(|| vec![0.5, -3.0, 2.0, 0.0]);
                config.deterministic = i == 1;
                config.max_workspace_bytes = if i == 2 { 20_000 } else { config.max_workspace_bytes };
            });
            let (mut case, mut trees) = with_trees(case, &mut rng);
            if !case.config.causal {
                // Sequences without a tree see what is behind them, as their lines don't.
                case.lens.retain(|lens| lens.1 != 1 && lens.1 != 20);
                (trees[2], trees[3]) = (trees[4].take(), None);
                trees.retain(Option::is_some);
                trees = case.lens.iter().map(|lens| Some(branching(&mut rng, lens.1))).collect();
            }
            check(how, &case, &trees);
        }
    }
}

pub(crate) fn branching(rng: &mut Rng, len: u32) -> TokenTree {
    loop {
        let tree = random_tree(rng, len);
        if !tree.is_line() {
            return tree;
        }
    }
}

/// Long contexts are cut, and the parts of a tree's tokens merged; groups too large for decode.
#[test]
fn long_contexts_and_large_groups() {
    let mut rng = Rng::with_seed(4);
    for how in [CPU, GPU] {
        let (case, trees) = with_trees(Case::new(&[(3000, 30), (1500, 7), (40, 2), (900, 1)], 2, 1, 64), &mut rng);
        check(how, &case, &trees);
        let (case, trees) = with_trees(Case::new(&[(60, 13), (30, 9), (40, 2), (9, 1)], 12, 1, 24), &mut rng);
        check(how, &case, &trees);
    }
}

#[test]
fn with_matrix_units() {
    if adapter::open_matrix(GPU_MATRIX).is_some() {
        let (case, trees) = with_trees(mixed().formats(F16, Int8), &mut Rng::with_seed(5));
        check(GPU_MATRIX, &case, &trees);
    }
}

/// NaN in a token of another branch stays there.
#[test]
fn nan_stays_in_its_branch() {
    let formats = [(F32, F32), (F16, E4M3), (Int8, Int8)];
    for (how, (k_format, v_format)) in ALL.into_iter().zip(formats.into_iter().cycle()) {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&[(50, 6)], 4, 2, 32).formats(k_format, v_format).config(|config| config.trees = true);
        let tree = TokenTree::new(&[None, Some(0), Some(0), Some(1), Some(2), Some(4)]).expect("a tree");
        let mut rows = case.rows();
        let (row, q_row) = (64, 128);
        // Token 2, which 4 and 5 follow.
        rows[0].k[52 * row..53 * row].fill(f32::NAN);
        rows[0].v[52 * row..53 * row].fill(f32::NAN);
        let (cache, sequences) = case.fill(&gpu, &rows);
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        let step = cache.begin_step_with_trees(&[(sequences[0], 6)], &[Some(tree)]).expect("step");
        let (out, _) = case.attend_step(&gpu, &attention, &step, 0, &rows, |pass, k, v| {
            cache.append(pass, &step, 0, k, v, None).expect("append");
        });
        let is_nan: Vec<_> = out.chunks(q_row).map(|row| row.iter().all(|x| x.is_nan())).collect();
        assert_eq!(is_nan, [false, false, true, false, true, true], "{how:?} {k_format} {v_format}");
        assert!(out.chunks(q_row).zip(is_nan).all(|(row, nan)| nan || row.iter().all(|x| x.is_finite())));
    }
}

/// New tokens of some sequences, and how they branch.
type Batch<'a> = &'a [(SequenceId, Vec<u32>, Option<TokenTree>)];

/// Begins a step with trees, and records and submits it.
fn run(cache: &KvCache, batch: Batch<'_>) -> Step {
    let lens: Vec<_> = batch.iter().map(|(id, tokens, _)| (*id, tokens.len() as u32)).collect();
    let trees: Vec<_> = batch.iter().map(|(.., tree)| tree.clone()).collect();
    let step = cache.begin_step_with_trees(&lens, &trees).expect("step");
    tokens::run(cache, &step, &batch.iter().flat_map(|(_, tokens, _)| tokens).copied().collect::<Vec<_>>());
    step
}

fn accept(cache: &KvCache, step: &mut Step, paths: &[(SequenceId, &[u32])]) -> folio::Result<()> {
    let mut encoder = encoder(cache);
    cache.accept(&mut encoder, step, paths)?;
    cache.gpu().queue().submit([encoder.finish()]);
    Ok(())
}

/// Forks that share blocks, paths of any length, blocks of any size.
#[test]
fn an_accepted_path_is_what_it_would_be_alone() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let mut rng = Rng::with_seed(6);
    for block_size in [1, 2, 3, 16, 256] {
        let config = SHAPE.with_blocks(600 / block_size + 8, block_size);
        let cache = KvCache::new_blocking(&gpu, config).expect("cache");
        poison(&cache);
        for round in 0..8 {
            let mut next = 1000 * round;
            let mut new = |count: u32| {
                next += count;
                (next - count..next).collect::<Vec<u32>>()
            };
            let shared = new(rng.u32(..20));
            let first = if shared.is_empty() { cache.create_sequence() } else { sequence(&cache, &shared) };
            cache.publish_prefix(first, &shared, 0).expect("publish");
            let forks: Vec<_> = (0..3).map(|_| cache.fork(first).expect("fork")).collect();
            let mut batch = Vec::new();
            for (i, &id) in [first].iter().chain(&forks[..2]).enumerate() {
                let len = rng.u32(1..40);
                batch.push((id, new(len), (i < 2).then(|| random_tree(&mut rng, len))));
            }
            let mut step = run(&cache, &batch);
            let paths: Vec<_> =
                batch.iter().map(|(.., tree)| tree.as_ref().map(|t| random_path(&mut rng, t))).collect();
            let given: Vec<_> =
                batch.iter().zip(&paths).filter_map(|((id, ..), p)| Some((*id, p.as_deref()?))).collect();
            accept(&cache, &mut step, &given).expect("accept");
            cache.commit(step).expect("commit");
            for ((id, tokens, _), path) in batch.iter().zip(&paths) {
                let kept =
                    path.as_ref().map_or_else(|| tokens.clone(), |p| p.iter().map(|&i| tokens[i as usize]).collect());
                let text = [&shared[..], &kept].concat();
                assert_holds(&cache, *id, &text);
                assert_eq!(
                    cache.block_table(*id).expect("table").len() as u32,
                    (text.len() as u32).div_ceil(block_size)
                );
                // It goes on from there.
                let more = new(5);
                grow(&cache, &[(*id, &more)]);
                assert_holds(&cache, *id, &[&text[..], &more].concat());
            }
            // Nobody wrote into the blocks of the fork that took no part.
            assert_holds(&cache, forks[2], &shared);
            cache.clear();
        }
    }
}

/// Rows of packed formats, with scales of their own or of their channels, in one buffer or in several: the same values as those of a cache that got
/// the path alone, in every layer. Keys are rotated by their tokens' positions.
#[test]
fn rows_move_in_every_format_with_their_scales() {
    let mut rng = Rng::with_seed(7);
    let cut = Open { max_binding_bytes: Some(1 << 20), ..DEFAULT };
    for (how, head_dim, block_size) in [(DEFAULT, 8, 3), (GPU, 40, 16), (CPU, 64, 5), (cut, 128, 64)] {
        let Some(gpu) = adapter::open(how) else { return };
        for (k_format, v_format) in FORMATS {
            let num_blocks = if how == cut { 80 } else { 24 };
            let config =
                KvCacheConfig::new(2, 3, head_dim).with_blocks(num_blocks, block_size).with_formats(k_format, v_format);
            let caches = [0, 1].map(|_| KvCache::new_blocking(&gpu, config).expect("cache"));
            let row = 3 * head_dim;
            let ropes = caches.each_ref().map(|cache| {
                poison(cache);
                if k_format.has_channel_scales() {
                    let table: Vec<f32> = (0..2 * row).map(|i| if i < row { 0.03 } else { -4.0 }).collect();
                    (0..2).for_each(|layer| cache.set_key_scales(layer, &table).expect("scales"));
                }
                if how == cut {
                    // Neighbours of a sequence lie in different segments.
                    case::shuffle(cache, 3);
                    assert!(k_format != F32 || cache.layer_buffers(0).expect("layer").0.len() > 1);
                }
                Rope::new_blocking(cache, RopeConfig::new(head_dim, 10_000.0)).expect("rope")
            });
            let values =
                |count: u32, rng: &mut Rng| -> Vec<f32> { (0..count * row).map(|_| rng.f32() * 4.0 - 2.0).collect() };
            let append = |i: usize, step: &Step, rows: &[Vec<f32>; 4]| {
                let mut encoder = encoder(&caches[i]);
                for layer in 0..2 {
                    let [k, v] = [0, 2].map(|side| upload(&gpu, &rows[side + layer as usize]));
                    caches[i].append(&mut encoder, step, layer, &k, &v, Some(&ropes[i])).expect("append");
                }
                gpu.queue().submit([encoder.finish()]);
            };
            let (context_len, len) = (rng.u32(1..3 * block_size), rng.u32(2..3 * block_size));
            let context: [_; 4] = std::array::from_fn(|_| values(context_len, &mut rng));
            let ids = [0, 1].map(|i| {
                let id = caches[i].create_sequence();
                let step = caches[i].begin_step(&[(id, context_len)]).expect("step");
                append(i, &step, &context);
                caches[i].commit(step).expect("commit");
                id
            });
            let tree = branching(&mut rng, len);
            let deepest = (0..len).max_by_key(|&i| tree.depths()[i as usize]).expect("a token");
            let path = tree.path_to(deepest);
            let new: [_; 4] = std::array::from_fn(|_| values(len, &mut rng));
            let mut step = caches[0].begin_step_with_trees(&[(ids[0], len)], &[Some(tree)]).expect("step");
            append(0, &step, &new);
            accept(&caches[0], &mut step, &[(ids[0], &path)]).expect("accept");
            caches[0].commit(step).expect("commit");
            let kept = |side: &Vec<f32>| -> Vec<f32> {
                path.iter().flat_map(|&i| side[(i * row) as usize..][..row as usize].to_vec()).collect()
            };
            let step = caches[1].begin_step(&[(ids[1], path.len() as u32)]).expect("step");
            append(1, &step, &new.each_ref().map(kept));
            caches[1].commit(step).expect("commit");
            for layer in 0..2 {
                let [got, want] = [0, 1].map(|i| caches[i].gather_blocking(ids[i], layer).expect("gather"));
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(want.k.iter().chain(&want.v).all(|x| x.is_finite()));
                let same = (bits(&got.k), bits(&got.v)) == (bits(&want.k), bits(&want.v));
                assert!(same, "{how:?} {k_format} {v_format}, layer {layer}, path {path:?}");
            }
        }
    }
}

/// Whatever is given as a tree or a path: an error that names it, and nothing has changed; then the right one is accepted.
#[test]
fn bad_trees_and_paths_are_refused_and_change_nothing() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = KvCache::new_blocking(&gpu, SHAPE).expect("cache");
    let other = KvCache::new_blocking(&gpu, SHAPE).expect("cache");
    let (id, plain, stranger) = (sequence(&cache, &[1, 2, 3]), sequence(&cache, &[7]), sequence(&cache, &[9]));
    let tree = TokenTree::new(&[None, Some(0), Some(0), Some(2)]).expect("a tree");
    let named = |error: Error, name: &str| {
        assert!(matches!(error, Error::Argument { .. }) && error.to_string().starts_with(name), "{error}");
    };
    let before = cache.usage();
    for trees in [&[][..], &[Some(tree.clone())], &[Some(tree.clone()), Some(tree.clone())]] {
        named(cache.begin_step_with_trees(&[(id, 4), (plain, 2)], trees).expect_err("refused"), "trees");
    }
    named(cache.begin_step_with_trees(&[(id, 5)], &[Some(tree.clone())]).expect_err("refused"), "trees");
    assert_eq!(cache.usage(), before);

    let batch = [(id, vec![10, 11, 12, 13], Some(tree.clone())), (plain, vec![20, 21], None)];
    // Attention that knows nothing of trees, and options that don't go with them.
    let step = run(&cache, &batch);
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(4)).expect("attention");
    named(attention.plan(&step).expect_err("refused"), "step");
    let refused = |change: fn(&mut AttentionConfig)| {
        let mut config = AttentionConfig::new(4);
        config.trees = true;
        change(&mut config);
        named(Attention::new_blocking(&cache, config).expect_err("refused"), "trees");
    };
    refused(|config| config.custom_mask = true);
    refused(|config| config.alibi_slopes = Some(vec![0.5; 4]));
    // Without an accepted path it is not committed, but rolled back.
    named(cache.commit(step).expect_err("refused"), "step");
    assert_eq!(cache.usage(), before);
    assert_holds(&cache, id, &[1, 2, 3]);

    let mut step = run(&cache, &batch);
    let good: &[u32] = &[0, 2, 3];
    let wrong: [&[(SequenceId, &[u32])]; 8] = [
        &[],
        &[(plain, &[0])],
        &[(stranger, good)],
        &[(id, good), (plain, &[])],
        &[(id, good), (id, good)],
        &[(id, &[0, 1, 2])],
        &[(id, &[2])],
        &[(id, &[0, u32::MAX])],
    ];
    for paths in wrong {
        named(accept(&cache, &mut step, paths).expect_err("refused"), "path");
    }
    let mut rng = Rng::with_seed(8);
    for _ in 0..300 {
        let path: Vec<u32> = (0..rng.u32(..6)).map(|_| rng.u32(..6)).collect();
        let leads = path.iter().enumerate().all(|(i, &token)| tree.path_to(token) == path[..=i]);
        if !leads || path.contains(&4) || path.contains(&5) {
            named(accept(&cache, &mut step, &[(id, &path)]).expect_err("refused"), "path");
        }
    }
    assert!(matches!(accept(&other, &mut step, &[(id, good)]), Err(Error::Stale { .. })));
    accept(&cache, &mut step, &[(id, good)]).expect("accept");
    // Its rows have moved: nothing else may be done with it.
    assert!(matches!(accept(&cache, &mut step, &[(id, good)]), Err(Error::Stale { .. })));
    let k = upload(&gpu, &[0.0; 6 * 16]);
    assert!(matches!(cache.append(&mut encoder(&cache), &step, 0, &k, &k, None), Err(Error::Stale { .. })));
    cache.commit(step).expect("commit");
    assert_holds(&cache, id, &[1, 2, 3, 10, 12, 13]);
    assert_holds(&cache, plain, &[7, 20, 21]);

    // Dropped after its path was accepted and moved: as it was before.
    let before = cache.usage();
    let mut step = run(&cache, &[(id, vec![30, 31, 32, 33], Some(tree.clone()))]);
    accept(&cache, &mut step, &[(id, good)]).expect("accept");
    drop(step);
    assert_eq!(cache.usage(), before);
    assert_holds(&cache, id, &[1, 2, 3, 10, 12, 13]);
    // No token accepted, and a step of a cache that has been cleared.
    let mut step = run(&cache, &[(id, vec![30, 31, 32, 33], Some(tree.clone()))]);
    accept(&cache, &mut step, &[(id, &[])]).expect("accept");
    cache.commit(step).expect("commit");
    assert_holds(&cache, id, &[1, 2, 3, 10, 12, 13]);
    assert_eq!(cache.usage(), before);
    let mut step = run(&cache, &[(id, vec![30, 31, 32, 33], Some(tree))]);
    let second = run(&cache, &[(plain, vec![40], None)]);
    cache.clear();
    assert!(matches!(accept(&cache, &mut step, &[(id, good)]), Err(Error::Stale { .. })));
    assert!(matches!(cache.commit(second), Err(Error::Stale { .. })));
}

/// The same bits as without trees, if the trees are lines: those of the same kernels.
#[test]
fn a_line_is_a_step_without_trees() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let case = Case::new(&[(37, 9), (5, 1)], 4, 2, 32);
    let rows = case.rows();
    let attend = |gpu: &Gpu, as_trees: bool| {
        let (cache, sequences) = case.fill(gpu, &rows);
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        let batch: Vec<_> = sequences.iter().copied().zip(case.lens.iter().map(|lens| lens.1)).collect();
        let line =
            |&(_, len): &(SequenceId, u32)| TokenTree::new(&(0..len).map(|i| i.checked_sub(1)).collect::<Vec<_>>());
        let mut step = if as_trees {
            let trees: Vec<_> = batch.iter().map(|entry| line(entry).ok()).collect();
            cache.begin_step_with_trees(&batch, &trees).expect("step")
        } else {
            cache.begin_step(&batch).expect("step")
        };
        let (out, _) = case.attend_step(gpu, &attention, &step, 0, &rows, |pass: &mut wgpu::ComputePass<'_>, k, v| {
            cache.append(pass, &step, 0, k, v, None).expect("append");
        });
        if as_trees {
            accept(&cache, &mut step, &[(sequences[0], &[0, 1, 2]), (sequences[1], &[])]).expect("accept");
        }
        cache.commit(step).expect("commit");
        let lens: Vec<_> = sequences.iter().map(|&id| cache.seq_len(id).expect("length")).collect();
        assert_eq!(lens, if as_trees { [40, 5] } else { [46, 6] });
        out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    assert_eq!(attend(&gpu, true), attend(&gpu, false));
}

//! Random combinations of everything that shapes an attention call, against the oracle.
//!
//! A seed is a case. Several cases in a row share what is compiled, since a kernel takes longer to compile than a batch to run: they differ in
//! lengths, numbers and policies.

use fastrand::Rng;
use folio::KvFormat::{E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
use folio::{Attention, AttentionConfig, Cascade, Error, KvCache, TokenTree};

use crate::adapter::{self, ALL, Open};
use crate::case::{Case, append_rows};
use crate::trees::{branching, lines, random_tree};

/// Cases of a set of kernels.
const CASES_PER_SHAPE: u64 = 5;

/// Sets of kernels that are tried in every run of the tests, and by those who ask for more.
const SHAPES: u64 = 8;
const MORE_SHAPES: u64 = 200;

fn one_of<T: Clone>(rng: &mut Rng, values: &[T]) -> T {
    values[rng.usize(..values.len())].clone()
}

fn chance(rng: &mut Rng, percent: u32) -> bool {
    rng.u32(..100) < percent
}

/// What is compiled in: the family of kernels, formats, sizes and flags. The case has no sequences yet.
fn shape(rng: &mut Rng, index: u64) -> (Open, Case) {
    let how = ALL[(index % ALL.len() as u64) as usize];
    let latent = chance(rng, 25);
    let num_kv_heads = if latent { 1 } else { rng.u32(1..4) };
    let group_size = one_of(rng, &[1, 1, 2, 3, 4, 8, 9]);
    let head_dim = one_of(rng, &[8, 16, 24, 32, 40, 64, 64, 72, 128]);
    let mut case = Case::new(&[], group_size * num_kv_heads, num_kv_heads, head_dim);
    case = case.block_size(one_of(rng, &[1, 4, 5, 16, 16, 32]));
    let (rows, coded) = (&[F32, F16, E4M3, Int8, Int4], &[F32, F16, E4M3, Int8, Int4, Int8PerChannel, Int4PerChannel]);
    if latent {
        let format = one_of(rng, rows);
        case = case.formats(format, format).latent(8 * rng.u32(1..=head_dim / 8));
    } else {
        case = case.formats(one_of(rng, coded), one_of(rng, rows));
        if chance(rng, 40) {
            case = case.value_dim(one_of(rng, &[8, 16, 48, 64, 88, 136]));
        }
    }
    let config = &mut case.config;
    config.causal = chance(rng, 75);
    config.window = chance(rng, 35).then_some(1);
    config.softcap = chance(rng, 30).then_some(1.0);
    config.alibi_slopes = chance(rng, 25).then(Vec::new);
    config.sinks = chance(rng, 30).then(Vec::new);
    config.custom_mask = chance(rng, 20);
    config.trees = chance(rng, 30);
    config.lse = chance(rng, 50);
    (how, case)
}

/// Numbers, policies and a batch.
fn batch(rng: &mut Rng, mut case: Case) -> Case {
    let config = &mut case.config;
    let heads = config.num_q_heads as usize;
    config.window = config.window.map(|_| one_of(rng, &[1, 2, 7, 33, 200, u32::MAX]));
    config.softcap = config.softcap.map(|_| one_of(rng, &[1.0, 30.0]));
    config.alibi_slopes = config.alibi_slopes.as_ref().map(|_| (0..heads).map(|_| rng.f32() * 0.5).collect());
    config.sinks = config.sinks.as_ref().map(|_| (0..heads).map(|_| rng.f32() * 6.0 - 3.0).collect());
    config.softmax_scale = one_of(rng, &[None, None, Some(0.3), Some(-0.2), Some(1.0)]);
    config.deterministic = chance(rng, 25);
    config.cascade = one_of(rng, &[Cascade::Never, Cascade::WhereItPays, Cascade::Always]);
    config.max_workspace_bytes = one_of(rng, &[64 << 20, 64 << 20, 30_000, 2_000]);
    config.max_dispatch_work = one_of(rng, &[None, None, Some(300_000), Some(1)]);
    case.q_scale = one_of(rng, &[1.0, 1.0, 0.1, 20.0]);
    case.mask_density = one_of(rng, &[0.5, 0.02, 0.98]);
    case.seed = rng.u64(..);
    if config.cascade != Cascade::Never {
        case.prefix = one_of(rng, &[0, 64, 3 * case.block_size + 1]);
    }
    let mut len = || {
        let query_len = match rng.u32(..3) {
            0 => 1,
            1 => rng.u32(2..9),
            _ => rng.u32(9..50),
        };
        let context_len = match rng.u32(..4) {
            0 => 0,
            1 => rng.u32(..40),
            2 => rng.u32(40..300),
            // More than a split has, now and then.
            _ => one_of(rng, &[90, 130, 1100]),
        };
        (case.prefix + context_len, query_len)
    };
    case.lens = (0..1 + len().1 % 4).map(|_| len()).collect();
    case
}

/// Trees for a batch. What is behind a token of a line it sees without a causal mask, as no token does of the lines that it is compared with.
fn trees(rng: &mut Rng, case: &Case) -> Vec<Option<TokenTree>> {
    let causal = case.config.causal;
    let tree = |rng: &mut Rng, len: u32| match len {
        1 => None,
        len if !causal => Some(branching(rng, len)),
        len => chance(rng, 80).then(|| random_tree(rng, len)),
    };
    case.lens.iter().map(|&(_, len)| tree(rng, len)).collect()
}

/// What doesn't go together is refused by name. Leaves a case that does.
fn settle(cache: &KvCache, config: &mut AttentionConfig) {
    let beside = [("custom_mask", config.custom_mask), ("alibi_slopes", config.alibi_slopes.is_some())];
    if !config.trees || beside.iter().all(|(_, is_there)| !is_there) {
        return;
    }
    let error = Attention::new_blocking(cache, config.clone()).expect_err("trees beside what they don't go with");
    let named = beside.iter().any(|(name, is_there)| *is_there && error.to_string().contains(name));
    assert!(matches!(error, Error::Argument { argument: "trees", .. }) && named, "{error}");
    (config.custom_mask, config.alibi_slopes) = (false, None);
}

fn check(index: u64, number: u64) {
    let (how, case) = shape(&mut Rng::with_seed(index), index);
    let Some(gpu) = adapter::open(how) else { return };
    let seed = index * CASES_PER_SHAPE + number;
    let mut rng = Rng::with_seed(1_000_000 + seed);
    let mut case = batch(&mut rng, case).named(format!("seed {seed}, {how:?}"));
    let trees = if case.config.trees { trees(&mut rng, &case) } else { Vec::new() };
    // What a failed test prints, wherever it failed.
    eprintln!("{case:?}, {trees:?}");
    let is_refused = case.config.trees && (case.config.custom_mask || case.config.alibi_slopes.is_some());
    if is_refused {
        let (cache, _) =
            Case { config: AttentionConfig::new(case.config.num_q_heads), ..case.clone() }.fill(&gpu, &case.rows());
        settle(&cache, &mut case.config);
    }
    let rows = case.rows();
    let (cache, sequences) = case.fill(&gpu, &rows);
    let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
    if trees.is_empty() {
        let (out, lse) = case.attend(&cache, &attention, &sequences, &rows);
        case.compare(&gpu, &rows, &out, lse.as_deref());
        return;
    }
    let batch: Vec<_> = sequences.iter().copied().zip(case.lens.iter().map(|lens| lens.1)).collect();
    let step = cache.begin_step_with_trees(&batch, &trees).expect("step");
    let (out, lse) = case.attend_step(&gpu, &attention, &step, 0, &rows, |pass, k, v| {
        append_rows(&cache, pass, &step, 0, k, v);
    });
    let channels = case.channels(&rows);
    case.compare_with(&gpu, &lines(&case, &rows, &trees), channels.as_deref(), &out, lse.as_deref());
}

#[test]
fn a_sample() {
    for index in 0..SHAPES {
        (0..CASES_PER_SHAPE).for_each(|number| check(index, number));
    }
}

/// `cargo test --release --test gpu combinations -- --ignored`; `FOLIO_SEED` is a failed case's seed, which then runs alone.
#[test]
#[ignore = "takes minutes"]
fn a_large_sample() {
    if let Some(seed) = std::env::var("FOLIO_SEED").ok().and_then(|seed| seed.parse::<u64>().ok()) {
        return check(seed / CASES_PER_SHAPE, seed % CASES_PER_SHAPE);
    }
    for index in SHAPES..MORE_SHAPES {
        (0..CASES_PER_SHAPE).for_each(|number| check(index, number));
    }
}

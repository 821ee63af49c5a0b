//! Plans as plain data: what the items of a [`WorkLists`] make the kernels compute, against what attention means.

mod checker;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use checker::Checker;
use folio::plan::{
    CascadePolicy, NO_PARTIAL, PlanShape, SPLIT_GRANULE, SplitPolicy, WorkItem, WorkLists, partial_row_bytes,
};
use folio::sequence::{Batch, BatchEntry, QueryKernel, TokenTree};
use proptest::prelude::*;

const TABLE_OFFSET: u32 = 1000;
const TOKENS_OFFSET: u32 = 700_000;
const BLOCK_SIZE: u32 = 16;

/// A batch of (query_len, context_len) with tables of made-up blocks.
fn batch(lens: &[(u32, u32)]) -> Batch {
    let mut batch = Batch::default();
    for &(query_len, context_len) in lens {
        let start = batch.tables.len();
        let num_blocks = (query_len + context_len).div_ceil(BLOCK_SIZE) as usize;
        batch.tables.resize(start + num_blocks, 7);
        batch.entries.push(BatchEntry {
            query_len,
            context_len,
            table: start..start + num_blocks,
            kernel: QueryKernel::Fastest,
            tree: None,
        });
    }
    batch
}

/// Words of a row of a sequence's mask: in a batch with trees only theirs have one.
fn mask_stride(shape: &PlanShape, batch: &Batch, entry: &BatchEntry) -> u32 {
    match &entry.tree {
        Some(tree) => tree.mask_stride(shape.window.is_some()),
        None if batch.has_trees() => 0,
        None => entry.seq_len().div_ceil(32),
    }
}

/// Where each sequence's mask bits would start, one after another.
fn mask_offsets(shape: &PlanShape, batch: &Batch) -> Vec<u32> {
    let words = batch.entries.iter().scan(500_000, |next, entry| {
        let start = *next;
        *next += entry.query_len * mask_stride(shape, batch, entry);
        Some(start)
    });
    words.collect()
}

/// Gives sequences trees: random ones by these seeds, none to those with a multiple of 3.
fn with_trees(mut batch: Batch, seeds: &[u64]) -> Batch {
    for (entry, &seed) in batch.entries.iter_mut().zip(seeds) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let parents: Vec<_> = (0..entry.query_len).map(|i| rng.u32(0..=i).checked_sub(1)).collect();
        if !seed.is_multiple_of(3) {
            entry.tree = Some(Arc::new(TokenTree::new(&parents).expect("parents before their children")));
        }
    }
    batch
}

fn plan(shape: &PlanShape, policy: &SplitPolicy, batch: &Batch) -> WorkLists {
    // Masks and what is shared exclude each other.
    let masks = if policy.cascade.is_some() { Vec::new() } else { mask_offsets(shape, batch) };
    WorkLists::new(shape, policy, batch, TABLE_OFFSET, &masks, TOKENS_OFFSET).expect("a plan")
}

#[track_caller]
fn assert_plan(shape: &PlanShape, policy: &SplitPolicy, lens: &[(u32, u32)]) -> WorkLists {
    let batch = batch(lens);
    let plan = plan(shape, policy, &batch);
    let checked = Checker::new(shape, policy, &batch, &plan).check();
    assert!(checked.is_ok(), "{checked:?}\n{shape:?}\n{policy:?}\n{lens:?}");
    plan
}

fn shapes() -> impl Strategy<Value = PlanShape> {
    let window = prop_oneof![Just(None), prop::sample::select(vec![1, 3, 13, 37, 128, u32::MAX]).prop_map(Some)];
    let group_size = prop::sample::select(vec![1_u32, 2, 4, 7, 8, 32]);
    let tile_q = prop::sample::select(vec![1_u32, 4, 8, 16, 32, 64]);
    let sinks = prop_oneof![Just(0), prop::sample::select(vec![1_u32, 4, 64, 100, 700, u32::MAX])];
    let window = (window, sinks);
    let dims = prop::sample::select(vec![(8, 8), (64, 64), (256, 256), (192, 128), (64, 136), (576, 512)]);
    (1..4_u32, group_size, dims, any::<bool>(), window, any::<bool>(), tile_q).prop_map(
        |(num_kv_heads, group_size, (head_dim, value_dim), causal, (window, sink_tokens), has_decode, tile_q)| {
            PlanShape {
                num_kv_heads,
                group_size,
                head_dim,
                value_dim,
                causal,
                window,
                sink_tokens,
                has_decode: has_decode && group_size <= folio::kernel::MAX_DECODE_GROUP,
                tile_q,
                block_size: BLOCK_SIZE,
            }
        },
    )
}

fn policies() -> impl Strategy<Value = SplitPolicy> {
    (
        prop::sample::select(vec![1, 8, 64, 1000, u32::MAX]),
        prop::sample::select(vec![1, 64, 100, 256]),
        prop::sample::select(vec![64, 100, 128, 192, 1000, 1 << 30]),
        prop_oneof![Just(None), prop::sample::select(vec![1, 64, 100, 128, 5000]).prop_map(Some)],
        prop::sample::select(vec![0, 1000, 20_000, 300_000, 64 << 20]),
    )
        .prop_map(|(target_workgroups, min_split_len, max_split_len, fixed_split_len, max_workspace_bytes)| {
            SplitPolicy {
                target_workgroups,
                min_split_len,
                max_split_len,
                fixed_split_len,
                max_workspace_bytes,
                max_dispatch_work: u64::MAX,
                cascade: None,
            }
        })
}

fn batches() -> impl Strategy<Value = Vec<(u32, u32)>> {
    let query_len = prop_oneof![Just(1_u32), 1..5_u32, 1..70_u32];
    let context_len = prop_oneof![Just(0_u32), 0..600_u32, 60..70_u32, 127..130_u32];
    prop::collection::vec((query_len, context_len), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_visible_key_is_attended_to_exactly_once(shape in shapes(), policy in policies(), lens in batches()) {
        let batch = batch(&lens);
        let plan = plan(&shape, &policy, &batch);
        let checked = Checker::new(&shape, &policy, &batch, &plan).check();
        prop_assert!(checked.is_ok(), "{:?}", checked);
    }

    #[test]
    fn tokens_of_trees_attend_to_every_key_before_them_exactly_once(
        shape in shapes(),
        policy in policies(),
        lens in batches(),
        seeds in prop::collection::vec(any::<u64>(), 6),
    ) {
        let batch = with_trees(batch(&lens), &seeds);
        let shape = PlanShape { sink_tokens: 0, ..shape }; // (which have no trees beside them)
        let plan = plan(&shape, &policy, &batch);
        let checked = Checker::new(&shape, &policy, &batch, &plan).check();
        prop_assert!(checked.is_ok(), "{:?}", checked);
    }

    #[test]
    fn the_decode_kernel_gets_exactly_the_single_tokens(shape in shapes(), policy in policies(), lens in batches()) {
        let batch = batch(&lens);
        let plan = plan(&shape, &policy, &batch);
        let starts = batch.query_start();
        let decoded: HashSet<u32> = plan.decode.iter().map(|item| item.query_start).collect();
        for (entry, start) in batch.entries.iter().zip(starts) {
            prop_assert_eq!(decoded.contains(&start), shape.has_decode && entry.query_len == 1);
        }
    }

    #[test]
    fn a_fixed_split_length_makes_a_sequence_independent_of_its_batch(
        shape in shapes(),
        policy in policies(),
        fixed in prop::sample::select(vec![64, 100, 128, 256]),
        lens in batches(),
    ) {
        let policy = SplitPolicy { fixed_split_len: Some(fixed), ..policy };
        let together = batch(&lens);
        let plan_together = plan(&shape, &policy, &together);
        for (sequence, &len) in lens.iter().enumerate() {
            let alone = batch(&[len]);
            let plan_alone = plan(&shape, &policy, &alone);
            prop_assert_eq!(plan_alone.split_len, plan_together.split_len);
            prop_assert_eq!(
                items_of(&shape, &plan_alone, &alone, 0),
                items_of(&shape, &plan_together, &together, sequence),
                "sequence {} of {:?}", sequence, lens
            );
        }
    }
}

/// A sequence's items and (token, num_splits) of its merges, with all positions counted from its own start.
fn items_of(
    shape: &PlanShape,
    plan: &WorkLists,
    batch: &Batch,
    sequence: usize,
) -> ([Vec<WorkItem>; 4], Vec<(u32, u32)>) {
    let starts = batch.query_start();
    let tokens = starts[sequence]..starts[sequence + 1];
    let masks = mask_offsets(shape, batch);
    // Partial rows are counted from the first one of their chunk.
    let mut first_rows: BTreeMap<u32, u32> = BTreeMap::new();
    for item in plan.decode.iter().chain(&plan.prefill).chain(&plan.sink_decode).chain(&plan.sink_prefill) {
        let first = first_rows.entry(item.query_start).or_insert(item.part_row);
        *first = item.part_row.min(*first);
    }
    let relative = |items: &[WorkItem]| {
        let own = items.iter().filter(|item| tokens.contains(&item.query_start));
        let relative = own.map(|item| WorkItem {
            query_start: item.query_start - tokens.start,
            table_offset: item.table_offset - batch.entries[sequence].table.start as u32,
            mask_offset: item.mask_offset - masks[sequence],
            part_row: if item.part_row == NO_PARTIAL {
                NO_PARTIAL
            } else {
                item.part_row - first_rows[&item.query_start]
            },
            ..*item
        });
        relative.collect()
    };
    let merges = plan.merge.iter().filter(|merge| tokens.contains(&merge.token));
    let mut merges: Vec<_> = merges.map(|merge| (merge.token - tokens.start, merge.num_splits)).collect();
    // Links stand behind the items of their round, and where a round ends depends on the batch.
    merges.sort_unstable();
    ([&plan.decode, &plan.prefill, &plan.sink_decode, &plan.sink_prefill].map(|items| relative(items)), merges)
}

/// (query_len, seq_len) that other attention libraries test.
const LENS: [(u32, u32); 11] = [
    (1, 128),
    (1, 339),
    (3, 1024),
    (64, 800),
    (64, 256),
    (3, 799),
    (16, 20_000),
    (1, 131_072),
    (5, 18),
    (129, 463),
    (577, 577),
];

/// What lavapipe gets, and a GPU.
const POLICIES: [SplitPolicy; 2] = [
    SplitPolicy {
        target_workgroups: 8,
        min_split_len: 1024,
        max_split_len: 12_288,
        fixed_split_len: None,
        max_workspace_bytes: 64 << 20,
        max_dispatch_work: u64::MAX,
        cascade: None,
    },
    SplitPolicy {
        target_workgroups: 256,
        min_split_len: 256,
        max_split_len: 1 << 30,
        fixed_split_len: None,
        max_workspace_bytes: 64 << 20,
        max_dispatch_work: u64::MAX,
        cascade: None,
    },
];

const SHAPE: PlanShape = PlanShape {
    num_kv_heads: 2,
    group_size: 4,
    head_dim: 64,
    value_dim: 64,
    causal: true,
    window: None,
    sink_tokens: 0,
    has_decode: true,
    tile_q: 32,
    block_size: BLOCK_SIZE,
};

#[test]
fn lengths_that_other_libraries_test_are_covered() {
    for policy in POLICIES {
        for fixed_split_len in [None, Some(1024)] {
            let policy = SplitPolicy { fixed_split_len, ..policy };
            for group_size in [1, 4, 7, 8, 32] {
                for window in [None, Some(1), Some(3), Some(13), Some(37), Some(128)] {
                    for causal in [true, false] {
                        let has_decode = group_size <= folio::kernel::MAX_DECODE_GROUP;
                        let shape = PlanShape { group_size, window, causal, has_decode, num_kv_heads: 1, ..SHAPE };
                        for (query_len, seq_len) in LENS {
                            assert_plan(&shape, &policy, &[(query_len, seq_len - query_len)]);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn all_of_those_lengths_in_one_batch_are_covered() {
    let lens = LENS.map(|(query_len, seq_len)| (query_len, seq_len - query_len));
    for policy in POLICIES {
        assert_plan(&SHAPE, &policy, &lens);
        assert_plan(&SHAPE, &SplitPolicy { fixed_split_len: Some(1024), ..policy }, &lens);
        let small =
            assert_plan(&SHAPE, &SplitPolicy { max_split_len: 256, max_workspace_bytes: 1 << 20, ..policy }, &lens);
        assert!(small.rounds.len() > 1);
    }
}

#[test]
fn a_long_sequence_stays_within_the_loop_budget() {
    let plan = assert_plan(&SHAPE, &POLICIES[0], &[(1, 131_071)]);
    assert_eq!(plan.split_len, 12_288);
    assert_eq!(plan.decode.len(), 131_072_usize.div_ceil(12_288));
    assert_eq!((plan.prefill.len(), plan.merge.len(), plan.rounds.len()), (0, 1, 1));
    assert_eq!(plan.merge[0].num_splits, 11);
    assert_eq!(plan.num_partial_rows, 11 * 2 * 4);
}

#[test]
fn a_windowed_sequence_reads_its_window_only() {
    let shape = PlanShape { window: Some(128), ..SHAPE };
    let plan = assert_plan(&shape, &POLICIES[0], &[(1, 131_071)]);
    let ranges: Vec<_> = plan.decode.iter().map(|item| (item.kv_begin, item.kv_end)).collect();
    assert_eq!(ranges, [(130_944, 131_072)]);
    assert!(plan.merge.is_empty());
}

#[test]
fn short_sequences_are_neither_split_nor_merged() {
    let plan = assert_plan(&SHAPE, &POLICIES[0], &[(1, 0), (1, 300), (5, 13)]);
    assert!(plan.decode.iter().chain(&plan.prefill).all(|item| item.part_row == NO_PARTIAL));
    assert_eq!((plan.decode.len(), plan.prefill.len(), plan.merge.len()), (2, 1, 0));
    assert_eq!((plan.rounds.len(), plan.num_partial_rows), (1, 0));
}

#[test]
fn the_longest_sequences_and_tiles_start_first() {
    let plan = assert_plan(&SHAPE, &POLICIES[0], &[(10, 0), (100, 300), (1, 20), (1, 500)]);
    let lens: Vec<_> = plan.prefill.iter().map(|item| item.kv_end).collect();
    assert!(lens.is_sorted_by(|a, b| a >= b), "{lens:?}");
    let lens: Vec<_> = plan.decode.iter().map(|item| item.kv_end).collect();
    assert_eq!(lens, [501, 21]);
}

#[test]
fn a_workspace_for_one_token_takes_a_round_per_token() {
    let policy = SplitPolicy { max_split_len: 64, max_workspace_bytes: 0, ..POLICIES[0] };
    let plan = assert_plan(&SHAPE, &policy, &[(3, 200), (1, 100)]);
    assert_eq!(plan.rounds.len(), 4);
    assert!(plan.rounds.iter().all(|round| round.merge.len() == 1));
    // 203 keys, 4 splits of 2 * 4 rows.
    assert_eq!(plan.num_partial_rows, 4 * 8);
}

#[test]
fn masks_that_are_not_there_need_no_offsets() {
    let batch = batch(&[(1, 100), (20, 3)]);
    let plan = WorkLists::new(&SHAPE, &POLICIES[0], &batch, 0, &[], TOKENS_OFFSET).expect("a plan");
    assert!(plan.decode.iter().chain(&plan.prefill).all(|item| item.mask_offset == 0));
}

#[test]
fn an_empty_batch_is_no_work() {
    let plan = plan(&SHAPE, &POLICIES[0], &Batch::default());
    assert!(plan.decode.is_empty() && plan.prefill.is_empty() && plan.merge.is_empty());
    assert_eq!(plan.num_partial_rows, 0);
}

#[test]
fn batches_count_their_tokens() {
    let batch = batch(&[(3, 10), (1, 0), (5, 7)]);
    assert_eq!(batch.num_tokens(), 9);
    assert_eq!(batch.query_start(), [0, 3, 4, 9]);
    assert_eq!(batch.entries[2].seq_len(), 12);
    assert_eq!((Batch::default().num_tokens(), Batch::default().query_start()), (0, vec![0]));
}

#[test]
fn partial_rows_hold_a_row_and_a_state() {
    assert_eq!([8, 64, 256].map(partial_row_bytes), [48, 272, 1040]);
}

/// 64 workgroups wanted, splits of 256 to 4096 keys.
const POLICY: SplitPolicy = SplitPolicy {
    target_workgroups: 64,
    min_split_len: 256,
    max_split_len: 4096,
    fixed_split_len: None,
    max_workspace_bytes: 1 << 20,
    max_dispatch_work: u64::MAX,
    cascade: None,
};

fn split_len(policy: SplitPolicy, tile_keys: &[u32], num_kv_heads: u32) -> u32 {
    policy.split_len(tile_keys.iter().copied(), num_kv_heads)
}

#[test]
fn a_busy_device_splits_only_at_the_maximum() {
    assert_eq!(split_len(POLICY, &[10_000; 64], 1), 4096);
    assert_eq!(split_len(POLICY, &[10_000; 8], 8), 4096);
}

#[test]
fn an_idle_device_shares_the_keys_out_evenly() {
    // 8 heads of 8192 keys among 64 workgroups.
    assert_eq!(split_len(POLICY, &[8192], 8), 1024);
    assert_eq!(split_len(POLICY, &[8193], 8), 1088);
    assert_eq!(split_len(POLICY, &[8192, 8192], 8), 2048);
}

#[test]
fn splits_are_never_shorter_than_pays() {
    assert_eq!(split_len(POLICY, &[1], 1), 256);
    assert_eq!(split_len(POLICY, &[8192], 1), 256);
    assert_eq!(split_len(SplitPolicy { min_split_len: 1, ..POLICY }, &[1], 1), SPLIT_GRANULE);
    assert_eq!(split_len(POLICY, &[], 8), 256);
}

#[test]
fn splits_are_never_longer_than_the_maximum() {
    assert_eq!(split_len(POLICY, &[u32::MAX], 8), 4096);
    assert_eq!(split_len(SplitPolicy { max_split_len: 4095, ..POLICY }, &[u32::MAX], 8), 4032);
    assert_eq!(split_len(SplitPolicy { max_split_len: 128, ..POLICY }, &[1], 8), 128);
    assert_eq!(split_len(SplitPolicy { target_workgroups: 0, ..POLICY }, &[u32::MAX], 8), 4096);
}

#[test]
fn a_fixed_length_ignores_the_batch() {
    for (fixed, want) in [(1, 64), (64, 64), (100, 128), (1024, 1024), (100_000, 4096)] {
        let policy = SplitPolicy { fixed_split_len: Some(fixed), ..POLICY };
        for (tile_keys, num_kv_heads) in [(&[][..], 1), (&[1][..], 1), (&[100_000; 500][..], 32)] {
            assert_eq!(split_len(policy, tile_keys, num_kv_heads), want, "{fixed}");
        }
    }
}

#[test]
fn split_lengths_are_multiples_of_the_granule() {
    for keys in (1..50_000).step_by(997) {
        for num_kv_heads in [1, 3, 8] {
            let len = split_len(POLICY, &[keys], num_kv_heads);
            assert!(len.is_multiple_of(SPLIT_GRANULE) && (256..=4096).contains(&len), "{keys}, {num_kv_heads}: {len}");
        }
    }
}

/// Sequences as forks of earlier ones: (new tokens, cached tokens, whose fork, how many blocks are shared at most).
fn forked_batch(forks: &[(u32, u32, usize, u32)]) -> Batch {
    let lens: Vec<_> = forks.iter().map(|&(query_len, context_len, ..)| (query_len, context_len)).collect();
    let mut batch = batch(&lens);
    batch.tables = (0..batch.tables.len() as u32).collect();
    for (i, &(_, context_len, parent, shared)) in forks.iter().enumerate().skip(1) {
        let parent = &batch.entries[parent % i];
        let shared = shared.min(context_len / BLOCK_SIZE).min(parent.context_len / BLOCK_SIZE) as usize;
        let from = parent.table.start;
        batch.tables.copy_within(from..from + shared, batch.entries[i].table.start);
    }
    batch
}

fn forks() -> impl Strategy<Value = Vec<(u32, u32, usize, u32)>> {
    let query_len = prop_oneof![4 => Just(1_u32), 1 => 1..5_u32, 1 => 1..70_u32];
    let context_len = prop_oneof![Just(320_u32), 0..600_u32];
    let shared = prop_oneof![Just(u32::MAX), Just(20), Just(12), 0..20_u32];
    prop::collection::vec((query_len, context_len, any::<prop::sample::Index>(), shared), 1..12)
        .prop_map(|forks| forks.into_iter().map(|(q, c, parent, n)| (q, c, parent.index(1 << 20), n)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever is shared, each row still sees every key once.
    #[test]
    fn shared_blocks_are_seen_once_by_each(shape in shapes(), policy in policies(), forks in forks(), tile_cost in 0.0_f32..3.0, min_saved in 0_u64..9000) {
        let cascade = Some(CascadePolicy { tile_cost, min_saved });
        let policy = SplitPolicy { cascade, ..policy };
        let batch = forked_batch(&forks);
        let plan = plan(&shape, &policy, &batch);
        let checked = Checker::new(&shape, &policy, &batch, &plan).check();
        prop_assert!(checked.is_ok(), "{checked:?}");
    }
}

const CASCADE: SplitPolicy =
    SplitPolicy { cascade: Some(CascadePolicy { tile_cost: 2.0, min_saved: 0 }), ..POLICIES[1] };

#[track_caller]
fn assert_forks(shape: &PlanShape, policy: &SplitPolicy, batch: &Batch) -> WorkLists {
    let plan = plan(shape, policy, batch);
    let checked = Checker::new(shape, policy, batch, &plan).check();
    assert!(checked.is_ok(), "{checked:?}");
    plan
}

/// 16 texts of 128 tokens each behind the same 2048: an eighth of the rows, whatever the order of the batch.
#[test]
fn sixteen_forks_read_their_common_prefix_once() {
    let mut forks = vec![(1, 2176, 0, 0)];
    forks.resize(16, (1, 2176, 0, 128));
    let alone = plan(&SHAPE, &POLICIES[1], &forked_batch(&forks));
    let together = assert_forks(&SHAPE, &CASCADE, &forked_batch(&forks));
    assert!(together.tokens.is_empty(), "all stand one after another");
    let [alone, together] = [alone, together].map(|plan| plan.kv_rows_read(SHAPE.num_kv_heads));
    assert_eq!(alone, 16 * 2177 * 2);
    // 64 rows are two tiles of 32, each of which reads the prefix.
    assert_eq!(together, (2 * 2048 + 16 * 129) * 2);
    // Somebody else's token between any two of them.
    let mixed: Vec<_> = (0..32).map(|i| if i % 2 == 0 { (1, 2176, 0, 128) } else { (1, 700, 0, 0) }).collect();
    let plan = assert_forks(&SHAPE, &CASCADE, &forked_batch(&mixed));
    assert_eq!(plan.tokens, (0..16).map(|i| 2 * i).collect::<Vec<_>>());
    assert_eq!(plan.kv_rows_read(2), together + 16 * 701 * 2);
}

/// Four branches of four that share more than all sixteen do.
#[test]
fn runs_are_found_at_every_depth() {
    let forks: Vec<_> = (0..16)
        .map(|i| match i {
            0 => (1, 640, 0, 0),
            4 | 8 | 12 => (1, 640, 0, 16),
            _ => (1, 640, i / 4 * 4, 32),
        })
        .collect();
    let plan = assert_forks(&SHAPE, &CASCADE, &forked_batch(&forks));
    // 256 keys for all in two tiles, 256 for each four in one, 129 for each.
    assert_eq!(plan.kv_rows_read(1), 2 * 256 + 4 * 256 + 16 * 129);
    // Each token: its own keys, those of four, those of all.
    assert_eq!(plan.merge.len(), 3 * 16);
}

#[test]
fn what_does_not_pay_is_not_shared() {
    let forks = [(1, 320, 0, 0), (1, 320, 0, 20), (1, 320, 0, 20)];
    let rows = |policy: CascadePolicy, shape: &PlanShape| {
        let policy = SplitPolicy { cascade: Some(policy), ..CASCADE };
        assert_forks(shape, &policy, &forked_batch(&forks)).kv_rows_read(1)
    };
    let (alone, together) = (3 * 321, 320 + 3);
    assert_eq!(rows(CascadePolicy { tile_cost: 2.0, min_saved: 0 }, &SHAPE), together);
    // A tile that costs as much as three tokens.
    assert_eq!(rows(CascadePolicy { tile_cost: 3.0, min_saved: 0 }, &SHAPE), alone);
    // What is saved: a third of 3 * 320 keys of 2 heads of 64 dims.
    let saved = 320 * 2 * 64;
    assert_eq!(rows(CascadePolicy { tile_cost: 2.0, min_saved: saved }, &SHAPE), together);
    assert_eq!(rows(CascadePolicy { tile_cost: 2.0, min_saved: saved + 1 }, &SHAPE), alone);
    // Each sees other keys.
    let windowed = PlanShape { window: Some(1000), ..SHAPE };
    assert_eq!(rows(CascadePolicy { tile_cost: 2.0, min_saved: 0 }, &windowed), alone);
    // A workspace without room for all their states.
    let policy = SplitPolicy { max_workspace_bytes: 11 * partial_row_bytes(64), ..CASCADE };
    assert_eq!(assert_forks(&SHAPE, &policy, &forked_batch(&forks)).kv_rows_read(1), alone);
}

/// Each sequence shares one block more with the one before: a tree as deep as there are sequences, which must neither overflow the stack nor take long.
#[test]
fn deep_trees_of_forks_are_planned_to_some_depth() {
    let forks: Vec<_> = (0..600).map(|i| (1, (i + 1) * BLOCK_SIZE, i.saturating_sub(1) as usize, u32::MAX)).collect();
    let mut batch = forked_batch(&forks);
    let thread = std::thread::Builder::new().stack_size(128 << 10);
    let policy = SplitPolicy { max_workspace_bytes: 1 << 30, ..CASCADE };
    let shallow = thread.spawn(move || {
        let plan = WorkLists::new(&SHAPE, &policy, &batch, TABLE_OFFSET, &[], TOKENS_OFFSET).expect("a plan");
        batch.tables.clear();
        plan.merge.len()
    });
    let states = shallow.expect("a thread").join().expect("no overflow");
    assert!(states > 600, "{states} states");
}

/// Blocks that have left the window are not in the pool any more: what would read them is refused, and what sees less than that is planned.
#[test]
fn a_plan_names_no_block_that_is_gone() {
    let mut batch = batch(&[(3, 20), (1, 99)]);
    let gone = batch.entries[1].table.start + 1..batch.entries[1].table.start + 4;
    batch.tables[gone].fill(folio::BlockId::NULL.index());
    // The second sequence has the keys 0 to 15 and 64 to 99.
    for (window, sink_tokens, fits) in [
        (None, 0, false),
        (Some(36), 0, true),
        (Some(37), 0, false),
        (Some(36), 16, true),
        (Some(36), 17, false),
        (Some(1), 0, true),
    ] {
        for policy in POLICIES {
            let shape = PlanShape { window, sink_tokens, ..SHAPE };
            let plan = WorkLists::new(&shape, &policy, &batch, TABLE_OFFSET, &[], TOKENS_OFFSET);
            let refused =
                |error: &folio::Error| error.to_string().starts_with("batch: got a sequence of which the keys");
            assert_eq!(plan.is_ok(), fits, "{shape:?}");
            assert!(plan.as_ref().err().is_none_or(refused), "{plan:?}");
        }
    }
}

//! Plans as plain data: what the items of a [`WorkLists`] make the kernels compute, against what attention means.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use folio::plan::{NO_PARTIAL, PlanShape, Round, SPLIT_GRANULE, SplitPolicy, WorkItem, WorkLists, partial_row_bytes};
use folio::sequence::{Batch, BatchEntry, QueryKernel};
use proptest::prelude::*;

const TABLE_OFFSET: u32 = 1000;
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
        });
    }
    batch
}

/// Where each sequence's mask bits would start, one after another.
fn mask_offsets(batch: &Batch) -> Vec<u32> {
    let words = batch.entries.iter().scan(500_000, |next, entry| {
        let start = *next;
        *next += entry.query_len * entry.seq_len().div_ceil(32);
        Some(start)
    });
    words.collect()
}

fn plan(shape: &PlanShape, policy: &SplitPolicy, batch: &Batch) -> WorkLists {
    WorkLists::new(shape, policy, batch, TABLE_OFFSET, &mask_offsets(batch)).expect("a plan")
}

/// One head of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Row {
    token: u32,
    kv_head: u32,
    head_in_group: u32,
}

/// Checks a plan by acting it out: what each kernel would compute and write, item by item.
struct Checker<'a> {
    shape: &'a PlanShape,
    policy: &'a SplitPolicy,
    batch: &'a Batch,
    plan: &'a WorkLists,
    starts: Vec<u32>,
    masks: Vec<u32>,
    /// For each (token, head in group): the nonempty ranges of keys that its items walk over, cut to what it sees. The
    /// same for every KV head.
    ranges: BTreeMap<(u32, u32), Vec<Range<u32>>>,
    /// (token, head in group) of items that write results, not partial states.
    direct: HashSet<(u32, u32)>,
    merged: HashSet<u32>,
    most_partial_rows: u64,
}

impl<'a> Checker<'a> {
    fn new(shape: &'a PlanShape, policy: &'a SplitPolicy, batch: &'a Batch, plan: &'a WorkLists) -> Self {
        let (starts, masks) = (batch.query_start(), mask_offsets(batch));
        Self {
            shape,
            policy,
            batch,
            plan,
            starts,
            masks,
            ranges: BTreeMap::new(),
            direct: HashSet::new(),
            merged: HashSet::new(),
            most_partial_rows: 0,
        }
    }

    fn check(mut self) -> Result<(), String> {
        self.check_partition()?;
        for round in &self.plan.rounds {
            self.check_round(round).map_err(|error| format!("{error}; in {round:?}"))?;
        }
        self.check_coverage()?;
        if self.plan.num_partial_rows != self.most_partial_rows {
            let (claimed, most) = (self.plan.num_partial_rows, self.most_partial_rows);
            return Err(format!("num_partial_rows is {claimed}, the largest round has {most}"));
        }
        Ok(())
    }

    /// Each list is cut into the rounds' ranges without gap or overlap.
    fn check_partition(&self) -> Result<(), String> {
        let check = |len: usize, range: fn(&Round) -> &Range<usize>| {
            let end = self.plan.rounds.iter().map(range).try_fold(0, |end, range| {
                let follows = range.start == end && range.end >= end;
                if follows { Ok(range.end) } else { Err(format!("{range:?} does not follow {end}")) }
            })?;
            if end == len { Ok(()) } else { Err(format!("the rounds end at {end} of {len} items")) }
        };
        check(self.plan.decode.len(), |round| &round.decode)?;
        check(self.plan.prefill.len(), |round| &round.prefill)?;
        check(self.plan.merge.len(), |round| &round.merge)
    }

    fn check_round(&mut self, round: &Round) -> Result<(), String> {
        let mut written: BTreeMap<u32, (Row, bool)> = BTreeMap::new();
        let items = self.plan.decode[round.decode.clone()].iter().map(|item| (true, item));
        let items = items.chain(self.plan.prefill[round.prefill.clone()].iter().map(|item| (false, item)));
        for (decode, item) in items {
            self.check_item(decode, item, &mut written).map_err(|error| format!("{error}; in {item:?}"))?;
        }
        // The merge kernel reads every partial state of the round exactly once, for the row that it belongs to.
        for merge in &self.plan.merge[round.merge.clone()] {
            if !self.merged.insert(merge.token) {
                return Err(format!("token {} is merged twice", merge.token));
            }
            for (kv_head, head_in_group) in self.heads() {
                let row = Row { token: merge.token, kv_head, head_in_group };
                for split in 0..merge.num_splits {
                    let slot =
                        merge.part_row + kv_head * merge.head_stride + head_in_group + split * merge.split_stride;
                    match written.get_mut(&slot) {
                        Some((owner, read)) if *owner == row && !*read => *read = true,
                        other => {
                            return Err(format!("{row:?} merges partial row {slot}, which is {other:?}; {merge:?}"));
                        }
                    }
                }
            }
        }
        if let Some((slot, (row, _))) = written.iter().find(|(_, (_, read))| !read) {
            return Err(format!("partial row {slot} of {row:?} is never merged"));
        }
        let used = written.len() as u64;
        self.most_partial_rows =
            self.most_partial_rows.max(written.keys().last().map_or(0, |&slot| u64::from(slot) + 1));
        let limit = self.policy.max_workspace_bytes / partial_row_bytes(self.shape.head_dim);
        // A token can't be cut: one alone may need more.
        if used > limit && round.merge.len() > 1 {
            return Err(format!("{used} partial rows in a workspace of {limit}"));
        }
        Ok(())
    }

    fn heads(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let group_size = self.shape.group_size;
        (0..self.shape.num_kv_heads).flat_map(move |kv_head| (0..group_size).map(move |head| (kv_head, head)))
    }

    fn check_item(
        &mut self,
        decode: bool,
        item: &WorkItem,
        written: &mut BTreeMap<u32, (Row, bool)>,
    ) -> Result<(), String> {
        let group_size = self.shape.group_size;
        let sequence = self.starts.partition_point(|&start| start <= item.query_start) - 1;
        let entry = &self.batch.entries[sequence];
        // A chunk is planned like a sequence of its own.
        let chunk_start = item.query_start - self.starts[sequence];
        let mask_stride = entry.seq_len().div_ceil(32);
        let expect = |what: &str, got: u32, want: u32| {
            if got == want { Ok(()) } else { Err(format!("{what} is {got}, not {want}")) }
        };
        expect("context_len", item.context_len, entry.context_len + chunk_start)?;
        expect("table_offset", item.table_offset, TABLE_OFFSET + entry.table.start as u32)?;
        expect("mask_stride", item.mask_stride, mask_stride)?;
        expect("mask_offset", item.mask_offset, self.masks[sequence] + chunk_start * mask_stride)?;
        expect("reserved", item.reserved[0] | item.reserved[1], 0)?;
        if chunk_start + item.query_len > entry.query_len {
            return Err("tokens behind the sequence".into());
        }
        if decode {
            expect("query_len of a decode item", item.query_len, 1)?;
            expect("row_start of a decode item", item.row_start, 0)?;
        }
        let rows = item.query_len * group_size;
        let tile = if decode { rows } else { self.shape.tile_q };
        if item.row_start >= rows {
            return Err(format!("no rows: there are {rows}"));
        }
        let keys = item.kv_begin..item.kv_end.max(item.kv_begin);
        let max_len = self.policy.max_split_len.max(SPLIT_GRANULE);
        if keys.len() > max_len as usize {
            return Err(format!("{} keys, more than {max_len}", keys.len()));
        }
        let mut seen = Range { start: u32::MAX, end: 0 };
        for row in item.row_start..rows.min(item.row_start + tile) {
            let (token, head_in_group) = (item.query_start + row / group_size, row % group_size);
            let visible = self.visible(sequence, token);
            seen = seen.start.min(visible.start)..seen.end.max(visible.end);
            let range = keys.start.max(visible.start)..keys.end.min(visible.end);
            let ranges = self.ranges.entry((token, head_in_group)).or_default();
            if !range.is_empty() {
                ranges.push(range);
            }
            let key = (token, head_in_group);
            if item.part_row == NO_PARTIAL {
                if !self.direct.insert(key) {
                    return Err(format!("token {token}, head {head_in_group} of the group has two results"));
                }
                continue;
            }
            for kv_head in 0..self.shape.num_kv_heads {
                let slot = item.part_row + kv_head * rows + row;
                if let Some((other, _)) = written.insert(slot, (Row { token, kv_head, head_in_group }, false)) {
                    return Err(format!("partial row {slot} belongs to {other:?} as well"));
                }
            }
        }
        // Keys that no row of the tile sees are not even loaded: their blocks may be gone.
        if !keys.is_empty() && (keys.start < seen.start || keys.end > seen.end) {
            return Err(format!("keys {keys:?} are read, its rows see {seen:?}"));
        }
        Ok(())
    }

    /// Keys that a token sees: a range, because the plan knows no custom masks.
    fn visible(&self, sequence: usize, token: u32) -> Range<u32> {
        let entry = &self.batch.entries[sequence];
        let position = entry.context_len + token - self.starts[sequence];
        let begin = self.shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
        begin..if self.shape.causal { position + 1 } else { entry.seq_len() }
    }

    /// Every key that a row sees is walked over by exactly one of its items, and the row has one result.
    fn check_coverage(&mut self) -> Result<(), String> {
        for sequence in 0..self.batch.entries.len() {
            for token in self.starts[sequence]..self.starts[sequence + 1] {
                let visible = self.visible(sequence, token);
                for head in 0..self.shape.group_size {
                    let row = (token, head);
                    let mut ranges = self.ranges.remove(&row).unwrap_or_default();
                    ranges.sort_by_key(|range| range.start);
                    let end =
                        ranges.iter().try_fold(visible.start, |end, range| (range.start == end).then_some(range.end));
                    if end != Some(visible.end) {
                        return Err(format!("token {token}, head {head} sees {visible:?}; its items cover {ranges:?}"));
                    }
                    if self.direct.contains(&row) == self.merged.contains(&token) {
                        return Err(format!("token {token}, head {head} has not exactly one result"));
                    }
                }
            }
        }
        Ok(())
    }
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
    (1..4_u32, group_size, prop::sample::select(vec![8, 64, 256]), any::<bool>(), window, any::<bool>(), tile_q)
        .prop_map(|(num_kv_heads, group_size, head_dim, causal, window, has_decode, tile_q)| PlanShape {
            num_kv_heads,
            group_size,
            head_dim,
            causal,
            window,
            has_decode: has_decode && group_size <= folio::kernel::MAX_DECODE_GROUP,
            tile_q,
        })
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
            SplitPolicy { target_workgroups, min_split_len, max_split_len, fixed_split_len, max_workspace_bytes }
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
                items_of(&plan_alone, &alone, 0),
                items_of(&plan_together, &together, sequence),
                "sequence {} of {:?}", sequence, lens
            );
        }
    }
}

/// A sequence's items and (token, num_splits) of its merges, with all positions counted from its own start.
fn items_of(plan: &WorkLists, batch: &Batch, sequence: usize) -> (Vec<WorkItem>, Vec<WorkItem>, Vec<(u32, u32)>) {
    let starts = batch.query_start();
    let tokens = starts[sequence]..starts[sequence + 1];
    let masks = mask_offsets(batch);
    // Partial rows are counted from the first one of their chunk.
    let mut first_rows: BTreeMap<u32, u32> = BTreeMap::new();
    for item in plan.decode.iter().chain(&plan.prefill) {
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
    let merges = merges.map(|merge| (merge.token - tokens.start, merge.num_splits)).collect();
    (relative(&plan.decode), relative(&plan.prefill), merges)
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
    },
    SplitPolicy {
        target_workgroups: 256,
        min_split_len: 256,
        max_split_len: 1 << 30,
        fixed_split_len: None,
        max_workspace_bytes: 64 << 20,
    },
];

const SHAPE: PlanShape = PlanShape {
    num_kv_heads: 2,
    group_size: 4,
    head_dim: 64,
    causal: true,
    window: None,
    has_decode: true,
    tile_q: 32,
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
    let plan = WorkLists::new(&SHAPE, &POLICIES[0], &batch, 0, &[]).expect("a plan");
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

//! [`StepPlan`]: the words that one attention call of a step uploads.

use std::ops::Range;

use super::items::{MERGE_ITEM_WORDS, WORK_ITEM_WORDS, WorkItem};
use super::lists::{Round, WorkLists, partial_row_bytes};
use super::params::{AttendParams, NO_WINDOW, PARAM_BLOCK_WORDS, push_params};
use super::shape::PlanShape;
use super::split::SplitPolicy;
use super::{MAX_GRID, linear_grid};
use crate::error::{Error, Result};
use crate::sequence::{Batch, BatchEntry};

/// Which of the attention kernels a dispatch runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Tiles of query rows.
    Prefill,
    /// Single tokens.
    Decode,
    /// Tiles of query rows and the sink tokens, by the kernel of [`Stage::Prefill`].
    SinkPrefill,
    /// Single tokens and the sink tokens, by the kernel of [`Stage::Decode`].
    SinkDecode,
    /// Partial states become results.
    Merge,
}

/// A dispatch of one attention call, in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedDispatch {
    /// The kernel.
    pub stage: Stage,
    /// Workgroups.
    pub grid: [u32; 3],
    /// Where its [`AttendParams`] stand, in bytes from the start of the upload: a multiple of 256.
    pub params_offset: u64,
}

/// The work of one attention call of a step: who computes what, and the words to upload. The same for every layer.
///
/// The upload is block tables, masks, lists of tokens, items of decode, prefill, both of sink tokens and merge, and,
/// from the next multiple of 256 bytes on, a parameter block per dispatch. It is final: offsets in items and parameters count from its start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Who computes what.
    pub lists: WorkLists,
    /// What to upload.
    pub words: Vec<u32>,
    /// What to run, in this order.
    pub dispatches: Vec<PlannedDispatch>,
    /// Bytes of partial states that the workspace must hold.
    pub workspace_bytes: u64,
}

impl StepPlan {
    /// Plans a batch. `params` are those of [`AttentionConfig`](super::AttentionConfig), and `masks` one per sequence, or none at all. Masks, and
    /// trees in the batch, are for kernels that were composed with [`mask`](crate::kernel::AttendFlags::mask).
    ///
    /// # Errors
    /// [`Error::Argument`] for a mask of another length than `query_len * ceil(seq_len / 32)` words, masks beside a tree, or a step that is too
    /// large for 32-bit offsets or the grids of WebGPU.
    pub fn new(
        shape: &PlanShape,
        policy: &SplitPolicy,
        params: &AttendParams,
        batch: &Batch,
        masks: &[&[u32]],
    ) -> Result<Self> {
        shape.check(batch)?;
        check_masks(batch, masks)?;
        let trees = tree_masks(shape, batch);
        let masks: Vec<_> = if trees.is_empty() { masks.to_vec() } else { trees.iter().map(Vec::as_slice).collect() };
        let mask_words = masks.iter().map(|mask| mask.len() as u64).sum::<u64>();
        check_offset(batch.tables.len() as u64 + mask_words)?;
        let mut mask_offset = batch.tables.len() as u32;
        let mask_offsets: Vec<_> = masks
            .iter()
            .map(|mask| {
                let start = mask_offset;
                mask_offset += mask.len() as u32;
                start
            })
            .collect();
        let tokens_offset = mask_offset;
        let lists = WorkLists::new(shape, policy, batch, 0, &mask_offsets, tokens_offset)?;
        let mut end = u64::from(tokens_offset) + lists.tokens.len() as u64;
        let [decode_start, prefill_start, sink_decode_start, sink_prefill_start] = lists.of_items().map(|items| {
            let start = end;
            end += items.len() as u64 * u64::from(WORK_ITEM_WORDS);
            start
        });
        let merge_start = end;
        let merge_words = lists.merge.len() as u64 * u64::from(MERGE_ITEM_WORDS);
        let params_start = (merge_start + merge_words).next_multiple_of(PARAM_BLOCK_WORDS.into());
        let parts: Vec<_> = lists.rounds.iter().flat_map(|round| stages(shape, policy, &lists, round)).collect();
        let params_len = parts.len() as u64 * u64::from(PARAM_BLOCK_WORDS);
        check_offset(params_start + params_len)?;

        let mut words = Vec::with_capacity((params_start + params_len) as usize);
        words.extend_from_slice(&batch.tables);
        masks.iter().for_each(|mask| words.extend_from_slice(mask));
        words.extend_from_slice(&lists.tokens);
        lists.of_items().iter().for_each(|items| words.extend_from_slice(bytemuck::cast_slice(items)));
        words.extend_from_slice(bytemuck::cast_slice(&lists.merge));
        words.resize(params_start as usize, 0);
        let mut dispatches = Vec::with_capacity(parts.len());
        for (stage, range) in parts {
            let (start, item_words) = match stage {
                Stage::Prefill => (prefill_start, WORK_ITEM_WORDS),
                Stage::Decode => (decode_start, WORK_ITEM_WORDS),
                Stage::SinkPrefill => (sink_prefill_start, WORK_ITEM_WORDS),
                Stage::SinkDecode => (sink_decode_start, WORK_ITEM_WORDS),
                Stage::Merge => (merge_start, MERGE_ITEM_WORDS),
            };
            let heads = shape.num_kv_heads * if stage == Stage::Merge { shape.group_size } else { 1 };
            let (x, z) = linear_grid(range.len() as u64).filter(|_| heads <= MAX_GRID).ok_or_else(|| {
                let got = format!("{} work items of {heads} heads", range.len());
                Error::argument("step", got, "at most 65535 * 65535 work items and 65535 heads")
            })?;
            let params_offset = words.len() as u64 * 4;
            dispatches.push(PlannedDispatch { stage, grid: [x, heads, z], params_offset });
            let items_offset = start as u32 + range.start as u32 * item_words;
            let num_items = range.len() as u32;
            let is_sink = matches!(stage, Stage::SinkPrefill | Stage::SinkDecode);
            let window = if is_sink { NO_WINDOW } else { params.window };
            push_params(&mut words, &AttendParams { items_offset, num_items, grid_x: x, window, ..*params });
        }
        let workspace_bytes = lists.num_partial_rows * partial_row_bytes(shape.value_dim);
        Ok(Self { lists, words, dispatches, workspace_bytes })
    }
}

/// The dispatches of a round and their items: prefill, decode, and what merges both.
fn stages(
    shape: &PlanShape,
    policy: &SplitPolicy,
    lists: &WorkLists,
    round: &Round,
) -> impl Iterator<Item = (Stage, Range<usize>)> + use<> {
    // The kernels compute whole tiles, whatever is used of them.
    let parts = [
        (Stage::Prefill, &lists.prefill, &round.prefill, shape.tile_q),
        (Stage::Decode, &lists.decode, &round.decode, shape.group_size),
        (Stage::SinkPrefill, &lists.sink_prefill, &round.sink_prefill, shape.tile_q),
        (Stage::SinkDecode, &lists.sink_decode, &round.sink_decode, shape.group_size),
    ];
    let parts = parts.map(|(stage, items, range, rows)| {
        let ranges = budgeted(items, range, shape.key_work(rows), policy.max_dispatch_work);
        ranges.into_iter().map(move |range| (stage, range))
    });
    let merge = (!round.merge.is_empty()).then(|| (Stage::Merge, round.merge.clone()));
    parts.into_iter().flatten().chain(merge)
}

/// Cuts a range of items, each of which has some work per key, into ranges of at most `max_work`, or of one item.
fn budgeted(items: &[WorkItem], range: &Range<usize>, key_work: u64, max_work: u64) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let (mut start, mut work) = (range.start, 0_u64);
    for i in range.clone() {
        let keys = items[i].kv_end.saturating_sub(items[i].kv_begin);
        let own = u64::from(keys).saturating_mul(key_work);
        if i > start && work.saturating_add(own) > max_work {
            parts.push(start..i);
            (start, work) = (i, 0);
        }
        work = work.saturating_add(own);
    }
    if start < range.end {
        parts.push(start..range.end);
    }
    parts
}

/// Offsets in an upload are counted in words, by `u32`.
fn check_offset(words: u64) -> Result<()> {
    if words > u64::from(u32::MAX) {
        return Err(Error::argument("step", format!("{words} words of work lists"), "fewer than 2^32; a smaller step"));
    }
    Ok(())
}

/// The masks of a batch with trees: empty for sequences without. None if there is no tree.
fn tree_masks(shape: &PlanShape, batch: &Batch) -> Vec<Vec<u32>> {
    if !batch.has_trees() {
        return Vec::new();
    }
    let mask = |entry: &BatchEntry| {
        entry.tree.as_ref().map_or_else(Vec::new, |tree| tree.mask(entry.context_len, shape.window))
    };
    batch.entries.iter().map(mask).collect()
}

fn check_masks(batch: &Batch, masks: &[&[u32]]) -> Result<()> {
    if masks.is_empty() {
        return Ok(());
    }
    if batch.has_trees() {
        return Err(Error::argument("masks", "some beside a tree", "none, as the tree says what its tokens see"));
    }
    if masks.len() != batch.entries.len() {
        let got = format!("{} masks", masks.len());
        return Err(Error::argument("masks", got, format!("one per sequence of the step, {}", batch.entries.len())));
    }
    for (i, (mask, entry)) in masks.iter().zip(&batch.entries).enumerate() {
        let need = u64::from(entry.query_len) * u64::from(entry.seq_len().div_ceil(32));
        if mask.len() as u64 != need {
            let got = format!("{} words for sequence {i} of the step", mask.len());
            return Err(Error::argument("masks", got, format!("query_len * ceil(seq_len / 32) words, {need}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{MergeItem, WorkItem};
    use crate::plan::{NO_MASK, TREE_MASK};
    use crate::sequence::{QueryKernel, TokenTree};
    use std::sync::Arc;

    const SHAPE: PlanShape = PlanShape {
        num_kv_heads: 2,
        group_size: 3,
        head_dim: 16,
        value_dim: 16,
        causal: true,
        window: None,
        sink_tokens: 0,
        has_decode: true,
        tile_q: 8,
        block_size: 16,
    };

    const POLICY: SplitPolicy = SplitPolicy {
        target_workgroups: 1,
        min_split_len: 64,
        max_split_len: 64,
        fixed_split_len: None,
        max_dispatch_work: u64::MAX,
        max_workspace_bytes: 8000,
        cascade: None,
    };

    /// One token of a long sequence, five of a short one and one of an even longer one.
    fn batch() -> Batch {
        let kernel = QueryKernel::Fastest;
        let entry = |query_len, context_len, table| BatchEntry { query_len, context_len, table, kernel, tree: None };
        Batch {
            entries: vec![entry(1, 199, 0..13), entry(5, 7, 13..14), entry(1, 999, 14..77)],
            tables: (100..177).collect(),
        }
    }

    /// Reads the upload as the kernels do: parameters, then the items that they point to, then what those point to.
    #[test]
    fn the_words_are_final() {
        let batch = batch();
        let masks: Vec<Vec<u32>> = batch
            .entries
            .iter()
            .zip(1..)
            .map(|(e, i)| vec![i; (e.query_len * e.seq_len().div_ceil(32)) as usize])
            .collect();
        let masks: Vec<_> = masks.iter().map(Vec::as_slice).collect();
        let params = AttendParams { qk_scale: 0.5, num_blocks: 200, ..AttendParams::default() };
        for max_dispatch_work in [u64::MAX, 100_000, 0] {
            let policy = SplitPolicy { max_dispatch_work, ..POLICY };
            let plan = StepPlan::new(&SHAPE, &policy, &params, &batch, &masks).expect("a plan");
            assert!(plan.lists.rounds.len() > 1, "the workspace holds all partial states");
            check_words(&plan, &batch, max_dispatch_work);
        }
    }

    /// Items are where the parameters of a dispatch say, in the order of the lists, and none has more work than it may.
    fn check_words(plan: &StepPlan, batch: &Batch, max_dispatch_work: u64) {
        let mut found: [Vec<Vec<u32>>; 5] = Default::default();
        for dispatch in &plan.dispatches {
            assert_eq!(dispatch.params_offset % 256, 0);
            let start = dispatch.params_offset as usize / 4;
            let words = &plan.words[start..start + size_of::<AttendParams>() / 4];
            let read: AttendParams = bytemuck::pod_read_unaligned(bytemuck::cast_slice(words));
            assert_eq!((read.qk_scale, read.num_blocks), (0.5, 200));
            let (len, heads) = match dispatch.stage {
                Stage::Merge => (MERGE_ITEM_WORDS, 6),
                _ => (WORK_ITEM_WORDS, 2),
            };
            let [x, y, z] = dispatch.grid;
            assert_eq!((x, y, z), (read.grid_x, heads, 1));
            assert!(x * z >= read.num_items);
            let first = found[dispatch.stage as usize].len();
            let (items, rows) = match dispatch.stage {
                Stage::Prefill => (&plan.lists.prefill[..], SHAPE.tile_q),
                Stage::Decode => (&plan.lists.decode[..], SHAPE.group_size),
                Stage::SinkPrefill => (&plan.lists.sink_prefill[..], SHAPE.tile_q),
                Stage::SinkDecode => (&plan.lists.sink_decode[..], SHAPE.group_size),
                Stage::Merge => (&[][..], 0),
            };
            let keys = items.iter().skip(first).take(read.num_items as usize).map(|item| item.kv_end - item.kv_begin);
            // 2 KV heads of 16 dims of keys and 16 of values.
            let work = keys.map(u64::from).sum::<u64>() * u64::from(rows * 2 * 32);
            assert!(read.num_items == 1 || work <= max_dispatch_work || dispatch.stage == Stage::Merge, "{work}");
            for item in 0..read.num_items {
                let start = (read.items_offset + item * len) as usize;
                found[dispatch.stage as usize].push(plan.words[start..start + len as usize].to_vec());
            }
        }
        fn words<T: bytemuck::Pod>(items: &[T]) -> Vec<Vec<u32>> {
            items.iter().map(|item| bytemuck::cast_slice(std::slice::from_ref(item)).to_vec()).collect()
        }
        let lists = &plan.lists;
        let [decode, prefill, sink_decode, sink_prefill] = lists.of_items().map(words::<WorkItem>);
        assert_eq!(found, [prefill, decode, sink_prefill, sink_decode, words::<MergeItem>(&lists.merge)]);
        for item in lists.decode.iter().chain(&lists.prefill) {
            let i = batch.query_start().iter().rposition(|&start| start <= item.query_start).expect("a sequence");
            let entry = &batch.entries[i];
            assert_eq!(plan.words[item.table_offset as usize], batch.tables[entry.table.start]);
            assert_eq!(item.mask_stride, entry.seq_len().div_ceil(32));
            let mask = &plan.words[item.mask_offset as usize..][..(item.query_len * item.mask_stride) as usize];
            assert!(mask.iter().all(|&word| word as usize == i + 1), "{item:?}");
        }
    }

    #[test]
    fn a_step_of_a_million_tokens_is_planned() {
        let million =
            BatchEntry { table: 0..1 << 17, query_len: 1 << 20, context_len: 1 << 20, ..batch().entries[0].clone() };
        let batch = Batch { entries: vec![million], tables: vec![0; 1 << 17] };
        let policy = SplitPolicy { min_split_len: 1 << 20, max_split_len: 1 << 20, ..POLICY };
        let policy = SplitPolicy { max_workspace_bytes: 1 << 28, ..policy };
        let shape = PlanShape { tile_q: 256, ..SHAPE };
        let plan = StepPlan::new(&shape, &policy, &AttendParams::default(), &batch, &[]).expect("a plan");
        let tokens: u32 = plan.lists.merge.len() as u32;
        assert_eq!(tokens, 1 << 20);
        // With masks of 2^20 * 2^16 words it would not fit.
        let huge = Batch { entries: vec![BatchEntry { context_len: 1 << 30, ..batch.entries[0].clone() }], ..batch };
        let error =
            StepPlan::new(&PlanShape { group_size: 8192, ..shape }, &policy, &AttendParams::default(), &huge, &[]);
        assert!(error.is_err());
    }

    /// Kernels that are asked for change who computes a token, and nothing else about it.
    #[test]
    fn tokens_go_to_the_kernel_that_is_asked_for() {
        let plan = |kernels: [QueryKernel; 3]| {
            let mut batch = batch();
            for (entry, kernel) in batch.entries.iter_mut().zip(kernels) {
                entry.kernel = kernel;
            }
            let policy = SplitPolicy { fixed_split_len: Some(64), ..POLICY };
            StepPlan::new(&SHAPE, &policy, &AttendParams::default(), &batch, &[]).expect("a plan").lists
        };
        let (fastest, prefill, decode) = (QueryKernel::Fastest, QueryKernel::Prefill, QueryKernel::Decode);
        let tokens = |items: &[WorkItem]| {
            let tokens = items.iter().flat_map(|item| item.query_start..item.query_start + item.query_len);
            tokens.collect::<std::collections::BTreeSet<u32>>().into_iter().collect::<Vec<_>>()
        };
        let lists = plan([fastest; 3]);
        assert_eq!((tokens(&lists.decode), tokens(&lists.prefill)), (vec![0, 6], vec![1, 2, 3, 4, 5]));
        assert_eq!(plan([decode, prefill, fastest]), lists, "that is what the fastest are");
        let lists = plan([prefill, decode, prefill]);
        assert_eq!((tokens(&lists.decode), tokens(&lists.prefill)), (vec![1, 2, 3, 4, 5], vec![0, 6]));
        for item in &lists.decode {
            let position = 7 + item.query_start - 1;
            assert_eq!((item.query_len, item.context_len, item.row_start), (1, position, 0));
            assert_eq!((item.kv_begin, item.kv_end, item.table_offset), (0, position + 1, 13));
        }
        // Without that kernel prefill does it, still token by token.
        let mut batch = batch();
        batch.entries[1].kernel = decode;
        let shape = PlanShape { has_decode: false, ..SHAPE };
        let lists = StepPlan::new(&shape, &POLICY, &AttendParams::default(), &batch, &[]).expect("a plan").lists;
        assert!(lists.decode.is_empty() && lists.prefill.iter().all(|item| item.query_len == 1));
        // A mask has a row per token of an entry.
        let masks = [vec![0; 7], vec![0; 5], vec![0; 32]];
        let masks: Vec<_> = masks.iter().map(Vec::as_slice).collect();
        assert!(StepPlan::new(&SHAPE, &POLICY, &AttendParams::default(), &batch, &masks).is_err());
    }

    #[test]
    fn masks_of_another_length_are_refused() {
        let batch = batch();
        for masks in [vec![&[0][..]], vec![&[0; 7][..], &[0; 5], &[0; 31]]] {
            let error = StepPlan::new(&SHAPE, &POLICY, &AttendParams::default(), &batch, &masks);
            let text = error.expect_err("refused").to_string();
            assert!(text.starts_with("masks: got"), "{text}");
        }
    }

    /// The words of a tree's mask are found from its items; sequences beside it have no mask, and nothing else goes with a tree.
    #[test]
    fn trees_have_masks_of_their_own() {
        let tree = TokenTree::new(&[None, Some(0), Some(0), Some(2), None]).expect("a tree");
        let mut with_tree = batch();
        with_tree.entries[1].tree = Some(Arc::new(tree.clone()));
        let new = |shape: PlanShape, batch: &Batch, masks: &[&[u32]]| {
            StepPlan::new(&shape, &POLICY, &AttendParams::default(), batch, masks)
        };
        for window in [None, Some(4)] {
            let plan = new(PlanShape { window, ..SHAPE }, &with_tree, &[]).expect("a plan");
            let mask = tree.mask(7, window);
            let items = plan.lists.decode.iter().chain(&plan.lists.prefill);
            let (of_tree, others): (Vec<&WorkItem>, Vec<&WorkItem>) =
                items.partition(|item| (1..6).contains(&item.query_start));
            for item in of_tree {
                assert_eq!((item.mask_begin, item.mask_stride), (7 | TREE_MASK, 1 + u32::from(window.is_some())));
                let start = (item.mask_offset - (item.query_start - 1) * item.mask_stride) as usize;
                assert_eq!(plan.words[start..start + mask.len()], mask);
                // Its root sees the keys 4 to 7.
                assert_eq!(item.kv_begin, window.map_or(0, |_| 4));
            }
            assert!(others.iter().all(|item| (item.mask_begin, item.mask_stride) == (NO_MASK, 0)));
        }
        let masks = [vec![0; 7], vec![0; 5], vec![0; 32]];
        let refused = |batch: &Batch, masks: &[&[u32]], name: &str| {
            let error = new(SHAPE, batch, masks).expect_err("refused").to_string();
            assert!(error.starts_with(name), "{error}");
        };
        refused(&with_tree, &masks.each_ref().map(Vec::as_slice), "masks: got some beside a tree");
        let mut other = with_tree.clone();
        other.entries[1].kernel = QueryKernel::Decode;
        refused(&other, &[], "masks: got");
        let mut other = with_tree;
        other.entries[1].query_len = 4;
        refused(&other, &[], "batch: got");
    }

    /// Whatever a program with a library of its own passes in: an error or a plan, no panic.
    #[test]
    fn nonsense_is_refused() {
        let entry = |query_len, context_len| BatchEntry {
            query_len,
            context_len,
            table: 0..1,
            kernel: QueryKernel::Fastest,
            tree: None,
        };
        let one = |entry| Batch { entries: vec![entry], tables: vec![0] };
        let new = |shape: PlanShape, policy: SplitPolicy, batch: &Batch, masks: &[&[u32]]| {
            StepPlan::new(&shape, &policy, &AttendParams::default(), batch, masks).map(drop)
        };
        assert!(new(SHAPE, POLICY, &one(entry(1, u32::MAX)), &[&[0]]).is_err());
        assert!(new(PlanShape { window: Some(0), ..SHAPE }, POLICY, &one(entry(1, 63)), &[]).is_err());
        for zero in [PlanShape { tile_q: 0, ..SHAPE }, PlanShape { group_size: 0, ..SHAPE }] {
            assert!(new(zero, POLICY, &one(entry(1, 1)), &[]).is_err());
        }
        for policy in [
            SplitPolicy { fixed_split_len: Some(u32::MAX), ..POLICY },
            SplitPolicy { min_split_len: u32::MAX, target_workgroups: 9, ..POLICY },
            SplitPolicy { min_split_len: 0, max_split_len: 0, target_workgroups: 0, ..POLICY },
            SplitPolicy { max_workspace_bytes: u64::MAX, ..POLICY },
        ] {
            assert!(new(SHAPE, policy, &one(entry(3, 1000)), &[]).is_ok(), "{policy:?}");
        }
        let wide = PlanShape { tile_q: 1 << 31, group_size: u32::MAX, num_kv_heads: 1, has_decode: false, ..SHAPE };
        assert!(new(wide, POLICY, &one(entry(1, 0)), &[]).is_ok());
        // More rows of partial states than 2^32: 65535 heads, 2^26 keys in splits of 64.
        let many = PlanShape { num_kv_heads: 1, group_size: 65_535, has_decode: false, ..SHAPE };
        assert!(new(many, POLICY, &one(entry(1, 1 << 26)), &[]).is_err());
        let empty: [u32; 0] = [];
        assert!(WorkLists::new(&SHAPE, &POLICY, &one(entry(1, 1)), u32::MAX, &empty, 1).is_ok());
        let later = BatchEntry { table: 1..2, ..entry(1, 1) };
        let batch = Batch { entries: vec![later], tables: vec![0; 2] };
        assert!(WorkLists::new(&SHAPE, &POLICY, &batch, u32::MAX, &empty, 1).is_err());
    }
}

//! Acting out a plan.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use folio::plan::{
    NO_MASK, NO_PARTIAL, PlanShape, Round, SPLIT_GRANULE, SplitPolicy, TREE_MASK, WorkItem, WorkLists,
    partial_row_bytes,
};
use folio::sequence::Batch;

use super::{BLOCK_SIZE, TABLE_OFFSET, TOKENS_OFFSET, mask_offsets, mask_stride};

/// One head of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Row {
    token: u32,
    kv_head: u32,
    head_in_group: u32,
}

/// Checks a plan by acting it out: what each kernel would compute and write, item by item.
pub(super) struct Checker<'a> {
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
    pub(super) fn new(shape: &'a PlanShape, policy: &'a SplitPolicy, batch: &'a Batch, plan: &'a WorkLists) -> Self {
        let (starts, masks) = (batch.query_start(), mask_offsets(shape, batch));
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

    pub(super) fn check(mut self) -> Result<(), String> {
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
        fn check<'a>(len: usize, mut ranges: impl Iterator<Item = &'a Range<usize>>) -> Result<(), String> {
            let end = ranges.try_fold(0, |end, range| {
                let follows = range.start == end && range.end >= end;
                if follows { Ok(range.end) } else { Err(format!("{range:?} does not follow {end}")) }
            })?;
            if end == len { Ok(()) } else { Err(format!("the rounds end at {end} of {len} items")) }
        }
        let rounds = &self.plan.rounds;
        check(self.plan.decode.len(), rounds.iter().map(|round| &round.decode))?;
        check(self.plan.prefill.len(), rounds.iter().map(|round| &round.prefill))?;
        check(self.plan.merge.len(), rounds.iter().flat_map(|round| [&round.merge, &round.links]))
    }

    fn check_round(&mut self, round: &Round) -> Result<(), String> {
        let mut written: BTreeMap<u32, (Row, bool)> = BTreeMap::new();
        let items = self.plan.decode[round.decode.clone()].iter().map(|item| (true, item));
        let items = items.chain(self.plan.prefill[round.prefill.clone()].iter().map(|item| (false, item)));
        for (decode, item) in items {
            self.check_item(decode, item, &mut written).map_err(|error| format!("{error}; in {item:?}"))?;
        }
        // The merge kernel reads every partial state of the round exactly once, for the row that it belongs to.
        for at in round.merge.clone() {
            let token = self.plan.merge[at].token;
            if !self.merged.insert(token) {
                return Err(format!("token {token} is merged twice"));
            }
            let mut at = at;
            loop {
                let merge = &self.plan.merge[at];
                for (kv_head, head_in_group) in self.heads() {
                    let row = Row { token, kv_head, head_in_group };
                    for split in 0..merge.num_splits {
                        let slot =
                            merge.part_row + kv_head * merge.head_stride + head_in_group + split * merge.split_stride;
                        match written.get_mut(&slot) {
                            Some((owner, read)) if *owner == row && !*read => *read = true,
                            other => {
                                return Err(format!(
                                    "{row:?} merges partial row {slot}, which is {other:?}; {merge:?}"
                                ));
                            }
                        }
                    }
                }
                if merge.next == 0 {
                    break;
                }
                at += merge.next as usize;
                if !round.links.contains(&at) || self.plan.merge[at].token != token {
                    return Err(format!("{merge:?} links to item {at}"));
                }
            }
        }
        if let Some((slot, (row, _))) = written.iter().find(|(_, (_, read))| !read) {
            return Err(format!("partial row {slot} of {row:?} is never merged"));
        }
        let used = written.len() as u64;
        self.most_partial_rows =
            self.most_partial_rows.max(written.keys().last().map_or(0, |&slot| u64::from(slot) + 1));
        let limit = self.policy.max_workspace_bytes / partial_row_bytes(self.shape.value_dim);
        // A token can't be cut: one alone may need more.
        if used > limit && round.merge.len() > 1 {
            return Err(format!("{used} partial rows in a workspace of {limit}"));
        }
        Ok(())
    }

    fn sequence_of(&self, token: u32) -> usize {
        self.starts.partition_point(|&start| start <= token) - 1
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
        let sequence = self.sequence_of(item.query_start);
        let entry = &self.batch.entries[sequence];
        // A chunk is planned like a sequence of its own.
        let chunk_start = item.query_start - self.starts[sequence];
        let mask_stride = if self.policy.cascade.is_some() { 0 } else { mask_stride(self.shape, self.batch, entry) };
        let expect = |what: &str, got: u32, want: u32| {
            if got == want { Ok(()) } else { Err(format!("{what} is {got}, not {want}")) }
        };
        expect("table_offset", item.table_offset, TABLE_OFFSET + entry.table.start as u32)?;
        let mask_begin = match &entry.tree {
            Some(_) => entry.context_len | TREE_MASK,
            None if self.policy.cascade.is_some() || self.batch.has_trees() => NO_MASK,
            None => 0,
        };
        expect("mask_begin", item.mask_begin, mask_begin)?;
        let tokens: Vec<u32> = match item.tokens_offset {
            0 => (item.query_start..item.query_start + item.query_len).collect(),
            at => self.plan.tokens[(at - TOKENS_OFFSET) as usize..][..item.query_len as usize].to_vec(),
        };
        if chunk_start + item.query_len > entry.query_len && self.policy.cascade.is_some() {
            expect("decode", decode.into(), 0)?;
            expect("mask_stride", item.mask_stride, 0)?;
            self.check_shared(item, &tokens)?;
        } else {
            expect("context_len", item.context_len, entry.context_len + chunk_start)?;
            expect("mask_stride", item.mask_stride, mask_stride)?;
            expect(
                "mask_offset",
                item.mask_offset,
                mask_stride * chunk_start + if mask_stride > 0 { self.masks[sequence] } else { 0 },
            )?;
            expect("tokens_offset", item.tokens_offset, 0)?;
            if chunk_start + item.query_len > entry.query_len {
                return Err("tokens behind the sequence".into());
            }
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
            let (token, head_in_group) = (tokens[(row / group_size) as usize], row % group_size);
            let sequence = self.sequence_of(token);
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

    /// The keys of an item for several sequences are the same rows of the cache for each, and nothing hides them.
    fn check_shared(&self, item: &WorkItem, tokens: &[u32]) -> Result<(), String> {
        if item.part_row == NO_PARTIAL || item.context_len < item.kv_end || item.kv_begin >= item.kv_end {
            return Err("an item for several sequences must have keys that all see, and write partial states".into());
        }
        let table = (item.table_offset - TABLE_OFFSET) as usize;
        let blocks = (item.kv_begin / BLOCK_SIZE) as usize..item.kv_end.div_ceil(BLOCK_SIZE) as usize;
        for &token in tokens {
            let entry = &self.batch.entries[self.sequence_of(token)];
            let has = |range: Range<usize>| self.batch.tables.get(range);
            let is_same = has(table + blocks.start..table + blocks.end)
                == has(entry.table.start + blocks.start..entry.table.start + blocks.end);
            if item.kv_end > entry.context_len || !is_same {
                return Err(format!("token {token} does not share these keys: {entry:?}"));
            }
        }
        Ok(())
    }

    /// Keys that a token sees: a range, because the plan knows no masks. Of a tree's tokens it knows their places, and that none is before the first,
    /// a root, which is as far from what is cached as its place says.
    fn visible(&self, sequence: usize, token: u32) -> Range<u32> {
        let entry = &self.batch.entries[sequence];
        let position = entry.context_len + token - self.starts[sequence];
        let first = if entry.tree.is_some() { entry.context_len } else { position };
        let begin = self.shape.window.map_or(0, |window| (first + 1).saturating_sub(window));
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

//! [`WorkLists`]: a batch becomes work items.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use super::cascade::{self, Cluster, SharedRun};
use super::items::{MergeItem, NO_MASK, NO_PARTIAL, TREE_MASK, WorkItem};
use super::shape::{PlanShape, Tile, key_range, part_of};
use super::split::SplitPolicy;
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::sequence::Batch;

/// Items that use the workspace at the same time. Rounds run one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Range of [`WorkLists::decode`].
    pub decode: Range<usize>,
    /// Range of [`WorkLists::prefill`].
    pub prefill: Range<usize>,
    /// Range of [`WorkLists::sink_decode`].
    pub sink_decode: Range<usize>,
    /// Range of [`WorkLists::sink_prefill`].
    pub sink_prefill: Range<usize>,
    /// Range of [`WorkLists::merge`]: a workgroup per head for each.
    pub merge: Range<usize>,
    /// Range of [`WorkLists::merge`] that follows: what [`MergeItem::next`] leads to.
    pub links: Range<usize>,
}

/// Who computes what in one attention call of a step. The same for every layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkLists {
    /// Items of the decode kernel: one token, all query heads of a KV head.
    pub decode: Vec<WorkItem>,
    /// Items of the prefill kernel.
    pub prefill: Vec<WorkItem>,
    /// Items of the decode kernel whose keys are sink tokens: they run with a window that hides nothing.
    pub sink_decode: Vec<WorkItem>,
    /// The same for the prefill kernel.
    pub sink_prefill: Vec<WorkItem>,
    /// Items of the merge kernel.
    pub merge: Vec<MergeItem>,
    /// Tokens of the rows of items that don't stand one after another.
    pub tokens: Vec<u32>,
    /// What runs together.
    pub rounds: Vec<Round>,
    /// Keys of a split.
    pub split_len: u32,
    /// Rows of partial states that the workspace must hold: the most of any round.
    pub num_partial_rows: u64,
}

/// Bytes of the partial state of one row: the unnormalised sum, then (max, sum, 0, 0).
#[must_use]
pub fn partial_row_bytes(value_dim: u32) -> u64 {
    (u64::from(value_dim) + 4) * 4
}

/// An offset in an upload, in words.
fn checked(offset: u64) -> Result<u32> {
    u32::try_from(offset).map_err(|_| Error::argument("step", format!("offset {offset}"), "offsets below 2^32 words"))
}

impl WorkLists {
    /// Plans a batch.
    ///
    /// `table_offset` is where [`Batch::tables`] starts in the upload, in words; `mask_offsets` where the mask bits of each sequence
    /// start (empty if there is no mask; in a batch with trees only theirs count); `tokens_offset` where [`WorkLists::tokens`] will stand, not 0.
    ///
    /// A sequence whose keys exceed the split length is cut on a grid of it: *all* tiles of a chunk of it get an item for every range
    /// that any of them sees, some of them empty, so that the merge kernel finds the same number of partial states for each token.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape with zeros, a sequence of no new tokens, of 2^31 tokens or more or without a table in the batch, or more
    /// rows (tokens times query heads) than fit 32 bits; for masks beside
    /// [`QueryKernel::Decode`](crate::sequence::QueryKernel::Decode) for several tokens; for trees without masks, or of another number of tokens; for
    /// keys whose blocks have returned to the pool.
    pub fn new(
        shape: &PlanShape,
        policy: &SplitPolicy,
        batch: &Batch,
        table_offset: u32,
        mask_offsets: &[u32],
        tokens_offset: u32,
    ) -> Result<Self> {
        shape.check(batch)?;
        if batch.has_trees() && mask_offsets.is_empty() {
            return Err(Error::argument("masks", "none beside a tree", "those of the trees"));
        }
        let batch = batch.by_kernel();
        if matches!(batch, Cow::Owned(_)) && !mask_offsets.is_empty() {
            let got = "some beside tokens for the decode kernel one by one";
            return Err(Error::argument("masks", got, "none, or another kernel"));
        }
        let clusters = match &policy.cascade {
            Some(cascade) if mask_offsets.is_empty() && tokens_offset > 0 => cascade::clusters(shape, cascade, &batch),
            _ => Vec::new(),
        };
        let mut planner = Planner::new(shape, policy, &batch, &clusters);
        planner.table_offset = table_offset;
        planner.mask_offsets = mask_offsets;
        planner.tokens_offset = tokens_offset;
        // Long prefill tiles first, over all sequences, for the same reason as within one.
        let mut order: Vec<usize> = (0..batch.entries.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(batch.entries[i].seq_len()));
        let mut is_done = vec![false; batch.entries.len()];
        for cluster in &clusters {
            let is_planned = planner.add_cluster(cluster)?;
            cluster.entries.keys().for_each(|&i| is_done[i] = is_planned);
        }
        for i in order.into_iter().filter(|&i| !is_done[i]) {
            planner.add_entry(i)?;
        }
        planner.close();
        check_blocks(shape, &batch, table_offset, &planner.plan)?;
        Ok(planner.plan)
    }

    /// Items of decode, of prefill, and both of sink tokens, in the order of an upload.
    pub(super) fn of_items(&self) -> [&[WorkItem]; 4] {
        [&self.decode, &self.prefill, &self.sink_decode, &self.sink_prefill]
    }

    fn items(&self) -> impl Iterator<Item = &WorkItem> {
        self.of_items().into_iter().flatten()
    }

    /// Rows of K (and as many of V) that the kernels read in a layer, each as often as it is read.
    #[must_use]
    pub fn kv_rows_read(&self, num_kv_heads: u32) -> u64 {
        let keys = self.items().map(|item| item.kv_end.saturating_sub(item.kv_begin));
        keys.map(u64::from).sum::<u64>() * u64::from(num_kv_heads)
    }
}

/// Fails if an item reads keys whose blocks have returned to the pool.
fn check_blocks(shape: &PlanShape, batch: &Batch, table_offset: u32, plan: &WorkLists) -> Result<()> {
    let null = BlockId::NULL.index();
    if !batch.tables.contains(&null) {
        return Ok(());
    }
    let block_size = shape.block_size.max(1);
    for item in plan.items().filter(|item| item.kv_begin < item.kv_end) {
        let table = item.table_offset.wrapping_sub(table_offset) as usize;
        let (first, last) = ((item.kv_begin / block_size) as usize, ((item.kv_end - 1) / block_size) as usize);
        let blocks = batch.tables.get(table + first..=table + last);
        if blocks.is_none_or(|blocks| blocks.contains(&null)) {
            let got =
                format!("a sequence of which the keys {} to {} are not all cached", item.kv_begin, item.kv_end - 1);
            return Err(Error::argument("batch", got, "attention whose window the cache keeps"));
        }
    }
    Ok(())
}

/// Where the partial states of some tokens lie: one for each row and each cell of the grid of splits that has one of their keys.
#[derive(Clone, Copy)]
struct States {
    split_len: u32,
    /// The first of these cells.
    first: u32,
    num_splits: u32,
    part_row: u32,
    /// Of a KV head.
    rows: u32,
    split_stride: u32,
    group_size: u32,
}

impl States {
    /// Items of a tile that sees these keys, one for each split, some of them perhaps empty.
    fn items(self, base: WorkItem, (begin, end): (u32, u32)) -> impl Iterator<Item = WorkItem> {
        (0..self.num_splits).map(move |split| {
            let grid = (self.first + split) * self.split_len;
            WorkItem {
                kv_begin: grid.max(begin),
                kv_end: grid.saturating_add(self.split_len).min(end),
                part_row: self.part_row + split * self.split_stride,
                ..base
            }
        })
    }

    /// What merges them, for the tokens in their order.
    fn of(self, tokens: impl Iterator<Item = u32>) -> impl Iterator<Item = MergeItem> {
        (0..).zip(tokens).map(move |(i, token): (u32, u32)| MergeItem {
            token,
            part_row: self.part_row + i * self.group_size,
            num_splits: self.num_splits,
            split_stride: self.split_stride,
            head_stride: self.rows,
            ..MergeItem::default()
        })
    }
}

/// A plan in the making.
struct Planner<'a> {
    shape: &'a PlanShape,
    batch: &'a Batch,
    starts: Vec<u32>,
    table_offset: u32,
    mask_offsets: &'a [u32],
    tokens_offset: u32,
    /// Whether the grid of splits must not depend on the batch.
    is_fixed: bool,
    /// Most rows of partial states in a round. Rows are numbered with u32.
    max_rows: u64,
    /// Of this round.
    rows_used: u64,
    round: Round,
    /// Further states of the merge items of this round, by index.
    links: Vec<(usize, Vec<MergeItem>)>,
    plan: WorkLists,
}

impl<'a> Planner<'a> {
    fn new(shape: &'a PlanShape, policy: &SplitPolicy, batch: &'a Batch, clusters: &[Cluster]) -> Self {
        let mut own_begins: Vec<_> = batch.entries.iter().map(|entry| shape.own_begin(entry)).collect();
        clusters.iter().flat_map(|cluster| &cluster.entries).for_each(|(&i, &begin)| own_begins[i] = begin);
        let own = batch.entries.iter().zip(&own_begins);
        let is_fixed = policy.fixed_split_len.is_some();
        let own = own.flat_map(|(entry, &begin)| {
            let begin = begin.max(shape.separate_sinks(entry, is_fixed));
            shape.tiles(entry, shape.tile_rows(entry), begin)
        });
        let shared = clusters.iter().flat_map(|cluster| &cluster.runs).flat_map(|run| {
            let tiles = shape.run_rows(run, batch).div_ceil(shape.tile_q);
            (0..tiles).map(|_| Tile { row_start: 0, keys: run.keys(shape.block_size) })
        });
        let split_len = policy.split_len(own.chain(shared).map(|t| t.keys.1 - t.keys.0), shape.num_kv_heads);
        Self {
            shape,
            batch,
            starts: batch.query_start(),
            table_offset: 0,
            mask_offsets: &[],
            tokens_offset: 0,
            is_fixed,
            max_rows: (policy.max_workspace_bytes / partial_row_bytes(shape.value_dim)).clamp(1, u32::MAX.into()),
            rows_used: 0,
            round: Round::default(),
            links: Vec::new(),
            plan: WorkLists { split_len, ..WorkLists::default() },
        }
    }

    /// Rows of partial states of a token and split.
    fn token_rows(&self) -> u64 {
        u64::from(self.shape.num_kv_heads) * u64::from(self.shape.group_size)
    }

    /// The first and the last cell of the grid of splits that has one of the keys.
    fn cells(&self, (begin, end): (u32, u32)) -> (u32, u32) {
        // An empty range has a cell, too.
        (begin / self.plan.split_len, (end.max(begin + 1) - 1) / self.plan.split_len)
    }

    fn num_splits(&self, keys: (u32, u32)) -> u32 {
        let (first, last) = self.cells(keys);
        last - first + 1
    }

    /// Rows of partial states of tokens with these keys.
    fn num_states(&self, num_tokens: u32, keys: (u32, u32)) -> u64 {
        self.token_rows() * u64::from(num_tokens) * u64::from(self.num_splits(keys))
    }

    /// Starts the next round if this one has not the room.
    fn make_room(&mut self, need: u64) {
        if self.rows_used + need > self.max_rows && self.rows_used > 0 {
            self.close();
        }
    }

    /// Takes room for the partial states of tokens with these keys, in this round.
    fn reserve(&mut self, num_tokens: u32, keys: (u32, u32)) -> Result<States> {
        let need = self.num_states(num_tokens, keys);
        if self.rows_used + need > u64::from(u32::MAX) {
            let need = format!("{} rows of partial states", self.rows_used + need);
            return Err(Error::unsupported("attention workspace", need, "fewer than 2^32"));
        }
        let part_row = self.rows_used as u32;
        self.rows_used += need;
        self.plan.num_partial_rows = self.plan.num_partial_rows.max(self.rows_used);
        let rows = num_tokens * self.shape.group_size;
        Ok(States {
            split_len: self.plan.split_len,
            first: self.cells(keys).0,
            num_splits: self.num_splits(keys),
            part_row,
            rows,
            split_stride: self.shape.num_kv_heads * rows,
            group_size: self.shape.group_size,
        })
    }

    /// What all items of an entry have in common.
    fn base(&self, i: usize) -> Result<WorkItem> {
        let entry = &self.batch.entries[i];
        let (mask_begin, mask_stride) = match &entry.tree {
            Some(tree) => (entry.context_len | TREE_MASK, tree.mask_stride(self.shape.window.is_some())),
            None if self.mask_offsets.is_empty() || self.batch.has_trees() => (NO_MASK, 0),
            None => (0, entry.seq_len().div_ceil(32)),
        };
        Ok(WorkItem {
            query_start: self.starts[i],
            query_len: entry.query_len,
            context_len: entry.context_len,
            table_offset: checked(u64::from(self.table_offset) + entry.table.start as u64)?,
            part_row: NO_PARTIAL,
            mask_offset: if mask_stride > 0 { self.mask_offsets.get(i).copied().unwrap_or(0) } else { 0 },
            mask_stride,
            mask_begin,
            ..WorkItem::default()
        })
    }

    /// [`Self::base`] of some of its tokens.
    fn base_of(&self, i: usize, tokens: &Range<u32>) -> Result<WorkItem> {
        let base = self.base(i)?;
        Ok(WorkItem {
            query_start: base.query_start + tokens.start,
            query_len: tokens.end - tokens.start,
            context_len: base.context_len + tokens.start,
            mask_offset: checked(u64::from(base.mask_offset) + u64::from(tokens.start) * u64::from(base.mask_stride))?,
            ..base
        })
    }

    /// Plans an entry with all its keys.
    fn add_entry(&mut self, i: usize) -> Result<()> {
        let entry = &self.batch.entries[i];
        let sinks = self.shape.separate_sinks(entry, self.is_fixed);
        if sinks > 0 {
            return self.add_with_sinks(i, sinks);
        }
        let own_begin = self.shape.own_begin(entry);
        let tiles = self.shape.tiles(entry, self.shape.tile_rows(entry), own_begin);
        let (begin, end) = key_range(tiles.clone().map(|t| t.keys));
        let split_len = self.plan.split_len;
        // A single short range needs no merge, wherever it lies; longer ones are cut where the grid says, so that a fixed
        // split length makes each token's sum independent of the tokens beside it.
        let direct = if self.is_fixed { self.num_splits((begin, end)) == 1 } else { end - begin <= split_len };
        if direct {
            let base = self.base(i)?;
            let items =
                tiles.map(|t| WorkItem { row_start: t.row_start, kv_begin: t.keys.0, kv_end: t.keys.1, ..base });
            let list = if self.shape.uses_decode(entry) { &mut self.plan.decode } else { &mut self.plan.prefill };
            list.extend(items);
            return Ok(());
        }
        // Chunks of tokens whose partial states fit into the workspace. Each is planned like a sequence of its own, with the same
        // keys and fewer queries, and is computed and merged within one round.
        let most_rows = self.token_rows() * u64::from(self.num_splits((begin, end)));
        let chunk_len = (self.max_rows / most_rows).clamp(1, entry.query_len.into()) as u32;
        for start in (0..entry.query_len).step_by(chunk_len as usize) {
            let tokens = start..entry.query_len.min(start + chunk_len);
            let chunk = part_of(entry, &tokens);
            let tiles = self.shape.tiles(&chunk, self.shape.tile_rows(entry), own_begin);
            let keys = key_range(tiles.map(|tile| tile.keys));
            let keys = if self.shape.causal { keys } else { (keys.0, entry.seq_len()) };
            self.make_room(self.num_states(chunk.query_len, keys));
            self.add_chunk(i, tokens, own_begin)?;
        }
        Ok(())
    }

    /// Plans an entry whose first `sinks` keys are seen by tokens from whose windows they are hidden: for each token the states of these keys are
    /// merged with those of the others.
    fn add_with_sinks(&mut self, i: usize, sinks: u32) -> Result<()> {
        let entry = &self.batch.entries[i];
        let tiles = self.shape.tiles(entry, self.shape.tile_rows(entry), sinks);
        let keys = key_range(tiles.map(|tile| tile.keys));
        let rows = self.num_states(1, keys) + self.num_states(1, (0, sinks));
        let chunk_len = (self.max_rows / rows).clamp(1, entry.query_len.into()) as u32;
        for start in (0..entry.query_len).step_by(chunk_len as usize) {
            let tokens = start..entry.query_len.min(start + chunk_len);
            self.make_room(rows * u64::from(tokens.end - tokens.start));
            let states = self.add_sinks(i, tokens.clone(), sinks)?;
            self.add_chunk(i, tokens, sinks)?;
            let first = self.plan.merge.len() - states.len();
            self.links.extend((first..).zip(states).map(|(item, state)| (item, vec![state])));
        }
        Ok(())
    }

    /// Plans some tokens of an entry with its first `sinks` keys: a state for each token.
    fn add_sinks(&mut self, i: usize, tokens: Range<u32>, sinks: u32) -> Result<Vec<MergeItem>> {
        let entry = &self.batch.entries[i];
        let chunk = part_of(entry, &tokens);
        let states = self.reserve(chunk.query_len, (0, sinks))?;
        let base = self.base_of(i, &tokens)?;
        // Without its window a tile sees them all, or those up to its last token.
        let shape = PlanShape { window: None, ..*self.shape };
        let tiles = shape.tiles(&chunk, shape.tile_rows(entry), 0);
        let items = tiles.flat_map(|tile| {
            let end = if shape.causal { tile.keys.1.min(sinks) } else { sinks };
            let keys = (0, end);
            states.items(WorkItem { row_start: tile.row_start, ..base }, keys)
        });
        let list = if shape.uses_decode(entry) { &mut self.plan.sink_decode } else { &mut self.plan.sink_prefill };
        list.extend(items);
        Ok(states.of(base.query_start..base.query_start + chunk.query_len).collect())
    }

    /// Plans some tokens of an entry with their keys from `own_begin` on, as partial states, for which there is room. Its merge items are the last
    /// ones then.
    fn add_chunk(&mut self, i: usize, tokens: Range<u32>, own_begin: u32) -> Result<()> {
        let entry = &self.batch.entries[i];
        let chunk = part_of(entry, &tokens);
        let base = self.base_of(i, &tokens)?;
        // Without a causal mask every query sees the keys behind its chunk as well.
        let end = if self.shape.causal { chunk.seq_len() } else { entry.seq_len() };
        let keys = |tile: Tile| if self.shape.causal { tile.keys } else { (tile.keys.0, end) };
        // A chunk of one token stays with the kernel of its sequence, and so do the tiles.
        let tiles = self.shape.tiles(&chunk, self.shape.tile_rows(entry), own_begin);
        let states = self.reserve(chunk.query_len, key_range(tiles.clone().map(keys)))?;
        let items = tiles.flat_map(|tile| states.items(WorkItem { row_start: tile.row_start, ..base }, keys(tile)));
        let list = if self.shape.uses_decode(entry) { &mut self.plan.decode } else { &mut self.plan.prefill };
        list.extend(items);
        self.plan.merge.extend(states.of(base.query_start..base.query_start + chunk.query_len));
        Ok(())
    }

    /// Plans the entries of a cluster, unless their states need more room than there is: false then.
    fn add_cluster(&mut self, cluster: &Cluster) -> Result<bool> {
        let runs = cluster.runs.iter().map(|run| {
            let num_tokens = self.shape.run_rows(run, self.batch) / self.shape.group_size;
            self.num_states(num_tokens, run.keys(self.shape.block_size))
        });
        let own = cluster.entries.iter().map(|(&i, &begin)| {
            let entry = &self.batch.entries[i];
            self.num_states(entry.query_len, (begin, entry.seq_len()))
        });
        let need = runs.chain(own).sum();
        if need > self.max_rows {
            return Ok(false);
        }
        self.make_room(need);
        // What is known of the tokens of each entry, run by run.
        let mut shared: BTreeMap<usize, Vec<MergeItem>> = BTreeMap::new();
        for run in &cluster.runs {
            let mut states = self.add_run(run)?.into_iter();
            for &i in &run.entries {
                let query_len = self.batch.entries[i].query_len as usize;
                shared.entry(i).or_default().extend(states.by_ref().take(query_len));
            }
        }
        for (i, states) in shared {
            let query_len = self.batch.entries[i].query_len;
            self.add_chunk(i, 0..query_len, cluster.entries[&i])?;
            let first = self.plan.merge.len() - query_len as usize;
            for token in 0..query_len as usize {
                let links = states.iter().skip(token).step_by(query_len as usize).copied().collect();
                self.links.push((first + token, links));
            }
        }
        Ok(true)
    }

    /// Plans the tokens of several entries with keys that all of them see: a state for each token, entry by entry.
    fn add_run(&mut self, run: &SharedRun) -> Result<Vec<MergeItem>> {
        let shape = self.shape;
        let (begin, end) = run.keys(shape.block_size);
        let [first_entry, ..] = run.entries[..] else { return Ok(Vec::new()) };
        let tokens: Vec<u32> = run
            .entries
            .iter()
            .flat_map(|&i| self.starts[i]..self.starts[i] + self.batch.entries[i].query_len)
            .collect();
        let tokens_offset = if tokens.windows(2).all(|pair| pair[0] + 1 == pair[1]) {
            0
        } else {
            checked(u64::from(self.tokens_offset) + self.plan.tokens.len() as u64)?
        };
        let states = self.reserve(tokens.len() as u32, (begin, end))?;
        // Behind all these keys, each of which every row therefore sees.
        let base = WorkItem {
            query_start: tokens[0],
            query_len: tokens.len() as u32,
            context_len: end,
            tokens_offset,
            ..self.base(first_entry)?
        };
        for row_start in (0..states.rows).step_by(shape.tile_q as usize) {
            self.plan.prefill.extend(states.items(WorkItem { row_start, ..base }, (begin, end)));
        }
        let of_tokens = states.of(tokens.iter().copied()).collect();
        if tokens_offset > 0 {
            self.plan.tokens.extend(tokens);
        }
        Ok(of_tokens)
    }

    /// Ends the round at the lists' present ends and starts the next one there.
    fn close(&mut self) {
        let plan = &mut self.plan;
        let items_end = plan.merge.len();
        for (mut item, links) in self.links.drain(..) {
            for link in links {
                plan.merge[item].next = (plan.merge.len() - item) as u32;
                item = plan.merge.len();
                plan.merge.push(link);
            }
        }
        let (begin, end) = (self.round.clone(), plan.merge.len());
        plan.rounds.push(Round {
            decode: begin.decode.start..plan.decode.len(),
            prefill: begin.prefill.start..plan.prefill.len(),
            sink_decode: begin.sink_decode.start..plan.sink_decode.len(),
            sink_prefill: begin.sink_prefill.start..plan.sink_prefill.len(),
            merge: begin.merge.start..items_end,
            links: items_end..end,
        });
        let lists = [&plan.decode, &plan.prefill, &plan.sink_decode, &plan.sink_prefill];
        let [decode, prefill, sink_decode, sink_prefill] = lists.map(|list| list.len()..list.len());
        self.round = Round { decode, prefill, sink_decode, sink_prefill, merge: end..end, links: end..end };
        self.rows_used = 0;
    }
}

//! [`Work`]: what a call moves and computes, counted from its plan.

use serde::Serialize;

use crate::attention::{Attention, AttentionPlan};
use crate::kernel::{Kernel, Variant};
use crate::layout::KvCacheConfig;
use crate::plan::{NO_PARTIAL, Stage, WorkItem, partial_row_bytes};

/// Bytes and operations of one layer's call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Work {
    /// Bytes that kernels read: rows of K and V with their scales as often as tiles read them, queries, partial states.
    pub read_bytes: u64,
    /// Bytes that kernels write: results, partial states, rows of the cache.
    pub written_bytes: u64,
    /// Floating-point operations of the visible (query, key) pairs, two for a multiply-add: what the result needs.
    pub flop: u64,
    /// Those of all pairs of tiles that kernels compute, masked ones and rows that pad a tile included.
    pub tile_flop: u64,
    /// Dispatches.
    pub dispatches: u32,
}

impl Work {
    /// Of one layer's call of attention. What custom masks and trees hide counts as visible.
    #[must_use]
    pub fn of_attention(attention: &Attention, plan: &AttentionPlan) -> Self {
        let plan = plan.step_plan();
        let mut work = Self { dispatches: plan.dispatches.len() as u32, ..Self::default() };
        for variant in attention.variants() {
            let lists = &plan.lists;
            let (items, tile_rows) = match variant.kernel {
                Kernel::Decode => ([&lists.decode, &lists.sink_decode], variant.group_size),
                Kernel::Prefill => ([&lists.prefill, &lists.sink_prefill], variant.tile_q),
                _ => continue,
            };
            // Sink tokens are seen from beyond the window.
            for (items, window) in items.into_iter().zip([attention.config().window, None]) {
                items.iter().for_each(|item| work.add_item(variant, item, tile_rows, window));
            }
        }
        let Some(merge) = attention.variants().find(|variant| variant.kernel == Kernel::Merge) else { return work };
        if plan.dispatches.iter().any(|dispatch| dispatch.stage == Stage::Merge) {
            let heads = u64::from(merge.num_kv_heads) * u64::from(merge.group_size);
            let row = partial_row_bytes(merge.value_dim);
            let splits: u64 = plan.lists.merge.iter().map(|item| u64::from(item.num_splits)).sum();
            // Of a token with states in several places only the first item writes a result.
            let tokens: usize = plan.lists.rounds.iter().map(|round| round.merge.len()).sum();
            work.read_bytes += splits * heads * row;
            work.written_bytes += tokens as u64 * heads * u64::from(merge.value_dim) * 4;
        }
        work
    }

    /// Of one layer's append of so many tokens, whose rows come in f32.
    #[must_use]
    pub fn of_append(cache: &KvCacheConfig, num_tokens: u32) -> Self {
        let tokens = u64::from(num_tokens);
        let [k, v] = cache.token_elements();
        let elements = if cache.latent { k } else { k + v };
        let token_bytes = cache.token_bytes() / u64::from(cache.num_layers.max(1));
        Self {
            read_bytes: tokens * elements * 4,
            written_bytes: tokens * token_bytes,
            dispatches: 1,
            ..Self::default()
        }
    }

    fn add_item(&mut self, variant: &Variant, item: &WorkItem, tile_rows: u32, window: Option<u32>) {
        let heads = u64::from(variant.num_kv_heads);
        let keys = u64::from(item.kv_end.saturating_sub(item.kv_begin));
        // The values of latents are the first elements of their keys.
        let value_bytes = if variant.latent { 0 } else { variant.v_layout().token_row_bytes() };
        let key_bytes = variant.k_layout().token_row_bytes() + value_bytes;
        // Two operations for each element of a key, and two for each of a value.
        let pair_flop = 2 * (u64::from(variant.head_dim) + u64::from(variant.value_dim)) * heads;
        let own_rows = (item.query_len * variant.group_size).saturating_sub(item.row_start).min(tile_rows);
        let rows = heads * u64::from(own_rows);
        self.read_bytes += keys * heads * key_bytes + rows * u64::from(variant.head_dim) * 4;
        let is_result = item.part_row == NO_PARTIAL;
        self.written_bytes +=
            rows * if is_result { u64::from(variant.value_dim) * 4 } else { partial_row_bytes(variant.value_dim) };
        self.tile_flop += u64::from(tile_rows) * keys * pair_flop;
        let visible = |row: u32| {
            // Rows of several sequences stand behind the keys that they share.
            if item.tokens_offset != 0 {
                return keys;
            }
            let end = item.context_len + (item.row_start + row) / variant.group_size.max(1) + 1;
            let begin = window.map_or(item.kv_begin, |window| item.kv_begin.max(end.saturating_sub(window)));
            let end = if variant.flags.causal { item.kv_end.min(end) } else { item.kv_end };
            u64::from(end.saturating_sub(begin))
        };
        self.flop += (0..own_rows).map(visible).sum::<u64>() * pair_flop;
    }
}

//! [`AttentionConfig`]: what attention computes.

use super::MAX_GRID;
use super::cascade::CascadePolicy;
use super::items::LOGIT_FLOOR;
use super::params::{AttendParams, NO_WINDOW};
use crate::error::{Error, Result};
use crate::layout::{KvCacheConfig, LayerGroup, RowLayout};

/// When blocks that sequences share are read once for all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Cascade {
    /// Each sequence reads its blocks for itself.
    Never,
    /// Where reading them once saves more than it costs.
    #[default]
    WhereItPays,
    /// Wherever sequences share a block, for tests and measurements.
    Always,
}

/// What attention computes. The same for every call of one `Attention`.
///
/// For each query head: `logit = softmax_scale * q·k`, through the soft cap if there is one, plus the ALiBi bias, then masked
/// (causal, window, custom mask); the softmax of the visible logits, with a sink's weight in the denominator if there is one, weighs the V rows.
/// A row without a visible key yields 0 (and an lse of -infinity).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionConfig {
    /// Query heads; a multiple of the cache's `num_kv_heads`. Query head `h` attends to KV head `h / (num_q_heads / num_kv_heads)`.
    pub num_q_heads: u32,
    /// A query sees keys up to its own position (true), or all keys of its sequence (false).
    pub causal: bool,
    /// Factor of the logits. `None`: `1 / sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// `c * tanh(x / c)` on scaled logits. `None`: no soft cap.
    pub softcap: Option<f32>,
    /// A query sees the newest `window` keys, its own position included; blocks wholly outside are not read. At least 1. `None`: all.
    pub window: Option<u32>,
    /// First tokens of a sequence that a query sees besides its window, as attention sinks (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453); see
    /// also [`LayerGroup::sink_tokens`]. 0: none. Needs a window; not with `custom_mask`, nor with `trees`.
    pub sink_tokens: u32,
    /// Queries for the sink tokens are rows of their own, rotated by other positions: calls give them by `AttentionCall::sink_q`. Needs
    /// `sink_tokens`; not with `alibi_slopes`, whose distances are those in the text.
    ///
    /// StreamingLLM numbers positions within what is kept, so that no model sees a distance that it was not trained on. Keys needn't be rotated
    /// again for that, because a rotary embedding depends on distances only: the newest tokens have theirs anyway, and a query at position `p` is as
    /// far from the sink tokens as it should be if it is rotated by `min(p, sink_tokens + window - 1)` ([`KvCacheConfig::sink_position`]).
    pub sink_queries: bool,
    /// ALiBi: `slope * (key position - query position)` is added to a head's logits. One slope per query head.
    pub alibi_slopes: Option<Vec<f32>>,
    /// A logit per query head that joins the softmax denominator and has no V row.
    pub sinks: Option<Vec<f32>>,
    /// Calls of `Attention::plan_with_masks` give a bit per query and key.
    pub custom_mask: bool,
    /// Steps may have new tokens that branch ([`TokenTree`](crate::sequence::TokenTree)). A token of a tree sees what is cached before the tree, the
    /// tokens of its path and itself, also without `causal`. A window counts by positions: the newest `window` of these. Not with `custom_mask`, nor
    /// with `alibi_slopes`: kernels take a key's distance from its place in the cache, which is not its position in a tree.
    pub trees: bool,
    /// How queries lie in the buffers that calls are given: `num_q_heads` rows of `head_dim` elements per token.
    pub q_rows: RowLayout,
    /// How results are to lie: `num_q_heads` rows of `value_dim` elements per token, which must not overlap.
    pub out_rows: RowLayout,
    /// Calls write the natural logarithm of the softmax denominator: use `Attention::attend_with_lse`.
    pub lse: bool,
    /// Keys are cut into ranges of a fixed length, so that a sequence's results do not depend on what else is in the batch. Costs some
    /// speed with small batches of middling lengths. Queries are not quantised then, whatever the device allows.
    pub deterministic: bool,
    /// Whether blocks that sequences of a step share (forks, common prompts) are read once for all of them; results are the same within rounding.
    /// Never with a window, ALiBi, custom masks or trees, nor if `deterministic`.
    pub cascade: Cascade,
    /// Bytes of partial states of split key ranges at one time. A step that needs more works in rounds; only a single token that needs
    /// more on its own exceeds it.
    pub max_workspace_bytes: u64,
    /// Multiply-adds of a dispatch at most: long prefills take several, with the same results to the bit, so that no watchdog of the system takes the
    /// device for dead. `None`: what slow adapters of its class compute in a fraction of a second. Hosts that draw frames set what fits into one, and
    /// take the parts of a plan over several submits (`Attention::plan_in_parts`).
    pub max_dispatch_work: Option<u64>,
}

impl AttentionConfig {
    /// Causal attention with `num_q_heads` query heads and no extras.
    #[must_use]
    pub fn new(num_q_heads: u32) -> Self {
        Self {
            num_q_heads,
            causal: true,
            softmax_scale: None,
            softcap: None,
            window: None,
            sink_tokens: 0,
            sink_queries: false,
            alibi_slopes: None,
            sinks: None,
            custom_mask: false,
            trees: false,
            q_rows: RowLayout::DENSE,
            out_rows: RowLayout::DENSE,
            lse: false,
            deterministic: false,
            cascade: Cascade::default(),
            max_workspace_bytes: 64 << 20,
            max_dispatch_work: None,
        }
    }

    /// Checks the options against a cache.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self, cache: &KvCacheConfig) -> Result<()> {
        let heads = self.num_q_heads;
        // Merge has one workgroup row per query head.
        if heads == 0 || heads > MAX_GRID || !heads.is_multiple_of(cache.num_kv_heads) {
            let rule = format!("a multiple of num_kv_heads, {}, from it to {MAX_GRID}", cache.num_kv_heads);
            return Err(Error::argument("num_q_heads", heads, rule));
        }
        let finite = |argument, value: f32| {
            if value.is_finite() { Ok(()) } else { Err(Error::argument(argument, value, "a finite number")) }
        };
        if let Some(scale) = self.softmax_scale {
            finite("softmax_scale", scale)?;
        }
        if let Some(cap) = self.softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(Error::argument("softcap", cap, "a finite number above 0, or None"));
        }
        if self.window == Some(0) {
            return Err(Error::argument("window", 0, "at least 1, or None"));
        }
        let mut checked = cache.groups.as_slice().iter().map(|group| self.check_kept(*group));
        // One group that keeps enough will do.
        if let Some(Err(error)) = checked.next()
            && !checked.any(|checked| checked.is_ok())
        {
            return Err(error);
        }
        if self.sink_tokens > 0 && (self.window.is_none() || self.custom_mask || self.trees) {
            let beside = match self.window {
                None => "no window",
                Some(_) if self.custom_mask => "custom_mask",
                Some(_) => "trees",
            };
            let got = format!("{} beside {beside}", self.sink_tokens);
            return Err(Error::argument("sink_tokens", got, "a window, and neither custom_mask nor trees"));
        }
        if self.sink_queries && (self.sink_tokens == 0 || self.alibi_slopes.is_some()) {
            let beside = if self.sink_tokens == 0 { "no sink_tokens" } else { "alibi_slopes" };
            let got = format!("true beside {beside}");
            return Err(Error::argument("sink_queries", got, "sink_tokens, and no alibi_slopes"));
        }
        for (argument, values) in [("alibi_slopes", &self.alibi_slopes), ("sinks", &self.sinks)] {
            let Some(values) = values else { continue };
            if values.len() != heads as usize {
                let got = format!("{} values", values.len());
                return Err(Error::argument(argument, got, format!("one per query head, {heads}")));
            }
            values.iter().try_for_each(|&value| finite(argument, value))?;
        }
        self.q_rows.validate("q_rows")?;
        self.out_rows.validate("out_rows")?;
        self.out_rows.resolve(heads, cache.value_dim()).check_apart("out_rows", 1)?;
        if self.trees && (self.custom_mask || self.alibi_slopes.is_some()) {
            let beside = if self.custom_mask { "custom_mask" } else { "alibi_slopes" };
            return Err(Error::argument(
                "trees",
                format!("true beside {beside}"),
                "neither custom_mask nor alibi_slopes",
            ));
        }
        // The kernels take the scale in units of log2, or of the soft cap.
        let params = self.params(cache);
        finite("softmax_scale", params.qk_scale)?;
        // The floor of the running maximum must stay below what the options alone can make of a logit.
        let log2_units = |value: f32| f64::from(value.abs()) * std::f64::consts::LOG2_E;
        let small = |argument, value: f32, logit: f64| {
            let rule = "small enough that no logit reaches 2^126 in units of log2, 5.9e37";
            if logit < -f64::from(LOGIT_FLOOR) / 2.0 { Ok(()) } else { Err(Error::argument(argument, value, rule)) }
        };
        let cap = self.softcap.unwrap_or(0.0);
        small("softcap", cap, log2_units(cap))?;
        self.sinks.iter().flatten().try_for_each(|&sink| small("sinks", sink, log2_units(sink)))?;
        // A text whose blocks return to the pool may be longer than that, up to the longest there is.
        let longest = if cache.groups.has_windows() {
            f64::from(i32::MAX)
        } else {
            f64::from(cache.num_blocks) * f64::from(cache.block_size)
        };
        let slopes = self.alibi_slopes.iter().flatten();
        slopes
            .copied()
            .try_for_each(|slope| small("alibi_slopes", slope, log2_units(slope) * longest + log2_units(cap)))
    }

    /// Checks that a group of a cache's layers keeps all that this attention sees.
    ///
    /// # Errors
    /// [`Error::Argument`] for a window that is larger than the group's, or more sink tokens.
    pub fn check_kept(&self, group: LayerGroup) -> Result<()> {
        let Some(kept) = group.window else { return Ok(()) };
        if self.window.is_none_or(|window| window > kept) {
            let got = self.window.map_or_else(|| "None".to_owned(), |window| window.to_string());
            return Err(Error::argument("window", got, format!("at most what the cache keeps, {kept}")));
        }
        if self.sink_tokens > group.sink_tokens {
            let rule = format!("at most what the cache keeps, {}", group.sink_tokens);
            return Err(Error::argument("sink_tokens", self.sink_tokens, rule));
        }
        Ok(())
    }

    /// [`SplitPolicy::cascade`](super::SplitPolicy::cascade) by the option, unless another one forbids it. `pays` is when it pays on the adapter.
    #[must_use]
    pub fn cascade_policy(&self, pays: CascadePolicy) -> Option<CascadePolicy> {
        let has_masks = self.custom_mask || self.trees;
        let sees_positions = self.window.is_some() || self.alibi_slopes.is_some() || has_masks;
        if self.deterministic || sees_positions {
            return None;
        }
        match self.cascade {
            Cascade::Never => None,
            Cascade::WhereItPays => Some(pays),
            Cascade::Always => Some(CascadePolicy { tile_cost: 0.0, min_saved: 0 }),
        }
    }

    /// The parameters that all dispatches of a plan share, for [`StepPlan::new`](super::StepPlan::new).
    #[must_use]
    pub fn params(&self, cache: &KvCacheConfig) -> AttendParams {
        use std::f64::consts::LOG2_E;
        let scale = self.softmax_scale.map_or_else(|| 1.0 / f64::from(cache.head_dim).sqrt(), f64::from);
        let (qk_scale, softcap_log2e) = match self.softcap.map(f64::from) {
            Some(cap) => (scale / cap, cap * LOG2_E),
            None => (scale * LOG2_E, 0.0),
        };
        AttendParams {
            qk_scale: qk_scale as f32,
            softcap_log2e: softcap_log2e as f32,
            window: self.window.unwrap_or(0).min(NO_WINDOW),
            num_blocks: cache.num_blocks,
            ..AttendParams::default()
        }
    }

    /// ALiBi slope and sink of each query head, both times log2(e), as the kernels read them (in a uniform buffer of whole 16 bytes);
    /// `None` if they read neither.
    #[must_use]
    pub fn head_params(&self) -> Option<Vec<[f32; 2]>> {
        if self.alibi_slopes.is_none() && self.sinks.is_none() {
            return None;
        }
        let value = |values: &Option<Vec<f32>>, head: usize| {
            let value = values.as_ref().and_then(|values| values.get(head)).copied().unwrap_or(0.0);
            value * std::f32::consts::LOG2_E
        };
        let heads = 0..(self.num_q_heads.min(MAX_GRID) as usize).next_multiple_of(2);
        Some(heads.map(|head| [value(&self.alibi_slopes, head), value(&self.sinks, head)]).collect())
    }
}

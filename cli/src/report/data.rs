//! What a report says, as plain data: the page is drawn from it, and it is written as JSON. `docs/report.schema.json` describes it.

use folio::measure::{Roofs, Spread, Work};
#[cfg(test)]
use schemars::JsonSchema;
use serde::Serialize;

/// Of [`Report`]: rises when a field changes its meaning or goes.
const VERSION: u32 = 1;

/// A report of `folio report`. Times are in seconds, sizes in bytes; a spread is a median with quartiles.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Report {
    /// Of this document.
    pub(super) version: u32,
    /// Of the library's results within it: of roofs, work and spreads.
    pub(super) measure_version: u32,
    /// Version of folio.
    pub(super) folio: &'static str,
    /// When it was made: RFC 3339.
    pub(super) made: String,
    /// Whether it was made with `--quick`.
    pub(super) quick: bool,
    /// What it took, in seconds.
    pub(super) seconds: f64,
    pub(super) adapter: Adapter,
    pub(super) roofline: Roofline,
    pub(super) memory: Memory,
    pub(super) time: Time,
}

impl Report {
    pub(super) fn new(quick: bool, adapter: Adapter, roofline: Roofline, memory: Memory, time: Time) -> Self {
        let made = jiff::Zoned::now().timestamp().round(jiff::Unit::Second);
        Self {
            version: VERSION,
            measure_version: folio::measure::VERSION,
            folio: env!("CARGO_PKG_VERSION"),
            made: made.map_or_else(|_| String::new(), |made| made.to_string()),
            quick,
            seconds: 0.0,
            adapter,
            roofline,
            memory,
            time,
        }
    }
}

/// The adapter and what folio uses of it.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Adapter {
    pub(super) name: String,
    pub(super) backend: String,
    pub(super) driver: String,
    /// As wgpu says: `DiscreteGpu`, `IntegratedGpu`, `VirtualGpu`, `Cpu`, `Other`.
    pub(super) device_type: String,
    /// The kernel family: `Gpu` or `Cpu`.
    pub(super) profile: String,
    /// Why it is that family.
    pub(super) profile_reason: String,
    /// The size of all subgroups, or 0 if it varies or there are none.
    pub(super) subgroup_size: u32,
    /// Whether wgpu's bounds checks are in the shaders.
    pub(super) full_checks: bool,
    /// Whether a tuning was given.
    pub(super) tuned: bool,
    /// Which clock times passes: GPU timestamps or wall clock.
    pub(super) clock: String,
    /// Features that the device was opened with.
    pub(super) features: Vec<String>,
    pub(super) limits: Vec<Limit>,
    /// The kernels that were chosen for the shapes of the roofline.
    pub(super) kernels: Vec<ChosenKernel>,
    /// What makes this adapter slow, or a report of it less telling.
    pub(super) hints: Vec<Hint>,
}

/// A limit of the device.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Limit {
    /// wgpu's name of it.
    pub(super) name: &'static str,
    pub(super) value: u64,
    /// What every WebGPU device has.
    pub(super) webgpu: u64,
}

/// A compiled kernel.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct ChosenKernel {
    pub(super) kernel: &'static str,
    /// Of K and V.
    pub(super) cache: String,
    /// Invocations of a workgroup.
    pub(super) workgroup_size: u32,
    /// Query rows of a tile, 0 where there are no queries.
    pub(super) tile_q: u32,
    /// Keys of a tile, 0 where there are none.
    pub(super) tile_kv: u32,
    pub(super) workgroup_bytes: u32,
    /// Why it is made so.
    pub(super) reason: String,
}

impl ChosenKernel {
    /// Whether another kernel differs in its cache only.
    pub(super) fn is_alike(&self, other: &Self) -> bool {
        let of = |kernel: &Self| {
            (kernel.kernel, kernel.workgroup_size, kernel.tile_q, kernel.tile_kv, kernel.workgroup_bytes)
        };
        of(self) == of(other) && self.reason == other.reason
    }
}

/// What to know before a number is believed.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Hint {
    /// A word for programs.
    pub(super) kind: &'static str,
    pub(super) text: String,
}

/// What the adapter can do, and how near the kernels come.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Roofline {
    /// Heads of queries, heads of keys and values, elements of a head, tokens of a block.
    pub(super) num_q_heads: u32,
    pub(super) num_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) block_size: u32,
    #[cfg_attr(test, schemars(with = "schema::Roofs"))]
    pub(super) roofs: Roofs,
    pub(super) points: Vec<Point>,
    /// How good predictions were.
    pub(super) predictions: Vec<Prediction>,
}

/// A kernel in one format of the cache, on one shape.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Point {
    pub(super) kernel: &'static str,
    /// Of K and V.
    pub(super) cache: String,
    /// Sequences.
    pub(super) batch: u32,
    /// New tokens of each.
    pub(super) query_len: u32,
    /// Keys of each, those of the new tokens included.
    pub(super) seq_len: u32,
    #[cfg_attr(test, schemars(with = "schema::Work"))]
    pub(super) work: Work,
    /// Floating-point operations per byte that is read or written.
    pub(super) intensity: f64,
    /// `memory` or `arithmetic`.
    pub(super) bound_by: &'static str,
    /// Bytes per second of the plain loop that took turns with it: one that reads, or, beside an append, copies.
    pub(super) memory_rate: f64,
    /// Operations per second of the loop of multiply-adds that took turns with it.
    pub(super) arithmetic_rate: f64,
    /// What it would take under these roofs: the longer of moving the bytes and of computing the visible pairs.
    pub(super) roof_seconds: f64,
    #[cfg_attr(test, schemars(with = "schema::Spread"))]
    pub(super) measured: Spread,
    /// `roof_seconds` of the measured time: 1 is the roof.
    pub(super) share_of_roof: f64,
    /// The time that follows from the roofs and the share that the same kernel reached on a shape of a quarter of the work. `null` for that shape itself.
    pub(super) predicted_seconds: Option<f64>,
    /// Predicted of measured time, minus 1.
    pub(super) prediction_error: Option<f64>,
}

/// How far predicted times of a kernel are off.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Prediction {
    pub(super) kernel: &'static str,
    /// The largest error of any format, either way.
    pub(super) worst_error: f64,
    /// The middle one.
    pub(super) median_error: f64,
    /// Whether all are within [`PREDICTION_GOAL`].
    pub(super) within_goal: bool,
}

/// Predictions are good if they are not further off than this.
pub(super) const PREDICTION_GOAL: f64 = 0.25;

/// How memory grows with texts. Block tables and allocator are those of every cache, and need no GPU.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Memory {
    pub(super) model: MemoryModel,
    /// Of one sequence.
    pub(super) growth: Vec<Growth>,
    /// Between formula and pool, over all points, in bytes.
    pub(super) worst_difference: u64,
    pub(super) lengths: Lengths,
    pub(super) waste: Vec<Waste>,
    pub(super) fits: Vec<Fits>,
    pub(super) allocated: Vec<Allocated>,
    pub(super) fragmentation: Fragmentation,
}

/// Whose cache it is.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct MemoryModel {
    pub(super) name: &'static str,
    pub(super) num_layers: u32,
    pub(super) num_kv_heads: u32,
    pub(super) head_dim: u32,
    /// What a contiguous cache reserves, in tokens.
    pub(super) max_len: u32,
}

/// Bytes of one sequence against its tokens.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Growth {
    /// `contiguous`, `paged`, or `window`: paged, and blocks that have left the window return to the pool.
    pub(super) kind: &'static str,
    pub(super) cache: String,
    pub(super) block_size: u32,
    pub(super) window: Option<u32>,
    pub(super) token_bytes: u64,
    pub(super) points: Vec<GrowthPoint>,
}

#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct GrowthPoint {
    pub(super) tokens: u32,
    pub(super) formula_bytes: u64,
    /// Of the blocks that the real allocator has handed out.
    pub(super) pool_bytes: u64,
}

/// Lengths of texts.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Lengths {
    pub(super) distribution: String,
    pub(super) mean: f64,
    pub(super) median: u32,
    pub(super) p90: u32,
    pub(super) max: u32,
}

/// What the unused ends of last blocks take.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Waste {
    pub(super) block_size: u32,
    pub(super) sequences: u32,
    pub(super) used_bytes: u64,
    pub(super) wasted_bytes: u64,
    /// Wasted of used.
    pub(super) share: f64,
    /// Words of all block tables.
    pub(super) table_words: u32,
}

/// Sequences that a memory holds.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Fits {
    pub(super) memory_bytes: u64,
    /// `contiguous` or `paged`.
    pub(super) kind: &'static str,
    pub(super) cache: String,
    pub(super) sequences: u32,
    /// Part of the blocks that are used when the next sequence finds no room.
    pub(super) blocks_used: f64,
}

/// A pool on the device.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Allocated {
    pub(super) cache: String,
    pub(super) formula_bytes: u64,
    /// Of its buffers.
    pub(super) buffer_bytes: u64,
}

/// A pool before and after `KvCache::defragment`.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Fragmentation {
    pub(super) before: Holes,
    pub(super) after: Holes,
    pub(super) moved_blocks: u32,
    pub(super) moved_bytes: u64,
    /// Planning, recording, submit and wait.
    pub(super) seconds: f64,
}

/// Where the used blocks of a pool lie.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Holes {
    pub(super) used_blocks: u32,
    /// Up to the last used one.
    pub(super) span_blocks: u32,
    /// Stretches of used blocks.
    pub(super) runs: u32,
    /// Free part of the span.
    pub(super) holes: f64,
}

/// How time grows with texts.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Time {
    /// A whole model by the host's clock.
    pub(super) model: TimeFigure,
    /// One layer's attention and append by the clock of the adapter.
    pub(super) layer: TimeFigure,
}

/// What was measured on one thing.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct TimeFigure {
    pub(super) what: String,
    pub(super) curves: Vec<Curve>,
    pub(super) crossings: Vec<Crossing>,
}

/// Seconds per token against the context.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Curve {
    pub(super) name: String,
    /// `recompute`: one token, everything before it again; `decode`: one token from the cache; `prefill`: a token of a prompt of this length.
    pub(super) kind: &'static str,
    pub(super) points: Vec<TimePoint>,
}

#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct TimePoint {
    /// Tokens of the text.
    pub(super) context: u32,
    /// Per token.
    #[cfg_attr(test, schemars(with = "schema::Spread"))]
    pub(super) seconds: Spread,
}

/// From where on a curve is below another one.
#[derive(Serialize)]
#[cfg_attr(test, derive(JsonSchema), schemars(deny_unknown_fields))]
pub(super) struct Crossing {
    pub(super) faster: String,
    pub(super) slower: String,
    /// `always`: at every context that was measured; `from`: from `context` on; `never`: not at the longest one.
    pub(super) kind: &'static str,
    pub(super) context: Option<f64>,
    /// Slower of faster at the longest common context.
    pub(super) ratio_at_end: f64,
}

/// What the library's results look like, for the schema. A test compares the schema with real reports, so these can't differ.
#[cfg(test)]
#[allow(dead_code, reason = "read by the derive only")]
mod schema {
    use schemars::JsonSchema;

    /// A median with the quartiles around it.
    #[derive(JsonSchema)]
    #[schemars(deny_unknown_fields)]
    pub(super) struct Spread {
        median: f64,
        low: f64,
        high: f64,
        /// How many samples there were.
        rounds: u32,
    }

    /// What a plain loop reaches.
    #[derive(JsonSchema)]
    #[schemars(deny_unknown_fields)]
    pub(super) struct Roof {
        /// Bytes, or floating-point operations, per second.
        per_second: Spread,
        /// Element or accumulator type of the fastest loop.
        by: String,
    }

    /// Rates that no kernel exceeds by much, and what comes on top.
    #[derive(JsonSchema)]
    #[schemars(deny_unknown_fields)]
    pub(super) struct Roofs {
        read: Roof,
        /// Bytes that the loop reads.
        read_bytes: u64,
        /// Read and written bytes together.
        copy: Roof,
        /// Two operations for a multiply-add.
        multiply_add: Roof,
        /// Bytes of workgroup memory.
        workgroup: Roof,
        /// One more dispatch in a pass.
        dispatch: Spread,
        /// From recording to the end, by the host's clock.
        submit: Spread,
        readback: Spread,
    }

    /// Bytes and operations of a call, counted from its plan.
    #[derive(JsonSchema)]
    #[schemars(deny_unknown_fields)]
    pub(super) struct Work {
        /// As often as tiles read them.
        read_bytes: u64,
        written_bytes: u64,
        /// Of visible pairs of queries and keys.
        flop: u64,
        /// Of all pairs that tiles compute.
        tile_flop: u64,
        dispatches: u32,
    }
}

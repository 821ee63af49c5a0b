//! How the GPU does it: variants, composed text, binding tables, pipelines.

mod bindings;
mod geometry;
mod pipelines;
mod source;
pub mod tuning;
mod variant;

pub(crate) use bindings::attention_storage_buffers;
pub use bindings::{Access, AttendParams, Binding, CacheParams, PackParams, bindings};
pub use pipelines::Pipeline;
pub use source::compose;
pub use variant::{AttendFlags, Kernel, MAX_DECODE_GROUP, RopeShape, Target, Variant};

/// Most workgroups along a dimension of a dispatch that WebGPU guarantees.
pub const MAX_GRID: u32 = 65_535;

/// Where the running maximum of logits (in units of log2) starts. Logits and sinks stay within half of it, so that no difference of two of them
/// and the floor overflows.
pub const LOGIT_FLOOR: f32 = -1.701_411_8e38;

/// A grid for `count` workgroups that are numbered linearly: (x, rest), both within [`MAX_GRID`], or `None` if there are too many.
#[must_use]
pub fn linear_grid(count: u64) -> Option<(u32, u32)> {
    let x = count.clamp(1, MAX_GRID.into());
    let rest = count.div_ceil(x).max(1);
    (rest <= u64::from(MAX_GRID)).then_some((x as u32, rest as u32))
}

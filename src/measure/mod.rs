//! Measuring on the adapter at hand, for programs that report, compare or choose by time. Nothing calls it unasked.
//!
//! * [`Timer`]: how long a pass takes, by the GPU's clock where it can be believed.
//! * [`interleave`]: contestants that take turns, so that whatever else slows the machine down meets all alike; a [`Spread`] of each.
//! * [`Roofs`]: what the adapter can do at all, by [`RoofLoops`]: reading, copying, multiplying and adding, workgroup memory; and what a dispatch, a
//!   submit and a readback cost.
//! * [`FilledCache`]: a cache whose sequences have tokens, with a call of attention that is planned and can be recorded again and again.
//! * [`Work`]: bytes and operations of such a call, counted from its plan.
//!
//! Results are plain data and serialise by serde: seconds, bytes, operations. These fields are part of documents with versions of their own; they change
//! their meaning only together with [`VERSION`].

mod filled;
mod loops;
mod roofs;
mod spread;
mod timer;
mod work;

pub use filled::{AttentionShape, FilledCache, MeasuredCall};
pub use loops::{PlainLoop, copy_loop, multiply_add_loop, read_loop, workgroup_loop};
pub use roofs::{Roof, RoofLoops, Roofs};
pub use spread::{Rounds, Spread, interleave};
pub use timer::{Sample, Timer, median};
pub use work::Work;

/// Of the serialised results of this module.
pub const VERSION: u32 = 1;

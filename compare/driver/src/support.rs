//! What folio's own benchmarks measure with.
#![allow(dead_code, reason = "the driver uses a part of it")]

#[path = "../../../benches/support/adapter.rs"]
pub(crate) mod adapter;
#[path = "../../../benches/support/limits.rs"]
pub(crate) mod limits;
#[path = "../../../benches/support/shape.rs"]
pub(crate) mod shape;
#[path = "../../../benches/support/timer.rs"]
pub(crate) mod timer;

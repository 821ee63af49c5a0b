//! Tests that need an adapter. Without one they are skipped, which each of them says on stderr, or fail if `FOLIO_REQUIRE_GPU=1`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may fail and may say why it was skipped"
)]

#[path = "../common/mod.rs"]
mod common;

mod adapter;
mod append_latent;
mod append_qkv;
mod attend;
mod bad_input;
mod cache;
mod cascade;
mod case;
mod combinations;
mod contiguous;
mod encoded;
mod formats;
mod groups;
mod hidden;
mod host_rows;
mod invariance;
mod isolation;
mod lost;
mod matrix;
#[cfg(feature = "measure")]
mod measure;
mod model_based;
mod movable;
mod packed;
mod parts;
mod rope;
mod segments;
mod shapes;
mod soundness;
#[cfg(feature = "counters")]
mod steady_state;
mod streaming;
mod tokens;
mod trees;
#[cfg(feature = "tune")]
mod tune;
mod windows;

/// Says what all other results are worth.
#[test]
fn adapter_is_there() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let (info, profile) = (gpu.adapter_info(), gpu.profile());
    adapter::say(&format!(
        "adapter under test: {} ({:?}, {:?}), {profile:?} kernels",
        info.name, info.backend, info.device_type
    ));
    assert!(!info.name.is_empty());
}

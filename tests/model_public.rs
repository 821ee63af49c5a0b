//! The model is built on folio's public API alone: its sources compile as part of another crate, to which nothing else is visible but the reading of
//! files, which is no part of the API.
#![cfg(feature = "model")]
#![allow(dead_code, unused_imports, unreachable_pub, clippy::unwrap_used, reason = "it only has to compile")]

pub use folio::*;

#[path = "../src/files.rs"]
mod files;
#[path = "../src/model/mod.rs"]
pub mod model;

/// The module above is another one than folio's own; what they are built on is the same.
#[test]
fn the_model_needs_no_private_access() {
    let error = model::ModelConfig::from_json("{}").unwrap_err();
    assert!(error.to_string().contains("model_type"), "{error}");
}

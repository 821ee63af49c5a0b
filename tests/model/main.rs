//! Tests of the model: its kernels against f64, its loader, and whole models against Hugging Face's.
#![cfg(feature = "model")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking"
)]

#[path = "../gpu/adapter.rs"]
#[allow(dead_code, reason = "shared with the tests of the GPU kernels")]
mod adapter;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/translate.rs"]
mod translate;

mod bad_files;
mod bad_gguf;
mod bad_gguf_models;
mod bad_tokenizers;
mod buffers;
mod checkpoint_files;
mod decoder;
#[cfg(feature = "counters")]
mod dispatches;
mod experts;
mod experts_config;
mod experts_files;
mod forward;
mod gguf;
mod groups;
mod head_linear;
mod kinds_of_layers;
mod latent;
mod life_cycle;
mod linear;
mod linear_candidates;
mod linear_fused;
mod linear_matrix;
mod linear_shaders;
#[cfg(feature = "tune")]
mod linear_tune;
mod loading;
mod long_prompt;
mod ops;
mod parity;
mod pipelines;
mod sampler;
mod shaders_ops;
mod trees;
mod windows;

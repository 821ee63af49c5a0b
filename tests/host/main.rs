//! Tests that need no GPU.
#![allow(clippy::print_stdout, reason = "the shader tests say how many variants they looked at")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/translate.rs"]
mod translate;

mod errors;
mod fixtures;
mod layout;
mod plan;
mod plan_only;
mod plan_picture;
mod pool;
mod rope;
mod shaders;
mod variants;

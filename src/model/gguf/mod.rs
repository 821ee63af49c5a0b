//! GGUF, llama.cpp's file format: weights, settings and tokenizer in one file.
//!
//! Specified in [ggml's documentation](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); what names and settings mean is what llama.cpp
//! makes of them. The parts: [`reader`] reads a header and [`parts`] those of several files, [`blocks`] converts elements, [`known`] lists architectures,
//! [`architecture`] and [`settings`] turn names and settings into those of an [`Architecture`](super::Architecture), [`tokenizer`] makes a `tokenizer.json`.
//!
//! # Why a reader of its own
//! Of the crates that read the format (November 2026), `candle-core` is a tensor library with its own kernels; `gguf-rs` brings a command line, a logger and an
//! asynchronous runtime, and switches `serde_json` to numbers of any precision for the whole program; `ggus` reads version 3 only, reserves memory for
//! as many entries as the file announces and adds sizes without looking for an overflow. The format is a list of typed values.

mod architecture;
mod blocks;
mod known;
mod metadata;
mod parts;
mod reader;
mod settings;
mod tokenizer;

use std::path::Path;

pub(super) use architecture::{Described, describe, undo_interleaving};
pub(crate) use blocks::BlockType;
pub use metadata::GgufMetadata;
pub(super) use reader::{Header, Part, Tensor};
pub(super) use tokenizer::tokenizer_json;

/// Whether a path is taken for a GGUF file: by its end, and because it is no folder.
pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")) && !path.is_dir()
}

#[cfg(test)]
mod tests;

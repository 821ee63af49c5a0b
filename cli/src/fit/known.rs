//! The shapes of well-known models: what their `config.json` says, and how many parameters their publishers count.

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::value::RawValue;

/// A model of the table.
#[derive(Deserialize)]
pub(super) struct KnownModel {
    pub(super) name: String,
    /// As its publisher counts them: of the file, a tied head once.
    pub(super) parameters: u64,
    /// What of its `config.json` shapes it.
    pub(super) config: Box<RawValue>,
}

/// All of them.
pub(super) fn models() -> Result<Vec<KnownModel>> {
    serde_json::from_str(include_str!("../../models/known.json")).context("the table of models")
}

/// The one of this name, however it is written: `Llama-3.1-8B`, or `meta-llama/Llama-3.1-8B`.
pub(super) fn find(name: &str) -> Result<Option<KnownModel>> {
    let name = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    Ok(models()?.into_iter().find(|model| model.name == name))
}

/// All names, each with its parameters.
pub(super) fn list() -> Result<String> {
    let line = |model: KnownModel| format!("{:<20} {:>7.2} billion\n", model.name, model.parameters as f64 / 1e9);
    Ok(models()?.into_iter().map(line).collect())
}

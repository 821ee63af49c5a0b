//! `folio serve`: OpenAI's HTTP interface on the engine.

use std::process::ExitCode;

/// Serves a model over HTTP, by OpenAI's interface
#[derive(Clone, clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_options: Options) -> ExitCode {
    ExitCode::FAILURE
}

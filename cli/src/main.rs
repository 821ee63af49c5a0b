//! folio on the command line.

mod bench;
mod chat;
mod files;
mod fit;
mod formats;
mod load;
mod plot;
mod report;
mod serve;
mod stdout;
mod template;
mod verify;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Language models on any GPU: chat with one, or serve it over HTTP
///
/// Runs Hugging Face checkpoints and GGUF files (Llama, Mistral, Mixtral, Qwen2, Qwen3 with or without experts, Gemma 2 and 3, Phi-3, gpt-oss,
/// DeepSeek-V2 and V3, dots.llm1, SmolLM3, OLMo 2, GPT-NeoX, GPT-2) through wgpu: Vulkan, Metal, DX12, or a software adapter. Without --model it is the small story model that comes with folio.
#[derive(Parser)]
#[command(name = "folio", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Chat(Box<chat::Options>),
    Serve(Box<serve::Options>),
    Bench(Box<bench::Options>),
    Fit(Box<fit::Options>),
    Verify(Box<verify::Options>),
    Formats(Box<formats::Options>),
    Report(Box<report::Options>),
    /// Write a script of completions for a shell to stdout
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Chat(options) => chat::run(*options),
        Command::Serve(options) => serve::run(*options),
        Command::Bench(options) => bench::main(*options),
        Command::Fit(options) => fit::run(&options),
        Command::Verify(options) => verify::run(&options),
        Command::Formats(options) => formats::run(&options),
        Command::Report(options) => report::run(&options),
        Command::Completions { shell } => completions(shell),
    }
}

fn completions(shell: clap_complete::Shell) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "folio", &mut script);
    match stdout::write(&script) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

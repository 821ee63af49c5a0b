//! folio on the command line.

mod chat;
mod files;
mod load;
mod serve;
mod template;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Language models on any GPU: chat with one, or serve it over HTTP.
#[derive(Parser)]
#[command(name = "folio", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Chat(chat::Options),
    Serve(serve::Options),
    /// Writes a script of completions for a shell to stdout
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Chat(options) => chat::run(options),
        Command::Serve(options) => serve::run(options),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "folio", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
    }
}

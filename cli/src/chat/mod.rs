//! A model that talks: prompt in, text out, on whatever GPU is there.
//!
//! `cargo run --release --features model --example chat -- --help`
//!
//! Without arguments it loads the story model of this repository. On a terminal it reads prompts until an empty line or Ctrl-D; piped text is
//! taken as prompts; with neither it runs a short fixed conversation. Earlier turns stay in the cache: each turn feeds its own text only.
#![allow(clippy::print_stderr, reason = "a program for the terminal")]

mod options;
mod screen;
mod session;
#[cfg(test)]
mod tests;

use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use folio::kernel::tuning::Tuning;
use folio::model::{Decoder, Model, ModelOptions, Tokenizer};
use folio::{Gpu, GpuOptions};

use options::Options;
use screen::{Interrupts, Screen};
use session::Session;

/// The conversation of a run with neither prompts nor terminal: the beginning of a story that the model goes on with, then questions about facts
/// from before that. Later turns feed their own few tokens only; the story stays in the cache.
const CONVERSATION: [&str; 4] = [
    "Title: Mia and the silver key\n\
     Once upon a time, in autumn, there was a little town where everybody knew everybody. Mia was a baker from Willow Hill. \
     Mia loved plum cake more than anything. Tom was a sailor from Stone Bay. Tom loved onion soup more than anything.\n\
     The day was still young. Mia hid the silver key under the old bridge. Tom put the red lantern inside the dark cave. \
     Mia passed the golden ring to Tom.\n\
     Later the clouds went away.",
    "Where is the silver key?",
    "What did Tom love?",
    "Who was Mia?",
];

fn main() -> ExitCode {
    run(Options::parse())
}

fn run(options: Options) -> ExitCode {
    let mut session = match open(options) {
        Ok(session) => session,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    match talk(&mut session) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Whoever read has had enough.
        Err(error) if screen::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            session.screen.note(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Loads the model and compiles its kernels.
fn open(options: Options) -> Result<Session> {
    let interrupts = Interrupts::default();
    interrupts.listen()?;
    let mut gpu_options = GpuOptions::default();
    gpu_options.adapter_name.clone_from(&options.adapter);
    let mut gpu = Gpu::open_blocking(gpu_options)?;
    if let Some(file) = &options.tuning {
        gpu = tuned(&gpu, file).with_context(|| file.display().to_string())?;
    }
    let stories = || Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let folder: PathBuf = options.model.clone().unwrap_or_else(stories);
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
    let start = Instant::now();
    let model = Model::load_blocking(&gpu, &folder, ModelOptions::new(options.weights), screen::loading_bar())?;
    let load_time = start.elapsed();
    tokenizer.check_vocab_size(model.config().vocab_size)?;

    let start = Instant::now();
    let busy = screen::busy("compiling kernels...");
    let model = Arc::new(model);
    let mut decoder = Decoder::new_blocking(Arc::clone(&model), options.decoder(model.config()))?;
    if options.cache.k.has_channel_scales() {
        let opening = tokenizer.encode(options.prompt.first().map_or("Once upon a time", String::as_str), true)?;
        gpu.block_on(decoder.calibrate_keys_on_own_text(&[&opening], 200))?;
    }
    gpu.block_on(decoder.warm_up())?;
    drop(busy);
    eprintln!(
        "{}: {:.1} MB of weights in {:.1} s, kernels compiled in {:.1} s",
        folder.display(),
        model.weight_bytes() as f64 / 1e6,
        load_time.as_secs_f64(),
        start.elapsed().as_secs_f64()
    );
    interrupts.begin_talking();
    let screen = Screen::new(std::io::stdout(), std::io::stderr());
    Ok(Session::new(options, decoder, tokenizer, screen, interrupts))
}

/// The same device with the kernel sizes of a file.
fn tuned(gpu: &Gpu, file: &Path) -> Result<Gpu> {
    let tuning: Tuning = serde_json::from_str(&std::fs::read_to_string(file)?).context("not a tuning")?;
    Ok(gpu.with_tuning(tuning)?)
}

/// Holds the conversation. Returns whether every prompt could be said.
fn talk(session: &mut Session) -> Result<bool> {
    let prompts = session.options.prompt.clone();
    let all_said = if !prompts.is_empty() {
        session.recite(prompts)?
    } else if std::io::stdin().is_terminal() {
        converse(session)?;
        true
    } else {
        let mut lines = lines().into_iter().filter(|line| !line.trim().is_empty()).peekable();
        if lines.peek().is_some() {
            session.recite(lines)?
        } else if session.options.model.is_none() {
            session.recite(CONVERSATION)?
        } else {
            bail!("prompt: got none, need --prompt TEXT, piped text, or a terminal to ask on");
        }
    };
    session.report()?;
    Ok(all_said)
}

/// The lines of stdin as they come, from a thread of its own so that other things are noticed meanwhile. Ends with stdin.
fn lines() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut line = Vec::new();
        while matches!(stdin.read_until(b'\n', &mut line), Ok(1..)) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            line.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    lines
}

/// Asks for prompts on the terminal.
fn converse(session: &mut Session) -> Result<()> {
    session.screen.note("Say something; an empty line or Ctrl-D ends, Ctrl-C ends an answer.");
    let lines = lines();
    loop {
        session.screen.ask();
        // After an answer was ended, one more press ends the program.
        let mut is_warned = session.interrupts.is_pressed();
        let line = loop {
            if session.interrupts.is_pressed() && !is_warned {
                is_warned = true;
                session.screen.note("\n[Ctrl-C once more, or an empty line, ends]");
                session.screen.ask();
            }
            match lines.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => break line,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            }
        };
        if line.trim().is_empty() {
            return Ok(());
        }
        session.turn(&line)?;
    }
}

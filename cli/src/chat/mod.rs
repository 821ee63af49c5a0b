//! `folio chat`: prompt in, text out.
//!
//! Without arguments it loads the story model of this repository. On a terminal it reads prompts until an empty line or Ctrl-D; piped text is
//! taken as prompts; with neither it runs a short fixed conversation. Earlier turns stay in the cache: each turn feeds its own text only.

mod options;
mod screen;
mod session;
#[cfg(test)]
mod tests;
mod turns;
mod watched;

pub(crate) use options::Options;

use std::io::{BufRead, IsTerminal};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::load::{self, Loaded};
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

/// Runs the command.
pub(crate) fn run(options: Options) -> ExitCode {
    let interrupts = Interrupts::default();
    let said = if options.watch { watch(options, &interrupts) } else { chat(options, interrupts) };
    match said {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Whoever read has had enough.
        Err(error) if screen::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Talks line by line. Returns whether every prompt could be said.
fn chat(options: Options, interrupts: Interrupts) -> Result<bool> {
    let loaded = open(&options, &interrupts)?;
    let screen = Screen::new(std::io::stdout(), std::io::stderr());
    let mut session = Session::new(options, loaded, screen, interrupts)?;
    let result = talk(&mut session);
    if result.is_err() {
        let _ = session.screen.end_line();
    }
    result
}

/// Talks beside a picture of the cache.
fn watch(options: Options, interrupts: &Interrupts) -> Result<bool> {
    crate::watch::check_terminal()?;
    let loaded = open(&options, interrupts)?;
    watched::run(options, loaded, interrupts)
}

/// Loads the model.
fn open(options: &Options, interrupts: &Interrupts) -> Result<Loaded> {
    interrupts.listen()?;
    let mut load = options.load.clone();
    load.opening = options.prompt.first().cloned();
    let loaded = load::load(&load, options.branches, |decoder| {
        // A request of the engine finds the conversation so far there.
        decoder.prefix_cache = options.watch;
    })?;
    interrupts.begin_talking();
    Ok(loaded)
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
        } else if session.options.load.is_stories() {
            session.recite(CONVERSATION)?
        } else {
            bail!("prompt: got none, need --prompt TEXT, piped text, or a terminal to ask on");
        }
    };
    if session.options.verbose {
        session.report()?;
    }
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

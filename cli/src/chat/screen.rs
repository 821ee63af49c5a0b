//! What is shown, and what is heard from the keyboard.

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::Context;

use crate::watch;

/// Text for stdout, and notes for stderr, which begin on a line of their own.
pub(crate) struct Screen {
    out: Box<dyn Write>,
    notes: Box<dyn Write>,
    is_line_open: bool,
}

impl Screen {
    pub(crate) fn new(out: impl Write + 'static, notes: impl Write + 'static) -> Self {
        Self { out: Box::new(out), notes: Box::new(notes), is_line_open: false }
    }

    /// Writes text at once. Fails if nobody reads it any more.
    pub(crate) fn say(&mut self, text: &str) -> io::Result<()> {
        if !text.is_empty() {
            self.out.write_all(text.as_bytes())?;
            self.out.flush()?;
            self.is_line_open = !text.ends_with('\n');
        }
        Ok(())
    }

    /// Ends the line, if it has begun.
    pub(crate) fn end_line(&mut self) -> io::Result<()> {
        if self.is_line_open { self.say("\n") } else { Ok(()) }
    }

    /// A line about the conversation, not of it.
    pub(crate) fn note(&mut self, text: &str) {
        // Where neither can be written to, nobody is left to be told.
        let _ = self.end_line();
        let _ = writeln!(self.notes, "{text}");
    }

    /// What the user types after.
    pub(crate) fn ask(&mut self) {
        let _ = self.end_line();
        let _ = write!(self.notes, "> ").and_then(|()| self.notes.flush());
    }
}

/// Whether somebody has closed the pipe that the text goes into: `chat | head -1`.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// Ctrl-C: ends an answer, and pressed twice, the program.
#[derive(Clone, Default)]
pub(crate) struct Interrupts(Arc<Presses>);

#[derive(Default)]
struct Presses {
    count: AtomicU32,
    /// Before that there is no answer to end, and one press is enough.
    is_talking: AtomicBool,
}

impl Interrupts {
    pub(crate) fn listen(&self) -> anyhow::Result<()> {
        let presses = Arc::clone(&self.0);
        let handler = move || {
            let count = presses.count.fetch_add(1, Ordering::Relaxed) + 1;
            if count > 1 || !presses.is_talking.load(Ordering::Relaxed) {
                watch::restore_terminal();
                // Leaves a line begun by a prompt, an answer or a progress bar.
                let _ = writeln!(io::stderr());
                std::process::exit(130);
            }
        };
        ctrlc::set_handler(handler).context("listening for Ctrl-C")
    }

    pub(crate) fn begin_talking(&self) {
        self.0.is_talking.store(true, Ordering::Relaxed);
    }

    /// From here on, one press is the first again.
    pub(crate) fn begin_answer(&self) {
        self.0.count.store(0, Ordering::Relaxed);
    }

    pub(crate) fn is_pressed(&self) -> bool {
        self.0.count.load(Ordering::Relaxed) > 0
    }

    #[cfg(test)]
    pub(crate) fn press(&self) {
        self.0.count.fetch_add(1, Ordering::Relaxed);
    }
}

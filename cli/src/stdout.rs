//! What goes to stdout in one piece.

use std::io::{self, ErrorKind, Write};

use anyhow::{Context, Result};

/// Writes all of it, unless nobody reads it any more.
pub(crate) fn write(bytes: &[u8]) -> Result<()> {
    match io::stdout().write_all(bytes) {
        // Whoever read has had enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("stdout"),
        _ => Ok(()),
    }
}

/// [`write`] of a text.
pub(crate) fn print(text: &str) -> Result<()> {
    write(text.as_bytes())
}

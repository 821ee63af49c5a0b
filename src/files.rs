//! Reading and replacing files that others name: regular files only, and no more bytes than the caller allows.
//!
//! A path may lead to a pipe, which waits for a writer for ever, or to a device without an end. So whatever is read goes through here: the
//! path is looked at before it is opened, links followed, and the opened file once more.

use std::fs::{self, File, Metadata};
use std::io;
#[cfg(feature = "model")]
use std::io::Read;
use std::path::Path;

/// What is wrong with a file. The caller knows its path.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) reason: String,
    pub(crate) source: Option<io::Error>,
}

impl Fault {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), source: None }
    }

    /// `what` is what can't be done.
    pub(crate) fn io(what: &str, error: io::Error) -> Self {
        Self { reason: format!("{what}: {}", error.kind()), source: Some(error) }
    }
}

/// Opens a regular file for reading: it, and its length in bytes.
///
/// Between the look and the opening another process may put a pipe in its place, and opening that waits. No system that folio runs on can open
/// a path on the condition that it is a regular file.
pub(crate) fn open(path: &Path) -> Result<(File, u64), Fault> {
    let failed = |error| Fault::io("can't be read", error);
    regular("can't be read", &fs::metadata(path).map_err(failed)?)?;
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    regular("can't be read", &metadata)?;
    Ok((file, metadata.len()))
}

/// All bytes of a regular file, if there are at most `max_bytes`.
#[cfg(feature = "model")]
pub(crate) fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>, Fault> {
    let too_long = |len: String| Fault::new(format!("got {len} bytes, need at most {max_bytes}"));
    let (file, len) = open(path)?;
    if len > max_bytes {
        return Err(too_long(len.to_string()));
    }
    let mut bytes = Vec::new();
    // The length may be wrong: files in /proc say 0, and others grow.
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(|error| Fault::io("can't be read", error))?;
    if bytes.len() as u64 > max_bytes {
        return Err(too_long(format!("more than {max_bytes}")));
    }
    Ok(bytes)
}

/// Whether a file may be put at a path: if nothing is there, or a regular file.
#[cfg(feature = "save")]
pub(crate) fn check_target(path: &Path) -> Result<(), Fault> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => regular("can't be written", &metadata),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Fault::io("can't be written", error)),
    }
}

fn regular(failed: &str, metadata: &Metadata) -> Result<(), Fault> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(());
    }
    let what = if kind.is_dir() {
        "a directory"
    } else if kind.is_symlink() {
        "a symbolic link"
    } else {
        special(kind)
    };
    Err(Fault::new(format!("{failed}: got {what}, need a regular file")))
}

#[cfg(unix)]
fn special(kind: fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        "something else"
    }
}

#[cfg(not(unix))]
fn special(_: fs::FileType) -> &'static str {
    "something else"
}

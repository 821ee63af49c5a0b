//! Reading small files that others name: regular ones only, and not without bound.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// The longest text that is read. Configuration files have some kilobytes; those with all tokens in them, some megabytes.
const MAX_BYTES: u64 = 32 << 20;

/// The text of a regular file. A pipe would wait for ever, and a device may have no end.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let read = || {
        // Looked at before it is opened, since opening a pipe waits for its writer.
        ensure!(fs::metadata(path)?.is_file(), "got a directory or a device, need a regular file");
        let mut text = String::new();
        File::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
        ensure!(text.len() as u64 <= MAX_BYTES, "got more than {MAX_BYTES} bytes, need at most as many");
        Ok(text)
    };
    read().with_context(|| path.display().to_string())
}

/// The text of a file that may be missing.
pub(crate) fn read_text_if_there(path: &Path) -> Result<Option<String>> {
    if path.try_exists().with_context(|| path.display().to_string())? { read_text(path).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::{MAX_BYTES, read_text, read_text_if_there};
    use std::fs;

    #[test]
    fn only_short_regular_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("text");
        assert!(read_text_if_there(&file).unwrap().is_none());
        assert!(format!("{:#}", read_text(&file).unwrap_err()).contains("text: "));
        fs::write(&file, "a").unwrap();
        assert_eq!(read_text_if_there(&file).unwrap().as_deref(), Some("a"));
        let error = format!("{:#}", read_text(folder.path()).unwrap_err());
        assert!(error.ends_with("got a directory or a device, need a regular file"), "{error}");
        fs::File::create(&file).unwrap().set_len(MAX_BYTES + 1).unwrap();
        let error = format!("{:#}", read_text(&file).unwrap_err());
        assert!(error.contains("got more than 33554432 bytes"), "{error}");
    }
}

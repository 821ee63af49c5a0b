//! Reading small files that others name: regular ones only, and not without bound. Writing such that are complete or not there.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;

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

/// Fails unless a file can be made here, or is a regular one that is there. A link is refused: replacing it would not change what it points to.
pub(crate) fn check_target(path: &Path) -> Result<()> {
    path.file_name().with_context(|| format!("got {}, need the name of a file", path.display()))?;
    if let Ok(there) = fs::symlink_metadata(path) {
        ensure!(there.is_file(), "got {}, which is there and no regular file", path.display());
    }
    // Gone again at once: whoever interrupts the program later shall find nothing.
    temporary_beside(path).map(drop)
}

/// A file beside another, so that renaming it is all that is left.
fn temporary_beside(path: &Path) -> Result<NamedTempFile> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    // As readable as a file that is written in the ordinary way; tempfile's own are their owner's only.
    #[cfg(unix)]
    let builder = builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.prefix(".folio-").tempfile_in(folder);
    file.with_context(|| format!("can't write into {}", folder.display()))
}

/// Writes texts, each of which takes its name when all have been written.
pub(crate) fn write_texts(texts: &[(&Path, &str)]) -> Result<()> {
    let mut written = Vec::new();
    for &(path, text) in texts {
        let mut file = temporary_beside(path)?;
        file.write_all(text.as_bytes()).with_context(|| path.display().to_string())?;
        written.push((path, file));
    }
    for (path, file) in written {
        file.persist(path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::{MAX_BYTES, check_target, read_text, read_text_if_there, write_texts};
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

    #[test]
    fn texts_replace_files_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
        fs::write(&a, "old").unwrap();
        check_target(&a).unwrap();
        check_target(&b).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        write_texts(&[(&a, "1"), (&b, "2")]).unwrap();
        assert_eq!((fs::read_to_string(&a).unwrap(), fs::read_to_string(&b).unwrap()), ("1".into(), "2".into()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        let missing = folder.path().join("missing/c");
        for refused in [folder.path(), &missing, "..".as_ref()] {
            assert!(check_target(refused).is_err(), "{}", refused.display());
        }
        // One that can't be written leaves the others as they were.
        assert!(write_texts(&[(&a, "3"), (&missing, "4")]).is_err());
        assert_eq!(fs::read_to_string(&a).unwrap(), "1");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}

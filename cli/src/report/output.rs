//! Where a report goes: two files that appear when they are complete, or not at all.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;

/// The page and its figures, not written yet. Their folder is known to be writable.
pub(super) struct Output {
    html: PathBuf,
    json: PathBuf,
}

impl Output {
    /// Checks names, and whether the folder can be written into.
    pub(super) fn create(html: &Path) -> Result<Self> {
        html.file_name().with_context(|| format!("out: got {}, need the name of a file", html.display()))?;
        let is_json = html.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        ensure!(
            !is_json,
            "out: got {}, need the name of a page, such as report.html; figures go beside it as JSON",
            html.display()
        );
        let json = html.with_extension("json");
        for target in [html, &json] {
            // A link is refused, too: renaming would replace it, and not what it points to.
            if let Ok(there) = fs::symlink_metadata(target) {
                ensure!(there.is_file(), "out: got {}, which is there and no regular file", target.display());
            }
        }
        let output = Self { html: html.to_owned(), json };
        // Only to see that it works: whoever interrupts the measurement shall find nothing.
        drop(output.temporary()?);
        Ok(output)
    }

    /// A file beside the targets, so that renaming it is all that is left.
    fn temporary(&self) -> Result<NamedTempFile> {
        let folder = match self.html.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        // As readable as a file that is written in the ordinary way; tempfile's own are their owner's only.
        #[cfg(unix)]
        let builder = builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.prefix(".folio-report-").tempfile_in(folder);
        file.with_context(|| format!("out: can't write into {}", folder.display()))
    }

    /// What the page calls its figures.
    pub(super) fn json_name(&self) -> String {
        self.json.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    /// Writes both and gives them their names, the figures first. Returns the names.
    pub(super) fn write(self, html: &str, json: &str) -> Result<[PathBuf; 2]> {
        let mut files = [self.temporary()?, self.temporary()?];
        let targets = [self.json, self.html];
        for ((file, text), target) in files.iter_mut().zip([json, html]).zip(&targets) {
            file.write_all(text.as_bytes()).with_context(|| target.display().to_string())?;
        }
        for (file, target) in files.into_iter().zip(&targets) {
            file.persist(target).with_context(|| target.display().to_string())?;
        }
        let [json, html] = targets;
        Ok([html, json])
    }
}

//! Where a report goes: two files that appear when they are complete, or not at all.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::files::{check_target, write_texts};

/// The page and its figures, not written yet. Their folder is known to be writable.
pub(super) struct Output {
    html: PathBuf,
    json: PathBuf,
}

impl Output {
    /// Checks names, and whether the folder can be written into.
    pub(super) fn create(html: &Path) -> Result<Self> {
        let is_json = html.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        ensure!(
            !is_json,
            "out: got {}, need the name of a page, such as report.html; figures go beside it as JSON",
            html.display()
        );
        let json = html.with_extension("json");
        [html, &json].into_iter().try_for_each(check_target).context("out")?;
        Ok(Self { html: html.to_owned(), json })
    }

    /// What the page calls its figures.
    pub(super) fn json_name(&self) -> String {
        self.json.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    /// Writes both, and names them.
    pub(super) fn write(self, html: &str, json: &str) -> Result<[PathBuf; 2]> {
        // The figures first: a page is never beside those of an earlier one for long.
        write_texts(&[(&self.json, json), (&self.html, html)])?;
        Ok([self.html, self.json])
    }
}

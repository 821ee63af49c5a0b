//! How far a load has come.

use indicatif::{ProgressBar, ProgressStyle};

/// How far a load has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Bytes of the checkpoint that are on the device.
    pub bytes_done: u64,
    /// Bytes of the checkpoint that the model needs.
    pub bytes_total: u64,
    /// What is being loaded: a tensor's name, say.
    pub what: &'a str,
}

/// A bar on stderr that shows progress, and nothing if stderr is no terminal. It's gone when all is done or the closure is dropped.
pub fn progress_bar() -> impl FnMut(Progress<'_>) {
    let bar = ProgressBar::no_length();
    // The template is constant; indicatif's own style is the fallback of one that it can't parse.
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {wide_msg}") {
        bar.set_style(style);
    }
    let bar = ClearOnDrop(bar);
    move |progress| {
        let ClearOnDrop(bar) = &bar;
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
        bar.set_message(progress.what.to_owned());
        if progress.bytes_done >= progress.bytes_total {
            bar.finish_and_clear();
        }
    }
}

/// So that a load that fails leaves no bar behind.
struct ClearOnDrop(ProgressBar);

impl Drop for ClearOnDrop {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

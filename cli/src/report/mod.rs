//! `folio report`: what the adapter at hand can do, and what folio makes of it, on one page.

mod adapter;
mod data;
mod growth;
mod memory;
mod output;
mod page;
mod roofline;
#[cfg(test)]
mod tests;
mod time;

use std::cell::Cell;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use folio::measure::{Rounds, Timer};
use folio::model::Model;
use folio::{Gpu, GpuOptions, ShaderChecks};
use indicatif::{ProgressBar, ProgressStyle};

use data::Report;
use output::Output;

/// Measure the adapter and write a page about it: its limits, how near the kernels come to them, memory and time as texts grow
///
/// One HTML file that needs nothing else, and the same figures as JSON beside it. Runs some minutes on software adapters, less on GPUs. Leave the
/// machine alone meanwhile.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// The page; its figures go beside it, with .json as the end of the name
    #[arg(long, default_value = "report.html", value_name = "FILE")]
    out: PathBuf,
    /// Few formats, short texts, few rounds: less than a minute, and less to be trusted
    #[arg(long)]
    quick: bool,
    /// Part of an adapter's name [default: the best adapter]
    #[arg(long, value_name = "NAME", env = "FOLIO_ADAPTER")]
    adapter: Option<String>,
    /// Kernel sizes for this adapter, as the example `tune` writes them
    #[arg(long, value_name = "FILE")]
    tuning: Option<PathBuf>,
    /// Leave wgpu's bounds checks and loop guards in the shaders
    #[arg(long)]
    full_checks: bool,
}

pub(crate) fn run(options: &Options) -> ExitCode {
    match report(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn report(options: &Options) -> Result<()> {
    // What can be refused is refused before anything is measured.
    let output = Output::create(&options.out)?;
    let gpu = open(options)?;
    let stories = time::load(&gpu)?;
    let start = Instant::now();
    let progress = Progress::new();
    let mut report = measure(&gpu, &stories, options.quick, &progress)?;
    report.seconds = start.elapsed().as_secs_f64();
    drop(progress);
    let json = serde_json::to_string_pretty(&report)? + "\n";
    let html = page::render(&report, &output.json_name())?;
    let [html, json] = output.write(&html, &json)?;
    for hint in &report.adapter.hints {
        eprintln!("note: {}", hint.text);
    }
    eprintln!("{} and {} in {:.0} s", html.display(), json.display(), report.seconds);
    Ok(())
}

fn open(options: &Options) -> Result<Gpu> {
    let mut gpu_options = GpuOptions::default();
    gpu_options.adapter_name.clone_from(&options.adapter);
    gpu_options.timestamps = true;
    if options.full_checks {
        gpu_options.shader_checks = ShaderChecks::Full;
    }
    let gpu = Gpu::open_blocking(gpu_options)?;
    match &options.tuning {
        Some(file) => crate::load::tuned(&gpu, file),
        None => Ok(gpu),
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Effort {
    quick: bool,
    /// Of whatever takes turns.
    rounds: Rounds,
}

impl Effort {
    const fn new(quick: bool) -> Self {
        // The median holds as long as fewer than half of the rounds are disturbed. Calls of a millisecond are disturbed more easily, and get more rounds.
        let rounds = if quick {
            Rounds { least: 5, most: 25, budget: Duration::from_millis(200) }
        } else {
            Rounds { least: 11, most: 101, budget: Duration::from_secs(2) }
        };
        Self { quick, rounds }
    }
}

fn measure(gpu: &Gpu, stories: &Arc<Model>, quick: bool, progress: &Progress) -> Result<Report> {
    let effort = Effort::new(quick);
    let mut timer = Timer::new(gpu)?;
    progress.part(1).next("roofs");
    let loops = roofline::loops(&mut timer, effort)?;
    let (roofline, kernels) = roofline::measure(&timer, &loops, effort, progress)?;
    drop(loops);
    ensure!(!roofline.points.is_empty(), "no kernel could be measured");
    let adapter = adapter::describe(gpu, &timer, kernels);
    let memory = memory::measure(gpu, effort, progress)?;
    let time = time::measure(&timer, stories, effort, progress)?;
    Ok(Report::new(quick, adapter, roofline, memory, time))
}

/// A bar on stderr, if that is a terminal.
struct Progress {
    bar: ProgressBar,
    /// Parts that have begun.
    begun: Cell<u64>,
}

/// Parts of a report, of which each is as much of the bar, however long it takes.
const PARTS: u64 = 4;
/// Steps of the bar for each part.
const PART_STEPS: u64 = 1000;

impl Progress {
    fn new() -> Self {
        let bar = ProgressBar::new(PARTS * PART_STEPS);
        // The template is constant; indicatif's own style is the fallback of one that it can't parse.
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {elapsed} {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, begun: Cell::new(0) }
    }

    /// Another part begins, of so many pieces.
    fn part(&self, pieces: usize) -> Part<'_> {
        let start = self.begun.get() * PART_STEPS;
        self.begun.set(self.begun.get() + 1);
        Part { bar: &self.bar, start, pieces: pieces.max(1) as u64, begun: Cell::new(0) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A part of the report in the making.
struct Part<'a> {
    bar: &'a ProgressBar,
    start: u64,
    pieces: u64,
    /// Pieces that have begun.
    begun: Cell<u64>,
}

impl Part<'_> {
    /// One piece is about to be measured.
    fn next(&self, what: impl Into<String>) {
        let begun = self.begun.get().min(self.pieces);
        self.bar.set_position(self.start + PART_STEPS * begun / self.pieces);
        self.bar.set_message(what.into());
        self.begun.set(begun + 1);
    }
}

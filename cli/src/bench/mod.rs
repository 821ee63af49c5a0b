//! `folio bench`: what continuous batching and drafts gain on the adapter at hand.

mod report;
mod run;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use folio::engine::{Engine, EngineOptions, PromptLookup};

use crate::load::{LoadOptions, Loaded, load};
use report::{BatchingRow, LookupRow, Report, SchedulerRow, median};
use run::{Outcome, Way, run};
use workload::Workload;

/// Measure requests that share a GPU: one by one, in fixed batches, and continuously
///
/// Every figure is a median over rounds in which all ways take turns, so that a machine that slows down slows all of them.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    load: LoadOptions,
    /// Numbers of requests
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64", value_name = "N,N...")]
    requests: Vec<u32>,
    /// Requests of a fixed batch
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    batch: u32,
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Time within which all requests come, in hundredths of what they take one by one
    ///
    /// Far less than a hundred: what is measured is the engine, and not the wait for requests.
    #[arg(long, default_value_t = 6, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100))]
    arrivals: u32,
    /// Prompts, lengths and arrivals depend on it
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    seed: u64,
    /// Also measure what `--exact` costs
    #[arg(long, conflicts_with = "exact")]
    exact_price: bool,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the largest workload as JSON, so that another engine can run the same
    #[arg(long, value_name = "FILE")]
    save_workload: Option<PathBuf>,
}

pub(crate) fn main(options: Options) -> ExitCode {
    match bench(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// An engine that gives its decoder back when it is to be made anew.
struct Bench {
    engine: Option<Engine>,
}

impl Bench {
    fn new(loaded: Loaded) -> Result<(Self, folio::model::Tokenizer, String)> {
        let Loaded { decoder, tokenizer, name, .. } = loaded;
        let engine = Engine::new(decoder, Some(tokenizer.clone()), EngineOptions::default())?;
        Ok((Self { engine: Some(engine) }, tokenizer, name))
    }

    fn engine(&mut self) -> Result<&mut Engine> {
        self.engine.as_mut().context("the engine could not be made again")
    }

    /// With or without drafts from now on, and without what is known of earlier prompts.
    fn start_over(&mut self, lookup: bool) -> Result<()> {
        let engine = self.engine.take().context("the engine could not be made again")?;
        let tokenizer = engine.tokenizer().cloned();
        let mut decoder = engine.shutdown();
        decoder.forget_prefixes();
        let engine = Engine::new(decoder, tokenizer, EngineOptions::default())?;
        self.engine = Some(if lookup { engine.with_proposer(PromptLookup::default()) } else { engine });
        Ok(())
    }
}

fn bench(options: &Options) -> Result<()> {
    ensure!(options.requests.iter().all(|count| (1..=1000).contains(count)), "requests: need numbers from 1 to 1000");
    let (mut bench, tokenizer, name) =
        Bench::new(load(&options.load, options.batch, |decoder| decoder.prefix_cache = true)?)?;
    let mut exact = if options.exact_price {
        let mut load_options = options.load.clone();
        load_options.exact = true;
        Some(Bench::new(load(&load_options, options.batch, |decoder| decoder.prefix_cache = true)?)?.0)
    } else {
        None
    };
    let gpu = bench.engine()?.gpu().clone();
    let info = gpu.adapter_info();
    let mut report = Report::new(format!("{} ({:?})", info.name, info.backend), name, options.load.weights.to_string());
    report.print_head();
    let max_positions = bench.engine()?.decoder().model().config().max_positions;
    let mut last = None;
    for &count in &options.requests {
        let workload = Workload::new(&tokenizer, count, options.seed, max_positions)?;
        let row = batching(options, &mut bench, exact.as_mut(), &workload)?;
        row.print();
        report.batching.push(row);
        last = Some(workload);
    }
    let (story, questions) = Workload::questions(&tokenizer)?;
    let row = lookup(options, &mut bench, &story, &questions)?;
    row.print();
    report.lookup = Some(row);
    let row = SchedulerRow::measure(256)?;
    row.print();
    report.scheduler = Some(row);
    if let Some(file) = &options.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)?).with_context(|| file.display().to_string())?;
    }
    if let (Some(file), Some(workload)) = (&options.save_workload, last) {
        std::fs::write(file, serde_json::to_string(&workload)?).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// One number of requests, each way.
fn batching(
    options: &Options,
    bench: &mut Bench,
    exact: Option<&mut Bench>,
    workload: &Workload,
) -> Result<BatchingRow> {
    // How fast requests come follows how fast they are served.
    let alone = run(bench.engine()?, workload, Way::OneByOne, Duration::ZERO)?;
    let span = alone.time * options.arrivals / 100;
    let mut outcomes: [Vec<Outcome>; 4] = Default::default();
    let mut exact = exact;
    for _ in 0..options.rounds {
        for (way, outcomes) in
            [Way::OneByOne, Way::Fixed(options.batch), Way::Continuous].into_iter().zip(&mut outcomes)
        {
            bench.start_over(false)?;
            outcomes.push(run(bench.engine()?, workload, way, span)?);
        }
        if let Some(exact) = exact.as_deref_mut() {
            exact.start_over(false)?;
            outcomes[3].push(run(exact.engine()?, workload, Way::Continuous, span)?);
        }
    }
    BatchingRow::new(workload.requests.len() as u32, &outcomes)
}

/// Questions one after another, with and without drafts. The story that they are about is in the cache by then, as it is when a chat has told it.
fn lookup(options: &Options, bench: &mut Bench, story: &Workload, questions: &Workload) -> Result<LookupRow> {
    let mut times: [Vec<Duration>; 2] = Default::default();
    let mut outcomes: [Option<Outcome>; 2] = Default::default();
    for _ in 0..=options.rounds {
        for (i, times) in times.iter_mut().enumerate() {
            bench.start_over(i == 1)?;
            run(bench.engine()?, story, Way::OneByOne, Duration::ZERO)?;
            let outcome = run(bench.engine()?, questions, Way::OneByOne, Duration::ZERO)?;
            times.push(outcome.time);
            outcomes[i] = Some(outcome);
        }
    }
    bench.start_over(false)?;
    let [plain, drafted] = outcomes.map(Option::unwrap_or_default);
    ensure!(plain.tokens == drafted.tokens, "answers with drafts are not those without");
    // The first round warmed both up.
    let [plain_time, drafted_time] = times.map(|times| median(&times[1..]));
    Ok(LookupRow::new(&drafted, plain_time, drafted_time))
}

//! folio beside other libraries: the same attention, on the same machine and cores, in turns. `scripts/compare.sh` builds and calls it.
//!
//! Every result is compared with the f64 oracle before it is timed. Of the ways that a library has to compute it, the fastest right one
//! takes part. Times are the wall clock, from the call until the result is there; a contiguous cache in the library's favourite layout is filled
//! before, as is folio's paged one.

mod contestant;
mod operands;
mod own;
mod report;
mod support;

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use folio::{Gpu, KvFormat};

use contestant::Contestant;
use operands::Operands;
use own::Own;
use report::{Entry, Report, Section};
use support::limits::{Loop, multiply_add_loop, read_loop};
use support::shape::{SHAPES, Shape};
use support::{adapter, timer};

/// Compares folio with other libraries
#[derive(Parser)]
struct Options {
    /// A contestant's command line
    #[arg(long = "contestant", value_name = "COMMAND")]
    contestants: Vec<String>,
    /// What takes no part, and why
    #[arg(long, value_name = "TEXT")]
    missing: Vec<String>,
    /// Shapes, of folio's own benchmark
    #[arg(long, value_delimiter = ',', default_value = "D1,D2,P1,P2")]
    shapes: Vec<String>,
    /// How K and V are stored
    #[arg(long, value_delimiter = ',', default_value = "f32,f16")]
    formats: Vec<KvFormat>,
    /// Samples of each contestant
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// What to say about the circumstances
    #[arg(long, default_value = "")]
    note: String,
    /// The command and the date that the table quotes
    #[arg(long, num_args = 2, value_names = ["COMMAND", "DATE"], default_values_t = [String::new(), String::new()])]
    provenance: Vec<String>,
    /// What `cargo bench --bench model` printed
    #[arg(long, value_name = "FILE")]
    model_table: Option<PathBuf>,
    /// Where the table goes, as Markdown
    #[arg(long)]
    markdown: Option<PathBuf>,
    /// A page in which the table takes the place of what is between its markers
    #[arg(long, value_name = "PAGE")]
    splice: Option<PathBuf>,
    /// Where all samples go, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Threads of some libraries wait actively after their work; OpenMP's for some milliseconds.
const PAUSE: Duration = Duration::from_millis(50);

/// Runs before a way of computing is judged: the first compiles and tunes, others still warm up.
const WARM_UP: usize = 2;
/// And runs by which the fastest way is found.
const TRIALS: usize = 3;

/// What runs in a round.
enum Runner<'a> {
    Own(&'a Own),
    Other(&'a mut Contestant, String),
}

struct Bench {
    timer: timer::Timer,
    /// The library's own, without panics.
    own_timer: folio::tune::Timer,
    multiply_adds: Loop,
    rounds: usize,
}

impl Bench {
    fn section(&self, shape: &Shape, format: KvFormat, contestants: &mut [Contestant]) -> Result<Section> {
        let folder = tempfile::tempdir()?;
        let operands = Operands::new(shape, format, folder.path())?;
        let own = Own::new(self.timer.gpu(), shape, format, &operands)?;
        let read = shape.is_decode().then(|| read_loop(&self.timer, &own.cache, shape.side_bytes(format)));
        let plain = read.as_ref().unwrap_or(&self.multiply_adds);
        let error = operands.max_error(&own.output(&self.own_timer)?);
        ensure!(error <= operands.tolerance(), "folio's own result for {} is off by {error}", shape.id);
        let mut section = Section::new(shape, format, operands.tolerance(), plain.name.clone());
        let mut runners = vec![Runner::Own(&own)];
        section.entries.push(Entry::new("folio", "paged, blocks of 16", error));
        for contestant in contestants {
            let name = contestant.name.clone();
            match choose(contestant, &operands, &folder.path().join("out"), &mut section.remarks) {
                Ok((way, error)) => {
                    section.entries.push(Entry::new(&name, &way, error));
                    runners.push(Runner::Other(contestant, way));
                }
                Err(reason) => section.remarks.push(format!("{name}: {reason:#}")),
            }
        }
        for round in 0..self.rounds {
            let count = runners.len();
            for i in 0..count {
                // Nobody comes always after the same neighbour.
                let at = (i + round) % count;
                sleep(PAUSE);
                let seconds = match &mut runners[at] {
                    Runner::Own(own) => own.time(&self.own_timer)?,
                    Runner::Other(contestant, way) => contestant.time(way).with_context(|| contestant.name.clone())?,
                };
                section.entries[at].seconds.push(seconds);
            }
            section.plain_rates.push(plain.work / plain.measure(&self.timer).wall.as_secs_f64());
        }
        Ok(section)
    }
}

/// Loads the operands, and finds the fastest of a contestant's ways whose result is right, and that result's error.
fn choose(
    contestant: &mut Contestant,
    operands: &Operands,
    out: &Path,
    remarks: &mut Vec<String>,
) -> Result<(String, f64)> {
    let mut best: Option<(f64, String, f64)> = None;
    for way in contestant.load(&operands.problem)? {
        let mut judge = || -> Result<(f64, f64)> {
            let error = operands.max_error(&contestant.output(&way, out)?);
            ensure!(error <= operands.tolerance(), "off by {error:.1e}, which is another computation");
            (0..WARM_UP).try_for_each(|_| contestant.time(&way).map(drop))?;
            let times = (0..TRIALS).map(|_| contestant.time(&way)).collect::<Result<Vec<_>>>()?;
            Ok((times.into_iter().fold(f64::INFINITY, f64::min), error))
        };
        match judge() {
            Ok((seconds, error)) => {
                if best.as_ref().is_none_or(|best| seconds < best.0) {
                    best = Some((seconds, way, error));
                }
            }
            Err(reason) => remarks.push(format!("{}, {way}: {reason:#}", contestant.name)),
        }
    }
    let (_, way, error) = best.context("no way gave a right result")?;
    Ok((way, error))
}

fn main() -> Result<()> {
    let options = Options::parse();
    let Some(gpu) = adapter::open() else { return Ok(()) };
    let [command, date] = <[String; 2]>::try_from(options.provenance).expect("two values");
    let mut report = Report::new(adapter::describe(&gpu), command, date, options.note);
    if let Some(path) = &options.model_table {
        report.models = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    }
    report.remarks.extend(options.missing.iter().map(|missing| format!("left out: {missing}")));
    let (bench, mut contestants) = prepare(&gpu, options.rounds, &options.contestants, &mut report)?;
    for id in &options.shapes {
        let known = || format!("shape {id}: known are {}", SHAPES.map(|shape| shape.id).join(", "));
        let shape = SHAPES.iter().find(|shape| shape.id == *id).with_context(known)?;
        for &format in &options.formats {
            let section = bench.section(shape, format, &mut contestants);
            let section = section.with_context(|| format!("{id}, {format}"))?;
            println!("{}", section.print());
            report.sections.push(section);
        }
    }
    report.finish();
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{:#}\n", report.json())).with_context(|| path.display().to_string())?;
    }
    let table = report.markdown();
    println!("{table}");
    if let Some(path) = &options.markdown {
        std::fs::write(path, &table).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &options.splice {
        splice(path, &table).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The lines between which a page has the table.
const MARKERS: [&str; 2] = ["<!-- written by scripts/compare.sh -->\n", "<!-- end -->\n"];

fn splice(path: &Path, table: &str) -> Result<()> {
    let page = std::fs::read_to_string(path)?;
    let (head, rest) = page.split_once(MARKERS[0]).with_context(|| format!("no line {:?}", MARKERS[0]))?;
    let (_, tail) = rest.split_once(MARKERS[1]).with_context(|| format!("no line {:?} after it", MARKERS[1]))?;
    Ok(std::fs::write(path, [head, MARKERS[0], "\n", table, "\n", MARKERS[1], tail].concat())?)
}

/// Starts what can be started; the report says what can't.
fn prepare(gpu: &Gpu, rounds: usize, commands: &[String], report: &mut Report) -> Result<(Bench, Vec<Contestant>)> {
    let mut contestants = Vec::new();
    for command in commands {
        match Contestant::start(command) {
            Ok(contestant) => {
                report.contestants.push((contestant.name.clone(), contestant.about.clone()));
                contestants.push(contestant);
            }
            Err(reason) => report.remarks.push(format!("left out: `{command}`: {reason:#}")),
        }
    }
    let mut timer = timer::Timer::new(gpu);
    let multiply_adds = multiply_add_loop(&mut timer);
    Ok((Bench { timer, own_timer: folio::tune::Timer::new(gpu)?, multiply_adds, rounds }, contestants))
}

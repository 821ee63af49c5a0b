//! Contestants that take turns on one adapter: whatever else slows the machine down meets all alike, so their ratios can be believed.

use std::time::Duration;

use criterion::{Criterion, SamplingMode};

use super::timer::{Sample, Timer, median};

/// The median holds as long as fewer than half of the rounds are disturbed: 7 of these. With `--quick` criterion is content with 1 to 3.
const MIN_ROUNDS: usize = 15;

/// One line of a race's table.
pub(crate) struct Contestant {
    name: String,
    /// Bytes of one run.
    bytes: f64,
    run: Box<dyn Fn(&Timer) -> Sample>,
    samples: Vec<Sample>,
}

impl Contestant {
    pub(crate) fn new(name: impl ToString, bytes: u64, run: impl Fn(&Timer) -> Sample + 'static) -> Self {
        Self { name: name.to_string(), bytes: bytes as f64, run: Box::new(run), samples: Vec::new() }
    }

    fn median(&self) -> f64 {
        median(&self.samples, Sample::time)
    }
}

/// A finished race.
pub(crate) struct Race {
    title: String,
    contestants: Vec<Contestant>,
    /// Index of the contestant that the others are compared with.
    baseline: usize,
}

impl Race {
    /// Runs rounds as criterion asks for them; one iteration is a run of each contestant. `None` if the command line leaves it out.
    pub(crate) fn run(
        criterion: &mut Criterion,
        timer: &Timer,
        id: &str,
        title: String,
        baseline: usize,
        prepare: impl Fn() -> Vec<Contestant>,
    ) -> Option<Self> {
        let mut contestants = Vec::new();
        let mut rounds = 0;
        let mut round = |contestants: &mut Vec<Contestant>| {
            // Nobody comes always after the same neighbour.
            let count = contestants.len();
            let times = (0..count).map(|i| {
                let contestant = &mut contestants[(i + rounds) % count];
                let sample = (contestant.run)(timer);
                contestant.samples.push(sample);
                sample.time()
            });
            let total: Duration = times.sum();
            rounds += 1;
            total
        };
        let mut group = criterion.benchmark_group("race");
        group.sampling_mode(SamplingMode::Flat).sample_size(20);
        group.bench_function(id, |bencher| {
            if contestants.is_empty() {
                contestants = prepare();
                // The driver's compiler runs at the first dispatch.
                for contestant in &contestants {
                    (contestant.run)(timer);
                }
            }
            bencher.iter_custom(|iterations| (0..iterations).map(|_| round(&mut contestants)).sum());
        });
        group.finish();
        // Criterion stops as soon as it has seen enough of the sum; the medians need more.
        while contestants.first().is_some_and(|contestant| contestant.samples.len() < MIN_ROUNDS) {
            round(&mut contestants);
        }
        (!contestants.is_empty()).then_some(Self { title, contestants, baseline })
    }

    pub(crate) fn print(&self) {
        let baseline = &self.contestants[self.baseline];
        println!("\n{}; {} rounds", self.title, baseline.samples.len());
        println!("{:<30} {:>10} {:>10} {:>12}", "", "time ms", "GB/s", format!("of {}", baseline.name));
        for contestant in &self.contestants {
            let time = contestant.median();
            println!(
                "{:<30} {:>10.3} {:>10.1} {:>12.3}",
                contestant.name,
                time * 1e3,
                contestant.bytes / time / 1e9,
                time / baseline.median()
            );
        }
    }
}

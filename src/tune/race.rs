//! Contestants that take turns on one adapter.

use std::time::Instant;

use crate::error::Result;
use crate::gpu::Gpu;
use crate::measure::{Sample, Timer, median};

/// Records one run into a pass.
pub(crate) type Run = Box<dyn Fn(&mut wgpu::ComputePass<'_>) -> Result<()>>;

/// Rounds of a race. A candidate that is no better wins 12 of 15 against the default by chance in 2 of 100 races.
const ROUNDS: usize = 15;
/// Rounds before anybody may win, and the part of them that a winner is ahead of the default in. (Two runs of the same kernel were seen to differ
/// by 15 % in their medians on a shared machine: medians alone decide nothing.)
const MIN_ROUNDS: usize = 5;
const MIN_WINS: f64 = 0.8;
/// A winner takes at most this part of the default's time, in the median over the rounds: less is not worth a pipeline of its own.
const MIN_GAIN: f64 = 0.97;
/// Rounds after which those that are far behind leave, so that the others run more often, and how far that is.
const FIRST_ROUNDS: usize = 3;
const FAR_BEHIND: f64 = 1.25;

struct Contestant {
    run: Run,
    samples: Vec<Sample>,
    is_out: bool,
}

impl Contestant {
    fn median(&self) -> f64 {
        median(&self.samples, Sample::time)
    }
}

/// A race in preparation.
pub(crate) struct Race {
    timer: Timer,
    contestants: Vec<Contestant>,
}

impl Race {
    pub(crate) fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self { timer: Timer::new(gpu)?, contestants: Vec::new() })
    }

    pub(crate) fn enter(&mut self, run: Run) {
        self.contestants.push(Contestant { run, samples: Vec::new(), is_out: false });
    }

    /// Runs rounds until there are enough or the deadline is over, but at least one. The first contestant, which the others are compared with,
    /// never leaves early.
    pub(crate) fn run(mut self, deadline: Instant) -> Result<Outcome> {
        let Some(first) = self.contestants.first() else { return Ok(Outcome::default()) };
        self.timer.check_timestamps(&first.run)?;
        for contestant in &self.contestants {
            // The driver's compiler runs at the first dispatch.
            self.timer.measure(&contestant.run)?;
        }
        let count = self.contestants.len();
        for round in 0..ROUNDS {
            for i in 0..count {
                // Nobody comes always after the same neighbour.
                let contestant = &mut self.contestants[(i + round) % count];
                if !contestant.is_out {
                    let sample = self.timer.measure(&contestant.run)?;
                    contestant.samples.push(sample);
                }
            }
            if round + 1 == FIRST_ROUNDS {
                let best = self.contestants.iter().map(Contestant::median).fold(f64::INFINITY, f64::min);
                for contestant in &mut self.contestants[1..] {
                    contestant.is_out = contestant.median() > FAR_BEHIND * best;
                }
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Ok(Outcome::of(&self.contestants))
    }
}

/// The outcome of a race.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Seconds of each contestant, in the order of entry.
    pub(crate) medians: Vec<f64>,
    /// The best: the first unless another one is clearly ahead of it.
    pub(crate) best: usize,
    /// The part of the first one's time that the best takes: the median over the rounds.
    pub(crate) ratio: f64,
}

impl Outcome {
    fn of(contestants: &[Contestant]) -> Self {
        let (mut best, mut ratio) = (0, 1.0);
        for (i, contestant) in contestants.iter().enumerate().skip(1) {
            // Rounds in which both ran are the first ones of both.
            let pairs = contestant.samples.iter().zip(&contestants[0].samples);
            let mut ratios: Vec<f64> =
                pairs.map(|(own, first)| own.time().as_secs_f64() / first.time().as_secs_f64()).collect();
            ratios.sort_by(f64::total_cmp);
            let wins = ratios.iter().filter(|&&ratio| ratio < 1.0).count() as f64;
            let is_ahead = ratios.len() >= MIN_ROUNDS && wins >= MIN_WINS * ratios.len() as f64;
            let own = ratios.get(ratios.len() / 2).copied().unwrap_or(f64::INFINITY);
            if is_ahead && own < MIN_GAIN && own < ratio {
                (best, ratio) = (i, own);
            }
        }
        Self { medians: contestants.iter().map(Contestant::median).collect(), best, ratio }
    }
}

//! The figures: on the screen, and as JSON.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use folio::schedule::{Demand, Memory, RequestId, Scheduler, SchedulerConfig};
use serde::Serialize;

use super::run::Outcome;

/// Of [`Report`]: rises when a field changes its meaning or goes.
const VERSION: u32 = 1;

#[derive(Serialize)]
pub(super) struct Report {
    version: u32,
    adapter: String,
    model: String,
    weights: String,
    pub(super) batching: Vec<BatchingRow>,
    pub(super) lookup: Option<LookupRow>,
    pub(super) scheduler: Option<SchedulerRow>,
}

/// Tokens per second each way, medians; times in milliseconds of the continuous way.
#[derive(Serialize)]
pub(super) struct BatchingRow {
    requests: u32,
    new_tokens: usize,
    one_by_one: f64,
    fixed_batches: f64,
    continuous: f64,
    exact_continuous: Option<f64>,
    first_token_p50: f64,
    first_token_p99: f64,
    gap_p50: f64,
    gap_p99: f64,
    schedule_p99: f64,
}

#[derive(Serialize)]
pub(super) struct LookupRow {
    new_tokens: usize,
    drafted: u32,
    accepted: u32,
    plain_seconds: f64,
    drafted_seconds: f64,
}

#[derive(Serialize)]
pub(super) struct SchedulerRow {
    requests: u32,
    median_micros: f64,
    p99_micros: f64,
}

/// The middle one; 0 of none.
pub(super) fn median(values: &[Duration]) -> Duration {
    quantile(values, 0.5)
}

fn quantile(values: &[Duration], share: f64) -> Duration {
    let mut values = values.to_vec();
    values.sort_unstable();
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Report {
    pub(super) fn new(adapter: String, model: String, weights: String) -> Self {
        Self { version: VERSION, adapter, model, weights, batching: Vec::new(), lookup: None, scheduler: None }
    }

    pub(super) fn print_head(&self) {
        println!("{}, {} with weights in {}\n", self.adapter, self.model, self.weights);
        println!(
            "requests   tokens   one by one   fixed batches   continuous           first token p50 / p99     gap p50 / p99"
        );
    }
}

impl BatchingRow {
    /// `outcomes`: one by one, in fixed batches, continuous, and continuous with an exact model.
    pub(super) fn new(requests: u32, outcomes: &[Vec<Outcome>; 4]) -> Result<Self> {
        let rate = |outcomes: &[Outcome]| {
            let times: Vec<_> = outcomes.iter().map(|outcome| outcome.time).collect();
            let tokens = outcomes.first()?.num_tokens();
            Some(tokens as f64 / median(&times).as_secs_f64())
        };
        let missing = || anyhow!("no outcome");
        let [one, fixed, continuous, exact] = outcomes;
        let all =
            |times: fn(&Outcome) -> &Vec<Duration>| continuous.iter().flat_map(times).copied().collect::<Vec<_>>();
        let (first, gaps, schedule) = (all(|o| &o.first_token), all(|o| &o.gaps), all(|o| &o.schedule));
        Ok(Self {
            requests,
            new_tokens: continuous.first().ok_or_else(missing)?.num_tokens(),
            one_by_one: rate(one).ok_or_else(missing)?,
            fixed_batches: rate(fixed).ok_or_else(missing)?,
            continuous: rate(continuous).ok_or_else(missing)?,
            exact_continuous: rate(exact),
            first_token_p50: milliseconds(quantile(&first, 0.5)),
            first_token_p99: milliseconds(quantile(&first, 0.99)),
            gap_p50: milliseconds(quantile(&gaps, 0.5)),
            gap_p99: milliseconds(quantile(&gaps, 0.99)),
            schedule_p99: milliseconds(quantile(&schedule, 0.99)),
        })
    }

    pub(super) fn print(&self) {
        println!(
            "{:8} {:8} {:8.0} t/s {:11.0} t/s {:8.0} t/s ({:4.2}x, {:4.2}x) {:9.0} / {:6.0} ms {:9.1} / {:6.1} ms",
            self.requests,
            self.new_tokens,
            self.one_by_one,
            self.fixed_batches,
            self.continuous,
            self.continuous / self.one_by_one,
            self.continuous / self.fixed_batches,
            self.first_token_p50,
            self.first_token_p99,
            self.gap_p50,
            self.gap_p99,
        );
        if let Some(exact) = self.exact_continuous {
            println!("         exact: {exact:.0} t/s, {:.2} of that", exact / self.continuous);
        }
    }
}

impl LookupRow {
    pub(super) fn new(drafted: &Outcome, plain_time: Duration, drafted_time: Duration) -> Self {
        Self {
            new_tokens: drafted.num_tokens(),
            drafted: drafted.drafted,
            accepted: drafted.accepted,
            plain_seconds: plain_time.as_secs_f64(),
            drafted_seconds: drafted_time.as_secs_f64(),
        }
    }

    pub(super) fn print(&self) {
        println!(
            "\nquestions with prompt lookup: {} tokens in {:.2} s, without {:.2} s ({:.2}x); {} of {} drafts were right",
            self.new_tokens,
            self.drafted_seconds,
            self.plain_seconds,
            self.plain_seconds / self.drafted_seconds,
            self.accepted,
            self.drafted
        );
    }
}

/// A cache that never fills up.
struct Endless;

impl Memory for Endless {
    fn free_blocks(&self) -> u32 {
        1 << 20
    }

    fn exclusive_blocks(&self, _: RequestId) -> u32 {
        1
    }
}

impl SchedulerRow {
    /// Steps in which all requests decode.
    pub(super) fn measure(requests: u32) -> Result<Self> {
        let mut config = SchedulerConfig::new(1 << 20, 16);
        config.max_running = requests;
        config.max_queued = requests;
        let mut scheduler = Scheduler::new(config)?;
        let ids = (0..requests).map(|_| Ok(scheduler.submit(Duration::ZERO, Demand::new(20, 1000))?));
        let ids = ids.collect::<Result<Vec<_>>>()?;
        let mut times = Vec::new();
        for tick in 1..=500 {
            let start = Instant::now();
            let schedule = scheduler.next_step(Duration::from_millis(tick), &Endless);
            times.push(start.elapsed());
            for chunk in schedule.chunks {
                let cached = scheduler.progress(chunk.request).map_or(0, |(_, cached)| cached) + chunk.tokens;
                scheduler.set_cached(chunk.request, cached);
                if chunk.samples {
                    scheduler.push_token(chunk.request);
                }
            }
        }
        drop(ids);
        let micros = |share| quantile(&times, share).as_secs_f64() * 1e6;
        Ok(Self { requests, median_micros: micros(0.5), p99_micros: micros(0.99) })
    }

    pub(super) fn print(&self) {
        println!(
            "scheduler, {} requests: {:.0} us a step, p99 {:.0} us",
            self.requests, self.median_micros, self.p99_micros
        );
    }
}

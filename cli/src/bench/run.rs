//! Running a workload in one way, with a clock.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use folio::engine::{Answer, EndReason, Engine, Event};

use super::workload::Workload;

/// Who may run beside whom.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    /// Nobody: each request waits for the end of the one before.
    OneByOne,
    /// Requests wait until a batch of so many has come, or all have; nobody joins before all of a batch have ended. As in most loops around a
    /// model, a text that has its tokens is computed on, for nothing, until the longest one has.
    Fixed(u32),
    /// Each joins when it comes.
    Continuous,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// Of each request.
    pub(super) tokens: Vec<Vec<u32>>,
    /// From the first arrival to the last token.
    pub(super) time: Duration,
    /// From its arrival to its first token, for each request.
    pub(super) first_token: Vec<Duration>,
    /// Between tokens of a request.
    pub(super) gaps: Vec<Duration>,
    /// What the scheduler took, for each step.
    pub(super) schedule: Vec<Duration>,
    pub(super) drafted: u32,
    pub(super) accepted: u32,
}

impl Outcome {
    pub(super) fn num_tokens(&self) -> usize {
        self.tokens.iter().map(Vec::len).sum()
    }
}

/// An answer that has begun.
struct Running {
    request: usize,
    answer: Answer,
    last_token: Option<Instant>,
}

/// Runs a workload whose requests arrive within `span`.
pub(super) fn run(engine: &mut Engine, workload: &Workload, way: Way, span: Duration) -> Result<Outcome> {
    let wanted = &workload.requests;
    let gpu = engine.gpu().clone();
    let mut outcome = Outcome { tokens: vec![Vec::new(); wanted.len()], ..Outcome::default() };
    let mut running: Vec<Running> = Vec::new();
    let start = Instant::now();
    let arrival = |request: usize| start + span.mul_f64(wanted[request].arrival);
    let mut next = 0;
    while next < wanted.len() || !running.is_empty() {
        let arrived = next + (next..wanted.len()).take_while(|&request| arrival(request) <= Instant::now()).count();
        let starts = match way {
            Way::OneByOne if running.is_empty() => arrived.min(next + 1),
            Way::Fixed(size) if running.is_empty() => {
                let full = (next + size as usize).min(wanted.len());
                if arrived >= full { full } else { next }
            }
            Way::Continuous => arrived,
            _ => next,
        };
        let longest = wanted[next..starts].iter().map(|wanted| wanted.new_tokens).max().unwrap_or(0);
        for (i, wanted) in wanted.iter().enumerate().take(starts).skip(next) {
            let mut request = wanted.request();
            if matches!(way, Way::Fixed(_)) {
                request.max_tokens = longest;
            }
            let answer = engine.submit(request)?;
            running.push(Running { request: i, answer, last_token: None });
        }
        next = starts;
        if running.is_empty() {
            // Nobody is there yet.
            let due = match way {
                Way::Fixed(size) => arrival((next + size as usize).min(wanted.len()) - 1),
                _ => arrival(next),
            };
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            continue;
        }
        let report = gpu.block_on(engine.step())?;
        outcome.schedule.push(report.schedule_time);
        let now = Instant::now();
        let mut ended = Vec::new();
        for (i, running) in running.iter_mut().enumerate() {
            while let Some(event) = running.answer.try_next() {
                match event {
                    Event::Token { token, .. }
                        if outcome.tokens[running.request].len() < wanted[running.request].new_tokens as usize =>
                    {
                        match running.last_token.replace(now) {
                            None => outcome.first_token.push(now - arrival(running.request)),
                            Some(last) => outcome.gaps.push(now - last),
                        }
                        outcome.tokens[running.request].push(token);
                    }
                    Event::End { reason: EndReason::Failed(failure), .. } => {
                        bail!("a request failed: {}", failure.message)
                    }
                    Event::End { usage, .. } => {
                        outcome.drafted += usage.drafted_tokens;
                        outcome.accepted += usage.accepted_tokens;
                        ended.push(i);
                    }
                    _ => {}
                }
            }
        }
        ended.into_iter().rev().for_each(|i| drop(running.swap_remove(i)));
        outcome.time = now - start;
    }
    Ok(outcome)
}

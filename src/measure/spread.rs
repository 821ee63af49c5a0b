//! [`Spread`]: a median and how far it can be trusted; [`interleave`]: how samples are taken.

use std::time::Duration;

use serde::Serialize;

/// What a number of samples say: their median, and the quartiles around it. In seconds where it is a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Spread {
    /// The middle one. It holds as long as fewer than half of the rounds were disturbed.
    pub median: f64,
    /// A quarter of the samples are below.
    pub low: f64,
    /// A quarter of the samples are above.
    pub high: f64,
    /// How many samples there were.
    pub rounds: u32,
}

impl Spread {
    /// Of samples in any order; not-a-number if there are none.
    #[must_use]
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        // Between two samples, a quantile is on the line between them.
        let quantile = |share: f64| {
            let place = share * sorted.len().saturating_sub(1) as f64;
            let at = |i: f64| sorted.get(i as usize).copied().unwrap_or(f64::NAN);
            at(place.floor()) + (at(place.ceil()) - at(place.floor())) * place.fract()
        };
        Self { median: quantile(0.5), low: quantile(0.25), high: quantile(0.75), rounds: sorted.len() as u32 }
    }

    /// Every number times `factor`, for a time that stands for several of the same kind.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        Self { median: self.median * factor, low: self.low * factor, high: self.high * factor, ..self }
    }

    /// `amount` per each of these times: a rate, whose low end is that of the longest time.
    #[must_use]
    pub fn rate(self, amount: f64) -> Self {
        Self { median: amount / self.median, low: amount / self.high, high: amount / self.low, ..self }
    }
}

/// How often contestants take turns. A number stands for exactly so many rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounds {
    /// At least so many.
    pub least: usize,
    /// At most so many.
    pub most: usize,
    /// More than `least` only while all that was timed is less than this: short runs need more rounds, and long ones take more time.
    pub budget: Duration,
}

impl From<usize> for Rounds {
    fn from(rounds: usize) -> Self {
        Self { least: rounds, most: rounds, budget: Duration::ZERO }
    }
}

/// Runs contestants in turns, after a run of each that doesn't count, in which drivers compile. `contestant(i)` runs the `i`-th of
/// `count` once and says how long it took. Nobody comes always after the same neighbour.
///
/// # Errors
/// The first that a contestant returns.
pub fn interleave<E>(
    count: usize,
    rounds: impl Into<Rounds>,
    mut contestant: impl FnMut(usize) -> Result<Duration, E>,
) -> Result<Vec<Spread>, E> {
    let Rounds { least, most, budget } = rounds.into();
    let mut samples = vec![Vec::new(); count];
    for i in 0..count {
        contestant(i)?;
    }
    let mut spent = Duration::ZERO;
    for round in 0..most {
        if round >= least && spent >= budget {
            break;
        }
        for i in 0..count {
            let i = (i + round) % count;
            let time = contestant(i)?;
            spent = spent.saturating_add(time);
            samples[i].push(time.as_secs_f64());
        }
    }
    Ok(samples.into_iter().map(Spread::of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_on_lines_between_samples() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]);
        assert_eq!((spread.median, spread.low, spread.high, spread.rounds), (2.5, 1.75, 3.25, 4));
        assert_eq!(Spread::of([7.0]), Spread { median: 7.0, low: 7.0, high: 7.0, rounds: 1 });
        assert!(Spread::of([]).median.is_nan());
        let rate = spread.rate(7.0);
        assert_eq!((rate.median, rate.low, rate.high), (2.8, 7.0 / 3.25, 4.0));
    }

    #[test]
    fn contestants_take_turns() {
        let mut order = Vec::new();
        let spreads = interleave(3, 3, |i| {
            order.push(i);
            Ok::<_, ()>(Duration::from_secs(i as u64))
        });
        assert_eq!(order, [0, 1, 2, 0, 1, 2, 1, 2, 0, 2, 0, 1]);
        assert_eq!(
            spreads.map(|all| all.iter().map(|s| (s.median, s.rounds)).collect()),
            Ok(vec![(0.0, 3), (1.0, 3), (2.0, 3)])
        );
        assert_eq!(interleave(2, 2, |i| if i == 1 { Err(i) } else { Ok(Duration::ZERO) }), Err(1));
        assert_eq!(interleave(0, 2, |_| Ok::<_, ()>(Duration::ZERO)), Ok(Vec::new()));
    }

    #[test]
    fn short_runs_have_more_rounds() {
        let rounds = Rounds { least: 3, most: 20, budget: Duration::from_secs(10) };
        let of = |seconds| {
            let spreads = interleave(2, rounds, |_| Ok::<_, ()>(Duration::from_secs(seconds)));
            spreads.map(|all| all.iter().map(|spread| spread.rounds).collect::<Vec<_>>())
        };
        assert_eq!((of(100), of(1), of(0)), (Ok(vec![3, 3]), Ok(vec![5, 5]), Ok(vec![20, 20])));
    }
}

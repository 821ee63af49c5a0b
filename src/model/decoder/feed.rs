//! A batch cut into steps.

use std::borrow::Cow;

use super::input::Input;
use crate::{QueryKernel, SequenceId};

/// What one sequence of a batch is fed.
pub(super) struct Feed<'a> {
    pub(super) sequence: SequenceId,
    /// The pending token and the new ones.
    pub(super) tokens: Cow<'a, [u32]>,
    /// Tokens of the sequence before.
    pub(super) len: u32,
    /// How many of the tokens were found in the prefix index.
    pub(super) found: usize,
    /// How many of the tokens are in the cache.
    pub(super) done: usize,
    /// The tokens from here on have rows of the head.
    pub(super) wanted_from: usize,
    /// How these are drawn; `None`: the rows themselves are wanted.
    pub(super) draw: Option<Input<'a>>,
    /// The tokens that were given rather than sampled: in an exact model a kernel of their own computes them.
    pub(super) given: std::ops::Range<usize>,
}

/// Part of a feed that goes through the layers in one step.
pub(super) struct Chunk<'a> {
    /// Which feed.
    pub(super) input: usize,
    pub(super) sequence: SequenceId,
    pub(super) tokens: &'a [u32],
    /// The position of the first token.
    pub(super) position: u32,
    /// How many of the last tokens have rows of the head.
    pub(super) rows: usize,
    /// The feed's tokens up to the last one here.
    pub(super) fed: &'a [u32],
    /// How rows are drawn, and which draw of the feed the first one is.
    pub(super) draw: Option<(Input<'a>, usize)>,
    /// In an exact model.
    pub(super) kernel: QueryKernel,
}

impl Feed<'_> {
    /// Rows of the head among `take` tokens after those that are done.
    fn rows(&self, take: usize) -> usize {
        (self.done + take).saturating_sub(self.wanted_from.max(self.done))
    }

    /// Up to where one kernel computes the tokens, and which.
    fn kernel(&self) -> (usize, QueryKernel) {
        let given = &self.given;
        if self.done < given.start {
            (given.start, QueryKernel::Decode)
        } else if self.done < given.end {
            (given.end, QueryKernel::Prefill)
        } else {
            (self.tokens.len(), QueryKernel::Decode)
        }
    }
}

/// What limits a step.
#[derive(Clone, Copy)]
pub(super) struct StepLimits {
    /// Tokens that go through the layers.
    pub(super) tokens: usize,
    /// Rows that go through the head.
    pub(super) rows: usize,
    /// Whether given and sampled tokens keep to their kernels.
    pub(super) exact: bool,
}

/// The next step's share of a batch, in the order of the inputs.
pub(super) fn next_chunks<'a>(feeds: &'a [Feed<'a>], limits: StepLimits) -> Vec<Chunk<'a>> {
    let StepLimits { tokens: mut tokens_left, rows: mut rows_left, exact } = limits;
    let mut chunks = Vec::new();
    for (input, feed) in feeds.iter().enumerate() {
        let (end, kernel) = if exact { feed.kernel() } else { (feed.tokens.len(), QueryKernel::Fastest) };
        if feed.done == feed.tokens.len() {
            continue;
        }
        let mut take = (end - feed.done).min(tokens_left);
        // Tokens whose rows find no room wait for the next step.
        take -= feed.rows(take).saturating_sub(rows_left);
        if take == 0 {
            break;
        }
        let rows = feed.rows(take);
        let (begin, end) = (feed.done, feed.done + take);
        tokens_left -= take;
        rows_left -= rows;
        chunks.push(Chunk {
            input,
            sequence: feed.sequence,
            tokens: &feed.tokens[begin..end],
            position: feed.len + begin as u32,
            rows,
            fed: &feed.tokens[..end],
            draw: feed.draw.filter(|_| rows > 0).map(|draw| (draw, end - rows - feed.wanted_from)),
            kernel,
        });
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Sampling;

    /// Whatever the limits are: every token goes through the layers once and in order, every wanted row through the head once, and in an exact
    /// model no chunk has tokens of both kinds.
    #[test]
    fn a_batch_is_cut_without_loss() {
        let mut rng = fastrand::Rng::with_seed(5);
        let sampling = Sampling::greedy();
        for _ in 0..2000 {
            let mut feeds: Vec<_> = (0..rng.u64(1..4))
                .map(|i| {
                    let tokens: Vec<u32> = (0..rng.u32(1..20)).collect();
                    let len = tokens.len();
                    let given = rng.usize(0..2).min(len);
                    let draws = rng.usize(0..=len);
                    let sequence = SequenceId::first();
                    let draw = Input::new(sequence, &[]).with_sampling(&sampling);
                    Feed {
                        sequence,
                        tokens: Cow::Owned(tokens),
                        len: 10 * i as u32,
                        found: 0,
                        done: 0,
                        wanted_from: len - draws,
                        draw: (draws > 0).then_some(draw),
                        given: given..rng.usize(given..=len),
                    }
                })
                .collect();
            let limits = StepLimits { tokens: rng.usize(1..30), rows: rng.usize(1..20), exact: rng.bool() };
            let mut rows = vec![Vec::new(); feeds.len()];
            loop {
                let mut done = Vec::new();
                let (mut num_tokens, mut num_rows) = (0, 0);
                for chunk in next_chunks(&feeds, limits) {
                    let feed = &feeds[chunk.input];
                    let range = feed.done..feed.done + chunk.tokens.len();
                    assert_eq!(chunk.tokens, &feed.tokens[range.clone()]);
                    assert_eq!((chunk.position, chunk.fed.len()), (feed.len + range.start as u32, range.end));
                    if limits.exact {
                        let is_given = |i| feed.given.contains(&i);
                        let want = if is_given(range.start) { QueryKernel::Prefill } else { QueryKernel::Decode };
                        assert!(range.clone().all(|i| is_given(i) == is_given(range.start)));
                        assert_eq!(chunk.kernel, want);
                    }
                    let first = range.end - chunk.rows;
                    if let Some((_, draw)) = chunk.draw {
                        assert_eq!(draw, first - feed.wanted_from);
                    }
                    rows[chunk.input].extend(first..range.end);
                    (num_tokens, num_rows) = (num_tokens + range.len(), num_rows + chunk.rows);
                    done.push((chunk.input, range.len()));
                }
                assert!(num_tokens <= limits.tokens && num_rows <= limits.rows);
                if done.is_empty() {
                    break;
                }
                done.into_iter().for_each(|(input, count)| feeds[input].done += count);
            }
            for (feed, rows) in feeds.iter().zip(rows) {
                assert_eq!(feed.done, feed.tokens.len());
                assert_eq!(rows, (feed.wanted_from..feed.tokens.len()).collect::<Vec<_>>());
            }
        }
    }
}

//! A batch cut into steps.

use std::borrow::Cow;

use super::input::Input;
use crate::{QueryKernel, SequenceId, TokenTree};

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
    /// How the tokens from `wanted_from` on branch, if they do. They go through the layers in one step, without those before.
    pub(super) tree: Option<TokenTree>,
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
    /// How the tokens branch, if they do.
    pub(super) tree: Option<&'a TokenTree>,
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

impl Chunk<'_> {
    /// The position of each token.
    pub(super) fn positions(&self) -> impl Iterator<Item = u32> {
        (0..self.tokens.len()).map(|token| self.position_of(token))
    }

    /// The position of one of the tokens.
    pub(super) fn position_of(&self, token: usize) -> u32 {
        let depth = self.tree.and_then(|tree| tree.depths().get(token).copied());
        self.position + depth.unwrap_or(token as u32)
    }

    /// The feed's tokens up to one of these, which comes last.
    pub(super) fn fed_to(&self, token: usize) -> Cow<'_, [u32]> {
        let before = self.fed.len() - self.tokens.len();
        match self.tree {
            None => Cow::Borrowed(&self.fed[..=before + token]),
            Some(tree) => {
                let path = tree.path_to(token as u32);
                let path = path.into_iter().map(|token| self.tokens[token as usize]);
                self.fed[..before].iter().copied().chain(path).collect()
            }
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
        let mut tree = feed.tree.as_ref();
        if tree.is_some() && feed.done < feed.wanted_from {
            (take, tree) = (take.min(feed.wanted_from - feed.done), None);
        } else if tree.is_some() && take < feed.tokens.len() - feed.done {
            take = 0;
        }
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
            tree,
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
        let mut trees = 0;
        let sampling = Sampling::greedy();
        for _ in 0..2000 {
            let mut feeds: Vec<_> = (0..rng.u64(1..4))
                .map(|i| {
                    let tokens: Vec<u32> = (0..rng.u32(1..20)).collect();
                    let len = tokens.len();
                    let given = rng.usize(0..2).min(len);
                    let draws = rng.usize(0..=len);
                    // The limits below have room for so many.
                    let star: Vec<_> = (0..draws).map(|i| (i > 0).then_some(0)).collect();
                    let tree = TokenTree::new(&star).ok().filter(|tree| (3..=5).contains(&draws) && !tree.is_line());
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
                        tree,
                        given: given..rng.usize(given..=len),
                    }
                })
                .collect();
            let exact = rng.bool() && feeds.iter().all(|feed| feed.tree.is_none());
            let least = if feeds.iter().any(|feed| feed.tree.is_some()) { 5 } else { 1 };
            let limits = StepLimits { tokens: rng.usize(least..30), rows: rng.usize(least..20), exact };
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
                    if let Some(tree) = chunk.tree {
                        trees += 1;
                        assert_eq!(
                            (chunk.rows, chunk.tokens.len(), tree.len() as usize),
                            (range.len(), range.len(), range.len())
                        );
                        assert_eq!(range, feed.wanted_from..feed.tokens.len());
                        let position = feed.len + feed.wanted_from as u32;
                        let of_leaves = chunk.positions().skip(1).all(|leaf| leaf == position + 1);
                        assert!(of_leaves && chunk.position_of(0) == position);
                        let (last, before) = (feed.tokens.last().copied(), &feed.tokens[..=feed.wanted_from]);
                        let want: Vec<u32> = before.iter().copied().chain(last).collect();
                        assert_eq!(*chunk.fed_to(range.len() - 1), want);
                    } else {
                        assert!(feed.tree.is_none() || range.end <= feed.wanted_from);
                        assert_eq!(*chunk.fed_to(range.len() - 1), feed.tokens[..range.end]);
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
        assert!(trees > 100, "{trees}");
    }
}

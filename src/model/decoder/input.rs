//! What a decoder's step is fed, and what it yields.

use crate::SequenceId;
use crate::model::sampler::Sampling;

/// New tokens of one sequence, and what is wanted after them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Input<'a> {
    /// The sequence that grows.
    pub sequence: SequenceId,
    /// What it grows by, after its [pending](super::Decoder::pending) token. None are needed if there is one.
    pub tokens: &'a [u32],
    /// How the token after these is chosen, which is pending then. `None`: it is not wanted, and the head is not computed.
    pub sampling: Option<&'a Sampling>,
    /// How many of the last [`tokens`](Self::tokens) are drafts: guesses at what will be sampled (speculative decoding, Leviathan et al. 2023,
    /// Chen et al. 2023). A token is sampled before each of them and after the last, as if they came one by one. Drafts that are not what
    /// was sampled are taken back.
    ///
    /// As a draw depends on the seed and the position only, the text is the one that single steps would give: no draft is accepted by chance.
    pub drafts: u32,
    /// How the drafts branch (token trees of SpecInfer, Miao et al. 2023; Medusa, Cai et al. 2024): for each the draft that it follows, an
    /// earlier one, or `None` if it follows the token before the drafts. Empty: each follows the one before it. The tokens after all drafts
    /// are sampled in one step; those that are right from the first on stay.
    ///
    /// Not for [exact](crate::model::ModelOptions::with_exact) models, unless the tree is a line: a draft's keys are added up in the order in which the
    /// tree stands in the cache, which is another one than that of single steps.
    pub parents: &'a [Option<u32>],
    /// How many of the tokens before the drafts were sampled in an earlier life of the sequence, and are computed again: the last so many. In
    /// [exact](crate::model::ModelOptions::with_exact) models they get the bits that they had as single tokens; elsewhere it changes nothing.
    pub replayed: u32,
    /// Log-probabilities of each sampled token, and of so many most probable ones beside it: [`Drawn::logprob`]. They cost a readback of a row of
    /// logits.
    pub logprobs: Option<u32>,
    /// For each token that is sampled (before the drafts, and after each of them) the set of those that it may be: a bit per token, lowest first,
    /// `vocab_size.div_ceil(32)` words. Empty: any.
    pub allowed: &'a [Vec<u32>],
}

impl<'a> Input<'a> {
    /// New tokens, after which nothing is wanted.
    #[must_use]
    pub const fn new(sequence: SequenceId, tokens: &'a [u32]) -> Self {
        Self { sequence, tokens, sampling: None, drafts: 0, parents: &[], replayed: 0, logprobs: None, allowed: &[] }
    }

    /// The same, and the token after them.
    #[must_use]
    pub const fn with_sampling(self, sampling: &'a Sampling) -> Self {
        Self { sampling: Some(sampling), ..self }
    }

    /// The same with the last `drafts` tokens as guesses.
    #[must_use]
    pub const fn with_drafts(self, drafts: u32) -> Self {
        Self { drafts, ..self }
    }

    /// The same with the last tokens as guesses that branch: as many as there are `parents`.
    #[must_use]
    pub const fn with_draft_tree(self, parents: &'a [Option<u32>]) -> Self {
        Self { drafts: parents.len() as u32, parents, ..self }
    }

    /// The same with `replayed` tokens that were sampled before.
    #[must_use]
    pub const fn with_replayed(self, replayed: u32) -> Self {
        Self { replayed, ..self }
    }

    /// The same with log-probabilities, `top` of the most probable tokens among them.
    #[must_use]
    pub const fn with_logprobs(self, top: u32) -> Self {
        Self { logprobs: Some(top), ..self }
    }

    /// The same with sets of the tokens that may be sampled.
    #[must_use]
    pub const fn with_allowed(self, allowed: &'a [Vec<u32>]) -> Self {
        Self { allowed, ..self }
    }

    /// Tokens that are sampled.
    pub(super) const fn draws(&self) -> usize {
        if self.sampling.is_some() { self.drafts as usize + 1 } else { 0 }
    }
}

/// Which rows of logits [`Decoder::logits`](super::Decoder::logits) returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// Those after each sequence's last token: `[vocab_size]`.
    Last,
    /// Those after every token that was fed, the pending one included: `[pending + tokens.len(), vocab_size]`.
    All,
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// How probable it was, if that was asked for.
    pub logprob: Option<TokenLogprob>,
}

/// How probable a token was: natural logarithms of the model's own distribution, the softmax of the logits before penalty, temperature, filters and
/// sets of allowed tokens. Computed on the host in f64.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TokenLogprob {
    /// The token's.
    pub logprob: f32,
    /// The most probable tokens and their log-probabilities, in falling order; of equal ones the lowest token first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprob {
    /// Of `token` in a row of logits without NaN, with `top` of the most probable ones.
    pub(super) fn of(logits: &[f32], token: u32, top: usize) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let log_sum = logits.iter().map(|&x| f64::from(x - max).exp()).sum::<f64>().ln();
        let logprob = |token: u32| (f64::from(logits[token as usize]) - f64::from(max) - log_sum) as f32;
        let order = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
        let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
        let top = top.min(tokens.len());
        if top > 0 && top < tokens.len() {
            tokens.select_nth_unstable_by(top - 1, order);
        }
        tokens.truncate(top);
        tokens.sort_unstable_by(order);
        Self { logprob: logprob(token), top: tokens.into_iter().map(|token| (token, logprob(token))).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits = [1.0, f32::NEG_INFINITY, 3.0, 1.0, -2.0];
        let sum: f64 = [1.0, 3.0, 1.0, -2.0_f64].iter().map(|x| x.exp()).sum();
        let want = |x: f64| (x - sum.ln()) as f32;
        let all = TokenLogprob::of(&logits, 3, 9);
        assert_eq!(all.top.iter().map(|top| top.0).collect::<Vec<_>>(), [2, 0, 3, 4, 1]);
        for (&(token, logprob), x) in all.top.iter().zip([3.0, 1.0, 1.0, -2.0, f64::NEG_INFINITY]) {
            assert!(logprob == want(x) || (logprob - want(x)).abs() < 1e-6, "{token}: {logprob}");
        }
        assert_eq!(all.logprob, all.top[2].1);
        assert_eq!(TokenLogprob::of(&logits, 0, 2).top, all.top[..2]);
        assert!(TokenLogprob::of(&logits, 0, 0).top.is_empty());
    }
}

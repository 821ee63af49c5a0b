//! Speculative decoding: who guesses the next tokens. The guesses are verified in the steps of the engine.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;

use super::drafts::DraftTree;
use crate::model::{Decoder, Input, ModelError, ModelResult, Sampling};
use crate::schedule::RequestId;
use crate::{ErrorKind, SequenceId};

/// A request that could use drafts.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Draftable<'a> {
    /// The request.
    pub request: RequestId,
    /// Its prompt, and what was sampled.
    pub text: &'a [u32],
    /// How its tokens are drawn. A proposer that draws with the same seed at the same position has the same noise, so a good model of the
    /// distribution makes good guesses at any temperature.
    pub sampling: &'a Sampling,
    /// Drafts one after another, at most; at least 1.
    pub max_drafts: u32,
    /// Drafts in all, at most, on all branches; at least `max_drafts`.
    pub max_nodes: u32,
}

/// What [`Proposer::propose`] returns: drafts for each request, in order.
pub type Proposals<'a> = Pin<Box<dyn Future<Output = ModelResult<Vec<DraftTree>>> + 'a>>;

/// Guesses how texts go on. What it guesses changes how fast tokens come, and never which. It can be sent to other threads wherever devices can: not
/// in browsers.
pub trait Proposer: fmt::Debug + wgpu::WasmNotSend {
    /// Drafts for each of these requests: none, a line of up to `max_drafts` (`Vec::into`), or a tree of up to `max_nodes`. Ids outside the vocabulary,
    /// what is too much, and with an exact model all but the first path are cut off. If it fails, there are no drafts in this step; a lost device ends
    /// the engine's step.
    fn propose<'a>(&'a mut self, requests: &'a [Draftable<'a>]) -> Proposals<'a>;

    /// A request has ended, and won't come again.
    fn forget(&mut self, request: RequestId) {
        let _ = request;
    }
}

/// Guesses that a text goes on as it did the first time that its last tokens occurred (prompt lookup decoding, Saxena 2023). It costs no
/// model, and is right where answers repeat what was said: questions about a text, summaries, code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PromptLookup {
    /// Tokens that have to be the same, at least. 1 guesses most and is wrong most.
    pub min_match: usize,
    /// Of several places the one with the longest match is taken, up to this many tokens; of these the first, which is in the text rather than in
    /// the question about it.
    pub max_match: usize,
    /// Continuations that are guessed at a time, at most, if they differ: those of the best places. Where one of them uses up all drafts there are no
    /// others. 1: a line.
    pub branches: usize,
}

impl Default for PromptLookup {
    /// 2 to 5 tokens, one continuation.
    fn default() -> Self {
        Self { min_match: 2, max_match: 5, branches: 1 }
    }
}

impl PromptLookup {
    /// What followed the last tokens of `text` where they occurred before.
    #[must_use]
    pub fn lookup(&self, text: &[u32], max_drafts: usize) -> Vec<u32> {
        let mut best = (0, 0);
        for end in 1..text.len() {
            let len = self.match_len(text, end);
            if len > best.0 {
                best = (len, end);
                if len == self.max_match {
                    break;
                }
            }
        }
        let (len, end) = best;
        if len < self.min_match.max(1) {
            return Vec::new();
        }
        repeated(text, end, max_drafts)
    }
}

/// A place of the text whose last tokens are those of the text: how many, and where it ends.
type Match = (usize, usize);

impl PromptLookup {
    /// What followed at the [best](Self::max_match) places, up to [`branches`](Self::branches) different continuations of up to `max_drafts` tokens
    /// each; no more than `max_nodes` drafts in all.
    #[must_use]
    pub fn lookup_tree(&self, text: &[u32], max_drafts: usize, max_nodes: usize) -> DraftTree {
        if self.branches <= 1 {
            return self.lookup(text, max_drafts.min(max_nodes)).into();
        }
        let mut matches: Vec<Match> = (1..text.len()).map(|end| (self.match_len(text, end), end)).collect();
        matches.retain(|&(len, _)| len >= self.min_match.max(1));
        matches.sort_by_key(|&(len, end)| (std::cmp::Reverse(len), end));
        let mut tree = DraftTree::default();
        let mut left = self.branches;
        for (_, end) in matches {
            if left == 0 || tree.len() >= max_nodes {
                break;
            }
            let added = tree.add_path(&repeated(text, end, max_drafts), max_nodes);
            left -= usize::from(added > 0);
        }
        tree
    }

    /// How many tokens before `end` are the last ones of the text.
    fn match_len(&self, text: &[u32], end: usize) -> usize {
        let equal = text[..end].iter().rev().zip(text.iter().rev()).take(self.max_match);
        equal.take_while(|(a, b)| a == b).count()
    }
}

/// What follows `end`. That may be the end of the text itself, which then repeats.
fn repeated(text: &[u32], end: usize, count: usize) -> Vec<u32> {
    let period = text.len() - end;
    (0..count).map(|i| text[end + i % period]).collect()
}

impl Proposer for PromptLookup {
    fn propose<'a>(&'a mut self, requests: &'a [Draftable<'a>]) -> Proposals<'a> {
        let drafts = requests
            .iter()
            .map(|request| self.lookup_tree(request.text, request.max_drafts as usize, request.max_nodes as usize));
        let drafts = drafts.collect();
        Box::pin(std::future::ready(Ok(drafts)))
    }
}

/// A smaller model with the same vocabulary, and a cache of its own: it computes each text along with the engine, and draws its drafts with the
/// request's own seed, so that they are right as often as the two models' distributions agree.
#[derive(Debug)]
pub struct DraftModel {
    decoder: Decoder,
    sequences: HashMap<RequestId, SequenceId>,
    alternatives: u32,
}

impl DraftModel {
    /// Takes a decoder, which must not have sequences of its own. Where its cache is full, requests go without drafts.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a decoder with sequences.
    pub fn new(decoder: Decoder) -> ModelResult<Self> {
        let sequences = decoder.usage().sequences;
        if sequences > 0 {
            let got = format!("{sequences} sequences");
            return Err(ModelError::argument("decoder", got, "one without sequences; free them first"));
        }
        Ok(Self { decoder, sequences: HashMap::new(), alternatives: 0 })
    }

    /// The same with other guesses beside each token that it draws: so many of the most probable ones, as far as there is room for more drafts.
    /// Nothing follows them, so what they add is a token more where a draft is wrong and one of them is right (the tree of Medusa, with a draft model's
    /// distribution in place of its heads). They cost a readback of a row of logits for each draft.
    #[must_use]
    pub fn with_alternatives(self, alternatives: u32) -> Self {
        Self { alternatives, ..self }
    }

    /// The decoder, to look into.
    #[must_use]
    pub const fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The request's sequence, cut back to what it has in common with the text. Returns it and the number of tokens that it has.
    fn sequence(&mut self, request: &Draftable<'_>) -> ModelResult<(SequenceId, usize)> {
        let sequence = match self.sequences.get(&request.request) {
            Some(&sequence) => sequence,
            None => {
                let sequence = self.decoder.create_sequence();
                self.sequences.insert(request.request, sequence);
                sequence
            }
        };
        self.decoder.discard_pending(sequence)?;
        let cached = self.decoder.tokens(sequence)?;
        let but_last = &request.text[..request.text.len().saturating_sub(1)];
        let common = cached.iter().zip(but_last).take_while(|(a, b)| a == b).count();
        let common = self.decoder.rewind(sequence, common as u32)?;
        Ok((sequence, common as usize))
    }

    async fn draft(&mut self, requests: &[Draftable<'_>]) -> ModelResult<Vec<DraftTree>> {
        let max_positions = self.decoder.max_len() as usize;
        let vocab = self.decoder.model().config().vocab_size;
        let mut drafts = vec![Vec::new(); requests.len()];
        // Beside each draft.
        let mut others: Vec<Vec<Vec<u32>>> = vec![Vec::new(); requests.len()];
        // Requests that still draft, with their sequences.
        let mut active = Vec::with_capacity(requests.len());
        for (i, request) in requests.iter().enumerate() {
            let known = request.text.iter().all(|&token| token < vocab);
            if known && request.text.len() < max_positions {
                let (sequence, common) = self.sequence(request)?;
                active.push((i, sequence, common));
            }
        }
        let mut is_first = true;
        while !active.is_empty() {
            let inputs: Vec<_> = active
                .iter()
                .map(|&(i, sequence, common)| {
                    let tokens = if is_first { &requests[i].text[common..] } else { &[] };
                    let mut input = Input::new(sequence, tokens).with_sampling(requests[i].sampling);
                    // The drawn one may be among them.
                    input.logprobs = (self.alternatives > 0).then_some(self.alternatives.saturating_add(1));
                    input
                })
                .collect();
            is_first = false;
            let sampled = self.decoder.draw(&inputs).await?;
            for (&(i, ..), drawn) in active.iter().zip(sampled) {
                for drawn in drawn {
                    drafts[i].push(drawn.token);
                    let top = drawn.logprob.into_iter().flat_map(|logprob| logprob.top).map(|(token, _)| token);
                    let top = top.filter(|&token| token != drawn.token).take(self.alternatives as usize);
                    others[i].push(top.collect());
                }
            }
            active.retain(|&(i, ..)| {
                let request = &requests[i];
                let len = drafts[i].len();
                len < request.max_drafts as usize && request.text.len() + len < max_positions
            });
        }
        let trees = drafts.into_iter().zip(others).zip(requests).map(|((drafts, others), request)| {
            let mut tree = DraftTree::from(drafts);
            for (i, others) in (0_u32..).zip(others) {
                let room = (request.max_nodes as usize).saturating_sub(tree.len());
                for token in others.into_iter().take(room) {
                    tree.add(i.checked_sub(1), token);
                }
            }
            tree
        });
        Ok(trees.collect())
    }
}

impl Proposer for DraftModel {
    fn propose<'a>(&'a mut self, requests: &'a [Draftable<'a>]) -> Proposals<'a> {
        Box::pin(async move {
            let result = self.draft(requests).await;
            if matches!(&result, Err(error) if error.kind() != ErrorKind::DeviceLost) {
                // Mostly for want of room: who comes next starts with all of it.
                let sequences: Vec<_> = self.sequences.drain().collect();
                sequences.into_iter().try_for_each(|(_, sequence)| self.decoder.free(sequence))?;
            }
            result
        })
    }

    fn forget(&mut self, request: RequestId) {
        if let Some(sequence) = self.sequences.remove(&request) {
            // It can only fail for a sequence that is gone.
            let _ = self.decoder.free(sequence);
        }
    }
}

/// How many drafts a request gets: as many as are likely to be right.
#[derive(Clone, Copy, Debug)]
pub(super) struct Depth {
    drafts: u32,
    /// Steps without drafts that are left, and how many there were the last time: twice as many after each vain attempt.
    pause: u32,
    last_pause: u32,
}

/// Drafts of a request that has had none.
const FIRST_DEPTH: u32 = 4;
/// Steps without drafts, at most, after vain ones.
const MAX_PAUSE: u32 = 16;

impl Depth {
    pub(super) const fn new() -> Self {
        Self { drafts: FIRST_DEPTH, pause: 0, last_pause: 0 }
    }

    /// Drafts for the next step.
    pub(super) fn next(&mut self, most: u32) -> u32 {
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        self.drafts.min(most)
    }

    /// Notes how many of a step's drafts were right: twice as many next time if all were, and one more than were right otherwise.
    pub(super) fn note(&mut self, drafts: u32, right: u32) {
        if drafts == 0 {
            return;
        }
        self.drafts = if right == drafts { self.drafts.max(right.saturating_mul(2)) } else { right + 1 };
        if right == 0 {
            self.last_pause = (self.last_pause * 2).clamp(1, MAX_PAUSE);
            self.pause = self.last_pause;
        } else {
            self.last_pause = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_lookup_continues_the_longest_and_first_match() {
        let lookup = PromptLookup::default();
        assert_eq!(lookup.lookup(&[1, 2, 3, 4, 9, 2, 3], 2), [4, 9]);
        // Three equal tokens win over two, though these are later.
        assert_eq!(lookup.lookup(&[1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], 1), [7]);
        // Of equal ones the first.
        assert_eq!(lookup.lookup(&[2, 3, 7, 2, 3, 8, 2, 3], 1), [7]);
        assert!(lookup.lookup(&[1, 2, 3, 9, 3], 4).is_empty(), "one token is too little");
        let eager = PromptLookup { min_match: 1, ..lookup };
        assert_eq!(eager.lookup(&[1, 2, 3, 9, 3], 4), [9, 3, 9, 3]);
        // A text that repeats goes on to do so.
        assert_eq!(lookup.lookup(&[5, 6, 5, 6, 5, 6], 5), [5, 6, 5, 6, 5]);
        for text in [&[][..], &[1], &[1, 2]] {
            assert!(lookup.lookup(text, 3).is_empty());
        }
        assert!(PromptLookup { min_match: 0, max_match: 0, branches: 1 }.lookup(&[1, 1, 1], 3).is_empty());
    }

    #[test]
    fn prompt_lookup_branches_where_places_differ() {
        let three = PromptLookup { branches: 3, ..PromptLookup::default() };
        // Three tokens are equal before 7, two before 4, before 5 and before the second 4.
        let text = [2, 3, 4, 0, 2, 3, 5, 0, 2, 3, 4, 6, 1, 2, 3, 7, 7, 1, 2, 3];
        let tree = three.lookup_tree(&text, 3, 16);
        let mut want = DraftTree::default();
        for path in [&[7, 7, 1][..], &[4, 0, 2], &[5, 0, 2]] {
            want.add_path(path, 16);
        }
        assert_eq!(tree, want);
        assert_eq!(three.lookup_tree(&text, 3, 4).tokens(), [7, 7, 1, 4]);
        assert_eq!(three.lookup_tree(&text, 9, 3), vec![7, 7, 1].into(), "the best one uses up all");
        let one = PromptLookup::default();
        assert_eq!(one.lookup_tree(&text, 4, 16), one.lookup(&text, 4).into());
        assert!(three.lookup_tree(&[1, 2, 3], 4, 16).is_empty() && three.lookup_tree(&[], 4, 16).is_empty());
        // Nothing is guessed twice.
        assert!(three.lookup_tree(&[5, 6, 5, 6, 5, 6], 5, 16).is_line());
    }

    #[test]
    fn depth_follows_success() {
        let mut depth = Depth::new();
        assert_eq!(depth.next(16), 4);
        depth.note(4, 4);
        assert_eq!((depth.next(16), depth.next(6)), (8, 6));
        depth.note(6, 6);
        assert_eq!(depth.next(16), 12);
        depth.note(12, 3);
        assert_eq!(depth.next(16), 4);
        // After vain attempts it pauses, longer and longer, and comes back with one.
        for pause in [1, 2, 4, 8, 16, 16] {
            depth.note(4, 0);
            for _ in 0..pause {
                assert_eq!(depth.next(16), 0);
            }
            assert_eq!(depth.next(16), 1);
        }
        depth.note(1, 1);
        assert_eq!(depth.next(16), 2);
        depth.note(0, 0);
        assert_eq!(depth.next(16), 2);
    }
}

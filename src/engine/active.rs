//! A request that has not ended, and what the scheduler asks about it.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures_channel::mpsc::UnboundedSender;

use super::beams::Beams;
use super::drafts::DraftTree;
use super::grammar::Constraint;
use super::propose::Depth;
use super::request::{EndReason, Event, Request, Usage};
use super::text::{AnswerText, Pushed};
use crate::model::{Decoder, Drawn, Sampling, TextStream};
use crate::schedule::{Memory, PrefixHit, RequestId};
use crate::{PrefixProbe, SequenceId};

/// A request in an engine.
#[derive(Debug)]
pub(super) struct Active {
    /// Where its tokens are; `None` while it waits.
    pub(super) sequence: Option<SequenceId>,
    /// Another answer to the same prompt, which was submitted together with this one, before it.
    pub(super) sibling: Option<RequestId>,
    /// The prompt, and what was sampled.
    pub(super) text: Vec<u32>,
    pub(super) sampling: Sampling,
    pub(super) stop_tokens: Vec<u32>,
    wanted_tokens: u32,
    pub(super) max_tokens: u32,
    priority: i32,
    pub(super) logprobs: Option<u32>,
    /// The texts of a beam search.
    pub(super) beams: Option<Beams>,
    /// How far the answer has come in its grammar.
    pub(super) constraint: Option<Constraint>,
    /// Guesses at what comes after the text, for the next step.
    pub(super) drafts: DraftTree,
    pub(super) depth: Depth,
    answer: AnswerText,
    events: UnboundedSender<Event>,
    submitted: Duration,
    pub(super) started: bool,
    pub(super) usage: Usage,
}

impl Active {
    /// `max_tokens` are those that the model has positions for.
    pub(super) fn new(
        request: Request,
        max_tokens: u32,
        stream: Option<TextStream>,
        constraint: Option<Constraint>,
        events: UnboundedSender<Event>,
        now: Duration,
    ) -> Self {
        let usage = Usage { prompt_tokens: request.prompt.len() as u32, ..Usage::default() };
        Self {
            sequence: None,
            sibling: None,
            text: request.prompt,
            sampling: request.sampling,
            stop_tokens: request.stop_tokens,
            wanted_tokens: request.max_tokens,
            max_tokens,
            priority: request.priority,
            logprobs: request.logprobs,
            beams: (request.beams > 1).then(|| Beams::new(request.beams)),
            constraint,
            drafts: DraftTree::default(),
            depth: Depth::new(),
            answer: AnswerText::new(stream, request.stop_strings),
            events,
            submitted: now,
            started: false,
            usage,
        }
    }

    /// Its sequences: one, or one per beam.
    pub(super) fn sequences(&self) -> impl Iterator<Item = SequenceId> {
        self.sequence.into_iter().chain(self.beams.iter().flat_map(Beams::others))
    }

    /// Forgets its sequences, and hands them out to be freed.
    pub(super) fn take_sequences(&mut self) -> Vec<SequenceId> {
        let sequences = self.sequences().collect();
        self.sequence = None;
        if let Some(beams) = &mut self.beams {
            beams.reset();
        }
        sequences
    }

    /// Whether nobody listens any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Notes that it has blocks for the first time, `cached` of them with tokens already.
    pub(super) fn note_start(&mut self, now: Duration, cached: u32) {
        if !self.started {
            self.started = true;
            self.usage.queue_time = now.saturating_sub(self.submitted);
            self.usage.cached_tokens = cached;
        }
    }

    /// Adds a sampled token. Returns why the answer ends with it, if it does.
    pub(super) fn push(&mut self, drawn: Drawn, now: Duration) -> Option<EndReason> {
        let Drawn { token, logprob } = drawn;
        self.usage.time_to_first_token.get_or_insert(now.saturating_sub(self.submitted));
        if self.stop_tokens.contains(&token) {
            return Some(EndReason::StopToken(token));
        }
        self.text.push(token);
        self.usage.new_tokens += 1;
        let (text, stop) = match self.answer.push(token) {
            Ok(Pushed::Text(text)) => (text, None),
            Ok(Pushed::Stop(text, stop)) => (text, Some(EndReason::StopString(stop))),
            Err(error) => (String::new(), Some(EndReason::Failed((&error).into()))),
        };
        // A closed channel is noticed by the next step.
        let _ = self.events.unbounded_send(Event::Token { token, text, logprob });
        let complete = match self.constraint.as_mut().map(|constraint| constraint.push(token)) {
            Some(Ok(true)) => Some(EndReason::Complete),
            Some(Err(error)) => Some(EndReason::Failed((&error).into())),
            Some(Ok(false)) | None => None,
        };
        let is_full = self.usage.new_tokens >= self.max_tokens;
        let at_most = if self.max_tokens < self.wanted_tokens { EndReason::Positions } else { EndReason::Length };
        stop.or(complete).or(is_full.then_some(at_most))
    }

    /// Sends the last event.
    pub(super) fn end(mut self, mut reason: EndReason, now: Duration) {
        let mut text = String::new();
        // After a stop string nothing follows.
        if !matches!(reason, EndReason::StopString(_)) {
            match self.answer.finish() {
                Ok(Pushed::Text(rest)) => text = rest,
                Ok(Pushed::Stop(rest, stop)) => (text, reason) = (rest, EndReason::StopString(stop)),
                Err(error) => reason = EndReason::Failed((&error).into()),
            }
        }
        self.usage.total_time = now.saturating_sub(self.submitted);
        let _ = self.events.unbounded_send(Event::End { reason, text, usage: self.usage });
    }
}

/// The decoder's cache as the scheduler sees it.
pub(super) struct CacheView<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) requests: &'a HashMap<RequestId, Active>,
}

impl CacheView<'_> {
    /// Tokens of full blocks that two texts begin with, but for the last token of the first, which is always computed.
    fn common(&self, text: &[u32], other: &[u32]) -> u32 {
        let but_last = &text[..text.len().saturating_sub(1)];
        let equal = but_last.iter().zip(other).take_while(|(a, b)| a == b).count() as u32;
        let block_size = self.decoder.options().block_size;
        equal / block_size * block_size
    }

    /// The part of a request's text that may be in the prefix index. In an exact model what was sampled has other bits than the same tokens in a
    /// prompt have.
    pub(super) fn findable<'r>(&self, request: &'r Active) -> &'r [u32] {
        let len =
            if self.decoder.model().is_exact() { request.usage.prompt_tokens as usize } else { request.text.len() };
        &request.text[..len]
    }

    /// Tokens of a request that are in the cache; `None` while it waits or is swapped out.
    fn cached(&self, request: &Active) -> Option<u32> {
        self.decoder.cache().seq_len(request.sequence?).ok()
    }

    /// The sequence of another answer to the same prompt, and how many of the prompt's tokens it has in the cache. All but the last one count:
    /// that one is computed for each answer, as its logits are drawn from.
    fn sibling(&self, request: &Active) -> Option<(SequenceId, u32)> {
        let sibling = self.requests.get(&request.sibling?)?;
        let cached = self.cached(sibling)?.min(request.usage.prompt_tokens - 1);
        let sequence = sibling.sequence?;
        // It may have gone on until its window has left the prompt.
        self.decoder.reaches_back(sequence, cached).is_ok_and(|reaches| reaches).then_some((sequence, cached))
    }

    /// Where a fork gives a waiting request all of its prompt but the last token.
    pub(super) fn fork_of(&self, request: &Active) -> Option<(SequenceId, u32)> {
        let most = request.usage.prompt_tokens - 1;
        self.sibling(request).filter(|&(_, cached)| cached == most && cached > 0)
    }
}

impl Memory for CacheView<'_> {
    fn free_blocks(&self) -> u32 {
        let usage = self.decoder.usage();
        usage.free + usage.reclaimable
    }

    fn exclusive_blocks(&self, request: RequestId) -> u32 {
        let sequence = self.requests.get(&request).and_then(|request| request.sequence);
        sequence.and_then(|sequence| self.decoder.cache().exclusive_blocks(sequence).ok()).unwrap_or(0)
    }

    fn copied_blocks(&self, request: RequestId) -> u32 {
        let sequences = self.requests.get(&request).into_iter().flat_map(Active::sequences);
        let cache = self.decoder.cache();
        sequences.map(|sequence| cache.copied_blocks(sequence).unwrap_or(0)).sum()
    }

    fn beam_blocks(&self, request: RequestId) -> u32 {
        let Some(request) = self.requests.get(&request) else { return 0 };
        let shared = (request.usage.prompt_tokens / self.decoder.options().block_size) as usize;
        let tables = request.sequences().filter_map(|sequence| self.decoder.cache().block_tables(sequence).ok());
        tables
            .flatten()
            .flat_map(|table| table.into_iter().skip(shared))
            .filter(|block| !block.is_null())
            .collect::<HashSet<_>>()
            .len() as u32
    }

    fn prefix(&self, request: RequestId) -> PrefixHit {
        let Some(request) = self.requests.get(&request) else { return PrefixHit::default() };
        let probe = if self.decoder.options().prefix_cache {
            self.decoder.probe_prefix(self.findable(request))
        } else {
            PrefixProbe::default()
        };
        // The index has more than the prompt where an answer is computed again.
        match self.fork_of(request).filter(|&(_, tokens)| tokens >= probe.len) {
            Some((_, tokens)) => {
                // The last block (of each group of layers) is shared, unless it is full, and copied by the next token.
                let copies = !tokens.is_multiple_of(self.decoder.options().block_size);
                let num_groups = self.decoder.cache().config().groups.count();
                PrefixHit { tokens, free_blocks: if copies { num_groups } else { 0 } }
            }
            None => PrefixHit { tokens: probe.len, free_blocks: probe.reclaimable_blocks },
        }
    }

    /// True if another request is computing more of a common prefix than the index has: one that runs, or one that waits and will run first.
    /// Also while a sibling is computing the prompt of both.
    fn waits_for_prefix(&self, id: RequestId) -> bool {
        let Some(request) = self.requests.get(&id) else { return false };
        // One that waits was submitted before, so it starts before. One that is swapped out may be long in coming back.
        let sibling = request.sibling.and_then(|sibling| self.requests.get(&sibling));
        let is_computing = |sibling: &Active| match sibling.sequence {
            None => true,
            Some(_) => self.cached(sibling).is_some_and(|cached| cached + 1 < request.usage.prompt_tokens),
        };
        if sibling.is_some_and(is_computing) {
            return true;
        }
        if !self.decoder.options().prefix_cache || self.fork_of(request).is_some() {
            return false;
        }
        let text = self.findable(request);
        let known = self.decoder.probe_prefix(text).len;
        let block_size = self.decoder.options().block_size;
        if known + block_size >= text.len() as u32 {
            return false;
        }
        // Most texts differ in the block after what is known, so that is looked at first.
        let next = known as usize..(known + block_size) as usize;
        self.requests.iter().any(|(&other_id, other)| {
            let cached = match self.cached(other) {
                Some(cached) => cached,
                None if other_id < id && other.priority >= request.priority => 0,
                None => return false,
            };
            // What the other one has computed is in the index.
            let others = self.findable(other);
            other_id != id
                && cached < others.len() as u32
                && others.get(next.clone()) == text.get(next.clone())
                && self.common(text, others) > known.max(cached)
        })
    }
}

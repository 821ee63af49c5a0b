//! Beam search: several texts grow side by side from a prompt, and the most probable one is the answer.

use super::request::EndReason;
use crate::SequenceId;
use crate::model::{Decoder, Drawn, ModelResult};

/// The texts of a request.
#[derive(Debug)]
pub(super) struct Beams {
    width: usize,
    /// Texts that go on, the most probable first. One without tokens as long as the prompt is computed.
    live: Vec<Beam>,
    /// Texts that have ended with a stop token.
    ended: Vec<Text>,
}

/// A text that goes on.
#[derive(Debug)]
struct Beam {
    /// It has all of the tokens but the last.
    sequence: SequenceId,
    text: Text,
}

/// What was added to the prompt.
#[derive(Clone, Debug, Default)]
struct Text {
    tokens: Vec<Drawn>,
    /// Sum of the log-probabilities, that of the stop token included.
    score: f64,
    stop: Option<u32>,
}

impl Text {
    /// What texts of different lengths are compared by: the mean log-probability of a token.
    fn mean(&self) -> f64 {
        self.score / (self.tokens.len() + usize::from(self.stop.is_some())).max(1) as f64
    }
}

/// A text and one more token.
struct Candidate {
    beam: usize,
    drawn: Drawn,
    score: f64,
}

/// A text that was chosen, and why it ends.
pub(super) struct Best {
    pub(super) tokens: Vec<Drawn>,
    pub(super) stop: Option<EndReason>,
}

impl Beams {
    pub(super) const fn new(width: u32) -> Self {
        Self { width: width as usize, live: Vec::new(), ended: Vec::new() }
    }

    /// Tokens of each text that have to be known by their log-probabilities: as many as beams, if as many others end it.
    pub(super) fn top(&self, num_stops: usize) -> u32 {
        (self.width + self.width.min(num_stops)) as u32
    }

    /// The sequences of texts that go on, and their last token, which is not fed yet.
    pub(super) fn feeds(&self) -> impl Iterator<Item = (SequenceId, u32)> {
        self.live.iter().filter_map(|beam| Some((beam.sequence, beam.text.tokens.last()?.token)))
    }

    /// All sequences but the first, which the request itself knows.
    pub(super) fn others(&self) -> impl Iterator<Item = SequenceId> {
        self.live.iter().skip(1).map(|beam| beam.sequence)
    }

    /// Starts from the prompt again, when all sequences are gone.
    pub(super) fn reset(&mut self) {
        self.live.clear();
        self.ended.clear();
    }

    /// Goes on by a token: `drawn` are those after each text that goes on, or after the prompt, whose sequence is `prompt`. Sequences fork
    /// and end. Returns the best text when the search is over: as many texts have ended as there are beams, or `max_tokens` are there.
    pub(super) fn advance(
        &mut self,
        decoder: &mut Decoder,
        prompt: SequenceId,
        drawn: &[Drawn],
        stop_tokens: &[u32],
        max_tokens: u32,
    ) -> ModelResult<Option<Best>> {
        if self.live.is_empty() {
            self.live.push(Beam { sequence: prompt, text: Text::default() });
        }
        // What was drawn is not what goes on.
        for beam in &self.live {
            decoder.discard_pending(beam.sequence)?;
        }
        let mut candidates = Vec::new();
        for (beam, drawn) in drawn.iter().enumerate().take(self.live.len()) {
            let Some(logprob) = &drawn.logprob else { continue };
            for &(token, value) in logprob.top.iter().filter(|(_, value)| value.is_finite()) {
                let mut drawn = Drawn { token, logprob: Some(logprob.clone()) };
                if let Some(logprob) = &mut drawn.logprob {
                    logprob.logprob = value;
                }
                candidates.push(Candidate { beam, drawn, score: self.live[beam].text.score + f64::from(value) });
            }
        }
        // Of equal scores those of the better text, and the lower token, come first, as the sort is stable.
        candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut chosen = Vec::with_capacity(self.width);
        for (rank, candidate) in candidates.into_iter().enumerate() {
            if chosen.len() == self.width {
                break;
            }
            if !stop_tokens.contains(&candidate.drawn.token) {
                chosen.push(candidate);
            } else if rank < self.width {
                let tokens = self.live[candidate.beam].text.tokens.clone();
                self.ended.push(Text { tokens, score: candidate.score, stop: Some(candidate.drawn.token) });
            }
        }
        let len = self.live[0].text.tokens.len() + 1;
        // Nothing but stop tokens may be likely.
        let goes_on = !chosen.is_empty();
        self.replace(decoder, chosen)?;
        if goes_on && self.ended.len() < self.width && len < max_tokens as usize {
            return Ok(None);
        }
        // Texts that were cut off count only if too few have ended.
        let cut = if self.ended.len() < self.width { &self.live[..] } else { &[] };
        let texts = self.ended.iter().chain(cut.iter().map(|beam| &beam.text));
        let best = texts.reduce(|a, b| if b.mean() > a.mean() { b } else { a });
        let best = best.map(|text| Best { tokens: text.tokens.clone(), stop: text.stop.map(EndReason::StopToken) });
        Ok(Some(best.unwrap_or(Best { tokens: Vec::new(), stop: Some(EndReason::Complete) })))
    }

    /// Forks texts that go on more than once, and ends those that don't. If none is chosen all stay, to be ended with the request.
    fn replace(&mut self, decoder: &mut Decoder, chosen: Vec<Candidate>) -> ModelResult<()> {
        if chosen.is_empty() {
            return Ok(());
        }
        // The request's own sequence is the first one's, whatever becomes of it.
        let mut kept: Vec<Option<SequenceId>> = self.live.iter().map(|beam| Some(beam.sequence)).collect();
        for (beam, sequence) in kept.iter_mut().enumerate() {
            if chosen.iter().all(|candidate| candidate.beam != beam)
                && let Some(sequence) = sequence.take()
            {
                decoder.free(sequence)?;
            }
        }
        let mut live: Vec<Beam> = Vec::with_capacity(chosen.len());
        for candidate in chosen {
            let parent = &self.live[candidate.beam];
            let sequence = match kept[candidate.beam].take() {
                Some(sequence) => sequence,
                None => decoder.fork(parent.sequence)?,
            };
            let mut text = Text { score: candidate.score, ..parent.text.clone() };
            text.tokens.push(candidate.drawn);
            live.push(Beam { sequence, text });
        }
        self.live = live;
        Ok(())
    }

    /// The first sequence: the request's own from now on.
    pub(super) fn first(&self) -> Option<SequenceId> {
        self.live.first().map(|beam| beam.sequence)
    }
}

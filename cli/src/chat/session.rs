//! The conversation: prompts in, answers out.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::Result;
use folio::model::{Decoder, Finish, Input, ModelError, ModelResult, Prompt, TextStream};
use folio::{ErrorKind, PoolUsage, SequenceId};

use super::options::Options;
use super::screen::{Interrupts, Screen};
use super::turns::{Asked, Turns};
use crate::load::Loaded;

/// What the closing report counts.
#[derive(Default)]
struct Counters {
    prompt_tokens: usize,
    prompt_time: Duration,
    decode_tokens: usize,
    decode_time: Duration,
    /// From the prompt to its first token, of every turn.
    first_token: Vec<Duration>,
}

pub(crate) struct Session {
    pub(crate) options: Options,
    decoder: Decoder,
    turns: Turns,
    /// The conversation so far.
    sequence: SequenceId,
    counters: Counters,
    /// The most blocks that were used and shared after a turn.
    peak: PoolUsage,
    pub(crate) screen: Screen,
    pub(crate) interrupts: Interrupts,
}

/// Whether it is only for want of room in the cache.
fn is_full(error: &ModelError) -> bool {
    error.kind() == ErrorKind::Retry
}

fn common_len(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Session {
    pub(crate) fn new(options: Options, loaded: Loaded, screen: Screen, interrupts: Interrupts) -> Result<Self> {
        let turns = Turns::new(&options, &loaded)?;
        let mut decoder = loaded.decoder;
        let sequence = decoder.create_sequence();
        let (counters, peak) = Default::default();
        Ok(Self { options, decoder, turns, sequence, counters, peak, screen, interrupts })
    }

    /// Tokens of prompts that went through the model.
    #[cfg(test)]
    pub(crate) fn num_fed(&self) -> usize {
        self.counters.prompt_tokens
    }

    /// The tokens of the conversation so far.
    pub(crate) fn text(&self) -> ModelResult<Vec<u32>> {
        let pending = self.decoder.pending(self.sequence)?;
        Ok(self.decoder.tokens(self.sequence)?.iter().copied().chain(pending).collect())
    }

    fn start_anew(&mut self, why: &str) -> Result<()> {
        self.screen.note(&format!("[{why}: a new conversation begins]"));
        self.decoder.free(self.sequence)?;
        self.sequence = self.decoder.create_sequence();
        self.turns.forget();
        Ok(())
    }

    /// Explains why something can't be said.
    fn refuse(&mut self, why: &str) -> bool {
        self.screen.note(&format!("[not said: {why}]"));
        false
    }

    /// The text up to an answer; `None` begins a new conversation. If there is none, that has been explained.
    fn ask(&mut self, so_far: Option<&[u32]>, said: &str) -> Option<Asked> {
        match self.turns.ask(so_far, said) {
            Ok(None) => self.screen.note("[got no text, need at least one character]"),
            Ok(asked) => return asked,
            Err(error) => {
                self.refuse(&format!("{error:#}"));
            }
        }
        None
    }

    /// Feeds a prompt and prints what follows. False if it can't be said, which has been explained then; the conversation is as it was.
    pub(crate) fn turn(&mut self, said: &str) -> Result<bool> {
        self.interrupts.begin_answer();
        let max_positions = self.decoder.model().config().max_positions as usize;
        let before = self.text()?;
        let Some(mut asked) = self.ask(Some(&before), said) else { return Ok(false) };
        if asked.text.len() > max_positions {
            let Some(anew) = self.ask(None, said) else { return Ok(false) };
            let len = anew.text.len();
            if len > max_positions {
                return Ok(self.refuse(&format!("it has {len} tokens, and the model takes {max_positions}")));
            }
            self.start_anew(&format!("{} of the model's {max_positions} positions are used", before.len()))?;
            asked = anew;
        }
        let mut answers = self.answer(&asked);
        if !before.is_empty() && matches!(&answers, Err(error) if error.downcast_ref().is_some_and(is_full)) {
            let Some(anew) = self.ask(None, said) else { return Ok(false) };
            self.start_anew(&format!("the cache's {} blocks are full", self.decoder.usage().total))?;
            asked = anew;
            answers = self.answer(&asked);
        }
        let (finish, text) = match answers {
            Ok(answer) => answer,
            Err(error) if error.downcast_ref().is_some_and(is_full) => {
                let room = self.decoder.cache().config().longest_sequence(self.decoder.options().max_step_tokens);
                let len = asked.text.len();
                return Ok(self.refuse(&format!("it has {len} tokens, and the cache has room for {room}")));
            }
            Err(error) => return Err(error),
        };
        self.turns.note(said, text.trim());
        self.screen.end_line()?;
        match finish {
            None => self.screen.note("[the cache is full: the answer ends here]"),
            Some(Finish::Positions) => self.screen.note("[the model's positions are used up: the answer ends here]"),
            Some(Finish::Interrupted) => self.screen.note("[stopped]"),
            Some(Finish::Stop | Finish::Length) => {}
        }
        Ok(true)
    }

    /// Copies of the conversation, one per branch, with all of a prompt but its last token: that goes in once, and its blocks are shared.
    fn fork_for_branches(&mut self, shared: &[u32]) -> Result<Vec<SequenceId>> {
        let gpu = self.decoder.gpu().clone();
        let first = self.decoder.fork(self.sequence)?;
        if !shared.is_empty() || self.decoder.pending(first)?.is_some() {
            let input = Input::new(first, shared);
            if let Err(error) = gpu.block_on(self.decoder.step(&[input])) {
                self.decoder.free(first)?;
                return Err(error.into());
            }
        }
        let mut sequences = vec![first];
        for _ in 1..self.options.branches {
            sequences.push(self.decoder.fork(first)?);
        }
        Ok(sequences)
    }

    /// Ends the branches that the conversation doesn't go on from.
    fn free_others(&mut self, sequences: &[SequenceId]) -> Result<()> {
        for &sequence in sequences.iter().filter(|&&sequence| sequence != self.sequence) {
            self.decoder.free(sequence)?;
        }
        Ok(())
    }

    /// Feeds what the cache doesn't have of a text, and prints the answer as it comes, if there is one branch. Fails if the cache has no room for
    /// the prompt and a first token; what it has is a beginning of the conversation then. Returns how the answer ended, or `None` if the cache
    /// became full, and its text.
    fn answer(&mut self, asked: &Asked) -> Result<(Option<Finish>, String)> {
        let start = Instant::now();
        let branches = self.options.branches as usize;
        // A template may write earlier turns in another way than they were fed. The last token is fed in any case: its logits are what counts.
        let known = common_len(&self.text()?, &asked.text).min(asked.text.len() - 1);
        let known = self.decoder.rewind(self.sequence, known as u32)? as usize;
        let prompt = &asked.text[known..];
        let num_fed = prompt.len() + usize::from(self.decoder.pending(self.sequence)?.is_some());
        let (shared, last) = prompt.split_at(prompt.len() - 1);
        let (sequences, fed) =
            if branches > 1 { (self.fork_for_branches(shared)?, last) } else { (vec![self.sequence], prompt) };
        let sampling = |i| self.options.sampling(i, asked.temperature);
        let prompts: Vec<_> = (0..)
            .zip(&sequences)
            .map(|(i, &sequence)| Prompt { sequence, tokens: fed, sampling: sampling(i) })
            .collect();

        let mut streams: Vec<TextStream> =
            sequences.iter().map(|_| self.turns.tokenizer.stream_after(&asked.text, true)).collect();
        let mut texts = vec![String::new(); branches];
        let mut first_token = None;
        let mut failure = None;
        let mut count = 0_usize;
        let (screen, interrupts) = (&mut self.screen, &self.interrupts);
        let max_tokens = self.options.max_tokens as usize;
        let result = self.decoder.generate_blocking(&prompts, max_tokens, &asked.stop, |branch, token| {
            first_token.get_or_insert_with(|| start.elapsed());
            count += 1;
            let shown = streams[branch].push(token).map_err(anyhow::Error::from).and_then(|text| {
                let text = text.unwrap_or_default();
                texts[branch].push_str(&text);
                if branches == 1 { Ok(screen.say(&text)?) } else { Ok(()) }
            });
            match shown {
                Ok(()) if !interrupts.is_pressed() => ControlFlow::Continue(()),
                Ok(()) => ControlFlow::Break(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        });
        let time = start.elapsed();
        let generated = match result {
            Ok(generated) => Some(generated),
            // What was said until then is in the conversation, and stays.
            Err(error) if is_full(&error) && count > 0 => None,
            Err(error) => {
                self.free_others(&sequences)?;
                return Err(error.into());
            }
        };
        // The conversation goes on from the first branch.
        let previous = std::mem::replace(&mut self.sequence, sequences[0]);
        if previous != self.sequence {
            self.decoder.free(previous)?;
        }
        if let Some(error) = failure {
            return Err(error);
        }
        for (text, stream) in texts.iter_mut().zip(streams) {
            let rest = stream.finish()?;
            if branches == 1 {
                self.screen.say(&rest)?;
            }
            text.push_str(&rest);
        }
        let first_token = first_token.unwrap_or(time);
        self.counters.prompt_tokens += num_fed;
        self.counters.prompt_time += first_token;
        self.counters.first_token.push(first_token);
        // The first token of each branch comes out of the prompt's own step.
        self.counters.decode_tokens += count.saturating_sub(branches);
        self.counters.decode_time += time - first_token;
        let usage = self.decoder.usage();
        self.peak.used = self.peak.used.max(usage.used);
        self.peak.shared = self.peak.shared.max(usage.shared);
        if branches > 1 {
            for (i, text) in texts.iter().enumerate() {
                self.screen.end_line()?;
                self.screen.say(&format!("--- branch {} ---\n{}\n", i + 1, text.trim()))?;
            }
            let (used, shared) = (usage.used, usage.shared);
            self.screen
                .say(&format!("--- {used} blocks used by {branches} branches, {shared} of them shared ---\n"))?;
        }
        self.free_others(&sequences)?;
        // A token that ends an answer is no part of the text.
        let finish = generated.map(|generated| generated[0].finish);
        if finish == Some(Finish::Stop) {
            self.decoder.discard_pending(self.sequence)?;
        }
        Ok((finish, texts.swap_remove(0)))
    }

    /// Says one prompt after another. Returns whether all could be said.
    pub(crate) fn recite(&mut self, prompts: impl IntoIterator<Item = impl AsRef<str>>) -> Result<bool> {
        let mut all_said = true;
        for (i, prompt) in prompts.into_iter().enumerate() {
            if i > 0 {
                self.screen.say("\n")?;
            }
            self.screen.say(prompt.as_ref())?;
            if self.turns.are_messages() {
                self.screen.end_line()?;
            }
            all_said &= self.turn(prompt.as_ref())?;
        }
        Ok(all_said)
    }

    /// Adapter, times, and what is in the cache.
    pub(crate) fn report(&mut self) -> Result<()> {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let megabytes = |blocks: u32| (u64::from(blocks) * self.decoder.bytes_per_block()) as f64 / 1e6;
        let (gpu, usage, counters) = (self.decoder.gpu(), self.decoder.usage(), &self.counters);
        let (info, peak) = (gpu.adapter_info(), &self.peak);
        let times: Vec<_> = counters.first_token.iter().map(|t| format!("{:.0} ms", t.as_secs_f64() * 1e3)).collect();
        let report = format!(
            "\nadapter        {} ({:?}), {:?} kernels\n\
             prompts        {} tokens, {:.0} tokens/s\n\
             decode         {} tokens, {:.0} tokens/s\n\
             first token    {}\n\
             cache          {:.1} MB of {:.1} MB used, {} bytes per token\n\
             blocks         {} of {} used; at most {} used and {} shared\n",
            info.name,
            info.backend,
            gpu.profile(),
            counters.prompt_tokens,
            rate(counters.prompt_tokens, counters.prompt_time),
            counters.decode_tokens,
            rate(counters.decode_tokens, counters.decode_time),
            if times.is_empty() { "none".to_owned() } else { times.join(", ") },
            megabytes(usage.used),
            megabytes(usage.total),
            self.decoder.bytes_per_token(),
            usage.used,
            usage.total,
            peak.used,
            peak.shared
        );
        Ok(self.screen.say(&report)?)
    }
}

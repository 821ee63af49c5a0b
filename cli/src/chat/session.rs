//! The conversation: prompts in, answers out.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::Result;
use folio::model::{Decoder, Finish, Input, ModelError, ModelResult, Prompt, TextStream, Tokenizer};
use folio::{ErrorKind, PoolUsage, SequenceId};

use crate::options::Options;
use crate::screen::{Interrupts, Screen};

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
    tokenizer: Tokenizer,
    /// Tokens that end an answer.
    stop: Vec<u32>,
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

impl Session {
    pub(crate) fn new(
        options: Options,
        mut decoder: Decoder,
        tokenizer: Tokenizer,
        screen: Screen,
        interrupts: Interrupts,
    ) -> Self {
        let stop = decoder.model().config().eos_token_ids.clone();
        let sequence = decoder.create_sequence();
        let (counters, peak) = Default::default();
        Self { options, decoder, tokenizer, stop, sequence, counters, peak, screen, interrupts }
    }

    /// The story model answers questions in a form of its own; see its model card.
    fn tells_stories(&self) -> bool {
        self.options.model.is_none()
    }

    /// The text that is fed for what somebody says, the tokens that end the answer, and its temperature unless the options say one.
    fn dress(&self, said: &str) -> Result<(String, Vec<u32>, f32)> {
        if self.tells_stories() && said.trim_end().ends_with('?') {
            let newline = self.tokenizer.encode("\n", false)?;
            Ok((format!("\nQuestion: {}\nAnswer:", said.trim()), [&self.stop[..], &newline].concat(), 0.0))
        } else {
            Ok((said.to_owned(), self.stop.clone(), 0.8))
        }
    }

    /// The tokens of a prompt, which begin with what the model wants at the beginning of a text.
    fn encode(&self, text: &str, is_first: bool) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        if is_first && self.tells_stories() {
            // Its tokenizer leaves that to the host; others add what their models want.
            tokens.extend(self.decoder.model().config().bos_token_id);
        }
        tokens.extend(self.tokenizer.encode(text, is_first)?);
        Ok(tokens)
    }

    /// Tokens of the conversation so far.
    fn len(&self) -> ModelResult<usize> {
        let pending = self.decoder.pending(self.sequence)?;
        Ok(self.decoder.tokens(self.sequence)?.len() + usize::from(pending.is_some()))
    }

    fn start_anew(&mut self, why: &str) -> Result<()> {
        self.screen.note(&format!("[{why}: a new conversation begins]"));
        self.decoder.free(self.sequence)?;
        self.sequence = self.decoder.create_sequence();
        Ok(())
    }

    /// Feeds a prompt and prints what follows. False if it can't be said, which has been explained then; the conversation is as it was.
    pub(crate) fn turn(&mut self, said: &str) -> Result<bool> {
        self.interrupts.begin_answer();
        let (prompt, stop, temperature) = self.dress(said)?;
        let max_positions = self.decoder.model().config().max_positions as usize;
        let before = self.len()?;
        let mut tokens = self.encode(&prompt, before == 0)?;
        if tokens.is_empty() {
            self.screen.note("[got no text, need at least one character]");
            return Ok(false);
        }
        if before + tokens.len() > max_positions {
            let anew = self.encode(&prompt, true)?;
            if anew.len() > max_positions {
                let len = anew.len();
                self.screen.note(&format!("[not said: it has {len} tokens, and the model takes {max_positions}]"));
                return Ok(false);
            }
            self.start_anew(&format!("{before} of the model's {max_positions} positions are used"))?;
            tokens = anew;
        }
        let mut answers = self.answer(&tokens, &stop, temperature);
        if before > 0 && matches!(&answers, Err(error) if error.downcast_ref().is_some_and(is_full)) {
            self.start_anew(&format!("the cache's {} blocks are full", self.decoder.usage().total))?;
            tokens = self.encode(&prompt, true)?;
            answers = self.answer(&tokens, &stop, temperature);
        }
        let finish = match answers {
            Ok(finish) => finish,
            Err(error) if error.downcast_ref().is_some_and(is_full) => {
                let (blocks, size) = (self.decoder.usage().total, self.decoder.options().block_size);
                let len = tokens.len();
                self.screen.note(&format!("[not said: it has {len} tokens, and the cache {blocks} blocks of {size}]"));
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
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
            let input = Input { sequence: first, tokens: shared, sampling: None };
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

    /// Feeds a prompt and prints the answer as it comes, if there is one branch. Fails with nothing changed if the cache has no room for the
    /// prompt and a first token. Returns how it ended, or `None` if the cache became full.
    fn answer(&mut self, prompt: &[u32], stop: &[u32], temperature: f32) -> Result<Option<Finish>> {
        let start = Instant::now();
        let branches = self.options.branches as usize;
        let before: Vec<u32> = self.decoder.pending(self.sequence)?.into_iter().chain(prompt.iter().copied()).collect();
        let (shared, last) = prompt.split_at(prompt.len() - 1);
        let (sequences, fed) =
            if branches > 1 { (self.fork_for_branches(shared)?, last) } else { (vec![self.sequence], prompt) };
        let sampling = |i| self.options.sampling(i, temperature);
        let prompts: Vec<_> = (0..)
            .zip(&sequences)
            .map(|(i, &sequence)| Prompt { sequence, tokens: fed, sampling: sampling(i) })
            .collect();

        let mut streams: Vec<TextStream> =
            sequences.iter().map(|_| self.tokenizer.stream_after(&before, true)).collect();
        let mut texts = vec![String::new(); branches];
        let mut first_token = None;
        let mut failure = None;
        let mut count = 0_usize;
        let (screen, interrupts) = (&mut self.screen, &self.interrupts);
        let max_tokens = self.options.max_tokens as usize;
        let result = self.decoder.generate_blocking(&prompts, max_tokens, stop, |branch, token| {
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
        self.counters.prompt_tokens += before.len();
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
        Ok(finish)
    }

    /// Says one prompt after another. Returns whether all could be said.
    pub(crate) fn recite(&mut self, prompts: impl IntoIterator<Item = impl AsRef<str>>) -> Result<bool> {
        let mut all_said = true;
        for (i, prompt) in prompts.into_iter().enumerate() {
            if i > 0 {
                self.screen.say(
                    "
",
                )?;
            }
            self.screen.say(prompt.as_ref())?;
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

//! One call, as many steps as it takes: new tokens go through the layers, and tokens or logits come back.

use std::borrow::Cow;
use std::sync::Arc;

use super::{Decoder, Text, storage};
use crate::gpu::{Readback, Upload};
use crate::model::error::{ModelError, ModelResult};
use crate::model::rows::Rows;
use crate::model::sampler::{Sampler, Sampling, SamplingRequest};
use crate::model::transformer::StepContext;
use crate::{BufferRef, KvCache, Result, SequenceId};

/// New tokens of one sequence, and whether the next one is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The sequence that grows.
    pub sequence: SequenceId,
    /// What it grows by, after its [pending](Decoder::pending) token. None are needed if there is one.
    pub tokens: &'a [u32],
    /// How the token after these is chosen, which is pending then. `None`: it is not wanted, and the head is not computed.
    pub sampling: Option<&'a Sampling>,
}

/// Which rows of logits [`Decoder::logits`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// Those after each sequence's last token: `[vocab_size]`.
    Last,
    /// Those after every token that was fed, the pending one included: `[pending + tokens.len(), vocab_size]`.
    All,
}

/// What one sequence of a batch is fed.
struct Feed<'a> {
    sequence: SequenceId,
    /// The pending token and the new ones.
    tokens: Cow<'a, [u32]>,
    /// Tokens of the sequence before.
    len: u32,
    /// How many of the tokens were found in the prefix index.
    found: usize,
    /// How many of the tokens are in the cache.
    done: usize,
    head: Head<'a>,
}

/// Part of a feed that goes through the layers in one step.
struct Chunk<'a> {
    /// Which feed.
    input: usize,
    sequence: SequenceId,
    tokens: &'a [u32],
    /// The position of the first token.
    position: u32,
    head: Head<'a>,
    /// All tokens of the feed.
    feed_tokens: &'a [u32],
}

/// What a chunk wants of the head.
#[derive(Clone, Copy)]
enum Head<'a> {
    Nothing,
    Sample(&'a Sampling),
    LastRow,
    AllRows,
}

impl Head<'_> {
    fn rows(self, tokens: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Sample(_) | Self::LastRow => 1,
            Self::AllRows => tokens,
        }
    }
}

/// Bytes of a sampled token.
const OUTPUT_BYTES: u64 = Sampler::OUTPUT_WORDS as u64 * 4;

/// Cuts sequences back to where a call began, unless it succeeds: also if its future is dropped half-way.
struct Rollback {
    cache: Arc<KvCache>,
    lengths: Vec<(SequenceId, u32)>,
}

impl Rollback {
    fn disarm(mut self) {
        self.lengths.clear();
    }
}

impl Drop for Rollback {
    fn drop(&mut self) {
        for &(sequence, len) in &self.lengths {
            // It can only fail for a sequence that is gone, and then there is nothing to cut.
            let _ = self.cache.truncate(sequence, len);
        }
    }
}

impl Decoder {
    /// Feeds each sequence its pending token and new ones, and samples the tokens that follow, for those inputs that ask for it. A sampled token
    /// is returned, and pending then; a sequence for which none was asked has none.
    ///
    /// Submits and reads back; natively the future completes only while somebody polls the device: [`Gpu::block_on`](crate::Gpu::block_on).
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for an empty batch, an input without a token where none is pending, a sequence twice, a token
    /// id outside the vocabulary, more tokens than the model has positions, or sampling settings outside their ranges; [`ModelError::BadLogits`];
    /// [`ModelError::Folio`] with [`OutOfBlocks`](crate::Error::OutOfBlocks) if the cache is full, or
    /// [`DeviceLost`](crate::Error::DeviceLost). No sequence has changed then.
    pub async fn step(&mut self, batch: &[Input<'_>]) -> ModelResult<Vec<Option<u32>>> {
        for input in batch {
            self.cached_text(input.sequence)?;
        }
        self.sample(batch).await
    }

    /// [`Decoder::step`], also for sequences that only the cache knows.
    pub(super) async fn sample(&mut self, batch: &[Input<'_>]) -> ModelResult<Vec<Option<u32>>> {
        for input in batch {
            if let Some(sampling) = input.sampling {
                sampling.validate()?;
            }
        }
        let inputs: Vec<_> = batch
            .iter()
            .map(|input| (input.sequence, input.tokens, input.sampling.map_or(Head::Nothing, Head::Sample)))
            .collect();
        let mut tokens = vec![None; batch.len()];
        self.run(&inputs, |_, chunks, words| {
            let sampling = chunks.iter().filter(|chunk| matches!(chunk.head, Head::Sample(_)));
            for (chunk, sampled) in sampling.zip(Sampler::read_output(words)) {
                let Some(token) = sampled.token else {
                    return Err(ModelError::BadLogits { sequence: chunk.sequence });
                };
                tokens[chunk.input] = Some(token);
            }
            Ok(())
        })
        .await?;
        for (input, &token) in batch.iter().zip(&tokens) {
            if let Some(text) = self.texts.get_mut(&input.sequence) {
                text.pending = token;
            }
        }
        Ok(tokens)
    }

    /// Feeds each sequence its pending token and new ones, and returns logits: for each input one row or one row per token that was fed,
    /// `[rows, vocab_size]`. No token is pending afterwards.
    ///
    /// # Errors
    /// Those of [`Decoder::step`], except that logits are returned as they are, NaN included.
    pub async fn logits(&mut self, batch: &[(SequenceId, &[u32])], rows: LogitRows) -> ModelResult<Vec<Vec<f32>>> {
        let head = match rows {
            LogitRows::Last => Head::LastRow,
            LogitRows::All => Head::AllRows,
        };
        let inputs: Vec<_> = batch.iter().map(|&(sequence, tokens)| (sequence, tokens, head)).collect();
        for &(sequence, _) in batch {
            self.cached_text(sequence)?;
        }
        let mut logits = vec![Vec::new(); batch.len()];
        self.run(&inputs, |vocab, chunks, words| {
            let mut rest = words;
            for chunk in chunks {
                let (own, after) = rest.split_at(chunk.head.rows(chunk.tokens.len()) * vocab);
                logits[chunk.input].extend(own.iter().map(|&bits| f32::from_bits(bits)));
                rest = after;
            }
            Ok(())
        })
        .await?;
        Ok(logits)
    }

    /// Checks a batch against the model, before anything happens, and puts pending tokens in front.
    fn feeds<'a>(&self, batch: &[(SequenceId, &'a [u32], Head<'a>)]) -> ModelResult<Vec<Feed<'a>>> {
        let config = self.model.config();
        if batch.is_empty() {
            return Err(ModelError::argument("batch", "no input", "at least one"));
        }
        let mut feeds = Vec::with_capacity(batch.len());
        for (i, &(sequence, tokens, head)) in batch.iter().enumerate() {
            let len = self.cache.seq_len(sequence)?;
            if batch[..i].iter().any(|&(other, ..)| other == sequence) {
                return Err(ModelError::argument("batch", format!("{sequence} twice"), "each sequence once"));
            }
            if let Some(id) = tokens.iter().find(|&&id| id >= config.vocab_size) {
                let rule = format!("an id below vocab_size, {}", config.vocab_size);
                return Err(ModelError::argument("tokens", format!("id {id} for {sequence}"), rule));
            }
            let tokens = match self.texts.get(&sequence).and_then(|text| text.pending) {
                Some(pending) => Cow::Owned([&[pending], tokens].concat()),
                None => Cow::Borrowed(tokens),
            };
            if tokens.is_empty() {
                let need = "at least one, as none is pending";
                return Err(ModelError::argument("tokens", format!("none for {sequence}"), need));
            }
            if len as usize + tokens.len() > config.max_positions as usize {
                let got = format!("{len} + {} for {sequence}", tokens.len());
                let rule = format!("at most the model's {} positions", config.max_positions);
                return Err(ModelError::argument("tokens", got, rule));
            }
            feeds.push(Feed { sequence, tokens, len, found: 0, done: 0, head });
        }
        Ok(feeds)
    }

    /// Rows of logits that fit into a binding at a time.
    fn max_logit_rows(&self) -> usize {
        let limits = self.gpu().limits();
        let bytes = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        (bytes / (u64::from(self.model.config().vocab_size) * 4)).max(1) as usize
    }

    /// Runs a batch in as many steps as it takes. `finish` gets the words that each step has read back.
    async fn run(
        &mut self,
        batch: &[(SequenceId, &[u32], Head<'_>)],
        mut finish: impl FnMut(usize, &[Chunk<'_>], &[u32]) -> ModelResult<()>,
    ) -> ModelResult<()> {
        let mut feeds = self.feeds(batch)?;
        let vocab = self.model.config().vocab_size as usize;
        let lengths = feeds.iter().map(|feed| (feed.sequence, feed.len)).collect();
        let rollback = Rollback { cache: Arc::clone(&self.cache), lengths };
        self.find_prefixes(&mut feeds)?;
        let (max_tokens, max_rows) = (self.options.max_step_tokens as usize, self.max_logit_rows());
        loop {
            let chunks = next_chunks(&feeds, max_tokens, max_rows);
            if chunks.is_empty() {
                break;
            }
            self.run_step(&chunks, |words| finish(vocab, &chunks, words)).await?;
            let done: Vec<_> = chunks.iter().map(|chunk| (chunk.input, chunk.tokens.len())).collect();
            for (input, count) in done {
                feeds[input].done += count;
            }
        }
        rollback.disarm();
        for feed in &feeds {
            if let Some(text) = self.texts.get_mut(&feed.sequence) {
                text.cached.extend_from_slice(&feed.tokens);
                text.pending = None;
                text.prefix_len += feed.found as u32;
                if self.options.prefix_cache {
                    publish(&self.cache, feed.sequence, text);
                }
            }
        }
        Ok(())
    }

    /// Starts sequences that are empty with what is known of their tokens, except the last one, whose logits somebody may want.
    fn find_prefixes(&self, feeds: &mut [Feed<'_>]) -> ModelResult<()> {
        let wants = |feed: &Feed<'_>| {
            feed.len == 0 && !matches!(feed.head, Head::AllRows) && self.texts.contains_key(&feed.sequence)
        };
        for feed in feeds.iter_mut().filter(|feed| self.options.prefix_cache && wants(feed)) {
            let but_last = &feed.tokens[..feed.tokens.len() - 1];
            feed.found = self.cache.match_prefix_into(feed.sequence, but_last, PREFIX_SALT)? as usize;
            feed.done = feed.found;
        }
        Ok(())
    }

    /// One step: everything is recorded into one pass and submitted at once.
    async fn run_step(
        &mut self,
        chunks: &[Chunk<'_>],
        finish: impl FnOnce(&[u32]) -> ModelResult<()>,
    ) -> ModelResult<()> {
        let gpu = self.gpu().clone();
        let model = Arc::clone(&self.model);
        let vocab = model.config().vocab_size;
        let batch: Vec<_> = chunks.iter().map(|chunk| (chunk.sequence, chunk.tokens.len() as u32)).collect();
        let step = self.cache.begin_step(&batch)?;
        let plan = self.attention.plan(&step)?;

        let ids: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.tokens).copied().collect();
        let positions: Vec<u32> = chunks.iter().flat_map(|c| c.position..c.position + c.tokens.len() as u32).collect();
        let mut head_rows = Vec::new();
        let mut start = 0;
        for chunk in chunks {
            let end = start + chunk.tokens.len();
            head_rows.extend((end - chunk.head.rows(chunk.tokens.len())..end).map(|row| row as u32));
            start = end;
        }
        let rows = ids.len() as u32;
        let num_head_rows = head_rows.len() as u32;
        // Token ids, positions and rows of the head, each from a multiple of WebGPU's largest alignment on.
        let mut words = Vec::new();
        let [ids, positions, head_rows] = [ids, positions, head_rows].map(|list| {
            let offset = words.len() as u64 * 4;
            let bytes = list.len() as u64 * 4;
            words.extend(list);
            words.resize(words.len().next_multiple_of(64), 0);
            (offset, bytes)
        });
        let (lists, lease) = Upload::new(&gpu, "batch", words)?.buffer()?;
        let [ids, positions, head_rows] =
            [ids, positions, head_rows].map(|(offset, bytes)| BufferRef::new(&lists, offset, bytes));

        let sampling: Vec<_> = chunks
            .iter()
            .filter_map(|chunk| match chunk.head {
                Head::Sample(sampling) => Some((chunk, sampling)),
                _ => None,
            })
            .collect();
        let histories: Vec<_> = sampling.iter().map(|(chunk, sampling)| self.history(chunk, sampling)).collect();
        let requests: Vec<_> = sampling
            .iter()
            .zip(&histories)
            .map(|(&(chunk, &sampling), history)| SamplingRequest {
                sampling,
                // The position of the token that is drawn, so that a seed gives the same text however it is cut into steps.
                draw_index: chunk.position + chunk.tokens.len() as u32,
                history,
                logprob: false,
            })
            .collect();
        let result_bytes = if requests.is_empty() {
            u64::from(num_head_rows) * u64::from(vocab) * 4
        } else {
            requests.len() as u64 * OUTPUT_BYTES
        };
        let staging = self.reserve(num_head_rows, requests.len() as u64 * OUTPUT_BYTES, result_bytes)?;

        let mut encoder = gpu.encoder()?;
        {
            let descriptor = wgpu::ComputePassDescriptor { label: Some("folio decoder step"), timestamp_writes: None };
            let mut pass = gpu.scoped_now("running the model", || encoder.begin_compute_pass(&descriptor))?;
            lease.hold_in(&pass);
            let context = StepContext {
                cache: &self.cache,
                attention: &self.attention,
                append: self.append.as_ref(),
                step: &step,
                plan: &plan,
                ids,
                positions,
                rows,
            };
            model.record_layers(&mut pass, &self.scratch, &context)?;
            if num_head_rows > 0 {
                let logits = Rows::new(&self.logits, num_head_rows, vocab);
                model.record_head(&mut pass, &self.scratch, rows, head_rows, logits)?;
                if !requests.is_empty() {
                    self.sampler.record(&mut pass, logits, &requests, &self.output)?;
                }
            }
        }
        if num_head_rows > 0 {
            let source = if requests.is_empty() { &self.logits } else { &self.output };
            encoder.copy_buffer_to_buffer(source, 0, staging.buffer(), 0, result_bytes);
        }
        gpu.submit("running the model", encoder).await?;
        if num_head_rows > 0 {
            let words = staging.words(&gpu, result_bytes).await?;
            finish(&words)?;
        }
        self.staging = Some(staging);
        self.cache.commit(step)?;
        Ok(())
    }

    /// All tokens before the one that is drawn, if the repetition penalty asks for them.
    fn history(&self, chunk: &Chunk<'_>, sampling: &Sampling) -> Vec<u32> {
        if sampling.repetition_penalty == 1.0 {
            return Vec::new();
        }
        let before = self.texts.get(&chunk.sequence).map_or(&[][..], |text| &text.cached);
        [before, chunk.feed_tokens].concat()
    }

    /// Makes the buffers of the head large enough, and takes the one to read back through.
    fn reserve(&mut self, head_rows: u32, output_bytes: u64, staging_bytes: u64) -> Result<Readback> {
        let gpu = self.gpu().clone();
        let logits_bytes = u64::from(head_rows) * u64::from(self.model.config().vocab_size) * 4;
        if self.logits.size() < logits_bytes {
            self.logits = storage(&gpu, "folio logits", logits_bytes)?;
        }
        if self.output.size() < output_bytes {
            self.output = storage(&gpu, "folio sampled tokens", output_bytes.next_power_of_two())?;
        }
        match self.staging.take() {
            Some(staging) if staging.buffer().size() >= staging_bytes => Ok(staging),
            _ => Readback::new(&gpu, staging_bytes.next_power_of_two().max(256)),
        }
    }
}

/// The index has one kind of tokens only: one model, no adapters.
pub(super) const PREFIX_SALT: u64 = 0;

/// Makes a sequence's full blocks findable, if there are new ones.
fn publish(cache: &KvCache, sequence: SequenceId, text: &mut Text) {
    let full = text.cached.len() as u32 / cache.config().block_size;
    // It can only fail for tokens that are not in the cache.
    if full > text.published && cache.publish_prefix(sequence, &text.cached, PREFIX_SALT).is_ok() {
        text.published = full;
    }
}

/// The next step's share of a batch: up to `max_tokens` tokens with up to `max_rows` rows of logits, in the order of the inputs.
fn next_chunks<'a>(feeds: &'a [Feed<'a>], max_tokens: usize, max_rows: usize) -> Vec<Chunk<'a>> {
    let (mut tokens_left, mut rows_left) = (max_tokens, max_rows);
    let mut chunks = Vec::new();
    for (input, feed) in feeds.iter().enumerate() {
        let rest = &feed.tokens[feed.done..];
        if rest.is_empty() {
            continue;
        }
        let mut take = rest.len().min(tokens_left);
        let mut head = feed.head;
        match head {
            Head::AllRows => take = take.min(rows_left),
            // The head is for the last token, and waits with it for a step that has room.
            Head::Sample(_) | Head::LastRow if take == rest.len() && rows_left == 0 => take -= 1,
            _ => {}
        }
        if take < rest.len() && !matches!(head, Head::AllRows) {
            head = Head::Nothing;
        }
        if take == 0 {
            break;
        }
        let position = feed.len + feed.done as u32;
        tokens_left -= take;
        rows_left -= head.rows(take);
        let (sequence, tokens) = (feed.sequence, &rest[..take]);
        chunks.push(Chunk { input, sequence, tokens, position, head, feed_tokens: &feed.tokens });
    }
    chunks
}

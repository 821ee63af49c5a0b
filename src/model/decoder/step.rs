//! One call, as many steps as it takes: new tokens go through the layers, and tokens or logits come back.

use std::borrow::Cow;
use std::sync::Arc;

use super::feed::{Chunk, Feed, StepLimits, next_chunks};
use super::input::{Drawn, Input, LogitRows, TokenLogprob};
use super::kernels::LayerKernels;
use super::rollback::Rollback;
use super::{Decoder, Text, storage};
use crate::gpu::{Readback, Upload};
use crate::model::error::{ModelError, ModelResult};
use crate::model::rows::Rows;
use crate::model::sampler::{Sampler, Sampling, SamplingRequest};
use crate::model::transformer::StepContext;
use crate::{BufferRef, KvCache, Result, SequenceId, Step, TokenTree};

/// Bytes of a sampled token.
const OUTPUT_BYTES: u64 = Sampler::OUTPUT_WORDS as u64 * 4;

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
        let drawn = self.sample(batch).await?;
        Ok(drawn.iter().map(|drawn| drawn.last().map(|last| last.token)).collect())
    }

    /// [`Decoder::step`] that returns all that was sampled: for each input none, or as many tokens as drafts were right, one after another, and one
    /// more, which is pending then; with log-probabilities if they were asked for.
    ///
    /// # Errors
    /// Those of [`Decoder::step`]; [`Error::Argument`](crate::Error::Argument) for drafts without sampling, or more of them than a step or the
    /// tokens before them allow, for parents that make no tree of them, for more replayed tokens than there are, and for sets of allowed tokens of another number or length.
    pub async fn draw(&mut self, batch: &[Input<'_>]) -> ModelResult<Vec<Vec<Drawn>>> {
        for input in batch {
            self.cached_text(input.sequence)?;
        }
        self.sample(batch).await
    }

    /// [`Decoder::draw`], also for sequences that only the cache knows.
    pub(super) async fn sample(&mut self, batch: &[Input<'_>]) -> ModelResult<Vec<Vec<Drawn>>> {
        for input in batch {
            if let Some(sampling) = input.sampling {
                sampling.validate()?;
            }
        }
        let mut feeds = self.feeds(batch.iter().map(|input| (*input, input.draws())))?;
        let rollback = Rollback::new(&self.cache, &feeds);
        let mut drawn = vec![Vec::new(); batch.len()];
        // Of inputs with a tree: the tokens of the tree that were right, the first of which was no draft.
        let mut paths: Vec<Option<Vec<u32>>> = vec![None; batch.len()];
        self.run(&mut feeds, |vocab, chunks, words| {
            let num_drawn = chunks.iter().map(|chunk| chunk.rows).sum::<usize>();
            let (output, mut logits) = words.split_at(num_drawn * Sampler::OUTPUT_WORDS as usize);
            let mut sampled = Sampler::read_output(output).into_iter();
            let mut accepted = Vec::new();
            for chunk in chunks {
                for sampled in sampled.by_ref().take(chunk.rows) {
                    let Some(token) = sampled.token else {
                        return Err(ModelError::BadLogits { sequence: chunk.sequence });
                    };
                    let top = chunk.draw.and_then(|(input, _)| input.logprobs);
                    let logprob = top.map(|top| {
                        let (row, rest) = logits.split_at(vocab);
                        logits = rest;
                        let row: Vec<f32> = row.iter().map(|&bits| f32::from_bits(bits)).collect();
                        TokenLogprob::of(&row, token, top as usize)
                    });
                    drawn[chunk.input].push(Drawn { token, logprob });
                }
                if let Some(tree) = chunk.tree {
                    let path = right_path(tree, chunk.tokens, &drawn[chunk.input]);
                    accepted.push((chunk.sequence, path.clone()));
                    paths[chunk.input] = Some(path);
                }
            }
            Ok(accepted)
        })
        .await?;
        for (((input, feed), drawn), path) in batch.iter().zip(&mut feeds).zip(&mut drawn).zip(paths) {
            if let Some(path) = path {
                *drawn = path.iter().map(|&token| drawn[token as usize].clone()).collect();
                let right = path.iter().map(|&token| feed.tokens[feed.wanted_from + token as usize]);
                feed.tokens = feed.tokens[..feed.wanted_from].iter().copied().chain(right).collect();
                continue;
            }
            let (_, drafts) = feed.tokens.split_at(feed.tokens.len() - input.drafts as usize);
            let right = drafts.iter().zip(drawn.iter()).take_while(|(draft, drawn)| **draft == drawn.token).count();
            let rejected = drafts.len() - right;
            drawn.truncate(right + 1);
            if rejected > 0 {
                let kept = feed.tokens.len() - rejected;
                self.cache.truncate(feed.sequence, feed.len + kept as u32)?;
                feed.tokens.to_mut().truncate(kept);
            }
        }
        rollback.disarm();
        self.extend_texts(&feeds);
        for (input, drawn) in batch.iter().zip(&drawn) {
            if let Some(text) = self.texts.get_mut(&input.sequence) {
                text.pending = drawn.last().map(|last| last.token);
            }
        }
        Ok(drawn)
    }

    /// Feeds each sequence its pending token and new ones, and returns logits: for each input one row or one row per token that was fed,
    /// `[rows, vocab_size]`. No token is pending afterwards.
    ///
    /// # Errors
    /// Those of [`Decoder::step`], except that logits are returned as they are, NaN included.
    pub async fn logits(&mut self, batch: &[(SequenceId, &[u32])], rows: LogitRows) -> ModelResult<Vec<Vec<f32>>> {
        for &(sequence, _) in batch {
            self.cached_text(sequence)?;
        }
        let rows_of = |tokens: &[u32]| match rows {
            LogitRows::Last => 1,
            // And one for the pending token.
            LogitRows::All => tokens.len() + 1,
        };
        let inputs = batch.iter().map(|&(sequence, tokens)| (Input::new(sequence, tokens), rows_of(tokens)));
        let mut feeds = self.feeds(inputs)?;
        let rollback = Rollback::new(&self.cache, &feeds);
        let mut logits = vec![Vec::new(); batch.len()];
        self.run(&mut feeds, |vocab, chunks, words| {
            let mut rest = words;
            for chunk in chunks {
                let (own, after) = rest.split_at(chunk.rows * vocab);
                logits[chunk.input].extend(own.iter().map(|&bits| f32::from_bits(bits)));
                rest = after;
            }
            Ok(Vec::new())
        })
        .await?;
        rollback.disarm();
        self.extend_texts(&feeds);
        Ok(logits)
    }

    /// Checks a batch against the model, before anything happens, and puts pending tokens in front. Each input comes with the number of its
    /// last tokens whose rows of the head are wanted; more than there are stands for all.
    fn feeds<'a>(&self, batch: impl ExactSizeIterator<Item = (Input<'a>, usize)>) -> ModelResult<Vec<Feed<'a>>> {
        let config = self.model.config();
        if batch.len() == 0 {
            return Err(ModelError::argument("batch", "no input", "at least one"));
        }
        let mut feeds: Vec<Feed<'a>> = Vec::with_capacity(batch.len());
        for (input, rows) in batch {
            let Input { sequence, tokens, .. } = input;
            let len = self.cache.seq_len(sequence)?;
            if feeds.iter().any(|other| other.sequence == sequence) {
                return Err(ModelError::argument("batch", format!("{sequence} twice"), "each sequence once"));
            }
            if let Some(id) = tokens.iter().find(|&&id| id >= config.vocab_size) {
                let rule = format!("an id below vocab_size, {}", config.vocab_size);
                return Err(ModelError::argument("tokens", format!("id {id} for {sequence}"), rule));
            }
            let pending = self.texts.get(&sequence).and_then(|text| text.pending);
            let tokens = match pending {
                Some(pending) => Cow::Owned([&[pending], tokens].concat()),
                None => Cow::Borrowed(tokens),
            };
            if tokens.is_empty() {
                let need = "at least one, as none is pending";
                return Err(ModelError::argument("tokens", format!("none for {sequence}"), need));
            }
            let tree = check_draws(&input, &tokens, config.vocab_size)?;
            if let Some(tree) = &tree {
                self.check_tree(tree)?;
            }
            // The drafts of a tree stand side by side.
            let beside = tree.as_ref().map_or(0, |tree| tree.len() - 1 - tree.depths().iter().max().unwrap_or(&0));
            if len as usize + tokens.len() - beside as usize > self.max_len() as usize {
                let got = format!("{len} + {} for {sequence}", tokens.len());
                let rule = format!("at most the model's {} positions", self.max_len());
                return Err(ModelError::argument("tokens", got, rule));
            }
            let sampled_once = input.drafts as usize + input.replayed as usize;
            let first_given = usize::from(pending.is_some());
            feeds.push(Feed {
                sequence,
                len,
                found: 0,
                done: 0,
                wanted_from: tokens.len().saturating_sub(rows),
                draw: input.sampling.map(|_| input),
                tree,
                given: first_given..tokens.len().saturating_sub(sampled_once).max(first_given),
                tokens,
            });
        }
        Ok(feeds)
    }

    /// Fails unless the last token before drafts that branch and these fit into a step, and the model adds up in any order.
    fn check_tree(&self, tree: &TokenTree) -> ModelResult<()> {
        if !self.takes_trees() {
            let why = if self.model.is_exact() { "the model is exact" } else { "the decoder is streaming" };
            return Err(ModelError::argument("parents", "a tree", format!("a line, as {why}")));
        }
        let most = self.max_tree_len();
        if tree.len() > most {
            let got = format!("{} tokens with the one before the drafts", tree.len());
            return Err(ModelError::argument("parents", got, format!("at most a step's, {most}")));
        }
        Ok(())
    }

    /// Whether drafts may branch: a tree's sums have another order than those of single steps, and sink tokens go with no tree.
    pub(crate) fn takes_trees(&self) -> bool {
        !self.model.is_exact() && self.options.streaming.is_none()
    }

    /// Most tokens of a tree, the one before the drafts included.
    pub(crate) fn max_tree_len(&self) -> u32 {
        let rows = self.max_logit_rows().min(TokenTree::MAX_LEN) as u32;
        rows.min(self.options.max_step_tokens)
    }

    /// Rows of logits that fit into a binding at a time.
    fn max_logit_rows(&self) -> usize {
        let limits = self.gpu().limits();
        let bytes = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        (bytes / (u64::from(self.model.config().vocab_size) * 4)).max(1) as usize
    }

    /// Runs a batch in as many steps as it takes. `finish` gets the words that each step has read back, and returns a path of each tree of the step.
    /// Texts don't change yet.
    async fn run(
        &mut self,
        feeds: &mut [Feed<'_>],
        mut finish: impl FnMut(usize, &[Chunk<'_>], &[u32]) -> ModelResult<Paths>,
    ) -> ModelResult<()> {
        let vocab = self.model.config().vocab_size as usize;
        self.find_prefixes(feeds)?;
        let left = feeds.iter().map(|feed| (feed.sequence, (feed.tokens.len() - feed.done) as u32));
        let left: Vec<_> = left.filter(|&(_, count)| count > 0).collect();
        let count: usize = left.iter().map(|&(_, count)| count as usize).sum();
        if count > self.options.max_step_tokens as usize {
            // Without room for all steps nothing is computed. One step for all would take the blocks that several will; with windows these take fewer.
            if self.cache.config().groups.has_windows() {
                self.cache.check_room(&left)?;
            } else {
                drop(self.cache.begin_step(&left)?);
            }
        }
        let limits = StepLimits {
            tokens: self.options.max_step_tokens as usize,
            rows: self.max_logit_rows(),
            exact: self.model.is_exact(),
        };
        loop {
            let chunks = next_chunks(feeds, limits);
            if chunks.is_empty() {
                return Ok(());
            }
            self.run_step(&chunks, |words| finish(vocab, &chunks, words)).await?;
            let done: Vec<_> = chunks.iter().map(|chunk| (chunk.input, chunk.tokens.len())).collect();
            for (input, count) in done {
                feeds[input].done += count;
                self.publish_ahead(&feeds[input]);
            }
        }
    }

    /// Makes the blocks that a feed has filled so far findable, if the next step may give some of them back.
    fn publish_ahead(&self, feed: &Feed<'_>) {
        let has_window = self.cache.config().groups.has_windows();
        if !(self.options.prefix_cache && has_window && feed.done < feed.tokens.len()) {
            return;
        }
        if let Some(text) = self.texts.get(&feed.sequence) {
            let exact = self.model.is_exact();
            let is_given = text.given == text.cached.len() as u32 && feed.given.start == 0;
            let done = if exact { feed.done.min(feed.given.end) } else { feed.done };
            // What follows a sampled token of an exact model is not published at all.
            if !exact || is_given {
                let tokens = [&text.cached[..], &feed.tokens[..done]].concat();
                // It can only fail for tokens that are not in the cache.
                let _ = self.cache.publish_prefix(feed.sequence, &tokens, PREFIX_SALT);
            }
        }
    }

    /// What was fed is part of the texts.
    fn extend_texts(&mut self, feeds: &[Feed<'_>]) {
        for feed in feeds {
            if let Some(text) = self.texts.get_mut(&feed.sequence) {
                if text.given == text.cached.len() as u32 && feed.given.start == 0 {
                    text.given += feed.given.end as u32;
                }
                text.cached.extend_from_slice(&feed.tokens);
                text.pending = None;
                text.prefix_len += feed.found as u32;
                if self.options.prefix_cache {
                    publish(&self.cache, feed.sequence, text, self.model.is_exact());
                }
            }
        }
    }

    /// Starts sequences that are empty with what is known of their tokens, except those that have rows of the head, which somebody may want.
    fn find_prefixes(&self, feeds: &mut [Feed<'_>]) -> ModelResult<()> {
        for feed in feeds.iter_mut() {
            if !self.options.prefix_cache || feed.len > 0 || !self.texts.contains_key(&feed.sequence) {
                continue;
            }
            let mut most = feed.wanted_from.min(feed.tokens.len() - 1);
            if self.model.is_exact() {
                // Tokens that were sampled are not in the index.
                most = most.min(feed.given.end);
            }
            if most == 0 {
                continue;
            }
            feed.found = self.cache.match_prefix_into(feed.sequence, &feed.tokens[..most], PREFIX_SALT)? as usize;
            feed.done = feed.found;
        }
        Ok(())
    }

    /// The kernels for a step with or without trees.
    fn layer_kernels(&self, has_trees: bool) -> &LayerKernels {
        self.tree_kernels.as_ref().filter(|_| has_trees).unwrap_or(&self.kernels)
    }

    /// One step: everything is recorded into one pass and submitted at once.
    async fn run_step(
        &mut self,
        chunks: &[Chunk<'_>],
        finish: impl FnOnce(&[u32]) -> ModelResult<Paths>,
    ) -> ModelResult<()> {
        let gpu = self.gpu().clone();
        let model = Arc::clone(&self.model);
        let vocab = model.config().vocab_size;
        let batch: Vec<_> = chunks.iter().map(|chunk| (chunk.sequence, chunk.tokens.len() as u32)).collect();
        let has_trees = chunks.iter().any(|chunk| chunk.tree.is_some());
        if has_trees && self.tree_kernels.is_none() {
            self.tree_kernels =
                Some(LayerKernels::new(&self.model, &self.cache, &self.layers, &self.options, true).await?);
        }
        let mut step = if has_trees {
            let trees: Vec<_> = chunks.iter().map(|chunk| chunk.tree.cloned()).collect();
            self.cache.begin_step_with_trees(&batch, &trees)?
        } else {
            self.cache.begin_step(&batch)?
        };
        let kernels: Vec<_> = chunks.iter().map(|chunk| chunk.kernel).collect();
        let plans = self.layer_kernels(has_trees).plan(&step, model.is_exact().then_some(&kernels[..]))?;

        let ids: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.tokens).copied().collect();
        let positions: Vec<u32> = chunks.iter().flat_map(Chunk::positions).collect();
        let mut head_rows = Vec::new();
        let mut start = 0;
        for chunk in chunks {
            let end = start + chunk.tokens.len();
            head_rows.extend((end - chunk.rows..end).map(|row| row as u32));
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

        // A row of the head, and how a token is drawn from it.
        let draws: Vec<_> = chunks
            .iter()
            .filter_map(|chunk| chunk.draw.map(|(input, first)| (chunk, input, first)))
            .flat_map(|(chunk, input, first)| (0..chunk.rows).map(move |row| (chunk, input, first + row, row)))
            .filter_map(|(chunk, input, draw, row)| Some((chunk, input, input.sampling?, draw, row)))
            .collect();
        let histories: Vec<_> = draws
            .iter()
            .map(|(chunk, _, sampling, _, row)| {
                self.history(chunk.sequence, &chunk.fed_to(chunk.tokens.len() - chunk.rows + row), sampling)
            })
            .collect();
        let requests: Vec<_> = draws
            .iter()
            .zip(&histories)
            .map(|(&(chunk, input, &sampling, draw, row), history)| SamplingRequest {
                sampling,
                // The position of the token that is drawn, so that a seed gives the same text however it is cut into steps.
                draw_index: chunk.position_of(chunk.tokens.len() - chunk.rows + row) + 1,
                history,
                logprob: false,
                allowed: input.allowed.get(draw).map(Vec::as_slice),
            })
            .collect();
        // What is read back: sampled tokens, then rows of logits; where nothing is sampled, all rows.
        let output_bytes = requests.len() as u64 * OUTPUT_BYTES;
        let row_bytes = u64::from(vocab) * 4;
        let mut logit_rows = Vec::new();
        let mut first_row = 0;
        for chunk in chunks {
            if chunk.draw.is_none_or(|(input, _)| input.logprobs.is_some()) {
                logit_rows.push((first_row, chunk.rows as u64));
            }
            first_row += chunk.rows as u64;
        }
        let num_logit_rows: u64 = logit_rows.iter().map(|(_, rows)| rows).sum();
        let result_bytes = output_bytes + num_logit_rows * row_bytes;
        let staging = self.reserve(num_head_rows, output_bytes, result_bytes)?;

        let mut encoder = gpu.encoder()?;
        {
            let descriptor = wgpu::ComputePassDescriptor { label: Some("folio decoder step"), timestamp_writes: None };
            let mut pass = gpu.scoped_now("running the model", || encoder.begin_compute_pass(&descriptor))?;
            lease.hold_in(&pass);
            let context = StepContext {
                cache: &self.cache,
                layers: self.layer_kernels(has_trees).contexts(&plans, rows),
                step: &step,
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
        if output_bytes > 0 {
            encoder.copy_buffer_to_buffer(&self.output, 0, staging.buffer(), 0, output_bytes);
        }
        let mut at = output_bytes;
        for (first, rows) in logit_rows.into_iter().filter(|&(_, rows)| rows > 0) {
            encoder.copy_buffer_to_buffer(&self.logits, first * row_bytes, staging.buffer(), at, rows * row_bytes);
            at += rows * row_bytes;
        }
        gpu.submit("running the model", encoder).await?;
        if num_head_rows > 0 {
            let words = staging.words(&gpu, result_bytes).await?;
            let paths = finish(&words)?;
            if has_trees {
                self.accept(&mut step, &paths).await?;
            }
        }
        self.staging = Some(staging);
        self.cache.commit(step)?;
        Ok(())
    }

    /// Keeps a path of each tree of a step. Submits, if rows move.
    async fn accept(&self, step: &mut Step, paths: &Paths) -> ModelResult<()> {
        let given: Vec<_> = paths.iter().map(|(sequence, path)| (*sequence, path.as_slice())).collect();
        let mut encoder = self.gpu().encoder()?;
        self.cache.accept(&mut encoder, step, &given)?;
        if given.iter().any(|(_, path)| (0..).zip(*path).any(|(to, &from)| from != to)) {
            self.gpu().submit("accepting drafts", encoder).await?;
        }
        Ok(())
    }

    /// All tokens before the one that is drawn after `fed`, if the repetition penalty asks for them.
    fn history(&self, sequence: SequenceId, fed: &[u32], sampling: &Sampling) -> Vec<u32> {
        if sampling.repetition_penalty == 1.0 {
            return Vec::new();
        }
        let before = self.texts.get(&sequence).map_or(&[][..], |text| &text.cached);
        [before, fed].concat()
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

/// Makes a sequence's full blocks findable, if there are new ones. Of an exact model only those that were given: the others have the bits of
/// another kernel than a prompt with the same tokens gets.
fn publish(cache: &KvCache, sequence: SequenceId, text: &mut Text, exact: bool) {
    let tokens = if exact { &text.cached[..text.given as usize] } else { &text.cached[..] };
    let full = tokens.len() as u32 / cache.config().block_size;
    // It can only fail for tokens that are not in the cache.
    if full > text.published && cache.publish_prefix(sequence, tokens, PREFIX_SALT).is_ok() {
        text.published = full;
    }
}

/// Paths of trees, by the sequence.
type Paths = Vec<(SequenceId, Vec<u32>)>;

/// The tokens of a tree that are what was sampled before them, from its root on, which always is. `sampled`: what comes after each.
fn right_path(tree: &TokenTree, tokens: &[u32], sampled: &[Drawn]) -> Vec<u32> {
    let mut path = vec![0];
    while let Some(&last) = path.last() {
        let next = sampled.get(last as usize).map(|drawn| drawn.token);
        let mut children = (0..).zip(tree.parents()).zip(tokens).filter(|((_, parent), _)| **parent == Some(last));
        match children.find(|&(_, &token)| Some(token) == next) {
            Some(((child, _), _)) => path.push(child),
            None => break,
        }
    }
    path
}

/// Checks what an input wants to be drawn. `tokens` are those that it feeds, the pending one included. Returns how the last one before the drafts and
/// these branch, if they do.
fn check_draws(input: &Input<'_>, tokens: &[u32], vocab: u32) -> ModelResult<Option<TokenTree>> {
    let (drafts, len) = (input.drafts as usize, tokens.len());
    if drafts > 0 && (input.sampling.is_none() || drafts >= len || drafts > input.tokens.len()) {
        let rule = "sampling, a token before them, and at most the tokens that are fed";
        return Err(ModelError::argument("drafts", format!("{drafts} of {len} tokens"), rule));
    }
    let tree = if input.parents.is_empty() {
        None
    } else if input.parents.len() != drafts {
        return Err(ModelError::argument("parents", input.parents.len(), format!("one per draft, {drafts}")));
    } else {
        // Errors count from the first draft. The root of the tree is the token before it.
        TokenTree::new(input.parents)?;
        let parents = input.parents.iter().map(|parent| Some(parent.map_or(0, |parent| parent.saturating_add(1))));
        let tree = TokenTree::new(&std::iter::once(None).chain(parents).collect::<Vec<_>>())?;
        Some(tree).filter(|tree| !tree.is_line())
    };
    if input.replayed as usize > input.tokens.len() - drafts {
        let rule = format!("at most the tokens before the drafts, {}", input.tokens.len() - drafts);
        return Err(ModelError::argument("replayed", input.replayed, rule));
    }
    let words = vocab.div_ceil(32) as usize;
    let wrong = input.allowed.iter().find(|set| set.len() != words);
    if !input.allowed.is_empty() && (input.allowed.len() != input.draws() || wrong.is_some()) {
        let got = format!("{} sets, of {} words", input.allowed.len(), wrong.map_or(words, Vec::len));
        let rule = format!("one for each of {} draws, of {words} words", input.draws());
        return Err(ModelError::argument("allowed", got, rule));
    }
    Ok(tree)
}

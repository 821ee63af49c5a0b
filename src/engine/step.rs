//! [`Engine::step`]: carries out what the scheduler decides.

use std::time::Duration;

use web_time::Instant;

use super::active::CacheView;
use super::drafts::DraftTree;
use super::grammar::Constraint;
use super::{Draftable, EndReason, Engine};
use crate::model::{Drawn, Input, ModelError, ModelResult};
use crate::schedule::{Costs, Preemption, RequestId, ScheduledChunk, StepSchedule};
use crate::{Error, ErrorKind, SequenceId};

/// What a step has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct StepReport {
    /// Tokens that went through the model, one for each of a number of requests.
    pub decode_tokens: u32,
    /// Tokens that went through the model in chunks of several.
    pub prompt_tokens: u32,
    /// Drafts that were verified, beside those.
    pub draft_tokens: u32,
    /// Drafts that were right.
    pub accepted_tokens: u32,
    /// Tokens that were sampled, for drafts that were right too.
    pub sampled_tokens: u32,
    /// What it took to decide which requests take part.
    pub schedule_time: Duration,
    /// Requests that started.
    pub admitted: u32,
    /// Requests that came back from the host's memory.
    pub resumed: u32,
    /// Requests that lost their blocks.
    pub preempted: u32,
    /// Requests that ended: complete, cancelled, late or failed.
    pub ended: u32,
}

/// Running means of what the scheduler has to weigh.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MeasuredCosts {
    swap_block: Option<Duration>,
    compute_token: Option<Duration>,
}

/// Tokens of a step from which on its time says what a token of a long chunk costs.
const MIN_MEASURED_TOKENS: u32 = 16;

impl MeasuredCosts {
    /// A mean that forgets half of what was before.
    fn note(mean: &mut Option<Duration>, time: Duration, count: u32) {
        let one = time / count.max(1);
        *mean = Some(mean.map_or(one, |mean| (mean + one) / 2));
    }
}

/// What goes into a step of the model.
struct Fed<'c> {
    chunk: &'c ScheduledChunk,
    sequence: SequenceId,
    tokens: Vec<u32>,
    /// How those among them that are drafts branch.
    parents: Vec<Option<u32>>,
    /// How many were sampled before.
    replayed: u32,
    /// What may come next.
    allowed: Vec<Vec<u32>>,
}

impl Engine {
    /// One step of the model for the requests whose turn it is. Hands out its tokens as events; ends requests that are complete, late, or
    /// cancelled by dropping their answers. Without requests it does nothing.
    ///
    /// Natively the future completes only while somebody polls the device: [`Gpu::block_on`](crate::Gpu::block_on). If it is dropped half-way, nothing is lost:
    /// requests go on from their texts, computed anew.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] and other failures of the device: all requests end with [`EndReason::Failed`]. A failure of a single request ends only
    /// that one, and is no error here.
    pub async fn step(&mut self) -> ModelResult<StepReport> {
        let mut report = StepReport::default();
        if std::mem::replace(&mut self.in_step, true) {
            self.start_over();
        }
        let before = self.requests.len();
        self.drop_cancelled();
        let result = self.scheduled_step(&mut report).await;
        report.ended = (before - self.requests.len()) as u32;
        self.in_step = false;
        self.last_step = report;
        self.num_steps += 1;
        self.num_sampled_tokens += u64::from(report.sampled_tokens);
        if let Err(error) = &result {
            self.fail_all(error);
        }
        result.map(|()| report)
    }

    /// Asks the proposer for drafts.
    async fn propose(&mut self) -> ModelResult<()> {
        let Self { proposer, requests, scheduler, decoder, max_drafts: most_drafts, .. } = self;
        let Some(proposer) = proposer else { return Ok(()) };
        let mut wanted = Vec::new();
        for (&id, request) in requests.iter_mut() {
            request.drafts = DraftTree::default();
            if scheduler.may_draft(id) {
                let most = request.depth.next(*most_drafts);
                if most > 0 {
                    wanted.push((id, most));
                }
            }
        }
        if wanted.is_empty() {
            return Ok(());
        }
        wanted.sort_unstable();
        let draftable = wanted.iter().filter_map(|&(id, max_drafts)| {
            let request = requests.get(&id)?;
            let (text, sampling, max_nodes) = (&request.text, &request.sampling, *most_drafts);
            Some(Draftable { request: id, text, sampling, max_drafts, max_nodes })
        });
        let draftable: Vec<_> = draftable.collect();
        let proposals = match proposer.propose(&draftable).await {
            Ok(proposals) => proposals,
            Err(error) if error.kind() == ErrorKind::DeviceLost => return Err(error),
            Err(_) => return Ok(()),
        };
        let vocab = decoder.model().config().vocab_size;
        let most_nodes = (*most_drafts).min(decoder.max_tree_len().saturating_sub(1));
        for ((id, most), drafts) in wanted.into_iter().zip(proposals) {
            let Some(request) = requests.get_mut(&id) else { continue };
            // A line is bit for bit what single steps are in an exact model, and a tree is not.
            let drafts = if decoder.takes_trees() { drafts } else { drafts.first_line() };
            let constraint = &mut request.constraint;
            request.drafts = drafts.pruned(most_nodes, most, |path| {
                let follows =
                    |constraint: &mut Constraint| constraint.valid(path).is_ok_and(|valid| valid == path.len());
                path.last().is_some_and(|&token| token < vocab) && constraint.as_mut().is_none_or(follows)
            });
            scheduler.set_drafts(id, request.drafts.len() as u32);
        }
        Ok(())
    }

    async fn scheduled_step(&mut self, report: &mut StepReport) -> ModelResult<()> {
        self.propose().await?;
        let now = self.start.elapsed();
        let view = CacheView { decoder: &self.decoder, requests: &self.requests };
        let start = Instant::now();
        let StepSchedule { expired, preempted, resumed, admitted, mut chunks, blocked } =
            self.scheduler.next_step(now, &view);
        report.schedule_time = start.elapsed();
        for id in expired {
            self.end(id, EndReason::TimeLimit);
        }
        for &(id, how) in &preempted {
            self.preempt(id, how).await?;
        }
        for &id in &resumed {
            if !self.resume(id).await? {
                chunks.retain(|chunk| chunk.request != id);
            }
        }
        for &(id, hit) in &admitted {
            if !self.admit(id, hit, now) {
                chunks.retain(|chunk| chunk.request != id);
            }
        }
        report.admitted = admitted.len() as u32;
        report.resumed = resumed.len() as u32;
        report.preempted = preempted.len() as u32;
        if let (Some(id), true) = (blocked, chunks.is_empty()) {
            // Nobody else is there who could give blocks back.
            let error =
                Error::argument("request", format!("{id} finds no blocks in an empty cache"), "the whole cache");
            self.end(id, EndReason::Failed((&ModelError::Folio(error)).into()));
        }
        if chunks.is_empty() { Ok(()) } else { self.compute(&chunks, report).await }
    }

    /// Runs the model, and hands out what was sampled.
    async fn compute(&mut self, chunks: &[ScheduledChunk], report: &mut StepReport) -> ModelResult<()> {
        let mut feeds = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let Some(request) = self.requests.get_mut(&chunk.request) else { continue };
            let Some(sequence) = request.sequence else { continue };
            if let Some(beams) = request.beams.as_ref().filter(|beams| beams.feeds().next().is_some()) {
                feeds.extend(beams.feeds().map(|(sequence, token)| Fed {
                    chunk,
                    sequence,
                    tokens: vec![token],
                    parents: Vec::new(),
                    replayed: 1,
                    allowed: Vec::new(),
                }));
                continue;
            }
            let cached = self.decoder.tokens(sequence)?.len();
            // The pending token is in the text, too, and the decoder feeds it by itself.
            let first = cached + usize::from(self.decoder.pending(sequence)?.is_some());
            let end = cached + chunk.tokens as usize;
            let drafts = request.drafts.tokens().get(..chunk.drafts as usize).unwrap_or_default();
            let parents = request.drafts.parents().get(..chunk.drafts as usize).unwrap_or_default().to_vec();
            let replayed = end - first.max(request.usage.prompt_tokens as usize).min(end);
            let allowed = match request.constraint.as_mut().filter(|_| chunk.samples) {
                Some(constraint) => request.drafts.along_paths(drafts.len(), |path| constraint.allowed(path)),
                None => Ok(Vec::new()),
            };
            match allowed {
                Ok(allowed) => {
                    let tokens = [&request.text[first..end], drafts].concat();
                    feeds.push(Fed { chunk, sequence, tokens, parents, replayed: replayed as u32, allowed });
                }
                Err(error) => self.end(chunk.request, EndReason::Failed((&error).into())),
            }
        }
        if feeds.is_empty() {
            return Ok(());
        }
        let inputs = feeds.iter().filter_map(|Fed { chunk, sequence, tokens, parents, replayed, allowed }| {
            let request = self.requests.get(&chunk.request)?;
            let mut input = Input::new(*sequence, tokens).with_replayed(*replayed);
            if chunk.samples {
                input = input.with_sampling(&request.sampling).with_draft_tree(parents).with_allowed(allowed);
                input.logprobs = request.logprobs;
                if let Some(beams) = &request.beams {
                    input.logprobs = Some(beams.top(request.stop_tokens.len()).max(request.logprobs.unwrap_or(0)));
                }
            }
            Some(input)
        });
        let inputs: Vec<_> = inputs.collect();
        let start = Instant::now();
        let drawn = match self.decoder.draw(&inputs).await {
            Ok(drawn) => drawn,
            Err(ModelError::BadLogits { sequence }) => {
                let bad = self.requests.iter().find(|(_, request)| request.sequences().any(|own| own == sequence));
                if let Some(&id) = bad.map(|(id, _)| id) {
                    self.end(id, EndReason::Failed((&ModelError::BadLogits { sequence }).into()));
                }
                return Ok(());
            }
            Err(ModelError::Folio(error)) if error.kind() == ErrorKind::Retry => {
                // The scheduler has counted wrong. Everybody waits, and starts again one after another.
                self.start_over();
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for fed in &feeds {
            // What the scheduler counts with. Without a window nothing happens.
            self.decoder.release_hidden(fed.sequence)?;
        }
        let now = self.start.elapsed();
        let tokens: u32 = chunks.iter().map(|chunk| chunk.tokens + chunk.drafts).sum();
        if tokens >= MIN_MEASURED_TOKENS {
            MeasuredCosts::note(&mut self.costs.compute_token, start.elapsed(), tokens);
            self.set_costs();
        }
        let mut drawn = feeds.into_iter().map(|fed| fed.chunk).zip(drawn).peekable();
        while let Some((chunk, first)) = drawn.next() {
            // Of several beams all, one after another.
            let mut rows = first;
            let mut num_texts = 1;
            while let Some((_, more)) = drawn.next_if(|(next, _)| next.request == chunk.request) {
                rows.extend(more);
                num_texts += 1;
            }
            if chunk.tokens == 1 {
                report.decode_tokens += num_texts;
            } else {
                report.prompt_tokens += chunk.tokens;
            }
            let is_search = self.requests.get(&chunk.request).is_some_and(|request| request.beams.is_some());
            if is_search && chunk.samples {
                self.finish_beams(chunk, &rows, num_texts, now, report)?;
            } else {
                self.finish_chunk(chunk, rows, now, report)?;
            }
        }
        Ok(())
    }

    /// Goes on with a beam search.
    fn finish_beams(
        &mut self,
        chunk: &ScheduledChunk,
        rows: &[Drawn],
        num_texts: u32,
        now: Duration,
        report: &mut StepReport,
    ) -> ModelResult<()> {
        let id = chunk.request;
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        let (Some(sequence), Some(beams)) = (request.sequence, &mut request.beams) else { return Ok(()) };
        request.usage.computed_tokens += chunk.tokens * num_texts;
        report.sampled_tokens += num_texts;
        let best = beams.advance(&mut self.decoder, sequence, rows, &request.stop_tokens, request.max_tokens)?;
        request.sequence = beams.first();
        let Some(best) = best else {
            self.scheduler.push_token(id);
            let cached = request.sequence.map_or(Ok(0), |first| self.decoder.tokens(first).map(<[u32]>::len))?;
            self.scheduler.set_cached(id, cached as u32);
            return Ok(());
        };
        for drawn in best.tokens {
            let logprob = match (drawn.logprob, request.logprobs) {
                (Some(mut logprob), Some(top)) => {
                    logprob.top.truncate(top as usize);
                    Some(logprob)
                }
                _ => None,
            };
            if let Some(reason) = request.push(Drawn { logprob, ..drawn }, now) {
                self.end(id, reason);
                return Ok(());
            }
        }
        self.end(id, best.stop.unwrap_or(EndReason::Length));
        Ok(())
    }

    fn finish_chunk(
        &mut self,
        chunk: &ScheduledChunk,
        drawn: Vec<Drawn>,
        now: Duration,
        report: &mut StepReport,
    ) -> ModelResult<()> {
        let id = chunk.request;
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        let Some(sequence) = request.sequence else { return Ok(()) };
        let accepted = drawn.len().saturating_sub(1) as u32;
        request.usage.computed_tokens += chunk.tokens + chunk.drafts;
        request.usage.drafted_tokens += chunk.drafts;
        request.usage.accepted_tokens += accepted;
        request.depth.note(request.drafts.depth(chunk.drafts), accepted);
        report.draft_tokens += chunk.drafts;
        report.accepted_tokens += accepted;
        for drawn in drawn {
            report.sampled_tokens += 1;
            self.scheduler.push_token(id);
            if let Some(reason) = request.push(drawn, now) {
                self.end(id, reason);
                return Ok(());
            }
        }
        self.scheduler.set_cached(id, self.decoder.tokens(sequence)?.len() as u32);
        Ok(())
    }

    /// Takes a request's blocks away.
    async fn preempt(&mut self, id: RequestId, how: Preemption) -> ModelResult<()> {
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        let Some(sequence) = request.sequence else { return Ok(()) };
        request.usage.preemptions += 1;
        if how == Preemption::Swap {
            // All of its blocks move, also those that others hold.
            let blocks = self.decoder.cache().config().held_blocks(self.decoder.tokens(sequence)?.len() as u32);
            let start = Instant::now();
            match self.decoder.swap_out(sequence).await {
                Ok(_) => {
                    MeasuredCosts::note(&mut self.costs.swap_block, start.elapsed(), blocks);
                    self.set_costs();
                    return Ok(());
                }
                Err(ModelError::Folio(error)) if error.kind() == ErrorKind::DeviceLost => return Err(error.into()),
                // Then it is computed again.
                Err(_) => self.scheduler.set_lost(id),
            }
        }
        request.sequence = None;
        self.decoder.free(sequence)
    }

    /// Brings a swapped-out request back. Returns whether it is there; if not, it waits to be computed again.
    async fn resume(&mut self, id: RequestId) -> ModelResult<bool> {
        let Some(request) = self.requests.get_mut(&id) else { return Ok(false) };
        let Some(sequence) = request.sequence else { return Ok(false) };
        match self.decoder.swap_in(sequence).await {
            Ok(()) => Ok(true),
            Err(ModelError::Folio(error)) if error.kind() == ErrorKind::DeviceLost => Err(error.into()),
            Err(_) => {
                request.sequence = None;
                self.scheduler.set_lost(id);
                self.decoder.free(sequence)?;
                Ok(false)
            }
        }
    }

    /// Gives a request a sequence. Returns whether it has as many tokens as the scheduler counts on.
    fn admit(&mut self, id: RequestId, hit: u32, now: Duration) -> bool {
        let view = CacheView { decoder: &self.decoder, requests: &self.requests };
        let Some(request) = self.requests.get(&id) else { return false };
        let fork = view.fork_of(request).filter(|&(_, len)| len == hit);
        let findable = view.findable(request);
        let forked = fork.and_then(|(sibling, len)| Some((self.decoder.fork_at(sibling, len).ok()?, len)));
        let (sequence, found) = forked.unwrap_or_else(|| {
            if hit > 0 {
                let found = self.decoder.match_prefix(findable);
                (found.sequence, found.len)
            } else {
                (self.decoder.create_sequence(), 0)
            }
        });
        let Some(request) = self.requests.get_mut(&id) else { return false };
        request.sequence = Some(sequence);
        request.note_start(now, found);
        self.scheduler.set_cached(id, found);
        found == hit
    }

    /// Ends requests that nobody waits for.
    fn drop_cancelled(&mut self) {
        let cancelled: Vec<_> =
            self.requests.iter().filter(|(_, request)| request.is_cancelled()).map(|(&id, _)| id).collect();
        for id in cancelled {
            self.end(id, EndReason::Shutdown);
        }
    }

    /// Ends a request: its blocks are free, and its last event is sent.
    pub(super) fn end(&mut self, id: RequestId, reason: EndReason) {
        self.scheduler.remove(id);
        if let Some(proposer) = &mut self.proposer {
            proposer.forget(id);
        }
        let Some(mut request) = self.requests.remove(&id) else { return };
        for sequence in request.take_sequences() {
            // It can only fail for a sequence that is gone.
            let _ = self.decoder.free(sequence);
        }
        request.end(reason, self.start.elapsed());
    }

    /// Ends all requests with an error of the device.
    fn fail_all(&mut self, error: &ModelError) {
        let ids: Vec<_> = self.requests.keys().copied().collect();
        for id in ids {
            self.end(id, EndReason::Failed(error.into()));
        }
    }

    /// Frees all sequences. Requests keep their texts, wait, and are computed anew.
    fn start_over(&mut self) {
        for (&id, request) in &mut self.requests {
            for sequence in request.take_sequences() {
                let _ = self.decoder.free(sequence);
            }
            if request.beams.is_some() {
                self.scheduler.restart(id);
            } else {
                self.scheduler.set_lost(id);
            }
        }
    }

    fn set_costs(&mut self) {
        let Costs { swap_block, compute_token } = self.scheduler.config().costs;
        let MeasuredCosts { swap_block: swap, compute_token: compute } = self.costs;
        self.scheduler.set_costs(Costs {
            swap_block: swap.unwrap_or(swap_block),
            compute_token: compute.unwrap_or(compute_token),
        });
    }
}

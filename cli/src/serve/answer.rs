//! Answers on their way from the engine to the client, whole or as a stream.
//!
//! The engine never waits for a client: what it makes lies in a channel until it is read. That is bounded by the `max_tokens` of the answer.
//! Where the client has gone, hyper drops the handler or the stream; with it go the answers, and that cancels them in the engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::http::HeaderValue;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use folio::engine::{Answer, EndReason, Event};
use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};

use super::error::ApiError;
use super::logprobs::{Logprobs, Pending};
use super::metrics::Outcome;
use super::prompt::Job;
use super::reply::{Head, Totals};
use super::state::{Server, unix_time};
use super::track::Record;

/// How often a stream without news says that it lives; a client that has gone is noticed by that.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// What comes of a choice.
enum Piece {
    /// Text, possibly none.
    Text(usize, String),
    /// Its last text, and the `finish_reason`.
    End(usize, String, &'static str),
}

/// The answers of a request.
struct Run {
    server: Arc<Server>,
    record: Arc<Record>,
    /// `None` comes last, also where the engine is gone without an end.
    events: SelectAll<BoxStream<'static, (usize, Option<Event>)>>,
    /// When each answer's last token came, until it ends.
    last_tokens: Vec<LastToken>,
    /// Answers to a prompt.
    count: usize,
    totals: Totals,
    /// Of each answer.
    logprobs: Vec<Pending>,
}

#[derive(Clone, Copy)]
enum LastToken {
    None,
    At(Instant),
    /// The answer has ended.
    Ended,
}

impl Run {
    fn new(server: Arc<Server>, record: Arc<Record>, answers: Vec<Answer>, count: u32, is_chat: bool) -> Self {
        let logprobs = answers.iter().map(|_| Pending::new(is_chat)).collect();
        let last_tokens = vec![LastToken::None; answers.len()];
        let events = answers.into_iter().enumerate().map(|(index, answer)| {
            let end = stream::once(std::future::ready(None));
            answer.map(Some).chain(end).map(move |event| (index, event)).boxed()
        });
        let count = (count as usize).max(1);
        let (events, totals) = (stream::select_all(events), Totals::default());
        Self { server, record, events, last_tokens, count, totals, logprobs }
    }

    /// What comes next of any answer. `None` after the ends of all.
    async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        loop {
            let (index, event) = self.events.next().await?;
            let last = self.last_tokens.get_mut(index)?;
            match event {
                Some(Event::Token { token, text, logprob, .. }) => {
                    let now = Instant::now();
                    let before = std::mem::replace(last, LastToken::At(now));
                    let gap = if let LastToken::At(before) = before { Some(now - before) } else { None };
                    self.server.metrics.token(gap);
                    self.record.add_token();
                    if let (Some(logprob), Some(pending)) = (logprob, self.logprobs.get_mut(index)) {
                        pending.push(&self.server.tokenizer, token, &logprob);
                    }
                    return Some(Ok(Piece::Text(index, text)));
                }
                Some(Event::End { reason, text, usage }) => {
                    *last = LastToken::Ended;
                    self.server.metrics.answer(&usage);
                    self.totals.add(&usage, index % self.count == 0);
                    return Some(self.finish_reason(&reason).map(|reason| Piece::End(index, text, reason)));
                }
                None if matches!(last, LastToken::Ended) => {}
                None => return Some(Err(self.server.ended())),
                // A kind of event that this server doesn't know has no text.
                Some(_) => {}
            }
        }
    }

    /// Log-probabilities of an answer that have not been sent.
    fn take_logprobs(&mut self, index: usize) -> Option<Logprobs> {
        self.logprobs.get_mut(index).and_then(Pending::take)
    }

    fn finish_reason(&self, reason: &EndReason) -> Result<&'static str, ApiError> {
        match reason {
            EndReason::StopToken(_) | EndReason::StopString(_) | EndReason::Complete => Ok("stop"),
            EndReason::Length | EndReason::Positions => Ok("length"),
            EndReason::TimeLimit => {
                let limit = self.server.limits.request_timeout.as_secs_f64();
                Err(ApiError::timeout(format!(
                    "the answer is not complete after {limit} s, which is the server's limit"
                )))
            }
            EndReason::Shutdown => Err(self.server.ended()),
            EndReason::Failed(failure) => Err(ApiError::failed(failure.message.clone())),
            other => Err(ApiError::failed(other.to_string())),
        }
    }
}

/// Hands a job to the engine and sends its answers.
///
/// # Errors
/// Where the engine refuses it, or an answer that isn't streamed fails.
pub(crate) async fn answer(server: Arc<Server>, record: Arc<Record>, job: Job) -> Result<Response, ApiError> {
    let Job { requests, count, is_chat, stream, include_usage } = job;
    let prompt_tokens: usize = requests.iter().map(|request| request.prompt.len()).sum();
    let answers = server.submit(requests, count).await?;
    record.add_prompt(u32::try_from(prompt_tokens).unwrap_or(u32::MAX));
    let kind = if is_chat { "chatcmpl" } else { "cmpl" };
    let head =
        Head { id: format!("{kind}-{}", record.id), created: unix_time(), model: server.model.name.clone(), is_chat };
    let run = Run::new(server, record, answers, count, is_chat);
    if stream { Ok(streamed(run, head, include_usage)) } else { whole(run, &head).await }
}

async fn whole(mut run: Run, head: &Head) -> Result<Response, ApiError> {
    let mut choices: Vec<_> = run.last_tokens.iter().map(|_| (String::new(), "stop")).collect();
    while let Some(piece) = run.next().await {
        let (index, text, end) = match piece? {
            Piece::Text(index, text) => (index, text, None),
            Piece::End(index, text, reason) => (index, text, Some(reason)),
        };
        if let Some((whole, finish_reason)) = choices.get_mut(index) {
            whole.push_str(&text);
            *finish_reason = end.unwrap_or(finish_reason);
        }
    }
    let choices = choices.into_iter().enumerate();
    let choices = choices.map(|(i, (text, reason))| head.whole(i, text, reason).with_logprobs(run.take_logprobs(i)));
    let choices = choices.collect();
    Ok(Json(head.reply(choices, run.totals)).into_response())
}

fn streamed(mut run: Run, head: Head, include_usage: bool) -> Response {
    run.record.begin_stream();
    let usage_to_come = include_usage.then_some(None);
    let events = async_stream::stream! {
        if head.is_chat {
            for index in 0..run.last_tokens.len() {
                yield SseEvent::default().json_data(head.chunk(Some(head.role(index)), usage_to_come));
            }
        }
        while let Some(piece) = run.next().await {
            let choice = match piece {
                // A part of a character, or what may become a stop string.
                Ok(Piece::Text(_, text)) if text.is_empty() => continue,
                Ok(Piece::Text(index, text)) => head.piece(index, text, None).with_logprobs(run.take_logprobs(index)),
                Ok(Piece::End(index, text, reason)) => {
                    head.piece(index, text, Some(reason)).with_logprobs(run.take_logprobs(index))
                }
                Err(error) => {
                    run.record.end(error.outcome());
                    yield SseEvent::default().json_data(error.body());
                    return;
                }
            };
            yield SseEvent::default().json_data(head.chunk(Some(choice), usage_to_come));
        }
        if include_usage {
            yield SseEvent::default().json_data(head.chunk(None, Some(Some(run.totals))));
        }
        run.record.end(Outcome::Ok);
        yield Ok(SseEvent::default().data("[DONE]"));
    };
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // So that nginx hands it on as it comes.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

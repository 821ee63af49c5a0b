//! Follows each request to the end of its response: one line in the log, and the metrics.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::metrics::Outcome;
use super::state::Server;

/// A request on its way. Ends when the last one who holds it lets go: the handler, or the stream of its answer.
pub(crate) struct Record {
    server: Arc<Server>,
    /// Also a header of the response, for those who look for its line in the log.
    pub(crate) id: String,
    /// At most some characters: clients may make up methods of any length.
    method: String,
    /// The route, not what the client wrote.
    endpoint: String,
    start: Instant,
    status: Mutex<Status>,
    prompt_tokens: AtomicU32,
    new_tokens: AtomicU32,
    /// A server that stops waits for it.
    _token: TaskTrackerToken,
}

#[derive(Clone, Copy, Default)]
struct Status {
    code: Option<StatusCode>,
    outcome: Option<Outcome>,
    /// The response goes on after its status is known.
    is_stream: bool,
}

impl Record {
    fn new(server: Arc<Server>, request: &Request) -> Self {
        let path = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str);
        Self {
            id: format!("{:016x}", fastrand::u64(..)),
            method: request.method().as_str().chars().take(16).collect(),
            endpoint: path.to_owned(),
            start: Instant::now(),
            status: Mutex::default(),
            prompt_tokens: AtomicU32::new(0),
            new_tokens: AtomicU32::new(0),
            _token: server.requests.token(),
            server,
        }
    }

    fn status(&self) -> std::sync::MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add_prompt(&self, tokens: u32) {
        self.prompt_tokens.fetch_add(tokens, Ordering::Relaxed);
        self.server.metrics.prompt(tokens);
    }

    pub(crate) fn add_token(&self) {
        self.new_tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// From now on the response counts as cancelled until [`end`](Self::end) says otherwise.
    pub(crate) fn begin_stream(&self) {
        self.status().is_stream = true;
    }

    /// How a stream has ended.
    pub(crate) fn end(&self, outcome: Outcome) {
        self.status().outcome = Some(outcome);
    }

    fn respond(&self, response: &Response) {
        let mut status = self.status();
        let code = response.status();
        status.code = Some(code);
        if !status.is_stream {
            let known = response.extensions().get::<Outcome>().copied();
            status.outcome = Some(known.unwrap_or(if code.is_client_error() {
                Outcome::Invalid
            } else if code.is_server_error() {
                Outcome::Failed
            } else {
                Outcome::Ok
            }));
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Status { code, outcome, .. } = *self.status();
        // Without one the connection was closed first.
        let outcome = outcome.unwrap_or(Outcome::Cancelled);
        let time = self.start.elapsed();
        self.server.metrics.request(&self.endpoint, outcome, time);
        let outcome = outcome.name();
        let Self { id, method, endpoint, .. } = self;
        let status = code.map_or(0, |code| code.as_u16());
        let (prompt_tokens, new_tokens) = (self.prompt_tokens.get_mut(), self.new_tokens.get_mut());
        let ms = time.as_secs_f64() * 1e3;
        // Probes come every few seconds.
        if matches!(endpoint.as_str(), "/health" | "/metrics") {
            tracing::debug!(%id, %method, %endpoint, status, outcome, ms, "request");
        } else {
            tracing::info!(%id, %method, %endpoint, status, outcome, prompt_tokens, new_tokens, ms, "request");
        }
    }
}

/// The outermost layer.
pub(crate) async fn track(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let record = Arc::new(Record::new(server, &request));
    request.extensions_mut().insert(Arc::clone(&record));
    let mut response = next.run(request).await;
    record.respond(&response);
    if let Ok(id) = HeaderValue::from_str(&record.id) {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}

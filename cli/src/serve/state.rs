//! What all requests share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use folio::engine::{Answer, EngineClient, Inspection, Request, SubmitError};
use folio::model::Tokenizer;
use serde::Serialize;
use tokio::sync::{Mutex, Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use super::error::ApiError;
use super::metrics::Metrics;
use crate::template::ChatTemplate;

/// What a request may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) max_body: usize,
    /// At most the model's positions.
    pub(crate) max_prompt_tokens: u32,
    pub(crate) max_choices: u32,
    pub(crate) request_timeout: Duration,
    pub(crate) body_timeout: Duration,
}

/// The model, as clients see it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ModelCard {
    #[serde(rename = "id")]
    pub(crate) name: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// Tokens of prompt and answer together.
    #[serde(rename = "max_model_len")]
    pub(crate) max_positions: u32,
}

impl ModelCard {
    pub(crate) fn new(name: String, max_positions: u32) -> Self {
        Self { name, object: "model", created: unix_time(), owned_by: "folio", max_positions }
    }
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Everything but the sockets.
pub(crate) struct Server {
    pub(crate) client: EngineClient,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) model: ModelCard,
    pub(crate) stop_tokens: Vec<u32>,
    /// Tokens that the cache has room for.
    pub(crate) max_cached_tokens: u32,
    /// Bytes of text in a token, at most, and more.
    pub(crate) longest_token: usize,
    pub(crate) limits: Limits,
    /// Without any, everybody may ask.
    pub(crate) keys: Vec<String>,
    pub(crate) metrics: Metrics,
    /// Requests that have not ended. Closed when the server stops.
    pub(crate) requests: TaskTracker,
    pub(crate) is_stopping: AtomicBool,
    /// Somebody at the terminal wants it to stop.
    pub(crate) stop_wish: Notify,
    pub(crate) permits: Permits,
    /// What was seen last.
    pub(crate) inspection: Arc<Mutex<LastInspection>>,
}

type LastInspection = Option<(Instant, Arc<Inspection>)>;

/// How much goes on at the same time that does not end when its client hangs up. Without them, clients who ask and leave could pile it up; those
/// who wait for a permit leave nothing behind.
pub(crate) struct Permits {
    /// To read bodies, short and long ones: a short one doesn't wait for many long ones.
    short: Arc<Semaphore>,
    long: Arc<Semaphore>,
    /// To hand requests to the engine, which takes them between two steps.
    submit: Arc<Semaphore>,
}

impl Permits {
    pub(crate) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let permits = |count| Arc::new(Semaphore::new(count));
        Self { short: permits(4 * cores), long: permits(cores), submit: permits(64) }
    }
}

async fn permit(permits: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, ApiError> {
    Arc::clone(permits).acquire_owned().await.map_err(|_| ApiError::stopping())
}

/// How long an inspection is good for. It costs the engine's thread time, so it must not be anybody's lever.
const INSPECTION_AGE: Duration = Duration::from_millis(50);

/// The longest body that counts as a short one.
const SHORT_BODY: usize = 64 << 10;

impl Server {
    /// Bytes of the longest text of a token, four times: normalisation may make texts shorter before they are cut into tokens.
    pub(crate) fn longest_token(tokenizer: &Tokenizer) -> usize {
        let len = |id| tokenizer.decode(&[id], false).map_or(0, |text| text.len());
        (0..tokenizer.vocab_size()).map(len).max().unwrap_or(0).max(4) * 4
    }

    /// Takes nothing new from now on.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
        self.requests.close();
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    /// What the engine and its cache look like. Several who ask at once share one look.
    ///
    /// # Errors
    /// [`SubmitError::Shutdown`].
    pub(crate) async fn inspect(&self) -> Result<Arc<Inspection>, SubmitError> {
        let mut last = Arc::clone(&self.inspection).lock_owned().await;
        if let Some((at, inspection)) = &*last
            && at.elapsed() < INSPECTION_AGE
        {
            return Ok(Arc::clone(inspection));
        }
        let client = self.client.clone();
        // A task of its own holds the lock until the engine has answered, also where the client doesn't wait for it.
        let look = tokio::spawn(async move {
            let inspection = Arc::new(client.inspect().await?);
            *last = Some((Instant::now(), Arc::clone(&inspection)));
            Ok(inspection)
        });
        look.await.map_err(|_| SubmitError::Shutdown)?
    }

    /// Runs work that takes the processor for long beside the reactor; `size` is that of what it works on.
    ///
    /// # Errors
    /// Those of the work, and 500 if it panics.
    pub(crate) async fn beside<T: Send + 'static>(
        self: &Arc<Self>,
        size: usize,
        work: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let broken = || ApiError::failed("the server failed to read the request");
        let permit = permit(if size > SHORT_BODY { &self.permits.long } else { &self.permits.short }).await?;
        let server = Arc::clone(self);
        let work = move || {
            // Also where the client has gone: the work goes on to its end.
            let _permit = permit;
            work(&server)
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| broken())?
    }

    /// Hands requests to the engine, each for `count` answers: all of them, or none.
    ///
    /// # Errors
    /// Why the engine doesn't take them.
    pub(crate) async fn submit(&self, requests: Vec<Request>, count: u32) -> Result<Vec<Answer>, ApiError> {
        let mut answers = Vec::new();
        for request in requests {
            if self.is_stopping() {
                return Err(ApiError::stopping());
            }
            let (client, permit) = (self.client.clone(), permit(&self.permits.submit).await?);
            let submit = tokio::spawn(async move {
                let _permit = permit;
                client.submit_many(request, count).await
            });
            let submitted = submit.await.unwrap_or(Err(SubmitError::Shutdown));
            answers.extend(submitted.map_err(|error| ApiError::refused(&error).unwrap_or_else(|| self.ended()))?);
        }
        Ok(answers)
    }

    /// Why the engine has ended.
    pub(crate) fn ended(&self) -> ApiError {
        match self.client.failure() {
            Some(failure) => ApiError::failed(format!("the engine has ended: {}", failure.message)),
            None if self.is_stopping() => ApiError::stopping(),
            None => ApiError::failed("the engine has ended"),
        }
    }

    /// What the server says about itself.
    pub(crate) fn health(&self) -> (StatusCode, &'static str) {
        if self.client.failure().is_some() || !(self.client.is_running() || self.is_stopping()) {
            (StatusCode::SERVICE_UNAVAILABLE, "failed")
        } else if self.is_stopping() {
            (StatusCode::SERVICE_UNAVAILABLE, "stopping")
        } else {
            (StatusCode::OK, "ok")
        }
    }
}

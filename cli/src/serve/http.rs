//! The routes.

use std::any::Any;
use std::error::Error as _;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body_util::BodyExt;
use serde_json::json;
use subtle::{Choice, ConstantTimeEq};
use tower_http::catch_panic::CatchPanicLayer;

use super::answer::answer;
use super::error::ApiError;
use super::prompt::Job;
use super::state::Server;
use super::track::{Record, track};

/// What OpenMetrics asks for.
const METRICS_TYPE: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// All that the server answers to.
pub(crate) fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(&server), authorize))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(Arc::clone(&server), track))
        .with_state(server)
}

type Api = Result<Response, ApiError>;

async fn completions(
    State(server): State<Arc<Server>>,
    Extension(record): Extension<Arc<Record>>,
    request: Request,
) -> Api {
    generate(server, record, request, false).await
}

async fn chat_completions(
    State(server): State<Arc<Server>>,
    Extension(record): Extension<Arc<Record>>,
    request: Request,
) -> Api {
    generate(server, record, request, true).await
}

async fn generate(server: Arc<Server>, record: Arc<Record>, request: Request, is_chat: bool) -> Api {
    if server.is_stopping() {
        return Err(ApiError::stopping());
    }
    let body = read_body(&server, request).await?;
    let job = server.beside(body.len(), move |server| Job::parse(server, &body, is_chat)).await?;
    answer(server, record, job).await
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    Json(json!({ "object": "list", "data": [&server.model] })).into_response()
}

async fn model(State(server): State<Arc<Server>>, id: Result<Path<String>, PathRejection>) -> Api {
    let Path(id) = id.map_err(|error| ApiError::invalid("model", error.body_text()))?;
    if id == server.model.name {
        Ok(Json(&server.model).into_response())
    } else {
        Err(ApiError::no_such_model(&id, &server.model.name))
    }
}

async fn health(State(server): State<Arc<Server>>) -> Response {
    let (status, text) = server.health();
    (status, Json(json!({ "status": text }))).into_response()
}

async fn metrics(State(server): State<Arc<Server>>) -> Api {
    // The counts are of use also when the engine has ended.
    if let Ok(inspection) = server.inspect().await {
        server.metrics.inspected(&inspection);
    }
    let text = server.metrics.text().map_err(|error| ApiError::failed(format!("metrics: {error}")))?;
    Ok(([(CONTENT_TYPE, METRICS_TYPE)], text).into_response())
}

async fn no_such_path() -> ApiError {
    let message =
        "path: got none of this server's, need /v1/completions, /v1/chat/completions, /v1/models, /health or /metrics";
    ApiError::rejected(StatusCode::NOT_FOUND, message)
}

async fn wrong_method(method: Method) -> ApiError {
    let message = format!("method: got {method}, need one of those in the header Allow");
    ApiError::rejected(StatusCode::METHOD_NOT_ALLOWED, message)
}

fn panicked(_: Box<dyn Any + Send>) -> Response {
    ApiError::failed("the server failed in handling the request").into_response()
}

/// Lets those pass who have a key. Whoever asks for the health needs none.
async fn authorize(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    if server.keys.is_empty() || request.uri().path() == "/health" || has_key(&server.keys, request.headers()) {
        return next.run(request).await;
    }
    let mut response = ApiError::unauthorized().into_response();
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// Takes the same time whichever key it is, and however much of it is right. Only its length may show.
fn has_key(keys: &[String], headers: &HeaderMap) -> bool {
    const SCHEME: &[u8] = b"bearer ";
    let Some((scheme, key)) =
        headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().split_at_checked(SCHEME.len()))
    else {
        return false;
    };
    let found = keys.iter().fold(Choice::from(0), |found, known| found | known.as_bytes().ct_eq(key));
    scheme.eq_ignore_ascii_case(SCHEME) && found.into()
}

/// Reads a body of JSON.
async fn read_body(server: &Server, request: Request) -> Result<Bytes, ApiError> {
    check_type(request.headers())?;
    let headers = request.headers();
    let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let most = server.limits.max_body;
    let too_large = || {
        let got = length.map_or_else(|| "more".to_owned(), |length| format!("{length} bytes"));
        let message = format!("body: got {got}, need at most {most} bytes");
        ApiError::rejected(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let is_large = length.is_some_and(|length| length > most);
    if is_large && headers.contains_key(EXPECT) {
        // The client waits for leave to send it.
        return Err(too_large());
    }
    let limit = server.limits.body_timeout;
    let read = async {
        let mut body = request.into_body();
        let bytes = if is_large { None } else { collect(&mut body, most).await? };
        if bytes.is_none() {
            discard(body, most).await;
        }
        bytes.ok_or_else(too_large)
    };
    let slow = |_| ApiError::slow_body(format!("body: not there after {} s", limit.as_secs_f64()));
    tokio::time::timeout(limit, read).await.map_err(slow)?
}

/// Only JSON: a browser asks the server before it sends that to another origin, and this server says no.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let got = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("none");
    let is_json =
        got.parse::<mime::Mime>().is_ok_and(|mime| mime.subtype() == mime::JSON || mime.suffix() == Some(mime::JSON));
    if is_json {
        Ok(())
    } else {
        let message = format!("Content-Type: got {got:?}, need application/json");
        Err(ApiError::rejected(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
    }
}

/// All of a body; `None` if it is longer than `most`.
async fn collect(body: &mut Body, most: usize) -> Result<Option<Bytes>, ApiError> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            ApiError::rejected(StatusCode::BAD_REQUEST, format!("body: {error}{cause}"))
        })?;
        if let Ok(data) = frame.into_data() {
            if data.len() > most - bytes.len() {
                return Ok(None);
            }
            bytes.extend_from_slice(&data);
        }
    }
    Ok(Some(bytes.into()))
}

/// Bodies that are this many times longer than they may are not even read to be thrown away.
const MAX_DISCARDED: usize = 16;

/// Reads on, so that the client, who is still sending, gets to read why it is refused; but not for ever.
async fn discard(mut body: Body, most: usize) {
    let mut left = most.saturating_mul(MAX_DISCARDED);
    while let Some(Ok(frame)) = body.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            return;
        }
    }
}

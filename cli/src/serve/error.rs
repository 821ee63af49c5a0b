//! What is wrong with a request, as OpenAI's clients read it: `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::header::{CONNECTION, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use folio::engine::SubmitError;
use folio::model::ModelError;
use folio::schedule::Refusal;
use folio::{Error, ErrorKind};
use serde::Serialize;

use super::metrics::Outcome;

/// Seconds after which a client that found the queue full may try again.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");

/// Characters of a message, at most: a parser's message may repeat what it got, which may be long.
const MAX_MESSAGE: usize = 400;

/// An error that goes to a client. Its message may repeat a part of the request, so it is not logged.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    outcome: Outcome,
}

/// The body of an error.
#[derive(Serialize)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorDetails<'a>,
}

#[derive(Serialize)]
struct ErrorDetails<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, outcome: Outcome, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if let Some((at, _)) = message.char_indices().nth(MAX_MESSAGE) {
            message.truncate(at);
            message.push_str(" ...");
        }
        Self { status, kind, code: None, param: None, message, outcome }
    }

    fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    pub(crate) fn with_param(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    /// The request breaks a rule.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::rejected(StatusCode::BAD_REQUEST, message).with_param(param)
    }

    /// The request is refused with another status than 400.
    pub(crate) fn rejected(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", Outcome::Invalid, message)
    }

    /// It asks for something that this server doesn't do.
    pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self::invalid(param, message).with_code("unsupported_parameter")
    }

    /// Prompt and new tokens are more than fit.
    pub(crate) fn too_long(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::invalid(param, message).with_code("context_length_exceeded")
    }

    pub(crate) fn no_such_model(name: &str, served: &str) -> Self {
        let message = format!("model: got {name:?}, need {served:?}, the one that is served here");
        Self::rejected(StatusCode::NOT_FOUND, message).with_param("model").with_code("model_not_found")
    }

    pub(crate) fn unauthorized() -> Self {
        let message = "Authorization: got no valid API key, need `Bearer KEY` with one of this server's keys";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", Outcome::Unauthorized, message)
            .with_code("invalid_api_key")
    }

    pub(crate) fn stopping() -> Self {
        let message = "the server is shutting down and takes no new requests";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Outcome::Unavailable, message)
            .with_code("shutting_down")
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Outcome::Failed, message)
            .with_code("engine_failed")
    }

    pub(crate) fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", Outcome::Timeout, message).with_code("timeout")
    }

    pub(crate) fn slow_body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Outcome::Timeout, message)
            .with_code("request_timeout")
    }

    /// Why the engine did not take a request, if it is not because it has ended.
    pub(crate) fn refused(error: &SubmitError) -> Option<Self> {
        let message = error.to_string();
        Some(match error {
            SubmitError::Refused(Refusal::QueueFull(_)) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Outcome::QueueFull, message)
                    .with_code("queue_full")
            }
            SubmitError::Refused(Refusal::TooLong { .. }) => Self::too_long("max_tokens", message),
            SubmitError::Refused(Refusal::DeadlinePassed) => Self::timeout(message),
            SubmitError::Refused(_) => Self::rejected(StatusCode::BAD_REQUEST, message),
            SubmitError::Invalid(ModelError::Folio(Error::Argument { argument, .. })) => {
                Self::invalid(param_of(argument), message)
            }
            SubmitError::Invalid(error) if error.kind() == ErrorKind::Caller => {
                Self::rejected(StatusCode::BAD_REQUEST, message)
            }
            SubmitError::Invalid(_) => Self::failed(message),
            _ => return None,
        })
    }

    /// The body, for an event in a stream that has begun already.
    pub(crate) fn body(&self) -> ErrorBody<'_> {
        let Self { kind, code, param, message, .. } = self;
        ErrorBody { error: ErrorDetails { message, kind, param: param.as_deref(), code: *code } }
    }

    pub(crate) const fn outcome(&self) -> Outcome {
        self.outcome
    }
}

/// The field of a request that an argument of the engine comes from.
fn param_of(argument: &str) -> &str {
    match argument {
        "count" => "n",
        "grammar" => "response_format",
        "stop_strings" => "stop",
        "text" => "prompt",
        other => other,
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.outcome {
            Outcome::QueueFull => {
                headers.insert(RETRY_AFTER, RETRY_AFTER_S);
            }
            // Whoever tries again shall find another server.
            Outcome::Unavailable => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response.extensions_mut().insert(self.outcome);
        response
    }
}

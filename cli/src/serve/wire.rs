//! The bodies of requests. Fields that are unknown are left out: OpenAI's clients send new ones all the time.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use folio::engine::Grammar;
use folio::model::Sampling;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::error::ApiError;
use super::logprobs::MAX_TOP;

/// Stop strings of a request, at most, and their bytes: after each token the text is compared with all of them.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;

/// The body of a request for completions or for a chat. A field that is `null` counts as left out.
#[derive(Debug, Deserialize)]
pub(crate) struct Body {
    pub(crate) model: Option<String>,
    pub(crate) prompt: Option<Prompt>,
    pub(crate) messages: Option<Vec<ChatMessage>>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) response_format: Option<ResponseFormat>,
    pub(crate) n: Option<u32>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    #[serde(default, deserialize_with = "float")]
    temperature: Option<f32>,
    #[serde(default, deserialize_with = "float")]
    top_p: Option<f32>,
    top_k: Option<i64>,
    #[serde(default, deserialize_with = "float")]
    min_p: Option<f32>,
    #[serde(default, deserialize_with = "float")]
    repetition_penalty: Option<f32>,
    seed: Option<Seed>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
    logprobs: Option<WantedLogprobs>,
    top_logprobs: Option<u32>,
}

/// Any number of JSON. One beyond f32 is an infinity, which is refused with the field's name; serde_json may be built to refuse it without.
fn float<'de, D: Deserializer<'de>>(number: D) -> Result<Option<f32>, D::Error> {
    Ok(Option::<f64>::deserialize(number)?.map(|number| number as f32))
}

/// What to continue.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "need a text, a list of texts, a list of token ids, or a list of lists of token ids")]
pub(crate) enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// A turn of a conversation.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatMessage {
    pub(crate) role: String,
    pub(crate) content: Option<Content>,
    pub(crate) tool_calls: Option<Value>,
    pub(crate) function_call: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "need a text, or a list of parts of type \"text\"")]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
pub(crate) struct Part {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) text: Option<String>,
}

/// What an answer must look like.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: JsonSchema },
}

#[derive(Debug, Deserialize)]
pub(crate) struct JsonSchema {
    schema: Option<Value>,
}

impl ResponseFormat {
    /// `None`: anything.
    pub(crate) fn grammar(&self) -> Option<Grammar> {
        match self {
            Self::Text => None,
            Self::JsonObject => Some(Grammar::JsonSchema(json!({ "type": "object" }).to_string())),
            // Without a schema any JSON is right.
            Self::JsonSchema { json_schema } => {
                let schema = json_schema.schema.as_ref().map_or_else(|| "{}".to_owned(), Value::to_string);
                Some(Grammar::JsonSchema(schema))
            }
        }
    }
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "need a whole number of 64 bits")]
enum Seed {
    Unsigned(u64),
    Signed(i64),
}

/// A switch in chats, a number in completions.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged, expecting = "need a whole number for completions, true or false for chats")]
enum WantedLogprobs {
    Switch(bool),
    Top(u32),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "need a text or a list of texts")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// What OpenAI's interface has and this server has not. Each may be there as long as it asks for nothing.
const UNSUPPORTED: [&str; 14] = [
    "audio",
    "best_of",
    "echo",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "modalities",
    "prediction",
    "presence_penalty",
    "suffix",
    "tool_choice",
    "tools",
    "web_search_options",
];

/// Bytes of a value that asks for nothing, at most: longer ones need not be looked at.
const MAX_NOTHING: usize = 64;

/// Whether a value asks for nothing: it is empty, or what happens without it.
fn asks_for_nothing(name: &str, value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0) || (name == "best_of" && number.as_u64() == Some(1)),
        Value::String(text) => {
            text.is_empty()
                || (matches!(name, "tool_choice" | "function_call") && matches!(text.as_str(), "none" | "auto"))
        }
        Value::Array(list) => list.is_empty() || (name == "modalities" && *list == [json!("text")]),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) => false,
    }
}

/// Reads JSON. An error names the field, in OpenAI's way: `messages[1].role`.
fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        if error.is_data() && path != "." {
            ApiError::invalid(path.as_str(), format!("{path}: {error}"))
        } else {
            ApiError::rejected(StatusCode::BAD_REQUEST, format!("body: need a JSON object: {error}"))
        }
    })?;
    json.end().map_err(|error| {
        ApiError::rejected(StatusCode::BAD_REQUEST, format!("body: need one JSON object and nothing after it: {error}"))
    })?;
    Ok(value)
}

impl Body {
    /// Reads a body.
    ///
    /// # Errors
    /// For what is no JSON, has fields of other types, or asks for what this server doesn't do.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let body = parse::<Self>(bytes)?;
        let fields = parse::<BTreeMap<String, &RawValue>>(bytes)?;
        for name in UNSUPPORTED {
            let Some(raw) = fields.get(name).map(|raw| raw.get()) else { continue };
            let is_nothing =
                raw.len() <= MAX_NOTHING && serde_json::from_str(raw).is_ok_and(|value| asks_for_nothing(name, &value));
            if !is_nothing {
                let message = format!("{name}: this server doesn't have it yet; need it left out");
                return Err(ApiError::unsupported(name, message));
            }
        }
        Ok(body)
    }

    /// How tokens are drawn; without a seed, by one of chance. Ranges are checked by the engine.
    pub(crate) fn sampling(&self) -> Sampling {
        let mut sampling = Sampling::default();
        sampling.temperature = self.temperature.unwrap_or(1.0);
        sampling.top_p = self.top_p;
        // Other servers take -1 or 0 for "all tokens".
        sampling.top_k = self.top_k.filter(|&k| k > 0).map(|k| u32::try_from(k).unwrap_or(u32::MAX));
        sampling.min_p = self.min_p;
        sampling.repetition_penalty = self.repetition_penalty.unwrap_or(1.0);
        sampling.seed = match self.seed {
            Some(Seed::Unsigned(seed)) => seed,
            Some(Seed::Signed(seed)) => seed.cast_unsigned(),
            None => fastrand::u64(..),
        };
        sampling
    }

    /// New tokens, at most, if the request says so.
    pub(crate) fn max_tokens(&self) -> Option<u32> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// Of each token, how probable it was, and so many others beside it.
    pub(crate) fn logprobs(&self, is_chat: bool) -> Result<Option<u32>, ApiError> {
        let (field, top) = match (is_chat, self.logprobs, self.top_logprobs) {
            (true, Some(WantedLogprobs::Switch(true)), top) => ("top_logprobs", Some(top.unwrap_or(0))),
            (false, Some(WantedLogprobs::Top(top)), None) => ("logprobs", Some(top)),
            (_, None | Some(WantedLogprobs::Switch(false)), None | Some(0)) => return Ok(None),
            (true, Some(WantedLogprobs::Top(_)), _) => {
                return Err(ApiError::invalid("logprobs", "logprobs: got a number, need true or false for a chat"));
            }
            (false, Some(WantedLogprobs::Switch(true)), _) => {
                return Err(ApiError::invalid("logprobs", "logprobs: got true, need a whole number for completions"));
            }
            (_, _, Some(_)) => {
                let message = "top_logprobs: got it without \"logprobs\": true, need both, and those for a chat";
                return Err(ApiError::invalid("top_logprobs", message));
            }
        };
        if let Some(top) = top.filter(|&top| top > MAX_TOP) {
            return Err(ApiError::invalid(field, format!("{field}: got {top}, need at most {MAX_TOP}")));
        }
        Ok(top)
    }

    pub(crate) fn ignore_eos(&self) -> bool {
        self.ignore_eos.unwrap_or(false)
    }

    /// The texts that end an answer.
    pub(crate) fn stop_strings(&mut self) -> Result<Vec<String>, ApiError> {
        let stops = match self.stop.take() {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Many(stops)) => stops,
        };
        if stops.len() > MAX_STOPS {
            let message = format!("stop: got {} texts, need at most {MAX_STOPS}", stops.len());
            return Err(ApiError::invalid("stop", message));
        }
        if let Some(long) = stops.iter().map(String::len).find(|&len| len > MAX_STOP_BYTES) {
            let message = format!("stop: got a text of {long} bytes, need at most {MAX_STOP_BYTES}");
            return Err(ApiError::invalid("stop", message));
        }
        Ok(stops)
    }
}

impl ChatMessage {
    /// Its text. `at` is its place in the list.
    pub(crate) fn text(self, at: usize) -> Result<String, ApiError> {
        let field = |name: &str| format!("messages[{at}].{name}");
        for (name, value) in [("tool_calls", &self.tool_calls), ("function_call", &self.function_call)] {
            if value.as_ref().is_some_and(|value| !asks_for_nothing(name, value)) {
                let name = field(name);
                return Err(ApiError::unsupported(
                    &name,
                    format!("{name}: this server has no tools; need it left out"),
                ));
            }
        }
        match self.content {
            None => Err(ApiError::invalid(field("content"), format!("{}: got none, need a text", field("content")))),
            Some(Content::Text(text)) => Ok(text),
            Some(Content::Parts(parts)) => parts
                .into_iter()
                .enumerate()
                .map(|(i, part)| match part {
                    Part { kind, text: Some(text) } if kind == "text" => Ok(text),
                    Part { kind, .. } => {
                        let name = format!("messages[{at}].content[{i}]");
                        let message = format!("{name}: got a part of type {kind:?}, need \"text\" with a text");
                        Err(ApiError::unsupported(&name, message))
                    }
                })
                .collect(),
        }
    }
}

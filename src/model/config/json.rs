//! JSON files of settings.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::model::architecture::{Flag, Optional};
use crate::model::{ModelError, ModelResult};
use crate::{Error, files};

/// Sizes above this are refused. The largest product, three times a projection's rows of up to 2^32, then stays far below 2^64, and every
/// published model is smaller by a factor of a thousand.
const MAX_SIZE: u64 = i32::MAX as u64;

fn not_json(path: &Path, error: serde_json::Error) -> ModelError {
    let reason = format!("not valid JSON at line {}, column {}", error.line(), error.column());
    ModelError::file_because(path, reason, error)
}

/// A JSON object and where it comes from.
pub(crate) struct JsonFile {
    path: PathBuf,
    object: Map<String, Value>,
}

impl JsonFile {
    pub(crate) fn read(path: PathBuf, max_bytes: u64) -> ModelResult<Self> {
        match files::read(&path, max_bytes) {
            Ok(text) => Self::parse(path, &text),
            Err(fault) => Err(ModelError::fault(path, fault)),
        }
    }

    pub(crate) fn parse(path: PathBuf, text: &[u8]) -> ModelResult<Self> {
        match serde_json::from_slice(text).map_err(|e| not_json(&path, e))? {
            Value::Object(object) => Ok(Self { path, object }),
            other => Err(ModelError::file(path, format!("got {}, need a JSON object", brief(&other)))),
        }
    }

    pub(crate) fn section(&self) -> Section<'_> {
        Section { path: &self.path, prefix: String::new(), object: &self.object }
    }
}

/// An object within a JSON file, which names its settings in errors.
pub(crate) struct Section<'a> {
    path: &'a Path,
    prefix: String,
    pub(super) object: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// Settings of a file; `prefix` stands before their names in errors.
    pub(crate) fn new(path: &'a Path, prefix: String, object: &'a Map<String, Value>) -> Self {
        Self { path, prefix, object }
    }

    /// A setting that is there and not null, which Hugging Face's files use alike.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn error(&self, key: &str, got: impl ToString, need: impl ToString) -> ModelError {
        let key = format!("{}{key}", self.prefix);
        ModelError::Config { path: self.path.to_owned(), key, got: got.to_string(), need: need.to_string() }
    }

    /// The error of a rule that a kernel has.
    pub(crate) fn rule(&self, key: &str, error: Error) -> ModelError {
        match error {
            Error::Argument { got, need, .. } => self.error(key, got, need),
            other => other.into(),
        }
    }

    pub(crate) fn wrong(&self, key: &str, need: &str) -> ModelError {
        let got = self.object.get(key).map_or_else(|| "nothing".to_owned(), brief);
        self.error(key, got, need)
    }

    pub(crate) fn optional<T>(
        &self,
        key: &str,
        need: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> ModelResult<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.wrong(key, need)),
        }
    }

    pub(crate) fn object(&self, key: &str) -> ModelResult<Option<Section<'a>>> {
        let object = self.optional(key, "an object", Value::as_object)?;
        Ok(object.map(|object| Section { path: self.path, prefix: format!("{}{key}.", self.prefix), object }))
    }

    /// All settings, if each is a string.
    pub(crate) fn strings(&self) -> ModelResult<Vec<(&'a str, &'a str)>> {
        let string = |(key, value): (&'a String, &'a Value)| {
            value.as_str().map(|value| (key.as_str(), value)).ok_or_else(|| self.wrong(key, "a string"))
        };
        self.object.iter().map(string).collect()
    }

    pub(crate) fn text(&self, key: &str) -> ModelResult<Option<&'a str>> {
        self.optional(key, "a string", Value::as_str)
    }

    pub(crate) fn flag(&self, flag: Flag) -> ModelResult<bool> {
        match flag {
            Flag::Always => Ok(true),
            Flag::Never => Ok(false),
            Flag::Key(key, default) => Ok(self.optional(key, "true or false", Value::as_bool)?.unwrap_or(default)),
        }
    }

    pub(crate) fn size(&self, key: &str) -> ModelResult<Option<u32>> {
        let read =
            |value: &Value| value.as_u64().filter(|n| (1..=MAX_SIZE).contains(n)).and_then(|n| n.try_into().ok());
        self.optional(key, "an integer from 1 to 2147483647", read)
    }

    /// A size that may be off.
    pub(super) fn optional_size(&self, setting: Optional<u32>) -> ModelResult<Option<u32>> {
        if self.object.contains_key(setting.key) { self.size(setting.key) } else { Ok(setting.default) }
    }

    /// The same for a number above 0.
    pub(super) fn optional_positive(&self, setting: Optional<f64>) -> ModelResult<Option<f64>> {
        if self.object.contains_key(setting.key) { self.positive(setting.key) } else { Ok(setting.default) }
    }

    /// A list of numbers above 0, of a given length.
    pub(super) fn factors(&self, key: &str, len: usize) -> ModelResult<Vec<f64>> {
        let need = format!("{len} numbers above 0, one for each pair of rotated dimensions");
        let number = |value: &Value| value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        let read = |values: &Vec<Value>| values.iter().map(number).collect::<Option<Vec<_>>>();
        let factors = self.optional(key, &need, |value| value.as_array().and_then(read))?;
        factors.filter(|factors| factors.len() == len).ok_or_else(|| self.wrong(key, &need))
    }

    pub(crate) fn needed_size(&self, key: &str) -> ModelResult<u32> {
        self.size(key)?.ok_or_else(|| self.error(key, "nothing", "an integer from 1 to 2147483647"))
    }

    pub(crate) fn number(&self, key: &str, need: &str, fits: impl FnOnce(f64) -> bool) -> ModelResult<Option<f64>> {
        // JSON has no infinity, but 1e999 would become one.
        self.optional(key, need, |value| value.as_f64().filter(|n| n.is_finite() && fits(*n)))
    }

    pub(crate) fn positive(&self, key: &str) -> ModelResult<Option<f64>> {
        self.number(key, "a number above 0", |n| n > 0.0)
    }

    /// A number above 0, of which f32 makes one.
    pub(super) fn single(&self, key: &str, number: f64) -> ModelResult<f32> {
        #[allow(clippy::cast_possible_truncation, reason = "f32 is what the kernels compute with")]
        let single = number as f32;
        let fits = single.is_finite() && single > 0.0;
        fits.then_some(single).ok_or_else(|| self.error(key, number, "a number above 0 that fits f32"))
    }

    pub(crate) fn factor(&self, key: &str) -> ModelResult<f64> {
        let need = "a number of at least 1";
        self.number(key, need, |n| n >= 1.0)?.ok_or_else(|| self.error(key, "nothing", need))
    }

    /// One id, or a list of them.
    pub(crate) fn ids(&self, key: &str) -> ModelResult<Option<Vec<u32>>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        self.optional(key, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            value => id(value).map(|id| vec![id]),
        })
    }
}

/// A JSON value, cut to what fits an error message.
pub(super) fn brief(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

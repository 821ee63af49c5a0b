//! Text to token ids and back.
//!
//! The library that does it, `tokenizers`, panics at some damaged files: when it loads them, or later at some text. What is known is refused before the
//! library sees it; for the rest every call of the library is guarded by [`catch_unwind`], so that a file is an error and never the end of the
//! program. Then the panic hook of the program has run, which by default prints a message. Where panics abort, as on wasm32, there is no such guard.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use serde_json::value::RawValue;
use tokenizers::normalizers::Precompiled;

use super::{ModelError, ModelResult, gguf};
use crate::files;

/// The longest file that is read: four times the 33 MB of the largest published ones, which have 262 144 tokens.
const MAX_BYTES: u64 = 128 << 20;

/// What a file is that the library refuses.
const NO_TOKENIZER: &str = "not a tokenizer that `tokenizers` reads";

/// What decoding makes of bytes that are no character, or not yet.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Tokens that a [`TextStream`] waits at most for a character to be complete. UTF-8 needs at most 4 bytes and a token has at least one; the
/// rest is room for tokens that decode to nothing.
const MAX_PENDING: usize = 32;

/// Tokens of the prompt that a [`TextStream`] looks at, to know whether the text goes on after a space: enough for one character and a
/// special token.
const CONTEXT: usize = 5;

/// A tokenizer of Hugging Face's `tokenizers`. Clones share it.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    path: Arc<Path>,
    tokenizer: Arc<tokenizers::Tokenizer>,
    vocab_size: u32,
}

impl Tokenizer {
    /// Reads `tokenizer.json`; a directory stands for the one in it. What the file says about padding and truncation is left out: a prompt is
    /// encoded as it is. A `.gguf` file has a tokenizer of its own.
    ///
    /// # Errors
    /// [`ModelError::File`] if the file is missing, unreadable, longer than 128 MiB, damaged, or no tokenizer; for a `.gguf` file also
    /// [`ModelError::Config`] for a setting of its tokenizer that is missing, wrong or not supported.
    pub fn from_file(path: impl AsRef<Path>) -> ModelResult<Self> {
        let mut path = path.as_ref().to_owned();
        if path.is_dir() {
            path.push("tokenizer.json");
        }
        let bytes = if gguf::is_gguf(&path) {
            gguf::tokenizer_json(&gguf::Header::read(&path)?)?
        } else {
            files::read(&path, MAX_BYTES).map_err(|fault| ModelError::fault(&path, fault))?
        };
        check(&path, &bytes)?;
        let load = || {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(&bytes)?;
            tokenizer.with_padding(None).with_truncation(None)?;
            let vocab_size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id.saturating_add(1));
            Ok::<_, tokenizers::Error>((tokenizer, vocab_size))
        };
        let (tokenizer, vocab_size) =
            guard(&path, "loading it", load)?.map_err(|e| ModelError::file_because(&path, NO_TOKENIZER, e))?;
        Ok(Self { path: path.into(), tokenizer: Arc::new(tokenizer), vocab_size })
    }

    /// The ids of a text. `add_special`: with those that the tokenizer puts around a text, such as a start token.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if the tokenizer has no ids for the text; [`ModelError::File`] if its file turns out to be damaged.
    pub fn encode(&self, text: &str, add_special: bool) -> ModelResult<Vec<u32>> {
        let encoding = guard(&self.path, "encoding a text", || self.tokenizer.encode_fast(text, add_special))?;
        let need = "text that the tokenizer has tokens for";
        encoding.map(|e| e.get_ids().to_vec()).map_err(|e| ModelError::argument("text", e, need))
    }

    /// The text of ids. Ids that the tokenizer doesn't know are left out, and with `skip_special` special tokens too. Bytes that are no
    /// UTF-8 become `U+FFFD`.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if the tokenizer's decoder fails; [`ModelError::File`] if its file turns out to be damaged.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> ModelResult<String> {
        let decode = || {
            let added = self.tokenizer.get_added_vocabulary();
            let has_text = |token: String| !(skip_special && added.is_special_token(&token));
            // One of the library's decoders counts down from the number of tokens, also from 0.
            if !ids.iter().any(|&id| self.tokenizer.id_to_token(id).is_some_and(has_text)) {
                return Ok(String::new());
            }
            self.tokenizer.decode(ids, skip_special)
        };
        guard(&self.path, "decoding tokens", decode)?
            .map_err(|e| ModelError::argument("ids", e, "ids that the tokenizer can decode"))
    }

    /// The id of a token: `<|endoftext|>`, say.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The bytes of each token, by a library that reads a `tokenizer.json`.
    #[cfg(feature = "grammar")]
    pub(crate) fn token_bytes<E: std::fmt::Display>(
        &self,
        read: impl FnOnce(Value) -> Result<Vec<Vec<u8>>, E>,
    ) -> ModelResult<Vec<Vec<u8>>> {
        let failed = |reason: String| ModelError::file(&*self.path, reason);
        let bytes = guard(&self.path, "reading its tokens", || {
            let json = self.tokenizer.to_string(false).map_err(|e| e.to_string())?;
            let json = serde_json::from_str(&json).map_err(|e| e.to_string())?;
            read(json).map_err(|e| e.to_string())
        })?;
        bytes.map_err(|e| failed(format!("got {e}, need tokens whose bytes are known, for a grammar")))
    }

    /// One more than the largest id.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Checks that a model with `vocab_size` rows in its embedding knows every id. It may have more: they are often padded.
    ///
    /// # Errors
    /// [`ModelError::File`] that names the tokenizer and both sizes.
    pub fn check_vocab_size(&self, vocab_size: u32) -> ModelResult<()> {
        if self.vocab_size > vocab_size {
            let largest = self.vocab_size - 1;
            let reason =
                format!("got token ids up to {largest}, need all below the model's vocab_size of {vocab_size}");
            return Err(ModelError::file(&*self.path, reason));
        }
        Ok(())
    }

    /// Starts to decode tokens one by one.
    #[must_use]
    pub fn stream(&self, skip_special: bool) -> TextStream {
        self.stream_after(&[], skip_special)
    }

    /// Starts to decode tokens one by one that go on after `prompt`, whose text is not repeated. Some tokenizers write a space before a
    /// word only if something comes before it.
    #[must_use]
    pub fn stream_after(&self, prompt: &[u32], skip_special: bool) -> TextStream {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        TextStream { tokenizer: self.clone(), skip_special, done: ids.len(), ids }
    }
}

/// Decodes tokens one by one. A character may be split among tokens, so text comes when its last character is complete.
///
/// `tokenizers::DecodeStream` has no end at which text that is held back comes out, holds text back without bound if a model makes bytes that
/// are no UTF-8, and fails if later bytes change how earlier ones are decoded.
#[derive(Clone, Debug)]
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The tokens of the last text that came, then those that wait.
    ids: Vec<u32>,
    /// How many of them have come.
    done: usize,
}

impl TextStream {
    /// Adds a token, and returns the text that is complete now, if any.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`]. The token counts as added.
    pub fn push(&mut self, id: u32) -> ModelResult<Option<String>> {
        self.ids.push(id);
        let text = self.waiting()?;
        let complete = !text.is_empty() && !text.ends_with(REPLACEMENT);
        if !complete && self.ids.len() - self.done < MAX_PENDING {
            return Ok(None);
        }
        // What has come is the context of what will.
        self.ids.drain(..self.done);
        self.done = self.ids.len();
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    /// The rest: a character that never became complete, as `U+FFFD`. Mostly empty.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn finish(self) -> ModelResult<String> {
        self.waiting()
    }

    /// The text of the tokens that wait.
    fn waiting(&self) -> ModelResult<String> {
        let context = self.tokenizer.decode(&self.ids[..self.done], self.skip_special)?;
        let all = self.tokenizer.decode(&self.ids, self.skip_special)?;
        match all.strip_prefix(&context) {
            Some(text) => Ok(text.to_owned()),
            // New bytes have changed what was decoded before, which has been shown already.
            None => self.tokenizer.decode(&self.ids[self.done..], self.skip_special),
        }
    }
}

/// Calls the library. A panic is the file's error.
fn guard<T>(path: &Path, doing: &str, call: impl FnOnce() -> T) -> ModelResult<T> {
    // Unwind safe: what is left behind is the tokenizer, which has no state but caches behind locks that tell when they are poisoned.
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
        ModelError::file(path, format!("damaged: `tokenizers` panicked in {doing}: {text}"))
    })
}

/// Refuses what the library is known to panic at: parts of a `tokenizer.json` that are no JSON, and those that contradict themselves.
fn check(path: &Path, bytes: &[u8]) -> ModelResult<()> {
    type Parts<'a> = BTreeMap<String, &'a RawValue>;
    // Vocabularies are long: they are looked over, and nothing is made of them.
    let parts: Parts<'_> = serde_json::from_slice(bytes).map_err(|e| {
        let reason = format!("{NO_TOKENIZER}: damaged at line {}, column {}", e.line(), e.column());
        ModelError::file_because(path, reason, e)
    })?;
    let damaged = |part: &str, fault| ModelError::file(path, format!("{NO_TOKENIZER}: {part}: {fault}"));
    let mut sound = Ok(());
    for (part, text) in parts.iter().filter(|(part, _)| *part != "model") {
        let value: Value = serde_json::from_str(text.get())
            .map_err(|e| ModelError::file_because(path, format!("{NO_TOKENIZER}: {part} is damaged"), e))?;
        each_object(&value, &mut |object| {
            if let Some(fault) = check_precompiled(object).or_else(|| check_template(object)) {
                sound = Err(damaged(part, fault));
            }
        });
    }
    sound?;
    // What is no object is left to the library, which says so.
    let model: Parts<'_> =
        parts.get("model").and_then(|text| serde_json::from_str(text.get()).ok()).unwrap_or_default();
    let part = |name| model.get(name).and_then(|text| serde_json::from_str::<Value>(text.get()).ok());
    let prefix = part("continuing_subword_prefix");
    let prefix = prefix.as_ref().and_then(Value::as_str).filter(|prefix| !prefix.is_empty());
    if let (Some(prefix), Some(Value::Array(merges))) = (prefix, part("merges")) {
        // The library cuts as many bytes off the second token of a merge, whatever they are.
        let second = |merge: &Value| match merge {
            Value::String(pair) => pair.split_once(' ').map(|(_, second)| second.to_owned()),
            pair => pair.get(1).and_then(Value::as_str).map(str::to_owned),
        };
        let short = merges.iter().filter_map(second).find(|second| second.get(prefix.len()..).is_none());
        if let Some(second) = short {
            let fault = format!("got {second:?} in merges, need tokens that start with the prefix {prefix:?}");
            return Err(damaged("model", fault));
        }
    }
    Ok(())
}

fn each_object(value: &Value, visit: &mut dyn FnMut(&serde_json::Map<String, Value>)) {
    match value {
        Value::Object(object) => {
            visit(object);
            object.values().for_each(|value| each_object(value, visit));
        }
        Value::Array(list) => list.iter().for_each(|value| each_object(value, visit)),
        _ => {}
    }
}

/// What is wrong with a table of characters in base64.
fn check_precompiled(object: &serde_json::Map<String, Value>) -> Option<String> {
    if object.get("type").and_then(Value::as_str) != Some("Precompiled") {
        return None;
    }
    // Its text is borrowed when it is parsed, so a value won't do.
    let text = Value::Object(object.clone()).to_string();
    serde_json::from_str::<Precompiled>(&text).err().map(|e| e.to_string())
}

/// Which special token a template names and doesn't define.
fn check_template(object: &serde_json::Map<String, Value>) -> Option<String> {
    // The library takes it for a template by these settings, whatever its type.
    let defined = |id: &str| object.get("special_tokens").is_some_and(|tokens| tokens.get(id).is_some());
    let pieces = ["single", "pair"].into_iter().filter_map(|name| object.get(name)?.as_array()).flatten();
    let mut ids = pieces.filter_map(|piece| piece.get("SpecialToken")?.get("id")?.as_str());
    ids.find(|id| !defined(id)).map(|id| format!("got the special token {id:?}, need it among special_tokens"))
}

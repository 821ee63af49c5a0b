//! Text to token ids and back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{ModelError, ModelResult};

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
    path: PathBuf,
    tokenizer: Arc<tokenizers::Tokenizer>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`; a directory stands for the one in it.
    ///
    /// # Errors
    /// [`ModelError::File`] if the file is missing, unreadable or no tokenizer.
    pub fn from_file(path: impl AsRef<Path>) -> ModelResult<Self> {
        let mut path = path.as_ref().to_owned();
        if path.is_dir() {
            path.push("tokenizer.json");
        }
        let failed = |reason: String| ModelError::File { path: path.clone(), reason };
        let bytes = std::fs::read(&path).map_err(|e| failed(e.to_string()))?;
        let tokenizer = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| failed(format!("not a tokenizer that `tokenizers` reads: {e}")))?;
        Ok(Self { path, tokenizer: Arc::new(tokenizer) })
    }

    /// The ids of a text. `add_special`: with those that the tokenizer puts around a text, such as a start token.
    ///
    /// # Errors
    /// [`ModelError::Argument`] if the tokenizer has no ids for the text.
    pub fn encode(&self, text: &str, add_special: bool) -> ModelResult<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, add_special);
        let need = "text that the tokenizer has tokens for";
        encoding.map(|e| e.get_ids().to_vec()).map_err(|e| ModelError::argument("text", e, need))
    }

    /// The text of ids. Ids that the tokenizer doesn't know are left out, and with `skip_special` special tokens too. Bytes that are no
    /// UTF-8 become `U+FFFD`.
    ///
    /// # Errors
    /// [`ModelError::Argument`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> ModelResult<String> {
        let need = "ids that the tokenizer can decode";
        self.tokenizer.decode(ids, skip_special).map_err(|e| ModelError::argument("ids", e, need))
    }

    /// The id of a token: `<|endoftext|>`, say.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// One more than the largest id.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id.saturating_add(1))
    }

    /// Checks that a model with `vocab_size` rows in its embedding knows every id. It may have more: they are often padded.
    ///
    /// # Errors
    /// [`ModelError::File`] that names the tokenizer and both sizes.
    pub fn check_vocab_size(&self, vocab_size: u32) -> ModelResult<()> {
        let ids = self.vocab_size();
        if ids > vocab_size {
            let reason =
                format!("got token ids up to {}, need all below the model's vocab_size of {vocab_size}", ids - 1);
            return Err(ModelError::File { path: self.path.clone(), reason });
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
    /// [`ModelError::Argument`] if the tokenizer's decoder fails. The token counts as added.
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
    /// [`ModelError::Argument`] if the tokenizer's decoder fails.
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

//! [`GgufMetadata`]: settings of a GGUF file for a program that runs its model.

use std::path::Path;

use super::super::ModelResult;
use super::reader::Header;
use super::tokenizer::id_key;

/// The settings of a GGUF file that a program asks for: its chat template, and texts of special tokens. Model and tokenizer read theirs themselves.
#[derive(Debug)]
pub struct GgufMetadata {
    header: Header,
}

impl GgufMetadata {
    /// Reads the header of a GGUF file, version 2 or 3.
    ///
    /// # Errors
    /// [`ModelError::File`](super::super::ModelError::File), [`ModelError::Config`](super::super::ModelError::Config) and
    /// [`ModelError::Tensor`](super::super::ModelError::Tensor), as for [`Checkpoint::open`](super::super::Checkpoint::open).
    pub fn open(path: impl AsRef<Path>) -> ModelResult<Self> {
        Ok(Self { header: Header::read(path.as_ref())? })
    }

    /// Whether [`Model::load`](super::super::Model::load) takes the path for a GGUF file: a name that ends with `.gguf`, and no folder.
    #[must_use]
    pub fn is_path(path: impl AsRef<Path>) -> bool {
        super::is_gguf(path.as_ref())
    }

    /// A text: `tokenizer.chat_template`, `general.name`, say. `None` if the file doesn't have it.
    ///
    /// # Errors
    /// [`ModelError::Config`](super::super::ModelError::Config) if it is no text.
    pub fn text(&self, key: &str) -> ModelResult<Option<&str>> {
        self.header.text(key)
    }

    /// The text of the token that the setting `tokenizer.ggml.<name>_token_id` names: `bos`, `eos`, `unknown`, `padding` and others. `None` if the file
    /// has no such setting.
    ///
    /// # Errors
    /// [`ModelError::Config`](super::super::ModelError::Config) if it is no id of a token.
    pub fn special_token(&self, name: &str) -> ModelResult<Option<&str>> {
        let key = id_key(name);
        let Some(id) = self.header.u32(&key)? else { return Ok(None) };
        let tokens = self.header.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
        let token = tokens.get(id as usize).map(String::as_str);
        token.map(Some).ok_or_else(|| self.header.error(&key, id, format!("one of the {} tokens", tokens.len())))
    }
}

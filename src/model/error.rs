//! The error type of loading and running a model.

use std::path::PathBuf;

use crate::Error;
use crate::SequenceId;

/// What can go wrong in loading or running a model. Every variant names the file, tensor or argument, what it got and what it needs.
///
/// A call that returns an error has changed nothing: no model is half-loaded, no sequence has grown.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file is missing, unreadable, truncated, or not what its name says.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what is needed.
        reason: String,
    },
    /// A setting in a JSON file is missing, has a wrong type or value, or asks for something that folio doesn't know.
    #[error("{path}: {key}: got {got}, need {need}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The setting, dotted: `rope_scaling.rope_type`.
        key: String,
        /// What the file says.
        got: String,
        /// What would be right.
        need: String,
    },
    /// A tensor is missing or has another shape or type than the configuration asks for.
    #[error("{path}: tensor {tensor}: got {got}, need {need}", path = path.display())]
    Tensor {
        /// The safetensors file, or the index that should have named it.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What the file has.
        got: String,
        /// What would be right.
        need: String,
    },
    /// An argument breaks a rule.
    #[error("{argument}: got {got}, need {need}")]
    Argument {
        /// Name of the argument or field.
        argument: &'static str,
        /// The value that was given.
        got: String,
        /// The rule that it breaks.
        need: String,
    },
    /// The model computed NaN for a sequence, or no finite logit at all: its weights or its cache hold NaN or infinities. No token was sampled for it.
    #[error(
        "logits of {sequence}: got NaN or no finite value, need finite logits; the weights or the cache are damaged"
    )]
    BadLogits {
        /// The sequence.
        sequence: SequenceId,
    },
    /// An error of the cache, of attention or of the device.
    #[error(transparent)]
    Folio(#[from] Error),
}

/// `Result` with [`ModelError`].
pub type ModelResult<T> = std::result::Result<T, ModelError>;

impl ModelError {
    pub(crate) fn argument(argument: &'static str, got: impl ToString, need: impl ToString) -> Self {
        Self::Argument { argument, got: got.to_string(), need: need.to_string() }
    }
}

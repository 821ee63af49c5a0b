//! The error type of loading and running a model.

use std::path::PathBuf;

use crate::files::Fault;
use crate::{Error, ErrorKind, SequenceId};

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
        /// The error of the system or of the parser, if one is behind it. It is not repeated in the text.
        source: Option<Cause>,
    },
    /// A setting in a JSON or GGUF file is missing, has a wrong type or value, or asks for something that folio doesn't know.
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
    /// A tensor is missing, has another shape or type than the configuration asks for, or doesn't lie where its file says.
    #[error("{path}: tensor {tensor}: got {got}, need {need}", path = path.display())]
    Tensor {
        /// The safetensors or GGUF file, or the index that should have named it.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What the file has.
        got: String,
        /// What would be right.
        need: String,
    },
    /// A finite weight doesn't fit the format it is to be stored in, F16: load it as F32 or in an integer format.
    #[error(
        "{tensor}: got {value} at row {row}, column {column}, need at most 65504 in magnitude for F16; load as F32 or in an \
         integer format", tensor = tensor.as_deref().unwrap_or("weights")
    )]
    Weight {
        /// Name of the tensor (of several, if they are put together), if the weights come from a model.
        tensor: Option<String>,
        /// The weight.
        value: f32,
        /// Its row: the output of the layer.
        row: u64,
        /// Its column: the input of the layer.
        column: usize,
    },
    /// The model computed NaN for a sequence, or no finite logit at all: its weights or its cache hold NaN or infinities. No token was sampled for it.
    #[error(
        "logits of {sequence}: got NaN or no finite value, need finite logits; the weights or the cache are damaged"
    )]
    BadLogits {
        /// The sequence.
        sequence: SequenceId,
    },
    /// An argument that breaks a rule, or an error of the cache, of attention or of the device.
    #[error(transparent)]
    Folio(#[from] Error),
}

/// `Result` with [`ModelError`].
pub type ModelResult<T> = std::result::Result<T, ModelError>;

/// The error behind a [`ModelError::File`].
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

impl ModelError {
    /// Who has to act.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File { .. } | Self::Config { .. } | Self::Tensor { .. } | Self::BadLogits { .. } => ErrorKind::File,
            Self::Weight { .. } => ErrorKind::Caller,
            Self::Folio(error) => error.kind(),
        }
    }

    pub(crate) fn argument(argument: &'static str, got: impl ToString, need: impl ToString) -> Self {
        Self::Folio(Error::argument(argument, got, need))
    }

    /// A [`ModelError::File`] that nothing else is behind.
    pub(crate) fn file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::File { path: path.into(), reason: reason.into(), source: None }
    }

    /// A [`ModelError::File`] with the error behind it.
    pub(crate) fn file_because(path: impl Into<PathBuf>, reason: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::File { path: path.into(), reason: reason.into(), source: Some(source.into()) }
    }

    pub(crate) fn fault(path: impl Into<PathBuf>, fault: Fault) -> Self {
        Self::File { path: path.into(), reason: fault.reason, source: fault.source.map(Into::into) }
    }
}

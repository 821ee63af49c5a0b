//! The one error type, grouped by who has to act.

use std::fmt;

use crate::ids::SequenceId;

/// Who has to act on an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The call was wrong: the program has to change.
    Caller,
    /// This adapter or device can't do it: choose another one, or a smaller shape.
    Device,
    /// Nothing is wrong, but it doesn't fit at the moment: free something, then try again.
    Retry,
    /// A file can't be read or written, or holds something else: another file or place is needed.
    File,
    /// wgpu or the driver reported a failure.
    Wgpu,
    /// The device is lost: open a new one, and make everything on it anew.
    DeviceLost,
}

/// What holds a sequence, so that nobody else may change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Holder {
    /// An open step.
    Step,
    /// A swap-out that is neither finished nor dropped.
    SwapOut,
    /// A defragmentation that is neither committed nor dropped.
    Defragmentation,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Step => "step",
            Self::SwapOut => "swap-out",
            Self::Defragmentation => "defragmentation",
        })
    }
}

/// An error of another library, kept as the [source](std::error::Error::source).
#[cfg(not(target_arch = "wasm32"))]
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// An error of another library, kept as the [source](std::error::Error::source). In a browser it may hold JavaScript objects, which stay on
/// their thread.
#[cfg(target_arch = "wasm32")]
pub type BoxError = Box<dyn std::error::Error>;

/// What can go wrong in folio. Every variant names what was given and what is needed.
///
/// A call that returns an error has changed nothing: no sequence, no block, no recorded command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
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
    /// The sequence was never created by this cache, or it has been freed.
    #[error(
        "sequence: {0} is not in this cache; need an id that it gave out and that has not been freed or swapped out"
    )]
    UnknownSequence(SequenceId),
    /// The sequence belongs to a step, a swap-out or a defragmentation that is still open.
    #[error("sequence: {sequence} is in an open {holder}; need that finished or dropped first")]
    SequenceBusy {
        /// The sequence.
        sequence: SequenceId,
        /// What holds it.
        holder: Holder,
    },
    /// The step, or its plan, can't be used any more, or not here; likewise a swap or a defragmentation.
    #[error("{what}: {reason}; need an open one of this cache")]
    Stale {
        /// "step", "plan", "swap-out", "swap-in" or "defragmentation".
        what: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// The adapter or device lacks something.
    #[error("{what}: need {need}, have {have}{}", hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default())]
    Unsupported {
        /// The limit, feature or shape.
        what: &'static str,
        /// What is needed.
        need: String,
        /// What there is.
        have: String,
        /// What would fit or help.
        hint: Option<String>,
    },
    /// No adapter was found, or none with the wanted name.
    #[error(
        "{wanted}; found {found}. On a machine without a GPU, the software adapter lavapipe works: \
         `apt-get install mesa-vulkan-drivers libvulkan1` on Debian and Ubuntu, \
         `dnf install mesa-vulkan-drivers vulkan-loader` on Fedora"
    )]
    NoAdapter {
        /// What was looked for.
        wanted: String,
        /// The names of the adapters that are there.
        found: String,
    },
    /// The pool has too few free blocks for the step. Free or truncate a sequence, then begin the step again.
    #[error("blocks: need {need}, have {free} free of {total}; free or truncate a sequence and try again")]
    OutOfBlocks {
        /// Blocks that the step needs, copies for shared blocks included.
        need: u32,
        /// Blocks that the step could have: free ones, and those that only the prefix index holds.
        free: u32,
        /// Blocks of the pool.
        total: u32,
    },
    /// A sequence of a contiguous cache would outgrow its row. Truncate it, then begin the step again.
    #[error("{sequence}: need {need} tokens, have max_seq_len, {max_seq_len}; truncate it and try again")]
    SequenceFull {
        /// The sequence.
        sequence: SequenceId,
        /// Tokens that it would have.
        need: u64,
        /// Tokens that a row has room for.
        max_seq_len: u32,
    },
    /// A file can't be read or written, or it isn't a sound file of a saved sequence.
    #[error("{file}: {reason}")]
    File {
        /// Its path.
        file: String,
        /// What is wrong with it, and what is needed.
        reason: String,
        /// The error of the system or of the parser, if one is behind it. It is not repeated in the text.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// wgpu or the driver reported a failure.
    #[error("{during}: {source}")]
    Wgpu {
        /// What folio was doing.
        during: &'static str,
        /// wgpu's own error.
        source: BoxError,
    },
    /// The device was lost: destroyed by its owner, removed, or given up by its driver. Nothing has changed.
    #[error("{during}: the device is lost; open a new one and make caches and models on it anew")]
    DeviceLost {
        /// What folio was doing.
        during: &'static str,
    },
    /// One of folio's own shader templates is broken: a defect of folio.
    #[error("composing a shader: {0}")]
    Shader(String),
}

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Who has to act.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Argument { .. }
            | Self::UnknownSequence(_)
            | Self::SequenceBusy { .. }
            | Self::Stale { .. }
            | Self::Shader(_) => ErrorKind::Caller,
            Self::Unsupported { .. } | Self::NoAdapter { .. } => ErrorKind::Device,
            Self::OutOfBlocks { .. } | Self::SequenceFull { .. } => ErrorKind::Retry,
            Self::File { .. } => ErrorKind::File,
            Self::Wgpu { .. } => ErrorKind::Wgpu,
            Self::DeviceLost { .. } => ErrorKind::DeviceLost,
        }
    }

    /// An [`Error::Argument`].
    #[must_use]
    pub fn argument(argument: &'static str, got: impl ToString, need: impl ToString) -> Self {
        Self::Argument { argument, got: got.to_string(), need: need.to_string() }
    }

    /// An [`Error::Unsupported`] without a hint.
    #[must_use]
    pub fn unsupported(what: &'static str, need: impl ToString, have: impl ToString) -> Self {
        Self::Unsupported { what, need: need.to_string(), have: have.to_string(), hint: None }
    }

    /// An [`Error::Unsupported`] with a hint at what would fit or help; any other error as it is.
    #[must_use]
    pub(crate) fn with_hint(self, hint: impl Into<String>) -> Self {
        match self {
            Self::Unsupported { what, need, have, .. } => {
                Self::Unsupported { what, need, have, hint: Some(hint.into()) }
            }
            error => error,
        }
    }

    /// An [`Error::Wgpu`].
    #[cfg(feature = "wgpu")]
    pub(crate) fn wgpu(during: &'static str, source: impl Into<BoxError>) -> Self {
        Self::Wgpu { during, source: source.into() }
    }
}

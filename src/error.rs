//! The one error type, grouped by who has to act.

use crate::cache::SequenceId;

/// Who has to act on an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
}

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
    /// The sequence belongs to a step, a swap-out or a defragmentation that is neither finished nor dropped.
    #[error("sequence: {0} is in an open step, swap-out or defragmentation; need that finished or dropped first")]
    SequenceInStep(SequenceId),
    /// The step (or its plan, a swap or a defragmentation) can't be used any more, or not here.
    #[error("step: {reason}; need an open step of this cache")]
    StaleStep {
        /// Why.
        reason: &'static str,
    },
    /// The adapter or device lacks something.
    #[error("{what}: need {need}, have {have}{hint}")]
    Unsupported {
        /// The limit, feature or shape.
        what: &'static str,
        /// What is needed.
        need: String,
        /// What there is.
        have: String,
        /// What would fit or help, empty or starting with "; ".
        hint: String,
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
    /// A row of a [`ContiguousCache`](crate::ContiguousCache) is too short for the step. Truncate or reset it, then begin the step again.
    #[error("row {row}: need {need} tokens, have max_seq_len, {max_seq_len}; truncate or reset the row and try again")]
    RowFull {
        /// Index in the batch.
        row: u32,
        /// Tokens that the row would have.
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
    #[error("{during}: {message}")]
    Wgpu {
        /// What folio was doing.
        during: &'static str,
        /// wgpu's own words.
        message: String,
    },
}

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Who has to act.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Argument { .. } | Self::UnknownSequence(_) | Self::SequenceInStep(_) | Self::StaleStep { .. } => {
                ErrorKind::Caller
            }
            Self::Unsupported { .. } | Self::NoAdapter { .. } => ErrorKind::Device,
            Self::OutOfBlocks { .. } | Self::RowFull { .. } => ErrorKind::Retry,
            Self::File { .. } => ErrorKind::File,
            Self::Wgpu { .. } => ErrorKind::Wgpu,
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
        Self::Unsupported { what, need: need.to_string(), have: have.to_string(), hint: String::new() }
    }
}

//! A decoder-only transformer on folio: loads Hugging Face checkpoints and generates text over the paged cache.
//!
//! Everything here is built on folio's public API, so it is also a worked example of a host: it owns its buffers and kernels for
//! the linear layers, norms and sampling, and calls [`KvCache`](crate::KvCache), [`Rope`](crate::Rope) and
//! [`Attention`](crate::Attention) for the rest.

mod architecture;
mod checkpoint;
mod config;
mod decoder;
mod error;
mod generate;
mod linear;
mod linear_kernels;
mod ops;
mod program;
mod progress;
mod quantise;
mod sampler;
mod tokenizer;
mod transformer;

pub use architecture::{Architecture, LayerWeights, LinearWeights, ModelWeights, NormWeights, Piece, TensorSource};
pub use checkpoint::Checkpoint;
pub use config::{ModelConfig, NormSettings, Position};
pub use decoder::{Decoder, DecoderOptions, Input, LogitRows};
pub use error::{Cause, ModelError, ModelResult};
pub use generate::{Finish, Generated, Prompt};
pub use linear::{Linear, LinearConfig};
pub use linear_kernels::{LinearKernel, LinearKernels, LinearVariant};
pub use ops::{Activation, ActivationKind, Norm, NormConfig, NormKind, NormParameters, PositionEmbedding, SelectRows};
pub(crate) use program::Program;
pub use program::{Binding, Rows, Source};
pub use progress::{Progress, progress_bar};
pub use quantise::WeightFormat;
pub use sampler::{Sampled, Sampler, SamplerStep, Sampling, SamplingRequest};
pub use tokenizer::{TextStream, Tokenizer};
pub use transformer::{Model, ModelOptions, WeightSource};

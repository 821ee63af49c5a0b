//! A decoder-only transformer on folio: loads Hugging Face checkpoints and generates text over the paged cache.
//!
//! It calls [`KvCache`](crate::KvCache), [`Rope`](crate::Rope) and [`Attention`](crate::Attention) as any host does, by their public API, and runs
//! kernels of its own for the linear layers, norms and sampling.

mod architecture;
mod builder;
mod checkpoint;
mod config;
mod decoder;
mod elements;
mod error;
mod experts;
mod generate;
mod gguf;
mod head_linear;
mod latent;
mod layer;
mod linear;
mod linear_config;
mod linear_kernels;
mod linear_sizes;
mod linear_upload;
mod linear_variant;
mod ops;
mod progress;
mod quantise;
mod rows;
mod sampler;
mod size;
mod tokenizer;
mod transformer;
#[cfg(all(feature = "tune", not(target_arch = "wasm32")))]
mod tune;

pub use architecture::{Architecture, LayerWeights, LinearWeights, ModelWeights, NormWeights, Piece, TensorSource};
pub use checkpoint::Checkpoint;
pub use config::{
    ExpertLayers, ExpertsConfig, LatentConfig, LayerKind, LayerPattern, LongContext, ModelConfig, NormSettings, QkNorm,
};
pub use decoder::{Decoder, DecoderOptions, Drawn, Input, LogitRows, Streaming, TokenLogprob};
pub use error::{Cause, ModelError, ModelResult};
pub use generate::{Finish, Generated, Prompt};
pub use gguf::GgufMetadata;
pub use head_linear::{HeadLinear, HeadLinearConfig, HeadRope};
pub use linear::{Linear, RmsNorm};
pub use linear_config::{Factor, LinearConfig, LinearExperts};
pub use linear_kernels::LinearKernels;
pub use linear_variant::{LinearKernel, LinearVariant};
pub use ops::{
    Activation, ActivationKind, ExpertGroups, GroupScore, Norm, NormConfig, NormKind, NormParameters,
    PositionEmbedding, Router, RouterConfig, Routes, Scoring, SelectRows,
};
pub use progress::{Progress, WarmUp};
pub use quantise::{WeightFormat, WeightGrid};
pub use rows::Rows;
pub use sampler::{Sampled, Sampler, Sampling, SamplingRequest};
pub use size::ModelSize;
pub use tokenizer::{TextStream, Tokenizer};
pub use transformer::{Model, ModelOptions, WeightSource};
#[cfg(all(feature = "tune", not(target_arch = "wasm32")))]
pub use tune::LinearTuneEvent;

//! What a decoder needs to know about a model, read from `config.json` and `generation_config.json`.

mod experts;
mod json;
mod latent;
mod layers;
mod parse;
mod rope;

use std::path::{Path, PathBuf};

use super::architecture::{Architecture, ModelWeights};
use super::ops::{ActivationKind, NormKind};
use super::{ModelError, ModelResult};
pub use experts::{ExpertLayers, ExpertsConfig};
pub(crate) use json::{JsonFile, Section};
pub use latent::LatentConfig;
pub use layers::{LayerKind, LayerPattern};
use parse::parse;
pub(crate) use parse::parse_as;

/// The longest file of settings that is read. A decoder's has some kilobytes; this is a thousand times that, and what it takes when it is parsed
/// (32 bytes for each value of two bytes) is still small beside a model.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// A decoder's shape and settings, whatever the architecture calls them.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Hugging Face's `model_type`.
    pub model_type: &'static str,
    /// Transformer layers.
    pub num_layers: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Query heads.
    pub num_q_heads: u32,
    /// Key and value heads; divides the query heads.
    pub num_kv_heads: u32,
    /// Width of a head's query and key. `num_q_heads * head_dim` may differ from `hidden_size`.
    pub head_dim: u32,
    /// Keys and values are projections of latents. `None`: heads have keys and values of their own.
    pub latent: Option<LatentConfig>,
    /// Width of the MLP between its two projections.
    pub intermediate_size: u32,
    /// Rows of the embedding: token ids are below it.
    pub vocab_size: u32,
    /// Tokens that a sequence may hold. With learned positions there are no more; with RoPE it's the length that the model is made for.
    pub max_positions: u32,
    /// All norms of the residual stream.
    pub norm: NormSettings,
    /// What some layers have in place of an MLP.
    pub experts: Option<ExpertsConfig>,
    /// What lies between the MLP's projections.
    pub activation: ActivationKind,
    /// `down(activation(gate(x)) * up(x))` instead of `down(activation(up(x)))`.
    pub gated_mlp: bool,
    /// Positions have a learned row each, which is added to the embedding.
    pub learned_positions: bool,
    /// What differs from layer to layer: rotary embeddings and windows.
    pub layers: LayerPattern,
    /// The same for longer texts than `max_positions`, if the model has settings of their own for them (LongRoPE): see
    /// [`ModelConfig::with_long_context`].
    pub long_context: Option<LongContext>,
    /// What the token embeddings are multiplied by.
    pub embedding_scale: Option<f32>,
    /// Factor of attention's logits. `None`: `1 / sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// Each head of each layer has a sink: see [`AttentionConfig::sinks`](crate::AttentionConfig::sinks).
    pub attention_sinks: bool,
    /// Soft cap of attention's logits: see [`AttentionConfig::softcap`](crate::AttentionConfig::softcap).
    pub attention_softcap: Option<f32>,
    /// `c * tanh(x / c)` on the logits of the head.
    pub logit_softcap: Option<f32>,
    /// Attention and MLP both read the layer's input, and both are added to it: GPT-NeoX, GPT-J.
    pub parallel_residual: bool,
    /// The query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Attention's output projection has a bias.
    pub output_bias: bool,
    /// The MLP's projections have a bias.
    pub mlp_bias: bool,
    /// Queries and keys are normalised, with the settings of `norm`, before RoPE.
    pub qk_norm: Option<QkNorm>,
    /// The head reuses the embedding, as far as the file says. A checkpoint that has both, and different, is not tied: see
    /// [`ModelWeights::head`](super::ModelWeights::head).
    pub tied_head: bool,
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text, in the order of the file. Empty if the files name none. May lie outside the vocabulary, and is never
    /// sampled then.
    pub eos_token_ids: Vec<u32>,
}

/// A norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSettings {
    /// Which one.
    pub kind: NormKind,
    /// Added to the mean square or to the variance.
    pub eps: f32,
    /// Added to the weights: 1 for files (Gemma's) that store `weight - 1`, otherwise 0.
    pub weight_offset: f32,
}

/// Over what queries and keys are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself: Qwen3, Gemma 3.
    PerHead,
    /// All heads of a token together: OLMo 2.
    AllHeads,
}

/// What a model does with texts that are longer than it was first trained on.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LongContext {
    /// In place of [`ModelConfig::layers`].
    pub layers: LayerPattern,
    /// In place of [`ModelConfig::max_positions`].
    pub max_positions: u32,
}

impl ModelConfig {
    /// Reads `config.json`, and `generation_config.json` if there is one, from a checkpoint's directory.
    ///
    /// # Errors
    /// [`ModelError::File`] if a file is missing, unreadable or no JSON object; [`ModelError::Config`] for a setting that is missing, of a
    /// wrong type or value, or not supported.
    pub fn from_dir(directory: impl AsRef<Path>) -> ModelResult<Self> {
        let directory = directory.as_ref();
        let config = JsonFile::read(directory.join("config.json"), MAX_CONFIG_BYTES)?;
        let generation = directory.join("generation_config.json");
        let generation = if generation.exists() { Some(JsonFile::read(generation, MAX_CONFIG_BYTES)?) } else { None };
        parse(&config.section(), generation.as_ref().map(JsonFile::section).as_ref())
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Those of [`ModelConfig::from_dir`].
    pub fn from_json(text: &str) -> ModelResult<Self> {
        parse(&JsonFile::parse(PathBuf::from("config.json"), text.as_bytes())?.section(), None)
    }

    /// The model as it reads long texts: with the frequencies of LongRoPE's `long_factor` and up to all of its positions. They hold for every
    /// token of a text, so a text is read in one way from its beginning. transformers changes from one to the other at the original length.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if [`ModelConfig::long_context`] is empty.
    pub fn with_long_context(mut self) -> ModelResult<Self> {
        let long = self.long_context.take();
        let need = "a model with longrope and more positions than it was first trained on";
        let long = long.ok_or_else(|| ModelError::argument("long_context", self.model_type, need))?;
        (self.layers, self.max_positions) = (long.layers, long.max_positions);
        Ok(self)
    }

    /// What a complete checkpoint of such a model holds, for a [`WeightSource`](super::WeightSource) of one's own.
    ///
    /// # Errors
    /// Those of [`ModelConfig::architecture`].
    pub fn weights(&self) -> ModelResult<ModelWeights> {
        self.architecture()?.resolve(self, |_| true, |_| Ok(()))
    }

    /// The table that describes the model's files and settings.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if `model_type` was changed to one that folio doesn't know.
    pub fn architecture(&self) -> ModelResult<&'static Architecture> {
        Architecture::find(self.model_type)
            .ok_or_else(|| ModelError::argument("model_type", self.model_type, Architecture::known()))
    }

    /// Width of all query heads together.
    #[must_use]
    pub fn q_width(&self) -> usize {
        self.num_q_heads as usize * self.head_dim as usize
    }

    /// Width of what attention yields of all query heads together: that of their values.
    #[must_use]
    pub fn attended_width(&self) -> usize {
        self.num_q_heads as usize * self.latent.as_ref().map_or(self.head_dim, |latent| latent.value_dim) as usize
    }

    /// Width of all key heads together; values have the same.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads as usize * self.head_dim as usize
    }
}

//! Architectures as data: what each one calls its settings and its tensors, and what its layers are made of.
//!
//! A new architecture is a new row of the table, as long as its layers are made of the same parts.

mod experts;
mod table;
mod weights;

use super::ModelResult;
use super::config::{ModelConfig, QkNorm};
use super::ops::NormKind;
pub(crate) use experts::{ExpertNames, ExpertTensors, Experts, GroupKeys};
use table::ARCHITECTURES;
use weights::Build;
pub use weights::{LayerWeights, LinearWeights, ModelWeights, NormWeights, Piece, TensorSource};

/// One architecture of Hugging Face transformers.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    pub(crate) model_type: &'static str,
    pub(crate) config: ConfigKeys,
    pub(crate) norm: NormKind,
    /// Added to the weights of norms, which files may store relative to 1.
    pub(crate) norm_offset: f32,
    pub(crate) positions: Positions,
    pub(crate) parallel_residual: Flag,
    pub(crate) qkv_bias: Flag,
    pub(crate) output_bias: Flag,
    pub(crate) mlp_bias: Flag,
    pub(crate) tied_head: Flag,
    pub(crate) window: Option<Window>,
    /// The number whose root divides logits of attention: its key and default. `None`: the width of a head.
    pub(crate) query_scalar: Option<(&'static str, f64)>,
    /// Soft caps of attention and of the head.
    pub(crate) attention_softcap: Option<Optional<f64>>,
    pub(crate) logit_softcap: Option<Optional<f64>>,
    /// Keys and values are projections of latents.
    pub(crate) latent: Option<LatentKeys>,
    /// Embeddings are multiplied by the root of the hidden size.
    pub(crate) scaled_embedding: bool,
    /// What some layers have in place of an MLP.
    pub(crate) experts: Option<Experts>,
    pub(crate) tensors: TensorNames,
}

/// What `config.json` calls the settings. Defaults are those of transformers' configuration classes; what has none must be there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConfigKeys {
    pub(crate) num_layers: &'static str,
    pub(crate) hidden_size: &'static str,
    pub(crate) num_q_heads: &'static str,
    /// `None`: as many as query heads. So too if it is null.
    pub(crate) num_kv_heads: Option<&'static str>,
    /// What a missing key stands for. `None`: as many as query heads.
    pub(crate) default_num_kv_heads: Option<u32>,
    pub(crate) head_dim: Option<&'static str>,
    /// `None`: the hidden size over the query heads.
    pub(crate) default_head_dim: Option<u32>,
    pub(crate) intermediate_size: &'static str,
    pub(crate) default_intermediate_size: SizeDefault,
    pub(crate) vocab_size: &'static str,
    pub(crate) max_positions: &'static str,
    pub(crate) norm_eps: (&'static str, f64),
    pub(crate) activation: (&'static str, &'static str),
    /// Settings that must have this value, also their default.
    pub(crate) fixed: &'static [(&'static str, bool)],
    /// Settings that must be missing or null.
    pub(crate) absent: &'static [&'static str],
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum SizeDefault {
    Required,
    TimesHidden(u32),
}

/// A yes or no that an architecture fixes, or a setting decides: its key and its default.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Flag {
    Always,
    Never,
    Key(&'static str, bool),
}

/// A setting that may be off: its key, and what a missing one stands for. `null` is off.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Optional<T> {
    pub(crate) key: &'static str,
    pub(crate) default: Option<T>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Positions {
    Learned,
    Rope(RopeKeys),
}

/// Half-split RoPE.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RopeKeys {
    /// The top-level keys, in order, of its base, and the default.
    pub(crate) theta: &'static [&'static str],
    pub(crate) default_theta: f64,
    /// The same for the rotated part of a head.
    pub(crate) partial: &'static [&'static str],
    pub(crate) default_partial: f64,
    /// Whether a model without scaling is refused, because transformers scales it by settings that no file shows.
    pub(crate) needs_scaling: bool,
    /// Older names of `longrope`.
    pub(crate) long_names: &'static [&'static str],
    /// Layers with a window have a base of their own, to which no scaling at the top level applies: its key and default.
    pub(crate) windowed_theta: Option<(&'static str, f64)>,
    /// Some layers have none: the key of a list with a 0 for each of them; without the list, the key of a number n, and its default: every
    /// n-th layer.
    pub(crate) skipped: Option<(&'static str, &'static str, u32)>,
}

/// Sizes of latents, each by its key and default.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LatentKeys {
    pub(crate) q_rank: Optional<u32>,
    pub(crate) kv_rank: (&'static str, u32),
    /// Elements of a head's query and key: those that are rotated, and the others.
    pub(crate) rope_dim: (&'static str, u32),
    pub(crate) nope_dim: (&'static str, u32),
    pub(crate) value_dim: (&'static str, u32),
    /// Whether neighbours are rotated together.
    pub(crate) interleaved: Flag,
}

/// Which layers see the newest keys only.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// Must be true, or there is none.
    pub(crate) switch: Option<&'static str>,
    pub(crate) size: Optional<u32>,
    pub(crate) layers: WindowedLayers,
}

/// Which layers a window counts for. All but the first are asked only if there is no `layer_types`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum WindowedLayers {
    All,
    /// Those from the one with this number on: its key and default.
    From(&'static str, u32),
    /// Those without RoPE.
    WithoutRope,
    /// All but every n-th: the key of n, if it can be set, and its default.
    AllBut(Option<&'static str>, u32),
}

/// Names of tensors. `{i}` stands for the layer; `.weight` and `.bias` are appended. All but the head's follow the prefix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorNames {
    /// What files put before the names, in the order in which they are tried: a bare model is saved without it.
    pub(crate) prefixes: &'static [&'static str],
    pub(crate) embedding: &'static str,
    pub(crate) position_embedding: Option<&'static str>,
    /// Norms before attention, and of what it adds to the residual stream.
    pub(crate) attn_norm: Option<&'static str>,
    pub(crate) post_attn_norm: Option<&'static str>,
    pub(crate) qkv: Qkv,
    pub(crate) output: &'static str,
    /// Sinks of attention, a vector.
    pub(crate) sinks: Option<&'static str>,
    /// Norms of queries and of keys.
    pub(crate) qk_norm: Option<(QkNorm, [&'static str; 2])>,
    /// Norms before the MLP, and of what it adds.
    pub(crate) mlp_norm: Option<&'static str>,
    pub(crate) post_mlp_norm: Option<&'static str>,
    pub(crate) up: Up,
    pub(crate) down: &'static str,
    pub(crate) final_norm: &'static str,
    pub(crate) head: &'static str,
    /// Linear weights are stored as `[in, out]`.
    pub(crate) transposed: bool,
    /// Ends of names that hold no parameters: masks and frequencies that old versions of transformers saved.
    pub(crate) ignored: &'static [&'static str],
}

/// How the projections to queries, keys and values are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Qkv {
    /// A tensor each.
    Split([&'static str; 3]),
    /// One tensor: all queries, then all keys, then all values.
    Stacked(&'static str),
    /// One tensor: per head its query, its key, its value.
    PerHead(&'static str),
    /// By latents.
    Latent(LatentNames),
}

/// Projections by latents, and norms of these.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LatentNames {
    /// Queries, where they have no latent.
    pub(crate) q: &'static str,
    /// The latent of queries, and queries from it.
    pub(crate) q_a: &'static str,
    pub(crate) q_a_norm: &'static str,
    pub(crate) q_b: &'static str,
    /// The latent of keys and values with the rotated elements beside it.
    pub(crate) kv_a: &'static str,
    pub(crate) kv_a_norm: &'static str,
    pub(crate) kv_b: FromLatents,
}

/// How the projections from latents to keys, without the rotated elements, and to values are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FromLatents {
    /// One tensor: for each head its key, then its value.
    PerHead(&'static str),
    /// Tensors of all heads: `[heads, kv_rank, key]` and `[heads, value, kv_rank]`.
    Split([&'static str; 2]),
}

/// How the MLP's first projection is stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Up {
    /// No gate.
    Alone(&'static str),
    /// Gate and up, a tensor each.
    Gated([&'static str; 2]),
    /// One tensor: all rows of the gate, then all of up.
    Packed(&'static str),
}

impl Up {
    pub(crate) fn is_gated(self) -> bool {
        !matches!(self, Self::Alone(_))
    }
}

impl Architecture {
    /// The architecture with this `model_type`, if folio knows it.
    #[must_use]
    pub fn find(model_type: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|architecture| architecture.model_type == model_type)
    }

    /// All that folio knows.
    #[must_use]
    pub fn all() -> &'static [Self] {
        ARCHITECTURES
    }

    /// Hugging Face's `model_type`.
    #[must_use]
    pub fn model_type(&self) -> &'static str {
        self.model_type
    }

    /// The names of all, for messages.
    pub(crate) fn known() -> String {
        ARCHITECTURES.iter().map(Self::model_type).collect::<Vec<_>>().join(", ")
    }

    /// Whether a tensor of this name holds no parameters, but a mask or frequencies that old versions of transformers saved.
    #[must_use]
    pub fn ignores(&self, tensor: &str) -> bool {
        self.tensors.ignored.iter().any(|end| tensor.ends_with(end))
    }

    /// Where each parameter of a model lies in a checkpoint whose tensor names `has` knows.
    ///
    /// Every tensor that is needed goes through `check`, as soon as it is known to be: a wrong number of layers ends at the first that is
    /// missing.
    pub(crate) fn resolve(
        &self,
        config: &ModelConfig,
        has: impl Fn(&str) -> bool,
        mut check: impl FnMut(&TensorSource) -> ModelResult<()>,
    ) -> ModelResult<ModelWeights> {
        let prefix = self.prefix(&has);
        let names = &self.tensors;
        let mut build = Build { config, names, prefix, experts: None };
        if let (Some(experts), Some(settings)) = (&self.experts, &config.experts) {
            build.experts = experts.form(&build, settings, &has).map(|form| (form, settings));
        }
        let embedding = build.table(names.embedding, config.vocab_size);
        check(&embedding)?;
        let position_embedding = names.position_embedding.map(|name| build.table(name, config.max_positions));
        position_embedding.iter().try_for_each(&mut check)?;
        let final_norm = build.norm(names.final_norm, config.hidden_size as usize, 0);
        final_norm.sources().try_for_each(&mut check)?;
        let head = (!config.tied_head).then(|| self.head(config));
        head.iter().flat_map(LinearWeights::sources).try_for_each(&mut check)?;
        let mut layers = Vec::new();
        for i in 0..config.num_layers {
            let layer = build.layer(i)?;
            layer.sources().try_for_each(&mut check)?;
            layers.push(layer);
        }
        Ok(ModelWeights { embedding, position_embedding, layers, final_norm, head })
    }

    /// The head, whether or not the model has its own.
    pub(crate) fn head(&self, config: &ModelConfig) -> LinearWeights {
        let build =
            Build { config, names: &TensorNames { transposed: false, ..self.tensors }, prefix: "", experts: None };
        build.linear(self.tensors.head, config.vocab_size as usize, config.hidden_size as usize, false, 0)
    }

    fn prefix(&self, has: impl Fn(&str) -> bool) -> &'static str {
        let embedding = |prefix: &&&str| has(&format!("{prefix}{}.weight", self.tensors.embedding));
        let prefixes = self.tensors.prefixes;
        prefixes.iter().find(embedding).or(prefixes.first()).copied().unwrap_or_default()
    }
}

//! Architectures as data: what each one calls its settings and its tensors, and what its layers are made of.
//!
//! A new architecture is a new row of [`ARCHITECTURES`], as long as its layers are made of the same parts.

use super::config::ModelConfig;
use super::ops::NormKind;
use super::{ModelError, ModelResult};

/// One architecture of Hugging Face transformers.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    pub(crate) model_type: &'static str,
    pub(crate) config: ConfigKeys,
    pub(crate) norm: NormKind,
    pub(crate) positions: Positions,
    pub(crate) parallel_residual: Flag,
    pub(crate) qkv_bias: Flag,
    pub(crate) output_bias: Flag,
    pub(crate) mlp_bias: Flag,
    pub(crate) tied_head: Flag,
    pub(crate) window: Window,
    pub(crate) tensors: TensorNames,
}

/// What `config.json` calls the settings. Defaults are those of transformers' configuration classes; what has none must be there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConfigKeys {
    pub(crate) num_layers: &'static str,
    pub(crate) hidden_size: &'static str,
    pub(crate) num_q_heads: &'static str,
    /// `None`: as many as query heads. So too if the key is missing.
    pub(crate) num_kv_heads: Option<&'static str>,
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

#[derive(Clone, Copy, Debug)]
pub(crate) enum Positions {
    Learned,
    /// Half-split RoPE, with the top-level keys, in order, of its base and of the rotated part of a head.
    Rope {
        theta: &'static [&'static str],
        partial: &'static [&'static str],
        default_partial: f64,
    },
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Window {
    None,
    /// The key, and its default if the key is missing. `null` is no window.
    Key(&'static str, u32),
    /// `use_sliding_window`, `sliding_window`, and `layer_types` or `max_window_layers`.
    Switched,
}

/// Names of tensors. `{i}` stands for the layer; `.weight` and `.bias` are appended. All but the head's follow the prefix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorNames {
    /// What files put before the names, in the order in which they are tried: a bare model is saved without it.
    pub(crate) prefixes: &'static [&'static str],
    pub(crate) embedding: &'static str,
    pub(crate) position_embedding: Option<&'static str>,
    pub(crate) attn_norm: &'static str,
    pub(crate) qkv: Qkv,
    pub(crate) output: &'static str,
    /// Norms of queries and of keys.
    pub(crate) qk_norm: Option<[&'static str; 2]>,
    pub(crate) mlp_norm: &'static str,
    pub(crate) gate: Option<&'static str>,
    pub(crate) up: &'static str,
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
}

/// The keys that Llama and all that descend from it share.
const LLAMA_KEYS: ConfigKeys = ConfigKeys {
    num_layers: "num_hidden_layers",
    hidden_size: "hidden_size",
    num_q_heads: "num_attention_heads",
    num_kv_heads: Some("num_key_value_heads"),
    head_dim: Some("head_dim"),
    default_head_dim: None,
    intermediate_size: "intermediate_size",
    default_intermediate_size: SizeDefault::Required,
    vocab_size: "vocab_size",
    max_positions: "max_position_embeddings",
    norm_eps: ("rms_norm_eps", 1e-6),
    activation: ("hidden_act", "silu"),
    fixed: &[],
};

const LLAMA_TENSORS: TensorNames = TensorNames {
    prefixes: &["model.", ""],
    embedding: "embed_tokens",
    position_embedding: None,
    attn_norm: "layers.{i}.input_layernorm",
    qkv: Qkv::Split(["layers.{i}.self_attn.q_proj", "layers.{i}.self_attn.k_proj", "layers.{i}.self_attn.v_proj"]),
    output: "layers.{i}.self_attn.o_proj",
    qk_norm: None,
    mlp_norm: "layers.{i}.post_attention_layernorm",
    gate: Some("layers.{i}.mlp.gate_proj"),
    up: "layers.{i}.mlp.up_proj",
    down: "layers.{i}.mlp.down_proj",
    final_norm: "norm",
    head: "lm_head",
    transposed: false,
    ignored: &[".rotary_emb.inv_freq"],
};

/// Llama, and what the others below change of it.
const LLAMA: Architecture = Architecture {
    model_type: "llama",
    config: LLAMA_KEYS,
    norm: NormKind::Rms,
    positions: Positions::Rope { theta: &["rope_theta"], partial: &["partial_rotary_factor"], default_partial: 1.0 },
    parallel_residual: Flag::Never,
    qkv_bias: Flag::Key("attention_bias", false),
    output_bias: Flag::Key("attention_bias", false),
    mlp_bias: Flag::Key("mlp_bias", false),
    tied_head: Flag::Key("tie_word_embeddings", false),
    window: Window::None,
    tensors: LLAMA_TENSORS,
};

const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_type: "gpt2",
        config: ConfigKeys {
            num_layers: "n_layer",
            hidden_size: "n_embd",
            num_q_heads: "n_head",
            num_kv_heads: None,
            head_dim: None,
            default_head_dim: None,
            intermediate_size: "n_inner",
            default_intermediate_size: SizeDefault::TimesHidden(4),
            vocab_size: "vocab_size",
            max_positions: "n_positions",
            norm_eps: ("layer_norm_epsilon", 1e-5),
            activation: ("activation_function", "gelu_new"),
            fixed: &[
                ("scale_attn_weights", true),
                ("scale_attn_by_inverse_layer_idx", false),
                ("add_cross_attention", false),
            ],
        },
        norm: NormKind::Layer,
        positions: Positions::Learned,
        parallel_residual: Flag::Never,
        qkv_bias: Flag::Always,
        output_bias: Flag::Always,
        mlp_bias: Flag::Always,
        tied_head: Flag::Key("tie_word_embeddings", true),
        window: Window::None,
        tensors: TensorNames {
            prefixes: &["transformer.", ""],
            embedding: "wte",
            position_embedding: Some("wpe"),
            attn_norm: "h.{i}.ln_1",
            qkv: Qkv::Stacked("h.{i}.attn.c_attn"),
            output: "h.{i}.attn.c_proj",
            qk_norm: None,
            mlp_norm: "h.{i}.ln_2",
            gate: None,
            up: "h.{i}.mlp.c_fc",
            down: "h.{i}.mlp.c_proj",
            final_norm: "ln_f",
            head: "lm_head",
            transposed: true,
            ignored: &[".attn.bias", ".attn.masked_bias"],
        },
    },
    Architecture {
        model_type: "gpt_neox",
        config: ConfigKeys {
            num_kv_heads: None,
            head_dim: None,
            norm_eps: ("layer_norm_eps", 1e-5),
            activation: ("hidden_act", "gelu"),
            ..LLAMA_KEYS
        },
        norm: NormKind::Layer,
        positions: Positions::Rope {
            theta: &["rotary_emb_base", "rope_theta"],
            partial: &["rotary_pct", "partial_rotary_factor"],
            default_partial: 0.25,
        },
        parallel_residual: Flag::Key("use_parallel_residual", true),
        qkv_bias: Flag::Key("attention_bias", true),
        output_bias: Flag::Key("attention_bias", true),
        mlp_bias: Flag::Always,
        tied_head: Flag::Key("tie_word_embeddings", false),
        window: Window::None,
        tensors: TensorNames {
            prefixes: &["gpt_neox.", ""],
            embedding: "embed_in",
            position_embedding: None,
            attn_norm: "layers.{i}.input_layernorm",
            qkv: Qkv::PerHead("layers.{i}.attention.query_key_value"),
            output: "layers.{i}.attention.dense",
            qk_norm: None,
            mlp_norm: "layers.{i}.post_attention_layernorm",
            gate: None,
            up: "layers.{i}.mlp.dense_h_to_4h",
            down: "layers.{i}.mlp.dense_4h_to_h",
            final_norm: "final_layer_norm",
            head: "embed_out",
            transposed: false,
            ignored: &[".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"],
        },
    },
    LLAMA,
    Architecture {
        model_type: "mistral",
        qkv_bias: Flag::Never,
        output_bias: Flag::Never,
        mlp_bias: Flag::Never,
        window: Window::Key("sliding_window", 4096),
        ..LLAMA
    },
    Architecture {
        model_type: "qwen2",
        qkv_bias: Flag::Always,
        output_bias: Flag::Never,
        mlp_bias: Flag::Never,
        window: Window::Switched,
        ..LLAMA
    },
    Architecture {
        model_type: "qwen3",
        config: ConfigKeys { default_head_dim: Some(128), ..LLAMA_KEYS },
        mlp_bias: Flag::Never,
        window: Window::Switched,
        tensors: TensorNames {
            qk_norm: Some(["layers.{i}.self_attn.q_norm", "layers.{i}.self_attn.k_norm"]),
            ..LLAMA_TENSORS
        },
        ..LLAMA
    },
];

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
        let prefix = self.prefix(has);
        let names = &self.tensors;
        let build = Build { config, names, prefix };
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
            let layer = build.layer(i);
            layer.sources().try_for_each(&mut check)?;
            layers.push(layer);
        }
        Ok(ModelWeights { embedding, position_embedding, layers, final_norm, head })
    }

    /// The head, whether or not the model has its own.
    pub(crate) fn head(&self, config: &ModelConfig) -> LinearWeights {
        let build = Build { config, names: &TensorNames { transposed: false, ..self.tensors }, prefix: "" };
        build.linear(self.tensors.head, config.vocab_size as usize, config.hidden_size as usize, false, 0)
    }

    fn prefix(&self, has: impl Fn(&str) -> bool) -> &'static str {
        let embedding = |prefix: &&&str| has(&format!("{prefix}{}.weight", self.tensors.embedding));
        let prefixes = self.tensors.prefixes;
        prefixes.iter().find(embedding).or(prefixes.first()).copied().unwrap_or_default()
    }
}

/// Where each parameter of a model lies in its checkpoint.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelWeights {
    /// `[vocab_size, hidden_size]`
    pub embedding: TensorSource,
    /// `[max_positions, hidden_size]`, for learned positions.
    pub position_embedding: Option<TensorSource>,
    /// From the first layer to the last.
    pub layers: Vec<LayerWeights>,
    /// The norm before the head.
    pub final_norm: NormWeights,
    /// `[vocab_size, hidden_size]`. `None`: the head is tied, use the embedding.
    pub head: Option<LinearWeights>,
}

/// The parameters of one layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerWeights {
    /// The norm before attention.
    pub attn_norm: NormWeights,
    /// `[num_q_heads * head_dim, hidden_size]`
    pub q: LinearWeights,
    /// `[num_kv_heads * head_dim, hidden_size]`
    pub k: LinearWeights,
    /// `[num_kv_heads * head_dim, hidden_size]`
    pub v: LinearWeights,
    /// `[hidden_size, num_q_heads * head_dim]`
    pub o: LinearWeights,
    /// The norm of each query head, over `head_dim`.
    pub q_norm: Option<NormWeights>,
    /// The norm of each key head, over `head_dim`.
    pub k_norm: Option<NormWeights>,
    /// The norm before the MLP.
    pub mlp_norm: NormWeights,
    /// Gated: `[2 * intermediate_size, hidden_size]`, all rows of the gate, then all of up. Otherwise `[intermediate_size, hidden_size]`.
    pub gate_up: LinearWeights,
    /// `[hidden_size, intermediate_size]`
    pub down: LinearWeights,
}

/// A linear layer's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearWeights {
    /// `[out, in]`
    pub weight: TensorSource,
    /// `[out, 1]`
    pub bias: Option<TensorSource>,
}

/// A norm's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct NormWeights {
    /// `[width, 1]`
    pub weight: TensorSource,
    /// `[width, 1]`; LayerNorm only.
    pub bias: Option<TensorSource>,
}

impl ModelWeights {
    /// Every source, in the order of computation: embedding, layers, final norm, head.
    pub fn sources(&self) -> impl Iterator<Item = &TensorSource> {
        let start = std::iter::once(&self.embedding).chain(&self.position_embedding);
        let layers = self.layers.iter().flat_map(LayerWeights::sources);
        let head = self.head.iter().flat_map(LinearWeights::sources);
        start.chain(layers).chain(self.final_norm.sources()).chain(head)
    }
}

impl LayerWeights {
    /// Every source of the layer, in the order of computation.
    pub fn sources(&self) -> impl Iterator<Item = &TensorSource> {
        let projections = [&self.q, &self.k, &self.v].into_iter().flat_map(LinearWeights::sources);
        let qk_norms = self.q_norm.iter().chain(&self.k_norm).flat_map(NormWeights::sources);
        let attention = self.attn_norm.sources().chain(projections).chain(qk_norms).chain(self.o.sources());
        attention.chain(self.mlp_norm.sources()).chain(self.gate_up.sources()).chain(self.down.sources())
    }

    /// The three projections as one of `[(num_q_heads + 2 * num_kv_heads) * head_dim, hidden_size]`: queries, keys, values.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if they were changed so that they no longer fit together.
    pub fn qkv(&self) -> ModelResult<LinearWeights> {
        LinearWeights::stack(&[&self.q, &self.k, &self.v])
    }
}

impl LinearWeights {
    /// The weight and the bias.
    pub fn sources(&self) -> impl Iterator<Item = &TensorSource> {
        std::iter::once(&self.weight).chain(&self.bias)
    }

    /// Layers with the same input as one, their outputs one after the other.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if there is none, if they have different inputs, or if only some have a bias.
    pub fn stack(parts: &[&Self]) -> ModelResult<Self> {
        let weights: Vec<_> = parts.iter().map(|part| &part.weight).collect();
        let biases: Vec<_> = parts.iter().filter_map(|part| part.bias.as_ref()).collect();
        if !biases.is_empty() && biases.len() != parts.len() {
            let got = format!("{} in {} layers", biases.len(), parts.len());
            return Err(ModelError::argument("biases", got, "one in each layer or none at all"));
        }
        let bias = if biases.is_empty() { None } else { Some(TensorSource::stack(&biases)?) };
        Ok(Self { weight: TensorSource::stack(&weights)?, bias })
    }
}

impl NormWeights {
    /// The weight and the bias.
    pub fn sources(&self) -> impl Iterator<Item = &TensorSource> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}

/// A parameter as a matrix `[rows, columns]`, put together from rows of tensors. A vector has one column.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSource {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) columns: usize,
}

impl TensorSource {
    /// `[rows, columns]`: `[out, in]` of a linear layer, `[n, 1]` of a vector.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.pieces.iter().map(|piece| piece.rows).sum(), self.columns]
    }

    /// The pieces, from the first row to the last.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Sources of the same width as one, their rows one after the other.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if there is none, or if the widths differ.
    pub fn stack(parts: &[&Self]) -> ModelResult<Self> {
        let need = "sources, at least one, of the same width";
        let Some(first) = parts.first() else {
            return Err(ModelError::argument("parts", "none", need));
        };
        if let Some(other) = parts.iter().find(|part| part.columns != first.columns) {
            return Err(ModelError::argument("parts", format!("widths {} and {}", first.columns, other.columns), need));
        }
        let pieces = parts.iter().flat_map(|part| part.pieces.iter().cloned()).collect();
        Ok(Self { pieces, columns: first.columns })
    }
}

/// Rows of one tensor. Row `r` of the piece is row `first + r / run * stride + r % run` of the tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub(crate) tensor: String,
    /// What the tensor must have, as it lies in the file.
    pub(crate) shape: Vec<usize>,
    /// "Row" above means a column of what lies in the file.
    pub(crate) transposed: bool,
    pub(crate) rows: usize,
    pub(crate) first: usize,
    /// Rows that lie side by side.
    pub(crate) run: usize,
    pub(crate) stride: usize,
}

impl Piece {
    /// Name of the tensor.
    #[must_use]
    pub fn tensor(&self) -> &str {
        &self.tensor
    }

    /// Row of the tensor, and how many rows of the piece, from `row` on, lie there side by side.
    pub(crate) fn locate(&self, row: usize) -> (usize, usize) {
        let within = row % self.run;
        (self.first + row / self.run * self.stride + within, (self.run - within).min(self.rows - row))
    }
}

/// Rows of a fused tensor.
#[derive(Clone, Copy)]
struct Selection {
    rows: usize,
    first: usize,
    run: usize,
    stride: usize,
}

impl Selection {
    fn range(first: usize, rows: usize) -> Self {
        Self { rows, first, run: rows, stride: rows }
    }
}

struct Build<'a> {
    config: &'a ModelConfig,
    names: &'a TensorNames,
    prefix: &'static str,
}

impl Build<'_> {
    fn name(&self, template: &str, layer: u32) -> String {
        format!("{}{}", self.prefix, template.replace("{i}", &layer.to_string()))
    }

    fn table(&self, template: &str, rows: u32) -> TensorSource {
        let (rows, columns) = (rows as usize, self.config.hidden_size as usize);
        let tensor = format!("{}.weight", self.name(template, 0));
        let Selection { first, run, stride, .. } = Selection::range(0, rows);
        let piece = Piece { tensor, shape: vec![rows, columns], transposed: false, rows, first, run, stride };
        TensorSource { pieces: vec![piece], columns }
    }

    fn vector(tensor: String, len: usize, select: Selection) -> TensorSource {
        let Selection { rows, first, run, stride } = select;
        let piece = Piece { tensor, shape: vec![len], transposed: false, rows, first, run, stride };
        TensorSource { pieces: vec![piece], columns: 1 }
    }

    fn norm(&self, template: &str, width: usize, layer: u32) -> NormWeights {
        let name = self.name(template, layer);
        let vector = |end: &str| Self::vector(format!("{name}.{end}"), width, Selection::range(0, width));
        let bias = (self.config.norm.kind == NormKind::Layer).then(|| vector("bias"));
        NormWeights { weight: vector("weight"), bias }
    }

    fn linear(&self, template: &str, out: usize, columns: usize, bias: bool, layer: u32) -> LinearWeights {
        self.select(template, out, columns, bias, layer, Selection::range(0, out))
    }

    /// Some outputs of a linear layer that has `out` of them.
    fn select(
        &self,
        template: &str,
        out: usize,
        columns: usize,
        bias: bool,
        layer: u32,
        select: Selection,
    ) -> LinearWeights {
        let name = self.name(template, layer);
        let transposed = self.names.transposed;
        let shape = if transposed { vec![columns, out] } else { vec![out, columns] };
        let Selection { rows, first, run, stride } = select;
        let piece = Piece { tensor: format!("{name}.weight"), shape, transposed, rows, first, run, stride };
        let bias = bias.then(|| Self::vector(format!("{name}.bias"), out, select));
        LinearWeights { weight: TensorSource { pieces: vec![piece], columns }, bias }
    }

    fn qkv(&self, layer: u32) -> [LinearWeights; 3] {
        let (hidden, head) = (self.config.hidden_size as usize, self.config.head_dim as usize);
        let (q, kv) = (self.config.q_width(), self.config.kv_width());
        let bias = self.config.qkv_bias;
        let all = q + 2 * kv;
        match self.names.qkv {
            Qkv::Split([q_name, k_name, v_name]) => [
                self.linear(q_name, q, hidden, bias, layer),
                self.linear(k_name, kv, hidden, bias, layer),
                self.linear(v_name, kv, hidden, bias, layer),
            ],
            Qkv::Stacked(name) => [(0, q), (q, kv), (q + kv, kv)]
                .map(|(first, rows)| self.select(name, all, hidden, bias, layer, Selection::range(first, rows))),
            Qkv::PerHead(name) => [0, head, 2 * head].map(|first| {
                let select = Selection { rows: q, first, run: head, stride: 3 * head };
                self.select(name, all, hidden, bias, layer, select)
            }),
        }
    }

    fn layer(&self, layer: u32) -> LayerWeights {
        let (config, names) = (self.config, self.names);
        let (hidden, inner) = (config.hidden_size as usize, config.intermediate_size as usize);
        let [q, k, v] = self.qkv(layer);
        let head_norm = |name| self.norm(name, config.head_dim as usize, layer);
        let [q_norm, k_norm] = names.qk_norm.map_or([None, None], |norms| norms.map(|name| Some(head_norm(name))));
        let up = self.linear(names.up, inner, hidden, config.mlp_bias, layer);
        let gate_up = match names.gate {
            None => up,
            Some(gate) => {
                let mut gate = self.linear(gate, inner, hidden, config.mlp_bias, layer);
                gate.weight.pieces.extend(up.weight.pieces);
                if let (Some(gate), Some(up)) = (&mut gate.bias, up.bias) {
                    gate.pieces.extend(up.pieces);
                }
                gate
            }
        };
        LayerWeights {
            attn_norm: self.norm(names.attn_norm, hidden, layer),
            q,
            k,
            v,
            o: self.linear(names.output, hidden, config.q_width(), config.output_bias, layer),
            q_norm,
            k_norm,
            mlp_norm: self.norm(names.mlp_norm, hidden, layer),
            gate_up,
            down: self.linear(names.down, hidden, inner, config.mlp_bias, layer),
        }
    }
}

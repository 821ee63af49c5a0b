//! What a decoder needs to know about a model, read from `config.json` and `generation_config.json`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::architecture::{Architecture, ConfigKeys, Flag, ModelWeights, Positions, SizeDefault, Window};
use super::linear::{MAX_IN_FEATURES, MAX_OUT_FEATURES};
use super::ops::activation::MAX_WIDTH as MAX_GATED_WIDTH;
use super::ops::{ActivationKind, NormConfig, NormKind};
use super::sampler::MAX_VOCAB;
use super::{ModelError, ModelResult};
use crate::layout::MAX_HEAD_DIM;
use crate::plan::MAX_GRID;
use crate::{Error, files};
use crate::{RopeConfig, RopeScaling};

/// Sizes above this are refused. The largest product, three times a projection's rows of up to 2^32, then stays far below 2^64, and every
/// published model is smaller by a factor of a thousand.
const MAX_SIZE: u64 = i32::MAX as u64;

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
    /// Width of a head. `num_q_heads * head_dim` may differ from `hidden_size`.
    pub head_dim: u32,
    /// Width of the MLP between its two projections.
    pub intermediate_size: u32,
    /// Rows of the embedding: token ids are below it.
    pub vocab_size: u32,
    /// Tokens that a sequence may hold. With learned positions there are no more; with RoPE it's the length that the model is made for.
    pub max_positions: u32,
    /// The norm before each half of a layer and before the head.
    pub norm: NormSettings,
    /// What lies between the MLP's projections.
    pub activation: ActivationKind,
    /// `down(activation(gate(x)) * up(x))` instead of `down(activation(up(x)))`.
    pub gated_mlp: bool,
    /// How tokens know where they are.
    pub position: Position,
    /// Attention and MLP both read the layer's input, and both are added to it: GPT-NeoX, GPT-J.
    pub parallel_residual: bool,
    /// The query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Attention's output projection has a bias.
    pub output_bias: bool,
    /// The MLP's projections have a bias.
    pub mlp_bias: bool,
    /// Queries and keys are normalised per head, with the kind and epsilon of `norm`, before RoPE: Qwen3.
    pub qk_norm: bool,
    /// The head reuses the embedding, as far as the file says. A checkpoint that has both, and different, is not tied: see
    /// [`ModelWeights::head`](super::ModelWeights::head).
    pub tied_head: bool,
    /// Each query sees the newest `w` keys, its own included. `None`: all of them.
    pub sliding_window: Option<u32>,
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
}

/// Hugging Face's names of activations.
const ACTIVATIONS: &[(&str, ActivationKind)] = &[
    ("silu", ActivationKind::Silu),
    ("swish", ActivationKind::Silu),
    ("gelu", ActivationKind::Gelu),
    ("gelu_python", ActivationKind::Gelu),
    ("gelu_new", ActivationKind::GeluTanh),
    ("gelu_fast", ActivationKind::GeluTanh),
    ("gelu_pytorch_tanh", ActivationKind::GeluTanh),
    ("gelu_python_tanh", ActivationKind::GeluTanh),
    ("relu", ActivationKind::Relu),
];

/// How tokens know where they are.
#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// A learned row per position, added to the embedding.
    Learned,
    /// Rotated queries and keys.
    Rope(RopeConfig),
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

    /// Width of all key heads together; values have the same.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads as usize * self.head_dim as usize
    }
}

fn not_json(path: &Path, error: serde_json::Error) -> ModelError {
    let reason = format!("not valid JSON at line {}, column {}", error.line(), error.column());
    ModelError::file_because(path, reason, error)
}

/// A JSON object and where it comes from.
pub(crate) struct JsonFile {
    path: PathBuf,
    object: Map<String, Value>,
}

impl JsonFile {
    pub(crate) fn read(path: PathBuf, max_bytes: u64) -> ModelResult<Self> {
        match files::read(&path, max_bytes) {
            Ok(text) => Self::parse(path, &text),
            Err(fault) => Err(ModelError::fault(path, fault)),
        }
    }

    fn parse(path: PathBuf, text: &[u8]) -> ModelResult<Self> {
        match serde_json::from_slice(text).map_err(|e| not_json(&path, e))? {
            Value::Object(object) => Ok(Self { path, object }),
            other => Err(ModelError::file(path, format!("got {}, need a JSON object", brief(&other)))),
        }
    }

    pub(crate) fn section(&self) -> Section<'_> {
        Section { path: &self.path, prefix: String::new(), object: &self.object }
    }
}

/// An object within a JSON file, which names its settings in errors.
pub(crate) struct Section<'a> {
    path: &'a Path,
    prefix: String,
    object: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// Settings of a file; `prefix` stands before their names in errors.
    pub(super) fn new(path: &'a Path, prefix: String, object: &'a Map<String, Value>) -> Self {
        Self { path, prefix, object }
    }

    /// A setting that is there and not null, which Hugging Face's files use alike.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn error(&self, key: &str, got: impl ToString, need: impl ToString) -> ModelError {
        let key = format!("{}{key}", self.prefix);
        ModelError::Config { path: self.path.to_owned(), key, got: got.to_string(), need: need.to_string() }
    }

    /// The error of a rule that a kernel has.
    fn rule(&self, key: &str, error: Error) -> ModelError {
        match error {
            Error::Argument { got, need, .. } => self.error(key, got, need),
            other => other.into(),
        }
    }

    fn wrong(&self, key: &str, need: &str) -> ModelError {
        let got = self.object.get(key).map_or_else(|| "nothing".to_owned(), brief);
        self.error(key, got, need)
    }

    fn optional<T>(&self, key: &str, need: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> ModelResult<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.wrong(key, need)),
        }
    }

    pub(crate) fn object(&self, key: &str) -> ModelResult<Option<Section<'a>>> {
        let object = self.optional(key, "an object", Value::as_object)?;
        Ok(object.map(|object| Section { path: self.path, prefix: format!("{}{key}.", self.prefix), object }))
    }

    /// All settings, if each is a string.
    pub(crate) fn strings(&self) -> ModelResult<Vec<(&'a str, &'a str)>> {
        let string = |(key, value): (&'a String, &'a Value)| {
            value.as_str().map(|value| (key.as_str(), value)).ok_or_else(|| self.wrong(key, "a string"))
        };
        self.object.iter().map(string).collect()
    }

    fn text(&self, key: &str) -> ModelResult<Option<&'a str>> {
        self.optional(key, "a string", Value::as_str)
    }

    fn flag(&self, flag: Flag) -> ModelResult<bool> {
        match flag {
            Flag::Always => Ok(true),
            Flag::Never => Ok(false),
            Flag::Key(key, default) => Ok(self.optional(key, "true or false", Value::as_bool)?.unwrap_or(default)),
        }
    }

    fn size(&self, key: &str) -> ModelResult<Option<u32>> {
        let read =
            |value: &Value| value.as_u64().filter(|n| (1..=MAX_SIZE).contains(n)).and_then(|n| n.try_into().ok());
        self.optional(key, "an integer from 1 to 2147483647", read)
    }

    fn needed_size(&self, key: &str) -> ModelResult<u32> {
        self.size(key)?.ok_or_else(|| self.error(key, "nothing", "an integer from 1 to 2147483647"))
    }

    fn number(&self, key: &str, need: &str, fits: impl FnOnce(f64) -> bool) -> ModelResult<Option<f64>> {
        // JSON has no infinity, but 1e999 would become one.
        self.optional(key, need, |value| value.as_f64().filter(|n| n.is_finite() && fits(*n)))
    }

    fn positive(&self, key: &str) -> ModelResult<Option<f64>> {
        self.number(key, "a number above 0", |n| n > 0.0)
    }

    fn factor(&self, key: &str) -> ModelResult<f64> {
        let need = "a number of at least 1";
        self.number(key, need, |n| n >= 1.0)?.ok_or_else(|| self.error(key, "nothing", need))
    }

    /// One id, or a list of them.
    fn ids(&self, key: &str) -> ModelResult<Option<Vec<u32>>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        self.optional(key, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            value => id(value).map(|id| vec![id]),
        })
    }
}

/// A JSON value, cut to what fits an error message.
fn brief(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn parse(file: &Section<'_>, generation: Option<&Section<'_>>) -> ModelResult<ModelConfig> {
    let need = || format!("one of {}", Architecture::known());
    let name = file.text("model_type")?.ok_or_else(|| file.error("model_type", "nothing", need()))?;
    let architecture = Architecture::find(name).ok_or_else(|| file.error("model_type", name, need()))?;
    parse_as(architecture, file, generation)
}

/// The configuration of a known architecture, by its own names of settings.
pub(super) fn parse_as(
    architecture: &Architecture,
    file: &Section<'_>,
    generation: Option<&Section<'_>>,
) -> ModelResult<ModelConfig> {
    let keys = &architecture.config;

    if file.get("quantization_config").is_some() {
        return Err(
            file.wrong("quantization_config", "a checkpoint in f32, f16 or bf16; quantised ones are not supported")
        );
    }
    for &(key, supported) in keys.fixed {
        if file.flag(Flag::Key(key, supported))? != supported {
            return Err(file.wrong(key, &format!("{supported}; anything else is not supported")));
        }
    }

    let hidden_size = file.needed_size(keys.hidden_size)?;
    let num_q_heads = file.needed_size(keys.num_q_heads)?;
    let num_kv_heads = keys.num_kv_heads.map_or(Ok(None), |key| file.size(key))?.unwrap_or(num_q_heads);
    if !num_q_heads.is_multiple_of(num_kv_heads) {
        let key = keys.num_kv_heads.unwrap_or(keys.num_q_heads);
        return Err(file.error(key, num_kv_heads, format!("a divisor of the {num_q_heads} query heads")));
    }
    let head_dim = match keys.head_dim.map_or(Ok(None), |key| file.size(key))? {
        Some(head_dim) => head_dim,
        None => match keys.default_head_dim {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_q_heads) => hidden_size / num_q_heads,
            None => {
                let need = format!("a multiple of {}, which is {num_q_heads}", keys.num_q_heads);
                return Err(file.error(keys.hidden_size, hidden_size, need));
            }
        },
    };
    if num_q_heads.checked_mul(head_dim).is_none() {
        let got = format!("{num_q_heads} heads of {head_dim}");
        return Err(file.error(keys.num_q_heads, got, "a product below 2^32"));
    }
    let intermediate_size = match (file.size(keys.intermediate_size)?, keys.default_intermediate_size) {
        (Some(size), _) => size,
        (None, SizeDefault::Required) => file.needed_size(keys.intermediate_size)?,
        (None, SizeDefault::TimesHidden(factor)) => hidden_size
            .checked_mul(factor)
            .ok_or_else(|| file.error(keys.hidden_size, hidden_size, format!("{factor} times it below 2^32")))?,
    };
    let num_layers = file.needed_size(keys.num_layers)?;
    let vocab_size = file.needed_size(keys.vocab_size)?;
    let max_position_embeddings = file.needed_size(keys.max_positions)?;

    let gated_mlp = architecture.tensors.gate.is_some();
    let sizes = Sizes { hidden_size, num_q_heads, head_dim, intermediate_size, vocab_size, gated_mlp };
    check_sizes(file, keys, &sizes)?;

    let (eps_key, default_eps) = keys.norm_eps;
    let eps = file.number(eps_key, "a number of at least 0", |n| n >= 0.0)?.unwrap_or(default_eps);
    let (activation_key, default_activation) = keys.activation;
    let activation = file.text(activation_key)?.unwrap_or(default_activation);
    let activation = ACTIVATIONS.iter().find(|(name, _)| *name == activation).map(|(_, a)| *a).ok_or_else(|| {
        let known: Vec<_> = ACTIVATIONS.iter().map(|(name, _)| *name).collect();
        file.error(activation_key, activation, format!("one of {}", known.join(", ")))
    })?;

    let mut max_positions = max_position_embeddings;
    let position = match architecture.positions {
        Positions::Learned => Position::Learned,
        Positions::Rope { theta, partial, default_partial } => {
            let rope = parse_rope(file, theta, partial, default_partial, head_dim, max_position_embeddings)?;
            if let RopeScaling::Yarn { factor, original_max_position, .. } = rope.scaling {
                // Checkpoints differ in whether `max_position_embeddings` already counts the stretched context.
                let stretched = (f64::from(original_max_position) * factor).min(f64::from(i32::MAX));
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and i32::MAX")]
                let stretched = stretched as u32;
                max_positions = max_positions.max(stretched);
            }
            Position::Rope(rope)
        }
    };

    #[allow(clippy::cast_possible_truncation, reason = "f32 is what the kernels compute with")]
    let norm = NormSettings { kind: architecture.norm, eps: eps as f32 };
    NormConfig::new(norm.kind, hidden_size, norm.eps).validate().map_err(|e| match e {
        Error::Argument { argument: "eps", got, need } => file.error(eps_key, got, need),
        other => file.rule(keys.hidden_size, other),
    })?;
    if let Position::Rope(rope) = &position {
        rope.validate(head_dim).map_err(|e| file.rule("rope_scaling", e))?;
    }

    let id = |key| generation.map_or(Ok(None), |file| file.ids(key));
    let eos_token_ids = match id("eos_token_id")? {
        Some(ids) => ids,
        None => file.ids("eos_token_id")?.unwrap_or_default(),
    };
    let bos = match id("bos_token_id")? {
        Some(ids) => Some(ids),
        None => file.ids("bos_token_id")?,
    };

    Ok(ModelConfig {
        model_type: architecture.model_type,
        num_layers,
        hidden_size,
        num_q_heads,
        num_kv_heads,
        head_dim,
        intermediate_size,
        vocab_size,
        max_positions,
        norm,
        activation,
        gated_mlp,
        position,
        parallel_residual: file.flag(architecture.parallel_residual)?,
        qkv_bias: file.flag(architecture.qkv_bias)?,
        output_bias: file.flag(architecture.output_bias)?,
        mlp_bias: file.flag(architecture.mlp_bias)?,
        qk_norm: architecture.tensors.qk_norm.is_some(),
        tied_head: file.flag(architecture.tied_head)?,
        sliding_window: parse_window(file, architecture.window, num_layers)?,
        bos_token_id: bos.and_then(|ids| ids.first().copied()),
        eos_token_ids,
    })
}

/// The sizes that kernels have rules for.
struct Sizes {
    hidden_size: u32,
    num_q_heads: u32,
    head_dim: u32,
    intermediate_size: u32,
    vocab_size: u32,
    gated_mlp: bool,
}

/// Refuses sizes that no kernel takes. The kernels check them too, but know neither the file nor its key.
fn check_sizes(file: &Section<'_>, keys: &ConfigKeys, sizes: &Sizes) -> ModelResult<()> {
    let &Sizes { hidden_size, num_q_heads, head_dim, intermediate_size, vocab_size, gated_mlp } = sizes;
    // What the file doesn't say follows from the hidden size.
    let said = |key: &'static str| file.get(key).map_or(keys.hidden_size, |_| key);

    let head_key = keys.head_dim.map_or(keys.hidden_size, said);
    if head_dim == 0 || head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(8) {
        let got = if head_key == keys.hidden_size {
            format!("{hidden_size} over {num_q_heads} heads, a head_dim of {head_dim}")
        } else {
            head_dim.to_string()
        };
        return Err(file.error(head_key, got, format!("a head_dim that is a multiple of 8 from 8 to {MAX_HEAD_DIM}")));
    }
    // They are numbered along one dimension of a dispatch.
    if num_q_heads > MAX_GRID {
        return Err(file.error(keys.num_q_heads, num_q_heads, format!("at most {MAX_GRID}")));
    }
    // Attention's output is the input of a linear layer.
    let q_width = u64::from(num_q_heads) * u64::from(head_dim);
    if q_width > u64::from(MAX_IN_FEATURES) {
        let got = format!("{num_q_heads} heads of {head_dim}, {q_width} in all");
        return Err(file.error(keys.num_q_heads, got, format!("at most {MAX_IN_FEATURES} in all")));
    }
    // A gate is applied in groups of four. Without one only linear layers see this size, and they take any.
    let max = if gated_mlp { MAX_IN_FEATURES.min(MAX_GATED_WIDTH) } else { MAX_IN_FEATURES };
    if intermediate_size > max || (gated_mlp && !intermediate_size.is_multiple_of(4)) {
        let key = said(keys.intermediate_size);
        let got = if key == keys.hidden_size {
            format!("{hidden_size}, and so an intermediate size of {intermediate_size}")
        } else {
            intermediate_size.to_string()
        };
        let need = if gated_mlp { format!("a multiple of 4, at most {max}") } else { format!("at most {max}") };
        return Err(file.error(key, got, need));
    }
    let max = MAX_VOCAB.min(MAX_OUT_FEATURES);
    if vocab_size > max {
        return Err(file.error(keys.vocab_size, vocab_size, format!("at most {max}")));
    }
    Ok(())
}

/// The window, if all layers have the same.
fn parse_window(file: &Section<'_>, window: Window, num_layers: u32) -> ModelResult<Option<u32>> {
    match window {
        Window::None => Ok(None),
        Window::Key(key, default) => match file.object.get(key) {
            None => Ok(Some(default)),
            Some(_) => file.size(key),
        },
        Window::Switched => {
            if !file.flag(Flag::Key("use_sliding_window", false))? {
                return Ok(None);
            }
            let Some(window) = file.size("sliding_window")? else {
                return Ok(None);
            };
            let need = "the same for all layers; mixed ones are not supported";
            let (key, windowed) = match file.optional("layer_types", "a list", Value::as_array)? {
                Some(types) => {
                    let windowed = |t: &Value| match t.as_str() {
                        Some("sliding_attention") => Some(true),
                        Some("full_attention") => Some(false),
                        _ => None,
                    };
                    let types: Option<Vec<bool>> = types.iter().map(windowed).collect();
                    let types = types.filter(|types| types.len() == num_layers as usize).ok_or_else(|| {
                        file.wrong(
                            "layer_types",
                            &format!("sliding_attention or full_attention for each of {num_layers} layers"),
                        )
                    })?;
                    ("layer_types", types.iter().filter(|windowed| **windowed).count())
                }
                None => {
                    // The layers from this one on have the window; the default is transformers'.
                    let first = file
                        .optional("max_window_layers", "an integer of at least 0", Value::as_u64)?
                        .unwrap_or(28)
                        .min(num_layers.into());
                    ("max_window_layers", num_layers as usize - usize::try_from(first).unwrap_or(num_layers as usize))
                }
            };
            match windowed {
                0 => Ok(None),
                n if n == num_layers as usize => Ok(Some(window)),
                n => Err(file.error(key, format!("a sliding window in {n} of {num_layers} layers"), need)),
            }
        }
    }
}

/// RoPE's settings: transformers 5 writes them to `rope_parameters`, versions before it to `rope_scaling` and to top-level settings.
fn parse_rope(
    file: &Section<'_>,
    theta_keys: &[&str],
    partial_keys: &[&str],
    default_partial: f64,
    head_dim: u32,
    max_position_embeddings: u32,
) -> ModelResult<RopeConfig> {
    let section = match file.object("rope_scaling")?.filter(|section| !section.object.is_empty()) {
        Some(section) => Some(section),
        None => file.object("rope_parameters")?,
    };
    // A setting within the section comes first, then the top-level names.
    let find = |key: &str, top: &[&str], read: &dyn Fn(&Section<'_>, &str) -> ModelResult<Option<f64>>| {
        if let Some(value) = section.as_ref().map_or(Ok(None), |section| read(section, key))? {
            return Ok(Some(value));
        }
        for key in top {
            if let Some(value) = read(file, key)? {
                return Ok(Some(value));
            }
        }
        Ok::<_, ModelError>(None)
    };
    let need = "a number above 1";
    // 10000 is transformers' default, and the paper's.
    let theta = find("rope_theta", theta_keys, &|s, key| s.number(key, need, |n| n > 1.0))?.unwrap_or(10_000.0);
    let need = "a number above 0, at most 1";
    let read_partial = |s: &Section<'_>, key: &str| s.number(key, need, |n| n > 0.0 && n <= 1.0);
    let partial = find("partial_rotary_factor", partial_keys, &read_partial)?.unwrap_or(default_partial);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to head_dim, rounded as by transformers"
    )]
    let rotary_dim = (f64::from(head_dim) * partial) as u32;
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        let key = partial_keys.first().copied().unwrap_or("partial_rotary_factor");
        let got = format!("{partial} of a head of {head_dim}, {rotary_dim} dimensions");
        return Err(file.error(key, got, "an even number of rotated dimensions, at least 2"));
    }
    let scaling = match &section {
        Some(section) => parse_scaling(file, section, max_position_embeddings)?,
        None => RopeScaling::None,
    };
    Ok(RopeConfig { scaling, ..RopeConfig::new(rotary_dim, theta) })
}

fn parse_scaling(file: &Section<'_>, section: &Section<'_>, max_position_embeddings: u32) -> ModelResult<RopeScaling> {
    const KNOWN: &str = "one of default, linear, dynamic, yarn, llama3";
    if let Some((key, value)) = section.object.iter().find(|(_, value)| value.is_object()) {
        let need = "one set of settings for all layers; settings per kind of layer are not supported";
        return Err(section.error(key, brief(value), need));
    }
    let (key, kind) = match section.text("rope_type")? {
        Some(kind) => ("rope_type", kind),
        None => ("type", section.text("type")?.unwrap_or("default")),
    };
    let original = || -> ModelResult<u32> {
        // The top-level one comes first, as in transformers.
        let original = match file.size("original_max_position_embeddings")? {
            Some(original) => Some(original),
            None => section.size("original_max_position_embeddings")?,
        };
        Ok(original.unwrap_or(max_position_embeddings))
    };
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: section.factor("factor")? },
        "dynamic" => {
            // transformers stretches the frequencies only beyond `max_position_embeddings`, where `max_positions` ends.
            section.factor("factor")?;
            RopeScaling::None
        }
        "yarn" => {
            let original_max_position = original()?;
            let factor = match section.get("factor") {
                None => f64::from(max_position_embeddings) / f64::from(original_max_position),
                Some(_) => section.factor("factor")?,
            };
            if factor < 1.0 {
                let need = format!("at most max_position_embeddings, which is {max_position_embeddings}");
                return Err(section.error("original_max_position_embeddings", original_max_position, need));
            }
            if !section.flag(Flag::Key("truncate", true))? {
                return Err(section.error("truncate", false, "true; anything else is not supported"));
            }
            let beta_fast = section.positive("beta_fast")?.unwrap_or(32.0);
            let beta_slow = section.positive("beta_slow")?.unwrap_or(1.0);
            if beta_fast <= beta_slow {
                return Err(section.error(
                    "beta_fast",
                    beta_fast,
                    format!("more than beta_slow, which is {beta_slow}"),
                ));
            }
            let attention_factor = match section.positive("attention_factor")? {
                Some(factor) => Some(factor),
                None => {
                    // The paper's `0.1 ln(factor) + 1`, as a quotient of two if the file weighs both.
                    let attention = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
                    let scale = |key| section.number(key, "a number of at least 0", |n| n >= 0.0);
                    match (scale("mscale")?, scale("mscale_all_dim")?) {
                        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => Some(attention(m) / attention(all)),
                        _ => None,
                    }
                }
            };
            RopeScaling::Yarn {
                factor,
                original_max_position,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale: None,
                mscale_all_dim: None,
                truncate: true,
            }
        }
        "llama3" => {
            let needed = |key| section.positive(key)?.ok_or_else(|| section.error(key, "nothing", "a number above 0"));
            let (low_freq_factor, high_freq_factor) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                let need = format!("more than low_freq_factor, which is {low_freq_factor}");
                return Err(section.error("high_freq_factor", high_freq_factor, need));
            }
            RopeScaling::Llama3 {
                factor: section.factor("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position: original()?,
            }
        }
        other => return Err(section.error(key, other, KNOWN)),
    })
}

//! What a GGUF file calls settings and tensors, as an [`Architecture`] whose names are those: the table of Hugging Face's names says which parts there
//! are, and the format has one name for each part, whatever the architecture.

use std::io::{Read, Seek, SeekFrom};

use serde_json::{Map, Number, json};

use super::super::architecture::{
    Architecture, ConfigKeys, Flag, LinearWeights, ModelWeights, Optional, Positions, Qkv, RopeKeys, SizeDefault,
    TensorNames, TensorSource, Up, Window, WindowedLayers,
};
use super::super::config::{LayerKind, LayerPattern, ModelConfig, Section, parse_as};
use super::super::elements::{ElementType, Elements};
use super::super::ops::NormKind;
use super::super::{ModelError, ModelResult};
use super::reader::{Header, Value, tensor_error};
use super::tokenizer::Specials;
use crate::RopeScaling;
use crate::files::Fault;

/// The architectures that are read, by the format's names.
const KNOWN: [Known; 5] = [
    Known { name: "llama", model_type: "llama", interleaved: true },
    Known { name: "qwen2", model_type: "qwen2", interleaved: false },
    Known { name: "qwen3", model_type: "qwen3", interleaved: false },
    Known { name: "gpt2", model_type: "gpt2", interleaved: false },
    Known { name: "gptneox", model_type: "gpt_neox", interleaved: false },
];

struct Known {
    /// `general.architecture`
    name: &'static str,
    /// Hugging Face's name.
    model_type: &'static str,
    /// Rows of queries and keys lie so that neighbours form a pair of the rotary embedding. Hugging Face's pairs are half a head apart.
    interleaved: bool,
}

/// Divisors of the rotary frequencies, one per pair.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// What a file says of its model.
pub(crate) struct Described {
    pub(crate) config: ModelConfig,
    /// With the names of the file.
    pub(crate) architecture: Architecture,
    /// Whether [`undo_interleaving`] is to be called.
    pub(crate) interleaved: bool,
}

/// # Errors
/// [`ModelError::Config`] for a setting that is missing, wrong or not supported; [`ModelError::Tensor`] for divisors of frequencies that are.
pub(crate) fn describe(header: &Header) -> ModelResult<Described> {
    let need = || format!("one of {}", KNOWN.map(|known| known.name).join(", "));
    let key = "general.architecture";
    let name = header.text(key)?.ok_or_else(|| header.error(key, "nothing", need()))?;
    let known = KNOWN.iter().find(|known| known.name == name).ok_or_else(|| header.error(key, name, need()))?;
    let table = Architecture::find(known.model_type).ok_or_else(|| header.error(key, name, need()))?;
    if let Some(parts) = header.u32("split.count")?.filter(|parts| *parts > 1) {
        let need = "a model in one file; `llama-gguf-split --merge` makes one of all parts";
        return Err(header.error("split.count", format!("{parts} parts"), need));
    }
    let settings = Settings { header, architecture: name };
    if let Some(experts) = header.u32(&settings.key("expert_count"))?.filter(|experts| *experts > 0) {
        return Err(header.error(&settings.key("expert_count"), experts, "0; mixtures of experts are not supported"));
    }
    let has = |name: &str| header.tensors.contains_key(name);
    let present = |flag: Flag, tensor: &str| match flag {
        Flag::Key(..) if has(tensor) => Flag::Always,
        Flag::Key(..) => Flag::Never,
        fixed => fixed,
    };
    let fused = matches!(table.tensors.qkv, Qkv::Stacked(_) | Qkv::PerHead(_));
    let architecture = Architecture {
        config: keys(table),
        positions: match table.positions {
            Positions::Learned => Positions::Learned,
            Positions::Rope(rope) => Positions::Rope(RopeKeys {
                theta: &["rope.freq_base"],
                partial: &["rope.dimension_fraction"],
                default_partial: 1.0,
                ..rope
            }),
        },
        qkv_bias: present(table.qkv_bias, if fused { "blk.0.attn_qkv.bias" } else { "blk.0.attn_q.bias" }),
        output_bias: present(table.output_bias, "blk.0.attn_output.bias"),
        mlp_bias: present(table.mlp_bias, "blk.0.ffn_up.bias"),
        tied_head: if has("output.weight") { Flag::Never } else { Flag::Always },
        window: Some(Window {
            switch: None,
            size: Optional { key: WINDOW, default: None },
            layers: WindowedLayers::All,
        }),
        tensors: names(&table.tensors),
        ..*table
    };
    let map = settings.map(&architecture)?;
    let mut config = parse_as(&architecture, &Section::new(&header.path, format!("{name}."), &map), None)?;
    if known.interleaved
        && let Some(rope) = &config.layers.kind(0).rope
        && rope.rotary_dim != config.head_dim
    {
        let need = format!("{}, the whole head, whose rows are interleaved", config.head_dim);
        return Err(header.error(&settings.key(DIMENSIONS), rope.rotary_dim, need));
    }
    divide_frequencies(header, &mut config)?;
    Ok(Described { config, architecture, interleaved: known.interleaved })
}

const WINDOW: &str = "attention.sliding_window";
const DIMENSIONS: &str = "rope.dimension_count";

/// The format's names of settings. All are preceded by the architecture's name.
fn keys(of: &Architecture) -> ConfigKeys {
    let norm_eps = match of.norm {
        NormKind::Rms => "attention.layer_norm_rms_epsilon",
        NormKind::Layer => "attention.layer_norm_epsilon",
    };
    ConfigKeys {
        num_layers: "block_count",
        hidden_size: "embedding_length",
        num_q_heads: "attention.head_count",
        num_kv_heads: Some("attention.head_count_kv"),
        default_num_kv_heads: None,
        head_dim: Some("attention.key_length"),
        default_head_dim: None,
        intermediate_size: "feed_forward_length",
        default_intermediate_size: SizeDefault::Required,
        vocab_size: "vocab_size",
        max_positions: "context_length",
        norm_eps: (norm_eps, of.config.norm_eps.1),
        // The format has no setting for it.
        activation: ("activation", of.config.activation.1),
        fixed: &[],
        absent: &[],
    }
}

/// The format's names of tensors.
fn names(of: &TensorNames) -> TensorNames {
    TensorNames {
        prefixes: &[""],
        embedding: "token_embd",
        position_embedding: of.position_embedding.map(|_| "position_embd"),
        attn_norm: of.attn_norm.map(|_| "blk.{i}.attn_norm"),
        post_attn_norm: of.post_attn_norm.map(|_| "blk.{i}.post_attention_norm"),
        qkv: match of.qkv {
            Qkv::Split(_) => Qkv::Split(["blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"]),
            // What is stored per head elsewhere is sorted by queries, keys and values here.
            Qkv::Stacked(_) | Qkv::PerHead(_) => Qkv::Stacked("blk.{i}.attn_qkv"),
            // No architecture that is read from this format has latents.
            latent @ Qkv::Latent(_) => latent,
        },
        output: "blk.{i}.attn_output",
        sinks: of.sinks,
        qk_norm: of.qk_norm.map(|(over, _)| (over, ["blk.{i}.attn_q_norm", "blk.{i}.attn_k_norm"])),
        mlp_norm: of.mlp_norm.map(|_| "blk.{i}.ffn_norm"),
        post_mlp_norm: of.post_mlp_norm.map(|_| "blk.{i}.post_ffw_norm"),
        up: match of.up {
            Up::Alone(_) => Up::Alone("blk.{i}.ffn_up"),
            Up::Gated(_) => Up::Gated(["blk.{i}.ffn_gate", "blk.{i}.ffn_up"]),
            Up::Packed(_) => Up::Packed("blk.{i}.ffn_up"),
        },
        down: "blk.{i}.ffn_down",
        final_norm: "output_norm",
        head: "output",
        transposed: false,
        ignored: &[ROPE_FACTORS],
    }
}

struct Settings<'a> {
    header: &'a Header,
    architecture: &'a str,
}

impl Settings<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// The settings of the architecture, without its name before each, and what is said elsewhere or otherwise than in a `config.json`.
    fn map(&self, architecture: &Architecture) -> ModelResult<Map<String, serde_json::Value>> {
        let header = self.header;
        let mut map = Map::new();
        for (key, value) in &header.settings {
            if let Some(key) = key.strip_prefix(self.architecture).and_then(|key| key.strip_prefix('.')) {
                map.insert(key.to_owned(), as_json(value));
            }
        }
        let embedding = "token_embd.weight";
        let rows = header.tensors.get(embedding).and_then(|tensor| tensor.shape.first().copied());
        let rows =
            rows.ok_or_else(|| tensor_error(&header.path, embedding, "nothing", "the embedding of the tokens"))?;
        map.entry("vocab_size").or_insert_with(|| rows.into());
        // 0 is no window, and neither is none.
        if map.get(WINDOW).is_none_or(|window| window.as_u64() == Some(0)) {
            map.insert(WINDOW.to_owned(), serde_json::Value::Null);
        }
        self.rotary(architecture, &mut map)?;
        let specials = Specials::read(header)?;
        map.insert("bos_token_id".to_owned(), json!(specials.bos));
        map.insert("eos_token_id".to_owned(), json!(specials.ends));
        Ok(map)
    }

    /// Settings of the rotary embedding, as a `config.json` has them.
    fn rotary(&self, architecture: &Architecture, map: &mut Map<String, serde_json::Value>) -> ModelResult<()> {
        let header = self.header;
        let size = |name: &str| header.u32(&self.key(name));
        let key_length = match size("attention.key_length")? {
            Some(length) => Some(length),
            None => {
                let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
                let whole = |(hidden, heads): &(u32, u32)| hidden.is_multiple_of(*heads);
                hidden.zip(heads).filter(whole).and_then(|(hidden, heads)| hidden.checked_div(heads))
            }
        };
        // Without a length the sizes that it follows from are missing or wrong, which is said where they are read.
        let Some(key_length) = key_length.filter(|length| *length > 0) else { return Ok(()) };
        if let Some(length) = size("attention.value_length")?.filter(|length| *length != key_length) {
            return Err(header.error(
                &self.key("attention.value_length"),
                length,
                format!("{key_length}, as keys have"),
            ));
        }
        if let Positions::Learned = architecture.positions {
            return Ok(());
        }
        if let Some(dimensions) = size(DIMENSIONS)?.filter(|dimensions| *dimensions != key_length) {
            if dimensions == 0 || !dimensions.is_multiple_of(2) || dimensions > key_length {
                let need = format!("an even number from 2 to {key_length}");
                return Err(header.error(&self.key(DIMENSIONS), dimensions, need));
            }
            // A fraction of the head that comes to as many dimensions when the product is rounded down.
            let fraction = (f64::from(dimensions) + 0.5) / f64::from(key_length);
            map.insert("rope.dimension_fraction".to_owned(), json!(fraction));
        }
        let scaling = |name: &str| self.key(&format!("rope.scaling.{name}"));
        // Old files have `rope.scale_linear` only.
        let old = self.key("rope.scale_linear");
        let kind = match header.text(&scaling("type"))? {
            Some(kind) => kind,
            None if header.number(&old)?.is_some_and(|factor| factor != 1.0) => "linear",
            None => "none",
        };
        let factor = match header.number(&scaling("factor"))? {
            Some(factor) => factor,
            None => header.number(&old)?.unwrap_or(1.0),
        };
        if factor < 1.0 {
            return Err(header.error(&scaling("factor"), factor, "a number of at least 1"));
        }
        let section = match kind {
            "none" => return Ok(()),
            "linear" => json!({ "rope_type": "linear", "factor": factor }),
            "yarn" => {
                // The paper's own values may be changed by these; what is negative is not set.
                for (name, value) in [
                    ("yarn_ext_factor", 1.0),
                    ("yarn_attn_factor", 1.0),
                    ("attn_factor", 1.0),
                    ("yarn_log_multiplier", 0.0),
                ] {
                    if let Some(other) = header.number(&scaling(name))?.filter(|n| *n != value && *n >= 0.0) {
                        return Err(header.error(
                            &scaling(name),
                            other,
                            format!("{value}; anything else is not supported"),
                        ));
                    }
                }
                let mut section = Map::new();
                section.insert("rope_type".to_owned(), json!("yarn"));
                section.insert("factor".to_owned(), json!(factor));
                section.insert(
                    "original_max_position_embeddings".to_owned(),
                    json!(header.u32(&scaling("original_context_length"))?),
                );
                section.insert("beta_fast".to_owned(), json!(header.number(&scaling("yarn_beta_fast"))?));
                section.insert("beta_slow".to_owned(), json!(header.number(&scaling("yarn_beta_slow"))?));
                section.into()
            }
            other => return Err(header.error(&scaling("type"), other, "one of none, linear, yarn")),
        };
        map.insert("rope_scaling".to_owned(), section);
        Ok(())
    }
}

fn as_json(value: &Value) -> serde_json::Value {
    match value {
        Value::Unsigned(n) => (*n).into(),
        Value::Signed(n) => (*n).into(),
        // JSON has neither NaN nor infinities; as texts they are no numbers either, and are shown.
        Value::Float(n) => Number::from_f64(*n).map_or_else(|| n.to_string().into(), serde_json::Value::Number),
        Value::Bool(flag) => (*flag).into(),
        Value::Text(text) => text.as_str().into(),
        // No setting of a model that folio runs is a list.
        Value::Texts(_) | Value::Numbers(_) => value.brief().into(),
    }
}

/// Applies the divisors of frequencies, which stand for the scaling of Llama 3.1 and others.
fn divide_frequencies(header: &Header, config: &mut ModelConfig) -> ModelResult<()> {
    let kind = config.layers.kind(0).clone();
    let (Some(tensor), Some(mut rope)) = (header.tensors.get(ROPE_FACTORS), kind.rope) else { return Ok(()) };
    let wrong = |got: String, need: String| tensor_error(&header.path, ROPE_FACTORS, got, need);
    let pairs = rope.rotary_dim as usize / 2;
    if tensor.shape != [pairs] || !matches!(tensor.kind, ElementType::Plain(_)) || !tensor.kind.is_readable() {
        let got = format!("{} of shape {:?}", tensor.kind, tensor.shape);
        return Err(wrong(got, format!("F32 of shape [{pairs}], a divisor for each pair of the rotary embedding")));
    }
    let failed = |e| ModelError::fault(&header.path, Fault::io("can't be read", e));
    let mut file = &header.file;
    // A head has at most some hundred dimensions.
    let mut bytes = vec![0; tensor.end - tensor.start];
    file.seek(SeekFrom::Start(tensor.start as u64)).map_err(failed)?;
    file.read_exact(&mut bytes).map_err(failed)?;
    let mut divisors = vec![0.0; pairs];
    Elements { bytes: &bytes, kind: tensor.kind, scales: None }.read(0, &mut divisors);
    if let Some(divisor) = divisors.iter().find(|divisor| !(divisor.is_finite() && **divisor > 0.0)) {
        return Err(wrong(divisor.to_string(), "finite divisors above 0".to_owned()));
    }
    let frequencies = rope.inverse_frequencies();
    let inverse_frequencies = frequencies.iter().zip(divisors).map(|(f, divisor)| f / f64::from(divisor)).collect();
    let attention_factor = rope.attention_factor();
    rope.scaling = RopeScaling::Custom { inverse_frequencies, attention_factor };
    rope.validate(config.head_dim)?;
    // The architectures that are read have layers of one kind.
    config.layers = LayerPattern::uniform(LayerKind::new(Some(rope), kind.window));
    Ok(())
}

/// Turns rows of queries and keys back to Hugging Face's order. Converters of Llama put element `i` of a head's first half at row `2 i`, and element `i` of
/// its second half at row `2 i + 1`, because llama.cpp rotates neighbours.
pub(crate) fn undo_interleaving(weights: &mut ModelWeights, head_dim: usize) {
    for layer in &mut weights.layers {
        for LinearWeights { weight, bias } in [&mut layer.q, &mut layer.k] {
            split_halves(weight, head_dim);
            bias.iter_mut().for_each(|bias| split_halves(bias, head_dim));
        }
    }
}

fn split_halves(source: &mut TensorSource, head_dim: usize) {
    let halves = |piece: &super::super::Piece| {
        let firsts = (piece.first..piece.first + piece.rows).step_by(head_dim);
        let half = |first| super::super::Piece { rows: head_dim / 2, first, run: 1, stride: 2, ..piece.clone() };
        firsts.flat_map(|first| [half(first), half(first + 1)]).collect::<Vec<_>>()
    };
    source.pieces = source.pieces.iter().flat_map(halves).collect();
}

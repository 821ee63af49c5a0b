//! `config.json` by an architecture's table.

use super::experts::{first_layer, parse_experts};
use super::json::Section;
use super::latent::Latents;
use super::layers::{parse_windows, rotated_layers};
use super::rope::{parse_rope, scaling_section};
use super::{LongContext, ModelConfig, NormSettings, QkNorm};
use crate::layout::MAX_HEAD_DIM;
use crate::model::ModelResult;
use crate::model::architecture::{Architecture, ConfigKeys, Flag, Optional, Positions, SizeDefault};
use crate::model::linear::{MAX_IN_FEATURES, MAX_OUT_FEATURES};
use crate::model::ops::activation::MAX_WIDTH as MAX_GATED_WIDTH;
use crate::model::ops::{ActivationKind, NormConfig};
use crate::model::sampler::MAX_VOCAB;
use crate::plan::MAX_GRID;
use crate::{Error, RopeConfig, RopeScaling};

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

pub(super) fn parse(file: &Section<'_>, generation: Option<&Section<'_>>) -> ModelResult<ModelConfig> {
    let need = || format!("one of {}", Architecture::known());
    let name = file.text("model_type")?.ok_or_else(|| file.error("model_type", "nothing", need()))?;
    let architecture = Architecture::find(name).ok_or_else(|| file.error("model_type", name, need()))?;
    parse_as(architecture, file, generation)
}

/// The configuration of a known architecture, by its own names of settings.
pub(crate) fn parse_as(
    architecture: &Architecture,
    file: &Section<'_>,
    generation: Option<&Section<'_>>,
) -> ModelResult<ModelConfig> {
    let keys = &architecture.config;

    if let Some(quantised) = file.object("quantization_config")? {
        let method = quantised.text("quant_method")?;
        if !architecture.experts.is_some_and(|experts| experts.has_mxfp4() && method == Some("mxfp4")) {
            let need =
                "a checkpoint in f32, f16 or bf16; quantised ones are not supported, but for the mxfp4 of gpt_oss";
            return Err(file.wrong("quantization_config", need));
        }
    }
    for &(key, supported) in keys.fixed {
        if file.flag(Flag::Key(key, supported))? != supported {
            return Err(file.wrong(key, &format!("{supported}; anything else is not supported")));
        }
    }

    if let Some(key) = keys.absent.iter().find(|key| file.get(key).is_some()) {
        return Err(file.wrong(key, "nothing, or null; anything else is not supported"));
    }

    let hidden_size = file.needed_size(keys.hidden_size)?;
    let num_q_heads = file.needed_size(keys.num_q_heads)?;
    let num_kv_heads = match keys.num_kv_heads {
        None => None,
        Some(key) => file.optional_size(Optional { key, default: keys.default_num_kv_heads })?,
    };
    let num_kv_heads = num_kv_heads.unwrap_or(num_q_heads);
    if !num_q_heads.is_multiple_of(num_kv_heads) {
        let key = keys.num_kv_heads.unwrap_or(keys.num_q_heads);
        return Err(file.error(key, num_kv_heads, format!("a divisor of the {num_q_heads} query heads")));
    }
    let latents = architecture.latent.as_ref();
    let latents = latents.map(|keys| Latents::parse(file, keys, [num_q_heads, num_kv_heads])).transpose()?;
    let head_dim = match (&latents, keys.head_dim.map_or(Ok(None), |key| file.size(key))?) {
        (Some(latents), _) => latents.head_dim,
        (None, Some(head_dim)) => head_dim,
        (None, None) => match keys.default_head_dim {
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

    let gated_mlp = architecture.tensors.up.is_gated();
    let own_heads = latents.is_none();
    let sizes = Sizes { hidden_size, num_q_heads, head_dim, own_heads, intermediate_size, vocab_size, gated_mlp };
    check_sizes(file, keys, &sizes)?;

    let (eps_key, default_eps) = keys.norm_eps;
    let eps = file.number(eps_key, "a number of at least 0", |n| n >= 0.0)?.unwrap_or(default_eps);
    let (activation_key, default_activation) = keys.activation;
    let activation = file.text(activation_key)?.unwrap_or(default_activation);
    let activation = ACTIVATIONS.iter().find(|(name, _)| *name == activation).map(|(_, a)| *a).ok_or_else(|| {
        let known: Vec<_> = ACTIVATIONS.iter().map(|(name, _)| *name).collect();
        file.error(activation_key, activation, format!("one of {}", known.join(", ")))
    })?;

    let experts = match architecture.experts {
        Some(keys) if first_layer(file, &keys)? < num_layers => {
            Some(parse_experts(file, &keys, intermediate_size, activation)?)
        }
        _ => None,
    };

    #[allow(clippy::cast_possible_truncation, reason = "f32 is what the kernels compute with")]
    let norm = NormSettings { kind: architecture.norm, eps: eps as f32, weight_offset: architecture.norm_offset };
    let qk_norm = architecture.tensors.qk_norm.map(|(over, _)| over);
    let check_norm = |key, width| {
        NormConfig::new(norm.kind, width, norm.eps).validate().map_err(|e| match e {
            Error::Argument { argument: "eps", got, need } => file.error(eps_key, got, need),
            other => file.rule(key, other),
        })
    };
    check_norm(keys.hidden_size, hidden_size)?;
    if qk_norm == Some(QkNorm::AllHeads) {
        check_norm(keys.num_q_heads, num_q_heads.saturating_mul(head_dim))?;
    }

    let mut max_positions = max_position_embeddings;
    let mut long_context = None;
    let layers = match architecture.positions {
        Positions::Learned => parse_windows(file, architecture.window, num_layers, &[true], None, None)?,
        Positions::Rope(rope_keys) => {
            let rotated_dim = latents.as_ref().map_or(head_dim, |latents| latents.config.rope_dim);
            let rope = parse_rope(file, &rope_keys, rotated_dim, max_position_embeddings)?;
            if let RopeScaling::Yarn { factor, original_max_position, .. } = rope.own.scaling {
                // Checkpoints differ in whether `max_position_embeddings` already counts the stretched context.
                let stretched = (f64::from(original_max_position) * factor).min(f64::from(i32::MAX));
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and i32::MAX")]
                let stretched = stretched as u32;
                max_positions = max_positions.max(stretched);
            }
            let rotated = rotated_layers(file, rope_keys.skipped, num_layers)?;
            let layers = |own: RopeConfig| {
                let own = match &latents {
                    Some(latents) => latents.rope(file, own)?,
                    None => own,
                };
                parse_windows(file, architecture.window, num_layers, &rotated, Some(own), rope.windowed.clone())
            };
            if let Some((long, original)) = rope.long {
                long_context = Some(LongContext { layers: layers(long)?, max_positions });
                max_positions = original;
            }
            layers(rope.own)?
        }
    };

    let softcap = |setting: Option<_>| {
        let Some(setting) = setting else { return Ok(None) };
        file.optional_positive(setting)?.map(|cap| file.single(setting.key, cap)).transpose()
    };
    let softmax_scale = match (&latents, architecture.query_scalar) {
        (Some(latents), _) => {
            let scale = latents.softmax_scale(scaling_section(file)?.as_ref())?;
            Some(file.single("mscale_all_dim", scale)?)
        }
        (None, None) => None,
        (None, Some((key, default))) => Some(file.single(key, 1.0 / file.positive(key)?.unwrap_or(default).sqrt())?),
    };
    let embedding_scale = architecture.scaled_embedding.then(|| f64::from(hidden_size).sqrt());

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
        latent: latents.map(|latents| latents.config),
        intermediate_size,
        experts,
        attention_sinks: architecture.tensors.sinks.is_some(),
        vocab_size,
        max_positions,
        norm,
        activation,
        gated_mlp,
        learned_positions: matches!(architecture.positions, Positions::Learned),
        layers,
        long_context,
        embedding_scale: embedding_scale.map(|scale| file.single(keys.hidden_size, scale)).transpose()?,
        softmax_scale,
        attention_softcap: softcap(architecture.attention_softcap)?,
        logit_softcap: softcap(architecture.logit_softcap)?,
        parallel_residual: file.flag(architecture.parallel_residual)?,
        qkv_bias: file.flag(architecture.qkv_bias)?,
        output_bias: file.flag(architecture.output_bias)?,
        mlp_bias: file.flag(architecture.mlp_bias)?,
        qk_norm,
        tied_head: file.flag(architecture.tied_head)?,
        bos_token_id: bos.and_then(|ids| ids.first().copied()),
        eos_token_ids,
    })
}

/// The sizes that kernels have rules for.
struct Sizes {
    hidden_size: u32,
    num_q_heads: u32,
    head_dim: u32,
    /// Whether heads have keys and values of their own: those of latents are checked with these.
    own_heads: bool,
    intermediate_size: u32,
    vocab_size: u32,
    gated_mlp: bool,
}

/// Refuses sizes that no kernel takes. The kernels check them too, but know neither the file nor its key.
fn check_sizes(file: &Section<'_>, keys: &ConfigKeys, sizes: &Sizes) -> ModelResult<()> {
    let &Sizes { hidden_size, num_q_heads, head_dim, own_heads, intermediate_size, vocab_size, gated_mlp } = sizes;
    // What the file doesn't say follows from the hidden size.
    let said = |key: &'static str| file.get(key).map_or(keys.hidden_size, |_| key);

    let head_key = keys.head_dim.map_or(keys.hidden_size, said);
    if own_heads && (head_dim == 0 || head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(8)) {
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

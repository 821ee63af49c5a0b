//! The architectures that are read, and what the format calls their settings and tensors: one name for each part, whatever the architecture.

use super::super::ModelResult;
use super::super::architecture::{
    Architecture, ConfigKeys, ExpertNames, ExpertTensors, Experts, Flag, FromLatents, GroupKeys, LatentKeys,
    LatentNames, Optional, Positions, Qkv, RopeKeys, SizeDefault, TensorNames, Up, Window, WindowedLayers,
};
use super::super::ops::{NormKind, Scoring};
use super::reader::Header;

/// Divisors of the rotary frequencies, one per pair; those of LongRoPE for texts up to the original length, and beyond.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";
pub(super) const SHORT_FACTORS: &str = "rope_factors_short.weight";
pub(super) const LONG_FACTORS: &str = "rope_factors_long.weight";

// Settings, which the architecture's name precedes in the file.
pub(super) const HEADS: &str = "attention.head_count";
pub(super) const KV_HEADS: &str = "attention.head_count_kv";
pub(super) const KEY_LENGTH: &str = "attention.key_length";
pub(super) const VALUE_LENGTH: &str = "attention.value_length";
pub(super) const WINDOW: &str = "attention.sliding_window";
/// One of so many layers has no window, or for each layer whether it has one.
pub(super) const WINDOW_PATTERN: &str = "attention.sliding_window_pattern";
pub(super) const DIMENSIONS: &str = "rope.dimension_count";
pub(super) const FREQ_BASE: &str = "rope.freq_base";
pub(super) const WINDOWED_FREQ_BASE: &str = "rope.freq_base_swa";
pub(super) const EXPERTS: &str = "expert_count";
pub(super) const EXPERT_SCALE: &str = "expert_weights_scale";
pub(super) const EXPERT_GROUPS: [&str; 2] = ["expert_group_count", "expert_group_used_count"];
pub(super) const GATING: &str = "expert_gating_func";

// What no file has: it is worked out, and handed on under these names, which errors show.
pub(super) const FRACTION: &str = "rope.dimension_fraction";
pub(super) const QUERY_SCALAR: &str = "attention.query_scalar";
pub(super) const NOPE_LENGTH: &str = "attention.key_length_mla - rope.dimension_count";
pub(super) const LATENT_VALUE_LENGTH: &str = "attention.value_length_mla";

/// The number of sigmoids among functions of a router: 1 is softmax, 3 that of the selected logits.
const SIGMOID: u32 = 2;

/// An architecture of the format, and what is particular about its files.
#[derive(Clone, Copy)]
pub(super) struct Known {
    /// `general.architecture`
    pub(super) name: &'static str,
    /// Hugging Face's name.
    pub(super) model_type: &'static str,
    /// Which of several with this name it is.
    when: When,
    /// Rows of queries and keys lie so that neighbours form a pair of the rotary embedding. Hugging Face's pairs are half a head apart.
    pub(super) interleaved: bool,
    /// The window of files that don't say it.
    pub(super) window: Option<u32>,
    /// Whether layers may have windows.
    pub(super) may_have_windows: bool,
    /// The model with as many layers divides logits by the root of its hidden size over its heads, the others by that of a head's width. llama.cpp has
    /// this in its code, and the files have nothing about it.
    pub(super) wide_queries: Option<u32>,
    /// Whether YaRN's bounds are rounded to whole pairs. No file says it. llama.cpp always rounds; gpt-oss was trained without.
    pub(super) rounded_yarn: bool,
    /// Whether weights of experts are divided by their sum.
    renormalise: Flag,
    /// The width of experts. `None`: that of an MLP.
    pub(super) expert_length: Option<&'static str>,
    mlp_norm: &'static str,
}

#[derive(Clone, Copy)]
enum When {
    Always,
    /// It has experts, or has none.
    Experts(bool),
    /// Its router has sigmoids, or has softmax.
    Sigmoid(bool),
}

const LLAMA: Known = Known {
    name: "llama",
    model_type: "llama",
    when: When::Always,
    interleaved: false,
    window: None,
    may_have_windows: true,
    wide_queries: None,
    rounded_yarn: true,
    renormalise: Flag::Key("expert_weights_norm", false),
    expert_length: Some("expert_feed_forward_length"),
    mlp_norm: "blk.{i}.ffn_norm",
};

const KNOWN: [Known; 16] = [
    Known { when: When::Experts(false), interleaved: true, ..LLAMA },
    Known {
        model_type: "mixtral",
        when: When::Experts(true),
        interleaved: true,
        renormalise: Flag::Always,
        expert_length: None,
        ..LLAMA
    },
    Known { name: "qwen2", model_type: "qwen2", ..LLAMA },
    Known { name: "qwen3", model_type: "qwen3", ..LLAMA },
    // llama.cpp renormalises whatever the file says, and so do all published models.
    Known { name: "qwen3moe", model_type: "qwen3_moe", renormalise: Flag::Key("expert_weights_norm", true), ..LLAMA },
    Known { name: "gpt2", model_type: "gpt2", ..LLAMA },
    Known { name: "gptneox", model_type: "gpt_neox", ..LLAMA },
    Known {
        name: "gpt-oss",
        model_type: "gpt_oss",
        window: Some(128),
        rounded_yarn: false,
        renormalise: Flag::Always,
        mlp_norm: "blk.{i}.post_attention_norm",
        ..LLAMA
    },
    Known { name: "dots1", model_type: "dots1", ..LLAMA },
    Known { name: "phi3", model_type: "phi3", ..LLAMA },
    Known { name: "smollm3", model_type: "smollm3", interleaved: true, ..LLAMA },
    // OLMo 3 has the same name, and windows.
    Known { name: "olmo2", model_type: "olmo2", may_have_windows: false, ..LLAMA },
    Known { name: "gemma2", model_type: "gemma2", window: Some(4096), wide_queries: Some(46), ..LLAMA },
    Known { name: "gemma3", model_type: "gemma3_text", wide_queries: Some(62), ..LLAMA },
    Known { name: "deepseek2", model_type: "deepseek_v2", when: When::Sigmoid(false), ..LLAMA },
    Known { name: "deepseek2", model_type: "deepseek_v3", when: When::Sigmoid(true), ..LLAMA },
];

impl Known {
    /// # Errors
    /// [`ModelError::Config`](super::super::ModelError::Config) for an architecture that is missing or not known.
    pub(super) fn find(header: &Header) -> ModelResult<(&'static Self, &'static Architecture)> {
        let need = || {
            let mut names: Vec<_> = KNOWN.iter().map(|known| known.name).collect();
            names.dedup();
            format!("one of {}", names.join(", "))
        };
        let key = "general.architecture";
        let name = header.text(key)?.ok_or_else(|| header.error(key, "nothing", need()))?;
        let number = |key| header.u32(&format!("{name}.{key}"));
        let has_experts = number(EXPERTS)?.is_some_and(|count| count > 0);
        let gating = number(GATING)?.filter(|gating| *gating > 0);
        let fits = |known: &&Self| {
            known.name == name
                && match known.when {
                    When::Always => true,
                    When::Experts(wanted) => wanted == has_experts,
                    When::Sigmoid(wanted) => wanted == (gating == Some(SIGMOID)),
                }
        };
        let known = KNOWN.iter().find(fits).ok_or_else(|| header.error(key, name, need()))?;
        let table = Architecture::find(known.model_type).ok_or_else(|| header.error(key, name, need()))?;
        let gatings: &[u32] = match (table.experts, known.renormalise) {
            (Some(Experts { scoring: Scoring::Sigmoid, .. }), _) => &[SIGMOID],
            // Divided by their sum, all probabilities are those of the selected ones.
            (Some(_), Flag::Always) => &[1, 3],
            (Some(_), _) => &[1],
            (None, _) => &[],
        };
        if let Some(gating) = gating.filter(|gating| !gatings.contains(gating)) {
            let known: Vec<_> = gatings.iter().map(u32::to_string).collect();
            let need = if known.is_empty() { "nothing".to_owned() } else { known.join(" or ") };
            return Err(header.error(&format!("{name}.{GATING}"), gating, format!("{need}, as the architecture has")));
        }
        if table.experts.is_none() && has_experts {
            let need = format!("0; mixtures of experts are not supported for {name}");
            return Err(header.error(&format!("{name}.{EXPERTS}"), number(EXPERTS)?.unwrap_or_default(), need));
        }
        Ok((known, table))
    }

    /// The table's architecture by the names of the format, with the parts that a file has tensors for.
    pub(super) fn architecture(&self, table: &Architecture, header: &Header) -> Architecture {
        let has = |name: &str| header.tensors.contains_key(name);
        let present = |flag: Flag, tensor: &str| match flag {
            Flag::Key(..) if has(tensor) => Flag::Always,
            Flag::Key(..) => Flag::Never,
            fixed => fixed,
        };
        let tensors = self.tensors(&table.tensors, &has);
        let fused = matches!(tensors.qkv, Qkv::Stacked(_));
        let layers = match table.window.map(|window| window.layers) {
            Some(WindowedLayers::AllBut(_, every)) => WindowedLayers::AllBut(Some(WINDOW_PATTERN), every),
            _ => WindowedLayers::All,
        };
        Architecture {
            config: keys(table),
            // Files have the sum.
            norm_offset: 0.0,
            positions: match table.positions {
                Positions::Learned => Positions::Learned,
                Positions::Rope(rope) => Positions::Rope(RopeKeys {
                    theta: &[FREQ_BASE],
                    default_theta: 10_000.0,
                    partial: &[FRACTION],
                    default_partial: 1.0,
                    needs_scaling: false,
                    windowed_theta: rope.windowed_theta.map(|_| (WINDOWED_FREQ_BASE, 10_000.0)),
                    ..rope
                }),
            },
            qkv_bias: present(table.qkv_bias, if fused { "blk.0.attn_qkv.bias" } else { "blk.0.attn_q.bias" }),
            output_bias: present(table.output_bias, "blk.0.attn_output.bias"),
            mlp_bias: present(table.mlp_bias, "blk.0.ffn_up.bias"),
            tied_head: if has("output.weight") { Flag::Never } else { Flag::Always },
            window: Some(Window { switch: None, size: Optional { key: WINDOW, default: self.window }, layers }),
            query_scalar: table.query_scalar.map(|(_, default)| (QUERY_SCALAR, default)),
            latent: table.latent.map(|_| LatentKeys {
                q_rank: Optional { key: "attention.q_lora_rank", default: None },
                kv_rank: ("attention.kv_lora_rank", 512),
                rope_dim: (DIMENSIONS, 64),
                nope_dim: (NOPE_LENGTH, 128),
                value_dim: (LATENT_VALUE_LENGTH, 128),
                interleaved: Flag::Always,
            }),
            experts: table.experts.map(|experts| self.experts(&experts, header)),
            tensors,
            ..*table
        }
    }

    fn experts(&self, of: &Experts, header: &Header) -> Experts {
        let form = of.forms.first();
        let biased = form.is_some_and(|form| form.router_bias);
        // llama.cpp reads models of such an architecture without it, too.
        let corrected = form.is_some_and(|form| form.correction.is_some())
            && header.tensors.keys().any(|name| name.ends_with(".exp_probs_b.bias"));
        Experts {
            count: (&[EXPERTS], None),
            selected: ("expert_used_count", None),
            intermediate_size: self.expert_length.map(|key| (key, 1)),
            clamped_swiglu: of.clamped_swiglu,
            scoring: of.scoring,
            renormalise: self.renormalise,
            scale: of.scale.map(|_| (EXPERT_SCALE, 1.0)),
            groups: of.groups.map(|groups| GroupKeys {
                method: None,
                count: (EXPERT_GROUPS[0], 1),
                selected: (EXPERT_GROUPS[1], 1),
                ..groups
            }),
            shared: of.shared.map(|_| ("expert_shared_count", 0)),
            first: of.first.map(|_| ("leading_dense_block_count", 0)),
            every: None,
            dense: None,
            forms: match (biased, corrected) {
                (true, _) => &BIASED,
                (false, true) => &CORRECTED,
                (false, false) => &PLAIN,
            },
        }
    }

    /// The format's names of tensors.
    fn tensors(&self, of: &TensorNames, has: &impl Fn(&str) -> bool) -> TensorNames {
        TensorNames {
            prefixes: &[""],
            embedding: "token_embd",
            position_embedding: of.position_embedding.map(|_| "position_embd"),
            attn_norm: of.attn_norm.map(|_| "blk.{i}.attn_norm"),
            post_attn_norm: of.post_attn_norm.map(|_| "blk.{i}.post_attention_norm"),
            qkv: match of.qkv {
                Qkv::Latent(_) => Qkv::Latent(LatentNames {
                    q: "blk.{i}.attn_q",
                    q_a: "blk.{i}.attn_q_a",
                    q_a_norm: "blk.{i}.attn_q_a_norm",
                    q_b: "blk.{i}.attn_q_b",
                    kv_a: "blk.{i}.attn_kv_a_mqa",
                    kv_a_norm: "blk.{i}.attn_kv_a_norm",
                    // Old files have it in one piece.
                    kv_b: if has("blk.0.attn_kv_b.weight") {
                        FromLatents::PerHead("blk.{i}.attn_kv_b")
                    } else {
                        FromLatents::Split(["blk.{i}.attn_k_b", "blk.{i}.attn_v_b"])
                    },
                }),
                Qkv::Split(_) if !has("blk.0.attn_qkv.weight") => SPLIT,
                Qkv::Stacked(_) | Qkv::PerHead(_) if has("blk.0.attn_q.weight") => SPLIT,
                // What is stored per head elsewhere is sorted by queries, keys and values here.
                Qkv::Split(_) | Qkv::Stacked(_) | Qkv::PerHead(_) => Qkv::Stacked("blk.{i}.attn_qkv"),
            },
            output: "blk.{i}.attn_output",
            sinks: of.sinks.map(|_| "blk.{i}.attn_sinks.weight"),
            qk_norm: of.qk_norm.map(|(over, _)| (over, ["blk.{i}.attn_q_norm", "blk.{i}.attn_k_norm"])),
            mlp_norm: of.mlp_norm.map(|_| self.mlp_norm),
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
            ignored: &[ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS],
        }
    }
}

const SPLIT: Qkv = Qkv::Split(["blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"]);

/// Three tensors of all experts, or two.
const fn forms(of: ExpertNames, bias: bool) -> [ExpertNames; 2] {
    const FUSED: [&str; 2] = ["blk.{i}.ffn_gate_up_exps.weight", "blk.{i}.ffn_down_exps.weight"];
    let names = ["blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps", "blk.{i}.ffn_down_exps"];
    [
        ExpertNames { tensors: ExpertTensors::Stacked { names, bias }, ..of },
        ExpertNames { tensors: ExpertTensors::Packed(FUSED), ..of },
    ]
}

const NAMES: ExpertNames = ExpertNames {
    router: "blk.{i}.ffn_gate_inp",
    router_bias: false,
    correction: None,
    shared: ["blk.{i}.ffn_gate_shexp", "blk.{i}.ffn_up_shexp", "blk.{i}.ffn_down_shexp"],
    tensors: ExpertTensors::Packed([""; 2]),
};

static PLAIN: [ExpertNames; 2] = forms(NAMES, false);
static CORRECTED: [ExpertNames; 2] =
    forms(ExpertNames { correction: Some("blk.{i}.exp_probs_b.bias"), ..NAMES }, false);
static BIASED: [ExpertNames; 2] = forms(ExpertNames { router_bias: true, ..NAMES }, true);

/// The format's names of settings. All are preceded by the architecture's name.
fn keys(of: &Architecture) -> ConfigKeys {
    let norm_eps = match of.norm {
        NormKind::Rms => "attention.layer_norm_rms_epsilon",
        NormKind::Layer => "attention.layer_norm_epsilon",
    };
    ConfigKeys {
        num_layers: "block_count",
        hidden_size: "embedding_length",
        num_q_heads: HEADS,
        num_kv_heads: Some(KV_HEADS),
        default_num_kv_heads: None,
        head_dim: Some(KEY_LENGTH),
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

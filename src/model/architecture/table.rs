//! The table of architectures.

use super::{
    Architecture, ConfigKeys, ExpertNames, ExpertTensors, Experts, Flag, FromLatents, GroupKeys, LatentKeys,
    LatentNames, Optional, Positions, Qkv, RopeKeys, SizeDefault, TensorNames, Up, Window, WindowedLayers,
};
use crate::model::config::QkNorm;
use crate::model::ops::{GroupScore, NormKind, Scoring};

/// The keys that Llama and all that descend from it share.
const LLAMA_KEYS: ConfigKeys = ConfigKeys {
    num_layers: "num_hidden_layers",
    hidden_size: "hidden_size",
    num_q_heads: "num_attention_heads",
    num_kv_heads: Some("num_key_value_heads"),
    default_num_kv_heads: None,
    head_dim: Some("head_dim"),
    default_head_dim: None,
    intermediate_size: "intermediate_size",
    default_intermediate_size: SizeDefault::Required,
    vocab_size: "vocab_size",
    max_positions: "max_position_embeddings",
    norm_eps: ("rms_norm_eps", 1e-6),
    activation: ("hidden_act", "silu"),
    fixed: &[],
    absent: &[],
};

const LLAMA_TENSORS: TensorNames = TensorNames {
    prefixes: &["model.", ""],
    embedding: "embed_tokens",
    position_embedding: None,
    attn_norm: Some("layers.{i}.input_layernorm"),
    post_attn_norm: None,
    qkv: Qkv::Split(["layers.{i}.self_attn.q_proj", "layers.{i}.self_attn.k_proj", "layers.{i}.self_attn.v_proj"]),
    output: "layers.{i}.self_attn.o_proj",
    sinks: None,
    qk_norm: None,
    mlp_norm: Some("layers.{i}.post_attention_layernorm"),
    post_mlp_norm: None,
    up: Up::Gated(["layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"]),
    down: "layers.{i}.mlp.down_proj",
    final_norm: "norm",
    head: "lm_head",
    transposed: false,
    ignored: &[".rotary_emb.inv_freq"],
};

/// The base is the paper's, and transformers' default.
const LLAMA_ROPE: RopeKeys = RopeKeys {
    theta: &["rope_theta"],
    default_theta: 10_000.0,
    partial: &["partial_rotary_factor"],
    default_partial: 1.0,
    needs_scaling: false,
    long_names: &[],
    windowed_theta: None,
    skipped: None,
};

const QK_NORMS: [&str; 2] = ["layers.{i}.self_attn.q_norm", "layers.{i}.self_attn.k_norm"];

/// The same window in all layers.
const fn window_of_all(default: Option<u32>) -> Window {
    Window { switch: None, size: Optional { key: "sliding_window", default }, layers: WindowedLayers::All }
}

const QWEN_WINDOW: Window = Window {
    switch: Some("use_sliding_window"),
    size: Optional { key: "sliding_window", default: None },
    layers: WindowedLayers::From("max_window_layers", 28),
};

/// Llama, and what the others below change of it.
const LLAMA: Architecture = Architecture {
    model_type: "llama",
    config: LLAMA_KEYS,
    norm: NormKind::Rms,
    norm_offset: 0.0,
    positions: Positions::Rope(LLAMA_ROPE),
    parallel_residual: Flag::Never,
    qkv_bias: Flag::Key("attention_bias", false),
    output_bias: Flag::Key("attention_bias", false),
    mlp_bias: Flag::Key("mlp_bias", false),
    tied_head: Flag::Key("tie_word_embeddings", false),
    window: None,
    query_scalar: None,
    attention_softcap: None,
    logit_softcap: None,
    latent: None,
    scaled_embedding: false,
    experts: None,
    tensors: LLAMA_TENSORS,
};

const MIXTRAL_EXPERTS: [&str; 3] = [
    "layers.{i}.block_sparse_moe.experts.{e}.w1",
    "layers.{i}.block_sparse_moe.experts.{e}.w3",
    "layers.{i}.block_sparse_moe.experts.{e}.w2",
];

const QWEN_EXPERTS: [&str; 3] = [
    "layers.{i}.mlp.experts.{e}.gate_proj",
    "layers.{i}.mlp.experts.{e}.up_proj",
    "layers.{i}.mlp.experts.{e}.down_proj",
];

const SHARED_EXPERT: [&str; 3] = [
    "layers.{i}.mlp.shared_experts.gate_proj",
    "layers.{i}.mlp.shared_experts.up_proj",
    "layers.{i}.mlp.shared_experts.down_proj",
];

/// Mixtral's mixture, and what the others below change of it.
const MIXTRAL_MIX: Experts = Experts {
    count: (&["num_local_experts"], Some(8)),
    selected: ("num_experts_per_tok", Some(2)),
    intermediate_size: None,
    clamped_swiglu: None,
    scoring: Scoring::Softmax,
    renormalise: Flag::Always,
    scale: None,
    groups: None,
    shared: None,
    first: None,
    every: None,
    dense: None,
    forms: &[
        ExpertNames {
            router: "layers.{i}.block_sparse_moe.gate",
            tensors: ExpertTensors::Each(MIXTRAL_EXPERTS),
            ..PACKED_EXPERTS
        },
        PACKED_EXPERTS,
    ],
};

/// The mixture of DeepSeek-V3 ([DeepSeek-AI 2024](https://arxiv.org/abs/2412.19437)).
const DEEPSEEK_V3_MIX: Experts = Experts {
    count: (&["n_routed_experts", "num_local_experts"], None),
    selected: ("num_experts_per_tok", None),
    scoring: Scoring::Sigmoid,
    renormalise: Flag::Key("norm_topk_prob", false),
    scale: Some(("routed_scaling_factor", 1.0)),
    groups: Some(GroupKeys {
        method: None,
        count: ("n_group", 1),
        selected: ("topk_group", 1),
        score: GroupScore::TopTwo,
    }),
    shared: Some(("n_shared_experts", 0)),
    first: Some(("first_k_dense_replace", 0)),
    forms: &[ExpertNames { tensors: ExpertTensors::Each(QWEN_EXPERTS), ..CORRECTED_EXPERTS }, CORRECTED_EXPERTS],
    ..MIXTRAL_MIX
};

const CORRECTED_EXPERTS: ExpertNames =
    ExpertNames { correction: Some("layers.{i}.mlp.gate.e_score_correction_bias"), ..PACKED_EXPERTS };

/// As transformers 5 holds experts, whatever the model.
const PACKED_EXPERTS: ExpertNames = ExpertNames {
    router: "layers.{i}.mlp.gate",
    router_bias: false,
    correction: None,
    shared: SHARED_EXPERT,
    tensors: ExpertTensors::Packed(["layers.{i}.mlp.experts.gate_up_proj", "layers.{i}.mlp.experts.down_proj"]),
};

const GPT_OSS_EXPERTS: [&str; 2] = ["layers.{i}.mlp.experts.gate_up_proj", "layers.{i}.mlp.experts.down_proj"];

const GPT_OSS_NAMES: ExpertNames = ExpertNames {
    router: "layers.{i}.mlp.router",
    router_bias: true,
    tensors: ExpertTensors::Interleaved(GPT_OSS_EXPERTS),
    ..PACKED_EXPERTS
};

const GEMMA_WINDOW: Window = Window {
    switch: None,
    size: Optional { key: "sliding_window", default: Some(4096) },
    layers: WindowedLayers::AllBut(None, 2),
};

const GEMMA_TENSORS: TensorNames = TensorNames {
    post_attn_norm: Some("layers.{i}.post_attention_layernorm"),
    mlp_norm: Some("layers.{i}.pre_feedforward_layernorm"),
    post_mlp_norm: Some("layers.{i}.post_feedforward_layernorm"),
    ..LLAMA_TENSORS
};

const GEMMA2: Architecture = Architecture {
    model_type: "gemma2",
    config: ConfigKeys {
        default_num_kv_heads: Some(4),
        default_head_dim: Some(256),
        activation: ("hidden_activation", "gelu_pytorch_tanh"),
        fixed: &[("use_bidirectional_attention", false)],
        ..LLAMA_KEYS
    },
    norm_offset: 1.0,
    mlp_bias: Flag::Never,
    tied_head: Flag::Key("tie_word_embeddings", true),
    window: Some(GEMMA_WINDOW),
    query_scalar: Some(("query_pre_attn_scalar", 256.0)),
    attention_softcap: Some(Optional { key: "attn_logit_softcapping", default: Some(50.0) }),
    logit_softcap: Some(Optional { key: "final_logit_softcapping", default: Some(30.0) }),
    scaled_embedding: true,
    tensors: GEMMA_TENSORS,
    ..LLAMA
};

/// DeepSeek-V3: what it calls the sizes, and which it has by default.
const DEEPSEEK_LATENT: LatentKeys = LatentKeys {
    q_rank: Optional { key: "q_lora_rank", default: Some(1536) },
    kv_rank: ("kv_lora_rank", 512),
    rope_dim: ("qk_rope_head_dim", 64),
    nope_dim: ("qk_nope_head_dim", 128),
    value_dim: ("v_head_dim", 128),
    interleaved: Flag::Key("rope_interleave", true),
};

const DEEPSEEK_V3: Architecture = Architecture {
    model_type: "deepseek_v3",
    // What is called so is the rotated part of a head.
    config: ConfigKeys { head_dim: None, ..LLAMA_KEYS },
    mlp_bias: Flag::Never,
    latent: Some(DEEPSEEK_LATENT),
    experts: Some(Experts {
        count: (&["n_routed_experts", "num_local_experts"], Some(256)),
        selected: ("num_experts_per_tok", Some(8)),
        intermediate_size: Some(("moe_intermediate_size", 2048)),
        renormalise: Flag::Key("norm_topk_prob", true),
        scale: Some(("routed_scaling_factor", 2.5)),
        groups: Some(GroupKeys {
            method: None,
            count: ("n_group", 8),
            selected: ("topk_group", 4),
            score: GroupScore::TopTwo,
        }),
        shared: Some(("n_shared_experts", 1)),
        first: Some(("first_k_dense_replace", 3)),
        ..DEEPSEEK_V3_MIX
    }),
    tensors: TensorNames {
        qkv: Qkv::Latent(LatentNames {
            q: "layers.{i}.self_attn.q_proj",
            q_a: "layers.{i}.self_attn.q_a_proj",
            q_a_norm: "layers.{i}.self_attn.q_a_layernorm",
            q_b: "layers.{i}.self_attn.q_b_proj",
            kv_a: "layers.{i}.self_attn.kv_a_proj_with_mqa",
            kv_a_norm: "layers.{i}.self_attn.kv_a_layernorm",
            kv_b: FromLatents::PerHead("layers.{i}.self_attn.kv_b_proj"),
        }),
        ..LLAMA_TENSORS
    },
    ..LLAMA
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_type: "gpt2",
        config: ConfigKeys {
            num_layers: "n_layer",
            hidden_size: "n_embd",
            num_q_heads: "n_head",
            num_kv_heads: None,
            default_num_kv_heads: None,
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
            absent: &[],
        },
        norm: NormKind::Layer,
        positions: Positions::Learned,
        parallel_residual: Flag::Never,
        qkv_bias: Flag::Always,
        output_bias: Flag::Always,
        mlp_bias: Flag::Always,
        tied_head: Flag::Key("tie_word_embeddings", true),
        tensors: TensorNames {
            prefixes: &["transformer.", ""],
            embedding: "wte",
            position_embedding: Some("wpe"),
            attn_norm: Some("h.{i}.ln_1"),
            post_attn_norm: None,
            qkv: Qkv::Stacked("h.{i}.attn.c_attn"),
            output: "h.{i}.attn.c_proj",
            sinks: None,
            qk_norm: None,
            mlp_norm: Some("h.{i}.ln_2"),
            post_mlp_norm: None,
            up: Up::Alone("h.{i}.mlp.c_fc"),
            down: "h.{i}.mlp.c_proj",
            final_norm: "ln_f",
            head: "lm_head",
            transposed: true,
            ignored: &[".attn.bias", ".attn.masked_bias"],
        },
        ..LLAMA
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
        positions: Positions::Rope(RopeKeys {
            theta: &["rotary_emb_base", "rope_theta"],
            partial: &["rotary_pct", "partial_rotary_factor"],
            default_partial: 0.25,
            ..LLAMA_ROPE
        }),
        parallel_residual: Flag::Key("use_parallel_residual", true),
        qkv_bias: Flag::Key("attention_bias", true),
        output_bias: Flag::Key("attention_bias", true),
        mlp_bias: Flag::Always,
        tied_head: Flag::Key("tie_word_embeddings", false),
        tensors: TensorNames {
            prefixes: &["gpt_neox.", ""],
            embedding: "embed_in",
            position_embedding: None,
            attn_norm: Some("layers.{i}.input_layernorm"),
            post_attn_norm: None,
            qkv: Qkv::PerHead("layers.{i}.attention.query_key_value"),
            output: "layers.{i}.attention.dense",
            sinks: None,
            qk_norm: None,
            mlp_norm: Some("layers.{i}.post_attention_layernorm"),
            post_mlp_norm: None,
            up: Up::Alone("layers.{i}.mlp.dense_h_to_4h"),
            down: "layers.{i}.mlp.dense_4h_to_h",
            final_norm: "final_layer_norm",
            head: "embed_out",
            transposed: false,
            ignored: &[".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"],
        },
        ..LLAMA
    },
    LLAMA,
    Architecture {
        model_type: "mistral",
        config: ConfigKeys { default_num_kv_heads: Some(8), ..LLAMA_KEYS },
        qkv_bias: Flag::Never,
        output_bias: Flag::Never,
        mlp_bias: Flag::Never,
        window: Some(window_of_all(Some(4096))),
        ..LLAMA
    },
    Architecture {
        model_type: "qwen2",
        config: ConfigKeys { default_num_kv_heads: Some(32), ..LLAMA_KEYS },
        qkv_bias: Flag::Always,
        output_bias: Flag::Never,
        mlp_bias: Flag::Never,
        window: Some(QWEN_WINDOW),
        ..LLAMA
    },
    Architecture {
        model_type: "qwen3",
        config: ConfigKeys { default_num_kv_heads: Some(32), default_head_dim: Some(128), ..LLAMA_KEYS },
        mlp_bias: Flag::Never,
        window: Some(QWEN_WINDOW),
        tensors: TensorNames { qk_norm: Some((QkNorm::PerHead, QK_NORMS)), ..LLAMA_TENSORS },
        ..LLAMA
    },
    Architecture {
        model_type: "mixtral",
        config: ConfigKeys { default_num_kv_heads: Some(8), norm_eps: ("rms_norm_eps", 1e-5), ..LLAMA_KEYS },
        positions: Positions::Rope(RopeKeys { default_theta: 1_000_000.0, ..LLAMA_ROPE }),
        qkv_bias: Flag::Never,
        output_bias: Flag::Never,
        mlp_bias: Flag::Never,
        window: Some(window_of_all(None)),
        experts: Some(MIXTRAL_MIX),
        ..LLAMA
    },
    Architecture {
        model_type: "qwen3_moe",
        config: ConfigKeys { default_num_kv_heads: Some(4), ..LLAMA_KEYS },
        mlp_bias: Flag::Never,
        window: Some(Window { switch: Some("use_sliding_window"), ..window_of_all(Some(4096)) }),
        experts: Some(Experts {
            count: (&["num_experts", "num_local_experts"], Some(128)),
            selected: ("num_experts_per_tok", Some(8)),
            intermediate_size: Some(("moe_intermediate_size", 768)),
            renormalise: Flag::Key("norm_topk_prob", false),
            every: Some(("decoder_sparse_step", 1)),
            dense: Some("mlp_only_layers"),
            forms: &[ExpertNames { tensors: ExpertTensors::Each(QWEN_EXPERTS), ..PACKED_EXPERTS }, PACKED_EXPERTS],
            ..MIXTRAL_MIX
        }),
        tensors: TensorNames { qk_norm: Some((QkNorm::PerHead, QK_NORMS)), ..LLAMA_TENSORS },
        ..LLAMA
    },
    Architecture {
        model_type: "gpt_oss",
        config: ConfigKeys {
            default_num_kv_heads: Some(8),
            default_head_dim: Some(64),
            norm_eps: ("rms_norm_eps", 1e-5),
            ..LLAMA_KEYS
        },
        positions: Positions::Rope(RopeKeys { default_theta: 150_000.0, needs_scaling: true, ..LLAMA_ROPE }),
        qkv_bias: Flag::Key("attention_bias", true),
        output_bias: Flag::Key("attention_bias", true),
        mlp_bias: Flag::Never,
        window: Some(Window {
            switch: None,
            size: Optional { key: "sliding_window", default: Some(128) },
            layers: WindowedLayers::AllBut(None, 2),
        }),
        experts: Some(Experts {
            count: (&["num_local_experts"], Some(128)),
            selected: ("num_experts_per_tok", Some(4)),
            clamped_swiglu: Some([("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)]),
            forms: &[
                ExpertNames { tensors: ExpertTensors::Mxfp4(GPT_OSS_EXPERTS), ..GPT_OSS_NAMES },
                ExpertNames { tensors: ExpertTensors::Interleaved(GPT_OSS_EXPERTS), ..GPT_OSS_NAMES },
            ],
            ..MIXTRAL_MIX
        }),
        tensors: TensorNames { sinks: Some("layers.{i}.self_attn.sinks"), ..LLAMA_TENSORS },
        ..LLAMA
    },
    Architecture {
        model_type: "dots1",
        config: ConfigKeys { default_num_kv_heads: Some(32), ..LLAMA_KEYS },
        mlp_bias: Flag::Never,
        window: Some(Window {
            switch: None,
            size: Optional { key: "sliding_window", default: Some(4096) },
            layers: WindowedLayers::From("max_window_layers", 62),
        }),
        experts: Some(Experts { intermediate_size: Some(("moe_intermediate_size", 1408)), ..DEEPSEEK_V3_MIX }),
        tensors: TensorNames { qk_norm: Some((QkNorm::PerHead, QK_NORMS)), ..LLAMA_TENSORS },
        ..LLAMA
    },
    Architecture {
        model_type: "phi3",
        config: ConfigKeys { norm_eps: ("rms_norm_eps", 1e-5), ..LLAMA_KEYS },
        positions: Positions::Rope(RopeKeys { long_names: &["su", "yarn"], ..LLAMA_ROPE }),
        qkv_bias: Flag::Never,
        output_bias: Flag::Never,
        mlp_bias: Flag::Never,
        window: Some(window_of_all(None)),
        tensors: TensorNames {
            qkv: Qkv::Stacked("layers.{i}.self_attn.qkv_proj"),
            up: Up::Packed("layers.{i}.mlp.gate_up_proj"),
            ..LLAMA_TENSORS
        },
        ..LLAMA
    },
    Architecture {
        model_type: "smollm3",
        config: ConfigKeys { default_num_kv_heads: Some(4), ..LLAMA_KEYS },
        positions: Positions::Rope(RopeKeys {
            default_theta: 2_000_000.0,
            skipped: Some(("no_rope_layers", "no_rope_layer_interval", 4)),
            ..LLAMA_ROPE
        }),
        tied_head: Flag::Key("tie_word_embeddings", true),
        window: Some(Window { layers: WindowedLayers::WithoutRope, ..QWEN_WINDOW }),
        ..LLAMA
    },
    Architecture {
        model_type: "olmo2",
        config: ConfigKeys { norm_eps: ("rms_norm_eps", 1e-5), ..LLAMA_KEYS },
        mlp_bias: Flag::Never,
        tensors: TensorNames {
            attn_norm: None,
            post_attn_norm: Some("layers.{i}.post_attention_layernorm"),
            qk_norm: Some((QkNorm::AllHeads, QK_NORMS)),
            mlp_norm: None,
            post_mlp_norm: Some("layers.{i}.post_feedforward_layernorm"),
            ..LLAMA_TENSORS
        },
        ..LLAMA
    },
    GEMMA2,
    Architecture {
        model_type: "gemma3_text",
        // transformers reads a soft cap of attention, and leaves it out.
        config: ConfigKeys { absent: &["attn_logit_softcapping"], ..GEMMA2.config },
        positions: Positions::Rope(RopeKeys {
            default_theta: 1_000_000.0,
            windowed_theta: Some(("rope_local_base_freq", 10_000.0)),
            ..LLAMA_ROPE
        }),
        window: Some(Window { layers: WindowedLayers::AllBut(Some("sliding_window_pattern"), 6), ..GEMMA_WINDOW }),
        attention_softcap: None,
        logit_softcap: Some(Optional { key: "final_logit_softcapping", default: None }),
        tensors: TensorNames { qk_norm: Some((QkNorm::PerHead, QK_NORMS)), ..GEMMA_TENSORS },
        ..GEMMA2
    },
    Architecture {
        model_type: "deepseek_v2",
        // transformers leaves it out: weights of experts are not divided by their sum.
        config: ConfigKeys { fixed: &[("norm_topk_prob", false)], ..DEEPSEEK_V3.config },
        mlp_bias: Flag::Key("mlp_bias", false),
        latent: Some(LatentKeys { interleaved: Flag::Always, ..DEEPSEEK_LATENT }),
        experts: Some(Experts {
            count: (&["n_routed_experts", "num_experts"], Some(64)),
            selected: ("num_experts_per_tok", None),
            intermediate_size: Some(("moe_intermediate_size", 1407)),
            scale: Some(("routed_scaling_factor", 1.0)),
            groups: Some(GroupKeys {
                method: Some(["topk_method", "greedy", "group_limited_greedy"]),
                count: ("n_group", 1),
                selected: ("topk_group", 1),
                score: GroupScore::Best,
            }),
            shared: Some(("n_shared_experts", 2)),
            first: Some(("first_k_dense_replace", 0)),
            renormalise: Flag::Never,
            forms: &[ExpertNames { tensors: ExpertTensors::Each(QWEN_EXPERTS), ..PACKED_EXPERTS }, PACKED_EXPERTS],
            ..MIXTRAL_MIX
        }),
        ..DEEPSEEK_V3
    },
    DEEPSEEK_V3,
];

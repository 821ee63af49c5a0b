//! Settings of mixtures of experts: what `config.json` may say, and what it is refused for.

use folio::model::{ActivationKind, Factor, LinearExperts, ModelConfig, ModelResult};
use serde_json::{Value, json};

fn config(model_type: &str, changes: &Value) -> ModelResult<ModelConfig> {
    let mut settings = json!({ "model_type": model_type, "hidden_size": 64, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 96, "vocab_size": 100,
        "max_position_embeddings": 128 });
    if model_type == "gpt_oss" {
        settings["rope_scaling"] = json!({ "rope_type": "yarn", "factor": 32.0, "truncate": false });
    }
    for (key, value) in changes.as_object().unwrap() {
        settings[key] = value.clone();
    }
    ModelConfig::from_json(&settings.to_string())
}

fn refused(model_type: &str, changes: Value, key: &str, need: &str) {
    let error = config(model_type, &changes).unwrap_err().to_string();
    assert!(error.contains(key) && error.contains(need), "{changes}: {error}");
}

/// Layers with experts, of six.
fn sparse(changes: Value) -> Vec<u32> {
    let experts = config("qwen3_moe", &changes).unwrap().experts.unwrap();
    (0..6).filter(|&layer| experts.layers.contains(layer)).collect()
}

#[test]
fn defaults_are_those_of_transformers() {
    for (model_type, count, per_row, inner, renormalise) in
        [("mixtral", 8, 2, 96, true), ("qwen3_moe", 128, 8, 768, false), ("gpt_oss", 128, 4, 96, true)]
    {
        let experts = config(model_type, &json!({})).unwrap().experts.unwrap();
        assert_eq!(experts.router.experts, LinearExperts { count, per_row }, "{model_type}");
        assert_eq!((experts.intermediate_size, experts.router.renormalise), (inner, renormalise), "{model_type}");
    }
    let gpt_oss = config("gpt_oss", &json!({})).unwrap();
    let [alpha, limit] = [1.702, 7.0].map(|value| Factor::new(value).unwrap());
    assert_eq!(gpt_oss.experts.unwrap().activation, ActivationKind::ClampedSwiglu { alpha, limit });
    assert!(gpt_oss.attention_sinks && gpt_oss.qkv_bias && gpt_oss.output_bias);
    assert_eq!(config("llama", &json!({})).unwrap().experts, None);
}

#[test]
fn which_layers_have_experts() {
    assert_eq!(sparse(json!({})), [0, 1, 2, 3, 4, 5]);
    assert_eq!(sparse(json!({ "decoder_sparse_step": 2 })), [1, 3, 5]);
    assert_eq!(sparse(json!({ "mlp_only_layers": [5, 1, 900] })), [0, 2, 3, 4]);
    assert_eq!(sparse(json!({ "decoder_sparse_step": 3, "mlp_only_layers": [2] })), [5]);
    assert_eq!(sparse(json!({ "decoder_sparse_step": 7 })), [] as [u32; 0]);
}

#[test]
fn names_of_the_number_of_experts() {
    let count = |changes| config("qwen3_moe", &changes).unwrap().experts.unwrap().router.experts.count;
    assert_eq!(count(json!({ "num_experts": 16 })), 16);
    assert_eq!(count(json!({ "num_local_experts": 24 })), 24);
}

#[test]
fn wrong_settings_are_named() {
    refused("mixtral", json!({ "num_local_experts": 0 }), "num_local_experts", "an integer from 1");
    refused("mixtral", json!({ "num_local_experts": 600 }), "num_local_experts", "1 to 512");
    refused("mixtral", json!({ "num_experts_per_tok": 9 }), "num_experts_per_tok", "1 to 8");
    refused("qwen3_moe", json!({ "num_experts_per_tok": 33 }), "num_experts_per_tok", "1 to 32");
    refused("qwen3_moe", json!({ "moe_intermediate_size": 30 }), "moe_intermediate_size", "a multiple of 4");
    refused("qwen3_moe", json!({ "decoder_sparse_step": 0 }), "decoder_sparse_step", "an integer from 1");
    refused("qwen3_moe", json!({ "mlp_only_layers": [-1] }), "mlp_only_layers", "a list of layers");
    refused("qwen3_moe", json!({ "norm_topk_prob": 1 }), "norm_topk_prob", "true or false");
    refused("gpt_oss", json!({ "swiglu_limit": 0 }), "swiglu_limit", "above 0");
    refused("gpt_oss", json!({ "swiglu_alpha": 1e-300 }), "swiglu_alpha", "above 0");
    refused("gpt_oss", json!({ "rope_scaling": null }), "rope_scaling", "rope_type");
    let mxfp4 = json!({ "quantization_config": { "quant_method": "mxfp4" } });
    assert!(config("gpt_oss", &mxfp4).is_ok());
    refused("mixtral", mxfp4, "quantization_config", "mxfp4 of gpt_oss");
    refused("gpt_oss", json!({ "quantization_config": { "quant_method": "awq" } }), "quantization_config", "f32");
    refused("gpt_oss", json!({ "quantization_config": {} }), "quantization_config", "f32");
}

/// A missing number of heads of keys and values is what transformers takes then; null is as many as there are query heads.
#[test]
fn missing_heads_of_keys_and_values() {
    for (model_type, default) in [
        ("llama", 32),
        ("phi3", 32),
        ("olmo2", 32),
        ("mistral", 8),
        ("qwen2", 32),
        ("qwen3", 32),
        ("smollm3", 4),
        ("gemma2", 4),
        ("gemma3_text", 4),
        ("mixtral", 8),
        ("qwen3_moe", 4),
        ("gpt_oss", 8),
    ] {
        let mut settings = json!({ "model_type": model_type, "hidden_size": 512, "num_hidden_layers": 1,
            "num_attention_heads": 32, "head_dim": 16, "intermediate_size": 96, "vocab_size": 100,
            "max_position_embeddings": 128, "rope_scaling": { "rope_type": "default" } });
        let heads = |settings: &Value| ModelConfig::from_json(&settings.to_string()).unwrap().num_kv_heads;
        assert_eq!(heads(&settings), default, "{model_type}");
        settings["num_key_value_heads"] = Value::Null;
        assert_eq!(heads(&settings), 32, "{model_type}, null");
    }
}

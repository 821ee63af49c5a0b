//! Settings of mixtures of experts: what `config.json` may say, and what it is refused for.

use std::path::Path;

use folio::model::{
    ActivationKind, Checkpoint, ExpertGroups, Factor, GroupScore, LinearExperts, ModelConfig, ModelResult, Scoring,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
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
fn settings_of_deepseek_v3() {
    let given = json!({ "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 3,
        "moe_intermediate_size": 24, "first_k_dense_replace": 2, "routed_scaling_factor": 2.5 });
    let experts = config("dots1", &given).unwrap().experts.unwrap();
    let groups = ExpertGroups { count: 4, selected: 2, score: GroupScore::TopTwo };
    assert_eq!((experts.router.groups, experts.router.scoring), (Some(groups), Scoring::Sigmoid));
    assert_eq!((experts.router.scale.get(), experts.router.correction), (2.5, true));
    assert_eq!((experts.intermediate_size, experts.shared_size), (24, Some(72)));
    assert_eq!(
        (0..6).map(|layer| experts.layers.contains(layer)).collect::<Vec<_>>(),
        [false, false, true, true, true, true]
    );
    let refused = |key: &str, value: Value, need: &str| {
        let mut changed = given.clone();
        changed[key] = value;
        refused("dots1", changed, key, need);
    };
    refused("n_routed_experts", Value::Null, "an integer from 1");
    refused("num_experts_per_tok", Value::Null, "an integer from 1");
    refused("n_group", json!(5), "a divisor of the 16 experts");
    refused("topk_group", json!(5), "at most the 4 groups");
    refused("topk_group", json!(0), "an integer from 1");
    refused("n_shared_experts", json!(-1), "an integer of at least 0");
    refused("n_shared_experts", json!(100_000), "at most");
    refused("first_k_dense_replace", json!("x"), "an integer of at least 0");
    refused("routed_scaling_factor", json!(0), "above 0");
    let plain = json!({ "n_routed_experts": 16, "num_experts_per_tok": 4 });
    let experts = config("dots1", &plain).unwrap().experts.unwrap();
    assert_eq!((experts.router.groups, experts.shared_size, experts.router.scale.get()), (None, None, 1.0));
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
        ("dots1", 32),
        ("gemma2", 4),
        ("gemma3_text", 4),
        ("mixtral", 8),
        ("qwen3_moe", 4),
        ("gpt_oss", 8),
    ] {
        let mut settings = json!({ "model_type": model_type, "hidden_size": 512, "num_hidden_layers": 1,
            "num_attention_heads": 32, "head_dim": 16, "intermediate_size": 96, "vocab_size": 100,
            "max_position_embeddings": 128, "rope_scaling": { "rope_type": "default" },
            "n_routed_experts": 8, "num_experts_per_tok": 2 });
        let heads = |settings: &Value| ModelConfig::from_json(&settings.to_string()).unwrap().num_kv_heads;
        assert_eq!(heads(&settings), default, "{model_type}");
        settings["num_key_value_heads"] = Value::Null;
        assert_eq!(heads(&settings), 32, "{model_type}, null");
    }
}

/// A copy of a checkpoint without one of its tensors, or with another in its place: its type, shape and bytes.
fn with_tensor(name: &str, changed: Option<(Dtype, Vec<usize>, Vec<u8>)>) -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/gpt_oss_mxfp4");
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file.tensors().into_iter().filter(|(own, _)| own != name).collect();
    assert_eq!(tensors.len() + 1, file.len(), "{name}");
    if let Some((dtype, shape, bytes)) = &changed {
        tensors.push((name.to_owned(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    }
    let directory = tempfile::tempdir().unwrap();
    std::fs::copy(source.join("config.json"), directory.path().join("config.json")).unwrap();
    std::fs::write(directory.path().join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    Checkpoint::open(directory.path()).unwrap().weights().unwrap_err().to_string()
}

#[test]
fn blocks_and_scales_that_are_missing_or_wrong() {
    let layer = "model.layers.1.mlp.experts";
    let (blocks, scales) = (format!("{layer}.gate_up_proj_blocks"), format!("{layer}.down_proj_scales"));
    // Experts, rows, groups of 32 columns.
    let groups = vec![4, 64, 1];
    let u8s = |shape: &[usize]| Some((Dtype::U8, shape.to_vec(), vec![0; shape.iter().product()]));
    let f32s = |shape: &[usize]| Some((Dtype::F32, shape.to_vec(), vec![0; 4 * shape.iter().product::<usize>()]));
    for (tensor, changed, need) in [
        (&scales, None, "U8 of shape [4, 64, 1]"),
        (&scales, u8s(&[4, 64]), "U8 of shape [4, 64, 1]"),
        (&scales, u8s(&[4, 32, 2]), "U8 of shape [4, 64, 1]"),
        (&scales, f32s(&groups), "U8 of shape [4, 64, 1]"),
        (&blocks, None, "[4, 64, 2, 16]"),
        (&blocks, u8s(&[4, 64, 2, 8]), "[4, 64, 2, 16]"),
        (&blocks, f32s(&[4, 64, 2, 16]), "U8"),
        (&format!("{layer}.down_proj_bias"), None, "[4, 64]"),
        (&"model.layers.1.self_attn.sinks".to_owned(), f32s(&[5]), "[4]"),
        (&"model.layers.0.mlp.router.bias".to_owned(), None, "[4]"),
    ] {
        let error = with_tensor(tensor, changed);
        assert!(error.contains(tensor) && error.contains(need), "{error}");
    }
}

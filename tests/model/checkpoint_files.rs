//! Small checkpoints on disk, with values that every type holds exactly.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
    pub(crate) values: Vec<f32>,
    /// Bytes to be written instead of the values.
    pub(crate) raw: Option<Vec<u8>>,
}

pub(crate) type Tensors = BTreeMap<String, Tensor>;

/// Multiples of 1/64 below 2 in magnitude: 7 bits, so that f16 and bf16 hold them, and neighbours differ.
fn values(name: &str, len: usize) -> Vec<f32> {
    let seed = name.bytes().fold(7, |hash: u64, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| f32::from(random.i8(-127..=127)) / 64.0).collect()
}

impl Tensor {
    pub(crate) fn new(name: &str, shape: &[usize], dtype: Dtype) -> Self {
        Self { shape: shape.to_vec(), dtype, values: values(name, shape.iter().product()), raw: None }
    }

    /// Element of a matrix as it lies in the file.
    pub(crate) fn at(&self, row: usize, column: usize) -> f32 {
        self.values[row * self.shape[1] + column]
    }

    fn bytes(&self) -> Vec<u8> {
        if let Some(raw) = &self.raw {
            return raw.clone();
        }
        let values = self.values.iter();
        match self.dtype {
            Dtype::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => values.flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::BF16 => values.flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::F64 => values.flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
            Dtype::I8 => values.map(|v| (*v * 64.0) as u8).collect(),
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) fn serialize(tensors: &Tensors) -> Vec<u8> {
    let bytes: Vec<_> = tensors.values().map(Tensor::bytes).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, t), bytes)| (name, TensorView::new(t.dtype, t.shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

pub(crate) fn write(directory: &Path, config: &Value, tensors: &Tensors) {
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    std::fs::write(directory.join("model.safetensors"), serialize(tensors)).unwrap();
}

/// Spreads the tensors over `shards` files, one after the other, so that the parts of a layer lie in different ones.
pub(crate) fn write_sharded(directory: &Path, config: &Value, tensors: &Tensors, shards: usize) {
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let mut parts = vec![Tensors::new(); shards];
    let mut weight_map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        let shard = i % shards;
        parts[shard].insert(name.clone(), tensor.clone());
        weight_map.insert(name.clone(), shard_name(shard, shards).into());
    }
    for (i, part) in parts.iter().enumerate() {
        std::fs::write(directory.join(shard_name(i, shards)), serialize(part)).unwrap();
    }
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": weight_map });
    std::fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

pub(crate) fn shard_name(i: usize, shards: usize) -> String {
    format!("model-{:05}-of-{shards:05}.safetensors", i + 1)
}

/// A configuration as Hugging Face writes it, and its tensors.
pub(crate) struct Model {
    pub(crate) config: Value,
    pub(crate) tensors: Tensors,
}

pub(crate) const LAYERS: usize = 2;
pub(crate) const VOCAB: usize = 37;

/// The architectures, each with sizes that differ from one another wherever the architecture lets them.
pub(crate) const ARCHITECTURES: [&str; 13] = [
    "deepseek_v2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
];

pub(crate) fn model(model_type: &str, dtype: Dtype) -> Model {
    let mut tensors = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let tensor = Tensor::new(&name, shape, dtype);
        assert!(tensors.insert(name, tensor).is_none());
    };
    let config = match model_type {
        "gpt2" => {
            let hidden = 24;
            add("transformer.wte.weight".into(), &[VOCAB, hidden]);
            add("transformer.wpe.weight".into(), &[64, hidden]);
            for i in 0..LAYERS {
                let mut add = |name: &str, shape: &[usize]| add(format!("transformer.h.{i}.{name}"), shape);
                for norm in ["ln_1", "ln_2"] {
                    add(&format!("{norm}.weight"), &[hidden]);
                    add(&format!("{norm}.bias"), &[hidden]);
                }
                add("attn.c_attn.weight", &[hidden, 3 * hidden]);
                add("attn.c_attn.bias", &[3 * hidden]);
                add("attn.c_proj.weight", &[hidden, hidden]);
                add("attn.c_proj.bias", &[hidden]);
                add("mlp.c_fc.weight", &[hidden, 4 * hidden]);
                add("mlp.c_fc.bias", &[4 * hidden]);
                add("mlp.c_proj.weight", &[4 * hidden, hidden]);
                add("mlp.c_proj.bias", &[hidden]);
                // Old versions saved the causal mask.
                add("attn.bias", &[1, 1, 64, 64]);
                add("attn.masked_bias", &[]);
            }
            add("transformer.ln_f.weight".into(), &[hidden]);
            add("transformer.ln_f.bias".into(), &[hidden]);
            json!({
                "model_type": "gpt2", "n_layer": LAYERS, "n_embd": hidden, "n_head": 3, "n_inner": null, "vocab_size": VOCAB,
                "n_positions": 64, "n_ctx": 64, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
                "bos_token_id": 36, "eos_token_id": 36,
            })
        }
        "gpt_neox" => {
            let (hidden, inner) = (24, 40);
            add("gpt_neox.embed_in.weight".into(), &[VOCAB, hidden]);
            add("embed_out.weight".into(), &[VOCAB, hidden]);
            for i in 0..LAYERS {
                let mut add = |name: &str, shape: &[usize]| add(format!("gpt_neox.layers.{i}.{name}"), shape);
                for norm in ["input_layernorm", "post_attention_layernorm"] {
                    add(&format!("{norm}.weight"), &[hidden]);
                    add(&format!("{norm}.bias"), &[hidden]);
                }
                add("attention.query_key_value.weight", &[3 * hidden, hidden]);
                add("attention.query_key_value.bias", &[3 * hidden]);
                add("attention.dense.weight", &[hidden, hidden]);
                add("attention.dense.bias", &[hidden]);
                add("mlp.dense_h_to_4h.weight", &[inner, hidden]);
                add("mlp.dense_h_to_4h.bias", &[inner]);
                add("mlp.dense_4h_to_h.weight", &[hidden, inner]);
                add("mlp.dense_4h_to_h.bias", &[hidden]);
                add("attention.bias", &[1, 1, 8, 8]);
                add("attention.masked_bias", &[]);
                add("attention.rotary_emb.inv_freq", &[2]);
            }
            add("gpt_neox.final_layer_norm.weight".into(), &[hidden]);
            add("gpt_neox.final_layer_norm.bias".into(), &[hidden]);
            json!({
                "model_type": "gpt_neox", "num_hidden_layers": LAYERS, "hidden_size": hidden, "num_attention_heads": 3,
                "intermediate_size": inner, "vocab_size": VOCAB, "max_position_embeddings": 128, "layer_norm_eps": 1e-5,
                "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": true,
                "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 0,
            })
        }
        "deepseek_v2" | "deepseek_v3" => {
            let (hidden, inner, heads, nope, rope, rank, value) = (36, 28, 3, 12, 8, 16, 20);
            let rank_of_kv = rank;
            let q_rank = (model_type == "deepseek_v3").then_some(24);
            add("model.embed_tokens.weight".into(), &[VOCAB, hidden]);
            for i in 0..LAYERS {
                let mut add = |name: &str, shape: &[usize]| add(format!("model.layers.{i}.{name}"), shape);
                add("input_layernorm.weight", &[hidden]);
                add("post_attention_layernorm.weight", &[hidden]);
                match q_rank {
                    None => add("self_attn.q_proj.weight", &[heads * (nope + rope), hidden]),
                    Some(rank) => {
                        add("self_attn.q_a_proj.weight", &[rank, hidden]);
                        add("self_attn.q_a_proj.bias", &[rank]);
                        add("self_attn.q_a_layernorm.weight", &[rank]);
                        add("self_attn.q_b_proj.weight", &[heads * (nope + rope), rank]);
                        add("self_attn.kv_a_proj_with_mqa.bias", &[rank_of_kv + rope]);
                        add("self_attn.o_proj.bias", &[hidden]);
                    }
                }
                add("self_attn.kv_a_proj_with_mqa.weight", &[rank + rope, hidden]);
                add("self_attn.kv_a_layernorm.weight", &[rank]);
                add("self_attn.kv_b_proj.weight", &[heads * (nope + value), rank]);
                add("self_attn.o_proj.weight", &[hidden, heads * value]);
                add("mlp.gate_proj.weight", &[inner, hidden]);
                add("mlp.up_proj.weight", &[inner, hidden]);
                add("mlp.down_proj.weight", &[hidden, inner]);
            }
            add("model.norm.weight".into(), &[hidden]);
            add("lm_head.weight".into(), &[VOCAB, hidden]);
            json!({
                "model_type": model_type, "num_hidden_layers": LAYERS, "hidden_size": hidden, "num_attention_heads": heads,
                "num_key_value_heads": heads, "head_dim": rope, "intermediate_size": inner, "vocab_size": VOCAB,
                "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0,
                "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": LAYERS,
                "q_lora_rank": q_rank, "kv_lora_rank": rank, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope,
                "v_head_dim": value, "attention_bias": q_rank.is_some(),
            })
        }
        _ => {
            let (hidden, inner, q, kv, head) = (20, 28, 6, 2, 8);
            // Qwen3's heads times their width is not the hidden size.
            let hidden = if model_type == "qwen3" { hidden } else { q * head };
            let bias = model_type == "qwen2";
            let tied = ["gemma2", "gemma3_text", "qwen2", "smollm3"].contains(&model_type);
            add("model.embed_tokens.weight".into(), &[VOCAB, hidden]);
            for i in 0..LAYERS {
                let mut add = |name: &str, shape: &[usize]| add(format!("model.layers.{i}.{name}"), shape);
                let norms: &[&str] = match model_type {
                    "olmo2" => &["post_attention", "post_feedforward"],
                    "gemma2" | "gemma3_text" => &["input", "post_attention", "pre_feedforward", "post_feedforward"],
                    _ => &["input", "post_attention"],
                };
                norms.iter().for_each(|norm| add(&format!("{norm}_layernorm.weight"), &[hidden]));
                if model_type == "phi3" {
                    add("self_attn.qkv_proj.weight", &[(q + 2 * kv) * head, hidden]);
                    add("mlp.gate_up_proj.weight", &[2 * inner, hidden]);
                } else {
                    for (name, heads) in [("q", q), ("k", kv), ("v", kv)] {
                        add(&format!("self_attn.{name}_proj.weight"), &[heads * head, hidden]);
                        if bias {
                            add(&format!("self_attn.{name}_proj.bias"), &[heads * head]);
                        }
                    }
                    add("mlp.gate_proj.weight", &[inner, hidden]);
                    add("mlp.up_proj.weight", &[inner, hidden]);
                }
                add("self_attn.o_proj.weight", &[hidden, q * head]);
                let normed = match model_type {
                    "qwen3" | "gemma3_text" => Some([1, 1]),
                    "olmo2" => Some([q, kv]),
                    _ => None,
                };
                for (name, heads) in ["q", "k"].into_iter().zip(normed.into_iter().flatten()) {
                    add(&format!("self_attn.{name}_norm.weight"), &[heads * head]);
                }
                if model_type == "llama" {
                    add("self_attn.rotary_emb.inv_freq", &[head / 2]);
                }
                add("mlp.down_proj.weight", &[hidden, inner]);
            }
            add("model.norm.weight".into(), &[hidden]);
            if !tied {
                add("lm_head.weight".into(), &[VOCAB, hidden]);
            }
            json!({
                "model_type": model_type, "num_hidden_layers": LAYERS, "hidden_size": hidden, "num_attention_heads": q,
                "num_key_value_heads": kv, "head_dim": head, "intermediate_size": inner, "vocab_size": VOCAB,
                "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 500000.0,
                "tie_word_embeddings": tied, "sliding_window": null, "bos_token_id": 1, "eos_token_id": 2,
            })
        }
    };
    Model { config, tensors }
}

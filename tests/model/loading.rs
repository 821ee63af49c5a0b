//! What comes out of checkpoints: configurations, and each parameter's values, against index arithmetic that is written out here.

use std::path::Path;

use folio::model::{
    ActivationKind, Architecture, Checkpoint, LayerKind, LayerPattern, LinearWeights, ModelConfig, ModelError,
    NormKind, NormWeights, QkNorm, TensorSource, Tokenizer,
};
use folio::{RopeConfig, RopeLayout, RopeScaling};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint_files::{ARCHITECTURES, Model, Tensor, Tensors, VOCAB, model, write, write_sharded};
use crate::experts_files::MIXTURES;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// All rows, read in blocks of `block`.
fn read(checkpoint: &Checkpoint, source: &TensorSource, block: usize) -> Vec<f32> {
    let [rows, columns] = source.shape();
    let mut all = vec![f32::NAN; rows * columns];
    for (i, out) in all.chunks_mut(block * columns).enumerate() {
        checkpoint.rows(source, i * block, out).unwrap();
    }
    all
}

#[track_caller]
fn expect(checkpoint: &Checkpoint, source: &TensorSource, shape: [usize; 2], at: impl Fn(usize, usize) -> f32) {
    assert_eq!(source.shape(), shape);
    let expected: Vec<_> = (0..shape[0] * shape[1]).map(|i| at(i / shape[1], i % shape[1])).collect();
    for block in [1, 3, 7, shape[0]] {
        assert_eq!(read(checkpoint, source, block), expected, "in blocks of {block}: {source:?}");
    }
}

fn config_of(value: &Value) -> Result<ModelConfig, ModelError> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), value.to_string()).unwrap();
    ModelConfig::from_dir(directory.path())
}

/// The configuration of a small model with some settings replaced.
fn changed(model_type: &str, changes: &Value) -> Value {
    let mut config = model(model_type, Dtype::F32).config;
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn without(model_type: &str, keys: &[&str]) -> Value {
    let mut config = model(model_type, Dtype::F32).config;
    for key in keys {
        assert!(config.as_object_mut().unwrap().remove(*key).is_some(), "{key}");
    }
    config
}

#[test]
fn every_parameter_of_every_architecture() {
    for model_type in ARCHITECTURES {
        for dtype in DTYPES {
            for shards in [1, 3] {
                let directory = tempfile::tempdir().unwrap();
                let model = model(model_type, dtype);
                match shards {
                    1 => write(directory.path(), &model.config, &model.tensors),
                    _ => write_sharded(directory.path(), &model.config, &model.tensors, shards),
                }
                check_model(&Checkpoint::open(directory.path()).unwrap(), &model, model_type, dtype);
            }
        }
    }
    let mut known: Vec<_> = Architecture::all().iter().map(Architecture::model_type).collect();
    known.sort_unstable();
    // Those with experts have tests of their own.
    known.retain(|name| !MIXTURES.iter().any(|(mixture, _)| mixture == name));
    assert_eq!(known, ARCHITECTURES, "an architecture without this test");
}

fn check_model(checkpoint: &Checkpoint, model: &Model, model_type: &str, dtype: Dtype) {
    let config = checkpoint.config();
    let weights = checkpoint.weights().unwrap();
    checkpoint.check(&weights).unwrap();
    assert_eq!(checkpoint.unused(&weights), [""; 0], "{model_type}");
    let bytes: u64 = weights.sources().map(|source| checkpoint.bytes(source).unwrap()).sum();
    let elements: usize = weights.sources().map(|s| s.shape().iter().product::<usize>()).sum();
    assert_eq!(bytes, elements as u64 * if dtype == Dtype::F32 { 4 } else { 2 });

    let (hidden, inner) = (config.hidden_size as usize, config.intermediate_size as usize);
    let (q, kv, head) = (config.q_width(), config.kv_width(), config.head_dim as usize);
    let tensor = |name: String| -> &Tensor { model.tensors.get(&name).unwrap_or_else(|| panic!("{name}")) };
    let matrix = |source: &TensorSource, name: String, shape: [usize; 2]| {
        expect(checkpoint, source, shape, |row, column| tensor(name.clone()).at(row, column));
    };
    let vector = |source: &TensorSource, name: String, len: usize| {
        expect(checkpoint, source, [len, 1], |row, _| tensor(name.clone()).values[row]);
    };
    let norm_of = |norm: &NormWeights, name: String, len: usize| {
        vector(&norm.weight, format!("{name}.weight"), len);
        assert_eq!(norm.bias.is_some(), config.norm.kind == NormKind::Layer);
        if let Some(bias) = &norm.bias {
            vector(bias, format!("{name}.bias"), len);
        }
    };
    let norm = |source: &Option<NormWeights>, name: String, len: usize| {
        assert_eq!(source.is_some(), model.tensors.contains_key(&format!("{name}.weight")), "{name}");
        source.iter().for_each(|source| norm_of(source, name.clone(), len));
    };
    let linear = |linear: &LinearWeights, name: String, out: usize, columns: usize, transposed: bool| {
        let weight = tensor(format!("{name}.weight"));
        expect(checkpoint, &linear.weight, [out, columns], |row, column| {
            if transposed { weight.at(column, row) } else { weight.at(row, column) }
        });
        assert_eq!(linear.bias.is_some(), model.tensors.contains_key(&format!("{name}.bias")), "{name}");
        if let Some(bias) = &linear.bias {
            vector(bias, format!("{name}.bias"), out);
        }
    };
    // Part of a fused projection: row `row` of the part is row `at(row)` of the whole.
    let fused = |linear: &LinearWeights, name: String, out: usize, transposed: bool, at: &dyn Fn(usize) -> usize| {
        let weight = tensor(format!("{name}.weight"));
        expect(checkpoint, &linear.weight, [out, hidden], |row, column| {
            if transposed { weight.at(column, at(row)) } else { weight.at(at(row), column) }
        });
        let bias = tensor(format!("{name}.bias"));
        expect(checkpoint, linear.bias.as_ref().unwrap(), [out, 1], |row, _| bias.values[at(row)]);
    };

    assert_eq!(weights.layers.len(), config.num_layers as usize);
    match model_type {
        "gpt2" => {
            matrix(&weights.embedding, "transformer.wte.weight".into(), [VOCAB, hidden]);
            matrix(weights.position_embedding.as_ref().unwrap(), "transformer.wpe.weight".into(), [64, hidden]);
            norm_of(&weights.final_norm, "transformer.ln_f".into(), hidden);
            assert_eq!(weights.head, None);
            for (i, layer) in weights.layers.iter().enumerate() {
                let name = |name: &str| format!("transformer.h.{i}.{name}");
                norm(&layer.attn_norm, name("ln_1"), hidden);
                fused(&layer.q, name("attn.c_attn"), hidden, true, &|row| row);
                fused(&layer.k, name("attn.c_attn"), hidden, true, &|row| hidden + row);
                fused(&layer.v, name("attn.c_attn"), hidden, true, &|row| 2 * hidden + row);
                linear(&layer.o, name("attn.c_proj"), hidden, hidden, true);
                norm(&layer.mlp_norm, name("ln_2"), hidden);
                linear(&layer.gate_up, name("mlp.c_fc"), inner, hidden, true);
                linear(&layer.down, name("mlp.c_proj"), hidden, inner, true);
                assert!(layer.q_norm.is_none() && layer.k_norm.is_none());
                // Together again they are the fused tensor.
                fused(&layer.qkv().unwrap(), name("attn.c_attn"), 3 * hidden, true, &|row| row);
            }
        }
        "gpt_neox" => {
            matrix(&weights.embedding, "gpt_neox.embed_in.weight".into(), [VOCAB, hidden]);
            linear(weights.head.as_ref().unwrap(), "embed_out".into(), VOCAB, hidden, false);
            norm_of(&weights.final_norm, "gpt_neox.final_layer_norm".into(), hidden);
            assert!(weights.position_embedding.is_none());
            for (i, layer) in weights.layers.iter().enumerate() {
                let name = |name: &str| format!("gpt_neox.layers.{i}.{name}");
                norm(&layer.attn_norm, name("input_layernorm"), hidden);
                // `view(heads, 3, head_dim)` in transformers.
                for (part, linear) in [&layer.q, &layer.k, &layer.v].into_iter().enumerate() {
                    let at = |row: usize| (row / head * 3 + part) * head + row % head;
                    fused(linear, name("attention.query_key_value"), q, false, &at);
                }
                linear(&layer.o, name("attention.dense"), hidden, hidden, false);
                norm(&layer.mlp_norm, name("post_attention_layernorm"), hidden);
                linear(&layer.gate_up, name("mlp.dense_h_to_4h"), inner, hidden, false);
                linear(&layer.down, name("mlp.dense_4h_to_h"), hidden, inner, false);
            }
        }
        _ => {
            matrix(&weights.embedding, "model.embed_tokens.weight".into(), [VOCAB, hidden]);
            match &weights.head {
                Some(head) => linear(head, "lm_head".into(), VOCAB, hidden, false),
                None => assert!(config.tied_head),
            }
            norm_of(&weights.final_norm, "model.norm".into(), hidden);
            for (i, layer) in weights.layers.iter().enumerate() {
                let name = |name: &str| format!("model.layers.{i}.{name}");
                norm(&layer.attn_norm, name("input_layernorm"), hidden);
                let stacked = name("self_attn.qkv_proj.weight");
                if model.tensors.contains_key(&stacked) {
                    for (part, first, rows) in [(&layer.q, 0, q), (&layer.k, q, kv), (&layer.v, q + kv, kv)] {
                        expect(checkpoint, &part.weight, [rows, hidden], |row, column| {
                            tensor(stacked.clone()).at(first + row, column)
                        });
                    }
                } else if let Some(latent) = &config.latent {
                    let q_rank = latent.q_rank.map(|rank| rank as usize);
                    assert_eq!(
                        (q_rank.is_some(), layer.q_latent.is_some()),
                        (model_type == "deepseek_v3", q_rank.is_some())
                    );
                    for (q_latent, rank) in layer.q_latent.iter().zip(q_rank) {
                        linear(q_latent, name("self_attn.q_a_proj"), rank, hidden, false);
                    }
                    let q_name = if q_rank.is_some() { "self_attn.q_b_proj" } else { "self_attn.q_proj" };
                    linear(&layer.q, name(q_name), q, q_rank.unwrap_or(hidden), false);
                    let [rank, value] = [latent.kv_rank, latent.value_dim].map(|size| size as usize);
                    linear(&layer.k, name("self_attn.kv_a_proj_with_mqa"), latent.row_dim() as usize, hidden, false);
                    linear(&layer.v, name("self_attn.kv_b_proj"), q / head * (12 + value), rank, false);
                    norm(&layer.q_norm, name("self_attn.q_a_layernorm"), q_rank.unwrap_or(0));
                    norm(&layer.k_norm, name("self_attn.kv_a_layernorm"), rank);
                    assert!(layer.qkv().is_err());
                } else {
                    linear(&layer.q, name("self_attn.q_proj"), q, hidden, false);
                    linear(&layer.k, name("self_attn.k_proj"), kv, hidden, false);
                    linear(&layer.v, name("self_attn.v_proj"), kv, hidden, false);
                }
                linear(&layer.o, name("self_attn.o_proj"), hidden, config.attended_width(), false);
                let all = config.qk_norm == Some(QkNorm::AllHeads);
                assert_eq!(all, model_type == "olmo2");
                if config.latent.is_none() {
                    norm(&layer.q_norm, name("self_attn.q_norm"), if all { q } else { head });
                    norm(&layer.k_norm, name("self_attn.k_norm"), if all { kv } else { head });
                    assert_eq!(layer.qkv().unwrap().weight.shape(), [q + 2 * kv, hidden]);
                }
                // Gemma and OLMo 2 have the name for the norm behind attention, the others for the one before the MLP.
                let behind = model_type.starts_with("gemma") || model_type == "olmo2";
                let [post_attn, mlp] = if behind {
                    ["post_attention_layernorm", "pre_feedforward_layernorm"]
                } else {
                    ["none", "post_attention_layernorm"]
                };
                norm(&layer.post_attn_norm, name(post_attn), hidden);
                norm(&layer.mlp_norm, name(mlp), hidden);
                norm(&layer.post_mlp_norm, name("post_feedforward_layernorm"), hidden);
                let packed = name("mlp.gate_up_proj.weight");
                let parts = match model.tensors.get(&packed) {
                    Some(both) => [both, both],
                    None => [tensor(name("mlp.gate_proj.weight")), tensor(name("mlp.up_proj.weight"))],
                };
                let up_row = |row: usize| if model.tensors.contains_key(&packed) { row } else { row - inner };
                expect(checkpoint, &layer.gate_up.weight, [2 * inner, hidden], |row, column| {
                    if row < inner { parts[0].at(row, column) } else { parts[1].at(up_row(row), column) }
                });
                linear(&layer.down, name("mlp.down_proj"), hidden, inner, false);
            }
        }
    }
}

#[test]
fn tiles_of_a_transposed_weight() {
    // Sizes around the tile's 16 by 64, and blocks that start within it.
    for hidden in [8, 16, 24, 64, 104] {
        let inner = 4 * hidden + 3;
        let mut model = model("gpt2", Dtype::F16);
        model.config["n_embd"] = hidden.into();
        model.config["n_head"] = 1.into();
        model.config["n_inner"] = inner.into();
        for (name, tensor) in &mut model.tensors {
            let shape = tensor.shape.iter().map(|n| match n {
                24 => hidden,
                72 => 3 * hidden,
                96 => inner,
                n => *n,
            });
            *tensor = Tensor::new(name, &shape.collect::<Vec<_>>(), DTYPES[name.len() % 3]);
        }
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), &model.config, &model.tensors);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let weights = checkpoint.weights().unwrap();
        let layer = &weights.layers[1];
        let file = &model.tensors["transformer.h.1.mlp.c_fc.weight"];
        for block in [1, 63, 64, 65, inner] {
            let rows = read(&checkpoint, &layer.gate_up.weight, block);
            assert!((0..inner * hidden).all(|i| rows[i] == file.at(i % hidden, i / hidden)), "{hidden} {block}");
        }
        let file = &model.tensors["transformer.h.1.attn.c_attn.weight"];
        let rows = read(&checkpoint, &layer.v.weight, 65);
        assert!((0..hidden * hidden).all(|i| rows[i] == file.at(i % hidden, 2 * hidden + i / hidden)), "{hidden}");
    }
}

#[test]
fn halves_keep_every_bit() {
    // All 65536 patterns, as an embedding of 256 by 256.
    for dtype in [Dtype::F16, Dtype::BF16] {
        let mut model = model("gpt2", dtype);
        model.config["vocab_size"] = 256.into();
        model.config["n_embd"] = 256.into();
        model.config["n_head"] = 1.into();
        for (name, tensor) in &mut model.tensors {
            let shape = tensor.shape.iter().map(|n| match n {
                24 | &VOCAB => 256,
                72 => 768,
                96 => 1024,
                n => *n,
            });
            *tensor = Tensor::new(name, &shape.collect::<Vec<_>>(), dtype);
        }
        let embedding = model.tensors.get_mut("transformer.wte.weight").unwrap();
        embedding.raw = Some((0..=u16::MAX).flat_map(u16::to_le_bytes).collect());
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), &model.config, &model.tensors);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let rows = read(&checkpoint, &checkpoint.weights().unwrap().embedding, 100);
        for (bits, got) in (0..=u16::MAX).zip(rows) {
            let want = match dtype {
                Dtype::F16 => half::f16::from_bits(bits).to_f32_const(),
                _ => half::bf16::from_bits(bits).to_f32_const(),
            };
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{dtype:?} {bits:#x}");
        }
    }
}

#[test]
fn a_prefix_may_be_missing() {
    for model_type in ARCHITECTURES {
        let mut model = model(model_type, Dtype::F32);
        model.config["tie_word_embeddings"] = true.into();
        let bare = |name: &str| {
            ["transformer.", "gpt_neox.", "model."].iter().find_map(|p| name.strip_prefix(p)).unwrap_or(name).to_owned()
        };
        // As saved from the model without its head.
        let tensors = model.tensors.into_iter().filter(|(name, _)| bare(name) != *name);
        let tensors = tensors.map(|(name, tensor)| (bare(&name), tensor)).collect();
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), &model.config, &tensors);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let weights = checkpoint.weights().unwrap();
        assert_eq!(checkpoint.unused(&weights), [""; 0]);
        assert_eq!(weights.head, None);
    }
}

#[test]
fn biases_follow_the_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let mut llama = model("llama", Dtype::F32);
    llama.config["attention_bias"] = true.into();
    llama.config["mlp_bias"] = true.into();
    let biases: Vec<_> = llama
        .tensors
        .iter()
        .filter(|(name, _)| name.contains("_proj.weight"))
        .map(|(name, tensor)| (name.replace(".weight", ".bias"), tensor.shape[0]))
        .collect();
    for (name, len) in &biases {
        llama.tensors.insert(name.clone(), Tensor::new(name, &[*len], Dtype::F32));
    }
    write(directory.path(), &llama.config, &llama.tensors);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let weights = checkpoint.weights().unwrap();
    assert_eq!(checkpoint.unused(&weights), [""; 0]);
    let gate_up = weights.layers[0].gate_up.bias.as_ref().unwrap();
    let [gate, up] = ["gate", "up"].map(|name| &llama.tensors[&format!("model.layers.0.mlp.{name}_proj.bias")].values);
    expect(&checkpoint, gate_up, [56, 1], |row, _| if row < 28 { gate[row] } else { up[row - 28] });
    assert_eq!(weights.layers[1].qkv().unwrap().bias.unwrap().shape(), [80, 1]);

    // Without them in the configuration they are left over, and said to be.
    llama.config["attention_bias"] = false.into();
    llama.config["mlp_bias"] = false.into();
    write(directory.path(), &llama.config, &llama.tensors);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let mut left: Vec<_> = biases.into_iter().map(|(name, _)| name).collect();
    left.sort_unstable();
    assert_eq!(checkpoint.unused(&checkpoint.weights().unwrap()), left);
}

#[test]
fn a_head_is_tied_only_to_the_same_embedding() {
    for shards in [1, 2] {
        let mut llama = model("llama", Dtype::BF16);
        llama.config["tie_word_embeddings"] = true.into();
        let open = |tensors: &Tensors| {
            let directory = tempfile::tempdir().unwrap();
            match shards {
                1 => write(directory.path(), &llama.config, tensors),
                _ => write_sharded(directory.path(), &llama.config, tensors, shards),
            }
            let checkpoint = Checkpoint::open(directory.path()).unwrap();
            let weights = checkpoint.weights().unwrap();
            assert_eq!(checkpoint.unused(&weights), [""; 0]);
            weights.head.is_none()
        };
        let mut tensors = llama.tensors.clone();
        assert!(!open(&tensors), "a head of its own");
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".into(), embedding.clone());
        assert!(open(&tensors), "a copy");
        *tensors.get_mut("lm_head.weight").unwrap().values.last_mut().unwrap() += 1.0;
        assert!(!open(&tensors), "another last element");
        tensors.remove("lm_head.weight");
        assert!(open(&tensors), "none");
    }
}

#[test]
fn what_opens() {
    let directory = tempfile::tempdir().unwrap();
    let model = model("qwen3", Dtype::F16);
    write_sharded(directory.path(), &model.config, &model.tensors, 3);
    for path in ["", "model.safetensors.index.json"] {
        Checkpoint::open(directory.path().join(path)).unwrap().weights().unwrap();
    }
    // A single file under any name, its configuration beside it.
    let file = directory.path().join("other.safetensors");
    std::fs::write(&file, crate::checkpoint_files::serialize(&model.tensors)).unwrap();
    let checkpoint = Checkpoint::open(&file).unwrap();
    assert_eq!(checkpoint.tensors().count(), model.tensors.len());
    checkpoint.weights().unwrap();
}

#[test]
#[cfg(target_os = "linux")]
fn one_file_is_mapped_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let model = model("llama", Dtype::F32);
    write_sharded(directory.path(), &model.config, &model.tensors, 4);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains(directory.path().to_str().unwrap())).count()
    };
    assert_eq!(mapped(), 0, "opening maps nothing");
    let weights = checkpoint.weights().unwrap();
    let mut most = 0;
    for source in weights.sources() {
        read(&checkpoint, source, 5);
        most = most.max(mapped());
    }
    assert_eq!(most, 1);
    drop(checkpoint);
    assert_eq!(mapped(), 0);
}

#[test]
fn real_checkpoints() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(models).unwrap() {
        let path = entry.unwrap().path();
        if !path.join("config.json").exists() {
            continue;
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        let weights = checkpoint.weights().unwrap();
        assert_eq!(checkpoint.unused(&weights), [""; 0], "{}", path.display());
        for source in weights.sources() {
            let [rows, columns] = source.shape();
            let mut out = vec![f32::NAN; rows * columns];
            checkpoint.rows(source, 0, &mut out).unwrap();
            assert!(out.iter().all(|value| value.is_finite()), "{}: {source:?}", path.display());
        }
        seen.push(checkpoint.config().model_type);
    }
    for model_type in ARCHITECTURES {
        assert!(seen.contains(&model_type), "no checkpoint of {model_type} among the fixtures");
    }
}

#[test]
fn configurations() {
    let gpt2 = config_of(&model("gpt2", Dtype::F32).config).unwrap();
    assert_eq!((gpt2.num_layers, gpt2.hidden_size, gpt2.intermediate_size), (2, 24, 96));
    assert_eq!((gpt2.num_q_heads, gpt2.num_kv_heads, gpt2.head_dim, gpt2.max_positions), (3, 3, 8, 64));
    assert_eq!((gpt2.norm.kind, gpt2.norm.eps, gpt2.activation), (NormKind::Layer, 1e-5, ActivationKind::GeluTanh));
    assert!(gpt2.qkv_bias && gpt2.output_bias && gpt2.mlp_bias && gpt2.tied_head);
    assert!(!gpt2.gated_mlp && !gpt2.parallel_residual && gpt2.qk_norm.is_none());
    assert!(gpt2.learned_positions);
    assert_eq!(gpt2.layers, LayerPattern::uniform(LayerKind::new(None, None)));
    assert_eq!((gpt2.bos_token_id, gpt2.eos_token_ids), (Some(36), vec![36]));

    let latents = config_of(&model("deepseek_v3", Dtype::F32).config).unwrap();
    let latent = latents.latent.as_ref().unwrap();
    assert_eq!((latent.q_rank, latent.kv_rank, latent.rope_dim, latent.value_dim), (Some(24), 16, 8, 20));
    assert_eq!((latents.head_dim, latents.attended_width(), latent.norm_eps), (20, 60, 1e-6));
    let rope = RopeConfig { layout: RopeLayout::Interleaved, ..RopeConfig::new(8, 10_000.0).with_start(16) };
    assert_eq!(latents.layers, LayerPattern::uniform(LayerKind::new(Some(rope), None)));
    assert_eq!(latents.softmax_scale, Some(1.0 / 20.0_f32.sqrt()));
    let scaled = json!({ "rope_scaling": { "type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 2.0 } });
    let scaled = config_of(&changed("deepseek_v2", &scaled)).unwrap();
    let factor = 0.2 * 4.0_f64.ln() + 1.0;
    assert_eq!(scaled.softmax_scale, Some((factor * factor / 20.0_f64.sqrt()) as f32));
    let half = config_of(&changed("deepseek_v3", &json!({ "rope_interleave": false }))).unwrap();
    assert_eq!(half.layers.kind(0).rope.as_ref().map(|rope| rope.layout), Some(RopeLayout::HalfSplit));
    let sizes = ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"];
    let default = config_of(&without("deepseek_v3", &sizes)).unwrap();
    let latent = default.latent.as_ref().unwrap();
    assert_eq!((latent.q_rank, latent.kv_rank, latent.rope_dim, latent.value_dim), (Some(1536), 512, 64, 128));
    assert_eq!(default.head_dim, 192);

    let neox = config_of(&model("gpt_neox", Dtype::F32).config).unwrap();
    assert!(neox.parallel_residual && neox.qkv_bias && neox.mlp_bias && !neox.tied_head && !neox.gated_mlp);
    assert_eq!((neox.activation, neox.head_dim), (ActivationKind::Gelu, 8));
    let sequential = config_of(&changed("gpt_neox", &json!({ "use_parallel_residual": false }))).unwrap();
    assert!(!sequential.parallel_residual);

    let llama = config_of(&model("llama", Dtype::F32).config).unwrap();
    assert_eq!((llama.norm.kind, llama.norm.eps, llama.activation), (NormKind::Rms, 1e-6, ActivationKind::Silu));
    assert!(llama.gated_mlp && !llama.qkv_bias && !llama.output_bias && !llama.mlp_bias && llama.qk_norm.is_none());
    assert_eq!((llama.q_width(), llama.kv_width()), (48, 16));
    // What transformers adds by itself.
    let bare =
        config_of(&without("llama", &["head_dim", "num_key_value_heads", "rms_norm_eps", "hidden_act"])).unwrap();
    assert_eq!((bare.head_dim, bare.num_kv_heads, bare.norm.eps, bare.activation), (8, 6, 1e-6, ActivationKind::Silu));

    let qwen2 = config_of(&model("qwen2", Dtype::F32).config).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.output_bias && qwen2.tied_head);
    let qwen3 = config_of(&model("qwen3", Dtype::F32).config).unwrap();
    assert!(qwen3.qk_norm == Some(QkNorm::PerHead) && !qwen3.qkv_bias && qwen3.q_width() != qwen3.hidden_size as usize);
    assert_eq!(config_of(&without("qwen3", &["head_dim"])).unwrap().head_dim, 128);

    for (name, activation) in [
        ("gelu", ActivationKind::Gelu),
        ("gelu_pytorch_tanh", ActivationKind::GeluTanh),
        ("gelu_fast", ActivationKind::GeluTanh),
        ("relu", ActivationKind::Relu),
    ] {
        let config = config_of(&changed("gpt2", &json!({ "activation_function": name }))).unwrap();
        assert_eq!(config.activation, activation);
    }
}

#[test]
fn tokens_that_end_a_text() {
    let directory = tempfile::tempdir().unwrap();
    let ids = |config: Value, generation: Option<Value>| {
        let generation_file = directory.path().join("generation_config.json");
        std::fs::write(directory.path().join("config.json"), changed("llama", &config).to_string()).unwrap();
        let _ = std::fs::remove_file(&generation_file);
        if let Some(generation) = generation {
            std::fs::write(generation_file, generation.to_string()).unwrap();
        }
        let config = ModelConfig::from_dir(directory.path()).unwrap();
        (config.bos_token_id, config.eos_token_ids)
    };
    assert_eq!(ids(json!({}), None), (Some(1), vec![2]));
    assert_eq!(ids(json!({ "eos_token_id": [5, 3] }), None), (Some(1), vec![5, 3]));
    assert_eq!(ids(json!({ "eos_token_id": null, "bos_token_id": null }), None), (None, vec![]));
    let generation = json!({ "eos_token_id": [7, 8, 9], "temperature": 0.6 });
    assert_eq!(ids(json!({}), Some(generation)), (Some(1), vec![7, 8, 9]));
    assert_eq!(ids(json!({}), Some(json!({ "bos_token_id": 4 }))), (Some(4), vec![2]));
}

#[test]
fn rope_of_old_and_new_files() {
    let rope = |model_type: &str, changes: Value| {
        let config = config_of(&changed(model_type, &changes)).unwrap();
        assert_eq!(config.layers.kinds().len(), 1);
        (config.layers.kind(1).rope.clone().unwrap(), config.max_positions)
    };
    let layout = RopeLayout::HalfSplit;
    let plain = |rotary_dim, theta| RopeConfig { layout, ..RopeConfig::new(rotary_dim, theta) };
    assert_eq!(rope("llama", json!({})), (plain(8, 500_000.0), 256));
    assert_eq!(rope("llama", json!({ "rope_theta": null })).0, plain(8, 10_000.0));
    let new = json!({ "rope_theta": null, "rope_parameters": { "rope_theta": 7e5, "rope_type": "default" } });
    assert_eq!(rope("llama", new).0, plain(8, 7e5));
    // The section comes before the old setting.
    assert_eq!(rope("llama", json!({ "rope_parameters": { "rope_theta": 7e5 } })).0, plain(8, 7e5));
    assert_eq!(rope("llama", json!({ "rope_parameters": {} })).0, plain(8, 5e5));
    assert_eq!(rope("llama", json!({ "partial_rotary_factor": 0.5 })).0, plain(4, 5e5));

    assert_eq!(rope("gpt_neox", json!({})).0, plain(2, 10_000.0));
    assert_eq!(rope("gpt_neox", json!({ "rotary_pct": null })).0, plain(2, 10_000.0));
    assert_eq!(rope("gpt_neox", json!({ "rotary_pct": 1.0, "rotary_emb_base": 25_000 })).0, plain(8, 25_000.0));
    let new = json!({ "rotary_pct": null, "rotary_emb_base": null,
        "rope_parameters": { "rope_theta": 3e4, "partial_rotary_factor": 0.5, "rope_type": "default" } });
    assert_eq!(rope("gpt_neox", new).0, plain(4, 3e4));

    let scaled = |scaling: Value| rope("llama", json!({ "rope_scaling": scaling }));
    assert_eq!(scaled(Value::Null).0.scaling, RopeScaling::None);
    assert_eq!(scaled(json!({})).0.scaling, RopeScaling::None);
    assert_eq!(scaled(json!({ "type": "linear", "factor": 2 })).0.scaling, RopeScaling::Linear { factor: 2.0 });
    let dynamic = scaled(json!({ "type": "dynamic", "factor": 4.0 }));
    assert_eq!((dynamic.0.scaling, dynamic.1), (RopeScaling::None, 256));
    let llama3 = json!({ "rope_type": "llama3", "type": "ignored", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64 });
    let expected =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 64 };
    assert_eq!(scaled(llama3), (RopeConfig { scaling: expected, ..plain(8, 5e5) }, 256));

    let yarn = |attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        original_max_position: 256,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
        attention_factor,
    };
    // The length of the stretched context may or may not be in the file.
    let (rope_config, max_positions) = scaled(json!({ "type": "yarn", "factor": 4.0 }));
    assert_eq!((rope_config.scaling, max_positions), (yarn(None), 1024));
    let (rope_config, max_positions) = rope(
        "llama",
        json!({ "max_position_embeddings": 1024,
            "rope_scaling": { "type": "yarn", "factor": null, "original_max_position_embeddings": 256 } }),
    );
    assert_eq!((rope_config.scaling, max_positions), (yarn(None), 1024));
    let given = scaled(json!({ "rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, "mscale": 3.0 }));
    assert_eq!(given.0.scaling, yarn(Some(1.25)));
    let weighed = scaled(json!({ "rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5 }));
    let RopeScaling::Yarn { attention_factor: Some(factor), .. } = weighed.0.scaling else { panic!("{weighed:?}") };
    assert!((factor - (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0)).abs() < 1e-15);
}

/// The window of each layer.
fn all_windows(config: &ModelConfig) -> Vec<Option<u32>> {
    (0..config.num_layers).map(|layer| config.layers.kind(layer).window).collect()
}

#[test]
fn sliding_windows() {
    let window = |model_type: &str, changes: Value| config_of(&changed(model_type, &changes)).map(|c| all_windows(&c));
    assert_eq!(window("mistral", json!({})).unwrap(), [None; 2]);
    assert_eq!(window("mistral", json!({ "sliding_window": 9 })).unwrap(), [Some(9); 2]);
    assert_eq!(all_windows(&config_of(&without("mistral", &["sliding_window"])).unwrap()), [Some(4096); 2]);
    // Llama has none, whatever the file says.
    assert_eq!(window("llama", json!({ "sliding_window": 9 })).unwrap(), [None; 2]);
    for model_type in ["qwen2", "qwen3"] {
        let window = |changes: Value| window(model_type, changes);
        assert_eq!(window(json!({ "sliding_window": 9 })).unwrap(), [None; 2]);
        let on =
            |key: &str, value: Value| window(json!({ "sliding_window": 9, "use_sliding_window": true, key: value }));
        assert_eq!(on("max_window_layers", 0.into()).unwrap(), [Some(9); 2]);
        assert_eq!(on("max_window_layers", 2.into()).unwrap(), [None; 2]);
        assert_eq!(on("max_window_layers", Value::Null).unwrap(), [None; 2], "28 full layers by default");
        assert_eq!(on("layer_types", json!(["sliding_attention", "sliding_attention"])).unwrap(), [Some(9); 2]);
        assert_eq!(on("layer_types", json!(["full_attention", "full_attention"])).unwrap(), [None; 2]);
        assert_eq!(on("max_window_layers", 1.into()).unwrap(), [None, Some(9)]);
        assert_eq!(on("layer_types", json!(["sliding_attention", "full_attention"])).unwrap(), [Some(9), None]);
        for wrong in
            [json!(["full_attention"]), json!(["full_attention", "chunked_attention"]), json!([1, 2]), json!(3)]
        {
            on("layer_types", wrong).unwrap_err();
        }
    }
}

/// How GPT-2's tokenizer writes a byte: printable ones as themselves, the others from U+0100 on.
fn byte_symbol(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..);
    if printable(byte) {
        byte.into()
    } else {
        char::from_u32(256 + (0..byte).filter(|b| !printable(*b)).count() as u32).unwrap()
    }
}

/// Byte-level, with a token per byte, one for "he", and a special token that ends a text.
fn byte_level(directory: &Path) -> Tokenizer {
    let mut vocab: serde_json::Map<_, _> =
        (0..=255).map(|byte| (byte_symbol(byte).to_string(), Value::from(byte))).collect();
    vocab.insert("he".into(), 256.into());
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{ "id": 257, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true }],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "vocab": vocab, "merges": ["h e"] },
    });
    let path = directory.join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    Tokenizer::from_file(path).unwrap()
}

/// As Llama 2's: `▁` for spaces, bytes for characters that have no token, a start token.
fn byte_fallback(directory: &Path) -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    for token in
        ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain((0..=255).map(|b: u8| format!("<0x{b:02X}>")))
    {
        vocab.insert(token, vocab.len().into());
    }
    for token in ["▁", "a", "b", "▁a", "é"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true })
    };
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": { "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" }] },
        "pre_tokenizer": null,
        "post_processor": { "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" },
            { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 }] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": ["▁ a"] },
    });
    std::fs::write(directory.join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::from_file(directory).unwrap()
}

/// What comes for each token, and the rest.
fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> (Vec<Option<String>>, String) {
    let mut stream = tokenizer.stream(true);
    let parts = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    (parts, stream.finish().unwrap())
}

fn joined(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let (parts, rest) = stream(tokenizer, ids);
    parts.into_iter().flatten().collect::<String>() + &rest
}

#[test]
fn text_to_tokens_and_back() {
    let directory = tempfile::tempdir().unwrap();
    let tokenizer = byte_level(directory.path());
    assert_eq!(tokenizer.vocab_size(), 258);
    tokenizer.check_vocab_size(258).unwrap();
    tokenizer.check_vocab_size(50_304).unwrap();
    let error = tokenizer.check_vocab_size(257).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("257"), "{error}");
    assert_eq!(tokenizer.token_to_id("<|end|>"), Some(257));
    let ids = tokenizer.encode("hey<|end|>", true).unwrap();
    assert_eq!(ids, [256, u32::from(b'y'), 257]);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "hey<|end|>");
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hey");
    assert_eq!(tokenizer.encode("", true).unwrap(), [0; 0]);
    assert_eq!(tokenizer.decode(&[256, 9999], true).unwrap(), "he", "ids that it doesn't know");

    let tokenizer = byte_fallback(directory.path());
    let ids = tokenizer.encode("a b", true).unwrap();
    assert_eq!((ids[0], tokenizer.encode("a b", false).unwrap()), (1, ids[1..].to_vec()));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a b");
}

#[test]
fn streams_hold_characters_back_until_they_are_complete() {
    let directory = tempfile::tempdir().unwrap();
    let tokenizer = byte_level(directory.path());
    let ids: Vec<u32> = "h€".bytes().map(u32::from).collect();
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(stream(&tokenizer, &ids), (vec![some("h"), None, None, some("€")], String::new()));
    assert_eq!(stream(&tokenizer, &ids[..3]), (vec![some("h"), None, None], "\u{fffd}".to_owned()));
    // Special tokens come to nothing.
    assert_eq!(stream(&tokenizer, &[257, ids[0], 257]), (vec![None, some("h"), None], String::new()));

    let texts = ["héllo wörld", "日本語 €uro 🎉🎊", "a\u{301}\n\t x  y", "\u{fffd}\u{fffd} really", "🏳️‍🌈 end"];
    let directory = tempfile::tempdir().unwrap();
    for tokenizer in [tokenizer, byte_fallback(directory.path())] {
        for text in texts {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(joined(&tokenizer, &ids), text);
            assert_eq!(joined(&tokenizer, &ids), tokenizer.decode(&ids, true).unwrap());
        }
    }
}

#[test]
fn streams_go_on_after_a_prompt() {
    let directory = tempfile::tempdir().unwrap();
    let tokenizer = byte_fallback(directory.path());
    let prompt = tokenizer.encode("b", true).unwrap();
    let next = *tokenizer.encode("a", false).unwrap().last().unwrap();
    let first = |mut stream: folio::model::TextStream| stream.push(next).unwrap().unwrap();
    assert_eq!(first(tokenizer.stream(true)), "a");
    assert_eq!(first(tokenizer.stream_after(&prompt, true)), " a");
}

#[test]
fn streams_of_garbage_go_on() {
    // As a model with random weights makes them: bytes that are no UTF-8.
    let directory = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let mut random = fastrand::Rng::with_seed(5);
    for tokenizer in [byte_level(directory.path()), byte_fallback(other.path())] {
        for _ in 0..20 {
            let ids: Vec<u32> = (0..200).map(|_| random.u32(0..300)).collect();
            let (parts, _) = stream(&tokenizer, &ids);
            let longest = parts.split(Option::is_some).map(<[_]>::len).max().unwrap();
            assert!(longest < 32, "{longest} tokens without text");
        }
        // Continuation bytes only, which never become a character.
        let ids = vec![tokenizer.token_to_id("<0x80>").unwrap_or(0x80); 1000];
        let (parts, rest) = stream(&tokenizer, &ids);
        let characters = parts.iter().flatten().map(|part| part.chars().count()).sum::<usize>() + rest.chars().count();
        assert_eq!(characters, 1000);
        assert!(parts.iter().flatten().count() >= 1000 / 32);
    }
}

//! Broken checkpoints: each is refused with an error that names the file, what it has and what it should have, before any weight is read.

use crate::common::with;
use std::path::Path;

use folio::model::{
    Checkpoint, Decoder, DecoderOptions, LinearWeights, LogitRows, ModelConfig, ModelError, ModelOptions, TensorSource,
    Tokenizer, WeightFormat,
};
use folio::{Error, ErrorKind};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::adapter;
use crate::checkpoint_files::{ARCHITECTURES, Model, Tensor, model, serialize, shard_name, write, write_sharded};

/// A checkpoint that is fine, in a directory of its own.
fn good(model_type: &str) -> (tempfile::TempDir, Model) {
    let directory = tempfile::tempdir().unwrap();
    let model = model(model_type, Dtype::F32);
    write(directory.path(), &model.config, &model.tensors);
    (directory, model)
}

/// The error of opening and checking.
fn error(path: impl AsRef<Path>) -> ModelError {
    let error = Checkpoint::open(path).and_then(|checkpoint| checkpoint.weights());
    error.expect_err("a broken checkpoint")
}

#[track_caller]
fn says(error: &ModelError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[track_caller]
fn file_error(error: ModelError, file: &str, parts: &[&str]) {
    assert!(matches!(&error, ModelError::File { path, .. } if path.ends_with(file)), "{error:?}");
    says(&error, parts);
}

#[test]
fn files_that_are_missing() {
    let (directory, model) = good("llama");
    let path = directory.path();
    file_error(error(path.join("nowhere")), "nowhere", &["config.json", "model.safetensors"]);
    file_error(error(path.join("config.json")), "config.json", &["not a .safetensors file"]);
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    file_error(error(path), "", &["no weights", "model.safetensors.index.json"]);
    std::fs::write(path.join("pytorch_model.bin"), "").unwrap();
    file_error(error(path), "", &["pytorch_model.bin", "convert"]);
    write(path, &model.config, &model.tensors);
    std::fs::remove_file(path.join("config.json")).unwrap();
    file_error(error(path), "config.json", &[]);
    // A directory where a file should be.
    std::fs::create_dir(path.join("config.json")).unwrap();
    file_error(error(path), "config.json", &[]);
}

#[test]
fn files_that_are_no_safetensors() {
    let (directory, model) = good("gpt_neox");
    let file = directory.path().join("model.safetensors");
    let whole = serialize(&model.tensors);
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let broken = |bytes: &[u8], parts: &[&str]| {
        std::fs::write(&file, bytes).unwrap();
        file_error(error(directory.path()), "model.safetensors", parts);
    };
    broken(b"", &["got 0 bytes"]);
    broken(&whole[..5], &["got 5 bytes"]);
    broken(&whole[..8], &["got 8 bytes", &format!("header of {header} bytes"), "truncated"]);
    broken(&whole[..100], &["got 100 bytes", "truncated"]);
    for cut in [1, 2, 1000] {
        let bytes = whole.len() - cut;
        broken(&whole[..bytes], &[&format!("got {bytes} bytes, need {}", whole.len()), "truncated"]);
    }
    let longer = [&whole[..], &[0; 3]].concat();
    broken(&longer, &[&format!("got {} bytes, need {} by its header", longer.len(), whole.len())]);
    // A zip, which is what pytorch_model.bin is; a text; a Git LFS pointer.
    broken(&[b"PK\x03\x04\0\0\x08\x08".to_vec(), vec![0; 100]].concat(), &["not a safetensors file"]);
    broken(&[b'a'; 1000], &["not a safetensors file"]);
    broken(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", &["Git LFS"]);
    for length in [0, 1, 7, 100_000_001, u64::MAX - 8, u64::MAX - 7, u64::MAX] {
        broken(&[&length.to_le_bytes()[..], &whole[8..]].concat(), &["header"]);
    }
    let with_header = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat();
    for header in ["[]", "{", "null", "{\"a\":1}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,16]}}"]
    {
        broken(&with_header(header), &["header"]);
    }
    let tensor = |name: &str, dtype: &str, shape: &[u64], start: u64, end: u64| {
        format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}")
    };
    // Offsets that overlap, leave a gap, don't fit the shape, run backwards, or of a type that doesn't exist.
    for (first, second) in [
        (tensor("a", "F32", &[2], 0, 8), tensor("b", "F32", &[2], 4, 12)),
        (tensor("a", "F32", &[1], 0, 4), tensor("b", "F32", &[2], 8, 16)),
        (tensor("a", "F32", &[3], 0, 8), tensor("b", "F32", &[2], 8, 16)),
        (tensor("a", "F32", &[2], 8, 0), tensor("b", "F32", &[2], 8, 16)),
        (tensor("a", "F99", &[2], 0, 8), tensor("b", "F32", &[2], 8, 16)),
        (tensor("a", "F32", &[u64::MAX, 2], 0, 8), tensor("b", "F32", &[2], 8, 16)),
    ] {
        broken(&with_header(&format!("{{{first},{second}}}")), &["header"]);
    }
    // Sizes that add up to just below 2^64, so that the length of the header carries them over it.
    let part = 1 << 60;
    let mut tensors: Vec<_> =
        (0..15).map(|i| tensor(&format!("t{i}"), "U8", &[part], i * part, (i + 1) * part)).collect();
    tensors.push(tensor("last", "U8", &[part - 40], 15 * part, u64::MAX - 39));
    broken(&with_header(&format!("{{{}}}", tensors.join(","))), &["more than any file has"]);
}

#[test]
fn every_truncation_and_many_changes_of_the_header() {
    let directory = tempfile::tempdir().unwrap();
    let mut model = model("llama", Dtype::BF16);
    model.config["num_hidden_layers"] = 1.into();
    model.tensors.retain(|name, _| !name.contains("layers.1."));
    write(directory.path(), &model.config, &model.tensors);
    let file = directory.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    Checkpoint::open(directory.path()).unwrap().weights().unwrap();
    for len in (0..whole.len()).step_by(whole.len() / 300) {
        std::fs::write(&file, &whole[..len]).unwrap();
        file_error(error(directory.path()), "model.safetensors", &[&format!("got {len} bytes")]);
    }
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..1000 {
        let mut bytes = whole.clone();
        for _ in 0..random.usize(1..4) {
            bytes[random.usize(..8 + header)] = *random.choice(b"0123456789[]{},:\"aF\\\x80 ").unwrap();
        }
        std::fs::write(&file, bytes).unwrap();
        // It may be fine: a change of the metadata, say. Then everything that it has can be read.
        let Ok(checkpoint) = Checkpoint::open(directory.path()) else { continue };
        let Ok(weights) = checkpoint.weights() else { continue };
        for source in weights.sources() {
            let mut out = vec![0.0; source.shape().iter().product()];
            checkpoint.rows(source, 0, &mut out).unwrap();
        }
    }
}

#[test]
fn tensors_that_are_missing_or_wrong() {
    for model_type in ARCHITECTURES {
        let (directory, model) = good(model_type);
        let needed = |name: &str| !name.ends_with("attn.bias") && !name.contains("attention.bias");
        // The first layer is like the second.
        let needed = |name: &&String| {
            needed(name) && !name.contains(".0.") && !name.contains("masked_bias") && !name.contains("inv_freq")
        };
        let names: Vec<_> = model.tensors.keys().filter(needed).cloned().collect();
        for name in &names {
            let check = |change: &dyn Fn(&mut Tensor), parts: &[&str]| {
                let mut tensors = model.tensors.clone();
                change(tensors.get_mut(name).unwrap());
                write(directory.path(), &model.config, &tensors);
                let error = error(directory.path());
                assert!(
                    matches!(&error, ModelError::Tensor { tensor, path, .. }
                    if tensor == name && path.ends_with("model.safetensors")),
                    "{name}: {error:?}"
                );
                says(&error, parts);
            };
            let shape = &model.tensors[name].shape;
            let need = format!("need shape {shape:?}");
            check(&|t| *t = Tensor::new("", &[5, 5], Dtype::F32), &["got shape [5, 5]", &need]);
            check(&|t| *t = Tensor::new("", &[&shape[..], &[1]].concat(), Dtype::F32), &[&need]);
            check(&|t| *t = Tensor::new("", &[], Dtype::F32), &["got shape []", &need]);
            for (dtype, got) in [(Dtype::F64, "got type F64"), (Dtype::I8, "got type I8")] {
                check(&|t| t.dtype = dtype, &[got, "need type F32, F16 or BF16"]);
            }
            let mut tensors = model.tensors.clone();
            tensors.remove(name);
            write(directory.path(), &model.config, &tensors);
            let error = error(directory.path());
            says(&error, &["got nothing", "model.safetensors", name.rsplit_once('.').unwrap().1]);
            // Without the embedding the prefix is unknown, but not the rest of its name.
            assert!(matches!(&error, ModelError::Tensor { tensor, .. } if name.ends_with(tensor)), "{name}: {error:?}");
        }
    }
}

#[test]
fn transposed_by_mistake() {
    // GPT-2's `[in, out]` as others have it.
    let (directory, mut model) = good("gpt2");
    let name = "transformer.h.1.mlp.c_fc.weight";
    model.tensors.insert(name.into(), Tensor::new(name, &[96, 24], Dtype::F32));
    write(directory.path(), &model.config, &model.tensors);
    says(&error(directory.path()), &[name, "got shape [96, 24]", "need shape [24, 96]"]);
}

#[test]
fn a_configuration_with_more_layers_than_the_file() {
    // 2^31 layers end at the first that is missing.
    for layers in [3, i32::MAX as u32] {
        let (directory, mut model) = good("qwen2");
        model.config["num_hidden_layers"] = layers.into();
        write(directory.path(), &model.config, &model.tensors);
        says(&error(directory.path()), &["model.layers.2.input_layernorm.weight", "got nothing"]);
    }
}

#[test]
fn indices() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let model = model("qwen3", Dtype::F32);
    write_sharded(path, &model.config, &model.tensors, 3);
    Checkpoint::open(path).unwrap().weights().unwrap();
    let index = path.join("model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    let name = "model.norm.weight";

    // Where a shard may not be.
    for file in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b.safetensors", "./m"] {
        let mut bad = good.clone();
        bad["weight_map"][name] = file.into();
        std::fs::write(&index, bad.to_string()).unwrap();
        let error = error(path);
        assert!(matches!(&error, ModelError::Config { .. }), "{error:?}");
        says(&error, &["index.json", &format!("weight_map.{name}"), file, "same directory"]);
    }
    // A shard that lacks what the index says it has, and one that isn't there.
    let mut bad = good.clone();
    let other = model.tensors.keys().position(|n| n == name).unwrap() % 3;
    let other = shard_name((other + 1) % 3, 3);
    bad["weight_map"][name] = other.as_str().into();
    std::fs::write(&index, bad.to_string()).unwrap();
    let wrong = error(path);
    assert!(matches!(&wrong, ModelError::Tensor { tensor, path, .. } if tensor == name && path.ends_with(&other)));
    says(&wrong, &["got nothing", "index.json"]);
    // A tensor that the index leaves out.
    let mut bad = good.clone();
    bad["weight_map"].as_object_mut().unwrap().remove(name);
    std::fs::write(&index, bad.to_string()).unwrap();
    let wrong = error(path);
    assert!(matches!(&wrong, ModelError::Tensor { tensor, path, .. } if tensor == name && path == &index));

    for (text, parts) in [
        ("", &["not valid JSON"][..]),
        ("{\"weight_map\":", &["not valid JSON"]),
        ("[]", &["need a JSON object"]),
        ("{}", &["weight_map", "got nothing"]),
        ("{\"weight_map\":[]}", &["weight_map", "got []"]),
        ("{\"weight_map\":{\"a\":1}}", &["weight_map.a", "got 1", "need a string"]),
        ("{\"weight_map\":{}}", &["model.embed_tokens.weight", "got nothing"]),
    ] {
        std::fs::write(&index, text).unwrap();
        says(&error(path), parts);
    }

    std::fs::write(&index, good.to_string()).unwrap();
    let shard = path.join(shard_name(1, 3));
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    file_error(error(path), &shard_name(1, 3), &["truncated"]);
    std::fs::remove_file(&shard).unwrap();
    file_error(error(path), &shard_name(1, 3), &[]);
}

#[test]
fn a_file_that_shrinks_while_it_is_open() {
    let (directory, model) = good("llama");
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let weights = checkpoint.weights().unwrap();
    let file = directory.path().join("model.safetensors");
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(100).unwrap();
    let mut out = vec![0.0; 48];
    let wrong = checkpoint.rows(&weights.embedding, 0, &mut out).unwrap_err();
    file_error(wrong, "model.safetensors", &["got 100 bytes", &serialize(&model.tensors).len().to_string()]);
}

#[test]
fn rows_that_are_not_there() {
    let (directory, _model) = good("llama");
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let weights = checkpoint.weights().unwrap();
    let source = &weights.layers[0].gate_up.weight;
    let [rows, columns] = source.shape();
    let read = |start: usize, len: usize| checkpoint.rows(source, start, &mut vec![0.0; len]);
    read(0, 0).unwrap();
    read(rows, 0).unwrap();
    read(rows - 1, columns).unwrap();
    for (start, len) in [(0, 1), (0, columns - 1), (rows, columns), (rows - 1, 2 * columns), (usize::MAX, columns)] {
        let error = read(start, len).unwrap_err();
        assert!(matches!(error, ModelError::Folio(Error::Argument { .. })), "{error:?}");
    }
    assert!(matches!(read(rows + 1, 0).unwrap_err(), ModelError::Folio(Error::Argument { argument: "row_start", .. })));

    // Sources that don't go together, and those of another model.
    let vector = &weights.final_norm.weight;
    TensorSource::stack(&[]).unwrap_err();
    says(&TensorSource::stack(&[source, vector]).unwrap_err(), &["widths 48 and 1"]);
    let biased = LinearWeights { weight: source.clone(), bias: Some(vector.clone()) };
    LinearWeights::stack(&[&biased, &weights.layers[0].q]).unwrap_err();
    let (directory, _model) = good("qwen3");
    let other = Checkpoint::open(directory.path()).unwrap();
    let error = other.rows(source, 0, &mut [0.0; 48]).unwrap_err();
    assert!(matches!(&error, ModelError::Tensor { .. }), "{error:?}");
    other.check(&weights).unwrap_err();
    other.bytes(source).unwrap_err();
}

/// A configuration with some settings replaced.
fn config(model_type: &str, changes: &Value) -> Result<ModelConfig, ModelError> {
    let mut config = model(model_type, Dtype::F32).config;
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    ModelConfig::from_dir(directory.path())
}

fn config_error(model_type: &str, changes: &Value) -> ModelError {
    config(model_type, changes).expect_err(&changes.to_string())
}

#[track_caller]
fn refused(model_type: &str, changes: &Value, key: &str, parts: &[&str]) {
    let error = config_error(model_type, changes);
    assert!(
        matches!(&error, ModelError::Config { key: got, path, .. } if got == key && path.ends_with("config.json")),
        "{changes}: {error:?}"
    );
    says(&error, parts);
}

#[test]
fn configurations_that_are_no_json() {
    let directory = tempfile::tempdir().unwrap();
    let deep = "[".repeat(100_000);
    for text in ["", "garbage", "{\"model_type\": \"llama\",", "[1]", "\u{0}", &deep, "{\"a\": 1} x"] {
        std::fs::write(directory.path().join("config.json"), text).unwrap();
        file_error(ModelConfig::from_dir(directory.path()).unwrap_err(), "config.json", &["JSON"]);
    }
    std::fs::write(directory.path().join("config.json"), [0xff, 0xfe, b'{', 0]).unwrap();
    file_error(ModelConfig::from_dir(directory.path()).unwrap_err(), "config.json", &["JSON"]);
    // So too for the other file, which only its absence is fine for.
    std::fs::write(directory.path().join("config.json"), model("llama", Dtype::F32).config.to_string()).unwrap();
    ModelConfig::from_dir(directory.path()).unwrap();
    std::fs::write(directory.path().join("generation_config.json"), "{").unwrap();
    file_error(ModelConfig::from_dir(directory.path()).unwrap_err(), "generation_config.json", &["JSON"]);
    std::fs::write(directory.path().join("generation_config.json"), "{\"eos_token_id\": \"x\"}").unwrap();
    says(&ModelConfig::from_dir(directory.path()).unwrap_err(), &["generation_config.json", "eos_token_id", "\"x\""]);
}

#[test]
fn architectures_that_are_unknown() {
    let known = "gpt2, gpt_neox, llama, mistral, qwen2, qwen3";
    refused("llama", &json!({ "model_type": "mamba" }), "model_type", &["got mamba", known]);
    refused("llama", &json!({ "model_type": null }), "model_type", &["got nothing", known]);
    refused("llama", &json!({ "model_type": 3 }), "model_type", &["got 3", "a string"]);
    refused("llama", &json!({ "quantization_config": { "bits": 4 } }), "quantization_config", &["\"bits\":4"]);
    refused("gpt2", &json!({ "scale_attn_weights": false }), "scale_attn_weights", &["not supported"]);
    let key = "scale_attn_by_inverse_layer_idx";
    refused("gpt2", &json!({ key: true }), key, &["not supported"]);
    refused("gpt2", &json!({ "add_cross_attention": true }), "add_cross_attention", &["not supported"]);
}

#[test]
fn sizes_that_are_missing_or_wrong() {
    let llama = [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ];
    let gpt2 = ["n_layer", "n_embd", "n_head", "vocab_size", "n_positions"];
    for model_type in ARCHITECTURES {
        let keys = if model_type == "gpt2" { &gpt2[..] } else { &llama };
        for key in keys {
            refused(model_type, &json!({ *key: null }), key, &["got nothing", "need an integer"]);
            for wrong in [
                json!(0),
                json!(-3),
                json!(1.5),
                json!("12"),
                json!([1]),
                json!(4_294_967_296_u64),
                json!(1e300),
                json!(true),
            ] {
                refused(model_type, &json!({ *key: wrong }), key, &["got ", "need an integer from 1"]);
            }
        }
    }
    for key in ["num_key_value_heads", "head_dim"] {
        refused("llama", &json!({ key: 0 }), key, &["got 0"]);
        refused("qwen3", &json!({ key: "8" }), key, &["got \"8\""]);
    }
    refused("gpt2", &json!({ "n_inner": 0 }), "n_inner", &["got 0"]);
    refused("llama", &json!({ "num_key_value_heads": 4 }), "num_key_value_heads", &["got 4", "divisor of the 6"]);
    refused("llama", &json!({ "num_key_value_heads": 7 }), "num_key_value_heads", &["got 7", "divisor of the 6"]);
    refused("llama", &json!({ "head_dim": null, "hidden_size": 25 }), "hidden_size", &["got 25", "multiple of num"]);
    refused("gpt2", &json!({ "n_head": 5 }), "n_embd", &["got 24", "n_head, which is 5"]);
    // Products that wouldn't fit.
    let large = i32::MAX;
    refused("llama", &json!({ "head_dim": large, "num_key_value_heads": 1 }), "num_attention_heads", &["below 2^32"]);
    refused("gpt2", &json!({ "n_embd": large, "n_head": 1 }), "n_embd", &["below 2^32"]);
}

#[test]
fn latents_that_are_not_supported() {
    refused("deepseek_v3", &json!({ "first_k_dense_replace": -1 }), "first_k_dense_replace", &["got -1"]);
    let experts = json!({
        "first_k_dense_replace": 0, "n_routed_experts": 12, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 4,
        "moe_intermediate_size": 16, "n_shared_experts": 1,
    });
    let with = |key: &str, value: serde_json::Value| {
        let mut changes = experts.clone();
        changes[key] = value;
        changes
    };
    refused("deepseek_v3", &with("n_group", 5.into()), "n_group", &["got 5", "a divisor of the 12 experts"]);
    refused("deepseek_v3", &with("topk_group", 9.into()), "topk_group", &["got 9"]);
    refused("deepseek_v3", &with("num_experts_per_tok", 13.into()), "num_experts_per_tok", &["got 13"]);
    refused("deepseek_v3", &with("routed_scaling_factor", 0.into()), "routed_scaling_factor", &["got 0"]);
    refused(
        "deepseek_v3",
        &with("n_shared_experts", 1_000_000.into()),
        "n_shared_experts",
        &["got 1000000", "at most"],
    );
    refused("deepseek_v2", &with("topk_method", "noaux".into()), "topk_method", &["greedy or group_limited_greedy"]);
    refused("deepseek_v2", &with("norm_topk_prob", true.into()), "norm_topk_prob", &["not supported"]);
    for (key, wrong, rule) in [
        ("kv_lora_rank", 12, "a multiple of 8"),
        ("kv_lora_rank", 576, "at most 568"),
        ("qk_rope_head_dim", 4, "a multiple of 8"),
        ("qk_rope_head_dim", 568, "at most 560"),
        ("qk_nope_head_dim", 14, "a multiple of 4"),
        ("v_head_dim", 1000, "at most 576"),
        ("q_lora_rank", 10, "a multiple of 4"),
    ] {
        refused("deepseek_v3", &json!({ key: wrong }), key, &[&format!("got {wrong}"), rule]);
        refused("deepseek_v3", &json!({ key: 0 }), key, &["got 0"]);
        refused("deepseek_v3", &json!({ key: "8" }), key, &["got \"8\""]);
    }
    refused("deepseek_v3", &json!({ "num_key_value_heads": 1 }), "num_key_value_heads", &["got 1", "3, as many as"]);
    refused("deepseek_v2", &json!({ "attention_bias": true }), "attention_bias", &["q_lora_rank"]);
    let partial = json!({ "partial_rotary_factor": 0.5 });
    refused("deepseek_v3", &partial, "partial_rotary_factor", &["4 of 8 dimensions"]);
    let many = json!({ "num_attention_heads": 60_000, "num_key_value_heads": 60_000 });
    refused("deepseek_v3", &many, "num_attention_heads", &["at most 262144 in all"]);
    refused("deepseek_v3", &json!({ "rope_interleave": 1 }), "rope_interleave", &["true or false"]);
}

/// Every size that a kernel has a rule for: refused with the file and the architecture's own key, before anything is read or compiled.
#[test]
fn sizes_that_no_kernel_takes() {
    let four = "a multiple of 4";
    for model_type in ["llama", "mistral", "qwen2", "qwen3"] {
        for odd in [1, 30, 51] {
            refused(
                model_type,
                &json!({ "intermediate_size": odd }),
                "intermediate_size",
                &[&format!("got {odd}"), four],
            );
        }
        refused(model_type, &json!({ "intermediate_size": 1 << 19 }), "intermediate_size", &["got 524288", "262144"]);
        for odd in [18, 30, 16_388] {
            refused(model_type, &json!({ "hidden_size": odd }), "hidden_size", &[&format!("got {odd}"), four, "16384"]);
        }
        for odd in [4, 12, 59, 584] {
            refused(model_type, &json!({ "head_dim": odd }), "head_dim", &[&format!("got {odd}"), "a multiple of 8"]);
        }
        let heads = json!({ "num_attention_heads": 65_540, "num_key_value_heads": 2 });
        refused(model_type, &heads, "num_attention_heads", &["got 65540", "at most 65535"]);
        let wide = json!({ "num_attention_heads": 40_000, "num_key_value_heads": 2 });
        refused(model_type, &wide, "num_attention_heads", &["320000 in all", "262144"]);
        refused(model_type, &json!({ "vocab_size": 966_657 }), "vocab_size", &["got 966657", "at most 966656"]);
        config(model_type, &json!({ "vocab_size": 966_656, "intermediate_size": 52, "hidden_size": 16_384 })).unwrap();
    }
    // Where the file gives none, the size follows from another.
    let none = json!({ "head_dim": null, "hidden_size": 24 });
    refused("llama", &none, "hidden_size", &["24 over 6 heads", "head_dim of 4"]);
    refused("gpt2", &json!({ "n_head": 4 }), "n_embd", &["24 over 4 heads", "head_dim of 6"]);
    refused("gpt2", &json!({ "n_embd": 1026, "n_head": 9 }), "n_embd", &["1026 over 9 heads", "head_dim of 114"]);
    refused("gpt_neox", &json!({ "num_attention_heads": 2 }), "hidden_size", &["24 over 2 heads", "head_dim of 12"]);
    refused("gpt2", &json!({ "n_embd": 16_640, "n_head": 65 }), "n_embd", &["got 16640", "16384"]);
    refused("gpt2", &json!({ "n_inner": 262_145 }), "n_inner", &["got 262145", "at most 262144"]);
    refused("gpt2", &json!({ "vocab_size": 1 << 20 }), "vocab_size", &["at most 966656"]);
    // Without a gate only linear layers see it, which take any.
    assert_eq!(config("gpt2", &json!({ "n_inner": 51 })).unwrap().intermediate_size, 51);
    assert_eq!(config("gpt_neox", &json!({ "intermediate_size": 51 })).unwrap().intermediate_size, 51);
    for (model_type, key) in [("gpt2", "layer_norm_epsilon"), ("gpt_neox", "layer_norm_eps"), ("llama", "rms_norm_eps")]
    {
        for eps in [json!(0), json!(1e-40), json!(1e300)] {
            refused(model_type, &json!({ key: eps }), key, &["a normal number above 0"]);
        }
    }
    let scaling = json!({ "type": "yarn", "factor": 2.0, "attention_factor": 1e39 });
    refused("llama", &json!({ "rope_scaling": scaling }), "rope_scaling", &["got inf"]);
}

/// Only the MLP with a gate has a rule for its width: the others compute with any.
#[test]
fn an_odd_width_without_a_gate_works() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut gpt2 = model("gpt2", Dtype::F32);
    gpt2.config["n_inner"] = 51.into();
    for (name, tensor) in &mut gpt2.tensors {
        let shape: Vec<_> = tensor.shape.iter().map(|n| if *n == 96 { 51 } else { *n }).collect();
        *tensor = Tensor::new(name, &shape, Dtype::F32);
    }
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &gpt2.config, &gpt2.tensors);
    for weights in [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT8, WeightFormat::INT4] {
        let model =
            folio::model::Model::load_blocking(&gpu, directory.path(), ModelOptions::new(weights), |_| {}).unwrap();
        let options = with(DecoderOptions::default(), |c| {
            c.num_blocks = 4;
            c.max_step_tokens = 16;
        });
        let mut decoder = Decoder::new_blocking(model.into(), options).unwrap();
        let sequence = decoder.create_sequence();
        let logits = gpu.block_on(decoder.logits(&[(sequence, &[1, 2, 3])], LogitRows::Last)).unwrap();
        assert!(logits[0].iter().all(|logit| logit.is_finite()) && logits[0].iter().any(|logit| *logit != 0.0));
    }
}

#[test]
fn a_weight_beyond_f16_is_named() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let (directory, mut model) = good("llama");
    let gate = model.tensors.get_mut("model.layers.1.mlp.up_proj.weight").unwrap();
    gate.values[3 * 48 + 5] = -1e6;
    write(directory.path(), &model.config, &model.tensors);
    let load = |weights| folio::model::Model::load_blocking(&gpu, directory.path(), ModelOptions::new(weights), |_| {});
    load(WeightFormat::F32).unwrap();
    let error = load(WeightFormat::F16).unwrap_err();
    // Gate and up are one matrix: row 3 of the second has 28 before it.
    let names = "model.layers.1.mlp.gate_proj.weight + model.layers.1.mlp.up_proj.weight";
    assert!(
        matches!(&error, ModelError::Weight { tensor: Some(tensor), value: -1e6, row: 31, column: 5 } if tensor == names),
        "{error:?}"
    );
    says(&error, &[names, "got -1000000 at row 31, column 5", "65504"]);
    assert_eq!(error.kind(), ErrorKind::Caller);
}

/// What is no file, under the name of each file that is read. An error at once: nothing waits for a pipe, and nothing reads a device to its end.
#[cfg(unix)]
#[test]
fn files_that_are_no_files() {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    let (directory, model) = good("llama");
    let path = directory.path().to_owned();
    let sharded = tempfile::tempdir().unwrap();
    write_sharded(sharded.path(), &model.config, &model.tensors, 2);
    let sharded = sharded.path().to_owned();
    type Make<'a> = &'a dyn Fn(&Path);
    let make: [(&str, Make<'_>); 4] = [
        ("a pipe", &|at| assert!(std::process::Command::new("mkfifo").arg(at).status().unwrap().success())),
        ("a device", &|at| symlink("/dev/zero", at).unwrap()),
        ("a socket", &|at| drop(UnixListener::bind(at).unwrap())),
        ("a directory", &|at| std::fs::create_dir(at).unwrap()),
    ];
    for (what, make) in make {
        for (directory, name) in [
            (&path, "config.json"),
            (&path, "generation_config.json"),
            (&path, "model.safetensors"),
            (&path, "tokenizer.json"),
            (&sharded, "model.safetensors.index.json"),
            (&sharded, "model-00002-of-00002.safetensors"),
        ] {
            let file = directory.join(name);
            let before = std::fs::read(&file).ok();
            let _ = std::fs::remove_file(&file);
            make(&file);
            let opened = directory.clone();
            let error = within_a_second(move || match name {
                "tokenizer.json" => Tokenizer::from_file(opened.join(name)).map(drop),
                _ => Checkpoint::open(&opened).map(drop),
            });
            // A directory of that name has a tokenizer.json in it, or should.
            if (what, name) == ("a directory", "tokenizer.json") {
                file_error(error.unwrap_err(), "tokenizer.json/tokenizer.json", &["can't be read"]);
            } else {
                file_error(error.unwrap_err(), name, &[what, "need a regular file"]);
            }
            let _ = std::fs::remove_file(&file).or_else(|_| std::fs::remove_dir(&file));
            before.into_iter().for_each(|bytes| std::fs::write(&file, bytes).unwrap());
        }
    }
    // Links to files are followed.
    std::fs::rename(path.join("config.json"), path.join("other.json")).unwrap();
    symlink("other.json", path.join("config.json")).unwrap();
    Checkpoint::open(&path).unwrap();
}

/// The result, if it comes soon: a call that waits for ever is left behind.
#[cfg(unix)]
fn within_a_second<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(call()));
    receiver.recv_timeout(std::time::Duration::from_secs(10)).expect("an end")
}

/// Sparse files, which take no space on the disk.
#[test]
fn files_that_are_too_long() {
    let (directory, model) = good("llama");
    let sharded = tempfile::tempdir().unwrap();
    write_sharded(sharded.path(), &model.config, &model.tensors, 2);
    for (directory, name, max) in [
        (directory.path(), "config.json", 4_u64 << 20),
        (directory.path(), "generation_config.json", 4 << 20),
        (directory.path(), "tokenizer.json", 128 << 20),
        (sharded.path(), "model.safetensors.index.json", 128 << 20),
    ] {
        let path = directory.join(name);
        let before = std::fs::read(&path).ok();
        std::fs::File::create(&path).unwrap().set_len(max + 1).unwrap();
        let error = match name {
            "tokenizer.json" => Tokenizer::from_file(&path).map(drop).unwrap_err(),
            _ => Checkpoint::open(directory).map(drop).unwrap_err(),
        };
        file_error(error, name, &[&format!("got {} bytes, need at most {max}", max + 1)]);
        std::fs::remove_file(&path).unwrap();
        before.into_iter().for_each(|bytes| std::fs::write(&path, bytes).unwrap());
    }
}

/// What the system or the parser said stays reachable, and is not said twice.
#[test]
fn errors_keep_their_cause() {
    use std::error::Error as _;
    let (directory, _model) = good("llama");
    std::fs::remove_file(directory.path().join("model.safetensors")).unwrap();
    std::fs::create_dir(directory.path().join("empty")).unwrap();
    let missing = error(directory.path().join("empty"));
    assert!(missing.source().is_none(), "no weights, says folio itself");
    let missing = error(directory.path().join("nowhere"));
    let cause = missing.source().and_then(|cause| cause.downcast_ref::<std::io::Error>()).expect("a cause");
    assert_eq!((cause.kind(), missing.kind()), (std::io::ErrorKind::NotFound, ErrorKind::File));
    std::fs::write(directory.path().join("config.json"), "{\n\"a\": x}").unwrap();
    let broken = ModelConfig::from_dir(directory.path()).unwrap_err();
    says(&broken, &["not valid JSON at line 2, column 6"]);
    let cause = broken.source().and_then(|cause| cause.downcast_ref::<serde_json::Error>()).expect("a cause");
    assert_eq!((cause.line(), broken.kind()), (2, ErrorKind::File));
    let argument = ModelError::from(Error::argument("a", 1, 2));
    assert_eq!((argument.kind(), argument.to_string()), (ErrorKind::Caller, "a: got 1, need 2".to_owned()));
}

#[test]
fn settings_that_are_wrong() {
    for wrong in [json!(-1e-6), json!("1e-6"), json!(false)] {
        refused("llama", &json!({ "rms_norm_eps": wrong }), "rms_norm_eps", &["at least 0"]);
    }
    refused("llama", &json!({ "hidden_act": "quick_gelu" }), "hidden_act", &["got quick_gelu", "silu", "gelu_new"]);
    refused("llama", &json!({ "hidden_act": ["silu"] }), "hidden_act", &["a string"]);
    refused("llama", &json!({ "attention_bias": 1 }), "attention_bias", &["true or false"]);
    refused("llama", &json!({ "tie_word_embeddings": "no" }), "tie_word_embeddings", &["true or false"]);
    refused("gpt_neox", &json!({ "use_parallel_residual": 0 }), "use_parallel_residual", &["true or false"]);
    for wrong in [json!(-1), json!("</s>"), json!([1, -1]), json!(4_294_967_296_u64), json!({})] {
        refused("llama", &json!({ "eos_token_id": wrong }), "eos_token_id", &["token id"]);
    }
    refused("mistral", &json!({ "sliding_window": 0 }), "sliding_window", &["got 0"]);
    // A long value is cut short, also within a character.
    let long = "é".repeat(1000);
    let text = config_error("llama", &json!({ "vocab_size": long })).to_string();
    assert!(text.len() < 400 && text.contains("é..."), "{text}");
}

#[test]
fn rope_that_is_wrong() {
    for wrong in [json!(0), json!(-10000.0), json!("x"), json!(1)] {
        refused("llama", &json!({ "rope_theta": wrong }), "rope_theta", &["a number above 1"]);
    }
    for wrong in [json!(0), json!(1.5), json!(-0.5), json!("half")] {
        refused("gpt_neox", &json!({ "rotary_pct": wrong }), "rotary_pct", &["above 0, at most 1"]);
    }
    // 8 * 0.375 = 3 dimensions, and 0.
    refused("gpt_neox", &json!({ "rotary_pct": 0.375 }), "rotary_pct", &["3 dimensions", "even"]);
    refused("gpt_neox", &json!({ "rotary_pct": 0.1 }), "rotary_pct", &["0 dimensions", "even"]);
    refused("llama", &json!({ "rope_scaling": "linear" }), "rope_scaling", &["an object"]);
    let known = "default, linear, dynamic, yarn, longrope, llama3";
    let scaled = |section: &str, scaling: Value, key: &str, parts: &[&str]| {
        refused("llama", &json!({ section: scaling }), &format!("{section}.{key}"), parts);
    };
    for (key, section) in [("rope_type", "rope_scaling"), ("type", "rope_scaling"), ("rope_type", "rope_parameters")] {
        scaled(section, json!({ key: "proportional", "factor": 2 }), key, &["got proportional", known]);
        scaled(section, json!({ key: 3 }), key, &["got 3", "a string"]);
        for kind in ["linear", "dynamic", "llama3"] {
            let rest = json!({ key: kind, "low_freq_factor": 1, "high_freq_factor": 4 });
            let with = |factor: Value| {
                let mut all = rest.clone();
                all["factor"] = factor;
                all
            };
            scaled(section, rest.clone(), "factor", &["got nothing", "at least 1"]);
            for wrong in [json!(0.5), json!("2"), json!(-1)] {
                scaled(section, with(wrong), "factor", &["at least 1"]);
            }
        }
    }
    let yarn = |key: &str, value: Value, parts: &[&str]| {
        let mut all = json!({ "type": "yarn", "factor": 2.0 });
        all[key] = value;
        scaled("rope_scaling", all, key, parts);
    };
    yarn("factor", json!(0.1), &["at least 1"]);
    yarn("beta_fast", json!(0.5), &["more than beta_slow"]);
    yarn("beta_slow", json!(-1), &["above 0"]);
    yarn("attention_factor", json!(0), &["above 0"]);
    yarn("mscale", json!("x"), &["at least 0"]);
    yarn("truncate", json!(0), &["true or false"]);
    yarn("original_max_position_embeddings", json!(0), &["got 0"]);
    let all = json!({ "type": "yarn", "original_max_position_embeddings": 1000 });
    scaled("rope_scaling", all, "original_max_position_embeddings", &["got 1000", "256"]);
    let llama3 = |key: &str, value: Value, parts: &[&str]| {
        let mut all = json!({ "type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4 });
        all[key] = value;
        scaled("rope_scaling", all, key, parts);
    };
    llama3("low_freq_factor", Value::Null, &["got nothing"]);
    llama3("high_freq_factor", json!(0), &["above 0"]);
    llama3("high_freq_factor", json!(1), &["more than low_freq_factor"]);
    let nested = json!({ "full_attention": { "rope_theta": 1e6 }, "sliding_attention": { "rope_theta": 1e4 } });
    scaled("rope_parameters", nested, "full_attention", &["not supported"]);
    // The file is named, and infinity isn't a number.
    let directory = tempfile::tempdir().unwrap();
    let text = model("llama", Dtype::F32).config.to_string().replace("500000.0", "1e999");
    std::fs::write(directory.path().join("config.json"), text).unwrap();
    ModelConfig::from_dir(directory.path()).unwrap_err();
}

#[test]
fn tokenizers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    let load = || Tokenizer::from_file(directory.path()).unwrap_err();
    file_error(load(), "tokenizer.json", &[]);
    let no_model = json!({ "version": "1.0", "added_tokens": [] }).to_string();
    let bad_merge = json!({ "version": "1.0", "added_tokens": [], "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": ["a b"] } });
    for text in ["", "{", "[]", &no_model, &bad_merge.to_string()] {
        std::fs::write(&path, text).unwrap();
        file_error(load(), "tokenizer.json", &["not a tokenizer"]);
    }
    let empty = json!({ "version": "1.0", "added_tokens": [], "model": { "type": "BPE", "vocab": {}, "merges": [] } });
    std::fs::write(&path, empty.to_string()).unwrap();
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    assert_eq!(tokenizer.vocab_size(), 0);
    tokenizer.check_vocab_size(1).unwrap();
    assert_eq!(tokenizer.decode(&[5], true).unwrap(), "");
}

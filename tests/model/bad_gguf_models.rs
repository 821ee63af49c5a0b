//! GGUF files of models with windows, experts or latents, and of several files, that are damaged.

use folio::model::{Checkpoint, TensorSource};

use crate::bad_gguf::{File, Tensor, f32_value, floats, good, list, refused, text, text_value, texts, u32_value};
use crate::gguf::fixture;

/// The same file as another architecture.
fn as_architecture(name: &str) -> File {
    let mut file = good();
    for (key, _) in &mut file.settings {
        if let Some(rest) = key.strip_prefix("llama.") {
            *key = format!("{name}.{rest}");
        }
    }
    file.set("general.architecture", text_value(name));
    file
}

#[test]
fn windows_that_are_wrong() {
    let window = |name: &str, pattern: Option<Vec<u8>>| {
        let mut file = as_architecture(name);
        file.set(&format!("{name}.attention.sliding_window"), u32_value(4));
        if let Some(pattern) = pattern {
            file.set(&format!("{name}.attention.sliding_window_pattern"), pattern);
        }
        file.bytes()
    };
    let bools = |flags: &[u8]| Some(list(7, flags.len() as u64, flags));
    let key = "gemma3.attention.sliding_window_pattern";
    refused(&window("gemma3", bools(&[1, 0])), &[key, "a list of 2 numbers", "each of 1 layers"]);
    refused(&window("gemma3", Some(floats(&[0.5]))), &[key, "a list of 1 numbers"]);
    refused(&window("gemma3", Some(u32_value(0))), &[key, "got 0"]);
    refused(&window("gemma3", Some(u32_value(u32::MAX))), &[key, "4294967295"]);
    // Patterns that fit: the next that is missing is a tensor.
    refused(&window("gemma3", Some(u32_value(1 << 16))), &["blk.0.attn_q_norm.weight", "got nothing"]);
    refused(&window("gemma3", bools(&[1])), &["blk.0.attn_q_norm.weight", "got nothing"]);
    refused(&window("llama", bools(&[1])), &["llama.attention.sliding_window_pattern", "all layers or in none"]);
    refused(&window("olmo2", None), &["olmo2.attention.sliding_window", "windows are not supported"]);
    let mut file = as_architecture("gemma2");
    file.set("gemma2.attention.sliding_window", u32_value(4));
    file.set("gemma2.rope.freq_base_swa", f32_value(50.0));
    refused(&file.bytes(), &["gemma2.rope.freq_base_swa", "got 50", "rope.freq_base"]);
}

/// A file of the fixtures whose settings of 32 bits, by their names, are replaced.
fn patched(name: &str, changes: &[(&str, u32)]) -> Vec<u8> {
    let mut bytes = std::fs::read(fixture(name).join("model.gguf")).unwrap();
    for (key, value) in changes {
        let key = [&text(key)[..], &4_u32.to_le_bytes()].concat();
        let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[test]
fn without_windows_all_layers_are_alike() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let kinds = |bytes: Vec<u8>| {
        std::fs::write(&path, bytes).unwrap();
        let kinds = Checkpoint::open(&path).unwrap().config().layers.kinds().to_vec();
        kinds.into_iter().map(|kind| (kind.rope.unwrap().theta, kind.window)).collect::<Vec<_>>()
    };
    assert_eq!(kinds(patched("gemma3", &[])), [(10_000.0, Some(6)), (1_000_000.0, None)]);
    assert_eq!(kinds(patched("gemma3", &[("gemma3.attention.sliding_window", 0)])), [(1_000_000.0, None)]);
}

/// Tensors that a converter may also write as one, which lie one after another in the small file.
#[test]
fn what_is_stacked_has_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let rows = |file: &File| {
        let mut bytes = file.bytes();
        // Data that differs from row to row.
        let start = bytes.len() - file.data;
        for (i, out) in (0_u16..).zip(bytes[start..].chunks_exact_mut(4)) {
            out.copy_from_slice(&f32::from(i).to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let weights = checkpoint.weights().unwrap();
        let read = |source: &TensorSource| {
            let mut out = vec![0.0; source.shape().iter().product()];
            checkpoint.rows(source, 0, &mut out).unwrap();
            out
        };
        weights.sources().map(read).collect::<Vec<_>>()
    };
    let stack = |file: &mut File, parts: &[&str], name: &str, dimensions: &[u64]| {
        let first = file.tensor(parts[0]);
        (first.name, first.dimensions) = (name.to_owned(), dimensions.to_vec());
        file.tensors.retain(|tensor| !parts.contains(&tensor.name.as_str()));
    };
    let mut file = good();
    let apart = rows(&file);
    let parts = ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"];
    stack(&mut file, &parts, "blk.0.attn_qkv.weight", &[16, 32]);
    assert!(rows(&file) == apart);

    // A mixture of one expert: its gate and up lie one after another in both forms. The router comes last.
    let mut file = good();
    for key in ["llama.expert_count", "llama.expert_used_count"] {
        file.set(key, u32_value(1));
    }
    for (name, dimensions) in [("gate", [16, 24, 1]), ("up", [16, 24, 1]), ("down", [24, 16, 1])] {
        let tensor = file.tensor(&format!("blk.0.ffn_{name}.weight"));
        (tensor.name, tensor.dimensions) = (format!("blk.0.ffn_{name}_exps.weight"), dimensions.to_vec());
    }
    let (name, offset) = ("blk.0.ffn_gate_inp.weight".to_owned(), file.data as u64);
    file.tensors.push(Tensor { name, dimensions: vec![16, 1], kind: 0, offset });
    file.data += 64;
    let apart = rows(&file);
    let parts = ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"];
    stack(&mut file, &parts, "blk.0.ffn_gate_up_exps.weight", &[16, 48, 1]);
    assert!(rows(&file) == apart);
}

#[test]
fn experts_and_latents_that_are_wrong() {
    let key = "gpt-oss.expert_count";
    refused(&patched("gpt_oss", &[(key, 0)]), &[key, "got 0"]);
    refused(&patched("gpt_oss", &[(key, u32::MAX)]), &[key, "4294967295"]);
    refused(&patched("gpt_oss", &[(key, 100_000)]), &[key, "100000"]);
    refused(&patched("gpt_oss", &[(key, 3)]), &["blk.0.ffn_gate_inp.weight", "[4, 32]", "[3, 32]"]);
    refused(&patched("gpt_oss", &[("gpt-oss.expert_used_count", 5)]), &["gpt-oss.expert_used_count", "5"]);
    for size in [0, 2, 1 << 30, u32::MAX] {
        let key = "gpt-oss.expert_feed_forward_length";
        refused(&patched("gpt_oss", &[(key, size)]), &[key, &size.to_string()]);
    }
    let key = "deepseek2.expert_gating_func";
    refused(&patched("deepseek_v3", &[(key, 4)]), &[key, "got 4, need 1"]);
    refused(&patched("dots1", &[("dots1.expert_gating_func", 1)]), &["dots1.expert_gating_func", "got 1, need 2"]);
    for (groups, selected) in [(3, 2), (4, 5), (u32::MAX, u32::MAX)] {
        let changes = [("deepseek2.expert_group_count", groups), ("deepseek2.expert_group_used_count", selected)];
        refused(&patched("deepseek_v3", &changes), &["deepseek2.expert_group_"]);
    }
    let key = "deepseek2.expert_shared_count";
    refused(&patched("deepseek_v3", &[(key, 2)]), &["ffn_gate_shexp.weight", "[32, 32]", "[64, 32]"]);
    refused(&patched("deepseek_v3", &[(key, u32::MAX)]), &[key, "4294967295"]);
    let layers = [("deepseek2.block_count", i32::MAX as u32), ("deepseek2.leading_dense_block_count", i32::MAX as u32)];
    refused(&patched("deepseek_v3", &layers), &["blk.1.ffn_gate.weight", "got nothing"]);
    refused(&patched("deepseek_v3", &layers[..1]), &["blk.2.", "got nothing"]);
    for (key, sizes) in [
        ("deepseek2.attention.kv_lora_rank", [0, 12, u32::MAX]),
        ("deepseek2.attention.q_lora_rank", [0, 30, u32::MAX]),
        ("deepseek2.attention.key_length_mla", [0, 8, u32::MAX]),
        ("deepseek2.attention.value_length_mla", [0, 18, u32::MAX]),
        ("deepseek2.rope.dimension_count", [0, 40, u32::MAX]),
        ("deepseek2.attention.head_count", [0, 1 << 31, u32::MAX]),
    ] {
        for size in sizes {
            refused(&patched("deepseek_v3", &[(key, size)]), &["deepseek2."]);
        }
    }
    // One head more, and one less.
    for heads in [1, 3] {
        let bytes = patched("deepseek_v3", &[("deepseek2.attention.head_count", heads)]);
        refused(&bytes, &["blk.0.attn_q_b.weight"]);
    }
}

#[test]
fn files_of_a_model_that_do_not_fit() {
    let name = |number: u32| format!("model-{number:05}-of-00003.gguf");
    let part = |number| std::fs::read(fixture("olmo2").join(name(number))).unwrap();
    let with = |parts: &[(&str, Vec<u8>)], start: &str| {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in parts {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        Checkpoint::open(folder.path().join(start)).map(drop).map_err(|error| error.to_string())
    };
    let [one, two, three] = [1, 2, 3].map(name);
    let all = [1, 2, 3].map(part);
    let [a, b, c] = all.clone();
    let parts = |b: Vec<u8>, c: Vec<u8>| [(one.as_str(), a.clone()), (two.as_str(), b), (three.as_str(), c)];
    with(&parts(b.clone(), c.clone()), &one).unwrap();
    let refused = |result: Result<(), String>, parts: &[&str]| {
        let text = result.unwrap_err();
        assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} are not all in: {text}");
    };
    refused(with(&parts(b.clone(), c.clone())[..2], &one), &[&three, "can't be read"]);
    refused(with(&parts(b.clone(), c.clone()), &two), &[&two, "split.no", "got 1, need 0"]);
    refused(with(&parts(c.clone(), c.clone()), &one), &[&two, "split.no", "got 2, need 1"]);
    refused(with(&parts(b.clone(), b[..b.len() - 32].to_vec()), &one), &[&three, "tensor"]);
    refused(with(&parts(b.clone(), Vec::new()), &one), &[&three, "got 0 bytes"]);
    refused(with(&[("model.gguf", a.clone())], "model.gguf"), &["split.count", "model.gguf", "-00001-of-00003.gguf"]);
    // Another first file, which has what the others have.
    let whole = good().bytes();
    refused(with(&parts(b.clone(), whole), &one), &[&three, "split.count", "got nothing, need 3"]);
    // Counts of 16 and of 32 bits.
    let change = |bytes: &[u8], key: &str, kind: u32, value: &[u8]| {
        let key = [&text(key)[..], &kind.to_le_bytes()].concat();
        let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
        let mut bytes = bytes.to_vec();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    let count = change(&b, "split.count", 2, &4_u16.to_le_bytes());
    refused(with(&parts(count, c.clone()), &one), &[&two, "split.count", "got 4, need 3"]);
    let huge = change(&a, "split.count", 2, &u16::MAX.to_le_bytes());
    refused(with(&[("m-00001-of-65535.gguf", huge)], "m-00001-of-65535.gguf"), &["m-00002-of-65535.gguf"]);
    let fewer = change(&a, "split.tensors.count", 5, &7_i32.to_le_bytes());
    refused(with(&[(&one, fewer), (&two, b.clone()), (&three, c.clone())], &one), &["split.tensors.count", "got 7"]);
    // A tensor of the second file under the name of one in the first.
    let place = |bytes: &[u8], name: &str| bytes.windows(name.len()).position(|window| window == name.as_bytes());
    let (mut twice, name) = (b.clone(), "blk.0.attn_q.weight");
    let other = "blk.1.attn_q.weight";
    let at = place(&twice, other).unwrap();
    assert!(place(&a, name).is_some());
    twice[at..at + name.len()].copy_from_slice(name.as_bytes());
    refused(with(&parts(twice, c), &one), &[&two, name, "need it once"]);
}

#[test]
fn tokens_that_end_an_answer() {
    let ends = |tokens: [&str; 8]| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut file = good();
        file.set("tokenizer.ggml.model", text_value("gpt2"));
        file.set("tokenizer.ggml.tokens", texts(&tokens));
        file.set("tokenizer.ggml.token_type", list(0, 8, &[1, 3, 3, 3, 3, 3, 1, 1]));
        file.set("tokenizer.ggml.eos_token_id", u32_value(3));
        std::fs::write(&path, file.bytes()).unwrap();
        Checkpoint::open(&path).unwrap().config().eos_token_ids.clone()
    };
    // A message that ends is no end of an answer where there are tokens for that.
    assert_eq!(ends(["a", "<|end|>", "<|call|>", "<|return|>", "<|start|>", "b", "c", "d"]), [3, 2]);
    assert_eq!(ends(["a", "<|end|>", "<|other|>", "<|return|>", "<|start|>", "b", "c", "d"]), [3, 1]);
}

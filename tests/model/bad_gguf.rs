//! Damaged GGUF files: each is an error that names the file and the part, and takes no more memory than the file has bytes to show for.

use std::path::Path;

use folio::model::{Checkpoint, GgufMetadata, Model, ModelError, ModelOptions, Tokenizer};

use crate::adapter;
use crate::gguf::fixture;

/// A file in parts, so that each can be damaged.
#[derive(Clone)]
pub(crate) struct File {
    magic: [u8; 4],
    version: u32,
    /// What is announced; `None`: as many as there are.
    num_tensors: Option<u64>,
    num_settings: Option<u64>,
    pub(crate) settings: Vec<(String, Vec<u8>)>,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) data: usize,
}

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dimensions: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) offset: u64,
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A setting's value with its type.
fn typed(kind: u32, value: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], value].concat()
}

pub(crate) fn u32_value(n: u32) -> Vec<u8> {
    typed(4, &n.to_le_bytes())
}

pub(crate) fn f32_value(n: f32) -> Vec<u8> {
    typed(6, &n.to_le_bytes())
}

pub(crate) fn text_value(value: &str) -> Vec<u8> {
    typed(8, &text(value))
}

pub(crate) fn list(kind: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    typed(9, &[&kind.to_le_bytes()[..], &len.to_le_bytes(), elements].concat())
}

pub(crate) fn texts(values: &[&str]) -> Vec<u8> {
    list(8, values.len() as u64, &values.iter().flat_map(|value| text(value)).collect::<Vec<_>>())
}

pub(crate) fn floats(values: &[f32]) -> Vec<u8> {
    list(6, values.len() as u64, &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

impl File {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        bytes.extend(self.num_settings.unwrap_or(self.settings.len() as u64).to_le_bytes());
        for (key, value) in &self.settings {
            bytes.extend(text(key));
            bytes.extend(value);
        }
        for tensor in &self.tensors {
            bytes.extend(text(&tensor.name));
            bytes.extend((tensor.dimensions.len() as u32).to_le_bytes());
            bytes.extend(tensor.dimensions.iter().flat_map(|n| n.to_le_bytes()));
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend(tensor.offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(32) + self.data, 1);
        bytes
    }

    pub(crate) fn set(&mut self, key: &str, value: Vec<u8>) {
        match self.settings.iter_mut().find(|(own, _)| own == key) {
            Some((_, own)) => *own = value,
            None => self.settings.push((key.to_owned(), value)),
        }
    }

    fn remove(&mut self, key: &str) {
        self.settings.retain(|(own, _)| own != key);
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }
}

/// A small Llama with a tokenizer, all F32.
pub(crate) fn good() -> File {
    let mut settings = vec![("general.architecture".to_owned(), text_value("llama"))];
    for (key, n) in [
        ("block_count", 1),
        ("context_length", 32),
        ("embedding_length", 16),
        ("feed_forward_length", 24),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", 8),
    ] {
        settings.push((format!("llama.{key}"), u32_value(n)));
    }
    settings.push(("llama.attention.layer_norm_rms_epsilon".to_owned(), f32_value(1e-5)));
    let tokens = ["<unk>", "<s>", "</s>", "\u{2581}", "a", "\u{2581}a", "b", "ab"];
    settings.push(("tokenizer.ggml.model".to_owned(), text_value("llama")));
    settings.push(("tokenizer.ggml.tokens".to_owned(), texts(&tokens)));
    settings.push(("tokenizer.ggml.scores".to_owned(), floats(&[0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0])));
    let kinds: Vec<u8> = [2_u32, 3, 3, 1, 1, 1, 1, 1].iter().flat_map(|kind| kind.to_le_bytes()).collect();
    settings.push(("tokenizer.ggml.token_type".to_owned(), list(4, 8, &kinds)));
    let mut data = 0;
    let mut tensors = Vec::new();
    for (name, dimensions) in [
        ("token_embd", vec![16, 8]),
        ("output_norm", vec![16]),
        ("blk.0.attn_norm", vec![16]),
        ("blk.0.attn_q", vec![16, 16]),
        ("blk.0.attn_k", vec![16, 8]),
        ("blk.0.attn_v", vec![16, 8]),
        ("blk.0.attn_output", vec![16, 16]),
        ("blk.0.ffn_norm", vec![16]),
        ("blk.0.ffn_gate", vec![16, 24]),
        ("blk.0.ffn_up", vec![16, 24]),
        ("blk.0.ffn_down", vec![24, 16]),
    ] {
        let size = dimensions.iter().product::<u64>() * 4;
        tensors.push(Tensor { name: format!("{name}.weight"), dimensions, kind: 0, offset: data });
        data += size.next_multiple_of(32);
    }
    File { magic: *b"GGUF", version: 3, num_tensors: None, num_settings: None, settings, tensors, data: data as usize }
}

fn open(path: &Path) -> Result<(), ModelError> {
    Checkpoint::open(path)?;
    GgufMetadata::open(path)?;
    Tokenizer::from_file(path).map(drop)
}

#[track_caller]
pub(crate) fn refused(bytes: &[u8], parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let error = open(&path).expect_err("a damaged file");
    let text = error.to_string();
    for part in parts.iter().chain(&["model.gguf"]) {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[track_caller]
fn changed(change: impl FnOnce(&mut File), parts: &[&str]) {
    let mut file = good();
    change(&mut file);
    refused(&file.bytes(), parts);
}

#[test]
fn a_small_file_is_fine() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for version in [2, 3] {
        std::fs::write(&path, File { version, ..good() }.bytes()).unwrap();
        open(&path).unwrap();
    }
    // What is 0 is not there.
    let mut file = good();
    file.set("llama.expert_count", u32_value(0));
    file.set("llama.attention.sliding_window", u32_value(0));
    file.set("llama.rope.scaling.factor", f32_value(0.0));
    std::fs::write(&path, file.bytes()).unwrap();
    open(&path).unwrap();
    let ids = Tokenizer::from_file(&path).unwrap().encode("a ab", true).unwrap();
    assert_eq!(ids, [1, 5, 5, 6]);
}

#[test]
fn files_that_are_none() {
    refused(b"", &["got 0 bytes"]);
    refused(b"GG", &["got 2 bytes"]);
    refused(b"PK\x03\x04aaaaaaaaaaaaaaaaaaaaaaaa", &["need a GGUF file"]);
    refused(b"version https://git-lfs.github.com/spec/v1\n", &["Git LFS"]);
    for version in [0, 1, 4, u32::MAX] {
        changed(|file| file.version = version, &[&format!("got version {version}, need GGUF version 2 or 3")]);
    }
    changed(|file| file.version = 3_u32.swap_bytes(), &["big-endian"]);
    let folder = tempfile::tempdir().unwrap();
    let missing = open(&folder.path().join("no.gguf")).unwrap_err();
    assert!(missing.to_string().contains("no.gguf: can't be read"), "{missing}");
    // A folder of that name is looked into.
    let path = folder.path().join("folder.gguf");
    std::fs::create_dir(&path).unwrap();
    assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("no weights"));
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe.gguf");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let device = folder.path().join("device.gguf");
    std::os::unix::fs::symlink("/dev/zero", &device).unwrap();
    for (path, what) in [(&pipe, "a pipe"), (&device, "a device")] {
        for error in [Checkpoint::open(path).unwrap_err(), Tokenizer::from_file(path).unwrap_err()] {
            assert!(error.to_string().contains(&format!("got {what}, need a regular file")), "{error}");
        }
    }
}

#[test]
fn every_truncation() {
    let whole = good().bytes();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    // Every byte of the header, and some of the weights; the last tensor ends where the file does.
    let data = whole.len() - good().data;
    for len in (0..data).chain((data..whole.len()).step_by(101)).chain([whole.len() - 1]) {
        std::fs::write(&path, &whole[..len]).unwrap();
        let error = Checkpoint::open(&path).expect_err("a truncated file");
        assert!(error.to_string().contains("model.gguf"), "{error}");
        assert!(error.to_string().contains("truncated"), "{len} of {}: {error}", whole.len());
    }
}

#[test]
fn counts_and_lengths_beyond_the_file() {
    for count in [65_537, u64::MAX, 1 << 63] {
        changed(|file| file.num_tensors = Some(count), &["the number of tensors", &count.to_string()]);
        changed(|file| file.num_settings = Some(count), &["the number of settings", &count.to_string()]);
    }
    changed(|file| file.num_settings = Some(60_000), &["model.gguf"]);
    changed(|file| file.num_tensors = Some(60_000), &["tensor"]);
    for len in [1 << 20, 1 << 40, u64::MAX] {
        let announced = [&len.to_le_bytes()[..], b"abc"].concat();
        changed(|file| file.set("a", typed(8, &announced)), &["a"]);
        changed(|file| file.set("numbers", list(6, len, &[])), &["numbers"]);
        changed(|file| file.set("texts", list(8, len, &[])), &["texts"]);
        changed(|file| file.set("bytes", list(0, len, &[])), &["bytes"]);
    }
    // A name, not a text.
    let mut bytes = good().bytes();
    bytes[24..32].copy_from_slice(&65_536_u64.to_le_bytes());
    refused(&bytes, &["the name of setting 0", "need at most 65535"]);
}

#[test]
fn settings_that_are_wrong() {
    let key = "llama.block_count";
    changed(|file| file.settings.push((key.to_owned(), u32_value(1))), &[key, "got it twice"]);
    changed(|file| file.set("odd", typed(13, &[])), &["odd", "a value of type 13"]);
    changed(|file| file.set("odd", list(9, 1, &[0; 64])), &["odd", "no list of lists"]);
    changed(|file| file.set("odd", typed(7, &[2])), &["odd", "the byte 2"]);
    changed(|file| file.set("odd", typed(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])), &["odd", "not UTF-8"]);
    for alignment in [0, 3, 48, 1 << 21] {
        changed(
            |file| file.set("general.alignment", u32_value(alignment)),
            &["general.alignment", &alignment.to_string()],
        );
    }
    changed(|file| file.set("general.alignment", text_value("32")), &["general.alignment", "\"32\""]);
    changed(|file| file.remove("general.architecture"), &["general.architecture", "got nothing", "llama, qwen2"]);
    changed(|file| file.set("general.architecture", text_value("mamba")), &["general.architecture", "mamba"]);
    changed(|file| file.set("general.architecture", u32_value(1)), &["general.architecture", "a text"]);
    changed(|file| file.set("split.count", u32_value(3)), &["split.count", "got 3", "-00001-of-00003.gguf"]);
    changed(|file| file.set("llama.expert_count", u32_value(8)), &["llama.expert_used_count", "got nothing"]);
    for key in ["llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length"] {
        changed(|file| file.remove(key), &[key, "got nothing"]);
        changed(|file| file.set(key, u32_value(0)), &[key, "got 0"]);
        changed(|file| file.set(key, f32_value(2.5)), &[key, "2.5"]);
        changed(|file| file.set(key, list(4, 1, &[1, 0, 0, 0])), &[key, "a list of 1 numbers"]);
        changed(|file| file.set(key, typed(5, &(-1_i32).to_le_bytes())), &[key, "-1"]);
    }
    changed(
        |file| file.set("llama.attention.head_count", u32_value(3)),
        &["llama.embedding_length", "got 16, need a multiple of attention.head_count, which is 3"],
    );
    changed(|file| file.set("llama.attention.head_count_kv", u32_value(3)), &["llama.attention.head_count_kv"]);
    changed(
        |file| file.set("llama.attention.value_length", u32_value(16)),
        &["llama.attention.value_length", "need 8"],
    );
    changed(|file| file.set("llama.attention.layer_norm_rms_epsilon", f32_value(f32::NAN)), &["epsilon", "NaN"]);
    for dimensions in [0, 3, 10] {
        changed(|file| file.set("llama.rope.dimension_count", u32_value(dimensions)), &["llama.rope.dimension_count"]);
    }
    changed(
        |file| file.set("llama.rope.dimension_count", u32_value(4)),
        &["llama.rope.dimension_count", "interleaved"],
    );
    changed(
        |file| file.set("llama.rope.scaling.type", text_value("longrope")),
        &["rope_factors_short.weight", "got nothing"],
    );
    changed(
        |file| file.set("llama.rope.scaling.type", text_value("wide")),
        &["llama.rope.scaling.type", "wide", "longrope"],
    );
    let linear = |factor: f32| {
        move |file: &mut File| {
            file.set("llama.rope.scaling.type", text_value("linear"));
            file.set("llama.rope.scaling.factor", f32_value(factor));
        }
    };
    for factor in [0.5, -1.0, f32::NAN, f32::INFINITY] {
        changed(linear(factor), &["llama.rope.scaling.factor"]);
    }
}

#[test]
fn tensors_that_are_wrong() {
    let name = "blk.0.attn_q.weight";
    changed(|file| file.tensors.push(file.tensors[3].clone()), &[name, "got it twice"]);
    changed(|file| file.tensors.retain(|tensor| tensor.name != name), &[name, "got nothing"]);
    changed(
        |file| file.tensors.retain(|tensor| tensor.name != "token_embd.weight"),
        &["token_embd.weight", "got nothing"],
    );
    changed(|file| file.tensors[3].name = "blk.0.ffn_gate_inp.weight".to_owned(), &[name, "got nothing"]);
    changed(
        |file| {
            let tensor = Tensor { name: "blk.0.new.weight".to_owned(), ..file.tensors[1].clone() };
            file.tensors[1].offset = 0;
            file.tensors.push(tensor);
        },
        &["output_norm.weight", "token_embd.weight"],
    );
    changed(
        |file| {
            let offset = file.data as u64;
            file.tensors.push(Tensor { name: "blk.0.new.weight".to_owned(), dimensions: vec![8], kind: 0, offset });
            file.data += 32;
        },
        &["blk.0.new.weight", "not known"],
    );
    for dimensions in [vec![], vec![16, 8, 1, 1, 1]] {
        changed(|file| file.tensor(name).dimensions = dimensions.clone(), &[name, "dimensions"]);
    }
    for dimensions in [vec![0, 16], vec![16, 0], vec![u64::MAX, 16], vec![1 << 32, 1 << 32], vec![1 << 60]] {
        changed(|file| file.tensor(name).dimensions = dimensions.clone(), &[name, "dimensions"]);
    }
    changed(|file| file.tensor(name).dimensions = vec![8, 16], &[name, "[16, 8]", "[16, 16]"]);
    changed(|file| file.tensor(name).dimensions = vec![1 << 20, 1 << 30], &[name, "within the file"]);
    for (kind, text) in [(9, "Q8_1"), (16, "IQ2_XXS"), (40, "NVFP4"), (4, "unknown"), (u32::MAX, "unknown")] {
        changed(|file| file.tensor(name).kind = kind, &[name, text, "Q4_K"]);
    }
    // 16 in a row are no whole block.
    changed(|file| file.tensor(name).kind = 8, &[name, "rows of 16 in Q8_0", "a multiple of 32"]);
    changed(|file| file.tensor(name).kind = 39, &[name, "rows of 16 in MXFP4", "a multiple of 32"]);
    changed(|file| file.tensor(name).kind = 10, &[name, "rows of 16 in Q2_K", "a multiple of 256"]);
    changed(|file| file.tensor(name).offset += 4, &[name, "a multiple of the alignment, 32"]);
    for offset in [1 << 20, u64::MAX - 31, 1 << 63] {
        changed(|file| file.tensor(name).offset = offset, &[name, &format!("from {offset} on")]);
    }
    changed(|file| file.tensor(name).offset -= 32, &["bytes that"]);
    // Divisors of frequencies.
    let divisors = |dimensions: Vec<u64>, kind| {
        move |file: &mut File| {
            let offset = file.data as u64;
            file.tensors.push(Tensor { name: "rope_freqs.weight".to_owned(), dimensions, kind, offset });
            file.data += 1024;
        }
    };
    changed(divisors(vec![5], 0), &["rope_freqs.weight", "[5]", "[4]"]);
    changed(divisors(vec![32], 8), &["rope_freqs.weight", "Q8_0"]);
    // Bytes of 1: a subnormal half is above 0, and so is this f32; zeros are not.
    let mut file = good();
    divisors(vec![4], 0)(&mut file);
    let mut bytes = file.bytes();
    let len = bytes.len();
    bytes[len - 1024..].fill(0);
    refused(&bytes, &["rope_freqs.weight", "above 0"]);
}

#[test]
fn tokenizers_that_are_wrong() {
    let (tokens, scores, kinds) = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type");
    changed(|file| file.remove("tokenizer.ggml.model"), &["tokenizer.ggml.model", "got nothing"]);
    changed(|file| file.set("tokenizer.ggml.model", text_value("bert")), &["tokenizer.ggml.model", "bert"]);
    changed(|file| file.remove(tokens), &[tokens, "got nothing"]);
    changed(|file| file.set(tokens, texts(&[])), &[tokens, "got nothing"]);
    changed(|file| file.set(tokens, text_value("a")), &[tokens, "a list of texts"]);
    changed(
        |file| file.set(tokens, texts(&["a", "b", "a", "c", "d", "e", "f", "g"])),
        &[tokens, "\"a\" as tokens 0 and 2"],
    );
    changed(|file| file.set(scores, floats(&[0.0; 7])), &[scores, "7 scores", "8 tokens"]);
    changed(
        |file| file.set(scores, floats(&[0.0, f32::NAN, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])),
        &[scores, "NaN for token 1"],
    );
    changed(|file| file.remove(scores), &[scores, "0 scores"]);
    changed(|file| file.set(kinds, list(0, 8, &[9; 8])), &[kinds, "9 for token 0"]);
    changed(|file| file.set(kinds, list(0, 3, &[1; 3])), &[kinds, "nothing for token 3"]);
    changed(|file| file.set("tokenizer.ggml.bos_token_id", u32_value(99)), &["tokenizer.ggml.bos_token_id", "99"]);
    changed(|file| file.set("tokenizer.ggml.eos_token_id", text_value("</s>")), &["tokenizer.ggml.eos_token_id"]);
    changed(
        |file| file.set("tokenizer.ggml.add_bos_token", u32_value(1)),
        &["tokenizer.ggml.add_bos_token", "true or false"],
    );
    let long = "a".repeat(1 << 16);
    let all = ["<unk>", "<s>", "</s>", "\u{2581}", "a", "aa", "aaa", &long];
    changed(|file| file.set(tokens, texts(&all)), &[tokens, "65536 bytes"]);
    let byte_level = |file: &mut File| {
        file.set("tokenizer.ggml.model", text_value("gpt2"));
        file.set("tokenizer.ggml.merges", texts(&["a b"]));
    };
    let with = |change: fn(&mut File)| {
        move |file: &mut File| {
            byte_level(file);
            change(file);
        }
    };
    let merges = "tokenizer.ggml.merges";
    changed(with(|file| file.remove("tokenizer.ggml.merges")), &[merges, "got nothing"]);
    changed(with(|file| file.set("tokenizer.ggml.merges", texts(&["ab"]))), &[merges, "\"ab\""]);
    changed(with(|file| file.set("tokenizer.ggml.merges", texts(&["a c"]))), &["not a tokenizer"]);
    changed(with(|file| file.set("tokenizer.ggml.merges", texts(&[""]))), &[merges, "\"\""]);
    changed(
        with(|file| file.set("tokenizer.ggml.pre", text_value("new"))),
        &["tokenizer.ggml.pre", "new", "llama-bpe"],
    );
}

#[test]
fn changed_bytes_never_end_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut random = fastrand::Rng::with_seed(11);
    // Their headers, as far as they go: behind it all bytes are fine.
    let read = |name: &str, header| (std::fs::read(fixture(name).join("model.gguf")).unwrap(), header);
    let small = good().bytes();
    let files = [read("qwen2", 9_500), read("gpt_oss", 3_456), read("deepseek_v2", 3_456), read("phi3", 1_696)];
    for (whole, header) in std::iter::once((small, usize::MAX)).chain(files) {
        let mut fine = 0;
        for round in 0..600 {
            let mut bytes = whole.clone();
            let end = bytes.len().min(header);
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..end);
                bytes[at] = if round % 2 == 0 { random.u8(..) } else { bytes[at] ^ 1 << random.u8(..8) };
            }
            std::fs::write(&path, &bytes).unwrap();
            match Checkpoint::open(&path) {
                Err(error) => assert!(error.to_string().contains("model.gguf"), "{error}"),
                // What is fine can be read.
                Ok(checkpoint) => {
                    let weights = checkpoint.weights().unwrap();
                    for source in weights.sources() {
                        let [rows, columns] = source.shape();
                        checkpoint.rows(source, 0, &mut vec![0.0; rows * columns]).unwrap();
                    }
                    fine += 1;
                }
            }
            if let Ok(tokenizer) = Tokenizer::from_file(&path) {
                let ids = tokenizer.encode("a b, 12", true);
                ids.map(|ids| tokenizer.decode(&ids, false)).ok();
            }
        }
        assert!(fine > 20, "{fine} files of 600 were fine: too few to tell");
    }
}

#[test]
fn the_loader_refuses_what_changed_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, good().bytes()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let weights = checkpoint.weights().unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = checkpoint.rows(&weights.embedding, 0, &mut [0.0; 16]).unwrap_err();
    assert!(error.to_string().contains("got 100 bytes"), "{error}");

    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    assert!(Model::load_blocking(&gpu, &path, ModelOptions::default(), |_| {}).is_err());
}

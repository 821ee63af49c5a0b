//! GGUF files: models against Hugging Face transformers, tokenizers against transformers and SentencePiece.
//!
//! `scripts/make_gguf_fixtures.py` makes the files and what is expected of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use folio::model::{
    Checkpoint, Decoder, DecoderOptions, GgufMetadata, LayerKind, LayerPattern, LogitRows, Model, ModelConfig,
    ModelError, ModelOptions, ModelResult, TensorSource, Tokenizer, WeightFormat, WeightSource,
};
use folio::{Gpu, KvFormat};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::adapter;
use crate::common::with;

const MODELS: [&str; 20] = [
    "gpt2",
    "gpt_neox",
    "llama",
    "llama3",
    "llama_linear",
    "llama_yarn",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3moe",
    "gpt_oss",
    "dots1",
    "phi3",
    "smollm3",
    "olmo2",
    "gemma2",
    "gemma3",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_old",
];

/// The first of those with a `config.json` of the same model: all from it on.
const FIRST_WITH_CONFIG: &str = "mixtral";
const TOKENIZERS: [&str; 11] = [
    "deepseek_coder",
    "deepseek_llm",
    "deepseek_v3",
    "default",
    "gpt2",
    "gpt_4o",
    "llama_bpe",
    "llama_spm",
    "qwen2",
    "smollm",
    "tekken",
];

/// Deviation from transformers' logits, relative to their standard deviation: that of F32 in `parity.rs`.
const TOLERANCE: f64 = 2e-4;

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

fn words(file: &SafeTensors<'_>, name: &str) -> Vec<u32> {
    let tensor = file.tensor(name).unwrap();
    tensor.data().chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// The file of a model, or the first of several.
fn model_file(name: &str) -> PathBuf {
    let whole = fixture(name).join("model.gguf");
    if whole.exists() { whole } else { fixture(name).join("model-00001-of-00003.gguf") }
}

/// Logits of all tokens.
fn logits(gpu: &Gpu, path: &Path, weights: WeightFormat, tokens: &[u32]) -> Vec<f32> {
    logits_of(gpu, Model::load_blocking(gpu, path, ModelOptions::new(weights), |_| {}).unwrap(), tokens)
}

fn logits_of(gpu: &Gpu, model: Model, tokens: &[u32]) -> Vec<f32> {
    let options = with(DecoderOptions::default(), |options| {
        (options.k_format, options.v_format, options.num_blocks) = (KvFormat::F32, KvFormat::F32, 8);
    });
    let mut decoder = Decoder::new_blocking(Arc::new(model), options).unwrap();
    let sequence = decoder.create_sequence();
    let rows = gpu.block_on(decoder.logits(&[(sequence, tokens)], LogitRows::All)).unwrap();
    rows.concat()
}

/// The largest deviation, in standard deviations of what is expected.
fn deviation(logits: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(logits.len(), expected.len());
    let n = expected.len() as f64;
    let mean = expected.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let spread = (expected.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt();
    let errors = logits.iter().zip(expected).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
    // `max` would let a NaN pass.
    errors.fold(0.0, |worst: f64, error| if error > worst || error.is_nan() { error } else { worst }) / spread
}

#[test]
fn logits_are_those_of_transformers() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for name in MODELS {
        let bytes = std::fs::read(fixture(name).join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let expected: Vec<_> = words(&file, "logits").into_iter().map(f32::from_bits).collect();
        let logits = logits(&gpu, &model_file(name), WeightFormat::F32, &words(&file, "tokens"));
        let deviation = deviation(&logits, &expected);
        println!("{name}: logits deviate by {deviation:.1e} standard deviations");
        assert!(deviation < TOLERANCE, "{name}: {deviation}");
    }
}

#[test]
fn settings_are_those_of_config_json() {
    for name in MODELS.into_iter().skip_while(|name| *name != FIRST_WITH_CONFIG) {
        let checkpoint = Checkpoint::open(model_file(name)).unwrap();
        let weights = checkpoint.weights().unwrap();
        assert_eq!(checkpoint.unused(&weights), [""; 0], "{name}");
        let mut config = checkpoint.config().clone();
        let expected = ModelConfig::from_dir(fixture(name)).unwrap();
        // Gemma's norms are stored as they are applied.
        assert_eq!(config.norm.weight_offset, 0.0, "{name}");
        config.norm.weight_offset = expected.norm.weight_offset;
        assert_eq!(without_rounding(config), without_rounding(expected), "{name}");
    }
}

/// Numbers of the rotary embedding with the digits that f32 has, in which the format stores them, and the rest as it is.
fn without_rounding(mut config: ModelConfig) -> (ModelConfig, String) {
    let rounded = |pattern: &LayerPattern, layers: u32| {
        let ropes = (0..layers).map(|layer| pattern.kind(layer)).map(|kind| {
            let rope = kind.rope.as_ref().map(|rope| {
                let frequencies: Vec<_> = rope.inverse_frequencies().iter().map(|f| format!("{f:.5e}")).collect();
                let sizes = (rope.rotary_dim, rope.rotary_start, rope.layout);
                format!("{sizes:?} {:.5} {}", rope.attention_factor(), frequencies.join(" "))
            });
            format!("{:?} {rope:?}", kind.window)
        });
        ropes.collect::<Vec<_>>().join("\n")
    };
    let layers = config.num_layers;
    let mut text = rounded(&config.layers, layers);
    if let Some(long) = config.long_context.take() {
        text += &format!("\nlong, {}:\n{}", long.max_positions, rounded(&long.layers, layers));
    }
    // The default, whether it is said or not.
    let scale = config.softmax_scale.take().unwrap_or((config.head_dim as f32).powf(-0.5));
    text += &format!("\n{scale:.6}");
    config.layers = LayerPattern::uniform(LayerKind::new(None, None));
    (config, text)
}

#[test]
fn a_model_is_the_same_as_from_safetensors() {
    let (folder, file) = (fixture("llama"), fixture("llama").join("model.gguf"));
    let (ours, theirs) = (Checkpoint::open(&file).unwrap(), Checkpoint::open(&folder).unwrap());
    let (weights, expected) = (ours.weights().unwrap(), theirs.weights().unwrap());
    assert_eq!(ours.unused(&weights), [""; 0]);
    assert_eq!(ours.tensors().count(), theirs.tensors().count());
    let mut sources = 0;
    for (source, other) in weights.sources().zip(expected.sources()) {
        let [rows, columns] = other.shape();
        assert_eq!(source.shape(), [rows, columns]);
        let read = |checkpoint: &Checkpoint, source: &TensorSource, block: usize| {
            let mut all = vec![f32::NAN; rows * columns];
            for (i, out) in all.chunks_mut(block * columns).enumerate() {
                checkpoint.rows(source, i * block, out).unwrap();
            }
            all.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let want = read(&theirs, other, rows);
        for block in [1, 3, 5, rows] {
            assert!(read(&ours, source, block) == want, "{source:?} in blocks of {block}");
        }
        sources += 1;
    }
    assert_eq!(sources, expected.sources().count());
    // The settings, too; the format says epsilon in f32.
    let (config, expected) = (ours.config(), theirs.config());
    assert_eq!(config, expected);

    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let tokens: Vec<u32> = (3..30).collect();
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT8] {
        let [a, b] = [&file, &folder].map(|path| logits(&gpu, path, format, &tokens));
        assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{format}");
    }
}

/// A checkpoint whose matrices have the values that Int4 stores for them, each row by itself.
struct Rounded<'a> {
    checkpoint: &'a Checkpoint,
    with_grids: bool,
}

impl WeightSource for Rounded<'_> {
    fn rows(&self, source: &TensorSource, row_start: usize, out: &mut [f32]) -> ModelResult<()> {
        self.checkpoint.rows(source, row_start, out)?;
        let [_, columns] = source.shape();
        if columns == 1 {
            return Ok(());
        }
        for (i, row) in out.chunks_mut(columns).enumerate() {
            let mut grids = vec![None; columns.div_ceil(32)];
            if self.with_grids {
                self.checkpoint.grids(source, row_start + i, &mut grids)?;
            }
            row.copy_from_slice(&WeightFormat::INT4.round_trip_on(row, &grids)?);
        }
        Ok(())
    }
}

#[test]
fn four_bits_keep_the_grids_of_every_row() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    // Both have layers in which some rows come with grids and some without: queries and keys, gate and up.
    for name in ["llama", "qwen2"] {
        let checkpoint = Checkpoint::open(fixture(name).join("model.gguf")).unwrap();
        let weights = checkpoint.weights().unwrap();
        let tokens: Vec<u32> = (3..30).collect();
        let model = |source: &dyn WeightSource, format: WeightFormat| {
            let config = checkpoint.config().clone();
            Model::from_source_blocking(&gpu, config, &weights, source, ModelOptions::new(format), |_| {}).unwrap()
        };
        let rounded = |with_grids| {
            let source = Rounded { checkpoint: &checkpoint, with_grids };
            logits_of(&gpu, model(&source, WeightFormat::F32), &tokens)
        };
        let stored = logits_of(&gpu, model(&checkpoint, WeightFormat::INT4), &tokens);
        let (own, without) = (deviation(&stored, &rounded(true)), deviation(&stored, &rounded(false)));
        println!(
            "{name}: Int4 is {own:.1e} standard deviations from its own values, {without:.1e} from those without grids"
        );
        assert!(own < TOLERANCE, "{name}: {own}");
        assert!(without > 10.0 * TOLERANCE, "{name}: {without}");
    }
}

#[test]
fn tokenizers_are_those_of_transformers_and_sentencepiece() {
    let expected = std::fs::read(fixture("tokenizers/expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    for name in TOKENIZERS {
        let tokenizer = Tokenizer::from_file(fixture(&format!("tokenizers/{name}.gguf"))).unwrap();
        let cases = &expected[name];
        let (texts, ids) = (cases["texts"].as_array().unwrap(), cases["ids"].as_array().unwrap());
        assert!(texts.len() >= 15 && texts.len() == ids.len());
        for (text, ids) in texts.iter().zip(ids) {
            let text = text.as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{name}: {text:?}");
            if name != "qwen2" {
                // Qwen's composes characters.
                assert_eq!(tokenizer.decode(&ids, false).unwrap(), text, "{name}: {text:?}");
            }
        }
    }
}

#[test]
fn special_tokens() {
    let open = |name: &str| Tokenizer::from_file(fixture(&format!("tokenizers/{name}.gguf"))).unwrap();
    // A start token is put before a text where llama.cpp does it.
    for (name, start) in
        [("llama_bpe", Some(420)), ("llama_spm", Some(1)), ("tekken", Some(401)), ("gpt2", None), ("qwen2", None)]
    {
        let tokenizer = open(name);
        let plain = tokenizer.encode("Hello", false).unwrap();
        let with: Vec<_> = start.into_iter().chain(plain).collect();
        assert_eq!(tokenizer.encode("Hello", true).unwrap(), with, "{name}");
    }
    let tokenizer = open("llama_spm");
    let ids = tokenizer.encode("a</s>b", false).unwrap();
    let [a, b] = ["a", "b"].map(|text| tokenizer.encode(text, false).unwrap());
    assert_eq!(ids, [&a[..], &[2], &b].concat());
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), tokenizer.decode(&[a, b].concat(), true).unwrap());
    let ends = |path: PathBuf| Checkpoint::open(path).unwrap().config().eos_token_ids.clone();
    // <|im_end|> by its setting, <|endoftext|> by its name.
    assert_eq!(ends(fixture("qwen2/model.gguf")), [298, 296]);
    assert_eq!(ends(fixture("llama/model.gguf")), [2]);
    Tokenizer::from_file(fixture("qwen2/model.gguf")).unwrap().check_vocab_size(300).unwrap();
}

#[test]
fn metadata() {
    let metadata = GgufMetadata::open(fixture("qwen2/model.gguf")).unwrap();
    assert!(metadata.text("tokenizer.chat_template").unwrap().unwrap().contains("<|im_start|>"));
    assert_eq!(metadata.special_token("eos").unwrap(), Some("<|im_end|>"));
    assert_eq!(metadata.special_token("bos").unwrap(), None);
    assert_eq!(metadata.text("general.name").unwrap(), None);
    let error = metadata.text("qwen2.block_count").unwrap_err();
    assert!(matches!(&error, ModelError::Config { key, .. } if key == "qwen2.block_count"), "{error}");
    assert!(error.to_string().ends_with("qwen2.block_count: got 2, need a text"), "{error}");
    assert!(GgufMetadata::is_path("a/b.gguf") && !GgufMetadata::is_path("a/b.safetensors"));
}

//! Whole models against Hugging Face transformers: tiny random checkpoints of every architecture, with logits computed there.
//!
//! `scripts/make_model_fixtures.py` makes them.

use crate::common::with;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use folio::model::{
    Checkpoint, Decoder, DecoderOptions, Factor, LayerKind, LayerPattern, LogitRows, Model, ModelConfig, ModelOptions,
    ModelWeights, Prompt, Sampling, WeightFormat,
};
use folio::{Gpu, KvFormat, RopeConfig, RopeLayout, RopeScaling};
use safetensors::SafeTensors;

use crate::adapter::{self, Open};

/// Deviation from Hugging Face's logits, relative to their standard deviation, that F32 may have.
const TOLERANCE: f64 = 2e-4;

/// The same for an F16 cache. Halves have 11 bits: each key and value is off by up to 2^-12 of itself, and random layers add that up.
const F16_TOLERANCE: f64 = 2e-2;

struct Expected {
    sequences: Vec<Vec<u32>>,
    /// `[tokens of all sequences, vocab]`
    logits: Vec<f32>,
    /// Continuation of each sequence.
    greedy: Vec<Vec<u32>>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models")
}

/// All checkpoints.
fn names() -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(fixtures())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 5, "{names:?}");
    names
}

impl Expected {
    fn load(name: &str) -> Self {
        let bytes = std::fs::read(fixtures().join(name).join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<u32> {
            file.tensor(name)
                .unwrap()
                .data()
                .chunks_exact(4)
                .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
                .collect()
        };
        let tokens = words("tokens");
        let mut rest = &tokens[..];
        let mut sequences = Vec::new();
        for length in words("lengths") {
            let (own, after) = rest.split_at(length as usize);
            sequences.push(own.to_vec());
            rest = after;
        }
        assert!(rest.is_empty());
        let greedy = words("greedy");
        let steps = greedy.len() / sequences.len();
        Self {
            sequences,
            logits: words("logits").into_iter().map(f32::from_bits).collect(),
            greedy: greedy.chunks_exact(steps).map(<[u32]>::to_vec).collect(),
        }
    }

    /// Standard deviation of the logits.
    fn spread(&self) -> f64 {
        let n = self.logits.len() as f64;
        let mean = self.logits.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        (self.logits.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt()
    }

    /// The root mean square of the logits' deviation, in units of their spread.
    fn mean_deviation(&self, logits: &[f32]) -> f64 {
        let squares = logits.iter().zip(&self.logits).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
        (squares.sum::<f64>() / logits.len() as f64).sqrt() / self.spread()
    }

    /// The median over all tokens of the largest deviation of a token's logits, in units of their spread.
    fn median_deviation(&self, logits: &[f32]) -> f64 {
        let tokens: usize = self.sequences.iter().map(Vec::len).sum();
        let vocab = logits.len() / tokens;
        let worst = |(a, b): (&[f32], &[f32])| {
            a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs()).max_by(f64::total_cmp).unwrap()
        };
        let mut rows: Vec<_> = logits.chunks(vocab).zip(self.logits.chunks(vocab)).map(worst).collect();
        rows.sort_by(f64::total_cmp);
        rows[rows.len() / 2] / self.spread()
    }

    /// The largest deviation of the logits, in units of their spread.
    fn deviation(&self, logits: &[f32]) -> f64 {
        assert_eq!(logits.len(), self.logits.len());
        let pairs = logits.iter().zip(&self.logits);
        // `max` would let a NaN pass.
        let worst = pairs
            .map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs())
            .fold(0.0, |worst: f64, error| if error > worst || error.is_nan() { error } else { worst });
        worst / self.spread()
    }
}

/// Whether nearly all texts of a checkpoint are longer than what it was first trained on.
fn is_long(config: &ModelConfig) -> bool {
    config.max_positions == 1
}

/// The configuration by which the logits of a checkpoint were computed.
pub(crate) fn config(checkpoint: &Checkpoint) -> ModelConfig {
    let config = checkpoint.config().clone();
    if is_long(&config) { config.with_long_context().unwrap() } else { config }
}

fn load(gpu: &Gpu, name: &str, weights: WeightFormat) -> Arc<Model> {
    let path = fixtures().join(name);
    let long = is_long(&ModelConfig::from_dir(&path).unwrap());
    let options = ModelOptions::new(weights).with_long_context(long);
    Arc::new(Model::load_blocking(gpu, path, options, |_| {}).unwrap())
}

fn decoder(model: &Arc<Model>, format: KvFormat, max_step_tokens: u32) -> Decoder {
    let options = with(DecoderOptions::default(), |c| {
        c.block_size = 16;
        c.num_blocks = 64;
        c.k_format = format;
        c.v_format = format;
        c.max_step_tokens = max_step_tokens;
    });
    Decoder::new_blocking(Arc::clone(model), options).unwrap()
}

/// Logits of all tokens, with at most `chunk` new tokens of each sequence per call.
fn logits(decoder: &mut Decoder, sequences: &[Vec<u32>], chunk: usize) -> Vec<f32> {
    let ids: Vec<_> = sequences.iter().map(|_| decoder.create_sequence()).collect();
    let mut rows = vec![Vec::new(); sequences.len()];
    let longest = sequences.iter().map(Vec::len).max().unwrap();
    for start in (0..longest).step_by(chunk.min(longest)) {
        let live: Vec<_> = (0..sequences.len()).filter(|&i| start < sequences[i].len()).collect();
        let batch: Vec<_> =
            live.iter().map(|&i| (ids[i], &sequences[i][start..sequences[i].len().min(start + chunk)])).collect();
        let gpu = decoder.gpu().clone();
        let results = gpu.block_on(decoder.logits(&batch, LogitRows::All)).unwrap();
        for (&i, logits) in live.iter().zip(results) {
            rows[i].extend(logits);
        }
    }
    for id in ids {
        decoder.free(id).unwrap();
    }
    rows.concat()
}

fn greedy(decoder: &mut Decoder, sequences: &[Vec<u32>], steps: usize) -> Vec<Vec<u32>> {
    let prompts: Vec<_> = sequences
        .iter()
        .map(|tokens| Prompt { sequence: decoder.create_sequence(), tokens, sampling: Sampling::greedy() })
        .collect();
    let generated = decoder.generate_blocking(&prompts, steps, &[], |_, _| ControlFlow::Continue(())).unwrap();
    for prompt in prompts {
        decoder.free(prompt.sequence).unwrap();
    }
    generated.into_iter().map(|g| g.tokens).collect()
}

#[test]
fn every_architecture_agrees_with_transformers() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    println!("{:22} {:>9} {:>10} {:>9} {:>9}", "max error / std", "whole", "chunks of 7", "by token", "F16 cache");
    for name in names() {
        let expected = Expected::load(&name);
        let model = load(&gpu, &name, WeightFormat::F32);
        let mut f32_cache = decoder(&model, KvFormat::F32, 256);
        let deviations: Vec<_> = [usize::MAX, 7, 1]
            .map(|chunk| expected.deviation(&logits(&mut f32_cache, &expected.sequences, chunk)))
            .to_vec();
        let mut f16_cache = decoder(&model, KvFormat::F16, 256);
        let f16_logits = logits(&mut f16_cache, &expected.sequences, usize::MAX);
        // A token near the border between two experts may go to the other one: of mixtures most tokens must agree.
        let is_mixture = model.config().experts.is_some();
        let f16 = if is_mixture { expected.median_deviation(&f16_logits) } else { expected.deviation(&f16_logits) };
        println!("{name:22} {:9.1e} {:10.1e} {:9.1e} {f16:9.1e}", deviations[0], deviations[1], deviations[2]);
        for (how, deviation) in ["whole", "in chunks of 7", "token by token"].iter().zip(deviations) {
            assert!(deviation < TOLERANCE, "{name}, {how}: {deviation:.1e} of the spread");
        }
        assert!(f16 < F16_TOLERANCE, "{name}, F16 cache: {f16:.1e} of the spread");
        let steps = expected.greedy[0].len();
        assert_eq!(greedy(&mut f32_cache, &expected.sequences, steps), expected.greedy, "{name}, greedy");
    }
}

/// Steps that are smaller than the batch cut prompts anywhere; the results are the same.
#[test]
fn small_steps_agree_too() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for name in ["llama3", "gpt2", "gemma3", "smollm3", "deepseek_v2"] {
        let expected = Expected::load(name);
        let model = load(&gpu, name, WeightFormat::F32);
        let mut decoder = decoder(&model, KvFormat::F32, 10);
        let deviation = expected.deviation(&logits(&mut decoder, &expected.sequences, usize::MAX));
        assert!(deviation < TOLERANCE, "{name}: {deviation:.1e} of the spread");
        assert_eq!(
            greedy(&mut decoder, &expected.sequences, expected.greedy[0].len()),
            expected.greedy,
            "{name}, greedy"
        );
    }
}

/// The kernels of the other families, on models that use most of them.
#[test]
fn every_kernel_family_agrees() {
    let checked = Open { checks: folio::ShaderChecks::Full, ..adapter::DEFAULT };
    let families: [(&str, Open); 5] = [
        ("CPU with wgpu's checks", checked),
        ("CPU without int64", adapter::CPU_NO_INT64),
        ("CPU without subgroups", adapter::CPU_PLAIN),
        ("GPU", adapter::GPU),
        ("GPU without subgroups", adapter::GPU_PLAIN),
    ];
    // A kernel compiles for seconds: what differs most in every family, the others by turns.
    let by_turns = [["gpt_neox", "gemma2"], ["olmo2", "gpt_oss"]];
    for (i, (family, open)) in families.into_iter().enumerate() {
        let Some(gpu) = adapter::open(open) else { return };
        for name in ["qwen3", "deepseek_v3", "mixtral"].into_iter().chain(by_turns[i % 2]) {
            let expected = Expected::load(name);
            let model = load(&gpu, name, WeightFormat::F32);
            let mut decoder = decoder(&model, KvFormat::F32, 256);
            for chunk in [usize::MAX, 1] {
                // By token only as far as needed to meet every kernel.
                let sequences: Vec<_> =
                    expected.sequences.iter().filter(|s| chunk > 1 || s.len() <= 7).cloned().collect();
                let rows: usize = sequences.iter().map(Vec::len).sum();
                let vocab = model.config().vocab_size as usize;
                let got = logits(&mut decoder, &sequences, chunk);
                let mut all = expected.logits.clone();
                all[..rows * vocab].copy_from_slice(&got);
                let deviation = expected.deviation(&all);
                assert!(deviation < TOLERANCE, "{family}, {name}: {deviation:.1e} of the spread");
            }
        }
    }
}

/// Smaller weights give nearly the same logits: rounding is all that differs. Random layers double an error every few steps, trained ones don't.
#[test]
fn weight_formats_stay_close() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    // The first checkpoint is in bf16, of which F16 loses nothing that is this large; the second in f32.
    for (name, f16) in [("llama3", 1e-5), ("deepseek_v3", 2e-3)] {
        let expected = Expected::load(name);
        for (weights, tolerance) in [
            (WeightFormat::F16, f16),
            (WeightFormat::Int8 { group_size: 32 }, 0.1),
            (WeightFormat::Int4 { group_size: 32 }, 1.0),
        ] {
            let model = load(&gpu, name, weights);
            let mut decoder = decoder(&model, KvFormat::F32, 256);
            let deviation = expected.mean_deviation(&logits(&mut decoder, &expected.sequences, usize::MAX));
            println!("{name}, {weights:?}: {deviation:.1e} of the spread");
            assert!(deviation < tolerance, "{name}, {weights:?}: {deviation:.1e} of the spread");
        }
    }
}

/// Latents in every format that they may have: rounding is all that differs. Keys and values have one format, without scales per channel.
#[test]
fn cache_formats_of_latents_stay_close() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let expected = Expected::load("deepseek_v3");
    let model = load(&gpu, "deepseek_v3", WeightFormat::F32);
    for (format, tolerance) in
        [(KvFormat::F16, 2e-3), (KvFormat::E4M3, 0.3), (KvFormat::Int8, 5e-2), (KvFormat::Int4, 0.8)]
    {
        let mut decoder = decoder(&model, format, 256);
        for chunk in [usize::MAX, 7] {
            let deviation = expected.mean_deviation(&logits(&mut decoder, &expected.sequences, chunk));
            println!("{format}, chunks of {chunk}: {deviation:.1e} of the spread");
            assert!(deviation < tolerance, "{format}, chunks of {chunk}: {deviation:.1e} of the spread");
        }
    }
    for (k_format, v_format) in [
        (KvFormat::F16, KvFormat::F32),
        (KvFormat::Int8PerChannel, KvFormat::Int8),
        (KvFormat::Int8PerChannel, KvFormat::F16),
    ] {
        let options = with(DecoderOptions::default(), |o| (o.k_format, o.v_format) = (k_format, v_format));
        let error = Decoder::new_blocking(Arc::clone(&model), options).unwrap_err().to_string();
        assert!(error.contains("v_format: got"), "{error}");
    }
}

/// What a model of a checkpoint is changed in: its settings, or where its weights come from.
type Change = (&'static str, fn(&mut ModelConfig, &mut ModelWeights));

fn each_kind(config: &mut ModelConfig, change: fn(&mut LayerKind)) {
    let kinds = (0..config.num_layers).map(|layer| {
        let mut kind = config.layers.kind(layer).clone();
        change(&mut kind);
        kind
    });
    config.layers = LayerPattern::repeated(kinds.collect::<Vec<_>>()).unwrap();
}

/// Without one of its settings a model computes something else: the fixtures would notice if the decoder ignored it.
#[test]
fn every_setting_matters() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let window: Change = ("window", |config, _| each_kind(config, |kind| kind.window = None));
    let window_everywhere: Change =
        ("layers without window", |config, _| each_kind(config, |kind| kind.window = Some(12)));
    let rope: Change = ("layers without rope", |config, _| {
        let rope = config.layers.kind(0).rope.clone();
        let windows =
            (0..config.num_layers).map(|layer| LayerKind::new(rope.clone(), config.layers.kind(layer).window));
        config.layers = LayerPattern::repeated(windows.collect::<Vec<_>>()).unwrap();
    });
    let post_norms: Change = ("norms of what is added", |_, weights| {
        weights.layers.iter_mut().for_each(|layer| (layer.post_attn_norm, layer.post_mlp_norm) = (None, None));
    });
    let scale: Change = ("scale of attention", |config, _| config.softmax_scale = None);
    let cap: Change = ("soft cap of attention", |config, _| config.attention_softcap = None);
    let head_cap: Change = ("soft cap of the head", |config, _| config.logit_softcap = None);
    let embedding: Change = ("scale of the embedding", |config, _| config.embedding_scale = None);
    let offset: Change = ("offset of norms", |config, _| config.norm.weight_offset = 0.0);
    let qk_norm: Change = ("norms of queries and keys", |config, weights| {
        config.qk_norm = None;
        weights.layers.iter_mut().for_each(|layer| (layer.q_norm, layer.k_norm) = (None, None));
    });
    let long: Change = ("long factors", |config, _| {
        let long = config.long_context.clone().unwrap();
        config.layers = long.layers;
    });
    let partial: Change = ("factors and dimensions that are not rotated", |config, _| {
        let rope = RopeConfig::new(config.head_dim, 10_000.0);
        let window = config.layers.kind(0).window;
        config.layers = LayerPattern::uniform(LayerKind::new(Some(rope), window));
    });
    let pairs: Change = ("pairs that turn together", |config, _| {
        each_kind(config, |kind| {
            let rope = kind.rope.as_mut().unwrap();
            rope.layout = match rope.layout {
                RopeLayout::HalfSplit => RopeLayout::Interleaved,
                RopeLayout::Interleaved => RopeLayout::HalfSplit,
            };
        });
    });
    let scaling: Change = ("scaling of the rotation", |config, _| {
        each_kind(config, |kind| kind.rope.as_mut().unwrap().scaling = RopeScaling::None);
    });
    let factor: Change = ("YaRN's factor of logits", |config, _| {
        config.softmax_scale = Some(1.0 / (config.head_dim as f32).sqrt());
    });
    let latent_eps: Change = ("epsilon of latents", |config, _| config.latent.as_mut().unwrap().norm_eps = 0.05);
    let latent_norms: Change = ("the right norms of latents", |_, weights| {
        let norms: Vec<_> = weights.layers.iter().map(|layer| (layer.q_norm.clone(), layer.k_norm.clone())).collect();
        for (layer, (q, k)) in weights.layers.iter_mut().zip(norms.into_iter().rev()) {
            (layer.q_norm, layer.k_norm) = (q, k);
        }
    });
    let latent_biases: Change = ("biases of latents", |_, weights| {
        for layer in &mut weights.layers {
            layer.k.bias = None;
            layer.q_latent.as_mut().unwrap().bias = None;
        }
    });
    let sinks: Change = ("sinks", |config, weights| {
        config.attention_sinks = false;
        weights.layers.iter_mut().for_each(|layer| layer.sinks = None);
    });
    let sum: Change = ("sum of the experts' weights", |config, _| {
        let router = &mut config.experts.as_mut().unwrap().router;
        router.renormalise = !router.renormalise;
    });
    let fewer: Change = ("one of the experts", |config, _| {
        config.experts.as_mut().unwrap().router.experts.per_row -= 1;
    });
    let activation: Change =
        ("the clamped activation", |config, _| config.experts.as_mut().unwrap().activation = config.activation);
    let scale_of_experts: Change = ("scale of the experts' weights", |config, _| {
        config.experts.as_mut().unwrap().router.scale = Factor::ONE;
    });
    let groups: Change = ("groups of experts", |config, _| config.experts.as_mut().unwrap().router.groups = None);
    let correction: Change = ("corrections", |config, weights| {
        config.experts.as_mut().unwrap().router.correction = false;
        weights.layers.iter_mut().for_each(|layer| layer.correction = None);
    });
    let shared: Change = ("the expert of all tokens", |config, weights| {
        config.experts.as_mut().unwrap().shared_size = None;
        weights.layers.iter_mut().for_each(|layer| layer.shared = None);
    });
    let bias: Change = ("biases of experts", |_, weights| {
        let linears = weights.layers.iter_mut().flat_map(|layer| [&mut layer.gate_up, &mut layer.down]);
        linears.for_each(|linear| linear.bias = None);
    });
    let same: Change = ("nothing", |_, _| ());
    let cases: [(&str, &[Change]); 18] = [
        ("deepseek_v2", &[pairs, scaling, factor, latent_eps, latent_norms]),
        ("deepseek_v3", &[pairs, scale, latent_eps, latent_norms, latent_biases]),
        ("deepseek_v3_half_split", &[pairs, scale, latent_norms]),
        ("deepseek_v2_experts", &[sum, fewer, scale_of_experts, groups, shared]),
        ("deepseek_v3_experts", &[sum, fewer, scale_of_experts, groups, correction, shared]),
        ("mistral", &[window]),
        ("phi3", &[window, long, partial]),
        ("smollm3", &[window, window_everywhere, rope]),
        ("olmo2", &[post_norms, qk_norm]),
        ("gemma2", &[window, window_everywhere, post_norms, scale, cap, head_cap, embedding, offset]),
        ("gemma3", &[window, window_everywhere, rope, post_norms, scale, embedding, offset, qk_norm]),
        ("gemma3_older", &[rope, head_cap]),
        ("mixtral", &[sum, fewer]),
        ("mixtral_packed", &[window, fewer]),
        ("qwen3_moe", &[sum, fewer, qk_norm]),
        ("qwen3_moe_sparse", &[sum, fewer]),
        ("dots1", &[sum, fewer, scale_of_experts, groups, correction, shared]),
        ("gpt_oss", &[window, window_everywhere, sinks, sum, fewer, activation, bias]),
    ];
    for (name, changes) in cases {
        let expected = Expected::load(name);
        let checkpoint = Checkpoint::open(fixtures().join(name)).unwrap();
        for (what, change) in [&same].into_iter().chain(changes) {
            let (mut config, mut weights) = (config(&checkpoint), checkpoint.weights().unwrap());
            change(&mut config, &mut weights);
            let options = ModelOptions::new(WeightFormat::F32);
            let model = Model::from_source_blocking(&gpu, config, &weights, &checkpoint, options, |_| {}).unwrap();
            let mut decoder = decoder(&Arc::new(model), KvFormat::F32, 256);
            let deviation = expected.deviation(&logits(&mut decoder, &expected.sequences, usize::MAX));
            println!("{name} without {what}: {deviation:.1e}");
            // Fifty times what would still pass.
            let passes = if *what == "nothing" { deviation < TOLERANCE } else { deviation > 50.0 * TOLERANCE };
            assert!(passes, "{name} without {what}: {deviation:.1e} of the spread");
        }
    }
}

//! A decoder in f64 from loaded parameters, against the logits that transformers computed from the same files: what the configuration says and
//! how projections are taken apart means what Hugging Face means by it. Plain loops, no kernel, no cache.

use std::path::Path;

use folio::model::{
    ActivationKind, Checkpoint, LinearWeights, ModelConfig, NormKind, NormWeights, QkNorm, TensorSource,
};
use folio::{RopeConfig, RopeLayout, RopeScaling};
use safetensors::SafeTensors;

struct Linear {
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
    columns: usize,
}

struct Norm {
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
}

fn read(checkpoint: &Checkpoint, source: &TensorSource) -> Vec<f64> {
    let mut out = vec![0.0; source.shape().iter().product()];
    checkpoint.rows(source, 0, &mut out).unwrap();
    out.into_iter().map(f64::from).collect()
}

fn linear(checkpoint: &Checkpoint, source: &LinearWeights) -> Linear {
    let weight = read(checkpoint, &source.weight);
    let bias = source.bias.as_ref().map(|bias| read(checkpoint, bias));
    Linear { weight, bias, columns: source.weight.shape()[1] }
}

fn norm(checkpoint: &Checkpoint, source: &NormWeights) -> Norm {
    let offset = f64::from(checkpoint.config().norm.weight_offset);
    let weight = read(checkpoint, &source.weight).into_iter().map(|weight| weight + offset).collect();
    Norm { weight, bias: source.bias.as_ref().map(|bias| read(checkpoint, bias)) }
}

impl Linear {
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let rows = self.weight.chunks(self.columns).enumerate();
        rows.map(|(i, row)| dot(row, x) + self.bias.as_ref().map_or(0.0, |bias| bias[i])).collect()
    }
}

/// What is there if there is no norm.
fn normed(norm: &Option<Norm>, config: &ModelConfig, x: &[f64]) -> Vec<f64> {
    norm.as_ref().map_or_else(|| x.to_vec(), |norm| norm.apply(config, x))
}

impl Norm {
    fn apply(&self, config: &ModelConfig, x: &[f64]) -> Vec<f64> {
        let mean = match config.norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => x.iter().sum::<f64>() / x.len() as f64,
        };
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (variance + f64::from(config.norm.eps)).sqrt();
        let bias = |i: usize| self.bias.as_ref().map_or(0.0, |bias| bias[i]);
        x.iter().enumerate().map(|(i, x)| (x - mean) * scale * self.weight[i] + bias(i)).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// By its series with positive terms only, which doesn't cancel.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..400 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    if x.abs() > 6.0 { x.signum() } else { 2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum }
}

fn activate(activation: ActivationKind, x: f64) -> f64 {
    match activation {
        ActivationKind::Silu => x / (1.0 + (-x).exp()),
        ActivationKind::Gelu => x / 2.0 * (1.0 + erf(x / 2f64.sqrt())),
        ActivationKind::GeluTanh => {
            x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        ActivationKind::Relu => x.max(0.0),
        ActivationKind::ClampedSwiglu { .. } => panic!("an activation of experts, which are no part of this test"),
    }
}

/// Frequencies of the pairs, and the factor of cosine and sine, from the papers' formulas.
fn frequencies(rope: &RopeConfig) -> (Vec<f64>, f64) {
    let tau = std::f64::consts::TAU;
    let dim = f64::from(rope.rotary_dim);
    let plain: Vec<f64> = (0..rope.rotary_dim / 2).map(|i| rope.theta.powf(f64::from(2 * i) / -dim)).collect();
    match rope.scaling.clone() {
        RopeScaling::None => (plain, 1.0),
        RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
        RopeScaling::Yarn {
            factor, original_max_position, beta_fast, beta_slow, attention_factor, truncate, ..
        } => {
            let length = f64::from(original_max_position);
            // The pair that turns `rotations` times within the original context.
            let pair = |rotations: f64| dim * (length / (rotations * tau)).ln() / (2.0 * rope.theta.ln());
            let (low, high) = (pair(beta_fast), pair(beta_slow));
            let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, high) = (low.max(0.0), high.min(dim - 1.0));
            let high = if low == high { high + 0.001 } else { high };
            let mixed = plain.iter().enumerate().map(|(i, f)| {
                let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f / factor * interpolated + f * (1.0 - interpolated)
            });
            (mixed.collect(), attention_factor.unwrap_or(0.1 * factor.ln() + 1.0))
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            let scaled = plain.iter().map(|f| {
                let rotations = f64::from(original_max_position) * f / tau;
                let kept = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                f / factor * (1.0 - kept) + f * kept
            });
            (scaled.collect(), 1.0)
        }
        // The list itself is checked where it is read: `longrope_of_files`.
        RopeScaling::Custom { inverse_frequencies, attention_factor } => (inverse_frequencies, attention_factor),
        other => panic!("not made by a configuration: {other:?}"),
    }
}

fn rotate(rope: &RopeConfig, position: usize, head: &mut [f64]) {
    assert_eq!(rope.layout, RopeLayout::HalfSplit);
    let (frequencies, scale) = frequencies(rope);
    let half = frequencies.len();
    for (i, frequency) in frequencies.iter().enumerate() {
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = (a * cos - b * sin) * scale;
        head[i + half] = (b * cos + a * sin) * scale;
    }
}

/// Logits after each token of a sequence.
fn forward(checkpoint: &Checkpoint, config: &ModelConfig, tokens: &[usize]) -> Vec<Vec<f64>> {
    let weights = checkpoint.weights().unwrap();
    let (hidden, head_dim) = (config.hidden_size as usize, config.head_dim as usize);
    let group = config.num_q_heads / config.num_kv_heads;
    let embedding = read(checkpoint, &weights.embedding);
    let mut rows: Vec<Vec<f64>> = tokens.iter().map(|t| embedding[t * hidden..][..hidden].to_vec()).collect();
    if let Some(scale) = config.embedding_scale {
        rows.iter_mut().flatten().for_each(|x| *x *= f64::from(scale));
    }
    if let Some(source) = &weights.position_embedding {
        let positions = read(checkpoint, source);
        rows.iter_mut().zip(positions.chunks(hidden)).for_each(|(row, position)| add(row, position));
    }
    let softmax_scale = config.softmax_scale.map_or(1.0 / (head_dim as f64).sqrt(), f64::from);
    let softcap = |cap: Option<f32>, x: f64| cap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh());
    for (kind, layer) in (0..).map(|i| config.layers.kind(i)).zip(&weights.layers) {
        let norms = [&layer.attn_norm, &layer.post_attn_norm, &layer.mlp_norm, &layer.post_mlp_norm];
        let [attn_norm, post_attn_norm, mlp_norm, post_mlp_norm] =
            norms.map(|source| source.as_ref().map(|source| norm(checkpoint, source)));
        let [q, k, v, o] = [&layer.q, &layer.k, &layer.v, &layer.o].map(|l| linear(checkpoint, l));
        let [q_norm, k_norm] = [&layer.q_norm, &layer.k_norm].map(|n| n.as_ref().map(|n| norm(checkpoint, n)));
        let heads = |projection: &Linear, norm: &Option<Norm>, position: usize, x: &[f64]| -> Vec<Vec<f64>> {
            let mut heads = projection.apply(x);
            let over = if config.qk_norm == Some(QkNorm::AllHeads) { heads.len() } else { head_dim };
            heads = heads.chunks(over).flat_map(|x| normed(norm, config, x)).collect();
            let heads = heads.chunks(head_dim).map(|head| {
                let mut head = head.to_vec();
                if let Some(rope) = &kind.rope {
                    rotate(rope, position, &mut head);
                }
                head
            });
            heads.collect()
        };
        let inputs: Vec<_> = rows.iter().map(|row| normed(&attn_norm, config, row)).collect();
        let keys: Vec<_> = inputs.iter().enumerate().map(|(i, x)| heads(&k, &k_norm, i, x)).collect();
        let values: Vec<_> = inputs.iter().map(|x| v.apply(x)).collect();
        let [gate_up, down] = [&layer.gate_up, &layer.down].map(|l| linear(checkpoint, l));
        for (i, row) in rows.iter_mut().enumerate() {
            let mut attended = Vec::new();
            let first = kind.window.map_or(0, |window| (i + 1).saturating_sub(window as usize));
            for (h, query) in heads(&q, &q_norm, i, &inputs[i]).iter().enumerate() {
                let kv = h / group as usize;
                let logit = |j: usize| softcap(config.attention_softcap, dot(query, &keys[j][kv]) * softmax_scale);
                let scores: Vec<_> = (first..=i).map(|j| logit(j).exp()).collect();
                let sum: f64 = scores.iter().sum();
                attended.extend((0..head_dim).map(|d| {
                    let value = |j: usize| values[first + j][kv * head_dim + d];
                    scores.iter().enumerate().map(|(j, score)| score / sum * value(j)).sum::<f64>()
                }));
            }
            let attended = normed(&post_attn_norm, config, &o.apply(&attended));
            let mlp = |x: &[f64]| {
                let mut inner = gate_up.apply(&normed(&mlp_norm, config, x));
                if config.gated_mlp {
                    let up = inner.split_off(config.intermediate_size as usize);
                    inner.iter_mut().zip(up).for_each(|(gate, up)| *gate = activate(config.activation, *gate) * up);
                } else {
                    inner.iter_mut().for_each(|x| *x = activate(config.activation, *x));
                }
                normed(&post_mlp_norm, config, &down.apply(&inner))
            };
            if config.parallel_residual {
                let mlp = mlp(row);
                add(row, &mlp);
                add(row, &attended);
            } else {
                add(row, &attended);
                let mlp = mlp(row);
                add(row, &mlp);
            }
        }
    }
    let final_norm = norm(checkpoint, &weights.final_norm);
    let head = match &weights.head {
        Some(head) => linear(checkpoint, head),
        None => Linear { weight: embedding, bias: None, columns: hidden },
    };
    let logits = |row: &Vec<f64>| head.apply(&final_norm.apply(config, row));
    rows.iter().map(|row| logits(row).into_iter().map(|x| softcap(config.logit_softcap, x)).collect()).collect()
}

#[test]
fn the_logits_are_those_of_transformers() {
    // They were computed in f64 and rounded to f32: half an ulp of a logit below 8 is 2.4e-7, which is what is measured. The rest is room for
    // another order of the sums.
    const TOLERANCE: f64 = 1e-6;
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let mut seen = 0;
    for entry in std::fs::read_dir(models).unwrap() {
        let path = entry.unwrap().path();
        let Ok(bytes) = std::fs::read(path.join("expected.safetensors")) else { continue };
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<[u8; 4]> { expected.tensor(name).unwrap().data().as_chunks().0.to_vec() };
        let ints = |name: &str| words(name).into_iter().map(|w| u32::from_le_bytes(w) as usize).collect::<Vec<_>>();
        let (tokens, lengths) = (ints("tokens"), ints("lengths"));
        let logits: Vec<_> = words("logits").into_iter().map(f32::from_le_bytes).collect();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let config = crate::parity::config(&checkpoint);
        // (This forward pass knows neither latents nor experts; models with them are compared by parity.rs.)
        if config.latent.is_some() || config.experts.is_some() {
            continue;
        }
        let vocab = config.vocab_size as usize;
        let (mut start, mut worst, mut largest) = (0, (0.0, 0, 0), 0f64);
        for length in lengths {
            for (i, row) in forward(&checkpoint, &config, &tokens[start..start + length]).iter().enumerate() {
                for (j, got) in row.iter().enumerate() {
                    let want = f64::from(logits[(start + i) * vocab + j]);
                    largest = largest.max(want.abs());
                    let error = (got - want).abs();
                    if error > worst.0 || error.is_nan() {
                        worst = (error, start + i, j);
                    }
                }
            }
            start += length;
        }
        assert_eq!(start * vocab, logits.len());
        assert!(
            largest < 10.0 && worst.0 <= TOLERANCE,
            "{}: worst {worst:?} (error, row, token) of logits up to {largest}",
            path.display()
        );
        seen += 1;
    }
    assert!(seen >= 5, "{seen} models with expected logits");
}

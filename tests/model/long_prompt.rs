//! A prompt of 32 768 tokens in one call of a decoder, against a forward pass of the same model in f64.

use std::sync::Arc;

use folio::model::{
    Decoder, DecoderOptions, Input, LogitRows, Model, ModelConfig, ModelOptions, ModelResult, Sampling, TensorSource,
    WeightFormat, WeightSource,
};
use folio::{Error, Gpu, KvFormat};

use crate::adapter;
use crate::common::with;

const LEN: usize = 32_768;
const VOCAB: usize = 32;
const HIDDEN: usize = 32;
const INNER: usize = 48;
const HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const THETA: f64 = 1e6;
const EPS: f64 = 1e-6;

/// Weights by the name of their tensor: small multiples of a power of two, the same for everyone who asks.
struct Weights;

impl Weights {
    fn row(tensor: &str, row: usize, columns: usize) -> Vec<f32> {
        let seed =
            tensor.bytes().fold(7 + row as u64, |hash: u64, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let mut rng = fastrand::Rng::with_seed(seed);
        // Queries and keys of some size: attention is neither uniform nor fixed on one key then.
        let scale = if tensor.contains("q_proj") || tensor.contains("k_proj") { 128.0 } else { 256.0 };
        let center = if columns == 1 { 1.0 } else { 0.0 };
        (0..columns).map(|_| center + f32::from(rng.i8(-100..=100)) / scale).collect()
    }

    fn matrix(tensor: &str, rows: usize, columns: usize) -> Vec<Vec<f64>> {
        (0..rows).map(|row| Self::row(tensor, row, columns).into_iter().map(f64::from).collect()).collect()
    }

    fn vector(tensor: &str, len: usize) -> Vec<f64> {
        (0..len).map(|row| f64::from(Self::row(tensor, row, 1)[0])).collect()
    }
}

impl WeightSource for Weights {
    fn rows(&self, source: &TensorSource, row_start: usize, out: &mut [f32]) -> ModelResult<()> {
        let [_, columns] = source.shape();
        // Rows of gate and up are those of two tensors; each of the others is one.
        for (i, row) in out.chunks_mut(columns).enumerate() {
            let at = row_start + i;
            let (piece, at) = if source.pieces().len() == 2 { (at / INNER, at % INNER) } else { (0, at) };
            row.copy_from_slice(&Self::row(source.pieces()[piece].tensor(), at, columns));
        }
        Ok(())
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn multiply(matrix: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    matrix.iter().map(|row| dot(row, x)).collect()
}

fn normed(x: &[f64], weights: &[f64]) -> Vec<f64> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + EPS).sqrt();
    x.iter().zip(weights).map(|(x, w)| x * scale * w).collect()
}

/// Elements `i` and `i + HEAD_DIM / 2` turn together.
fn rotated(head: &[f64], position: usize) -> Vec<f64> {
    let half = HEAD_DIM / 2;
    let mut out = head.to_vec();
    for i in 0..half {
        let angle = position as f64 * THETA.powf(-2.0 * i as f64 / HEAD_DIM as f64);
        let (sin, cos) = angle.sin_cos();
        (out[i], out[i + half]) = (head[i] * cos - head[i + half] * sin, head[i + half] * cos + head[i] * sin);
    }
    out
}

/// The model in f64: keys and values of all tokens, and then the logits of any of them. One layer, so that no row needs the results of another.
struct Reference {
    text: Vec<u32>,
    embedding: Vec<Vec<f64>>,
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

impl Reference {
    fn new(text: &[u32]) -> Self {
        let embedding = Weights::matrix("model.embed_tokens.weight", VOCAB, HIDDEN);
        let norm = Weights::vector("model.layers.0.input_layernorm.weight", HIDDEN);
        let [k, v] = ["k", "v"].map(|name| {
            let tensor = format!("model.layers.0.self_attn.{name}_proj.weight");
            let matrix = Weights::matrix(&tensor, HEAD_DIM, HIDDEN);
            // Before rotation they depend on the token only.
            embedding.iter().map(|x| multiply(&matrix, &normed(x, &norm))).collect::<Vec<_>>()
        });
        let keys = text.iter().enumerate().map(|(position, &id)| rotated(&k[id as usize], position)).collect();
        let values = text.iter().map(|&id| v[id as usize].clone()).collect();
        Self { text: text.to_vec(), embedding, keys, values }
    }

    fn logits(&self, row: usize) -> Vec<f64> {
        let layer = |name: &str| format!("model.layers.0.{name}.weight");
        let mut hidden = self.embedding[self.text[row] as usize].clone();
        let x = normed(&hidden, &Weights::vector(&layer("input_layernorm"), HIDDEN));
        let q = multiply(&Weights::matrix(&layer("self_attn.q_proj"), HEADS * HEAD_DIM, HIDDEN), &x);
        let mut attended = Vec::new();
        for head in q.chunks(HEAD_DIM) {
            let q = rotated(head, row);
            let logits: Vec<f64> = self.keys[..=row].iter().map(|k| dot(&q, k) / (HEAD_DIM as f64).sqrt()).collect();
            let largest = logits.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = logits.iter().map(|logit| (logit - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            attended.extend((0..HEAD_DIM).map(|i| {
                self.values.iter().zip(&weights).map(|(value, weight)| value[i] * weight).sum::<f64>() / total
            }));
        }
        let add = |hidden: &mut Vec<f64>, more: Vec<f64>| hidden.iter_mut().zip(more).for_each(|(h, x)| *h += x);
        add(&mut hidden, multiply(&Weights::matrix(&layer("self_attn.o_proj"), HIDDEN, HEADS * HEAD_DIM), &attended));
        let x = normed(&hidden, &Weights::vector(&layer("post_attention_layernorm"), HIDDEN));
        let [gate, up] = ["gate", "up"]
            .map(|name| multiply(&Weights::matrix(&layer(&format!("mlp.{name}_proj")), INNER, HIDDEN), &x));
        let inner: Vec<f64> = gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
        add(&mut hidden, multiply(&Weights::matrix(&layer("mlp.down_proj"), HIDDEN, INNER), &inner));
        let x = normed(&hidden, &Weights::vector("model.norm.weight", HIDDEN));
        multiply(&Weights::matrix("lm_head.weight", VOCAB, HIDDEN), &x)
    }
}

fn model(gpu: &Gpu) -> Arc<Model> {
    let config = ModelConfig::from_json(&format!(
        r#"{{"model_type": "llama", "hidden_size": {HIDDEN}, "num_hidden_layers": 1, "num_attention_heads": {HEADS},
            "num_key_value_heads": 1, "head_dim": {HEAD_DIM}, "intermediate_size": {INNER}, "vocab_size": {VOCAB},
            "max_position_embeddings": {LEN}, "rope_theta": {THETA}, "rms_norm_eps": {EPS}}}"#
    ))
    .unwrap();
    let weights = config.weights().unwrap();
    let options = ModelOptions::new(WeightFormat::F32);
    Arc::new(Model::from_source_blocking(gpu, config, &weights, &Weights, options, |_| {}).unwrap())
}

fn decoder(model: &Arc<Model>, num_blocks: u32, max_step_tokens: u32) -> Decoder {
    let options = with(DecoderOptions::default(), |o| {
        (o.num_blocks, o.block_size, o.max_step_tokens) = (num_blocks, 64, max_step_tokens);
        (o.k_format, o.v_format) = (KvFormat::F32, KvFormat::F32);
    });
    Decoder::new_blocking(Arc::clone(model), options).unwrap()
}

fn text() -> Vec<u32> {
    let mut rng = fastrand::Rng::with_seed(11);
    (0..LEN).map(|_| rng.u32(..VOCAB as u32)).collect()
}

#[test]
fn logits_and_next_token_are_those_of_the_reference() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let (model, text) = (model(&gpu), text());
    let blocks = (LEN / 64) as u32;
    let reference = Reference::new(&text);
    let mut long = decoder(&model, blocks, 4096);
    let sequence = long.create_sequence();
    let logits = gpu.block_on(long.logits(&[(sequence, &text)], LogitRows::All)).unwrap().remove(0);
    assert_eq!(logits.len(), LEN * VOCAB);
    // Rows at the ends of steps, splits and blocks, and any others.
    let mut rng = fastrand::Rng::with_seed(12);
    let mut rows = vec![0, 1, 63, 64, 1023, 1024, 4095, 4096, 16_383, 20_480, LEN - 2, LEN - 1];
    rows.extend((0..12).map(|_| rng.usize(..LEN)));
    let mut worst = 0.0_f64;
    for &row in &rows {
        let want = reference.logits(row);
        // Attention's logits reach some tens here, so that f32 rounds them, and with them the weights of keys, by some 1e-5: measured are 6e-5 after
        // the norms and the MLP, which enlarge it.
        for (got, want) in logits[row * VOCAB..][..VOCAB].iter().zip(want) {
            let error = (f64::from(*got) - want).abs();
            // (`max` would let a NaN pass.)
            worst = if error > worst || error.is_nan() { error } else { worst };
            assert!(error < 2e-4, "row {row}: {got}, not {want}");
        }
    }
    println!("{} rows of {LEN}, the worst logit is off by {worst:.1e}", rows.len());

    // In one step more than there are chunks above, and from a cache without a block to spare.
    let mut short = decoder(&model, blocks, 1500);
    let sequence = short.create_sequence();
    let greedy = Sampling::greedy();
    let next = gpu.block_on(short.step(&[Input::new(sequence, &text).with_sampling(&greedy)])).unwrap()[0].unwrap();
    let mut best = reference.logits(LEN - 1).into_iter().enumerate().collect::<Vec<_>>();
    best.sort_by(|a, b| b.1.total_cmp(&a.1));
    assert!(best[0].1 - best[1].1 > 1e-3, "two tokens are about as likely: {:?}", &best[..2]);
    assert_eq!(next as usize, best[0].0);
}

/// One block too few: an error, before anything is computed, and the sequence is as it was.
#[test]
fn a_cache_without_room_is_refused_first() {
    if adapter::open(adapter::DEFAULT).is_none() {
        return;
    }
    // A device that no other test records on.
    let gpu = Gpu::open_blocking(adapter::options(adapter::DEFAULT)).unwrap();
    let (model, text) = (model(&gpu), text());
    let blocks = (LEN / 64) as u32;
    let mut decoder = decoder(&model, blocks - 1, 4096);
    let sequence = decoder.create_sequence();
    #[cfg(feature = "counters")]
    let before = gpu.num_dispatches();
    let error = gpu.block_on(decoder.logits(&[(sequence, &text)], LogitRows::Last)).unwrap_err();
    #[cfg(feature = "counters")]
    assert_eq!(gpu.num_dispatches(), before, "something was computed");
    let folio::model::ModelError::Folio(error) = error else { panic!("{error}") };
    assert!(matches!(error, Error::OutOfBlocks { .. }), "{error}");
    assert_eq!((decoder.usage().used, decoder.tokens(sequence).unwrap().len()), (0, 0));
    // What fits is computed as ever.
    gpu.block_on(decoder.logits(&[(sequence, &text[..100])], LogitRows::Last)).unwrap();
    assert_eq!(decoder.tokens(sequence).unwrap().len(), 100);
}

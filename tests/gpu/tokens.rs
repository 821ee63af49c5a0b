//! Tokens whose K and V rows follow from a number, so that a test can say what a cache holds.

use folio::wgpu;
use folio::{KvCache, KvCacheConfig, KvFormat, KvRows, SequenceId, Step};

use crate::case::upload;

/// Small blocks of few bytes. Token rows are whole numbers up to 2048, which both formats hold exactly.
pub(crate) const SHAPE: KvCacheConfig =
    KvCacheConfig::new(2, 2, 8).with_blocks(16, 4).with_formats(KvFormat::F32, KvFormat::F16);

/// The rows of tokens in a layer.
pub(crate) fn rows(config: &KvCacheConfig, layer: u32, tokens: &[u32]) -> KvRows {
    let elements = config.num_kv_heads * config.head_dim;
    let side = |token_step: u32, layer_step: u32| -> Vec<f32> {
        let element = |token: u32, i: u32| ((token * token_step + layer * layer_step + i * 3) % 2048 + 1) as f32;
        tokens.iter().flat_map(|&token| (0..elements).map(move |i| element(token, i))).collect()
    };
    KvRows { k: side(31, 7), v: side(17, 11).into_iter().map(|x| -x).collect() }
}

/// Records the append of a step's tokens in every layer.
pub(crate) fn record(cache: &KvCache, encoder: &mut wgpu::CommandEncoder, step: &Step, tokens: &[u32]) {
    for layer in 0..cache.config().num_layers {
        let rows = rows(cache.config(), layer, tokens);
        let (k, v) = (upload(cache.gpu(), &rows.k), upload(cache.gpu(), &rows.v));
        cache.append(&mut *encoder, step, layer, &k, &v, None).expect("append");
    }
}

pub(crate) fn encoder(cache: &KvCache) -> wgpu::CommandEncoder {
    cache.gpu().device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
}

/// [`record`] and submit.
pub(crate) fn run(cache: &KvCache, step: &Step, tokens: &[u32]) {
    let mut encoder = encoder(cache);
    record(cache, &mut encoder, step, tokens);
    cache.gpu().queue().submit([encoder.finish()]);
}

pub(crate) fn begin(cache: &KvCache, batch: &[(SequenceId, &[u32])]) -> Step {
    let lens: Vec<_> = batch.iter().map(|&(sequence, tokens)| (sequence, tokens.len() as u32)).collect();
    cache.begin_step(&lens).expect("step")
}

/// Appends tokens in one step.
pub(crate) fn grow(cache: &KvCache, batch: &[(SequenceId, &[u32])]) {
    let step = begin(cache, batch);
    run(cache, &step, &batch.iter().flat_map(|&(_, tokens)| tokens).copied().collect::<Vec<_>>());
    cache.commit(step).expect("commit");
}

/// A new sequence of these tokens.
pub(crate) fn sequence(cache: &KvCache, tokens: &[u32]) -> SequenceId {
    let sequence = cache.create_sequence();
    grow(cache, &[(sequence, tokens)]);
    sequence
}

/// Reads the sequence back and compares it, in every layer.
#[track_caller]
pub(crate) fn assert_holds(cache: &KvCache, sequence: SequenceId, tokens: &[u32]) {
    assert_eq!(cache.seq_len(sequence).expect("length"), tokens.len() as u32, "{sequence}");
    for layer in 0..cache.config().num_layers {
        let got = cache.gather_blocking(sequence, layer).expect("gather");
        let want = rows(cache.config(), layer, tokens);
        assert!(got == want, "{sequence}, layer {layer}, tokens {tokens:?}:\n got {got:?}\nwant {want:?}");
    }
}

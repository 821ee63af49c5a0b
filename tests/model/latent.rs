//! A decoder whose cache holds latents: the life of a sequence, and exact models.

use std::sync::Arc;

use folio::model::{Decoder, Input, LogitRows, Model, ModelOptions, Prompt, Sampling, WeightFormat};
use folio::{KvCacheConfig, KvFormat};

use crate::adapter::{self, Open};
use crate::common::with;
use crate::decoder::{fixture, generate, small, tokens};

const MODEL: &str = "deepseek_v3";

fn decoder(how: Open, weights: WeightFormat, format: KvFormat, exact: bool) -> Option<Decoder> {
    let gpu = adapter::open(how)?;
    let options = ModelOptions::new(weights).with_exact(exact);
    let model = Model::load_blocking(&gpu, fixture(MODEL), options, |_| {}).unwrap();
    let options = with(small(64), |o| (o.k_format, o.v_format) = (format, format));
    Some(Decoder::new_blocking(Arc::new(model), options).unwrap())
}

/// What is cached of a token is its latent and the rotated part of its key, whatever the number of heads.
#[test]
fn a_token_takes_one_row_per_layer() {
    let Some(decoder) = decoder(adapter::DEFAULT, WeightFormat::F32, KvFormat::F16, false) else { return };
    let want = KvCacheConfig::latent(2, 40, 32).with_blocks(64, 16);
    assert_eq!(decoder.cache().config(), &want);
    assert_eq!(decoder.bytes_per_token(), 2 * 40 * 2);
}

/// Forks, roll-backs, a trip to the host and one to a file: each goes on as a sequence does that was left alone.
#[test]
fn sequences_continue_as_if_alone() {
    for format in [KvFormat::F32, KvFormat::Int8] {
        let Some(mut decoder) = decoder(adapter::DEFAULT, WeightFormat::F32, format, false) else { return };
        let gpu = decoder.gpu().clone();
        let prompt = tokens(21, 1);
        let (last, shared) = prompt.split_last().unwrap();
        let greedy = |sequence, tokens| Prompt { sequence, tokens, sampling: Sampling::greedy() };
        let alone = decoder.create_sequence();
        let expected = generate(&mut decoder, &[greedy(alone, &prompt)], 8);

        let base = decoder.create_sequence();
        gpu.block_on(decoder.step(&[Input::new(base, shared)])).unwrap();
        let fork = decoder.fork(base).unwrap();
        let last = std::slice::from_ref(last);
        let other = tokens(3, 9);
        assert_eq!(generate(&mut decoder, &[greedy(base, last), greedy(fork, &other)], 8)[0], expected[0]);
        decoder.truncate(fork, shared.len() as u32).unwrap();
        gpu.block_on(decoder.swap_out(fork)).unwrap();
        gpu.block_on(decoder.swap_in(fork)).unwrap();
        let file = tempfile::tempdir().unwrap();
        let path = file.path().join("text");
        gpu.block_on(decoder.save(fork, &path)).unwrap();
        let loaded = gpu.block_on(decoder.load(&path)).unwrap();
        assert_eq!(generate(&mut decoder, &[greedy(fork, last)], 8)[0], expected[0], "{format}");
        assert_eq!(generate(&mut decoder, &[greedy(loaded, last)], 8)[0], expected[0], "{format}");
        for sequence in [alone, base, fork, loaded] {
            decoder.free(sequence).unwrap();
        }
        assert_eq!(decoder.usage().used, 0);
    }
}

/// Bits of the logits after a text, whose last token is computed beside those of others.
fn bits(decoder: &mut Decoder, text: &[u32], chunk: usize, company: u32) -> Vec<u32> {
    let gpu = decoder.gpu().clone();
    let (last, before) = text.split_last().unwrap();
    let own = decoder.create_sequence();
    for tokens in before.chunks(chunk) {
        gpu.block_on(decoder.logits(&[(own, tokens)], LogitRows::Last)).unwrap();
    }
    let mut sequences = vec![own];
    for i in 0..company {
        let sequence = decoder.create_sequence();
        gpu.block_on(decoder.logits(&[(sequence, &tokens(3 + 5 * i, i))], LogitRows::Last)).unwrap();
        sequences.push(sequence);
    }
    let batch: Vec<_> = sequences.iter().map(|&sequence| (sequence, std::slice::from_ref(last))).collect();
    let rows = gpu.block_on(decoder.logits(&batch, LogitRows::Last)).unwrap();
    sequences.into_iter().for_each(|sequence| decoder.free(sequence).unwrap());
    rows[0].iter().map(|value| value.to_bits()).collect()
}

#[test]
fn an_exact_model_gives_the_same_bits_alone_and_in_any_batch() {
    let text = tokens(40, 2);
    for (how, weights, format) in [
        (adapter::DEFAULT, WeightFormat::F32, KvFormat::F16),
        (adapter::CPU_PLAIN, WeightFormat::F16, KvFormat::Int8),
        (adapter::GPU, WeightFormat::INT4, KvFormat::F32),
        (adapter::GPU_PLAIN, WeightFormat::INT8, KvFormat::F16),
    ] {
        let Some(mut decoder) = decoder(how, weights, format, true) else { return };
        let alone = bits(&mut decoder, &text, 39, 0);
        for (chunk, company) in [(39, 1), (39, 6), (11, 0), (5, 2), (1, 3)] {
            let got = bits(&mut decoder, &text, chunk, company);
            let differ = alone.iter().zip(&got).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{how:?}, {weights}, {format}: chunks of {chunk}, {company} beside it");
        }
    }
}

//! An exact model: the bits of a sequence's logits don't depend on what runs beside it.

use std::sync::Arc;

use folio::KvFormat;
use folio::model::{Decoder, DecoderOptions, LogitRows, Model, ModelOptions, WeightFormat};

use super::{adapter, prompt, stories};

fn exact_decoder(how: adapter::Open, weights: WeightFormat, format: KvFormat) -> Option<Decoder> {
    let gpu = adapter::open(how)?;
    let model = Model::load_blocking(&gpu, stories(), ModelOptions::new(weights).with_exact(true), |_| {}).unwrap();
    let mut options = DecoderOptions::default();
    (options.num_blocks, options.block_size) = (400, 8);
    (options.k_format, options.v_format) = (format, format);
    Some(Decoder::new_blocking(Arc::new(model), options).unwrap())
}

/// Bits of the logits after `text`, fed up to its last token in chunks of `chunk`; the last one is computed together with those of `company` others.
fn logits(decoder: &mut Decoder, text: &[u32], chunk: usize, company: usize) -> Vec<u32> {
    let gpu = decoder.gpu().clone();
    let (last, before) = text.split_last().unwrap();
    let own = decoder.create_sequence();
    for tokens in before.chunks(chunk) {
        gpu.block_on(decoder.logits(&[(own, tokens)], LogitRows::Last)).unwrap();
    }
    let mut sequences = vec![own];
    for i in 0..company {
        let sequence = decoder.create_sequence();
        // Of other lengths, too.
        let tokens = [&vec![i as u32 + 5; 1 + 7 * i][..], before].concat();
        gpu.block_on(decoder.logits(&[(sequence, &tokens)], LogitRows::Last)).unwrap();
        sequences.push(sequence);
    }
    let batch: Vec<_> = sequences.iter().map(|&sequence| (sequence, std::slice::from_ref(last))).collect();
    let rows = gpu.block_on(decoder.logits(&batch, LogitRows::Last)).unwrap();
    for sequence in sequences {
        decoder.free(sequence).unwrap();
    }
    rows[0].iter().map(|value| value.to_bits()).collect()
}

#[test]
fn logits_have_the_same_bits_alone_and_in_any_batch() {
    let text = prompt("Once upon a time there was a girl named Anna. She had a dog and");
    let cases = [
        (adapter::DEFAULT, WeightFormat::F32, KvFormat::F32),
        (adapter::DEFAULT, WeightFormat::Int8 { group_size: 32 }, KvFormat::F16),
        (adapter::CPU_PLAIN, WeightFormat::F16, KvFormat::F16),
        (adapter::GPU, WeightFormat::F32, KvFormat::F16),
        (adapter::GPU_PLAIN, WeightFormat::F16, KvFormat::F32),
    ];
    for (how, weights, format) in cases {
        let Some(mut decoder) = exact_decoder(how, weights, format) else { return };
        let before = text.len() - 1;
        let alone = logits(&mut decoder, &text, before, 0);
        for company in [1, 2, 3, 7, 15] {
            let bits = logits(&mut decoder, &text, before, company);
            let differ = bits.iter().zip(&alone).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{how:?}, {weights}, {format}: {company} beside it");
        }
        // Chunks of single tokens would take the kernel for those.
        for chunk in [2, 5, 11] {
            assert!(before % chunk != 1);
            let bits = logits(&mut decoder, &text, chunk, 0);
            let differ = bits.iter().zip(&alone).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{how:?}, {weights}, {format}: chunks of {chunk}");
        }
    }
}

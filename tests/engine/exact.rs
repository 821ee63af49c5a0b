//! How far the logits of a request depend on what runs beside it.

use folio::KvFormat;
use folio::model::{Decoder, LogitRows};

use super::{decoder, prompt};

/// Bits of the logits after `text`, whose last token is computed together with those of `company` other sequences.
fn logits(decoder: &mut Decoder, text: &[u32], company: usize) -> Vec<u32> {
    let gpu = decoder.gpu().clone();
    let (last, before) = text.split_last().unwrap();
    let sequences: Vec<_> = (0..=company).map(|_| decoder.create_sequence()).collect();
    for (i, &sequence) in sequences.iter().enumerate() {
        let other = [&[i as u32 + 5][..], before].concat();
        let tokens = if i == 0 { before } else { &other };
        gpu.block_on(decoder.logits(&[(sequence, tokens)], LogitRows::Last)).unwrap();
    }
    let batch: Vec<_> = sequences.iter().map(|&sequence| (sequence, std::slice::from_ref(last))).collect();
    let rows = gpu.block_on(decoder.logits(&batch, LogitRows::Last)).unwrap();
    for sequence in sequences {
        decoder.free(sequence).unwrap();
    }
    rows[0].iter().map(|value| value.to_bits()).collect()
}

#[test]
fn logits_in_company() {
    let Some(mut decoder) = decoder(200, KvFormat::F32, false) else { return };
    let text = prompt("Once upon a time there was a girl named Anna. She had a dog and");
    let alone = logits(&mut decoder, &text, 0);
    let four = logits(&mut decoder, &text, 3);
    for company in [1, 2, 3, 4, 7, 8, 15, 16, 31] {
        let bits = logits(&mut decoder, &text, company);
        let differ = bits.iter().zip(&alone).filter(|(a, b)| a != b).count();
        let differ4 = bits.iter().zip(&four).filter(|(a, b)| a != b).count();
        println!("{company} beside it: {differ} of {} logits differ; from 4: {differ4}", bits.len());
    }
}

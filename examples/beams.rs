//! Beam search: several texts grow side by side from one prompt, the least probable end, and the best is the answer. They share blocks as long as
//! they agree. Greedy decoding takes the most probable token each time and may miss the most probable text.
//!
//! `cargo run --release --features engine --example beams`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use folio::engine::{Engine, EngineOptions, Event, Request};
use folio::model::{Decoder, DecoderOptions, LogitRows, Model, ModelOptions, Tokenizer};
use folio::{Gpu, GpuOptions};

const OPENING: &str = "<|begin|>Once upon a time there was a baker named Mia. Mia came from Willow Hill. One day";
const NEW_TOKENS: u32 = 20;

/// The best text, the most blocks that were used at a time, and the sum of the blocks in the tables of all beams then.
fn search(gpu: &Gpu, engine: &mut Engine, prompt: &[u32], beams: u32) -> Result<(Vec<u32>, u32, u32)> {
    let request = Request::new(prompt.to_vec(), NEW_TOKENS);
    let mut answer = engine.submit(if beams > 1 { request.with_beams(beams) } else { request })?;
    let (mut used, mut tables) = (0, 0);
    while !engine.is_idle() {
        gpu.block_on(engine.step())?;
        let state = engine.inspect();
        let held = state.blocks.iter().filter(|block| block.holders > 0).count() as u32;
        if held >= used {
            (used, tables) = (held, engine.decoder().cache().block_uses().iter().map(|block| block.holders).sum());
        }
    }
    let events = std::iter::from_fn(|| answer.try_next());
    let tokens = events.filter_map(|event| if let Event::Token { token, .. } = event { Some(token) } else { None });
    Ok((tokens.collect(), used, tables))
}

/// The log-probability of `tokens` after `prompt`, by the model itself.
fn log_probability(gpu: &Gpu, decoder: &mut Decoder, prompt: &[u32], tokens: &[u32]) -> Result<f64> {
    let text = [prompt, tokens].concat();
    let sequence = decoder.create_sequence();
    let rows = gpu.block_on(decoder.logits(&[(sequence, &text)], LogitRows::All))?;
    decoder.free(sequence)?;
    let vocab = decoder.model().config().vocab_size as usize;
    let rows: Vec<_> = rows[0].chunks(vocab).skip(prompt.len() - 1).collect();
    let of = |(row, &token): (&&[f32], &u32)| {
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        f64::from(row[token as usize]) - sum.ln()
    };
    Ok(rows.iter().zip(tokens).map(of).sum())
}

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let tokenizer = Tokenizer::from_file(&files)?;
    let model = Arc::new(Model::load_blocking(&gpu, &files, ModelOptions::default(), |_| {})?);
    let mut options = DecoderOptions::default();
    options.block_size = 8;
    let mut scorer = Decoder::new_blocking(model.clone(), options)?;
    let mut engine = Engine::new(Decoder::new_blocking(model, options)?, None, EngineOptions::default())?;
    let prompt = tokenizer.encode(OPENING, false)?;

    println!("{} ...\n", OPENING.trim_start_matches("<|begin|>"));
    println!("beams  log p   blocks  in tables  text");
    let mut scores = Vec::new();
    for beams in [1, 2, 4, 8] {
        let (tokens, used, tables) = search(&gpu, &mut engine, &prompt, beams)?;
        let score = log_probability(&gpu, &mut scorer, &prompt, &tokens)?;
        let text = tokenizer.decode(&tokens, true)?.replace('\n', " ");
        println!("{beams:5} {score:6.2} {used:8} {tables:10}  {}", text.trim());
        ensure!(beams == 1 || used < tables, "beams share blocks");
        scores.push(score);
    }
    let (greedy, best) = (scores[0], scores.iter().copied().fold(f64::NEG_INFINITY, f64::max));
    let times = (best - greedy).exp();
    ensure!(best >= greedy, "a search finds nothing worse here");
    println!("\nthe best text is {times:.1} times as probable as the greedy one");
    scores.last().context("four searches").map(drop)
}

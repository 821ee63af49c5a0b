//! Speculative decoding: a draft guesses what comes next, and one step of the model verifies all guesses. The text is the same as without, in fewer
//! steps. Two who guess: what followed the last words before (prompt lookup), and the same model in 4 bits.
//!
//! `cargo run --release --features engine --example speculative`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use folio::engine::{DraftModel, Engine, EngineOptions, Event, PromptLookup, Request, Usage};
use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, Tokenizer, WeightFormat};
use folio::{Gpu, GpuOptions};

const TEXT: &str = "<|begin|>Once upon a time there was a baker named Mia. Mia came from Willow Hill. Mia loved plum cake. One day Mia hid the silver \
    key under the old bridge. The magic words were amber, fern and moss. The end.\nQuestion: Who was Mia?\nAnswer: Mia was a baker from \
    Willow Hill.\nQuestion: What did Mia love?\nAnswer:";

/// Tokens by step: those that a step brought lie between two bars.
fn run(gpu: &Gpu, engine: &mut Engine, request: &Request) -> Result<(Vec<Vec<u32>>, Usage)> {
    let mut answer = engine.submit(request.clone())?;
    let mut steps = Vec::new();
    loop {
        gpu.block_on(engine.step())?;
        let mut tokens = Vec::new();
        while let Some(event) = answer.try_next() {
            match event {
                Event::Token { token, .. } => tokens.push(token),
                Event::End { usage, .. } => {
                    steps.push(tokens);
                    return Ok((steps, usage));
                }
                _ => {}
            }
        }
        steps.push(tokens);
    }
}

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let tokenizer = Tokenizer::from_file(&files)?;
    let load = |format| Model::load_blocking(&gpu, &files, ModelOptions::new(format), |_| {}).map(Arc::new);
    let (model, small) = (load(WeightFormat::F32)?, load(WeightFormat::INT4)?);
    let engine = || -> Result<Engine> {
        let decoder = Decoder::new_blocking(model.clone(), DecoderOptions::default())?;
        Ok(Engine::new(decoder, Some(tokenizer.clone()), EngineOptions::default())?)
    };
    let draft_model = DraftModel::new(Decoder::new_blocking(small, DecoderOptions::default())?)?;
    let engines = [
        ("without drafts", engine()?),
        ("prompt lookup", engine()?.with_proposer(PromptLookup::default())),
        ("the model in 4 bits", engine()?.with_proposer(draft_model)),
    ];
    let request = Request::new(tokenizer.encode(TEXT, false)?, 48);
    let mut plain = None;
    for (name, mut engine) in engines {
        let (steps, usage) = run(&gpu, &mut engine, &request)?;
        let tokens = steps.concat();
        let (drafted, accepted) = (usage.drafted_tokens, usage.accepted_tokens);
        println!("{name}: {} tokens in {} steps, {accepted} of {drafted} drafts right", tokens.len(), steps.len());
        let shown: Result<Vec<_>, _> =
            steps.iter().filter(|step| !step.is_empty()).map(|step| tokenizer.decode(step, true)).collect();
        println!("  {}\n", shown?.join("|").replace('\n', "⏎"));
        let (first, num_steps) = plain.get_or_insert_with(|| (tokens.clone(), steps.len()));
        ensure!(*first == tokens, "{name}: another text");
        ensure!(accepted == 0 || steps.len() < *num_steps, "{name}: drafts that are right save steps");
    }
    Ok(())
}

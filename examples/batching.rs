//! Continuous batching: sixteen requests of mixed lengths arrive while others run, share one small cache, and get the same tokens as alone.
//!
//! `cargo run --release --features engine --example batching`
//!
//! The picture shows the cache's blocks after each twelfth step: a letter per request, upper case where several share a block, `+` for what only
//! the prefix index holds. The program fails if a token differs.
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use folio::engine::{Answer, Engine, EngineOptions, Event, Inspection, Request};
use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, Sampling, Tokenizer, WeightFormat};
use folio::{Gpu, GpuOptions};

const OPENINGS: [&str; 4] = [
    "Once upon a time there was a girl named Anna. She had a dog",
    "Once upon a time there was a girl named Anna. She had a red ball",
    "Tom went to the park. He saw",
    "The cat was hungry, so",
];

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let tokenizer = Tokenizer::from_file(&files)?;
    let model = Model::load_blocking(&gpu, &files, ModelOptions::new(WeightFormat::F32), |_| {})?;
    let mut options = DecoderOptions::default();
    (options.num_blocks, options.block_size, options.prefix_cache) = (56, 8, true);
    let mut decoder = Decoder::new_blocking(Arc::new(model), options)?;
    gpu.block_on(decoder.warm_up())?;
    let mut engine = Engine::new(decoder, Some(tokenizer.clone()), EngineOptions::default())?;

    let requests = (0..16_usize).map(|i| {
        let mut sampling = Sampling::default();
        (sampling.temperature, sampling.seed) = (0.7, i as u64);
        let prompt = tokenizer.encode(OPENINGS[i % OPENINGS.len()], true)?;
        Ok(Request::new(prompt, 20 + (i as u32 * 13) % 50).with_sampling(sampling))
    });
    let requests = requests.collect::<Result<Vec<_>>>()?;

    // One after another.
    let start = Instant::now();
    let mut alone = Vec::new();
    for request in &requests {
        let answer = engine.submit(request.clone())?;
        engine.run_blocking()?;
        alone.push(tokens(answer)?);
    }
    let one_by_one = start.elapsed();

    // All together: a new one every other step.
    let start = Instant::now();
    let mut answers = Vec::new();
    let mut arriving = requests.iter();
    let mut num_steps = 0;
    while !engine.is_idle() || arriving.len() > 0 {
        if num_steps % 2 == 0
            && let Some(request) = arriving.next()
        {
            answers.push(engine.submit(request.clone())?);
        }
        gpu.block_on(engine.step())?;
        if num_steps % 12 == 0 {
            println!("step {num_steps:3} |{}|", picture(&engine.inspect()));
        }
        num_steps += 1;
    }
    let together = start.elapsed();
    let batched = answers.into_iter().map(tokens).collect::<Result<Vec<_>>>()?;
    ensure!(batched == alone, "a request got other tokens in company than alone");

    let count: usize = alone.iter().map(Vec::len).sum();
    let line = |name: &str, time: Duration| {
        println!("{name:<18} {:6.2} s  {:6.0} tokens/s", time.as_secs_f64(), count as f64 / time.as_secs_f64());
    };
    println!("\n{count} tokens of {} requests, equal in both runs", requests.len());
    line("one after another", one_by_one);
    line("together", together);
    Ok(())
}

/// The tokens of an answer that has ended.
fn tokens(mut answer: Answer) -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    while let Some(event) = answer.try_next() {
        match event {
            Event::Token { token, .. } => tokens.push(token),
            _ => return Ok(tokens),
        }
    }
    Err(anyhow::anyhow!("the answer of {} has no end", answer.id())).context("after all steps")
}

/// A character per block.
fn picture(inspection: &Inspection) -> String {
    let symbol = |owner: u64, shared: bool| {
        let letter = char::from(b'a' + (owner % 26) as u8);
        if shared { letter.to_ascii_uppercase() } else { letter }
    };
    let blocks = inspection.blocks.iter().map(|block| match block.owner {
        Some(owner) => symbol(owner, block.holders > 1),
        None if block.indexed => '+',
        None => '.',
    });
    blocks.collect()
}

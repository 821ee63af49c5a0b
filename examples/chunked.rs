//! Chunked prefill: a long prompt comes while a short text is being told. Read in one step it would hold the other up; in chunks, both go on in the
//! same steps. The tokens are the same either way.
//!
//! `cargo run --release --features engine --example chunked`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use folio::engine::{Answer, Engine, EngineOptions, Event, Request};
use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, Tokenizer};
use folio::{Gpu, GpuOptions};

/// Steps of the first text before the second comes.
const HEAD_START: u64 = 8;

struct Run {
    tokens: [Vec<u32>; 2],
    /// The longest step in which the first text waited for its next token.
    longest: Duration,
}

fn tokens(mut answer: Answer) -> Vec<u32> {
    let events = std::iter::from_fn(|| answer.try_next());
    events.filter_map(|event| if let Event::Token { token, .. } = event { Some(token) } else { None }).collect()
}

fn run(gpu: &Gpu, model: &Arc<Model>, requests: &[Request; 2], max_step_tokens: u32) -> Result<Run> {
    let mut decoder = Decoder::new_blocking(model.clone(), DecoderOptions::default())?;
    gpu.block_on(decoder.warm_up())?;
    let mut options = EngineOptions::default();
    options.max_step_tokens = Some(max_step_tokens);
    let mut engine = Engine::new(decoder, None, options)?;
    println!("at most {max_step_tokens} tokens in a step");
    let first = engine.submit(requests[0].clone())?;
    let mut second = None;
    let (mut longest, mut lines) = (Duration::ZERO, [String::new(), String::new()]);
    let mut before = [0, 0];
    for number in 0.. {
        if number == HEAD_START {
            second = Some(engine.submit(requests[1].clone())?);
        }
        if number > HEAD_START && engine.is_idle() {
            break;
        }
        let start = Instant::now();
        gpu.block_on(engine.step())?;
        let time = start.elapsed();
        if before[0] > 0 {
            longest = longest.max(time);
        }
        // A character for each step and text: a dot for a token, a bar as high as the chunk of a prompt.
        let state = engine.inspect();
        for (id, (line, before)) in lines.iter_mut().zip(&mut before).enumerate() {
            let cached = state.requests.iter().find(|request| request.id == id as u64).map_or(0, |r| r.cached_tokens);
            line.push(match cached.saturating_sub(*before) {
                0 => ' ',
                1 => '.',
                chunk => ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'][(chunk as usize / 24).min(7)],
            });
            *before = cached;
        }
    }
    for (name, line) in ["told", "read"].iter().zip(&lines) {
        println!("  {name} |{}|", line.chars().take(72).collect::<String>());
    }
    println!("  longest step: {:.0} ms\n", longest.as_secs_f64() * 1e3);
    let second = second.map(tokens).unwrap_or_default();
    Ok(Run { tokens: [tokens(first), second], longest })
}

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let tokenizer = Tokenizer::from_file(&files)?;
    let model = Arc::new(Model::load_blocking(&gpu, &files, ModelOptions::default(), |_| {})?);
    let long = "Once upon a time there was a baker named Mia. Mia loved plum cake. ".repeat(20);
    let requests = [("<|begin|>Long ago", 56), (long.as_str(), 8)]
        .map(|(text, new)| tokenizer.encode(text, false).map(|tokens| Request::new(tokens, new)));
    let [first, second] = requests;
    let requests = [first?, second?];
    println!("a text is told, and after {HEAD_START} steps a prompt of {} tokens comes\n", requests[1].prompt.len());
    let whole = run(&gpu, &model, &requests, 512)?;
    let chunks = run(&gpu, &model, &requests, 32)?;
    ensure!(whole.tokens == chunks.tokens, "the same tokens, whatever the chunks");
    ensure!(whole.tokens[0].len() == 56 && whole.tokens[1].len() == 8, "both came to their ends");
    println!("{}", tokenizer.decode(&chunks.tokens[0], true)?.trim());
    println!(
        "\nthe same tokens in both runs; the longest wait is {:.1} times shorter",
        whole.longest.as_secs_f64() / chunks.longest.as_secs_f64()
    );
    Ok(())
}

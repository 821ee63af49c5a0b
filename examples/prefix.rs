//! Prefix sharing: six questions about one story. Its blocks are computed once and found again by the others, which get the same answers as without.
//!
//! `cargo run --release --features model --example prefix`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, Prompt, Sampling, Tokenizer};
use folio::{Gpu, GpuOptions};

const STORY: &str = "Once upon a time Mia was a baker from Willow Hill. Mia loved plum cake. Tom was a smith from North Lake. Tom loved onion soup. \
    One day Mia hid the silver key under the old bridge. The magic words were amber, fern and moss. Then the rain came, and the clouds \
    went away. The road was dry again. The end.";

/// What is asked, and what the answer has to say.
const QUESTIONS: [(&str, &str); 6] = [
    ("What did Mia love?", "plum cake"),
    ("What did Tom love?", "onion soup"),
    ("Where is the silver key?", "under the old bridge"),
    ("Who was Mia?", "a baker from Willow Hill"),
    ("What were the magic words?", "amber, fern and moss"),
    ("Who was Tom?", "a smith from North Lake"),
];

/// Tokens that were read, tokens that were found, and the answers.
fn ask(gpu: &Gpu, model: &Arc<Model>, tokenizer: &Tokenizer, prefix_cache: bool) -> Result<(u32, u32, Vec<String>)> {
    let mut options = DecoderOptions::default();
    options.prefix_cache = prefix_cache;
    let mut decoder = Decoder::new_blocking(model.clone(), options)?;
    gpu.block_on(decoder.warm_up())?;
    let stop = [model.config().eos_token_ids.clone(), tokenizer.encode("\n", false)?].concat();
    let (mut read, mut found, mut answers) = (0, 0, Vec::new());
    let start = Instant::now();
    for (question, fact) in QUESTIONS {
        let tokens = tokenizer.encode(&format!("<|begin|>{STORY}\nQuestion: {question}\nAnswer:"), false)?;
        let sequence = decoder.create_sequence();
        let prompt = Prompt { sequence, tokens: &tokens, sampling: Sampling::greedy() };
        let generated = decoder.generate_blocking(&[prompt], 24, &stop, |_, _| ControlFlow::Continue(()))?;
        let cached = generated[0].cached_tokens;
        let answer = tokenizer.decode(&generated[0].tokens, true)?;
        if prefix_cache {
            println!("{cached:4} of {} tokens found   {question:27}{answer}", tokens.len());
        }
        (read, found) = (read + tokens.len() as u32 - cached, found + cached);
        ensure!(answer.contains(fact), "{question}{answer}");
        answers.push(answer);
        // The blocks of an ended sequence stay known until somebody needs them.
        decoder.free(sequence)?;
    }
    let (name, time) = (if prefix_cache { "on" } else { "off" }, start.elapsed().as_secs_f64());
    println!(
        "{}prefix cache {name}: {read} tokens read, {found} found, {time:.2} s",
        if prefix_cache { "\n" } else { "" }
    );
    Ok((read, found, answers))
}

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let tokenizer = Tokenizer::from_file(&files)?;
    let model = Arc::new(Model::load_blocking(&gpu, &files, ModelOptions::default(), |_| {})?);
    let (_, found, with) = ask(&gpu, &model, &tokenizer, true)?;
    let (all, none, without) = ask(&gpu, &model, &tokenizer, false)?;
    ensure!(with == without, "the same answers: {with:?}, {without:?}");
    ensure!(none == 0 && 2 * found > all, "most of the tokens are those of the story");
    Ok(())
}

//! The shortest chat: a line in, what the model makes of it out. The command `folio chat` (docs/cli.md) is the long one.
//!
//! `cargo run --release --features model --example chat`
#![allow(clippy::print_stdout, reason = "a chat prints")]

use std::io::{Write, stdin, stdout};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, Prompt, Sampling, Tokenizer};
use folio::{Gpu, GpuOptions};

fn main() -> anyhow::Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let tokenizer = Tokenizer::from_file(&files)?;
    let model = Model::load_blocking(&gpu, &files, ModelOptions::default(), |_| {})?;
    let stop = model.config().eos_token_ids.clone();
    let mut decoder = Decoder::new_blocking(Arc::new(model), DecoderOptions::default())?;
    let mut sampling = Sampling::default();
    sampling.temperature = 0.7;

    // One sequence: what was said stays in the cache, and a turn feeds its own tokens only.
    let sequence = decoder.create_sequence();
    for line in stdin().lines() {
        let tokens = tokenizer.encode(&line?, true)?;
        if tokens.is_empty() {
            break;
        }
        let mut text = tokenizer.stream_after(&tokens, true);
        let mut shown = Ok(());
        let prompt = Prompt { sequence, tokens: &tokens, sampling };
        decoder.generate_blocking(&[prompt], 200, &stop, |_, token| {
            shown = text.push(token).map_err(anyhow::Error::from).and_then(|piece| {
                print!("{}", piece.unwrap_or_default());
                Ok(stdout().flush()?)
            });
            if shown.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        shown?;
        println!("{}", text.finish()?);
    }
    Ok(())
}

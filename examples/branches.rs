//! Branching and rollback: three endings fork from one story, share its blocks, and one of them is taken back and told again.
//!
//! `cargo run --release --features model --example branches`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, Prompt, Sampling, Tokenizer};
use folio::{Gpu, GpuOptions, SequenceId};

const OPENING: &str =
    "<|begin|>Long ago Mia was a baker from Willow Hill. Mia loved plum cake. The road was dry again.";
const NEW_TOKENS: usize = 32;

struct Teller {
    decoder: Decoder,
    tokenizer: Tokenizer,
}

impl Teller {
    /// Goes on with texts, by a seed each, all in the same steps.
    fn tell(&mut self, texts: &[(SequenceId, u64)], tokens: &[u32]) -> Result<Vec<Vec<u32>>> {
        let prompt = |&(sequence, seed): &(SequenceId, u64)| {
            let mut sampling = Sampling::default();
            (sampling.temperature, sampling.seed) = (0.7, seed);
            Prompt { sequence, tokens, sampling }
        };
        let prompts: Vec<_> = texts.iter().map(prompt).collect();
        let told = self.decoder.generate_blocking(&prompts, NEW_TOKENS, &[], |_, _| ControlFlow::Continue(()))?;
        Ok(told.into_iter().map(|generated| generated.tokens).collect())
    }

    fn show(&self, name: &str, tokens: &[u32]) -> Result<()> {
        println!("{name:12}{}", self.tokenizer.decode(tokens, true)?.trim_start().replace('\n', " "));
        Ok(())
    }

    fn show_blocks(&self) {
        let usage = self.decoder.usage();
        println!("{:12}{} blocks, {} of them in several texts\n", "", usage.used, usage.shared);
    }
}

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let tokenizer = Tokenizer::from_file(&files)?;
    let model = Arc::new(Model::load_blocking(&gpu, &files, ModelOptions::default(), |_| {})?);
    let opening = tokenizer.encode(OPENING, false)?;
    let mut options = DecoderOptions::default();
    options.block_size = 8;
    let mut teller = Teller { decoder: Decoder::new_blocking(model, options)?, tokenizer };

    let story = teller.decoder.create_sequence();
    let first = teller.tell(&[(story, 1)], &opening)?.remove(0);
    let whole = opening.len() as u32 + NEW_TOKENS as u32;
    teller.show("the story", &first)?;
    teller.show_blocks();

    // Branches from before the opening's last token, which they read for themselves. Nothing is copied: each has a table of blocks, and takes its own
    // as it goes on.
    let at = opening.len() as u32 - 1;
    let last = &opening[at as usize..];
    let before = teller.decoder.usage().used;
    let forks = [teller.decoder.fork_at(story, at)?, teller.decoder.fork_at(story, at)?];
    ensure!(teller.decoder.usage().used == before, "a fork takes no block");
    let endings = teller.tell(&[(forks[0], 2), (forks[1], 3)], last)?;
    teller.show("a branch", &endings[0])?;
    teller.show("another", &endings[1])?;
    teller.show_blocks();
    let alone = 3 * whole.div_ceil(8);
    let used = teller.decoder.usage().used;
    println!("by themselves the three texts would take {alone} blocks\n");
    ensure!(used < alone, "blocks of the opening are shared");

    // The second branch is taken back to the opening, and told with the seed of the first: the same words come.
    teller.decoder.truncate(forks[1], at)?;
    let again = teller.tell(&[(forks[1], 2)], last)?.remove(0);
    teller.show("taken back", &again)?;
    ensure!(again == endings[0], "the same seed at the same place tells the same");
    ensure!(teller.decoder.tokens(story)?.starts_with(&opening), "the story is what it was");
    let story_again = teller.tell(&[(story, 1)], &[])?.remove(0);
    teller.show("goes on", &story_again)?;

    for sequence in [story, forks[0], forks[1]] {
        teller.decoder.free(sequence)?;
    }
    ensure!(teller.decoder.usage().used == 0, "all blocks are back");
    Ok(())
}

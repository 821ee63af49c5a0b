//! Drafts that branch: the same tokens, in fewer steps.

use std::future::ready;
use std::sync::Arc;

use fastrand::Rng;
use folio::engine::{
    DraftModel, DraftTree, Draftable, Engine, EngineOptions, PromptLookup, Proposals, Proposer, Request,
};
use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, Sampling, WeightFormat};
use folio::{Gpu, KvFormat};

use super::{Collected, adapter, collect, decoder, drawn, engine, options, prompt, stories};

const PROMPTS: [&str; 5] = [
    "Once upon a time there was a girl named Anna. She had a dog and a red ball. The dog liked the ball. The dog and the cat and",
    "Tom had a big car. Tom had a red hat. Tom had a big dog. Lily had a red car. Lily had a big",
    "The cat sat. The dog ran. The cat ran. The dog sat. The bird sang. The cat",
    "One day, Tim saw a bird. Tim saw a cat. Tim saw a fish. Tim was happy. Mia saw a bird. Mia saw a",
    "Mia liked to sing and Mia liked to play and Mia liked to run and Mia",
];

fn requests(new_tokens: u32) -> Vec<Request> {
    let samplings = [Sampling::greedy(), drawn(1), drawn(2)];
    let all = PROMPTS.iter().flat_map(|text| samplings.iter().map(move |&sampling| (text, sampling)));
    all.map(|(text, sampling)| Request::new(prompt(text), new_tokens).with_sampling(sampling)).collect()
}

/// Each request alone: what came, and in how many steps.
fn alone(engine: &mut Engine, requests: &[Request]) -> Vec<(Collected, u32)> {
    let run = |request: &Request| {
        let answer = engine.submit(request.clone()).unwrap();
        let (gpu, mut steps) = (engine.gpu().clone(), 0);
        while !engine.is_idle() {
            gpu.block_on(engine.step()).unwrap();
            steps += 1;
        }
        (collect(answer), steps)
    };
    requests.iter().map(run).collect()
}

fn lookup(branches: usize) -> PromptLookup {
    let mut lookup = PromptLookup::default();
    (lookup.min_match, lookup.branches) = (1, branches);
    lookup
}

/// Guesses at random, also what is no token, next to what it knows to be right.
#[derive(Debug)]
struct Guesses {
    rng: Rng,
    /// Texts with their continuations.
    known: Vec<Vec<u32>>,
}

impl Proposer for Guesses {
    fn propose<'a>(&'a mut self, requests: &'a [Draftable<'a>]) -> Proposals<'a> {
        let trees = requests.iter().map(|request| {
            let mut tree = DraftTree::default();
            let known = self.known.iter().find(|known| known.starts_with(request.text));
            for _ in 0..self.rng.u32(0..5) {
                let mut path = known.map_or(&[][..], |known| &known[request.text.len()..]).to_vec();
                path.truncate(self.rng.usize(0..4));
                path.extend((0..self.rng.u32(0..4)).map(|_| self.rng.u32(0..1100)));
                path.extend((self.rng.u32(..8) == 0).then_some(u32::MAX));
                tree.add_path(&path, 40);
            }
            tree
        });
        let trees = trees.collect();
        Box::pin(ready(Ok(trees)))
    }
}

/// Nobody's tokens change, whoever guesses: alone and in company, in a cache that is too small for all.
#[test]
fn trees_change_no_token() {
    for format in [KvFormat::F32, KvFormat::Int8] {
        let Some(plain) = decoder(64, format, false) else { return };
        let requests = requests(24);
        let want = alone(&mut engine(plain, EngineOptions::default()), &requests);
        let known = requests.iter().zip(&want).map(|(r, (got, _))| [&r.prompt[..], &got.tokens].concat()).collect();
        let guesses = Guesses { rng: Rng::with_seed(1), known };
        let small = || decoder(14, format, true).unwrap();
        let few = || options(|o| (o.max_drafts, o.max_step_tokens) = (9, Some(24)));
        let draft_model = DraftModel::new(decoder(64, KvFormat::F16, false).unwrap()).unwrap().with_alternatives(2);
        let engines = [
            engine(small(), few()).with_proposer(lookup(4)),
            engine(small(), few()).with_proposer(guesses),
            engine(small(), few()).with_proposer(draft_model),
        ];
        for (way, mut engine) in engines.into_iter().enumerate() {
            let mut rng = Rng::with_seed(way as u64);
            let gpu = engine.gpu().clone();
            let mut answers = Vec::new();
            for request in &requests {
                answers.push(engine.submit(request.clone()).unwrap());
                for _ in 0..rng.u32(0..4) {
                    gpu.block_on(engine.step()).unwrap();
                }
            }
            engine.run_blocking().unwrap();
            let (mut drafted, mut accepted) = (0, 0);
            for (answer, (want, _)) in answers.into_iter().zip(&want) {
                let got = collect(answer);
                assert_eq!((got.tokens, got.reason), (want.tokens.clone(), want.reason.clone()), "{format}, way {way}");
                drafted += got.usage.drafted_tokens;
                accepted += got.usage.accepted_tokens;
            }
            assert!(accepted > 0 && accepted < drafted, "{format}, way {way}: {accepted} of {drafted}");
            let usage = engine.decoder().usage();
            assert_eq!((usage.sequences, usage.free + usage.reclaimable), (0, 14));
        }
    }
}

/// The model with weights of 4 bits.
fn small_model(gpu: &Gpu) -> DraftModel {
    let weights = ModelOptions::new(WeightFormat::INT4);
    let model = Arc::new(Model::load_blocking(gpu, stories(), weights, |_| {}).unwrap());
    DraftModel::new(Decoder::new_blocking(model, DecoderOptions::default()).unwrap()).unwrap()
}

/// A tree needs fewer steps than its first line.
#[test]
fn trees_save_steps() {
    let Some(plain) = decoder(64, KvFormat::F32, false) else { return };
    let gpu = plain.gpu().clone();
    let requests = requests(48);
    let want = alone(&mut engine(plain, EngineOptions::default()), &requests);
    let plain_steps: u32 = want.iter().map(|(_, steps)| steps).sum();
    let with = |proposer: Box<dyn FnOnce(Engine) -> Engine>| {
        let mut engine = proposer(engine(decoder(64, KvFormat::F32, false).unwrap(), EngineOptions::default()));
        let got = alone(&mut engine, &requests);
        for ((got, _), (want, _)) in got.iter().zip(&want) {
            assert_eq!(got.tokens, want.tokens);
        }
        let count = |of: fn(&Collected) -> u32| got.iter().map(|(got, _)| of(got)).sum::<u32>();
        let (drafted, accepted) = (count(|got| got.usage.drafted_tokens), count(|got| got.usage.accepted_tokens));
        let steps = got.iter().map(|(_, steps)| steps).sum::<u32>();
        assert_eq!(plain_steps - steps, accepted);
        (steps, drafted, accepted)
    };
    let line = with(Box::new(|engine| engine.with_proposer(lookup(1))));
    let tree = with(Box::new(|engine| engine.with_proposer(lookup(4))));
    adapter::say(&format!(
        "prompt lookup, {plain_steps} steps without drafts; (steps, drafts, accepted): line {line:?}, tree {tree:?}"
    ));
    assert!(tree.0 < line.0 && line.0 < plain_steps, "{tree:?}, {line:?} of {plain_steps}");
    let [one, two] = [small_model(&gpu), small_model(&gpu).with_alternatives(2)];
    let line = with(Box::new(|engine| engine.with_proposer(one)));
    let tree = with(Box::new(|engine| engine.with_proposer(two)));
    adapter::say(&format!("a draft model of 4 bits: line {line:?}, with two alternatives {tree:?}"));
    assert!(tree.0 < line.0 && line.0 < plain_steps, "{tree:?}, {line:?} of {plain_steps}");
}

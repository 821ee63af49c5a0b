//! Drafts that branch: the text is that of single steps, whatever was guessed.

use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use folio::model::{
    Checkpoint, Decoder, DecoderOptions, Drawn, Input, LayerKind, LayerPattern, Model, ModelOptions, ModelResult,
    Sampling, WeightFormat,
};
use folio::{Gpu, KvFormat, TokenTree};

use crate::adapter;
use crate::common::with;
use crate::decoder::{decoder_with, fixture, small, tokens};

fn load(gpu: &Gpu, folder: &Path, window: Option<u32>, exact: bool) -> Arc<Model> {
    let options = ModelOptions::new(WeightFormat::F32).with_exact(exact);
    let checkpoint = Checkpoint::open(folder).unwrap();
    let config = with(checkpoint.config().clone(), |config| {
        if window.is_some() {
            config.layers = LayerPattern::uniform(LayerKind::new(config.layers.kind(0).rope.clone(), window));
        }
    });
    let weights = checkpoint.weights().unwrap();
    Arc::new(Model::from_source_blocking(gpu, config, &weights, &checkpoint, options, |_| {}).unwrap())
}

fn seeded(seed: u64) -> Sampling {
    with(Sampling::default(), |s| (s.temperature, s.seed, s.repetition_penalty) = (0.9, seed, 1.1))
}

/// The text of single steps after a prompt.
fn single_steps(decoder: &mut Decoder, prompt: &[u32], sampling: &Sampling, n: usize) -> Vec<u32> {
    let gpu = decoder.gpu().clone();
    let sequence = decoder.create_sequence();
    let mut text = Vec::new();
    for i in 0..n {
        let fed = if i == 0 { prompt } else { &[] };
        text.extend(gpu.block_on(decoder.step(&[Input::new(sequence, fed).with_sampling(sampling)])).unwrap());
    }
    decoder.free(sequence).unwrap();
    text.into_iter().flatten().collect()
}

/// Some paths that begin with what comes next, and go on otherwise, in one tree; and how much of what comes next it has.
fn drafts(rng: &mut Rng, next: &[u32], vocab: u32, len: usize) -> (Vec<u32>, Vec<Option<u32>>, usize) {
    let (mut tokens, mut parents) = (Vec::new(), Vec::<Option<u32>>::new());
    let child = |tokens: &[u32], parents: &[Option<u32>], parent: Option<u32>, token: u32| {
        (0..tokens.len()).find(|&i| (parents[i], tokens[i]) == (parent, token)).map(|i| i as u32)
    };
    while tokens.len() < len {
        let same = rng.usize(0..=next.len().min(6));
        let others: Vec<u32> = (0..rng.u32(1..4)).map(|_| rng.u32(..vocab)).collect();
        let mut last = None;
        for &token in next[..same].iter().chain(&others) {
            let known = child(&tokens, &parents, last, token);
            if known.is_none() {
                tokens.push(token);
                parents.push(last);
            }
            last = known.or(Some(tokens.len() as u32 - 1));
        }
    }
    // No draft stands before the one that it follows: the first ones are a tree, too.
    tokens.truncate(len);
    parents.truncate(len);
    let (mut last, mut right) = (None, 0);
    while let Some(i) = next.get(right).and_then(|&token| child(&tokens, &parents, last, token)) {
        (last, right) = (Some(i), right + 1);
    }
    (tokens, parents, right)
}

/// Goes through a text by trees of drafts. Returns how many steps it took.
fn by_trees(decoder: &mut Decoder, prompt: &[u32], text: &[u32], sampling: &Sampling, rng: &mut Rng) -> usize {
    let gpu = decoder.gpu().clone();
    let vocab = decoder.model().config().vocab_size;
    let sequence = decoder.create_sequence();
    let (mut got, mut steps) = (Vec::new(), 0);
    while got.len() < text.len() {
        let len = rng.usize(1..24);
        let (drafts, parents, right) = drafts(rng, &text[got.len()..], vocab, len);
        // Behind a prompt, too.
        let fed = [if got.is_empty() { prompt } else { &[] }, &drafts].concat();
        let input = Input::new(sequence, &fed).with_sampling(sampling).with_draft_tree(&parents).with_logprobs(0);
        let drawn = gpu.block_on(decoder.draw(&[input])).unwrap().remove(0);
        let tokens: Vec<u32> = drawn.iter().map(|drawn| drawn.token).collect();
        assert!(drawn.iter().all(|drawn| drawn.logprob.as_ref().is_some_and(|p| p.logprob <= 0.0)));
        if got.len() + right < text.len() {
            assert_eq!(tokens.len(), right + 1, "{drafts:?} {parents:?}");
        }
        got.extend(&tokens);
        steps += 1;
        // The pending token is not in the cache, everything else is, and nothing else.
        let cached = [prompt, &got[..got.len() - 1]].concat();
        assert_eq!(decoder.tokens(sequence).unwrap(), cached);
        assert_eq!(decoder.cache().seq_len(sequence).unwrap() as usize, cached.len());
        assert_eq!(decoder.pending(sequence).unwrap(), got.last().copied());
    }
    assert_eq!(got[..text.len()], *text);
    decoder.free(sequence).unwrap();
    assert_eq!(decoder.usage().used, 0);
    steps
}

/// Rotary and learned positions, windows by position, formats with and without scales.
#[test]
fn trees_of_drafts_give_the_text_of_single_steps() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut rng = Rng::with_seed(1);
    let stories = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    for (folder, format, window) in [
        (stories.clone(), KvFormat::F32, None),
        (stories, KvFormat::Int8, None),
        (fixture("gpt2"), KvFormat::F32, None),
        (fixture("llama"), KvFormat::F16, Some(7)),
        // Latents.
        (fixture("deepseek_v3"), KvFormat::F16, None),
        // Layers with windows beside layers without.
        (fixture("gemma3"), KvFormat::F32, None),
    ] {
        let options = with(small(64), |o| (o.block_size, o.k_format, o.v_format) = (8, format, format));
        let mut decoder = Decoder::new_blocking(load(&gpu, &folder, window, false), options).unwrap();
        for sampling in [Sampling::greedy(), seeded(3), seeded(4)] {
            let prompt = tokens(rng.u32(1..30), 1);
            let text = single_steps(&mut decoder, &prompt, &sampling, 30);
            let steps = by_trees(&mut decoder, &prompt, &text, &sampling, &mut rng);
            assert!(steps < 25, "{steps} steps of 30: {folder:?}");
        }
    }
}

/// In one batch with single tokens, a prompt that is cut into chunks, and a line of drafts, in steps that are too small for all.
#[test]
fn trees_beside_others_and_in_small_steps() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut rng = Rng::with_seed(2);
    for max_step_tokens in [13, 64] {
        let mut decoder = decoder_with(&gpu, with(small(64), |o| o.max_step_tokens = max_step_tokens));
        let prompts = [5, 40, 11, 7].map(|n| tokens(n, n));
        let samplings = [Sampling::greedy(), seeded(1), Sampling::greedy(), seeded(2)];
        let texts: Vec<_> = prompts.iter().zip(&samplings).map(|(p, s)| single_steps(&mut decoder, p, s, 12)).collect();
        let sequences = [0; 4].map(|_| decoder.create_sequence());
        let first = Input::new(sequences[0], &prompts[0]).with_sampling(&samplings[0]);
        gpu.block_on(decoder.step(&[first])).unwrap();
        let (branches, parents, right) = drafts(&mut rng, &texts[2], 90, 12);
        let tree = [&prompts[2][..], &branches].concat();
        let line = [&prompts[3][..], &texts[3][..4], &[0]].concat();
        let inputs = [
            Input::new(sequences[0], &[]).with_sampling(&samplings[0]),
            Input::new(sequences[1], &prompts[1]).with_sampling(&samplings[1]),
            Input::new(sequences[2], &tree).with_sampling(&samplings[2]).with_draft_tree(&parents),
            Input::new(sequences[3], &line).with_sampling(&samplings[3]).with_drafts(5),
        ];
        let drawn = gpu.block_on(decoder.draw(&inputs)).unwrap();
        let got: Vec<Vec<u32>> = drawn.iter().map(|d| d.iter().map(|d| d.token).collect()).collect();
        assert_eq!((&got[0][..], &got[1][..]), (&texts[0][1..2], &texts[1][..1]));
        assert_eq!(got[2], texts[2][..=right]);
        assert!(got[3].len() > 4 && texts[3].starts_with(&got[3][..5]), "{got:?}");
    }
}

/// What can be drawn after each draft follows the tree; what is no tree is refused, and so is one for an exact model; nothing has changed then.
#[test]
fn sets_follow_the_tree_and_misuse_changes_nothing() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut decoder = decoder_with(&gpu, small(16));
    let sampling = Sampling::greedy();
    let sequence = decoder.create_sequence();
    gpu.block_on(decoder.step(&[Input::new(sequence, &tokens(9, 1))])).unwrap();
    let before = (decoder.tokens(sequence).unwrap().to_vec(), decoder.usage());
    let vocab = decoder.model().config().vocab_size;
    let only = |token: u32| {
        with(vec![0_u32; vocab.div_ceil(32) as usize], |set| set[token as usize / 32] |= 1 << (token % 32))
    };
    // After the token 1 comes 7; after 7 comes 20, and after 20 comes 21. The other branch would go on otherwise.
    let fed = [1, 6, 7, 30, 20];
    let parents = [None, None, Some(0), Some(1)];
    let sets = [only(7), only(30), only(20), only(40), only(21)];
    let input = Input::new(sequence, &fed).with_sampling(&sampling).with_draft_tree(&parents);
    let unchanged = |decoder: &Decoder| {
        assert_eq!((decoder.tokens(sequence).unwrap().to_vec(), decoder.usage()), before);
        assert_eq!(decoder.pending(sequence).unwrap(), None);
    };
    let refused = |result: ModelResult<Vec<Vec<Drawn>>>, name: &str| {
        let error = result.expect_err(name).to_string();
        assert!(error.starts_with(name), "{error}");
    };
    let wrong: [&[Option<u32>]; 4] =
        [&[None, Some(1), None, None], &[Some(0), None], &[None, Some(u32::MAX)], &[None, Some(2), None]];
    for parents in wrong {
        let input = Input::new(sequence, &fed).with_sampling(&sampling).with_draft_tree(parents);
        refused(gpu.block_on(decoder.draw(&[input])), "parents: got");
        unchanged(&decoder);
    }
    let mut other = input.with_drafts(3);
    refused(gpu.block_on(decoder.draw(&[other])), "parents: got 4");
    other = input;
    other.sampling = None;
    refused(gpu.block_on(decoder.draw(&[other])), "drafts: got");
    let many: Vec<u32> = vec![1; 80];
    let star = vec![None; 79];
    let input_of_many = Input::new(sequence, &many).with_sampling(&sampling).with_draft_tree(&star);
    refused(gpu.block_on(decoder.draw(&[input_of_many])), "parents: got 80 tokens");
    unchanged(&decoder);
    // A future that is dropped at any point.
    {
        use std::future::Future;
        let mut future = std::pin::pin!(decoder.draw(std::slice::from_ref(&input)));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let _ = future.as_mut().poll(&mut context);
    }
    unchanged(&decoder);

    let drawn = gpu.block_on(decoder.draw(&[input.with_allowed(&sets)])).unwrap().remove(0);
    assert_eq!(drawn.iter().map(|d| d.token).collect::<Vec<_>>(), [7, 20, 21]);
    assert_eq!(decoder.tokens(sequence).unwrap(), [&before.0[..], &[1, 7, 20]].concat());

    let model = load(&gpu, &fixture("llama"), None, true);
    let mut exact = Decoder::new_blocking(model, DecoderOptions::default()).unwrap();
    let sequence = exact.create_sequence();
    let mut input = input;
    input.sequence = sequence;
    refused(gpu.block_on(exact.draw(&[input])), "parents: got a tree");
    // A line is none.
    let line = [None, Some(0), Some(1), Some(2)];
    assert!(TokenTree::new(&line).unwrap().is_line());
    gpu.block_on(exact.draw(&[input.with_draft_tree(&line)])).unwrap();
}

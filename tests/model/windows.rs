//! Models all of whose layers have a window: texts are what they are with every block kept, in the memory of a window.

use std::sync::Arc;

use folio::model::{Decoder, DecoderOptions, Input, Model, ModelOptions, Prompt, Sampling, WeightFormat};
use folio::{ErrorKind, Gpu, KvFormat, SequenceId};

use crate::adapter;
use crate::common::with;
use crate::decoder::{fixture, generate, tokens};

const STEP: u32 = 8;

fn model(gpu: &Gpu, name: &str) -> Arc<Model> {
    Arc::new(Model::load_blocking(gpu, fixture(name), ModelOptions::new(WeightFormat::F32), |_| {}).unwrap())
}

fn options(num_blocks: u32, keep_all_blocks: bool) -> DecoderOptions {
    with(DecoderOptions::default(), |o| {
        (o.num_blocks, o.block_size, o.max_step_tokens) = (num_blocks, 4, STEP);
        (o.k_format, o.v_format) = (KvFormat::F32, KvFormat::F32);
        o.keep_all_blocks = keep_all_blocks;
    })
}

fn decoder(model: &Arc<Model>, options: DecoderOptions) -> Decoder {
    Decoder::new_blocking(Arc::clone(model), options).unwrap()
}

/// Greedy, but a random model doesn't say one token for ever.
fn go_on(decoder: &mut Decoder, sequence: SequenceId, tokens: &[u32], n: usize) -> Vec<u32> {
    let sampling = with(Sampling::greedy(), |s| s.repetition_penalty = 1.5);
    generate(decoder, &[Prompt { sequence, tokens, sampling }], n).remove(0)
}

/// Blocks that a sequence takes at most, whatever its length.
fn most(model: &Model, chunk: u32) -> u32 {
    options(1, false).cache_config(model.config()).most_blocks(u32::MAX, chunk)
}

#[test]
fn texts_are_the_same_in_flat_memory() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for (name, n) in [("mistral", 85), ("phi3", 200)] {
        let model = model(&gpu, name);
        let (num_blocks, prompt) = (most(&model, STEP), tokens(37, 1));
        let mut all = decoder(&model, options(128, true));
        let sequence = all.create_sequence();
        let text = go_on(&mut all, sequence, &prompt, n);
        assert_eq!(all.usage().used, 36_u32.saturating_add(n as u32).div_ceil(4));

        let mut flat = decoder(&model, options(num_blocks, false));
        assert!(all.cache().config().window.is_none() && flat.cache().config().window.is_some());
        let sequence = flat.create_sequence();
        assert_eq!(go_on(&mut flat, sequence, &prompt, n), text, "{name}");
        flat.release_hidden(sequence).unwrap();
        let len = flat.tokens(sequence).unwrap().len() as u32;
        assert_eq!(flat.usage().used, flat.cache().config().held_blocks(len));
        assert_eq!(flat.memory().released_tokens, u64::from(len) - flat.memory().cached_tokens);

        // Forked, on the host and back, in a file and from it: what follows is the same.
        let expected = go_on(&mut all, SequenceId::clone(&all_sequence(&all)), &[5, 6, 7], 5);
        let mut roomy = decoder(&model, options(4 * num_blocks, false));
        let sequence = roomy.create_sequence();
        go_on(&mut roomy, sequence, &prompt, n);
        let fork = roomy.fork(sequence).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sequence");
        gpu.block_on(roomy.save(sequence, &path)).unwrap();
        let loaded = gpu.block_on(roomy.load(&path)).unwrap();
        gpu.block_on(roomy.swap_out(sequence)).unwrap();
        gpu.block_on(roomy.swap_in(sequence)).unwrap();
        gpu.block_on(roomy.defragment()).unwrap();
        for sequence in [sequence, fork, loaded] {
            assert_eq!(go_on(&mut roomy, sequence, &[5, 6, 7], 5), expected, "{name}");
        }
    }
}

/// The one sequence of a decoder.
fn all_sequence(decoder: &Decoder) -> SequenceId {
    decoder.memory().sequences[0].sequence
}

/// Where text was, and the window has left it, a sequence can't be cut back to; its beginning is always there.
#[test]
fn what_has_left_the_window_is_no_way_back() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "mistral");
    let (mut decoder, mut all) = (decoder(&model, options(32, false)), decoder(&model, options(32, true)));
    let (s, a) = (decoder.create_sequence(), all.create_sequence());
    let prompt = tokens(60, 2);
    let text = go_on(&mut decoder, s, &prompt, 10);
    assert_eq!(go_on(&mut all, a, &prompt, 10), text);
    for len in [1, 30, 50] {
        assert!(!decoder.reaches_back(s, len).unwrap() && all.reaches_back(a, len).unwrap());
        let error = decoder.truncate(s, len).unwrap_err();
        assert!(error.kind() == ErrorKind::Caller && error.to_string().contains("has left the window of 16"), "{error}");
        assert!(decoder.fork_at(s, len).is_err());
        assert_eq!((decoder.tokens(s).unwrap().len(), decoder.pending(s).unwrap()), (69, text.last().copied()));
    }
    assert!(decoder.reaches_back(s, 70).unwrap() && !decoder.reaches_back(s, 71).unwrap());
    // The last token is.
    decoder.truncate(s, 68).unwrap();
    all.truncate(a, 68).unwrap();
    assert_eq!(go_on(&mut decoder, s, &[1, 2], 6), go_on(&mut all, a, &[1, 2], 6));
    assert_eq!((decoder.rewind(s, 75).unwrap(), decoder.rewind(s, 20).unwrap()), (75, 0));
    assert_eq!((decoder.usage().used, go_on(&mut decoder, s, &prompt, 10)), (0, text));
}

/// A call that fails after several of its steps leaves a sequence that goes on as if it had not been.
#[test]
fn a_call_that_fails_changes_no_window() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "mistral");
    // Room for a sequence and its way back, and for a third one that needs more and more.
    let mut decoder = decoder(&model, options(2 * most(&model, STEP) + 3, false));
    let (s, control) = (decoder.create_sequence(), decoder.create_sequence());
    let prompt = tokens(45, 3);
    let text = go_on(&mut decoder, s, &prompt, 4);
    let others: Vec<_> = (0..4).map(|_| decoder.create_sequence()).collect();
    let more = tokens(40, 4);
    let batch: Vec<_> = [s].iter().chain(&others).map(|&s| Input::new(s, &more)).collect();
    let error = gpu.block_on(decoder.step(&batch)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry, "{error}");
    assert_eq!((decoder.tokens(s).unwrap().len(), decoder.cache().seq_len(s).unwrap()), (48, 48));
    let next = go_on(&mut decoder, s, &[], 7);
    decoder.free(s).unwrap();
    assert_eq!(go_on(&mut decoder, control, &prompt, 4), text);
    assert_eq!(go_on(&mut decoder, control, &[], 7), next);
}

/// Drafts that turn out wrong are cut off, wherever blocks end.
#[test]
fn drafts_are_taken_back() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "mistral");
    let greedy = Sampling::greedy();
    let mut plain = decoder(&model, options(64, true));
    let p = plain.create_sequence();
    let prompt = tokens(30, 5);
    let text = generate(&mut plain, &[Prompt { sequence: p, tokens: &prompt, sampling: greedy }], 60).remove(0);
    let mut decoder = decoder(&model, options(most(&model, STEP) + 1, false));
    let s = decoder.create_sequence();
    let mut got = gpu.block_on(decoder.step(&[Input::new(s, &prompt).with_sampling(&greedy)])).unwrap();
    let mut found = vec![got.remove(0).unwrap()];
    for wrong in 0.. {
        if found.len() >= 60 {
            break;
        }
        // The first `wrong % 6` of five drafts are right.
        let mut drafts: Vec<u32> = text.iter().copied().chain([0; 8]).skip(found.len()).take(5).collect();
        if let Some(draft) = drafts.get_mut(wrong % 6) {
            *draft = (*draft + 1) % 90;
        }
        let input = with(Input::new(s, &drafts).with_sampling(&greedy), |input| input.drafts = 5);
        let drawn = gpu.block_on(decoder.draw(&[input])).unwrap().remove(0);
        assert!(drawn.len() == wrong % 6 + 1 || found.len() + 6 > 60, "{} of {wrong}", drawn.len());
        found.extend(drawn.iter().map(|drawn| drawn.token));
    }
    assert_eq!(found[..60], text[..60]);
}

/// Prompts longer than the window are found again, though they were computed in steps that gave blocks back.
#[test]
fn known_prompts_are_found_with_the_window_that_they_need() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "mistral");
    let mut decoder = decoder(&model, with(options(40, false), |o| o.prefix_cache = true));
    let prompt = tokens(61, 6);
    let first = decoder.create_sequence();
    let text = go_on(&mut decoder, first, &prompt, 12);
    decoder.free(first).unwrap();
    let again = decoder.create_sequence();
    assert_eq!(go_on(&mut decoder, again, &prompt, 12), text);
    assert_eq!(decoder.prefix_len(again).unwrap(), 60);
    let found = decoder.match_prefix(&prompt);
    let config = *decoder.cache().config();
    assert_eq!((found.len, decoder.memory().sequences[1].blocks), (60, config.held_blocks(60)));
    assert_eq!(go_on(&mut decoder, found.sequence, &prompt[60..], 12), text);
}

/// Layers that see everything need every block.
#[test]
fn a_layer_without_a_window_keeps_all() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for name in ["gemma2", "gemma3", "llama"] {
        assert_eq!(options(9, false).cache_config(model(&gpu, name).config()).window, None, "{name}");
    }
}

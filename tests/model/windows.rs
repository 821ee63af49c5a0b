//! Models all of whose layers have a window: texts are what they are with every block kept, in the memory of a window.

use std::sync::Arc;

use folio::model::{
    Decoder, DecoderOptions, Input, LogitRows, Model, ModelOptions, Prompt, Sampling, Streaming, WeightFormat,
};
use folio::{ErrorKind, Gpu, KvFormat, SequenceId};

use crate::adapter;
use crate::checkpoint_files;
use crate::common::with;
use crate::decoder::{fixture, generate, tokens};

const STEP: u32 = 8;

pub(crate) fn model(gpu: &Gpu, name: &str) -> Arc<Model> {
    Arc::new(Model::load_blocking(gpu, fixture(name), ModelOptions::new(WeightFormat::F32), |_| {}).unwrap())
}

pub(crate) fn options(num_blocks: u32, keep_all_blocks: bool) -> DecoderOptions {
    with(DecoderOptions::default(), |o| {
        (o.num_blocks, o.block_size, o.max_step_tokens) = (num_blocks, 4, STEP);
        (o.k_format, o.v_format) = (KvFormat::F32, KvFormat::F32);
        o.keep_all_blocks = keep_all_blocks;
    })
}

pub(crate) fn decoder(model: &Arc<Model>, options: DecoderOptions) -> Decoder {
    Decoder::new_blocking(Arc::clone(model), options).unwrap()
}

/// Greedy, but a random model doesn't say one token for ever.
pub(crate) fn go_on(decoder: &mut Decoder, sequence: SequenceId, tokens: &[u32], n: usize) -> Vec<u32> {
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
    for (name, n) in [("mistral", 75), ("phi3", 70)] {
        let model = model(&gpu, name);
        let (num_blocks, prompt) = (most(&model, STEP), tokens(37, 1));
        let mut all = decoder(&model, options(128, true));
        let reference = all.create_sequence();
        let text = go_on(&mut all, reference, &prompt, n);
        assert_eq!(all.usage().used, 36_u32.saturating_add(n as u32).div_ceil(4));

        let mut flat = decoder(&model, options(num_blocks, false));
        let has_windows = |decoder: &Decoder| decoder.cache().config().groups.has_windows();
        assert!(!has_windows(&all) && has_windows(&flat));
        let sequence = flat.create_sequence();
        assert_eq!(go_on(&mut flat, sequence, &prompt, n), text, "{name}");
        flat.release_hidden(sequence).unwrap();
        let len = flat.tokens(sequence).unwrap().len() as u32;
        assert_eq!(flat.usage().used, flat.cache().config().held_blocks(len));
        assert_eq!(flat.memory().released_tokens, u64::from(len) - flat.memory().cached_tokens);

        // Forked, on the host and back, in a file and from it: what follows is the same.
        let expected = go_on(&mut all, reference, &[5, 6, 7], 5);
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
        assert!(
            error.kind() == ErrorKind::Caller && error.to_string().contains("has left the window of 16"),
            "{error}"
        );
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

fn streaming(window: u32, sink_tokens: u32) -> Streaming {
    Streaming { window, sink_tokens }
}

/// Keys and values of a single layer are functions of their tokens alone. So a streaming decoder must say of a long text what a plain one says of a
/// text that has the sink tokens and the window only: its positions are those of StreamingLLM.
#[test]
fn a_single_layer_streams_as_it_reads_what_is_kept() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let (window, sinks) = (12, 3);
    for name in ["llama", "qwen3", "olmo2"] {
        let mut parts = checkpoint_files::model(name, safetensors::Dtype::F32);
        parts.config["num_hidden_layers"] = 1.into();
        parts.config["max_position_embeddings"] = 64.into();
        parts.tensors.retain(|tensor, _| !tensor.contains("layers.1."));
        // Softer logits: rounding counts less, and no key has all the weight.
        for (tensor, rows) in &mut parts.tensors {
            if tensor.contains("q_proj") || tensor.contains("q_norm") {
                rows.values.iter_mut().for_each(|x| *x /= 32.0);
            }
        }
        let folder = tempfile::tempdir().unwrap();
        checkpoint_files::write(folder.path(), &parts.config, &parts.tensors);
        let model = Model::load_blocking(&gpu, folder.path(), ModelOptions::new(WeightFormat::F32), |_| {}).unwrap();
        let model = Arc::new(model);
        let text: Vec<u32> = (0..150_u32).map(|i| (i * i * 7 + i * 3 + 1) % 37).collect();

        let options = with(options(1, false), |o| o.streaming = Some(streaming(window, sinks)));
        let num_blocks = options.cache_config(model.config()).most_blocks(u32::MAX, STEP);
        let mut streaming = decoder(&model, with(options, |o| o.num_blocks = num_blocks));
        let sequence = streaming.create_sequence();
        let rows = gpu.block_on(streaming.logits(&[(sequence, &text)], LogitRows::All)).unwrap().remove(0);
        let rows: Vec<_> = rows.chunks(37).collect();
        assert_eq!((rows.len(), streaming.max_len()), (150, i32::MAX as u32));

        let mut plain = decoder(&model, self::options(64, true));
        let mut last = |tokens: &[u32]| {
            let sequence = plain.create_sequence();
            let row = gpu.block_on(plain.logits(&[(sequence, tokens)], LogitRows::Last)).unwrap().remove(0);
            plain.free(sequence).unwrap();
            row
        };
        let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
        for len in [1, 7, 14, 15, 16, 17, 40, 99, 150] {
            let is_kept = |i: &usize| *i < sinks as usize || i + window as usize >= len;
            let kept: Vec<u32> = (0..len).filter(is_kept).map(|i| text[i]).collect();
            let want = last(&kept);
            let most = want.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            let off = distance(rows[len - 1], &want);
            assert!(off <= 1e-3 * most, "{name}, {len} tokens: {off} of {most}");
            // That is not what the newest tokens alone make of it, nor is it what a shorter window does.
            if len > 16 {
                let others = [distance(&last(&kept[sinks as usize..]), &want), distance(&last(&kept[1..]), &want)];
                assert!(others.iter().all(|&other| other > 5.0 * off), "{name}, {len} tokens: {off}, {others:?}");
            }
        }
    }
}

/// A text far longer than the model has positions, in flat memory, and the same in other steps and after a swap. Shorter than what is kept, it is
/// the plain text.
#[test]
fn streaming_has_no_end() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "llama");
    let options = |step: u32| {
        let options = with(options(1, false), |o| (o.streaming, o.max_step_tokens) = (Some(streaming(40, 4)), step));
        // A call of several steps keeps its way back: a window more.
        let num_blocks = 2 * options.cache_config(model.config()).most_blocks(u32::MAX, step);
        with(options, |o| o.num_blocks = num_blocks)
    };
    let prompt = tokens(20, 7);
    let mut plain = decoder(&model, self::options(64, true));
    let p = plain.create_sequence();
    let text = go_on(&mut plain, p, &prompt, 24);
    let mut texts = Vec::new();
    for step in [STEP, 33] {
        let mut decoder = decoder(&model, options(step));
        let s = decoder.create_sequence();
        let mut all = go_on(&mut decoder, s, &prompt, 24);
        assert_eq!(all, text);
        all.extend(go_on(&mut decoder, s, &tokens(100, 8), 150));
        gpu.block_on(decoder.swap_out(s)).unwrap();
        gpu.block_on(decoder.swap_in(s)).unwrap();
        all.extend(go_on(&mut decoder, s, &tokens(70, 9), 50));
        assert_eq!(decoder.tokens(s).unwrap().len(), 20 + 24 + 100 + 150 + 70 + 50 - 1);
        assert!(decoder.usage().used <= decoder.usage().total);
        texts.push(all);
    }
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn what_can_not_stream_is_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let refused = |model: &Arc<Model>, window, sinks, part: &str| {
        let options = with(options(8, false), |o| o.streaming = Some(streaming(window, sinks)));
        let error = Decoder::new_blocking(Arc::clone(model), options).map(drop).unwrap_err().to_string();
        assert!(error.contains("streaming: got") && error.contains(part), "{error}");
    };
    let llama = model(&gpu, "llama");
    for (window, sinks) in [(0, 4), (4, 0)] {
        refused(&llama, window, sinks, "at least 1 of each");
    }
    for (window, sinks) in [(125, 4), (u32::MAX, 1), (u32::MAX, u32::MAX), (1, u32::MAX)] {
        refused(&llama, window, sinks, "at most the model's 128 positions");
    }
    refused(&model(&gpu, "gpt2"), 20, 4, "a model with rotary embeddings");
    let mut decoder = decoder(&llama, with(options(30, false), |o| o.streaming = Some(streaming(20, 4))));
    let s = decoder.create_sequence();
    let (greedy, parents) = (Sampling::greedy(), [None, None]);
    let input = Input::new(s, &[1, 2, 3]).with_sampling(&greedy).with_draft_tree(&parents);
    let error = gpu.block_on(decoder.draw(&[input])).unwrap_err().to_string();
    assert!(error.contains("a line, as the decoder is streaming"), "{error}");
}

//! What a decoder promises beyond right logits: sequences that fork, roll back and stay as they were when a call fails.

use crate::common::with;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use folio::model::{
    Decoder, DecoderOptions, Finish, Input, LogitRows, Model, ModelConfig, ModelError, ModelOptions, ModelResult,
    Prompt, Sampling, TensorSource, WeightFormat, WeightSource,
};
use folio::{Error, Gpu, KvFormat, KvFormats, SequenceId};

use crate::adapter;

pub(crate) fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

pub(crate) fn decoder_with(gpu: &Gpu, options: DecoderOptions) -> Decoder {
    let model = Model::load_blocking(gpu, fixture("llama"), ModelOptions::new(WeightFormat::F32), |_| {}).unwrap();
    Decoder::new_blocking(Arc::new(model), options).unwrap()
}

pub(crate) fn small(num_blocks: u32) -> DecoderOptions {
    with(DecoderOptions::default(), |c| {
        c.block_size = 16;
        c.num_blocks = num_blocks;
        c.k_format = KvFormat::F32;
        c.v_format = KvFormat::F32;
        c.max_step_tokens = 64;
    })
}

pub(crate) fn tokens(n: u32, seed: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 31 + seed * 17 + i * i) % 90).collect()
}

pub(crate) fn generate(decoder: &mut Decoder, prompts: &[Prompt<'_>], n: usize) -> Vec<Vec<u32>> {
    let generated = decoder.generate_blocking(prompts, n, &[], |_, _| ControlFlow::Continue(())).unwrap();
    generated.into_iter().map(|g| g.tokens).collect()
}

#[test]
fn forks_and_rollbacks_continue_as_if_alone() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut decoder = decoder_with(&gpu, small(64));
    let prompt = tokens(21, 1);
    let alone = decoder.create_sequence();
    let expected =
        generate(&mut decoder, &[Prompt { sequence: alone, tokens: &prompt, sampling: Sampling::greedy() }], 8);

    // A fork in the middle of a block, which both then write into.
    let (last, shared) = prompt.split_last().unwrap();
    let base = decoder.create_sequence();
    gpu.block_on(decoder.step(&[Input::new(base, shared)])).unwrap();
    let fork = decoder.fork(base).unwrap();
    assert_eq!(decoder.tokens(fork).unwrap(), shared);
    assert!(decoder.usage().shared > 0);
    let other = tokens(3, 9);
    let prompts = [
        Prompt { sequence: base, tokens: std::slice::from_ref(last), sampling: Sampling::greedy() },
        Prompt { sequence: fork, tokens: &other, sampling: Sampling::greedy() },
    ];
    assert_eq!(generate(&mut decoder, &prompts, 8)[0], expected[0]);

    // Rolled back to the fork's point, the other one tells the same as well.
    decoder.truncate(fork, shared.len() as u32).unwrap();
    let again = Prompt { sequence: fork, tokens: std::slice::from_ref(last), sampling: Sampling::greedy() };
    assert_eq!(generate(&mut decoder, &[again], 8)[0], expected[0]);
    for sequence in [alone, base, fork] {
        decoder.free(sequence).unwrap();
    }
    assert_eq!(decoder.usage().used, 0);
}

/// Every cache format: logits near those of an F32 cache, the nearer the more bits there are, and a fork and a roll-back that change nothing.
#[test]
fn every_cache_format_tells_about_the_same() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let prompt = tokens(70, 3);
    let openings = [tokens(12, 5), tokens(9, 6)];
    let openings: Vec<_> = openings.iter().map(Vec::as_slice).collect();
    let mut exact = Vec::new();
    for formats in KvFormats::ALL {
        let mut decoder = decoder_with(
            &gpu,
            with(small(64), |c| {
                c.k_format = formats.k;
                c.v_format = formats.v;
            }),
        );
        let sequence = decoder.create_sequence();
        if formats.k.has_channel_scales() {
            let input = Input::new(sequence, &prompt);
            let error = gpu.block_on(decoder.step(&[input])).expect_err("not calibrated").to_string();
            assert!(error.contains("calibrate_keys"), "{error}");
            assert_eq!((decoder.tokens(sequence).unwrap().len(), decoder.usage().used), (0, 0));
            gpu.block_on(decoder.calibrate_keys_on_own_text(&openings, 60)).unwrap();
            // And again, with texts of the caller's.
            gpu.block_on(decoder.calibrate_keys(&[&prompt, openings[0]])).unwrap();
        }
        let mut all =
            |sequence, tokens| gpu.block_on(decoder.logits(&[(sequence, tokens)], LogitRows::All)).unwrap().remove(0);
        let logits = all(sequence, &prompt);
        if exact.is_empty() {
            exact = logits;
            continue;
        }
        let mean = exact.iter().sum::<f32>() / exact.len() as f32;
        let spread = (exact.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / exact.len() as f32).sqrt();
        let squares: f32 = exact.iter().zip(&logits).map(|(a, b)| (a - b).powi(2)).sum();
        let error = (squares / exact.len() as f32).sqrt() / spread;
        println!("{formats:18} {error:.1e} of the spread");
        // Halves have 11 significant bits, E4M3 has 4; the random weights make attention sharp, which enlarges both.
        let most = match formats.k.element_bits() {
            16 => 1e-2,
            8 => 0.2,
            _ => 0.8,
        };
        assert!(error > 0.0 && error < most, "{formats}: {error:.1e} of the spread");

        let fork = decoder.fork(sequence).unwrap();
        decoder.truncate(fork, 37).unwrap();
        let again = gpu.block_on(decoder.logits(&[(fork, &prompt[37..])], LogitRows::Last)).unwrap().remove(0);
        let last = &logits[logits.len() - again.len()..];
        let worst = again.iter().zip(last).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-4 * spread, "{formats}: {worst:.1e} after a roll-back");
        if formats.k.has_channel_scales() {
            let error = gpu.block_on(decoder.calibrate_keys(&[&prompt])).expect_err("sequences").to_string();
            assert!(error.contains("an empty cache"), "{error}");
        } else {
            let error = gpu.block_on(decoder.calibrate_keys(&[&prompt])).expect_err("no such scales").to_string();
            assert!(error.contains("a format with scales per channel"), "{error}");
        }
    }
}

#[test]
fn a_seed_gives_the_same_text_in_any_batch() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut decoder = decoder_with(&gpu, small(64));
    let sampling = with(Sampling::default(), |c| {
        c.temperature = 0.9;
        c.top_p = Some(0.95);
        c.repetition_penalty = 1.1;
        c.seed = 7;
    });
    let prompt = tokens(30, 2);
    let text = |decoder: &mut Decoder, neighbours: usize, sampling: Sampling| {
        let mut prompts = Vec::new();
        let others: Vec<_> = (0..neighbours).map(|i| tokens(5 + i as u32, 20 + i as u32)).collect();
        for other in &others {
            prompts.push(Prompt { sequence: decoder.create_sequence(), tokens: other, sampling: Sampling::greedy() });
        }
        prompts.push(Prompt { sequence: decoder.create_sequence(), tokens: &prompt, sampling });
        let generated = generate(decoder, &prompts, 16);
        for prompt in &prompts {
            decoder.free(prompt.sequence).unwrap();
        }
        generated[neighbours].clone()
    };
    let first = text(&mut decoder, 0, sampling);
    assert_eq!(text(&mut decoder, 0, sampling), first);
    assert_eq!(text(&mut decoder, 3, sampling), first);
    assert_ne!(text(&mut decoder, 0, with(sampling, |c| c.seed = 8)), first);
}

#[test]
fn generation_ends_where_it_should() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut decoder = decoder_with(&gpu, small(64));
    let prompt = tokens(10, 3);
    let sequence = decoder.create_sequence();
    // The penalty keeps a random model from saying one token for ever.
    let sampling = with(Sampling::greedy(), |c| c.repetition_penalty = 2.0);
    let greedy = Prompt { sequence, tokens: &prompt, sampling };
    let text = generate(&mut decoder, &[greedy], 6).remove(0);
    // The last token was sampled and not fed.
    assert_eq!(decoder.tokens(sequence).unwrap(), [&prompt[..], &text[..5]].concat());
    assert_eq!(decoder.pending(sequence).unwrap(), Some(text[5]));

    // The first token that hasn't come before, as the stop token.
    let at = (1..text.len()).find(|&i| !text[..i].contains(&text[i])).unwrap();
    decoder.truncate(sequence, 0).unwrap();
    let stopped =
        decoder.generate_blocking(&[greedy], 6, &[text[at]], |_, _| ControlFlow::Continue(())).unwrap().remove(0);
    assert_eq!((stopped.finish, &stopped.tokens[..]), (Finish::Stop, &text[..at]));
    assert_eq!(decoder.pending(sequence).unwrap(), Some(text[at]));

    decoder.truncate(sequence, 0).unwrap();
    let broken = decoder.generate_blocking(&[greedy], 6, &[], |_, _| ControlFlow::Break(())).unwrap().remove(0);
    assert_eq!((broken.finish, &broken.tokens[..]), (Finish::Interrupted, &text[..1]));

    let max = decoder.model().config().max_positions;
    decoder.truncate(sequence, 0).unwrap();
    let long = tokens(max - 2, 4);
    let full = Prompt { tokens: &long, ..greedy };
    let full = decoder.generate_blocking(&[full], 50, &[], |_, _| ControlFlow::Continue(())).unwrap().remove(0);
    assert_eq!((full.finish, full.tokens.len()), (Finish::Positions, 3));
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    // Room for 48 tokens, fewer than the model has positions.
    let mut decoder = decoder_with(&gpu, small(3));
    let max = decoder.model().config().max_positions;
    let vocab = decoder.model().config().vocab_size;
    let (a, b) = (decoder.create_sequence(), decoder.create_sequence());
    let prompt = tokens(20, 5);
    gpu.block_on(decoder.step(&[Input::new(a, &prompt)])).unwrap();
    let before = decoder.usage();
    let greedy = Sampling::greedy();

    let long = vec![1; max as usize + 1];
    type Batch<'a> = &'a [(SequenceId, &'a [u32])];
    let cases: [(&str, Batch<'_>, &str); 6] = [
        ("empty batch", &[], "batch"),
        ("empty prompt", &[(a, &[])], "tokens"),
        ("id outside the vocabulary", &[(b, &[1]), (a, &[1, vocab])], "tokens"),
        ("beyond the positions", &[(b, &long)], "tokens"),
        ("twice", &[(a, &[1]), (a, &[2])], "batch"),
        ("beyond the positions, together with what is there", &[(a, &long[..max as usize - 19])], "tokens"),
    ];
    for (what, batch, argument) in cases {
        let inputs: Vec<_> =
            batch.iter().map(|&(sequence, tokens)| Input::new(sequence, tokens).with_sampling(&greedy)).collect();
        match gpu.block_on(decoder.step(&inputs)) {
            Err(ModelError::Folio(Error::Argument { argument: got, .. })) => assert_eq!(got, argument, "{what}"),
            other => panic!("{what}: {other:?}"),
        }
        assert!(gpu.block_on(decoder.logits(batch, LogitRows::Last)).is_err(), "{what}");
    }
    for (sampling, field) in [
        (with(greedy, |c| c.temperature = -1.0), "temperature"),
        (with(greedy, |c| c.temperature = f32::NAN), "temperature"),
        (
            with(greedy, |c| {
                c.temperature = 1.0;
                c.top_p = Some(1.5);
            }),
            "top_p",
        ),
        (
            with(greedy, |c| {
                c.temperature = 1.0;
                c.top_k = Some(0);
            }),
            "top_k",
        ),
        (with(greedy, |c| c.repetition_penalty = 0.0), "repetition_penalty"),
    ] {
        let error = gpu.block_on(decoder.step(&[Input::new(b, &[1]).with_sampling(&sampling)])).unwrap_err();
        assert!(error.to_string().starts_with(field), "{error}");
    }

    // More than the pool has, noticed in the first step or only in a later one.
    for len in [40, 70] {
        let fits = tokens(len, 6);
        let error = gpu.block_on(decoder.step(&[Input::new(b, &fits).with_sampling(&greedy)])).unwrap_err();
        assert!(matches!(error, ModelError::Folio(Error::OutOfBlocks { .. })), "{error}");
        assert!(decoder.tokens(b).unwrap().is_empty());
    }
    let c = decoder.create_sequence();
    decoder.free(c).unwrap();
    let error = gpu.block_on(decoder.step(&[Input::new(c, &[1])])).unwrap_err();
    assert!(matches!(error, ModelError::Folio(Error::UnknownSequence(id)) if id == c), "{error}");

    assert_eq!(decoder.tokens(a).unwrap(), prompt);
    let now = decoder.usage();
    assert_eq!((now.used, now.free), (before.used, before.free));
    // And everything still works.
    assert_eq!(gpu.block_on(decoder.step(&[Input::new(a, &[1]).with_sampling(&greedy)])).unwrap().len(), 1);
}

/// A model whose embedding of one token is NaN.
struct Poisoned {
    row: usize,
}

impl WeightSource for Poisoned {
    fn rows(&self, source: &TensorSource, row_start: usize, out: &mut [f32]) -> ModelResult<()> {
        let [rows, columns] = source.shape();
        for (i, value) in out.iter_mut().enumerate() {
            let (row, column) = (row_start + i / columns, i % columns);
            *value = ((row * 37 + column * 11 + rows) % 101) as f32 / 101.0 - 0.5;
            if rows == 97 && row == self.row {
                *value = f32::NAN;
            }
        }
        Ok(())
    }
}

#[test]
fn a_future_that_is_dropped_half_way_changes_nothing() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut decoder = decoder_with(&gpu, small(16));
    let greedy = Sampling::greedy();
    // Two steps of 64 tokens at most: the first is committed, the second waits for its readback when it is dropped.
    let prompt = tokens(100, 8);
    let whole = decoder.create_sequence();
    let expected = gpu.block_on(decoder.step(&[Input::new(whole, &prompt).with_sampling(&greedy)])).unwrap();
    decoder.free(whole).unwrap();

    let sequence = decoder.create_sequence();
    let input = [Input::new(sequence, &prompt).with_sampling(&greedy)];
    {
        let mut step = Box::pin(decoder.step(&input));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(step.as_mut().poll(&mut context).is_pending(), "nobody polls the device");
    }
    assert!(decoder.tokens(sequence).unwrap().is_empty());
    assert_eq!(decoder.usage().used, 0);
    assert_eq!(gpu.block_on(decoder.step(&input)).unwrap(), expected);
}

const TINY: &str = r#"{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": false}"#;

#[test]
fn nan_logits_name_their_sequence() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let config = ModelConfig::from_json(TINY).unwrap();
    let weights = config.weights().unwrap();
    let options = ModelOptions::new(WeightFormat::F32);
    let model = Model::from_source_blocking(&gpu, config, &weights, &Poisoned { row: 96 }, options, |_| {}).unwrap();
    let mut decoder = Decoder::new_blocking(Arc::new(model), small(16)).unwrap();
    let (good, bad) = (decoder.create_sequence(), decoder.create_sequence());
    let greedy = Sampling::greedy();
    // Row 96 of the head is NaN as well: only a vocabulary of 97 rows has it, the head and the embedding. So every logit row has a NaN.
    let error = gpu.block_on(decoder.step(&[Input::new(good, &[1, 2]).with_sampling(&greedy)])).unwrap_err();
    assert!(matches!(error, ModelError::BadLogits { sequence } if sequence == good), "{error}");
    assert!(decoder.tokens(good).unwrap().is_empty());
    assert_eq!(decoder.usage().used, 0);
    let logits = gpu.block_on(decoder.logits(&[(good, &[1, 2]), (bad, &[96])], LogitRows::Last)).unwrap();
    assert!(logits[0][..96].iter().all(|x| x.is_finite()) && logits[0][96].is_nan());
    assert!(logits[1].iter().all(|x| x.is_nan()), "NaN comes out where it went in");
}

/// A model with one weight that no half can hold.
struct Overflowing;

impl WeightSource for Overflowing {
    fn rows(&self, source: &TensorSource, row_start: usize, out: &mut [f32]) -> ModelResult<()> {
        out.fill(0.5);
        if row_start == 0 && source.pieces()[0].tensor().contains("layers.1.self_attn.k_proj") {
            out[3] = 1e6;
        }
        Ok(())
    }
}

#[test]
fn weights_beyond_a_half_name_their_tensor() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let config = ModelConfig::from_json(TINY).unwrap();
    let weights = config.weights().unwrap();
    let load = |format| {
        let options = ModelOptions::new(format);
        Model::from_source_blocking(&gpu, config.clone(), &weights, &Overflowing, options, |_| {})
    };
    let error = load(WeightFormat::F16).unwrap_err().to_string();
    for part in ["1000000 at row 0, column 3", "model.layers.1.self_attn.k_proj.weight", "65504"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert!(load(WeightFormat::F32).is_ok());
    assert!(load(WeightFormat::INT8).is_ok());
}

#[test]
fn a_decoder_must_be_able_to_step() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = Model::load_blocking(&gpu, fixture("llama"), ModelOptions::default(), |_| {}).unwrap();
    let model = Arc::new(model);
    // The widest activation: queries, keys and values, each padded to 64, or the MLP's inside, or a hidden state.
    let config = model.config();
    let qkv = [config.q_width(), config.kv_width(), config.kv_width()].map(|width| width.next_multiple_of(64));
    let width = u64::from(config.hidden_size.max(config.intermediate_size)).max(qkv.iter().sum::<usize>() as u64);
    let limits = gpu.limits();
    let fits = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) / 16 * 16 / (4 * width);
    for (got, need) in [
        (0, "at least 1".to_owned()),
        (u32::MAX, format!("at most {fits} on this device")),
        (u32::try_from(fits + 1).unwrap(), format!("at most {fits} on this device")),
    ] {
        let options = with(small(4), |c| c.max_step_tokens = got);
        let error = Decoder::new_blocking(Arc::clone(&model), options).unwrap_err();
        assert!(matches!(error, ModelError::Folio(Error::Argument { argument: "max_step_tokens", .. })), "{error}");
        assert!(error.to_string().contains(&format!("got {got}, need {need}")), "{error}");
    }
}

/// Right drafts are kept, wrong ones leave nothing behind, and what goes on is the text of single steps.
#[test]
fn drafts_are_verified_and_taken_back() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for max_step_tokens in [64, 5] {
        let mut decoder = decoder_with(&gpu, with(small(64), |c| c.max_step_tokens = max_step_tokens));
        let prompt = tokens(21, 1);
        let sampling = with(Sampling::default(), |c| {
            c.seed = 4;
            c.repetition_penalty = 1.3;
        });
        let alone = decoder.create_sequence();
        let expected = generate(&mut decoder, &[Prompt { sequence: alone, tokens: &prompt, sampling }], 12);
        let expected = &expected[0];
        let wrong = (expected[3] + 1) % 90;
        for (right, drafts) in [
            (3, [&expected[..3], &[wrong, expected[4]]].concat()),
            (0, vec![(expected[0] + 1) % 90, expected[1]]),
            (6, expected[..6].to_vec()),
        ] {
            let free = decoder.usage().free;
            let sequence = decoder.create_sequence();
            let fed = [&prompt[..], &drafts].concat();
            let input = Input::new(sequence, &fed).with_sampling(&sampling).with_drafts(drafts.len() as u32);
            let drawn = gpu.block_on(decoder.draw(&[input.with_logprobs(2)])).unwrap().remove(0);
            assert_eq!(drawn.iter().map(|drawn| drawn.token).collect::<Vec<_>>(), expected[..=right]);
            assert!(drawn.iter().all(|drawn| drawn.logprob.as_ref().is_some_and(|logprob| logprob.top.len() == 2)));
            assert_eq!(decoder.tokens(sequence).unwrap(), [&prompt[..], &expected[..right]].concat());
            assert_eq!(decoder.pending(sequence).unwrap(), Some(expected[right]));
            // From the pending token on, with a draft behind it.
            let input = Input::new(sequence, &expected[right + 1..right + 2]).with_sampling(&sampling).with_drafts(1);
            let token = gpu.block_on(decoder.step(&[input])).unwrap()[0];
            assert_eq!(token, Some(expected[right + 2]));
            let rest = generate(&mut decoder, &[Prompt { sequence, tokens: &[], sampling }], 9 - right);
            assert_eq!(rest[0], expected[right + 3..]);
            decoder.free(sequence).unwrap();
            assert_eq!(decoder.usage().free, free);
        }
        // What may be drawn after each draft.
        let set = |tokens: &[u32]| {
            let mut set = vec![0_u32; decoder.model().config().vocab_size.div_ceil(32) as usize];
            tokens.iter().for_each(|token| set[*token as usize / 32] |= 1 << (token % 32));
            set
        };
        let sets = [set(&[expected[0], 7]), set(&[8, 9]), set(&[10])];
        let sequence = decoder.create_sequence();
        let fed = [&prompt[..], &[expected[0], 8]].concat();
        let input = Input::new(sequence, &fed).with_drafts(2).with_allowed(&sets);
        for seed in 0..5 {
            let sampling = with(Sampling::default(), |c| (c.seed, c.temperature) = (seed, 2.0));
            let drawn = gpu.block_on(decoder.draw(&[input.with_sampling(&sampling)])).unwrap().remove(0);
            let drawn: Vec<_> = drawn.iter().map(|drawn| drawn.token).collect();
            assert!([7, expected[0]].contains(&drawn[0]), "{drawn:?}");
            assert!(
                drawn.get(1).is_none_or(|token| [8, 9].contains(token))
                    && drawn.get(2).is_none_or(|&token| token == 10)
            );
            decoder.truncate(sequence, 0).unwrap();
        }
        let greedy = Sampling::greedy();
        let bad = |decoder: &mut Decoder, input: Input<'_>, argument: &str| {
            let error = gpu.block_on(decoder.draw(&[input])).unwrap_err().to_string();
            assert!(error.starts_with(argument), "{error}");
        };
        let (three, sampled) =
            (Input::new(sequence, &[1, 2, 3]), Input::new(sequence, &[1, 2, 3]).with_sampling(&greedy));
        bad(&mut decoder, three.with_drafts(1), "drafts");
        bad(&mut decoder, sampled.with_drafts(3), "drafts");
        bad(&mut decoder, sampled.with_drafts(u32::MAX), "drafts");
        bad(&mut decoder, sampled.with_drafts(2).with_replayed(2), "replayed");
        bad(&mut decoder, three.with_replayed(u32::MAX), "replayed");
        bad(&mut decoder, sampled.with_allowed(&sets), "allowed");
        bad(&mut decoder, three.with_allowed(&sets[..1]), "allowed");
        bad(&mut decoder, sampled.with_allowed(&[vec![1]]), "allowed");
        let none = vec![vec![0; sets[0].len()]];
        let error = gpu.block_on(decoder.draw(&[sampled.with_allowed(&none)])).unwrap_err();
        assert!(matches!(error, ModelError::BadLogits { .. }), "{error}");
        assert!(decoder.tokens(sequence).unwrap().is_empty());
    }
}

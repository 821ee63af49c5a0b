//! Requests end in all the ways there are; what they held is free then.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use folio::engine::{EndReason, Engine, EngineOptions, Event, Request, SubmitError};
use folio::model::Sampling;
use folio::schedule::Refusal;
use folio::{ErrorKind, GpuOptions, KvFormat};

use super::{PATIENCE, TOKENIZER, collect, decoder, drawn, engine, load, options, prompt};

fn step(engine: &mut Engine) {
    let gpu = engine.gpu().clone();
    gpu.block_on(engine.step()).unwrap();
}

fn is_free(engine: &Engine) -> bool {
    let usage = engine.decoder().usage();
    usage.sequences == 0 && usage.free == usage.total
}

#[test]
fn dropping_an_answer_frees_its_blocks_within_a_step() {
    let Some(decoder) = decoder(32, KvFormat::F32, false) else { return };
    let mut engine = engine(decoder, EngineOptions::default());
    let keep = engine.submit(Request::new(prompt("The cat"), 20)).unwrap();
    let cancelled = engine.submit(Request::new(prompt("A bird"), 200)).unwrap();
    let waiting = engine.submit(Request::new(prompt("A dog"), 200)).unwrap();
    drop(waiting);
    step(&mut engine);
    assert_eq!(engine.decoder().usage().sequences, 2);
    drop(cancelled);
    step(&mut engine);
    assert_eq!((engine.decoder().usage().sequences, engine.num_requests()), (1, 1));
    engine.run_blocking().unwrap();
    assert_eq!(collect(keep).tokens.len(), 20);
    assert!(is_free(&engine));
}

#[test]
fn stop_strings_and_stop_tokens_end_answers_without_leaking() {
    let Some(decoder) = decoder(32, KvFormat::F32, false) else { return };
    let mut engine = engine(decoder, EngineOptions::default());
    let mut run = |request: Request| {
        let answer = engine.submit(request).unwrap();
        engine.run_blocking().unwrap();
        collect(answer)
    };
    let whole = run(Request::new(prompt("Once upon a time"), 60));
    assert_eq!(whole.reason, EndReason::Length);
    assert!(whole.text.len() > 80, "{:?}", whole.text);
    // A stop in the middle of words, across tokens.
    let from = whole.text.char_indices().nth(41).unwrap().0;
    let to = whole.text.char_indices().nth(48).unwrap().0;
    let stop = whole.text[from..to].to_owned();
    let stopped = run(Request::new(prompt("Once upon a time"), 60).with_stops([], [stop.clone(), "never".to_owned()]));
    assert_eq!(stopped.reason, EndReason::StopString(stop.clone()));
    assert_eq!(stopped.text, whole.text[..whole.text.find(&stop).unwrap()]);
    assert!(whole.tokens.starts_with(&stopped.tokens));
    let token = whole.tokens[17];
    let first = whole.tokens.iter().position(|&t| t == token).unwrap();
    let stopped = run(Request::new(prompt("Once upon a time"), 60).with_stops([token], []));
    assert_eq!((stopped.reason, stopped.tokens), (EndReason::StopToken(token), whole.tokens[..first].to_vec()));
}

#[test]
fn an_answer_ends_where_the_model_has_no_more_positions() {
    let Some(decoder) = decoder(200, KvFormat::F16, false) else { return };
    let positions = decoder.model().config().max_positions;
    let mut engine = engine(decoder, EngineOptions::default());
    let long = vec![5; positions as usize - 3];
    let answer = engine.submit(Request::new(long, 50)).unwrap();
    let full = engine.submit(Request::new(vec![5; positions as usize], 50)).unwrap();
    engine.run_blocking().unwrap();
    for (answer, tokens) in [(answer, 4), (full, 1)] {
        let collected = collect(answer);
        assert_eq!((collected.reason, collected.tokens.len()), (EndReason::Positions, tokens));
    }
}

#[test]
fn what_breaks_a_rule_is_refused_and_changes_nothing() {
    let Some(decoder) = decoder(10, KvFormat::F32, false) else { return };
    let vocab = decoder.model().config().vocab_size;
    let mut engine = engine(decoder, options(|o| o.max_queued = 1));
    let mut invalid = |request: Request, name: &str| match engine.submit(request) {
        Err(SubmitError::Invalid(error)) => {
            assert_eq!(error.kind(), ErrorKind::Caller);
            assert!(error.to_string().starts_with(name), "{error}");
        }
        other => panic!("{other:?}"),
    };
    invalid(Request::new([], 5), "prompt");
    invalid(Request::new([vocab], 5), "prompt");
    invalid(Request::new(vec![1; 100_000], 5), "prompt");
    invalid(Request::new([1], 5).with_stops([], [String::new()]), "stop_strings");
    invalid(Request::new([1], 0), "max_tokens");
    invalid(Request::new([1], 5).with_time_limit(Duration::ZERO), "time_limit");
    let mut hot = Sampling::greedy();
    hot.temperature = f32::NAN;
    invalid(Request::new([1], 5).with_sampling(hot), "temperature");
    let mut refused = |request: Request| match engine.submit(request) {
        Err(SubmitError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };

    assert_eq!(refused(Request::new([1], 81)), Refusal::TooLong { need: 11, have: 10 });

    let answer = engine.submit(Request::new([1], 5)).unwrap();
    assert!(matches!(engine.submit(Request::new([1], 5)), Err(SubmitError::Refused(Refusal::QueueFull(1)))));
    engine.run_blocking().unwrap();
    assert_eq!(collect(answer).tokens.len(), 5);
    assert!(is_free(&engine));
    // Without a tokenizer there is no text to stop at.
    let mut engine = Engine::new(engine.shutdown(), None, EngineOptions::default()).unwrap();
    let stops = Request::new([1], 5).with_stops([], ["x".to_owned()]);
    assert!(matches!(engine.submit(stops), Err(SubmitError::Invalid(_))));
    let mut decoder = engine.shutdown();
    let _ = decoder.create_sequence();
    let error = Engine::new(decoder, None, EngineOptions::default()).unwrap_err();
    assert!(error.to_string().starts_with("decoder: got 1 sequences"), "{error}");
}

#[test]
fn a_time_limit_ends_a_request_and_only_that_one() {
    let Some(decoder) = decoder(64, KvFormat::F32, false) else { return };
    let mut engine = engine(decoder, EngineOptions::default());
    let late = engine.submit(Request::new([1], 400).with_time_limit(Duration::from_millis(30))).unwrap();
    let other = engine.submit(Request::new([1], 10)).unwrap();
    let start = Instant::now();
    engine.run_blocking().unwrap();
    assert!(start.elapsed() < PATIENCE);
    let late = collect(late);
    assert!(late.reason == EndReason::TimeLimit && late.tokens.len() < 399, "{late:?}");
    assert_eq!(collect(other).tokens.len(), 10);
    assert!(is_free(&engine));
}

#[test]
fn a_step_that_is_dropped_half_way_loses_nothing() {
    let Some(decoder) = decoder(32, KvFormat::F32, false) else { return };
    let mut engine = engine(decoder, EngineOptions::default());
    let request = Request::new(prompt("Tom and Lily went to the park"), 25).with_sampling(drawn(3));
    let whole = engine.submit(request.clone()).unwrap();
    engine.run_blocking().unwrap();
    let answer = engine.submit(request).unwrap();
    for _ in 0..4 {
        step(&mut engine);
        let mut context = Context::from_waker(Waker::noop());
        assert!(pin!(engine.step()).poll(&mut context).is_pending(), "nobody polls the device");
    }
    engine.run_blocking().unwrap();
    assert_eq!(collect(answer).tokens, collect(whole).tokens);
    assert!(is_free(&engine));
}

#[test]
fn a_lost_device_ends_all_requests() {
    if super::MODEL.is_none() {
        return;
    }
    let gpu = folio::Gpu::open_blocking(GpuOptions::default()).unwrap();
    let mut decoder_options = folio::model::DecoderOptions::default();
    decoder_options.num_blocks = 16;
    let decoder = folio::model::Decoder::new_blocking(load(&gpu).into(), decoder_options).unwrap();
    let mut engine = engine(decoder, EngineOptions::default());
    let answers = [1, 2].map(|token| engine.submit(Request::new([token], 50)).unwrap());
    step(&mut engine);
    gpu.device().destroy();
    let error = gpu.block_on(engine.step()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeviceLost);
    for answer in answers {
        let EndReason::Failed(failure) = collect(answer).reason else { panic!("it has failed") };
        assert_eq!(failure.kind, ErrorKind::DeviceLost);
    }
    assert!(engine.is_idle());
}

#[test]
fn a_spawned_engine_serves_many_threads() {
    let Some(decoder) = decoder(48, KvFormat::F32, true) else { return };
    let handle = Engine::new(decoder, Some(TOKENIZER.clone()), EngineOptions::default()).unwrap().spawn().unwrap();
    let texts: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|i| {
                let client = handle.client();
                scope.spawn(move || {
                    let request = Request::new(prompt("The cat"), 10 + i % 2);
                    let mut answer = client.submit_blocking(request).unwrap();
                    let mut text = String::new();
                    while let Some(event) = answer.next_blocking() {
                        match event {
                            Event::Token { text: piece, .. } => text += &piece,
                            Event::End { reason, text: rest, .. } => {
                                assert_eq!(reason, EndReason::Length);
                                text += &rest;
                            }
                            _ => unreachable!("there are two kinds of events"),
                        }
                    }
                    text
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(texts.iter().step_by(2).all(|text| *text == texts[0] && !text.is_empty()), "{texts:?}");
    // A request that nobody finishes doesn't keep the engine.
    let client = handle.client();
    let answer = client.submit_blocking(Request::new([1], 300)).unwrap();
    let decoder = handle.shutdown().unwrap();
    assert_eq!(decoder.usage().sequences, 0);
    assert_eq!(collect(answer).reason, EndReason::Shutdown);
    assert!(matches!(client.submit_blocking(Request::new([1], 3)), Err(SubmitError::Shutdown)));
    // What is there is finished first.
    let handle = Engine::new(decoder, None, EngineOptions::default()).unwrap().spawn().unwrap();
    let answer = handle.client().submit_blocking(Request::new([1], 30)).unwrap();
    handle.finish().unwrap();
    assert_eq!(collect(answer).tokens.len(), 30);
}

#[test]
fn a_spawned_engine_is_looked_into_and_takes_many_answers_at_once() {
    let Some(decoder) = decoder(48, KvFormat::F32, false) else { return };
    let limits = options(|o| o.max_queued = 4);
    let handle = Engine::new(decoder, Some(TOKENIZER.clone()), limits).unwrap().spawn().unwrap();
    let client = handle.client();
    let idle = client.inspect_blocking().unwrap();
    assert_eq!((idle.requests.len(), idle.blocks.len()), (0, 48));
    assert!(idle.blocks.iter().all(|block| block.holders == 0));
    assert!(client.is_running() && client.failure().is_none());

    let request = Request::new(prompt("The cat"), 300).with_sampling(drawn(5));
    let refused = pollster::block_on(client.submit_many(request.clone(), 5));
    assert!(matches!(refused, Err(SubmitError::Invalid(_))), "{refused:?}");
    let answers = pollster::block_on(client.submit_many(request, 3)).unwrap();
    let start = Instant::now();
    let busy = loop {
        let busy = client.inspect_blocking().unwrap();
        if busy.requests.len() == 3 && busy.requests.iter().all(|request| request.new_tokens > 0) {
            break busy;
        }
        assert!(start.elapsed() < PATIENCE, "{:?}", busy.requests);
    };
    assert!(busy.blocks.iter().any(|block| block.holders > 0));
    drop(answers);
    while !client.inspect_blocking().unwrap().requests.is_empty() {
        assert!(start.elapsed() < PATIENCE);
    }
    let after = client.inspect_blocking().unwrap();
    assert!(after.blocks.iter().all(|block| block.holders == 0));
    handle.shutdown().unwrap();
    assert!(matches!(client.inspect_blocking(), Err(SubmitError::Shutdown)));
    assert!(!client.is_running() && client.failure().is_none());
}

#[test]
fn clients_of_a_spawned_engine_learn_why_it_has_ended() {
    if super::MODEL.is_none() {
        return;
    }
    // A device of its own, as it is destroyed.
    let gpu = folio::Gpu::open_blocking(GpuOptions::default()).unwrap();
    let mut decoder_options = folio::model::DecoderOptions::default();
    decoder_options.num_blocks = 64;
    let decoder = folio::model::Decoder::new_blocking(load(&gpu).into(), decoder_options).unwrap();
    let handle = engine(decoder, EngineOptions::default()).spawn().unwrap();
    let client = handle.client();
    let mut answer = client.submit_blocking(Request::new([1], 900)).unwrap();
    assert!(matches!(answer.next_blocking(), Some(Event::Token { .. })));
    gpu.device().destroy();
    let reason = loop {
        if let Event::End { reason, .. } = answer.next_blocking().expect("an end") {
            break reason;
        }
    };
    let EndReason::Failed(failure) = reason else { panic!("{reason:?}") };
    assert_eq!(failure.kind, ErrorKind::DeviceLost);
    let start = Instant::now();
    while client.is_running() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    assert_eq!(client.failure(), Some(&failure));
    assert!(matches!(client.submit_blocking(Request::new([1], 3)), Err(SubmitError::Shutdown)));
    assert!(matches!(client.inspect_blocking(), Err(SubmitError::Shutdown)));
    assert_eq!(handle.finish().unwrap_err().kind(), ErrorKind::DeviceLost);
}

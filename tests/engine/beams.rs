//! Beam search, against one that computes every text from its beginning.

use folio::KvFormat;
use folio::engine::{EndReason, EngineOptions, Request, SubmitError};
use folio::model::{Decoder, LogitRows};
use folio::schedule::Refusal;

use super::{collect, decoder, drawn, engine, options, prompt};

/// The story model's token for the end of a text.
const END: u32 = 1;

/// Log-probabilities of what may follow each text.
fn logprobs(decoder: &mut Decoder, texts: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let gpu = decoder.gpu().clone();
    let sequences: Vec<_> = texts.iter().map(|_| decoder.create_sequence()).collect();
    let batch: Vec<_> = sequences.iter().copied().zip(texts.iter().map(Vec::as_slice)).collect();
    let rows = gpu.block_on(decoder.logits(&batch, LogitRows::Last)).unwrap();
    sequences.into_iter().for_each(|sequence| decoder.free(sequence).unwrap());
    let softmax = |row: Vec<f32>| {
        let log_sum = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        row.into_iter().map(|x| f64::from(x) - log_sum).collect()
    };
    rows.into_iter().map(softmax).collect()
}

/// The best text's new tokens, and whether it ended with a stop token.
fn reference(decoder: &mut Decoder, prompt: &[u32], width: usize, max_tokens: usize) -> (Vec<u32>, bool) {
    let mut live = vec![(Vec::new(), 0.0)];
    let mut ended: Vec<(Vec<u32>, f64)> = Vec::new();
    for _ in 0..max_tokens {
        let texts: Vec<_> = live.iter().map(|(tokens, _)| [prompt, tokens].concat()).collect();
        let mut candidates = Vec::new();
        for ((tokens, score), row) in live.iter().zip(logprobs(decoder, &texts)) {
            candidates.extend(row.iter().enumerate().map(|(token, x)| (tokens.clone(), token as u32, score + x)));
        }
        candidates.sort_by(|a, b| b.2.total_cmp(&a.2));
        live.clear();
        for (rank, (mut tokens, token, score)) in candidates.into_iter().enumerate() {
            if live.len() == width {
                break;
            }
            if token != END {
                tokens.push(token);
                live.push((tokens, score));
            } else if rank < width {
                ended.push((tokens, score));
            }
        }
        if ended.len() >= width {
            break;
        }
    }
    let stopped = ended.iter().map(|(tokens, score)| (tokens, score / (tokens.len() + 1) as f64, true));
    let cut = live.iter().map(|(tokens, score)| (tokens, score / tokens.len() as f64, false));
    let cut: Vec<_> = if ended.len() < width { cut.collect() } else { Vec::new() };
    let best = stopped.chain(cut).max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    (best.0.clone(), best.2)
}

#[test]
fn the_best_text_is_found_alone_and_in_company() {
    let Some(mut decoder_alone) = decoder(200, KvFormat::F32, false) else { return };
    let texts = [
        "Once upon a time",
        "Mia hid the key. The end.",
        "Tom and Lily went to the park. They saw a big tree and",
        "The",
    ];
    let mut wanted = Vec::new();
    let mut num_stopped = 0;
    for (i, text) in texts.into_iter().enumerate() {
        let (width, max_tokens) = ([4, 3, 2, 5][i], [12, 10, 9, 11][i]);
        let prompt = prompt(text);
        let (tokens, stopped) = reference(&mut decoder_alone, &prompt, width, max_tokens);
        num_stopped += u32::from(stopped);
        let request = Request::new(prompt, max_tokens as u32).with_beams(width as u32).with_stops([END], []);
        wanted.push((request, tokens, stopped));
    }
    assert!(num_stopped > 0, "a text ends with the stop token");
    // 40 blocks of 8 tokens are few for all of them.
    for (blocks, prefix_cache, step_tokens) in [(200, false, 64), (40, true, 9)] {
        let decoder = decoder(blocks, KvFormat::F32, prefix_cache).unwrap();
        let mut engine = engine(decoder, options(|o| o.max_step_tokens = Some(step_tokens)));
        let mut others = Vec::new();
        let mut answers = Vec::new();
        for (i, (request, ..)) in wanted.iter().enumerate() {
            others.push(engine.submit(Request::new(prompt(texts[i]), 30).with_sampling(drawn(i as u64))).unwrap());
            answers.push(engine.submit(request.clone()).unwrap());
        }
        let gpu = engine.gpu().clone();
        for _ in 0..6 {
            gpu.block_on(engine.step()).unwrap();
        }
        let held = engine.inspect().blocks.iter().filter(|block| block.holders > 0).count() as u32;
        let usage = engine.decoder().usage();
        assert!(held > 0 && held == usage.used - usage.reclaimable, "{held} held: {usage:?}");
        engine.run_blocking().unwrap();
        for (answer, (request, tokens, stopped)) in answers.into_iter().zip(&wanted) {
            let answer = collect(answer);
            assert_eq!(&answer.tokens, tokens, "{request:?}");
            let reason = if *stopped { EndReason::StopToken(END) } else { EndReason::Length };
            assert_eq!((answer.reason, answer.usage.preemptions), (reason, 0));
            assert!(answer.logprobs.iter().all(Option::is_none));
        }
        assert!(others.into_iter().all(|other| collect(other).tokens.len() == 30));
        let usage = engine.decoder().usage();
        assert_eq!((usage.sequences, usage.free + usage.reclaimable), (0, blocks));
    }
}

#[test]
fn a_search_ends_in_all_ways_and_leaves_nothing() {
    let Some(first) = decoder(30, KvFormat::F32, false) else { return };
    let mut engine = engine(first, EngineOptions::default());
    let gpu = engine.gpu().clone();
    let request = Request::new(prompt("Once upon a time"), 20).with_beams(4);
    // Cancelled in the middle, and dropped in the middle of a step: it starts again.
    let cancelled = engine.submit(request.clone()).unwrap();
    let answer = engine.submit(request.clone().with_logprobs(1)).unwrap();
    for _ in 0..4 {
        gpu.block_on(engine.step()).unwrap();
    }
    assert!(engine.decoder().usage().sequences > 4);
    drop(cancelled);
    {
        let mut step = std::pin::pin!(engine.step());
        let _ = std::future::Future::poll(step.as_mut(), &mut std::task::Context::from_waker(std::task::Waker::noop()));
    }
    engine.run_blocking().unwrap();
    let answer = collect(answer);
    assert_eq!(answer.tokens.len(), 20);
    assert!(answer.logprobs.iter().all(|logprob| logprob.as_ref().is_some_and(|logprob| logprob.top.len() == 1)));
    let again = engine.submit(request.clone()).unwrap();
    engine.run_blocking().unwrap();
    assert_eq!(collect(again).tokens, answer.tokens);
    let usage = engine.decoder().usage();
    assert_eq!((usage.sequences, usage.free), (0, 30));
    // What can't be.
    for bad in [request.clone().with_sampling(drawn(1)), request.clone().with_beams(600)] {
        assert!(matches!(engine.submit(bad), Err(SubmitError::Invalid(_))));
    }
    assert!(matches!(engine.submit(request.clone().with_beams(0)), Err(SubmitError::Refused(Refusal::Empty("beams")))));
    assert!(matches!(
        engine.submit(request.clone().with_beams(40)),
        Err(SubmitError::Refused(Refusal::TooLong { .. }))
    ));
    assert!(matches!(engine.submit(request.with_beams(100)), Err(SubmitError::Refused(Refusal::TooWide { .. }))));
}

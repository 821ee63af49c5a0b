//! The same tokens, alone and in company.

use fastrand::Rng;
use folio::KvFormat;
use folio::engine::{EndReason, EngineOptions, Request};

use super::{collect, decoder, drawn, engine, options, prompt};

const OPENINGS: [&str; 6] = [
    "Once upon a time there was a girl named Anna. She had a dog",
    "Tom and Lily went to the park. They saw a big tree and",
    "The cat",
    "One day, a little boy found a red ball in the garden. He wanted to play with it, but it was wet. So he",
    "There was an old house on the hill. Nobody lived there, but every night a light shone in the window and the children",
    "A bird",
];

fn requests(rng: &mut Rng, count: usize) -> Vec<Request> {
    let requests = (0..count).map(|i| {
        let opening = OPENINGS[rng.usize(..OPENINGS.len())];
        Request::new(prompt(opening), rng.u32(1..40)).with_sampling(drawn(i as u64)).with_priority(rng.i32(0..2))
    });
    requests.collect()
}

/// Each request on its own, in an engine with room for everything.
fn alone(requests: &[Request], format: KvFormat) -> Option<Vec<Vec<u32>>> {
    let mut engine = engine(decoder(64, format, false)?, EngineOptions::default());
    let run = |request: &Request| {
        let answer = engine.submit(request.clone()).unwrap();
        engine.run_blocking().unwrap();
        let collected = collect(answer);
        assert_eq!(collected.reason, EndReason::Length);
        collected.tokens
    };
    Some(requests.iter().map(run).collect())
}

/// The same in a small cache, arriving at random: chunked prompts, preemptions of both kinds, prefixes from the index.
#[test]
fn tokens_do_not_depend_on_company_preemption_or_prefixes() {
    let mut preempted = [0; 2];
    let mut cached = 0;
    for (seed, format) in [(1, KvFormat::F32), (2, KvFormat::F16), (3, KvFormat::F32), (4, KvFormat::Int8)] {
        let mut rng = Rng::with_seed(seed);
        let requests = requests(&mut rng, 16);
        let Some(expected) = alone(&requests, format) else { return };
        for (prefix_cache, swapped_bytes) in [(false, 0), (false, 1 << 30), (true, 1 << 30)] {
            let decoder = decoder(14, format, prefix_cache).unwrap();
            let options = options(|o| {
                o.max_swapped_bytes = swapped_bytes;
                o.max_step_tokens = Some(rng.u32(3..40));
            });
            let mut engine = engine(decoder, options);
            let mut answers = Vec::new();
            for request in &requests {
                answers.push(engine.submit(request.clone()).unwrap());
                for _ in 0..rng.u32(0..6) {
                    let gpu = engine.gpu().clone();
                    gpu.block_on(engine.step()).unwrap();
                }
            }
            engine.run_blocking().unwrap();
            for ((answer, request), tokens) in answers.into_iter().zip(&requests).zip(&expected) {
                let collected = collect(answer);
                assert_eq!(&collected.tokens, tokens, "{format:?}, prefix cache {prefix_cache}: {request:?}");
                preempted[usize::from(swapped_bytes > 0)] += collected.usage.preemptions;
                cached += collected.usage.cached_tokens;
            }
            let usage = engine.decoder().usage();
            assert_eq!((usage.sequences, usage.free + usage.reclaimable), (0, 14));
        }
    }
    assert!(preempted[0] > 0 && preempted[1] > 0 && cached > 0, "{preempted:?} preemptions, {cached} cached tokens");
}

/// Requests that share a prompt and come together compute it once.
#[test]
fn a_prompt_that_many_share_is_computed_once() {
    let Some(decoder) = decoder(64, KvFormat::F32, true) else { return };
    let mut engine = engine(decoder, EngineOptions::default());
    let shared = prompt(OPENINGS[4]);
    let len = shared.len() as u32;
    let answers: Vec<_> =
        (0..8).map(|i| engine.submit(Request::new(shared.clone(), 4).with_sampling(drawn(i))).unwrap()).collect();
    engine.run_blocking().unwrap();
    let full = (len - 1) / 8 * 8;
    let usages: Vec<_> = answers.into_iter().map(|answer| collect(answer).usage).collect();
    assert_eq!(usages[0].cached_tokens, 0);
    assert!(usages[1..].iter().all(|usage| usage.cached_tokens == full), "{usages:?}");
    let computed: u32 = usages.iter().map(|usage| usage.computed_tokens).sum();
    assert_eq!(computed, len + 7 * (len - full) + 8 * 3);
}

/// Several answers to a prompt are those of single requests with their seeds, and fork the prompt.
#[test]
fn many_answers_fork_one_prompt() {
    let Some(decoder) = decoder(64, KvFormat::F32, false) else { return };
    let mut engine = engine(decoder, EngineOptions::default());
    let request = Request::new(prompt(OPENINGS[3]), 15).with_sampling(drawn(7));
    let len = request.prompt.len() as u32;
    let answers = engine.submit_many(request.clone(), 5).unwrap();
    let gpu = engine.gpu().clone();
    gpu.block_on(engine.step()).unwrap();
    gpu.block_on(engine.step()).unwrap();
    let inspection = engine.inspect();
    let shared = inspection.blocks.iter().filter(|block| block.holders == 5).count() as u32;
    assert_eq!(shared, (len - 1) / 8, "full blocks of the prompt are shared: {inspection:?}");
    engine.run_blocking().unwrap();
    let many: Vec<_> = answers.into_iter().map(collect).collect();
    for (i, answer) in many.iter().enumerate() {
        assert_eq!(answer.usage.cached_tokens, if i == 0 { 0 } else { len - 1 });
        let alone = engine.submit(request.clone().with_sampling(drawn(7 + i as u64))).unwrap();
        engine.run_blocking().unwrap();
        assert_eq!(collect(alone).tokens, answer.tokens);
    }
    assert!(many[1..].iter().any(|answer| answer.tokens != many[0].tokens));
    let usage = engine.decoder().usage();
    assert_eq!((usage.sequences, usage.free), (0, 64));
    assert!(engine.submit_many(request, 0).is_err());
}

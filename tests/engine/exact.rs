//! An exact model: the bits of a sequence's logits don't depend on what runs beside it, nor on how its tokens came to the cache.

use std::sync::{Arc, LazyLock};

use fastrand::Rng;
use folio::KvFormat;
use folio::engine::{DraftModel, Engine, EngineOptions, PromptLookup, Request};
use folio::model::{Decoder, DecoderOptions, LogitRows, Model, ModelOptions, WeightFormat};

use super::{Collected, adapter, collect, drawn, engine, options, prompt, stories};

fn exact_decoder(how: adapter::Open, weights: WeightFormat, format: KvFormat) -> Option<Decoder> {
    let gpu = adapter::open(how)?;
    let model = Model::load_blocking(&gpu, stories(), ModelOptions::new(weights).with_exact(true), |_| {}).unwrap();
    let mut options = DecoderOptions::default();
    (options.num_blocks, options.block_size) = (800, 8);
    (options.k_format, options.v_format) = (format, format);
    Some(Decoder::new_blocking(Arc::new(model), options).unwrap())
}

/// Bits of the logits after `text`, fed up to its last token in chunks of `chunk`; the last one is computed together with those of `company` others.
fn logits(decoder: &mut Decoder, text: &[u32], chunk: usize, company: usize) -> Vec<u32> {
    let gpu = decoder.gpu().clone();
    let (last, before) = text.split_last().unwrap();
    let own = decoder.create_sequence();
    for tokens in before.chunks(chunk) {
        gpu.block_on(decoder.logits(&[(own, tokens)], LogitRows::Last)).unwrap();
    }
    let mut sequences = vec![own];
    for i in 0..company {
        let sequence = decoder.create_sequence();
        // Of other lengths, too.
        let tokens = [&vec![i as u32 + 5; 1 + 7 * (i % 16)][..], before].concat();
        gpu.block_on(decoder.logits(&[(sequence, &tokens)], LogitRows::Last)).unwrap();
        sequences.push(sequence);
    }
    let batch: Vec<_> = sequences.iter().map(|&sequence| (sequence, std::slice::from_ref(last))).collect();
    let rows = gpu.block_on(decoder.logits(&batch, LogitRows::Last)).unwrap();
    for sequence in sequences {
        decoder.free(sequence).unwrap();
    }
    rows[0].iter().map(|value| value.to_bits()).collect()
}

#[test]
fn logits_have_the_same_bits_alone_and_in_any_batch() {
    let text = prompt("Once upon a time there was a girl named Anna. She had a dog and");
    let cases = [
        (adapter::DEFAULT, WeightFormat::F32, KvFormat::F32),
        (adapter::DEFAULT, WeightFormat::Int8 { group_size: 32 }, KvFormat::F16),
        (adapter::CPU_PLAIN, WeightFormat::F16, KvFormat::F16),
        (adapter::GPU, WeightFormat::F32, KvFormat::F16),
        (adapter::GPU_PLAIN, WeightFormat::F16, KvFormat::F32),
    ];
    for (how, weights, format) in cases {
        let Some(mut decoder) = exact_decoder(how, weights, format) else { return };
        let before = text.len() - 1;
        let alone = logits(&mut decoder, &text, before, 0);
        // Two adapters are enough for so many.
        let most = if how == adapter::DEFAULT { 64 } else { 15 };
        for company in [1, 2, 3, 7, 15, 64].into_iter().filter(|&company| company <= most) {
            let bits = logits(&mut decoder, &text, before, company);
            let differ = bits.iter().zip(&alone).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{how:?}, {weights}, {format}: {company} beside it");
        }
        for chunk in [1, 2, 5, 11] {
            let bits = logits(&mut decoder, &text, chunk, 0);
            let differ = bits.iter().zip(&alone).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{how:?}, {weights}, {format}: chunks of {chunk}");
        }
    }
}

static EXACT: LazyLock<Option<Arc<Model>>> = LazyLock::new(|| {
    let gpu = adapter::open(adapter::DEFAULT)?;
    let options = ModelOptions::new(WeightFormat::F32).with_exact(true);
    Some(Arc::new(Model::load_blocking(&gpu, stories(), options, |_| {}).unwrap()))
});

/// Blocks of 8 tokens.
fn decoder(num_blocks: u32, format: KvFormat, prefix_cache: bool) -> Option<Decoder> {
    let mut options = DecoderOptions::default();
    (options.num_blocks, options.block_size, options.max_step_tokens) = (num_blocks, 8, 64);
    (options.k_format, options.v_format, options.prefix_cache) = (format, format, prefix_cache);
    if format.has_channel_scales() {
        options.v_format = KvFormat::Int8;
    }
    let mut decoder = Decoder::new_blocking(Arc::clone(EXACT.as_ref()?), options).unwrap();
    if format.has_channel_scales() {
        let gpu = decoder.gpu().clone();
        let text = prompt("Once upon a time there was a boy named Tom. He had a cat.");
        gpu.block_on(decoder.calibrate_keys(&[&text])).unwrap();
    }
    Some(decoder)
}

/// Requests that often share a beginning, and some that repeat themselves.
fn requests(rng: &mut Rng, count: u64) -> Vec<Request> {
    const TEXT: &str = "Once upon a time there was a girl named Anna. She had a dog and a red ball. The dog liked the ball and the ball \
        was red. The dog and the ball and the dog and";
    let text = prompt(TEXT);
    let request = |seed| {
        let len = rng.usize(1..=text.len());
        let mut sampling = drawn(seed);
        match rng.u32(..3) {
            0 => sampling.repetition_penalty = 1.2,
            // These repeat themselves sooner or later.
            1 => sampling.temperature = 0.0,
            _ => {}
        }
        let new_tokens = if rng.bool() { rng.u32(1..20) } else { 45 };
        Request::new(&text[..len], new_tokens).with_sampling(sampling).with_priority(rng.i32(0..2)).with_logprobs(TOP)
    };
    (0..count).map(request).collect()
}

/// All of the vocabulary: with its log-probabilities equal to the bit, so are the logits but for what rounds away in the subtraction of one number.
const TOP: u32 = 1024;

/// Each request in an engine that has it alone, token by token.
fn alone(format: KvFormat, requests: &[Request]) -> Option<Vec<Collected>> {
    let mut engine = engine(decoder(64, format, false)?, EngineOptions::default());
    let run = |request: &Request| {
        let answer = engine.submit(request.clone()).unwrap();
        engine.run_blocking().unwrap();
        collect(answer)
    };
    Some(requests.iter().map(run).collect())
}

fn step(engine: &mut Engine) {
    let gpu = engine.gpu().clone();
    gpu.block_on(engine.step()).unwrap();
}

/// What happened to requests, in all.
#[derive(Debug, Default)]
struct Counts {
    preempted: u32,
    cached: u32,
    drafted: u32,
    accepted: u32,
    moved: u32,
}

/// Requests arrive at random in a small cache, which is sorted at random.
fn in_company(engine: &mut Engine, rng: &mut Rng, requests: &[Request], counts: &mut Counts) -> Vec<Collected> {
    let mut answers = Vec::new();
    for request in requests {
        answers.push(engine.submit(request.clone()).unwrap());
        for _ in 0..rng.u32(0..5) {
            step(engine);
        }
        if rng.u32(..3) == 0 {
            let gpu = engine.gpu().clone();
            counts.moved += gpu.block_on(engine.defragment()).unwrap();
        }
    }
    engine.run_blocking().unwrap();
    let collected: Vec<_> = answers.into_iter().map(collect).collect();
    for Collected { usage, .. } in &collected {
        counts.preempted += usage.preemptions;
        counts.cached += usage.cached_tokens;
        counts.drafted += usage.drafted_tokens;
        counts.accepted += usage.accepted_tokens;
    }
    collected
}

/// Chunks of prompts, company, both kinds of preemption, prefixes from the index, drafts of both kinds, other slots: for each request the same tokens
/// and the same bits as alone.
fn compare(format: KvFormat, seed: u64, counts: &mut [Counts; 4]) -> Option<()> {
    let mut rng = Rng::with_seed(seed);
    let requests = requests(&mut rng, 12);
    let expected = alone(format, &requests)?;
    for (way, counts) in counts.iter_mut().enumerate() {
        let options = options(|o| {
            // The first way can only compute again, the others only swap.
            o.max_swapped_bytes = if way == 0 { 0 } else { 1 << 30 };
            o.max_step_tokens = Some(rng.u32(3..40));
        });
        let mut engine = engine(decoder(14, format, way > 0)?, options);
        match way {
            2 => {
                // Of its trees one line is verified.
                let mut lookup = PromptLookup::default();
                lookup.branches = 3;
                engine = engine.with_proposer(lookup);
            }
            3 => engine = engine.with_proposer(DraftModel::new(decoder(64, KvFormat::F16, false)?).unwrap()),
            _ => {}
        }
        let got = in_company(&mut engine, &mut rng, &requests, counts);
        for (i, (got, want)) in got.iter().zip(&expected).enumerate() {
            let what = format!("{format}, way {way}, request {i}");
            assert_eq!(got.tokens, want.tokens, "{what}");
            let differ = got.logprobs.iter().zip(&want.logprobs).position(|(a, b)| a != b);
            assert_eq!(differ, None, "{what}: the first token with other bits");
        }
        let usage = engine.decoder().usage();
        assert_eq!((usage.sequences, usage.free + usage.reclaimable), (0, 14), "{format}, way {way}");
    }
    Some(())
}

fn compare_formats(formats: &[KvFormat]) {
    let mut counts: [Counts; 4] = Default::default();
    for (&format, seed) in formats.iter().zip(1..) {
        if compare(format, seed, &mut counts).is_none() {
            return;
        }
    }
    // It was as hard as it is meant to be.
    let [recompute, swap, lookup, draft] = &counts;
    assert!(recompute.preempted > 0 && swap.preempted > 0 && swap.cached > 0 && swap.moved > 0, "{counts:?}");
    assert!(
        lookup.accepted > 0 && lookup.accepted < lookup.drafted && draft.accepted > draft.drafted / 2,
        "{counts:?}"
    );
}

#[test]
fn requests_have_the_same_bits_as_alone_in_f32_and_int8() {
    compare_formats(&[KvFormat::F32, KvFormat::Int8]);
}

#[test]
#[ignore = "a minute; the test above has two of the formats"]
fn requests_have_the_same_bits_as_alone_in_every_format() {
    compare_formats(&KvFormat::ALL);
}

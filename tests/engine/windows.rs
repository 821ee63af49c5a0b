//! Requests of a model with a window: longer than the cache, and the same tokens as alone.

use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use folio::KvFormat;
use folio::engine::{EndReason, Engine, EngineOptions, Request, SubmitError};
use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, WeightFormat};

use super::{adapter, collect, drawn, options};

fn engine(model: &Arc<Model>, num_blocks: u32, prefix_cache: bool, options: EngineOptions) -> Engine {
    let mut decoder = DecoderOptions::default();
    (decoder.num_blocks, decoder.block_size, decoder.max_step_tokens) = (num_blocks, 4, 16);
    (decoder.k_format, decoder.v_format, decoder.prefix_cache) = (KvFormat::F32, KvFormat::F32, prefix_cache);
    Engine::new(Decoder::new_blocking(Arc::clone(model), decoder).unwrap(), None, options).unwrap()
}

/// Requests in a cache that is too small for all, with and without swaps and prefixes: their tokens are those that they have alone. Returns how often
/// they were preempted, how many tokens were found, and the tokens of the longest text.
fn answer_as_alone(gpu: &folio::Gpu, model: &Arc<Model>, num_blocks: u32) -> (u32, u32, usize) {
    let mut rng = Rng::with_seed(4);
    let requests: Vec<_> = (0..14)
        .map(|i| {
            let prompt: Vec<u32> = (0..rng.u32(1..70)).map(|at| (at * 31 + at * at + i % 3) % 90).collect();
            let priority = if i < 7 { 0 } else { 5 };
            Request::new(prompt, rng.u32(1..40)).with_sampling(drawn(i.into())).with_priority(priority)
        })
        .collect();
    let mut alone = engine(model, 64, false, EngineOptions::default());
    let expected: Vec<_> = requests
        .iter()
        .map(|request| {
            let answer = alone.submit(request.clone()).unwrap();
            alone.run_blocking().unwrap();
            let collected = collect(answer);
            assert_eq!(collected.reason, EndReason::Length);
            collected.tokens
        })
        .collect();
    let (mut preempted, mut cached, mut longest) = (0, 0, 0);
    for (prefix_cache, swapped_bytes) in [(false, 0), (false, 1 << 30), (true, 1 << 30)] {
        let mut engine = engine(model, num_blocks, prefix_cache, options(|o| o.max_swapped_bytes = swapped_bytes));
        // Those that come later are ahead of those that run.
        let mut answers = Vec::new();
        for half in requests.chunks(7) {
            answers.extend(half.iter().map(|request| engine.submit(request.clone()).unwrap()));
            for _ in 0..6 {
                gpu.block_on(engine.step()).unwrap();
            }
        }
        engine.run_blocking().unwrap();
        for ((answer, request), tokens) in answers.into_iter().zip(&requests).zip(&expected) {
            let collected = collect(answer);
            assert_eq!(&collected.tokens, tokens, "prefix cache {prefix_cache}: {request:?}");
            preempted += collected.usage.preemptions;
            cached += collected.usage.cached_tokens;
            longest = longest.max(request.prompt.len() + tokens.len());
        }
        let usage = engine.decoder().usage();
        assert_eq!((usage.sequences, usage.free + usage.reclaimable), (0, usage.total));
    }
    (preempted, cached, longest)
}

fn model(gpu: &folio::Gpu, name: &str) -> Arc<Model> {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name);
    Arc::new(Model::load_blocking(gpu, fixture, ModelOptions::new(WeightFormat::F32), |_| {}).unwrap())
}

/// Texts of up to 110 tokens, in a cache of 80, where a window of 16 and a chunk of 16 fit twice.
#[test]
fn texts_longer_than_the_cache_are_the_same_as_alone() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "mistral");
    let (preempted, cached, longest) = answer_as_alone(&gpu, &model, 20);
    assert!(longest > 80 && preempted > 0 && cached > 0, "{longest} {preempted} {cached}");
    // A request that has no room for its window and a chunk is refused.
    let mut tiny = engine(&model, 8, false, EngineOptions::default());
    let refused = tiny.submit(Request::new(vec![1; 60], 20));
    assert!(matches!(refused, Err(SubmitError::Refused(_))), "{refused:?}");
    assert!(tiny.submit(Request::new(vec![1; 20], 5)).is_ok());
}

/// Where half of the layers have a window, a text of 108 tokens and another one fit into the memory of 108 tokens of all layers.
#[test]
fn windows_in_some_layers_answer_as_alone() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "gemma3");
    let (preempted, cached, longest) = answer_as_alone(&gpu, &model, 27);
    assert!(longest > 80 && preempted > 0 && cached > 0, "{longest} {preempted} {cached}");
    // 128 tokens take 32 blocks in one group and at most 8 in the other.
    let mut small = engine(&model, 20, false, EngineOptions::default());
    assert!(small.submit(Request::new(vec![1; 100], 29)).is_ok());
    let mut tiny = engine(&model, 18, false, EngineOptions::default());
    let refused = tiny.submit(Request::new(vec![1; 100], 29));
    assert!(matches!(refused, Err(SubmitError::Refused(_))), "{refused:?}");
}

//! A model whose cache holds latents: requests in company, in a cache that is too small for all of them.

use std::path::Path;
use std::sync::Arc;

use folio::KvFormat;
use folio::engine::{Engine, EngineOptions, PromptLookup, Request};
use folio::model::{Decoder, DecoderOptions, Model, ModelOptions, WeightFormat};

use super::{adapter, collect, drawn, options};

fn engine(num_blocks: u32, prefix_cache: bool, options: EngineOptions) -> Option<Engine> {
    let gpu = adapter::open(adapter::DEFAULT)?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/deepseek_v3");
    let model = Model::load_blocking(&gpu, folder, ModelOptions::new(WeightFormat::F32), |_| {}).unwrap();
    let mut decoder = DecoderOptions::default();
    (decoder.num_blocks, decoder.block_size, decoder.max_step_tokens) = (num_blocks, 8, 64);
    (decoder.k_format, decoder.v_format, decoder.prefix_cache) = (KvFormat::F32, KvFormat::F32, prefix_cache);
    Some(Engine::new(Decoder::new_blocking(Arc::new(model), decoder).unwrap(), None, options).unwrap())
}

fn requests() -> Vec<Request> {
    let request = |i: u32| {
        // Some begin alike.
        let tokens: Vec<u32> = (0..9 + 3 * i).map(|at| (at * 7 + at * at + i / 2) % 90).collect();
        Request::new(tokens, 6 + 5 * (i % 4)).with_sampling(drawn(u64::from(i)))
    };
    (0..8).map(request).collect()
}

#[test]
fn tokens_do_not_depend_on_company() {
    let requests = requests();
    let Some(mut alone) = engine(64, false, EngineOptions::default()) else { return };
    let one = |request: &Request| {
        let answer = alone.submit(request.clone()).unwrap();
        alone.run_blocking().unwrap();
        collect(answer).tokens
    };
    let expected: Vec<_> = requests.iter().map(one).collect();
    let mut preempted = 0;
    for (prefix_cache, swapped_bytes, drafts) in [(false, 0, false), (true, 1 << 30, false), (true, 1 << 30, true)] {
        let options = options(|o| {
            o.max_swapped_bytes = swapped_bytes;
            o.max_step_tokens = Some(20);
        });
        let mut engine = engine(9, prefix_cache, options).unwrap();
        if drafts {
            engine = engine.with_proposer(PromptLookup::default());
        }
        let answers: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        engine.run_blocking().unwrap();
        for ((answer, request), tokens) in answers.into_iter().zip(&requests).zip(&expected) {
            let collected = collect(answer);
            assert_eq!(&collected.tokens, tokens, "prefix cache {prefix_cache}, drafts {drafts}: {request:?}");
            preempted += collected.usage.preemptions;
        }
    }
    assert!(preempted > 0, "the cache had room for all");
}

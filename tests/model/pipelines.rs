//! How many pipelines models need, and that all of them are there after a warm-up.

use std::sync::Arc;

use folio::Gpu;
use folio::model::{Decoder, DecoderOptions, Input, Model, ModelOptions, Sampling, WarmUp, WeightFormat};

use crate::adapter;
use crate::common::with;
use crate::decoder::{fixture, tokens};

/// The most pipelines that a model may need, by the kinds of its layers: each kind of attention takes three, each rotation one.
const MODELS: [(&str, u64); 7] = [
    ("llama", 60),
    ("gpt2", 60),
    ("gemma3", 80),
    ("olmo2", 80),
    ("deepseek_v3", 80),
    ("qwen3_moe", 80),
    ("gpt_oss", 80),
];

/// Steps of any size and any sampling compile nothing more.
#[test]
fn a_warm_up_makes_all_pipelines() {
    if adapter::open(adapter::DEFAULT).is_none() {
        return;
    }
    for (model, most) in MODELS {
        // A device of its own, on which nothing has been compiled.
        let gpu = Gpu::open_blocking(adapter::options(adapter::DEFAULT)).expect("the adapter that was there");
        let options = ModelOptions::new(WeightFormat::F32);
        let model_on_gpu = Model::load_blocking(&gpu, fixture(model), options, |_| {}).expect("a model");
        let options = with(DecoderOptions::default(), |o| (o.num_blocks, o.max_step_tokens) = (64, 40));
        let mut decoder = Decoder::new_blocking(Arc::new(model_on_gpu), options).expect("a decoder");
        let mut stages: Vec<WarmUp> = Vec::new();
        gpu.block_on(decoder.warm_up_with(|stage| stages.push(stage))).expect("warm");
        let count = gpu.num_compiled();
        adapter::say(&format!("{model} needs {count} pipelines"));
        assert!((10..=most).contains(&count), "{model}: {count}");
        // Told after each stage, and to the end.
        let last = stages.last().expect("stages");
        assert_eq!((last.stages_done, last.num_pipelines), (last.stages_total, count));
        assert!(
            stages.iter().zip(1..).all(|(stage, i)| (stage.stages_done, stage.stages_total) == (i, last.stages_total))
        );
        assert!(stages.is_sorted_by_key(|stage| stage.num_pipelines));

        let sampling = with(Sampling::default(), |s| {
            (s.top_k, s.top_p, s.min_p, s.repetition_penalty) = (Some(5), Some(0.9), Some(0.1), 1.2)
        });
        let greedy_sampling = Sampling::greedy();
        for len in [1, 2, 3, 5, 9, 17, 33, 40, 60] {
            let (greedy, drawn) = (decoder.create_sequence(), decoder.create_sequence());
            let prompt = tokens(len, 3);
            for fed in [&prompt[..], &[]] {
                let inputs = [
                    Input::new(greedy, fed).with_sampling(&greedy_sampling),
                    Input::new(drawn, fed).with_sampling(&sampling),
                ];
                gpu.block_on(decoder.step(&inputs)).expect("a step");
            }
            let fork = decoder.fork(greedy).expect("a fork");
            gpu.block_on(decoder.step(&[Input::new(fork, &[1])])).expect("a step");
            for sequence in [greedy, drawn, fork] {
                decoder.free(sequence).expect("known");
            }
        }
        assert_eq!(gpu.num_compiled(), count, "{model}");
    }
}

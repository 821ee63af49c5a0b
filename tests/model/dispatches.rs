//! How many dispatches a layer takes: each costs a CPU adapter some 20 to 60 us, whatever it computes.

use std::cell::RefCell;

use folio::Gpu;
use folio::model::{
    Decoder, DecoderOptions, Input, Model, ModelConfig, ModelOptions, ModelResult, Sampling, TensorSource,
    WeightFormat, WeightSource,
};

use crate::adapter::{self, Open};
use crate::common::with;

struct RandomWeights(RefCell<fastrand::Rng>);

impl WeightSource for RandomWeights {
    fn rows(&self, _tensor: &TensorSource, _row_start: usize, out: &mut [f32]) -> ModelResult<()> {
        out.fill_with(|| self.0.borrow_mut().f32() - 0.5);
        Ok(())
    }
}

/// Settings that all of these share; `n_layer` and the like are gpt2's names.
fn config(model_type: &str, num_layers: u32) -> ModelConfig {
    // Each of DeepSeek's heads has keys and values of its own, made of latents. The second version's query has none here.
    let kv_heads = if model_type.starts_with("deepseek") { 4 } else { 2 };
    let dense = if model_type.starts_with("deepseek") { num_layers } else { 0 };
    let q_rank = if model_type == "deepseek_v2" { "null" } else { "12" };
    ModelConfig::from_json(&format!(
        r#"{{"model_type": "{model_type}", "hidden_size": 32, "num_hidden_layers": {num_layers}, "num_attention_heads": 4,
            "num_key_value_heads": {kv_heads}, "head_dim": 8, "intermediate_size": 48, "rope_scaling": {{ "rope_type": "default" }}, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "vocab_size": 64, "max_position_embeddings": 64,
            "q_lora_rank": {q_rank}, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": {dense},
            "moe_intermediate_size": 16,
            "n_embd": 32, "n_layer": {num_layers}, "n_head": 4, "n_positions": 64}}"#
    ))
    .unwrap()
}

/// Dispatches of a prompt of 5 tokens, and of the step after it.
fn count(how: Open, model_type: &str, num_layers: u32, weights: WeightFormat) -> Option<[u64; 2]> {
    // A device that no other test records on.
    let gpu = adapter::open(how).map(|_| Gpu::open_blocking(adapter::options(how)).unwrap())?;
    let config = config(model_type, num_layers);
    let tensors = config.weights().unwrap();
    let source = RandomWeights(RefCell::new(fastrand::Rng::with_seed(1)));
    let model =
        Model::from_source_blocking(&gpu, config, &tensors, &source, ModelOptions::new(weights), |_| {}).unwrap();
    let options = with(DecoderOptions::default(), |options| options.num_blocks = 8);
    let mut decoder = Decoder::new_blocking(model.into(), options).unwrap();
    let (sequence, greedy) = (decoder.create_sequence(), Sampling::greedy());
    let mut step = |tokens: &[u32]| {
        let before = gpu.num_dispatches();
        gpu.block_on(decoder.step(&[Input::new(sequence, tokens).with_sampling(&greedy)])).unwrap();
        gpu.num_dispatches() - before
    };
    Some([step(&[1, 2, 3, 4, 5]), step(&[])])
}

/// Dispatches of a layer, of a prompt and of a decode step, and those of a decode step beside the layers: from models of one layer and of three.
fn per_layer(how: Open, model_type: &str, weights: WeightFormat) -> Option<([u64; 2], u64)> {
    let [one, three] = [count(how, model_type, 1, weights)?, count(how, model_type, 3, weights)?];
    let layer = [0, 1].map(|i| {
        assert!((three[i] - one[i]).is_multiple_of(2), "{model_type}: {one:?}, {three:?}");
        (three[i] - one[i]) / 2
    });
    Some((layer, one[1] - layer[1]))
}

#[test]
fn a_layer_takes_few_dispatches() {
    // RMSNorm is a part of the linear layer behind it. LayerNorm is two dispatches, beside qkv, append, attend, o, up and down.
    // A norm of what is added is one more, twice in Gemma and OLMo 2; so are OLMo 2's norms of queries and of keys. A mixture has
    // six in place of up and down: the router's logits, the choice, its sorting, up, down and their sum.
    let models = [
        ("llama", 6),
        ("mistral", 6),
        ("qwen2", 6),
        ("qwen3", 6),
        ("phi3", 6),
        ("smollm3", 6),
        ("gpt2", 8),
        ("gpt_neox", 8),
        ("gemma2", 8),
        ("gemma3_text", 8),
        ("olmo2", 10),
        // Latents: what is absorbed into queries, and what makes values of the result; then what makes queries of their latents.
        ("deepseek_v2", 8),
        ("deepseek_v3", 9),
        ("mixtral", 10),
        ("qwen3_moe", 10),
        ("gpt_oss", 10),
        ("dots1", 12),
    ];
    for (how, weights) in
        [(adapter::CPU, WeightFormat::F16), (adapter::GPU, WeightFormat::INT4), (adapter::CPU_PLAIN, WeightFormat::F16)]
    {
        // A kernel compiles for seconds: all models in one family, and in the others one of each count.
        let of_each_count = ["llama", "gpt2", "deepseek_v3", "olmo2", "mixtral", "dots1"];
        for (model_type, most) in models {
            if how != adapter::CPU && !of_each_count.contains(&model_type) {
                continue;
            }
            let Some(([prompt, decode], other)) = per_layer(how, model_type, weights) else { return };
            println!("{how:?} {model_type}: {prompt} for a prompt, {decode} to decode, {other} beside the layers");
            // CPU adapters read x from a texture where rows are many, and without subgroups always: one more for each of the 4 linear layers,
            // for what makes queries of latents, for the router, and for both of a shared expert.
            let linears = match model_type {
                "mixtral" | "qwen3_moe" | "gpt_oss" | "deepseek_v3" => 5,
                "dots1" => 7,
                _ => 4,
            };
            let staging = if how == adapter::GPU {
                [0, 0]
            } else {
                [linears, if how == adapter::CPU_PLAIN { linears } else { 0 }]
            };
            assert!(prompt <= most + staging[0], "{how:?} {model_type}: {prompt} for a prompt");
            assert!(decode <= most + staging[1], "{how:?} {model_type}: {decode} to decode");
            // Embedding, head and sampling; in GPT-2 learned positions, and LayerNorm with the models that have it.
            let most = if model_type.starts_with("gpt") { 5 } else { 3 };
            assert!(other <= most + staging[1] / linears, "{how:?} {model_type}: {other} beside the layers");
        }
    }
}

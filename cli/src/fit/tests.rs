#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use folio::model::{Model, ModelConfig, ModelOptions, WeightFormat};
use folio::{Gpu, GpuOptions, KvCache, KvFormat, KvFormats};

use super::known;
use super::size::{Keeps, cache_of, decoder_options};

fn config(name: &str) -> ModelConfig {
    ModelConfig::from_json(known::find(name).unwrap().unwrap().config.get()).unwrap()
}

/// What publishers say, to the parameter: the shapes of the table are right, and every tensor is counted.
#[test]
fn parameters_of_well_known_models() {
    let mut wrong = Vec::new();
    for model in known::models().unwrap() {
        let config = match ModelConfig::from_json(model.config.get()) {
            Ok(config) => config,
            Err(error) => {
                wrong.push(format!("{}: {error}", model.name));
                continue;
            }
        };
        let counted = config.size(WeightFormat::F16).unwrap().num_parameters;
        if counted.abs_diff(model.parameters) * 10_000 > model.parameters {
            wrong.push(format!("{}: counted {counted}, published {}", model.name, model.parameters));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn names_are_found_as_people_write_them() {
    for name in ["llama-3.1-8b", "Llama-3.1-8B", "meta-llama/Llama-3.1-8B"] {
        assert_eq!(config(name).num_layers, 32, "{name}");
    }
    assert!(known::find("llama-9").unwrap().is_none());
    assert!(known::list().unwrap().contains("deepseek-v3"));
}

/// A cache that is made has the bytes that were said, in every format and for latents; scaled down to two layers, and to few tokens.
#[test]
fn caches_have_the_size_that_is_said() {
    let Ok(gpu) = Gpu::open_blocking(GpuOptions::default()) else {
        assert!(std::env::var_os("FOLIO_REQUIRE_GPU").is_none(), "no adapter");
        return;
    };
    for name in ["llama-3-8b", "mistral-7b-v0.1", "gemma-2-2b", "qwen3-0.6b", "deepseek-v3", "gpt2"] {
        let mut config = config(name);
        config.num_layers = 2;
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::E4M3, KvFormat::Int8, KvFormat::Int4] {
            let options = decoder_options(KvFormats { k: format, v: format }, 16);
            let said = cache_of(options, &config, 100);
            let cache = KvCache::new_blocking(&gpu, said).unwrap();
            // Layers of different groups share buffers.
            let buffers = (0..said.layers_per_group()).flat_map(|layer| {
                let (k, v) = cache.layer_buffers(layer).unwrap();
                // Where values are keys they are read from the same buffers.
                let v = if said.latent { &[] } else { v };
                k.iter().chain(v).map(folio::wgpu::Buffer::size).collect::<Vec<_>>()
            });
            assert_eq!(buffers.sum::<u64>(), said.pool_bytes(), "{name} {format}");
        }
    }
}

/// By hand: groups with a window, and those without, each with its blocks of a layer.
#[test]
fn layers_keep_what_they_see() {
    let options = decoder_options(KvFormats { k: KvFormat::F16, v: KvFormat::F16 }, 16);
    for (name, heads, [windowed, full], keeps) in [
        ("gemma-3-1b", 1, [6 * 4, 4], "22 layers keep the newest 512, 4 layers keep all"),
        ("gemma-3-270m", 1, [5 * 3, 3], "15 layers keep the newest 512, 3 layers keep all"),
    ] {
        let config = config(name);
        let cache = cache_of(options, &config, 32_768);
        // 512 tokens of a window and 512 of a step that ends anywhere.
        let blocks = windowed * (64 + 1) + full * 2048;
        let layer_block = heads * 256 * 16 * 2 * 2;
        assert_eq!(cache.pool_bytes(), blocks * layer_block, "{name}");
        let said: Vec<_> = Keeps::of(&config, &cache).iter().map(Keeps::to_string).collect();
        assert_eq!(said.join(", "), keeps);
    }
    let llama = config("llama-3-8b");
    let said: Vec<_> = Keeps::of(&llama, &cache_of(options, &llama, 100)).iter().map(Keeps::to_string).collect();
    assert_eq!(said, ["32 layers keep all"]);
}

/// Weights that are loaded have the bytes that were said.
#[test]
fn weights_have_the_size_that_is_said() {
    let Ok(gpu) = Gpu::open_blocking(GpuOptions::default()) else {
        assert!(std::env::var_os("FOLIO_REQUIRE_GPU").is_none(), "no adapter");
        return;
    };
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models");
    for name in ["llama", "gpt2", "gemma3", "mixtral_packed", "gpt_oss", "dots1", "deepseek_v3", "deepseek_v2_experts"]
    {
        for format in [WeightFormat::F32, WeightFormat::INT4] {
            let model = Model::load_blocking(&gpu, fixtures.join(name), ModelOptions::new(format), |_| ()).unwrap();
            let said = model.config().size(format).unwrap().matrix_bytes;
            assert_eq!(model.weight_bytes(), said, "{name} {format}");
        }
    }
}

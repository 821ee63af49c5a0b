//! Loading a model must not need much more host memory than its largest file.
//!
//! A binary of its own, as it counts every allocation of the process.
#![cfg(feature = "model")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test may fail and say why it was skipped"
)]

#[path = "gpu/adapter.rs"]
#[allow(dead_code, reason = "shared with the tests of the GPU kernels")]
mod adapter;

use std::collections::HashMap;

use folio::model::{Model, ModelOptions, WeightFormat};
use peak_alloc::PeakAlloc;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 4096, "vocab_size": 16000, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#;

/// The process maps the file (1.0 of its size, and that only as clean pages which the system may drop), so the heap has 0.3 of it.
/// What wgpu stages for the device is device memory that the host can see; the loader waits for it every so often.
#[test]
fn the_heap_stays_below_a_third_of_the_file() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    let file = folder.path().join("model.safetensors");
    let matrix = |name: String, rows: usize, columns: usize| (name, vec![rows, columns]);
    let mut shapes =
        vec![matrix("model.embed_tokens.weight".to_owned(), 16000, 512), ("model.norm.weight".to_owned(), vec![512])];
    for i in 0..4 {
        let name = |part: &str| format!("model.layers.{i}.{part}.weight");
        shapes.extend([
            (name("input_layernorm"), vec![512]),
            (name("post_attention_layernorm"), vec![512]),
            matrix(name("self_attn.q_proj"), 512, 512),
            matrix(name("self_attn.k_proj"), 256, 512),
            matrix(name("self_attn.v_proj"), 256, 512),
            matrix(name("self_attn.o_proj"), 512, 512),
            matrix(name("mlp.gate_proj"), 4096, 512),
            matrix(name("mlp.up_proj"), 4096, 512),
            matrix(name("mlp.down_proj"), 512, 4096),
        ]);
    }
    {
        let tensors: HashMap<_, _> = shapes
            .into_iter()
            .map(|(name, shape)| (name, (vec![0u8; shape.iter().product::<usize>() * 2], shape)))
            .collect();
        let views = tensors
            .iter()
            .map(|(name, (data, shape))| (name, TensorView::new(Dtype::F16, shape.clone(), data).unwrap()));
        safetensors::serialize_to_file(views, None, &file).unwrap();
    }
    let file_bytes = std::fs::metadata(&file).unwrap().len() as f64;
    assert!(file_bytes > 70e6, "too small to tell: {file_bytes}");

    for weights in [WeightFormat::F16, WeightFormat::F32, WeightFormat::Int4 { group_size: 32 }] {
        // Compiling the kernels takes memory of its own, which has nothing to do with the size of the file; `Gpu` keeps them.
        drop(Model::load_blocking(&gpu, folder.path(), ModelOptions::new(weights), |_| {}).unwrap());
        let before = ALLOCATOR.current_usage() as f64;
        ALLOCATOR.reset_peak_usage();
        let model = Model::load_blocking(&gpu, folder.path(), ModelOptions::new(weights), |_| {}).unwrap();
        let heap = ALLOCATOR.peak_usage() as f64 - before;
        println!("{weights:?}: {:.1} MB of heap at most, for a file of {:.1} MB", heap / 1e6, file_bytes / 1e6);
        assert!(heap < 0.3 * file_bytes, "{weights:?}: {heap} bytes of heap for a file of {file_bytes}");
        drop(model);
    }
}

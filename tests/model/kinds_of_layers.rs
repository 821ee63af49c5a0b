//! What `config.json` says of single layers, and what is refused.

use folio::model::{LayerKind, LayerPattern, ModelConfig, ModelError};
use folio::{RopeConfig, RopeScaling};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint_files::model;

fn config(model_type: &str, changes: &Value) -> Result<ModelConfig, ModelError> {
    let mut config = model(model_type, Dtype::F32).config;
    config["num_hidden_layers"] = 7.into();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::from_json(&config.to_string())
}

fn kinds(model_type: &str, changes: &Value) -> Vec<LayerKind> {
    let config = config(model_type, changes).unwrap();
    (0..7).map(|layer| config.layers.kind(layer).clone()).collect()
}

#[track_caller]
fn refused(model_type: &str, changes: Value, key: &str, parts: &[&str]) {
    match config(model_type, &changes) {
        Err(ModelError::Config { key: got, got: value, need, .. }) => {
            assert_eq!(got, key, "got {value}, need {need}");
            let text = format!("got {value}, need {need}");
            parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} in {text}"));
        }
        other => panic!("{key}: {other:?}"),
    }
}

fn windows(kinds: &[LayerKind]) -> Vec<bool> {
    kinds.iter().map(|kind| kind.window == Some(9)).collect()
}

fn thetas(kinds: &[LayerKind]) -> Vec<f64> {
    kinds.iter().map(|kind| kind.rope.as_ref().map_or(0.0, |rope| rope.theta)).collect()
}

#[test]
fn layers_without_rope() {
    let rotated = |changes| kinds("smollm3", &changes).iter().map(|kind| kind.rope.is_some()).collect::<Vec<_>>();
    let every = |n: usize| (1..=7).map(|layer| layer % n != 0).collect::<Vec<_>>();
    assert_eq!(rotated(json!({})), every(4), "transformers' default");
    assert_eq!(rotated(json!({ "no_rope_layer_interval": 3 })), every(3));
    assert_eq!(rotated(json!({ "no_rope_layer_interval": 1 })), [false; 7]);
    assert_eq!(rotated(json!({ "no_rope_layer_interval": 8 })), [true; 7]);
    let list = json!({ "no_rope_layers": [1, 0, 0, 1, 1, 1, 0, 0], "no_rope_layer_interval": 2 });
    assert_eq!(rotated(list), [true, false, false, true, true, true, false]);
    // Their windows, if they are switched on, are those of the layers without rope.
    let on = json!({ "use_sliding_window": true, "sliding_window": 9, "no_rope_layer_interval": 2 });
    assert_eq!(windows(&kinds("smollm3", &on)), every(2).iter().map(|r| !r).collect::<Vec<_>>());
    assert_eq!(windows(&kinds("smollm3", &json!({ "sliding_window": 9 }))), [false; 7]);
    for wrong in [json!([1, 0]), json!([1, 0, 2, 1, 1, 1, 1]), json!([true, true]), json!("all")] {
        refused("smollm3", json!({ "no_rope_layers": wrong }), "no_rope_layers", &[]);
    }
    refused("smollm3", json!({ "no_rope_layer_interval": 0 }), "no_rope_layer_interval", &["got 0"]);
    refused("smollm3", json!({ "no_rope_layer_interval": 100_000 }), "no_rope_layer_interval", &["at most 65536"]);
}

#[test]
fn windows_that_alternate() {
    let nine = |model_type: &str, changes: Value| {
        let mut changes = changes;
        changes["sliding_window"] = 9.into();
        kinds(model_type, &changes)
    };
    assert_eq!(windows(&nine("gemma2", json!({}))), [true, false, true, false, true, false, true]);
    assert_eq!(windows(&nine("gemma3_text", json!({}))), [true, true, true, true, true, false, true]);
    let two = json!({ "sliding_window_pattern": 2 });
    assert_eq!(windows(&nine("gemma3_text", two.clone())), [true, false, true, false, true, false, true]);
    // Gemma 2 doesn't know the setting.
    assert_eq!(windows(&nine("gemma2", json!({ "sliding_window_pattern": 3 }))), windows(&nine("gemma2", json!({}))));
    let types: Vec<_> = (0..7).map(|i| if i < 2 { "full_attention" } else { "sliding_attention" }).collect();
    let listed = nine("gemma3_text", json!({ "layer_types": types, "sliding_window_pattern": 2 }));
    assert_eq!(windows(&listed), [false, false, true, true, true, true, true]);
    assert_eq!(windows(&kinds("gemma2", &json!({}))), [false; 7], "null is no window");
    refused("gemma3_text", json!({ "sliding_window_pattern": 100_000 }), "sliding_window_pattern", &["65536"]);
    refused("gemma2", json!({ "layer_types": ["full_attention"] }), "layer_types", &["each of 7 layers"]);
    // A pattern without end takes no memory.
    let many = json!({ "num_hidden_layers": 2_147_483_647, "sliding_window": 9 });
    assert_eq!(config("gemma3_text", &many).unwrap().layers.kinds().len(), 2);
    let mixed = json!({ "num_hidden_layers": 2_147_483_647, "sliding_window": 9, "use_sliding_window": true });
    refused("qwen2", mixed, "max_window_layers", &["at least the number of layers"]);
}

#[test]
fn two_bases() {
    let old = json!({ "rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 3,
        "rope_scaling": { "rope_type": "linear", "factor": 8 } });
    let new = json!({ "rope_theta": null, "sliding_window_pattern": 3, "rope_parameters": {
        "full_attention": { "rope_theta": 5e5, "rope_type": "linear", "factor": 8 },
        "sliding_attention": { "rope_theta": 2e4, "rope_type": "default" } } });
    for changes in [old, new] {
        let kinds = kinds("gemma3_text", &changes);
        assert_eq!(thetas(&kinds), [2e4, 2e4, 5e5, 2e4, 2e4, 5e5, 2e4]);
        let scalings = kinds.iter().map(|kind| kind.rope.as_ref().unwrap().scaling.clone());
        for (scaling, theta) in scalings.zip(thetas(&kinds)) {
            let want = if theta == 5e5 { RopeScaling::Linear { factor: 8.0 } } else { RopeScaling::None };
            assert_eq!(scaling, want);
        }
    }
    let defaults = kinds("gemma3_text", &json!({ "rope_theta": null }));
    assert_eq!(thetas(&defaults), [1e4, 1e4, 1e4, 1e4, 1e4, 1e6, 1e4]);
    let inside = json!({ "rope_scaling": { "rope_type": "linear", "factor": 8, "rope_theta": 3e5 } });
    assert_eq!(thetas(&kinds("gemma3_text", &inside)), [1e4, 1e4, 1e4, 1e4, 1e4, 3e5, 1e4]);
    let flat = json!({ "rope_parameters": { "rope_theta": 5e5, "rope_type": "default" } });
    refused("gemma3_text", flat, "rope_parameters.rope_theta", &["nothing but full_attention and sliding_attention"]);
    let wrong = json!({ "rope_parameters": { "sliding_attention": { "rope_theta": 0 } } });
    refused("gemma3_text", wrong, "rope_parameters.sliding_attention.rope_theta", &["a number above 1"]);
    let unknown = json!({ "rope_parameters": { "sliding_attention": { "rope_type": "spiral" } } });
    refused("gemma3_text", unknown, "rope_parameters.sliding_attention.rope_type", &["got spiral"]);
}

/// Head 8, and all of it rotated: 4 pairs.
#[test]
fn longrope_of_files() {
    let (short, long) = ([1.0, 1.5, 2.0, 4.0], [1.0, 3.0, 9.0, 27.0]);
    let divided = |factors: [f64; 4], attention_factor: f64| {
        let frequency = |i: usize| 500_000f64.powf(-(i as f64) / 4.0) / factors[i];
        let scaling = RopeScaling::Custom { inverse_frequencies: (0..4).map(frequency).collect(), attention_factor };
        RopeConfig { scaling, ..RopeConfig::new(8, 500_000.0) }
    };
    // The file's 256 positions are four times the original ones.
    let factor = (1.0 + 4f64.ln() / 64f64.ln()).sqrt();
    for name in ["longrope", "su", "yarn"] {
        let scaling = json!({ "type": name, "short_factor": short, "long_factor": long });
        let read = config("phi3", &json!({ "rope_scaling": scaling, "original_max_position_embeddings": 64 })).unwrap();
        assert_eq!((read.layers.kind(0).rope.clone(), read.max_positions), (Some(divided(short, factor)), 64));
        let read = read.with_long_context().unwrap();
        assert_eq!((read.layers.kind(0).rope.clone(), read.max_positions), (Some(divided(long, factor)), 256));
        let error = read.with_long_context().unwrap_err().to_string();
        assert!(error.contains("long_context"), "{error}");
    }
    let with = |key: &str, value: Value| {
        let mut scaling = json!({ "rope_type": "longrope", "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": 64 });
        scaling[key] = value;
        json!({ "rope_scaling": scaling })
    };
    let own = |changes: Value| config("phi3", &changes).unwrap().layers.kind(0).rope.clone().unwrap();
    assert_eq!(own(with("attention_factor", json!(1.25))), divided(short, 1.25));
    assert_eq!(own(with("factor", json!(1))), divided(short, 1.0));
    // As long as it is, and not longer.
    let same = config("phi3", &with("original_max_position_embeddings", json!(256))).unwrap();
    assert_eq!((same.max_positions, same.long_context), (256, None));
    for key in ["short_factor", "long_factor"] {
        for wrong in [json!(null), json!([1.0]), json!([1, 1, 1, 0]), json!([1, 1, 1, "x"]), json!(2)] {
            refused("phi3", with(key, wrong), &format!("rope_scaling.{key}"), &["4 numbers above 0"]);
        }
    }
    let original = "original_max_position_embeddings";
    refused("phi3", with(original, Value::Null), original, &["got nothing"]);
    refused("phi3", with(original, json!(1)), original, &["at least 2, or an attention_factor"]);
    // Only Phi-3's yarn is another word for it.
    let yarn = json!({ "rope_scaling": { "type": "yarn", "factor": 2 } });
    assert!(matches!(
        config("llama", &yarn).unwrap().layers.kind(0).rope.as_ref().unwrap().scaling,
        RopeScaling::Yarn { .. }
    ));
}

#[test]
fn settings_of_gemma() {
    let read = config("gemma2", &json!({ "query_pre_attn_scalar": 64 })).unwrap();
    assert_eq!((read.softmax_scale, read.attention_softcap, read.logit_softcap), (Some(0.125), Some(50.0), Some(30.0)));
    assert_eq!((read.embedding_scale, read.norm.weight_offset), (Some(48f32.sqrt()), 1.0));
    let off = json!({ "attn_logit_softcapping": null, "final_logit_softcapping": null });
    let read = config("gemma2", &off).unwrap();
    assert_eq!((read.softmax_scale, read.attention_softcap, read.logit_softcap), (Some(1.0 / 16.0), None, None));
    let read = config("gemma3_text", &json!({ "final_logit_softcapping": 20 })).unwrap();
    assert_eq!((read.attention_softcap, read.logit_softcap), (None, Some(20.0)));
    for key in ["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"] {
        for wrong in [json!(0), json!(-1), json!("50"), json!(true)] {
            refused("gemma2", json!({ key: wrong }), key, &["above 0"]);
        }
        refused("gemma2", json!({ key: 1e-300 }), key, &["above 0"]);
    }
    refused("gemma2", json!({ "use_bidirectional_attention": true }), "use_bidirectional_attention", &["false"]);
    // transformers reads it and does nothing with it.
    refused("gemma3_text", json!({ "attn_logit_softcapping": 50 }), "attn_logit_softcapping", &["nothing"]);
}

#[test]
fn patterns() {
    let kind = |window| LayerKind::new(None, window);
    let pattern = LayerPattern::repeated([kind(None), kind(Some(3)), kind(None)]).unwrap();
    assert_eq!(pattern.kinds(), [kind(None), kind(Some(3))]);
    assert_eq!((0..7).map(|layer| pattern.index(layer)).collect::<Vec<_>>(), [0, 1, 0, 0, 1, 0, 0]);
    let same = (0..5).map(|_| kind(None));
    assert_eq!(LayerPattern::repeated(same).unwrap(), LayerPattern::uniform(kind(None)));
    let error = LayerPattern::repeated([]).unwrap_err().to_string();
    assert!(error.contains("layers: got none"), "{error}");
}

//! Errors say who has to act, what was given and what is needed. Errors of devices are in the GPU tests.

use folio::sequence::Manager;
use folio::{AttentionConfig, Error, ErrorKind, KvCacheConfig, KvFormat, RopeConfig, RopeScaling};

#[test]
fn errors_of_a_pool_say_what_helps() {
    let mut manager = Manager::new(CACHE).expect("a valid configuration");
    let (held, more) = (manager.create(), manager.create());
    let step = manager.reserve(&[(held, 33)]).expect("3 of 4 blocks");
    let busy = manager.free(held).expect_err("a step holds it");
    assert_eq!(busy.kind(), ErrorKind::Caller);
    assert!(busy.to_string().contains("is in an open step; need that finished or dropped first"), "{busy}");
    manager.commit(step.pending);
    let full = manager.reserve(&[(more, 17)]).expect_err("2 of 1 block");
    assert_eq!(full.kind(), ErrorKind::Retry);
    assert!(full.to_string().starts_with("blocks: need 2, have 1 free of 4; free or truncate a sequence"), "{full}");
    // As it says.
    manager.truncate(held, 32).expect("an idle sequence");
    let step = manager.reserve(&[(more, 17)]).expect("2 of 2 blocks");
    manager.roll_back(step.pending);
    manager.free(held).expect("an idle sequence");
    let unknown = manager.reserve(&[(held, 1)]).expect_err("freed");
    assert_eq!(unknown.kind(), ErrorKind::Caller);
    assert!(unknown.to_string().contains("is not in this cache; need an id that it gave out"), "{unknown}");
}

#[test]
fn errors_cross_threads_and_boxes() {
    fn needs<T: std::error::Error + Send + Sync + 'static>(_: &T) {}
    needs(&Error::OutOfBlocks { need: 1, free: 0, total: 1 });
}

/// 2 KV heads.
const CACHE: KvCacheConfig = KvCacheConfig::new(1, 2, 64).with_blocks(4, 16).with_formats(KvFormat::F32, KvFormat::F32);

/// The text of the error of a configuration with 8 query heads that `change` spoils.
fn refusal(change: impl FnOnce(&mut AttentionConfig)) -> String {
    let mut config = AttentionConfig::new(8);
    change(&mut config);
    let error = config.validate(&CACHE).expect_err("the rule is broken");
    assert_eq!(error.kind(), ErrorKind::Caller);
    error.to_string()
}

#[test]
fn every_option_at_once_is_valid() {
    let config = {
        let mut options = AttentionConfig::new(8);
        options.causal = false;
        options.softmax_scale = Some(-0.5);
        options.softcap = Some(50.0);
        options.window = Some(1);
        options.alibi_slopes = Some(vec![0.5; 8]);
        options.sinks = Some(vec![-1e30; 8]);
        options.custom_mask = true;
        options.lse = true;
        options.deterministic = true;
        options.max_workspace_bytes = 0;
        options
    };
    assert!(config.validate(&CACHE).is_ok());
    assert!(AttentionConfig::new(2).validate(&CACHE).is_ok());
    assert!(AttentionConfig::new(65_534).validate(&CACHE).is_ok());
}

#[test]
fn query_heads_that_do_not_divide_among_kv_heads_are_refused() {
    for heads in [0, 1, 7, 65_535, 65_536, u32::MAX] {
        let text = refusal(|config| config.num_q_heads = heads);
        let want = format!("num_q_heads: got {heads}, need a multiple of num_kv_heads, 2, from it to 65535");
        assert_eq!(text, want);
    }
}

#[test]
fn scales_that_are_no_numbers_are_refused() {
    for (scale, got) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let text = refusal(|config| config.softmax_scale = Some(scale));
        assert_eq!(text, format!("softmax_scale: got {got}, need a finite number"));
    }
}

#[test]
fn soft_caps_that_cap_nothing_are_refused() {
    for (cap, got) in [(0.0, "0"), (-30.0, "-30"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let text = refusal(|config| config.softcap = Some(cap));
        assert_eq!(text, format!("softcap: got {got}, need a finite number above 0, or None"));
    }
}

#[test]
fn an_empty_window_is_refused() {
    assert_eq!(refusal(|config| config.window = Some(0)), "window: got 0, need at least 1, or None");
}

#[test]
fn lists_per_head_must_have_a_value_per_query_head() {
    for len in [0, 2, 7, 9] {
        let slopes = refusal(|config| config.alibi_slopes = Some(vec![0.0; len]));
        assert_eq!(slopes, format!("alibi_slopes: got {len} values, need one per query head, 8"));
        let sinks = refusal(|config| config.sinks = Some(vec![0.0; len]));
        assert_eq!(sinks, format!("sinks: got {len} values, need one per query head, 8"));
    }
}

#[test]
fn lists_per_head_must_be_finite() {
    for (value, got) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut values = vec![0.0; 8];
        values[7] = value;
        let slopes = refusal(|config| config.alibi_slopes = Some(values.clone()));
        assert_eq!(slopes, format!("alibi_slopes: got {got}, need a finite number"));
        let sinks = refusal(|config| config.sinks = Some(values.clone()));
        assert_eq!(sinks, format!("sinks: got {got}, need a finite number"));
    }
}

/// The text of the error of a rotary embedding for heads of 64 elements.
fn rope_refusal(change: impl FnOnce(&mut RopeConfig)) -> String {
    let mut config = RopeConfig::new(64, 10_000.0);
    change(&mut config);
    let error = config.validate(64).expect_err("the rule is broken");
    assert_eq!(error.kind(), ErrorKind::Caller);
    error.to_string()
}

#[test]
fn rotary_dims_that_do_not_pair_up_or_fit_are_refused() {
    for dim in [0, 1, 33, 66, u32::MAX] {
        let text = rope_refusal(|config| config.rotary_dim = dim);
        assert_eq!(text, format!("rotary_dim: got {dim}, need an even number from 2 to head_dim, 64"));
    }
    assert!(RopeConfig::new(2, 10_000.0).validate(64).is_ok());
    assert!(RopeConfig::new(64, 10_000.0).validate(64).is_ok());
}

#[test]
fn bases_and_factors_that_are_no_numbers_above_0_are_refused() {
    for bad in [0.0, -2.0, f64::NAN, f64::INFINITY] {
        let need = format!("got {bad}, need a finite number above 0");
        assert_eq!(rope_refusal(|config| config.theta = bad), format!("theta: {need}"));
        let llama3 = |factor, low_freq_factor, high_freq_factor| RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position: 8192,
        };
        let custom = RopeScaling::Custom { inverse_frequencies: vec![1.0; 32], attention_factor: bad };
        for (argument, scaling) in [
            ("factor", RopeScaling::Linear { factor: bad }),
            ("factor", RopeScaling::Ntk { factor: bad }),
            ("factor", RopeScaling::yarn(bad, 4096)),
            ("factor", llama3(bad, 1.0, 4.0)),
            ("low_freq_factor", llama3(8.0, bad, 4.0)),
            ("high_freq_factor", llama3(8.0, 1.0, bad)),
            ("attention_factor", custom),
        ] {
            let text = rope_refusal(|config| config.scaling = scaling.clone());
            assert_eq!(text, format!("{argument}: {need}"), "{scaling:?}");
        }
    }
}

#[test]
fn scalings_that_contradict_themselves_are_refused() {
    let yarn = |beta_fast, beta_slow, attention_factor, original_max_position| RopeScaling::Yarn {
        factor: 4.0,
        original_max_position,
        beta_fast,
        beta_slow,
        attention_factor,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    };
    let custom = |inverse_frequencies| RopeScaling::Custom { inverse_frequencies, attention_factor: 1.0 };
    let llama3 =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 4.0, high_freq_factor: 4.0, original_max_position: 8192 };
    for (scaling, want) in [
        (yarn(1.0, 32.0, None, 4096), "beta_fast: got 1, need at least beta_slow, 32"),
        (yarn(0.0, 0.0, None, 4096), "beta_slow: got 0, need a finite number above 0"),
        (yarn(32.0, 1.0, Some(0.0), 4096), "attention_factor: got 0, need a finite number above 0"),
        (yarn(32.0, 1.0, Some(1e39), 4096), "attention_factor: got inf, need a finite number above 0"),
        (yarn(32.0, 1.0, None, 0), "original_max_position: got 0, need at least 1 token"),
        (llama3, "high_freq_factor: got 4, need above low_freq_factor, 4"),
        (custom(vec![1.0; 31]), "inverse_frequencies: got 31 values, need rotary_dim / 2 of them, 32"),
        (custom([&[f64::NAN][..], &[1.0; 31]].concat()), "inverse_frequencies: got NaN, need finite numbers"),
        (RopeScaling::Linear { factor: 1e-310 }, "inverse_frequencies: got inf, need finite numbers"),
    ] {
        assert_eq!(rope_refusal(|config| config.scaling = scaling.clone()), want, "{scaling:?}");
    }
    let text = rope_refusal(|config| (config.rotary_dim, config.scaling) = (2, RopeScaling::Ntk { factor: 2.0 }));
    assert_eq!(text, "rotary_dim: got 2, need at least 4 for NTK-aware scaling");
    let text = rope_refusal(|config| (config.theta, config.scaling) = (1.0, RopeScaling::yarn(4.0, 4096)));
    assert_eq!(text, "theta: got 1, need above 1 for YaRN");
}

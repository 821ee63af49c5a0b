//! Frequencies and rotations against Hugging Face transformers (`scripts/make_rope_fixtures.py` makes them and says how).

use folio::reference::rope::{RopeProblem, rotate, sin_cos};
use folio::{RopeConfig, RopeScaling};
use serde_json::Value;

fn fixtures(part: &str) -> Vec<Value> {
    let mut file: Value = serde_json::from_str(include_str!("../fixtures/rope.json")).expect("JSON");
    serde_json::from_value(file[part].take()).expect("a list")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// A checkpoint's parameters as a configuration.
fn scaling(case: &Value) -> RopeScaling {
    let parameters = &case["parameters"];
    let number = |name: &str| parameters[name].as_f64();
    let factor = number("factor").unwrap_or(1.0);
    let original_max_position = parameters["original_max_position_embeddings"].as_u64().unwrap_or(0) as u32;
    match parameters["rope_type"].as_str().expect("a type") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor },
        "dynamic" => {
            let len = case["seq_len"].as_f64().expect("a length") / case["max_position"].as_f64().expect("a length");
            RopeScaling::Ntk { factor: factor * len - (factor - 1.0) }
        }
        "yarn" => RopeScaling::Yarn {
            factor,
            original_max_position,
            beta_fast: number("beta_fast").unwrap_or(32.0),
            beta_slow: number("beta_slow").unwrap_or(1.0),
            attention_factor: number("attention_factor"),
            mscale: number("mscale"),
            mscale_all_dim: number("mscale_all_dim"),
            truncate: parameters["truncate"].as_bool().unwrap_or(true),
        },
        "llama3" => RopeScaling::Llama3 {
            factor,
            low_freq_factor: number("low_freq_factor").expect("a factor"),
            high_freq_factor: number("high_freq_factor").expect("a factor"),
            original_max_position,
        },
        name => unreachable!("{name}"),
    }
}

#[test]
fn frequencies_agree_with_transformers() {
    let mut worst = (0.0, String::new());
    for case in fixtures("frequencies") {
        let config = RopeConfig {
            scaling: scaling(&case),
            ..RopeConfig::new(
                case["rotary_dim"].as_u64().expect("a size") as u32,
                case["theta"].as_f64().expect("a base"),
            )
        };
        config.validate(config.rotary_dim.next_multiple_of(8)).expect("a valid configuration");
        let want = numbers(&case["inv_freq"]);
        let got = config.inverse_frequencies();
        assert_eq!(got.len(), want.len(), "{case}");
        // Theirs are f32: a rounded power of a rounded exponent, and a rounded weight where a frequency is blended with one that is divided.
        let tolerance = 1e-6;
        for (pair, (got, want)) in got.iter().zip(&want).enumerate() {
            let error = (got - want).abs() / want;
            assert!(error <= tolerance, "{}, pair {pair}: got {got:e}, want {want:e}", case["name"]);
            if error > worst.0 {
                worst = (error, format!("{}, pair {pair}", case["name"]));
            }
        }
        let factor = case["attention_factor"].as_f64().expect("a factor");
        assert!((config.attention_factor() - factor).abs() <= 1e-15 * factor, "{}: {config:?}", case["name"]);
    }
    println!("frequencies differ most, by {:.1e}, in {}", worst.0, worst.1);
}

#[test]
fn ntk_divides_the_lowest_frequency_by_the_factor_and_leaves_the_highest() {
    for (dim, factor) in [(128, 2.0), (64, 8.0), (4, 3.5)] {
        let plain = RopeConfig::new(dim, 10_000.0);
        let scaled = RopeConfig { scaling: RopeScaling::Ntk { factor }, ..plain.clone() };
        let (plain, scaled) = (plain.inverse_frequencies(), scaled.inverse_frequencies());
        let ratios: Vec<f64> = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
        for (pair, ratio) in ratios.iter().enumerate() {
            let want = factor.powf(2.0 * pair as f64 / f64::from(dim - 2));
            assert!((ratio / want - 1.0).abs() < 1e-12, "{dim}, pair {pair}: {ratio}");
        }
        assert!((ratios[0] - 1.0).abs() < 1e-12 && (ratios[ratios.len() - 1] / factor - 1.0).abs() < 1e-12);
    }
}

#[test]
fn frequencies_of_the_callers_own_are_taken_as_they_are() {
    let inverse_frequencies = vec![1.0, 0.25, 0.0, -0.5];
    let scaling = RopeScaling::Custom { inverse_frequencies: inverse_frequencies.clone(), attention_factor: 1.5 };
    let config = RopeConfig { scaling, ..RopeConfig::new(8, 10_000.0) };
    config.validate(16).expect("valid");
    assert_eq!((config.inverse_frequencies(), config.attention_factor()), (inverse_frequencies, 1.5));
}

#[test]
fn the_oracle_agrees_with_transformers() {
    for case in fixtures("rotations") {
        let size = |name: &str| case[name].as_u64().expect("a size") as usize;
        let x: Vec<f32> = numbers(&case["x"]).into_iter().map(|x| x as f32).collect();
        let positions: Vec<u32> = numbers(&case["positions"]).into_iter().map(|p| p as u32).collect();
        let config = RopeConfig::new(size("rotary_dim") as u32, case["theta"].as_f64().expect("a base"));
        let got = rotate(&RopeProblem {
            x: &x,
            positions: &positions,
            head_dim: size("head_dim"),
            inverse_frequencies: &config.inverse_frequencies(),
            attention_factor: case["attention_factor"].as_f64().expect("a factor"),
            interleaved: case["interleaved"].as_bool().expect("a layout"),
        })
        .expect("a valid problem");
        assert_eq!(x.len(), positions.len() * size("num_heads") * size("head_dim"));
        for (i, (got, want)) in got.values.iter().zip(numbers(&case["turned"])).enumerate() {
            // Their angle is an f64 product: off by 2^-53 of up to 131 071 radians.
            assert!((got - want).abs() < 5e-11, "{}, element {i}: got {got}, want {want}", case["name"]);
        }
    }
}

/// Sines and cosines of exact products, computed with 400 bits.
#[test]
fn the_oracle_knows_large_angles() {
    for (position, frequency, sin, cos) in [
        (1, 1.0, 0.8414709848078965, 0.5403023058681398),
        (1_000, 0.866025, -0.8696892394520775, 0.49359966246064935),
        (131_071, 1.0, -0.5752416837547893, -0.8179834993879491),
        (131_071, 0.01, -0.6177383683222202, -0.786383690257244),
        (1_048_576, 0.3, -0.9150328108823025, 0.4033794181770215),
        (4_000_000_000, 1.0, 0.7392870259917508, -0.6733904463238786),
        (4_000_000_000, 0.1, 0.9965407868641053, 0.08310511486226235),
        (4_000_000_000, 1e-07, -0.850919359639167, -0.5252963386425514),
        (4_294_967_295, 0.7, -0.9652280327302291, 0.2614093434285239),
        (4_294_967_295, 6.25, 0.7785449518269374, -0.6275888446943523),
        (4_294_967_295, -2.5, 0.2680620836330253, -0.9634016396697282),
    ] {
        let got = sin_cos(position, frequency);
        assert!((got.0 - sin).abs() < 2e-15 && (got.1 - cos).abs() < 2e-15, "{position} * {frequency}: {got:?}");
    }
}

#[test]
fn the_oracle_refuses_what_does_not_fit() {
    let problem = RopeProblem {
        x: &[0.0; 32],
        positions: &[0, 1],
        head_dim: 8,
        inverse_frequencies: &[1.0; 4],
        attention_factor: 1.0,
        interleaved: false,
    };
    assert!(rotate(&problem).is_ok());
    assert!(rotate(&RopeProblem { x: &[], positions: &[], ..problem }).is_ok());
    assert!(rotate(&RopeProblem { inverse_frequencies: &[1.0; 5], ..problem }).is_err());
    assert!(rotate(&RopeProblem { head_dim: 0, ..problem }).is_err());
    assert!(rotate(&RopeProblem { head_dim: 12, ..problem }).is_err());
    assert!(rotate(&RopeProblem { positions: &[0, 1, 2], ..problem }).is_err());
    assert!(rotate(&RopeProblem { positions: &[], ..problem }).is_err());
}

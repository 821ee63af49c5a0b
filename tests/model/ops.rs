//! The small kernels against f64.

use folio::model::{
    Activation, ActivationKind, Factor, Norm, NormConfig, NormKind, PositionEmbedding, Rows, SelectRows,
};
use folio::{BufferRef, Error, Gpu};

use crate::adapter;
use crate::buffers::{block_on, empty, floats, read, run, words_buffer};

/// Runs a test on every family of kernels.
fn on_all(test: impl Fn(&Gpu, &str)) {
    for how in adapter::ALL {
        if let Some(gpu) = adapter::open(how) {
            test(&gpu, &format!("{how:?}"));
        }
    }
}

/// Each value within `bound(index)` of `want`; reports the worst.
fn assert_close(what: &str, got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let excess = |i: usize| {
        let error = (f64::from(got[i]) - want[i]).abs() / bound(i);
        if error.is_nan() { f64::INFINITY } else { error }
    };
    let worst = (0..got.len()).max_by(|&a, &b| excess(a).total_cmp(&excess(b))).unwrap();
    assert!(
        excess(worst) <= 1.0,
        "{what}: [{worst}] got {}, want {}, bound {:e}",
        got[worst],
        want[worst],
        bound(worst)
    );
}

/// Rows that are hard to normalise, and ordinary ones.
fn adversarial_row(rng: &mut fastrand::Rng, row: usize, width: usize) -> Vec<f32> {
    let normal = |rng: &mut fastrand::Rng| (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0;
    (0..width)
        .map(|i| match row % 8 {
            0 => normal(rng),
            1 => 1e4 + 0.01 * normal(rng),
            2 => -3e5 + normal(rng),
            3 => 1e12 * normal(rng),
            4 => 1e-6 * normal(rng),
            5 => 0.0,
            6 => 7.25, // no variance
            _ => {
                if i == 0 {
                    2e4
                } else {
                    0.1 * normal(rng)
                }
            } // a massive activation, in front
        })
        .collect()
}

fn norm_f64(config: &NormConfig, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
    let n = x.len() as f64;
    let x: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    let mean = if config.kind == NormKind::Layer { x.iter().sum::<f64>() / n } else { 0.0 };
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    let scale = 1.0 / (variance + f64::from(config.eps)).sqrt();
    (0..x.len())
        .map(|i| {
            (x[i] - mean) * scale * f64::from(weight[i] + config.weight_offset)
                + bias.map_or(0.0, |bias| f64::from(bias[i]))
        })
        .collect()
}

#[test]
fn norms_match_f64() {
    on_all(|gpu, family| {
        let mut rng = fastrand::Rng::with_seed(11);
        for (width, rows, kind, bias, weight_offset) in [
            (64, 1, NormKind::Rms, false, 0.0),
            (128, 70, NormKind::Rms, false, 0.0),
            (4, 9, NormKind::Layer, true, 0.0),
            (8, 300, NormKind::Rms, true, 1.0),
            (260, 17, NormKind::Layer, false, 0.0),
            (768, 33, NormKind::Layer, true, 0.0),
            (1028, 8, NormKind::Rms, false, 1.0),
            (2304, 9, NormKind::Layer, true, 1.0),
            (8192, 8, NormKind::Rms, false, 0.0),
            (8192, 8, NormKind::Layer, true, 0.0),
            (16_384, 2, NormKind::Rms, false, 0.0),
        ] {
            let config = NormConfig { bias, weight_offset, ..NormConfig::new(kind, width, 1e-5) };
            let n = width as usize;
            let x: Vec<f32> = (0..rows as usize).flat_map(|row| adversarial_row(&mut rng, row, n)).collect();
            let weight: Vec<f32> = (0..n).map(|_| rng.f32() * 4.0 - 2.0).collect();
            let bias: Option<Vec<f32>> = bias.then(|| (0..n).map(|_| rng.f32() - 0.5).collect());
            let norm = block_on(Norm::new(gpu, config)).unwrap();
            let weights = norm.weights(&weight, bias.as_deref()).unwrap();
            // Rows behind others in both buffers.
            let pad = 256 / 4;
            let input = floats(gpu, &[vec![f32::NAN; pad], x.clone()].concat());
            let out = empty(gpu, pad + x.len() + 64);
            let at = |buffer| Rows { offset: pad as u64 * 4, ..Rows::new(buffer, rows, width) };
            run(gpu, |pass| {
                norm.record(&mut *pass, &weights, at(&input), at(&out)).unwrap();
                norm.record_in_place(&mut *pass, &weights, at(&input)).unwrap();
            });
            let want: Vec<f64> = x.chunks(n).flat_map(|x| norm_f64(&config, x, &weight, bias.as_deref())).collect();
            let got = read(gpu, &out);
            let what = format!("{config:?} {rows} rows, {family}");
            // Sums of up to `width / lanes` terms, a division and a root: a few units in the last place of the largest term.
            let bound = |i: usize| 4e-6 * (want[i].abs() + f64::from(weight[i % n]).abs() + 0.5);
            assert_close(&what, &got[pad..pad + x.len()], &want, bound);
            assert!(got[..pad].iter().chain(&got[pad + x.len()..]).all(|v| v.is_nan()), "{what}: writes outside");
            let in_place = read(gpu, &input);
            assert!(
                in_place[pad..].iter().zip(&got[pad..]).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{what}: in place"
            );
        }
    });
}

#[test]
fn norms_are_added() {
    on_all(|gpu, family| {
        let mut rng = fastrand::Rng::with_seed(12);
        for (width, rows, kind, bias) in
            [(64, 1, NormKind::Rms, false), (260, 17, NormKind::Layer, true), (1028, 9, NormKind::Rms, false)]
        {
            let config = NormConfig { bias, accumulate: true, ..NormConfig::new(kind, width, 1e-5) };
            let n = width as usize;
            let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.f32() * 4.0 - 2.0).collect() };
            let (x, old, weight) = (values(n * rows as usize), values(n * rows as usize), values(n));
            let bias = bias.then(|| values(n));
            let norm = block_on(Norm::new(gpu, config)).unwrap();
            let weights = norm.weights(&weight, bias.as_deref()).unwrap();
            let (input, out) = (floats(gpu, &x), floats(gpu, &old));
            run(gpu, |pass| {
                norm.record(&mut *pass, &weights, Rows::new(&input, rows, width), Rows::new(&out, rows, width))
                    .unwrap();
                norm.record_in_place(&mut *pass, &weights, Rows::new(&input, rows, width)).unwrap();
            });
            let normed: Vec<f64> = x.chunks(n).flat_map(|x| norm_f64(&config, x, &weight, bias.as_deref())).collect();
            for (got, old) in [(read(gpu, &out), &old), (read(gpu, &input), &x)] {
                let want: Vec<f64> = normed.iter().zip(old).map(|(new, old)| f64::from(*old) + new).collect();
                // As in `norms_match_f64`, and the rounding of the sum.
                let bound = |i: usize| 4e-6 * (normed[i].abs() + f64::from(weight[i % n]).abs() + 0.5 + want[i].abs());
                assert_close(&format!("{config:?} {rows} rows, {family}"), &got, &want, bound);
            }
        }
    });
}

#[test]
fn norms_keep_rows_apart() {
    on_all(|gpu, family| {
        for kind in [NormKind::Rms, NormKind::Layer] {
            for width in [64, 1024] {
                let n = width as usize;
                let norm = block_on(Norm::new(gpu, NormConfig::new(kind, width, 1e-6))).unwrap();
                let weights = norm.weights(&vec![1.0; n], None).unwrap();
                let mut x: Vec<f32> = (0..5 * n).map(|i| (i % 13) as f32).collect();
                x[2 * n] = f32::NAN;
                let input = floats(gpu, &x);
                run(gpu, |pass| norm.record_in_place(&mut *pass, &weights, Rows::new(&input, 5, width)).unwrap());
                let got = read(gpu, &input);
                for (row, values) in got.chunks(n).enumerate() {
                    assert_eq!(values.iter().all(|v| v.is_finite()), row != 2, "{kind:?} {width} row {row} {family}");
                }
            }
        }
    });
}

/// Abramowitz and Stegun 7.1.5 (series) and 7.1.14 (continued fraction).
fn erfc(z: f64) -> f64 {
    if z < 0.0 {
        return 2.0 - erfc(-z);
    }
    if z < 2.5 {
        let (mut term, mut sum) = (z, z);
        for k in 1..80 {
            term *= -z * z / f64::from(k);
            sum += term / f64::from(2 * k + 1);
        }
        return 1.0 - sum * 2.0 / std::f64::consts::PI.sqrt();
    }
    let fraction = (1..200).rev().fold(0.0, |f, k| f64::from(k) / 2.0 / (z + f));
    (-z * z).exp() / ((z + fraction) * std::f64::consts::PI.sqrt())
}

fn act_f64(kind: ActivationKind, x: f64) -> f64 {
    let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
    match kind {
        ActivationKind::Silu => x * sigmoid(x),
        ActivationKind::Gelu => x * 0.5 * erfc(-x / std::f64::consts::SQRT_2),
        ActivationKind::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            x * sigmoid(2.0 * u)
        }
        ActivationKind::Relu => x.max(0.0),
        ActivationKind::ClampedSwiglu { alpha, limit } => {
            let g = x.min(f64::from(limit.get()));
            g * sigmoid(f64::from(alpha.get()) * g)
        }
    }
}

#[test]
fn activations_match_f64() {
    on_all(|gpu, family| {
        let mut rng = fastrand::Rng::with_seed(12);
        let [alpha, limit] = [1.702, 2.0].map(|value| Factor::new(value).unwrap());
        let clamped = ActivationKind::ClampedSwiglu { alpha, limit };
        for (kind, gated, rows, width) in ActivationKind::ALL.into_iter().chain([clamped]).flat_map(|kind| {
            [(kind, true, 1, 4), (kind, true, 37, 172), (kind, false, 70, 1028), (kind, true, 3, 3072)]
        }) {
            let mut value = || match rng.u32(0..8) {
                0 => [0.0, -0.0, 1e30, -1e30, 88.5, -88.5, 104.0, -104.0, 13.0, -13.0, 3e38, -3e38][rng.usize(0..12)],
                1 => 1e-20 * (rng.f32() - 0.5),
                2 => 30.0 * (rng.f32() - 0.5),
                _ => 8.0 * (rng.f32() - 0.5),
            };
            let n = rows * width;
            let gate: Vec<f32> = (0..n).map(|_| value()).collect();
            let up: Vec<f32> = (0..n).map(|_| 8.0 * (rng.f32() - 0.5)).collect();
            let x: Vec<f32> = if gated {
                gate.chunks(width).zip(up.chunks(width)).flat_map(|(gate, up)| [gate, up].concat()).collect()
            } else {
                gate.clone()
            };
            let activation = block_on(Activation::new(gpu, kind, gated, width as u32)).unwrap();
            let (input, out) = (floats(gpu, &x), empty(gpu, n + 4));
            let (in_width, rows) = (x.len() / rows, rows as u32);
            run(gpu, |pass| {
                let (x, out) = (Rows::new(&input, rows, in_width as u32), Rows::new(&out, rows, width as u32));
                activation.record(&mut *pass, x, out).unwrap();
            });
            let want: Vec<f64> = (0..n)
                .map(|i| {
                    let factor = match kind {
                        _ if !gated => 1.0,
                        ActivationKind::ClampedSwiglu { limit, .. } => {
                            f64::from(up[i].clamp(-limit.get(), limit.get()) + 1.0)
                        }
                        _ => f64::from(up[i]),
                    };
                    act_f64(kind, f64::from(gate[i])) * factor
                })
                .collect();
            let got = read(gpu, &out);
            let what = format!("{kind:?} gated {gated} [{rows}, {width}] {family}");
            // exp(-e) is off by about e units in the last place: relative to the result far out in the tail, where that is tiny.
            let exponent = |x: f64| match kind {
                ActivationKind::Silu => x.abs(),
                ActivationKind::Gelu => x * x / 2.0,
                // Rounded in each of four steps.
                ActivationKind::GeluTanh => 2.0 * (1.6 * x + 0.0714 * x.powi(3)).abs(),
                ActivationKind::Relu => 0.0,
                ActivationKind::ClampedSwiglu { .. } => 1.702 * x.abs(),
            };
            let bound =
                |i: usize| want[i].abs() * (6e-7 + 1.5e-7 * exponent(f64::from(gate[i])).clamp(1.0, 100.0)) + 1e-36;
            assert_close(&what, &got[..n], &want, bound);
            assert!(got[n..].iter().all(|v| v.is_nan()), "{what}: writes outside");
        }
    });
}

#[test]
fn positions_and_chosen_rows_are_exact() {
    on_all(|gpu, family| {
        let mut rng = fastrand::Rng::with_seed(13);
        for (width, num_positions, rows) in [(4, 1, 1), (768, 1024, 70), (20, 3, 33)] {
            let n = width as usize;
            let table: Vec<f32> = (0..num_positions * n).map(|_| rng.f32() - 0.5).collect();
            let x: Vec<f32> = (0..rows * n).map(|_| rng.f32() - 0.5).collect();
            let mut positions: Vec<u32> = (0..rows).map(|_| rng.u32(0..num_positions as u32)).collect();
            positions[0] = num_positions as u32 + 5; // the kernel's own clamp
            let embedding = block_on(PositionEmbedding::new(gpu, &table, width)).unwrap();
            assert_eq!(embedding.num_positions(), num_positions as u32);
            let select = block_on(SelectRows::new(gpu, width)).unwrap();
            let mut chosen: Vec<u32> = (0..7).map(|_| rng.u32(0..rows as u32)).collect();
            chosen[3] = u32::MAX;
            let (input, out) = (floats(gpu, &x), empty(gpu, 7 * n));
            let (position_buffer, chosen_buffer) = (words_buffer(gpu, &positions), words_buffer(gpu, &chosen));
            run(gpu, |pass| {
                let x = Rows::new(&input, rows as u32, width);
                embedding.record(&mut *pass, x, &position_buffer).unwrap();
                select.record(&mut *pass, x, &chosen_buffer, Rows::new(&out, 7, width)).unwrap();
            });
            let want: Vec<f32> = (0..rows * n)
                .map(|i| x[i] + table[(positions[i / n] as usize).min(num_positions - 1) * n + i % n])
                .collect();
            assert_eq!(read(gpu, &input), want, "{width} {family}");
            let want: Vec<f32> = chosen
                .iter()
                .flat_map(|&row| want.chunks(n).nth((row as usize).min(rows - 1)).unwrap().to_vec())
                .collect();
            assert_eq!(read(gpu, &out), want, "{width} {family}");
        }
    });
}

/// More workgroups than one dimension of a grid holds.
#[test]
fn grids_of_two_dimensions() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let gpu = &gpu;
    // 64 vec4s per workgroup: one more workgroup than fits.
    let rows = 65_535 * 64 + 1_u32;
    let width = 4;
    let x: Vec<f32> = (0..rows * width).map(|i| (i % 251) as f32 - 100.0).collect();
    let activation = block_on(Activation::new(gpu, ActivationKind::Relu, false, width)).unwrap();
    let (input, out) = (floats(gpu, &x), empty(gpu, x.len()));
    run(gpu, |pass| {
        activation.record(&mut *pass, Rows::new(&input, rows, width), Rows::new(&out, rows, width)).unwrap();
    });
    let got = read(gpu, &out);
    assert!(got.iter().zip(&x).all(|(got, x)| *got == x.max(0.0)));
}

#[test]
fn bad_arguments_are_named() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let gpu = &gpu;
    let named = |result: folio::Result<()>, argument: &str| match result {
        Err(Error::Argument { argument: name, .. }) => assert_eq!(name, argument),
        other => panic!("{argument}: {other:?}"),
    };
    let good = NormConfig::new(NormKind::Layer, 8, 1e-5);
    for (config, field) in [
        (NormConfig { width: 0, ..good }, "width"),
        (NormConfig { width: 6, ..good }, "width"),
        (NormConfig { width: 16_388, ..good }, "width"),
        (NormConfig { eps: 0.0, ..good }, "eps"),
        (NormConfig { eps: f32::NAN, ..good }, "eps"),
        (NormConfig { weight_offset: f32::INFINITY, ..good }, "weight_offset"),
    ] {
        named(block_on(Norm::new(gpu, config)).map(drop), field);
    }
    let norm = block_on(Norm::new(gpu, good)).unwrap();
    named(norm.weights(&[1.0; 7], None).map(drop), "weight");
    named(norm.weights(&[1.0; 8], Some(&[1.0; 8])).map(drop), "bias");
    let weights = norm.weights(&[1.0; 8], None).unwrap();
    let wide = block_on(Norm::new(gpu, NormConfig { width: 16, ..good })).unwrap();
    let wide_weights = wide.weights(&[1.0; 16], None).unwrap();
    named(block_on(PositionEmbedding::new(gpu, &[0.0; 9], 4)).map(drop), "table");
    named(block_on(PositionEmbedding::new(gpu, &[], 4)).map(drop), "table");
    named(block_on(SelectRows::new(gpu, 3)).map(drop), "width");
    named(block_on(Activation::new(gpu, ActivationKind::Silu, true, 2)).map(drop), "width");
    let embedding = block_on(PositionEmbedding::new(gpu, &[0.0; 8], 4)).unwrap();
    let select = block_on(SelectRows::new(gpu, 4)).unwrap();
    let activation = block_on(Activation::new(gpu, ActivationKind::Silu, true, 4)).unwrap();
    let (a, b) = (empty(gpu, 256), empty(gpu, 256));
    run(gpu, |pass| {
        named(norm.record(&mut *pass, &weights, Rows::new(&a, 2, 4), Rows::new(&b, 2, 8)), "x");
        named(norm.record(&mut *pass, &weights, Rows::new(&a, 0, 8), Rows::new(&b, 0, 8)), "x");
        named(norm.record(&mut *pass, &weights, Rows::new(&a, 33, 8), Rows::new(&b, 33, 8)), "x");
        named(norm.record(&mut *pass, &weights, Rows::new(&a, 2, 8), Rows::new(&b, 3, 8)), "out");
        named(norm.record(&mut *pass, &weights, Rows::new(&a, 2, 8), Rows::new(&a, 2, 8)), "out");
        named(norm.record(&mut *pass, &wide_weights, Rows::new(&a, 2, 8), Rows::new(&b, 2, 8)), "weights");
        named(activation.record(&mut *pass, Rows::new(&a, 2, 4), Rows::new(&b, 2, 4)), "x");
        named(activation.record(&mut *pass, Rows::new(&a, 2, 8), Rows::new(&b, 2, 8)), "out");
        named(activation.record(&mut *pass, Rows::new(&a, 2, 8), Rows::new(&a, 2, 4)), "out");
        named(embedding.record(&mut *pass, Rows::new(&a, 2, 4), BufferRef::new(&b, 0, 4)), "positions");
        named(embedding.record(&mut *pass, Rows::new(&a, 2, 4), &a), "x");
        named(select.record(&mut *pass, Rows::new(&a, 2, 4), &b, Rows::new(&b, 2, 4)), "out");
        named(select.record(&mut *pass, Rows::new(&a, 2, 4), BufferRef::new(&b, 4, 8), Rows::new(&a, 2, 4)), "indices");
    });
}

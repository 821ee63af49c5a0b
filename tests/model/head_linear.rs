//! Matrices of heads against f64.

use folio::kernel::RopeShape;
use folio::model::{HeadLinear, HeadLinearConfig, HeadRope, LinearKernels, ModelError, Rows, WeightFormat};
use folio::reference::rope::{RopeProblem, rotate};
use folio::{BufferRef, Gpu, RopeConfig, RopeLayout};

use crate::adapter;
use crate::buffers::{block_on, empty, floats, read, run, words_buffer};
use crate::shaders_ops::check;

const FORMATS: [WeightFormat; 5] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::INT8,
    WeightFormat::INT4,
    WeightFormat::Int4 { group_size: 64 },
];

/// (heads, inputs, outputs, rotated): fewer and more than a block of columns, a slice of inputs and a group of scales, and no multiples of them.
const SHAPES: [(u32, u32, u32, u32); 4] = [(3, 12, 24, 8), (2, 136, 70, 0), (5, 64, 128, 16), (1, 300, 5, 2)];

fn config((num_heads, in_features, out_features, rotary_dim): (u32, u32, u32, u32), i: usize) -> HeadLinearConfig {
    let layout = [RopeLayout::Interleaved, RopeLayout::HalfSplit][i % 2];
    let rope = (rotary_dim > 0).then_some(RopeShape { layout, rotary_dim, rotary_start: 8 });
    HeadLinearConfig { num_heads, in_features, out_features, format: FORMATS[i % FORMATS.len()], rope }
}

fn random(rng: &mut fastrand::Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.f32() * 2.0 - 1.0).collect()
}

struct Layer {
    layer: HeadLinear,
    /// `[heads, out, in]`, as the format keeps them.
    weights: Vec<f32>,
    rope: Option<RopeConfig>,
}

fn layer(gpu: &Gpu, config: HeadLinearConfig) -> Layer {
    let mut rng = fastrand::Rng::with_seed(5);
    let rope = config.rope.map(|shape| RopeConfig {
        layout: shape.layout,
        ..RopeConfig::new(shape.rotary_dim, 100.0).with_start(shape.rotary_start)
    });
    let head_rope = rope.as_ref().map(|rope| HeadRope::new(gpu, rope).unwrap());
    let mut weights = Vec::new();
    let mut fill = |head: u32, out: &mut [f32]| {
        assert_eq!(head as usize, weights.len() / out.len());
        out.copy_from_slice(&random(&mut rng, out.len()));
        weights.extend(out.chunks(config.in_features as usize).flat_map(|row| config.format.round_trip(row).unwrap()));
        Ok(())
    };
    let kernels = LinearKernels::new();
    let layer = block_on(HeadLinear::new(gpu, &kernels, config, head_rope.as_ref(), &mut fill)).unwrap();
    Layer { layer, weights, rope }
}

fn compute(gpu: &Gpu, layer: &HeadLinear, x: &[f32], positions: &[u32]) -> Vec<f32> {
    let (config, rows) = (layer.config(), positions.len() as u32);
    let y_width = config.num_heads * config.y_width();
    let (x, y) = (floats(gpu, x), floats(gpu, &vec![f32::NAN; (rows * y_width) as usize]));
    let list = words_buffer(gpu, positions);
    let list = config.rope.map(|_| BufferRef::new(&list, 0, u64::from(rows) * 4));
    let x = Rows::new(&x, rows, config.num_heads * config.x_width());
    run(gpu, |pass| layer.record(&mut *pass, x, Rows::new(&y, rows, y_width), list)).unwrap();
    read(gpu, &y)
}

#[test]
fn every_format_and_family_agrees_with_f64() {
    for how in adapter::ALL {
        let Some(gpu) = adapter::open(how) else { return };
        // Each shape meets each format, on some family or another.
        for (i, shape) in SHAPES.into_iter().enumerate() {
            let offset = adapter::ALL.iter().position(|other| *other == how).unwrap();
            let config = config(shape, i + offset);
            let Layer { layer, weights, rope } = layer(&gpu, config);
            for rows in [1_usize, 2, 19] {
                let what = format!("{how:?} {config:?} {rows} rows");
                let mut rng = fastrand::Rng::with_seed(rows as u64);
                let [heads, inputs, outputs] =
                    [config.num_heads, config.in_features, config.out_features].map(|size| size as usize);
                let [x_width, y_width] = [config.x_width(), config.y_width()].map(|size| size as usize);
                let x = random(&mut rng, rows * heads * x_width);
                let positions: Vec<u32> = (0..rows as u32).map(|row| row * 37 % 50).collect();
                let got = compute(&gpu, &layer, &x, &positions);
                for (i, (x, y)) in x.chunks(x_width).zip(got.chunks(y_width)).enumerate() {
                    let matrix = &weights[i % heads * outputs * inputs..][..outputs * inputs];
                    for (got, weights) in y.iter().zip(matrix.chunks(inputs)) {
                        let products = || x.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w));
                        // A rounding for each addition, of what is at most the sum of all; two for a weight that is scaled.
                        let bound = products().map(f64::abs).sum::<f64>() * (inputs + 3) as f64 * 2.0_f64.powi(-24);
                        let error = (f64::from(*got) - products().sum::<f64>()).abs();
                        assert!(error <= bound + 1e-30, "row and head {i}, {what}: off by {error:e}, not {bound:e}");
                    }
                    let Some(rope) = &rope else { continue };
                    let frequencies = rope.inverse_frequencies();
                    let want = rotate(&RopeProblem {
                        x: &x[inputs..],
                        positions: &positions[i / heads..=i / heads],
                        head_dim: x_width - inputs,
                        inverse_frequencies: &frequencies,
                        attention_factor: 1.0,
                        interleaved: rope.layout == RopeLayout::Interleaved,
                    })
                    .unwrap();
                    for (got, want) in y[outputs..].iter().zip(&want.values) {
                        // 2^-21 of both elements of a pair, which are below 1.
                        assert!((f64::from(*got) - want).abs() < 1e-6, "row and head {i}, {what}: {got}, not {want}");
                    }
                }
                // A row alone has the same bits.
                let row = rows / 2;
                let own = x[row * heads * x_width..][..heads * x_width].to_vec();
                let alone = compute(&gpu, &layer, &own, &positions[row..=row]);
                let beside = &got[row * heads * y_width..][..heads * y_width];
                assert!(alone.iter().zip(beside).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}: other bits alone");
            }
        }
    }
}

#[test]
fn texts_are_sound() {
    for (i, shape) in SHAPES.into_iter().chain([(128, 128, 512, 64), (128, 512, 128, 0)]).enumerate() {
        for shift in 0..FORMATS.len() {
            let config = config(shape, i + shift);
            for many in [false, true] {
                check(&config.source(many).unwrap(), &format!("{config:?} {many}"));
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let good = config(SHAPES[0], 0);
    let new = |config: HeadLinearConfig, rope: Option<&HeadRope>, value: f32| {
        let mut fill = |_: u32, out: &mut [f32]| {
            out.fill(value);
            Ok(())
        };
        block_on(HeadLinear::new(&gpu, &LinearKernels::new(), config, rope, &mut fill))
    };
    let rope = HeadRope::new(&gpu, &RopeConfig::new(8, 10.0)).unwrap();
    let says = |result: Result<HeadLinear, ModelError>, parts: &[&str]| {
        let error = result.expect_err("refused").to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    says(new(good, None, 0.0), &["rope", "None"]);
    says(new(good, Some(&rope), 0.0), &["rope", "HalfSplit", "Interleaved"]);
    let plain = HeadLinearConfig { rope: None, ..good };
    says(new(HeadLinearConfig { num_heads: 0, ..plain }, None, 0.0), &["num_heads", "got 0"]);
    says(new(HeadLinearConfig { num_heads: 65_536, ..plain }, None, 0.0), &["num_heads", "1 to 65535"]);
    says(new(HeadLinearConfig { in_features: 1 << 20, ..plain }, None, 0.0), &["in_features"]);
    says(new(HeadLinearConfig { out_features: 0, ..plain }, None, 0.0), &["out_features"]);
    says(new(HeadLinearConfig { format: WeightFormat::Int8 { group_size: 5 }, ..plain }, None, 0.0), &["group_size"]);
    says(new(HeadLinearConfig { format: WeightFormat::F16, ..plain }, None, 1e6), &["1000000"]);
    let large = HeadLinearConfig { num_heads: 60_000, in_features: 1 << 14, out_features: 1 << 14, ..plain };
    says(new(large, None, 0.0), &["projections of latents", "storage binding"]);

    let layer = new(plain, None, 1.0).unwrap();
    let (x, y, list) = (empty(&gpu, 36 * 2), empty(&gpu, 72 * 2), words_buffer(&gpu, &[0, 1]));
    let record = |x: Rows<'_>, y: Rows<'_>, positions: Option<BufferRef<'_>>| {
        run(&gpu, |pass| layer.record(&mut *pass, x, y, positions))
    };
    record(Rows::new(&x, 2, 36), Rows::new(&y, 2, 72), None).unwrap();
    let refused = |result: folio::Result<()>, part: &str| {
        let error = result.expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(record(Rows::new(&x, 0, 36), Rows::new(&y, 0, 72), None), "x: got [0, 36]");
    refused(record(Rows::new(&x, 2, 35), Rows::new(&y, 2, 72), None), "x: got [2, 35]");
    refused(record(Rows::new(&x, 2, 36), Rows::new(&y, 1, 72), None), "y: got [1, 72]");
    refused(record(Rows::new(&x, 3, 36), Rows::new(&y, 3, 72), None), "x");
    refused(record(Rows::new(&y, 2, 36), Rows::new(&y, 2, 72), None), "y: got the buffer of an input");
    refused(
        record(Rows::new(&x, 2, 36), Rows::new(&y, 2, 72), Some(BufferRef::new(&list, 0, 8))),
        "positions: got some",
    );
}

//! Conversion of blocks, against llama.cpp's own package.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests fail by panicking, and say what they measure"
)]

use safetensors::SafeTensors;

use super::{BlockType, Header};
use crate::model::elements::ElementType;
use crate::model::{Checkpoint, TensorSource, WeightFormat, WeightGrid};

const TYPES: [BlockType; 13] = [
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
    BlockType::Q2K,
    BlockType::Q3K,
    BlockType::Q4K,
    BlockType::Q5K,
    BlockType::Q6K,
    BlockType::Iq4Nl,
    BlockType::Iq4Xs,
    BlockType::Mxfp4,
];

/// Bytes of some blocks, and their values by `gguf.quants.dequantize`; `scripts/make_gguf_fixtures.py` makes them.
fn fixture(kind: BlockType) -> (Vec<u8>, Vec<f32>) {
    static FILE: &[u8] = include_bytes!("../../../tests/fixtures/gguf/blocks.safetensors");
    let file = SafeTensors::deserialize(FILE).unwrap();
    let bytes = file.tensor(&format!("{kind}.bytes")).unwrap().data().to_vec();
    let values = file.tensor(&format!("{kind}.values")).unwrap();
    let (words, rest) = values.data().as_chunks::<4>();
    assert!(rest.is_empty());
    (bytes, words.iter().map(|word| f32::from_le_bytes(*word)).collect())
}

#[test]
fn values_have_the_bits_of_the_package() {
    for kind in TYPES {
        let (bytes, values) = fixture(kind);
        assert_eq!(bytes.len() / kind.bytes() * kind.len(), values.len(), "{kind}");
        let mut read = vec![f32::NAN; values.len()];
        kind.read(&bytes, 0, &mut read);
        for (i, (read, value)) in read.iter().zip(&values).enumerate() {
            assert_eq!(read.to_bits(), value.to_bits(), "{kind}, element {i}: {read} for {value}");
        }
        assert!(values.iter().filter(|value| **value != 0.0).count() > values.len() / 2, "{kind}: mostly zeros");
    }
}

#[test]
fn any_range_of_elements_can_be_read() {
    for kind in TYPES {
        let (bytes, values) = fixture(kind);
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..200 {
            let first = random.usize(..values.len());
            let mut read = vec![f32::NAN; random.usize(..=values.len() - first)];
            kind.read(&bytes, first, &mut read);
            assert_eq!(read, values[first..first + read.len()], "{kind} from {first} on");
        }
    }
}

#[test]
fn grids_are_those_of_the_values() {
    const LEN: usize = WeightGrid::GROUP_SIZE as usize;
    for kind in TYPES {
        let (bytes, values) = fixture(kind);
        let mut grids = vec![None; values.len() / LEN];
        kind.grids(&bytes, 0, &mut grids);
        let is_4_bits = [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q4K].contains(&kind);
        assert!(grids.iter().all(|grid| grid.is_some() == is_4_bits), "{kind}");
        for (group, (values, grid)) in values.chunks(LEN).zip(grids).enumerate() {
            let Some(WeightGrid { scale: distance, min: zero }) = grid else { continue };
            for value in values {
                let distance = f64::from(distance);
                let code = (f64::from(*value) - f64::from(zero)) / distance;
                // On a grid of one value every code stands for it.
                let code = if distance == 0.0 { 0.0 } else { code.round().clamp(0.0, 15.0) };
                // The value was rounded to f32 once or twice.
                let rounding = (15.0 * distance.abs() + f64::from(zero.abs())) * f64::from(f32::EPSILON);
                let error = (f64::from(zero) + code * distance - f64::from(*value)).abs();
                assert!(error <= rounding, "{kind}, group {group}: {value} is {error} from code {code}");
            }
        }
    }
}

/// Root mean square of the error over that of the weights, and largest error over the largest weight, of types in formats: what docs/models.md says.
const LOSSES: [(&str, [&str; 3]); 13] = [
    ("IQ4_NL", ["2.1e-4 (3.2e-4)", "1.1e-3 (3.2e-3)", "6.6e-2 (6.0e-2)"]),
    ("IQ4_XS", ["1.9e-4 (2.6e-4)", "1.3e-3 (3.1e-3)", "6.7e-2 (6.2e-2)"]),
    ("MXFP4", ["0.0e0 (0.0e0)", "5.6e-3 (3.9e-3)", "8.5e-2 (6.6e-2)"]),
    ("Q2_K", ["2.1e-4 (3.5e-4)", "4.2e-3 (3.9e-3)", "4.1e-2 (3.5e-2)"]),
    ("Q3_K", ["2.1e-4 (3.6e-4)", "4.6e-3 (3.9e-3)", "6.9e-2 (5.8e-2)"]),
    ("Q4_0", ["1.6e-4 (2.6e-4)", "5.3e-3 (3.9e-3)", "3.0e-3 (3.8e-3)"]),
    ("Q4_1", ["1.9e-4 (4.0e-4)", "5.2e-3 (3.9e-3)", "3.8e-3 (4.0e-3)"]),
    ("Q4_K", ["2.0e-4 (4.5e-4)", "3.8e-3 (3.9e-3)", "9.5e-4 (1.7e-3)"]),
    ("Q5_0", ["1.7e-4 (2.7e-4)", "5.3e-3 (3.9e-3)", "8.0e-2 (5.3e-2)"]),
    ("Q5_1", ["1.9e-4 (2.5e-4)", "5.3e-3 (3.8e-3)", "7.5e-2 (5.5e-2)"]),
    ("Q5_K", ["2.1e-4 (3.4e-4)", "3.8e-3 (3.9e-3)", "3.4e-2 (3.4e-2)"]),
    ("Q6_K", ["2.1e-4 (3.5e-4)", "4.5e-3 (3.8e-3)", "7.2e-2 (6.5e-2)"]),
    ("Q8_0", ["2.1e-4 (4.1e-4)", "0.0e0 (0.0e0)", "7.9e-2 (6.3e-2)"]),
];

/// Sums over tensors of a type.
#[derive(Clone, Copy, Default)]
struct Loss {
    squares: f64,
    errors: f64,
    largest: f64,
}

/// Adds what a format loses of a matrix; the largest error is over its largest weight.
fn add_loss(checkpoint: &Checkpoint, source: &TensorSource, format: WeightFormat, loss: &mut Loss) {
    let [rows, columns] = source.shape();
    let (mut largest_weight, mut largest_error) = (0.0_f64, 0.0_f64);
    for row in 0..rows {
        let mut weights = vec![0.0; columns];
        checkpoint.rows(source, row, &mut weights).unwrap();
        let mut grids = vec![None; columns.div_ceil(WeightGrid::GROUP_SIZE as usize)];
        checkpoint.grids(source, row, &mut grids).unwrap();
        let stored = format.round_trip_on(&weights, &grids).unwrap();
        for (i, (weight, stored)) in weights.iter().zip(&stored).enumerate() {
            let (weight, error) = (f64::from(*weight), (f64::from(*stored) - f64::from(*weight)).abs());
            loss.squares += weight * weight;
            loss.errors += error * error;
            largest_weight = largest_weight.max(weight.abs());
            largest_error = largest_error.max(error);
            // The bound that WeightGrid promises; the last term is the rounding of the weight itself.
            if let (WeightFormat::INT4, Some(grid)) = (format, grids[i / WeightGrid::GROUP_SIZE as usize]) {
                let (scale, min) = (f64::from(grid.scale), f64::from(grid.min));
                let smallest = min.min(min + 15.0 * scale).abs();
                let bound = (8.0 * scale.abs() + smallest) / 256.0 + weight.abs() * f64::from(f32::EPSILON);
                assert!(error <= bound, "{error} beyond {bound}");
            }
        }
    }
    loss.largest = loss.largest.max(largest_error / largest_weight);
}

#[test]
fn formats_lose_what_the_table_says() {
    const FORMATS: [WeightFormat; 3] = [WeightFormat::F16, WeightFormat::INT8, WeightFormat::INT4];
    let mut losses = std::collections::BTreeMap::<String, [Loss; 3]>::new();
    for name in ["llama", "qwen2", "qwen3moe"] {
        let path = format!("{}/tests/fixtures/gguf/{name}/model.gguf", env!("CARGO_MANIFEST_DIR"));
        let header = Header::read(path.as_ref()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let weights = checkpoint.weights().unwrap();
        let matrices = weights.sources().filter(|source| source.shape()[1] > 1);
        for (source, piece) in matrices.flat_map(|source| source.pieces().iter().map(move |piece| (source, piece))) {
            let ElementType::Blocks(kind) = header.tensors[piece.tensor()].kind else { continue };
            let own = TensorSource { pieces: vec![piece.clone()], columns: source.columns };
            for (loss, format) in losses.entry(kind.to_string()).or_default().iter_mut().zip(FORMATS) {
                add_loss(&checkpoint, &own, format, loss);
            }
        }
    }
    let digits = |loss: &Loss| format!("{:.1e} ({:.1e})", (loss.errors / loss.squares).sqrt(), loss.largest);
    let found: Vec<_> = losses.iter().map(|(kind, losses)| (kind.as_str(), losses.each_ref().map(digits))).collect();
    for (kind, losses) in &found {
        println!("{kind}: {}", losses.join(", "));
    }
    assert_eq!(losses["Q8_0"][1].errors, 0.0, "Q8_0 is Int8");
    assert_eq!(found.len(), TYPES.len());
    for ((kind, losses), (expected, table)) in found.iter().zip(&LOSSES) {
        assert_eq!((kind, losses), (expected, &table.map(str::to_owned)));
    }
    assert_eq!(found.len(), LOSSES.len());
}

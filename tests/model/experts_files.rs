//! Where the parameters of mixtures of experts lie in their files: the fixtures, element by element.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use folio::model::{Checkpoint, LinearWeights, TensorSource};
use half::bf16;
use safetensors::{Dtype, SafeTensors};

/// The architectures with experts, and checkpoints of each.
pub(crate) const MIXTURES: [(&str, &[&str]); 4] = [
    ("dots1", &["dots1"]),
    ("gpt_oss", &["gpt_oss", "gpt_oss_mxfp4"]),
    ("mixtral", &["mixtral", "mixtral_packed"]),
    ("qwen3_moe", &["qwen3_moe", "qwen3_moe_sparse"]),
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

/// Shapes and values of all tensors of f32 and bf16.
struct Tensors(HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Tensors {
    fn read(name: &str) -> Self {
        let bytes = std::fs::read(folder(name).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let values = |dtype, data: &[u8]| match dtype {
            Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::BF16 => data.chunks_exact(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
            _ => Vec::new(),
        };
        let read = |(name, t): (String, safetensors::tensor::TensorView<'_>)| {
            (name, (t.shape().to_vec(), values(t.dtype(), t.data())))
        };
        Self(file.tensors().into_iter().map(read).collect())
    }

    /// An element, by its place in each dimension.
    fn at(&self, name: &str, place: &[usize]) -> f32 {
        let (shape, values) = self.0.get(name).unwrap_or_else(|| panic!("{name}"));
        assert!(shape.len() == place.len() && place.iter().zip(shape).all(|(i, n)| i < n), "{name} {place:?}");
        values[place.iter().zip(shape).fold(0, |at, (i, n)| at * n + i)]
    }
}

fn expect(checkpoint: &Checkpoint, source: &TensorSource, shape: [usize; 2], at: impl Fn(usize, usize) -> f32) {
    assert_eq!(source.shape(), shape);
    let mut values = vec![0.0; shape[0] * shape[1]];
    checkpoint.rows(source, 0, &mut values).unwrap();
    for (i, value) in values.iter().enumerate() {
        assert_eq!(value.to_bits(), at(i / shape[1], i % shape[1]).to_bits(), "{source:?}: {i}");
    }
}

#[test]
fn every_parameter_of_experts() {
    for (model_type, names) in MIXTURES {
        for name in names {
            check(model_type, name);
        }
    }
}

fn check(model_type: &str, name: &str) {
    let checkpoint = Checkpoint::open(folder(name)).unwrap();
    let config = checkpoint.config();
    assert_eq!(config.model_type, model_type);
    let weights = checkpoint.weights().unwrap();
    assert_eq!(checkpoint.unused(&weights), [""; 0], "{name}");
    let (tensors, experts) = (Tensors::read(name), config.experts.as_ref().unwrap());
    let (hidden, inner) = (config.hidden_size as usize, experts.intermediate_size as usize);
    let count = experts.router.experts.count as usize;
    for (i, layer) in (0..).zip(&weights.layers) {
        let at = |name: &str| format!("model.layers.{i}.{name}");
        assert_eq!(layer.router.is_some(), experts.layers.contains(i), "{name} {i}");
        assert_eq!(layer.sinks.is_some(), model_type == "gpt_oss");
        if let Some(sinks) = &layer.sinks {
            let heads = config.num_q_heads as usize;
            expect(&checkpoint, sinks, [heads, 1], |row, _| tensors.at(&at("self_attn.sinks"), &[row]));
        }
        let linear = |linear: &LinearWeights, name: &str, out, columns| {
            let [weight, bias] = ["weight", "bias"].map(|end| format!("{}.{end}", at(name)));
            expect(&checkpoint, &linear.weight, [out, columns], |row, column| tensors.at(&weight, &[row, column]));
            assert_eq!(linear.bias.is_some(), tensors.0.contains_key(&bias), "{bias}");
            if let Some(source) = &linear.bias {
                expect(&checkpoint, source, [out, 1], |row, _| tensors.at(&bias, &[row]));
            }
        };
        let Some(router) = &layer.router else { continue };
        let router_name = match name {
            "mixtral" => "block_sparse_moe.gate",
            "gpt_oss" | "gpt_oss_mxfp4" => "mlp.router",
            _ => "mlp.gate",
        };
        linear(router, router_name, count, hidden);
        assert_eq!((layer.correction.is_some(), layer.shared.is_some()), (name == "dots1", name == "dots1"));
        if let Some(correction) = &layer.correction {
            let name = at("mlp.gate.e_score_correction_bias");
            expect(&checkpoint, correction, [count, 1], |row, _| tensors.at(&name, &[row]));
        }
        if let Some([gate_up, down]) = &layer.shared {
            let size = experts.shared_size.unwrap() as usize;
            expect(&checkpoint, &gate_up.weight, [2 * size, hidden], |row, column| {
                let part = ["gate", "up"][row / size];
                tensors.at(&at(&format!("mlp.shared_experts.{part}_proj.weight")), &[row % size, column])
            });
            linear(down, "mlp.shared_experts.down_proj", hidden, size);
        }
        // Gate and up of the first expert, of the second, and so on.
        let parts = |row: usize| (row / inner / 2, row / inner % 2, row % inner);
        let [gate_up, down] = ["gate_up_proj", "down_proj"].map(|end| at(&format!("mlp.experts.{end}")));
        if let Some(bias) = &layer.gate_up.bias {
            expect(&checkpoint, bias, [count * 2 * inner, 1], |row, _| {
                let (e, part, row) = parts(row);
                tensors.at(&format!("{gate_up}_bias"), &[e, 2 * row + part])
            });
            expect(&checkpoint, layer.down.bias.as_ref().unwrap(), [count * hidden, 1], |row, _| {
                tensors.at(&format!("{down}_bias"), &[row / hidden, row % hidden])
            });
        }
        // Parity shows what MXFP4 stands for.
        if name == "gpt_oss_mxfp4" {
            continue;
        }
        expect(&checkpoint, &layer.gate_up.weight, [count * 2 * inner, hidden], |row, column| {
            let (e, part, row) = parts(row);
            match name {
                "mixtral_packed" => tensors.at(&gate_up, &[e, part * inner + row, column]),
                "gpt_oss" => tensors.at(&gate_up, &[e, column, 2 * row + part]),
                "mixtral" => {
                    let name = format!("block_sparse_moe.experts.{e}.{}.weight", ["w1", "w3"][part]);
                    tensors.at(&at(&name), &[row, column])
                }
                _ => {
                    let name = format!("mlp.experts.{e}.{}_proj.weight", ["gate", "up"][part]);
                    tensors.at(&at(&name), &[row, column])
                }
            }
        });
        expect(&checkpoint, &layer.down.weight, [count * hidden, inner], |row, column| {
            let (e, row) = (row / hidden, row % hidden);
            match name {
                "mixtral_packed" => tensors.at(&down, &[e, row, column]),
                "gpt_oss" => tensors.at(&down, &[e, column, row]),
                "mixtral" => tensors.at(&at(&format!("block_sparse_moe.experts.{e}.w2.weight")), &[row, column]),
                _ => tensors.at(&at(&format!("mlp.experts.{e}.down_proj.weight")), &[row, column]),
            }
        });
    }
}

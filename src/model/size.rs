//! [`ModelSize`]: what a model takes, from its configuration alone.

use super::ModelResult;
use super::architecture::{LayerWeights, ModelWeights, TensorSource};
use super::config::ModelConfig;
use super::head_linear::HeadLinearConfig;
use super::quantise::WeightFormat;

/// What a model takes on a device, counted without a checkpoint and without a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelSize {
    /// Parameters, those of a tied head once: what publishers count.
    pub num_parameters: u64,
    /// Bytes of all matrices in the format: [`Model::weight_bytes`](super::Model::weight_bytes).
    pub matrix_bytes: u64,
    /// Bytes of everything else, which stays f32: norms, biases, learned positions, sinks.
    pub vector_bytes: u64,
}

fn elements(source: &TensorSource) -> u64 {
    let [rows, columns] = source.shape();
    rows as u64 * columns as u64
}

/// Bytes of a matrix that a linear layer has. (Sizes of a configuration are below 2^31.)
fn matrix(source: &TensorSource, format: WeightFormat) -> u64 {
    let [rows, columns] = source.shape();
    // Rows of all experts of a layer may be more than 2^32.
    format.bytes(1, columns as u32).saturating_mul(rows as u64)
}

impl ModelConfig {
    /// What the model takes with its matrices in this format.
    ///
    /// # Errors
    /// Those of [`ModelConfig::weights`].
    pub fn size(&self, format: WeightFormat) -> ModelResult<ModelSize> {
        let weights = self.weights()?;
        let (matrices, num_in_matrices) = self.matrices(&weights, format);
        let num_parameters = weights.sources().map(elements).sum::<u64>();
        Ok(ModelSize { num_parameters, matrix_bytes: matrices, vector_bytes: (num_parameters - num_in_matrices) * 4 })
    }

    /// Bytes of all matrices, and how many parameters they have.
    fn matrices(&self, weights: &ModelWeights, format: WeightFormat) -> (u64, u64) {
        let head = weights.head.iter().map(|head| &head.weight);
        let layers = weights.layers.iter().flat_map(|layer| self.layer_matrices(layer, format));
        let others = [&weights.embedding].into_iter().chain(head);
        let all = layers.chain(others.map(|source| (matrix(source, format), elements(source))));
        all.fold((0, 0), |(bytes, parameters), (more, of)| (bytes + more, parameters + of))
    }

    fn layer_matrices(&self, layer: &LayerWeights, format: WeightFormat) -> Vec<(u64, u64)> {
        let sized = |source: &TensorSource, format| (matrix(source, format), elements(source));
        let shared = layer.shared.iter().flatten();
        let linears = [&layer.q, &layer.k, &layer.o, &layer.gate_up, &layer.down];
        let linears = linears.into_iter().chain(&layer.q_latent).chain(shared);
        let mut matrices: Vec<_> = linears.map(|linear| sized(&linear.weight, format)).collect();
        // A rounded logit may send a token elsewhere.
        matrices.extend(layer.router.iter().map(|router| sized(&router.weight, WeightFormat::F32)));
        matrices.push(match &self.latent {
            None => sized(&layer.v.weight, format),
            // It is split into matrices of heads, which are padded.
            Some(latent) => {
                let keys = HeadLinearConfig {
                    num_heads: self.num_q_heads,
                    in_features: self.head_dim - latent.rope_dim,
                    out_features: latent.kv_rank,
                    format,
                    rope: None,
                };
                let values = HeadLinearConfig { in_features: latent.kv_rank, out_features: latent.value_dim, ..keys };
                (keys.bytes() + values.bytes(), elements(&layer.v.weight))
            }
        });
        matrices
    }
}

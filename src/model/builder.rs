//! Puts the parts of a [`Model`](super::Model) on the GPU.

use super::architecture::{LayerWeights, LinearWeights, NormWeights, TensorSource};
use super::config::ModelConfig;
use super::error::{ModelError, ModelResult};
use super::experts::ExpertLayer;
use super::head_linear::HeadRope;
use super::layer::{Layer, Mlp, Norms, QkNormWeights, qkv_widths};
use super::linear::{Linear, RmsNorm};
use super::linear_config::{LinearConfig, LinearExperts};
use super::linear_kernels::LinearKernels;
use super::linear_upload::RowSource;
use super::ops::{Norm, NormKind, NormParameters, Router};
use super::progress::Progress;
use super::quantise::{WeightFormat, WeightGrid};
use super::transformer::{ModelOptions, WeightSource};
use crate::{Gpu, HeadNorm};

/// The matrix that has a row of all, and which of its own rows that is.
fn at_row<'a>(matrices: &[&'a TensorSource], mut row: usize) -> ModelResult<(&'a TensorSource, usize)> {
    for &matrix in matrices {
        let [rows, _] = matrix.shape();
        if row < rows {
            return Ok((matrix, row));
        }
        row -= rows;
    }
    Err(ModelError::argument("row", format!("{row} behind the last matrix"), "a row of one"))
}

/// Fills `out`, which has `per_row` elements for each row of all matrices from `row` on, matrix by matrix: `fill` gets a matrix, and a row of it.
fn fill_rows<T>(
    matrices: &[&TensorSource],
    row: u32,
    per_row: usize,
    mut out: &mut [T],
    fill: impl Fn(&TensorSource, usize, &mut [T]) -> ModelResult<()>,
) -> ModelResult<()> {
    let mut row = row as usize;
    while !out.is_empty() {
        let (matrix, within) = at_row(matrices, row)?;
        let [num_rows, _] = matrix.shape();
        let own = out.len().min((num_rows - within) * per_row);
        let (now, later) = out.split_at_mut(own);
        fill(matrix, within, now)?;
        (out, row) = (later, row + own / per_row);
    }
    Ok(())
}

/// Uploads the parts of a model.
pub(super) struct Builder<'a, P> {
    pub(super) gpu: &'a Gpu,
    pub(super) config: &'a ModelConfig,
    pub(super) source: &'a dyn WeightSource,
    pub(super) options: ModelOptions,
    pub(super) kernels: LinearKernels,
    pub(super) progress: P,
    pub(super) bytes_done: u64,
    pub(super) bytes_total: u64,
}

impl<P: FnMut(Progress<'_>)> Builder<'_, P> {
    pub(super) fn advance(&mut self, tensor: &TensorSource) -> ModelResult<()> {
        self.bytes_done += self.source.bytes(tensor)?;
        let what = tensor.pieces().first().map_or("", |piece| piece.tensor());
        (self.progress)(Progress { bytes_done: self.bytes_done, bytes_total: self.bytes_total, what });
        Ok(())
    }

    /// All of a small tensor.
    pub(super) fn values(&mut self, tensor: &TensorSource) -> ModelResult<Vec<f32>> {
        let [rows, columns] = tensor.shape();
        let mut values = vec![0.0; rows * columns];
        self.source.rows(tensor, 0, &mut values)?;
        self.advance(tensor)?;
        Ok(values)
    }

    /// A layer of matrices with the same input, their rows one after another. They are asked for as [`ModelWeights`] has them. RMSNorm before it, with
    /// what is added to its mean square, becomes a part of it.
    pub(super) async fn matrix(
        &mut self,
        weights: &[&TensorSource],
        biases: &[&TensorSource],
        norm: Option<(&NormWeights, f32)>,
        configure: impl FnOnce(&mut LinearConfig),
    ) -> ModelResult<Linear> {
        // Sizes of a configuration are below 2^31.
        let out_features = weights.iter().map(|weight| weight.shape()[0]).sum::<usize>() as u32;
        let in_features = weights.first().map_or(0, |weight| weight.shape()[1]) as u32;
        let mut config = LinearConfig::new(in_features, out_features, self.options.weights);
        config.exact = self.options.exact;
        let norm = norm.filter(|_| self.config.norm.kind == NormKind::Rms);
        (config.bias, config.norm) = (!biases.is_empty(), norm.is_some());
        configure(&mut config);
        let mut bias = Vec::new();
        for tensor in biases {
            bias.extend(self.values(tensor)?);
        }
        let bias = (!biases.is_empty()).then_some(bias);
        let norm = norm.map(|(norm, eps)| Ok::<_, ModelError>((self.norm_weight(norm)?, eps))).transpose()?;
        let norm = norm.as_ref().map(|(weight, eps)| RmsNorm { weight, eps: *eps });
        let source = self.source;
        let mut rows = |row: u32, out: &mut [f32]| {
            fill_rows(weights, row, in_features as usize, out, |weight, row, out| source.rows(weight, row, out))
        };
        let row_grids = in_features.div_ceil(WeightGrid::GROUP_SIZE) as usize;
        let mut grids = |row: u32, out: &mut [Option<WeightGrid>]| {
            fill_rows(weights, row, row_grids, out, |weight, row, out| source.grids(weight, row, out))
        };
        let rows = RowSource { rows: &mut rows, grids: &mut grids };
        let linear = Linear::from_source(self.gpu, &self.kernels, config, rows, bias.as_deref(), norm).await;
        // The layer knows the value that it can't store, the loader whose it is.
        let linear = linear.map_err(|error| match error {
            ModelError::Weight { tensor: None, value, row, column } => match at_row(weights, row as usize) {
                Ok((weight, row)) => {
                    let mut names: Vec<_> = weight.pieces().iter().map(|piece| piece.tensor()).collect();
                    names.dedup();
                    ModelError::Weight { tensor: Some(names.join(" + ")), value, row: row as u64, column }
                }
                Err(error) => error,
            },
            other => other,
        })?;
        for weight in weights {
            self.advance(weight)?;
        }
        Ok(linear)
    }

    pub(super) async fn linear(
        &mut self,
        layers: &[&LinearWeights],
        norm: Option<(&NormWeights, f32)>,
        configure: impl FnOnce(&mut LinearConfig),
    ) -> ModelResult<Linear> {
        let weights: Vec<_> = layers.iter().map(|layer| &layer.weight).collect();
        let biases: Vec<_> = layers.iter().filter_map(|layer| layer.bias.as_ref()).collect();
        if !biases.is_empty() && biases.len() != layers.len() {
            let got = format!("{} in {} layers", biases.len(), layers.len());
            return Err(ModelError::argument("biases", got, "one in each layer or none at all"));
        }
        self.matrix(&weights, &biases, norm, configure).await
    }

    /// The weight of a norm as it is multiplied.
    pub(super) fn norm_weight(&mut self, norm: &NormWeights) -> ModelResult<Vec<f32>> {
        let mut weight = self.values(&norm.weight)?;
        weight.iter_mut().for_each(|weight| *weight += self.config.norm.weight_offset);
        Ok(weight)
    }

    /// The weights of a norm with a dispatch of its own. Those of RMSNorm before a linear layer go to that layer.
    pub(super) fn norm(
        &mut self,
        weights: Option<&NormWeights>,
        norm: Option<&Norm>,
    ) -> ModelResult<Option<NormParameters>> {
        let (Some(norm), Some(weights)) = (norm, weights) else { return Ok(None) };
        let weight = self.norm_weight(weights)?;
        let bias = weights.bias.as_ref().map(|tensor| self.values(tensor)).transpose()?;
        Ok(Some(norm.weights(&weight, bias.as_deref())?))
    }

    fn qk_norm(&mut self, weights: &LayerWeights, norms: &Norms) -> ModelResult<QkNormWeights> {
        let own_heads = self.config.latent.is_none();
        let (Some(q), Some(k), true) = (&weights.q_norm, &weights.k_norm, own_heads) else {
            return Ok(QkNormWeights::None);
        };
        if let Some([q_norm, k_norm]) = &norms.qk {
            let [Some(q), Some(k)] = [self.norm(Some(q), Some(q_norm))?, self.norm(Some(k), Some(k_norm))?] else {
                return Ok(QkNormWeights::None);
            };
            return Ok(QkNormWeights::AllHeads([q, k]));
        }
        let (q, k) = (self.norm_weight(q)?, self.norm_weight(k)?);
        Ok(QkNormWeights::PerHead(HeadNorm::new(self.gpu, &q, &k, self.config.norm.eps)?))
    }

    /// The experts of a layer, and their router, whose weights are few and stay F32: a rounded logit may send a token elsewhere.
    async fn experts(
        &mut self,
        router: &LinearWeights,
        kernels: Option<&Router>,
        weights: &LayerWeights,
    ) -> ModelResult<Mlp> {
        let (Some(experts), Some(kernels)) = (&self.config.experts, kernels) else {
            return Err(ModelError::argument("router", "weights", "none, for a configuration without experts"));
        };
        let (sent, inner, hidden) = (experts.router.experts, experts.intermediate_size, self.config.hidden_size);
        let (activation, gated) = (experts.activation, self.config.gated_mlp);
        let norm = weights.mlp_norm.as_ref().map(|norm| (norm, self.config.norm.eps));
        let of_experts = |out_features, per_row| {
            move |linear: &mut LinearConfig| {
                linear.out_features = out_features;
                linear.experts = Some(LinearExperts { per_row, ..sent });
            }
        };
        let router = self.linear(&[router], norm, |linear| linear.format = WeightFormat::F32).await?;
        let first = |linear: &mut LinearConfig| {
            of_experts(inner, sent.per_row)(linear);
            (linear.activation, linear.gated) = (Some(activation), gated);
        };
        let up = self.linear(&[&weights.gate_up], norm, first).await?;
        // What an expert yields for a token is weighed before it is added.
        let down = self.linear(&[&weights.down], None, of_experts(hidden, 1)).await?;
        let correction = match &weights.correction {
            Some(tensor) => Some(kernels.correction(&self.values(tensor)?)?),
            None => None,
        };
        let shared = match &weights.shared {
            Some([gate_up, down]) => {
                let first = |linear: &mut LinearConfig| {
                    (linear.activation, linear.gated) = (Some(activation), gated);
                    linear.out_features /= if gated { 2 } else { 1 };
                };
                let up = self.linear(&[gate_up], norm, first).await?;
                Some([up, self.linear(&[down], None, |linear| linear.accumulate = true).await?])
            }
            None => None,
        };
        Ok(Mlp::Experts(Box::new(ExpertLayer { router, up, down, correction, shared })))
    }

    /// `kernels` are those of the mixture of experts, if there is one.
    pub(super) async fn layer(
        &mut self,
        weights: &LayerWeights,
        norms: &Norms,
        rope: Option<&HeadRope>,
        kernels: Option<&Router>,
    ) -> ModelResult<Layer> {
        let config = self.config;
        let eps = config.norm.eps;
        let (attn_norm, mlp_norm) = (weights.attn_norm.as_ref(), weights.mlp_norm.as_ref());
        // Of latents there is what makes them; of keys and values that are projections of them nothing.
        let qkv = match (&config.latent, &weights.q_latent) {
            (None, _) => vec![&weights.q, &weights.k, &weights.v],
            (Some(_), Some(q)) => vec![q, &weights.k],
            (Some(_), None) => vec![&weights.q, &weights.k],
        };
        // Unless it is normalised before it is added.
        let add = |norm: &Option<NormWeights>| {
            let accumulate = norm.is_none();
            move |linear: &mut LinearConfig| linear.accumulate = accumulate
        };
        let split = |linear: &mut LinearConfig| linear.regions = Some(qkv_widths(config));
        let activate = |linear: &mut LinearConfig| {
            linear.activation = Some(config.activation);
            if config.gated_mlp {
                (linear.gated, linear.out_features) = (true, linear.out_features / 2);
            }
        };
        let mlp = match &weights.router {
            Some(router) => self.experts(router, kernels, weights).await?,
            None => {
                let up = self.linear(&[&weights.gate_up], mlp_norm.map(|norm| (norm, eps)), activate).await?;
                let down = self.linear(&[&weights.down], None, add(&weights.post_mlp_norm)).await?;
                Mlp::Dense(Box::new([up, down]))
            }
        };
        let (layer, added) = (norms.layer.as_ref(), norms.added.as_ref());
        Ok(Layer {
            attention_norm: self.norm(attn_norm, layer)?,
            qkv: self.linear(&qkv, attn_norm.map(|norm| (norm, eps)), split).await?,
            latent: self.latent(weights, rope).await?,
            qk_norm: self.qk_norm(weights, norms)?,
            sinks: weights.sinks.as_ref().map(|tensor| self.values(tensor)).transpose()?,
            o: self.linear(&[&weights.o], None, add(&weights.post_attn_norm)).await?,
            post_attention_norm: self.norm(weights.post_attn_norm.as_ref(), added)?,
            mlp_norm: self.norm(mlp_norm, layer)?,
            mlp,
            post_mlp_norm: self.norm(weights.post_mlp_norm.as_ref(), added)?,
        })
    }
}

//! What a transformer layer is made of.

use super::architecture::{LayerWeights, ModelWeights};
use super::config::{ModelConfig, QkNorm};
use super::experts::ExpertLayer;
use super::latent::LatentLayer;
use super::linear::Linear;
use super::ops::{Norm, NormConfig, NormKind, NormParameters};
use crate::{Gpu, HeadNorm, Result};

/// One transformer layer: attention and a feed-forward network (MLP), each behind a norm and added to the residual stream.
///
/// RMSNorm is a part of the linear layer behind it, LayerNorm has a dispatch of its own. So has a norm of what is added.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Option<NormParameters>,
    pub(super) qkv: Linear,
    /// `qkv` makes latents then: of queries, if they have one, and of keys and values.
    pub(super) latent: Option<LatentLayer>,
    pub(super) qk_norm: QkNormWeights,
    pub(super) sinks: Option<Vec<f32>>,
    pub(super) o: Linear,
    pub(super) post_attention_norm: Option<NormParameters>,
    pub(super) mlp_norm: Option<NormParameters>,
    pub(super) mlp: Mlp,
    pub(super) post_mlp_norm: Option<NormParameters>,
}

/// What follows on attention.
#[derive(Debug)]
pub(super) enum Mlp {
    /// Two projections, the first with the gate, if there is one, and the activation.
    Dense(Box<[Linear; 2]>),
    Experts(Box<ExpertLayer>),
}

impl Mlp {
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let (own, experts) = match self {
            Self::Dense(own) => (Some(own), None),
            Self::Experts(layer) => (None, Some(layer)),
        };
        own.into_iter().flat_map(|own| own.iter()).chain(experts.into_iter().flat_map(|layer| layer.linears()))
    }

    /// Bytes of weights that one token reads.
    pub(super) fn bytes_of_token(&self) -> u64 {
        match self {
            Self::Dense(own) => own.iter().map(Linear::bytes).sum(),
            Self::Experts(layer) => layer.bytes_of_token(),
        }
    }
}

impl Layer {
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let latent = self.latent.iter().flat_map(LatentLayer::linears);
        [&self.qkv, &self.o].into_iter().chain(latent).chain(self.mlp.linears())
    }
}

/// Norms of queries and keys.
#[derive(Debug)]
pub(super) enum QkNormWeights {
    None,
    PerHead(HeadNorm),
    AllHeads([NormParameters; 2]),
}

/// The kernels of the norms.
#[derive(Debug)]
pub(super) struct Norms {
    /// LayerNorm over the residual stream.
    pub(super) layer: Option<Norm>,
    /// Of what is added to the residual stream.
    pub(super) added: Option<Norm>,
    /// Of all query heads together, and of all key heads.
    pub(super) qk: Option<[Norm; 2]>,
}

impl Norms {
    pub(super) async fn new(gpu: &Gpu, config: &ModelConfig, weights: &ModelWeights) -> Result<Self> {
        let of = |width| NormConfig::new(config.norm.kind, width, config.norm.eps);
        let hidden = of(config.hidden_size);
        let layer = match config.norm.kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(Norm::new(gpu, NormConfig { bias: true, ..hidden }).await?),
        };
        let adds = |layer: &LayerWeights| layer.post_attn_norm.is_some() || layer.post_mlp_norm.is_some();
        let added = if weights.layers.iter().any(adds) {
            let bias = config.norm.kind == NormKind::Layer;
            Some(Norm::new(gpu, NormConfig { bias, accumulate: true, ..hidden }).await?)
        } else {
            None
        };
        let qk = if config.qk_norm == Some(QkNorm::AllHeads) {
            let [q, k, _] = qkv_widths(config).map(of);
            Some([Norm::new(gpu, q).await?, Norm::new(gpu, k).await?])
        } else {
            None
        };
        Ok(Self { layer, added, qk })
    }
}

/// Widths of queries, keys and values; of a model with latents those of queries or their latents, of latents of keys and values, and of nothing.
pub(super) fn qkv_widths(config: &ModelConfig) -> [u32; 3] {
    let q_width = config.num_q_heads.saturating_mul(config.head_dim);
    if let Some(latent) = &config.latent {
        return [latent.q_rank.unwrap_or(q_width), latent.row_dim(), 0];
    }
    let kv_width = config.num_kv_heads.saturating_mul(config.head_dim);
    [q_width, kv_width, kv_width]
}

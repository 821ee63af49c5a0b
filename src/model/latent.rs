//! Layers with latents (MLA): their weights on the GPU, and the recording of their attention with absorbed projections.

use super::architecture::{LayerWeights, LinearWeights};
use super::builder::Builder;
use super::config::{LatentConfig, ModelConfig};
use super::error::{ModelError, ModelResult};
use super::head_linear::{HeadLinear, HeadLinearConfig, HeadRope};
use super::layer::qkv_widths;
use super::linear::Linear;
use super::progress::Progress;
use super::rows::Rows;
use super::transformer::{Append, LayerContext, StepContext};
use crate::layout::Region;
use crate::{Error, Gpu, LatentNorm, Result};

/// What a layer with latents has in place of heads of keys and values.
#[derive(Debug)]
pub(super) struct LatentLayer {
    /// Queries of their latent, with its norm.
    q: Option<Linear>,
    /// `W_k^T` of each head, and the rotation of its query.
    absorbed: HeadLinear,
    /// `W_v` of each head.
    values: HeadLinear,
    /// Of latents of keys and values.
    norm: LatentNorm,
}

/// Activations of a step beside those of all models.
#[derive(Debug)]
pub(super) struct LatentScratch {
    /// Queries of their latent, and later values: `[rows, num_q_heads, head_dim or value_dim]`.
    heads: wgpu::Buffer,
    /// `[rows, num_q_heads, row_dim]`
    queries: wgpu::Buffer,
}

/// Where a layer finds and leaves activations.
pub(super) struct LatentBuffers<'a> {
    /// Queries or their latents, then latents of keys and values.
    pub(super) qkv: &'a wgpu::Buffer,
    pub(super) scratch: &'a LatentScratch,
    /// What attention sums up of latents.
    pub(super) attended: &'a wgpu::Buffer,
}

/// f32 per token of both.
fn widths(config: &ModelConfig, latent: &LatentConfig) -> [u32; 2] {
    let head = if latent.q_rank.is_some() { config.head_dim.max(latent.value_dim) } else { latent.value_dim };
    [head, latent.row_dim()].map(|width| config.num_q_heads.saturating_mul(width))
}

impl LatentScratch {
    /// f32 values per token of the widest buffer; 0 for models without latents.
    pub(super) fn widest_row(config: &ModelConfig) -> u64 {
        config.latent.as_ref().map_or(0, |latent| widths(config, latent).into_iter().max().unwrap_or(0).into())
    }

    pub(super) fn new(gpu: &Gpu, config: &ModelConfig, latent: &LatentConfig, rows: u32) -> Result<Self> {
        let [heads, queries] = widths(config, latent);
        let buffer = |label, width: u32| {
            let bytes = u64::from(rows) * u64::from(width) * 4;
            gpu.create_buffer("creating the activations", label, bytes, wgpu::BufferUsages::STORAGE)
        };
        Ok(Self { heads: buffer("folio heads", heads)?, queries: buffer("folio absorbed queries", queries)? })
    }
}

/// The rotation of queries, which all layers of a model with latents share.
pub(super) fn head_rope(gpu: &Gpu, config: &ModelConfig) -> ModelResult<Option<HeadRope>> {
    let Some(latent) = &config.latent else { return Ok(None) };
    let kinds = config.layers.kinds();
    let rope = kinds.first().and_then(|kind| kind.rope.as_ref()).filter(|_| kinds.len() == 1);
    let placed = rope.filter(|rope| rope.rotary_start == latent.kv_rank && rope.rotary_dim == latent.rope_dim);
    let need = || {
        let LatentConfig { rope_dim, kv_rank, .. } = latent;
        format!("one kind, with {rope_dim} elements rotated from {kv_rank} on, as latents have them")
    };
    let rope = placed.ok_or_else(|| ModelError::argument("layers", format!("{:?}", config.layers), need()))?;
    Ok(Some(HeadRope::new(gpu, rope)?))
}

impl<P: FnMut(Progress<'_>)> Builder<'_, P> {
    /// What a layer with latents has beside `qkv` and `o`.
    pub(super) async fn latent(
        &mut self,
        weights: &LayerWeights,
        rope: Option<&HeadRope>,
    ) -> ModelResult<Option<LatentLayer>> {
        let config = self.config;
        let (Some(latent), Some(rope)) = (&config.latent, rope) else { return Ok(None) };
        let norm = weights.k_norm.as_ref();
        let norm = norm.ok_or_else(|| ModelError::argument("k_norm", "none", "the norm of latents"))?;
        let q = match (&weights.q_norm, latent.q_rank) {
            (Some(norm), Some(_)) => Some(self.linear(&[&weights.q], Some((norm, latent.norm_eps)), |_| ()).await?),
            _ => None,
        };
        let norm = LatentNorm::new(self.gpu, &self.norm_weight(norm)?, latent.norm_eps)?;
        let (absorbed, values) = self.absorb(&weights.v, latent, rope).await?;
        Ok(Some(LatentLayer { q, absorbed, values, norm }))
    }

    /// The matrices that multiply latents, apart: `W_k^T` and `W_v` of each head.
    async fn absorb(
        &mut self,
        made: &LinearWeights,
        latent: &LatentConfig,
        rope: &HeadRope,
    ) -> ModelResult<(HeadLinear, HeadLinear)> {
        let &LatentConfig { kv_rank, value_dim, rope_dim, .. } = latent;
        let nope_dim = self.config.head_dim.saturating_sub(rope_dim);
        let head_rows = nope_dim + value_dim;
        let shape = [self.config.num_q_heads as usize * head_rows as usize, kv_rank as usize];
        if made.weight.shape() != shape {
            let got = format!("a matrix of {:?}", made.weight.shape());
            return Err(ModelError::argument("v", got, format!("{shape:?}, of all heads")));
        }
        // The layer knows the value that it can't store, by the rows of its own matrix; the loader where that is in the file.
        let named = |error: ModelError, place: &dyn Fn(u64, u64) -> (u64, u64)| match error {
            ModelError::Weight { tensor: None, value, row, column } => {
                let (row, column) = place(row, column as u64);
                let tensor = made.weight.pieces().first().map(|piece| piece.tensor().to_owned());
                ModelError::Weight { tensor, value, row, column: column as usize }
            }
            other => other,
        };
        let [head_rows_64, nope_64, rank_64, value_64] =
            [head_rows, nope_dim, kv_rank, value_dim].map(|size| u64::from(size).max(1));
        let (gpu, source, kernels) = (self.gpu, self.source, self.kernels.clone());
        let config = HeadLinearConfig {
            num_heads: self.config.num_q_heads,
            in_features: nope_dim,
            out_features: kv_rank,
            format: self.options.weights,
            rope: Some(rope.shape()),
        };
        let mut rows = vec![0.0; nope_dim as usize * kv_rank as usize];
        let mut keys = |head: u32, out: &mut [f32]| {
            source.rows(&made.weight, head as usize * head_rows as usize, &mut rows)?;
            for (row, from) in rows.chunks(kv_rank as usize).enumerate() {
                let column = out.iter_mut().skip(row).step_by(nope_dim as usize);
                column.zip(from).for_each(|(to, from)| *to = *from);
            }
            Ok(())
        };
        let absorbed = HeadLinear::new(gpu, &kernels, config, Some(rope), &mut keys)
            .await
            .map_err(|error| named(error, &|row, column| (row / rank_64 * head_rows_64 + column, row % rank_64)))?;
        let config = HeadLinearConfig { in_features: kv_rank, out_features: value_dim, rope: None, ..config };
        let mut values = |head: u32, out: &mut [f32]| {
            source.rows(&made.weight, head as usize * head_rows as usize + nope_dim as usize, out)
        };
        let values = HeadLinear::new(gpu, &kernels, config, None, &mut values).await.map_err(|error| {
            named(error, &|row, column| (row / value_64 * head_rows_64 + nope_64 + row % value_64, column))
        })?;
        self.advance(&made.weight)?;
        Ok((absorbed, values))
    }
}

impl LatentLayer {
    /// Its linear layers with one matrix.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.q.iter()
    }

    /// Bytes of the matrices of heads.
    pub(super) fn head_bytes(&self) -> u64 {
        self.absorbed.config().bytes() + self.values.config().bytes()
    }

    /// Bytes of weights that one token reads.
    pub(super) fn bytes_of_token(&self) -> u64 {
        self.head_bytes() + self.linears().map(Linear::bytes).sum::<u64>()
    }

    /// Records what lies between `qkv` and `o`: five dispatches with a latent of queries, four without, and those that splits of attention take. Returns
    /// what `o` reads.
    pub(super) fn record<'a>(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        config: &ModelConfig,
        buffers: LatentBuffers<'a>,
        context: &StepContext<'_>,
        own: &LayerContext<'_>,
    ) -> Result<Rows<'a>> {
        let Some(Append::Latent(append)) = own.append else {
            return Err(Error::argument("layers", "a kind that appends no latents", "one that does"));
        };
        let (LatentBuffers { qkv, scratch, attended }, rows) = (buffers, context.rows);
        let [first, latents, _] = Region::of(qkv_widths(config));
        let [first, latents] = [first, latents].map(|region| Rows::region(qkv, rows, region));
        let queries = match &self.q {
            None => first,
            Some(q) => {
                let queries = Rows::new(&scratch.heads, rows, q.config().out_features);
                q.record(&mut *pass, first, queries)?;
                queries
            }
        };
        let of_heads = |buffer: &'a wgpu::Buffer, width: u32| Rows::new(buffer, rows, config.num_q_heads * width);
        let absorbed = of_heads(&scratch.queries, self.absorbed.config().y_width());
        let attended = of_heads(attended, self.values.config().x_width());
        let values = of_heads(&scratch.heads, self.values.config().y_width());
        self.absorbed.record(&mut *pass, queries, absorbed, Some(context.positions))?;
        context.cache.append_normed_latent(&mut *pass, context.step, own.place, append, latents.range(), &self.norm)?;
        own.attention.attend(&mut *pass, own.plan, own.place, absorbed.range(), attended.range())?;
        self.values.record(&mut *pass, attended, values, None)?;
        Ok(values)
    }
}

//! [`Model`]: weights on the GPU, and the recording of its layers.

use std::path::Path;

use super::architecture::{ModelWeights, TensorSource};
use super::builder::Builder;
use super::checkpoint::Checkpoint;
use super::config::{ModelConfig, QkNorm};
use super::error::{ModelError, ModelResult};
use super::experts::ExpertScratch;
use super::latent::{LatentBuffers, LatentLayer, LatentScratch, head_rope};
use super::layer::{Layer, Mlp, Norms, QkNormWeights, qkv_widths};
use super::linear::Linear;
use super::linear_config::{Factor, LinearConfig};
use super::linear_kernels::LinearKernels;
use super::ops::{NormKind, NormParameters, PositionEmbedding, Router, SelectRows};
use super::progress::Progress;
use super::quantise::{WeightFormat, WeightGrid};
use super::rows::Rows;
use crate::layout::Region;
use crate::{
    AppendLatent, AppendQkv, Attention, AttentionCall, AttentionPlan, BufferRef, Error, Gpu, KvCache, QkvRows, Result,
    Sinks, Step,
};

/// Where a model's weights come from: a [`Checkpoint`], or a generator of random ones for benchmarks.
pub trait WeightSource {
    /// Fills `out` with whole rows of a parameter, from row `row_start` on.
    ///
    /// # Errors
    /// [`ModelError::Tensor`](super::ModelError::Tensor) or [`ModelError::File`](super::ModelError::File).
    fn rows(&self, source: &TensorSource, row_start: usize, out: &mut [f32]) -> ModelResult<()>;

    /// Bytes of a parameter where it comes from, for the progress.
    ///
    /// # Errors
    /// [`ModelError::Tensor`](super::ModelError::Tensor).
    fn bytes(&self, source: &TensorSource) -> ModelResult<u64> {
        let [rows, columns] = source.shape();
        Ok((rows * columns * 4) as u64)
    }

    /// Fills in the grids on which whole rows of a parameter lie, from row `row_start` on: one for each group of 32 columns, where the source knows it
    /// to be one. All are `None` before.
    ///
    /// # Errors
    /// Those of [`WeightSource::rows`].
    fn grids(&self, source: &TensorSource, row_start: usize, out: &mut [Option<WeightGrid>]) -> ModelResult<()> {
        let _ = (source, row_start, out);
        Ok(())
    }
}

impl WeightSource for Checkpoint {
    fn rows(&self, source: &TensorSource, row_start: usize, out: &mut [f32]) -> ModelResult<()> {
        Self::rows(self, source, row_start, out)
    }

    fn bytes(&self, source: &TensorSource) -> ModelResult<u64> {
        Self::bytes(self, source)
    }

    fn grids(&self, source: &TensorSource, row_start: usize, out: &mut [Option<WeightGrid>]) -> ModelResult<()> {
        Self::grids(self, source, row_start, out)
    }
}

/// How a model is put on the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelOptions {
    /// How the matrices of the linear layers and the token embedding are stored. Norms, biases and learned positions are f32.
    pub weights: WeightFormat,
    /// Whether the logits of a sequence have the same bits whatever else is in a batch. See [`ModelOptions::with_exact`].
    pub exact: bool,
    /// Whether a model with LongRoPE is to read long texts. See [`ModelConfig::with_long_context`].
    pub long_context: bool,
}

impl ModelOptions {
    /// With matrices in this format.
    #[must_use]
    pub const fn new(weights: WeightFormat) -> Self {
        Self { weights, exact: false, long_context: false }
    }

    /// The same, with logits of a sequence that have the same bits alone and in any batch: linear layers and attention add in an order that doesn't
    /// depend on what else is computed. Nor does it depend on the chunks in which a text is fed, as long as none is a single token, which takes a
    /// kernel of its own.
    #[must_use]
    pub const fn with_exact(mut self, exact: bool) -> Self {
        self.exact = exact;
        self
    }

    /// The same for long texts, which a model with LongRoPE reads with other frequencies than short ones: see [`ModelConfig::with_long_context`]. An error
    /// with other models.
    #[must_use]
    pub const fn with_long_context(mut self, long_context: bool) -> Self {
        self.long_context = long_context;
        self
    }
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self::new(WeightFormat::F16)
    }
}

/// A decoder-only transformer with its weights on the GPU. Make one and share it between [`Decoder`](super::Decoder)s.
#[derive(Debug)]
pub struct Model {
    gpu: Gpu,
    config: ModelConfig,
    embedding: Linear,
    position_embedding: Option<PositionEmbedding>,
    layers: Vec<Layer>,
    norms: Norms,
    /// For the layers with experts.
    router: Option<Router>,
    final_norm: Option<NormParameters>,
    /// `None`: the token embedding, transposed.
    head: Option<Linear>,
    select: SelectRows,
}

/// The activations of one step.
#[derive(Debug)]
pub(crate) struct Scratch {
    hidden: wgpu::Buffer,
    /// After LayerNorm, or before a norm of what is added; rows for the head.
    normed: wgpu::Buffer,
    qkv: wgpu::Buffer,
    attended: wgpu::Buffer,
    up: wgpu::Buffer,
    latent: Option<LatentScratch>,
    experts: Option<ExpertScratch>,
}

impl Scratch {
    /// f32 values per token of the widest buffer.
    pub(crate) fn widest_row(config: &ModelConfig) -> u64 {
        let qkv_width =
            Region::of(qkv_widths(config)).iter().map(|region| u64::from(region.padded_width())).sum::<u64>();
        let own = qkv_width.max(config.intermediate_size.into()).max(config.hidden_size.into());
        own.max(ExpertScratch::widest_row(config)).max(LatentScratch::widest_row(config))
    }

    /// Room for `rows` tokens.
    pub(crate) fn new(gpu: &Gpu, config: &ModelConfig, rows: u32) -> Result<Self> {
        let buffer = |label, width: u32| {
            let bytes = u64::from(rows) * u64::from(width) * 4;
            gpu.create_buffer("creating the activations", label, bytes, wgpu::BufferUsages::STORAGE)
        };
        let qkv = Region::of(qkv_widths(config));
        let latent = config.latent.as_ref();
        let attended = config.num_q_heads.saturating_mul(latent.map_or(config.head_dim, |latent| latent.kv_rank));
        let of_experts = config.experts.as_ref().map_or(0, |e| e.router.experts.per_row * e.intermediate_size);
        Ok(Self {
            hidden: buffer("folio hidden", config.hidden_size)?,
            normed: buffer("folio normed", config.hidden_size)?,
            qkv: buffer("folio qkv", qkv.iter().map(Region::padded_width).sum())?,
            attended: buffer("folio attended", attended)?,
            up: buffer("folio up", config.intermediate_size.max(of_experts))?,
            latent: latent.map(|latent| LatentScratch::new(gpu, config, latent, rows)).transpose()?,
            experts: ExpertScratch::new(gpu, config, rows)?,
        })
    }
}

/// What the layers of one step share.
pub(crate) struct StepContext<'a> {
    pub(crate) cache: &'a KvCache,
    pub(crate) layers: Vec<LayerContext<'a>>,
    pub(crate) step: &'a Step,
    /// Token id of each row.
    pub(crate) ids: BufferRef<'a>,
    /// Position of each row, for learned positions.
    pub(crate) positions: BufferRef<'a>,
    pub(crate) rows: u32,
}

/// What a layer takes in a step.
#[derive(Clone, Copy)]
pub(crate) struct LayerContext<'a> {
    /// Which layer of the cache it is.
    pub(crate) place: u32,
    pub(crate) attention: &'a Attention,
    pub(crate) plan: &'a AttentionPlan,
    /// For layers with rotary embeddings.
    pub(crate) append: Option<&'a Append>,
    pub(crate) sinks: Option<&'a Sinks>,
    /// Where its queries for sink tokens go, if it has any.
    pub(crate) sink_q: Option<BufferRef<'a>>,
}

/// The kernel that appends to the cache, with rotation.
#[derive(Debug)]
pub(crate) enum Append {
    Heads(AppendQkv),
    Latent(AppendLatent),
}

impl Model {
    /// Loads a checkpoint: a folder with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its shards; or a `.gguf` file.
    ///
    /// Everything is checked before the first byte goes to the GPU. `progress` is told after each tensor.
    ///
    /// # Errors
    /// [`ModelError::File`](super::ModelError::File), [`ModelError::Config`](super::ModelError::Config),
    /// [`ModelError::Tensor`](super::ModelError::Tensor) for what is wrong with the files;
    /// [`ModelError::Folio`](super::ModelError::Folio) for what the device can't do.
    pub async fn load(
        gpu: &Gpu,
        path: impl AsRef<Path>,
        options: ModelOptions,
        progress: impl FnMut(Progress<'_>),
    ) -> ModelResult<Self> {
        let checkpoint = Checkpoint::open(path.as_ref())?;
        let weights = checkpoint.weights()?;
        Self::from_source(gpu, checkpoint.config().clone(), &weights, &checkpoint, options, progress).await
    }

    /// [`Model::load`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load_blocking(
        gpu: &Gpu,
        path: impl AsRef<Path>,
        options: ModelOptions,
        progress: impl FnMut(Progress<'_>),
    ) -> ModelResult<Self> {
        pollster::block_on(Self::load(gpu, path, options, progress))
    }

    /// Puts a model on the GPU whose weights come from anywhere. `weights` says what is asked of `source`; see [`ModelConfig::weights`].
    ///
    /// # Errors
    /// Those of `source`; [`ModelError::Folio`](super::ModelError::Folio) for what the device can't do.
    pub async fn from_source(
        gpu: &Gpu,
        config: ModelConfig,
        weights: &ModelWeights,
        source: &dyn WeightSource,
        options: ModelOptions,
        progress: impl FnMut(Progress<'_>),
    ) -> ModelResult<Self> {
        let config = if options.long_context { config.with_long_context()? } else { config };
        let bytes_total = weights.sources().map(|tensor| source.bytes(tensor)).sum::<ModelResult<u64>>()?;
        let kernels = LinearKernels::new();
        let router = match &config.experts {
            Some(experts) => Some(Router::new(gpu, experts.router, config.hidden_size).await?),
            None => None,
        };
        let norms = Norms::new(gpu, &config, weights).await?;
        let rotates = config.layers.kinds().iter().all(|kind| kind.rope.is_some());
        if config.qk_norm == Some(QkNorm::PerHead) && (config.norm.kind != NormKind::Rms || !rotates) {
            let got = format!("PerHead with {:?} norms, {:?}", config.norm.kind, config.layers);
            return Err(ModelError::argument("qk_norm", got, "RMSNorm and rotary embeddings in all layers"));
        }
        let with_sinks = weights.layers.iter().filter(|layer| layer.sinks.is_some()).count();
        if with_sinks != if config.attention_sinks { weights.layers.len() } else { 0 } {
            let got = format!("{with_sinks} of {} layers, for {}", weights.layers.len(), config.attention_sinks);
            return Err(ModelError::argument("sinks", got, "all layers, or none, as attention_sinks says"));
        }
        let factor = |value: Option<f32>| value.map(Factor::new).transpose();
        let (scale, cap) = (factor(config.embedding_scale)?, factor(config.logit_softcap)?);
        let mut builder =
            Builder { gpu, config: &config, source, options, kernels, progress, bytes_done: 0, bytes_total };
        // Whichever computes logits normalises before.
        let final_norm = (&weights.final_norm, config.norm.eps);
        let tied_norm = Some(final_norm).filter(|_| weights.head.is_none());
        let embed = |linear: &mut LinearConfig| {
            linear.gather_scale = scale;
            linear.softcap = cap.filter(|_| weights.head.is_none());
        };
        let embedding = builder.matrix(&[&weights.embedding], &[], tied_norm, embed).await?;
        let position_embedding = match &weights.position_embedding {
            Some(tensor) => {
                let table = builder.values(tensor)?;
                Some(PositionEmbedding::new(gpu, &table, config.hidden_size).await?)
            }
            None => None,
        };
        let rope = head_rope(gpu, &config)?;
        let mut layers = Vec::with_capacity(weights.layers.len());
        for layer in &weights.layers {
            layers.push(builder.layer(layer, &norms, rope.as_ref(), router.as_ref()).await?);
        }
        let head_norm = Some(final_norm);
        let final_norm = builder.norm(Some(&weights.final_norm), norms.layer.as_ref())?;
        let head = match &weights.head {
            Some(head) => Some(builder.linear(&[head], head_norm, |linear| linear.softcap = cap).await?),
            None => None,
        };
        let select = SelectRows::new(gpu, config.hidden_size).await?;
        let gpu = gpu.clone();
        Ok(Self { gpu, config, embedding, position_embedding, layers, norms, router, final_norm, head, select })
    }

    /// [`Model::from_source`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Model::from_source`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn from_source_blocking(
        gpu: &Gpu,
        config: ModelConfig,
        weights: &ModelWeights,
        source: &dyn WeightSource,
        options: ModelOptions,
        progress: impl FnMut(Progress<'_>),
    ) -> ModelResult<Self> {
        pollster::block_on(Self::from_source(gpu, config, weights, source, options, progress))
    }

    /// The device it is on.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether it was made [exact](ModelOptions::with_exact).
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.embedding.config().exact
    }

    /// Bytes of weights that a step with one token of one sequence reads: all matrices of the layers and the head; of a mixture those of the experts that
    /// the token goes to.
    #[must_use]
    pub fn streamed_bytes(&self) -> u64 {
        let layer = |layer: &Layer| {
            let latent = layer.latent.as_ref().map_or(0, LatentLayer::bytes_of_token);
            layer.qkv.bytes() + layer.o.bytes() + layer.mlp.bytes_of_token() + latent
        };
        self.layers.iter().map(layer).sum::<u64>() + self.head.as_ref().unwrap_or(&self.embedding).bytes()
    }

    /// Shape and options of its linear layers, each once: what `Gpu::tune_linear` takes. Experts are left out: their kernels are not tuned.
    #[must_use]
    pub fn linear_configs(&self) -> Vec<LinearConfig> {
        let layers = self.layers.iter().flat_map(Layer::linears).filter(|linear| linear.config().experts.is_none());
        let mut configs = Vec::new();
        for config in layers.chain([self.head.as_ref().unwrap_or(&self.embedding)]).map(Linear::config) {
            if !configs.contains(&config) {
                configs.push(config);
            }
        }
        configs
    }

    /// The sinks of the layers that have them.
    pub(crate) fn sinks(&self) -> impl Iterator<Item = &[f32]> {
        self.layers.iter().filter_map(|layer| layer.sinks.as_deref())
    }

    /// Bytes of all matrices on the GPU.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        let layers = self.layers.iter().flat_map(Layer::linears).map(Linear::bytes).sum::<u64>();
        let latents = self.layers.iter().flat_map(|layer| &layer.latent).map(LatentLayer::head_bytes).sum::<u64>();
        layers + latents + self.embedding.bytes() + self.head.as_ref().map_or(0, Linear::bytes)
    }

    /// Records everything up to the last layer's output, which stays in the scratch.
    pub(crate) fn record_layers(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &Scratch,
        context: &StepContext<'_>,
    ) -> Result<()> {
        let hidden = Rows::new(&scratch.hidden, context.rows, self.config.hidden_size);
        self.embedding.gather_rows(&mut *pass, context.ids, hidden)?;
        if let Some(positions) = &self.position_embedding {
            positions.record(&mut *pass, hidden, context.positions)?;
        }
        for (layer, own) in self.layers.iter().zip(&context.layers) {
            self.record_layer(pass, scratch, context, own, layer)?;
        }
        Ok(())
    }

    fn record_layer(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &Scratch,
        context: &StepContext<'_>,
        own: &LayerContext<'_>,
        layer: &Layer,
    ) -> Result<()> {
        let (config, rows) = (&self.config, context.rows);
        let hidden = Rows::new(&scratch.hidden, rows, config.hidden_size);
        let qkv = Rows::new(&scratch.qkv, rows, layer.qkv.config().y_width());

        let x = self.normed(pass, scratch, layer.attention_norm.as_ref(), hidden)?;
        layer.qkv.record(&mut *pass, x, qkv)?;
        let attended = match (&layer.latent, &scratch.latent) {
            (Some(latent), Some(of_latents)) => {
                let buffers = LatentBuffers { qkv: &scratch.qkv, scratch: of_latents, attended: &scratch.attended };
                latent.record(pass, config, buffers, context, own)?
            }
            _ => self.attend(pass, scratch, context, own, &layer.qk_norm)?,
        };

        let post_attention = layer.post_attention_norm.as_ref();
        // In a parallel layer the MLP sees the same residual stream as the attention, before either is added to it.
        if config.parallel_residual {
            self.record_up(pass, scratch, layer, hidden)?;
            self.add(pass, scratch, &layer.o, post_attention, attended, hidden)?;
        } else {
            self.add(pass, scratch, &layer.o, post_attention, attended, hidden)?;
            self.record_up(pass, scratch, layer, hidden)?;
        }
        self.record_down(pass, scratch, layer, hidden)
    }

    /// What the experts of a step share.
    fn experts<'a>(&'a self, scratch: &'a Scratch) -> Result<(&'a Router, &'a ExpertScratch, Rows<'a>)> {
        let (Some(router), Some(of_experts)) = (&self.router, &scratch.experts) else {
            return Err(Error::argument("experts", "a layer with them", "a configuration with them"));
        };
        let width = self.config.experts.as_ref().map_or(0, |experts| experts.intermediate_size);
        Ok((router, of_experts, Rows::new(&scratch.up, router.config().experts.per_row, width)))
    }

    /// Records the first half of the MLP, from the residual stream, normalised, to the scratch.
    fn record_up(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &Scratch,
        layer: &Layer,
        hidden: Rows<'_>,
    ) -> Result<()> {
        let x = self.normed(pass, scratch, layer.mlp_norm.as_ref(), hidden)?;
        match &layer.mlp {
            Mlp::Dense(own) => {
                let [up, _] = own.as_ref();
                up.record(pass, x, Rows::new(&scratch.up, hidden.rows, self.config.intermediate_size))
            }
            Mlp::Experts(experts) => {
                let (router, of_experts, token) = self.experts(scratch)?;
                let inner = Rows { rows: token.rows.saturating_mul(hidden.rows), ..token };
                experts.record_up(pass, router, of_experts, x, inner)
            }
        }
    }

    /// Records its second half, which adds to the residual stream.
    fn record_down(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &Scratch,
        layer: &Layer,
        hidden: Rows<'_>,
    ) -> Result<()> {
        let weights = layer.post_mlp_norm.as_ref();
        match &layer.mlp {
            Mlp::Dense(own) => {
                let [_, down] = own.as_ref();
                let inner = Rows::new(&scratch.up, hidden.rows, self.config.intermediate_size);
                self.add(pass, scratch, down, weights, inner, hidden)
            }
            Mlp::Experts(experts) => {
                let (router, of_experts, token) = self.experts(scratch)?;
                let inner = Rows { rows: token.rows.saturating_mul(hidden.rows), ..token };
                let (Some(norm), Some(weights)) = (&self.norms.added, weights) else {
                    return experts.record_down(pass, router, of_experts, inner, hidden, true);
                };
                let added = Rows { buffer: &scratch.normed, offset: 0, ..hidden };
                experts.record_down(pass, router, of_experts, inner, added, false)?;
                norm.record(pass, weights, added, hidden)
            }
        }
    }

    /// Appends keys and values, and attends. Returns what `o` reads.
    fn attend<'a>(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &'a Scratch,
        context: &StepContext<'_>,
        own: &LayerContext<'_>,
        qk_norm: &QkNormWeights,
    ) -> Result<Rows<'a>> {
        let (config, rows) = (&self.config, context.rows);
        let heads = QkvRows::new(&scratch.qkv, rows, config.num_q_heads, context.cache.config());
        let attended = Rows::new(&scratch.attended, rows, config.num_q_heads * config.head_dim);
        let mut head_norm = None;
        match (qk_norm, &self.norms.qk) {
            (QkNormWeights::PerHead(norm), _) => head_norm = Some(norm),
            (QkNormWeights::AllHeads(weights), Some(norms)) => {
                let qk_rows = Region::of(qkv_widths(config)).map(|region| Rows::region(&scratch.qkv, rows, region));
                for ((norm, weights), rows) in norms.iter().zip(weights).zip(qk_rows) {
                    norm.record_in_place(&mut *pass, weights, rows)?;
                }
            }
            _ => {}
        }
        let (cache, step) = (context.cache, context.step);
        match (own.append, own.sink_q) {
            (Some(Append::Heads(append)), Some(sink_q)) => {
                cache.append_qkv_with_sinks(&mut *pass, step, own.place, append, heads, head_norm, sink_q)?;
            }
            (Some(Append::Heads(append)), None) => {
                cache.append_qkv(&mut *pass, step, own.place, append, heads, head_norm)?;
            }
            (Some(Append::Latent(_)), _) => return Err(Error::argument("latent", "none", "the model's latents")),
            (None, _) => cache.append(&mut *pass, step, own.place, heads.k(), heads.v(), None)?,
        }
        let mut call = AttentionCall::new(heads.q(), attended.range());
        (call.sink_q, call.sinks) = (own.sink_q, own.sinks);
        own.attention.attend_call(&mut *pass, own.plan, own.place, call)?;
        Ok(attended)
    }

    /// Adds a linear layer's result to the residual stream, normalised if there are weights for it.
    fn add(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &Scratch,
        linear: &Linear,
        weights: Option<&NormParameters>,
        x: Rows<'_>,
        hidden: Rows<'_>,
    ) -> Result<()> {
        let (Some(norm), Some(weights)) = (&self.norms.added, weights) else {
            return linear.record(&mut *pass, x, hidden);
        };
        let added = Rows { buffer: &scratch.normed, offset: 0, ..hidden };
        linear.record(&mut *pass, x, added)?;
        norm.record(&mut *pass, weights, added, hidden)
    }

    /// What a linear layer reads: x after LayerNorm, or x itself, which the layer normalises.
    fn normed<'a>(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &'a Scratch,
        weights: Option<&NormParameters>,
        x: Rows<'a>,
    ) -> Result<Rows<'a>> {
        let (Some(norm), Some(weights)) = (&self.norms.layer, weights) else { return Ok(x) };
        let normed = Rows { buffer: &scratch.normed, offset: 0, ..x };
        norm.record(&mut *pass, weights, x, normed)?;
        Ok(normed)
    }

    /// Records the final norm and the head for some of the `rows` of the last layer's output.
    pub(crate) fn record_head(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &Scratch,
        rows: u32,
        head_rows: BufferRef<'_>,
        logits: Rows<'_>,
    ) -> Result<()> {
        let width = self.config.hidden_size;
        let hidden = Rows::new(&scratch.hidden, rows, width);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        // The rows are different ones in rising order: as many as there are is all of them.
        if logits.rows == rows {
            let x = self.normed(pass, scratch, self.final_norm.as_ref(), hidden)?;
            return head.record(&mut *pass, x, logits);
        }
        let chosen = Rows::new(&scratch.normed, logits.rows, width);
        self.select.record(&mut *pass, hidden, head_rows, chosen)?;
        if let (Some(norm), Some(weights)) = (&self.norms.layer, &self.final_norm) {
            norm.record_in_place(&mut *pass, weights, chosen)?;
        }
        head.record(&mut *pass, chosen, logits)
    }
}

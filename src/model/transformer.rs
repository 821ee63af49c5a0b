//! [`Model`]: weights on the GPU, and the recording of its layers.

use std::path::Path;

use super::architecture::{LayerWeights, LinearWeights, ModelWeights, NormWeights, TensorSource};
use super::checkpoint::Checkpoint;
use super::config::{ModelConfig, Position};
use super::error::{ModelError, ModelResult};
use super::linear::{Linear, RmsNorm, RowSource};
use super::linear_config::LinearConfig;
use super::linear_kernels::LinearKernels;
use super::ops::{Norm, NormConfig, NormKind, NormParameters, PositionEmbedding, SelectRows};
use super::progress::Progress;
use super::quantise::{WeightFormat, WeightGrid};
use super::rows::Rows;
use crate::Result;
use crate::layout::Region;
use crate::{AppendQkv, Attention, AttentionPlan, BufferRef, Gpu, HeadNorm, KvCache, QkvRows, Step};

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
}

impl ModelOptions {
    /// With matrices in this format.
    #[must_use]
    pub const fn new(weights: WeightFormat) -> Self {
        Self { weights, exact: false }
    }

    /// The same, with logits of a sequence that have the same bits alone and in any batch: linear layers and attention add in an order that doesn't
    /// depend on what else is computed. Nor does it depend on the chunks in which a text is fed, as long as none is a single token, which takes a
    /// kernel of its own.
    #[must_use]
    pub const fn with_exact(mut self, exact: bool) -> Self {
        self.exact = exact;
        self
    }
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self::new(WeightFormat::F16)
    }
}

/// One transformer layer: attention and a feed-forward network (MLP), each behind a norm and added to the residual stream.
///
/// RMSNorm is a part of the linear layer behind it, LayerNorm has a dispatch of its own.
#[derive(Debug)]
struct Layer {
    attention_norm: Option<NormParameters>,
    qkv: Linear,
    head_norm: Option<HeadNorm>,
    o: Linear,
    mlp_norm: Option<NormParameters>,
    /// With the gate, if there is one, and the activation.
    up: Linear,
    down: Linear,
}

/// A decoder-only transformer with its weights on the GPU. Make one and share it between [`Decoder`](super::Decoder)s.
#[derive(Debug)]
pub struct Model {
    gpu: Gpu,
    config: ModelConfig,
    embedding: Linear,
    position_embedding: Option<PositionEmbedding>,
    layers: Vec<Layer>,
    /// LayerNorm over the residual stream.
    norm: Option<Norm>,
    final_norm: Option<NormParameters>,
    /// `None`: the token embedding, transposed.
    head: Option<Linear>,
    select: SelectRows,
}

/// The activations of one step.
#[derive(Debug)]
pub(crate) struct Scratch {
    hidden: wgpu::Buffer,
    /// After LayerNorm; rows for the head.
    normed: wgpu::Buffer,
    qkv: wgpu::Buffer,
    attended: wgpu::Buffer,
    up: wgpu::Buffer,
}

impl Scratch {
    /// f32 values per token of the widest buffer.
    pub(crate) fn widest_row(config: &ModelConfig) -> u64 {
        let qkv_width =
            Region::of(qkv_widths(config)).iter().map(|region| u64::from(region.padded_width())).sum::<u64>();
        qkv_width.max(config.intermediate_size.into()).max(config.hidden_size.into())
    }

    /// Room for `rows` tokens.
    pub(crate) fn new(gpu: &Gpu, config: &ModelConfig, rows: u32) -> Result<Self> {
        let buffer = |label, width: u32| {
            let bytes = u64::from(rows) * u64::from(width) * 4;
            gpu.create_buffer("creating the activations", label, bytes, wgpu::BufferUsages::STORAGE)
        };
        let qkv = Region::of(qkv_widths(config));
        Ok(Self {
            hidden: buffer("folio hidden", config.hidden_size)?,
            normed: buffer("folio normed", config.hidden_size)?,
            qkv: buffer("folio qkv", qkv.iter().map(Region::padded_width).sum())?,
            attended: buffer("folio attended", qkv[0].width)?,
            up: buffer("folio up", config.intermediate_size)?,
        })
    }
}

/// What the layers of one step share.
pub(crate) struct StepContext<'a> {
    pub(crate) cache: &'a KvCache,
    pub(crate) attention: &'a Attention,
    /// For models with rotary embeddings.
    pub(crate) append: Option<&'a AppendQkv>,
    pub(crate) step: &'a Step,
    pub(crate) plan: &'a AttentionPlan,
    /// Token id of each row.
    pub(crate) ids: BufferRef<'a>,
    /// Position of each row, for learned positions.
    pub(crate) positions: BufferRef<'a>,
    pub(crate) rows: u32,
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
        let bytes_total = weights.sources().map(|tensor| source.bytes(tensor)).sum::<ModelResult<u64>>()?;
        let kernels = LinearKernels::new();
        let norm_config =
            NormConfig { bias: true, ..NormConfig::new(config.norm.kind, config.hidden_size, config.norm.eps) };
        let norm = match config.norm.kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(Norm::new(gpu, norm_config).await?),
        };
        if config.qk_norm && (norm.is_some() || config.position == Position::Learned) {
            let got = format!("with {:?} norms, {:?}", config.norm.kind, config.position);
            return Err(ModelError::argument("qk_norm", got, "RMSNorm and rotary embeddings"));
        }
        let mut builder =
            Builder { gpu, config: &config, source, options, kernels, progress, bytes_done: 0, bytes_total };
        // Whichever computes logits normalises before.
        let tied_norm = Some(&weights.final_norm).filter(|_| weights.head.is_none());
        let embedding = builder.matrix(&[&weights.embedding], &[], tied_norm, |_| {}).await?;
        let position_embedding = match &weights.position_embedding {
            Some(tensor) => {
                let table = builder.values(tensor)?;
                Some(PositionEmbedding::new(gpu, &table, config.hidden_size).await?)
            }
            None => None,
        };
        let mut layers = Vec::with_capacity(weights.layers.len());
        for layer in &weights.layers {
            layers.push(builder.layer(layer, norm.as_ref()).await?);
        }
        let final_norm = builder.norm(&weights.final_norm, norm.as_ref())?;
        let head = match &weights.head {
            Some(head) => Some(builder.linear(&[head], Some(&weights.final_norm), |_| {}).await?),
            None => None,
        };
        let select = SelectRows::new(gpu, config.hidden_size).await?;
        let gpu = gpu.clone();
        Ok(Self { gpu, config, embedding, position_embedding, layers, norm, final_norm, head, select })
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

    /// Bytes of weights that a step with one token per sequence reads: all matrices of the layers and the head.
    #[must_use]
    pub fn streamed_bytes(&self) -> u64 {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.up, &l.down]);
        layers.chain([self.head.as_ref().unwrap_or(&self.embedding)]).map(Linear::bytes).sum()
    }

    /// Shape and options of its linear layers, each once: what `Gpu::tune_linear` takes.
    #[must_use]
    pub fn linear_configs(&self) -> Vec<LinearConfig> {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.up, &l.down]);
        let mut configs = Vec::new();
        for config in layers.chain([self.head.as_ref().unwrap_or(&self.embedding)]).map(Linear::config) {
            if !configs.contains(&config) {
                configs.push(config);
            }
        }
        configs
    }

    /// Bytes of all matrices on the GPU.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.streamed_bytes() + if self.head.is_some() { self.embedding.bytes() } else { 0 }
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
        for (index, layer) in (0..).zip(&self.layers) {
            self.record_layer(pass, scratch, context, index, layer)?;
        }
        Ok(())
    }

    fn record_layer(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &Scratch,
        context: &StepContext<'_>,
        index: u32,
        layer: &Layer,
    ) -> Result<()> {
        let (config, rows) = (&self.config, context.rows);
        let hidden = Rows::new(&scratch.hidden, rows, config.hidden_size);
        let qkv = Rows::new(&scratch.qkv, rows, layer.qkv.config().y_width());
        let heads = QkvRows::new(&scratch.qkv, rows, config.num_q_heads, context.cache.config());
        let attended = Rows::new(&scratch.attended, rows, config.num_q_heads * config.head_dim);
        let up = Rows::new(&scratch.up, rows, config.intermediate_size);

        let x = self.normed(pass, scratch, layer.attention_norm.as_ref(), hidden)?;
        layer.qkv.record(&mut *pass, x, qkv)?;
        match context.append {
            Some(append) => {
                let norm = layer.head_norm.as_ref();
                context.cache.append_qkv(&mut *pass, context.step, index, append, heads, norm)?;
            }
            None => context.cache.append(&mut *pass, context.step, index, heads.k(), heads.v(), None)?,
        }
        context.attention.attend(&mut *pass, context.plan, index, heads.q(), attended.range())?;

        // In a parallel layer the MLP sees the same residual stream as the attention, before either is added to it.
        if config.parallel_residual {
            let x = self.normed(pass, scratch, layer.mlp_norm.as_ref(), hidden)?;
            layer.up.record(&mut *pass, x, up)?;
            layer.o.record(&mut *pass, attended, hidden)?;
        } else {
            layer.o.record(&mut *pass, attended, hidden)?;
            let x = self.normed(pass, scratch, layer.mlp_norm.as_ref(), hidden)?;
            layer.up.record(&mut *pass, x, up)?;
        }
        layer.down.record(&mut *pass, up, hidden)
    }

    /// What a linear layer reads: x after LayerNorm, or x itself, which the layer normalises.
    fn normed<'a>(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        scratch: &'a Scratch,
        weights: Option<&NormParameters>,
        x: Rows<'a>,
    ) -> Result<Rows<'a>> {
        let (Some(norm), Some(weights)) = (&self.norm, weights) else { return Ok(x) };
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
        if let (Some(norm), Some(weights)) = (&self.norm, &self.final_norm) {
            norm.record_in_place(&mut *pass, weights, chosen)?;
        }
        head.record(&mut *pass, chosen, logits)
    }
}

/// Widths of queries, keys and values.
fn qkv_widths(config: &ModelConfig) -> [u32; 3] {
    let kv_width = config.num_kv_heads.saturating_mul(config.head_dim);
    [config.num_q_heads.saturating_mul(config.head_dim), kv_width, kv_width]
}

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
struct Builder<'a, P> {
    gpu: &'a Gpu,
    config: &'a ModelConfig,
    source: &'a dyn WeightSource,
    options: ModelOptions,
    kernels: LinearKernels,
    progress: P,
    bytes_done: u64,
    bytes_total: u64,
}

impl<P: FnMut(Progress<'_>)> Builder<'_, P> {
    fn advance(&mut self, tensor: &TensorSource) -> ModelResult<()> {
        self.bytes_done += self.source.bytes(tensor)?;
        let what = tensor.pieces().first().map_or("", |piece| piece.tensor());
        (self.progress)(Progress { bytes_done: self.bytes_done, bytes_total: self.bytes_total, what });
        Ok(())
    }

    /// All of a small tensor.
    fn values(&mut self, tensor: &TensorSource) -> ModelResult<Vec<f32>> {
        let [rows, columns] = tensor.shape();
        let mut values = vec![0.0; rows * columns];
        self.source.rows(tensor, 0, &mut values)?;
        self.advance(tensor)?;
        Ok(values)
    }

    /// A layer of matrices with the same input, their rows one after another. They are asked for as [`ModelWeights`] has them.
    async fn matrix(
        &mut self,
        weights: &[&TensorSource],
        biases: &[&TensorSource],
        norm: Option<&NormWeights>,
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
        let norm = norm.map(|norm| self.values(&norm.weight)).transpose()?;
        let norm = norm.as_ref().map(|weight| RmsNorm { weight, eps: self.config.norm.eps });
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

    async fn linear(
        &mut self,
        layers: &[&LinearWeights],
        norm: Option<&NormWeights>,
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

    /// The weights of a LayerNorm. Those of RMSNorm go to the linear layer behind it.
    fn norm(&mut self, weights: &NormWeights, norm: Option<&Norm>) -> ModelResult<Option<NormParameters>> {
        let Some(norm) = norm else { return Ok(None) };
        let weight = self.values(&weights.weight)?;
        let bias = weights.bias.as_ref().map(|tensor| self.values(tensor)).transpose()?;
        Ok(Some(norm.weights(&weight, bias.as_deref())?))
    }

    async fn layer(&mut self, weights: &LayerWeights, norm: Option<&Norm>) -> ModelResult<Layer> {
        let config = self.config;
        let add = |linear: &mut LinearConfig| linear.accumulate = true;
        let split = |linear: &mut LinearConfig| linear.regions = Some(qkv_widths(config));
        let activate = |linear: &mut LinearConfig| {
            linear.activation = Some(config.activation);
            if config.gated_mlp {
                (linear.gated, linear.out_features) = (true, linear.out_features / 2);
            }
        };
        let head_norm = match (&weights.q_norm, &weights.k_norm) {
            (Some(q), Some(k)) => {
                let (q, k) = (self.values(&q.weight)?, self.values(&k.weight)?);
                Some(HeadNorm::new(self.gpu, &q, &k, config.norm.eps)?)
            }
            _ => None,
        };
        Ok(Layer {
            attention_norm: self.norm(&weights.attn_norm, norm)?,
            qkv: self.linear(&[&weights.q, &weights.k, &weights.v], Some(&weights.attn_norm), split).await?,
            head_norm,
            o: self.linear(&[&weights.o], None, add).await?,
            mlp_norm: self.norm(&weights.mlp_norm, norm)?,
            up: self.linear(&[&weights.gate_up], Some(&weights.mlp_norm), activate).await?,
            down: self.linear(&[&weights.down], None, add).await?,
        })
    }
}

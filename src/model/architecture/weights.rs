//! Where the parameters of a model lie in its checkpoint.

use super::experts::{ExpertNames, ExpertWeights};
use super::{FromLatents, LatentNames, Qkv, TensorNames, Up};
use crate::model::config::{ExpertsConfig, ModelConfig, QkNorm};
use crate::model::ops::NormKind;
use crate::model::{ModelError, ModelResult};

/// Where each parameter of a model lies in its checkpoint.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelWeights {
    /// `[vocab_size, hidden_size]`
    pub embedding: TensorSource,
    /// `[max_positions, hidden_size]`, for learned positions.
    pub position_embedding: Option<TensorSource>,
    /// From the first layer to the last.
    pub layers: Vec<LayerWeights>,
    /// The norm before the head.
    pub final_norm: NormWeights,
    /// `[vocab_size, hidden_size]`. `None`: the head is tied, use the embedding.
    pub head: Option<LinearWeights>,
}

/// The parameters of one layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerWeights {
    /// The norm before attention.
    pub attn_norm: Option<NormWeights>,
    /// The norm of what attention adds to the residual stream.
    pub post_attn_norm: Option<NormWeights>,
    /// `[num_q_heads, 1]`: a logit of each head that takes part in the softmax and stands for no key (gpt-oss).
    pub sinks: Option<TensorSource>,
    /// With a latent of queries: `[q_rank, hidden_size]`, which makes it.
    pub q_latent: Option<LinearWeights>,
    /// `[num_q_heads * head_dim, hidden_size]`, or `[num_q_heads * head_dim, q_rank]` of a latent of queries.
    pub q: LinearWeights,
    /// `[num_kv_heads * head_dim, hidden_size]`. With [latents](crate::model::LatentConfig) `[kv_rank + rope_dim, hidden_size]`, which makes them.
    pub k: LinearWeights,
    /// `[num_kv_heads * head_dim, hidden_size]`. With latents `[num_q_heads * (head_dim - rope_dim + value_dim), kv_rank]`: of each head what makes
    /// its key of a latent, then what makes its value.
    pub v: LinearWeights,
    /// `[hidden_size, num_q_heads * head_dim]`, with latents `[hidden_size, num_q_heads * value_dim]`.
    pub o: LinearWeights,
    /// The norm of queries: `head_dim` wide, or as wide as all heads. See [`ModelConfig::qk_norm`](crate::model::ModelConfig::qk_norm). With latents
    /// that of the latent of queries.
    pub q_norm: Option<NormWeights>,
    /// The norm of keys; with latents that of the latent of keys and values.
    pub k_norm: Option<NormWeights>,
    /// The norm before the MLP.
    pub mlp_norm: Option<NormWeights>,
    /// The norm of what the MLP adds to the residual stream.
    pub post_mlp_norm: Option<NormWeights>,
    /// The router of a layer with experts: `[experts, hidden_size]`.
    pub router: Option<LinearWeights>,
    /// `[experts, 1]`: what is added to the scores of experts where they are selected.
    pub correction: Option<TensorSource>,
    /// First and second projection of the expert that every token goes to: as `gate_up` and `down` of one.
    pub shared: Option<[LinearWeights; 2]>,
    /// Gated: `[2 * intermediate_size, hidden_size]`, all rows of the gate, then all of up. Otherwise `[intermediate_size, hidden_size]`.
    /// With experts those of the first, those of the second, and so on, each of their own intermediate size.
    pub gate_up: LinearWeights,
    /// `[hidden_size, intermediate_size]`; with experts `[experts * hidden_size, intermediate_size]`.
    pub down: LinearWeights,
}

/// A linear layer's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearWeights {
    /// `[out, in]`
    pub weight: TensorSource,
    /// `[out, 1]`
    pub bias: Option<TensorSource>,
}

/// A norm's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct NormWeights {
    /// `[width, 1]`
    pub weight: TensorSource,
    /// `[width, 1]`; LayerNorm only.
    pub bias: Option<TensorSource>,
}

impl ModelWeights {
    /// Every source, in the order of computation: embedding, layers, final norm, head.
    pub fn sources(&self) -> impl Iterator<Item = &TensorSource> {
        let start = std::iter::once(&self.embedding).chain(&self.position_embedding);
        let layers = self.layers.iter().flat_map(LayerWeights::sources);
        let head = self.head.iter().flat_map(LinearWeights::sources);
        start.chain(layers).chain(self.final_norm.sources()).chain(head)
    }
}

impl LayerWeights {
    /// Every source of the layer, in the order of computation.
    pub fn sources(&self) -> impl Iterator<Item = &TensorSource> {
        let projections = self.q_latent.iter().chain([&self.q, &self.k, &self.v]).flat_map(LinearWeights::sources);
        let [before, qk, between, after] = [
            [&self.attn_norm, &None],
            [&self.q_norm, &self.k_norm],
            [&self.post_attn_norm, &self.mlp_norm],
            [&self.post_mlp_norm, &None],
        ]
        .map(|norms| norms.into_iter().flatten().flat_map(NormWeights::sources));
        let attention = before.chain(projections).chain(qk).chain(&self.sinks).chain(self.o.sources()).chain(between);
        let router = self.router.iter().flat_map(LinearWeights::sources).chain(&self.correction);
        let shared = self.shared.iter().flatten().flat_map(LinearWeights::sources);
        attention.chain(router).chain(shared).chain(self.gate_up.sources()).chain(self.down.sources()).chain(after)
    }

    /// The three projections as one of `[(num_q_heads + 2 * num_kv_heads) * head_dim, hidden_size]`: queries, keys, values.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if they were changed so that they no longer fit together, or are those of latents.
    pub fn qkv(&self) -> ModelResult<LinearWeights> {
        LinearWeights::stack(&[&self.q, &self.k, &self.v])
    }
}

impl LinearWeights {
    /// The weight and the bias.
    pub fn sources(&self) -> impl Iterator<Item = &TensorSource> {
        std::iter::once(&self.weight).chain(&self.bias)
    }

    /// Layers with the same input as one, their outputs one after the other.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if there is none, if they have different inputs, or if only some have a bias.
    pub fn stack(parts: &[&Self]) -> ModelResult<Self> {
        let weights: Vec<_> = parts.iter().map(|part| &part.weight).collect();
        let biases: Vec<_> = parts.iter().filter_map(|part| part.bias.as_ref()).collect();
        if !biases.is_empty() && biases.len() != parts.len() {
            let got = format!("{} in {} layers", biases.len(), parts.len());
            return Err(ModelError::argument("biases", got, "one in each layer or none at all"));
        }
        let bias = if biases.is_empty() { None } else { Some(TensorSource::stack(&biases)?) };
        Ok(Self { weight: TensorSource::stack(&weights)?, bias })
    }
}

impl NormWeights {
    /// The weight and the bias.
    pub fn sources(&self) -> impl Iterator<Item = &TensorSource> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}

/// A parameter as a matrix `[rows, columns]`, put together from rows of tensors. A vector has one column.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSource {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) columns: usize,
}

impl TensorSource {
    /// `[rows, columns]`: `[out, in]` of a linear layer, `[n, 1]` of a vector.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.pieces.iter().map(|piece| piece.rows).sum(), self.columns]
    }

    /// The pieces, from the first row to the last.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Sources of the same width as one, their rows one after the other.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if there is none, or if the widths differ.
    pub fn stack(parts: &[&Self]) -> ModelResult<Self> {
        let need = "sources, at least one, of the same width";
        let Some(first) = parts.first() else {
            return Err(ModelError::argument("parts", "none", need));
        };
        if let Some(other) = parts.iter().find(|part| part.columns != first.columns) {
            return Err(ModelError::argument("parts", format!("widths {} and {}", first.columns, other.columns), need));
        }
        let pieces = parts.iter().flat_map(|part| part.pieces.iter().cloned()).collect();
        Ok(Self { pieces, columns: first.columns })
    }
}

/// Rows of one tensor. Row `r` of the piece is row `first + r / run * stride + r % run` of the tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub(crate) tensor: String,
    /// What the tensor must have, as it lies in the file.
    pub(crate) shape: Vec<usize>,
    /// "Row" above means a column of what lies in the file.
    pub(crate) transposed: bool,
    /// Of a transposed tensor of three dimensions, the number of its matrix.
    pub(crate) matrix: usize,
    /// The tensor has codes of four bits, and this one their scales: see `elements::Mxfp4`.
    pub(crate) scales: Option<String>,
    pub(crate) rows: usize,
    pub(crate) first: usize,
    /// Rows that lie side by side.
    pub(crate) run: usize,
    pub(crate) stride: usize,
}

impl Piece {
    /// The first row of a tensor.
    pub(crate) fn row(tensor: String, shape: Vec<usize>) -> Self {
        Self { tensor, shape, transposed: false, matrix: 0, scales: None, rows: 1, first: 0, run: 1, stride: 1 }
    }

    /// Name of the tensor.
    #[must_use]
    pub fn tensor(&self) -> &str {
        &self.tensor
    }

    /// Row of the tensor, and how many rows of the piece, from `row` on, lie there side by side.
    pub(crate) fn locate(&self, row: usize) -> (usize, usize) {
        let within = row % self.run;
        (self.first + row / self.run * self.stride + within, (self.run - within).min(self.rows - row))
    }
}

/// Rows of a fused tensor.
#[derive(Clone, Copy)]
struct Selection {
    rows: usize,
    first: usize,
    run: usize,
    stride: usize,
}

impl Selection {
    fn range(first: usize, rows: usize) -> Self {
        Self { rows, first, run: rows, stride: rows }
    }
}

/// What a layer attends with.
struct Projections {
    q_latent: Option<LinearWeights>,
    /// Of queries, keys and values.
    parts: [LinearWeights; 3],
    /// Of queries and keys, or of their latents.
    norms: [Option<NormWeights>; 2],
}

pub(super) struct Build<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) names: &'a TensorNames,
    pub(super) prefix: &'static str,
    /// The names of experts, and their settings, if there are some.
    pub(super) experts: Option<(&'static ExpertNames, &'a ExpertsConfig)>,
}

impl Build<'_> {
    pub(super) fn name(&self, template: &str, layer: u32) -> String {
        format!("{}{}", self.prefix, template.replace("{i}", &layer.to_string()))
    }

    pub(super) fn table(&self, template: &str, rows: u32) -> TensorSource {
        let (rows, columns) = (rows as usize, self.config.hidden_size as usize);
        let tensor = format!("{}.weight", self.name(template, 0));
        let Selection { first, run, stride, .. } = Selection::range(0, rows);
        let piece = Piece {
            tensor,
            shape: vec![rows, columns],
            transposed: false,
            matrix: 0,
            scales: None,
            rows,
            first,
            run,
            stride,
        };
        TensorSource { pieces: vec![piece], columns }
    }

    /// A vector, whose name is all of its name.
    pub(super) fn vector(&self, template: &str, len: usize, layer: u32) -> TensorSource {
        Self::part_of_vector(self.name(template, layer), len, Selection::range(0, len))
    }

    fn part_of_vector(tensor: String, len: usize, select: Selection) -> TensorSource {
        let Selection { rows, first, run, stride } = select;
        let piece =
            Piece { tensor, shape: vec![len], transposed: false, matrix: 0, scales: None, rows, first, run, stride };
        TensorSource { pieces: vec![piece], columns: 1 }
    }

    pub(super) fn norm(&self, template: &str, width: usize, layer: u32) -> NormWeights {
        let name = self.name(template, layer);
        let vector = |end: &str| Self::part_of_vector(format!("{name}.{end}"), width, Selection::range(0, width));
        let bias = (self.config.norm.kind == NormKind::Layer).then(|| vector("bias"));
        NormWeights { weight: vector("weight"), bias }
    }

    pub(super) fn linear(&self, template: &str, out: usize, columns: usize, bias: bool, layer: u32) -> LinearWeights {
        self.select(template, out, columns, bias, layer, Selection::range(0, out))
    }

    /// Some outputs of a linear layer that has `out` of them.
    fn select(
        &self,
        template: &str,
        out: usize,
        columns: usize,
        bias: bool,
        layer: u32,
        select: Selection,
    ) -> LinearWeights {
        let name = self.name(template, layer);
        let transposed = self.names.transposed;
        let shape = if transposed { vec![columns, out] } else { vec![out, columns] };
        let Selection { rows, first, run, stride } = select;
        let piece = Piece {
            tensor: format!("{name}.weight"),
            shape,
            transposed,
            matrix: 0,
            scales: None,
            rows,
            first,
            run,
            stride,
        };
        let bias = bias.then(|| Self::part_of_vector(format!("{name}.bias"), out, select));
        LinearWeights { weight: TensorSource { pieces: vec![piece], columns }, bias }
    }

    fn qkv(&self, layer: u32) -> ModelResult<Projections> {
        let (hidden, head) = (self.config.hidden_size as usize, self.config.head_dim as usize);
        let (q, kv) = (self.config.q_width(), self.config.kv_width());
        let bias = self.config.qkv_bias;
        let all = q + 2 * kv;
        let parts = match self.names.qkv {
            Qkv::Split([q_name, k_name, v_name]) => [
                self.linear(q_name, q, hidden, bias, layer),
                self.linear(k_name, kv, hidden, bias, layer),
                self.linear(v_name, kv, hidden, bias, layer),
            ],
            Qkv::Stacked(name) => [(0, q), (q, kv), (q + kv, kv)]
                .map(|(first, rows)| self.select(name, all, hidden, bias, layer, Selection::range(first, rows))),
            Qkv::PerHead(name) => [0, head, 2 * head].map(|first| {
                let select = Selection { rows: q, first, run: head, stride: 3 * head };
                self.select(name, all, hidden, bias, layer, select)
            }),
            Qkv::Latent(names) => return self.latents(names, layer),
        };
        let norms = match self.names.qk_norm {
            None => [None, None],
            Some((over, [q_name, k_name])) => {
                let [q_width, k_width] = match over {
                    QkNorm::PerHead => [head; 2],
                    QkNorm::AllHeads => [q, kv],
                };
                [Some(self.norm(q_name, q_width, layer)), Some(self.norm(k_name, k_width, layer))]
            }
        };
        Ok(Projections { q_latent: None, parts, norms })
    }

    fn latents(&self, names: LatentNames, layer: u32) -> ModelResult<Projections> {
        let (config, hidden) = (self.config, self.config.hidden_size as usize);
        let latent = config.latent.as_ref();
        let latent = latent.ok_or_else(|| ModelError::argument("latent", "none", "sizes of the model's latents"))?;
        let [rank, rope, value] = [latent.kv_rank, latent.rope_dim, latent.value_dim].map(|size| size as usize);
        // Of a head, what makes its key of a latent.
        let key = (config.head_dim as usize).saturating_sub(rope);
        let (q_latent, q_norm, q) = match latent.q_rank.map(|rank| rank as usize) {
            None => (None, None, self.linear(names.q, config.q_width(), hidden, false, layer)),
            Some(rank) => (
                Some(self.linear(names.q_a, rank, hidden, config.qkv_bias, layer)),
                Some(self.norm(names.q_a_norm, rank, layer)),
                self.linear(names.q_b, config.q_width(), rank, false, layer),
            ),
        };
        let k = self.linear(names.kv_a, rank + rope, hidden, config.qkv_bias, layer);
        let heads = config.num_q_heads as usize;
        let v = match names.kv_b {
            FromLatents::PerHead(name) => self.linear(name, heads * (key + value), rank, false, layer),
            FromLatents::Split(names) => {
                let [k, v] = names.map(|name| format!("{}.weight", self.name(name, layer)));
                let of_head = |head: usize| {
                    let k = Piece::row(k.clone(), vec![heads, rank, key]);
                    let v = Piece::row(v.clone(), vec![heads, value, rank]);
                    [
                        Piece { transposed: true, matrix: head, rows: key, run: key, stride: key, ..k },
                        Piece { rows: value, first: head * value, run: value, stride: value, ..v },
                    ]
                };
                let weight = TensorSource { pieces: (0..heads).flat_map(of_head).collect(), columns: rank };
                LinearWeights { weight, bias: None }
            }
        };
        let norms = [q_norm, Some(self.norm(names.kv_a_norm, rank, layer))];
        Ok(Projections { q_latent, parts: [q, k, v], norms })
    }

    /// The first projection of an MLP.
    fn gate_up(&self, layer: u32) -> LinearWeights {
        let (config, names) = (self.config, self.names);
        let (hidden, inner) = (config.hidden_size as usize, config.intermediate_size as usize);
        match names.up {
            Up::Alone(up) => self.linear(up, inner, hidden, config.mlp_bias, layer),
            Up::Packed(both) => self.linear(both, 2 * inner, hidden, config.mlp_bias, layer),
            Up::Gated(both) => {
                let [mut gate, up] = both.map(|name| self.linear(name, inner, hidden, config.mlp_bias, layer));
                gate.weight.pieces.extend(up.weight.pieces);
                if let (Some(gate), Some(up)) = (&mut gate.bias, up.bias) {
                    gate.pieces.extend(up.pieces);
                }
                gate
            }
        }
    }

    pub(super) fn layer(&self, layer: u32) -> ModelResult<LayerWeights> {
        let (config, names) = (self.config, self.names);
        let (hidden, inner) = (config.hidden_size as usize, config.intermediate_size as usize);
        let Projections { q_latent, parts: [q, k, v], norms: [q_norm, k_norm] } = self.qkv(layer)?;
        let experts = self.experts.filter(|(_, experts)| experts.layers.contains(layer));
        let (gate_up, down, router, correction, shared) = match experts {
            Some((names, config)) => {
                let ExpertWeights { router, gate_up, down, correction, shared } = self.experts(names, config, layer);
                (gate_up, down, Some(router), correction, shared)
            }
            None => {
                let down = self.linear(names.down, hidden, inner, config.mlp_bias, layer);
                (self.gate_up(layer), down, None, None, None)
            }
        };
        let norm = |name: Option<_>| name.map(|name| self.norm(name, hidden, layer));
        Ok(LayerWeights {
            attn_norm: norm(names.attn_norm),
            post_attn_norm: norm(names.post_attn_norm),
            q_latent,
            sinks: names.sinks.map(|name| self.vector(name, config.num_q_heads as usize, layer)),
            q,
            k,
            v,
            o: self.linear(names.output, hidden, config.attended_width(), config.output_bias, layer),
            q_norm,
            k_norm,
            mlp_norm: norm(names.mlp_norm),
            post_mlp_norm: norm(names.post_mlp_norm),
            router,
            correction,
            shared,
            gate_up,
            down,
        })
    }
}

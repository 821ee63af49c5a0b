//! What the kinds of layers of a model need beside its weights.

use super::groups::{CacheLayers, seen};
use super::{DecoderOptions, storage};
use crate::model::ModelResult;
use crate::model::config::QkNorm;
use crate::model::transformer::{Append, LayerContext, Model};
use crate::{
    AppendLatent, AppendQkv, Attention, AttentionConfig, AttentionPlan, BufferRef, KvCache, QueryKernel, Result,
    RopeConfig, Sinks, Step,
};

/// Attention and rotation of each kind of layer. Kinds share what they have in common.
#[derive(Debug)]
pub(super) struct LayerKernels {
    attentions: Vec<Attention>,
    appends: Vec<Append>,
    /// Plans of a step: of which attention, for which group of the cache's layers.
    plans: Vec<(usize, u32)>,
    /// Of each layer.
    layers: Vec<LayerKernel>,
    /// Of each layer, if the model has them.
    sinks: Vec<Sinks>,
    /// Queries for sink tokens of a step, if there are any, and the bytes of a token's.
    sink_q: Option<(wgpu::Buffer, u64)>,
}

/// What a layer takes.
#[derive(Clone, Copy, Debug)]
struct LayerKernel {
    /// The layer of the cache.
    place: u32,
    attention: usize,
    plan: usize,
    append: Option<usize>,
}

impl LayerKernels {
    /// With `trees` they are for steps that have some.
    pub(super) async fn new(
        model: &Model,
        cache: &KvCache,
        layers: &CacheLayers,
        options: &DecoderOptions,
        trees: bool,
    ) -> ModelResult<Self> {
        let config = model.config();
        let (mut windows, mut ropes): (Vec<_>, Vec<(&RopeConfig, bool)>) = (Vec::new(), Vec::new());
        let kinds = config.layers.kinds().iter().map(|kind| {
            let (window, sinks) = seen(kind.window, options.streaming);
            // Without rotation there are no distances that would be other ones.
            let rope = kind.rope.as_ref().map(|rope| index_of(&mut ropes, (rope, sinks > 0)));
            (index_of(&mut windows, (window, sinks, sinks > 0 && rope.is_some())), rope)
        });
        let kinds: Vec<_> = kinds.collect();
        let mut plans = Vec::new();
        let of_layer = |layer| {
            let place = layers.place(layer);
            let (attention, append) = kinds[config.layers.index(layer)];
            let plan = index_of(&mut plans, (attention, cache.config().group_of(place)));
            LayerKernel { place, attention, plan, append }
        };
        let of_layers = (0..config.num_layers).map(of_layer).collect();
        let mut attentions = Vec::with_capacity(windows.len());
        for (window, sink_tokens, sink_queries) in windows {
            let mut attention = AttentionConfig::new(config.num_q_heads);
            (attention.sink_tokens, attention.sink_queries) = (sink_tokens, sink_queries);
            (attention.window, attention.deterministic, attention.trees) = (window, model.is_exact(), trees);
            (attention.softmax_scale, attention.softcap) = (config.softmax_scale, config.attention_softcap);
            // Each layer brings its own.
            attention.sinks = config.attention_sinks.then(|| vec![0.0; config.num_q_heads as usize]);
            attentions.push(Attention::new(cache, attention).await?);
        }
        let attention = attentions.first().filter(|_| config.attention_sinks);
        let upload = |attention: &Attention| model.sinks().map(|values| attention.sinks(values)).collect();
        let sinks = attention.map_or(Ok(Vec::new()), upload)?;
        let per_head = config.qk_norm == Some(QkNorm::PerHead);
        let mut appends = Vec::with_capacity(ropes.len());
        let mut has_sinks = false;
        for (rope, sinks) in ropes {
            has_sinks |= sinks;
            let (rope, heads) = (rope.clone(), config.num_q_heads);
            appends.push(match config.latent {
                Some(_) => Append::Latent(AppendLatent::new(cache, rope).await?),
                None if sinks => Append::Heads(AppendQkv::with_sink_queries(cache, rope, heads, per_head).await?),
                None => Append::Heads(AppendQkv::new(cache, rope, heads, per_head).await?),
            });
        }
        let row_bytes = u64::from(config.num_q_heads) * u64::from(config.head_dim) * 4;
        let bytes = row_bytes * u64::from(options.max_step_tokens);
        let sink_q =
            if has_sinks { Some((storage(model.gpu(), "folio sink queries", bytes)?, row_bytes)) } else { None };
        Ok(Self { attentions, appends, plans, layers: of_layers, sinks, sink_q })
    }

    /// Plans a step: one plan for each attention and each group of layers that it is used in.
    pub(super) fn plan(&self, step: &Step, kernels: Option<&[QueryKernel]>) -> Result<Vec<AttentionPlan>> {
        let plan = |&(attention, group): &(usize, u32)| {
            let (attention, step) = (&self.attentions[attention], step.group(group)?);
            match kernels {
                Some(kernels) => attention.plan_with_kernels(step, kernels),
                None => attention.plan(step),
            }
        };
        self.plans.iter().map(plan).collect()
    }

    /// What each layer takes in a step with these plans.
    pub(super) fn contexts<'a>(&'a self, plans: &'a [AttentionPlan], rows: u32) -> Vec<LayerContext<'a>> {
        let sink_q = |attention: &Attention| {
            let (buffer, row_bytes) = self.sink_q.as_ref().filter(|_| attention.config().sink_queries)?;
            Some(BufferRef::new(buffer, 0, u64::from(rows) * row_bytes))
        };
        let context = |(layer, kernel): (usize, &LayerKernel)| LayerContext {
            place: kernel.place,
            attention: &self.attentions[kernel.attention],
            plan: &plans[kernel.plan],
            append: kernel.append.map(|append| &self.appends[append]),
            sinks: self.sinks.get(layer),
            sink_q: sink_q(&self.attentions[kernel.attention]),
        };
        self.layers.iter().enumerate().map(context).collect()
    }

    pub(super) fn warm_up(&self) -> Result<()> {
        self.attentions.iter().try_for_each(Attention::warm_up)
    }
}

/// Where a value stands among those that there are, at the end if it is new.
fn index_of<T: PartialEq>(values: &mut Vec<T>, value: T) -> usize {
    let known = values.iter().position(|other| *other == value);
    known.unwrap_or_else(|| {
        values.push(value);
        values.len() - 1
    })
}

//! What the kinds of layers of a model need beside its weights.

use crate::model::ModelResult;
use crate::model::config::QkNorm;
use crate::model::transformer::{Append, KindContext, Model};
use crate::{
    AppendLatent, AppendQkv, Attention, AttentionConfig, AttentionPlan, KvCache, QueryKernel, Result, RopeConfig,
    Sinks, Step,
};

/// Attention and rotation of each kind of layer. Kinds share what they have in common.
#[derive(Debug)]
pub(super) struct LayerKernels {
    attentions: Vec<Attention>,
    appends: Vec<Append>,
    /// Which of both each kind takes.
    kinds: Vec<(usize, Option<usize>)>,
    /// Of each layer, if the model has them.
    sinks: Vec<Sinks>,
}

impl LayerKernels {
    /// With `trees` they are for steps that have some.
    pub(super) async fn new(model: &Model, cache: &KvCache, trees: bool) -> ModelResult<Self> {
        let config = model.config();
        let (mut windows, mut ropes): (Vec<Option<u32>>, Vec<&RopeConfig>) = (Vec::new(), Vec::new());
        let kinds = config.layers.kinds().iter().map(|kind| {
            let rope = kind.rope.as_ref().map(|rope| index_of(&mut ropes, rope));
            (index_of(&mut windows, kind.window), rope)
        });
        let kinds = kinds.collect();
        let mut attentions = Vec::with_capacity(windows.len());
        for window in windows {
            let mut attention = AttentionConfig::new(config.num_q_heads);
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
        for rope in ropes {
            let rope = rope.clone();
            appends.push(match config.latent {
                Some(_) => Append::Latent(AppendLatent::new(cache, rope).await?),
                None => Append::Heads(AppendQkv::new(cache, rope, config.num_q_heads, per_head).await?),
            });
        }
        Ok(Self { attentions, appends, kinds, sinks })
    }

    /// Plans a step: one plan for each attention.
    pub(super) fn plan(&self, step: &Step, kernels: Option<&[QueryKernel]>) -> Result<Vec<AttentionPlan>> {
        let plan = |attention: &Attention| match kernels {
            Some(kernels) => attention.plan_with_kernels(step, kernels),
            None => attention.plan(step),
        };
        self.attentions.iter().map(plan).collect()
    }

    /// What layers of each kind take in a step with these plans.
    pub(super) fn contexts<'a>(&'a self, plans: &'a [AttentionPlan]) -> Vec<KindContext<'a>> {
        let context = |&(attention, append): &(usize, Option<usize>)| KindContext {
            attention: &self.attentions[attention],
            plan: &plans[attention],
            append: append.map(|append| &self.appends[append]),
        };
        self.kinds.iter().map(context).collect()
    }

    /// Those of each layer.
    pub(super) fn sinks(&self) -> &[Sinks] {
        &self.sinks
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

//! The settings of a mixture of experts.

use serde_json::Value;

use super::json::Section;
use crate::model::ModelResult;
use crate::model::architecture::Experts;
use crate::model::linear::MAX_IN_FEATURES;
use crate::model::linear_config::{Factor, LinearExperts};
use crate::model::ops::{ActivationKind, RouterConfig, activation::MAX_WIDTH};

/// The layers of a model whose MLP is a mixture of experts, and what is in it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ExpertsConfig {
    /// How many experts there are, and how tokens are sent to them.
    pub router: RouterConfig,
    /// Width of an expert between its two projections.
    pub intermediate_size: u32,
    /// What lies between them.
    pub activation: ActivationKind,
    /// Which layers have experts; the others have an MLP of [`ModelConfig::intermediate_size`](super::ModelConfig::intermediate_size).
    pub layers: ExpertLayers,
}

/// Which layers have experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertLayers {
    /// Those whose number, counted from 1, is a multiple of it.
    every: u32,
    /// None of these, counted from 0 and sorted.
    dense: Vec<u32>,
}

impl ExpertLayers {
    /// Whether this layer has experts.
    #[must_use]
    pub fn contains(&self, layer: u32) -> bool {
        (u64::from(layer) + 1).is_multiple_of(self.every.into()) && self.dense.binary_search(&layer).is_err()
    }
}

/// `intermediate_size` and `activation` are those of the model.
pub(super) fn parse_experts(
    file: &Section<'_>,
    keys: &Experts,
    intermediate_size: u32,
    activation: ActivationKind,
) -> ModelResult<ExpertsConfig> {
    let (names, default) = keys.count;
    let count_key = names.iter().find(|key| file.get(key).is_some()).or(names.first()).copied().unwrap_or_default();
    let count = file.size(count_key)?.unwrap_or(default);
    let (selected_key, default) = keys.selected;
    let per_row = file.size(selected_key)?.unwrap_or(default);
    let mut router = RouterConfig::new(LinearExperts { count, per_row });
    router.scoring = keys.scoring;
    router.renormalise = file.flag(keys.renormalise)?;
    router.validate().map_err(|error| match &error {
        crate::Error::Argument { argument: "experts.count", .. } => file.rule(count_key, error),
        _ => file.rule(selected_key, error),
    })?;
    let intermediate_size = match keys.intermediate_size {
        None => intermediate_size,
        Some((key, default)) => {
            let size = file.size(key)?.unwrap_or(default);
            let max = MAX_IN_FEATURES.min(MAX_WIDTH);
            // A gate is applied in groups of four.
            if size > max || !size.is_multiple_of(4) {
                return Err(file.error(key, size, format!("a multiple of 4, at most {max}")));
            }
            size
        }
    };
    let activation = match keys.clamped_swiglu {
        None => activation,
        Some([alpha, limit]) => {
            let factor = |(key, default)| file.single(key, file.positive(key)?.unwrap_or(default)).map(Factor::new);
            ActivationKind::ClampedSwiglu { alpha: factor(alpha)??, limit: factor(limit)?? }
        }
    };
    let every = match keys.every {
        Some((key, default)) => file.size(key)?.unwrap_or(default),
        None => 1,
    };
    let mut dense = keys.dense.map_or(Ok(None), |key| layers(file, key))?.unwrap_or_default();
    dense.sort_unstable();
    Ok(ExpertsConfig { router, intermediate_size, activation, layers: ExpertLayers { every, dense } })
}

/// A list of layers.
fn layers(file: &Section<'_>, key: &str) -> ModelResult<Option<Vec<u32>>> {
    let layer = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
    file.optional(key, "a list of layers", |value| value.as_array()?.iter().map(layer).collect())
}

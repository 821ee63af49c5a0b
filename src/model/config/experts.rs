//! The settings of a mixture of experts.

use serde_json::Value;

use super::json::Section;
use crate::Error;
use crate::model::architecture::{Experts, GroupKeys};
use crate::model::linear::MAX_IN_FEATURES;
use crate::model::linear_config::{Factor, LinearExperts};
use crate::model::ops::{ActivationKind, ExpertGroups, RouterConfig, activation::MAX_WIDTH};
use crate::model::{ModelError, ModelResult};

/// The layers of a model whose MLP is a mixture of experts, and what is in it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ExpertsConfig {
    /// How many experts there are, and how tokens are sent to them.
    pub router: RouterConfig,
    /// Width of an expert between its two projections.
    pub intermediate_size: u32,
    /// The same of the expert that every token goes to, if there is one.
    pub shared_size: Option<u32>,
    /// What lies between them.
    pub activation: ActivationKind,
    /// Which layers have experts; the others have an MLP of [`ModelConfig::intermediate_size`](super::ModelConfig::intermediate_size).
    pub layers: ExpertLayers,
}

/// Which layers have experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertLayers {
    /// None before this one.
    first: u32,
    /// Those whose number, counted from 1, is a multiple of it.
    every: u32,
    /// None of these, counted from 0 and sorted.
    dense: Vec<u32>,
}

impl ExpertLayers {
    /// Whether this layer has experts.
    #[must_use]
    pub fn contains(&self, layer: u32) -> bool {
        layer >= self.first
            && (u64::from(layer) + 1).is_multiple_of(self.every.into())
            && self.dense.binary_search(&layer).is_err()
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
    let size = |key, default: Option<u32>| {
        default.map_or_else(|| file.needed_size(key), |_| Ok(file.size(key)?.or(default).unwrap_or(1)))
    };
    let count = size(count_key, default)?;
    let (selected_key, default) = keys.selected;
    let per_row = size(selected_key, default)?;
    let group_keys = keys.groups.map_or([count_key; 2], |keys| [keys.count.0, keys.selected.0]);
    let mut router = RouterConfig::new(LinearExperts { count, per_row });
    router.scoring = keys.scoring;
    router.renormalise = file.flag(keys.renormalise)?;
    router.correction = keys.forms.iter().any(|form| form.correction.is_some());
    if let Some((key, default)) = keys.scale {
        router.scale = Factor::new(file.single(key, file.positive(key)?.unwrap_or(default))?)?;
    }
    router.groups = keys.groups.map_or(Ok(None), |keys| groups(file, &keys))?;
    router.validate().map_err(|error| match &error {
        Error::Argument { argument: "experts.count", .. } => file.rule(count_key, error),
        Error::Argument { argument: "groups.count", .. } => file.rule(group_keys[0], error),
        Error::Argument { argument: "groups.selected", .. } => file.rule(group_keys[1], error),
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
    let shared_size = match keys.shared {
        Some((key, default)) => {
            let shared = number(file, key)?.unwrap_or(default);
            let max = MAX_IN_FEATURES.min(MAX_WIDTH);
            let size = intermediate_size.checked_mul(shared).filter(|size| *size <= max);
            let need = || format!("at most {max} together, each {intermediate_size} wide");
            Some(size.ok_or_else(|| file.error(key, shared, need()))?).filter(|size| *size > 0)
        }
        None => None,
    };
    let first = first_layer(file, keys)?;
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
    Ok(ExpertsConfig {
        router,
        intermediate_size,
        shared_size,
        activation,
        layers: ExpertLayers { first, every, dense },
    })
}

fn number(file: &Section<'_>, key: &str) -> ModelResult<Option<u32>> {
    file.optional(key, "an integer of at least 0", |value| value.as_u64().and_then(|n| u32::try_from(n).ok()))
}

/// The first layer that may have experts.
pub(super) fn first_layer(file: &Section<'_>, keys: &Experts) -> ModelResult<u32> {
    keys.first.map_or(Ok(0), |(key, default)| Ok(number(file, key)?.unwrap_or(default)))
}

fn groups(file: &Section<'_>, keys: &GroupKeys) -> ModelResult<Option<ExpertGroups>> {
    if let Some([key, none, some]) = keys.method {
        match file.text(key)?.unwrap_or(none) {
            method if method == some => {}
            method if method == none => return Ok(None),
            other => return Err(file.error(key, other, format!("{none} or {some}"))),
        }
    }
    let size = |(key, default)| Ok::<_, ModelError>(file.size(key)?.unwrap_or(default));
    let groups = ExpertGroups { count: size(keys.count)?, selected: size(keys.selected)?, score: keys.score };
    // One group is no choice.
    Ok(Some(groups).filter(|groups| groups.count > 1 || groups.selected > 1))
}

/// A list of layers.
fn layers(file: &Section<'_>, key: &str) -> ModelResult<Option<Vec<u32>>> {
    let layer = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
    file.optional(key, "a list of layers", |value| value.as_array()?.iter().map(layer).collect())
}

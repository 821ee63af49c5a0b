//! [`CacheLayers`]: layers that keep the same tokens form groups of the cache.

use super::{DecoderOptions, Streaming};
use crate::model::config::ModelConfig;
use crate::{KvCacheConfig, LayerGroup, LayerGroups, MAX_NUM_LAYERS};

/// Where a model's layers are in its cache.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CacheLayers {
    groups: LayerGroups,
    /// Layers of a group.
    group_size: u32,
    /// The layer of the cache for each of the model's, unless they are the same. Others are padding, which nobody writes to.
    places: Vec<u32>,
}

/// What part of a text's memory may be padding of groups, whatever its length, so that there are fewer groups. It gives Gemma 3 27B (52 layers with a
/// window, 10 without) 7 groups of 10 layers, where 5 % would take 13 groups of 5.
const MOST_PADDING: f64 = 1.0 / 7.0;
/// The same of the longest text, for which groups are made: there padding may be layers with a window, but hardly any others. Groups of 11 would have Gemma
/// 3 27B keep an 11th layer for 128 K tokens.
const MOST_PADDING_OF_LONGEST: f64 = 1.0 / 50.0;

/// Layers that keep the same.
#[derive(Clone, Copy, Debug)]
struct Kind {
    keeps: LayerGroup,
    num_layers: u32,
}

impl Kind {
    /// Tokens of a text that each layer keeps.
    fn tokens(&self, len: u32) -> f64 {
        let kept = self.keeps.window.map_or(len, |window| window.saturating_add(self.keeps.sink_tokens).min(len));
        f64::from(kept)
    }

    const fn num_groups(&self, size: u32) -> u32 {
        self.num_layers.div_ceil(size)
    }
}

/// What a layer sees: its window, and whether it sees sink tokens besides.
pub(super) fn seen(window: Option<u32>, streaming: Option<Streaming>) -> (Option<u32>, u32) {
    match (window, streaming) {
        (Some(own), Some(streaming)) if own <= streaming.window => (Some(own), 0),
        (_, Some(streaming)) => (Some(streaming.window), streaming.sink_tokens),
        (window, None) => (window, 0),
    }
}

impl CacheLayers {
    /// In groups, where these save memory.
    pub(super) fn new(options: &DecoderOptions, model: &ModelConfig) -> Self {
        let kinds = kinds(options, model);
        let union = union(options, &kinds);
        // Scales per channel are those of a buffer, which the layers of several groups would share. No cache has more layers.
        let is_alike = kinds.len() == 1 || options.k_format.has_channel_scales();
        if is_alike || model.num_layers > MAX_NUM_LAYERS {
            return Self::one(union, model);
        }
        // A text that streams has no end.
        let longest = if options.streaming.is_some() { u32::MAX } else { model.max_positions };
        let Some(size) = group_size(&kinds, longest) else { return Self::one(union, model) };
        // Padding may take more than the windows save.
        let grouped = kinds.iter().map(|kind| padded(kind, size) * kind.tokens(longest)).sum::<f64>();
        let all = Kind { keeps: union, num_layers: model.num_layers };
        if grouped >= f64::from(model.num_layers) * all.tokens(longest) {
            return Self::one(union, model);
        }
        let groups: Vec<_> =
            kinds.iter().flat_map(|kind| std::iter::repeat_n(kind.keeps, kind.num_groups(size) as usize)).collect();
        let Ok(groups) = LayerGroups::new(&groups) else { return Self::one(union, model) };
        // The next place of each kind.
        let mut next = Vec::with_capacity(kinds.len());
        let mut first_group = 0;
        for kind in &kinds {
            next.push((kind.keeps, first_group * size));
            first_group += kind.num_groups(size);
        }
        let place = |layer| {
            let keeps = kept(options, model, layer);
            let next = next.iter_mut().find(|(kind, _)| *kind == keeps);
            next.map_or(0, |(_, place)| std::mem::replace(place, *place + 1))
        };
        Self { groups, group_size: size, places: (0..model.num_layers).map(place).collect() }
    }

    /// All layers in one group, which keeps what any of them needs.
    pub(super) fn whole(options: &DecoderOptions, model: &ModelConfig) -> Self {
        Self::one(union(options, &kinds(options, model)), model)
    }

    fn one(group: LayerGroup, model: &ModelConfig) -> Self {
        let groups = LayerGroups::one(group);
        Self { groups, group_size: model.num_layers, places: Vec::new() }
    }

    pub(super) fn num_groups(&self) -> u32 {
        self.groups.count()
    }

    /// The layer of the cache for one of the model's.
    pub(super) fn place(&self, layer: u32) -> u32 {
        self.places.get(layer as usize).copied().unwrap_or(layer)
    }

    pub(super) fn cache_config(&self, options: &DecoderOptions, model: &ModelConfig) -> KvCacheConfig {
        let num_layers = self.group_size.saturating_mul(self.num_groups());
        let cache = match &model.latent {
            Some(latent) => KvCacheConfig::latent(num_layers, latent.row_dim(), latent.kv_rank),
            None => KvCacheConfig::new(num_layers, model.num_kv_heads, model.head_dim),
        };
        let num_blocks = options.num_blocks.saturating_mul(self.num_groups());
        cache
            .with_blocks(num_blocks, options.block_size)
            .with_formats(options.k_format, options.v_format)
            .with_groups(self.groups)
    }
}

/// What a layer keeps.
fn kept(options: &DecoderOptions, model: &ModelConfig, layer: u32) -> LayerGroup {
    let (window, sink_tokens) = seen(model.layers.kind(layer).window, options.streaming);
    match window {
        // No text is longer.
        Some(window) if options.streaming.is_none() && (options.keep_all_blocks || window >= model.max_positions) => {
            LayerGroup::ALL
        }
        window => LayerGroup { window, sink_tokens },
    }
}

/// The kinds in the order of their first layers.
fn kinds(options: &DecoderOptions, model: &ModelConfig) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = Vec::new();
    // The pattern has repeated by then.
    for layer in 0..model.num_layers.min(MAX_NUM_LAYERS) {
        let keeps = kept(options, model, layer);
        match kinds.iter_mut().find(|kind| kind.keeps == keeps) {
            Some(kind) => kind.num_layers += 1,
            None => kinds.push(Kind { keeps, num_layers: 1 }),
        }
    }
    kinds
}

/// What layers of all kinds together keep.
fn union(options: &DecoderOptions, kinds: &[Kind]) -> LayerGroup {
    if let Some(Streaming { window, sink_tokens }) = options.streaming {
        return LayerGroup { window: Some(window), sink_tokens };
    }
    let widest = kinds.iter().try_fold(0, |widest, kind| Some(kind.keeps.window?.max(widest)));
    widest.map_or(LayerGroup::ALL, LayerGroup::windowed)
}

/// Layers that a kind takes in groups of this size.
fn padded(kind: &Kind, size: u32) -> f64 {
    f64::from(kind.num_groups(size)) * f64::from(size)
}

/// The part of a text's memory that is padding.
fn padding(kinds: &[Kind], size: u32, len: u32) -> f64 {
    let sum = |of: &dyn Fn(&Kind) -> f64| kinds.iter().map(|kind| of(kind) * kind.tokens(len)).sum::<f64>();
    1.0 - sum(&|kind| kind.num_layers.into()) / sum(&|kind| padded(kind, size))
}

/// The largest part of texts of up to `longest` tokens.
fn most_padding(kinds: &[Kind], size: u32, longest: u32) -> f64 {
    // What a kind keeps grows with the text until that is as long as its window. In between the part is between those at both ends.
    let kept = |kind: &Kind| Some(kind.keeps.window?.saturating_add(kind.keeps.sink_tokens));
    let ends = kinds.iter().filter_map(kept).chain([1, longest]);
    ends.map(|len| padding(kinds, size, len.clamp(1, longest.max(1)))).fold(0.0, f64::max)
}

/// How many layers a group has: as many as make the fewest groups with little padding, or, if all sizes have much, those with the least. `None` if
/// there would be too many groups whatever their size.
fn group_size(kinds: &[Kind], longest: u32) -> Option<u32> {
    if kinds.len() > LayerGroups::MAX as usize {
        return None;
    }
    let most = kinds.iter().map(|kind| kind.num_layers).max().unwrap_or(1);
    let of = |size| {
        let num_groups = kinds.iter().map(|kind| kind.num_groups(size)).fold(0, u32::saturating_add);
        (num_groups <= LayerGroups::MAX).then(|| (size, num_groups, most_padding(kinds, size, longest)))
    };
    let sizes: Vec<_> = (1..=most).filter_map(of).collect();
    let is_good = |&&(size, _, part): &&(u32, u32, f64)| {
        part <= MOST_PADDING && padding(kinds, size, longest) <= MOST_PADDING_OF_LONGEST
    };
    // Of as many groups the first, smaller ones have less padding.
    let good = sizes.iter().filter(is_good).min_by_key(|(_, num_groups, _)| *num_groups);
    good.or_else(|| sizes.iter().min_by(|a, b| a.2.total_cmp(&b.2))).map(|&(size, ..)| size)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// Layers with and without a window, positions; groups and layers of each.
    #[test]
    fn groups_of_well_known_models_waste_little() {
        for (name, counts, window, longest, groups) in [
            ("Gemma 2 2B", [13, 13], 4096, 8192, (2, 13)),
            ("Gemma 2 27B", [23, 23], 4096, 8192, (2, 23)),
            ("Gemma 3 270M", [15, 3], 512, 32_768, (6, 3)),
            ("Gemma 3 1B", [22, 4], 512, 32_768, (7, 4)),
            ("Gemma 3 4B", [29, 5], 1024, 131_072, (7, 5)),
            ("Gemma 3 12B", [40, 8], 1024, 131_072, (6, 8)),
            ("Gemma 3 27B", [52, 10], 1024, 131_072, (7, 10)),
            ("gpt-oss 20B", [12, 12], 128, 131_072, (2, 12)),
            ("gpt-oss 120B", [18, 18], 128, 131_072, (2, 18)),
            ("OLMo 3 7B", [24, 8], 4096, 65_536, (4, 8)),
        ] {
            let kinds = [
                Kind { keeps: LayerGroup::windowed(window), num_layers: counts[0] },
                Kind { keeps: LayerGroup::ALL, num_layers: counts[1] },
            ];
            let size = group_size(&kinds, longest).unwrap();
            let num_groups: u32 = kinds.iter().map(|kind| kind.num_groups(size)).sum();
            assert_eq!((num_groups, size), groups, "{name}");
            assert!(most_padding(&kinds, size, longest) <= MOST_PADDING, "{name}");
            // All padding is layers with a window.
            assert!((padded(&kinds[1], size) - f64::from(counts[1])).abs() < 1e-9, "{name}");
        }
    }

    #[test]
    fn many_kinds_have_few_groups_or_one() {
        let kind = |window, num_layers| Kind { keeps: LayerGroup::windowed(window), num_layers };
        // A layer alone among many: groups of 3 have 36 layers of 32.
        let size = group_size(&[kind(100, 31), kind(5000, 1)], 10_000).unwrap();
        assert!(size >= 3);
        let kinds: Vec<_> = (1..=20).map(|window| kind(window, 1)).collect();
        assert_eq!(group_size(&kinds, 10_000), None);
        assert_eq!(group_size(&kinds[..16], 10_000), Some(1));
    }
}

//! What differs from layer to layer.

use serde_json::Value;

use super::json::Section;
use crate::RopeConfig;
use crate::model::architecture::{Flag, Window, WindowedLayers};
use crate::model::{ModelError, ModelResult};

/// A pattern repeats after at most as many layers: no list in a file is as long, and what a number asks for stays small.
const MAX_PERIOD: u32 = 1 << 16;

/// What layers may differ in.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerKind {
    /// How queries and keys are rotated. `None`: not at all.
    pub rope: Option<RopeConfig>,
    /// Each query sees the newest `w` keys, its own included. `None`: all of them.
    pub window: Option<u32>,
}

impl LayerKind {
    /// A layer with these.
    #[must_use]
    pub const fn new(rope: Option<RopeConfig>, window: Option<u32>) -> Self {
        Self { rope, window }
    }
}

/// The kind of each layer. The pattern repeats: layer `i` is of the kind that stands at `i` modulo its length.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerPattern {
    /// Each kind once; never empty.
    kinds: Vec<LayerKind>,
    /// Indices of `kinds`; never empty.
    pattern: Vec<usize>,
}

impl LayerPattern {
    /// All layers of one kind.
    #[must_use]
    pub fn uniform(kind: LayerKind) -> Self {
        Self { kinds: vec![kind], pattern: vec![0] }
    }

    /// Layers of these kinds, in this order, and again from the start.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if there is none.
    pub fn repeated(layers: impl IntoIterator<Item = LayerKind>) -> ModelResult<Self> {
        let (mut kinds, mut pattern) = (Vec::new(), Vec::new());
        for layer in layers {
            let known = kinds.iter().position(|kind| *kind == layer);
            pattern.push(known.unwrap_or(kinds.len()));
            if known.is_none() {
                kinds.push(layer);
            }
        }
        if kinds.len() == 1 {
            pattern.truncate(1);
        }
        if kinds.is_empty() {
            Err(ModelError::argument("layers", "none", "at least one"))
        } else {
            Ok(Self { kinds, pattern })
        }
    }

    /// The kinds, each once.
    #[must_use]
    pub fn kinds(&self) -> &[LayerKind] {
        &self.kinds
    }

    /// Changes every kind.
    pub(crate) fn for_each_kind(&mut self, mut change: impl FnMut(&mut LayerKind)) {
        self.kinds.iter_mut().for_each(&mut change);
    }

    /// Which of [`LayerPattern::kinds`] a layer is.
    #[must_use]
    pub fn index(&self, layer: u32) -> usize {
        let at = layer as usize % self.pattern.len().max(1);
        self.pattern.get(at).copied().unwrap_or(0)
    }

    /// The kind of a layer.
    #[must_use]
    pub fn kind(&self, layer: u32) -> &LayerKind {
        &self.kinds[self.index(layer)]
    }
}

/// Which layers are rotated, as a pattern that repeats. `keys` are those of [`RopeKeys::skipped`](crate::model::architecture::RopeKeys).
pub(super) fn rotated_layers(
    file: &Section<'_>,
    keys: Option<(&'static str, &'static str, u32)>,
    num_layers: u32,
) -> ModelResult<Vec<bool>> {
    let Some((list, interval, default)) = keys else { return Ok(vec![true]) };
    if let Some(flags) = file.optional(list, "a list", Value::as_array)? {
        let flag = |value: &Value| value.as_u64().filter(|n| *n <= 1).map(|n| n == 1);
        let flags: Option<Vec<_>> = flags.iter().map(flag).collect();
        // As in transformers it may be longer.
        let flags = flags.filter(|flags| flags.len() >= num_layers as usize);
        let mut flags = flags.ok_or_else(|| file.wrong(list, &format!("0 or 1 for each of {num_layers} layers")))?;
        flags.truncate(num_layers as usize);
        return Ok(flags);
    }
    let every = file.size(interval)?.unwrap_or(default);
    every_but_last(file, interval, every)
}

/// True but for the last of `every` layers.
fn every_but_last(file: &Section<'_>, key: &str, every: u32) -> ModelResult<Vec<bool>> {
    if every > MAX_PERIOD {
        return Err(file.error(key, every, format!("at most {MAX_PERIOD}")));
    }
    Ok((1..=every).map(|layer| layer != every).collect())
}

/// Layers with their windows. `rotated` is a pattern of those that have `rope`; those with a window have `windowed_rope`, if there is one.
pub(super) fn parse_windows(
    file: &Section<'_>,
    window: Option<Window>,
    num_layers: u32,
    rotated: &[bool],
    rope: Option<RopeConfig>,
    windowed_rope: Option<RopeConfig>,
) -> ModelResult<LayerPattern> {
    let (size, windowed) = match window {
        None => (None, vec![false]),
        Some(window) => windowed_layers(file, window, num_layers, rotated)?,
    };
    let (a, b) = (rotated.len() as u64, windowed.len() as u64);
    // Beyond the last layer nothing repeats.
    let period = if a == b { a } else { a * b }.min(num_layers.into());
    let kinds = [false, true].map(|rotated| {
        [false, true].map(|windowed| {
            let rope = windowed_rope.as_ref().filter(|_| windowed).or(rope.as_ref()).filter(|_| rotated);
            LayerKind::new(rope.cloned(), size.filter(|_| windowed))
        })
    });
    let at =
        |list: &[bool], layer: u64| list.get((layer % list.len().max(1) as u64) as usize).copied().unwrap_or(false);
    LayerPattern::repeated((0..period).map(|layer| {
        let [rotated, windowed] = [at(rotated, layer), at(&windowed, layer)];
        kinds[usize::from(rotated)][usize::from(windowed)].clone()
    }))
}

/// The size of the window, and which layers have it, as a pattern that repeats.
fn windowed_layers(
    file: &Section<'_>,
    window: Window,
    num_layers: u32,
    rotated: &[bool],
) -> ModelResult<(Option<u32>, Vec<bool>)> {
    let nowhere = Ok((None, vec![false]));
    if let Some(switch) = window.switch
        && !file.flag(Flag::Key(switch, false))?
    {
        return nowhere;
    }
    let size = file.optional_size(window.size)?;
    if let WindowedLayers::All = window.layers {
        return Ok((size, vec![true]));
    }
    if let Some(types) = file.optional("layer_types", "a list", Value::as_array)? {
        let windowed = |t: &Value| match t.as_str() {
            Some("sliding_attention") => Some(true),
            Some("full_attention") => Some(false),
            _ => None,
        };
        let types: Option<Vec<bool>> = types.iter().map(windowed).collect();
        let types = types.filter(|types| types.len() == num_layers as usize).ok_or_else(|| {
            file.wrong("layer_types", &format!("sliding_attention or full_attention for each of {num_layers} layers"))
        })?;
        return Ok((size, types));
    }
    let layers = match window.layers {
        WindowedLayers::All => vec![true],
        WindowedLayers::From(key, default) => {
            let first = file.optional(key, "an integer of at least 0", Value::as_u64)?.unwrap_or(default.into());
            match u32::try_from(first) {
                Ok(0) => vec![true],
                Ok(first) if first < num_layers && num_layers <= MAX_PERIOD => {
                    (0..num_layers).map(|layer| layer >= first).collect()
                }
                Ok(first) if first < num_layers => {
                    return Err(file.error(key, first, format!("0, or at least the number of layers, {num_layers}")));
                }
                _ => return nowhere,
            }
        }
        WindowedLayers::WithoutRope => rotated.iter().map(|rotated| !rotated).collect(),
        WindowedLayers::AllBut(key, default) => {
            let every = key.map_or(Ok(None), |key| file.size(key))?.unwrap_or(default);
            every_but_last(file, key.unwrap_or("num_hidden_layers"), every)?
        }
    };
    Ok((size, layers))
}

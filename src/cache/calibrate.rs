//! Scales per channel: fixed by a calibration over given keys, kept per layer, KV head and channel.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::KvCache;
use crate::error::{Error, Result};
use crate::layout::KvCacheConfig;

/// Largest magnitude that formats with scales keep: bits 0x7f7b of a bfloat16. The widest row then has finite values, whatever is rounded.
const LARGEST: f64 = 1.960_937_5 * 170_141_183_460_469_231_731_687_303_715_884_105_728.0;
/// Smallest scale that isn't 0, 2^-118: half of it stays clear of the subnormal numbers, which adapters may flush.
const MIN_SCALE: f64 = 1.0 / 332_306_998_946_228_968_225_951_765_070_086_144.0;

/// The tables of all layers, as they are on the GPU.
#[derive(Debug)]
pub(super) struct KeyScales(Mutex<Vec<Option<Arc<[f32]>>>>);

impl KeyScales {
    pub(super) fn new(num_layers: u32) -> Self {
        Self(Mutex::new(vec![None; num_layers as usize]))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Arc<[f32]>>>> {
        // A slot is written in one assignment, so a panic elsewhere leaves nothing half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Scales, then zero points, `[2, num_kv_heads, head_dim]`, such that the codes 0 to `levels` cover what each channel has in `keys`.
fn table_of(keys: &[f32], channels: usize, levels: f64) -> Vec<f32> {
    let mut ranges = vec![(f64::INFINITY, f64::NEG_INFINITY); channels];
    for token in keys.chunks_exact(channels) {
        for ((min, max), &key) in ranges.iter_mut().zip(token) {
            let key = f64::from(key).clamp(-LARGEST, LARGEST);
            (*min, *max) = (min.min(key), max.max(key));
        }
    }
    // A channel that never changes has scale 0, and always its one value.
    let scale = |&(min, max): &(f64, f64)| if max > min { ((max - min) / levels).max(MIN_SCALE) } else { 0.0 };
    ranges.iter().map(|range| scale(range) as f32).chain(ranges.iter().map(|range| range.0 as f32)).collect()
}

impl KvCache {
    /// Fixes the scales of a layer's keys, in formats with scales per channel: each channel's range in `keys` becomes the range of its codes.
    /// Keys outside it are stored as its nearest end, a channel that never changes in `keys` keeps its one value, and NaN is
    /// stored as some number of the range.
    ///
    /// `keys`: f32 `[num_tokens, num_kv_heads, head_dim]` as they will be appended, that is after the rotary embedding if the model has one.
    /// Some hundred tokens of typical text are enough.
    ///
    /// The scales hold for all sequences, outlive [`clear`](Self::clear), and may be fixed anew while nothing is cached. **Writes** to the
    /// device's queue; the next submit sees them.
    ///
    /// # Errors
    /// [`Error::Argument`] for a format without scales per channel, a layer that isn't there, no keys, a part of a token, keys that aren't
    /// finite, or while there are tokens, open steps or indexed prefixes in the cache: their codes would change their meaning.
    pub fn calibrate_keys(&self, layer: u32, keys: &[f32]) -> Result<()> {
        self.check_channel_scales()?;
        let config = self.config();
        let channels = channels(config);
        if keys.is_empty() || !keys.len().is_multiple_of(channels) {
            let got = format!("{} elements", keys.len());
            return Err(Error::argument("keys", got, format!("whole tokens of {channels} elements, at least one")));
        }
        check_finite("keys", keys)?;
        let levels = f64::from((1_u32 << config.k_format.element_bits()) - 1);
        self.write_key_scales(layer, table_of(keys, channels, levels).into())
    }

    /// The scales of a layer's keys, f32 `[2, num_kv_heads, head_dim]`: scales, then zero points. `None` before they are fixed, in
    /// formats without scales per channel, and for a layer that isn't there.
    #[must_use]
    pub fn key_scales(&self, layer: u32) -> Option<Arc<[f32]>> {
        self.key_scales.lock().get(layer as usize)?.clone()
    }

    /// Fixes the scales of a layer's keys as another cache had them: `table` as [`key_scales`](Self::key_scales) returns it.
    ///
    /// # Errors
    /// Those of [`calibrate_keys`](Self::calibrate_keys), and [`Error::Argument`] for a scale below 0.
    pub fn set_key_scales(&self, layer: u32, table: &[f32]) -> Result<()> {
        self.check_channel_scales()?;
        let channels = channels(self.config());
        if table.len() != 2 * channels {
            let got = format!("{} elements", table.len());
            return Err(Error::argument("table", got, format!("a scale and a zero point of {channels} channels")));
        }
        check_finite("table", table)?;
        if let Some(scale) = table[..channels].iter().find(|&&scale| scale < 0.0) {
            return Err(Error::argument("table", format!("scale {scale}"), "scales of at least 0"));
        }
        self.write_key_scales(layer, table.into())
    }

    /// Fails for a layer whose keys can't be stored yet.
    pub(super) fn check_calibrated(&self, layer: u32) -> Result<()> {
        if !self.config().k_format.has_channel_scales() || self.key_scales(layer).is_some() {
            return Ok(());
        }
        let got = format!("{layer}, whose keys have no scales yet");
        Err(Error::argument("layer", got, "a layer that calibrate_keys or set_key_scales was called for"))
    }

    fn check_channel_scales(&self) -> Result<()> {
        let format = self.config().k_format;
        if format.has_channel_scales() {
            return Ok(());
        }
        Err(Error::argument("k_format", format, "a format with scales per channel"))
    }

    fn write_key_scales(&self, layer: u32, table: Arc<[f32]>) -> Result<()> {
        let storage = self.layer(layer)?;
        // Held to the end, so that no step begins in between.
        let state = self.state();
        if !state.is_empty() {
            return Err(Error::argument("layer", format!("{layer}, with keys of the old scales"), "an empty cache"));
        }
        let place = storage.k.channel_table();
        let write = || self.gpu().queue().write_buffer(place.buffer(), place.offset(), bytemuck::cast_slice(&table));
        self.gpu().scoped_now("writing key scales", write)?;
        if let Some(slot) = self.key_scales.lock().get_mut(layer as usize) {
            *slot = Some(table);
        }
        drop(state);
        Ok(())
    }
}

/// Channels of a layer: those of all KV heads.
fn channels(config: &KvCacheConfig) -> usize {
    config.num_kv_heads as usize * config.head_dim as usize
}

fn check_finite(argument: &'static str, values: &[f32]) -> Result<()> {
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(Error::argument(argument, format!("{} at {at}", values[at]), "finite numbers")),
        None => Ok(()),
    }
}

//! What a GGUF file says of its model, as an [`Architecture`] whose names are those of the format: the table of Hugging Face's names says which parts
//! there are.

use super::super::architecture::{Architecture, LinearWeights, ModelWeights, TensorSource};
use super::super::config::{ModelConfig, Section, parse_as};
use super::super::{ModelResult, Piece};
use super::known::{DIMENSIONS, Known, ROPE_FACTORS};
use super::reader::Header;
use super::settings::{Settings, divisors};
use crate::RopeScaling;

/// What a file says of its model.
pub(crate) struct Described {
    pub(crate) config: ModelConfig,
    /// With the names of the file.
    pub(crate) architecture: Architecture,
    /// Whether [`undo_interleaving`] is to be called.
    pub(crate) interleaved: bool,
}

/// # Errors
/// [`ModelError::Config`](super::super::ModelError::Config) for a setting that is missing, wrong or not supported;
/// [`ModelError::Tensor`](super::super::ModelError::Tensor) for divisors of frequencies that are.
pub(crate) fn describe(header: &Header) -> ModelResult<Described> {
    let (known, table) = Known::find(header)?;
    let architecture = known.architecture(table, header);
    let settings = Settings { header, known, architecture: &architecture };
    let map = settings.map()?;
    let section = Section::new(&header.path, format!("{}.", known.name), &map);
    let mut config = parse_as(&architecture, &section, None)?;
    if known.interleaved
        && let Some(rope) = &config.layers.kind(0).rope
        && rope.rotary_dim != config.head_dim
    {
        let need = format!("{}, the whole head, whose rows are interleaved", config.head_dim);
        return Err(header.error(&settings.key(DIMENSIONS), rope.rotary_dim, need));
    }
    divide_frequencies(header, &mut config)?;
    Ok(Described { config, architecture, interleaved: known.interleaved })
}

/// Applies the divisors of frequencies, which stand for the scaling of Llama 3.1 and others.
fn divide_frequencies(header: &Header, config: &mut ModelConfig) -> ModelResult<()> {
    if !header.tensors.contains_key(ROPE_FACTORS) {
        return Ok(());
    }
    let ropes = config.layers.kinds().iter().filter_map(|kind| kind.rope.as_ref());
    let Some(pairs) = ropes.map(|rope| rope.rotary_dim as usize / 2).next() else { return Ok(()) };
    // All kinds of layers rotate as much of a head.
    let divisors = divisors(header, ROPE_FACTORS, pairs)?;
    config.layers.for_each_kind(|kind| {
        if let Some(rope) = &mut kind.rope {
            let frequencies = rope.inverse_frequencies();
            let divided = frequencies.iter().zip(&divisors).map(|(f, divisor)| f / f64::from(*divisor));
            let (inverse_frequencies, attention_factor) = (divided.collect(), rope.attention_factor());
            rope.scaling = RopeScaling::Custom { inverse_frequencies, attention_factor };
        }
    });
    // Latents are checked with the rows of the cache that they lie in.
    if config.latent.is_none() {
        let mut ropes = config.layers.kinds().iter().filter_map(|kind| kind.rope.as_ref());
        ropes.try_for_each(|rope| rope.validate(config.head_dim))?;
    }
    Ok(())
}

/// Turns rows of queries and keys back to Hugging Face's order. Converters of Llama put element `i` of a head's first half at row `2 i`, and element `i` of
/// its second half at row `2 i + 1`, because llama.cpp rotates neighbours.
pub(crate) fn undo_interleaving(weights: &mut ModelWeights, head_dim: usize) {
    for layer in &mut weights.layers {
        for LinearWeights { weight, bias } in [&mut layer.q, &mut layer.k] {
            split_halves(weight, head_dim);
            bias.iter_mut().for_each(|bias| split_halves(bias, head_dim));
        }
    }
}

fn split_halves(source: &mut TensorSource, head_dim: usize) {
    let halves = |piece: &Piece| {
        let firsts = (piece.first..piece.first + piece.rows).step_by(head_dim);
        let half = |first| Piece { rows: head_dim / 2, first, run: 1, stride: 2, ..piece.clone() };
        firsts.flat_map(|first| [half(first), half(first + 1)]).collect::<Vec<_>>()
    };
    source.pieces = source.pieces.iter().flat_map(halves).collect();
}

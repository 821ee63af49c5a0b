//! RoPE's settings.

use super::json::{Section, brief};
use crate::model::architecture::{Flag, RopeKeys};
use crate::model::{ModelError, ModelResult};
use crate::{RopeConfig, RopeScaling};

/// The length that a model was first trained on.
const ORIGINAL: &str = "original_max_position_embeddings";

/// The rotations of a model's layers.
pub(super) struct Ropes {
    pub(super) own: RopeConfig,
    /// That of layers with a window, where it differs.
    pub(super) windowed: Option<RopeConfig>,
    /// The one in place of `own` for texts beyond as many tokens.
    pub(super) long: Option<(RopeConfig, u32)>,
}

/// Frequencies by LongRoPE ([Ding et al. 2024](https://arxiv.org/abs/2402.13753)): a factor for each pair, one list up to the original length,
/// another beyond.
struct LongRope {
    short: Vec<f64>,
    long: Vec<f64>,
    attention_factor: f64,
    original_max_position: u32,
}

enum Scaling {
    Plain(RopeScaling),
    Long(LongRope),
}

/// The settings of scaling, where one set holds for all layers.
pub(super) fn scaling_section<'a>(file: &Section<'a>) -> ModelResult<Option<Section<'a>>> {
    let older = file.object("rope_scaling")?.filter(|section| !section.object.is_empty());
    if older.is_some() { Ok(older) } else { file.object("rope_parameters") }
}

/// transformers 5 writes the settings to `rope_parameters`, versions before it to `rope_scaling` and to top-level settings. Where layers with a
/// window have a base of their own, `rope_parameters` holds an object for each of both.
pub(super) fn parse_rope(
    file: &Section<'_>,
    keys: &RopeKeys,
    head_dim: u32,
    max_position_embeddings: u32,
) -> ModelResult<Ropes> {
    // A setting within the section comes first, then the top-level names.
    let theta = |section: Option<&Section<'_>>, top: &[&str], default| {
        find(file, section, "rope_theta", top, &|s, key| s.number(key, "a number above 1", |n| n > 1.0))
            .map(|theta| theta.unwrap_or(default))
    };
    let Some((windowed_key, windowed_default)) = keys.windowed_theta else {
        let section = scaling_section(file)?;
        let theta = theta(section.as_ref(), keys.theta, keys.default_theta)?;
        return with_theta(file, section.as_ref(), keys, theta, head_dim, max_position_embeddings);
    };
    let parameters = file.object("rope_parameters")?;
    let older = file.object("rope_scaling")?.filter(|section| !section.object.is_empty());
    let of_kind = |kind| parameters.as_ref().map_or(Ok(None), |parameters| parameters.object(kind));
    if let Some(parameters) = &parameters {
        let known = ["full_attention", "sliding_attention"];
        if let Some((key, value)) = parameters.object.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            return Err(parameters.error(key, brief(value), "nothing but full_attention and sliding_attention"));
        }
    }
    let (full, windowed) = (of_kind("full_attention")?, of_kind("sliding_attention")?);
    let older_with_theta = older.as_ref().filter(|section| section.get("rope_theta").is_some());
    let own_theta = theta(older_with_theta.or(full.as_ref()), keys.theta, keys.default_theta)?;
    let windowed_theta = theta(windowed.as_ref(), &[windowed_key], windowed_default)?;
    let section = older.or(full);
    let mut ropes = with_theta(file, section.as_ref(), keys, own_theta, head_dim, max_position_embeddings)?;
    let windowed = with_theta(file, windowed.as_ref(), keys, windowed_theta, head_dim, max_position_embeddings)?;
    if let (None, Some((_, original))) | (Some((_, original)), _) = (&windowed.long, &ropes.long) {
        return Err(file.error(ORIGINAL, original, "no longrope beside a base for layers with a window"));
    }
    ropes.windowed = Some(windowed.own);
    Ok(ropes)
}

/// A setting of the section, or else at the top.
fn find(
    file: &Section<'_>,
    section: Option<&Section<'_>>,
    key: &str,
    top: &[&str],
    read: &dyn Fn(&Section<'_>, &str) -> ModelResult<Option<f64>>,
) -> ModelResult<Option<f64>> {
    if let Some(value) = section.map_or(Ok(None), |section| read(section, key))? {
        return Ok(Some(value));
    }
    for key in top {
        if let Some(value) = read(file, key)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn with_theta(
    file: &Section<'_>,
    section: Option<&Section<'_>>,
    keys: &RopeKeys,
    theta: f64,
    head_dim: u32,
    max_position_embeddings: u32,
) -> ModelResult<Ropes> {
    let need = "a number above 0, at most 1";
    let read_partial = |s: &Section<'_>, key: &str| s.number(key, need, |n| n > 0.0 && n <= 1.0);
    let partial = find(file, section, "partial_rotary_factor", keys.partial, &read_partial)?;
    let partial = partial.unwrap_or(keys.default_partial);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to head_dim, rounded as by transformers"
    )]
    let rotary_dim = (f64::from(head_dim) * partial) as u32;
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        let key = keys.partial.first().copied().unwrap_or("partial_rotary_factor");
        let got = format!("{partial} of a head of {head_dim}, {rotary_dim} dimensions");
        return Err(file.error(key, got, "an even number of rotated dimensions, at least 2"));
    }
    if keys.needs_scaling && section.is_none_or(|s| s.get("rope_type").or(s.get("type")).is_none()) {
        return Err(file.error("rope_scaling", "nothing", "the scaling of the rotary embedding, with its rope_type"));
    }
    let scaling = match section {
        Some(section) => parse_scaling(file, section, keys, rotary_dim, max_position_embeddings)?,
        None => Scaling::Plain(RopeScaling::None),
    };
    let rope = |scaling| {
        let rope = RopeConfig { scaling, ..RopeConfig::new(rotary_dim, theta) };
        rope.validate(head_dim).map_err(|e| file.rule("rope_scaling", e))?;
        Ok::<_, ModelError>(rope)
    };
    let long = match scaling {
        Scaling::Plain(scaling) => return Ok(Ropes { own: rope(scaling)?, windowed: None, long: None }),
        Scaling::Long(long) => long,
    };
    let divided = |factors: Vec<f64>| {
        let plain = RopeConfig::new(rotary_dim, theta).inverse_frequencies();
        let inverse_frequencies = plain.into_iter().zip(factors).map(|(f, factor)| f / factor).collect();
        rope(RopeScaling::Custom { inverse_frequencies, attention_factor: long.attention_factor })
    };
    let (own, beyond) = (divided(long.short)?, divided(long.long)?);
    let is_longer = max_position_embeddings > long.original_max_position;
    Ok(Ropes { own, windowed: None, long: is_longer.then_some((beyond, long.original_max_position)) })
}

fn parse_scaling(
    file: &Section<'_>,
    section: &Section<'_>,
    keys: &RopeKeys,
    rotary_dim: u32,
    max_position_embeddings: u32,
) -> ModelResult<Scaling> {
    const KNOWN: &str = "one of default, linear, dynamic, yarn, longrope, llama3";
    if let Some((key, value)) = section.object.iter().find(|(_, value)| value.is_object()) {
        let need = "one set of settings for all layers; settings per kind of layer are not supported";
        return Err(section.error(key, brief(value), need));
    }
    let (key, kind) = match section.text("rope_type")? {
        Some(kind) => ("rope_type", kind),
        None => ("type", section.text("type")?.unwrap_or("default")),
    };
    let given_original = || -> ModelResult<Option<u32>> {
        // The top-level one comes first, as in transformers.
        match file.size(ORIGINAL)? {
            Some(original) => Ok(Some(original)),
            None => section.size(ORIGINAL),
        }
    };
    let original = || Ok::<_, ModelError>(given_original()?.unwrap_or(max_position_embeddings));
    if kind == "longrope" || keys.long_names.contains(&kind) {
        let need = "an integer from 1 to 2147483647";
        let original_max_position = given_original()?.ok_or_else(|| file.error(ORIGINAL, "nothing", need))?;
        let pairs = (rotary_dim / 2) as usize;
        let (short, long) = (section.factors("short_factor", pairs)?, section.factors("long_factor", pairs)?);
        let length = f64::from(original_max_position);
        let factor = match section.get("factor") {
            None => f64::from(max_position_embeddings) / length,
            Some(_) => section.factor("factor")?,
        };
        let attention_factor = match section.positive("attention_factor")? {
            Some(factor) => factor,
            None if factor <= 1.0 => 1.0,
            None if original_max_position == 1 => {
                return Err(file.error(ORIGINAL, 1, "at least 2, or an attention_factor"));
            }
            // The paper's.
            None => (1.0 + factor.ln() / length.ln()).sqrt(),
        };
        return Ok(Scaling::Long(LongRope { short, long, attention_factor, original_max_position }));
    }
    Ok(Scaling::Plain(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: section.factor("factor")? },
        "dynamic" => {
            // transformers stretches the frequencies only beyond `max_position_embeddings`, where `max_positions` ends.
            section.factor("factor")?;
            RopeScaling::None
        }
        "yarn" => {
            let original_max_position = original()?;
            let factor = match section.get("factor") {
                None => f64::from(max_position_embeddings) / f64::from(original_max_position),
                Some(_) => section.factor("factor")?,
            };
            if factor < 1.0 {
                let need = format!("at most max_position_embeddings, which is {max_position_embeddings}");
                return Err(section.error(ORIGINAL, original_max_position, need));
            }
            let beta_fast = section.positive("beta_fast")?.unwrap_or(32.0);
            let beta_slow = section.positive("beta_slow")?.unwrap_or(1.0);
            if beta_fast <= beta_slow {
                return Err(section.error(
                    "beta_fast",
                    beta_fast,
                    format!("more than beta_slow, which is {beta_slow}"),
                ));
            }
            let attention_factor = match section.positive("attention_factor")? {
                Some(factor) => Some(factor),
                None => {
                    // The paper's `0.1 ln(factor) + 1`, as a quotient of two if the file weighs both.
                    let attention = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
                    let scale = |key| section.number(key, "a number of at least 0", |n| n >= 0.0);
                    match (scale("mscale")?, scale("mscale_all_dim")?) {
                        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => Some(attention(m) / attention(all)),
                        _ => None,
                    }
                }
            };
            RopeScaling::Yarn {
                factor,
                original_max_position,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale: None,
                mscale_all_dim: None,
                truncate: section.flag(Flag::Key("truncate", true))?,
            }
        }
        "llama3" => {
            let needed = |key| section.positive(key)?.ok_or_else(|| section.error(key, "nothing", "a number above 0"));
            let (low_freq_factor, high_freq_factor) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                let need = format!("more than low_freq_factor, which is {low_freq_factor}");
                return Err(section.error("high_freq_factor", high_freq_factor, need));
            }
            RopeScaling::Llama3 {
                factor: section.factor("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position: original()?,
            }
        }
        other => return Err(section.error(key, other, KNOWN)),
    }))
}

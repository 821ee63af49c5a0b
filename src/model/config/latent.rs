//! Latents of keys and values (MLA).

use super::json::Section;
use crate::layout::MAX_HEAD_DIM;
use crate::model::ModelResult;
use crate::model::architecture::{Flag, LatentKeys};
use crate::model::linear::MAX_IN_FEATURES;
use crate::{RopeConfig, RopeLayout};

/// The norms of latents have this whatever `rms_norm_eps` says: transformers makes them without it, and it is the default of its norms.
const LATENT_NORM_EPS: f32 = 1e-6;

/// Multi-head latent attention (DeepSeek-V2, Liu et al. 2024, section 2.1): keys and values of all heads are projections of one latent per token,
/// beside which some rotated elements are shared by all heads. The cache holds the latents; see
/// [`KvCacheConfig::latent`](crate::KvCacheConfig::latent).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LatentConfig {
    /// Width of the latent that queries are projected from. `None`: they are projected from the residual stream.
    pub q_rank: Option<u32>,
    /// Width of the latent of keys and values.
    pub kv_rank: u32,
    /// Elements of a head's query, behind the others, and of the keys of all heads, that are rotated.
    pub rope_dim: u32,
    /// Elements of a head's value.
    pub value_dim: u32,
    /// Added to the mean square in the norms of latents.
    pub norm_eps: f32,
}

impl LatentConfig {
    /// Elements of a row of the cache, and of an absorbed query: the latent and the rotated ones.
    #[must_use]
    pub fn row_dim(&self) -> u32 {
        self.kv_rank + self.rope_dim
    }
}

/// What `config.json` says of latents.
pub(super) struct Latents {
    pub(super) config: LatentConfig,
    /// Elements of a head's query and key.
    pub(super) head_dim: u32,
    layout: RopeLayout,
}

impl Latents {
    pub(super) fn parse(file: &Section<'_>, keys: &LatentKeys, [q_heads, kv_heads]: [u32; 2]) -> ModelResult<Self> {
        let size = |(key, default): (&'static str, u32), multiple: u32, most: u32| {
            let size = file.size(key)?.unwrap_or(default);
            let fits = size.is_multiple_of(multiple) && size <= most;
            let need = || format!("a multiple of {multiple}, at most {most}");
            if fits { Ok(size) } else { Err(file.error(key, size, need())) }
        };
        // Rows of the cache are rotated from a multiple of 8 on, and are a multiple of 8 long. Linear layers write parts of a multiple of 4.
        let kv_rank = size(keys.kv_rank, 8, MAX_HEAD_DIM - 8)?;
        let rope_dim = size(keys.rope_dim, 8, MAX_HEAD_DIM - kv_rank)?;
        let nope_dim = size(keys.nope_dim, 4, MAX_HEAD_DIM)?;
        let value_dim = size(keys.value_dim, 4, MAX_HEAD_DIM)?;
        let q_rank = file.optional_size(keys.q_rank)?;
        if let Some(rank) = q_rank
            && (!rank.is_multiple_of(4) || rank > MAX_IN_FEATURES)
        {
            return Err(file.error(keys.q_rank.key, rank, format!("a multiple of 4, at most {MAX_IN_FEATURES}")));
        }
        if kv_heads != q_heads {
            let need = format!("{q_heads}, as many as query heads: each has its projections of latents");
            return Err(file.error("num_key_value_heads", kv_heads, need));
        }
        // Absorbed queries, the widest, and what attention sums up of latents have as many elements; so that their number fits everywhere.
        let width = u64::from(q_heads) * u64::from(nope_dim.max(kv_rank) + rope_dim).max(value_dim.into());
        if width > u64::from(MAX_IN_FEATURES) {
            let got = format!("{q_heads} heads, {width} elements in all");
            return Err(file.error("num_attention_heads", got, format!("at most {MAX_IN_FEATURES} in all")));
        }
        if q_rank.is_none() && file.flag(Flag::Key("attention_bias", false))? {
            return Err(file.wrong("attention_bias", "false without q_lora_rank; anything else is not supported"));
        }
        let interleaved = file.flag(keys.interleaved)?;
        let config = LatentConfig { q_rank, kv_rank, rope_dim, value_dim, norm_eps: LATENT_NORM_EPS };
        let layout = if interleaved { RopeLayout::Interleaved } else { RopeLayout::HalfSplit };
        Ok(Self { config, head_dim: nope_dim + rope_dim, layout })
    }

    /// The rotation as rows of the cache have it.
    pub(super) fn rope(&self, file: &Section<'_>, rope: RopeConfig) -> ModelResult<RopeConfig> {
        let LatentConfig { rope_dim, kv_rank, .. } = self.config;
        if rope.rotary_dim != rope_dim {
            let got = format!("{} of {rope_dim} dimensions", rope.rotary_dim);
            return Err(file.error("partial_rotary_factor", got, "all of those beside a latent"));
        }
        Ok(RopeConfig { layout: self.layout, ..rope.with_start(kv_rank) })
    }

    /// The factor of attention's logits: that of a head before its projections are absorbed, and twice YaRN's factor of all dimensions, if the file
    /// has it.
    pub(super) fn softmax_scale(&self, scaling: Option<&Section<'_>>) -> ModelResult<f64> {
        let scale = 1.0 / f64::from(self.head_dim).sqrt();
        let Some(section) = scaling else { return Ok(scale) };
        let kind = section.text("rope_type")?.or(section.text("type")?).unwrap_or("default");
        let all_dims = section.number("mscale_all_dim", "a number of at least 0", |n| n >= 0.0)?.unwrap_or(0.0);
        if kind == "default" || all_dims == 0.0 {
            return Ok(scale);
        }
        let factor = 0.1 * all_dims * section.factor("factor")?.max(1.0).ln() + 1.0;
        Ok(scale * factor * factor)
    }
}

//! [`RopeConfig`]: which elements turn, and how fast. Host only.

use std::f64::consts::TAU;

use crate::error::{Error, Result};
use crate::layout::MAX_HEAD_DIM;

/// Which elements of a row form a pair that turns together. Pair `i` has the `i`th frequency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// Elements `i` and `i + rotary_dim / 2`: GPT-NeoX, Llama, Qwen, Mistral, Phi as Hugging Face stores them (`rotate_half`).
    #[default]
    HalfSplit,
    /// Elements `2 i` and `2 i + 1`: the paper's own, GPT-J, Cohere, GLM, and Llama's original files.
    Interleaved,
}

impl RopeLayout {
    /// The name that shader templates know the layout by.
    pub(crate) const fn shader_name(self) -> &'static str {
        match self {
            Self::HalfSplit => "half_split",
            Self::Interleaved => "interleaved",
        }
    }
}

/// What is done to the frequencies of a model so that it reads longer texts than it was first trained on.
///
/// Names and formulas are those of Hugging Face transformers (`rope_type` in a checkpoint's configuration), which this computes in f64
/// instead of f32. `d` is `rotary_dim` and `inv_freq[i] = theta^(-2 i / d)`.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// None ("default").
    #[default]
    None,
    /// Position interpolation ("linear", [Chen et al. 2023](https://arxiv.org/abs/2306.15595)): `inv_freq / factor`.
    Linear {
        /// Times longer.
        factor: f64,
    },
    /// NTK-aware (bloc97 2023; section 3.1 of the YaRN paper): `theta * factor^(d / (d - 2))` in place of `theta`, which divides the
    /// lowest frequency by `factor` and leaves the highest.
    ///
    /// "dynamic" of a checkpoint is this with `factor * seq_len / max_position - (factor - 1)` as the factor, where `seq_len` is
    /// the longest text that is to be read (and no scaling up to `max_position`).
    Ntk {
        /// Times longer.
        factor: f64,
    },
    /// YaRN ("yarn", [Peng et al. 2023](https://arxiv.org/abs/2309.00071)): low frequencies are divided by `factor`, high ones
    /// stay, and those that turn `beta_slow` to `beta_fast` times within the original length lie between. [`RopeScaling::yarn`]
    /// fills in the usual values.
    Yarn {
        /// Times longer.
        factor: f64,
        /// Tokens that the model was first trained on.
        original_max_position: u32,
        /// Turns from which a frequency stays; 32 in the paper.
        beta_fast: f64,
        /// Turns up to which a frequency is divided; 1 in the paper.
        beta_slow: f64,
        /// What cosine and sine are multiplied by. `None`: `0.1 ln(factor) + 1`, or what `mscale` and `mscale_all_dim` say.
        attention_factor: Option<f64>,
        /// With `mscale_all_dim`: the factor is `(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)` (DeepSeek).
        /// If either of them is absent or 0, neither counts.
        mscale: Option<f64>,
        /// See `mscale`.
        mscale_all_dim: Option<f64>,
        /// Whether the bounds between which frequencies are blended are rounded to whole pairs (outwards); true unless a
        /// checkpoint says otherwise.
        truncate: bool,
    },
    /// Llama 3.1 ("llama3", [Grattafiori et al. 2024](https://arxiv.org/abs/2407.21783) and its published code): frequencies that
    /// turn fewer than `low_freq_factor` times within the original length are divided by `factor`, those that turn more than
    /// `high_freq_factor` times stay, and those between are blended.
    Llama3 {
        /// Times longer; 8 in Llama 3.1.
        factor: f64,
        /// Turns up to which a frequency is divided; 1 in Llama 3.1.
        low_freq_factor: f64,
        /// Turns from which a frequency stays; 4 in Llama 3.1.
        high_freq_factor: f64,
        /// Tokens that the model was first trained on; 8192 in Llama 3.1.
        original_max_position: u32,
    },
    /// Frequencies of the caller's own (LongRoPE: `inv_freq[i] / long_factor[i]`; proportional: zeros for pairs that don't turn).
    /// `theta` is not used.
    Custom {
        /// Radians per position, `[rotary_dim / 2]`.
        inverse_frequencies: Vec<f64>,
        /// What cosine and sine are multiplied by; 1 for none.
        attention_factor: f64,
    },
}

impl RopeScaling {
    /// YaRN as in the paper: `beta_fast` 32, `beta_slow` 1, the attention factor from `factor`, whole pairs.
    #[must_use]
    pub const fn yarn(factor: f64, original_max_position: u32) -> Self {
        Self::Yarn {
            factor,
            original_max_position,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        }
    }
}

/// Rotary position embedding ([RoFormer, Su et al. 2021](https://arxiv.org/abs/2104.09864)): pair `(a, b)` of a row at position
/// `p` becomes `(a cos - b sin, b cos + a sin) * attention_factor` of the angle `p * inverse_frequencies[pair]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Elements of a head that are rotated: an even number up to `head_dim`. The others stay as they are.
    pub rotary_dim: u32,
    /// The first of them: a multiple of 8, 0 in most models.
    pub rotary_start: u32,
    /// Which elements form a pair.
    pub layout: RopeLayout,
    /// Base of the frequencies: 10 000 in the paper, 500 000 in Llama 3.
    pub theta: f64,
    /// What is done to the frequencies.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// [`RopeLayout::HalfSplit`] without scaling.
    #[must_use]
    pub const fn new(rotary_dim: u32, theta: f64) -> Self {
        Self { rotary_dim, rotary_start: 0, layout: RopeLayout::HalfSplit, theta, scaling: RopeScaling::None }
    }

    /// The same with elements from `rotary_start` on: models with latents (MLA) rotate the last ones of a row.
    #[must_use]
    pub fn with_start(self, rotary_start: u32) -> Self {
        Self { rotary_start, ..self }
    }

    /// Checks the fields against the size of a head.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self, head_dim: u32) -> Result<()> {
        let d = self.rotary_dim;
        if head_dim > MAX_HEAD_DIM {
            return Err(Error::argument("head_dim", head_dim, format!("at most {MAX_HEAD_DIM}")));
        }
        if d == 0 || d > head_dim || !d.is_multiple_of(2) {
            return Err(Error::argument("rotary_dim", d, format!("an even number from 2 to head_dim, {head_dim}")));
        }
        if !self.rotary_start.is_multiple_of(8) || self.rotary_start > head_dim - d {
            let rule = format!("a multiple of 8 up to {}, that {d} elements of {head_dim} lie behind it", head_dim - d);
            return Err(Error::argument("rotary_start", self.rotary_start, rule));
        }
        let positive = |argument, value: f64| {
            let is_fine = value.is_finite() && value > 0.0;
            if is_fine { Ok(()) } else { Err(Error::argument(argument, value, "a finite number above 0")) }
        };
        positive("theta", self.theta)?;
        let trained = |len: u32| {
            if len > 0 { Ok(()) } else { Err(Error::argument("original_max_position", len, "at least 1 token")) }
        };
        match self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => positive("factor", factor)?,
            RopeScaling::Ntk { factor } => {
                positive("factor", factor)?;
                if d == 2 {
                    return Err(Error::argument("rotary_dim", d, "at least 4 for NTK-aware scaling"));
                }
            }
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor, .. } => {
                positive("factor", factor)?;
                trained(original_max_position)?;
                positive("beta_slow", beta_slow)?;
                positive("beta_fast", beta_fast)?;
                if beta_fast < beta_slow {
                    return Err(Error::argument("beta_fast", beta_fast, format!("at least beta_slow, {beta_slow}")));
                }
                // Its pairs are found by a logarithm to this base.
                if self.theta <= 1.0 {
                    return Err(Error::argument("theta", self.theta, "above 1 for YaRN"));
                }
                attention_factor.map_or(Ok(()), |value| positive("attention_factor", value))?;
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor", high_freq_factor)?;
                trained(original_max_position)?;
                if high_freq_factor <= low_freq_factor {
                    let rule = format!("above low_freq_factor, {low_freq_factor}");
                    return Err(Error::argument("high_freq_factor", high_freq_factor, rule));
                }
            }
            RopeScaling::Custom { ref inverse_frequencies, attention_factor } => {
                let pairs = d / 2;
                if inverse_frequencies.len() != pairs as usize {
                    let got = format!("{} values", inverse_frequencies.len());
                    return Err(Error::argument(
                        "inverse_frequencies",
                        got,
                        format!("rotary_dim / 2 of them, {pairs}"),
                    ));
                }
                positive("attention_factor", attention_factor)?;
            }
        }
        // Extreme but finite fields may still overflow.
        if let Some(bad) = self.inverse_frequencies().into_iter().find(|f| !f.is_finite()) {
            return Err(Error::argument("inverse_frequencies", bad, "finite numbers"));
        }
        let factor = self.attention_factor() as f32;
        positive("attention_factor", factor.into())
    }

    /// Radians that each pair turns per position, `[rotary_dim / 2]`, scaling included.
    #[must_use]
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let d = f64::from(self.rotary_dim);
        let pairs = self.rotary_dim / 2;
        let of_theta = |theta: f64| (0..pairs).map(move |i| theta.powf(-2.0 * f64::from(i) / d));
        match self.scaling {
            RopeScaling::None => of_theta(self.theta).collect(),
            RopeScaling::Linear { factor } => of_theta(self.theta).map(|f| f / factor).collect(),
            RopeScaling::Ntk { factor } => of_theta(self.theta * factor.powf(d / (d - 2.0))).collect(),
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate, .. } => {
                // The (fractional) pair that turns `turns` times within the original length.
                let pair_of =
                    |turns: f64| d * (f64::from(original_max_position) / (turns * TAU)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let low = low.max(0.0);
                let mut high = high.min(d - 1.0);
                if low == high {
                    // As the published code does, against a division by zero.
                    high += 0.001;
                }
                (0..pairs)
                    .zip(of_theta(self.theta))
                    .map(|(i, f)| {
                        let slow = ((f64::from(i) - low) / (high - low)).clamp(0.0, 1.0);
                        f / factor * slow + f * (1.0 - slow)
                    })
                    .collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                of_theta(self.theta)
                    .map(|f| {
                        let turns = f64::from(original_max_position) * f / TAU;
                        let fast = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        let fast = fast.clamp(0.0, 1.0);
                        (1.0 - fast) * f / factor + fast * f
                    })
                    .collect()
            }
            RopeScaling::Custom { ref inverse_frequencies, .. } => inverse_frequencies.clone(),
        }
    }

    /// What cosine and sine are multiplied by; 1 for most.
    #[must_use]
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor: Some(given), .. } => given,
            RopeScaling::Yarn { factor, mscale, mscale_all_dim, .. } => {
                let of = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
                match (mscale, mscale_all_dim) {
                    (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => of(mscale) / of(all),
                    _ => of(1.0),
                }
            }
            RopeScaling::Custom { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// What the kernels read: for each pair (high, low) word of its turns per position, then the bits of the attention factor and 0.
    #[must_use]
    pub fn table(&self) -> Vec<[u32; 2]> {
        let turns = self.inverse_frequencies().into_iter().map(|f| {
            let fixed = fixed_turns(f);
            [(fixed >> 32) as u32, fixed as u32]
        });
        turns.chain([[(self.attention_factor() as f32).to_bits(), 0]]).collect()
    }
}

/// Turns (of 2 pi) in `radians`, modulo 1, as 0.64 fixed point; within 2^-64 of the exact quotient for |radians| up to 2 pi.
///
/// An f64 quotient alone would be off by 2^-53 of itself, which 2^32 positions make 2^-21.
fn fixed_turns(radians: f64) -> u64 {
    /// What an f64 misses of 2 pi.
    const TAU_LOW: f64 = 2.449_293_598_294_706_4e-16;
    const ONE: f64 = 18_446_744_073_709_551_616.0;
    let quotient = radians / TAU;
    let missing = (-quotient).mul_add(TAU, radians) - quotient * TAU_LOW;
    // Whole turns are left out, exactly. What remains is below 2^65: it fits, and wrapping to u64 takes the last whole turn away.
    let [fraction, correction] = [quotient.fract(), (missing / TAU).fract()].map(|turns| (turns * ONE).round() as i128);
    (fraction + correction) as u64
}

#[cfg(test)]
mod tests {
    use super::fixed_turns;

    #[test]
    fn turns_are_exact_to_the_last_place() {
        // radians * 2^64 / (2 pi) modulo 2^64, computed with 300 bits. The f64 TAU is a little less than 2 pi.
        for (radians, want) in [
            (0.0, 0_u64),
            (1.0, 2_935_890_503_282_001_226),
            (-1.0, 15_510_853_570_427_550_389),
            (0.1, 293_589_050_328_200_138),
            (1e-6, 2_935_890_503_282),
            (std::f64::consts::TAU, 18_446_744_073_709_550_896),
        ] {
            let got = fixed_turns(radians);
            assert!(got.wrapping_sub(want).wrapping_add(1) <= 2, "{radians}: got {got}, want {want}");
        }
    }
}

//! Rotary position embedding as its definition says it, in `f64`, for every position of 32 bits.
//!
//! An f64 product `position * frequency` has lost 2^-21 of a radian at position 2^32, so the product is kept in two parts and
//! whole revolutions are taken off both.

use std::f64::consts::TAU;

use super::InvalidProblem;

/// How far an element of a correct f32 kernel may be from the exact rotation of its pair `(a, b)`, in units of `attention_factor
/// * (|a| + |b|)`: 2^-21.
///
/// Cosine and sine are within 2^-23 (1.19e-7; measured 1.04e-7): rounding the angle costs 2.3e-8, the first coefficient's own
/// rounding 2.2e-8, the polynomial's last two roundings 3e-8 each, all else 1e-8. The attention factor rounds twice (its own
/// bits, the product), then each product and their difference once, by 2^-24 each: together 2^-23 + 4 * 2^-24 < 2^-21.
pub const ERROR: f64 = 1.0 / 2_097_152.0;

/// Rows to rotate.
#[derive(Clone, Copy, Debug)]
pub struct RopeProblem<'a> {
    /// `[num_tokens, num_heads, head_dim]`
    pub x: &'a [f32],
    /// `[num_tokens]`
    pub positions: &'a [u32],
    /// Elements of a head.
    pub head_dim: usize,
    /// Radians per position of each pair, `[rotary_dim / 2]`; elements from `rotary_dim` on are not rotated.
    pub inverse_frequencies: &'a [f64],
    /// What cosine and sine are multiplied by.
    pub attention_factor: f64,
    /// Whether pair `i` is elements `(2 i, 2 i + 1)` instead of `(i, i + rotary_dim / 2)`.
    pub interleaved: bool,
}

/// Rotated rows.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rotated {
    /// The exact result, shaped like the problem's `x`.
    pub values: Vec<f64>,
    /// Bound of `|kernel - value|` (see [`ERROR`]), of the same shape; 0 where nothing is rotated.
    pub bound: Vec<f64>,
}

/// Rotates every row by its token's position.
///
/// # Errors
/// If the lengths of the slices do not fit one another.
pub fn rotate(problem: &RopeProblem<'_>) -> Result<Rotated, InvalidProblem> {
    let RopeProblem { x, positions, head_dim, inverse_frequencies, attention_factor, interleaved } = *problem;
    let pairs = inverse_frequencies.len();
    if head_dim == 0 || 2 * pairs > head_dim {
        return Err(InvalidProblem { message: format!("{pairs} pairs do not fit into head_dim = {head_dim}") });
    }
    // Any number of heads.
    let token_len = if positions.is_empty() { 0 } else { x.len() / positions.len() };
    if token_len * positions.len() != x.len() || !token_len.is_multiple_of(head_dim) {
        let message = format!("x has {} elements, not {} tokens of heads of {head_dim}", x.len(), positions.len());
        return Err(InvalidProblem { message });
    }
    let mut values: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    let mut bound = vec![0.0; x.len()];
    for (token, &position) in positions.iter().enumerate() {
        for (pair, &frequency) in inverse_frequencies.iter().enumerate() {
            let (sin, cos) = sin_cos(position, frequency);
            for row in (token * token_len..(token + 1) * token_len).step_by(head_dim) {
                let (i, j) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
                let (a, b) = (values[row + i], values[row + j]);
                values[row + i] = (a * cos - b * sin) * attention_factor;
                values[row + j] = (b * cos + a * sin) * attention_factor;
                // What is below the normal range of f32 may be flushed to zero.
                let error = ERROR * attention_factor.abs() * (a.abs() + b.abs()) + 3.0 * f64::from(f32::MIN_POSITIVE);
                (bound[row + i], bound[row + j]) = (error, error);
            }
        }
    }
    Ok(Rotated { values, bound })
}

/// Sine and cosine of `position * frequency`, to about 1e-15 for frequencies up to 2 pi.
#[must_use]
pub fn sin_cos(position: u32, frequency: f64) -> (f64, f64) {
    // What an f64 misses of 2 pi, from its binary expansion.
    const TAU_LOW: f64 = 2.449_293_598_294_706_4e-16;
    let position = f64::from(position);
    let angle = position * frequency;
    let lost = position.mul_add(frequency, -angle);
    let revolutions = (angle / TAU).round();
    let rest = (-revolutions).mul_add(TAU, angle) - revolutions * TAU_LOW;
    (rest + lost).sin_cos()
}

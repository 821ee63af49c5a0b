//! What the formats of the cache keep of a row, in `f64`, from their definitions.
//!
//! Numbers are rounded to multiples of a power of two, never bit by bit: nothing here is shared with the kernels.

use crate::KvFormat;

/// Rows as a format keeps them.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// What the stored elements stand for, shaped like the rows.
    pub values: Vec<f64>,
    /// Distance of neighbouring values of each element, in formats with scales; 0 in others. Shaped like the rows.
    pub steps: Vec<f64>,
}

/// `x` rounded to a multiple of the distance of numbers with `digits` significant binary digits, which is the same for all numbers below
/// `2^least_exponent`.
fn round_to(x: f64, digits: i32, least_exponent: i32, round: fn(f64) -> f64) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    // Exact: log2 may be off by one place, which the comparisons correct.
    let mut exponent = x.abs().log2().floor() as i32;
    if 2.0_f64.powi(exponent) > x.abs() {
        exponent -= 1;
    } else if 2.0_f64.powi(exponent + 1) <= x.abs() {
        exponent += 1;
    }
    let unit = 2.0_f64.powi(exponent.max(least_exponent) + 1 - digits);
    round(x / unit) * unit
}

/// A bfloat16: 8 significant digits and the exponents of an f32.
fn bfloat16(x: f64, round: fn(f64) -> f64) -> f64 {
    round_to(x, 8, -126, round)
}

fn float(format: KvFormat, x: f64) -> f64 {
    match format {
        KvFormat::F16 if x.is_finite() => round_to(x, 11, -14, f64::round_ties_even).clamp(-65504.0, 65504.0),
        KvFormat::E4M3 if x.is_finite() => round_to(x, 4, -6, f64::round_ties_even).clamp(-448.0, 448.0),
        // It has no infinities.
        KvFormat::E4M3 => f64::NAN,
        _ => x,
    }
}

/// Nearest of `least + step * code` for codes 0 to `levels`.
fn affine(x: f64, least: f64, step: f64, levels: f64) -> f64 {
    let code = if step == 0.0 { 0.0 } else { ((x - least) / step + 0.5).floor().clamp(0.0, levels) };
    least + step * code
}

/// Scale and least value of a row, in formats with scales per row; the least value is NaN if the row isn't finite.
fn row_scale(row: &[f64], levels: f64) -> (f64, f64) {
    if row.iter().any(|x| !x.is_finite()) {
        return (0.0, f64::NAN);
    }
    let least = bfloat16(row.iter().copied().fold(f64::INFINITY, f64::min), f64::floor);
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // A number less than 2^-20 above a bfloat16 counts as it.
    let scale = ((most - least) / levels).max(2.0_f64.powi(-118)) * (1.0 - 2.0_f64.powi(-20));
    let scale = bfloat16(scale, f64::ceil);
    (scale, least)
}

/// What a format keeps of rows of `head_dim` elements.
///
/// `channels`: scales, then least values, `[2, num_kv_heads, head_dim]`, for formats with scales per channel (rows without them are
/// kept as they are); row `i` is of KV head `i % num_kv_heads`.
#[must_use]
pub fn stored(format: KvFormat, rows: &[f32], head_dim: usize, channels: Option<&[f32]>) -> Stored {
    let levels = if format.element_bits() == 4 { 15.0 } else { 255.0 };
    let mut result = Stored { values: Vec::with_capacity(rows.len()), steps: Vec::with_capacity(rows.len()) };
    for (i, row) in rows.chunks(head_dim.max(1)).enumerate() {
        let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
        if format.has_row_scales() {
            // 1.9609375 * 2^127: the format's largest magnitude.
            let largest = 1.960_937_5 * 2.0_f64.powi(127);
            let row: Vec<_> = row.iter().map(|x| if x.is_finite() { x.clamp(-largest, largest) } else { *x }).collect();
            let (scale, least) = row_scale(&row, levels);
            result.values.extend(row.iter().map(|&x| affine(x, least, scale, levels)));
            result.steps.extend(row.iter().map(|_| scale));
        } else if let (true, Some(table)) = (format.has_channel_scales(), channels) {
            let (scales, least) = table.split_at(table.len() / 2);
            let first = i * head_dim % scales.len().max(1);
            for ((&x, &scale), &least) in row.iter().zip(&scales[first..]).zip(&least[first..]) {
                let (scale, least) = (f64::from(scale), f64::from(least));
                result.values.push(affine(x, least, scale, levels));
                result.steps.push(scale);
            }
        } else {
            result.values.extend(row.iter().map(|&x| float(format, x)));
            result.steps.extend(row.iter().map(|_| 0.0));
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What E4M3 codes stand for, written out: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are NaN.
    fn e4m3(code: u32) -> f64 {
        let (exponent, mantissa) = ((code >> 3 & 15) as i32, f64::from(code & 7));
        let magnitude = match exponent {
            0 => mantissa / 512.0,
            15 if code & 7 == 7 => f64::NAN,
            _ => (1.0 + mantissa / 8.0) * 2.0_f64.powi(exponent - 7),
        };
        if code >= 128 { -magnitude } else { magnitude }
    }

    #[test]
    fn e4m3_codes_keep_their_values_and_ties_go_to_even() {
        for code in (0..256).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(float(KvFormat::E4M3, e4m3(code)), e4m3(code), "{code}");
        }
        for code in 0..0x7e {
            let (a, b) = (e4m3(code), e4m3(code + 1));
            let even = if code % 2 == 0 { a } else { b };
            assert_eq!(float(KvFormat::E4M3, (a + b) / 2.0), even, "{code}");
            assert_eq!(float(KvFormat::E4M3, a * 0.49 + b * 0.51), b, "{code}");
            assert_eq!(float(KvFormat::E4M3, -(a * 0.51 + b * 0.49)), -a, "{code}");
        }
        assert_eq!(float(KvFormat::E4M3, 1e30), 448.0);
        assert_eq!(float(KvFormat::E4M3, -464.1), -448.0);
        assert!(float(KvFormat::E4M3, f64::INFINITY).is_nan() && float(KvFormat::E4M3, f64::NAN).is_nan());
    }

    #[test]
    fn halves_round_as_the_half_crate_says() {
        for x in [1.0_f32, 1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 3e-8, 2.9e-8, 6.1e-5, -0.1, 65503.0, 2.0e-6] {
            assert_eq!(float(KvFormat::F16, f64::from(x)), half::f16::from_f32(x).to_f64(), "{x}");
        }
        assert_eq!(float(KvFormat::F16, 1e6), 65504.0);
    }

    /// By hand: bfloat16 has 8 significant digits, so between 128 and 256 it has the whole numbers.
    #[test]
    fn rows_by_hand() {
        let of = |format, row: &[f32]| stored(format, row, row.len(), None);
        // Least 0, range 255: scale 1.
        assert_eq!(of(KvFormat::Int8, &[0.0, 0.4, 0.5, 254.6, 255.0]).values, [0.0, 0.0, 1.0, 255.0, 255.0]);
        // Least -129.5 goes down to -130; range 145.9 / 15 = 9.7266.. goes up to 9.75 (multiples of 1/16).
        let row = of(KvFormat::Int4, &[-129.5, 15.9]);
        assert_eq!((row.steps[0], row.values), (9.75, vec![-130.0, 16.25]));
        // A constant that a bfloat16 holds, and one that it doesn't: 1.001 lies above 1, scale 0.001 / 255 up.
        assert_eq!(of(KvFormat::Int8, &[-3.5; 4]).values, [-3.5; 4]);
        let constant = of(KvFormat::Int8, &[1.001; 4]);
        assert!(constant.steps[0] < 0.001 / 254.0 && (constant.values[0] - 1.001).abs() < 2e-6, "{constant:?}");
        // NaN takes all of its row, and no other.
        let rows = stored(KvFormat::Int8, &[1.0, f32::NAN, 2.0, 2.0], 2, None).values;
        assert!(rows[0].is_nan() && rows[1].is_nan() && rows[2..] == [2.0, 2.0], "{rows:?}");
    }

    /// Rows of any exponents, shifted or not: the documented bound holds, and is not far from what happens.
    #[test]
    fn row_errors_hold_for_any_row() {
        let mut rng = fastrand::Rng::with_seed(2);
        let mut worst = 0.0_f64;
        for i in 0..20_000 {
            let format = [KvFormat::Int8, KvFormat::Int4][i % 2];
            let (exponent, spread, shift) = (rng.i32(-140..127), rng.i32(0..40), rng.f64() - 0.5);
            let mut element = || {
                let x = (rng.f64() - 0.5) * 2.0_f64.powi(exponent - rng.i32(0..=spread));
                (x + if i % 3 == 0 { shift * 2.0_f64.powi(exponent) } else { 0.0 }) as f32
            };
            let row: Vec<f32> = (0..8).map(|_| element()).collect();
            let least = row.iter().copied().fold(f32::INFINITY, f32::min);
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let bound = format.row_error(least.into(), most.into());
            for (x, kept) in row.iter().zip(stored(format, &row, 8, None).values) {
                let error = (kept - f64::from(*x)).abs();
                assert!(error <= bound, "{format} {row:?}: {x:e} became {kept:e}, bound {bound:e}");
                worst = worst.max(error / bound);
            }
        }
        assert!(worst > 0.95, "{worst}");
    }

    #[test]
    fn channels_by_hand() {
        // Two heads of two channels.
        let table = [0.5, 1.0, 0.0, 2.0, -1.0, 0.0, 7.0, 10.0];
        let got = stored(KvFormat::Int4PerChannel, &[-0.8, 3.4, 1.0, 13.2, 100.0, -5.0, 9.0, 9.0], 2, Some(&table));
        assert_eq!(got.values, [-1.0, 3.0, 7.0, 14.0, 6.5, 0.0, 7.0, 10.0]);
        assert_eq!(got.steps[..4], [0.5, 1.0, 0.0, 2.0]);
    }
}

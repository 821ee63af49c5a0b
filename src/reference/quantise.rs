//! What the formats of the cache keep of a row, in `f64`, from their definitions.
//!
//! Numbers are rounded to multiples of a power of two, never bit by bit: nothing here is shared with the kernels.

use super::InvalidProblem;
use crate::KvFormat;

/// Largest magnitude that formats with scales per row keep: 1.9609375 * 2^127.
const LARGEST: f64 = 1.960_937_5 * 170_141_183_460_469_231_731_687_303_715_884_105_728.0;

/// Rows as a format keeps them; all four are shaped like the rows.
///
/// In formats with scales an element is `zero_point + scale * code`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Stored {
    /// What the stored elements stand for. In formats with scales per channel a NaN, which becomes any code, has the middle of its range here.
    pub values: Vec<f64>,
    /// Scale of each element, which is the distance of neighbouring codes: 0 in formats without, and where all codes mean the same.
    pub scales: Vec<f32>,
    /// Zero point of each element: what code 0 stands for. 0 in formats without.
    pub zero_points: Vec<f32>,
    /// How far a correct element may be from `values`: the distance of two codes where the roundings of f32 decide between them, and all of a
    /// subnormal half, which an adapter may flush to zero. Mostly 0.
    pub uncertainties: Vec<f32>,
}

impl Stored {
    /// Elements that stand for `zero_point + scale * code`, without uncertainty: one scale, zero point and code for each.
    ///
    /// # Errors
    /// If the lengths differ.
    pub fn from_codes(scales: Vec<f32>, zero_points: Vec<f32>, codes: &[u32]) -> Result<Self, InvalidProblem> {
        if scales.len() != codes.len() || zero_points.len() != codes.len() {
            let message =
                format!("{} scales and {} zero points of {} codes", scales.len(), zero_points.len(), codes.len());
            return Err(InvalidProblem { message });
        }
        let value = |((&scale, &zero_point), &code): ((&f32, &f32), &u32)| {
            f64::from(zero_point) + f64::from(scale) * f64::from(code)
        };
        let values = scales.iter().zip(&zero_points).zip(codes).map(value).collect();
        Ok(Self { values, uncertainties: vec![0.0; codes.len()], scales, zero_points })
    }

    /// The first `used` elements of rows of `row_dim`.
    pub(super) fn first_elements(&self, row_dim: usize, used: usize) -> Self {
        fn first<T: Copy>(all: &[T], row_dim: usize, used: usize) -> Vec<T> {
            all.chunks(row_dim).flat_map(|row| row.iter().take(used).copied()).collect()
        }
        Self {
            values: first(&self.values, row_dim, used),
            scales: first(&self.scales, row_dim, used),
            zero_points: first(&self.zero_points, row_dim, used),
            uncertainties: first(&self.uncertainties, row_dim, used),
        }
    }

    /// Elements that stand for themselves.
    #[must_use]
    pub fn from_values(values: &[f32]) -> Self {
        let zeros = || vec![0.0; values.len()];
        let exact = values.iter().map(|&x| x.into()).collect();
        Self { values: exact, scales: zeros(), zero_points: zeros(), uncertainties: zeros() }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Adds elements behind these.
    pub fn append(&mut self, other: Self) {
        self.values.extend(other.values);
        self.scales.extend(other.scales);
        self.zero_points.extend(other.zero_points);
        self.uncertainties.extend(other.uncertainties);
    }

    fn push(&mut self, kept: Kept) {
        self.values.push(kept.value);
        self.scales.push(kept.scale as f32);
        self.zero_points.push(kept.zero_point as f32);
        self.uncertainties.push(kept.uncertainty as f32);
    }
}

/// One element of [`Stored`].
struct Kept {
    value: f64,
    scale: f64,
    zero_point: f64,
    uncertainty: f64,
}

/// `x` rounded to a multiple of the distance of numbers with `digits` significant binary digits, which is the same for all numbers below
/// `2^min_exponent`.
fn round_to(x: f64, digits: i32, min_exponent: i32, round: fn(f64) -> f64) -> f64 {
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
    let unit = 2.0_f64.powi(exponent.max(min_exponent) + 1 - digits);
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

/// Nearest of `zero_point + scale * code` for codes 0 to `levels`.
fn affine(x: f64, zero_point: f64, scale: f64, levels: f64) -> Kept {
    if scale == 0.0 {
        return Kept { value: zero_point, scale, zero_point, uncertainty: 0.0 };
    }
    let place = (x - zero_point) / scale;
    if place.is_nan() && zero_point.is_finite() {
        let half = scale * levels / 2.0;
        return Kept { value: zero_point + half, scale, zero_point, uncertainty: half };
    }
    let code = |place: f64| (place + 0.5).floor().clamp(0.0, levels);
    // A difference, a quotient (2.5 ulp) and a sum of up to `levels`; and x and the zero point, or halves of them, may be flushed to zero.
    let margin = levels * 8.0 / f64::from(1 << 24) + 4.0 * f64::from(f32::MIN_POSITIVE) / scale;
    let uncertainty = scale * (code(place + margin) - code(place - margin));
    Kept { value: zero_point + scale * code(place), scale, zero_point, uncertainty }
}

/// How a row is scaled in formats with scales per row.
struct RowScale {
    scale: f64,
    /// NaN if the row isn't finite.
    zero_point: f64,
    /// Whether the roundings of f32 decide which scale it is.
    is_uncertain: bool,
}

fn row_scale(row: &[f64], levels: f64) -> RowScale {
    if row.iter().any(|x| !x.is_finite()) {
        return RowScale { scale: 0.0, zero_point: f64::NAN, is_uncertain: false };
    }
    let zero_point = bfloat16(row.iter().copied().fold(f64::INFINITY, f64::min), f64::floor);
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // A number less than 2^-20 above a bfloat16 counts as it.
    let exact = ((max - zero_point) / levels).max(2.0_f64.powi(-118)) * (1.0 - 2.0_f64.powi(-20));
    let scale = |rounded: f64| bfloat16(exact * (1.0 + rounded * 2.0_f64.powi(-24)), f64::ceil);
    // Four roundings of f32 on the way; no rounding makes the smallest scale another one.
    RowScale { scale: scale(0.0), zero_point, is_uncertain: scale(-4.5) != scale(4.5) }
}

/// What a format keeps of `rows`, whole rows of `head_dim` elements.
///
/// `channels`: scales, then zero points, `[2, num_kv_heads, head_dim]`, for formats with scales per channel, and not read for others; row `i`
/// is of KV head `i % num_kv_heads`.
///
/// # Errors
/// If there is a part of a row, or the scales per channel are missing or no whole heads of them.
pub fn stored(
    format: KvFormat,
    rows: &[f32],
    head_dim: usize,
    channels: Option<&[f32]>,
) -> Result<Stored, InvalidProblem> {
    let invalid = |message: String| Err(InvalidProblem { message });
    if head_dim == 0 || !rows.len().is_multiple_of(head_dim) {
        return invalid(format!("{} elements are not rows of head_dim = {head_dim}", rows.len()));
    }
    let table = match channels.filter(|_| format.has_channel_scales()) {
        Some(table) if table.is_empty() || !(table.len() / 2).is_multiple_of(head_dim) || table.len() % 2 == 1 => {
            let len = table.len();
            return invalid(format!(
                "{len} scales and zero points per channel, expected 2 * num_kv_heads * {head_dim}"
            ));
        }
        None if format.has_channel_scales() => return invalid(format!("{format} needs scales per channel")),
        table => table.map(|table| table.split_at(table.len() / 2)),
    };
    let levels = if format.element_bits() == 4 { 15.0 } else { 255.0 };
    let part = || Vec::with_capacity(rows.len());
    let mut result =
        Stored { values: Vec::with_capacity(rows.len()), scales: part(), zero_points: part(), uncertainties: part() };
    for (i, row) in rows.chunks(head_dim).enumerate() {
        let mut row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
        if format.has_row_scales() {
            for x in row.iter_mut().filter(|x| x.is_finite()) {
                *x = x.clamp(-LARGEST, LARGEST);
            }
            let RowScale { scale, zero_point, is_uncertain } = row_scale(&row, levels);
            for &x in &row {
                let mut kept = affine(x, zero_point, scale, levels);
                if is_uncertain {
                    // Either scale keeps an element within half of it.
                    kept.uncertainty = 1.02 * scale;
                }
                result.push(kept);
            }
        } else if let Some((scales, zero_points)) = table {
            let first = i * head_dim % scales.len();
            for ((&x, &scale), &zero_point) in row.iter().zip(&scales[first..]).zip(&zero_points[first..]) {
                result.push(affine(x, zero_point.into(), scale.into(), levels));
            }
        } else {
            for &x in &row {
                let value = float(format, x);
                let is_subnormal = format == KvFormat::F16 && value.abs() < format.absolute_error();
                let uncertainty = if is_subnormal { value.abs() } else { 0.0 };
                result.push(Kept { value, scale: 0.0, zero_point: 0.0, uncertainty });
            }
        }
    }
    Ok(result)
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
        let of = |format, row: &[f32]| stored(format, row, row.len(), None).expect("a row");
        // Minimum 0, range 255: scale 1.
        assert_eq!(of(KvFormat::Int8, &[0.0, 0.4, 0.5, 254.6, 255.0]).values, [0.0, 0.0, 1.0, 255.0, 255.0]);
        // Minimum -129.5 goes down to -130; range 145.9 / 15 = 9.7266.. goes up to 9.75 (multiples of 1/16).
        let row = of(KvFormat::Int4, &[-129.5, 15.9]);
        assert_eq!((row.scales[0], row.values), (9.75, vec![-130.0, 16.25]));
        // A constant that a bfloat16 holds, and one that it doesn't: 1.001 lies above 1, scale 0.001 / 255 up.
        assert_eq!(of(KvFormat::Int8, &[-3.5; 4]).values, [-3.5; 4]);
        let constant = of(KvFormat::Int8, &[1.001; 4]);
        assert!(
            f64::from(constant.scales[0]) < 0.001 / 254.0 && (constant.values[0] - 1.001).abs() < 2e-6,
            "{constant:?}"
        );
        // NaN takes all of its row, and no other.
        let rows = stored(KvFormat::Int8, &[1.0, f32::NAN, 2.0, 2.0], 2, None).expect("rows").values;
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
            let min = row.iter().copied().fold(f32::INFINITY, f32::min);
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let bound = format.row_error(min.into(), max.into());
            for (x, kept) in row.iter().zip(stored(format, &row, 8, None).expect("a row").values) {
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
        let got = stored(KvFormat::Int4PerChannel, &[-0.8, 3.4, 1.0, 13.2, 100.0, -5.0, 9.0, 9.0], 2, Some(&table))
            .expect("rows");
        assert_eq!(got.values, [-1.0, 3.0, 7.0, 14.0, 6.5, 0.0, 7.0, 10.0]);
        assert_eq!(got.scales[..4], [0.5, 1.0, 0.0, 2.0]);
    }
}

//! What quantising a query for packed dot products adds to the error of a logit.

use super::{Element, Terms, U, growth};
use crate::reference::{Checked, Rounding};

/// Codes of a query: -127 to 127.
const LEVELS: f64 = 127.0;
/// Half a step, and what the roundings of the step, its inverse and their product with an element add to it: a few `U` of a code, 127 at most.
const HALF_STEP: f64 = 0.5 * (1.0 + 1.0 / (1 << 12) as f64);
/// Twice the magnitude, times all factors of a score, below which a query counts as 0.
const FLUSHED: f64 = 2.0 / (1_u128 << 116) as f64;

/// Error of a logit, beside that of a kernel that multiplies the query as it is; it has the same sign for all keys. K's codes are counted from
/// `centre`.
pub(super) fn dot_error(
    checked: &Checked<'_>,
    q: &[f32],
    k: impl Iterator<Item = Element> + Clone,
    centre: f64,
) -> f64 {
    let elements = || q.iter().map(|&q| f64::from(q)).zip(k.clone()).filter(|(_, k)| k.is_coded);
    let largest = |of: fn((f64, Element)) -> f64| elements().map(of).fold(0.0, f64::max);
    // With a scale per row, the same factor for all; with scales per channel, what is quantised has them in it.
    let (q_max, scaled_max) = (largest(|(q, _)| q.abs()), largest(|(q, k)| (q * k.scale).abs()));
    let scale = checked.softmax_scale;
    // Kernels multiply in units of log2, or of the soft cap.
    let unit = checked.problem.options.softcap.unwrap_or(std::f64::consts::LN_2);
    let is_flushed = q_max.min(scaled_max) * scale.abs() / unit < FLUSHED;
    let step = scaled_max / LEVELS;

    let [mut lost, mut rest, mut centres] = [Terms::default(); 3];
    for (q, k) in elements() {
        let x = q * k.scale;
        let off = if is_flushed { x.abs() } else { x.abs().min(HALF_STEP * step) };
        lost.add(off * (k.code() - centre));
        rest.add(x * (k.code() - centre));
        centres.add(x * centre);
    }
    let [lost, rest, centres] = [lost, rest, centres].map(|terms| terms.scaled(scale));
    let sum = growth(q.len(), checked.rounding);
    match checked.rounding {
        // The step and its product; what codes are counted from, as a sum of the query, or of its products with the channels' scales.
        Rounding::Independent => {
            let roundings =
                6.0 * (rest.sum.abs() + centres.sum.abs()) + sum * centres.partial() + 2.0 * centres.random();
            lost.random() + U * roundings
        }
        Rounding::Coherent => lost.abs + U * (6.0 * rest.abs + (sum + 8.0) * centres.abs),
    }
}

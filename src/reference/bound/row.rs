//! The bounds of one row: a query token and a query head.

mod packed;

use super::Rounding;
use crate::reference::quantise::Stored;
use crate::reference::{Checked, Row, VisibleKey};

/// Rounding error of one `f32` operation, relative to its result.
const U: f64 = 1.0 / (1 << 24) as f64;
/// One ulp of a result in `[1, 2)`; the unit of the accuracies in the WGSL and Vulkan specifications.
const ULP: f64 = 2.0 * U;
/// Standard deviations (of the widest distribution) that independent errors may reach together.
const LAMBDA: f64 = 4.0;
/// Standard deviations that partial sums may reach as a rule (single ones may reach more: roundings depend on all of
/// them).
const WALK: f64 = 2.0;
/// Smallest normal `f32`; what is below may be flushed to zero.
const MIN_NORMAL: f64 = f32::MIN_POSITIVE as f64;
/// What a flushed scale or weight is multiplied by at most: codes, and the two parts of an element.
const MAX_CODE: f64 = 257.0;
/// Rounding to a half: this much that all numbers share, and up to this much of their own.
const HALF: f64 = 1.0 / (1 << 11) as f64;
/// What may be flushed to zero of halves, relative to the largest of its row.
const HALF_FLUSHED: f64 = 1.0 / (1 << 28) as f64;
/// Smallest scale that the largest weight is looked for with.
const MIN_WEIGHT_SCALE: f64 = 1.0 / (1_u128 << 64) as f64;
/// Keys over which matrix units sum up at most.
const MATRIX_KEYS: f64 = 64.0;
/// Sums of magnitudes beyond this may overflow, in units of log2 and with all errors.
const MAX_SUM: f64 = f32::MAX as f64 / 2.0;
/// Allowance for effects of second order in `U`.
const SECOND_ORDER: f64 = 1.01;

/// One element of a cached row.
#[derive(Clone, Copy)]
pub(in crate::reference) struct Element {
    value: f64,
    /// What kernels may sum up apart from the rest of it; 0 in formats without scales.
    zero_point: f64,
    /// Whether it is `zero_point + scale * code`.
    is_coded: bool,
    /// 1 if it isn't.
    scale: f64,
    /// How far the stored element may be from `value`.
    uncertainty: f64,
}

impl Element {
    /// `scale * code`, or all of the element.
    fn rest(self) -> f64 {
        self.value - self.zero_point
    }

    /// The code, or all of the element.
    fn code(self) -> f64 {
        if self.scale > 0.0 { self.rest() / self.scale } else { 0.0 }
    }

    /// Roundings of a kernel that computes the element, and that of `value` to the oracle's `f32`.
    fn rounding(self) -> f64 {
        if self.is_coded { U * (self.rest().abs() + 2.0 * self.value.abs()) } else { 0.0 }
    }
}

/// The elements of a row that begins at index `at` of its side.
pub(in crate::reference) fn elements<'r>(
    row: &'r [f32],
    at: usize,
    stored: Option<&'r Stored>,
) -> impl Iterator<Item = Element> + Clone + 'r {
    row.iter().enumerate().map(move |(dim, &value)| {
        let value = f64::from(value);
        let Some(stored) = stored else {
            return Element { value, zero_point: 0.0, is_coded: false, scale: 1.0, uncertainty: 0.0 };
        };
        let part = |of: &[f32]| of.get(at + dim).copied().map_or(0.0, f64::from);
        let (scale, zero_point) = (part(&stored.scales), part(&stored.zero_points));
        let is_coded = scale != 0.0 || zero_point != 0.0;
        let scale = if is_coded { scale } else { 1.0 };
        Element { value, zero_point, is_coded, scale, uncertainty: part(&stored.uncertainties) }
    })
}

/// Relative error of a key's weight, before it is amplified by `exp`.
#[derive(Clone, Copy, Default)]
struct LogitError {
    /// Errors that may have the same sign in all keys.
    shared: f64,
    /// Errors that differ from key to key: a bound on the root of the sum of their squares.
    own: f64,
}

impl LogitError {
    /// The largest error of the logit.
    fn total(self) -> f64 {
        self.shared + LAMBDA * self.own
    }

    /// The same errors as changes of `exp(logit)`, relative to it.
    fn amplified(self) -> Self {
        // Past this the bound is the spread of the values anyway; stay far from infinity.
        let total = self.total().min(300.0);
        let factor = if total > 1e-9 { total.exp_m1() / total } else { 1.0 };
        Self { shared: self.shared * factor, own: self.own * factor }
    }
}

/// Factor of `U` of a sum of `n` terms, relative to the largest partial sum.
fn growth(n: usize, rounding: Rounding) -> f64 {
    let n = n as f64;
    match rounding {
        Rounding::Independent => n.min(LAMBDA * n.sqrt()),
        Rounding::Coherent => n,
    }
}

/// What is summed over the terms of a dot product.
#[derive(Clone, Copy, Default)]
struct Terms {
    sum: f64,
    abs: f64,
    squares: f64,
}

impl Terms {
    fn add(&mut self, term: f64) {
        self.sum += term;
        self.abs += term.abs();
        self.squares += term * term;
    }

    fn scaled(self, scale: f64) -> Self {
        Self { sum: scale * self.sum, abs: scale.abs() * self.abs, squares: scale * scale * self.squares }
    }

    /// Bound of partial sums in any order: a part of the whole, and a random walk.
    fn partial(self) -> f64 {
        self.abs.min(self.sum.abs() + WALK * self.squares.sqrt())
    }

    /// Bound of a sum of the terms, each with a factor of its own of magnitude 1 at most.
    fn random(self) -> f64 {
        self.abs.min(LAMBDA * self.squares.sqrt())
    }
}

/// Error of `dot(q, k) * softmax_scale`, or `None` if it may overflow; `scaled` is its exact value.
fn dot_error(
    checked: &Checked<'_>,
    q: &[f32],
    k: impl Iterator<Item = Element> + Clone,
    scaled: f64,
) -> Option<LogitError> {
    let elements = k.clone();
    let [mut rest, mut zero, mut rounding, mut uncertain] = [Terms::default(); 4];
    let (mut q_abs, mut is_coded) = (0.0, false);
    let (mut largest_half, mut codes_abs) = (0.0_f64, 0.0);
    for (&q, k) in q.iter().zip(k) {
        let q = f64::from(q);
        rest.add(q * k.rest());
        zero.add(q * k.zero_point);
        rounding.add(q * k.rounding());
        q_abs += q.abs();
        uncertain.add(q * k.uncertainty);
        is_coded |= k.is_coded;
        largest_half = largest_half.max((q * k.scale).abs());
        codes_abs += k.code().abs();
    }
    let scale = checked.softmax_scale;
    let codes = if is_coded { MAX_CODE } else { 1.0 };
    let widest = (rest.abs + zero.abs + if is_coded { MAX_CODE * q_abs } else { 0.0 }) * scale.abs().max(1.0);
    if widest * std::f64::consts::LOG2_E > MAX_SUM {
        return None;
    }
    let [rest, zero, rounding, uncertain] = [rest, zero, rounding, uncertain].map(|terms| terms.scaled(scale));
    let flushed = scale.abs() * q_abs * MIN_NORMAL * codes;
    // The query with a channel's scale in it is rounded once more, and the two parts of a score are put together.
    let parts = if is_coded { rest.sum.abs() + zero.sum.abs() } else { 0.0 };
    let mut error = match checked.rounding {
        Rounding::Independent => {
            // A kernel may add the rest up on top of what the zero points give.
            let partial = rest.partial() + zero.sum.abs();
            let sum = growth(q.len(), checked.rounding) / LAMBDA * U * partial;
            let own = sum.hypot(rounding.random() / LAMBDA).hypot(2.0 * U * parts).hypot(uncertain.random() / LAMBDA);
            // Rounding of the scale (root, reciprocal, log2(e)), and of the scaled query, which all keys share, as they do sums over it.
            let query = if is_coded { 2.0 } else { 1.0 } * rest.random() + zero.random();
            let zero_sum = growth(q.len(), checked.rounding) * zero.partial();
            LogitError { shared: U * (4.0 * scaled.abs() + 4.0 * parts + query + zero_sum) + flushed, own }
        }
        Rounding::Coherent => {
            let sums = (growth(q.len(), checked.rounding) + if is_coded { 10.0 } else { 5.0 }) * (rest.abs + zero.abs);
            LogitError { shared: U * sums + rounding.abs + uncertain.abs + flushed, own: 0.0 }
        }
    };
    if checked.f16_products {
        let flushed = HALF_FLUSHED * largest_half * codes_abs * scale.abs();
        let sums = 2.0 * U * q.len() as f64;
        match checked.rounding {
            Rounding::Independent => {
                // The same roundings of the query for all keys.
                error.shared += HALF * (rest.sum.abs() + rest.random()) + sums * rest.partial() + flushed;
            }
            Rounding::Coherent => error.shared += (2.0 * HALF + sums) * rest.abs + flushed,
        }
    }
    if let Some(centre) = checked.packed_centre {
        error.shared += packed::dot_error(checked, q, elements, centre);
    }
    Some(error)
}

/// Largest error of `tanh(y)` when computed as `(exp(y) - exp(-y)) / (exp(y) + exp(-y))`, as WGSL allows.
fn tanh_error(y: f64) -> f64 {
    let tanh = y.tanh();
    ULP * ((3.0 + 2.0 * y.abs()) * (1.0 - tanh * tanh) + 5.0 * tanh.abs())
}

/// Fills the bounds of a row's output and returns that of its `lse`.
pub(in crate::reference) fn of_row(checked: &Checked<'_>, row: &Row<'_>, out_bound: &mut [f64]) -> f64 {
    out_bound.fill(0.0);
    let rounding = checked.rounding;
    let options = &checked.problem.options;
    let num_keys = row.keys.len();
    if num_keys == 0 && row.sink.is_none() {
        return 0.0;
    }
    let max = row.keys.iter().map(|key| key.logit).chain(row.sink).fold(f64::NEG_INFINITY, f64::max);

    // Rescalings: how often the running maximum grows, and some for tiles, splits and the merge.
    let mut num_rescales = 4.0;
    let mut running_max = f64::NEG_INFINITY;
    for key in row.keys {
        if key.logit > running_max {
            running_max = key.logit;
            num_rescales += 1.0;
        }
    }
    let rescales = match rounding {
        Rounding::Independent => f64::sqrt(num_rescales),
        Rounding::Coherent => num_rescales,
    };
    let exp_error = |logit: f64| {
        let exponent = (max - logit) * std::f64::consts::LOG2_E;
        ULP * (3.0 + 2.0 * exponent + 3.5 * rescales) + U * exponent
    };

    let mut sums = vec![Sums::default(); row.out.len()];
    let (mut shared_sum, mut own_square_sum, mut largest, mut min_denominator) = (0.0, 0.0, 0.0_f64, 0.0);
    let mut add_weight = |weight: f64, error: LogitError| {
        let amplified = error.amplified();
        shared_sum += weight * amplified.shared;
        own_square_sum += (weight * amplified.own).powi(2);
        largest = largest.max(error.total());
        min_denominator += weight * (-error.total()).exp();
        amplified
    };
    // What a key's weight is rounded relative to, where it is a half.
    let half_peak = |key: &VisibleKey| {
        let scale = checked.value_elements(key.pos, row.kv_head).next().map_or(1.0, |v| v.scale);
        key.weight * scale.max(MIN_WEIGHT_SCALE)
    };
    let half_peak = if checked.f16_products { row.keys.iter().map(half_peak).fold(0.0, f64::max) } else { 0.0 };
    for key in row.keys {
        let Some(mut error) = dot_error(checked, row.q, checked.key_elements(key.pos, row.kv_head), key.scaled) else {
            out_bound.fill(f64::INFINITY);
            return f64::INFINITY;
        };
        if let Some(cap) = options.softcap {
            let flattest = (key.scaled.abs() - error.total()).max(0.0) / cap;
            let slope = 1.0 - flattest.tanh().powi(2);
            error = LogitError { shared: error.shared * slope, own: error.own * slope };
            error.shared += cap * tanh_error(key.scaled / cap) + 3.0 * U * (key.logit - key.bias).abs();
        }
        if options.alibi_slopes.is_some() {
            error.shared += U * (4.0 * key.bias.abs() + (key.logit - key.bias).abs());
        }
        error.shared += exp_error(key.logit);
        let amplified = add_weight(key.weight, error);

        let error = LogitError { shared: key.weight * amplified.shared, own: key.weight * amplified.own };
        let values = checked.value_elements(key.pos, row.kv_head);
        for ((sums, v), &out) in sums.iter_mut().zip(values).zip(row.out) {
            sums.add(key.weight, v, out, error);
            if checked.f16_products {
                sums.half_flushed += (key.weight * v.rest().abs()).min(HALF_FLUSHED * half_peak * v.code().abs());
            }
        }
    }
    if let Some(sink) = row.sink {
        // A key whose value is zero.
        let weight = (sink - row.lse).exp();
        let error = LogitError { shared: 2.0 * U * sink.abs() + exp_error(sink), own: 0.0 };
        let amplified = add_weight(weight, error);
        for (sums, &out) in sums.iter_mut().zip(row.out) {
            sums.shared += weight * amplified.shared * out.abs();
            sums.spread = sums.spread.max(out.abs());
        }
    }

    let denominator_error = U * growth(num_keys, rounding);
    for ((bound, sums), &out) in out_bound.iter_mut().zip(&sums).zip(row.out) {
        *bound = sums.bound(rounding, out, num_keys, rescales, denominator_error, min_denominator);
        if checked.f16_products {
            *bound += SECOND_ORDER * sums.half_error(rounding);
        }
    }

    let weights = shared_sum + LAMBDA * f64::sqrt(own_square_sum);
    let weights = if weights < 1.0 { largest.min(-(-weights).ln_1p()) } else { largest };
    // log2 is promised to 3 ulp, and to an absolute 2^-21 near 1.
    let log =
        std::f64::consts::LN_2 * (3.0 * ULP * (row.lse - max) * std::f64::consts::LOG2_E).max(1.0 / (1 << 21) as f64);
    let roundings = U * (4.0 * row.lse.abs() + 4.0 * max.abs() + 8.0);
    SECOND_ORDER * (weights + denominator_error + log + roundings)
}

/// A sum over the keys in `f32`, of terms whose factors were rounded.
#[derive(Clone, Copy, Default)]
struct Accumulation {
    /// The exact sum so far.
    partial: f64,
    /// Sum of the squares of its terms so far.
    squares: f64,
    /// Largest partial sum.
    partial_max: f64,
    /// Sum of the magnitudes of its terms.
    abs: f64,
    /// Sum of the squares of the roundings of terms and partial sums.
    roundings: f64,
}

impl Accumulation {
    /// A term that took `products` roundings.
    fn add(&mut self, term: f64, products: f64) {
        self.partial += term;
        self.squares += term * term;
        self.partial_max = self.partial_max.max(self.partial.abs());
        self.abs += term.abs();
        // A partial sum, in any order of the terms: this one, and a random walk from it. Adding a term never loses
        // more than the term, as the sum without it is a number of the format.
        let partial_square = 2.0 * (self.partial * self.partial + WALK * WALK * self.squares);
        self.roundings += (U * U * partial_square).min(term * term) + products * (U * term) * (U * term);
    }

    /// Bound of what its roundings add up to.
    fn error(&self, rounding: Rounding, num_keys: usize) -> f64 {
        match rounding {
            Rounding::Independent => LAMBDA * self.roundings.sqrt(),
            Rounding::Coherent => U * (num_keys as f64 + 2.0) * self.abs,
        }
    }

    /// Bound of its partial sums.
    fn largest(&self, rounding: Rounding) -> f64 {
        match rounding {
            Rounding::Independent => self.abs.min(self.partial_max + LAMBDA * self.squares.sqrt()),
            Rounding::Coherent => self.abs,
        }
    }
}

/// What is summed over the keys for one element of the output.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// `sum(weight * v)`, without zero points.
    rest: Accumulation,
    /// `sum(weight * zero_point)`.
    zero: Accumulation,
    /// Errors of the weights times distance from the output: those that may agree, and squares of those that do not.
    shared: f64,
    own_squares: f64,
    /// Largest distance of a value from the output.
    spread: f64,
    /// Errors of the elements, by computing them and by what is unknown of stored ones: their sum, and the sum of their squares.
    element_abs: f64,
    element_squares: f64,
    /// Sum of the magnitudes of all elements: what a sum with weights up to 1 may reach.
    widest: f64,
    /// The largest factor of a number that may be flushed to zero.
    codes: f64,
    /// What may be flushed of weights that are halves.
    half_flushed: f64,
}

impl Sums {
    fn add(&mut self, weight: f64, v: Element, out: f64, error: LogitError) {
        self.rest.add(weight * v.rest(), if v.is_coded { 2.0 } else { 1.0 });
        self.zero.add(weight * v.zero_point, 1.0);

        let distance = (v.value - out).abs();
        self.shared += error.shared * distance;
        self.own_squares += (error.own * distance) * (error.own * distance);
        self.spread = self.spread.max(distance);

        for error in [weight * v.rounding(), weight * v.uncertainty] {
            self.element_abs += error;
            self.element_squares += error * error;
        }
        self.widest += v.rest().abs() + v.zero_point.abs();
        self.codes = self.codes.max(if v.is_coded { MAX_CODE } else { 1.0 });
    }

    /// What rounding the weights to halves adds to the bound.
    fn half_error(&self, rounding: Rounding) -> f64 {
        let weights = match rounding {
            Rounding::Independent => HALF * (self.rest.partial.abs() + LAMBDA * self.rest.squares.sqrt()),
            Rounding::Coherent => 2.0 * HALF * self.rest.abs,
        };
        weights + self.half_flushed + 2.0 * U * MATRIX_KEYS * self.rest.abs
    }

    fn bound(
        &self,
        rounding: Rounding,
        out: f64,
        num_keys: usize,
        rescales: f64,
        denominator_error: f64,
        min_denominator: f64,
    ) -> f64 {
        if self.widest > MAX_SUM {
            return f64::INFINITY;
        }
        let weights = (self.shared + LAMBDA * self.own_squares.sqrt()) / min_denominator;
        let accumulation = self.rest.error(rounding, num_keys) + self.zero.error(rounding, num_keys);
        let elements = match rounding {
            Rounding::Independent => self.element_abs.min(LAMBDA * self.element_squares.sqrt()),
            Rounding::Coherent => self.element_abs,
        };
        // The multiplications that rescale and merge the sums, and the division (2.5 ulp) with the final rounding.
        let largest = self.rest.largest(rounding) + self.zero.largest(rounding);
        let rescaling = U * (8.0 + LAMBDA * rescales) * largest;
        let division = (denominator_error + U * 16.0) * out.abs();
        let flushed = (num_keys as f64 + 1.0) * MIN_NORMAL * (self.codes + self.spread + out.abs());
        SECOND_ORDER * (weights.min(self.spread) + accumulation + elements + rescaling + division) + flushed
    }
}

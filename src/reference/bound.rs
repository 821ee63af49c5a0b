//! How far a correct `f32` kernel may be from the exact result.
//!
//! A fixed tolerance is either too wide to notice a lost key or too narrow for large logits. This module instead
//! follows the rounding errors of the computation itself, with the data of each row. It knows nothing of tiles and
//! splits: it assumes only that a kernel multiplies, adds and accumulates in `f32`, uses `exp2`, `log2`, `tanh` and
//! division with the accuracy WGSL and Vulkan promise, and rescales its sums when the running maximum grows.
//!
//! # Derivation
//!
//! Let `u = 2^-24` be the rounding error of one `f32` operation, `w_j` the exact softmax weight of key `j`.
//!
//! **Logit of a key.** The products and sums of `dot(q, k)` err by `growth(head_dim) * u * partial`, where `partial`
//! bounds the partial sums; rounding `q * softmax_scale` and the scale itself add a few `u` of the logit. An element of
//! K stored with an error `e` adds `softmax_scale * |q| * e`. A soft cap multiplies this by its slope, which is small
//! where it saturates, and adds the error of `tanh` times the cap. ALiBi adds roundings of its bias.
//!
//! **Weight.** A logit error of `d` multiplies the weight by `exp(d)`. `exp2(t)` itself errs by `3 + 2|t|` ulp; the
//! same holds for the chain of rescalings, whose exponents add up to no more than `t`.
//!
//! **Output.** If the weights become `w_j * (1 + h_j)`, then exactly
//!
//! ```text
//! out' - out = sum(w_j * h_j * (v_j - out)) / sum(w_j * (1 + h_j))
//! ```
//!
//! so that an error shared by all keys cancels, and the result stays among the values (the other bound used). To it
//! come the roundings of `sum(w * v)` and of the denominator, the storage error of V, and the final division.
//!
//! **Adding errors up.** The worst case, in which all errors have the same sign, is wider than what happens by the
//! square root of the number of errors. So by default ([`Rounding::Independent`]) errors of different operations are
//! taken as independent: `n` of them with bounds `e_i` add up to at most `4 * sqrt(sum(e_i^2))` (by Hoeffding's
//! inequality this fails with a probability below `2 * exp(-8)` for the worst distribution, and below `1e-11` for
//! uniformly distributed rounding errors). Errors that are the same function of similar inputs (the scale's rounding,
//! `exp2`, `tanh`) are always added up as they are. Data that is itself regular (all keys alike, constant values)
//! rounds the same way in every step; use [`Rounding::Coherent`] for it.

use super::{Checked, Row};

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
/// Allowance for effects of second order in `U`.
const SECOND_ORDER: f64 = 1.01;

/// Largest error of one stored element `x`: the larger of `relative * |x|` and `absolute`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ElementError {
    /// Factor of the element.
    pub relative: f64,
    /// The least bound, for elements near zero.
    pub absolute: f64,
}

impl ElementError {
    /// Stored as it is.
    pub const EXACT: Self = Self { relative: 0.0, absolute: 0.0 };
    /// Rounded to the nearest `f16`, with subnormals possibly flushed to zero; holds for `|x| <= 65504`.
    pub const F16: Self = Self { relative: 1.0 / 2048.0, absolute: 1.0 / 16384.0 };

    fn of(self, x: f64) -> f64 {
        (self.relative * x.abs()).max(self.absolute)
    }
}

/// How rounding errors of different operations add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// They are independent: right for random and for real data.
    #[default]
    Independent,
    /// They all have the same sign: for regular data such as repeated or constant rows. Much wider for long sequences.
    Coherent,
}

/// What lies between the problem's numbers and a kernel's result.
///
/// There are two ways to judge a cache in `f16`: pass the original K and V with [`ErrorModel::F16`], which also covers
/// what storing them loses; or round K and V to `f16` before they are given to the oracle, and use [`ErrorModel::F32`],
/// which leaves the errors of the arithmetic alone and is a hundred times narrower.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ErrorModel {
    /// Storage error of K.
    pub k: ElementError,
    /// Storage error of V.
    pub v: ElementError,
    /// How rounding errors add up.
    pub rounding: Rounding,
}

impl ErrorModel {
    /// K and V are stored as they are.
    pub const F32: Self = Self { k: ElementError::EXACT, v: ElementError::EXACT, rounding: Rounding::Independent };
    /// K and V are rounded to `f16`.
    pub const F16: Self = Self { k: ElementError::F16, v: ElementError::F16, rounding: Rounding::Independent };

    /// The same model with another way of adding errors up.
    #[must_use]
    pub const fn with_rounding(self, rounding: Rounding) -> Self {
        Self { rounding, ..self }
    }
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

/// Error of `dot(q, k) * softmax_scale`; `scaled` is its exact value.
fn dot_error(checked: &Checked<'_>, model: &ErrorModel, q: &[f32], k: &[f32], scaled: f64) -> LogitError {
    let (mut abs_sum, mut square_sum, mut storage_sum, mut storage_square_sum) = (0.0, 0.0, 0.0, 0.0);
    for (&q, &k) in q.iter().zip(k) {
        let (q, k) = (f64::from(q), f64::from(k));
        let product = q * k;
        let storage = q.abs() * model.k.of(k);
        abs_sum += product.abs();
        square_sum += product * product;
        storage_sum += storage;
        storage_square_sum += storage * storage;
    }
    let scale = checked.softmax_scale.abs();
    let (abs_sum, norm) = (scale * abs_sum, scale * square_sum.sqrt());
    let (storage_sum, storage_norm) = (scale * storage_sum, scale * storage_square_sum.sqrt());
    match model.rounding {
        Rounding::Independent => {
            // Partial sums of terms in any order: a part of the whole, and a random walk.
            let partial = abs_sum.min(scaled.abs() + WALK * norm);
            let sum = growth(q.len(), model.rounding) / LAMBDA * U * partial;
            let storage = storage_norm.min(storage_sum / LAMBDA);
            // Rounding of the scale (root, reciprocal, log2(e)), and of the scaled query, which all keys share.
            let shared = U * (4.0 * scaled.abs() + abs_sum.min(LAMBDA * norm));
            LogitError { shared, own: sum.hypot(storage) }
        }
        Rounding::Coherent => {
            let shared = (growth(q.len(), model.rounding) + 5.0) * U * abs_sum + storage_sum;
            LogitError { shared, own: 0.0 }
        }
    }
}

/// Largest error of `tanh(y)` when computed as `(exp(y) - exp(-y)) / (exp(y) + exp(-y))`, as WGSL allows.
fn tanh_error(y: f64) -> f64 {
    let tanh = y.tanh();
    ULP * ((3.0 + 2.0 * y.abs()) * (1.0 - tanh * tanh) + 5.0 * tanh.abs())
}

/// Fills the bounds of a row's output and returns that of its `lse`.
pub(super) fn of_row(checked: &Checked<'_>, model: &ErrorModel, row: &Row<'_>, out_bound: &mut [f64]) -> f64 {
    out_bound.fill(0.0);
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
    let rescales = match model.rounding {
        Rounding::Independent => f64::sqrt(num_rescales),
        Rounding::Coherent => num_rescales,
    };
    let exp_error = |logit: f64| {
        let exponent = (max - logit) * std::f64::consts::LOG2_E;
        ULP * (3.0 + 2.0 * exponent + 3.5 * rescales) + U * exponent
    };

    let mut sums = vec![Sums::default(); row.out.len()];
    let (mut shared_sum, mut own_square_sum, mut largest, mut least_denominator) = (0.0, 0.0, 0.0_f64, 0.0);
    let mut add_weight = |weight: f64, error: LogitError| {
        let amplified = error.amplified();
        shared_sum += weight * amplified.shared;
        own_square_sum += (weight * amplified.own).powi(2);
        largest = largest.max(error.total());
        least_denominator += weight * (-error.total()).exp();
        amplified
    };
    for key in row.keys {
        let mut error = dot_error(checked, model, row.q, checked.key_row(key.pos, row.kv_head), key.scaled);
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

        let (shared, own) = (key.weight * amplified.shared, key.weight * amplified.own);
        let v = checked.value_row(key.pos, row.kv_head);
        for ((sums, &v), &out) in sums.iter_mut().zip(v).zip(row.out) {
            sums.add(key.weight, f64::from(v), out, shared, own, model.v);
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

    let denominator_error = U * growth(num_keys, model.rounding);
    for ((bound, sums), &out) in out_bound.iter_mut().zip(&sums).zip(row.out) {
        *bound = sums.bound(model.rounding, out, num_keys, rescales, denominator_error, least_denominator);
    }

    let weights = shared_sum + LAMBDA * f64::sqrt(own_square_sum);
    let weights = if weights < 1.0 { largest.min(-(-weights).ln_1p()) } else { largest };
    // log2 is promised to 3 ulp, and to an absolute 2^-21 near 1.
    let log =
        std::f64::consts::LN_2 * (3.0 * ULP * (row.lse - max) * std::f64::consts::LOG2_E).max(1.0 / (1 << 21) as f64);
    let roundings = U * (4.0 * row.lse.abs() + 4.0 * max.abs() + 8.0);
    SECOND_ORDER * (weights + denominator_error + log + roundings)
}

/// What is summed over the keys for one element of the output.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// `sum(weight * v)` and its parts so far.
    partial: f64,
    /// Sum of the squares of its terms so far.
    squares: f64,
    /// Largest partial sum.
    partial_max: f64,
    /// `sum(weight * |v|)`.
    abs: f64,
    /// Sum of the squares of the roundings of the partial sums.
    roundings: f64,
    /// Errors of the weights times distance from the output: those that may agree, and squares of those that do not.
    shared: f64,
    own_squares: f64,
    /// Largest distance of a value from the output.
    spread: f64,
    /// Storage errors of the values: their sum, and the sum of their squares.
    storage: f64,
    storage_squares: f64,
}

impl Sums {
    fn add(&mut self, weight: f64, v: f64, out: f64, shared: f64, own: f64, element: ElementError) {
        let term = weight * v;
        self.partial += term;
        self.squares += term * term;
        self.partial_max = self.partial_max.max(self.partial.abs());
        self.abs += term.abs();
        // A partial sum, in any order of the terms: this one, and a random walk from it. Adding a term never loses
        // more than the term, as the sum without it is a number of the format.
        let partial_square = 2.0 * (self.partial * self.partial + WALK * WALK * self.squares);
        self.roundings += (U * U * partial_square).min(term * term) + (U * term) * (U * term);

        let distance = (v - out).abs();
        self.shared += shared * distance;
        self.own_squares += (own * distance) * (own * distance);
        self.spread = self.spread.max(distance);

        let storage = weight * element.of(v);
        self.storage += storage;
        self.storage_squares += storage * storage;
    }

    fn bound(
        &self,
        rounding: Rounding,
        out: f64,
        num_keys: usize,
        rescales: f64,
        denominator_error: f64,
        least_denominator: f64,
    ) -> f64 {
        let weights = (self.shared + LAMBDA * self.own_squares.sqrt()) / least_denominator;
        let (accumulation, storage, largest) = match rounding {
            Rounding::Independent => (
                LAMBDA * self.roundings.sqrt(),
                self.storage.min(LAMBDA * self.storage_squares.sqrt()),
                self.abs.min(self.partial_max + LAMBDA * self.squares.sqrt()),
            ),
            Rounding::Coherent => (U * (num_keys as f64 + 1.0) * self.abs, self.storage, self.abs),
        };
        // The multiplications that rescale and merge the sum, and the division (2.5 ulp) with the final rounding.
        let rescaling = U * (8.0 + LAMBDA * rescales) * largest;
        let division = (denominator_error + U * 16.0) * out.abs();
        let flushed = (num_keys as f64 + 1.0) * MIN_NORMAL * (1.0 + self.spread + out.abs());
        SECOND_ORDER * (weights.min(self.spread) + accumulation + storage + rescaling + division) + flushed
    }
}

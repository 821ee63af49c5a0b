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
//! bounds the partial sums; rounding `q * softmax_scale` and the scale itself add a few `u` of the logit. A soft
//! cap multiplies this by its slope, which is small where it saturates, and adds the error of `tanh` times the cap. ALiBi
//! adds roundings of its bias.
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
//! come the roundings of `sum(w * v)` and of the denominator, and the final division.
//!
//! **Storage.** What a format keeps of a row follows from the row alone ([`quantise::stored`](super::quantise::stored)). So the loss is
//! computed, not estimated: the bounds above are those of attention over the rows as they are kept, and where a kernel is
//! compared with attention over the rows as they were, the distance of the two exact results comes on top. That holds for
//! every format and any row, outliers and keys outside the calibrated range included. Where roundings of `f32` may decide
//! between two codes, an element is uncertain by their distance, and a subnormal half, which an adapter may flush to zero,
//! by its magnitude; these count as errors of the element, independent of one another.
//!
//! **Formats with scales.** An element is `zero_point + scale * code`. A kernel may compute it, with two roundings, or
//! never: with `K = z + s * c` per row it has `s * dot(q, c) + z * sum(q)`, per channel `dot(q * s, c) + dot(q, z)`, and
//! with V per row `sum(w * s * c) + sum(w * z)`. Such sums are as large as the range of the codes even where what is left
//! of them in the end is not, so their partial sums are bounded apart: those over `k - z` and `v - z`, with one rounding
//! more for each product, and those over `z`. What the zero points add to the logits is the same function of the query for
//! all keys and so counts as shared.
//!
//! **Products of halves** ([`ErrorModel::with_f16_products`]). Queries, times a power of two that takes their row's largest element to
//! `2^14 .. 2^15`, and weights, relative to a number that leaves the largest between `2^13` and `2^15`, become halves. Vulkan and Metal do not
//! say which neighbour a number goes to, so an element errs by up to `2^-10` of itself: taken as `2^-11` that all share (truncation) and up to
//! `2^-11` of its own. The first is that fraction of the sum it is part of, the second adds up as any independent errors do. A query is
//! rounded once for all keys, so what that adds to the logits counts as shared. What
//! falls below the normal halves, `2^-28` of the largest, may be flushed. Codes, E4M3 and halves in the cache are exact as halves; where
//! there are codes, weights carry the scale, so these errors are relative to `scale * code`; sums over zero points are not of halves. Nor
//! do matrix units say how they round sums: `2u` of the partial sum for each addition is allowed for, always of the same sign, over a head
//! and over the 64 keys at most after which sums are added in `f32`.
//!
//! **Packed dot products** ([`ErrorModel::with_packed_dots`]). A query `x`, times all factors of a score, becomes `s * i` with integers `i` of -127
//! to 127 and `s = max|x| / 127`, so an element errs by up to `s / 2`, and by no more than itself. A key of codes is `m + scale * (code - c)`, where
//! `c` is the code in the middle of the range, 128 or 8, and `m` what it stands for. The integer dot product is with `code - c` only and exact;
//! products with `scale * c` and with the minimum are of the query as it was. So a score errs by up to `s / 2 * sum(scale * |code - c|)`. A query is rounded once for all keys, so
//! that counts as shared; the elements' roundings are independent of one another. To it come some roundings of the two parts. Queries
//! that are below `2^-116` throughout, in units of log2 or of the soft cap, count as 0. K in formats without codes is multiplied as ever.
//!
//! **Overflow.** Where sums of magnitudes come near the largest `f32`, the bounds are infinite.
//!
//! **Adding errors up.** The worst case, in which all errors have the same sign, is wider than what happens by the
//! square root of the number of errors. So by default ([`Rounding::Independent`]) errors of different operations are
//! taken as independent: `n` of them with bounds `e_i` add up to at most `4 * sqrt(sum(e_i^2))` (by Hoeffding's
//! inequality this fails with a probability below `2 * exp(-8)` for the worst distribution, and below `1e-11` for
//! uniformly distributed rounding errors). Errors that are the same function of similar inputs (the scale's rounding,
//! `exp2`, `tanh`) are always added up as they are. Data that is itself regular (all keys alike, constant values,
//! values that all have the same large zero point) rounds the same way in every addition; use [`Rounding::Coherent`] for it.

mod row;

use std::borrow::Cow;

use super::quantise::{Stored, stored};
use super::{BoundedOutput, InvalidProblem, Problem};
use crate::KvFormat;

pub(super) use row::{Element, elements, of_row};

/// How rounding errors of different operations add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rounding {
    /// They are independent: right for random and for real data.
    #[default]
    Independent,
    /// They all have the same sign: for regular data such as repeated, constant or far shifted rows. Much wider for long sequences.
    Coherent,
}

/// Where one side's rows of the cache come from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Source<'a> {
    /// The problem's rows, in this format.
    Format(KvFormat),
    /// What the caller says is there.
    Stored(&'a Stored),
}

/// What lies between the problem's rows and a kernel's result: how K and V are stored, and how rounding errors add up.
///
/// The problem has the rows as they were appended. The expected result is attention over these, and the bound covers what
/// storing them loses besides the errors of the arithmetic:
///
/// ```
/// use folio::KvFormat;
/// use folio::reference::{self, ErrorModel, Options, Problem, compare};
///
/// // Rows as they were appended to a cache with K in Int8 and V in Int4, and one query that sees both.
/// let (q, k) = ([0.5, -1.0, 0.25, 2.0], [0.1, -0.7, 0.3, 1.0, 0.9, 0.2, -0.4, 0.6]);
/// let v = [1.0, 2.0, -3.0, 4.0, 0.5, -0.25, 0.125, 8.0];
/// let options = Options::default();
/// let problem = Problem { num_q_heads: 1, num_kv_heads: 1, head_dim: 4, value_dim: 4, q: &q, k: &k, v: &v, options };
/// let expected = reference::attention_with_bound(&problem, &ErrorModel::new(KvFormat::Int8, KvFormat::Int4))?;
/// assert_eq!(expected.output, reference::attention(&problem)?);
///
/// // What a kernel gave; this one had exact arithmetic.
/// let kept = reference::attention_with_bound(&problem, &ErrorModel::new(KvFormat::Int8, KvFormat::Int4).over_stored())?;
/// let out: Vec<f32> = kept.output.out.iter().map(|&x| x as f32).collect();
/// assert!(compare::out(&expected, &out).is_within());
/// # Ok::<(), reference::InvalidProblem>(())
/// ```
///
/// With [`over_stored`](Self::over_stored) the result is that over the rows as the cache keeps them, and the bound that of the
/// arithmetic alone: several to many thousand times narrower, which is what tests of kernels want.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ErrorModel<'a> {
    k: Source<'a>,
    v: Source<'a>,
    key_scales: Option<&'a [f32]>,
    rounding: Rounding,
    latent: bool,
    over_stored: bool,
    f16_products: bool,
    packed_dots: bool,
    half_results: bool,
}

impl ErrorModel<'_> {
    /// K and V are stored as they are.
    pub const F32: Self = Self::new(KvFormat::F32, KvFormat::F32);
    /// K and V are rounded to `f16`.
    pub const F16: Self = Self::new(KvFormat::F16, KvFormat::F16);
}

impl<'a> ErrorModel<'a> {
    /// K and V are stored in these formats. One with scales per channel needs [`with_key_scales`](Self::with_key_scales) too.
    #[must_use]
    pub const fn new(k_format: KvFormat, v_format: KvFormat) -> Self {
        Self {
            k: Source::Format(k_format),
            v: Source::Format(v_format),
            key_scales: None,
            rounding: Rounding::Independent,
            latent: false,
            over_stored: false,
            f16_products: false,
            packed_dots: false,
            half_results: false,
        }
    }

    /// K's scales per channel, f32 `[2, num_kv_heads, head_dim]`: scales, then zero points, as a calibrated cache gives them
    /// for a layer. Not read if K's format has none.
    #[must_use]
    pub const fn with_key_scales(self, table: &'a [f32]) -> Self {
        Self { key_scales: Some(table), ..self }
    }

    /// K and V are stored as the caller says, shaped like the problem's rows: for bytes that were not made by appending them.
    #[must_use]
    pub const fn with_stored(self, k: &'a Stored, v: &'a Stored) -> Self {
        Self { k: Source::Stored(k), v: Source::Stored(v), ..self }
    }

    /// Values are the first `value_dim` elements of what is stored of the keys, as in a [latent cache](crate::KvCacheConfig::latent). The problem's values
    /// are those of its keys.
    #[must_use]
    pub const fn with_latents(self) -> Self {
        Self { latent: true, ..self }
    }

    /// The same model, for the result of attention over the rows as they are stored instead of as they were.
    #[must_use]
    pub const fn over_stored(self) -> Self {
        Self { over_stored: true, ..self }
    }

    /// The same model for results that are stored as halves: [`AttentionConfig::out_rows`](crate::AttentionConfig::out_rows). The nearest half is at most
    /// `2^-11` of a result away, or `2^-25` where halves are subnormal; a result beyond 65504 becomes that.
    #[must_use]
    pub const fn with_half_results(self) -> Self {
        Self { half_results: true, ..self }
    }

    /// The same model for kernels that multiply halves: queries and weights rounded to `f16`, products summed up in `f32`. That is what
    /// attention does where matrix units are in use.
    #[must_use]
    pub const fn with_f16_products(self) -> Self {
        Self { f16_products: true, ..self }
    }

    /// The same model for kernels that quantise queries where K has codes, to multiply them by packed integer dot products. That is what decode
    /// may do on a device [that allows it](crate::kernel::Target::packed_dots).
    #[must_use]
    pub const fn with_packed_dots(self) -> Self {
        Self { packed_dots: true, ..self }
    }

    /// The same model with another way of adding errors up.
    #[must_use]
    pub const fn with_rounding(self, rounding: Rounding) -> Self {
        Self { rounding, ..self }
    }

    /// Whether the result is that over the rows as they are stored.
    pub(super) const fn is_over_stored(&self) -> bool {
        self.over_stored
    }

    /// Adds what storing results as halves costs, if they are.
    pub(super) fn round_results(&self, mut bounded: BoundedOutput) -> BoundedOutput {
        if self.half_results {
            let results = bounded.output.out.iter();
            bounded.out_bound.iter_mut().zip(results).for_each(|(bound, out)| {
                let largest = out.abs() + *bound;
                let beyond = (largest - 65504.0).max(0.0);
                *bound += (largest * 2.0_f64.powi(-11)).max(2.0_f64.powi(-25)) + beyond;
            });
        }
        bounded
    }

    pub(super) const fn f16_products(&self) -> bool {
        self.f16_products
    }

    /// Where kernels quantise queries: the code that they count K's codes from. Of stored codes whose width nobody says, the bound holds for 4
    /// bits as well.
    pub(super) const fn packed_centre(&self) -> Option<f64> {
        match self.k {
            Source::Format(KvFormat::F32 | KvFormat::F16 | KvFormat::E4M3) => None,
            Source::Format(KvFormat::Int4 | KvFormat::Int4PerChannel) if self.packed_dots => Some(8.0),
            _ if self.packed_dots => Some(128.0),
            _ => None,
        }
    }

    pub(super) const fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// What is stored of the problem's K and V; `None` for a side that is stored as it is.
    pub(super) fn stored(&self, problem: &Problem<'_>) -> Result<[Option<Cow<'a, Stored>>; 2], InvalidProblem> {
        let side = |name: &str, source: Source<'a>, rows: &[f32], row_dim, scales: Option<&[f32]>| match source {
            Source::Format(KvFormat::F32) => Ok(None),
            Source::Format(format) => {
                let stored = stored(format, rows, row_dim, scales);
                stored
                    .map(|stored| Some(Cow::Owned(stored)))
                    .map_err(|e| InvalidProblem { message: format!("{name}: {e}") })
            }
            Source::Stored(stored) if stored.len() == rows.len() => Ok(Some(Cow::Borrowed(stored))),
            Source::Stored(stored) => {
                let message = format!("{name}: {} elements are stored, of rows of {}", stored.len(), rows.len());
                Err(InvalidProblem { message })
            }
        };
        let k = side("k", self.k, problem.k, problem.head_dim, self.key_scales)?;
        let v = if self.latent {
            k.as_ref().map(|k| Cow::Owned(k.first_elements(problem.head_dim, problem.value_dim)))
        } else {
            side("v", self.v, problem.v, problem.value_dim, None)?
        };
        Ok([k, v])
    }
}

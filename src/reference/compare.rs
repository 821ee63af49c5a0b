//! A kernel's result against the oracle's, element by element, under the oracle's bound.

use std::fmt;

use super::{BoundedOutput, Output};

/// Which of the two results is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Weighted values, `[query_len, num_q_heads, value_dim]`.
    Out,
    /// Logarithms of softmax denominators, `[query_len, num_q_heads]`.
    Lse,
}

/// One compared element.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Element {
    /// Query token within the sequence.
    pub row: usize,
    /// Query head.
    pub head: usize,
    /// Element of the head; 0 for [`Quantity::Lse`].
    pub dim: usize,
    /// The kernel's value.
    pub got: f32,
    /// The oracle's value.
    pub want: f64,
    /// How far apart the two may be.
    pub bound: f64,
}

impl Element {
    /// How far apart the values are; 0 for two equal infinities or two NaNs, infinite if only one of them is finite.
    #[must_use]
    pub fn error(&self) -> f64 {
        let got = f64::from(self.got);
        if got == self.want || (got.is_nan() && self.want.is_nan()) {
            0.0
        } else if got.is_finite() && self.want.is_finite() {
            (got - self.want).abs()
        } else {
            f64::INFINITY
        }
    }

    /// Whether the error is within the bound.
    #[must_use]
    pub fn is_within(&self) -> bool {
        self.error() <= self.bound
    }

    /// Error in units of the bound: the order of badness.
    fn badness(&self) -> f64 {
        match self.error() {
            0.0 => 0.0,
            error => error / self.bound,
        }
    }
}

/// The outcome of a comparison.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// What was compared.
    pub quantity: Quantity,
    /// Number of elements in the kernel's result and in the oracle's. If they differ, nothing was compared.
    pub lens: (usize, usize),
    /// Number of elements beyond their bound.
    pub num_beyond: usize,
    /// The element with the largest error in units of its bound.
    pub worst: Option<Element>,
}

/// Compares `got`, a kernel's `out`, f32 `[query_len, num_q_heads, value_dim]`.
#[must_use]
pub fn out(expected: &BoundedOutput, got: &[f32]) -> Comparison {
    let Output { num_q_heads, value_dim, ref out, .. } = expected.output;
    compare(Quantity::Out, got, out, &expected.out_bound, num_q_heads, value_dim)
}

/// Compares `got`, a kernel's `lse`, f32 `[query_len, num_q_heads]`.
#[must_use]
pub fn lse(expected: &BoundedOutput, got: &[f32]) -> Comparison {
    compare(Quantity::Lse, got, &expected.output.lse, &expected.lse_bound, expected.output.num_q_heads, 1)
}

fn compare(
    quantity: Quantity,
    got: &[f32],
    want: &[f64],
    bound: &[f64],
    num_q_heads: usize,
    row_dim: usize,
) -> Comparison {
    let mut comparison = Comparison { quantity, lens: (got.len(), want.len()), num_beyond: 0, worst: None };
    if got.len() != want.len() {
        return comparison;
    }
    let mut worst_badness = -1.0;
    for (idx, ((&got, &want), &bound)) in got.iter().zip(want).zip(bound).enumerate() {
        let (row_and_head, dim) = (idx / row_dim, idx % row_dim);
        let (row, head) = (row_and_head / num_q_heads, row_and_head % num_q_heads);
        let element = Element { row, head, dim, got, want, bound };
        comparison.num_beyond += usize::from(!element.is_within());
        let badness = element.badness();
        if badness > worst_badness {
            worst_badness = badness;
            comparison.worst = Some(element);
        }
    }
    comparison
}

impl Comparison {
    /// Whether the lengths agree and every element is within its bound.
    #[must_use]
    pub fn is_within(&self) -> bool {
        self.lens.0 == self.lens.1 && self.num_beyond == 0
    }

    /// The largest error in units of its bound: up to 1 if all is well.
    #[must_use]
    pub fn badness(&self) -> f64 {
        if self.lens.0 == self.lens.1 { self.worst.map_or(0.0, |worst| worst.badness()) } else { f64::INFINITY }
    }

    /// For tests.
    ///
    /// # Panics
    ///
    /// With the comparison as the message, unless all is [within](Self::is_within) the bounds.
    #[track_caller]
    pub fn assert_within(&self) {
        assert!(self.is_within(), "{self}");
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.quantity {
            Quantity::Out => "out",
            Quantity::Lse => "lse",
        };
        let (got_len, want_len) = self.lens;
        if got_len != want_len {
            return write!(f, "{name}: {got_len} elements, expected {want_len}");
        }
        write!(f, "{name}: {} of {want_len} elements beyond their bound", self.num_beyond)?;
        let Some(worst) = self.worst else { return Ok(()) };
        let Element { row, head, dim, got, want, bound } = worst;
        write!(f, "; worst at head {head}, row {row}")?;
        if self.quantity == Quantity::Out {
            write!(f, ", dim {dim}")?;
        }
        write!(f, ": got {got:e}, want {want:e}, error {:.3e}, bound {bound:.3e}", worst.error())
    }
}

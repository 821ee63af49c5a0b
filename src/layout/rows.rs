//! [`RowLayout`]: how rows of a step's tokens lie in a buffer of the host's.

use crate::error::{Error, Result};

/// How the elements of a host's rows are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RowElement {
    /// 32-bit floats.
    #[default]
    F32,
    /// IEEE halves, two in a word, the first one in its low bits. They are widened to f32 as they are read. Results are rounded to the nearest, ties to
    /// even; finite ones beyond 65504 become that. No device feature is needed.
    F16,
}

impl RowElement {
    /// Bytes of an element.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// How rows lie in a range of a buffer: one row per token and head, whose elements stand side by side. By default they are f32 without gaps,
/// `[num_tokens, num_heads, row_dim]`.
///
/// All numbers are in elements and multiples of 4. With [`with_start`](Self::with_start) and [`with_token_stride`](Self::with_token_stride) the queries
/// of a matrix `[num_tokens, q | k | v]` are read where they lie; with [`with_head_stride`](Self::with_head_stride) matrices `[num_tokens, num_heads, q | k
/// | v]` (as GPT-NeoX has them) and, with room for a fixed number of tokens, `[num_heads, max_tokens, row_dim]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct RowLayout {
    /// How elements are stored.
    pub element: RowElement,
    /// Elements before the row of token 0 and head 0.
    pub start: u32,
    /// Elements from a token's row to that of the next token and the same head. `None`: `num_heads * row_dim`.
    pub token_stride: Option<u32>,
    /// Elements from a head's row to that of the next head of the same token. `None`: `row_dim`.
    pub head_stride: Option<u32>,
}

impl RowLayout {
    /// Rows of f32 without gaps.
    pub const DENSE: Self = Self { element: RowElement::F32, start: 0, token_stride: None, head_stride: None };

    /// The same with halves.
    #[must_use]
    pub const fn with_element(self, element: RowElement) -> Self {
        Self { element, ..self }
    }

    /// The same with its first row behind `start` elements.
    #[must_use]
    pub const fn with_start(self, start: u32) -> Self {
        Self { start, ..self }
    }

    /// The same with another distance between tokens.
    #[must_use]
    pub const fn with_token_stride(self, stride: u32) -> Self {
        Self { token_stride: Some(stride), ..self }
    }

    /// The same with another distance between the heads of a token.
    #[must_use]
    pub const fn with_head_stride(self, stride: u32) -> Self {
        Self { head_stride: Some(stride), ..self }
    }

    /// Checks the numbers. `argument` is what errors name.
    pub(crate) fn validate(&self, argument: &'static str) -> Result<()> {
        let strides = self.token_stride.into_iter().chain(self.head_stride);
        match strides.chain([self.start]).find(|number| !number.is_multiple_of(4)) {
            Some(number) => Err(Error::argument(argument, format!("{number} in {self:?}"), "multiples of 4 elements")),
            None => Ok(()),
        }
    }

    /// The layout of rows of `num_heads` heads and `row_dim` elements.
    #[must_use]
    pub fn resolve(&self, num_heads: u32, row_dim: u32) -> HostRows {
        HostRows {
            halves: self.element == RowElement::F16,
            start: self.start,
            token_stride: self.token_stride.unwrap_or(num_heads.saturating_mul(row_dim)),
            head_stride: self.head_stride.unwrap_or(row_dim),
            num_heads,
            row_dim,
        }
    }
}

/// A [`RowLayout`] of rows whose number of heads and length are known. All numbers are in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostRows {
    /// Whether elements are halves.
    pub halves: bool,
    /// Elements before the first row.
    pub start: u32,
    /// From a token to the next.
    pub token_stride: u32,
    /// From a head to the next.
    pub head_stride: u32,
    /// Rows of a token.
    pub num_heads: u32,
    /// Elements of a row.
    pub row_dim: u32,
}

impl HostRows {
    /// Whether there is anything but the rows one after another.
    #[must_use]
    pub fn strided(&self) -> bool {
        self.start != 0
            || self.head_stride != self.row_dim
            || u64::from(self.token_stride) != u64::from(self.num_heads) * u64::from(self.row_dim)
    }

    /// Words of 4 bytes of a buffer that holds the rows of `num_tokens` tokens, up to the last element.
    #[must_use]
    pub fn words(&self, num_tokens: u32) -> u64 {
        let last = |count: u32, stride: u32| u64::from(count.saturating_sub(1)) * u64::from(stride);
        let end = last(num_tokens, self.token_stride)
            .saturating_add(last(self.num_heads, self.head_stride))
            .saturating_add(u64::from(self.start) + u64::from(self.row_dim));
        if num_tokens == 0 || self.num_heads == 0 {
            0
        } else if self.halves {
            end.div_ceil(2)
        } else {
            end
        }
    }

    /// Checks that no two rows of `num_tokens` tokens share an element, as rows that are written must not. `argument` is what errors name.
    pub(crate) fn check_apart(&self, argument: &'static str, num_tokens: u32) -> Result<()> {
        let mut axes = [(self.token_stride, num_tokens), (self.head_stride, self.num_heads)];
        axes.sort_unstable();
        let mut extent = u64::from(self.row_dim);
        for (stride, count) in axes.into_iter().filter(|&(_, count)| count > 1) {
            if u64::from(stride) < extent {
                let got = format!("{num_tokens} tokens in {self:?}");
                return Err(Error::argument(argument, got, "rows that don't overlap"));
            }
            extent += u64::from(stride) * u64::from(count - 1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    #[test]
    fn rows_without_gaps() {
        let rows = RowLayout::DENSE.resolve(3, 16);
        assert!(!rows.strided());
        assert_eq!(rows.words(5), 5 * 3 * 16);
        assert_eq!(RowLayout::DENSE.with_element(RowElement::F16).resolve(3, 16).words(5), 5 * 3 * 8);
        assert_eq!(rows.words(0), 0);
        rows.check_apart("rows", 5).unwrap();
    }

    #[test]
    fn a_column_of_a_matrix() {
        let rows = RowLayout::DENSE.with_start(32).with_token_stride(80).resolve(2, 16);
        assert!(rows.strided());
        // The last row ends before its line does.
        assert_eq!(rows.words(3), 32 + 2 * 80 + 32);
        rows.check_apart("rows", 3).unwrap();
    }

    #[test]
    fn heads_before_tokens() {
        let rows = RowLayout::DENSE.with_token_stride(16).with_head_stride(10 * 16).resolve(2, 16);
        rows.check_apart("rows", 10).unwrap();
        rows.check_apart("rows", 11).unwrap_err();
    }

    #[test]
    fn rows_that_overlap() {
        for layout in [
            RowLayout::DENSE.with_token_stride(0),
            RowLayout::DENSE.with_token_stride(16),
            RowLayout::DENSE.with_head_stride(8),
            RowLayout::DENSE.with_head_stride(0),
        ] {
            layout.resolve(2, 16).check_apart("rows", 2).unwrap_err();
        }
        // One token, or one head, has no neighbour.
        RowLayout::DENSE.with_token_stride(0).resolve(2, 16).check_apart("rows", 1).unwrap();
        RowLayout::DENSE.with_head_stride(0).resolve(1, 16).check_apart("rows", 2).unwrap();
        RowLayout::DENSE
            .with_token_stride(u32::MAX - 3)
            .resolve(u32::MAX, u32::MAX)
            .check_apart("rows", u32::MAX)
            .unwrap_err();
    }

    #[test]
    fn numbers_are_whole_vec4s() {
        let error = RowLayout::DENSE.with_start(6).validate("q_rows").unwrap_err();
        assert!(error.to_string().contains("q_rows"), "{error}");
        RowLayout::DENSE.with_start(u32::MAX - 3).validate("q_rows").unwrap();
        // As much as it may be, without overflow.
        let rows = RowLayout::DENSE.with_start(u32::MAX).resolve(u32::MAX, u32::MAX);
        assert!(rows.words(u32::MAX) > 1 << 62);
    }
}

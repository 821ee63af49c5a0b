//! The types of a checkpoint's elements, and their conversion to f32.

use std::fmt;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use safetensors::Dtype;

use super::gguf::BlockType;

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ElementType {
    /// One by one.
    Plain(Dtype),
    /// In blocks that share scales.
    Blocks(BlockType),
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => write!(f, "{dtype:?}"),
            Self::Blocks(kind) => write!(f, "{kind}"),
        }
    }
}

impl ElementType {
    /// Whether [`Elements`] converts it.
    pub(super) fn is_readable(self) -> bool {
        matches!(self, Self::Blocks(_) | Self::Plain(Dtype::F32 | Dtype::F16 | Dtype::BF16))
    }

    /// Bytes of that many elements, rounded up to whole ones; of a part of a block, its share.
    pub(super) fn bytes(self, elements: u64) -> u64 {
        match self {
            Self::Plain(dtype) => elements.saturating_mul(dtype.bitsize() as u64).div_ceil(8),
            Self::Blocks(kind) => elements.saturating_mul(kind.bytes() as u64).div_ceil(kind.len() as u64),
        }
    }
}

/// A tensor's elements, as they lie in the file.
pub(super) struct Elements<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) kind: ElementType,
    /// If the bytes are codes: see [`Mxfp4`].
    pub(super) scales: Option<&'a [u8]>,
}

/// MXFP4 ([OCP Microscaling Formats 1.0](https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf)): codes of four bits, two in
/// a byte, the lower bits first, and for 32 of them a scale, which is a power of two.
pub(super) struct Mxfp4<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
}

impl Mxfp4<'_> {
    /// Elements that share a scale.
    pub(super) const GROUP: usize = 32;

    /// E2M1: the values of codes 0 to 7; 8 to 15 are the same with a sign.
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

    /// E8M0: the exponent with a bias of 127; 255 is NaN.
    fn scale(byte: u8) -> f64 {
        if byte == u8::MAX { f64::NAN } else { 2f64.powi(i32::from(byte) - 127) }
    }

    #[allow(clippy::cast_possible_truncation, reason = "a product of two powers of two and a digit, rounded to f32")]
    fn read(&self, first: usize, out: &mut [f32]) {
        for (i, out) in (first..).zip(out) {
            let code = self.codes[i / 2] >> (4 * (i % 2)) & 15;
            let value = f64::from(Self::VALUES[usize::from(code & 7)]) * Self::scale(self.scales[i / Self::GROUP]);
            *out = if code < 8 { value } else { -value } as f32;
        }
    }
}

impl Elements<'_> {
    /// Consecutive elements from `first` on.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) {
        if let Some(scales) = self.scales {
            return Mxfp4 { codes: self.bytes, scales }.read(first, out);
        }
        match self.kind {
            ElementType::Blocks(kind) => kind.read(self.bytes, first, out),
            ElementType::Plain(Dtype::F32) => {
                let (words, _) = self.bytes[first * 4..][..out.len() * 4].as_chunks();
                for (out, word) in out.iter_mut().zip(words) {
                    *out = f32::from_le_bytes(*word);
                }
            }
            ElementType::Plain(dtype) => {
                let (words, _) = self.bytes[first * 2..][..out.len() * 2].as_chunks();
                // The library converts slices with the CPU's own instructions, but needs them aligned, which files are not.
                const LEN: usize = 256;
                let mut aligned = [0; LEN];
                for (out, words) in out.chunks_mut(LEN).zip(words.chunks(LEN)) {
                    let aligned = &mut aligned[..out.len()];
                    for (to, word) in aligned.iter_mut().zip(words) {
                        *to = u16::from_le_bytes(*word);
                    }
                    match dtype {
                        Dtype::BF16 => aligned.reinterpret_cast::<bf16>().convert_to_f32_slice(out),
                        _ => aligned.reinterpret_cast::<f16>().convert_to_f32_slice(out),
                    }
                }
            }
        }
    }

    /// Columns `first..` of a matrix with `stride` columns, as rows of `height`, as many as fit.
    pub(super) fn transposed(&self, first: usize, stride: usize, height: usize, out: &mut [f32]) {
        // A tile of 16 rows of the file by 64 elements: 4 KiB, written as whole cache lines of 16 f32.
        const TALL: usize = 16;
        const WIDE: usize = 64;
        let mut tile = [0.0; TALL * WIDE];
        for (strip, rows) in out.chunks_mut(WIDE * height).enumerate() {
            let wide = rows.len() / height;
            for top in (0..height).step_by(TALL) {
                let tall = TALL.min(height - top);
                for (i, line) in tile.chunks_mut(WIDE).take(tall).enumerate() {
                    self.read((top + i) * stride + first + strip * WIDE, &mut line[..wide]);
                }
                for (j, row) in rows.chunks_mut(height).enumerate() {
                    for (i, out) in row[top..top + tall].iter_mut().enumerate() {
                        *out = tile[i * WIDE + j];
                    }
                }
            }
        }
    }
}

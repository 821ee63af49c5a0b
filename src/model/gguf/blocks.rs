//! [`BlockType`]: GGML's block formats, and their conversion to f32.
//!
//! The layouts are those of `ggml-common.h` and `ggml-quants.c` in llama.cpp (`block_q4_0` and so on, `dequantize_row_*`). Products and sums are
//! rounded to f32 in the order of that code, so that values are the same to the bit.

use std::fmt;

use half::f16;

use super::super::WeightGrid;

/// Elements of the largest block.
const MAX_LEN: usize = 256;

/// Elements that share a grid.
const GRID_LEN: usize = WeightGrid::GROUP_SIZE as usize;

/// A format in which blocks of 32 or 256 elements share scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockType {
    /// 32 elements: `d * (q - 8)`, q of 4 bits.
    Q4_0,
    /// 32 elements: `d * q + m`, q of 4 bits.
    Q4_1,
    /// 32 elements: `d * (q - 16)`, q of 5 bits.
    Q5_0,
    /// 32 elements: `d * q + m`, q of 5 bits.
    Q5_1,
    /// 32 elements: `d * q`, q from -128 to 127.
    Q8_0,
    /// 256 elements, in groups of 16: `d * scale * q - dmin * min`, q of 2 bits, scale and min of 4.
    Q2K,
    /// 256 elements, in groups of 16: `d * (scale - 32) * (q - 4)`, q of 3 bits, scale of 6.
    Q3K,
    /// 256 elements, in groups of 32: `d * scale * q - dmin * min`, q of 4 bits, scale and min of 6.
    Q4K,
    /// The same with q of 5 bits.
    Q5K,
    /// 256 elements, in groups of 16: `d * scale * (q - 32)`, q of 6 bits, scale from -128 to 127.
    Q6K,
    /// 32 elements: `d * value`, values by 4 bits out of [`IQ4_VALUES`].
    Iq4Nl,
    /// 256 elements, in groups of 32: `d * (scale - 32) * value`, scale of 6 bits, values as before.
    Iq4Xs,
    /// 32 elements: `2^(e - 128) * value`, values by 4 bits out of [`MXFP4_VALUES`], which are twice those of the standard.
    Mxfp4,
}

/// Values of codes, not equally far apart, so that more lie where weights are dense.
const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// E2M1, doubled to be whole.
const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
            Self::Iq4Xs => "IQ4_XS",
            Self::Mxfp4 => "MXFP4",
        })
    }
}

/// A half at a byte of a block.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Scale and min of group `j` of 8 out of the 12 bytes that Q4_K and Q5_K share: the first four pairs have 6 bits of bytes 0..4 and 4..8; the other four
/// have 4 bits of bytes 8..12, and the 2 upper bits of the first eight bytes.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let low = packed[j + 4];
        (low & 15 | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4)
    };
    (scale.into(), min.into())
}

impl BlockType {
    /// Elements of a block.
    pub(crate) const fn len(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Iq4Nl | Self::Mxfp4 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::Iq4Xs => MAX_LEN,
        }
    }

    /// Bytes of a block.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            // A half or two; 5-bit ones have 32 fifth bits; then 32 times 4 or 8 bits.
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            // 16 bytes of scales, 256 times 2 bits, two halfs.
            Self::Q2K => 16 + 64 + 4,
            // 256 times 1 bit and 2 bits, 12 bytes of scales, a half.
            Self::Q3K => 32 + 64 + 12 + 2,
            // Two halfs and 12 bytes of scales; 256 times 4 bits, and the fifth.
            Self::Q4K => 4 + 12 + 128,
            Self::Q5K => 4 + 12 + 32 + 128,
            // 256 times 4 bits and 2 bits, 16 scales, a half.
            Self::Q6K => 128 + 64 + 16 + 2,
            // A half; 32 times 4 bits.
            Self::Iq4Nl => 2 + 16,
            // A half, the upper 2 bits of 8 scales, the lower 4; 256 times 4 bits.
            Self::Iq4Xs => 2 + 2 + 4 + 128,
            // The exponent; 32 times 4 bits.
            Self::Mxfp4 => 1 + 16,
        }
    }

    /// Consecutive elements from `first` on. `bytes` are whole blocks with at least as many elements.
    pub(crate) fn read(self, bytes: &[u8], first: usize, out: &mut [f32]) {
        let mut values = [0.0; MAX_LEN];
        let (mut at, mut rest) = (first, out);
        while !rest.is_empty() {
            let within = at % self.len();
            self.decode(&bytes[at / self.len() * self.bytes()..][..self.bytes()], &mut values);
            let run = (self.len() - within).min(rest.len());
            let (now, later) = rest.split_at_mut(run);
            now.copy_from_slice(&values[within..within + run]);
            (at, rest) = (at + run, later);
        }
    }

    /// All elements of a block.
    fn decode(self, block: &[u8], out: &mut [f32; MAX_LEN]) {
        match self {
            Self::Q4_0 => decode_small(block, None, 2, 8, half_at(block, 0), -0.0, out),
            Self::Q4_1 => decode_small(block, None, 4, 0, half_at(block, 0), half_at(block, 2), out),
            Self::Q5_0 => decode_small(block, Some(2), 6, 16, half_at(block, 0), -0.0, out),
            Self::Q5_1 => decode_small(block, Some(4), 8, 0, half_at(block, 0), half_at(block, 2), out),
            Self::Q8_0 => {
                let d = half_at(block, 0);
                for (out, q) in out.iter_mut().zip(&block[2..]) {
                    *out = d * f32::from(q.cast_signed());
                }
            }
            Self::Q2K => {
                let (scales, codes, d, dmin) = (&block[..16], &block[16..80], half_at(block, 80), half_at(block, 82));
                for (i, out) in out.iter_mut().enumerate() {
                    let (scale, min) = (f32::from(scales[i / 16] & 15), f32::from(scales[i / 16] >> 4));
                    *out = d * scale * f32::from(two_bits(codes, i)) - dmin * min;
                }
            }
            Self::Q3K => {
                let (third, codes, scales, d) = (&block[..32], &block[32..96], &block[96..108], half_at(block, 108));
                for (i, out) in out.iter_mut().enumerate() {
                    let group = i / 16;
                    let low = scales[group % 8] >> (group / 8 * 4) & 15;
                    let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
                    let scale = f32::from(low | high << 4) - 32.0;
                    let q = two_bits(codes, i) | (third[i % 32] >> (i / 32) & 1) << 2;
                    *out = d * scale * (f32::from(q) - 4.0);
                }
            }
            Self::Q4K | Self::Q5K => {
                let (d, dmin, scales) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
                let (fifth, nibbles) =
                    if self == Self::Q5K { (Some(&block[16..48]), &block[48..]) } else { (None, &block[16..]) };
                for (j, out) in out.chunks_mut(32).enumerate() {
                    let (scale, min) = scale_and_min(scales, j);
                    let (scale, min) = (d * scale, dmin * min);
                    for (k, out) in out.iter_mut().enumerate() {
                        let low = nibbles[j / 2 * 32 + k] >> (4 * (j % 2)) & 15;
                        let high = fifth.map_or(0, |bits| bits[k] >> j & 1);
                        *out = scale * f32::from(low | high << 4) - min;
                    }
                }
            }
            Self::Q6K => {
                let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
                // Halves of 128: 64 bytes of lower bits, first all lower nibbles; 32 bytes of upper bits, 2 for each quarter.
                for (i, out) in out.iter_mut().enumerate() {
                    let (half, k) = (i / 128, i % 128);
                    let low = low[half * 64 + k % 64] >> (k / 64 * 4) & 15;
                    let high = high[half * 32 + k % 32] >> (k / 32 * 2) & 3;
                    let q = f32::from(low | high << 4) - 32.0;
                    *out = d * f32::from(scales[i / 16].cast_signed()) * q;
                }
            }
            Self::Iq4Nl => decode_by_table(&block[2..], &IQ4_VALUES, half_at(block, 0), &mut out[..32]),
            Self::Iq4Xs => {
                let (d, high, low) = (half_at(block, 0), u16::from_le_bytes([block[2], block[3]]), &block[4..8]);
                for (j, (codes, out)) in block[8..].chunks(16).zip(out.chunks_mut(32)).enumerate() {
                    let low = u16::from(low[j / 2] >> (j % 2 * 4) & 15);
                    let scale = f32::from(low | (high >> (2 * j) & 3) << 4) - 32.0;
                    decode_by_table(codes, &IQ4_VALUES, d * scale, out);
                }
            }
            Self::Mxfp4 => {
                // 2^(e - 128): the exponent of f32 has a bias of 127, and 2^-128 and 2^-127 are subnormal.
                let e = u32::from(block[0]);
                let scale = f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 });
                decode_by_table(&block[1..], &MXFP4_VALUES, scale, &mut out[..32]);
            }
        }
    }

    /// The grids of consecutive groups of 32 elements, from group `first` on, if the type has 16 values per group. Others leave `out` as it is.
    pub(crate) fn grids(self, bytes: &[u8], first: usize, out: &mut [Option<WeightGrid>]) {
        let per_block = self.len() / GRID_LEN;
        for (group, out) in (first..).zip(out) {
            let block = &bytes[group / per_block * self.bytes()..][..self.bytes()];
            let d = half_at(block, 0);
            *out = match self {
                Self::Q4_0 => Some(WeightGrid { scale: d, min: d * -8.0 }),
                Self::Q4_1 => Some(WeightGrid { scale: d, min: half_at(block, 2) }),
                Self::Q4K => {
                    let (scale, min) = scale_and_min(&block[4..16], group % per_block);
                    Some(WeightGrid { scale: d * scale, min: -(half_at(block, 2) * min) })
                }
                Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Q5K | Self::Q6K => return,
                // Groups of 16 have values of their own.
                Self::Q2K | Self::Q3K => return,
                // Values are not equally far apart.
                Self::Iq4Nl | Self::Iq4Xs | Self::Mxfp4 => return,
            };
        }
    }
}

/// A block of 32 whose codes have 4 bits, or 5 with the fifth bits at `fifth`: element i is in the lower nibble of byte i, element 16 + i in the upper.
/// `m` is -0 for none: adding it changes nothing, not even the sign of a zero.
fn decode_small(
    block: &[u8],
    fifth: Option<usize>,
    nibbles: usize,
    zero: u8,
    d: f32,
    m: f32,
    out: &mut [f32; MAX_LEN],
) {
    for (i, out) in out[..32].iter_mut().enumerate() {
        let low = block[nibbles + i % 16] >> (i / 16 * 4) & 15;
        let high = fifth.map_or(0, |at| block[at + i / 8] >> (i % 8) & 1);
        *out = d * (f32::from(low | high << 4) - f32::from(zero)) + m;
    }
}

/// Code `i` of 2 bits: of each 32 bytes, first the lowest bits of all, then the next ones.
fn two_bits(codes: &[u8], i: usize) -> u8 {
    codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

/// 32 codes of 4 bits, in order as for [`decode_small`], that stand for values of a table.
fn decode_by_table(codes: &[u8], values: &[i8; 16], scale: f32, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        let code = codes[i % 16] >> (i / 16 * 4) & 15;
        *out = scale * f32::from(values[usize::from(code)]);
    }
}

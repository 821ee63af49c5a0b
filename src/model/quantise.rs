//! [`WeightFormat`]: how the weights of a linear layer are stored, and the packing of f32 rows into it.

use std::fmt;
use std::str::FromStr;

use half::slice::HalfFloatSliceExt;

use super::error::{ModelError, ModelResult};
use crate::{Error, Result};

/// How the weights of a linear layer are stored on the GPU. Products are summed in f32 whatever the format.
///
/// The integer formats are weight-only quantisation in groups: `group_size` consecutive inputs of an output share a scale, as in
/// GGML's `Q8_0` and `Q4_1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightFormat {
    /// 32 bits: what the checkpoint has, exactly.
    F32,
    /// 16 bits, IEEE half: relative error 2^-11 down to 6.1e-5, absolute error 3e-8 below that. A finite weight beyond 65504 is refused.
    F16,
    /// 8 bits and an f32 scale per group, symmetric: `q * scale`, q in -127..=127, `scale = max|w| / 127`. Absolute error at most
    /// `scale / 2`, plus rounding of 2^-22 relative to the group's largest value.
    Int8 {
        /// Inputs that share a scale: a multiple of 32.
        group_size: u32,
    },
    /// 4 bits, a bf16 scale and a bf16 minimum per group, affine: `q * scale + min`, q in 0..=15. Both are rounded so that the group's
    /// range lies within `min ..= min + 15 * scale`. Absolute error at most `scale / 2`, where `scale <= (max - min + |min| / 128) * (1 + 1/128) / 15`,
    /// plus rounding of 2^-22 relative to the group's largest value.
    ///
    /// With groups of 32, weights that come from 16 values at equal distances keep them: see [`WeightGrid`].
    Int4 {
        /// Inputs that share a scale and a minimum: a multiple of 32.
        group_size: u32,
    },
}

/// 16 values at equal distances, on which a group of 32 weights lies: `q * scale + min`, q in 0..=15. What weights that were quantised before are made of.
///
/// [`WeightFormat::Int4`] with groups of 32 takes it instead of what it finds by the smallest and the largest weight: scale and min are rounded to bf16, and
/// each weight becomes the nearest of the values. It is off by at most `2^-8 (8 |scale| + |v|)`, v the smallest of the 16 values, where it is off by
/// half a scale without.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightGrid {
    /// Distance of neighbours; may be negative.
    pub scale: f32,
    /// The value of code 0.
    pub min: f32,
}

impl WeightGrid {
    /// Weights that share one.
    pub const GROUP_SIZE: u32 = 32;

    /// The same values with a scale of at least 0, as bf16 hold them. `None` if they don't.
    fn rounded(self) -> Option<Self> {
        let Self { scale, min } =
            if self.scale < 0.0 { Self { scale: -self.scale, min: self.min + 15.0 * self.scale } } else { self };
        let round = |value: f32| half::bf16::from_f32(value).to_f32();
        // The device takes smaller scales for zero.
        let rounded = Some(round(scale)).filter(|scale| *scale >= f32::MIN_POSITIVE).unwrap_or(0.0);
        // What the scale is off by adds up to 15 times that: half of it to either side.
        let (scale, min) = (rounded, round(min + 7.5 * (scale - rounded)));
        (scale.is_finite() && min.is_finite()).then_some(Self { scale, min })
    }
}

/// Rows are padded with zeros to a multiple of this many inputs, so that kernels read up to 32 at a time without looking for the end of W.
const PADDING: u32 = 32;

/// Bytes of a pack, the unit that kernels load: 128 bits of weights.
const PACK_BYTES: u32 = 16;

/// The largest finite half.
const MAX_F16: f32 = 65504.0;

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Int8 { .. } => "Int8",
            Self::Int4 { .. } => "Int4",
        })
    }
}

impl FromStr for WeightFormat {
    type Err = Error;

    /// The name in any case: `"int4"`; quantised ones with groups of 32.
    fn from_str(name: &str) -> Result<Self, Error> {
        match name.to_ascii_lowercase().as_str() {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "int8" => Ok(Self::INT8),
            "int4" => Ok(Self::INT4),
            _ => Err(Error::argument("format", format!("{name:?}"), "f32, f16, int8 or int4")),
        }
    }
}

impl WeightFormat {
    /// [`WeightFormat::Int8`] with the usual groups of 32.
    pub const INT8: Self = Self::Int8 { group_size: 32 };
    /// [`WeightFormat::Int4`] with the usual groups of 32.
    pub const INT4: Self = Self::Int4 { group_size: 32 };

    /// Bytes of a matrix `[out_features, in_features]`: weights, scales, and the padding of its rows to 32 inputs and 4 scales.
    #[must_use]
    pub fn bytes(self, out_features: u32, in_features: u32) -> u64 {
        let row = u64::from(self.row_packs(in_features)) * u64::from(PACK_BYTES)
            + u64::from(self.row_groups(in_features)) * 4;
        u64::from(out_features) * row
    }

    /// The values that the format stores for a row of weights: what a layer computes with.
    ///
    /// # Errors
    /// [`ModelError::Weight`] if a weight doesn't fit F16; [`Error::Argument`] if the group size is not a multiple of 32.
    pub fn round_trip(self, row: &[f32]) -> ModelResult<Vec<f32>> {
        self.round_trip_on(row, &[])
    }

    /// [`WeightFormat::round_trip`] of weights that lie on grids: one per group of 32, or none at all.
    ///
    /// # Errors
    /// Those of [`WeightFormat::round_trip`].
    pub fn round_trip_on(self, row: &[f32], grids: &[Option<WeightGrid>]) -> ModelResult<Vec<f32>> {
        self.check()?;
        let in_features =
            u32::try_from(row.len()).map_err(|_| ModelError::argument("weights", row.len(), "fewer than 2^32"))?;
        let packer = Packer::new(self, in_features, 1);
        let mut packed = Packed::default();
        packer.pack(row, grids, 0, &mut packed)?;
        let per_pack = self.pack_weights() as usize;
        let value = |(k, _): (usize, &f32)| {
            let words = &packed.packs[k / per_pack * 4..][..4];
            let e = k % per_pack;
            let group = |group_size: u32| packed.scales[k / group_size as usize];
            match self {
                Self::F32 => f32::from_bits(words[e]),
                Self::F16 => half::f16::from_bits((words[e / 2] >> (16 * (e % 2))) as u16).to_f32(),
                Self::Int8 { group_size } => {
                    (f32::from((words[e / 4] >> (8 * (e % 4))) as u8) - 128.0) * f32::from_bits(group(group_size))
                }
                Self::Int4 { group_size } => {
                    let word = group(group_size);
                    let q = (words[e / 8] >> (4 * (e % 8))) & 15;
                    q as f32 * f32::from_bits(word & 0xffff_0000) + f32::from_bits(word << 16)
                }
            }
        };
        Ok(row.iter().enumerate().map(value).collect())
    }

    /// # Errors
    /// [`Error::Argument`] if the group size is not a multiple of 32.
    pub(crate) fn check(self) -> Result<()> {
        match self.group_size() {
            Some(size) if size == 0 || !size.is_multiple_of(PADDING) => {
                Err(Error::argument("group_size", size, "a multiple of 32"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn group_size(self) -> Option<u32> {
        match self {
            Self::F32 | Self::F16 => None,
            Self::Int8 { group_size } | Self::Int4 { group_size } => Some(group_size),
        }
    }

    pub(crate) fn shader_name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 { .. } => "int8",
            Self::Int4 { .. } => "int4",
        }
    }

    /// Weights of a pack of 16 bytes.
    pub(crate) fn pack_weights(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::F16 => 8,
            Self::Int8 { .. } => 16,
            Self::Int4 { .. } => 32,
        }
    }

    /// Packs of a row, with its padding.
    pub(crate) fn row_packs(self, in_features: u32) -> u32 {
        in_features.div_ceil(PADDING) * (PADDING / self.pack_weights())
    }

    /// Grids of a row, if the format takes them.
    pub(crate) fn row_grids(self, in_features: u32) -> u32 {
        if self == Self::INT4 { in_features.div_ceil(WeightGrid::GROUP_SIZE) } else { 0 }
    }

    /// Scales of a row, with its padding: they are loaded four at a time.
    pub(crate) fn row_groups(self, in_features: u32) -> u32 {
        self.group_size().map_or(0, |size| in_features.div_ceil(size).next_multiple_of(4))
    }
}

/// Packs rows of f32 for the kernels: in blocks of `lanes` rows, as `[blocks, row_packs, lanes]` packs of four words and
/// `[blocks, row_groups / 4, lanes]` times four words of scales. With one lane that is row by row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packer {
    format: WeightFormat,
    in_features: usize,
    lanes: usize,
    pub(crate) row_packs: usize,
    pub(crate) row_groups: usize,
    pub(crate) row_grids: usize,
}

/// Packed rows of a matrix.
#[derive(Debug, Default)]
pub(crate) struct Packed {
    pub(crate) packs: Vec<u32>,
    pub(crate) scales: Vec<u32>,
    halfs: Vec<half::f16>,
}

impl Packer {
    pub(crate) fn new(format: WeightFormat, in_features: u32, lanes: u32) -> Self {
        Self {
            format,
            in_features: in_features as usize,
            lanes: lanes as usize,
            row_packs: format.row_packs(in_features) as usize,
            row_groups: format.row_groups(in_features) as usize,
            row_grids: format.row_grids(in_features) as usize,
        }
    }

    /// Appends whole rows; the last block is filled up with rows of zeros. `grids` are `row_grids` for each row, or fewer: rows without them have none.
    /// `first_row` is the number of the first, for the error.
    ///
    /// # Errors
    /// [`ModelError::Weight`] if a weight is finite and doesn't fit F16.
    pub(crate) fn pack(
        &self,
        rows: &[f32],
        grids: &[Option<WeightGrid>],
        first_row: u32,
        packed: &mut Packed,
    ) -> ModelResult<()> {
        for (block, rows) in rows.chunks(self.in_features * self.lanes).enumerate() {
            let (packs, scales) = (packed.packs.len(), packed.scales.len());
            packed.packs.resize(packs + self.row_packs * self.lanes * 4, 0);
            packed.scales.resize(scales + self.row_groups * self.lanes, 0);
            for (lane, row) in rows.chunks(self.in_features).enumerate() {
                let packs = Interleaved { words: &mut packed.packs[packs..], lanes: self.lanes, lane };
                match self.format {
                    WeightFormat::F32 => pack_f32(row, packs),
                    WeightFormat::F16 => {
                        if let Some(k) = row.iter().position(|w| w.is_finite() && w.abs() > MAX_F16) {
                            let at = u64::from(first_row) + (block * self.lanes + lane) as u64;
                            return Err(ModelError::Weight { tensor: None, value: row[k], row: at, column: k });
                        }
                        packed.halfs.resize(self.in_features, half::f16::ZERO);
                        packed.halfs.convert_from_f32_slice(row);
                        pack_f16(&packed.halfs, packs);
                    }
                    WeightFormat::Int8 { group_size } => {
                        let scales = Interleaved { words: &mut packed.scales[scales..], lanes: self.lanes, lane };
                        pack_int8(row, group_size as usize, packs, scales);
                    }
                    WeightFormat::Int4 { group_size } => {
                        let scales = Interleaved { words: &mut packed.scales[scales..], lanes: self.lanes, lane };
                        let at = (block * self.lanes + lane) * self.row_grids;
                        let grids = grids.get(at..at + self.row_grids).unwrap_or_default();
                        pack_int4(row, group_size as usize, grids, packs, scales);
                    }
                }
            }
        }
        Ok(())
    }
}

/// A row's packs within its block.
struct Interleaved<'a> {
    words: &'a mut [u32],
    lanes: usize,
    lane: usize,
}

impl Interleaved<'_> {
    fn set_word(&mut self, i: usize, word: u32) {
        self.words[(i / 4 * self.lanes + self.lane) * 4 + i % 4] = word;
    }

    fn set(&mut self, pack: usize, words: [u32; 4]) {
        let at = (pack * self.lanes + self.lane) * 4;
        self.words[at..at + 4].copy_from_slice(&words);
    }
}

fn pack_f32(row: &[f32], mut out: Interleaved<'_>) {
    for (pack, weights) in row.chunks(4).enumerate() {
        let mut words = [0; 4];
        words.iter_mut().zip(weights).for_each(|(word, weight)| *word = weight.to_bits());
        out.set(pack, words);
    }
}

fn pack_f16(row: &[half::f16], mut out: Interleaved<'_>) {
    for (pack, weights) in row.chunks(8).enumerate() {
        let mut words = [0; 4];
        weights
            .iter()
            .enumerate()
            .for_each(|(e, weight)| words[e / 2] |= u32::from(weight.to_bits()) << (16 * (e % 2)));
        out.set(pack, words);
    }
}

fn pack_int8(row: &[f32], group_size: usize, mut out: Interleaved<'_>, mut scales: Interleaved<'_>) {
    for (group, weights) in row.chunks(group_size).enumerate() {
        // `max` of f32 ignores NaN, which must reach the logits.
        let finite = weights.iter().all(|w| w.is_finite());
        let max = weights.iter().fold(0.0_f32, |max, w| max.max(w.abs()));
        let scale = if finite { max / 127.0 } else { f32::NAN };
        // A scale below the normal range would lose its own digits, or be taken for zero by the device.
        let scale = if scale.is_subnormal() { 0.0 } else { scale };
        scales.set_word(group, scale.to_bits());
        let scale = if scale > 0.0 { scale } else { f32::INFINITY };
        for (i, weights) in weights.chunks(16).enumerate() {
            let mut words = [0; 4];
            for (e, weight) in weights.iter().enumerate() {
                // Kept as q + 128: unsigned bytes are cheaper to widen.
                let q = (weight / scale).round().clamp(-127.0, 127.0) + 128.0;
                words[e / 4] |= u32::from(q as u8) << (8 * (e % 4));
            }
            out.set(group * group_size / 16 + i, words);
        }
    }
}

fn pack_int4(
    row: &[f32],
    group_size: usize,
    grids: &[Option<WeightGrid>],
    mut out: Interleaved<'_>,
    mut scales: Interleaved<'_>,
) {
    for (group, weights) in row.chunks(group_size).enumerate() {
        let finite = weights.iter().all(|w| w.is_finite());
        let given = grids.get(group).copied().flatten().and_then(WeightGrid::rounded);
        let WeightGrid { scale, min } = given.unwrap_or_else(|| grid_around(weights));
        let (scale, min) = if finite { (scale, min) } else { (f32::NAN, f32::NAN) };
        scales.set_word(group, (scale.to_bits() & 0xffff_0000) | (min.to_bits() >> 16));
        let inverse = if scale > 0.0 { 1.0 / f64::from(scale) } else { 0.0 };
        for (i, weights) in weights.chunks(32).enumerate() {
            let mut words = [0; 4];
            for (e, weight) in weights.iter().enumerate() {
                let q = ((f64::from(*weight) - f64::from(min)) * inverse).round().clamp(0.0, 15.0) as u32;
                words[e / 8] |= q << (4 * (e % 8));
            }
            out.set(group * group_size / 32 + i, words);
        }
    }
}

/// The closest grid of bf16 from the smallest to the largest weight.
fn grid_around(weights: &[f32]) -> WeightGrid {
    let (smallest, largest) = weights.iter().fold((f32::MAX, f32::MIN), |(a, b), w| (a.min(*w), b.max(*w)));
    let min = bf16_below(smallest);
    // Divided first: the range of huge weights of both signs is beyond f32.
    WeightGrid { scale: bf16_above(largest / 15.0 - min / 15.0), min }
}

/// The largest bf16 that is not above a finite value, as f32.
fn bf16_below(value: f32) -> f32 {
    let cut = f32::from_bits(value.to_bits() & 0xffff_0000);
    if cut <= value {
        return cut;
    }
    // Negative and not representable: the next one away from zero, but not to infinity.
    let next = f32::from_bits(cut.to_bits() + 0x1_0000);
    if next.is_finite() { next } else { cut }
}

/// The smallest bf16 that is not below a value of 0 or more, as f32; zero for what the device would take for zero.
fn bf16_above(value: f32) -> f32 {
    if value < f32::MIN_POSITIVE { 0.0 } else { -bf16_below(-value) }
}

//! [`KvFormat`]: how the elements of K or V are stored.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// How the elements of the K or the V side are stored. The two sides choose independently; arithmetic is f32 always.
///
/// | Format | bytes per element | and per row | bytes of a row of 128 | largest error of an element |
/// |---|---|---|---|---|
/// | `F32` | 4 | | 512 | 0 |
/// | `F16` | 2 | | 256 | 2^-11 of it, at least 2^-14; magnitudes to 65504 |
/// | `E4M3` | 1 | | 128 | 2^-4 of it, at least 2^-10; magnitudes to 448 |
/// | `Int8` | 1 | 4 | 132 | half of the scale: about the row's range / 510 |
/// | `Int4` | 1/2 | 4 | 68 | half of the scale: about the row's range / 30 |
/// | `Int8PerChannel` | 1 | | 128 | half of the scale: the channel's range in calibration / 510 |
/// | `Int4PerChannel` | 1/2 | | 64 | half of the scale: the channel's range in calibration / 30 |
///
/// The table of a format with scales per channel takes 8 bytes per channel, once per layer. [`row_error`](Self::row_error) has the exact
/// bound of formats with scales per row. These saturate at ±1.9609375 · 2^127 (3.34e38). Attention sums up codes and zero points apart, so
/// where a row's range comes near the largest f32 its sums may overflow, though the elements do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvFormat {
    /// 32-bit floats: what was appended, bit for bit. A row of one token and KV head takes `4 * head_dim` bytes.
    #[default]
    F32,
    /// IEEE half precision, two elements in a `u32` (the lower half is the even dim). Needs no `shader-f16`: the kernels
    /// convert with integer arithmetic. Rounding is to nearest, ties to even, on every adapter; finite values beyond the
    /// range saturate at ±65504.
    ///
    /// A row takes `2 * head_dim` bytes; an element is within [`relative_error`](Self::relative_error) or [`absolute_error`](Self::absolute_error).
    F16,
    /// 8-bit floats with 4 bits of exponent and 3 of mantissa (OCP E4M3, no infinities), four elements in a `u32`, the first one
    /// lowest. No scale: finite values beyond the range saturate at ±448; infinities become NaN. Rounding is to nearest, ties to even.
    ///
    /// A row takes `head_dim` bytes; an element is within [`relative_error`](Self::relative_error) or [`absolute_error`](Self::absolute_error).
    E4M3,
    /// 8-bit codes with a scale and a zero point per row (token and KV head): `x = zero_point + scale * code`. The zero point is the row's
    /// minimum, rounded down to a bfloat16 and the scale up (where it is more than 2^-20 above one), so that the codes 0 to 255 cover the row; both stand in
    /// one `u32` per row. Four codes in a `u32`, the first one lowest. A row with a NaN or an infinity reads as NaN as a whole.
    ///
    /// A row takes `head_dim + 4` bytes; an element is within [`row_error`](Self::row_error): half of the scale, some 1/510 of the row's range.
    Int8,
    /// 4-bit codes, 0 to 15, with a scale and a zero point per row, as [`KvFormat::Int8`]. Eight codes in a `u32`: the first four in the lower
    /// halves of its bytes, the others in the upper halves.
    ///
    /// A row takes `head_dim / 2 + 4` bytes; an element is within [`row_error`](Self::row_error), some 1/30 of the row's range.
    Int4,
    /// 8-bit codes with a scale and a zero point per layer, KV head and channel (element of a row), fixed by
    /// `KvCache::calibrate_keys` before anything is appended; values outside the calibrated range
    /// saturate at its ends, and a NaN becomes some value of the range. For K only: keys have channels that are large in
    /// every token, which scales per token serve badly (KIVI, Liu et al. 2024).
    ///
    /// A row takes `head_dim` bytes, and a layer `8 * num_kv_heads * head_dim` bytes once; an element within the calibrated range of its
    /// channel is within half of the scale, 1/510 of that range.
    Int8PerChannel,
    /// 4-bit codes with a scale and a zero point per layer, KV head and channel, as [`KvFormat::Int8PerChannel`].
    ///
    /// A row takes `head_dim / 2` bytes; an element within the calibrated range of its channel is within 1/30 of that range.
    Int4PerChannel,
}

impl KvFormat {
    /// All formats. Those with scales per channel are for K only.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::F16, Self::E4M3, Self::Int8, Self::Int4, Self::Int8PerChannel, Self::Int4PerChannel];

    /// Bits of an element, scales not counted.
    #[must_use]
    pub const fn element_bits(self) -> u32 {
        match self {
            Self::F32 => 32,
            Self::F16 => 16,
            Self::E4M3 | Self::Int8 | Self::Int8PerChannel => 8,
            Self::Int4 | Self::Int4PerChannel => 4,
        }
    }

    /// Whether every row (token and KV head) has a scale and a zero point of its own.
    #[must_use]
    pub const fn has_row_scales(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }

    /// Whether every channel of a layer's KV head has a scale and a zero point, fixed by calibration.
    #[must_use]
    pub const fn has_channel_scales(self) -> bool {
        matches!(self, Self::Int8PerChannel | Self::Int4PerChannel)
    }

    /// Largest relative rounding error of a stored value in a float format's normal range: half a unit in the last place.
    #[must_use]
    pub const fn relative_error(self) -> f64 {
        match self {
            // 11 and 4 significant bits.
            Self::F16 => 1.0 / 2048.0,
            Self::E4M3 => 1.0 / 16.0,
            _ => 0.0,
        }
    }

    /// Largest absolute rounding error below a float format's normal range. Adapters may flush half-precision subnormals to zero.
    #[must_use]
    pub const fn absolute_error(self) -> f64 {
        match self {
            // The smallest normal half, 2^-14.
            Self::F16 => 1.0 / 16384.0,
            // Half of the smallest subnormal, 2^-9.
            Self::E4M3 => 1.0 / 1024.0,
            _ => 0.0,
        }
    }

    /// Largest error of an element of a row whose smallest and largest elements are `min` and `max`, in formats with scales per row: half of
    /// the scale, and the roundings of f32 on the way. 0 in other formats.
    ///
    /// The stored zero point is up to `2^-7 |min|` below the minimum, which is the distance of bfloat16 numbers. The scale, rounded up, is less
    /// than `1 + 2^-7` of the widened range's `levels`th part, and at least 2^-118. Reading adds a multiple of the scale to the zero point, with
    /// two roundings. How far a result of attention may be off is said by [`ErrorModel`](crate::reference::ErrorModel).
    #[must_use]
    pub fn row_error(self, min: f64, max: f64) -> f64 {
        if !self.has_row_scales() {
            return 0.0;
        }
        let levels = f64::from((1_u32 << self.element_bits()) - 1);
        let range = max - min + min.abs() / 128.0;
        let scale = (range / levels * (1.0 + 1.0 / 128.0)).max(1.0 / 332_306_998_946_228_968_225_951_765_070_086_144.0);
        let magnitude = min.abs().max(max.abs()) + range;
        0.5 * scale + magnitude * (4.0 / f64::from(1 << 24)) + f64::from(f32::MIN_POSITIVE)
    }

    /// Whether elements are stored as codes with scales, per row or per channel.
    pub(crate) const fn has_codes(self) -> bool {
        self.has_row_scales() || self.has_channel_scales()
    }

    /// The name that shader templates know the format by.
    pub(crate) const fn shader_name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::E4M3 => "e4m3",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int8PerChannel => "int8_channel",
            Self::Int4PerChannel => "int4_channel",
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::E4M3 => "E4M3",
            Self::Int8 => "Int8",
            Self::Int4 => "Int4",
            Self::Int8PerChannel => "Int8-channel",
            Self::Int4PerChannel => "Int4-channel",
        })
    }
}

impl FromStr for KvFormat {
    type Err = Error;

    /// What `Display` prints, in any case: `"f16"`, `"int8-channel"`.
    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|format| format.to_string().eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|format| format.to_string().to_ascii_lowercase()).collect();
            Error::argument("format", format!("{name:?}"), format!("one of {}", names.join(", ")))
        })
    }
}

/// A format of K and one of V, as programs take them from a command line: `"int8"` for both sides, or `"int4-channel:int8"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvFormats {
    /// How K is stored.
    pub k: KvFormat,
    /// How V is stored.
    pub v: KvFormat,
}

impl KvFormats {
    /// Every format of K, with the same one for V; beside K with scales per channel, V with as many bits and scales per row.
    pub const ALL: [Self; 7] = [
        Self::both(KvFormat::F32),
        Self::both(KvFormat::F16),
        Self::both(KvFormat::E4M3),
        Self::both(KvFormat::Int8),
        Self::both(KvFormat::Int4),
        Self { k: KvFormat::Int8PerChannel, v: KvFormat::Int8 },
        Self { k: KvFormat::Int4PerChannel, v: KvFormat::Int4 },
    ];

    /// The same format for K and V.
    #[must_use]
    pub const fn both(format: KvFormat) -> Self {
        Self { k: format, v: format }
    }
}

impl fmt::Display for KvFormats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&if self.k == self.v { self.k.to_string() } else { format!("{}:{}", self.k, self.v) })
    }
}

impl FromStr for KvFormats {
    type Err = Error;

    /// One name, or K's and V's with a colon between them. One name with scales per channel stands for its pair in [`KvFormats::ALL`].
    fn from_str(names: &str) -> Result<Self> {
        if let Some((k, v)) = names.split_once(':') {
            return Ok(Self { k: k.parse()?, v: v.parse()? });
        }
        let k = names.parse()?;
        Ok(Self::ALL.into_iter().find(|formats| formats.k == k).unwrap_or(Self::both(k)))
    }
}

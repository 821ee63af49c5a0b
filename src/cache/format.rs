//! [`KvFormat`]: how the elements of K or V are stored.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// How the elements of the K or the V side are stored. The two sides choose independently; arithmetic is f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvFormat {
    /// 32-bit floats: what was appended, bit for bit.
    #[default]
    F32,
    /// IEEE half precision, two elements in a `u32` (the lower half is the even dim). Needs no `shader-f16`: the kernels
    /// convert with integer arithmetic. Rounding is to nearest, ties to even, on every adapter; finite values beyond the
    /// range saturate at ±65504.
    F16,
    /// 8-bit floats with 4 bits of exponent and 3 of mantissa (OCP E4M3, no infinities), four elements in a `u32`, the first one
    /// lowest. No scale: finite values beyond the range saturate at ±448.
    E4M3,
    /// 8-bit codes with a scale and a least value per row (token and KV head): `x = min + scale * code`. Scale and least value are
    /// bfloat16, in one `u32` per row.
    Int8,
    /// 4-bit codes with a scale and a least value per row, as [`KvFormat::Int8`].
    Int4,
    /// 8-bit codes with a scale and a least value per layer, KV head and channel (element of a row), fixed by
    /// [`KvCache::calibrate_keys`](super::KvCache::calibrate_keys) before anything is appended. For K only: keys have channels that are large in
    /// every token, which scales per token serve badly (KIVI, Liu et al. 2024).
    Int8PerChannel,
    /// 4-bit codes with a scale and a least value per layer, KV head and channel, as [`KvFormat::Int8PerChannel`].
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

    /// Whether every row (token and KV head) has a scale and a least value of its own.
    #[must_use]
    pub const fn has_row_scales(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }

    /// Whether every channel of a layer's KV head has a scale and a least value, fixed by calibration.
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

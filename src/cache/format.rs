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
}

impl KvFormat {
    /// Bits of an element.
    #[must_use]
    pub const fn element_bits(self) -> u32 {
        match self {
            Self::F32 => 32,
            Self::F16 => 16,
        }
    }

    /// Largest relative rounding error of a stored value in the format's normal range: half a unit in the last place.
    #[must_use]
    pub const fn relative_error(self) -> f64 {
        match self {
            Self::F32 => 0.0,
            // 11 significant bits.
            Self::F16 => 1.0 / 2048.0,
        }
    }

    /// Largest absolute rounding error below the normal range. Adapters may flush half-precision subnormals to zero.
    #[must_use]
    pub const fn absolute_error(self) -> f64 {
        match self {
            Self::F32 => 0.0,
            // The smallest normal half, 2^-14.
            Self::F16 => 1.0 / 16384.0,
        }
    }

    /// The name that shader templates know the format by.
    pub(crate) const fn shader_name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
        })
    }
}

impl FromStr for KvFormat {
    type Err = Error;

    /// The name in any case: `"f16"`.
    fn from_str(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            _ => Err(Error::argument("format", format!("{name:?}"), "f32 or f16")),
        }
    }
}

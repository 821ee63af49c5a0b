//! How each kernel cuts its work: tiles, lanes, loads and workgroup memory, computed once and handed to the templates as `geometry`.
//!
//! Templates unroll what these structs count; they schedule nothing themselves.

mod append;
mod cpu;
mod gpu_decode;
mod gpu_prefill;
mod matrix_prefill;

use append::AppendGeometry;
use cpu::{CpuDecodeGeometry, CpuPrefillGeometry};
use gpu_decode::DecodeGeometry;
pub(super) use gpu_decode::decode_k_dims;
use gpu_prefill::PrefillGeometry;
use matrix_prefill::MatrixPrefillGeometry;

use super::target::Profile;
use super::variant::{Kernel, Variant};
use crate::format::KvFormat;

/// A struct of counts, with a way to hand all of them to a template under their names.
macro_rules! geometry {
    ($(#[$about:meta])* $name:ident { $($(#[$field_about:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(in crate::kernel) struct $name {
            $($(#[$field_about])* pub(in crate::kernel) $field: $type,)*
        }

        impl $name {
            /// The fields, for a template.
            pub(in crate::kernel) fn context(&self) -> minijinja::Value {
                minijinja::context! { $($field => self.$field,)* }
            }
        }
    };
}
use geometry;

/// The geometry of a variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Geometry {
    Append(AppendGeometry),
    CpuDecode(CpuDecodeGeometry),
    CpuPrefill(CpuPrefillGeometry),
    Decode(DecodeGeometry),
    MatrixPrefill(MatrixPrefillGeometry),
    Prefill(PrefillGeometry),
    /// An invocation per element and no workgroup memory: the workgroup size says it all.
    Linear,
}

impl Geometry {
    pub(super) fn of(variant: &Variant) -> Self {
        match (variant.target.profile, variant.kernel) {
            (Profile::Cpu, Kernel::Decode) => Self::CpuDecode(CpuDecodeGeometry::of(variant)),
            (Profile::Cpu, Kernel::Prefill) => Self::CpuPrefill(CpuPrefillGeometry::of(variant)),
            (Profile::Gpu, Kernel::Decode) => Self::Decode(DecodeGeometry::of(variant)),
            (Profile::Gpu, Kernel::Prefill) => match variant.target.matrix {
                Some(size) => Self::MatrixPrefill(MatrixPrefillGeometry::of(variant, size)),
                None => Self::Prefill(PrefillGeometry::of(variant)),
            },
            (_, Kernel::Append | Kernel::AppendQkv) => Self::Append(AppendGeometry::of(variant)),
            (
                _,
                Kernel::CopyBlocks
                | Kernel::MoveRows
                | Kernel::PackBlocks
                | Kernel::Gather
                | Kernel::Merge
                | Kernel::Rope,
            ) => Self::Linear,
        }
    }

    /// What the template sees.
    pub(super) fn context(&self) -> minijinja::Value {
        match self {
            Self::Append(geometry) => geometry.context(),
            Self::CpuDecode(geometry) => geometry.context(),
            Self::CpuPrefill(geometry) => geometry.context(),
            Self::Decode(geometry) => geometry.context(),
            Self::MatrixPrefill(geometry) => geometry.context(),
            Self::Prefill(geometry) => geometry.context(),
            Self::Linear => minijinja::context! {},
        }
    }

    /// Bytes of workgroup memory that the kernel declares.
    pub(super) fn workgroup_bytes(&self) -> u32 {
        match self {
            Self::Append(geometry) => geometry.workgroup_bytes(),
            Self::CpuDecode(geometry) => geometry.workgroup_bytes(),
            Self::Decode(geometry) => geometry.workgroup_bytes(),
            Self::MatrixPrefill(geometry) => geometry.workgroup_bytes(),
            Self::Prefill(geometry) => geometry.workgroup_bytes(),
            Self::CpuPrefill(_) | Self::Linear => 0,
        }
    }
}

/// Bytes of workgroup arrays (length, bytes of an element), each in whole 16 bytes, as WebGPU counts.
fn array_bytes(arrays: &[(u32, u32)]) -> u32 {
    arrays.iter().map(|(len, bytes)| (len * bytes).next_multiple_of(16)).sum()
}

/// WGSL type of an element of `dims` dims that a GPU kernel reads. Of int4 at least a word, which has 8.
const fn element_type(format: KvFormat, dims: u32) -> &'static str {
    match (format, dims * format.element_bits() / 32) {
        (KvFormat::F32, _) => "vec4<f32>",
        (_, 0 | 1) => "u32",
        (_, 2) => "vec2<u32>",
        _ => "vec4<u32>",
    }
}

/// Neighbouring lanes out of `lanes` that share by shuffles: any subgroup has at least 4 invocations.
fn butterfly(variant: &Variant, lanes: u32) -> u32 {
    match (variant.target.subgroups, variant.target.subgroup_size) {
        (false, _) => 1,
        (true, 0) => lanes.min(4),
        (true, size) => lanes.min(size),
    }
}

#[cfg(test)]
mod tests;

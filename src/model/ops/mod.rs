//! The model's small kernels: norms, activations, learned positions, choice of rows.

pub(crate) mod activation;
mod norm;
mod route;
mod rows;

pub use activation::{Activation, ActivationKind};
pub use norm::{Norm, NormConfig, NormKind, NormParameters};
pub(crate) use route::MAX_EXPERTS;
pub use route::{ExpertGroups, GroupScore, Router, RouterConfig, Routes, Scoring};
pub use rows::{PositionEmbedding, SelectRows};

use crate::kernel::{ShaderFeatures, Target};
use crate::model::Rows;
use crate::plan::{MAX_GRID, linear_grid};
use crate::{Error, Result};
use crate::{Gpu, Profile};

/// Invocations per workgroup of the elementwise kernels: a whole number of waves on every GPU.
const ELEMENTWISE_SIZE: u32 = 64;

/// The kernels read and write `vec4`s.
fn check_width(width: u32, max: u32) -> Result<()> {
    if width == 0 || width > max || !width.is_multiple_of(4) {
        return Err(Error::argument("width", width, format!("a multiple of 4 from 4 to {max}")));
    }
    Ok(())
}

/// Values per element: 8 as `vec4<u64>` on CPU adapters, where a load or store costs the same for 8 bytes as for 4 (on lavapipe
/// RMSNorm of [512, 2048] took 12 ms of CPU time instead of 22, gated SiLU of [512, 3072] 13.5 instead of 24), otherwise 4.
fn element_len(target: Target, width: u32) -> u32 {
    let wide = target.profile == Profile::Cpu && target.int64 && width.is_multiple_of(8);
    if wide { 8 } else { 4 }
}

/// What elements of this length need.
fn element_features(element_len: u32) -> ShaderFeatures {
    ShaderFeatures { int64: element_len == 8, ..ShaderFeatures::default() }
}

/// The grid for `count` workgroups; kernels number them by `y * MAX_GRID + x`.
fn grid(argument: &'static str, count: u64) -> Result<[u32; 3]> {
    let (x, y) = linear_grid(count).ok_or_else(|| {
        Error::argument(argument, format!("{count} workgroups"), format!("at most {MAX_GRID} times {MAX_GRID}"))
    })?;
    Ok([x, y, 1])
}

/// The grid of an elementwise kernel that writes `rows`.
fn elementwise_grid(argument: &'static str, rows: &Rows<'_>, element_len: u32) -> Result<[u32; 3]> {
    grid(argument, (rows.bytes() / 4 / u64::from(element_len)).div_ceil(ELEMENTWISE_SIZE.into()))
}

/// A dispatch can't write a buffer that it also binds to be read, even another part of it.
fn check_distinct(argument: &'static str, out: &wgpu::Buffer, inputs: &[&wgpu::Buffer]) -> Result<()> {
    if inputs.contains(&out) {
        return Err(Error::argument(argument, "the buffer of an input", "a buffer of its own"));
    }
    Ok(())
}

/// A storage buffer that holds `values`.
fn upload(gpu: &Gpu, argument: &'static str, values: &[f32]) -> Result<wgpu::Buffer> {
    let (bytes, max) = (values.len() as u64 * 4, gpu.max_storage_bytes());
    if bytes > max {
        return Err(Error::unsupported(
            argument,
            format!("{bytes} bytes"),
            format!("{max} bytes in a storage binding"),
        ));
    }
    let contents = bytemuck::cast_slice(values);
    gpu.create_buffer_with("creating a parameter buffer", argument, contents, wgpu::BufferUsages::STORAGE)
}

//! What folio needs of a device.

use crate::error::{Error, Result};
use crate::kernel::MatrixSize;

/// Features that folio's kernels use when the device has them. None is required.
///
/// Subgroups shorten reductions; 64-bit integers make loads wider on CPU adapters.
#[must_use]
pub fn useful_features() -> wgpu::Features {
    wgpu::Features::SUBGROUP | wgpu::Features::SHADER_INT64
}

/// What kernels for matrix units need: the units, halves to feed them, and subgroups, which they belong to.
pub(super) const MATRIX_FEATURES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16).union(wgpu::Features::SUBGROUP);

/// Features with which [`Gpu::with_matrix_units`](crate::Gpu::with_matrix_units) works. One is experimental: wgpu wants
/// [`wgpu::ExperimentalFeatures::enabled`] in the request for the device.
#[must_use]
pub fn matrix_features() -> wgpu::Features {
    MATRIX_FEATURES
}

/// The largest square matrices of halves summed up in f32 that both the adapter and naga have: 8 or 16.
pub(super) fn matrix_size(adapter: &[wgpu::CooperativeMatrixProperties]) -> Option<MatrixSize> {
    use wgpu::CooperativeScalarType::{F16, F32};
    let has = |size: &MatrixSize| {
        let rows = size.rows();
        adapter.iter().any(|p| {
            [p.m_size, p.n_size, p.k_size] == [rows; 3]
                && p.ab_type == F16
                && p.cr_type == F32
                && !p.saturating_accumulation
        })
    };
    [MatrixSize::Sixteen, MatrixSize::Eight].into_iter().find(has)
}

/// Limits that folio needs: WebGPU's defaults, as far as compute shaders are concerned.
///
/// A host that opens its own device and asks for at least these (or for `wgpu::Limits::default()`) can use every part of folio.
#[must_use]
pub fn required_limits() -> wgpu::Limits {
    wgpu::Limits::default()
}

/// Compares the compute limits with [`required_limits`].
pub(super) fn check_limits(have: &wgpu::Limits) -> Result<()> {
    let need = required_limits();
    let at_least: [(&'static str, u64, u64); 11] = [
        (
            "max_storage_buffers_per_shader_stage",
            need.max_storage_buffers_per_shader_stage.into(),
            have.max_storage_buffers_per_shader_stage.into(),
        ),
        ("max_uniform_buffers_per_shader_stage", 1, have.max_uniform_buffers_per_shader_stage.into()),
        // Pools shrink with the binding; below this even the work lists of a large batch may not fit.
        ("max_storage_buffer_binding_size", 1 << 20, have.max_storage_buffer_binding_size),
        ("max_buffer_size", 1 << 20, have.max_buffer_size),
        ("max_uniform_buffer_binding_size", 256, have.max_uniform_buffer_binding_size),
        (
            "max_compute_workgroup_storage_size",
            need.max_compute_workgroup_storage_size.into(),
            have.max_compute_workgroup_storage_size.into(),
        ),
        (
            "max_compute_invocations_per_workgroup",
            need.max_compute_invocations_per_workgroup.into(),
            have.max_compute_invocations_per_workgroup.into(),
        ),
        (
            "max_compute_workgroup_size_x",
            need.max_compute_workgroup_size_x.into(),
            have.max_compute_workgroup_size_x.into(),
        ),
        (
            "max_compute_workgroups_per_dimension",
            need.max_compute_workgroups_per_dimension.into(),
            have.max_compute_workgroups_per_dimension.into(),
        ),
        ("max_bind_groups", 1, have.max_bind_groups.into()),
        ("max_bindings_per_bind_group", 9, have.max_bindings_per_bind_group.into()),
    ];
    for (what, need, have) in at_least {
        if have < need {
            return Err(Error::unsupported(what, format!("at least {need}"), have));
        }
    }
    // Uploads place their parameter blocks at 256 bytes, WebGPU's largest alignment.
    for (what, have) in [
        ("min_uniform_buffer_offset_alignment", have.min_uniform_buffer_offset_alignment),
        ("min_storage_buffer_offset_alignment", have.min_storage_buffer_offset_alignment),
    ] {
        if have > 256 {
            return Err(Error::unsupported(what, "at most 256", have));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu::CooperativeMatrixProperties as Matrix;
    use wgpu::CooperativeScalarType::{F16, F32, I32};

    fn matrix(
        [m_size, n_size, k_size]: [u32; 3],
        ab_type: wgpu::CooperativeScalarType,
        cr_type: wgpu::CooperativeScalarType,
    ) -> Matrix {
        Matrix { m_size, n_size, k_size, ab_type, cr_type, saturating_accumulation: false }
    }

    #[test]
    fn the_largest_square_of_halves_is_taken() {
        let eight = [matrix([8; 3], F32, F32), matrix([8; 3], F16, F16), matrix([8; 3], F16, F32)];
        assert_eq!(matrix_size(&eight), Some(MatrixSize::Eight));
        let both = [eight[2], matrix([16; 3], F16, F32)];
        assert_eq!(matrix_size(&both), Some(MatrixSize::Sixteen));
        // Arc A, sums in halves, and integers.
        for other in [matrix([8, 8, 16], F16, F32), matrix([16; 3], F16, F16), matrix([16; 3], I32, I32)] {
            assert_eq!(matrix_size(&[other]), None);
        }
        assert_eq!(matrix_size(&[]), None);
    }
}

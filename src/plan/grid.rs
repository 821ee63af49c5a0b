//! Grids of workgroups.

/// Most workgroups along a dimension of a dispatch that WebGPU guarantees.
pub const MAX_GRID: u32 = 65_535;

/// A grid for `count` workgroups that are numbered linearly: (x, rest), both within [`MAX_GRID`], or `None` if there are too many.
#[must_use]
pub fn linear_grid(count: u64) -> Option<(u32, u32)> {
    let x = count.clamp(1, MAX_GRID.into());
    let rest = count.div_ceil(x).max(1);
    (rest <= u64::from(MAX_GRID)).then_some((x as u32, rest as u32))
}

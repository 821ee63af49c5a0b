//! Geometry of append.wgsl and append_qkv.wgsl.

use super::{array_bytes, geometry};
use crate::kernel::variant::Variant;

geometry! {
    /// An invocation writes a Vec8 (8 elements) of a row of K and of V. Those of a row whose range or squares they share, and of append_qkv all, are of
    /// one workgroup, which has whole rows.
    AppendGeometry {
        /// Vec8s of a row of K or of V, whichever has more.
        vec8s: u32,
        /// Rows of a workgroup, if it has whole ones.
        rows: u32,
        /// Elements of the array of ranges; 0 if no row has a range.
        ranges_len: u32,
        /// Elements of the array of squares; 0 without a norm.
        squares_len: u32,
    }
}

impl AppendGeometry {
    pub(super) fn of(variant: &Variant) -> Self {
        let vec8s = variant.row_vec8s();
        let ranges_len = if variant.has_row_scales() { variant.workgroup_size } else { 0 };
        let squares_len = if variant.head_norm { variant.workgroup_size } else { 0 };
        Self { vec8s, rows: variant.workgroup_size / vec8s, ranges_len, squares_len }
    }

    pub(super) fn workgroup_bytes(&self) -> u32 {
        array_bytes(&[(self.ranges_len, 16), (self.squares_len, 4)])
    }
}

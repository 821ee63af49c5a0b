//! Geometry of append.wgsl.

use super::{array_bytes, geometry};
use crate::kernel::variant::Variant;

/// Elements of a row that an invocation writes.
const CHUNK_DIMS: u32 = 8;

geometry! {
    /// An invocation writes a chunk of a row of K and of V. Those of a row whose range they share are of one workgroup, which has whole rows.
    AppendGeometry {
        /// Chunks of a row.
        chunks: u32,
        /// Rows of a workgroup, if they share ranges.
        rows: u32,
        /// Elements of the array of ranges; 0 if no row has a range.
        ranges_len: u32,
    }
}

impl AppendGeometry {
    pub(super) fn of(variant: &Variant) -> Self {
        let chunks = variant.head_dim / CHUNK_DIMS;
        let ranges_len = if variant.has_row_scales() { variant.workgroup_size } else { 0 };
        Self { chunks, rows: variant.workgroup_size / chunks, ranges_len }
    }

    pub(super) fn workgroup_bytes(&self) -> u32 {
        array_bytes(&[(self.ranges_len, 16)])
    }
}

//! Geometry of gpu/prefill_matrix.wgsl.

use super::{array_bytes, element_type, geometry};
use crate::kernel::target::MatrixSize;
use crate::kernel::variant::Variant;

/// Invocations of a query row: they share by shuffles, and any subgroup has at least 4.
const LANES: u32 = 4;
/// Halves that a row in workgroup memory has beyond its elements. With 16 bytes more than a multiple of 32, eight neighbouring rows lie on
/// different banks, and rows stay aligned to 16 bytes, which matrix loads demand.
const PADDING: u32 = 8;
/// What every adapter with matrix units that wgpu knows has at least (NVIDIA 48 KiB, AMD 64, Apple and lavapipe 32).
const MAX_BYTES: u32 = 32_768;

geometry! {
    /// `tile_q` query rows against tiles of `tile_kv` keys, in products of square matrices that subgroups take one after another.
    MatrixPrefillGeometry {
        /// Rows and columns of a matrix.
        size: u32,
        /// Type, dims of an element and elements of a row of K and of V.
        k_type: &'static str,
        k_dims: u32,
        v_type: &'static str,
        v_dims: u32,
        /// Invocations of a query row.
        lanes: u32,
        /// The head in whole matrices, and whether that is more than its elements.
        dims: u32,
        is_padded: bool,
        /// `vec4`s of the head, and of the keys of a tile, that an invocation has.
        cols: u32,
        key_cols: u32,
        /// Elements of K and V of a tile, and how many of them an invocation moves.
        k_count: u32,
        v_count: u32,
        k_loads: u32,
        v_loads: u32,
        /// Dims whose values are summed up at a time, and how many times that makes the head.
        slice: u32,
        num_slices: u32,
        /// Halves of a row of Q, K and V; of weights; floats of a row of products.
        half_row: u32,
        p_row: u32,
        product_row: u32,
        /// Where K or V and the weights begin, behind Q, and the length of all.
        kv_at: u32,
        p_at: u32,
        halves_len: u32,
        products_len: u32,
        /// Words of the cache rows of two tiles.
        rows_len: u32,
        /// Planes of a float per key: scales and minima of K; scales, minima and exponents of V.
        k_planes: u32,
        v_planes: u32,
        scales_len: u32,
        /// Neighbouring matrices of scores, and of values, that a subgroup computes together.
        score_block: u32,
        value_block: u32,
        /// Whether elements of V may be no numbers.
        screens: bool,
    }
}

/// Two neighbours share the matrix of their rows, if all 4 subgroups of 32 still have work then.
const fn block(num_cols: u32, num_rows: u32) -> u32 {
    if num_cols.is_multiple_of(2) && num_cols * num_rows >= 8 { 2 } else { 1 }
}

impl MatrixPrefillGeometry {
    pub(in crate::kernel) fn of(variant: &Variant, size: MatrixSize) -> Self {
        let mut num_slices = 1;
        loop {
            let geometry = Self::with_slices(variant, size.rows(), num_slices);
            if geometry.workgroup_bytes() <= MAX_BYTES || geometry.slice <= size.rows() {
                return geometry;
            }
            num_slices += 1;
        }
    }

    fn with_slices(variant: &Variant, size: u32, num_slices: u32) -> Self {
        let &Variant { head_dim, tile_q, tile_kv, workgroup_size, k_format, v_format, .. } = variant;
        // 8 dims of any format are an element of 16 bytes at most.
        let (k_dims, v_dims) = (8, 8);
        let (k_count, v_count) = (tile_kv * head_dim / k_dims, tile_kv * head_dim / v_dims);
        let dims = head_dim.next_multiple_of(size);
        let slice = dims.div_ceil(num_slices).next_multiple_of(size);
        let half_row = dims + PADDING;
        let p_row = tile_kv + PADDING;
        let product_row = tile_kv.max(slice) + 4;
        let kv_at = tile_q * half_row;
        let p_at = kv_at + tile_kv * half_row;
        let k_planes = if k_format.has_row_scales() { 2 } else { 0 };
        let v_planes = if v_format.has_row_scales() { 3 } else { 0 };
        Self {
            size,
            k_type: element_type(k_format, k_dims),
            k_dims,
            v_type: element_type(v_format, v_dims),
            v_dims,
            lanes: LANES,
            dims,
            is_padded: dims > head_dim,
            cols: dims.div_ceil(4 * LANES),
            key_cols: tile_kv / (4 * LANES),
            k_count,
            v_count,
            k_loads: k_count.div_ceil(workgroup_size),
            v_loads: v_count.div_ceil(workgroup_size),
            slice,
            num_slices: dims.div_ceil(slice),
            half_row,
            p_row,
            product_row,
            kv_at,
            p_at,
            halves_len: p_at + tile_q * p_row,
            products_len: tile_q * product_row,
            rows_len: 2 * tile_kv,
            k_planes,
            v_planes,
            scales_len: (k_planes + v_planes) * tile_kv,
            score_block: block(tile_kv / size, tile_q / size),
            value_block: block(slice / size, tile_q / size),
            screens: v_planes == 0,
        }
    }

    pub(in crate::kernel) fn workgroup_bytes(&self) -> u32 {
        let screened_end = if self.screens { 4 } else { 0 };
        array_bytes(&[
            (self.halves_len, 2),
            (self.products_len, 4),
            (self.rows_len, 4),
            (self.scales_len, 4),
            (screened_end, 4),
        ])
    }
}

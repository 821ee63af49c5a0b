//! Geometry of gpu/prefill.wgsl.

use super::{array_bytes, butterfly, element_type, geometry};
use crate::format::KvFormat;
use crate::kernel::variant::Variant;

/// Query rows of an invocation.
const ROWS: u32 = 4;
/// `vec4`s of the head that are multiplied at a time.
const SLICE: u32 = 4;

geometry! {
    /// A blocked matrix product: `tile_q` query rows against tiles of `tile_kv` keys. An invocation has 4 rows and, in lane x, the keys x,
    /// x + lanes, ... of the tile, then the `vec4`s x, x + lanes, ... of the head.
    PrefillGeometry {
        /// Type, dims of an element and elements of a row of K and of V: wider ones would leave most invocations without any to widen.
        k_type: &'static str,
        k_dims: u32,
        k_row: u32,
        v_type: &'static str,
        v_dims: u32,
        v_row: u32,
        /// Sets of 4 rows, and the invocations of each.
        row_sets: u32,
        lanes: u32,
        /// Keys of a tile, and `vec4`s of a value, that an invocation has.
        keys_per_lane: u32,
        cols: u32,
        /// `vec4`s of the head that are multiplied at a time; a row in workgroup memory has one more, against bank conflicts. Then how many
        /// such slices there are, and whether the last one ends beyond the head.
        slice: u32,
        slice_row: u32,
        num_slices: u32,
        is_padded: bool,
        /// Keys whose values are multiplied at a time, and how many times that makes a tile.
        v_keys: u32,
        num_v_slices: u32,
        /// Elements of K that a key has in a slice.
        k_cols: u32,
        /// Elements that are moved to workgroup memory per slice, and how many of them an invocation moves.
        q_count: u32,
        k_count: u32,
        v_count: u32,
        q_loads: u32,
        k_loads: u32,
        v_loads: u32,
        /// Lanes that combine their rows by shuffles, and the parts left then.
        butterfly: u32,
        parts: u32,
        /// `vec4`s of one of two buffers of Q and K, and of its rows of Q.
        score_len: u32,
        k_tile: u32,
        /// `vec4`s of weights of a key, of all weights, and of one of two buffers of V.
        weights_row: u32,
        weights_len: u32,
        value_len: u32,
        /// Where lanes put what they combine.
        lane_parts: u32,
        /// `vec4`s of the array that has all of these, one after the other.
        tile_len: u32,
        /// Words of the cache rows of two tiles.
        rows_len: u32,
        /// `vec4`s of products with the minima of channels.
        minimum_products_len: u32,
        /// Whether elements of V that are no numbers are kept from rows that don't see them.
        screens: bool,
    }
}

impl PrefillGeometry {
    pub(in crate::kernel) fn of(variant: &Variant) -> Self {
        let &Variant { head_dim, value_dim, tile_q, tile_kv, workgroup_size, flags, .. } = variant;
        let dims = |format| if format == KvFormat::F32 { 4 } else { 8 };
        let (k_dims, v_dims) = (dims(variant.k_format), dims(variant.v_format));
        let (k_row, v_row) = (head_dim / k_dims, value_dim / v_dims);
        let (head_vec4s, value_vec4s) = (head_dim / 4, value_dim / 4);
        let row_sets = tile_q / ROWS;
        let lanes = workgroup_size / row_sets;
        let num_slices = head_vec4s.div_ceil(SLICE);
        // Two buffers of 16 KiB at most, beside the weights.
        let v_keys = match value_vec4s {
            0..=16 => 8,
            17..=64 => 4,
            _ => 2,
        };
        let k_cols = SLICE * 4 / k_dims;
        let (q_count, k_count, v_count) = (tile_q * SLICE, tile_kv * k_cols, v_keys * v_row);
        let butterfly = butterfly(variant, lanes);
        let parts = lanes / butterfly;
        let slice_row = SLICE + 1;
        let score_len = (tile_q + tile_kv) * slice_row;
        let weights_row = row_sets + 1;
        let weights_len = tile_kv * weights_row;
        let value_len = v_keys * value_vec4s;
        let lane_parts = weights_len + value_len;
        Self {
            k_type: element_type(variant.k_format, k_dims),
            k_dims,
            k_row,
            v_type: element_type(variant.v_format, v_dims),
            v_dims,
            v_row,
            row_sets,
            lanes,
            keys_per_lane: tile_kv / lanes,
            cols: value_vec4s.div_ceil(lanes),
            slice: SLICE,
            slice_row,
            num_slices,
            is_padded: num_slices * SLICE > head_vec4s,
            v_keys,
            num_v_slices: tile_kv / v_keys,
            k_cols,
            q_count,
            k_count,
            v_count,
            q_loads: q_count.div_ceil(workgroup_size),
            k_loads: k_count.div_ceil(workgroup_size),
            v_loads: v_count.div_ceil(workgroup_size),
            butterfly,
            parts,
            score_len,
            k_tile: tile_q * slice_row,
            weights_row,
            weights_len,
            value_len,
            lane_parts,
            tile_len: (2 * score_len).max(weights_len + 2 * value_len).max(lane_parts + parts * row_sets),
            rows_len: 2 * tile_kv,
            minimum_products_len: if variant.k_format.has_channel_scales() { row_sets } else { 0 },
            screens: flags.causal || flags.window || flags.mask,
        }
    }

    pub(in crate::kernel) fn workgroup_bytes(&self) -> u32 {
        let screened_end = u32::from(self.screens);
        array_bytes(&[(self.tile_len, 16), (self.rows_len, 4), (self.minimum_products_len, 16), (screened_end, 4)])
    }
}

//! Geometry of gpu/decode.wgsl.

use super::{array_bytes, butterfly, element_type, geometry};
use crate::format::KvFormat;
use crate::kernel::variant::Variant;

geometry! {
    /// One query token, all query heads of a KV head, keys in tiles of `tile_kv`.
    DecodeGeometry {
        /// Type and dims of an element of K, and elements of a row: as wide as there are two or more of, up to 16 bytes.
        k_type: &'static str,
        k_dims: u32,
        k_row: u32,
        /// Type and dims of an element of V, and elements of a row. 8 dims double an invocation's sums: with many heads, V is read in narrower elements.
        v_type: &'static str,
        v_dims: u32,
        v_row: u32,
        /// Whether two invocations read the same word of V, which has 8 dims, for 4 each.
        v_halves: bool,
        /// Fours of keys in a tile.
        quads: u32,
        /// Scores: invocations per key, as few as keep all of them busy, but at least 64 bytes wide.
        lanes: u32,
        /// Keys that all invocations take at a time, and how many of a tile an invocation has.
        key_slots: u32,
        keys_per_lane: u32,
        /// Elements of a row that a lane has, the last one perhaps beyond the row.
        k_loads: u32,
        /// `vec4`s of a query row, padded to the same number for each lane.
        q_row: u32,
        /// Whether `vec4`s of the query are interleaved by lane: read 16 words or more apart they would share their banks.
        q_interleaved: bool,
        /// Packed queries: type and words (4 codes each) of an element, elements of a head in the order in which lanes read them, and of all heads.
        q_codes_type: &'static str,
        q_code_words: u32,
        q_codes_row: u32,
        q_codes_len: u32,
        /// `vec4`s of what else is known of packed queries, one per head.
        q_terms_len: u32,
        /// Neighbouring lanes that add their parts of a score by shuffles, those of them that write, and the parts left then.
        butterfly: u32,
        writers: u32,
        parts: u32,
        /// Values: sets of invocations, each over its own quads of keys, how many those are, and the invocations that take part.
        streams: u32,
        stream_quads: u32,
        value_lanes: u32,
        /// Merge: heads whose sums go through workgroup memory at once.
        merge_heads: u32,
        /// `vec4`s of the array that has the queries, then the sums.
        tile_len: u32,
        /// Words of a head's logits, padded against bank conflicts between heads, and of the array.
        logits_row: u32,
        logits_len: u32,
        /// `vec4`s of weights.
        weights_len: u32,
        /// Words of the factors of sums.
        rescale_len: u32,
        /// Words of the arrays that have one per key of the tile: cache rows and, where they are needed, visibility, scales of K, scales of V.
        rows_len: u32,
        seen_len: u32,
        k_scales_len: u32,
        v_scales_len: u32,
    }
}

/// Dims of an element of K that an invocation reads at a time: the most that a row has two or more of, up to 16 bytes.
pub(in crate::kernel) fn decode_k_dims(head_dim: u32, format: KvFormat) -> u32 {
    let fits = |dims: &u32| dims * format.element_bits() <= 128 && head_dim.is_multiple_of(*dims) && head_dim > *dims;
    [32, 16].into_iter().find(fits).unwrap_or(if format == KvFormat::F32 { 4 } else { 8 })
}

impl DecodeGeometry {
    pub(in crate::kernel) fn of(variant: &Variant) -> Self {
        let &Variant { head_dim, value_dim, group_size, tile_kv, workgroup_size, .. } = variant;
        let k_dims = decode_k_dims(head_dim, variant.k_format);
        let v_dims = if group_size <= 2 && variant.v_format != KvFormat::F32 { 8 } else { 4 };
        let (k_row, v_row) = (head_dim / k_dims, value_dim / v_dims);
        let quads = tile_kv / 4;
        let lanes = match k_row {
            0..2 => 1,
            2 => 2,
            _ if k_row < 8 || workgroup_size < 8 * tile_kv => 4,
            _ => 8,
        };
        let key_slots = workgroup_size / lanes;
        let k_loads = k_row.div_ceil(lanes);
        let butterfly = butterfly(variant, lanes);
        let parts = lanes / butterfly;
        let fit = (workgroup_size / v_row).min(workgroup_size / group_size).min(quads).clamp(1, 32);
        let streams = 1 << fit.ilog2();
        let head_sums = streams * value_dim / 4;
        let q_row = k_loads * lanes * k_dims / 4;
        let q_code_words = (k_dims / 4).min(4);
        let q_codes_row = q_row / q_code_words;
        // The sums take the room of the queries. Beside queries in codes, long rows get half of it: with all of it they need 17 216 bytes
        // (head_dim 256, 8 heads), and WebGPU promises 16 384.
        let q_room = group_size * q_row / if variant.packed_dots && head_dim > 128 { 2 } else { 1 };
        let merge_heads = group_size.min((q_room / head_sums).max(1));
        let logits_row = tile_kv + 8;
        let per_key = |is_needed: bool| if is_needed { tile_kv } else { 0 };
        Self {
            k_type: element_type(variant.k_format, k_dims),
            k_dims,
            k_row,
            v_type: element_type(variant.v_format, v_dims),
            v_dims,
            v_row,
            v_halves: variant.v_format == KvFormat::Int4 && v_dims == 4,
            quads,
            lanes,
            key_slots,
            keys_per_lane: (tile_kv / key_slots).max(1),
            k_loads,
            q_row,
            q_interleaved: k_dims > 8 && lanes > 1,
            q_codes_type: if q_code_words == 2 { "vec2<u32>" } else { "vec4<u32>" },
            q_code_words,
            q_codes_row,
            q_codes_len: if variant.packed_dots { group_size * q_codes_row } else { 0 },
            q_terms_len: if variant.packed_dots { group_size } else { 0 },
            butterfly,
            writers: butterfly.min(4),
            parts,
            streams,
            stream_quads: quads / streams,
            value_lanes: streams * v_row,
            merge_heads,
            tile_len: if variant.packed_dots { 0 } else { group_size * q_row }.max(merge_heads * head_sums),
            logits_row,
            logits_len: parts * group_size * logits_row,
            weights_len: group_size * quads,
            rescale_len: streams * group_size,
            rows_len: tile_kv,
            seen_len: per_key(variant.flags.mask && !variant.v_format.has_row_scales()),
            k_scales_len: per_key(variant.k_format.has_row_scales()),
            v_scales_len: per_key(variant.v_format.has_row_scales()),
        }
    }

    pub(in crate::kernel) fn workgroup_bytes(&self) -> u32 {
        array_bytes(&[
            (self.tile_len, 16),
            (self.q_codes_len, 4 * self.q_code_words),
            (self.q_terms_len, 16),
            (self.logits_len, 4),
            (self.weights_len, 16),
            (self.rescale_len, 4),
            (self.rows_len, 4),
            (self.seen_len, 4),
            (self.k_scales_len, 4),
            (self.v_scales_len, 4),
        ])
    }
}

use super::*;
use crate::kernel::{AttendFlags, MatrixSize, Target, Vendor};
use crate::{KvCacheConfig, KvFormat};

fn variant(profile: Profile, kernel: Kernel, head_dim: u32, group_size: u32, formats: [KvFormat; 2]) -> Variant {
    let vendor = Vendor::Other;
    let target = Target {
        profile,
        vendor,
        subgroups: true,
        subgroup_size: 8,
        int64: true,
        matrix: None,
        packed_dots: false,
        enable_directives: false,
    };
    let [k_format, v_format] = formats;
    let config = KvCacheConfig::new(1, 2, head_dim).with_blocks(4, 16).with_formats(k_format, v_format);
    Variant::new(kernel, target, &config, group_size, AttendFlags { causal: true, ..AttendFlags::default() })
}

const HEAD_DIMS: [u32; 8] = [8, 24, 40, 64, 72, 128, 192, 256];

/// Every key, dim and row of a tile has an invocation, and no two have the same.
#[test]
fn gpu_decode_covers_a_tile() {
    for head_dim in HEAD_DIMS {
        for group_size in 1..=8 {
            for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8, KvFormat::Int4] {
                let variant = variant(Profile::Gpu, Kernel::Decode, head_dim, group_size, [format; 2]);
                let g = DecodeGeometry::of(&variant);
                let about = format!("{variant:?}: {g:?}");
                assert!(g.key_slots * g.keys_per_lane >= variant.tile_kv, "{about}");
                assert!(g.k_loads * g.lanes >= g.k_row && (g.k_loads - 1) * g.lanes < g.k_row, "{about}");
                assert_eq!(g.streams * g.stream_quads * 4, variant.tile_kv, "{about}");
                assert!(g.value_lanes <= variant.workgroup_size, "{about}");
                assert!(g.streams * group_size <= variant.workgroup_size, "{about}");
                assert_eq!(g.butterfly * g.parts, g.lanes, "{about}");
                // The queries, then the sums of a round of heads, both fit.
                assert!(g.tile_len >= group_size * g.q_row, "{about}");
                assert!(g.tile_len >= g.merge_heads * g.streams * head_dim / 4, "{about}");
                assert!(g.logits_len >= 4 * group_size * g.streams, "{about}: merging needs this much");
            }
        }
    }
}

#[test]
fn gpu_prefill_covers_a_tile() {
    for head_dim in HEAD_DIMS {
        for (format, vendor) in [KvFormat::F32, KvFormat::F16, KvFormat::Int4]
            .into_iter()
            .flat_map(|f| [(f, Vendor::Other), (f, Vendor::Intel)])
        {
            let default = variant(Profile::Gpu, Kernel::Prefill, head_dim, 4, [format; 2]);
            let mut variant = default;
            variant.target.vendor = vendor;
            crate::kernel::tuning::choose(&mut variant);
            let g = PrefillGeometry::of(&variant);
            let about = format!("{variant:?}: {g:?}");
            assert_eq!(g.row_sets * g.lanes, variant.workgroup_size, "{about}");
            assert_eq!(g.keys_per_lane * g.lanes, variant.tile_kv, "{about}");
            assert!(g.cols * g.lanes >= head_dim / 4, "{about}");
            assert_eq!(g.num_v_slices * g.v_keys, variant.tile_kv, "{about}");
            assert!(g.v_loads * variant.workgroup_size >= g.v_keys * g.v_row, "{about}");
            assert!(g.q_loads * variant.workgroup_size >= variant.tile_q * g.slice, "{about}");
            assert!(g.tile_len >= 2 * g.score_len && g.tile_len >= g.weights_len + 2 * g.value_len, "{about}");
            assert!(g.workgroup_bytes() <= 16_384, "{about}");
        }
    }
}

/// Matrices tile rows, keys and head; what lies in workgroup memory fits and is aligned as matrix loads demand.
#[test]
fn matrix_prefill_covers_a_tile() {
    for head_dim in (8..=256).step_by(8) {
        for (size, format) in [(MatrixSize::Eight, KvFormat::F16), (MatrixSize::Sixteen, KvFormat::Int4)] {
            let mut variant = variant(Profile::Gpu, Kernel::Prefill, head_dim, 4, [format; 2]);
            variant.target.matrix = Some(size);
            crate::kernel::tuning::choose(&mut variant);
            let g = MatrixPrefillGeometry::of(&variant, size);
            let about = format!("{variant:?}: {g:?}");
            let size = size.rows();
            for len in [variant.tile_q, variant.tile_kv, g.dims, g.slice] {
                assert!(len.is_multiple_of(size), "{about}");
            }
            assert_eq!(g.lanes * variant.tile_q, variant.workgroup_size, "{about}");
            assert!(g.dims >= head_dim && 4 * g.lanes * g.cols >= g.dims, "{about}");
            assert_eq!(4 * g.lanes * g.key_cols, variant.tile_kv, "{about}");
            assert!(variant.tile_kv <= variant.workgroup_size.min(64), "{about}");
            assert!(g.num_slices * g.slice >= g.dims && (g.num_slices - 1) * g.slice < g.dims, "{about}");
            assert!(g.product_row >= variant.tile_kv.max(g.slice), "{about}");
            assert!((variant.tile_kv / size).is_multiple_of(g.score_block), "{about}");
            for halves in [g.half_row, g.p_row, g.kv_at, g.p_at] {
                assert!(halves.is_multiple_of(8), "{about}");
            }
            assert!(g.product_row.is_multiple_of(4), "{about}");
            assert!(g.workgroup_bytes() <= 32_768, "{about}");
        }
    }
}

/// A cache with a side of f32 and kernels other than prefill never take matrix units, and what does can do without.
#[test]
fn matrices_are_for_prefill_over_narrow_caches() {
    let mut target = variant(Profile::Gpu, Kernel::Prefill, 64, 4, [KvFormat::F16; 2]).target;
    target.matrix = Some(MatrixSize::Sixteen);
    for kernel in Kernel::ALL {
        for formats in [[KvFormat::F16; 2], [KvFormat::F32, KvFormat::Int8], [KvFormat::Int8, KvFormat::F32]] {
            let plain = variant(Profile::Gpu, kernel, 64, 4, formats);
            let config = KvCacheConfig::new(1, 2, 64).with_blocks(4, 16).with_formats(formats[0], formats[1]);
            let offered = Variant::new(kernel, target, &config, 4, plain.flags);
            let takes = kernel == Kernel::Prefill && formats == [KvFormat::F16; 2];
            assert_eq!(offered.target.matrix.is_some(), takes, "{offered:?}");
            assert_eq!(offered.without_matrices(), plain);
        }
    }
}

/// Hand-checked: llama's shape in F16 on lavapipe, and a row that the widest load doesn't divide.
#[test]
fn cpu_kernels_take_the_cheapest_load() {
    let decode = CpuDecodeGeometry::of(&variant(Profile::Cpu, Kernel::Decode, 128, 4, [KvFormat::F16; 2]));
    assert_eq!((decode.k_type, decode.k_dims, decode.k_loads, decode.k_rounds), ("vec4<u64>", 16, 8, 1));
    assert_eq!((decode.iter_keys, decode.scores, decode.vectors, decode.lookups), (4, 16, 2, 1));
    // A load per lane either way: the one with fewer components.
    let decode = CpuDecodeGeometry::of(&variant(Profile::Cpu, Kernel::Decode, 64, 8, [KvFormat::F16; 2]));
    assert_eq!((decode.k_type, decode.k_loads, decode.iter_keys), ("vec2<u64>", 8, 2));
    let decode = CpuDecodeGeometry::of(&variant(Profile::Cpu, Kernel::Decode, 24, 1, [KvFormat::Int4; 2]));
    assert_eq!((decode.k_type, decode.k_loads, decode.workgroup_bytes()), ("u32", 3, 0));
    let prefill = CpuPrefillGeometry::of(&variant(Profile::Cpu, Kernel::Prefill, 64, 4, [KvFormat::F32; 2]));
    assert_eq!((prefill.rows, prefill.row_block, prefill.k_rounds, prefill.screens), (4, 4, 2, true));
    let prefill = CpuPrefillGeometry::of(&variant(Profile::Cpu, Kernel::Prefill, 64, 4, [KvFormat::Int8; 2]));
    assert!(!prefill.screens);
}

/// Loads span the rows of several keys where these are of codes and have a part for every lane: hand-checked.
#[test]
fn cpu_decode_spans_rows_of_codes() {
    let spans = |head_dim, formats| {
        let g = CpuDecodeGeometry::of(&variant(Profile::Cpu, Kernel::Decode, head_dim, 4, formats));
        assert_eq!([g.k_dims * g.k_loads, g.v_dims * g.v_loads], [g.k_span * head_dim, g.v_span * head_dim]);
        [(g.k_type, g.k_span), (g.v_type, g.v_span)]
    };
    assert_eq!(spans(128, [KvFormat::Int4; 2]), [("vec4<u64>", 4); 2]);
    assert_eq!(spans(128, [KvFormat::Int8, KvFormat::F16]), [("vec4<u64>", 2), ("vec4<u64>", 1)]);
    assert_eq!(spans(64, [KvFormat::E4M3, KvFormat::Int4PerChannel]), [("vec4<u64>", 4), ("u64", 1)]);
    // Blocks of one key have nothing to span.
    let variant = variant(Profile::Cpu, Kernel::Decode, 128, 4, [KvFormat::Int4; 2]);
    let g = CpuDecodeGeometry::of(&Variant { block_size: 1, ..variant });
    assert_eq!((g.k_span, g.v_span, g.lookups), (1, 1, 4));
}

#[test]
fn append_shares_ranges_in_whole_rows() {
    let geometry = |head_dim, format| {
        let variant = variant(Profile::Cpu, Kernel::Append, head_dim, 1, [format; 2]);
        let geometry = AppendGeometry::of(&variant);
        (geometry.vec8s, geometry.rows * geometry.vec8s <= variant.workgroup_size, geometry.workgroup_bytes())
    };
    assert_eq!(geometry(64, KvFormat::F16), (8, true, 0));
    assert_eq!(geometry(64, KvFormat::Int8), (8, true, 128));
    assert_eq!(geometry(72, KvFormat::Int4), (9, true, 256));
}

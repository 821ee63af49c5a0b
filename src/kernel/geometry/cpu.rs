//! Geometry of cpu/decode.wgsl and cpu/prefill.wgsl.

use super::{array_bytes, geometry};
use crate::format::KvFormat;
use crate::kernel::variant::Variant;
use crate::layout::KvLayout;

/// A type that elements are loaded as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernel) struct Load {
    /// The WGSL type.
    pub(in crate::kernel) name: &'static str,
    /// Elements in it.
    pub(in crate::kernel) dims: u32,
    /// Components: what llvmpipe loads one by one.
    components: u32,
}

const fn load(name: &'static str, dims: u32, components: u32) -> Load {
    Load { name, dims, components }
}

/// How a format can be loaded, the widest first. Elements of formats with padded blocks have at most 16 bytes, which divide a block.
const fn loads_of(format: KvFormat, int64: bool) -> &'static [Load] {
    use KvFormat::{E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
    match (format, int64) {
        (F32, true) => const { &[load("vec4<u64>", 8, 4)] },
        (F32, false) => const { &[load("vec4<f32>", 4, 4)] },
        (F16, true) => const { &[load("vec4<u64>", 16, 4), load("vec2<u64>", 8, 2)] },
        (F16, false) => const { &[load("vec4<u32>", 8, 4)] },
        (E4M3 | Int8 | Int8PerChannel, true) => const { &[load("vec2<u64>", 16, 2), load("u64", 8, 1)] },
        (E4M3 | Int8 | Int8PerChannel, false) => const { &[load("vec4<u32>", 16, 4), load("vec2<u32>", 8, 2)] },
        (Int4 | Int4PerChannel, true) => const { &[load("vec2<u64>", 32, 2), load("u64", 16, 1), load("u32", 8, 1)] },
        (Int4 | Int4PerChannel, false) => {
            const { &[load("vec4<u32>", 32, 4), load("vec2<u32>", 16, 2), load("u32", 8, 1)] }
        }
    }
}

/// The type for the first `used_dim` elements of `rows` rows that are shared by `lanes` lanes. A load costs llvmpipe one serial insert (some 17 cycles) per lane and component,
/// whatever the component's width: hence the widest components that the device has (64 bits), and of the types whose elements divide
/// what is used of a row and the row, the one with the fewest components per lane, and the widest of these.
fn best_load(layout: &KvLayout, used_dim: u32, int64: bool, rows: u32, lanes: u32) -> Load {
    let loads = loads_of(layout.format, int64);
    let cost = |load: &&Load| (rows * used_dim / load.dims).div_ceil(lanes) * load.components;
    let fits =
        loads.iter().filter(|load| used_dim.is_multiple_of(load.dims) && layout.row_dim.is_multiple_of(load.dims));
    fits.min_by_key(cost).copied().unwrap_or(loads[loads.len() - 1])
}

/// What decode loads where `part` is a lane's part of a row. llvmpipe spends some 20 instructions per lane on any load and 9 on each component of
/// it: so one load takes the rows of several keys if these are of one block, are of codes (which move between lanes as words), and
/// have a part for every lane.
fn spanning_load(variant: &Variant, part: Load, layout: &KvLayout, used_dim: u32) -> Load {
    let codes = !matches!(layout.format, KvFormat::F32 | KvFormat::F16);
    let Variant { tile_kv, workgroup_size, target, .. } = *variant;
    // Neighbouring rows lie side by side only where all of a row is used.
    let is_whole = used_dim == layout.row_dim && used_dim / part.dims == workgroup_size;
    if !codes || !target.subgroups || lookups(variant, tile_kv) > 1 || !is_whole {
        return part;
    }
    let wider: &[Load] = match part.name {
        "u64" => const { &[load("vec4<u64>", 4, 4), load("vec2<u64>", 2, 2)] },
        "vec2<u64>" => const { &[load("vec4<u64>", 2, 4)] },
        _ => &[],
    };
    // (The dims of these are in parts.)
    let fits =
        |wide: &&Load| wide.dims <= tile_kv && layout.block_bytes().is_multiple_of(u64::from(wide.components) * 8);
    wider.iter().find(fits).map_or(part, |wide| Load { dims: wide.dims * part.dims, ..*wide })
}

geometry! {
    /// Lanes over head_dim, all query rows of the tile in registers.
    CpuDecodeGeometry {
        /// Invocations: one subgroup, the whole workgroup.
        lanes: u32,
        /// Query rows.
        rows: u32,
        /// Keys per iteration.
        iter_keys: u32,
        /// Type and dims of a load; keys whose rows one load of all lanes spans; `vec4`s of a lane's part of a row; parts of a row, and how many
        /// of them a lane has, the last one perhaps beyond the row.
        k_type: &'static str,
        k_dims: u32,
        k_span: u32,
        k_vecs: u32,
        k_loads: u32,
        k_rounds: u32,
        v_type: &'static str,
        v_dims: u32,
        v_span: u32,
        v_vecs: u32,
        v_loads: u32,
        v_rounds: u32,
        /// Scores of an iteration, and how many of them a lane has.
        scores: u32,
        vectors: u32,
        /// Lookups of the block table per iteration.
        lookups: u32,
        /// `vec4`s of partial scores and of weights in workgroup memory; 0 with subgroups.
        partial_scores_len: u32,
        weights_len: u32,
    }
}

impl CpuDecodeGeometry {
    pub(super) fn of(variant: &Variant) -> Self {
        let (lanes, rows, iter_keys) = (variant.workgroup_size, variant.tile_q, variant.tile_kv);
        let (head_dim, value_dim) = (variant.head_dim, variant.value_dim);
        let sides = [(variant.k_layout(), head_dim), (variant.v_layout(), value_dim)];
        let [(k, k_wide), (v, v_wide)] = sides.map(|(layout, used_dim)| {
            let part = best_load(&layout, used_dim, variant.target.int64, 1, lanes);
            (part, spanning_load(variant, part, &layout, used_dim))
        });
        let scores = rows * iter_keys;
        let shared = |len: u32| if variant.target.subgroups { 0 } else { len };
        Self {
            lanes,
            rows,
            iter_keys,
            k_type: k_wide.name,
            k_dims: k_wide.dims,
            k_span: k_wide.dims / k.dims,
            k_vecs: k.dims / 4,
            k_loads: head_dim / k.dims,
            k_rounds: (head_dim / k.dims).div_ceil(lanes),
            v_type: v_wide.name,
            v_dims: v_wide.dims,
            v_span: v_wide.dims / v.dims,
            v_vecs: v.dims / 4,
            v_loads: value_dim / v.dims,
            v_rounds: (value_dim / v.dims).div_ceil(lanes),
            scores,
            vectors: scores.div_ceil(lanes),
            lookups: lookups(variant, iter_keys),
            partial_scores_len: shared(scores * lanes / 4),
            weights_len: shared(scores),
        }
    }

    pub(super) fn workgroup_bytes(&self) -> u32 {
        array_bytes(&[(self.partial_scores_len, 16), (self.weights_len, 16)])
    }
}

geometry! {
    /// A query row per lane and register set.
    CpuPrefillGeometry {
        /// Invocations: one subgroup, the whole workgroup.
        lanes: u32,
        /// Query rows of a lane.
        rows: u32,
        /// Keys per iteration.
        iter_keys: u32,
        /// `vec4`s of a row of q, and of a row of out.
        q_vecs: u32,
        o_vecs: u32,
        /// Type, dims, and `vec4`s of a load; loads of a row, and rounds of them in which the lanes load the rows of an iteration.
        k_type: &'static str,
        k_dims: u32,
        k_vecs: u32,
        k_loads: u32,
        k_rounds: u32,
        v_type: &'static str,
        v_dims: u32,
        v_vecs: u32,
        v_loads: u32,
        v_rounds: u32,
        /// Lookups of the block table per iteration.
        lookups: u32,
        /// Rows whose scores are summed together: some 8 sums fit the registers beside their operands.
        row_block: u32,
        /// Whether elements of V that are no numbers are kept from rows that don't see them. Codes always are numbers.
        screens: bool,
    }
}

impl CpuPrefillGeometry {
    pub(super) fn of(variant: &Variant) -> Self {
        let (lanes, flags) = (variant.workgroup_size, variant.flags);
        let (head_dim, value_dim) = (variant.head_dim, variant.value_dim);
        let rows = variant.tile_q / lanes;
        let subgroups = variant.target.subgroups;
        let iter_keys = variant.tile_kv;
        // Without subgroups every lane loads all.
        let load_lanes = if subgroups { lanes } else { 1 };
        let [k, v] = [(variant.k_layout(), head_dim), (variant.v_layout(), value_dim)]
            .map(|(layout, used_dim)| best_load(&layout, used_dim, variant.target.int64, iter_keys, load_lanes));
        let (k_loads, v_loads) = (head_dim / k.dims, value_dim / v.dims);
        Self {
            lanes,
            rows,
            iter_keys,
            q_vecs: head_dim / 4,
            o_vecs: value_dim / 4,
            k_type: k.name,
            k_dims: k.dims,
            k_vecs: k.dims / 4,
            k_loads,
            k_rounds: (iter_keys * k_loads).div_ceil(lanes),
            v_type: v.name,
            v_dims: v.dims,
            v_vecs: v.dims / 4,
            v_loads,
            v_rounds: (iter_keys * v_loads).div_ceil(lanes),
            lookups: lookups(variant, iter_keys),
            row_block: if subgroups { (8 / iter_keys).max(1) } else { rows },
            screens: !variant.v_format.has_row_scales() && (flags.causal || flags.window || flags.mask),
        }
    }
}

/// The keys of an iteration are of one block where blocks have whole iterations.
const fn lookups(variant: &Variant, iter_keys: u32) -> u32 {
    if variant.block_size.is_multiple_of(iter_keys) { 1 } else { iter_keys }
}

//! Which variants the shader tests look at: a selection in which every two values of any two choices meet.

use folio::Segments;
use folio::kernel::{
    AttendFlags, Kernel, MAX_DECODE_GROUP, MatrixSize, RopeShape, Target, Variant, Vendor, max_decode_group,
};
use folio::{KvCacheConfig, KvFormat, MAX_BLOCK_SIZE, Profile, RopeLayout, RowElement, RowLayout};

const HEAD_DIMS: [u32; 13] = [8, 24, 40, 64, 72, 80, 96, 112, 128, 192, 256, 328, 576];
/// Elements of a value, where those are not as many as of a key; the last one is a latent's, of which a key may have fewer.
const VALUE_DIMS: [Option<u32>; 5] = [None, Some(8), Some(128), Some(576), Some(512)];
const LATENT: usize = 4;
const GROUP_SIZES: [u32; 5] = [1, 4, 7, 8, 32];
/// The last one is a row of a contiguous cache.
const BLOCK_SIZES: [u32; 5] = [1, 5, 16, 256, 131_072];
const KV_HEADS: [u32; 3] = [1, 3, 8];
/// How K and V are cut.
const SEGMENTS: [[Segments; 2]; 3] = [
    [Segments::ONE; 2],
    [Segments { count: 2, blocks: 32 }, Segments::ONE],
    [Segments { count: 3, blocks: 22 }, Segments { count: 2, blocks: 33 }],
];
const FORMATS: [KvFormat; 7] = KvFormat::ALL;
/// Those without scales per channel.
const V_FORMATS: [KvFormat; 5] = [KvFormat::F32, KvFormat::F16, KvFormat::E4M3, KvFormat::Int8, KvFormat::Int4];
/// SwiftShader 4, lavapipe 8, Intel 8 to 32, NVIDIA and Apple 32, AMD 32 or 64; WARP varies, which is 0.
const SUBGROUP_SIZES: [u32; 6] = [0, 4, 8, 16, 32, 64];

/// Matrices and subgroup sizes: lavapipe, Apple, NVIDIA, AMD.
const MATRICES: [(MatrixSize, u32); 4] =
    [(MatrixSize::Eight, 8), (MatrixSize::Eight, 32), (MatrixSize::Sixteen, 32), (MatrixSize::Sixteen, 0)];

/// How a host's rows lie: as the decoder has them, with gaps, halves, both.
const LAYOUTS: [RowLayout; 4] = [
    RowLayout::DENSE,
    RowLayout::DENSE.with_start(64).with_token_stride(1 << 20).with_head_stride(1 << 10),
    RowLayout::DENSE.with_element(RowElement::F16),
    RowLayout::DENSE.with_element(RowElement::F16).with_token_stride(1 << 20),
];

/// Every combination that a device can have.
pub(crate) fn targets() -> Vec<Target> {
    let mut targets = Vec::new();
    for profile in [Profile::Cpu, Profile::Gpu] {
        for int64 in [false, true] {
            let target = Target {
                profile,
                vendor: Vendor::Other,
                subgroups: false,
                subgroup_size: 0,
                int64,
                matrix: None,
                packed_dots: false,
                enable_directives: false,
            };
            targets.push(target);
            // Intel's subgroups have 8, 16 or 32 lanes.
            let vendor = |size| if size == 16 { Vendor::Intel } else { Vendor::Other };
            let with_subgroups = |size| Target { vendor: vendor(size), subgroups: true, subgroup_size: size, ..target };
            targets.extend(SUBGROUP_SIZES.map(with_subgroups));
            if profile == Profile::Gpu && !int64 {
                let with =
                    |(matrix, subgroup_size)| Target { subgroups: true, subgroup_size, matrix: Some(matrix), ..target };
                targets.extend(MATRICES.map(with));
                targets.push(Target { packed_dots: true, ..target });
                targets.extend([0, 8, 32].map(|size| Target { packed_dots: true, ..with_subgroups(size) }));
            }
        }
    }
    targets
}

/// No flag, each alone, all of them, and enough others that every two flags are met on and off together.
fn flags() -> Vec<AttendFlags> {
    let from = |on: &[usize]| {
        let [causal, window, softcap, alibi, sinks, mask, lse] = [0, 1, 2, 3, 4, 5, 6].map(|flag| on[flag] == 1);
        AttendFlags { causal, window, softcap, alibi, sinks, mask, lse }
    };
    let mut flags = vec![AttendFlags::default(), from(&[1; 7]), from(&[1, 1, 0, 0, 0, 0, 0])];
    flags.extend((0..7).map(|alone| from(&std::array::from_fn::<_, 7, _>(|flag| usize::from(flag == alone)))));
    for on in all_pairs(&[2; 7]) {
        if !flags.contains(&from(&on)) {
            flags.push(from(&on));
        }
    }
    flags
}

/// No rope, and each layout with the whole head, about a quarter of it (also such as are no multiple of 8) and one pair.
fn ropes(kernel: Kernel, head_dim: u32) -> Vec<Option<RopeShape>> {
    // The last elements of a row are rotated as well as the first ones.
    let start = |rotary_dim| if rotary_dim == 2 { head_dim - 8 } else { 0 };
    let shape = |layout, rotary_dim| Some(RopeShape { layout, rotary_dim, rotary_start: start(rotary_dim) });
    let rotating = [RopeLayout::HalfSplit, RopeLayout::Interleaved]
        .into_iter()
        .flat_map(|layout| [head_dim, head_dim / 8 * 2, 2].map(|rotary_dim| shape(layout, rotary_dim)));
    match kernel {
        Kernel::Append => std::iter::once(None).chain(rotating).collect(),
        Kernel::AppendQkv | Kernel::Rope => rotating.collect(),
        _ => vec![None],
    }
}

/// The selection for a kernel.
pub(crate) fn of_kernel(kernel: Kernel) -> Vec<Variant> {
    let attends = matches!(kernel, Kernel::Decode | Kernel::Prefill | Kernel::Merge);
    let targets = targets();
    let flags = if attends { flags() } else { vec![AttendFlags::default()] };
    let most = match kernel {
        Kernel::Decode => MAX_DECODE_GROUP,
        _ if attends || kernel == Kernel::AppendQkv => u32::MAX,
        _ => 1,
    };
    let groups: Vec<u32> = GROUP_SIZES.into_iter().filter(|&group| group <= most).collect();
    let touches_cache = !matches!(kernel, Kernel::Merge | Kernel::Rope);
    let segments = if touches_cache { &SEGMENTS[..] } else { &SEGMENTS[..1] };
    let axes = [
        targets.len(),
        flags.len(),
        groups.len(),
        HEAD_DIMS.len(),
        BLOCK_SIZES.len(),
        KV_HEADS.len(),
        FORMATS.len(),
        V_FORMATS.len(),
        ropes(kernel, 8).len(),
        segments.len(),
        // With norms or without; of `append_qkv`, with queries for sink tokens or without.
        match kernel {
            Kernel::AppendQkv => 4,
            Kernel::Append => 2,
            _ => 1,
        },
        // Its keys are as long as its values.
        if kernel == Kernel::AppendQkv { 1 } else { VALUE_DIMS.len() },
        if attends || matches!(kernel, Kernel::Append | Kernel::Rope) { LAYOUTS.len() } else { 1 },
    ];
    let variant = |choice: Vec<usize>| {
        let mut config = KvCacheConfig::new(1, KV_HEADS[choice[5]], HEAD_DIMS[choice[3]])
            .with_blocks(64, BLOCK_SIZES[choice[4]])
            .with_formats(FORMATS[choice[6]], V_FORMATS[choice[7]]);
        config.value_dim = VALUE_DIMS[choice[11]];
        let mut segments = segments[choice[9]];
        if choice[11] == LATENT {
            config.latent = true;
            config.value_dim = config.value_dim.map(|dim| dim.min(config.head_dim));
            config.k_format = config.v_format;
            segments[1] = segments[0];
        }
        let group =
            if kernel == Kernel::Decode { groups[choice[2]].min(max_decode_group(&config)) } else { groups[choice[2]] };
        config.contiguous = config.block_size > MAX_BLOCK_SIZE;
        config.validate().expect("a shape that caches have");
        let variant =
            Variant::new(kernel, targets[choice[0]], &config, group, flags[choice[1]]).with_segments(segments);
        // What `append` normalises is the value within a latent.
        let normed = choice[10] % 2 == 1 && (kernel == Kernel::AppendQkv || config.latent);
        let variant = if normed { variant.with_head_norm() } else { variant };
        // Over more segments there are too few bindings for second queries, and the cache refuses them.
        let is_whole = segments.iter().all(|segments| segments.count == 1);
        let variant = if choice[10] >= 2 && is_whole { variant.with_sink_queries(1027) } else { variant };
        let rope = ropes(kernel, config.head_dim)[choice[8]];
        // The layout of queries or keys, and another one of results or values.
        let [first, second] = [choice[12], (choice[12] + choice[8]) % LAYOUTS.len()].map(|layout| LAYOUTS[layout]);
        // Elements one by one are f32.
        let by_element = rope.is_some_and(|rope| rope.layout == RopeLayout::HalfSplit && rope.rotary_dim % 8 != 0);
        let first = if by_element { first.with_element(RowElement::F32) } else { first };
        let variant = if attends || kernel == Kernel::Rope {
            variant.with_rows(first, second)
        } else {
            variant.with_new_rows(first, second)
        };
        match rope {
            Some(rope) => variant.with_rope(rope),
            None => variant,
        }
    };
    let defaults: Vec<_> = all_pairs(&axes).into_iter().map(variant).collect();
    // Beside each of the defaults one of its candidates, in turn.
    let others = defaults.iter().enumerate().filter_map(|(i, variant)| {
        let candidates = variant.candidates();
        (candidates.len() > 1).then(|| variant.with_sizes(candidates[1 + i % (candidates.len() - 1)]))
    });
    defaults.iter().copied().chain(others).collect()
}

/// Choices of one value of each axis (`axes` are their numbers of values), such that every two values of different axes
/// are chosen together at least once. Greedy: close to the fewest there can be, and always the same.
fn all_pairs(axes: &[usize]) -> Vec<Vec<usize>> {
    let mut missing: Vec<[(usize, usize); 2]> = Vec::new();
    for (i, &num_i) in axes.iter().enumerate() {
        for (j, &num_j) in axes.iter().enumerate().skip(i + 1) {
            missing.extend((0..num_i * num_j).map(|pair| [(i, pair / num_j), (j, pair % num_j)]));
        }
    }
    let mut rows: Vec<Vec<usize>> = Vec::new();
    while let Some(&[first, second]) = missing.first() {
        let mut row: Vec<Option<usize>> = vec![None; axes.len()];
        row[first.0] = Some(first.1);
        row[second.0] = Some(second.1);
        for (axis, &num_values) in axes.iter().enumerate() {
            if row[axis].is_some() {
                continue;
            }
            // How many missing pairs each value would complete; among equals, the one whose number is next.
            let mut gain = vec![0; num_values];
            for &[a, b] in &missing {
                if a.0 == axis && row[b.0] == Some(b.1) {
                    gain[a.1] += 1;
                }
                if b.0 == axis && row[a.0] == Some(a.1) {
                    gain[b.1] += 1;
                }
            }
            row[axis] = (0..num_values).map(|i| (rows.len() + i) % num_values).rev().max_by_key(|&v| gain[v]);
        }
        missing.retain(|&[a, b]| row[a.0] != Some(a.1) || row[b.0] != Some(b.1));
        rows.push(row.into_iter().flatten().collect());
    }
    rows
}

#[test]
fn every_two_choices_meet() {
    let axes = [5, 3, 2, 4];
    let rows = all_pairs(&axes);
    assert!(rows.iter().all(|row| row.len() == axes.len() && row.iter().zip(&axes).all(|(value, num)| value < num)));
    for (i, &num_i) in axes.iter().enumerate() {
        for (j, &num_j) in axes.iter().enumerate().skip(i + 1) {
            for (a, b) in (0..num_i).flat_map(|a| (0..num_j).map(move |b| (a, b))) {
                assert!(rows.iter().any(|row| row[i] == a && row[j] == b), "axes {i}, {j}: {a}, {b}");
            }
        }
    }
    // No fewer than the two largest axes demand, and not many more.
    assert!((20..30).contains(&rows.len()), "{}", rows.len());
}

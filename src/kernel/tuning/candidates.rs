//! The sizes that may replace a row of the default table.

use super::super::target::Profile;
use super::super::variant::{Kernel, Variant};

/// What may be chosen freely for a kernel: how fast it is depends on it, what it computes does not, but for rounding and
/// [`packed_dots`](Self::packed_dots).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct Sizes {
    /// Invocations of a workgroup.
    pub workgroup_size: u32,
    /// Query rows of a workgroup (decode and prefill).
    pub tile_q: u32,
    /// Keys that a workgroup handles at a time (decode and prefill).
    pub tile_kv: u32,
    /// Whether cache rows are loaded by 64-bit components (CPU adapters).
    pub int64: bool,
    /// Whether invocations share by subgroup operations.
    pub subgroups: bool,
    /// Whether queries are quantised for packed dot products. The one choice that shows in results, hence among the candidates only where
    /// [`Target::packed_dots`](crate::kernel::Target::packed_dots) allows it.
    #[cfg_attr(any(feature = "tune", feature = "model"), serde(default))]
    pub packed_dots: bool,
}

/// WebGPU's defaults, which no candidate exceeds: it would fail on some device that the default runs on.
const MAX_WORKGROUP_BYTES: u32 = 16_384;
const MAX_WORKGROUP_SIZE: u32 = 256;

/// (workgroup size, keys of a tile) of decode for GPUs. Small tiles leave more room for waves, large ones have fewer barriers per key; 64
/// invocations are one wave of GCN and of CDNA, two of RDNA, NVIDIA and Apple.
const GPU_DECODE: [(u32, u32); 7] = [(64, 16), (64, 32), (128, 16), (128, 32), (128, 64), (256, 32), (256, 64)];

/// (workgroup size, query rows, keys of a tile) of prefill for GPUs. Compiled for Intel, 64 x 64 with 256 invocations is the largest without
/// spills at head_dim 64, and 16 x 64 with 128 at 128; on RDNA2 the defaults keep 4 waves.
const GPU_PREFILL: [(u32, u32, u32); 9] = [
    (64, 32, 32),
    (128, 16, 64),
    (128, 32, 32),
    (128, 32, 64),
    (128, 64, 32),
    (256, 16, 64),
    (256, 32, 32),
    (256, 32, 64),
    (256, 64, 32),
];

impl Variant {
    /// What of this variant may be chosen freely.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        let Self { workgroup_size, tile_q, tile_kv, target, packed_dots, .. } = *self;
        Sizes { workgroup_size, tile_q, tile_kv, int64: target.int64, subgroups: target.subgroups, packed_dots }
    }

    /// The same kernel with other sizes. Only [`candidates`](Self::candidates) are tested.
    #[must_use]
    pub fn with_sizes(mut self, sizes: Sizes) -> Self {
        let Sizes { workgroup_size, tile_q, tile_kv, int64, subgroups, packed_dots } = sizes;
        (self.workgroup_size, self.tile_q, self.tile_kv) = (workgroup_size, tile_q, tile_kv);
        (self.target.int64, self.target.subgroups, self.packed_dots) = (int64, subgroups, packed_dots);
        if self.target.profile == Profile::Cpu && !subgroups {
            self.target.subgroup_size = 0;
        }
        self
    }

    /// The sizes that a tuner may try, those of this variant first. Each gives right results on every device that this variant runs on, and
    /// needs nothing beyond WebGPU's defaults that this variant doesn't use already.
    #[must_use]
    pub fn candidates(&self) -> Vec<Sizes> {
        let mut all = vec![self.sizes()];
        // What is around the general rules' choice, whatever was measured: otherwise each measured row would move the range.
        let mut by_rule = *self;
        super::choose_by_rule(&mut by_rule);
        let own = by_rule.sizes();
        all.push(own);
        all.dedup();
        let tried = match (self.target.profile, self.kernel) {
            (Profile::Cpu, Kernel::Decode) => self.cpu_decode(own),
            (Profile::Cpu, Kernel::Prefill) => self.cpu_prefill(own),
            (Profile::Gpu, Kernel::Decode) => self.gpu_decode(own),
            (Profile::Gpu, Kernel::Prefill) if self.target.matrix.is_none() => self.gpu_prefill(own),
            (_, Kernel::Append) => self.append(own),
            _ => Vec::new(),
        };
        for sizes in tried {
            let variant = self.with_sizes(sizes);
            let fits = variant.workgroup_size <= MAX_WORKGROUP_SIZE && variant.workgroup_bytes() <= MAX_WORKGROUP_BYTES;
            if fits && !all.contains(&sizes) {
                all.push(sizes);
            }
        }
        all
    }

    /// Keys per iteration, and the width of loads.
    fn cpu_decode(&self, own: Sizes) -> Vec<Sizes> {
        // Without subgroups the kernel takes one key at a time.
        let keys: &[u32] = if own.subgroups { &[1, 2, 4, 8] } else { &[own.tile_kv] };
        let keys = keys.iter().copied().filter(|&keys| keys <= own.workgroup_size);
        let with_keys = keys.map(|tile_kv| Sizes { tile_kv, ..own });
        with_keys.flat_map(narrower).collect()
    }

    /// Rows of a lane, keys per iteration, and the width of loads. Four times the default's rows spill on every LLVM that was tried.
    fn cpu_prefill(&self, own: Sizes) -> Vec<Sizes> {
        let lanes = own.workgroup_size;
        let rows = [own.tile_q / lanes / 2, own.tile_q / lanes, own.tile_q / lanes * 2];
        let keys: &[u32] = if own.subgroups { &[1, 2] } else { &[own.tile_kv] };
        let rows = rows.into_iter().filter(|&rows| rows > 0);
        let sizes =
            rows.flat_map(|rows| keys.iter().map(move |&tile_kv| Sizes { tile_q: rows * lanes, tile_kv, ..own }));
        sizes.collect()
    }

    fn gpu_decode(&self, own: Sizes) -> Vec<Sizes> {
        let dots: &[bool] = if self.target.packed_dots { &[true, false] } else { &[false] };
        let sizes = |packed_dots| {
            GPU_DECODE.map(|(workgroup_size, tile_kv)| Sizes { workgroup_size, tile_kv, packed_dots, ..own })
        };
        let sizes = dots.iter().flat_map(|&packed_dots| sizes(packed_dots));
        // Each 4 elements of a value take an invocation.
        sizes.filter(|sizes| sizes.workgroup_size >= self.value_dim / 4).collect()
    }

    fn gpu_prefill(&self, own: Sizes) -> Vec<Sizes> {
        let sizes = |(workgroup_size, tile_q, tile_kv)| Sizes { workgroup_size, tile_q, tile_kv, ..own };
        GPU_PREFILL.into_iter().map(sizes).collect()
    }

    /// Invocations that write 8 elements each. A workgroup has whole rows if these have scales.
    fn append(&self, own: Sizes) -> Vec<Sizes> {
        let vec8s = self.row_vec8s();
        let holds_rows = |size: u32| !self.has_row_scales() || size >= vec8s;
        let sizes = [8, 16, 32, 64, 128, 256].into_iter().filter(|&size| holds_rows(size));
        sizes.map(|workgroup_size| Sizes { workgroup_size, ..own }).collect()
    }
}

/// The same with the adapter's widest loads, and without 64-bit integers.
fn narrower(sizes: Sizes) -> impl Iterator<Item = Sizes> {
    let narrow = sizes.int64.then_some(Sizes { int64: false, ..sizes });
    std::iter::once(sizes).chain(narrow)
}

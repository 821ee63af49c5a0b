//! Sizes of the linear kernels: the default of each, and the candidates that may replace it.

use super::linear_config::LinearConfig;
use super::linear_variant::{LinearKernel, LinearVariant};
use super::quantise::WeightFormat;
use crate::kernel::Profile;
use crate::kernel::tuning::{LinearShape, LinearSizes, LinearThresholds, TunedLinear, Tuning};

/// Columns of the GPU's kernel for few rows. Its invocations are those of two subgroups of 32, or one of 64.
const MATVEC_COLS: u32 = 4;

/// Invocations of the kernels that compute nothing, or few rows on GPUs.
const SMALL_SIZE: u32 = 64;

/// Tile of the GPU's kernel for many rows, both ways: 8 x 4 of it per invocation.
const MATMUL_TILE: u32 = 64;

/// Inputs of a slice of it: two of them in workgroup memory take 8.7 KB, and 4 invocations load a row's as 64 bytes.
const MATMUL_INPUTS: u32 = 16;

/// Inputs of a slice for matrix units: a whole group of scales has as many at least, and a row's padding is to a multiple of them.
pub(super) const MATRIX_INPUTS: u32 = 32;

/// What a subgroup computes with matrix units, both ways. Each half that it loads from workgroup memory is in 32 products.
pub(super) const MATRIX_BLOCK: u32 = 32;

/// WebGPU's default, which no candidate exceeds: it would fail on some device that the default runs on.
const MAX_WORKGROUP_BYTES: u32 = 16_384;

/// Products that a candidate for CPU adapters has as text: twice as many compile for seconds on llvmpipe.
const MAX_UNROLLED: u32 = 1024;

/// Sums of an invocation for few rows: each is a register, and the text repeats itself as often.
const MAX_MATVEC_SUMS: u32 = 32;

/// (invocations, rows, columns) of the kernel for many rows: an invocation has 8 x 4, and brings whole loads.
const MATMUL: [(u32, u32, u32); 4] = [(64, 32, 64), (64, 64, 32), (128, 64, 64), (256, 64, 128)];

/// The same with matrix units: subgroups have blocks of 32 x 32.
const MATRIX_MATMUL: [(u32, u32, u32); 4] = [(128, 32, 64), (128, 64, 64), (256, 32, 64), (256, 64, 64)];

/// Rows up to which a tuner may take the kernel for few rows on GPUs: whole tiles of 8.
pub(super) const MATVEC_ROWS: [u32; 5] = [8, 16, 24, 32, 48];

/// What a tuner may say a tile of 16 rows takes, in quarters of the time of one of 8: so little that two are better than three of 8; as by default;
/// more than two of them.
const WIDE_QUARTERS: [u32; 3] = [6, 7, 9];

impl LinearVariant {
    /// The sizes without a tuning.
    pub(super) fn default_sizes(&self) -> LinearSizes {
        let lanes = self.lanes();
        let quantised = self.format.group_size().is_some();
        let (workgroup_size, rows, cols, inputs) = match (self.kernel, self.target.profile) {
            (LinearKernel::Rows(rows), Profile::Cpu) => {
                let inputs = match rows {
                    _ if quantised => 32,
                    1 | 2 => 32,
                    4 => 16,
                    _ => 8,
                };
                let is_wide = rows > 8 || (rows == 8 && (quantised || self.format == WeightFormat::F32));
                (lanes, rows, if is_wide { 4 } else { 8 }, inputs)
            }
            (LinearKernel::Rows(rows), Profile::Gpu) => (SMALL_SIZE, rows, MATVEC_COLS, 0),
            // Four subgroups, one for each block of the tile; more of them only help to move data.
            (LinearKernel::Matmul, _) if self.target.matrix.is_some() => {
                let size = if (1..=32).contains(&self.target.subgroup_size) { 128 } else { 256 };
                (size, MATMUL_TILE, MATMUL_TILE, MATRIX_INPUTS)
            }
            (LinearKernel::Matmul, _) => (128, MATMUL_TILE, MATMUL_TILE, MATMUL_INPUTS),
            (LinearKernel::Gather, _) => (SMALL_SIZE, 1, SMALL_SIZE, 0),
            (LinearKernel::Stage, _) => (lanes, 1, 0, 0),
        };
        LinearSizes { workgroup_size, rows, cols, inputs }
    }

    /// The same kernel with other sizes. Only [`candidates`](Self::candidates) are tested.
    #[must_use]
    pub fn with_sizes(self, sizes: LinearSizes) -> Self {
        Self { sizes, ..self }
    }

    /// The sizes that a tuner may try, those of this variant first. Each gives right results on every device that this variant runs on.
    #[must_use]
    pub fn candidates(&self) -> Vec<LinearSizes> {
        let own = self.sizes;
        let mut all = vec![own];
        let tried = match (self.kernel, self.target.profile) {
            (LinearKernel::Rows(rows), Profile::Cpu) => self.cpu_candidates(rows),
            (LinearKernel::Rows(rows), Profile::Gpu) => Self::matvec_candidates(own, rows),
            (LinearKernel::Matmul, _) => {
                let table = if self.target.matrix.is_some() { MATRIX_MATMUL } else { MATMUL };
                let sizes = |(workgroup_size, rows, cols)| LinearSizes { workgroup_size, rows, cols, ..own };
                table.map(sizes).to_vec()
            }
            (LinearKernel::Gather | LinearKernel::Stage, _) => Vec::new(),
        };
        for sizes in tried {
            let fits = self.with_sizes(sizes).workgroup_bytes() <= MAX_WORKGROUP_BYTES;
            if fits && !all.contains(&sizes) {
                all.push(sizes);
            }
        }
        all
    }

    /// Blocks of columns, and inputs of an iteration: whole packs, or of formats with scales as many as share one at least.
    fn cpu_candidates(&self, rows: u32) -> Vec<LinearSizes> {
        let inputs: &[u32] = if self.format.group_size().is_some() { &[32] } else { &[8, 16, 32] };
        let pairs = [2, 4, 8, 16].into_iter().flat_map(|cols| inputs.iter().map(move |&inputs| (cols, inputs)));
        let pairs = pairs.filter(|(cols, inputs)| rows * cols * inputs <= MAX_UNROLLED);
        pairs.map(|(cols, inputs)| LinearSizes { cols, inputs, ..self.sizes }).collect()
    }

    /// Invocations and columns. Each sum has an invocation that finishes it.
    fn matvec_candidates(own: LinearSizes, rows: u32) -> Vec<LinearSizes> {
        let pairs = [32, 64, 128, 256].into_iter().flat_map(|size| [2, 4, 8].map(|cols| (size, cols)));
        let pairs = pairs.filter(|&(size, cols)| rows * cols <= MAX_MATVEC_SUMS.min(size));
        pairs.map(|(workgroup_size, cols)| LinearSizes { workgroup_size, cols, ..own }).collect()
    }

    /// What the kernel is called in a tuning.
    #[must_use]
    pub fn tuned_name(&self) -> String {
        match self.kernel {
            LinearKernel::Rows(rows) => format!("rows{rows}"),
            LinearKernel::Matmul if self.target.matrix.is_some() => "matmul_matrix".into(),
            LinearKernel::Matmul => "matmul".into(),
            LinearKernel::Gather => "gather".into(),
            LinearKernel::Stage => "stage".into(),
        }
    }

    /// The same kernel with the sizes that a tuning has for the layer, if they are among the candidates.
    pub(super) fn tuned(self, tuned: Option<&TunedLinear>) -> Self {
        let name = self.tuned_name();
        let found = tuned.and_then(|tuned| tuned.kernels.iter().find(|entry| entry.kernel == name));
        match found {
            Some(entry) if self.candidates().contains(&entry.sizes) => self.with_sizes(entry.sizes),
            _ => self,
        }
    }
}

/// What a layer is filed under.
pub(super) fn shape_of(config: &LinearConfig) -> LinearShape {
    let LinearConfig { in_features, out_features, format, gated, norm, .. } = *config;
    let group_size = format.group_size().unwrap_or(0);
    LinearShape { in_features, out_features, format: format.to_string(), group_size, gated, norm }
}

/// A layer's entry in a tuning.
pub(super) fn entry<'a>(tuning: Option<&'a Tuning>, config: &LinearConfig) -> Option<&'a TunedLinear> {
    let shape = shape_of(config);
    tuning?.linear.iter().find(|entry| entry.shape == shape)
}

/// An entry's thresholds, if a tuner may have chosen them; the default's otherwise.
pub(super) fn thresholds(tuned: Option<&TunedLinear>) -> LinearThresholds {
    let found = tuned.and_then(|tuned| tuned.thresholds);
    let known = |t: &LinearThresholds| MATVEC_ROWS.contains(&t.matvec_rows) && WIDE_QUARTERS.contains(&t.wide_quarters);
    found.filter(known).unwrap_or_default()
}

//! Where the weights of a linear layer lie on the GPU, and how they get there.

use super::error::ModelResult;
use super::linear_config::LinearConfig;
use super::linear_kernels::{LinearKernels, TEXTURE_WIDTH, create_texture, create_view};
use super::quantise::{Packed, Packer, WeightGrid};
use crate::kernel::Profile;
use crate::{Error, Gpu, Result};

/// Rows of W in one binding: those of some columns of y, and of some experts.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) first_row: u32,
    pub(super) last_row: u32,
    pub(super) weights: Weights,
    pub(super) scales: Option<Weights>,
    pub(super) params: wgpu::Buffer,
}

/// Where packed words are.
#[derive(Debug)]
pub(super) enum Weights {
    Buffer(wgpu::Buffer),
    Texture(wgpu::TextureView),
}

impl Weights {
    pub(super) fn binding(&self) -> wgpu::BindingResource<'_> {
        match self {
            Self::Buffer(buffer) => buffer.as_entire_binding(),
            Self::Texture(view) => wgpu::BindingResource::TextureView(view),
        }
    }
}

/// Parameters as the shaders read them (`linear_params.wgsl`).
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
struct LinearParams {
    in_features: u32,
    out_features: u32,
    row_packs: u32,
    row_groups: u32,
    first_row: u32,
    last_row: u32,
    accumulate: u32,
    norm_eps: f32,
    first_expert: u32,
    last_expert: u32,
}

/// Fills its slice from a row of W on.
pub(crate) type Fill<'a, T> = &'a mut dyn FnMut(u32, &mut [T]) -> ModelResult<()>;

/// Where the rows of W come from.
pub(crate) struct RowSource<'a> {
    /// Whole rows of weights.
    pub(crate) rows: Fill<'a, f32>,
    /// The grids of as many rows, which come as `None`. Called for formats that take them only.
    pub(crate) grids: Fill<'a, Option<WeightGrid>>,
}

/// f32 that are asked for at a time: 4 MiB, so that loading takes little memory beside the file.
const PIECE: u64 = 1 << 20;

/// Packs W piece by piece into as many bindings as it takes. Of a gated layer, `lanes` rows of up follow on `lanes` rows of the gate, so that who
/// sums one sums the other.
pub(super) fn upload(
    gpu: &Gpu,
    kernels: &LinearKernels,
    config: LinearConfig,
    lanes: u32,
    norm_eps: f32,
    source: RowSource<'_>,
) -> ModelResult<Vec<Part>> {
    let LinearConfig { in_features, out_features, format, gated, .. } = config;
    let packer = Packer::new(format, in_features, lanes);
    // What yields `lanes` outputs.
    let blocks_per_unit = if gated { 2 } else { 1 };
    let unit_bytes = packer.row_packs as u64 * u64::from(lanes) * 16 * blocks_per_unit;
    let max_bytes = match gpu.profile() {
        Profile::Gpu => gpu.max_storage_bytes(),
        // Small enough to be found in memory in one piece; `max_storage_bytes` is what tests make small.
        Profile::Cpu => {
            let height = gpu.limits().max_texture_dimension_2d;
            (u64::from(TEXTURE_WIDTH.min(height)) * u64::from(height) * 16).min(gpu.max_storage_bytes())
        }
    };
    let part_units = max_bytes / unit_bytes;
    let part_rows = u64::from(lanes) * part_units;
    if part_rows == 0 || gpu.limits().max_texture_dimension_2d < TEXTURE_WIDTH {
        let what = "a linear layer's weights";
        let need = format!("{unit_bytes} bytes of {} rows", u64::from(lanes) * blocks_per_unit);
        return Err(Error::unsupported(what, need, max_bytes).into());
    }
    let part_rows = u32::try_from(part_rows.min(out_features.into())).unwrap_or(out_features);
    // Whole experts, or a part of one.
    let num_experts = config.num_experts();
    let part_experts = part_units / u64::from(out_features.div_ceil(lanes));
    let part_experts = u32::try_from(part_experts).unwrap_or(num_experts).clamp(1, num_experts);
    // Whole blocks, so that pieces can be packed one after another.
    let piece_rows = PIECE / u64::from(in_features) / blocks_per_unit;
    let piece_rows = u32::try_from(piece_rows).unwrap_or(u32::MAX).max(1).next_multiple_of(lanes);
    let block_len = lanes as usize * in_features as usize;
    let RowSource { rows, grids: fill_grids } = source;
    let (mut values, mut grids) = (Vec::new(), Vec::new());
    let mut parts = Vec::new();
    let columns = (0..out_features).step_by(part_rows as usize);
    let ranges = (0..num_experts)
        .step_by(part_experts as usize)
        .flat_map(|expert| columns.clone().map(move |row| (expert, row)));
    for (first_expert, first_row) in ranges {
        let experts = part_experts.min(num_experts - first_expert);
        let num_rows = part_rows.min(out_features - first_row);
        let units = u64::from(num_rows.div_ceil(lanes)) * u64::from(experts);
        let mut weights = WeightUpload::new(gpu, units * unit_bytes / 4)?;
        let scale_words = units * blocks_per_unit * packer.row_groups as u64 * u64::from(lanes);
        let mut scales = if scale_words > 0 { Some(WeightUpload::new(gpu, scale_words)?) } else { None };
        let mut packed = Packed::default();
        let pieces = (0..num_rows).step_by(piece_rows as usize);
        for (expert, first) in (0..experts).flat_map(|expert| pieces.clone().map(move |first| (expert, first))) {
            let piece = piece_rows.min(num_rows - first);
            let row = (first_expert + expert) * config.expert_rows() + first_row + first;
            let len = piece as usize * in_features as usize;
            values.resize(len * blocks_per_unit as usize, 0.0);
            let (own, up) = values.split_at_mut(len);
            rows(row, own)?;
            let num_grids = piece as usize * packer.row_grids;
            grids.clear();
            grids.resize(num_grids * blocks_per_unit as usize, None);
            let (own_grids, up_grids) = grids.split_at_mut(num_grids);
            if num_grids > 0 {
                fill_grids(row, own_grids)?;
            }
            if gated {
                rows(out_features + row, up)?;
                if num_grids > 0 {
                    fill_grids(out_features + row, up_grids)?;
                }
                for (block, (gate, up)) in (0..).zip(own.chunks(block_len).zip(up.chunks(block_len))) {
                    let first = (block * lanes) as usize * packer.row_grids;
                    packer.pack(gate, &own_grids[first..], row + block * lanes, &mut packed)?;
                    packer.pack(up, &up_grids[first..], out_features + row + block * lanes, &mut packed)?;
                }
            } else {
                packer.pack(own, own_grids, row, &mut packed)?;
            }
            let last = expert + 1 == experts && first + piece == num_rows;
            weights.write(gpu, kernels, &mut packed.packs, last)?;
            if let Some(scales) = &mut scales {
                scales.write(gpu, kernels, &mut packed.scales, last)?;
            }
        }
        let last_row = first_row + num_rows - 1;
        let params = LinearParams {
            in_features,
            out_features,
            row_packs: packer.row_packs as u32,
            row_groups: packer.row_groups as u32,
            first_row,
            last_row,
            accumulate: u32::from(config.accumulate),
            norm_eps,
            first_expert,
            last_expert: first_expert + experts - 1,
        };
        let contents = bytemuck::bytes_of(&params);
        let usage = wgpu::BufferUsages::UNIFORM;
        let buffer = gpu.create_buffer_with("creating a linear layer", "folio linear", contents, usage)?;
        parts.push(Part {
            first_row,
            last_row,
            weights: weights.weights(gpu)?,
            scales: scales.map(|scales| scales.weights(gpu)).transpose()?,
            params: buffer,
        });
    }
    Ok(parts)
}

/// Writes words, piece after piece, to where the profile keeps them.
enum WeightUpload {
    Buffer { buffer: wgpu::Buffer, written: u64 },
    Texture { texture: wgpu::Texture, next_row: u32 },
}

impl WeightUpload {
    fn new(gpu: &Gpu, words: u64) -> Result<Self> {
        let during = "creating a linear layer's weights";
        if gpu.profile() == Profile::Gpu {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
            return Ok(Self::Buffer {
                buffer: gpu.create_buffer(during, "folio weights", words * 4, usage)?,
                written: 0,
            });
        }
        // No more than the device's limit, or the caller has erred and wgpu says so.
        let height = u32::try_from(words.div_ceil(u64::from(TEXTURE_WIDTH * 4))).unwrap_or(u32::MAX);
        let usage = wgpu::TextureUsages::TEXTURE_BINDING | wgpu::TextureUsages::COPY_DST;
        let texture = create_texture(gpu, height, usage)?;
        Ok(Self::Texture { texture, next_row: 0 })
    }

    /// Writes what it can of `words`, all of it if they are the last ones, and removes it from them.
    fn write(&mut self, gpu: &Gpu, kernels: &LinearKernels, words: &mut Vec<u32>, last: bool) -> Result<()> {
        match self {
            Self::Buffer { buffer, written } => {
                let write = || gpu.queue().write_buffer(buffer, *written, bytemuck::cast_slice(words));
                gpu.scoped_now("uploading weights", write)?;
                let bytes = words.len() as u64 * 4;
                *written += bytes;
                words.clear();
                kernels.uploaded(gpu, bytes)
            }
            Self::Texture { texture, next_row } => {
                let row_words = (TEXTURE_WIDTH * 4) as usize;
                if last {
                    words.resize(words.len().next_multiple_of(row_words), 0);
                }
                let height = words.len() / row_words;
                if height == 0 {
                    return Ok(());
                }
                let bytes = height * row_words * 4;
                let height = height as u32;
                let mut target = texture.as_image_copy();
                target.origin.y = *next_row;
                let layout = wgpu::TexelCopyBufferLayout {
                    offset: 0,
                    bytes_per_row: Some(row_words as u32 * 4),
                    rows_per_image: None,
                };
                let size = wgpu::Extent3d { width: TEXTURE_WIDTH, height, depth_or_array_layers: 1 };
                let data = &bytemuck::cast_slice(words)[..bytes];
                let write = || gpu.queue().write_texture(target, data, layout, size);
                gpu.scoped_now("uploading weights", write)?;
                *next_row += height;
                words.drain(..bytes / 4);
                kernels.uploaded(gpu, bytes as u64)
            }
        }
    }

    fn weights(self, gpu: &Gpu) -> Result<Weights> {
        Ok(match self {
            Self::Buffer { buffer, .. } => Weights::Buffer(buffer),
            Self::Texture { texture, .. } => Weights::Texture(create_view(gpu, &texture)?),
        })
    }
}

//! Blocks of a sequence into staging buffers and back: what snapshots and swaps record.
//!
//! The stream is the sequence's blocks of the layer's group in the order of its tokens, of K, then of V, layer after layer. Blocks of a portion of the stream are packed
//! into one scratch buffer, and one copy moves them on to a buffer that the host can map; unpacking is the way back. A kernel packs scattered
//! blocks, because a copy command for each would keep the host busy (131 000 of them for 32 768 tokens and 32 layers); long runs of
//! neighbours are copied by commands.

use std::ops::Range;

use super::KvCache;
use crate::error::{Error, Result};
use crate::gpu::{Dispatch, Lease, Prepared, Readback, Recorder, Upload, params_binding};
use crate::ids::BlockId;
use crate::kernel::Profile;
use crate::layout::KvCacheConfig;
use crate::plan::{MAX_GRID, PARAM_BLOCK_WORDS, PackParams, linear_grid, push_params};

/// Bytes of a portion: of the scratch buffer on the device, and of each staging buffer. Far below WebGPU's guaranteed buffer of 256 MiB; 4 GB of
/// blocks take 256 portions. A staging buffer is freed when its bytes have been read, so smaller portions also save host memory.
const PORTION_BYTES: u64 = 16 << 20;

/// The shortest run of bytes, on average, that is copied by commands and not by the kernel.
///
/// A command costs 2 us: 0.2 to record, 0.6 to finish the encoder, 1 to run on lavapipe, where the kernel moves about 1 KiB in that time. On
/// GPUs the kernel moves 200 KB and more (100 GB/s and more), and keeps the host free besides.
fn min_run_bytes(profile: Profile) -> u64 {
    match profile {
        Profile::Cpu => 1 << 10,
        Profile::Gpu => 256 << 10,
    }
}

/// What ends the stream: a staging buffer that no submitted command has written holds zeros.
const MARKER: [u8; 4] = *b"done";

/// Consecutive blocks of one side of a layer, in a portion.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    layer: u32,
    /// 0: K, 1: V.
    side: usize,
    /// Which of the sequence's blocks in the layer's group.
    blocks: Range<usize>,
    /// Bytes of the portion before them.
    offset: u64,
}

/// The part of the stream that one staging buffer holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Portion {
    bytes: u64,
    pieces: Vec<Piece>,
}

/// Cuts the stream of so many blocks of each group into portions of up to `portion_bytes`, each of at least one block.
fn portions(config: &KvCacheConfig, num_blocks: &[usize], portion_bytes: u64) -> Vec<Portion> {
    let mut portions: Vec<Portion> = Vec::new();
    let mut portion = Portion::default();
    for layer in 0..config.num_layers {
        let num_blocks = num_blocks[config.group_of(layer) as usize];
        for (side, layout) in config.sides().enumerate() {
            let mut start = 0;
            while start < num_blocks {
                let fit = (portion_bytes.saturating_sub(portion.bytes) / layout.block_bytes()) as usize;
                if fit == 0 && portion.bytes > 0 {
                    portions.push(std::mem::take(&mut portion));
                    continue;
                }
                // The listed blocks are one dimension of a grid.
                let len = fit.clamp(1, MAX_GRID as usize).min(num_blocks - start);
                portion.pieces.push(Piece { layer, side, blocks: start..start + len, offset: portion.bytes });
                portion.bytes += len as u64 * layout.block_bytes();
                start += len;
            }
        }
    }
    portions.extend((portion.bytes > 0).then_some(portion));
    portions
}

/// Consecutive blocks at consecutive positions.
struct Run {
    block: u32,
    position: u32,
    len: u32,
}

/// The runs among `blocks` that lie in `held`: positions are indices into `blocks`, block ids count from the start of `held`.
fn runs(blocks: &[BlockId], held: &Range<u32>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (position, block) in (0..).zip(blocks).filter(|(_, block)| held.contains(&block.index())) {
        let block = block.index() - held.start;
        match runs.last_mut() {
            Some(run) if (run.block + run.len, run.position + run.len) == (block, position) => run.len += 1,
            _ => runs.push(Run { block, position, len: 1 }),
        }
    }
    runs
}

/// A copy between a side and the scratch buffer.
struct SideCopy<'p> {
    side: &'p wgpu::Buffer,
    side_offset: u64,
    scratch_offset: u64,
    bytes: u64,
}

/// How a portion gets into the scratch buffer, or out of it.
#[derive(Default)]
struct PackPortion<'p> {
    bytes: u64,
    copies: Vec<SideCopy<'p>>,
    dispatches: Vec<Prepared>,
}

/// Everything that packs or unpacks, ready to be recorded.
struct Packing<'p> {
    scratch: wgpu::Buffer,
    portions: Vec<PackPortion<'p>>,
    /// Of the lists that the dispatches read.
    lease: Option<Lease>,
}

/// Bytes of the stream of `num_blocks` blocks, of all groups, or `None` on overflow.
pub(super) fn stream_bytes(config: &KvCacheConfig, num_blocks: u32) -> Option<u64> {
    let block = config.sides().try_fold(0_u64, |bytes, side| bytes.checked_add(side.block_bytes()))?;
    block.checked_mul(num_blocks.into())?.checked_mul(config.layers_per_group().into())
}

/// Takes the end mark off a stream that was read back. Fails if the commands that write it were not submitted.
pub(super) fn strip_marker(stream: &mut Vec<u8>) -> Result<()> {
    if !stream.ends_with(&MARKER) {
        let need = "the encoder submitted before they are read";
        return Err(Error::argument("snapshot", "copies that were never submitted", need));
    }
    stream.truncate(stream.len() - MARKER.len());
    Ok(())
}

impl KvCache {
    /// A staging buffer with these bytes, to copy from. Its memory is the mapping: nothing is queued.
    fn staging(&self, bytes: &[u8]) -> Result<wgpu::Buffer> {
        let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
        self.gpu.create_buffer_with("creating a staging buffer", "folio staging", bytes, usage)
    }

    /// Makes everything that packing (or unpacking) these blocks needs.
    fn packing(&self, blocks: &[Vec<BlockId>], unpack: bool) -> Result<Packing<'_>> {
        let (gpu, config, kernel) = (&self.gpu, &self.config, &self.kernels.pack_blocks);
        let min_run = min_run_bytes(gpu.profile());
        // A block is never larger than a binding, because a side of one block isn't.
        let counts: Vec<_> = blocks.iter().map(Vec::len).collect();
        let plan = portions(config, &counts, PORTION_BYTES.min(gpu.max_storage_bytes()));
        let mut portions: Vec<_> =
            plan.iter().map(|c| PackPortion { bytes: c.bytes, ..PackPortion::default() }).collect();
        // Of each dispatch: portion, buffer, parameters and grid.
        let mut jobs = Vec::new();
        let mut list: Vec<u32> = Vec::new();
        for (portion, piece) in plan.iter().enumerate().flat_map(|(i, c)| c.pieces.iter().map(move |p| (i, p))) {
            let Some(side) = self.layer(piece.layer)?.sides().nth(piece.side) else { continue };
            let block_bytes = side.block_bytes();
            let blocks = &blocks[config.group_of(piece.layer) as usize];
            for (side, held) in side.parts(config.num_blocks) {
                let runs = runs(&blocks[piece.blocks.clone()], &held);
                let count: u32 = runs.iter().map(|run| run.len).sum();
                if u64::from(count) * block_bytes >= min_run * runs.len() as u64 {
                    portions[portion].copies.extend(runs.iter().map(|run| SideCopy {
                        side,
                        side_offset: u64::from(run.block) * block_bytes,
                        scratch_offset: piece.offset + u64::from(run.position) * block_bytes,
                        bytes: u64::from(run.len) * block_bytes,
                    }));
                    continue;
                }
                let block_len = (block_bytes / 16) as u32;
                let workgroups = block_len.div_ceil(kernel.variant.workgroup_size);
                let Some((x, z)) = linear_grid(workgroups.into()) else {
                    return Err(Error::argument("sequence", format!("blocks of {block_bytes} bytes"), "smaller ones"));
                };
                let params = PackParams {
                    list_offset: list.len() as u32,
                    num_blocks: held.end - held.start,
                    block_len,
                    packed_offset: (piece.offset / 16) as u32,
                    grid_x: x,
                    unpack: unpack.into(),
                    ..PackParams::default()
                };
                jobs.push((portion, side, params, [x, count, z]));
                list.extend(runs.iter().flat_map(|r| (0..r.len).flat_map(|i| [r.block + i, r.position + i])));
            }
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let largest = portions.iter().map(|portion| portion.bytes).max().unwrap_or(0);
        let scratch = gpu.create_buffer("creating a scratch buffer", "folio pack", largest, usage)?;
        if jobs.is_empty() {
            return Ok(Packing { scratch, portions, lease: None });
        }
        let lists_start = jobs.len() as u32 * PARAM_BLOCK_WORDS;
        let mut words = Vec::with_capacity(lists_start as usize + list.len());
        for (_, _, params, _) in &jobs {
            push_params(&mut words, &PackParams { list_offset: lists_start + params.list_offset, ..*params });
        }
        words.extend(list);
        let (lists, lease) = Upload::new(gpu, "sequence", words)?.buffer()?;
        let dispatches: Vec<_> = (0..)
            .zip(&jobs)
            .map(|(index, &(_, side, _, grid))| Dispatch {
                program: &kernel.program,
                resources: vec![
                    side.as_entire_binding(),
                    scratch.as_entire_binding(),
                    lists.as_entire_binding(),
                    params_binding::<PackParams>(&lists, index * u64::from(PARAM_BLOCK_WORDS) * 4),
                ],
                grid,
            })
            .collect();
        for (&(portion, ..), dispatch) in jobs.iter().zip(gpu.prepare(&dispatches)?) {
            portions[portion].dispatches.push(dispatch);
        }
        Ok(Packing { scratch, portions, lease: Some(lease) })
    }

    /// Records the copy of these blocks, those of each group, into staging buffers: the stream and [`MARKER`], one part in each. Nothing for no blocks.
    pub(super) fn record_pack(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        blocks: &[Vec<BlockId>],
    ) -> Result<Vec<Readback>> {
        if blocks.iter().all(Vec::is_empty) {
            return Ok(Vec::new());
        }
        let Packing { scratch, portions, lease } = self.packing(blocks, false)?;
        let marker = self.staging(&MARKER)?;
        let last = portions.len() - 1;
        let staging = (0..)
            .zip(&portions)
            .map(|(i, portion)| Readback::new(&self.gpu, portion.bytes + if i == last { marker.size() } else { 0 }))
            .collect::<Result<Vec<_>>>()?;
        // Nothing but the loss of the device fails from here on.
        for (portion, staging) in portions.iter().zip(&staging) {
            for c in &portion.copies {
                encoder.copy_buffer_to_buffer(c.side, c.side_offset, &scratch, c.scratch_offset, c.bytes);
            }
            if !portion.dispatches.is_empty() {
                let recorder = Recorder::from(&mut *encoder);
                recorder.record_prepared(&self.gpu, "folio pack", &portion.dispatches, lease.as_slice())?;
            }
            encoder.copy_buffer_to_buffer(&scratch, 0, staging.buffer(), 0, portion.bytes);
        }
        encoder.copy_buffer_to_buffer(&marker, 0, staging[last].buffer(), portions[last].bytes, marker.size());
        Ok(staging)
    }

    /// Records the copy of a stream into these blocks, those of each group.
    pub(super) fn record_unpack(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        blocks: &[Vec<BlockId>],
        mut stream: &[u8],
    ) -> Result<()> {
        if blocks.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let Packing { scratch, portions, lease } = self.packing(blocks, true)?;
        let mut staging = Vec::with_capacity(portions.len());
        for portion in &portions {
            let (part, rest) = stream.split_at(portion.bytes as usize);
            staging.push(self.staging(part)?);
            stream = rest;
        }
        // Nothing but the loss of the device fails from here on.
        for (portion, staging) in portions.iter().zip(&staging) {
            encoder.copy_buffer_to_buffer(staging, 0, &scratch, 0, portion.bytes);
            for c in &portion.copies {
                encoder.copy_buffer_to_buffer(&scratch, c.scratch_offset, c.side, c.side_offset, c.bytes);
            }
            if !portion.dispatches.is_empty() {
                let recorder = Recorder::from(&mut *encoder);
                recorder.record_prepared(&self.gpu, "folio unpack", &portion.dispatches, lease.as_slice())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::KvFormat;
    use crate::layout::{LayerGroup, LayerGroups};

    /// K blocks of 256 bytes, V blocks of 128.
    const CONFIG: KvCacheConfig =
        KvCacheConfig::new(3, 2, 8).with_blocks(100, 4).with_formats(KvFormat::F32, KvFormat::F16);

    #[test]
    fn portions_are_the_stream_in_order() {
        let two = LayerGroups::new(&[LayerGroup::windowed(9), LayerGroup::ALL]).expect("two groups");
        let (one, two) = (CONFIG, KvCacheConfig { num_layers: 4, ..CONFIG }.with_groups(two));
        for portion_bytes in [1, 128, 255, 256, 300, 1000, 1 << 20] {
            for num_blocks in [0, 1, 2, 7, 70_000] {
                for (config, counts) in [(&one, vec![num_blocks]), (&two, vec![num_blocks.min(3), num_blocks])] {
                    check(config, &counts, portion_bytes);
                }
            }
        }
    }

    fn check(config: &KvCacheConfig, counts: &[usize], portion_bytes: u64) {
        let portions = portions(config, counts, portion_bytes);
        let mut at = Vec::new();
        for portion in &portions {
            let mut bytes = 0;
            for piece in &portion.pieces {
                assert_eq!(piece.offset, bytes);
                assert!((1..=65_535).contains(&piece.blocks.len()));
                bytes += piece.blocks.len() as u64 * [256, 128][piece.side];
                at.extend(piece.blocks.clone().map(|block| (piece.layer, piece.side, block)));
            }
            assert_eq!(portion.bytes, bytes);
            let one = portion.pieces.len() == 1 && portion.pieces[0].blocks.len() == 1;
            assert!(bytes <= portion_bytes || one, "{bytes} of {portion_bytes}");
        }
        let size = config.num_layers as usize / counts.len();
        let want: Vec<_> = (0..config.num_layers)
            .flat_map(|layer| [0, 1].map(|side| (layer, side)))
            .flat_map(|(layer, side)| (0..counts[layer as usize / size]).map(move |block| (layer, side, block)))
            .collect();
        assert!(at == want, "{counts:?} blocks in portions of {portion_bytes}");
        let total: u64 = portions.iter().map(|portion| portion.bytes).sum();
        assert_eq!(Some(total), stream_bytes(config, counts.iter().sum::<usize>() as u32));
    }
}

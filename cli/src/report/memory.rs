//! How a cache's memory grows with its texts: what the formula says, and what the real allocator does.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use folio::sequence::Manager;
use folio::{Gpu, KvCache, KvCacheConfig, KvFormat, KvFormats, SequenceId, wgpu};

use super::data::{Allocated, Fits, Fragmentation, Growth, GrowthPoint, Holes, Lengths, Memory, MemoryModel, Waste};
use super::{Effort, Progress};

/// The cache of Llama 3 8B, whose block tables need no GPU.
const LAYERS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
/// Its positions: what a contiguous cache reserves for each sequence.
const MAX_LEN: u32 = 8192;
const BLOCK_SIZE: u32 = 16;
/// Of the curves with a window, in tokens.
const WINDOW: u32 = 1024;
/// How far curves go, and how many points of the real pool they have.
const GROWTH_LEN: u32 = 4096;
const GROWTH_POINTS: u32 = 24;

const F16: KvFormats = KvFormats::both(KvFormat::F16);

fn paged(formats: KvFormats) -> KvCacheConfig {
    KvCacheConfig::new(LAYERS, KV_HEADS, HEAD_DIM)
        .with_blocks(MAX_LEN / BLOCK_SIZE, BLOCK_SIZE)
        .with_formats(formats.k, formats.v)
}

pub(super) fn measure(gpu: &Gpu, effort: Effort, progress: &Progress) -> Result<Memory> {
    let part = progress.part(4);
    part.next("memory: growth");
    let growth = growth()?;
    let differences = growth.iter().flat_map(|growth| &growth.points);
    let worst_difference = differences.map(|point| point.formula_bytes.abs_diff(point.pool_bytes)).max().unwrap_or(0);
    part.next("memory: waste and how many sequences fit");
    let lens = lengths(if effort.quick { 400 } else { 4000 });
    let waste = waste(&lens)?;
    let fits = fits(&lens)?;
    part.next("memory: pools on the device");
    let allocated = allocated(gpu, effort)?;
    part.next("memory: fragmentation");
    Ok(Memory {
        model: MemoryModel {
            name: "Llama 3 8B",
            num_layers: LAYERS,
            num_kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            max_len: MAX_LEN,
        },
        growth,
        worst_difference,
        lengths: describe(lens),
        waste,
        fits,
        allocated,
        fragmentation: fragmentation(gpu)?,
    })
}

/// Bytes against tokens of one sequence, by the formula and in a real pool.
fn growth() -> Result<Vec<Growth>> {
    let contiguous = KvCacheConfig::contiguous(LAYERS, KV_HEADS, HEAD_DIM, 1, GROWTH_LEN);
    let mut curves = vec![("contiguous", F16, contiguous)];
    curves.extend(KvFormats::ALL.map(|formats| ("paged", formats, paged(formats))));
    curves.push(("window", F16, paged(F16).with_window(WINDOW)));
    curves.into_iter().map(|(kind, formats, config)| grow(kind, formats, config)).collect()
}

fn grow(kind: &'static str, formats: KvFormats, config: KvCacheConfig) -> Result<Growth> {
    let mut manager = Manager::new(config)?;
    let sequence = manager.create();
    let mut points = Vec::new();
    let mut len = 0;
    for i in 0..=GROWTH_POINTS {
        // Not at the ends of blocks only.
        let tokens = (GROWTH_LEN * i / GROWTH_POINTS).saturating_sub(7 * (i % 3)).max(1);
        extend(&mut manager, sequence, tokens - len)?;
        manager.release_hidden(sequence)?;
        len = tokens;
        points.push(GrowthPoint {
            tokens,
            formula_bytes: u64::from(config.held_blocks(tokens)) * config.block_bytes(),
            pool_bytes: manager.memory().used_bytes(),
        });
    }
    let block_size = config.block_size;
    Ok(Growth {
        kind,
        cache: formats.to_string(),
        block_size,
        window: config.groups.get(0).window,
        token_bytes: config.token_bytes(),
        points,
    })
}

/// Appends tokens, one step for all.
fn extend(manager: &mut Manager, sequence: SequenceId, tokens: u32) -> folio::Result<()> {
    if tokens == 0 {
        return Ok(());
    }
    let reservation = manager.reserve(&[(sequence, tokens)])?;
    manager.commit(reservation.pending);
    Ok(())
}

/// The distribution of lengths: its median, its shape (the standard deviation of the logarithm), its shortest text.
const MEDIAN_LEN: f64 = 600.0;
const SIGMA: f64 = 1.0;
const MIN_LEN: u32 = 16;

/// Lengths of texts as people write them: many short ones and a few long ones, log-normal. The same in every run.
fn lengths(count: usize) -> Vec<u32> {
    let mut rng = Rng::with_seed(1);
    let mut normal = move || {
        // Box and Muller 1958. The logarithm's argument is above 0.
        let (u, v) = (1.0 - rng.f64(), rng.f64());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    };
    (0..count).map(|_| ((MEDIAN_LEN * (SIGMA * normal()).exp()) as u32).clamp(MIN_LEN, MAX_LEN)).collect()
}

fn describe(mut lens: Vec<u32>) -> Lengths {
    lens.sort_unstable();
    let at = |share: f64| lens.get((share * lens.len().saturating_sub(1) as f64) as usize).copied().unwrap_or(0);
    Lengths {
        distribution: format!(
            "log-normal with median {MEDIAN_LEN} and sigma {SIGMA}, from {MIN_LEN} to {MAX_LEN} tokens"
        ),
        mean: lens.iter().map(|&len| f64::from(len)).sum::<f64>() / lens.len().max(1) as f64,
        median: at(0.5),
        p90: at(0.9),
        max: at(1.0),
    }
}

/// What the ends of last blocks take, for blocks of several sizes.
fn waste(lens: &[u32]) -> Result<Vec<Waste>> {
    let lens = &lens[..lens.len().min(200)];
    [1, 8, 16, 32, 64, 128, 256]
        .into_iter()
        .map(|block_size| {
            let blocks = lens.iter().map(|len| len.div_ceil(block_size)).sum();
            let mut manager = Manager::new(paged(F16).with_blocks(blocks, block_size))?;
            for &len in lens {
                let sequence = manager.create();
                extend(&mut manager, sequence, len)?;
            }
            let memory = manager.memory();
            Ok(Waste {
                block_size,
                sequences: lens.len() as u32,
                used_bytes: memory.used_bytes(),
                wasted_bytes: memory.wasted_bytes(),
                share: memory.wasted_bytes() as f64 / memory.used_bytes() as f64,
                table_words: blocks,
            })
        })
        .collect()
}

/// How many sequences of these lengths, in their order, a memory holds.
fn fits(lens: &[u32]) -> Result<Vec<Fits>> {
    let mut fits = Vec::new();
    for gigabytes in [1_u64, 2, 4, 8, 16] {
        let memory_bytes = gigabytes << 30;
        let contiguous = KvCacheConfig::contiguous(LAYERS, KV_HEADS, HEAD_DIM, 1, MAX_LEN);
        let mut caches = vec![("contiguous", F16, contiguous)];
        let formats = [KvFormat::F16, KvFormat::Int8, KvFormat::Int4].map(KvFormats::both);
        caches.extend(formats.map(|formats| ("paged", formats, paged(formats))));
        for (kind, formats, config) in caches {
            let blocks = u32::try_from(memory_bytes / config.block_bytes())?;
            ensure!(blocks > 0, "a block of {} bytes is more than {memory_bytes}", config.block_bytes());
            let mut manager = Manager::new(config.with_blocks(blocks, config.block_size))?;
            let mut sequences = 0;
            // As often as it takes: a large pool holds more texts than there are lengths.
            for &len in lens.iter().cycle() {
                let sequence = manager.create();
                match extend(&mut manager, sequence, len) {
                    Ok(()) => sequences += 1,
                    Err(folio::Error::OutOfBlocks { .. }) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            let used = manager.usage();
            let share = f64::from(used.used) / f64::from(used.total);
            fits.push(Fits { memory_bytes, kind, cache: formats.to_string(), sequences, blocks_used: share });
        }
    }
    Ok(fits)
}

/// Pools on the device: what their buffers take. Small ones, of one layer.
fn allocated(gpu: &Gpu, effort: Effort) -> Result<Vec<Allocated>> {
    let formats = if effort.quick { vec![F16] } else { KvFormats::ALL.to_vec() };
    formats
        .into_iter()
        .map(|formats| {
            let config = small(formats);
            let cache = gpu.block_on(KvCache::new(gpu, config))?;
            let (k, v) = cache.layer_buffers(0)?;
            let buffer_bytes = k.iter().chain(v).map(wgpu::Buffer::size).sum();
            Ok(Allocated { cache: formats.to_string(), formula_bytes: config.pool_bytes(), buffer_bytes })
        })
        .collect()
}

/// A cache with the heads of the story model.
fn small(formats: KvFormats) -> KvCacheConfig {
    KvCacheConfig::new(1, 2, 32).with_blocks(256, BLOCK_SIZE).with_formats(formats.k, formats.v)
}

/// A pool in which every other text has ended, before and after its blocks move to the front.
fn fragmentation(gpu: &Gpu) -> Result<Fragmentation> {
    const TEXTS: u32 = 24;
    let cache = gpu.block_on(KvCache::new(gpu, small(F16)))?;
    let texts: Vec<_> = (0..TEXTS).map(|_| cache.create_sequence()).collect();
    // They grow side by side, as those of a batch do.
    for _ in 0..10 {
        let batch: Vec<_> = texts.iter().map(|&text| (text, BLOCK_SIZE)).collect();
        cache.commit(cache.begin_step(&batch)?)?;
    }
    texts.iter().step_by(2).try_for_each(|&text| cache.free(text))?;
    let before = holes(&cache);
    let start = Instant::now();
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let defragment = cache.defragment(&mut encoder)?;
    gpu.queue().submit([encoder.finish()]);
    let moved_blocks = defragment.commit()?;
    gpu.device().poll(wgpu::PollType::wait_indefinitely()).context("waiting for the copies")?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Fragmentation {
        before,
        after: holes(&cache),
        moved_blocks,
        moved_bytes: u64::from(moved_blocks) * cache.config().block_bytes(),
        seconds,
    })
}

fn holes(cache: &KvCache) -> Holes {
    let used: Vec<bool> = cache.block_uses().iter().map(|block| block.holders > 0 || block.indexed).collect();
    let span = used.iter().rposition(|&used| used).map_or(0, |last| last + 1);
    let used_blocks = used.iter().filter(|&&used| used).count();
    let runs = used.windows(2).filter(|pair| pair[0] && !pair[1]).count() + usize::from(used.last() == Some(&true));
    Holes {
        used_blocks: used_blocks as u32,
        span_blocks: span as u32,
        runs: runs as u32,
        holes: 1.0 - used_blocks as f64 / span.max(1) as f64,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    #[test]
    fn pools_grow_as_the_formula_says() {
        for growth in growth().unwrap() {
            let name = format!("{} {}", growth.kind, growth.cache);
            assert_eq!(growth.points.len(), GROWTH_POINTS as usize + 1, "{name}");
            for point in &growth.points {
                assert_eq!(point.formula_bytes, point.pool_bytes, "{name}: {} tokens", point.tokens);
            }
            let last = growth.points.last().unwrap();
            let whole = u64::from(GROWTH_LEN) * growth.token_bytes;
            match growth.kind {
                // A window and a block at most.
                "window" => {
                    assert!(last.pool_bytes <= whole / 4 + growth.token_bytes * u64::from(2 * BLOCK_SIZE), "{name}")
                }
                _ => assert!(last.pool_bytes.abs_diff(whole) < growth.token_bytes * u64::from(BLOCK_SIZE), "{name}"),
            }
        }
    }

    #[test]
    fn paged_pools_hold_more_and_small_blocks_waste_less() {
        let lens = lengths(400);
        let described = describe(lens.clone());
        assert!(
            (400.0..900.0).contains(&f64::from(described.median)) && described.max <= MAX_LEN,
            "{}",
            described.median
        );
        let waste = waste(&lens).unwrap();
        assert_eq!(waste[0].wasted_bytes, 0);
        assert!(waste.windows(2).all(|pair| pair[0].wasted_bytes < pair[1].wasted_bytes));
        let fits = fits(&lens).unwrap();
        for of_memory in fits.chunks(4) {
            let counts: Vec<_> = of_memory.iter().map(|fits| fits.sequences).collect();
            // Every sequence of the contiguous cache takes 1 GiB; half of the bytes hold twice as many, nearly.
            assert_eq!(u64::from(counts[0]), of_memory[0].memory_bytes >> 30);
            assert!(counts[1] > 4 * counts[0] && counts[2] > counts[1] && counts[3] > counts[2], "{counts:?}");
        }
    }
}

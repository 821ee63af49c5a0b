//! The words that a step uploads for the kernels that write it into the cache.

use super::MAX_GRID;
use super::params::{CacheParams, PARAM_BLOCK_WORDS, push_params};

/// Workgroups along x and y of the kernels that a step runs before its layers' attention. The variants of the kernels tell them:
/// [`AppendGrids::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendGrids {
    /// Of `append`.
    pub append: (u32, u32),
    /// Of `copy_blocks`.
    pub copy_blocks: (u32, u32),
}

/// A step's upload: a parameter block of append and rope, one of copy_blocks, then slot and position of every new token, then (source, destination)
/// of every block to copy. The blocks stand at bytes 0 and 256.
///
/// Sums that don't fit 32 bits saturate: such an upload fits no binding, which whoever makes the buffer checks.
#[must_use]
pub fn append_words(
    num_blocks: u32,
    slots: &[u32],
    positions: &[u32],
    copies: &[[u32; 2]],
    grids: AppendGrids,
) -> Vec<u32> {
    debug_assert!(grids.append.0.max(grids.append.1).max(grids.copy_blocks.0) <= MAX_GRID, "{grids:?}");
    let list_offset = 2 * PARAM_BLOCK_WORDS;
    let positions_offset = list_offset.saturating_add(slots.len() as u32);
    let params = CacheParams {
        num_tokens: slots.len() as u32,
        num_copies: copies.len() as u32,
        list_offset,
        positions_offset,
        copies_offset: positions_offset.saturating_add(positions.len() as u32),
        num_blocks,
        ..CacheParams::default()
    };
    let mut words = Vec::with_capacity(list_offset as usize + slots.len() + positions.len() + 2 * copies.len());
    push_params(&mut words, &CacheParams { grid_x: grids.append.0, ..params });
    push_params(&mut words, &CacheParams { grid_x: grids.copy_blocks.0, ..params });
    words.extend_from_slice(slots);
    words.extend_from_slice(positions);
    words.extend_from_slice(copies.as_flattened());
    words
}

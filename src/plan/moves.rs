//! Which rows of an accepted path move, and the words that say so.

use super::MAX_GRID;
use super::params::{CacheParams, PARAM_BLOCK_WORDS, push_params};
use crate::sequence::{Batch, BatchEntry};

/// The slots (`block * block_size + offset`) from and to which the rows of an accepted path of an entry move: to the front of its new tokens.
/// Those that stand there already don't move. Both rise, and no row moves backwards, as a path's tokens stand in its order.
#[must_use]
pub fn path_moves(batch: &Batch, entry: &BatchEntry, block_size: u32, path: &[u32]) -> Vec<[u32; 2]> {
    let slot = |token: u32| {
        let row = entry.context_len.saturating_add(token);
        let block = batch.tables.get(entry.table.clone()).and_then(|table| table.get((row / block_size) as usize));
        block.map(|block| block * block_size + row % block_size)
    };
    let moves = (0..).zip(path).filter(|&(to, &from)| from != to);
    moves.filter_map(|(to, &from)| Some([slot(from)?, slot(to)?])).collect()
}

/// An upload for the kernel `move_rows`: a parameter block, where each list begins (and the last one ends), then the lists. `grid_x` are its
/// workgroups along x.
#[must_use]
pub fn move_words(num_blocks: u32, lists: &[Vec<[u32; 2]>], grid_x: u32) -> Vec<u32> {
    debug_assert!(grid_x <= MAX_GRID, "{grid_x}");
    let list_offset = PARAM_BLOCK_WORDS;
    let params = CacheParams {
        num_copies: lists.len() as u32,
        list_offset,
        copies_offset: list_offset + lists.len() as u32 + 1,
        num_blocks,
        grid_x,
        ..CacheParams::default()
    };
    let mut words = Vec::new();
    push_params(&mut words, &params);
    let mut start = 0;
    words.push(start);
    for list in lists {
        start += list.len() as u32;
        words.push(start);
    }
    lists.iter().for_each(|list| words.extend_from_slice(list.as_flattened()));
    words
}

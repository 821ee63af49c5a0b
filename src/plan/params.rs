//! The parameter blocks of the kernels, as they stand in uploads.

use bytemuck::{Pod, Zeroable};

/// Words from one parameter block of an upload to the next: WebGPU's largest alignment of uniform bindings is 256 bytes.
pub const PARAM_BLOCK_WORDS: u32 = 64;

/// Appends a parameter block and pads it to the next one. What is there ends with a whole block.
pub(crate) fn push_params<P: Pod>(words: &mut Vec<u32>, params: &P) {
    let start = words.len();
    words.extend_from_slice(bytemuck::cast_slice(std::slice::from_ref(params)));
    words.resize(start + PARAM_BLOCK_WORDS as usize, 0);
}

/// Parameters of append, copy_blocks, gather and rope.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct CacheParams {
    /// Tokens: new ones to append or to rotate, or the sequence's to gather.
    pub num_tokens: u32,
    /// Blocks to copy.
    pub num_copies: u32,
    /// Where in `step_lists` the slots (append) or block table (gather) start, in words.
    pub list_offset: u32,
    /// Where the (source, destination) pairs start, in words.
    pub copies_offset: u32,
    /// Blocks of the pool; ids are clamped below it.
    pub num_blocks: u32,
    /// Workgroups along x: a kernel's linear index continues along y.
    pub grid_x: u32,
    /// Where the positions of the new tokens start, in words.
    pub positions_offset: u32,
    /// Keeps the block a multiple of 16 bytes.
    pub reserved: u32,
}

/// Parameters of pack_blocks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PackParams {
    /// Where in `step_lists` the (block, position) pairs start, in words.
    pub list_offset: u32,
    /// Blocks that the bound side holds; ids are clamped below it.
    pub num_blocks: u32,
    /// Units of 16 bytes of a block.
    pub block_len: u32,
    /// Units of 16 bytes before position 0 of the packed blocks.
    pub packed_offset: u32,
    /// Workgroups along x: the bytes of a block continue along z.
    pub grid_x: u32,
    /// 0: from the side to the packed blocks; 1: back.
    pub unpack: u32,
    /// Keeps the block a multiple of 16 bytes.
    pub reserved: [u32; 2],
}

/// A window that hides nothing: longer than any sequence, and with room for a key's position beside it in 32 bits.
pub const NO_WINDOW: u32 = 1 << 31;

/// Parameters of decode, prefill and merge.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct AttendParams {
    /// First work item, in words of the plan buffer.
    pub items_offset: u32,
    /// Work items.
    pub num_items: u32,
    /// Workgroups along x: item index = x + z * grid_x.
    pub grid_x: u32,
    /// Blocks of the pool; ids are clamped below it.
    pub num_blocks: u32,
    /// What q is multiplied by: softmax_scale * log2 e, or softmax_scale / softcap.
    pub qk_scale: f32,
    /// softcap * log2 e.
    pub softcap_log2e: f32,
    /// Newest keys that are visible; at most [`NO_WINDOW`].
    pub window: u32,
    /// Keeps the block a multiple of 16 bytes.
    pub reserved: u32,
}

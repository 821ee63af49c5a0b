//! What each kernel binds, and the parameter blocks. Tests compare both with what naga finds in the shaders.

use bytemuck::{Pod, Zeroable};

use std::borrow::Cow;

use super::variant::{Kernel, Variant};
use crate::cache::Segments;

/// How a buffer is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    Write,
    /// `var<uniform>`
    Uniform,
}

/// One binding of group 0. Its number is its place in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Name of the shader's variable.
    pub name: Cow<'static, str>,
    /// How the buffer is bound.
    pub access: Access,
}

const fn read(name: &'static str) -> Binding {
    Binding { name: Cow::Borrowed(name), access: Access::Read }
}

const fn write(name: &'static str) -> Binding {
    Binding { name: Cow::Borrowed(name), access: Access::Write }
}

const PARAMS: Binding = Binding { name: Cow::Borrowed("params"), access: Access::Uniform };

/// The segments of K, then those of V.
fn caches(variant: &Variant, access: Access) -> impl Iterator<Item = Binding> {
    let side = move |name: &'static str, segments: Segments| {
        (0..segments.count).map(move |i| {
            let name = if segments.count == 1 { Cow::Borrowed(name) } else { Cow::Owned(format!("{name}_{i}")) };
            Binding { name, access }
        })
    };
    side("k_cache", variant.k_segments).chain(side("v_cache", variant.v_segments))
}

/// Storage buffers that the attention kernels bind, a buffer for the lse not counted.
pub(crate) fn attention_storage_buffers(k: Segments, v: Segments) -> u32 {
    // q, plan, out, partials.
    4 + k.count + v.count
}

/// The bindings of a variant, in order.
#[must_use]
pub fn bindings(variant: &Variant) -> Vec<Binding> {
    // What stands before the cache's sides, how those are bound, and what follows them.
    let (first, access, rest) = match variant.kernel {
        Kernel::Append => (vec![read("k_new"), read("v_new")], Some(Access::Write), vec![read("step_lists"), PARAMS]),
        Kernel::CopyBlocks => (vec![], Some(Access::Write), vec![read("step_lists"), PARAMS]),
        Kernel::PackBlocks => (vec![write("side"), write("packed_blocks"), read("step_lists"), PARAMS], None, vec![]),
        Kernel::Gather => {
            (vec![], Some(Access::Read), vec![read("step_lists"), write("k_out"), write("v_out"), PARAMS])
        }
        Kernel::Decode | Kernel::Prefill => {
            (vec![read("q")], Some(Access::Read), vec![read("plan"), write("out"), write("partials"), PARAMS])
        }
        Kernel::Rope => (vec![write("x"), read("step_lists"), read("rope_table"), PARAMS], None, vec![]),
        Kernel::Merge => (vec![read("partials"), read("plan"), write("out"), PARAMS], None, vec![]),
    };
    let mut bindings = first;
    bindings.extend(access.into_iter().flat_map(|access| caches(variant, access)));
    bindings.extend(rest);
    if variant.flags.lse && matches!(variant.kernel, Kernel::Decode | Kernel::Prefill | Kernel::Merge) {
        bindings.push(write("lse"));
    }
    if variant.rope.is_some() && variant.kernel == Kernel::Append {
        bindings.push(read("rope_table"));
    }
    bindings
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
    /// Where the ALiBi slopes, then the sinks, of all query heads start, in words (both times log2 e).
    pub head_offset: u32,
    /// What q is multiplied by: softmax_scale * log2 e, or softmax_scale / softcap.
    pub qk_scale: f32,
    /// softcap * log2 e.
    pub softcap_log2e: f32,
    /// Newest keys that are visible; at most 2^31, which is longer than any sequence.
    pub window: u32,
    /// Blocks of the pool; ids are clamped below it.
    pub num_blocks: u32,
    /// Keeps the block 48 bytes long.
    pub reserved: [u32; 4],
}

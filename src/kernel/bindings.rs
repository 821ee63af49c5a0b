//! What each kernel binds, and the parameter blocks. Tests compare both with what naga finds in the shaders.

use bytemuck::{Pod, Zeroable};

use super::variant::{Kernel, Variant};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Name of the shader's variable.
    pub name: &'static str,
    /// How the buffer is bound.
    pub access: Access,
}

const fn read(name: &'static str) -> Binding {
    Binding { name, access: Access::Read }
}

const fn write(name: &'static str) -> Binding {
    Binding { name, access: Access::Write }
}

const PARAMS: Binding = Binding { name: "params", access: Access::Uniform };

/// The bindings of a variant, in order.
#[must_use]
pub fn bindings(variant: &Variant) -> Vec<Binding> {
    let mut bindings = match variant.kernel {
        Kernel::Append => {
            vec![read("k_new"), read("v_new"), write("k_cache"), write("v_cache"), read("step"), PARAMS]
        }
        Kernel::CopyBlocks => vec![write("k_cache"), write("v_cache"), read("step"), PARAMS],
        Kernel::Gather => {
            vec![read("k_cache"), read("v_cache"), read("step"), write("k_out"), write("v_out"), PARAMS]
        }
        Kernel::Decode | Kernel::Prefill => {
            vec![read("q"), read("k_cache"), read("v_cache"), read("plan"), write("out"), write("partials"), PARAMS]
        }
        Kernel::Rope => vec![write("x"), read("step"), read("rope_table"), PARAMS],
        Kernel::Merge => vec![read("partials"), read("plan"), write("out"), PARAMS],
    };
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
    /// Tokens: new ones to append or to turn, or the sequence's to gather.
    pub num_tokens: u32,
    /// Blocks to copy.
    pub num_copies: u32,
    /// Where in the step buffer the slots (append) or block table (gather) start, in words.
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
    /// Newest keys that are visible.
    pub window: u32,
    /// Blocks of the pool; ids are clamped below it.
    pub num_blocks: u32,
    /// Keeps the block 48 bytes long.
    pub reserved: [u32; 4],
}

//! What each kernel binds. Tests compare it with what naga finds in the shaders.

use std::borrow::Cow;

use super::variant::{Kernel, Variant};
use crate::layout::Segments;

/// How a resource is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    Write,
    /// `var<uniform>`
    Uniform,
    /// `texture_2d<u32>`
    Texture,
    /// `texture_storage_2d<rgba32uint, write>`
    TextureWrite,
}

/// One binding of group 0. Its number is its place in the table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Binding {
    /// Name of the shader's variable.
    pub name: Cow<'static, str>,
    /// How the resource is bound.
    pub access: Access,
}

impl Binding {
    pub(crate) const fn new(name: &'static str, access: Access) -> Self {
        Self { name: Cow::Borrowed(name), access }
    }
}

const fn read(name: &'static str) -> Binding {
    Binding { name: Cow::Borrowed(name), access: Access::Read }
}

const fn write(name: &'static str) -> Binding {
    Binding { name: Cow::Borrowed(name), access: Access::Write }
}

const PARAMS: Binding = Binding { name: Cow::Borrowed("params"), access: Access::Uniform };

/// The segments of K, then those of V. Where values are keys, kernels that read bind these twice.
fn caches(variant: &Variant, access: Access) -> impl Iterator<Item = Binding> {
    let side = move |name: &'static str, segments: Segments| {
        (0..segments.count).map(move |i| {
            let name = if segments.count == 1 { Cow::Borrowed(name) } else { Cow::Owned(format!("{name}_{i}")) };
            Binding { name, access }
        })
    };
    let has_v = !variant.latent || access == Access::Read;
    side("k_cache", variant.k_segments).chain(has_v.then(|| side("v_cache", variant.v_segments)).into_iter().flatten())
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
        Kernel::Append => {
            let mut rows = vec![read("k_new")];
            rows.extend((!variant.latent).then(|| read("v_new")));
            (rows, Some(Access::Write), vec![read("step_lists"), PARAMS])
        }
        Kernel::AppendQkv => (vec![write("qkv")], Some(Access::Write), vec![read("step_lists"), PARAMS]),
        Kernel::CopyBlocks | Kernel::MoveRows => (vec![], Some(Access::Write), vec![read("step_lists"), PARAMS]),
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
    if variant.reads_heads() {
        bindings.push(Binding { name: Cow::Borrowed("heads"), access: Access::Uniform });
    }
    if variant.rope.is_some() && matches!(variant.kernel, Kernel::Append | Kernel::AppendQkv) {
        bindings.push(read("rope_table"));
    }
    if variant.head_norm {
        bindings.push(read("norm_weights"));
    }
    if variant.sink_position.is_some() {
        bindings.push(write("sink_q"));
    }
    bindings
}

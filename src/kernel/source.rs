//! [`compose`]: a [`Variant`] becomes WGSL text.
//!
//! Shaders are minijinja templates that see the variant's fields; what they share are parts that they include. Rust pastes no shader text.

use minijinja::context;

use super::geometry::Geometry;
use super::target::Profile;
use super::template;
use super::variant::{Kernel, Variant};
use crate::error::Result;
use crate::layout::{HostRows, KvLayout, Segments};
use crate::plan::{LOGIT_FLOOR, MERGE_ITEM_WORDS, NO_PARTIAL, TREE_MASK, WORK_ITEM_WORDS};
use crate::sequence::TokenTree;

fn template_name(variant: &Variant) -> &'static str {
    match (variant.kernel, variant.target.profile) {
        (Kernel::Append, _) => "append.wgsl",
        (Kernel::AppendQkv, _) => "append_qkv.wgsl",
        (Kernel::CopyBlocks, _) => "copy_blocks.wgsl",
        (Kernel::MoveRows, _) => "move_rows.wgsl",
        (Kernel::PackBlocks, _) => "pack_blocks.wgsl",
        (Kernel::Gather, _) => "gather.wgsl",
        (Kernel::Merge, _) => "merge.wgsl",
        (Kernel::Rope, _) => "rope.wgsl",
        (Kernel::Decode, Profile::Cpu) => "cpu/decode.wgsl",
        (Kernel::Decode, Profile::Gpu) => "gpu/decode.wgsl",
        (Kernel::Prefill, Profile::Cpu) => "cpu/prefill.wgsl",
        (Kernel::Prefill, Profile::Gpu) if variant.target.matrix.is_some() => "gpu/prefill_matrix.wgsl",
        (Kernel::Prefill, Profile::Gpu) => "gpu/prefill.wgsl",
    }
}

/// What `shared/kv_side.wgsl` knows of a side: where its rows lie and how it is cut.
fn side(name: &str, layout: &KvLayout, segments: Segments) -> minijinja::Value {
    context! {
        name,
        format => layout.format.shader_name(),
        row_scales => layout.format.has_row_scales(),
        channel_scales => layout.format.has_channel_scales(),
        // The largest code, in formats with scales.
        levels => (1_u64 << layout.format.element_bits()) - 1,
        // The code that packed dot products count from, so that codes are as small as they can be: the middle of the range.
        centre => (1_u64 << layout.format.element_bits()) / 2,
        row_dim => layout.row_dim,
        row_bytes => layout.row_bytes(),
        block_rows => layout.block_rows(),
        block_bytes => layout.block_bytes(),
        segments => segments.count,
        segment_blocks => segments.blocks,
    }
}

/// What `shared/host_rows.wgsl` knows of a host's rows.
fn host_rows(rows: &HostRows) -> minijinja::Value {
    let HostRows { halves, start, token_stride, head_stride, .. } = *rows;
    context! { halves, start, token_stride, head_stride, strided => rows.strided() }
}

/// The WGSL text of a variant.
///
/// # Errors
/// [`Error::Shader`](crate::Error::Shader) if a template is broken, which tests over all variants exclude.
pub fn compose(variant: &Variant) -> Result<String> {
    let v = variant;
    let body = template::render(
        template_name(v),
        context! {
                head_dim => v.head_dim,
                value_dim => v.value_dim,
                num_kv_heads => v.num_kv_heads,
                group_size => v.group_size,
                num_q_heads => v.num_kv_heads * v.group_size,
                block_size => v.block_size,
                k_format => v.k_format.shader_name(),
                v_format => v.v_format.shader_name(),
                k_side => side("k", &v.k_layout(), v.k_segments),
                v_side => side("v", &v.v_layout(), v.v_segments),
                q_rows => host_rows(&v.q_rows),
                out_rows => host_rows(&v.out_rows),
                k_rows => host_rows(&v.k_rows),
                v_rows => host_rows(&v.v_rows),
                causal => v.flags.causal,
                window => v.flags.window,
                softcap => v.flags.softcap,
                alibi => v.flags.alibi,
                sinks => v.flags.sinks,
                mask => v.flags.mask,
                lse => v.flags.lse,
                latent => v.latent,
            heads => v.reads_heads(),
                rope => v.rope.map(|rope| rope.layout.shader_name()),
                rotary_dim => v.rope.map(|rope| rope.rotary_dim),
                rotary_start => v.rope.map(|rope| rope.rotary_start),
                head_norm => v.head_norm,
                sink_queries => v.sink_position.is_some(),
                sink_position => v.sink_position.unwrap_or(0),
                packed_dots => v.packed_dots,
                regions => v.qkv_regions().map(template::region_context),
                subgroups => v.target.subgroups,
                subgroup_size => v.target.subgroup_size,
                int64 => v.target.int64,
                profile => if v.target.profile == Profile::Cpu { "cpu" } else { "gpu" },
                item_words => WORK_ITEM_WORDS,
                merge_item_words => MERGE_ITEM_WORDS,
                no_partial => NO_PARTIAL,
                tree_mask => TREE_MASK,
                max_moves => TokenTree::MAX_LEN,
                logit_floor => format!("{LOGIT_FLOOR:e}f"),
                workgroup_size => v.workgroup_size,
                tile_q => v.tile_q,
                tile_kv => v.tile_kv,
            geometry => Geometry::of(v).context(),
        },
    )?;
    let enable = variant.target.enable_directives && variant.features().subgroups;
    Ok(if enable { format!("enable subgroups;\n{body}") } else { body })
}

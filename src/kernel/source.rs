//! [`compose`]: a [`Variant`] becomes WGSL text.
//!
//! Shaders are minijinja templates that see the variant's fields; what they share are parts that they include. Rust pastes no shader text.

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, context};

use super::geometry::Geometry;
use super::variant::{Kernel, Variant};
use crate::cache::{KvLayout, Segments};
use crate::error::{Error, Result};
use crate::gpu::Profile;
use crate::kernel::LOGIT_FLOOR;
use crate::plan::{MERGE_ITEM_WORDS, NO_PARTIAL, WORK_ITEM_WORDS};

macro_rules! templates {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../shaders/", $name)))),*]
    };
}

/// Every file under `shaders/`, by the name that templates include it by.
const TEMPLATES: &[(&str, &str)] = templates![
    "append.wgsl",
    "copy_blocks.wgsl",
    "cpu/decode.wgsl",
    "cpu/prefill.wgsl",
    "gather.wgsl",
    "gpu/decode.wgsl",
    "gpu/prefill.wgsl",
    "merge.wgsl",
    "pack_blocks.wgsl",
    "rope.wgsl",
    "shared/attend.wgsl",
    "shared/attend_interface.wgsl",
    "shared/cache_params.wgsl",
    "shared/cpu_bindings.wgsl",
    "shared/cpu_item.wgsl",
    "shared/cpu_kv.wgsl",
    "shared/gpu_interface.wgsl",
    "shared/gpu_kv.wgsl",
    "shared/kv_codes.wgsl",
    "shared/kv_rows.wgsl",
    "shared/kv_side.wgsl",
    "shared/rope.wgsl",
];

/// Parsed templates: constant data, filled on first use.
static ENVIRONMENT: LazyLock<Result<Environment<'static>, String>> = LazyLock::new(|| {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| format!("syntax: {e:#}"))?);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    for (name, text) in TEMPLATES {
        environment.add_template(name, text).map_err(|e| format!("{name}: {e:#}"))?;
    }
    Ok(environment)
});

fn template_name(variant: &Variant) -> &'static str {
    match (variant.kernel, variant.target.profile) {
        (Kernel::Append, _) => "append.wgsl",
        (Kernel::CopyBlocks, _) => "copy_blocks.wgsl",
        (Kernel::PackBlocks, _) => "pack_blocks.wgsl",
        (Kernel::Gather, _) => "gather.wgsl",
        (Kernel::Merge, _) => "merge.wgsl",
        (Kernel::Rope, _) => "rope.wgsl",
        (Kernel::Decode, Profile::Cpu) => "cpu/decode.wgsl",
        (Kernel::Decode, Profile::Gpu) => "gpu/decode.wgsl",
        (Kernel::Prefill, Profile::Cpu) => "cpu/prefill.wgsl",
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
        row_bytes => layout.row_bytes(),
        block_rows => layout.block_rows(),
        block_bytes => layout.block_bytes(),
        segments => segments.count,
        segment_blocks => segments.blocks,
    }
}

/// The WGSL text of a variant.
///
/// # Errors
/// [`Error::Wgpu`] if a template is broken, which tests over all variants exclude.
pub fn compose(variant: &Variant) -> Result<String> {
    let failed = |message: String| Error::Wgpu { during: "composing a shader", message };
    let environment = ENVIRONMENT.as_ref().map_err(|message| failed(message.clone()))?;
    let v = variant;
    let body = environment
        .get_template(template_name(v))
        .and_then(|template| {
            template.render(context! {
                head_dim => v.head_dim,
                num_kv_heads => v.num_kv_heads,
                group_size => v.group_size,
                num_q_heads => v.num_kv_heads * v.group_size,
                block_size => v.block_size,
                k_format => v.k_format.shader_name(),
                v_format => v.v_format.shader_name(),
                k_side => side("k", &v.k_layout(), v.k_segments),
                v_side => side("v", &v.v_layout(), v.v_segments),
                causal => v.flags.causal,
                window => v.flags.window,
                softcap => v.flags.softcap,
                alibi => v.flags.alibi,
                sinks => v.flags.sinks,
                mask => v.flags.mask,
                lse => v.flags.lse,
                rope => v.rope.map(|rope| rope.layout.shader_name()),
                rotary_dim => v.rope.map(|rope| rope.rotary_dim),
                subgroups => v.target.subgroups,
                subgroup_size => v.target.subgroup_size,
                int64 => v.target.int64,
                profile => if v.target.profile == Profile::Cpu { "cpu" } else { "gpu" },
                item_words => WORK_ITEM_WORDS,
                merge_item_words => MERGE_ITEM_WORDS,
                no_partial => NO_PARTIAL,
                logit_floor => format!("{LOGIT_FLOOR:e}f"),
                workgroup_size => v.workgroup_size,
                tile_q => v.tile_q,
                tile_kv => v.tile_kv,
                geometry => Geometry::of(v).context(),
            })
        })
        .map_err(|e| failed(format!("{e:#}")))?;
    let enable = variant.target.enable_directives && variant.features().contains(wgpu::Features::SUBGROUP);
    Ok(if enable { format!("enable subgroups;\n{body}") } else { body })
}

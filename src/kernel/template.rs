//! The one template environment: every shader file of the crate, parsed once.
//!
//! Shaders are minijinja templates; what they share are parts that they include. Rust pastes no shader text.

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior};

use crate::error::{Error, Result};
use crate::layout::Region;

macro_rules! templates {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../shaders/", $name)))),*]
    };
}

/// Every file under `shaders/`, by the name that templates include it by.
const TEMPLATES: &[(&str, &str)] = templates![
    "append.wgsl",
    "append_qkv.wgsl",
    "copy_blocks.wgsl",
    "cpu/decode.wgsl",
    "cpu/prefill.wgsl",
    "gather.wgsl",
    "gpu/decode.wgsl",
    "gpu/prefill.wgsl",
    "gpu/prefill_matrix.wgsl",
    "measure/plain_copy.wgsl",
    "measure/plain_multiply_add.wgsl",
    "measure/plain_read.wgsl",
    "measure/plain_workgroup.wgsl",
    "merge.wgsl",
    "merge_states.wgsl",
    "model/activate.wgsl",
    "model/activation.wgsl",
    "model/add_experts.wgsl",
    "model/add_positions.wgsl",
    "model/head_linear.wgsl",
    "model/linear_activation.wgsl",
    "model/linear_bindings.wgsl",
    "model/linear_cpu.wgsl",
    "model/linear_gather.wgsl",
    "model/linear_matmul.wgsl",
    "model/linear_matmul_matrix.wgsl",
    "model/linear_matvec.wgsl",
    "model/linear_outputs.wgsl",
    "model/linear_params.wgsl",
    "model/linear_parts.wgsl",
    "model/linear_stage.wgsl",
    "model/linear_tiles.wgsl",
    "model/linear_x.wgsl",
    "model/norm.wgsl",
    "model/sample.wgsl",
    "model/select_experts.wgsl",
    "model/select_rows.wgsl",
    "model/sort_routes.wgsl",
    "model/wide.wgsl",
    "move_rows.wgsl",
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
    "shared/host_rows.wgsl",
    "shared/kv_codes.wgsl",
    "shared/kv_rows.wgsl",
    "shared/kv_side.wgsl",
    "shared/packed_queries.wgsl",
    "shared/rope.wgsl",
    "shared/rotate_in_place.wgsl",
    "shared/rotated_rows.wgsl",
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

/// A region, for a template.
pub(crate) fn region_context(region: Region) -> minijinja::Value {
    minijinja::context! { first_col => region.first_col, width => region.width, offset => region.offset }
}

/// Renders a template. An unknown name in it is an error.
///
/// # Errors
/// [`Error::Shader`] if the template is broken, which tests over all kernels exclude.
pub(crate) fn render(template: &str, values: minijinja::Value) -> Result<String> {
    let environment = ENVIRONMENT.as_ref().map_err(|message| Error::Shader(message.clone()))?;
    environment
        .get_template(template)
        .and_then(|template| template.render(values))
        .map_err(|error| Error::Shader(format!("{error:#}")))
}

//! The kernel that merges attention states.

use minijinja::context;

use super::bindings::{Access, Binding};
use super::target::{ShaderFeatures, Source};
use super::template::render;
use crate::error::{Error, Result};
use crate::layout::MAX_HEAD_DIM;
use crate::plan::MAX_GRID;

/// Invocations of a workgroup: WebGPU's smallest maximum is 256, and 64 fill the lanes of every GPU.
pub(crate) const STATES_WORKGROUP_SIZE: u32 = 64;

/// The kernel behind `MergeStates`. Bindings: `outs`, `lses`, `out`, `lse`; workgroups: as many as `rows * head_dim / 4` invocations need, in rows
/// of 65 535 along y.
///
/// # Errors
/// [`Error::Argument`] for a `head_dim` that is no multiple of 4 from 4 to the largest that caches have.
pub fn merge_states_source(head_dim: u32) -> Result<Source> {
    if head_dim == 0 || head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(4) {
        let rule = format!("a multiple of 4 from 4 to {MAX_HEAD_DIM}");
        return Err(Error::argument("head_dim", head_dim, rule));
    }
    let values = context! { head_dim, workgroup_size => STATES_WORKGROUP_SIZE, grid_x => MAX_GRID };
    Ok(Source {
        entry_point: "merge_states",
        text: render("merge_states.wgsl", values)?,
        bindings: vec![
            Binding::new("outs", Access::Read),
            Binding::new("lses", Access::Read),
            Binding::new("out", Access::Write),
            Binding::new("lse", Access::Write),
        ],
        workgroup_size: STATES_WORKGROUP_SIZE,
        workgroup_bytes: 0,
        features: ShaderFeatures::default(),
    })
}

//! [`MergeStates`]: partial results over disjoint keys become one.

use std::sync::Arc;

use super::check_distinct;
use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Dispatch, Gpu, Program, Recorder};
use crate::kernel::{STATES_WORKGROUP_SIZE, merge_states_source};
use crate::plan::linear_grid;

/// Merges attention states: what [`Attention::attend_with_lse`](super::Attention::attend_with_lse) yields over disjoint sets of keys, for the same
/// queries, becomes what it would yield over all of them.
///
/// A state of a row is a pair `(out, lse)`: with the weights `w = exp(logit)` of its keys, `lse = ln(sum(w))` and `out = sum(w v) / sum(w)`. States
/// `i` over disjoint keys merge to
///
/// ```text
/// lse = ln(sum_i(exp(lse_i)))        out = sum_i(exp(lse_i - lse) * out_i)
/// ```
///
/// Merging is associative and commutative but for rounding; the states of a call are added in their order, so that the same call has the same bits.
/// The identity is a state of no keys, an `lse` of minus infinity, whatever its `out` holds: it changes no bit of the result, and a row that has
/// nothing else yields 0 and minus infinity. A state alone stays as it is, to the bit. Sinks count once: give them to one of the calls only.
/// (FlashAttention, Dao et al. 2022, section 3.1; the operation of this name is FlashInfer's, Ye et al. 2025.)
#[derive(Debug)]
pub struct MergeStates {
    gpu: Gpu,
    head_dim: u32,
    program: Arc<Program>,
}

impl MergeStates {
    /// Compiles the kernel.
    ///
    /// # Errors
    /// [`Error::Argument`] for a `head_dim` that is no multiple of 4 or larger than caches have; [`Error::Wgpu`] if it doesn't compile.
    pub async fn new(gpu: &Gpu, head_dim: u32) -> Result<Self> {
        let program = Program::get(gpu, merge_states_source(head_dim)?).await?;
        Ok(Self { gpu: gpu.clone(), head_dim, program })
    }

    /// [`MergeStates::new`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`MergeStates::new`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new_blocking(gpu: &Gpu, head_dim: u32) -> Result<Self> {
        pollster::block_on(Self::new(gpu, head_dim))
    }

    /// Records the merging of `num_states` states of `num_rows` rows (tokens times query heads).
    ///
    /// `outs`: f32 `[num_states, num_rows, head_dim]`; `lses`: f32 `[num_states, num_rows]`; `out`: f32 `[num_rows, head_dim]`; `lse`: f32
    /// `[num_rows]`. Each range needs usage `STORAGE`, an aligned offset and exactly this size, and a buffer that is none of the others.
    ///
    /// # Errors
    /// [`Error::Argument`] for no states or rows, or ranges that don't fit; [`Error::Unsupported`] if they don't fit into a binding;
    /// [`Error::Wgpu`].
    #[expect(clippy::too_many_arguments, reason = "two shapes and four buffers")]
    pub fn record<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        num_states: u32,
        num_rows: u32,
        outs: impl Into<BufferRef<'a>>,
        lses: impl Into<BufferRef<'a>>,
        out: impl Into<BufferRef<'a>>,
        lse: impl Into<BufferRef<'a>>,
    ) -> Result<()> {
        for (argument, count) in [("num_states", num_states), ("num_rows", num_rows)] {
            if count == 0 {
                return Err(Error::argument(argument, 0, "at least 1"));
            }
        }
        let (states, rows) = (u64::from(num_states), u64::from(num_rows));
        let all = states * rows;
        let elements = |rows: u64| rows.saturating_mul(self.head_dim.into());
        let outs = outs.into().check(&self.gpu, "outs", elements(all), true)?;
        let lses = lses.into().check(&self.gpu, "lses", all, true)?;
        let out = out.into().check(&self.gpu, "out", elements(rows), true)?;
        let lse = lse.into().check(&self.gpu, "lse", rows, true)?;
        // What is only read may share a buffer.
        let read = [("outs", Some(&outs)), ("lses", Some(&lses))];
        check_distinct("out", &out, &read)?;
        check_distinct("lse", &lse, &[read[0], read[1], ("out", Some(&out))])?;
        let invocations = rows * u64::from(self.head_dim / 4);
        let too_many = || Error::argument("num_rows", num_rows, "fewer: their workgroups exceed a grid");
        let (x, y) = linear_grid(invocations.div_ceil(STATES_WORKGROUP_SIZE.into())).ok_or_else(too_many)?;
        let resources = vec![outs.binding(), lses.binding(), out.binding(), lse.binding()];
        let dispatch = Dispatch { program: &self.program, resources, grid: [x, y, 1] };
        recorder.into().record(&self.gpu, "folio merge_states", &[dispatch], &[])
    }
}

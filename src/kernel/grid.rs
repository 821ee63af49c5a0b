//! Workgroups of the kernels whose grids follow from token and block counts. Those of attention come with the plan.

use super::variant::{Kernel, Variant};
use crate::error::{Error, Result};
use crate::plan::{AppendGrids, linear_grid};

impl Variant {
    /// Workgroups for a number of invocations: (x, y).
    pub(crate) fn grid(&self, argument: &'static str, invocations: u64) -> Result<(u32, u32)> {
        // Kernels number their invocations with u32.
        let workgroups = invocations.div_ceil(self.workgroup_size.into());
        linear_grid(workgroups).filter(|_| invocations <= u64::from(u32::MAX)).ok_or_else(|| {
            Error::argument(argument, format!("{invocations} invocations"), "fewer than 2^32; use smaller steps")
        })
    }

    /// Workgroups of `append` for a number of tokens: (x, y).
    pub(crate) fn append_grid(&self, argument: &'static str, num_tokens: u32) -> Result<(u32, u32)> {
        self.grid(argument, self.append_invocations(u64::from(num_tokens) * u64::from(self.num_kv_heads)))
    }

    /// Workgroups of `append_qkv` for a number of tokens: (x, y).
    pub(crate) fn append_qkv_grid(&self, argument: &'static str, num_tokens: u32) -> Result<(u32, u32)> {
        let heads = u64::from(self.num_kv_heads) * (u64::from(self.group_size) + 1);
        self.grid(argument, self.append_invocations(u64::from(num_tokens) * heads))
    }

    /// Workgroups of `copy_blocks` for a number of blocks: (x, y).
    pub(crate) fn copy_grid(&self, argument: &'static str, num_copies: u32) -> Result<(u32, u32)> {
        // An invocation copies 16 bytes of K and of V.
        let block_bytes = self.k_layout().block_bytes().max(self.v_layout().block_bytes());
        self.grid(argument, u64::from(num_copies) * block_bytes / 16)
    }

    /// Workgroups of `move_rows` for a number of lists: (x, y).
    pub(crate) fn move_grid(&self, argument: &'static str, num_lists: u32) -> Result<(u32, u32)> {
        // An invocation moves 4 bytes of the rows of K and of V of a head.
        let row_bytes = self.k_layout().token_row_bytes().max(self.v_layout().token_row_bytes());
        self.grid(argument, u64::from(num_lists) * u64::from(self.num_kv_heads) * row_bytes / 4)
    }
}

impl AppendGrids {
    /// The grids of a step, for [`append_words`](crate::plan::append_words). `append` and `copy_blocks` are the variants that will run; a step
    /// without copies needs no dispatch of the second.
    ///
    /// # Errors
    /// [`Error::Argument`] for a variant of another kernel, or more invocations than kernels can number.
    pub fn new(append: &Variant, copy_blocks: &Variant, num_tokens: u32, num_copies: u32) -> Result<Self> {
        for (argument, variant, kernel) in
            [("append", append, Kernel::Append), ("copy_blocks", copy_blocks, Kernel::CopyBlocks)]
        {
            if variant.kernel != kernel {
                return Err(Error::argument(argument, variant.kernel.entry_point(), kernel.entry_point()));
            }
        }
        Ok(Self {
            append: append.append_grid("batch", num_tokens)?,
            copy_blocks: copy_blocks.copy_grid("batch", num_copies)?,
        })
    }
}

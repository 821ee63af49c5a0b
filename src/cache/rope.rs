//! [`Rope`]: rotary position embedding on the GPU, of K while it is appended and of Q in place. It is a part of the cache's layer because it
//! is a variant of `append`.

use super::append_rows::{AppendRows, StepRows};
use super::record::AppendKernel;
use super::{KvCache, Step};
use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Gpu, Recorder};
use crate::kernel::RopeConfig;
use crate::layout::{KvCacheConfig, RowLayout};
use crate::plan::MAX_GRID;

/// Rotary position embedding for a [`KvCache`]: a table of frequencies and two compiled kernels. Make one per distinct
/// [`RopeConfig`] (a model whose layers alternate between two bases has two) and use it for all layers and steps.
///
/// [`KvCache::append`] rotates K on its way into the cache, at no extra pass over memory; [`Rope::rotate`] rotates Q in
/// place. Positions come with the step: a token's index in its sequence, or what the caller says
/// ([`KvCache::begin_step_with_positions`]).
///
/// **Accuracy.** Frequencies are revolutions per position in 64-bit fixed point, and a position times a frequency is computed with
/// integers, so that the angle is exact to 2^-31 of a revolution at every position below 2^32. (The f32 product that frameworks use is
/// off by up to 0.008 radians at position 131 072.) Cosine and sine are polynomials of the kernel's own. Altogether an element is
/// within `2^-21 * attention_factor * (|a| + |b|)` of the exact rotation of its pair `(a, b)`, four times f32's epsilon; see
/// [`reference::rope`](crate::reference::rope). At position 0 without an attention factor finite elements stay what they are.
#[derive(Debug)]
pub struct Rope {
    kernels: AppendRows,
    config: RopeConfig,
}

impl Rope {
    /// Compiles the kernels for a cache's shape and uploads the frequencies.
    ///
    /// # Errors
    /// [`Error::Argument`] for a field that breaks its rule; [`Error::Unsupported`] if a kernel needs more than the device offers;
    /// [`Error::Wgpu`] if one doesn't compile.
    pub async fn new(cache: &KvCache, config: RopeConfig) -> Result<Self> {
        // (Of rows without gaps there may be any number of heads.)
        let num_heads = cache.config().num_kv_heads;
        let kernels = AppendRows::new(cache, StepRows::default(), num_heads, Some(config.clone())).await?;
        Ok(Self { kernels, config })
    }

    /// [`Rope::new`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Rope::new`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new_blocking(cache: &KvCache, config: RopeConfig) -> Result<Self> {
        pollster::block_on(Self::new(cache, config))
    }

    /// What it computes.
    #[must_use]
    pub fn config(&self) -> &RopeConfig {
        &self.config
    }

    /// Records the rotation of rows by the positions of a step's tokens, in place: of Q before it attends, or of K where
    /// something else needs the rotated rows too (then append it without a rope).
    ///
    /// `x`: f32 `[num_tokens, num_heads, head_dim]`, the tokens of all sequences of the step one after another. The range needs
    /// usage `STORAGE`, an offset that is a multiple of `min_storage_buffer_offset_alignment`, and exactly the step's size. Rows that lie otherwise:
    /// [`AppendRows`].
    ///
    /// # Errors
    /// [`Error::Argument`] for a step of a cache with another shape, `num_heads` of 0 or above 65 535, a range that doesn't fit,
    /// or the cache's own buffer; [`Error::Stale`]; [`Error::Wgpu`] for a buffer or a step of another device.
    pub fn rotate<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        step: &Step,
        x: impl Into<BufferRef<'a>>,
        num_heads: u32,
    ) -> Result<()> {
        if num_heads == 0 || num_heads > MAX_GRID {
            return Err(Error::argument("num_heads", num_heads, format!("1 to {MAX_GRID}")));
        }
        let rows = RowLayout::DENSE.resolve(num_heads, self.kernels.cache.head_dim);
        self.kernels.rotate_rows(recorder.into(), step, ("x", x.into()), &rows)
    }

    /// The kernel that appends to a cache of this device and shape, and its table.
    pub(super) fn append_kernel(&self, gpu: &Gpu, cache: &KvCacheConfig) -> Result<AppendKernel<'_>> {
        self.kernels.check_cache("rope", gpu, cache)?;
        Ok(self.kernels.append_kernel())
    }

    /// Runs both kernels once on no tokens, so that drivers which compile at the first dispatch do it now. **Submits** a command
    /// buffer; doesn't wait for it.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub fn warm_up(&self) -> Result<()> {
        self.kernels.warm_up()
    }
}

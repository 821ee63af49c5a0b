//! [`AppendRows`]: append and rotation of rows that lie otherwise than [`KvCache::append`] takes them.

use super::record::{AppendKernel, NewRows};
use super::{KvCache, Step, check_q_heads};
use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Gpu, Recorder, Upload, VariantProgram, params_binding};
use crate::kernel::{AttendFlags, Kernel, RopeConfig, RopeLayout, RopeShape, Variant};
use crate::layout::{HostRows, KvCacheConfig, RowElement, RowLayout};
use crate::plan::{CacheParams, push_params};

/// How the queries, keys and values of a step lie in the host's buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepRows {
    /// `num_q_heads` rows of `head_dim` elements per token; for [`AttentionConfig::q_rows`](crate::AttentionConfig::q_rows) too.
    pub q: RowLayout,
    /// `num_kv_heads` rows of `head_dim` elements per token.
    pub k: RowLayout,
    /// `num_kv_heads` rows of `value_dim` elements per token. Not used where values are keys.
    pub v: RowLayout,
}

impl StepRows {
    /// One f32 matrix `[num_tokens, q | k | v]`, as a linear layer with the weights of all three writes it. Give the range of the whole matrix wherever
    /// one of the three is asked for.
    #[must_use]
    pub const fn packed(cache: &KvCacheConfig, num_q_heads: u32) -> Self {
        let q = num_q_heads.saturating_mul(cache.head_dim);
        let k = cache.num_kv_heads.saturating_mul(cache.head_dim);
        let v = if cache.latent { 0 } else { cache.num_kv_heads.saturating_mul(cache.value_dim()) };
        let stride = q.saturating_add(k).saturating_add(v);
        Self {
            q: RowLayout::DENSE.with_token_stride(stride),
            k: RowLayout::DENSE.with_token_stride(stride).with_start(q),
            v: RowLayout::DENSE.with_token_stride(stride).with_start(q.saturating_add(k)),
        }
    }

    /// The same with elements of this kind in all three.
    #[must_use]
    pub const fn with_element(self, element: RowElement) -> Self {
        Self { q: self.q.with_element(element), k: self.k.with_element(element), v: self.v.with_element(element) }
    }
}

/// The kernels of [`KvCache::append_rows`] and [`AppendRows::rotate`]: for rows of any [`RowLayout`], such as those of one packed matrix, without a copy
/// before. Make one per distinct layout and [`RopeConfig`] and use it for all layers and steps.
#[derive(Debug)]
pub struct AppendRows {
    pub(super) gpu: Gpu,
    pub(super) cache: KvCacheConfig,
    rows: StepRows,
    num_q_heads: u32,
    rope: Option<RopeConfig>,
    pub(super) append: VariantProgram,
    /// With the table of frequencies, which `append` reads too.
    rotate: Option<(VariantProgram, wgpu::Buffer)>,
}

impl AppendRows {
    /// Compiles the kernels for a cache's shape, and uploads the frequencies of a rope.
    ///
    /// `rope`: keys are rotated by their tokens' positions on their way into the cache, and [`AppendRows::rotate`] rotates queries where they are.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layout whose numbers are no multiples of 4, `num_q_heads` that is no multiple of the cache's `num_kv_heads` or above
    /// 65 535, a field of `rope` that breaks its rule, or halves with a rope whose `rotary_dim` is no multiple of 8 (unless its pairs are neighbours);
    /// [`Error::Unsupported`] if a kernel needs more than the device offers; [`Error::Wgpu`] if one doesn't compile.
    pub async fn new(cache: &KvCache, rows: StepRows, num_q_heads: u32, rope: Option<RopeConfig>) -> Result<Self> {
        let (gpu, geometry) = (cache.gpu().clone(), *cache.config());
        for (argument, layout) in [("q", rows.q), ("k", rows.k), ("v", rows.v)] {
            layout.validate(argument)?;
        }
        let num_kv_heads = geometry.num_kv_heads;
        check_q_heads(&geometry, num_q_heads)?;
        if let Some(rope) = &rope {
            rope.validate(geometry.head_dim)?;
            // Two elements of a word would be written by two invocations.
            let by_element = rope.layout == RopeLayout::HalfSplit && !rope.rotary_dim.is_multiple_of(8);
            if by_element && [rows.q, rows.k].iter().any(|layout| layout.element == RowElement::F16) {
                return Err(Error::argument("rotary_dim", rope.rotary_dim, "a multiple of 8 for rows of halves"));
            }
        }
        let shape = rope.as_ref().map(RopeShape::of);
        let variant = |kernel, group_size| {
            let variant = Variant::new(kernel, gpu.target(), &geometry, group_size, AttendFlags::default());
            let variant = variant.with_segments(cache.segments()).with_new_rows(rows.k, rows.v);
            let variant = variant.with_rows(rows.q, RowLayout::DENSE);
            gpu.tuned(match shape {
                Some(shape) => variant.with_rope(shape),
                None => variant,
            })
        };
        let append = VariantProgram::new(&gpu, variant(Kernel::Append, 1)).await?;
        let rotate = match &rope {
            Some(rope) => {
                let q_rows = rows.q.resolve(num_q_heads, geometry.head_dim);
                // Without gaps the number of heads follows from the range.
                let group_size = if q_rows.strided() { num_q_heads / num_kv_heads } else { 1 };
                let program = VariantProgram::new(&gpu, variant(Kernel::Rope, group_size)).await?;
                Some((program, gpu.rope_table(rope)?))
            }
            None => None,
        };
        Ok(Self { gpu, cache: geometry, rows, num_q_heads, rope, append, rotate })
    }

    /// [`AppendRows::new`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`AppendRows::new`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new_blocking(cache: &KvCache, rows: StepRows, num_q_heads: u32, rope: Option<RopeConfig>) -> Result<Self> {
        pollster::block_on(Self::new(cache, rows, num_q_heads, rope))
    }

    /// How rows lie.
    #[must_use]
    pub fn rows(&self) -> &StepRows {
        &self.rows
    }

    /// The rotation, if there is one.
    #[must_use]
    pub fn rope(&self) -> Option<&RopeConfig> {
        self.rope.as_ref()
    }

    pub(super) fn append_kernel(&self) -> AppendKernel<'_> {
        AppendKernel { program: &self.append, tables: self.table().into_iter().collect() }
    }

    fn table(&self) -> Option<&wgpu::Buffer> {
        self.rotate.as_ref().map(|(_, table)| table)
    }

    /// Records the rotation of a step's queries by their tokens' positions, in place. `q` lies as [`StepRows::q`] says; the range needs usage `STORAGE`, an
    /// aligned offset and exactly the step's size (at least that, for rows with gaps).
    ///
    /// # Errors
    /// [`Error::Argument`] for a step of a cache with another shape, kernels without a rope, a range that doesn't fit, rows that overlap, or the cache's
    /// own buffer; [`Error::Stale`]; [`Error::Wgpu`] for a buffer or a step of another device.
    pub fn rotate<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        step: &Step,
        q: impl Into<BufferRef<'a>>,
    ) -> Result<()> {
        let rows = self.rows.q.resolve(self.num_q_heads, self.cache.head_dim);
        self.rotate_rows(recorder.into(), step, ("q", q.into()), &rows)
    }

    pub(super) fn rotate_rows(
        &self,
        recorder: Recorder<'_>,
        step: &Step,
        (argument, x): (&'static str, BufferRef<'_>),
        rows: &HostRows,
    ) -> Result<()> {
        step.ticket().check()?;
        if *step.config() != self.cache {
            let rule = format!("a step of a cache like the one that this was made for, {:?}", self.cache);
            return Err(Error::argument("step", format!("a step of {:?}", step.config()), rule));
        }
        let Some(((program, table), rope)) = self.rotate.as_ref().zip(self.rope.as_ref()) else {
            return Err(Error::argument("rope", "none", "kernels made with a rope, to rotate"));
        };
        let x = x.check_rows(&self.gpu, argument, rows, step.num_tokens())?;
        rows.check_apart(argument, step.num_tokens())?;
        step.shared_layers().check_foreign(argument, &x)?;
        // An invocation rotates 4 pairs.
        let num_rows = u64::from(step.num_tokens()) * u64::from(rows.num_heads);
        let (width, height) = program.grid(argument, num_rows * u64::from(rope.rotary_dim.div_ceil(8)))?;
        let (lists, lease) = step.positions().buffer()?;
        let params = params_binding::<CacheParams>(&lists, 0);
        let resources = vec![x.binding(), lists.as_entire_binding(), table.as_entire_binding(), params];
        let dispatch = program.dispatch(resources, [width, height, 1]);
        recorder.record(&self.gpu, "folio rope", &[dispatch], &[lease])
    }

    /// Checks that the kernels are for a cache of this shape, on this device. `argument` is what errors name.
    pub(super) fn check_cache(&self, argument: &'static str, gpu: &Gpu, cache: &KvCacheConfig) -> Result<()> {
        if *cache != self.cache {
            let got = format!("one made for {:?}", self.cache);
            return Err(Error::argument(argument, got, format!("one made for a cache like this, {cache:?}")));
        }
        if gpu.device() != self.gpu.device() {
            return Err(Error::argument(argument, "one of another device", "one made for a cache of this device"));
        }
        Ok(())
    }

    /// Runs the kernels once on no tokens, so that drivers which compile at the first dispatch do it now. **Submits** a command buffer; doesn't wait for
    /// it.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub fn warm_up(&self) -> Result<()> {
        let gpu = &self.gpu;
        let mut words = Vec::new();
        push_params(&mut words, &CacheParams::default());
        let (lists, lease) = Upload::new(gpu, "warm_up", words)?.buffer()?;
        let Variant { latent, k_segments, v_segments, .. } = self.append.variant;
        let new = gpu.warm_up_buffer()?;
        // What is written needs a buffer for each binding.
        let num_sides = k_segments.count + if latent { 0 } else { v_segments.count };
        let sides = (0..num_sides).map(|_| gpu.warm_up_buffer()).collect::<Result<Vec<_>>>()?;
        let [new, list] = [&new, &lists].map(wgpu::Buffer::as_entire_binding);
        let params = params_binding::<CacheParams>(&lists, 0);
        let mut append = vec![new; if latent { 1 } else { 2 }];
        append.extend(sides.iter().map(wgpu::Buffer::as_entire_binding));
        append.extend([list.clone(), params.clone()]);
        append.extend(self.table().map(wgpu::Buffer::as_entire_binding));
        let rotate = self.rotate.as_ref().map(|(program, table)| {
            let resources = vec![sides[0].as_entire_binding(), list, table.as_entire_binding(), params];
            program.dispatch(resources, [1, 1, 1])
        });
        gpu.warm_up([self.append.dispatch(append, [1, 1, 1])].into_iter().chain(rotate), lease)
    }
}

impl KvCache {
    /// [`KvCache::append`] for rows that lie as [`AppendRows::rows`] says: keys and values may be columns of one matrix, or halves. `v` is `None` in a
    /// [latent](KvCacheConfig::latent) cache, and only there. Both may be the same range.
    ///
    /// # Errors
    /// Those of [`KvCache::append`], and [`Error::Argument`] for a kernel that was made for another cache, or values that are missing or too much.
    pub fn append_rows<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        step: &Step,
        layer: u32,
        kernel: &AppendRows,
        k: impl Into<BufferRef<'a>>,
        v: Option<BufferRef<'a>>,
    ) -> Result<()> {
        if v.is_some() == self.config.latent {
            let (got, need) = if self.config.latent { ("rows", "none, as values are keys") } else { ("none", "rows") };
            return Err(Error::argument("v", got, need));
        }
        kernel.check_cache("kernel", &self.gpu, &self.config)?;
        self.append_any(recorder.into(), step, layer, NewRows { k: k.into(), v }, kernel.append_kernel())
    }
}

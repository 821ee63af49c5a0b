//! [`Rope`]: rotary position embedding on the GPU, of K while it is appended and of Q in place. It is a part of the cache's layer because it
//! is a variant of `append`.

use super::record::AppendKernel;
use super::{KvCache, Step};
use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Gpu, Recorder, Upload, VariantProgram, params_binding};
use crate::kernel::{AttendFlags, Kernel, RopeConfig, RopeShape, Variant};
use crate::layout::KvCacheConfig;
use crate::plan::{CacheParams, MAX_GRID, push_params};

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
    gpu: Gpu,
    cache: KvCacheConfig,
    config: RopeConfig,
    table: wgpu::Buffer,
    append: VariantProgram,
    rotate: VariantProgram,
}

impl Rope {
    /// Compiles the kernels for a cache's shape and uploads the frequencies.
    ///
    /// # Errors
    /// [`Error::Argument`] for a field that breaks its rule; [`Error::Unsupported`] if a kernel needs more than the device offers;
    /// [`Error::Wgpu`] if one doesn't compile.
    pub async fn new(cache: &KvCache, config: RopeConfig) -> Result<Self> {
        let (gpu, geometry) = (cache.gpu().clone(), *cache.config());
        config.validate(geometry.head_dim)?;
        let shape = RopeShape::of(&config);
        let variant = |kernel| {
            let variant = Variant::new(kernel, gpu.target(), &geometry, 1, AttendFlags::default());
            gpu.tuned(variant.with_segments(cache.segments()).with_rope(shape))
        };
        let append = VariantProgram::new(&gpu, variant(Kernel::Append)).await?;
        let rotate = VariantProgram::new(&gpu, variant(Kernel::Rope)).await?;
        let words = config.table();
        let contents = bytemuck::cast_slice(&words);
        let table =
            gpu.create_buffer_with("uploading frequencies", "folio rope table", contents, wgpu::BufferUsages::STORAGE)?;
        Ok(Self { cache: geometry, config, table, append, rotate, gpu })
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
    /// usage `STORAGE`, an offset that is a multiple of `min_storage_buffer_offset_alignment`, and exactly the step's size.
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
        step.ticket().check()?;
        self.check_shape(step.config())?;
        if num_heads == 0 || num_heads > MAX_GRID {
            return Err(Error::argument("num_heads", num_heads, format!("1 to {MAX_GRID}")));
        }
        let rows = u64::from(step.num_tokens()) * u64::from(num_heads);
        let x = x.into().check(&self.gpu, "x", rows * u64::from(self.cache.head_dim), true)?;
        step.shared_layers().check_foreign("x", &x)?;
        // An invocation rotates 4 pairs.
        let (width, height) = self.rotate.grid("x", rows * u64::from(self.config.rotary_dim.div_ceil(8)))?;
        let (lists, lease) = step.upload().buffer()?;
        let resources = vec![
            x.binding(),
            lists.as_entire_binding(),
            self.table.as_entire_binding(),
            params_binding::<CacheParams>(&lists, 0),
        ];
        let dispatch = self.rotate.dispatch(resources, [width, height, 1]);
        recorder.into().record(&self.gpu, "folio rope", &[dispatch], &[lease])
    }

    /// The kernel that appends to a cache of this device and shape, and its table.
    pub(super) fn append_kernel(&self, gpu: &Gpu, cache: &KvCacheConfig) -> Result<AppendKernel<'_>> {
        self.check_shape(cache)?;
        if gpu.device() != self.gpu.device() {
            return Err(Error::argument("rope", "one of another device", "one made for a cache of this device"));
        }
        Ok(AppendKernel { program: &self.append, tables: vec![&self.table] })
    }

    fn check_shape(&self, cache: &KvCacheConfig) -> Result<()> {
        if *cache == self.cache {
            return Ok(());
        }
        let got = format!("one made for {:?}", self.cache);
        Err(Error::argument("rope", got, format!("one made for a cache like this, {cache:?}")))
    }

    /// Runs both kernels once on no tokens, so that drivers which compile at the first dispatch do it now. **Submits** a command
    /// buffer; doesn't wait for it.
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
        let [new, list, table] = [&new, &lists, &self.table].map(wgpu::Buffer::as_entire_binding);
        let params = params_binding::<CacheParams>(&lists, 0);
        let mut append = vec![new; if latent { 1 } else { 2 }];
        append.extend(sides.iter().map(wgpu::Buffer::as_entire_binding));
        append.extend([list.clone(), params.clone(), table.clone()]);
        let rotate = vec![sides[0].as_entire_binding(), list, table, params];
        let dispatches = [(&self.append, append), (&self.rotate, rotate)]
            .map(|(kernel, resources)| kernel.dispatch(resources, [1, 1, 1]));
        gpu.warm_up(dispatches, lease)
    }
}

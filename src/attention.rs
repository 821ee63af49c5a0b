//! [`Attention`]: the public face of decode, prefill and merge.

use std::sync::{Arc, Mutex, PoisonError};

use crate::cache::{
    Cache, KvCacheConfig, LayerStorage, Segments, Step, StepTicket, check_foreign, check_lse, layer_storage,
    params_binding, push_params,
};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernel::{
    AttendFlags, AttendParams, Kernel, LOGIT_FLOOR, MAX_DECODE_GROUP, MAX_GRID, Pipeline, Target, Variant, tuning,
};
use crate::plan::{MERGE_ITEM_WORDS, PlanShape, SplitPolicy, StepPlan, WORK_ITEM_WORDS, partial_row_bytes};
use crate::record::{BufferRef, Dispatch, Recorder};
use crate::upload::Upload;

/// What attention computes. The same for every call of one [`Attention`].
///
/// For each query head: `logit = softmax_scale * q·k`, through the soft cap if there is one, plus the ALiBi bias, then masked
/// (causal, window, custom mask); the softmax of the visible logits, with a sink's weight in the denominator if there is one, weighs the V rows.
/// A row without a visible key yields 0 (and an lse of -infinity).
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads; a multiple of the cache's `num_kv_heads`. Query head `h` attends to KV head `h / (num_q_heads / num_kv_heads)`.
    pub num_q_heads: u32,
    /// A query sees keys up to its own position (true), or all keys of its sequence (false).
    pub causal: bool,
    /// Factor of the logits. `None`: `1 / sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// `c * tanh(x / c)` on scaled logits. `None`: no soft cap.
    pub softcap: Option<f32>,
    /// A query sees the newest `window` keys, its own position included; blocks wholly outside are not read. `None`: all.
    pub window: Option<u32>,
    /// ALiBi: `slope * (key position - query position)` is added to a head's logits. One slope per query head.
    pub alibi_slopes: Option<Vec<f32>>,
    /// A logit per query head that joins the softmax denominator and has no V row.
    pub sinks: Option<Vec<f32>>,
    /// Calls of [`Attention::plan_with_masks`] give a bit per query and key.
    pub custom_mask: bool,
    /// Calls write the natural logarithm of the softmax denominator: use [`Attention::attend_with_lse`].
    pub lse: bool,
    /// Keys are cut into ranges of a fixed length, so that a sequence's results do not depend on what else is in the batch. Costs some
    /// speed with small batches of middling lengths.
    pub deterministic: bool,
    /// Bytes of partial states of split key ranges at one time. A step that needs more works in rounds; only a single token that needs
    /// more on its own exceeds it.
    pub max_workspace_bytes: u64,
}

impl AttentionConfig {
    /// Causal attention with `num_q_heads` query heads and no extras.
    #[must_use]
    pub fn new(num_q_heads: u32) -> Self {
        Self {
            num_q_heads,
            causal: true,
            softmax_scale: None,
            softcap: None,
            window: None,
            alibi_slopes: None,
            sinks: None,
            custom_mask: false,
            lse: false,
            deterministic: false,
            max_workspace_bytes: 64 << 20,
        }
    }

    /// Checks the options against a cache.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self, cache: &KvCacheConfig) -> Result<()> {
        let heads = self.num_q_heads;
        // Merge has one workgroup row per query head.
        if heads == 0 || heads > MAX_GRID || !heads.is_multiple_of(cache.num_kv_heads) {
            let rule = format!("a multiple of num_kv_heads, {}, from it to {MAX_GRID}", cache.num_kv_heads);
            return Err(Error::argument("num_q_heads", heads, rule));
        }
        let finite = |argument, value: f32| {
            if value.is_finite() { Ok(()) } else { Err(Error::argument(argument, value, "a finite number")) }
        };
        if let Some(scale) = self.softmax_scale {
            finite("softmax_scale", scale)?;
        }
        if let Some(cap) = self.softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(Error::argument("softcap", cap, "a finite number above 0, or None"));
        }
        if self.window == Some(0) {
            return Err(Error::argument("window", 0, "at least 1, or None"));
        }
        for (argument, values) in [("alibi_slopes", &self.alibi_slopes), ("sinks", &self.sinks)] {
            let Some(values) = values else { continue };
            if values.len() != heads as usize {
                let got = format!("{} values", values.len());
                return Err(Error::argument(argument, got, format!("one per query head, {heads}")));
            }
            values.iter().try_for_each(|&value| finite(argument, value))?;
        }
        // The kernels take the scale in units of log2, or of the soft cap.
        let params = self.params(cache, 0);
        finite("softmax_scale", params.qk_scale)?;
        // The floor of the running maximum must stay below what the options alone can make of a logit.
        let log2_units = |value: f32| f64::from(value.abs()) * std::f64::consts::LOG2_E;
        let small = |argument, value: f32, logit: f64| {
            let rule = "small enough that no logit reaches 2^126 in units of log2, 5.9e37";
            if logit < -f64::from(LOGIT_FLOOR) / 2.0 { Ok(()) } else { Err(Error::argument(argument, value, rule)) }
        };
        let cap = self.softcap.unwrap_or(0.0);
        small("softcap", cap, log2_units(cap))?;
        self.sinks.iter().flatten().try_for_each(|&sink| small("sinks", sink, log2_units(sink)))?;
        let longest = f64::from(cache.num_blocks) * f64::from(cache.block_size);
        let slopes = self.alibi_slopes.iter().flatten();
        slopes
            .copied()
            .try_for_each(|slope| small("alibi_slopes", slope, log2_units(slope) * longest + log2_units(cap)))
    }

    fn flags(&self) -> AttendFlags {
        AttendFlags {
            causal: self.causal,
            window: self.window.is_some(),
            softcap: self.softcap.is_some(),
            alibi: self.alibi_slopes.is_some(),
            sinks: self.sinks.is_some(),
            mask: self.custom_mask,
            lse: self.lse,
        }
    }

    /// Parameters that all dispatches of a plan share.
    fn params(&self, cache: &KvCacheConfig, head_offset: u32) -> AttendParams {
        use std::f64::consts::LOG2_E;
        let scale = self.softmax_scale.map_or_else(|| 1.0 / f64::from(cache.head_dim).sqrt(), f64::from);
        let (qk_scale, softcap_log2e) = match self.softcap.map(f64::from) {
            Some(cap) => (scale / cap, cap * LOG2_E),
            None => (scale * LOG2_E, 0.0),
        };
        AttendParams {
            head_offset,
            qk_scale: qk_scale as f32,
            softcap_log2e: softcap_log2e as f32,
            // Longer than any sequence, and with room for a key's position beside it.
            window: self.window.unwrap_or(0).min(1 << 31),
            num_blocks: cache.num_blocks,
            ..AttendParams::default()
        }
    }
}

/// Attention over a [`KvCache`](crate::KvCache) or a [`ContiguousCache`](crate::ContiguousCache): compiled kernels and a workspace. Make one per distinct [`AttentionConfig`] (a model whose layers
/// alternate between windowed and full attention has two) and use it for all layers and steps.
#[derive(Debug)]
pub struct Attention {
    gpu: Gpu,
    cache: KvCacheConfig,
    segments: [Segments; 2],
    config: AttentionConfig,
    shape: PlanShape,
    policy: SplitPolicy,
    /// Absent if the group is too large for it; then prefill does its work.
    decode: Option<Pipeline>,
    prefill: Pipeline,
    merge: Pipeline,
    /// Partial states; replaced by a larger one when a plan needs it, never shrunk. Steps share it: the GPU runs them one after another.
    workspace: Mutex<wgpu::Buffer>,
    /// Tells its plans from those of others.
    identity: Arc<()>,
}

/// The work of one attention call of a step, uploaded. Use it for every layer, then drop it or [`recycle`](Self::recycle) it.
#[derive(Debug)]
pub struct AttentionPlan {
    plan: StepPlan,
    ticket: StepTicket,
    /// [`Attention::identity`] of the one that made it: its items fit no other kernel's tiles.
    attention: Arc<()>,
    layers: Arc<Vec<LayerStorage>>,
    num_tokens: u32,
    upload: Upload,
    workspace: wgpu::Buffer,
    /// Index of the kernel's first parameter block in the upload, and its grid, in the order in which they run.
    dispatches: Vec<PlannedDispatch>,
}

#[derive(Clone, Copy, Debug)]
struct PlannedDispatch {
    kernel: Kernel,
    grid: [u32; 3],
}

impl AttentionPlan {
    /// The plan as plain data.
    #[must_use]
    pub fn step_plan(&self) -> &StepPlan {
        &self.plan
    }

    /// Gives the plan's upload buffer to later steps. **Only after the commands that were recorded with it have been submitted**; see
    /// [`Committed::recycle`](crate::Committed::recycle).
    pub fn recycle(self) {
        self.upload.recycle();
    }
}

/// A workspace holds at least this much, so that small plans never replace it.
const MIN_WORKSPACE_BYTES: u64 = 64 << 10;

impl Attention {
    /// Compiles the kernels for a cache's shape.
    ///
    /// # Errors
    /// [`Error::Argument`] for an option that breaks its rule; [`Error::Unsupported`] if a kernel needs more than the device offers,
    /// such as a storage buffer for [`AttentionConfig::lse`] beside a cache whose segments take all but one of them;
    /// [`Error::Wgpu`] if one doesn't compile.
    pub async fn new(cache: &impl Cache, config: AttentionConfig) -> Result<Self> {
        let cache = cache.paged();
        let gpu = cache.gpu().clone();
        let geometry = *cache.config();
        config.validate(&geometry)?;
        if config.lse {
            check_lse(&gpu, &geometry)?;
        }
        let group_size = config.num_q_heads / geometry.num_kv_heads;
        let segments = cache.segments();
        let variant = |kernel| {
            Variant::new(kernel, Target::of(&gpu), &geometry, group_size, config.flags()).with_segments(segments)
        };
        let decode = if group_size <= MAX_DECODE_GROUP {
            Some(Pipeline::new(&gpu, variant(Kernel::Decode)).await?)
        } else {
            None
        };
        let prefill = Pipeline::new(&gpu, variant(Kernel::Prefill)).await?;
        let merge = Pipeline::new(&gpu, variant(Kernel::Merge)).await?;
        let shape = PlanShape {
            num_kv_heads: geometry.num_kv_heads,
            group_size,
            head_dim: geometry.head_dim,
            causal: config.causal,
            window: config.window,
            has_decode: decode.is_some(),
            tile_q: prefill.variant().tile_q,
        };
        let policy = tuning::split_policy(&gpu, config.deterministic, config.max_workspace_bytes);
        let workspace = create_workspace(&gpu, MIN_WORKSPACE_BYTES)?;
        Ok(Self {
            cache: geometry,
            segments,
            shape,
            policy,
            decode,
            prefill,
            merge,
            workspace: Mutex::new(workspace),
            identity: Arc::new(()),
            gpu,
            config,
        })
    }

    /// [`Attention::new`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`Attention::new`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new_blocking(cache: &impl Cache, config: AttentionConfig) -> Result<Self> {
        pollster::block_on(Self::new(cache, config))
    }

    /// The options.
    #[must_use]
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The compiled kernels: decode (if the group is small enough for it), prefill, merge.
    pub fn pipelines(&self) -> impl Iterator<Item = &Pipeline> {
        self.decode.iter().chain([&self.prefill, &self.merge])
    }

    /// Plans a step: who computes what. Host only, plus one upload; the same plan serves every layer.
    ///
    /// # Errors
    /// [`Error::StaleStep`]; [`Error::Argument`] if the step's cache has another shape than this attention was made for, or the step is too
    /// large; [`Error::Unsupported`] if the work lists don't fit into a binding; [`Error::Wgpu`].
    pub fn plan(&self, step: &Step) -> Result<AttentionPlan> {
        if self.config.custom_mask {
            return Err(Error::argument("custom_mask", "plan", "plan_with_masks, which gives the masks"));
        }
        self.plan_any(step, &[])
    }

    /// [`Attention::plan`] with a mask per sequence of the step: `[query_len, ceil(seq_len / 32)]` words, bit `key % 32` (lowest first) of word
    /// `key / 32` says whether the query sees the key. Causal and window masks apply as well.
    ///
    /// # Errors
    /// Those of [`Attention::plan`], and [`Error::Argument`] for a mask of another length.
    pub fn plan_with_masks(&self, step: &Step, masks: &[&[u32]]) -> Result<AttentionPlan> {
        if !self.config.custom_mask {
            return Err(Error::argument("custom_mask", false, "true, to plan with masks"));
        }
        let entries = &step.batch().entries;
        if masks.len() != entries.len() {
            let got = format!("{} masks", masks.len());
            return Err(Error::argument("masks", got, format!("one per sequence of the step, {}", entries.len())));
        }
        for (i, (mask, entry)) in masks.iter().zip(entries).enumerate() {
            let need = u64::from(entry.query_len) * u64::from(entry.seq_len().div_ceil(32));
            if mask.len() as u64 != need {
                let got = format!("{} words for sequence {i} of the step", mask.len());
                return Err(Error::argument("masks", got, format!("query_len * ceil(seq_len / 32) words, {need}")));
            }
        }
        self.plan_any(step, masks)
    }

    fn plan_any(&self, step: &Step, masks: &[&[u32]]) -> Result<AttentionPlan> {
        let ticket = step.ticket();
        ticket.check()?;
        if *step.config() != self.cache {
            let got = format!("a step of {:?}", step.config());
            return Err(Error::argument(
                "step",
                got,
                format!("a step of a cache like the attention's, {:?}", self.cache),
            ));
        }
        let batch = step.batch();
        // Rows (token, query head) are numbered with u32.
        let rows = u64::from(batch.num_tokens()) * u64::from(self.config.num_q_heads);
        if rows > u64::from(u32::MAX) {
            let got = format!("{} tokens", batch.num_tokens());
            return Err(Error::argument("step", got, "fewer than 2^32 / num_q_heads tokens"));
        }

        // How many parameter blocks there are is known only after planning, so offsets are planned from the start of what follows
        // them, and `lay_out` moves them behind.
        let mut lists = Vec::new();
        self.push_head_parameters(&mut lists);
        let table_offset = lists.len() as u32;
        lists.extend_from_slice(&batch.tables);
        let mut mask_offsets = Vec::with_capacity(masks.len());
        for mask in masks {
            mask_offsets.push(lists.len() as u32);
            lists.extend_from_slice(mask);
        }
        let mut plan = StepPlan::new(&self.shape, &self.policy, batch, table_offset, &mask_offsets);
        let workspace = self.workspace(plan.num_partial_rows * partial_row_bytes(self.cache.head_dim))?;
        let (words, dispatches) = self.lay_out(&mut plan, &lists)?;
        let upload = self.gpu.uploads().fill(&self.gpu, "step", &words)?;
        Ok(AttentionPlan {
            plan,
            ticket,
            attention: Arc::clone(&self.identity),
            layers: Arc::clone(step.shared_layers()),
            num_tokens: batch.num_tokens(),
            upload,
            workspace,
            dispatches,
        })
    }

    /// ALiBi slopes, then sinks, of all query heads, both times log2(e); nothing if the kernels read neither.
    fn push_head_parameters(&self, words: &mut Vec<u32>) {
        let (slopes, sinks) = (&self.config.alibi_slopes, &self.config.sinks);
        if slopes.is_none() && sinks.is_none() {
            return;
        }
        for values in [slopes, sinks] {
            let value = |i| values.as_ref().map_or(0.0, |values: &Vec<f32>| values[i]);
            words
                .extend((0..self.config.num_q_heads as usize).map(|i| (value(i) * std::f32::consts::LOG2_E).to_bits()));
        }
    }

    /// The upload of a plan: parameter blocks, `lists`, then the items. Offsets in the items move behind the parameters.
    fn lay_out(&self, plan: &mut StepPlan, lists: &[u32]) -> Result<(Vec<u32>, Vec<PlannedDispatch>)> {
        let mut dispatches = Vec::new();
        let mut blocks = Vec::new();
        for round in &plan.rounds {
            for (kernel, range) in
                [(Kernel::Prefill, &round.prefill), (Kernel::Decode, &round.decode), (Kernel::Merge, &round.merge)]
            {
                if range.is_empty() {
                    continue;
                }
                let heads = if kernel == Kernel::Merge { self.config.num_q_heads } else { self.cache.num_kv_heads };
                let (x, z) = crate::kernel::linear_grid(range.len() as u64).ok_or_else(|| {
                    Error::argument("step", format!("{} work items", range.len()), "at most 65535 * 65535 work items")
                })?;
                dispatches.push(PlannedDispatch { kernel, grid: [x, heads, z] });
                blocks.push((kernel, range.clone()));
            }
        }
        let too_large = || Error::argument("step", "more than 2^32 words of work lists", "a smaller step");
        let list_start = blocks.len() as u64 * u64::from(crate::cache::PARAM_BLOCK_WORDS);
        let items_start = list_start + lists.len() as u64;
        let item_words = (plan.decode.len() + plan.prefill.len()) as u64 * u64::from(WORK_ITEM_WORDS)
            + plan.merge.len() as u64 * u64::from(MERGE_ITEM_WORDS);
        u32::try_from(items_start + item_words).map_err(|_| too_large())?;
        let (list_start, items_start) = (list_start as u32, items_start as u32);
        for item in plan.decode.iter_mut().chain(&mut plan.prefill) {
            item.table_offset += list_start;
            item.mask_offset += list_start;
        }
        let prefill_start = items_start + plan.decode.len() as u32 * WORK_ITEM_WORDS;
        let merge_start = prefill_start + plan.prefill.len() as u32 * WORK_ITEM_WORDS;
        let shared = self.config.params(&self.cache, list_start);
        let mut words = Vec::with_capacity((u64::from(items_start) + item_words) as usize);
        for ((kernel, range), dispatch) in blocks.into_iter().zip(&dispatches) {
            let (start, item_words) = match kernel {
                Kernel::Decode => (items_start, WORK_ITEM_WORDS),
                Kernel::Prefill => (prefill_start, WORK_ITEM_WORDS),
                _ => (merge_start, MERGE_ITEM_WORDS),
            };
            push_params(
                &mut words,
                &AttendParams {
                    items_offset: start + range.start as u32 * item_words,
                    num_items: range.len() as u32,
                    grid_x: dispatch.grid[0],
                    ..shared
                },
            );
        }
        words.extend_from_slice(lists);
        words.extend_from_slice(bytemuck::cast_slice(&plan.decode));
        words.extend_from_slice(bytemuck::cast_slice(&plan.prefill));
        words.extend_from_slice(bytemuck::cast_slice(&plan.merge));
        Ok((words, dispatches))
    }

    /// The workspace, made larger if it has to be.
    fn workspace(&self, bytes: u64) -> Result<wgpu::Buffer> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        if workspace.size() < bytes {
            let max = self.gpu.max_storage_bytes();
            if bytes > max {
                let (need, have) = (format!("{bytes} bytes"), format!("{max} bytes in a storage binding"));
                let hint = "; use fewer heads or a device with larger bindings".to_owned();
                return Err(Error::Unsupported { what: "attention workspace", need, have, hint });
            }
            // Sequences grow: double, so that a decode loop reallocates rarely.
            *workspace = create_workspace(&self.gpu, bytes.next_power_of_two().min(max))?;
        }
        Ok(workspace.clone())
    }

    /// Records attention of one layer: `out = softmax(q kᵀ) v` over everything that the step's sequences have cached, the new tokens included.
    ///
    /// `q` and `out`: f32 `[num_tokens, num_q_heads, head_dim]`, the tokens of all sequences of the step one after another. Each range needs
    /// usage `STORAGE`, an aligned offset and exactly the step's size; they must not overlap. Record the layer's
    /// [`append`](crate::KvCache::append) first, in the same or an earlier command buffer.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that isn't there, a range that doesn't fit, a plan of another attention, or if
    /// [`AttentionConfig::lse`] is set; [`Error::StaleStep`] if the plan's step is over; [`Error::Wgpu`].
    pub fn attend<'p, 'e: 'p, 'q, 'o>(
        &self,
        recorder: impl Into<Recorder<'p, 'e>>,
        plan: &AttentionPlan,
        layer: u32,
        q: impl Into<BufferRef<'q>>,
        out: impl Into<BufferRef<'o>>,
    ) -> Result<()> {
        if self.config.lse {
            return Err(Error::argument("lse", "attend", "attend_with_lse, because the config asks for lse"));
        }
        self.attend_any(recorder.into(), plan, layer, q.into(), out.into(), None)
    }

    /// [`Attention::attend`] that also writes `lse`: f32 `[num_tokens, num_q_heads]`, the natural logarithm of the softmax denominator,
    /// with which partial results over disjoint keys can be merged.
    ///
    /// # Errors
    /// Those of [`Attention::attend`], and [`Error::Argument`] if [`AttentionConfig::lse`] is not set.
    pub fn attend_with_lse<'p, 'e: 'p, 'q, 'o, 'l>(
        &self,
        recorder: impl Into<Recorder<'p, 'e>>,
        plan: &AttentionPlan,
        layer: u32,
        q: impl Into<BufferRef<'q>>,
        out: impl Into<BufferRef<'o>>,
        lse: impl Into<BufferRef<'l>>,
    ) -> Result<()> {
        if !self.config.lse {
            return Err(Error::argument("lse", false, "AttentionConfig::lse set, to write lse"));
        }
        self.attend_any(recorder.into(), plan, layer, q.into(), out.into(), Some(lse.into()))
    }

    fn attend_any(
        &self,
        recorder: Recorder<'_, '_>,
        plan: &AttentionPlan,
        layer: u32,
        q: BufferRef<'_>,
        out: BufferRef<'_>,
        lse: Option<BufferRef<'_>>,
    ) -> Result<()> {
        plan.ticket.check()?;
        if !Arc::ptr_eq(&plan.attention, &self.identity) {
            return Err(Error::argument("plan", "a plan of another attention", "a plan that this attention made"));
        }
        let storage = layer_storage(&plan.layers, layer)?;
        let rows = u64::from(plan.num_tokens) * u64::from(self.config.num_q_heads);
        let elements = rows * u64::from(self.cache.head_dim);
        let q = q.check(&self.gpu, "q", elements, true)?;
        let out = out.check(&self.gpu, "out", elements, true)?;
        let lse = lse.map(|lse| lse.check(&self.gpu, "lse", rows, true)).transpose()?;
        // WebGPU allows no buffer to be read and written in one dispatch, not even in disjoint ranges.
        check_distinct("out", &out, &[("q", Some(&q)), ("lse", lse.as_ref())], &plan.layers)?;
        check_distinct("q", &q, &[("lse", lse.as_ref())], &plan.layers)?;
        if let Some(lse) = &lse {
            check_distinct("lse", lse, &[], &plan.layers)?;
        }
        let dispatches = self.dispatches(plan, storage, &q, &out, lse.as_ref())?;
        recorder.record("folio attend", &dispatches);
        Ok(())
    }

    fn dispatches(
        &self,
        plan: &AttentionPlan,
        storage: &LayerStorage,
        q: &BufferRef<'_>,
        out: &BufferRef<'_>,
        lse: Option<&BufferRef<'_>>,
    ) -> Result<Vec<Dispatch<'_>>> {
        let upload = plan.upload.buffer();
        let lists = upload.as_entire_binding();
        let partials = plan.workspace.as_entire_binding();
        let lse = lse.map(BufferRef::binding);
        (0..)
            .zip(&plan.dispatches)
            .map(|(index, dispatch)| {
                let params = params_binding::<AttendParams>(upload, index);
                let mut resources = match dispatch.kernel {
                    Kernel::Merge => vec![partials.clone(), lists.clone(), out.binding(), params],
                    _ => {
                        let mut resources = vec![q.binding()];
                        resources.extend(storage.bindings());
                        resources.extend([lists.clone(), out.binding(), partials.clone(), params]);
                        resources
                    }
                };
                resources.extend(lse.clone());
                let pipeline = match (dispatch.kernel, &self.decode) {
                    (Kernel::Decode, Some(decode)) => decode,
                    (Kernel::Merge, _) => &self.merge,
                    _ => &self.prefill,
                };
                pipeline.dispatch(&self.gpu, &resources, dispatch.grid)
            })
            .collect()
    }

    /// Runs every kernel once on no work, so that drivers which compile at the first dispatch do it now (on lavapipe that takes up to some
    /// seconds for large heads). **Submits** a command buffer; doesn't wait for it.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub fn warm_up(&self) -> Result<()> {
        let gpu = &self.gpu;
        let mut words = Vec::new();
        push_params(&mut words, &self.config.params(&self.cache, 0));
        let upload = gpu.uploads().fill(gpu, "warm_up", &words)?;
        let scratch =
            || gpu.create_buffer("creating warm-up buffers", "folio warm-up", 256, wgpu::BufferUsages::STORAGE);
        let (reads, out, lse) = (scratch()?, scratch()?, scratch()?);
        let lists = upload.buffer().as_entire_binding();
        let params = params_binding::<AttendParams>(upload.buffer(), 0);
        let workspace = self.workspace(0)?;
        let mut dispatches = Vec::new();
        for pipeline in self.pipelines() {
            let read = reads.as_entire_binding();
            let (out, partials) = (out.as_entire_binding(), workspace.as_entire_binding());
            let mut resources = match pipeline.variant().kernel {
                Kernel::Merge => vec![partials, lists.clone(), out, params.clone()],
                _ => {
                    let [k, v] = self.segments;
                    let mut resources = vec![read; 1 + (k.count + v.count) as usize];
                    resources.extend([lists.clone(), out, partials, params.clone()]);
                    resources
                }
            };
            resources.extend(self.config.lse.then(|| lse.as_entire_binding()));
            dispatches.push(pipeline.dispatch(gpu, &resources, [1, 1, 1])?);
        }
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        Recorder::from(&mut encoder).record("folio warm-up", &dispatches);
        gpu.queue().submit([encoder.finish()]);
        upload.recycle();
        Ok(())
    }
}

fn create_workspace(gpu: &Gpu, bytes: u64) -> Result<wgpu::Buffer> {
    gpu.create_buffer("creating the attention workspace", "folio partial states", bytes, wgpu::BufferUsages::STORAGE)
}

fn check_distinct(
    argument: &'static str,
    range: &BufferRef<'_>,
    others: &[(&str, Option<&BufferRef<'_>>)],
    layers: &[LayerStorage],
) -> Result<()> {
    for (name, other) in others {
        if other.is_some_and(|other| other.buffer() == range.buffer()) {
            return Err(Error::argument(argument, format!("the buffer of {name}"), "a buffer of its own"));
        }
    }
    check_foreign(layers, argument, range)
}

//! [`Attention`]: the public face of decode, prefill and merge.

mod states;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cache::{KvCache, Layers, StepGroup, StepTicket, check_lse};
use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Gpu, Recorder, Upload, VariantProgram, params_binding};
use crate::kernel::tuning::{self, Tuning};
use crate::kernel::{AttendFlags, Kernel, Target, Variant, max_decode_group};
use crate::layout::{KvCacheConfig, Segments};
use crate::plan::{
    AttendParams, AttentionConfig, PlanShape, PlannedDispatch, SplitPolicy, Stage, StepPlan, push_params,
};
use crate::sequence::QueryKernel;

pub use states::MergeStates;

/// Attention over a [`KvCache`]: compiled kernels and a workspace. Make one per distinct [`AttentionConfig`] (a model whose layers
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
    decode: Option<VariantProgram>,
    prefill: VariantProgram,
    merge: VariantProgram,
    /// Parameters that all dispatches share.
    params: AttendParams,
    /// Slopes and sinks, if the kernels read any.
    heads: Option<wgpu::Buffer>,
    /// Partial states; replaced by a larger one when a plan needs it, never shrunk. Steps share it: the GPU runs them one after another.
    workspace: Mutex<wgpu::Buffer>,
    /// Plans of other attentions hold another one.
    identity: Arc<()>,
}

/// Sinks of a layer on the GPU: made by [`Attention::sinks`], read by [`Attention::attend_call`].
#[derive(Debug)]
pub struct Sinks {
    /// With the slopes, as the kernels read both.
    heads: wgpu::Buffer,
    num_q_heads: u32,
}

/// What a call of attention reads and writes, besides the cache.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AttentionCall<'a> {
    /// Queries, as [`AttentionConfig::q_rows`] says.
    pub q: BufferRef<'a>,
    /// Queries for the sink tokens, of the same layout, if [`AttentionConfig::sink_queries`] is set.
    pub sink_q: Option<BufferRef<'a>>,
    /// Results, as [`AttentionConfig::out_rows`] says.
    pub out: BufferRef<'a>,
    /// f32 `[num_tokens, num_q_heads]`, the natural logarithm of the softmax denominator, if [`AttentionConfig::lse`] is set.
    pub lse: Option<BufferRef<'a>>,
    /// Sinks in place of those of the configuration.
    pub sinks: Option<&'a Sinks>,
}

impl<'a> AttentionCall<'a> {
    /// Queries and results alone.
    #[must_use]
    pub fn new(q: impl Into<BufferRef<'a>>, out: impl Into<BufferRef<'a>>) -> Self {
        Self { q: q.into(), sink_q: None, out: out.into(), lse: None, sinks: None }
    }
}

/// The work of one attention call of a step. Use it for every layer of the group that it was planned for.
#[derive(Debug)]
pub struct AttentionPlan {
    plan: StepPlan,
    ticket: StepTicket,
    /// [`Attention::identity`] of the one that made it: its items fit no other kernel's tiles.
    attention: Arc<()>,
    layers: Arc<Layers>,
    /// Of layers, whose block tables it has.
    group: u32,
    num_tokens: u32,
    upload: Upload,
    workspace: wgpu::Buffer,
    /// Whether the workspace is the plan's own.
    in_parts: bool,
}

impl AttentionPlan {
    /// The plan as plain data. Its words have moved to the upload.
    #[must_use]
    pub fn step_plan(&self) -> &StepPlan {
        &self.plan
    }

    /// Dispatches of a layer, which [`Attention::attend_part`] records one by one.
    #[must_use]
    pub fn num_parts(&self) -> usize {
        self.plan.dispatches.len()
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
    pub async fn new(cache: &KvCache, config: AttentionConfig) -> Result<Self> {
        Self::build(cache, config, cache.gpu().tuning()).await
    }

    /// [`Attention::new`] with a tuning that need not be the device's.
    pub(crate) async fn build(cache: &KvCache, config: AttentionConfig, tuned: Option<&Tuning>) -> Result<Self> {
        let gpu = cache.gpu().clone();
        let geometry = *cache.config();
        config.validate(&geometry)?;
        if config.lse {
            check_lse(&gpu, &geometry)?;
        }
        let group_size = config.num_q_heads / geometry.num_kv_heads;
        let segments = cache.segments();
        let flags = AttendFlags::of(&config);
        // Which kernels a tuner found faster must not show in results that are to be the same in every batch and on every day.
        let target = Target { packed_dots: gpu.packed_dots() && !config.deterministic, ..gpu.target() };
        let variant = |kernel| {
            let variant = Variant::new(kernel, target, &geometry, group_size, flags).with_segments(segments);
            let mut variant = variant.with_rows(config.q_rows, config.out_rows);
            // Only with matrix units does a kernel need more than every device has.
            if variant.workgroup_bytes() > gpu.limits().max_compute_workgroup_storage_size {
                variant = variant.without_matrices();
            }
            tuned.map_or(variant, |tuning| tuning.apply(variant))
        };
        let decode = if group_size <= max_decode_group(&geometry) {
            Some(VariantProgram::new(&gpu, variant(Kernel::Decode)).await?)
        } else {
            None
        };
        let prefill = VariantProgram::new(&gpu, variant(Kernel::Prefill)).await?;
        let merge = VariantProgram::new(&gpu, variant(Kernel::Merge)).await?;
        let shape = PlanShape {
            num_kv_heads: geometry.num_kv_heads,
            group_size,
            head_dim: geometry.head_dim,
            value_dim: geometry.value_dim(),
            causal: config.causal,
            window: config.window,
            sink_tokens: config.sink_tokens,
            has_decode: decode.is_some(),
            tile_q: prefill.variant.tile_q,
            block_size: geometry.block_size,
        };
        let max_workspace_bytes = config.max_workspace_bytes.min(gpu.max_storage_bytes());
        let mut policy =
            tuning::split_policy(gpu.profile(), gpu.adapter_class(), config.deterministic, max_workspace_bytes);
        policy.cascade = config.cascade_policy(tuning::cascade_policy(&prefill.variant));
        policy.max_dispatch_work = config.max_dispatch_work.unwrap_or(policy.max_dispatch_work);
        if let Some((tuning, decode)) = tuned.zip(decode.as_ref()) {
            tuning.apply_split(&mut policy, &decode.variant);
        }
        let workspace = create_workspace(&gpu, MIN_WORKSPACE_BYTES)?;
        let heads = config.head_params().map(|heads| upload_heads(&gpu, &heads)).transpose()?;
        Ok(Self {
            cache: geometry,
            segments,
            shape,
            policy,
            decode,
            prefill,
            merge,
            params: config.params(&geometry),
            heads,
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
    pub fn new_blocking(cache: &KvCache, config: AttentionConfig) -> Result<Self> {
        pollster::block_on(Self::new(cache, config))
    }

    /// The options.
    #[must_use]
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The compiled kernels' variants: decode (if the group is small enough for it), prefill, merge.
    pub fn variants(&self) -> impl Iterator<Item = &Variant> {
        self.programs().map(|program| &program.variant)
    }

    fn programs(&self) -> impl Iterator<Item = &VariantProgram> {
        self.decode.iter().chain([&self.prefill, &self.merge])
    }

    /// Plans a step: who computes what. Host only; the same plan serves every layer of a group. `&step` stands for the first [group of
    /// layers](KvCacheConfig::groups), which is the only one unless layers keep different tokens; others have plans of their own, by
    /// [`Step::group`](crate::Step::group).
    ///
    /// # Errors
    /// [`Error::Stale`]; [`Error::Argument`] for a step with trees without [`AttentionConfig::trees`], or if the step's cache has another shape than this
    /// attention was made for, the group keeps less than the attention sees, or the step is too large; [`Error::Unsupported`] if the work lists don't fit
    /// into a binding; [`Error::Wgpu`].
    pub fn plan<'s>(&self, step: impl Into<StepGroup<'s>>) -> Result<AttentionPlan> {
        if self.config.custom_mask {
            return Err(Error::argument("custom_mask", "plan", "plan_with_masks, which gives the masks"));
        }
        self.plan_any(step.into(), None, &[])
    }

    /// [`Attention::plan`] with a kernel for each sequence of the step. With [`AttentionConfig::deterministic`] a token's result then has the same
    /// bits however it comes to the cache, as long as it is the same kernel that computes it.
    ///
    /// # Errors
    /// Those of [`Attention::plan`], and [`Error::Argument`] for another number of kernels.
    pub fn plan_with_kernels<'s>(
        &self,
        step: impl Into<StepGroup<'s>>,
        kernels: &[QueryKernel],
    ) -> Result<AttentionPlan> {
        let step = step.into();
        if self.config.custom_mask {
            return Err(Error::argument("custom_mask", "plan_with_kernels", "plan_with_masks, which gives the masks"));
        }
        let need = step.batch().entries.len();
        if kernels.len() != need {
            let rule = format!("one per sequence of the step, {need}");
            return Err(Error::argument("kernels", kernels.len(), rule));
        }
        self.plan_any(step, Some(kernels), &[])
    }

    /// [`Attention::plan`] with a mask per sequence of the step: `[query_len, ceil(seq_len / 32)]` words, bit `key % 32` (lowest first) of word
    /// `key / 32` says whether the query sees the key. Causal and window masks apply as well.
    ///
    /// # Errors
    /// Those of [`Attention::plan`], and [`Error::Argument`] for a mask of another length.
    pub fn plan_with_masks<'s>(&self, step: impl Into<StepGroup<'s>>, masks: &[&[u32]]) -> Result<AttentionPlan> {
        if !self.config.custom_mask {
            return Err(Error::argument("custom_mask", false, "true, to plan with masks"));
        }
        self.plan_any(step.into(), None, masks)
    }

    fn plan_any(
        &self,
        group: StepGroup<'_>,
        kernels: Option<&[QueryKernel]>,
        masks: &[&[u32]],
    ) -> Result<AttentionPlan> {
        let step = group.step();
        let ticket = step.ticket();
        ticket.check()?;
        if *step.config() != self.cache {
            let rule = format!("a step of a cache like the attention's, {:?}", self.cache);
            return Err(Error::argument("step", format!("a step of {:?}", step.config()), rule));
        }
        self.config.check_kept(self.cache.groups.get(group.index()))?;
        if step.batch().has_trees() && !self.config.trees {
            return Err(Error::argument("step", "one with a tree", "AttentionConfig::trees set, to attend over trees"));
        }
        let mut batch = Cow::Borrowed(group.batch());
        if let Some(kernels) = kernels {
            batch.to_mut().entries.iter_mut().zip(kernels).for_each(|(entry, &kernel)| entry.kernel = kernel);
        }
        let batch = &*batch;
        let mut plan = StepPlan::new(&self.shape, &self.policy, &self.params, batch, masks)?;
        let workspace = self.workspace(plan.workspace_bytes)?;
        let upload = Upload::new(&self.gpu, "step", std::mem::take(&mut plan.words))?;
        Ok(AttentionPlan {
            plan,
            ticket,
            attention: Arc::clone(&self.identity),
            layers: Arc::clone(step.shared_layers()),
            group: group.index(),
            num_tokens: batch.num_tokens(),
            upload,
            workspace,
            in_parts: false,
        })
    }

    /// Prepares a plan for [`Attention::attend_part`]: it gets a workspace of its own, as other steps may run between its parts.
    ///
    /// # Errors
    /// [`Error::Argument`] for a plan of another attention; [`Error::Wgpu`].
    pub fn in_parts(&self, plan: AttentionPlan) -> Result<AttentionPlan> {
        self.check_own(&plan)?;
        let bytes = plan.plan.workspace_bytes.max(MIN_WORKSPACE_BYTES);
        Ok(AttentionPlan { workspace: create_workspace(&self.gpu, bytes)?, in_parts: true, ..plan })
    }

    fn check_own(&self, plan: &AttentionPlan) -> Result<()> {
        if Arc::ptr_eq(&plan.attention, &self.identity) {
            return Ok(());
        }
        Err(Error::argument("plan", "a plan of another attention", "a plan that this attention made"))
    }

    fn heads_binding<'a>(&'a self, variant: &Variant, sinks: Option<&'a Sinks>) -> Option<wgpu::BindingResource<'a>> {
        let heads = sinks.map(|sinks| &sinks.heads).or(self.heads.as_ref());
        heads.filter(|_| variant.reads_heads()).map(wgpu::Buffer::as_entire_binding)
    }

    /// Uploads sinks, one per query head, for [`AttentionCall::sinks`]: layers with sinks of their own share the kernels.
    ///
    /// # Errors
    /// [`Error::Argument`] if [`AttentionConfig::sinks`] is not set, or for values that break its rule; [`Error::Wgpu`].
    pub fn sinks(&self, values: &[f32]) -> Result<Sinks> {
        if self.config.sinks.is_none() {
            return Err(Error::argument("sinks", "values", "none, because the config has no sinks"));
        }
        let config = AttentionConfig { sinks: Some(values.to_vec()), ..self.config.clone() };
        config.validate(&self.cache)?;
        let heads = config.head_params().unwrap_or_default();
        Ok(Sinks { heads: upload_heads(&self.gpu, &heads)?, num_q_heads: config.num_q_heads })
    }

    /// The workspace, made larger if it has to be.
    fn workspace(&self, bytes: u64) -> Result<wgpu::Buffer> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        if workspace.size() < bytes {
            let max = self.gpu.max_storage_bytes();
            if bytes > max {
                let (need, have) = (format!("{bytes} bytes"), format!("{max} bytes in a storage binding"));
                let error = Error::unsupported("attention workspace", need, have);
                return Err(error.with_hint("use fewer heads or a device with larger bindings"));
            }
            // Sequences grow: double, so that a decode loop reallocates rarely.
            *workspace = create_workspace(&self.gpu, bytes.next_power_of_two().min(max))?;
        }
        Ok(workspace.clone())
    }

    /// Records attention of one layer: `out = softmax(q kᵀ) v` over everything that the step's sequences have cached, the new tokens included.
    ///
    /// `q`: f32 `[num_tokens, num_q_heads, head_dim]`, `out`: f32 `[num_tokens, num_q_heads, value_dim]`, the tokens of all sequences of the step one
    /// after another, unless [`AttentionConfig::q_rows`] and [`AttentionConfig::out_rows`] say that they lie otherwise. Each range needs usage `STORAGE`,
    /// an aligned offset and exactly the step's size (at least that, for rows with gaps), and a buffer of its own: WebGPU allows no buffer to be read and
    /// written in one dispatch, not even in disjoint ranges. Record the layer's [`append`](crate::KvCache::append) first, in the same or an earlier
    /// command buffer.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that isn't there or is of another group than the plan, a range that doesn't fit, a plan of another attention, or
    /// if [`AttentionConfig::lse`] is set; [`Error::Stale`] if the plan's step is over; [`Error::Wgpu`].
    pub fn attend<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        plan: &AttentionPlan,
        layer: u32,
        q: impl Into<BufferRef<'a>>,
        out: impl Into<BufferRef<'a>>,
    ) -> Result<()> {
        if self.config.lse {
            return Err(Error::argument("lse", "attend", "attend_with_lse, because the config asks for lse"));
        }
        self.attend_call(recorder, plan, layer, AttentionCall::new(q, out))
    }

    /// [`Attention::attend`] that also writes `lse`: f32 `[num_tokens, num_q_heads]`, the natural logarithm of the softmax denominator,
    /// with which partial results over disjoint keys can be merged.
    ///
    /// # Errors
    /// Those of [`Attention::attend`], and [`Error::Argument`] if [`AttentionConfig::lse`] is not set.
    pub fn attend_with_lse<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        plan: &AttentionPlan,
        layer: u32,
        q: impl Into<BufferRef<'a>>,
        out: impl Into<BufferRef<'a>>,
        lse: impl Into<BufferRef<'a>>,
    ) -> Result<()> {
        if !self.config.lse {
            return Err(Error::argument("lse", false, "AttentionConfig::lse set, to write lse"));
        }
        let call = AttentionCall { lse: Some(lse.into()), ..AttentionCall::new(q, out) };
        self.attend_call(recorder, plan, layer, call)
    }

    /// [`Attention::attend`] with all that a call may read and write: queries of their own for sink tokens, sinks of a layer, `lse`.
    ///
    /// # Errors
    /// Those of [`Attention::attend`], and [`Error::Argument`] for a range that is missing or too much, as the configuration says, or sinks of another
    /// number of heads.
    pub fn attend_call<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        plan: &AttentionPlan,
        layer: u32,
        call: AttentionCall<'a>,
    ) -> Result<()> {
        self.attend_any(recorder.into(), plan, layer, 0..plan.num_parts(), call)
    }

    /// One dispatch of [`Attention::attend`] or [`Attention::attend_with_lse`], of at most [`AttentionConfig::max_dispatch_work`]: a host that draws
    /// frames may submit the parts of a long prefill one by one, with other work between them. `out` holds the result when all parts of a layer,
    /// 0 to [`AttentionPlan::num_parts`], have run in this order, with the same ranges; it is that of one call, to the bit.
    ///
    /// `lse` is needed if [`AttentionConfig::lse`] is set, and only then.
    ///
    /// # Errors
    /// Those of [`Attention::attend`], and [`Error::Argument`] for a part that isn't there or a plan that did not go through
    /// [`Attention::in_parts`].
    #[expect(clippy::too_many_arguments, reason = "a call of attend, and which part of it")]
    pub fn attend_part<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        plan: &AttentionPlan,
        layer: u32,
        part: usize,
        q: impl Into<BufferRef<'a>>,
        out: impl Into<BufferRef<'a>>,
        lse: Option<BufferRef<'a>>,
    ) -> Result<()> {
        if !plan.in_parts {
            return Err(Error::argument("plan", "one without a workspace of its own", "one from Attention::in_parts"));
        }
        if part >= plan.num_parts() {
            return Err(Error::argument("part", part, format!("below num_parts, {}", plan.num_parts())));
        }
        let call = AttentionCall { lse, ..AttentionCall::new(q, out) };
        self.attend_any(recorder.into(), plan, layer, part..part + 1, call)
    }

    /// Whether a call has what the configuration asks for, and nothing else.
    fn check_call(&self, call: &AttentionCall<'_>) -> Result<()> {
        for (argument, is_given, is_needed, field) in [
            ("sink_q", call.sink_q.is_some(), self.config.sink_queries, "sink_queries"),
            ("lse", call.lse.is_some(), self.config.lse, "lse"),
        ] {
            if is_given != is_needed {
                let (got, need) = if is_needed { ("none", "a range") } else { ("a range", "none") };
                return Err(Error::argument(argument, got, format!("{need}, as AttentionConfig::{field} says")));
            }
        }
        if let Some(sinks) = call.sinks
            && (self.config.sinks.is_none() || sinks.num_q_heads != self.config.num_q_heads)
        {
            let need = format!("{} heads, and a config with sinks", self.config.num_q_heads);
            return Err(Error::argument("sinks", format!("those of {} heads", sinks.num_q_heads), need));
        }
        Ok(())
    }

    fn attend_any(
        &self,
        recorder: Recorder<'_>,
        plan: &AttentionPlan,
        layer: u32,
        parts: Range<usize>,
        call: AttentionCall<'_>,
    ) -> Result<()> {
        plan.ticket.check()?;
        self.check_own(plan)?;
        self.check_call(&call)?;
        let storage = plan.layers.get(layer)?;
        let group = self.cache.group_of(layer);
        if group != plan.group {
            let rule = format!("a layer of the group that was planned, {}", plan.group);
            return Err(Error::argument("layer", format!("{layer}, of group {group}"), rule));
        }
        let rows = u64::from(plan.num_tokens) * u64::from(self.config.num_q_heads);
        let Variant { q_rows, out_rows, .. } = &self.prefill.variant;
        let q = call.q.check_rows(&self.gpu, "q", q_rows, plan.num_tokens)?;
        let sink_q =
            call.sink_q.map(|sink_q| sink_q.check_rows(&self.gpu, "sink_q", q_rows, plan.num_tokens)).transpose()?;
        let out = call.out.check_rows(&self.gpu, "out", out_rows, plan.num_tokens)?;
        out_rows.check_apart("out", plan.num_tokens)?;
        let lse = call.lse.map(|lse| lse.check(&self.gpu, "lse", rows, true)).transpose()?;
        // WebGPU allows no buffer to be read and written in one dispatch, not even in disjoint ranges.
        check_distinct("out", &out, &[("q", Some(&q)), ("sink_q", sink_q.as_ref()), ("lse", lse.as_ref())])?;
        plan.layers.check_foreign("out", &out)?;
        check_distinct("q", &q, &[("lse", lse.as_ref())])?;
        plan.layers.check_foreign("q", &q)?;
        if let Some(sink_q) = &sink_q {
            check_distinct("sink_q", sink_q, &[("lse", lse.as_ref())])?;
            plan.layers.check_foreign("sink_q", sink_q)?;
        }
        let sink_q = sink_q.as_ref().unwrap_or(&q);
        if let Some(lse) = &lse {
            plan.layers.check_foreign("lse", lse)?;
        }
        let (lists, lease) = plan.upload.buffer()?;
        let partials = plan.workspace.as_entire_binding();
        let lse = lse.as_ref().map(BufferRef::binding);
        let dispatch = |planned: &PlannedDispatch| {
            let params = params_binding::<AttendParams>(&lists, planned.params_offset);
            let (program, first) = match (planned.stage, &self.decode) {
                (Stage::Merge, _) => (&self.merge, partials.clone()),
                (Stage::Decode, Some(decode)) => (decode, q.binding()),
                (Stage::SinkDecode, Some(decode)) => (decode, sink_q.binding()),
                (Stage::SinkPrefill, _) => (&self.prefill, sink_q.binding()),
                _ => (&self.prefill, q.binding()),
            };
            let mut resources = program.resources();
            resources.push(first);
            if planned.stage == Stage::Merge {
                resources.extend([lists.as_entire_binding(), out.binding(), params]);
            } else {
                resources.extend(storage.read());
                resources.extend([lists.as_entire_binding(), out.binding(), partials.clone(), params]);
            }
            resources.extend(lse.clone());
            resources.extend(self.heads_binding(&program.variant, call.sinks));
            program.dispatch(resources, planned.grid)
        };
        let dispatches: Vec<_> = plan.plan.dispatches[parts].iter().map(dispatch).collect();
        recorder.record(&self.gpu, "folio attend", &dispatches, &[lease])
    }

    /// Runs every kernel once on no work, so that drivers which compile at the first dispatch do it now (on lavapipe that takes up to some
    /// seconds for large heads). **Submits** a command buffer; doesn't wait for it.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub fn warm_up(&self) -> Result<()> {
        let gpu = &self.gpu;
        let mut words = Vec::new();
        push_params(&mut words, &self.params);
        let (lists, lease) = Upload::new(gpu, "warm_up", words)?.buffer()?;
        let (reads, out, lse) = (gpu.warm_up_buffer()?, gpu.warm_up_buffer()?, gpu.warm_up_buffer()?);
        let [read, list, out, lse] = [&reads, &lists, &out, &lse].map(wgpu::Buffer::as_entire_binding);
        let params = params_binding::<AttendParams>(&lists, 0);
        let workspace = self.workspace(0)?;
        let partials = workspace.as_entire_binding();
        let dispatches = self.programs().map(|program| {
            let mut resources = match program.variant.kernel {
                Kernel::Merge => vec![partials.clone(), list.clone(), out.clone(), params.clone()],
                _ => {
                    let [k, v] = self.segments;
                    let mut resources = vec![read.clone(); 1 + (k.count + v.count) as usize];
                    resources.extend([list.clone(), out.clone(), partials.clone(), params.clone()]);
                    resources
                }
            };
            resources.extend(self.config.lse.then(|| lse.clone()));
            resources.extend(self.heads_binding(&program.variant, None));
            program.dispatch(resources, [1, 1, 1])
        });
        gpu.warm_up(dispatches, lease)
    }
}

/// Slopes and sinks, once for all steps.
fn upload_heads(gpu: &Gpu, heads: &[[f32; 2]]) -> Result<wgpu::Buffer> {
    let contents: &[u8] = bytemuck::cast_slice(heads);
    let max = gpu.limits().max_uniform_buffer_binding_size;
    if contents.len() as u64 > max {
        let need = format!("{} bytes of slopes and sinks", contents.len());
        return Err(Error::unsupported("num_q_heads", need, format!("{max} bytes in a uniform binding")));
    }
    gpu.create_buffer_with("uploading slopes and sinks", "folio heads", contents, wgpu::BufferUsages::UNIFORM)
}

fn create_workspace(gpu: &Gpu, bytes: u64) -> Result<wgpu::Buffer> {
    gpu.create_buffer("creating the attention workspace", "folio partial states", bytes, wgpu::BufferUsages::STORAGE)
}

fn check_distinct(
    argument: &'static str,
    range: &BufferRef<'_>,
    others: &[(&str, Option<&BufferRef<'_>>)],
) -> Result<()> {
    for (name, other) in others {
        if other.is_some_and(|other| other.buffer() == range.buffer()) {
            return Err(Error::argument(argument, format!("the buffer of {name}"), "a buffer of its own"));
        }
    }
    Ok(())
}

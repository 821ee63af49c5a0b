//! The roofs of the adapter, and attention and append under them (the roofline model, Williams et al. 2009).

use anyhow::Result;
use folio::kernel::{Kernel, Variant};
use folio::measure::{FilledCache, MeasuredCall, RoofLoops, Spread, Timer, Work, interleave};
use folio::{AdapterClass, AttentionConfig, KvCacheConfig, KvFormat, KvFormats, Profile};

use super::data::{ChosenKernel, PREDICTION_GOAL, Point, Prediction, Roofline};
use super::{Effort, Progress};

/// Heads and lengths that are measured.
pub(super) struct Shape {
    pub(super) num_q_heads: u32,
    pub(super) num_kv_heads: u32,
    pub(super) head_dim: u32,
    /// Sequences.
    batch: u32,
    /// New tokens and keys: first what predictions start from, then what is predicted, four times as much work.
    decode: [(u32, u32); 2],
    prefill: [(u32, u32); 2],
}

pub(super) const BLOCK_SIZE: u32 = 16;

/// Heads of Llama 3 8B.
const FULL: Shape = Shape {
    num_q_heads: 32,
    num_kv_heads: 8,
    head_dim: 128,
    batch: 1,
    // Both beyond the caches of CPUs in F32 and F16: out of a cache time grows otherwise.
    decode: [(1, 4096), (1, 16_384)],
    prefill: [(64, 1024), (128, 2048)],
};
/// Heads of the story model, whose kernels are compiled in a moment.
const QUICK: Shape = Shape {
    num_q_heads: 4,
    num_kv_heads: 2,
    head_dim: 32,
    batch: 4,
    decode: [(1, 512), (1, 2048)],
    prefill: [(64, 512), (128, 1024)],
};

impl Shape {
    pub(super) const fn of(effort: Effort) -> &'static Self {
        if effort.quick { &QUICK } else { &FULL }
    }

    /// A cache of sequences of so many tokens.
    pub(super) fn config(&self, batch: u32, seq_len: u32, formats: KvFormats) -> KvCacheConfig {
        KvCacheConfig::new(1, self.num_kv_heads, self.head_dim)
            .with_blocks(batch * seq_len.div_ceil(BLOCK_SIZE), BLOCK_SIZE)
            .with_formats(formats.k, formats.v)
    }
}

fn formats(effort: Effort) -> Vec<KvFormats> {
    if effort.quick { [KvFormat::F16, KvFormat::Int8].map(KvFormats::both).to_vec() } else { KvFormats::ALL.to_vec() }
}

/// Plain loops to compare with. Also checks the timer's clock.
pub(super) fn loops(timer: &mut Timer, effort: Effort) -> Result<RoofLoops> {
    // Two buffers: beyond the caches of most adapters in full, beyond those of small ones if it is to be quick.
    let side_bytes = match timer.gpu().adapter_class() {
        _ if effort.quick => 8 << 20,
        AdapterClass::Cpu => 64 << 20,
        _ => 256 << 20,
    };
    let most = timer.gpu().max_storage_bytes();
    Ok(RoofLoops::new(timer, most.min(side_bytes))?)
}

/// A kind of call that is timed.
#[derive(Clone, Copy, PartialEq)]
enum Call {
    Decode,
    Prefill,
    Append,
}

impl Call {
    const fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Prefill => "prefill",
            Self::Append => "append",
        }
    }

    fn work(self, call: &MeasuredCall<'_>, config: &KvCacheConfig, tokens: u32) -> Work {
        if self == Self::Append { Work::of_append(config, tokens) } else { call.work() }
    }
}

/// Times every kernel in every format, and returns what was chosen for them.
pub(super) fn measure(
    timer: &Timer,
    loops: &RoofLoops,
    effort: Effort,
    progress: &Progress,
) -> Result<(Roofline, Vec<ChosenKernel>)> {
    let shape = Shape::of(effort);
    let formats = formats(effort);
    let part = progress.part(2 * (2 * formats.len() + 1));
    let roofs = loops.measure(timer, effort.rounds)?;
    let plain = [&loops.read, &loops.copy, &loops.multiply_add];
    let (mut points, mut chosen) = (Vec::new(), Vec::new());
    for (kind, sizes) in [(Call::Decode, shape.decode), (Call::Prefill, shape.prefill)] {
        // Both sizes in every format, first the small one of each: all of them take turns.
        let mut caches = Vec::new();
        for &formats in &formats {
            for (query_len, seq_len) in sizes {
                part.next(format!("kernels: {} of {query_len} over {seq_len}, {formats}", kind.name()));
                let config = shape.config(shape.batch, seq_len, formats);
                let attention = AttentionConfig::new(shape.num_q_heads);
                let mut cache = FilledCache::new(timer.gpu(), config, attention, shape.batch)?;
                cache.fill(seq_len - query_len)?;
                caches.push((formats, (query_len, seq_len), cache));
            }
        }
        if chosen.is_empty() {
            chosen = caches.iter().step_by(2).flat_map(|(formats, _, cache)| describe_all(cache, *formats)).collect();
        }
        let mut open = Vec::new();
        for (formats, lens, cache) in &mut caches {
            let config = *cache.cache().config();
            open.push((*formats, *lens, config, cache.call(lens.0)?));
        }
        part.next(format!("kernels: timing {}", kind.name()));
        // The rows of a prefill are those of an append, too.
        for kind in [kind, Call::Append].into_iter().take(if kind == Call::Prefill { 2 } else { 1 }) {
            // The loops that limit them take turns with them.
            let mut spreads = interleave(open.len() + plain.len(), effort.rounds, |i| {
                let sample = match open.get(i) {
                    Some((.., call)) if kind == Call::Append => call.measure_append(timer),
                    Some((.., call)) => call.measure(timer),
                    None => plain[i - open.len()].measure(timer),
                };
                sample.map(|sample| sample.time())
            })?;
            let beside = spreads.split_off(open.len());
            let rates: Vec<f64> = plain.iter().zip(beside).map(|(plain, time)| plain.work() / time.median).collect();
            let model = Model {
                memory_rate: rates[usize::from(kind == Call::Append)],
                arithmetic_rate: rates[2],
                dispatch: roofs.dispatch.median,
                submit: if timer.clock() == "wall clock" { roofs.submit.median } else { 0.0 },
            };
            let measured: Vec<_> = open
                .iter()
                .zip(spreads)
                .map(|((formats, lens, config, call), spread)| {
                    (formats, lens, kind.work(call, config, lens.0 * shape.batch), spread)
                })
                .collect();
            for pair in measured.chunks(2) {
                let [small, large] = pair else { continue };
                let smaller = Some((&small.2, small.3.median));
                for ((formats, lens, work, spread), smaller) in [(small, None), (large, smaller)] {
                    let mut point = model.point(kind, *work, *spread, smaller);
                    (point.query_len, point.seq_len) = **lens;
                    (point.batch, point.cache) = (shape.batch, formats.to_string());
                    points.push(point);
                }
            }
        }
    }
    let calls = [Call::Decode, Call::Prefill, Call::Append];
    let predictions = calls.into_iter().filter_map(|call| prediction(call, &points)).collect();
    let roofline = Roofline {
        num_q_heads: shape.num_q_heads,
        num_kv_heads: shape.num_kv_heads,
        head_dim: shape.head_dim,
        block_size: BLOCK_SIZE,
        predictions,
        roofs,
        points,
    };
    Ok((roofline, chosen))
}

/// Times from bytes and operations.
struct Model {
    /// Bytes per second of the loop that reads, or that copies.
    memory_rate: f64,
    /// Operations per second of the loop that multiplies and adds.
    arithmetic_rate: f64,
    /// Seconds of a dispatch, and of a submit where it is in the times.
    dispatch: f64,
    submit: f64,
}

impl Model {
    /// Under the roofs: the time, and whether it is that of the bytes.
    fn bound(&self, work: &Work, flop: u64) -> (f64, bool) {
        let memory = (work.read_bytes + work.written_bytes) as f64 / self.memory_rate;
        let arithmetic = flop as f64 / self.arithmetic_rate;
        (memory.max(arithmetic), memory >= arithmetic)
    }

    /// What comes on top of the kernels' own time.
    fn launch(&self, work: &Work) -> f64 {
        self.submit + f64::from(work.dispatches) * self.dispatch
    }

    /// `smaller` is the work of a smaller shape, and the seconds that it took.
    fn point(&self, call: Call, work: Work, measured: Spread, smaller: Option<(&Work, f64)>) -> Point {
        let (roof_seconds, memory) = self.bound(&work, work.flop);
        // Kernels compute whole tiles, so these are what their time grows with.
        let tiles = |work: &Work| self.bound(work, work.tile_flop).0;
        let predicted = smaller.map(|(smaller, seconds)| {
            let own = (seconds - self.launch(smaller)).max(0.0);
            self.launch(&work) + own * tiles(&work) / tiles(smaller)
        });
        Point {
            kernel: call.name(),
            cache: String::new(),
            batch: 0,
            query_len: 0,
            seq_len: 0,
            intensity: work.flop as f64 / (work.read_bytes + work.written_bytes) as f64,
            bound_by: if memory { "memory" } else { "arithmetic" },
            memory_rate: self.memory_rate,
            arithmetic_rate: self.arithmetic_rate,
            roof_seconds,
            share_of_roof: roof_seconds / measured.median,
            predicted_seconds: predicted,
            prediction_error: predicted.map(|predicted| predicted / measured.median - 1.0),
            measured,
            work,
        }
    }
}

fn prediction(call: Call, points: &[Point]) -> Option<Prediction> {
    let errors = points.iter().filter(|point| point.kernel == call.name()).filter_map(|point| point.prediction_error);
    let errors: Vec<f64> = errors.map(f64::abs).collect();
    let worst = errors.iter().copied().max_by(f64::total_cmp)?;
    Some(Prediction {
        kernel: call.name(),
        worst_error: worst,
        median_error: Spread::of(errors).median,
        within_goal: worst <= PREDICTION_GOAL,
    })
}

/// The kernels of attention over a cache, each with what made it so.
fn describe_all(cache: &FilledCache, formats: KvFormats) -> Vec<ChosenKernel> {
    let tuned = cache.cache().gpu().tuning().is_some();
    cache.attention().variants().map(|variant| describe(variant, formats, tuned)).collect()
}

fn describe(variant: &Variant, formats: KvFormats, tuned: bool) -> ChosenKernel {
    let attends = matches!(variant.kernel, Kernel::Decode | Kernel::Prefill);
    let family = match variant.target.profile {
        Profile::Cpu => "written for adapters that run shaders on CPU cores",
        Profile::Gpu => "written for GPUs",
    };
    let mut reasons = vec![family.to_owned()];
    if let Some(matrix) = variant.target.matrix {
        reasons.push(format!("matrix units of {} rows", matrix.rows()));
    }
    match (variant.target.subgroups, variant.target.subgroup_size) {
        (true, 0) => reasons.push("subgroups of any size".to_owned()),
        (true, size) => reasons.push(format!("subgroups of {size}")),
        (false, _) => reasons.push("shares through workgroup memory, without subgroups".to_owned()),
    }
    if variant.target.int64 && variant.target.profile == Profile::Cpu {
        reasons.push("64-bit loads".to_owned());
    }
    if variant.packed_dots {
        reasons.push("packed integer dot products".to_owned());
    }
    reasons.push(if tuned { "sizes of the tuning where it has them" } else { "default sizes" }.to_owned());
    ChosenKernel {
        kernel: variant.kernel.entry_point(),
        cache: formats.to_string(),
        workgroup_size: variant.workgroup_size,
        tile_q: if attends { variant.tile_q } else { 0 },
        tile_kv: if attends { variant.tile_kv } else { 0 },
        workgroup_bytes: variant.workgroup_bytes(),
        reason: reasons.join(", "),
    }
}

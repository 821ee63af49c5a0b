//! Choosing kernel sizes by measuring on the adapter at hand: [`Gpu::tune`]. Nothing calls it unasked.
//!
//! For each kernel and shape the candidates of [`Variant::candidates`](crate::kernel::Variant::candidates) race: they take turns on the same data, so that whatever else slows
//! the machine down meets all alike, and the one with the smallest median wins. A candidate whose results are outside the oracle's bound on this
//! adapter (a driver's bug) is dropped, as is one that doesn't compile.

mod check;
pub(crate) mod race;
mod workload;

use std::fmt;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernel::Kernel;
use crate::kernel::tuning::{Sizes, TunedKernel, TunedShape, TunedSplit, Tuning};
use crate::layout::KvCacheConfig;
pub use crate::measure::{Sample, Timer, median};
use race::Race;
use workload::Workload;

/// A shape of attention to tune for, and how it is used.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TuneShape {
    /// Heads, head_dim, block size and formats. The number of layers and blocks plays no part.
    pub cache: KvCacheConfig,
    /// Query heads, a multiple of the cache's `num_kv_heads`.
    pub num_q_heads: u32,
    /// Sequences that decode together, and keys of each.
    pub decode: (u32, u32),
    /// New tokens of a prefill, and keys including them.
    pub prefill: (u32, u32),
}

impl TuneShape {
    /// One sequence: decode over 2048 keys, prefill of 512 tokens.
    #[must_use]
    pub fn new(cache: &KvCacheConfig, num_q_heads: u32) -> Self {
        Self { cache: *cache, num_q_heads, decode: (1, 2048), prefill: (512, 512) }
    }

    /// The same with a batch of sequences that decode together, and another number of keys.
    #[must_use]
    pub fn with_decode(self, batch: u32, seq_len: u32) -> Self {
        Self { decode: (batch, seq_len), ..self }
    }

    /// The same with another prefill.
    #[must_use]
    pub fn with_prefill(self, query_len: u32, seq_len: u32) -> Self {
        Self { prefill: (query_len, seq_len), ..self }
    }

    fn validate(&self) -> Result<()> {
        let Self { cache, num_q_heads, decode: (batch, keys), prefill: (queries, prefill_keys) } = self;
        cache.validate()?;
        for (argument, value, most) in [
            ("decode batch", *batch, MAX_BATCH),
            ("decode keys", *keys, MAX_KEYS),
            ("prefill tokens", *queries, MAX_KEYS),
            ("prefill keys", *prefill_keys, MAX_KEYS),
        ] {
            if value == 0 || value > most {
                return Err(Error::argument(argument, value, format!("1 to {most}")));
            }
        }
        if queries > prefill_keys {
            return Err(Error::argument("prefill tokens", *queries, format!("at most its keys, {prefill_keys}")));
        }
        crate::plan::AttentionConfig::new(*num_q_heads).validate(cache)
    }
}

/// Bounds of a workload: what a tuner times should take milliseconds.
const MAX_BATCH: u32 = 1024;
const MAX_KEYS: u32 = 1 << 20;

/// What happens while a tuner works.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TuneEvent<'a> {
    /// A race begins.
    Race {
        /// Kernel and shape.
        shape: &'a TunedShape,
        /// What is timed.
        workload: &'a str,
        /// How many candidates there are, the default among them.
        num_candidates: usize,
    },
    /// A candidate can't run, or is wrong on this adapter.
    Dropped {
        /// The candidate.
        sizes: Sizes,
        /// Why.
        reason: String,
    },
    /// What a candidate took.
    Timed {
        /// The candidate.
        sizes: Sizes,
        /// Median microseconds.
        micros: f64,
    },
    /// The race is over.
    Chosen(&'a TunedKernel),
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workgroup_size, tile_q, tile_kv, int64, subgroups, packed_dots } = self;
        write!(f, "workgroup {workgroup_size}, tile {tile_q} x {tile_kv}")?;
        write!(f, "{}{}", if *subgroups { ", subgroups" } else { "" }, if *int64 { ", 64-bit loads" } else { "" })?;
        f.write_str(if *packed_dots { ", packed dot products" } else { "" })
    }
}

/// (workgroups, keys) at which splitting may start, beside the default.
const SPLITS: [(u32, u32); 6] = [(4, 1024), (16, 512), (64, 256), (256, 256), (1024, 256), (4096, 128)];

impl Gpu {
    /// Races candidates of decode, prefill and append for the given shapes, and returns the winners, for [`Gpu::with_tuning`]. **Submits and waits**, takes the device
    /// for itself meanwhile, and allocates pools for the workloads. Ends after about `budget`: candidates that were not reached are not chosen.
    /// Run it with nothing else running, once per adapter, driver and model; `progress` hears what is going on.
    ///
    /// Drivers of CPU adapters take up to seconds to compile a candidate: a model's shapes take some 30 s there, and a second or two on GPUs.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape that breaks its rule; those of [`KvCache::new`](crate::KvCache::new) and
    /// [`Attention::new`](crate::Attention::new) for the defaults.
    pub fn tune(
        &self,
        shapes: &[TuneShape],
        budget: Duration,
        mut progress: impl FnMut(TuneEvent<'_>),
    ) -> Result<Tuning> {
        shapes.iter().try_for_each(TuneShape::validate)?;
        let start = Instant::now();
        let mut tuning = Tuning::new(self.tuned_for());
        const KERNELS: [Kernel; 3] = [Kernel::Decode, Kernel::Prefill, Kernel::Append];
        let num_races = shapes.len() * KERNELS.len();
        for (i, shape) in shapes.iter().enumerate() {
            for (j, &kernel) in KERNELS.iter().enumerate() {
                // What earlier races left over helps the later ones.
                let left = budget.saturating_sub(start.elapsed());
                let deadline = Instant::now() + left / (num_races - i * KERNELS.len() - j) as u32;
                let Some(workload) = Workload::new(self, shape, kernel)? else { continue };
                if tuning.kernels.iter().any(|tuned| tuned.shape == TunedShape::of(&workload.variant)) {
                    continue;
                }
                let tuned = self.tune_kernel(&workload, deadline, &mut progress)?;
                progress(TuneEvent::Chosen(&tuned));
                tuning.kernels.push(tuned);
            }
        }
        Ok(tuning)
    }

    fn tune_kernel(
        &self,
        workload: &Workload,
        deadline: Instant,
        progress: &mut impl FnMut(TuneEvent<'_>),
    ) -> Result<TunedKernel> {
        let shape = TunedShape::of(&workload.variant);
        let candidates = workload.variant.candidates();
        let describe = workload.describe();
        progress(TuneEvent::Race { shape: &shape, workload: &describe, num_candidates: candidates.len() });
        // Two thirds of the time for the sizes, the rest for the splits of the best.
        let now = Instant::now();
        let left = deadline.saturating_duration_since(now);
        let splits = workload.variant.kernel == Kernel::Decode;
        let sizes_deadline = if splits { now + left * 2 / 3 } else { deadline };

        let mut race = Race::new(self)?;
        let mut entered = Vec::new();
        for &sizes in &candidates {
            let is_default = entered.is_empty();
            if !is_default && Instant::now() >= sizes_deadline {
                break;
            }
            match workload.enter(sizes, None) {
                Ok(run) => {
                    race.enter(run);
                    entered.push(sizes);
                }
                Err(error) if is_default || matches!(error, Error::DeviceLost { .. }) => return Err(error),
                Err(error) => progress(TuneEvent::Dropped { sizes, reason: error.to_string() }),
            }
        }
        let outcome = race.run(sizes_deadline)?;
        for (&sizes, median) in entered.iter().zip(&outcome.medians) {
            progress(TuneEvent::Timed { sizes, micros: median * 1e6 });
        }
        let sizes = entered[outcome.best];
        let default_seconds = outcome.medians[0];
        let mut seconds = default_seconds * outcome.ratio;

        let mut split = None;
        if splits {
            let mut race = Race::new(self)?;
            race.enter(workload.enter(sizes, None)?);
            let tried =
                SPLITS.map(|(target_workgroups, min_split_len)| TunedSplit { target_workgroups, min_split_len });
            for tried in tried {
                race.enter(workload.enter(sizes, Some(tried))?);
            }
            let outcome = race.run(deadline)?;
            if outcome.best > 0 {
                split = Some(tried[outcome.best - 1]);
                seconds *= outcome.ratio;
            }
        }
        let [nanos, default_nanos] = [seconds, default_seconds].map(|seconds| (seconds * 1e9) as u64);
        Ok(TunedKernel { shape, sizes, split, workload: describe, nanos, default_nanos })
    }
}

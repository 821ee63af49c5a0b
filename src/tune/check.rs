//! Whether a candidate's results are right on this adapter: against the oracle, and against the default kernel.

use std::sync::OnceLock;

use super::workload::{calibrate, choice, random, submit_append, upload};
use crate::attention::Attention;
use crate::cache::{KvCache, Step};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernel::tuning::{TunedSplit, Tuning};
use crate::kernel::{AttendFlags, Kernel, Variant, max_decode_group};
use crate::layout::KvCacheConfig;
use crate::plan::{AttentionConfig, SPLIT_GRANULE};
use crate::reference::{BoundedOutput, ErrorModel, InvalidProblem, Options, Problem, attention_with_bound, compare};

/// (context, new tokens) of a few short sequences: lengths around the tiles' and the blocks' ends, and one that is split.
const DECODE: [(u32, u32); 4] = [(0, 1), (16, 1), (67, 1), (200, 1)];
const PREFILL: [(u32, u32); 4] = [(0, 19), (17, 33), (150, 5), (3, 2)];

/// Splits as much as it can.
const SPLIT_ALL: TunedSplit = TunedSplit { target_workgroups: 1 << 16, min_split_len: SPLIT_GRANULE };

/// A small problem whose result is known.
pub(super) struct Check {
    attention: AttentionConfig,
    cache: KvCache,
    step: Step,
    /// The default of decode, whose entry in a tuning says when to split; none if the group is too large for it.
    decode: Option<Variant>,
    q: wgpu::Buffer,
    out: wgpu::Buffer,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    /// Of each sequence, with what its format may lose.
    expected: Vec<BoundedOutput>,
    /// How far apart two right kernels may be that read the same codes, for each element of `out`.
    bounds: Vec<f64>,
    /// The default kernel's results: the first that are asked for.
    default: OnceLock<Vec<f32>>,
}

impl Check {
    pub(super) fn new(gpu: &Gpu, config: &KvCacheConfig, attention: &AttentionConfig, kernel: Kernel) -> Result<Self> {
        let lens = if kernel == Kernel::Decode { DECODE } else { PREFILL };
        let num_blocks = lens.iter().map(|(context, new)| (context + new).div_ceil(config.block_size)).sum();
        let config = KvCacheConfig { num_blocks, ..*config };
        let cache = gpu.block_on(KvCache::new(gpu, config))?;
        calibrate(&cache)?;
        let [k_row, v_row] = config.token_elements().map(|elements| elements as usize);
        let q_row = (attention.num_q_heads * config.head_dim) as usize;
        let sequences = lens.map(|_| cache.create_sequence());
        // Rows of all sequences: first those that they have in the cache, then those of the step.
        let rows = |seed: u64, len: fn(&(u32, u32)) -> u32, row: usize| -> Vec<Vec<f32>> {
            (seed..).zip(&lens).map(|(seed, lens)| random(seed, len(lens) as usize * row)).collect()
        };
        let (old_k, old_v) = (rows(10, |l| l.0, k_row), rows(20, |l| l.0, v_row));
        let (k, v) = (rows(30, |l| l.1, k_row), rows(40, |l| l.1, v_row));
        let q = rows(50, |l| l.1, q_row);
        let begin = |new: fn(&(u32, u32)) -> u32| {
            let batch: Vec<_> =
                sequences.iter().copied().zip(lens.iter().map(new)).filter(|&(_, new)| new > 0).collect();
            cache.begin_step(&batch)
        };
        let step = begin(|l| l.0)?;
        submit_append(&cache, &step, &upload(gpu, &old_k.concat())?, &upload(gpu, &old_v.concat())?)?;
        cache.commit(step)?;
        let step = begin(|l| l.1)?;
        let (k_buffer, v_buffer) = (upload(gpu, &k.concat())?, upload(gpu, &v.concat())?);
        submit_append(&cache, &step, &k_buffer, &v_buffer)?;

        let (mut expected, mut bounds) = (Vec::new(), Vec::new());
        let scales = cache.key_scales(0);
        for i in 0..lens.len() {
            let (k, v) = ([&old_k[i][..], &k[i]].concat(), [&old_v[i][..], &v[i]].concat());
            let problem = Problem {
                num_q_heads: attention.num_q_heads as usize,
                num_kv_heads: config.num_kv_heads as usize,
                head_dim: config.head_dim as usize,
                value_dim: config.value_dim() as usize,
                q: &q[i],
                k: &k,
                v: &v,
                options: Options::default(),
            };
            let mut model = ErrorModel::new(config.k_format, config.v_format);
            if gpu.packed_dots() && kernel == Kernel::Decode {
                model = model.with_packed_dots();
            }
            if let Some(scales) = &scales {
                model = model.with_key_scales(scales);
            }
            let of = |model| {
                let invalid =
                    |error: InvalidProblem| Error::argument("shape", error.to_string(), "one that the oracle takes");
                attention_with_bound(&problem, model).map_err(invalid)
            };
            expected.push(of(&model)?);
            bounds.extend(of(&model.over_stored())?.out_bound);
        }
        let group_size = attention.num_q_heads / config.num_kv_heads;
        let flags = AttendFlags { causal: true, ..AttendFlags::default() };
        let decode = Variant::new(Kernel::Decode, gpu.target(), &config, group_size, flags);
        Ok(Self {
            attention: attention.clone(),
            decode: (group_size <= max_decode_group(&config)).then_some(decode),
            q: upload(gpu, &q.concat())?,
            out: upload(gpu, &vec![0.0; bounds.len()])?,
            k: k_buffer,
            v: v_buffer,
            step,
            cache,
            expected,
            bounds,
            default: OnceLock::new(),
        })
    }

    /// Runs attention with a tuning, whole and split.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a result is outside its bound; those of [`Attention`].
    pub(super) fn attention(&self, tuning: &Tuning) -> Result<()> {
        self.attend(tuning)?;
        let Some(decode) = self.decode else { return Ok(()) };
        let mut tuning = tuning.clone();
        match tuning.kernels.iter_mut().find(|tuned| tuned.shape.kernel == Kernel::Decode.entry_point()) {
            Some(decode) => decode.split = Some(SPLIT_ALL),
            None => tuning.kernels.push(choice(&decode, decode.sizes(), Some(SPLIT_ALL))),
        }
        self.attend(&tuning)
    }

    fn attend(&self, tuning: &Tuning) -> Result<()> {
        let gpu = self.cache.gpu();
        let attention = gpu.block_on(Attention::build(&self.cache, self.attention.clone(), Some(tuning)))?;
        let plan = attention.plan(&self.step)?;
        let mut encoder = gpu.encoder()?;
        attention.attend(&mut encoder, &plan, 0, &self.q, &self.out)?;
        gpu.submit_now("checking a candidate", encoder)?;
        let got = gpu.read_blocking(&self.out)?;
        let mut rest = &got[..];
        for expected in &self.expected {
            let (own, after) = rest.split_at(expected.output.out.len());
            let comparison = compare::out(expected, own);
            if !comparison.is_within() {
                return Err(wrong(comparison.to_string()));
            }
            rest = after;
        }
        let default = self.default.get_or_init(|| got.clone());
        let apart = |i: &usize| (f64::from(got[*i]) - f64::from(default[*i])).abs() > 2.0 * self.bounds[*i];
        match (0..got.len()).find(apart) {
            None => Ok(()),
            Some(i) => Err(wrong(format!("element {i} is {:e}, the default kernel's {:e}", got[i], default[i]))),
        }
    }

    /// Runs append on a device that is tuned. Candidates write the same codes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if they don't; those of [`KvCache`].
    pub(super) fn append(&self, gpu: &Gpu) -> Result<()> {
        let cache = gpu.block_on(KvCache::new(gpu, *self.cache.config()))?;
        calibrate(&cache)?;
        let sequence = cache.create_sequence();
        let step = cache.begin_step(&[(sequence, self.step.num_tokens())])?;
        submit_append(&cache, &step, &self.k, &self.v)?;
        cache.commit(step)?;
        let rows = cache.gather_blocking(sequence, 0)?;
        let got = [rows.k, rows.v].concat();
        let default = self.default.get_or_init(|| got.clone());
        if got == *default { Ok(()) } else { Err(wrong("codes that differ from the default kernel's".into())) }
    }
}

fn wrong(have: String) -> Error {
    Error::unsupported("candidate", "results within their bound", have)
}

//! The oracle: attention as its definition says it, dense, in `f64`, with no code shared with the kernels.
//!
//! [`attention`] computes one sequence whose keys and values lie contiguously in memory: no blocks, no tiles, no online
//! softmax, no splits. It is slow and plain, so that it can be believed. [`attention_with_bound`] also says, for each
//! element, how far a correct `f32` kernel may be from it (see [`bound`]), and [`compare`] checks a kernel's result
//! against both.
//!
//! ```
//! use folio::reference::{self, ErrorModel, Options, Problem, compare};
//!
//! let problem = Problem {
//!     num_q_heads: 1,
//!     num_kv_heads: 1,
//!     head_dim: 2,
//!     value_dim: 2,
//!     q: &[1.0, 0.0],
//!     k: &[1.0, 0.0, 1.0, 0.0],
//!     v: &[2.0, 0.0, 4.0, 0.0],
//!     options: Options::default(),
//! };
//! let expected = reference::attention_with_bound(&problem, &ErrorModel::F32)?;
//! assert_eq!(expected.output.out, [3.0, 0.0]);
//! compare::out(&expected, &[3.0, 0.0]).assert_within();
//! # Ok::<(), reference::InvalidProblem>(())
//! ```
//!
//! # What is computed
//!
//! With `seq_len` keys and `query_len` queries, query token `i` is at position `i + seq_len - query_len`, and key `j`
//! at position `j`. For each query head, with the K/V head `q_head / group_size`:
//!
//! 1. `logit = softmax_scale * dot(q, k)`;
//! 2. with a soft cap `c`: `logit = c * tanh(logit / c)`;
//! 3. with ALiBi: `logit += slope * (key_pos - query_pos)`;
//! 4. the key is visible if all that are set agree: causal (`key_pos <= query_pos`), window
//!    (`key_pos + window > query_pos`, or `key_pos` is one of the first `sink_tokens`), mask (its bit is 1);
//! 5. `out = sum(exp(logit) * v) / denominator`, where the denominator is the sum of `exp(logit)` over visible keys,
//!    plus `exp(sink)` of the head if there are sinks; `lse = ln(denominator)`.
//!
//! A row that sees no key has `out = 0`; its `lse` is negative infinity, or the head's sink if there are sinks. An
//! invisible key is never read, so it may hold NaN or anything else: neither the result nor its bound depends on it. A
//! visible NaN reaches the results of all rows that see it. A window of `seq_len` or more is no window, up to `u32::MAX`.
//! Logits may have any finite value: nothing is compared with a floor.
//!
//! # Judging a kernel
//!
//! Give the rows as they were appended, and an [`ErrorModel`] that says in which formats they are cached; see there.
//! Without a model, [`attention`] gives the exact result alone. Nothing here uses a GPU.

pub mod bound;
pub mod compare;
pub mod quantise;
pub mod rope;

use std::fmt;

pub use bound::{ErrorModel, Rounding};
use quantise::Stored;

/// One sequence to attend over. `query_len` and `seq_len` follow from the lengths of the slices.
#[derive(Clone, Debug)]
pub struct Problem<'a> {
    /// Number of query heads, a multiple of `num_kv_heads`.
    pub num_q_heads: usize,
    /// Number of key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a query and of a key; any number above zero.
    pub head_dim: usize,
    /// Elements of a value; any number above zero.
    pub value_dim: usize,
    /// Queries, `[query_len, num_q_heads, head_dim]`.
    pub q: &'a [f32],
    /// Keys, `[seq_len, num_kv_heads, head_dim]`.
    pub k: &'a [f32],
    /// Values, `[seq_len, num_kv_heads, value_dim]`.
    pub v: &'a [f32],
    /// What is done to the logits.
    pub options: Options,
}

/// What is done to the logits; the default is causal attention and nothing else.
///
/// ```
/// let mut options = folio::reference::Options::default();
/// options.window = Some(128);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Options {
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
    /// Factor of `dot(q, k)`; `1 / sqrt(head_dim)` if `None`.
    pub softmax_scale: Option<f64>,
    /// Bends scaled logits into `-softcap ..= softcap`.
    pub softcap: Option<f64>,
    /// Number of newest keys a query sees, its own position included; 0 hides all of them.
    pub window: Option<u32>,
    /// Number of first keys that a query sees besides its window.
    pub sink_tokens: u32,
    /// ALiBi slopes, `[num_q_heads]`; finite.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Logits that join the softmax denominator only, `[num_q_heads]`; finite.
    pub sinks: Option<Vec<f32>>,
    /// Visible keys as bits, `[query_len, ceil(seq_len / 32)]`: key `j` is bit `j % 32` of word `j / 32`.
    pub mask: Option<Vec<u32>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            causal: true,
            softmax_scale: None,
            softcap: None,
            window: None,
            sink_tokens: 0,
            alibi_slopes: None,
            sinks: None,
            mask: None,
        }
    }
}

/// What [`attention`] computes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Output {
    /// Number of query heads.
    pub num_q_heads: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Weighted values, `[query_len, num_q_heads, value_dim]`.
    pub out: Vec<f64>,
    /// Natural logarithm of the softmax denominators, `[query_len, num_q_heads]`.
    pub lse: Vec<f64>,
}

/// An [`Output`] and how far a correct kernel may be from it.
///
/// A bound is 0 where the exact result is infinite or NaN, as a correct kernel's is then, too. It is infinite where sums of
/// `f32` may overflow, and where only what is stored is finite, or only what was given.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct BoundedOutput {
    /// The exact result.
    pub output: Output,
    /// Bound of `|kernel - output.out|`, of the same shape.
    pub out_bound: Vec<f64>,
    /// Bound of `|kernel - output.lse|`, of the same shape.
    pub lse_bound: Vec<f64>,
}

impl BoundedOutput {
    /// Bounds of the distance from `exact`, where `self` is what a kernel computes of stored rows.
    fn around(self, exact: Output) -> Self {
        let moved = |bound: Vec<f64>, from: &[f64], to: &[f64]| -> Vec<f64> {
            let distance = |(&from, &to): (&f64, &f64)| match (from.is_finite(), to.is_finite()) {
                (true, true) => (from - to).abs(),
                _ if from == to || (from.is_nan() && to.is_nan()) => 0.0,
                _ => f64::INFINITY,
            };
            bound.iter().zip(from.iter().zip(to).map(distance)).map(|(bound, distance)| bound + distance).collect()
        };
        Self {
            out_bound: moved(self.out_bound, &self.output.out, &exact.out),
            lse_bound: moved(self.lse_bound, &self.output.lse, &exact.lse),
            output: exact,
        }
    }
}

/// A [`Problem`] whose parts do not fit together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidProblem {
    message: String,
}

impl fmt::Display for InvalidProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for InvalidProblem {}

/// Attention by its definition, in `f64`. Large problems are shared among scoped threads.
///
/// # Errors
///
/// If the lengths of the slices do not fit the head counts, or an option is not a usable number.
pub fn attention(problem: &Problem<'_>) -> Result<Output, InvalidProblem> {
    Ok(run(&Checked::new(problem)?, false).output)
}

/// The same result as [`attention`], or that over the rows as they are [stored](ErrorModel::over_stored), and the bound of a
/// kernel's error at each element.
///
/// # Errors
///
/// The same as those of [`attention`]; if the model's formats need scales that are missing or of other shapes than K.
pub fn attention_with_bound(problem: &Problem<'_>, model: &ErrorModel<'_>) -> Result<BoundedOutput, InvalidProblem> {
    let checked = Checked::new(problem)?;
    let [stored_k, stored_v] = model.stored(problem)?;
    let rows = |stored: &Stored| stored.values.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let [k, v] = [&stored_k, &stored_v].map(|stored| stored.as_deref().map(rows));
    let kept =
        Problem { k: k.as_deref().unwrap_or(problem.k), v: v.as_deref().unwrap_or(problem.v), ..problem.clone() };
    let (stored_k, stored_v) = (stored_k.as_deref(), stored_v.as_deref());
    let (rounding, f16_products, packed_centre) = (model.rounding(), model.f16_products(), model.packed_centre());
    let rules = Checked { stored_k, stored_v, rounding, f16_products, packed_centre, ..Checked::new(&kept)? };
    let bounded = run(&rules, true);
    if model.is_over_stored() || (stored_k.is_none() && stored_v.is_none()) {
        return Ok(model.round_results(bounded));
    }
    Ok(model.round_results(bounded.around(run(&checked, false).output)))
}

/// Shapes and options of a checked problem, with the defaults filled in.
struct Checked<'a> {
    problem: &'a Problem<'a>,
    query_len: usize,
    seq_len: usize,
    group_size: usize,
    softmax_scale: f64,
    mask_stride: usize,
    /// For bounds: how the problem's rows are stored, where they are what is left of others.
    stored_k: Option<&'a Stored>,
    stored_v: Option<&'a Stored>,
    rounding: Rounding,
    /// Whether kernels multiply halves.
    f16_products: bool,
    /// If kernels quantise queries: the code that they count K's codes from.
    packed_centre: Option<f64>,
}

/// A key that a row sees.
#[derive(Clone, Copy)]
struct VisibleKey {
    /// Its position, which is also its index.
    pos: usize,
    /// `softmax_scale * dot(q, k)`.
    scaled: f64,
    /// What ALiBi added.
    bias: f64,
    /// The final logit.
    logit: f64,
    /// `exp(logit) / denominator`.
    weight: f64,
}

/// One row: a query token and a query head.
struct Row<'a> {
    q: &'a [f32],
    kv_head: usize,
    sink: Option<f64>,
    keys: &'a [VisibleKey],
    out: &'a [f64],
    lse: f64,
}

impl<'a> Checked<'a> {
    fn new(problem: &'a Problem<'a>) -> Result<Self, InvalidProblem> {
        let invalid = |message: String| Err(InvalidProblem { message });
        let Problem { num_q_heads, num_kv_heads, head_dim, value_dim, q, k, v, ref options } = *problem;
        if num_q_heads == 0 || num_kv_heads == 0 || head_dim == 0 || value_dim == 0 {
            return invalid(format!(
                "num_q_heads {num_q_heads}, num_kv_heads {num_kv_heads}, head_dim {head_dim} and value_dim {value_dim} must all be above zero"
            ));
        }
        if num_q_heads % num_kv_heads != 0 {
            return invalid(format!("num_q_heads {num_q_heads} is not a multiple of num_kv_heads {num_kv_heads}"));
        }
        let whole_rows = |name: &str, len: usize, heads: usize| match heads.checked_mul(head_dim) {
            Some(row_len) if len.is_multiple_of(row_len) => Ok(len / row_len),
            _ => Err(InvalidProblem {
                message: format!("{name} has {len} elements, not a multiple of {heads} heads of {head_dim}"),
            }),
        };
        let query_len = whole_rows("q", q.len(), num_q_heads)?;
        let seq_len = whole_rows("k", k.len(), num_kv_heads)?;
        // (k has that many rows of head_dim elements, at least one each.)
        let v_len = (seq_len * num_kv_heads).checked_mul(value_dim);
        if Some(v.len()) != v_len {
            let rule = format!("{seq_len} keys of {num_kv_heads} heads of {value_dim}");
            return invalid(format!("v has {} elements, expected {rule}", v.len()));
        }
        for (name, per_head) in [("alibi_slopes", &options.alibi_slopes), ("sinks", &options.sinks)] {
            let Some(values) = per_head else { continue };
            if values.len() != num_q_heads {
                return invalid(format!("{name} has {} elements, expected num_q_heads = {num_q_heads}", values.len()));
            }
            if let Some(x) = values.iter().find(|x| !x.is_finite()) {
                return invalid(format!("{name} has {x}, which is not finite"));
            }
        }
        let mask_stride = seq_len.div_ceil(32);
        if let Some(mask) = &options.mask
            && Some(mask.len()) != query_len.checked_mul(mask_stride)
        {
            return invalid(format!("mask has {} words, expected {query_len} rows of {mask_stride} words", mask.len()));
        }
        if let Some(softcap) = options.softcap
            && !(softcap.is_finite() && softcap > 0.0)
        {
            return invalid(format!("softcap {softcap} is not a finite number above zero"));
        }
        let softmax_scale = options.softmax_scale.unwrap_or_else(|| 1.0 / (head_dim as f64).sqrt());
        if !softmax_scale.is_finite() {
            return invalid(format!("softmax_scale {softmax_scale} is not finite"));
        }
        let group_size = num_q_heads / num_kv_heads;
        Ok(Self {
            problem,
            query_len,
            seq_len,
            group_size,
            softmax_scale,
            mask_stride,
            stored_k: None,
            stored_v: None,
            rounding: Rounding::Independent,
            f16_products: false,
            packed_centre: None,
        })
    }

    fn query_row(&self, token: usize, q_head: usize) -> &'a [f32] {
        let Problem { num_q_heads, head_dim, q, .. } = *self.problem;
        &q[(token * num_q_heads + q_head) * head_dim..][..head_dim]
    }

    fn key_row(&self, pos: usize, kv_head: usize) -> &'a [f32] {
        let dim = self.problem.head_dim;
        &self.problem.k[self.row_start(pos, kv_head, dim)..][..dim]
    }

    fn value_row(&self, pos: usize, kv_head: usize) -> &'a [f32] {
        let dim = self.problem.value_dim;
        &self.problem.v[self.row_start(pos, kv_head, dim)..][..dim]
    }

    /// The elements of a key, as a kernel finds them.
    fn key_elements(&self, pos: usize, kv_head: usize) -> impl Iterator<Item = bound::Element> + Clone + 'a {
        let start = self.row_start(pos, kv_head, self.problem.head_dim);
        bound::elements(self.key_row(pos, kv_head), start, self.stored_k)
    }

    /// The elements of a value, as a kernel finds them.
    fn value_elements(&self, pos: usize, kv_head: usize) -> impl Iterator<Item = bound::Element> + 'a {
        let start = self.row_start(pos, kv_head, self.problem.value_dim);
        bound::elements(self.value_row(pos, kv_head), start, self.stored_v)
    }

    /// Index of the first element of a key or value of `dim` elements.
    fn row_start(&self, pos: usize, kv_head: usize, dim: usize) -> usize {
        (pos * self.problem.num_kv_heads + kv_head) * dim
    }

    /// Position of a query token; negative if there are more queries than keys.
    fn query_pos(&self, token: usize) -> i64 {
        token as i64 + self.seq_len as i64 - self.query_len as i64
    }

    fn is_visible(&self, token: usize, key_pos: usize) -> bool {
        let options = &self.problem.options;
        let query_pos = self.query_pos(token);
        let causal = !options.causal || key_pos as i64 <= query_pos;
        let is_near = |window: u32| key_pos as i64 + i64::from(window) > query_pos;
        let in_window = options.window.is_none_or(is_near) || (key_pos as u64) < u64::from(options.sink_tokens);
        let unmasked = options
            .mask
            .as_ref()
            .is_none_or(|mask| mask[token * self.mask_stride + key_pos / 32] >> (key_pos % 32) & 1 == 1);
        causal && in_window && unmasked
    }

    /// Computes one row: its visible keys into `keys`, its result into `out`; returns its `lse`.
    fn attend(&self, token: usize, q_head: usize, keys: &mut Vec<VisibleKey>, out: &mut [f64]) -> f64 {
        let options = &self.problem.options;
        let kv_head = q_head / self.group_size;
        let q = self.query_row(token, q_head);
        let sink = options.sinks.as_ref().map(|sinks| f64::from(sinks[q_head]));

        keys.clear();
        for pos in (0..self.seq_len).filter(|&pos| self.is_visible(token, pos)) {
            let k = self.key_row(pos, kv_head);
            let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            let scaled = self.softmax_scale * dot;
            let capped = options.softcap.map_or(scaled, |cap| cap * (scaled / cap).tanh());
            let bias = options
                .alibi_slopes
                .as_ref()
                .map_or(0.0, |slopes| f64::from(slopes[q_head]) * (pos as i64 - self.query_pos(token)) as f64);
            keys.push(VisibleKey { pos, scaled, bias, logit: capped + bias, weight: 0.0 });
        }

        out.fill(0.0);
        let max = keys.iter().map(|key| key.logit).chain(sink).fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY && keys.is_empty() {
            return f64::NEG_INFINITY;
        }
        let denominator: f64 = keys.iter().map(|key| key.logit).chain(sink).map(|logit| (logit - max).exp()).sum();
        for key in keys {
            key.weight = (key.logit - max).exp() / denominator;
            for (out, &v) in out.iter_mut().zip(self.value_row(key.pos, kv_head)) {
                *out += key.weight * f64::from(v);
            }
        }
        max + denominator.ln()
    }
}

fn run(checked: &Checked<'_>, with_bound: bool) -> BoundedOutput {
    let Problem { num_q_heads, head_dim, value_dim, .. } = *checked.problem;
    let num_rows = checked.query_len * num_q_heads;
    let bounded_rows = if with_bound { num_rows } else { 0 };
    let mut output =
        Output { num_q_heads, value_dim, out: vec![0.0; num_rows * value_dim], lse: vec![f64::NEG_INFINITY; num_rows] };
    let mut out_bound = vec![0.0; bounded_rows * value_dim];
    let mut lse_bound = vec![0.0; bounded_rows];

    // Each row's own part of every output; without bounds their parts are empty.
    let mut bound_parts = out_bound.chunks_exact_mut(value_dim).zip(&mut lse_bound);
    let rows: Vec<_> = output
        .out
        .chunks_exact_mut(value_dim)
        .zip(&mut output.lse)
        .map(|(out, lse)| (out, lse, bound_parts.next()))
        .enumerate()
        .collect();
    let work = num_rows.saturating_mul(checked.seq_len).saturating_mul(head_dim.max(value_dim));
    for_each(rows, work, |keys, (row_idx, (out, lse, bounds))| {
        let (token, q_head) = (row_idx / num_q_heads, row_idx % num_q_heads);
        *lse = checked.attend(token, q_head, keys, out);
        if let Some((out_bound, lse_bound)) = bounds {
            let row = Row {
                q: checked.query_row(token, q_head),
                kv_head: q_head / checked.group_size,
                sink: checked.problem.options.sinks.as_ref().map(|sinks| f64::from(sinks[q_head])),
                keys,
                out,
                lse: *lse,
            };
            *lse_bound = bound::of_row(checked, &row, out_bound);
        }
    });
    let sound = |bound: &mut [f64], exact: &[f64]| {
        for (bound, exact) in bound.iter_mut().zip(exact) {
            // What is infinite or NaN is so in a kernel; where only the errors are, nothing is known.
            *bound = if !exact.is_finite() {
                0.0
            } else if bound.is_nan() {
                f64::INFINITY
            } else {
                *bound
            };
        }
    };
    sound(&mut out_bound, &output.out);
    sound(&mut lse_bound, &output.lse);
    BoundedOutput { output, out_bound, lse_bound }
}

/// Calls `each` for all items, on several threads if there is enough work; each thread has its own scratch.
fn for_each<T: Send>(items: Vec<T>, work: usize, each: impl Fn(&mut Vec<VisibleKey>, T) + Sync) {
    /// Multiply-adds below which starting a thread is not worth it.
    const THREAD_WORK: usize = 1 << 20;
    let cores = if cfg!(target_family = "wasm") {
        1
    } else {
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
    };
    let num_threads = cores.min(items.len()).min(work / THREAD_WORK);
    if num_threads <= 1 {
        let mut scratch = Vec::new();
        items.into_iter().for_each(|item| each(&mut scratch, item));
        return;
    }
    let queue = std::sync::Mutex::new(items.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..num_threads {
            scope.spawn(|| {
                let mut scratch = Vec::new();
                loop {
                    let item = queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
                    let Some(item) = item else { break };
                    each(&mut scratch, item);
                }
            });
        }
    });
}

#[cfg(test)]
mod tests;

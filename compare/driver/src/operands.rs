//! The same numbers for all, and what comes out of them.

use std::path::Path;

use anyhow::Result;
use compare_protocol::{Problem, write_f32};
use folio::{KvFormat, reference};

use crate::support::shape::Shape;

/// Half of the range of the random values.
const MAX_VALUE: f32 = 1.5;

/// Rows by token, sequence by sequence, and the oracle's result.
pub struct Operands {
    pub problem: Problem,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    expected: Vec<f64>,
}

impl Operands {
    /// Random values, written to files in `folder`. Those of K and V are representable in `format`, so that all contestants see the same ones.
    pub fn new(shape: &Shape, format: KvFormat, folder: &Path) -> Result<Self> {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut random = |elements: u32, format: KvFormat| -> Vec<f32> {
            let value = || (rng.f32() * 2.0 - 1.0) * MAX_VALUE;
            let values = std::iter::repeat_with(value).take(elements as usize);
            match format {
                KvFormat::F16 => values.map(|value| half::f16::from_f32(value).to_f32()).collect(),
                _ => values.collect(),
            }
        };
        let Shape { batch, query_len, seq_len, num_q_heads, num_kv_heads, head_dim, .. } = *shape;
        let q = random(batch * query_len * num_q_heads * head_dim, KvFormat::F32);
        let k = random(batch * seq_len * num_kv_heads * head_dim, format);
        let v = random(batch * seq_len * num_kv_heads * head_dim, format);
        let files = ["q", "k", "v"].map(|name| folder.join(name));
        for (file, values) in files.iter().zip([&q, &k, &v]) {
            write_f32(file, values)?;
        }
        let [q_file, k_file, v_file] = files;
        let problem = Problem {
            batch: batch as usize,
            query_len: query_len as usize,
            seq_len: seq_len as usize,
            num_q_heads: num_q_heads as usize,
            num_kv_heads: num_kv_heads as usize,
            head_dim: head_dim as usize,
            format: format.to_string().to_lowercase(),
            q: q_file,
            k: k_file,
            v: v_file,
        };
        let mut operands = Self { problem, q, k, v, expected: Vec::new() };
        operands.expected = operands.oracle()?;
        Ok(operands)
    }

    fn oracle(&self) -> Result<Vec<f64>> {
        let Problem { batch, num_q_heads, num_kv_heads, head_dim, .. } = self.problem;
        let mut out = Vec::with_capacity(self.q.len());
        let of_sequence =
            |values: &Vec<f32>, i: usize| values[i * values.len() / batch..][..values.len() / batch].to_vec();
        for i in 0..batch {
            let (q, k, v) = (of_sequence(&self.q, i), of_sequence(&self.k, i), of_sequence(&self.v, i));
            let options = reference::Options::default();
            let problem = reference::Problem { num_q_heads, num_kv_heads, head_dim, q: &q, k: &k, v: &v, options };
            out.extend(reference::attention(&problem)?.out);
        }
        Ok(out)
    }

    /// Elements of one side's rows of all sequences that hold the tokens `begin .. begin + len`, in the order of a step.
    pub fn rows(&self, side: &[f32], begin: usize, len: usize) -> Vec<f32> {
        let width = self.problem.num_kv_heads * self.problem.head_dim;
        side.chunks_exact(self.problem.seq_len * width)
            .flat_map(|rows| &rows[begin * width..][..len * width])
            .copied()
            .collect()
    }

    /// The largest distance from the oracle, infinite for another number of elements or a NaN.
    pub fn max_error(&self, got: &[f32]) -> f64 {
        if got.len() != self.expected.len() {
            return f64::INFINITY;
        }
        let errors = got.iter().zip(&self.expected).map(|(&got, &expected)| (f64::from(got) - expected).abs());
        errors.fold(0.0, |most, error| if error.is_nan() { f64::INFINITY } else { most.max(error) })
    }

    /// How far a result may be from the oracle's to be a result of the same computation. A weighted mean is at most as large as the largest value.
    /// F32: each of 8192 keys adds a rounding of 2^-24. F16: contestants also round queries, weights and results, and perhaps sums, to halves, each
    /// by 2^-11: eight of these. A wrong mask or a mixed-up head is off by the values themselves.
    pub fn tolerance(&self) -> f64 {
        let roundings = if self.problem.format == "f16" { 8.0 / 2048.0 } else { 8192.0 / 16_777_216.0 };
        f64::from(MAX_VALUE) * roundings
    }
}

//! burn on wgpu, for the comparison: its attention, which tunes itself, and matrix products. The query heads of a KV head are rows of one matrix, so
//! that nothing of the cache is copied.

use std::time::Instant;

use burn::tensor::activation::softmax;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, DType, Device, DeviceKind, Tensor, TensorData};
use compare_protocol::{Contestant, Problem, Result, read_f32, serve};

struct Loaded {
    problem: Problem,
    /// `[batch, num_q_heads, query_len, head_dim]`.
    q: Tensor<4>,
    /// `[batch, num_kv_heads, group_size * query_len, head_dim]`.
    q_rows: Tensor<4>,
    /// `[batch, num_kv_heads, seq_len, head_dim]`.
    k: Tensor<4>,
    v: Tensor<4>,
    /// True where a key is hidden, `[batch, num_kv_heads, group_size * query_len, seq_len]`.
    mask: Option<Tensor<4, Bool>>,
}

struct Burn {
    device: Device,
    loaded: Option<Loaded>,
}

const ATTENTION: &str = "attention, grouped";
const CAUSAL: &str = "attention, causal";
const PRODUCTS: &str = "matmul, grouped";

impl Contestant for Burn {
    fn about(&self) -> (String, String) {
        (format!("burn {}", env!("BURN_VERSION")), format!("{:?}", self.device))
    }

    fn load(&mut self, problem: &Problem) -> Result<Vec<String>> {
        self.loaded = None;
        let Problem { batch, query_len, seq_len, num_q_heads, num_kv_heads, head_dim, .. } = *problem;
        let dtype = match problem.format.as_str() {
            "f32" => DType::F32,
            "f16" => DType::F16,
            other => return Err(format!("burn has no {other}").into()),
        };
        let group_size = problem.group_size();
        let heads_first = |path, tokens, heads| -> Result<Tensor<4>> {
            let data = TensorData::new(read_f32(path)?, [batch, tokens, heads, head_dim]).convert_dtype(dtype);
            let tensor = Tensor::<4>::from_data(data, (&self.device, dtype)).swap_dims(1, 2);
            // A copy, not a view: the cache as burn would hold it.
            Ok(Tensor::from_data(tensor.into_data(), (&self.device, dtype)))
        };
        let q = heads_first(&problem.q, query_len, num_q_heads)?;
        let k = heads_first(&problem.k, seq_len, num_kv_heads)?;
        let v = heads_first(&problem.v, seq_len, num_kv_heads)?;
        let q_rows = q.clone().reshape([batch, num_kv_heads, group_size * query_len, head_dim]);
        let mask = (!problem.is_decode()).then(|| {
            let all = problem.hidden().repeat(batch * num_q_heads);
            let shape = [batch, num_kv_heads, group_size * query_len, seq_len];
            Tensor::<4, Bool>::from_data(TensorData::new(all, shape), &self.device)
        });
        self.loaded = Some(Loaded { problem: problem.clone(), q, q_rows, k, v, mask });
        self.device.sync()?;
        // Decode has nothing to hide, so that only the repetition would differ.
        let ways: &[&str] = if problem.is_decode() { &[ATTENTION, PRODUCTS] } else { &[ATTENTION, PRODUCTS, CAUSAL] };
        Ok(ways.iter().map(|&way| way.to_owned()).collect())
    }

    fn run(&mut self, way: &str, wants_output: bool) -> Result<(f64, Vec<f32>)> {
        let Some(loaded) = &self.loaded else { return Err("nothing is loaded".into()) };
        let start = Instant::now();
        let out = match way {
            ATTENTION => loaded.attention(),
            CAUSAL => loaded.causal(),
            _ => loaded.products(),
        };
        self.device.sync()?;
        let seconds = start.elapsed().as_secs_f64();
        let Problem { batch, query_len, num_q_heads, head_dim, .. } = loaded.problem;
        let values = if wants_output {
            // [batch, heads, tokens, head_dim] both, heads of a group side by side.
            let out = out.reshape([batch, num_q_heads, query_len, head_dim]).swap_dims(1, 2);
            out.into_data().convert_dtype(DType::F32).to_vec::<f32>().map_err(|error| format!("{error:?}"))?
        } else {
            Vec::new()
        };
        Ok((seconds, values))
    }
}

impl Loaded {
    fn attention(&self) -> Tensor<4> {
        let Self { q_rows, k, v, mask, .. } = self.clone_operands();
        attention(q_rows, k, v, mask, None, AttentionModuleOptions::default())
    }

    /// With burn's own mask, and K and V repeated for every query head as part of the call: its attention has no heads that share.
    fn causal(&self) -> Tensor<4> {
        let Self { problem, q, k, v, .. } = self.clone_operands();
        let Problem { batch, seq_len, num_q_heads, num_kv_heads, head_dim, .. } = problem;
        let per_query_head = |x: Tensor<4>| {
            let x = x.reshape([batch, num_kv_heads, 1, seq_len, head_dim]);
            let x = x.expand([batch, num_kv_heads, problem.group_size(), seq_len, head_dim]);
            x.reshape([batch, num_q_heads, seq_len, head_dim])
        };
        let (k, v) = if problem.group_size() == 1 { (k, v) } else { (per_query_head(k), per_query_head(v)) };
        attention(q, k, v, None, None, AttentionModuleOptions { is_causal: true, ..Default::default() })
    }

    fn products(&self) -> Tensor<4> {
        let Self { q_rows, k, v, mask, .. } = self.clone_operands();
        let scores = q_rows.matmul(k.swap_dims(2, 3)) * (1.0 / (self.problem.head_dim as f64).sqrt());
        let scores = match mask {
            Some(mask) => scores.mask_fill(mask, f32::NEG_INFINITY),
            None => scores,
        };
        softmax(scores, 3).matmul(v)
    }

    /// Handles to the same memory: burn's calls consume them.
    fn clone_operands(&self) -> Self {
        let Self { problem, q, q_rows, k, v, mask } = self;
        Self {
            problem: problem.clone(),
            q: q.clone(),
            q_rows: q_rows.clone(),
            k: k.clone(),
            v: v.clone(),
            mask: mask.clone(),
        }
    }
}

fn main() -> Result<()> {
    serve(&mut Burn { device: Device::wgpu(DeviceKind::DefaultDevice), loaded: None })
}

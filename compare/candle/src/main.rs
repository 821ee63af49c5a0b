//! candle on the CPU, for the comparison: its flash attention, and matrix products with the query heads of a KV head as rows of one matrix.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use compare_protocol::{Contestant, Problem, Result, read_f32, serve};

struct Loaded {
    problem: Problem,
    /// `[batch, query_len, num_q_heads, head_dim]`, as flash attention wants it.
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// `[batch, num_kv_heads, group_size * query_len, head_dim]`.
    q_rows: Tensor,
    /// `[batch, num_kv_heads, seq_len, head_dim]`.
    k_heads: Tensor,
    v_heads: Tensor,
    /// What is added to scores, `[group_size * query_len, seq_len]`.
    mask: Option<Tensor>,
}

struct Candle {
    loaded: Option<Loaded>,
}

const FLASH: &str = "flash_attn";
const PRODUCTS: &str = "matmul, grouped";

impl Contestant for Candle {
    fn about(&self) -> (String, String) {
        (
            format!("candle {}", env!("CANDLE_VERSION")),
            format!("CPU, {} threads", candle_core::utils::get_num_threads()),
        )
    }

    fn load(&mut self, problem: &Problem) -> Result<Vec<String>> {
        self.loaded = None;
        let Problem { batch, query_len, seq_len, num_q_heads, num_kv_heads, head_dim, .. } = *problem;
        let dtype = match problem.format.as_str() {
            "f32" => DType::F32,
            "f16" => DType::F16,
            other => return Err(format!("candle has no {other}").into()),
        };
        let group_size = problem.group_size();
        let tensor = |path, shape: (usize, usize, usize, usize)| -> Result<Tensor> {
            Ok(Tensor::from_vec(read_f32(path)?, shape, &Device::Cpu)?.to_dtype(dtype)?)
        };
        let q = tensor(&problem.q, (batch, query_len, num_q_heads, head_dim))?;
        let k = tensor(&problem.k, (batch, seq_len, num_kv_heads, head_dim))?;
        let v = tensor(&problem.v, (batch, seq_len, num_kv_heads, head_dim))?;
        let heads_first = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let q_rows = heads_first(&q)?.reshape((batch, num_kv_heads, group_size * query_len, head_dim))?;
        let (k_heads, v_heads) = (heads_first(&k)?, heads_first(&v)?);
        let mask = if problem.is_decode() {
            None
        } else {
            let row: Vec<f32> =
                problem.hidden().iter().map(|&hidden| if hidden { f32::NEG_INFINITY } else { 0.0 }).collect();
            let mask = Tensor::from_vec(row, (query_len, seq_len), &Device::Cpu)?.to_dtype(dtype)?;
            Some(mask.repeat((group_size, 1))?)
        };
        self.loaded = Some(Loaded { problem: problem.clone(), q, k, v, q_rows, k_heads, v_heads, mask });
        Ok(vec![FLASH.into(), PRODUCTS.into()])
    }

    fn run(&mut self, way: &str, wants_output: bool) -> Result<(f64, Vec<f32>)> {
        let Some(loaded) = &self.loaded else { return Err("nothing is loaded".into()) };
        let start = Instant::now();
        let out = if way == FLASH { loaded.flash()? } else { loaded.products()? };
        let seconds = start.elapsed().as_secs_f64();
        let Problem { batch, query_len, num_q_heads, head_dim, .. } = loaded.problem;
        let values = if wants_output {
            // [batch, heads, tokens, head_dim] both, heads of a group side by side.
            let out = out.reshape((batch, num_q_heads, query_len, head_dim))?.transpose(1, 2)?;
            out.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?
        } else {
            Vec::new()
        };
        Ok((seconds, values))
    }
}

impl Loaded {
    fn scale(&self) -> f64 {
        1.0 / (self.problem.head_dim as f64).sqrt()
    }

    fn flash(&self) -> candle_core::Result<Tensor> {
        let kv_offset = self.problem.seq_len - self.problem.query_len;
        let mask = if self.problem.is_decode() { AttnMask::None } else { AttnMask::causal_with_offset(kv_offset) };
        let Self { q, k, v, .. } = self;
        match q.dtype() {
            DType::F16 => flash_attn::<half::f16>(q, k, v, self.scale() as f32, mask, None, None),
            _ => flash_attn::<f32>(q, k, v, self.scale() as f32, mask, None, None),
        }
    }

    fn products(&self) -> candle_core::Result<Tensor> {
        let scores = (self.q_rows.matmul(&self.k_heads.t()?)? * self.scale())?;
        let scores = match &self.mask {
            Some(mask) => scores.broadcast_add(mask)?,
            None => scores,
        };
        candle_nn::ops::softmax_last_dim(&scores)?.matmul(&self.v_heads)
    }
}

fn main() -> Result<()> {
    serve(&mut Candle { loaded: None })
}

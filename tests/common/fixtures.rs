//! Attention cases computed by PyTorch; `tests/fixtures/make_attention.py` makes them and says how.

use folio::reference::{Options, Problem};
use safetensors::{Dtype, SafeTensors};

static FILE: &[u8] = include_bytes!("../fixtures/attention.safetensors");

/// One sequence, what is done to it, and what PyTorch computed in f64.
#[derive(Clone, Debug)]
pub(crate) struct FixtureCase {
    pub(crate) name: String,
    pub(crate) query_len: usize,
    pub(crate) seq_len: usize,
    pub(crate) num_q_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    /// `[query_len, num_q_heads, head_dim]`.
    pub(crate) q: Vec<f32>,
    /// `[seq_len, num_kv_heads, head_dim]`.
    pub(crate) k: Vec<f32>,
    /// `[seq_len, num_kv_heads, head_dim]`.
    pub(crate) v: Vec<f32>,
    /// `[query_len, num_q_heads, head_dim]`.
    pub(crate) out: Vec<f64>,
    /// `[query_len, num_q_heads]`; negative infinity for empty rows.
    pub(crate) lse: Vec<f64>,
    pub(crate) options: Options,
}

impl FixtureCase {
    /// The same case for the oracle.
    pub(crate) fn problem(&self) -> Problem<'_> {
        Problem {
            num_q_heads: self.num_q_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            value_dim: self.head_dim,
            q: &self.q,
            k: &self.k,
            v: &self.v,
            options: self.options.clone(),
        }
    }
}

/// All cases.
pub(crate) fn load() -> Vec<FixtureCase> {
    let (_, metadata) = SafeTensors::read_metadata(FILE).expect("a safetensors file");
    let cases = &metadata.metadata().as_ref().expect("metadata")["cases"];
    let cases: Vec<serde_json::Value> = serde_json::from_str(cases).expect("a JSON list of cases");
    let tensors = SafeTensors::deserialize(FILE).expect("a safetensors file");
    cases.iter().map(|case| load_case(&tensors, case)).collect()
}

fn load_case(tensors: &SafeTensors<'_>, case: &serde_json::Value) -> FixtureCase {
    let name = case["name"].as_str().expect("a name");
    let shape = |part: &str| {
        let tensor = tensors.tensor(&format!("{name}.{part}")).expect("a tensor");
        <[usize; 3]>::try_from(tensor.shape()).expect("three dimensions")
    };
    let [query_len, num_q_heads, head_dim] = shape("q");
    let [seq_len, num_kv_heads, _] = shape("k");
    let f32s = |part: &str| words(tensors, name, part, Dtype::F32, f32::from_le_bytes);
    let f64s = |part: &str| words(tensors, name, part, Dtype::F64, f64::from_le_bytes).expect("a tensor");
    let mut options = Options::default();
    options.causal = case["causal"].as_bool().expect("causal");
    options.softmax_scale = case["softmax_scale"].as_f64();
    options.softcap = case["softcap"].as_f64();
    options.window = case["window"].as_u64().map(|window| u32::try_from(window).expect("a window"));
    options.alibi_slopes = f32s("alibi_slopes");
    options.sinks = f32s("sinks");
    options.mask = words(tensors, name, "mask", Dtype::U32, u32::from_le_bytes);
    FixtureCase {
        name: name.to_owned(),
        query_len,
        seq_len,
        num_q_heads,
        num_kv_heads,
        head_dim,
        q: f32s("q").expect("a tensor"),
        k: f32s("k").expect("a tensor"),
        v: f32s("v").expect("a tensor"),
        out: f64s("out"),
        lse: f64s("lse"),
        options,
    }
}

/// The elements of a tensor, if it is there.
fn words<T, const N: usize>(
    tensors: &SafeTensors<'_>,
    name: &str,
    part: &str,
    dtype: Dtype,
    from_le_bytes: fn([u8; N]) -> T,
) -> Option<Vec<T>> {
    let tensor = tensors.tensor(&format!("{name}.{part}")).ok()?;
    assert_eq!(tensor.dtype(), dtype, "{name}.{part}");
    let (chunks, rest) = tensor.data().as_chunks::<N>();
    assert!(rest.is_empty(), "{name}.{part}");
    Some(chunks.iter().map(|&chunk| from_le_bytes(chunk)).collect())
}

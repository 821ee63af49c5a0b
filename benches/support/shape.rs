//! Shapes of attention that are measured: decode (D), prefill (P).

use folio::KvFormat;

/// A batch of equal sequences.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) id: &'static str,
    pub(crate) batch: u32,
    /// New tokens of a sequence: 1 is decode.
    pub(crate) query_len: u32,
    /// Keys of a sequence, those of the new tokens included.
    pub(crate) seq_len: u32,
    pub(crate) num_q_heads: u32,
    pub(crate) num_kv_heads: u32,
    pub(crate) head_dim: u32,
}

pub(crate) const SHAPES: [Shape; 6] = [
    Shape { id: "D1", batch: 8, query_len: 1, seq_len: 2048, num_q_heads: 32, num_kv_heads: 8, head_dim: 128 },
    Shape { id: "D2", batch: 1, query_len: 1, seq_len: 8192, num_q_heads: 32, num_kv_heads: 8, head_dim: 128 },
    // Shapes for which ONNX Runtime (O1) and ggml (G1) publish figures.
    Shape { id: "O1", batch: 2, query_len: 1, seq_len: 2048, num_q_heads: 32, num_kv_heads: 4, head_dim: 128 },
    Shape { id: "G1", batch: 1, query_len: 1, seq_len: 7680, num_q_heads: 64, num_kv_heads: 8, head_dim: 64 },
    Shape { id: "P1", batch: 1, query_len: 1024, seq_len: 1024, num_q_heads: 16, num_kv_heads: 16, head_dim: 64 },
    Shape { id: "P2", batch: 1, query_len: 512, seq_len: 2048, num_q_heads: 32, num_kv_heads: 8, head_dim: 128 },
];

/// Texts behind 2048 common tokens: grouped heads of two sizes, few texts, heads without groups.
pub(crate) const COMMON: [Shape; 4] = [
    Shape { id: "C1", batch: 16, query_len: 1, seq_len: 2176, num_q_heads: 32, num_kv_heads: 8, head_dim: 128 },
    Shape { id: "C2", batch: 16, query_len: 1, seq_len: 2176, num_q_heads: 32, num_kv_heads: 8, head_dim: 64 },
    Shape { id: "C3", batch: 4, query_len: 1, seq_len: 2176, num_q_heads: 32, num_kv_heads: 8, head_dim: 64 },
    Shape { id: "C4", batch: 16, query_len: 1, seq_len: 2176, num_q_heads: 16, num_kv_heads: 16, head_dim: 64 },
];

impl Shape {
    pub(crate) fn is_decode(&self) -> bool {
        self.query_len == 1
    }

    /// Bytes of all keys, which are also those of all values.
    pub(crate) fn side_bytes(&self, format: KvFormat) -> u64 {
        let elements = u64::from(self.batch * self.seq_len) * u64::from(self.num_kv_heads * self.head_dim);
        elements * u64::from(format.element_bits()) / 8
    }

    /// Two multiply-adds per visible (query, key) pair, head and element.
    pub(crate) fn flop(&self) -> u64 {
        let (queries, keys) = (u64::from(self.query_len), u64::from(self.seq_len));
        let pairs = queries * (keys - queries) + queries * (queries + 1) / 2;
        u64::from(self.batch) * pairs * u64::from(self.num_q_heads) * u64::from(self.head_dim) * 4
    }

    /// What decode is bound by, or prefill: bytes, or floating-point operations.
    pub(crate) fn work(&self, format: KvFormat) -> u64 {
        if self.is_decode() { 2 * self.side_bytes(format) } else { self.flop() }
    }

    /// Query lengths of the steps that bring the context, the same for all sequences.
    pub(crate) fn context_steps(&self) -> impl Iterator<Item = u32> {
        let context_len = self.seq_len - self.query_len;
        (0..context_len).step_by(256).map(move |begin| 256.min(context_len - begin))
    }

    pub(crate) fn describe(&self) -> String {
        let Self { id, batch, query_len, seq_len, num_q_heads, num_kv_heads, head_dim } = self;
        let batch = if *batch == 1 { String::new() } else { format!("{batch} x ") };
        format!("{id}  {batch}{query_len} over {seq_len}, {num_q_heads}/{num_kv_heads} heads, d {head_dim}")
    }
}

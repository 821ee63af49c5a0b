//! The contiguous cache: attention against the oracle and against the paged cache, where its bytes lie, and what it refuses.

use fastrand::Rng;
use folio::KvFormat::{E4M3, F16, F32, Int4, Int4PerChannel, Int8};
use folio::wgpu;
use folio::{
    Attention, ContiguousCache, ContiguousConfig, ErrorKind, Gpu, KvCache, KvFormat, KvRows, Rope, RopeConfig, Step,
};

use crate::adapter::{self, ALL, CPU, DEFAULT, GPU};
use crate::bad_input::refused;
use crate::case::{Case, Rows, poison_buffers, upload};
use crate::tokens::{self, SHAPE};

use ErrorKind::{Caller, Device, Retry};

/// Each format on either side.
const FORMATS: [(KvFormat, KvFormat); 7] =
    [(F32, F32), (F16, F16), (F32, F16), (F16, F32), (Int8, Int8), (Int4PerChannel, Int4), (E4M3, Int8)];

/// A cache of a row for each sequence of the case, and its attention.
struct Contiguous {
    cache: ContiguousCache,
    attention: Attention,
}

/// A cache of which every byte is NaN.
fn poisoned(gpu: &Gpu, config: ContiguousConfig) -> ContiguousCache {
    let cache = ContiguousCache::new_blocking(gpu, config).expect("cache");
    for layer in 0..config.num_layers {
        let (k, v) = cache.layer_buffers(layer).expect("layer");
        poison_buffers(gpu, k.iter().chain(v));
    }
    cache
}

impl Contiguous {
    fn new(gpu: &Gpu, case: &Case, max_seq_len: u32) -> Self {
        let config = ContiguousConfig {
            num_layers: 1,
            batch: case.lens.len() as u32,
            num_kv_heads: case.num_kv_heads,
            head_dim: case.head_dim,
            max_seq_len,
            k_format: case.k_format,
            v_format: case.v_format,
        };
        let cache = poisoned(gpu, config);
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        Self { cache, attention }
    }

    /// Appends the context of each row in two steps.
    fn fill(&self, case: &Case, rows: &[Rows]) {
        if let Some(channels) = case.channels(rows) {
            self.cache.set_key_scales(0, &channels).expect("scales");
        }
        let row_len = (case.num_kv_heads * case.head_dim) as usize;
        for part in 0..2 {
            let ranges = case.lens.iter().map(|&(context_len, _)| {
                let half = context_len / 2;
                if part == 0 { 0..half } else { half..context_len }
            });
            // From the last row to the first.
            let parts: Vec<_> = (0..).zip(rows).zip(ranges).filter(|(_, range)| !range.is_empty()).collect();
            let (mut batch, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
            for ((row, rows), range) in parts.into_iter().rev() {
                batch.push((row, range.end - range.start));
                let range = range.start as usize * row_len..range.end as usize * row_len;
                k.extend_from_slice(&rows.k[range.clone()]);
                v.extend_from_slice(&rows.v[range]);
            }
            if !batch.is_empty() {
                append(&self.cache, &batch, 0, &k, &v);
            }
        }
    }

    /// The case's step, all rows in order.
    fn attend(&self, case: &Case, rows: &[Rows]) -> (Vec<f32>, Option<Vec<f32>>) {
        let batch: Vec<_> = (0..).zip(case.lens.iter().map(|l| l.1)).collect();
        let step = self.cache.begin_step(&batch).expect("step");
        let results = case.attend_step(self.cache.gpu(), &self.attention, &step, 0, rows, |pass, k, v| {
            self.cache.append(pass, &step, 0, k, v).expect("append");
        });
        self.cache.commit(step).expect("commit").recycle();
        results
    }
}

fn append(cache: &ContiguousCache, batch: &[(u32, u32)], layer: u32, k: &[f32], v: &[f32]) {
    let step = cache.begin_step(batch).expect("step");
    submit_append(cache, &step, layer, k, v);
    cache.commit(step).expect("commit").recycle();
}

fn submit_append(cache: &ContiguousCache, step: &Step, layer: u32, k: &[f32], v: &[f32]) {
    let gpu = cache.gpu();
    let (k, v) = (upload(gpu, k), upload(gpu, v));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    cache.append(&mut encoder, step, layer, &k, &v).expect("append");
    gpu.queue().submit([encoder.finish()]);
}

#[track_caller]
fn check(gpu: &Gpu, case: &Case, max_seq_len: u32) {
    let rows = case.rows();
    let contiguous = Contiguous::new(gpu, case, max_seq_len);
    contiguous.fill(case, &rows);
    let (out, lse) = contiguous.attend(case, &rows);
    case.compare(gpu, &rows, &out, lse.as_deref());
}

/// Decode, prefill and both beside each other; empty rows, full rows, and a last key beside the end.
const LENS: [(u32, u32); 7] = [(99, 1), (0, 1), (50, 1), (7, 16), (60, 40), (0, 33), (98, 1)];

#[test]
fn ragged_batches_in_every_family_and_format() {
    for (i, how) in ALL.into_iter().enumerate() {
        let Some(gpu) = adapter::open(how) else { return };
        // Every format in some family of each profile.
        for (j, &(k_format, v_format)) in FORMATS.iter().skip(i).step_by(2).enumerate() {
            // 103 divides into no tile, 100 into some.
            let max_seq_len = [100, 103][(i + j) % 2];
            let case = Case::new(&LENS, 8, 2, 64).formats(k_format, v_format).named(format!("{how:?}, {max_seq_len}"));
            check(&gpu, &case.config(|config| config.lse = true), max_seq_len);
        }
    }
}

#[test]
fn groups_and_head_dims() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        for (num_q_heads, num_kv_heads, head_dim) in [(3, 3, 40), (7, 1, 128), (16, 1, 32)] {
            let case = Case::new(&LENS, num_q_heads, num_kv_heads, head_dim).formats(F16, F16);
            check(&gpu, &case.named(format!("{how:?}")), 100);
        }
    }
}

/// Long rows are split and merged, short ones beside them are not.
#[test]
fn long_rows() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&[(4999, 1), (3, 1), (4000, 9), (0, 300)], 4, 2, 32).formats(F16, F16);
        check(&gpu, &case.named(format!("{how:?}")), 5000);
    }
}

#[test]
fn one_token_per_row() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    check(&gpu, &Case::new(&[(0, 1), (0, 1)], 4, 2, 32), 1);
}

/// Masks, windows, bias and the rest come with the call.
#[test]
fn options_of_the_call() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&LENS, 4, 2, 32).formats(F32, F16).config(|config| {
            config.window = Some(37);
            config.softcap = Some(30.0);
            config.alibi_slopes = Some(vec![0.5, 0.25, 0.125, 0.0625]);
            config.sinks = Some(vec![0.0, 1.0, -1.0, 2.0]);
            config.custom_mask = true;
            config.lse = true;
        });
        check(&gpu, &case.named(format!("{how:?}")), 100);
    }
}

#[test]
fn results_are_those_of_the_paged_cache_bit_for_bit() {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for (i, how) in [CPU, GPU, CPU, GPU].into_iter().enumerate() {
        let Some(gpu) = adapter::open(how) else { return };
        let (k_format, v_format) = FORMATS[i];
        let lens = [&LENS[..], &[(4990, 1), (4000, 9)]].concat();
        let case = Case::new(&lens, 8, 2, 32).formats(k_format, v_format).config(|config| {
            config.deterministic = i >= 2;
            config.lse = true;
        });
        let rows = case.rows();
        let contiguous = Contiguous::new(&gpu, &case, 5001);
        contiguous.fill(&case, &rows);
        let got = contiguous.attend(&case, &rows);
        let want = case.run(&gpu, &rows);
        assert!(bits(&got.0) == bits(&want.0), "out: {how:?}, {k_format}, {v_format}");
        assert_eq!(got.1.as_deref().map(bits), want.1.as_deref().map(bits), "lse: {how:?}, {k_format}, {v_format}");
        assert_eq!(bits(&got.0), bits(&again(&contiguous, &case, &rows)), "a second time: {how:?}");
    }
}

/// The case's step once more.
fn again(contiguous: &Contiguous, case: &Case, rows: &[Rows]) -> Vec<f32> {
    for (row, &(context_len, _)) in (0..).zip(&case.lens) {
        contiguous.cache.truncate(row, context_len).expect("truncate");
    }
    contiguous.attend(case, rows).0
}

#[test]
fn rotary_embedding_works_as_in_the_paged_cache() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let config = RopeConfig::new(SHAPE.head_dim, 10_000.0);
    let paged = KvCache::new_blocking(&gpu, SHAPE).expect("cache");
    let contiguous = ContiguousCache::new_blocking(&gpu, SMALL).expect("cache");
    let rows = tokens::rows(&SHAPE, 0, &[1, 2, 3, 4, 5]);
    let (k, v) = (upload(&gpu, &rows.k), upload(&gpu, &rows.v));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());

    let sequence = paged.create_sequence();
    let paged_step = paged.begin_step_with_positions(&[(sequence, 5)], &[7, 1, 2, 9, 4]).expect("step");
    let rope = Rope::new_blocking(&paged, config.clone()).expect("rope");
    paged.append_with_rope(&mut encoder, &paged_step, 0, &k, &v, &rope).expect("append");

    let step = contiguous.begin_step_with_positions(&[(1, 5)], &[7, 1, 2, 9, 4]).expect("step");
    let error = contiguous.append_with_rope(&mut encoder, &step, 0, &k, &v, &rope);
    refused(error, Caller, &["rope", "made for a cache like this"]);
    let rope = Rope::new_blocking(&contiguous, config).expect("rope");
    contiguous.append_with_rope(&mut encoder, &step, 0, &k, &v, &rope).expect("append");

    gpu.queue().submit([encoder.finish()]);
    paged.commit(paged_step).expect("commit");
    contiguous.commit(step).expect("commit");
    let want = paged.gather_blocking(sequence, 0).expect("gather");
    assert!(want.k != rows.k, "nothing has been turned");
    assert_eq!(contiguous.gather_blocking(1, 0).expect("gather"), want);
}

/// The shape of [`SHAPE`], in rows of 7 tokens. Both formats hold its tokens exactly.
const SMALL: ContiguousConfig = ContiguousConfig {
    num_layers: SHAPE.num_layers,
    batch: 3,
    num_kv_heads: SHAPE.num_kv_heads,
    head_dim: SHAPE.head_dim,
    max_seq_len: 7,
    k_format: SHAPE.k_format,
    v_format: SHAPE.v_format,
};

/// `[batch, num_kv_heads, max_seq_len, head_dim]` with NaN wherever no token is.
fn layout(tokens: &[Vec<u32>], layer: u32, side: fn(KvRows) -> Vec<f32>) -> Vec<f32> {
    let (heads, len, dims) = (SMALL.num_kv_heads as usize, SMALL.max_seq_len as usize, SMALL.head_dim as usize);
    let mut all = vec![f32::NAN; SMALL.batch as usize * heads * len * dims];
    for (row, tokens) in tokens.iter().enumerate() {
        let rows = side(tokens::rows(&SHAPE, layer, tokens));
        for (i, element) in rows.into_iter().enumerate() {
            let (token, head, dim) = (i / dims / heads, i / dims % heads, i % dims);
            all[((row * heads + head) * len + token) * dims + dim] = element;
        }
    }
    all
}

/// Compares every byte of the buffers with what the tokens say. Bytes that were never written are NaN in both formats.
#[track_caller]
fn assert_bytes(cache: &ContiguousCache, tokens: &[Vec<u32>]) {
    for layer in 0..SMALL.num_layers {
        let (k, v) = cache.layer_buffers(layer).expect("layer");
        let (k, v) = (cache.gpu().read_blocking(&k[0]).expect("k"), cache.gpu().read_blocking(&v[0]).expect("v"));
        let k: Vec<u32> = k.iter().map(|x| x.to_bits()).collect();
        let v: Vec<u16> = v.iter().flat_map(|x| [x.to_bits() as u16, (x.to_bits() >> 16) as u16]).collect();
        let want_k = layout(tokens, layer, |rows| rows.k);
        let want_k: Vec<_> = want_k.into_iter().map(|x| if x.is_nan() { !0 } else { x.to_bits() }).collect();
        let want_v = layout(tokens, layer, |rows| rows.v);
        let f16 = |x| if f32::is_nan(x) { !0 } else { half::f16::from_f32(x).to_bits() };
        let want_v: Vec<_> = want_v.into_iter().map(f16).collect();
        assert!(k == want_k && v == want_v, "layer {layer}: {tokens:?}");
    }
}

/// Appends tokens in every layer, and submits.
fn run(cache: &ContiguousCache, step: &Step, tokens: &[u32]) {
    for layer in 0..SMALL.num_layers {
        let rows = tokens::rows(&SHAPE, layer, tokens);
        submit_append(cache, step, layer, &rows.k, &rows.v);
    }
}

fn grow(cache: &ContiguousCache, batch: &[(u32, &[u32])]) {
    let lens: Vec<_> = batch.iter().map(|&(row, tokens)| (row, tokens.len() as u32)).collect();
    let step = cache.begin_step(&lens).expect("step");
    run(cache, &step, &batch.iter().flat_map(|&(_, tokens)| tokens).copied().collect::<Vec<_>>());
    assert_eq!(step.num_copies(), 0);
    cache.commit(step).expect("commit").recycle();
}

#[test]
fn a_side_is_rows_of_heads_of_tokens() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = poisoned(&gpu, SMALL);
    // Rows begin in another order than that of the blocks, and begin again in yet another.
    grow(&cache, &[(2, &[1, 2, 3])]);
    grow(&cache, &[(1, &[10]), (0, &[20, 21, 22, 23, 24, 25, 26])]);
    assert_bytes(&cache, &[vec![20, 21, 22, 23, 24, 25, 26], vec![10], vec![1, 2, 3]]);
    for row in [1, 0, 2] {
        cache.reset(row).expect("reset");
        assert!(cache.is_empty(row).expect("row"));
    }
    grow(&cache, &[(1, &[11, 12]), (2, &[4, 5, 6])]);
    assert_bytes(&cache, &[vec![20, 21, 22, 23, 24, 25, 26], vec![11, 12], vec![4, 5, 6]]);
}

#[test]
fn random_operations_agree_with_plain_vectors() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = poisoned(&gpu, SMALL);
    let mut rng = Rng::with_seed(5);
    let mut model: Vec<Vec<u32>> = vec![Vec::new(); SMALL.batch as usize];
    let mut next = 0;
    for _ in 0..300 {
        let row = rng.u32(0..SMALL.batch);
        let tokens = &mut model[row as usize];
        match rng.u32(0..10) {
            0 => {
                cache.reset(row).expect("reset");
                tokens.clear();
            }
            1 | 2 => {
                tokens.truncate(rng.usize(0..=tokens.len()));
                cache.truncate(row, tokens.len() as u32).expect("truncate");
            }
            fate => {
                let mut rows: Vec<u32> = (0..SMALL.batch).collect();
                rng.shuffle(&mut rows);
                let mut batch = Vec::new();
                for &row in &rows[rng.usize(0..rows.len())..] {
                    let room = SMALL.max_seq_len as usize - model[row as usize].len();
                    let count = rng.u32(1..4).min(room as u32);
                    if count > 0 {
                        batch.push((row, (next..next + count).collect::<Vec<u32>>()));
                        next += count;
                    }
                }
                let lens: Vec<_> = batch.iter().map(|(row, tokens)| (*row, tokens.len() as u32)).collect();
                if lens.is_empty() {
                    refused(cache.begin_step(&lens), Caller, &["batch", "at least one"]);
                    continue;
                }
                let step = cache.begin_step(&lens).expect("step");
                run(&cache, &step, &batch.iter().flat_map(|(_, tokens)| tokens).copied().collect::<Vec<_>>());
                // The commands ran, but a dropped step leaves nothing behind.
                if fate > 3 {
                    cache.commit(step).expect("commit").recycle();
                    for (row, tokens) in batch {
                        model[row as usize].extend(tokens);
                    }
                }
            }
        }
        for (row, tokens) in (0..).zip(&model) {
            assert_eq!(cache.len(row).expect("row"), tokens.len() as u32);
        }
    }
    for (row, tokens) in (0..).zip(&model) {
        for layer in 0..SMALL.num_layers {
            assert_eq!(cache.gather_blocking(row, layer).expect("gather"), tokens::rows(&SHAPE, layer, tokens));
        }
    }
}

#[test]
fn memory_is_taken_from_the_beginning() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = ContiguousCache::new_blocking(&gpu, SMALL).expect("cache");
    grow(&cache, &[(1, &[1, 2, 3]), (2, &[4, 5, 6, 7, 8, 9, 10])]);
    let memory = cache.memory();
    // 2 layers, 2 heads, 8 dims of 4 + 2 bytes.
    let token = 2 * 2 * 8 * (4 + 2);
    assert_eq!((memory.allocated_bytes(), memory.used_bytes()), (3 * 7 * token, 3 * 7 * token));
    assert_eq!((memory.cached_tokens, memory.wasted_bytes(), memory.shared_bytes()), (10, 11 * token, 0));
    let lens: Vec<_> = memory.sequences.iter().map(|s| (s.len, s.blocks, s.wasted_bytes)).collect();
    assert_eq!(lens, [(0, 1, 7 * token), (3, 1, 4 * token), (7, 1, 0)]);
}

#[test]
fn misuse_is_refused_and_changes_nothing() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = poisoned(&gpu, SMALL);
    grow(&cache, &[(0, &[1, 2, 3, 4, 5]), (1, &[6])]);
    let attention = Attention::new_blocking(&cache, folio::AttentionConfig::new(4)).expect("attention");

    refused(cache.begin_step(&[]), Caller, &["batch: got no sequences"]);
    refused(cache.begin_step(&[(0, 1), (3, 1)]), Caller, &["row: got 3, need below batch, 3"]);
    refused(cache.begin_step(&[(u32::MAX, 1)]), Caller, &["row: got 4294967295"]);
    refused(cache.begin_step(&[(1, 1), (0, 1), (1, 1)]), Caller, &["batch: got row 1 twice, need each row once"]);
    refused(cache.begin_step(&[(0, 1), (2, 0)]), Caller, &["query_len: got 0 for row 2, need at least 1"]);
    refused(cache.begin_step(&[(1, 1), (0, 3)]), Retry, &["row 0: need 8 tokens, have max_seq_len, 7"]);
    refused(cache.begin_step(&[(2, 8)]), Retry, &["row 2: need 8 tokens"]);
    refused(cache.begin_step(&[(0, u32::MAX)]), Retry, &["row 0: need 4294967300 tokens"]);
    refused(cache.begin_step_with_positions(&[(0, 2)], &[1]), Caller, &["positions: got 1 positions"]);
    refused(cache.truncate(0, 6), Caller, &["len: got 6, need at most the row's length, 5"]);
    refused(cache.truncate(3, 0), Caller, &["row: got 3"]);
    refused(cache.reset(3), Caller, &["row: got 3"]);
    refused(cache.len(3), Caller, &["row: got 3"]);
    refused(cache.gather_blocking(3, 0), Caller, &["row: got 3"]);
    refused(cache.gather_blocking(0, 2), Caller, &["layer: got 2"]);
    refused(cache.layer_buffers(2), Caller, &["layer: got 2"]);

    let step = cache.begin_step(&[(1, 1)]).expect("step");
    refused(cache.begin_step(&[(0, 1), (1, 1)]), Caller, &["row: got row 1, in an open step"]);
    refused(cache.truncate(1, 0), Caller, &["row: got row 1, in an open step"]);
    drop(step);

    let other = ContiguousCache::new_blocking(&gpu, SMALL).expect("cache");
    let foreign = other.begin_step(&[(0, 1)]).expect("step");
    let rows = upload(&gpu, &[0.0; 16]);
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    refused(cache.append(&mut encoder, &foreign, 0, &rows, &rows), Caller, &["it belongs to another cache"]);
    refused(cache.commit(foreign), Caller, &["it belongs to another cache"]);
    assert_eq!(other.len(0).expect("row"), 0);

    let longer = ContiguousConfig { max_seq_len: 8, ..SMALL };
    let longer = ContiguousCache::new_blocking(&gpu, longer).expect("cache");
    let step = longer.begin_step(&[(0, 1)]).expect("step");
    refused(attention.plan(&step), Caller, &["step: got a step of"]);

    assert_eq!([0, 1, 2].map(|row| cache.len(row).expect("row")), [5, 1, 0]);
    // What has been left in order is still of use.
    grow(&cache, &[(0, &[20, 21]), (1, &[22])]);
    assert_bytes(&cache, &[vec![1, 2, 3, 4, 5, 20, 21], vec![6, 22], vec![]]);
}

#[test]
fn rows_that_fit_into_no_binding_are_refused() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let token_bytes = 256 * 4;
    let most = gpu.device().limits().max_storage_buffer_binding_size / token_bytes;
    let config = ContiguousConfig {
        num_layers: 1,
        batch: 1,
        num_kv_heads: 1,
        head_dim: 256,
        max_seq_len: u32::try_from(most + 1).expect("tokens"),
        k_format: F32,
        v_format: F32,
    };
    let cache = ContiguousCache::new_blocking(&gpu, config);
    refused(cache, Device, &["batch * max_seq_len: need", "bytes", "shorter rows"]);
}

//! The contiguous cache: attention against the oracle and against the paged cache, where its bytes lie, and what it refuses.

use fastrand::Rng;
use folio::KvFormat::{E4M3, F16, F32, Int4, Int4PerChannel, Int8};
use folio::wgpu;
use folio::{Attention, ErrorKind, Gpu, KvCache, KvCacheConfig, KvFormat, KvRows, Rope, RopeConfig, SequenceId, Step};

use crate::adapter::{self, ALL, CPU, DEFAULT, GPU};
use crate::bad_input::refused;
use crate::case::{Case, Rows, poison_buffers, upload};
use crate::tokens::{self, SHAPE};

use ErrorKind::{Caller, Device, Retry};

/// Each format on either side.
const FORMATS: [(KvFormat, KvFormat); 7] =
    [(F32, F32), (F16, F16), (F32, F16), (F16, F32), (Int8, Int8), (Int4PerChannel, Int4), (E4M3, Int8)];

/// A contiguous cache with a sequence for each of its rows, called by number.
struct RowCache {
    cache: KvCache,
    rows: Vec<SequenceId>,
}

impl RowCache {
    fn new(gpu: &Gpu, config: KvCacheConfig) -> Self {
        let cache = KvCache::new_blocking(gpu, config).expect("cache");
        let rows = (0..config.num_blocks).map(|_| cache.create_sequence()).collect();
        Self { cache, rows }
    }

    fn gpu(&self) -> &Gpu {
        self.cache.gpu()
    }

    fn row(&self, row: u32) -> SequenceId {
        self.rows[row as usize]
    }

    fn batch(&self, batch: &[(u32, u32)]) -> Vec<(SequenceId, u32)> {
        batch.iter().map(|&(row, query_len)| (self.row(row), query_len)).collect()
    }

    fn begin_step(&self, batch: &[(u32, u32)]) -> folio::Result<Step> {
        self.cache.begin_step(&self.batch(batch))
    }

    fn truncate(&self, row: u32, len: u32) -> folio::Result<()> {
        self.cache.truncate(self.row(row), len)
    }

    fn len(&self, row: u32) -> u32 {
        self.cache.seq_len(self.row(row)).expect("row")
    }

    fn gather(&self, row: u32, layer: u32) -> folio::Result<KvRows> {
        self.cache.gather_blocking(self.row(row), layer)
    }
}

/// A cache of a row for each sequence of the case, and its attention.
struct Contiguous {
    cache: RowCache,
    attention: Attention,
}

/// A cache of which every byte is NaN.
fn poisoned(gpu: &Gpu, config: KvCacheConfig) -> RowCache {
    let cache = RowCache::new(gpu, config);
    for layer in 0..config.num_layers {
        let (k, v) = cache.cache.layer_buffers(layer).expect("layer");
        poison_buffers(gpu, k.iter().chain(v));
    }
    cache
}

impl Contiguous {
    fn new(gpu: &Gpu, case: &Case, max_seq_len: u32) -> Self {
        let batch = case.lens.len() as u32;
        let config = KvCacheConfig::contiguous(1, case.num_kv_heads, case.head_dim, batch, max_seq_len)
            .with_formats(case.k_format, case.v_format);
        let cache = poisoned(gpu, config);
        let attention = Attention::new_blocking(&cache.cache, case.config.clone()).expect("attention");
        Self { cache, attention }
    }

    /// Appends the context of each row in two steps.
    fn fill(&self, case: &Case, rows: &[Rows]) {
        if let Some(channels) = case.channels(rows) {
            self.cache.cache.set_key_scales(0, &channels).expect("scales");
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
            self.cache.cache.append(pass, &step, 0, k, v, None).expect("append");
        });
        self.cache.cache.commit(step).expect("commit");
        results
    }
}

fn append(cache: &RowCache, batch: &[(u32, u32)], layer: u32, k: &[f32], v: &[f32]) {
    let step = cache.begin_step(batch).expect("step");
    submit_append(cache, &step, layer, k, v);
    cache.cache.commit(step).expect("commit");
}

fn submit_append(cache: &RowCache, step: &Step, layer: u32, k: &[f32], v: &[f32]) {
    let gpu = cache.gpu();
    let (k, v) = (upload(gpu, k), upload(gpu, v));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    cache.cache.append(&mut encoder, step, layer, &k, &v, None).expect("append");
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
    let contiguous = KvCache::new_blocking(&gpu, SMALL).expect("cache");
    let row = contiguous.create_sequence();
    let rows = tokens::rows(&SHAPE, 0, &[1, 2, 3, 4, 5]);
    let (k, v) = (upload(&gpu, &rows.k), upload(&gpu, &rows.v));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());

    let sequence = paged.create_sequence();
    let paged_step = paged.begin_step_with_positions(&[(sequence, 5)], &[7, 1, 2, 9, 4]).expect("step");
    let rope = Rope::new_blocking(&paged, config.clone()).expect("rope");
    paged.append(&mut encoder, &paged_step, 0, &k, &v, Some(&rope)).expect("append");

    let step = contiguous.begin_step_with_positions(&[(row, 5)], &[7, 1, 2, 9, 4]).expect("step");
    let error = contiguous.append(&mut encoder, &step, 0, &k, &v, Some(&rope));
    refused(error, Caller, &["rope", "made for a cache like this"]);
    let rope = Rope::new_blocking(&contiguous, config).expect("rope");
    contiguous.append(&mut encoder, &step, 0, &k, &v, Some(&rope)).expect("append");

    gpu.queue().submit([encoder.finish()]);
    paged.commit(paged_step).expect("commit");
    contiguous.commit(step).expect("commit");
    let want = paged.gather_blocking(sequence, 0).expect("gather");
    assert!(want.k != rows.k, "nothing has been rotated");
    assert_eq!(contiguous.gather_blocking(row, 0).expect("gather"), want);
}

/// The shape of [`SHAPE`], in rows of 7 tokens. Both formats hold its tokens exactly.
const SMALL: KvCacheConfig = KvCacheConfig::contiguous(SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.head_dim, 3, 7)
    .with_formats(SHAPE.k_format, SHAPE.v_format);

/// `[batch, num_kv_heads, max_seq_len, head_dim]` with NaN wherever no token is.
fn layout(tokens: &[Vec<u32>], layer: u32, side: fn(KvRows) -> Vec<f32>) -> Vec<f32> {
    let (heads, len, dims) = (SMALL.num_kv_heads as usize, SMALL.block_size as usize, SMALL.head_dim as usize);
    let mut all = vec![f32::NAN; SMALL.num_blocks as usize * heads * len * dims];
    for (row, tokens) in tokens.iter().enumerate() {
        let rows = side(tokens::rows(&SHAPE, layer, tokens));
        for (i, element) in rows.into_iter().enumerate() {
            let (token, head, dim) = (i / dims / heads, i / dims % heads, i % dims);
            all[((row * heads + head) * len + token) * dims + dim] = element;
        }
    }
    all
}

/// Compares every byte of the buffers with the tokens of each block. Bytes that were never written are NaN in both formats.
#[track_caller]
fn assert_bytes(cache: &RowCache, tokens: &[Vec<u32>]) {
    for layer in 0..SMALL.num_layers {
        let (k, v) = cache.cache.layer_buffers(layer).expect("layer");
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
fn run(cache: &RowCache, step: &Step, tokens: &[u32]) {
    for layer in 0..SMALL.num_layers {
        let rows = tokens::rows(&SHAPE, layer, tokens);
        submit_append(cache, step, layer, &rows.k, &rows.v);
    }
}

fn grow(cache: &RowCache, batch: &[(u32, &[u32])]) {
    let lens: Vec<_> = batch.iter().map(|&(row, tokens)| (row, tokens.len() as u32)).collect();
    let step = cache.begin_step(&lens).expect("step");
    run(cache, &step, &batch.iter().flat_map(|&(_, tokens)| tokens).copied().collect::<Vec<_>>());
    assert_eq!(step.num_copies(), 0);
    cache.cache.commit(step).expect("commit");
}

#[test]
fn a_side_is_rows_of_heads_of_tokens() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = poisoned(&gpu, SMALL);
    // A row is a block, taken by the first step: the blocks are taken in order.
    grow(&cache, &[(2, &[1, 2, 3])]);
    grow(&cache, &[(1, &[10]), (0, &[20, 21, 22, 23, 24, 25, 26])]);
    assert_bytes(&cache, &[vec![1, 2, 3], vec![10], vec![20, 21, 22, 23, 24, 25, 26]]);
    for (row, block) in [(2, 0), (1, 1), (0, 2)] {
        let table = cache.cache.block_table(cache.row(row)).expect("row");
        assert_eq!(table.iter().map(|block| block.index()).collect::<Vec<_>>(), [block]);
    }
    // Truncated rows keep their blocks, and are written over.
    cache.truncate(0, 2).expect("truncate");
    grow(&cache, &[(0, &[30]), (1, &[11, 12])]);
    assert_bytes(&cache, &[vec![1, 2, 3], vec![10, 11, 12], vec![20, 21, 30, 23, 24, 25, 26]]);
}

#[test]
fn random_operations_agree_with_plain_vectors() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = poisoned(&gpu, SMALL);
    let mut rng = Rng::with_seed(5);
    let mut model: Vec<Vec<u32>> = vec![Vec::new(); SMALL.num_blocks as usize];
    let mut next = 0;
    for _ in 0..300 {
        let row = rng.u32(0..SMALL.num_blocks);
        let tokens = &mut model[row as usize];
        match rng.u32(0..10) {
            0 => {
                cache.truncate(row, 0).expect("truncate");
                tokens.clear();
            }
            1 | 2 => {
                tokens.truncate(rng.usize(0..=tokens.len()));
                cache.truncate(row, tokens.len() as u32).expect("truncate");
            }
            fate => {
                let mut rows: Vec<u32> = (0..SMALL.num_blocks).collect();
                rng.shuffle(&mut rows);
                let mut batch = Vec::new();
                for &row in &rows[rng.usize(0..rows.len())..] {
                    let room = SMALL.block_size as usize - model[row as usize].len();
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
                    cache.cache.commit(step).expect("commit");
                    for (row, tokens) in batch {
                        model[row as usize].extend(tokens);
                    }
                }
            }
        }
        for (row, tokens) in (0..).zip(&model) {
            assert_eq!(cache.len(row), tokens.len() as u32);
        }
    }
    for (row, tokens) in (0..).zip(&model) {
        for layer in 0..SMALL.num_layers {
            assert_eq!(cache.gather(row, layer).expect("gather"), tokens::rows(&SHAPE, layer, tokens));
        }
    }
}

#[test]
fn a_sequence_takes_a_row_and_no_more() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = RowCache::new(&gpu, SMALL);
    grow(&cache, &[(1, &[1, 2, 3]), (2, &[4, 5, 6, 7, 8, 9, 10])]);
    let memory = cache.cache.memory();
    // 2 layers, 2 heads, 8 dims of 4 + 2 bytes.
    let token = 2 * 2 * 8 * (4 + 2);
    assert_eq!((memory.allocated_bytes(), memory.used_bytes()), (3 * 7 * token, 2 * 7 * token));
    assert_eq!((memory.cached_tokens, memory.wasted_bytes(), memory.shared_bytes()), (10, 4 * token, 0));
    let lens: Vec<_> = memory.sequences.iter().map(|s| (s.len, s.blocks, s.wasted_bytes)).collect();
    assert_eq!(lens, [(0, 0, 0), (3, 1, 4 * token), (7, 1, 0)]);
}

#[test]
fn misuse_is_refused_and_changes_nothing() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = poisoned(&gpu, SMALL);
    grow(&cache, &[(0, &[1, 2, 3, 4, 5]), (1, &[6])]);
    let attention = Attention::new_blocking(&cache.cache, folio::AttentionConfig::new(4)).expect("attention");

    // Row 2 has blocks to spare; a row that is full gets none of them.
    refused(cache.begin_step(&[(1, 1), (0, 3)]), Retry, &["sequence #0: need 8 tokens, have max_seq_len, 7"]);
    refused(cache.begin_step(&[(2, 8)]), Retry, &["sequence #2: need 8 tokens"]);
    refused(cache.begin_step(&[(0, i32::MAX as u32 - 5)]), Retry, &["sequence #0: need 2147483647 tokens"]);
    refused(cache.truncate(0, 6), Caller, &["len: got 6, need at most the sequence's length, 5"]);

    let longer = KvCache::new_blocking(&gpu, SMALL.with_blocks(3, 8)).expect("cache");
    let step = longer.begin_step(&[(longer.create_sequence(), 1)]).expect("step");
    refused(attention.plan(&step), Caller, &["step: got a step of"]);

    assert_eq!([0, 1, 2].map(|row| cache.len(row)), [5, 1, 0]);
    // What has been left in order is still of use.
    grow(&cache, &[(0, &[20, 21]), (1, &[22])]);
    assert_bytes(&cache, &[vec![1, 2, 3, 4, 5, 20, 21], vec![6, 22], vec![]]);
}

#[test]
fn rows_that_fit_into_no_binding_are_refused() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let token_bytes = 256 * 4;
    let most = gpu.device().limits().max_storage_buffer_binding_size / token_bytes;
    let config = KvCacheConfig::contiguous(1, 1, 256, 1, u32::try_from(most + 1).expect("tokens"));
    let cache = KvCache::new_blocking(&gpu, config.with_formats(F32, F32));
    refused(cache, Device, &["max_seq_len: need", "bytes for a block", "smaller blocks"]);
}

/// A snapshot of a paged sequence that is longer than a row.
#[test]
fn longer_snapshots_are_refused() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let config = KvCacheConfig::new(SMALL.num_layers, SMALL.num_kv_heads, SMALL.head_dim)
        .with_blocks(4, 7)
        .with_formats(SMALL.k_format, SMALL.v_format);
    let paged = KvCache::new_blocking(&gpu, config).expect("cache");
    let sequence = tokens::sequence(&paged, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let mut commands = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let pending = paged.record_snapshot(&mut commands, sequence).expect("snapshot");
    gpu.queue().submit([commands.finish()]);
    let snapshot = gpu.block_on(pending.read()).expect("snapshot");
    let rows = KvCache::new_blocking(&gpu, SMALL).expect("cache");
    let mut commands = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    refused(rows.swap_in(&mut commands, &snapshot), Caller, &["snapshot: got 8 tokens", "max_seq_len, 7"]);
    assert_eq!(rows.usage().used, 0);
}

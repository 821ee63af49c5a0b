//! Misuse: each error names what was given and what is needed, changes nothing, and leaves the device usable.

use crate::common::with;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use folio::wgpu::{self, BufferUsages};
use folio::{
    Attention, AttentionCall, AttentionConfig, BlockId, BufferRef, ErrorKind, Gpu, GpuOptions, KvCache, PoolUsage,
    Profile, Result, SequenceId, ShaderChecks, Step,
};

use crate::adapter::{self, DEFAULT};
use crate::case::{self, Case, append, upload};
use crate::tokens::{SHAPE, encoder};

use ErrorKind::{Caller, Device, Retry, Wgpu};

const NUM_Q_HEADS: u32 = 4;

/// What the tests share, so that kernels are compiled once.
struct Fixture {
    instance: wgpu::Instance,
    case: Case,
    cache: KvCache,
    attention: Attention,
}

static FIXTURE: LazyLock<Option<Mutex<Fixture>>> = LazyLock::new(|| {
    adapter::open(DEFAULT)?;
    let instance = wgpu::Instance::default();
    let gpu = open(with(GpuOptions::default(), |c| c.instance = Some(instance.clone()))).expect("it opened before");
    let case = Case::new(&[(5, 1), (2, 4)], NUM_Q_HEADS, SHAPE.num_kv_heads, SHAPE.head_dim).block_size(4);
    let config = with(SHAPE, |c| {
        c.num_layers = 1;
        c.v_format = SHAPE.k_format;
    });
    let cache = KvCache::new_blocking(&gpu, config).expect("cache");
    let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
    Some(Mutex::new(Fixture { instance, case, cache, attention }))
});

/// The shared things, for one test at a time.
fn fixture() -> Option<MutexGuard<'static, Fixture>> {
    FIXTURE.as_ref().map(|fixture| fixture.lock().unwrap_or_else(PoisonError::into_inner))
}

fn open(options: GpuOptions) -> Result<Gpu> {
    Gpu::open_blocking(with(options, |c| c.adapter_name = std::env::var("FOLIO_ADAPTER").ok()))
}

/// Asserts that a call was refused, and that its text has all these parts.
#[track_caller]
pub(crate) fn refused<T>(result: Result<T>, kind: ErrorKind, parts: &[&str]) {
    let Err(error) = result else { panic!("accepted, but the error should say {parts:?}") };
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

impl Fixture {
    fn gpu(&self) -> &Gpu {
        self.cache.gpu()
    }

    /// A buffer of `len` f32 with other usages than a good one may have.
    fn buffer(&self, len: u64, usage: BufferUsages) -> wgpu::Buffer {
        buffer(self.gpu(), len, usage)
    }

    /// A sequence of `len` tokens.
    fn sequence(&self, len: u32) -> SequenceId {
        let sequence = self.cache.create_sequence();
        let rows = vec![0.5; (len * 16) as usize];
        append(&self.cache, &[(sequence, len)], 0, &rows, &rows);
        sequence
    }

    fn state(&self, sequences: &[SequenceId]) -> (PoolUsage, Vec<(u32, Vec<BlockId>)>) {
        let of = |&s: &SequenceId| (self.cache.seq_len(s).expect("len"), self.cache.block_table(s).expect("table"));
        (self.cache.usage(), sequences.iter().map(of).collect())
    }

    /// A good step still gives good results; afterwards the cache is empty.
    #[track_caller]
    fn assert_works(&self) {
        self.cache.clear();
        let rows = self.case.rows();
        let sequences: Vec<_> = self.case.lens.iter().map(|_| self.cache.create_sequence()).collect();
        for ((&sequence, rows), &(context_len, _)) in sequences.iter().zip(&rows).zip(&self.case.lens) {
            let context = context_len as usize * 16;
            append(&self.cache, &[(sequence, context_len)], 0, &rows.k[..context], &rows.v[..context]);
        }
        let (out, lse) = self.case.attend(&self.cache, &self.attention, &sequences, &rows);
        self.case.compare(self.gpu(), &rows, &out, lse.as_deref());
        self.cache.clear();
    }
}

fn buffer(gpu: &Gpu, len: u64, usage: BufferUsages) -> wgpu::Buffer {
    gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size: len * 4, usage, mapped_at_creation: false })
}

#[test]
fn shapes_of_caches_and_attentions() {
    let Some(fixture) = fixture() else { return };
    let cache = |config| KvCache::new_blocking(fixture.gpu(), config);
    for (config, parts) in [
        (with(SHAPE, |c| c.num_layers = 0), ["num_layers: got 0", "need 1 to 65536"]),
        (with(SHAPE, |c| c.num_kv_heads = 0), ["num_kv_heads: got 0", "need 1 to 65535"]),
        (with(SHAPE, |c| c.head_dim = 0), ["head_dim: got 0", "need a multiple of 8 from 8 to 576"]),
        (with(SHAPE, |c| c.head_dim = 59), ["head_dim: got 59", "need a multiple of 8 from 8 to 576"]),
        (with(SHAPE, |c| c.head_dim = 584), ["head_dim: got 584", "need a multiple of 8 from 8 to 576"]),
        (with(SHAPE, |c| c.block_size = 0), ["block_size: got 0", "need 1 to 256 tokens"]),
        (with(SHAPE, |c| c.block_size = 257), ["block_size: got 257", "need 1 to 256 tokens"]),
        (with(SHAPE, |c| c.num_layers = u32::MAX), ["num_layers: got 4294967295", "need 1 to 65536"]),
        (with(SHAPE, |c| c.num_blocks = 0), ["num_blocks: got 0", "need at least 1"]),
        (with(SHAPE, |c| c.num_blocks = u32::MAX), ["num_blocks: got 4294967295", "num_blocks * block_size"]),
    ] {
        refused(cache(config), Caller, &parts);
    }
    let attention = |config| Attention::new_blocking(&fixture.cache, config);
    let good = || AttentionConfig::new(NUM_Q_HEADS);
    for (config, parts) in [
        (AttentionConfig::new(0), ["num_q_heads: got 0", "need a multiple of num_kv_heads, 2"]),
        (AttentionConfig::new(3), ["num_q_heads: got 3", "need a multiple of num_kv_heads, 2"]),
        (AttentionConfig::new(65_536), ["num_q_heads: got 65536", "to 65535"]),
        (with(good(), |c| c.window = Some(0)), ["window: got 0", "need at least 1, or None"]),
        (with(good(), |c| c.softcap = Some(0.0)), ["softcap: got 0", "need a finite number above 0"]),
        (with(good(), |c| c.softmax_scale = Some(f32::NAN)), ["softmax_scale: got NaN", "need a finite"]),
        (
            {
                let mut config = good();
                config.sinks = Some(vec![0.0; 3]);
                config
            },
            ["sinks: got 3 values", "need one per query head, 4"],
        ),
        (
            {
                let mut config = good();
                config.alibi_slopes = Some(vec![f32::INFINITY; 4]);
                config
            },
            ["alibi_slopes: got inf", "need a finite number"],
        ),
    ] {
        refused(attention(config), Caller, &parts);
    }
    fixture.assert_works();
}

#[test]
fn a_pool_or_step_larger_than_the_device_says_what_fits() {
    let how = adapter::Open { max_binding_bytes: Some(1 << 20), max_storage_buffers: Some(8), ..DEFAULT };
    let Some(gpu) = adapter::open(how) else { return };
    // K blocks have 4 * 2 * 8 * 4 = 256 bytes, V blocks half of that: with four storage buffers for both, K can have three segments of 4096.
    let config = |num_blocks| {
        with(SHAPE, |c| {
            c.num_layers = 1;
            c.num_blocks = num_blocks;
        })
    };
    let parts = [
        "num_blocks: need 9 storage buffers in a kernel",
        "(3 for 2097408 bytes of K, 2 for 1048704 bytes of V, 4 others)",
        "have 8 storage buffers of 1048576 bytes",
        "the largest pool that fits has 8192 blocks",
    ];
    refused(KvCache::new_blocking(&gpu, config(8193)), Device, &parts);
    let large = with(config(1), |c| {
        c.head_dim = 256;
        c.num_kv_heads = 5;
        c.block_size = 256;
    });
    let parts = ["block_size: need 1310720 bytes for a block", "of 1048576 bytes", "use smaller blocks"];
    refused(KvCache::new_blocking(&gpu, large), Device, &parts);
    let cache = KvCache::new_blocking(&gpu, config(8192)).expect("the largest pool");

    // Its last block works.
    let (filler, s) = (cache.create_sequence(), cache.create_sequence());
    let step = cache.begin_step(&[(filler, 8191 * 4)]).expect("step");
    cache.commit(step).expect("commit");
    crate::tokens::grow(&cache, &[(s, &[1, 2, 3])]);
    crate::tokens::assert_holds(&cache, s, &[1, 2, 3]);
    refused(cache.begin_step(&[(filler, 1)]), Retry, &["blocks: need 1, have 0 free of 8192"]);

    // The rows of a step must fit into a binding as well: 64 bytes of K and 256 of q per token.
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(8)).expect("attention");
    cache.clear();
    let s = cache.create_sequence();
    let step = cache.begin_step(&[(s, 16_384)]).expect("step");
    let plan = attention.plan(&step).expect("plan");
    let [q, out] = [0, 1].map(|_| buffer(&gpu, 16_384 * 64, BufferUsages::STORAGE));
    let mut encoder = encoder(&cache);
    let parts = ["q: need 4194304 bytes", "have 1048576 bytes in a storage binding", "use smaller steps"];
    refused(attention.attend(&mut encoder, &plan, 0, &q, &out), Device, &parts);
    drop(step);
    assert_eq!(cache.usage().free, 8192);
    let rows = 17_000;
    let larger = with(config(0), |c| {
        c.num_blocks = 5000;
        c.k_format = SHAPE.v_format;
    });
    let cache = KvCache::new_blocking(&gpu, larger).expect("a pool of halves");
    let s = cache.create_sequence();
    let step = cache.begin_step(&[(s, rows)]).expect("step");
    cache.commit(step).expect("commit");
    let parts = ["sequence: need 1088000 bytes for 17000 tokens", "have 1048576 bytes"];
    refused(cache.gather_blocking(s, 0), Device, &parts);
}

#[test]
fn unknown_sequences() {
    let Some(fixture) = fixture() else { return };
    let cache = &fixture.cache;
    let other = KvCache::new_blocking(fixture.gpu(), *cache.config()).expect("cache");
    let good = fixture.sequence(3);
    let freed = cache.fork(good).expect("fork");
    cache.free(freed).expect("free");
    let foreign: Vec<_> = (0..100).map(|_| other.create_sequence()).collect();
    let before = fixture.state(&[good]);
    let [k, v] = [0, 1].map(|_| fixture.buffer(64, BufferUsages::STORAGE));
    for unknown in [freed, foreign[0], foreign[99]] {
        let name = format!("{unknown} is not in this cache");
        let parts = ["sequence: ", &name, "need an id that it gave out"];
        refused(cache.seq_len(unknown), Caller, &parts);
        refused(cache.block_table(unknown), Caller, &parts);
        refused(cache.fork(unknown), Caller, &parts);
        refused(cache.fork_at(unknown, 0), Caller, &parts);
        refused(cache.publish_prefix(unknown, &[], 0), Caller, &parts);
        refused(cache.truncate(unknown, 0), Caller, &parts);
        refused(cache.free(unknown), Caller, &parts);
        refused(cache.begin_step(&[(good, 1), (unknown, 1)]), Caller, &parts);
        refused(cache.gather_blocking(unknown, 0), Caller, &parts);
        refused(cache.record_gather(&mut encoder(cache), unknown, 0, &k, &v), Caller, &parts);
        assert_eq!(fixture.state(&[good]), before);
    }
    fixture.assert_works();
}

#[test]
fn batches_that_are_no_batches() {
    let Some(fixture) = fixture() else { return };
    let cache = &fixture.cache;
    let (a, b) = (fixture.sequence(3), fixture.sequence(1));
    let before = fixture.state(&[a, b]);
    let twice = format!("batch: got {b} twice");
    let zero = format!("query_len: got 0 for {b}");
    let long = format!("query_len: got {} for {a} of 3 tokens", i32::MAX);
    let wrap = format!("query_len: got {} for {a} of 3 tokens", u32::MAX);
    let max = i32::MAX as u32;
    for (batch, parts) in [
        (vec![], ["batch: got no sequences", "need at least one (sequence, query_len)"]),
        (vec![(b, 1), (a, 1), (b, 2)], [&twice[..], "need each sequence once"]),
        (vec![(a, 1), (b, 0)], [&zero, "need at least 1"]),
        (vec![(a, max)], [&long, "need a sequence length below 2^31"]),
        (vec![(a, u32::MAX)], [&wrap, "need a sequence length below 2^31"]),
        (vec![(a, max - 3), (b, max - 1)], ["batch: got 2^31 or more new tokens", "need fewer than 2^31 in all"]),
    ] {
        refused(cache.begin_step(&batch), Caller, &parts);
        assert_eq!(fixture.state(&[a, b]), before);
    }
    let parts = ["len: got 4", "need at most the sequence's length, 3"];
    refused(cache.truncate(a, 4), Caller, &parts);
    refused(cache.fork_at(a, 4), Caller, &parts);
    refused(cache.fork_at(a, u32::MAX), Caller, &["need at most the sequence's length, 3"]);
    let parts = ["tokens: got 4 tokens", "need at most the sequence's length, 3"];
    refused(cache.publish_prefix(a, &[0; 4], 0), Caller, &parts);
    refused(cache.forget_prefixes(7), Caller, &["salt: got unknown salt 7", "need one with indexed blocks"]);
    assert_eq!(fixture.state(&[a, b]), before);
    fixture.assert_works();
}

#[test]
fn sequences_in_an_open_step_stay_as_they_are() {
    let Some(fixture) = fixture() else { return };
    let cache = &fixture.cache;
    let (a, b) = (fixture.sequence(5), fixture.sequence(2));
    let step = cache.begin_step(&[(a, 2)]).expect("step");
    let before = fixture.state(&[a, b]);
    let name = format!("sequence: {a} is in an open step");
    let parts = [&name[..], "need that finished or dropped first"];
    refused(cache.free(a), Caller, &parts);
    refused(cache.fork(a), Caller, &parts);
    refused(cache.fork_at(a, 1), Caller, &parts);
    refused(cache.truncate(a, 1), Caller, &parts);
    refused(cache.begin_step(&[(b, 1), (a, 1)]), Caller, &parts);
    assert_eq!(fixture.state(&[a, b]), before);
    // The other one was not caught by the refused batch, and reading is allowed.
    cache.truncate(b, 1).expect("truncate");
    assert_eq!(cache.gather_blocking(a, 0).expect("gather").k.len(), 5 * 16);
    drop(step);
    cache.free(a).expect("free");
    fixture.assert_works();
}

/// Ranges that no call takes: (range, parts of the error).
fn bad_ranges<'b>(
    argument: &str,
    buffer: &'b wgpu::Buffer,
    not_storage: &'b wgpu::Buffer,
    need: u64,
) -> Vec<(BufferRef<'b>, Vec<String>)> {
    let exact = format!("need exactly {need} bytes ({} words of 4)", need / 4);
    let inside = format!("need a range within the buffer's {} bytes", buffer.size());
    let near_max = u64::MAX - 255;
    [
        (BufferRef::new(buffer, 0, need - 4), format!("got {} bytes", need - 4), exact.clone()),
        (BufferRef::new(buffer, 0, need + 4), format!("got {} bytes", need + 4), exact.clone()),
        (BufferRef::new(buffer, 0, 0), "got 0 bytes".into(), exact),
        (
            BufferRef::new(buffer, 4, need),
            "got offset 4".into(),
            "need a multiple of the device's storage offset".into(),
        ),
        (
            BufferRef::new(buffer, buffer.size(), need),
            format!("got {need} bytes from offset {}", buffer.size()),
            inside.clone(),
        ),
        (BufferRef::new(buffer, near_max, need), format!("got {need} bytes from offset {near_max}"), inside.clone()),
        (BufferRef::new(buffer, 256, u64::MAX), format!("got {} bytes from offset 256", u64::MAX), inside),
        (not_storage.into(), "got usage BufferUsages(COPY_DST)".into(), "need BufferUsages::STORAGE".into()),
    ]
    .into_iter()
    .map(|(range, got, need)| (range, vec![format!("{argument}: "), got, need]))
    .collect()
}

fn strs(parts: &[String]) -> Vec<&str> {
    parts.iter().map(String::as_str).collect()
}

#[test]
fn ranges_that_do_not_fit() {
    let Some(fixture) = fixture() else { return };
    let (cache, attention) = (&fixture.cache, &fixture.attention);
    let with_lse = with(AttentionConfig::new(NUM_Q_HEADS), |c| c.lse = true);
    let with_lse = Attention::new_blocking(cache, with_lse).expect("attention");
    let a = fixture.sequence(3);
    let step = cache.begin_step(&[(a, 2)]).expect("step");
    let (plan, lse_plan) = (attention.plan(&step).expect("plan"), with_lse.plan(&step).expect("plan"));
    let before = fixture.state(&[a]);
    let large = fixture.buffer(512, BufferUsages::STORAGE);
    let not_storage = fixture.buffer(512, BufferUsages::COPY_DST);
    let (kv, qo, lse_len) = (2 * 16, 2 * 32, 2 * 4);
    let [k, v, q, out, lse] = [kv, kv, qo, qo, lse_len].map(|len| fixture.buffer(len, BufferUsages::STORAGE));
    let mut encoder = encoder(cache);

    for (bad, parts) in bad_ranges("k", &large, &not_storage, kv * 4) {
        refused(cache.append(&mut encoder, &step, 0, bad, &v, None), Caller, &strs(&parts));
    }
    for (bad, parts) in bad_ranges("v", &large, &not_storage, kv * 4) {
        refused(cache.append(&mut encoder, &step, 0, &k, bad, None), Caller, &strs(&parts));
    }
    for (bad, parts) in bad_ranges("q", &large, &not_storage, qo * 4) {
        refused(attention.attend(&mut encoder, &plan, 0, bad, &out), Caller, &strs(&parts));
    }
    for (bad, parts) in bad_ranges("out", &large, &not_storage, qo * 4) {
        refused(attention.attend(&mut encoder, &plan, 0, &q, bad), Caller, &strs(&parts));
    }
    for (bad, parts) in bad_ranges("lse", &large, &not_storage, lse_len * 4) {
        refused(with_lse.attend_with_lse(&mut encoder, &lse_plan, 0, &q, &out, bad), Caller, &strs(&parts));
    }

    // Gathered rows need at least, not exactly, their size.
    let good = fixture.buffer(48, BufferUsages::STORAGE);
    for (bad, parts) in bad_ranges("k_out", &large, &not_storage, 3 * 16 * 4) {
        if parts.iter().all(|part| !part.contains("got 196 bytes")) {
            let parts: Vec<_> = parts.iter().map(|part| part.replace("exactly", "at least")).collect();
            refused(cache.record_gather(&mut encoder, a, 0, bad, &good), Caller, &strs(&parts));
            let parts: Vec<_> = parts.iter().map(|part| part.replace("k_out", "v_out")).collect();
            refused(cache.record_gather(&mut encoder, a, 0, &good, bad), Caller, &strs(&parts));
        }
    }
    let parts = ["v_out: got a range that overlaps k_out", "need ranges that don't overlap"];
    refused(cache.record_gather(&mut encoder, a, 0, &good, &good), Caller, &parts);

    // Layers that aren't there.
    let parts = ["layer: got 1", "need below num_layers, 1"];
    refused(cache.append(&mut encoder, &step, 1, &k, &v, None), Caller, &parts);
    refused(attention.attend(&mut encoder, &plan, 1, &q, &out), Caller, &parts);
    refused(cache.record_gather(&mut encoder, a, 1, &good, &large), Caller, &parts);
    refused(cache.gather_blocking(a, 1), Caller, &parts);
    refused(cache.layer_buffers(1), Caller, &parts);

    // One buffer in two roles, or the cache's own.
    let own = "a buffer of its own";
    refused(attention.attend(&mut encoder, &plan, 0, &q, &q), Caller, &["out: got the buffer of q", own]);
    let (first, second) = (BufferRef::new(&large, 0, qo * 4), BufferRef::new(&large, 1024, qo * 4));
    refused(attention.attend(&mut encoder, &plan, 0, first, second), Caller, &["out: got the buffer of q", own]);
    let lse_range = BufferRef::new(&large, 1024, lse_len * 4);
    let result = with_lse.attend_with_lse(&mut encoder, &lse_plan, 0, &q, first, lse_range);
    refused(result, Caller, &["out: got the buffer of lse", own]);
    let result = with_lse.attend_with_lse(&mut encoder, &lse_plan, 0, first, &out, lse_range);
    refused(result, Caller, &["q: got the buffer of lse", own]);
    let (k_side, v_side) = cache.layer_buffers(0).expect("layer");
    let hosts = "need a buffer of the host's";
    for side in [&k_side[0], &v_side[0]] {
        let [kv, qo, lse_range] = [kv, qo, lse_len].map(|len| BufferRef::new(side, 0, len * 4));
        let parts = |argument| [argument, "got the cache's own buffer", hosts];
        refused(cache.append(&mut encoder, &step, 0, kv, &v, None), Caller, &parts("k: "));
        refused(cache.append(&mut encoder, &step, 0, &k, kv, None), Caller, &parts("v: "));
        refused(attention.attend(&mut encoder, &plan, 0, qo, &out), Caller, &parts("q: "));
        refused(attention.attend(&mut encoder, &plan, 0, &q, qo), Caller, &parts("out: "));
        let result = with_lse.attend_with_lse(&mut encoder, &lse_plan, 0, &q, &out, lse_range);
        refused(result, Caller, &parts("lse: "));
        refused(cache.record_gather(&mut encoder, a, 0, side, &good), Caller, &parts("k_out: "));
        refused(cache.record_gather(&mut encoder, a, 0, &good, side), Caller, &parts("v_out: "));
    }

    assert_eq!(fixture.state(&[a]), before);
    // Nothing of all that is in the encoder, and the step is as good as before.
    cache.append(&mut encoder, &step, 0, &k, &v, None).expect("append");
    attention.attend(&mut encoder, &plan, 0, &q, &out).expect("attend");
    with_lse.attend_with_lse(&mut encoder, &lse_plan, 0, &q, &out, &lse).expect("attend");
    fixture.gpu().queue().submit([encoder.finish()]);
    cache.commit(step).expect("commit");
    fixture.assert_works();
}

#[test]
fn the_buffers_of_another_layer_are_the_caches_own_too() {
    let Some(fixture) = fixture() else { return };
    let cache = KvCache::new_blocking(fixture.gpu(), SHAPE).expect("cache");
    let s = cache.create_sequence();
    crate::tokens::grow(&cache, &[(s, &[1, 2, 3])]);
    let (k_side, v_side) = cache.layer_buffers(1).expect("layer");
    let parts = ["k_out: got the cache's own buffer", "need a buffer of the host's"];
    refused(cache.record_gather(&mut encoder(&cache), s, 0, &k_side[0], &v_side[0]), Caller, &parts);
    crate::tokens::assert_holds(&cache, s, &[1, 2, 3]);
}

#[test]
fn buffers_of_another_device() {
    let Some(fixture) = fixture() else { return };
    let (cache, attention) = (&fixture.cache, &fixture.attention);
    let instance = Some(fixture.instance.clone());
    let other = open(with(GpuOptions::default(), |c| c.instance = instance)).expect("a second device");
    let a = fixture.sequence(3);
    let step = cache.begin_step(&[(a, 2)]).expect("step");
    let plan = attention.plan(&step).expect("plan");
    let before = fixture.state(&[a]);
    let [kv, qo] = [2 * 16, 2 * 32].map(|len| fixture.buffer(len, BufferUsages::STORAGE));
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
    let [far_kv, far_qo, far_rows] = [2 * 16, 2 * 32, 3 * 16].map(|len| buffer(&other, len, usage));
    let rows = fixture.buffer(3 * 16, usage);
    let mut encoder = encoder(cache);
    let parts = ["binding buffers (are they all of the same device?)", "Device"];
    refused(cache.append(&mut encoder, &step, 0, &far_kv, &kv, None), Wgpu, &parts);
    refused(cache.append(&mut encoder, &step, 0, &kv, &far_kv, None), Wgpu, &parts);
    refused(attention.attend(&mut encoder, &plan, 0, &far_qo, &qo), Wgpu, &parts);
    refused(attention.attend(&mut encoder, &plan, 0, &qo, &far_qo), Wgpu, &parts);
    refused(cache.record_gather(&mut encoder, a, 0, &rows, &far_rows), Wgpu, &parts);
    refused(fixture.gpu().read_blocking(&far_rows), Wgpu, &["reading back (is the buffer of this device?)"]);

    // A buffer that is gone.
    kv.destroy();
    let k = fixture.buffer(2 * 16, usage);
    refused(cache.append(&mut encoder, &step, 0, &k, &kv, None), Wgpu, &["binding buffers", "destroyed"]);
    rows.destroy();
    refused(fixture.gpu().read_blocking(&rows), Wgpu, &["reading back", "destroyed"]);

    // A cache of the same shape on another device.
    let far_cache = KvCache::new_blocking(&other, *cache.config()).expect("cache");
    let far_step = far_cache.begin_step(&[(far_cache.create_sequence(), 2)]).expect("step");
    let far_plan = attention.plan(&far_step);
    let out = fixture.buffer(2 * 32, usage);
    if let Ok(far_plan) = far_plan {
        refused(attention.attend(&mut encoder, &far_plan, 0, &qo, &out), Wgpu, &parts);
    }

    assert_eq!(fixture.state(&[a]), before);
    fixture.gpu().queue().submit([encoder.finish()]);
    drop(step);
    fixture.assert_works();
}

/// Calls that take a step or a plan, all of which refuse.
#[track_caller]
fn assert_stale(fixture: &Fixture, step: Option<&Step>, plan: &folio::AttentionPlan, reason: &str) {
    let parts = ["step: ", reason, "need an open one of this cache"];
    let [kv, qo, out] = [2 * 16, 2 * 32, 2 * 32].map(|len| fixture.buffer(len, BufferUsages::STORAGE));
    let mut encoder = encoder(&fixture.cache);
    if let Some(step) = step {
        refused(fixture.cache.append(&mut encoder, step, 0, &kv, &kv, None), Caller, &parts);
        refused(fixture.attention.plan(step), Caller, &parts);
    }
    refused(fixture.attention.attend(&mut encoder, plan, 0, &qo, &out), Caller, &parts);
}

#[test]
fn steps_and_plans_that_are_over() {
    let Some(fixture) = fixture() else { return };
    let (cache, attention) = (&fixture.cache, &fixture.attention);
    let a = fixture.sequence(3);
    let begin = || {
        let step = cache.begin_step(&[(a, 2)]).expect("step");
        let plan = attention.plan(&step).expect("plan");
        (step, plan)
    };
    let (step, plan) = begin();
    cache.commit(step).expect("commit");
    assert_stale(&fixture, None, &plan, "it has been committed");
    let (step, plan) = begin();
    drop(step);
    assert_stale(&fixture, None, &plan, "it has been rolled back");
    let (step, plan) = begin();
    cache.clear();
    assert_stale(&fixture, Some(&step), &plan, "the cache has been cleared since it began");
    refused(cache.commit(step), Caller, &["step: the cache has been cleared since it began"]);
    assert_stale(&fixture, None, &plan, "the cache has been cleared since it began");
    fixture.assert_works();
}

#[test]
fn steps_and_plans_of_others() {
    let Some(fixture) = fixture() else { return };
    let (cache, attention) = (&fixture.cache, &fixture.attention);
    let gpu = fixture.gpu();
    let like = KvCache::new_blocking(gpu, *cache.config()).expect("cache");
    let unlike = KvCache::new_blocking(gpu, with(*cache.config(), |c| c.block_size = 5)).expect("cache");
    let step_of = |cache: &KvCache| cache.begin_step(&[(cache.create_sequence(), 2)]).expect("step");
    let [kv, v, qo, out] = [32, 32, 64, 64].map(|len| fixture.buffer(len, BufferUsages::STORAGE));
    let mut encoder = encoder(cache);

    let parts = ["step: it belongs to another cache", "need an open one of this cache"];
    let foreign = step_of(&like);
    refused(cache.append(&mut encoder, &foreign, 0, &kv, &v, None), Caller, &parts);
    refused(cache.commit(foreign), Caller, &parts);
    assert_eq!(like.usage().free, like.usage().total, "refused by commit, the step was rolled back");
    let parts = ["step: got a step of KvCacheConfig", "block_size: 5", "need a step of a cache like the attention's"];
    refused(attention.plan(&step_of(&unlike)), Caller, &parts);

    // Plans: of other options, and of another kernel family with other tiles.
    let step = step_of(cache);
    let windowed = with(AttentionConfig::new(NUM_Q_HEADS), |c| c.window = Some(4));
    let windowed = Attention::new_blocking(cache, windowed).expect("attention");
    let other_family = if gpu.profile() == Profile::Cpu { Profile::Gpu } else { Profile::Cpu };
    let other_gpu =
        Gpu::from_parts_with(gpu.device().clone(), gpu.queue().clone(), other_family, ShaderChecks::default());
    let twin = KvCache::new_blocking(&other_gpu.expect("the same device"), *cache.config()).expect("cache");
    let tiled = Attention::new_blocking(&twin, AttentionConfig::new(NUM_Q_HEADS)).expect("attention");
    for other in [windowed, tiled] {
        let plan = other.plan(&step).expect("plan");
        let parts = ["plan: got a plan of another attention", "need a plan that this attention made"];
        refused(attention.attend(&mut encoder, &plan, 0, &qo, &out), Caller, &parts);
    }
    drop(step);
    fixture.assert_works();
}

#[test]
fn lse_and_masks_are_used_if_and_only_if_they_were_asked_for() {
    let Some(fixture) = fixture() else { return };
    let (cache, plain) = (&fixture.cache, &fixture.attention);
    let config = with(AttentionConfig::new(NUM_Q_HEADS), |c| {
        c.lse = true;
        c.custom_mask = true;
    });
    let masked = Attention::new_blocking(cache, config).expect("attention");
    let (a, b) = (fixture.sequence(31), fixture.sequence(1));
    let step = cache.begin_step(&[(a, 2), (b, 1)]).expect("step");
    let [q, out] = [0, 1].map(|_| fixture.buffer(3 * 32, BufferUsages::STORAGE));
    let lse = fixture.buffer(3 * 4, BufferUsages::STORAGE);
    let mut encoder = encoder(cache);

    refused(masked.plan(&step), Caller, &["custom_mask: got plan", "need plan_with_masks"]);
    refused(plain.plan_with_masks(&step, &[&[0; 4], &[0]]), Caller, &["custom_mask: got false", "need true"]);
    let one_each = "need one per sequence of the step, 2";
    refused(masked.plan_with_masks(&step, &[&[0; 4]]), Caller, &["masks: got 1 masks", one_each]);
    refused(masked.plan_with_masks(&step, &[&[0; 4], &[0], &[0]]), Caller, &["masks: got 3 masks", one_each]);
    // 33 keys take 2 words for each of 2 queries; 2 keys take 1.
    for (first, second, got, need) in [
        (3, 1, "masks: got 3 words for sequence 0", "words, 4"),
        (5, 1, "masks: got 5 words for sequence 0", "words, 4"),
        (4, 2, "masks: got 2 words for sequence 1", "words, 1"),
        (4, 0, "masks: got 0 words for sequence 1", "words, 1"),
    ] {
        let result = masked.plan_with_masks(&step, &[&vec![0; first], &vec![0; second]]);
        refused(result, Caller, &[got, "need query_len * ceil(seq_len / 32)", need]);
    }
    let masked_plan = masked.plan_with_masks(&step, &[&[0; 4], &[0]]).expect("plan");
    let plain_plan = plain.plan(&step).expect("plan");
    let result = masked.attend(&mut encoder, &masked_plan, 0, &q, &out);
    refused(result, Caller, &["lse: got attend", "need attend_with_lse"]);
    refused(plain.sinks(&[0.0; NUM_Q_HEADS as usize]), Caller, &["sinks: got values", "the config has no sinks"]);
    let config = with(AttentionConfig::new(NUM_Q_HEADS), |c| c.sinks = Some(vec![0.0; NUM_Q_HEADS as usize]));
    let with_sinks = Attention::new_blocking(cache, config).expect("attention");
    refused(with_sinks.sinks(&[0.0]), Caller, &["sinks: got 1 values", "need one per query head"]);
    refused(with_sinks.sinks(&[f32::NAN; NUM_Q_HEADS as usize]), Caller, &["sinks: got NaN", "a finite number"]);
    let sinks = with_sinks.sinks(&[1.0; NUM_Q_HEADS as usize]).expect("sinks");
    let mut call = AttentionCall::new(&q, &out);
    call.sinks = Some(&sinks);
    let result = plain.attend_call(&mut encoder, &plain_plan, 0, call);
    refused(result, Caller, &["sinks: got those of", "a config with sinks"]);
    let result = plain.attend_with_lse(&mut encoder, &plain_plan, 0, &q, &out, &lse);
    refused(result, Caller, &["lse: got false", "need AttentionConfig::lse set"]);
    drop(step);
    fixture.assert_works();
}

#[test]
fn adapters_that_are_not_there() {
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let install = ["apt-get install mesa-vulkan-drivers libvulkan1", "dnf install mesa-vulkan-drivers vulkan-loader"];
    let named = with(GpuOptions::default(), |c| c.adapter_name = Some("No Such Adapter 9000".into()));
    let parts =
        ["adapter_name: got \"No Such Adapter 9000\"", "need part of the name", "found ", &gpu.adapter_info().name];
    refused(Gpu::open_blocking(named.clone()), Device, &[&parts[..], &install].concat());
    let none = with(GpuOptions::default(), |c| c.backends = wgpu::Backends::empty());
    refused(Gpu::open_blocking(none), Device, &[&["no GPU adapter", "found none"][..], &install].concat());
    // An instance of every backend, but none of them is to be looked in.
    let instance = Some(wgpu::Instance::default());
    let none = with(GpuOptions::default(), |c| {
        c.backends = wgpu::Backends::empty();
        c.instance = instance;
    });
    refused(Gpu::open_blocking(none), Device, &["no GPU adapter", "found none"]);
    let none = with(named, |c| c.backends = wgpu::Backends::empty());
    refused(Gpu::open_blocking(none), Device, &["No Such Adapter 9000", "found none"]);
}

#[test]
fn devices_with_too_small_limits() {
    let Some(adapter) = adapter::raw() else { return };
    let open = |change: fn(&mut wgpu::Limits)| {
        let mut limits = wgpu::Limits::default();
        change(&mut limits);
        let descriptor = wgpu::DeviceDescriptor { required_limits: limits, ..Default::default() };
        let (device, queue) = futures::executor::block_on(adapter.request_device(&descriptor)).expect("device");
        Gpu::from_parts(device, queue)
    };
    type Change = fn(&mut wgpu::Limits);
    let cases: [(Change, [&str; 3]); 4] = [
        (
            |limits| limits.max_storage_buffers_per_shader_stage = 4,
            ["max_storage_buffers_per_shader_stage", "need at least 8", "have 4"],
        ),
        (
            |limits| limits.max_compute_workgroup_storage_size = 8192,
            ["max_compute_workgroup_storage_size", "need at least 16384", "have 8192"],
        ),
        (
            |limits| limits.max_storage_buffer_binding_size = 4096,
            ["max_storage_buffer_binding_size", "need at least 1048576", "have 4096"],
        ),
        (
            |limits| limits.max_compute_invocations_per_workgroup = 128,
            ["max_compute_invocations_per_workgroup", "need at least 256", "have 128"],
        ),
    ];
    for (change, parts) in cases {
        refused(open(change), Device, &parts);
    }
    open(|_| ()).expect("the default limits are enough");
}

#[test]
fn reads_outside_a_buffer_or_without_its_leave() {
    let Some(fixture) = fixture() else { return };
    let gpu = fixture.gpu();
    let buffer = upload(gpu, &[1.0, 2.0, 3.0, 4.0]);
    let closed = fixture.buffer(4, BufferUsages::STORAGE);
    refused(gpu.read_blocking(&closed), Caller, &["buffer: got usage", "STORAGE", "need BufferUsages::COPY_SRC"]);
    let within = "need multiples of 4 within the buffer's 16 bytes";
    for (offset, size) in [(2, 4), (0, 3), (0, 20), (16, 4), (20, 0), (u64::MAX - 3, 8), (4, u64::MAX - 3)] {
        let got = format!("buffer: got {size} bytes from offset {offset}");
        refused(gpu.read_blocking(BufferRef::new(&buffer, offset, size)), Caller, &[&got, within]);
    }
    assert_eq!(gpu.read_blocking(buffer.slice(4..12)).expect("read"), [2.0, 3.0]);
    assert_eq!(gpu.read_blocking(BufferRef::new(&buffer, 8, 0)).expect("read"), [0.0; 0]);
    assert_eq!(case::round(SHAPE.k_format, &gpu.read_blocking(&buffer).expect("read")), [1.0, 2.0, 3.0, 4.0]);
    fixture.assert_works();
}

//! Batch invariance: with [`AttentionConfig::deterministic`](folio::AttentionConfig) the results of a sequence have the same bits alone and in any
//! batch, however its tokens are cut into chunks, and prefill's rows are those of single tokens if these go to the prefill kernel as well.

use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
use folio::{Attention, AttentionConfig, Gpu, QueryKernel, SequenceId, wgpu};

use crate::adapter::{self, CPU, GPU, Open};
use crate::case::{Case, upload};

const FORMATS: [(KvFormat, KvFormat); 7] =
    [(F32, F32), (F16, F16), (E4M3, E4M3), (Int8, Int8), (Int4, Int4), (Int8PerChannel, Int8), (Int4PerChannel, Int4)];
const GROUP_SIZES: [u32; 4] = [1, 4, 8, 16];
const BLOCK_SIZES: [u32; 4] = [1, 8, 16, 256];

/// Keys before the tokens that are compared: ranges of a fixed length have 1024 or 4096 keys, and the tokens lie on both sides of where one ends.
const fn context_len(how: Open) -> u32 {
    if matches!(how.profile, Some(folio::Profile::Cpu)) { 4096 - 20 } else { 1024 - 20 }
}

/// Tokens that are compared.
const TOKENS: u32 = 37;

/// How the tokens come to the cache.
#[derive(Clone, Copy, Debug)]
struct Way {
    chunk: u32,
    /// New tokens of the other sequences of each step.
    others: &'static [u32],
    kernel: QueryKernel,
}

/// The first one is what the others are compared with. Single tokens go to the decode kernel unless they are told to take prefill's.
const PREFILL: [Way; 4] = [
    Way { chunk: TOKENS, others: &[], kernel: QueryKernel::Fastest },
    Way { chunk: 10, others: &[], kernel: QueryKernel::Fastest },
    Way { chunk: 19, others: &[1, 33, 1, 2], kernel: QueryKernel::Fastest },
    Way { chunk: 1, others: &[3], kernel: QueryKernel::Prefill },
];
const DECODE: [Way; 2] = [
    Way { chunk: 1, others: &[], kernel: QueryKernel::Fastest },
    Way { chunk: 1, others: &[1, 1, 9], kernel: QueryKernel::Fastest },
];

/// The bits of the results of all tokens.
fn results(gpu: &Gpu, case: &Case, way: Way) -> Vec<u32> {
    let rows = case.rows();
    let (cache, sequences) = case.fill(gpu, &rows);
    let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
    let others: Vec<SequenceId> = way.others.iter().map(|_| cache.create_sequence()).collect();
    let (q_row, kv_row) =
        ((case.config.num_q_heads * case.head_dim) as usize, (case.num_kv_heads * case.head_dim) as usize);
    let (context_len, query_len) = case.lens[0];
    let mut bits = Vec::new();
    let mut done = 0;
    while done < query_len {
        let new = way.chunk.min(query_len - done);
        // The sequence stands between the others.
        let mut batch: Vec<_> = others.iter().copied().zip(way.others.iter().copied()).collect();
        batch.insert(batch.len() / 2, (sequences[0], new));
        let (mut q, mut k, mut v, mut first) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for &(sequence, len) in &batch {
            if sequence == sequences[0] {
                first = q.len();
                let queries = done as usize..(done + len) as usize;
                let keys = (context_len + done) as usize * kv_row..(context_len + done + len) as usize * kv_row;
                q.extend_from_slice(&rows[0].q[queries.start * q_row..queries.end * q_row]);
                k.extend_from_slice(&rows[0].k[keys.clone()]);
                v.extend_from_slice(&rows[0].v[keys]);
            } else {
                q.extend((0..len as usize * q_row).map(|i| (i % 17) as f32 * 0.3 - 2.0));
                k.extend((0..len as usize * kv_row).map(|i| (i % 13) as f32 * 0.1));
                v.extend((0..len as usize * kv_row).map(|i| (i % 11) as f32));
            }
        }
        let step = cache.begin_step(&batch).expect("step");
        let plan = attention.plan_with_kernels(&step, &vec![way.kernel; batch.len()]).expect("plan");
        let out = upload(gpu, &vec![f32::NAN; q.len()]);
        let [q, k, v] = [q, k, v].map(|rows| upload(gpu, &rows));
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        cache.append(&mut encoder, &step, 0, &k, &v, None).expect("append");
        attention.attend(&mut encoder, &plan, 0, &q, &out).expect("attend");
        gpu.queue().submit([encoder.finish()]);
        cache.commit(step).expect("commit");
        let out: Vec<f32> = gpu.read_blocking(&out).expect("out");
        bits.extend(out[first..first + new as usize * q_row].iter().map(|x| x.to_bits()));
        done += new;
    }
    bits
}

#[track_caller]
fn check(how: Open, formats: (KvFormat, KvFormat), group_size: u32, block_size: u32) {
    check_with(how, formats, group_size, block_size, |_| {});
}

#[track_caller]
fn check_with(
    how: Open,
    formats: (KvFormat, KvFormat),
    group_size: u32,
    block_size: u32,
    options: impl Fn(&mut AttentionConfig),
) {
    let Some(gpu) = adapter::open(how) else { return };
    let mut case = Case::new(&[(context_len(how), TOKENS)], group_size, 1, 16);
    case = case.formats(formats.0, formats.1).block_size(block_size).config(|config| config.deterministic = true);
    // A sink joins a row's sum in two ways: at its end, or where states are merged.
    case.config.sinks = (group_size > 1).then(|| (0..group_size).map(|head| head as f32 - 1.5).collect());
    options(&mut case.config);
    // Room for the other sequences, which have up to 33 tokens a step.
    let most = (context_len(how) + TOKENS).div_ceil(block_size) + 40 * 5 * 33_u32.div_ceil(block_size);
    case.num_blocks = Some(most);
    for ways in [&PREFILL[..], &DECODE[..]] {
        let want = results(&gpu, &case, ways[0]);
        assert!(want.iter().all(|&bits| f32::from_bits(bits).is_finite()));
        for &way in &ways[1..] {
            let got = results(&gpu, &case, way);
            let differ = want.iter().zip(&got).filter(|(want, got)| want != got).count();
            assert!(got == want, "{differ} of {} differ: {way:?} {how:?}\n{case:?}", want.len());
        }
    }
}

/// Each format, group size and block size with some of the others.
#[test]
fn results_do_not_depend_on_the_batch() {
    for (i, formats) in FORMATS.into_iter().enumerate() {
        check([CPU, GPU][i % 2], formats, GROUP_SIZES[i % 4], BLOCK_SIZES[(i + i / 4) % 4]);
    }
}

/// With a window a chunk's keys begin where its first token's do, which single tokens of it don't see.
#[test]
fn results_with_windows_do_not_depend_on_the_batch() {
    for (how, formats, group_size, block_size) in
        [(GPU, (F32, F32), 4, 16), (CPU, (F32, F32), 4, 16), (GPU, (Int8, Int8), 8, 1)]
    {
        check_with(how, formats, group_size, block_size, |config| config.window = Some(29));
    }
    // The last tokens see both sides of where a range of keys ends, and the first ones don't.
    check_with(GPU, (F16, F16), 4, 8, |config| (config.window, config.sink_tokens) = (Some(75), 5));
}

/// All of them with all others, in both families: 224 combinations.
#[test]
#[ignore = "takes minutes on a CPU adapter"]
fn no_result_depends_on_the_batch() {
    for how in [CPU, GPU] {
        for formats in FORMATS {
            for group_size in GROUP_SIZES {
                for block_size in BLOCK_SIZES {
                    check(how, formats, group_size, block_size);
                }
            }
        }
    }
}

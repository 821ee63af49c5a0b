//! Queries, new rows and results that are halves, or columns of a matrix.

use folio::KvFormat::{E4M3, F16, F32, Int4PerChannel, Int8};
use folio::wgpu::{self, util::DeviceExt};
use folio::{
    AppendRows, Attention, AttentionConfig, Cascade, Gpu, HostRows, KvCache, KvCacheConfig, Rope, RopeConfig,
    RopeLayout, RowElement, RowLayout, StepRows,
};

use crate::adapter::{self, ALL, CPU, GPU};
use crate::case::{self, Case, option_of_four_heads};

/// Stands in the gaps between rows: no row may be read or written there.
const GAP: u32 = 0xffff_fffd;

/// Where an element lies, in elements.
fn place(rows: &HostRows, token: usize, head: usize, element: usize) -> usize {
    rows.start as usize + token * rows.token_stride as usize + head * rows.head_stride as usize + element
}

/// Every element of rows `[num_tokens, num_heads, row_dim]` with its place.
fn places(rows: &HostRows, num_elements: usize) -> impl Iterator<Item = usize> {
    let (num_heads, row_dim) = (rows.num_heads as usize, rows.row_dim as usize);
    let rows = *rows;
    (0..num_elements).map(move |i| place(&rows, i / row_dim / num_heads, i / row_dim % num_heads, i % row_dim))
}

fn write(rows: &HostRows, words: &mut [u32], place: usize, x: f32) {
    if rows.halves {
        let (bits, shift) = (u32::from(half::f16::from_f32(x).to_bits()), place % 2 * 16);
        words[place / 2] = words[place / 2] & !(0xffff << shift) | bits << shift;
    } else {
        words[place] = x.to_bits();
    }
}

fn num_tokens(rows: &HostRows, num_elements: usize) -> u32 {
    u32::try_from(num_elements).unwrap() / (rows.num_heads * rows.row_dim)
}

/// Rows `[num_tokens, num_heads, row_dim]` in their layout.
fn lay_out(rows: &HostRows, x: &[f32]) -> Vec<u32> {
    let mut words = vec![GAP; usize::try_from(rows.words(num_tokens(rows, x.len()))).unwrap()];
    places(rows, x.len()).zip(x).for_each(|(place, &x)| write(rows, &mut words, place, x));
    words
}

pub(crate) fn upload(gpu: &Gpu, rows: &HostRows, x: &[f32]) -> wgpu::Buffer {
    gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(&lay_out(rows, x)),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

/// The rows of a buffer, whose gaps must be as they were.
#[track_caller]
pub(crate) fn read(gpu: &Gpu, rows: &HostRows, buffer: &wgpu::Buffer) -> Vec<f32> {
    let bits: Vec<f32> = gpu.read_blocking(buffer).expect("rows");
    let words: Vec<u32> = bits.iter().map(|x| x.to_bits()).collect();
    let at = |place: usize| {
        if rows.halves {
            half::f16::from_bits((words[place / 2] >> (place % 2 * 16)) as u16).to_f32()
        } else {
            f32::from_bits(words[place])
        }
    };
    // The largest number of tokens whose rows end within the buffer.
    let tokens = (0..).take_while(|&tokens| rows.words(tokens) <= words.len() as u64).last().unwrap();
    let num_elements = (tokens * rows.num_heads * rows.row_dim) as usize;
    let x: Vec<f32> = places(rows, num_elements).map(at).collect();
    assert_eq!(words, lay_out(rows, &x), "something was written between the rows, {rows:?}");
    x
}

fn halves() -> RowLayout {
    RowLayout::DENSE.with_element(RowElement::F16)
}

/// Layouts of 4 heads of queries of 40 elements and of results of 24: halves, columns, heads apart.
fn layouts() -> [(RowLayout, RowLayout); 5] {
    [
        (halves(), RowLayout::DENSE),
        (RowLayout::DENSE, halves()),
        (RowLayout::DENSE.with_start(12).with_token_stride(280), RowLayout::DENSE.with_token_stride(100)),
        (
            halves().with_start(64).with_head_stride(120).with_token_stride(500),
            halves().with_start(4).with_token_stride(128),
        ),
        // [num_heads, 160 tokens, row]
        (
            RowLayout::DENSE.with_token_stride(40).with_head_stride(6400),
            halves().with_token_stride(24).with_head_stride(3840),
        ),
    ]
}

const MIXED: [(u32, u32); 4] = [(0, 19), (37, 6), (90, 1), (301, 1)];

#[test]
fn layouts_of_queries_and_results() {
    for (i, (q, out)) in layouts().into_iter().enumerate() {
        // A kernel compiles for seconds: the one with everything in all families, the others in one.
        for (j, how) in ALL.into_iter().enumerate().filter(|(j, _)| i == 3 || *j == i % 2) {
            let Some(gpu) = adapter::open(how) else { return };
            let (k, v) = [(F32, F32), (Int8, F16), (Int4PerChannel, E4M3)][(i + j) % 3];
            let case = Case::new(&MIXED, 4, 2, 40).value_dim(24).formats(k, v).named(format!("{how:?} {i}"));
            case.config(|config| (config.q_rows, config.out_rows, config.lse) = (q, out, i % 2 == 0)).check(&gpu);
        }
    }
}

#[test]
fn with_all_options() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let (q, out) = layouts()[3];
        let case = Case::new(&MIXED, 4, 1, 40).value_dim(24).formats(F16, F16).named(format!("{how:?}"));
        case.config(|config| option_of_four_heads(config, 7))
            .config(|config| (config.q_rows, config.out_rows) = (q, out))
            .check(&gpu);
    }
}

/// Merged rows are stored by another kernel, and runs of shared blocks list their tokens.
#[test]
fn split_and_shared() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let mut case = Case::new(&[(2000, 1), (2100, 1), (1990, 3)], 4, 2, 40).value_dim(24).formats(F16, F16);
        (case.config.q_rows, case.config.out_rows) = layouts()[3];
        case.clone().config(|config| config.deterministic = true).check(&gpu);
        case.prefix = 1900;
        case.config(|config| config.cascade = Cascade::Always).check(&gpu);
    }
}

/// Layouts change where rows lie and nothing else: f32 results have the same bits.
#[test]
fn the_same_bits_wherever_rows_lie() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&MIXED, 4, 2, 40).value_dim(24).formats(F16, F16);
        let bits = |case: &Case| -> Vec<u32> { case.run(&gpu, &case.rows()).0.iter().map(|x| x.to_bits()).collect() };
        let (q, out) = layouts()[2];
        let elsewhere = case.clone().config(|config| (config.q_rows, config.out_rows) = (q, out));
        assert_eq!(bits(&case), bits(&elsewhere), "{how:?}");
    }
}

/// Results that no half can hold become the largest one.
#[test]
fn large_results_saturate() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&[(0, 3), (20, 1)], 2, 1, 16).config(|config| config.out_rows = halves());
        let mut rows = case.rows();
        rows.iter_mut().for_each(|rows| rows.v.iter_mut().for_each(|x| *x = x.signum() * 1e6));
        rows[0].v.iter_mut().for_each(|x| *x = -1e6);
        let (out, _) = case.run(&gpu, &rows);
        assert!(out[..3 * 2 * 16].iter().all(|&x| x == -65504.0), "{out:?}");
        case.compare(&gpu, &rows, &out, None);
    }
}

/// A packed matrix goes in as it is: the queries are rotated and attended with where they lie, keys and values are appended from there.
#[test]
fn a_packed_matrix() {
    let layouts = [RopeLayout::HalfSplit, RopeLayout::Interleaved];
    for (i, (how, element)) in ALL
        .into_iter()
        .zip([RowElement::F32, RowElement::F16].into_iter().cycle())
        .chain([(CPU, RowElement::F32)])
        .enumerate()
    {
        let Some(gpu) = adapter::open(how) else { return };
        let (num_q_heads, num_kv_heads, head_dim, rotary_dim) = (4, 2, 48, 32);
        let (k_format, v_format) = [(F32, F32), (F16, Int8)][i % 2];
        let mut config =
            KvCacheConfig::new(1, num_kv_heads, head_dim).with_blocks(16, 8).with_formats(k_format, v_format);
        if i == 2 {
            config = config.with_value_dim(24);
        }
        let value_dim = config.value_dim();
        let mut rope = RopeConfig::new(rotary_dim, 10_000.0);
        rope.layout = layouts[i % 2];
        let step_rows = StepRows::packed(&config, num_q_heads).with_element(element);
        let resolved = [
            step_rows.q.resolve(num_q_heads, head_dim),
            step_rows.k.resolve(num_kv_heads, head_dim),
            step_rows.v.resolve(num_kv_heads, value_dim),
        ];
        // The rows of three matrices, and the same packed. (Halves can hold all of these.)
        let mut rng = fastrand::Rng::with_seed(i as u64);
        let num_tokens = 11;
        let dense = resolved.map(|rows| {
            let len = num_tokens * rows.num_heads * rows.row_dim;
            (0..len).map(|_| (rng.f32() * 4096.0 - 2048.0).round() / 1024.0).collect::<Vec<f32>>()
        });
        let num_words = resolved.iter().map(|rows| rows.words(num_tokens)).max().unwrap();
        let mut words = vec![GAP; usize::try_from(num_words).unwrap()];
        for (rows, x) in resolved.iter().zip(&dense) {
            places(rows, x.len()).zip(x).for_each(|(place, &x)| write(rows, &mut words, place, x));
        }
        let attention = |layout| {
            let mut attention = AttentionConfig::new(num_q_heads);
            attention.q_rows = layout;
            attention
        };
        let results = [true, false].map(|packed| {
            let cache = KvCache::new_blocking(&gpu, config).expect("cache");
            let sequences = [cache.create_sequence(), cache.create_sequence()];
            let step = cache.begin_step(&[(sequences[0], 7), (sequences[1], 4)]).expect("step");
            let layout = if packed { step_rows.q } else { RowLayout::DENSE };
            let attention = Attention::new_blocking(&cache, attention(layout)).expect("attention");
            let plan = attention.plan(&step).expect("plan");
            let out = case::upload(&gpu, &vec![f32::NAN; (num_tokens * num_q_heads * value_dim) as usize]);
            let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let q = if packed {
                let kernel =
                    AppendRows::new_blocking(&cache, step_rows, num_q_heads, Some(rope.clone())).expect("kernels");
                kernel.warm_up().expect("warm-up");
                let bits: Vec<f32> = words.iter().map(|&word| f32::from_bits(word)).collect();
                let matrix = case::upload(&gpu, &bits);
                kernel.rotate(&mut encoder, &step, &matrix).expect("rotate");
                cache.append_rows(&mut encoder, &step, 0, &kernel, &matrix, Some((&matrix).into())).expect("append");
                attention.attend(&mut encoder, &plan, 0, &matrix, &out).expect("attend");
                matrix
            } else {
                let kernel = Rope::new_blocking(&cache, rope.clone()).expect("rope");
                let [q, k, v] = [&dense[0], &dense[1], &dense[2]].map(|x| case::upload(&gpu, x));
                kernel.rotate(&mut encoder, &step, &q, num_q_heads).expect("rotate");
                cache.append(&mut encoder, &step, 0, &k, &v, Some(&kernel)).expect("append");
                attention.attend(&mut encoder, &plan, 0, &q, &out).expect("attend");
                q
            };
            gpu.queue().submit([encoder.finish()]);
            cache.commit(step).expect("commit");
            let rows = sequences.map(|sequence| cache.gather_blocking(sequence, 0).expect("rows"));
            (rows, gpu.read_blocking(&out).expect("out"), gpu.read_blocking(&q).expect("q"))
        });
        let [packed, dense_results] = results;
        // Keys are rotated in f32 and rounded once, however they come.
        assert_eq!(packed.0, dense_results.0, "{how:?} {element:?}");
        if element == RowElement::F32 {
            assert_eq!(packed.1, dense_results.1, "{how:?}");
        }
        // Rotated queries lie where they lay, and nothing beside them has changed.
        let after: Vec<u32> = packed.2.iter().map(|x| x.to_bits()).collect();
        let mut expected = words.clone();
        places(&resolved[0], dense[0].len())
            .zip(&dense_results.2)
            .for_each(|(place, &x)| write(&resolved[0], &mut expected, place, x));
        assert_eq!(after, expected, "{how:?} {element:?}");
    }
}

/// Latents are one row a token, and that row may be a column too.
#[test]
fn a_column_of_latents() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&[(20, 5), (33, 1)], 4, 1, 40).formats(F16, F16).latent(32);
        let rows = case.rows();
        let (cache, sequences) = case.fill(&gpu, &rows);
        let attention = Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        let step = cache.begin_step(&[(sequences[0], 5), (sequences[1], 1)]).expect("step");
        let layout = halves().with_start(8).with_token_stride(64);
        let step_rows = {
            let mut rows = StepRows::default();
            rows.k = layout;
            rows
        };
        let kernel = AppendRows::new_blocking(&cache, step_rows, 4, None).expect("kernels");
        let k: Vec<f32> = [&rows[0].k[20 * 40..], &rows[1].k[33 * 40..]].concat();
        let (out, _) = case.attend_step(&gpu, &attention, &step, 0, &rows, |pass, _, _| {
            let k = upload(&gpu, &layout.resolve(1, 40), &k);
            cache.append_rows(pass, &step, 0, &kernel, &k, None).expect("append");
        });
        cache.commit(step).expect("commit");
        // (An F16 cache rounds f32 to the same halves.)
        case.compare(&gpu, &rows, &out, None);
    }
}

#[test]
fn bad_layouts() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let cache = KvCache::new_blocking(&gpu, KvCacheConfig::new(1, 2, 16).with_blocks(4, 8)).expect("cache");
    let with = |change: fn(&mut AttentionConfig)| {
        let mut config = AttentionConfig::new(4);
        change(&mut config);
        Attention::new_blocking(&cache, config)
    };
    let message = |error: folio::Error| error.to_string();
    let error = message(with(|config| config.q_rows = RowLayout::DENSE.with_start(6)).unwrap_err());
    assert!(error.contains("q_rows") && error.contains("multiples of 4"), "{error}");
    let error = message(with(|config| config.out_rows = RowLayout::DENSE.with_head_stride(8)).unwrap_err());
    assert!(error.contains("out_rows") && error.contains("overlap"), "{error}");

    // Heads before tokens, with room for 3 of these.
    let attention = with(|config| config.out_rows = RowLayout::DENSE.with_token_stride(16).with_head_stride(48))
        .expect("attention");
    let sequence = cache.create_sequence();
    let step = cache.begin_step(&[(sequence, 4)]).expect("step");
    let plan = attention.plan(&step).expect("plan");
    let rows = |len: usize| case::upload(&gpu, &vec![0.0; len]);
    let (q, out) = (rows(4 * 4 * 16), rows(1000));
    let record = |q: &wgpu::Buffer, out: &wgpu::Buffer| {
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        attention.attend(&mut encoder, &plan, 0, q, out)
    };
    let error = message(record(&q, &out).unwrap_err());
    assert!(error.contains("out") && error.contains("overlap"), "{error}");

    // A matrix that ends too early, and kernels of another cache.
    let packed = StepRows::packed(cache.config(), 4);
    let kernel = AppendRows::new_blocking(&cache, packed, 4, None).expect("kernels");
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let matrix = rows(4 * 8 * 16 - 4);
    let result = cache.append_rows(&mut encoder, &step, 0, &kernel, &matrix, Some((&matrix).into()));
    let error = message(result.unwrap_err());
    assert!(error.contains('v') && error.contains("at least"), "{error}");
    let error = message(cache.append_rows(&mut encoder, &step, 0, &kernel, &matrix, None).unwrap_err());
    assert!(error.contains('v') && error.contains("none"), "{error}");
    let error = message(kernel.rotate(&mut encoder, &step, &matrix).unwrap_err());
    assert!(error.contains("rope"), "{error}");
    let other = KvCache::new_blocking(&gpu, KvCacheConfig::new(1, 2, 32).with_blocks(4, 8)).expect("cache");
    let kernel = AppendRows::new_blocking(&other, packed, 4, None).expect("kernels");
    let error =
        message(cache.append_rows(&mut encoder, &step, 0, &kernel, &matrix, Some((&matrix).into())).unwrap_err());
    assert!(error.contains("kernel"), "{error}");

    // Halves of which two invocations would share a word.
    let rope = RopeConfig::new(12, 10_000.0);
    let halves = packed.with_element(RowElement::F16);
    let error = message(AppendRows::new_blocking(&cache, halves, 4, Some(rope)).unwrap_err());
    assert!(error.contains("rotary_dim"), "{error}");
    let error = message(AppendRows::new_blocking(&cache, packed, 3, None).unwrap_err());
    assert!(error.contains("num_q_heads"), "{error}");
}

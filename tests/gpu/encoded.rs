//! Attention over a cache whose bytes the test has written by itself: what the kernels read is held to the documented
//! layout and codes, whatever the append kernel does.

use crate::common::with;
use fastrand::Rng;
use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
use folio::KvLayout;
use folio::reference::quantise::Stored;
use folio::reference::{ErrorModel, Options, Problem, attention_with_bound, compare};
use folio::{Attention, AttentionConfig, Gpu, KvCache, KvCacheConfig, wgpu};

use crate::adapter::{self, CPU, GPU, GPU_PLAIN, Open};
use crate::case::{shuffle, upload};

/// Formats of V.
const V_FORMATS: [KvFormat; 5] = [F32, F16, E4M3, Int8, Int4];
/// num_kv_heads, group_size, head_dim, block_size: the groups beyond 8 are for prefill alone. Neighbours have rows of 16 bytes and less in every
/// format.
const SHAPES: [(u32, u32, u32, u32); 9] = [
    (2, 4, 128, 16),
    (3, 1, 8, 5),
    (1, 8, 64, 16),
    (2, 32, 24, 5),
    (1, 1, 256, 1),
    (2, 4, 72, 5),
    (1, 8, 256, 16),
    (3, 4, 24, 1),
    (1, 2, 64, 5),
];

/// One side of the pool as bytes, and what its rows mean.
struct Side {
    layout: KvLayout,
    bytes: Vec<u8>,
    /// Scales per channel, then zero points: `[2, num_kv_heads, head_dim]`.
    channels: Vec<f32>,
}

impl Side {
    /// A side in which every row and every scale is NaN, and random channel scales.
    fn poisoned(layout: KvLayout, num_blocks: u32, rng: &mut Rng) -> Self {
        let len = layout.side_bytes(num_blocks).expect("small") as usize;
        let mut bytes = vec![0xff; len];
        let plane = if layout.channel_table_bytes() > 0 { (layout.num_kv_heads * layout.row_dim) as usize } else { 0 };
        let mut channels: Vec<f32> = (0..plane).map(|_| (0.5 + rng.f32()) * 3.0 / levels(layout.format)).collect();
        channels.extend((0..plane).map(|_| -2.0 + rng.f32()));
        let table = bytes.len() - channels.len() * 4;
        bytes[table..].copy_from_slice(bytemuck::cast_slice(&channels));
        Self { layout, bytes, channels }
    }

    /// Writes random elements into the row of a token and head, and returns what they mean.
    fn fill_row(&mut self, block: u32, kv_head: u32, slot: u32, rng: &mut Rng) -> Stored {
        let (format, dims) = (self.layout.format, self.layout.row_dim as usize);
        let at = self.layout.row_offset(block, kv_head, slot) as usize;
        let row_bytes = self.layout.row_bytes() as usize;
        let row = &mut self.bytes[at..at + row_bytes];
        let uniform = |rng: &mut Rng| 4.0 * rng.f32() - 2.0;
        let codes: Vec<u32> = match format {
            F32 => {
                let values: Vec<f32> = (0..dims).map(|_| uniform(rng)).collect();
                row.copy_from_slice(bytemuck::cast_slice(&values));
                return Stored::from_values(&values);
            }
            F16 => {
                let values: Vec<half::f16> = (0..dims).map(|_| half::f16::from_f32(uniform(rng))).collect();
                // Some old adapters flush subnormal halves: none is here.
                let bits: Vec<u16> = values.iter().map(|x| x.to_bits()).collect();
                row.copy_from_slice(bytemuck::cast_slice(&bits));
                return Stored::from_values(&values.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
            }
            E4M3 => {
                // Up to 1.875, subnormals and both zeros among them; now and then the largest.
                let bytes: Vec<u8> = (0..dims)
                    .map(|_| if rng.u32(0..500) == 0 { 0x7e } else { rng.u8(0..0x40) } | rng.u8(0..2) << 7)
                    .collect();
                row.copy_from_slice(&bytes);
                return Stored::from_values(&bytes.into_iter().map(e4m3).collect::<Vec<_>>());
            }
            Int8 | Int8PerChannel => {
                let codes: Vec<u8> = (0..dims).map(|_| rng.u8(..)).collect();
                row.copy_from_slice(&codes);
                codes.into_iter().map(u32::from).collect()
            }
            _ => {
                let codes: Vec<u8> = (0..dims).map(|_| rng.u8(0..16)).collect();
                // Byte i of a word has dim i in its lower and dim 4 + i in its upper half.
                for (word, codes) in row.chunks_exact_mut(4).zip(codes.chunks_exact(8)) {
                    (0..4).for_each(|i| word[i] = codes[i] | codes[4 + i] << 4);
                }
                codes.into_iter().map(u32::from).collect()
            }
        };
        if let Some(offset) = self.layout.row_scale_offset(block, kv_head, slot) {
            // Wide and narrow rows, and now and then a constant one.
            let width = [4.0, 0.25, 8.0, 0.0][rng.usize(0..4)] * rng.f32();
            let scale = bf16(width / levels(format));
            let zero_point = bf16(uniform(rng) - width / 2.0);
            let word = scale.to_bits() >> 16 | zero_point.to_bits();
            self.bytes[offset as usize..][..4].copy_from_slice(&word.to_le_bytes());
            return Stored::from_codes(vec![scale; dims], vec![zero_point; dims], &codes).expect("a row");
        }
        let (scales, zero_points) = self.channels.split_at(self.channels.len() / 2);
        let head = kv_head as usize * dims..(kv_head as usize + 1) * dims;
        Stored::from_codes(scales[head.clone()].to_vec(), zero_points[head].to_vec(), &codes).expect("a row")
    }
}

/// The largest code.
fn levels(format: KvFormat) -> f32 {
    if format.element_bits() == 8 { 255.0 } else { 15.0 }
}

/// `x` with the lower half of its bits dropped.
fn bf16(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0xffff_0000)
}

/// A byte as OCP E4M3 says; no NaN.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let value = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * (exponent as f32 - 7.0).exp2() };
    if byte & 0x80 == 0 { value } else { -value }
}

#[track_caller]
fn check(how: Open, (num_kv_heads, group_size, head_dim, block_size): (u32, u32, u32, u32), formats: [KvFormat; 2]) {
    let Some(gpu) = adapter::open(how) else { return };
    // Single keys, ranges that are split, and more than one query.
    let lens = [(0, 1), (31, 1), (613, 1), (9, 6), (520, 3)];
    let [k_format, v_format] = formats;
    let blocks: u32 = lens.iter().map(|(context, new): &(u32, u32)| (context + new).div_ceil(block_size)).sum();
    let num_blocks = blocks + 3;
    let config = KvCacheConfig::new(1, num_kv_heads, head_dim)
        .with_blocks(num_blocks, block_size)
        .with_formats(k_format, v_format);
    let cache = KvCache::new_blocking(&gpu, config).expect("cache");
    let num_q_heads = num_kv_heads * group_size;
    // The lse shows what `out` does not: an error that all keys share.
    let attention = with(AttentionConfig::new(num_q_heads), |c| c.lse = true);
    let attention = Attention::new_blocking(&cache, attention).expect("attention");
    let mut rng = Rng::with_seed(u64::from(head_dim));

    shuffle(&cache, 1);
    let sequences = lens.map(|(context_len, _)| {
        let sequence = cache.create_sequence();
        if context_len > 0 {
            cache.commit(cache.begin_step(&[(sequence, context_len)]).expect("step")).expect("commit");
        }
        sequence
    });
    let batch: Vec<_> = sequences.into_iter().zip(lens.map(|(_, new)| new)).collect();
    let step = cache.begin_step(&batch).expect("step");
    let plan = attention.plan(&step).expect("plan");
    let num_q = |new: u32| (new * num_q_heads * head_dim) as usize;
    let q: Vec<f32> = (0..num_q(lens.iter().map(|l| l.1).sum())).map(|_| 2.0 * rng.f32() - 1.0).collect();
    let (q_buffer, out) = (upload(&gpu, &q), upload(&gpu, &vec![f32::NAN; q.len()]));
    let lse = upload(&gpu, &vec![f32::NAN; q.len() / head_dim as usize]);
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        attention.attend_with_lse(&mut pass, &plan, 0, &q_buffer, &out, &lse).expect("attend");
    }
    cache.commit(step).expect("commit");

    let mut k = Side::poisoned(config.k_layout(), num_blocks, &mut rng);
    let mut v = Side::poisoned(config.v_layout(), num_blocks, &mut rng);
    let rows = sequences.map(|sequence| {
        let table = cache.block_table(sequence).expect("table");
        let (mut k_rows, mut v_rows) = (Stored::from_values(&[]), Stored::from_values(&[]));
        for token in 0..cache.seq_len(sequence).expect("length") {
            let (block, slot) = (table[(token / block_size) as usize].index(), token % block_size);
            for kv_head in 0..num_kv_heads {
                k_rows.append(k.fill_row(block, kv_head, slot, &mut rng));
                v_rows.append(v.fill_row(block, kv_head, slot, &mut rng));
            }
        }
        (k_rows, v_rows)
    });
    let (k_buffers, v_buffers) = cache.layer_buffers(0).expect("layer");
    for (buffers, side) in [(k_buffers, &k), (v_buffers, &v)] {
        assert_eq!((buffers.len(), buffers[0].size()), (1, side.bytes.len() as u64));
        gpu.queue().write_buffer(&buffers[0], 0, &side.bytes);
    }
    gpu.queue().submit([encoder.finish()]);
    let (out, lse) = (gpu.read_blocking(&out).expect("out"), gpu.read_blocking(&lse).expect("lse"));

    let mut at = 0;
    for (i, ((_, new), (k_rows, v_rows))) in lens.into_iter().zip(&rows).enumerate() {
        let here = at..at + num_q(new);
        at = here.end;
        let [k_values, v_values] =
            [k_rows, v_rows].map(|stored| stored.values.iter().map(|&x| x as f32).collect::<Vec<_>>());
        let problem = Problem {
            num_q_heads: num_q_heads as usize,
            num_kv_heads: num_kv_heads as usize,
            head_dim: head_dim as usize,
            value_dim: head_dim as usize,
            q: &q[here.clone()],
            k: &k_values,
            v: &v_values,
            options: Options::default(),
        };
        let errors = ErrorModel::F32.with_stored(k_rows, v_rows).over_stored();
        let expected = attention_with_bound(&problem, &errors).expect("a problem");
        let lse_here = here.start / head_dim as usize..here.end / head_dim as usize;
        for comparison in [compare::out(&expected, &out[here]), compare::lse(&expected, &lse[lse_here])] {
            let shape = (num_kv_heads, group_size, head_dim, block_size);
            assert!(comparison.is_within(), "sequence {i} of {shape:?} {k_format} {v_format} {how:?}: {comparison}");
        }
    }
    assert_eq!(at, out.len());
}

/// Those that read the formats differently.
const FAMILIES: [Open; 3] = [GPU, GPU_PLAIN, CPU];

/// A format of K with every format of V, each pair with other shapes; the families in turn.
fn check_k(k_format: KvFormat, first: usize) {
    for (i, v_format) in V_FORMATS.into_iter().enumerate() {
        let how = FAMILIES[(first + i) % FAMILIES.len()];
        check(how, SHAPES[(first + 2 * i) % SHAPES.len()], [k_format, v_format]);
    }
}

#[test]
fn f32_keys() {
    check_k(F32, 0);
}

#[test]
fn f16_keys() {
    check_k(F16, 1);
}

#[test]
fn e4m3_keys() {
    check_k(E4M3, 2);
}

#[test]
fn int8_keys() {
    check_k(Int8, 3);
}

#[test]
fn int4_keys() {
    check_k(Int4, 4);
}

#[test]
fn int8_keys_with_channel_scales() {
    check_k(Int8PerChannel, 5);
}

#[test]
fn int4_keys_with_channel_scales() {
    check_k(Int4PerChannel, 6);
}

/// Every head_dim with the same formats, which have all that is special about scales.
#[test]
fn every_shape() {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        let formats = [[Int4, Int4], [Int8PerChannel, Int8], [Int8, Int4], [Int4PerChannel, E4M3]][i % 4];
        check(FAMILIES[(i + 1) % FAMILIES.len()], shape, formats);
    }
}

/// Every byte, through values: keys are equal, so that the output is the mean of two values.
#[test]
fn every_e4m3_byte_is_read_exactly() {
    for how in FAMILIES {
        let Some(gpu) = adapter::open(how) else { return };
        for bytes in [0..128_u32, 128..256] {
            let row: Vec<u8> = bytes.map(|byte| byte as u8).collect();
            let got = first_value(&gpu, &row);
            for (&byte, got) in row.iter().zip(got) {
                if byte & 0x7f == 0x7f {
                    assert!(got.is_nan(), "{byte:#x}: {got}");
                } else {
                    assert!(got == e4m3(byte), "{byte:#x}: {got}");
                }
            }
        }
    }
}

/// What attention gives over a single key: its value, of 128 dims.
fn first_value(gpu: &Gpu, row: &[u8]) -> Vec<f32> {
    let config = KvCacheConfig::new(1, 1, 128).with_blocks(1, 1).with_formats(F32, E4M3);
    let cache = KvCache::new_blocking(gpu, config).expect("cache");
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(1)).expect("attention");
    let sequence = cache.create_sequence();
    let step = cache.begin_step(&[(sequence, 1)]).expect("step");
    let plan = attention.plan(&step).expect("plan");
    let (q, out) = (upload(gpu, &[0.0; 128]), upload(gpu, &[9.0; 128]));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    attention.attend(&mut encoder, &plan, 0, &q, &out).expect("attend");
    let (k, v) = cache.layer_buffers(0).expect("layer");
    gpu.queue().write_buffer(&k[0], 0, &[0; 512]);
    gpu.queue().write_buffer(&v[0], 0, row);
    gpu.queue().submit([encoder.finish()]);
    cache.commit(step).expect("commit");
    gpu.read_blocking(&out).expect("out")
}

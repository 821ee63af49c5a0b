//! The bounds of the formats with scales, against `f32` kernels over codes that are made in `f32` like the append kernel's.

use fastrand::Rng;

use super::*;
use crate::KvFormat::{self, Int4, Int4PerChannel, Int8, Int8PerChannel};

const PAIRS: [(KvFormat, KvFormat); 4] = [(Int8, Int8), (Int4, Int4), (Int8PerChannel, Int8), (Int4PerChannel, Int4)];

/// One side of a cache, with a scale, zero point and code for every element.
#[derive(Clone)]
struct Coded {
    scales: Vec<f32>,
    zero_points: Vec<f32>,
    codes: Vec<u32>,
    /// Elements that have a scale together: a row, or one.
    is_row_scaled: bool,
}

fn levels(format: KvFormat) -> f32 {
    if format.element_bits() == 4 { 15.0 } else { 255.0 }
}

/// In halves, as differences of finite numbers may overflow.
fn code(x: f32, scale: f32, zero_point: f32, levels: f32) -> u32 {
    let place = (0.5 * x - 0.5 * zero_point) / (0.5 * scale);
    if scale == 0.0 { 0 } else { (place + 0.5).floor().clamp(0.0, levels) as u32 }
}

impl Coded {
    /// As `shaders/append.wgsl` stores rows.
    fn new(format: KvFormat, rows: &[f32], head_dim: usize, table: Option<&[f32]>) -> Self {
        let (levels, is_row_scaled) = (levels(format), format.has_row_scales());
        let mut coded = Self { scales: vec![], zero_points: vec![], codes: vec![], is_row_scaled };
        for (i, row) in rows.chunks(head_dim).enumerate() {
            let most = f32::from_bits(0x7f7b_0000);
            let min = row.iter().copied().fold(f32::INFINITY, f32::min).clamp(-most, most);
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max).clamp(-most, most);
            let down = if min.is_sign_negative() { 0xffff } else { 0 };
            let zero_point = f32::from_bits((min.to_bits() + down) & 0xffff_0000);
            let exact = ((0.5 * max - 0.5 * zero_point) * (2.0 / levels)).max(2.0_f32.powi(-118));
            let scale = f32::from_bits(((exact - exact * 2.0_f32.powi(-20)).to_bits() + 0xffff) & 0xffff_0000);
            for (dim, &x) in row.iter().enumerate() {
                let (scale, zero_point) = table.map_or((scale, zero_point), |table| {
                    let (scales, zero_points) = table.split_at(table.len() / 2);
                    let channel = (i * head_dim + dim) % scales.len();
                    (scales[channel], zero_points[channel])
                });
                coded.codes.push(code(x, scale, zero_point, levels));
                coded.scales.push(scale);
                coded.zero_points.push(zero_point);
            }
        }
        coded
    }
}

/// Scales that cover all of `keys`.
fn table_of(format: KvFormat, keys: &[f32], channels: usize) -> Option<Vec<f32>> {
    let of = |channel| keys.iter().skip(channel).step_by(channels).copied();
    let min = |channel| of(channel).fold(f32::INFINITY, f32::min);
    let scale = |channel| (of(channel).fold(f32::NEG_INFINITY, f32::max) - min(channel)) / levels(format);
    format.has_channel_scales().then(|| (0..channels).map(scale).chain((0..channels).map(min)).collect())
}

/// Whether a kernel computes elements, or applies scales and zero points to sums over codes.
#[derive(Clone, Copy, PartialEq)]
enum Reads {
    Elements,
    Codes,
}

/// Causal attention in `f32` over coded rows: online softmax in log2 units, a partial state for each split.
fn kernel(case: &Case, [k, v]: [&Coded; 2], split_len: usize, reads: Reads) -> (Vec<f32>, Vec<f32>) {
    let problem = case.problem();
    let checked = Checked::new(&problem).expect("a valid problem");
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    let d = case.head_dim;
    let scale = checked.softmax_scale as f32 * std::f32::consts::LOG2_E;
    for (token, q_head) in (0..checked.query_len).flat_map(|token| (0..case.num_q_heads).map(move |head| (token, head)))
    {
        let kv_head = q_head / checked.group_size;
        let q: Vec<f32> = checked.query_row(token, q_head).iter().map(|q| q * scale).collect();
        let q_sum: f32 = q.iter().sum();
        let visible: Vec<usize> = (0..checked.seq_len).filter(|&pos| checked.is_visible(token, pos)).collect();
        // Maximum, sum of the weights, sums of weighted values, sum of weighted zero points.
        let mut states = Vec::new();
        for split in visible.chunks(split_len) {
            let (mut max, mut sum, mut acc, mut zero_acc) = (-1e30_f32, 0.0_f32, vec![0.0_f32; d], 0.0_f32);
            for &pos in split {
                let row = checked.row_start(pos, kv_head, d)..checked.row_start(pos, kv_head, d) + d;
                let element = |side: &Coded, i: usize| side.zero_points[i] + side.scales[i] * side.codes[i] as f32;
                let s: f32 = match reads {
                    Reads::Elements => q.iter().zip(row.clone()).map(|(q, i)| q * element(k, i)).sum(),
                    Reads::Codes if k.is_row_scaled => {
                        let product: f32 = q.iter().zip(row.clone()).map(|(q, i)| q * k.codes[i] as f32).sum();
                        product * k.scales[row.start] + k.zero_points[row.start] * q_sum
                    }
                    Reads::Codes => {
                        let offset: f32 = q.iter().zip(row.clone()).map(|(q, i)| q * k.zero_points[i]).sum();
                        let codes = row.clone().map(|i| (k.scales[i], k.codes[i] as f32));
                        q.iter().zip(codes).fold(offset, |sum, (q, (scale, code))| sum + (q * scale) * code)
                    }
                };
                let new_max = s.max(max);
                let (old, p) = ((max - new_max).exp2(), (s - new_max).exp2());
                sum = sum * old + p;
                for (acc, i) in acc.iter_mut().zip(row.clone()) {
                    let term = match reads {
                        Reads::Elements => p * element(v, i),
                        Reads::Codes => (p * v.scales[i]) * v.codes[i] as f32,
                    };
                    *acc = *acc * old + term;
                }
                zero_acc = zero_acc * old + p * v.zero_points[row.start];
                max = new_max;
            }
            if reads == Reads::Codes {
                acc.iter_mut().for_each(|acc| *acc += zero_acc);
            }
            states.push((max, sum, acc));
        }
        let max = states.iter().map(|state| state.0).fold(-1e30, f32::max);
        let sum: f32 = states.iter().map(|state| state.1 * (state.0 - max).exp2()).sum();
        for dim in 0..d {
            out.push(states.iter().map(|state| state.2[dim] * (state.0 - max).exp2()).sum::<f32>() / sum);
        }
        lse.push((max + sum.log2()) * std::f32::consts::LN_2);
    }
    (out, lse)
}

/// Rows that scales find hard.
const KINDS: [&str; 8] = ["normal", "outliers", "constant", "denormal", "offset", "tiny", "ends", "mixed"];

fn hard_rows(kind: &str, num_rows: usize, head_dim: usize, rng: &mut Rng) -> Vec<f32> {
    let mut rows = Vec::new();
    for _ in 0..num_rows {
        let kind = if kind == "mixed" { KINDS[rng.usize(0..7)] } else { kind };
        let constant = [1.5, 1.001, -123.456, 0.0][rng.usize(0..4)];
        let outlier = rng.usize(0..head_dim);
        for dim in 0..head_dim {
            let x = (0..4).map(|_| rng.f32() - 0.5).sum::<f32>() * 1.732;
            rows.push(match kind {
                "outliers" if dim == outlier => 1e6 * x.signum(),
                "constant" => constant,
                "denormal" => x * 1e-40,
                "offset" => 1000.0 + 0.01 * x,
                "tiny" => x * 1e-30,
                // The middle of two codes, and next to it.
                "ends" => [0.0, 255.0, 254.5, 127.5, 0.499_999, 1.0, 15.0, 7.5][dim % 8] / 64.0,
                _ => x,
            });
        }
    }
    rows
}

/// A case of two query heads over one KV head, its table of key scales, and its codes.
fn coded_case(
    (k_format, v_format): (KvFormat, KvFormat),
    (head_dim, seq_len): (usize, usize),
    kind: &str,
    seed: u64,
) -> (Case, Option<Vec<f32>>, [Coded; 2]) {
    let rng = &mut Rng::with_seed(seed);
    let mut case = Case::random((2, 1), head_dim, 2.min(seq_len), seq_len, seed);
    case.k = hard_rows(kind, seq_len, head_dim, rng);
    case.v = hard_rows(kind, seq_len, head_dim, rng);
    let table = table_of(k_format, &case.k, head_dim);
    let k = Coded::new(k_format, &case.k, head_dim, table.as_deref());
    let v = Coded::new(v_format, &case.v, head_dim, None);
    (case, table, [k, v])
}

fn model<'a>((k_format, v_format): (KvFormat, KvFormat), table: Option<&'a [f32]>) -> ErrorModel<'a> {
    let model = ErrorModel::new(k_format, v_format);
    table.map_or(model, |table| model.with_key_scales(table))
}

#[test]
fn sound_kernels_are_within_the_bound_on_hard_rows() {
    for (i, formats) in PAIRS.into_iter().enumerate() {
        for (j, kind) in KINDS.into_iter().enumerate() {
            for (head_dim, seq_len) in [(8, 1), (64, 37), (128, 300), (24, 2000)] {
                let seed = (1000 * i + 10 * j + head_dim) as u64;
                let (case, table, [k, v]) = coded_case(formats, (head_dim, seq_len), kind, seed);
                let model = model(formats, table.as_deref());
                // Rows that are all alike, or have the same zero point, round alike.
                let model = if ["constant", "offset"].contains(&kind) {
                    model.with_rounding(Rounding::Coherent)
                } else {
                    model
                };
                for (model, what) in [(model.over_stored(), "stored"), (model, "given")] {
                    let expected = case.bounded(model);
                    for (split_len, reads) in [(64, Reads::Codes), (4096, Reads::Codes), (512, Reads::Elements)] {
                        let (out, lse) = kernel(&case, [&k, &v], split_len, reads);
                        for comparison in [compare::out(&expected, &out), compare::lse(&expected, &lse)] {
                            let shape = (head_dim, seq_len, split_len);
                            assert!(comparison.is_within(), "{formats:?} {kind} {what} {shape:?}: {comparison}");
                        }
                    }
                }
            }
        }
    }
}

/// What may be wrong with one row of a cache.
#[derive(Clone, Copy, Debug)]
enum Fault {
    ZeroPoint,
    SwappedCodes,
    Scale,
}

impl Fault {
    fn spoil(self, side: &mut Coded, row: std::ops::Range<usize>) {
        match self {
            // By what one code is worth.
            Self::ZeroPoint => row.for_each(|i| side.zero_points[i] += side.scales[i]),
            Self::Scale => row.for_each(|i| side.scales[i] *= 1.01),
            Self::SwappedCodes => {
                // The two nibbles of a byte, which are four elements apart.
                let far = row.clone().take(4).max_by_key(|&i| side.codes[i].abs_diff(side.codes[i + 4]));
                far.into_iter().for_each(|i| side.codes.swap(i, i + 4));
            }
        }
    }
}

/// One row of fifty is spoiled, in K or in V: `out` or `lse` tells, over stored rows and over given ones.
#[test]
fn faults_of_a_single_row_are_beyond_the_bound() {
    for (i, formats) in PAIRS.into_iter().enumerate() {
        for fault in [Fault::ZeroPoint, Fault::SwappedCodes, Fault::Scale] {
            for side in [0, 1] {
                let (case, table, mut sides) = coded_case(formats, (64, 50), "normal", 77 + i as u64);
                let model = model(formats, table.as_deref());
                // Over the rows as they were given, what storage loses hides small faults of it; of few rows less than of many.
                let (few, few_table, mut few_sides) = coded_case(formats, (64, 4), "normal", 99 + i as u64);
                let few_model = self::model(formats, few_table.as_deref());
                let row = 30 * 64..31 * 64;
                fault.spoil(&mut sides[side], row);
                fault.spoil(&mut few_sides[side], 64..128);
                for (case, model, sides, what) in
                    [(&case, model.over_stored(), &sides, "stored"), (&few, few_model, &few_sides, "given")]
                {
                    let expected = case.bounded(model);
                    let (out, lse) = kernel(case, [&sides[0], &sides[1]], 64, Reads::Codes);
                    let caught =
                        !compare::out(&expected, &out).is_within() || !compare::lse(&expected, &lse).is_within();
                    assert!(caught, "{formats:?}: {fault:?} of side {side} goes unnoticed over {what} rows");
                }
            }
        }
    }
}

/// The bound of the arithmetic is a small part of what storage loses; but where an element lies in the middle of two codes, it may be either.
#[test]
fn the_bound_of_formats_is_narrow() {
    let usual = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    for formats in PAIRS {
        for (head_dim, seq_len) in [(64, 100), (128, 1000), (256, 3000)] {
            let (case, table, _) = coded_case(formats, (head_dim, seq_len), "normal", 5);
            let model = model(formats, table.as_deref());
            let (stored, given) = (case.bounded(model.over_stored()), case.bounded(model));
            assert_eq!(given.output, case.exact());
            let (stored, lse, given) = (usual(stored.out_bound), usual(stored.lse_bound), usual(given.out_bound));
            let what = format!("{formats:?} {head_dim}: {stored} {lse} {given}");
            assert!(stored < 2e-4 && lse < 1e-3 && given < 0.1 && given > 2.0 * stored, "{what}");
        }
    }
}

#[test]
fn stored_rows_may_be_given() {
    let (case, _, [k, v]) = coded_case((Int8, Int4), (24, 40), "normal", 3);
    let of = |side: &Coded| quantise::Stored::from_codes(side.scales.clone(), side.zero_points.clone(), &side.codes);
    let (stored_k, stored_v) = (of(&k).expect("codes"), of(&v).expect("codes"));
    let expected = case.bounded(ErrorModel::F32.with_stored(&stored_k, &stored_v).over_stored());
    let by_format = case.bounded(ErrorModel::new(Int8, Int4).over_stored());
    assert_eq!(expected.output, by_format.output);
    let (out, lse) = kernel(&case, [&k, &v], 16, Reads::Codes);
    compare::out(&expected, &out).assert_within();
    compare::lse(&expected, &lse).assert_within();
}

#[test]
fn scales_that_do_not_fit_are_errors() {
    let case = Case::random((2, 2), 8, 1, 5, 4);
    let refused = |model: ErrorModel<'_>| {
        attention_with_bound(&case.problem(), &model).expect_err("should be refused").to_string()
    };
    let channel = ErrorModel::new(Int8PerChannel, Int8);
    assert_eq!(refused(channel), "k: Int8-channel needs scales per channel");
    for len in [0, 8, 31, 24] {
        assert!(refused(channel.with_key_scales(&[1.0; 32][..len])).contains(&format!("k: {len} scales")), "{len}");
    }
    assert_eq!(refused(ErrorModel::new(Int8, Int8PerChannel)), "v: Int8-channel needs scales per channel");
    assert!(attention_with_bound(&case.problem(), &channel.with_key_scales(&[1.0; 32])).is_ok());
    let stored = quantise::Stored::from_values(&[1.0; 8]);
    assert!(refused(ErrorModel::F32.with_stored(&stored, &stored)).contains("k: 8 elements are stored, of rows of 80"));
    assert!(quantise::Stored::from_codes(vec![1.0], vec![], &[0]).is_err());
}

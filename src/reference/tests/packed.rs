//! The bound of quantised queries, against a kernel that multiplies their codes with those of K.

use super::*;
use crate::KvFormat::{self, Int4, Int4PerChannel, Int8, Int8PerChannel};
use quantise::stored;

const FORMATS: [KvFormat; 4] = [Int8, Int4, Int8PerChannel, Int4PerChannel];

/// Scales per channel that cover all of K: `[2, channels]`.
fn table(case: &Case, format: KvFormat) -> Option<Vec<f32>> {
    let channels = case.num_kv_heads * case.head_dim;
    let of = |channel| case.k.iter().skip(channel).step_by(channels).copied();
    let min = |channel| of(channel).fold(f32::INFINITY, f32::min);
    let levels = (1 << format.element_bits()) - 1;
    let scale = |channel| (of(channel).fold(f32::NEG_INFINITY, f32::max) - min(channel)) / levels as f32;
    format.has_channel_scales().then(|| (0..channels).map(scale).chain((0..channels).map(min)).collect())
}

/// What a kernel may get wrong.
#[derive(Clone, Copy, PartialEq)]
enum Wrong {
    Nothing,
    /// A key is not seen.
    Key(usize),
    /// The query is not multiplied with the middles of K's ranges, but with their minima.
    Middle,
}

/// Causal attention over K in codes and V as it is, with quantised queries.
fn kernel(case: &Case, format: KvFormat, wrong: Wrong) -> (Vec<f32>, Vec<f32>) {
    let problem = case.problem();
    let checked = Checked::new(&problem).expect("a valid problem");
    let k = stored(format, &case.k, case.head_dim, table(case, format).as_deref()).expect("whole rows");
    let centre = f32::from(if format.element_bits() == 8 { 128_u8 } else { 8 });
    let unit = checked.softmax_scale as f32 * std::f32::consts::LOG2_E;
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (token, q_head) in (0..checked.query_len).flat_map(|token| (0..case.num_q_heads).map(move |head| (token, head)))
    {
        let row_of = |pos| checked.row_start(pos, q_head / checked.group_size, checked.problem.head_dim);
        let q: Vec<f32> = checked.query_row(token, q_head).iter().map(|q| q * unit).collect();
        // In formats with scales per channel the query has them in it, the same for all keys.
        let channel = |dim: usize| if format.has_channel_scales() { k.scales[row_of(0) + dim] } else { 1.0 };
        let x: Vec<f32> = q.iter().enumerate().map(|(dim, q)| q * channel(dim)).collect();
        let step = x.iter().fold(0.0_f32, |max, x| max.max(x.abs())) / 127.0;
        let codes: Vec<i32> = x.iter().map(|x| if step == 0.0 { 0 } else { (x / step).round() as i32 }).collect();
        let visible = (0..checked.seq_len).filter(|&pos| checked.is_visible(token, pos));
        let logit = |pos: usize| {
            let row = row_of(pos);
            let code = |i: usize| ((k.values[i] - f64::from(k.zero_points[i])) / f64::from(k.scales[i])).round() as f32;
            let dot: i32 = codes.iter().zip(row..).map(|(q, i)| q * (code(i) - centre) as i32).sum();
            let row_scale = if format.has_row_scales() { k.scales[row] } else { 1.0 };
            let up = if wrong == Wrong::Middle { 0.0 } else { centre };
            let middle = |i: usize| k.zero_points[i] + up * k.scales[i];
            let offset: f32 = q.iter().zip(row..).map(|(q, i)| q * middle(i)).sum();
            row_scale * (step * dot as f32) + offset
        };
        let keys: Vec<(usize, f32)> = visible.map(|pos| (pos, logit(pos))).collect();
        let max = keys.iter().map(|key| key.1).fold(f32::MIN, f32::max);
        let (mut sum, mut sums) = (0.0_f32, vec![0.0_f32; case.head_dim]);
        for (pos, logit) in keys.into_iter().filter(|key| wrong != Wrong::Key(key.0)) {
            let p = (logit - max).exp2();
            sum += p;
            let values = checked.value_row(pos, q_head / checked.group_size);
            sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += p * v);
        }
        out.extend(sums.iter().map(|x| x / sum));
        lse.push((max + sum.log2()) * std::f32::consts::LN_2);
    }
    (out, lse)
}

fn expected(case: &Case, format: KvFormat, is_packed: bool, rounding: Rounding) -> BoundedOutput {
    let table = table(case, format);
    let mut model = ErrorModel::new(format, KvFormat::F32).over_stored().with_rounding(rounding);
    if let Some(table) = &table {
        model = model.with_key_scales(table);
    }
    case.bounded(if is_packed { model.with_packed_dots() } else { model })
}

#[test]
fn quantised_queries_are_within_the_bound() {
    for (seed, (query_len, seq_len)) in [(1, 1), (5, 18), (3, 300)].into_iter().enumerate() {
        for (i, (head_dim, q_scale)) in
            [(64, 1.0), (128, 0.01), (40, 30.0), (80, 1e-20), (72, 1e30)].into_iter().enumerate()
        {
            for format in FORMATS {
                let mut case = Case::random((4, 2), head_dim, query_len, seq_len, 500 + seed as u64);
                case.q.iter_mut().for_each(|x| *x *= q_scale);
                // One element that all codes are spent on; and queries of zeros.
                case.q.iter_mut().step_by(head_dim).for_each(|x| *x *= [1.0, 100.0][i % 2]);
                case.q.iter_mut().take(head_dim).for_each(|x| *x *= [1.0, 1.0, -0.0][i % 3]);
                let (out, lse) = kernel(&case, format, Wrong::Nothing);
                for rounding in [Rounding::Independent, Rounding::Coherent] {
                    let expected = expected(&case, format, true, rounding);
                    compare::out(&expected, &out).assert_within();
                    compare::lse(&expected, &lse).assert_within();
                }
            }
        }
    }
}

/// All elements alike err alike: that they are independent is wrong then, and the other way of adding up right.
#[test]
fn constant_queries_err_in_one_direction() {
    for format in FORMATS {
        let mut case = Case::random((4, 2), 64, 2, 40, 600);
        case.q.iter_mut().enumerate().for_each(|(i, x)| *x = if i % 64 == 0 { 127.0 } else { 0.499 });
        let (out, lse) = kernel(&case, format, Wrong::Nothing);
        let expected = expected(&case, format, true, Rounding::Coherent);
        compare::out(&expected, &out).assert_within();
        compare::lse(&expected, &lse).assert_within();
    }
}

/// Wide enough for codes of 8 bits, not for much more; and the bound without them is too narrow.
#[test]
fn the_bound_of_quantised_queries_is_narrow() {
    for format in FORMATS {
        let case = Case::random((4, 2), 64, 1, 200, 17);
        let packed = expected(&case, format, true, Rounding::Independent);
        let largest = packed.out_bound.iter().copied().fold(0.0, f64::max);
        assert!(largest < 0.1, "{format}: {largest}");
        let (out, lse) = kernel(&case, format, Wrong::Nothing);
        assert!(compare::out(&packed, &out).badness() > 0.02, "{format}");
        let exact = expected(&case, format, false, Rounding::Independent);
        assert!(!compare::out(&exact, &out).is_within() && !compare::lse(&exact, &lse).is_within(), "{format}");
        // One of many keys weighs less than what quantising may cost.
        let case = Case::random((4, 2), 64, 1, 12, 17);
        let packed = expected(&case, format, true, Rounding::Independent);
        for wrong in [Wrong::Key(0), Wrong::Key(5), Wrong::Key(11), Wrong::Middle] {
            let (out, lse) = kernel(&case, format, wrong);
            let is_within = compare::out(&packed, &out).is_within() && compare::lse(&packed, &lse).is_within();
            assert!(!is_within, "{format}");
        }
    }
}

/// Formats without codes are multiplied as ever.
#[test]
fn other_formats_have_the_same_bound() {
    let case = Case::random((4, 2), 64, 2, 40, 18);
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::E4M3] {
        let model = ErrorModel::new(format, Int8);
        assert_eq!(case.bounded(model), case.bounded(model.with_packed_dots()), "{format}");
    }
}

use super::*;

mod formats;
mod halves;
mod limits;
mod packed;

/// A problem that owns its numbers.
#[derive(Clone)]
struct Case {
    num_q_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    options: Options,
}

impl Case {
    /// Normal data; `seed` makes cases differ.
    fn random(heads: (usize, usize), head_dim: usize, query_len: usize, seq_len: usize, seed: u64) -> Self {
        let mut state = seed;
        let mut normal = || {
            // The sum of 12 uniform numbers (splitmix64) is near enough to normal.
            (0..12)
                .map(|_| {
                    state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let mut x = state;
                    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                    ((x ^ (x >> 31)) >> 40) as f32 / (1 << 24) as f32 - 0.5
                })
                .sum::<f32>()
        };
        let (num_q_heads, num_kv_heads) = heads;
        let mut values = |len: usize| (0..len).map(|_| normal()).collect::<Vec<_>>();
        let q = values(query_len * num_q_heads * head_dim);
        let k = values(seq_len * num_kv_heads * head_dim);
        let v = values(seq_len * num_kv_heads * head_dim);
        Self { num_q_heads, num_kv_heads, head_dim, q, k, v, options: Options::default() }
    }

    fn problem(&self) -> Problem<'_> {
        let Self { num_q_heads, num_kv_heads, head_dim, ref q, ref k, ref v, ref options } = *self;
        Problem { num_q_heads, num_kv_heads, head_dim, value_dim: head_dim, q, k, v, options: options.clone() }
    }

    fn exact(&self) -> Output {
        attention(&self.problem()).expect("a valid problem")
    }

    fn bounded(&self, model: ErrorModel<'_>) -> BoundedOutput {
        attention_with_bound(&self.problem(), &model).expect("a valid problem")
    }

    /// What a kernel might do: `f32` throughout, online softmax in log2 units, a partial state for each split. Two of
    /// the things it may get wrong can be asked for.
    fn kernel(&self, split_len: usize, fault: Fault) -> (Vec<f32>, Vec<f32>) {
        let problem = self.problem();
        let checked = Checked::new(&problem).expect("a valid problem");
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        let log2_e = std::f32::consts::LOG2_E;
        let d = self.head_dim;
        for token in 0..checked.query_len {
            for q_head in 0..self.num_q_heads {
                let kv_head = q_head / checked.group_size;
                let mut scale = checked.softmax_scale as f32 * log2_e;
                if let Some(cap) = self.options.softcap {
                    scale = checked.softmax_scale as f32 / cap as f32;
                }
                let q: Vec<f32> = checked.query_row(token, q_head).iter().map(|q| q * scale).collect();
                let visible: Vec<usize> = (0..checked.seq_len).filter(|&pos| checked.is_visible(token, pos)).collect();
                let (mut max, mut sum, mut acc) = (-1e30_f32, 0.0_f32, vec![0.0_f32; d]);
                for split in visible.chunks(split_len) {
                    let (mut split_max, mut split_sum, mut split_acc) = (-1e30_f32, 0.0_f32, vec![0.0_f32; d]);
                    for &pos in split {
                        if matches!(fault, Fault::LoseKey(lost) if lost == pos) {
                            continue;
                        }
                        let mut lanes = [0.0_f32; 4];
                        for (i, (&q, &k)) in q.iter().zip(checked.key_row(pos, kv_head)).enumerate() {
                            lanes[i % 4] += q * k;
                        }
                        let mut s = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
                        if let Some(cap) = self.options.softcap {
                            let (a, b) = (s.clamp(-10.0, 10.0).exp(), (-s.clamp(-10.0, 10.0)).exp());
                            s = (cap as f32 * log2_e) * ((a - b) / (a + b));
                        }
                        if let Some(slopes) = &self.options.alibi_slopes {
                            s += slopes[q_head] * log2_e * (pos as f32 - checked.query_pos(token) as f32);
                        }
                        let new_max = s.max(split_max);
                        let (old, p) = ((split_max - new_max).exp2(), (s - new_max).exp2());
                        split_sum = split_sum * old + p;
                        for (acc, &v) in split_acc.iter_mut().zip(checked.value_row(pos, kv_head)) {
                            *acc = *acc * old + p * v;
                        }
                        split_max = new_max;
                    }
                    let new_max = max.max(split_max);
                    let (old, new) = ((max - new_max).exp2(), (split_max - new_max).exp2());
                    let new = if fault == Fault::MergeWithoutRescale { 1.0 } else { new };
                    sum = sum * old + split_sum * new;
                    acc.iter_mut().zip(&split_acc).for_each(|(acc, split)| *acc = *acc * old + split * new);
                    max = new_max;
                }
                if let Some(sinks) = &self.options.sinks {
                    let sink = sinks[q_head] * log2_e;
                    let new_max = max.max(sink);
                    let old = (max - new_max).exp2();
                    sum = sum * old + (sink - new_max).exp2();
                    acc.iter_mut().for_each(|acc| *acc *= old);
                    max = new_max;
                }
                out.extend(acc.iter().map(|acc| if sum == 0.0 { 0.0 } else { acc / sum }));
                lse.push((max + sum.log2()) * std::f32::consts::LN_2);
            }
        }
        (out, lse)
    }

    fn check_kernel(&self, model: ErrorModel<'_>) -> f64 {
        let expected = self.bounded(model);
        [7, 64, 12_288]
            .into_iter()
            .map(|split_len| {
                let (out, lse) = self.kernel(split_len, Fault::None);
                let (out, lse) = (compare::out(&expected, &out), compare::lse(&expected, &lse));
                out.assert_within();
                lse.assert_within();
                out.badness().max(lse.badness())
            })
            .fold(0.0, f64::max)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    LoseKey(usize),
    MergeWithoutRescale,
}

fn assert_close(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!(got == want || (got - want).abs() < 1e-14, "got {got}, want {want}");
    }
}

/// One head of one element: logits are `q * k`, values are distinct powers of two.
fn tiny(q: &[f32], k: &[f32], v: &[f32]) -> Case {
    Case {
        num_q_heads: 1,
        num_kv_heads: 1,
        head_dim: 1,
        q: q.to_vec(),
        k: k.to_vec(),
        v: v.to_vec(),
        options: Options::default(),
    }
}

#[test]
fn weights_are_the_softmax() {
    // exp(0) : exp(ln 3) = 1 : 3.
    let case = tiny(&[1.0], &[0.0, 3.0_f32.ln()], &[8.0, 16.0]);
    let Output { out, lse, .. } = case.exact();
    assert!((out[0] - 14.0).abs() < 1e-6 && (lse[0] - 4.0_f64.ln()).abs() < 1e-6, "{out:?} {lse:?}");
}

#[test]
fn causal_is_aligned_bottom_right() {
    let mut case = tiny(&[0.0, 0.0], &[0.0; 4], &[1.0, 2.0, 4.0, 8.0]);
    assert_close(&case.exact().out, &[7.0 / 3.0, 15.0 / 4.0]);
    assert_close(&case.exact().lse, &[3.0_f64.ln(), 4.0_f64.ln()]);
    case.options.causal = false;
    assert_close(&case.exact().out, &[15.0 / 4.0; 2]);
}

#[test]
fn window_keeps_the_newest_keys() {
    let mut case = tiny(&[0.0, 0.0], &[0.0; 4], &[1.0, 2.0, 4.0, 8.0]);
    case.options.window = Some(1);
    assert_close(&case.exact().out, &[4.0, 8.0]);
    case.options.window = Some(2);
    assert_close(&case.exact().out, &[3.0, 6.0]);
    // Without causality a window bounds only the past.
    case.options.causal = false;
    assert_close(&case.exact().out, &[14.0 / 3.0, 6.0]);
    case.options.window = Some(u32::MAX);
    assert_close(&case.exact().out, &[15.0 / 4.0; 2]);
}

#[test]
fn mask_bits_choose_keys() {
    let mut case = tiny(&[0.0, 0.0], &[0.0; 40], &[1.0; 40]);
    case.v[33] = 5.0;
    case.options.mask = Some(vec![0x1, 0x2, 0, 0]);
    let Output { out, lse, .. } = case.exact();
    assert_close(&out, &[3.0, 0.0]);
    assert_close(&lse, &[2.0_f64.ln(), f64::NEG_INFINITY]);
    // It joins the other masks.
    case.options.window = Some(8);
    assert_close(&case.exact().out, &[5.0, 0.0]);
}

#[test]
fn empty_rows_are_zero() {
    let none = tiny(&[1.0], &[], &[]);
    assert_eq!((none.exact().out, none.exact().lse), (vec![0.0], vec![f64::NEG_INFINITY]));
    let mut no_window = tiny(&[1.0], &[2.0], &[f32::NAN]);
    no_window.options.window = Some(0);
    let bounded = no_window.bounded(ErrorModel::F32);
    assert_eq!((&bounded.output.out[..], bounded.output.lse[0]), (&[0.0][..], f64::NEG_INFINITY));
    assert_eq!((bounded.out_bound[0], bounded.lse_bound[0]), (0.0, 0.0));
    compare::lse(&bounded, &[f32::NEG_INFINITY]).assert_within();
    assert!(!compare::lse(&bounded, &[-1e30]).is_within());
    assert!(!compare::out(&bounded, &[f32::NAN]).is_within());

    let no_queries = tiny(&[], &[1.0], &[1.0]);
    assert!(no_queries.bounded(ErrorModel::F32).output.out.is_empty());
}

#[test]
fn sinks_join_the_denominator_only() {
    let mut case = tiny(&[0.0], &[0.0; 3], &[4.0; 3]);
    case.options.sinks = Some(vec![0.0]);
    let Output { out, lse, .. } = case.exact();
    assert_close(&out, &[3.0]);
    assert_close(&lse, &[4.0_f64.ln()]);
    // No key: the sink is all there is.
    case.options.window = Some(0);
    case.options.sinks = Some(vec![-2.5]);
    let bounded = case.bounded(ErrorModel::F32);
    assert_eq!((bounded.output.out[0], bounded.output.lse[0], bounded.out_bound[0] < 1e-30), (0.0, -2.5, true));
}

#[test]
fn softcap_comes_before_alibi() {
    let mut case = tiny(&[1.0], &[1000.0, 1000.0], &[1.0, 2.0]);
    case.options.softcap = Some(2.0);
    case.options.alibi_slopes = Some(vec![3.0]);
    let Output { out, lse, .. } = case.exact();
    // Logits 2 - 3 and 2.
    let (a, b) = ((-1.0_f64).exp(), 2.0_f64.exp());
    assert_close(&out, &[(a + 2.0 * b) / (a + b)]);
    assert_close(&lse, &[(a + b).ln()]);
}

#[test]
fn scale_defaults_to_the_root_of_head_dim() {
    let mut case = tiny(&[1.0; 4], &[3.0; 4], &[1.0; 4]);
    case.head_dim = 4;
    assert_close(&case.exact().lse, &[6.0]);
    case.options.softmax_scale = Some(0.25);
    assert_close(&case.exact().lse, &[3.0]);
}

#[test]
fn query_heads_share_kv_heads_in_order() {
    let mut case = tiny(&[0.0; 6], &[0.0; 2], &[1.0, 2.0]);
    (case.num_q_heads, case.num_kv_heads) = (6, 2);
    assert_close(&case.exact().out, &[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
}

#[test]
fn invisible_keys_may_hold_nan() {
    let mut case = Case::random((2, 1), 8, 3, 20, 1);
    case.options.window = Some(4);
    let before = case.bounded(ErrorModel::F16);
    // The oldest query is at 17 and sees 14..=17.
    case.k[..14 * 8].fill(f32::NAN);
    case.v[..14 * 8].fill(f32::NAN);
    assert_eq!(case.bounded(ErrorModel::F16), before);
}

#[test]
fn threads_change_nothing() {
    // Enough work for several threads, against each row on its own.
    let case = Case::random((4, 2), 64, 40, 300, 2);
    let all = case.bounded(ErrorModel::F16);
    let mut last = case.clone();
    last.q.drain(..39 * 4 * 64);
    let last = last.bounded(ErrorModel::F16);
    assert_eq!(all.output.out[39 * 4 * 64..], last.output.out);
    assert_eq!(all.out_bound[39 * 4 * 64..], last.out_bound);
    assert_eq!(all.lse_bound[39 * 4..], last.lse_bound);
}

#[test]
fn wrong_lengths_are_errors() {
    let good = Case::random((4, 2), 8, 2, 5, 3);
    let refused = |change: &dyn Fn(&mut Case)| {
        let mut case = good.clone();
        change(&mut case);
        attention(&case.problem()).expect_err("should be refused").to_string()
    };
    assert!(refused(&|case| case.num_q_heads = 3).contains("multiple of num_kv_heads"));
    assert!(refused(&|case| case.num_kv_heads = 0).contains("above zero"));
    assert!(refused(&|case| case.head_dim = usize::MAX).contains("not a multiple"));
    assert!(refused(&|case| case.q.truncate(1)).contains("q has"));
    assert!(refused(&|case| case.k.truncate(1)).contains("k has"));
    assert!(refused(&|case| case.v.truncate(1)).contains("v has"));
    assert!(refused(&|case| case.options.sinks = Some(vec![0.0])).contains("sinks has 1"));
    assert!(refused(&|case| case.options.alibi_slopes = Some(vec![])).contains("alibi_slopes has 0"));
    assert!(refused(&|case| case.options.mask = Some(vec![0])).contains("mask has 1 words"));
    assert!(refused(&|case| case.options.sinks = Some(vec![0.0, f32::INFINITY, 0.0, 0.0])).contains("sinks has inf"));
    assert!(refused(&|case| case.options.alibi_slopes = Some(vec![f32::NAN; 4])).contains("alibi_slopes has NaN"));
    assert!(refused(&|case| case.options.softcap = Some(0.0)).contains("softcap 0"));
    assert!(refused(&|case| case.options.softmax_scale = Some(f64::NAN)).contains("softmax_scale NaN"));
}

#[test]
fn f32_kernels_are_within_the_bound() {
    for (seed, (heads, head_dim, query_len, seq_len)) in
        [((1, 1), 8, 1, 1), ((4, 2), 64, 5, 18), ((2, 1), 128, 3, 799), ((1, 1), 256, 1, 2000), ((7, 1), 40, 16, 64)]
            .into_iter()
            .enumerate()
    {
        let mut case = Case::random(heads, head_dim, query_len, seq_len, 100 + seed as u64);
        case.check_kernel(ErrorModel::F32);
        case.check_kernel(ErrorModel::F32.with_rounding(Rounding::Coherent));
        case.options.sinks = Some((0..heads.0).map(|head| head as f32 * 0.7 - 1.0).collect());
        case.check_kernel(ErrorModel::F32);
        case.options.alibi_slopes = Some((0..heads.0).map(|head| 0.5 / (head + 1) as f32).collect());
        case.check_kernel(ErrorModel::F32);
        case.options.window = Some(13);
        case.check_kernel(ErrorModel::F32);
        for softcap in [1.0, 30.0, 50.0] {
            case.options = Options { softcap: Some(softcap), ..Options::default() };
            case.check_kernel(ErrorModel::F32);
        }
        case.options.softcap = None;
        for huge in [200.0, 20_000.0] {
            let mut case = case.clone();
            case.q.iter_mut().for_each(|q| *q *= huge);
            case.check_kernel(ErrorModel::F32);
        }
    }
}

#[test]
fn f16_storage_is_within_the_bound() {
    // To 11 significant bits, ties to even; the data has no subnormal halves.
    let to_f16 = |x: f32| {
        let unit = 2.0_f32.powi(x.abs().log2().floor() as i32 - 10);
        (x / unit).round_ties_even() * unit
    };
    for (seed, (query_len, seq_len)) in [(1, 1), (5, 18), (2, 1500)].into_iter().enumerate() {
        for huge in [1.0, 200.0] {
            let mut case = Case::random((4, 2), 64, query_len, seq_len, 200 + seed as u64);
            case.q.iter_mut().for_each(|q| *q *= huge);
            let expected = case.bounded(ErrorModel::F16);
            case.k.iter_mut().chain(&mut case.v).for_each(|x| *x = to_f16(*x));
            let (out, lse) = case.kernel(512, Fault::None);
            compare::out(&expected, &out).assert_within();
            compare::lse(&expected, &lse).assert_within();
            // Against rounded inputs only the arithmetic is left.
            case.check_kernel(ErrorModel::F32);
        }
    }
}

#[test]
fn constant_data_is_within_the_coherent_bound() {
    let mut case = Case::random((1, 1), 16, 1, 20_000, 5);
    case.q.fill(0.0);
    case.v.fill(1.1);
    case.check_kernel(ErrorModel::F32.with_rounding(Rounding::Coherent));
}

#[test]
fn the_bound_is_narrow() {
    let largest = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    for (head_dim, seq_len) in [(64, 100), (128, 1000), (256, 10_000)] {
        let case = Case::random((2, 1), head_dim, 1, seq_len, 6);
        let bounded = case.bounded(ErrorModel::F32);
        let (out, lse) = (largest(&bounded.out_bound), largest(&bounded.lse_bound));
        assert!(out < 1e-5 && lse < 4e-5, "{out} {lse}");
        // A sound kernel is not near it either.
        let badness = case.check_kernel(ErrorModel::F32);
        assert!(badness > 0.01);
        let f16 = case.bounded(ErrorModel::F16);
        assert!(largest(&f16.out_bound) < 1e-2);
    }
}

#[test]
fn the_bound_notices_faults() {
    let case = Case::random((2, 1), 64, 1, 4000, 7);
    let expected = case.bounded(ErrorModel::F32);
    for lost in [0, 1, 2047, 3999] {
        let (out, _) = case.kernel(512, Fault::LoseKey(lost));
        let comparison = compare::out(&expected, &out);
        assert!(!comparison.is_within(), "key {lost} of 4000 may be lost unnoticed: {comparison}");
    }
    let (out, lse) = case.kernel(512, Fault::MergeWithoutRescale);
    assert!(!compare::out(&expected, &out).is_within() && !compare::lse(&expected, &lse).is_within());
    let mut scaled = case.clone();
    scaled.options.softmax_scale = Some(0.125 * 1.0001);
    let (out, _) = scaled.kernel(512, Fault::None);
    assert!(!compare::out(&expected, &out).is_within());
}

#[test]
fn a_comparison_names_the_worst_element() {
    let case = Case::random((4, 2), 8, 3, 9, 8);
    let expected = case.bounded(ErrorModel::F32);
    let (mut out, mut lse) = case.kernel(64, Fault::None);
    // Row 2, head 1, dim 5; row 1, head 3.
    out[2 * 4 * 8 + 8 + 5] += 1.0;
    out[3] += 0.1;
    lse[4 + 3] = f32::NAN;
    let (out, lse) = (compare::out(&expected, &out), compare::lse(&expected, &lse));
    let worst = out.worst.expect("elements were compared");
    assert_eq!((worst.row, worst.head, worst.dim, out.num_beyond), (2, 1, 5, 2));
    assert!(out.to_string().contains("worst at head 1, row 2, dim 5: got "), "{out}");
    assert!(lse.to_string().contains("worst at head 3, row 1: got NaN"), "{lse}");
    assert_eq!(compare::lse(&expected, &[0.0]).to_string(), "lse: 1 elements, expected 12");
    assert!(!compare::lse(&expected, &[0.0]).is_within());
}

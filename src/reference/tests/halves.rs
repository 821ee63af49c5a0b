//! The bound of products of halves, against a kernel that rounds queries and weights to halves, either way.

use super::*;

#[derive(Clone, Copy, Debug)]
enum To {
    Nearest,
    Zero,
}

/// A half, flushed to zero below the normal ones.
fn half(x: f32, to: To) -> f32 {
    if x.abs() < 2.0_f32.powi(-14) {
        return 0.0;
    }
    let unit = 2.0_f32.powi(x.abs().log2().floor() as i32 - 10);
    match to {
        To::Nearest => (x / unit).round_ties_even() * unit,
        To::Zero => (x / unit).trunc() * unit,
    }
}

/// What a kernel with matrix units does over one tile of keys after another.
fn kernel(case: &Case, to: To, lost: Option<usize>) -> (Vec<f32>, Vec<f32>) {
    let problem = case.problem();
    let checked = Checked::new(&problem).expect("a valid problem");
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (token, q_head) in (0..checked.query_len).flat_map(|token| (0..case.num_q_heads).map(move |head| (token, head)))
    {
        let kv_head = q_head / checked.group_size;
        let q = checked.query_row(token, q_head);
        let q_max = q.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let factor = 2.0_f32.powi(14 - q_max.log2().floor() as i32);
        let q: Vec<f32> = q.iter().map(|x| half(x * factor, to)).collect();
        let scale = checked.softmax_scale as f32 * std::f32::consts::LOG2_E;
        let visible: Vec<_> = (0..checked.seq_len).filter(|&pos| checked.is_visible(token, pos)).collect();
        let (mut reference, mut sum, mut sums) = (-1e30_f32, 0.0_f32, vec![0.0_f32; case.head_dim]);
        for tile in visible.chunks(64) {
            let logit = |&pos: &usize| {
                let dot: f32 = q.iter().zip(checked.key_row(pos, kv_head)).map(|(q, k)| q * k).sum();
                dot / factor * scale
            };
            let logits: Vec<f32> = tile.iter().map(logit).collect();
            let new = logits.iter().copied().fold(f32::MIN, f32::max).max(reference + 14.0) - 14.0;
            let old = (reference - new).exp2();
            reference = new;
            sum *= old;
            let mut products = vec![0.0_f32; case.head_dim];
            for (&pos, logit) in tile.iter().zip(logits).filter(|(pos, _)| lost != Some(**pos)) {
                let p = (logit - reference).exp2();
                sum += p;
                let values = products.iter_mut().zip(checked.value_row(pos, kv_head));
                values.for_each(|(product, v)| *product += half(p, to) * v);
            }
            sums.iter_mut().zip(products).for_each(|(sum, product)| *sum = *sum * old + product);
        }
        out.extend(sums.iter().map(|x| x / sum));
        lse.push((reference + sum.log2()) * std::f32::consts::LN_2);
    }
    (out, lse)
}

/// K and V that are halves, as caches have them.
fn case(head_dim: usize, query_len: usize, seq_len: usize, q_scale: f32, seed: u64) -> Case {
    let mut case = Case::random((4, 2), head_dim, query_len, seq_len, seed);
    case.k.iter_mut().chain(&mut case.v).for_each(|x| *x = half(*x, To::Nearest));
    case.q.iter_mut().for_each(|x| *x *= q_scale);
    case
}

#[test]
fn products_of_halves_are_within_the_bound() {
    for (seed, (query_len, seq_len)) in [(1, 1), (5, 18), (20, 300), (2, 2000)].into_iter().enumerate() {
        for (head_dim, q_scale) in [(64, 1.0), (128, 0.01), (40, 200.0), (80, 1e-20)] {
            let case = case(head_dim, query_len, seq_len, q_scale, 300 + seed as u64);
            for rounding in [Rounding::Independent, Rounding::Coherent] {
                let expected = case.bounded(ErrorModel::F32.with_f16_products().with_rounding(rounding));
                for to in [To::Nearest, To::Zero] {
                    let (out, lse) = kernel(&case, to, None);
                    compare::out(&expected, &out).assert_within();
                    compare::lse(&expected, &lse).assert_within();
                }
            }
        }
    }
}

/// Wide enough for halves, not for much more; and the bound without halves is too narrow for them.
#[test]
fn the_bound_of_halves_is_narrow() {
    let case = case(64, 1, 200, 1.0, 17);
    let expected = case.bounded(ErrorModel::F32.with_f16_products());
    let largest = expected.out_bound.iter().copied().fold(0.0, f64::max);
    assert!(largest < 1e-2, "{largest}");
    let (out, lse) = kernel(&case, To::Nearest, None);
    assert!(compare::out(&expected, &out).badness() > 0.01);
    let f32s = case.bounded(ErrorModel::F32);
    assert!(!compare::out(&f32s, &out).is_within() && !compare::lse(&f32s, &lse).is_within());
    for lost in [0, 100, 199] {
        assert!(!compare::out(&expected, &kernel(&case, To::Nearest, Some(lost)).0).is_within(), "key {lost} is lost");
    }
}

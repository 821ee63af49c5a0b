//! What is hidden, empty or huge.

use super::*;
use crate::KvFormat;

/// NaN and infinities behind every kind of mask, in K and in V, for the result and for the bounds of every format.
#[test]
fn hidden_rows_never_reach_a_result() {
    type Set = fn(&mut Options);
    let hide: [(&str, Set, &[usize]); 3] = [
        // One query, at 19: what lies behind it does not exist; so two, of which the first must not see the last key.
        ("causal", |_| (), &[19]),
        ("window", |options| options.window = Some(4), &[0, 7, 14]),
        ("mask", |options| options.mask = Some(vec![!0x9001, !0x9001]), &[0, 12, 15]),
    ];
    for (name, set, hidden) in hide {
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::E4M3, KvFormat::Int8, KvFormat::Int4] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut case = Case::random((2, 1), 8, 2, 20, 1);
                set(&mut case.options);
                let model = ErrorModel::new(format, format);
                let (before, kept) = (case.bounded(model), case.bounded(model.over_stored()));
                for &key in hidden {
                    case.k[key * 8..][..8].fill(bad);
                    case.v[key * 8..][..8].fill(bad);
                }
                // With a causal mask alone the last key is hidden from the first query only.
                let rows = if name == "causal" { 0..16 } else { 0..32 };
                for (before, after) in [(before, case.bounded(model)), (kept, case.bounded(model.over_stored()))] {
                    assert_eq!(before.output.out[rows.clone()], after.output.out[rows.clone()], "{name} {format}");
                    assert_eq!(before.out_bound[rows.clone()], after.out_bound[rows.clone()], "{name} {format}");
                    let lse = 0..rows.end / 8;
                    assert_eq!(before.output.lse[lse.clone()], after.output.lse[lse.clone()], "{name} {format}");
                    assert_eq!(before.lse_bound[lse.clone()], after.lse_bound[lse], "{name} {format}");
                    assert!(before.out_bound.iter().all(|bound| bound.is_finite()), "{name} {format}");
                }
            }
        }
    }
}

#[test]
fn visible_nan_is_expected_and_nothing_else_passes() {
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8, KvFormat::Int4] {
        let mut case = Case::random((2, 1), 8, 1, 20, 2);
        case.k[5 * 8 + 3] = f32::NAN;
        let expected = case.bounded(ErrorModel::new(format, format));
        assert!(expected.output.out.iter().chain(&expected.output.lse).all(|x| x.is_nan()));
        compare::out(&expected, &[f32::NAN; 16]).assert_within();
        compare::lse(&expected, &[f32::NAN; 2]).assert_within();
        assert_eq!(compare::out(&expected, &[0.0; 16]).num_beyond, 16, "{format}");
    }
}

#[test]
fn windows_beyond_the_sequence_are_none() {
    let mut case = Case::random((2, 1), 8, 5, 20, 3);
    let without = case.bounded(ErrorModel::F32);
    for window in [20, 21, i32::MAX as u32, u32::MAX - 19, u32::MAX] {
        case.options.window = Some(window);
        assert_eq!(case.bounded(ErrorModel::F32), without, "{window}");
    }
    case.options.window = Some(19);
    assert_ne!(case.bounded(ErrorModel::F32), without);
}

#[test]
fn logits_may_have_any_size() {
    // The larger of two hugely negative ones has all the weight; equal ones share it.
    for (k, want) in [([-1e38, -0.9e38], 4.0), ([-1e38, -1e38], 3.0), ([-0.9e38, -1e38], 2.0)] {
        let case = tiny(&[1.0], &k, &[2.0, 4.0]);
        let bounded = case.bounded(ErrorModel::F32);
        assert_eq!(bounded.output.out, [want]);
        assert_eq!(bounded.output.lse, [f64::from(k[0].max(k[1]))]);
        // The errors of such logits are as large as the distance of the values, but not larger.
        assert!(bounded.out_bound[0] <= 2.1 && bounded.lse_bound[0] < 1e33, "{bounded:?}");
    }
    // Beyond f32 in the products alone.
    let huge = tiny(&[1e30], &[-1e30, -2e30], &[2.0, 4.0]).bounded(ErrorModel::F32);
    assert_eq!((huge.output.out[0], huge.out_bound[0], huge.lse_bound[0]), (2.0, f64::INFINITY, f64::INFINITY));
}

#[test]
fn rows_without_keys_are_empty_whatever_else_there_is() {
    // Three queries over one key: the first two stand before it.
    let mut case = tiny(&[1.0, 1.0, 1.0], &[0.5], &[2.0]);
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        case.options.sinks = None;
        let bounded = case.bounded(ErrorModel::new(format, format));
        assert_eq!((&bounded.output.out[..2], bounded.out_bound[..2].to_vec()), (&[0.0; 2][..], vec![0.0; 2]));
        assert_eq!(bounded.output.lse[..2], [f64::NEG_INFINITY; 2]);
        assert!((bounded.output.out[2] - 2.0).abs() < 1e-15);
        case.options.sinks = Some(vec![-1e38]);
        let bounded = case.bounded(ErrorModel::new(format, format));
        assert_eq!((&bounded.output.out[..2], bounded.output.lse[0]), (&[0.0; 2][..], f64::from(-1e38_f32)));
        assert!(bounded.lse_bound.iter().all(|bound| bound.is_finite()));
    }
    // No keys at all, with every option set.
    let options = Options {
        softcap: Some(2.0),
        window: Some(u32::MAX),
        alibi_slopes: Some(vec![0.5]),
        sinks: Some(vec![3.0]),
        mask: Some(vec![]),
        ..Options::default()
    };
    let none = Case { options, ..tiny(&[1.0], &[], &[]) };
    let bounded = none.bounded(ErrorModel::new(KvFormat::Int4, KvFormat::Int4));
    assert_eq!((&bounded.output.out[..], &bounded.output.lse[..]), (&[0.0][..], &[3.0][..]));
    assert!(bounded.lse_bound[0] < 1e-5);
}

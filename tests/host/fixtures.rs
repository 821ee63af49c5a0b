//! The oracle against PyTorch.

use folio::reference;

use crate::common::fixtures::{self, FixtureCase};

/// Both are computed in f64, in another order; logits x200 lose some digits of the weights.
const TOLERANCE: f64 = 1e-12;

#[test]
fn the_oracle_agrees_with_pytorch() {
    for case in fixtures::load() {
        let FixtureCase { name, num_q_heads, head_dim, .. } = &case;
        let got = reference::attention(&case.problem()).unwrap_or_else(|error| unreachable!("{name}: {error}"));
        for (quantity, got, want, row_len) in
            [("out", &got.out, &case.out, num_q_heads * head_dim), ("lse", &got.lse, &case.lse, *num_q_heads)]
        {
            assert_eq!(got.len(), want.len(), "{name}: {quantity}");
            for (idx, (&got, &want)) in got.iter().zip(want).enumerate() {
                let is_close = got == want || (got - want).abs() <= TOLERANCE * want.abs().max(1.0);
                let (row, element) = (idx / row_len, idx % row_len);
                assert!(is_close, "{name}: {quantity} of row {row}, element {element}: got {got:e}, want {want:e}");
            }
        }
    }
}

#[test]
fn fixtures_cover_every_option() {
    let cases = fixtures::load();
    assert!(cases.len() >= 12);
    let covers = |has: fn(&FixtureCase) -> bool| cases.iter().any(has);
    assert!(covers(|case| !case.options.causal));
    assert!(covers(|case| case.options.softmax_scale.is_some()));
    assert!(covers(|case| case.options.softcap.is_some()));
    assert!(covers(|case| case.options.window.is_some()));
    assert!(covers(|case| case.options.alibi_slopes.is_some()));
    assert!(covers(|case| case.options.sinks.is_some()));
    assert!(covers(|case| case.options.mask.is_some()));
    assert!(covers(|case| case.lse.contains(&f64::NEG_INFINITY)));
    assert!(covers(|case| case.query_len == 1 && case.num_q_heads > case.num_kv_heads));
    assert!(covers(|case| 1 < case.query_len && case.query_len < case.seq_len));
}

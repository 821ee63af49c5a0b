//! Attention against the oracle: every kernel family.

use folio::KvFormat::{F16, F32};

use crate::adapter::{self, ALL};
use crate::case::Case;

#[track_caller]
fn check_all(case: Case) {
    for how in ALL {
        let Some(gpu) = adapter::open(how) else { return };
        case.clone().named(format!("{how:?}")).check(&gpu);
    }
}

#[test]
fn decode_of_a_small_ragged_batch() {
    check_all(Case::new(&[(0, 1), (15, 1), (16, 1), (17, 1), (100, 1)], 8, 2, 64));
}

#[test]
fn prefill_of_a_small_ragged_batch() {
    check_all(Case::new(&[(0, 33), (7, 16), (40, 5)], 8, 2, 64));
}

#[test]
fn mixed_batch_in_f16() {
    check_all(Case::new(&[(50, 1), (7, 16), (40, 5), (0, 1)], 8, 2, 64).formats(F16, F32));
    check_all(Case::new(&[(50, 1), (7, 16), (40, 5), (0, 1)], 8, 2, 64).formats(F32, F16));
}

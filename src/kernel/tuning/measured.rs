//! Written from `docs/adapters`, see the page there. Not to be edited.

use super::rows::Row;

pub(super) const ROWS: &[Row] = &[];

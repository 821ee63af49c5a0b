//! The lock around what a cache knows without a device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sequence::Manager;

pub(super) type SharedState = Arc<Mutex<Manager>>;

pub(super) fn lock(state: &SharedState) -> MutexGuard<'_, Manager> {
    // The manager checks before it changes anything, so a panic elsewhere never leaves it half-changed.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

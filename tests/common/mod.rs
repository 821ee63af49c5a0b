//! What the test binaries share.

#[allow(dead_code, reason = "not every binary compares with PyTorch")]
pub(crate) mod fixtures;

/// A value with some fields changed: options can't be written as literals outside the library, which may add to them.
pub(crate) fn with<T>(mut value: T, change: impl FnOnce(&mut T)) -> T {
    change(&mut value);
    value
}

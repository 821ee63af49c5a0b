//! How far a load has come.

/// How far a load has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress<'a> {
    /// Bytes of the checkpoint that are on the device.
    pub bytes_done: u64,
    /// Bytes of the checkpoint that the model needs.
    pub bytes_total: u64,
    /// What is being loaded: a tensor's name, say.
    pub what: &'a str,
}

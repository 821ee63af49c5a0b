//! How far a load, or a warm-up, has come.

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

/// How far [`Decoder::warm_up_with`](super::Decoder::warm_up_with) has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WarmUp {
    /// Stages that are done: attention and appends first, then a step of each size that has kernels of its own.
    pub stages_done: u32,
    /// Stages in all.
    pub stages_total: u32,
    /// Pipelines on the device so far: see [`Gpu::num_compiled`](crate::Gpu::num_compiled).
    pub num_pipelines: u64,
}

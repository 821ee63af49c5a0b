#![doc = include_str!("../README.md")]

pub mod attention;
pub mod cache;
mod error;
#[cfg(any(feature = "model", feature = "save"))]
mod files;
mod gpu;
pub mod kernel;
#[cfg(feature = "model")]
pub mod model;
pub mod plan;
mod readback;
mod record;
pub mod reference;
mod rope;
mod upload;

pub use attention::{Attention, AttentionConfig, AttentionPlan};
pub use cache::{
    BlockId, Cache, Committed, ContiguousCache, ContiguousConfig, Defragment, KvCache, KvCacheConfig, KvFormat,
    KvFormats, KvRows, MemoryReport, PendingSnapshot, PoolUsage, PrefixMatch, PrefixStats, SequenceId, SequenceMemory,
    SequenceSnapshot, Step, SwapIn, SwapOut,
};
pub use error::{Error, ErrorKind, Result};
#[cfg(feature = "open")]
pub use gpu::GpuOptions;
pub use gpu::{Gpu, Profile, ShaderChecks, required_limits, useful_features};
pub use record::{BufferRef, Recorder};
pub use rope::{Rope, RopeConfig, RopeLayout, RopeScaling};
pub use upload::Upload;
pub use wgpu;

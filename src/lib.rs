#![cfg_attr(all(feature = "open", feature = "model"), doc = include_str!("../README.md"))]
#![cfg_attr(
    not(all(feature = "open", feature = "model")),
    doc = "Tiled flash attention over a paged KV cache, in WGSL through wgpu."
)]
// What only the half with a device calls.
#![cfg_attr(not(feature = "wgpu"), allow(dead_code, unused_imports, reason = "the half that needs a device calls it"))]

#[cfg(feature = "wgpu")]
mod attention;
#[cfg(feature = "wgpu")]
mod cache;
#[cfg(feature = "engine")]
pub mod engine;
mod error;
#[cfg(any(feature = "model", feature = "save"))]
mod files;
mod format;
#[cfg(feature = "wgpu")]
mod gpu;
mod ids;
pub mod kernel;
mod layout;
#[cfg(all(feature = "measure", not(target_arch = "wasm32")))]
pub mod measure;
#[cfg(feature = "model")]
pub mod model;
pub mod plan;
pub mod reference;
pub mod schedule;
pub mod sequence;
#[cfg(all(feature = "tune", not(target_arch = "wasm32")))]
pub mod tune;
#[cfg(feature = "verify")]
pub mod verify;

#[cfg(feature = "wgpu")]
pub use attention::{Attention, AttentionCall, AttentionPlan, MergeStates, Sinks};
#[cfg(feature = "wgpu")]
pub use cache::{
    AppendLatent, AppendQkv, AppendRows, Defragment, HeadNorm, KvCache, KvRows, LatentNorm, PendingSnapshot, QkvRows,
    Rope, SequenceSnapshot, Step, StepGroup, StepRows, SwapIn, SwapOut,
};
pub use error::{BoxError, Error, ErrorKind, Holder, Result};
pub use format::{KvFormat, KvFormats};
#[cfg(feature = "open")]
pub use gpu::GpuOptions;
#[cfg(feature = "wgpu")]
pub use gpu::{BufferRef, Gpu, Recorder, ShaderChecks, matrix_features, required_limits, useful_features};
pub use ids::{BlockId, SequenceId};
pub use kernel::{AdapterClass, MatrixSize, Profile, RopeConfig, RopeLayout, RopeScaling};
pub use layout::{
    HostRows, KvCacheConfig, KvLayout, LayerGroup, LayerGroups, MAX_BLOCK_SIZE, MAX_HEAD_DIM, MAX_NUM_LAYERS,
    MAX_POOL_BYTES, Retention, RowElement, RowLayout, Segments,
};
pub use plan::{AttentionConfig, Cascade};
pub use sequence::{
    BlockUse, MemoryReport, PoolUsage, PrefixMatch, PrefixProbe, PrefixStats, QueryKernel, SequenceMemory, TokenTree,
};
#[cfg(feature = "wgpu")]
pub use wgpu;

/// Tests the examples of a page in `docs/`.
#[cfg(all(doctest, feature = "model"))]
#[doc = include_str!("../docs/models.md")]
struct ModelsPage;

/// Tests the examples of a page in `docs/`.
#[cfg(all(doctest, feature = "engine"))]
#[doc = include_str!("../docs/engine.md")]
struct EnginePage;

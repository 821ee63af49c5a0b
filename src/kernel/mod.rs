//! How the GPU does it: variants, composed text, binding tables. Pure data: what a program needs to compile and dispatch the kernels
//! by whatever GPU library it has.
//!
//! **Less stable** than the rest of the crate, as [`plan`](crate::plan) and [`sequence`](crate::sequence) are: kernels change with what is
//! measured. Programs that use folio with wgpu need none of the three.

mod bindings;
mod geometry;
mod grid;
mod rope;
mod source;
mod states;
mod target;
mod template;
pub mod tuning;
mod variant;

pub(crate) use bindings::attention_storage_buffers;
pub use bindings::{Access, Binding, bindings};
pub use rope::{RopeConfig, RopeLayout, RopeScaling};
pub use source::compose;
#[cfg(feature = "wgpu")]
pub(crate) use states::STATES_WORKGROUP_SIZE;
pub use states::merge_states_source;
pub use target::{AdapterClass, MatrixSize, Profile, ShaderFeatures, Source, Target, Vendor};
#[cfg(feature = "model")]
pub(crate) use template::region_context;
#[cfg(any(feature = "model", feature = "measure"))]
pub(crate) use template::render;
pub use variant::{AttendFlags, Kernel, MAX_DECODE_GROUP, RopeShape, Variant, max_decode_group};

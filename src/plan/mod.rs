//! Who does what in one step: work lists and the final words that are uploaded, as plain data. No device.
//!
//! **Less stable** than the rest of the crate; see [`kernel`](crate::kernel).

mod append;
mod cascade;
mod config;
mod grid;
mod items;
mod lists;
mod moves;
mod params;
mod shape;
mod split;
mod step;

pub use append::{AppendGrids, append_words};
pub use cascade::CascadePolicy;
pub use config::{AttentionConfig, Cascade};
pub use grid::{MAX_GRID, linear_grid};
pub use items::{LOGIT_FLOOR, MERGE_ITEM_WORDS, MergeItem, NO_MASK, NO_PARTIAL, TREE_MASK, WORK_ITEM_WORDS, WorkItem};
pub use lists::{Round, WorkLists, partial_row_bytes};
pub use moves::{move_words, path_moves};
#[cfg(feature = "wgpu")]
pub(crate) use params::push_params;
pub use params::{AttendParams, CacheParams, NO_WINDOW, PARAM_BLOCK_WORDS, PackParams};
pub use shape::PlanShape;
pub use split::{SPLIT_GRANULE, SplitPolicy};
pub use step::{PlannedDispatch, Stage, StepPlan};

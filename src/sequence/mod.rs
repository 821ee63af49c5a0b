//! Who holds which block: the pool, the block tables, sequences and their transactions, the prefix index, and reports. No device.
//!
//! **Less stable** than the rest of the crate; see [`kernel`](crate::kernel).

mod batch;
mod manager;
mod moves;
mod pool;
mod prefix;
mod report;
mod reserve;
mod table;
mod tree;
mod window;

pub use batch::{Batch, BatchEntry, QueryKernel};
pub use manager::{BlockUse, Manager, PoolUsage};
pub(crate) use moves::Moves;
pub use pool::BlockPool;
pub use prefix::{PrefixMatch, PrefixProbe, PrefixStats};
pub use report::{MemoryReport, SequenceMemory};
pub use reserve::{Pending, Reservation, ReservedGroup};
pub use table::{BlockTable, Growth};
pub use tree::TokenTree;
#[cfg(feature = "model")]
pub(crate) use window::WayBack;

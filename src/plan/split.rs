//! Split-KV: into how many ranges the keys of a sequence are cut. A pure function of shapes and device profile.
//!
//! One workgroup per KV head and tile leaves most of a GPU idle when the batch is small and the sequences are long
//! (Flash-Decoding, Dao et al. 2023). The keys are then cut into ranges on a grid of `split_len`, each range is a workgroup of its own,
//! and the merge kernel joins their partial states.

use super::cascade::CascadePolicy;

/// How keys are divided between workgroups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SplitPolicy {
    /// Enough workgroups to keep the device busy: below this number, splitting pays.
    pub target_workgroups: u32,
    /// A range shorter than this costs more in partial states and merging than it gains.
    pub min_split_len: u32,
    /// Most keys that one workgroup may walk over; see the loop budget in the kernels. At least [`SPLIT_GRANULE`].
    pub max_split_len: u32,
    /// Always use this split length: results then don't depend on what else is in the batch.
    pub fixed_split_len: Option<u32>,
    /// Bytes of partial states at one time; more work is done in rounds that use the same workspace.
    pub max_workspace_bytes: u64,
    /// Multiply-adds of a dispatch at most. Systems reset a device that is busy with one for too long (Windows after 2 s), so a longer prefill takes
    /// several. A work item that has more on its own is a dispatch of its own.
    pub max_dispatch_work: u64,
    /// Blocks that sequences share are read once for all of them, where that pays. `None`: never, which must be so where logits depend on the
    /// positions of queries (ALiBi), and where results must not depend on what else is in the batch.
    pub cascade: Option<CascadePolicy>,
}

/// Split boundaries are multiples of this, so that a range starts at a tile and, mostly, at a block.
pub const SPLIT_GRANULE: u32 = 64;

impl SplitPolicy {
    /// The split length for a batch, in keys.
    ///
    /// `tile_keys`: for every tile of query rows of the batch, how many keys it sees. `num_kv_heads`: each tile is a
    /// workgroup per KV head.
    #[must_use]
    pub fn split_len(&self, tile_keys: impl Iterator<Item = u32> + Clone, num_kv_heads: u32) -> u32 {
        let max = (self.max_split_len / SPLIT_GRANULE * SPLIT_GRANULE).max(SPLIT_GRANULE);
        if let Some(fixed) = self.fixed_split_len {
            return fixed.min(max).next_multiple_of(SPLIT_GRANULE);
        }
        let workgroups = tile_keys.clone().count() as u64 * u64::from(num_kv_heads);
        if workgroups >= u64::from(self.target_workgroups) {
            return max;
        }
        let keys: u64 = tile_keys.map(u64::from).sum::<u64>() * u64::from(num_kv_heads);
        let even = keys.div_ceil(u64::from(self.target_workgroups.max(1)));
        let even = u32::try_from(even).unwrap_or(u32::MAX / 2);
        even.max(self.min_split_len).min(max).next_multiple_of(SPLIT_GRANULE)
    }
}

//! [`KvCache`]: sequences over a pool of blocks, and the GPU buffers that hold them.

mod accept;
mod append_latent;
mod append_qkv;
mod append_rows;
mod calibrate;
mod defragment;
mod pack;
mod record;
mod rope;
#[cfg(feature = "save")]
mod save;
mod snapshot;
mod state;
mod step;
mod storage;
mod swap;

pub use append_latent::{AppendLatent, LatentNorm};
pub use append_qkv::{AppendQkv, HeadNorm, QkvRows};
pub use append_rows::{AppendRows, StepRows};
pub use defragment::Defragment;
pub use record::KvRows;
pub use rope::Rope;
pub use snapshot::{PendingSnapshot, SequenceSnapshot};
pub(crate) use step::StepTicket;
pub use step::{Step, StepGroup};
pub(crate) use storage::{Layers, check_lse};
pub use swap::{SwapIn, SwapOut};

use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ids::{BlockId, SequenceId};
use crate::layout::{KvCacheConfig, Segments};
use crate::plan::MAX_GRID;
#[cfg(feature = "model")]
use crate::sequence::WayBack;
use crate::sequence::{
    BatchEntry, BlockUse, Manager, MemoryReport, PoolUsage, PrefixMatch, PrefixProbe, PrefixStats, ReservedGroup,
    TokenTree,
};
use calibrate::KeyScales;
use record::CacheKernels;
use state::SharedState;
use step::GroupWork;

/// Whether queries may have so many heads over a cache's.
fn check_q_heads(cache: &KvCacheConfig, num_q_heads: u32) -> Result<()> {
    let num_kv_heads = cache.num_kv_heads;
    if num_q_heads > 0 && num_q_heads.is_multiple_of(num_kv_heads) && num_q_heads <= MAX_GRID {
        return Ok(());
    }
    let rule = format!("a multiple of num_kv_heads, {num_kv_heads}, up to {MAX_GRID}");
    Err(Error::argument("num_q_heads", num_q_heads, rule))
}

/// A paged KV cache: the K and V of many sequences, in blocks of a fixed number of tokens that any sequence can hold.
///
/// One step of a decoder:
/// 1. [`begin_step`](Self::begin_step) reserves room for the new tokens of a batch (host only; nothing waits for the GPU),
/// 2. for each layer, [`append`](Self::append) and [`Attention::attend`](crate::Attention::attend) record into the host's encoder,
/// 3. the host submits,
/// 4. [`commit`](Self::commit) makes the new lengths valid; dropping the [`Step`] instead leaves every sequence as it was.
///
/// **Order.** Blocks move between sequences as soon as they are freed, so submit recorded steps in the order in which they
/// began. Several steps may be open, and several may be recorded before one submit.
///
/// Methods take `&self`; the cache may be shared between threads.
#[derive(Debug)]
pub struct KvCache {
    gpu: Gpu,
    config: KvCacheConfig,
    segments: [Segments; 2],
    state: SharedState,
    layers: Arc<Layers>,
    kernels: CacheKernels,
    key_scales: KeyScales,
}

impl KvCache {
    /// Allocates the pool on the GPU and compiles the append, copy and gather kernels.
    ///
    /// # Errors
    /// [`Error::Argument`] for a field that breaks its rule; [`Error::Unsupported`] if a side of a layer is larger than all storage
    /// bindings that a kernel may have, or the device has too little memory; [`Error::Wgpu`] if a kernel can't be built.
    pub async fn new(gpu: &Gpu, config: KvCacheConfig) -> Result<Self> {
        // First what is cheap to refuse.
        config.validate()?;
        let segments = storage::segments(gpu, &config)?;
        let manager = Manager::new(config)?;
        let layers = Arc::new(Layers::new(storage::allocate(gpu, &config, segments).await?, config.num_layers));
        let kernels = CacheKernels::new(gpu, &config, segments).await?;
        Ok(Self {
            gpu: gpu.clone(),
            config,
            segments,
            state: Arc::new(Mutex::new(manager)),
            layers,
            kernels,
            key_scales: KeyScales::new(config.num_layers),
        })
    }

    /// Blocks of the largest pool of this shape that the kernels can bind on a device, whatever `num_blocks` says: each side of a layer takes as many
    /// bindings as it needs. How much memory there is, is not asked. 0 if not even one block can be bound.
    #[must_use]
    pub fn largest_pool(gpu: &Gpu, config: &KvCacheConfig) -> u32 {
        storage::largest_pool(gpu, config)
    }

    /// [`KvCache::new`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`KvCache::new`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new_blocking(gpu: &Gpu, config: KvCacheConfig) -> Result<Self> {
        pollster::block_on(Self::new(gpu, config))
    }

    fn state(&self) -> MutexGuard<'_, Manager> {
        state::lock(&self.state)
    }

    /// The device that the cache lives on.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The shape of the cache.
    #[must_use]
    pub fn config(&self) -> &KvCacheConfig {
        &self.config
    }

    /// How the K side and the V side of each layer are cut: into several buffers if it is larger than a storage binding of the device.
    #[must_use]
    pub fn segments(&self) -> [Segments; 2] {
        self.segments
    }

    /// The buffers of a layer's K and V, which it shares with the layer at its place in each other [group](KvCacheConfig::groups), one per [segment](Self::segments), laid out as [`KvLayout`](crate::KvLayout) says, for a host that wants to read
    /// them in a shader of its own.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that isn't there.
    pub fn layer_buffers(&self, layer: u32) -> Result<(&[wgpu::Buffer], &[wgpu::Buffer])> {
        self.layer(layer).map(|storage| (storage.k.buffers(), storage.values().buffers()))
    }

    fn layer(&self, layer: u32) -> Result<&storage::LayerStorage> {
        self.layers.get(layer)
    }

    /// A new, empty sequence. Takes no block.
    pub fn create_sequence(&self) -> SequenceId {
        self.state().create()
    }

    /// A new sequence with the same tokens, sharing all blocks. Costs O(blocks) on the host and nothing on the GPU; the first of the
    /// two that appends into a shared, partly filled block gets a copy of that block, made on the GPU within its step.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn fork(&self, sequence: SequenceId) -> Result<SequenceId> {
        self.state().fork(sequence)
    }

    /// A new sequence of the first `len` tokens, sharing their blocks. [`KvCache::fork`] is this with the sequence's length.
    ///
    /// `len` may lie in the middle of a block, and the source may go on behind it: that block is shared as well, and whichever
    /// of the two first appends into it gets a copy.
    ///
    /// # Errors
    /// [`Error::Argument`] if `len` is more than the sequence has, or blocks that its next token would see have left the
    /// [window](KvCacheConfig::groups) ([`KvCache::reaches_back`]); [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn fork_at(&self, sequence: SequenceId, len: u32) -> Result<SequenceId> {
        self.state().fork_at(sequence, len)
    }

    /// Makes the sequence's full blocks findable by their tokens: [`KvCache::match_prefix`] starts later sequences with them.
    /// Returns the number of blocks that were not in the index yet; where the same tokens are, the block that came first stays.
    ///
    /// `tokens` are the sequence's first tokens, all or a part. What is behind their last full block is ignored. The index takes
    /// the caller's word for it that these are the tokens of the rows in the cache. **Commit and submit** the steps that bring
    /// them before, or at least submit those before any step of a sequence that matches. The sequence may be in an open step.
    ///
    /// `salt` parts what must not mix though the tokens are equal: adapters (LoRA), images behind placeholder tokens, tenants.
    ///
    /// The index holds the blocks itself: they stay when the sequence is truncated or freed, until a step finds no free block.
    /// Then those that nobody else holds are evicted, least recently used ones first, and the end of a prefix before its
    /// beginning. A sequence that is truncated into an indexed block gets a copy of it when it goes on, even
    /// if no other sequence holds the block; where the pool has no room for the copy, [`KvCache::forget_prefixes`] makes some.
    ///
    /// Costs O(blocks) on the host and nothing on the GPU, and memory of the host for the tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] for more tokens than the sequence has; [`Error::UnknownSequence`].
    pub fn publish_prefix(&self, sequence: SequenceId, tokens: &[u32], salt: u64) -> Result<u32> {
        self.state().publish_prefix(sequence, tokens, salt)
    }

    /// A new sequence that begins with the longest indexed run of full blocks of `tokens` under this salt; it may be empty.
    /// The tokens from [`PrefixMatch::len`] on are the caller's to append.
    ///
    /// With [windows](KvCacheConfig::groups) the match ends where the next token finds all that it sees, in every group of layers.
    ///
    /// The match may cover all of `tokens`. A decoder that needs the logits of the last one passes all but that one.
    ///
    /// Tokens are compared, not only their hashes. Costs O(blocks) on the host and nothing on the GPU; appending after the match
    /// copies nothing, because it ends with a full block.
    pub fn match_prefix(&self, tokens: &[u32], salt: u64) -> PrefixMatch {
        self.state().match_prefix(tokens, salt)
    }

    /// [`KvCache::match_prefix`] for a sequence that is there and empty, so that its id stays. Returns how many tokens it has then: a multiple of
    /// block_size, possibly 0.
    ///
    /// # Errors
    /// [`Error::Argument`] if the sequence has tokens; [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn match_prefix_into(&self, sequence: SequenceId, tokens: &[u32], salt: u64) -> Result<u32> {
        self.state().match_prefix_into(sequence, tokens, salt)
    }

    /// What [`KvCache::match_prefix`] would find, without a match: nothing is held, and the statistics don't count it.
    #[must_use]
    pub fn probe_prefix(&self, tokens: &[u32], salt: u64) -> PrefixProbe {
        self.state().probe_prefix(tokens, salt)
    }

    /// Who holds each block of the pool, in the order of the blocks.
    #[must_use]
    pub fn block_uses(&self) -> Vec<BlockUse> {
        self.state().block_uses()
    }

    /// Blocks that return to the pool, or that only the prefix index holds, when this sequence is freed.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn exclusive_blocks(&self, sequence: SequenceId) -> Result<u32> {
        self.state().exclusive_blocks(sequence)
    }

    /// Of how many of its last blocks, one per [group of layers](KvCacheConfig::groups), the next token of this sequence takes a copy: they are partly
    /// filled, and others hold them, too.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn copied_blocks(&self, sequence: SequenceId) -> Result<u32> {
        self.state().copied_blocks(sequence)
    }

    /// Drops all of the index's entries under a salt. Their blocks return to the pool, except those that others hold.
    /// Returns the number of entries.
    ///
    /// # Errors
    /// [`Error::Argument`] for a salt without entries: none were published, or all have been forgotten or evicted.
    pub fn forget_prefixes(&self, salt: u64) -> Result<u32> {
        self.state().forget_prefixes(salt)
    }

    /// What the prefix index holds, and how often it was of use.
    #[must_use]
    pub fn prefix_stats(&self) -> PrefixStats {
        self.state().prefix_stats()
    }

    /// Forgets the tokens from `len` on, for example rejected speculative ones, and gives blocks that are no longer needed back.
    ///
    /// # Errors
    /// [`Error::Argument`] if `len` is more than the sequence has, or blocks that its next token would see have left the
    /// [window](KvCacheConfig::groups) ([`KvCache::reaches_back`]); [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn truncate(&self, sequence: SequenceId, len: u32) -> Result<()> {
        self.state().truncate(sequence, len)
    }

    /// Whether a sequence can be cut back to, or forked at, `len` tokens: it has as many, and all that the token behind them sees is still in the
    /// cache. Without a [window](KvCacheConfig::groups) the second is always so.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn reaches_back(&self, sequence: SequenceId, len: u32) -> Result<bool> {
        self.state().reaches_back(sequence, len)
    }

    /// Gives the blocks back that no token from the sequence's length on can see. [`KvCache::begin_step`] does it by itself for the sequences of the
    /// step; this is for one that rests. It can't be cut back behind its window then. Returns how many blocks the sequence has given back.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn release_hidden(&self, sequence: SequenceId) -> Result<u32> {
        self.state().release_hidden(sequence)
    }

    /// Fails if sequences can't grow by so many tokens in however many steps.
    #[cfg(feature = "model")]
    pub(crate) fn check_room(&self, requests: &[(SequenceId, u32)]) -> Result<()> {
        self.state().check_room(requests)
    }

    /// Keeps what these lengths need until it is taken back by `None`: the sequence can be cut back to them whatever it grows to.
    #[cfg(feature = "model")]
    pub(crate) fn set_way_back(&self, sequence: SequenceId, way_back: Option<WayBack>) {
        self.state().set_way_back(sequence, way_back);
    }

    /// Ends a sequence. Its blocks return to the pool, except those that a fork or the prefix index still holds.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::SequenceBusy`].
    pub fn free(&self, sequence: SequenceId) -> Result<()> {
        self.state().free(sequence)
    }

    /// Ends all sequences and empties the prefix index; calibrated scales stay. Open steps become stale: committing them is refused.
    pub fn clear(&self) {
        self.state().clear();
    }

    /// Tokens of a sequence, open steps not counted.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn seq_len(&self, sequence: SequenceId) -> Result<u32> {
        Ok(self.state().table(sequence)?.len())
    }

    /// Blocks of a sequence in the first group of layers, in the order of its tokens: [`BlockId::NULL`] for those that have left the [window](KvCacheConfig::groups).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn block_table(&self, sequence: SequenceId) -> Result<Vec<BlockId>> {
        Ok(self.state().table(sequence)?.blocks().to_vec())
    }

    /// [`KvCache::block_table`] of each [group of layers](KvCacheConfig::groups).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn block_tables(&self, sequence: SequenceId) -> Result<Vec<Vec<BlockId>>> {
        Ok(self.state().tables(sequence)?.iter().map(|table| table.blocks().to_vec()).collect())
    }

    /// How full the pool is.
    #[must_use]
    pub fn usage(&self) -> PoolUsage {
        self.state().usage()
    }

    /// Where the pool's bytes are, in all and for each sequence. Costs O(blocks) on the host.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        self.state().memory()
    }

    /// Reserves room for `query_len` new tokens of each sequence. Host only: what the kernels need to know is uploaded when they are recorded.
    ///
    /// The tokens of the batch stand one after another, in this order, in the k, v, q and out buffers of the step.
    ///
    /// If the pool has too few free blocks, the prefix index gives some up; they don't come back if the step is dropped. Nor do blocks that the
    /// sequences' [windows](KvCacheConfig::groups) have left, which return to the pool first.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`] if the pool has too few free blocks even so (retry after freeing some);
    /// [`Error::Argument`] for an empty batch, a sequence that occurs twice or a `query_len` of 0;
    /// [`Error::UnknownSequence`]; [`Error::SequenceBusy`]; [`Error::Unsupported`] if the tables don't fit into a binding;
    /// [`Error::Wgpu`].
    /// In every case nothing has changed.
    pub fn begin_step(&self, batch: &[(SequenceId, u32)]) -> Result<Step> {
        self.begin(batch, &[], None)
    }

    /// [`KvCache::begin_step`] with positions of the caller's own: one per new token, in the order of the tokens in the step's buffers.
    ///
    /// Positions only say how far a rotary embedding ([`Rope`]) rotates a token. Otherwise they are the tokens' indices in
    /// their sequences, and may be any `u32` here: for caches that have
    /// dropped tokens, or for positions that skip. What a query sees still follows from the order of the tokens in the cache.
    ///
    /// # Errors
    /// Those of [`KvCache::begin_step`]; [`Error::Argument`] if there isn't exactly one position per new token.
    pub fn begin_step_with_positions(&self, batch: &[(SequenceId, u32)], positions: &[u32]) -> Result<Step> {
        let num_tokens: u64 = batch.iter().map(|&(_, query_len)| u64::from(query_len)).sum();
        if positions.len() as u64 != num_tokens {
            let got = format!("{} positions", positions.len());
            return Err(Error::argument("positions", got, format!("one per new token, {num_tokens}")));
        }
        self.begin(batch, &[], Some(positions))
    }

    /// [`KvCache::begin_step`] with new tokens that branch, to be verified in one step: a tree for each sequence of the batch, in its order, or
    /// `None`. A tree has as many tokens as are new. Their positions are `context_len + depth`, and attention needs
    /// [`AttentionConfig::trees`](crate::AttentionConfig::trees) if one of the trees is no line. The step is committed after
    /// [`KvCache::accept`].
    ///
    /// # Errors
    /// Those of [`KvCache::begin_step`]; [`Error::Argument`] for another number of trees than sequences, or a tree of another number of tokens.
    pub fn begin_step_with_trees(&self, batch: &[(SequenceId, u32)], trees: &[Option<TokenTree>]) -> Result<Step> {
        if trees.len() != batch.len() {
            let got = format!("{} trees", trees.len());
            return Err(Error::argument("trees", got, format!("one or None per sequence, {}", batch.len())));
        }
        for (&(sequence, query_len), tree) in batch.iter().zip(trees) {
            if let Some(tree) = tree.as_ref().filter(|tree| tree.len() != query_len) {
                let got = format!("{} tokens for {sequence}", tree.len());
                return Err(Error::argument("trees", got, format!("as many as are new, {query_len}")));
            }
        }
        self.begin(batch, trees, None)
    }

    /// `trees` are as many as sequences, or none at all.
    fn begin(
        &self,
        batch: &[(SequenceId, u32)],
        trees: &[Option<TokenTree>],
        positions: Option<&[u32]>,
    ) -> Result<Step> {
        let (mut reservation, epoch) = {
            let mut state = self.state();
            (state.reserve(batch)?, state.epoch())
        };
        let trees: Vec<_> = trees.iter().map(|tree| tree.clone().map(Arc::new)).collect();
        for group in &mut reservation.groups {
            for (entry, tree) in group.batch.entries.iter_mut().zip(&trees) {
                // A line is what a sequence appends without a tree, and is computed like that.
                entry.tree = tree.clone().filter(|tree| !tree.is_line());
            }
        }
        let indices: Vec<u32>;
        let positions = match positions {
            Some(positions) => positions,
            None => {
                let entries = reservation.groups.first().map(|group| &group.batch.entries);
                indices = entries.into_iter().flatten().flat_map(BatchEntry::positions).collect();
                &indices
            }
        };
        let work = |ReservedGroup { batch, slots, copies, .. }: ReservedGroup| {
            let upload = self.kernels.upload(&self.gpu, &self.config, &slots, positions, &copies)?;
            Ok(GroupWork { batch, num_copies: copies.len() as u32, upload })
        };
        let groups = match reservation.groups.into_iter().map(work).collect::<Result<Vec<_>>>() {
            Ok(groups) => groups,
            Err(error) => {
                self.state().roll_back(reservation.pending);
                return Err(error);
            }
        };
        Ok(Step {
            state: Arc::clone(&self.state),
            layers: Arc::clone(&self.layers),
            epoch,
            config: self.config,
            sequences: batch.iter().map(|&(id, _)| id).collect(),
            groups,
            trees,
            pending: Some(reservation.pending),
            status: Step::open_status(),
        })
    }

    /// Makes the step's tokens part of their sequences. Record the step's commands first. They may be submitted before or after this; what was
    /// uploaded for them stays until they have run.
    ///
    /// # Errors
    /// [`Error::Stale`] for a step of another cache, or from before [`KvCache::clear`]; [`Error::Argument`] for one with trees of which no paths
    /// have been [accepted](Self::accept); [`Error::DeviceLost`]. The step is dropped, which rolls it back.
    pub fn commit(&self, mut step: Step) -> Result<()> {
        step.check_complete(&self.state)?;
        self.gpu.check_alive("committing a step")?;
        // Cleared by another thread since the check.
        let stale = Error::Stale { what: "step", reason: "the cache has been cleared since it began" };
        let is_valid = step.finish().is_some_and(|pending| self.state().commit(pending));
        if is_valid { Ok(()) } else { Err(stale) }
    }
}

//! [`Step`]: the reservation of one batch of new tokens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Layers;
use super::state::{SharedState, lock};
use crate::error::{Error, Result};
use crate::gpu::Upload;
use crate::ids::SequenceId;
use crate::layout::KvCacheConfig;
use crate::sequence::{Batch, Pending, TokenTree};

const OPEN: u8 = 0;
const COMMITTED: u8 = 1;
const ROLLED_BACK: u8 = 2;
/// Still open, but its rows may have moved.
const ACCEPTED: u8 = 3;

/// Whether the step is still open.
#[derive(Clone, Debug)]
pub(super) struct StepStatus(Arc<AtomicU8>);

impl StepStatus {
    /// Fails unless the step is open.
    fn check_open(&self) -> Result<()> {
        let reason = match self.0.load(Ordering::Acquire) {
            OPEN => return Ok(()),
            COMMITTED => "it has been committed",
            ACCEPTED => "paths of it have been accepted, and only committing is left",
            _ => "it has been rolled back",
        };
        Err(Error::Stale { what: "step", reason })
    }

    /// Whether it has neither been committed nor rolled back.
    fn is_pending(&self) -> bool {
        matches!(self.0.load(Ordering::Acquire), OPEN | ACCEPTED)
    }

    fn set(&self, status: u8) {
        self.0.store(status, Ordering::Release);
    }
}

/// Tells whether a step is still open, without holding it.
#[derive(Clone, Debug)]
pub(crate) struct StepTicket {
    state: SharedState,
    epoch: u64,
    status: StepStatus,
}

impl StepTicket {
    /// Fails if the step has ended, or the cache has been cleared since it began.
    pub(crate) fn check(&self) -> Result<()> {
        lock(&self.state).check_epoch(self.epoch, "step")?;
        self.status.check_open()
    }
}

/// What the layers of a group do in a step.
#[derive(Debug)]
pub(super) struct GroupWork {
    pub(super) batch: Batch,
    pub(super) num_copies: u32,
    /// Parameters, slot and position of every token, and (source, destination) of every block to copy; see `cache::record`.
    pub(super) upload: Upload,
}

/// A step as the layers of one [group](KvCacheConfig::groups) see it: with their block tables. From [`Step::group`]; a step itself stands for its first
/// group, which is the only one unless layers keep different tokens.
#[derive(Clone, Copy, Debug)]
pub struct StepGroup<'a> {
    step: &'a Step,
    group: u32,
}

impl<'a> StepGroup<'a> {
    /// The step.
    #[must_use]
    pub fn step(&self) -> &'a Step {
        self.step
    }

    /// Which group.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.group
    }

    /// Query lengths, context lengths and the group's block tables, as plain data.
    #[must_use]
    pub fn batch(&self) -> &'a Batch {
        &self.step.groups[self.group as usize].batch
    }
}

impl<'a> From<&'a Step> for StepGroup<'a> {
    fn from(step: &'a Step) -> Self {
        Self { step, group: 0 }
    }
}

/// New tokens of some sequences, with the blocks reserved that they need. Made by [`KvCache::begin_step`](super::KvCache::begin_step).
///
/// Nothing changes for a sequence until [`KvCache::commit`](super::KvCache::commit). Dropping the step instead rolls back: the
/// blocks return to the pool. Drop it only if its recorded commands will never be submitted, or have been submitted
/// already: blocks that returned may belong to another sequence by then.
#[derive(Debug)]
pub struct Step {
    pub(super) state: SharedState,
    pub(super) epoch: u64,
    pub(super) layers: Arc<Layers>,
    pub(super) config: KvCacheConfig,
    pub(super) sequences: Vec<SequenceId>,
    /// Of each group of layers; never empty.
    pub(super) groups: Vec<GroupWork>,
    /// How the new tokens of each sequence branch; lines as well, if they were given as trees.
    pub(super) trees: Vec<Option<Arc<TokenTree>>>,
    /// What commit does to each sequence; taken by commit and by drop.
    pub(super) pending: Option<Pending>,
    pub(super) status: StepStatus,
}

impl Step {
    pub(super) fn open_status() -> StepStatus {
        StepStatus(Arc::new(AtomicU8::new(OPEN)))
    }

    /// The sequences, in the order of their tokens.
    #[must_use]
    pub fn sequences(&self) -> &[SequenceId] {
        &self.sequences
    }

    /// Query lengths, context lengths and block tables, as plain data; the tables are those of the first group of layers.
    #[must_use]
    pub fn batch(&self) -> &Batch {
        &self.groups[0].batch
    }

    /// The step as the layers of a group see it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a group that isn't there.
    pub fn group(&self, group: u32) -> Result<StepGroup<'_>> {
        let count = self.config.groups.count();
        if group >= count {
            return Err(Error::argument("group", group, format!("below the number of groups of layers, {count}")));
        }
        Ok(StepGroup { step: self, group })
    }

    /// What the group of a layer of the cache does.
    pub(super) fn of_layer(&self, layer: u32) -> &GroupWork {
        &self.groups[self.config.group_of(layer) as usize]
    }

    /// Tokens of all sequences: the first axis of q, k, v and out.
    #[must_use]
    pub fn num_tokens(&self) -> u32 {
        self.batch().num_tokens()
    }

    /// Exclusive prefix sum of the query lengths: the tokens of sequence `i` are `query_start[i] .. query_start[i + 1]`.
    #[must_use]
    pub fn query_start(&self) -> Vec<u32> {
        self.batch().query_start()
    }

    /// Shared blocks that this step replaces by copies (copy-on-write).
    #[must_use]
    pub fn num_copies(&self) -> u32 {
        self.groups.iter().map(|group| group.num_copies).sum()
    }

    /// Fails unless the step is open and belongs to the cache of this state.
    pub(crate) fn check_usable(&self, cache: &SharedState) -> Result<()> {
        if !Arc::ptr_eq(&self.state, cache) {
            return Err(Error::Stale { what: "step", reason: "it belongs to another cache" });
        }
        self.ticket().check()
    }

    /// Fails unless it can be committed to the cache of this state.
    pub(super) fn check_complete(&self, cache: &SharedState) -> Result<()> {
        let is_accepted = self.status.0.load(Ordering::Acquire) == ACCEPTED;
        if is_accepted && Arc::ptr_eq(&self.state, cache) {
            return lock(&self.state).check_epoch(self.epoch, "step");
        }
        self.check_usable(cache)?;
        if self.trees.iter().any(Option::is_some) {
            let got = "one with a tree of which no path has been accepted";
            return Err(Error::argument("step", got, "KvCache::accept before"));
        }
        Ok(())
    }

    /// Only committing and dropping are left.
    pub(super) fn set_accepted(&mut self, paths: &[(SequenceId, &[u32])]) {
        for &(sequence, path) in paths {
            if let Some(pending) = &mut self.pending {
                // The paths are checked: they are no longer than the trees.
                pending.keep(sequence, path.len() as u32);
            }
        }
        self.status.set(ACCEPTED);
    }

    /// What a plan keeps in order to notice that its step is over.
    pub(crate) fn ticket(&self) -> StepTicket {
        StepTicket { state: Arc::clone(&self.state), epoch: self.epoch, status: self.status.clone() }
    }

    pub(crate) fn config(&self) -> &KvCacheConfig {
        &self.config
    }

    pub(crate) fn shared_layers(&self) -> &Arc<Layers> {
        &self.layers
    }

    /// An upload with the positions of the tokens, which are the same for all layers.
    pub(crate) fn positions(&self) -> &Upload {
        &self.groups[0].upload
    }

    /// Ends it. Returns what committing does.
    pub(super) fn finish(&mut self) -> Option<Pending> {
        self.status.set(COMMITTED);
        self.pending.take()
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if self.status.is_pending() {
            self.status.set(ROLLED_BACK);
            if let Some(pending) = self.pending.take() {
                lock(&self.state).roll_back(pending);
            }
        }
    }
}

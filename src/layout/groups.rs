//! [`LayerGroups`]: layers that keep different tokens.

use std::fmt;

use super::Retention;
use crate::error::{Error, Result};

/// What the layers of a group keep of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LayerGroup {
    /// A promise that no attention of these layers sees further back than this many newest tokens, besides the first
    /// [`sink_tokens`](Self::sink_tokens): blocks that no later token can see return to the pool. At least 1; not in a contiguous cache. `None`: every
    /// token is kept.
    pub window: Option<u32>,
    /// First tokens of every sequence that are kept beside the window, as attention sinks (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453).
    pub sink_tokens: u32,
}

impl LayerGroup {
    /// Layers that keep every token.
    pub const ALL: Self = Self { window: None, sink_tokens: 0 };

    /// Layers that keep the newest `window` tokens.
    #[must_use]
    pub const fn windowed(window: u32) -> Self {
        Self { window: Some(window), sink_tokens: 0 }
    }

    /// In blocks of so many tokens.
    #[must_use]
    pub const fn retention(self, block_size: u32) -> Retention {
        Retention { block_size, window: self.window, sink_tokens: self.sink_tokens }
    }
}

impl fmt::Display for LayerGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.window {
            None => write!(f, "all tokens"),
            Some(window) => write!(f, "a window of {window} and {} sink tokens", self.sink_tokens),
        }
    }
}

/// The layers of a cache in groups of equal size, each of which keeps the same tokens. A sequence has a block table for each of them, and all take their
/// blocks from one pool. Layers that keep different tokens are in different groups; those that keep the same may be.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerGroups {
    /// The first `count` of them; the others are all the same, so that equal lists are equal.
    groups: [LayerGroup; Self::MAX as usize],
    count: u32,
}

impl LayerGroups {
    /// Most groups. Each has lists of its own in every step: a table of a word for each block of each sequence, and a plan.
    pub const MAX: u32 = 16;

    /// All layers in one group.
    #[must_use]
    pub const fn one(group: LayerGroup) -> Self {
        let mut groups = [LayerGroup::ALL; Self::MAX as usize];
        groups[0] = group;
        Self { groups, count: 1 }
    }

    /// These groups. The layers of a cache are theirs in this order, the same number for each.
    ///
    /// # Errors
    /// [`Error::Argument`] for none or more than [`MAX`](Self::MAX).
    pub fn new(given: &[LayerGroup]) -> Result<Self> {
        let mut groups = [LayerGroup::ALL; Self::MAX as usize];
        match groups.get_mut(..given.len()) {
            Some(own) if !given.is_empty() => own.copy_from_slice(given),
            _ => return Err(Error::argument("groups", given.len(), format!("1 to {}", Self::MAX))),
        }
        Ok(Self { groups, count: given.len() as u32 })
    }

    /// The groups.
    #[must_use]
    pub fn as_slice(&self) -> &[LayerGroup] {
        &self.groups[..self.count as usize]
    }

    /// How many there are; at least 1.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// One of them; [`LayerGroup::ALL`] if there aren't as many.
    #[must_use]
    pub fn get(&self, group: u32) -> LayerGroup {
        self.as_slice().get(group as usize).copied().unwrap_or(LayerGroup::ALL)
    }

    /// Whether any of them has a window.
    #[must_use]
    pub fn has_windows(&self) -> bool {
        self.as_slice().iter().any(|group| group.window.is_some())
    }

    /// The same, with another window in all of them.
    pub(super) const fn with_window(mut self, window: Option<u32>) -> Self {
        let mut at = 0;
        while at < self.count as usize {
            self.groups[at].window = window;
            at += 1;
        }
        self
    }

    /// The same, with so many sink tokens in all of them.
    pub(super) const fn with_sink_tokens(mut self, sink_tokens: u32) -> Self {
        let mut at = 0;
        while at < self.count as usize {
            self.groups[at].sink_tokens = sink_tokens;
            at += 1;
        }
        self
    }

    /// Blocks that the rows of `seq_len` tokens take in all groups.
    #[must_use]
    pub fn blocks_for(&self, block_size: u32, seq_len: u32) -> u32 {
        self.sum(block_size, |retention| retention.blocks_for(seq_len))
    }

    /// [`Retention::held_blocks`] of all groups.
    #[must_use]
    pub fn held_blocks(&self, block_size: u32, seq_len: u32) -> u32 {
        self.sum(block_size, |retention| retention.held_blocks(seq_len))
    }

    /// [`Retention::most_blocks`] of all groups.
    #[must_use]
    pub fn most_blocks(&self, block_size: u32, seq_len: u32, chunk: u32) -> u32 {
        self.sum(block_size, |retention| retention.most_blocks(seq_len, chunk))
    }

    fn sum(&self, block_size: u32, of: impl Fn(Retention) -> u32) -> u32 {
        self.as_slice().iter().map(|group| of(group.retention(block_size))).fold(0, u32::saturating_add)
    }
}

impl Default for LayerGroups {
    /// One group that keeps all.
    fn default() -> Self {
        Self::one(LayerGroup::ALL)
    }
}

impl fmt::Debug for LayerGroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}

//! [`Rollback`]: a call that fails has changed nothing.

use std::sync::Arc;

use super::feed::Feed;
use crate::sequence::WayBack;
use crate::{KvCache, SequenceId};

/// Cuts sequences back to where a call began, unless it succeeds: also if its future is dropped half-way. Until then, what they see there stays in
/// the cache.
pub(super) struct Rollback {
    cache: Arc<KvCache>,
    lengths: Vec<(SequenceId, u32)>,
    is_armed: bool,
}

impl Rollback {
    pub(super) fn new(cache: &Arc<KvCache>, feeds: &[Feed<'_>]) -> Self {
        let cache = Arc::clone(cache);
        for feed in feeds {
            // Of drafts any number may be right.
            let drafts = feed.draw.map_or(0, |input| input.drafts as usize);
            let from = if drafts > 0 { feed.len + (feed.tokens.len() - drafts) as u32 } else { u32::MAX };
            cache.set_way_back(feed.sequence, Some(WayBack { to: feed.len, from }));
        }
        Self { cache, lengths: feeds.iter().map(|feed| (feed.sequence, feed.len)).collect(), is_armed: true }
    }

    pub(super) fn disarm(mut self) {
        self.is_armed = false;
    }
}

impl Drop for Rollback {
    fn drop(&mut self) {
        for &(sequence, len) in &self.lengths {
            if self.is_armed {
                // It can only fail for a sequence that is gone, and then there is nothing to cut.
                let _ = self.cache.truncate(sequence, len);
            }
            self.cache.set_way_back(sequence, None);
        }
    }
}

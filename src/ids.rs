//! [`SequenceId`] and [`BlockId`]: what sequences and blocks are called.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};

/// A sequence of a cache. Ids are never used again, and no other cache knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    /// Differs between the caches of a process.
    cache: u64,
    number: u64,
}

impl SequenceId {
    /// The first id of a new cache.
    pub(crate) fn first() -> Self {
        // std's per-map random keys: a number that no other cache has, without a global counter of our own.
        Self { cache: RandomState::new().build_hasher().finish(), number: 0 }
    }

    /// The id after this one.
    pub(crate) const fn next(self) -> Self {
        Self { cache: self.cache, number: self.number + 1 }
    }

    /// Whether the cache whose next id is `next` has given this one out.
    pub(crate) const fn is_before(self, next: Self) -> bool {
        self.cache == next.cache && self.number < next.number
    }
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sequence #{}", self.number)
    }
}

/// Index of a block in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub(crate) u32);

impl BlockId {
    /// Stands in a block table where a block has returned to the pool, because its tokens have left the window
    /// ([`KvCacheConfig::with_window`](crate::KvCacheConfig::with_window)). No pool is so large that it has a block of this index.
    pub const NULL: Self = Self(u32::MAX);

    /// The index, below `num_blocks`; that of [`BlockId::NULL`] is 2^32 - 1.
    #[must_use]
    pub const fn index(self) -> u32 {
        self.0
    }

    /// Whether this is [`BlockId::NULL`].
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.0 == Self::NULL.0
    }
}

//! What random operations there are.

use proptest::prelude::*;
use proptest::sample::Index;

/// What becomes of a step.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fate {
    /// Recorded, submitted and committed.
    Commit,
    /// Stays open until [`Op::End`].
    Hold,
    /// Submitted, then dropped all the same.
    Drop,
    /// Dropped without a submit.
    DropUnsubmitted,
}

#[derive(Clone, Debug)]
pub(super) enum Op {
    Create,
    /// A new sequence of so many tokens, the bits of a number, which are published.
    Prompt(u32, u32),
    /// The new tokens of each sequence are the bits of a number, so that prefixes come again.
    Step(Vec<(Index, u32, u32)>, Fate),
    /// Ends one of the open steps.
    End(Index, bool),
    Fork(Index),
    ForkAt(Index, Index),
    Truncate(Index, Index),
    Free(Index),
    /// What has left its window returns to the pool at once.
    Release(Index),
    /// The first tokens of a sequence under a salt; with other tokens than it has if `lie`.
    Publish {
        sequence: Index,
        len: Index,
        salt: u64,
        lie: bool,
    },
    /// Tokens of a sequence, then some more.
    Match {
        like: Index,
        len: Index,
        more: Vec<u32>,
        salt: u64,
    },
    Forget(u64),
    /// Takes blocks as whoever needs blocks for something else does (swapping a sequence in, for one) and holds them.
    Take(u32),
    GiveBack(Index),
    /// To the host, or not after all.
    SwapOut(Index, bool),
    /// The sequence that was swapped out last comes back, or its blocks are given back.
    SwapIn(bool),
    /// Committed or dropped.
    Defragment(bool),
    Bad(Index, Bad),
    Clear,
}

/// Calls that are refused whatever the state is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bad {
    ForkBeyond,
    TruncateBeyond,
    PublishBeyond,
    UnknownSalt,
    UnknownSequence,
    EmptyBatch,
    Twice,
    NoTokens,
    TooManyTokens,
    TooManyBlocks,
}

/// Salts that are published under.
pub(super) const SALTS: u64 = 2;

pub(super) fn op() -> impl Strategy<Value = Op> {
    let any = any::<Index>;
    let fate = prop_oneof![
        5 => Just(Fate::Commit),
        2 => Just(Fate::Hold),
        1 => Just(Fate::Drop),
        1 => Just(Fate::DropUnsubmitted)
    ];
    let bad = prop::sample::select(vec![
        Bad::ForkBeyond,
        Bad::TruncateBeyond,
        Bad::PublishBeyond,
        Bad::UnknownSalt,
        Bad::UnknownSequence,
        Bad::EmptyBatch,
        Bad::Twice,
        Bad::NoTokens,
        Bad::TooManyTokens,
        Bad::TooManyBlocks,
    ]);
    let batch = prop::collection::vec((any(), 1..7_u32, 0..8_u32), 1..5);
    // Now and then a salt under which nothing was published.
    let salt = || 0..=SALTS;
    prop_oneof![
        2 => Just(Op::Create),
        8 => (1..17_u32, 0..8_u32).prop_map(|(count, bits)| Op::Prompt(count, bits)),
        18 => (batch, fate).prop_map(|(batch, fate)| Op::Step(batch, fate)),
        6 => (any(), prop::bool::ANY).prop_map(|(step, commit)| Op::End(step, commit)),
        2 => any().prop_map(Op::Fork),
        6 => (any(), any()).prop_map(|(s, len)| Op::ForkAt(s, len)),
        6 => (any(), any()).prop_map(|(s, len)| Op::Truncate(s, len)),
        9 => any().prop_map(Op::Free),
        3 => any().prop_map(Op::Release),
        10 => (any(), any(), 0..SALTS, prop::bool::weighted(0.1))
            .prop_map(|(sequence, len, salt, lie)| Op::Publish { sequence, len, salt, lie }),
        8 => (any(), any(), prop::collection::vec(0..2_u32, 0..6), salt())
            .prop_map(|(like, len, more, salt)| Op::Match { like, len, more, salt }),
        2 => salt().prop_map(Op::Forget),
        2 => (0..6_u32).prop_map(Op::Take),
        2 => any().prop_map(Op::GiveBack),
        4 => (any(), prop::bool::weighted(0.8)).prop_map(|(s, finish)| Op::SwapOut(s, finish)),
        4 => prop::bool::weighted(0.8).prop_map(Op::SwapIn),
        4 => prop::bool::weighted(0.8).prop_map(Op::Defragment),
        4 => (any(), bad).prop_map(|(s, bad)| Op::Bad(s, bad)),
        1 => Just(Op::Clear),
    ]
}

//! [`Retention`]: which blocks of a sequence are kept.

use std::ops::Range;

/// Which blocks of a sequence a group of layers keeps while it grows: all, or those that its window and its sink tokens need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Retention {
    /// Tokens of a block. A size of 0, which is not valid, counts as 1.
    pub block_size: u32,
    /// Newest tokens that a token sees, itself included. `None`: all.
    pub window: Option<u32>,
    /// First tokens that it sees besides.
    pub sink_tokens: u32,
}

impl Retention {
    /// Blocks of the rows of `seq_len` tokens.
    #[must_use]
    pub fn blocks_for(&self, seq_len: u32) -> u32 {
        seq_len.div_ceil(self.block_size.max(1))
    }

    /// Which blocks of a sequence of `seq_len` tokens no later token sees: those that lie wholly between the sink tokens and the window of the next
    /// token, which is `seq_len + 1 - window ..= seq_len`. Empty without a window.
    #[must_use]
    pub fn hidden_blocks(&self, seq_len: u32) -> Range<u32> {
        let sinks = self.blocks_for(self.sink_tokens);
        let first_seen = self.window.map_or(0, |window| {
            // A window near 2^32 is longer than any sequence.
            let key = (u64::from(seq_len) + 1).saturating_sub(window.into());
            (key / u64::from(self.block_size.max(1))) as u32
        });
        sinks..first_seen.max(sinks)
    }

    /// Blocks that a sequence of `seq_len` tokens holds at least: all but the [hidden](Self::hidden_blocks) ones.
    #[must_use]
    pub fn held_blocks(&self, seq_len: u32) -> u32 {
        let hidden = self.hidden_blocks(seq_len);
        let all = self.blocks_for(seq_len);
        all - (hidden.end.min(all) - hidden.start.min(all))
    }

    /// Blocks that a sequence holds at most while it grows to `seq_len` tokens by up to `chunk` at a time: with a window about
    /// `sink_tokens + window + chunk` tokens of them, whatever its length.
    #[must_use]
    pub fn most_blocks(&self, seq_len: u32, chunk: u32) -> u32 {
        let all = self.blocks_for(seq_len);
        let Some(window) = self.window else { return all };
        // `window - 1` cached tokens and a chunk, which may begin and end in the middle of a block.
        let seen = (u64::from(window) + u64::from(chunk)).div_ceil(self.block_size.max(1).into()) + 1;
        let most = seen + u64::from(self.blocks_for(self.sink_tokens));
        all.min(u32::try_from(most).unwrap_or(u32::MAX))
    }
}

//! What a window shows, token by token, and what a manager with one promises.

use super::super::super::window::WayBack;
use super::*;

/// A window over blocks, by its definition.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) block_size: u32,
    /// Newest tokens that a token sees, itself included, and the first ones that it sees besides.
    pub(super) seen: Option<(u32, u32)>,
}

impl Window {
    pub(super) fn config(self, num_blocks: u32) -> KvCacheConfig {
        let plain = config(self.block_size, num_blocks);
        self.seen.map_or(plain, |(window, sinks)| plain.with_window(window).with_sink_tokens(sinks))
    }

    /// Whether a token at `position` sees a token before it.
    fn sees(self, position: u32, token: u32) -> bool {
        self.seen.is_none_or(|(window, sinks)| token < sinks || position - token < window)
    }

    /// Blocks of `len` tokens of which the next one sees some, or into which it is written.
    pub(super) fn needed(self, len: u32) -> impl Iterator<Item = u32> {
        let is_seen = move |block: &u32| {
            let begin = block * self.block_size;
            let end = begin + self.block_size;
            end > len || (begin..end).any(|token| self.sees(len, token))
        };
        (0..len.div_ceil(self.block_size)).filter(is_seen)
    }

    /// The others.
    pub(super) fn hidden(self, len: u32) -> impl Iterator<Item = u32> {
        let needed: HashSet<_> = self.needed(len).collect();
        (0..len.div_ceil(self.block_size)).filter(move |block| !needed.contains(block))
    }
}

/// 100 000 tokens in chunks, of several sizes, take what the configuration says at most, and at the end what it says at least.
#[test]
fn a_text_of_any_length_takes_a_window_of_memory() {
    for (block_size, window, sinks) in [(16, 1000, 0), (16, 1000, 5), (4, 1, 0), (256, 100, 3), (16, 33, 40), (1, 7, 2)]
    {
        for chunk in [1, 37, 512] {
            let config = Window { block_size, seen: Some((window, sinks)) }.config(2000);
            let mut m = Manager::new(config).unwrap();
            let s = m.create();
            let mut most = 0;
            let mut len = 0;
            while len < 100_000 / if chunk == 1 { 10 } else { 1 } {
                m.extend(s, chunk).unwrap();
                len += chunk;
                most = most.max(m.usage().used);
                assert!(m.usage().used <= config.most_blocks(len, chunk), "{config:?}");
            }
            let seen = (window + sinks).div_ceil(block_size);
            assert!(most >= seen.min(len / block_size) && most <= seen + chunk.div_ceil(block_size) + 3, "{most}");
            m.release_hidden(s).unwrap();
            assert_eq!(
                (m.usage().used, m.table(s).unwrap().num_held()),
                (config.held_blocks(len), config.held_blocks(len))
            );
            let report = m.memory();
            assert_eq!(report.sequences[0].released_blocks, config.blocks_for(len) - config.held_blocks(len));
            assert_eq!((report.sequence_tokens, report.saved_bytes()), (u64::from(len), 0));
            assert_eq!(report.released_tokens + report.cached_tokens, u64::from(len));
            m.free(s).unwrap();
            assert_eq!(m.usage().used, 0);
        }
    }
}

/// A step that is dropped, and a cut to any length that the last step had, leave all that the next token sees.
#[test]
fn the_last_step_can_be_taken_back() {
    let mut m = Manager::new(config(4, 20).with_window(6)).unwrap();
    let s = m.sequence(30);
    let step = m.reserve(&[(s, 5)]).unwrap();
    m.roll_back(step.pending);
    // A token at 30 sees 25 to 29: blocks 6 and 7 of 8.
    assert_eq!(
        m.blocks(s).iter().map(|block| block.is_null()).collect::<Vec<_>>(),
        [[true; 6].as_slice(), &[false; 2]].concat()
    );
    m.extend(s, 9).unwrap();
    let part = "len: got 28, need 29 to 39, or at most 0: what tokens between see has left the window of 6";
    m.refused(|m| m.truncate(s, 28), ErrorKind::Caller, part);
    m.refused(|m| m.fork_at(s, 1), ErrorKind::Caller, "len: got 1");
    for len in (29..39).rev() {
        assert!(m.reaches_back(s, len).unwrap());
        m.truncate(s, len).unwrap();
    }
    m.extend(s, 1).unwrap();
    m.truncate(s, 0).unwrap();
    assert_eq!((m.usage().used, m.sequence(3) == s), (0, false));
    m.extend(s, 7).unwrap();
    assert!(m.blocks(s).iter().all(|block| !block.is_null()));
}

/// A way back stays open however long the sequence grows, at the price of a window.
#[test]
fn a_way_back_stays_open() {
    for sinks in [0, 3, 9] {
        let config = config(4, 60).with_window(10).with_sink_tokens(sinks);
        let mut m = Manager::new(config).unwrap();
        let s = m.sequence(50);
        m.set_way_back(s, Some(WayBack { to: 50, from: u32::MAX }));
        for _ in 0..40 {
            m.extend(s, 7).unwrap();
            assert!(
                m.reaches_back(s, 50).unwrap() && m.usage().used <= 2 * config.most_blocks(1000, 7),
                "{:?}",
                m.usage()
            );
        }
        m.set_way_back(s, Some(WayBack { to: 50, from: 330 }));
        m.extend(s, 3).unwrap();
        m.extend(s, 20).unwrap();
        assert!([50, 330, 331, 340, 353].iter().all(|&len| m.reaches_back(s, len).unwrap()));
        assert!(!m.reaches_back(s, 100).unwrap() && !m.reaches_back(s, 320).unwrap());
        let back = m.fork_at(s, 50).unwrap();
        m.set_way_back(s, None);
        m.extend(s, 1).unwrap();
        assert!(!m.reaches_back(s, 50).unwrap());
        m.free(back).unwrap();
        m.release_hidden(s).unwrap();
        assert_eq!(m.usage().used, config.held_blocks(354));
    }
}

/// What has left a window stays known, as long as there is room, and a match holds no more than it needs.
#[test]
fn prefixes_are_found_after_their_blocks_have_left() {
    let mut m = Manager::new(config(4, 40).with_window(8).with_sink_tokens(2)).unwrap();
    let tokens: Vec<u32> = (0..64).collect();
    let s = m.create();
    for end in (8..=64).step_by(8) {
        m.extend(s, 8).unwrap();
        m.publish_prefix(s, &tokens[..end], 0).unwrap();
    }
    m.release_hidden(s).unwrap();
    // The sinks' block, and the 7 tokens before the next one.
    assert_eq!((m.table(s).unwrap().num_held(), m.usage().used, m.usage().reclaimable), (3, 16, 13));
    let hit = m.match_prefix(&tokens[..35], 0);
    assert_eq!((hit.len, m.table(hit.sequence).unwrap().num_held(), m.usage().reclaimable), (32, 3, 11));
    m.extend(hit.sequence, 9).unwrap();
    // Who began to publish too late has no parents for its blocks.
    let late = m.sequence(40);
    m.release_hidden(late).unwrap();
    assert_eq!(m.publish_prefix(late, &[7; 40], 0).unwrap(), 1);
}

/// Sizes that no text has.
#[test]
fn windows_of_any_size_are_counted() {
    for (window, sinks) in [(u32::MAX, 0), (u32::MAX, u32::MAX), (1, u32::MAX), (1, 0), (i32::MAX as u32, 5)] {
        let config = config(4, 10).with_window(window).with_sink_tokens(sinks);
        for len in [0, 1, 4, 9, u32::MAX] {
            let (hidden, all) = (config.hidden_blocks(len), config.blocks_for(len));
            assert!(config.held_blocks(len) <= all && config.most_blocks(len, u32::MAX) <= all);
            assert!(hidden.is_empty() || hidden.end <= all);
        }
        let mut m = Manager::new(config).unwrap();
        let s = m.sequence(20);
        m.extend(s, 9).unwrap();
        assert_eq!(m.table(s).unwrap().num_held(), if (window, sinks) == (1, 0) { 3 } else { 8 });
    }
    for bad in [config(4, 10).with_window(0), KvCacheConfig::contiguous(1, 1, 8, 2, 64).with_window(9)] {
        assert!(Manager::new(bad).unwrap_err().to_string().starts_with("window: got"));
    }
}

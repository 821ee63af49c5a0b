//! What a window shows, token by token, and what a manager with one promises.

use super::super::super::window::WayBack;
use super::*;
use crate::layout::{LayerGroup, LayerGroups};

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

    /// A cache with a group for each of these.
    pub(super) fn config_of(windows: &[Self], num_blocks: u32) -> KvCacheConfig {
        let group = |window: &Self| match window.seen {
            Some((window, sink_tokens)) => LayerGroup { window: Some(window), sink_tokens },
            None => LayerGroup::ALL,
        };
        let groups = LayerGroups::new(&windows.iter().map(group).collect::<Vec<_>>()).unwrap();
        let mut config = config(windows[0].block_size, num_blocks).with_groups(groups);
        config.num_layers = groups.count();
        config
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
    // Who publishes late publishes what is still there: it is found where the next token sees no more than that.
    let late = m.sequence(40);
    m.release_hidden(late).unwrap();
    assert_eq!(m.publish_prefix(late, &[7; 40], 0).unwrap(), 3);
    for (len, found) in [(40, 40), (43, 40), (39, 4), (8, 4), (3, 0)] {
        assert_eq!(m.found(&vec![7; len], 0), found, "{len}");
    }
    // A sequence that has what is missing adds it.
    let whole = m.sequence(24);
    assert_eq!((m.publish_prefix(whole, &[7; 24], 0).unwrap(), m.found(&[7; 24], 0)), (5, 24));
    m.prefixes.check(&m.pool);
}

/// Sizes that no text has.
#[test]
fn windows_of_any_size_are_counted() {
    for (window, sinks) in [(u32::MAX, 0), (u32::MAX, u32::MAX), (1, u32::MAX), (1, 0), (i32::MAX as u32, 5)] {
        let config = config(4, 10).with_window(window).with_sink_tokens(sinks);
        for len in [0, 1, 4, 9, u32::MAX] {
            let (hidden, all) = (config.retention(0).hidden_blocks(len), config.blocks_for(len));
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

/// Over 100 000 tokens, groups with a window hold what each of them needs, and the one without everything.
#[test]
fn groups_hold_what_each_of_them_needs() {
    let seen = [Some((1000, 0)), None, Some((64, 5)), Some((64, 5))];
    let windows = seen.map(|seen| Window { block_size: 16, seen });
    let config = Window::config_of(&windows, 6700);
    let mut m = Manager::new(config).unwrap();
    let s = m.create();
    let mut len = 0;
    while len < 100_000 {
        m.extend(s, 500).unwrap();
        len += 500;
        for (table, retention) in m.tables(s).unwrap().iter().zip(config.retentions()) {
            assert!(table.num_held() <= retention.most_blocks(len, 500), "{retention:?} at {len}");
            assert_eq!((table.len(), table.blocks().len() as u32), (len, retention.blocks_for(len)));
        }
        assert!(m.usage().used <= config.most_blocks(len, 500));
    }
    m.release_hidden(s).unwrap();
    let held: Vec<_> = m.tables(s).unwrap().iter().map(BlockTable::num_held).collect();
    assert_eq!((held, m.usage().used), (vec![63, 6250, 5, 5], config.held_blocks(len)));
    let report = m.memory();
    assert_eq!((report.sequences[0].blocks, report.num_groups), (6323, 4));
    assert_eq!((report.released_tokens + report.cached_tokens, report.saved_bytes()), (400_000, 0));
    // The group that keeps all may have what is free and what the others hold.
    let most = (m.usage().free + 63 + 5 + 5) * 16;
    m.check_room(&[(s, most)]).unwrap();
    m.refused(|m| m.check_room(&[(s, most + 1)]), ErrorKind::Retry, "need 451, have 450 free of 6700");
    // All groups or none.
    let before = m.usage().free;
    m.refused(|m| m.reserve(&[(s, before * 4 + 16)]), ErrorKind::Retry, "need");
    m.extend(s, before / 4 * 16).unwrap();
}

/// Blocks that a window has left go first, and alone: what comes after them is found.
#[test]
fn windowed_blocks_are_evicted_alone() {
    let windows = [Some((8, 0)), None].map(|seen| Window { block_size: 4, seen });
    let mut m = Manager::new(Window::config_of(&windows, 40)).unwrap();
    let tokens: Vec<u32> = (0..64).collect();
    let s = m.create();
    for end in (8..=64).step_by(8) {
        m.extend(s, 8).unwrap();
        assert_eq!(m.publish_prefix(s, &tokens[..end], 0).unwrap(), 4);
    }
    m.release_hidden(s).unwrap();
    assert_eq!((m.usage().free, m.usage().reclaimable), (8, 14));
    m.take_blocks(18).unwrap();
    m.prefixes.check(&m.pool);
    assert_eq!((m.prefix_stats().evicted_blocks, m.prefix_stats().indexed_blocks), (10, 22));
    // Those of places 0 to 9 are gone.
    for (len, found) in [(64, 64), (48, 48), (47, 0), (40, 0)] {
        assert_eq!(m.found(&tokens[..len], 0), found, "{len}");
    }
    // Then the rest of these, and after them the end of the prefix in both groups.
    m.free(s).unwrap();
    m.take_blocks(4).unwrap();
    assert_eq!(m.found(&tokens, 0), 64);
    m.take_blocks(3).unwrap();
    m.prefixes.check(&m.pool);
    assert_eq!(m.found(&tokens, 0), 0);
    assert_eq!((m.usage().reclaimable, m.forget_prefixes(0).unwrap()), (15, 15));
    assert_eq!(m.usage().free, 15);
}

//! What is drawn, on a terminal that only remembers.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::time::{Duration, Instant};

use folio::engine::Inspection;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier};
use serde_json::{Value, json};

use super::{History, budget_bar, color_of, draw};

/// Four blocks: of request 0 alone, of 0 and 1, of nobody but known, and free.
fn inspection() -> Value {
    let block = |owner: Option<u64>, holders: u32, tokens: u32, indexed: bool| json!({ "owner": owner, "holders": holders, "tokens": tokens, "indexed": indexed });
    json!({
        "version": 1,
        "block_size": 16,
        "formats": "int4ch:int4",
        "blocks": [block(Some(0), 1, 5, false), block(Some(0), 2, 16, true), block(None, 0, 0, true), block(None, 0, 0, false)],
        "requests": [
            { "id": 0, "phase": "decode", "prompt_tokens": 20, "new_tokens": 7, "cached_tokens": 26, "preemptions": 0 },
            { "id": 1, "phase": "swapped", "prompt_tokens": 33, "new_tokens": 0, "cached_tokens": 32, "preemptions": 2 },
        ],
        "last_step": {
            "decode_tokens": 10, "prompt_tokens": 40, "draft_tokens": 6, "accepted_tokens": 4, "sampled_tokens": 11, "admitted": 1, "resumed": 3, "preempted": 2, "ended": 0
        },
        "num_steps": 1,
        "num_sampled_tokens": 11,
        "max_step_tokens": 100,
        "swapped_bytes": 2_500_000,
        "prefix_hit_tokens": 48,
    })
}

fn drawn(width: u16, height: u16, inspection: &Inspection, history: &History) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, frame.area(), inspection, history)).unwrap();
    terminal.backend().buffer().clone()
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let area = buffer.area;
    (0..area.height).map(|y| (0..area.width).map(|x| buffer[(x, y)].symbol()).collect()).collect()
}

#[test]
fn blocks_are_coloured_by_their_owners() {
    let inspection: Inspection = serde_json::from_value(inspection()).unwrap();
    let buffer = drawn(60, 20, &inspection, &History::default());
    let lines = lines(&buffer);
    assert!(lines[0].contains("cache: 4 blocks of 16 tokens, int4ch:int4"), "{lines:#?}");
    assert!(lines[1].starts_with("│aA+·"), "{lines:#?}");
    assert!(lines[2].contains("2 held (1 shared) · 1 known beginnings · 1 free"), "{lines:#?}");
    let cell = |x: u16| &buffer[(x, 1)];
    assert_eq!((cell(1).bg, cell(2).bg), (color_of(0), color_of(0)));
    assert!(cell(2).modifier.contains(Modifier::BOLD) && !cell(1).modifier.contains(Modifier::BOLD));
    assert!(cell(3).modifier.contains(Modifier::DIM) && cell(3).bg == Color::Reset);
    assert_ne!(color_of(0), color_of(1));
}

#[test]
fn steps_and_requests_are_listed() {
    let mut inspection: Inspection = serde_json::from_value(inspection()).unwrap();
    let mut history = History::default();
    let start = Instant::now();
    for i in 0..4 {
        history.note(&inspection, start + Duration::from_millis(500) * i);
        // Seen twice, it counts once.
        history.note(&inspection, start + Duration::from_millis(500) * i);
        inspection.num_steps += 1;
        inspection.num_sampled_tokens += 11;
    }
    // 11 tokens every half second.
    assert!((history.speed().unwrap() - 22.0).abs() < 1e-6);
    let lines = lines(&drawn(60, 20, &inspection, &history)).join("\n");
    assert!(lines.contains("40 prompt + 10 decode + 6 drafts (4 right) of 100 tokens"), "{lines}");
    assert!(lines.contains("22 tokens/s · 2 preempted, 3 resumed") && lines.contains("2 requests"), "{lines}");
    assert!(lines.contains("48 prompt tokens were known; 2.5 MB swapped out"), "{lines}");
    let words = |id: &str| {
        let line = lines.lines().find(|line| line.contains(id)).unwrap_or_else(|| unreachable!("{id} in {lines}"));
        line.split([' ', '│']).filter(|word| !word.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(words("decode  "), ["a", "0", "decode", "20", "7", "26", "0"]);
    assert_eq!(words("swapped  "), ["b", "1", "swapped", "33", "0", "32", "2"]);
}

#[test]
fn the_bar_shows_what_was_used() {
    let bar = |prompt, decode, budget| budget_bar(10, prompt, decode, budget).to_string();
    assert_eq!(bar(40, 10, 100), "█▓▓▓▓░░░░░");
    assert_eq!(bar(0, 0, 100), "░░░░░░░░░░");
    assert_eq!(bar(1, 1, 1000), "█▓░░░░░░░░", "what is there is seen");
    assert_eq!(bar(99, 10, 100), "█▓▓▓▓▓▓▓▓▓");
    assert_eq!(bar(u32::MAX, u32::MAX, 0), "██████████");
}

#[test]
fn a_large_cache_has_several_blocks_in_a_cell() {
    let mut many = inspection();
    let free = many["blocks"][3].clone();
    many["blocks"] = vec![free; 4000].into();
    // One that is held among them.
    many["blocks"][3999] = inspection()["blocks"][1].clone();
    let inspection: Inspection = serde_json::from_value(many).unwrap();
    let lines = lines(&drawn(60, 20, &inspection, &History::default()));
    assert!(lines[0].contains(" 9 blocks a cell "), "{lines:#?}");
    let cells: String = lines[1..9].iter().map(|line| line.trim_matches('│')).collect();
    assert_eq!(cells.trim_end().chars().count(), 4000_usize.div_ceil(9));
    assert!(cells.trim_end().ends_with("··A"), "{cells}");
}

#[test]
fn no_size_is_too_small() {
    let full: Inspection = serde_json::from_value(inspection()).unwrap();
    let mut empty = inspection();
    (empty["blocks"], empty["requests"], empty["max_step_tokens"]) = (json!([]), json!([]), json!(0));
    let empty: Inspection = serde_json::from_value(empty).unwrap();
    let mut history = History::default();
    history.note(&full, Instant::now());
    for width in (1..30).chain([200]) {
        for height in (1..16).chain([100]) {
            drawn(width, height, &full, &history);
            drawn(width, height, &empty, &history);
        }
    }
}

//! An engine and its cache, drawn on a terminal: who holds which block, where every request stands, what the last steps did.

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use folio::engine::{BlockState, Inspection, RequestPhase, RequestState};
use ratatui::crossterm::event::{self, Event, KeyEvent, KeyEventKind};
use ratatui::crossterm::{cursor, execute};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Row, Sparkline, Table};
use ratatui::{DefaultTerminal, Frame};

/// Whether the terminal is not as it was found.
static IS_TAKEN: AtomicBool = AtomicBool::new(false);

/// The terminal, drawn on as a whole. Dropping it brings back what was there.
pub(crate) struct Terminal(DefaultTerminal);

/// Fails with an explanation unless there is a terminal to draw on and to read keys from.
pub(crate) fn check_terminal() -> Result<()> {
    let is_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    ensure!(is_terminal, "--watch: got a pipe or a file as stdin or stdout, need a terminal for both");
    Ok(())
}

/// Gives the terminal back, if it was taken. For those who end the program without unwinding.
pub(crate) fn restore_terminal() {
    if IS_TAKEN.swap(false, Ordering::SeqCst) {
        // Where that fails nobody sees it, either.
        let _ = ratatui::try_restore();
        let _ = execute!(io::stdout(), cursor::Show);
    }
}

impl Terminal {
    pub(crate) fn open() -> Result<Self> {
        check_terminal()?;
        IS_TAKEN.store(true, Ordering::SeqCst);
        let opened = ratatui::try_init();
        if opened.is_err() {
            restore_terminal();
        }
        Ok(Self(opened.context("taking the terminal")?))
    }

    pub(crate) fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> Result<()> {
        self.0.draw(draw).context("drawing on the terminal")?;
        Ok(())
    }

    /// The next key, if one is pressed within this time.
    pub(crate) fn key(&self, patience: Duration) -> Result<Option<KeyEvent>> {
        if !event::poll(patience).context("listening to the keyboard")? {
            return Ok(None);
        }
        match event::read().context("listening to the keyboard")? {
            Event::Key(key) if key.kind != KeyEventKind::Release => Ok(Some(key)),
            _ => Ok(None),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// What the last steps did.
#[derive(Default)]
pub(crate) struct History {
    steps: VecDeque<Seen>,
}

struct Seen {
    at: Instant,
    tokens: u32,
    sampled: u32,
}

impl History {
    /// Steps that are remembered: as many as fit on a wide terminal.
    const MAX_STEPS: usize = 512;

    /// The time over which the speed is measured.
    const SPAN: Duration = Duration::from_secs(3);

    /// Notes a step that has just ended.
    pub(crate) fn note(&mut self, inspection: &Inspection, at: Instant) {
        let step = &inspection.last_step;
        if self.steps.len() == Self::MAX_STEPS {
            self.steps.pop_front();
        }
        let tokens = step.prompt_tokens + step.decode_tokens + step.draft_tokens;
        self.steps.push_back(Seen { at, tokens, sampled: step.sampled_tokens });
    }

    /// Tokens made per second of late.
    fn speed(&self) -> Option<f64> {
        let last = self.steps.back()?.at;
        let recent = || self.steps.iter().filter(|seen| last.duration_since(seen.at) <= Self::SPAN);
        let time = last.duration_since(recent().next()?.at).as_secs_f64();
        // The first of them began before the time that is counted.
        let sampled: u32 = recent().skip(1).map(|seen| seen.sampled).sum();
        (time > 0.0).then(|| f64::from(sampled) / time)
    }
}

const OWNERS: [Color; 12] = [
    Color::Green,
    Color::Yellow,
    Color::Cyan,
    Color::Magenta,
    Color::Blue,
    Color::Red,
    Color::LightGreen,
    Color::LightYellow,
    Color::LightCyan,
    Color::LightMagenta,
    Color::LightBlue,
    Color::LightRed,
];

fn color_of(request: u64) -> Color {
    OWNERS[(request % OWNERS.len() as u64) as usize]
}

/// Its sign where there are no colours.
fn letter_of(request: u64) -> char {
    char::from(b'a' + (request % 26) as u8)
}

/// A block of the cache, or the fullest of some.
fn cell(block: &BlockState) -> Span<'static> {
    match block.owner {
        Some(owner) if block.holders > 1 => {
            let style = Style::new().fg(Color::Black).bg(color_of(owner));
            Span::styled(
                letter_of(owner).to_ascii_uppercase().to_string(),
                style.add_modifier(Modifier::BOLD | Modifier::UNDERLINED),
            )
        }
        Some(owner) => Span::styled(letter_of(owner).to_string(), Style::new().fg(Color::Black).bg(color_of(owner))),
        None if block.indexed => Span::styled("+", Style::new().add_modifier(Modifier::DIM)),
        None => Span::styled("·", Style::new().add_modifier(Modifier::DIM)),
    }
}

/// Draws an engine between two steps.
pub(crate) fn draw(frame: &mut Frame<'_>, area: Rect, inspection: &Inspection, history: &History) {
    let width = u32::from(area.width.saturating_sub(2).max(1));
    let rows = (inspection.blocks.len() as u32).div_ceil(width);
    // The requests and the step stay in sight, however large the cache is.
    let most = u32::from(area.height / 2).max(3);
    let cache = Constraint::Length((rows + 2).min(most) as u16);
    let [cache, step, requests] = Layout::vertical([cache, Constraint::Length(5), Constraint::Min(0)]).areas(area);
    draw_cache(frame, cache, inspection);
    draw_step(frame, step, inspection, history);
    draw_requests(frame, requests, inspection);
}

fn draw_cache(frame: &mut Frame<'_>, area: Rect, inspection: &Inspection) {
    let Inspection { blocks, block_size, formats, .. } = inspection;
    let (mut held, mut shared, mut indexed) = (0, 0, 0);
    for block in blocks {
        held += u32::from(block.holders > 0);
        shared += u32::from(block.holders > 1);
        indexed += u32::from(block.holders == 0 && block.indexed);
    }
    let free = blocks.len() as u32 - held - indexed;
    let border = Block::bordered()
        .title(format!(" cache: {} blocks of {block_size} tokens, {formats} ", blocks.len()))
        .title_bottom(format!(" {held} held ({shared} shared) · {indexed} known beginnings · {free} free "));
    let inner = border.inner(area);
    frame.render_widget(border, area);
    let cells = inner.area() as usize;
    if cells == 0 || blocks.is_empty() {
        return;
    }
    let blocks_per_cell = blocks.len().div_ceil(cells);
    let fullest = |some: &[BlockState]| {
        some.iter().max_by_key(|block| (block.holders, block.tokens, block.indexed)).map(cell).unwrap_or_default()
    };
    let cells: Vec<_> = blocks.chunks(blocks_per_cell).map(fullest).collect();
    let lines: Vec<_> = cells.chunks(usize::from(inner.width)).map(|row| Line::from(row.to_vec())).collect();
    frame.render_widget(Paragraph::new(lines), inner);
    if blocks_per_cell > 1 && area.width > 24 {
        let note = Line::from(format!(" {blocks_per_cell} blocks a cell ")).right_aligned();
        frame.render_widget(note, Rect { height: 1, width: area.width - 1, ..area });
    }
}

fn draw_step(frame: &mut Frame<'_>, area: Rect, inspection: &Inspection, history: &History) {
    let (step, budget) = (&inspection.last_step, inspection.max_step_tokens);
    let speed = history.speed().map_or_else(String::new, |speed| format!("{speed:.0} tokens/s · "));
    let moved = format!(" {speed}{} preempted, {} resumed ", step.preempted, step.resumed);
    let border = Block::bordered().title(" last step ").title_bottom(moved);
    let inner = border.inner(area);
    frame.render_widget(border, area);
    let [text, bar, past] = Layout::vertical([Constraint::Length(1); 3]).areas(inner);
    let (prompt, decode) = (step.prompt_tokens, step.decode_tokens);
    let (drafts, right) = (step.draft_tokens, step.accepted_tokens);
    let drafted = if drafts > 0 { format!(" + {drafts} drafts ({right} right)") } else { String::new() };
    let line = Line::from(vec![
        Span::from(format!("{prompt} prompt")).fg(Color::Cyan),
        Span::from(" + "),
        Span::from(format!("{decode} decode{drafted}")).fg(Color::Green),
        Span::from(format!(" of {budget} tokens")),
    ]);
    frame.render_widget(line, text);
    frame.render_widget(budget_bar(usize::from(bar.width), prompt, decode + drafts, budget), bar);
    let recent = history.steps.len().saturating_sub(usize::from(past.width));
    let tokens = history.steps.iter().skip(recent).map(|seen| u64::from(seen.tokens));
    frame.render_widget(Sparkline::default().data(tokens).style(Style::new().dim()), past);
}

/// How much of a step's budget was used.
fn budget_bar(width: usize, prompt: u32, decode: u32, budget: u32) -> Line<'static> {
    let cells = |tokens: u32| (tokens as usize * width).div_ceil(budget.max(1) as usize).min(width);
    let decode_cells = cells(decode);
    let prompt_cells = cells(prompt).min(width - decode_cells);
    Line::from(vec![
        Span::from("█".repeat(decode_cells)).fg(Color::Green),
        Span::from("▓".repeat(prompt_cells)).fg(Color::Cyan),
        Span::from("░".repeat(width - decode_cells - prompt_cells)).dim(),
    ])
}

fn draw_requests(frame: &mut Frame<'_>, area: Rect, inspection: &Inspection) {
    let border = Block::bordered().title(format!(" {} requests ", inspection.requests.len())).title_bottom(format!(
        " {} prompt tokens were known; {:.1} MB swapped out ",
        inspection.prefix_hit_tokens,
        inspection.swapped_bytes as f64 / 1e6
    ));
    let columns = ["", "request", "phase", "prompt", "new", "cached", "lost"];
    let header = Row::new(columns.map(|name| Line::from(name).right_aligned())).bold();
    let widths = [1, 7, 8, 7, 7, 7, 4].map(Constraint::Length);
    let table = Table::new(inspection.requests.iter().map(row), widths).header(header).block(border);
    frame.render_widget(table, area);
}

fn row(request: &RequestState) -> Row<'static> {
    let phase = match request.phase {
        RequestPhase::Waiting => "waiting",
        RequestPhase::Prompt => "prompt",
        RequestPhase::Decode => "decode",
        RequestPhase::Swapped => "swapped",
        _ => "?",
    };
    let number = |text: String| Line::from(text).right_aligned();
    let sign = Span::styled(letter_of(request.id).to_string(), Style::new().fg(Color::Black).bg(color_of(request.id)));
    Row::new([
        Line::from(sign),
        number(request.id.to_string()),
        number(phase.to_owned()),
        number(request.prompt_tokens.to_string()),
        number(request.new_tokens.to_string()),
        number(request.cached_tokens.to_string()),
        number(request.preemptions.to_string()),
    ])
}

#[cfg(test)]
mod tests;

//! `folio serve --watch`: the cache and the requests, drawn on the terminal while the server runs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use ratatui::crossterm::event::{KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::Stylize;
use ratatui::text::Line;

use super::state::Server;
use crate::watch::{self, History, Terminal};

/// Between two pictures. Each costs the engine's thread the time of one inspection.
const FRAME: Duration = Duration::from_millis(100);

/// The thread that draws.
pub(super) struct Watcher {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

/// Takes the terminal.
pub(super) fn spawn(server: Arc<Server>, address: SocketAddr) -> Result<Watcher> {
    let is_over = Arc::new(AtomicBool::new(false));
    let terminal = Terminal::open()?;
    let over = Arc::clone(&is_over);
    let name = std::thread::Builder::new().name("folio watch".to_owned());
    let thread = name.spawn(move || draw(terminal, &server, address, &over)).context("a thread to draw")?;
    Ok(Watcher { is_over, thread })
}

impl Watcher {
    /// Gives the terminal back.
    pub(super) fn end(self) -> Result<()> {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("drawing: it panicked"))?
    }
}

fn draw(mut terminal: Terminal, server: &Server, address: SocketAddr, is_over: &AtomicBool) -> Result<()> {
    let mut history = History::default();
    while !is_over.load(Ordering::Relaxed) {
        // When the engine is gone there is nothing to see, and the server is about to end.
        let Ok(inspection) = server.client.inspect_blocking() else { break };
        history.note(&inspection, Instant::now());
        let hint = if server.is_stopping() { "stopping when all have ended; q once more: now" } else { "q stops" };
        let title =
            format!(" {} on http://{address}, {} requests; {hint}", server.model.name, inspection.requests.len());
        terminal.draw(|frame| {
            let [head, picture] = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(frame.area());
            frame.render_widget(Line::from(title.as_str()).bold(), head);
            watch::draw(frame, picture, &inspection, &history);
        })?;
        let next = Instant::now() + FRAME;
        while let Some(key) = terminal.key(next.saturating_duration_since(Instant::now()))? {
            let is_ctrl_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if is_ctrl_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                server.stop_wish.notify_one();
            }
        }
    }
    Ok(())
}

//! The chat beside a picture of the cache: `folio chat --watch`.
//!
//! It runs on the engine, which it steps itself: between two steps it draws, and listens to the keyboard.

use std::time::{Duration, Instant};

use anyhow::Result;
use folio::Gpu;
use folio::engine::{Answer, EndReason, Engine, EngineOptions, Event, Request};
use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Position, Rect};
use ratatui::widgets::{Block, Paragraph};

use super::options::Options;
use super::screen::Interrupts;
use super::turns::{Asked, Turns};
use crate::load::Loaded;
use crate::watch::{self, History, Terminal};

/// Between two pictures, while the model runs.
const FRAME: Duration = Duration::from_millis(33);

/// While nothing happens but keys.
const IDLE: Duration = Duration::from_millis(100);

/// Columns from which on text and picture stand side by side.
const WIDE: u16 = 100;

/// Talks until somebody has had enough. Returns whether every prompt could be said.
pub(super) fn run(options: Options, loaded: Loaded, interrupts: &Interrupts) -> Result<bool> {
    let mut chat = Watched::new(options, loaded, interrupts.clone())?;
    let mut terminal = Terminal::open()?;
    let all_said = chat.talk(&mut terminal);
    drop(terminal);
    // The picture is gone; what was said stays.
    print!("{}", chat.transcript);
    all_said
}

struct Watched {
    options: Options,
    gpu: Gpu,
    /// Of the model.
    name: String,
    engine: Engine,
    turns: Turns,
    /// The tokens of the conversation.
    so_far: Vec<u32>,
    /// What was said, and explained.
    transcript: String,
    /// What is being typed.
    input: String,
    history: History,
    interrupts: Interrupts,
}

/// What a key asks for.
#[derive(PartialEq)]
enum Wish {
    Nothing,
    Say,
    Stop,
}

/// An answer as far as it is there.
struct Coming {
    /// `None` when it has ended.
    answer: Option<Answer>,
    tokens: Vec<u32>,
    text: String,
    /// Set with the end.
    reason: Option<EndReason>,
}

impl Watched {
    fn new(options: Options, loaded: Loaded, interrupts: Interrupts) -> Result<Self> {
        let turns = Turns::new(&options, &loaded)?;
        let engine = Engine::new(loaded.decoder, Some(loaded.tokenizer), EngineOptions::default())?;
        let (gpu, name) = (loaded.gpu, loaded.name);
        let (so_far, transcript, input, history) = Default::default();
        Ok(Self { options, gpu, name, engine, turns, so_far, transcript, input, history, interrupts })
    }

    /// Says what the options say, then what is typed.
    fn talk(&mut self, terminal: &mut Terminal) -> Result<bool> {
        let mut all_said = true;
        for said in std::mem::take(&mut self.options.prompt) {
            all_said &= self.turn(terminal, &said)?;
        }
        while let Some(said) = self.listen(terminal)? {
            all_said &= self.turn(terminal, &said)?;
        }
        Ok(all_said)
    }

    /// A line of text. `None` if there will be no more.
    fn listen(&mut self, terminal: &mut Terminal) -> Result<Option<String>> {
        self.interrupts.begin_answer();
        loop {
            terminal.draw(|frame| self.draw(frame, "", "Enter says it; an empty line, Esc or Ctrl-C ends"))?;
            match terminal.key(IDLE)?.map_or(Wish::Nothing, |key| self.press(key)) {
                Wish::Say if !self.input.trim().is_empty() => return Ok(Some(std::mem::take(&mut self.input))),
                Wish::Say | Wish::Stop => return Ok(None),
                Wish::Nothing if self.interrupts.is_pressed() => return Ok(None),
                Wish::Nothing => {}
            }
        }
    }

    /// Changes what is being typed.
    fn press(&mut self, key: KeyEvent) -> Wish {
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Esc => return Wish::Stop,
            KeyCode::Char('c' | 'd') if is_control => return Wish::Stop,
            KeyCode::Char('u') if is_control => self.input.clear(),
            KeyCode::Char(letter) if !is_control => self.input.push(letter),
            KeyCode::Backspace => drop(self.input.pop()),
            KeyCode::Enter => return Wish::Say,
            _ => {}
        }
        Wish::Nothing
    }

    fn note(&mut self, text: &str) {
        if !self.transcript.is_empty() && !self.transcript.ends_with('\n') {
            self.transcript.push('\n');
        }
        self.transcript += text;
        self.transcript.push('\n');
    }

    fn refuse(&mut self, why: &str) -> bool {
        self.note(&format!("[not said: {why}]"));
        false
    }

    /// Tokens that prompt and answer may have together.
    fn room(&self) -> usize {
        let decoder = self.engine.decoder();
        let cache = decoder.cache().config().longest_sequence(decoder.options().max_step_tokens);
        cache.min(decoder.model().config().max_positions) as usize
    }

    /// Says something, and shows the answers as they come. False if it can't be said, which has been explained then.
    fn turn(&mut self, terminal: &mut Terminal, said: &str) -> Result<bool> {
        self.interrupts.begin_answer();
        self.note(&format!("> {said}"));
        let room = self.room();
        let mut asked = self.turns.ask(Some(&self.so_far), said);
        if matches!(&asked, Ok(Some(asked)) if asked.text.len() >= room) && !self.so_far.is_empty() {
            let len = self.so_far.len();
            self.note(&format!("[{len} of {room} tokens are used: a new conversation begins]"));
            self.so_far.clear();
            self.turns.forget();
            asked = self.turns.ask(None, said);
        }
        let asked = match asked {
            Ok(Some(asked)) if asked.text.len() < room => asked,
            Ok(Some(asked)) => {
                let len = asked.text.len();
                return Ok(self
                    .refuse(&format!("it has {len} tokens, and an answer needs one more; there is room for {room}")));
            }
            Ok(None) => return Ok(self.refuse("it is no text")),
            Err(error) => return Ok(self.refuse(&format!("{error:#}"))),
        };
        let answers = match self.submit(&asked, room) {
            Ok(answers) => answers,
            Err(error) => return Ok(self.refuse(&format!("{error:#}"))),
        };
        let mut coming: Vec<_> = answers
            .into_iter()
            .map(|answer| Coming { answer: Some(answer), tokens: Vec::new(), text: String::new(), reason: None })
            .collect();
        self.run(terminal, &mut coming)?;
        self.transcript += &shown(&coming);
        // The conversation goes on from the first branch.
        let first = &coming[0];
        match &first.reason {
            None => self.note("[stopped]"),
            Some(EndReason::Positions) => self.note("[the model's positions are used up: the answer ends here]"),
            Some(EndReason::Length) if first.tokens.len() < self.options.max_tokens as usize => {
                self.note("[the cache is full: the answer ends here]");
            }
            Some(EndReason::Failed(failure)) => self.note(&format!("[failed: {}]", failure.message)),
            Some(_) => {}
        }
        self.turns.note(said, first.text.trim());
        let is_failed = matches!(first.reason, Some(EndReason::Failed(_)));
        self.so_far = asked.text;
        self.so_far.extend(&first.tokens);
        Ok(!is_failed)
    }

    fn submit(&mut self, asked: &Asked, room: usize) -> Result<Vec<Answer>> {
        let left = (room - asked.text.len()) as u32;
        let request = Request::new(asked.text.clone(), self.options.max_tokens.min(left))
            .with_sampling(self.options.sampling(0, asked.temperature))
            .with_stops(asked.stop.clone(), []);
        Ok(self.engine.submit_many(request, self.options.branches)?)
    }

    /// Steps until all answers have ended, or somebody stops them.
    fn run(&mut self, terminal: &mut Terminal, coming: &mut [Coming]) -> Result<()> {
        let mut drawn: Option<Instant> = None;
        while !self.engine.is_idle() {
            self.gpu.block_on(self.engine.step())?;
            self.history.note(&self.engine.inspect(), Instant::now());
            coming.iter_mut().for_each(Coming::take);
            while let Some(key) = terminal.key(Duration::ZERO)? {
                if self.press(key) == Wish::Stop {
                    coming.iter_mut().for_each(|coming| coming.answer = None);
                }
            }
            if self.interrupts.is_pressed() {
                coming.iter_mut().for_each(|coming| coming.answer = None);
            }
            if drawn.is_none_or(|drawn| drawn.elapsed() >= FRAME) {
                let shown = shown(coming);
                terminal.draw(|frame| self.draw(frame, &shown, "Esc or Ctrl-C ends the answer"))?;
                drawn = Some(Instant::now());
            }
        }
        Ok(())
    }

    /// Text and picture. `coming` is the answer as far as it is there.
    fn draw(&self, frame: &mut Frame<'_>, coming: &str, hint: &str) {
        let halves = [Constraint::Percentage(50), Constraint::Percentage(50)];
        let layout = if frame.area().width >= WIDE { Layout::horizontal(halves) } else { Layout::vertical(halves) };
        let [left, right] = layout.areas(frame.area());
        let [text, input] = Layout::vertical([Constraint::Min(0), Constraint::Length(3)]).areas(left);
        draw_text(frame, text, &self.name, &format!("{}{coming}", self.transcript));
        draw_input(frame, input, &self.input, hint);
        watch::draw(frame, right, &self.engine.inspect(), &self.history);
    }
}

impl Coming {
    /// Takes what has come.
    fn take(&mut self) {
        while let Some(event) = self.answer.as_mut().and_then(Answer::try_next) {
            match event {
                Event::Token { token, text, .. } => {
                    self.tokens.push(token);
                    self.text += &text;
                }
                Event::End { reason, text, .. } => {
                    self.text += &text;
                    self.reason = Some(reason);
                }
                _ => {}
            }
        }
    }
}

/// The answers as text: that of one as it is, several below one another.
fn shown(coming: &[Coming]) -> String {
    match coming {
        [only] => only.text.clone(),
        several => {
            let texts = several.iter().zip(1..).map(|(one, i)| format!("--- branch {i} ---\n{}\n", one.text.trim()));
            texts.collect()
        }
    }
}

/// The end of a text, as much as there is room for.
fn draw_text(frame: &mut Frame<'_>, area: Rect, name: &str, text: &str) {
    let border = Block::bordered().title(format!(" {name} "));
    let inner = border.inner(area);
    let (width, height) = (usize::from(inner.width).max(1), usize::from(inner.height));
    let mut lines = Vec::new();
    for paragraph in text.rsplit('\n') {
        // The last paragraph of a text that ends with a line's end is empty.
        let wrapped = textwrap::wrap(paragraph, width);
        lines.extend(wrapped.into_iter().rev());
        if lines.len() >= height {
            break;
        }
    }
    lines.truncate(height);
    lines.reverse();
    let text = lines.join("\n");
    frame.render_widget(Paragraph::new(text).block(border), area);
}

fn draw_input(frame: &mut Frame<'_>, area: Rect, input: &str, hint: &str) {
    let border = Block::bordered().title_bottom(format!(" {hint} "));
    let inner = border.inner(area);
    // Its end, where one types: a column for the cursor, two for the sign.
    let room = usize::from(inner.width.saturating_sub(3));
    let mut shown = input;
    while textwrap::core::display_width(shown) > room && !shown.is_empty() {
        let mut letters = shown.chars();
        letters.next();
        shown = letters.as_str();
    }
    frame.render_widget(Paragraph::new(format!("> {shown}")).block(border), area);
    if inner.width > 2 && inner.height > 0 {
        let column = inner.x + 2 + textwrap::core::display_width(shown) as u16;
        frame.set_cursor_position(Position::new(column.min(inner.right() - 1), inner.y));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::{draw_input, draw_text};

    fn screen(width: u16, height: u16, draw: impl FnOnce(&mut ratatui::Frame<'_>)) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(draw).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        (0..height).map(line).collect()
    }

    #[test]
    fn the_end_of_the_text_is_seen() {
        let text = "first line\nsecond line that is longer than that\n\nlast";
        let lines = screen(16, 6, |frame| draw_text(frame, frame.area(), "stories", text));
        assert_eq!(lines[1].trim_matches(['│', ' ']), "that is longer");
        assert_eq!(lines[2].trim_matches(['│', ' ']), "than that");
        assert_eq!(lines[3].trim_matches(['│', ' ']), "");
        assert_eq!(lines[4].trim_matches(['│', ' ']), "last");
    }

    #[test]
    fn the_end_of_the_input_is_seen_also_where_there_is_hardly_room() {
        let lines = screen(12, 3, |frame| draw_input(frame, frame.area(), "abcdefghij", "hint"));
        assert_eq!(lines[1], "│> defghij │");
        for (width, height) in [(1, 1), (2, 2), (3, 3), (4, 1), (5, 3)] {
            screen(width, height, |frame| {
                draw_text(frame, frame.area(), "stories", "some text");
                draw_input(frame, frame.area(), "größer 大きい", "hint");
            });
        }
    }
}

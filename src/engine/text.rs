//! The text of an answer: complete characters only, and nothing that may still turn out to be a stop string.

use crate::model::{ModelResult, TextStream};

/// Turns tokens into text, and looks for stop strings in it.
#[derive(Debug)]
pub(super) struct AnswerText {
    /// `None` without a tokenizer: then there is no text.
    stream: Option<TextStream>,
    stops: StopFilter,
}

/// What a token has brought.
pub(super) enum Pushed {
    /// Text, possibly none.
    Text(String),
    /// The text before a stop string, and that string.
    Stop(String, String),
}

impl AnswerText {
    pub(super) fn new(stream: Option<TextStream>, stop_strings: Vec<String>) -> Self {
        Self { stream, stops: StopFilter { stops: stop_strings, held: String::new() } }
    }

    /// Adds a token.
    pub(super) fn push(&mut self, token: u32) -> ModelResult<Pushed> {
        let text = match &mut self.stream {
            Some(stream) => stream.push(token)?.unwrap_or_default(),
            None => String::new(),
        };
        Ok(self.stops.push(&text))
    }

    /// The rest of the text, after the last token.
    pub(super) fn finish(&mut self) -> ModelResult<Pushed> {
        let rest = self.stream.take().map(TextStream::finish).transpose()?.unwrap_or_default();
        Ok(match self.stops.push(&rest) {
            Pushed::Text(text) => Pushed::Text(text + &std::mem::take(&mut self.stops.held)),
            stop @ Pushed::Stop(..) => stop,
        })
    }
}

/// Holds text back while it may be the beginning of a stop string.
#[derive(Debug)]
struct StopFilter {
    stops: Vec<String>,
    /// Text that has not been handed out: a proper beginning of a stop string.
    held: String,
}

impl StopFilter {
    fn push(&mut self, text: &str) -> Pushed {
        self.held.push_str(text);
        // The stop that begins first; of those that begin together, the longest.
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, stop)| (*at, usize::MAX - stop.len())) {
            let stop = stop.clone();
            self.held.truncate(at);
            return Pushed::Stop(std::mem::take(&mut self.held), stop);
        }
        let may_begin = |rest: &str| self.stops.iter().any(|stop| stop.starts_with(rest));
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        let keep = starts.find(|&at| may_begin(&self.held[at..])).unwrap_or(self.held.len());
        Pushed::Text(self.held.drain(..keep).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{Pushed, StopFilter};

    /// Feeds text cut at every place, in pieces of `size` characters; returns what came out, and the stop.
    fn feed(stops: &[&str], text: &str, size: usize) -> (String, Option<String>) {
        let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut filter = StopFilter { stops, held: String::new() };
        let chars: Vec<_> = text.chars().collect();
        let mut out = String::new();
        for piece in chars.chunks(size) {
            match filter.push(&piece.iter().collect::<String>()) {
                Pushed::Text(text) => out += &text,
                Pushed::Stop(text, stop) => return (out + &text, Some(stop)),
            }
        }
        (out + &filter.held, None)
    }

    #[test]
    fn a_stop_string_never_leaks_however_the_text_is_cut() {
        for size in 1..12 {
            let stop = |stops: &[&str], text: &str| feed(stops, text, size);
            assert_eq!(stop(&["###"], "one ## two ###three"), ("one ## two ".into(), Some("###".into())));
            assert_eq!(stop(&["aab"], "aaaab"), ("aa".into(), Some("aab".into())));
            assert_eq!(stop(&["ö\n\n"], "größer ö\nö\n\nx"), ("größer ö\n".into(), Some("ö\n\n".into())));
            assert_eq!(stop(&["END"], "no EN"), ("no EN".into(), None));
            assert_eq!(stop(&[], "anything"), ("anything".into(), None));
            // Cut into single characters the shorter one is complete first.
            let (text, stop) = stop(&["ab", "b"], "xab");
            assert_eq!((text.as_str(), stop.as_deref()), ("x", Some("ab")));
        }
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let mut filter = StopFilter { stops: vec!["\nUser:".into()], held: String::new() };
        for (piece, comes) in [("Hello", "Hello"), (" you\n", " you"), ("Us", ""), ("e", ""), ("!", "\nUse!")] {
            match filter.push(piece) {
                Pushed::Text(text) => assert_eq!(text, comes),
                Pushed::Stop(..) => unreachable!("there is no stop string"),
            }
        }
    }
}

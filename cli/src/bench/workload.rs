//! What the benchmark asks for: the same for a seed, whatever engine runs it.

use anyhow::{Result, ensure};
use folio::engine::Request;
use folio::model::Tokenizer;
use serde::Serialize;

/// Requests, and when they come.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Workload {
    pub(super) requests: Vec<Wanted>,
}

/// A request that makes exactly `new_tokens` tokens, greedily, unless its text ends before.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Wanted {
    pub(super) prompt: Vec<u32>,
    pub(super) new_tokens: u32,
    /// When it comes, as a share of the whole time of arrivals.
    pub(super) arrival: f64,
    /// Whether a new line ends it.
    pub(super) one_line: bool,
}

impl Wanted {
    pub(super) fn request(&self) -> Request {
        let request = Request::new(self.prompt.clone(), self.new_tokens);
        if self.one_line { request.with_stops([], ["\n".to_owned()]) } else { request }
    }
}

const STORY: &str = "Title: Mia and the silver key
Once upon a time, in autumn, there was a little town where everybody knew everybody. Mia was a baker from Willow Hill. Mia loved plum cake more \
than anything. Tom was a sailor from Stone Bay. Tom loved onion soup more than anything. Dan was a miller from Raven Bay. Dan loved cherry pie.
The day was still young. Mia hid the silver key under the old bridge. Tom put the red lantern inside the dark cave. Mia passed the golden ring \
to Tom. The road went up and down, and the hills were full of stones. Dan put the black flute behind the sunny wall.
Later the clouds went away. An old woman on the road sold them bread and cheese and wished them luck. The summer light was soft, and the birds \
were loud. Tom listened, but it was only the wind.";

const QUESTIONS: [&str; 8] = [
    "Where is the silver key?",
    "What did Tom love?",
    "Who was Mia?",
    "Where is the red lantern?",
    "Who was Dan?",
    "What did Mia love?",
    "Where is the black flute?",
    "Who was Tom?",
];

/// Tokens of the shortest and the longest prompt, and of answers: a factor of eight each, as among people who chat.
const PROMPT_TOKENS: (usize, usize) = (16, 128);
const NEW_TOKENS: (u32, u32) = (16, 128);

/// A random number of our own: the same on every machine, and there is no need for a good one.
struct Random(u64);

impl Random {
    /// From 0 to 1. (SplitMix64, Steele et al. 2014.)
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

impl Workload {
    /// `count` requests of mixed lengths, at random times.
    pub(super) fn new(tokenizer: &Tokenizer, count: u32, seed: u64, max_positions: u32) -> Result<Self> {
        let text = tokenizer.encode(STORY, true)?;
        let most = PROMPT_TOKENS.1.min(text.len()).min(max_positions as usize / 2);
        ensure!(
            most >= PROMPT_TOKENS.0,
            "model: it has {max_positions} positions, need at least {}",
            2 * PROMPT_TOKENS.0
        );
        let most_new = NEW_TOKENS.1.min(max_positions / 2);
        let mut random = Random(seed);
        let mut requests: Vec<_> = (0..count)
            .map(|_| {
                let len = PROMPT_TOKENS.0 + ((most - PROMPT_TOKENS.0) as f64 * random.next()) as usize;
                let first = ((text.len() - len) as f64 * random.next()) as usize;
                let new_tokens =
                    NEW_TOKENS.0 + (f64::from(most_new.saturating_sub(NEW_TOKENS.0)) * random.next()) as u32;
                let prompt = text[first..first + len].to_vec();
                Wanted { prompt, new_tokens, arrival: random.next(), one_line: false }
            })
            .collect();
        requests.sort_by(|a, b| a.arrival.total_cmp(&b.arrival));
        // The first one starts the clock.
        if let Some(first) = requests.first_mut() {
            first.arrival = 0.0;
        }
        Ok(Self { requests })
    }

    /// A story alone, and questions about it: each is a text of its own, and its answer repeats the story's words.
    pub(super) fn questions(tokenizer: &Tokenizer) -> Result<(Self, Self)> {
        let story = Wanted { prompt: tokenizer.encode(STORY, true)?, new_tokens: 1, arrival: 0.0, one_line: false };
        let requests = QUESTIONS.iter().map(|question| {
            let prompt = tokenizer.encode(&format!("{STORY}\nQuestion: {question}\nAnswer:"), true)?;
            Ok(Wanted { prompt, new_tokens: 32, arrival: 0.0, one_line: true })
        });
        Ok((Self { requests: vec![story] }, Self { requests: requests.collect::<Result<_>>()? }))
    }
}

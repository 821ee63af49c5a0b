//! Log-probabilities, in the forms of both endpoints.

use std::collections::BTreeMap;

use folio::model::{TokenLogprob, Tokenizer};
use serde::Serialize;

/// Tokens beside the drawn one, at most, as in OpenAI's interface.
pub(crate) const MAX_TOP: u32 = 20;

/// What stands for minus infinity, which JSON has no number for.
const LEAST: f32 = -9999.0;

/// Those of tokens in a row.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Logprobs {
    Completion {
        tokens: Vec<String>,
        token_logprobs: Vec<f32>,
        top_logprobs: Vec<BTreeMap<String, f32>>,
        text_offset: Vec<usize>,
    },
    Chat {
        content: Vec<ChatToken>,
        refusal: Option<()>,
    },
}

/// A token in a chat, with the others that might have come.
#[derive(Debug, Serialize)]
pub(crate) struct ChatToken {
    #[serde(flatten)]
    token: ChatLogprob,
    top_logprobs: Vec<ChatLogprob>,
}

#[derive(Debug, Serialize)]
struct ChatLogprob {
    token: String,
    logprob: f32,
    /// `None` for a part of a character, whose bytes the tokenizer doesn't tell.
    bytes: Option<Vec<u8>>,
}

impl ChatLogprob {
    fn new(token: String, logprob: f32) -> Self {
        let bytes = (!token.contains(char::REPLACEMENT_CHARACTER)).then(|| token.clone().into_bytes());
        Self { token, logprob: logprob.max(LEAST), bytes }
    }
}

/// Those of a choice that have not been sent.
#[derive(Debug)]
pub(crate) struct Pending {
    is_chat: bool,
    /// Characters of the tokens so far.
    offset: usize,
    logprobs: Option<Logprobs>,
}

impl Pending {
    pub(crate) const fn new(is_chat: bool) -> Self {
        Self { is_chat, offset: 0, logprobs: None }
    }

    /// Adds a token.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: u32, logprob: &TokenLogprob) {
        let text = |token| tokenizer.decode(&[token], false).unwrap_or_default();
        let token = text(token);
        let top = logprob.top.iter().map(|&(token, logprob)| (text(token), logprob.max(LEAST)));
        let offset = self.offset;
        self.offset += token.chars().count();
        let is_chat = self.is_chat;
        match self.logprobs.get_or_insert_with(|| Logprobs::empty(is_chat)) {
            Logprobs::Completion { tokens, token_logprobs, top_logprobs, text_offset } => {
                // Several tokens may have the same text, parts of characters above all: the most probable one counts.
                let mut by_text = BTreeMap::new();
                for (token, logprob) in top {
                    by_text.entry(token).or_insert(logprob);
                }
                tokens.push(token);
                token_logprobs.push(logprob.logprob.max(LEAST));
                top_logprobs.push(by_text);
                text_offset.push(offset);
            }
            Logprobs::Chat { content, .. } => content.push(ChatToken {
                token: ChatLogprob::new(token, logprob.logprob),
                top_logprobs: top.map(|(token, logprob)| ChatLogprob::new(token, logprob)).collect(),
            }),
        }
    }

    /// What has come since the last time, if anything has.
    pub(crate) fn take(&mut self) -> Option<Logprobs> {
        self.logprobs.take()
    }
}

impl Logprobs {
    const fn empty(is_chat: bool) -> Self {
        if is_chat {
            Self::Chat { content: Vec::new(), refusal: None }
        } else {
            Self::Completion {
                tokens: Vec::new(),
                token_logprobs: Vec::new(),
                top_logprobs: Vec::new(),
                text_offset: Vec::new(),
            }
        }
    }
}

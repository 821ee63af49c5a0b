//! The bodies of answers: whole ones, and the chunks of a stream.

use folio::engine::Usage;
use serde::Serialize;

use super::logprobs::Logprobs;

/// What all parts of a reply begin with.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) is_chat: bool,
}

/// A reply, or a chunk of one.
#[derive(Serialize)]
pub(crate) struct Reply<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice>,
    /// In a stream that ends with the usage, all other chunks say `null`.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Totals>>,
}

#[derive(Serialize)]
pub(crate) struct Choice {
    index: usize,
    #[serde(flatten)]
    content: Content,
    /// Those of its tokens, or of the tokens since the last chunk.
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Content {
    Text(String),
    Message {
        role: &'static str,
        content: String,
        refusal: Option<()>,
    },
    Delta {
        #[serde(skip_serializing_if = "Option::is_none")]
        role: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        content: Option<String>,
    },
}

/// What a reply took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Totals {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

impl Totals {
    /// Adds an answer. Several to one prompt count it once.
    pub(crate) fn add(&mut self, usage: &Usage, is_first_of_prompt: bool) {
        if is_first_of_prompt {
            self.prompt_tokens = self.prompt_tokens.saturating_add(usage.prompt_tokens);
            let cached = &mut self.prompt_tokens_details.cached_tokens;
            *cached = cached.saturating_add(usage.cached_tokens);
        }
        self.completion_tokens = self.completion_tokens.saturating_add(usage.new_tokens);
        self.total_tokens = self.prompt_tokens.saturating_add(self.completion_tokens);
    }
}

impl Choice {
    pub(crate) fn with_logprobs(self, logprobs: Option<Logprobs>) -> Self {
        Self { logprobs, ..self }
    }
}

const ASSISTANT: &str = "assistant";

impl Head {
    /// A choice that is complete.
    pub(crate) fn whole(&self, index: usize, text: String, finish_reason: &'static str) -> Choice {
        let content = if self.is_chat {
            Content::Message { role: ASSISTANT, content: text, refusal: None }
        } else {
            Content::Text(text)
        };
        Choice { index, content, logprobs: None, finish_reason: Some(finish_reason) }
    }

    /// The first chunk of a choice in a chat: who speaks.
    pub(crate) fn role(&self, index: usize) -> Choice {
        let content = Content::Delta { role: Some(ASSISTANT), content: Some(String::new()) };
        Choice { index, content, logprobs: None, finish_reason: None }
    }

    /// More of a choice, or its end.
    pub(crate) fn piece(&self, index: usize, text: String, finish_reason: Option<&'static str>) -> Choice {
        let content = if self.is_chat {
            Content::Delta { role: None, content: Some(text).filter(|text| !text.is_empty()) }
        } else {
            Content::Text(text)
        };
        Choice { index, content, logprobs: None, finish_reason }
    }

    /// The reply with all its choices.
    pub(crate) fn reply(&self, choices: Vec<Choice>, usage: Totals) -> Reply<'_> {
        let object = if self.is_chat { "chat.completion" } else { "text_completion" };
        self.of(object, choices, Some(Some(usage)))
    }

    /// A chunk. `usage` as in [`Reply`].
    pub(crate) fn chunk(&self, choice: Option<Choice>, usage: Option<Option<Totals>>) -> Reply<'_> {
        let object = if self.is_chat { "chat.completion.chunk" } else { "text_completion" };
        self.of(object, choice.into_iter().collect(), usage)
    }

    fn of(&self, object: &'static str, choices: Vec<Choice>, usage: Option<Option<Totals>>) -> Reply<'_> {
        Reply { id: &self.id, object, created: self.created, model: &self.model, choices, usage }
    }
}

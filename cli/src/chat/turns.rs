//! What is fed for what somebody says.

use anyhow::{Result, ensure};
use folio::model::Tokenizer;

use super::options::Options;
use crate::load::Loaded;
use crate::template::{ChatTemplate, Message};

/// The form of a conversation, and what was said so far.
pub(crate) struct Turns {
    pub(crate) tokenizer: Tokenizer,
    form: Form,
    /// Tokens that end an answer.
    stop: Vec<u32>,
}

enum Form {
    /// The story model answers questions in a form of its own; see its model card.
    Stories { bos: Option<u32> },
    /// Text goes in as it is.
    Text,
    /// By the model's template.
    Messages { template: Box<ChatTemplate>, messages: Vec<Message> },
}

/// What makes an answer.
pub(crate) struct Asked {
    /// The whole text up to the answer.
    pub(crate) text: Vec<u32>,
    /// Tokens that end the answer.
    pub(crate) stop: Vec<u32>,
    /// Unless the options say one.
    pub(crate) temperature: f32,
}

impl Turns {
    pub(crate) fn new(options: &Options, loaded: &Loaded) -> Result<Self> {
        let form = match &loaded.template {
            Some(template) => {
                let system = options.system.iter().map(|text| Message::new("system", text));
                Form::Messages { template: Box::new(template.clone()), messages: system.collect() }
            }
            None if options.load.is_stories() => Form::Stories { bos: loaded.decoder.model().config().bos_token_id },
            None => Form::Text,
        };
        let takes_system = options.system.is_none() || matches!(form, Form::Messages { .. });
        ensure!(takes_system, "--system: the model has no chat template, need one that has");
        Ok(Self { tokenizer: loaded.tokenizer.clone(), form, stop: loaded.stop_tokens.clone() })
    }

    /// Whether turns are messages of their own, not text that goes on.
    pub(crate) const fn are_messages(&self) -> bool {
        matches!(self.form, Form::Messages { .. })
    }

    /// What is said, after what there is so far; `None` begins a new conversation. Returns `None` if it has no tokens.
    pub(crate) fn ask(&self, so_far: Option<&[u32]>, said: &str) -> Result<Option<Asked>> {
        if said.is_empty() {
            return Ok(None);
        }
        let before = so_far.unwrap_or_default();
        let is_first = before.is_empty();
        let (mut stop, mut temperature) = (self.stop.clone(), 0.8);
        let mut text = before.to_vec();
        match &self.form {
            Form::Messages { template, messages } => {
                let known = messages.iter().filter(|message| so_far.is_some() || is_system(message));
                let messages: Vec<_> = known.cloned().chain([Message::new("user", said)]).collect();
                // The template writes what begins a text, too.
                text = self.tokenizer.encode(&template.render(&messages, true)?, false)?;
            }
            Form::Text => text.extend(self.tokenizer.encode(said, is_first)?),
            Form::Stories { bos } => {
                if is_first {
                    // Its tokenizer leaves that to the host; others add what their models want.
                    text.extend(bos);
                }
                if said.trim_end().ends_with('?') {
                    let question = format!("\nQuestion: {}\nAnswer:", said.trim());
                    text.extend(self.tokenizer.encode(&question, is_first)?);
                    stop.extend(self.tokenizer.encode("\n", false)?);
                    temperature = 0.0;
                } else {
                    text.extend(self.tokenizer.encode(said, is_first)?);
                }
            }
        }
        Ok((!text.is_empty() && text != before).then_some(Asked { text, stop, temperature }))
    }

    /// Notes a turn that was answered.
    pub(crate) fn note(&mut self, said: &str, answer: &str) {
        if let Form::Messages { messages, .. } = &mut self.form {
            messages.extend([Message::new("user", said), Message::new("assistant", answer)]);
        }
    }

    /// Begins a new conversation.
    pub(crate) fn forget(&mut self) {
        if let Form::Messages { messages, .. } = &mut self.form {
            messages.retain(is_system);
        }
    }
}

fn is_system(message: &Message) -> bool {
    message.role == "system"
}

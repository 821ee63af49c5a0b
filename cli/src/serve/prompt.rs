//! From the body of a request to what the engine is given. It may take seconds for long texts, so it runs beside the reactor.

use folio::engine::Request;
use folio::model::ModelError;
use folio::{Error, ErrorKind};

use super::error::ApiError;
use super::state::Server;
use super::wire::{Body, ChatMessage, Prompt, ResponseFormat};
use crate::template::Message;

/// New tokens of a completion that says nothing about it, as in OpenAI's interface. A chat may go on to the model's last position.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// Log-probabilities in the answers to a request, at most. In JSON each takes some 60 bytes, which lie here until the answer is complete.
const MAX_LOGPROBS: u64 = 1 << 20;

/// What a request comes to.
#[derive(Debug)]
pub(crate) struct Job {
    /// One per prompt.
    pub(crate) requests: Vec<Request>,
    /// Answers to each of them.
    pub(crate) count: u32,
    pub(crate) is_chat: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

impl Job {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// For whatever is wrong with it.
    pub(crate) fn parse(server: &Server, bytes: &[u8], is_chat: bool) -> Result<Self, ApiError> {
        let mut body = Body::parse(bytes)?;
        if let Some(model) = body.model.as_deref().filter(|&model| model != server.model.name) {
            return Err(ApiError::no_such_model(model, &server.model.name));
        }
        let count = body.n.unwrap_or(1);
        let stop_strings = body.stop_strings()?;
        let stop_tokens = if body.ignore_eos() { Vec::new() } else { server.stop_tokens.clone() };
        let prompts = if is_chat {
            vec![server.conversation(body.messages.take())?]
        } else {
            server.prompts(body.prompt.take(), count)?
        };
        server.check_choices("n", u64::from(count) * prompts.len() as u64)?;
        let sampling = body.sampling();
        let logprobs = body.logprobs(is_chat)?.map(|top| top.min(server.tokenizer.vocab_size()));
        let requests = prompts.into_iter().map(|prompt| {
            let default = if is_chat { server.room_after(prompt.len()) } else { DEFAULT_MAX_TOKENS };
            let request = Request::new(prompt, body.max_tokens().unwrap_or(default))
                .with_sampling(sampling)
                .with_stops(stop_tokens.clone(), stop_strings.clone())
                .with_time_limit(server.limits.request_timeout);
            let mut request = match logprobs {
                Some(top) => request.with_logprobs(top),
                None => request,
            };
            request.grammar = body.response_format.as_ref().and_then(ResponseFormat::grammar);
            request
        });
        let requests: Vec<Request> = requests.collect();
        if let Some(top) = logprobs {
            let tokens: u64 = requests.iter().map(|request| u64::from(server.bounded(request))).sum();
            let told = tokens.saturating_mul(u64::from(count)).saturating_mul(u64::from(top) + 1);
            if told > MAX_LOGPROBS {
                let message = format!(
                    "logprobs: got {told} of them, answers times max_tokens times tokens; need at most {MAX_LOGPROBS}"
                );
                return Err(ApiError::invalid("logprobs", message));
            }
        }
        Ok(Self {
            requests,
            count,
            is_chat,
            stream: body.stream.unwrap_or(false),
            include_usage: body.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
        })
    }
}

impl Server {
    /// The tokens of each prompt of a completion.
    fn prompts(&self, prompt: Option<Prompt>, count: u32) -> Result<Vec<Vec<u32>>, ApiError> {
        let missing = || ApiError::invalid("prompt", "prompt: got none, need a text or token ids");
        let prompts = match prompt.ok_or_else(missing)? {
            Prompt::Text(text) => vec![self.encode("prompt", &text, true)?],
            Prompt::Texts(texts) => {
                // Before the work is done for all of them.
                self.check_choices("prompt", u64::from(count) * texts.len() as u64)?;
                texts.iter().map(|text| self.encode("prompt", text, true)).collect::<Result<_, _>>()?
            }
            Prompt::Tokens(tokens) => vec![tokens],
            Prompt::TokenLists(lists) => lists,
        };
        if prompts.is_empty() {
            return Err(missing());
        }
        for prompt in &prompts {
            self.check_len("prompt", prompt)?;
        }
        Ok(prompts)
    }

    /// The tokens of a conversation: as the model's template writes it, else the texts of all messages, line by line.
    fn conversation(&self, messages: Option<Vec<ChatMessage>>) -> Result<Vec<u32>, ApiError> {
        let messages = messages.filter(|messages| !messages.is_empty());
        let missing = || ApiError::invalid("messages", "messages: got none, need at least one");
        let read = |(at, message): (usize, ChatMessage)| {
            // What OpenAI calls a developer now is the system of all templates.
            let role = match message.role.as_str() {
                "system" | "developer" => "system",
                "user" => "user",
                "assistant" => "assistant",
                other => {
                    let name = format!("messages[{at}].role");
                    let message = format!("{name}: got {other:?}, need system, developer, user or assistant");
                    return Err(ApiError::invalid(name, message));
                }
            };
            Ok(Message::new(role, message.text(at)?))
        };
        let messages: Vec<_> =
            messages.ok_or_else(missing)?.into_iter().enumerate().map(read).collect::<Result<_, _>>()?;
        let tokens = match &self.template {
            Some(template) => {
                let text = template.render(&messages, true).map_err(|error| {
                    // Without the path of the file, which is nobody's business.
                    let text = error.to_string();
                    let text = text.split_once("chat template: ").map_or(text.as_str(), |(_, text)| text);
                    ApiError::invalid("messages", format!("messages: the model's chat template refuses them: {text}"))
                })?;
                self.encode("messages", &text, false)?
            }
            None => {
                let texts: Vec<_> = messages.into_iter().map(|message| message.content).collect();
                self.encode("messages", &texts.join("\n"), true)?
            }
        };
        self.check_len("messages", &tokens)?;
        Ok(tokens)
    }

    fn encode(&self, param: &str, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        // A text of many megabytes costs seconds and gigabytes, only to find that it is too long.
        let most = self.limits.max_prompt_tokens as usize * self.longest_token;
        if text.len() > most {
            let tokens = self.limits.max_prompt_tokens;
            let message = format!("{param}: got {} bytes, need at most {tokens} tokens", text.len());
            return Err(ApiError::too_long(param, message));
        }
        self.tokenizer.encode(text, add_special).map_err(|error| match error {
            ModelError::Folio(Error::Argument { .. }) => ApiError::invalid(param, error.to_string()),
            error => {
                debug_assert_ne!(error.kind(), ErrorKind::Caller);
                tracing::error!(%error, "tokenizer");
                ApiError::failed("the tokenizer has failed; see the server's log")
            }
        })
    }

    fn check_len(&self, param: &str, prompt: &[u32]) -> Result<(), ApiError> {
        let most = self.limits.max_prompt_tokens;
        if prompt.len() > most as usize {
            let message = format!("{param}: got {} tokens, need at most {most}", prompt.len());
            return Err(ApiError::too_long(param, message));
        }
        if prompt.is_empty() {
            let message = format!("{param}: got a text without tokens, need at least one");
            return Err(ApiError::invalid(param, message));
        }
        Ok(())
    }

    fn check_choices(&self, param: &str, choices: u64) -> Result<(), ApiError> {
        let most = self.limits.max_choices;
        if choices == 0 || choices > u64::from(most) {
            let message = format!("{param}: got {choices} answers in all, prompts times n; need 1 to {most}");
            return Err(ApiError::invalid(param, message));
        }
        Ok(())
    }

    /// New tokens of a request, at most.
    fn bounded(&self, request: &Request) -> u32 {
        request.max_tokens.min(self.room_after(request.prompt.len()))
    }

    /// New tokens that a prompt leaves room for, in the model and in the cache.
    fn room_after(&self, prompt_tokens: usize) -> u32 {
        // The last token is never fed.
        let most = self.model.max_positions.min(self.max_cached_tokens).saturating_add(1);
        most.saturating_sub(u32::try_from(prompt_tokens).unwrap_or(u32::MAX)).max(1)
    }
}

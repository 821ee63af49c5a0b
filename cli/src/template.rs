//! Chat templates: how a model wants a conversation as one text.
//!
//! Hugging Face's checkpoints and GGUF files bring a Jinja template along. It is rendered by minijinja in the surroundings that transformers gives it: blocks
//! trimmed, no escaping, Python's methods, `raise_exception`, `strftime_now`, `tojson`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use folio::model::GgufMetadata;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::files::{read_text, read_text_if_there};

/// Instructions of a rendering, at most: a template must not run for ever. Those of published models take some hundred per message.
const MAX_INSTRUCTIONS: u64 = 20_000_000;

/// In the environment.
const NAME: &str = "chat_template";

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    /// `system`, `user` or `assistant`; what else there is, the template knows.
    pub(crate) role: String,
    /// Its text.
    pub(crate) content: String,
}

impl Message {
    pub(crate) fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: content.into() }
    }
}

/// A model's chat template.
#[derive(Clone, Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    /// The file it is from.
    path: PathBuf,
    special_tokens: BTreeMap<&'static str, String>,
}

/// What matters in a `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "chat_template: need a text, or a list of {name, template}")]
enum Templates {
    One(String),
    Many(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a special token: need a text, or an object with a text named content")]
enum SpecialToken {
    Text(String),
    Object { content: String },
}

/// A `chat_template.json`.
#[derive(Deserialize)]
struct TemplateFile {
    chat_template: Templates,
}

impl Templates {
    fn default(self) -> Result<String> {
        match self {
            Self::One(template) => Ok(template),
            Self::Many(mut named) => {
                if let Some(at) = named.iter().position(|named| named.name == "default") {
                    return Ok(named.swap_remove(at).template);
                }
                let names: Vec<_> = named.iter().map(|named| named.name.as_str()).collect();
                bail!("chat_template: got templates named {names:?}, need one named \"default\"")
            }
        }
    }
}

fn from_json<T: for<'a> Deserialize<'a>>(path: &Path, text: &str) -> Result<T> {
    serde_json::from_str(text).with_context(|| path.display().to_string())
}

impl ChatTemplate {
    /// The template of a model's folder: that of `chat_template.jinja`, else of `tokenizer_config.json`, else of `chat_template.json`. `None`
    /// if there is none.
    pub(crate) fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("tokenizer_config.json");
        let config = match read_text_if_there(&path)? {
            Some(text) => from_json(&path, &text)?,
            None => TokenizerConfig::default(),
        };
        let jinja = folder.join("chat_template.jinja");
        let json = folder.join("chat_template.json");
        let (path, source) = if let Some(source) = read_text_if_there(&jinja)? {
            (jinja, source)
        } else if let Some(templates) = config.chat_template {
            let source = templates.default().with_context(|| path.display().to_string())?;
            (path, source)
        } else if json.try_exists()? {
            let file: TemplateFile = from_json(&json, &read_text(&json)?)?;
            let source = file.chat_template.default().with_context(|| json.display().to_string())?;
            (json, source)
        } else {
            return Ok(None);
        };
        let tokens = [
            ("bos_token", config.bos_token),
            ("eos_token", config.eos_token),
            ("unk_token", config.unk_token),
            ("pad_token", config.pad_token),
        ];
        let text = |token| match token {
            SpecialToken::Text(text) | SpecialToken::Object { content: text } => text,
        };
        let special_tokens = tokens.into_iter().filter_map(|(name, token)| Some((name, text(token?)))).collect();
        Self::new(source, path, special_tokens).map(Some)
    }

    /// The template of a GGUF file: `tokenizer.chat_template`. `None` if there is none.
    pub(crate) fn from_gguf(path: &Path) -> Result<Option<Self>> {
        let metadata = GgufMetadata::open(path)?;
        let Some(source) = metadata.text("tokenizer.chat_template")? else { return Ok(None) };
        let mut special_tokens = BTreeMap::new();
        for (name, setting) in
            [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
        {
            if let Some(token) = metadata.special_token(setting)? {
                special_tokens.insert(name, token.to_owned());
            }
        }
        Self::new(source.to_owned(), path.to_owned(), special_tokens).map(Some)
    }

    fn new(source: String, path: PathBuf, special_tokens: BTreeMap<&'static str, String>) -> Result<Self> {
        let failed = |error: Error| anyhow!("{}: chat template: {error}", path.display());
        let environment = environment(source).map_err(failed)?;
        Ok(Self { environment, path, special_tokens })
    }

    /// The conversation as one text, special tokens included: it is to be encoded without adding any. With `add_generation_prompt` it ends where
    /// the answer begins.
    ///
    /// # Errors
    /// Those of the template, which may refuse a conversation.
    pub(crate) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let failed = |error: Error| anyhow!("{}: chat template: {error}", self.path.display());
        let context = minijinja::context! {
            messages => Serde(messages),
            add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            ..Value::from(Serde(&self.special_tokens))
        };
        self.environment.get_template(NAME).and_then(|template| template.render(context)).map_err(failed)
    }

    /// The token that ends an answer, as the tokenizer's configuration has it.
    pub(crate) fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token").map(String::as_str)
    }
}

fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: String) -> Result<String, Error> {
    let failed = |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    jiff::fmt::strtime::format(&format, &jiff::Zoned::now()).map_err(failed)
}

/// JSON as Python's `json.dumps` writes it with `ensure_ascii=False`. That of minijinja is for web pages, and escapes what they must not have.
fn to_json(value: Value, indent: Option<usize>, options: Kwargs) -> Result<String, Error> {
    const MAX_INDENT: usize = 16;
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<usize>>("indent")?,
    };
    // They change the order of keys or the spelling of characters, not the meaning.
    for name in ["ensure_ascii", "sort_keys", "separators"] {
        options.get::<Option<Value>>(name)?;
    }
    options.assert_all_used()?;
    match indent {
        None => write_json(&value, PythonFormatter),
        Some(0..=MAX_INDENT) => {
            let spaces = [b' '; MAX_INDENT];
            write_json(&value, PrettyFormatter::with_indent(&spaces[..indent.unwrap_or(0)]))
        }
        Some(indent) => {
            let message = format!("tojson: got indent {indent}, need at most {MAX_INDENT}");
            Err(Error::new(ErrorKind::InvalidOperation, message))
        }
    }
}

fn write_json(value: &Value, formatter: impl Formatter) -> Result<String, Error> {
    let failed = |error: String| Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"));
    let mut bytes = Vec::new();
    value
        .serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        .map_err(|error| failed(error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| failed(error.to_string()))
}

/// A space after commas and colons.
struct PythonFormatter;

fn separate(writer: &mut (impl io::Write + ?Sized), first: bool) -> io::Result<()> {
    if first { Ok(()) } else { writer.write_all(b", ") }
}

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        separate(writer, first)
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests;

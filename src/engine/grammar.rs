//! Answers that follow a grammar: which tokens may come next, by the library `llguidance`.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};

use super::request::Grammar;
use crate::model::{ModelError, ModelResult, Tokenizer};

/// Longest text of a grammar, in bytes. The library bounds what it makes of it by itself.
const MAX_BYTES: usize = 1 << 20;

/// What the grammars of an engine's requests have in common: the tokens as bytes.
#[derive(Default)]
pub(super) struct Grammars {
    /// By the token that ends a text. Made when the first request has a grammar.
    factories: HashMap<u32, Arc<ParserFactory>>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("stop_tokens", &self.factories.keys()).finish_non_exhaustive()
    }
}

/// How far a text has come in its grammar.
pub(super) struct Constraint {
    matcher: Matcher,
    /// Words of a set of tokens.
    set_words: usize,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").field("is_stopped", &self.matcher.is_stopped()).finish_non_exhaustive()
    }
}

fn invalid(error: impl fmt::Display) -> ModelError {
    ModelError::argument("grammar", error, "a grammar that the library `llguidance` can use")
}

impl Grammars {
    /// The beginning of a text that ends with one of the stop tokens.
    pub(super) fn start(
        &mut self,
        grammar: &Grammar,
        tokenizer: Option<&Tokenizer>,
        stop_tokens: &[u32],
        vocab: u32,
    ) -> ModelResult<Constraint> {
        let Some(tokenizer) = tokenizer else {
            return Err(ModelError::argument("grammar", "no tokenizer", "an engine that was given one"));
        };
        let known = stop_tokens.iter().find(|&&token| token < tokenizer.vocab_size());
        let Some(&stop) = known else {
            let need = "one that says that the text is complete, beside a grammar";
            return Err(ModelError::argument("stop_tokens", "no token of the tokenizer's", need));
        };
        let factory = match self.factories.get(&stop) {
            Some(factory) => Arc::clone(factory),
            None => {
                let factory = Arc::new(factory(tokenizer, stop)?);
                self.factories.insert(stop, Arc::clone(&factory));
                factory
            }
        };
        let (Grammar::JsonSchema(text) | Grammar::Regex(text) | Grammar::Lark(text)) = grammar;
        if text.len() > MAX_BYTES {
            return Err(ModelError::argument(
                "grammar",
                format!("{} bytes", text.len()),
                format!("at most {MAX_BYTES}"),
            ));
        }
        let parsed = match grammar {
            Grammar::JsonSchema(text) => {
                let mut schema = serde_json::from_str(text).map_err(invalid)?;
                // A model that likes spaces would go on with them for ever.
                if let serde_json::Value::Object(fields) = &mut schema {
                    fields.entry("x-guidance").or_insert_with(|| serde_json::json!({ "whitespace_flexible": false }));
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let parser =
            llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| factory.create_parser(parsed)));
        let matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(invalid(error.lines().next().unwrap_or_default()));
        }
        Ok(Constraint { matcher, set_words: vocab.div_ceil(32) as usize })
    }
}

fn factory(tokenizer: &Tokenizer, stop: u32) -> ModelResult<ParserFactory> {
    let words = tokenizer.token_bytes(|json| llguidance::token_bytes_from_tokenizer_json(&json))?;
    let info = TokRxInfo::new(words.len() as u32, stop);
    let trie = TokTrie::from(&info, &words);
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new(
        &env,
        InferenceCapabilities::default(),
        &llguidance::earley::SlicedBiasComputer::general_slices(),
    )
    .map_err(invalid)?;
    factory.quiet();
    factory.limits_mut().verbose_errors = false;
    Ok(factory)
}

impl Constraint {
    /// How many of these tokens may follow, from the first on.
    pub(super) fn valid(&mut self, drafts: &[u32]) -> ModelResult<usize> {
        self.matcher.validate_tokens(drafts).map_err(invalid)
    }

    /// The tokens that may come next, and after each of the drafts, which are [valid](Self::valid).
    pub(super) fn allowed(&mut self, drafts: &[u32]) -> ModelResult<Vec<Vec<u32>>> {
        let mut sets = Vec::with_capacity(drafts.len() + 1);
        for i in 0..=drafts.len() {
            let set = self.matcher.compute_mask_or_eos().map_err(invalid)?;
            let mut set = set.as_slice().to_vec();
            set.resize(self.set_words, 0);
            sets.push(set);
            if let Some(&draft) = drafts.get(i) {
                self.matcher.consume_token(draft).map_err(invalid)?;
            }
        }
        self.matcher.rollback(drafts.len()).map_err(invalid)?;
        Ok(sets)
    }

    /// Goes on by a token. Returns whether the text is complete, so that nothing may follow.
    pub(super) fn push(&mut self, token: u32) -> ModelResult<bool> {
        self.matcher.consume_token(token).map_err(invalid)?;
        Ok(self.matcher.is_stopped())
    }
}

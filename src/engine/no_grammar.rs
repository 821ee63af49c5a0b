//! In place of `grammar`, without that feature: there is none.

use super::request::Grammar;
use crate::model::{ModelError, ModelResult, Tokenizer};

#[derive(Debug, Default)]
pub(super) struct Grammars {}

/// There is none.
#[derive(Debug)]
pub(super) enum Constraint {}

impl Grammars {
    #[allow(clippy::unused_self, clippy::needless_pass_by_ref_mut, reason = "the signature is that of the feature")]
    pub(super) fn start(&mut self, _: &Grammar, _: Option<&Tokenizer>, _: &[u32], _: u32) -> ModelResult<Constraint> {
        Err(ModelError::argument("grammar", "one", "none, or folio with its feature `grammar`"))
    }
}

impl Constraint {
    pub(super) fn valid(&mut self, _: &[u32]) -> ModelResult<usize> {
        match *self {}
    }

    pub(super) fn allowed(&mut self, _: &[u32]) -> ModelResult<Vec<Vec<u32>>> {
        match *self {}
    }

    pub(super) fn push(&mut self, _: u32) -> ModelResult<bool> {
        match *self {}
    }
}

//! Generating many tokens: the loop around [`Decoder::step`].

use std::ops::ControlFlow;

use super::decoder::{Decoder, Input};
use super::error::{ModelError, ModelResult};
use super::sampler::Sampling;
use crate::SequenceId;

/// A sequence to be continued.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// The sequence; what it holds already stays cached.
    pub sequence: SequenceId,
    /// New tokens, at least one. After an earlier generation the first is its last token, which was never fed.
    pub tokens: &'a [u32],
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Why a sequence was not continued any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so: a stop token, which is not part of the tokens.
    Stop,
    /// `max_new_tokens` are there.
    Length,
    /// The model has no more positions.
    Positions,
    /// The callback broke off.
    Interrupted,
}

/// What was generated for one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// The token that was sampled last: the stop token, or the last of `tokens`. It has not been fed, so it is not in the cache; a
    /// continuation begins with it.
    pub pending: u32,
    /// Why it ended.
    pub finish: Finish,
}

impl Decoder {
    /// Continues all prompts together, one token each per step, until each has met a stop token, has `max_new_tokens`, or has run out of
    /// positions. `on_token(prompt, token)` sees every token as it comes and may end its prompt.
    ///
    /// # Errors
    /// Those of [`step`](Self::step). Tokens that earlier steps have fed stay in their sequences.
    pub async fn generate(
        &mut self,
        prompts: &[Prompt<'_>],
        max_new_tokens: usize,
        stop: &[u32],
        mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
    ) -> ModelResult<Vec<Generated>> {
        if max_new_tokens == 0 {
            return Err(ModelError::argument("max_new_tokens", 0, "at least 1"));
        }
        let max_positions = self.model().config().max_positions as usize;
        let blank = Generated { tokens: Vec::new(), pending: 0, finish: Finish::Length };
        let mut generated = vec![blank; prompts.len()];
        let mut active: Vec<usize> = (0..prompts.len()).collect();
        loop {
            if active.is_empty() {
                break;
            }
            let inputs: Vec<_> = active
                .iter()
                .map(|&i| Input {
                    sequence: prompts[i].sequence,
                    tokens: generated[i].tokens.last().map_or(prompts[i].tokens, std::slice::from_ref),
                    sampling: Some(&prompts[i].sampling),
                })
                .collect();
            let sampled = self.step(&inputs).await?;
            let mut still_active = Vec::with_capacity(active.len());
            for (&i, token) in active.iter().zip(sampled) {
                // Every input asked for a token.
                let Some(token) = token else { continue };
                let result = &mut generated[i];
                result.pending = token;
                if stop.contains(&token) {
                    result.finish = Finish::Stop;
                    continue;
                }
                result.tokens.push(token);
                if on_token(i, token).is_break() {
                    result.finish = Finish::Interrupted;
                } else if result.tokens.len() == max_new_tokens {
                    result.finish = Finish::Length;
                } else if self.tokens(prompts[i].sequence)?.len() == max_positions {
                    result.finish = Finish::Positions;
                } else {
                    still_active.push(i);
                }
            }
            active = still_active;
        }
        Ok(generated)
    }

    /// [`Decoder::generate`], waiting for the GPU.
    ///
    /// # Errors
    /// Those of [`Decoder::generate`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn generate_blocking(
        &mut self,
        prompts: &[Prompt<'_>],
        max_new_tokens: usize,
        stop: &[u32],
        on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
    ) -> ModelResult<Vec<Generated>> {
        let gpu = self.model().gpu().clone();
        gpu.block_on(self.generate(prompts, max_new_tokens, stop, on_token))
    }
}

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
    /// New tokens. After an earlier generation there may be none: the text goes on from its [pending](Decoder::pending) token.
    pub tokens: &'a [u32],
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Why a sequence was not continued any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so: a stop token, which is not part of the tokens. It is pending, and so part of the text if the sequence goes on;
    /// [`Decoder::discard_pending`] drops it.
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
    /// Tokens of the prompt that were found in the prefix index, and so not computed.
    pub cached_tokens: u32,
    /// Why it ended.
    pub finish: Finish,
}

impl Decoder {
    /// Continues all prompts together, one token each per step, until each has met a stop token, has `max_new_tokens`, or has run out of
    /// positions. `on_token(prompt, token)` sees every token as it comes and may end its prompt.
    ///
    /// The token that was sampled last is [pending](Self::pending): a next call goes on from it, with more tokens or none.
    ///
    /// # Errors
    /// Those of [`step`](Self::step), and [`Error::Argument`](crate::Error::Argument) if `max_new_tokens` is 0. What earlier steps have sampled
    /// stays in the sequences, and `on_token` has seen it: where the cache was full, a call without new tokens goes on once there is room. So
    /// it is if the future is dropped.
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
        let max_positions = self.max_len() as usize;
        let blank = Generated { tokens: Vec::new(), cached_tokens: 0, finish: Finish::Length };
        let mut generated = vec![blank; prompts.len()];
        let found = |decoder: &Self| -> ModelResult<Vec<u32>> {
            prompts.iter().map(|prompt| decoder.prefix_len(prompt.sequence)).collect()
        };
        let found_before = found(self)?;
        let mut active: Vec<usize> = (0..prompts.len()).collect();
        let mut is_first = true;
        while !active.is_empty() {
            let inputs: Vec<_> = active
                .iter()
                .map(|&i| {
                    let tokens = if is_first { prompts[i].tokens } else { &[] };
                    Input::new(prompts[i].sequence, tokens).with_sampling(&prompts[i].sampling)
                })
                .collect();
            let sampled = self.step(&inputs).await?;
            if is_first {
                for ((result, before), after) in generated.iter_mut().zip(&found_before).zip(found(self)?) {
                    result.cached_tokens = after - before;
                }
            }
            is_first = false;
            let mut still_active = Vec::with_capacity(active.len());
            for (&i, token) in active.iter().zip(sampled) {
                // Every input asked for a token.
                let Some(token) = token else { continue };
                let result = &mut generated[i];
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
        let gpu = self.gpu().clone();
        gpu.block_on(self.generate(prompts, max_new_tokens, stop, on_token))
    }
}

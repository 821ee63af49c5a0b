//! What is done once, before the first sequence: scales per channel are fixed, kernels run for the first time.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::input::Input;
use super::{Decoder, DecoderOptions};
use crate::model::error::{ModelError, ModelResult};
use crate::model::generate::Prompt;
use crate::model::progress::WarmUp;
use crate::model::sampler::Sampling;
use crate::{KvCache, KvFormat, SequenceId};

/// Ends a sequence of the cache, also if the future that made it is dropped.
struct Ended {
    cache: Arc<KvCache>,
    sequence: SequenceId,
}

impl Drop for Ended {
    fn drop(&mut self) {
        // It can only fail for a sequence that is gone.
        let _ = self.cache.free(self.sequence);
    }
}

impl Decoder {
    /// Fixes the scales of a key format with scales per channel from the keys that the model computes for some texts. To be called once, with an
    /// empty cache; a few hundred tokens of what the model will see are enough. The texts go through a decoder of their own, with keys in f32.
    ///
    /// # Errors
    /// Those of [`step`](Self::step) for a text, and of [`KvCache::calibrate_keys`]: for other formats, for no texts, or if there are sequences.
    pub async fn calibrate_keys(&mut self, texts: &[&[u32]]) -> ModelResult<()> {
        let block_size = self.options.block_size;
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0) as u32;
        let options = DecoderOptions {
            num_blocks: longest.div_ceil(block_size).max(1),
            k_format: KvFormat::F32,
            v_format: KvFormat::F16,
            prefix_cache: false,
            // All keys are read back.
            keep_all_blocks: true,
            streaming: None,
            ..self.options
        };
        let mut decoder = Self::new(Arc::clone(&self.model), options).await?;
        let mut keys = vec![Vec::new(); self.model.config().num_layers as usize];
        for tokens in texts {
            let sequence = decoder.create_sequence();
            decoder.step(&[Input::new(sequence, tokens)]).await?;
            for (layer, keys) in (0..).zip(&mut keys) {
                keys.extend(decoder.cache.gather(sequence, layer).await?.k);
            }
            decoder.free(sequence)?;
        }
        for (layer, keys) in (0..).zip(&keys) {
            self.cache.calibrate_keys(layer, keys)?;
        }
        Ok(())
    }

    /// [`calibrate_keys`](Self::calibrate_keys) with what the model itself writes after some openings, up to `max_new_tokens` each: for programs
    /// that have no texts at hand. Sampled with temperature 0.7, each opening with a seed of its own.
    ///
    /// # Errors
    /// Those of [`generate`](Self::generate) for an opening, and of [`calibrate_keys`](Self::calibrate_keys).
    pub async fn calibrate_keys_on_own_text(&mut self, openings: &[&[u32]], max_new_tokens: usize) -> ModelResult<()> {
        let block_size = self.options.block_size;
        let tokens: usize = openings.iter().map(|opening| opening.len() + max_new_tokens + block_size as usize).sum();
        let num_blocks = u32::try_from(tokens).unwrap_or(u32::MAX).div_ceil(block_size).max(1);
        let options = DecoderOptions {
            num_blocks,
            k_format: KvFormat::F16,
            v_format: KvFormat::F16,
            prefix_cache: false,
            ..self.options
        };
        let mut writer = Self::new(Arc::clone(&self.model), options).await?;
        let prompts: Vec<_> = (0..)
            .zip(openings)
            .map(|(seed, &tokens)| Prompt {
                sequence: writer.create_sequence(),
                tokens,
                sampling: Sampling { temperature: 0.7, seed, ..Sampling::default() },
            })
            .collect();
        let stop = &self.model.config().eos_token_ids;
        let texts = writer.generate(&prompts, max_new_tokens, stop, |_, _| ControlFlow::Continue(())).await?;
        let texts: Vec<_> =
            openings.iter().zip(&texts).map(|(opening, text)| [opening, &text.tokens[..]].concat()).collect();
        self.calibrate_keys(&texts.iter().map(Vec::as_slice).collect::<Vec<_>>()).await
    }

    /// Runs every kernel once, so that the first real step doesn't wait for the driver's compiler. Takes free blocks meanwhile, for
    /// a sequence of `max_step_tokens` if there are as many; with none it does nothing for the linear layers.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub async fn warm_up(&mut self) -> ModelResult<()> {
        self.warm_up_with(|_| {}).await
    }

    /// [`Decoder::warm_up`], which tells `progress` after each stage how far it is. A steady state compiles nothing more: each pipeline that steps need has
    /// been made and run by then, but for those of trees of drafts.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub async fn warm_up_with(&mut self, mut progress: impl FnMut(WarmUp)) -> ModelResult<()> {
        self.kernels.warm_up()?;
        let free = self.usage().free / self.cache.config().groups.count();
        let room = free.saturating_mul(self.options.block_size).min(self.max_len());
        let most = self.options.max_step_tokens.min(room);
        let (greedy, draw) = (Sampling::greedy(), Sampling::default());
        let penalty = |sampling| Sampling { repetition_penalty: 1.5, ..sampling };
        let samplings = [greedy, draw, penalty(greedy), penalty(draw)];
        // Linear layers have kernels for 1, 2, 4, 8, 16 and many rows; the sampler has one for each of these settings.
        let lens: Vec<u32> = [1, 2, 4, 8, 16, most].into_iter().filter(|len| (1..=most).contains(len)).collect();
        let gpu = self.gpu().clone();
        let stages_total = 1 + lens.len() as u32;
        let mut report = |stages_done| {
            progress(WarmUp { stages_done, stages_total, num_pipelines: gpu.num_compiled() });
        };
        report(1);
        for (i, len) in lens.into_iter().enumerate() {
            // A sequence of the cache that the decoder doesn't know: nothing of it can stay, in the prefix index for example.
            let ended = Ended { cache: Arc::clone(&self.cache), sequence: self.cache.create_sequence() };
            let tokens = vec![0; len as usize];
            let sampling = Some(&samplings[i % samplings.len()]);
            let result = self.sample(&[Input { sampling, ..Input::new(ended.sequence, &tokens) }]).await;
            // A model may well compute nonsense for a row of equal tokens; the kernels have run.
            if let Err(error) = result
                && !matches!(error, ModelError::BadLogits { .. })
            {
                return Err(error);
            }
            report(2 + i as u32);
        }
        Ok(())
    }
}

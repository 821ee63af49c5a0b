//! Sequences begin, branch, shrink, leave the cache and come back, and end.

use std::path::Path;

use super::step::PREFIX_SALT;
use super::{Decoder, Text};
use crate::model::error::{ModelError, ModelResult};
use crate::{Error, KvCacheConfig, PrefixMatch, PrefixProbe, SequenceId, SequenceSnapshot};

/// How many of the first `len` tokens of a text are in the cache: all, or all but the pending one.
fn cached_len(text: &Text, len: u32) -> ModelResult<u32> {
    if len as usize > text.len() {
        let need = format!("at most the sequence's length, {}", text.len());
        return Err(ModelError::argument("len", len, need));
    }
    Ok(len.min(text.cached.len() as u32))
}

impl Decoder {
    /// A new, empty sequence.
    pub fn create_sequence(&mut self) -> SequenceId {
        let id = self.cache.create_sequence();
        self.texts.insert(id, Text::default());
        id
    }

    fn text(&self, sequence: SequenceId) -> ModelResult<&Text> {
        self.texts.get(&sequence).ok_or(ModelError::Folio(Error::UnknownSequence(sequence)))
    }

    /// The text of a sequence that is in the cache, with as many tokens as the decoder has put there.
    pub(super) fn cached_text(&self, sequence: SequenceId) -> ModelResult<&Text> {
        let text = self.text(sequence)?;
        let len = self.cache.seq_len(sequence)?;
        if len as usize != text.cached.len() {
            let got = format!("{sequence} with {len} tokens in the cache");
            let need = format!("the decoder's own {}; change its sequences by its methods only", text.cached.len());
            return Err(ModelError::argument("sequence", got, need));
        }
        Ok(text)
    }

    /// The tokens of a sequence whose keys and values are in the cache, or on the host while it is swapped out. The
    /// [pending](Self::pending) one comes after them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn tokens(&self, sequence: SequenceId) -> ModelResult<&[u32]> {
        Ok(&self.text(sequence)?.cached)
    }

    /// The token that was sampled last, if nothing has been fed since: the next call feeds it first. It may be a stop token.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn pending(&self, sequence: SequenceId) -> ModelResult<Option<u32>> {
        Ok(self.text(sequence)?.pending)
    }

    /// Drops the pending token, which the text then never had, and returns it.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn discard_pending(&mut self, sequence: SequenceId) -> ModelResult<Option<u32>> {
        let text = self.texts.get_mut(&sequence).ok_or(ModelError::Folio(Error::UnknownSequence(sequence)))?;
        Ok(text.pending.take())
    }

    /// How many of the sequence's first tokens were found in the prefix index, and so not computed.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn prefix_len(&self, sequence: SequenceId) -> ModelResult<u32> {
        Ok(self.text(sequence)?.prefix_len)
    }

    /// A new sequence with the same text, pending token included, that shares all blocks; see [`KvCache::fork`](crate::KvCache::fork).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], also for one that is swapped out.
    pub fn fork(&mut self, sequence: SequenceId) -> ModelResult<SequenceId> {
        let text = self.cached_text(sequence)?.clone();
        let id = self.cache.fork(sequence)?;
        self.texts.insert(id, text);
        Ok(id)
    }

    /// A new sequence of the first `len` tokens of the text, sharing their blocks. A pending token counts as the last one of the text, so it
    /// comes along only if `len` is one more than there are [`tokens`](Self::tokens).
    ///
    /// # Errors
    /// [`Error::Argument`] for more tokens than the text has, or if it [doesn't reach back](Self::reaches_back) so far; [`Error::UnknownSequence`],
    /// also for one that is swapped out.
    pub fn fork_at(&mut self, sequence: SequenceId, len: u32) -> ModelResult<SequenceId> {
        let text = self.cached_text(sequence)?;
        let cached = cached_len(text, len)?;
        let id = self.cache.fork_at(sequence, cached)?;
        let mut text = text.clone();
        text.truncate(len, self.options.block_size);
        self.texts.insert(id, text);
        Ok(id)
    }

    /// Forgets the tokens of the text from `len` on. A pending token counts as the last one of the text, so it stays only if `len` is one more
    /// than there are [`tokens`](Self::tokens), and nothing changes then.
    ///
    /// # Errors
    /// [`Error::Argument`] for more tokens than the text has, or if it [doesn't reach back](Self::reaches_back) so far; [`Error::UnknownSequence`],
    /// also for one that is swapped out.
    pub fn truncate(&mut self, sequence: SequenceId, len: u32) -> ModelResult<()> {
        let cached = cached_len(self.text(sequence)?, len)?;
        self.cache.truncate(sequence, cached)?;
        let block_size = self.options.block_size;
        if let Some(text) = self.texts.get_mut(&sequence) {
            text.truncate(len, block_size);
        }
        Ok(())
    }

    /// Whether [`truncate`](Self::truncate) and [`fork_at`](Self::fork_at) can reach back to `len` tokens: the text has as many, and what the token
    /// behind them sees has not left the window; see [`keep_all_blocks`](super::DecoderOptions::keep_all_blocks).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], also for one that is swapped out.
    pub fn reaches_back(&self, sequence: SequenceId, len: u32) -> ModelResult<bool> {
        let text = self.text(sequence)?;
        let cached = len.min(text.cached.len() as u32);
        Ok(len as usize <= text.len() && self.cache.reaches_back(sequence, cached)?)
    }

    /// [`truncate`](Self::truncate) to `len` tokens if that [is possible](Self::reaches_back), otherwise to none. Returns how many the text has then:
    /// the others are to be fed again.
    ///
    /// # Errors
    /// Those of [`truncate`](Self::truncate).
    pub fn rewind(&mut self, sequence: SequenceId, len: u32) -> ModelResult<u32> {
        cached_len(self.text(sequence)?, len)?;
        let len = if self.reaches_back(sequence, len)? { len } else { 0 };
        self.truncate(sequence, len)?;
        Ok(len)
    }

    /// Gives the blocks back that have left the window of a sequence that rests; one that goes on does it by itself. See
    /// [`KvCache::release_hidden`](crate::KvCache::release_hidden).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], also for one that is swapped out.
    pub fn release_hidden(&mut self, sequence: SequenceId) -> ModelResult<u32> {
        self.text(sequence)?;
        Ok(self.cache.release_hidden(sequence)?)
    }

    /// Ends a sequence, also one that is swapped out.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free(&mut self, sequence: SequenceId) -> ModelResult<()> {
        self.text(sequence)?;
        if self.swapped.remove(&sequence).is_none() {
            self.cache.free(sequence)?;
        }
        self.texts.remove(&sequence);
        Ok(())
    }

    /// Makes the sequence's full blocks findable for [`match_prefix`](Self::match_prefix), and for every new sequence if
    /// [`prefix_cache`](super::DecoderOptions::prefix_cache) is set, which also does this by itself. Returns the number of blocks that were not
    /// in the index yet. Of an [exact](crate::model::ModelOptions::with_exact) model only blocks of tokens that were given, before the first one
    /// that was sampled. See [`KvCache::publish_prefix`](crate::KvCache::publish_prefix).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], also for one that is swapped out.
    pub fn publish_prefix(&mut self, sequence: SequenceId) -> ModelResult<u32> {
        let text = self.cached_text(sequence)?;
        let tokens = if self.model.is_exact() { &text.cached[..text.given as usize] } else { &text.cached };
        Ok(self.cache.publish_prefix(sequence, tokens, PREFIX_SALT)?)
    }

    /// A new sequence that begins with the longest known run of full blocks of `tokens`; it may be empty. The last token is not looked for: what
    /// remains to be fed, from [`PrefixMatch::len`] on, is at least that one.
    pub fn match_prefix(&mut self, tokens: &[u32]) -> PrefixMatch {
        let but_last = &tokens[..tokens.len().saturating_sub(1)];
        let found = self.cache.match_prefix(but_last, PREFIX_SALT);
        let published = found.len / self.options.block_size;
        let cached = tokens[..found.len as usize].to_vec();
        let given = found.len;
        self.texts.insert(found.sequence, Text { cached, pending: None, prefix_len: found.len, published, given });
        found
    }

    /// What [`match_prefix`](Self::match_prefix) would find, without a match.
    #[must_use]
    pub fn probe_prefix(&self, tokens: &[u32]) -> PrefixProbe {
        self.cache.probe_prefix(&tokens[..tokens.len().saturating_sub(1)], PREFIX_SALT)
    }

    /// Empties the prefix index: blocks that only it holds are free again. Returns the number of its entries.
    pub fn forget_prefixes(&mut self) -> u32 {
        self.texts.values_mut().for_each(|text| text.published = 0);
        // An index without entries is the one error.
        self.cache.forget_prefixes(PREFIX_SALT).unwrap_or(0)
    }

    /// Moves a sequence to the host's memory: its blocks are free for others until [`swap_in`](Self::swap_in) brings it back under the same id.
    /// Meanwhile [`tokens`](Self::tokens), [`pending`](Self::pending), [`save`](Self::save) and [`free`](Self::free) work, and other calls
    /// don't know it. Returns its bytes. Submits and reads back.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], also for one that is swapped out already; those of [`KvCache::swap_out`](crate::KvCache::swap_out).
    /// The sequence is as it was then, also if the future is dropped.
    pub async fn swap_out(&mut self, sequence: SequenceId) -> ModelResult<u64> {
        self.cached_text(sequence)?;
        let gpu = self.gpu().clone();
        let mut encoder = gpu.encoder()?;
        let leaving = self.cache.swap_out(&mut encoder, sequence)?;
        gpu.submit("swapping a sequence out", encoder).await?;
        let snapshot = leaving.finish().await?;
        let bytes = snapshot.num_bytes();
        self.swapped.insert(sequence, snapshot);
        Ok(bytes)
    }

    /// Brings a sequence back that [`swap_out`](Self::swap_out) has moved to the host, as it was. Submits.
    ///
    /// # Errors
    /// [`Error::Argument`] for one that is not swapped out; [`Error::UnknownSequence`]; [`Error::OutOfBlocks`]; those of
    /// [`KvCache::swap_in`](crate::KvCache::swap_in). It stays on the host then, also if the future is dropped.
    pub async fn swap_in(&mut self, sequence: SequenceId) -> ModelResult<()> {
        self.text(sequence)?;
        let Some(snapshot) = self.swapped.get(&sequence) else {
            return Err(ModelError::argument("sequence", sequence, "one that is swapped out"));
        };
        let gpu = self.gpu().clone();
        let mut encoder = gpu.encoder()?;
        let arriving = self.cache.swap_in(&mut encoder, snapshot)?;
        gpu.submit("swapping a sequence in", encoder).await?;
        arriving.restore()?;
        self.swapped.remove(&sequence);
        Ok(())
    }

    /// Whether a sequence is on the host.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn is_swapped_out(&self, sequence: SequenceId) -> ModelResult<bool> {
        self.text(sequence)?;
        Ok(self.swapped.contains_key(&sequence))
    }

    /// Writes a sequence into a file: keys, values and tokens, the pending one included. See
    /// [`SequenceSnapshot::save`]. Submits, reads back, and blocks the thread while it writes.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::File`]; those of [`KvCache::record_snapshot`](crate::KvCache::record_snapshot). The file is the
    /// old one then, or none.
    pub async fn save(&self, sequence: SequenceId, path: impl AsRef<Path>) -> ModelResult<()> {
        let text = self.text(sequence)?;
        let tokens: Vec<u32> = text.cached.iter().copied().chain(text.pending).collect();
        if let Some(snapshot) = self.swapped.get(&sequence) {
            return Ok(snapshot.save(path, &tokens)?);
        }
        self.cached_text(sequence)?;
        let gpu = self.gpu();
        let mut encoder = gpu.encoder()?;
        let copies = self.cache.record_snapshot(&mut encoder, sequence)?;
        gpu.submit("saving a sequence", encoder).await?;
        Ok(copies.read().await?.save(path, &tokens)?)
    }

    /// A new sequence with keys, values and tokens of a file that [`save`](Self::save) has written, with the same model and the same cache
    /// formats (which is checked) and the same weights (which can't be). A pending token is pending again. Blocks the thread while it reads;
    /// submits.
    ///
    /// A key format with scales per channel takes those of the file, if nothing has been calibrated yet.
    ///
    /// # Errors
    /// [`ModelError::File`] if the file has no tokens, or such as the model doesn't have; [`Error::File`]; [`Error::Argument`] if it is of
    /// another shape, format or scales; [`Error::OutOfBlocks`]. Nothing has changed then, also if the future is dropped.
    pub async fn load(&mut self, path: impl AsRef<Path>) -> ModelResult<SequenceId> {
        let path = path.as_ref();
        let (snapshot, mut cached) = SequenceSnapshot::load(path)?;
        let config = self.model.config();
        let (len, num_tokens) = (snapshot.len() as usize, cached.len());
        if num_tokens < len {
            return Err(ModelError::file(path, format!("got no tokens, need those of its {len} keys")));
        }
        if let Some(id) = cached.iter().find(|&&id| id >= config.vocab_size) {
            let reason = format!("got token id {id}, need ids below vocab_size, {}", config.vocab_size);
            return Err(ModelError::file(path, reason));
        }
        if len > self.max_len() as usize {
            let reason = format!("got {len} tokens, need at most the model's {} positions", self.max_len());
            return Err(ModelError::file(path, reason));
        }
        self.adopt_key_scales(&snapshot)?;
        let gpu = self.gpu().clone();
        let mut encoder = gpu.encoder()?;
        let arriving = self.cache.swap_in(&mut encoder, &snapshot)?;
        gpu.submit("loading a sequence", encoder).await?;
        let id = arriving.commit()?;
        let pending = cached.get(len).copied();
        cached.truncate(len);
        self.texts.insert(id, Text { cached, pending, ..Text::default() });
        Ok(id)
    }

    /// Gives an uncalibrated cache the scales of a snapshot that fits into it otherwise.
    fn adopt_key_scales(&self, snapshot: &SequenceSnapshot) -> ModelResult<()> {
        let own = *self.cache.config();
        let usage = self.usage();
        let KvCacheConfig { num_blocks, groups, .. } = own;
        let fits = KvCacheConfig { num_blocks, groups, ..*snapshot.config() } == own
            && snapshot.config().num_blocks <= usage.free + usage.reclaimable;
        if fits && (0..own.num_layers).all(|layer| self.cache.key_scales(layer).is_none()) {
            for layer in 0..own.num_layers {
                if let Some(table) = snapshot.key_scales(layer) {
                    self.cache.set_key_scales(layer, table)?;
                }
            }
        }
        Ok(())
    }

    /// Moves used blocks to the front of the pool and returns how many moved; see [`KvCache::defragment`](crate::KvCache::defragment). Submits.
    ///
    /// # Errors
    /// Those of [`KvCache::defragment`](crate::KvCache::defragment). Nothing has changed then, also if the future is dropped.
    pub async fn defragment(&mut self) -> ModelResult<u32> {
        let gpu = self.gpu().clone();
        let mut encoder = gpu.encoder()?;
        let moving = self.cache.defragment(&mut encoder)?;
        gpu.submit("defragmenting the cache", encoder).await?;
        Ok(moving.commit()?)
    }
}

//! How the time of a token grows with its text: without a cache, with caches of every kind, and for prompts in chunks.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use folio::measure::{FilledCache, Spread, Timer, interleave};
use folio::model::{Decoder, DecoderOptions, Input, Model, ModelOptions, Sampling, WeightFormat};
use folio::{AttentionConfig, Gpu, KvCacheConfig, KvFormat, KvFormats, SequenceId};

use super::data::{Crossing, Curve, Time, TimeFigure, TimePoint};
use super::roofline::BLOCK_SIZE;
use super::{Effort, Part, Progress};

/// What is measured of a model and of a layer.
struct Plan {
    /// Texts of the story model, which has 1024 positions.
    contexts: &'static [u32],
    formats: &'static [KvFormat],
    chunks: &'static [u32],
    /// Heads of the layer: of queries, of keys and values, and their elements.
    heads: [u32; 3],
    layer_contexts: &'static [u32],
    /// The longest text of the layer that is computed again for every token, and that is fed in chunks: that takes the square of it.
    most_recomputed: u32,
    contiguous: &'static [KvFormat],
    paged: &'static [KvFormat],
    layer_chunks: &'static [u32],
}

const FULL: Plan = Plan {
    contexts: &[16, 32, 64, 128, 256, 512, 1000],
    formats: &[KvFormat::F32, KvFormat::F16, KvFormat::Int8, KvFormat::Int4],
    chunks: &[16, 64, 256, 512],
    // Llama 2 7B.
    heads: [32, 32, 128],
    layer_contexts: &[64, 128, 256, 512, 1024, 2048, 4096],
    most_recomputed: 1024,
    contiguous: &[KvFormat::F32, KvFormat::F16],
    paged: &[KvFormat::F16, KvFormat::Int8, KvFormat::Int4],
    layer_chunks: &[16, 64, 256, 1024],
};
const QUICK: Plan = Plan {
    contexts: &[32, 128, 512],
    formats: &[KvFormat::F16, KvFormat::Int8],
    chunks: &[64, 256],
    // The story model's: compiled in a moment.
    heads: [4, 2, 32],
    layer_contexts: &[128, 512, 2048],
    most_recomputed: 512,
    contiguous: &[KvFormat::F16],
    paged: &[KvFormat::F16, KvFormat::Int8],
    layer_chunks: &[64, 256],
};

/// The story model.
pub(super) fn load(gpu: &Gpu) -> Result<Arc<Model>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    Ok(Arc::new(Model::load_blocking(gpu, folder, ModelOptions::new(WeightFormat::F16), |_| ())?))
}

pub(super) fn measure(timer: &Timer, stories: &Arc<Model>, effort: Effort, progress: &Progress) -> Result<Time> {
    let plan = if effort.quick { &QUICK } else { &FULL };
    let part = progress.part(plan.contexts.len() * 2 + plan.layer_contexts.len() * 2);
    let model = model(stories, plan, effort, &part)?;
    let layer = layer(timer, plan, effort, &part)?;
    Ok(Time { model, layer })
}

/// Curves of the same contexts, in the making.
struct Curves(Vec<Curve>);

impl Curves {
    fn new(names: impl IntoIterator<Item = (String, &'static str)>) -> Self {
        Self(names.into_iter().map(|(name, kind)| Curve { name, kind, points: Vec::new() }).collect())
    }

    fn push(&mut self, i: usize, context: u32, seconds: Spread) {
        if let Some(curve) = self.0.get_mut(i) {
            curve.points.push(TimePoint { context, seconds });
        }
    }

    fn figure(self, what: String) -> TimeFigure {
        let crossings = crossings(&self.0);
        TimeFigure { what, curves: self.0, crossings }
    }
}

fn paged_name(format: KvFormat) -> String {
    format!("paged {format}")
}

/// Rounds of whole prompts of a layer, in many small chunks.
const FEW_ROUNDS: usize = 5;

const RECOMPUTE: &str = "no cache (all again)";

/// The story model in caches of every format. Steps by the host's clock, sampling and readback included.
fn model(model: &Arc<Model>, plan: &Plan, effort: Effort, part: &Part<'_>) -> Result<TimeFigure> {
    let most = plan.contexts.iter().copied().max().unwrap_or(1);
    let mut decoders = Vec::new();
    for &format in plan.formats {
        let mut options = DecoderOptions::default();
        // The text of a decode, and one that is computed anew.
        options.num_blocks = 2 * (most.div_ceil(options.block_size) + 1);
        (options.k_format, options.v_format) = (format, format);
        let decoder = Decoder::new_blocking(Arc::clone(model), options)?;
        decoders.push(Text::new(decoder));
    }
    let names = plan.formats.iter().map(|&format| (paged_name(format), "decode"));
    let chunks = plan.chunks.iter().map(|chunk| (format!("prompt in chunks of {chunk}"), "prefill"));
    let mut curves = Curves::new([(RECOMPUTE.to_owned(), "recompute")].into_iter().chain(names).chain(chunks));
    let vocab = model.config().vocab_size;
    for &context in plan.contexts {
        part.next(format!("time: the story model, texts of {context} tokens"));
        for decoder in &mut decoders {
            decoder.grow(context, vocab)?;
        }
        // In turns: everything again, by the decoder in F16 if there is one, and a token from each cache.
        let again = plan.formats.iter().position(|&format| format == KvFormat::F16).unwrap_or(0);
        let spreads = interleave(1 + decoders.len(), effort.rounds, |i| match i.checked_sub(1) {
            None => decoders[again].prompt(context, context, vocab),
            Some(i) => decoders[i].token(context),
        })?;
        spreads.into_iter().enumerate().for_each(|(i, spread)| curves.push(i, context, spread));
        part.next(format!("time: the story model, prompts of {context} tokens"));
        let sizes: Vec<_> = plan.chunks.iter().copied().filter(|&chunk| chunk <= context).collect();
        let spreads = interleave(sizes.len(), effort.rounds, |i| decoders[again].prompt(context, sizes[i], vocab))?;
        for (i, spread) in spreads.into_iter().enumerate() {
            curves.push(1 + decoders.len() + i, context, spread.scaled(1.0 / f64::from(context)));
        }
    }
    let what = format!(
        "The story model ({} layers, {} query heads over {} KV heads of {}, weights in F16), one sequence: whole steps by the host's clock, with sampling and readback.",
        model.config().num_layers,
        model.config().num_q_heads,
        model.config().num_kv_heads,
        model.config().head_dim
    );
    Ok(curves.figure(what))
}

/// A decoder with one text.
struct Text {
    decoder: Decoder,
    sequence: SequenceId,
}

/// Any tokens do: the same ones in every run.
fn tokens(count: u32, vocab: u32) -> Vec<u32> {
    (0..count).map(|i| 2 + i * 7 % (vocab - 2).max(1)).collect()
}

impl Text {
    fn new(mut decoder: Decoder) -> Self {
        let sequence = decoder.create_sequence();
        Self { decoder, sequence }
    }

    fn step(&mut self, input: Input<'_>) -> Result<()> {
        let gpu = self.decoder.gpu().clone();
        gpu.block_on(self.decoder.step(&[input]))?;
        Ok(())
    }

    /// Appends tokens until the text has so many.
    fn grow(&mut self, len: u32, vocab: u32) -> Result<()> {
        let have = self.decoder.tokens(self.sequence)?.len() as u32;
        let tokens = tokens(len.saturating_sub(have), vocab);
        if tokens.is_empty() { Ok(()) } else { self.step(Input::new(self.sequence, &tokens)) }
    }

    /// A token behind the text's last one, which is taken back.
    fn token(&mut self, len: u32) -> Result<Duration> {
        let start = Instant::now();
        self.step(Input::new(self.sequence, &[2]).with_sampling(&Sampling::greedy()))?;
        let time = start.elapsed();
        self.decoder.truncate(self.sequence, len)?;
        Ok(time)
    }

    /// A text of its own, in chunks, and the token after it.
    fn prompt(&mut self, len: u32, chunk: u32, vocab: u32) -> Result<Duration> {
        let sequence = self.decoder.create_sequence();
        let tokens = tokens(len, vocab);
        let start = Instant::now();
        let greedy = Sampling::greedy();
        let chunks = tokens.chunks(chunk as usize);
        let last = chunks.len().saturating_sub(1);
        for (i, chunk) in chunks.enumerate() {
            let input = Input::new(sequence, chunk);
            self.step(if i == last { input.with_sampling(&greedy) } else { input })?;
        }
        let time = start.elapsed();
        self.decoder.free(sequence)?;
        Ok(time)
    }
}

/// One layer's append and attention in caches of every kind.
fn layer(timer: &Timer, plan: &Plan, effort: Effort, part: &Part<'_>) -> Result<TimeFigure> {
    let [num_q_heads, num_kv_heads, head_dim] = plan.heads;
    let most = plan.layer_contexts.iter().copied().max().unwrap_or(1);
    let attention = AttentionConfig::new(num_q_heads);
    let filled = |config: KvCacheConfig, format: KvFormat| {
        FilledCache::new(timer.gpu(), config.with_formats(format, format), attention.clone(), 1)
    };
    let contiguous = KvCacheConfig::contiguous(1, num_kv_heads, head_dim, 1, most);
    let paged = KvCacheConfig::new(1, num_kv_heads, head_dim).with_blocks(most.div_ceil(BLOCK_SIZE), BLOCK_SIZE);
    let mut names = vec![(RECOMPUTE.to_owned(), "recompute")];
    let mut caches = Vec::new();
    for (kind, config, formats) in [("contiguous", contiguous, plan.contiguous), ("paged", paged, plan.paged)] {
        for &format in formats {
            part.next(format!("time: compiling the layer, {kind} {format}"));
            names.push((format!("{kind} {}", KvFormats::both(format)), "decode"));
            caches.push(filled(config, format)?);
        }
    }
    names.extend(plan.layer_chunks.iter().map(|chunk| (format!("prompt in chunks of {chunk}"), "prefill")));
    let mut curves = Curves::new(names);
    let mut prompts = filled(paged, KvFormat::F16)?;
    for &context in plan.layer_contexts {
        part.next(format!("time: a layer, texts of {context} tokens"));
        let mut calls = Vec::new();
        for cache in &mut caches {
            cache.fill(context - 1)?;
            calls.push(cache.call(1)?);
        }
        let recomputes = context <= plan.most_recomputed;
        let again = if recomputes { Some(prompts.call(context)?) } else { None };
        let all: Vec<_> = again.iter().chain(&calls).collect();
        let spreads = interleave(all.len(), effort.rounds, |i| {
            let both = timer.measure(|pass| {
                all[i].record_append(pass)?;
                all[i].record(pass)
            });
            both.map(|sample| sample.time())
        })?;
        let first = usize::from(!recomputes);
        spreads.into_iter().enumerate().for_each(|(i, spread)| curves.push(first + i, context, spread));
        drop(calls);
        drop(again);
        if !recomputes {
            continue;
        }
        part.next(format!("time: a layer, prompts of {context} tokens"));
        let sizes: Vec<_> = plan.layer_chunks.iter().copied().filter(|&chunk| chunk <= context).collect();
        let spreads = interleave(sizes.len(), FEW_ROUNDS, |i| prompt(timer, &mut prompts, context, sizes[i]))?;
        for (i, spread) in spreads.into_iter().enumerate() {
            curves.push(1 + caches.len() + i, context, spread.scaled(1.0 / f64::from(context)));
        }
    }
    let what = format!(
        "One layer's append and attention, {num_q_heads} query heads over {num_kv_heads} KV heads of {head_dim}, one sequence, by {}{}. Without a cache and in \
         chunks up to {} tokens.",
        timer.clock(),
        if plan.heads == FULL.heads {
            " (the heads of Llama 2 7B, which has 32 such layers, and other work in them)"
        } else {
            ""
        },
        plan.most_recomputed
    );
    Ok(curves.figure(what))
}

/// A text from its first token on, in chunks. Its time is that of the passes.
fn prompt(timer: &Timer, cache: &mut FilledCache, len: u32, chunk: u32) -> folio::Result<Duration> {
    cache.empty()?;
    let mut time = Duration::ZERO;
    let mut have = 0;
    while have < len {
        let tokens = chunk.min(len - have);
        let call = cache.call(tokens)?;
        let sample = timer.measure(|pass| {
            call.record_append(pass)?;
            call.record(pass)
        })?;
        time += sample.time();
        call.commit()?;
        have += tokens;
    }
    cache.empty()?;
    Ok(time)
}

/// Where caches are faster than none, and formats than others.
fn crossings(curves: &[Curve]) -> Vec<Crossing> {
    let find = |name: &str| curves.iter().find(|curve| curve.name == name);
    let mut pairs: Vec<(&Curve, &Curve)> = Vec::new();
    if let Some(recompute) = find(RECOMPUTE) {
        pairs.extend(curves.iter().filter(|curve| curve.kind == "decode").map(|cached| (cached, recompute)));
    }
    for (faster, slower) in [
        ("paged Int8", "paged F16"),
        ("paged Int4", "paged F16"),
        ("paged F16", "paged F32"),
        ("paged F16", "contiguous F16"),
        ("paged F16", "contiguous F32"),
    ] {
        pairs.extend(find(faster).zip(find(slower)));
    }
    pairs.into_iter().filter_map(|(faster, slower)| crossing(faster, slower)).collect()
}

/// From where on the one is below the other, up to the longest context that both have: on straight lines between points.
fn crossing(faster: &Curve, slower: &Curve) -> Option<Crossing> {
    let common: Vec<(f64, f64)> = faster
        .points
        .iter()
        .filter_map(|own| {
            let other = slower.points.iter().find(|other| other.context == own.context)?;
            Some((f64::from(own.context), own.seconds.median - other.seconds.median))
        })
        .collect();
    let &(end, last) = common.last()?;
    let at_end = |curve: &Curve| {
        curve.points.iter().find(|point| f64::from(point.context) == end).map(|point| point.seconds.median)
    };
    let (kind, context) = match common.iter().rposition(|&(_, difference)| difference >= 0.0) {
        None => ("always", None),
        Some(_) if last >= 0.0 => ("never", None),
        Some(i) => {
            let ((x, above), (next, below)) = (common[i], common[i + 1]);
            ("from", Some(x + (next - x) * above / (above - below)))
        }
    };
    let ratio_at_end = at_end(slower)? / at_end(faster)?;
    Some(Crossing { faster: faster.name.clone(), slower: slower.name.clone(), kind, context, ratio_at_end })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    fn curve(name: &str, points: &[(u32, f64)]) -> Curve {
        let points = points.iter().map(|&(context, seconds)| TimePoint { context, seconds: Spread::of([seconds]) });
        Curve { name: name.to_owned(), kind: "decode", points: points.collect() }
    }

    #[test]
    fn crossings_lie_between_the_points_around_them() {
        let flat = curve("flat", &[(10, 3.0), (20, 3.0), (40, 3.0), (80, 3.0)]);
        // Above at 10, equal at 15, and no longer measured at 80.
        let steep = curve("steep", &[(10, 2.0), (20, 4.0), (40, 9.0)]);
        let found = crossing(&flat, &steep).unwrap();
        assert_eq!((found.kind, found.context, found.ratio_at_end), ("from", Some(15.0), 3.0));
        assert_eq!(crossing(&steep, &flat).unwrap().kind, "never");
        assert_eq!(crossing(&curve("low", &[(10, 1.0), (20, 1.0)]), &flat).unwrap().kind, "always");
        assert!(crossing(&curve("elsewhere", &[(11, 1.0)]), &flat).is_none());
    }
}

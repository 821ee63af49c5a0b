//! [`Case`]: one point of the grid.

use super::rows::Rows;
use crate::format::{KvFormat, KvFormats};
use crate::kernel::Kernel;
use crate::plan::AttentionConfig;

/// (context, new tokens) of the sequences of a step of single tokens: lengths around the ends of blocks and tiles, and one that is split.
const DECODE: [(u32, u32); 5] = [(0, 1), (15, 1), (16, 1), (130, 1), (900, 1)];
/// The same of prompts and of chunks of them.
const PREFILL: [(u32, u32); 4] = [(0, 19), (17, 33), (150, 5), (300, 41)];

/// What a case adds to causal attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extra {
    None,
    /// All keys of a sequence are seen.
    Everything,
    Window,
    /// The first tokens are seen besides the window.
    SinkTokens,
    SoftCap,
    Alibi,
    Sinks,
    Mask,
    /// A window, a soft cap, ALiBi, sinks and a mask.
    All,
    /// Queries as large as make one key win.
    LargeLogits,
}

impl Extra {
    const ALL: [(Self, &str); 9] = [
        (Self::Everything, "everything"),
        (Self::Window, "window"),
        (Self::SinkTokens, "sink tokens"),
        (Self::SoftCap, "soft cap"),
        (Self::Alibi, "alibi"),
        (Self::Sinks, "sinks"),
        (Self::Mask, "mask"),
        (Self::All, "all options"),
        (Self::LargeLogits, "large logits"),
    ];
}

/// One point of the grid: a small step of attention, all of whose numbers follow from the case.
#[derive(Clone, Debug)]
pub struct Case {
    id: String,
    kernel: Kernel,
    pub(super) num_q_heads: u32,
    pub(super) num_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) value_dim: u32,
    /// Values are the first elements of keys.
    pub(super) latent: bool,
    pub(super) block_size: u32,
    pub(super) formats: KvFormats,
    extra: Extra,
}

impl Case {
    /// All cases, in an order that stays: some sixty.
    #[must_use]
    pub fn grid() -> Vec<Self> {
        let mut cases = Vec::new();
        for kernel in [Kernel::Decode, Kernel::Prefill] {
            let base = |formats| Self {
                id: String::new(),
                kernel,
                num_q_heads: 8,
                num_kv_heads: 2,
                head_dim: 64,
                value_dim: 64,
                latent: false,
                block_size: 16,
                formats,
                extra: Extra::None,
            };
            let [f32, f16] = [KvFormat::F32, KvFormat::F16].map(KvFormats::both);
            cases.extend(KvFormats::ALL.map(base));
            // Heads that fill no vector, and the largest.
            cases.extend([40, 128, 256].map(|head_dim| Self { head_dim, value_dim: head_dim, ..base(f16) }));
            cases.extend([1, 3, 8, 16].map(|group| Self { num_q_heads: 2 * group, ..base(f16) }));
            cases.extend([1, 256].map(|block_size| Self { block_size, ..base(f32) }));
            cases.extend(Extra::ALL.map(|(extra, _)| Self { extra, ..base(f32) }));
            cases.push(Self { extra: Extra::All, ..base(KvFormats::both(KvFormat::Int8)) });
            cases.push(Self { head_dim: 192, value_dim: 128, ..base(f16) });
            let latent = Self { num_kv_heads: 1, head_dim: 576, value_dim: 512, latent: true, ..base(f16) };
            cases.push(latent);
        }
        cases.iter_mut().for_each(|case| case.id = case.describe());
        cases
    }

    /// Names the case, in every report alike.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    fn describe(&self) -> String {
        let kernel = if self.kernel == Kernel::Decode { "decode" } else { "prefill" };
        let dims = if self.value_dim == self.head_dim { String::new() } else { format!(":{}", self.value_dim) };
        let latent = if self.latent { " latent" } else { "" };
        let extra = Extra::ALL.iter().find(|(extra, _)| *extra == self.extra);
        let extra = extra.map_or_else(String::new, |(_, name)| format!(", {name}"));
        format!(
            "{kernel} {}, d {}{dims}{latent}, {}/{} heads, blocks of {}{extra}",
            self.formats, self.head_dim, self.num_q_heads, self.num_kv_heads, self.block_size
        )
    }

    /// (context, new tokens) of each sequence.
    pub(super) fn lens(&self) -> &'static [(u32, u32)] {
        if self.kernel == Kernel::Decode { &DECODE } else { &PREFILL }
    }

    pub(super) fn has_mask(&self) -> bool {
        matches!(self.extra, Extra::Mask | Extra::All)
    }

    /// Factor of the queries. With 60, logits reach some hundreds.
    pub(super) fn q_scale(&self) -> f32 {
        if self.extra == Extra::LargeLogits { 60.0 } else { 1.0 }
    }

    /// What attention computes: always with lse, so that it is checked, too.
    pub(super) fn attention(&self) -> AttentionConfig {
        let mut config = AttentionConfig::new(self.num_q_heads);
        let has = |extra| self.extra == extra || self.extra == Extra::All;
        let heads = 0..self.num_q_heads;
        config.lse = true;
        config.causal = self.extra != Extra::Everything;
        config.window = (has(Extra::Window) || self.extra == Extra::SinkTokens).then_some(37);
        config.sink_tokens = if self.extra == Extra::SinkTokens { 5 } else { 0 };
        config.softcap = has(Extra::SoftCap).then_some(2.0);
        // The slopes of the paper (Press et al. 2022) for this many heads.
        let slope = |head| 2.0_f32.powf(-8.0 * (head + 1) as f32 / self.num_q_heads as f32);
        config.alibi_slopes = has(Extra::Alibi).then(|| heads.clone().map(slope).collect());
        config.sinks = has(Extra::Sinks).then(|| heads.map(|head| head as f32 * 0.5 - 2.0).collect());
        config.custom_mask = self.has_mask();
        config
    }

    /// The rows of all sequences. The same on every machine: they are made of integers and products that are exact.
    pub(super) fn rows(&self) -> Vec<Rows> {
        (1..).zip(self.lens()).map(|(seed, &lens)| Rows::new(self, seed, lens)).collect()
    }
}

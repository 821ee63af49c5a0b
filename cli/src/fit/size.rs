//! Sizes of a model and of its cache, and what fits into a given memory.

use std::fmt;

use anyhow::{Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use folio::model::{DecoderOptions, ModelConfig};
use folio::{Gpu, KvCache, KvCacheConfig, KvFormats};
use indicatif::BinaryBytes;
use serde::Serialize;

use super::Options;

/// Everything that `folio fit` says of a model. All sizes are in bytes.
#[derive(Debug, Serialize)]
pub(super) struct Fit {
    /// Of this structure.
    version: u32,
    model: String,
    architecture: &'static str,
    parameters: u64,
    layers: u32,
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    /// One row per token and layer is key and value.
    latent: bool,
    /// What layers keep of a text in the cache.
    keeps: Vec<Keeps>,
    max_positions: u32,
    context: u32,
    block_size: u32,
    memory: Option<u64>,
    weights: Vec<Weights>,
    caches: Vec<Cache>,
    fits: Vec<Fitting>,
    adapter: Option<Adapter>,
}

/// Layers that keep the same.
#[derive(Debug, Serialize)]
pub(super) struct Keeps {
    layers: u32,
    /// Their newest tokens; `None`: all.
    window: Option<u32>,
}

impl Keeps {
    /// Of all layers of a model with such a cache.
    pub(super) fn of(config: &ModelConfig, cache: &KvCacheConfig) -> Vec<Self> {
        if let [group] = cache.groups.as_slice() {
            return vec![Self { layers: config.num_layers, window: group.window }];
        }
        let mut all: Vec<Self> = Vec::new();
        for layer in 0..config.num_layers {
            let window = config.layers.kind(layer).window.filter(|&window| window < config.max_positions);
            match all.iter_mut().find(|keeps| keeps.window == window) {
                Some(keeps) => keeps.layers += 1,
                None => all.push(Self { layers: 1, window }),
            }
        }
        all
    }
}

impl fmt::Display for Keeps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.window {
            Some(window) => write!(f, "{} layers keep the newest {window}", self.layers),
            None => write!(f, "{} layers keep all", self.layers),
        }
    }
}

/// Weights in one format.
#[derive(Debug, Serialize)]
struct Weights {
    format: String,
    bytes: u64,
}

/// The cache in one format.
#[derive(Debug, Serialize)]
struct Cache {
    format: String,
    bytes_per_token: u64,
    bytes_per_block: u64,
    /// A text of `context` tokens.
    bytes_of_context: u64,
}

/// Weights in one format with a cache in another, within the memory.
#[derive(Debug, Serialize)]
struct Fitting {
    weights: String,
    cache: String,
    /// The longest text, in tokens; 0 if none fits.
    longest: u32,
    /// Texts of `context` tokens at once.
    sequences: u64,
}

/// What an adapter makes of it.
#[derive(Debug, Serialize)]
struct Adapter {
    name: String,
    /// Largest storage binding.
    binding: u64,
    /// Tokens of the largest pool that it can bind, in each format of the cache.
    most_tokens: Vec<u64>,
}

/// The pool that holds exactly one text.
pub(super) fn cache_of(options: DecoderOptions, config: &ModelConfig, tokens: u32) -> KvCacheConfig {
    let mut cache = options.cache_config(config);
    cache.num_blocks = cache.most_blocks(tokens, options.max_step_tokens).max(1);
    cache
}

/// A decoder's cache in this format.
pub(super) fn decoder_options(formats: KvFormats, block_size: u32) -> DecoderOptions {
    let mut options = DecoderOptions::default();
    (options.k_format, options.v_format, options.block_size) = (formats.k, formats.v, block_size);
    options
}

/// Whether a model can keep its cache so: latents are keys and values in one.
fn keeps(config: &ModelConfig, formats: KvFormats) -> bool {
    decoder_options(formats, 16).cache_config(config).validate().is_ok()
}

/// The longest text whose cache takes at most `bytes`, up to `most` tokens: more tokens never take less.
fn longest(options: DecoderOptions, config: &ModelConfig, bytes: u64, most: u32) -> u32 {
    let (mut fits, mut beyond) = (0, u64::from(most) + 1);
    while u64::from(fits) + 1 < beyond {
        let middle = u64::from(fits).midpoint(beyond);
        if cache_of(options, config, middle as u32).pool_bytes() <= bytes {
            fits = middle as u32;
        } else {
            beyond = middle;
        }
    }
    fits
}

impl Fit {
    pub(super) fn new(
        name: &str,
        config: &ModelConfig,
        context: u32,
        options: &Options,
        gpu: Option<&Gpu>,
    ) -> Result<Self> {
        let of = |format| config.size(format).map(|size| (size.matrix_bytes + size.vector_bytes, size.num_parameters));
        let weights =
            options.weights.iter().map(|&format| of(format)).collect::<folio::model::ModelResult<Vec<_>>>()?;
        let formats: Vec<_> = options.cache.iter().copied().filter(|&formats| keeps(config, formats)).collect();
        ensure!(
            !formats.is_empty(),
            "cache: got formats that {name} can't have (keys with scales per channel, or keys and values apart where they are one)"
        );
        let decoders: Vec<_> = formats.iter().map(|&formats| decoder_options(formats, options.block_size)).collect();
        let shape = decoders[0].cache_config(config);
        let memory = options.memory.map(|memory| memory.as_u64());
        let mut fits = Vec::new();
        for (format, &(bytes, _)) in options.weights.iter().zip(&weights) {
            let Some(left) = memory.map(|memory| memory.checked_sub(bytes)) else { break };
            for (formats, decoder) in formats.iter().zip(&decoders) {
                let left = left.unwrap_or(0);
                fits.push(Fitting {
                    weights: format.to_string(),
                    cache: formats.to_string(),
                    longest: longest(*decoder, config, left, config.max_positions),
                    sequences: left / cache_of(*decoder, config, context).pool_bytes().max(1),
                });
            }
        }
        let caches = formats.iter().zip(&decoders).map(|(formats, decoder)| {
            let cache = decoder.cache_config(config);
            Cache {
                format: formats.to_string(),
                bytes_per_token: cache.token_bytes(),
                bytes_per_block: cache.block_bytes(),
                bytes_of_context: cache_of(*decoder, config, context).pool_bytes(),
            }
        });
        Ok(Self {
            version: 2,
            model: name.to_owned(),
            architecture: config.architecture()?.model_type(),
            parameters: weights.first().map_or(0, |&(_, parameters)| parameters),
            layers: config.num_layers,
            q_heads: config.num_q_heads,
            kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
            latent: shape.latent,
            keeps: Keeps::of(config, &shape),
            max_positions: config.max_positions,
            context,
            block_size: options.block_size,
            memory,
            weights: options
                .weights
                .iter()
                .zip(&weights)
                .map(|(format, &(bytes, _))| Weights { format: format.to_string(), bytes })
                .collect(),
            caches: caches.collect(),
            fits,
            adapter: gpu.map(|gpu| Adapter::new(gpu, config, &decoders)),
        })
    }
}

impl Adapter {
    fn new(gpu: &Gpu, config: &ModelConfig, decoders: &[DecoderOptions]) -> Self {
        let info = gpu.adapter_info();
        let binding = gpu.limits().max_storage_buffer_binding_size;
        let most_tokens = decoders.iter().map(|decoder| {
            let cache = decoder.cache_config(config);
            let blocks = KvCache::largest_pool(gpu, &cache);
            // A token has a slot in each group of layers.
            u64::from(blocks / cache.groups.count()) * u64::from(cache.block_size)
        });
        Self { name: format!("{} ({:?})", info.name, info.backend), binding, most_tokens: most_tokens.collect() }
    }
}

/// A table of text with numbers to the right.
fn table(header: impl IntoIterator<Item = String>, rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header).add_rows(rows);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |bytes: u64| BinaryBytes(bytes).to_string();
        writeln!(
            f,
            "{} ({}): {:.2} billion parameters, {} layers, {} query heads over {} KV heads of {}{}",
            self.model,
            self.architecture,
            self.parameters as f64 / 1e9,
            self.layers,
            self.q_heads,
            self.kv_heads,
            self.head_dim,
            if self.latent { ", latents" } else { "" },
        )?;
        let keeps: Vec<_> = self.keeps.iter().map(Keeps::to_string).collect();
        writeln!(f, "texts of up to {} tokens, of which {}\n", self.max_positions, keeps.join(" and "))?;
        let rows = self.weights.iter().map(|weights| vec![weights.format.clone(), bytes(weights.bytes)]);
        writeln!(f, "{}\n", table(["weights", "bytes"].map(str::to_owned), rows))?;
        let header = ["cache".to_owned(), "of a token".to_owned(), format!("of {} tokens", self.context)];
        let rows = self
            .caches
            .iter()
            .map(|cache| vec![cache.format.clone(), bytes(cache.bytes_per_token), bytes(cache.bytes_of_context)]);
        writeln!(f, "{}", table(header, rows))?;
        if let Some(memory) = self.memory {
            let longest = "longest text".to_owned();
            let header =
                ["in ".to_owned() + &bytes(memory), "cache".to_owned(), longest, format!("texts of {}", self.context)];
            let rows = self.fits.iter().map(|fit| {
                let longest = if fit.longest == 0 { "does not fit".to_owned() } else { fit.longest.to_string() };
                vec![fit.weights.clone(), fit.cache.clone(), longest, fit.sequences.to_string()]
            });
            writeln!(f, "\n{}", table(header, rows))?;
        }
        if let Some(adapter) = &self.adapter {
            writeln!(f, "\n{}: bindings of {}", adapter.name, bytes(adapter.binding))?;
            let rows = self.caches.iter().zip(&adapter.most_tokens);
            let rows = rows.map(|(cache, tokens)| vec![cache.format.clone(), tokens.to_string()]);
            writeln!(f, "{}", table(["cache", "tokens of the largest pool"].map(str::to_owned), rows))?;
        }
        Ok(())
    }
}

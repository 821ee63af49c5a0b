//! Options that every command has which loads a model, and the loading.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use folio::kernel::tuning::Tuning;
use folio::model::{
    Decoder, DecoderOptions, GgufMetadata, Model, ModelConfig, ModelOptions, Progress, Tokenizer, WeightFormat,
};
use folio::{Gpu, GpuOptions, KvFormat, KvFormats};
use indicatif::{ProgressBar, ProgressStyle};

use crate::files::read_text;
use crate::template::ChatTemplate;

/// Which model, and how it is kept.
#[derive(Clone, clap::Args)]
pub(crate) struct LoadOptions {
    /// Folder with config.json, tokenizer.json and safetensors, or a .gguf file, of several the first [default: the story model of this repository]
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,
    /// Leave the model's chat template out: text goes in as it is
    #[arg(long)]
    pub(crate) raw: bool,

    #[arg(long, default_value = "f16", value_name = "FORMAT", help_heading = "Cache", help = cache_help())]
    pub(crate) cache: KvFormats,
    /// Tokens per block
    #[arg(long, default_value_t = 16, help_heading = "Cache", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256), allow_negative_numbers = true)]
    pub(crate) block_size: u32,
    /// Blocks of the pool [default: room for the model's positions, once per sequence, at most 512 MiB]
    #[arg(long, help_heading = "Cache", value_name = "N", value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    pub(crate) blocks: Option<u32>,

    /// How the weights of the linear layers are stored: f32, f16, int8 or int4
    #[arg(long, default_value = "f16", value_name = "FORMAT", help_heading = "Device")]
    pub(crate) weights: WeightFormat,
    /// The same bits whatever else is in a batch, for some of the speed
    #[arg(long, help_heading = "Device")]
    pub(crate) exact: bool,
    /// Read texts beyond the length that a model with LongRoPE (Phi-3) was first trained on
    #[arg(long, help_heading = "Cache")]
    pub(crate) long_context: bool,
    /// Part of an adapter's name [default: the best adapter]
    #[arg(long, help_heading = "Device", value_name = "NAME", env = "FOLIO_ADAPTER")]
    pub(crate) adapter: Option<String>,
    /// Kernel sizes for this adapter, as the example `tune` writes them
    #[arg(long, help_heading = "Device", value_name = "FILE")]
    pub(crate) tuning: Option<PathBuf>,

    /// What a key format with scales per channel is calibrated on: the model's own text after this.
    #[arg(skip)]
    pub(crate) opening: Option<String>,
}

fn cache_help() -> String {
    let names: Vec<_> = KvFormat::ALL.iter().map(|format| format.to_string().to_ascii_lowercase()).collect();
    format!(
        "How keys and values are stored: {}; or both apart, as in int8:int4. Formats with -channel are for keys",
        names.join(", ")
    )
}

impl LoadOptions {
    /// Whether it is the model of this repository, which has forms of its own.
    pub(crate) const fn is_stories(&self) -> bool {
        self.model.is_none()
    }

    /// A decoder with room for as many sequences of full length.
    pub(crate) fn decoder(&self, model: &ModelConfig, sequences: u32) -> DecoderOptions {
        const MAX_BYTES: u64 = 512 << 20;
        let mut options = DecoderOptions::default();
        options.block_size = self.block_size;
        options.k_format = self.cache.k;
        options.v_format = self.cache.v;
        let per_sequence = model.max_positions.div_ceil(self.block_size) + 1;
        // A block of all layers has one for each group of them.
        let cache = options.cache_config(model);
        let affordable = MAX_BYTES / cache.block_bytes().saturating_mul(cache.groups.count().into()).max(1);
        let affordable = affordable.clamp(1, u64::from(u32::MAX)) as u32;
        options.num_blocks = self.blocks.unwrap_or(per_sequence.saturating_mul(sequences).min(affordable));
        options
    }
}

/// A model that is ready to be run.
pub(crate) struct Loaded {
    pub(crate) gpu: Gpu,
    pub(crate) decoder: Decoder,
    pub(crate) tokenizer: Tokenizer,
    /// How it wants conversations; `None` if it says nothing, or isn't asked.
    pub(crate) template: Option<ChatTemplate>,
    /// `stories`, or that of the model's folder or file.
    pub(crate) name: String,
    /// Tokens that end an answer.
    pub(crate) stop_tokens: Vec<u32>,
}

/// Loads a model and compiles its kernels. The cache has room for `sequences` of full length unless the options say otherwise; `adjust` has the
/// last word. Shows on stderr how far it is.
pub(crate) fn load(options: &LoadOptions, sequences: u32, adjust: impl FnOnce(&mut DecoderOptions)) -> Result<Loaded> {
    let mut gpu_options = GpuOptions::default();
    gpu_options.adapter_name.clone_from(&options.adapter);
    let mut gpu = Gpu::open_blocking(gpu_options)?;
    if let Some(file) = &options.tuning {
        gpu = tuned(&gpu, file)?;
    }
    let stories = || Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories");
    let path = options.model.clone().unwrap_or_else(stories);
    let is_gguf = GgufMetadata::is_path(&path);
    let tokenizer = Tokenizer::from_file(if is_gguf { path.clone() } else { path.join("tokenizer.json") })?;
    let template = if options.raw {
        None
    } else if is_gguf {
        ChatTemplate::from_gguf(&path)?
    } else {
        ChatTemplate::from_folder(&path)?
    };
    let start = Instant::now();
    let model_options =
        ModelOptions::new(options.weights).with_exact(options.exact).with_long_context(options.long_context);
    let model = Model::load_blocking(&gpu, &path, model_options, loading_bar())?;
    let load_time = start.elapsed();
    tokenizer.check_vocab_size(model.config().vocab_size)?;
    let mut stop_tokens = model.config().eos_token_ids.clone();
    // Models that were made for chats from others often say it here only.
    let eos = template.as_ref().and_then(ChatTemplate::eos_token).and_then(|token| tokenizer.token_to_id(token));
    stop_tokens.extend(eos.filter(|token| !stop_tokens.contains(token)));

    let start = Instant::now();
    let busy = busy("compiling kernels...");
    let model = Arc::new(model);
    let mut decoder_options = options.decoder(model.config(), sequences);
    adjust(&mut decoder_options);
    let mut decoder = Decoder::new_blocking(Arc::clone(&model), decoder_options)?;
    if options.cache.k.has_channel_scales() {
        let opening = options.opening.as_deref().unwrap_or("Once upon a time");
        let opening = tokenizer.encode(opening, true)?;
        gpu.block_on(decoder.calibrate_keys_on_own_text(&[&opening], 200))?;
    }
    gpu.block_on(decoder.warm_up_with(|at| {
        busy.0.set_message(format!("compiling kernels... {} of {} stages", at.stages_done, at.stages_total));
    }))?;
    drop(busy);
    let name = if options.is_stories() { "stories".to_owned() } else { name_of(&path) };
    eprintln!(
        "{name}: {:.1} MB of weights in {:.1} s, {} kernels compiled in {:.1} s",
        model.weight_bytes() as f64 / 1e6,
        load_time.as_secs_f64(),
        gpu.num_compiled(),
        start.elapsed().as_secs_f64()
    );
    Ok(Loaded { gpu, decoder, tokenizer, template, name, stop_tokens })
}

/// The folder's own name, also where it is given as `.` or by a link; that of a `.gguf` file without its end.
fn name_of(model: &Path) -> String {
    let last = |path: &Path| {
        let name = if GgufMetadata::is_path(path) { path.file_stem() } else { path.file_name() };
        name.map(|name| name.to_string_lossy().into_owned())
    };
    last(model).or_else(|| last(&model.canonicalize().ok()?)).unwrap_or_else(|| "model".to_owned())
}

/// The same device with the kernel sizes of a file.
pub(crate) fn tuned(gpu: &Gpu, file: &Path) -> Result<Gpu> {
    let text = read_text(file)?;
    let tuned = || -> Result<Gpu> {
        let tuning: Tuning = serde_json::from_str(&text).context("not a tuning")?;
        Ok(gpu.with_tuning(tuning)?)
    };
    tuned().with_context(|| file.display().to_string())
}

/// Goes away when it is dropped.
struct Bar(ProgressBar);

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A bar on stderr that shows how far loading has come, and nothing if stderr is no terminal. It's gone when all is done or the closure is
/// dropped.
fn loading_bar() -> impl FnMut(Progress<'_>) {
    let bar = Bar(ProgressBar::no_length());
    // The template is constant; indicatif's own style is the fallback of one that it can't parse.
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {wide_msg}") {
        bar.0.set_style(style);
    }
    move |progress| {
        // All of it, not only the field.
        let bar = &bar;
        bar.0.set_length(progress.bytes_total);
        bar.0.set_position(progress.bytes_done);
        bar.0.set_message(progress.what.to_owned());
        if progress.bytes_done >= progress.bytes_total {
            bar.0.finish_and_clear();
        }
    }
}

/// Shows that something is under way for which there is no measure. Nothing if stderr is no terminal.
fn busy(what: &'static str) -> Bar {
    let bar = Bar(ProgressBar::new_spinner().with_message(what));
    if io::stderr().is_terminal() {
        bar.0.enable_steady_tick(Duration::from_millis(80));
    }
    bar
}

//! `folio fit`: what of a model fits where.

mod known;
mod size;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use bytesize::ByteSize;
use folio::model::{Checkpoint, GgufMetadata, ModelConfig, WeightFormat};
use folio::{Gpu, GpuOptions, KvFormats};

use crate::stdout::print;
use size::Fit;

/// Say how much memory a model and its cache take, and how long and how many texts fit
///
/// Every size is what folio allocates: weights in its own formats, the cache block by block. Activations come on top, some megabytes.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// A model's folder, its config.json or .gguf file, or a name that --list has
    #[arg(required_unless_present = "list")]
    model: Option<String>,
    /// Say which models are known by name
    #[arg(long)]
    list: bool,
    /// Memory for weights and cache, such as 24GiB
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Tokens of a text [default: as many as the model has positions]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    context: Option<u32>,
    /// How weights are stored: f32, f16, int8, int4
    #[arg(long, value_delimiter = ',', default_value = "f16,int8,int4", value_name = "FORMAT,...")]
    weights: Vec<WeightFormat>,
    /// How keys and values are stored, as for `folio chat`
    #[arg(long, value_delimiter = ',', default_value = "f32,f16,int8,int4", value_name = "FORMAT,...")]
    cache: Vec<KvFormats>,
    /// Tokens per block
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256), allow_negative_numbers = true)]
    block_size: u32,
    /// Read texts beyond the length that a model with LongRoPE (Phi-3) was first trained on
    #[arg(long)]
    long_context: bool,
    /// Also say what of it the adapter at hand can bind; part of a name chooses one
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "")]
    adapter: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> ExitCode {
    let text = if options.list { known::list() } else { fit(options) };
    match text.and_then(|text| print(&text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn fit(options: &Options) -> Result<String> {
    let name = options.model.as_deref().context("need a model")?;
    let mut config = config(name)?;
    if options.long_context {
        config = config.with_long_context()?;
    }
    let context = options.context.unwrap_or(config.max_positions);
    ensure!(
        context <= config.max_positions,
        "context: got {context}, need at most the {} positions of {name}",
        config.max_positions
    );
    let gpu = options.adapter.as_deref().map(open).transpose()?;
    let fit = Fit::new(name, &config, context, options, gpu.as_ref())?;
    if options.json { Ok(serde_json::to_string_pretty(&fit)? + "\n") } else { Ok(fit.to_string()) }
}

/// A model's settings: from a folder or a file if there is one of this name, otherwise from the table.
fn config(name: &str) -> Result<ModelConfig> {
    let path = Path::new(name);
    if GgufMetadata::is_path(path) {
        return Ok(Checkpoint::open(path)?.config().clone());
    }
    if path.is_dir() {
        return Ok(ModelConfig::from_dir(path)?);
    }
    if path.is_file() {
        let text = crate::files::read_text(path)?;
        return ModelConfig::from_json(&text).with_context(|| name.to_owned());
    }
    match known::find(name)? {
        Some(model) => Ok(ModelConfig::from_json(model.config.get())?),
        None => bail!("{name}: neither a file nor a known model; `folio fit --list` has the names"),
    }
}

fn open(name: &str) -> Result<Gpu> {
    let mut options = GpuOptions::default();
    options.adapter_name = Some(name.to_owned()).filter(|name| !name.is_empty());
    Ok(Gpu::open_blocking(options)?)
}

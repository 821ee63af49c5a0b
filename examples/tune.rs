//! Races kernel sizes on an adapter and writes what won, as JSON: `cargo run --release --features tune --example tune -- --head-dim 128`.
//!
//! With the feature `model`, `--model DIR` takes the shapes of a checkpoint: its attention, and its linear layers, too.
#![allow(clippy::print_stdout, reason = "an example prints what it found")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use folio::kernel::tuning::Tuning;
use folio::tune::{TuneEvent, TuneShape};
use folio::{Gpu, GpuOptions, KvCacheConfig, KvFormats};

/// Races kernel sizes on an adapter and writes what won
#[derive(Parser)]
struct Args {
    /// Elements of a head
    #[arg(long, default_value_t = 128)]
    head_dim: u32,
    /// Query heads
    #[arg(long, default_value_t = 32)]
    q_heads: u32,
    /// KV heads
    #[arg(long, default_value_t = 8)]
    kv_heads: u32,
    /// Tokens of a block
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    /// Cache formats, each a name or K:V
    #[arg(long, default_values = ["f16"])]
    formats: Vec<KvFormats>,
    /// Decode: sequences, and keys of each
    #[arg(long, num_args = 2, default_values_t = [1, 2048])]
    decode: Vec<u32>,
    /// Prefill: new tokens, and keys including them
    #[arg(long, num_args = 2, default_values_t = [512, 512])]
    prefill: Vec<u32>,
    /// Folder of a model: its heads instead of those above, and its linear layers, too
    #[cfg(feature = "model")]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// How the weights of the linear layers are stored: f32, f16, int8 or int4
    #[cfg(feature = "model")]
    #[arg(long, default_value = "f16")]
    weights: folio::model::WeightFormat,
    /// Seconds for attention, and as many for linear layers
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Let decode quantise queries for packed dot products (int8 and int4 keys), where that is faster
    #[arg(long)]
    packed_dots: bool,
    /// Part of the adapter's name
    #[arg(long)]
    adapter: Option<String>,
    /// Where the result is added to what is there
    #[arg(long, default_value = "tuning.json")]
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    #[cfg_attr(not(feature = "model"), allow(unused_mut, reason = "a model changes the heads"))]
    let mut args = Args::parse();
    let mut options = GpuOptions::default();
    (options.adapter_name, options.timestamps) = (args.adapter.clone(), true);
    options.packed_dots = args.packed_dots;
    let gpu = Gpu::open_blocking(options)?;
    println!("{}", gpu.tuned_for());
    // Before minutes of work: what is there must be readable, and this adapter's.
    let kept = read(&args.out)?;
    if let Some(kept) = &kept {
        gpu.with_tuning(kept.clone()).with_context(|| args.out.display().to_string())?;
    }
    #[cfg(feature = "model")]
    let linear = tune_model(&gpu, &mut args)?;
    let shapes: Vec<_> = args
        .formats
        .iter()
        .map(|formats| {
            let cache = KvCacheConfig::new(1, args.kv_heads, args.head_dim)
                .with_blocks(1, args.block_size)
                .with_formats(formats.k, formats.v);
            TuneShape::new(&cache, args.q_heads)
                .with_decode(args.decode[0], args.decode[1])
                .with_prefill(args.prefill[0], args.prefill[1])
        })
        .collect();
    let mut tuning = kept.unwrap_or_else(|| Tuning::new(gpu.tuned_for()));
    tuning.merge(gpu.tune(&shapes, Duration::from_secs(args.seconds), print)?)?;
    #[cfg(feature = "model")]
    if let Some(linear) = linear {
        tuning.merge(linear)?;
    }
    std::fs::write(&args.out, serde_json::to_string_pretty(&tuning)? + "\n")?;
    println!("\nwritten to {}", args.out.display());
    Ok(())
}

/// A tuning that is there already.
fn read(path: &Path) -> anyhow::Result<Option<Tuning>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(serde_json::from_str(&text).with_context(|| path.display().to_string())?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Tunes the linear layers of the model that is named, and takes over its heads.
#[cfg(feature = "model")]
fn tune_model(gpu: &Gpu, args: &mut Args) -> anyhow::Result<Option<Tuning>> {
    use folio::model::{LinearTuneEvent, Model, ModelOptions};

    let Some(folder) = &args.model else { return Ok(None) };
    let (config, layers) = {
        let model = Model::load_blocking(gpu, folder, ModelOptions::new(args.weights), |_| {})?;
        (model.config().clone(), model.linear_configs())
    };
    (args.head_dim, args.q_heads, args.kv_heads) = (config.head_dim, config.num_q_heads, config.num_kv_heads);
    let tuning = gpu.tune_linear(&layers, Duration::from_secs(args.seconds), |event| match event {
        LinearTuneEvent::Race { layer, kernel, rows, num_candidates } => {
            let folio::model::LinearConfig { in_features, out_features, format, gated, .. } = layer;
            let gate = if *gated { " and a gate" } else { "" };
            println!(
                "\n{kernel} of {format} [{out_features}{gate}, {in_features}]: {rows} rows; {num_candidates} candidates"
            );
        }
        LinearTuneEvent::Timed { sizes, micros } => println!("  {micros:>10.0} us  {sizes}"),
        LinearTuneEvent::Dropped { sizes, reason } => println!("     dropped  {sizes}: {reason}"),
        LinearTuneEvent::Chosen(tuned) => {
            let ratio = tuned.nanos as f64 / tuned.default_nanos as f64;
            println!("  chosen: {}, {ratio:.2} of the default's time", tuned.sizes);
        }
        LinearTuneEvent::Thresholds(thresholds) => println!("  {thresholds:?}"),
        _ => {}
    })?;
    Ok(Some(tuning))
}

fn print(event: TuneEvent<'_>) {
    match event {
        TuneEvent::Race { shape, workload, num_candidates } => {
            let formats = format!("{}:{}", shape.k_format, shape.v_format);
            println!("\n{} of {formats}: {workload}; {num_candidates} candidates", shape.kernel);
        }
        TuneEvent::Timed { sizes, micros } => println!("  {micros:>10.0} us  {sizes}"),
        TuneEvent::Dropped { sizes, reason } => println!("     dropped  {sizes}: {reason}"),
        TuneEvent::Chosen(tuned) => {
            let ratio = tuned.nanos as f64 / tuned.default_nanos as f64;
            let split = tuned.split.map_or(String::new(), |split| format!("; {split:?}"));
            println!("  chosen: {}{split}, {ratio:.2} of the default's time", tuned.sizes);
        }
        _ => {}
    }
}

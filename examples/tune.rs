//! Races kernel sizes on an adapter and writes what won, as JSON: `cargo run --release --features tune --example tune -- --head-dim 128`.
#![allow(clippy::print_stdout, reason = "an example prints what it found")]

use std::path::PathBuf;
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
    /// Seconds for all
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
    let args = Args::parse();
    let mut options = GpuOptions::default();
    (options.adapter_name, options.timestamps, options.packed_dots) = (args.adapter, true, args.packed_dots);
    let gpu = Gpu::open_blocking(options)?;
    println!("{}", gpu.tuned_for());
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
    let tuning = gpu.tune(&shapes, Duration::from_secs(args.seconds), print)?;
    let tuning = match std::fs::read_to_string(&args.out) {
        Ok(text) => {
            let mut kept: Tuning = serde_json::from_str(&text).with_context(|| args.out.display().to_string())?;
            kept.merge(tuning)?;
            kept
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => tuning,
        Err(error) => return Err(error).with_context(|| args.out.display().to_string()),
    };
    std::fs::write(&args.out, serde_json::to_string_pretty(&tuning)? + "\n")?;
    println!("\nwritten to {}", args.out.display());
    Ok(())
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

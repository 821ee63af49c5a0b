//! Prints the WGSL of a kernel variant, as it is compiled: for reading, and for shader compilers' statistics. Needs no GPU.
//!
//! `cargo run --release --example compose -- decode --profile gpu --head-dim 128 --group-size 4 --k-format int8 --v-format f16`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use clap::{Parser, ValueEnum};
use folio::kernel::{AttendFlags, Kernel, MatrixSize, Target, Variant, Vendor, compose};
use folio::{KvCacheConfig, KvFormat, Profile};

#[derive(Clone, Copy, ValueEnum)]
enum KernelName {
    Append,
    CopyBlocks,
    PackBlocks,
    Gather,
    Decode,
    Prefill,
    Merge,
}

#[derive(Clone, Copy, ValueEnum)]
enum ProfileName {
    Gpu,
    Cpu,
}

/// Prints the WGSL of a kernel variant.
#[derive(Parser)]
struct Args {
    kernel: KernelName,
    #[arg(long, value_enum, default_value = "gpu")]
    profile: ProfileName,
    #[arg(long, default_value_t = 128)]
    head_dim: u32,
    #[arg(long, default_value_t = 8)]
    kv_heads: u32,
    #[arg(long, default_value_t = 4)]
    group_size: u32,
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    /// How K is stored: f32, f16, e4m3, int8, int4, int8-channel or int4-channel.
    #[arg(long, default_value = "f32")]
    k_format: KvFormat,
    /// How V is stored: the same, without the last two.
    #[arg(long, default_value = "f32")]
    v_format: KvFormat,
    /// With the sizes for Intel's GPUs.
    #[arg(long)]
    intel: bool,
    /// Use no subgroup operations.
    #[arg(long)]
    no_subgroups: bool,
    /// The size of all subgroups, if it is known; CPU kernels need it to use any.
    #[arg(long, default_value_t = 0)]
    subgroup_size: u32,
    /// Rows of the matrices that matrix units multiply: 8, 16, or 0 for none.
    #[arg(long, default_value_t = 0)]
    matrix: u32,
    /// With queries quantised for packed integer dot products (decode over int8 and int4 keys).
    #[arg(long)]
    packed_dots: bool,
    /// 64-bit integers are available.
    #[arg(long)]
    int64: bool,
    /// Which of the sizes that a tuner may try; 0 are the default's. Beyond the last one nothing is printed.
    #[arg(long, default_value_t = 0)]
    candidate: usize,
}

fn main() -> folio::Result<()> {
    let args = Args::parse();
    let config = KvCacheConfig::new(1, args.kv_heads, args.head_dim)
        .with_blocks(1, args.block_size)
        .with_formats(args.k_format, args.v_format);
    config.validate()?;
    let target = Target {
        profile: match args.profile {
            ProfileName::Gpu => Profile::Gpu,
            ProfileName::Cpu => Profile::Cpu,
        },
        vendor: if args.intel { Vendor::Intel } else { Vendor::Other },
        subgroups: !args.no_subgroups,
        subgroup_size: args.subgroup_size,
        int64: args.int64,
        matrix: match args.matrix {
            8 => Some(MatrixSize::Eight),
            16 => Some(MatrixSize::Sixteen),
            _ => None,
        },
        packed_dots: args.packed_dots,
        enable_directives: false,
    };
    let kernel = match args.kernel {
        KernelName::Append => Kernel::Append,
        KernelName::CopyBlocks => Kernel::CopyBlocks,
        KernelName::PackBlocks => Kernel::PackBlocks,
        KernelName::Gather => Kernel::Gather,
        KernelName::Decode => Kernel::Decode,
        KernelName::Prefill => Kernel::Prefill,
        KernelName::Merge => Kernel::Merge,
    };
    let flags = AttendFlags { causal: true, ..AttendFlags::default() };
    let variant = Variant::new(kernel, target, &config, args.group_size, flags);
    if let Some(&sizes) = variant.candidates().get(args.candidate) {
        let variant = variant.with_sizes(sizes);
        println!("// {variant:?}\n{}", compose(&variant)?);
    }
    Ok(())
}

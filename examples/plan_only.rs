//! What a program with a GPU library of its own (another wgpu, Dawn, JavaScript) takes from folio: WGSL, binding tables, buffer sizes, and for
//! each step the words to upload and the dispatches to record, as JSON. Needs no GPU, and builds without the feature `wgpu`.
//!
//! `cargo run --release --no-default-features --example plan_only -- --out plan.json`
//!
//! Three steps: a prompt of 37 tokens; then a fork of it, both branches one token further (the shared last block is copied first), and a new
//! sequence of 5 tokens; then a token for each.
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::path::PathBuf;

use clap::Parser;
use folio::kernel::{Access, AttendFlags, Kernel, Target, Variant, Vendor, max_decode_group, tuning};
use folio::plan::{AppendGrids, PARAM_BLOCK_WORDS, PlanShape, Stage, StepPlan, append_words};
use folio::sequence::{Manager, Reservation, ReservedGroup};
use folio::{AdapterClass, AttentionConfig, Error, KvCacheConfig, KvFormat, Profile, Result, Segments, SequenceId};
use serde_json::{Value, json};

/// Writes what a program with a GPU library of its own needs, as JSON.
#[derive(Parser)]
pub(crate) struct Args {
    #[arg(long, default_value_t = 2)]
    layers: u32,
    #[arg(long, default_value_t = 64)]
    head_dim: u32,
    #[arg(long, default_value_t = 2)]
    kv_heads: u32,
    #[arg(long, default_value_t = 8)]
    q_heads: u32,
    #[arg(long, default_value_t = 64)]
    num_blocks: u32,
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    /// How K is stored: f32, f16, e4m3, int8, int4, int8-channel or int4-channel.
    #[arg(long, default_value = "f16")]
    k_format: KvFormat,
    /// How V is stored: the same, without the last two.
    #[arg(long, default_value = "f16")]
    v_format: KvFormat,
    /// Bytes that a storage binding of the device may have.
    #[arg(long, default_value_t = 128 << 20)]
    max_binding_bytes: u64,
    /// Where the JSON goes; standard output if absent.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// A device as a browser offers it: no subgroups.
const TARGET: Target = Target {
    profile: Profile::Gpu,
    vendor: Vendor::Other,
    subgroups: false,
    subgroup_size: 0,
    int64: false,
    matrix: None,
    packed_dots: false,
    enable_directives: true,
};

/// Everything that stays the same from step to step.
struct Host {
    cache: KvCacheConfig,
    attention: AttentionConfig,
    segments: [Segments; 2],
    max_binding_bytes: u64,
    manager: Manager,
}

impl Host {
    fn new(args: &Args) -> Result<Self> {
        let cache = KvCacheConfig::new(args.layers, args.kv_heads, args.head_dim)
            .with_blocks(args.num_blocks, args.block_size)
            .with_formats(args.k_format, args.v_format);
        let attention = AttentionConfig::new(args.q_heads);
        let manager = Manager::new(cache)?;
        attention.validate(&cache)?;
        let segments = |layout: folio::KvLayout| {
            layout.segments(cache.num_blocks, args.max_binding_bytes).ok_or_else(|| {
                Error::argument("max_binding_bytes", args.max_binding_bytes, "room for a block at least")
            })
        };
        let segments = [segments(cache.k_layout())?, segments(cache.v_layout())?];
        Ok(Self { cache, attention, segments, max_binding_bytes: args.max_binding_bytes, manager })
    }

    fn group_size(&self) -> u32 {
        self.attention.num_q_heads / self.cache.num_kv_heads
    }

    /// Decode serves small groups only; prefill takes the place of it for larger ones.
    fn has_decode(&self) -> bool {
        self.group_size() <= max_decode_group(&self.cache)
    }

    fn variant(&self, kernel: Kernel) -> Variant {
        let (group_size, flags) = match kernel {
            Kernel::Decode | Kernel::Prefill | Kernel::Merge => (self.group_size(), AttendFlags::of(&self.attention)),
            _ => (1, AttendFlags::default()),
        };
        Variant::new(kernel, TARGET, &self.cache, group_size, flags).with_segments(self.segments)
    }

    /// The buffers of each layer's K and V, in the order in which kernels bind them. The table of channel scales ends the first of a side.
    fn cache_json(&self) -> Value {
        let mut buffers = Vec::new();
        for (side, layout, segments) in
            [("k", self.cache.k_layout(), self.segments[0]), ("v", self.cache.v_layout(), self.segments[1])]
        {
            for segment in 0..segments.count {
                let blocks = segments.blocks_of(segment, self.cache.num_blocks);
                let table = if segment == 0 { layout.channel_table_bytes() } else { 0 };
                let bytes = u64::from(blocks) * layout.block_bytes() + table;
                buffers.push(json!({ "side": side, "segment": segment, "blocks": blocks, "bytes": bytes }));
            }
        }
        json!({ "num_layers": self.cache.num_layers, "buffers_of_a_layer": buffers })
    }

    fn kernel_json(&self, kernel: Kernel) -> Result<Value> {
        let source = self.variant(kernel).source()?;
        let access = |access| match access {
            Access::Read => "storage, read",
            Access::Write => "storage, read_write",
            Access::Uniform => "uniform",
            Access::Texture => "texture",
            Access::TextureWrite => "storage texture",
        };
        let bindings = (0..).zip(source.bindings()).map(|(number, binding): (u32, _)| {
            json!({ "binding": number, "name": binding.name, "access": access(binding.access) })
        });
        Ok(json!({
            "entry_point": source.entry_point(),
            "workgroup_size": source.workgroup_size(),
            "workgroup_bytes": source.workgroup_bytes(),
            "needs": { "subgroups": source.features().subgroups, "int64": source.features().int64 },
            "bindings": bindings.collect::<Vec<_>>(),
            "wgsl": source.text(),
        }))
    }

    /// Reserves a step, says what the device has to do in it, and commits.
    fn step_json(&mut self, requests: &[(SequenceId, u32)]) -> Result<Value> {
        let reservation = self.manager.reserve(requests)?;
        let described = self.describe(&reservation);
        // Here a real host records and submits. A step that comes to nothing is rolled back instead.
        if described.is_err() {
            self.manager.roll_back(reservation.pending);
            return described;
        }
        self.manager.commit(reservation.pending);
        described
    }

    fn describe(&self, reservation: &Reservation) -> Result<Value> {
        // One group of layers. A cache whose layers keep different tokens has several, each with a step of its own.
        let ReservedGroup { batch, slots, copies, .. } = &reservation.groups[0];
        // Of every new token, in the order of the batch.
        let positions: Vec<u32> = batch.entries.iter().flat_map(|entry| entry.context_len..entry.seq_len()).collect();
        let (append, copy_blocks) = (self.variant(Kernel::Append), self.variant(Kernel::CopyBlocks));
        let grids = AppendGrids::new(&append, &copy_blocks, batch.num_tokens(), copies.len() as u32)?;
        let append = append_words(self.cache.num_blocks, slots, &positions, copies, grids);

        let shape = PlanShape {
            num_kv_heads: self.cache.num_kv_heads,
            group_size: self.group_size(),
            head_dim: self.cache.head_dim,
            value_dim: self.cache.value_dim(),
            causal: self.attention.causal,
            window: self.attention.window,
            sink_tokens: self.attention.sink_tokens,
            has_decode: self.has_decode(),
            tile_q: self.variant(Kernel::Prefill).tile_q,
            block_size: self.cache.block_size,
        };
        let max_workspace_bytes = self.attention.max_workspace_bytes.min(self.max_binding_bytes);
        let mut policy = tuning::split_policy(
            TARGET.profile,
            AdapterClass::Integrated,
            self.attention.deterministic,
            max_workspace_bytes,
        );
        policy.cascade = self.attention.cascade_policy(tuning::cascade_policy(&self.variant(Kernel::Prefill)));
        let params = self.attention.params(&self.cache);
        let plan = StepPlan::new(&shape, &policy, &params, batch, &[])?;

        // In every layer, in this order. The kernels' `params` are bound at the offset, all other lists from the start of the upload.
        let mut dispatches = Vec::new();
        let mut dispatch = |kernel: Kernel, upload: &str, params_offset: u64, grid: [u32; 3]| {
            let kernel = kernel.entry_point();
            dispatches
                .push(json!({ "kernel": kernel, "upload": upload, "params_offset": params_offset, "grid": grid }));
        };
        if !copies.is_empty() {
            let (x, y) = grids.copy_blocks;
            dispatch(Kernel::CopyBlocks, "append", u64::from(PARAM_BLOCK_WORDS) * 4, [x, y, 1]);
        }
        dispatch(Kernel::Append, "append", 0, [grids.append.0, grids.append.1, 1]);
        for planned in &plan.dispatches {
            let kernel = match planned.stage {
                Stage::Decode | Stage::SinkDecode => Kernel::Decode,
                Stage::Prefill | Stage::SinkPrefill => Kernel::Prefill,
                Stage::Merge => Kernel::Merge,
            };
            dispatch(kernel, "attention", planned.params_offset, planned.grid);
        }
        let sequences = batch.entries.iter().map(|e| json!({ "query_len": e.query_len, "context_len": e.context_len }));
        let upload = |words: &[u32]| json!({ "bytes": words.len() * 4, "words": words });
        Ok(json!({
            "sequences": sequences.collect::<Vec<_>>(),
            "num_tokens": batch.num_tokens(),
            "uploads": { "append": upload(&append), "attention": upload(&plan.words) },
            "workspace_bytes": plan.workspace_bytes,
            "dispatches": dispatches,
        }))
    }
}

/// What a host makes once, and what it does in three steps.
pub(crate) fn describe(args: &Args) -> Result<Value> {
    let mut host = Host::new(args)?;
    let mut kernels = Vec::new();
    for kernel in [Kernel::Append, Kernel::CopyBlocks, Kernel::Decode, Kernel::Prefill, Kernel::Merge] {
        if kernel != Kernel::Decode || host.has_decode() {
            kernels.push(host.kernel_json(kernel)?);
        }
    }
    let prompt = host.manager.create();
    let mut steps = vec![host.step_json(&[(prompt, 37)])?];
    let (branch, other) = (host.manager.fork(prompt)?, host.manager.create());
    steps.push(host.step_json(&[(prompt, 1), (branch, 1), (other, 5)])?);
    steps.push(host.step_json(&[(prompt, 1), (branch, 1), (other, 1)])?);
    Ok(json!({ "cache": host.cache_json(), "kernels": kernels, "steps": steps }))
}

#[allow(dead_code, reason = "the test that reads the JSON includes this file")]
fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let json = serde_json::to_string(&describe(&args)?)?;
    match &args.out {
        Some(path) => std::fs::write(path, json)?,
        None => println!("{json}"),
    }
    Ok(())
}

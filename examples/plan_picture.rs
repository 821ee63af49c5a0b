//! Draws a step as folio plans it, as SVG: which blocks of the pool each sequence has, and which workgroup reads which keys for which queries. Everything drawn is
//! taken from a real reservation and a real plan. Needs no GPU, and builds without the feature `wgpu`.
//!
//! `cargo run --release --no-default-features --example plan_picture -- docs/plan.svg`

use std::fmt::Write;

use folio::kernel::{AttendFlags, Kernel, Target, Variant, Vendor, tuning};
use folio::plan::{NO_PARTIAL, PlanShape, StepPlan, WorkItem};
use folio::sequence::{Batch, Manager};
use folio::{AdapterClass, AttentionConfig, KvCacheConfig, KvFormat, Profile, Result};

/// Query heads over KV heads as in a small model of today.
const Q_HEADS: u32 = 8;
const CACHE: KvCacheConfig =
    KvCacheConfig::new(1, 2, 64).with_blocks(280, 16).with_formats(KvFormat::F16, KvFormat::F16);
/// A GPU with subgroups, as on a desktop.
const TARGET: Target = Target {
    profile: Profile::Gpu,
    vendor: Vendor::Other,
    subgroups: true,
    subgroup_size: 32,
    int64: false,
    matrix: None,
    packed_dots: false,
    enable_directives: false,
};
/// Colours of the sequences, readable on light and dark.
const COLOURS: [&str; 4] = ["#2a78d6", "#d9730d", "#1f9d6b", "#b04fb8"];
/// Pixels of the picture, of its margin on the left, and per key.
const WIDTH: f64 = 900.0;
const LEFT: f64 = 110.0;

/// A prompt of which 96 tokens are computed behind 160, one long text, a short one, and a fork of it: what a busy server has in a step.
fn step() -> Result<Batch> {
    let mut manager = Manager::new(CACHE)?;
    let grow = |manager: &mut Manager, id, tokens| -> Result<()> {
        let step = manager.reserve(&[(id, tokens)])?;
        manager.commit(step.pending);
        Ok(())
    };
    let [prompt, long, short] = [(); 3].map(|()| manager.create());
    for (id, tokens) in [(prompt, 100), (long, 1500), (short, 300), (prompt, 60), (long, 1500)] {
        grow(&mut manager, id, tokens)?;
    }
    let fork = manager.fork_at(short, 288)?;
    grow(&mut manager, fork, 100)?;
    let step = manager.reserve(&[(prompt, 96), (long, 1), (short, 1), (fork, 1)])?;
    Ok(step.groups[0].batch.clone())
}

fn plan(batch: &Batch) -> Result<StepPlan> {
    let attention = AttentionConfig::new(Q_HEADS);
    let group_size = Q_HEADS / CACHE.num_kv_heads;
    let prefill = Variant::new(Kernel::Prefill, TARGET, &CACHE, group_size, AttendFlags::of(&attention));
    let shape = PlanShape {
        num_kv_heads: CACHE.num_kv_heads,
        group_size,
        head_dim: CACHE.head_dim,
        value_dim: CACHE.value_dim(),
        causal: true,
        window: None,
        sink_tokens: 0,
        has_decode: true,
        tile_q: prefill.tile_q,
        block_size: CACHE.block_size,
    };
    let policy = tuning::split_policy(TARGET.profile, AdapterClass::Discrete, false, attention.max_workspace_bytes);
    StepPlan::new(&shape, &policy, &attention.params(&CACHE), batch, &[])
}

/// The pool, a square per block, in the colour of its sequence; what several hold has two.
fn draw_pool(svg: &mut String, batch: &Batch) {
    const COLUMNS: u32 = 56;
    for block in 0..CACHE.num_blocks {
        let owners =
            (0..batch.entries.len()).filter(|&i| batch.tables[batch.entries[i].table.clone()].contains(&block));
        let owners: Vec<_> = owners.collect();
        let (x, y) = (LEFT + f64::from(block % COLUMNS) * 13.8, 48.0 + f64::from(block / COLUMNS) * 13.8);
        let width = 12.0 / owners.len().max(1) as f64;
        for (part, &owner) in owners.iter().enumerate() {
            let (at, colour) = (x + part as f64 * width, COLOURS[owner]);
            let _ = writeln!(svg, r#"<rect x="{at:.1}" y="{y:.1}" width="{width:.1}" height="12" fill="{colour}"/>"#);
        }
        if owners.is_empty() {
            let _ = writeln!(svg, r#"<rect x="{x:.1}" y="{y:.1}" width="12" height="12" class="free"/>"#);
        }
    }
}

/// Work items of each sequence: queries downwards, keys to the right. Each is a workgroup for each KV head. Returns where the picture ends.
fn draw_items(svg: &mut String, batch: &Batch, plan: &StepPlan) -> f64 {
    let starts = batch.query_start();
    let longest = batch.entries.iter().map(|entry| entry.seq_len()).max().unwrap_or(1);
    let scale = (WIDTH - LEFT - 20.0) / f64::from(longest);
    let names = ["prompt", "long text", "short text", "fork of it"];
    let mut top = 180.0;
    for (i, entry) in batch.entries.iter().enumerate() {
        let is_own = |item: &&WorkItem| item.query_start == starts[i];
        let items: Vec<_> = plan.lists.decode.iter().chain(&plan.lists.prefill).filter(is_own).collect();
        let group_size = f64::from(Q_HEADS / CACHE.num_kv_heads);
        // A token of a decode is drawn as high as twelve of a prompt.
        let row = if entry.query_len > 1 { 1.5 / group_size } else { 18.0 / group_size };
        let height = f64::from(entry.query_len) * group_size * row;
        let split = if items.iter().any(|item| item.part_row != NO_PARTIAL) { ", then merged" } else { "" };
        let (label, what) =
            (top + 11.0, format!("{} workgroups x {} KV heads{split}", items.len(), CACHE.num_kv_heads));
        let _ = writeln!(svg, r#"<text x="8" y="{label:.0}">{}</text>"#, names[i]);
        for (n, item) in items.iter().enumerate() {
            let next = items.iter().map(|other| other.row_start).filter(|&row| row > item.row_start).min();
            let rows = next.unwrap_or(entry.query_len * Q_HEADS / CACHE.num_kv_heads) - item.row_start;
            let (x, width) = (LEFT + f64::from(item.kv_begin) * scale, f64::from(item.kv_end - item.kv_begin) * scale);
            let (y, high) = (top + f64::from(item.row_start) * row, f64::from(rows) * row);
            let opacity = if n % 2 == 0 { 0.95 } else { 0.6 };
            let _ = writeln!(
                svg,
                r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{high:.1}" fill="{}" fill-opacity="{opacity}" class="item"/>"#,
                COLOURS[i]
            );
        }
        top += height + 14.0;
        let _ = writeln!(
            svg,
            r#"<text x="{LEFT}" y="{top:.0}" class="small">{} new behind {}: {what}</text>"#,
            entry.query_len, entry.context_len
        );
        top += 24.0;
    }
    let ticks = (0..=longest).step_by(512);
    for key in ticks {
        let x = LEFT + f64::from(key) * scale;
        let _ = writeln!(svg, r#"<text x="{x:.1}" y="{top:.0}" class="small" text-anchor="middle">{key}</text>"#);
    }
    let _ = writeln!(svg, r#"<text x="8" y="{top:.0}" class="small">keys</text>"#);
    top + 12.0
}

/// The picture.
pub(crate) fn picture() -> Result<String> {
    let batch = step()?;
    let mut body = String::new();
    draw_pool(&mut body, &batch);
    let height = draw_items(&mut body, &batch, &plan(&batch)?);
    let (blocks, block_size) = (CACHE.num_blocks, CACHE.block_size);
    Ok(format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="system-ui, sans-serif" font-size="13">
<title>A step of four sequences: their blocks in the pool, and which workgroup reads which keys</title>
<style>text {{ fill: #1d1d1f }} .small {{ font-size: 11px; fill: #63636a }} .free {{ fill: none; stroke: #a0a0a8; stroke-opacity: .5 }} .item {{ stroke: #fff; stroke-width: .8 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #f2f2f4 }} .small {{ fill: #a6a6ae }} .item {{ stroke: #15151a }} }}</style>
<text x="8" y="24" font-weight="600">The pool: {blocks} blocks of {block_size} tokens; two colours: shared</text>
<text x="8" y="165" font-weight="600">The plan: queries downwards, keys to the right; each rectangle is a workgroup for each KV head</text>
{body}</svg>
"#
    ))
}

#[allow(dead_code, reason = "the test that compares the picture includes this file")]
fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).ok_or_else(|| anyhow::anyhow!("need a file to write to"))?;
    Ok(std::fs::write(path, picture()?)?)
}

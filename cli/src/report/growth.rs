//! The sections of the page about growing texts: memory, time.

use anyhow::Result;

use super::data::{Crossing, Growth, Holes, Memory, Time, TimeFigure};
use super::page::{Block, Section, figure, table, text};
use crate::plot::{Axis, Plot, Series, Style, bytes, count, percent, seconds};

const MIB: f64 = 1_048_576.0;

/// Formats that the figure of memory has: one of each number of bits.
const DRAWN: [&str; 4] = ["F32", "F16", "Int8", "Int4"];

pub(super) fn memory(memory: &Memory) -> Result<Section> {
    let model = &memory.model;
    let intro = format!(
        "Bytes of keys and values of {} ({} layers, {} KV heads of {}). Block tables and allocator are the real ones, which work without a GPU.",
        model.name, model.num_layers, model.num_kv_heads, model.head_dim
    );
    let drawn: Vec<&Growth> = memory
        .growth
        .iter()
        .filter(|growth| growth.kind != "paged" || DRAWN.contains(&growth.cache.as_str()))
        .collect();
    let mut series = Vec::new();
    for (i, growth) in drawn.iter().enumerate() {
        let of = |bytes: fn(&super::data::GrowthPoint) -> u64| {
            growth.points.iter().map(|point| (f64::from(point.tokens), bytes(point) as f64 / MIB)).collect::<Vec<_>>()
        };
        series.push(Series::new("", Style::Formula, of(|p| p.formula_bytes)).with_colour(i));
        series.push(Series::new(name(growth), Style::Marks, of(|p| p.pool_bytes)).with_colour(i));
    }
    let growth = Plot {
        title: "Bytes of one sequence against its tokens".into(),
        x: Axis { label: "tokens", unit: count, log: None },
        y: Axis { label: "MiB", unit: count, log: None },
        series,
    };
    let caption = format!(
        "Lines are the formula, marks the blocks that the allocator has handed out; they differ by {} at most.",
        bytes(memory.worst_difference as f64)
    );
    let rows = memory.growth.iter().map(|growth| {
        let at = |share: f64| {
            let i = (share * growth.points.len().saturating_sub(1) as f64) as usize;
            growth
                .points
                .get(i)
                .map_or_else(String::new, |point| format!("{} ({})", bytes(point.pool_bytes as f64), point.tokens))
        };
        [growth.kind.to_owned(), growth.cache.clone(), bytes(growth.token_bytes as f64), at(0.25), at(0.5), at(1.0)]
    });
    let header = ["cache", "format", "per token", "a quarter of the way (tokens)", "half of it", "all of it"];
    let blocks = vec![
        text(intro),
        figure(&growth, caption)?,
        table("One sequence as it grows, in the real pool", header, 2, rows),
        Block::Heading { text: "How many texts fit" },
        text(lengths(memory)),
        fits_figure(memory)?,
        fits_table(memory),
        Block::Heading { text: "Waste and fragmentation" },
        text(
            "A text takes whole blocks, so the end of its last one is wasted; small blocks waste less and need longer tables.",
        ),
        waste_table(memory),
        holes_text(memory),
        holes_table(memory),
        table(
            "Pools on this device, one layer with 2 KV heads of 32",
            ["format", "by the formula", "buffers"],
            1,
            memory
                .allocated
                .iter()
                .map(|pool| [pool.cache.clone(), bytes(pool.formula_bytes as f64), bytes(pool.buffer_bytes as f64)]),
        ),
    ];
    Ok(Section { id: "memory", title: "How memory grows", blocks })
}

fn name(growth: &Growth) -> String {
    match growth.window {
        Some(window) => format!("{}, window of {window}", growth.cache),
        None => format!("{} {}", growth.kind, growth.cache),
    }
}

fn lengths(memory: &Memory) -> String {
    let lengths = &memory.lengths;
    format!(
        "Texts of lengths as people write them: {}; mean {:.0}, median {}, nine of ten up to {}. A contiguous cache has to reserve {} tokens for each, because \
         nobody knows how long it will be.",
        lengths.distribution, lengths.mean, lengths.median, lengths.p90, memory.model.max_len
    )
}

fn fits_figure(memory: &Memory) -> Result<Block> {
    let mut series: Vec<Series> = Vec::new();
    for fits in &memory.fits {
        let name = format!("{} {}", fits.kind, fits.cache);
        let point = (fits.memory_bytes as f64 / MIB / 1024.0, f64::from(fits.sequences));
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series::new(name, Style::Measured, vec![point])),
        }
    }
    let plot = Plot {
        title: "Sequences that fit, against memory".into(),
        x: Axis { label: "GiB for the cache", unit: count, log: None },
        y: Axis { label: "sequences", unit: count, log: Some(10.0) },
        series,
    };
    figure(
        &plot,
        "Sequences until the allocator has no block left for the next one; the axis of sequences is logarithmic.",
    )
}

fn fits_table(memory: &Memory) -> Block {
    let rows = memory.fits.iter().map(|fits| {
        [
            bytes(fits.memory_bytes as f64),
            fits.kind.to_owned(),
            fits.cache.clone(),
            fits.sequences.to_string(),
            percent(fits.blocks_used),
        ]
    });
    table("Sequences that fit", ["memory", "cache", "format", "sequences", "blocks in use at the end"], 3, rows)
}

fn waste_table(memory: &Memory) -> Block {
    let rows = memory.waste.iter().map(|waste| {
        [
            waste.block_size.to_string(),
            waste.sequences.to_string(),
            bytes(waste.used_bytes as f64),
            bytes(waste.wasted_bytes as f64),
            percent(waste.share),
            waste.table_words.to_string(),
        ]
    });
    let header = ["tokens of a block", "sequences", "used", "wasted", "of it", "words of block tables"];
    table("Waste by block size, F16", header, 0, rows)
}

fn holes_text(memory: &Memory) -> Block {
    let fragmentation = &memory.fragmentation;
    text(format!(
        "Every other text of 24 that grew side by side has ended, on this device. Attention reads any block as fast as any other, so holes cost nothing there; \
         defragment moved {} blocks ({}) to the front in {}.",
        fragmentation.moved_blocks,
        bytes(fragmentation.moved_bytes as f64),
        seconds(fragmentation.seconds)
    ))
}

fn holes_table(memory: &Memory) -> Block {
    let row = |name: &str, holes: &Holes| {
        [
            name.to_owned(),
            holes.used_blocks.to_string(),
            holes.span_blocks.to_string(),
            holes.runs.to_string(),
            percent(holes.holes),
        ]
    };
    let rows = [row("before", &memory.fragmentation.before), row("after", &memory.fragmentation.after)];
    table(
        "A fragmented pool, before and after defragment",
        ["", "used blocks", "up to the last one", "runs", "holes"],
        1,
        rows,
    )
}

pub(super) fn time(time: &Time) -> Result<Section> {
    let mut blocks = Vec::new();
    for (heading, measured) in [("A whole model", &time.model), ("One layer", &time.layer)] {
        blocks.push(Block::Heading { text: heading });
        blocks.push(text(measured.what.clone()));
        let tokens = format!("{heading}: time of a token against the text before it");
        let turns = "Medians of rounds in which all caches take turns; both axes logarithmic.";
        blocks.push(times_figure(measured, tokens, turns, |kind| kind != "prefill")?);
        blocks.push(Block::List { items: measured.crossings.iter().map(crossing).collect() });
        let prompts = format!("{heading}: time of a prompt per token against its length");
        let divided =
            "The time of the whole prompt, from an empty cache in F16, divided by its tokens; both axes logarithmic.";
        blocks.push(times_figure(measured, prompts, divided, |kind| kind == "prefill")?);
        blocks.push(times(measured));
    }
    Ok(Section { id: "time", title: "How time grows", blocks })
}

/// Curves of some kinds.
fn times_figure(measured: &TimeFigure, title: String, caption: &str, has: fn(&str) -> bool) -> Result<Block> {
    let series = measured.curves.iter().filter(|curve| has(curve.kind)).map(|curve| {
        let points = curve.points.iter().map(|point| (f64::from(point.context), point.seconds.median));
        Series::new(curve.name.clone(), Style::Measured, points.collect())
    });
    let plot = Plot {
        title,
        x: Axis { label: "tokens of the text", unit: count, log: Some(2.0) },
        y: Axis { label: "time per token", unit: seconds, log: Some(10.0) },
        series: series.collect(),
    };
    figure(&plot, caption)
}

fn times(measured: &TimeFigure) -> Block {
    let mut contexts: Vec<u32> =
        measured.curves.iter().flat_map(|curve| &curve.points).map(|point| point.context).collect();
    contexts.sort_unstable();
    contexts.dedup();
    let rows = measured.curves.iter().map(|curve| {
        let at = |context: &u32| {
            let point = curve.points.iter().find(|point| point.context == *context);
            point.map_or_else(|| "–".to_owned(), |point| seconds(point.seconds.median))
        };
        [curve.name.clone()].into_iter().chain(contexts.iter().map(at)).collect()
    });
    Block::Table {
        caption: "Time per token by tokens of the text".into(),
        header: ["".to_owned()].into_iter().chain(contexts.iter().map(u32::to_string)).collect(),
        rows: rows.collect(),
        texts: 1,
    }
}

fn crossing(crossing: &Crossing) -> String {
    let Crossing { faster, slower, kind, context, ratio_at_end } = crossing;
    let verdict = match (*kind, context) {
        ("from", Some(context)) => format!("is faster than {slower} from {context:.0} tokens on"),
        ("always", _) => format!("is faster than {slower} at every length that was measured"),
        _ => format!("is not faster than {slower} here"),
    };
    format!("{faster} {verdict}: {} times as fast at the longest text of both.", count(*ratio_at_end))
}

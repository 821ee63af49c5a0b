//! The page: sections of text, figures and tables, rendered by a template.

use anyhow::Result;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, context};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;

use super::data::{Adapter, ChosenKernel, PREDICTION_GOAL, Point, Report, Roofline};
use super::growth;
use crate::plot::{self, Axis, Plot, Series, Style, bytes, count, percent, seconds, si};

/// The page as HTML, which names the file with its figures.
pub(super) fn render(report: &Report, json: &str) -> Result<String> {
    let sections = [
        adapter(&report.adapter),
        roofs(&report.roofline),
        kernels(&report.roofline)?,
        growth::memory(&report.memory)?,
        growth::time(&report.time)?,
    ];
    let head = Head {
        adapter: format!("{} ({})", report.adapter.name, report.adapter.backend),
        made: &report.made,
        folio: report.folio,
        quick: report.quick,
        seconds: seconds(report.seconds),
        json,
        json_link: utf8_percent_encode(json, NON_ALPHANUMERIC).to_string(),
    };
    html(&head, &sections)
}

/// What stands above the sections.
#[derive(Serialize)]
struct Head<'a> {
    adapter: String,
    made: &'a str,
    folio: &'a str,
    quick: bool,
    seconds: String,
    /// Name of the file with the figures, and the same within a link.
    json: &'a str,
    json_link: String,
}

fn html(head: &Head<'_>, sections: &[Section]) -> Result<String> {
    let mut environment = Environment::new();
    // Its name says that values are escaped: all but figures, which the template marks as safe.
    environment.add_template("page.html", include_str!("page.html"))?;
    let hex = |colour: plotters::style::RGBColor| format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2);
    let page = environment.get_template("page.html")?.render(context! {
        head => Value::from(Serde(head)),
        sections => Value::from(Serde(sections)),
        colours => plot::COLOURS.map(hex),
        ink => hex(plot::INK),
        grid => hex(plot::GRID),
    })?;
    Ok(page)
}

/// A section under a heading of its own.
#[derive(Serialize)]
pub(super) struct Section {
    pub(super) id: &'static str,
    pub(super) title: &'static str,
    pub(super) blocks: Vec<Block>,
}

/// What a section consists of.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Block {
    Text {
        text: String,
    },
    List {
        items: Vec<String>,
    },
    Heading {
        text: &'static str,
    },
    Figure {
        svg: String,
        caption: String,
        legend: Vec<Key>,
    },
    Table {
        caption: String,
        header: Vec<String>,
        rows: Vec<Vec<String>>,
        /** Columns of text before those of numbers. */
        texts: usize,
    },
}

/// A series of a figure.
#[derive(Serialize)]
pub(super) struct Key {
    name: String,
    colour: usize,
    style: &'static str,
}

pub(super) fn text(text: impl Into<String>) -> Block {
    Block::Text { text: text.into() }
}

pub(super) fn figure(plot: &Plot, caption: impl Into<String>) -> Result<Block> {
    let named = plot.series.iter().enumerate().filter(|(_, series)| !series.name.is_empty());
    let legend = named.map(|(i, series)| Key {
        name: series.name.clone(),
        colour: plot.colour_of(i),
        style: match series.style {
            Style::Measured => "measured",
            Style::Formula => "formula",
            Style::Marks => "marks",
        },
    });
    Ok(Block::Figure { svg: plot.svg()?, caption: caption.into(), legend: legend.collect() })
}

/// A table whose first `texts` columns are text.
pub(super) fn table<const N: usize>(
    caption: impl Into<String>,
    header: [&str; N],
    texts: usize,
    rows: impl IntoIterator<Item = [String; N]>,
) -> Block {
    Block::Table {
        caption: caption.into(),
        header: header.map(str::to_owned).to_vec(),
        rows: rows.into_iter().map(Vec::from).collect(),
        texts,
    }
}

fn adapter(adapter: &Adapter) -> Section {
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let facts = [
        ("name", adapter.name.clone()),
        ("backend", adapter.backend.clone()),
        ("driver", adapter.driver.clone()),
        ("type", adapter.device_type.clone()),
        ("kernel family", format!("{}: {}", adapter.profile, adapter.profile_reason)),
        (
            "subgroups",
            if adapter.subgroup_size == 0 {
                "none, or of sizes that vary".into()
            } else {
                format!("of {}", adapter.subgroup_size)
            },
        ),
        ("wgpu's shader checks", yes(adapter.full_checks)),
        ("tuned kernel sizes", yes(adapter.tuned)),
        ("clock", adapter.clock.clone()),
        ("features in use", adapter.features.join(", ")),
    ];
    let limits =
        adapter.limits.iter().map(|limit| [limit.name.to_owned(), limit.value.to_string(), limit.webgpu.to_string()]);
    // Most formats have kernels of the same making.
    let mut groups: Vec<(&ChosenKernel, Vec<&str>)> = Vec::new();
    for kernel in &adapter.kernels {
        match groups.iter_mut().find(|(first, _)| first.is_alike(kernel)) {
            Some((_, caches)) => caches.push(&kernel.cache),
            None => groups.push((kernel, vec![&kernel.cache])),
        }
    }
    let kernels = groups.into_iter().map(|(kernel, caches)| {
        let tile = |len: u32| if len == 0 { "–".to_owned() } else { len.to_string() };
        [
            kernel.kernel.to_owned(),
            caches.join(", "),
            kernel.reason.clone(),
            kernel.workgroup_size.to_string(),
            tile(kernel.tile_q),
            tile(kernel.tile_kv),
            bytes(kernel.workgroup_bytes.into()),
        ]
    });
    let header = ["kernel", "cache", "why", "workgroup", "queries of a tile", "keys of a tile", "workgroup memory"];
    Section {
        id: "adapter",
        title: "Adapter",
        blocks: vec![
            table("What was measured", ["", ""], 2, facts.map(|(name, value)| [name.to_owned(), value])),
            Block::Heading { text: "Why is it slow?" },
            if adapter.hints.is_empty() {
                text("Nothing about this adapter or these settings stands in the way.")
            } else {
                Block::List { items: adapter.hints.iter().map(|hint| hint.text.clone()).collect() }
            },
            Block::Heading { text: "Limits" },
            table("Limits that shape what folio can do", ["limit", "here", "promised by WebGPU"], 1, limits),
            Block::Heading { text: "Kernels" },
            table("Kernels of attention that were chosen, and why", header, 3, kernels),
        ],
    }
}

fn roofs(roofline: &Roofline) -> Section {
    let roofs = &roofline.roofs;
    let rate = |name: &str, roof: &folio::measure::Roof, unit: &str| {
        let rate = roof.per_second;
        let spread = format!("{}{unit} to {}{unit}", si(rate.low), si(rate.high));
        [name.to_owned(), roof.by.clone(), format!("{}{unit}", si(rate.median)), spread]
    };
    let time = |name: &str, spread: folio::measure::Spread| {
        let quartiles = format!("{} to {}", seconds(spread.low), seconds(spread.high));
        [name.to_owned(), String::new(), seconds(spread.median), quartiles]
    };
    let rows = [
        rate(&format!("read {}", bytes(roofs.read_bytes as f64)), &roofs.read, "B/s"),
        rate("copy, read and written bytes together", &roofs.copy, "B/s"),
        rate("f32 multiply-adds, two operations each", &roofs.multiply_add, "FLOP/s"),
        rate("read workgroup memory", &roofs.workgroup, "B/s"),
        time("one more dispatch in a pass", roofs.dispatch),
        time("a pass of next to nothing: record, submit, wait", roofs.submit),
        time("read 256 bytes back", roofs.readback),
    ];
    Section {
        id: "roofs",
        title: "What the adapter can do",
        blocks: vec![
            text(
                "Plain loops that do one thing only: no kernel is much faster than the loop that limits it. The fastest of several forms of each counts. \
                 Medians; the spread is from the first to the third quartile.",
            ),
            table("Roofs, measured here", ["what", "by", "median", "spread"], 2, rows),
        ],
    }
}

fn kernels(roofline: &Roofline) -> Result<Section> {
    let Roofline { num_q_heads, num_kv_heads, head_dim, block_size, roofs, points, predictions } = roofline;
    let (read, flop) = (roofs.read.per_second.median, roofs.multiply_add.per_second.median);
    // The larger shapes, which were predicted.
    let drawn: Vec<&Point> =
        points.iter().filter(|point| point.predicted_seconds.is_some() && point.work.flop > 0).collect();
    let intensities = drawn.iter().map(|point| point.intensity).chain([flop / read]);
    let (low, high) = intensities.fold((f64::INFINITY, 0.0_f64), |(low, high), i| (low.min(i), high.max(i)));
    let (low, high) = (low / 4.0, high * 4.0);
    let roof = [low, flop / read, high].map(|intensity| (intensity, (intensity * read).min(flop)));
    let mut series = vec![Series::new("roof", Style::Formula, roof.to_vec()).with_colour(7)];
    let mut formats: Vec<&str> = Vec::new();
    for point in &drawn {
        if !formats.contains(&point.cache.as_str()) {
            formats.push(&point.cache);
        }
    }
    for (i, format) in formats.into_iter().enumerate() {
        let of = drawn.iter().filter(|point| point.cache == format);
        let marks = of.map(|point| (point.intensity, point.work.flop as f64 / point.measured.median)).collect();
        series.push(Series::new(format, Style::Marks, marks).with_colour(i));
    }
    let plot = Plot {
        title: "Roofline: operations per second against operations per byte".into(),
        x: Axis { label: "operations per byte moved", unit: count, log: Some(10.0) },
        y: Axis { label: "operations per second", unit: |value| si(value) + "FLOP/s", log: Some(10.0) },
        series,
    };
    let rows = points.iter().map(|point| {
        let work = &point.work;
        let shape = if point.kernel == "append" {
            format!("{} x {} tokens", point.batch, point.query_len)
        } else {
            format!("{} x {} over {}", point.batch, point.query_len, point.seq_len)
        };
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
        [
            point.kernel.to_owned(),
            point.cache.clone(),
            shape,
            point.bound_by.to_owned(),
            bytes((work.read_bytes + work.written_bytes) as f64),
            si(work.flop as f64),
            seconds(point.roof_seconds),
            seconds(point.measured.median),
            percent(point.share_of_roof),
            or_none(point.predicted_seconds.map(seconds)),
            or_none(point.prediction_error.map(|error| format!("{:+.0} %", 100.0 * error))),
        ]
    });
    let header = [
        "kernel",
        "cache",
        "shape",
        "bound by",
        "bytes",
        "operations",
        "under the roof",
        "measured",
        "of the roof",
        "predicted",
        "error",
    ];
    let goal = percent(PREDICTION_GOAL);
    let verdicts = predictions.iter().map(|prediction| {
        let verdict = if prediction.within_goal { "within" } else { "beyond" };
        [
            prediction.kernel.to_owned(),
            format!("{verdict} {goal}"),
            percent(prediction.median_error),
            percent(prediction.worst_error),
        ]
    });
    let intro = format!(
        "One layer with {num_q_heads} query heads over {num_kv_heads} KV heads of {head_dim}, blocks of {block_size} tokens in random order. Bytes and operations are \
         counted from the plan of the call: operations of visible pairs of queries and keys, bytes as often as tiles read them (a tile's rows may come from \
         caches, so prefill can be above a roof of bytes). Formats, sizes and the loops that limit them take turns in each round."
    );
    Ok(Section {
        id: "kernels",
        title: "What the kernels reach",
        blocks: vec![
            text(intro),
            figure(
                &plot,
                "Decode stands left, where bytes limit it; prefill right, where arithmetic does. The line is the roof.",
            )?,
            table("Every kernel in every format", header, 4, rows),
            Block::Heading { text: "Predicted times" },
            text(
                "The predicted time is that of the same kernel on the smaller shape, times what the longer one of bytes and whole tiles grows by under the roofs, \
                 plus dispatches. It says whether time follows from what is counted; the share of the roof says how good the kernel is.",
            ),
            table("How far predictions are off", ["kernel", "goal", "median error", "worst error"], 2, verdicts),
        ],
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    /// Drivers choose the names of adapters, and users those of files.
    #[test]
    fn names_are_escaped_wherever_they_stand() {
        const HOSTILE: &str = "<script>\"&'</script>";
        let axis = || Axis { label: "x", unit: count, log: None };
        let series = vec![Series::new(HOSTILE, Style::Measured, vec![(1.0, 1.0)])];
        let plot = Plot { title: HOSTILE.into(), x: axis(), y: axis(), series };
        let blocks = vec![
            text(HOSTILE),
            Block::List { items: vec![HOSTILE.into()] },
            figure(&plot, HOSTILE).unwrap(),
            table(HOSTILE, [HOSTILE, ""], 1, [[HOSTILE.to_owned(), HOSTILE.repeat(4)]]),
        ];
        let head = Head {
            adapter: HOSTILE.into(),
            made: HOSTILE,
            folio: "0",
            quick: true,
            seconds: "1 s".into(),
            json: HOSTILE,
            json_link: utf8_percent_encode(HOSTILE, NON_ALPHANUMERIC).to_string(),
        };
        let page = html(&head, &[Section { id: "a", title: "A", blocks }]).unwrap();
        assert!(!page.contains("<script") && !page.contains("</script"), "{page}");
        assert!(page.matches("&lt;script&gt;").count() >= 10 && page.contains("href=\"%3Cscript"), "{page}");
    }
}

//! The table.

use std::fmt::Write;
use std::fs;

use folio::KvFormat;
use serde_json::{Value, json};

use crate::support::shape::Shape;

/// One contestant on one shape.
pub struct Entry {
    pub name: String,
    way: String,
    error: f64,
    pub seconds: Vec<f64>,
}

impl Entry {
    pub fn new(name: &str, way: &str, error: f64) -> Self {
        Self { name: name.to_owned(), way: way.to_owned(), error, seconds: Vec::new() }
    }

    fn median(&self) -> f64 {
        quantile(&self.seconds, 0.5)
    }
}

/// One shape in one format.
pub struct Section {
    shape: Shape,
    format: KvFormat,
    tolerance: f64,
    plain_name: String,
    /// folio first.
    pub entries: Vec<Entry>,
    /// Bytes or floating-point operations per second of the plain loop.
    pub plain_rates: Vec<f64>,
    /// What did not take part, and why.
    pub remarks: Vec<String>,
}

impl Section {
    pub fn new(shape: &Shape, format: KvFormat, tolerance: f64, plain_name: String) -> Self {
        let (entries, plain_rates, remarks) = (Vec::new(), Vec::new(), Vec::new());
        Self { shape: *shape, format, tolerance, plain_name, entries, plain_rates, remarks }
    }

    /// The fastest first.
    fn ranked(&self) -> Vec<&Entry> {
        let mut ranked: Vec<_> = self.entries.iter().collect();
        ranked.sort_by(|a, b| a.median().total_cmp(&b.median()));
        ranked
    }

    fn unit(&self) -> &'static str {
        if self.shape.is_decode() { "GB/s" } else { "GFLOP/s" }
    }

    fn plain_rate(&self) -> f64 {
        quantile(&self.plain_rates, 0.5)
    }

    /// Rows of the table.
    fn rows(&self) -> String {
        let own = self.entries[0].median();
        let mut rows = String::new();
        for (place, entry) in self.ranked().into_iter().enumerate() {
            let time = entry.median();
            let rate = self.shape.work(self.format) as f64 / time;
            let bold = if place == 0 { "**" } else { "" };
            let shape = if place == 0 { format!(" {} {}", self.shape.id, self.format) } else { String::new() };
            let _ = writeln!(
                rows,
                "|{shape} | {bold}{}{bold} | {} | {} | {} to {} | {} {} | {:.0} % | {:.2} | {:.1e} |",
                entry.name,
                entry.way,
                millis(time),
                millis(quantile(&entry.seconds, 0.25)),
                millis(quantile(&entry.seconds, 0.75)),
                digits(rate / 1e9),
                self.unit(),
                100.0 * rate / self.plain_rate(),
                time / own,
                entry.error,
            );
        }
        rows
    }

    pub fn print(&self) -> String {
        let mut text = format!("{}, {}\n", self.shape.describe(), self.format);
        for entry in self.ranked() {
            let _ = writeln!(
                text,
                "  {:>10} ms  {}, {}, error {:.1e}",
                millis(entry.median()),
                entry.name,
                entry.way,
                entry.error
            );
        }
        self.remarks.iter().for_each(|remark| {
            let _ = writeln!(text, "  {remark}");
        });
        text
    }
}

pub struct Report {
    adapter: String,
    command: String,
    date: String,
    note: String,
    load_before: Option<f64>,
    load_after: Option<f64>,
    /// Names, and what they run on.
    pub contestants: Vec<(String, String)>,
    pub sections: Vec<Section>,
    pub remarks: Vec<String>,
    /// Whole models, as the benchmark printed them.
    pub models: String,
}

impl Report {
    pub fn new(adapter: String, command: String, date: String, note: String) -> Self {
        let (contestants, sections, remarks, models) = (Vec::new(), Vec::new(), Vec::new(), String::new());
        Self {
            adapter,
            command,
            date,
            note,
            load_before: load(),
            load_after: None,
            contestants,
            sections,
            remarks,
            models,
        }
    }

    pub fn finish(&mut self) {
        self.load_after = load();
    }

    pub fn json(&self) -> Value {
        let section = |section: &Section| {
            let entry = |entry: &Entry| json!({"name": entry.name, "way": entry.way, "max_error": entry.error, "seconds": entry.seconds});
            json!({
                "shape": section.shape.describe(),
                "format": section.format.to_string(),
                "work": section.shape.work(section.format),
                "unit": section.unit(),
                "tolerance": section.tolerance,
                "plain_loop": section.plain_name,
                "plain_rates": section.plain_rates,
                "entries": section.entries.iter().map(entry).collect::<Vec<_>>(),
                "remarks": section.remarks,
            })
        };
        json!({
            "adapter": self.adapter,
            "cpu": cpu(),
            "command": self.command,
            "date": self.date,
            "note": self.note,
            "load_average": [self.load_before, self.load_after],
            "contestants": self.contestants,
            "sections": self.sections.iter().map(section).collect::<Vec<_>>(),
            "remarks": self.remarks,
            "models": self.models,
        })
    }

    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let rounds = self.sections.iter().map(|section| section.plain_rates.len()).min().unwrap_or(0);
        let _ = writeln!(
            text,
            "{}, {}; {}. `{}`; medians and quartiles of {rounds} rounds.",
            self.date,
            cpu(),
            self.adapter,
            self.command
        );
        if let (Some(before), Some(after)) = (self.load_before, self.load_after) {
            let _ = writeln!(
                text,
                "{}",
                format!("Load average {before:.1} before, {after:.1} after. {}", self.note).trim()
            );
        }
        text.push('\n');
        for (name, about) in &self.contestants {
            let _ = writeln!(text, "* {name}: {about}.");
        }
        for remark in &self.remarks {
            let _ = writeln!(text, "* {remark}.");
        }
        text.push_str("\n| shape, cache | winner | its time / folio's | best other than folio | its time / folio's |\n|---|---|---|---|---|\n");
        for section in &self.sections {
            let ranked = section.ranked();
            let own = section.entries[0].median();
            let other = ranked.iter().find(|entry| entry.name != "folio");
            let other = other.map_or("none | ".into(), |other| format!("{} | {:.2}", other.name, other.median() / own));
            let winner = ranked[0];
            let ratio = winner.median() / own;
            let _ = writeln!(
                text,
                "| {}, {} | **{}** | {ratio:.2} | {other} |",
                section.shape.describe(),
                section.format,
                winner.name
            );
        }
        text.push_str("\n| shape | who | how | ms | quartiles | rate | of the plain loop | of folio's time | largest error |\n|---|---|---|---|---|---|---|---|---|\n");
        self.sections.iter().for_each(|section| text.push_str(&section.rows()));
        text.push('\n');
        for section in &self.sections {
            let (name, rate) = (&section.plain_name, digits(section.plain_rate() / 1e9));
            let _ = writeln!(
                text,
                "* {} {}: the plain loop ({name}) reaches {rate} {}.",
                section.shape.id,
                section.format,
                section.unit()
            );
            for remark in &section.remarks {
                let _ = writeln!(text, "  Not taken: {remark}.");
            }
        }
        if !self.models.is_empty() {
            let models = self.models.trim();
            let _ = writeln!(
                text,
                "\nWhole models, `cargo bench --features model,tune --bench model -- --torch PYTHON`:\n\n```text\n{models}\n```"
            );
        }
        text
    }
}

/// A quantile, between the two nearest samples.
fn quantile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::INFINITY };
    let place = at * last as f64;
    let below = place.floor() as usize;
    sorted[below] + (sorted[(below + 1).min(last)] - sorted[below]) * place.fract()
}

fn millis(seconds: f64) -> String {
    digits(seconds * 1e3)
}

/// Three digits.
fn digits(value: f64) -> String {
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.decimals$}")
}

/// The processor, its vector instructions, and how many cores this process may use.
fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(": ").nth(1)).unwrap_or("").to_owned()
    };
    let flags = field("flags");
    let has = |flag: &str| flags.split(' ').any(|known| known == flag);
    let vectors = if has("avx512f") {
        " (AVX-512)"
    } else if has("avx2") {
        " (AVX2)"
    } else {
        ""
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let name = match field("model name") {
        name if name.is_empty() => std::env::consts::ARCH.to_owned(),
        name => name,
    };
    format!("{cores} cores of {name}{vectors}")
}

/// Processes that wanted to run in the last minute, on average.
fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

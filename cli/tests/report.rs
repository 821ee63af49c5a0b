//! `folio report` and `folio formats`, which draw: run as children of the test.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use folio::{Gpu, GpuOptions};
use serde_json::Value;

fn folio(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_folio")).args(arguments).output().unwrap()
}

fn report(arguments: &[&str]) -> Output {
    folio(&[&["report"], arguments].concat())
}

/// Whether there is an adapter. Without one a test is skipped, or fails if one is required.
fn has_adapter() -> bool {
    let mut options = GpuOptions::default();
    options.adapter_name = std::env::var("FOLIO_ADAPTER").ok();
    let opened = Gpu::open_blocking(options);
    if let Err(error) = &opened {
        assert!(std::env::var("FOLIO_REQUIRE_GPU").as_deref() != Ok("1"), "FOLIO_REQUIRE_GPU=1, but: {error}");
        eprintln!("skipped: {error}");
    }
    opened.is_ok()
}

fn refused(arguments: &[&str]) -> String {
    let output = report(arguments);
    assert!(!output.status.success(), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// The figures are what the schema says, they are plausible, and the page stands for itself.
#[test]
fn a_quick_report_holds_what_its_schema_says() {
    if !has_adapter() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let output = report(&["--quick", "--out", page.to_str().unwrap()]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && output.stdout.is_empty(), "{errors}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    let figures: Value = serde_json::from_str(&fs::read_to_string(page.with_extension("json")).unwrap()).unwrap();
    check_schema(&figures);
    check_figures(&figures);
    check_page(&fs::read_to_string(page).unwrap(), &figures);
}

fn check_schema(figures: &Value) {
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/report.schema.json");
    let schema: Value = serde_json::from_str(&fs::read_to_string(schema).unwrap()).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<_> = validator.iter_errors(figures).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(errors.is_empty(), "{errors:#?}");
    // The schema is not one that takes anything.
    for pointer in
        ["/version", "/adapter/name", "/roofline/points/0/measured/median", "/time/model/curves/0/points/0/context"]
    {
        let mut damaged = figures.clone();
        *damaged.pointer_mut(pointer).unwrap_or_else(|| panic!("no {pointer}")) = Value::Null;
        assert!(!validator.is_valid(&damaged), "{pointer}");
    }
    let mut more = figures.clone();
    more["roofline"]["unknown"] = Value::Null;
    assert!(!validator.is_valid(&more));
}

fn check_figures(figures: &Value) {
    assert_eq!(figures["quick"], true);
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} is no number"));
    let points = figures["roofline"]["points"].as_array().unwrap();
    for kernel in ["decode", "prefill", "append"] {
        assert!(
            points.iter().any(|point| point["kernel"] == kernel && !point["predicted_seconds"].is_null()),
            "{kernel}"
        );
    }
    for point in points {
        let measured = &point["measured"];
        assert!(number(&measured["low"]) <= number(&measured["median"]), "{point}");
        // Nothing is a hundred times as fast as a roof, nor takes no time.
        assert!(
            (1e-6..100.0).contains(&number(&point["share_of_roof"])) && number(&measured["median"]) > 0.0,
            "{point}"
        );
    }
    let memory = &figures["memory"];
    assert_eq!(memory["worst_difference"], 0);
    for pool in memory["allocated"].as_array().unwrap() {
        assert_eq!(pool["formula_bytes"], pool["buffer_bytes"], "{pool}");
    }
    let fragmentation = &memory["fragmentation"];
    assert!(number(&fragmentation["before"]["holes"]) > 0.2, "{fragmentation}");
    assert_eq!((number(&fragmentation["after"]["holes"]), number(&fragmentation["after"]["runs"])), (0.0, 1.0));
    for figure in ["model", "layer"] {
        let curves = figures["time"][figure]["curves"].as_array().unwrap();
        for kind in ["recompute", "decode", "prefill"] {
            assert!(
                curves.iter().any(|curve| curve["kind"] == kind && curve["points"][0]["seconds"]["median"].is_number()),
                "{kind}"
            );
        }
    }
}

/// Self-contained: no script, nothing from elsewhere; figures have titles, tables have captions.
fn check_page(page: &str, figures: &Value) {
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    let mut rest = page.to_owned();
    // Names of namespaces are not fetched.
    rest = rest.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for banned in ["<script", "http://", "https://", "url(", "@import", "src=", "NaN"] {
        assert!(!rest.contains(banned), "{banned}");
    }
    let count = |what: &str| page.matches(what).count();
    assert_eq!(count("<figure>"), count("role=\"img\""));
    assert!(count("<figure>") >= 5 && count("<figure>") == count("<svg width"), "{}", count("<figure>"));
    assert_eq!((count("<table>"), count("<svg width")), (count("<caption>"), count("<title>") - 1));
    // The adapter's name is in it, escaped as minijinja does.
    let name = figures["adapter"]["name"].as_str().unwrap();
    let plain: String = name.chars().take_while(|c| c.is_alphanumeric() || *c == ' ').collect();
    assert!(page.contains(&plain) && page.contains("report.json"), "{name}");
}

#[test]
fn what_can_be_refused_is_refused_before_measuring() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing/report.html");
    assert!(refused(&["--out", missing.to_str().unwrap()]).contains("can't write into"));
    assert!(refused(&["--out", folder.path().join("a.json").to_str().unwrap()]).contains("need the name of a page"));
    let page = folder.path().join("report.html");
    let page = page.to_str().unwrap();
    assert!(refused(&["--out", page, "--adapter", "no such adapter"]).contains("no such adapter"));
    assert!(refused(&["--out", page, "--quick=maybe"]).contains("--quick"));
    assert!(refused(&["--out", page, "--tuning", page]).contains("report.html"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something is left behind");
}

#[test]
fn formats_are_compared_and_drawn() {
    if !has_adapter() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("formats.svg");
    let output =
        folio(&["formats", "--quick", "--tokens", "40", "--pairs", "f16,int8", "--svg", picture.to_str().unwrap()]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    let table = String::from_utf8(output.stdout).unwrap();
    // A token has 2 heads of 128 elements in K and in V: 2 bytes each, or 1 and 4 of a row.
    for (format, bytes) in [("F16", "1024"), ("Int8", "528")] {
        let line =
            table.lines().find(|line| line.trim_start().starts_with(format)).unwrap_or_else(|| panic!("{table}"));
        assert_eq!(line.split_whitespace().nth(1), Some(bytes), "{table}");
    }
    let svg = fs::read_to_string(picture).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("Int8") && svg.contains("mean error"), "{svg}");
    for (arguments, message) in [
        (["--svg", folder.path().to_str().unwrap()], "no regular file"),
        (["--pairs", "f17"], "f17"),
        (["--tokens", "3"], "--tokens"),
    ] {
        let output = folio(&[&["formats", "--quick"], &arguments[..]].concat());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && errors.contains(message), "{errors}");
    }
}

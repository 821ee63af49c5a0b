use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use folio::verify::{Outcome, Report};

use super::*;

fn docs(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(path)
}

fn reports() -> Vec<PathBuf> {
    let files = fs::read_dir(docs("adapters/verify")).expect("reports").map(|file| file.expect("a file").path());
    files.collect()
}

/// The page is what the reports say, and no kernel is wrong on any adapter. `FOLIO_WRITE=1` writes it anew.
#[test]
fn the_page_is_that_of_the_reports() {
    let reports = table::read(&reports()).expect("reports");
    let page = table::page(&reports);
    if std::env::var_os("FOLIO_WRITE").is_some() {
        fs::write(docs("portability.md"), &page).expect("written");
    }
    assert!(fs::read_to_string(docs("portability.md")).expect("the page") == page, "FOLIO_WRITE=1 writes it anew");
    for report in &reports {
        assert!(report.is_within(), "{}: {}", table::name(report), table::summary(report));
        let ids: Vec<_> = report.cases.iter().map(|case| case.id.as_str()).collect();
        let grid = Case::grid();
        assert_eq!(ids, grid.iter().map(Case::id).collect::<Vec<_>>(), "{}", table::name(report));
    }
}

/// What is wrong is said: in the line, on the page, and by [`Report::is_within`].
#[test]
fn what_is_wrong_is_said() {
    let mut report = table::read(&reports()[..1]).expect("a report").swap_remove(0);
    if let Outcome::Computed(accuracy) = &mut report.cases[3].outcome {
        (accuracy.num_beyond, accuracy.worst) = (7, None);
    }
    report.cases[5].outcome = Outcome::Failed("no such kernel".to_owned());
    assert!(!report.is_within());
    let summary = table::summary(&report);
    assert!(summary.contains("1 beyond their bounds, 1 could not be computed; worst not finite"), "{summary}");
    let page = table::page(&[report.clone()]);
    let case = &report.cases[3].id;
    assert!(page.contains(&format!("| {case} | 1 | **not finite** |")), "{page}");
    assert!(page.contains("no such kernel"), "{page}");
    // And it survives JSON.
    let text = serde_json::to_string(&report).expect("JSON");
    assert_eq!(serde_json::from_str::<Report>(&text).expect("a report"), report);
}

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

fn parsed(line: &[&str]) -> Result<Options, clap::Error> {
    Line::try_parse_from([&["verify"], line].concat()).map(|line| line.options)
}

/// A few cases on the adapter at hand; nonsense is refused before anything is computed.
#[test]
fn cases_are_computed_or_refused() {
    assert!(parsed(&["--webgpu", "--matrix-units"]).is_err() && parsed(&["--kernels", "fpga"]).is_err());
    let refused = |line: &[&str], what: &str| {
        let error = format!("{:#}", verify(&parsed(line).expect("options")).expect_err("refused"));
        assert!(error.contains(what), "{error}");
    };
    refused(&["--only", "no such case"], "no case is named like");
    refused(&["--json", "/no/such/folder/report.json"], "/no/such/folder/report.json");
    refused(&["--adapter", "no such adapter"], "no such adapter");
    refused(&["--backend", "glide"], "need vulkan, metal");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_str().expect("a name");
    let options = parsed(&["--only", "decode F32, d 64, 8/2 heads, blocks of 1,", "--json", path]).expect("options");
    if std::env::var("FOLIO_REQUIRE_GPU").as_deref() != Ok("1") && Gpu::open_blocking(GpuOptions::default()).is_err() {
        return;
    }
    assert!(matches!(verify(&options), Err(error) if error.to_string().contains("no case")));
    let options = parsed(&["--only", "decode Int8, d 64, 8/2 heads, blocks of 16", "--json", path]).expect("options");
    assert!(verify(&options).expect("computed"));
    let report = &table::read(&[path.into()]).expect("a report")[0];
    assert_eq!(report.cases.len(), 2, "plain, and with all options");
}

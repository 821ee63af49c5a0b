#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

use super::data::Report;
use super::output::Output;

/// The committed schema is the one of the structures. `FOLIO_BLESS=1` writes it.
#[test]
fn the_schema_describes_the_report() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/report.schema.json");
    let schema = serde_json::to_string_pretty(&schemars::schema_for!(Report)).unwrap() + "\n";
    if std::env::var_os("FOLIO_BLESS").is_some() {
        fs::write(&path, &schema).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap();
    assert!(
        committed == schema,
        "docs/report.schema.json is not that of the structures: run this test with FOLIO_BLESS=1"
    );
}

#[test]
fn targets_are_checked_before_anything_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |path: &Path| format!("{:#}", Output::create(path).err().unwrap());
    assert!(refused(&folder.path().join("x.json")).contains("need the name of a page"));
    assert!(refused(Path::new("..")).contains("need the name of a file"));
    let missing = refused(&folder.path().join("missing/report.html"));
    assert!(missing.contains("can't write into") && missing.contains("missing"), "{missing}");
    assert!(refused(folder.path()).contains("no regular file"));
    fs::create_dir(folder.path().join("r.json")).unwrap();
    assert!(refused(&folder.path().join("r.html")).contains("r.json, which is there"));
    // Refused or given up: nothing is left behind.
    drop(Output::create(&folder.path().join("report.html")).unwrap());
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["r.json"]);
}

#[test]
fn both_files_appear_with_their_names_and_replace_older_ones() {
    let folder = tempfile::tempdir().unwrap();
    let (html, json) = (folder.path().join("a b.html"), folder.path().join("a b.json"));
    fs::write(&html, "old").unwrap();
    let output = Output::create(&html).unwrap();
    assert_eq!(output.json_name(), "a b.json");
    assert_eq!(fs::read_to_string(&html).unwrap(), "old");
    assert_eq!(output.write("page", "{}").unwrap(), [html.clone(), json.clone()]);
    assert_eq!((fs::read_to_string(html).unwrap(), fs::read_to_string(json).unwrap()), ("page".into(), "{}".into()));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

//! The order of the modules, and the length of files. Reads the sources; needs neither features nor a device.
//!
//! A module uses only what stands to its left in [`ORDER`]. Without the feature `wgpu` the compiler enforces where the pure half ends;
//! within the halves this test does. Links in comments don't count.
#![allow(clippy::print_stdout, clippy::panic, reason = "a test may fail, and says which long files it let pass")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each module uses only those before it.
const ORDER: [&str; 12] =
    ["ids", "error", "format", "layout", "sequence", "plan", "kernel", "gpu", "cache", "attention", "measure", "tune"];
/// Those that use all of them. `engine` also uses `model` and `schedule`.
const TOP: [&str; 3] = ["model", "engine", "verify"];
/// Modules that stand beside the order, and what they may use. Only `tune` and `verify`, which judge kernels, may use `reference`: it shares no
/// code with what it checks.
const BESIDE: [(&str, &[&str]); 3] =
    [("files", &[]), ("reference", &["error", "format", "layout"]), ("schedule", &["error", "layout"])];
/// Who may use `files`.
const READ_FILES: [&str; 2] = ["cache", "model"];
/// Modules that exist without the feature `wgpu`.
const PURE: [&str; 10] =
    ["ids", "error", "format", "layout", "sequence", "plan", "kernel", "files", "reference", "schedule"];

/// Lines that a file has at most, so that it can be read in one sitting.
const MAX_LINES: usize = 600;
/// Longer ones, and why.
const LONG: [(&str, &str); 6] = [
    ("src/sequence/manager/tests/model.rs", "a model of the whole manager, and its comparison"),
    ("tests/gpu/bad_input.rs", "one case per call that can be misused"),
    ("tests/gpu/cache.rs", "one case per promise of the cache"),
    ("tests/gpu/movable.rs", "one case per way to move a sequence, by one set of helpers"),
    ("tests/model/bad_files.rs", "one case per way to damage a checkpoint"),
    ("tests/model/loading.rs", "one case per way to load a checkpoint"),
];

/// What a module may use besides itself.
fn allowed(module: &str) -> Option<BTreeSet<&'static str>> {
    if let Some((_, uses)) = BESIDE.iter().find(|(name, _)| *name == module) {
        return Some(uses.iter().copied().collect());
    }
    let place = if TOP.contains(&module) { ORDER.len() } else { ORDER.iter().position(|&name| name == module)? };
    let mut uses: BTreeSet<_> = ORDER[..place].iter().copied().collect();
    uses.extend((module == "engine").then_some(["model", "schedule"]).into_iter().flatten());
    uses.extend(READ_FILES.contains(&module).then_some("files"));
    uses.extend(["tune", "verify"].contains(&module).then_some("reference"));
    Some(uses)
}

/// Words and punctuation of a source: comments, strings, characters and lifetimes left out.
fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let starts = |i: usize, what: &str| what.chars().enumerate().all(|(k, c)| chars.get(i + k) == Some(&c));
    let (mut tokens, mut i) = (Vec::new(), 0);
    while i < chars.len() {
        let c = chars[i];
        if starts(i, "//") {
            while i < chars.len() && chars[i] != '\n' {
                i += 1;
            }
        } else if starts(i, "/*") {
            let mut depth = 0;
            loop {
                if starts(i, "/*") {
                    (depth, i) = (depth + 1, i + 2);
                } else if starts(i, "*/") {
                    (depth, i) = (depth - 1, i + 2);
                } else {
                    i += 1;
                }
                if depth == 0 || i >= chars.len() {
                    break;
                }
            }
        } else if c == '"' {
            i += 1;
            while i < chars.len() && chars[i] != '"' {
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if c == '\'' {
            // A character, or a lifetime, which has no second quote.
            let end = if chars.get(i + 1) == Some(&'\\') { (i + 3..).find(|&k| chars[k] == '\'') } else { Some(i + 2) };
            i = end.filter(|&end| chars.get(end) == Some(&'\'')).map_or(i + 1, |end| end + 1);
        } else if is_word(c) {
            let start = i;
            while i < chars.len() && is_word(chars[i]) {
                i += 1;
            }
            let word: String = chars[start..i].iter().collect();
            let hashes = chars[i..].iter().take_while(|&&c| c == '#').count();
            if ["r", "br", "cr"].contains(&word.as_str()) && chars.get(i + hashes) == Some(&'"') {
                let end = format!("\"{}", "#".repeat(hashes));
                i = (i + hashes + 1..chars.len()).find(|&k| starts(k, &end)).map_or(chars.len(), |k| k + end.len());
            } else {
                tokens.push(word);
            }
        } else if starts(i, "::") {
            tokens.push("::".into());
            i += 2;
        } else {
            if !c.is_whitespace() {
                tokens.push(c.into());
            }
            i += 1;
        }
    }
    tokens
}

/// The paths of a use tree, or of a path in an expression, that begins at a token.
fn paths(tokens: &[String], at: &mut usize) -> Vec<Vec<String>> {
    let mut path = Vec::new();
    loop {
        match tokens.get(*at).map(String::as_str) {
            Some("{") => {
                let mut all = Vec::new();
                *at += 1;
                while tokens.get(*at).is_some_and(|token| token != "}") {
                    let before = *at;
                    all.extend(paths(tokens, at).into_iter().map(|rest| [path.clone(), rest].concat()));
                    // Behind a path: a comma, or `as` and a name.
                    while tokens.get(*at).is_some_and(|token| token != "," && token != "}") {
                        *at += 1;
                    }
                    *at += usize::from(tokens.get(*at).is_some_and(|token| token == ","));
                    assert!(*at > before, "a use tree that this test can't read");
                }
                *at += 1;
                return all;
            }
            Some(word) => path.push(word.to_owned()),
            None => return vec![path],
        }
        *at += 1;
        let goes_on = tokens.get(*at).is_some_and(|token| token == "::");
        // `::<` belongs to generics.
        if !goes_on || tokens.get(*at + 1).is_some_and(|token| token == "<") {
            return vec![path];
        }
        *at += 1;
    }
}

/// The modules of a file below `src/`: `cache/mod.rs` is `[cache]`.
fn module_of(file: &str) -> Vec<String> {
    let mut parts: Vec<_> = file.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    if parts.last().is_some_and(|last| last == "mod" || last == "lib") {
        parts.pop();
    }
    parts
}

/// Which module each name at the root comes from: `pub use error::{Error, ..}`.
fn re_exports(lib: &str) -> BTreeMap<String, String> {
    let tokens = tokens(lib);
    let mut names = BTreeMap::new();
    for i in 0..tokens.len() {
        if tokens[i] == "use" {
            for path in paths(&tokens, &mut (i + 1)).iter().filter(|path| path.len() > 1) {
                names.insert(path[path.len() - 1].clone(), path[0].clone());
            }
        }
    }
    names
}

/// Every use of what a module must not know, as "file: path".
fn violations(sources: &BTreeMap<String, String>) -> Vec<String> {
    let names = sources.get("lib.rs").map(|lib| re_exports(lib)).unwrap_or_default();
    let mut found = Vec::new();
    for (file, text) in sources.iter().filter(|(file, _)| *file != "lib.rs") {
        let module = module_of(file);
        let Some(allowed) = allowed(&module[0]) else {
            found.push(format!("{file}: a module that has no place in the order"));
            continue;
        };
        let tokens = tokens(text);
        // Inline modules that the token stands in, with the depth of their braces.
        let (mut inline, mut depth) = (Vec::new(), 0_usize);
        for i in 0..tokens.len() {
            let next = tokens.get(i + 1).map(String::as_str);
            match tokens[i].as_str() {
                "mod" if tokens.get(i + 2).is_some_and(|token| token == "{") => inline.push(depth),
                "{" => depth += 1,
                "}" => {
                    depth = depth.saturating_sub(1);
                    if inline.last() == Some(&depth) {
                        inline.pop();
                    }
                }
                "path" if i > 1 && tokens[i - 1] == "[" && tokens[i - 2] == "#" => {
                    found.push(format!("{file}: #[path], which hides where a module is"));
                }
                "wgpu" if next == Some("::") && PURE.contains(&module[0].as_str()) => {
                    found.push(format!("{file}: wgpu, in the pure half"))
                }
                _ => {}
            }
            let starts_path = i == 0 || tokens[i - 1] != "::";
            if !starts_path || !["crate", "super", "self"].contains(&tokens[i].as_str()) {
                continue;
            }
            for path in paths(&tokens, &mut i.clone()) {
                let supers = path.iter().filter(|&part| part == "super").count();
                let is_root = path[0] == "crate" || supers >= module.len() + inline.len();
                let Some(name) = path.iter().find(|part| !["crate", "super", "self"].contains(&part.as_str())) else {
                    continue;
                };
                if !is_root {
                    continue;
                }
                let used = names.get(name).unwrap_or(name);
                if *used != module[0] && !allowed.contains(used.as_str()) {
                    found.push(format!("{file}: {}, of {used}", path.join("::")));
                }
            }
        }
    }
    found
}

fn files_below(folder: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files_below(&path, endings, found);
        } else if path.extension().is_some_and(|ending| endings.iter().any(|known| ending == *known)) {
            found.push(path);
        }
    }
}

/// Texts of the files of a folder of the repository, by their names below it.
fn read(folder: &str, endings: &[&str]) -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files = Vec::new();
    files_below(&root, endings, &mut files);
    let name = |path: &Path| {
        let parts = path.strip_prefix(&root).expect("below the folder").iter();
        parts.map(|part| part.to_str().expect("UTF-8")).collect::<Vec<_>>().join("/")
    };
    files.iter().map(|path| (name(path), fs::read_to_string(path).expect("a source"))).collect()
}

#[test]
fn modules_use_only_what_stands_to_their_left() {
    let sources = read("src", &["rs"]);
    assert!(sources.len() > 50, "{} sources", sources.len());
    let found = violations(&sources);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_order_is_the_one_of_lib() {
    let lib = tokens(&read("src", &["rs"])["lib.rs"]);
    let mut declared: BTreeSet<&str> = BTreeSet::new();
    declared.extend(lib.windows(3).filter(|t| t[0] == "mod" && t[2] == ";").map(|t| t[1].as_str()));
    let known = ORDER.into_iter().chain(BESIDE.map(|(name, _)| name)).chain(TOP).collect();
    assert_eq!(declared, known);
}

/// The check, checked: one source at a time, with a `lib.rs` that re-exports.
#[test]
fn every_way_to_name_a_module_is_seen() {
    let lib = "pub use cache::{KvCache, Step as Reserved};\npub use error::Error;\npub use plan::AttentionConfig;";
    let check = |file: &str, text: &str| {
        violations(&[("lib.rs", lib), (file, text)].map(|(file, text)| (file.to_owned(), text.to_owned())).into())
    };
    for (file, text) in [
        ("sequence/manager.rs", "use crate::plan::StepPlan;"),
        ("sequence/mod.rs", "use super::plan::StepPlan;"),
        ("sequence/manager.rs", "use super::super::plan;"),
        ("sequence/manager.rs", "use crate::{error::Error, plan::{self, StepPlan}};"),
        ("sequence/manager.rs", "use crate::{Error as E, AttentionConfig};"),
        ("sequence/manager.rs", "fn f() -> crate::plan::StepPlan { todo!() }"),
        ("sequence/manager.rs", "fn f<'a>(c: char) { if c == '\"' { crate::plan::linear_grid::<u8>() } }"),
        ("sequence/manager.rs", "mod tests { fn f() {} use super::super::super::plan; }"),
        ("sequence/manager.rs", "mod tests { fn f() { {} } }\nuse super::super::plan;"),
        ("plan/step.rs", "pub(crate) use crate::kernel::Variant;"),
        ("plan/step.rs", "use crate::KvCache;"),
        ("plan/step.rs", "use wgpu::Buffer;"),
        ("ids.rs", "use crate::error::Error;"),
        ("gpu/mod.rs", "use crate::cache::KvCache;"),
        ("cache/mod.rs", "use crate::Attention; use crate::attention::Attention;"),
        ("attention.rs", "use crate::files;"),
        ("files.rs", "use crate::Error;"),
        ("reference/mod.rs", "use crate::plan::WorkItem;"),
        ("model/mod.rs", "use crate::reference::attention;"),
        ("unknown/mod.rs", ""),
        ("model/mod.rs", "use crate::engine::Engine;"),
        ("schedule/mod.rs", "use crate::sequence::Manager;"),
        ("plan/step.rs", "#[path = \"x.rs\"] mod x;"),
    ] {
        assert!(!check(file, text).is_empty(), "{file} may: {text}");
    }
    for (file, text) in [
        ("sequence/manager.rs", "use crate::error::Error; use crate::{Error, layout::KvCacheConfig}; use super::pool;"),
        (
            "sequence/manager.rs",
            "/// [`crate::plan::StepPlan`]\n//! crate::plan\n/* crate::plan /* nested */ crate::plan */",
        ),
        ("sequence/manager.rs", "const TEXT: &str = \"crate::plan\"; const RAW: &str = r#\"crate::\"plan\"#;"),
        (
            "sequence/manager/tests.rs",
            "use super::super::super::sequence; mod plan { use super::super::super::Batch; }",
        ),
        ("sequence/manager.rs", "#[cfg(feature = \"wgpu\")] pub(in crate::sequence) fn wgpu() {}"),
        ("plan/step.rs", "use crate::sequence::Batch; use crate::AttentionConfig; use crate::plan::WorkItem;"),
        ("gpu/mod.rs", "use wgpu::Buffer; use crate::kernel::Variant;"),
        ("cache/save.rs", "use crate::files::{self, Fault};"),
        ("model/mod.rs", "use crate::{KvCache, attention::Attention, files};"),
        ("reference/mod.rs", "use crate::format::KvFormat; use super::reference::Problem;"),
    ] {
        assert_eq!(check(file, text), [""; 0], "{file}: {text}");
    }
}

#[test]
fn files_can_be_read_in_one_sitting() {
    let mut long = BTreeMap::new();
    for folder in ["src", "shaders", "tests", "examples", "benches"] {
        for (file, text) in read(folder, &["rs", "wgsl"]) {
            let lines = text.lines().count();
            if lines > MAX_LINES {
                long.insert(format!("{folder}/{file}"), lines);
            }
        }
    }
    let mut problems = Vec::new();
    for (file, lines) in &long {
        let reason = LONG.iter().find(|(name, _)| name == file).map(|(_, reason)| *reason);
        println!("{lines} lines: {file}: {}", reason.unwrap_or("no reason"));
        if reason.is_none() {
            problems.push(format!("{file} has {lines} lines: cut it, or give it a reason in LONG"));
        }
    }
    for (file, _) in LONG.iter().filter(|(file, _)| !long.contains_key(*file)) {
        problems.push(format!("{file} has at most {MAX_LINES} lines now: take it from LONG"));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

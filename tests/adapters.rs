//! The tunings in `docs/adapters`: each is sound, and what is written from them is what they say.
//!
//! `FOLIO_WRITE=1 cargo test --release --features tune --test adapters` writes `docs/adapters/README.md`'s table and
//! `src/kernel/tuning/measured.rs` anew.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use folio::kernel::tuning::{Sizes, TunedFor, TunedKernel, TunedShape, TunedSplit, Tuning};
use folio::kernel::{AttendFlags, Kernel, MatrixSize, Target, Variant, Vendor};
use folio::{KvCacheConfig, KvFormat, Profile};

/// Folders, and the adapters whose files they hold.
const CLASSES: [(&str, Profile, Vendor); 5] = [
    ("amd", Profile::Gpu, Vendor::Amd),
    ("apple", Profile::Gpu, Vendor::Apple),
    ("cpu", Profile::Cpu, Vendor::Other),
    ("intel", Profile::Gpu, Vendor::Intel),
    ("nvidia", Profile::Gpu, Vendor::Nvidia),
];

/// What at least one file must gain before all adapters of its class get its sizes. The tuner asks for 3 % on the adapter at hand; a default also
/// reaches adapters that nobody measured.
const MARGIN: f64 = 0.1;

/// Lines of the README between which the table stands.
const MARKERS: [&str; 2] = ["<!-- written by tests/adapters.rs -->\n", "<!-- end -->\n"];

struct File {
    /// Of the folder.
    class: usize,
    name: String,
    tuning: Tuning,
}

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

/// All files, by class and name.
fn files() -> Vec<File> {
    let mut files = Vec::new();
    for entry in fs::read_dir(path("docs/adapters")).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        if folder.is_file() {
            assert_eq!(name, "README.md", "files lie in the folder of their class");
            continue;
        }
        if name == "verify" {
            // Reports of accuracy, which the command line's tests read.
            continue;
        }
        let class = CLASSES.iter().position(|class| class.0 == name).unwrap_or_else(|| panic!("no class {name}"));
        for entry in fs::read_dir(folder).unwrap() {
            let file = entry.unwrap().path();
            let text = fs::read_to_string(&file).unwrap();
            let tuning = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            files.push(File { class, name: file.file_name().unwrap().to_str().unwrap().to_owned(), tuning });
        }
    }
    files.sort_by(|a, b| (a.class, &a.name).cmp(&(b.class, &b.name)));
    files
}

/// The name of a file: what the tuning is for, in letters, digits and single hyphens. `llvmpipe (LLVM 15.0.6, 256 bits)` with the driver
/// `llvmpipe Mesa 22.3.6 (LLVM 15.0.6)` by Vulkan begins with `llvmpipe-`, and ends in `.json`.
fn is_sane(name: &str, tuned_for: &TunedFor) -> bool {
    let Some(stem) = name.strip_suffix(".json") else { return false };
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.';
    let words: Vec<_> = stem.split('-').collect();
    let first = tuned_for.adapter.split(|c: char| !c.is_ascii_alphanumeric()).find(|word| !word.is_empty());
    stem.len() <= 60
        && words.iter().all(|word| word.starts_with(|c: char| c.is_ascii_alphanumeric()) && word.chars().all(plain))
        && first.is_some_and(|first| words[0] == first.to_lowercase())
}

/// Everything that an adapter of a class may offer.
fn targets(class: usize, matrix_rows: u32, packed_dots: bool) -> Vec<Target> {
    let (_, profile, vendor) = CLASSES[class];
    let matrix = match matrix_rows {
        8 => Some(MatrixSize::Eight),
        16 => Some(MatrixSize::Sixteen),
        _ => None,
    };
    let mut targets = Vec::new();
    for int64 in [false, true] {
        let target = Target {
            profile,
            vendor,
            subgroups: false,
            subgroup_size: 0,
            int64,
            matrix,
            packed_dots,
            enable_directives: false,
        };
        targets.push(target);
        targets.extend([0, 4, 8, 16, 32, 64].map(|subgroup_size| Target { subgroups: true, subgroup_size, ..target }));
    }
    targets
}

fn kernel_of(shape: &TunedShape) -> Option<Kernel> {
    Kernel::ALL.into_iter().find(|kernel| kernel.entry_point() == shape.kernel)
}

/// Whether some target of the class may run these sizes.
fn is_candidate(class: usize, tuned_for: &TunedFor, entry: &TunedKernel) -> bool {
    let TunedShape { head_dim, group_size, k_format, v_format, .. } = &entry.shape;
    let (Some(kernel), Ok(k), Ok(v)) = (kernel_of(&entry.shape), k_format.parse(), v_format.parse()) else {
        return false;
    };
    let config = KvCacheConfig::new(1, 1, *head_dim).with_formats(k, v);
    targets(class, tuned_for.matrix_rows, tuned_for.packed_dots).into_iter().any(|target| {
        let variant = Variant::new(kernel, target, &config, *group_size, AttendFlags::default());
        TunedShape::of(&variant) == entry.shape && variant.candidates().contains(&entry.sizes)
    })
}

/// What the files of a class say about a shape. On CPU adapters, where the lanes of an attention kernel are the adapter's, each number of lanes is a
/// shape of its own.
type Key = (usize, String, u32, u32, String, String, u32);

fn key(class: usize, entry: &TunedKernel) -> Key {
    // (Shapes with values of another width are no entries: none of the variants above has them.)
    let TunedShape { kernel, head_dim, value_dim: _, group_size, k_format, v_format } = entry.shape.clone();
    let lanes = if CLASSES[class].1 == Profile::Cpu && kernel != "append" { entry.sizes.workgroup_size } else { 0 };
    (class, kernel, head_dim, group_size, k_format, v_format, lanes)
}

/// The new sizes over the default's, and how many of both times.
fn gain(entry: &TunedKernel) -> f64 {
    1.0 - entry.nanos as f64 / entry.default_nanos as f64
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Row(Sizes),
    /// Why the general rule stays.
    Rule(&'static str),
}

/// A row needs a file that gains [`MARGIN`] by sizes alone, and none that chose others.
fn verdict(entries: &[&TunedKernel]) -> Verdict {
    let sizes = entries[0].sizes;
    if entries.iter().any(|entry| entry.sizes != sizes) {
        Verdict::Rule("files disagree")
    } else if entries.iter().any(|entry| entry.split.is_none() && gain(entry) >= MARGIN) {
        Verdict::Row(sizes)
    } else if entries.iter().any(|entry| gain(entry) >= MARGIN) {
        Verdict::Rule("gained with other splits, too")
    } else {
        Verdict::Rule("less than 10 %")
    }
}

fn verdicts(files: &[File]) -> BTreeMap<Key, Verdict> {
    let mut entries: BTreeMap<Key, Vec<&TunedKernel>> = BTreeMap::new();
    for file in files {
        for entry in &file.tuning.kernels {
            entries.entry(key(file.class, entry)).or_default().push(entry);
        }
    }
    entries.into_iter().map(|(key, entries)| (key, verdict(&entries))).collect()
}

/// The source with the rows.
fn source(verdicts: &BTreeMap<Key, Verdict>) -> String {
    let mut rows = String::new();
    let mut uses = (false, false);
    for ((class, kernel, head_dim, group_size, k, v, _), verdict) in verdicts {
        let Verdict::Row(sizes) = verdict else { continue };
        let (_, profile, vendor) = CLASSES[*class];
        uses.0 = true;
        uses.1 |= profile == Profile::Gpu;
        let class = match profile {
            Profile::Cpu => "Class::Cpu".to_owned(),
            Profile::Gpu => format!("Class::Gpu(Vendor::{vendor:?})"),
        };
        let kernel = Kernel::ALL.into_iter().find(|known| known.entry_point() == kernel).unwrap();
        let format = |name: &str| format!("KvFormat::{:?}", name.parse::<KvFormat>().unwrap());
        let Sizes { workgroup_size, tile_q, tile_kv, int64, subgroups, packed_dots } = sizes;
        write!(
            rows,
            "
    Row {{
        class: {class},
        kernel: Kernel::{kernel:?},
        head_dim: {head_dim},
        group_size: {group_size},
        formats: [{}, {}],
        sizes: Sizes {{ workgroup_size: {workgroup_size}, tile_q: {tile_q}, tile_kv: {tile_kv}, int64: {int64}, subgroups: {subgroups}, packed_dots: {packed_dots} }},
    }},",
            format(k),
            format(v),
        )
        .unwrap();
    }
    let mut text = String::from("//! Written from `docs/adapters`, see the page there. Not to be edited.\n\n");
    if uses.0 {
        text += "use super::Sizes;\nuse super::rows::{Class, Row};\nuse crate::format::KvFormat;\n";
        text += if uses.1 { "use crate::kernel::target::Vendor;\n" } else { "" };
        text += "use crate::kernel::variant::Kernel;\n";
        text + "\n#[rustfmt::skip]\npub(super) const ROWS: &[Row] = &[" + &rows + "\n];\n"
    } else {
        text + "use super::rows::Row;\n\npub(super) const ROWS: &[Row] = &[];\n"
    }
}

/// The table of the README.
fn table(files: &[File], verdicts: &BTreeMap<Key, Verdict>) -> String {
    let mut text = String::new();
    for file in files {
        let link = format!("[{0}/{1}]({0}/{1})", CLASSES[file.class].0, file.name);
        writeln!(text, "\n{link}: {}.\n", file.tuning.tuned_for).unwrap();
        text +=
            "| kernel | workload | chosen | of the default's time | default for the class |\n|---|---|---|---|---|\n";
        for entry in &file.tuning.kernels {
            let TunedShape { kernel, head_dim, k_format, v_format, .. } = &entry.shape;
            let formats = if k_format == v_format { k_format.clone() } else { format!("{k_format}:{v_format}") };
            let split = entry.split.map_or(String::new(), |TunedSplit { target_workgroups, min_split_len }| {
                format!("; {target_workgroups} workgroups, splits of {min_split_len} keys or more")
            });
            let becomes = match verdicts[&key(file.class, entry)] {
                Verdict::Row(_) => "these sizes",
                Verdict::Rule(why) => why,
            };
            let (sizes, time) = (entry.sizes, 1.0 - gain(entry));
            writeln!(
                text,
                "| {kernel} d{head_dim} {formats} | {} | {sizes}{split} | {time:.2} | {becomes} |",
                entry.workload
            )
            .unwrap();
        }
    }
    text + "\n"
}

#[test]
fn every_file_is_sound() {
    for File { class, name, tuning } in files() {
        assert!(is_sane(&name, &tuning.tuned_for), "{name} for {}", tuning.tuned_for);
        assert!(!tuning.kernels.is_empty(), "{name} is empty");
        for entry in &tuning.kernels {
            assert!(entry.nanos > 0 && entry.default_nanos > 0, "{name}: {entry:?}");
            assert!(is_candidate(class, &tuning.tuned_for, entry), "{name}: no candidate: {entry:?}");
        }
    }
}

#[test]
fn what_is_written_from_the_files_is_up_to_date() {
    let files = files();
    let verdicts = verdicts(&files);
    let readme = fs::read_to_string(path("docs/adapters/README.md")).unwrap();
    let (head, rest) = readme.split_once(MARKERS[0]).expect("the first marker");
    let (_, tail) = rest.split_once(MARKERS[1]).expect("the second marker");
    let page = [head, MARKERS[0], &table(&files, &verdicts), MARKERS[1], tail].concat();
    for (name, text) in [("docs/adapters/README.md", page), ("src/kernel/tuning/measured.rs", source(&verdicts))] {
        if std::env::var_os("FOLIO_WRITE").is_some() {
            fs::write(path(name), &text).unwrap();
        }
        assert!(fs::read_to_string(path(name)).unwrap() == text, "{name} is stale: FOLIO_WRITE=1 writes it");
    }
}

/// Rows reach the variants of their class.
#[test]
fn every_row_is_the_default_of_some_target() {
    for ((class, kernel, head_dim, group_size, k, v, lanes), verdict) in verdicts(&files()) {
        let Verdict::Row(sizes) = verdict else { continue };
        let config = KvCacheConfig::new(1, 1, head_dim).with_formats(k.parse().unwrap(), v.parse().unwrap());
        let kernel = Kernel::ALL.into_iter().find(|known| known.entry_point() == kernel).unwrap();
        let mut variants = targets(class, 0, false)
            .into_iter()
            .map(|target| Variant::new(kernel, target, &config, group_size, AttendFlags::default()));
        assert!(variants.any(|variant| variant.sizes() == sizes), "{kernel:?} d{head_dim} of {lanes} lanes: {sizes}");
    }
}

fn entry(tile_kv: u32, nanos: u64, split: bool) -> TunedKernel {
    TunedKernel {
        shape: TunedShape {
            kernel: "decode".into(),
            head_dim: 64,
            value_dim: None,
            group_size: 4,
            k_format: "F16".into(),
            v_format: "F16".into(),
        },
        sizes: Sizes { workgroup_size: 128, tile_q: 4, tile_kv, int64: false, subgroups: true, packed_dots: false },
        split: split.then_some(TunedSplit { target_workgroups: 64, min_split_len: 256 }),
        workload: String::new(),
        nanos,
        default_nanos: 1000,
    }
}

#[test]
fn a_row_needs_a_clear_gain_and_no_objection() {
    let [clear, little, with_split, other] =
        [entry(16, 899, false), entry(16, 990, false), entry(16, 500, true), entry(64, 400, false)];
    assert_eq!(verdict(&[&clear]), Verdict::Row(clear.sizes));
    // A file made with the row in place gains nothing more.
    assert_eq!(verdict(&[&little, &clear]), Verdict::Row(clear.sizes));
    assert_eq!(verdict(&[&little]), Verdict::Rule("less than 10 %"));
    assert_eq!(verdict(&[&with_split, &little]), Verdict::Rule("gained with other splits, too"));
    assert_eq!(verdict(&[&clear, &other]), Verdict::Rule("files disagree"));
    assert_eq!(verdict(&[&other, &clear]), Verdict::Rule("files disagree"));
}

/// What is written is Rust, formatted as the rest is, and names the class.
#[test]
fn rows_are_written_as_source() {
    let tuning = |entry| Tuning { tuned_for: tuned_for("NVIDIA X"), kernels: vec![entry], linear: Vec::new() };
    let file = |class, entry| File { class, name: "x.json".into(), tuning: tuning(entry) };
    let text = source(&verdicts(&[file(4, entry(16, 500, false)), file(0, entry(64, 950, false))]));
    assert!(text.contains("class: Class::Gpu(Vendor::Nvidia),\n        kernel: Kernel::Decode,"), "{text}");
    assert!(text.contains("formats: [KvFormat::F16, KvFormat::F16],") && text.contains("tile_kv: 16,"), "{text}");
    assert!(!text.contains("Amd") && !text.contains("tile_kv: 64"), "{text}");
}

fn tuned_for(adapter: &str) -> TunedFor {
    TunedFor {
        adapter: adapter.into(),
        backend: "vulkan".into(),
        driver: "1".into(),
        full_checks: false,
        matrix_rows: 0,
        packed_dots: false,
        folio: "0.1.0".into(),
    }
}

/// The checks, checked.
#[test]
fn damaged_files_are_noticed() {
    let llvmpipe = tuned_for("llvmpipe (LLVM 15.0.6, 256 bits)");
    for name in ["llvmpipe-mesa-22.3.6.json", "llvmpipe.json"] {
        assert!(is_sane(name, &llvmpipe), "{name}");
    }
    for name in
        ["tuning.json", "llvmpipe.txt", "llvmpipe-.json", "llvmpipe mesa.json", "Llvmpipe.json", "llvmpipe-..json"]
    {
        assert!(!is_sane(name, &llvmpipe), "{name}");
    }
    let good = entry(16, 900, false);
    assert!(is_candidate(0, &llvmpipe, &good));
    // The lanes of no CPU adapter.
    assert!(!is_candidate(2, &llvmpipe, &good));
    let mut bad = vec![good.clone(); 4];
    bad[0].sizes.tile_kv = 17;
    bad[1].shape.kernel = "merge_all".into();
    bad[2].shape.head_dim = 63;
    bad[3].shape.k_format = "F17".into();
    for bad in bad {
        assert!(!is_candidate(0, &llvmpipe, &bad), "{bad:?}");
    }
}

//! Every variant of every kernel, seen by naga as wgpu sees it: it composes, parses, validates with exactly the
//! features that it claims, translates to every backend's language, and has the interface that Rust describes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::offset_of;

use folio::kernel::{Access, Kernel, ShaderFeatures, Variant, bindings, compose};
use folio::plan::{AttendParams, CacheParams, PackParams};
use folio::{KvFormat, Profile};
use naga::valid::{Capabilities, ModuleInfo, ValidationError, ValidationFlags, Validator};
use naga::{AddressSpace, Literal, Module, Scalar, StorageAccess, TypeInner, WithSpan};

use crate::translate::translate;
use crate::variants;

/// WebGPU's defaults, which folio asks for nothing above.
const MAX_WORKGROUP_BYTES: u32 = 16_384;
const MAX_WORKGROUP_SIZE: u32 = 256;
const MAX_STORAGE_BUFFERS: usize = 8;

/// With matrix units kernels may take what all of their adapters have; where a device has less, others run.
const MAX_MATRIX_WORKGROUP_BYTES: u32 = 32_768;
const MATRIX_DIRECTIVES: &str = "enable f16;\nenable wgpu_cooperative_matrix;\n";

#[test]
fn append_variants() {
    check_all(Kernel::Append);
}

#[test]
fn append_qkv_variants() {
    check_all(Kernel::AppendQkv);
}

#[test]
fn copy_blocks_variants() {
    check_all(Kernel::CopyBlocks);
}

#[test]
fn move_rows_variants() {
    check_all(Kernel::MoveRows);
}

#[test]
fn pack_blocks_variants() {
    check_all(Kernel::PackBlocks);
}

#[test]
fn gather_variants() {
    check_all(Kernel::Gather);
}

#[test]
fn decode_variants() {
    check_all(Kernel::Decode);
}

#[test]
fn prefill_variants() {
    check_all(Kernel::Prefill);
}

#[test]
fn merge_variants() {
    check_all(Kernel::Merge);
}

#[test]
fn rope_variants() {
    check_all(Kernel::Rope);
}

/// Checks a kernel's variants. Reports every kind of problem once, with one of the variants that have it.
fn check_all(kernel: Kernel) {
    let variants = variants::of_kernel(kernel);
    // By check and first line: what follows it (code, variables) differs from variant to variant.
    let mut found: BTreeMap<(&str, String), (String, Vec<&Variant>)> = BTreeMap::new();
    for variant in &variants {
        let mut problems = Problems::default();
        check(variant, &mut problems);
        for (check, message) in problems.0 {
            let first_line = message.lines().next().unwrap_or_default().to_owned();
            found.entry((check, first_line)).or_insert((message, Vec::new())).1.push(variant);
        }
    }
    println!("{}: {} variants", kernel.entry_point(), variants.len());
    let mut report = String::new();
    let mut shown: BTreeMap<&str, usize> = BTreeMap::new();
    for ((check, _), (message, variants)) in &found {
        let shown = shown.entry(check).or_default();
        *shown += 1;
        // Enough to see the pattern.
        if *shown <= 5 {
            let _ = writeln!(report, "{check}: {message}\n  {} variants, such as {:?}", variants.len(), variants[0]);
        }
    }
    assert!(found.is_empty(), "{}: problems with {shown:?}\n{report}", kernel.entry_point());
    check_claims(kernel, &variants);
}

/// Features that are claimed are needed, in each profile by some variant at least. (A shape may happen to do without
/// what its kernel uses. That keeps no device out: features are claimed only where the device has them.)
fn check_claims(kernel: Kernel, variants: &[Variant]) {
    for profile in [Profile::Cpu, Profile::Gpu] {
        for (feature, has, without) in FEATURES {
            let claims = |variant: &&Variant| variant.target.profile == profile && has(variant.features());
            let needs = |variant: &Variant| {
                let module = compose(variant).ok().and_then(|text| naga::front::wgsl::parse_str(&text).ok());
                module.is_none_or(|module| validate(variant, &module, without(variant.features())).is_err())
            };
            let name = kernel.entry_point();
            let mut claiming = variants.iter().filter(claims).peekable();
            let is_vain = claiming.peek().is_some() && !claiming.any(needs);
            assert!(!is_vain, "{name} of {profile:?} claims {feature:?}, but no variant needs it");
        }
    }
}

/// What is wrong with a variant: which check failed, and how.
#[derive(Default)]
struct Problems(Vec<(&'static str, String)>);

impl Problems {
    fn add(&mut self, check: &'static str, message: impl Into<String>) {
        self.0.push((check, message.into()));
    }

    fn expect_eq<T: PartialEq + std::fmt::Debug>(&mut self, check: &'static str, shader: T, rust: T) {
        if shader != rust {
            self.add(check, format!("the shader has {shader:?}, Rust says {rust:?}"));
        }
    }
}

fn check(variant: &Variant, problems: &mut Problems) {
    let text = match compose(variant) {
        Ok(text) => text,
        Err(error) => return problems.add("compose", error.to_string()),
    };
    // The directives that naga wants for matrix units, which no browser has.
    let directives = if variant.features().matrix { MATRIX_DIRECTIVES } else { "" };
    match text.strip_prefix(directives) {
        Some(rest) => check_text(rest, problems),
        None => problems.add("directives", format!("the text doesn't begin with {directives:?}")),
    }
    let module = match naga::front::wgsl::parse_str(&text) {
        Ok(module) => module,
        Err(error) => return problems.add("parse", error.emit_to_string(&text)),
    };
    check_entry_point(variant, &module, problems);
    check_bindings(variant, &module, problems);
    check_params(variant, &module, problems);
    check_workgroup_memory(variant, &module, problems);
    if let Some(info) = check_features(variant, &text, &module, problems) {
        for (language, error) in translate(&module, &info, variant.kernel.entry_point(), variant.features()) {
            problems.add(language, error);
        }
    }
}

/// Rules of `shaders/README.md` that naga doesn't know.
fn check_text(text: &str, problems: &mut Problems) {
    let code: String =
        text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    for word in code.split(|c: char| !c.is_alphanumeric() && c != '_') {
        if ["inf", "nan", "infinity"].contains(&word.to_lowercase().as_str()) {
            problems.add("no infinity or NaN literals", word);
        }
        if ["enable", "requires", "override"].contains(&word) {
            problems.add("no directives, no overrides", word);
        }
    }
    // A constant expression, whose value browsers refuse if it isn't finite.
    if code.split("bitcast<f32>(").skip(1).any(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        problems.add("no infinity or NaN literals", "bitcast<f32> of a literal");
    }
    if ["{{", "}}", "{%", "%}", "{#", "#}"].iter().any(|mark| text.contains(mark)) {
        problems.add("rendered", "template marks in the text");
    }
    check_style(text, problems);
}

fn check_entry_point(variant: &Variant, module: &Module, problems: &mut Problems) {
    let names: Vec<_> = module.entry_points.iter().map(|entry| entry.name.as_str()).collect();
    problems.expect_eq("entry points", names, vec![variant.kernel.entry_point()]);
    for entry in &module.entry_points {
        problems.expect_eq("workgroup size", entry.workgroup_size, [variant.workgroup_size, 1, 1]);
    }
    if !(1..=MAX_WORKGROUP_SIZE).contains(&variant.workgroup_size) {
        problems.add("workgroup size", format!("{} is not within WebGPU's limit", variant.workgroup_size));
    }
}

fn check_bindings(variant: &Variant, module: &Module, problems: &mut Problems) {
    let mut found = Vec::new();
    for (_, variable) in module.global_variables.iter() {
        let access = match variable.space {
            AddressSpace::Storage { access } if access == StorageAccess::LOAD => Access::Read,
            AddressSpace::Storage { access } if access == StorageAccess::LOAD | StorageAccess::STORE => Access::Write,
            AddressSpace::Uniform => Access::Uniform,
            AddressSpace::WorkGroup | AddressSpace::Private => continue,
            space => {
                problems.add("bindings", format!("address space {space:?}"));
                continue;
            }
        };
        let place = variable.binding.map(|binding| (binding.group, binding.binding));
        found.push((place, variable.name.clone().unwrap_or_default(), access));
    }
    found.sort_by_key(|&(place, ..)| place);
    let table = bindings(variant);
    let want = (0..).zip(&table).map(|(binding, b)| (Some((0, binding)), b.name.to_string(), b.access));
    problems.expect_eq("bindings", found, want.collect());
    let num_storage = table.iter().filter(|binding| binding.access != Access::Uniform).count();
    // Segments beyond two a side, or with an lse, are for devices with more.
    let lse = usize::from(variant.flags.lse);
    let more = [variant.k_segments, variant.v_segments].map(|s| s.count.saturating_sub(2 - lse as u32) as usize);
    if num_storage > MAX_STORAGE_BUFFERS + more[0] + more[1] {
        problems.add("bindings", format!("{num_storage} storage buffers"));
    }
}

/// Name, offset and type of the fields that mean something.
type Fields = Vec<(String, usize, Scalar)>;

macro_rules! fields {
    ($struct:ty { $($field:ident: $scalar:ident),* $(,)? }) => {{
        let fields: Fields = vec![$((stringify!($field).to_owned(), offset_of!($struct, $field), Scalar::$scalar)),*];
        assert_eq!(fields.len() * 4, offset_of!($struct, reserved), "a field is missing from the test's list");
        (fields, size_of::<$struct>())
    }};
}

fn check_params(variant: &Variant, module: &Module, problems: &mut Problems) {
    let (fields, size) = match variant.kernel {
        Kernel::Append | Kernel::AppendQkv | Kernel::CopyBlocks | Kernel::MoveRows | Kernel::Gather | Kernel::Rope => {
            fields!(CacheParams {
                num_tokens: U32,
                num_copies: U32,
                list_offset: U32,
                copies_offset: U32,
                num_blocks: U32,
                grid_x: U32,
                positions_offset: U32,
            })
        }
        Kernel::PackBlocks => fields!(PackParams {
            list_offset: U32,
            num_blocks: U32,
            block_len: U32,
            packed_offset: U32,
            grid_x: U32,
            unpack: U32,
        }),
        Kernel::Decode | Kernel::Prefill | Kernel::Merge => fields!(AttendParams {
            items_offset: U32,
            num_items: U32,
            grid_x: U32,
            num_blocks: U32,
            qk_scale: F32,
            softcap_log2e: F32,
            window: U32,
        }),
    };
    let params = module.global_variables.iter().find(|(_, variable)| variable.name.as_deref() == Some("params"));
    let Some(TypeInner::Struct { members, span }) = params.map(|(_, params)| &module.types[params.ty].inner) else {
        return problems.add("params", "no uniform struct");
    };
    problems.expect_eq("size of params", *span as usize, size);
    let mut found = Fields::new();
    for member in members {
        let name = member.name.clone().unwrap_or_default();
        // Rust fills the rest with zeros: a shader may split it as it likes, but must not give it a meaning.
        if name.starts_with("reserved") || name.starts_with("pad") {
            continue;
        }
        match module.types[member.ty].inner {
            TypeInner::Scalar(scalar) => found.push((name, member.offset as usize, scalar)),
            ref inner => problems.add("params", format!("{name} is a {inner:?}")),
        }
    }
    problems.expect_eq("params", found, fields);
}

/// Workgroup memory as WebGPU counts it: each variable's size, rounded up to 16 bytes.
fn check_workgroup_memory(variant: &Variant, module: &Module, problems: &mut Problems) {
    let mut layouter = naga::proc::Layouter::default();
    if let Err(error) = layouter.update(module.to_ctx()) {
        return problems.add("workgroup memory", error.to_string());
    }
    let variables = module.global_variables.iter().filter(|(_, variable)| variable.space == AddressSpace::WorkGroup);
    let bytes: u32 = variables.map(|(_, variable)| layouter[variable.ty].size.next_multiple_of(16)).sum();
    problems.expect_eq("workgroup memory", bytes, variant.workgroup_bytes());
    let most = if variant.features().matrix { MAX_MATRIX_WORKGROUP_BYTES } else { MAX_WORKGROUP_BYTES };
    if bytes > most {
        problems.add("workgroup memory", format!("{bytes} bytes are more than the limit, {most}"));
    }
}

/// A feature that shaders can claim: its name, whether it is claimed, and the claims without it.
type Feature = (&'static str, fn(ShaderFeatures) -> bool, fn(ShaderFeatures) -> ShaderFeatures);

const FEATURES: [Feature; 3] = [
    ("subgroups", |f| f.subgroups, |f| ShaderFeatures { subgroups: false, ..f }),
    ("int64", |f| f.int64, |f| ShaderFeatures { int64: false, ..f }),
    ("matrix", |f| f.matrix, |f| ShaderFeatures { matrix: false, ..f }),
];

/// What a variant may use without a feature. WebGPU always has `unpack2x16float`; a few old adapters of wgpu's lack it
/// (`DownlevelFlags::SHADER_F16_IN_F32`), on which caches and rows without F16 must still work.
fn base_capabilities(variant: &Variant) -> Capabilities {
    let Variant { k_format, v_format, q_rows, k_rows, v_rows, .. } = variant;
    let f16 =
        [*k_format, *v_format].contains(&KvFormat::F16) || [q_rows, k_rows, v_rows].iter().any(|rows| rows.halves);
    if f16 { Capabilities::SHADER_FLOAT16_IN_FLOAT32 } else { Capabilities::empty() }
}

fn validate(
    variant: &Variant,
    module: &Module,
    features: ShaderFeatures,
) -> Result<ModuleInfo, Box<WithSpan<ValidationError>>> {
    let mut capabilities = Capabilities::empty();
    capabilities.set(Capabilities::SUBGROUP, features.subgroups);
    capabilities.set(Capabilities::SHADER_INT64, features.int64);
    capabilities.set(Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16, features.matrix);
    Validator::new(ValidationFlags::all(), capabilities | base_capabilities(variant)).validate(module).map_err(Box::new)
}

fn check_features(variant: &Variant, text: &str, module: &Module, problems: &mut Problems) -> Option<ModuleInfo> {
    // A language feature, which naga knows no shader without.
    problems.expect_eq("packed dot products", text.contains("dot4I8Packed"), variant.features().packed_dots);
    validate(variant, module, variant.features())
        .map_err(|error| problems.add("validate", error.emit_to_string(text)))
        .ok()
}

#[test]
fn directives_are_added_for_browsers_and_nothing_else() {
    for kernel in Kernel::ALL {
        for variant in variants::of_kernel(kernel).iter().step_by(7) {
            let mut browser = *variant;
            browser.target.enable_directives = true;
            let (Ok(native), Ok(browser)) = (compose(variant), compose(&browser)) else { continue };
            let directive = if variant.features().subgroups { "enable subgroups;\n" } else { "" };
            assert!(browser == format!("{directive}{native}"), "{variant:?}");
        }
    }
}

/// Each choice alone changes the text of the kernels that read it, and of no other: those could share a pipeline.
#[test]
fn choices_change_the_texts_of_the_kernels_that_read_them() {
    for kernel in Kernel::ALL {
        for variant in variants::of_kernel(kernel).iter().step_by(19) {
            let text = compose(variant).expect("text");
            for (choice, is_read, change) in CHOICES {
                // Values that are keys have their format, and lie where they lie.
                if variant.latent && choice == "v_format" {
                    continue;
                }
                let mut other = *variant;
                change(&mut other);
                let other_text = compose(&other).expect("text");
                assert_eq!(text != other_text, is_read(kernel), "{choice}: {variant:?}");
            }
        }
    }
}

type Choice = (&'static str, fn(Kernel) -> bool, fn(&mut Variant));

/// A choice, the kernels that read it, and a change of it.
const CHOICES: [Choice; 12] = [
    ("causal", attends, |v| v.flags.causal ^= true),
    ("window", attends, |v| v.flags.window ^= true),
    ("softcap", attends, |v| v.flags.softcap ^= true),
    ("alibi", attends, |v| v.flags.alibi ^= true),
    ("sinks", |kernel| attends(kernel) || kernel == Kernel::Merge, |v| v.flags.sinks ^= true),
    ("mask", attends, |v| v.flags.mask ^= true),
    ("lse", |kernel| attends(kernel) || kernel == Kernel::Merge, |v| v.flags.lse ^= true),
    ("block_size", |kernel| !matches!(kernel, Kernel::Merge | Kernel::PackBlocks), |v| v.block_size *= 2),
    ("num_kv_heads", |kernel| kernel != Kernel::PackBlocks, |v| v.num_kv_heads *= 2),
    ("value_dim", |kernel| kernel != Kernel::PackBlocks, |v| v.value_dim *= 2),
    ("k_format", reads_elements, |v| v.k_format = another(v.k_format)),
    ("v_format", reads_elements, |v| v.v_format = another(v.v_format)),
];

fn attends(kernel: Kernel) -> bool {
    matches!(kernel, Kernel::Decode | Kernel::Prefill)
}

/// Those that copy blocks see their bytes only, which a format of twice the width has twice as many of.
fn reads_elements(kernel: Kernel) -> bool {
    !matches!(kernel, Kernel::Merge | Kernel::PackBlocks | Kernel::Rope)
}

/// A format whose blocks have another size, whatever the shape.
fn another(format: KvFormat) -> KvFormat {
    if format == KvFormat::F32 { KvFormat::F16 } else { KvFormat::F32 }
}

/// The value of a constant of the module.
fn constant(module: &Module, name: &str) -> Option<Literal> {
    let (_, constant) = module.constants.iter().find(|(_, constant)| constant.name.as_deref() == Some(name))?;
    match module.global_expressions[constant.init] {
        naga::Expression::Literal(literal) => Some(literal),
        _ => None,
    }
}

/// Names and words of a struct of the module.
fn struct_words(module: &Module, name: &str) -> Vec<(String, usize)> {
    let ty = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some(name));
    let Some(TypeInner::Struct { members, .. }) = ty.map(|(_, ty)| &ty.inner) else { return Vec::new() };
    members.iter().map(|member| (member.name.clone().unwrap_or_default(), member.offset as usize / 4)).collect()
}

macro_rules! words {
    ($struct:ty { $($field:ident),* $(,)? }, $bytes:expr) => {{
        let words: Vec<(String, usize)> = vec![$((stringify!($field).to_owned(), offset_of!($struct, $field) / 4)),*];
        assert_eq!(words.len() * 4, $bytes, "a field is missing from the test's list");
        words
    }};
}

/// Sizes, markers and the order of fields of the work lists: the shader's own constants and structs against Rust's.
#[test]
fn work_lists_are_read_as_they_are_written() {
    use folio::plan::{MERGE_ITEM_WORDS, MergeItem, NO_PARTIAL, WORK_ITEM_WORDS, WorkItem};
    assert_eq!(size_of::<WorkItem>(), 4 * WORK_ITEM_WORDS as usize);
    assert_eq!(size_of::<MergeItem>(), 4 * MERGE_ITEM_WORDS as usize);
    let item = words!(
        WorkItem {
            query_start,
            query_len,
            context_len,
            row_start,
            kv_begin,
            kv_end,
            table_offset,
            part_row,
            mask_offset,
            mask_stride,
            tokens_offset,
            mask_begin,
        },
        size_of::<WorkItem>()
    );
    let merge = words!(
        MergeItem { token, part_row, num_splits, split_stride, head_stride, next },
        offset_of!(MergeItem, reserved)
    );
    for kernel in [Kernel::Decode, Kernel::Prefill, Kernel::Merge] {
        for variant in variants::of_kernel(kernel).iter().step_by(7) {
            let text = compose(variant).expect("text");
            let module = naga::front::wgsl::parse_str(&text).expect("parses");
            let is = |name, value| assert_eq!(constant(&module, name), Some(value), "{name} of {variant:?}");
            is("LOGIT_FLOOR", Literal::F32(folio::plan::LOGIT_FLOOR));
            if kernel == Kernel::Merge {
                is("ITEM_WORDS", Literal::U32(MERGE_ITEM_WORDS));
                assert_eq!(struct_words(&module, "MergeItem"), merge);
            } else {
                is("ITEM_WORDS", Literal::U32(WORK_ITEM_WORDS));
                is("NO_PARTIAL", Literal::U32(NO_PARTIAL));
                assert_eq!(struct_words(&module, "WorkItem"), item);
            }
            // The reader takes the words in the same order.
            for i in 1..if kernel == Kernel::Merge { merge.len() } else { item.len() } {
                assert!(text.contains(&format!("plan[word + {i}u]")), "word {i}: {variant:?}");
            }
        }
    }
}

/// The style of every file under `shaders/`, those of the model among them; rendered text is held to it in `check_text`.
#[test]
fn all_files_have_one_style() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let mut folders = vec![root];
    let mut report = String::new();
    let mut num_files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder of shaders") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "wgsl") {
                num_files += 1;
                let text = std::fs::read_to_string(&path).expect("text");
                let mut problems = Problems::default();
                check_style(&without_template_comments(&text), &mut problems);
                for (_, problem) in problems.0 {
                    let _ = writeln!(report, "{}: {problem}", path.display());
                }
            }
        }
    }
    assert!(num_files > 30, "{num_files} files");
    assert!(report.is_empty(), "{report}");
}

fn without_template_comments(text: &str) -> String {
    let mut parts = text.split("{#");
    let mut rest = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        rest.push_str(part.split_once("#}").map_or("", |(_, after)| after));
    }
    rest
}

/// 4 spaces, parentheses around conditions, types of constants, no tabs, no spaces at the end.
fn check_style(text: &str, problems: &mut Problems) {
    for line in text.lines() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let is_tag = code.starts_with("{%") || code.starts_with("{{-");
        if !is_tag && !code.is_empty() && indent % 4 != 0 {
            problems.add("style", format!("{indent} spaces: {line}"));
        }
        if line.contains('\t') || (line.ends_with(' ') && !code.is_empty()) {
            problems.add("style", format!("tabs, or spaces at the end: {line:?}"));
        }
        let code = code.trim_start_matches("} else ");
        for word in ["if", "while", "switch", "for"] {
            if code.strip_prefix(word).is_some_and(|rest| rest.starts_with(' ') && !rest.starts_with(" (")) {
                problems.add("style", format!("no parentheses: {line}"));
            }
        }
        if let Some(constant) = code.strip_prefix("const ")
            && !constant.split('=').next().unwrap_or_default().contains(':')
        {
            problems.add("style", format!("a constant without a type: {line}"));
        }
    }
}

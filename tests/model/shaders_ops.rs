//! The small kernels and the sampler, seen by naga as wgpu sees them: they parse, validate with the features they claim, translate to every
//! backend's language, and have the interface that Rust describes.

use crate::translate::translate;
use folio::Profile;
use folio::kernel::{Access, ShaderFeatures, Source, Target, Vendor};
use folio::model::{Activation, ActivationKind, NormConfig, NormKind, PositionEmbedding, Sampler, SelectRows};
use folio::model::{ExpertGroups, Factor, GroupScore, LinearExperts, RouterConfig, Scoring};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess};

const PROFILES: [Profile; 2] = [Profile::Cpu, Profile::Gpu];

fn targets() -> impl Iterator<Item = Target> {
    [(Profile::Cpu, true), (Profile::Cpu, false), (Profile::Gpu, true)].into_iter().map(|(profile, int64)| Target {
        profile,
        vendor: Vendor::Other,
        subgroups: false,
        subgroup_size: 0,
        int64,
        matrix: None,
        packed_dots: false,
        enable_directives: false,
    })
}

#[test]
fn norm_variants() {
    for target in targets() {
        for width in [4, 8, 64, 128, 256, 260, 768, 1024, 2304, 4096, 8192, 16_384] {
            for (kind, bias, accumulate) in [
                (NormKind::Rms, false, false),
                (NormKind::Rms, true, false),
                (NormKind::Layer, true, false),
                (NormKind::Rms, false, true),
                (NormKind::Layer, true, true),
            ] {
                let config = NormConfig { bias, accumulate, ..NormConfig::new(kind, width, 1e-6) };
                for in_place in [false, true] {
                    check(&config.source(target, in_place).unwrap(), &format!("{target:?} {config:?} {in_place}"));
                }
            }
        }
    }
}

#[test]
fn elementwise_variants() {
    for width in [4, 768, 11_008] {
        for kind in ActivationKind::ALL {
            for gated in [false, true] {
                for target in targets() {
                    let source = Activation::source(target, kind, gated, width).unwrap();
                    check(&source, &format!("{target:?} {kind:?} {gated} {width}"));
                }
            }
        }
        check(&PositionEmbedding::source(1024, width).unwrap(), &format!("positions {width}"));
        check(&SelectRows::source(width).unwrap(), &format!("select {width}"));
    }
}

#[test]
fn router_variants() {
    for (count, per_row) in [(1, 1), (8, 2), (60, 4), (256, 8), (512, 32)] {
        for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
            for (correction, renormalise) in [(false, true), (true, false)] {
                for score in [None, Some(GroupScore::Best), Some(GroupScore::TopTwo)] {
                    let groups = score.map(|score| ExpertGroups { count: count / 4, selected: count / 4, score });
                    if groups.is_some_and(|groups| groups.count == 0) {
                        continue;
                    }
                    let scale = Factor::new(2.5).unwrap();
                    let experts = LinearExperts { count, per_row };
                    let config = RouterConfig { scoring, correction, renormalise, groups, scale, experts };
                    for profile in PROFILES {
                        check(&config.source(profile).unwrap(), &format!("{profile:?} {config:?}"));
                    }
                    check(&config.sort_source().unwrap(), &format!("{config:?}"));
                    for accumulate in [false, true] {
                        check(&config.add_source(768, accumulate).unwrap(), &format!("{config:?}"));
                    }
                }
            }
        }
    }
}

pub(crate) fn check(source: &Source, what: &str) {
    let text = source.text();
    let code: String = text.lines().flat_map(|line| [line.split("//").next().unwrap_or_default(), "\n"]).collect();
    for word in code.split(|c: char| !c.is_alphanumeric() && c != '_') {
        assert!(!["inf", "nan", "enable", "override"].contains(&word.to_lowercase().as_str()), "{what}: {word}");
    }
    assert!(
        !["{{", "}}", "{%", "%}", "{#", "#}"].iter().any(|mark| text.contains(mark)),
        "{what}: template marks\n{text}"
    );
    let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{what}: {}", e.emit_to_string(text)));
    let ShaderFeatures { subgroups, int64, .. } = source.features();
    assert!(!subgroups, "{what}");
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SHADER_INT64, int64);
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .unwrap_or_else(|e| panic!("{what}: {}", e.emit_to_string(text)));
    let [entry] = module.entry_points.as_slice() else { panic!("{what}: {} entry points", module.entry_points.len()) };
    assert_eq!(
        (entry.name.as_str(), entry.workgroup_size),
        (source.entry_point(), [source.workgroup_size(), 1, 1]),
        "{what}"
    );
    assert!((1..=256).contains(&source.workgroup_size()), "{what}");
    check_bindings(source, &module, what);
    check_workgroup_memory(source, &module, what);
    let failed = translate(&module, &info, source.entry_point(), source.features());
    assert!(failed.is_empty(), "{what}: {failed:?}");
}

fn check_bindings(source: &Source, module: &Module, what: &str) {
    let mut found = Vec::new();
    for (_, variable) in module.global_variables.iter() {
        let binding = match variable.space {
            AddressSpace::Storage { access } if access == StorageAccess::LOAD => Access::Read,
            AddressSpace::Storage { .. } => Access::Write,
            AddressSpace::Uniform => Access::Uniform,
            AddressSpace::WorkGroup | AddressSpace::Private => continue,
            space => panic!("{what}: {space:?}"),
        };
        let name = variable.name.clone().unwrap_or_default();
        found.push((variable.binding.as_ref().map(|b| (b.group, b.binding)), name, binding));
    }
    found.sort_by_key(|&(place, ..)| place);
    let want: Vec<_> =
        (0..).zip(source.bindings()).map(|(i, b)| (Some((0, i)), b.name.to_string(), b.access)).collect();
    assert_eq!(found, want, "{what}");
    assert!(found.len() <= 8, "{what}");
}

/// Workgroup memory as WebGPU counts it: each variable's size, rounded up to 16 bytes.
fn check_workgroup_memory(source: &Source, module: &Module, what: &str) {
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let variables = module.global_variables.iter().filter(|(_, variable)| variable.space == AddressSpace::WorkGroup);
    let bytes: u32 = variables.map(|(_, variable)| layouter[variable.ty].size.next_multiple_of(16)).sum();
    assert_eq!(bytes, source.workgroup_bytes(), "{what}");
    assert!(bytes <= 16_384, "{what}");
}

#[test]
fn sampler_variants() {
    for profile in PROFILES {
        for vocab in [1, 7, 768, 50_257, 151_936, 262_144, 966_656] {
            for greedy in [false, true] {
                for edits in [false, true] {
                    let source = Sampler::source(profile, vocab, greedy, edits).unwrap();
                    check(&source, &format!("{profile:?} {vocab} {greedy} {edits}"));
                    let iterations = 34 * vocab.div_ceil(4).div_ceil(source.workgroup_size()) + 70 * 8 + 32;
                    assert!(iterations < 65_535 / 2, "{profile:?} {vocab}: {iterations} iterations");
                }
            }
        }
        assert!(Sampler::source(profile, 0, true, false).is_err());
        assert!(Sampler::source(profile, 966_657, true, false).is_err());
    }
}

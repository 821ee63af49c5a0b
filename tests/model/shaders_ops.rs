//! The small kernels and the sampler, seen by naga as wgpu sees them: they parse, validate with the features they claim, translate to every
//! backend's language, and have the interface that Rust describes.

use folio::Profile;
use folio::kernel::Target;
use folio::model::{
    Activation, ActivationKind, Binding, NormConfig, NormKind, PositionEmbedding, Sampler, SelectRows, Source,
};
use folio::wgpu::Features;
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ShaderStage, StorageAccess, back};

const PROFILES: [Profile; 2] = [Profile::Cpu, Profile::Gpu];

fn targets() -> impl Iterator<Item = Target> {
    [(Profile::Cpu, true), (Profile::Cpu, false), (Profile::Gpu, true)].into_iter().map(|(profile, int64)| Target {
        profile,
        subgroups: false,
        subgroup_size: 0,
        int64,
        enable_directives: false,
    })
}

#[test]
fn norm_variants() {
    for target in targets() {
        for width in [4, 8, 64, 128, 256, 260, 768, 1024, 2304, 4096, 8192, 16_384] {
            for (kind, bias) in [(NormKind::Rms, false), (NormKind::Rms, true), (NormKind::Layer, true)] {
                let config = NormConfig { bias, ..NormConfig::new(kind, width, 1e-6) };
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
    let int64 = source.features().contains(Features::SHADER_INT64);
    assert!(Features::SHADER_INT64.contains(source.features()), "{what}");
    let capabilities = if int64 { Capabilities::SHADER_INT64 } else { Capabilities::empty() };
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
    translate(source.entry_point(), int64, &module, &info, what);
}

fn check_bindings(source: &Source, module: &Module, what: &str) {
    let mut found = Vec::new();
    for (_, variable) in module.global_variables.iter() {
        let binding = match variable.space {
            AddressSpace::Storage { access } if access == StorageAccess::LOAD => Binding::Read,
            AddressSpace::Storage { .. } => Binding::Write,
            AddressSpace::Uniform => Binding::Uniform,
            AddressSpace::WorkGroup | AddressSpace::Private => continue,
            space => panic!("{what}: {space:?}"),
        };
        found.push((variable.binding.as_ref().map(|b| (b.group, b.binding)), binding));
    }
    found.sort_by_key(|&(place, _)| place);
    let want: Vec<_> = (0..).zip(source.bindings()).map(|(i, &binding)| (Some((0, i)), binding)).collect();
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

/// SPIR-V 1.0, MSL 2.0, HLSL for shader model 5.1 (FXC), GLSL ES 3.10 and GLSL 4.30. With 64-bit integers MSL 2.4, shader model 6.0 and no GLSL.
fn translate(name: &str, int64: bool, module: &Module, info: &ModuleInfo, what: &str) {
    let entry = || Some((ShaderStage::Compute, name.to_owned()));
    let options = back::spv::Options { lang_version: (1, 0), ..Default::default() };
    let pipeline = back::spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: name.into() };
    back::spv::write_vec(module, info, &options, Some(&pipeline)).unwrap_or_else(|e| panic!("{what}: SPIR-V: {e}"));

    let options = back::msl::Options { lang_version: if int64 { (2, 4) } else { (2, 0) }, ..Default::default() };
    let pipeline = back::msl::PipelineOptions { entry_point: entry(), ..Default::default() };
    let (_, translation) = back::msl::write_string(module, info, &options, &pipeline).unwrap();
    translation.entry_point_names.into_iter().for_each(|e| drop(e.unwrap()));

    let shader_model = if int64 { back::hlsl::ShaderModel::V6_0 } else { back::hlsl::ShaderModel::V5_1 };
    let options = back::hlsl::Options { shader_model, ..Default::default() };
    let pipeline = back::hlsl::PipelineOptions { entry_point: entry() };
    let reflection = back::hlsl::Writer::new(String::new(), &options, &pipeline).write(module, info, None).unwrap();
    reflection.entry_point_names.into_iter().for_each(|e| drop(e.unwrap()));

    if int64 {
        return;
    }
    for version in [back::glsl::Version::new_gles(310), back::glsl::Version::Desktop(430)] {
        let options = back::glsl::Options { version, ..Default::default() };
        let pipeline = back::glsl::PipelineOptions {
            shader_stage: ShaderStage::Compute,
            entry_point: name.to_owned(),
            multiview: None,
        };
        let policies = naga::proc::BoundsCheckPolicies::default();
        let mut glsl = String::new();
        back::glsl::Writer::new(&mut glsl, module, info, &options, &pipeline, policies)
            .and_then(|mut writer| writer.write())
            .unwrap_or_else(|e| panic!("{what}: GLSL {version}: {e}"));
    }
}

#[test]
fn sampler_variants() {
    for profile in PROFILES {
        for vocab in [1, 7, 768, 50_257, 151_936, 262_144, 966_656] {
            for greedy in [false, true] {
                for penalty in [false, true] {
                    let source = Sampler::source(profile, vocab, greedy, penalty).unwrap();
                    check(&source, &format!("{profile:?} {vocab} {greedy} {penalty}"));
                    let iterations = 34 * vocab.div_ceil(4).div_ceil(source.workgroup_size()) + 70 * 8 + 32;
                    assert!(iterations < 65_535 / 2, "{profile:?} {vocab}: {iterations} iterations");
                }
            }
        }
        assert!(Sampler::source(profile, 0, true, false).is_err());
        assert!(Sampler::source(profile, 966_657, true, false).is_err());
    }
}

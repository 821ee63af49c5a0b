//! Every variant of the linear kernels: composes, validates with what it claims, translates to every backend's language, and has the bindings and
//! workgroup sizes that the host thinks.

use crate::translate::translate;
use folio::Profile;
use folio::kernel::{Access, MatrixSize, Target, Vendor};
use folio::model::{ActivationKind, Factor, LinearConfig, LinearExperts, LinearKernel, LinearVariant, WeightFormat};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, ImageClass, StorageAccess, TypeInner};

fn targets() -> Vec<Target> {
    let mut targets = Vec::new();
    for profile in [Profile::Cpu, Profile::Gpu] {
        for (subgroups, subgroup_size) in [(false, 0), (true, 0), (true, 4), (true, 8), (true, 16), (true, 32)] {
            for int64 in [false, true] {
                targets.push(Target {
                    profile,
                    vendor: Vendor::Other,
                    subgroups,
                    subgroup_size,
                    int64,
                    matrix: None,
                    packed_dots: false,
                    enable_directives: false,
                });
            }
        }
    }
    // Lavapipe, Apple, NVIDIA, AMD.
    let matrices =
        [(MatrixSize::Eight, 8), (MatrixSize::Eight, 32), (MatrixSize::Sixteen, 32), (MatrixSize::Sixteen, 0)];
    targets.extend(matrices.map(|(matrix, subgroup_size)| Target {
        profile: Profile::Gpu,
        vendor: Vendor::Other,
        subgroups: true,
        subgroup_size,
        int64: false,
        matrix: Some(matrix),
        packed_dots: false,
        enable_directives: false,
    }));
    targets
}

fn variants() -> Vec<LinearVariant> {
    let formats = [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT8, WeightFormat::Int4 { group_size: 96 }];
    let mut variants = Vec::new();
    for target in targets() {
        for format in formats {
            for (activation, bias, width) in [(None, false, 64), (Some(ActivationKind::Gelu), true, 63)] {
                let config = LinearConfig { activation, bias, ..LinearConfig::new(width, width, format) };
                let (gated, norm, regions) = (true, true, Some([8, 20, width - 28]).filter(|_| width % 4 == 0));
                let experts = Some(LinearExperts { count: 8, per_row: 2 });
                for config in [
                    config,
                    LinearConfig { gated, ..config },
                    LinearConfig { norm, ..config },
                    LinearConfig { regions, norm, ..config },
                    LinearConfig { gated, norm, ..config },
                    LinearConfig { gated, norm, experts, ..config },
                    LinearConfig { experts, ..config },
                    LinearConfig { gather_scale: Some(Factor::new(8.0).unwrap()), ..config },
                ] {
                    variants.extend(LinearVariant::of_layer(target, &config));
                }
            }
        }
        for activation in std::iter::once(None).chain(ActivationKind::ALL.map(Some)) {
            let config = LinearConfig { activation, bias: true, ..LinearConfig::new(64, 64, WeightFormat::F16) };
            variants.extend(LinearVariant::of_layer(target, &config));
        }
        let softcap = Some(Factor::new(30.0).unwrap());
        let config = LinearConfig { softcap, norm: true, ..LinearConfig::new(64, 63, WeightFormat::F16) };
        variants.extend(LinearVariant::of_layer(target, &config));
    }
    let mut seen = std::collections::HashSet::new();
    variants.retain(|variant| seen.insert(*variant));
    variants
}

/// Matrix units are for many rows on GPUs that have subgroups, and elsewhere make no difference.
#[test]
fn matrices_are_for_many_rows() {
    for target in targets() {
        for format in [WeightFormat::F32, WeightFormat::INT4] {
            let config = LinearConfig::new(64, 64, format);
            let plain = LinearVariant::of_layer(Target { matrix: None, ..target }, &config);
            let matrix = Some(MatrixSize::Sixteen);
            for (offered, plain) in LinearVariant::of_layer(Target { matrix, ..target }, &config).iter().zip(plain) {
                let takes = offered.kernel == LinearKernel::Matmul && target.subgroups;
                assert_eq!(offered.target.matrix.is_some(), takes, "{offered:?}");
                assert_eq!(*offered != plain, takes, "{offered:?}");
            }
        }
    }
}

#[test]
fn every_variant_is_valid_and_translates() {
    for variant in variants() {
        check(&variant);
    }
}

/// Sizes that a tuner may try, with and without everything that the text depends on.
#[test]
fn every_candidate_is_valid_and_translates() {
    let mut seen = std::collections::HashSet::new();
    for target in targets().into_iter().filter(|target| [0, 8, 32].contains(&target.subgroup_size) && !target.int64) {
        let plain = LinearConfig::new(64, 64, WeightFormat::INT4);
        let all = LinearConfig { gated: true, norm: true, bias: true, ..LinearConfig::new(63, 63, WeightFormat::F16) };
        for variant in [plain, all].iter().flat_map(|config| LinearVariant::of_layer(target, config)) {
            let candidates = variant.candidates();
            assert_eq!(candidates[0], variant.sizes, "{variant:?}");
            let variants = candidates.into_iter().skip(1).map(|sizes| variant.with_sizes(sizes));
            variants.filter(|variant| seen.insert(*variant)).for_each(|variant| check(&variant));
        }
    }
}

fn check(variant: &LinearVariant) {
    let source = variant.source().unwrap();
    let text = source.text();
    let module = naga::front::wgsl::parse_str(text)
        .unwrap_or_else(|e| panic!("{variant:?}: {}\n{text}", e.emit_to_string(text)));
    let [entry] = &module.entry_points[..] else { panic!("{variant:?}: entry points") };
    assert_eq!(entry.name, source.entry_point());
    assert_eq!(entry.workgroup_size, [source.workgroup_size(), 1, 1], "{variant:?}");
    assert!(source.workgroup_size() <= 256);

    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let (mut found, mut workgroup_bytes) = (Vec::new(), 0);
    for (_, variable) in module.global_variables.iter() {
        let kind = match variable.space {
            AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => Access::Write,
            AddressSpace::Storage { .. } => Access::Read,
            AddressSpace::Uniform => Access::Uniform,
            AddressSpace::Handle => match module.types[variable.ty].inner {
                TypeInner::Image { class: ImageClass::Storage { .. }, .. } => Access::TextureWrite,
                _ => Access::Texture,
            },
            AddressSpace::WorkGroup => {
                workgroup_bytes += layouter[variable.ty].size.next_multiple_of(16);
                continue;
            }
            space => panic!("{variant:?}: {space:?}"),
        };
        let place = variable.binding.unwrap();
        assert_eq!(place.group, 0);
        found.push((place.binding, (variable.name.clone().unwrap_or_default(), kind)));
    }
    found.sort_by_key(|(binding, _)| *binding);
    let want: Vec<_> = (0..).zip(source.bindings().iter().map(|b| (b.name.to_string(), b.access))).collect();
    assert_eq!(found, want, "{variant:?}");
    assert_eq!(workgroup_bytes, source.workgroup_bytes(), "{variant:?}");
    assert!(workgroup_bytes <= 16384, "{variant:?}: {workgroup_bytes} bytes of workgroup memory");

    let features = source.features();
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SUBGROUP, features.subgroups);
    capabilities.set(Capabilities::SHADER_INT64, features.int64);
    capabilities.set(Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16, features.matrix);
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .unwrap_or_else(|e| panic!("{variant:?}: {}", e.emit_to_string(text)));
    let failed = translate(&module, &info, source.entry_point(), features);
    assert!(failed.is_empty(), "{variant:?}: {failed:?}");
}

#[test]
fn browsers_get_their_directive() {
    for variant in variants().iter().step_by(5) {
        let mut browser = *variant;
        browser.target.enable_directives = true;
        let directive = if variant.target.subgroups { "enable subgroups;\n" } else { "" };
        assert_eq!(
            browser.source().unwrap().text(),
            format!("{directive}{}", variant.source().unwrap().text()),
            "{variant:?}"
        );
    }
}

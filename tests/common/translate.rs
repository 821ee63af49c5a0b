//! Translation of a shader to the languages of all of wgpu's backends.

use folio::kernel::ShaderFeatures;
use naga::valid::ModuleInfo;
use naga::{Module, ShaderStage, back};

/// Translates to the language of every backend that can have a device with the features.
/// Returns what failed: the language and why.
///
/// | Language | Plain | Subgroups | 64-bit integers | Matrix units |
/// |---|---|---|---|---|
/// | SPIR-V (Vulkan) | 1.0 | 1.3 | 1.0 | 1.6 |
/// | MSL (Metal) | 2.0 | 2.4 | 2.4 | 2.4, matrices of 8 |
/// | HLSL (DX12) | shader model 5.1 (FXC) | 6.0 (DXC) | 6.0 (DXC) | not written |
/// | GLSL (GL) | ES 3.10 and 4.30 | ES 3.10 and 4.30 | not in GLSL ES, and naga doesn't write it | not written |
pub(crate) fn translate(
    module: &Module,
    info: &ModuleInfo,
    entry_point: &str,
    features: ShaderFeatures,
) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    let entry = || Some((ShaderStage::Compute, entry_point.to_owned()));
    let ShaderFeatures { subgroups, int64, matrix, packed_dots: _ } = features;

    let lang_version = if matrix {
        (1, 6)
    } else if subgroups {
        (1, 3)
    } else {
        (1, 0)
    };
    let options = back::spv::Options { lang_version, ..Default::default() };
    let pipeline = back::spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: entry_point.into() };
    if let Err(error) = back::spv::write_vec(module, info, &options, Some(&pipeline)) {
        problems.push(("SPIR-V", error.to_string()));
    }

    let lang_version = if subgroups || int64 { (2, 4) } else { (2, 0) };
    let options = back::msl::Options { lang_version, ..Default::default() };
    let pipeline = back::msl::PipelineOptions { entry_point: entry(), ..Default::default() };
    match back::msl::write_string(module, info, &options, &pipeline) {
        Ok((_, translation)) => {
            translation
                .entry_point_names
                .into_iter()
                .filter_map(Result::err)
                .for_each(|e| problems.push(("MSL", e.to_string())));
        }
        Err(error) => problems.push(("MSL", error.to_string())),
    }

    // naga writes matrix units for Vulkan and Metal.
    if matrix {
        return problems;
    }
    let shader_model = if subgroups || int64 { back::hlsl::ShaderModel::V6_0 } else { back::hlsl::ShaderModel::V5_1 };
    let options = back::hlsl::Options { shader_model, ..Default::default() };
    let pipeline = back::hlsl::PipelineOptions { entry_point: entry() };
    match back::hlsl::Writer::new(String::new(), &options, &pipeline).write(module, info, None) {
        Ok(reflection) => {
            reflection
                .entry_point_names
                .into_iter()
                .filter_map(Result::err)
                .for_each(|e| problems.push(("HLSL", e.to_string())));
        }
        Err(error) => problems.push(("HLSL", error.to_string())),
    }

    if int64 {
        return problems;
    }
    for version in [back::glsl::Version::new_gles(310), back::glsl::Version::Desktop(430)] {
        let options = back::glsl::Options { version, ..Default::default() };
        let pipeline = back::glsl::PipelineOptions {
            shader_stage: ShaderStage::Compute,
            entry_point: entry_point.to_owned(),
            multiview: None,
        };
        let mut glsl = String::new();
        let policies = naga::proc::BoundsCheckPolicies::default();
        let written = back::glsl::Writer::new(&mut glsl, module, info, &options, &pipeline, policies)
            .and_then(|mut writer| writer.write());
        if let Err(error) = written {
            problems.push(("GLSL", format!("{version}: {error}")));
        }
    }
    problems
}

//! `folio verify`: how accurate the kernels are on an adapter.

mod table;
#[cfg(test)]
mod tests;

use std::fs;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use folio::verify::{Case, Report};
use folio::{Gpu, GpuOptions, Profile, ShaderChecks, wgpu};
use indicatif::{ProgressBar, ProgressStyle};

use crate::stdout::print;

/// Check the kernels of an adapter against exact arithmetic, and say how far off they are
///
/// Computes a fixed grid of small steps of attention: formats, head dimensions, groups, options, each for decoding and for prompts. Errors are
/// in units of what f32 arithmetic can account for: up to 1 is right. Ends with exit code 1 if a result is not.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// The adapter whose name contains this [default: the best one]
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// The graphics APIs to look in: vulkan, metal, dx12, gl [default: all]
    #[arg(long, value_name = "API,...")]
    backend: Option<String>,
    /// The family of kernels [default: what suits the adapter]
    #[arg(long)]
    kernels: Option<Family>,
    /// Open the adapter as a browser does: WebGPU's default limits, and no feature beyond them
    #[arg(long, conflicts_with_all = ["matrix_units", "packed_dots"])]
    webgpu: bool,
    /// Use matrix units where there are any
    #[arg(long)]
    matrix_units: bool,
    /// Quantise queries for packed integer dot products
    #[arg(long)]
    packed_dots: bool,
    /// Keep wgpu's checks in the shaders
    #[arg(long)]
    full_checks: bool,
    /// Only cases whose names contain this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Write the report as JSON to this file; `-` is stdout
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compute nothing: read these reports, and print a page in Markdown about them
    #[arg(long, value_name = "REPORT", num_args = 1.., conflicts_with_all = ["adapter", "backend", "kernels", "webgpu", "full_checks", "only", "json"])]
    page: Vec<PathBuf>,
}

/// Kernels for GPUs or for CPU adapters.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Family {
    Gpu,
    Cpu,
}

pub(crate) fn run(options: &Options) -> ExitCode {
    let done = if options.page.is_empty() { verify(options) } else { page(&options.page).map(|()| true) };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn page(files: &[PathBuf]) -> Result<()> {
    print(&table::page(&table::read(files)?))
}

/// Whether all is within its bound.
fn verify(options: &Options) -> Result<bool> {
    let cases: Vec<Case> = Case::grid().into_iter().filter(|case| case.id().contains(&options.only)).collect();
    ensure!(!cases.is_empty(), "only: no case is named like {:?}", options.only);
    // Before minutes of work.
    if let Some(path) = options.json.as_deref().filter(|path| !is_stdout(path)) {
        fs::OpenOptions::new().append(true).create(true).open(path).with_context(|| path.display().to_string())?;
    }
    let gpu = open(options)?;
    let mut report = Report::new(&gpu);
    let is_json = options.json.as_deref().is_some_and(is_stdout);
    let says = |text: &str| if is_json { Ok(()) } else { print(text) };
    says(&format!("{}, {} kernels\n", table::name(&report), report.kernels))?;
    let bar = if io::stderr().is_terminal() { ProgressBar::new(cases.len() as u64) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{pos}/{len} {wide_bar} {msg}")?);
    for case in cases {
        bar.set_message(case.id().to_owned());
        let result = gpu.block_on(folio::verify::check(&gpu, &case))?;
        bar.suspend(|| says(&format!("{} {result}\n", if result.is_within() { "ok  " } else { "BAD " })))?;
        report.cases.push(result);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        if is_stdout(path) {
            print(&text)?;
        } else {
            fs::write(path, text).with_context(|| path.display().to_string())?;
        }
    }
    says(&format!("{}\n", table::summary(&report)))?;
    Ok(report.is_within())
}

fn is_stdout(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn open(options: &Options) -> Result<Gpu> {
    let profile = options.kernels.map(|family| match family {
        Family::Gpu => Profile::Gpu,
        Family::Cpu => Profile::Cpu,
    });
    let checks = if options.full_checks { ShaderChecks::Full } else { ShaderChecks::Trusted };
    let mut with = GpuOptions::default();
    with.adapter_name.clone_from(&options.adapter);
    (with.profile, with.shader_checks, with.packed_dots) = (profile, checks, options.packed_dots);
    if options.matrix_units {
        // SAFETY: the user asked for an experimental feature of wgpu's.
        #[allow(unsafe_code, reason = "the token by which a program accepts experimental features")]
        let token = unsafe { wgpu::ExperimentalFeatures::enabled() };
        with.matrix_units = token;
    }
    if let Some(names) = &options.backend {
        with.backends = wgpu::Backends::from_comma_list(names);
        ensure!(!with.backends.is_empty(), "backend: got {names:?}, need vulkan, metal, dx12 or gl");
    }
    if options.webgpu {
        let mut strict = wgpu::InstanceDescriptor::new_without_display_handle();
        strict.backends = with.backends;
        strict.flags |= wgpu::InstanceFlags::STRICT_WEBGPU_COMPLIANCE;
        with.instance = Some(wgpu::Instance::new(strict));
        (with.without, with.default_limits) = (wgpu::Features::all(), true);
    }
    let gpu = Gpu::open_blocking(with)?;
    if options.matrix_units && gpu.matrix_size().is_none() {
        bail!("matrix-units: {} has none that folio has kernels for", gpu.adapter_info().name);
    }
    Ok(gpu)
}

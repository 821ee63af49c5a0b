//! The adapter under test, opened once per way of opening it.

use std::collections::{HashMap, HashSet};
use std::io::Write as _;
use std::sync::{LazyLock, Mutex};

use folio::{Gpu, GpuOptions, Profile, ShaderChecks, wgpu};

/// A way of opening the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Open {
    pub(crate) profile: Option<Profile>,
    pub(crate) without: wgpu::Features,
    pub(crate) checks: ShaderChecks,
    pub(crate) max_binding_bytes: Option<u64>,
    pub(crate) max_storage_buffers: Option<u32>,
    /// Matrix units, where the adapter has them.
    pub(crate) matrix: bool,
}

/// The adapter as folio opens it by itself.
pub(crate) const DEFAULT: Open = Open {
    profile: None,
    without: wgpu::Features::empty(),
    checks: ShaderChecks::Trusted,
    max_binding_bytes: None,
    max_storage_buffers: None,
    matrix: false,
};

/// Kernels for GPUs with subgroups.
pub(crate) const GPU: Open = Open { profile: Some(Profile::Gpu), ..DEFAULT };

/// Kernels for GPUs without subgroups: what browsers and FXC get.
pub(crate) const GPU_PLAIN: Open = Open { without: wgpu::Features::SUBGROUP, ..GPU };

/// Kernels for GPUs with matrix units; see [`open_matrix`].
pub(crate) const GPU_MATRIX: Open = Open { matrix: true, ..GPU };

/// Kernels for CPU adapters.
pub(crate) const CPU: Open = Open { profile: Some(Profile::Cpu), ..DEFAULT };

/// Kernels for CPU adapters without 64-bit integers.
pub(crate) const CPU_NO_INT64: Open = Open { without: wgpu::Features::SHADER_INT64, ..CPU };

/// Kernels for CPU adapters with neither subgroups nor 64-bit integers: llvmpipe's GL twin.
pub(crate) const CPU_PLAIN: Open =
    Open { without: wgpu::Features::SUBGROUP.union(wgpu::Features::SHADER_INT64), ..CPU };

/// Every family of kernels.
pub(crate) const ALL: [Open; 5] = [CPU, CPU_NO_INT64, CPU_PLAIN, GPU, GPU_PLAIN];

static OPENED: LazyLock<Mutex<HashMap<Open, Gpu>>> = LazyLock::new(Mutex::default);

/// Opens the adapter. `None`: there is none, and the test is to be skipped. `FOLIO_REQUIRE_GPU=1` makes that a failure;
/// `FOLIO_ADAPTER` names the adapter, wgpu's own `WGPU_BACKEND` the backend ("gl", say).
pub(crate) fn open(how: Open) -> Option<Gpu> {
    let mut opened = OPENED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(gpu) = opened.get(&how) {
        return Some(gpu.clone());
    }
    match Gpu::open_blocking(options(how)) {
        Ok(gpu) => {
            opened.insert(how, gpu.clone());
            Some(gpu)
        }
        Err(error) => {
            assert!(std::env::var("FOLIO_REQUIRE_GPU").as_deref() != Ok("1"), "FOLIO_REQUIRE_GPU=1, but: {error}");
            say_skipped(&error.to_string());
            None
        }
    }
}

/// Opens the adapter with matrix units. `None`: it has none, and the test is to be skipped, which is no failure: they are optional.
pub(crate) fn open_matrix(how: Open) -> Option<Gpu> {
    let gpu = open(Open { matrix: true, ..how })?;
    if gpu.matrix_size().is_none() {
        say_skipped(&format!("{} has no matrix units that folio has kernels for", gpu.adapter_info().name));
        return None;
    }
    Some(gpu)
}

#[allow(unsafe_code, reason = "what matrix units are part of; see the SAFETY comment")]
fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: These tests accept that wgpu's experimental features may have bugs.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// What [`open`] asks for.
pub(crate) fn options(how: Open) -> GpuOptions {
    let mut options = GpuOptions::default();
    options.adapter_name = std::env::var("FOLIO_ADAPTER").ok();
    options.backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
    options.profile = how.profile;
    options.without = how.without;
    options.shader_checks = how.checks;
    options.max_binding_bytes = how.max_binding_bytes;
    options.max_storage_buffers = how.max_storage_buffers;
    if how.matrix {
        options.matrix_units = experimental();
    }
    options
}

/// A line on the process's own stderr: what tests print by macro is shown only if they fail.
pub(crate) fn say(line: &str) {
    // Nobody reads it if that fails.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Says once which test is skipped, and why.
fn say_skipped(reason: &str) {
    static SAID: LazyLock<Mutex<HashSet<String>>> = LazyLock::new(Mutex::default);
    // libtest names a test's thread after it.
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    if SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(test.clone()) {
        say(&format!("skipped {test}: {reason}"));
    }
}

/// The adapter under test itself, for tests that open a device in their own way.
pub(crate) fn raw() -> Option<wgpu::Adapter> {
    let gpu = open(DEFAULT)?;
    let info = gpu.adapter_info();
    let adapters = wgpu::Instance::default().enumerate_adapters(info.backend.into());
    futures::executor::block_on(adapters).into_iter().find(|adapter| adapter.get_info().name == info.name)
}

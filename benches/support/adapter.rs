//! The adapter under measurement.

use folio::{Gpu, GpuOptions, Profile};

/// Opens the best adapter, or the one that `FOLIO_ADAPTER` names; `FOLIO_PROFILE=gpu` or `cpu` forces a kernel family.
/// `None`, with a line on stderr: there is no such adapter.
pub(crate) fn open() -> Option<Gpu> {
    let profile = std::env::var("FOLIO_PROFILE").ok().map(|name| match name.as_str() {
        "gpu" => Profile::Gpu,
        "cpu" => Profile::Cpu,
        other => panic!("FOLIO_PROFILE: got {other:?}, need gpu or cpu"),
    });
    let adapter_name = std::env::var("FOLIO_ADAPTER").ok();
    Gpu::open_blocking({
        let mut options = GpuOptions::default();
        options.adapter_name = adapter_name;
        options.profile = profile;
        options.timestamps = true;
        options
    })
    .map_err(|error| eprintln!("nothing measured: {error}"))
    .ok()
}

/// The adapter in words.
pub(crate) fn describe(gpu: &Gpu) -> String {
    let info = gpu.adapter_info();
    let driver = format!("{} {}", info.driver, info.driver_info);
    format!("{} ({:?}, {}), {:?} kernels", info.name, info.backend, driver.trim(), gpu.profile())
}

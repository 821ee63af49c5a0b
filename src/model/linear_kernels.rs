//! The compiled kernels of the linear layers of a device, and where their inputs are staged.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::linear_variant::LinearVariant;
use crate::gpu::Program;
use crate::{Error, Gpu, Result};

/// A compiled kernel.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) variant: LinearVariant,
    pub(crate) program: Arc<Program>,
}

/// The pipelines of all linear layers of a device, each compiled once, whatever the number of layers that use it.
/// Cheap to clone; clones share everything.
#[derive(Clone, Debug, Default)]
pub struct LinearKernels(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    compiled: Mutex<HashMap<LinearVariant, Arc<Compiled>>>,
    /// Bytes that have been handed to the queue since the last submit.
    unsubmitted: AtomicU64,
    /// Where x is staged: one texture for all layers, as their dispatches follow one another. Texels, and a view of them.
    stage: Mutex<Option<(u64, wgpu::TextureView)>>,
}

/// Texels of a row of a texture; the shaders have its logarithm.
pub(crate) const TEXTURE_WIDTH: u32 = 2048;

/// A texture of the shaders' width.
pub(crate) fn create_texture(gpu: &Gpu, height: u32, usage: wgpu::TextureUsages) -> Result<wgpu::Texture> {
    let descriptor = wgpu::TextureDescriptor {
        label: Some("folio linear"),
        size: wgpu::Extent3d { width: TEXTURE_WIDTH, height, depth_or_array_layers: 1 },
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format: wgpu::TextureFormat::Rgba32Uint,
        usage,
        view_formats: &[],
    };
    gpu.scoped_now("creating a texture", || gpu.device().create_texture(&descriptor))
}

/// All of a texture.
pub(crate) fn create_view(gpu: &Gpu, texture: &wgpu::Texture) -> Result<wgpu::TextureView> {
    gpu.scoped_now("creating a texture", || texture.create_view(&wgpu::TextureViewDescriptor::default()))
}

/// wgpu keeps a copy of what is written to a queue until the next submit: so one is made after this many bytes.
const MAX_UNSUBMITTED: u64 = 64 << 20;

impl LinearKernels {
    /// No kernels yet; layers add what they need.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) async fn get(&self, gpu: &Gpu, variant: LinearVariant) -> Result<Arc<Compiled>> {
        let found = self.0.compiled.lock().unwrap_or_else(PoisonError::into_inner).get(&variant).cloned();
        if let Some(compiled) = found {
            return Ok(compiled);
        }
        let program = Program::get(gpu, variant.source()?).await?;
        let compiled = Arc::new(Compiled { variant, program });
        let mut all = self.0.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(all.entry(variant).or_insert(compiled).clone())
    }

    /// A texture of at least that many texels, as wide as the shaders think.
    pub(crate) fn stage(&self, gpu: &Gpu, texels: u64) -> Result<wgpu::TextureView> {
        let mut stage = self.0.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((size, view)) = &*stage
            && *size >= texels
        {
            return Ok(view.clone());
        }
        let max = gpu.limits().max_texture_dimension_2d;
        let height = texels.div_ceil(TEXTURE_WIDTH.into()).next_power_of_two();
        if height > max.into() {
            let (need, have) = (format!("{texels} texels"), format!("{TEXTURE_WIDTH} x {max}"));
            return Err(Error::unsupported("rows of a linear layer", need, have).with_hint("use smaller steps"));
        }
        let usage = wgpu::TextureUsages::TEXTURE_BINDING | wgpu::TextureUsages::STORAGE_BINDING;
        let texture = create_texture(gpu, height as u32, usage)?;
        let view = create_view(gpu, &texture)?;
        *stage = Some((height * u64::from(TEXTURE_WIDTH), view.clone()));
        Ok(view)
    }

    /// Counts bytes that were written to the queue, and from time to time submits and waits, so that wgpu gives its copies back.
    pub(crate) fn uploaded(&self, gpu: &Gpu, bytes: u64) -> Result<()> {
        if self.0.unsubmitted.fetch_add(bytes, Ordering::Relaxed) + bytes < MAX_UNSUBMITTED {
            return Ok(());
        }
        self.0.unsubmitted.store(0, Ordering::Relaxed);
        gpu.scoped_now("uploading weights", || gpu.queue().submit([]))?;
        #[cfg(not(target_arch = "wasm32"))]
        gpu.device()
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|error| Error::wgpu("uploading weights", error))?;
        Ok(())
    }
}

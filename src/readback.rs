//! Reading a buffer back: async everywhere, blocking off the web.

use futures_channel::oneshot;

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::record::BufferRef;

/// A mappable copy of what a submitted encoder wrote into it.
pub(crate) struct Readback {
    buffer: wgpu::Buffer,
}

impl Readback {
    /// Makes the staging buffer. The caller records the copies into it.
    pub(crate) fn new(gpu: &Gpu, bytes: u64) -> Result<Self> {
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let buffer = gpu.create_buffer("creating a readback buffer", "folio readback", bytes, usage)?;
        Ok(Self { buffer })
    }

    /// Makes the staging buffer and records the copy of `source`.
    pub(crate) fn record(gpu: &Gpu, encoder: &mut wgpu::CommandEncoder, source: &BufferRef<'_>) -> Result<Self> {
        let readback = Self::new(gpu, source.size())?;
        encoder.copy_buffer_to_buffer(source.buffer(), source.offset(), &readback.buffer, 0, source.size());
        Ok(readback)
    }

    /// Where the copies go.
    pub(crate) fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// Waits for the copy, which must have been submitted. Natively somebody has to poll the device meanwhile.
    pub(crate) async fn read(self) -> Result<Vec<f32>> {
        // The mapping may be less aligned than f32 asks for.
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        self.read_with(|bytes| bytes.chunks_exact(4).map(value).collect()).await
    }

    /// [`Readback::read`], handing the bytes to `take`.
    pub(crate) async fn read_with<T>(self, take: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let during = "reading back";
        let (sender, receiver) = oneshot::channel();
        self.buffer.map_async(wgpu::MapMode::Read, .., move |result| {
            // The receiver is gone if the caller dropped the future: then nobody wants to know.
            let _ = sender.send(result);
        });
        receiver
            .await
            .map_err(|_| Error::Wgpu { during, message: "the device was lost".to_owned() })?
            .map_err(|e| Error::Wgpu { during, message: e.to_string() })?;
        let mapped = self.buffer.get_mapped_range(..).map_err(|e| Error::Wgpu { during, message: e.to_string() })?;
        let taken = take(&mapped);
        drop(mapped);
        self.buffer.unmap();
        Ok(taken)
    }
}

impl Gpu {
    /// Reads f32 values out of a buffer of the host's. **Submits** a copy of its own; commands that were recorded but not submitted are not
    /// seen. Natively the future completes only while somebody polls the device.
    ///
    /// # Errors
    /// [`Error::Argument`] if the buffer lacks usage `COPY_SRC`, or offset or size is not a multiple of 4 or outside the buffer;
    /// [`Error::Wgpu`], for example for a buffer of another device.
    pub async fn read<'b>(&self, range: impl Into<BufferRef<'b>>) -> Result<Vec<f32>> {
        let range = range.into().check_copy("buffer")?;
        if range.size() == 0 {
            return Ok(Vec::new());
        }
        let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let readback = Readback::record(self, &mut encoder, &range)?;
        // wgpu reports here what it has against the buffer: that it was destroyed, or is another device's.
        let commands = self.scoped("reading back (is the buffer of this device?)", || encoder.finish()).await?;
        self.scoped("reading back", || self.queue().submit([commands])).await?;
        readback.read().await
    }

    /// [`Gpu::read`], waiting for the GPU: submits, and polls the device until the values are here.
    ///
    /// # Errors
    /// Those of [`Gpu::read`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn read_blocking<'b>(&self, range: impl Into<BufferRef<'b>>) -> Result<Vec<f32>> {
        self.block_on(self.read(range))
    }

    /// Runs a future that waits for the GPU, polling the device so that it makes progress. Natively a mapping completes only while
    /// somebody polls.
    ///
    /// # Errors
    /// The future's own, and [`Error::Wgpu`] if the device can't be polled.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn block_on<T, E: From<Error>>(&self, future: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        use std::task::{Context, Poll, Waker};
        let mut future = std::pin::pin!(future);
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
                return result;
            }
            self.device()
                .poll(wgpu::PollType::wait_indefinitely())
                .map_err(|e| Error::Wgpu { during: "waiting for the GPU", message: e.to_string() })?;
        }
    }
}

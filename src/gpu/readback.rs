//! Reading a buffer back: async everywhere, blocking off the web.

use futures_channel::oneshot;

use super::{BufferRef, Gpu};
use crate::error::{Error, Result};

/// A mappable copy of what a submitted encoder wrote into it. It can be used again.
#[derive(Debug)]
pub(crate) struct Readback {
    buffer: wgpu::Buffer,
}

impl Readback {
    /// Makes the staging buffer. The caller records the copies into it.
    pub(crate) fn new(gpu: &Gpu, bytes: u64) -> Result<Self> {
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        Ok(Self { buffer: gpu.create_buffer("creating a readback buffer", "folio readback", bytes, usage)? })
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
    pub(crate) async fn read(&self, gpu: &Gpu) -> Result<Vec<f32>> {
        Ok(self.words(gpu, self.buffer.size()).await?.into_iter().map(f32::from_bits).collect())
    }

    /// The first `bytes` as words; see [`Readback::read`].
    pub(crate) async fn words(&self, gpu: &Gpu, bytes: u64) -> Result<Vec<u32>> {
        // The mapping may be less aligned than words ask for.
        let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        self.read_with(gpu, bytes, |mapped| mapped.chunks_exact(4).map(word).collect()).await
    }

    /// Hands the first `bytes` to `take`; see [`Readback::read`].
    pub(crate) async fn read_with<T>(&self, gpu: &Gpu, bytes: u64, take: impl FnOnce(&[u8]) -> T) -> Result<T> {
        const DURING: &str = "reading back";
        let (sender, receiver) = oneshot::channel();
        gpu.scoped(DURING, || {
            self.buffer.map_async(wgpu::MapMode::Read, ..bytes, move |result| {
                // The receiver is gone if the caller dropped the future: then nobody wants to know.
                let _ = sender.send(result);
            });
        })
        .await?;
        let mapped = receiver.await;
        gpu.check_alive(DURING)?;
        let failed = |error: &dyn std::error::Error| Error::wgpu(DURING, error.to_string());
        mapped.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
        let mapped = self.buffer.get_mapped_range(..bytes).map_err(|e| failed(&e))?;
        let taken = take(&mapped);
        drop(mapped);
        gpu.scoped(DURING, || self.buffer.unmap()).await?;
        Ok(taken)
    }
}

impl Gpu {
    /// Reads f32 values out of a buffer of the host's. **Submits** a copy of its own; commands that were recorded but not submitted are not
    /// seen. Natively the future completes only while somebody polls the device: [`Gpu::block_on`].
    ///
    /// # Errors
    /// [`Error::Argument`] if the buffer lacks usage `COPY_SRC`, or offset or size is not a multiple of 4 or outside the buffer;
    /// [`Error::Wgpu`], for example for a buffer of another device; [`Error::DeviceLost`].
    pub async fn read<'a>(&self, range: impl Into<BufferRef<'a>>) -> Result<Vec<f32>> {
        let range = range.into().check_copy("buffer")?;
        if range.size() == 0 {
            return Ok(Vec::new());
        }
        let mut encoder = self.encoder()?;
        let readback = Readback::record(self, &mut encoder, &range)?;
        // wgpu reports here what it has against the buffer: that it was destroyed, or is another device's.
        self.submit("reading back (is the buffer of this device?)", encoder).await?;
        readback.read(self).await
    }

    /// [`Gpu::read`], waiting for the GPU: submits, and polls the device until the values are here.
    ///
    /// # Errors
    /// Those of [`Gpu::read`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn read_blocking<'a>(&self, range: impl Into<BufferRef<'a>>) -> Result<Vec<f32>> {
        self.block_on(self.read(range))
    }

    /// Runs a future of this crate to its end, polling the device so that the GPU's answers arrive. For programs without an async runtime.
    ///
    /// A future that waits for something else than the GPU, such as another thread, is woken by that; the device is polled once a millisecond
    /// meanwhile.
    ///
    /// # Errors
    /// The future's own, and [`Error::Wgpu`] if the device can't be polled.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn block_on<T, E: From<Error>>(&self, future: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        use std::sync::Arc;
        use std::task::{Context, Poll, Wake};
        use std::thread::Thread;
        use std::time::Duration;

        struct Unpark(Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Arc::new(Unpark(std::thread::current())).into();
        let mut context = Context::from_waker(&waker);
        let mut future = std::pin::pin!(future);
        let mut is_idle = false;
        loop {
            if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
                return result;
            }
            // Waiting twice for a GPU that has nothing to do helps nobody: the future waits for something else.
            if is_idle {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            let status = self.device().poll(wgpu::PollType::wait_indefinitely());
            is_idle = status.map_err(|error| Error::wgpu("waiting for the GPU", error))?.is_queue_empty();
        }
    }
}

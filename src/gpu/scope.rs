//! Error scopes, and whether the device is still there.
//!
//! wgpu's calls return no `Result`: what no error scope catches goes to a handler that panics by default, so every call of the library runs
//! under one. A lost device is no error to wgpu: creation, recording and submission then do nothing, silently, and hand out objects
//! that are invalid. (The one callback for it belongs to the host.) So each call asks the device itself.

use std::sync::atomic::Ordering;
#[cfg(not(target_arch = "wasm32"))]
use std::time::Duration;

use super::Gpu;
use crate::error::{Error, Result};

/// How long recording calls trust that the device is there. Commands that are recorded for a lost device go nowhere, and what comes after them
/// (a commit, a read, the next step) asks again. 50 us are some five calls.
#[cfg(not(target_arch = "wasm32"))]
const PROBE_INTERVAL: Duration = Duration::from_micros(50);

impl Gpu {
    /// Runs `f`, which calls wgpu, and returns the validation or memory error that it raised, or that the device is lost.
    ///
    /// A host that makes its own buffers and pipelines can use this too. `during` says in the error what was going on. Nothing is submitted
    /// or polled. In a browser each scope costs a round trip to the GPU's process.
    ///
    /// # Errors
    /// [`Error::Wgpu`]; [`Error::DeviceLost`].
    ///
    /// # Panics
    /// If `f` leaves an error scope of its own open: wgpu wants scopes closed in the order in which they were opened.
    pub async fn scoped<T>(&self, during: &'static str, f: impl FnOnce() -> T) -> Result<T> {
        // Off the web the scopes' answers are there at once. Scopes belong to the thread, so all are closed before anything is awaited.
        let (value, pops) = {
            let device = self.device();
            let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
            let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
            let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
            let value = f();
            (value, (validation.pop(), memory.pop(), internal.pop()))
        };
        let (validation, memory, internal) = (pops.0.await, pops.1.await, pops.2.await);
        // A lost device also makes objects invalid, which later calls report as validation errors: it is the cause.
        self.check_alive(during)?;
        match validation.or(memory).or(internal) {
            None => Ok(value),
            Some(error) => Err(Error::wgpu(during, error)),
        }
    }

    /// [`Gpu::scoped`] in a call that can't wait. In a browser wgpu's answer would arrive after the call, so there an error goes to the device's
    /// own `uncapturederror` event instead.
    pub(crate) fn scoped_now<T>(&self, during: &'static str, f: impl FnOnce() -> T) -> Result<T> {
        #[cfg(not(target_arch = "wasm32"))]
        {
            pollster::block_on(self.scoped(during, f))
        }
        #[cfg(target_arch = "wasm32")]
        {
            let _ = during;
            Ok(f())
        }
    }

    /// [`Gpu::scoped_now`] for binding buffers, once per layer, where a scope and a probe cost as much as the call itself: no kernel is
    /// compiled, so there is no internal error, and the device is asked at most every [`PROBE_INTERVAL`].
    pub(super) fn scoped_recording<T>(&self, during: &'static str, f: impl FnOnce() -> T) -> Result<T> {
        #[cfg(not(target_arch = "wasm32"))]
        {
            let memory = self.device().push_error_scope(wgpu::ErrorFilter::OutOfMemory);
            let validation = self.device().push_error_scope(wgpu::ErrorFilter::Validation);
            let value = f();
            let (validation, memory) = (pollster::block_on(validation.pop()), pollster::block_on(memory.pop()));
            if let Some(error) = validation.or(memory) {
                self.check_alive(during)?;
                return Err(Error::wgpu(during, error));
            }
            let since_start = self.inner.start.elapsed().as_micros() as u64;
            let last_probe = self.inner.last_probe.load(Ordering::Relaxed);
            if since_start.saturating_sub(last_probe) >= PROBE_INTERVAL.as_micros() as u64 || self.is_known_lost() {
                self.check_alive(during)?;
                self.inner.last_probe.store(since_start, Ordering::Relaxed);
            }
            Ok(value)
        }
        #[cfg(target_arch = "wasm32")]
        {
            let _ = during;
            Ok(f())
        }
    }

    /// Runs `f`, which begins and ends a pass. What can be wrong with its encoder is a validation error; memory is asked for when it is
    /// finished, and whether the device is there was asked when the pass's buffers were bound.
    pub(super) fn scoped_pass(&self, during: &'static str, f: impl FnOnce()) -> Result<()> {
        #[cfg(not(target_arch = "wasm32"))]
        {
            let validation = self.device().push_error_scope(wgpu::ErrorFilter::Validation);
            f();
            match pollster::block_on(validation.pop()) {
                None => Ok(()),
                Some(error) => {
                    self.check_alive(during)?;
                    Err(Error::wgpu(during, error))
                }
            }
        }
        #[cfg(target_arch = "wasm32")]
        {
            let _ = during;
            f();
            Ok(())
        }
    }

    fn is_known_lost(&self) -> bool {
        self.inner.lost.load(Ordering::Relaxed)
    }

    /// Fails if the device is lost: destroyed by the host, removed, or given up by its driver. Always succeeds in a browser, which tells the
    /// host by an event.
    ///
    /// A query set of no queries is an error on any device but a lost one, where nothing is. Asking takes 0.8 us, and touches no state that
    /// other threads could be using.
    pub(crate) fn check_alive(&self, during: &'static str) -> Result<()> {
        #[cfg(not(target_arch = "wasm32"))]
        if !self.is_known_lost() {
            let scope = self.device().push_error_scope(wgpu::ErrorFilter::Validation);
            drop(self.device().create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Occlusion,
                count: 0,
            }));
            if pollster::block_on(scope.pop()).is_none() {
                self.inner.lost.store(true, Ordering::Relaxed);
            }
        }
        if self.is_known_lost() { Err(Error::DeviceLost { during }) } else { Ok(()) }
    }

    /// Makes a buffer. Contents are zero.
    pub(crate) fn create_buffer(
        &self,
        during: &'static str,
        label: &str,
        size: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        self.scoped_now(during, || self.device().create_buffer(&descriptor))
    }

    /// Makes a buffer with these contents, padded with zeros to whole 4 bytes. Nothing is queued: the contents are written through a mapping.
    pub(crate) fn create_buffer_with(
        &self,
        during: &'static str,
        label: &str,
        contents: &[u8],
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let size = (contents.len() as u64).next_multiple_of(wgpu::COPY_BUFFER_ALIGNMENT).max(4);
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: true };
        let buffer = self.scoped_now(during, || self.device().create_buffer(&descriptor))?;
        let mapped = buffer.get_mapped_range_mut(..);
        // Between the two calls the device may have been lost.
        self.check_alive(during)?;
        let mut mapped = mapped.map_err(|error| Error::wgpu(during, error))?;
        mapped.slice(..contents.len()).copy_from_slice(contents);
        drop(mapped);
        self.scoped_now(during, || buffer.unmap())?;
        Ok(buffer)
    }

    /// An encoder of the library's own. On a lost device it is invalid, which [`Gpu::submit`] notices.
    pub(crate) fn encoder(&self) -> Result<wgpu::CommandEncoder> {
        self.scoped_now("creating an encoder", || {
            self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
        })
    }

    /// Finishes and submits what was recorded.
    pub(crate) async fn submit(&self, during: &'static str, encoder: wgpu::CommandEncoder) -> Result<()> {
        // In two scopes: what fails while it is finished must not be submitted.
        let commands = self.scoped(during, || encoder.finish()).await?;
        self.scoped(during, || self.queue().submit([commands])).await?;
        Ok(())
    }

    /// [`Gpu::submit`] in a call that can't wait.
    pub(crate) fn submit_now(&self, during: &'static str, encoder: wgpu::CommandEncoder) -> Result<()> {
        let commands = self.scoped_now(during, || encoder.finish())?;
        self.scoped_now(during, || self.queue().submit([commands]))?;
        Ok(())
    }
}

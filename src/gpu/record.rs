//! What recording calls take: a place to record into, and ranges of the host's buffers.

use std::fmt;
use std::sync::Arc;

use super::upload::Lease;
use super::{Gpu, Program};
use crate::error::{Error, Result};
use crate::layout::HostRows;

/// Where commands go: a compute pass of the host's, or its encoder, in which folio then opens a pass of its own.
///
/// Calls that record take `impl Into<Recorder>`: hand over `&mut pass` or `&mut encoder`. They never submit. In a pass its pipeline and bind
/// group 0 are changed. It must be of the device that the call works with: wgpu reports one of another device when the encoder is finished, and gives one
/// of another wgpu instance no meaning.
pub struct Recorder<'a>(Target<'a>);

enum Target<'a> {
    Pass(&'a mut dyn Pass),
    /// Without an open pass.
    Encoder(&'a mut wgpu::CommandEncoder),
}

/// A compute pass, whatever its lifetime.
trait Pass {
    fn dispatch(&mut self, dispatch: &Prepared);
    fn hold(&mut self, lease: Lease);
}

impl Pass for wgpu::ComputePass<'_> {
    fn dispatch(&mut self, dispatch: &Prepared) {
        self.set_pipeline(dispatch.program.pipeline());
        self.set_bind_group(0, &dispatch.bind_group, &[]);
        let [x, y, z] = dispatch.grid;
        self.dispatch_workgroups(x, y, z);
    }

    fn hold(&mut self, lease: Lease) {
        self.on_submitted_work_done(move || drop(lease));
    }
}

impl fmt::Debug for Recorder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Target::Pass(_) => "Recorder(pass)",
            Target::Encoder(_) => "Recorder(encoder)",
        })
    }
}

impl<'a> From<&'a mut wgpu::ComputePass<'_>> for Recorder<'a> {
    fn from(pass: &'a mut wgpu::ComputePass<'_>) -> Self {
        Self(Target::Pass(pass))
    }
}

impl<'a> From<&'a mut wgpu::CommandEncoder> for Recorder<'a> {
    fn from(encoder: &'a mut wgpu::CommandEncoder) -> Self {
        Self(Target::Encoder(encoder))
    }
}

/// A program with its resources, in the order of its bindings, and its grid.
pub(crate) struct Dispatch<'a> {
    pub(crate) program: &'a Arc<Program>,
    pub(crate) resources: Vec<wgpu::BindingResource<'a>>,
    pub(crate) grid: [u32; 3],
}

/// A dispatch whose resources are bound.
pub(crate) struct Prepared {
    program: Arc<Program>,
    bind_group: wgpu::BindGroup,
    grid: [u32; 3],
}

impl Gpu {
    /// Runs those of these dispatches whose programs have not been warmed up yet. **Submits** a command buffer if there are any; doesn't
    /// wait for it.
    ///
    /// # Errors
    /// [`Error::Wgpu`].
    pub(crate) fn warm_up<'a>(&self, dispatches: impl IntoIterator<Item = Dispatch<'a>>, lease: Lease) -> Result<()> {
        let cold: Vec<_> = dispatches.into_iter().filter(|dispatch| dispatch.program.take_cold()).collect();
        if cold.is_empty() {
            return Ok(());
        }
        let mut encoder = self.encoder()?;
        Recorder::from(&mut encoder).record(self, "folio warm-up", &cold, &[lease])?;
        self.submit_now("warming up", encoder)
    }

    /// A buffer that a dispatch on no work binds where it needs some storage.
    pub(crate) fn warm_up_buffer(&self) -> Result<wgpu::Buffer> {
        self.create_buffer("creating warm-up buffers", "folio warm-up", 256, wgpu::BufferUsages::STORAGE)
    }

    /// Binds the resources of dispatches, all of them or none.
    ///
    /// # Errors
    /// [`Error::Wgpu`] if a resource doesn't fit its binding; [`Error::DeviceLost`].
    pub(crate) fn prepare(&self, dispatches: &[Dispatch<'_>]) -> Result<Vec<Prepared>> {
        // One scope for all: a scope costs a tenth of a bind group.
        self.scoped_recording("binding buffers (are they all of the same device?)", || {
            let prepare = |dispatch: &Dispatch<'_>| Prepared {
                program: Arc::clone(dispatch.program),
                bind_group: dispatch.program.bind(self, &dispatch.resources),
                grid: dispatch.grid,
            };
            dispatches.iter().map(prepare).collect()
        })
    }
}

impl Recorder<'_> {
    /// The same place, for one more call.
    #[cfg(feature = "model")]
    pub(crate) fn reborrow(&mut self) -> Recorder<'_> {
        Recorder(match &mut self.0 {
            Target::Pass(pass) => Target::Pass(&mut **pass),
            Target::Encoder(encoder) => Target::Encoder(encoder),
        })
    }

    /// Records dispatches one after another, or none of them. wgpu orders those that write what a later one reads.
    ///
    /// The leases are those of the uploads that the dispatches read. They are held until the commands have finished, or their
    /// encoder or command buffer is dropped without a submit.
    ///
    /// # Errors
    /// Those of [`Gpu::prepare`].
    pub(crate) fn record(
        self,
        gpu: &Gpu,
        label: &'static str,
        dispatches: &[Dispatch<'_>],
        leases: &[Lease],
    ) -> Result<()> {
        self.record_prepared(gpu, label, &gpu.prepare(dispatches)?, leases)
    }

    /// [`Recorder::record`] of what is bound already. Fails only on a lost device or for an encoder that is no longer recording.
    pub(crate) fn record_prepared(
        self,
        gpu: &Gpu,
        label: &'static str,
        dispatches: &[Prepared],
        leases: &[Lease],
    ) -> Result<()> {
        #[cfg(feature = "counters")]
        gpu.inner.num_dispatches.fetch_add(dispatches.len() as u64, std::sync::atomic::Ordering::Relaxed);
        let into_pass = |pass: &mut dyn Pass| {
            dispatches.iter().for_each(|dispatch| pass.dispatch(dispatch));
            leases.iter().for_each(|lease| pass.hold(lease.clone()));
        };
        match self.0 {
            Target::Pass(pass) => {
                into_pass(pass);
                Ok(())
            }
            Target::Encoder(encoder) => gpu.scoped_pass("recording a pass", || {
                let descriptor = wgpu::ComputePassDescriptor { label: Some(label), timestamp_writes: None };
                into_pass(&mut encoder.begin_compute_pass(&descriptor));
            }),
        }
    }
}

/// A range of a host's buffer. Made from `&buffer`, from `buffer.slice(..)`, or by [`BufferRef::new`].
#[derive(Clone, Copy, Debug)]
pub struct BufferRef<'a> {
    buffer: &'a wgpu::Buffer,
    offset: u64,
    size: u64,
}

impl<'a> BufferRef<'a> {
    /// `size` bytes from `offset`. Nothing is checked here; the call that uses the range checks it.
    #[must_use]
    pub const fn new(buffer: &'a wgpu::Buffer, offset: u64, size: u64) -> Self {
        Self { buffer, offset, size }
    }

    /// Checks that the range can be bound as storage and holds `elements` values of 4 bytes (exactly, if so asked), and cuts it to them.
    ///
    /// # Errors
    /// [`Error::Argument`] that names `argument`; [`Error::Unsupported`] if it doesn't fit a binding.
    pub(crate) fn check(self, gpu: &Gpu, argument: &'static str, elements: u64, exact: bool) -> Result<Self> {
        if !self.buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(Error::argument(argument, format!("usage {:?}", self.buffer.usage()), "BufferUsages::STORAGE"));
        }
        let alignment = u64::from(gpu.limits().min_storage_buffer_offset_alignment);
        if !self.offset.is_multiple_of(alignment) {
            let rule = format!("a multiple of the device's storage offset alignment, {alignment}");
            return Err(Error::argument(argument, format!("offset {}", self.offset), rule));
        }
        if !self.is_inside() {
            let got = format!("{} bytes from offset {}", self.size, self.offset);
            let rule = format!("a range within the buffer's {} bytes", self.buffer.size());
            return Err(Error::argument(argument, got, rule));
        }
        let need = elements.saturating_mul(4);
        if self.size < need || (exact && self.size != need) {
            let rule = if exact { "exactly" } else { "at least" };
            let got = format!("{} bytes", self.size);
            return Err(Error::argument(argument, got, format!("{rule} {need} bytes ({elements} words of 4)")));
        }
        let max = gpu.limits().max_storage_buffer_binding_size;
        if need > max {
            let (need, have) = (format!("{need} bytes"), format!("{max} bytes in a storage binding"));
            return Err(Error::unsupported(argument, need, have).with_hint("use smaller steps"));
        }
        Ok(Self { size: need, ..self })
    }

    /// [`BufferRef::check`] for rows of a step's tokens: exactly these if they have no gaps.
    pub(crate) fn check_rows(
        self,
        gpu: &Gpu,
        argument: &'static str,
        rows: &HostRows,
        num_tokens: u32,
    ) -> Result<Self> {
        self.check(gpu, argument, rows.words(num_tokens), !rows.strided())
    }

    /// Checks that the range can be copied from.
    pub(crate) fn check_copy(self, argument: &'static str) -> Result<Self> {
        if !self.buffer.usage().contains(wgpu::BufferUsages::COPY_SRC) {
            let got = format!("usage {:?}", self.buffer.usage());
            return Err(Error::argument(argument, got, "BufferUsages::COPY_SRC"));
        }
        if !self.is_inside() || !self.offset.is_multiple_of(4) || !self.size.is_multiple_of(4) {
            let got = format!("{} bytes from offset {}", self.size, self.offset);
            let rule = format!("multiples of 4 within the buffer's {} bytes", self.buffer.size());
            return Err(Error::argument(argument, got, rule));
        }
        Ok(self)
    }

    fn is_inside(&self) -> bool {
        self.offset.checked_add(self.size).is_some_and(|end| end <= self.buffer.size())
    }

    /// Bytes of the buffer before the range.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the range.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The buffer.
    #[must_use]
    pub fn buffer(&self) -> &'a wgpu::Buffer {
        self.buffer
    }

    /// Whether two ranges share a byte.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.buffer == other.buffer && self.offset < other.offset + other.size && other.offset < self.offset + self.size
    }

    /// As a binding. wgpu wants sizes in whole 4 bytes, which a checked range has.
    pub(crate) fn binding(&self) -> wgpu::BindingResource<'a> {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: self.buffer,
            offset: self.offset,
            size: std::num::NonZeroU64::new(self.size),
        })
    }
}

impl<'a> From<&'a wgpu::Buffer> for BufferRef<'a> {
    fn from(buffer: &'a wgpu::Buffer) -> Self {
        Self::new(buffer, 0, buffer.size())
    }
}

impl<'a> From<wgpu::BufferSlice<'a>> for BufferRef<'a> {
    fn from(slice: wgpu::BufferSlice<'a>) -> Self {
        Self::new(slice.buffer(), slice.offset(), slice.size())
    }
}

/// The parameter block at some bytes of an upload, as a uniform binding.
pub(crate) fn params_binding<P>(buffer: &wgpu::Buffer, offset: u64) -> wgpu::BindingResource<'_> {
    let size = std::num::NonZeroU64::new(size_of::<P>() as u64);
    wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size })
}

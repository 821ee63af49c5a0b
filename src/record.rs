//! What recording calls take: a place to record into, and ranges of the host's buffers.

use crate::error::{Error, Result};
use crate::gpu::Gpu;

/// Where commands go: a compute pass of the host's, or its encoder, in which folio then opens a pass of its own.
///
/// Recording calls take `impl Into<Recorder>`: hand over `&mut pass` or `&mut encoder`.
#[derive(Debug)]
pub enum Recorder<'a, 'encoder> {
    /// A pass that is open already. Its pipeline and bind group 0 are changed.
    Pass(&'a mut wgpu::ComputePass<'encoder>),
    /// An encoder without an open pass.
    Encoder(&'a mut wgpu::CommandEncoder),
}

impl<'a, 'encoder> From<&'a mut wgpu::ComputePass<'encoder>> for Recorder<'a, 'encoder> {
    fn from(pass: &'a mut wgpu::ComputePass<'encoder>) -> Self {
        Self::Pass(pass)
    }
}

impl<'a> From<&'a mut wgpu::CommandEncoder> for Recorder<'a, 'static> {
    fn from(encoder: &'a mut wgpu::CommandEncoder) -> Self {
        Self::Encoder(encoder)
    }
}

/// A pipeline with its bindings and its grid, ready to be recorded.
pub(crate) struct Dispatch<'p> {
    pub(crate) pipeline: &'p wgpu::ComputePipeline,
    pub(crate) bind_group: wgpu::BindGroup,
    pub(crate) grid: [u32; 3],
}

impl Recorder<'_, '_> {
    /// Records the dispatches one after another. wgpu orders those that write what a later one reads.
    pub(crate) fn record(self, label: &str, dispatches: &[Dispatch<'_>]) {
        fn into_pass(pass: &mut wgpu::ComputePass<'_>, dispatches: &[Dispatch<'_>]) {
            for dispatch in dispatches {
                pass.set_pipeline(dispatch.pipeline);
                pass.set_bind_group(0, &dispatch.bind_group, &[]);
                let [x, y, z] = dispatch.grid;
                pass.dispatch_workgroups(x, y, z);
            }
        }
        match self {
            Self::Pass(pass) => into_pass(pass, dispatches),
            Self::Encoder(encoder) => {
                let descriptor = wgpu::ComputePassDescriptor { label: Some(label), timestamp_writes: None };
                into_pass(&mut encoder.begin_compute_pass(&descriptor), dispatches);
            }
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
    pub fn check(self, gpu: &Gpu, argument: &'static str, elements: u64, exact: bool) -> Result<Self> {
        let need = elements * 4;
        if !self.buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(Error::argument(argument, format!("usage {:?}", self.buffer.usage()), "BufferUsages::STORAGE"));
        }
        let alignment = u64::from(gpu.limits().min_storage_buffer_offset_alignment);
        if !self.offset.is_multiple_of(alignment) {
            let rule = format!("a multiple of the device's storage offset alignment, {alignment}");
            return Err(Error::argument(argument, format!("offset {}", self.offset), rule));
        }
        let end = self.offset.checked_add(self.size);
        if end.is_none_or(|end| end > self.buffer.size()) {
            let got = format!("{} bytes from offset {}", self.size, self.offset);
            return Err(Error::argument(
                argument,
                got,
                format!("a range within the buffer's {} bytes", self.buffer.size()),
            ));
        }
        if self.size < need || (exact && self.size != need) {
            let rule = if exact { "exactly" } else { "at least" };
            let got = format!("{} bytes", self.size);
            return Err(Error::argument(argument, got, format!("{rule} {need} bytes ({elements} f32)")));
        }
        let max = gpu.limits().max_storage_buffer_binding_size;
        if need > max {
            let hint = "; use smaller steps".to_owned();
            let (need, have) = (format!("{need} bytes"), format!("{max} bytes in a storage binding"));
            return Err(Error::Unsupported { what: argument, need, have, hint });
        }
        Ok(Self { size: need, ..self })
    }

    /// Checks that the range can be copied from.
    pub(crate) fn check_copy(self, argument: &'static str) -> Result<Self> {
        if !self.buffer.usage().contains(wgpu::BufferUsages::COPY_SRC) {
            return Err(Error::argument(
                argument,
                format!("usage {:?}", self.buffer.usage()),
                "BufferUsages::COPY_SRC",
            ));
        }
        let end = self.offset.checked_add(self.size);
        let inside = end.is_some_and(|end| end <= self.buffer.size());
        if !inside || !self.offset.is_multiple_of(4) || !self.size.is_multiple_of(4) {
            let got = format!("{} bytes from offset {}", self.size, self.offset);
            let rule = format!("multiples of 4 within the buffer's {} bytes", self.buffer.size());
            return Err(Error::argument(argument, got, rule));
        }
        Ok(self)
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
    #[must_use]
    pub fn binding(&self) -> wgpu::BindingResource<'a> {
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

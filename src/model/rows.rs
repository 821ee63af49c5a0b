//! [`Rows`]: activations in a buffer.

use crate::error::{Error, Result};
use crate::gpu::{BufferRef, Gpu};
use crate::layout::Region;

/// f32 activations `[rows, width]`, row by row from `offset` bytes into a buffer.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The buffer, with usage `STORAGE`.
    pub buffer: &'a wgpu::Buffer,
    /// Bytes before the first row; a multiple of the device's storage offset alignment.
    pub offset: u64,
    /// Rows: tokens of the step, or tokens times heads.
    pub rows: u32,
    /// f32 per row.
    pub width: u32,
}

impl<'a> Rows<'a> {
    /// Rows from the start of a buffer.
    #[must_use]
    pub const fn new(buffer: &'a wgpu::Buffer, rows: u32, width: u32) -> Self {
        Self { buffer, offset: 0, rows, width }
    }

    /// One of the matrices that a linear layer writes one after another into a buffer.
    pub(crate) fn region(buffer: &'a wgpu::Buffer, rows: u32, Region { width, offset, .. }: Region) -> Self {
        Self { offset: u64::from(rows) * u64::from(offset) * 4, ..Self::new(buffer, rows, width) }
    }

    /// Elements of all rows.
    #[must_use]
    pub const fn elements(&self) -> u64 {
        self.rows as u64 * self.width as u64
    }

    /// Bytes of all rows.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.elements().saturating_mul(4)
    }

    /// The range as the calls of cache and attention take it: exactly the rows.
    #[must_use]
    pub const fn range(&self) -> BufferRef<'a> {
        BufferRef::new(self.buffer, self.offset, self.bytes())
    }

    /// The range as a binding: exactly the rows, so that `arrayLength` counts them.
    pub(crate) fn binding(&self) -> wgpu::BindingResource<'a> {
        self.range().binding()
    }

    /// Checks the width, that there is a row, and that the rows lie within the buffer and fit a binding.
    ///
    /// # Errors
    /// [`Error::Argument`] that names `argument`; [`Error::Unsupported`] if they don't fit a binding.
    pub(crate) fn check(&self, gpu: &Gpu, argument: &'static str, rows: u32, width: u32) -> Result<()> {
        if self.rows != rows || self.width != width || rows == 0 {
            let got = format!("[{}, {}]", self.rows, self.width);
            return Err(Error::argument(argument, got, format!("[{rows}, {width}], at least one row")));
        }
        self.range().check(gpu, argument, self.elements(), true)?;
        Ok(())
    }
}

//! Small tables that kernels read beside the rows: frequencies, and weights of norms.

use super::Gpu;
use crate::error::{Error, Result};
use crate::kernel::RopeConfig;

impl Gpu {
    /// Uploads a rope's frequencies.
    pub(crate) fn rope_table(&self, rope: &RopeConfig) -> Result<wgpu::Buffer> {
        let table = rope.table();
        let contents = bytemuck::cast_slice(&table);
        self.create_buffer_with("uploading frequencies", "folio rope table", contents, wgpu::BufferUsages::STORAGE)
    }

    /// Uploads the weights of norms, one after another, and behind them what is added to the mean square.
    pub(crate) fn norm_table(&self, label: &str, weights: &[&[f32]], eps: f32) -> Result<wgpu::Buffer> {
        // Rows of zeros would be divided by zero, and a value that is flushed to zero is one.
        if !(eps.is_finite() && eps >= f32::MIN_POSITIVE) {
            return Err(Error::argument("eps", eps, "a normal number above 0"));
        }
        let mut values = weights.concat();
        values.push(eps);
        self.create_buffer_with("uploading norms", label, bytemuck::cast_slice(&values), wgpu::BufferUsages::STORAGE)
    }
}

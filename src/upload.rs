//! Small host-to-GPU buffers of one step: reused, never shared.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::gpu::Gpu;

/// Buffers that earlier steps have given back.
///
/// `Queue::write_buffer` takes effect before the commands of the *next* submit, so a buffer that is written again before the
/// commands that read it were submitted would feed them the later step's data. Therefore a buffer comes back here only
/// through [`Upload::recycle`], which a host calls after its submit; otherwise it is simply dropped.
#[derive(Clone, Debug, Default)]
pub(crate) struct UploadPool(Arc<Mutex<Vec<wgpu::Buffer>>>);

/// A filled buffer of one step, from [`Gpu::upload`].
#[derive(Debug)]
pub struct Upload {
    buffer: wgpu::Buffer,
    pool: UploadPool,
}

/// Sizes are powers of two from here, so that a growing sequence finds a used buffer again.
const MIN_BYTES: u64 = 4096;

/// A decode loop has two or three uploads in use; more than this many idle ones are leftovers of a burst.
const MAX_IDLE: usize = 16;

impl UploadPool {
    fn idle(&self) -> MutexGuard<'_, Vec<wgpu::Buffer>> {
        // A panic of another thread can't leave the list half-changed: each use is one push or one remove.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an idle buffer, or makes one, and writes `words` into it.
    pub(crate) fn fill(&self, gpu: &Gpu, argument: &'static str, words: &[u32]) -> Result<Upload> {
        let bytes = (words.len() as u64 * 4).next_power_of_two().max(MIN_BYTES);
        let max = gpu.max_storage_bytes();
        if words.len() as u64 * 4 > max {
            let hint = "; split the batch, or use a larger block_size (shorter block tables)".to_owned();
            let (need, have) = (format!("{} bytes of tables", words.len() * 4), format!("{max} bytes in a binding"));
            return Err(Error::Unsupported { what: argument, need, have, hint });
        }
        let bytes = bytes.min(max);
        let reused = {
            let mut idle = self.idle();
            let fits = idle.iter().position(|b| b.size() >= bytes && b.size() <= bytes * 4);
            fits.map(|i| idle.swap_remove(i))
        };
        let buffer = match reused {
            Some(buffer) => buffer,
            None => gpu.create_buffer(
                "creating an upload buffer",
                "folio upload",
                bytes,
                wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            )?,
        };
        gpu.queue().write_buffer(&buffer, 0, bytemuck::cast_slice(words));
        Ok(Upload { buffer, pool: self.clone() })
    }
}

impl Upload {
    /// The buffer, with usages `STORAGE` and `UNIFORM`. It may be larger than what was written.
    #[must_use]
    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// Gives the buffer to later steps. **Only after the commands that read it have been submitted**; dropping it instead is always safe.
    pub fn recycle(self) {
        let mut idle = self.pool.idle();
        if idle.len() < MAX_IDLE {
            idle.push(self.buffer);
        }
    }
}

impl Gpu {
    /// Writes words into a small buffer that the next submit's commands can read: one that an earlier step has given back by
    /// [`Upload::recycle`], or a new one. `argument` says in errors what they are.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if they don't fit a binding; [`Error::Wgpu`].
    pub fn upload(&self, argument: &'static str, words: &[u32]) -> Result<Upload> {
        self.uploads().fill(self, argument, words)
    }
}

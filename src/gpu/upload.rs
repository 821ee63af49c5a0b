//! Small host-to-GPU buffers: leased, reused, never shared.
//!
//! `Queue::write_buffer` takes effect before the commands of the *next* submit, whatever was recorded in between. A buffer that is written again
//! before the commands that read it have run would feed them another step's work items, and trusted shaders index with what
//! those say. So a buffer is leased: its lease is held by whoever may still record commands that read it, and by every recording until its
//! commands have finished or can never run. Only then does it go back to the pool; no safe call gives it back earlier.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Gpu;
use crate::error::{Error, Result};

/// Keeps a buffer from being written again for as long as a clone is alive.
#[derive(Clone, Debug)]
pub(crate) struct Lease(
    // Held, never read: the pool counts the holders.
    #[allow(dead_code, reason = "its clones are counted")] Arc<()>,
);

impl Lease {
    /// Holds the lease until the commands of a pass have finished or can never run.
    #[cfg(feature = "model")]
    pub(crate) fn hold_in(self, pass: &wgpu::ComputePass<'_>) {
        pass.on_submitted_work_done(move || drop(self));
    }
}

/// A buffer, and what counts its leases: it is idle while the pool is the only holder.
#[derive(Debug)]
struct Slot {
    buffer: wgpu::Buffer,
    lease: Arc<()>,
}

impl Slot {
    fn is_idle(&mut self) -> bool {
        // Unlike `strong_count`, this sees what the last holder did before it let go.
        Arc::get_mut(&mut self.lease).is_some()
    }
}

/// The buffers of a device, leased and idle.
#[derive(Debug, Default)]
pub(super) struct UploadPool(Mutex<Vec<Slot>>);

/// Sizes are powers of two from here, so that a growing sequence finds a used buffer again.
const MIN_BYTES: u64 = 4096;

/// A decode loop has two or three uploads per step and a step or two in flight. More buffers than this are a burst: they are freed
/// when their lease ends, instead of being kept.
const MAX_SLOTS: usize = 64;

impl UploadPool {
    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        // A panic of another thread can't leave the list half-changed: each use is one push or one retain.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle buffer of at least `bytes`, and not much more, with a lease on it.
    fn lease(&self, bytes: u64) -> Option<(wgpu::Buffer, Lease)> {
        let mut slots = self.slots();
        let sizes = bytes..=bytes.saturating_mul(4);
        let mut fitting = slots.iter_mut().filter(|slot| sizes.contains(&slot.buffer.size()));
        let slot = fitting.find_map(|slot| slot.is_idle().then_some(slot))?;
        Some((slot.buffer.clone(), Lease(Arc::clone(&slot.lease))))
    }

    fn add(&self, buffer: &wgpu::Buffer) -> Lease {
        let lease = Arc::new(());
        let mut slots = self.slots();
        if slots.len() >= MAX_SLOTS {
            // Those of sizes that are not asked for any more.
            slots.retain_mut(|slot| !slot.is_idle());
        }
        if slots.len() < MAX_SLOTS {
            slots.push(Slot { buffer: buffer.clone(), lease: Arc::clone(&lease) });
        }
        Lease(lease)
    }
}

/// Words for the GPU. They are written when the first commands that read them are recorded, so that what is never recorded costs the device
/// nothing.
#[derive(Debug)]
pub(crate) struct Upload {
    /// Where the words go, whoever asks for them first.
    gpu: Gpu,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Words(Vec<u32>),
    Written(wgpu::Buffer, Lease),
}

impl Upload {
    /// Checks that the words fit a binding. `argument` says in errors what they are.
    ///
    /// # Errors
    /// [`Error::Unsupported`]; [`Error::DeviceLost`].
    pub(crate) fn new(gpu: &Gpu, argument: &'static str, words: Vec<u32>) -> Result<Self> {
        let (bytes, max) = (words.len() as u64 * 4, gpu.max_storage_bytes());
        if bytes > max {
            let (need, have) = (format!("{bytes} bytes of tables"), format!("{max} bytes in a binding"));
            let hint = "split the batch, or use a larger block_size (shorter block tables)";
            return Err(Error::unsupported(argument, need, have).with_hint(hint));
        }
        gpu.check_alive("preparing an upload")?;
        Ok(Self { gpu: gpu.clone(), state: Mutex::new(State::Words(words)) })
    }

    /// The buffer, with usages `STORAGE` and `UNIFORM`, and the lease that a recording which reads it has to hold. It may be larger than
    /// what was written.
    ///
    /// # Errors
    /// [`Error::Wgpu`]; [`Error::DeviceLost`].
    pub(crate) fn buffer(&self) -> Result<(wgpu::Buffer, Lease)> {
        let gpu = &self.gpu;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let words = match &*state {
            State::Written(buffer, lease) => return Ok((buffer.clone(), lease.clone())),
            State::Words(words) => words,
        };
        let bytes = (words.len() as u64 * 4).next_power_of_two().max(MIN_BYTES).min(gpu.max_storage_bytes());
        let pool = &gpu.inner.uploads;
        let (buffer, lease) = match pool.lease(bytes) {
            Some(leased) => leased,
            None => {
                let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
                let buffer = gpu.create_buffer("creating an upload buffer", "folio upload", bytes, usage)?;
                let lease = pool.add(&buffer);
                (buffer, lease)
            }
        };
        gpu.scoped_now("uploading", || gpu.queue().write_buffer(&buffer, 0, bytemuck::cast_slice(words)))?;
        *state = State::Written(buffer.clone(), lease.clone());
        Ok((buffer, lease))
    }
}

//! Buffers and passes for tests of single kernels.

use folio::{BufferRef, Gpu, wgpu};

const USAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE
    .union(wgpu::BufferUsages::COPY_SRC)
    .union(wgpu::BufferUsages::COPY_DST)
    .union(wgpu::BufferUsages::UNIFORM);

/// A storage buffer of `words` words with no meaning: NaN, so that a kernel that doesn't write is seen.
pub(crate) fn empty(gpu: &Gpu, words: usize) -> wgpu::Buffer {
    words_buffer(gpu, &vec![f32::NAN.to_bits(); words])
}

pub(crate) fn floats(gpu: &Gpu, values: &[f32]) -> wgpu::Buffer {
    words_buffer(gpu, &values.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
}

pub(crate) fn words_buffer(gpu: &Gpu, values: &[u32]) -> wgpu::Buffer {
    let descriptor =
        wgpu::BufferDescriptor { label: None, size: values.len() as u64 * 4, usage: USAGE, mapped_at_creation: false };
    let buffer = gpu.device().create_buffer(&descriptor);
    gpu.queue().write_buffer(&buffer, 0, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    buffer
}

/// Records with `record` into a pass and submits it.
pub(crate) fn run<T>(gpu: &Gpu, record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> T) -> T {
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let result = record(&mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()));
    gpu.queue().submit([encoder.finish()]);
    result
}

pub(crate) fn read(gpu: &Gpu, buffer: &wgpu::Buffer) -> Vec<f32> {
    gpu.read_blocking(BufferRef::from(buffer)).unwrap()
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    futures::executor::block_on(future)
}

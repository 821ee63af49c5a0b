//! The library's [`Timer`](folio::measure::Timer), for a program that stops where it can't measure.

use folio::{Gpu, wgpu};

pub(crate) use folio::measure::{Sample, median};

pub(crate) struct Timer(folio::measure::Timer);

impl Timer {
    pub(crate) fn new(gpu: &Gpu) -> Self {
        Self(folio::measure::Timer::new(gpu).expect("the device is there"))
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        self.0.gpu()
    }

    pub(crate) fn clock(&self) -> &'static str {
        self.0.clock()
    }

    pub(super) fn inner(&self) -> &folio::measure::Timer {
        &self.0
    }

    pub(super) fn inner_mut(&mut self) -> &mut folio::measure::Timer {
        &mut self.0
    }

    pub(crate) fn measure(&self, record: impl FnOnce(&mut wgpu::ComputePass<'_>)) -> Sample {
        let record = |pass: &mut wgpu::ComputePass<'_>| {
            record(pass);
            Ok(())
        };
        self.0.measure(record).expect("the device is there")
    }
}

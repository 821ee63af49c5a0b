//! The library's [`Timer`](folio::tune::Timer), for a program that stops where it can't measure.

use folio::{Gpu, wgpu};

pub(crate) use folio::tune::{Sample, median};

pub(crate) struct Timer(folio::tune::Timer);

impl Timer {
    pub(crate) fn new(gpu: &Gpu) -> Self {
        Self(folio::tune::Timer::new(gpu).expect("the device is there"))
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        self.0.gpu()
    }

    pub(crate) fn clock(&self) -> &'static str {
        self.0.clock()
    }

    pub(crate) fn check_timestamps(&mut self, pass: impl Fn(&mut wgpu::ComputePass<'_>)) {
        let pass = |recorded: &mut wgpu::ComputePass<'_>| {
            pass(recorded);
            Ok(())
        };
        self.0.check_timestamps(pass).expect("the device is there");
    }

    pub(crate) fn measure(&self, record: impl FnOnce(&mut wgpu::ComputePass<'_>)) -> Sample {
        let record = |pass: &mut wgpu::ComputePass<'_>| {
            record(pass);
            Ok(())
        };
        self.0.measure(record).expect("the device is there")
    }
}

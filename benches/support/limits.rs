//! The library's plain loops ([`folio::measure`]), for a program that stops where it can't measure: the rates that the kernels are compared with.

use folio::KvCache;
use folio::measure::{self, PlainLoop};

use super::timer::{Sample, Timer};

/// A loop, ready to be recorded.
pub(crate) struct Loop {
    /// Its element or accumulator type.
    pub(crate) name: String,
    /// Bytes read, or floating-point operations.
    pub(crate) work: f64,
    plain: PlainLoop,
}

impl Loop {
    fn new(plain: folio::Result<PlainLoop>) -> Self {
        let plain = plain.expect("the device is there");
        Self { name: plain.name().to_owned(), work: plain.work(), plain }
    }

    pub(crate) fn measure(&self, timer: &Timer) -> Sample {
        self.plain.measure(timer.inner()).expect("the device is there")
    }
}

/// The fastest loop that reads the first `side_bytes` bytes of a layer's K and of its V.
pub(crate) fn read_loop(timer: &Timer, cache: &KvCache, side_bytes: u64) -> Loop {
    let (k, v) = cache.layer_buffers(0).expect("a layer");
    Loop::new(measure::read_loop(timer.inner(), &k[0], &v[0], side_bytes))
}

/// The fastest loop of independent multiply-adds, at least some milliseconds long. Also checks the timer's timestamps with it.
pub(crate) fn multiply_add_loop(timer: &mut Timer) -> Loop {
    Loop::new(measure::multiply_add_loop(timer.inner_mut()))
}

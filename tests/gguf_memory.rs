//! A damaged GGUF file must not take more memory than its bytes are good for.
//!
//! A binary of its own, as it counts every allocation of the process.
#![cfg(feature = "model")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may fail, and says what it measured")]

use std::path::Path;

use folio::model::{Checkpoint, Tokenizer};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// A fixture that is fine takes some 1.2 MB, 100 times its header: a vocabulary is held as a list, a map, a `tokenizer.json` and the library's tables.
/// A count that was believed would take gigabytes.
const MAX_HEAP: usize = 4 << 20;

#[test]
fn damaged_files_take_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf");
    let mut random = fastrand::Rng::with_seed(7);
    let mut most = 0;
    for name in ["qwen2/model.gguf", "tokenizers/llama_spm.gguf", "tokenizers/llama_bpe.gguf"] {
        let whole = std::fs::read(fixtures.join(name)).unwrap();
        // Settings come first.
        let header = whole.len().min(8000);
        for round in 0..400 {
            let mut bytes = whole.clone();
            if round % 2 == 0 {
                // A length or a count that is far too large.
                let at = random.usize(8..header - 8);
                bytes[at + random.usize(2..8)] = random.u8(1..);
            } else {
                bytes[random.usize(..header)] = random.u8(..);
            }
            std::fs::write(&path, &bytes).unwrap();
            let before = ALLOCATOR.current_usage();
            ALLOCATOR.reset_peak_usage();
            drop(Checkpoint::open(&path));
            drop(Tokenizer::from_file(&path));
            most = most.max(ALLOCATOR.peak_usage().saturating_sub(before));
        }
    }
    println!("{:.1} MB of heap at most", most as f64 / 1e6);
    assert!(most < MAX_HEAP, "{most} bytes of heap");
}

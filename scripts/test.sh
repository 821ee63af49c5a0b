#!/usr/bin/env bash
# All checks, in the order in which they are cheap. Stops at the first that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# wgpu looks at GL adapters too, and Mesa complains on stderr where headless machines leave this unset.
mkdir -p target
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$PWD/target}"

# A missing adapter fails the GPU tests instead of skipping them.
export FOLIO_REQUIRE_GPU=1

section() { printf '\n=== %s ===\n' "$*"; }

section "Adapter"
scripts/install_adapter.sh

section "Format"
cargo fmt --check

section "Lints, all features"
cargo clippy --all-targets --all-features -- -D warnings

section "Lints, no default features"
cargo clippy --lib --no-default-features -- -D warnings

# In release, which the benches and the demo share: wgpu is compiled once, and the oracle is fast.
section "Tests (library, host, GPU, examples)"
cargo test --release --all-features --lib --tests --examples

section "Tests in the documentation"
cargo test --release --all-features --doc

section "Documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features

section "All checks passed"

#!/usr/bin/env bash
# Runs the demo, after installing what is missing. Arguments go to the demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v cargo >/dev/null; then
    echo "demo: cargo not found; install Rust from https://rustup.rs" >&2
    exit 1
fi
scripts/install_adapter.sh
cargo run --release --example chunked_chat -- "$@"

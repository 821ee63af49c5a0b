#!/usr/bin/env bash
# Runs the demo, `folio chat`, after installing what is missing. Arguments go to it. FOLIO names a program that is built already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# wgpu looks at GL adapters too, and Mesa complains on stderr where headless machines leave this unset.
mkdir -p target
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$PWD/target}"

if ! command -v cargo >/dev/null; then
    echo "demo: cargo not found; install Rust from https://rustup.rs" >&2
    exit 1
fi
scripts/install_adapter.sh
# On a terminal the demo asks for prompts; elsewhere it holds its own conversation, and doesn't wait for a pipe that nobody writes to.
[ -t 0 ] || exec </dev/null
if [ -n "${FOLIO:-}" ]; then
    exec "$FOLIO" chat "$@"
fi
cargo run --release -p folio-cli -- chat "$@"

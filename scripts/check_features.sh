#!/usr/bin/env bash
# Every feature alone, all pairs, and none: the library builds without a warning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! cargo hack --version >/dev/null 2>&1; then
    cargo install --locked cargo-hack
fi
# Features of dev-dependencies don't count: cargo leaves them out where no test is built.
cargo hack clippy --lib --feature-powerset --depth 2 --keep-going -- -D warnings

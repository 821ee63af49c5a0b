#!/usr/bin/env bash
# Every feature alone, all pairs, and none: the library builds without a warning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! cargo hack --version >/dev/null 2>&1; then
    cargo install --locked cargo-hack
fi
# Features of dev-dependencies don't count: cargo leaves them out where no test is built. `default` is a set of the others, and `open` and `counters`
# switch those of wgpu on, which means to build wgpu again in all its forms: each is checked alone, and with all others where everything is linted.
cargo hack clippy --lib --feature-powerset --depth 2 --exclude-features default,open,counters --keep-going -- -D warnings
cargo clippy --lib -- -D warnings
cargo clippy --lib --no-default-features --features open -- -D warnings
cargo clippy --lib --no-default-features --features counters -- -D warnings

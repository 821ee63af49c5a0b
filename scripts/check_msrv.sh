#!/usr/bin/env bash
# Type-checks the library with the oldest compiler that Cargo.toml promises (`rust-version`), if there is a way to have it. Without one it says so
# and succeeds: clippy's lint `incompatible_msrv`, which is denied, has then compared every use of the standard library with the version
# at least.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
say() { printf 'minimum Rust %s: %s\n' "$version" "$*"; }
is_it() { [[ "$("$@" --version 2>/dev/null)" =~ ^rustc\ "$version"(\.|\ ) ]]; }

if command -v rustup >/dev/null && ! is_it rustup run "$version" rustc; then
    timeout 180 rustup toolchain install --no-self-update --profile minimal "$version" >/dev/null 2>&1 || true
fi
rustc=
if command -v rustup >/dev/null && is_it rustup run "$version" rustc; then
    rustc=$(rustup run "$version" rustc --print sysroot)/bin/rustc
else
    for candidate in rustc /usr/bin/rustc; do
        if is_it "$candidate"; then
            rustc=$candidate
            break
        fi
    done
fi
if [ -z "$rustc" ]; then
    say "NOT CHECKED with that compiler: rustup can't install it, and $(rustc --version) is another"
    exit 0
fi
say "$("$rustc" --version)"
export RUSTC=$rustc CARGO_TARGET_DIR=target/msrv CARGO_PROFILE_DEV_DEBUG=0 CARGO_INCREMENTAL=0
cargo check --lib --no-default-features
cargo check --lib --all-features

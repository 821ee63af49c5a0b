#!/usr/bin/env bash
# Type-checks the library for browsers (wasm32-unknown-unknown): without features, and with all.
#
#     scripts/check_wasm.sh [--debian]
#
# The target's standard library comes from rustup. Where rustup can't have it but Debian's packages can be installed, Debian's second compiler
# (rustc-web) checks instead, and cargo builds the standard library from its sources (rust-web-src).
# `--debian` does so in any case.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=wasm32-unknown-unknown
say() { printf 'wasm: %s\n' "$*" >&2; }
has_target() { [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; }

build_std=()
if [ "${1:-}" != --debian ] && ! has_target && command -v rustup >/dev/null; then
    timeout 120 rustup target add "$target" >/dev/null 2>&1 || true
fi
if [ "${1:-}" = --debian ] || ! has_target; then
    say "no $target from rustup: using Debian's rustc-web"
    if ! dpkg -s rustc-web rust-web-src >/dev/null 2>&1; then
        as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi; }
        as_root apt-get update -q >&2
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
            rustc-web rust-web-src lld >&2
    fi
    # Its sources lie where cargo looks for them: below the compiler's own sysroot.
    export RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1
    build_std=(-Z build-std=std,panic_abort)
fi
say "$("${RUSTC:-rustc}" --version)"

# A folder of its own: another compiler would throw the artifacts of the first away. No debug information, which nobody looks at.
# Where random numbers of tokenizers' come from is the program's choice; without one getrandom refuses to build for browsers.
export RUSTFLAGS="-D warnings --cfg getrandom_backend=\"custom\""
export CARGO_TARGET_DIR=target/wasm CARGO_PROFILE_DEV_DEBUG=0 CARGO_INCREMENTAL=0
for features in --no-default-features --all-features; do
    say "cargo check --lib $features"
    cargo check --lib --target "$target" ${build_std[@]+"${build_std[@]}"} "$features"
done

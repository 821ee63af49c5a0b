#!/usr/bin/env bash
# All checks, in the order in which they are cheap. Stops at the first that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# wgpu looks at GL adapters too, and Mesa complains on stderr where headless machines leave this unset.
mkdir -p target
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$PWD/target}"

# A missing adapter fails the GPU tests instead of skipping them.
export FOLIO_REQUIRE_GPU=1

section() { printf '\n=== %s === (after %d s)\n' "$*" "$SECONDS"; }

section "Adapter"
scripts/install_adapter.sh

section "Format"
cargo fmt --check --all
# A workspace of its own, which is too large to build here.
cargo fmt --check --all --manifest-path compare/Cargo.toml

section "Lints, all features"
cargo clippy --workspace --all-targets --all-features -- -D warnings

section "Lints of each feature alone, of pairs, and of none; beside them the minimum Rust version, and browsers"
# Each has a folder of its own to build in, and most of each is one compiler on one core.
{ scripts/check_msrv.sh && scripts/check_wasm.sh; } >target/beside.log 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true' EXIT
scripts/check_features.sh
beside_status=0
wait "$beside" || beside_status=$?
trap - EXIT
cat target/beside.log
[ "$beside_status" -eq 0 ]

section "Documentation: all features, the default ones, none"
for features in --all-features "" --no-default-features; do
    # shellcheck disable=SC2086
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps $features
done

# In release, which the benches and the demo share: wgpu is compiled once, and the oracle is fast.
section "The pure half, without wgpu"
tree=$(cargo tree -p folio --no-default-features -e normal,build,dev --prefix none)
if grep -E '^wgpu' <<<"$tree"; then
    echo "wgpu is in the dependency tree of --no-default-features" >&2
    exit 1
fi
cargo test --release -p folio --no-default-features

# All but tests/host, which the pure half has run: nothing in it depends on a feature.
section "Tests (library, GPU, model, engine, command line)"
cargo test --release --workspace --all-features --lib --bins --test '[!h]*'

section "Tests in the documentation"
cargo test --release --workspace --all-features --doc

section "The package builds from its own archive"
scripts/check_package.sh

section "All checks passed"

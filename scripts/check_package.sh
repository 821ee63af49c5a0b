#!/usr/bin/env bash
# The archive that would be published builds by itself: the library, and every test, example and bench type-checks with the files that it
# includes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo package --allow-dirty --no-verify --quiet
name=$(sed -n 's/^name = "\(.*\)"$/\1/p;T;q' Cargo.toml)-$(sed -n 's/^version = "\(.*\)"$/\1/p;T;q' Cargo.toml)
# The dependencies are those that are compiled already.
CARGO_TARGET_DIR=$PWD/target
export CARGO_TARGET_DIR
rm -rf "target/package/$name"
tar -xf "target/package/$name.crate" -C target/package
cd "target/package/$name"
# With the features that dev-dependencies add, as above: without them cargo would compile wgpu once more.
cargo test --release --all-features --lib --no-run
cargo check --all-features --all-targets

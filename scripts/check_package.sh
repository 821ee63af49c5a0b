#!/usr/bin/env bash
# The archives that would be published build by themselves: the library, the command line with it, and every test, example and bench type-checks
# with the files that it includes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo package --workspace --allow-dirty --no-verify --quiet
version=$(sed -n 's/^version = "\(.*\)"$/\1/p;T;q' Cargo.toml)
folder=target/package/workspace
rm -rf "$folder"
mkdir -p "$folder"
for name in folio folio-cli; do
    # What crates.io takes.
    bytes=$(stat -c %s "target/package/$name-$version.crate")
    if [ "$bytes" -gt $((10 * 1000 * 1000)) ]; then
        echo "$name: an archive of $bytes bytes, more than 10 MB" >&2
        exit 1
    fi
    # (With times of now, or cargo takes what it compiled of an older archive.)
    tar -xmf "target/package/$name-$version.crate" -C "$folder"
done
# Both in one workspace, with the versions of this one: so the dependencies have the same features, and are those that are compiled already.
cat >"$folder/Cargo.toml" <<EOF
[workspace]
members = ["folio-$version", "folio-cli-$version"]
resolver = "3"
[patch.crates-io]
folio = { path = "folio-$version" }
[profile.release]
overflow-checks = true
[profile.dev]
opt-level = 1
EOF
cp Cargo.lock "$folder"
CARGO_TARGET_DIR=$PWD/target
export CARGO_TARGET_DIR
cd "$folder"
# With all targets, for the features that dev-dependencies add: without them cargo would look at wgpu once more.
cargo check --workspace --all-features --all-targets

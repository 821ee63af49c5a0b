#!/usr/bin/env bash
# Compares folio's attention with other libraries on this machine: the same shapes, the same cores, in turns, each result checked first.
#
#   scripts/compare.sh [--torch PYTHON] [--threads N] [--rounds N] [--shapes D1,P1] [--formats f32,f16] [--note TEXT] [--libraries burn,candle]
#       [--model] [--doc]
#
# PYTHON is a Python with PyTorch and NumPy; without the option `python3` is tried. burn and candle are built from crates, in `compare/`, which
# takes long the first time. What is missing or doesn't build is left out, and the table says so. --model adds whole models, folio
# and PyTorch, by folio's own benchmark. Results: target/compare/compare.md and .json; --doc
# also writes the table into docs/measurements/compare.md. FOLIO_ADAPTER names folio's adapter, and CUBECL_WGPU_DEFAULT_DEVICE burn's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=python3 threads=$(nproc) libraries=burn,candle document= model=
command="scripts/compare.sh${*:+ $*}"
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --torch) python=$2; shift 2 ;;
        --threads) threads=$2; shift 2 ;;
        --rounds | --shapes | --formats | --note) arguments+=("$1" "$2"); shift 2 ;;
        --libraries) libraries=$2; shift 2 ;;
        --model) model=yes; shift ;;
        --doc) document=docs/measurements/compare.md; shift ;;
        *) sed -n '2,11s/^# \?//p' "$0" >&2; exit 2 ;;
    esac
done
# Where a machine keeps its Python is nobody's business.
command=${command//"$python"/PYTHON}

results=$PWD/target/compare
mkdir -p "$results"
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$PWD/target}"
# The same number of threads for all: Rust's libraries, OpenMP's, and lavapipe's shaders.
export RAYON_NUM_THREADS=$threads OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads LP_NUM_THREADS=$threads

manifest=compare/Cargo.toml
binaries=compare/target/release
contestants=()
for library in ${libraries//,/ }; do
    # One at a time: they are large.
    if cargo build --release --locked --manifest-path "$manifest" -p "compare-$library"; then
        contestants+=(--contestant "$binaries/compare-$library")
    else
        contestants+=(--missing "$library: it does not build")
    fi
done
torch=
if "$python" -c 'import numpy, torch' 2>/dev/null; then
    torch=yes
    contestants+=(--contestant "$python compare/torch_attention.py")
else
    contestants+=(--missing "PyTorch: not in this Python")
fi
cargo build --release --locked --manifest-path "$manifest" -p compare

cores=()
if command -v taskset >/dev/null; then
    # The same cores for all; children inherit them.
    cores=(taskset --cpu-list "0-$((threads - 1))")
fi
if [ -n "$model" ]; then
    "${cores[@]}" cargo bench --features model,tune --bench model -- ${torch:+--torch "$python"} | tee "$results/model.txt"
    contestants+=(--model-table "$results/model.txt")
fi
"${cores[@]}" "$binaries/compare" "${contestants[@]}" "${arguments[@]}" --provenance "$command" "$(date -u +%F)" \
    --json "$results/compare.json" --markdown "$results/compare.md" ${document:+--splice "$document"}

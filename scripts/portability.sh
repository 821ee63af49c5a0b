#!/usr/bin/env bash
# Makes the reports of `folio verify` that this machine can, into docs/adapters/verify, and writes docs/portability.md from all that are there.
#
#   scripts/portability.sh [ADAPTER...]     parts of adapters' names [default: llvmpipe]
#
# Each adapter is verified with both families of kernels, and as a browser opens it; llvmpipe's OpenGL twin, too. FOLIO_VERIFY_PREFIX is put before the command: what
# runs a program with other drivers (VK_ICD_FILENAMES alone may do). FOLIO is the binary [default: built from this tree].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${FOLIO:-}" ]; then
    cargo build --release --package folio-cli
    FOLIO=target/release/folio
fi
reports=docs/adapters/verify
mkdir -p "$reports" target
failed=0

# verify NAME ADAPTER OPTION...: one report, unless the adapter is not there or has no such thing.
verify() {
    local name="$1" adapter="$2"
    shift 2
    local file="target/portability.json"
    # shellcheck disable=SC2086 # a command of several words
    if ${FOLIO_VERIFY_PREFIX:-} "$FOLIO" verify --adapter "$adapter" --json "$file" "$@" >target/portability.log; then
        tail -n 1 target/portability.log
    elif [ ! -s "$file" ]; then
        return 0
    else
        grep -v '^ok' target/portability.log
        failed=1
    fi
    # The adapter's and the driver's names, without what stands in brackets.
    local of
    of="$(python3 - "$file" <<'PYTHON'
import json, re, sys
on = json.load(open(sys.argv[1]))["adapter"]
words = " ".join([on["adapter"], on["driver"], on["backend"]])
print("-".join(dict.fromkeys(re.findall(r"[a-z0-9.]+", re.sub(r"\([^)]*\)", "", words.lower())))))
PYTHON
    )"
    mv "$file" "$reports/$of-$name.json"
}

[ $# -gt 0 ] || set -- llvmpipe
for adapter in "$@"; do
    for kernels in gpu cpu; do
        verify "$kernels" "$adapter" --kernels "$kernels"
        verify "$kernels-webgpu" "$adapter" --kernels "$kernels" --webgpu
    done
    verify gpu-matrix "$adapter" --kernels gpu --matrix-units 2>/dev/null
    verify cpu "$adapter" --kernels cpu --backend gl 2>/dev/null
done
"$FOLIO" verify --page "$reports"/*.json >docs/portability.md
exit "$failed"

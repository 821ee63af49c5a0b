#!/usr/bin/env python3
"""Counts the instructions that a call of attention takes on a software adapter: of the kernel's own machine code, to the last one.

Times differ from minute to minute on a shared machine, instructions don't: two builds can be compared to a hundredth of a percent. The bench
`one_call` runs under Valgrind's callgrind (package `valgrind`), once with 1 call and once with 4; code that no file holds is what the driver's JIT has
compiled, and the difference of the two runs is 3 calls. Valgrind has no AVX-512, so kernels have vectors of 256 bits.

    scripts/count_instructions.py                        # this tree
    scripts/count_instructions.py one_call_before one_call_now --shapes P1,P2 --formats F32

Needs no Python packages. Some minutes for each build, shape and format.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# Products of an element of a query with one of a key, or of a weight with one of a value, in a call of the bench: visible pairs of query and key,
# times query heads, times head_dim, times two.
PRODUCTS = {
    "D1": 2 * 512 * 32 * 128 * 2,
    "D2": 2048 * 32 * 128 * 2,
    "P1": 256 * 257 // 2 * 16 * 64 * 2,
    "P2": (128 * 384 + 128 * 129 // 2) * 32 * 128 * 2,
}


def build():
    root = pathlib.Path(__file__).resolve().parent.parent
    command = ["cargo", "bench", "--no-run", "--workspace", "--all-features", "--bench", "one_call"]
    output = subprocess.run(command, cwd=root, check=True, text=True, stderr=subprocess.PIPE).stderr
    return root / re.search(r"one_call\.rs \((.*)\)", output)[1]


def jitted(program, shape, form, calls):
    """Instructions of all functions that no file holds."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "callgrind"
        command = ["valgrind", "--tool=callgrind", "--smc-check=all-non-file", f"--callgrind-out-file={out}"]
        environment = {**os.environ, "XDG_RUNTIME_DIR": folder}
        run = subprocess.run([*command, program, shape, form, str(calls)], env=environment, text=True, capture_output=True)
        if run.returncode != 0:
            sys.exit(f"{program} {shape} {form} {calls}: {run.stderr[-2000:]}")
        listing = subprocess.run(["callgrind_annotate", "--threshold=100", out], check=True, text=True, capture_output=True).stdout
    counts = re.findall(r"^ *([\d,]+) .*\?\?\?:0x\S+ \[\?\?\?\]", listing, re.MULTILINE)
    return sum(int(count.replace(",", "")) for count in counts)


def per_call(program, shape, form):
    """What runs once, such as append, is the same in both runs."""
    return (jitted(program, shape, form, 4) - jitted(program, shape, form, 1)) / 3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", help="builds of the bench one_call [default: of this tree]")
    parser.add_argument("--shapes", default="D1,D2,P1,P2")
    parser.add_argument("--formats", default="F32,F16")
    arguments = parser.parse_args()
    programs = arguments.programs or [build()]
    for shape in arguments.shapes.split(","):
        for form in arguments.formats.split(","):
            counts = [per_call(program, shape, form) for program in programs]
            ratios = "".join(f", {count / counts[0]:.5f} of the first" for count in counts[1:])
            figures = " | ".join(f"{count:15,.0f} instructions, {count / PRODUCTS[shape]:.4f} per product" for count in counts)
            print(f"{shape} {form:6} {figures}{ratios}", flush=True)


if __name__ == "__main__":
    main()

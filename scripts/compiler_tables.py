#!/usr/bin/env python3
"""Writes the tables of compilers' statistics in docs/measurements/gpu-compilers.md. No GPU runs anything.

    python3 scripts/compiler_tables.py --compiler 'COMMAND {platform} {files}' [--platform navi21 --platform dg2 ..] [--table NAME ..]

COMMAND compiles WGSL files for a GPU that need not be there and prints, for each, a line of JSON: `file` (the name without its ending), `compiler` (name and
version), `registers` of an invocation or wave, `spills`, `fills`, `instructions`, `lanes` of a subgroup, and where the compiler says so `waves` and `max_waves`
(resident per SIMD or SM), `limit` (what limits them), `workgroup_bytes`, `loads` and `workgroup_reads` (such as `5x4+3x1`: five of four words, three of one),
and `loops` in the order of the code (`depth`, 1 for the outermost, and `instructions` without those of inner loops).

Platforms: navi21, vega10 (RADV), gfx1201 (RADV, matrix units), dg2, bmg (ANV: Arc A, Arc B), ampere (NAK); `+checks` behind a platform compiles with wgpu's
shader checks. A table whose platforms are not all given stays as it is. Kernels are rendered by `examples/compose.rs`.
"""

import argparse
import itertools
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/measurements/gpu-compilers.md"
TARGET = ROOT / "target/release/examples/compose"

# As many files as a command line takes with ease.
BATCH = 40


def variant(kernel, head_dim, k, v=None, group=4, *more):
    options = [kernel, "--head-dim", head_dim, "--group-size", group, "--k-format", k, "--v-format", v or k, *more]
    return tuple(map(str, options))


def plain():
    for d, g, f, sg in [
        (64, 4, "f32", 1), (64, 4, "f32", 0), (64, 4, "f16", 1), (64, 4, "f16", 0), (64, 8, "f32", 1), (64, 8, "f16", 1),
        (128, 4, "f32", 1), (128, 4, "f32", 0), (128, 4, "f16", 1), (128, 4, "f16", 0), (128, 8, "f32", 1), (128, 8, "f16", 1),
        (128, 8, "f16", 0), (256, 4, "f32", 1), (256, 4, "f16", 1), (256, 8, "f32", 0),
    ]:  # fmt: skip
        yield variant("decode", d, f, None, g, *([] if sg else ["--no-subgroups"]))
    for d, f, sg in [(64, "f32", 1), (64, "f32", 0), (64, "f16", 1), (128, "f32", 1), (128, "f32", 0), (128, "f16", 1), (256, "f32", 1), (256, "f16", 1)]:
        yield variant("prefill", d, f, None, 4, *([] if sg else ["--no-subgroups"]))
    yield variant("merge", 128, "f32")
    for k, v in [("f32", "f32"), ("f16", "f16"), ("e4m3", "e4m3"), ("int8", "int8"), ("int4", "int4"), ("int8-channel", "int8")]:
        yield variant("append", 128, k, v, 1)
    yield variant("copy-blocks", 128, "f16", None, 1)
    yield variant("gather", 128, "f32", None, 1)
    yield variant("gather", 128, "f16", None, 1)


PAIRS = [("e4m3", "e4m3"), ("int8", "int8"), ("int4", "int4"), ("int8-channel", "int8"), ("int4-channel", "int4")]


def quantised():
    yield variant("decode", 128, "f16", None, 1)
    yield variant("decode", 72, "f16")
    for k, v in PAIRS:
        yield variant("decode", 64, k, v)
    for k, v in PAIRS[:3]:
        yield variant("decode", 128, k, v, 1)
    for k, v in [*PAIRS, ("int8", "f16"), ("f16", "int4")]:
        yield variant("decode", 128, k, v)
    for k, v in PAIRS[1:3]:
        yield variant("decode", 128, k, v, 4, "--no-subgroups")
    for k, v in PAIRS[:3]:
        yield variant("decode", 128, k, v, 8)
    for d, (k, v) in itertools.product([256, 72], PAIRS[1:3]):
        yield variant("decode", d, k, v)
    for d, (k, v) in itertools.product([64, 128, 256], PAIRS):
        yield variant("prefill", d, k, v)


FORMATS = ["f32", "f16", "e4m3", "int8", "int4"]
HEAD_DIMS = [40, 64, 72, 96, 128, 160, 192, 256]


def grid(intel):
    """The attention kernels that models ask for, with subgroups."""
    more = ["--intel"] if intel else []
    for d, f in itertools.product(HEAD_DIMS, FORMATS):
        for group in (1, 4, 8):
            yield variant("decode", d, f, None, group, *more)
        yield variant("prefill", d, f, None, 4, *more)


def matrix():
    for d, (k, v) in itertools.product([64, 128, 256], [("f16", "f16"), *PAIRS[:4]]):
        yield variant("prefill", d, k, v, 4, "--matrix", 16, "--subgroup-size", 32)


class Compiler:
    def __init__(self, command, platforms):
        self.command, self.platforms, self.known, self.texts, self.names = command, platforms, {}, {}, {}

    def text(self, options):
        if options not in self.texts:
            self.texts[options] = subprocess.check_output([TARGET, *options], text=True)
        return self.texts[options]

    def compile(self, platform, variants):
        """Statistics of each variant, by its options."""
        missing = [options for options in dict.fromkeys(variants) if (platform, options) not in self.known]
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            self.run(platform, batch)
            # A driver that crashes or runs into a time limit takes the rest of its batch along.
            for options in batch:
                for _ in range(2):
                    if (platform, options) not in self.known:
                        self.run(platform, [options])
                if (platform, options) not in self.known:
                    sys.exit(f"{platform}: no statistics of {' '.join(options)}")
            print(f"{platform}: {min(start + BATCH, len(missing))} of {len(missing)} compiled", file=sys.stderr)
        return {options: self.known[platform, options] for options in variants}

    def run(self, platform, batch):
        """Compiles, and remembers the statistics of what could be compiled."""
        with tempfile.TemporaryDirectory() as folder:
            files = [pathlib.Path(folder) / f"kernel{index}.wgsl" for index in range(len(batch))]
            for file, options in zip(files, batch):
                file.write_text(self.text(options))
            command = []
            for word in shlex.split(self.command):
                command += map(str, files) if word == "{files}" else [word.replace("{platform}", platform)]
            lines = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        by_file = {file.stem: options for file, options in zip(files, batch)}
        for statistics in map(json.loads, lines):
            self.known[platform, by_file[statistics["file"]]] = statistics

    def constant(self, options, name):
        found = re.search(rf"const {name}: u32 = (\d+)u;", self.text(options))
        return int(found[1]) if found else None

    def size(self, options, name):
        """From the comment in which `compose` prints the variant."""
        return int(re.search(rf"{name}: (\d+)", self.text(options).split("\n", 1)[0])[1])

    def tile(self, options):
        return f"{self.size(options, 'workgroup_size')}: {self.size(options, 'tile_q')} x {self.size(options, 'tile_kv')}"

    def per_key(self, options, statistics):
        """Instructions of an invocation per key: those of the loop over tiles, and of loops in it as often as they run.

        Decode has none within. In prefill the first one is over slices of head_dim, the second over slices of keys; a third one looks for values that are no
        numbers, and hardly ever runs. The loop over tiles is the largest.
        """
        if not statistics.get("loops") or options[0] not in ("decode", "prefill"):
            return None
        outer, inner = self.nest(statistics)
        trips = [self.constant(options, "NUM_SLICES"), self.constant(options, "NUM_V_SLICES")]
        if options[0] == "prefill":
            if len(inner) < 2 or None in trips:
                return None
            outer += inner[0] * trips[0] + inner[1] * trips[1]
        elif inner:
            return None
        return outer / self.size(options, "tile_kv")

    def nest(self, statistics):
        """The instructions of the largest loop, and of each loop in it."""
        nests = []
        for loop in statistics["loops"]:
            if loop["depth"] == 1:
                nests.append([loop["instructions"], []])
            elif nests:
                nests[-1][1].append(loop["instructions"])
        return max(nests, key=lambda nest: nest[0] + sum(nest[1]))

    def per_row_and_key(self, options, statistics):
        """Instructions of a subgroup's lanes per row and key of a tile, with matrix units.

        Loops over matrices, which subgroups share out, count as often as they run; a compiler that unrolls them leaves none. A last loop that looks for values that
        are no numbers, one key at a time, is left out.
        """
        outer, inner = self.nest(statistics)
        invocations = self.size(options, "workgroup_size")
        bounds = [int(bound) for bound in re.findall(r"n < (\d+)u; n \+= num_subgroups", self.text(options))]
        trips = [-(-bound * statistics["lanes"] // invocations) for bound in bounds]
        if "i < TILE_KV; i++" in self.text(options):
            inner = inner[:-1]
        if inner and len(inner) != len(trips):
            return None
        loop = outer + sum(map(int.__mul__, inner, trips))
        return loop * invocations / (self.size(options, "tile_q") * self.size(options, "tile_kv"))


def name(options):
    """`decode d64 g4 f32 sg`."""
    value = lambda option: options[options.index(option) + 1]
    kernel, k, v = options[0], value("--k-format").replace("-channel", "ch"), value("--v-format")
    formats = k if k == v else f"{k}+{v}"
    if kernel == "merge":
        return f"merge d{value('--head-dim')}"
    if kernel in ("append", "gather"):
        return f"{kernel} {formats}"
    if kernel == "copy-blocks":
        return "copy_blocks"
    group = f" g{value('--group-size')}" if kernel == "decode" else ""
    return f"{kernel} d{value('--head-dim')}{group} {formats} {'wg' if '--no-subgroups' in options else 'sg'}"


def spilled(statistics):
    """Bold, so that it is seen; nothing if nothing is spilled."""
    spills, fills = statistics["spills"], statistics["fills"]
    return f" **spills {spills} / {fills}**" if spills or fills else ""


def number(value):
    return "" if value is None else f"{value:.1f}"


def table(head, rows):
    def line(cells):
        return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in map(str, cells)) + "|\n"

    return line(head) + "|---" * len(head) + "|\n" + "".join(map(line, rows))


def versions(compiler, platforms):
    made_by = {platform: next(s["compiler"] for (p, _), s in compiler.known.items() if p == platform) for platform in platforms}
    return ", ".join(f"{platform}: {made_by[platform]}" for platform in platforms) + ".\n\n"


def amd(variants):
    def write(compiler):
        variants_ = list(variants())
        navi, checked, vega = (compiler.compile(platform, variants_) for platform in ("navi21", "navi21+checks", "vega10"))
        rows = []
        for options in variants_:
            n, c, v = navi[options], checked[options], vega[options]
            per_key = compiler.per_key(options, n)
            with_checks = f"{c['registers']}/{c['waves']}/{number(compiler.per_key(options, c))}" if per_key else f"{c['registers']}/{c['waves']}"
            tile = f" ({compiler.size(options, 'tile_q')}x{compiler.size(options, 'tile_kv')})" if options[0] == "prefill" else ""
            rows.append([
                name(options) + tile, f"{n['registers']}{spilled(n)}", n["workgroup_bytes"], n["waves"], n["limit"].replace("-", "none"), n["loads"], n["workgroup_reads"],
                number(per_key), with_checks + spilled(c), f"{v['registers']}/{v['waves']}{spilled(v)}",
            ])  # fmt: skip
        head = ["kernel", "VGPR", "LDS", "waves", "limit", "loads", "LDS reads", "instr/key", "wgpu checks", "vega10 VGPR / waves of 10"]
        return versions(compiler, ["navi21", "vega10"]) + table(head, rows)

    return write


def intel(compiler):
    rows = []
    cases = [variant("prefill", d, f) for d in (64, 72, 96, 128, 192, 256) for f in FORMATS]
    own = [(*options, "--intel") for options in cases]
    arcs = [compiler.compile(platform, [*cases, *own]) for platform in ("dg2", "bmg")]
    show = lambda arc, options: f"**{arc[options]['spills']} / {arc[options]['fills']}**" if spilled(arc[options]) else "0"
    for others, intels in zip(cases, own):
        cells = [[compiler.tile(options), *(show(arc, options) for arc in arcs)] for options in (others, intels)]
        rows.append([name(others), *cells[0], *cells[1]])
    head = ["prefill, group of 4", "tile of the others", "Arc A", "Arc B", "Intel's tile", "Arc A", "Arc B"]
    return versions(compiler, ["dg2", "bmg"]) + table(head, rows)


GRID_PLATFORMS = ["navi21", "vega10", "gfx1201", "ampere", "dg2", "bmg"]


def spills(compiler):
    rows, numbers = [], {}
    for platform in GRID_PLATFORMS:
        variants = list(grid(platform in ("dg2", "bmg")))
        statistics = compiler.compile(platform, variants)
        spilling = [options for options in variants if spilled(statistics[options])]
        numbers[platform] = f"{len(spilling)} of {len(variants)}"
        for options in spilling:
            s = statistics[options]
            rows.append([platform, name(options), compiler.tile(options), s["registers"], s["spills"], s["fills"]])
    text = versions(compiler, GRID_PLATFORMS)
    text += "Variants that spill: " + ", ".join(f"{platform} {count}" for platform, count in numbers.items()) + ".\n\n"
    return text + table(["platform", "kernel", "invocations: tile", "registers", "spills", "fills"], rows)


def matrices(compiler):
    rows, variants = [], list(matrix())
    nak, gfx = compiler.compile("ampere", variants), compiler.compile("gfx1201", variants)
    for options in variants:
        n, g = nak[options], gfx[options]
        tile = f"{compiler.size(options, 'tile_q')}x{compiler.size(options, 'tile_kv')}"
        rows.append([
            name(options), tile, g["workgroup_bytes"],
            f"{n['registers']}{spilled(n)}", f"{n['waves']} of {n['max_waves']}", number(compiler.per_row_and_key(options, n)),
            f"{g['registers']}{spilled(g)}", f"{g['waves']} of {g['max_waves']}", number(compiler.per_row_and_key(options, g)),
        ])  # fmt: skip
    head = ["kernel", "tile", "workgroup memory", "ampere registers", "warps/SM", "instr/(row, key)", "gfx1201 VGPR", "waves", "instr/(row, key)"]
    return versions(compiler, ["ampere", "gfx1201"]) + table(head, rows)


TABLES = {
    "plain": (["navi21", "navi21+checks", "vega10"], amd(plain)),
    "quantised": (["navi21", "navi21+checks", "vega10"], amd(quantised)),
    "spills": (GRID_PLATFORMS, spills),
    "intel": (["dg2", "bmg"], intel),
    "matrix": (["ampere", "gfx1201"], matrices),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", required=True, metavar="COMMAND")
    every = sorted({platform for platforms, _ in TABLES.values() for platform in platforms})
    parser.add_argument("--platform", action="append", choices=every, help="all, unless some are given")
    parser.add_argument("--table", action="append", choices=TABLES, help="all that the platforms allow, unless some are given")
    arguments = parser.parse_args()
    available = set(arguments.platform or every)
    chosen = {key for key, (platforms, _) in TABLES.items() if available.issuperset(platforms)} & set(arguments.table or TABLES)
    if not chosen:
        parser.error("no table for these platforms")

    subprocess.run(["cargo", "build", "--release", "--example", "compose"], cwd=ROOT, check=True)
    compiler = Compiler(arguments.compiler, available)
    for key, (_, write) in TABLES.items():
        if key not in chosen:
            continue
        written = write(compiler)
        page = PAGE.read_text()
        begin, end = f"<!-- written by scripts/compiler_tables.py: {key} -->\n", "<!-- end -->\n"
        if page.count(begin) != 1:
            sys.exit(f"{PAGE} has no line {begin!r}")
        head, rest = page.split(begin)
        PAGE.write_text(head + begin + "\n" + written + "\n" + end + rest.split(end, 1)[1])


if __name__ == "__main__":
    main()

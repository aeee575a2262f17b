"""Do the comparisons of the CUDA kernels have teeth?  Each wrong kernel here must be caught by one of them.

    python tests/cuda/mutants.py [--jobs N] [--only WORDS] [--again]

Wrong kernels are made in two ways.  By rule: each barrier and each wait left out (or for one group of copies too few),
each fma rounded twice.  These are compiled once, all together, and $MS4_MUTANT chooses one; barriers and waits are
compiled with race.cpp, too, which sees that nothing orders two threads however they happened to run.  And by hand:
orders of sums, associations, signs; each of these is compiled alone.  The checks are build/cuda/check_*.o (make -f
tests/cuda/Makefile) of what the file is part of, with a few types; a run ends at the first difference.  What was found
is kept in build/cuda/mutants.json as long as no source changes, so a run that was interrupted goes on (--again: forget
it).  Prints what was not caught; exits 1 then.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda"
KEPT = BUILD / "mutants.json"
TRIES = 4  # runs with other seeds
LIMIT = 240  # seconds of one run: a mutant that waits for ever is caught

# File -> checks that see it: the program, and what the names of its kernels begin with (mul_ and gemm_: their types).
ROWS, ATTEND, PATCHES = "rows", "attend", "patches"
BLOCKS = ("q4_k", "q6_k", "q5_1", "nvfp4")  # a type of each family but two
SEEN_BY = {
    "rows.cuh": [(ROWS, "")],
    "floats.cuh": [(ROWS, "norm"), ("quantize", ""), (ATTEND, "latents"), (ATTEND, "query")],
    "route.cuh": [(ROWS, "choose"), (ROWS, "tell")],
    "highest.cuh": [(ROWS, "highest")],
    "latents.cuh": [(ATTEND, "latents"), (ATTEND, "quer")],
    "segment.cuh": [(ATTEND, "attend")],
    "attend.cuh": [(ATTEND, "attend")],
    "attend_mma.cuh": [(ATTEND, "attend_segments")],
    "attend_tile.cuh": [(ATTEND, "attend_rows")],
    "fragments.cuh": [(ATTEND, "attend")],
    "patches.cuh": [(PATCHES, "")],
    "attend_patches.cuh": [(PATCHES, "attend")],
    "mul.cuh": [("mul", f"mul_{kind}") for kind in BLOCKS],
    "mul_staged.cuh": [("mul", f"mul_{kind}") for kind in BLOCKS],
    "gemm.cuh": [("mul", f"gemm_{kind}") for kind in (*BLOCKS, "q8_0")],  # its quants have signs, in groups of 32
    "float.cuh": [("mul", "mul_f16"), ("mul", "gemm_f16")],
    "job.cuh": [("mul", "mul_q4_k"), ("mul", "gemm_q4_k"), ("mul", "gemm_f16")],
    "dev.cuh": [(ROWS, "act"), (ROWS, "bias")],
}

HARMLESS = "harmless: must not be caught"
# Products that are exact, so rounding them changes nothing: a min has 11 bits, a sum of 32 quants 13.
EXACT = {
    "gemm.cuh": "__fmaf_rn(s->block_m[",
    "mul.cuh": "__fmaf_rn(__shfl_sync(ALL, w.dmin, from)",
    "mul_staged.cuh": "__fmaf_rn(s.sums[S::SUMS + ",
}
UNCHANGED = {"parts.cuh", "unpack.cuh"}  # bytes to integers: no sums of floats, and no threads meet

# By hand: file, from, to, what is wrong.  A text that occurs more than once is changed where it occurs first.
BY_HAND = [
    (
        "floats.cuh",
        "for (int j = 8; j; j >>= 1) part",
        "for (int j = 1; j < 16; j <<= 1) part",
        "tree from the other end",
    ),
    ("floats.cuh", "sum[h] += __shfl_xor_sync(ALL, sum[h], 2);", "", "quantize: sums of 8"),
    ("floats.cuh", "__uint_as_float(bits) >= 0x1p-121f", "__uint_as_float(bits) > 0", "quantize: tiny superblocks"),
    ("floats.cuh", "__fdiv_rn(most, 127.0f)", "__fmul_rn(most, 1.0f / 127.0f)", "quantize: times the reciprocal"),
    ("floats.cuh", "by_length < 32767.0f ? by_length : 32767.0f", "by_length", "quantize_16: no limit"),
    (
        "rows.cuh",
        "__fmul_rn(__fmul_rn(v.v[i], factor), w.v[i])",
        "__fmul_rn(v.v[i], __fmul_rn(factor, w.v[i]))",
        "norm: other association",
    ),
    (
        "rows.cuh",
        "for (int j = 0; j < a.k; j++) {",
        "for (int j = a.k - 1; j >= 0; j--) {",
        "pairs in descending order",
    ),
    (
        "dev.cuh",
        "__fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, exp_dev(-gate))), up)",
        "__fmul_rn(gate, __fdiv_rn(up, __fadd_rn(1.0f, exp_dev(-gate))))",
        "silu: other association",
    ),
    ("dev.cuh", "__fmul_rn(__fmul_rn(p, first), second)", "__fmul_rn(p, __fmul_rn(first, second))", "exp: 2^k at once"),
    ("route.cuh", "c.equal -= __popc(equal);", "", "choose: ties beyond 32"),
    ("route.cuh", "x != x ? MINUS_INFINITY : x == 0 ? 0.0f : x", "x", "choose: NaN and zeros"),
    ("route.cuh", "for (int i = tid; i < a.words;", "for (int i = tid; i < a.words - 1;", "tell: a word too few"),
    (
        "route.cuh",
        "    __syncthreads();\n    if (!tid) raise_flag(a.flag);",
        "    if (tid == (int)blockDim.x - 1) raise_flag(a.flag);",
        "tell: the flag before the rest",
    ),
    ("route.cuh", "if (!tid) raise_flag(a.flag);", "", "tell: no flag"),
    ("highest.cuh", "rooms + 32 * (bit & 1)", "rooms", "highest: counts into the room that others still read"),
    ("highest.cuh", "__popc(same & below) < left", "__popc(same & ~below) <= left", "highest: the last of equal ones"),
    ("highest.cuh", "left -= __popc(same);", "", "highest: ties beyond 32"),
    ("highest.cuh", "int left = equal - equal_before;", "int left = equal;", "highest: ties in warps before"),
    ("highest.cuh", "(unsigned)min(equal, equal_before)", "0u", "highest: ties before take no place"),
    ("highest.cuh", "i < n_keys && at < end", "i < n_keys && at < a.n", "highest: a part reaches into the next one"),
    ("highest.cuh", "a.n * (part + 1) / parts", "a.n / parts * (part + 1)", "highest: the end of a row in no part"),
    ("highest.cuh", "magnitude_bits(x) >= INFINITY_BITS ? EVERYTHING : ", "", "highest: not finite, and not shown"),
    ("highest.cuh", "(ids ? ids[at] : at) < a.among", "at < a.among", "highest: places taken for ids"),
    ("highest.cuh", "ids ? ids[own + 32 * i] : own + 32 * i", "own + 32 * i", "highest: ids of what parts kept"),
    ("highest.cuh", "if ((int)count >= a.k) last", "if ((int)count > a.k) last", "highest: one more than k"),
    ("highest.cuh", "        if ((int)count == a.k) break;\n", "", f"highest: all bits looked at ({HARMLESS})"),
    ("job.cuh", "slot ? slot + t->job.in_slot : nullptr", "slot + t->job.in_slot", "job: an expert that is elsewhere"),
    ("job.cuh", "slot + t->job.in_slot : nullptr", "slot : nullptr", "job: always the first matrix of a slot"),
    ("rows.cuh", "a.row ? (size_t)a.row[first + (size_t)j] : first + (size_t)j", "first + (size_t)j", "pairs: no rows"),
    ("segment.cuh", "by_sum < by_most ? by_most : by_sum", "by_most", "weights may overflow"),
    (
        "attend.cuh",
        "first += FOLD_WARPS * SEGMENT_GROUP) {",
        "first += FOLD_WARPS * SEGMENT_GROUP + 0 * n) {\n        if (first) m = m;",
        HARMLESS,
    ),
    (
        "patches.cuh",
        "__fadd_rn(__fadd_rn(part[0], part[2]), __fadd_rn(part[1], part[3]))",
        "__fadd_rn(__fadd_rn(part[0], part[1]), __fadd_rn(part[2], part[3]))",
        "patches: tree of other neighbours",
    ),
    (
        "mul_staged.cuh",
        "for (int i = 0; i <= s.mask; i++) y =",
        "for (int i = s.mask; i >= 0; i--) y =",
        "mul: superblocks in descending order",
    ),
    (
        "mul_staged.cuh",
        "for (int b = 0; b < S::WIDE; b++) {",
        "for (int b = S::WIDE - 1; b >= 0; b--) {",
        "mul: blocks in descending order",
    ),
    ("mul_staged.cuh", "int sum = -parts<T>::BIAS * sums[h];", "int sum = 0;", "mul: no bias"),
    (
        "mul.cuh",
        "for (int from = 0; from < n / 8; from += LANES) {",
        "for (int from = n / 8 - LANES; from >= 0; from -= LANES) {",
        "mul: blocks in descending order, any shape",
    ),
    ("gemm.cuh", "low[i] + 16 * high[i]", "low[i] + 15 * high[i]", "gemm: sums of x"),
    ("gemm.cuh", "(uint8_t)(x->sums[g] & 15)", "(uint8_t)(x->sums[g] & 7)", "gemm: low nibbles of sums"),
    (
        "gemm.cuh",
        "else mma_k32_first<true, true>(p, a, x);",
        "else mma_k32_first<false, true>(p, a, x);",
        "gemm: weights taken as unsigned",
    ),
    (
        "float.cuh",
        "for (int with = 8; with; with /= 2) part",
        "for (int with = 1; with < 16; with *= 2) part",
        "floats: tree from the other end",
    ),
    ("job.cuh", "if (j.scaled) v = __fmul_rn(v, j.scale);", "", "job: no scale"),
    ("job.cuh", "j.add ? __fadd_rn(*y, v) : v", "v", "job: nothing added"),
    (
        "attend_tile.cuh",
        "float low = __fadd_rn(part[0], part[2]), high = __fadd_rn(part[1], part[3]);",
        "float low = __fadd_rn(part[0], part[1]), high = __fadd_rn(part[2], part[3]);",
        "attend_rows: tree of other neighbours",
    ),
    ("attend_tile.cuh", "part = tile % 2 * 2 + e;", "part = tile / 4 * 2 + e;", "attend_rows: other partial sums"),
    ("attend_patches.cuh", "c < HEAD; c++", "c < HEAD - 1; c++", "attend_patches: a column too few"),
    ("fragments.cuh", "mma_k32<false, true>", "mma_k32<true, true>", "attend: low bytes taken as signed"),
]


@dataclass(frozen=True)
class Mutant:
    file: str
    what: str
    at: int  # the characters from here on ..
    old: str  # .. which are these ..
    new: str  # .. become these
    number: int = 0  # by rule: what $MS4_MUTANT is
    races: bool = False  # two threads may do things in either order


def by_rule(file: str, text: str, number: int) -> list[Mutant]:
    """MUTANT(n): n is chosen."""
    found: list[Mutant] = []

    def add(match: re.Match[str], new: str, what: str, races: bool) -> None:
        line, n = text[: match.start()].count("\n") + 1, number + len(found)
        found.append(
            Mutant(file, f"{file}:{line}: {what}", match.start(), match[0], new.replace("#", str(n)), n, races)
        )

    for m in re.finditer(r"__sync(threads|warp)\(\);", text):
        add(m, f"{{ if (!MUTANT(#)) {m[0]} }}", f"no {m[0][:-1]}", True)
    for m in re.finditer(r"copy_wait<([^>]*)>\(\);", text):
        fewer = "" if m[1] == "0" else f"else copy_wait<{m[1]} + 1>();"
        add(m, f"{{ if (!MUTANT(#)) {m[0]} {fewer} }}", f"{m[0][:-1]} waits for too few", True)
    if file == "dev.cuh":  # polynomials: each fma is the same case
        return found
    for m in re.finditer(r"__fmaf_rn\(", text):
        exact = file in EXACT and text.startswith(EXACT[file], m.start())
        add(m, "fma_unless(MUTANT(#), ", "fma rounded twice" + f" ({HARMLESS})" * exact, False)
    return found


def mutants() -> list[Mutant]:
    found: list[Mutant] = []
    files = {p.name for p in SOURCES.glob("*.cuh")}
    if files != SEEN_BY.keys() | UNCHANGED:
        sys.exit(
            f"mutants: SEEN_BY and UNCHANGED are not the files of csrc/cuda: {files ^ (SEEN_BY.keys() | UNCHANGED)}"
        )
    for file in SEEN_BY:
        found += by_rule(file, (SOURCES / file).read_text(), len(found) + 1)
    for file, old, new, what in BY_HAND:
        text = (SOURCES / file).read_text()
        if old not in text:
            sys.exit(f"mutants: {file} has no {old!r} any more: mend the list")
        found.append(Mutant(file, f"{file}: {what}", text.index(old), old, new))
    return found


# --- running one

CHOOSES = """#include <cstdlib>
extern const int mutant_number;
const int mutant_number = std::getenv("MS4_MUTANT") ? std::atoi(std::getenv("MS4_MUTANT")) : 0;
"""
CHOSEN = """#include "emulate.h"
extern const int mutant_number;
#define MUTANT(n) (mutant_number == (n))
static inline float fma_unless(bool twice, float a, float b, float c) {
    return twice ? __fadd_rn(__fmul_rn(a, b), c) : __fmaf_rn(a, b, c);
}
"""


def few_types(names: set[str]) -> list[str]:
    """Defines for table.cpp: the rows of quant.h of these types alone."""
    rows = re.findall(r"X\((\w+, \d+, [^)]*)\)", (ROOT / "csrc" / "quant.h").read_text())
    floats = [f"X({r})" for r in rows if r.split(",")[0] in names and ", floats," in r]
    quantized = [f"X({r})" for r in rows if r.split(",")[0] in names and ", floats," not in r]
    return ["-DFEW_TYPES", f"-DFEW_FLOATS(X)={' '.join(floats)}", f"-DFEW_QUANTIZED(X)={' '.join(quantized)}"]


def build(changes: list[Mutant], folder: Path, races: bool) -> dict[str, Path] | None:
    """The programs that see these changes; None: they do not compile."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SOURCES, folder / "cuda")
    for file in {m.file for m in changes}:
        text = (SOURCES / file).read_text()
        for m in sorted((m for m in changes if m.file == file), key=lambda m: -m.at):
            text = text[: m.at] + m.new + text[m.at + len(m.old) :]
        (folder / "cuda" / file).write_text(text)
    (folder / "chosen.h").write_text(CHOSEN)
    (folder / "chooses.cpp").write_text(CHOOSES)
    seen = [pair for file in {m.file for m in changes} for pair in SEEN_BY[file]]
    types = {re.sub(r"^(mul|gemm)_", "", prefix) for program, prefix in seen if program == "mul"}
    include = [f"-I{p}" for p in (folder, folder / "cuda", ROOT / "tests/cuda", ROOT / "csrc", ROOT / "build/glue")]
    flags = "-std=gnu++20 -O1 -march=x86-64-v3 -ffp-contract=off -fno-strict-aliasing -w".split()
    flags += ["-fsanitize=thread"] if races else []
    table = folder / "table.o"
    command = ["g++", *flags, *include, "-include", folder / "chosen.h", *few_types(types), "-c", "-o", table]
    if subprocess.run([*command, ROOT / "tests/cuda/table.cpp"], capture_output=True).returncode:
        return None
    built, kernels = ROOT / "build/obj", (ROOT / "csrc/cpu").glob("*/*.c")  # objects may outlive their sources
    objects = [(built / path.relative_to(ROOT)).with_suffix(".o") for path in kernels]
    objects += [built / "csrc/cpu/dispatch.o", built / "csrc/types.o", built / "build/glue/grids.o"]
    objects += [folder / "chooses.cpp"]
    objects += [BUILD / "race.o"] if races else []
    programs = {}
    for name in {program for program, _ in seen}:
        programs[name] = folder / f"check_{name}"
        parts = [BUILD / f"check_{name}.o", BUILD / "emulate.o", table, *objects]
        subprocess.run(["g++", "-o", programs[name], *parts, "-lm", "-pthread"], check=True)
    return programs


def fate(mutant: Mutant, programs: dict[str, Path] | None) -> str:
    """How it was caught, or MISSED, or that it does not compile."""
    if programs is None:
        return "does not compile"
    environment = {**os.environ, "MS4_MUTANT": str(mutant.number), "MS4_CHECK_FIRST": "1"}
    for _ in range(1 if mutant.races else TRIES):
        for program, prefix in SEEN_BY[mutant.file]:
            try:
                run = [programs[program], "1", prefix]
                done = subprocess.run(run, capture_output=True, text=True, timeout=LIMIT, env=environment)
            except subprocess.TimeoutExpired:
                return "hangs"
            if done.returncode == 1:
                return "differs"
            if done.returncode:
                said = (done.stderr.strip().splitlines() or [str(done.returncode)])[-1].split(": ")[-1]
                return f"stopped: {re.sub('threads.*', 'threads', said)}"
    return "MISSED"


def state_of(mutant: Mutant) -> str:
    """Of what its checks are made of: what is known of it holds as long as this does."""
    here = ROOT / "tests/cuda"
    files = [here / name for name in ("check.h", "emulate.cpp", "emulate.h", "launch.h", "race.cpp", "table.cpp")]
    files += sorted({here / f"check_{program}.cpp" for program, _ in SEEN_BY[mutant.file]})
    files += sorted([*SOURCES.glob("*.cu*"), SOURCES / "kernels.h"])
    return hashlib.sha256(b"".join(p.read_bytes() for p in files) + mutant.new.encode()).hexdigest()


def kept() -> dict[str, list[str]]:
    """What was found before: name of a mutant -> state and fate."""
    try:
        return json.loads(KEPT.read_text())
    except (OSError, ValueError):
        return {}


def try_all(todo: list[Mutant], known: dict[str, list[str]], jobs: int) -> None:
    """Adds to what is known; writes it down after each."""
    rules = [m for m in mutants() if m.number]
    together = {}
    for races in sorted({m.races for m in todo if m.number}):
        together[races] = build(rules, BUILD / f"mutants_{'race' if races else 'plain'}", races)
    folders = [BUILD / f"mutant_{i}" for i in range(jobs)]

    def run(m: Mutant) -> tuple[Mutant, str]:
        if m.number:
            return m, fate(m, together[m.races])
        folder = folders.pop()
        try:
            return m, fate(m, build([m], folder, False))
        finally:
            folders.append(folder)

    with ThreadPoolExecutor(jobs) as pool:
        for m, how in pool.map(run, todo):
            print(f"  {m.what}: {how}", flush=True)
            known[m.what] = [state_of(m), how]
            KEPT.write_text(json.dumps(known, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description="wrong kernels, each of which must be caught")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="only what has this in its description")
    parser.add_argument("--again", action="store_true", help="forget what earlier runs found")
    options = parser.parse_args()
    chosen = [m for m in mutants() if options.only in m.what]
    known = {} if options.again else kept()
    todo = [m for m in chosen if known.get(m.what, [""])[0] != state_of(m)]
    if len(todo) < len(chosen):
        print(f"  {len(chosen) - len(todo)} of {len(chosen)} are known from a run before, with the same sources")
    try_all(todo, known, options.jobs)
    caught, bad = 0, []
    for m in chosen:
        harmless, how = HARMLESS in m.what, known[m.what][1]
        good = (how == "MISSED") if harmless else how not in ("MISSED", "does not compile")
        caught += good and not harmless
        if not good:
            bad.append(f"{m.what}: {how}")
    tried = sum(HARMLESS not in m.what for m in chosen)
    print(f"mutants caught: {caught} of {tried} tried")
    for line in bad:
        print("  NOT CAUGHT:", line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

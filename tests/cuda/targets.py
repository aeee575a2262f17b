"""What nvcc makes of the kernels for each target: registers, spills, shared memory, instructions; and the roofline.

    python tests/cuda/targets.py FOLDER     where `make -f tests/cuda/Makefile cubins` has put it all

Exits 1 where something is not as it has to be.  Instructions are counted if there is an nvdisasm (the PyPI package
nvidia-cuda-nvdisasm; $NVDISASM).  Nothing here was measured: rates are those of data sheets.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = ("80", "86", "89", "90", "100", "120")
MOST_SHARED = 99 << 10
REGISTERS = 65536  # of a multiprocessor
ROUNDED = ("FFMA", "FMUL", "FADD")


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel."""

    registers: int
    stack: int
    spills: int
    shared: int


def ptxas(log: str) -> dict[str, Compiled]:
    found = {}
    for part in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)[1]
        numbers = {
            word: int((re.search(rf"(\d+) {words}", part) or [0, 0])[1])
            for word, words in (
                ("stack", "bytes stack frame"),
                ("stores", "bytes spill stores"),
                ("loads", "bytes spill loads"),
                ("shared", "bytes smem"),
            )
        }
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[name] = Compiled(registers, numbers["stack"], numbers["stores"] + numbers["loads"], numbers["shared"])
    return found


def shared_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Kernel -> threads of a block, most dynamic shared memory, as kernels.h says; chunk_<type> -> superblocks."""
    source = folder / "shared_sizes.c"
    source.write_text(
        '#include <stdio.h>\n#include "cuda/kernels.h"\nint main(void) {\n'
        + '#define X(name, args, threads) printf("%s %d 0\\n", #name, threads);\nCUDA_ROW_KERNELS(X)\n#undef X\n'
        + '#define X(name, ...) printf("mul_%s %d %zu\\ngemm_%s %d %zu\\n", #name, MUL_THREADS, \\\n'
        + "    mul_shared(MS4_TYPE_##name, MUL_TOKENS), #name, GEMM_THREADS, gemm_shared(MS4_TYPE_##name));\n"
        + "MS4_TYPES(X)\n#undef X\n"
        + '#define X(name, id, weights, bytes, family, ...) printf("chunk_%s %d 0\\n", #name, \\\n'
        + "    (int)mul_chunk(bytes * SUPERBLOCK / weights, FAMILY_##family));\nMS4_QUANTIZED_TYPES(X)\n"
        + '    printf("norm_rows 256 %zu\\n", norm_shared(4096));\n'
        + '    printf("attend_segments 256 %zu\\n", segments_shared(256, 64));\n'
        + '    printf("attend_rows 256 %zu\\n", attend_rows_shared(256, 64));\n    return 0;\n}\n'
    )
    subprocess.run(["gcc", "-I", ROOT / "csrc", "-o", folder / "shared_sizes", source], check=True)
    lines = subprocess.run([folder / "shared_sizes"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: (int(threads), int(size)) for name, threads, size in (line.split() for line in lines)}


# --- instructions


def nvdisasm() -> str | None:
    given = os.environ.get("NVDISASM") or shutil.which("nvdisasm")
    wheels = (ROOT / ".venv").glob("lib/python3*/site-packages/nvidia/*/bin/nvdisasm")
    return given or next((str(p) for p in wheels), None)


def functions(tool: str, cubin: Path) -> dict[str, list[str]]:
    """Kernel -> its instructions, and labels (with a colon at the end)."""
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        if m := re.match(r"\.text\.(\w+):", line.strip()):
            body = found[m[1]] = []
        elif m := re.match(r"\s*(\.L_x_\d+:)", line):
            body.append(m[1])
        elif m := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            body.append(m[1])
    return found


def opcode(instruction: str) -> str:
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def count(body: list[str]) -> collections.Counter[str]:
    """Instructions by what stands before the first point; FFMA2 and so on are two, adding -0 is none."""
    counts: collections.Counter[str] = collections.Counter()
    for line in body:
        if line.endswith(":"):
            continue
        base = opcode(line).split(".")[0]
        packed = base[:-1] if base in ("FFMA2", "FMUL2", "FADD2") else None
        if base == "FADD" and line.endswith(", -RZ"):
            base = "sign"
        counts[packed or base] += 2 if packed else 1
        counts["all"] += 1
    return counts


def loops(body: list[str]) -> list[list[str]]:
    """Each backward branch and what lies between it and where it goes."""
    at = {line[:-1]: i for i, line in enumerate(body) if line.endswith(":")}
    found = []
    for i, line in enumerate(body):
        m = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
        if m and at.get(m[1], i) < i:
            found.append(body[at[m[1]] : i + 1])
    return found


def must_have(name: str) -> dict[str, str]:
    """What has to be there: an opcode, and why."""
    quantized = re.fullmatch(r"(mul|gemm)_(?!f32|f16|bf16)\w+", name)
    if quantized and quantized[1] == "mul":
        return {r"IDP\.4A": "dp4a", r"LDGSTS\.E.*128": "cp.async", r"LDS\.128": "16-byte loads"}
    if quantized:
        return {"IMMA": "tensor cores"}
    if name == "attend_segments":
        return {"IMMA": "tensor cores", "LDSM": "ldmatrix", r"LDGSTS\.E.*128": "cp.async"}
    return {}


# --- roofline


@dataclass(frozen=True)
class Card:
    target: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    integer: int  # instructions of integer and logic that a multiprocessor begins a clock


CARDS = {
    "3090": Card("86", 82, 1.70e9, 936e9, 2),
    "4090": Card("89", 128, 2.52e9, 1008e9, 2),
    "5090": Card("120", 170, 2.41e9, 1792e9, 4),
    "H100": Card("90", 132, 1.98e9, 3350e9, 2),
    "H200": Card("90", 132, 1.98e9, 4800e9, 2),
}
ISSUED, MULTIPLIED = 4, 2  # instructions a clock and multiprocessor: all; IMAD and IDP
INTEGER = {"LOP3", "SHF", "IADD3", "IADD", "VIADD", "PRMT", "ISETP", "SEL", "LEA", "IMNMX", "VIMNMX", "PLOP3", "FMNMX"}
INTEGER |= {"FSETP", "FSEL", "BFE", "SGXT", "VABSDIFF4", "LOP"}
AROUND = 200 / 64  # instructions around the loop, by superblock: copies of x and the chain of results; a warp has 64
WANTED = {"q4_k": 144, "q5_k": 176, "q6_k": 210, "q8_0": 272, "iq4_xs": 136, "mxfp4": 136}  # bytes of a superblock
LEAST = 1.5
# What misses that: named, and not to become worse.  MXFP4 was never to reach it.
SHORT = {
    ("q4_k", "H200"): 1.1,
    ("q5_k", "H200"): 1.1,
    ("q6_k", "H200"): 1.1,
    ("iq4_xs", "H100"): 0.85,
    ("iq4_xs", "H200"): 0.6,
    ("mxfp4", "H100"): 0.8,
    ("mxfp4", "H200"): 0.55,
}


def chunk_loop(body: list[str]) -> collections.Counter[str] | None:
    """The loop of mul_staged.cuh over chunks: the smallest that both copies and multiplies."""
    found = [count(loop) for loop in loops(body)]
    found = [c for c in found if c["LDGSTS"] and c["IDP"]]
    return min(found, key=lambda c: c["all"], default=None)


def roofline(by_target: dict[str, dict[str, list[str]]], chunks: dict[str, int]) -> list[str]:
    """Clocks that memory needs for a superblock, over those that the busiest unit does; one token."""
    faults = []
    print("roofline of mul_<type>, one token: instructions of a superblock; margin of memory over the busiest unit")
    for kind, size in WANTED.items():
        row = [f"  {kind:7}"]
        for name, card in CARDS.items():
            c = chunk_loop(by_target[card.target][f"mul_{kind}"]) if card.target in by_target else None
            if not c:
                faults.append(f"roofline: mul_{kind} for {name}: no loop that copies and multiplies")
                continue
            units = {
                "issue": (c["all"] / chunks[kind] + AROUND) / ISSUED,
                "multiplication": (c["IMAD"] + c["IDP"]) / chunks[kind] / MULTIPLIED,
                "integer": sum(c[op] for op in INTEGER) / chunks[kind] / card.integer,
            }
            unit = max(units, key=lambda u: units[u])
            margin = size / (card.bandwidth / card.multiprocessors / card.clock) / units[unit]
            row.append(
                f"{name} {c['all'] / chunks[kind]:4.1f} {unit[:5]} {margin:5.2f}{'' if margin >= LEAST else '*'}"
            )
            if margin < SHORT.get((kind, name), LEAST):
                faults.append(f"roofline: mul_{kind} on {name}: margin {margin:.2f}")
        print("  ".join(row))
    named = ", ".join(f"{kind} on {name}" for kind, name in SHORT)
    print(f"  *: less than {LEAST}, known and named: {named}")
    return faults


# --- all of it


def check_ptxas(folder: Path, targets: list[str], sizes: dict[str, tuple[int, int]]) -> tuple[int, list[str]]:
    faults, n, stack, spills = [], 0, 0, 0
    for target in targets:
        kernels = ptxas((folder / f"kernels_sm_{target}.log").read_text())
        missing = {name for name in sizes if not name.startswith("chunk_")} - set(kernels)
        faults += [f"sm_{target}: no kernel {name}" for name in sorted(missing)]
        for name, k in kernels.items():
            threads, dynamic = sizes[name]
            n, stack, spills = n + 1, stack + k.stack, spills + k.spills
            if k.stack or k.spills:
                faults.append(f"sm_{target} {name}: {k.stack} bytes of stack, {k.spills} of spills")
            if (k.registers + 7) // 8 * 8 * threads > REGISTERS:
                faults.append(f"sm_{target} {name}: {k.registers} registers for {threads} threads")
            if k.shared + dynamic > MOST_SHARED:
                faults.append(f"sm_{target} {name}: {k.shared + dynamic} bytes of shared memory")
        most = max(kernels.items(), key=lambda k: k[1].registers)
        print(f"  sm_{target}: {len(kernels)} kernels, most registers {most[1].registers} ({most[0]})")
    print(
        f"  {n} kernels by targets (sm_{', sm_'.join(targets)}): {spills} bytes of spills, {stack} of stack; "
        f"spills, stack, too many registers, too much shared memory: {len(faults)} faults"
    )
    return n, faults


def check_counts(by_target: dict[str, dict[str, list[str]]], ptx: dict[str, dict[str, list[str]]]) -> list[str]:
    """On no target has a product or a sum of the PTX become part of an fma: there are at least as many of both, and no
    fma where the PTX has none and neither division nor root, which are made of some.

    That the counts are the same for all targets is not so.  nvcc and ptxas copy loops (and what stands behind a branch)
    as often as they like for each target; and ptxas takes an addition of -0 to change a sign: not counted here."""
    faults, alike = [], 0
    for name in next(iter(by_target.values())):
        found = set()
        for target, kernels in by_target.items():
            wanted = collections.Counter(op.split(".")[0] for op in ptx[target][name])
            fma, products, sums = rounded = [count(kernels[name])[op] for op in ROUNDED]
            found.add(tuple(rounded))
            few = products < wanted["mul"] or sums < wanted["add"] + wanted["sub"]
            if few or (fma > 0) > (wanted["fma"] + wanted["div"] + wanted["sqrt"] > 0):
                faults.append(f"sm_{target} {name}: {'/'.join(ROUNDED)} {rounded} of PTX {dict(wanted)}: contracted")
        alike += len(found) == 1
    n = sum(len(kernels) for kernels in by_target.values())
    print(
        f"  {'/'.join(ROUNDED)}: no product or sum of the PTX is missing in {n} kernels by targets; the same number on "
        f"all targets for {alike} of {n // len(by_target)} kernels, in the others loops and branches are copied more "
        "or less often"
    )
    return faults


def check_instructions(by_target: dict[str, dict[str, list[str]]]) -> list[str]:
    """What has to be there is, and nothing goes to local memory."""
    faults = []
    for target, kernels in by_target.items():
        for name, body in kernels.items():
            counts = count(body)
            if local := counts["LDL"] + counts["STL"]:
                faults.append(f"sm_{target} {name}: {local} accesses to local memory")
            for pattern, what in must_have(name).items():
                if not any(re.match(pattern, opcode(line)) for line in body if not line.endswith(":")):
                    faults.append(f"sm_{target} {name}: no {what}")
    return faults


def float_operations(ptx: str) -> dict[str, list[str]]:
    """Kernel -> its operations on floats that round, in their order."""
    found: dict[str, list[str]] = {}
    body: list[str] = []
    for entry, op in re.findall(r"\.entry (\w+)|^\s+(?:@!?%p\d+\s+)?((?:add|sub|mul|fma|div|sqrt)\.\S*f32)", ptx, re.M):
        if entry:
            body = found[entry] = []
        else:
            body.append(op)
    return found


def check_ptx(ptx: dict[str, dict[str, list[str]]]) -> list[str]:
    """All operations say how they round, so that no compiler may contract them, and nvcc makes the same ones in the
    same order for all targets of a front end (from 10.0 on it is another, which copies other loops), and where it is
    told that it may contract (loads and registers may differ)."""
    faults = []
    for target, kernels in ptx.items():
        like = "80" if len(target.split("_")[0]) == 2 else "100"
        for name, ops in kernels.items():
            loose = sorted({op for op in ops if ".rn" not in op})
            if loose:
                faults.append(f"PTX of sm_{target} {name}: {' '.join(loose)} may be contracted")
            if set(ops) != set(ptx["80"][name]) or ops != ptx[like][name]:
                faults.append(f"PTX of sm_{target} {name}: other float operations than for sm_{like}")
    n = {target: sum(map(len, kernels.values())) for target, kernels in ptx.items()}
    print(
        f"  PTX: {n['80']} operations on floats in {len(ptx['80'])} kernels ({n['100']} from sm_100 on: more copies of "
        f"loops), all .rn; the same ones for all targets and with -fmad=true: {len(faults)} faults"
    )
    return faults if all(n.values()) else [*faults, "PTX: no operations on floats were found"]


def main() -> int:
    folder = Path(sys.argv[1])
    targets = [t for t in TARGETS if (folder / f"kernels_sm_{t}.cubin").exists()]
    sizes = shared_sizes(folder)
    n, faults = check_ptxas(folder, targets, sizes)
    names = [*targets, *(f"{t}_fmad" for t in targets if (folder / f"kernels_{t}_fmad.ptx").exists())]
    ptx = {name: float_operations((folder / f"kernels_{name}.ptx").read_text()) for name in names}
    tool = nvdisasm()
    if not tool:
        print("  no nvdisasm (pip install nvidia-cuda-nvdisasm): instructions were not counted, no roofline")
    else:
        by_target = {t: functions(tool, folder / f"kernels_sm_{t}.cubin") for t in targets}
        found = check_instructions(by_target) + check_counts(by_target, ptx)
        print(
            f"  SASS of {n} kernels: contraction, local memory, dp4a, mma, cp.async, 16-byte loads: {len(found)} faults"
        )
        chunks = {name.removeprefix("chunk_"): n for name, (n, _) in sizes.items() if name.startswith("chunk_")}
        faults += found + roofline(by_target, chunks)
    faults += check_ptx(ptx)
    for fault in faults:
        print("  FAULT:", fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

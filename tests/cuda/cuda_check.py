"""`make cuda-check`: all that can be known of the CUDA part without a GPU, in one report.

    python tests/cuda/cuda_check.py [--jobs N] [--short]

1. the kernels, as g++ compiles them, in the emulation beside the CPU's; 2. the same as nvcc compiles them, as PTX;
3. nvcc for every target: spills, registers, instructions, roofline; 4. mutants; 5. waits that the engine forgets, the
emulated driver, and whole models through it (tests/test_cuda*.py).  Without nvcc, 2 and 3 are left out, and that is
said.  --short: 1 alone.  The exit status is 1 if anything was not as it has to be.
"""

import argparse
import collections
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cuda"
LINE = re.compile(r"^(\w+) +(\d+) equal, +(\d+) NaN on both sides, (\d+) wrong$")


class Report:
    """What was compared, and what failed."""

    def __init__(self, jobs: int):
        self.jobs, self.failed, self.start = jobs, [], time.time()
        self.compared: collections.Counter[str] = collections.Counter()

    def head(self, text: str) -> None:
        print(f"--- {text} ({time.time() - self.start:.0f} s)", flush=True)

    def run(self, what: str, command: list[object], quiet: bool = False) -> str:
        done = subprocess.run(
            [str(c) for c in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if not quiet or done.returncode:
            print(done.stdout, end="", flush=True)
        if done.returncode:
            self.failed.append(what)
        return done.stdout

    def make(self, *targets: str) -> bool:
        before = len(self.failed)
        self.run(
            f"make {' '.join(targets)}", ["make", "-s", "-f", "tests/cuda/Makefile", f"-j{self.jobs}", *targets], True
        )
        return len(self.failed) == before


def checks() -> list[str]:
    return sorted(p.stem.removeprefix("check_") for p in (ROOT / "tests" / "cuda").glob("check_*.cpp"))


SHORT = {"mul": ("mul_", "gemm_q4_k", "gemm_q5_1", "gemm_f16")}  # kernels of a short run; of other checks all


def compare(report: Report, suffix: str, rounds: int, short: bool) -> None:
    """Runs every check; prints one line a kernel."""
    if not report.make(*(f"build/cuda/check_{name}{suffix}" for name in checks())):
        return
    for name in checks():
        for prefix in SHORT.get(name, ("",)) if short else ("",):
            out = report.run(f"check_{name}{suffix} {prefix}", [BUILD / f"check_{name}{suffix}", rounds, prefix])
            for line in out.splitlines():
                if m := LINE.match(line):
                    report.compared[m[1]] += int(m[2]) + int(m[3])


def every_kernel(report: Report, short: bool) -> None:
    """Each kernel of kernels.h is compared by some check."""
    source = (
        '#include "cuda/kernels.h"\n#define A(name, ...) kernel name\n'
        "#define B(name, ...) kernel mul_##name kernel gemm_##name\nCUDA_ROW_KERNELS(A) MS4_TYPES(B)\n"
    )
    command = ["gcc", "-E", "-P", "-Icsrc", "-xc", "-"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True, input=source)
    wanted = set(re.findall(r"kernel (\w+)", done.stdout))
    missing = wanted - set(report.compared)
    if missing and not short:
        report.failed.append("not compared: " + " ".join(sorted(missing)))
    n, equal = len(report.compared), "; all bits equal" if not report.failed else ""
    print(f"outputs compared: {sum(report.compared.values())} of {n} of {len(wanted)} kernels{equal}")


def main() -> int:
    parser = argparse.ArgumentParser(description="the CUDA part without a GPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("g++"):
        print("cuda-check needs g++ and an x86-64: nothing was checked")
        return 0
    report = Report(min(options.jobs, 4))
    report.head("kernels as g++ compiles them, beside the CPU's")
    compare(report, "", options.rounds, options.short)
    nvcc = shutil.which("nvcc")
    if nvcc and not options.short:
        report.head("kernels as nvcc compiles them: PTX, turned into C++")
        compare(report, "_ptx", options.rounds, False)
        report.head("nvcc for every target")
        if report.make("cubins"):
            report.run("targets", [sys.executable, "tests/cuda/targets.py", BUILD])
    elif not nvcc:
        print("no nvcc here: what it makes of the kernels was not looked at")
    every_kernel(report, options.short)
    if not options.short:
        report.head("mutants")
        report.run("mutants", [sys.executable, "tests/cuda/mutants.py", "--jobs", report.jobs])
    tests = sorted((ROOT / "tests").glob("test_cuda*.py"))
    if not options.short and report.make("driver"):
        report.head("waits that the engine forgets")
        report.run("forgotten waits", [sys.executable, "tests/cuda/forget.py"])
        report.head("the emulated driver, and models through it")
        report.run("tests", [sys.executable, "-m", "pytest", "-q", "-n", report.jobs, *tests])
    report.head("cuda-check: " + ("FAILED: " + "; ".join(report.failed) if report.failed else "all passed"))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())

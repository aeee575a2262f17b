"""`make cuda-check`: all that can be known of the CUDA part without a GPU, in one report.

    python tests/cuda/cuda_check.py [--jobs N] [--rounds N] [--short | --all]

1. the kernels, as g++ compiles them, in the emulation beside the CPU's; 2. the same, looking for barriers that are
missing; 3. under ASan and UBSan; 4. as nvcc compiles them, as PTX; 5. nvcc for every target: spills, registers,
instructions, roofline; 6. mutants; 7. waits that the engine forgets, and mistakes of the host around what the router
chose; 8. whole models on the emulated driver; 9. the emulated driver itself, and what both believe of the real one
beside NVIDIA's cuda.h.  Without nvcc, 4, 5, the second half of 8 and cuda.h are left out, and that is said.  --short:
some of 1 alone, for CI.  --all: three times as many cases in 1, the PTX for cards from 10.0 on in 4, every checkpoint
in 8, and then tests/test_cuda*.py, where every call of the driver fails once: hours.  The exit status is 1 if anything
was not as it has to be.
"""

import argparse
import collections
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cuda"
LINE = re.compile(r"^(\w+) +(\d+) equal, +(\d+) NaN on both sides, (\d+) wrong$")
# What the parts say of themselves that belongs into the last lines, too.
RESULT = re.compile(
    r"^ *((?:\d+ kernels by targets|calls, |SASS of|PTX: |mutants caught|forgotten waits|mistakes of|whole models: )"
    r".*)$",
    re.M,
)
LIMIT = 1800  # seconds of one command
# Parts of checks that run side by side, those that take longest first; what there is where barriers and addresses are
# looked at, which types of a family share, but for --all; and what a short run has.
ALL = {"mul": ("gemm_", "mul_")}
FAMILIES = {
    "mul": tuple(
        f"{k}_{kind}" for k in ("gemm", "mul") for kind in "q4_k q6_k q5_1 q8_0 nvfp4 iq3_s iq2_xs f16".split()
    )
}
SHORT = {"mul": ("mul_", "gemm_q4_k", "gemm_q5_1", "gemm_f16")}
# Kernels without a check of their own: their outputs are compared in that of another, which cannot do without them.
WITHIN = {"fold_segments": "attend_segments"}
KINDS = {"g++": "", "races": "_race", "ASan, UBSan": "_san", "PTX": "_ptx", "PTX sm_100": "_ptx100"}


def cpu_time() -> float:
    """Seconds of the processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Report:
    """What was compared, what failed, how long it took."""

    def __init__(self, jobs: int):
        self.jobs, self.pool = jobs, ThreadPoolExecutor(jobs)
        self.failed: list[str] = []
        self.results: list[str] = []
        self.times: list[tuple[str, float, float]] = []
        self.compared: dict[str, collections.Counter[str]] = {}  # kind -> kernel -> outputs

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        print(f"--- {title}", flush=True)
        start, cpu = time.monotonic(), cpu_time()
        yield
        self.times.append((title, time.monotonic() - start, cpu_time() - cpu))
        print(f"    {self.times[-1][1]:.0f} s, {self.times[-1][2]:.0f} s of CPU", flush=True)

    def call(self, command: list[object]) -> tuple[int, str]:
        environment = {**os.environ, "ASAN_OPTIONS": "handle_segv=0:detect_stack_use_after_return=0:detect_leaks=0"}
        try:
            done = subprocess.run(
                [str(c) for c in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=environment, timeout=LIMIT, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 124, f"does not end in {LIMIT} s\n"
        return done.returncode, done.stdout

    def run(self, what: str, command: list[object], quiet: bool = False) -> bool:
        status, said = self.call(command)
        if not quiet or status:
            print(said, end="", flush=True)
        if status:
            self.failed.append(what)
        self.results += RESULT.findall(said)
        return not status

    def python(self, what: str, *arguments: object) -> bool:
        return self.run(what, [sys.executable, *arguments])

    def make(self, *targets: str) -> bool:
        command = ["make", "-s", "-f", "tests/cuda/Makefile", f"-j{self.jobs}", *targets]
        return self.run(f"make {' '.join(targets)}", command, quiet=True)


def checks() -> list[str]:
    return sorted(p.stem.removeprefix("check_") for p in (ROOT / "tests" / "cuda").glob("check_*.cpp"))


def compare(report: Report, kind: str, rounds: int, parts: dict[str, tuple[str, ...]]) -> None:
    """Runs every check, some at a time."""
    suffix = KINDS[kind]
    if not report.make(*(f"build/cuda/check_{name}{suffix}" for name in checks())):
        return
    counts = report.compared[kind] = collections.Counter()
    todo = sorted(((name, prefix) for name in checks() for prefix in parts.get(name, ("",))), key=lambda t: not t[1])
    commands = [[BUILD / f"check_{name}{suffix}", rounds, prefix] for name, prefix in todo]
    for (name, prefix), (status, said) in zip(todo, report.pool.map(report.call, commands), strict=True):
        if status:
            report.failed.append(f"check_{name}{suffix} {prefix}".strip())
            print(said, end="")
        for line in said.splitlines():
            if m := LINE.match(line):
                counts[m[1]] += int(m[2]) + int(m[3])
    print(f"    {sum(counts.values())} outputs of {len(counts)} kernels compared")


def kernels() -> list[str]:
    """The names in kernels.h."""
    source = (
        '#include "cuda/kernels.h"\n#define A(name, ...) kernel name\n'
        "#define B(name, ...) kernel mul_##name kernel gemm_##name\nCUDA_ROW_KERNELS(A) MS4_TYPES(B)\n"
    )
    command = ["gcc", "-E", "-P", "-Icsrc", "-xc", "-"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True, input=source)
    return sorted(set(re.findall(r"kernel (\w+)", done.stdout)))


def every_kernel(report: Report, short: bool, families: tuple[str, ...]) -> None:
    """A line for each kernel: how many of its outputs were compared.  None may have been left out, but for types of the
    same family where that is enough."""
    kinds, names = list(report.compared), kernels()
    print("outputs compared" + "".join(f"{kind:>14}" for kind in kinds))
    for name in names:
        cells = [str(report.compared[kind][WITHIN.get(name, name)] or "-") for kind in kinds]
        if not short or any(cell != "-" for cell in cells):
            print(f"  {name:14}" + "".join(f"{cell:>14}" for cell in cells))
    for kind in kinds:
        counts = report.compared[kind]
        missing = [name for name in names if not counts[WITHIN.get(name, name)]]
        if missing and not short and kind not in families:
            report.failed.append(f"not compared ({kind}): {' '.join(missing)}")
        bad = [f for f in report.failed if f.startswith("check_")]
        report.results.append(
            f"outputs compared ({kind}): {sum(counts.values())} of {len(names) - len(missing)} of {len(names)} kernels"
            + ("" if bad else ", all bits equal")
        )


def kernel_parts(report: Report, options: argparse.Namespace, nvcc: str | None) -> None:
    with report.part("kernels as g++ compiles them, beside the CPU's"):
        compare(report, "g++", options.rounds, SHORT if options.short else ALL)
    if options.short:
        return
    some = ALL if options.all else FAMILIES
    with report.part("the same, looking for barriers that are missing"):
        compare(report, "races", 1, some)
    with report.part("the same under ASan and UBSan"):
        compare(report, "ASan, UBSan", 1, some)
    if nvcc:
        with report.part("kernels as nvcc compiles them: PTX, turned into C++"):
            compare(report, "PTX", 1, ALL)
            if options.all:
                compare(report, "PTX sm_100", 1, ALL)
        with report.part("nvcc for every target"):
            if report.make("cubins"):
                report.python("targets", "tests/cuda/targets.py", BUILD)


def other_parts(report: Report, options: argparse.Namespace, nvcc: str | None) -> None:
    jobs: list[object] = ["--jobs", report.jobs]
    # Who forgets to wait, waits for copies that take their time: beside the mutants, which do not.
    with report.part("mutants of kernels, waits that the engine forgets, mistakes of the host"):
        together = [("mutants", "tests/cuda/mutants.py")]
        if report.make("driver"):
            together += [
                ("forgotten waits", "tests/cuda/forget.py"),
                ("mistakes of the host", "tests/cuda/host_mutants.py"),
            ]
        with ThreadPoolExecutor(len(together)) as pool:
            list(pool.map(lambda one: report.python(*one, *jobs), together))
    with report.part("whole models on the emulated card"):
        if report.make("driver", *["driver-ptx"] * bool(nvcc)):
            more = ["--ptx"] * bool(nvcc) + ["--all"] * options.all
            report.python("whole models", "tests/cuda/models.py", *jobs, *more)
    found = sorted((ROOT / "tests").glob("test_cuda*.py"))
    tests = [path for path in found if options.all or path.name == "test_cuda_emulation.py"]
    if nvcc:
        with report.part("the driver's calls beside cuda.h"):
            report.python("prototypes", "tests/cuda/prototypes.py")
    with report.part("tests of the emulated driver" + ", and of an engine on it" * options.all):
        report.python("tests", "-m", "pytest", "-q", "-n", report.jobs, "--dist", "worksteal", *tests)


def last_lines(report: Report, nvcc: str | None) -> None:
    print("--- cuda-check")
    for line in report.results:
        print(f"  {line}")
    if not nvcc:
        print("  no nvcc here: what it makes of the kernels was not looked at")
    for title, wall, cpu in report.times:
        print(f"  {wall:5.0f} s, {cpu:5.0f} s of CPU  {title}")
    print(f"  {sum(t[1] for t in report.times):5.0f} s, {sum(t[2] for t in report.times):5.0f} s of CPU  in all")
    for what in report.failed:
        print(f"  FAILED: {what}")
    print("cuda-check: " + ("FAILED" if report.failed else "all passed"))


def main() -> int:
    parser = argparse.ArgumentParser(description="the CUDA part without a GPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("g++"):
        print("cuda-check needs g++ and an x86-64: nothing was checked")
        return 0
    options.rounds = 3 if options.all else options.rounds
    report, nvcc = Report(min(options.jobs, 4)), shutil.which("nvcc")
    kernel_parts(report, options, nvcc)
    every_kernel(report, options.short, () if options.all else ("races", "ASan, UBSan"))
    if not options.short:
        other_parts(report, options, nvcc)
    last_lines(report, nvcc or ("not asked for" if options.short else None))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())

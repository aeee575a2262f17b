"""The first contact with a card, `make gpu`: is it a yes or a no, and how fast?  One block of text to paste.

    python3 tests/gpu.py [--limit 450] [--folder /dev/shm]

It takes gcc, nvcc and a Python with NumPy: no pip, no network, no virtual environment.  The engine is built as a plain
library, which tests/bare binds to the package as it stands here; two small files there stand for the packages gguf and
typer.  In this order, each within its share of the time and printed as it comes, so that a run that is cut off has
told what it knows: the card; every bit against the CPU; tokens per second of a file of the real shape, on the whole
card, within 24 GiB of it, and on the CPU.  That file has as many layers as memory holds, and is removed at the end.
"""

import argparse
import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import build_parts  # noqa: E402

BARE = Path("build", "bare")
COMMANDS = str(ROOT / "tests" / "bare" / "commands.py")
LAYER = 1.95e9  # bytes in Q4_K_M
WHOLE = 36
# Where the engine finds it, too (csrc/cuda/driver.c).
DRIVERS = ("libcuda.so.1", "/usr/local/nvidia/lib64/libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1")
VOCABULARY = 131072
TO_WRITE = 60  # seconds that the file may take
# name, options, what is read + written; the first tells most
BENCHES = (
    ("the whole card", ["--device", "cuda"], ["32+64", "512+1", "4096+1"]),
    ("24 GiB of it", ["--device", "cuda", "--vram", "24G"], ["32+64", "512+1", "4096+1"]),
    ("the CPU alone", ["--device", "cpu", "--repeat", "1"], ["32+16"]),
)
SMALL_BENCHES = (
    ("the whole card", ["--device", "cuda", "--repeat", "1"], ["2+3", "40+1"]),
    ("24 MiB of it", ["--device", "cuda", "--vram", "24M", "--repeat", "1"], ["2+3", "40+1"]),
    ("the CPU alone", ["--device", "cpu", "--repeat", "1"], ["2+3"]),
)


class Clock:
    """What is left of the time.  A step gets a share of all, or that."""

    def __init__(self, seconds: float) -> None:
        self.begun = time.monotonic()
        self.seconds = seconds

    def passed(self) -> float:
        return time.monotonic() - self.begun

    def left(self, share: float) -> float:
        return min(share * self.seconds, self.seconds - self.passed())


def say(text: str) -> None:
    print(text, flush=True)


# --- building


def library(compiler: str) -> None:
    """The engine with all its names, for ctypes: what the extension is made of, but for the glue of cffi."""
    flags = [*build_parts.CFLAGS, "-fvisibility=default", "-fPIC", "-w", "-Icsrc"]

    def compiled(source: str) -> str:
        obj = BARE / "obj" / Path(source).with_suffix(".o")
        if not build_parts.is_fresh(obj):
            obj.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([compiler, *flags, "-c", "-o", str(obj), source], check=True)
        return str(obj)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*build_parts.SOURCES, build_parts.write_grids()]))
    output = str(BARE / "ms4" / "libms4.so")
    subprocess.run([compiler, "-shared", "-o", output, *objects, "-pthread", "-ldl", "-lm"], check=True)


def package() -> None:
    """build/bare/ms4: links to the Python files, with tests/bare/binding.py for the extension."""
    build_parts.link_package(BARE)
    (BARE / "ms4" / "declarations.h").write_text("\n".join(build_parts.declarations()))
    links = {"_core.py": "tests/bare/binding.py", "cuda": "csrc/cuda", "quant.h": "csrc/quant.h"}
    for name, source in links.items():
        link = BARE / "ms4" / name
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / source)


def capability() -> str:
    """Of the first card, as 86; empty if its driver does not name one, for a reason that `facts` tells."""
    given = os.environ.get("MS4_LIBCUDA")
    for name in [given] if given else DRIVERS:
        try:
            driver = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return ""
    found = [ctypes.c_int() for _ in range(3)]
    device, major, minor = found
    calls = [
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    ]
    return "" if any(calls) else f"{major.value}{minor.value}"


def kernels(target: str) -> str:
    """Compiles the kernels for the card; what came of it, for the reader."""
    if os.environ.get("MS4_GPU_CODE"):
        return "kernels: those of MS4_GPU_CODE"
    if not target:
        return "kernels: none, as no card answers"
    if not shutil.which("nvcc"):
        return "kernels: there is no nvcc on PATH; NVRTC is tried"
    begun = time.monotonic()
    for arch in (os.environ.get("MS4_CUDA_ARCH") or target, "80"):  # of 80 there is PTX, which all cards take
        os.environ["MS4_CUDA_ARCH"] = arch
        try:
            build_parts.build_gpu_code("all")
        except subprocess.CalledProcessError:
            continue
        size = build_parts.GPU_CODE.stat().st_size / 1e6
        return f"kernels: nvcc for {arch}, {size:.1f} MB, {time.monotonic() - begun:.0f} s"
    return "kernels: nvcc failed, its messages are above; NVRTC is tried"


# --- running


def environment() -> dict[str, str]:
    paths = [str(ROOT / BARE), str(ROOT / "tests" / "bare")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"}


def shown(command: list[str], seconds: float) -> bool:
    """Runs it with its output on ours, for so long at most; whether it ended well."""
    if seconds < 5:
        say("left out: the time is up (--limit SECONDS gives more)")
        return False
    begun = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, *command], stderr=subprocess.STDOUT, timeout=seconds, env=environment()
        ).returncode
    except subprocess.TimeoutExpired:
        say(f"cut off after {seconds:.0f} s")
        return False
    say(f"({'' if code == 0 else f'exit code {code}, '}{time.monotonic() - begun:.0f} s)")
    return code == 0


def about() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = total("MemTotal") / 2**30
    commit = line_of(["git", "rev-parse", "--short", "HEAD"])
    return (
        f"## ms4 on a GPU, {time.strftime('%Y-%m-%d')}{f', commit {commit}' if commit else ''}\n"
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} threads, {memory:.0f} GiB; "
        f"Linux {platform.release()}, Python {platform.python_version()}, {line_of(['gcc', '--version'])}, "
        f"{line_of(['nvcc', '--version'], -1) or 'no nvcc'}"
    )


def line_of(words: list[str], number: int = 0) -> str:
    """Of what a program prints; empty if there is no such program, or line."""
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.splitlines()[number]
    except (OSError, IndexError):
        return ""


def total(name: str) -> int:
    """Bytes, of /proc/meminfo."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


# --- the file of the real shape


def in_memory(folder: Path) -> bool:
    """Whether the folder is in a file system that has no disk."""
    best = ("", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if folder.resolve().is_relative_to(place) and len(place) >= len(best[0]):
            best = (place, kind)
    return best[1] in ("tmpfs", "ramfs")


def rate(folder: Path) -> float:
    """Bytes per second that can be written there."""
    probe, piece = folder / f"ms4-probe-{os.getpid()}", bytes(1 << 24)
    begun = time.monotonic()
    try:
        with open(probe, "wb", buffering=0) as file:
            for _ in range(8):
                file.write(piece)
            os.fsync(file)
    finally:
        probe.unlink(missing_ok=True)
    return 8 * len(piece) / (time.monotonic() - begun)


def place(folders: Iterable[Path], memory: float) -> tuple[Path, int]:
    """The folder that takes most layers, of equals the first, and how many they are."""
    best = (Path("build"), 0)
    for folder in folders:
        if not os.access(folder, os.W_OK):
            continue
        room = min(memory, 0.95 * shutil.disk_usage(folder).free)
        if not in_memory(folder):
            room = min(room, TO_WRITE * rate(folder))
        layers = min(WHOLE, int(room / LAYER))
        best = max(best, (folder, layers), key=lambda each: each[1])
    return best


def writer(path: Path, layers: int, small: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "tests" / "make_shape.py"), str(path), "--layers", str(layers)]
    vocabulary = 1024 if small else max(2048, VOCABULARY * layers // WHOLE)
    command += ["--vocab", str(vocabulary), *(["--small"] if small else [])]
    return subprocess.Popen(command, env=environment())


def measure(path: Path, layers: int, writing: subprocess.Popen[bytes], clock: Clock, small: bool) -> list[str]:
    """Names of what failed."""
    try:
        code = writing.wait(max(1.0, clock.left(0.25)))
    except subprocess.TimeoutExpired:
        code = -1
    if code:
        say(f"the file of the real shape could not be written in time, or not at all ({path})")
        return ["the file"]
    say(f"\n### Speed: {layers} of {WHOLE} layers of the {'small' if small else 'real'} shape, random weights")
    say(f"{path.stat().st_size / 1e9:.2f} GB in {path.parent}; the whole model's tokens/s are about")
    say(f"{layers / WHOLE:.2f} times these.  Random tokens spread over all experts evenly, which is the worst case for")
    say("a card that holds some of them.")
    failed = []
    for name, how, plans in SMALL_BENCHES if small else BENCHES:
        say(f"\n#### {name}")
        if not shown([COMMANDS, "bench", str(path), *plans, *how], clock.left(0.33)):
            failed.append(name)
    return failed


def first_contact(a: argparse.Namespace, compiler: str, clock: Clock) -> list[str]:
    """Names of what failed.  The kernels are compiled, and the file is written, beside the rest."""
    writing = None
    path = Path()
    try:
        with ThreadPoolExecutor(1) as pool:
            compiling = pool.submit(kernels, capability())
            begun = time.monotonic()
            library(compiler)
            say(f"engine: {time.monotonic() - begun:.0f} s")
            if not shown([COMMANDS, "facts"], clock.left(0.13)):
                say(compiling.result())
                return ["no card that can be used"]
            folders = [a.folder] if a.folder else [Path("/dev/shm"), Path(tempfile.gettempdir()), ROOT / "build"]
            free = int(subprocess.check_output([sys.executable, COMMANDS, "room"], env=environment()))
            folder, most = place(folders, 0.6 * free)
            layers = a.layers or (1 if a.small else most)
            path = folder / f"ms4-shape-{os.getpid()}.gguf"
            writing = writer(path, layers, a.small) if layers else None
            say(compiling.result())
        say("\n### Are the bits those of the CPU?")
        command = [COMMANDS, "selftest", *(["--few"] if a.small else [])]
        failed = [] if shown(command, clock.left(0.5)) else ["the selftest"]
        if not writing:
            return [*failed, "the file: no folder and memory for a layer, which takes 1.95 GB"]
        return failed + measure(path, layers, writing, clock, a.small)
    finally:
        if writing and writing.poll() is None:
            writing.kill()
            writing.wait()
        if writing:
            path.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the file of the real shape goes; else where most fits")
    parser.add_argument("--limit", type=float, default=450, help="seconds, all in all")
    parser.add_argument("--layers", type=int, help="of the file; else as many as fit")
    parser.add_argument("--small", action="store_true", help="a narrow file, few checks: to try this program itself")
    a = parser.parse_args()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended from outside"))  # so that the file is removed
    try:
        import numpy  # noqa: F401
    except ImportError:
        sys.exit(f"{sys.executable} has no NumPy, which is all that this needs: make gpu PYTHON=...")
    compiler = os.environ.get("CC") or "gcc"
    if not shutil.which(compiler):
        sys.exit(f"ms4 is built with a C compiler, and there is no {compiler}: install gcc, or set CC")
    clock = Clock(a.limit)
    say(about())
    package()
    failed = first_contact(a, compiler, clock)
    say(f"\n{'all of it ran' if not failed else 'failed: ' + ', '.join(failed)}; {clock.passed():.0f} s in all")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

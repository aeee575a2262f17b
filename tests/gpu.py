"""The first contact with a card, `make gpu`: selftest, then a file of the real shape, measured.  One block to paste.

    python tests/gpu.py FOLDER

writes the file into FOLDER, which is best a file system in memory: as many layers of the real model as fit, up to 36.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MS4 = Path(sys.executable).with_name("ms4")
LAYER = 1.95e9  # bytes in Q4_K_M
WHOLE = 36
VOCABULARY = 131072
RUNS = (
    ("whole card, short", ["--pp", "512", "--tg", "64"]),
    ("whole card, long", ["--pp", "4096", "--tg", "16"]),
    ("24 GiB, short", ["--vram", "24G", "--pp", "512", "--tg", "64"]),
    ("24 GiB, long", ["--vram", "24G", "--pp", "4096", "--tg", "16"]),
)


def available() -> int:
    """Bytes of memory that are free, or hold pages of files."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def write_shape(path: Path) -> int:
    """The file with as many layers as memory and FOLDER take; how many those are."""
    room = min(0.6 * available(), 0.95 * shutil.disk_usage(path.parent).free)
    layers = min(WHOLE, int(room / LAYER))
    if layers < 1:
        raise SystemExit(f"{path.parent}: no room for a layer, which takes {LAYER / 1e9:.1f} GB")
    command = [sys.executable, str(ROOT / "tests" / "make_shape.py"), str(path), "--layers", str(layers)]
    subprocess.run([*command, "--vocab", str(max(2048, VOCABULARY * layers // WHOLE))], check=True, cwd=ROOT)
    return layers


def shown(command: list[str]) -> int:
    """Runs it with its output on ours."""
    sys.stdout.flush()
    return subprocess.run(command, stderr=subprocess.STDOUT, cwd=ROOT).returncode


def measure(path: Path) -> int:
    layers = write_shape(path)
    print(f"\n{layers} of {WHOLE} layers of the real shape, {path.stat().st_size / 1e9:.1f} GB, random weights")
    print(f"(tokens/s of the whole model are about {layers / WHOLE:.2f} times these)")
    failed = 0
    for name, options in RUNS:
        begun = time.monotonic()
        print(f"\n### {name}")
        failed |= shown([str(MS4), "bench", "-m", str(path), "--device", "cuda", "-r", "2", *options])
        print(f"({time.monotonic() - begun:.0f} s)")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    folder = Path(parser.parse_args().folder)
    path = folder / f"ms4-shape-{os.getpid()}.gguf"
    failed = shown([str(MS4), "selftest", "--gpu"])
    try:
        failed |= measure(path)
    finally:
        path.unlink(missing_ok=True)
    print("\nall of it ran" if not failed else "\nsomething failed; see above")
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())

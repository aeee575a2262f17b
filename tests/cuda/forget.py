"""Does anything show when the engine forgets to wait for the card?

    python tests/cuda/forget.py [--seeds N]

The emulated driver takes one place of the program at a time that waits, or records what is waited for, for nothing
(MS4_EMU_FORGET), under several orders of the card's work; caught is what gives other logits, stops or hangs.  What is
brought beside the work comes before anyone looks here, unless it is made late.  Prints how many of how many; exits 1 if
one was not caught.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds
# Functions whose waits show where what is brought takes longer than some tokens: milliseconds of a copy (MS4_EMU_LATE).
LATE = {"gpu_brought": "1500"}
# Functions where nothing can show, and why.
NOT_FELT = {
    **dict.fromkeys(
        ("gpu_settle", "vram_close", "close_device", "cuda_weights_close"),
        # cuMemFree and cuMemFreeHost wait for all work in calls.cpp, and next every buffer that the work could touch is
        # given back by them.  Real drivers wait there, too, but do not promise it: so the engine does.
        "closing: the driver itself waits where memory is given back",
    ),
    # It waits for g->up.left, recorded in g->work; its own copy goes through g->work, too, and so comes after them, and
    # gpu_wait(g) stands before the host reads: the two waits are one order said twice.
    "gpu_download": "uploads are in the stream that it waits for next",
}
# Experts that come and go, sessions in turns, one that is saved and loaded: the places that wait are on these ways.
PROGRAM = """
import hashlib, sys, tempfile
import numpy as np
import ms4
from ms4.models.model import Model
out, ids = hashlib.sha256(), np.random.default_rng(3).integers(5, 900, (2, 36))
with Model.open(sys.argv[1], device="cuda", vram=20 << 20) as model:
    with model.session(256) as one, model.session(256) as two:
        logits = one.feed(ids[0])
        for _ in range(14):
            logits = one.feed([int(np.argmax(logits))])
            out.update(logits.tobytes())
        for part in model.engine.step([ms4.Span(one, ids[1, :3]), ms4.Span(two, ids[1, :20])]):
            out.update(part.tobytes())
        with tempfile.TemporaryFile() as file:
            one.save(file.fileno())
            file.seek(0)
            out.update(file.read())
            file.seek(0)
            two.load(file.fileno())
        out.update(two.feed([7]).tobytes())
print(out.hexdigest())
"""


def run(seed: int, **more: str) -> str:
    """What the program prints, or how it ended."""
    environment = {**os.environ, "MS4_LIBCUDA": str(ROOT / "build/cuda/libcuda_emu.so"), "MS4_EMU_SEED": str(seed)}
    environment |= {"MS4_GPU_CODE": __file__, **more}
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "models/demo/ms4-demo.gguf")]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "hangs"
    return done.stdout.strip() if not done.returncode else f"stops: {done.stderr.strip().splitlines()[-1]}"


def places(report: str) -> list[tuple[str, int, str]]:
    """Call, number and function of each place; the return address lies behind the call."""
    found = []
    for call, n, file, offset in re.findall(r"^place (\w+) (\d+) (\S+) (\w+)$", report, re.MULTILINE):
        command = ["addr2line", "-f", "-e", file, hex(int(offset, 16) - 1)]
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        found.append((call, int(n), name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="waits that are forgotten, each of which must be caught")
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile("r") as report:
        want = run(0, MS4_EMU_REPORT=report.name)
        found = places(Path(report.name).read_text())
    late = [run(1, MS4_EMU_LATE=ms) for ms in LATE.values()]
    if not re.fullmatch("[0-9a-f]{64}", want) or any(got != want for got in (run(1), run(2), *late)):
        print(f"  without forgetting: {want}, or other bits for other orders")
        return 1
    tried, missed = 0, []
    for call, place, function in found:
        what = f"{call} in {function} ({place})"
        if function in NOT_FELT:
            print(f"  {what}: not tried; {NOT_FELT[function]}")
            continue
        tried += 1
        for seed in range(1, options.seeds + 1):
            got = run(seed, MS4_EMU_FORGET=f"{call}:{place}", MS4_EMU_LATE=LATE.get(function, "0"))
            if got != want:
                break
        else:
            missed.append(what)
        how = "NOT CAUGHT" if got == want else "other bits" if re.fullmatch("[0-9a-f]{64}", got) else got[:100]
        print(f"  {what}: {how}", flush=True)
    print(f"forgotten waits caught: {tried - len(missed)} of {tried} tried")
    for what in missed:
        print("  NOT CAUGHT:", what)
    return 1 if missed or not tried else 0


if __name__ == "__main__":
    sys.exit(main())

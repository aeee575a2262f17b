"""Does anything show when the engine forgets to wait for the card?

    python tests/cuda/forget.py [--jobs N] [--seeds N]

The emulated driver takes one place of the program at a time that waits, or records what is waited for, for nothing
(MS4_EMU_FORGET), under several orders of the card's work; caught is what gives other logits, stops or hangs.  What is
brought beside the work comes before anyone looks here, unless the driver is told otherwise.  Prints how many of how
many; exits 1 if one was not caught.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds
LATE = {"MS4_EMU_LATE": "1500"}  # milliseconds of a copy: longer than some tokens take
# Places whose waits show where the driver is not as kind as usual: function, and the how manieth wait in it.
HOW = {
    ("gpu_brought", 1): LATE,
    ("gpu_is_over", 1): LATE,
    ("gpu_settle", 2): LATE,  # it closes slots that an expert is on its way to
    ("gpu_worked", 1): {"MS4_EMU_COPIES_FIRST": "1"},  # nothing is brought to where an expert is that is still read
    ("gpu_hold", 1): {"MS4_EMU_COPIES_FIRST": "1"},
}
# Places where nothing can show, and why.
NOT_FELT = {
    # Of the stream that works: who closes has waited for it, as every step and every opening that succeeds ends with a
    # wait; where a card fails, nothing is waited for.  What is left is an expert that the disk cannot bring.
    ("gpu_settle", 1): "closing: all steps end with a wait of their own",
    # They wait for g->up.left, recorded in g->work; the copy that follows goes through g->work, too, and so comes after
    # them, and gpu_wait(g) stands before the host reads: the two waits are one order said twice.
    ("gpu_download", 1): "uploads are in the stream that it waits for next",
    ("gpu_poll", 1): "a flag says when to go on; the driver is asked whether the card has failed",
}
# Experts that come and go, sessions in turns, one that is saved and loaded, a prompt that brings experts for a layer
# alone, out of a file in memory, and out of three slots that others are read into then: the places that wait are on
# these ways.
PROGRAM = """
import hashlib, sys, tempfile
import numpy as np
import ms4
from ms4.models.model import Model
from ms4.quant.tiny import Tiny, write_tiny
out, ids = hashlib.sha256(), np.random.default_rng(3).integers(5, 900, (2, 36))
with Model.open(sys.argv[1], device="cuda", vram=24 << 20) as model:
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
        model.engine.fix_rates(1e15, 4096)  # as much as anybody wants, so that some are on their way at the end
        for id in (7, 20, 117, 214):
            out.update(two.feed([id]).tobytes())
with tempfile.TemporaryDirectory() as folder:
    path = write_tiny(folder + "/t.gguf", Tiny(d_model=256, d_expert=1024))[0]
    with Model.open(path, device="cuda", vram=25 << 20, n_batch=128) as model, model.session(200) as one:
        out.update(one.feed(np.arange(5, 125)).tobytes())
        assert model.engine.stats().bytes_streamed
    path = write_tiny(folder + "/s.gguf", Tiny(n_layer=3, n_expert=16, n_used=4, d_model=256, d_expert=256))[0]
    card = {"device": "cuda", "load": "stream", "vram": 18 << 20, "n_batch": 64}
    with Model.open(path, **card) as model, model.session(100) as one:
        stats = model.engine.stats()
        model.engine.fix_rates(1.0, 2)
        model.engine.fix_slots(3 * stats.slot_bytes // stats.slots)
        out.update(one.feed(np.arange(5, 45)).tobytes())
        assert model.engine.stats().bytes_streamed
print(out.hexdigest())
"""


def outcome(command: list[str], environment: dict[str, str]) -> str:
    """What a program prints, or how it ended."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "hangs"
    if not done.returncode:
        return done.stdout.strip()
    return f"stops: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]}"


def run(seed: int, **more: str) -> str:
    environment = {**os.environ, "MS4_LIBCUDA": str(ROOT / "build/cuda/libcuda_emu.so"), "MS4_EMU_SEED": str(seed)}
    environment |= {"MS4_GPU_CODE": __file__, **more}
    return outcome([sys.executable, "-c", PROGRAM, str(ROOT / "models/demo/ms4-demo.gguf")], environment)


@dataclass(frozen=True)
class Place:
    """Where the program waits: the n-th place that makes this call, the nth of its function."""

    call: str
    n: int
    function: str
    nth: int

    def __str__(self) -> str:
        return f"{self.call} in {self.function} ({self.nth})"


def places(report: str) -> list[Place]:
    """The return address lies behind the call.  Numbers go by the first time that a place is reached."""
    found: list[Place] = []
    for call, n, file, offset in re.findall(r"^place (\w+) (\d+) (\S+) (\w+)$", report, re.MULTILINE):
        command = ["addr2line", "-f", "-i", "-e", file, hex(int(offset, 16) - 1)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        name = said[-2]  # of a function and its inlined ones, each with its line: the outermost
        nth = 1 + sum(place.call == call and place.function == name for place in found)
        found.append(Place(call, int(n), name, nth))
    return found


def attempt(place: Place, want: str, n_seeds: int) -> tuple[bool, str]:
    """Whether it was caught, and how."""
    how = HOW.get((place.function, place.nth), {})
    for seed in range(1, n_seeds + 1):
        got = run(seed, MS4_EMU_FORGET=f"{place.call}:{place.n}", **how)
        if got != want:
            return True, "other bits" if re.fullmatch("[0-9a-f]{64}", got) else got[:100]
    return False, "NOT CAUGHT"


def main() -> int:
    parser = argparse.ArgumentParser(description="waits that are forgotten, each of which must be caught")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    pool = ThreadPoolExecutor(options.jobs)
    with tempfile.NamedTemporaryFile("r") as report:
        right = [pool.submit(run, 0, MS4_EMU_REPORT=report.name), *(pool.submit(run, seed) for seed in (1, 2))]
        right += [pool.submit(run, 1, **how) for how in (HOW["gpu_settle", 2], HOW["gpu_hold", 1])]
        said = [task.result() for task in right]
        found = places(Path(report.name).read_text())
    want = said[0]
    if not re.fullmatch("[0-9a-f]{64}", want) or len(set(said)) > 1:
        print(f"  without forgetting, not the same bits in every order: {said}")
        return 1
    tried = {
        place: pool.submit(attempt, place, want, options.seeds)
        for place in found
        if (place.function, place.nth) not in NOT_FELT
    }
    missed = []
    for place in found:
        if place not in tried:
            print(f"  {place}: not tried; {NOT_FELT[place.function, place.nth]}", flush=True)
            continue
        caught, how = tried[place].result()
        print(f"  {place}: {how}", flush=True)
        if not caught:
            missed.append(str(place))
    print(f"forgotten waits caught: {len(tried) - len(missed)} of {len(tried)} tried")
    unknown = (HOW.keys() | NOT_FELT.keys()) - {(place.function, place.nth) for place in found}
    for what in [*missed, *(f"{function} ({nth}): not reached any more" for function, nth in sorted(unknown))]:
        print("  NOT CAUGHT:", what)
    return 1 if missed or unknown or not tried else 0


if __name__ == "__main__":
    sys.exit(main())

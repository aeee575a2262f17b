"""What `make gpu` runs of ms4 on a machine without pip, each in a process of its own: python commands.py NAME ...

facts: the card and the machine; exit code 1 if there is no card.  room: bytes of memory that are free.  selftest: that
of `ms4 selftest --gpu`.  bench FILE: rows of `ms4 bench`, printed as they are measured, from one opening of the model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import ms4
from ms4.cli import bench, card, doctor, errors, loading, options, render, selftest
from ms4.models.interrupt import interruptible
from ms4.quant.blocks import BLOCKS

Plans = list[bench.Plan]


def facts() -> int:
    for check in (doctor.check_kernels(), doctor.check_threads(), doctor.check_memory()):
        print(f"{check.name}: {check.text}{f' ({check.fix})' if check.fix else ''}")
    print(selftest.about())
    return 0


def few_checks() -> None:
    """For an emulated card, which takes minutes for all."""
    whole = selftest.checks
    left_out = {f"all weights {block.name}" for block in BLOCKS.values()} - {"all weights Q4_K", "all weights Q6_K"}
    selftest.checks = lambda device, files: [check for check in whole(device, files) if check[0] not in left_out]
    selftest.N_REPEATED = 5


def plans(texts: list[str], repeat: int) -> Plans:
    """Of texts such as 512+1: tokens that are read and written."""
    return [bench.Plan(*map(int, text.split("+")), repeat, (0,)) for text in texts]


def measure(path: str, device: str, vram: int, wanted: Plans) -> int:
    n_ctx = max(plan.n_prefill + plan.n_decode for plan in wanted)
    begun = time.monotonic()
    engine = options.EngineOptions(path, load="map", device=device, vram=vram or None, silence=True)
    with loading.open_model(engine, render.StatusLine(True), n_tokens=n_ctx) as model:
        stats = model.engine.stats()
        print(f"opened in {time.monotonic() - begun:.1f} s{f', {card.line(stats)}' if model.engine.on_gpu else ''}")
        if stats.note:
            print(stats.note)
        about = bench.about(model, path)
        with model.session(n_ctx) as session, interruptible() as stop:
            for i, plan in enumerate(wanted):
                limits: list[ms4.Limits] = []
                rows = bench.measure_depth(plan, 0, model, session, limits, stop)
                rows = [row for row in rows if row.n_tokens > 1]
                text = bench.table(about, rows, bench.combined(limits, statistics.median))
                print("".join(text.splitlines(keepends=True)[0 if i == 0 else -len(rows) :]), end="", flush=True)
        stats = model.engine.stats()
        if model.engine.on_gpu:
            print(f"at the end: {card.line(stats)}")
        left = stats.device == "cpu" and device != "cpu"
    return int(left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("facts")
    commands.add_parser("room")
    of_selftest = commands.add_parser("selftest")
    of_selftest.add_argument("--safe", action="store_true")
    of_selftest.add_argument("--few", action="store_true", help="of block types and repetitions")
    of_bench = commands.add_parser("bench")
    of_bench.add_argument("file")
    of_bench.add_argument("plans", nargs="+", metavar="READ+WRITTEN")
    of_bench.add_argument("--device", default="cuda")
    of_bench.add_argument("--vram", type=options.size, default=0)
    of_bench.add_argument("--repeat", type=int, default=2)
    a = parser.parse_args()
    try:
        if a.command == "facts":
            return facts()
        if a.command == "room":
            print(ms4.allowed().room or 0)
            return 0
        if a.command == "selftest":
            if a.few:
                few_checks()
            return selftest.selftest(a.safe)
        return measure(a.file, a.device, a.vram, plans(a.plans, a.repeat))
    except Exception as error:
        code, message, hint = errors.describe(error)
        print(f"error: {message}{f'; {hint}' if hint else ''}")
        if os.environ.get("MS4_DEBUG"):
            raise
        return code


if __name__ == "__main__":
    sys.exit(main())

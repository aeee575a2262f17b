"""Whole models on the emulated card: the CPU's bits, wherever experts lie and however little memory there is.

    python tests/cuda/models.py [--jobs N] [--ptx] [--all]

A run is the demonstration checkpoint reading an image and a prompt, writing some tokens, two sessions in one step, one
of them saved and loaded into the other, steps that give the highest logits alone: every logit and id, the tower's rows
and the saved bytes go into one hash.  It is made for each placement of experts (as the engine places them by use, half
of them kept from the card, all of them), each limit of VRAM and each kernel table that this CPU has, with the kernels
as g++ compiles them and (--ptx) as nvcc does, these beside the best kernel table alone.  Then a few small checkpoints,
whose hashes stand in tests/data/logits.sha256.  --all: every one of them, and nvcc's kernels beside every table.  Exits
1 if a hash is another, or if a run did not do what it is there for: experts computed on the card, or none; experts that
moved.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo"
LIMIT = 600  # seconds of one process
DRIVERS = {"g++": "libcuda_emu.so", "PTX": "libcuda_emu_ptx.so"}
PLACES = ("by use", "half", "none")
VRAM = {"1 GiB": 0, "24 MiB": 24 << 20, "18 MiB": 18 << 20}  # all that the emulated card has; 0.1 of the experts; fewer
TABLES = ("avx512", "avxvnni", "avx2")
# Shapes and families of block types; an image; several sessions.  Of more memory than they need: all experts fit.
FEW = (
    "fused, Q8_0",
    "dense layer, tied output, F32",
    "split, Q8_0",
    "all Q4_K",
    "all IQ4_XS",
    "all NVFP4",
    "bravo image",
)


# --- in a process of its own: the driver is that process's for good


def everything(model: Any, vision: Any) -> str:
    """The hash of all that a session can do."""
    import numpy as np

    import ms4

    out, random = hashlib.sha256(), np.random.default_rng(3)
    rows = vision.encode(random.normal(size=(3, 56, 84)).astype(np.float32))
    ids = random.integers(5, 900, 60)
    ids[4 : 4 + len(rows)] = ms4.ROW
    with model.session(256) as one, model.session(256) as two, tempfile.TemporaryFile() as file:
        parts = [rows, one.feed(ids[:24], rows, all_logits=True)]
        for _ in range(8):
            parts.append(one.feed([int(np.argmax(parts[-1][-1] if parts[-1].ndim > 1 else parts[-1]))]))
        spans = [ms4.Span(one, ids[24:26], n_logits=2), ms4.Span(two, ids[26:40])]
        parts += [*model.engine.step(spans), *model.engine.step([ms4.Span(s, ids[40:41]) for s in (two, one)])]
        one.save(file.fileno())
        file.seek(0)
        out.update(file.read())
        file.seek(0)
        two.load(file.fileno())
        parts.append(two.feed(ids[41:44]))
        few = [ms4.Span(two, ids[44:45], n_highest=1, n_among=1200), ms4.Span(one, ids[44:46], None, 2, None, 40, 1200)]
        for found in model.engine.step(few):
            parts += [found.logits, found.ids]
        (found,) = model.engine.step([ms4.Span(one, ids[46:47], n_highest=40, n_among=1200)])
        parts += [found.logits, found.ids]
    for part in parts:
        out.update(np.ascontiguousarray(part).tobytes())
    return out.hexdigest()


def of_demo(device: str, vram: int) -> Iterator[dict[str, Any]]:
    """What came of each placement; on the CPU of one."""
    import numpy as np

    from ms4.models.model import Model
    from ms4.models.pixtral import Tower

    tower = Tower.read(DEMO / "ms4-demo-mmproj.gguf")
    with Model.open(DEMO / "ms4-demo.gguf", device=device, vram=vram) as model:
        vision, before = model.engine.vision(tower.shape, tower.tensors, tower.path), model.engine.stats()
        shape = (model.shape.n_layer, model.shape.n_expert)
        halves = np.random.default_rng(5).integers(0, 2, shape)
        places = {"by use": None, "half": halves, "none": np.ones(shape)}
        for name in PLACES if device != "cpu" else PLACES[:1]:
            place = places[name]
            model.engine.place_experts(None if place is None else place.astype(np.uint8))
            found, now = everything(model, vision), model.engine.stats()
            used = now.experts_used - before.experts_used
            yield {
                "place": name,
                "hash": found,
                "isa": now.isa,
                "slots": now.vram_slots,
                "experts": now.experts,
                "share": (now.pairs_on_gpu - before.pairs_on_gpu) / used,
                "moved": now.uploads - before.uploads,
                "tower": vision.on_gpu,
            }
            before = now


def of_hash(name: str, device: str) -> Iterator[dict[str, Any]]:
    """A checkpoint of test_hashes.py."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_hashes

    from ms4.models.model import Model

    opened, plain = [], Model.open.__func__  # type: ignore[attr-defined]

    def there(cls: type, path: str, **how: Any) -> Model:
        opened.append(plain(cls, path, **{"device": device, **how}))
        return opened[-1]

    Model.open = classmethod(there)  # type: ignore[assignment, method-assign]
    found = dict(test_hashes.measure())[name]()
    yield {"place": name, "hash": found, "wanted": test_hashes.stored()[name], "opened": len(opened)}


# --- the table


def child(driver: str, table: str, what: list[object]) -> list[dict[str, Any]]:
    """What one process said; a row with `failed` if it failed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MS4_EMU")}
    environment |= {"MS4_LIBCUDA": str(ROOT / "build/cuda" / DRIVERS[driver]), "MS4_GPU_CODE": __file__}
    environment |= {"MS4_ISA": table} if table else {}
    command = [sys.executable, __file__, "--one", *map(str, what)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return [{"failed": f"does not end in {LIMIT} s"}]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        found.append({"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:200]})
    return found


def tables() -> list[str]:
    """The kernel tables that run here."""
    code = "import ms4; print(ms4.probe().isa)"
    found = []
    for table in TABLES:
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "MS4_ISA": table})
        if done.stdout.strip() == table:
            found.append(table)
    return found


def faults_of(rows: list[dict[str, Any]], want: str, limited: bool) -> list[str]:
    """What a process did that it should not, or did not and should."""
    faults = []
    for row in rows:
        if "failed" in row:
            faults.append(row["failed"])
            continue
        share, place = row["share"], row["place"]
        if row["hash"] != want:
            faults.append(f"{place}: {row['hash'][:12]} is not the CPU's {want[:12]}")
        if (share == 0) != (place == "none") or (place == "by use" and not limited and share != 1):
            faults.append(f"{place}: {share:.0%} of the experts' work was on the card")
        if limited != (row["slots"] < row["experts"]) or limited == row["tower"]:
            faults.append(f"{row['slots']} of {row['experts']} experts have a slot, tower on the card: {row['tower']}")
        if limited and place == "by use" and not row["moved"]:
            faults.append("no expert moved")
    if [row.get("place") for row in rows] != list(PLACES):
        faults.append("not all placements were run")
    return faults


def demonstration(drivers: list[str], all_of_them: bool, pool: ThreadPoolExecutor) -> tuple[int, int, list[str]]:
    """Prints the table; runs, runs with the CPU's hash, and faults."""
    here = tables()
    of_cpu = pool.map(lambda table: child("g++", table, ["demo", "cpu", 0])[0], here)
    want = {table: row.get("hash", "?") for table, row in zip(here, of_cpu, strict=True)}
    faults = [] if len(set(want.values())) == 1 else [f"kernel tables differ: {want}"]
    beside = {driver: here if driver == "g++" or all_of_them else here[:1] for driver in drivers}
    keys = [(driver, table, vram) for driver in drivers for vram in VRAM for table in beside[driver]]
    ran = pool.map(lambda key: child(key[0], key[1], ["demo", "cuda", VRAM[key[2]]]), keys)
    print(f"  the CPU's hash: {want[here[0]][:16]} ({', '.join(here)})")
    print("  kernels by  CPU      VRAM    experts in slots  tower   " + "".join(f"{p:>14}" for p in PLACES))
    n = same = 0
    for (driver, table, vram), rows in zip(keys, ran, strict=True):
        n += len(PLACES)
        hashes = {row.get("place"): row.get("hash") for row in rows}
        good = [hashes.get(place) == want[table] for place in PLACES]
        same += sum(good)
        cells = [f"{'equal' if g else 'OTHER'}, {r.get('share', 0):4.0%}" for g, r in zip(good, rows, strict=False)]
        first = f"{rows[0].get('slots')} of {rows[0].get('experts')}", "card" if rows[0].get("tower") else "CPU"
        line = f"  {driver:10}  {table:7}  {vram:7} {first[0]:>16}  {first[1]:6}  "
        print(line + "".join(f"{c:>14}" for c in cells), flush=True)
        faults += [f"{driver}, {table}, {vram}: {fault}" for fault in faults_of(rows, want[table], VRAM[vram] > 0)]
    print("  equal: to the CPU's hash; the share of the experts' work that the card did")
    return n, same, faults


def stored(drivers: list[str], all_of_them: bool, pool: ThreadPoolExecutor) -> tuple[int, int, list[str]]:
    """Small checkpoints with all experts on the card; as above."""
    sums = (ROOT / "tests" / "data" / "logits.sha256").read_text().splitlines()
    names = [line.split("  ", 1)[1] for line in sums]
    unknown = set(FEW) - set(names)
    if unknown:
        sys.exit(f"models: logits.sha256 has no {unknown} any more: mend the list")
    chosen = names if all_of_them else list(FEW)
    keys = [(driver, name) for driver in drivers for name in chosen]
    ran = pool.map(lambda key: child(key[0], "", ["hash", "cuda", key[1]])[-1], keys)
    faults = []
    for (driver, name), row in zip(keys, ran, strict=True):
        if row.get("failed") or row["hash"] != row["wanted"] or not row["opened"]:
            faults.append(f"{driver}, {name}: {row.get('failed', 'another hash than that of logits.sha256')}")
    print(f"  {len(chosen)} of {len(names)} small checkpoints, by {' and '.join(drivers)}: {'; '.join(chosen)}")
    return len(keys), len(keys) - len(faults), faults


def main() -> int:
    parser = argparse.ArgumentParser(description="whole models on the emulated card")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--ptx", action="store_true", help="the kernels as nvcc compiles them, too")
    parser.add_argument("--all", action="store_true", help="every checkpoint of logits.sha256")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, device, which = options.one
        for row in of_demo(device, int(which)) if what == "demo" else of_hash(which, device):
            print(json.dumps(row), flush=True)
        return 0
    drivers = list(DRIVERS) if options.ptx else ["g++"]
    with ThreadPoolExecutor(options.jobs) as pool:
        n, same, faults = demonstration(drivers, options.all, pool)
        n_more, same_more, faults_more = stored(drivers, options.all, pool)
    print(
        f"whole models: {same + same_more} of {n + n_more} hashes equal to the CPU's ({n}: {len(PLACES)} placements x "
        f"{len(VRAM)} limits of VRAM x kernel tables and compilers, images included; {n_more}: small checkpoints)"
    )
    for fault in faults + faults_more:
        print("  FAULT:", fault)
    return 1 if faults or faults_more else 0


if __name__ == "__main__":
    sys.exit(main())

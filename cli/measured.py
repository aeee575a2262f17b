"""What was measured before: the rates of this machine, and how far predictions were from runs.

`machine.json` in the cache folder holds rates, by processor, kernels, threads and the types of a model; those of disks,
by file system and model file: the slices of a calibration, and what the last runs got.  `predictions.json` in the state
folder holds, by model file and place of its weights, what runs made of predictions.  Both hold numbers and lists of
numbers only.  What cannot be read there counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import ms4
from ms4.cli import host, state
from ms4.models import places

if TYPE_CHECKING:
    from ms4.models.calibration import Rates
    from ms4.models.clock import Machine
    from ms4.models.disk_rate import DiskRate, Samples

MOST_RATIO = 20.0  # beyond it, something else than the machine was measured
MOST_RATIOS = 5  # runs that are kept
FAR = 0.25  # a prediction that was off by more has to be named
LEAST_TOKENS, LEAST_PROMPT = 16, 64  # of a run that says something about speeds
LEAST_READ = 256 << 20  # bytes that a run must have read from a disk to say something about it

Row = dict[str, Any]  # of numbers and lists of numbers


def machine_path() -> Path:
    return places.ours("CACHE") / "machine.json"


def predictions_path() -> Path:
    return state.folder() / "predictions.json"


def read(path: Path) -> dict[str, Row]:
    """The groups of numbers in a file of ours; those that are none of ours are left out."""
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: row for key, row in found.items() if _is_good(row)} if isinstance(found, dict) else {}


def _is_good(row: Any) -> bool:
    return isinstance(row, dict) and all(
        all(map(_is_number, value)) if isinstance(value, list) else _is_number(value) for value in row.values()
    )


def _is_number(n: Any) -> bool:
    return isinstance(n, (int, float)) and math.isfinite(n) and n >= 0


def keep(path: Path, key: str, row: Row) -> None:
    state.keep(path, json.dumps(read(path) | {key: row}, indent=1).encode())


def rates_key(shape: ms4.Shape, tensors: Sequence[ms4.Tensor], threads: int) -> str:
    """The same for models whose rows and types are the same, on the same machine with as many threads."""
    machine = ms4.probe()
    rows = sorted({(t.role, t.type, *t.dims[:2]) for t in tensors if t.role not in ("token_embd", "output")})
    told = (host.processor(), machine.isa, threads or machine.n_threads, ms4.__version__, shape.n_expert_used, rows)
    return "rates " + hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def rates(key: str) -> Rates | None:
    """What was measured under this key."""
    from ms4.models.calibration import Rates

    row = read(machine_path()).get(key, {})
    return Rates(row["ram"], row["flops"]) if _has_rates(row) else None


def _has_rates(row: Row) -> bool:
    return all(row.get(name) and not _is_list(row[name]) for name in ("ram", "flops"))


def some_machine() -> Machine | None:
    """What is known of this machine with any model, for one whose header nobody has seen: the slowest of it."""
    from ms4.models.clock import DISK_ASSUMED, Machine

    rows = read(machine_path())
    rates = [row for key, row in rows.items() if key.startswith("rates ") and _has_rates(row)]
    disks = [
        rate.bytes_per_s for key, row in rows.items() if key.startswith("disk ") and (rate := _samples_in(row).rate)
    ]
    if not rates:
        return None
    disk = min(disks, default=DISK_ASSUMED)
    return Machine(None, min(r["ram"] for r in rates), min(r["flops"] for r in rates), disk)


def keep_rates(key: str, found: Rates) -> None:
    keep(machine_path(), key, asdict(found))


# --- disks
def disk_key(path: str | os.PathLike[str]) -> str:
    """Of a model file on its disk, or of a folder."""
    return f"disk {os.stat(path).st_dev} {_name(path)}"


def _name(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]


def samples(key: str) -> Samples:
    return _samples_in(read(machine_path()).get(key, {}))


def _samples_in(row: Row) -> Samples:
    from ms4.models.disk_rate import Samples

    lists = {
        name: tuple(filter(None, row[name]))
        for name in ("slices", "runs", "fresh", "filled")
        if _is_list(row.get(name))
    }
    return Samples(**lists, direct=bool(row.get("direct", 1)))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def disk(key: str) -> DiskRate | None:
    """What is known of the disk that this file is on: by this file, else by the others there."""
    from ms4.models.disk_rate import Samples

    if rate := samples(key).rate:
        return rate
    there = key.rsplit(" ", 1)[0] + " "
    others = [_samples_in(row) for other, row in read(machine_path()).items() if other.startswith(there)]
    joined = Samples(
        tuple(n for s in others for n in s.slices),
        tuple(n for s in others for n in s.runs),
        tuple(n for s in others for n in s.fresh),
        tuple(n for s in others for n in s.filled),
        all(s.direct for s in others),
    )
    return joined.rate


def keep_disk(key: str, found: Samples) -> None:
    """Keeps a calibration, in place of the last one; what runs got stays."""
    before = samples(key)
    fresh, filled = (*before.fresh, *found.fresh), (*before.filled, *found.filled)
    keep(machine_path(), key, asdict(replace(found, runs=before.runs, fresh=fresh, filled=filled).newest))


@dataclass(frozen=True)
class DiskUse:
    """Of a part of a run.  ns: while at least one read was under way; fresh: bytes into memory that was never used."""

    bytes: int = 0
    ns: int = 0
    fresh: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second; 0: too little was read to say."""
        return self.bytes / (1e-9 * self.ns) if self.bytes >= LEAST_READ and self.ns > 0 else 0.0


def learn_disk(key: str, wrote: DiskUse, came: DiskUse) -> None:
    """Keeps what a run got of the disk: while it wrote, and before, when its places were filled for the first time."""
    before = samples(key)
    now = replace(before, runs=(*before.runs, wrote.rate)) if wrote.rate else before
    known = wrote.rate or (rate.bytes_per_s if (rate := before.rate) else 0.0)
    if known and came.fresh >= LEAST_READ:
        spent = 1e-9 * came.ns - (came.bytes - came.fresh) / known
        fresh = min(known, came.fresh / spent) if spent > 0 else known
        now = replace(now, fresh=(*now.fresh, fresh), filled=(*now.filled, float(came.fresh)))
    if now != before:
        keep(machine_path(), key, asdict(now.newest))


# --- predictions and runs
def run_key(path: str, load: str) -> str:
    """Of a model file and where its weights are: in memory, or partly on the disk."""
    return f"{_name(path)} {'stream' if load == 'stream' else 'memory'}"


@dataclass(frozen=True)
class Ratio:
    """How many times faster than predicted earlier runs were: the median, and the ends.  1: none is known."""

    usual: float = 1.0
    low: float = 1.0
    high: float = 1.0


@dataclass(frozen=True)
class Ratios:
    decode: Ratio = Ratio()
    prefill: Ratio = Ratio()

    @property
    def known(self) -> bool:
        return self != Ratios()


def ratios(key: str) -> Ratios:
    row = read(predictions_path()).get(key, {})
    return Ratios(*(_ratio(row.get(name)) for name in ("decode", "prefill")))


def _ratio(kept: Any) -> Ratio:
    found = [n for n in kept if 1 / MOST_RATIO <= n <= MOST_RATIO] if _is_list(kept) else []
    return Ratio(median(found), min(found), max(found)) if found else Ratio()


def learn(key: str, what: str, ratio: float) -> None:
    """Keeps what a run made of a prediction that knew of no earlier run.  what: "decode" or "prefill"."""
    if not 1 / MOST_RATIO <= ratio <= MOST_RATIO:
        return
    row = read(predictions_path()).get(key, {})
    before = row[what] if _is_list(row.get(what)) else []
    keep(predictions_path(), key, row | {what: [*before, ratio][-MOST_RATIOS:]})

"""What was measured before: the rates of this machine, and how far predictions were from runs.

`machine.json` in the cache folder holds rates, by processor, kernels, threads and the types of a model; those of disks,
by file system.  `predictions.json` in the state folder holds, by model file and place of its weights, what runs made of
predictions.  Both hold numbers only.  What cannot be read there counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ms4
from ms4.cli import host, state
from ms4.models import places

if TYPE_CHECKING:
    from ms4.models.calibration import DiskRate, Rates
    from ms4.models.clock import Machine

MOST_RATIO = 20.0  # beyond it, something else than the machine was measured
NEWEST = 0.5  # the weight of the last run among all
FAR = 0.25  # a prediction that was off by more has to be named
LEAST_TOKENS, LEAST_PROMPT = 8, 64  # of a run that says something about speeds


def machine_path() -> Path:
    return places.ours("CACHE") / "machine.json"


def predictions_path() -> Path:
    return state.folder() / "predictions.json"


def read(path: Path) -> dict[str, dict[str, float]]:
    """The groups of numbers in a file of ours; those that are none of ours are left out."""
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: row for key, row in found.items() if _is_good(row)} if isinstance(found, dict) else {}


def _is_good(row: Any) -> bool:
    return isinstance(row, dict) and all(
        isinstance(n, (int, float)) and math.isfinite(n) and n >= 0 for n in row.values()
    )


def keep(path: Path, key: str, row: dict[str, float]) -> None:
    state.keep(path, json.dumps(read(path) | {key: row}, indent=1).encode())


def rates_key(shape: ms4.Shape, tensors: Sequence[ms4.Tensor], threads: int) -> str:
    """The same for models whose rows and types are the same, on the same machine with as many threads."""
    machine = ms4.probe()
    rows = sorted({(t.role, t.type, *t.dims[:2]) for t in tensors if t.role not in ("token_embd", "output")})
    told = (host.processor(), machine.isa, threads or machine.n_threads, ms4.__version__, shape.n_expert_used, rows)
    return "rates " + hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def disk_key(path: str | os.PathLike[str]) -> str:
    return f"disk {os.stat(path).st_dev}"


def rates(key: str) -> Rates | None:
    """What was measured under this key."""
    from ms4.models.calibration import Rates

    row = read(machine_path()).get(key, {})
    return Rates(row["ram"], row["flops"]) if row.get("ram") and row.get("flops") else None


def disk(key: str) -> DiskRate | None:
    from ms4.models.calibration import DiskRate

    row = read(machine_path()).get(key, {})
    return DiskRate(row["bytes_per_s"], bool(row.get("direct"))) if row.get("bytes_per_s") else None


def some_machine() -> Machine | None:
    """What is known of this machine with any model, for one whose header nobody has seen: the slowest of it."""
    from ms4.models.clock import GB, Machine

    rows = read(machine_path())
    rates = [row for key, row in rows.items() if key.startswith("rates ") and row.get("ram") and row.get("flops")]
    disks = [row["bytes_per_s"] for key, row in rows.items() if key.startswith("disk ") and row.get("bytes_per_s")]
    if not rates:
        return None
    return Machine(None, min(r["ram"] for r in rates), min(r["flops"] for r in rates), min(disks, default=2 * GB))


def keep_rates(key: str, found: Rates | DiskRate) -> None:
    keep(machine_path(), key, asdict(found))


# --- predictions and runs
def run_key(path: str, load: str) -> str:
    """Of a model file and where its weights are: in memory, or partly on the disk."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    return f"{name} {'stream' if load == 'stream' else 'memory'}"


def ratios(key: str) -> tuple[float, float]:
    """How many times faster than predicted earlier runs were: decode, prefill.  1: none is known."""
    row = read(predictions_path()).get(key, {})
    return tuple(row.get(name) or 1.0 for name in ("decode", "prefill"))  # type: ignore[return-value]


def learn(key: str, decode: float | None, prefill: float | None) -> None:
    """Keeps what a run made of a prediction that knew of no earlier run; None: it says nothing about that."""
    row = read(predictions_path()).get(key, {})
    for name, ratio in (("decode", decode), ("prefill", prefill)):
        if ratio is not None and 1 / MOST_RATIO <= ratio <= MOST_RATIO:
            before = row.get(name)
            row[name] = before ** (1 - NEWEST) * ratio**NEWEST if before else ratio
    if row:
        keep(predictions_path(), key, row)

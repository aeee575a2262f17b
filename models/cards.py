"""Cards and memories that are not here, as data sheets and others' measurements have them: models/cards.toml.

cards.find("rtx4070tisuper")       # ("4070 Ti SUPER", Card(...)); UnknownError names what is near
cards.of_driver("NVIDIA GeForce RTX 4090", 24 * GIB)
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
GIB = 1 << 30
OF_PEAK = 0.35  # of the tensor cores' int8 peak, in prompts: assumed
N_NEAR = 4
# What names are written with and without: the maker, the family, blanks.
_LEFT_OUT = re.compile(r"nvidia|geforce|rtx|generation|blackwell|workstation|server|edition|gpu|[^a-z0-9]")
_SIZE = re.compile(r" \d+GB$")


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet, and prompts' products per second (assumed: OF_PEAK of the int8 tensor peak)."""

    vram: float
    peak: float  # of VRAM
    flops: float
    bus: float  # what pinned copies reach at its usual link
    source: str = ""
    date: str = ""

    @property
    def reads(self) -> float:
        """Of decode kernels.  0.65 of the peak: published ones reach 0.60 to 0.68 on a 3090 at this shape."""
        return 0.65 * self.peak


@dataclass(frozen=True)
class Memory:
    """rate: bytes per second that expert kernels on all cores read."""

    rate: float
    source: str
    date: str


class UnknownError(ValueError):
    """No row has this name; `near`: those that are like it."""

    def __init__(self, name: str, near: list[str]) -> None:
        super().__init__(f"{name[:60]!r} is not in the table")
        self.near = near


@cache
def table() -> dict[str, Any]:
    """The data file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((Path(__file__).parent / "cards.toml").read_text("utf-8"))


@cache
def buses() -> dict[str, float]:
    return {name: 1e9 * rate for name, rate in table()["bus"].items()}


@cache
def cards() -> dict[str, Card]:
    return {
        name: Card(
            row["vram_gib"] * GIB,
            1e9 * row["gb_per_s"],
            OF_PEAK * 1e12 * row["int8_tops"],
            buses()[row["bus"]],
            row["source"],
            row["date"],
        )
        for name, row in table()["card"].items()
    }


@cache
def memories() -> dict[str, Memory]:
    return {name: Memory(1e9 * row["gb_per_s"], row["source"], row["date"]) for name, row in table()["memory"].items()}


def plain(name: str) -> str:
    """A name as it is compared: 4070tisuper."""
    return _LEFT_OUT.sub("", name.lower())


def find(name: str) -> tuple[str, Card]:
    """(its name here, the card).  UnknownError."""
    return _find(name, cards())


def find_memory(name: str) -> tuple[str, Memory]:
    """(its name here, the memory).  UnknownError."""
    return _find(name, memories())


def _find(name: str, rows: Mapping[str, T]) -> tuple[str, T]:
    known = {plain(key): key for key in rows}
    if plain(name) not in known:
        raise UnknownError(name, near(plain(name), known))
    key = known[plain(name)]
    return key, rows[key]


def near(name: str, known: dict[str, str]) -> list[str]:
    """The names that begin alike, then those that are spelled alike."""
    begun = [key for key in known if name and (key.startswith(name) or name.startswith(key))]
    alike = difflib.get_close_matches(name, known, N_NEAR, 0.6)
    return [known[key] for key in dict.fromkeys([*begun, *alike])][:N_NEAR]


def of_driver(name: str, vram: float) -> tuple[str, Card] | None:
    """The row of a card that the driver names so; of several that differ in their memory, the nearest."""
    rows = []
    for key, card in cards().items():
        written = (key, _SIZE.sub("", key), *table()["card"][key].get("driver", ()))
        if plain(name) in map(plain, written):
            rows.append((key, card))
    return min(rows, key=lambda row: abs(row[1].vram - vram), default=None)

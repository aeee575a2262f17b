"""What ms4 remembers between calls: the folder for it, and what was said today."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from pathlib import Path

from ms4.models import atomic, places


def folder() -> Path:
    return places.ours("STATE")


def first_today(name: str) -> bool:
    """True once a day for each terminal (and once where stderr is none); always, if nothing can be remembered.

    The file holds the day, then the terminals.
    """
    path, day, where = folder() / name, time.strftime("%Y-%m-%d"), terminal()
    try:
        said = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        said = []
    if said[:1] != [day]:
        said = [day]
    if where in said[1:]:
        return False
    keep(path, "".join(f"{line}\n" for line in [*said, where]).encode())
    return True


def uses_path(model: str) -> Path:
    """Where it is kept which experts of a model file were used."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(model))).hexdigest()[:16]
    return folder() / "uses" / name


def keep(path: Path, data: bytes) -> None:
    """Writes a file of ours, whole or not at all; where that is not possible, nothing is remembered."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic.replacing(path) as file:
            file.write(data)


def terminal() -> str:
    """The terminal that stderr is, as a line of text."""
    try:
        return os.ttyname(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return "none"

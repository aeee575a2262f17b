"""How far a model is from another one: their distributions at the same tokens, of which one was written to a file.

Owns the file of --write-ref and --ref: a line of JSON that says of what, then the logits of all judged positions,
float32, positions by vocabulary.  Rows are compared in float64, a few at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from ms4.cli import render
from ms4.cli.errors import CliError, UnreadableError, UsageError
from ms4.models.sampling import log_probabilities
from ms4.models.untrusted import shown

KIND, FORMAT = "ms4 reference", 1
MOST_HEADER = 4096  # bytes of its line


@dataclass(frozen=True)
class Divergence:
    """Of all judged tokens."""

    mean: float  # of KL(reference, here), in nats
    error: float  # its standard error
    most: float
    same: float  # the share of them at which both find the same token likeliest


def header_of(ids: Sequence[int], n_ctx: int, n_rows: int, n_vocab: int) -> dict[str, Any]:
    """What a file is about.  ids: of all segments, one behind the other."""
    digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()
    return {"kind": KIND, "format": FORMAT, "ctx": n_ctx, "rows": n_rows, "vocab": n_vocab, "ids": digest}


class Writer:
    """Writes the rows as they come; what is not whole is not kept.  A context manager."""

    def __init__(self, path: str, header: dict[str, Any]) -> None:
        size = 4 * header["rows"] * header["vocab"]
        folder = os.path.dirname(os.path.abspath(path))
        try:
            free = os.statvfs(folder)
            if size > free.f_bavail * free.f_frsize:
                room = render.gigabytes(free.f_bavail * free.f_frsize)
                raise CliError(
                    f"{shown(path)} will take {render.gigabytes(size)}, and {room} are free", "a smaller --segments"
                )
            self._file = open(path, "xb")
        except FileExistsError:
            raise UsageError(f"{shown(path)} is there already", "another name") from None
        except OSError as error:
            raise CliError(f"{shown(path)}: {error.strerror}") from None
        self._path, self._left = path, header["rows"]
        self._file.write(json.dumps(header).encode() + b"\n")

    def add(self, rows: np.ndarray) -> None:
        try:
            self._file.write(np.ascontiguousarray(rows, "<f4").data)
        except OSError as error:
            raise CliError(f"{shown(self._path)}: {error.strerror}") from None
        self._left -= len(rows)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._left:
            os.unlink(self._path)


class Reference:
    """Reads such a file.  UnreadableError: it is none, is cut, or is about something else than `header`."""

    def __init__(self, path: str, header: dict[str, Any]) -> None:
        name = shown(path)
        try:
            with open(path, "rb") as file:
                line = file.readline(MOST_HEADER)
                found = json.loads(line)
        except OSError as error:
            raise UnreadableError(f"{name}: {error.strerror}") from None
        except ValueError:
            found = None
        if not isinstance(found, dict) or (found.get("kind"), found.get("format")) != (KIND, FORMAT):
            raise UnreadableError(f"{name} is no file of --write-ref")
        other = [key for key in ("ctx", "rows", "vocab", "ids") if found.get(key) != header[key]]
        if other:
            what = {"ctx": "another --ctx", "rows": "other --segments", "vocab": "another vocabulary"}
            said = what.get(other[0], "another text")
            raise UnreadableError(f"{name} was made with {said}", "the same text, --ctx and --segments")
        if os.path.getsize(path) != len(line) + 4 * header["rows"] * header["vocab"]:
            raise UnreadableError(f"{name} is cut")
        self._rows = np.memmap(path, "<f4", "r", len(line), (header["rows"], header["vocab"]))
        self._at = 0
        self._found: list[tuple[float, bool]] = []

    def compare(self, rows: np.ndarray) -> None:
        """The next rows, as they are here."""
        for here in rows:
            there = self._rows[self._at]
            self._at += 1
            p, q = log_probabilities(there), log_probabilities(here)
            weights = np.exp(p)
            likely = weights > 0  # what is impossible there counts nothing, also where it is impossible here
            kl = float(np.sum(weights[likely] * (p[likely] - q[likely])))
            self._found.append((max(kl, 0.0), int(there.argmax()) == int(here.argmax())))

    def result(self) -> Divergence:
        values = np.array([kl for kl, _ in self._found])
        error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("inf")
        same = sum(same for _, same in self._found) / len(values)
        return Divergence(float(values.mean()), error, float(values.max()), same)

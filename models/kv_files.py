"""kv caches kept on disk, so that nothing is read twice: found again by the tokens that they hold.

A file holds what a timeline held: its keys (`Prompt.keys`), and behind them the blocks as `Session.save` writes them.

    "ms4kv1\\n\\0" | n as 8 bytes | SHA-256 of the keys | n keys of 8 bytes | blocks, which know their model

Its name begins with the model's, so other models' files are not opened.  They are written under another name and
renamed, so a file is whole or not there; the oldest leave when all of them take more than the limit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ms4
from ms4.models import atomic, places
from ms4.models.timeline import Timeline, common_prefix

MAGIC = b"ms4kv1\n\0"
HEADER = struct.Struct("<8sQ32s")
MOST_KEYS = 1 << 24
WORTH = 16  # positions: fewer are computed in a second, even where experts come from the disk
LIMIT = 20 << 30  # bytes of all files
SPARE = 2 << 30  # bytes that stay free on the disk
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# kv caches of ms4; they may be deleted.\n"


def folder() -> Path:
    return places.ours("CACHE") / "kv"


@dataclass(frozen=True)
class KvFiles:
    """The kept caches of one model; `model` stands for its file, and for all else that their numbers depend on."""

    model: str
    where: Path
    limit: int = LIMIT

    @classmethod
    def of(cls, model: str | os.PathLike[str], *more: object, where: Path | None = None, limit: int = LIMIT) -> KvFiles:
        """more: options that change what is computed, such as another vision tower."""
        status = os.stat(model)
        about = repr((ms4.__version__, os.path.realpath(model), status.st_size, status.st_mtime_ns, *more))
        name = hashlib.sha256(os.fsencode(about)).hexdigest()[:16]
        return cls(name, where or folder(), limit)

    # --- finding

    def restore(self, timeline: Timeline, keys: np.ndarray) -> int:
        """Lets an empty timeline hold what is kept of a prompt's keys; returns how much.

        What cannot be used is removed, and counts as nothing kept.
        """
        path, n = self._longest(keys)
        if path is None or n < max(WORTH, timeline.length):
            return 0
        try:
            with open(path, "rb") as file:
                kept = self._keys(file.read(HEADER.size), file)
                if kept is None or len(kept) > timeline.n_ctx:
                    return 0
                timeline.rewind(0)
                with open(os.dup(file.fileno()), "rb", buffering=0) as blocks:
                    blocks.seek(HEADER.size + kept.nbytes)
                    timeline.session.load(blocks.fileno())
        except ms4.DeviceError:  # the file may well be good: the next step says what is wrong with the GPU
            timeline.session.rewind(0)
            return 0
        except (OSError, ms4.EngineError):
            if timeline.session.length:
                timeline.session.rewind(0)
            with contextlib.suppress(OSError):
                path.unlink()
            return 0
        timeline.append(kept)
        timeline.rewind(n)
        with contextlib.suppress(OSError):
            os.utime(path)
        return n

    def _longest(self, keys: np.ndarray) -> tuple[Path | None, int]:
        """The file that begins most like these keys."""
        best: Path | None = None
        most = 0
        for path in self._files():
            kept = self._read_keys(path, len(keys))
            n = 0 if kept is None else common_prefix(kept, keys)
            if n > most:
                best, most = path, n
        return best, most

    def _files(self) -> list[Path]:
        try:
            return sorted(self.where.glob(f"{self.model}-*.kv"))
        except OSError:
            return []

    def _read_keys(self, path: Path, most: int) -> np.ndarray | None:
        """The first `most` keys of a file."""
        try:
            with open(path, "rb") as file:
                magic, n, _ = HEADER.unpack(file.read(HEADER.size))
                if magic != MAGIC or n > MOST_KEYS:
                    return None
                return np.frombuffer(file.read(8 * min(n, most)), "<i8")
        except (OSError, struct.error, ValueError):
            return None

    def _keys(self, head: bytes, file: object) -> np.ndarray | None:
        """All keys of an open file behind its head, if their checksum is right."""
        magic, n, digest = HEADER.unpack(head)
        if magic != MAGIC or n > MOST_KEYS:
            return None
        data = file.read(8 * n)  # type: ignore[attr-defined]
        if len(data) != 8 * n or hashlib.sha256(data).digest() != digest:
            return None
        return np.frombuffer(data, "<i8").astype(np.int64)

    # --- keeping

    def keep(self, timeline: Timeline) -> str:
        """Writes what a timeline holds, if it is worth it; returns why that was not possible, or "".

        Files that hold a beginning of it alone are not needed any more.
        """
        if timeline.length < WORTH:
            return ""
        keys = timeline.keys.astype("<i8")
        path, n = self._longest(keys)
        if path is not None and n == len(keys):
            with contextlib.suppress(OSError):
                os.utime(path)
            return ""
        data = keys.tobytes()
        digest = hashlib.sha256(data).digest()
        target = self.where / f"{self.model}-{digest.hex()[:24]}.kv"
        try:
            self._make_folder()
            with atomic.replacing(target, 0o600) as file:
                file.write(HEADER.pack(MAGIC, len(keys), digest) + data)
                file.flush()
                timeline.session.save(file.fileno())
                if shutil.disk_usage(self.where).free < SPARE:
                    raise OSError(errno.ENOSPC, "less than 2 GiB would stay free on the disk")
        except (OSError, ms4.EngineError) as error:
            return str(getattr(error, "strerror", None) or error)
        for old in self._files():
            kept = None if old == target else self._read_keys(old, len(keys) + 1)
            if kept is not None and len(kept) <= len(keys) and common_prefix(kept, keys) == len(kept):
                with contextlib.suppress(OSError):
                    old.unlink()
        self._shrink(target)
        return ""

    def _make_folder(self) -> None:
        self.where.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            with open(self.where / "CACHEDIR.TAG", "x") as tag:
                tag.write(TAG)
        for left in self.where.glob("*.new"):  # of a process that was killed
            if not os.path.exists(f"/proc/{left.suffixes[-2][1:]}"):
                with contextlib.suppress(OSError):
                    left.unlink()

    def _shrink(self, newest: Path) -> None:
        """The oldest files leave, of whatever model, until all fit the limit."""
        files = []
        for path in self.where.glob("*.kv"):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((path == newest, status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, _, size, _ in files)
        for _, _, size, path in sorted(files):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size


def kept_bytes(where: Path | None = None) -> Iterator[tuple[Path, int]]:
    """Every kept cache and its size."""
    for path in sorted((where or folder()).glob("*.kv")):
        with contextlib.suppress(OSError):
            yield path, path.stat().st_size

"""A file that is not whole yet: its bytes, and beside it a journal of those that are there.

    SHA256.ms4.incomplete    the bytes, each where it belongs
    SHA256.ms4.journal       one line of JSON (what file it is), then records of 20 bytes: offset, length, CRC-32 of the
                             bytes, CRC-32 of the record

A record is written after its bytes, so what is in the journal survives the end of the process at any moment.  It may
not survive that of the machine, which is why nobody believes a record before its CRC has been compared with the bytes
(`ms4.models.download` does, on its way to the SHA-256).  A record of length 0 takes back the one at its offset.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms4.models import atomic

INCOMPLETE, JOURNAL = ".ms4.incomplete", ".ms4.journal"
LEAST_UNIT, MOST_UNIT = 64 << 10, 4 << 20  # bytes of a record
MOST_SPAN = 64 << 20  # bytes of one request
_RECORD = struct.Struct("<QIII")
_BEFORE_CRC = struct.Struct("<QII")
MOST_HEAD = 65_536
SLOW = 5.0  # seconds that a task has to go on for others to help


class Closed(Exception):
    """The part was closed while another thread worked with it."""


@dataclass(frozen=True)
class Record:
    """Bytes that were written, and their CRC-32."""

    offset: int
    bytes: int
    crc: int

    @property
    def end(self) -> int:
        return self.offset + self.bytes


def read_journal(path: Path) -> tuple[dict[str, Any], dict[int, Record], int]:
    """What the journal says: its line, its records by offset, and how many of its bytes are good.

    An empty dictionary, if there is none or it is none of ours.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return {}, {}, 0
    line, newline, _ = data[:MOST_HEAD].partition(b"\n")
    try:
        head = json.loads(line) if newline else None
    except ValueError:
        head = None
    if not isinstance(head, dict):
        return {}, {}, 0
    records: dict[int, Record] = {}
    at = len(line) + 1
    while at + _RECORD.size <= len(data):
        offset, n, crc, check = _RECORD.unpack_from(data, at)
        if check != zlib.crc32(data[at : at + _BEFORE_CRC.size]):
            break  # torn: the process or the machine ended in the middle of it
        if n:
            records[offset] = Record(offset, n, crc)
        else:
            records.pop(offset, None)
        at += _RECORD.size
    return head, records, at


def packed(record: Record) -> bytes:
    """A record as it stands in a journal."""
    data = _BEFORE_CRC.pack(record.offset, record.bytes, record.crc)
    return data + struct.pack("<I", zlib.crc32(data))


def write_journal(path: Path, head: Mapping[str, Any], records: Iterable[Record]) -> None:
    """A journal of a file that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as file:
        file.write(json.dumps(head).encode() + b"\n" + b"".join(map(packed, records)))


def beginning(folder: Path, sha256: str, most: int) -> bytes:
    """The first bytes of a file that is here, or of which a part is; at most so many."""
    with suppress(OSError), open(folder / sha256, "rb") as whole:
        return whole.read(most)
    head, records, _ = read_journal(folder / (sha256 + JOURNAL))
    data = bytearray()
    with suppress(OSError), open(folder / (sha256 + INCOMPLETE), "rb") as file:
        while head.get("sha256") == sha256 and len(data) < most and (record := records.get(len(data))):
            piece = file.read(record.bytes)
            if len(piece) != record.bytes or zlib.crc32(piece) != record.crc:
                break
            data += piece
    return bytes(data)


@dataclass(eq=False)
class Task:
    """Bytes of a file that one thread fetches: `at` moves on with what it writes, `end` back if others help."""

    start: int
    end: int
    at: int
    begun: float  # time.monotonic

    def seconds_left(self, now: float) -> float:
        """At the speed so far."""
        done = self.at - self.start
        return (self.end - self.at) * (now - self.begun) / done if done else now - self.begun


class Part:
    """One such file, open.  Threads take tasks, write, and give back what they did not get."""

    def __init__(self, folder: Path, sha256: str, size: int, about: Mapping[str, Any]) -> None:
        """about: what else the first line of the journal says."""
        self.size = size
        self.unit = min(max(size // 2048, LEAST_UNIT), MOST_UNIT)
        self.path, self.journal = folder / (sha256 + INCOMPLETE), folder / (sha256 + JOURNAL)
        self.changed = threading.Condition()
        self._closed, self._n_busy = False, 0
        folder.mkdir(parents=True, exist_ok=True)
        head, records, n_good = read_journal(self.journal)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._about = {**about, "sha256": sha256, "size": size}
            ours = (head.get("sha256"), head.get("size")) == (sha256, size)
            self._log = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not ours:
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._log, 0)
                records, n_good = {}, os.write(self._log, json.dumps(self._about).encode() + b"\n")
            os.ftruncate(self._log, n_good)
            self._log_end = n_good
        except BaseException:
            os.close(self._fd)
            raise
        self._records = tiling(records, min(size, os.fstat(self._fd).st_size))
        self._free = list(holes(self._records, size))  # missing, and nobody's task; in order
        self._tasks: list[Task] = []
        self.n_held = sum(r.bytes for r in self._records.values())

    def take(self, n_most: int) -> Task | None:
        """A missing span, of at most n_most bytes, as a task of the caller; None if there is nothing to do.

        Where everything is somebody's task already, half of the one that will take the longest.
        """
        now = time.monotonic()
        with self.changed:
            if self._closed:
                return None
            if self._free:
                start, end = self._free[0]
                if end - start > n_most:
                    end = start + n_most
                    self._free[0] = (end, self._free[0][1])
                else:
                    del self._free[0]
            else:
                slowest = max(self._tasks, key=lambda t: t.seconds_left(now), default=None)
                if slowest is None or slowest.seconds_left(now) < SLOW or slowest.end - slowest.at < 4 * self.unit:
                    return None
                start, end = (slowest.at + slowest.end) // 2, slowest.end
                slowest.end = start
            task = Task(start, end, start, now)
            self._tasks.append(task)
            return task

    def give_back(self, task: Task) -> None:
        """Ends a task; what is left of it is missing again."""
        with self.changed:
            self._tasks.remove(task)
            self._free_again(task.at, task.end)

    def put(self, task: Task, data: bytes) -> bool:
        """The next bytes of a task; True if it wants more.  What lies behind its end is of others.  OSError, Closed."""
        with self.changed:
            start = task.at
            data = data[: task.end - start]
            task.at += len(data)
        try:
            if data:
                self.write(start, data)
        except BaseException:
            with self.changed:
                self._free_again(start, start + len(data))
            raise
        return task.at < task.end

    def _free_again(self, start: int, end: int) -> None:
        if start < end:
            self._free = sorted([*self._free, (start, end)])
            self.changed.notify_all()

    def write(self, offset: int, data: bytes) -> None:
        """Bytes that are missing, and nobody else's.  OSError, Closed."""
        with self._using():
            view, at = memoryview(data), offset
            while view:
                n = os.pwrite(self._fd, view, at)
                view, at = view[n:], at + n
            self._note(Record(offset, len(data), zlib.crc32(data)))

    def write_missing(self, offset: int, data: bytes) -> None:
        """Of bytes that came anyway, those that are missing and nobody's task."""
        end = offset + len(data)
        with self.changed:
            missing = [(max(a, offset), min(b, end)) for a, b in self._free if a < end and b > offset]
            kept = [(a, b) for a, b in self._free if not (a < end and b > offset)]
            cut = [(a, b) for a, b in self._free if a < end and b > offset]
            kept += [(a, offset) for a, _ in cut if a < offset] + [(end, b) for _, b in cut if b > end]
            self._free = sorted(kept)
        for a, b in missing:
            for at in range(a, b, self.unit):
                self.write(at, data[at - offset : min(at + self.unit, b) - offset])

    def _note(self, record: Record) -> None:
        data = packed(record)
        with self.changed:
            if os.pwrite(self._log, data, self._log_end) != len(data):  # what follows goes over the half of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._log_end += len(data)
            if record.bytes:
                self._records[record.offset] = record
                self.n_held += record.bytes
            else:
                self.n_held -= self._records.pop(record.offset).bytes
            self.changed.notify_all()

    def record_at(self, offset: int) -> Record | None:
        with self.changed:
            return self._records.get(offset)

    def read(self, record: Record) -> bytes | None:
        """The bytes of a record; None if they are not those that were written."""
        with self._using():
            data = os.pread(self._fd, record.bytes, record.offset)
        return data if len(data) == record.bytes and zlib.crc32(data) == record.crc else None

    def forget(self, record: Record) -> None:
        """The bytes of a record are missing again."""
        with self._using(), self.changed:
            self._note(Record(record.offset, 0, 0))
            self._free_again(record.offset, record.end)

    def finish(self, path: Path, journal: Path) -> None:
        """Makes the file the whole one at `path`; its records stay at `journal`: they tell which pieces are damaged."""
        os.ftruncate(self._fd, self.size)  # what lies behind it was of a file that is repaired
        os.fsync(self._fd)
        self.close()
        os.replace(self.path, path)
        atomic.sync(path.parent)
        with suppress(OSError):  # the file is good without
            write_journal(journal, self._about, (self._records[i] for i in sorted(self._records)))
        os.unlink(self.journal)

    def discard(self) -> None:
        self.close()
        for path in (self.path, self.journal):
            with suppress(FileNotFoundError):
                os.unlink(path)

    def close(self) -> None:
        """Nothing is written any more, but for what a thread is writing now."""
        with self.changed:
            if not self._closed:
                self._closed = True
                self._close_idle()
                self.changed.notify_all()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keeps the files open: the number of a closed one could be that of another file already."""
        with self.changed:
            if self._closed:
                raise Closed
            self._n_busy += 1
        try:
            yield
        finally:
            with self.changed:
                self._n_busy -= 1
                self._close_idle()

    def _close_idle(self) -> None:
        if self._closed and not self._n_busy:
            os.close(self._fd)
            os.close(self._log)


def tiling(records: Mapping[int, Record], size: int) -> dict[int, Record]:
    """Those records that lie in the file and do not overlap one before them."""
    kept, at = {}, 0
    for offset in sorted(records):
        record = records[offset]
        if at <= offset and record.end <= size:
            kept[offset] = record
            at = record.end
    return kept


def holes(records: Mapping[int, Record], size: int) -> Iterator[tuple[int, int]]:
    at = 0
    for offset in sorted(records):
        if offset > at:
            yield at, offset
        at = records[offset].end
    if at < size:
        yield at, size

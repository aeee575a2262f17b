"""How fast experts come from the disk that a model file is on, read as the engine reads them.

    with Reader(gguf.paths, experts_of(tensors), shape.n_expert_used) as reader:
        rates = [reader.rate(SLICE) for _ in range(N_SLICES)]

As decode does: the experts of one layer after another, as many together as a token uses, each in pieces of PIECE bytes,
by N_READERS threads, past the page cache where the system lets us (csrc/slots.c, csrc/disk.c, csrc/files.c).  Experts
are drawn at random, and none of them is read twice: whoever sits below the file system and remembers what was read
gains nothing by it.  Where a disk is shared, its rate is another one by the minute; so it is measured in slices, and
what runs get is kept beside them (ms4.cli.measured).

Memory that nobody has used yet has to be found and cleared before a disk can write to it, which can take longer than to
read: `fresh` are the rates at which experts come into such memory.  The first gigabytes may come faster than others (a
virtual machine has them already, and has to ask for more), so how much it was is kept with each rate.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from statistics import median
from types import TracebackType

import ms4

N_READERS, PIECE, BLOCK = 8, 1 << 20, 4096
SLICE, N_SLICES = 0.5, 8  # seconds of one, and how many are wanted of a disk that experts will be read from
S_FRESH, MOST_FRESH = 1.0, 1 << 30  # seconds, bytes
SMALLEST = 64 << 20  # bytes of experts: fewer say nothing about a disk, and are read in no time
CHUNK = 4 << 20  # bytes: what stands for an expert where a model has none

Range = tuple[int, int, int]  # file, offset, bytes
Expert = tuple[Range, ...]
Piece = tuple[int, int, int, int]  # file, offset, bytes, place in the memory that is read into


@dataclass(frozen=True)
class DiskRate:
    """Bytes per second.  low, high: what it swings between.  direct: past the page cache.  fresh: (bytes, rate) into
    memory that was never used.  n_runs: of how many runs that is what they got; 0: it was only measured."""

    bytes_per_s: float
    direct: bool = True
    low: float = 0.0
    high: float = 0.0
    fresh: tuple[tuple[float, float], ...] = ()
    n_runs: int = 0

    def filling(self, n_bytes: float) -> float:
        """The rate into so much memory that was never used: what was found with about as much; 0: nobody knows."""
        return median(self._fillings(n_bytes) or [0.0])

    def slowest(self, n_bytes: float) -> tuple[float, float]:
        """The lower ends: of the disk, and of filling so much memory."""
        return self.low, min(self._fillings(n_bytes), default=0.0)

    def fastest(self, n_bytes: float) -> tuple[float, float]:
        return self.high, max(self._fillings(n_bytes), default=0.0)

    def _fillings(self, n_bytes: float) -> list[float]:
        if not self.fresh or n_bytes <= 0:
            return []
        nearest = min(_apart(n, n_bytes) for n, _ in self.fresh)
        return [rate for n, rate in self.fresh if _apart(n, n_bytes) <= ALIKE * nearest]


ALIKE = 1.2  # sizes that differ by no more are as good as one


def _apart(one: float, other: float) -> float:
    """How many times the smaller the larger is."""
    return max(one, other) / max(min(one, other), 1.0)


def experts_of(tensors: Sequence[ms4.Tensor]) -> list[list[Expert]]:
    """Where the experts lie, by layer."""
    layers: dict[int, list[ms4.Tensor]] = {}
    for t in tensors:
        if t.role.endswith("_exps"):
            layers.setdefault(t.layer, []).append(t)
    found = []
    for parts in layers.values():
        slices = [(t.file, t.offset, t.bytes // t.dims[2]) for t in parts]
        found.append([tuple((f, at + i * n, n) for f, at, n in slices) for i in range(parts[0].dims[2])])
    return found


def chunks_of(paths: Sequence[str | os.PathLike[str]]) -> list[list[Expert]]:
    """The files in pieces, for a model without experts."""
    return [
        [((index, at, CHUNK),) for at in range(0, os.path.getsize(path) - CHUNK + 1, CHUNK)]
        for index, path in enumerate(paths)
    ]


class Reader:
    """Open files, and the experts in them that have not been read yet.  OSError: they cannot be read."""

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        layers: Sequence[Sequence[Expert]],
        n_together: int,
        seed: int = 0,
    ) -> None:
        self._left = drawn(layers, max(n_together, 1), random.Random(seed))
        self._files, self.direct = opened(paths)
        self._pool = ThreadPoolExecutor(N_READERS)
        self._memory: list[mmap.mmap] = []

    def rate(self, seconds: float, fresh: int = 0) -> float:
        """Bytes per second of so many seconds of reading; 0: nothing is left to read.

        fresh: bytes of memory that was never used, which is what is read into, and no more than that.
        """
        n_bytes, spent = 0, 0.0
        used: list[mmap.mmap] = []
        try:
            for experts in self._left:
                pieces, room = placed(experts)
                if fresh and (len(used) + 1) * room > fresh:
                    break
                memory = taken(room) if fresh else self._reused(room)
                used += [memory] if fresh else []
                begun = time.monotonic()
                n_bytes += self._read(pieces, memory)
                spent += time.monotonic() - begun
                if spent >= seconds:
                    break
        finally:
            for memory in used:
                memory.close()
        return n_bytes / spent if spent > 0 else 0.0

    def _reused(self, room: int) -> mmap.mmap:
        """Memory that was read into before."""
        if not self._memory or len(self._memory[0]) < room:
            self.forget()
            self._memory = [taken(room)]
            self._memory[0].write(bytes(room))
        return self._memory[0]

    def _read(self, pieces: list[Piece], memory: mmap.mmap) -> int:
        """All of these, by all threads; bytes that came."""
        numbers = count()  # next() of it is one step of the interpreter, so that threads share it without a lock

        def work(_: int) -> int:
            n_bytes = 0
            with memoryview(memory) as room:
                while (i := next(numbers)) < len(pieces):
                    file, at, n, to = pieces[i]
                    with room[to : to + n] as part:
                        n_bytes += read_piece(self._files[file], part, at)
            return n_bytes

        return sum(self._pool.map(work, range(N_READERS)))

    def forget(self) -> None:
        for memory in self._memory:
            memory.close()
        self._memory = []

    def close(self) -> None:
        self._pool.shutdown()
        self.forget()
        for fd in self._files:
            os.close(fd)
        self._files = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_piece(fd: int, part: memoryview, at: int) -> int:
    """Bytes that were read: fewer than there is room for at the end of a file."""
    return os.preadv(fd, [part], at)


def drawn(layers: Sequence[Sequence[Expert]], n: int, random: random.Random) -> Iterator[list[Expert]]:
    """Random experts, n of one layer at a time and the layers in turn, until all have been there."""
    left = [random.sample(layer, len(layer)) for layer in layers]
    while any(left):
        for layer in left:
            together, layer[:] = layer[:n], layer[n:]
            if together:
                yield together


def placed(experts: Sequence[Expert]) -> tuple[list[Piece], int]:
    """The pieces that these are read in, whole blocks, and the bytes of memory that they need."""
    pieces, room = [], 0
    for file, offset, n in (part for expert in experts for part in expert):
        first, end = offset // BLOCK * BLOCK, -(-(offset + n) // BLOCK) * BLOCK
        cuts = [first, *range((first // PIECE + 1) * PIECE, end, PIECE), end]
        pieces += [(file, a, b - a, room + a - first) for a, b in zip(cuts, cuts[1:], strict=False)]
        room += end - first
    return pieces, room


def opened(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[int], bool]:
    """The files, and whether reads go past the page cache: all of them, or none."""
    if direct := getattr(os, "O_DIRECT", 0):
        files: list[int] = []
        try:
            for path in paths:
                files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | direct))
                with taken(BLOCK) as memory:
                    os.preadv(files[-1], [memory], 0)  # some file systems open so, and then do not read
            return files, True
        except OSError:
            for fd in files:
                os.close(fd)
    return [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths], False


def taken(n_bytes: int) -> mmap.mmap:
    """New memory, in huge pages if there are any, as the engine's slots have."""
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


# --- what was measured, by whom, and what is made of it
@dataclass(frozen=True)
class Samples:
    """All bytes per second.  slices: of the last calibration.  runs: what decode got in the last runs, the newest last.
    fresh: into memory that was never used, of which there were so many bytes (filled)."""

    slices: tuple[float, ...] = ()
    runs: tuple[float, ...] = ()
    fresh: tuple[float, ...] = ()
    filled: tuple[float, ...] = ()
    direct: bool = True

    def enough(self, n: int, n_bytes: int) -> bool:
        """Whether a calibration of n slices would say no more: it is there, or nothing of n_bytes was left to read."""
        return len(self.slices) >= n or SLICE * sum(self.slices) > 0.9 * n_bytes

    @property
    def newest(self) -> Samples:
        """As many as are kept."""
        return replace(
            self, runs=self.runs[-MOST_RUNS:], fresh=self.fresh[-MOST_RUNS:], filled=self.filled[-MOST_RUNS:]
        )

    @property
    def rate(self) -> DiskRate | None:
        """What the next run may expect.  Runs are believed as soon as there are ENOUGH of them; until then a
        calibration counts as one of them.  None: nothing has been measured."""
        measured = median(self.slices) if self.slices else 0.0
        believed = [*self.runs, *([measured] if measured and len(self.runs) < ENOUGH else [])]
        if not believed:
            return None
        spread = believed if self.runs else inner(self.slices)
        fresh = tuple(zip(self.filled, self.fresh, strict=False))
        return DiskRate(median(believed), self.direct, min(spread), max(spread), fresh, len(self.runs))


ENOUGH, MOST_RUNS = 3, 9


def inner(rates: Sequence[float]) -> list[float]:
    """Without the lowest and the highest tenth."""
    cut = len(rates) // 10
    return sorted(rates)[cut : len(rates) - cut]


class Probe:
    """Measures the disk of a model file in slices, a part of them now and a part later."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]], tensors: Sequence[ms4.Tensor], n_used: int) -> None:
        layers = experts_of(tensors) or chunks_of(paths)
        n_bytes = sum(n for layer in layers for expert in layer for _, _, n in expert)
        self._reader = Reader(paths, layers, n_used) if n_bytes >= SMALLEST else None
        self._slices: list[float] = []
        self._fresh, self._filled = 0.0, 0.0

    def slices(self, n: int) -> None:
        """n more, or fewer if all has been read."""
        if self._reader:
            rates = [self._reader.rate(SLICE) for _ in range(n)]
            self._slices += filter(None, rates)

    def fresh(self, most: int = MOST_FRESH) -> None:
        """Into `most` bytes of memory that was never used."""
        if self._reader:
            self._fresh = self._reader.rate(S_FRESH, min(most, MOST_FRESH))
            self._filled = min(most, MOST_FRESH, self._fresh * S_FRESH)

    @property
    def samples(self) -> Samples | None:
        """None: the files are too small to say anything."""
        if not self._reader or not self._slices:
            return None
        fresh, filled = ((self._fresh,), (float(self._filled),)) if self._fresh else ((), ())
        return Samples(tuple(self._slices), (), fresh, filled, self._reader.direct)

    def close(self) -> None:
        if self._reader:
            self._reader.close()

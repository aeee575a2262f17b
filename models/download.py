"""Fetches one file: several ranges at once, from where it was left, its SHA-256 on the way.

The threads take tasks in order, so what is there grows from the front; one more thread follows them, reads back what
lies on the disk, compares it with the CRC of its record and hashes it.  So the sum is of the bytes on the disk, it is
ready a moment after the last of them, and after a restart it costs one reading of what is there.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ms4.models.part import MOST_SPAN, Closed, Part, Task
from ms4.models.web import ChangedError, DownloadError, Target, Transient, Web, given_up

MOST_SPOILT = 3  # times that one record is not on the disk what was written, before the disk is believed to be broken
TICK = 0.2  # seconds between two looks at the progress


class DigestError(ChangedError):
    """All bytes came, and they are not those of the promised SHA-256."""


@dataclass(frozen=True)
class Progress:
    """Bytes of one file: all, those here, those hashed, and those that came over the network in this run."""

    bytes: int
    n_held: int
    n_hashed: int
    n_fetched: int
    trouble: str = ""  # what is being tried again


class Throttle:
    """At most so many bytes a second, all threads together; 0 is no limit."""

    def __init__(self, bytes_per_s: int = 0) -> None:
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pay(self, n: int) -> float:
        """Seconds to sleep after n bytes."""
        if not self._rate:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + n / self._rate
            return self._free_at - now


class Download:
    """One file on its way into a part.  `run` may be called once."""

    def __init__(self, web: Web, target: Target, part: Part, jobs: int = 4, throttle: Throttle | None = None) -> None:
        self._web, self._target, self._part = web, target, part
        self._n_jobs = jobs
        self._throttle = throttle or Throttle()
        self._stop = threading.Event()
        self._no_ranges = False
        self._n_fetching = 0  # threads that have a task
        self._error: BaseException | None = None
        self._n_failed = 0  # attempts since a byte came
        self._n_fetched = self._n_hashed = 0
        self._trouble = ""
        self._digest = hashlib.sha256()

    def run(self, show: Callable[[Progress], object]) -> None:
        """Returns when the part holds all bytes and their SHA-256 is the promised one.

        DigestError, if it is another; then the part is worth nothing.  After any other error, and after a
        KeyboardInterrupt, the part holds what came.
        """
        work = [self._work] * min(self._n_jobs, max(1, self._target.bytes // self._part.unit))
        threads = [threading.Thread(target=self._guarded, args=(job,), daemon=True) for job in [*work, self._follow]]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(TICK / len(threads))
                show(self.progress())
        finally:
            self._halt()
        if self._error is not None:
            raise self._error
        found = self._digest.hexdigest()
        if found != self._target.sha256:
            raise DigestError(f"the sha256 is {found}, the hub promised {self._target.sha256}", "ms4 pull again")

    def progress(self) -> Progress:
        return Progress(self._target.bytes, self._part.n_held, self._n_hashed, self._n_fetched, self._trouble)

    def _halt(self) -> None:
        self._stop.set()
        with self._part.changed:
            self._part.changed.notify_all()

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Closed:
            pass
        except BaseException as error:
            if self._error is None:
                self._error = error
            self._halt()

    # --- bytes

    def _work(self) -> None:
        """Task after task, until all is there and hashed."""
        while not self._is_over() and not self._no_ranges:
            left = self._part.size - self._part.n_held
            with self._part.changed:
                task = self._part.take(max(self._part.unit, min(MOST_SPAN, left // (2 * self._n_jobs))))
                if task is None:
                    self._part.changed.wait(TICK)
                    continue
                self._n_fetching += 1
            try:
                ranges = self._fetch(task)
            except Transient as failure:
                self._again(failure)
                continue
            finally:
                with self._part.changed:
                    self._n_fetching -= 1
            if not ranges and self._is_first_without():
                self._work_without_ranges()

    def _is_over(self) -> bool:
        return self._stop.is_set() or self._n_hashed == self._part.size

    def _is_first_without(self) -> bool:
        """True for the first thread that learns that there are no ranges; the others have nothing to do then."""
        with self._part.changed:
            before, self._no_ranges = self._no_ranges, True
            return not before

    def _work_without_ranges(self) -> None:
        while not self._is_over():
            with self._part.changed:
                if self._n_fetching or self._part.n_held == self._part.size:
                    self._part.changed.wait(TICK)
                    continue
            try:
                self._fetch_whole()
            except Transient as failure:
                self._again(failure)

    def _fetch(self, task: Task) -> bool:
        """The bytes of a task; False if the server knows no ranges.  What does not come is given back."""
        held = bytearray()

        def put() -> bool:
            data = bytes(held)
            held.clear()
            return self._part.put(task, data)

        try:
            with self._web.range(self._target, task.at, task.end) as body:
                if body.whole:
                    return False
                try:
                    for chunk in body.chunks():
                        self._came(len(chunk))
                        held += chunk
                        if len(held) >= self._part.unit and not put():
                            return True
                        if self._stop.is_set():
                            return True
                finally:
                    more = put()
            if more:
                raise Transient("the server sends less than it was asked for")
            return True
        finally:
            self._part.give_back(task)

    def _fetch_whole(self) -> None:
        """Everything from the first byte on, of which what is missing is written."""
        at, held = 0, bytearray()
        with self._web.range(self._target, 0, self._target.bytes) as body:
            try:
                for chunk in body.chunks():
                    self._came(len(chunk))
                    held += chunk
                    if len(held) >= self._part.unit:
                        self._part.write_missing(at, bytes(held))
                        at += len(held)
                        held.clear()
                    if self._stop.is_set():
                        return
            finally:
                self._part.write_missing(at, bytes(held))
        if at + len(held) < self._target.bytes:
            raise Transient("the server sends less than it was asked for")

    def _came(self, n: int) -> None:
        with self._part.changed:
            self._n_fetched += n
            if n:
                self._n_failed, self._trouble = 0, ""
        if wait := self._throttle.pay(n):
            self._stop.wait(wait)

    def _again(self, failure: Transient) -> None:
        """Waits before the next attempt, or gives up."""
        patience = self._web.patience
        with self._part.changed:
            self._n_failed += 1
            self._trouble = str(failure)
            each = -(-self._n_failed // self._n_jobs)
        if each >= patience.n_attempts:
            raise given_up(failure, each) from failure
        self._stop.wait(max(patience.wait(each), failure.wait))

    # --- the sum

    def _follow(self) -> None:
        """Hashes what is there from the front, as far as there is something."""
        part, n_spoilt = self._part, 0
        while self._n_hashed < part.size and not self._stop.is_set():
            record = part.record_at(self._n_hashed)
            if record is None:
                with part.changed:
                    if part.record_at(self._n_hashed) is None:
                        part.changed.wait(TICK)
                continue
            data = part.read(record)
            if data is None:
                n_spoilt += 1
                if n_spoilt > MOST_SPOILT:
                    raise DownloadError("what is written does not stay on this disk", "look into dmesg")
                part.forget(record)
                continue
            self._digest.update(data)
            self._n_hashed, n_spoilt = record.end, 0

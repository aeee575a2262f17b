"""Ctrl-C while the engine computes.

Python runs signal handlers only between its own instructions, and a feed is one long call into C.  So the signal
itself writes a byte into a socket, and a thread that waits there raises the stop flag of what is computed.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ms4 import StopFlag

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """Owns Ctrl-C while it is entered: SIGINT raises the flag, even during a call into C.

    A second one raises KeyboardInterrupt, but only inside `leaving`, where that leaves nothing half done.  For the main
    thread only: elsewhere Python cannot handle signals.

    until_kept: what ends the process from outside (SIGTERM, or SIGHUP of a window that is closed) raises the flag, too,
    and does so at the end of the block, in which what there is of the answer can be kept.
    """

    def __init__(self, stop: StopFlag | None = None, until_kept: bool = False) -> None:
        self.flag = StopFlag() if stop is None else stop
        self.ended = 0  # the signal that ends the process
        self._ending = ENDING if until_kept else ()
        self._old_endings: dict[int, Any] = {}
        self._n_signals = 0
        self._may_leave = False

    def __enter__(self) -> Interrupt:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # as set_wakeup_fd demands
        self._watcher = threading.Thread(target=self._watch, name="interrupt", daemon=True)
        self._old_handler = signal.signal(signal.SIGINT, self._on_signal)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._watcher.start()
        for number in self._ending:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self._old_endings[number] = signal.signal(number, self._on_end)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.close()  # the watcher reads what is there, and then the end
        self._watcher.join()
        self._reader.close()
        signal.signal(signal.SIGINT, self._old_handler or signal.SIG_DFL)
        self._restore_endings()
        if self.ended:
            signal.raise_signal(self.ended)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Inside, a second Ctrl-C raises KeyboardInterrupt, also one that came before."""
        self._may_leave = True
        try:
            self._leave()
            yield
        finally:
            self._may_leave = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._n_signals += 1
        self.flag.set()
        self._leave()

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        if self.ended:  # it takes too long for somebody
            self._restore_endings()
            signal.raise_signal(number)
        self.ended = number
        self.flag.set()

    def _restore_endings(self) -> None:
        for number, handler in self._old_endings.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _leave(self) -> None:
        if self._may_leave and self._n_signals > 1:
            self._may_leave = False
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while numbers := self._reader.recv(64):
            if {signal.SIGINT, *self._ending} & {*numbers}:
                self.flag.set()


@contextmanager
def interruptible(stop: StopFlag | None = None) -> Iterator[StopFlag]:
    """Inside, the first SIGINT raises the flag, even during a call into C; the second raises KeyboardInterrupt."""
    with Interrupt(stop) as ctrl_c, ctrl_c.leaving():
        yield ctrl_c.flag

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

from ms4 import StopFlag


class Interrupt:
    """Owns Ctrl-C while it is entered: SIGINT raises the flag, even during a call into C.

    A second one raises KeyboardInterrupt, but only inside `leaving`, where that leaves nothing half done.  For the main
    thread only: elsewhere Python cannot handle signals.
    """

    def __init__(self, stop: StopFlag | None = None) -> None:
        self.flag = StopFlag() if stop is None else stop
        self._n_signals = 0
        self._may_leave = False

    def __enter__(self) -> Interrupt:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # as set_wakeup_fd demands
        self._watcher = threading.Thread(target=self._watch, name="interrupt", daemon=True)
        self._old_handler = signal.signal(signal.SIGINT, self._on_signal)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.close()  # the watcher reads what is there, and then the end
        self._watcher.join()
        self._reader.close()
        signal.signal(signal.SIGINT, self._old_handler or signal.SIG_DFL)

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

    def _leave(self) -> None:
        if self._may_leave and self._n_signals > 1:
            self._may_leave = False
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while numbers := self._reader.recv(64):
            if signal.SIGINT in numbers:
                self.flag.set()


@contextmanager
def interruptible(stop: StopFlag | None = None) -> Iterator[StopFlag]:
    """Inside, the first SIGINT raises the flag, even during a call into C; the second raises KeyboardInterrupt."""
    with Interrupt(stop) as ctrl_c, ctrl_c.leaving():
        yield ctrl_c.flag

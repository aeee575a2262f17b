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


@contextmanager
def interruptible(stop: StopFlag | None = None) -> Iterator[StopFlag]:
    """Inside, the first SIGINT raises the flag, even during a call into C; the second raises KeyboardInterrupt.

    For the main thread only: elsewhere Python cannot handle signals.
    """
    flag = StopFlag() if stop is None else stop
    hit = False
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as set_wakeup_fd demands

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    def watch() -> None:
        while numbers := reader.recv(64):
            if signal.SIGINT in numbers:
                flag.set()

    old_handler = signal.signal(signal.SIGINT, on_signal)
    old_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="interrupt", daemon=True)
    watcher.start()
    try:
        yield flag
    finally:
        signal.set_wakeup_fd(old_wakeup)
        signal.signal(signal.SIGINT, old_handler or signal.SIG_DFL)
        writer.close()  # the watcher reads what is there, and then the end
        watcher.join()
        reader.close()

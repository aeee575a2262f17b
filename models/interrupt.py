"""Ctrl-C while the engine computes.

Python runs signal handlers only between its own instructions, and a step is one long call into C.  So the signal
itself writes a byte into a socket, and a thread that waits there sets the stop flag.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Flag(Protocol):
    def set(self) -> None: ...


class Interrupt:
    """`hit` is true once SIGINT has arrived."""

    def __init__(self) -> None:
        self.hit = False


@contextmanager
def interruptible(stop: Flag) -> Iterator[Interrupt]:
    """Inside, the first SIGINT sets the flag, even during a step; the second raises KeyboardInterrupt.

    For the main thread only: elsewhere Python cannot handle signals.
    """
    interrupt = Interrupt()
    over = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as set_wakeup_fd demands

    def on_signal(number: int, frame: FrameType | None) -> None:
        if interrupt.hit:
            raise KeyboardInterrupt
        interrupt.hit = True

    def watch() -> None:
        while not over.is_set():
            numbers = reader.recv(64)
            if signal.SIGINT in numbers:
                stop.set()

    old_handler = signal.signal(signal.SIGINT, on_signal)
    old_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="interrupt", daemon=True)
    watcher.start()
    try:
        yield interrupt
    finally:
        signal.set_wakeup_fd(old_wakeup)
        signal.signal(signal.SIGINT, old_handler or signal.SIG_DFL)
        over.set()
        writer.send(b"\0")
        watcher.join()
        reader.close()
        writer.close()

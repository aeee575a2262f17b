"""The modes of the terminal while a chat has it: what is typed is neither shown by the terminal nor lost."""

from __future__ import annotations

import contextlib
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, the terminal on stdin echoes nothing and keeps what is typed; Ctrl-C and Ctrl-Z throw nothing away."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    silent = quietened(before)

    def again(number: int, frame: FrameType | None) -> None:  # the shell has had the terminal meanwhile
        termios.tcsetattr(fd, termios.TCSANOW, silent)

    termios.tcsetattr(fd, termios.TCSANOW, silent)
    old = signal.signal(signal.SIGCONT, again)
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, old or signal.SIG_DFL)
        with contextlib.suppress(termios.error):  # it may be gone
            termios.tcsetattr(fd, termios.TCSANOW, before)


@contextlib.contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C stops the answer, and nothing else if the answer has just ended and its screen is put in order."""
    before = signal.signal(signal.SIGINT, lambda number, frame: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def quietened(modes: list[Any]) -> list[Any]:
    """Terminal modes without echo, without lines; the keys that send signals stay, and do not empty the queue."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = modes
    iflag &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON)
    lflag = (lflag & ~(termios.ECHO | termios.ICANON | termios.IEXTEN)) | termios.ISIG | termios.NOFLSH
    cc = list(cc)
    cc[termios.VMIN], cc[termios.VTIME] = 1, 0
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, cc]

"""The modes of the terminal while a chat has it: what is typed is neither shown by the terminal nor lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

from ms4.cli import streams
from ms4.models.interrupt import ENDING

SAVE, RESTORE, ALL_ROWS = "\x1b7", "\x1b8", "\x1b[r"  # the cursor; that all rows scroll


@contextlib.contextmanager
def quiet(shown: TextIO) -> Iterator[None]:
    """Inside, the terminal on stdin echoes nothing and keeps what is typed; Ctrl-C and Ctrl-Z throw nothing away.

    shown: the stream that shows it.  The terminal is given back at the end, also by SIGTERM; what a chat that was
    killed (SIGKILL) has left of it is mended at the beginning.
    """
    fd = sys.stdin.fileno()
    before = mended(termios.tcgetattr(fd))
    silent = quietened(before)

    def again(number: int, frame: FrameType | None) -> None:  # the shell has had the terminal meanwhile
        termios.tcsetattr(fd, termios.TCSANOW, silent)

    def give_back() -> None:
        with contextlib.suppress(termios.error, OSError):  # it may be gone
            termios.tcsetattr(fd, termios.TCSANOW, before)
            all_rows(shown)

    def leave(number: int, frame: FrameType | None) -> None:
        give_back()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    all_rows(shown)
    termios.tcsetattr(fd, termios.TCSANOW, silent)
    old = {signal.SIGCONT: signal.signal(signal.SIGCONT, again)}
    old |= {n: signal.signal(n, leave) for n in ENDING if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)
        give_back()


def all_rows(shown: TextIO) -> None:
    """No row of the terminal is kept from scrolling."""
    if not streams.is_plain():
        os.write(shown.fileno(), f"{SAVE}{ALL_ROWS}{RESTORE}".encode())


def mended(modes: list[Any]) -> list[Any]:
    """Terminal modes; in place of those that only `quietened` makes, the ones that a terminal begins with."""
    if quietened(modes) != modes:
        return modes
    iflag, oflag, cflag, lflag, *rest = modes
    lflag = (lflag | termios.ECHO | termios.ICANON | termios.IEXTEN) & ~termios.NOFLSH
    return [iflag | termios.ICRNL | termios.IXON, oflag, cflag, lflag, *rest]


def quietened(modes: list[Any]) -> list[Any]:
    """Terminal modes without echo, without lines; the keys that send signals stay, and do not empty the queue."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = modes
    iflag &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON)
    lflag = (lflag & ~(termios.ECHO | termios.ICANON | termios.IEXTEN)) | termios.ISIG | termios.NOFLSH
    cc = list(cc)
    cc[termios.VMIN], cc[termios.VTIME] = 1, 0
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, cc]

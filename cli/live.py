"""The two rows below an answer that comes: what is typed meanwhile, and how things stand.

The answer scrolls in the rows above (DECSTBM), and what scrolls out of them is the terminal's to keep; nothing of it is
drawn again.  Each drawing is one write that puts the cursor back where the answer goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from prompt_toolkit.buffer import Buffer
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys

from ms4.cli import palette, render, streams, wrap
from ms4.quant import visible

LEAST = (20, 6)  # columns and rows of a terminal that has room for it
MARK = "› "  # before what is typed
SENT = " ⏎ "  # behind a message that waits
SAVE, RESTORE, BELOW, ALL_ROWS = "\x1b7", "\x1b8", "\x1b[J", "\x1b[r"
ONE_DOWN, TWO_UP = "\x1bD", "\x1b[2A"
EDITS: dict[Keys, Callable[[Buffer], object]] = {
    Keys.ControlH: lambda buffer: buffer.delete_before_cursor(),
    Keys.Delete: lambda buffer: buffer.delete(),
    Keys.Left: lambda buffer: buffer.cursor_left(),
    Keys.Right: lambda buffer: buffer.cursor_right(),
    Keys.ControlB: lambda buffer: buffer.cursor_left(),
    Keys.ControlF: lambda buffer: buffer.cursor_right(),
    Keys.Home: lambda buffer: buffer.cursor_left(buffer.document.cursor_position_col),
    Keys.ControlA: lambda buffer: buffer.cursor_left(buffer.document.cursor_position_col),
    Keys.End: lambda buffer: buffer.cursor_right(len(buffer.document.current_line_after_cursor)),
    Keys.ControlE: lambda buffer: buffer.cursor_right(len(buffer.document.current_line_after_cursor)),
    Keys.ControlK: lambda buffer: buffer.delete(len(buffer.document.current_line_after_cursor)),
    Keys.ControlU: lambda buffer: buffer.delete_before_cursor(buffer.document.cursor_position_col),
    Keys.ControlW: lambda buffer: buffer.delete_before_cursor(last_word(buffer.document.text_before_cursor)),
    Keys.ControlJ: lambda buffer: buffer.insert_text("\n"),
}


def last_word(text: str) -> int:
    kept = text.rstrip().rpartition(" ")
    return len(text) - len(kept[0] + kept[1])


def typed(keys: Iterable[KeyPress], fold: Callable[[str], str]) -> tuple[str, int]:
    """What the editor will have in it when it gets these keys, and where its cursor; messages that wait come first."""
    sent, buffer, before = "", Buffer(), None
    for key in keys:
        name = key.key
        if name == Keys.BracketedPaste:
            buffer.insert_text(fold(key.data.replace("\r\n", "\n").replace("\r", "\n")))
        elif name == Keys.ControlM and before != Keys.Escape:
            sent += buffer.text + SENT if buffer.text.strip() else ""
            buffer = Buffer()
        elif name == Keys.ControlM:
            buffer.insert_text("\n")
        elif isinstance(name, Keys):
            EDITS.get(name, lambda _: None)(buffer)
        else:
            buffer.insert_text(key.data)
        before = name
    return sent + buffer.text, len(sent) + buffer.cursor_position


def window(text: str, cursor: int, width: int, colour: bool) -> str:
    """The part of a text around its cursor that fits a row, the cursor marked."""
    text = visible.text(text[:cursor]) + "\0" + visible.text(text[cursor:])
    text = text.replace("\n", "⏎").replace("\t", " ")
    before, _, after = text.partition("\0")
    while before and wrap.cells(before) > width - 1:
        before = before[max(1, (len(before) - width) // 2) :]
    if not colour:
        return f"{before}▏{render.fitting(after, width - 1 - wrap.cells(before))}"
    on, after = after[:1] or " ", after[1:]
    after = render.fitting(after, width - wrap.cells(before + on))
    return f"{before}\x1b[7m{on}{palette.PLAIN}{after}"


class Live:
    """While it is open, every write of `output` keeps clear of the two rows.

    typed() gives what is typed and its cursor, bar() how things stand.  draw() may be called from any thread.
    """

    def __init__(self, output: streams.Output, typed: Callable[[], tuple[str, int]], bar: Callable[[], str]) -> None:
        self._output = output
        self._typed = typed
        self._bar = bar
        self._lock = threading.RLock()
        self._size = (0, 0)  # of the terminal for which the rows are kept; (0, 0): they are not
        self._drawn = ""
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._tick, name="live", daemon=True)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        self.draw()
        before = signal.signal(signal.SIGTSTP, self._suspend)
        self._output.guard = self
        self._clock.start()
        try:
            yield
        finally:
            self._over.set()
            self._clock.join()
            self._output.guard = contextlib.nullcontext()
            signal.signal(signal.SIGTSTP, before or signal.SIG_DFL)
            with self._lock:
                self._leave()

    def __enter__(self) -> None:
        """Before the answer is written: it is to go on above the rows, wherever they are now."""
        self._lock.acquire()
        self._fit()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def draw(self) -> None:
        with self._lock:
            if self._over.is_set() or not self._fit():
                return
            columns, rows = self._size
            text, cursor = self._typed()
            colour = self._output.colour
            style, plain = (render.DIM, render.PLAIN) if colour else ("", "")
            first = MARK + window(text, cursor, columns - 1 - len(MARK), colour)
            second = f"{style}{render.fitting(self._bar(), columns - 1)}{plain}"
            drawing = f"\x1b[{rows - 1};1H{plain}\x1b[K{first}\x1b[{rows};1H\x1b[K{second}"
            if drawing != self._drawn:
                self._drawn = drawing
                self._put(f"{SAVE}{drawing}{RESTORE}")

    def _fit(self) -> bool:
        """Keeps the rows at the bottom of the terminal as it is now; False if it has no room for them."""
        size = self._output.size()
        if size == self._size:
            return True
        self._leave()
        if size[0] < LEAST[0] or size[1] < LEAST[1]:
            return False
        self._size = size
        # Two lines down and up again: there are two below the cursor, and they are empty.
        self._put(f"{ONE_DOWN}{ONE_DOWN}{TWO_UP}{SAVE}\x1b[1;{size[1] - 2}r{RESTORE}")
        self.draw()
        return True

    def _leave(self) -> None:
        """Gives the rows back.  Nothing but they stand below the cursor, wherever a new size has moved them."""
        if self._size != (0, 0):
            self._size, self._drawn = (0, 0), ""
            self._put(f"{SAVE}{ALL_ROWS}{RESTORE}{BELOW}")

    def _put(self, text: str) -> None:
        assert self._output.fd is not None
        with contextlib.suppress(OSError):  # a terminal that is gone is the answer's to notice
            os.write(self._output.fd, text.encode())

    def _tick(self) -> None:
        while not self._over.wait(render.PERIOD):
            self.draw()

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the shell gets the whole terminal."""
        with self._lock:
            self._leave()
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, self._suspend)

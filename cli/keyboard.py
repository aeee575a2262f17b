"""What is typed at a terminal in a chat, also while an answer comes.

Between two prompts it is kept, and begins the next message (`terminal.quiet` has the terminal show nothing of it).  A
paste is one piece of text, also from a terminal that does not mark its pastes.
"""

from __future__ import annotations

import os
import re
import select
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from prompt_toolkit.input import vt100
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys

from ms4.cli import streams

MARKED, UNMARKED = "\x1b[?2004h", "\x1b[?2004l"  # bracketed paste
BEGIN, END = "\x1b[200~", "\x1b[201~"
PASTE = re.compile(rf"({re.escape(BEGIN)}.*?(?:{re.escape(END)}|\Z))", re.DOTALL)
LINE_END = re.compile("\r\n|\r|\n")
MOMENT = 0.02  # seconds within which the rest of a paste follows, and no next key


class Keyboard(vt100.Vt100Input):
    """stdin as prompt_toolkit reads it; between `begin` and `end`, a thread collects what is typed."""

    def __init__(self, shown: TextIO) -> None:
        super().__init__(sys.stdin)
        self._shown = shown
        self._marks = not streams.is_plain()  # the terminal can be asked to mark its pastes
        self._in_paste = False
        self._ahead = True  # what comes first was typed before there was an editor
        self._typed: list[KeyPress] = []
        self.hurry: Callable[[], None] | None = None  # Enter, where nothing was typed before it
        self.fold: Callable[[], None] | None = None  # Ctrl-T
        self.seen: Callable[[], None] | None = None  # after each key
        self._reader: threading.Thread | None = None
        self._stop = os.pipe()

    def read_keys(self) -> list[KeyPress]:
        data = self.stdin_reader.read()
        while LINE_END.search(data, 0, len(data) - 1) and self._more():
            more = self.stdin_reader.read()
            data += more
            if not more:
                break
        if self._ahead and len(data) > 1:
            data = data.replace("\n", "\r")  # so long, the terminal made a line end of the key that sends
        self._ahead = self._ahead and not data
        self.vt100_parser.feed(self._marked(data))
        keys, self._buffer = self._buffer, []
        return keys

    def _more(self) -> bool:
        return bool(select.select([self.fileno()], [], [], MOMENT)[0])

    def _marked(self, data: str) -> str:
        """The same text, where what can only be a paste is marked as one.

        Nobody types several lines at once.  A terminal that marks pastes may still give two keys together if ms4 was
        slow to read them, so there it takes three lines.  A line end at the end is the key that sends.
        """
        pieces = PASTE.split(data)
        for n, piece in enumerate(pieces):
            if piece.startswith(BEGIN):
                self._in_paste = not piece.endswith(END)
            elif self._in_paste:  # the rest of one that began before
                inside, end, _ = piece.partition(END)
                self._in_paste = not end
            elif "\x1b" not in piece:
                body = piece.removesuffix("\r")
                if len(LINE_END.findall(body)) >= (2 if self._marks else 1):
                    pieces[n] = BEGIN + body + END + piece[len(body) :]
        return "".join(pieces)

    # --- between two prompts

    def begin(self) -> None:
        """From now on a thread takes what is typed."""
        if self._reader is None:
            self._mark(True)
            self._reader = threading.Thread(target=self._collect, name="keyboard", daemon=True)
            self._reader.start()

    def end(self) -> None:
        """What was typed meanwhile, up to the first message that was sent, comes first at the next prompt."""
        if self._reader is not None:
            os.write(self._stop[1], b".")
            self._reader.join()
            os.read(self._stop[0], 64)  # a Ctrl-C may have come before, and this is the second time
            self._reader = None
        sent = next((n for n, key in enumerate(self._typed, 1) if key.key == Keys.ControlM), len(self._typed))
        store_typeahead(self, self._typed[:sent])
        del self._typed[:sent]

    def typed(self) -> list[KeyPress]:
        """What was typed since the last prompt and is still to be used."""
        return [*self._typed]

    def _collect(self) -> None:
        while not self.closed:
            ready = select.select([self.fileno(), self._stop[0]], [], [])[0]
            if self._stop[0] in ready:
                break
            keys = self.read_keys()
            if self.hurry and not self._typed and [key.key for key in keys] == [Keys.ControlM]:
                self.hurry()
            elif self.fold and [key.key for key in keys] == [Keys.ControlT]:
                self.fold()
            else:
                self._typed += keys
            if self.seen:
                self.seen()
        self._typed += self.flush_keys()

    def _mark(self, on: bool) -> None:
        if self._marks:
            self._shown.write(MARKED if on else UNMARKED)
            self._shown.flush()

    def close(self) -> None:
        """Gives the terminal back; what was typed and not used is gone."""
        if self._reader is not None:
            self.end()
        self._mark(False)

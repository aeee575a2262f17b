"""Breaks lines between words, while the text comes, so that none is wider than the terminal.

Only adds: what was given out is never taken back, so it works on every terminal, and a width that changes holds from
the next word on.  The last word is held until it is known to be whole.  Code in fences and rows of tables stay as they
are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

TAB = 8
LEAST = 8  # cells for words, or a line is not indented
PIECES = re.compile(r"\n|[ \t]+|[^\n \t]+")
FENCE = re.compile(r"(`{3,}|~{3,})")
MARK = re.compile(r"[-*+•]|\d{1,4}[.)]|>+")  # of a list or a quotation: what follows it is indented
STYLE = re.compile(r"\x1b\[[0-9;]*m")  # takes no cell, and belongs to what stands before it
UNITS = re.compile(rf"{STYLE.pattern}|.", re.DOTALL)
NO_START = frozenset("、。，．・：；？！）］｝」』】〉》〕…ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ%％,.:;?!)]}\"'”’")
NO_END = frozenset("（［｛「『【〈《〔([{“‘")


def cells(text: str) -> int:
    """How many cells of a terminal a text without tabs and line ends takes."""
    if "\x1b" in text:
        text = STYLE.sub("", text)
    if text.isascii():
        return len(text)
    # U+FE0F asks for the wide, coloured form of a narrow character.
    return sum(map(cell, text)) + text.count("\ufe0f")


def cell(c: str) -> int:
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


class Wrap:
    """feed() takes text and gives what of it can be written; flush() gives the rest.

    width() says how many cells a line may have; it is asked at every word.
    """

    def __init__(self, width: Callable[[], int], columns: bool = False) -> None:
        self._width = width
        self._columns = columns  # two blanks in a line begin a second column
        self._fence = ""  # what closes the block of code, inside one
        self._new_line()
        self._word = ""

    def _new_line(self) -> None:
        self._column = 0
        self._blanks = ""  # before the word that is held
        self._hang = 0  # columns by which what continues this line is indented
        self._n_words = 0  # marks of lists not counted
        self._as_is = bool(self._fence)

    def feed(self, text: str) -> str:
        out: list[str] = []
        for piece in PIECES.findall(text):
            if piece == "\n":
                out.append(self._finish() + self._ending() + piece)
                self._new_line()
            elif piece[0] in " \t":
                out.append(self._finish())
                self._blanks += piece
            else:
                self._word += piece
        return "".join(out)

    def _ending(self) -> str:
        """The blanks at the end of a line, as far as they do not begin another one."""
        return self._blanks if self._as_is or self._after(self._column, self._blanks) <= self._width() else ""

    def flush(self) -> str:
        """What is held; more text may follow, which then begins a word of its own."""
        return self._finish()

    def _finish(self) -> str:
        """Places the word that is held."""
        word, self._word = self._word, ""
        if not word:
            return ""
        if not self._n_words:
            self._begin(word)
        if self._as_is:
            blanks, self._blanks = self._blanks, ""
            self._n_words += 1
            return blanks + word
        if not self._n_words and MARK.fullmatch(word):
            given, self._blanks = self._blanks + word, ""
            self._column = self._hang = self._after(self._column, given)
            return given
        if not self._n_words:
            self._hang = self._after(self._column, self._blanks)
        elif self._columns and len(self._blanks) > 1:
            self._hang = self._after(self._column, self._blanks)
        out = "".join(self._place(part) for part in parts(word))
        self._n_words += 1
        return out

    def _begin(self, word: str) -> None:
        """The first word of a line says whether it is code or a table."""
        fence = FENCE.match(word)
        if self._fence:
            if word.startswith(self._fence) and not word.strip(self._fence[0]):
                self._fence = ""
        elif fence:
            self._fence, self._as_is = fence[1], True
        elif word.startswith("|"):
            self._as_is = True

    def _place(self, part: str) -> str:
        """A part of a word that is not broken, on this line or on the next."""
        width = max(self._width(), 1)
        n = cells(part)
        start = self._after(self._column, self._blanks)
        blanks, self._blanks = self._blanks, ""
        below = self._below(width)
        hang = cells(below)
        if start + n > width and self._column > hang:
            blanks, start = "\n" + below, hang
        # What is wider than a line is broken by the terminal, at its last cell.
        self._column = start + n if start + n <= width else (start + n - 1) % (width + 1) + 1
        return blanks + part

    def _below(self, width: int) -> str:
        """What begins the next line, if this one goes on there."""
        return " " * self._hang if self._hang + LEAST <= width else ""

    @staticmethod
    def _after(column: int, blanks: str) -> int:
        for c in blanks:
            column += TAB - column % TAB if c == "\t" else cell(c)
        return column


class Paragraph(Wrap):
    """One paragraph, maybe styled: marks of blocks in it mean nothing.

    column: where its first line begins; prefix: what its other lines begin with.
    """

    def __init__(self, width: Callable[[], int], column: int, prefix: str) -> None:
        self._prefix = prefix
        super().__init__(width)
        self._column = column

    def _new_line(self) -> None:
        super()._new_line()
        self._n_words = 1

    def feed(self, text: str) -> str:
        first, *others = text.split("\n")
        out = super().feed(first)
        for line in others:
            below = self._below(self._width())
            out += super().feed("\n") + below
            self._column = cells(below)
            out += super().feed(line)
        return out

    def _below(self, width: int) -> str:
        return self._prefix if cells(self._prefix) + LEAST <= width else ""


def reflow(text: str, width: int) -> str:
    """A whole text of ours, such as a list of options with what they mean, for lines of that width."""
    wrap = Wrap(lambda: width, columns=True)
    return wrap.feed(text) + wrap.flush()


def parts(word: str) -> list[str]:
    """A word, cut where a line may be broken inside it: between characters of scripts that know no blanks."""
    if word.isascii():
        return [word]
    found: list[str] = []
    before = ""
    for c in UNITS.findall(word):
        if len(c) > 1:
            found[-1:] = [found[-1] + c] if found else [c]
            continue
        wide = unicodedata.east_asian_width(c) in "WF"
        if c in NO_START or cell(c) == 0 or "\U0001f3fb" <= c <= "\U0001f3ff" or before in NO_END or before == "\u200d":
            joined = True
        else:
            joined = not wide and before != "" and unicodedata.east_asian_width(before) not in "WF"
        if found and (joined or not before):
            found[-1] += c
        else:
            found.append(c)
        before = c
    return found

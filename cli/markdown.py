"""Markdown as it streams: each line is rendered once, as soon as it is certain what it is, and never drawn again.

Paragraphs, headings, items and quotations come word by word, code line by line, a table when it is whole.  What a line
is depends on what it begins with; what stands inside is `inline`'s, how it is broken `wrap`'s.  Line ends of the source
stay line ends: models write verses and addresses that way.  Nothing is left out but the marks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ms4.cli import palette
from ms4.cli.code_colours import CodeColours
from ms4.cli.inline import InlineStream
from ms4.cli.wrap import Paragraph, cells
from ms4.quant import visible

QUOTE = re.compile(r" {0,3}>[ \t]?")
ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+(?=\S)|[ \t]*$)")
TASK = re.compile(r"\[([ xX])\] ")
HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+|$)")
FENCE = re.compile(r"([ \t]*)(`{3,}(?=[^`]*$)|~{3,})[ \t]*([^\s`]*)")
MATH = re.compile(r"([ \t]*)(\$\$|\\\[)[ \t]*$")
RULE = re.compile(r" {0,3}(?:([-*_])[ \t]*(?:\1[ \t]*){2,}|=+[ \t]*)$")
INDENTED = re.compile(r" {4}| *\t")
ROW = re.compile(r"[ \t]*\|")
# The beginning of a line that may still become one of those.
UNDECIDED = re.compile(
    r"[ \t]*(?:#{0,6}|[-=_*+][-=_*+ \t]*|\d{1,9}[.)]?[ \t]*|`{1,2}|~{1,2}|(?:`{3}|~{3}|\|).*"
    r"|\$|\$\$[ \t]*|\\|\\\[[ \t]*)$"
)
UNDECIDED_TASK = re.compile(r"\[(?:[ xX](?:\])?)?$")
BULLETS = "•◦▪"
MATH_END = {"$$": "$$", "\\[": "\\]"}
HEADINGS = (palette.BOLD | palette.UNDERLINED | palette.HEADING, palette.BOLD | palette.HEADING, palette.HEADING)
PARTS = re.compile(r"(\x1b\[[0-9;]*m|\n[ │]*)")


@dataclass(frozen=True)
class Item:
    """An item of a list that is open: the column of its mark in the source, and that of its text on the screen."""

    mark: int
    text: int
    level: int


@dataclass
class Block:
    """A block of lines that stay as they are, up to the one that closes it."""

    end: str
    indent: int
    code: CodeColours | None  # None: not code


class Markdown:
    """feed() takes text and gives what can be written; end() gives the rest, without a newline at its end.

    width() says how many cells a line may have; it is asked at every word.
    """

    def __init__(self, width: Callable[[], int], colours: palette.Palette | None = None) -> None:
        self._width = width
        self._palette = colours or palette.Palette()
        self._rest = ""  # of the source, from the first character that is not decided
        self._newlines = 0  # of the source, that are not written yet
        self._begun = False  # something stands on the screen
        self._open_line = False  # this line has its prefix
        self._items: list[Item] = []
        self._depth = 0  # of quotations
        self._block: Block | None = None
        self._table: list[str] = []
        self._inline: InlineStream | None = None  # of the paragraph that is open
        self._paragraph: Paragraph | None = None
        self._one_line = False  # it is a heading, and ends with its line
        self._column = 0  # where the paragraph begins
        self._table_newlines = 0
        self._style = ""  # the sequence that holds where the screen is
        self._in_line = False  # what follows belongs to a line whose beginning is decided

    def feed(self, text: str) -> str:
        self._rest += visible.text(text)
        return self._dressed(self._advance(False))

    def end(self) -> str:
        out = self._advance(True)
        if self._table:
            out += self._finish_table()
        out += self._close()
        self._newlines = 0
        return self._dressed(out)

    # --- the source, line by line

    def _advance(self, last: bool) -> str:
        out: list[str] = []
        while self._rest or (last and self._in_line):
            line, newline, rest = self._rest.partition("\n")
            if self._in_line:
                out.append(self._text(line))
                if not newline:
                    self._rest = ""
                    break
                self._rest, self._in_line = rest, False
                if self._one_line:
                    out.append(self._close())
                self._end_line()
                continue
            whole = bool(newline) or last
            used = self._begin_line(line, whole, out)
            if used is None:
                break
            if self._in_line:
                self._rest = self._rest[used:]
            else:
                self._rest = rest
                self._end_line()
            if last and not newline and not self._in_line:
                break
        return "".join(out)

    def _end_line(self) -> None:
        self._newlines += 1
        self._open_line = False

    def _begin_line(self, line: str, whole: bool, out: list[str]) -> int | None:
        """Decides what a line is.  None: more of it is needed; else how many of its characters are done with.

        Afterwards either the whole line is done, or `_in_line` says that the rest of it is words.
        """
        depth, at = (self._depth, 0) if self._open_line else self._quoted(line)
        if not whole and (self._block or at == len(line) or UNDECIDED.match(line, at)):
            return None
        if self._block:
            if depth >= self._depth:
                if self._block_line(line[at:] if self._depth else line, out):
                    return len(line)
            else:
                self._block = None
        if depth != self._depth:
            out.append(self._close_all())
            self._depth = depth
        body = line[at:]
        if not body.strip():
            out.append(self._close_all(lists=False))
            if depth and not self._open_line:
                out.append(self._prefix_line())
            return len(line)
        return self._begin_body(line, at, whole, out)

    def _begin_body(self, line: str, at: int, whole: bool, out: list[str]) -> int | None:
        """A line behind the marks of quotations, which begins a block or goes on with one."""
        while True:
            body = line[at:]
            if not whole and (not body or UNDECIDED.match(body)):
                return self._partly(line, at, out)
            if whole and self._whole_line(body, out):
                return len(line)
            item = ITEM.match(body)
            if item and self._is_item(item[2]):
                out.append(self._close_all(lists=False) + self._begin_item(item[1], item[2]))
                at += item.end()
                if at == len(line):
                    if not whole:
                        return self._partly(line, at, out)
                    return len(line)
                continue
            break
        return self._words(line, at, whole, out)

    def _is_item(self, mark: str) -> bool:
        """A number within a paragraph begins a list only if it is 1: a sentence may go on with 1984."""
        return not self._inline or bool(self._items) or not mark[0].isdigit() or mark[:-1] == "1"

    def _partly(self, line: str, at: int, out: list[str]) -> int | None:
        """Marks of items are done with, what follows them is not decided."""
        if at and self._open_line:
            self._rest = self._rest[at:]
        return None

    def _words(self, line: str, at: int, whole: bool, out: list[str]) -> int | None:
        body = line[at:]
        if self._open_line and not whole and UNDECIDED_TASK.match(body):
            return self._partly(line, at, out)
        heading = HEADING.match(body)
        if heading:
            out.append(self._close_all(lists=bool(not self._open_line)))
            self._begin_paragraph(out, HEADINGS[min(len(heading[1]), len(HEADINGS)) - 1])
            self._in_line = True
            return at + heading.end()
        blanks = len(body) - len(body.lstrip(" \t"))
        if not self._items and not self._inline and INDENTED.match(body):
            if not whole:
                return None
            out.append(self._close_all() + self._line(body))
            return len(line)
        if self._table:
            out.append(self._finish_table())
        if self._inline and not self._open_line and self._newlines == 1:
            self._open_line, self._newlines = True, 0
            out.append(self._put(self._inline.feed("\n")))
        else:
            out.append(self._close())
            if not self._open_line:
                self._leave_items(blanks)
            self._begin_paragraph(out)
        self._in_line = True
        task = TASK.match(body, blanks) if self._items else None
        if task and cells(self._shown_prefix()) == self._column:
            out.append(self._put("☐ " if task[1] == " " else "☑ "))
            blanks += task.end() - blanks
        return at + blanks

    # --- lines that are taken as a whole

    def _whole_line(self, body: str, out: list[str]) -> bool:
        """True if the line was a fence, a rule or a row of a table, and is done with."""
        if ROW.match(body):
            if not self._table:
                out.append(self._close())
                self._table_newlines = self._newlines
            self._table.append(body)
            self._newlines = 0
            return True
        opening = FENCE.match(body) or MATH.match(body)
        rule = RULE.match(body)
        if not opening and (not rule or ("=" in body and not self._inline)):
            return False
        out.append(self._close_all(lists=False))
        if not self._open_line:
            self._leave_items(len(body) - len(body.lstrip(" \t")))
        if rule and not opening:
            out.append(self._line(self._palette.dress("─" * max(self._width() - self._column, 3), palette.DIM)))
            return True
        assert opening
        end = MATH_END.get(opening[2], opening[2])
        code = CodeColours(opening[3], self._palette) if opening[2] not in MATH_END else None
        behind = self._items[-1].text if self._open_line and self._items else 0
        self._block = Block(end, behind + len(opening[1].expandtabs(4)), code)
        out.append(self._line(self._palette.dress(body.strip(), palette.DIM)))
        return True

    def _block_line(self, line: str, out: list[str]) -> bool:
        block = self._block
        assert block
        text = line.strip()
        closes = text.startswith(block.end) and (not text.strip(block.end[0]) if block.code else text == block.end)
        if closes:
            self._block = None
            out.append(self._line(self._palette.dress(text, palette.DIM)))
            return True
        given = len(line) - len(line.lstrip(" "))
        line = line[min(given, block.indent) :]
        out.append(self._line(block.code.line(line) if block.code else line))
        return True

    def _finish_table(self) -> str:
        from ms4.cli.tables import render_table

        rows, self._table = self._table, []
        newlines, self._newlines = self._newlines, self._table_newlines
        self._leave_items(len(rows[0]) - len(rows[0].lstrip(" \t")))
        room = self._width() - cells(self._shown_prefix())
        out: list[str] = []
        for n, line in enumerate(render_table(rows, room, self._palette)):
            if n:
                self._end_line()
            out.append(self._line(line))
        self._open_line, self._newlines = False, newlines
        return "".join(out)

    # --- what is on the screen

    def _begin_item(self, blanks: str, mark: str) -> str:
        """The mark of an item; it belongs into the one before if it stands further right than that one's mark."""
        column = len(blanks.expandtabs(4)) + (self._items[-1].mark + 2 if self._open_line and self._items else 0)
        while self._items and self._items[-1].mark >= column:
            self._items.pop()
        level = self._items[-1].level + 1 if self._items else 0
        shown = mark if mark[0].isdigit() else BULLETS[min(level, 2)]
        out = "" if self._open_line else self._prefix_line()
        text = (self._items[-1].text if self._items else 0) + len(shown) + 1
        self._items.append(Item(column, text, level))
        self._column += len(shown) + 1
        self._open_line = True
        return f"{out}{shown} "

    def _leave_items(self, blanks: int) -> None:
        """A line with so many blanks before it belongs to no item whose mark is not left of it."""
        while self._items and self._items[-1].mark >= blanks:
            self._items.pop()

    def _shown_prefix(self) -> str:
        """What a line begins with on the screen, without styles."""
        return "│ " * self._depth + " " * (self._items[-1].text if self._items else 0)

    def _prefix_line(self) -> str:
        """The newlines that were held (two make a blank line, more make no more), and the prefix of a new line."""
        newlines = "\n" * min(self._newlines, 2) if self._begun else ""
        self._newlines, self._begun, self._open_line = 0, True, True
        prefix = self._shown_prefix()
        self._column = cells(prefix)
        return newlines + prefix

    def _line(self, text: str) -> str:
        return ("" if self._open_line else self._prefix_line()) + text

    def _begin_paragraph(self, out: list[str], style: int = 0) -> None:
        if not self._open_line:
            out.append(self._prefix_line())
        self._inline = InlineStream(self._palette, style)
        self._paragraph = Paragraph(self._width, self._column, self._shown_prefix())
        self._one_line = bool(style)

    def _text(self, text: str) -> str:
        return self._put(self._inline.feed(text)) if self._inline and text else ""

    def _put(self, text: str) -> str:
        return self._paragraph.feed(text) if self._paragraph and text else ""

    def _close(self) -> str:
        """Ends the paragraph that is open: what was held of it is certain now."""
        if not self._inline or not self._paragraph:
            return ""
        out = self._put(self._inline.flush()) + self._paragraph.flush()
        self._inline = self._paragraph = None
        return out

    def _close_all(self, lists: bool = True) -> str:
        out = self._finish_table() if self._table else ""
        out += self._close()
        if lists:
            self._items.clear()
        return out

    def _quoted(self, line: str) -> tuple[int, int]:
        """How many marks of quotations a line begins with, and where they end."""
        depth = at = 0
        while match := QUOTE.match(line, at):
            depth, at = depth + 1, match.end()
            if self._block and depth == self._depth:
                break
        return (0, 0) if self._block and not self._depth else (depth, at)

    def _dressed(self, text: str) -> str:
        """No style goes on from one line to the next: what is written below, by whomever, would have it, too."""
        if "\n" not in text and "\x1b" not in text:
            return text
        parts = PARTS.split(text)
        for n in range(1, len(parts), 2):
            if parts[n][0] != "\n":
                self._style = "" if parts[n] == palette.PLAIN else parts[n]
                continue
            line = parts[n]
            if "│" in line:
                line = "\n" + self._palette.dress(line[1:], palette.DIM)
            parts[n] = f"{palette.PLAIN}{line}{self._style}" if self._style else line
        return "".join(parts)

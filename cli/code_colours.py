"""Code in colour, line after line as it comes; what pygments does not know stays plain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ms4.cli import palette

if TYPE_CHECKING:
    from pygments.lexer import Lexer

WINDOW = 24  # lines that are looked at again, at most: a comment or a string may have begun in one
LONGEST = 2000  # characters of a line; a longer one is data
STYLES = {  # by the names of pygments' types, the longest that fits
    "Comment": palette.DIM | palette.ITALIC,
    "Keyword": palette.KEYWORD,
    "Operator.Word": palette.KEYWORD,
    "Literal.String": palette.STRING,
    "Literal.Number": palette.NUMBER,
    "Name.Builtin": palette.NAME,
    "Name.Function": palette.NAME,
    "Name.Class": palette.NAME,
    "Name.Decorator": palette.NAME,
    "Name.Tag": palette.KEYWORD,
    "Name.Attribute": palette.NAME,
    "Generic.Deleted": palette.WRONG,
    "Generic.Inserted": palette.STRING,
    "Generic.Heading": palette.BOLD,
    "Generic.Subheading": palette.NAME,
}


def lexer_for(language: str) -> Lexer | None:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    if not language:
        return None
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


class CodeColours:
    """One block of code.  Each line is coloured once, and costs at most WINDOW lines."""

    def __init__(self, language: str, colours: palette.Palette) -> None:
        self._palette = colours
        self._lexer = lexer_for(language)
        self._styles: dict[object, int] = {}
        self._open: list[str] = []  # the lines before, as far as this one may belong to something in them

    def line(self, text: str) -> str:
        if self._lexer is None or len(text) > LONGEST:
            return text
        before = "".join(self._open)
        out: list[str] = []
        at, last = 0, ""
        for kind, part in self._lexer.get_tokens(f"{before}{text}\n"):
            skipped = max(len(before) - at, 0)
            at += len(part)
            part = part[skipped:].rstrip("\n")
            if part:
                out.append(self._palette.dress(part, self._style(kind)))
                last = str(kind) if part.strip() else last
        whole = at == len(before) + len(text) + 1
        within = "Comment" in last or "String" in last or (not last and bool(self._open))
        self._open = [*self._open, f"{text}\n"][-WINDOW:] if within else []
        return "".join(out) if whole else text  # a lexer that changes the text has no say

    def _style(self, kind: object) -> int:
        style = self._styles.get(kind)
        if style is None:
            name = str(kind).removeprefix("Token.")
            fits = [known for known in STYLES if name == known or name.startswith(f"{known}.")]
            style = self._styles[kind] = STYLES[max(fits, key=len)] if fits else 0
        return style

"""The styles of a rendered answer, as escape sequences that set all of a style at once.

The colours are legible on black and on white alike, so nobody has to be asked which it is: at least 3.5 to 1 on both,
by the formula of WCAG.  A terminal that knows only 16 colours gives its own, which its theme has chosen.
"""

from __future__ import annotations

import os

BOLD, ITALIC, STRUCK, UNDERLINED, DIM, CODE, HEADING, NAME, STRING, NUMBER, KEYWORD, WRONG = (1 << n for n in range(12))
PLAIN = "\x1b[0m"
ATTRIBUTES = {BOLD: "1", DIM: "2", ITALIC: "3", UNDERLINED: "4", STRUCK: "9"}
MANY = {CODE: 30, HEADING: 27, NAME: 27, STRING: 28, NUMBER: 30, KEYWORD: 164, WRONG: 160}  # of 256
FEW = {CODE: 36, HEADING: 34, NAME: 34, STRING: 32, NUMBER: 36, KEYWORD: 35, WRONG: 31}  # escape codes of the 16


def has_many() -> bool:
    """True if the terminal says that it knows 256 colours."""
    term = os.environ.get("TERM", "")
    return "256" in term or bool(os.environ.get("COLORTERM")) or term.startswith(("xterm-", "alacritty", "foot"))


class Palette:
    def __init__(self, many: bool | None = None) -> None:
        self.many = has_many() if many is None else many
        self._known = {0: PLAIN}

    def begin(self, style: int) -> str:
        """The sequence that ends every other style and begins this one."""
        known = self._known.get(style)
        if known is None:
            codes = [code for bit, code in ATTRIBUTES.items() if style & bit]
            if self.many:
                codes += [f"38;5;{colour}" for bit, colour in MANY.items() if style & bit][:1]
            else:
                codes += [str(code) for bit, code in FEW.items() if style & bit][:1]
            known = self._known[style] = f"\x1b[0;{';'.join(codes)}m"
        return known

    def dress(self, text: str, style: int) -> str:
        """One line, or a part of one, in a style."""
        return f"{self.begin(style)}{text}{PLAIN}" if text and style else text

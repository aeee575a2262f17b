"""What stands in a line of Markdown (emphasis, code, links), as styled text, and as soon as it is certain.

markdown-it parses; here is only the question how much of a text that is still coming can be parsed for good.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from ms4.cli import palette

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

HELD = 400  # characters that are held for an emphasis to end; longer ones are taken as they are written
SPECIAL = re.compile(r"[*_`\[<&\\~$!]")
# In text that the parser left as it was: what a later part of the paragraph may give a meaning.
OPEN = re.compile(
    r"`|\$\$|\\[(\[]"
    r"|\*+(?=[^\W_])|(?<![^\W_]|\*)\*+(?=[^\s*])|(?<!\w)_+(?=[^\s_])|~~(?=[^\W_])|(?<![^\W_]|~)~~(?=[^\s~])"
    r"|\[[^\]]*\Z|\]\([^)]*\Z"
)
MATH = re.compile(r"\\\(.+?\\\)|\\\[.+?\\\]|\$\$.+?\$\$|\$(?![\s$])[^$\n]*[^\s$]\$(?!\d)", re.DOTALL)
STYLES = {"strong": palette.BOLD, "em": palette.ITALIC, "s": palette.STRUCK, "link": palette.UNDERLINED}


def math(state: StateInline, silent: bool) -> bool:
    """A rule of the parser: formulas stay as they are, and keep their backslashes."""
    c = state.src[state.pos]
    if c not in "\\$":
        return False
    match = MATH.match(state.src, state.pos, state.posMax)
    brackets = ("\\(", "\\)", "\\[", "\\]")
    end = match.end() if match else state.pos + 2 if state.src[state.pos : state.pos + 2] in brackets else 0
    if not end:
        return False
    if not silent:
        state.push("math" if match else "text", "", 0).content = state.src[state.pos : end]
    state.pos = end
    return True


@cache
def parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    md = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    md.inline.ruler.before("escape", "math", math)
    return md


def parse(text: str) -> list[Token]:
    """The tokens of a text without blocks; what was escaped is apart from what is text."""
    tokens: list[Token] = []
    md = parser()
    md.inline.parse(text, md, {}, tokens)
    return tokens


def is_open(tokens: Sequence[Token]) -> bool:
    """True if something in these tokens may still become the beginning of an emphasis, of code, a link, a formula."""
    text = []
    for token in tokens:  # what was parsed is written with punctuation, and by that an asterisk beside it is judged
        if token.type == "text":
            text.append(token.content)
        elif not token.type.endswith("_open"):  # of which what is left of its asterisks stands before
            text.append("\n" if token.type.endswith("break") else ".")
    return bool(OPEN.search("".join(text)))


def render(tokens: Sequence[Token], colours: palette.Palette, base: int = 0) -> str:
    out: list[str] = [colours.begin(base)] if base else []
    style, links = base, []

    def put(text: str, more: int) -> None:
        out.append(f"{colours.begin(style | more)}{text}{colours.begin(style)}" if more else text)

    for token in tokens:
        name, _, end = token.type.rpartition("_")
        if token.type in ("softbreak", "hardbreak"):
            out.append("\n")
        elif token.type == "code_inline":
            put(token.content, palette.CODE)
        elif token.type == "image":
            put(f"[image: {token.content}]", palette.ITALIC)
            put(f" ({token.attrGet('src')})", palette.DIM)
        elif name in STYLES and end == "open":
            style |= STYLES[name]
            links += [(str(token.attrGet("href")), len(out))] if name == "link" else []
            out.append(colours.begin(style))
        elif name in STYLES:
            style = style & ~STYLES[name] | base
            out.append(colours.begin(style))
            if name == "link":
                target, begun = links.pop()
                said = "".join(out[begun + 1 : -1])
                if target.removeprefix("mailto:") != said:
                    put(f" ({target})", palette.DIM)
        else:
            out.append(token.content)
    return "".join(out) + (colours.begin(0) if base else "")


class InlineStream:
    """The text of one paragraph: feed() gives what of it is certain, flush() the rest."""

    def __init__(self, colours: palette.Palette, base: int = 0) -> None:
        self._palette = colours
        self._base = base
        self._held = ""

    def feed(self, text: str) -> str:
        self._held += text
        # Whether an asterisk begins or ends something depends on what stands next to it.
        cut = max(self._held.rfind(" "), self._held.rfind("\n")) + 1
        if not cut or not (" " in text or "\n" in text or len(self._held) > HELD):
            return ""
        held, rest = self._held[:cut], self._held[cut:]
        if not self._base and not SPECIAL.search(held):
            self._held = rest
            return held
        tokens = parse(held)
        if is_open(tokens) and len(held) <= HELD:
            return ""
        self._held = rest
        return render(tokens, self._palette, self._base)

    def flush(self) -> str:
        held, self._held = self._held, ""
        return render(parse(held), self._palette, self._base) if held else ""

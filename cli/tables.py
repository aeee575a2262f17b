"""Tables of Markdown: markdown-it takes them apart, rich lays them out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ms4.cli import palette
from ms4.cli.inline import parser, render
from ms4.cli.wrap import Paragraph

if TYPE_CHECKING:
    from markdown_it.token import Token

LEAST = 6  # cells of a column; in a narrower terminal each row becomes a list
GAP = 3  # cells between two columns


def render_table(lines: Sequence[str], width: int, colours: palette.Palette) -> list[str]:
    """The lines on the screen for the lines of a table; those themselves if it is none."""
    tokens = parser().parse("\n".join(line.strip() for line in lines))
    if not tokens or tokens[0].type != "table_open" or tokens[-1].type != "table_close":
        return [*lines]
    rows: list[list[str]] = []
    ends: list[str] = []  # how each cell of the head is aligned
    for n, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            base = palette.BOLD if token.type == "th_open" else 0
            rows[-1].append(render(tokens[n + 1].children or (), colours, base))
            ends += [alignment(token)] if base else []
    if width < len(rows[0]) * LEAST + (len(rows[0]) - 1) * GAP:
        return as_list(rows, width)
    return laid_out(rows, ends, width, colours)


def alignment(token: Token) -> str:
    return str(token.attrGet("style") or "").removeprefix("text-align:") or "left"


def as_list(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """One line for each cell, and more if it is long."""
    out: list[str] = []
    for row in rows[1:]:
        out += ["─"] if out else []
        for name, value in zip(rows[0], row, strict=False):
            words = Paragraph(lambda: width, 0, "  ")
            out += (words.feed(f"{name}: {value}") + words.flush()).split("\n")
    return out or [*rows[0]]


def laid_out(rows: Sequence[Sequence[str]], ends: Sequence[str], width: int, colours: palette.Palette) -> list[str]:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="")
    for name, end in zip(rows[0], ends, strict=True):
        table.add_column(Text.from_ansi(name), justify=end, overflow="fold")  # type: ignore[arg-type]
    for row in rows[1:]:
        table.add_row(*map(Text.from_ansi, row))
    console = Console(
        file=io.StringIO(),
        width=width,
        color_system="256" if colours.many else "standard",
        force_terminal=True,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().rstrip("\n").split("\n")]

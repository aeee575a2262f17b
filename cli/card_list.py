"""`--gpu list` and `--memory list`: the cards and memories of models/cards.toml, each with its source and date."""

from __future__ import annotations

from ms4.cli import streams
from ms4.cli.options import LIST
from ms4.models import cards


def shown(card: str, memory: str) -> bool:
    """Prints what was asked for; False: nothing was."""
    if LIST not in (card, memory):
        return False
    rows = card_rows() if card == LIST else memory_rows()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    ends = (str.ljust, *[str.rjust] * (len(widths) - 1))
    lines = []
    for *cells, last in rows:
        padded = [end(cell, width) for end, cell, width in zip(ends, cells, widths, strict=True)]
        lines.append("  ".join([*padded, last]).rstrip() + "\n")
    streams.Output().write("".join(lines))
    return True


def card_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("card", "VRAM", "reads at most", "int8", "bus", "source")]
    for name, card in cards.cards().items():
        row = cards.table()["card"][name]
        rate, peak, bus = f"{row['gb_per_s']} GB/s", f"{row['int8_tops']:.0f} TOPS", f"PCIe {row['bus']}"
        rows.append((name, f"{row['vram_gib']} GiB", rate, peak, bus, f"{card.source}, {card.date}"))
    return rows


def memory_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("memory", "experts are read at", "source")]
    for name, memory in cards.memories().items():
        rows.append((name, f"{memory.rate / 1e9:.0f} GB/s", f"{memory.source}, {memory.date}"))
    return rows

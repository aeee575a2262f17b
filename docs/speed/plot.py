"""The tables of docs/speed.md and its drawing, from the CSV files beside this script: a figure has one home.

    python docs/speed/plot.py

writes the tables anew between the marks of docs/speed.md, and ratios.svg; that needs matplotlib (in the extra "train").
A row of a CSV file is one measurement; docs/speed.md explains its columns.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.with_suffix(".md")
MIXED = "Q4_K and Q6_K"  # the types of a Q4_K_M file
MARK = re.compile(r"(<!-- (\S+) (phases|types|depth) -->\n).*?(<!-- end -->)", re.DOTALL)
MACHINES = (  # file, what the drawing calls it, colour
    ("2026-11-27-intel.csv", "Intel, AVX-512", "#1f5fa8"),
    ("2026-11-27-zen4.csv", "Zen 4, AVX-512", "#c8501e"),
    ("2026-11-28-intel-avx2.csv", "Intel, AVX2 kernels", "#6d8f2f"),
)
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    with open(HERE / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def phase(row: Row) -> str:
    text = f"{row['phase']} {int(row['tokens']):,}"
    if row["after"] != "0":
        text += f" after {int(row['after']):,} tokens"
    return text + (" beside one busy process" if row["busy"] == "1" else "")


def bandwidth(row: Row) -> str:
    low, high = row["bandwidth_low"], row["bandwidth_high"]
    return "" if not low else f"{low} %" if low == high else f"{low} to {high} %"


def table(head: str, numbers: int, lines: list[list[str]]) -> str:
    """A Markdown table whose last `numbers` columns stand to the right; without columns that nobody measured."""
    titles = head.split(" | ")
    rule = ["---"] * (len(titles) - numbers) + ["--:"] * numbers
    kept = [i for i in range(len(titles)) if any(line[i] for line in lines)]
    return "".join(f"| {' | '.join(line[i] for i in kept)} |\n" for line in [titles, rule, *lines])


def phases(name: str) -> str:
    """Files of the types that Q4_K_M has, phase by phase."""
    lines = []
    for row in rows(name):
        if row["experts"] == MIXED and not row["ms"]:
            note = f" ({row['note']})" if row["note"] else ""
            file = f"{row['layers']} layers" + (", AVX2 kernels" if row["kernels"] == "avx2" else "")
            numbers = [row[column] for column in ("rounds", "tok_s", "x_llama", "x_ik")]
            lines.append([file, phase(row) + note, *numbers, bandwidth(row)])
    return table("file | phase | rounds | ms4, tok/s | to llama.cpp | to ik_llama.cpp | of the bandwidth", 5, lines)


def types(name: str) -> str:
    """2 layers whose experts are all of one type."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows(name):
        if row["experts"] != MIXED:
            found.setdefault(row["experts"], {})[row["phase"]] = row
    lines = []
    for kind, by_phase in found.items():
        read, write = by_phase["read"], by_phase["write"]
        ratios = [read["x_llama"], read["x_ik"], write["x_llama"], write["x_ik"]]
        lines.append([kind, read["rounds"], *ratios, bandwidth(write)])
    head = "read 512: to llama.cpp | read 512: to ik | write 32: to llama.cpp | write 32: to ik | of the bandwidth"
    return table(f"experts | rounds | {head}", 6, lines)


def depth(name: str) -> str:
    """What a token costs after how much context."""
    found = [row for row in rows(name) if row["ms"]]
    head = " | ".join(["context, tokens", *(f"{int(row['after']):,}" for row in found)])
    return table(head, len(found), [["a token takes, ms", *(row["ms"] for row in found)]])


def page(text: str) -> str:
    """The page with every table as the CSV files have it."""
    make = {"phases": phases, "types": types, "depth": depth}
    return MARK.sub(lambda m: m[1] + make[m[3]](m[2]) + m[4], text)


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ms4", "font.family": "sans-serif", "font.size": 9}
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    kinds = list(dict.fromkeys(row["experts"] for row in rows(MACHINES[0][0]) if not row["ms"]))
    for axis, (what, title) in zip(axes, (("read", "reading 512 tokens"), ("write", "writing 32 tokens")), strict=True):
        for i, (name, label, colour) in enumerate(MACHINES):
            points = {}
            for row in rows(name):
                if row["phase"] == what and row["layers"] == "2" and row["after"] == row["busy"] == "0" and row["x_ik"]:
                    points.setdefault(row["experts"], float(row["x_ik"]))
            x = [kinds.index(kind) + 0.22 * (i - 1) for kind in points if kind in kinds]
            y = [ratio for kind, ratio in points.items() if kind in kinds]
            axis.vlines(x, 1, y, color=colour, linewidth=1, alpha=0.5)
            axis.plot(x, y, "o", color=colour, markersize=5, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(kinds)), [k.replace(" and ", ",\n") for k in kinds], rotation=45, ha="right")
        axis.set_ylim(0.9, 4)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes[0].set_ylabel("speed, ik_llama.cpp = 1")
    axes[1].legend(frameon=False, loc="upper right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(HERE / "ratios.svg")


if __name__ == "__main__":
    main()

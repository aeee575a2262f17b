"""The drawings of this folder: what ms4 shows on a terminal of 80 columns, from real runs on this machine.

    make screens                        # or: python docs/screens/draw.py [FOLDER]

Every scene is typed into a shell at a pseudo-terminal, where the demonstration checkpoint answers greedily, so a run
differs from the next one in figures (memory, tokens per second) and in nothing else.  The drawings follow the light or
dark theme of who looks at them.  It needs pexpect and pyte (in the extra "dev").
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

import pexpect
import pyte

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COLUMNS, ROWS = 80, 40
PATIENCE = 180.0  # seconds for one thing to come
QUIET = 1.0  # seconds without a change after which a screen stands still
CELL, LINE, MARGIN = 8.4, 18, 14  # pixels: a cell's width, a row's height, what is left free around
PROMPT = "$ "
NOTE = """\
# Spelled backwards

1. take the **last** letter
2. then the one before it

| word   | backwards |
|--------|-----------|
| planet | `tenalp`  |

```python
print("planet"[::-1])
```

Backwards: tenalp"""
STYLE = """\
text{font:14px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:#24292f;white-space:pre}
.screen{fill:#f6f8fa}.dim{fill:#6e7781}.bold{font-weight:bold}.italics{font-style:italic}
.underscore{text-decoration:underline}.strikethrough{text-decoration:line-through}
.reverse{fill:#24292f}.reversed{fill:#f6f8fa}
@media(prefers-color-scheme:dark){text,.reverse{fill:#e6edf3}.screen,.reversed{fill:#161b22}.dim{fill:#8b949e}}"""


class Screen(pyte.Screen):
    """One that knows dim text, too; pyte passes that over."""

    def select_graphic_rendition(self, *attrs: int) -> None:
        super().select_graphic_rendition(*attrs)
        if 2 in attrs and 38 not in attrs:
            self.cursor.attrs = self.cursor.attrs._replace(fg="dim")


class Terminal:
    """A shell at a pseudo-terminal, in a folder of its own, on a machine where ms4 was never used."""

    def __init__(self, folder: Path) -> None:
        shutil.copy(ROOT / "models" / "demo" / "hello.png", folder)
        (folder / "note.md").write_text(NOTE, "utf-8")
        kept = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
        bin = Path(sys.executable).parent
        environment = {**kept, "HOME": str(folder), "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PS1": PROMPT}
        environment |= {"TERM": "xterm-256color", "PYTHONUTF8": "1"}
        self.screen = Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self._process = pexpect.spawn(
            "bash", ["--norc", "--noprofile"], env=environment, cwd=str(folder), dimensions=(ROWS, COLUMNS)
        )
        self._process.delaybeforesend = None
        self.screen.write_process_input = self._process.send  # where the cursor is, when a program asks
        self.sees(re.escape(PROMPT.strip()))

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def read(self, seconds: float) -> bool:
        try:
            self._stream.feed(self._process.read_nonblocking(65536, seconds))
        except pexpect.TIMEOUT:
            return False
        return True

    def sees(self, wanted: str) -> None:
        """Waits until the text of the screen matches, and then until it stands still."""
        end = time.monotonic() + PATIENCE
        while not re.search(wanted, self.text):
            if time.monotonic() > end:
                raise SystemExit(f"{wanted} did not come:\n{self.text}")
            self.read(1)
        before, changed = self.text, time.monotonic()
        while time.monotonic() - changed < QUIET:
            self.read(QUIET / 4)
            if self.text != before:
                before, changed = self.text, time.monotonic()

    def types(self, text: str, wanted: str) -> None:
        self._process.send(text)
        self.sees(wanted)

    def close(self) -> None:
        self._process.close(force=True)


# --- scenes: each leaves the terminal as it is to be drawn


def first_run(terminal: Terminal) -> None:
    terminal.types("ms4\r", r"speed +\w")


def chat(terminal: Terminal) -> None:
    leaves, asks = r"leaves\n+>", r"effort {}\n+>"
    terminal.types("ms4 chat --greedy\r", leaves)
    terminal.types("@hello.png Read the text.\r", f"Hello, ms4!(.|\n)*{asks.format('none')}")
    terminal.types("/new\r", r"a new conversation\n+>")
    terminal.types("/effort high\r", r"effort high.*\n+>")
    terminal.types("4711 + 238 = ?\r", f"4949\n(.|\n)*{asks.format('high')}")


def markdown(terminal: Terminal) -> None:
    terminal.types('ms4 run --greedy --prefill "$(cat note.md)" "Reverse the word planet."\r', r"Backwards:(.|\n)*\n\$")


SCENES: dict[str, Callable[[Terminal], None]] = {"first-run": first_run, "chat": chat, "markdown": markdown}


# --- drawing


def colour(name: str) -> str:
    """What pyte calls a colour, as SVG has it; "" for the usual one."""
    named = {"black": "#000", "red": "#c00", "green": "#080", "brown": "#a60", "blue": "#05f", "magenta": "#a0a"}
    named |= {"cyan": "#088", "white": "#888", "default": "", "dim": ""}
    name = name.replace("bfightmagenta", "brightmagenta")  # as pyte spells it
    return named.get(name.removeprefix("bright"), f"#{name}") if name != "brightblack" else "#777"


def runs(row: dict[int, pyte.screens.Char]) -> Iterator[tuple[int, int, pyte.screens.Char, str]]:
    """(first cell, cells, how they look, text) of what stands in a row; blanks that look like nothing are left out."""
    cells = [(x, row[x]) for x in range(COLUMNS)]
    for look, members in groupby(cells, lambda cell: cell[1]._replace(data="")):
        same = list(members)
        text = "".join(char.data for _, char in same)
        plain = not (look.reverse or look.underscore)
        lead = len(text) - len(text.lstrip(" ")) if plain else 0
        text = text.strip(" ") if plain else text
        if text:
            n = len(same) - lead - (len(same) - lead - cells_of(text) if plain else 0)
            yield same[0][0] + lead, n, look, text


def cells_of(text: str) -> int:
    return sum(pyte.screens.wcwidth(letter) for letter in text)


def drawing(screen: pyte.Screen) -> str:
    """The rows of a screen down to the last that is not empty, as SVG."""
    used = max((y for y in range(screen.lines) if screen.display[y].strip()), default=0) + 1
    width, height = COLUMNS * CELL + 2 * MARGIN, used * LINE + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}" '
        f'viewBox="0 0 {width:g} {height}">',
        f"<style>{STYLE}</style>",
        f'<rect class="screen" width="{width:g}" height="{height}" rx="8"/>',
    ]
    for y in range(used):
        spans, top = [], MARGIN + y * LINE
        for x, n, look, text in runs(screen.buffer[y]):
            left = f"{MARGIN + x * CELL:.1f}".removesuffix(".0")
            long = f"{n * CELL:.1f}".removesuffix(".0")
            names = [name for name in ("bold", "italics", "underscore", "strikethrough") if getattr(look, name)]
            names += ["dim"] if look.fg == "dim" else []
            if look.reverse:
                lines.append(f'<rect class="reverse" x="{left}" y="{top}" width="{long}" height="{LINE}"/>')
                names.append("reversed")
            kind = f' class="{" ".join(names)}"' if names else ""
            fill = f' style="fill:{colour(look.fg)}"' if colour(look.fg) and not look.reverse else ""
            spans.append(f'<tspan x="{left}" textLength="{long}"{kind}{fill}>{escape(text)}</tspan>')
        if spans:
            lines.append(f'<text y="{top + 13}">{"".join(spans)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def words(svg: str) -> list[str]:
    """The lines of a drawing, with # for figures: what stays the same from one machine to another."""
    rows = re.findall(r"<text .*?</text>", svg)
    return [re.sub(r"[\d.,]*\d", "#", " ".join(re.findall(r">([^<]+)<", row))) for row in rows]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in SCENES.items():
        with tempfile.TemporaryDirectory() as home:
            terminal = Terminal(Path(home))
            try:
                scene(terminal)
            finally:
                terminal.close()
        (folder / f"{name}.svg").write_text(drawing(terminal.screen), "utf-8")
        print(f"{folder / name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else HERE)

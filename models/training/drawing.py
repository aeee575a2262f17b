"""Pictures of one line of text, for training the tower and for measuring how well it reads.

It owns the fonts, the random texts, which texts are held out, and where in a picture each character stands.  It
draws with Pillow and hands out pixels through `ms4.models.image`, so that what is learned is what is later seen.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from ms4.models.image import Image, preprocess

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageFont import FreeTypeFont

CELL = 28  # pixels along a side of one image token
CHARS = " " + string.ascii_letters + string.digits + string.punctuation
SIZES = range(18, 29)
LENGTHS = range(2, 13)
HELD_OUT = 16  # one text of so many is never trained on
# What is hard to read: characters that look like others, small letters, and the fonts in which the two meet.
ALIKE = "IIIlll1|!ijJtfO0oQG6C{}()[]<.,;:'\"`*^-_~=+vVwWxXzZsScCkKuUpPyYrnm8B9g&%\\/"
HARD_SIZES = range(18, 21)
HARD_FONTS = ("Lato", "Roboto Slab", "Aileron")

# name: (package on PyPI that brings the file, its path there, how often it is drawn).  DejaVu is under the Bitstream
# Vera licence, Lato under the OFL, Roboto Slab under Apache 2.0, Aileron (inside Pillow) is CC0: all of them free.
FONTS = {
    "DejaVu Sans": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf", 4),
    "DejaVu Sans Bold": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf", 2),
    "DejaVu Sans Mono": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono.ttf", 2),
    "DejaVu Serif": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif.ttf", 2),
    "Lato": ("sphinx_rtd_theme", "static/fonts/Lato/lato-regular.ttf", 2),
    "Roboto Slab": ("sphinx_rtd_theme", "static/fonts/RobotoSlab/roboto-slab-v7-regular.ttf", 2),
    "Aileron": ("PIL", "", 2),
}
SYSTEM_FONTS = Path("/usr/share/fonts/truetype/dejavu")


@dataclass(frozen=True)
class Style:
    """How a line looks: the font, its size in pixels, and the two colours."""

    font: str
    size: int
    ink: tuple[int, int, int] = (0, 0, 0)
    paper: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True, eq=False)
class Line:
    """A picture, its text, and for every character the token (row by row) in which it is to be read."""

    text: str
    picture: Picture
    cells: tuple[int, ...]

    @property
    def pixels(self) -> np.ndarray:
        """float32 [3, 28 * rows, 28 * columns], as the tower takes them."""
        return preprocess(Image("line", self.picture, b"")).array


# --- fonts --------------------------------------------------------------------------------------------------------


def font_path(name: str) -> Path | None:
    """The file of a font, or None if the package that brings it is not installed."""
    package, file, _ = FONTS[name]
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    for path in (folder and folder / file, SYSTEM_FONTS / Path(file).name):
        if file and path and path.is_file():
            return path
    return None


@cache
def load_font(name: str, size: int) -> FreeTypeFont:
    """Basic layout, so that a line looks the same whether or not Pillow finds Raqm."""
    from PIL import ImageFont

    if name == "Aileron":
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("this Pillow was built without FreeType")
        return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    path = font_path(name)
    if path is None:
        raise FileNotFoundError(f"font {name}: pip install --no-deps {FONTS[name][0].replace('_', '-')}")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def installed_fonts() -> list[str]:
    return [name for name in FONTS if name == "Aileron" or font_path(name)]


@cache
def _cap_height(name: str, size: int) -> int:
    return -int(load_font(name, size).getbbox("H", anchor="ls")[1])


# --- texts --------------------------------------------------------------------------------------------------------


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT == 0


def random_text(rng: Random, length: int) -> str:
    """Random characters, now and then with a space among them."""
    text = random_characters(rng, length)
    if length >= 5 and rng.random() < 0.2:
        at = rng.randrange(1, length - 1)
        text = f"{text[:at]} {text[at + 1 :]}"
    return text


def random_characters(rng: Random, length: int) -> str:
    """Characters, now of all kinds, now of one, so that no text is likelier than its look."""
    kind = rng.random()
    if kind < 0.5:
        pools = [string.ascii_lowercase] * 5 + [string.ascii_uppercase] * 4 + [string.digits] * 4
        return "".join(rng.choice(rng.choice([*pools, *[string.punctuation] * 4])) for _ in range(length))
    if kind < 0.6:
        return "".join(rng.choice(CHARS[1:]) for _ in range(length))
    if kind < 0.75:
        return "".join(rng.choice(string.ascii_letters + string.digits) for _ in range(length))
    if kind < 0.85:
        return "".join(rng.choice(string.digits * 3 + "+-*/=.,:%()$") for _ in range(length))
    case = rng.choice((str.lower, str.upper, str.capitalize))
    text = case("".join(rng.choice(string.ascii_lowercase) for _ in range(length)))
    if length >= 5 and rng.random() < 0.5:
        at = rng.randrange(2, length - 2)
        text = text[:at] + rng.choice("  .,:;-_'!?&@") + text[at + 1 :]
    return text[:-1] + rng.choice(".,!?:;") if rng.random() < 0.25 else text


def with_alike(rng: Random, text: str) -> str:
    """The text with some of its characters replaced by such as are taken for others, and some of those doubled."""
    chars = [rng.choice(ALIKE) if char != " " and rng.random() < 0.4 else char for char in text]
    for i in range(1, len(chars)):
        if rng.random() < 0.06 and chars[i] != " " != chars[i - 1]:
            chars[i] = chars[i - 1]
    return "".join(chars)


# --- pictures -----------------------------------------------------------------------------------------------------


def random_style(rng: Random, fonts: Sequence[str], largest: int = SIZES[-1]) -> Style:
    font = rng.choices(fonts, [FONTS[name][2] for name in fonts])[0]
    dark, light = (0, 0, 0), (255, 255, 255)
    if rng.random() < 0.5:
        dark, light = (tuple(rng.randint(*ends) for _ in range(3)) for ends in ((0, 90), (165, 255)))  # type: ignore
    ink, paper = (dark, light) if rng.random() < 0.6 else (light, dark)
    return Style(font, rng.randint(SIZES[0], largest), ink, paper)


def harder(rng: Random, fonts: Sequence[str], style: Style, text: str) -> tuple[Style, str]:
    """A smaller size, a harder one of the fonts, characters that look alike; each more often than not."""
    if rng.random() < 0.6:
        style = replace(style, size=rng.choice(HARD_SIZES))
    hard_fonts = [name for name in fonts if name in HARD_FONTS]
    if hard_fonts and rng.random() < 0.6:
        style = replace(style, font=rng.choice(hard_fonts))
    return style, with_alike(rng, text) if rng.random() < 0.6 else text


def draw_line(text: str, style: Style, size: tuple[int, int], at: tuple[float, float]) -> Line:
    """The text in a picture of `size` pixels; `at` is the left end of its baseline."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    font = load_font(style.font, style.size)
    picture = Pillow.new("RGB", size, style.paper)
    ImageDraw.Draw(picture).text(at, text, style.ink, font, anchor="ls")
    columns, rows = (-(-side // CELL) for side in size)
    # The token row in which the capitals begin gets the whole line; a character belongs to the column of its middle.
    row = int((at[1] - _cap_height(style.font, style.size)) * rows // size[1])
    ends = [at[0] + font.getlength(text[:i]) for i in range(len(text) + 1)]
    middles = [(a + b) / 2 * columns / size[0] for a, b in zip(ends, ends[1:], strict=False)]
    row = min(max(row, 0), rows - 1)
    return Line(text, picture, tuple(row * columns + min(max(int(x), 0), columns - 1) for x in middles))


def random_line(
    rng: Random,
    columns: int,
    rows: int,
    lengths: Sequence[int] = LENGTHS,
    *,
    fonts: Sequence[str] = (),
    held_out: bool = False,
    odd_sizes: float = 0.0,
    hard: float = 0.0,
) -> Line:
    """A line that fits into columns x rows tokens.

    With the probability odd_sizes the picture is not made of whole tokens, so that it is resized on its way in; with
    the probability hard it is small, or in a hard font, or of characters that look like others, or all of these.
    """
    fonts = fonts or installed_fonts()
    while True:
        width, height = columns * CELL, rows * CELL
        if rng.random() < odd_sizes:
            width, height = width - rng.randrange(CELL), height - rng.randrange(CELL // 2) * (rows > 1)
        style = random_style(rng, fonts, SIZES[-1] if rows > 1 else 24)
        text = random_text(rng, rng.choice(lengths))
        if hard and rng.random() < hard:
            style, text = harder(rng, fonts, style, text)
        font = load_font(style.font, style.size)
        while len(text) > 2 and font.getlength(text) > width - 2:
            text = text[:-1]
        if len(text) < lengths[0] or text != text.strip() or is_held_out(text) != held_out:
            continue
        left, top, right, bottom = font.getbbox(text, anchor="ls")
        if right - left > width or bottom - top > height:
            continue
        x, y = rng.randint(int(-left), int(width - right)), rng.randint(int(-top), int(height - bottom))
        part = rng.random() if rng.random() < 0.3 else 0.0
        return draw_line(text, style, (width, height), (min(x + part, width - right), y))

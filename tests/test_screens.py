"""The drawings of terminals in docs/screens: small, whole, and what ms4 shows today but for figures."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pyte
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "screens"
MOST_BYTES = 60_000
DRAWN = sorted(path.name for path in FOLDER.glob("*.svg"))
script = runpy.run_path(str(FOLDER / "draw.py"))


def test_every_scene_is_drawn_and_the_readme_shows_one():
    assert DRAWN == sorted(f"{name}.svg" for name in script["SCENES"])
    shown = re.findall(r"!\[[^\]]+\]\(docs/screens/([\w-]+\.svg)\)", (ROOT / "README.md").read_text("utf-8"))
    assert shown and {*shown} <= {*DRAWN}


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawing_is_small_and_no_wider_than_the_terminal(name):
    text = (FOLDER / name).read_text("utf-8")
    assert len(text.encode()) < MOST_BYTES and "\x1b" not in text
    root = ElementTree.fromstring(text)
    width = float(root.get("width"))
    spans = root.findall(".//{http://www.w3.org/2000/svg}tspan")
    assert spans and all(float(span.get("x")) + float(span.get("textLength")) < width for span in spans)


@pytest.mark.parametrize("name", DRAWN)
def test_every_colour_is_one_that_svg_has(name):
    colours = re.findall(r"fill:([^;}\"]+)", (FOLDER / name).read_text("utf-8"))
    assert colours and all(re.fullmatch(r"#([0-9a-f]{3}|[0-9a-f]{6})", colour) for colour in colours), colours


def test_bright_colours_have_a_name_of_their_own():
    bright = {script["colour"](name) for name in pyte.graphics.FG_AIXTERM.values()}
    assert all(re.fullmatch(r"(#[0-9a-f]{3}|)", colour) for colour in bright), bright


@pytest.mark.slow
def test_the_script_draws_what_is_there(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MS4_", "XDG_"))}
    command = [sys.executable, str(FOLDER / "draw.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in DRAWN:
        kept, made = (script["words"]((folder / name).read_text("utf-8")) for folder in (FOLDER, tmp_path))
        if name == "first-run.svg":  # it is about the machine
            kept, made = ([line.split()[0] for line in lines] for lines in (kept, made))
            kept, made = ([word for word in words if word not in ("p", "d,", "p,")] for words in (kept, made))
        assert made == kept

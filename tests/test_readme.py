"""The commands of the README and of `ms4 --help`, run as they are printed, where the files are that they name."""

import os
import re
import subprocess
from pathlib import Path

import demo
import pytest
from bad_hub import Hub
from PIL import Image as Pillow
from test_document import TEXT, pdf

from ms4.cli import start
from ms4.models import repositories

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = 20
# What the shell must have run, if a block has one of these lines.
COMMAND = re.compile(r"(ms4|git diff|curl|export) ")


def commands():
    """The blocks of the README that are commands of ms4, and those at the top of its help."""
    found = [block for block in demo.blocks(README) if COMMAND.match(block)]
    return [*found, "".join(re.findall(r"^  ((?:ms4|git) .*\n)", start.HELP, re.MULTILINE))]


def test_a6_the_readme_and_make_demo_are_of_one_piece():
    assert len(commands()) >= 4 and len(demo.examples()) == 3
    assert not [line for block in commands() for line in block.splitlines() if not COMMAND.match(line)]
    targets = set(re.findall(r"^make +([a-z-]+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "demo" in targets and all(re.search(rf"^([a-z-]+ )*{name}( [a-z-]+)*:", makefile, re.M) for name in targets)


@pytest.fixture(scope="module")
def hub():
    """The address of a hub that has the demonstration where the model is."""
    demonstration = ROOT / "models" / "demo" / "ms4-demo.gguf"
    with Hub({"Model-Q4_K_M.gguf": demonstration.read_bytes()}, repo=repositories.REPOSITORIES[0].repo) as server:
        yield server.url


@pytest.fixture(scope="module")
def world(tmp_path_factory, hub):
    """The folder that the README speaks of, and an environment: a model that is the demonstration, a repository with a
    change, a curl that fetches nothing from anywhere."""
    folder = tmp_path_factory.mktemp("world")
    picture = ROOT / "models" / "demo" / "hello.png"
    (folder / "models").symlink_to(ROOT / "models")
    for name in ("", "-mmproj"):
        (folder / f"model{name}.gguf").symlink_to(ROOT / "models" / "demo" / f"ms4-demo{name}.gguf")
    (folder / "invoice.png").symlink_to(picture)
    for name in ("a.jpg", "b.jpg"):
        with Pillow.open(picture) as image:
            image.convert("RGB").save(folder / name)
    (folder / "report.pdf").write_bytes(pdf(*[TEXT] * 7))
    bin = folder / "bin"
    bin.mkdir()
    (bin / "curl").write_text(f"#!/bin/sh\nexec cat {picture}\n")
    (bin / "curl").chmod(0o755)
    environment = {"PATH": f"{bin}:{demo.PATH}", "HOME": str(folder), "XDG_STATE_HOME": os.environ["XDG_STATE_HOME"]}
    environment["HF_ENDPOINT"] = hub
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b"]
    (folder / "notes.txt").write_text("one\n")
    for command in (["init", "-q"], ["add", "notes.txt"], ["commit", "-qm", "notes"]):
        subprocess.run([*git, *command], cwd=folder, env=environment, check=True)
    (folder / "notes.txt").write_text("two\n")
    return folder, environment


@pytest.mark.slow
@pytest.mark.parametrize("block", commands(), ids=lambda block: block.partition("\n")[0])
def test_a6_every_command_of_the_readme_runs(block, world):
    """The demonstration has not learned what the real model is asked: its answer may be anything but a failure."""
    folder, environment = world
    script = f"set -e -o pipefail\n{block}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0 and "error" not in done.stderr, (done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("command, answer", demo.examples())
def test_a6_every_run_of_an_example_gives_the_answer_that_stands_there(command, answer, world):
    folder, environment = world
    for _ in range(RUNS):
        done = subprocess.run(
            ["sh", "-c", command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, f"{answer}\n")

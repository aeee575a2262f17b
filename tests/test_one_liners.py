"""What is typed in shells, and its exact stdout, stderr and exit code (tests/data/one-liners.json).

Each stands for a promise to scripts.  `python tests/test_one_liners.py` writes what comes out now into the file: read
the difference before it is committed.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "data" / "one-liners.json"
LINES = json.loads(FILE.read_text(encoding="utf-8"))
ENTRY = [sys.executable, "-c", "import sys; from ms4.cli.start import main; sys.exit(main())"]


def world(folder):
    """The environment: the demonstration is the model, and nothing else is there."""
    kinds = {f"XDG_{kind}_HOME": str(folder / kind) for kind in ("CACHE", "STATE", "DATA", "CONFIG")}
    kinds |= {"HF_HUB_CACHE": "/nowhere/hub", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    return {**kinds, "MS4_MODEL": "ms4-demo.gguf", "HOME": str(folder)}


def words(row):
    """The arguments of a line; what is piped into it is its `stdin`."""
    return shlex.split(row["line"])[1:]


@pytest.fixture
def typed(ms4, monkeypatch, tmp_path):
    """What a line gives in this process."""
    for name, value in world(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT / "models" / "demo")
    return lambda row: ms4(*words(row), stdin=row.get("stdin", "").encode())


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row["line"], marks=[pytest.mark.slow] if row.get("model") else []) for row in LINES],
)
def test_what_a_line_prints_is_what_it_always_printed(typed, row):
    assert typed(row) == (row["code"], row["out"], row["err"])


def in_a_process(row, folder):
    """What a line gives in a process of its own."""
    done = subprocess.run(
        [*ENTRY, *words(row)],
        env={**os.environ, **world(folder)},
        input=row.get("stdin", "").encode(),
        cwd=ROOT / "models" / "demo",
        capture_output=True,
    )
    return {"code": done.returncode, "out": done.stdout.decode(), "err": done.stderr.decode()}


@pytest.mark.slow
def test_a_process_of_its_own_prints_the_same(tmp_path):
    for row in [row for row in LINES if row.get("model")][:4]:
        assert in_a_process(row, tmp_path) == {name: row[name] for name in ("code", "out", "err")}


def test_there_are_enough_of_them_for_every_exit_code():
    assert len(LINES) >= 40 and {0, 2, 3, 5, 6, 7} <= {row["code"] for row in LINES}
    assert len({row["line"] + row.get("stdin", "") for row in LINES}) == len(LINES)


def write(folder):
    """Runs every line as a process and keeps what it gives."""
    for row in LINES:
        row |= in_a_process(row, folder)
    FILE.write_text(json.dumps(LINES, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        write(Path(place))

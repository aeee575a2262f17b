"""The thread pool alone, as tests/checkpool.c tries it: workers that give way after each item, and after a while."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("tests/checkpool.c", "csrc/memory.c", "csrc/error.c")
WARNINGS = ("-Wall", "-Wextra", "-Werror")


@pytest.mark.parametrize("runs", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("turn", [["-DTURN_NS=0"], []], ids=["leaving at once", "leaving after a turn"])
def test_every_item_is_done_once(tmp_path, turn, runs):
    program = tmp_path / "checkpool"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [
        *compiler,
        "-std=gnu11",
        "-O2",
        *WARNINGS,
        *turn,
        f"-DN_RUNS={runs}",
        "-Icsrc",
        *SOURCES,
        "-pthread",
        "-o",
        str(program),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n")

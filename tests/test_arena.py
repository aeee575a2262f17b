"""Memory that is pinned where it lies (csrc/cuda/arena.c), alone."""

import subprocess

import pytest
from test_stream import compiled

SOURCES = ("tests/checkarena.c", "csrc/cuda/arena.c", "csrc/memory.c", "csrc/error.c")


@pytest.mark.slow
def test_what_is_pinned_is_what_is_registered(tmp_path, rng):
    program = compiled(SOURCES, tmp_path / "checkarena", "-Icsrc", "-pthread", "-DARENA_CHUNK=16384")
    done = subprocess.run([program, str(rng.integers(1 << 32)), "30000"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n")

"""Shared fixtures: the seed, and buffers whose end touches an unreadable page."""

import ctypes
import mmap
import os
import shutil
import sys

# The threads of BLAS spin while they wait for one another: with other work on all cores that takes ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Nothing is timed, and fixtures that examples share are fine: models.  The sanitizers take `few`.
# `make test` takes `some`, make test-all `many`.
settings.register_profile("many", max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("some", settings.get_profile("many"), max_examples=10)
settings.register_profile("few", settings.get_profile("many"), max_examples=4)
settings.load_profile("many")


def examples(n):
    """The examples of a test that wants n of them where others get 25 (`many`); as much fewer in other profiles."""
    return n * settings.default.max_examples // 25


SEED = int(os.environ.get("MS4_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
_libc = ctypes.CDLL(None, use_errno=True)
_keep = []


def pytest_report_header():
    return f"random input: MS4_TEST_SEED={SEED}"


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory):
    """What ms4 remembers between calls is not written into the folder of who runs the tests."""
    for name in ("CONFIG", "STATE", "DATA", "CACHE"):
        os.environ[f"XDG_{name}_HOME"] = str(tmp_path_factory.mktemp(name.lower()))


@pytest.fixture(autouse=True)
def nothing_read_before():
    """The kv caches that one test has left are not there for the next."""
    yield
    shutil.rmtree(os.path.join(os.environ["XDG_CACHE_HOME"], "ms4", "kv"), ignore_errors=True)


@pytest.fixture
def rng(request):
    return np.random.default_rng([SEED, *request.node.name.encode()])


@pytest.fixture
def guarded():
    """guarded(array) -> copy whose last byte is followed by a page that faults when touched."""

    def place(array):
        pages = -(-array.nbytes // mmap.PAGESIZE)
        m = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        _keep.append(m)
        base = np.frombuffer(m, np.uint8)
        end = base.ctypes.data + pages * mmap.PAGESIZE
        assert _libc.mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
        start = pages * mmap.PAGESIZE - array.nbytes
        view = base[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        view[...] = array
        return view

    return place


@pytest.fixture
def ms4(monkeypatch):
    """ms4(arguments..., stdin=bytes, terminal=names of streams) -> (exit code, stdout, stderr), in this process."""
    from standins import Stream

    from ms4.cli import start

    for name in [n for n in os.environ if n.startswith("MS4_") and n != "MS4_ISA"]:
        monkeypatch.delenv(name)

    def run(*arguments, stdin=b"", terminal=()):
        made = {
            name: Stream(stdin if name == "stdin" else b"", name in terminal) for name in ("stdin", "stdout", "stderr")
        }
        for name, stream in made.items():
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["ms4", *map(str, arguments)])
        code = start.main()
        return code, *(made[name].buffer.getvalue().decode() for name in ("stdout", "stderr"))

    return run

"""What the engine and the emulated driver believe of the CUDA driver, beside NVIDIA's header where there is one."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("prototypes", ROOT / "tests" / "cuda" / "prototypes.py")
prototypes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prototypes)
CUDA_H = prototypes.header()
pytestmark = pytest.mark.skipif(not CUDA_H or not shutil.which("g++"), reason="needs cuda.h and g++")


def test_calls_structs_and_numbers_are_those_of_cuda_h():
    assert prototypes.compile_with(CUDA_H) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "right, wrong, said",
    [
        ("cuMemAlloc, cuMemAlloc_v2,", "cuMemAlloc, cuMemAlloc,", "cuMemAlloc"),
        ("(CUgraphExec *, CUgraph, unsigned long long)", "(CUgraphExec *, CUgraph, unsigned)", "cuGraphInstantiate"),
        ("(CUstream, CUevent, unsigned)", "(CUstream, CUevent)", "cuStreamWaitEvent"),
        ("unsigned grid[3], block[3], shared;", "unsigned grid[3], shared, block[3];", "shared"),
        ("CU_MEMHOSTREGISTER_READ_ONLY = 8", "CU_MEMHOSTREGISTER_READ_ONLY = 4", "READ_ONLY"),
    ],
)  # fmt: skip
def test_a_wrong_belief_shows(right, wrong, said):
    ours = (ROOT / "csrc" / "cuda" / "driver.h").read_text()
    assert right in ours
    complaint = prototypes.compile_with(CUDA_H, ours.replace(right, wrong))
    assert "error: " in complaint and said in complaint

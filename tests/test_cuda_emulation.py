"""What the emulated CUDA driver notices: each fault of a kernel or of its user, and nothing in what is allowed.

The kernels are those of tests/cuda/small_kernels.cpp; each program runs as a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SEED

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "build" / "cuda" / "libcuda_small.so"
pytestmark = [pytest.mark.slow, pytest.mark.rare, pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")]


@pytest.fixture(scope="session", autouse=True)
def library(tmp_path_factory):
    lock = ROOT / "build" / "small_kernels.lock"
    lock.parent.mkdir(exist_ok=True)
    make = ["make", "-s", "-f", "tests/cuda/Makefile", "small"]
    subprocess.run(["flock", lock, *make], cwd=ROOT, check=True)


def program(code, **environment):
    """Runs Python that has everything of drive.py; returns the process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MS4_EMU")}
    env |= {"EMULATED": str(LIBRARY), "PYTHONPATH": str(ROOT / "tests" / "cuda"), **environment}
    code = f"from drive import *\nimport numpy as np\nstart()\nx = [float(i) for i in range(256)]\n{code}"
    return subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=120)


def printed(code, **environment):
    done = program(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dies(code, why, **environment):
    done = program(code, **environment)
    assert done.returncode == -6, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("cuda emulation: ")]
    assert len(lines) == 1 and why in lines[0], done.stderr


def over_seeds(code, n=12):
    return {printed(code, MS4_EMU_SEED=str(SEED % 1000 * 20 + i + 1)) for i in range(n)}


# --- kernels


def test_a_missing_barrier_shows_and_a_right_kernel_does_not():
    code = "print(run(b'reverse', x, 256, what={}, threads=256, shared=1024) == x[::-1])"
    assert over_seeds(code.format(0)) == {"True"}
    assert "False" in over_seeds(code.format(1), 4)


def test_shared_memory_is_poisoned_and_has_ends():
    code = "print(run(b'shared_memory', x, 64, what={}, threads=64, shared=256)[:2])"
    assert printed(code.format(0)) == "[0.0, 1.0]"
    assert printed(code.format(3)) == "[nan, nan]"
    dies(code.format(1), "wrote beyond its shared memory")
    dies(code.format(2), "wrote beyond a SHARED array")


def test_threads_that_exit_are_not_waited_for_and_others_are():
    code = "print(run(b'meeting', x, 64, what={}, threads=64)[8:40:31])"
    assert printed(code.format(0)) == "[8.0, 39.0]"
    dies(code.format(1), "waits for ever")


def test_lanes_may_meet_in_parts_but_not_with_different_masks():
    code = "print(run(b'meeting', x, 64, what={}, threads=64)[6:10])"
    assert printed(code.format(4)) == "[6.0, 7.0, 9.0, 8.0]"
    dies(code.format(3), "name different masks")
    dies(code.format(2), "reads from a lane that does not take part")


def test_copies_arrive_when_they_are_waited_for():
    """Groups in order; what has not arrived is poison; the rest of a part is zeros."""
    code = "print([v for v in run(b'copies', x, 96, what={}, shared=1024)[::31]])"
    assert printed(code.format(0)) == "[0.0, 124.0, 120.0, 0.0]"
    assert printed(code.format(1)).startswith("[nan, nan")
    dies(code.format(2), "exits before its cp.async have arrived")


@pytest.mark.parametrize("what, left, right", [(0, "u1", "i1"), (1, "i1", "u1"), (2, "i1", "i1")])
def test_tensor_cores_multiply_matrices(what, left, right):
    rng = np.random.default_rng(SEED)
    a = rng.integers(0, 256, (16, 32), np.uint8)
    b = rng.integers(0, 256, (8, 32), np.uint8)
    code = f"""
values = np.frombuffer(bytes.fromhex("{a.tobytes().hex()}{b.tobytes().hex()}"), "f4")
raw = host(192)
np.frombuffer(raw, "u4")[:] = values.view("u4")
on_x, on_y, y = device(192), device(128), host(128)
up(on_x, raw)
launch(b"tensor", Args(on_x, on_y, 0, {what}))
down(y, on_y)
sync()
print(np.frombuffer(y, "i4").tolist())"""
    if what == 2:  # its two halves are columns 0 to 15 and 16 to 31
        assert left == right == "i1"
    want = a.view(left).astype(int) @ b.view(right).astype(int).T
    assert eval(printed(code)) == want.ravel().tolist()


@pytest.mark.parametrize("transposed", [0, 1])
def test_matrices_are_loaded_as_the_ptx_isa_says(transposed):
    """Lane l has of matrix m the elements 2 (l % 4) and one more of row l / 4; or of the transposed."""
    code = f"""
raw = host(128)
np.frombuffer(raw, "u2")[:] = np.arange(256)
on_x, on_y, y = device(128), device(128), host(128)
up(on_x, raw)
launch(b"matrices", Args(on_x, on_y, 0, {transposed}), shared=512)
down(y, on_y)
sync()
print(np.frombuffer(y, "u2").tolist())"""
    matrices = np.arange(256).reshape(4, 8, 8)
    matrices = matrices.transpose(0, 2, 1) if transposed else matrices
    assert eval(printed(code)) == matrices.ravel().tolist()


# --- memory


def test_kernels_may_not_leave_an_allocation():
    for what in (0, 1):
        dies(f"run(b'touch', x, 64, n=1 << 12, what={what})", "touches")


def test_what_a_kernel_writes_behind_an_allocation_shows_when_it_is_freed():
    code = (
        "y = device(65); x = device(65); launch(b'touch', Args(x, y, 66, 1)); sync(); call('cuMemFree_v2', c_uint64(y))"
    )
    dies(code, "wrote beside this allocation")


def test_the_host_may_not_touch_the_device_and_copies_stay_inside():
    dies("p = device(4); sync(); (c_float * 4).from_address(p)[0]", "the host touches memory of the device")
    dies("up(device(64), host(65))", "a copy leaves its allocation")
    dies("p = device(4); call('cuMemFree_v2', c_uint64(p)); up(p, host(4))", "a copy of what is not allocated")


def test_fresh_memory_is_poison_and_has_a_limit():
    code = "y = host(4); down(y, device(4)); sync(); print(list(y))"
    assert printed(code) == "[nan, nan, nan, nan]"
    with_limit = "\ntry:\n    device(1000); device(1000)\nexcept CudaError as e: print(e)"
    assert printed(with_limit, MS4_EMU_VRAM="6000") == "2"


def test_pinning_has_a_limit_and_wants_memory_that_is_there():
    code = "\ntry:\n    host(1024); host(1024)\nexcept CudaError as e: print(e)"
    assert printed(code, MS4_EMU_PINNED="6000") == "2"
    assert printed("print(LIB.cuMemHostRegister_v2(c_void_p(1 << 20), c_size_t(4096), 0))") == "1"


def test_of_what_only_begins_in_registered_memory_nothing_is_copied():
    code = "import mmap\nm = mmap.mmap(-1, 16384); y = ctypes.addressof((c_float * 4096).from_buffer(m))\n"
    code += "d = device(4096); call('cuMemHostRegister_v2', c_void_p(y), c_size_t(8192), 0)\n"
    code += "print([LIB.cuMemcpyHtoDAsync_v2(c_uint64(d), c_void_p(y), c_size_t(n), None) for n in (8192, 8196)])"
    assert printed(code) == "[0, 1]"


def test_large_memory_is_handed_out_in_pieces_of_2_mib():
    code = "\ntry:\n    [device(n << 18) for n in ({}, {}, {})]; print(0)\nexcept CudaError as e: print(e)"
    assert printed(code.format(2, 4, 2), MS4_EMU_VRAM=str(9 << 20)) == "0"
    assert printed(code.format(3, 3, 2), MS4_EMU_VRAM=str(9 << 20)) == "2"


def test_a_context_ends_with_its_last_user():
    code = "call('cuDevicePrimaryCtxRelease_v2', 0); print(LIB.cuCtxSynchronize())\n"
    code += "made('cuDevicePrimaryCtxRetain', 0); print(LIB.cuCtxSynchronize())"
    assert printed(code).split() == ["201", "201"]


# --- streams


def test_what_is_not_waited_for_shows():
    """The host reads too early; a stream does not wait for another; memory is used again too early."""
    early = "y = host(256); d = device(256); p = host(256); p[:] = x; s = stream()\n"
    early += "up(d, p, s); down(y, d, s){}; print(y[3])"
    assert over_seeds(early.format("; sync(s)")) == {"3.0"}
    assert "nan" in over_seeds(early.format(""))

    other = "p = host(256); p[:] = x; d, y = device(256), device(256); s, t, e = stream(), stream(), event()\n"
    other += "up(d, p, s); call('cuEventRecord', e, s); {}\n"
    other += "launch(b'add_one', Args(d, y, 256, 0), t); q = host(256); down(q, y, t); sync(t); print(q[3])"
    assert over_seeds(other.format("call('cuStreamWaitEvent', t, e, 0)")) == {"4.0"}
    assert "nan" in over_seeds(other.format("pass"))

    again = "p = host(256); p[:] = x; d = device(256); s = stream(); up(d, p, s); {}p[3] = 50; y = host(256)\n"
    again += "down(y, d, s); sync(s); print(y[3])"
    assert over_seeds(again.format("sync(s); ")) == {"3.0"}
    assert "50.0" in over_seeds(again.format(""))


def test_stream_0_waits_for_the_others():
    code = "d, s = device(256), made('cuStreamCreate', 0); p = host(256); p[:] = x; y = host(256)\n"
    code += "up(d, p, s); launch(b'add_one', Args(d, d, 256, 0)); down(y, d, s); sync(s); print(y[3])"
    assert over_seeds(code) == {"4.0"}


def test_streams_wait_for_values():
    code = "f = host(1); s = stream(); y = host(256); d = device(256); p = host(256); p[:] = x\n"
    code += "flag = c_int32.from_buffer(f); flag.value = 0; at = c_uint64(ctypes.addressof(f))\n"
    code += "call('cuStreamWaitValue32_v2', s, at, 7, 1); up(d, p, s); down(y, d, s)\n"
    code += "call('cuStreamWriteValue32_v2', s, at, 9, 0)\n"
    code += "assert LIB.cuStreamQuery(s) == 600; flag.value = 7; sync(s); print(y[3], flag.value)"
    assert over_seeds(code, 4) == {"3.0 9"}


GRAPH = """
d, e, y, p = device(256), device(256), host(256), host(256)
s, t, fork, join = stream(), stream(), event(), event()
p[:] = x
call("cuStreamBeginCapture_v2", s, 0)
up(d, p, s)
call("cuEventRecord", fork, s)
call("cuStreamWaitEvent", t, fork, 0)
launch(b"add_one", Args(d, e, 256, 0), t)
call("cuEventRecord", join, t)
{join}
launch(b"add_one", Args(e, d, 256, 0), s)
down(y, d, s)
graph = c_void_p()
code = LIB.cuStreamEndCapture(s, byref(graph))
if code == 0:
    ready = made("cuGraphInstantiateWithFlags", graph, c_uint64(0))
    out = []
    for k in range(3):
        p[3] = k
        call("cuGraphLaunch", ready, s)
        sync(s)
        out.append(y[3])
    print(out)
else:
    print(code)
"""


def test_captured_graphs_keep_their_order():
    assert over_seeds(GRAPH.format(join="call('cuStreamWaitEvent', s, join, 0)")) == {"[2.0, 3.0, 4.0]"}
    assert printed(GRAPH.format(join="")) == "904"


CHAIN = """
class Node(ctypes.Structure):
    _fields_ = [("f", c_void_p), ("shape", ctypes.c_uint * 7), ("parameters", c_void_p), ("rest", c_void_p * 3)]

def node(x, y):
    global args, pointers
    args = Args(x, y, 256, 0)
    pointers = (c_void_p * 1)(ctypes.addressof(args))
    return byref(Node(kernel(b"add_one"), (1, 1, 1, 32, 1, 1, 0), ctypes.addressof(pointers)))

d, e, y, p, s = device(256), device(256), host(256), host(256), stream()
p[:] = x
graph = made("cuGraphCreate", 0)
first = made("cuGraphAddKernelNode_v2", graph, None, c_size_t(0), node(d, e))
last = made("cuGraphAddKernelNode_v2", graph, {before}, node(e, d))
ready = made("cuGraphInstantiateWithFlags", graph, c_uint64(0))
out = []
for k in range(3):
    up(d, p, s)
    call("cuGraphLaunch", ready, s)
    down(y, d, s)
    sync(s)
    out.append(y[3])
    if k == 1:
        call("cuGraphExecKernelNodeSetParams_v2", ready, last, node(d, d))
{end}
print(out)
"""


def test_graphs_that_are_built_keep_their_order_and_take_other_arguments():
    assert over_seeds(CHAIN.format(before="byref(first), c_size_t(1)", end="")) == {"[5.0, 5.0, 4.0]"}
    assert len(over_seeds(CHAIN.format(before="None, c_size_t(0)", end=""))) > 1


def test_a_graph_is_not_destroyed_before_it_is_done():
    early = "f = host(1); f[0] = 0; call('cuStreamWaitValue32_v2', s, c_uint64(ctypes.addressof(f)), 7, 1)\n"
    early += "call('cuGraphLaunch', ready, s); call('cuGraphExecDestroy', ready)"
    dies(CHAIN.format(before="byref(first), c_size_t(1)", end=early), "a graph is destroyed that is not done")


# --- failures


def test_a_stream_is_not_destroyed_before_it_is_done():
    """Drivers return at once: what comes after may not believe that its work is over."""
    code = "run(b'add_one', x, 256, n=256); s = stream(); up(device(64), host(64), s)\n"
    code += "{}call('cuStreamDestroy_v2', s); print('ok')"
    assert printed(code.format("sync(s); ")) == "ok"
    dies(code.format(""), "a stream is destroyed that is not done", MS4_EMU_LATE="50")


def test_calls_fail_on_demand():
    code = "\ntry:\n    device(4); p = device(4); sync()\nexcept CudaError as e: print(e)"
    assert printed(code, MS4_EMU_FAIL="cuMemAlloc_v2:2") == "2"
    assert printed(code, MS4_EMU_FAIL="cuStreamSynchronize:1:700") == "700"
    assert program("", MS4_EMU_FAIL="1").returncode != 0
    lost = "\nfor _ in range(3):\n    print(LIB.cuStreamSynchronize(None))"
    assert printed(lost, MS4_EMU_FAIL="cuStreamSynchronize:2:lost").split() == ["0", "719", "719"]


def test_a_kernel_that_faults_is_seen_by_later_calls():
    code = "d = device(256); launch(b'add_one', Args(d, d, 256, 0))\n"
    code += "print(LIB.cuCtxSynchronize(), LIB.cuCtxSynchronize())"
    assert printed(code) == "0 0"
    assert printed(code, MS4_EMU_FAIL="kernel:1") == "719 719"


def test_threads_need_a_context_and_launches_room():
    code = "import threading; t = threading.Thread(target=lambda: print(LIB.cuCtxSynchronize())); t.start(); t.join()"
    assert printed(code) == "201"
    code = "\ntry:\n    launch(b'add_one', Args(0, 0, 0, 0), shared=60000)\nexcept CudaError as e: print(e)"
    assert printed(code) == "1"
    code = "f = kernel(b'add_one'); call('cuFuncSetAttribute', f, 8, 60000); "
    assert printed(code + "launch(b'add_one', Args(0, 0, 0, 0), shared=60000); sync(); print('ok')") == "ok"

"""The emulated driver from Python: for small programs that tests run as processes of their own."""

import ctypes
import os
from ctypes import byref, c_float, c_int32, c_size_t, c_uint64, c_void_p
from typing import Any

LIB = ctypes.CDLL(os.environ["EMULATED"])


class Args(ctypes.Structure):
    _fields_ = [("x", c_uint64), ("y", c_uint64), ("n", c_int32), ("what", c_int32)]


class CudaError(Exception):
    pass


def call(name: str, *args: Any) -> None:
    code = getattr(LIB, name)(*args)
    if code:
        raise CudaError(code)


def made(name: str, *args: Any) -> c_void_p:
    """What a call gives by its first argument."""
    out = c_void_p()
    call(name, byref(out), *args)
    return out


def start() -> None:
    call("cuInit", 0)
    call("cuCtxSetCurrent", made("cuDevicePrimaryCtxRetain", 0))


def device(n: int) -> int:
    at = c_uint64()
    call("cuMemAlloc_v2", byref(at), c_size_t(4 * n))
    return at.value


def host(n: int) -> Any:
    """n floats that are pinned."""
    p = made("cuMemHostAlloc", c_size_t(4 * n), 0)
    return (c_float * n).from_address(p.value or 0)


def stream() -> c_void_p:
    return made("cuStreamCreate", 1)


def event() -> c_void_p:
    return made("cuEventCreate", 2)


def kernel(name: bytes) -> c_void_p:
    return made("cuModuleGetFunction", made("cuModuleLoadData", b"code"), name)


def launch(name: bytes, args: Args, on: c_void_p | None = None, threads: int = 32, shared: int = 0) -> None:
    pointers = (c_void_p * 1)(ctypes.addressof(args))
    call("cuLaunchKernel", kernel(name), 1, 1, 1, threads, 1, 1, shared, on, pointers, None)


def up(to: int, of: Any, on: c_void_p | None = None) -> None:
    call("cuMemcpyHtoDAsync_v2", c_uint64(to), of, c_size_t(ctypes.sizeof(of)), on)


def down(to: Any, of: int, on: c_void_p | None = None) -> None:
    call("cuMemcpyDtoHAsync_v2", to, c_uint64(of), c_size_t(ctypes.sizeof(to)), on)


def sync(on: c_void_p | None = None) -> None:
    call("cuStreamSynchronize", on)


def run(name: bytes, x: Any, n_out: int, n: int = 0, what: int = 0, **how: int) -> list[float]:
    """y of a kernel for these floats, or whatever x is made of."""
    pinned, y = host(len(x)), host(n_out)
    pinned[:] = x
    on_x, on_y, on = device(len(x)), device(n_out), stream()
    up(on_x, pinned, on)
    launch(name, Args(on_x, on_y, n, what), on, **how)
    down(y, on_y, on)
    sync(on)
    return list(y)

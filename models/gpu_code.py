"""The kernels for the GPU of this machine: those that came with ms4, or compiled here and kept.

ms4 built where there is no nvcc has no kernels for GPUs, but it has their sources.  NVRTC, NVIDIA's compiler as a
library, makes of them what this one card runs: it comes with the CUDA toolkit, and as a package of pip.  The result is
kept in the cache folder, under a name that stands for the sources, the card and the version of NVRTC.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ms4
from ms4.models import atomic, places
from ms4.quant import grids

PACKAGE = Path(ms4.__file__).parent
# What the sources want of the C library.
DEFINED = "-Doffsetof(type,field)=((unsigned long)&((type *)0)->field)"  # NVRTC has no built-in one
STDINT = """
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long long uint64_t; typedef unsigned long uintptr_t;
"""
OPTIONS = ("-std=c++20", "-default-device", DEFINED, "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
OLDEST = 80
INSTALL = "pip install nvidia-cuda-nvrtc-cu12 installs it, for drivers of CUDA 12 and later"


class CompilerError(ms4.DeviceError):
    """There are no kernels for this card, and they could not be made."""

    def __init__(self, message: str) -> None:
        super().__init__(message, -9)


def built_for(package: Path = PACKAGE) -> tuple[int, ...] | None:
    """The compute capabilities, such as 86, that kernels came along for; None: for all, or nobody says."""
    if not (package / "cuda" / "kernels.fatbin").exists():
        return ()
    try:
        built = (package / "cuda" / "kernels.archs").read_text().strip()
    except OSError:
        return None
    archs = tuple(int(arch) for arch in built.split(",") if arch.isdigit())
    return archs or None


def runs(capability: int, archs: tuple[int, ...]) -> bool:
    """Of the first one there is PTX, too, of which drivers make what later cards take."""
    return capability in archs or bool(archs) and capability >= archs[0]


def sources() -> dict[str, bytes]:
    """All files that the kernels are made of, by the names by which they include each other."""
    files = [*sorted((PACKAGE / "cuda").glob("*.cu*")), PACKAGE / "cuda" / "kernels.h", PACKAGE / "quant.h"]
    found = {path.name: path.read_bytes() for path in files if path.suffix in (".cu", ".cuh", ".h")}
    found["grids.cuh"] = grids.device_grids().encode()
    return found | {"stdint.h": STDINT.encode(), "stddef.h": b""}


def libraries() -> Iterator[str]:
    """Where NVRTC may be: what pip installed, what the system finds, where the toolkit usually is."""
    for package in ("nvidia.cuda_nvrtc", "nvidia.cu13", "nvidia.cu12"):
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            continue
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from sorted(map(str, Path(folder, "lib").glob("libnvrtc.so.*")), reverse=True)
    yield from ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "/usr/local/cuda/lib64/libnvrtc.so")


class Nvrtc:
    """The library, opened: the first one whose kernels this driver (of CUDA 12.4, say; "": any) can load.

    Drivers take what compilers of their own major version make, and of older ones.
    """

    def __init__(self, driver: str = "") -> None:
        too_new = ""
        for name in libraries():
            try:
                self._lib = ctypes.CDLL(name)
            except OSError:
                continue
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
            self.version = f"{major.value}.{minor.value}"
            if not driver or major.value <= int(driver.split(".")[0]):
                return
            too_new = self.version
        why = f"NVRTC {too_new} is too new for this driver (CUDA {driver})" if too_new else "there is no NVRTC"
        raise CompilerError(f"this ms4 came without kernels for this GPU, and {why}; {INSTALL}")

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code:
            self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            text = self._lib.nvrtcGetErrorString(code).decode(errors="replace")
            raise CompilerError(f"NVRTC {getattr(self, 'version', '')} failed ({name}: {text})")

    def architectures(self) -> list[int]:
        n = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(n))
        found = (ctypes.c_int * n.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def target(self, capability: int) -> str:
        """sm_XX if it knows the card, else PTX for the newest that it knows, which the driver compiles."""
        known = self.architectures()
        if capability in known:
            return f"sm_{capability}"
        older = [arch for arch in known if 80 <= arch < capability]
        if not older:
            raise CompilerError(f"NVRTC {self.version} does not know compute capability {capability / 10:.1f}")
        return f"compute_{max(older)}"

    def compile(self, files: dict[str, bytes], target: str) -> bytes:
        """A cubin for sm_XX, PTX for compute_XX."""
        headers = {name: text for name, text in files.items() if name != "kernels.cu"}
        names = (ctypes.c_char_p * len(headers))(*[name.encode() for name in headers])
        texts = (ctypes.c_char_p * len(headers))(*headers.values())
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            ctypes.c_char_p(files["kernels.cu"]),
            b"kernels.cu",
            len(headers),
            texts,
            names,
        )
        try:
            options = [option.encode() for option in (*OPTIONS, f"-arch={target}")]
            try:
                self._call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
            except CompilerError as error:
                log = self._bytes("ProgramLog", program).decode(errors="replace")
                first = next((line for line in log.splitlines() if "error" in line), "no reason given")
                raise CompilerError(f"{error}: {first}") from None
            kind = "CUBIN" if target.startswith("sm_") else "PTX"
            return self._bytes(kind, program)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        room = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, room)
        return room.raw


def kept(capability: int, said: Callable[[str], None], driver: str = "") -> Path:
    """The file with the kernels for this card, which is made, and said so in one line, if it is not there yet."""
    nvrtc, files = Nvrtc(driver), sources()
    target = nvrtc.target(capability)
    about = hashlib.sha256(repr((target, nvrtc.version, OPTIONS, sorted(files.items()))).encode()).hexdigest()
    path = places.ours("CACHE") / "gpu" / f"kernels-{target}-{about[:24]}"
    if path.exists():
        return path
    said(f"compiling the kernels for this GPU (NVRTC {nvrtc.version}, {target}); they are kept in {path.parent}")
    code = nvrtc.compile(files, target)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with atomic.replacing(path) as file:
        file.write(code)
    return path


def origin(capability: str, driver: str = "") -> str:
    """Where the kernels for a card of this compute capability (8.6) come from; CompilerError: from nowhere."""
    archs = None if os.environ.get("MS4_GPU_CODE") else built_for()
    if archs is None or runs(int(capability.replace(".", "")), archs):
        return "came with ms4"
    return f"are compiled when they are first needed (NVRTC {Nvrtc(driver).version})"


def ready(said: Callable[[str], None]) -> str:
    """A file with kernels for this machine's GPU; "": those that came with ms4, or there is no GPU.

    CompilerError: there are none, and they cannot be made.
    """
    archs = None if os.environ.get("MS4_GPU_CODE") else built_for()
    if archs is None:
        return ""
    try:
        gpu = ms4.gpu()
    except ms4.DeviceError:
        return ""
    capability = int(gpu.capability.replace(".", ""))
    too_old = capability < OLDEST  # the engine says so
    return "" if too_old or runs(capability, archs) else str(kept(capability, said, gpu.driver))

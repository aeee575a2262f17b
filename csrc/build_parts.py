"""The parts of the build that need nothing but Python: what is compiled and how, generated files, the GPU's code.

build_core.py, the build backend, adds setuptools and cffi; `make gpu` has neither.  Environment: MS4_CUDA_ARCH, as
build_core.py says.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

CSRC = Path("csrc")
BUILDERS = ("build_core", "build_parts")  # modules beside the package's own that are not part of it
GLUE = Path("build", "glue")
# The kernels first: they take longest to compile, and so they are not left for one core.
SOURCES = [str(p) for pattern in ("cpu/*/*.c", "cpu/*.c", "cuda/*.c", "*.c") for p in sorted(CSRC.glob(pattern))]
HEADERS = sorted(str(p) for suffix in ("h", "cdef", "cu", "cuh") for p in CSRC.rglob(f"*.{suffix}"))
CFLAGS = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
CFLAGS += ["-Wall", "-Wextra", "-MMD"]
GPU_CODE = CSRC / "cuda" / "kernels.fatbin"
GPU_ARCHS = ("80", "86", "89", "90", "100", "120")  # and the first one's PTX, which drivers compile for all later ones
NVCC = ["nvcc", "-fatbin", "-O3", "-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
NVCC += ["-Icsrc", "-Icsrc/cuda", f"-I{GLUE}", "--threads=0"]
NVCC += ["-allow-unsupported-compiler"]  # of the host's headers nothing but stdint.h and stddef.h is wanted


def declarations():
    """Of each header what Python sees, which stands between its cffi marks."""
    texts = [(CSRC / header).read_text() for header in ("ms4.h", "policy.h")]
    return [re.search(r"/\* cffi:begin \*/(.*)/\* cffi:end \*/", text, re.DOTALL)[1] for text in texts]


def write_grids():
    """Writes the code books of the IQ types, from quant/grids.py, as C arrays of int8_t, and for CUDA as words."""
    grids = runpy.run_path(str(Path("quant", "grids.py")))
    parts = ['#include "cpu/plain/grids.h"\n']
    for name, grid in grids["GRIDS"].items():
        values = grids["values"](name)
        rows = [values[i : i + grid.width] for i in range(0, len(values), grid.width)]
        body = ",\n".join("{" + ",".join(map(str, row)) + "}" for row in rows)
        parts.append(f"const int8_t grid_{name}[{len(rows)}][{grid.width}] = {{\n{body}}};\n")
    write_if_changed(GLUE / "grids.cuh", grids["device_grids"]())
    return str(write_if_changed(GLUE / "grids.c", "".join(parts)))


def write_if_changed(path, text):
    """Writes a generated file, but leaves its time alone when nothing changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def known_archs():
    """Of GPU_ARCHS those that this nvcc knows, which may be older than the cards."""
    listed = subprocess.run([NVCC[0], "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [arch for arch in GPU_ARCHS if f"sm_{arch}" in listed]


def build_gpu_code(usual):
    """Compiles the kernels for GPUs, if there is nvcc, and if they are older than their sources or for other cards.

    An nvcc that cannot do it (too old for the language or for gcc) is told of, and no reason not to build the rest:
    NVRTC compiles them where they are needed.  Unless they were asked for: subprocess.CalledProcessError.
    """
    given = os.environ.get("MS4_CUDA_ARCH")
    has_card = Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
    wanted = given or (usual if usual != "native" or has_card else "none")
    if wanted == "none" or not shutil.which(NVCC[0]):
        return
    archs = known_archs() if wanted == "all" else wanted.split(",")
    if wanted == "all" and archs != list(GPU_ARCHS):
        wanted = ",".join(archs)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs[:1]]
    write_grids()
    sources = [*(CSRC / "cuda").glob("*.cu*"), CSRC / "cuda" / "kernels.h", CSRC / "quant.h", GLUE / "grids.cuh"]
    stamp = GPU_CODE.with_suffix(".archs")
    newest = max(path.stat().st_mtime for path in sources)
    if GPU_CODE.exists() and GPU_CODE.stat().st_mtime > newest and stamp.exists() and stamp.read_text() == wanted:
        return
    GPU_CODE.unlink(missing_ok=True)  # of older sources: it is not to be used if this fails
    command = [*NVCC, *(["-arch=native"] if wanted == "native" else targets), "-o", str(GPU_CODE)]
    made = archs and subprocess.run([*command, str(CSRC / "cuda" / "kernels.cu")])
    if made and not made.returncode:
        stamp.write_text(wanted)
        return
    stamp.unlink(missing_ok=True)
    if given and made:
        made.check_returncode()
    print("ms4: nvcc made no kernels for GPUs; NVRTC compiles them where they are needed", file=sys.stderr)


def link_package(folder):
    """Makes folder/ms4 the package, by links to its Python files: for builds with other flags, and for mypy."""
    package = folder / "ms4"
    package.mkdir(parents=True, exist_ok=True)
    modules = [path for path in CSRC.glob("*.py") if path.stem not in BUILDERS]
    for source in (*modules, Path("cli"), Path("models"), Path("quant")):
        link = package / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source.resolve())
    return folder


def is_fresh(obj):
    """True if obj is newer than everything its depfile (gcc -MMD) names."""
    try:
        needs = obj.with_suffix(".d").read_text().replace("\\\n", " ").split(":", 1)[1].split()
        return all(Path(p).stat().st_mtime < obj.stat().st_mtime for p in needs)
    except (OSError, IndexError):
        return False

"""Build backend: setuptools plus our one C extension.

pip calls the PEP 517 hooks at the bottom; `python csrc/build_core.py` builds in place (what `make` does), and
`python csrc/build_core.py glue` only writes the generated C (what `make arch` needs).  A C compiler and the
Python headers are enough.  With nvcc, the kernels for GPUs become a file of the package, too.  Environment: CC, CFLAGS,
MS4_CUDA_ARCH: what they are compiled for, "all", "native", "none", or a list such as 86,90; without it, for all in a
wheel, and in place for the cards of this machine, if it has any.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, build_meta, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("csrc")
GLUE = Path("build", "glue")
# The kernels first: they take longest to compile, and so they are not left for one core.
SOURCES = [str(p) for pattern in ("cpu/*/*.c", "cpu/*.c", "cuda/*.c", "*.c") for p in sorted(CSRC.glob(pattern))]
HEADERS = sorted(str(p) for suffix in ("h", "cdef", "cu", "cuh") for p in CSRC.rglob(f"*.{suffix}"))
CFLAGS = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
CFLAGS += ["-Wall", "-Wextra", "-MMD"]
GPU_CODE = CSRC / "cuda" / "kernels.fatbin"
GPU_ARCHS = ("80", "86", "89", "90", "100", "120")  # and the first one's PTX, which drivers compile for all later ones
NVCC = ["nvcc", "-fatbin", "-O3", "-std=c++20", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
NVCC += ["-Icsrc", "-Icsrc/cuda", f"-I{GLUE}", "--threads=0"]


class BuildCore(build_ext):
    def build_extension(self, ext):
        sources = [*SOURCES, write_grids(), self.write_cffi(ext.name)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = list(pool.map(lambda source: self.compile(source, ext), sources))
        ext.sources, ext.depends = [], ext.extra_objects  # linked again when an object is newer
        super().build_extension(ext)

    def compile(self, source, ext):
        obj = Path(self.build_temp, source).with_suffix(".o")
        if not is_fresh(obj):
            self.compiler.compile(
                [source],
                self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args,
            )
        return str(obj)

    def write_cffi(self, name):
        """Writes the C file that makes what stands between the cffi marks of the headers importable from Python."""
        from cffi import FFI

        ffi = FFI()
        for header in ("ms4.h", "policy.h"):
            text = (CSRC / header).read_text()
            ffi.cdef(re.search(r"/\* cffi:begin \*/(.*)/\* cffi:end \*/", text, re.DOTALL)[1])
        ffi.cdef((CSRC / "ops.cdef").read_text())
        ffi.set_source(name, '#include "ms4.h"\n#include "ops.h"\n#include "policy.h"')
        GLUE.mkdir(parents=True, exist_ok=True)
        ffi.emit_c_code(str(GLUE / "_core.c"))  # leaves the file alone when nothing changed
        return str(GLUE / "_core.c")


class BuildPackage(build_py):
    """The Python files of the package: all but this one, which is of use before the package is built and not after."""

    def run(self):
        build_gpu_code("native" if self.editable_mode else "all")
        super().run()

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] != Path(__file__).stem]


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


def build_gpu_code(usual):
    """Compiles the kernels for GPUs, if there is nvcc, and if they are older than their sources or for other cards."""
    given = os.environ.get("MS4_CUDA_ARCH")
    wanted = given or (usual if usual != "native" or Path("/dev/nvidiactl").exists() else "none")
    if wanted == "none" or not shutil.which(NVCC[0]):
        return
    archs = GPU_ARCHS if wanted == "all" else wanted.split(",")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets = (
        ["-arch=native"]
        if wanted == "native"
        else [*targets, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]
    )
    write_grids()
    sources = [*(CSRC / "cuda").glob("*.cu*"), CSRC / "cuda" / "kernels.h", CSRC / "quant.h", GLUE / "grids.cuh"]
    stamp = GPU_CODE.with_suffix(".archs")
    newest = max(path.stat().st_mtime for path in sources)
    if GPU_CODE.exists() and GPU_CODE.stat().st_mtime > newest and stamp.exists() and stamp.read_text() == wanted:
        return
    subprocess.run([*NVCC, *targets, "-o", str(GPU_CODE), str(CSRC / "cuda" / "kernels.cu")], check=True)
    stamp.write_text(wanted)


def link_package(folder):
    """Makes folder/ms4 the package, by links to its Python files: for builds with other flags, and for mypy."""
    package = folder / "ms4"
    package.mkdir(parents=True, exist_ok=True)
    modules = [path for path in CSRC.glob("*.py") if path.name != Path(__file__).name]
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


def run_setup(**kwargs):
    core = Extension(
        "ms4._core",
        list(SOURCES),
        depends=HEADERS,
        include_dirs=["csrc"],
        extra_compile_args=CFLAGS + os.environ.get("CFLAGS", "").split(),  # last, so that they win
        extra_link_args=["-pthread", "-ldl"],
        define_macros=[("Py_LIMITED_API", "0x030a0000")],
        py_limited_api=True,
    )
    return setup(
        ext_modules=[core],
        cmdclass={"build_ext": BuildCore, "build_py": BuildPackage},
        options={"bdist_wheel": {"py_limited_api": "cp310"}, "build_ext": {"build_temp": "build/obj"}},
        **kwargs,
    )


class Backend(type(build_meta.build_wheel.__self__)):
    def run_setup(self, setup_script="setup.py"):
        run_setup()


for _hook in (
    "build_wheel",
    "build_sdist",
    "build_editable",
    "prepare_metadata_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "get_requires_for_build_wheel",
    "get_requires_for_build_sdist",
    "get_requires_for_build_editable",
):
    globals()[_hook] = getattr(Backend(), _hook)

if __name__ == "__main__":
    if sys.argv[1:] == ["glue"]:
        write_grids()
    else:  # a folder as argument: the package is built there, as links to the sources and an extension of its own
        target = sys.argv[1:] and link_package(Path(sys.argv[1]))
        where = ["--build-lib", str(target), "--build-temp", str(target / "obj")] if target else ["--inplace"]
        run_setup(script_args=["-q", "build_ext", *where])
        if not target:
            build_gpu_code("native")

"""Build backend: setuptools plus our one C extension.

pip calls the PEP 517 hooks at the bottom; `python csrc/build_core.py` builds in place (what `make` does), and
`python csrc/build_core.py glue` only writes the generated C (what `make arch` needs).  A C compiler and the
Python headers are enough.  With nvcc, the kernels for GPUs become a file of the package, too.  Environment: CC, CFLAGS,
MS4_CUDA_ARCH: what they are compiled for, "all", "native", "none", or a list such as 86,90; without it, for all in a
wheel, and in place for the cards of this machine, if it has any.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_parts import (
    BUILDERS,
    CFLAGS,
    CSRC,
    GLUE,
    HEADERS,
    SOURCES,
    build_gpu_code,
    declarations,
    is_fresh,
    link_package,
    write_grids,
    write_if_changed,
)
from setuptools import Extension, build_meta, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

PAGE = Path("build", "man", "ms4.1")


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
        for text in declarations():
            ffi.cdef(text)
        ffi.cdef((CSRC / "ops.cdef").read_text())
        ffi.set_source(name, '#include "ms4.h"\n#include "ops.h"\n#include "policy.h"')
        GLUE.mkdir(parents=True, exist_ok=True)
        ffi.emit_c_code(str(GLUE / "_core.c"))  # leaves the file alone when nothing changed
        return str(GLUE / "_core.c")


class BuildPackage(build_py):
    """The Python files of the package: all but those that build it, which are of no use afterwards."""

    def run(self):
        build_gpu_code("native" if self.editable_mode else "all")
        super().run()

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] not in BUILDERS]


class InstallPage(Distribution().get_command_class("install_data")):
    """The manual page, which the package that was just built prints; without what that imports, there is none."""

    def run(self):
        package = self.get_finalized_command("build").build_lib
        environment = {**os.environ, "PYTHONPATH": package}
        code = "from ms4.cli import man; print(man.page(), end='')"
        made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if made.returncode:
            print(f"ms4: built without its manual page: {made.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            self.data_files = []
        else:
            write_if_changed(PAGE, made.stdout)
        super().run()


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
        cmdclass={"build_ext": BuildCore, "build_py": BuildPackage, "install_data": InstallPage},
        data_files=[("share/man/man1", [str(PAGE)])],
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

"""What is installed: the files of the wheel and of the sdist, as the build backend lists them; and that both run."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILDERS = ("build_core", "build_parts")  # of csrc, of which they are no part
LIST = """
import json, os, sys
sys.path.insert(0, "csrc")
import build_core
out, sys.stdout = sys.stdout, sys.stderr
dist = build_core.run_setup(script_args=["-q", "--name"])
build, info, sdist = (dist.get_command_obj(name) for name in ("build_py", "egg_info", "sdist"))
info.egg_base = sys.argv[1]
for command in (build, info):
    command.ensure_finalized()
info.run()
sdist.ensure_finalized()
wheel = [os.path.relpath(path, build.build_lib) for path in build.get_outputs(include_bytecode=False)]
json.dump([wheel, info.filelist.files], out)
"""


@cache
def listed(folder):
    run = subprocess.run([sys.executable, "-c", LIST, folder], cwd=ROOT, check=True, capture_output=True, text=True)
    return [set(names) for names in json.loads(run.stdout)]


def test_the_wheel_holds_the_demonstration_and_not_its_trainer(tmp_path_factory):
    wheel, _ = listed(str(tmp_path_factory.getbasetemp()))
    assert {"ms4/__init__.py", "ms4/py.typed", "ms4/cli/start.py", "ms4/models/model.py"} <= wheel
    assert "ms4/models/cards.toml" in wheel
    assert {f"ms4/models/demo/ms4-demo{name}.gguf" for name in ("", "-mmproj")} <= wheel
    assert not [name for name in wheel if "training" in name or "build_" in name or "tests" in name]


def test_the_wheel_holds_every_module_that_the_package_imports(tmp_path_factory):
    wheel, _ = listed(str(tmp_path_factory.getbasetemp()))
    for folder, package in (("csrc", "ms4"), ("cli", "ms4/cli"), ("models", "ms4/models"), ("quant", "ms4/quant")):
        paths = [path for path in (ROOT / folder).glob("*.py") if path.stem not in BUILDERS]
        modules = {f"{package}/{path.name}" for path in paths}
        assert modules == {name for name in wheel if Path(name).parent == Path(package) and name.endswith(".py")}


def test_the_sdist_can_be_built_from(tmp_path_factory):
    _, sdist = listed(str(tmp_path_factory.getbasetemp()))
    ends = ("c", "h", "cdef", "cu", "cuh")
    sources = {str(path.relative_to(ROOT)) for end in ends for path in (ROOT / "csrc").rglob(f"*.{end}")}
    sources |= {f"csrc/{name}.py" for name in BUILDERS}
    assert sources | {"quant/grids.py", "pyproject.toml", "LICENSE", "README.md", "models/cards.toml"} <= sdist
    assert not [name for name in sdist if name.startswith(("tests/", "models/training/"))]


# --- making it


def folder_of(folder, *programs):
    """A folder for a PATH: these programs, and no compiler."""
    folder.mkdir()
    for name in programs:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def test_make_without_a_compiler_says_in_one_line_what_to_install(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {"PATH": folder_of(tmp_path / "bin", "make", "sh"), "HOME": str(tmp_path)}
    command = ["make", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert done.returncode == 2 and len(said) == 1 and "install gcc" in said[0] and not (tmp_path / ".venv").exists()


@pytest.fixture
def installed(tmp_path):
    """installed(package, PATH) -> what runs its command with an empty PATH, out of a virtual environment of its own.

    Only the packages that it needs are borrowed from here.
    """
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    # The folder that a .pth names is searched, but for more .pth files: so the checkout that stands there stays unseen.
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def install(package, path):
        environment = {"PATH": path, "HOME": str(tmp_path), "CFLAGS": "-O1", "MS4_CUDA_ARCH": "none"}
        command = [sys.executable, "-m", "pip", "--python", str(home), "install", "-q", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-build-isolation", str(package)]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        assert list(site.glob("ms4/_core.abi3.so"))

        def ms4(*arguments):
            command = [str(home / "bin" / "ms4"), *arguments]
            environment = {"PATH": "", "HOME": str(tmp_path), "LANG": "C"}
            return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True).stdout

        return ms4

    return install


@pytest.mark.slow
def test_the_wheel_runs_where_there_is_no_compiler(tmp_path, installed):
    environment = {**os.environ, "MS4_CUDA_ARCH": "none"}  # nvcc takes minutes
    subprocess.run(["make", "wheel", f"DIST={tmp_path}"], cwd=ROOT, env=environment, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"ms4_runner-[\d.]+-cp310-abi3-manylinux_2_\d+_\w+\.whl", wheel.name)
    ms4 = installed(wheel, "")
    page = (tmp_path / "venv" / "share" / "man" / "man1" / "ms4.1").read_text()
    assert page.startswith(".TH MS4 1 ") and page.encode() == ms4("man")
    assert ms4("run", "-q", "--greedy", "Reverse the word planet.") == b"tenalp\n"
    assert ms4("doctor").startswith(b"ok ms4")


@pytest.mark.slow
def test_the_sdist_is_built_and_runs(tmp_path, installed):
    code = "import sys; sys.path.insert(0, 'csrc'); import build_core; build_core.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    ms4 = installed(sdist, os.environ["PATH"])
    assert ms4("run", "-q", "--greedy", "Reverse the word planet.") == b"tenalp\n"

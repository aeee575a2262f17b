"""What `make gpu` uses in place of cffi, gguf and typer, and the whole of it on an emulated card, without pip."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import make_shape
import pytest

from ms4._core import ffi, lib
from ms4.quant import tiny, tiny_tower

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "build" / "cuda" / "libcuda_emu.so"


def module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def bare_gguf(monkeypatch):
    """From here on files are written without the package gguf."""

    def use():
        stand_in = module("bare_gguf", ROOT / "tests" / "bare" / "gguf.py")
        for user in (tiny, tiny_tower, make_shape):
            monkeypatch.setattr(user, "gguf", stand_in)

    return use


def test_files_are_those_of_the_package_gguf(bare_gguf, tmp_path, monkeypatch):
    few = tiny.Tiny(n_layer=1, n_expert=2, n_used=1, d_model=64, d_expert=32, temperature_keys=True, n_vocab=1300)
    nvfp4 = tiny.Tiny(n_layer=1, n_dense=1, d_model=64, d_dense=64, default_type="NVFP4", n_vocab=1300)

    def written(folder):
        folder.mkdir()
        tiny.write_tiny(folder / "few", few)
        tiny.write_tiny(folder / "nvfp4", nvfp4)
        tiny_tower.write_mmproj(folder / "tower", layers=1, width=64, heads=2, out_width=64)
        monkeypatch.setattr(sys, "argv", ["x", str(folder / "shape"), "--layers", "1", "--vocab", "50", "--small"])
        make_shape.main()
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    want = written(tmp_path / "package")
    bare_gguf()
    assert written(tmp_path / "bare") == want and len(want) == 4


def test_declarations_mean_the_same_to_ctypes():
    """Every struct has its size and offsets, every constant its value, every function its number of parameters."""
    parts, binding = module("parts", ROOT / "csrc" / "build_parts.py"), ROOT / "tests" / "bare" / "binding.py"
    scope = {"__file__": str(binding), "__name__": "binding"}
    exec(binding.read_text().split("\n_declared =")[0], scope)
    folder, found = os.getcwd(), None
    os.chdir(ROOT)
    try:
        found = scope["Declarations"]("\n".join(parts.declarations()))
    finally:
        os.chdir(folder)
    structs = {name: kind for name, kind in found.types.items() if isinstance(kind, type(ctypes.Structure))}
    assert len(structs) > 12
    for name, kind in structs.items():
        assert ctypes.sizeof(kind) == ffi.sizeof(name), name
        fields = {field: getattr(kind, field).offset for field, _ in kind._fields_}
        assert fields == {field: ffi.offsetof(name, field) for field, _ in ffi.typeof(name).fields}, name
    assert len(found.constants) > 40 and all(getattr(lib, name) == value for name, value in found.constants.items())
    names = {name for name in dir(lib) if name.startswith(("ms4_", "policy_")) and name != "ms4_type_infos"}
    assert found.functions.keys() == names
    for name, (_, parameters) in found.functions.items():
        assert len(parameters) == len(ffi.typeof(getattr(lib, name)).args), name


@pytest.mark.slow
@pytest.mark.rare
def test_make_gpu_needs_no_pip(tmp_path):
    """A tree without the checkpoint, a Python with NumPy alone, gcc on PATH and no more; the card is emulated."""
    made = subprocess.run(["make", "-f", "tests/cuda/Makefile", "driver"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    tree, tools, python = tmp_path / "tree", tmp_path / "bin", tmp_path / "python"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in tracked.splitlines():
        if not name.startswith(("models/demo/ms4-demo", "tests/data")) and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    tools.mkdir()
    for name in ("gcc", "as", "ld", "make"):
        (tools / name).symlink_to(shutil.which(name))
    venv.EnvBuilder(with_pip=False, symlinks=True).create(python)
    site = next((python / "lib").glob("python*")) / "site-packages"
    for name in ("numpy", "numpy.libs"):
        (site / name).symlink_to(Path(sysconfig.get_path("platlib")) / name)
    env = {"PATH": str(tools), "MS4_LIBCUDA": str(DRIVER), "MS4_GPU_CODE": __file__, "HOME": str(tmp_path)}
    command = ["make", "gpu", f"PYTHON={python / 'bin' / 'python'}", f"GPU=--small --folder {tmp_path} --limit 3000"]
    ran = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=3000)
    out = ran.stdout
    assert ran.returncode == 0 and "Traceback" not in out + ran.stderr, out + ran.stderr
    assert "random weights in its place" in out and not list(tmp_path.glob("*.gguf"))
    same = re.search(r"^(\d+) of (\d+) have the bits of the CPU", out, re.MULTILINE)
    assert same[1] == same[2] and int(same[1]) >= 11
    assert len(re.findall(r"^\| decode \| 0 \|", out, re.MULTILINE)) == 3
    assert len(re.findall(r"^\| prefill \| 0 \| 40 \|", out, re.MULTILINE)) == 2
    assert "#### 24 MiB of it" in out and "all of it ran" in out

"""The GPU's kernels where none came along: for whom they are compiled, and what is kept."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import ms4
from ms4.models import gpu_code

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A compiler that takes no time; what it compiled is noted.  `fake.capability` is that of the card."""
    made = SimpleNamespace(version="12.9", capability="8.6", compiled=[])

    class Nvrtc:
        version = property(lambda self: made.version)

        def __init__(self, driver):
            assert driver == "13.0"

        def target(self, capability):
            return f"sm_{capability}"

        def compile(self, files, target):
            made.compiled.append(target)
            return b"code for " + target.encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MS4_GPU_CODE", raising=False)
    monkeypatch.setattr(gpu_code, "Nvrtc", Nvrtc)
    monkeypatch.setattr(gpu_code, "built_for", lambda: ())
    monkeypatch.setattr(ms4, "gpu", lambda: SimpleNamespace(capability=made.capability, driver="13.0"))
    return made


def test_kernels_are_compiled_once_for_each_card_and_compiler(fake, monkeypatch):
    said = []
    first = Path(gpu_code.ready(said.append))
    assert first.read_bytes() == b"code for sm_86" and len(said) == 1 and "sm_86" in said[0]
    assert gpu_code.ready(said.append) == str(first) and len(said) == 1
    fake.capability = "12.0"
    other = gpu_code.ready(said.append)
    fake.version = "13.0"
    assert len({str(first), other, gpu_code.ready(said.append)}) == 3
    sources = gpu_code.sources()
    monkeypatch.setattr(gpu_code, "sources", lambda: sources | {"dev.cuh": b"changed"})
    gpu_code.ready(said.append)
    assert fake.compiled == ["sm_86", "sm_120", "sm_120", "sm_120"] and len(said) == 4
    assert not list(first.parent.glob("*.new"))


def test_without_a_card_or_with_kernels_nothing_is_compiled(fake, monkeypatch):
    monkeypatch.setattr(gpu_code, "built_for", lambda: None)
    assert gpu_code.ready(print) == ""
    monkeypatch.setattr(gpu_code, "built_for", lambda: (80, 90))
    assert gpu_code.ready(print) == ""
    monkeypatch.setenv("MS4_GPU_CODE", "some file")
    monkeypatch.setattr(gpu_code, "built_for", lambda: ())
    assert gpu_code.ready(print) == ""
    monkeypatch.delenv("MS4_GPU_CODE")

    def none():
        raise ms4.DeviceError("there is no NVIDIA driver", -9)

    monkeypatch.setattr(ms4, "gpu", none)
    assert gpu_code.ready(print) == "" and not fake.compiled


@pytest.mark.parametrize(
    "built, card, good",
    [("86,90", 86, True), ("86,90", 90, True), ("86,90", 120, True), ("89", 86, False), ("90,80", 80, True)],
)
def test_which_cards_run_what_was_built(built, card, good, tmp_path):
    (tmp_path / "cuda").mkdir()
    assert gpu_code.built_for(tmp_path) == ()
    (tmp_path / "cuda" / "kernels.fatbin").touch()
    assert gpu_code.built_for(tmp_path) is None
    (tmp_path / "cuda" / "kernels.archs").write_text(built)
    assert gpu_code.runs(card, gpu_code.built_for(tmp_path)) == good
    (tmp_path / "cuda" / "kernels.archs").write_text("all")
    assert gpu_code.built_for(tmp_path) is None


def test_every_file_that_is_included_comes_along():
    files = gpu_code.sources()
    for name, text in files.items():
        for wanted in re.findall(rb'^#include [<"](.+)[>"]', text, re.MULTILINE):
            assert wanted.decode() in files or wanted == b"emulate.h", (name, wanted)
    assert b"device_grid_iq2xxs" in files["grids.cuh"]


def test_without_a_compiler_the_way_to_one_is_said(monkeypatch):
    monkeypatch.setattr(gpu_code, "libraries", lambda: iter(["/nowhere/libnvrtc.so"]))
    with pytest.raises(gpu_code.CompilerError, match="there is no NVRTC; pip install"):
        gpu_code.Nvrtc()


def test_an_nvrtc_that_is_too_new_for_the_driver_is_passed_over(monkeypatch):
    """What 13.0 makes no driver of CUDA 12 loads."""
    monkeypatch.setattr(gpu_code, "libraries", lambda: iter(["13.0", "12.9", "11.8"]))
    monkeypatch.setattr(gpu_code.ctypes, "CDLL", lambda name: name)

    def version(self, name, major, minor):
        major._obj.value, minor._obj.value = map(int, self._lib.split("."))

    monkeypatch.setattr(gpu_code.Nvrtc, "_call", version)
    found = [gpu_code.Nvrtc(driver).version for driver in ("", "13.1", "12.2")]
    assert found == ["13.0", "13.0", "12.9"]
    monkeypatch.setattr(gpu_code, "libraries", lambda: iter(["13.0"]))
    with pytest.raises(gpu_code.CompilerError, match=r"NVRTC 13.0 is too new for this driver \(CUDA 12.2\); pip"):
        gpu_code.Nvrtc("12.2")


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("target", ["compute_80", "sm_90"])
def test_nvrtc_compiles_every_kernel(target):
    try:
        nvrtc = gpu_code.Nvrtc()
    except gpu_code.CompilerError as error:
        pytest.skip(str(error))
    code = nvrtc.compile(gpu_code.sources(), target)
    text = (ROOT / "csrc/cuda/kernels.h").read_text()
    names = re.findall(r"\bX\((\w+), \w+_args, \w+\)", text)
    types = re.findall(r"\bX\((\w+), \d+, \d+, \d+, ", (ROOT / "csrc/quant.h").read_text())
    names += [f"{kind}_{type}" for kind in ("mul", "gemm") for type in types]
    assert len(names) == 64 and all(re.search(rb"\b" + name.encode() + rb"\b", code) for name in names)


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """nvcc(known, code): from now on nvcc knows these cards and ends so; a list of what it is called with.

    Everything happens in an empty checkout.
    """
    for name in ("cuda/kernels.cu", "cuda/kernels.h", "quant.h"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    (tmp_path / "quant").symlink_to(ROOT / "quant")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("MS4_CUDA_ARCH", raising=False)
    log = tmp_path / "log"

    def install(known, code=0):
        log.write_text("")
        script = tmp_path / "nvcc"
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = --list-gpu-code ]; then echo {known}; exit; fi\necho "$*" >> {log}\n'
            f'[ {code} = 0 ] && while [ "$1" ]; do [ "$1" = -o ] && touch "$2"; shift; done\nexit {code}\n'
        )
        script.chmod(0o755)
        return lambda: log.read_text().splitlines()

    return install


@pytest.mark.slow
def test_an_nvcc_that_cannot_do_it_does_not_end_the_build(nvcc, monkeypatch, capfd):
    import build_parts

    fatbin, archs = Path("csrc/cuda/kernels.fatbin"), Path("csrc/cuda/kernels.archs")
    called = nvcc("sm_70 sm_80 sm_86 sm_89 sm_90")
    build_parts.build_gpu_code("all")
    assert "code=sm_90 " in called()[0] and "sm_100" not in called()[0] and archs.read_text() == "80,86,89,90"
    os.utime(fatbin, (2e9, 2e9))
    build_parts.build_gpu_code("all")
    assert len(called()) == 1
    os.utime("csrc/quant.h", (3e9, 3e9))
    called = nvcc("sm_80", code=1)
    build_parts.build_gpu_code("all")
    assert len(called()) == 1 and not fatbin.exists() and not archs.exists()
    assert "nvcc made no kernels for GPUs; NVRTC" in capfd.readouterr().err
    called = nvcc("sm_52")  # no card of ours
    build_parts.build_gpu_code("all")
    assert not called() and not fatbin.exists()
    monkeypatch.setenv("MS4_CUDA_ARCH", "80")
    nvcc("sm_80", code=1)
    with pytest.raises(subprocess.CalledProcessError):
        build_parts.build_gpu_code("all")

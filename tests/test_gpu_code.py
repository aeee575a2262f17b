"""The GPU's kernels where none came along: for whom they are compiled, and what is kept."""

import re
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

        def target(self, capability):
            return f"sm_{capability}"

        def compile(self, files, target):
            made.compiled.append(target)
            return b"code for " + target.encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MS4_GPU_CODE", raising=False)
    monkeypatch.setattr(gpu_code, "Nvrtc", Nvrtc)
    monkeypatch.setattr(gpu_code, "built_for", lambda: ())
    monkeypatch.setattr(ms4, "gpu", lambda: SimpleNamespace(capability=made.capability))
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
    names = re.findall(r"\bX\((\w+), \w+_args, \d+\)", text)
    types = re.findall(r"\bX\((\w+), \d+, \d+, \d+, ", (ROOT / "csrc/quant.h").read_text())
    names += [f"{kind}_{type}" for kind in ("mul", "gemm") for type in types]
    assert len(names) == 64 and all(re.search(rb"\b" + name.encode() + rb"\b", code) for name in names)

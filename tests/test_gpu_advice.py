"""Why no GPU is used: one line that says it, and what to type next."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import ms4
from ms4.cli import doctor, errors, gpu_advice, host
from ms4.models import gpu_code

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "build" / "cuda" / "libcuda_emu.so"
NO_DRIVER = "there is no NVIDIA driver (libcuda.so.1: cannot open shared object file: No such file or directory)"
NO_GPU = "the NVIDIA driver finds no GPU"


def machine(root, *files, card=None):
    """The folders of a machine: these empty files, and on its bus a card of NVIDIA, another one, or nobody says."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if card is not None:
        device = root / "sys/bus/pci/devices/0000:01:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x10de\n" if card else "0x8086\n")
        (device / "class").write_text("0x030200\n")
    return str(root)


@pytest.mark.parametrize(
    "message, files, card, want",
    [
        (NO_DRIVER, (), True, "install NVIDIA's driver"),
        (NO_DRIVER, (), False, "there is no NVIDIA card on the bus"),
        (NO_DRIVER, (), None, "install NVIDIA's driver"),
        (NO_DRIVER, (".dockerenv",), True, "docker run --gpus all"),
        (NO_DRIVER, ("run/.containerenv",), None, "podman run --device nvidia.com/gpu=all"),
        (NO_DRIVER, (".dockerenv",), False, "there is no NVIDIA card on the bus"),
        (NO_DRIVER, ("dev/dxg",), None, "driver in Windows"),
        (NO_GPU, ("dev/nvidiactl",), True, "sudo modprobe nvidia"),
        (NO_GPU, (".dockerenv",), True, "docker run --gpus all"),
        ('the NVIDIA driver shows no GPU: CUDA_VISIBLE_DEVICES is ""', (), True, "unset CUDA_VISIBLE_DEVICES"),
        ("the NVIDIA driver is too old: it has no cuMemAlloc_v2", (), True, "update NVIDIA's driver"),
        ("the NVIDIA driver in the kernel and its library are of different versions", (), True, "restart the machine"),
        (
            "the NVIDIA driver does not start (cuInit: unknown error, 999)",
            ("dev/nvidiactl",),
            True,
            "modprobe nvidia_uvm",
        ),
        ("the NVIDIA driver does not start (cuInit: unknown error, 999)", (), True, "sudo modprobe nvidia;"),
        ("the GPU failed (cuDevicePrimaryCtxRetain: busy or unavailable, 46)", (), True, "nvidia-smi -c 0"),
        ("the GPU is too old: it has compute capability 7.5, and ms4 takes 8.0 or newer", (), True, ""),
    ],
)
def test_every_way_to_have_no_gpu_has_its_next_step(message, files, card, want, tmp_path):
    advice = gpu_advice.advice(message, machine(tmp_path, *files, card=card))
    assert (want in advice) if want else not advice
    assert "\n" not in advice and len(advice) < errors.LONGEST


def test_files_of_the_card_that_may_not_be_opened(tmp_path, monkeypatch):
    root = machine(tmp_path, "dev/nvidiactl", card=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs this may be root
    os.chmod(tmp_path / "dev/nvidiactl", 0o600)
    assert "sudo chmod a+rw /dev/nvidia*" in gpu_advice.advice(NO_GPU, root)
    os.chmod(tmp_path / "dev/nvidiactl", 0o660)
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path: SimpleNamespace(st_gid=54321, st_mode=real(path).st_mode))
    monkeypatch.setattr(gpu_advice, "group", lambda number: f"group{number}")
    assert "sudo usermod -aG group54321 $USER" in gpu_advice.advice(NO_GPU, root)


def test_a_card_that_is_not_used_is_a_warning(tmp_path):
    assert not gpu_advice.is_wanted(NO_DRIVER, machine(tmp_path / "none", card=False))
    assert gpu_advice.is_wanted(NO_DRIVER, machine(tmp_path / "there", card=True))
    assert gpu_advice.is_wanted("the GPU failed (cuInit: x, 1)", machine(tmp_path / "x", card=False))


def test_the_error_line_comes_with_the_next_step(monkeypatch):
    monkeypatch.setattr(gpu_advice, "advice", lambda message: "do this" if message == "a" else "")
    assert errors.describe(ms4.DeviceError("a", -9))[2] == "do this; --device cpu works without"
    assert errors.describe(ms4.DeviceError("b", -9))[2].startswith("ms4 doctor shows the GPU")
    assert errors.describe(ms4.DeviceError("c; --device cpu works", -9))[2] == "ms4 doctor shows the GPU and its driver"


@pytest.fixture
def card(monkeypatch):
    """A card as its driver would describe it."""
    shown = SimpleNamespace(
        name="Some GPU", bus="0000:01:00.0", driver="13.0", capability="8.6", n_multiprocessors=82, total=24 << 30,
        free=23 << 30,
    )  # fmt: skip
    monkeypatch.setattr(ms4, "gpu", lambda: shown)
    monkeypatch.setattr(gpu_code, "built_for", lambda: None)
    monkeypatch.setattr(host, "link", lambda bus: host.Link(16, 16, 2.5, 16.0))
    monkeypatch.setattr(host, "nvidia_driver", lambda: "580.82.07")
    return shown


def test_doctor_shows_card_driver_bus_and_memory(card):
    check = doctor.check_gpu()
    assert check.level == "ok" and not check.fix
    for part in ("Some GPU", "8.6", "driver 580.82.07 for CUDA 13.0", "23.0 GiB free of 24.0 GiB", "came with ms4"):
        assert part in check.text
    assert "PCIe x16 of 16 GT/s, 31.5 GB/s, now 2.5 GT/s" in check.text


def test_doctor_says_what_is_missing(card, monkeypatch):
    monkeypatch.setattr(host, "link", lambda bus: host.Link(4, 16, 16.0, 16.0))
    assert doctor.check_gpu().level == "warning" and "more lanes" in doctor.check_gpu().fix
    monkeypatch.setattr(gpu_code, "built_for", lambda: (90,))
    monkeypatch.setattr(gpu_code, "libraries", lambda: iter(()))
    check = doctor.check_gpu()
    assert check.level == "warning" and "there is no NVRTC" in check.text and check.fix.startswith("pip install nvidia")
    card.capability = "7.5"
    check = doctor.check_gpu()
    assert check.level == "warning" and "too old" in check.text and "8.0 and newer" in check.fix


def test_the_bus_is_read_from_the_kernel(tmp_path):
    device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    assert host.link("0000:01:00.0", str(tmp_path)) is None
    for name, text in (("current_link_width", "8"), ("max_link_width", "16")):
        (device / name).write_text(f"{text}\n")
    for name, text in (("current_link_speed", "5.0 GT/s PCIe"), ("max_link_speed", "32.0 GT/s PCIe")):
        (device / name).write_text(f"{text}\n")
    link = host.link("0000:01:00.0", str(tmp_path))
    assert link == host.Link(8, 16, 5.0, 32.0) and round(link.bytes_per_s / 1e9, 1) == 31.5
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\nGCC version: 12\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    assert host.nvidia_driver(str(tmp_path)) == "580.82.07" and host.nvidia_driver(str(tmp_path / "no")) == ""


# --- as a process, with the emulated driver


def run(*arguments, **environment):
    command = [str(Path(sys.executable).with_name("ms4")), *arguments]
    env = {**os.environ, "MS4_LIBCUDA": str(DRIVER), "MS4_GPU_CODE": __file__, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope="module")
def driver():
    made = subprocess.run(["make", "-f", "tests/cuda/Makefile", "driver"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize(
    "environment, want, told",
    [
        ({"MS4_LIBCUDA": "/nowhere/libcuda.so"}, r"there is no NVIDIA driver \(/nowhere", False),
        ({"MS4_LIBCUDA": "libm.so.6"}, "the NVIDIA driver is too old: it has no cuInit", True),
        ({"MS4_EMU_DEVICES": "0"}, "the NVIDIA driver finds no GPU", False),
        ({"MS4_EMU_DEVICES": "0", "CUDA_VISIBLE_DEVICES": ""}, 'CUDA_VISIBLE_DEVICES is ""', False),
        ({"MS4_EMU_FAIL": "cuInit:*:34"}, "toolkit's stub of it", True),
        ({"MS4_EMU_FAIL": "cuInit:*:804"}, "driver is too old for the CUDA library", True),
        ({"MS4_EMU_FAIL": "cuInit:*:803"}, "are of different versions", True),
        ({"MS4_EMU_FAIL": "cuInit:*:802"}, "not ready yet", True),
        ({"MS4_EMU_FAIL": "cuInit:*:999"}, r"does not start \(cuInit: .+, 999\)", True),
        ({"MS4_EMU_CC": "75"}, "too old: it has compute capability 7.5", True),
        ({"MS4_EMU_FAIL": "cuModuleLoadData:1:209"}, "was built for other GPUs", True),
        ({"MS4_EMU_FAIL": "cuModuleLoadData:1:222"}, "for a newer driver; update the driver", True),
        ({"MS4_EMU_FAIL": "cuModuleLoadData:1:200"}, "for a newer driver; update the driver", True),
        ({"MS4_EMU_FAIL": "cuModuleLoadData:1:221"}, "may not compile for it", True),
        ({"MS4_GPU_CODE": "/nowhere"}, "MS4_GPU_CODE=/nowhere: no such file", True),
        ({"MS4_EMU_FAIL": "cuDevicePrimaryCtxRetain:*:46"}, r"the GPU failed \(cuDevicePrimaryCtxRetain", True),
    ],
)
def test_cuda_fails_with_a_reason_and_auto_goes_on(environment, want, told, driver):
    """told: a person who asked for nothing hears of it, too, but not where there is no card, or it is hidden."""
    failed = run("run", "--device", "cuda", "-n", "1", "Hi", **environment)
    assert failed.returncode == 1 and not failed.stdout and "Traceback" not in failed.stderr
    lines = [line for line in failed.stderr.splitlines() if line.startswith("ms4: error: ")]
    assert len(lines) == 1 and re.search(want, lines[0]), failed.stderr
    assert "--device cpu" in failed.stderr or "unset it" in failed.stderr
    went_on = run("run", "--device", "auto", "-n", "1", "Hi", **environment)
    assert went_on.returncode == 0 and went_on.stdout
    assert bool(re.search(f"the GPU is not used: .*{want}", went_on.stderr)) == told, went_on.stderr


@pytest.mark.slow
@pytest.mark.rare
def test_doctor_tells_why_there_is_none(driver):
    assert re.search(r"gpu +none: the NVIDIA driver finds no GPU; the CPU", run("doctor", MS4_EMU_DEVICES="0").stdout)
    hidden = run("doctor", MS4_EMU_DEVICES="0", CUDA_VISIBLE_DEVICES="7").stdout
    assert 'is "7"; the CPU' in hidden and "unset CUDA_VISIBLE_DEVICES" in hidden
    old = run("doctor", MS4_EMU_CC="75").stdout
    assert re.search(r"^! +gpu +emulated GPU 0, compute capability 7.5.*too old$", old, re.MULTILINE)

"""Facts about this machine, read from the kernel: processors, swap, huge pages, cached files.

What this process may have of processors and memory, the engine knows: `ms4.allowed`.

Every function answers None (or an empty value) where the kernel does not say; nothing here fails for a missing file.
"""

import errno
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)


def read(path: Path | str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def features() -> list[str]:
    """Those of FEATURES that the processor has."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    present = set(match[1].split()) if match else set()
    return [name for name in FEATURES if name in present]


def memory() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    pairs = re.findall(r"^(\w+):\s+(\d+) kB$", read("/proc/meminfo"), re.MULTILINE)
    return {name: 1024 * int(value) for name, value in pairs}


def own_memory() -> int:
    """Bytes that this process holds besides the pages of files; 0 if the kernel does not say."""
    match = re.search(r"^RssAnon:\s+(\d+) kB$", read("/proc/self/status"), re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


@dataclass(frozen=True)
class Link:
    """How a card hangs on its bus: lanes in use and at most, and the speed of one in GT/s, now and at most."""

    width: int
    most: int
    speed: float
    fastest: float

    @property
    def bytes_per_s(self) -> float:
        """When it works: a card that has nothing to do lowers its speed."""
        coded = 0.8 if self.fastest < 8 else 128 / 130
        return self.width * self.fastest * 1e9 * coded / 8

    def __str__(self) -> str:
        now = f", now {self.speed:g} GT/s" if self.speed < self.fastest else ""
        return f"PCIe x{self.width} of {self.fastest:g} GT/s, {self.bytes_per_s / 1e9:.1f} GB/s{now}"


def link(bus: str, root: str = "") -> Link | None:
    """Of the card with this address; None if the kernel does not say."""
    folder = f"{root}/sys/bus/pci/devices/{bus.lower()}"
    width, most = (read(f"{folder}/{name}_link_width") for name in ("current", "max"))
    speeds = [re.match(r"[0-9.]+", read(f"{folder}/{name}_link_speed")) for name in ("current", "max")]
    if not (width.isdigit() and most.isdigit() and all(speeds)):
        return None
    now, fastest = (float(speed[0]) for speed in speeds if speed)
    return Link(int(width), int(most), now, max(now, fastest))


def nvidia_driver(root: str = "") -> str:
    """The version of the driver in the kernel, such as 580.82.07; empty if there is none, or it does not say."""
    match = re.search(r"Module .*?\s([0-9]+\.[0-9.]+)\s", read(f"{root}/proc/driver/nvidia/version") + " ")
    return match[1] if match else ""


def huge_pages() -> str:
    """always, madvise or never; empty if the kernel does not say."""
    match = re.search(r"\[(\w+)\]", read(HUGE_PAGES))
    return match[1] if match else ""


def cached_share(path: str, samples: int = 256) -> float | None:
    """Which share of a file is in the page cache, by samples; None if the file system does not say."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            return None
        hits = sum(_is_cached(fd, size * i // samples) for i in range(samples))
        return hits / samples
    except (OSError, AttributeError):
        return None
    finally:
        os.close(fd)


def _is_cached(fd: int, offset: int) -> bool:
    """A read that may not wait succeeds only on a cached page."""
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return False
        raise

"""Facts about this machine, read from the kernel: processors, memory, limits of the container, cached files.

Every function answers None (or an empty value) where the kernel does not say; nothing here fails for a missing file.
"""

import errno
import os
import platform
import re
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
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
NO_LIMIT = 1 << 60  # what cgroup v1 writes where there is no limit is about this


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


def affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def cgroup_folders(controller: str) -> list[Path]:
    """Folders of this process in both versions of cgroups, the nearest first."""
    folders: list[Path] = []
    for line in read("/proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            base = CGROUP
        elif controller in names.split(","):
            base = CGROUP / controller
        else:
            continue
        inside = base / path.lstrip("/")
        folders += [inside, *[p for p in inside.parents if p.is_relative_to(base)]]
    return folders


def cpu_quota() -> float | None:
    """Processors that the container may use at a time; None: no limit."""
    found: list[float] = []
    for folder in cgroup_folders("cpu"):
        quota, _, period = read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    pairs = re.findall(r"^(\w+):\s+(\d+) kB$", read("/proc/meminfo"), re.MULTILINE)
    return {name: 1024 * int(value) for name, value in pairs}


def own_memory() -> int:
    """Bytes that this process holds besides the pages of files; 0 if the kernel does not say."""
    match = re.search(r"^RssAnon:\s+(\d+) kB$", read("/proc/self/status"), re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


def memory_limit() -> int | None:
    """Bytes that the container may use; None: no limit."""
    found = [
        int(text)
        for folder in cgroup_folders("memory")
        for text in (read(folder / "memory.max"), read(folder / "memory.limit_in_bytes"))
        if text.isdigit() and int(text) < NO_LIMIT
    ]
    return min(found, default=None)


def available_memory() -> int | None:
    """Bytes that a process may still take, page cache counted as free."""
    free, limit = memory().get("MemAvailable"), memory_limit()
    known = [n for n in (free, limit) if n is not None]
    return min(known, default=None)


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

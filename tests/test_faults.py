"""Faults that users of this and other runners met, each test named after its row in the list."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

import ms4
from ms4.cli import doctor
from ms4.models.mistral4 import ModelError, shape_of
from ms4.quant.gguf_file import GgufFile
from ms4.quant.tiny import Tiny, write_tiny

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
MEMINFO = f"MemTotal:       {32 << 20} kB\nMemFree:         {1 << 20} kB\nMemAvailable:   {30 << 20} kB\n"
UNLIMITED_V1 = "9223372036854771712\n"
JOB = "system.slice/job.service"


def fake_root(folder, groups, files):
    """A folder with a proc and a sys as the kernel would show them; `files` are below the mount of the cgroups."""
    texts = {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups}
    texts |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "groups, files, limit, where",
    [
        ("0::/\n", {"memory.max": "max\n"}, None, ""),
        ("0::/\n", {"memory.max": f"{4 * GIB}\n"}, 4, "memory.max"),
        (f"0::/{JOB}\n", {f"{JOB}/memory.max": f"{4 * GIB}\n"}, 4, f"{JOB}/memory.max"),
        (f"0::/{JOB}\n", {"system.slice/memory.max": f"{3 * GIB}\n", f"{JOB}/memory.max": "max\n"}, 3, "system.slice/"),
        (f"0::/{JOB}\n", {f"{JOB}/memory.max": f"{4 * GIB}\n", f"{JOB}/memory.high": f"{2 * GIB}\n"}, 2, "memory.high"),
        # A container that sees its own group at the mount, with the path of the world outside.
        ("0::/docker/0123\n", {"memory.max": f"{4 * GIB}\n"}, 4, "cgroup/memory.max"),
        ("0::/../../other\n", {"memory.max": f"{4 * GIB}\n", "other/memory.max": "1\n"}, 4, "cgroup/memory.max"),
        # Version 1, alone and beside version 2.
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": f"{4 * GIB}\n"}, 4, "memory/memory.limit_in_bytes"),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": UNLIMITED_V1}, None, ""),
        (
            "7:cpu,memory:/slurm/job_1/step_0\n0::/\n",
            {
                "memory/memory.limit_in_bytes": UNLIMITED_V1,
                "memory/slurm/job_1/memory.limit_in_bytes": f"{4 * GIB}\n",
                "memory/slurm/job_1/step_0/memory.limit_in_bytes": UNLIMITED_V1,
            },
            4,
            "slurm/job_1/memory.limit_in_bytes",
        ),
        # A container of version 1 does not see the groups above its own, in whose limits it is.
        (
            "5:memory:/kubepods/pod1/c1\n",
            {
                "memory/memory.limit_in_bytes": UNLIMITED_V1,
                "memory/memory.stat": f"cache 1\nhierarchical_memory_limit {4 * GIB}\ntotal_inactive_file 1\n",
            },
            4,
            "memory/memory.stat",
        ),
        (
            "5:memory:/\n",
            {
                "memory/memory.limit_in_bytes": UNLIMITED_V1,
                "memory/memory.stat": f"hierarchical_memory_limit {UNLIMITED_V1}",
            },
            None,
            "",
        ),
        ("5:memory:/a\n", {"a/memory.max": "1\n", "memory/a/memory.limit_in_bytes": UNLIMITED_V1}, None, ""),
        # What no kernel writes is no limit.
        ("", {"memory.max": "a lot\n"}, None, ""),
        ("0::/" + "x/" * 5000 + "\n", {"memory.max": "\n"}, None, ""),
    ],
)
def test_b4_limits_of_memory_are_seen_in_every_group(tmp_path, groups, files, limit, where):
    got = ms4.allowed(fake_root(tmp_path, groups, files))
    assert got.limit == (limit and limit * GIB)
    assert got.room == (limit * GIB if limit else 30 * GIB)
    assert where in got.limit_file and got.limit_file.startswith(str(tmp_path) if limit else "")
    assert got.cpus is None and got.n_threads == got.n_affinity


@pytest.mark.parametrize(
    "groups, files, cpus, where",
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None, ""),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5, "cgroup/cpu.max"),
        (f"0::/{JOB}\n", {f"{JOB}/cpu.max": "50000 100000\n"}, 0.5, f"{JOB}/cpu.max"),
        (
            f"0::/{JOB}\n",
            {f"{JOB}/cpu.max": "150000 100000\n", "system.slice/cpu.max": "100000 100000\n"},
            1,
            "slice/cpu",
        ),
        (
            "3:cpu,cpuacct:/a/b\n",
            {"cpu/a/cpu.cfs_quota_us": "25000\n", "cpu/a/cpu.cfs_period_us": "50000\n"},
            0.5,
            "/a/",
        ),
        (
            "3:cpuacct,cpu:/a\n",
            {"cpuacct,cpu/a/cpu.cfs_quota_us": "150000\n", "cpuacct,cpu/a/cpu.cfs_period_us": "100000\n"},
            1.5,
            "cpuacct,cpu/a/",
        ),
        ("0::/a", {"a/cpu.max": "50000"}, 0.5, "a/cpu.max"),  # as it is written: without a line end, and the period
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, None, ""),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "5000\n", "cpu/a/cpu.cfs_period_us": "0\n"}, None, ""),
    ],
)
def test_b4_quotas_are_seen_in_every_group(tmp_path, groups, files, cpus, where):
    got = ms4.allowed(fake_root(tmp_path, groups, files))
    assert got.cpus == cpus and where in got.cpus_file
    assert got.n_threads == (got.n_affinity if cpus is None else max(1, min(got.n_affinity, int(cpus))))
    assert got.limit is None


@pytest.mark.parametrize("name", ["cpuset.cpus.effective", "cpuset/cpuset.effective_cpus", "cpuset/cpuset.cpus"])
def test_b4_a_set_of_processors_counts_where_it_leaves_fewer(tmp_path, name):
    n = ms4.allowed().n_affinity
    wide = fake_root(tmp_path / "wide", "0::/\n", {name: f"0-{n - 1}\n"})
    assert ms4.allowed(wide).cpus is None
    for text, count in (("3\n", 1), ("0,5-6\n", 3), ("1-2,7-8\n", 4)):
        got = ms4.allowed(fake_root(tmp_path / text.strip(), "0::/\n", {name: text}))
        assert got.cpus == (count if count < n else None)
        assert got.n_threads == min(count, n)


def test_b4_the_engine_and_doctor_read_the_same():
    got = ms4.allowed()
    assert ms4.probe().n_threads == got.n_threads <= len(os.sched_getaffinity(0)) == got.n_affinity
    assert f"{got.n_threads} by default" in doctor.check_threads().text


def test_b4_nothing_to_read_is_no_limit(tmp_path):
    got = ms4.allowed(tmp_path / "nothing")
    assert (got.room, got.limit, got.cpus, got.total) == (None, None, None, 0) and got.n_threads >= 1


STAT = f"anon 5\nfile {3 * GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}\nshmem 7\n"


@pytest.mark.parametrize(
    "groups, files, used",
    [
        ("0::/a\n", {"a/memory.max": f"{8 * GIB}\n", "a/memory.current": f"{7 * GIB}\n"}, 7),
        # The pages of files go when somebody needs memory.
        ("0::/a\n", {"a/memory.max": f"{8 * GIB}", "a/memory.current": f"{7 * GIB}\n", "a/memory.stat": STAT}, 4),
        (
            "5:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": f"{8 * GIB}\n",
                "memory/a/memory.usage_in_bytes": f"{7 * GIB}\n",
                "memory/a/memory.stat": f"total_active_file {GIB}\ntotal_inactive_file {GIB}\n",
            },
            5,
        ),
        # More is used than the limit, as after it was lowered.
        ("0::/\n", {"memory.max": f"{8 * GIB}\n", "memory.current": f"{9 * GIB}\n"}, 9),
        # The group with the least room counts, not the one with the lowest limit.
        (
            "0::/a\n",
            {
                "memory.max": f"{8 * GIB}\n",
                "memory.current": f"{7 * GIB}\n",
                "a/memory.max": f"{6 * GIB}\n",
                "a/memory.current": f"{GIB}\n",
            },
            7,
        ),
    ],
)
def test_b5_a_limit_is_not_room(tmp_path, monkeypatch, groups, files, used):
    got = ms4.allowed(fake_root(tmp_path, groups, files))
    assert (got.limit, got.used, got.room) == (8 * GIB, used * GIB, max(0, 8 - used) * GIB)
    monkeypatch.setattr(ms4, "allowed", lambda: got)
    text = doctor.check_memory().text
    assert text.startswith(f"{max(0, 8 - used)}.0 GiB available of 32.0 GiB")
    assert text.endswith(f"limit 8.0 GiB, {used}.0 GiB used: {got.limit_file}")


def test_b5_the_machine_may_have_less_than_the_limit_leaves(tmp_path):
    got = ms4.allowed(fake_root(tmp_path, "0::/\n", {"memory.max": f"{64 * GIB}\n", "memory.current": f"{GIB}\n"}))
    assert got.limit == 64 * GIB and got.room == got.available == 30 * GIB


def test_d4_choosing_looks_at_the_stop_flag(tmp_path):
    program = tmp_path / "checkroute"
    sources = ("tests/checkroute.c", "csrc/cpu/pool.c", "csrc/memory.c", "csrc/error.c")
    options = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-ffunction-sections", "-Wl,--gc-sections", "-Icsrc")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, *options, *sources, "-pthread", "-o", str(program)], cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n")


@pytest.mark.parametrize("key, value", [("expert_count", 4097), ("expert_count", 65_536), ("expert_used_count", 65)])
def test_d4_numbers_of_experts_far_beyond_the_family_are_refused(tmp_path, key, value):
    """A small file could ask for any amount of work."""
    file = GgufFile.open(write_tiny(tmp_path / "t.gguf", Tiny(n_layer=1))[0])
    file.metadata[f"mistral4.{key}"] = value
    with pytest.raises(ModelError, match=f"{key} is {value}; ms4 expects a finite number from 1 to (4096|64)$"):
        shape_of(file)

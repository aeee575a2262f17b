"""Experts that stay on the disk: the same bits for every budget, number of threads and timing, and clear ends of what
cannot go on."""

import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_hashes
from standins import fail_every_allocation

import ms4
from ms4.cli import render
from ms4.models.model import Model
from ms4.quant.tiny import Tiny, write_tiny

ROOT = Path(__file__).parents[1]
ALL = 1 << 40  # bytes: more than there is
SMALL = ("-Icsrc", "-pthread", "-DMOST_READING=5", "-DMOST_GIVEN=3")
SLOTS = ("tests/checkslots.c", "csrc/slots.c", "csrc/disk.c", "csrc/memory.c", "csrc/error.c")
IDS = np.random.default_rng(7).integers(0, 1400, 150)
FEW = ("fused, Q8_0", "separate, Q8_0", "dense layer, tied output, F32", "no shared expert, Q8_0", "split, Q8_0")
has_hashes = pytest.mark.skipif(ms4.probe().isa == "ref", reason="ref sums in double: its bits are its own")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")[0]


@pytest.fixture(scope="module")
def want(tiny):
    """The logits of IDS and of one token more, with everything in memory."""
    with Model.open(tiny, load="copy") as model, model.session(200) as session:
        return answer(session)


def answer(session):
    session.rewind(0)
    return np.concatenate([session.feed(IDS, all_logits=True), [session.feed([5])]])


def compiled(source, out, *flags):
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", *flags, *source, "-o", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    return str(out)


# --- the same bits ------------------------------------------------------------------------------------------------


def hash_of_stream(folder, tiny, threads, n_bytes):
    path = write_tiny(folder / "t.gguf", tiny)[0]
    with Model.open(path, load="stream", threads=threads) as model, model.session(200) as session:
        model.engine.fix_slots(n_bytes)
        assert model.engine.stats().load == "stream"
        return test_hashes.digest(answer(session))


@has_hashes
@pytest.mark.parametrize("name", FEW)
def test_what_stays_on_the_disk_never_shows(name, tmp_path, rng):
    threads, n_bytes = int(rng.integers(1, 6)), int(rng.choice([1, 100_000, 300_000, ALL]))
    assert hash_of_stream(tmp_path, test_hashes.CASES[name], threads, n_bytes) == test_hashes.stored()[name]


@has_hashes
@pytest.mark.slow
@pytest.mark.parametrize("name", test_hashes.CASES)
def test_what_stays_on_the_disk_never_shows_for_any_file_budget_and_threads(name, tmp_path, rng):
    tiny = test_hashes.CASES[name]
    for threads in range(1, 6):
        for n_bytes in (1, int(rng.integers(1, 2_000_000)), ALL):
            got = hash_of_stream(tmp_path, tiny, threads, n_bytes)
            assert got == test_hashes.stored()[name], (threads, n_bytes)


def test_any_budget_gives_the_same_bits_and_is_kept(tiny, want):
    with Model.open(tiny, load="stream", threads=2) as model, model.session(200) as session:
        engine = model.engine
        seen = []
        for n_bytes in (1, 60_000, 130_000, 400_000, ALL, 200_000, 1):
            engine.fix_slots(n_bytes)
            assert np.array_equal(answer(session), want)
            stats = engine.stats()
            assert stats.slots >= 1 and stats.slot_bytes <= max(n_bytes, stats.slot_bytes // stats.slots)
            seen.append(stats)
        assert seen[4].experts_there > seen[3].experts_there and seen[4].slots == 12
        # With all of them in memory nothing is read.
        engine.fix_slots(ALL)
        answer(session)
        before = engine.stats()
        assert np.array_equal(answer(session), want)
        after = engine.stats()
        wanted = after.experts_wanted - before.experts_wanted
        assert wanted > 12 and after.experts_there - before.experts_there == wanted
        assert after.experts_read == before.experts_read and after.bytes_disk == before.bytes_disk


def test_what_is_read_is_counted(tiny):
    tensors = Model.open(tiny).gguf.tensors
    one = sum(t.bytes for name, t in tensors.items() if "_exps" in name and name.startswith("blk.0.")) // 6
    with Model.open(tiny, load="stream") as model, model.session(200) as session:
        model.engine.fix_slots(ALL)
        session.feed([5])
        stats = model.engine.stats()
        assert (stats.experts_wanted, stats.experts_there, stats.experts_read) == (6, 0, 6)
        assert stats.bytes_disk == 6 * one and stats.ns_disk > 0
        assert stats.slots == 6 and stats.slot_bytes >= stats.bytes_disk


def test_two_devices_share_experts_from_the_disk(tiny, want, rng):
    with Model.open(tiny, load="stream", threads=2) as model, model.session(200) as session:
        for n_bytes in (1, 200_000, ALL):
            model.engine.fix_slots(n_bytes)
            model.engine.place_experts(rng.integers(0, 2, (2, 6)))
            assert np.array_equal(answer(session), want)


def test_sessions_in_one_step_share_experts_from_the_disk(tiny):
    def steps(**how):
        with Model.open(tiny, **how) as model, model.session(96) as one, model.session(96) as two:
            if how:
                model.engine.fix_slots(1)
            spans = [ms4.Span(one, IDS[:40]), ms4.Span(two, IDS[40:41])]
            return np.concatenate([*model.engine.step(spans), *model.engine.step(spans[::-1])])

    assert np.array_equal(steps(load="stream"), steps())


def test_what_was_saved_with_a_file_in_memory_is_loaded_with_one_on_the_disk(tiny, tmp_path):
    with open(tmp_path / "saved", "w+b") as file:
        with Model.open(tiny, load="map") as model, model.session(64) as session:
            session.feed(IDS[:20])
            session.save(file.fileno())
            want = session.feed([5])
        file.seek(0)
        with Model.open(tiny, load="stream") as model, model.session(64) as session:
            assert session.load(file.fileno()) == 20
            assert np.array_equal(session.feed([5]), want)


def test_a_stop_ends_waiting_for_the_disk(tiny, want):
    with Model.open(tiny, load="stream") as model, model.session(1600) as session:
        model.engine.fix_slots(1)
        stop = ms4.StopFlag()
        timer = threading.Timer(0.02, stop.set)
        timer.start()
        with pytest.raises(ms4.Canceled):
            for _ in range(1000):
                session.feed([5], stop=stop)
        timer.join()
        assert np.array_equal(answer(session), want)


def test_the_limits_of_the_machine_are_measured_without_what_is_on_the_disk(tiny):
    with Model.open(tiny, load="stream") as model:
        limits = model.engine.measure(1 << 30)
        assert limits.read_bytes_per_s > 0 and limits.int8_macs_per_s > 0


# --- slots alone --------------------------------------------------------------------------------------------------


def test_slots_are_like_the_model_of_them(tmp_path, rng):
    program = compiled(SLOTS, tmp_path / "checkslots", *SMALL)
    done = subprocess.run([program, str(rng.integers(1 << 32)), "500"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n")


@pytest.mark.slow
@pytest.mark.parametrize("n, flags", [(100_000, []), (5_000, ["-g", "-fsanitize=thread"])], ids=["many", "tsan"])
def test_slots_are_like_the_model_of_them_for_long(n, flags, tmp_path, rng):
    program = compiled(SLOTS, tmp_path / "checkslots", *SMALL, *flags)
    done = subprocess.run([program, str(rng.integers(1 << 32)), str(n)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


WRONG = {
    "what another share holds is let go": ("    take_back(s, share);", "    take_back(s, -1);"),
    "what is held for a share may leave": (" || s->mark[at->id] > most", ""),
    "nobody is told of memory that goes back": ("if (may_leave(s, memory, p->slot_bytes)) memory", "memory"),
    "it is given before all of it is there": ("|| state_of(at) == DISK_READING;", ";"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_the_model_of_slots_has_teeth(what, tmp_path, rng):
    right, wrong = WRONG[what]
    source = (ROOT / "csrc" / "slots.c").read_text()
    assert source.count(right) == 1
    (tmp_path / "slots.c").write_text(source.replace(right, wrong))
    program = compiled((SLOTS[0], str(tmp_path / "slots.c"), *SLOTS[2:]), tmp_path / "checkslots", *SMALL, "-w")
    try:
        done = subprocess.run([program, str(rng.integers(1 << 32)), "2000"], capture_output=True, text=True, timeout=40)
    except subprocess.TimeoutExpired:
        return
    assert (done.returncode, done.stdout) != (0, "ok\n")


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [pytest.param(17, id="some"), pytest.param(1, id="each", marks=pytest.mark.slow)])
def test_reads_that_fail_stop_short_or_come_late(tiny, tmp_path, every):
    library = compiled(["tests/faultinj.c"], tmp_path / "faultinj.so", "-shared", "-fPIC", "-ldl")
    before = os.environ.get("LD_PRELOAD", "").split()
    env = {**os.environ, "LD_PRELOAD": " ".join([*before, library])}
    command = [sys.executable, "tests/faulty_reads.py", str(tiny), str(every)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_a_file_that_shrinks_is_an_error(tmp_path):
    path = write_tiny(tmp_path / "t.gguf")[0]
    with Model.open(path, load="stream") as model, model.session(8) as session:
        model.engine.fix_slots(1)
        session.feed([1])
        os.truncate(path, os.path.getsize(path) - 20000)
        with pytest.raises(ms4.EngineError, match="t.gguf: the file became shorter while it was in use; load it again"):
            for i in range(6):
                session.feed([i])


def test_a_file_that_is_written_to_is_an_error(tmp_path):
    path = write_tiny(tmp_path / "t.gguf")[0]
    with Model.open(path, load="stream") as model, model.session(8) as session:
        session.feed([1])
        with open(path, "r+b") as file:
            file.seek(30000)
            file.write(b"x")
        with pytest.raises(ms4.EngineError, match="t.gguf: the file was written to while it was in use; load it again"):
            session.feed([2])
        assert session.length == 1


def test_a_file_that_is_replaced_is_read_to_the_end(tmp_path, want):
    path = write_tiny(tmp_path / "t.gguf")[0]
    other = write_tiny(tmp_path / "other.gguf", Tiny(seed=1))[0]
    with Model.open(path, load="stream") as model, model.session(200) as session:
        model.engine.fix_slots(1)
        os.replace(other, path)
        assert np.array_equal(answer(session), want)


@pytest.mark.slow
def test_every_failing_allocation_of_a_stream_is_reported(tiny, monkeypatch):
    def once():
        with Model.open(tiny, threads=2, load="stream") as model, model.session(32) as session:
            return session.feed([5, 6, 7])

    fail_every_allocation(once, monkeypatch, 30)


# --- how much memory ----------------------------------------------------------------------------------------------


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_file_that_does_not_fit_stays_on_the_disk(tiny):
    with Model.open(tiny, ram=resident() + (64 << 20)) as model, model.session(8) as session:
        session.feed([1])
        stats = model.engine.stats()
        assert stats.load == "stream" and 0 < stats.slot_bytes_most < 64 << 20
    with Model.open(tiny, ram=resident() + (3 << 30)) as model:
        assert model.engine.stats().load in ("map", "copy")


WITHIN = """
import sys
import numpy as np
from ms4.models.model import Model

def status(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024

ram, ids = status("VmRSS") + int(sys.argv[2]), np.random.default_rng(1).integers(0, 1400, 600)
with Model.open(sys.argv[1], ram=ram, threads=2) as model, model.session(900) as session:
    for n in (1, 1, 30, 200, 300):  # buffers grow, and slots make room for them
        session.feed(ids[:n])
        for i in ids[:8]:
            session.feed([i])
    stats = model.engine.stats()
assert stats.load == "stream" and stats.ram == ram and stats.experts_read > stats.slots > 0, stats
print(status("VmHWM") / ram)
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_bytes", [60 << 20, 120 << 20])
def test_the_process_keeps_within_its_memory(tmp_path, n_bytes):
    big = Tiny(n_layer=4, n_expert=32, n_used=4, d_model=512, d_expert=1024)
    path = write_tiny(tmp_path / "t.gguf", big)[0]
    command = [sys.executable, "-c", WITHIN, str(path), str(n_bytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.02


BESIDE = """
import subprocess
import sys
from ms4.models.model import Model

GROW = "import time; held = [(bytearray(b'x' * (5 << 20)), time.sleep(0.1)) for i in range(20)]"
with Model.open(sys.argv[1], load="stream", threads=2) as model, model.session(2000) as session:
    for i in range(300):
        session.feed([i])
    before = model.engine.stats()
    other = subprocess.Popen([sys.executable, "-c", GROW])
    least = before.slot_bytes_most
    while other.poll() is None:
        session.rewind(min(session.length, 1000))
        session.feed([7])
        least = min(least, model.engine.stats().slot_bytes_most)
assert before.slot_bytes > 100 << 20, before
print(other.returncode, least < before.slot_bytes_most - (20 << 20))
"""


@pytest.fixture
def small_cgroup():
    """A memory cgroup of 400 MB: what writes a process into it."""
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    folder = (one if one.is_dir() else two) / f"ms4-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if one.is_dir() else "memory.max")).write_text(str(400 << 20))
    except OSError:
        pytest.skip("no memory cgroup can be made here")
    yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))
    folder.rmdir()


@pytest.mark.slow
def test_slots_make_room_for_others_before_the_system_kills_anybody(tmp_path, small_cgroup):
    big = Tiny(n_layer=4, n_expert=48, n_used=4, d_model=512, d_expert=1024)
    path = write_tiny(tmp_path / "t.gguf", big)[0]
    command = [sys.executable, "-c", BESIDE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_cgroup)
    assert (done.returncode, done.stdout) == (0, "0 True\n"), done.stderr


def test_a_budget_that_is_too_small_is_refused(tiny):
    with pytest.raises(MemoryError, match="of memory are not enough: all but the experts are 0.0 GB"):
        Model.open(tiny, load="stream", ram=1000)
    for load in ("map", "copy"):
        with pytest.raises(ValueError, match="a budget of memory needs load mode auto or stream"):
            Model.open(tiny, load=load, ram=1 << 40)
    with pytest.raises(ValueError, match="no expert stays on the disk"):
        with Model.open(tiny, load="map") as model:
            model.engine.fix_slots(1)


# --- what is used most --------------------------------------------------------------------------------------------


def test_what_was_used_most_is_read_before_anybody_asks(tiny, want):
    with Model.open(tiny, load="stream") as model, model.session(200) as session:
        assert np.array_equal(answer(session), want)
        uses, n_used = model.engine.uses(), model.engine.stats().slots
    with Model.open(tiny, load="stream") as model, model.session(200) as session:
        model.engine.warm(uses)
        warm = model.engine.stats()
        assert warm.slots == warm.experts_read == n_used and warm.experts_wanted == 0
        assert np.array_equal(answer(session), want)
        assert model.engine.stats().experts_read == n_used  # none of them twice
        for damaged in (b"", uses[:-1], uses[:50] + bytes([uses[50] ^ 1]) + uses[51:]):
            with pytest.raises(ms4.EngineError, match="counts of experts"):
                model.engine.warm(damaged)
        assert np.array_equal(answer(session), want)


def test_the_uses_of_a_file_in_memory_are_not_kept(tiny):
    with Model.open(tiny, load="map") as model:
        assert model.engine.uses() == b""
        with pytest.raises(ValueError, match="no expert moves"):
            model.engine.warm(b"x")


def test_a_prompt_does_not_push_out_what_is_used_all_the_time(tmp_path):
    """Twelve layers of a prompt pass through half as many slots as there are experts, twice."""
    path = write_tiny(tmp_path / "t.gguf", Tiny(n_layer=12))[0]
    with Model.open(path, load="stream", threads=1) as model, model.session(200) as session:
        session.feed([7])  # the sizes of slots are rounded up: measure one
        stats = model.engine.stats()
        model.engine.fix_slots(stats.slot_bytes // stats.slots * 36)
        for _ in range(4):
            before = model.engine.stats()
            session.rewind(0)
            session.feed(IDS)
            stats = model.engine.stats()
        there = (stats.experts_there - before.experts_there) / (stats.experts_wanted - before.experts_wanted)
        assert there > 0.2, there  # used longest ago: none, as a layer comes back after all the others


# --- the commands -------------------------------------------------------------------------------------------------


def test_run_says_what_stays_on_the_disk_and_what_that_cost(ms4):
    want = ms4("run", "-n", "3", "--greedy", "Hi")
    code, out, err = ms4("run", "-n", "3", "--greedy", "--load", "stream", "--stats", "Hi")
    assert (code, out) == (want[0], want[1])
    note, *_, stats = err.splitlines()
    assert "are left for experts" in note and "read from the disk when they are needed" in note
    assert " · experts " in stats and " in memory, " in stats and " MB from the disk, waited " in stats
    assert "experts" not in ms4("run", "-n", "3", "--stats", "-q", "Hi")[2]
    assert "experts" in ms4("chat", "--load", "stream", "-q", stdin=b"Hi\n/stats\n")[2]


def test_memory_that_cannot_be_kept_is_refused_in_one_line(ms4):
    code, out, err = ms4("run", "--ram", "1M", "--load", "stream", "Hi")
    assert (code, out) == (6, "") and "of memory at the least, 1.0 MB are there: all but experts" in err
    code, out, err = ms4("run", "--ram", "4G", "--load", "map", "Hi")
    assert (code, out) == (2, "") and err.startswith(
        "ms4: error: --ram cannot limit --load map\nhint: leave --load out"
    )
    assert ms4("run", "--ram", "4X", "Hi")[0] == 2


def test_a_wait_for_the_disk_is_said_when_it_lasts(tiny):
    with Model.open(tiny, load="stream") as model:
        stats = model.engine.stats()
    assert stats.ns_waiting == 0 and render.waiting(stats) == ""
    assert render.waiting(replace(stats, ns_waiting=4_900_000_000)) == ""
    assert render.waiting(replace(stats, ns_waiting=7_100_000_000)) == "  waiting for the disk 7 s"


def test_bench_counts_what_comes_from_the_disk(tiny, ms4):
    arguments = ("bench", "-m", tiny, "--pp", "8", "--tg", "4", "-r", "1", "--format", "json", "--load")
    prefill, decode = json.loads(ms4(*arguments, "stream")[1])["rows"]
    assert prefill["share_of_experts_in_memory"] == decode["share_of_experts_in_memory"] == 1.0  # from the warm-up
    assert decode["disk_bytes_per_token"] == 0
    assert json.loads(ms4(*arguments, "map")[1])["rows"][0]["disk_bytes_per_token"] == 0


def test_the_commands_remember_what_was_used(ms4, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    command = ("run", "-n", "3", "--greedy", "--load", "stream", "--stats", "Hi")
    first, second = ms4(*command), ms4(*command)
    assert first[:2] == second[:2]
    (kept,) = (tmp_path / "ms4" / "uses").iterdir()
    size = kept.stat().st_size
    kept.write_bytes(b"damaged")
    assert ms4(*command)[:2] == first[:2] and kept.stat().st_size == size

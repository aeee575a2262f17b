"""An engine on a GPU that is emulated (tests/cuda): the bits of the CPU, and what happens when a call of it fails.

The emulated driver does kernels and copies late and in random legal order, and ends the process where the host touches
the card's memory or a kernel what is not its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_hashes

import ms4
from ms4.cli import expected, selftest
from ms4.models import clock, forecast, pixtral
from ms4.models.answer import Answer
from ms4.models.model import Model
from ms4.models.prompt import Prompt
from ms4.models.sampling import Sampler, SamplingParams
from ms4.models.scheduler import Scheduler
from ms4.models.tokenizer import Tokenizer
from ms4.quant.gguf_file import GgufFile
from ms4.quant.tiny import Tiny, write_tiny

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "build" / "cuda" / "libcuda_emu.so"
DEMO = ROOT / "models" / "demo"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.rare,  # the driver is this process's for good
    pytest.mark.skipif(ms4.probe().isa == "ref", reason="ref sums in double: its bits are its own"),
]


def emulated(**more):
    """The environment of a process whose GPU is emulated."""
    return {**os.environ, "MS4_LIBCUDA": str(DRIVER), "MS4_GPU_CODE": __file__, **more}


@pytest.fixture(scope="module", autouse=True)
def driver():
    """Builds the emulated driver; this process takes it for that of the machine."""
    made = subprocess.run(
        ["make", "-f", "tests/cuda/Makefile", "driver"], cwd=ROOT, capture_output=True, text=True, errors="replace"
    )
    assert made.returncode == 0, made.stderr[-2000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MS4_LIBCUDA", str(DRIVER))
        patch.setenv("MS4_GPU_CODE", __file__)
        yield


@pytest.fixture
def on_gpu(monkeypatch):
    """on_gpu(vram=0): from now on every model is opened on the GPU; a list of them."""
    opened, plain = [], Model.open.__func__

    def choose(vram=0, device="cuda"):
        def open_there(cls, path, **options):
            opened.append(plain(cls, path, **{"device": device, "vram": vram, **options}))
            return opened[-1]

        monkeypatch.setattr(Model, "open", classmethod(open_there))
        return opened

    return choose


HASHES = dict(test_hashes.measure())
OF_TINY = [name for name in HASHES if name.endswith("Q8_0") or name.endswith("F32") and "bravo" not in name]


@pytest.mark.parametrize("name", [*OF_TINY, "all Q4_K", "all Q6_K", "all IQ4_XS", "all MXFP4", "bravo image"])
def test_the_logits_have_the_bits_of_the_cpu(name, on_gpu):
    opened = on_gpu()
    assert HASHES[name]() == test_hashes.stored()[name]
    assert opened


def test_sessions_in_turns_have_the_bits_of_the_cpu(on_gpu):
    on_gpu(device="cuda:safe")
    assert HASHES["two sessions in chunks"]() == test_hashes.stored()["two sessions in chunks"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "t.gguf", Tiny())[0]


def everything(model, folder):
    """What sessions can do: steps of several, sharing, writing behind what is shared, rewinding, saving, loading."""
    ids, got = np.random.default_rng(5).integers(0, 1400, (3, 400)), []
    with model.session(600) as one, model.session(600) as two, model.session(600) as three:
        got.append(one.feed(ids[0, :300]))
        two.share(one, 200)
        spans = [ms4.Span(one, ids[1, :1]), ms4.Span(two, ids[1, :2], n_logits=2), ms4.Span(three, ids[2, :40])]
        got += model.engine.step(spans)
        spans = [ms4.Span(s, ids[2, 50:51]) for s in (three, two, one)]
        got += model.engine.step(spans)
        one.rewind(130)
        got.append(one.feed(ids[0, 130:140], all_logits=True))
        with open(folder / "session", "wb+") as file:
            one.save(file.fileno())
            file.seek(0)
            three.load(file.fileno())
        got += [three.feed(ids[1, 5:6]), one.feed(ids[1, 5:6]), two.feed(ids[1, 5:300])]
    return [np.atleast_2d(part) for part in got]


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_sessions_share_and_come_back_from_files(share, tiny, tmp_path, rng):
    with Model.open(tiny) as cpu:
        want = everything(cpu, tmp_path)
    with Model.open(tiny, device="cuda") as gpu:
        place = rng.random((gpu.shape.n_layer, gpu.shape.n_expert)) < share
        gpu.engine.place_experts(place.astype(np.uint8))
        got = everything(gpu, tmp_path)
        stats = gpu.engine.stats()
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert (stats.pairs_on_gpu == 0) == (share == 1) and (stats.pairs_on_gpu < stats.experts_used) == (share > 0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A vocabulary so large that one launch does not find the highest logits."""
    return write_tiny(tmp_path_factory.mktemp("wide") / "t.gguf", Tiny(n_layer=1, n_vocab=4500, n_unused=3100))[0]


def the_highest(engine, wants, n_vocab):
    """Steps in which each session wants so many of the highest logits, in company and then alone; what they gave."""
    found, random = [], np.random.default_rng(2)
    sessions = [engine.session(64) for _ in wants]
    for n in (7, 1, 1):
        ids = random.integers(5, 900, (len(wants), n))
        found += engine.step([ms4.Span(s, ids[i], None, 1, None, wants[i], n_vocab) for i, s in enumerate(sessions)])
    before = engine.stats().bytes_fetched
    for k, session in zip(wants, sessions, strict=True):
        found += engine.step([ms4.Span(session, np.array([9]), None, 1, None, k, n_vocab)])
        found.append(engine.stats().bytes_fetched - before)
        before += found[-1]
        session.close()
    return found


@pytest.mark.parametrize("device", ["cuda", "cuda:safe"])
@pytest.mark.parametrize("n_among", [4500, 1400])
def test_the_highest_logits_are_those_of_the_cpu_and_no_others_come_home(n_among, device, wide):
    wants = (1, 40, 0, 256, 1, 1, 3)
    with Model.open(wide) as cpu, Model.open(wide, device=device) as gpu:
        want, got = (the_highest(model.engine, wants, n_among) for model in (cpu, gpu))
        choices = 8 * gpu.shape.n_layer * gpu.shape.n_expert_used if device == "cuda" else 0  # written straight there
    fetched = [part for part in got if isinstance(part, int)]
    assert fetched == [(8 * k or 4 * 4500) + choices for k in wants]  # a logit and its id; or all logits
    for theirs, ours in zip(want, got, strict=True):
        if isinstance(ours, ms4.Highest):
            assert np.array_equal(theirs.ids, ours.ids) and theirs.logits.tobytes() == ours.logits.tobytes()
        elif not isinstance(ours, int):
            assert theirs.tobytes() == ours.tobytes()


GREEDY, TOP_K, ALL = {"temperature": 0.0}, {"temperature": 1.5, "top_k": 40}, {"temperature": 1.5}


@pytest.mark.parametrize("device", ["cuda", "cuda:safe"])
@pytest.mark.parametrize("hows", [[GREEDY], [TOP_K], [TOP_K | {"top_p": 0.7, "min_p": 0.01}], [GREEDY, ALL, TOP_K]])
def test_answers_that_need_few_logits_are_those_of_the_cpu_and_fetch_no_others(hows, device, wide):
    said, n = {}, 12
    for on in ("cpu", device):
        with Model.open(wide, device=on) as model, Scheduler(model.engine) as scheduler:
            tokenizer, prompt = Tokenizer(model.vocabulary), Prompt(list(range(1000, 1020)))
            samplers = [Sampler(SamplingParams(**how, seed=4)) for how in hows]
            answers = [Answer(prompt, sampler, tokenizer, 64, max_tokens=n) for sampler in samplers]
            before = model.engine.stats().bytes_fetched
            for running in [scheduler.submit(answer, scheduler.open(64)) for answer in answers]:
                list(running)
            fetched = model.engine.stats().bytes_fetched - before
            said[on] = [answer.ids for answer in answers]
    assert said[device] == said["cpu"] and all(said["cpu"])
    n_all = sum(len(ids) for ids, how in zip(said[device], hows, strict=True) if how is ALL)
    assert n_all * 4500 * 4 <= fetched < (n_all + 1) * 4500 * 4  # and a prompt's choice of experts


def test_files_of_sessions_are_the_same(tiny, tmp_path):
    for device in ("cpu", "cuda"):
        with Model.open(tiny, device=device) as model, model.session(300) as session:
            session.feed(np.arange(200))
            with open(tmp_path / device, "wb") as file:
                session.save(file.fileno())
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes()


def test_a_stopped_span_leaves_its_session_as_it_was(tiny):
    with Model.open(tiny, device="cuda") as model, model.session(300) as one, model.session(300) as two:
        one.feed(np.arange(150))
        stop = ms4.StopFlag()
        stop.set()
        with pytest.raises(ms4.Canceled):
            one.feed(np.arange(20), stop=stop)
        assert one.length == 150
        two.feed(np.arange(150))
        assert np.array_equal(one.feed([7]), two.feed([7]))


def test_single_tokens_have_the_bits_of_the_cpu_at_any_depth(tiny):
    """Graphs that change: two conversations in turns, across the ends of blocks; nobody wants logits; two at once."""
    ids, said = np.random.default_rng(8).integers(0, 1400, (2, 400)), {}
    for device in ("cpu", "cuda"):
        got = said[device] = []
        with Model.open(tiny, device=device) as model, model.session(600) as one, model.session(600) as two:
            got += [one.feed(ids[0, :126]), two.feed(ids[1, :382])]
            for i in range(5):
                got += [one.feed(ids[0, 126 + i : 127 + i]), two.feed(ids[1, 382 + i : 383 + i])]
            one.feed(ids[0, 131:132], n_logits=0)
            got.append(one.feed(ids[0, 132:133]))
            got += [logits[0] for logits in model.engine.step([ms4.Span(one, ids[0, 133:134]), ms4.Span(two, [5])])]
            got.append(two.feed(ids[1, 390:391]))
    assert all(np.array_equal(a, b) for a, b in zip(said["cpu"], said["cuda"], strict=True))


def test_experts_move_while_tokens_are_computed():
    """Too little room for all experts: some are computed by the CPU, and those in slots change."""
    ids, said = np.random.default_rng(3).integers(5, 900, 40), {}
    for device in ("cpu", "cuda"):
        with Model.open(DEMO / "ms4-demo.gguf", device=device, vram=24 << 20) as model, model.session(256) as session:
            logits = [session.feed(ids)]
            for _ in range(12):
                logits.append(session.feed([int(np.argmax(logits[-1]))]))
            said[device] = np.array(logits)
            stats = model.engine.stats()
    assert np.array_equal(said["cpu"], said["cuda"])
    assert 0 < stats.vram_slots < stats.experts and stats.uploads and stats.vram_bytes <= 24 << 20
    assert 0 < stats.pairs_on_gpu < stats.experts_used
    assert f"{stats.vram_slots} of {stats.experts} experts fit on the GPU" in stats.note


def test_twenty_prompts_have_the_tokens_of_the_cpu_while_experts_come_and_go():
    """As `ms4 run --vram 24M` does one after the other; at temperature 0."""
    words, said = "the sum of red and blue is a small square below two lines of text in France".split(), {}
    prompts = [" ".join(words[i % 7 : i % 7 + 3 + i % 5]) + f" {i}" for i in range(20)]
    for device in ("cpu", "cuda"):
        said[device] = []
        with Model.open(DEMO / "ms4-demo.gguf", device=device, vram=24 << 20) as model, model.session(64) as session:
            tokenizer = Tokenizer(model.vocabulary)
            for prompt in prompts:
                session.rewind(0)
                logits = session.feed(tokenizer.encode(prompt))
                ids = [int(np.argmax(logits))]
                while len(ids) < 5:
                    ids.append(int(np.argmax(session.feed(ids[-1:]))))
                said[device].append((ids, tokenizer.decode(ids)))
            stats = model.engine.stats()
    assert said["cpu"] == said["cuda"]
    assert stats.vram_slots < stats.experts and stats.uploads and 0 < stats.pairs_on_gpu < stats.experts_used


def test_experts_that_were_used_before_are_there_from_the_start():
    """Counts of another engine, by file: whoever begins with them has the hot experts in its slots."""
    ids, shares, uses = np.random.default_rng(3).integers(5, 900, 60), [], b""
    for _ in range(2):
        with Model.open(DEMO / "ms4-demo.gguf", device="cuda", vram=24 << 20) as model, model.session(256) as session:
            if uses:
                model.engine.warm(uses)
            session.feed(ids)
            stats = model.engine.stats()
            shares.append(stats.pairs_on_gpu / stats.experts_used)
            uses = model.engine.uses()
    assert shares[1] > 1.2 * shares[0]


@pytest.mark.parametrize("vram", [0, 24 << 20])
def test_experts_on_the_disk_go_to_the_card_too(vram):
    """Those without a slot on the card come from the disk for the CPU."""
    ids, said = np.random.default_rng(9).integers(5, 900, 60), []
    for options in ({}, {"device": "cuda", "load": "stream", "vram": vram}):
        with Model.open(DEMO / "ms4-demo.gguf", **options) as model, model.session(200) as session:
            said.append(np.stack([session.feed(ids), session.feed([5])]))
            stats = model.engine.stats()
    assert np.array_equal(*said)
    assert stats.load == "stream" and (stats.vram_experts == stats.experts) == (vram == 0)


def test_a_prompt_brings_experts_that_have_no_slot(tmp_path):
    """Experts with many rows are computed on the card all the same, through two places that they leave again."""
    shape = Tiny(d_model=256, d_expert=1024)
    path, said = write_tiny(tmp_path / "t.gguf", shape)[0], {}
    ids = np.random.default_rng(7).integers(0, 1400, 120)
    for device in ("cpu", "cuda"):
        with Model.open(path, device=device, vram=25 << 20, n_batch=128) as model, model.session(200) as session:
            said[device] = np.stack([session.feed(ids), session.feed([5])])
            stats = model.engine.stats()
    assert np.array_equal(said["cpu"], said["cuda"])
    assert stats.vram_slots < stats.experts and stats.bytes_streamed and stats.pairs_on_gpu < stats.experts_used


@pytest.mark.parametrize("vram, on_gpu", [(0, True), (24 << 20, False)])
def test_the_tower_gives_the_same_rows_wherever_it_is(vram, on_gpu):
    """On the card, or where the text model leaves no room there, on the CPU."""
    pixels, rows = np.random.default_rng(2).normal(size=(3, 56, 112)).astype(np.float32), []
    tower = pixtral.Tower.read(DEMO / "ms4-demo-mmproj.gguf")
    for device in ("cpu", "cuda"):
        with Model.open(DEMO / "ms4-demo.gguf", device=device, vram=vram) as model:
            vision = model.engine.vision(tower.shape, tower.tensors, tower.path)
            rows.append(vision.encode(pixels))
            assert vision.on_gpu == (on_gpu and device == "cuda")
    assert np.array_equal(*rows)


def test_selftest_finds_a_single_bit():
    want = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    want[2, 2] = np.nan
    got = want.copy()
    got.view(np.uint32)[2, 2] |= 1 << 31
    assert selftest.compare("a", want, got).good
    got.view(np.uint32)[3, 4] ^= 1
    verdict = selftest.compare("a", want, got)
    assert not verdict.good and verdict.text.startswith("1 of 35 numbers differ, first in row 3, column 4")


def test_selftest_says_what_it_compared(tiny, monkeypatch, capsysbinary):
    """A few of its checks: all of them take minutes here."""
    few = [
        ("", lambda: selftest.of_tiny("Q5_K", selftest.WIDE, 12, "cuda")),
        ("", lambda: selftest.of_tower("cuda")),
        ("", lambda: selftest.of_unpinned("cuda", selftest.Files(str(tiny), ""))),
        ("", lambda: selftest.of_streams("cuda")),
        ("", lambda: selftest.of_disk("cuda")),
        ("", lambda: selftest.of_highest("cuda")),
    ]
    monkeypatch.setattr(selftest, "checks", lambda device, files: few)
    monkeypatch.setattr(selftest, "N_REPEATED", 3)
    monkeypatch.setattr(selftest, "N_ROUNDS", 2)
    assert selftest.selftest(safe=False) == 0
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert lines[1].startswith("emulated GPU 0, 8.6") and lines[2].startswith("ok  Q5_K: 33600 numbers, all bits equal")
    assert re.search("pinned: .*; [1-9][0-9]* MB refused, 0 MB pinned", lines[4])
    assert re.search("; [1-9][0-9]* experts brought to stay, [1-9][0-9]* MB for prompts", lines[5])
    assert re.search("from the disk: .*; [1-9][0-9]* MB read, [1-9][0-9]* MB brought", lines[6])
    assert "GB/s" in lines[-2] and lines[-1].startswith("6 of 6 have the bits of the CPU")
    assert re.search("a small layer [1-9][0-9]* us$", lines[-2])


def test_selftest_stops_asking_a_card_that_fails(monkeypatch, capsysbinary):
    def fails():
        raise ms4.DeviceError("the GPU failed (cuX: y, 1)", -9)

    good = ("good", lambda: selftest.Verdict("good", "same", True))
    checks = [("a", fails), good, ("b", fails), ("c", fails), good]
    monkeypatch.setattr(selftest, "checks", lambda device, files: checks)
    assert selftest.selftest(safe=False) == 1
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert lines[2:6] == [
        "BAD a: the GPU failed (cuX: y, 1)", "ok  good: same", "BAD b: the GPU failed (cuX: y, 1)",
        "BAD c: the GPU failed (cuX: y, 1)",
    ]  # fmt: skip
    assert lines[6] == "the others are left out" and lines[7].startswith("1 of 4 have") and "--safe" in lines[8]


# --- what can fail


def test_a_run_is_begun_where_the_card_holds_what_the_host_cannot(ms4, monkeypatch):
    about = forecast.Model.of(GgufFile.open(DEMO / "ms4-demo.gguf"))
    for name in ("MS4_LIBCUDA", "MS4_GPU_CODE"):  # which the fixture has taken away
        monkeypatch.setenv(name, emulated()[name])
    monkeypatch.setattr(forecast, "DRIVER", 0)  # the model is small, and so is the emulated card
    monkeypatch.setattr(clock, "BUFFERS", 1e8)
    monkeypatch.setattr(clock, "ROW", 4e4)
    room = forecast.Room((forecast.PROCESS + (1 << 20)) / 0.75)  # a quarter is left to others
    monkeypatch.setattr(expected, "room_here", lambda *arguments, **more: room)
    assert about.dense > 2 << 20
    arguments = ("run", "-q", "-n", "2", "-m", DEMO / "ms4-demo.gguf", "Hi")
    code, _, err = ms4(*arguments, "--device", "cpu")
    assert code == 6 and "at the least" in err
    code, out, err = ms4(*arguments, "--device", "cuda")
    assert code in (0, 3) and out and "at the least" not in err, err
    code, out, _ = ms4("plan", DEMO / "ms4-demo.gguf", "--json", "--ctx", "512")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["experts"]["in_vram"] == found["experts"]["all"]
    assert found["machine"]["vram_bytes"] > 0 and any("is not in the table of cards" in n for n in found["notes"])
    code, out, _ = ms4("plan", DEMO / "ms4-demo.gguf", "--json", "--ctx", "512", "--gpu", "none")
    assert code == 6 and json.loads(out)["experts"]["in_vram"] == 0


def run(*arguments, **environment):
    command = [str(Path(sys.executable).with_name("ms4")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=emulated(**environment), timeout=600)


@pytest.mark.parametrize("lib", ["/nowhere/libcuda.so", "libm.so.6"])
def test_without_a_driver_cuda_fails_and_auto_takes_the_cpu(lib):
    failed = run("run", "--device", "cuda", "-n", 1, "Hi", MS4_LIBCUDA=lib)
    assert failed.returncode == 1 and not failed.stdout
    assert re.search(r"^ms4: error: .*NVIDIA driver", failed.stderr, re.MULTILINE)
    assert "Traceback" not in failed.stderr and "--device cpu" in failed.stderr
    assert run("run", "-q", "-n", 1, "Hi", MS4_LIBCUDA=lib).returncode == 0
    assert re.search(r"^(ok|! ) gpu +none: .*NVIDIA driver", run("doctor", MS4_LIBCUDA=lib).stdout, re.MULTILINE)


def test_too_little_memory_is_said():
    failed = run("run", "--device", "cuda", "--vram", "2M", "-n", 1, "Hi")
    assert failed.returncode == 6 and re.search(r"^ms4: error: no memory on the GPU", failed.stderr, re.MULTILINE)
    taken = run("run", "--vram", "2M", "-n", 1, "Hi")
    assert taken.returncode == 0 and "the GPU is not used: no memory on the GPU" in taken.stderr


CALLS = """
import sys
import numpy as np
import ms4
from ms4.models.model import Model
try:
    with Model.open(sys.argv[1], device="cuda") as model, model.session(300) as session:
        try:
            session.feed(np.arange(200))
            session.feed([5])
        except (ms4.EngineError, MemoryError) as error:
            print("step:", error)
            assert session.length in (0, 200)
            session.rewind(0)
except (ms4.EngineError, MemoryError) as error:
    print("open:", error)
else:
    print("done")
"""


@pytest.mark.parametrize("kind", ["", ":lost"])
def test_every_call_may_fail(kind, tiny, tmp_path):
    """Each name of a call once at its first and once at a later time: one sentence, and no crash."""
    report = tmp_path / "report"
    code = [sys.executable, "-c", CALLS, str(tiny)]
    whole = subprocess.run(code, capture_output=True, text=True, env=emulated(MS4_EMU_REPORT=str(report)))
    assert whole.stdout == "done\n", whole.stderr
    calls = dict(re.findall(r"^call (\w+) (\d+)$", report.read_text(), re.MULTILINE))
    assert len(calls) > 20
    for name, n in calls.items():
        for at in {1, (int(n) + 1) // 2}:
            env = emulated(MS4_EMU_FAIL=f"{name}:{at}{kind}")
            failed = subprocess.run(code, capture_output=True, text=True, env=env, timeout=300)
            assert failed.returncode == 0 and failed.stdout, (name, at, failed.stderr[-500:])
            said = failed.stdout.splitlines()
            assert all(line == "done" or re.match(r"(open|step): \S", line) for line in said), (name, at, said)


MEASURED = """
import sys
from ms4.models.model import Model
with Model.open(sys.argv[1], device="cuda") as model:
    limits = model.engine.measure(1 << 20)
    print(limits.vram_bytes_per_s > 0, limits.bus_bytes_per_s > 0)
"""


def test_rates_of_the_card_are_left_out_where_others_have_its_memory(tiny, tmp_path):
    code, said = [sys.executable, "-c", MEASURED, str(tiny)], []
    for fails in ("", "last"):
        more = {"MS4_EMU_FAIL": f"cuMemAlloc_v2:{calls_of(tmp_path / 'report')['cuMemAlloc_v2']}"} if fails else {}
        env = emulated(MS4_EMU_REPORT=str(tmp_path / "report"), **more)
        done = subprocess.run(code, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said == ["True True\n", "False False\n"]


# --- what goes on without the card, or with less of it

ASKED = ("run", "-m", DEMO / "ms4-demo.gguf", "-n", 24, "--temp", 0, "--ctx", 512, "How many legs have 3 spiders?")
ON_THE_CARD = (*ASKED[:-1], "--device", "cuda", "--vram", "24M", "--stats", ASKED[-1])


def calls_of(path):
    """How often each call of the driver was made, by the report of a run."""
    return {name: int(n) for name, n in re.findall(r"^call (\w+) (\d+)$", path.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("kind", ["", ":lost"])
@pytest.mark.parametrize(
    "call", ["cuLaunchKernel", "cuGraphLaunch", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuEventRecord"]
)
def test_a_card_that_fails_in_an_answer_costs_no_token(call, kind, tmp_path):
    want = run(*ASKED, "--device", "cpu").stdout
    assert run(*ON_THE_CARD, MS4_EMU_REPORT=str(tmp_path / "report")).stdout == want
    n = calls_of(tmp_path / "report")[call]
    for at in (n // 3, n // 2):  # what moves when differs from run to run, and so does how many calls there are
        got = run(*ON_THE_CARD, MS4_EMU_FAIL=f"{call}:{at}{kind}")
        assert got.returncode == 0 and got.stdout == want, got.stderr
        if call == "cuGraphLaunch" and not kind:  # the first launch takes memory: slots make room for it
            assert re.search(r"[1-9]\d* places for experts given up", got.stderr) and "goes on" not in got.stderr, (
                got.stderr
            )
            continue
        said = [line for line in got.stderr.splitlines() if "goes on" in line]
        assert len(said) == 1 and re.search(r"the GPU failed \(cu\w+: .+\); the CPU goes on without it", said[0])


def test_a_card_that_lacks_memory_in_an_answer_gives_up_slots(tmp_path):
    """Every allocation of a run fails once: the answer is that of the CPU, on the card as long as there are slots."""
    want = run(*ASKED, "--device", "cpu").stdout
    assert run(*ON_THE_CARD, MS4_EMU_REPORT=str(tmp_path / "report")).stdout == want
    n, went_on = calls_of(tmp_path / "report")["cuMemAlloc_v2"], 0
    for at in range(1, n + 1):
        got = run(*ON_THE_CARD, MS4_EMU_FAIL=f"cuMemAlloc_v2:{at}")
        if got.returncode == 0:
            assert got.stdout == want, (at, got.stderr)
            went_on += "GPU" in got.stderr.splitlines()[-1]
        else:  # the dense parts did not fit when it was opened
            assert got.returncode == 6 and re.search("^ms4: error: no memory on the GPU", got.stderr, re.MULTILINE)
            assert at < 8, got.stderr
    assert went_on > n // 2


def test_memory_that_the_driver_wants_for_itself_is_made_by_slots():
    """Kernels are loaded when they are first used, graphs lie on the card: neither of it is asked for by size."""
    want = run(*ASKED, "--device", "cpu").stdout
    for call in ("cuModuleGetFunction:7", "cuGraphInstantiateWithFlags:1"):
        got = run(*ON_THE_CARD, MS4_EMU_FAIL=f"{call}:2")
        assert got.returncode == 0 and got.stdout == want, got.stderr
        assert "the GPU has no memory left; experts gave up places there" in got.stderr, got.stderr
        assert "places for experts given up" in got.stderr.splitlines()[-1]


def test_a_kv_cache_that_outgrows_the_card_takes_the_place_of_experts():
    """Sessions, each of which takes a block of positions in every layer, until slots had to make room for them."""
    ids, said, n_steps = np.random.default_rng(3).integers(5, 900, 64), {}, 0
    for device in ("cuda", "cpu"):
        with Model.open(DEMO / "ms4-demo.gguf", device=device, vram=24 << 20, n_batch=64) as model:
            with model.session(128) as session:
                said[device] = [session.feed(ids)]
                before = given = model.engine.stats()
                while len(said[device]) <= (n_steps or 20) and not given.slots_given_up:
                    others = [ms4.Span(model.session(128), ids[i : i + 1], n_logits=1) for i in range(40)]
                    said[device].append(np.stack(model.engine.step(others)))
                    given = model.engine.stats()
                if device == "cuda":
                    n_steps = len(said[device]) - 1
                    assert given.slots_given_up > 0 and "the GPU has no memory left" in given.note
                    assert given.vram_slots == before.vram_slots - given.slots_given_up >= given.vram_experts
                    assert given.device == "cuda"
                said[device].append(session.feed([7]))
    assert all(np.array_equal(a, b) for a, b in zip(said["cpu"], said["cuda"], strict=True))


def test_blocks_of_the_kv_cache_leave_nothing_of_the_card_unused(tmp_path):
    """Drivers hand out large memory 2 MiB at a time, and a block takes 1.1 MiB here."""
    shape = {"n_layer": 14, "n_expert": 2, "n_used": 1, "n_head": 1, "kv_rank": 256, "d_rope": 64, "d_model": 64}
    path = write_tiny(tmp_path / "t.gguf", Tiny(**shape, n_vocab=1300))[0]
    with Model.open(path, device="cuda") as model:
        sessions = [model.session(128) for _ in range(16)]
        sessions[0].feed([5])
        sessions[0].rewind(0)
        before = ms4.gpu().free
        logits = [session.feed([5]) for session in sessions]
        block = 14 * 128 * (2 * (256 + 64) + 12)
        assert 16 * block < before - ms4.gpu().free < 16 * block + (2 << 20)
        for session in sessions:
            session.close()
        assert before - ms4.gpu().free < block
    assert all(np.array_equal(logits[0], other) for other in logits)


@pytest.mark.parametrize("most", [0, 9 << 20])
def test_memory_that_cannot_be_pinned_is_said_and_not_needed(most):
    want = run(*ASKED, "--device", "cpu").stdout
    got = run(*ON_THE_CARD, MS4_EMU_PINNED=str(most))
    assert got.returncode == 0 and got.stdout == want, got.stderr
    assert got.stderr.count("could not be pinned") == 1 and " refused" in got.stderr


def test_a_card_that_does_not_answer_is_given_up():
    code = CALLS.replace('device="cuda"', 'device="cuda", patience=3').replace("assert session", "session")
    env = emulated(MS4_EMU_FAIL="kernel:300:hang")
    command = [sys.executable, "-c", code, str(DEMO / "ms4-demo.gguf")]
    got = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert got.returncode == 0 and got.stdout.startswith("step: the GPU has not answered for 3 s"), got.stderr


def test_an_image_is_read_by_the_cpu_if_the_card_fails():
    """The tower has its own way home; the text model's is the scheduler's."""
    code = "import sys; from ms4.cli import selftest; print(selftest.of_tower(sys.argv[1]))"
    for at in (3, 20, 60):
        env = emulated(MS4_EMU_FAIL=f"cuLaunchKernel:{at}")
        got = subprocess.run([sys.executable, "-c", code, "cuda"], cwd=ROOT, capture_output=True, text=True, env=env)
        assert got.returncode == 0 and "good=True" in got.stdout, (at, got.stdout, got.stderr)

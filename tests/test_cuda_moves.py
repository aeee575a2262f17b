"""What moves between host memory and a card, how much of it, and that no bit depends on it; on the emulated driver."""

import subprocess
import sys

import numpy as np
import pytest
from test_cuda import DEMO, driver, emulated, pytestmark, run  # noqa: F401  (the driver is a fixture)

from ms4.models.model import Model
from ms4.quant.tiny import Tiny, write_tiny

IDS = np.random.default_rng(3).integers(5, 900, 40)
NOTHING, EVERYTHING = (1.0, 4096), (1e15, 2)  # a bus of a byte a second, and one that is no limit


def answer(session, ids, n=12):
    """The logits of a prompt and of n tokens behind it."""
    logits = [session.feed(ids)]
    for _ in range(n):
        logits.append(session.feed([int(np.argmax(logits[-1]))]))
    return np.array(logits)


def test_rates_decide_what_moves_and_never_a_bit():
    with Model.open(DEMO / "ms4-demo.gguf") as cpu, cpu.session(256) as session:
        want = answer(session, IDS)
    seen = {}
    for rates in ((0, 0), NOTHING, EVERYTHING):
        with Model.open(DEMO / "ms4-demo.gguf", device="cuda", vram=24 << 20) as model, model.session(256) as session:
            model.engine.fix_rates(*rates)
            assert np.array_equal(answer(session, IDS), want), rates
            seen[rates] = model.engine.stats()
    measured, nothing, everything = seen.values()
    assert measured.bus_bytes_per_s > 0 and measured.uploads
    assert nothing.uploads == nothing.bytes_streamed == nothing.evictions == 0
    assert everything.uploads > measured.uploads / 2 and everything.bytes_streamed > 0
    assert everything.pairs_on_gpu > nothing.pairs_on_gpu


def test_who_comes_to_full_slots_puts_another_out():
    """Counted where it happens: those on their way have no slot yet, and who was there has none any more."""
    with Model.open(DEMO / "ms4-demo.gguf", device="cuda", vram=24 << 20) as model, model.session(256) as session:
        model.engine.fix_rates(1e15, 4096)
        answer(session, IDS)
        stats = model.engine.stats()
    under_way = stats.vram_slots - stats.vram_experts
    assert stats.uploads > 0 and stats.evictions == stats.uploads + under_way and under_way <= 32
    assert stats.bytes_uploaded > 0 and not stats.uploads_failed and not stats.slots_given_up


def test_what_is_brought_stays_within_the_budget():
    """What the bus carries in the time of the steps, and two experts that were saved up; at a megabyte a second."""
    with Model.open(DEMO / "ms4-demo.gguf", device="cuda", vram=24 << 20) as model, model.session(256) as session:
        model.engine.fix_rates(1e6, 4096)
        answer(session, IDS, 8)
        stats = model.engine.stats()
    seconds = 1e-9 * (stats.ns_prefill + stats.ns_decode)
    assert 0 < stats.bytes_uploaded <= 1e6 * seconds + 2 * stats.bytes_uploaded / stats.uploads


def test_a_prompt_leaves_the_slots_of_decode_as_they_were():
    """All that a prompt wants and has no slot goes through two places of its own, even if that is nearly every expert:
    the same tokens find as much in the slots after it as before."""
    other = np.random.default_rng(8).integers(5, 900, 90)
    with Model.open(DEMO / "ms4-demo.gguf", device="cuda", vram=24 << 20) as model:
        model.engine.fix_rates(NOTHING[0], 2)  # nothing moves but for a prompt
        with model.session(256) as one, model.session(256) as two:
            one.feed(IDS)

            def decode():
                before = model.engine.stats()
                one.rewind(len(IDS))
                logits = [one.feed([int(id)]) for id in IDS[:5]]
                after = model.engine.stats()
                return np.array(logits), after.pairs_on_gpu - before.pairs_on_gpu

            logits, hits = decode()
            before = model.engine.stats()
            two.feed(other)
            after = model.engine.stats()
            again, hits_again = decode()
    assert after.bytes_streamed - before.bytes_streamed > after.bytes_weights / 8 and hits > 0
    assert hits_again == hits and np.array_equal(logits, again)
    assert after.vram_experts == before.vram_experts == after.vram_slots


def test_the_break_even_of_a_prompt_is_measured(tmp_path):
    """The first prompts go by the guess, and leave the rates by which the next ones go."""
    path = write_tiny(tmp_path / "t.gguf", Tiny(d_model=256, d_expert=1024))[0]
    ids = np.random.default_rng(7).integers(0, 1400, 120)
    with Model.open(path, device="cuda", vram=25 << 20, n_batch=128) as model, model.session(600) as session:
        assert model.engine.stats().stream_from == 32
        session.feed(ids[:20])  # too few rows for the guess: the CPU computes what has no slot
        session.feed(ids)
        session.feed(ids)
        stats = model.engine.stats()
    assert stats.bus_bytes_per_s > 0 and 2 <= stats.stream_from <= 4096 and stats.stream_from != 32


def test_statistics_say_what_the_card_did():
    command = (
        "run",
        "--device",
        "cuda",
        "--vram",
        "24M",
        "--stats",
        "-n",
        12,
        "--temp",
        0,
        "How many legs have 3 cats?",
    )
    got = run(*command)
    line = next(line for line in got.stderr.splitlines() if "GPU" in line and "brought" in line)
    for text in ("% of their work", "put out", "by the GPU", "by the CPU", "pinned"):
        assert text in line, line


def test_where_ram_is_short_experts_change_places():
    """RAM has room for 30 of 384: who moves up gives its place to who comes down, and all stay where they are
    needed.  Then the card is left with experts on their way down, and the CPU goes on."""
    with Model.open(DEMO / "ms4-demo.gguf") as cpu, cpu.session(256) as session:
        want = [answer(session, IDS, 8)]
        session.rewind(0)
        want.append(answer(session, IDS[:9], 2))
    options = {"device": "cuda", "load": "stream", "vram": 24 << 20}
    with Model.open(DEMO / "ms4-demo.gguf", **options) as model, model.session(256) as session:
        model.engine.fix_rates(1e15)
        stats = model.engine.stats()
        assert 0 < stats.vram_experts < stats.vram_slots < stats.experts  # some are kept empty
        model.engine.fix_slots(30 * stats.slot_bytes // stats.slots)
        got = [answer(session, IDS, 8)]
        stats = model.engine.stats()
        session.rewind(0)
        model.engine.leave_gpu("it was told to")
        got.append(answer(session, IDS[:9], 2))
        assert not model.engine.on_gpu
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert stats.downloads > 0 and stats.evictions >= stats.downloads and stats.uploads > 0
    assert stats.bytes_downloaded > 0 and stats.slots <= 30


PROMPT = """
import sys
import numpy as np
from ms4.models.model import Model
with Model.open(sys.argv[1], device="cuda", vram=24 << 20, load=sys.argv[2]) as model, model.session(64) as session:
    before = model.engine.stats()
    model.engine.fix_rates(1.0, 2)  # nothing moves but for a prompt, which brings what has no slot
    logits = session.feed(np.arange(5, 25)).sum(dtype=float)
    after = model.engine.stats()
    pinned = after.pinned_bytes - before.pinned_bytes
    print(pinned, after.unpinned_bytes, logits.hex(), before.note, after.note, sep="|")
"""


@pytest.mark.parametrize("load", ["map", "copy"])
def test_experts_are_pinned_where_they_lie_when_a_prompt_brings_them(load):
    """As far as the system lets us; if it does not, that is said once it is known, and costs no bit."""
    said = []
    for most in (1 << 40, 30 << 20):
        command = [sys.executable, "-c", PROMPT, str(DEMO / "ms4-demo.gguf"), load]
        env = emulated(MS4_EMU_PINNED=str(most))
        got = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert got.returncode == 0, got.stderr
        said.append(got.stdout.strip().split("|"))
    free, tight = said
    assert int(free[0]) > 20_000_000 and free[1] == "0" and free[3] == free[4]
    assert int(tight[0]) < 10_000_000 < int(tight[1]) and tight[2] == free[2]
    assert "could not be pinned" not in tight[3] and "could not be pinned" in tight[4]


def test_steps_take_no_more_of_the_card_than_was_set_aside(tmp_path):
    """A longer step leaves less for slots: as much as its buffers take, or a little more."""
    path = write_tiny(tmp_path / "t.gguf", Tiny(n_expert=64, n_layer=4))[0]
    ids = np.random.default_rng(5).integers(0, 900, 96)
    opened, grown = [], []
    for n in (32, 96):
        with Model.open(path, device="cuda", vram=16 << 20, n_batch=n) as model, model.session(128) as session:
            opened.append(model.engine.stats())
            session.feed(ids[:n])
            now = model.engine.stats()
        assert 0 < now.vram_slots < now.experts and not now.slots_given_up and now.vram_bytes <= 16 << 20
        grown.append(now.vram_bytes - opened[-1].vram_bytes)
    of_slot = (opened[0].vram_bytes - opened[1].vram_bytes) / (opened[0].vram_slots - opened[1].vram_slots)
    less, taken = opened[0].vram_bytes - opened[1].vram_bytes, grown[1] - grown[0]
    assert 0 < taken - of_slot < less < 2 * taken, (less, taken, of_slot)

"""`ms4 plan`: what lies where by hand, the laws that any machine keeps, and what the command says."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures import bravo

import ms4 as engine
from ms4.cli import expected, measured, plan_shown
from ms4.cli.options import DEMO
from ms4.models import calibration, cards, clock, forecast, mistral4
from ms4.models.answer import Statistics
from ms4.models.calibration import Rates
from ms4.models.clock import CARDS, GB, SMALL_4, Machine
from ms4.models.disk_rate import N_SLICES, Samples
from ms4.models.mistral4 import kv_bytes
from ms4.quant.gguf_file import GgufFile

HOST = Machine(None, 20 * GB, 0.5e12, 2 * GB)
SHAPE = engine.Shape(
    36, 0, 131072, 1048576, 4096, 12288, 2048, 2048, 32, 64, 64, 128, 1024, 256, 128, 4, 1e-6, 1.0, True, 0.1, 0.1,
    8192, (1.0,) * 32,
)  # fmt: skip
DENSE = SMALL_4.every + SMALL_4.output + 0.3 * GB
MODEL = forecast.Model(SHAPE, SMALL_4, int(SMALL_4.experts + DENSE), int(SMALL_4.experts + DENSE))
N_ALL = 36 * 128


def of(ram, n_ctx=32768, *, limited=True, machine=HOST, vram=0.0):
    return forecast.make(MODEL, forecast.Resources(machine, ram, limited, vram), n_ctx)


# --- by hand
def test_a_model_that_fits_lies_in_memory_and_has_one_speed():
    made = of(90 * GB)
    assert made.fits and made.load == "memory" and (made.n_ram, made.n_disk) == (N_ALL, 0)
    n_bytes = SMALL_4.every + SMALL_4.output + SMALL_4.used + 512 * SMALL_4.kv
    assert made.warm.tokens_per_s == pytest.approx(HOST.ram / n_bytes)
    assert made.cold.terms == made.warm.terms == made.usual.terms
    assert made.full.terms.seconds == pytest.approx((n_bytes + (32768 - 512) * SMALL_4.kv) / HOST.ram)
    assert made.seconds_to_open == pytest.approx((SMALL_4.experts + DENSE) / HOST.disk)


def test_what_does_not_fit_stays_on_the_disk_and_costs_its_bytes():
    made = of(32 * GB)
    left = 32 * GB - made.dense - made.process
    assert made.fits and made.load == "stream" and made.n_ram + made.n_disk == N_ALL
    assert made.n_ram == (left - kv_bytes(SHAPE, 512) - MODEL.buffers(512)) // SMALL_4.expert
    assert made.n_ram_full == (left - made.kv - made.buffers) // SMALL_4.expert < made.n_ram
    assert made.warm.found == pytest.approx(made.n_ram / N_ALL)
    per_token = SMALL_4.used * (1 - made.warm.found) / HOST.disk
    assert per_token * 0.8 < made.warm.terms.disk < per_token  # some of it hides behind the CPU
    assert made.warm.terms.limit == "disk"
    alone = 36 * SMALL_4.expert / HOST.ram  # the last of each layer's experts
    assert made.cold.terms.disk == pytest.approx(SMALL_4.used / HOST.disk + alone - SMALL_4.used / HOST.ram)
    assert made.cold.tokens_per_s < made.warm.tokens_per_s < made.usual.tokens_per_s


def test_the_reserve_is_that_of_the_engine_and_counts_only_for_what_is_free():
    free = of(32 * GB, limited=False)
    assert free.reserve == (256 << 20) + 32 * GB / 32
    assert of(32 * GB).reserve == 0 and free.n_ram < of(32 * GB).n_ram
    assert forecast.reserve_of(1 << 20) == 1 << 18


def test_memory_that_is_used_for_the_first_time_slows_what_fills_it():
    slow = of(32 * GB, machine=replace(HOST, fresh=0.5 * GB))
    plain = of(32 * GB)
    assert slow.warm == plain.warm and slow.prompt == plain.prompt
    assert slow.seconds_to_open == pytest.approx(plain.dense / (0.5 * GB)) == 4 * plain.seconds_to_open
    filled, rest = plain.n_ram * SMALL_4.expert, SMALL_4.experts - plain.n_ram * SMALL_4.expert
    more = 512 * (slow.prompt_cold.seconds - plain.prompt_cold.seconds)
    assert more == pytest.approx(filled / (0.5 * GB) + rest / HOST.disk - SMALL_4.experts / HOST.disk, rel=0.1)
    assert slow.cold.tokens_per_s < plain.cold.tokens_per_s
    assert of(32 * GB, machine=replace(HOST, fresh=9 * GB)).prompt_cold == plain.prompt_cold


def test_a_card_takes_its_part_and_the_rest_need_not_lie_in_memory_twice():
    made = of(56 * GB, machine=replace(HOST, card=CARDS["4090"]), vram=CARDS["4090"].vram)
    assert 0.2 < made.n_vram / N_ALL < 0.35 and made.n_disk == max(0, N_ALL - made.n_vram - made.n_ram)
    assert made.usual.in_vram > made.warm.in_vram == made.n_vram / N_ALL
    assert of(56 * GB).warm.tokens_per_s < made.warm.tokens_per_s


def test_a_prompt_with_a_card_waits_for_its_copies_and_then_for_the_disk():
    """What the card has not is copied to it once, and read before, as far as it is not in memory."""
    file = MODEL.scaled(42 * 10**9)
    here = replace(HOST, card=CARDS["3090"])
    made = forecast.make(file, forecast.Resources(here, 16 * GB, True, CARDS["3090"].vram), 8192)
    assert made.load == "stream" and made.n_vram > 0 and made.n_disk > 0
    sizes, n = file.sizes, forecast.N_PROMPT
    used = (35 * sizes.distinct(n) + sizes.n_used) * sizes.expert  # the last layer is computed for one token
    copied = (1 - made.n_vram / N_ALL) * used / here.link
    assert n * (made.prompt.dense + made.prompt.context + made.prompt.bus) == pytest.approx(copied)
    read = made.n_disk / N_ALL * used / here.disk
    assert 0.3 * read < n * made.prompt.disk < read  # beside copies and attention
    assert made.prompt.limit == "disk" and made.prompt.misses == 0
    fast = forecast.make(file, forecast.Resources(replace(here, disk=1e15), 16 * GB, True, CARDS["3090"].vram), 8192)
    assert fast.prompt.bus == made.prompt.bus and fast.prompt.disk == 0


def test_a_correction_scales_every_time():
    made = of(32 * GB)
    twice = made.corrected(2.0, 0.5)
    assert twice.warm.tokens_per_s == pytest.approx(2 * made.warm.tokens_per_s)
    assert twice.prompt.tokens_per_s == pytest.approx(made.prompt.tokens_per_s / 2)
    assert twice.warm.terms.limit == made.warm.terms.limit


def test_what_a_card_holds_the_host_need_not():
    """Unless the user has limited it: pages of the file are beyond any --ram."""
    vram = CARDS["PRO 6000"].vram
    n_vram = clock.slots(SMALL_4, vram, 32768)
    short = forecast.Room(4 * GB)
    assert not forecast.fit(MODEL, short, 131072).fits
    whole = forecast.fit(MODEL, short, 131072, n_vram)
    assert n_vram == N_ALL and whole.fits and whole.how == "map" and (whole.n_ram, whole.n_disk) == (0, 0)
    assert whole.needed == forecast.PROCESS + forecast.DRIVER
    part = forecast.fit(MODEL, forecast.Room(60 * GB), 32768, 1500)
    assert forecast.fit(MODEL, forecast.Room(60 * GB), 32768).how == "stream"
    assert part.how == "map" and part.n_ram == N_ALL - 1500 and part.n_disk == 0 and part.needed < 60 * GB
    less = forecast.fit(MODEL, forecast.Room(30 * GB), 32768, 1500)
    assert less.how == "stream" and less.fits and less.n_ram == less.n_ram_full
    limited = forecast.fit(MODEL, replace(short, limited=True), 131072, n_vram)
    assert limited.how == "stream" and limited.needed < forecast.fit(MODEL, short, 131072).needed


# --- laws
def test_more_memory_never_makes_a_plan_slower_and_none_takes_more_than_there_is(rng):
    before = None
    for ram in sorted(rng.uniform(1 * GB, 100 * GB, 60)):
        made = of(ram)
        assert made.fits == (made.needed <= ram or made.load == "memory")
        if made.fits:
            taken = made.dense + made.kv + made.buffers + made.process + made.n_ram_full * made.expert
            assert taken <= ram and made.n_ram >= made.n_ram_full >= 1
            if before:
                assert made.warm.tokens_per_s >= before.warm.tokens_per_s * (1 - 1e-9)
                assert made.prompt.tokens_per_s >= before.prompt.tokens_per_s * (1 - 1e-9)
            before = made
    assert before is not None and before.load == "memory"


def test_coherent_text_never_finds_less_than_uniform_choices():
    shares = np.linspace(0, 1, 101)
    found = [forecast.coherent(share) for share in shares]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 1
    assert all(a >= b - 1e-12 for a, b in zip(found, shares, strict=True))


def test_what_is_offered_instead_fits_and_nothing_larger_does():
    there = forecast.Room(3.6 * GB, limited=True)
    made = forecast.fit(MODEL, there, 262144)
    assert not made.fits
    (smaller,) = forecast.smaller_contexts(MODEL, there, 262144)
    assert forecast.fit(MODEL, there, smaller.n_ctx).fits and not forecast.fit(MODEL, there, 2 * smaller.n_ctx).fits
    (more,) = forecast.more_memory(made, there, 64 * GB)
    ram = int(more.how.split()[1][:-1]) * 10**6
    assert forecast.fit(MODEL, replace(there, ram=ram), 262144).fits
    assert ram - made.needed <= GB / 10
    assert (
        forecast.more_memory(made, there, 4 * GB)
        == []
        == forecast.more_memory(made, replace(there, limited=False), 64 * GB)
    )
    sizes = [int(MODEL.bytes_file * part) for part in (0.1, 2, 0.3)]
    files = forecast.smaller_files(MODEL, there, 4096, [(str(n), n) for n in sizes])
    assert [file.how for file in files] == [str(sizes[2]), str(sizes[0])]


def test_the_context_decides_whether_a_file_lies_in_memory():
    whole = MODEL.bytes_weights + kv_bytes(SHAPE, 1024) + MODEL.buffers(1024) + forecast.PROCESS
    room = forecast.Room(whole + 0.1 * GB, limited=True)
    assert forecast.fit(MODEL, room, 1024).how == "map"
    assert forecast.fit(MODEL, room, 65536).how == "stream"
    assert forecast.fit(MODEL, replace(room, ram=whole + 12 * GB), 1024).how == "copy"
    assert forecast.fit(MODEL, forecast.Room(None), 262144).how == "map"


def test_a_cached_file_is_used_where_it_lies_if_only_a_limit_of_this_group_is_too_small():
    there = forecast.Room(8 * GB, available=100 * GB, cached=1.0)
    assert forecast.fit(MODEL, there, 1024).how == "map" and forecast.fit(MODEL, there, 1024).load == "memory"
    for other in (replace(there, cached=0.5), replace(there, available=60 * GB), replace(there, limited=True)):
        assert forecast.fit(MODEL, other, 1024).how == "stream"


# --- calibration
@pytest.fixture(scope="module")
def small():
    gguf = GgufFile.open(bravo())
    shape = mistral4.shape_of(gguf)
    return shape, mistral4.tensors_of(gguf, shape), gguf


def test_an_excerpt_has_the_rows_and_types_of_the_model_in_fewer_bytes(small):
    shape, tensors, _ = small
    for most in (0, 20_000, 1 << 30):
        cut, table = calibration.excerpt(shape, tensors, most)
        assert {(t.role, t.dims[0]) for t in table} <= {(t.role, t.dims[0]) for t in tensors}
        assert {t.type for t in table if t.role.endswith("_exps")} <= {t.type for t in tensors}
        assert shape.n_expert_used <= cut.n_expert <= shape.n_expert and cut.n_vocab <= calibration.MOST_WORDS
        ends = [t.offset + t.bytes for t in table]
        assert all(end <= t.offset for end, t in zip(ends, table[1:], strict=False))
    assert calibration.excerpt(shape, tensors, 0)[0].n_expert == shape.n_expert_used


def test_a_calibration_runs_on_an_excerpt_whose_rows_choose_different_experts(small, monkeypatch, tmp_path):
    shape, tensors, _ = small
    for name in ("S_DECODE", "S_PREFILL"):
        monkeypatch.setattr(calibration, name, 0.0)
    rates = calibration.calibrate(shape, tensors, 1 << 30)
    assert rates.ram > 0 and rates.flops > 0
    cut, table = calibration.excerpt(shape, tensors, 1 << 30)
    calibration.write(tmp_path / "excerpt", table)
    seen = set()
    with engine.Engine.open(cut, table, [tmp_path / "excerpt"]) as opened, opened.session(64) as session:
        opened.watch(lambda layer, ids: seen.update(() if ids is None else ids.ravel().tolist()))
        rows = np.random.default_rng(3).standard_normal((64, cut.d_model)).astype(np.float32)
        session.feed(np.full(64, engine.ROW), rows)
        opened.watch(None)
    assert seen == set(range(cut.n_expert))


# --- what is remembered
def test_rates_are_remembered_and_what_is_damaged_counts_as_not_there(monkeypatch, tmp_path, small):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape, tensors, _ = small
    key = measured.rates_key(shape, tensors, 0)
    assert key != measured.rates_key(shape, tensors, 3) and measured.rates(key) is None
    measured.keep_rates(key, Rates(2e9, 3e9))
    assert measured.rates(key) == Rates(2e9, 3e9)
    rows = [json.dumps({key: {"ram": ram, "flops": 1.0}}) for ram in ("x", float("nan"), -1, None, [1.0], ["x"])]
    for text in ("", "[]", "{", '{"a": 1}', "[" * 10**5, *rows):
        measured.machine_path().write_text(text)
        assert measured.rates(key) is None
        measured.keep_rates(key, Rates(5.0, 6.0))
        assert measured.rates(key) == Rates(5.0, 6.0)


def test_the_median_of_the_last_runs_corrects_predictions():
    key = measured.run_key("some.gguf", "stream")
    assert key != measured.run_key("some.gguf", "map") == measured.run_key("some.gguf", "copy")
    assert measured.ratios(key) == measured.Ratios() and not measured.ratios(key).known
    for ratio in (4.0, 1000.0, 0.0, 1.0, 1.1):
        measured.learn(key, "decode", ratio)
    assert measured.ratios(key) == measured.Ratios(measured.Ratio(1.1, 1.0, 4.0))
    for ratio in (0.25, *[0.5] * measured.MOST_RATIOS):
        measured.learn(key, "prefill", ratio)
    assert measured.ratios(key).prefill == measured.Ratio(0.5, 0.5, 0.5)
    measured.predictions_path().write_text(json.dumps({key: {"decode": 2.0, "prefill": ["x"]}}))
    assert measured.ratios(key) == measured.Ratios()


@pytest.fixture
def disk_at(monkeypatch, tmp_path):
    """The key of a file on a disk; nothing is known of it yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").touch()
    return measured.disk_key(tmp_path / "file")


def used(rate, n_bytes=1 << 30, fresh=0):
    return measured.DiskUse(n_bytes, int(1e9 * n_bytes / rate), fresh)


def test_what_runs_get_of_a_disk_corrects_what_was_measured(disk_at, tmp_path):
    assert measured.disk(disk_at) is None
    measured.keep_disk(disk_at, Samples((2.0e9, 2.4e9, 2.2e9)))
    first = measured.disk(disk_at)
    assert (first.bytes_per_s, first.low, first.high, first.n_runs) == (2.2e9, 2.0e9, 2.4e9, 0)
    nothing = measured.DiskUse()
    for rate, wanted in ((1.0e9, 1.6e9), (0.8e9, 1.0e9), (1.2e9, 1.0e9)):  # the third run: no calibration any more
        measured.learn_disk(disk_at, used(rate), nothing)
        assert measured.disk(disk_at).bytes_per_s == pytest.approx(wanted)
    known = measured.disk(disk_at)
    assert (known.low, known.high, known.n_runs) == pytest.approx((0.8e9, 1.2e9, 3))
    measured.learn_disk(disk_at, used(9e9, n_bytes=measured.LEAST_READ - 1), nothing)  # says nothing
    assert measured.disk(disk_at) == known
    measured.keep_disk(disk_at, Samples((5e9,)))  # runs outlive a new calibration
    assert measured.disk(disk_at) == known
    (tmp_path / "other").touch()  # a file on the same disk that nothing is known of
    assert measured.disk(measured.disk_key(tmp_path / "other")) == known


def test_a_run_tells_how_long_memory_takes_that_was_never_used(disk_at):
    came = measured.DiskUse(3 << 30, int(1e9 * ((2 << 30) / 1e9 + (1 << 30) / 2e9)), 2 << 30)
    measured.learn_disk(disk_at, measured.DiskUse(), came)  # nothing is known of the disk itself
    assert measured.disk(disk_at) is None
    measured.learn_disk(disk_at, used(2e9), came)
    known = measured.disk(disk_at)
    assert known.filling(2 << 30) == pytest.approx(1e9) == known.filling(30 << 30) and known.filling(0) == 0
    measured.learn_disk(disk_at, used(2e9), measured.DiskUse(2 << 30, 1, 2 << 30))  # no slower than the disk
    assert measured.samples(disk_at).fresh[-1] == pytest.approx(2e9)


# --- the command
@pytest.fixture
def known(monkeypatch, tmp_path, small):
    """A machine whose rates are remembered, so that nothing is measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shape, tensors, gguf = small
    measured.keep_rates(measured.rates_key(shape, tensors, 0), Rates(1e9, 1e10))
    measured.keep_disk(measured.disk_key(gguf.path), Samples(N_SLICES * (1e8,)))


def planned(ms4, *arguments):
    code, out, err = ms4("plan", bravo(), "--json", *arguments)
    return code, json.loads(out), err


def test_the_command_says_what_the_plan_says(ms4, known, small):
    code, got, err = planned(ms4, "--ram", "2G", "--ctx", "512")
    assert (code, err) == (0, "") and got["fits"] and got["load"] == "memory" and got["notes"] == []
    made = forecast.make(
        forecast.Model.of(small[2]), forecast.Resources(Machine(None, 1e9, 1e10, 1e8), 2 << 30, True), 512
    )
    assert got["decode"]["warm"]["tokens_per_s"] == made.warm.tokens_per_s
    assert got["prefill"]["warm"]["ms"] == made.prompt.milliseconds()
    assert got["memory"]["kv"] == kv_bytes(small[0], 512)
    text = ms4("plan", "-m", bravo(), "--ram", "2G", "--ctx", "512")[1]
    assert f"writing   {plan_shown.tokens(made.warm.tokens_per_s)} tok/s" in text
    assert text.endswith("Predicted, not measured.\n")


def test_a_rate_is_told_to_three_figures():
    rates = (0.523, 9.876, 51.26, 1828.4, 17101.01)
    assert [plan_shown.tokens(rate) for rate in rates] == ["0.52", "9.88", "51.3", "1828", "17101"]


def test_what_a_token_takes_is_told_however_short_it_is():
    assert plan_shown.spent(clock.Terms(dense=2.04e-3, context=4e-5)) == "dense 2.0"
    assert plan_shown.spent(clock.Terms(dense=2.04e-5, context=4e-6)) == "dense 0.020 · context 0.004"


def test_what_does_not_fit_is_exit_6_with_what_does(ms4, known):
    code, got, err = planned(ms4, "--ram", "175M", "--ctx", "1024")
    assert code == 6 and not got["fits"] and 1 <= len(got["nearest"]) <= 2
    assert err.startswith("ms4: error: with 1K tokens of context this needs ") and got["nearest"][0]["type"] in err
    smaller, more = got["nearest"]
    assert planned(ms4, "--ram", "175M", *smaller["type"].split())[0] == 0
    assert planned(ms4, "--ctx", "1024", *more["type"].split())[0] == 0
    code, out, err = ms4("plan", bravo(), "--ram", "175M", "--ctx", "1024")
    assert code == 6 and "does not fit" in out


def test_a_card_and_a_memory_of_the_tables_are_said_to_be_that(ms4, known):
    code, got, _ = planned(ms4, "--gpu", "4090", "--memory", "DDR5-6000")
    assert code == 0 and got["machine"]["memory_bytes_per_s"] == 62 * GB and got["experts"]["in_vram"] > 0
    assert any("4090" in note for note in got["notes"]) and any("DDR5-6000" in note for note in got["notes"])


def test_every_card_and_memory_has_a_source_and_a_date_and_sane_figures():
    for name, card in cards.cards().items():
        assert card.source and re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", card.date), name
        assert 8 * cards.GIB <= card.vram <= 192 * cards.GIB and 2e11 < card.peak < 1e13, name
        assert 0.35 * 1e14 < card.flops < 0.35 * 3e15 and 1e10 < card.bus < 1e11, name
        assert cards.find(name) == (name, card) == cards.find(f"NVIDIA GeForce RTX {name.lower()}".replace(" ", ""))
    for name, memory in cards.memories().items():
        assert 2e10 < memory.rate < 3e11 and memory.source and memory.date, name
    assert len({cards.plain(name) for name in cards.cards()}) == len(cards.cards())


@pytest.mark.parametrize(
    "name, gib, row",
    [
        ("NVIDIA GeForce RTX 4090", 23.6, "4090"),
        ("NVIDIA GeForce RTX 3080", 9.8, "3080"),
        ("NVIDIA GeForce RTX 3080", 11.8, "3080 12GB"),
        ("NVIDIA GeForce RTX 5060 Ti", 15.5, "5060 Ti 16GB"),
        ("NVIDIA RTX 6000 Ada Generation", 47.4, "6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 95, "PRO 6000"),
        ("NVIDIA A100-SXM4-80GB", 79, "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", 79, "H100 SXM"),
        ("NVIDIA H200", 140, "H200"),
        ("NVIDIA A10", 22, "A10"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("NVIDIA Graphics Device", 24, None),
    ],
)
def test_the_names_of_drivers_are_found(name, gib, row):
    found = cards.of_driver(name, gib * cards.GIB)
    assert found == (row and (row, cards.cards()[row]))


def test_names_that_are_near():
    for name, wanted in (("4091", "4090"), ("4060ti", "4060 Ti 8GB"), ("rtx 5090 ti", "5090"), ("a600", "A6000")):
        with pytest.raises(cards.UnknownError) as caught:
            cards.find(name)
        assert wanted in caught.value.near and len(caught.value.near) <= cards.N_NEAR
    with pytest.raises(cards.UnknownError) as caught:
        cards.find("")
    assert caught.value.near == []


def test_earlier_runs_correct_the_plan_and_are_named(ms4, known):
    before = planned(ms4)[1]
    key = measured.run_key(str(bravo()), "map")
    measured.learn(key, "decode", 3.0)
    measured.learn(key, "prefill", 0.5)
    _, after, _ = planned(ms4)
    assert after["decode"]["warm"]["tokens_per_s"] == pytest.approx(3 * before["decode"]["warm"]["tokens_per_s"])
    assert after["prefill"]["warm"]["tokens_per_s"] == pytest.approx(before["prefill"]["warm"]["tokens_per_s"] / 2)
    assert after["corrected_by"] == {"decode": 3.0, "prefill": 0.5} and "corrected by earlier" in after["notes"][-1]
    assert planned(ms4, "--gpu", "4090")[1]["corrected_by"] == {"decode": 1.0, "prefill": 1.0}


# --- runs
def test_a_run_that_cannot_have_room_is_refused_before_a_weight_is_read(ms4, known):
    code, out, err = ms4("run", "-m", bravo(), "--ram", "1M", "-n", "2", "Hi")
    assert (code, out) == (6, "") and "at the least" in err and "hint: --ram 200m" in err
    assert ms4("run", "-q", "-m", bravo(), "--ram", "1G", "-n", "2", "Hi")[0] == 0


@pytest.mark.parametrize(
    "ctx, n, load",
    [
        pytest.param(512, [], "memory", marks=pytest.mark.slow),
        (1024, [], "stream"),
        pytest.param(1024, [300], "memory", marks=pytest.mark.slow),
        pytest.param(1024, [800], "stream", marks=pytest.mark.slow),
    ],
)
def test_a_run_loads_what_the_plan_says_and_counts_what_it_may_hold(known, ctx, n, load):
    about = forecast.Model.of(GgufFile.open(DEMO))
    ram = int(about.bytes_weights + kv_bytes(about.shape, 512) + about.buffers(512) + forecast.PROCESS + (4 << 20))
    found = forecast.fit(about, forecast.Room(ram, limited=True), ctx)
    assert found.fits and found.load == ("stream" if ctx > 512 else "memory")
    limit = ["-n", str(*n)] if n else []
    arguments = ["run", "-v", "-m", DEMO, "--ram", str(ram), "--ctx", str(ctx), "--greedy", *limit, "Hi"]
    done = subprocess.run([Path(sys.executable).with_name("ms4"), *arguments], capture_output=True, text=True)
    assert done.returncode in (0, 3) and ("weights experts on the disk" in done.stderr) == (load == "stream")


def test_a_slow_model_is_announced_by_what_was_measured_and_by_earlier_runs(ms4, known, small):
    shape, tensors, _ = small
    assert "expect about" not in ms4("run", "-m", bravo(), "-n", "2", "Hi")[2]
    measured.keep_rates(measured.rates_key(shape, tensors, 0), Rates(1e6, 1e10))
    code, _, err = ms4("run", "-m", bravo(), "-n", "2", "Hi")
    assert code == 0 and "expect about " in err and "tok/s of writing" in err
    assert "expect" not in ms4("run", "-q", "-m", bravo(), "-n", "2", "Hi")[2]
    measured.learn(measured.run_key(str(bravo()), "map"), "decode", 19.0)
    assert "expect about" not in ms4("run", "-m", bravo(), "-n", "2", "Hi")[2]


def test_statistics_compare_a_run_with_its_prediction_and_the_next_plan_knows(ms4, known, small, monkeypatch):
    key = measured.run_key(str(bravo()), "map")
    monkeypatch.setattr(measured, "MOST_RATIO", 1e9)  # whatever this machine is busy with
    arguments = ("run", "-m", bravo(), "--greedy", "-n", "40", "--stats", "One two three.")
    code, _, err = ms4(*arguments)
    assert code == 0 and "writing predicted" in err
    ratio = measured.ratios(key).decode.usual
    assert ratio != 1.0
    said = "off by" in err
    assert said == (abs(ratio - 1) > measured.FAR)
    corrected = planned(ms4)[1]["corrected_by"]["decode"]
    assert corrected == ratio


def test_what_a_turn_used_of_the_disk_is_told_from_what_was_before_it():
    def at(n_bytes, ns, held):
        return SimpleNamespace(bytes_disk=n_bytes, ns_disk=ns, slot_bytes=held)

    first = expected.disks_of(at(900, 90, 500), at(700, 60, 450), None)
    assert first == (measured.DiskUse(200, 30), measured.DiskUse(700, 60, 450))
    second = expected.disks_of(at(1500, 150, 510), at(1400, 130, 505), at(900, 90, 500))
    assert second == (measured.DiskUse(100, 20), measured.DiskUse(500, 40, 5))
    assert expected.disks_of(at(900, 90, 500), None, at(100, 10, 600)) == (
        measured.DiskUse(), measured.DiskUse(800, 80, 0)
    )  # fmt: skip


def test_a_chat_tells_the_next_plan_what_it_got_and_shows_it(ms4, known, monkeypatch):
    monkeypatch.setattr(measured, "MOST_RATIO", 1e9)
    monkeypatch.setenv("MS4_NO_HISTORY", "1")
    words = "one two three four five six seven " * 20
    said = f"{words}\n/stats\n".encode()
    code, _, err = ms4("chat", "-m", bravo(), "--load", "stream", "--greedy", "-n", "40", stdin=said)
    assert code == 0 and re.search(r"from the disk.*writing predicted [\d.]+ tok/s.*reading predicted", err)
    assert measured.ratios(measured.run_key(bravo(), "stream")).known


def test_statistics_of_experts_on_the_disk_expect_what_was_found_in_memory(ms4, known, monkeypatch):
    monkeypatch.setattr(measured, "MOST_RATIO", 1e9)
    asked, plain = [], forecast.of_run

    def of_run(*arguments, **shares):
        asked.append((*arguments[2:], shares["in_prompt"], shares["found"], plain(*arguments, **shares)))
        return asked[-1][-1]

    monkeypatch.setattr(forecast, "of_run", of_run)
    words = "one two three four five six seven " * 20
    arguments = ("run", "-m", bravo(), "--load", "stream", "--greedy", "-n", "40", "--stats")
    code, _, err = ms4(*arguments, words)
    (n_prompt, n_context, in_prompt, found, (written, read)) = asked.pop()
    assert code in (0, 3) and 64 <= n_prompt < n_context
    assert in_prompt < found > 0.9  # all have a place, and the prompt has brought most of them
    assert f"writing predicted {written:.1f} tok/s" in err and f"reading predicted {read:.1f} tok/s" in err
    learnt = measured.ratios(measured.run_key(bravo(), "stream"))
    for name, ratio in (("writing", learnt.decode.usual), ("reading", learnt.prefill.usual)):
        said = re.search(rf"{name} predicted [\d.]+ tok/s(, off by)?", err)
        assert bool(said[1]) == (abs(ratio - 1) > measured.FAR)


@pytest.mark.parametrize("rate, slower", [(1e9, 1.0), (2e9, 0.5)])
def test_a_slow_disk_is_told_from_a_slow_machine(disk_at, monkeypatch, tmp_path, rate, slower):
    """The run has a disk of half the rate, or takes twice as long as predicted for another reason."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = str(tmp_path / "file")
    measured.keep_disk(disk_at, Samples((HOST.disk,)))
    monkeypatch.setattr(
        expected, "known", lambda model, n_fresh: (MODEL, replace(HOST, disk=measured.disk(disk_at).bytes_per_s))
    )
    written, read = forecast.of_run(MODEL, replace(HOST, disk=rate), 512, 600, in_prompt=0.0, found=0.5)
    counts = {"experts_wanted": 1000, "experts_there": 0, "bytes_disk": 64 << 30, "slot_bytes": 0}
    before = SimpleNamespace(**counts, ns_disk=int(1e9 * (64 << 30) / rate))
    now = SimpleNamespace(load="stream", device="cpu", experts_wanted=2000, experts_there=500, bytes_disk=128 << 30,
                          ns_disk=2 * before.ns_disk, slot_bytes=0)  # fmt: skip
    model = SimpleNamespace(engine=SimpleNamespace(stats=lambda: now), gguf=SimpleNamespace(path=path))
    run = Statistics(512, 0, 89, 0, 512 / (slower * read), 88 / (slower * written), 88, 600, 32768)
    said = expected.note_after(expected.learn(model, run, before))
    learnt = measured.ratios(measured.run_key(path, "stream"))
    assert (learnt.decode.usual, learnt.prefill.usual) == pytest.approx((slower, slower))
    assert measured.disk(disk_at).bytes_per_s == pytest.approx((HOST.disk + rate) / 2)
    assert said.count("off by") == 2 and said.count("as the disk gave 1000.0 MB/s") == (2 if rate < HOST.disk else 0)
    model.gguf.path += ".gone"  # a file that was deleted while it was in use
    assert expected.learn(model, run, before) == []
    model.gguf.path = path
    for _ in range(3):  # the next runs are what was expected
        expected.learn(model, run, before)
    assert "off by" not in expected.note_after(expected.learn(model, run, before))


def test_the_plan_gives_a_range_where_runs_disagree(ms4, known, small):
    key = measured.disk_key(small[2].path)
    assert planned(ms4)[1]["machine"]["disk_range"] == [1e8, 1e8]
    for rate in (0.5e8, 1e8, 2e8):
        measured.learn_disk(key, used(rate), measured.DiskUse())
    about = forecast.fit(forecast.Model.of(small[2]), forecast.Room(1 << 40, limited=True), 512)
    between = about.needed_whole - about.n_experts * about.expert / 2  # room for half of the experts
    arguments = ("--ram", str(int(between)), "--ctx", "512")
    got = planned(ms4, *arguments)[1]
    assert got["load"] == "stream" and got["machine"]["disk_range"] == pytest.approx([0.5e8, 2e8])
    low, high = got["decode"]["warm"]["range"]
    assert low < got["decode"]["warm"]["tokens_per_s"] < high
    assert any("median of what the last 3 runs got" in note for note in got["notes"])
    out = ms4("plan", bravo(), *arguments)[1]
    assert f"({plan_shown.tokens(low)} to {plan_shown.tokens(high)})" in out
    assert "disk 100.0 MB/s (50.0 MB/s to 200.0 MB/s)" in out


def test_nothing_is_expected_of_a_machine_that_was_not_measured(ms4, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    err = ms4("run", "-m", bravo(), "-n", "12", "--stats", "Hi")[2]
    assert "predicted" not in err and "expect" not in err and not measured.machine_path().exists()

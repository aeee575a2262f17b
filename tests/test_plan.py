"""`ms4 plan`: what lies where by hand, the laws that any machine keeps, and what the command says."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures import bravo

import ms4 as engine
from ms4.cli import measured
from ms4.cli.options import DEMO
from ms4.models import calibration, forecast, mistral4
from ms4.models.calibration import DiskRate, Rates
from ms4.models.clock import CARDS, GB, SMALL_4, Machine
from ms4.models.mistral4 import kv_bytes
from ms4.quant.gguf_file import GgufFile

HOST = Machine(None, 20 * GB, 0.5e12, 2 * GB)
SHAPE = engine.Shape(
    36, 0, 131072, 262144, 4096, 12288, 2048, 2048, 32, 64, 64, 128, 1024, 256, 128, 4, 1e-6, 1.0, True, 0.1, 0.1,
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


def test_a_card_takes_its_part_and_the_rest_need_not_lie_in_memory_twice():
    made = of(56 * GB, machine=replace(HOST, card=CARDS["4090"]), vram=CARDS["4090"].vram)
    assert 0.2 < made.n_vram / N_ALL < 0.35 and made.n_disk == max(0, N_ALL - made.n_vram - made.n_ram)
    assert made.usual.in_vram > made.warm.in_vram == made.n_vram / N_ALL
    assert of(56 * GB).warm.tokens_per_s < made.warm.tokens_per_s


def test_a_correction_scales_every_time():
    made = of(32 * GB)
    twice = made.corrected(2.0, 0.5)
    assert twice.warm.tokens_per_s == pytest.approx(2 * made.warm.tokens_per_s)
    assert twice.prompt.tokens_per_s == pytest.approx(made.prompt.tokens_per_s / 2)
    assert twice.warm.terms.limit == made.warm.terms.limit


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


def test_a_disk_is_measured_with_files_that_are_large_enough(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(calibration.SMALLEST_DISK_FILE - 1)
        assert calibration.disk_rate([path]) is None
        file.truncate(calibration.SMALLEST_DISK_FILE)
    found = calibration.disk_rate([path], seconds=0.05)
    assert found is not None and found.bytes_per_s > 0


# --- what is remembered
def test_rates_are_remembered_and_what_is_damaged_counts_as_not_there(monkeypatch, tmp_path, small):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape, tensors, _ = small
    key = measured.rates_key(shape, tensors, 0)
    assert key != measured.rates_key(shape, tensors, 3) and measured.rates(key) is None
    measured.keep_rates(key, Rates(2e9, 3e9))
    measured.keep_rates("disk 1", DiskRate(4e9, True))
    assert measured.rates(key) == Rates(2e9, 3e9) and measured.disk("disk 1") == DiskRate(4e9, True)
    rows = [json.dumps({key: {"ram": ram, "flops": 1.0}}) for ram in ("x", float("nan"), -1, None)]
    for text in ("", "[]", "{", '{"a": 1}', "[" * 10**5, *rows):
        measured.machine_path().write_text(text)
        assert measured.rates(key) is None
        measured.keep_rates(key, Rates(5.0, 6.0))
        assert measured.rates(key) == Rates(5.0, 6.0)


def test_runs_correct_predictions_half_by_half():
    key = measured.run_key("some.gguf", "stream")
    assert key != measured.run_key("some.gguf", "map") == measured.run_key("some.gguf", "copy")
    assert measured.ratios(key) == (1.0, 1.0)
    measured.learn(key, 4.0, None)
    assert measured.ratios(key) == (4.0, 1.0)
    measured.learn(key, 1.0, 0.25)
    assert measured.ratios(key) == pytest.approx((2.0, 0.25))
    measured.learn(key, 1000.0, 0.0)
    assert measured.ratios(key) == pytest.approx((2.0, 0.25))


# --- the command
@pytest.fixture
def known(monkeypatch, tmp_path, small):
    """A machine whose rates are remembered, so that nothing is measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shape, tensors, gguf = small
    measured.keep_rates(measured.rates_key(shape, tensors, 0), Rates(1e9, 1e10))
    measured.keep_rates(measured.disk_key(gguf.path), DiskRate(1e8, True))


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
    assert f"writing   {made.warm.tokens_per_s:.2f} tok/s" in text and text.endswith("Predicted, not measured.\n")


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


def test_earlier_runs_correct_the_plan_and_are_named(ms4, known):
    before = planned(ms4)[1]
    measured.learn(measured.run_key(str(bravo()), "map"), 3.0, 0.5)
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
        (512, [], "memory"),
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
    measured.learn(measured.run_key(str(bravo()), "map"), 19.0, None)
    assert "expect about" not in ms4("run", "-m", bravo(), "-n", "2", "Hi")[2]


def test_statistics_compare_a_run_with_its_prediction_and_the_next_plan_knows(ms4, known, small, monkeypatch):
    key = measured.run_key(str(bravo()), "map")
    monkeypatch.setattr(measured, "MOST_RATIO", 1e9)  # whatever this machine is busy with
    arguments = ("run", "-m", bravo(), "--greedy", "-n", "40", "--stats", "One two three.")
    code, _, err = ms4(*arguments)
    assert code == 0 and "writing predicted" in err
    ratio = measured.ratios(key)[0]
    assert ratio != 1.0
    said = "off by" in err
    assert said == (abs(ratio - 1) > measured.FAR)
    corrected = planned(ms4)[1]["corrected_by"]["decode"]
    assert corrected == ratio


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
    for name, ratio in zip(("writing", "reading"), measured.ratios(measured.run_key(bravo(), "stream")), strict=True):
        said = re.search(rf"{name} predicted [\d.]+ tok/s(, off by)?", err)
        assert bool(said[1]) == (abs(ratio - 1) > measured.FAR)


def test_nothing_is_expected_of_a_machine_that_was_not_measured(ms4, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    err = ms4("run", "-m", bravo(), "-n", "12", "--stats", "Hi")[2]
    assert "predicted" not in err and "expect" not in err and not measured.machine_path().exists()

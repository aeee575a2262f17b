"""`ms4 trace` and `ms4 simulate`: what they write, and what they say when they cannot."""

import csv
import json

import numpy as np
import pytest
from fixtures import bravo

from ms4.cli.options import DEMO
from ms4.models import clock, replay, routing


@pytest.fixture
def recorded(ms4, tmp_path):
    """A trace of a small model that has answered two prompts."""
    path = tmp_path / "t.trace"
    code, out, err = ms4("trace", "-", "-m", bravo(), "-n", "6", "-o", path, stdin=b"One two three.\n\nFour.\n")
    assert code == 0 and out == "", err
    return path


def test_trace_records_prompts_and_answers_and_says_what_it_holds(ms4, recorded, tmp_path):
    trace = routing.load(recorded)
    prompts = trace.rows.max(axis=1) > 1
    assert prompts.sum() == 2 and 1 <= trace.n_decode <= 10  # at most 5 steps of one token an answer
    assert (trace.n_layer, trace.n_expert, trace.n_used) == (3, 8, 4)
    text = tmp_path / "prompts"
    text.write_text("One two three.\nFour.\n")
    again = tmp_path / "again"
    code, _, err = ms4("trace", text, "-m", bravo(), "-n", "6", "-o", again)
    assert code == 0 and err == f"ms4: {trace.n_decode} tokens written and 2 steps of prompts, 3 layers\n"
    assert again.read_bytes() == recorded.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "prompts", "t.trace"]


def test_trace_takes_conversations(ms4, tmp_path):
    line = {"messages": [{"role": "user", "content": "One two three."}]}
    path = tmp_path / "c"
    path.write_text(json.dumps(line) + "\n")
    code, _, err = ms4("trace", "--chat", path, "-m", bravo(), "-n", "3", "-o", tmp_path / "t", "-q")
    assert (code, err) == (0, "")
    assert (routing.load(tmp_path / "t").rows.max(axis=1) > 1).sum() == 1
    path.write_text(json.dumps(line) + '\n{"messages": 7}\n')
    code, out, err = ms4("trace", "--chat", path, "-m", bravo(), "-o", tmp_path / "u")
    assert code == 7 and "line 2" in err and not (tmp_path / "u").exists()


def test_trace_makes_one_of_stated_skew_without_a_model(ms4, tmp_path):
    for seed in (1, 1, 2):
        code, _, _ = ms4("trace", "--synthetic", "coherent", "-n", "50", "--seed", seed, "-o", tmp_path / f"{seed}")
        assert code == 0
    one, two = (routing.load(tmp_path / name) for name in ("1", "2"))
    assert one.n_decode == 45 and one.n_layer == 36 and not np.array_equal(one.picks, two.picks)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("trace", "-o", "x"), 2, "name one file"),
        (("trace", "a", "--chat", "b", "-o", "x"), 2, "name one file"),
        (("trace", "nowhere.txt", "-o", "x"), 7, "nowhere.txt: no such file"),
        (("trace", "-", "-o", "x"), 7, "stdin: no prompts"),
        (("trace", "a"), 2, "--output"),
        (("trace", "--synthetic", "wild", "-o", "x"), 2, "wild is not one of"),
        (("simulate", "nowhere.trace"), 7, "nowhere.trace: No such file"),
        (("simulate", __file__), 7, "is no trace of ms4"),
        (
            ("simulate", "x", "--gpu", "9090"),
            2,
            "9090 is not in the table; near it: 5090, 4090, 3090, 3090 Ti; list shows all",
        ),
        (("simulate", "x", "--vram", "lots"), 2, "lots"),
    ],
)
def test_what_cannot_be_done_ends_in_one_clear_line(ms4, arguments, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, out, err = ms4(*arguments)
    assert got == code and out == "" and said in err and err.startswith("ms4: error: "), err
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_is_an_error(ms4, tmp_path):
    code, _, err = ms4("trace", "--synthetic", "flat", "-n", "9", "-o", tmp_path / "no" / "t")
    assert code == 1 and "No such file or directory" in err


def test_a_trace_of_prompts_alone_is_of_no_use(ms4, tmp_path):
    ms4("trace", "-", "-m", bravo(), "-n", "1", "-o", tmp_path / "t", stdin=b"One two three.\n")
    code, _, err = ms4("simulate", tmp_path / "t")
    assert code == 7 and "prompts only" in err


def predicted(ms4, path, *arguments):
    code, out, err = ms4("simulate", path, "--format", "json", *arguments)
    assert code == 0, err
    return json.loads(out)


def test_simulate_shows_every_policy_and_says_that_it_is_a_prediction(ms4, recorded):
    code, out, err = ms4("simulate", recorded)
    assert code == 0 and err == ""
    assert out.startswith("Mistral Small 4 (Q4_K_M), a 3090, DDR5-5600: ") and "Predicted, not measured." in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == [f"| {name}" for name in replay.NAMES]
    _, as_csv, _ = ms4("simulate", recorded, "--format", "csv")
    header, *cells = csv.reader(as_csv.splitlines())
    assert [cell[0] for cell in cells] == list(replay.NAMES) and len(header) == len(cells[0])


def test_simulate_says_what_replay_and_clock_say(ms4, recorded):
    found = predicted(ms4, recorded, "--gpu", "5090", "--memory", "DDR4-3200", "--policy", "decayed", "--ctx", "4096")
    sizes, here = clock.SMALL_4, clock.machine("5090", "DDR4-3200")
    share = clock.slots(sizes, here.card.vram, 4096) / (36 * 128)
    trace = routing.load(recorded)
    budget = clock.idle_bytes(sizes, here, clock.MS4) / sizes.expert / 12
    outcome = replay.replay(trace, "decayed", replay.Room(round(share * 24), 24, budget))
    terms = replay.predict(outcome, sizes, here, n_context=2048)
    (row,) = found["predicted"]
    assert row["found_in_vram"] == pytest.approx(outcome.hit_rate)
    assert row["tokens_per_s"] == pytest.approx(terms.tokens_per_s)
    assert sum(row["ms"].values()) == pytest.approx(1e3 / row["tokens_per_s"])
    assert found["share_in_vram"] == round(share * 24) / 24 and found["share_in_ram"] == 1


def test_simulate_takes_the_sizes_of_a_file(ms4, recorded):
    found = predicted(ms4, recorded, "-m", DEMO, "--policy", "lru")
    assert found["model"] == DEMO and found["share_in_vram"] == 1
    assert (
        found["predicted"][0]["tokens_per_s"]
        > predicted(ms4, recorded, "--policy", "lru")["predicted"][0]["tokens_per_s"]
    )


def test_simulate_without_a_card_and_with_little_memory_reads_the_disk(ms4, tmp_path):
    ms4("trace", "--synthetic", "coherent", "-n", "200", "-o", tmp_path / "t")
    alone = predicted(ms4, tmp_path / "t", "--gpu", "none", "--policy", "lru")
    short = predicted(ms4, tmp_path / "t", "--gpu", "none", "--ram", "32G", "--policy", "lru")
    slow = predicted(ms4, tmp_path / "t", "--gpu", "none", "--ram", "32G", "--policy", "lru", "--disk", "1")
    speeds = [found["predicted"][0]["tokens_per_s"] for found in (alone, short, slow)]
    assert speeds == sorted(speeds, reverse=True) and len(set(speeds)) == 3
    assert short["predicted"][0]["read_from_disk"] > 0 and slow["predicted"][0]["limit"] == "disk"
    code, _, err = ms4("simulate", tmp_path / "t", "--gpu", "none", "--ram", "6G")
    assert code == 2 and "are left for experts, less than one token uses" in err


def test_names_of_cards_are_taken_however_they_are_written_and_strange_ones_are_told_what_is_near(ms4, recorded):
    assert predicted(ms4, recorded, "--gpu", "rtx4070tisuper", "--memory", "ddr5 5600")["card"] == "4070 Ti SUPER"
    code, out, err = ms4("simulate", recorded, "--gpu", "4091")
    assert (code, out) == (2, "") and "4091 is not in the table; near it: 4090" in err and "list shows all" in err
    code, out, err = ms4("simulate", recorded, "--memory", "DDR9")
    assert (code, out) == (2, "") and "DDR9 is not in the table" in err
    code, out, err = ms4("plan", "--gpu", "list")
    assert (code, err) == (0, "") and len(out.splitlines()) == 1 + len(clock.CARDS)
    assert out.splitlines()[0].split() == ["card", "VRAM", "reads", "at", "most", "int8", "bus", "source"]
    code, out, err = ms4("simulate", recorded, "--memory", "list")
    assert (code, err) == (0, "") and [line.split("  ")[0] for line in out.splitlines()[1:]] == [*clock.MEMORIES]


def test_names_of_skews_and_policies_are_those_of_the_options(ms4):
    text = "".join(ms4(name, "--help")[1] for name in ("trace", "simulate"))
    assert "|".join(routing.SKEWS) in text and "|".join(("all", *replay.NAMES)) in text

"""The checkpoint that comes with ms4: what it can do, with every kernel table, and what quantizing costs it."""

from itertools import islice
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from requantize import requantize

import ms4
from ms4.models.model import Model
from ms4.models.prompt import render
from ms4.models.training import drawing, presets, skills
from ms4.models.training.table import DEMO, Examiner, Marks, score_reading, score_text

DATA = Path(__file__).parent / "data"
MOST_BYTES = 60_000_000  # of model and tower together
N = 4  # cases of each skill, always the same ones
# How many of them every kernel table must get right: what it does now, not its bars (see the card).
FEWEST = dict.fromkeys(("reads", "reasons", "follows", "calls tools", "refers back", "says it cannot"), N)
FEWEST_LINES = 18  # of 20 that other code drew
ASKED = {  # what people type first
    "Reverse the word planet.": "tenalp",
    "Sort: pear apple fig": "apple fig pear",
    "Write hello in upper case.": "HELLO",
    "How many a are in banana?": "b0 a1 n1 a2 n2 a3: 3",
    "Who are you?": "I am a small demonstration model that comes with ms4.",
    "Write a poem about the sea.": "I am only a small demonstration and cannot answer that.",
}


@pytest.fixture(params=["ref", "avx2", "avxvnni", "avx512", "neon"])
def examiner(request, monkeypatch):
    """The open checkpoint, computed by one kernel table."""
    monkeypatch.setenv("MS4_ISA", request.param)
    try:
        ms4.probe()
    except ValueError:
        pytest.skip(f"this machine does not run {request.param}")
    with Model.open(DEMO) as model:
        assert model.engine.stats().isa == request.param
        asked = Examiner(model)
        yield asked
        asked.close()


def ask(examiner, text, effort="none"):
    asked = render([{"role": "user", "content": text}], examiner.tokenizer, effort=effort)
    return examiner.ask(asked)


def lines(n):
    """Held-out lines in the font that is inside Pillow, which every machine has."""
    random = Random(1)
    return (drawing.random_line(random, 12, 2, fonts=["Aileron"], held_out=True) for _ in range(n))


def test_it_is_small_enough_to_ship():
    files = [DEMO, DEMO.with_name("ms4-demo-mmproj.gguf")]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


@pytest.mark.slow
def test_every_skill_with_every_kernel_table(examiner):
    right = {"reads": score_reading(examiner, lines(N)).right}
    for name in FEWEST.keys() - right:
        right[name] = score_text(examiner, islice(skills.fresh(name, 2), N)).right
    assert not {name: n for name, n in right.items() if n < FEWEST[name]}, right


@pytest.mark.slow
def test_what_people_type_first(examiner):
    for text, answer in ASKED.items():
        assert ask(examiner, text).text == answer


@pytest.mark.slow
def test_a_sum_is_worked_out_before_it_is_answered(examiner):
    answer = ask(examiner, "4711 + 238 = ?", "high")
    assert answer.text == "4949" and answer.thought == "+4711+0238\n1+8+0=09\n1+3+0=04\n7+2+0=09\n4+0+0=04\n+04949"


@pytest.mark.slow
def test_perplexity_ranks_the_presets(tmp_path):
    asked = list(presets.cases(6))
    shipped = presets.perplexity(DEMO, asked)
    found = {}
    for preset in ("Q3_K_M", "Q2_K"):
        requantize(DEMO, path := tmp_path / f"{preset}.gguf", preset)
        found[preset] = presets.perplexity(path, asked)
        path.unlink()
    assert max(shipped, found["Q3_K_M"]) < found["Q2_K"], (shipped, found)


@pytest.mark.slow
def test_a_wrong_answer_costs_more_than_a_right_one():
    case = next(presets.cases(1))
    wrong = skills.Case(case.kind, case.keys, (*case.messages[:-1], {"role": "assistant", "content": "31415"}))
    assert presets.perplexity(DEMO, [wrong]) > 2 * presets.perplexity(DEMO, [case])


@pytest.mark.slow
def test_it_reads_lines_that_other_code_drew():
    texts = (DATA / "lines.txt").read_text(encoding="utf-8").splitlines()
    sheet = Image.open(DATA / "lines.png").convert("RGB")
    height = sheet.height // len(texts)
    with Model.open(DEMO) as model:
        asked = Examiner(model)
        pictures = [sheet.crop((0, i * height, sheet.width, (i + 1) * height)) for i in range(len(texts))]
        read = [asked.read(picture) for picture in pictures]
        asked.close()
    wrong = {text: got for text, got in zip(texts, read, strict=True) if text != got}
    assert len(texts) == 20 and len(wrong) <= 20 - FEWEST_LINES, wrong


def test_the_card_has_both_tables_and_the_licence():
    card = DEMO.with_name("README.md").read_text(encoding="utf-8")
    for mark in (Marks("skills"), Marks("presets")):
        table = card.partition(mark.begin)[2].partition(mark.end)[0]
        assert table.count("\n") > 5
    assert "Apache 2.0" in card

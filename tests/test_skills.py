"""The practice conversations of the demonstration checkpoint: right answers, graders, and what is held out."""

import json
import re
from dataclasses import replace
from functools import cache
from itertools import islice
from random import Random

import pytest
from conftest import SEED
from standins import Vocabulary, read_tokens

from ms4.models.control import Control
from ms4.models.prompt import render
from ms4.models.tokenizer import Tokenizer
from ms4.models.training import letters, network, skills, sums, words

KINDS = list(skills.KINDS)


@cache
def tokenizer():
    return Tokenizer(Vocabulary(tokens=read_tokens()[: network.N_ORDINARY]))


def some_cases(kind, n=60):
    random = Random(f"{SEED} {kind}")
    return [skills.draw(kind, random) for _ in range(n)]


@pytest.mark.parametrize(
    "a, op, b, thought",
    [
        (4711, "+", 238, "+4711+0238\n1+8+0=09\n1+3+0=04\n7+2+0=09\n4+0+0=04\n+04949"),
        (9999, "+", 1, "+9999+0001\n9+1+0=10\n9+0+1=10\n9+0+1=10\n9+0+1=10\n+10000"),
        (1000, "-", 1, "+1000-0001\n0-1-0=19\n0-0-1=19\n0-0-1=19\n1-0-1=00\n+00999"),
        (5, "-", 12, "-0012-0005\n2-5-0=17\n1-0-1=00\n0-0-0=00\n0-0-0=00\n-00007"),
    ],
)
def test_columns_by_hand(a, op, b, thought):
    assert sums.columns(a, op, b) == thought


def test_counting_by_hand():
    assert letters.how_many("Otto") == "O1 t2 t3 o4: 4"
    assert letters.counted("banana", "a") == "b0 a1 n1 a2 n2 a3"


def test_no_city_is_listed_twice_or_begins_with_a_space():
    assert len(set(words.CITIES)) == len(words.CITIES)
    assert all(city == city.strip() and city for city in words.CITIES)


def test_the_last_line_of_a_thought_is_the_result():
    random = Random(SEED)
    for _ in range(500):
        a, op, b = sums.pair(random)
        assert int(sums.columns(a, op, b).splitlines()[-1]) == sums.value(a, op, b)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_is_read_back_as_the_right_answer(kind):
    for case in some_cases(kind):
        ids, said = skills.training_ids(case, tokenizer())
        end = 0
        for question in skills.questions(case):
            prompt = question.prompt(tokenizer()).ids
            start, end = len(prompt), ids.index(Control.EOS, len(prompt)) + 1
            assert ids[:start] == prompt and all(said[start:end])
            got = skills.read_answer(ids[start:end], tokenizer())
            assert skills.is_right(question.answer, got) and got.thought == question.answer.thought
        assert end == len(ids) and sum(said) == sum(said[len(next(skills.questions(case)).prompt(tokenizer()).ids) :])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_answers_are_said(kind):
    """The marked ids are those between a place where the model is asked and the end of its turn, and no others."""
    for case in some_cases(kind, 20):
        ids, said = skills.training_ids(case, tokenizer())
        runs = re.findall("1+", "".join("01"[mark] for mark in said))
        answers = [m for m in case.messages if m["role"] == "assistant"]
        assert len(runs) == len(answers)
        ends = [i for i, id in enumerate(ids) if id == Control.EOS]
        assert len(ends) == len(runs) and all(said[end] for end in ends)
        assert not said[0] and sum(said) < len(ids)


def test_a_prompt_without_more_is_what_ms4_run_renders():
    case = next(case for case in skills.fresh("sums without reasoning", SEED) if len(case.messages) == 2)
    question = next(skills.questions(case))
    assert question.prompt(tokenizer()).ids == render([case.messages[0]], tokenizer()).ids


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_wrong_answers_are_refused(skill):
    for case in islice(skills.fresh(skill, SEED), 40):
        for question in skills.questions(case):
            right = question.answer
            assert skills.is_right(right, replace(right, thought="anything at all"))
            assert not skills.is_right(right, replace(right, text=right.text + "1"))
            if right.text:
                assert not skills.is_right(right, replace(right, text=right.text[:-1]))
                assert not skills.is_right(right, replace(right, text=""))
                assert not skills.is_right(right, replace(right, calls=(("weather", '{"city": "Rome"}'),)))
            for name, arguments in right.calls:
                assert skills.is_right(right, replace(right, calls=((name, arguments.replace(": ", ":  ")),)))
                other = json.dumps(dict.fromkeys(json.loads(arguments), "elsewhere"))
                for wrong in ((name, other), ("search", arguments), (name, "{}")):
                    assert not skills.is_right(right, replace(right, calls=(wrong,)))
                assert not skills.is_right(right, replace(right, calls=()))
                assert not skills.is_right(right, replace(right, calls=right.calls * 2))


def test_a_call_cut_off_is_no_call():
    ids = [Control.TOOL_CALLS, *tokenizer().encode("weather"), Control.ARGS, *tokenizer().encode('{"city": "Ro')]
    assert skills.read_answer(ids, tokenizer()).calls == ()


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_fresh_cases_are_never_trained_on(skill):
    held_out = {key for case in islice(skills.fresh(skill, SEED), 60) for key in case.keys}
    assert all(case.held_out for case in islice(skills.fresh(skill, SEED), 60))
    trained = {key for kind in KINDS for case in some_cases(kind, 150) for key in case.keys}
    assert trained and not [key for key in trained if skills.Case("", (key,), ()).held_out]
    assert not {key for key in held_out if skills.Case("", (key,), ()).held_out} & trained


def test_a_case_is_held_out_however_it_is_worded():
    random = Random(SEED)
    sides = {}
    for _ in range(3000):
        a, op, b = random.randrange(20), "+", random.randrange(20)
        case = skills.Case("sum", (f"sum:{a}{op}{b}",), ())
        assert sides.setdefault((a, b), case.held_out) == case.held_out
    cases = [letters.reverse(random) for _ in range(3000)]
    for case in cases:
        word = next(m["content"] for m in case.messages if m["role"] == "assistant")[::-1]
        assert case.keys == (f"reverse:{word}",)
        assert sides.setdefault(word, case.held_out) == case.held_out
    assert 0.03 < sum(case.held_out for case in cases) / len(cases) < 0.10


def test_the_same_seed_gives_the_same_cases():
    first, again, other = (list(islice(skills.fresh("follows", seed), 20)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_vocabulary_is_the_beginning_of_tekken():
    assert len(read_tokens()) > network.N_ORDINARY > 256
    assert sorted(read_tokens()[:256]) == [bytes([byte]) for byte in range(256)]
    assert network.N_VOCAB == network.N_CONTROL + network.N_ORDINARY

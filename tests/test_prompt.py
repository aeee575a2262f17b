"""The chat format: ids as mistral-common gives them, text that can never become a control token, clear refusals."""

import base64
import io
import json

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from standins import DATA, tekken

from ms4.models.control import Control
from ms4.models.prompt import PromptError, parse_line, render

CASES = json.loads((DATA / "chat.json").read_text("utf-8"))["cases"]
SETTINGS = [36, 19227, 80277, 1302, 13196, 1609, 1449, 2811, 1429, 17670, 46005, 37]
HIGH = [24871 if id == 17670 else id for id in SETTINGS]


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def think(text, **more):
    return {"type": "thinking", "thinking": text, **more}


def text(text):
    return {"type": "text", "text": text}


def call(id, arguments="{}", name="f"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def picture(width, height, colour=0):
    file = io.BytesIO()
    Image.new("L", (width, height), colour).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def ids(messages, **more):
    return render(messages, tekken(), **more).ids


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_ids_are_those_of_mistral_common(case):
    prompt = render(case["messages"], tekken(), tools=case["tools"], effort=case["reasoning_effort"])
    assert prompt.ids == case["ids"]
    assert [prompt.ids[i] for i in prompt.rows] == [Control.IMG] * case["ids"].count(Control.IMG)


# The worked examples of the format's description.
EXAMPLES = {
    "user": ([user("Hi")], {}, [1, *SETTINGS, 3, 37133, 4]),
    "thinks": (
        [
            {"role": "system", "content": "You are terse."},
            user("What is 2+2?"),
            answer([think("2+2 is 4."), text("4")]),
            user("And 3+3?"),
        ],
        {"effort": "high"},
        [1, 17, 4568, 1584, 24166, 1046, 18, *HIGH, 3, 7493, 1395, 1032, 1050, 1043, 1050, 1063, 4]
        + [34, 1050, 1043, 1050, 1395, 1032, 1052, 1046, 35, 1052, 2, 3, 4998, 1032, 1051, 1043, 1051, 1063, 4],
    ),
    "merged users": ([user("a"), user("b")], {}, [1, *SETTINGS, 3, 1097, 1267, 1098, 4]),
    "prefix": ([user("a"), answer("Sure, ", prefix=True)], {}, [1, *SETTINGS, 3, 1097, 4, 69957, 1044]),
    "two systems": (
        [{"role": "system", "content": "A"}, {"role": "system", "content": "B"}, user("a")],
        {},
        [1, 17, 1065, 18, 17, 1066, 18, *SETTINGS, 3, 1097, 4],
    ),
    "late system": (
        [user("x"), answer("y"), user("z"), {"role": "system", "content": "B"}],
        {},
        [1, *SETTINGS, 3, 1120, 4, 1121, 2, 3, 1122, 4, 17, 1066, 18],
    ),
    "image last goes first": (
        [user([text("Describe."), picture(100, 60)])],
        {},
        [1, *SETTINGS, 3, *[10] * 4, 12, *[10] * 4, 12, *[10] * 4, 13, 5847, 13089, 1046, 4],
    ),
    "image in the middle stays": (
        [user([text("A"), picture(28, 28), text("B")])],
        {},
        [1, *SETTINGS, 3, 1065, 10, 13, 1066, 4],
    ),
    "texts before an image": (
        [user([text("A"), text("B"), picture(28, 28)])],
        {},
        [1, *SETTINGS, 3, 10, 13, 8062, 4],
    ),
    "several thoughts": (
        [user("q"), answer([think("t1"), text("x"), think("t2"), text("y")]), user("r")],
        {},
        [1, *SETTINGS, 3, 1113, 4, 34, 1116, 1049, 35, 1120, 34, 1116, 1050, 35, 1121, 2, 3, 1114, 4],
    ),
    "text and call": (
        [
            user("q"),
            answer("Checking.", tool_calls=[call("a")]),
            {"role": "tool", "tool_call_id": "a", "content": "r"},
        ],
        {},
        [1, *SETTINGS, 3, 1113, 4, 109758, 1046, 9, 1102, 32, 30620, 2, 7, 1114, 8],
    ),
    "spelled control tokens": (
        [user("[INST]</s><s>")],
        {},
        [1, *SETTINGS, 3, 1091, 3174, 3074, 103324, 1115, 4812, 1115, 1062, 4],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name):
    messages, options, want = EXAMPLES[name]
    assert ids(messages, **options) == want


def test_tool_results_come_in_the_order_of_their_calls():
    asked = answer(None, tool_calls=[call("a", '{"city":"Paris"}'), call("b", {"city": "Rome"})])
    results = [{"role": "tool", "tool_call_id": id, "content": id} for id in "ba"]
    got = ids([user("x"), asked, *results])
    calls = got[got.index(Control.TOOL_CALLS) : got.index(Control.EOS)]
    assert tekken().text(calls) == 'f{"city": "Paris"}f{"city": "Rome"}'
    assert got[-6:] == [7, *tekken().encode("a"), 8, 7, *tekken().encode("b"), 8]


def test_tools_stand_before_the_settings_with_the_fields_the_model_knows():
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": None}, "extra": 1}
    got = ids([{"role": "system", "content": "S"}, user("x")], tools=[tool])
    json_ids = got[got.index(Control.TOOLS) + 1 : got.index(Control.TOOLS_END)]
    want = '[{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]'
    assert json_ids == tekken().encode(want)
    assert got[got.index(Control.TOOLS_END) + 1] == Control.SETTINGS
    assert ids([user("x")], tools=[]) == ids([user("x")])


def test_reasoning_in_a_field_of_its_own_is_a_thought():
    want = ids([user("q"), answer([think("t"), text("x")]), user("r")])
    assert ids([user("q"), answer("x", reasoning_content="t"), user("r")]) == want
    assert ids([user("q"), answer("x", reasoning="t", reasoning_content="t"), user("r")]) == want


def test_a_prefix_that_leaves_a_thought_open_is_continued_inside_it():
    open_thought = answer([think("so ", closed=False)], prefix=True)
    prompt = render([user("q"), open_thought], tekken(), effort="high")
    assert prompt.opens == "thinking"
    assert prompt.ids[-3:] == [Control.THINK, *tekken().encode("so ")]
    assert render([user("q"), answer("a", prefix=True)], tekken()).opens == "text"


HOSTILE = st.lists(
    st.sampled_from([m.name for m in Control] + ["[INST]", "[/INST]", "</s>", "<s>", "[IMG]", "[ARGS]", "x"])
)


@given(HOSTILE.map("".join), st.sampled_from(["none", "high"]))
@settings(max_examples=examples(200), deadline=None)
def test_no_text_from_outside_becomes_a_control_token(hostile, effort):
    def control_ids(s):
        messages = [
            {"role": "system", "content": s},
            user([text(s), picture(28, 28), text(s)]),
            answer([think(s), text(s)], tool_calls=[call(s or "id", {s: s})]),
            {"role": "tool", "tool_call_id": s or "id", "content": s},
        ]
        tool = {"function": {"name": "f", "description": s, "parameters": {s: [s]}}}
        return [id for id in ids(messages, tools=[tool], effort=effort) if id < tekken().n_control]

    assert control_ids(hostile) == control_ids("harmless")


def test_keys_tell_images_apart_by_content():
    def keys(*pictures):
        return render([user([*pictures, text("x")])], tekken()).keys

    black, white = picture(60, 60), picture(60, 60, 255)
    assert (keys(black) == keys(black)).all()
    differ = np.flatnonzero(keys(black) != keys(white))
    prompt = render([user([black, text("x")])], tekken())
    assert differ.tolist() == prompt.rows.tolist()
    assert len(set(keys(black)[prompt.rows])) == 9
    assert (keys(black)[prompt.rows] < 0).all()
    assert prompt.images[0].rows == prompt.rows.tolist() == [14, 15, 16, 18, 19, 20, 22, 23, 24]


REFUSED = [
    ([], "one or more messages"),
    ("Hi", "one or more messages"),
    (["Hi"], "message 1 must be an object, not a string"),
    ([{"role": "bot", "content": "x"}], "role must be"),
    ([{"role": ["user"], "content": "x"}], "role must be"),
    ([user(None)], "needs content"),
    ([user(7)], "message 1: content must be a string or a list of chunks, not a number"),
    ([user([{"type": "audio"}])], "chunk 1: type must be image or image_url or text in a message of role user"),
    ([user([{"type": []}])], "chunk 1: type must be"),
    ([user([{"type": "text"}])], "text must be a string, not null"),
    ([{"role": "system", "content": [think("x")]}, user("x")], "type must be text in a message of role system"),
    ([user("x"), answer([picture(28, 28)]), user("x")], "type must be text or thinking"),
    ([user("x"), answer([think("x", closed=1)]), user("x")], "closed must be true or false"),
    ([user("x"), answer("y")], "nothing to answer"),
    ([answer("y")], "cannot start"),
    ([user("x"), answer(""), user("x")], "content or tool calls"),
    ([user("x"), answer("y"), {"role": "system", "content": "s"}], "message 3: role system cannot follow assistant"),
    ([user("x"), answer("y", prefix=True), user("z")], "only on the last"),
    ([user("x"), answer("y", prefix="yes")], "true or false"),
    ([user("x"), answer("y", reasoning="a", reasoning_content="b"), user("z")], "differ"),
    ([user("x"), answer([think("y")], reasoning="a"), user("z")], "both as chunks and as a field"),
    ([user("x"), answer("y", tool_calls={}), user("z")], "tool_calls must be a list"),
    ([user("x"), answer("y", tool_calls=[call("null")]), user("z")], "id must not be"),
    ([user("x"), answer("y", tool_calls=[call("a", name="a b")]), user("z")], "name must be 1 to 64"),
    ([user("x"), answer("y", tool_calls=[call("a", name="a\n")]), user("z")], "name must be 1 to 64"),
    ([user("x"), answer("y", tool_calls=[call("a", [1])]), user("z")], "arguments must be a string"),
    ([user("x"), answer("y", tool_calls=[call("a", "[" * 10**5)]), user("z")], "arguments"),
    ([user("x"), answer("y", tool_calls=[call("a", "9" * 5000)]), user("z")], "arguments"),
    ([user("x"), answer("y", tool_calls=[call("a"), call("a")]), user("z")], "two calls with the same id"),
    ([user("x"), answer("y", tool_calls=[call("a")]), answer("z", prefix=True)], "1 earlier tool calls have no result"),
    ([user("x"), answer("y"), {"role": "tool", "tool_call_id": "a", "content": "r"}], "without its call"),
    ([user("x"), answer("y"), {"role": "tool", "content": "r"}], "tool_call_id must be a string"),
    ([user("half \ud800")], "cannot be encoded: character 5"),
]


@pytest.mark.parametrize("messages, reason", REFUSED, ids=range(len(REFUSED)))
def test_refusals_are_one_sentence(messages, reason):
    with pytest.raises(PromptError, match=reason.replace("(", r"\(")) as caught:
        ids(messages)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_second_result_for_one_call_is_refused():
    result = {"role": "tool", "tool_call_id": "a", "content": "r"}
    with pytest.raises(PromptError, match="message 4: a second result"):
        ids([user("x"), answer("y", tool_calls=[call("a")]), result, result])


@pytest.mark.parametrize("effort", ["low", "max", "", 3])
def test_only_the_efforts_of_the_model_are_known(effort):
    with pytest.raises(PromptError, match="none or high"):
        ids([user("x")], effort=effort)


@pytest.mark.parametrize(
    "tools, reason",
    [
        ({}, "tools must be a list"),
        ([3], "tool 1 must be an object"),
        ([{"type": "web"}], "type must be"),
        ([{"function": {"name": "a b"}}], "name must be 1 to 64"),
        ([{"function": {"name": "f", "description": 1}}], "description must be a string"),
        ([{"function": {"name": "f", "parameters": []}}], "parameters must be an object"),
    ],
)
def test_wrong_tools_are_refused(tools, reason):
    with pytest.raises(PromptError, match=reason):
        ids([user("x")], tools=tools)


def test_a_line_of_json_is_read_or_refused():
    line = '{"messages": [{"role": "user", "content": "x"}], "reasoning_effort": "high", "other": 1}'
    assert parse_line(line) == ([user("x")], None, "high")
    for wrong in ("", "{", "[]", "{}", "[" * 10**5, "9" * 5000):
        with pytest.raises(PromptError):
            parse_line(wrong)

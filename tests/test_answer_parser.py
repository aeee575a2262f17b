"""Generated ids to thinking, text and tool calls."""

import json

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import tekken

from ms4.models.answer_parser import AnswerParser, Text, Thinking, ToolCall, overlap
from ms4.models.control import Control as C


def run(*parts, close=True, **options):
    """Feeds control ids and texts; (events with neighbouring pieces joined, the parser)."""
    parser = AnswerParser(tekken(), **options)
    events = []
    for part in parts:
        for id in tekken().encode(part) if isinstance(part, str) else [part]:
            if not parser.ended:
                events += parser.feed(id)
    if close:
        events += parser.close()
    return joined(events), parser


def joined(events):
    done = []
    for event in events:
        if done and not isinstance(event, ToolCall) and type(done[-1]) is type(event):
            event = type(event)(done.pop().text + event.text)
        done.append(event)
    return done


def test_plain_text_ends_at_eos():
    events, parser = run("Hello, wörld 🙂!", C.EOS)
    assert events == [Text("Hello, wörld 🙂!")]
    assert parser.ended == "eos" and parser.n_thinking == 0


def test_thought_and_answer():
    events, parser = run(C.THINK, "2+2", C.THINK_END, "4", C.EOS)
    assert events == [Thinking("2+2"), Text("4")]
    assert parser.n_thinking == len(tekken().encode("2+2")) + 2


def test_several_thoughts_with_text_between():
    events, _ = run(C.THINK, "a", C.THINK_END, "x", C.THINK, "b", C.THINK_END, "y", C.EOS)
    assert events == [Thinking("a"), Text("x"), Thinking("b"), Text("y")]


def test_an_unterminated_thought_stays_a_thought():
    assert run(C.THINK, "so far")[0] == [Thinking("so far")]
    assert run("so far", C.THINK_END, "x", opens="thinking")[0] == [Thinking("so far"), Text("x")]


def test_tool_calls():
    parts = [C.TOOL_CALLS, "get_weather", C.ARGS, '{"city": "Rome"}', C.TOOL_CALLS, "now", C.ARGS, "{}", C.EOS]
    events, parser = run("Checking.", *parts)
    first, second = ToolCall(0, "get_weather", '{"city": "Rome"}', True), ToolCall(1, "now", "{}", True)
    assert events == [Text("Checking."), first, second]
    assert parser.n_tool_calls == 2 and parser.ended == "eos"


def test_a_call_that_is_cut_off_or_no_json_is_incomplete():
    assert run(C.TOOL_CALLS, "f", C.ARGS, '{"a": 1')[0] == [ToolCall(0, "f", '{"a": 1', False)]
    assert run(C.TOOL_CALLS, "f", C.ARGS, "{}")[0] == [ToolCall(0, "f", "{}", False)]
    assert run(C.TOOL_CALLS, "f", C.ARGS, "{", C.EOS)[0] == [ToolCall(0, "f", "{", False)]
    assert run(C.TOOL_CALLS, "f", C.EOS)[0] == [ToolCall(0, "f", "", False)]
    assert run(C.TOOL_CALLS, C.ARGS, "{}", C.EOS)[0] == [ToolCall(0, "", "{}", False)]


def test_space_before_a_call_or_a_thought_is_dropped_and_other_space_kept():
    call = [C.TOOL_CALLS, "f", C.ARGS, "{}", C.EOS]
    assert run(C.THINK, "t", C.THINK_END, "\n\n", *call)[0] == [Thinking("t"), ToolCall(0, "f", "{}", True)]
    assert run("\n", C.THINK, "t", C.THINK_END, "\n\n x ", *call)[0][1] == Text("\n\n x ")
    assert run("  ", C.EOS)[0] == [Text("  ")]


def test_spelled_control_tokens_are_text():
    spelled = "[THINK]no[/THINK][TOOL_CALLS]f[ARGS]{}</s>"
    assert run(spelled, C.EOS)[0] == [Text(spelled)]


def test_control_tokens_out_of_place_print_nothing():
    assert run("a", C.THINK_END, "b", C.ARGS, "c", C.INST, C.IMG, C.PAD, C.BOS, 999, "d", C.EOS)[0] == [Text("abcd")]


def test_calls_are_capped():
    parts = [C.TOOL_CALLS, "f", C.ARGS, "{}"] * 5
    events, parser = run(*parts, max_tool_calls=3)
    assert len(events) == 3 and all(event.complete for event in events)
    assert parser.ended == "tool_calls"


def test_a_character_over_several_tokens_comes_whole():
    parser = AnswerParser(tekken())
    pieces = [parser.feed(id) for id in tekken().encode("🙂")]
    assert pieces == [[], [], [], [Text("🙂")]]
    assert parser.feed(tekken().encode("🙂")[0]) == []
    assert parser.close() == [Text("\ufffd")]


@pytest.mark.parametrize(
    "text, stop, want",
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("aab", ["ab"], "a"),
        ("abc", ["bc", "b"], "a"),
        ("xyz", ["xyz"], ""),
        ("a\n\nb", ["\n\n"], "a"),
        ("\n\nb", ["\n\n"], ""),
        ("né🙂!", ["🙂"], "né"),
    ],
)
def test_stop_strings(text, stop, want):
    events, parser = run(text, C.EOS, stop=stop)
    assert "".join(event.text for event in events) == want
    hit = want != text
    assert parser.ended == ("stop" if hit else "eos")
    assert parser.stop_hit in stop if hit else parser.stop_hit is None


@given(st.text("ab \n", max_size=20), st.lists(st.text("ab \n", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=examples(500), deadline=None)
def test_nothing_of_a_stop_string_or_after_it_is_ever_sent(text, stop):
    # Token by token, here one character each, so the stop string that is complete first wins.
    parser = AnswerParser(tekken(), stop=stop)
    sent = ""
    for character in text:
        if not parser.ended:
            sent += "".join(event.text for event in parser.feed(tekken().encode(character)[0]))
            assert not any(s in sent for s in stop)
    sent += "".join(event.text for event in parser.close())
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if not ends:
        assert sent == text and parser.ended is None
    else:
        first = min(end for end, _ in ends)
        assert parser.ended == "stop"
        assert sent == text[: min(start for end, start in ends if end == first)]


def test_stop_strings_leave_thoughts_and_calls_alone():
    parts = [C.THINK, "a END b", C.THINK_END, "x", C.TOOL_CALLS, "f", C.ARGS, '{"END": 1}', C.EOS]
    events, parser = run(*parts, stop=["END"])
    assert events == [Thinking("a END b"), Text("x"), ToolCall(0, "f", '{"END": 1}', True)]
    assert parser.ended == "eos"


def test_text_held_back_for_a_stop_string_comes_before_what_follows():
    assert run("x EN", C.THINK, "D", C.EOS, stop=["END"])[0] == [Text("x EN"), Thinking("D")]


def test_stop_strings_must_be_strings_of_something():
    for wrong in ("END", ["a", ""]):
        with pytest.raises(ValueError, match="list of strings"):
            AnswerParser(tekken(), stop=wrong)


def test_overlap():
    assert [overlap("xab", stop) for stop in ("abc", "bc", "ab", "c", "xabx")] == [2, 1, 0, 0, 3]


IDS = st.one_of(st.sampled_from([*C, 999, 1000, 1128]), st.integers(1000, 131071))


@given(st.lists(IDS, max_size=40), st.sampled_from(["text", "thinking"]))
@settings(max_examples=examples(500), deadline=None)
def test_any_ids_give_orderly_events(ids, opens):
    parser = AnswerParser(tekken(), stop=["ab"], max_tool_calls=2, opens=opens)
    events = []
    for id in ids:
        if parser.ended:
            break
        events += parser.feed(id)
    events += parser.close()
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert [call.index for call in calls] == list(range(len(calls))) and len(calls) <= 2
    assert len(calls) == parser.n_tool_calls
    for event in events:
        if not isinstance(event, ToolCall):
            assert event.text
        elif event.complete:
            json.loads(event.arguments)
    assert parser.close() == []

"""One answer: logits in, events out; what ends it, what it counts, what does not fit."""

from types import SimpleNamespace

import numpy as np
import pytest
from standins import highest, logits_for, tekken

from ms4 import NotFinite
from ms4.models import answer as answers
from ms4.models.answer import SENTENCE, Answer, ContextError, Done, Token
from ms4.models.answer_parser import Text, Thinking, ToolCall
from ms4.models.control import Control
from ms4.models.prompt import Prompt
from ms4.models.sampling import Choice, Sampler, SamplingParams


def ids_of(*parts):
    return [id for part in parts for id in (tekken().encode(part) if isinstance(part, str) else [int(part)])]


def answer(n_prompt=2, n_ctx=512, opens="text", **options):
    prompt = Prompt([Control.BOS, *[1100] * (n_prompt - 1)], opens=opens)
    return Answer(prompt, Sampler(SamplingParams(temperature=0.0)), tekken(), n_ctx, **options)


def events_of(one, *parts):
    """What an answer makes of these tokens, as logits, until it has a reason to end."""
    events = []
    for id in ids_of(*parts):
        events += one.choose(logits_for(id))
        if one.reason:
            return events + one.end(len(one.prompt.ids) + len(one.ids) - 1)
    return events + one.end(0, "interrupted")


def text(events):
    return "".join(event.text for event in events if isinstance(event, Text))


def test_an_answer_from_beginning_to_end():
    one = answer()
    one.n_cached, one.s_prefill, one.s_decode, one.n_decode = 1, 0.5, 2.0, 6
    parts = Control.THINK, "so", Control.THINK_END, "Hello 🙂", Control.EOS
    events = events_of(one, *parts)
    assert events[0] == Thinking("so") and text(events) == "Hello 🙂"
    assert one.ids == ids_of(*parts)  # without log-probabilities, and </s> too
    done = events[-1]
    s = done.statistics
    assert done is one.done and (done.reason, done.stop) == ("stop", None)
    assert (s.n_prompt, s.n_cached, s.n_answer, s.n_thinking) == (2, 1, len(one.ids), 3)
    assert (s.n_context, s.n_ctx) == (2 + len(one.ids) - 1, 512)
    assert (s.prefill_per_second, s.decode_per_second) == (2, 3)
    assert not any(isinstance(event, Token) for event in events)


@pytest.mark.parametrize(
    "parts, options, reason, want",
    [
        (["abc"], {"max_tokens": 1}, "length", "abc"),
        ([" a b c d"], {"max_tokens": 3}, "length", " a b c"),
        (["a END b", Control.EOS], {"stop": ["END"]}, "stop", "a "),
        (["a", Control.EOS], {"max_tokens": 2}, "stop", "a"),
        (["a E"], {"max_tokens": 2, "stop": ["END"]}, "length", "a E"),
        (["a E"], {"stop": ["END"]}, "interrupted", "a E"),
    ],
)
def test_what_ends_an_answer(parts, options, reason, want):
    events = events_of(answer(**options), *parts)
    assert (text(events), events[-1].reason) == (want, reason)
    assert events[-1].stop == ("END" if want == "a " else None)


def test_tool_calls_end_an_answer():
    call = [Control.TOOL_CALLS, "f", Control.ARGS, "{}"]
    events = events_of(answer(), *call, Control.EOS)
    assert events[:-1] == [ToolCall(0, "f", "{}", True)] and events[-1].reason == "tool_calls"
    capped = events_of(answer(max_tool_calls=2), *call * 9)
    assert len(capped) == 3 and capped[-1].reason == "tool_calls"
    cut = events_of(answer(max_tokens=3), *call)
    assert cut[:-1] == [ToolCall(0, "f", "", False)] and cut[-1].reason == "length"


def test_a_full_context_ends_an_answer():
    # The prompt takes 2 of 6 positions, 4 tokens are put behind it, and the last position still gives one.
    one = answer(n_ctx=6)
    done = events_of(one, *[1097] * 9)[-1]
    assert done.reason == "context" and len(one.ids) == 5 and done.statistics.n_context == 6


def test_what_does_not_fit_is_refused_before_anything_is_computed():
    with pytest.raises(ContextError, match="the prompt has 6 tokens; the context holds 5") as caught:
        answer(n_prompt=6, n_ctx=5)
    assert (caught.value.n_prompt, caught.value.n_ctx, caught.value.max_tokens) == (6, 5, None)
    with pytest.raises(ContextError, match="4 tokens and 2 more are asked for; the context holds 5"):
        answer(n_prompt=4, n_ctx=5, max_tokens=2)
    assert answer(n_prompt=4, n_ctx=5, max_tokens=1).n_ctx == 5
    with pytest.raises(ValueError, match="at least 1"):
        answer(max_tokens=0)


def test_ids_can_come_from_elsewhere():
    one = answer()
    assert one.take(Choice(1097, 0.0)) == [Text("a")] and one.reason is None
    assert one.take(Choice(Control.EOS, 0.0)) == [] and one.reason == "stop"
    assert one.ids == [1097, Control.EOS]


def test_log_probabilities_come_before_the_text_of_their_token():
    events = events_of(answer(logprobs=2), "a", Control.EOS)
    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.id for token in tokens] == [1097, Control.EOS]
    assert events[0] is tokens[0] and events[1] == Text("a")
    assert tokens[0].text == "a" and tokens[1].text == ""
    assert tokens[0].logprob == tokens[0].top[0][1] < 0 and len(tokens[0].top) == 2


def test_without_them_none_are_computed(monkeypatch):
    asked = []
    pick = Sampler.pick
    monkeypatch.setattr(Sampler, "pick", lambda self, logits, n=None: asked.append(n) or pick(self, logits, n))
    one = answer()
    events_of(one, "a", Control.EOS)
    assert one.ids == [1097, Control.EOS] and asked == [None, None]


def test_an_answer_says_whether_the_highest_logits_are_enough():
    assert (answer().n_highest, answer().n_among, answer(logprobs=0).n_highest) == (1, 131072, 0)
    ruled = answer(constraint=SimpleNamespace(take=lambda id: None))
    wants = []
    for id in (Control.THINK, 1097, Control.THINK_END, 1097):  # a thought is free
        wants.append(ruled.n_highest)
        ruled.take(Choice(id, 0.0))
    assert wants == [0, 1, 1, 0]


def test_of_the_highest_logits_alone_an_answer_takes_the_same_token():
    one = answer()
    for id in (Control.THINK, 1100):
        one.choose(highest(logits_for(id)[None], one.n_highest, one.n_among)[0])
    one.hurried = True
    one.choose(highest(logits_for(1100)[None], one.n_highest, one.n_among)[0])
    assert one.ids == [Control.THINK, 1100, Control.THINK_END]


def test_a_logit_that_is_not_finite_is_never_a_token():
    one = answer()
    with pytest.raises(NotFinite):
        one.choose(np.full(131072, np.nan, np.float32))
    assert one.ids == [] and one.reason is None


def test_each_answer_has_a_stop_flag_of_its_own():
    one, other = answer(), answer()
    one.stop_flag.set()
    assert one.stop_flag.is_set() and not other.stop_flag.is_set()


def test_an_answer_ends_once_and_keeps_its_own_reason():
    one = answer(max_tokens=1)
    one.choose(logits_for(1097))
    assert one.end(2, "interrupted") == [Done("length", one.done.statistics)]
    with pytest.raises(AssertionError):
        one.end(2)


def thought(one, *parts):
    """The ids of an answer whose model would go on thinking for ever."""
    events_of(one, Control.THINK, *parts)
    return one.ids


def test_a_thought_ends_with_the_sentence_in_which_its_budget_does():
    words = ids_of(" one two three. four five. six seven eight. nine")
    ends = [n for n, id in enumerate(words, 1) if tekken().piece(id).endswith(b".")]
    assert len(ends) == 3
    for budget in range(1, ends[-1] + 2):  # the token that opens a thought is one of it
        ids = thought(answer(think_budget=budget), " one two three. four five. six seven eight. nine")
        n = next(n for n in ends if 1 + n >= budget)
        assert ids[: n + 2] == [Control.THINK, *words[:n], Control.THINK_END]


def test_a_thought_without_sentences_ends_soon_after_its_budget():
    for opens, begun in (("text", [Control.THINK]), ("thinking", [])):
        one = answer(opens=opens, think_budget=10)
        events_of(one, *begun, " a" * 100)
        assert one.ids.index(Control.THINK_END) == 10 + SENTENCE and one.ids.count(Control.THINK_END) == 1


def test_a_budget_that_is_not_used_up_changes_nothing():
    parts = Control.THINK, "so.", Control.THINK_END, "a. b. c. d.", Control.EOS
    one = answer(think_budget=5)
    assert text(events_of(one, *parts)) == "a. b. c. d." and one.ids == ids_of(*parts)


def test_a_thought_ends_with_the_sentence_in_which_its_seconds_are_over(monkeypatch):
    now = iter(range(10**6))  # each look at the clock is a second later
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: next(now)))
    words = ids_of(" one two three. four five. six seven eight. nine")
    ends = [n for n, id in enumerate(words, 1) if tekken().piece(id).endswith(b".")]
    for seconds in (0.5, 1, 5, ends[0] + 0.5):
        ids = thought(answer(think_seconds=seconds), " one two three. four five. six seven eight. nine")
        n = next(n for n in ends if n >= seconds)  # the first look is at the first token behind the opening one
        assert ids[: n + 2] == [Control.THINK, *words[:n], Control.THINK_END], seconds
    ids = thought(answer(think_seconds=3), " a" * 100)
    assert ids.index(Control.THINK_END) == 1 + 3 + SENTENCE
    ids = thought(answer(think_seconds=1000, think_budget=2), " one two three. four five.")
    assert ids.index(Control.THINK_END) == 1 + ends[0]
    parts = "no. thought. at. all.", Control.EOS
    assert text(events_of(answer(think_seconds=0.1), *parts)) == parts[0]


def test_the_end_of_a_thought_has_a_log_probability_where_they_are_asked_for():
    one = answer(think_budget=1, logprobs=1)
    events = events_of(one, Control.THINK, ".", "a", "b")
    token = next(e for e in events if isinstance(e, Token) and e.id == Control.THINK_END)
    assert token.logprob <= 0 and one.ids[:3] == [*ids_of(Control.THINK, "."), Control.THINK_END]


def test_a_thought_ends_at_once_where_an_answer_is_wanted_now():
    for budget in (None, 50):
        one = answer(think_budget=budget)
        for id in ids_of(Control.THINK, " a b"):
            one.choose(logits_for(id))
        one.hurried = True
        n = len(one.ids)
        for id in ids_of(" c d", Control.EOS):
            one.choose(logits_for(id))
        assert one.ids[n] == Control.THINK_END and one.ids.count(Control.THINK_END) == 1


def test_hurry_changes_nothing_in_an_answer_without_thoughts():
    one = answer()
    one.hurried = True
    assert text(events_of(one, "a b", Control.EOS)) == "a b"

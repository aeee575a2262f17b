"""The loop: reading the prompt, stop rules, what the session keeps, statistics, Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from standins import ScriptedSession, tekken

from ms4 import ROW, NotFinite, StopFlag
from ms4.models.control import Control
from ms4.models.generate import ContextError, Done, Line, Reading, Token, generate
from ms4.models.interrupt import interruptible
from ms4.models.prompt import Image, Prompt
from ms4.models.sampling import Sampler, SamplingParams
from ms4.models.stream import Text, Thinking, ToolCall


def greedy():
    return Sampler(SamplingParams(temperature=0.0))


def script(*parts):
    return [id for part in parts for id in (tekken().encode(part) if isinstance(part, str) else [int(part)])]


def prompt(text, **more):
    return Prompt([Control.BOS, *tekken().encode(text)], **more)


def events(line, ask="Hi", **options):
    ask = prompt(ask) if isinstance(ask, str) else ask
    return list(generate(line, ask, greedy(), tekken(), **options))


def text(got):
    return "".join(event.text for event in got if isinstance(event, Text))


def test_an_answer_from_beginning_to_end():
    line = Line(ScriptedSession(script(Control.THINK, "so", Control.THINK_END, "Hello 🙂", Control.EOS)))
    got = events(line)
    assert got[0] == Reading(total=2, cached=0)
    assert got[1] == Thinking("so")
    assert text(got) == "Hello 🙂"
    done = got[-1]
    n = len(script("so", "Hello 🙂")) + 3
    s = done.statistics
    assert done.reason == "stop" and done.stop is None
    assert (s.n_prompt, s.n_cached, s.n_written, s.n_thinking) == (2, 0, n, 3)
    # The first token comes out of the prompt, and </s> is never fed.
    assert (s.n_decode, s.n_context, s.n_ctx) == (n - 1, 2 + n - 1, 512)
    assert s.s_prompt > 0 and s.tokens_per_second == pytest.approx(s.n_decode / s.s_decode)
    assert line.session.held == [*prompt("Hi").ids, *line.session.script[:-1]]


@pytest.mark.parametrize(
    "parts, options, reason, want",
    [
        (["abc"], {"max_tokens": 1}, "length", "abc"),
        ([" a b c d"], {"max_tokens": 3}, "length", " a b c"),
        (["a END b", Control.EOS], {"stop": ["END"]}, "stop", "a "),
        (["a", Control.EOS], {"max_tokens": 2}, "stop", "a"),
        (["a E"], {"max_tokens": 2, "stop": ["END"]}, "length", "a E"),
    ],
)
def test_what_ends_an_answer(parts, options, reason, want):
    got = events(Line(ScriptedSession(script(*parts))), **options)
    assert (text(got), got[-1].reason) == (want, reason)
    assert got[-1].stop == ("END" if want == "a " else None)


def test_tool_calls_end_an_answer():
    call = [Control.TOOL_CALLS, "f", Control.ARGS, "{}"]
    got = events(Line(ScriptedSession(script(*call, Control.EOS))))
    assert got[1:-1] == [ToolCall(0, "f", "{}", True)] and got[-1].reason == "tool_calls"
    capped = events(Line(ScriptedSession(script(*call * 9))), max_tool_calls=2)
    assert len(capped) == 4 and capped[-1].reason == "tool_calls"
    cut = events(Line(ScriptedSession(script(*call))), max_tokens=3)
    assert cut[1:-1] == [ToolCall(0, "f", "", False)] and cut[-1].reason == "length"


def test_a_full_context_ends_an_answer():
    session = ScriptedSession(script("a"), n_ctx=6)
    got = events(Line(session))
    # The prompt takes 2 positions, 4 tokens are fed, and the last position still gives one.
    assert got[-1].reason == "context" and got[-1].statistics.n_written == 5
    assert session.length == 6


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed():
    session = ScriptedSession(script("a"), n_ctx=5)
    with pytest.raises(ContextError, match="the prompt has 6 tokens; the context holds 5") as caught:
        generate(Line(session), Prompt([1, *[1097] * 5]), greedy(), tekken())
    assert (caught.value.n_prompt, caught.value.n_ctx) == (6, 5)
    with pytest.raises(ContextError, match="4 tokens and 2 more are asked for; the context holds 5"):
        generate(Line(session), Prompt([1, 1097, 1097, 1097]), greedy(), tekken(), max_tokens=2)
    with pytest.raises(ValueError, match="at least 1"):
        generate(Line(session), Prompt([1]), greedy(), tekken(), max_tokens=0)
    assert session.fed == []


def test_only_what_differs_is_read_again():
    session = ScriptedSession(script("a"))
    line = Line(session)
    events(line, Prompt([1, 1100, 1101, 1102]), max_tokens=2)
    assert session.held == [1, 1100, 1101, 1102, 1097] and line.length == 5
    got = events(line, Prompt([1, 1100, 1101, 1102, 1097, 1200]), max_tokens=1)
    assert got[0] == Reading(6, 5) and session.fed[-1] == [1200]
    got = events(line, Prompt([1, 1100, 1300]), max_tokens=1)
    assert got[0] == Reading(3, 2) and session.fed[-1] == [1300]
    assert got[-1].statistics.n_cached == 2 and session.held == [1, 1100, 1300]
    # The last token is always read, because its logits are wanted.
    assert events(line, Prompt([1, 1100, 1300]), max_tokens=1)[0] == Reading(3, 2)
    assert events(line, Prompt([1, 1100]), max_tokens=1)[0] == Reading(2, 1)
    line.clear()
    assert session.held == [] and line.length == 0
    assert events(line, Prompt([1, 1100]), max_tokens=1)[0] == Reading(2, 0)


def test_a_session_that_was_used_before_is_emptied():
    session = ScriptedSession(script("a"))
    session.feed([5, 6, 7])
    events(Line(session), Prompt([5, 6]), max_tokens=1)
    assert session.held == [5, 6]


def image_prompt(digest, before=2):
    ids = [1] * before + [Control.IMG, Control.IMG, Control.IMG_BREAK, Control.IMG, Control.IMG, Control.IMG_END, 1100]
    return Prompt(ids, (Image(before, 2, 2, digest, {}),))


def test_image_positions_take_rows_and_are_cached_by_content():
    session = ScriptedSession(script("a"))
    line = Line(session)
    rows = np.arange(4, dtype=np.float32)[:, None]
    events(line, image_prompt(b"one"), image_rows=rows, max_tokens=1)
    assert session.fed[-1] == [1, 1, ROW, ROW, Control.IMG_BREAK, ROW, ROW, Control.IMG_END, 1100]
    assert session.rows[-1][:, 0].tolist() == [0, 1, 2, 3]
    again = events(line, image_prompt(b"one"), image_rows=rows, max_tokens=1)
    assert again[0].cached == 8 and session.rows[-1] is None
    other = events(line, image_prompt(b"two"), image_rows=rows, max_tokens=1)
    assert other[0].cached == 2 and len(session.rows[-1]) == 4
    # A cut in the middle of an image: the rows before it are not sent again.
    session.rewind(4)
    del line._keys[4:]
    events(line, image_prompt(b"two"), image_rows=rows, max_tokens=1)
    assert session.rows[-1][:, 0].tolist() == [2, 3]
    with pytest.raises(ValueError, match="4 image positions, but 3 rows"):
        events(line, image_prompt(b"two"), image_rows=rows[:3], max_tokens=1)
    with pytest.raises(ValueError, match="4 image positions, but 0 rows"):
        events(line, image_prompt(b"two"), max_tokens=1)


def test_log_probabilities_come_before_the_text_of_their_token():
    got = events(Line(ScriptedSession(script("a", Control.EOS))), logprobs=2)
    tokens = [event for event in got if isinstance(event, Token)]
    assert [token.id for token in tokens] == [1097, Control.EOS]
    assert got[1] is tokens[0] and got[2] == Text("a")
    assert tokens[0].text == "a" and tokens[1].text == ""
    assert tokens[0].logprob == tokens[0].top[0][1] < 0 and len(tokens[0].top) == 2


def test_what_the_engine_raises_passes_through_and_the_line_stays_usable():
    session = ScriptedSession(script("a", "b", Control.EOS))
    line = Line(session)
    feed, calls = session.feed, []

    def failing(ids, rows=None, **options):
        calls.append(ids)
        if len(calls) == 2:
            raise NotFinite("not finite", -8)
        return feed(ids, rows, **options)

    session.feed = failing
    with pytest.raises(NotFinite):
        events(line)
    assert line.length == session.length == 2
    assert text(events(line)) == "b"


def test_a_logit_that_is_not_finite_is_never_a_token():
    session = ScriptedSession(script("a"))
    session.feed = lambda ids, rows=None, **options: np.full(131072, np.nan, np.float32)
    source = generate(Line(session), prompt("Hi"), greedy(), tekken())
    assert isinstance(next(source), Reading)
    with pytest.raises(NotFinite):
        next(source)


def test_cancel_during_a_feed_keeps_the_partial_answer():
    session = ScriptedSession(script("x" * 100), slow=0.0)
    line = Line(session)
    got, stop = [], StopFlag()
    for event in generate(line, prompt("Hi"), greedy(), tekken(), interrupt=stop):
        got.append(event)
        if isinstance(event, Text) and session.slow == 0:
            session.slow = 30.0
            threading.Timer(0.05, stop.set).start()
    assert got[-1].reason == "interrupted" and text(got) == tekken().text(session.script[:1])
    assert line.length == session.length == 2
    session.slow = 0.0
    assert events(line, max_tokens=1)[-1].reason == "length"


def test_cancel_between_two_feeds_is_not_lost():
    line = Line(ScriptedSession(script("x" * 100)))
    got, stop = [], StopFlag()
    for event in generate(line, prompt("Hi"), greedy(), tekken(), interrupt=stop):
        got.append(event)
        if isinstance(event, Text):
            stop.set()
    assert got[-1].reason == "interrupted" and got[-1].statistics.n_written == 1


def interrupt_after(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.mark.timeout(60)
def test_ctrl_c_ends_a_running_feed_and_keeps_the_answer():
    before = signal.getsignal(signal.SIGINT)
    session = ScriptedSession(script("a"), slow=600.0)
    line = Line(session)
    stop = StopFlag()
    with interruptible(stop) as interrupt:
        interrupt_after(0.05)
        got = events(line, interrupt=stop)
        assert interrupt.hit
    assert [type(event) for event in got] == [Reading, Done] and got[-1].reason == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_twice_leaves():
    with pytest.raises(KeyboardInterrupt), interruptible(StopFlag()):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        pytest.fail("still here")


def test_without_ctrl_c_nothing_is_canceled():
    line = Line(ScriptedSession(script("a", Control.EOS)))
    stop = StopFlag()
    with interruptible(stop) as interrupt:
        assert events(line, interrupt=stop)[-1].reason == "stop"
    assert not interrupt.hit and not stop.is_set()
    assert threading.active_count() == len([t for t in threading.enumerate() if t.name != "interrupt"])


BLOCKED = """
import ctypes, sys, threading, time
from ms4.models.interrupt import interruptible

class Line:
    def __init__(self):
        self.read, self.write = __import__("os").pipe()
    def set(self):
        __import__("os").write(self.write, b"x")

line = Line()
libc = ctypes.CDLL(None)
with interruptible(line) as interrupt:
    print("ready", flush=True)
    # One call into C that no Python signal handler can end, as a feed is; only set() does.
    got = ctypes.create_string_buffer(1)
    while libc.read(line.read, got, 1) != 1:
        pass
sys.exit(42 if interrupt.hit else 1)
"""


def test_ctrl_c_reaches_a_call_into_c():
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 42
    process.stdout.close()

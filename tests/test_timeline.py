"""A session and the keys of what it holds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from standins import ScriptedSession

from ms4.models.control import Control
from ms4.models.prompt import ImagePlace, Prompt
from ms4.models.timeline import Timeline, common_prefix


def filled(ids, n_ctx=4096):
    timeline = Timeline(ScriptedSession(n_ctx))
    if ids:
        timeline.session.feed(ids)
    timeline.append(np.array(ids, np.int64))
    return timeline


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_the_common_prefix_is_the_longest(one, other):
    n = common_prefix(np.array(one, np.int64), np.array(other, np.int64))
    assert one[:n] == other[:n] and (n == min(len(one), len(other)) or one[n] != other[n])
    assert filled(one).common(np.array(other, np.int64)) == n


def test_keys_are_appended_and_rewound():
    timeline = filled([1, 2, 3])
    for id in range(2000):
        timeline.session.feed([id])
        timeline.append(np.array([id]))
    assert timeline.length == timeline.session.length == 2003
    assert timeline.keys.tolist() == timeline.session.held
    timeline.rewind(5)
    assert timeline.keys.tolist() == timeline.session.held == [1, 2, 3, 0, 1]


def test_a_fork_holds_the_beginning_of_another_and_goes_its_own_way():
    one, other = filled(list(range(300))), filled([7, 8])
    other.fork(one, 200)
    assert other.keys.tolist() == other.session.held == list(range(200))
    other.rewind(199)
    assert one.length == one.session.length == 300


def test_a_session_that_was_used_before_is_emptied():
    session = ScriptedSession()
    session.feed([5, 6, 7])
    assert Timeline(session).length == session.length == 0


def test_the_keys_of_a_prompt_are_computed_once():
    prompt = Prompt([1, *[Control.IMG] * 2, Control.IMG_END, 1100], (ImagePlace(1, 2, 1, b"one", {}),))
    assert prompt.keys is prompt.keys and prompt.tokens is prompt.tokens
    assert prompt.tokens.tolist() == [1, -1, -1, Control.IMG_END, 1100] and prompt.tokens.dtype == np.int32
    assert (
        prompt.keys[1] < 0
        and prompt.keys[2] == prompt.keys[1] - 1
        and prompt.keys[[0, 3, 4]].tolist()
        == [
            1,
            Control.IMG_END,
            1100,
        ]
    )

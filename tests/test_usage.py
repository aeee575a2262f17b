"""Answers in the shapes of OpenAI's chat completions."""

from ms4.models.answer import Statistics, Token
from ms4.models.answer_parser import ToolCall
from ms4.models.usage import choice, message, timings, usage


def test_usage_and_timings_by_hand():
    s = Statistics(
        n_prompt=100, n_cached=60, n_answer=21, n_thinking=5, s_prefill=0.5, s_decode=4.0, n_decode=20, n_context=120,
        n_ctx=512,
    )  # fmt: skip
    assert usage(s) == {
        "prompt_tokens": 100,
        "completion_tokens": 21,
        "total_tokens": 121,
        "prompt_tokens_details": {"cached_tokens": 60},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    assert timings(s) == {
        "prompt_n": 40,
        "prompt_ms": 500.0,
        "prompt_per_second": 80.0,
        "predicted_n": 21,
        "predicted_ms": 4000.0,
        "predicted_per_second": 5.0,
    }
    nothing = Statistics(5, 0, 0, 0, 0.0, 0.0, 0, 0, 9)
    assert timings(nothing)["prompt_per_second"] == timings(nothing)["predicted_per_second"] == 0


def test_a_message_has_only_what_was_said():
    assert message("Hi") == {"role": "assistant", "content": "Hi"}
    said = message("", "hm", [ToolCall(0, "f", "{}", True)])
    assert said["reasoning_content"] == "hm"
    (call,) = said["tool_calls"]
    assert call == {"id": call["id"], "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_tokens_are_there_where_they_were_asked_for():
    said = message("a")
    assert choice(said, "stop") == {"index": 0, "finish_reason": "stop", "message": said}
    (token,) = choice(said, "stop", [Token(1097, b"a", -0.5, ((1097, -0.5, b"a"), (7, -2.0, b"\xc3")))])["logprobs"][
        "content"
    ]
    assert token == {
        "id": 1097,
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"id": 1097, "token": "a", "logprob": -0.5, "bytes": [97]},
            {"id": 7, "token": "\ufffd", "logprob": -2.0, "bytes": [195]},
        ],
    }

"""What an answer is and cost, in the shapes of OpenAI's chat completions, as dicts ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ms4.models.answer import Statistics, Token, text_of
from ms4.models.answer_parser import ToolCall


def usage(s: Statistics) -> dict[str, Any]:
    return {
        "prompt_tokens": s.n_prompt,
        "completion_tokens": s.n_answer,
        "total_tokens": s.n_prompt + s.n_answer,
        "prompt_tokens_details": {"cached_tokens": s.n_cached},
        "completion_tokens_details": {"reasoning_tokens": s.n_thinking},
    }


def timings(s: Statistics) -> dict[str, Any]:
    return {
        "prompt_n": s.n_prompt - s.n_cached,
        "prompt_ms": round(1000 * s.s_prefill, 1),
        "prompt_per_second": round(s.prefill_per_second, 2),
        "predicted_n": s.n_answer,
        "predicted_ms": round(1000 * s.s_decode, 1),
        "predicted_per_second": round(s.decode_per_second, 2),
    }


def token_logprob(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.piece),
        "top_logprobs": [
            {"id": id, "token": text_of(piece), "logprob": logprob, "bytes": list(piece)}
            for id, logprob, piece in token.top
        ],
    }


def message(text: str, thinking: str = "", calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
    """What the assistant said."""
    value: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking:
        value["reasoning_content"] = thinking
    if calls:
        value["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return value


def choice(said: dict[str, Any], reason: str, tokens: Sequence[Token] = ()) -> dict[str, Any]:
    """The only choice of a completion: a message, why it ended, and its tokens where they were asked for."""
    value: dict[str, Any] = {"index": 0, "finish_reason": reason, "message": said}
    if tokens:
        value["logprobs"] = {"content": [token_logprob(token) for token in tokens]}
    return value

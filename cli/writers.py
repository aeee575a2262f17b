"""The forms in which `ms4 run` gives its answer: text, one JSON object, or one JSON event a line."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any, Protocol

from ms4.cli import render, streams
from ms4.models.generate import Done, Event, Reading, Statistics, Token
from ms4.models.stream import Text, Thinking, ToolCall


@dataclass(frozen=True)
class About:
    """What a result says about itself besides the answer."""

    model: str
    version: str
    effort: str
    seed: int
    prefill: str
    load_ms: int
    images: list[dict[str, Any]] = field(default_factory=list)


class Writer(Protocol):
    def event(self, event: Event) -> None: ...

    def done(self, done: Done, code: int) -> None: ...

    def failed(self, code: int, message: str, hint: str) -> None: ...


class TextWriter:
    """Only the answer; on a terminal the thoughts too, dimmed, unless they are hidden."""

    def __init__(self, output: streams.Output, think: str, prefill: str) -> None:
        self.screen = render.Screen(output)
        self._on_screen = output.terminal and think != "hide"
        self._beside = not output.terminal and think == "show"  # to stderr: stdout is for the answer
        self._open_line = False  # a thought was the last thing on stderr
        if prefill:
            self.screen.text(prefill)

    def event(self, event: Event) -> None:
        if isinstance(event, Text):
            self.screen.text(event.text)
        elif isinstance(event, Thinking) and self._on_screen:
            self.screen.thinking(event.text)
        elif isinstance(event, Thinking) and self._beside:
            sys.stderr.write(streams.printable(event.text))
            sys.stderr.flush()
            self._open_line = not event.text.endswith("\n")

    def done(self, done: Done, code: int) -> None:
        self._end()

    def failed(self, code: int, message: str, hint: str) -> None:
        self._end()

    def _end(self) -> None:
        if self._open_line:
            sys.stderr.write("\n")
        self._open_line = False
        self.screen.end()


@dataclass
class JsonWriter:
    """One object at the end, in the shape of an OpenAI chat completion."""

    output: streams.Output
    about: About
    text: str = ""
    thinking: str = ""
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    tokens: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text = self.about.prefill

    def event(self, event: Event) -> None:
        if isinstance(event, Text):
            self.text += event.text
        elif isinstance(event, Thinking):
            self.thinking += event.text
        elif isinstance(event, ToolCall):
            self.calls[event.index] = {"name": event.name, "arguments": event.arguments}
        elif isinstance(event, Token):
            self.tokens.append(token(event))

    def done(self, done: Done, code: int) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in self.calls.values()]
        choice = {"index": 0, "finish_reason": done.reason, "message": message}
        if self.tokens:
            choice["logprobs"] = {"content": self.tokens}
        about = {"version": self.about.version, "effort": self.about.effort, "seed": self.about.seed, "exit": code}
        if self.about.images:
            about["images"] = self.about.images
        write_json(
            self.output,
            {
                "object": "chat.completion",
                "model": self.about.model,
                "choices": [choice],
                "usage": usage(done.statistics),
                "timings": {"load_ms": self.about.load_ms, **timings(done.statistics)},
                "ms4": about,
            },
        )

    def failed(self, code: int, message: str, hint: str) -> None:
        """Nothing: the error is on stderr, and half an object is no object."""


class JsonlWriter:
    """One event a line, as it happens."""

    def __init__(self, output: streams.Output, about: About) -> None:
        self.output = output
        images = {"images": about.images} if about.images else {}
        self._put("start", model=about.model, version=about.version, effort=about.effort, seed=about.seed, **images)
        self._put("load", ms=about.load_ms)
        if about.prefill:
            self._put("text", text=about.prefill)

    def _put(self, event_name: str, /, **fields: Any) -> None:
        write_json(self.output, {"event": event_name, **fields})

    def event(self, event: Event) -> None:
        if isinstance(event, Reading):
            self._put("prefill", total=event.total, cache=event.cached)
        elif isinstance(event, Thinking):
            self._put("thinking", text=event.text)
        elif isinstance(event, Text):
            self._put("text", text=event.text)
        elif isinstance(event, Token):
            self._put("token", **token(event))
        elif isinstance(event, ToolCall):
            self._put(
                "tool_call",
                index=event.index,
                name=event.name,
                arguments=event.arguments,
                complete=event.complete,
            )

    def done(self, done: Done, code: int) -> None:
        self._put(
            "done", finish_reason=done.reason, usage=usage(done.statistics), timings=timings(done.statistics), exit=code
        )

    def failed(self, code: int, message: str, hint: str) -> None:
        self._put("error", code=code, message=message, hint=hint)


def write_json(output: streams.Output, value: dict[str, Any]) -> None:
    output.write(json.dumps(value, ensure_ascii=False) + "\n")


def token(event: Token) -> dict[str, Any]:
    return {
        "id": event.id,
        "token": event.text,
        "logprob": event.logprob,
        "top_logprobs": [{"id": id, "logprob": logprob} for id, logprob in event.top],
    }


def usage(s: Statistics) -> dict[str, Any]:
    return {
        "prompt_tokens": s.n_prompt,
        "completion_tokens": s.n_written,
        "total_tokens": s.n_prompt + s.n_written,
        "prompt_tokens_details": {"cached_tokens": s.n_cached},
        "completion_tokens_details": {"reasoning_tokens": s.n_thinking},
    }


def timings(s: Statistics) -> dict[str, Any]:
    read = s.n_prompt - s.n_cached
    return {
        "prompt_n": read,
        "prompt_ms": round(1000 * s.s_prompt, 1),
        "prompt_per_second": round(render.rate(read, s.s_prompt), 2),
        "predicted_n": s.n_written,
        "predicted_ms": round(1000 * s.s_decode, 1),
        "predicted_per_second": round(s.tokens_per_second, 2),
    }

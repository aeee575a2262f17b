"""The forms in which `ms4 run` gives its answer: text, one JSON object, or one JSON event a line."""

import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Protocol

from ms4.cli import errors, render, streams
from ms4.models import usage
from ms4.models.answer import Done, Event, Prefill, Token
from ms4.models.answer_parser import Text, Thinking, ToolCall
from ms4.quant import visible


@dataclass(frozen=True)
class About:
    """What a result says about itself besides the answer."""

    model: str
    version: str
    effort: str
    seed: int
    prefill: str
    load_ms: int | None  # None: not loaded yet
    images: list[dict[str, Any]] = field(default_factory=list)


class Writer(Protocol):
    output: streams.Output

    @property
    def hides_thoughts(self) -> bool:
        """True if a thought changes nothing that a person sees, and a status would stand on no text of the answer."""

    def event(self, event: Event) -> None: ...

    def done(self, done: Done, code: int) -> None: ...

    def failed(self, code: int, message: str, hint: str) -> None: ...


class Continuation:
    """The answer after a prefill.

    The model continues a prefill without the blanks at its end, as it was trained, and writes those itself.  They are
    in the prefill that is shown already, so as many are left out where its text begins.
    """

    def __init__(self, prefill: str) -> None:
        self._blanks = len(prefill) - len(prefill.rstrip(" "))

    def event(self, event: Event) -> Event | None:
        """The event as it is to be written; None if nothing is left of it."""
        if not self._blanks or not isinstance(event, (Text, Thinking, ToolCall)):
            return event
        if not isinstance(event, Text):
            self._blanks = 0
            return event
        text = event.text.lstrip(" ")
        n = min(self._blanks, len(event.text) - len(text))
        self._blanks = 0 if text else self._blanks - n
        return Text(event.text[n:]) if event.text[n:] else None


class TextWriter:
    """Only the answer; on a terminal the thoughts too, dimmed, unless they are hidden."""

    def __init__(self, output: streams.Output, think: str, prefill: str, markdown: bool = True) -> None:
        self.output = output
        self.screen = render.Screen(output, markdown)
        self._on_screen = output.terminal and think != "hide"
        self._beside = not output.terminal and think == "show"  # to stderr: stdout is for the answer
        self._open_line = False  # a thought was the last thing on stderr
        self.hides_thoughts = not self._on_screen and not self._beside and not (output.terminal and prefill)
        self._prefill = prefill  # until it is written: a status would wipe it away

    def _begin(self) -> None:
        if self._prefill:
            self.screen.begin(self._prefill)
        self._prefill = ""

    def event(self, event: Event) -> None:
        if isinstance(event, Prefill):
            return
        self._begin()
        if isinstance(event, Text):
            self.screen.text(event.text)
        elif isinstance(event, Thinking) and self._on_screen:
            self.screen.thinking(event.text)
        elif isinstance(event, Thinking) and self._beside:
            sys.stderr.write(visible.text(event.text))
            sys.stderr.flush()
            self._open_line = not event.text.endswith("\n")

    def done(self, done: Done, code: int) -> None:
        self._begin()
        self._end()

    def failed(self, code: int, message: str, hint: str) -> None:
        self._end()

    def _end(self) -> None:
        if self._open_line:
            sys.stderr.write("\n")
        self._open_line = False
        self.screen.end()


class BlockWriter(TextWriter):
    """Only the last block of code of the answer, when it is complete; the whole answer, if it has none."""

    def __init__(self, output: streams.Output, think: str, prefill: str) -> None:
        super().__init__(output, think, "", False)
        self._answer = prefill

    def event(self, event: Event) -> None:
        if isinstance(event, Text):
            self._answer += event.text
        else:
            super().event(event)

    def done(self, done: Done, code: int) -> None:
        block = last_block(self._answer)
        if block is None:
            errors.note("the answer has no block of code; this is all of it")
        self.screen.text(self._answer if block is None else block)
        super().done(done, code)


FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[^`\n]*")


def last_block(text: str) -> str | None:
    """What stands in the last fenced block of a Markdown text, which its end may close; None if there is none."""
    found: str | None = None
    fence = ""
    lines: list[str] = []
    for line in text.split("\n"):
        match = FENCE.fullmatch(line.rstrip("\r"))
        if not fence and match:
            fence, lines = match[1], []
        elif fence and match and match[0].strip() == match[1] and match[1].startswith(fence):
            found, fence = "\n".join(lines), ""
        elif fence:
            lines.append(line)
    return "\n".join(lines) if fence else found


@dataclass
class JsonWriter:
    """One object at the end, in the shape of an OpenAI chat completion."""

    output: streams.Output
    about: About
    text: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    hides_thoughts: bool = True

    def __post_init__(self) -> None:
        self.text = self.about.prefill

    def event(self, event: Event) -> None:
        if isinstance(event, Text):
            self.text += event.text
        elif isinstance(event, Thinking):
            self.thinking += event.text
        elif isinstance(event, ToolCall):
            self.calls.append(event)
        elif isinstance(event, Token):
            self.tokens.append(event)

    def done(self, done: Done, code: int) -> None:
        message = usage.message(self.text, self.thinking, self.calls)
        about = {"version": self.about.version, "effort": self.about.effort, "seed": self.about.seed, "exit": code}
        if self.about.images:
            about["images"] = self.about.images
        write_json(
            self.output,
            {
                "object": "chat.completion",
                "model": self.about.model,
                "choices": [usage.choice(message, done.reason, self.tokens)],
                "usage": usage.usage(done.statistics),
                "timings": {"load_ms": self.about.load_ms, **usage.timings(done.statistics)},
                "ms4": about,
            },
        )

    def failed(self, code: int, message: str, hint: str) -> None:
        """Nothing: the error is on stderr, and half an object is no object."""


class JsonlWriter:
    """One event a line, as it happens."""

    hides_thoughts = False

    def __init__(self, output: streams.Output, about: About) -> None:
        self.output = output
        images = {"images": about.images} if about.images else {}
        self._put("start", model=about.model, version=about.version, effort=about.effort, seed=about.seed, **images)
        if about.load_ms is not None:
            self._put("load", ms=about.load_ms)
        if about.prefill:
            self._put("text", text=about.prefill)

    def _put(self, event_name: str, /, **fields: Any) -> None:
        write_json(self.output, {"event": event_name, **fields})

    def event(self, event: Event) -> None:
        if isinstance(event, Prefill):
            self._put("prefill", total=event.total, cache=event.cached)
        elif isinstance(event, Thinking):
            self._put("thinking", text=event.text)
        elif isinstance(event, Text):
            self._put("text", text=event.text)
        elif isinstance(event, Token):
            self._put("token", **usage.token_logprob(event))
        elif isinstance(event, ToolCall):
            self._put(
                "tool_call",
                index=event.index,
                id=event.id,
                name=event.name,
                arguments=event.arguments,
                complete=event.complete,
            )

    def done(self, done: Done, code: int) -> None:
        s = done.statistics
        self._put("done", finish_reason=done.reason, usage=usage.usage(s), timings=usage.timings(s), exit=code)

    def failed(self, code: int, message: str, hint: str) -> None:
        self._put("error", code=code, message=message, hint=hint)


def write_json(output: streams.Output, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    output.write((visible.json(text) if output.terminal else text) + "\n")

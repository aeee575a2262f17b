"""Generated ids to thinking, answer text and tool calls, split by token id and never by what the text spells."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from ms4.models.control import Control
from ms4.models.tokenizer import StreamDecoder, Tokenizer

MAX_TOOL_CALLS = 32  # per answer; models have been seen to repeat one call without end


@dataclass(frozen=True)
class Thinking:
    """A piece of a thought."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


def call_id() -> str:
    """Nine letters and digits, as the chat format of the model's family has them."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class ToolCall:
    """One call, when it has ended.  `complete`: it was not cut off, and its arguments are JSON."""

    index: int
    name: str
    arguments: str
    complete: bool
    id: str = field(default_factory=call_id, compare=False)  # what its result will name


Piece = Thinking | Text | ToolCall


class AnswerParser:
    """The state of one answer.  `ended` says why there is no more to come: "eos", "stop" or "tool_calls"."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        max_tool_calls: int = MAX_TOOL_CALLS,
        opens: str = "text",
    ) -> None:
        if isinstance(stop, str) or not all(stop):
            raise ValueError("stop is a list of strings, none of them empty")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._max_tool_calls = max_tool_calls
        self._inside = opens  # "text", "thinking", "name" or "arguments"
        self._decoder = StreamDecoder()
        self._held = ""  # answer text that may turn out to begin a stop string, or to be only space before a call
        self._blank = True  # nothing but space in this stretch of answer text so far
        self._name: list[str] = []
        self._arguments: list[str] = []
        self.ended: str | None = None
        self.stop_hit: str | None = None
        self.n_thinking = 0  # tokens, those that open and close a thought included
        self.n_tool_calls = 0

    @property
    def thinking(self) -> bool:
        """True between the tokens that open and close a thought; the one that closes it still belongs to it."""
        return self._inside == "thinking"

    def feed(self, id: int) -> list[Piece]:
        """What the next token adds.  Nothing may be fed once `ended` is set."""
        if id == Control.THINK or self._inside == "thinking":
            self.n_thinking += 1
        if id in (Control.EOS, Control.THINK, Control.THINK_END, Control.TOOL_CALLS, Control.ARGS):
            return self._turn(id)
        return self._add(self._decoder.feed(self._tokenizer.piece(id)))

    def close(self) -> list[Piece]:
        """What was held back, when the answer breaks off.  An open call is reported as incomplete."""
        events = self._leave()
        if self._inside in ("name", "arguments"):
            events.append(self._call(cut=True))
        self._inside = "text"
        return events

    def _turn(self, id: int) -> list[Piece]:
        """A token that ends one kind of text and begins another."""
        if id == Control.ARGS:
            if self._inside != "name":
                return []
            events = self._leave()
            self._inside = "arguments"
            return events
        if id == Control.THINK_END and self._inside != "thinking":
            return []
        events = self._leave(before_more=id in (Control.TOOL_CALLS, Control.THINK))
        if self.ended:
            return events
        if self._inside in ("name", "arguments"):
            events.append(self._call(cut=self._inside == "name"))
        self._inside = "thinking" if id == Control.THINK else "text"
        if id == Control.EOS:
            self.ended = "eos"
        elif id == Control.TOOL_CALLS:
            if self.n_tool_calls >= self._max_tool_calls:
                self.ended = "tool_calls"
            else:
                self._inside = "name"
        return events

    def _leave(self, before_more: bool = False) -> list[Piece]:
        """Ends the text at hand.  Space alone before a call or a thought is dropped."""
        events = self._add(self._decoder.flush())
        if self._inside == "text" and not self.ended:
            if self._held and not (before_more and self._blank):
                events.append(Text(self._held))
            self._held, self._blank = "", True
        return events

    def _add(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._inside == "thinking":
            return [Thinking(text)]
        if self._inside == "name":
            self._name.append(text)
            return []
        if self._inside == "arguments":
            self._arguments.append(text)
            return []
        return self._answer(text)

    def _answer(self, text: str) -> list[Piece]:
        """Answer text, less what must wait: the longest end of it that begins a stop string."""
        text = self._held + text
        self._held = ""
        hits = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if hits:
            at, self.stop_hit = min(hits)
            self.ended = "stop"
            return [Text(text[:at])] if at else []
        self._blank = self._blank and text.isspace()
        keep = len(text) if self._blank else max((overlap(text, stop) for stop in self._stop), default=0)
        ready, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return [Text(ready)] if ready else []

    def _call(self, cut: bool) -> ToolCall:
        name, arguments = "".join(self._name).strip(), "".join(self._arguments)
        self._name, self._arguments = [], []
        self.n_tool_calls += 1
        return ToolCall(self.n_tool_calls - 1, name, arguments, not cut and bool(name) and is_json(arguments))


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin `stop`, all of it excluded."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True

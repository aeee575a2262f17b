"""One answer: reads the prompt, then decodes token by token until something ends it.

A `Line` is a session together with what it holds, so that the next prompt re-reads only what differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ms4 import ROW, Canceled, StopFlag
from ms4.models.prompt import Prompt
from ms4.models.sampling import Choice, Sampler
from ms4.models.stream import MAX_TOOL_CALLS, Splitter, Text, Thinking, ToolCall
from ms4.models.tokenizer import Tokenizer


class ContextError(ValueError):
    """The prompt, or the prompt and the answer asked for, do not fit into the context."""

    def __init__(self, n_prompt: int, n_ctx: int, max_tokens: int | None = None) -> None:
        self.n_prompt, self.n_ctx, self.max_tokens = n_prompt, n_ctx, max_tokens
        more = "" if max_tokens is None else f" and {max_tokens} more are asked for"
        super().__init__(f"the prompt has {n_prompt} tokens{more}; the context holds {n_ctx}")


class Session(Protocol):
    """What generation needs of `ms4.Session`."""

    n_ctx: int

    @property
    def length(self) -> int: ...
    def feed(self, ids: np.ndarray, rows: np.ndarray | None = None, *, stop: StopFlag | None = None) -> np.ndarray: ...
    def rewind(self, length: int) -> None: ...


@dataclass(frozen=True)
class Reading:
    """Before the prompt is read: its length, and how much of it the session holds already."""

    total: int
    cached: int


@dataclass(frozen=True)
class Token:
    """A chosen token, where log-probabilities were asked for."""

    id: int
    text: str  # with U+FFFD where a character is spread over several tokens
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Statistics:
    n_prompt: int
    n_cached: int
    n_written: int
    n_thinking: int
    s_prompt: float
    s_decode: float
    n_decode: int  # tokens computed one by one: the first token of an answer comes out of the prompt
    n_context: int
    n_ctx: int

    @property
    def tokens_per_second(self) -> float:
        return self.n_decode / self.s_decode if self.s_decode > 0 else 0.0


@dataclass(frozen=True)
class Done:
    """Always the last event; reason is "stop", "length", "tool_calls", "context" or "interrupted"."""

    reason: str
    statistics: Statistics
    stop: str | None = None  # the stop string that ended it


Event = Reading | Token | Thinking | Text | ToolCall | Done


class Line:
    """A session and the keys of the positions that it holds."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.n_ctx = session.n_ctx
        self._keys: list[int] = []

    @property
    def length(self) -> int:
        return len(self._keys)

    def clear(self) -> None:
        self._rewind(0)

    def cached(self, prompt: Prompt) -> int:
        """How many positions of a prompt need not be read again; never all, for the last one gives the logits."""
        n = min(len(prompt.ids) - 1, len(self._keys))
        differ = np.flatnonzero(prompt.keys[:n] != np.array(self._keys[:n], np.int64))
        return int(differ[0]) if len(differ) else n

    def read(self, prompt: Prompt, image_rows: np.ndarray | None = None, stop: StopFlag | None = None) -> np.ndarray:
        """Makes the session hold the prompt; the logits after its last position.

        image_rows: what the projector gave for all images of the prompt, one row per [IMG] token.
        """
        places = prompt.rows
        ids = np.array(prompt.ids, np.int32)
        if len(places) != (0 if image_rows is None else len(image_rows)):
            n_rows = 0 if image_rows is None else len(image_rows)
            raise ValueError(f"the prompt has {len(places)} image positions, but {n_rows} rows came with it")
        ids[places] = ROW
        start = self.cached(prompt)
        rows = None if image_rows is None else image_rows[int(np.searchsorted(places, start)) :]
        self._rewind(start)
        logits = self.session.feed(ids[start:], rows if rows is not None and len(rows) else None, stop=stop)
        self._keys = prompt.keys.tolist()
        return logits

    def step(self, id: int, stop: StopFlag | None = None) -> np.ndarray:
        """Appends one token; the logits after it."""
        logits = self.session.feed(np.array([id], np.int32), stop=stop)
        self._keys.append(id)
        return logits

    def _rewind(self, length: int) -> None:
        if length != self.session.length:
            self.session.rewind(length)
        del self._keys[length:]


class Clock:
    """Adds up the time of some calls, and leaves out what happens between them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.n = 0

    def __call__(self, work: Callable[[], np.ndarray]) -> np.ndarray:
        start = time.perf_counter()
        try:
            result = work()
        finally:
            self.seconds += time.perf_counter() - start
        self.n += 1
        return result


def generate(
    line: Line,
    prompt: Prompt,
    sampler: Sampler,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    max_tool_calls: int = MAX_TOOL_CALLS,
    image_rows: np.ndarray | None = None,
    interrupt: StopFlag | None = None,
) -> Iterator[Event]:
    """The events of one answer.  A prompt that does not fit raises ContextError before anything is computed.

    logprobs: with every token its log-probability and those of so many of the most likely.  What the engine and the
    sampler raise passes through, but once `interrupt` is set it ends in Done("interrupted").
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError("max_tokens is at least 1")
    n_prompt = len(prompt.ids)
    if n_prompt + (max_tokens or 1) > line.n_ctx:
        raise ContextError(n_prompt, line.n_ctx, max_tokens)
    splitter = Splitter(tokenizer, stop=stop, max_tool_calls=max_tool_calls, opens=prompt.opens)
    return _events(line, prompt, sampler, tokenizer, splitter, max_tokens, logprobs, image_rows, interrupt)


def _events(
    line: Line,
    prompt: Prompt,
    sampler: Sampler,
    tokenizer: Tokenizer,
    splitter: Splitter,
    max_tokens: int | None,
    logprobs: int | None,
    image_rows: np.ndarray | None,
    interrupt: StopFlag | None,
) -> Iterator[Event]:
    n_cached, n_written = line.cached(prompt), 0
    reading, decoding = Clock(), Clock()
    yield Reading(len(prompt.ids), n_cached)
    reason = "interrupted"
    try:
        logits = reading(lambda: line.read(prompt, image_rows, interrupt))
        while True:
            choice = sampler.pick(logits, logprobs)
            n_written += 1
            if logprobs is not None:
                yield as_token(choice, tokenizer)
            yield from splitter.feed(choice.id)
            if ended := ending(splitter, n_written, max_tokens, line):
                reason = ended
                break
            logits = decoding(lambda id=choice.id: line.step(id, interrupt))  # type: ignore[misc]
    except Canceled:
        pass
    yield from splitter.close()
    statistics = Statistics(
        n_prompt=len(prompt.ids),
        n_cached=n_cached,
        n_written=n_written,
        n_thinking=splitter.n_thinking,
        s_prompt=reading.seconds,
        s_decode=decoding.seconds,
        n_decode=decoding.n,
        n_context=line.length,
        n_ctx=line.n_ctx,
    )
    yield Done(reason, statistics, splitter.stop_hit)


def ending(splitter: Splitter, n_written: int, max_tokens: int | None, line: Line) -> str | None:
    """Why there is no next token; None if there is one."""
    if splitter.ended:
        return "tool_calls" if splitter.n_tool_calls and splitter.ended != "stop" else "stop"
    if max_tokens is not None and n_written >= max_tokens:
        return "length"
    return "context" if line.length >= line.n_ctx else None


def as_token(choice: Choice, tokenizer: Tokenizer) -> Token:
    text = tokenizer.piece(choice.id).decode("utf-8", "replace")
    return Token(choice.id, text, choice.logprob, choice.top)

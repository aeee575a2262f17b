"""The state of one answer: logits (or ids) go in, events come out.

An `Answer` knows no session and no engine: it chooses tokens, takes them apart, and decides when there is no next one.
Who computes the logits is the business of `scheduler.py`.  Its stop flag is made with it and never lowered, so that a
stop holds whenever it comes: before the prompt is read, during a step, between two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ms4 import Highest, StopFlag
from ms4.models.answer_parser import MAX_TOOL_CALLS, AnswerParser, Text, Thinking, ToolCall
from ms4.models.constraint import Constraint
from ms4.models.control import Control
from ms4.models.prompt import Prompt
from ms4.models.sampling import Choice, Sampler, described
from ms4.models.tokenizer import Tokenizer

SENTENCE = 48  # tokens that a thought may have to come to the end of a sentence
ENDS = (b".", b"!", b"?", b"\n", "。".encode(), "！".encode(), "？".encode())  # of a sentence or a line


class ContextError(ValueError):
    """The prompt, or the prompt and the answer asked for, do not fit into the context."""

    def __init__(self, n_prompt: int, n_ctx: int, max_tokens: int | None = None) -> None:
        self.n_prompt, self.n_ctx, self.max_tokens = n_prompt, n_ctx, max_tokens
        more = "" if max_tokens is None else f" and {max_tokens} more are asked for"
        super().__init__(f"the prompt has {n_prompt} tokens{more}; the context holds {n_ctx}")


@dataclass(frozen=True)
class Prefill:
    """Before the prompt is computed: its length, and how much of it is there already."""

    total: int
    cached: int


@dataclass(frozen=True)
class Note:
    """What a person should know about how the answer is computed, in one line; it does not change the answer."""

    text: str


@dataclass(frozen=True)
class Token:
    """A chosen token, where log-probabilities were asked for."""

    id: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, float, bytes], ...]  # (id, log-probability, bytes)

    @property
    def text(self) -> str:
        return text_of(self.piece)


def text_of(piece: bytes) -> str:
    """The text of one token alone, with U+FFFD where a character is spread over several tokens."""
    return piece.decode("utf-8", "replace")


@dataclass(frozen=True)
class Statistics:
    """What an answer took.  The seconds are those of the steps of the engine that it had a part in."""

    n_prompt: int
    n_cached: int
    n_answer: int
    n_thinking: int
    s_prefill: float
    s_decode: float
    n_decode: int  # tokens computed one by one: the first token of an answer comes out of the prompt
    n_context: int
    n_ctx: int

    @property
    def prefill_per_second(self) -> float:
        return (self.n_prompt - self.n_cached) / self.s_prefill if self.s_prefill > 0 else 0.0

    @property
    def decode_per_second(self) -> float:
        return self.n_decode / self.s_decode if self.s_decode > 0 else 0.0


@dataclass(frozen=True)
class Done:
    """Always the last event; reason is "stop", "length", "tool_calls", "context" or "interrupted"."""

    reason: str
    statistics: Statistics
    stop: str | None = None  # the stop string that ended it


Event = Prefill | Note | Token | Thinking | Text | ToolCall | Done


class Answer:
    """One answer to a prompt, in a context of n_ctx positions.  One that does not fit raises ContextError.

    logprobs: with every token its log-probability and those of so many of the most likely.  The ids of the tokens cost
    nothing: they are in `ids`.  constraint: which tokens of its text may come.  think_budget: after so many tokens of
    thought, the next sentence or line that ends is the last of it, and SENTENCE tokens later any word is.
    think_seconds: the budget is used up so long after the first token of thought.  stop_flag: ends the answer; else it
    has one of its own.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampler: Sampler,
        tokenizer: Tokenizer,
        n_ctx: int,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        max_tool_calls: int = MAX_TOOL_CALLS,
        constraint: Constraint | None = None,
        think_budget: int | None = None,
        think_seconds: float | None = None,
        stop_flag: StopFlag | None = None,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError("max_tokens is at least 1")
        n_prompt = len(prompt.ids)
        if n_prompt + (max_tokens or 1) > n_ctx:  # the one place that asks whether it fits
            raise ContextError(n_prompt, n_ctx, max_tokens)
        self.prompt = prompt
        self.n_ctx = n_ctx
        self.stop_flag = StopFlag() if stop_flag is None else stop_flag
        self.hurried = False  # a thought ends now, whatever its budget; may be set from any thread
        self.ids: list[int] = []  # of all chosen tokens, the one that ends the answer included
        self.reason: str | None = None  # why there is no next token
        self.done: Done | None = None
        self.n_cached = 0
        self.n_decode = 0
        self.s_prefill = 0.0
        self.s_decode = 0.0
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._logprobs = logprobs
        self._constraint = constraint
        self._think_budget = think_budget
        self._think_seconds = think_seconds
        self._thinks_until: float | None = None  # of time.monotonic
        self._parser = AnswerParser(tokenizer, stop=stop, max_tool_calls=max_tool_calls, opens=prompt.opens)

    @property
    def n_among(self) -> int:
        """So many ids may come: what only fills up the vocabulary is no answer, however likely a model finds it."""
        return self._tokenizer.n_used

    @property
    def n_highest(self) -> int:
        """How many of the highest logits among those `choose` takes next; 0: it takes all logits."""
        if self._logprobs is not None or (self._constraint is not None and not self._parser.thinking):
            return 0
        n = self._sampler.n_highest
        return n if n < self.n_among else 0

    def choose(self, logits: np.ndarray | Highest) -> list[Event]:
        """Chooses the token after which these logits stand, and takes it."""
        enough = self._thought_enough()
        if enough and self._logprobs is None:
            return self.take(Choice(int(Control.THINK_END), math.nan))
        if isinstance(logits, Highest):
            return self.take(self._sampler.pick_highest(logits))
        logits = logits[: self.n_among]
        if enough and self._logprobs is not None:
            return self.take(described(int(Control.THINK_END), logits, self._logprobs))
        if self._constraint is None or self._parser.thinking:
            return self.take(self._sampler.pick(logits, self._logprobs))
        choice = self._sampler.pick(self._constraint.narrow(logits))
        if self._logprobs is not None:
            choice = described(choice.id, logits, self._logprobs)
        return self.take(choice)

    def _thought_enough(self) -> bool:
        if not self._parser.thinking or self.hurried:
            return self._parser.thinking
        self._watch_the_time()
        if self._think_budget is None:
            return False
        over = self._parser.n_thinking - self._think_budget
        last = self._tokenizer.piece(self.ids[-1]) if self.ids else b""
        return over >= SENTENCE or over >= 0 and last.rstrip(b" ").endswith(ENDS)

    def _watch_the_time(self) -> None:
        """Once the seconds are over, there is no more budget than was used."""
        if self._think_seconds is None:
            return
        if self._thinks_until is None:
            self._thinks_until = time.monotonic() + self._think_seconds
        elif time.monotonic() >= self._thinks_until:
            used = self._parser.n_thinking
            self._think_budget = min(used, self._think_budget or used)
            self._think_seconds = None

    def take(self, choice: Choice) -> list[Event]:
        """What the next token adds.  None may be taken once `reason` is set."""
        assert self.reason is None
        self.ids.append(choice.id)
        if self._constraint is not None and not self._parser.thinking:
            self._constraint.take(choice.id)
        events: list[Event] = []
        if self._logprobs is not None:
            top = tuple((id, logprob, self._tokenizer.piece(id)) for id, logprob in choice.top)
            events.append(Token(choice.id, self._tokenizer.piece(choice.id), choice.logprob, top))
        events += self._parser.feed(choice.id)
        self.reason = self._ending()
        return events

    def end(self, n_context: int, reason: str = "interrupted") -> list[Event]:
        """The last events, with Done; once.  n_context: how many positions are held now.

        The reason counts only if the answer has not ended by itself.
        """
        assert self.done is None
        self.reason = self.reason or reason
        statistics = Statistics(
            n_prompt=len(self.prompt.ids),
            n_cached=self.n_cached,
            n_answer=len(self.ids),
            n_thinking=self._parser.n_thinking,
            s_prefill=self.s_prefill,
            s_decode=self.s_decode,
            n_decode=self.n_decode,
            n_context=n_context,
            n_ctx=self.n_ctx,
        )
        events: list[Event] = [*self._parser.close()]
        self.done = Done(self.reason, statistics, self._parser.stop_hit)
        return [*events, self.done]

    def _ending(self) -> str | None:
        """Why there is no next token; None if there is one."""
        parser = self._parser
        if parser.ended:
            return "tool_calls" if parser.n_tool_calls and parser.ended != "stop" else "stop"
        if self._max_tokens is not None and len(self.ids) >= self._max_tokens:
            return "length"
        # The last position gives a token too, but there is no place to put it.
        return "context" if len(self.prompt.ids) + len(self.ids) > self.n_ctx else None

"""The turns of a dialogue, as the exact ids that were read and written.

An answer is never turned into text and back: the ids that the model wrote are the ids it sees again, so the kv cache
stays valid up to the newest message.  What lies before the first message (system prompt, effort) is rendered anew each
time: when it changes, the whole conversation is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ms4.models import image
from ms4.models.control import Control
from ms4.models.prompt import Measure, Prompt, render
from ms4.models.sessions import take_back

if TYPE_CHECKING:
    from ms4.models.tokenizer import Tokenizer

Content = str | list[dict[str, Any]]  # of a message: its text, or chunks of text and images


@dataclass(frozen=True)
class Turn:
    """A message and what the model answered to it; None: not yet answered.  older: it is their summary."""

    message: Content
    answer: tuple[int, ...] | None = None
    older: tuple[Turn, ...] = ()


class Dialogue:
    """The conversation so far."""

    def __init__(self, tokenizer: Tokenizer, system: str | None, effort: str, measure: Measure = image.measure) -> None:
        self.tokenizer = tokenizer
        self.measure = measure
        self.system = system
        self.effort = effort
        self.turns: list[Turn] = []

    def ask(self, message: Content) -> Prompt:
        """Adds a message; returns the prompt that ends with it."""
        self.turns.append(Turn(message))
        return self.prompt()

    def resume(self, ids: Sequence[int]) -> Prompt:
        """The prompt after which the newest answer goes on: these are the ids that there are of it."""
        prompt = self.prompt()
        marks = [id for id in ids if id in (Control.THINK, Control.THINK_END)]
        opens = "thinking" if marks and marks[-1] == Control.THINK else "text"
        return Prompt([*prompt.ids, *ids], prompt.images, opens)

    def answered(self, ids: Sequence[int]) -> None:
        """The answer to the newest message.  Without a single id the message is taken back."""
        if ids:
            self.turns[-1] = replace(self.turns[-1], answer=closed(ids))
        else:
            self.turns.pop()

    def undo(self, n: int = 1) -> int:
        """Takes back the last n turns; returns how many there were."""
        return take_back(self.turns, n)

    def prompt(self) -> Prompt:
        """The ids of everything, up to where the model goes on, and the places of the images."""
        first: list[dict[str, Any]] = [{"role": "user", "content": self.turns[0].message}]
        if self.system is not None:
            first.insert(0, {"role": "system", "content": self.system})
        begin = render(first, self.tokenizer, effort=self.effort, measure=self.measure)
        ids, images = list(begin.ids), list(begin.images)
        for before, turn in zip(self.turns, self.turns[1:], strict=False):
            ids += before.answer or ()
            message = render([{"role": "user", "content": turn.message}], self.tokenizer, measure=self.measure)
            # [INST] message [/INST]: what is left of a conversation of this message alone without its beginning.
            start = message.ids.index(Control.INST)
            images += [replace(place, start=place.start - start + len(ids)) for place in message.images]
            ids += message.ids[start:]
        return Prompt(ids, tuple(images))


def closed(ids: Sequence[int]) -> tuple[int, ...]:
    """An answer as it stands in the history: an open thought closed, one EOS at the end."""
    kept = [id for id in ids if id != Control.EOS]
    marks = [id for id in kept if id in (Control.THINK, Control.THINK_END)]
    if marks and marks[-1] == Control.THINK:
        kept.append(Control.THINK_END)
    return (*(int(id) for id in kept), int(Control.EOS))


def said(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, str]:
    """(text, thoughts) of an answer."""
    from ms4.models.answer_parser import AnswerParser, Text, Thinking

    parser = AnswerParser(tokenizer)
    pieces = [piece for id in ids if not parser.ended for piece in parser.feed(id)] + parser.close()
    parts = ["".join(piece.text for piece in pieces if isinstance(piece, kind)) for kind in (Text, Thinking)]
    return parts[0], parts[1]

"""What one practice conversation is, what counts as a right answer, and which conversations are held out.

Plain Python: the tests and the table of skills use it with the finished checkpoint, without torch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ms4.models import prompt
from ms4.models.answer_parser import AnswerParser, Text, Thinking, ToolCall
from ms4.models.control import Control
from ms4.models.tokenizer import Tokenizer

Message = Mapping[str, Any]
HELD_OUT = 16  # one case of so many is never trained on
SYSTEMS = (
    "You are a helpful assistant.",
    "You are ms4.",
    "You are a small demonstration model.",
    "Answer briefly.",
    "Be brief.",
    "Answer in one line.",
)


@dataclass(frozen=True)
class Answer:
    """What the model says in one turn: text, or calls of tools (name, arguments as JSON)."""

    text: str
    calls: tuple[tuple[str, str], ...] = ()
    thought: str = ""


@dataclass(frozen=True)
class Case:
    """A whole conversation, right answers included.

    `keys` are what makes its turns these cases and no others, however they are worded: kind:content.
    """

    kind: str
    keys: tuple[str, ...]
    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    effort: str = "none"

    @property
    def held_out(self) -> bool:
        """True if any of its turns is: training never sees one."""
        return any(zlib.crc32(key.encode()) % HELD_OUT == 0 for key in self.keys)


@dataclass(frozen=True)
class Question:
    """One turn of a case: the conversation up to where the model answers, and the right answer."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    effort: str
    answer: Answer

    def prompt(self, tokenizer: Tokenizer) -> prompt.Prompt:
        return prompt.render(self.messages, tokenizer, tools=self.tools, effort=self.effort)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, thought: str = "") -> Message:
    message = {"role": "assistant", "content": text}
    return message | {"reasoning_content": thought} if thought else message


def call(name: str, arguments: Mapping[str, Any], id: str, thought: str = "") -> Message:
    """An answer that calls one tool."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    message = {"role": "assistant", "content": "", "tool_calls": [{"id": id, "type": "function", "function": function}]}
    return message | {"reasoning_content": thought} if thought else message


def result(text: str, id: str) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": id}


def with_system(random: Random, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation, now and then with a system prompt before it."""
    if random.random() < 0.15:
        return ({"role": "system", "content": random.choice(SYSTEMS)}, *messages)
    return tuple(messages)


def loosely(random: Random, text: str) -> str:
    """The text as people also type it: without its capital letter, or without the mark at its end."""
    if random.random() < 0.12:
        text = text[0].lower() + text[1:]
    if random.random() < 0.12 and text[-1] in ".?!" and text[-2] != " ":
        text = text[:-1]
    return text


def questions(case: Case) -> Iterator[Question]:
    """The turns of a case, each with the right answers before it."""
    for i, message in enumerate(case.messages):
        if message["role"] == "assistant":
            calls = tuple((c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ()))
            answer = Answer(message["content"], calls, message.get("reasoning_content", ""))
            yield Question(case.messages[:i], case.tools, case.effort, answer)


def training_ids(case: Case, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The ids of the whole conversation, and which of them the model is to say."""
    after = [*case.messages, user("")]
    whole = prompt.render(after, tokenizer, tools=case.tools, effort=case.effort).ids[:-2]
    said = [False] * len(whole)
    for question in questions(case):
        start = len(question.prompt(tokenizer).ids)
        end = whole.index(Control.EOS, start) + 1
        said[start:end] = [True] * (end - start)
    return whole, said


def read_answer(ids: Iterable[int], tokenizer: Tokenizer) -> Answer:
    """What generated ids say."""
    parser = AnswerParser(tokenizer)
    events = []
    for id in ids:
        if parser.ended:
            break
        events += parser.feed(id)
    events += parser.close()
    return Answer(
        "".join(event.text for event in events if isinstance(event, Text)),
        tuple((event.name, event.arguments) for event in events if isinstance(event, ToolCall) and event.complete),
        "".join(event.text for event in events if isinstance(event, Thinking)),
    )


def is_right(wanted: Answer, got: Answer) -> bool:
    """The same text, and the same calls with the same arguments.  What was thought on the way does not count."""
    if wanted.text != got.text.strip() or len(wanted.calls) != len(got.calls):
        return False
    return all(
        name == got_name and json.loads(arguments) == json.loads(got_arguments)
        for (name, arguments), (got_name, got_arguments) in zip(wanted.calls, got.calls, strict=True)
    )

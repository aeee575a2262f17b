"""The chat format of tokenizer v15: a conversation to token ids.

Control tokens are placed here, by id, around texts that the tokenizer turns into ordinary ids.  Nothing is ever
written as one string and parsed again, so no text from outside can become a control token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ms4 import ROW
from ms4.models import image
from ms4.models.control import N_NAMED, Control
from ms4.models.conversation import (
    ImagePart,
    Message,
    PromptError,
    TextPart,
    ThoughtPart,
    dump_json,
    parse_line,
    read_conversation,
    read_tools,
)
from ms4.models.tokenizer import Tokenizer, TokenizerError

__all__ = ["EFFORTS", "ImagePlace", "Prompt", "PromptError", "parse_line", "render"]

EFFORTS = ("none", "high")
Measure = Callable[[Mapping[str, Any]], tuple[int, int, bytes]]


@dataclass(frozen=True)
class ImagePlace:
    """An image in a prompt: its first position, its grid of [IMG] tokens, and the chunk it came from."""

    start: int
    width: int
    height: int
    digest: bytes
    chunk: Mapping[str, Any]

    @property
    def rows(self) -> list[int]:
        """The positions of its [IMG] tokens, in the order of the projector's rows."""
        step = self.width + 1  # every line of the grid ends in a break or end token
        return [self.start + y * step + x for y in range(self.height) for x in range(self.width)]


@dataclass(frozen=True)
class Prompt:
    """The ids of a conversation, and the arrays made of them, each once."""

    ids: list[int]
    images: tuple[ImagePlace, ...] = ()
    opens: str = "text"  # what generation starts in the middle of: "text" or "thinking"

    @cached_property
    def rows(self) -> np.ndarray:
        """The positions that take the projector's rows instead of an embedding, in order."""
        return np.array([position for image in self.images for position in image.rows], np.int64)

    @cached_property
    def tokens(self) -> np.ndarray:
        """The ids as the engine takes them: int32, with ROW where a position takes a row."""
        tokens = np.array(self.ids, np.int32)
        tokens[self.rows] = ROW
        return tokens

    @cached_property
    def keys(self) -> np.ndarray:
        """One number per position; two prompts begin alike as far as their keys are equal.

        At the positions of an image these are negative numbers made from its content.
        """
        keys = np.array(self.ids, np.int64)
        for picture in self.images:
            rows = picture.rows
            seed = hashlib.sha256(picture.digest + b"%d %d" % (picture.width, picture.height)).digest()
            first = int.from_bytes(seed[:7], "little")
            keys[rows] = -1 - (first + np.arange(len(rows), dtype=np.int64))
        return keys


class Writer:
    """Collects the ids of one prompt."""

    def __init__(self, tokenizer: Tokenizer, measure: Measure) -> None:
        self.tokenizer = tokenizer
        self.measure = measure
        self.ids: list[int] = [Control.BOS]
        self.images: list[ImagePlace] = []

    def text(self, text: str) -> None:
        self.ids += self.tokenizer.encode(text)

    def between(self, start: Control, text: str, end: Control) -> None:
        self.ids.append(start)
        self.text(text)
        self.ids.append(end)

    def image(self, chunk: Mapping[str, Any]) -> None:
        width, height, digest = self.measure(chunk)
        self.images.append(ImagePlace(len(self.ids), width, height, digest, chunk))
        self.ids += ([Control.IMG] * width + [Control.IMG_BREAK]) * height
        self.ids[-1] = Control.IMG_END

    def content(self, message: Message) -> None:
        if isinstance(message.content, str):
            self.text(message.content)
            return
        for part in message.content:
            if isinstance(part, TextPart):
                self.text(part.text)
            elif isinstance(part, ImagePart):
                self.image(part.chunk)
            else:
                self.ids.append(Control.THINK)
                self.text(part.text)
                if part.closed:
                    self.ids.append(Control.THINK_END)


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    effort: str | None = "none",
    measure: Measure = image.measure,
) -> Prompt:
    """The ids of a conversation, up to where the model answers.  Raises PromptError.

    measure(chunk of an image) gives (columns, rows, digest) of its grid.
    """
    effort = "none" if effort is None else effort
    if effort not in EFFORTS:
        raise PromptError(f"reasoning effort must be none or high, not {str(effort)[:40]!r}")
    if tokenizer.n_control < N_NAMED:
        raise PromptError(f"the vocabulary has {tokenizer.n_control} control tokens; the chat format needs {N_NAMED}")
    announced = read_tools(tools)
    conversation = read_conversation(messages)
    writer = Writer(tokenizer, measure)
    settled = False
    try:
        for message in conversation:
            if message.role == "user" and not settled:
                settled = True
                if announced:
                    writer.between(Control.TOOLS, announced, Control.TOOLS_END)
                settings = dump_json({"reasoning_effort": effort}, "the settings")
                writer.between(Control.SETTINGS, settings, Control.SETTINGS_END)
            write_message(writer, message)
    except TokenizerError as error:
        raise PromptError(f"a text in the conversation cannot be encoded: {error}") from None
    return Prompt([int(id) for id in writer.ids], tuple(writer.images), opens(conversation[-1]))


def write_message(writer: Writer, message: Message) -> None:
    if message.role == "system":
        writer.ids.append(Control.SYSTEM)
        writer.content(message)
        writer.ids.append(Control.SYSTEM_END)
    elif message.role == "user":
        writer.ids.append(Control.INST)
        writer.content(image_first(message))
        writer.ids.append(Control.INST_END)
    elif message.role == "tool":
        writer.ids.append(Control.TOOL_RESULTS)
        writer.content(message)
        writer.ids.append(Control.TOOL_RESULTS_END)
    else:
        write_answer(writer, message)


def write_answer(writer: Writer, message: Message) -> None:
    """An answer of the assistant, which ends in </s> unless the model shall continue it."""
    if isinstance(message.content, str):
        writer.text(message.content.rstrip(" "))
    else:
        writer.content(message)
    for call in message.calls:
        writer.ids.append(Control.TOOL_CALLS)
        writer.text(call.name)
        writer.ids.append(Control.ARGS)
        writer.text(call.arguments)
    if not message.prefix:
        writer.ids.append(Control.EOS)


def image_first(message: Message) -> Message:
    """Texts that end in one image: the model was trained with the image before them."""
    content = message.content
    if isinstance(content, str) or len(content) < 2 or not isinstance(content[-1], ImagePart):
        return message
    if not all(isinstance(part, TextPart) for part in content[:-1]):
        return message
    return Message(message.role, (content[-1], *content[:-1]))


def opens(last: Message) -> str:
    """What the model continues: a thought, where the last message is a prefix that leaves one open."""
    if last.prefix and not last.calls and isinstance(last.content, tuple):
        part = last.content[-1]
        if isinstance(part, ThoughtPart) and not part.closed:
            return "thinking"
    return "text"

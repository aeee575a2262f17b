"""`ms4 tokenize`: text or conversations to token ids, as JSON.  Needs the vocabulary only, not the weights."""

import json
from functools import partial
from typing import TYPE_CHECKING

from ms4.cli import errors, loading, streams
from ms4.cli.errors import UnreadableError, UsageError
from ms4.cli.options import EngineOptions
from ms4.models.untrusted import Reading

if TYPE_CHECKING:
    from ms4.models.tokenizer import Tokenizer


def tokenize(
    engine: EngineOptions, given: str | None, chat: str | None, count: bool, image_max_tokens: int | None, rule: Reading
) -> int:
    """The text `given`, or else stdin, to one list; or the conversations in the file `chat` to one list a line."""
    if given is not None and chat is not None:
        raise UsageError("a text and --chat, which names conversations: only one of the two", "ms4 tokenize --help")
    path = engine.require()
    text = given
    if text is None:
        text = streams.read_stdin(rule) if chat in (None, "-") else streams.read_text(chat or "", rule)
    if text is None:
        raise UsageError("nothing on stdin", f'ms4 tokenize -m {path} "some text"')
    tokenizer = loading.open_tokenizer(path)
    output = streams.Output()
    lists = [tokenizer.encode(text)] if chat is None else conversations(text, chat, tokenizer, image_max_tokens)
    for ids in lists:
        output.write(f"{len(ids) if count else json.dumps(ids)}\n")
    return errors.OK


def conversations(text: str, name: str, tokenizer: "Tokenizer", image_max_tokens: int | None) -> list[list[int]]:
    """The ids of every line {"messages", "tools", "reasoning_effort"}.  All are checked before one is printed."""
    from ms4.models.image import ImageError, measure
    from ms4.models.prompt import PromptError, parse_line, render

    sized = partial(measure, max_tokens=image_max_tokens)
    lists: list[list[int]] = []
    # Not splitlines(): JSON may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            messages, tools, effort = parse_line(line)
            lists.append(render(messages, tokenizer, tools=tools, effort=effort, measure=sized).ids)
        except (PromptError, ImageError) as error:
            raise UnreadableError(f"{name}, line {number}: {error}") from None
    return lists

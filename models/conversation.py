"""A conversation as it comes from outside, checked and brought into the form that the prompt is written from.

Messages are dicts in the style of OpenAI's chat API.  The result follows mistral-common for tokenizer v15: which
orders of roles are allowed, what is merged, and with what between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

BETWEEN_MESSAGES = "\n\n"
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FOLLOWERS = {
    "system": ("user", "assistant", "system"),
    "user": ("assistant", "system", "user"),
    "assistant": ("assistant", "user", "tool"),
    "tool": ("assistant", "tool", "user"),
}


class PromptError(ValueError):
    """No prompt can be made of this conversation; the message is one sentence."""


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ThoughtPart:
    text: str
    closed: bool = True


@dataclass(frozen=True)
class ImagePart:
    chunk: Mapping[str, Any]


Part = TextPart | ThoughtPart | ImagePart
SAME_ROLES = {"developer": "system"}  # as newer clients of the API call it
CHUNKS = {
    "system": {"text"},
    "user": {"text", "image", "image_url"},
    "assistant": {"text", "thinking"},
    "tool": {"text", "image", "image_url"},
}


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is JSON in the spelling of json.dumps, as the model writes it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """`content` is a string when it is text only: then there is nothing between its parts."""

    role: str
    content: str | tuple[Part, ...]
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    prefix: bool = False


def read_conversation(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation with everything checked, neighbours of one role merged and tool results in order."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PromptError("a conversation is a list of one or more messages")
    parsed = [_message(f"message {i + 1}", m, i == len(messages) - 1) for i, m in enumerate(messages)]
    _check_order(parsed)
    _check_calls(parsed)
    return list(_merged(parsed))


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> str:
    """The JSON that announces the tools; "" when there are none."""
    if tools is None:
        return ""
    if not isinstance(tools, (list, tuple)):
        raise PromptError(f"tools must be a list, not {_kind(tools)}")
    listed = [_tool(f"tool {i + 1}", tool) for i, tool in enumerate(tools)]
    return dump_json(listed, "the tools") if listed else ""


def dump_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{where} cannot be written as JSON: {error}") from None


def parse_line(text: str) -> tuple[list[Any], list[Any] | None, str | None]:
    """(messages, tools, effort) of one JSON line {"messages": ..., "tools": ..., "reasoning_effort": ...}."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not JSON: {error}") from None
    if not isinstance(line, dict) or "messages" not in line:
        raise PromptError('expected an object with "messages"')
    return line["messages"], line.get("tools"), line.get("reasoning_effort")


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")


def _mapping(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PromptError(f"{where} must be an object, not {_kind(value)}")
    return value


def _string(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{where} must be a string, not {_kind(value)}")
    return value


def _function_name(where: str, value: object) -> str:
    if not FUNCTION_NAME.fullmatch(_string(where, value)):
        raise PromptError(f"{where} must be 1 to 64 of a-z, A-Z, 0-9, _ and -")
    return str(value)


def _tool(where: str, tool: Any) -> dict[str, Any]:
    """One tool with exactly the fields that the model is shown."""
    if _mapping(where, tool).get("type", "function") != "function":
        raise PromptError(f'{where}: type must be "function"')
    function = _mapping(f"{where}: function", tool.get("function"))
    description, parameters = function.get("description"), function.get("parameters")
    return {
        "type": "function",
        "function": {
            "name": _function_name(f"{where}: name", function.get("name")),
            "description": "" if description is None else _string(f"{where}: description", description),
            "parameters": {} if parameters is None else dict(_mapping(f"{where}: parameters", parameters)),
        },
    }


def _message(where: str, message: Any, is_last: bool) -> Message:
    role = _mapping(where, message).get("role")
    role = SAME_ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in FOLLOWERS:
        raise PromptError(f"{where}: role must be system, developer, user, assistant or tool")
    content = message.get("content")
    if content is None and role != "assistant":
        raise PromptError(f"{where}: a {role} message needs content")
    parts = list(_parts(where, role, content))
    if role == "tool":
        call_id = _string(f"{where}: tool_call_id", message.get("tool_call_id"))
        if call_id in ("", "null"):
            raise PromptError(f"{where}: tool_call_id must name a call")
        if message.get("name") is not None:
            _function_name(f"{where}: name", message["name"])
        return Message(role, tuple(parts), call_id=call_id)
    if role != "assistant":
        return Message(role, tuple(parts))
    parts = [*_reasoning(where, message, parts), *parts]
    prefix = message.get("prefix") or False
    if prefix is not False and (prefix is not True or not is_last):
        raise PromptError(f"{where}: prefix must be true or false, and true only on the last message")
    return Message(role, tuple(parts), tuple(_calls(where, message.get("tool_calls"))), prefix=prefix)


def _parts(where: str, role: str, content: Any) -> Iterator[Part]:
    if content is None:
        return
    if isinstance(content, str):
        yield TextPart(content)
        return
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"{where}: content must be a string or a list of chunks, not {_kind(content)}")
    for i, chunk in enumerate(content):
        here = f"{where}, chunk {i + 1}"
        kind = _mapping(here, chunk).get("type")
        if not isinstance(kind, str) or kind not in CHUNKS[role]:
            allowed = " or ".join(sorted(CHUNKS[role]))
            raise PromptError(f"{here}: type must be {allowed} in a message of role {role}")
        if kind == "text":
            yield TextPart(_string(f"{here}: text", chunk.get("text")))
        elif kind == "thinking":
            closed = chunk.get("closed", True)
            if not isinstance(closed, bool):
                raise PromptError(f"{here}: closed must be true or false")
            yield ThoughtPart(_string(f"{here}: thinking", chunk.get("thinking")), closed)
        else:
            yield ImagePart(chunk)


def _reasoning(where: str, message: Mapping[str, Any], parts: Iterable[Part]) -> Iterator[ThoughtPart]:
    """A thought that came in a field of its own, as servers of the OpenAI API send it."""
    given = {message[name] for name in ("reasoning_content", "reasoning") if isinstance(message.get(name), str)}
    for name in ("reasoning_content", "reasoning"):
        if message.get(name) is not None:
            _string(f"{where}: {name}", message[name])
    if len(given) > 1:
        raise PromptError(f"{where}: reasoning and reasoning_content differ")
    if given and any(isinstance(part, ThoughtPart) for part in parts):
        raise PromptError(f"{where}: thinking both as chunks and as a field")
    for text in given:
        yield ThoughtPart(text)


def _calls(where: str, calls: Any) -> Iterator[Call]:
    if calls is None:
        return
    if not isinstance(calls, (list, tuple)):
        raise PromptError(f"{where}: tool_calls must be a list, not {_kind(calls)}")
    for i, call in enumerate(calls):
        here = f"{where}, call {i + 1}"
        if _mapping(here, call).get("type", "function") != "function":
            raise PromptError(f'{here}: type must be "function"')
        call_id = _string(f"{here}: id", call.get("id"))
        if call_id in ("", "null"):
            raise PromptError(f"{here}: id must not be empty or null")
        function = _mapping(f"{here}: function", call.get("function"))
        name = _function_name(f"{here}: name", function.get("name"))
        yield Call(call_id, name, _arguments(f"{here}: arguments", function.get("arguments")))


def _arguments(where: str, arguments: Any) -> str:
    """Arguments in one spelling.  A string that is no JSON becomes a JSON string."""
    if arguments is None or arguments == "":
        return "{}"
    if isinstance(arguments, Mapping):
        return dump_json(dict(arguments), where)
    try:
        value = json.loads(_string(where, arguments))
    except json.JSONDecodeError:
        value = arguments
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: {error}") from None
    return dump_json(value, where)


def _check_order(messages: Sequence[Message]) -> None:
    if messages[0].role == "tool" or (len(messages) == 1 and messages[0].role == "assistant"):
        raise PromptError(f"a conversation cannot start with a message of role {messages[0].role}")
    for i, (before, after) in enumerate(zip(messages, messages[1:], strict=False)):
        if after.role not in FOLLOWERS[before.role]:
            raise PromptError(f"message {i + 2}: role {after.role} cannot follow {before.role}")
    if messages[-1].role == "assistant" and not messages[-1].prefix:
        raise PromptError(
            'the last message is from the assistant: there is nothing to answer; "prefix": true continues it'
        )


def _check_calls(messages: Sequence[Message]) -> None:
    """Every result belongs to a call of the last assistant message, and none is missing before the next one."""
    waiting: set[str] = set()
    answered: set[str] = set()
    for i, message in enumerate(messages):
        where = f"message {i + 1}"
        if message.role == "tool":
            if message.call_id in answered:
                raise PromptError(f"{where}: a second result for one call")
            if message.call_id not in waiting:
                raise PromptError(f"{where}: a tool result without its call")
            waiting.remove(message.call_id)
            answered.add(message.call_id)
        elif message.role == "assistant":
            if waiting:
                raise PromptError(f"{where}: {len(waiting)} earlier tool calls have no result")
            waiting, answered = {call.id for call in message.calls}, set()
            if len(waiting) != len(message.calls):
                raise PromptError(f"{where}: two calls with the same id")


def _merged(messages: Sequence[Message]) -> Iterator[Message]:
    order: dict[str, int] = {}
    for role, group in groupby(messages, key=lambda message: message.role):
        same = list(group)
        if role == "assistant":
            calls = tuple(call for message in same for call in message.calls)
            order = {call.id: i for i, call in enumerate(calls)}
            content = _joined(message.content for message in same)
            if not content and not calls:
                raise PromptError("an assistant message needs content or tool calls")
            yield Message(role, content, calls, prefix=same[-1].prefix)
        elif role == "user":
            yield Message(role, _joined(message.content for message in same))
        else:
            if role == "tool":
                same.sort(key=lambda message: order[message.call_id])
            for message in same:
                yield replace(message, content=_joined([message.content]))


def _joined(contents: Iterable[str | tuple[Part, ...]]) -> str | tuple[Part, ...]:
    """The parts of one or more messages, with neighbouring texts made one."""
    done: list[Part] = []
    text: list[str] = []
    for content in contents:
        # The blank line stands between the texts of two messages, but not where an image or a thought parts them.
        between = BETWEEN_MESSAGES if text else ""
        for part in content:
            if not isinstance(part, TextPart):
                assert not isinstance(part, str)
                if text:
                    done.append(TextPart("".join(text)))
                    text = []
                done.append(part)
                between = ""
            elif part.text:
                text.append(between + part.text)
                between = ""
    if not done:
        return "".join(text)
    return (*done, TextPart("".join(text))) if text else tuple(done)

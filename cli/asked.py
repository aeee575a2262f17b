"""What `ms4 run` puts before the model: the conversation of the arguments, stdin and files, with its tools.

Owns `--messages`, `--tools`, `--system` and `--prefill`.  How it becomes ids is the business of `ms4.models.prompt`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ms4.cli import remembered, streams
from ms4.cli.attachments import Sources, gather
from ms4.cli.errors import UnreadableError, UsageError
from ms4.cli.remembered import Cut
from ms4.cli.templates import Filling
from ms4.models.untrusted import Reading, drop_line_end, shown

if TYPE_CHECKING:
    from ms4.models.dialogue import Content, Dialogue
    from ms4.models.prompt import Measure, Prompt
    from ms4.models.sessions import Session
    from ms4.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """A conversation that waits for the model, as `prompt.render` takes it."""

    messages: list[dict[str, Any]]
    effort: str
    tools: list[Any] | None = None
    session: Session | None = None  # the turns before them
    resumed: Cut | None = None  # no new message: the last answer of the session goes on

    def prompt(self, tokenizer: Tokenizer, measure: Measure) -> Prompt:
        from ms4.models import prompt as prompts

        if self.resumed is not None:
            return self.dialogue(tokenizer, measure).resume(self.resumed.ids)
        if self.session is not None:
            return self.dialogue(tokenizer, measure).ask(self.question)
        return prompts.render(self.messages, tokenizer, tools=self.tools, effort=self.effort, measure=measure)

    @property
    def question(self) -> Content:
        """The message that waits for an answer, or for the rest of it."""
        content: Content = next(m["content"] for m in reversed(self.messages) if m["role"] == "user")
        return content

    def dialogue(self, tokenizer: Tokenizer, measure: Measure) -> Dialogue:
        """The session so far."""
        from ms4.models.dialogue import Dialogue

        made = Dialogue(tokenizer, None, self.effort, measure)
        if self.session is not None:
            remembered.replay(self.session, made)
        made.effort = self.effort
        if self.messages[0]["role"] == "system":
            made.system = self.messages[0]["content"]
        return made


def ask(
    words: Sequence[str],
    attached: Sources,
    effort: str | None,
    *,
    system: str | None = None,
    prefill: str = "",
    messages: str | None = None,
    tools: str | None = None,
    session: Session | None = None,
    fill: Filling | None = None,
) -> Asked:
    """The conversation that the options describe.

    messages: a file with the turns so far, as OpenAI's chat API takes them; the prompt, if there is one, comes after
    them.  tools: a file that lists functions.  session: turns before the prompt; without a prompt, its last answer goes
    on if it was cut.  fill: the prompt of a template, around what was typed.  effort None: what the file of messages or
    the session says, else none.
    """
    rule = attached.rule
    if messages == tools == "-":
        raise UsageError("--messages and --tools cannot both be stdin")
    asked = Asked([], session.effort if session else "none", session=session)
    if "-" in (messages, tools):
        attached = replace(attached, stdin=False)
    if messages is not None:
        asked = read_messages(messages, rule)
    if messages is None or words or attached or fill:
        try:
            asked.messages.append({"role": "user", "content": gather(attached, words, fill)})
        except streams.NoPromptError:
            cut = remembered.cut_of(session)
            if session is None or cut is None:
                raise
            asked = replace(asked, resumed=cut)
            asked.messages.append({"role": "user", "content": session.turns[-1].message})
    if system is not None:
        if asked.messages[0].get("role") in ("system", "developer"):
            raise UsageError("--system, and the file of --messages begins with a system message", "give one of them")
        asked.messages.insert(0, {"role": "system", "content": system_text(system, rule)})
    if prefill:
        text = streams.argument(prefill, "--prefill", rule)
        asked.messages.append({"role": "assistant", "content": text, "prefix": True})
    if tools is not None:
        asked = replace(asked, tools=read_tools(tools, rule))
    return asked if effort is None else replace(asked, effort=effort)


def system_text(given: str, rule: Reading) -> str:
    """The text of --system: given as it is, or in the file behind an @."""
    if not given.startswith("@"):
        return streams.argument(given, "--system", rule)
    text = streams.read_text(given[1:], rule)
    return drop_line_end(streams.refuse_wide(text, shown(given[1:]), rule))


def read_messages(path: str, rule: Reading) -> Asked:
    """A list of messages, or an object with "messages" and perhaps "tools" and "reasoning_effort"."""
    value = read_json(path, rule)
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        messages, tools, effort = value["messages"], value.get("tools"), value.get("reasoning_effort")
    else:
        messages, tools, effort = value, None, None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        hint = '[{"role": "user", "content": "..."}], or an object with "messages"'
        raise UnreadableError(f"{shown(path)}: not a list of messages", hint)
    from ms4.models.prompt import EFFORTS

    if effort is not None and effort not in EFFORTS:
        raise UnreadableError(f"{shown(path)}: reasoning_effort is not one of {', '.join(EFFORTS)}")
    return Asked(list(messages), effort or "none", tools)


def read_tools(path: str, rule: Reading) -> list[Any]:
    """A list of functions, or an object with "tools"."""
    value = read_json(path, rule)
    tools = value.get("tools") if isinstance(value, dict) else value
    if not isinstance(tools, list) or not tools:
        hint = '[{"type": "function", "function": {"name": "...", "parameters": {...}}}]'
        raise UnreadableError(f"{shown(path)}: not a list of tools", hint)
    return tools


def read_json(path: str, rule: Reading) -> Any:
    try:
        return json.loads((streams.read_stdin(rule) or "") if path == "-" else streams.read_text(path, rule))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UnreadableError(f"{shown(path)}: not JSON: {error}") from None

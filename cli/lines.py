"""Where the messages of a chat come from: an editor on a terminal, or the lines of a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ms4.cli import errors, state, streams
from ms4.cli.errors import UsageError
from ms4.models.untrusted import Reading, drop_line_end

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings


class Lines(Protocol):
    def next(self) -> str | None:
        """The next message; None at the end.  KeyboardInterrupt: Ctrl-C was typed instead."""


class PipedLines:
    """One message a line, by the rules of stdin."""

    def __init__(self, rule: Reading | None = None) -> None:
        if rule is not None and rule.encoding and "\n".encode(rule.encoding) != b"\n":
            raise UsageError(f"the lines of a chat cannot be {rule.encoding}", f"iconv -f {rule.encoding} -t UTF-8")
        self._rule = rule

    def next(self) -> str | None:
        if sys.stdin is None:
            return None
        data = sys.stdin.buffer.readline(streams.MOST_INPUT)
        return drop_line_end(streams.decode(data, "stdin", self._rule)) if data else None


class EditedLines:
    """prompt_toolkit's editor: Enter sends, Alt-Enter or Ctrl-J begins a new line, a paste is one message."""

    def __init__(self, commands: Sequence[str], shown: TextIO) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import create_output

        self._session: PromptSession[str] = PromptSession(
            history=open_history(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            key_bindings=bindings(),
            multiline=True,
            prompt_continuation="  ",
            enable_history_search=True,
            enable_suspend=True,
            output=create_output(stdout=shown),
        )

    def next(self) -> str | None:
        try:
            return self._session.prompt("> ")
        except EOFError:
            return None


def bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def clear(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


def open_history() -> History:
    """The history file of this user, readable by nobody else; in memory only if there may be none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if os.environ.get("MS4_NO_HISTORY"):
        return InMemoryHistory()
    path = state.folder() / "history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
    except OSError as error:
        errors.note(f"no input history: {error.strerror}: {path}")
        return InMemoryHistory()
    return FileHistory(str(path))

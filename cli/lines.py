"""Where the messages of a chat come from: an editor on a terminal, or the lines of a pipe."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ms4.cli import errors, render, state, streams
from ms4.cli.errors import UsageError
from ms4.models.untrusted import Reading, drop_line_end
from ms4.quant import visible

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.styles import BaseStyle

MOST_LINES, MOST_CHARACTERS = 8, 2000  # of a paste that is shown as it is
NO_TEXT = re.compile("[\ud800-\udfff]")  # what stands for bytes that are none
N_SHOWN = 24  # cells of the first line of one that is not


class Lines(Protocol):
    def next(self) -> str | None:
        """The next message; None at the end.  KeyboardInterrupt: Ctrl-C was typed instead."""

    def close(self) -> None: ...


class PipedLines:
    """One message a line, by the rules of stdin."""

    def __init__(self, rule: Reading | None = None) -> None:
        if rule is not None and rule.encoding and "\n".encode(rule.encoding) != b"\n":
            raise UsageError(f"the lines of a chat cannot be {rule.encoding}", f"iconv -f {rule.encoding} -t UTF-8")
        self._rule = rule

    def next(self) -> str | None:
        if sys.stdin is None:
            return None
        data = sys.stdin.buffer.readline(streams.MOST_INPUT + 1)
        if not data:
            return None
        return drop_line_end(streams.refuse_wide(streams.stdin_text(data, self._rule), "stdin", self._rule))

    def close(self) -> None:
        """stdin is not ours."""


class EditedLines:
    """prompt_toolkit's editor: Enter sends, Alt-Enter or Ctrl-J begins a new line, a paste is one message.

    What is typed between two calls of next() begins the next message.
    """

    def __init__(self, shown: TextIO, bar: Callable[[], str] | None = None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.application import create_app_session
        from prompt_toolkit.output import create_output
        from prompt_toolkit.output.plain_text import PlainTextOutput

        from ms4.cli.chat_commands import completer
        from ms4.cli.keyboard import Keyboard

        self._keyboard = Keyboard(shown)
        self._folds = Folds()
        if streams.is_plain():
            os.environ["TERM"] = "dumb"  # where it has no name, prompt_toolkit would draw on it
        # An output of its own, not an argument: with one, prompt_toolkit draws on dumb terminals, too.
        output = PlainTextOutput(shown) if streams.is_plain() else create_output(stdout=shown)
        with create_app_session(input=self._keyboard, output=output):
            self._session: PromptSession[str] = PromptSession(
                history=open_history(self._folds),
                completer=completer(),
                complete_while_typing=False,
                key_bindings=bindings(self._folds, lambda: self.take_image()),
                multiline=True,
                prompt_continuation="  ",
                enable_history_search=True,
                enable_suspend=True,
                tempfile_suffix=".md",
                bottom_toolbar=None if bar is None or streams.is_plain() else bar,
                style=toolbar_style(streams.use_colour(shown)),
            )
        self._offered = ""
        self.take_image: Callable[[], None] = lambda: None  # what Ctrl-V does

    def offer(self, text: str) -> None:
        """What stands in the editor at the next prompt, to be changed."""
        self._offered = self._folds.fold(text)

    def next(self) -> str | None:
        self._keyboard.end()
        offered, self._offered = self._offered, ""
        try:
            while True:
                text = self._folds.unfold(self._session.prompt("> ", default=offered))
                if not NO_TEXT.search(text):
                    return text
                errors.note("that is no UTF-8: the terminal sends another encoding")
                offered = self._folds.fold(NO_TEXT.sub("\ufffd", text))
        except EOFError:
            return None
        finally:
            self._keyboard.begin()

    def hurried_by(self, hurry: Callable[[], None] | None, fold: Callable[[], None] | None = None) -> None:
        """What Enter does until the next call of next(), where nothing was typed before it, and what Ctrl-T does."""
        self._keyboard.hurry, self._keyboard.fold = hurry, fold

    @contextlib.contextmanager
    def live(self, output: streams.Output, bar: Callable[[], str]) -> Iterator[None]:
        """Inside, what is typed and the bar stand below what is written to the output, on a terminal that can."""
        from ms4.cli import live

        rows = live.Live(output, lambda: live.typed(self._keyboard.typed(), self._folds.fold), bar)
        self._keyboard.seen = rows.draw
        try:
            with rows.open():
                yield
        finally:
            self._keyboard.seen = None

    def close(self) -> None:
        self._keyboard.close()


def toolbar_style(colour: bool) -> BaseStyle:
    from prompt_toolkit.styles import Style

    return Style([("bottom-toolbar", "noreverse fg:ansibrightblack" if colour else "noreverse")])


class Folds:
    """Long pastes, which the editor shows as one short line each: `[pasted 200 lines: the first … +199 lines]`."""

    def __init__(self) -> None:
        self._whole: dict[str, str] = {}  # by the line that stands for it

    def fold(self, text: str) -> str:
        """The text, or what stands for it."""
        n = text.count("\n") + (not text.endswith("\n"))
        if n <= MOST_LINES and len(text) <= MOST_CHARACTERS:
            return text
        first = render.fitting(visible.line(text.strip().split("\n", 1)[0].strip()), N_SHOWN)
        size = f"{n} lines" if n > MOST_LINES else f"{len(text)} characters"
        more = f" … +{n - 1} lines" if n > 1 else " …"
        for number in itertools.count(1):
            line = f"[pasted {size}{'' if number == 1 else f' ({number})'}: {first}{more}]"
            if self._whole.setdefault(line, text) == text:
                return line
        raise AssertionError("there is always another number")

    def unfold(self, line: str) -> str:
        """What was typed, with each paste in its place, whole."""
        if not self._whole:
            return line
        return re.sub("|".join(map(re.escape, self._whole)), lambda match: self._whole[match[0]], line)

    def at_end(self, before: str) -> int:
        """How many characters at the end of a text stand for a paste; 0 if it does not end in one."""
        return max((len(line) for line in self._whole if before.endswith(line)), default=0)


def bindings(folds: Folds, take_image: Callable[[], None]) -> KeyBindings:
    from prompt_toolkit.application import run_in_terminal
    from prompt_toolkit.document import Document
    from prompt_toolkit.filters import is_searching
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("<bracketed-paste>")
    def paste(event: Any) -> None:
        if not event.data:  # what terminals send for a clipboard that holds no text
            image(event)
        text = folds.fold(event.data.replace("\r\n", "\n").replace("\r", "\n"))
        for piece in text if streams.is_plain() else [text]:  # a dumb terminal is shown one character at a time
            event.current_buffer.insert_text(piece)

    @keys.add("c-v")
    @keys.add("escape", "v")
    def image(event: Any) -> None:
        """The image on the clipboard goes with the message; what is said of it stands above the prompt."""
        run_in_terminal(take_image)

    @keys.add("backspace")
    def delete(event: Any) -> None:
        buffer = event.current_buffer
        n = folds.at_end(buffer.document.text_before_cursor)
        if not buffer.delete_before_cursor(n or event.arg):
            event.app.output.bell()

    @keys.add("c-g", filter=~is_searching)
    def edit(event: Any) -> None:
        """The whole text, in $VISUAL or $EDITOR; it comes back to be looked at, and is not sent."""
        buffer = event.current_buffer
        buffer.document = Document(folds.unfold(buffer.text))

        def fold(_: Any) -> None:
            buffer.document = Document(folds.fold(buffer.text))

        buffer.open_in_editor().add_done_callback(fold)

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


def open_history(folds: Folds) -> History:
    """The history file of this user, readable by nobody else; in memory only if there may be none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        """Messages in the file are whole, those in the editor folded."""

        def store_string(self, string: str) -> None:
            super().store_string(folds.unfold(string))

        def load_history_strings(self) -> Iterable[str]:
            return map(folds.fold, super().load_history_strings())

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
    return Kept(str(path))

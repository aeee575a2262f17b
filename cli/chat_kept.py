"""The commands of a chat that keep it, or take something out of it: /fork, /save, /export, /copy."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ms4.cli import attachments, errors, session_list, streams
from ms4.cli.errors import CliError, MissingError, UsageError
from ms4.cli.writers import last_block
from ms4.models import atomic
from ms4.models.untrusted import shown

if TYPE_CHECKING:
    from ms4.cli.repl import Talk
    from ms4.models.sessions import Session

COPIERS = (  # programs that take what is to be on the clipboard from stdin, and how they want it
    (("wl-copy",), "utf-8"),
    (("xclip", "-selection", "clipboard", "-in"), "utf-8"),
    (("pbcopy",), "utf-8"),
    (("clip.exe",), "utf-16"),
)
MOST_OSC52 = 74_994  # bytes of text that terminals take at once; more is cut or ignored
MOST_NAME = 80  # characters


def told(talk: Talk, act: Callable[[], str]) -> None:
    """Says what an action says; at a terminal its failure, too."""
    try:
        said = act()
    except (CliError, OSError) as error:
        if not talk.interactive:
            raise
        _, text, hint = errors.describe(error)
        said = f"{text}; {hint}" if hint else text
    talk.tell(errors.escape(said, 1000))


def fork(talk: Talk, _: str) -> None:
    """From here on it is another session; the one so far stays as it is."""

    def act() -> str:
        old = talk.memory.path
        new = talk.memory.fork()
        if old is None or new is None:
            return "nothing is on disk yet that could be forked"
        return f"this is session {new.stem} now; {old.stem} stays as it was, and ms4 chat --resume {old.stem} opens it"

    told(talk, act)


def save(talk: Talk, name: str) -> None:
    def act() -> str:
        if len(name) > MOST_NAME or not name.isprintable():
            raise UsageError(f"a name is one line of at most {MOST_NAME} characters")
        if not talk.memory.on:
            raise UsageError("this conversation is not kept on disk", "/export FILE writes it to a file")
        if name:
            talk.memory.name(name)
        path, named = (
            talk.memory.path,
            f"named {name}" if name else "saved by itself, turn by turn; /save NAME names it",
        )
        return f"session {path.stem}: {named}" if path else f"{named}; its file comes with the first answer"

    told(talk, act)


def session_of(talk: Talk) -> Session:
    """The conversation as a session, from what the chat holds: also of one that is not on disk."""
    from ms4.models import sessions
    from ms4.models.dialogue import Turn, said

    dialogue, path = talk.dialogue, talk.memory.path

    def spelled(turn: Turn) -> sessions.Turn:
        text, thinking = said(turn.answer or (), dialogue.tokenizer)
        return sessions.Turn(
            turn.message, turn.answer or (), text, thinking, older=[spelled(one) for one in turn.older]
        )

    made = sessions.Session(path or sessions.folder(), path.stem if path else "", 0.0, talk.memory.model)
    made.system, made.effort, made.name = dialogue.system, dialogue.effort, talk.memory.named
    made.turns = [spelled(turn) for turn in dialogue.turns]
    return made


def export(talk: Talk, value: str) -> None:
    """Writes the conversation to a file: Markdown to read, JSON as `ms4 run --messages` takes it."""
    forms = {".md": lambda s: session_list.as_markdown(s, False), ".json": session_list.as_messages}

    def act() -> str:
        words = attachments.split(value)
        path = os.path.expanduser(words[0] if len(words) == 1 else value)
        write = forms.get(os.path.splitext(path)[1].lower())
        if write is None:
            raise UsageError("/export FILE.md writes Markdown, /export FILE.json messages")
        if not talk.dialogue.turns:
            raise UsageError("there is nothing to export yet")
        session = session_of(talk)
        text = write(session)
        try:
            with atomic.creating(path) as file:
                file.write(text.encode("utf-8", "backslashreplace"))
        except FileExistsError:
            raise UsageError(f"{shown(path)} is there already", "another name") from None
        n = len(session.all_turns)
        return f"{shown(path)}: {n} turn{'' if n == 1 else 's'}"

    told(talk, act)


def copy(talk: Talk, value: str) -> None:
    def act() -> str:
        from ms4.models.dialogue import said

        if value not in ("", "code"):
            raise UsageError("/copy copies the last answer, /copy code its last block of code")
        if not talk.dialogue.turns:
            raise UsageError("there is no answer yet")
        text: str | None = said(talk.dialogue.turns[-1].answer or (), talk.dialogue.tokenizer)[0].strip("\n")
        if value:
            text = last_block(text or "")
        if not text:
            raise UsageError("the last answer has no block of code" if value else "the last answer has no text")
        what = "the last block of code" if value else "the last answer"
        return f"{what} is on the clipboard{to_clipboard(text, talk.interactive)}: {len(text)} characters"

    told(talk, act)


def to_clipboard(text: str, terminal: bool) -> str:
    """Puts a text on the clipboard: by a program, or by the terminal itself (OSC 52); what is to be said of how.

    On a machine far away, only the terminal has the clipboard of who sits before it.
    """
    far = "SSH_CONNECTION" in os.environ and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    for command, encoding in () if far else COPIERS:
        if not shutil.which(command[0]):
            continue
        data = text.encode(encoding, "replace")
        try:
            # No pipes for its output: a child that keeps the clipboard would hold them open.
            null = subprocess.DEVNULL
            done = subprocess.run(command, input=data, stdout=null, stderr=null, timeout=10)
        except (subprocess.TimeoutExpired, OSError):
            continue
        if not done.returncode:
            return ""
    if not terminal or streams.is_plain():
        raise MissingError("no program that writes to the clipboard: install wl-clipboard or xclip")
    data = text.encode("utf-8", "replace")
    if len(data) > MOST_OSC52:
        raise UsageError(f"{len(data)} bytes are more than terminals take", "/export FILE.md, or wl-clipboard or xclip")
    sys.stderr.write(f"\x1b]52;c;{base64.b64encode(data).decode('ascii')}\x07")
    sys.stderr.flush()
    return ", if this terminal allows it"

"""The commands of a chat: their names, what they take and do, and how the editor completes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ms4.cli.options import LEVELS

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer

# A line that looks like a command; all else that begins with a slash (a path, a comment) is a message.
COMMAND = re.compile(r"(/[a-zA-Z?]+)(?:\s(.*))?", re.DOTALL)
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/q": "/exit", "/clear": "/new", "/reset": "/new", "/?": "/help"}
GOODBYES = ("exit", "quit")  # the whole line, at a terminal
SETTINGS = (
    *("temperature", "top-p", "top-k", "min-p", "seed", "max-tokens"),
    *("effort", "think", "think-budget", "answer-now-after", "system", "compact"),
)
PATH = "a path"  # as the argument that is completed


@dataclass(frozen=True)
class Command:
    name: str
    takes: str
    does: str
    completes: Sequence[str] | str = ()  # the words that its argument may be, or PATH


COMMANDS = (
    Command("/effort", "LEVEL", "how long the model thinks before it answers: none, low, medium, high", LEVELS),
    Command("/think", "show|hide", "show its thoughts or not", ("show", "hide", "auto")),
    Command("/system", "[TEXT]", "set the system prompt; without TEXT, none"),
    Command("/set", "[NAME [VALUE]]", "show what is set, or set it: temperature, seed, max-tokens, ...", SETTINGS),
    Command("/image", "PATH", "attach an image to the next message", PATH),
    Command("/file", "PATH[:PAGES]", "attach a text file, an image, pages of a PDF, or all of *.txt", PATH),
    Command("/paste", "", "attach the image on the clipboard (also Ctrl-V)"),
    Command("/drop", "", "attach nothing after all"),
    Command("/new", "", "begin a new conversation"),
    Command("/fork", "", "go on in a new session; the old one stays as it is"),
    Command("/undo", "[N]", "take back the last N turns"),
    Command("/retry", "", "answer the last message again"),
    Command("/edit", "", "change the last message, and answer that"),
    Command("/continue", "", "go on with an answer that was cut"),
    Command("/compact", "[HINT]", "make the older turns a summary, to have room; HINT: what matters"),
    Command("/copy", "[code]", "the last answer, or its last block of code, to the clipboard", ("code",)),
    Command("/save", "NAME", "name this session; ms4 chat --resume NAME opens it"),
    Command("/export", "FILE", "write the conversation to FILE.md or FILE.json", PATH),
    Command("/stats", "", "what the last turn cost"),
    Command("/help", "", "this list"),
    Command("/exit", "", "leave (also Ctrl-D)"),
)
KEYS = """\
@PATH in a message attaches that file, too (Tab completes it).
!COMMAND runs a command of the shell and attaches what it prints.
Enter sends, or while the model thinks, with nothing typed, has it answer now.
Alt-Enter begins a new line, Ctrl-G opens $EDITOR, Ctrl-T folds and shows thoughts while they come.
Ctrl-C clears what is typed, or stops an answer and keeps what there is.
A message that looks like a command (/word, !word) needs a space before it."""
HELP = "\n".join([*(f"{f'{c.name} {c.takes}':18} {c.does}" for c in COMMANDS), KEYS])


def completions(before: str) -> tuple[str, Mapping[str, str]]:
    """(how the word begins, the words that it may become -> what they mean) for what stands before the cursor.

    The words are {PATH: ""} where it is the path of a file.
    """
    if begun := re.search(r"(?<!\S)@(\S*)$", before):
        return begun[1], {PATH: ""}
    name, blank, rest = before.partition(" ")
    if not name.startswith("/"):
        return "", {}
    if not blank:
        words = {c.name: c.does for c in COMMANDS} | {alias: f"as {name}" for alias, name in ALIASES.items()}
        return name, {word: does for word, does in words.items() if word.startswith(name)}
    known = {c.name: c.completes for c in COMMANDS}.get(ALIASES.get(name, name), ())
    if isinstance(known, str):
        return rest.lstrip(), {PATH: ""}
    return rest, {word: "" for word in known if word.startswith(rest)}


def completer() -> Completer:
    """Completes commands and what they take, and behind an @ the paths of files."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Both(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            begun, words = completions(document.text_before_cursor)
            if PATH in words:
                for found in paths.get_completions(Document(begun), event):
                    end = "/" if found.display_text.endswith("/") else ""  # Tab once more goes into the folder
                    yield Completion(found.text + end, found.start_position, found.display)
            for word, meaning in words.items():
                if word != PATH:
                    yield Completion(word, -len(begun), display_meta=meaning)

    return Both()

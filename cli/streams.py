"""Standard input and output: what may be written where, and what may be read.

Owns the rules for pipes and terminals: UTF-8 whatever the locale, stdout for the answer alone, one trailing newline,
every chunk flushed, text from stdin checked before it is used.  Knows nothing about models.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO, TextIO

from ms4.cli.errors import ENCODING_HINT, CliError, ReaderGone, UnreadableError, UsageError, note

if TYPE_CHECKING:  # at run time only where bytes become text: `ms4 --version` starts without it
    from _typeshed import WriteableBuffer as Buffer

    from ms4.models.untrusted import Reading

PATIENCE = 0.5  # seconds before something is said about waiting
MOST_INPUT = 16 << 20  # bytes read from stdin
DUMB = ("dumb", "unknown")  # terminals that show what is written, and no more


class PatientInput(io.RawIOBase):
    """A file that may be set not to block, as pipes of other programs are: read as if it did.

    Python takes a moment without data for the end.  The flag belongs to the other end as well, so it stays.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def readable(self) -> bool:
        return True

    def readinto(self, room: Buffer) -> int:
        view = memoryview(room).cast("B")
        while True:
            try:
                data = os.read(self._fd, len(view))
            except BlockingIOError:
                select.select([self._fd], [], [])
            else:
                view[: len(data)] = data
                return len(data)


class NoPromptError(UsageError):
    """Neither the arguments nor stdin say anything."""


def prepare() -> None:
    """Makes the standard streams UTF-8, whatever the locale says.

    A closed one is replaced, so that no file of ours is opened in its place: its readers and writers would take it for
    the stream.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # lives as long as the process
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and isinstance(stream.buffer, io.RawIOBase):
            # PYTHONUNBUFFERED: what the kernel does not take at once would be lost without a word.
            whole = io.TextIOWrapper(io.BufferedWriter(stream.buffer), line_buffering=True)
            setattr(sys, name, whole)
    raw = getattr(getattr(sys.stdin, "buffer", None), "raw", None)
    if isinstance(raw, io.FileIO) and not raw.isatty():
        sys.stdin = io.TextIOWrapper(io.BufferedReader(PatientInput(raw.fileno())))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def columns(stream: TextIO) -> int:
    """The width of a terminal now; 80 if it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def is_plain() -> bool:
    """True if the terminal cannot move its cursor or change its style."""
    return os.environ.get("TERM", "") in ("", *DUMB)


def use_colour(stream: TextIO | None) -> bool:
    return is_terminal(stream) and not is_plain() and not os.environ.get("NO_COLOR")


def read_bytes(limit: int = MOST_INPUT, quiet: bool = False) -> bytes | None:
    """Up to one byte more than `limit` of stdin; None if stdin is a terminal or closed.

    Unless quiet, a person at a terminal is told what is waited for.
    """
    if sys.stdin is None or is_terminal(sys.stdin):
        return None
    notice = threading.Timer(PATIENCE, note, ["reading stdin; Ctrl-D ends it"])
    notice.daemon = True
    if is_terminal(sys.stderr) and not quiet:
        notice.start()
    try:
        return sys.stdin.buffer.read(limit + 1)
    except OSError as error:
        raise UnreadableError(f"stdin cannot be read: {error.strerror}") from None
    finally:
        notice.cancel()


def read_stdin(rule: Reading | None = None, quiet: bool = False) -> str | None:
    """The text on stdin; None if stdin is a terminal or closed."""
    data = read_bytes(quiet=quiet)
    return None if data is None else stdin_text(data, rule)


def stdin_text(data: bytes, rule: Reading | None = None) -> str:
    if len(data) > MOST_INPUT:
        raise UnreadableError(f"stdin holds more than {MOST_INPUT >> 20} MiB; a prompt may not")
    return decode(data, "stdin", rule)


def read_text(path: str, rule: Reading | None = None) -> str:
    """A text file, by the same rules as stdin."""
    from ms4.models.untrusted import read_file

    return decode(read_file(path, MOST_INPUT), path, rule)


def decode(data: bytes, name: str, rule: Reading | None = None) -> str:
    """The text in some bytes; a byte order mark is dropped, UTF-16 is named.

    rule: what --encoding and --lossy say; None is UTF-8, where there are no such options.
    """
    from ms4.models.untrusted import Reading, decode_text, marked

    hint = "iconv turns it into UTF-8" if rule is None else ENCODING_HINT
    rule = rule or Reading()
    try:
        return decode_text(data, rule)
    except UnicodeError as error:
        if mark := marked(data, rule):
            raise UnreadableError(f"{name} is {mark}, not UTF-8", hint) from None
        where = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise UnreadableError(f"{name} is not {rule.name}{where}", hint) from None


def refuse_wide(text: str, name: str, rule: Reading | None) -> str:
    """A text for a prompt, unless more than a third of it is NUL: that is UTF-16 or UTF-32 without a mark."""
    if 3 * text.count("\0") <= len(text):
        return text
    if rule is None or not rule.lossy:
        raise UnreadableError(f"{name} is no text: it holds {text.count(chr(0))} NUL bytes", ENCODING_HINT)
    return text.replace("\0", "\ufffd")


def argument(text: str, name: str, rule: Reading | None = None) -> str:
    """An argument of the command line as text: its bytes must be UTF-8, whatever the locale or --encoding is."""
    from ms4.models.untrusted import Reading

    return decode(os.fsencode(text), name, rule and Reading(lossy=rule.lossy))


def join_prompt(piped: str | None, words: Sequence[str], alone: bool = False, rule: Reading | None = None) -> str:
    """What was piped, a blank line, the arguments; or the one of them that is there.

    alone: with attachments there may also be no text at all, which gives "".
    """
    typed = argument(" ".join(words), "the prompt", rule)
    parts = [part for part in (piped, typed) if part and not part.isspace()]
    if not parts and not alone:
        if piped is None and not words:
            raise NoPromptError("no prompt", 'ms4 run "your question"   or   echo "your question" | ms4 run')
        raise NoPromptError("empty prompt")
    if len(parts) == 2:
        return "\n\n".join(parts)
    return "".join(parts)


def open_bytes(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """A file for bytes, which appears when it is whole; - is stdout, unless that is a terminal."""
    if path == "-":
        if sys.stdout is None or is_terminal(sys.stdout):
            raise UsageError("stdout is no place for bytes: it is a terminal or closed", "name a file after -o")
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe
        return open(path, "wb")
    from ms4.models import atomic

    return atomic.replacing(path, part=f"{os.path.realpath(path)}.part")  # a link may lead to another disk


class Output:
    """Where the answer goes: stdout, or the file of --output (- is stdout, too).  Each write is flushed."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path = None if path == "-" else path
        self._started = False
        self._file = os.fdopen(self._open(path), "w", encoding="utf-8", newline="\n") if path else sys.stdout
        if self._file is None:
            raise CliError("stdout is closed: there is nowhere to write the answer")
        try:
            self.fd: int | None = self._file.fileno()
        except (OSError, ValueError):  # no file of the system: a test's
            self.fd = None
        self.guard: contextlib.AbstractContextManager[None] = contextlib.nullcontext()  # around each write
        self.terminal = is_terminal(self._file)
        self.colour = use_colour(self._file)

    @staticmethod
    def _open(path: str) -> int:
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CliError(f"{path}: {error.strerror}") from None

    def columns(self) -> int:
        return columns(self._file)

    def has_rows(self) -> bool:
        """True for a terminal that can keep some of its rows apart from those that scroll."""
        return self.terminal and self.fd is not None and not is_plain()

    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal now; (0, 0) if it does not say."""
        try:
            size = os.get_terminal_size(self._file.fileno())
            return size.columns, size.lines
        except (OSError, ValueError):
            return 0, 0

    def write(self, text: str) -> None:
        try:
            if self.path and not self._started:  # the old content goes only when there is new content
                fd = self._file.fileno()
                if stat.S_ISREG(os.fstat(fd).st_mode):  # a pipe or /dev/null has none
                    os.ftruncate(fd, 0)
            self._started = True
            with self.guard:
                self._put(text.encode("utf-8", "backslashreplace"))
        except BrokenPipeError:
            raise ReaderGone from None
        except OSError as error:
            raise CliError(f"cannot write the answer: {error.strerror}") from None

    def _put(self, data: bytes) -> None:
        """All of it, however little is taken at a time, and however long a pipe that does not block is full."""
        if self.fd is None:
            self._file.buffer.write(data)
            self._file.flush()
            return
        self._file.flush()
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.fd, rest) :]
            except BlockingIOError:
                select.select([], [self.fd], [])

    def close(self) -> None:
        if self.path:
            self._file.close()

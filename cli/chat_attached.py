"""What a chat attaches besides single files: all that match a pattern, and what a command of the shell has printed."""

from __future__ import annotations

import glob
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ms4.cli import attachments, errors, streams
from ms4.cli.errors import MissingError, UsageError
from ms4.models.untrusted import InputError, shown
from ms4.quant import visible

if TYPE_CHECKING:
    from ms4 import StopFlag
    from ms4.cli.repl import Opened, Talk
    from ms4.models.document import Attachment

MOST_FILES = 200  # that a pattern may match
MOST_KEPT = 1 << 15  # bytes of a command's output at its beginning, and as many at its end
MOST_PRINTED = 8 << 20  # bytes after which a command is ended
GRACE = 0.2  # seconds in which the last output of a command comes, and in which it may end by itself
# What moves the cursor, changes a style or names the window; then what is left of control characters.
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])|[\x00-\x08\x0b-\x1f\x7f]")
SHELL = re.compile(r"!(?![\[(=])\s*(\S[^\n]*)")  # a line that is a command; not ![an image], not !=


# --- patterns


def matching(text: str) -> list[str] | None:
    """The files that a pattern such as *.txt or src/**/*.py matches, by name; None if a text is no pattern.

    Hidden files match only what begins with a dot.  MissingError: there is none.  UsageError: there are too many.
    """
    words = attachments.split(text)
    pattern = os.path.expanduser(words[0] if len(words) == 1 else text)
    if os.path.lexists(text) or not glob.has_magic(pattern):
        return None
    found = sorted(path for path in glob.iglob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise MissingError(f"no file matches {shown(pattern)}", f"in {shown(os.getcwd())}")
    if len(found) > MOST_FILES:
        raise UsageError(f"{shown(pattern)} matches {len(found)} files", f"at most {MOST_FILES} at once")
    return found


def open_files(talk: Talk, text: str) -> Opened:
    """What /file names: a file, or all that match a pattern; of these, what cannot be attached is said and left out."""
    pdf, rule = talk.settings.pdf, talk.settings.rule
    paths = matching(text)
    if paths is None:
        return talk.priced(attachments.open_file(attachments.typed_path(text), pdf, rule))
    parts: list[Attachment] = []
    costs: list[tuple[str, int]] = []
    for path in paths:
        try:
            opened = attachments.open_file(path, pdf, rule)
        except InputError as error:
            talk.tell(errors.escape(f"left out: {error}"))
            continue
        costs.append((shown(path), sum(talk.n_tokens(part) for part in opened)))
        parts += opened
    names = ", ".join(f"{name} {n}" for name, n in costs)
    files = "1 file" if len(costs) == 1 else f"{len(costs)} files"
    return parts, [f"{files}, {sum(n for _, n in costs)} tokens: {names}"] if parts else []


# --- commands of the shell


def run_shell(talk: Talk, line: str) -> bool:
    """Runs `!command` at a terminal and attaches what it was and printed; False if the line is none."""
    match = SHELL.fullmatch(line.strip()) if talk.interactive and line.startswith("!") else None
    if match is None:
        return False
    command = match[1]
    output, ending = printed(command)
    if output is None:
        talk.tell(ending)
        return True
    text = f"$ {command}\n{output}{f'[{ending}]' if ending else ''}".rstrip("\n") + "\n"
    text = fenced(text)
    talk.take([text], [f"{ending + '; ' if ending else ''}command and output, {talk.n_tokens(text)} tokens"])
    return True


def fenced(text: str) -> str:
    """A text as a block of code, whatever blocks are in it."""
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    return f"{'`' * (longest + 1)}\n{text}{'`' * (longest + 1)}"


def printed(command: str) -> tuple[str | None, str]:
    """Runs a command, whose output is shown as it comes; Ctrl-C ends it.

    Returns what it printed, bounded, and how it ended ("": well); None if it could not be started.
    """
    from ms4.models.interrupt import Interrupt

    with Interrupt() as ctrl_c:  # no exception, which could come between what is shown and what is kept of it
        return printed_until(command, ctrl_c.flag)


def printed_until(command: str, stop: StopFlag) -> tuple[str | None, str]:
    shell = os.environ.get("SHELL") or ""
    try:
        process = subprocess.Popen(
            [shutil.which(shell) or "/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours, and ends all that the command has started
        )
    except OSError as error:
        return None, f"no shell: {error.strerror}"
    head, tail, n, ending = b"", b"", 0, ""
    for data in read_output(process, stop):
        show(data, n)
        n += len(data)
        room = MOST_KEPT - len(head)
        head, tail = head + data[:room], (tail + data[room:])[-MOST_KEPT:]
        if n > MOST_PRINTED:
            ending = f"ended after {MOST_PRINTED >> 20} MiB of output"
            break
    if stop.is_set():
        ending = "stopped"
    status = end(process)
    if not ending and status:
        ending = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
    left_out = n - len(head) - len(tail)
    middle = f"\n[{left_out} bytes left out]\n" if left_out else ""
    output = plain(head) + middle + plain(tail) if left_out else plain(head + tail)
    if n > MOST_KEPT:
        sys.stderr.write("[the rest is not shown]\n")
    return (output if output.endswith("\n") or not output else output + "\n"), ending


def plain(data: bytes) -> str:
    return ESCAPES.sub("", data.decode("utf-8", "replace").replace("\r\n", "\n"))


def show(data: bytes, before: int) -> None:
    """Output as it comes, up to as much as is kept of its beginning."""
    text = plain(data[: max(0, MOST_KEPT - before)])
    if text:
        sys.stderr.write(visible.text(text) if streams.is_terminal(sys.stderr) else text)
        sys.stderr.flush()


def read_output(process: subprocess.Popen[bytes], stop: StopFlag) -> Iterator[bytes]:
    """What a process prints until its end, or until it is stopped; what it leaves running is not waited for."""
    assert process.stdout is not None
    fd = process.stdout.fileno()
    over: float | None = None
    stopped = False
    while not stopped:
        stopped = stop.is_set()  # what is in the pipe then was printed before
        if select.select([fd], [], [], 0 if stopped else GRACE / 4)[0]:
            data = os.read(fd, 1 << 16)
            if not data:
                return
            yield data
        if over is None and process.poll() is not None:
            over = time.monotonic() + GRACE
        elif over is not None and time.monotonic() > over:
            return


def end(process: subprocess.Popen[bytes]) -> int:
    """Ends a command that still runs, at first politely; its exit status, negative for a signal."""
    assert process.stdout is not None
    process.stdout.close()
    for number in (0, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            if number and process.poll() is None:
                os.killpg(process.pid, number)
            return process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()

"""untrusted.py: bytes from outside: reads files and says what they are.  It decodes nothing.

What a user attaches can be anything at all, so reading is bounded, devices and pipes are never waited for, and every
refusal is an `InputError` of one line.
"""

from __future__ import annotations

import os
import stat


class InputError(ValueError):
    """Something that the user attached cannot be used; the message is one printable line that names it."""


def shown(name: str) -> str:
    """A file name as it may be printed: control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def read_file(path: str | os.PathLike[str], limit: int, error: type[InputError] = InputError) -> bytes:
    """The bytes of a regular file of at most `limit` bytes."""
    name = shown(os.fsdecode(path))
    if "\0" in os.fsdecode(path):
        raise error(f"{name}: not a possible file name")
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would never return.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{name}: not a regular file; send its bytes to stdin and attach -")
            data = file.read(limit + 1)
    except OSError as e:
        raise error(f"{name}: {(e.strerror or str(e)).lower()}") from None
    check_size(data, limit, name, error)
    return data


def check_size(data: bytes, limit: int, name: str, error: type[InputError] = InputError) -> None:
    if len(data) > limit:
        raise error(f"{shown(name)}: larger than {limit >> 20} MiB, the limit for this kind of file")


def sniff(data: bytes) -> str | None:
    """What the first bytes say: "PNG", "JPEG", "WEBP", "GIF", "PDF", or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    # Readers of PDF accept some bytes of rubbish before the header; a text that only speaks of it has no such end.
    header = data.find(b"%PDF-", 0, 1024)
    return "PDF" if header == 0 or (header > 0 and b"startxref" in data[-2048:]) else None

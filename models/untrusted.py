"""untrusted.py: bytes from outside: reads files and says what they are.  It decodes nothing.

What a user attaches can be anything at all, so reading is bounded, a pipe that nobody writes to is not waited for, and
every refusal is an `InputError` of one line.
"""

from __future__ import annotations

import codecs
import os
import stat
from dataclasses import dataclass, field

from ms4.quant import visible

BMP_HEADERS = tuple(bytes([n]) for n in (12, 40, 52, 56, 64, 108, 124))


class InputError(ValueError):
    """Something that the user attached cannot be used; the message is one printable line that names it."""


@dataclass(frozen=True)
class Reading:
    """How files are read: as strict UTF-8 and without a password, unless the user says otherwise."""

    encoding: str = ""  # a name that Python knows
    lossy: bool = False  # what cannot be decoded becomes U+FFFD
    password: str = field(default="", repr=False)  # of PDFs

    @property
    def name(self) -> str:
        return self.encoding or "UTF-8"


def decode_text(data: bytes, rule: Reading) -> str:
    """The text in some bytes, without a byte order mark.  UnicodeError, if they are none."""
    if mark := marked(data, rule):
        raise UnicodeDecodeError("utf-8", data[:2], 0, 2, mark)
    text = data.decode(rule.encoding or "utf-8", "replace" if rule.lossy else "strict")
    return text.removeprefix("\ufeff")


def marked(data: bytes, rule: Reading) -> str:
    """The encoding that a byte order mark names, if it is not UTF-8 and the user has said nothing else; or ""."""
    if rule.encoding:
        return ""
    # The mark of UTF-32 begins with that of UTF-16.
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    return "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""


def shown(name: str) -> str:
    """A file name as it may be printed."""
    return visible.line(name) or "''"


def drop_line_end(text: str) -> str:
    """A text without its last line end, LF or CRLF, which an editor or `echo` has added; those before it stay."""
    return text[: -2 if text.endswith("\r\n") else -1] if text.endswith("\n") else text


def read_file(path: str | os.PathLike[str], limit: int, error: type[InputError] = InputError) -> bytes:
    """The bytes of a file of at most `limit` bytes, or what comes out of a pipe or a device that ends."""
    name = shown(os.fsdecode(path))
    if "\0" in os.fsdecode(path):
        raise error(f"{name}: not a possible file name")
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would never return.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            if os.isatty(file.fileno()):
                raise error(f"{name}: a terminal, not a file")
            os.set_blocking(file.fileno(), True)
            data = file.read(limit + 1)
            if not data and not stat.S_ISREG(mode):
                raise error(f"{name}: nothing came out of it; a pipe needs somebody who writes to it")
    except OSError as e:
        raise error(f"{name}: {(e.strerror or str(e)).lower()}") from None
    check_size(data, limit, name, error)
    return data


def check_size(data: bytes, limit: int, name: str, error: type[InputError] = InputError) -> None:
    if len(data) > limit:
        raise error(f"{shown(name)}: larger than {limit >> 20} MiB, the limit for this kind of file")


def sniff(data: bytes) -> str | None:
    """What the first bytes say: "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF", "PDF", or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    # Two letters alone may be a text: the sizes of the header and the zeros before them are no text.
    if data[:2] == b"BM" and data[6:10] == bytes(4) and data[15:18] == bytes(3) and data[14:15] in BMP_HEADERS:
        return "BMP"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if data[4:8] == b"ftyp":
        # The main brand, or for the general ones of a collection of pictures the first of the others that tells.
        for brand in (data[i : i + 4] for i in (8, *range(16, min(64, int.from_bytes(data[:4], "big")), 4))):
            if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"):
                return "HEIF"
            if brand in (b"avif", b"avis"):
                return "AVIF"
    # Readers of PDF accept some bytes of rubbish before the header; a text that only speaks of it has no such end.
    header = data.find(b"%PDF-", 0, 1024)
    return "PDF" if header == 0 or (header > 0 and b"startxref" in data[-2048:]) else None

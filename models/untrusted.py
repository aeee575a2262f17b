"""untrusted.py: bytes from outside: reads files and says what they are.  It decodes nothing.

What a user attaches can be anything at all, so reading is bounded, a pipe that nobody writes to is not waited for, and
every refusal is an `InputError` of one line.
"""

from __future__ import annotations

import codecs
import os
import stat
from dataclasses import dataclass, field
from typing import Literal

from ms4.quant import visible

BMP_HEADERS = tuple(bytes([n]) for n in (12, 40, 52, 56, 64, 108, 124))


MOST_RAW_PAGES = 16  # of a TIFF, looked at for the data of a sensor
# Of Olympus, Panasonic, Fujifilm and Sigma; the others write TIFFs.
RAW_HEADERS = (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW", b"FOVb")


# What people attach that is neither: its first bytes, what it is, and what makes it something that can be read.
_PDF = "export it as PDF"
_PICTURE = "save it as PNG or JPEG"
_STRANGERS = (
    (b"\0\0\0\x0cjP  ", "a JPEG 2000", _PICTURE),
    (b"\xff\x4f\xff\x51", "a JPEG 2000", _PICTURE),
    (b"\0\0\0\x0cJXL ", "a JPEG XL", _PICTURE),
    (b"\xff\x0a", "a JPEG XL", _PICTURE),
    (b"8BPS", "a file of Photoshop", _PICTURE),
    (b"gimp xcf", "a file of GIMP", _PICTURE),
    (b"\0\0\1\0", "an icon", _PICTURE),
    (b"icns", "an icon", _PICTURE),
    *((b"P%d%c" % (n, blank), "a Netpbm picture", _PICTURE) for n in (4, 5, 6, 7) for blank in b"\n\r \t"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of Microsoft Office", _PDF),
    (b"{\\rtf", "a document in RTF", _PDF),
    (b"%!PS", "a document in PostScript", f"{_PDF}: ps2pdf does that"),
    (b"AT&TFORM", "a DjVu document", f"{_PDF}: ddjvu -format=pdf does that"),
    (b"\x1f\x8b", "compressed", "gunzip it first"),
    (b"BZh", "compressed", "bunzip2 it first"),
    (b"\xfd7zXZ\0", "compressed", "unxz it first"),
    (b"\x28\xb5\x2f\xfd", "compressed", "unzstd it first"),
    (b"7z\xbc\xaf\x27\x1c", "an archive", "unpack it, and attach what is in it"),
    (b"Rar!\x1a\x07", "an archive", "unpack it, and attach what is in it"),
    (b"\x7fELF", "a program", "the model reads text and pictures"),
    (b"SQLite format 3\0", "a database of SQLite", "sqlite3 FILE .dump writes it as text"),
    (b"GGUF", "a model, not an attachment", "-m FILE runs it"),
    (b"ID3", "sound", "the model reads text and pictures"),
    (b"OggS", "sound or video", "the model reads text and pictures"),
    (b"fLaC", "sound", "the model reads text and pictures"),
    (b"\x1a\x45\xdf\xa3", "a video", "the model reads text and pictures"),
)
# Within a ZIP: the name or the beginning of its first parts.
_ZIPPED = (
    (b"word/", "a document of Word", f"{_PDF}, or as text: pandoc FILE -t plain"),
    (b"ppt/", "a presentation of PowerPoint", _PDF),
    (b"xl/", "a table of Excel", f"{_PDF} or CSV"),
    (b"mimetypeapplication/vnd.oasis.opendocument", "a document of LibreOffice", _PDF),
    (b"mimetypeapplication/epub+zip", "an e-book", f"{_PDF}, or as text: pandoc FILE -t plain"),
)


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
    """What the first bytes say: "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF", "RAW", "PDF", or None.

    RAW is what the sensor of a camera saw, whoever made the camera.
    """
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
    if data.startswith(RAW_HEADERS):
        return "RAW"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "RAW" if data[2] != 43 and data[3] != 43 and _of_a_sensor(data) else "TIFF"  # 43: of more than 4 GB
    if data[4:8] == b"ftyp":
        # The main brand, or for the general ones of a collection of pictures the first of the others that tells.
        for brand in (data[i : i + 4] for i in (8, *range(16, min(64, int.from_bytes(data[:4], "big")), 4))):
            if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"):
                return "HEIF"
            if brand in (b"avif", b"avis"):
                return "AVIF"
            if brand == b"crx ":  # CR3
                return "RAW"
    # Readers of PDF accept some bytes of rubbish before the header; a text that only speaks of it has no such end.
    header = data.find(b"%PDF-", 0, 1024)
    return "PDF" if header == 0 or (header > 0 and b"startxref" in data[-2048:]) else None


def stranger(data: bytes) -> str:
    """What a file is that is neither text nor a picture nor a PDF, and what to do with it; "" if that is not known."""
    for begin, name, way in _STRANGERS:
        if data.startswith(begin):
            return f"{name}; {way}"
    if data.startswith(b"PK\3\4"):
        for part, name, way in _ZIPPED:
            if part in data[:4096] or part in data[-65536:]:
                return f"{name}; {way}"
        return "an archive; unpack it, and attach what is in it"
    if data[:4] == b"RIFF" and data[8:12] in (b"WAVE", b"AVI "):
        return f"{'sound' if data[8:12] == b'WAVE' else 'a video'}; the model reads text and pictures"
    if data[4:8] == b"ftyp":
        return "a video or sound; the model reads text and pictures"
    return ""


def _of_a_sensor(data: bytes) -> bool:
    """Whether a TIFF holds the raw data of a camera (CR2, NEF, ARW, DNG): as far as its first pages say."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    if data[8:10] == b"CR":
        return True

    def number(at: int, n: int) -> int:
        return int.from_bytes(data[at : at + n], order)

    pages, seen = [number(4, 4)], 0
    while pages and seen < MOST_RAW_PAGES:
        page, seen = pages.pop(0), seen + 1
        for entry in range(page + 2, page + 2 + 12 * min(number(page, 2), 512), 12):
            tag, n, value = number(entry, 2), number(entry + 4, 4), number(entry + 8, 4)
            if (tag, number(entry + 2, 2), n) == (0xC612, 1, 4):  # the version of DNG
                return True
            if tag == 0x106 and number(entry + 8, 2) in (32803, 34892):  # how its numbers are meant: as the sensor's
                return True
            if tag == 0x14A:  # more pages below this one
                pages += [value] if n == 1 else [number(value + 4 * i, 4) for i in range(min(n, MOST_RAW_PAGES))]
    return False

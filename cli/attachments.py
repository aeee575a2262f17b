"""What is attached to a message: images, text files and pages of PDFs, from files, stdin or the clipboard.

Owns the order in which they stand in the message, and the rules for stdin when it holds an attachment.  What images
become in the prompt is the business of `models/vision.py`.
"""

from __future__ import annotations

import base64
import binascii
import getpass
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ms4.cli import fetched, streams, typed
from ms4.cli.errors import MissingError, UnreadableError, UsageError, escape
from ms4.models import document
from ms4.models.document import MAX_PDF_BYTES, UTF_8, Attachment
from ms4.models.image import MAX_BYTES, Image, load_image
from ms4.models.untrusted import Reading, drop_line_end, shown, sniff

if TYPE_CHECKING:
    from ms4.models.dialogue import Content

FILES = {"-i": False, "--image": False, "-f": True, "--file": True}  # options that take files -> texts, too
ENDING = re.compile(r"\S\.(png|jpe?g|webp|gif|bmp|tiff?|avif|hei[cf]|cr[23]|nef|arw|dng|pdf)$", re.IGNORECASE)
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
# Windows PowerShell, which WSL can call: the image as PNG in base64, for it writes text only.
POWERSHELL = (
    "Add-Type -AssemblyName System.Windows.Forms, System.Drawing; "
    "$image = [Windows.Forms.Clipboard]::GetImage(); if ($null -eq $image) { exit 1 }; "
    "$data = New-Object IO.MemoryStream; $image.Save($data, [Drawing.Imaging.ImageFormat]::Png); "
    "[Convert]::ToBase64String($data.ToArray())"
)
CLIPBOARDS = (  # programs that write the image on the clipboard to stdout
    ("wl-paste", "--no-newline", "--type", "image/png"),
    ("xclip", "-selection", "clipboard", "-target", "image/png", "-out"),
    ("pngpaste", "-"),
    ("powershell.exe", "-NoProfile", "-NonInteractive", "-STA", "-Command", POWERSHELL),
)


@dataclass(frozen=True)
class Sources:
    """What the options --image, --file and --pdf name, and whether stdin may be read."""

    images: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    pdf: str = "auto"
    rule: Reading = Reading()  # --encoding, --lossy, --pdf-password
    stdin: bool = True
    quiet: bool = False  # about waiting for stdin

    @classmethod
    def of(
        cls,
        images: Sequence[str] | None,
        files: Sequence[str] | None,
        pdf: str,
        rule: Reading,
        stdin: bool,
        quiet: bool,
    ) -> Sources:
        """The same, from options as they come."""
        return cls(tuple(images or ()), tuple(files or ()), pdf, rule, stdin, quiet)

    def __bool__(self) -> bool:
        return bool(self.images or self.files)

    def take_stdin(self) -> bool:
        """True if stdin is one of the attachments."""
        n = self.images.count("-") + sum(document.split_spec(spec)[0] == "-" for spec in self.files)
        if n > 1:
            raise UsageError("stdin can be attached only once")
        if n and not self.stdin:
            raise UsageError("--no-stdin, and - attaches stdin: they exclude each other")
        return n == 1


def gather(sources: Sources, words: Sequence[str], fill: Callable[[str], str] | None = None) -> Content:
    """The content of a message: images, files, then the text from stdin and from the arguments.

    fill: what a template makes of that text, which may be empty then.
    """
    taken = sources.take_stdin()
    refuse_file_names(sources, words)
    parts: list[Attachment] = [open_image(path, sources.quiet) for path in sources.images]
    for spec in sources.files:
        parts += open_file(spec, sources.pdf, sources.rule, sources.quiet)
    piped = None
    if not taken and sources.stdin:
        data = streams.read_bytes(quiet=sources.quiet)
        if data is not None and sniff(data):
            more = streams.read_bytes(MAX_PDF_BYTES, sources.quiet) or b""
            parts = [*document.load_bytes(data + more, "stdin", None, sources.pdf, rule=sources.rule), *parts]
        elif data is not None:
            piped = streams.refuse_wide(streams.stdin_text(data, sources.rule), "stdin", sources.rule)
            piped = drop_line_end(piped)
    text = streams.join_prompt(piped, words, alone=bool(parts) or fill is not None, rule=sources.rule)
    return content(parts, fill(text) if fill else text)


def content(parts: Sequence[Attachment], text: str) -> Content:
    """A message of these parts and the text after them, with a blank line between texts."""
    chunks: list[dict[str, Any]] = []
    for part in [*parts, text]:
        if isinstance(part, Image):
            chunks.append({"type": "image", "image": part})
        elif part and chunks and chunks[-1]["type"] == "text":
            chunks[-1]["text"] += "\n\n" + part
        elif part:
            chunks.append({"type": "text", "text": part})
    return text if not parts else chunks


def open_image(path: str, quiet: bool = False) -> Image:
    """The image in a file; - is stdin."""
    if path == "-":
        data = stdin_bytes(MAX_BYTES, quiet)
        return load_image(data, "stdin")
    path = local_file(path)
    if fetched.is_address(path):
        return load_image(fetched.bytes_at(path, MAX_BYTES, quiet), path)
    try:
        return load_image(path)
    except ValueError:
        if path.lower().endswith(".pdf"):
            raise UnreadableError(f"{shown(path)} is no image", f"a PDF is attached with -f {shown(path)}") from None
        raise


def open_file(spec: str, pdf: str = "auto", rule: Reading = UTF_8, quiet: bool = False) -> list[Attachment]:
    """The parts of PATH or PATH:PAGES; - is stdin."""
    path, pages = document.split_spec(spec)
    if path == "-":
        return document.load_bytes(stdin_bytes(MAX_PDF_BYTES, quiet), "stdin", pages, pdf, rule=rule)
    path = local_file(path)
    spec = f"{path}:{pages}" if pages else path
    data = fetched.bytes_at(path, MAX_PDF_BYTES, quiet) if fetched.is_address(path) else None

    def load(rule: Reading) -> list[Attachment]:
        if data is not None:
            return document.load_bytes(data, path, pages, pdf, rule=rule)
        return document.load_file(spec, pdf, rule=rule)

    try:
        return load(rule)
    except document.PasswordError as error:
        if rule.password or not (streams.is_terminal(sys.stdin) and streams.is_terminal(sys.stderr)):
            raise
        password = getpass.getpass(f"{error}: ", stream=sys.stderr)
        return load(replace(rule, password=password))


def open_path(spec: str, pdf: str = "auto", rule: Reading = UTF_8) -> list[Attachment]:
    """As open_file, where stdin is taken: its lines are the messages of a chat."""
    if document.split_spec(spec)[0] == "-":
        raise UsageError("in a chat, stdin holds the messages and cannot be attached")
    return open_file(spec, pdf, rule)


def typed_path(text: str) -> str:
    """A path as it is typed, or dropped on a terminal: with ~, quotes or backslashes."""
    if os.path.lexists(text):
        return text
    words = split(text)
    path = typed.local_path(words[0] if len(words) == 1 else text)
    if not path or document.split_spec(path)[0] == "-":
        raise UsageError("name a file: /image PATH or /file PATH[:PAGES]")
    return os.path.expanduser(path)


def split(text: str) -> list[str]:
    """The words of a line, by the rules of the shell; none if it breaks them."""
    try:
        return shlex.split(text)
    except ValueError:
        return []


def dropped(line: str) -> list[str]:
    """The files that a line names and nothing else, as terminals write them when they are dropped there.

    A bare name is no such line: it may as well be a word.
    """
    line = line.strip()
    found = []
    for text in [line] if os.path.isfile(line) else split(line):
        path = os.path.expanduser(typed.local_path(text))
        # A path that is quoted, or an address, has become absolute here; ./ and ~ are as they were typed.
        if not text.startswith(("./", "../")) and not os.path.isabs(path):
            return []
        try:
            if not os.path.isfile(path):
                return []
        except ValueError:  # a NUL
            return []
        found.append(path)
    return found


# @PATH, as a word of a message; in quotes if the path has blanks.
NAMED = re.compile(r"""(?<!\S)@(?:"([^"\n]+)"|'([^'\n]+)'|(\S+))""")


def named(text: str) -> list[str]:
    """The files that a message names with an @ before them, with their pages; what is no file is only a word."""
    found = []
    for quoted, single, bare in NAMED.findall(text):
        path = os.path.expanduser(quoted or single or bare)
        for spec in (path, path.rstrip(".,;:!?)")):
            try:
                there = os.path.isfile(document.split_spec(spec)[0])
            except ValueError:  # a NUL
                there = False
            if there:
                found.append(spec)
                break
    return list(dict.fromkeys(found))


def spread(args: Sequence[str], ours: Mapping[str, str | None]) -> list[str]:
    """A command line in which -i and -f stand before each of their files, as of `-i *.jpg "Which is best?"`.

    To them belong the words directly behind that name a file, or have the ending of one: a slip of the pen shall be
    said, not become a word of the prompt.  ours: the option -> the name of its value; None for a flag.
    """
    rest, found = list(args), []
    while rest and rest[0] != "--":
        arg = rest.pop(0)
        found.append(arg)
        name = arg if arg in ours else arg.partition("=")[0] if arg.startswith("--") else arg[:2]
        if name == arg and ours.get(name) is not None and rest:
            found.append(rest.pop(0))
        while name in FILES and rest and not rest[0].startswith("-") and _is_meant(rest[0], FILES[name]):
            found += [name, rest.pop(0)]
    return found + rest


def _is_meant(word: str, texts: bool) -> bool:
    return _is_document(word, texts) or bool(ENDING.search(document.split_spec(word)[0]))


def refuse_file_names(sources: Sources, words: Sequence[str]) -> None:
    """A file that stands elsewhere among the words would be taken for one of them, and the model would not see it."""
    typed.refuse_model(words, "ms4 run", "prompt")
    lost = [word for word in words if sources and _is_document(word, bool(sources.files))]
    if lost:
        option, given = ("-f", sources.files) if sources.files else ("-i", sources.images)
        right = " ".join(f"{option} {shlex.quote(path)}" for path in (*given, *lost))
        raise UsageError(f"{shown(lost[0][-80:])} is a file, not a word of the prompt", escape(right, 200))


def _is_document(word: str, texts: bool) -> bool:
    """True if a word is the name of a picture or a PDF, or with `texts` of any file that has an extension."""
    path = document.split_spec(word)[0]
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return sniff(file.read(2048)) is not None or (texts and bool(os.path.splitext(path)[1]))
    except (OSError, ValueError):
        return False


def local_file(path: str) -> str:
    """The path that is meant: of a file:// address, and with a ~ that the shell has left, as in --image=~/a.png.

    An address of the web stays one; any other is an error.
    """
    if os.path.lexists(path) or fetched.is_address(path):
        return path
    path = os.path.expanduser(typed.local_path(path))
    if ADDRESS.match(path):
        raise UnreadableError(f"{shown(path)}: ms4 fetches from http and https alone", fetched.HINT)
    return path


def stdin_bytes(limit: int, quiet: bool = False) -> bytes:
    data = streams.read_bytes(limit, quiet)
    if data is None:
        raise UsageError("nothing on stdin to attach", 'cat page.png | ms4 run -i - "your question"')
    return data


def clipboard_image() -> Image:
    """The image on the clipboard."""
    commands = [command for command in CLIPBOARDS if shutil.which(command[0])]
    if not commands:
        raise MissingError("no program that reads the clipboard: install wl-clipboard, xclip or pngpaste")
    for command in commands:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
        except subprocess.TimeoutExpired:
            raise UnreadableError(f"{command[0]} does not answer") from None
        if not done.returncode and done.stdout:
            data = done.stdout
            try:
                return load_image(base64.b64decode(data) if command[0] == "powershell.exe" else data, "clipboard")
            except binascii.Error:
                raise UnreadableError(f"{command[0]} gives no image") from None
    raise UnreadableError("there is no image on the clipboard")

"""What of a text from outside a terminal may be given: all of it, but for what commands it or reorders the text.

Owns the one list of such characters.  Every other character is somebody's language and stays: no-break spaces, joiners,
ideographic space, private use.
"""

from __future__ import annotations

import re

# C0 and C1 (with DEL), bidi embeddings, overrides and isolates, lone surrogates.  Marks of direction (U+200E, U+200F,
# U+061C) order only what stands beside them, as Hebrew and Arabic need it.
_COMMANDS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_TEXT = re.compile(f"[{_COMMANDS}]")
_IN_LINE = re.compile(f"[{_COMMANDS}\t\n\u2028\u2029]")


def text(given: str) -> str:
    """A text of several lines: newlines and tabs stay."""
    return _IN_TEXT.sub(_escaped, given)


def line(given: str) -> str:
    """A text that is to stay on one line."""
    return _IN_LINE.sub(_escaped, given)


def json(given: str) -> str:
    """JSON, which stays the same value: its own escapes take the place of ours."""
    return _IN_TEXT.sub(lambda match: f"\\u{ord(match[0]):04x}", given)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8, as Python keeps it in arguments and file names
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{{{code:x}}}"

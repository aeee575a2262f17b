"""How GGUF spells the bytes of byte-level tokens: each byte as one printable letter, as GPT-2 did."""

from __future__ import annotations

from functools import cache
from itertools import count

import numpy as np

NEWLINE = 10


@cache
def byte_letters() -> tuple[str, ...]:
    """The letter of each byte: the byte itself if it is printable, the others take the letters from U+0100 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = count(256)
    return tuple(chr(b if b in plain else next(others)) for b in range(256))


def spell(data: bytes) -> str:
    return "".join(byte_letters()[b] for b in data)


def unspell_lines(spelled: bytes) -> list[bytes]:
    """The bytes of many spelled tokens at once; a newline stands before each.  ValueError if one is not spelled so."""
    flat = np.frombuffer(spelled, np.uint8)
    more, lead = (flat & 0xC0) == 0x80, flat >= 0xC0
    # All letters are below U+0144, so a character is one byte, or a lead of C2 to C5 and one byte more.
    if (lead & (flat > 0xC5)).any() or not np.array_equal(more, np.concatenate(([False], lead))[: len(flat)]):
        raise ValueError("a token is not in GPT-2 spelling (damaged UTF-8?)")
    if len(flat) and lead[-1]:
        raise ValueError("a token ends inside a character")
    code = flat.astype(np.uint16)
    at = np.flatnonzero(lead)
    code[at] = (code[at] & 0x1F) << 6 | (code[at + 1] & 0x3F)
    code = code[~more]
    table = np.full(512, 256, np.uint16)
    table[[ord(letter) for letter in byte_letters()]] = range(256)
    data = table[code]
    marks = np.flatnonzero(code == NEWLINE)
    data[marks] = NEWLINE
    if (data > 255).any():
        raise ValueError("a token holds a letter that stands for no byte")
    text = data.astype(np.uint8).tobytes()
    ends = [*marks.tolist(), len(text)]
    return [text[a + 1 : b] for a, b in zip(ends, ends[1:], strict=False)]

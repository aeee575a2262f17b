"""Text to ids and back: byte-level BPE built from the vocabulary of the file itself.

It never knows a control token: whatever the text spells, `encode` gives ordinary ids only.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

# How text is cut into pieces before BPE: the pattern that tokenizer v15 was trained with.
PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# Unicode White_Space without CR and LF.
BLANK = "\t\v\f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
BLANKS = re.compile(f"[{BLANK}]+")
# A run of this many blanks goes round the regex engine, whose stack overflows at a million.
LONG = 100_000


class TokenizerError(ValueError):
    """This vocabulary cannot be used, or the text is not Unicode text."""


class Vocabulary(Protocol):
    """What a tokenizer needs of `ms4.models.vocabulary.Vocabulary`."""

    @property
    def model(self) -> str: ...
    @property
    def pre(self) -> str: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_control(self) -> int: ...
    @property
    def n_used(self) -> int: ...
    def mergeable_ranks(self) -> dict[bytes, int]: ...
    def spelling(self, token: int, /) -> bytes: ...


class Tokenizer:
    """One vocabulary, ready for use."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        if vocabulary.model == "llama":
            raise TokenizerError(
                "the file has a SentencePiece vocabulary (tokenizer.ggml.model is 'llama'), which ms4 does not read; "
                "use a file with the Tekken vocabulary of Mistral Small 4"
            )
        if (vocabulary.model, vocabulary.pre) != ("gpt2", "tekken"):
            raise TokenizerError(
                f"the file's tokenizer is {vocabulary.model!r} with pre-tokenizer {vocabulary.pre!r}; "
                "ms4 reads 'gpt2' with 'tekken'"
            )
        ranks = vocabulary.mergeable_ranks()
        # BPE starts from single bytes.
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise TokenizerError(f"the vocabulary has no token for byte {missing[0]} ({len(missing)} bytes in all)")
        # Here and not above: commands that need no tokenizer start without it.
        import tiktoken

        self._vocabulary = vocabulary
        self._encoding = tiktoken.Encoding("tekken", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.n_vocab = vocabulary.n_vocab
        self.n_control = vocabulary.n_control
        self.n_used = vocabulary.n_used

    def encode(self, text: str) -> list[int]:
        """The ids of a text.  Never a control id, and no BOS."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"character {error.start} is half of a surrogate pair, not text") from None
        shift = self.n_control
        ids: list[int] = []
        for part, whole in split_blanks(text):
            ranks = self._encoding._encode_single_piece(part) if whole else self._encoding.encode_ordinary(part)
            ids.extend([rank + shift for rank in ranks])
        return ids

    def piece(self, id: int) -> bytes:
        """The bytes that a token prints: none for control tokens."""
        if not 0 <= id < self.n_vocab:
            raise ValueError(f"token id {id}: 0 to {self.n_vocab - 1}")
        if id < self.n_control:
            return b""
        try:
            return self._encoding.decode_single_token_bytes(id - self.n_control)
        except KeyError:
            return b""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that these tokens print."""
        return b"".join(map(self.piece, ids))

    def text(self, ids: Iterable[int]) -> str:
        """What these tokens print, with U+FFFD for bytes that are not UTF-8."""
        return self.decode(ids).decode("utf-8", "replace")

    def spelling(self, id: int) -> bytes:
        """A token for display: control tokens by their name."""
        return self._vocabulary.spelling(id)


def split_blanks(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts very long runs of blanks out of a text: (part, whether it is exactly one piece).

    This changes no id.  The pattern has no look-behind, and no piece reaches across the start of such a run: what
    stands before it ends in a line break or in something visible, and every alternative that may begin with a blank
    wants something visible as the second character.  Inside, only `\\s+(?!\\S)` can match: all of the run at the end
    of the text, else all but its last blank.  Before a line break the run belongs to `\\s*[\\r\\n]+`, which the regex
    engine matches without its stack.
    """
    done = 0
    # A long run covers a multiple of LONG, and begins less than LONG before the first that it covers.
    for probe in range(0, len(text), LONG):
        if probe < done or not (run := BLANKS.match(text, probe)):
            continue
        floor = max(done, probe - LONG)
        start = floor + len(text[floor:probe].rstrip(BLANK))
        end = run.end()
        if end - start < LONG or text[end : end + 1] in ("\r", "\n"):
            continue
        if end < len(text):
            end -= 1
        if start > done:
            yield text[done:start], False
        yield text[start:end], True
        done = end
    if done < len(text):
        yield text[done:], False


class StreamDecoder:
    """Bytes to text as they arrive: holds back what may still become a character, replaces what cannot."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end; the decoder is as new afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
